"""Take the Markdown of the repository into the site as it is: mkdocs.yml names this file as a hook.

Links on the pages lead from file to file of the repository, as GitHub follows them. The README files and the other
pages outside of this folder become pages of the site, and any other file that is linked comes along as it is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages outside of docs: path in the repository -> path in the site.
OUTSIDE = {
    "README.md": "index.md",
    "README-ja.md": "index-ja.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
    **{
        name: name
        for folder in ("pocket_model", "pocket_xl", "recipes")
        for name in (f"examples/{folder}/README.md", f"examples/{folder}/README-ja.md")
    },
}
SHIM, OWN_SHIM = "https://unpkg.com/iframe-worker/shim", "javascripts/iframe-worker.js"
IN_REPOSITORY = {place: name for name, place in OUTSIDE.items()}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<rest>(?:#[^)\s]*)?\))")
FENCE = re.compile(r"(?ms)^(?P<ticks>```+)(?P<kind>\w*)(?P<more>[^\n]*)\n(?P<text>.*?)^(?P=ticks)[ ]*$")


def repository_path(place: str) -> str:
    """Return the path in the repository of what has a place in the site."""
    return IN_REPOSITORY.get(place, f"docs/{place}")


def site_path(name: str) -> str:
    """Return the place in the site of a file of the repository."""
    return OUTSIDE.get(name, name.removeprefix("docs/"))


def linked(markdown: str, page: str) -> dict[str, str]:
    """Return target -> file of the repository, for the links of a page that lead to files."""
    folder = posixpath.dirname(page)
    return {
        match["path"]: posixpath.normpath(posixpath.join(folder, match["path"]))
        for match in LINK.finditer(FENCE.sub("", markdown))
    }


def other_language(place: str, places: set[str]) -> str | None:
    """Return the page that says the same in the other language."""
    stem = place.removesuffix(".md")
    other = f"{stem.removesuffix('-ja')}.md" if stem.endswith("-ja") else f"{stem}-ja.md"
    return other if other in places else None


# ----------------------------------------------------------------------------------------------------------------------
# What mkdocs calls
# ----------------------------------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs, and the files that pages link."""
    from mkdocs.structure.files import File

    for name, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    for page in [file.src_uri for file in files.documentation_pages()]:
        name = repository_path(page)
        for target in linked((ROOT / name).read_text(encoding="utf-8"), name).values():
            place = site_path(target)
            if files.get_file_from_path(place) is None and (ROOT / target).is_file():
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at places in the site, and leave one word after the fences of code."""
    place = page.file.src_uri
    name = repository_path(place)
    places = {target: site_path(file) for target, file in linked(markdown, name).items()}
    folder = posixpath.dirname(place) or "."

    def moved(match: re.Match[str]) -> str:
        target = places.get(match["path"])
        return match[0] if target is None else posixpath.relpath(target, folder) + match["rest"]

    def fence(match: re.Match[str]) -> str:
        file = re.search(r"\S+\.\w+", match["more"])
        kind = match["kind"] + (f' title="{file[0]}"' if file else "")
        return f"{match['ticks']}{kind}\n{match['text']}{match['ticks']}"

    parts, end = [], 0
    for code in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[end : code.start()]), fence(code)]
        end = code.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, **_: Any) -> dict[str, Any]:
    """Set the language of the theme's own words, and the way to the page in the other language."""
    place = page.file.src_uri
    config.theme["language"] = "ja" if place.endswith("-ja.md") else "en"
    files = {file.src_uri: file.url for file in context["pages"]}
    other = other_language(place, set(files))
    here = {"link": page.file.url, "lang": config.theme["language"]}
    there = {"link": files[other], "lang": "en" if here["lang"] == "ja" else "ja"} if other else None
    names = {"en": "English", "ja": "日本語"}
    config.extra["alternate"] = [{**entry, "name": names[entry["lang"]]} for entry in (here, there) if entry]
    return context


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Take the script by which the search works without a server from the site, not from the network."""
    return output.replace(SHIM, posixpath.relpath(OWN_SHIM, posixpath.dirname(page.file.dest_uri) or "."))


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same for the page that a server shows for what is missing."""
    return output_content.replace(SHIM, f"/{OWN_SHIM}")
