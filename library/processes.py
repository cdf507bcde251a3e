"""The processes that a launcher (torchrun, accelerate launch, mpirun) started together, from its environment variables.

Without a launcher there is one process. Variables that an earlier job left are told where they would do harm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from library.errors import UserError

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")  # where processes find each other


class Launcher(NamedTuple):
    """The variables of a kind of launcher: number of processes and of this one, in all and on this machine."""

    size: str
    rank: str
    local_size: str
    local_rank: str

    def missing(self, environment: Mapping[str, str]) -> list[str]:
        """Return the variables that are not set, but without which processes do not find each other."""
        return [name for name in (self.size, self.rank, self.local_rank, *MEETING_POINT) if not environment.get(name)]


TORCHRUN = Launcher("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")  # and accelerate launch
LAUNCHERS = (
    TORCHRUN,
    Launcher(
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
    ),
    Launcher("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    Launcher("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)
# Number of tasks that srun starts. They do not find each other by themselves.
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
ADVICE = "start several processes with torchrun --nproc_per_node N"


class Launch(NamedTuple):
    """The processes of a launcher as one of them sees them."""

    launcher: Launcher
    size: int
    rank: int

    def local_size(self, environment: Mapping[str, str] = os.environ) -> int | None:
        """Return the number of the processes on this machine, None if the launcher does not tell it."""
        return _number(environment, self.launcher.local_size)


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return what the environment says; one process where it says nothing that can be read."""
    for launcher in LAUNCHERS:
        size = _number(environment, launcher.size)
        if size is not None and size > 1:
            return Launch(launcher, size, _number(environment, launcher.rank) or 0)
    return Launch(TORCHRUN, 1, 0)


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process logs: the first one, or the only one."""
    launch = find_launch(environment)
    return (launch.rank if launch.size > 1 else _number(environment, TORCHRUN.rank) or 0) == 0


def check_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return what the environment says; raises UserError for several processes that could not find each other.

    Each of them would be a run of its own that writes the files of the others.
    """
    launch = find_launch(environment)
    if launch.size == 1:
        _check_alone(environment)
        return launch
    missing = launch.launcher.missing(environment)
    if missing:
        raise UserError(
            f"{launch.launcher.size} says that there are {launch.size} processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set, without which they are no common run: {ADVICE}, or unset "
            f"{launch.launcher.size} for one"
        )
    return launch


def _check_alone(environment: Mapping[str, str]) -> None:
    """Raise UserError where one process would run though several were asked for, or several alone."""
    tasks = _number(environment, SLURM_TASKS)
    if tasks is not None and tasks > 1:
        raise UserError(
            f"{SLURM_TASKS} says that srun started {tasks} processes, which would be as many runs: let srun start one "
            f"per machine, and {ADVICE}, or unset {SLURM_TASKS} for one"
        )
    # accelerate launch sets the meeting point if it is asked for several processes. On the CPU it starts only one.
    has_point = all(environment.get(name) for name in MEETING_POINT)
    if "ACCELERATE_USE_CPU" in environment and has_point and not environment.get(TORCHRUN.size):
        raise UserError(
            "accelerate launch was asked for several processes, but it starts only one without several GPUs: "
            f"{ADVICE}, or give accelerate launch --num_processes 1 (and unset MASTER_ADDR, if it is set)"
        )
    # A number of the process that an earlier job left: accelerate would wait for others, and nothing would be logged.
    least = {TORCHRUN.local_rank: 0, TORCHRUN.rank: 1}
    given = {name: _number(environment, name) for name in least}
    left = [name for name, number in given.items() if number is not None and number >= least[name]]
    missing = TORCHRUN.missing(environment)
    if left and missing:
        raise UserError(
            f"{left[0]} is set, as by torchrun, but not {', '.join(missing)}: {ADVICE}, or unset {left[0]} for one"
        )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        return None
