"""Names of models on the Hugging Face Hub, as the options that take a model accept them.

    OWNER/NAME                          a repository, at the newest commit or at that in the local cache
    OWNER/NAME@REVISION                 the same at a branch, a tag or a commit
    OWNER/NAME/FILE.safetensors         a file in it; also with @REVISION
    https://huggingface.co/...          the link of a repository, a folder or a file; also hf://OWNER/NAME...

`library.models.hub` looks for them. Nothing here asks the network.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from library.config.options import Role
from library.config.tool_files import WEIGHT_SUFFIXES

MODEL_SUFFIXES = (*WEIGHT_SUFFIXES, ".bin")
REPOSITORY = r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
REVISION = r"(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.-]+)"
PATH = r"(?:/+(?P<path>[^\\:*?\"<>|]*))?"
NAME = re.compile(rf"{REPOSITORY}(?:@{REVISION})?{PATH}")
LINK = re.compile(rf"{REPOSITORY}(?:/(?:tree|blob|resolve)/{REVISION}{PATH})?/*")
# A path loses one of two slashes, so links are read with either number.
HOST = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/+", re.IGNORECASE)
SCHEME = re.compile(r"hf:/+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository on the hub, or a file or folder in it."""

    repository: str  # OWNER/NAME
    revision: str | None = None  # branch, tag or commit; None: the main branch
    path: str = ""  # of a file or folder in it

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f'/{self.path}' if self.path else ''}"


def read_hub_name(text: str) -> HubName | None:
    """Return the name that a text is; None for a text of another form, which can only be a path.

    Without @REVISION, a folder in a repository is read from a link only, and OWNER/NAME.safetensors is a path: names on
    the hub seldom look so, and mistyped paths do.
    """
    for start, form in ((HOST, LINK), (SCHEME, NAME)):
        if found := start.match(text):
            rest = text[found.end() :]
            return _read(form, unquote(rest.partition("?")[0]) if form is LINK else rest)
    name = _read(NAME, text)
    if name is None or name.revision is not None:
        return name
    is_file = text.lower().endswith(MODEL_SUFFIXES)
    return name if is_file == bool(name.path) else None


def _read(form: re.Pattern[str], text: str) -> HubName | None:
    found = form.fullmatch(text)
    if found is None or ".." in found["repository"]:
        return None
    path = (found["path"] or "").strip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        return None
    return HubName(found["repository"], found["revision"], path)


@dataclasses.dataclass(frozen=True)
class HubModel:
    """What an option names on the hub, at a commit, and what is missing of it in the local cache."""

    field: str  # of the option
    index: int  # of the value, for an option with several
    role: Role
    name: HubName  # its revision is the commit
    asked: str | None  # the revision that was asked for
    folder: Path  # of the commit in the cache
    is_file: bool
    variant: str | None = None  # of all its weights, such as "fp16"
    size: int = 0  # bytes of what is missing
    missing: tuple[str, ...] = ()  # files in the repository

    @property
    def path(self) -> Path:
        """The path of the model in the cache."""
        return self.folder / self.name.path

    @property
    def title(self) -> str:
        """The name in metadata: of a file its own, as for one on this disk, of anything else that on the hub."""
        return self.path.name if self.is_file else str(dataclasses.replace(self.name, revision=None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TakesModels:
    """A section with options that take a model: a path, or a name on the hub, which becomes its path in the cache."""

    from_hub: tuple[HubModel, ...] = ()

    def hub_model(self, field: str, index: int = 0) -> HubModel | None:
        """Return what an option named on the hub; None if it named a path."""
        return next((model for model in self.from_hub if (model.field, model.index) == (field, index)), None)

    def is_folder(self, field: str) -> bool:
        """Return whether an option names a folder, on this disk or on the hub; false if it is not given."""
        model, path = self.hub_model(field), getattr(self, field)
        return not model.is_file if model is not None else path is not None and Path(path).is_dir()

    def title_of(self, field: str) -> str:
        """Return the name of a model in metadata."""
        model = self.hub_model(field)
        return Path(getattr(self, field)).name if model is None else model.title

    def pinned(self, field: str) -> Any:
        """Return the value of an option in the record of a run: of a name on the hub, the name with its commit."""
        value = getattr(self, field)
        if not isinstance(value, tuple):
            model = self.hub_model(field)
            return value if model is None else str(model.name)
        models = (self.hub_model(field, index) for index in range(len(value)))
        return tuple(own if model is None else str(model.name) for own, model in zip(value, models, strict=True))
