"""The Hugging Face Hub: uploads of saved files and states, and the download of a state to resume.

A failed upload is logged in one line and never stops the training, because everything is on this disk, too.
"""

from __future__ import annotations

import logging
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from library.config.hub import HubConfig, HubState
from library.errors import UserError
from library.training.run.state import OPTIONS_FILE, POSITION_FILE, TENSOR_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


class Uploads:
    """The uploads of a run, in order: immediately, or with --async_upload in a thread during training."""

    def __init__(self, config: HubConfig, *, is_main: bool) -> None:
        self._config = config
        self._repository = config.huggingface_repo_id if is_main else None
        self._jobs: queue.Queue[tuple[Callable[[], Any], str]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        """Upload a file or a folder under its name."""
        repository = self._repository
        if repository is None:
            return
        job = (lambda: upload(path, repository, self._config), f"{path} was not uploaded")
        if not self._config.async_upload:
            attempt(*job, self._config)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def after(self, job: Callable[[], Any]) -> None:
        """Run a job after all uploads so far: a file must be uploaded before it is removed here."""
        if self._thread is None:
            job()
        else:
            self._jobs.put((job, "an old file was not removed"))

    def wait(self) -> None:
        """Wait until everything is uploaded."""
        if self._jobs.unfinished_tasks:
            logger.info("waiting for the uploads to %s", self._repository)
        self._jobs.join()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Who stops a run at once does not want to wait; a run that failed has files that are still on their way.
        if kind is not KeyboardInterrupt:
            self.wait()

    def _work(self) -> None:
        while True:
            attempt(*self._jobs.get(), self._config)
            self._jobs.task_done()


def attempt(job: Callable[[], Any], failure: str, config: HubConfig) -> None:
    """Run a job; if it fails, log one line that begins with failure."""
    try:
        job()
    # The network, the service and its client fail in many ways, and none is worth a training.
    except Exception as error:  # noqa: BLE001
        logger.warning("%s: %s", failure, reason(error, config))


def make_repository(config: HubConfig) -> None:
    """Make the repository of --huggingface_repo_id if it is missing; a failure shows before the training."""
    repository = config.huggingface_repo_id
    if repository is not None:
        attempt(
            lambda: _ensure_repository(hub_api(config), repository, config),
            f"--huggingface_repo_id {repository} is not ready for uploads",
            config,
        )


def _ensure_repository(api: HfApi, repository: str, config: HubConfig) -> None:
    kind = config.huggingface_repo_type
    if not api.repo_exists(repository, repo_type=kind):
        is_public = config.huggingface_repo_visibility == "public"
        api.create_repo(repository, repo_type=kind, private=not is_public, exist_ok=True)
        logger.info("made the %s repository %s", "public" if is_public else "private", repository)


def upload(path: Path, repository: str, config: HubConfig) -> None:
    """Upload a file or a folder, with its name, to the folder of a repository that the options name."""
    api = hub_api(config)
    _ensure_repository(api, repository, config)
    folder = (config.huggingface_path_in_repo or "").strip("/")
    place, kind = f"{folder}/{path.name}" if folder else path.name, config.huggingface_repo_type
    if path.is_dir():
        api.upload_folder(folder_path=path, path_in_repo=place, repo_id=repository, repo_type=kind)
    else:
        api.upload_file(path_or_fileobj=path, path_in_repo=place, repo_id=repository, repo_type=kind)
    logger.info("uploaded %s to %s", path.name, repository)


def fetch_state(place: HubState, config: HubConfig, target: Path) -> None:
    """Download a state to a folder, in place of what is there; raises UserError where that is not possible."""
    api = hub_api(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".", suffix=".tmp") as temporary:
        try:
            for name in (POSITION_FILE, TENSOR_FILE, OPTIONS_FILE):
                api.hf_hub_download(
                    place.repo_id,
                    f"{place.path}/{name}",
                    repo_type=place.repo_type,
                    revision=place.revision,
                    local_dir=temporary,
                )
        except Exception as error:  # noqa: BLE001 (as with uploads)
            why = reason(error, config)
            raise UserError(f"--resume: {place.path} of {place.repo_id} cannot be downloaded: {why}") from None
        shutil.rmtree(target, ignore_errors=True)
        (Path(temporary) / place.path).rename(target)
    logger.info("downloaded the state %s of %s to %s", place.path, place.repo_id, target)


def hub_api(config: HubConfig) -> HfApi:
    """Return the client of the hub; without a token it finds that of the environment or the login."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # they would run into that of the training
    return HfApi(token=config.huggingface_token)


def reason(error: Exception, config: HubConfig) -> str:
    """Return what an error says, in one line and without the token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text.replace(config.huggingface_token, "***") if config.huggingface_token else text
