"""The scripts of the suite, run in this process or in one of their own, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]


class Script(Protocol):
    """A module with the entry point of a script."""

    def main(self, argv: list[str], /) -> int: ...


def call(script: Script, *argv: object) -> None:
    """Run a script in this process, and hold that it ends well."""
    assert script.main([str(word) for word in argv]) == 0


def python(*words: object, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, and return its exit code and what it said, in UTF-8."""
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, encoding="utf-8", check=False, **more)


def two_processes(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes that train together on the CPU, as the documentation says."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    return python(*launch, *words, env=environment, timeout=300)


def help_of(script: str, cwd: Path, *absent: str) -> str:
    """Return the help of a script that starts in another folder, and hold that it does not import some modules."""
    code = "import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.exit(any(name in sys.modules for name in {!r}))"
    done = python("-c", code.format(str(ROOT / script), absent), cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
