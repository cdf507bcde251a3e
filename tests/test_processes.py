"""One run for several processes, and one run for an output name."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import accelerate
import pytest
import torch
from runs import options, train, train_with
from scripts import ROOT, python

import train_network
from library.config.saving import LoggingConfig
from library.config.training import PrecisionConfig
from library.errors import UserError
from library.processes import check_launch, find_launch, is_first_process
from library.training.record import run_lock
from library.training.run import runtime

# ---- what launchers leave in the environment ----------------------------------------------------------------

POINT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **POINT}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
LOCAL_SIZES = {  # launchers by their number of processes -> the number on this machine
    "WORLD_SIZE": "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMI_SIZE": "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_LOCAL_SIZE",
}

TOGETHER = {
    "alone": ({}, 1, 0),
    "torchrun": (TORCHRUN, 2, 1),
    "torchrun of one": (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 1, 0),
    "torchrun of one on the CPU": (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "ACCELERATE_USE_CPU": "true"}, 1, 0),
    "torchrun within srun": (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "4"}, 2, 1),
    "mpirun of accelerate": (MPI | POINT | {"ACCELERATE_USE_CPU": "true"}, 4, 2),
    "a first rank that was left": ({"RANK": "0"}, 1, 0),
    "a machine of one task": ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, 0),
    "accelerate of one": ({"ACCELERATE_USE_CPU": "False"}, 1, 0),
    "a point that was left": (POINT, 1, 0),
    "no numbers": ({"WORLD_SIZE": "many", "LOCAL_RANK": "", "PMI_SIZE": "x"}, 1, 0),
    "no local rank": ({"LOCAL_RANK": "-1"}, 1, 0),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_the_processes_of_launchers_are_known(name):
    environment, size, rank = TOGETHER[name]
    assert check_launch(environment)[1:] == (size, rank)
    assert is_first_process(environment) == (rank == 0)


APART = {
    "only a size": ({"WORLD_SIZE": "2"}, "WORLD_SIZE says that there are 2 processes, but RANK, LOCAL_RANK, MASTER_"),
    "no local rank": (TORCHRUN | {"LOCAL_RANK": ""}, "but LOCAL_RANK is not set, without which"),
    "mpirun": (MPI, "OMPI_COMM_WORLD_SIZE says that there are 4 processes, but MASTER_ADDR, MASTER_PORT are not set"),
    "PMI": ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE says that there are 2 processes"),
    "srun": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        "srun started 2 processes, which would be as many runs",
    ),
    "accelerate on the CPU": (
        POINT | {"ACCELERATE_USE_CPU": "True"},
        "asked for several processes, but it starts only one",
    ),
    "a rank that was left": ({"RANK": "3", **POINT}, "RANK is set, as by torchrun, but not WORLD_SIZE, LOCAL_RANK"),
    "a local rank that was left": ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, as by torchrun, but not WORLD_SIZE, RANK"),
}


@pytest.mark.parametrize("name", APART)
def test_processes_that_could_not_find_each_other_are_refused(name, base, pictures, tmp_path, monkeypatch):
    environment, message = APART[name]
    with pytest.raises(UserError, match=message):
        check_launch(environment)
    monkeypatch.setattr("train_network.check_launch", lambda: check_launch(environment))
    with pytest.raises(UserError, match=message):
        train_network.main(options(base, pictures, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accelerate_on_the_cpu_with_two_processes_is_one_line_with_exit_code_2(base, pictures, tmp_path):
    launcher = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    done = subprocess.run(
        [launcher, "launch", "--cpu", "--num_processes", "2", str(ROOT / "train_network.py"), *options(base, pictures, tmp_path / "out")],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert "train_network.py: error: accelerate launch was asked for several processes" in done.stderr
    assert "returned non-zero exit status 2" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", LOCAL_SIZES)
def test_a_machine_has_no_more_processes_than_gpus(monkeypatch, size):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    launch, local_size = find_launch({size: "16"}), LOCAL_SIZES[size]
    with pytest.raises(UserError, match=r"9 processes were started on this machine, but it has 8 GPU.*start 8 on it"):
        runtime.check_devices(launch, {local_size: "9"})
    others = {name: "9" for name in LOCAL_SIZES.values() if name != local_size}
    for environment in ({local_size: "8"}, {local_size: "9", "ACCELERATE_USE_CPU": "true"}, {}, others):
        runtime.check_devices(launch, environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    runtime.check_devices(launch, {local_size: "9"})


def test_processes_that_the_machine_cannot_join_are_refused(monkeypatch):
    launch = find_launch(TORCHRUN)
    monkeypatch.setattr(runtime, "check_launch", lambda: launch)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # one that accelerate does not join, as MPS
    monkeypatch.setattr(runtime, "check_devices", lambda launch: None)
    with pytest.raises(UserError, match="2 processes were started, but they cannot work together on cpu"):
        runtime.start_runtime(PrecisionConfig(), LoggingConfig(), vae_overflows=False)


@pytest.mark.parametrize(("given", "minutes"), [(None, 24 * 60), (0, 24 * 60), (90, 90)])
def test_processes_wait_for_each_other_longer_than_torch_lets_them(monkeypatch, given, minutes):
    """Previews on the first process take longer than the 10 minutes after which torch would end the others."""
    seen = []

    class Recorded(accelerate.Accelerator):
        def __init__(self, **more):
            seen.extend(more["kwargs_handlers"])
            super().__init__(**more)

    monkeypatch.setattr(accelerate, "Accelerator", Recorded)
    runtime.start_runtime(PrecisionConfig(), LoggingConfig(), vae_overflows=False, wait=given)
    (handler,) = seen
    assert handler.to_kwargs() == {"timeout": datetime.timedelta(minutes=minutes)}


def test_seeds_of_micro_batches_are_those_of_torch_and_leave_nothing_for_a_gpu(monkeypatch):
    noted: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", noted.append)
    runtime.seed_micro_batch(7, 3, 1, 0)
    drawn = torch.rand(4)
    assert noted == []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    runtime.seed_micro_batch(7, 3, 1, 0)
    assert torch.equal(torch.rand(4), drawn)
    assert len(noted) == 1


# ---- the lock of an output name -----------------------------------------------------------------------------


@pytest.fixture
def lock(tmp_path):
    """Return the path of the lock of a run."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x-run.lock"


def held(lock):
    """Return the holder of a lock that is there."""
    holder = run_lock.read(lock)
    assert holder is not None
    return holder


def write(lock, **changes):
    lock.write_text(json.dumps(dataclasses.asdict(run_lock.own_holder()) | changes), encoding="utf-8")


def dead_process():
    return int(python("-c", "import os; print(os.getpid())").stdout)


def test_a_run_holds_its_lock_and_removes_it_however_it_ends(base, pictures, lock):
    seen = []
    train_with(options(base, pictures, lock.parent), lambda _: seen.append(held(lock)), after=1)
    assert seen == [dataclasses.replace(run_lock.own_holder(), since=seen[0].since)]
    assert not lock.exists()
    for error in (KeyboardInterrupt, MemoryError, UserError):

        def fail(progress, error=error):
            assert lock.exists()
            raise error("x")

        with pytest.raises(error):
            train_with(options(base, pictures, lock.parent), fail, after=1)
        assert not lock.exists()


@pytest.mark.parametrize("more", [{}, {"save_model_as": "ckpt"}, {"network_dim": 2, "max_train_steps": 1}])
def test_a_second_run_of_the_name_is_refused_and_harms_nothing(base, pictures, lock, more):
    write(lock)
    (lock.parent / "x-metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"another run, process {os.getpid()} since .* writes .*x: wait for it or stop it"
    ):
        train_network.main(options(base, pictures, lock.parent, **more))
    assert lock.exists()
    assert sorted(path.name for path in lock.parent.iterdir()) == ["x-metrics.jsonl", "x-run.lock"]


def test_another_name_is_another_run(base, pictures, lock):
    write(lock)
    assert train_network.main(options(base, pictures, lock.parent, output_name="y", max_train_steps=1)) == 0
    assert lock.exists()


STALE = {
    "a process that has ended": lambda: {"process": dead_process()},
    "its number is another's": lambda: {"birth": "before"},
    "ended before a restart": lambda: {"birth": "another-boot 17"},
}


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("name", STALE)
def test_the_lock_of_a_run_that_has_ended_is_taken_over(base, pictures, lock, caplog, name):
    caplog.set_level("INFO")
    write(lock, **STALE[name]())
    train(base, pictures, lock.parent, max_train_steps=1)
    assert "has ended without removing its lock" in caplog.text
    assert not list(lock.parent.glob("*lock*"))


def test_whether_a_run_on_another_machine_lives_is_not_known(base, pictures, lock):
    write(lock, host="elsewhere", process=dead_process())
    with pytest.raises(UserError, match=r"on elsewhere since .*if that run has ended, delete .*x-run\.lock"):
        train_network.main(options(base, pictures, lock.parent))
    lock.unlink()
    train(base, pictures, lock.parent, max_train_steps=1)


@pytest.mark.parametrize("text", ["{", "[]", '{"host": 1}', "\ufeff{}"])
def test_a_lock_that_cannot_be_read_is_refused(base, pictures, lock, text):
    lock.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read: .*delete the file"):
        train_network.main(options(base, pictures, lock.parent))


def test_a_lock_that_another_run_fills_is_waited_for(lock, monkeypatch):
    lock.touch()
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: write(lock))
    with pytest.raises(UserError, match="another run, process .*wait for it or stop it"):
        run_lock.take(lock, run_lock.own_holder())


def test_a_lock_that_stays_empty_is_refused(lock, monkeypatch):
    monkeypatch.setattr(run_lock, "PAUSE", 0)
    lock.touch()
    with pytest.raises(UserError, match="is being taken by another run: .*if there is no such run, delete the file"):
        run_lock.take(lock, run_lock.own_holder())
    assert lock.exists()


def test_a_run_of_another_container_is_not_known_to_have_ended(lock, monkeypatch, tmp_path):
    write(lock, process=dead_process())
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "ns" / "pid").symlink_to("pid:[17]")
    monkeypatch.setattr(run_lock, "PROC", tmp_path)
    with pytest.raises(UserError, match="if that run has ended, delete"):
        run_lock.take(lock, run_lock.own_holder())
    monkeypatch.setattr(run_lock, "PROC", tmp_path / "absent")
    assert run_lock.this_host() == platform.node()


@pytest.mark.parametrize(("held_birth", "birth"), [("", "7"), ("7", ""), ("", "")])
def test_a_process_of_unknown_birth_may_be_the_run(lock, monkeypatch, held_birth, birth):
    write(lock, birth=held_birth)
    monkeypatch.setattr(run_lock, "birth_of", lambda process: birth)
    with pytest.raises(UserError, match="if that run has ended, delete"):
        run_lock.take(lock, run_lock.own_holder())
    monkeypatch.setattr(run_lock, "birth_of", lambda process: None)
    run_lock.take(lock, mine := run_lock.own_holder())
    assert held(lock) == mine


def test_two_runs_that_take_over_the_same_lock_do_not_both_get_it(lock, monkeypatch):
    write(lock, birth="before")
    stale, mine = held(lock), run_lock.own_holder()
    write(lock, since="first")  # the other run was faster
    run_lock.remove_ended(lock, stale, mine)
    assert held(lock).since == "first"
    lock.unlink()
    run_lock.remove_ended(lock, stale, mine)
    assert not list(lock.parent.iterdir())


def test_a_take_over_waits_for_another_and_replaces_one_that_has_ended(lock):
    guard = lock.with_name(f"{lock.name}.taking")
    write(lock, birth="before")
    write(guard)
    with pytest.raises(UserError, match="another run, process .*writes .*x: wait for it"):
        run_lock.take(lock, run_lock.own_holder())
    assert held(lock).birth == "before"
    write(guard, birth="before")
    run_lock.take(lock, mine := run_lock.own_holder())
    assert held(lock) == mine
    assert list(lock.parent.iterdir()) == [lock]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt("No space")])
def test_nothing_is_left_of_a_lock_that_cannot_be_written(lock, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(run_lock.json, "dump", full)
    with pytest.raises(type(error), match="No space"):
        run_lock.take(lock, run_lock.own_holder())
    assert not lock.exists()


@pytest.mark.parametrize("error", [OSError, UserError])
def test_all_processes_are_told_that_there_is_no_lock(lock, monkeypatch, error):
    def fails(*args):
        raise error("x")

    def share(failure, runtime):
        told.append(failure)
        return failure

    told: list[Exception] = []
    monkeypatch.setattr(run_lock, "take", fails)
    monkeypatch.setattr(run_lock, "shared", share)
    with pytest.raises(error), run_lock.run_lock(lock, Mock(is_main=True)):
        raise AssertionError("it runs without a lock")
    sent = pickle.loads(pickle.dumps(told))
    assert (type(sent[0]), str(sent[0])) == (error, "x")
    monkeypatch.setattr(run_lock, "shared", lambda failure, runtime: sent[0])
    with pytest.raises(error), run_lock.run_lock(lock, Mock(is_main=False)):
        raise AssertionError("it runs without a lock")


@pytest.mark.parametrize("damage", ["text", "no right"])
def test_a_lock_that_cannot_be_removed_does_not_hide_how_the_run_ended(lock, caplog, monkeypatch, damage):
    def refused(*args, **more):
        raise PermissionError(13, "another reads it")

    with pytest.raises(KeyError, match="of the run"), run_lock.run_lock(lock, Mock(is_main=True, num_processes=1)):
        if damage == "text":
            lock.write_text("{", encoding="utf-8")
        else:
            monkeypatch.setattr(type(lock), "unlink", refused)
        raise KeyError("of the run")
    assert "the lock of this run was not removed" in caplog.text
    monkeypatch.undo()


@pytest.mark.parametrize("birth", [run_lock.birth_of, run_lock.birth_from_system])
def test_a_process_is_known_by_its_birth(birth):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert birth(child.pid) == birth(child.pid) is not None
        child.kill()
        if birth is run_lock.birth_of and platform.system() == "Linux":
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert birth(child.pid) is None, "it has ended, but its parent has not asked"
        child.wait()
    assert birth(child.pid) is None


def test_a_birth_that_cannot_be_read_is_unknown(monkeypatch, tmp_path):
    import psutil

    def refused(*args, **more):
        raise error

    error: Exception = psutil.AccessDenied(1)
    monkeypatch.setattr(psutil, "Process", refused)
    assert run_lock.birth_from_system(1) == ""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(f"7 (a) b) S {' '.join(['0'] * 30)}", encoding="utf-8")
    monkeypatch.setattr(run_lock, "PROC", tmp_path)
    assert run_lock.birth_in_proc(8) is None
    assert run_lock.birth_in_proc(7) == "", "no boot"
    error = PermissionError(13, "hidden")
    monkeypatch.setattr(Path, "read_text", refused)
    assert run_lock.birth_in_proc(7) == ""
