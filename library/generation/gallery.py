"""A page with all images of a run and what they were generated with, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from library.files import replacing
from library.html_page import data_url, escape, link_to, page

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1400px; padding: 1rem; }
h1 { font-size: 1.2rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
figure { margin: 0; border: 1px solid color-mix(in srgb, currentColor 20%, transparent); border-radius: 6px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 6px 6px 0 0; }
figcaption { padding: .6rem .8rem; overflow-wrap: anywhere; }
.prompt { font-weight: 600; }
.settings, .file { font-size: .85em; opacity: .75; margin: .3rem 0 0; white-space: pre-wrap; }
"""


def write_gallery(path: Path, entries: Sequence[tuple[Path, Image.Image, str]], title: str) -> None:
    """Write the page of entries: file, picture, and its text `parameters`.

    Everything is in the page itself, which also links to the files.
    """
    figures = "\n".join(figure(file, link_to(file, path.parent), picture, text) for file, picture, text in entries)
    body = f"<h1>{escape(title)}</h1>\n<main>\n{figures}\n</main>"
    with replacing(path) as temporary:
        temporary.write_text(page(title, STYLE, body), encoding="utf-8")


def figure(file: Path, link: str, picture: Image.Image, parameters: str) -> str:
    """Return a picture with its prompt and settings, which leads to its file."""
    prompt, *rest = parameters.split("\n")
    settings = escape("\n".join(rest))
    start = f'<a href="{escape(link)}">'
    return (
        f'<figure>{start}<img src="{data_url(picture)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(prompt)}" loading="lazy"></a><figcaption><div class="prompt">{escape(prompt)}</div>'
        f'<div class="settings">{settings}</div><div class="file">{start}{escape(file.name)}</a></div>'
        "</figcaption></figure>"
    )
