"""HTML pages in one file: the frame of a page, texts and data in it, pictures as data URLs."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image


def escape(value: object) -> str:
    """Return a value as text of a page, also within the quotes of an attribute."""
    return html.escape(str(value))


def page(title: str, style: str, body: str, *, data: object = None, scripts: tuple[str, ...] = ()) -> str:
    """Return a whole page; scripts find data, if there are any, in the element `page-data`."""
    held = "" if data is None else f'<script type="application/json" id="page-data">{json_text(data)}</script>\n'
    run = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n{held}{run}</body>\n</html>\n"
    )


def json_text(data: object) -> str:
    """Return data as JSON that can stand in a script element: no text ends it, and NaN is null."""
    return json.dumps(_without_nan(data), ensure_ascii=False, separators=(",", ":")).translate(
        {ord("<"): "\\u003c", 0x2028: "\\u2028", 0x2029: "\\u2029"}
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def data_url(picture: Image.Image, quality: int = 90) -> str:
    """Return a picture as a JPEG within a page."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def link_to(path: Path, folder: Path) -> str:
    """Return the address of a file for a page in a folder: relative, so that both can be moved together."""
    try:
        relative = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:  # on another drive of Windows
        return path.absolute().as_uri()
    return quote(relative.replace(os.sep, "/"), errors="surrogateescape")
