"""Leave out one `.to(device)` of the suite at a time, and tell which of them no run on the device notices.

    python tests/mutations.py                                  # all of the suite; takes an hour
    python tests/mutations.py library/training/run networks    # some files and folders

The places are found in the syntax trees: `.to(device)`, `.cpu()`, `move(module, device)`, `torch.zeros(..., device=...)`,
and what lets the host go on meanwhile: pinned memory, `non_blocking`, events.
First each case of `device_cases.py` runs as it is, and it is noted which lines it reaches. Then a process is forked for
each place, in which the function has the place left out, and the cases that reach it run until one fails or gives
another result. What is left over changes nothing that a run could see, or is not reached: EQUIVALENT says why.
Linux and macOS (fork).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import json
import os
import pickle
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import device_cases  # noqa: E402
import fake_device  # noqa: E402
from device_cases import CASES, ROOT, Outcome, World  # noqa: E402

FOLDERS = ("library", "networks", "tools")
SECONDS = 300  # of a case, before it counts as noticed

# Places that no run notices, and why nothing is lost: (file, function, text) -> reason.
INDICES = "made once in a run; CUDA takes indices from the host, too"
PROBE = "asks whether there is such a device, which tests of refusals hold"
ONLY_CUDA = "for CUDA only"
NO_OWN_MEMORY = "for devices that have no memory of their own"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "library/diffusion/losses.py",
        "timestep_weights",
        "torch.arange(NUM_TIMESTEPS, device=timesteps.device)",
    ): INDICES,
    (
        "library/diffusion/losses.py",
        "loss_tables",
        "torch.arange(NUM_TIMESTEPS, device=schedule.alphas_cumprod.device)",
    ): INDICES,
    ("library/config/tool_files.py", "check_device", "torch.zeros(1, device=device)"): PROBE,
    ("library/generation/recipe.py", "device_of", "torch.empty(0, device=device)"): PROBE,
    (
        "library/models/attention.py",
        "xformers_problem",
        "torch.zeros(1, 8, 1, 64, device=device, dtype=torch.float16)",
    ): ONLY_CUDA,
    ("library/models/sending.py", "sent", "tensor.to(device)"): NO_OWN_MEMORY,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A place at which something is put on a device, and what stands there without it."""

    file: str
    line: int
    function: str
    text: str
    span: tuple[int, int, int, int]
    without: ast.expr

    @property
    def key(self) -> tuple[str, str, str]:
        """The place, however lines move."""
        return self.file, self.function, self.text


def names_device(node: ast.expr) -> bool:
    """Return whether an expression is a device, by its words."""
    text = ast.unparse(node)
    return "device" in text or text in ("'cpu'", "torch.device('cpu')")


def left_out(call: ast.Call) -> ast.expr | None:
    """Return a call without its device, or None for a call that has none."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    shorter = copy.deepcopy(call)
    if isinstance(call.func, ast.Attribute) and not call.args and not call.keywords and name in ("cpu", "pin_memory"):
        return call.func.value
    if isinstance(call.func, ast.Attribute) and name in ("record", "synchronize") and "event" in ast.unparse(call.func):
        return ast.Constant(None)
    if name == "sent":
        return call.args[0]
    if any(one.arg == "non_blocking" for one in call.keywords):
        shorter.keywords = [one for one in shorter.keywords if one.arg != "non_blocking"]
        return shorter
    if name == "move" and len(call.args) > 1 and not isinstance(call.func, ast.Attribute):
        is_type = ast.unparse(call.args[1]).startswith(("torch.float", "self.dtype"))
        return None if is_type else ast.Constant(None)
    if name == "to" and isinstance(call.func, ast.Attribute) and call.args and names_device(call.args[0]):
        del shorter.args[0]
        return shorter if shorter.args or shorter.keywords else call.func.value
    is_torch = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"
    if is_torch and any(one.arg == "device" for one in call.keywords):
        shorter.keywords = [one for one in shorter.keywords if one.arg != "device"]
        return shorter
    return None


def places(path: Path) -> Iterator[Place]:
    """Yield the places in the functions of a file."""
    text = path.read_text(encoding="utf-8")

    def visit(node: ast.AST, function: str) -> Iterator[Place]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef) and not function else function
            if isinstance(child, ast.Call) and function and (without := left_out(child)) is not None:
                span = (child.lineno, child.col_offset, child.end_lineno or 0, child.end_col_offset or 0)
                yield Place(
                    path.relative_to(ROOT).as_posix(), child.lineno, function, ast.unparse(child), span, without
                )
            yield from visit(child, inner)

    yield from visit(ast.parse(text), "")


class _LeaveOut(ast.NodeTransformer):
    def __init__(self, place: Place) -> None:
        self.place = place

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace the call of the place."""
        if (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset) == self.place.span:
            return ast.copy_location(self.place.without, node)
        return self.generic_visit(node)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code and all codes in it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from codes(one)


def apply(place: Place) -> None:
    """Leave a place out of the functions that this process has already."""
    path = ROOT / place.file
    tree = ast.fix_missing_locations(_LeaveOut(place).visit(ast.parse(path.read_text(encoding="utf-8"))))
    new = {(one.co_name, one.co_firstlineno): one for one in codes(compile(tree, str(path), "exec"))}
    for function in [one for one in gc.get_objects() if isinstance(one, types.FunctionType)]:
        code = function.__code__
        if code.co_filename == str(path) and (mutated := new.get((code.co_name, code.co_firstlineno))):
            with contextlib.suppress(ValueError):  # an inner function, whose outer one is changed
                function.__code__ = mutated


def in_child(work: Callable[[], Any]) -> Any:
    """Return what a function returns in a fork of this process; None if it does not come back."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                Path(file.name).write_bytes(pickle.dumps(work()))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        content = Path(file.name).read_bytes()
    return pickle.loads(content) if content else None


def run_traced(name: str, world: World, files: set[str]) -> tuple[Outcome, set[tuple[str, int]]]:
    """Run a case, and return which lines of some files it reaches."""
    reached: set[tuple[str, int]] = set()
    paths = {str(ROOT / file) for file in files}

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in paths:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    outcome = device_cases.run_case(name, world)
    sys.settrace(None)
    return outcome, {(Path(file).relative_to(ROOT).as_posix(), line) for file, line in reached}


def run_without(place: Place, name: str, world: World) -> Outcome:
    """Run a case with a place left out."""
    apply(place)
    return device_cases.run_case(name, world)


def differs(outcome: Outcome | None, usual: Outcome) -> str | None:
    """Return how a case with a place left out differs from what it usually is."""
    if outcome is None:
        return "does not end"
    if outcome.error:
        return outcome.error.strip().splitlines()[-1][:160]
    if outcome.digest != usual.digest:
        return "another result"
    if outcome.waits != usual.waits or outcome.places != usual.places:
        return "other waits, or models elsewhere"
    return None if outcome.operations or not usual.operations else "the device is idle"


def import_all() -> None:
    """Import every module with places, so that no fork reads it from its file."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            with contextlib.suppress(ImportError):
                importlib.import_module(
                    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                )


def survey(world: World, names: list[str], files: set[str]) -> dict[str, tuple[Outcome, set[tuple[str, int]]]]:
    """Return what each case gives and reaches as it is."""
    found = {}
    for name in names:
        result = in_child(functools.partial(run_traced, name, world, files))
        if result is None or result[0].error:
            sys.stdout.write(f"case {name} fails as it is: {'' if result is None else result[0].error}\n")
        else:
            found[name] = result
    return found


def main() -> int:
    """Run the script; the exit code is 1 if a place is noticed by no case and is not known to be equivalent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(folder) for folder in FOLDERS])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--most", type=int, help="try at most so many cases on a place, the shortest first")
    parser.add_argument("--world", type=Path, help="a folder for files, kept")
    args = parser.parse_args()
    files = [
        path
        for one in args.paths
        for path in (sorted((ROOT / one).rglob("*.py")) if (ROOT / one).is_dir() else [ROOT / one])
    ]
    found = [place for path in files for place in places(path)]
    with tempfile.TemporaryDirectory() as folder:
        world = World(args.world or Path(folder))
        if not (world.folder / "sd1").exists():
            in_child(lambda: device_cases.make_rest(device_cases.make_world(world.folder)) and None)
        import_all()
        fake_device.install_for_accelerate()
        usual = survey(world, args.cases, {place.file for place in found})
        left = 0
        for place in found:
            cases = [name for name, (_, reached) in usual.items() if (place.file, place.line) in reached]
            result = "not reached"
            for name in sorted(cases, key=lambda name: usual[name][0].seconds)[: args.most]:
                outcome = in_child(functools.partial(run_without, place, name, world))
                result = f"noticed by no one of {len(cases)} cases"
                if how := differs(outcome, usual[name][0]):
                    result = f"noticed by {name}: {how}"
                    break
            is_left = not result.startswith("noticed by ") or "no one" in result
            reason = EQUIVALENT.get(place.key)
            left += is_left and reason is None
            mark = "   " if not is_left else ("== " if reason else "!! ")
            sys.stdout.write(
                f"{mark}{place.file}:{place.line} {place.function}: {place.text}: {result}; {reason or ''}\n"
            )
            sys.stdout.flush()
        sys.stdout.write(json.dumps({"places": len(found), "left": left}) + "\n")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
