"""A page with all images of a run and what they were generated with, in one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from library.files import replacing

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1400px; padding: 1rem; }
h1 { font-size: 1.2rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
figure { margin: 0; border: 1px solid color-mix(in srgb, currentColor 20%, transparent); border-radius: 6px; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px 6px 0 0; }
figcaption { padding: .6rem .8rem; overflow-wrap: anywhere; }
.prompt { font-weight: 600; }
.settings, .file { font-size: .85em; opacity: .75; margin: .3rem 0 0; white-space: pre-wrap; }
"""
QUALITY = 90


def write_gallery(path: Path, entries: Sequence[tuple[Path, Image.Image, str]], title: str) -> None:
    """Write the page of entries: file, picture, and its text `parameters`. Everything is in the page itself."""
    figures = "\n".join(figure(file, picture, text) for file, picture, text in entries)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<main>\n{figures}\n</main>\n</body>\n</html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def figure(file: Path, picture: Image.Image, parameters: str) -> str:
    """Return a picture with its prompt and settings."""
    prompt, *rest = parameters.split("\n")
    settings = html.escape("\n".join(rest))
    return (
        f'<figure><img src="{data_url(picture)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{html.escape(prompt)}" loading="lazy"><figcaption><div class="prompt">{html.escape(prompt)}</div>'
        f'<div class="settings">{settings}</div><div class="file">{html.escape(file.name)}</div></figcaption></figure>'
    )


def data_url(picture: Image.Image) -> str:
    """Return a picture as a JPEG within a page."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
