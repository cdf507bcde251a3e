"""Options of the Hugging Face Hub, for uploading files and for resuming from a state."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from library.config.kinds import read_bool
from library.config.options import option
from library.config.values import parse_text

REPO_TYPES = ("model", "dataset", "space")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
STATE_FORM = "USER/REPO/PATH[:REVISION[:TYPE]]"


def read_repo_id(value: Any) -> str | None:
    """Return the name of a repository, OWNER/NAME."""
    text = parse_text(value)
    if text is not None and not REPO_ID.fullmatch(text):
        raise ValueError
    return text


def read_repo_type(value: Any) -> str | None:
    """Return the kind of a repository."""
    text = parse_text(value)
    if text not in (None, *REPO_TYPES):
        raise ValueError
    return text


def read_switch(value: Any) -> bool:
    """Return whether a switch is on; some GUIs have a text field for it and write "" for off."""
    return False if value == "" else read_bool(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Hugging Face Hub."""

    huggingface_repo_id: str | None = option(
        None, "upload every saved file to this repository", form="USER/NAME", parse=read_repo_id
    )
    huggingface_repo_type: str | None = option(
        None, "kind of the repository; unset: model", form="model, dataset or space", parse=read_repo_type
    )
    huggingface_path_in_repo: str | None = option(None, "folder in the repository; unset: its root", parse=parse_text)
    huggingface_token: str | None = option(
        None, "access token; unset: HF_TOKEN, or the login of this machine", parse=parse_text, secret=True
    )
    huggingface_repo_visibility: str | None = option(
        None, '"public" makes a public repository if there is none yet; anything else a private one', parse=parse_text
    )
    save_state_to_huggingface: bool = option(False, "also upload every saved state", parse=read_switch)
    resume_from_huggingface: bool = option(False, f"--resume names a state on the hub: {STATE_FORM}", parse=read_switch)
    async_upload: bool = option(False, "continue training while files are uploaded", parse=read_switch)


@dataclasses.dataclass(frozen=True)
class HubState:
    """A state on the hub."""

    repo_id: str
    path: str  # of the folder in the repository
    revision: str | None
    repo_type: str

    @property
    def name(self) -> str:
        """Name of the folder in the repository."""
        return self.path.rpartition("/")[2]


def parse_hub_state(text: str) -> HubState:
    """Return the state that --resume names on the hub; raises ValueError for a text of another form."""
    place, *more = text.split(":")
    revision, repo_type, *surplus = (*more, "", "")
    owner, name, path = (*place.strip("/").split("/", 2), "", "")[:3]
    is_complete = REPO_ID.fullmatch(f"{owner}/{name}") and path and ".." not in path.split("/")
    if not is_complete or any(surplus) or repo_type not in ("", *REPO_TYPES):
        raise ValueError(text)
    return HubState(f"{owner}/{name}", path, revision or None, repo_type or "model")
