"""Hashes of the base model's files, for the metadata."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from library.files import file_sha256
from library.weight_file import file_legacy_hash


class BackgroundHashes:
    """Hashes of files, computed while training goes on; the first save waits for them."""

    def __init__(self, files: Mapping[str, Path | None]) -> None:
        """Begin to hash the files, given by the part of their names in the metadata; folders are left out."""
        self._files = files
        self._values: dict[str, str] = {}
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for name, path in self._files.items():
            if path is not None and path.is_file():
                self._values[f"ss_{name}_hash"] = file_legacy_hash(path)
                self._values[f"ss_new_{name}_hash"] = file_sha256(path)

    def values(self) -> dict[str, str]:
        """Return the ss_*_hash values."""
        self._thread.join()
        return self._values
