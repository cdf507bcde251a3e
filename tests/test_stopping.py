"""Ctrl-C and SIGTERM at every stage of a training: it ends soon, and leaves whole files."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from runs import ALSO_SDXL_SLOW, options, same, train, train_with
from scripts import ROOT, python
from tensors import metadata

import train_network
from library.data import batches, latent_cache, picture_index
from library.data.records import ImageRecord
from library.models.conditioning import LiveConditioner
from library.training import recipe
from library.training.measure import validation
from library.training.record import metadata as record
from library.training.record import preview
from library.training.run import interruption
from tools import cache_latents

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
MAIN = threading.get_ident()
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def left_over(folder):
    """Return the names of files that are not whole, and of locks."""
    return [path.name for path in folder.rglob("*") if ".tmp" in path.name or path.name.endswith(".lock")]


def whole_files(out):
    """Return the names of what a run wrote, pictures left out."""
    return sorted(path.name for path in out.iterdir() if path.name != "sample")


# ---- while it is prepared -----------------------------------------------------------------------------------


@SIGNALS
@pytest.mark.parametrize("stage", ["open_base", "make_network", "plan_steps", "make_state"])
def test_it_ends_at_once_while_it_is_prepared(base, pictures, tmp_path, monkeypatch, number, stage):
    reached = []

    def signalled(*args, **more):
        signal.raise_signal(number)
        reached.append(stage)

    monkeypatch.setattr(recipe, stage, signalled)
    with pytest.raises(KeyboardInterrupt):
        train_network.main(options(base, pictures, tmp_path / "out"))
    assert not reached
    assert not whole_files(tmp_path / "out")


@SIGNALS
@pytest.mark.parametrize("on_disk", [False, True])
def test_it_does_not_wait_for_pictures_that_are_not_begun(base, pictures, tmp_path, monkeypatch, number, on_disk):
    folder = pictures / "1_sks dog"
    for index in range(60):
        shutil.copy(folder / "0.png", folder / f"more{index}.png")
    read, plain = [], ImageRecord.read

    def slow(self, frame):
        read.append(self.path)
        if len(read) == 3:
            signal.pthread_kill(MAIN, number)
        time.sleep(0.02)
        return plain(self, frame)

    monkeypatch.setattr(ImageRecord, "read", slow)
    more = {"cache_latents": True, "cache_latents_to_disk": on_disk, "vae_batch_size": 64}
    with pytest.raises(KeyboardInterrupt):
        train_network.main(options(base, pictures, tmp_path / "out", **more))
    assert len(read) < 30
    assert not left_over(tmp_path)


def test_hashing_and_reading_of_a_disk_cache_do_not_wait_either(base, pictures, tmp_path, monkeypatch):
    train(base, pictures, tmp_path / "a", cache_latents_to_disk=True)
    digest = picture_index.DIGEST
    for name in ("read_header", "DIGEST"):
        seen: list[object] = []

        def slow(file, seen=seen):
            seen.append(file)
            signal.pthread_kill(MAIN, signal.SIGINT)
            time.sleep(0.02)
            raise OSError

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            if name == "DIGEST":
                (pictures / "1_sks dog" / picture_index.INDEX_FILE).unlink(missing_ok=True)
                patched.setattr(picture_index, name, dataclasses.replace(digest, read=slow))
            else:
                patched.setattr(latent_cache, name, slow)
            patched.setattr(latent_cache.images, "NUM_THREADS", 1)
            train_network.main(options(base, pictures, tmp_path / "b", cache_latents_to_disk=True))
        assert len(seen) < 4, name


@SIGNALS
@ALSO_SDXL_SLOW
def test_it_ends_at_once_while_captions_are_encoded(base, pictures, tmp_path, monkeypatch, number):
    calls = []

    def signalled(self, texts, given):
        calls.append(texts)
        signal.raise_signal(number)

    monkeypatch.setattr(LiveConditioner, "encode", signalled)
    with pytest.raises(KeyboardInterrupt):
        train_network.main(options(base, pictures, tmp_path / "out", network_train_unet_only=True))
    assert len(calls) == 1
    assert not left_over(tmp_path)


def test_caching_by_the_script_ends_at_once_and_goes_on(base, pictures, tmp_path, monkeypatch):
    written, plain = [], latent_cache.write_weights

    def signalled(path, *more):
        plain(path, *more)
        written.append(path)
        signal.raise_signal(signal.SIGINT)

    argv = options(base, pictures, None)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(latent_cache, "write_weights", signalled)
        cache_latents.main(argv)
    assert len(written) == 1
    assert not left_over(tmp_path)
    assert cache_latents.main(argv) == 0
    assert len(list(pictures.rglob("*.latents.safetensors"))) == 4


@SIGNALS
def test_a_script_that_is_stopped_says_so_in_one_line_with_exit_code_130(number):
    code = (
        f"import signal\nfrom library.logs import run_script\nrun_script(lambda _: signal.raise_signal({int(number)}))"
    )
    done = python("-c", code, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "-c: stopped\n")


# ---- in training --------------------------------------------------------------------------------------------


@ALSO_SDXL_SLOW
def test_previews_are_left_where_the_signal_comes(base, pictures, tmp_path, monkeypatch, caplog):
    (tmp_path / "p.txt").write_text("a --w 64 --h 64 --s 1\n" * 3, encoding="utf-8")
    more = {
        "sample_prompts": tmp_path / "p.txt",
        "sample_every_n_steps": 2,
        "max_train_steps": 4,
        "network_dropout": 0.1,
    }
    expected = train(base, pictures, tmp_path / "whole", **more)
    generate = preview.generate_previews

    def stopped(*args, **given):
        pictures = generate(*args, **given)
        yield next(pictures)
        signal.raise_signal(signal.SIGTERM)
        yield from pictures

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(preview, "generate_previews", stopped)
        train_network.main(options(base, pictures, tmp_path / "out", **more))
    assert "previews (step 2): 1 of 3, because of the stop" in caplog.text
    state = tmp_path / "out" / "x-step00000002-state"
    (column,) = json.loads((state / "train_state.json").read_text(encoding="utf-8"))["columns"]
    assert len(column[1]) == 1
    assert not left_over(tmp_path)
    same(train(base, pictures, tmp_path / "out", **more, resume=state), expected)


@ALSO_SDXL_SLOW
def test_validation_is_left_where_the_signal_comes(base, pictures, tmp_path, monkeypatch, caplog):
    more = {"validation_split": 0.5, "validate_every_n_steps": 1, "max_train_steps": 3}
    expected = train(base, pictures, tmp_path / "whole", **more)
    calls, losses = [], validation.HeldOut.losses

    def stopped(self, *args, **given):
        calls.append(args)
        if len(calls) == 3:  # the first picture of the second step
            signal.raise_signal(signal.SIGINT)
        return losses(self, *args, **given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(validation.HeldOut, "losses", stopped)
        train_network.main(options(base, pictures, tmp_path / "out", **more))
    assert len(calls) == 3
    assert "validation after step 2 is left out, because of the stop" in caplog.text
    same(train(base, pictures, tmp_path / "out", **more, resume="auto"), expected)


def test_a_stop_does_not_wait_for_the_hash_of_the_base_model(base, pictures, tmp_path, monkeypatch, caplog):
    done, hashed = threading.Event(), []

    def slow(path):
        done.wait(60)
        hashed.append(path)
        return "0"

    monkeypatch.setattr(record, "file_sha256", slow)
    with pytest.raises(KeyboardInterrupt):
        train_with(options(base, pictures, tmp_path), lambda _: signal.raise_signal(signal.SIGTERM), after=1)
    assert not hashed
    found = metadata(tmp_path / "x-step00000001.safetensors")
    assert "ss_sd_model_hash" in found
    assert "ss_new_sd_model_hash" not in found
    assert "without the hash of the base model" in caplog.text
    done.set()


def test_a_signal_while_a_file_waits_for_the_hash_ends_the_wait(base, pictures, tmp_path, monkeypatch):
    done = threading.Event()

    def slow(path):
        signal.pthread_kill(MAIN, signal.SIGINT)
        done.wait(60)
        return "0"

    monkeypatch.setattr(record, "file_sha256", slow)
    plain = record.BackgroundHashes.__init__

    def late(self, files, stop):
        plain(self, {}, stop)  # the thread begins when it is waited for
        self._files = files
        self._thread = threading.Thread(target=self._compute, daemon=True)

    def begin(self):
        if not self._thread.is_alive() and not self._values:
            self._thread.start()
        return values(self)

    values = record.BackgroundHashes.values
    monkeypatch.setattr(record.BackgroundHashes, "__init__", late)
    monkeypatch.setattr(record.BackgroundHashes, "values", begin)
    with pytest.raises(KeyboardInterrupt):
        train_network.main(options(base, pictures, tmp_path, save_every_n_steps=1))
    assert (tmp_path / "x-step00000001.safetensors").exists()
    assert (tmp_path / "x-step00000001-state").is_dir()
    done.set()


@SIGNALS
def test_workers_outlive_the_signal_until_the_step_is_done(base, pictures, tmp_path, number):
    def to_all(progress):
        workers = multiprocessing.active_children()
        assert len(workers) == 1
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, number)
        time.sleep(0.2)
        signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        train_with(options(base, pictures, tmp_path, max_data_loader_n_workers=1), to_all, after=1)
    assert (tmp_path / "x-step00000001-state").is_dir()
    assert not multiprocessing.active_children()


class Stuck(torch.utils.data.Dataset):
    """Numbers, of which the second one never comes."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index:
            time.sleep(600)
        return index


def test_a_worker_that_waits_for_a_drive_is_ended(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = torch.utils.data.DataLoader(Stuck(), batch_size=None, num_workers=1, worker_init_fn=batches._ignore_stops)
    found = batches.load_batches(loader)
    next(found)
    (worker,) = multiprocessing.active_children()
    found.close()
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


def test_a_handler_that_is_not_python_s_does_not_fail_the_run(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    given, plain = [], signal.signal

    def from_elsewhere(number, handler):
        given.append(number)
        former = plain(number, handler)
        return None if number == signal.SIGTERM else former

    with monkeypatch.context() as patched:
        patched.setattr(interruption.signal, "signal", from_elsewhere)
        with interruption.StopRequest():
            pass
    signal.signal(signal.SIGTERM, before)
    assert given == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
