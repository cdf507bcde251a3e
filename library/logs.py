"""Log lines, exit codes, and error messages of the scripts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from library.errors import LessMemory, UserError, in_one_line, is_out_of_memory, message_of
from library.processes import is_first_process

# Loggers whose lines below the level of warnings are shown.
QUIET = ("bitsandbytes", "matplotlib")  # packages whose warnings do not concern the user
SUITE = ("library", "networks", "tools", "finetune", "__main__", "train_network", "gen_img_diffusers")
USER_ERROR = 2  # exit code, as of argparse
FAILURE = 1  # of the machine: disk, permissions, memory
INTERRUPTED = 130  # exit code of shells for Ctrl-C; of a script, also for SIGTERM


NO_GPU = LessMemory("close other programs that use it")  # of a script that has no option for less memory


def set_up_logging(level: int = logging.INFO) -> None:
    """Send log lines of the suite to standard error; warnings and errors are marked as such."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_MarkedFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # Below errors these packages log only what does not concern the user: optional packages, deprecations.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in SUITE:
        logging.getLogger(name).setLevel(level if is_first_process() else logging.ERROR)


def choose_log_lines(level: str | None, file: Path | None) -> None:
    """Show log lines from a level on, and send them to a new file (UTF-8) instead of the console.

    Only the first of several processes does so; the others log errors on the console.
    """
    if not is_first_process():
        return
    if level is not None:
        for name in SUITE:
            logging.getLogger(name).setLevel(level)
        logging.getLogger().setLevel(max(logging.WARNING, getattr(logging, level)))
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(file, mode="w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--console_log_file: {file} cannot be written ({error.strerror})") from None
        handler.setFormatter(_MarkedFormatter())
        root = logging.getLogger()
        for former in [one for one in root.handlers if isinstance(one.formatter, _MarkedFormatter)]:
            root.removeHandler(former)
            former.close()
        root.addHandler(handler)


@contextlib.contextmanager
def kept_warnings() -> Iterator[Sequence[str]]:
    """Yield the texts of the warnings and errors that are logged within the context so far, each once."""
    keeper = _Keeper(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(keeper)
    try:
        yield keeper.texts
    finally:
        root.removeHandler(keeper)


class _Keeper(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.texts:
            self.texts.append(text)


class _MarkedFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        is_ours = record.name.partition(".")[0] in SUITE  # those of packages are built in several lines
        return f"{record.levelname.lower()}: {in_one_line(text) if is_ours else text}"


def run_script(main: Callable[[Sequence[str]], int], less_memory: LessMemory = NO_GPU) -> None:
    """Run an entry script's main with the command line and end the process with its exit code."""
    set_up_logging()
    try:
        # SIGTERM is as Ctrl-C: temporary files are removed. A training has its own handler, which saves a state.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        code, message = USER_ERROR, f"error: {error}"
    except OSError as error:
        code, message = FAILURE, f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        advice = memory_advice(error, less_memory)
        if advice is None:
            raise
        code, message = FAILURE, f"error: {advice}"
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "stopped"
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
    sys.exit(code)


def memory_advice(error: Exception, less: LessMemory) -> str | None:
    """Return advice for an error that reports too little memory, or None for any other."""
    if not is_out_of_memory(error):
        return None
    if isinstance(error, MemoryError) or "CPUAllocator" in str(error):  # numpy's and Python's; torch's on the CPU
        return f"this machine has too little memory ({message_of(error)}): {less.elsewhere}"
    return f"the GPU has too little memory ({message_of(error)}): {less.on_gpu}"
