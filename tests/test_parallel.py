"""Work in threads: order, bounds, errors and interruptions; the tools write the same bytes with any number of workers."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import make_lora
from safetensors.torch import load_file, save_file
from scripts import call

from library import logs, parallel, safetensors_io
from library.adapters import merging
from networks import extract_lora_from_models, merge_lora, resize_lora, svd_merge_lora
from tools import convert_diffusers20_original_sd, merge_models

UNIT = parallel.BYTES_OF_A_WORKER


@settings(deadline=None, max_examples=25)
@given(
    workers=st.integers(1, 4),
    sizes=st.lists(st.integers(0, 3 * UNIT), max_size=25),
    used=st.integers(0, 25),
    has_sizes=st.booleans(),
)
def test_results_are_in_order_and_few_items_are_ahead(workers, sizes, used, has_sizes):
    begun = []

    def work(item):
        begun.append(item)
        return threading.current_thread().name, item

    size = sizes.__getitem__ if has_sizes else None
    results = parallel.in_order(work, range(len(sizes)), workers, size=size)
    assert begun == [], "nothing begins before it is asked for"
    names = set()
    for place, (name, item) in enumerate(itertools.islice(results, used)):
        assert item == place
        names.add(name)
        time.sleep(0.001)
        ahead = [other for other in begun if other >= place]
        assert len(ahead) <= 2 * workers
        if has_sizes and len(ahead) > 1:
            assert sum(sizes[other] for other in ahead) <= workers * UNIT
    assert len(names) <= workers
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name in names], "no thread is left"
    if used >= len(sizes):
        assert sorted(begun) == list(range(len(sizes)))


def test_workers_work_at_the_same_time():
    both = threading.Barrier(2, timeout=30)  # breaks if one waits for the other to end
    assert len(list(parallel.in_order(lambda _: both.wait(), range(4), 2))) == 4


@pytest.mark.parametrize("error", [ValueError("seven"), KeyboardInterrupt()])
def test_an_error_comes_in_the_place_of_its_result_and_ends_the_work(error):
    begun = []

    def work(item):
        begun.append(item)
        if item == 7:
            raise error
        return item

    results = parallel.by_module(work, range(100))
    assert list(itertools.islice(results, 7)) == list(range(7))
    with pytest.raises(type(error)) as caught:
        next(results)
    assert caught.value is error
    assert max(begun) < 7 + 2 * parallel.num_workers()


def test_each_item_is_computed_by_one_thread_of_torch_and_the_former_number_comes_back(monkeypatch):
    monkeypatch.setattr(parallel, "num_workers", lambda: 3)
    former = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for device, most in (("cpu", 3), ("cuda", 1)):
            found = list(
                parallel.by_module(
                    lambda _: (torch.get_num_threads(), threading.current_thread().name), range(30), device=device
                )
            )
            assert {threads for threads, _ in found} == {1}
            assert len({name for _, name in found}) <= most
            assert torch.get_num_threads() == 2
        results = parallel.by_module(lambda item: item, range(30))
        next(results)
        assert torch.get_num_threads() == 1
        results.close()
        assert torch.get_num_threads() == 2
        assert list(parallel.in_order(lambda _: torch.get_num_threads(), range(3), 1)) == [2, 2, 2]
    finally:
        torch.set_num_threads(former)


@pytest.mark.parametrize(
    ("quota", "variable", "cores", "workers"),
    [
        (None, None, 8, 8),
        ("max 100000", "", 8, 8),
        ("150000 100000", "many", 2, 2),
        ("50000 100000", "4", 1, 1),
        ("9000000 100000", "4,2", 8, 4),
        ("no numbers", "0", 8, 1),
    ],
)
def test_cores_are_those_that_may_be_used(tmp_path, monkeypatch, quota, variable, cores, workers):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(parallel, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if quota is not None:
        parallel.QUOTA.write_text(quota, encoding="utf-8")
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert (parallel.num_cores(), parallel.num_workers()) == (cores, workers)
    monkeypatch.delattr(parallel.os, "sched_getaffinity")
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: None)
    assert parallel.num_cores() == 1


# ---- the tools ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(model_store, tmp_path):
    """Return a model, a tuned one and a LoRA."""
    models, paths = model_store("sd1")
    lora, tuned = make_lora(models, tmp_path / "a.safetensors"), tmp_path / "tuned.safetensors"
    call(merge_lora, "--sd_model", paths["safetensors"], "--save_to", tuned, "--models", lora, "--ratios", 1)
    return paths["safetensors"], tuned, lora


def test_the_number_of_workers_changes_no_byte(files, tmp_path, monkeypatch):
    base, tuned, lora = files
    both = ["--models", lora, lora, "--ratios", 0.7, -0.4]
    pair = ["--model_org", base, "--model_tuned", tuned, "--dim", 2, "--min_diff", 0]
    jobs = {
        "merged": (merge_lora, ["--sd_model", base, *both, "--save_precision", "fp16", "--save_to"]),
        "concat": (merge_lora, [*both, "--concat", "--save_to"]),
        "svd": (svd_merge_lora, [*both, "--new_rank", 3, "--save_to"]),
        "resized": (resize_lora, ["--model", lora, "--new_rank", 2, "--save_to"]),
        "extracted": (extract_lora_from_models, [*pair, "--save_to"]),
        "models": (merge_models, ["--models", base, tuned, "--output"]),
        "folder": (convert_diffusers20_original_sd, [base]),
    }
    # A narrow random start, as in full-size models, so that the order of the work could change it.
    monkeypatch.setattr("library.adapters.low_rank.WIDEST", 1)
    monkeypatch.setattr("library.adapters.low_rank.OVERSAMPLING", 1)
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(parallel, "num_workers", lambda workers=workers: workers)
        written: dict[str, object] = {}
        for name, (script, argv) in jobs.items():
            out = tmp_path / (name if name == "folder" else f"{name}.safetensors")
            call(script, *argv, out)
            parts = sorted(out.rglob("*.safetensors")) if name == "folder" else [out]
            written |= {path: path.read_bytes() for path in parts}
            if name == "folder":
                out.rename(tmp_path / f"folder of {workers}")
        found.append(written)
    assert len(found[0]) == 10
    assert found[0] == found[1]


def run_merge(files, out, monkeypatch, *more):
    """Run merge_lora.py as a user does, and return its exit code."""
    base, _, lora = files
    argv = ["merge_lora.py", "--sd_model", base, "--save_to", out, "--models", lora, "--ratios", "1", *more]
    monkeypatch.setattr("sys.argv", [str(word) for word in argv])
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    monkeypatch.setattr(logs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        logs.run_script(merge_lora.main)
    return ended.value.code


def test_an_error_of_a_worker_is_that_of_the_script(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.safetensors"
    state = load_file(files[0])
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    save_file(state | {name: state[name] + 1e6}, tmp_path / "large.safetensors")
    large = (tmp_path / "large.safetensors", *files[1:])
    capsys.readouterr()
    assert run_merge(large, out, monkeypatch, "--save_precision", "fp16") == logs.USER_ERROR
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"merge_lora.py: error: {name} becomes too large for float16: take smaller ratios, or --save_precision bf16 "
        "or float"
    )
    assert not out.exists()


@pytest.mark.parametrize("place", ["worker", "writer"])
def test_an_interruption_leaves_what_was_there_and_no_thread(files, tmp_path, monkeypatch, place):
    out, calls = tmp_path / "out" / "out.safetensors", itertools.count()
    out.parent.mkdir()
    out.write_bytes(b"of mine")
    module, name = (merging, "merged_tensor") if place == "worker" else (safetensors_io, "bytes_of")
    whole, threads = getattr(module, name), (threading.active_count(), torch.get_num_threads())

    def stopped(*args):
        if next(calls) == 100:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(module, name, stopped)
    assert run_merge(files, out, monkeypatch) == logs.INTERRUPTED
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"of mine"]
    assert (threading.active_count(), torch.get_num_threads()) == threads
