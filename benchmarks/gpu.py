"""Check the suite on a card and measure it; write a report. One command; no internet, and the torch that is there.

python benchmarks/gpu.py                # everything, at most two hours
python benchmarks/gpu.py --quick        # what matters most, ten minutes at most

Builds random models of the sizes of SD 1.5 and SDXL (9 GB in the folder of temporary files, or in --work) and runs the
suite's own scripts and steps: losses, pictures and resumed trainings against the CPU, every option that concerns the
card, steps a second and peak memory beside the floor and peft, and trainings under the memory limit of smaller cards.

Each part runs in a process of its own with a time limit, and those that measure no time run several at once. After each
part OUTPUT/gpu.md (to read) and OUTPUT/gpu.json are written; OUTPUT/logs has what the parts said. The exit code is 1 if
a check failed, and 2 without a card.

python benchmarks/gpu.py --device cpu --tiny    # no card: shows in minutes that the report itself works
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.card.parts import BY_NAME, MACHINE, PARTS
from benchmarks.card.rows import RowFile
from benchmarks.card.running import TELLS_WHERE, Part, Report, python, run_parts
from benchmarks.card.setting import Setting

MOST_AT_ONCE = 6  # parts; each takes about 1 GB of the card and two cores
MINUTES = {True: 10.0, False: 120.0}  # with --quick and without


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny: models of full size take hours there")
    if args.part:
        find(BY_NAME[args.part], Setting(args.device, args.tiny, args.quick, args.work), RowFile(args.rows))
        return 0
    with working_folder(args.work) as work:
        setting = Setting(args.device, args.tiny, args.quick, work)
        minutes = MINUTES[args.quick] if args.minutes is None else args.minutes
        return make(setting, args.output, args.only, minutes, sys.argv[1:] if argv is None else argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batch sizes and steps; ten minutes at most")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps")
    parser.add_argument("--output", type=folder, default=Path("gpu-report"), help="folder of the report")
    parser.add_argument("--minutes", type=positive, help="most minutes for all parts; unset: 120, with --quick 10")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART", help=names())
    parser.add_argument("--work", type=Path, help="folder of the models, which are kept; unset: a temporary one")
    parser.add_argument("--part", choices=list(BY_NAME), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


def names() -> str:
    """Return the help of --only."""
    return "only these parts, of " + ", ".join(part.name for part in PARTS)


def folder(text: str) -> Path:
    """Return a path at which a folder is or can be; raises ValueError for others."""
    path = Path(text)
    if any(part.exists() and not part.is_dir() for part in (path, *path.parents)):
        raise ValueError(text)
    return path


def positive(text: str) -> float:
    """Return a number above 0; raises ValueError for others."""
    number = float(text)
    if not number > 0:
        raise ValueError(text)
    return number


def make(setting: Setting, output: Path, only: Sequence[str] | None, minutes: float, words: Sequence[str]) -> int:
    """Make the report; return the exit code."""
    report = Report(output, words)
    run_parts([MACHINE], setting, report, command_of(setting), seconds=MACHINE.limit)
    if setting.on_card and "card" not in report.values["environment"]:
        sys.stderr.write(
            "gpu.py: error: torch sees no card that it can use here (see logs/machine.log); "
            "--device cpu --tiny shows what the report looks like\n"
        )
        return 2
    chosen = [part for part in PARTS if only is None or part.name in only]
    at_once = max(1, min(MOST_AT_ONCE, (os.cpu_count() or 1) // 2))
    run_parts(chosen, setting, report, command_of(setting), seconds=minutes * 60, at_once=at_once)
    report.end()
    print(f"wrote {output / 'gpu.md'} and {output / 'gpu.json'}")
    return 1 if report.has_faults else 0


def command_of(setting: Setting) -> Callable[[Part, Path], Sequence[str]]:
    """Return what gives the command line of a part."""
    switches = [name for name, given in (("--tiny", setting.tiny), ("--quick", setting.quick)) if given]
    common = [__file__, "--device", setting.device, *switches]

    def command(part: Part, rows: Path) -> Sequence[str]:
        # Parts that run at the same time write files of the same names; the others share their large models.
        work = setting.folder(part.name) if part.beside_others else setting.work
        return python(*common, "--part", part.name, "--rows", rows, "--work", work)

    return command


def find(part: Part, setting: Setting, file: RowFile) -> None:
    """Find the rows of a part, in its own process, and write each at once."""
    from library.logs import set_up_logging

    set_up_logging()
    if TELLS_WHERE is not None:
        faulthandler.register(TELLS_WHERE)
    for row in part.find(setting):
        print(row, flush=True)
        file.add(row)


@contextlib.contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """Yield the folder of models and outputs, which is deleted at the end unless it was given."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="gpu-report-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
