"""Models that are named by their repository on the Hugging Face Hub: found in the local cache, else downloaded.

`locate_models` replaces the names among the options by paths in the cache, so that everything behind reads files. It
asks the hub, in one request for each model, only for what the cache does not hold. `fetch_models` then downloads just
the files that are needed. Nothing else in the suite asks the network for a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from library.config.command_line import parse
from library.config.hub_names import HubModel, HubName, TakesModels, read_hub_name
from library.config.kinds import is_there
from library.config.options import Option, Role, folder_hint, nearest, section_options, sections_of
from library.errors import Problems, UserError, message_of, quotes_hint
from library.models.checkpoint import folder_family
from library.models.hub_files import Needed, is_complete, needed
from library.words import counted, in_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

Root = TypeVar("Root")
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 30.0  # that the hub may take for a list of files
MOST_COMPARED = 2000  # names in a folder
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# What to name instead of a path that is not there.
HERE: Mapping[Role, str] = {
    "model": "a .safetensors or .ckpt file or a Diffusers folder",
    "vae": "a file or a Diffusers folder",
    "control net": "a file or a folder",
    "checkpoint": "a file",
    "surroundings": "a Diffusers folder",
}


class Search(NamedTuple):
    """How names are looked for."""

    offline: bool
    token: str | None  # None: that of the environment or the login


def parse_with_models(
    root: type[Root],
    argv: Any,
    *,
    description: str | None,
    rules: tuple[Callable[[Root, Problems], None], ...],
) -> Root:
    """Return the configuration of a command line, as `parse` does, with all models that it names on this disk."""
    config = parse(root, argv, description=description, locate=locate_models, rules=rules)
    fetch_models(config)
    return config


def locate_models(config: Root, problems: Problems) -> Root:
    """Return a configuration in which names on the hub are paths in the cache, still to be filled by `fetch_models`.

    Adds to problems the models that are neither on this disk nor on the hub.
    """
    root: type = type(config)
    sections = {name: getattr(config, name) if name else config for name, _ in sections_of(root)}
    search = Search(_any_option(sections, "offline", default=False), _any_option(sections, "huggingface_token"))
    for name, section in sections.items():
        if isinstance(section, TakesModels):
            changes = _located(section, search, problems)
            sections[name] = problems.run(dataclasses.replace, section, **changes) if changes else section
    if None in sections.values():  # a section lacks values, which is reported
        return config
    whole: Any = config
    return sections[""] if "" in sections else dataclasses.replace(whole, **sections)


def _any_option(sections: Mapping[str, Any], field: str, default: Any = None) -> Any:
    return next((value for section in sections.values() if (value := vars(section).get(field))), default)


def _located(section: TakesModels, search: Search, problems: Problems) -> dict[str, Any]:
    """Return what changes in a section: its paths, what they were on the hub, and the variant."""
    changes: dict[str, Any] = {}
    found: list[HubModel] = []
    values, kind = vars(section), cast("type", type(section))  # values without what is missing or could not be read
    for entry in (entry for entry in section_options(kind) if entry.spec.hub is not None):
        value = values.get(entry.field)
        many = value if isinstance(value, tuple) else (value,)
        models = [
            problems.run(_locate, entry, index, one, values.get("variant"), search) if one else None
            for index, one in enumerate(many)
        ]
        if any(models):
            paths = tuple(
                one if model is None else type(one)(model.path) for one, model in zip(many, models, strict=True)
            )
            changes[entry.field] = paths if isinstance(value, tuple) else paths[0]
            found += [model for model in models if model is not None]
            # The record repeats the run with the same files.
            if entry.spec.hub == "model" and "variant" in values and found[-1].variant:
                changes["variant"] = found[-1].variant
    return changes | {"from_hub": tuple(found)} if found else {}


def _locate(entry: Option, index: int, value: str | Path, variant: str | None, search: Search) -> HubModel | None:
    """Return what a value of an option is on the hub; None for a path, which must exist."""
    role, what = entry.spec.hub, entry.spec.reads or "a file or a folder"
    assert role is not None
    path, of_model = Path(value), variant if role == "model" else None
    if is_there(path, what):
        if of_model is not None and path.is_file():
            raise UserError(f"--variant is for Diffusers folders, and {path} is a file: leave it out")
        return None
    if is_there(path, "a file or a folder"):
        raise UserError(f"{entry.label}: {path} is not {what}{quotes_hint(path)}{folder_hint(path)}")
    name = read_hub_name(value if isinstance(value, str) else path.as_posix())
    if name is None:
        raise UserError(
            f"{entry.label}: {value} does not exist{quotes_hint(value)}; name {HERE[role]}, or a repository of the "
            f"Hugging Face Hub (OWNER/NAME){neighbour(path)}"
        )
    try:
        return find(name, role, search, field=entry.field, index=index, variant=of_model)
    except NotOnHubError as error:
        raise UserError(
            f"{entry.label}: {value} does not exist here, and {error}; name {HERE[role]}, or a repository of the Hub"
            f"{neighbour(path)}"
        ) from None
    except UserError as error:
        raise UserError(f"{entry.label}: {value} of the Hugging Face Hub: {error}") from None


class NotOnHubError(Exception):
    """There is no such repository, or none that can be asked for; its text says why."""


def neighbour(path: Path) -> str:
    """Return "; did you mean X?" for the name beside a path that is the most like it, or an empty text."""
    try:
        return nearest(str(path), [str(other) for other in itertools.islice(path.parent.iterdir(), MOST_COMPARED)])
    except OSError:  # there is no such folder
        return ""


def find(
    name: HubName, role: Role, search: Search, *, field: str, index: int = 0, variant: str | None = None
) -> HubModel:
    """Return a model in the cache, or what is missing there of one on the hub.

    Raises UserError or NotOnHubError, whose texts follow the name of the model.
    """
    cached = snapshot_of(name)
    try:
        model = None if cached is None else in_cache(cached, name, role, variant)
        problem = "the Hugging Face cache has only a part of it"
    except UserError as error:
        model, problem = None, str(error)
    if model is None:
        if is_offline(search):
            why = "the Hugging Face cache has no model of that name" if cached is None else problem
            raise NotOnHubError(f"{why}; nothing is downloaded (--offline, or HF_HUB_OFFLINE=1)")
        model = on_hub(name, role, variant, search.token)
    return dataclasses.replace(model, field=field, index=index)


def is_offline(search: Search) -> bool:
    """Return whether nothing may be asked of the network."""
    from huggingface_hub import constants

    return search.offline or constants.HF_HUB_OFFLINE


def storage_of(repository: str) -> Path:
    """Return the folder of a repository in the cache, whose layout the documentation of huggingface_hub describes."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def snapshot_of(name: HubName) -> Path | None:
    """Return the folder of a revision in the cache; None if nothing was downloaded of it."""
    storage, revision = storage_of(name.repository), name.revision or "main"
    if COMMIT.fullmatch(revision):
        folder = storage / "snapshots" / revision
    else:
        ref = storage / "refs" / revision
        if not ref.is_file():
            return None
        folder = storage / "snapshots" / ref.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None


def in_cache(folder: Path, name: HubName, role: Role, variant: str | None) -> HubModel | None:
    """Return a model in the folder of a commit; None if it is not complete; raises UserError if there is none."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    found = needed(names, role, path=name.path, variant=variant)
    return as_model(name, role, found, folder, missing={}) if is_complete(found, role, folder) else None


def on_hub(name: HubName, role: Role, variant: str | None, token: str | None) -> HubModel:
    """Return a model on the hub, by one request for the names and sizes of its files."""
    api = client(token)
    with explained(name, token):
        info = api.model_info(name.repository, revision=name.revision, files_metadata=True, timeout=SECONDS)
        if info.gated:  # its files are listed for everybody
            api.auth_check(name.repository)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    found = needed(sizes, role, path=name.path, variant=variant)
    folder = storage_of(name.repository) / "snapshots" / str(info.sha)
    missing = {file: sizes[file] for file in found.files if not (folder / file).is_file()}
    return as_model(name, role, found, folder, missing)


def as_model(name: HubName, role: Role, found: Needed, folder: Path, missing: Mapping[str, int]) -> HubModel:
    """Return a model at the commit of a folder, for an option that `find` names."""
    return HubModel(
        field="",
        index=0,
        role=role,
        name=HubName(name.repository, folder.name, found.path),
        asked=name.revision,
        folder=folder,
        is_file=found.is_file,
        variant=found.variant,
        size=sum(missing.values()),
        missing=tuple(missing),
    )


def client(token: str | None) -> HfApi:
    """Return the client of the hub."""
    from huggingface_hub import HfApi

    return HfApi(token=token)


@contextlib.contextmanager
def explained(name: HubName, token: str | None) -> Iterator[None]:
    """Turn what a request for a repository raises into UserError or NotOnHubError, which say what to do."""
    from huggingface_hub import errors

    repository = name.repository
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"its owner asks for consent: accept the terms at https://huggingface.co/{repository}, then {LOG_IN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"it has no revision {name.revision}") from None
    except errors.RepositoryNotFoundError:
        raise NotOnHubError(
            f"the Hugging Face Hub has no model {repository} that you may read (of a private one: {LOG_IN})"
        ) from None
    except Exception as error:  # noqa: BLE001 (the network, the service and its client fail in many ways)
        raise NotOnHubError(f"the Hugging Face Hub cannot be asked ({reason(error, token)})") from None


def reason(error: Exception, token: str | None) -> str:
    """Return what an error says, in one line and without the token."""
    text = message_of(error).removesuffix(".")
    return text.replace(token, "***") if token else text


# ---- downloads ----------------------------------------------------------------------------------------------


def fetch_models(config: object) -> None:
    """Download what is missing of the models that `locate_models` found; raises UserError if that is not possible."""
    root: type = type(config)
    sections = [getattr(config, name) if name else config for name, _ in sections_of(root)]
    token = _any_option({str(index): section for index, section in enumerate(sections)}, "huggingface_token")
    wanted = [model for section in sections if isinstance(section, TakesModels) for model in section.from_hub]
    check_space(wanted)
    for model in wanted:
        what = f"its {model.variant} weights" if model.variant else "it"
        if not model.missing:
            logger.info("%s: %s is in the cache at commit %s", model.name.repository, what, model.folder.name)
            continue
        logger.info(
            "%s: downloading %s, %s, of commit %s to %s",
            model.name.repository,
            counted(len(model.missing), "file"),
            in_bytes(model.size),
            model.folder.name,
            model.folder,
        )
        fetch(model, token)


def check_space(models: list[HubModel]) -> None:
    """Raise UserError if the disk of the cache has too little space for what is missing."""
    total = sum(model.size for model in models)
    if not total:
        return
    cache = storage_of(models[0].name.repository)
    there = next(parent for parent in (cache, *cache.parents) if parent.exists())
    begun = sum(path.stat().st_size for model in models for path in unfinished(model))
    free = shutil.disk_usage(there).free
    if total - begun > free:
        raise UserError(
            f"{in_bytes(total - begun)} must be downloaded to {cache.parent}, where {in_bytes(free)} are free: make "
            "room, or set HF_HOME to a folder on another disk"
        )


def unfinished(model: HubModel) -> Iterator[Path]:
    """Return the files of downloads that were interrupted and are continued."""
    yield from (storage_of(model.name.repository) / "blobs").glob("*.incomplete")


def fetch(model: HubModel, token: str | None) -> None:
    """Download the missing files of a model, the small ones first: they may show that the model is of no use."""
    is_checked = model.is_file or model.role != "model"
    repository, commit, api = model.name.repository, model.folder.name, client(token)
    try:
        for name in model.missing:
            if not is_checked and not name.endswith((".json", ".txt")):
                is_checked = True
                folder_family(model.path)
            api.hf_hub_download(repository, name, revision=commit)
        if model.asked != commit:  # lets the next run find the commit without a request
            api.hf_hub_download(repository, model.missing[0], revision=model.asked)
    except UserError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{repository}: the disk of {model.folder} is full: make room, or set HF_HOME to a folder on another "
                "disk; what was downloaded is kept"
            ) from None
        raise broken_off(repository, reason(error, token)) from None
    except Exception as error:  # noqa: BLE001 (as in `explained`)
        raise broken_off(repository, reason(error, token)) from None


def broken_off(repository: str, why: str) -> UserError:
    """Return the error of a download that ended before its end."""
    return UserError(f"{repository}: the download broke off ({why}): start again, and what was downloaded is kept")
