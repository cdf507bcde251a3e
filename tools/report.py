"""Write the page of a training, or one that compares several, from the files that they left.

python tools/report.py output
python tools/report.py output --output_name first second --compare

writes NAME-report.html for each run in the folder: losses, pictures, files, data and options. With --compare there is
one page for all of them instead, comparison.html: losses over each other, pictures side by side, and the options that
differ. Nothing but these pages is written. Runs of older versions show what their files tell.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.command_line import parse
from library.config.options import REQUIRED, option
from library.errors import UserError, named
from library.logs import run_script
from library.training.page.compare import write_comparison
from library.training.page.gather import Run, gather, names_in
from library.training.page.page import write_page

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Pages of runs."""

    output_dir: tuple[Path, ...] = option(
        REQUIRED, "folders of trainings (--output_dir)", positional=True, missing="the folder of a training"
    )
    output_name: tuple[str, ...] | None = option(None, "names of the runs (--output_name); unset: all in the folders")
    compare: bool = option(False, "write one page that compares the runs")
    save_to: Path | None = option(
        None, "page to write with --compare; unset: comparison.html in the first folder", only_with=("compare",)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    options = parse(PageOptions, argv, description=__doc__)
    runs = find_runs(options.output_dir, options.output_name)
    if not options.compare:
        for run in runs:
            write_page(run, run.files_of.page)
            logger.info("wrote %s", run.files_of.page)
        return 0
    if len(runs) < 2:
        raise UserError(f"--compare needs at least two runs, found {runs[0].name}: name another folder")
    path = options.save_to or options.output_dir[0] / "comparison.html"
    write_comparison(runs, path)
    logger.info("wrote %s, which compares %s", path, named([run.name for run in runs]))
    return 0


def find_runs(folders: Sequence[Path], names: Sequence[str] | None) -> list[Run]:
    """Return the runs in folders, all or those with some names; raises UserError for what is not there."""
    for folder in folders:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {what}: name the --output_dir of a training")
    found = [(folder, name) for folder in dict.fromkeys(folders) for name in names_in(folder)]
    if not found:
        raise UserError(f"no training is in {', '.join(map(str, folders))}: there is no ...-metrics.jsonl")
    known = {name for _, name in found}
    for name in names or ():
        if name not in known:
            raise UserError(f"--output_name: no run {name} is there; these are: {named(sorted(known))}")
    return [gather(folder, name) for folder, name in found if names is None or name in names]


if __name__ == "__main__":
    run_script(main)
