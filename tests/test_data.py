"""Records, the order of batches, what a batch holds, and the latent cache."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import MeanEncoder
from PIL import Image

from library.config.dataset import DatasetConfig, DatasetOptions, SubsetOptions
from library.data import batches as batches_module
from library.data import images, latent_cache
from library.data.batches import (
    BatchMaker,
    BatchRequest,
    ReadAhead,
    RunPlan,
    Sample,
    TaskMaker,
    load_batches,
    make_loader,
    num_batches,
    plan_epoch,
)
from library.data.latent_cache import build_cache
from library.data.records import build_datasets, regularisation_repeats
from library.data.sources import Listed
from library.errors import UserError
from library.randomness import random_for

# ---- records and order --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Return a folder with pictures of several shapes, each with a caption."""
    root = tmp_path / "写真 folder"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(90, 60), (60, 90), (64, 64), (200, 100), (70, 70), (61, 93), (128, 128)]):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"p{index}.png")
        (root / f"p{index}.txt").write_text(f"tag{index}, a, b, c", encoding="utf-8")
    return root


def datasets_of(folder, *, latents_cached=False, dataset=None, **subset):
    values = {"resolution": (64, 64), "batch_size": 2, "enable_bucket": True, "bucket_no_upscale": True} | (
        dataset or {}
    )
    config = DatasetConfig(
        options=DatasetOptions(**values),
        subsets=(SubsetOptions(image_dir=folder, caption_extension=".txt", **subset),),
    )
    return build_datasets([config], latents_cached=latents_cached)


def test_unreadable_pictures_are_listed_all_at_once(folder):
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        datasets_of(folder)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("2 of 9 pictures cannot be read")
    assert "broken.jpg: not a picture that can be read" in lines[1]
    assert "empty.png: the file is empty" in lines[2]


def test_pictures_too_long_to_be_resized_are_refused(folder):
    Image.new("RGB", (30000, 10)).save(folder / "line.png")
    with pytest.raises(UserError, match=r"1 pictures are too long and narrow.*\n  .*line.png: 30000x10"):
        datasets_of(folder, dataset={"bucket_no_upscale": False, "min_bucket_reso": 64})


def test_a_picture_cut_short_is_found_before_training(folder):
    from library.data.records import verify_pictures

    whole = (folder / "p3.png").read_bytes()
    (folder / "p3.png").write_bytes(whole[: len(whole) // 2])
    datasets = datasets_of(folder)
    with pytest.raises(UserError, match=r"p3\.png"):
        verify_pictures(datasets)
    with pytest.raises(UserError, match=r"p3\.png"):
        make_cache(datasets)


def test_an_epoch_has_each_sample_once_and_no_mixed_batch(folder):
    datasets = datasets_of(folder, num_repeats=3)
    batches = plan_epoch(datasets, 7, 1)
    assert len(batches) == num_batches(datasets)
    times = Counter(sample for batch in batches for sample in batch)
    assert set(times.values()) == {1}
    assert len(times) == 21
    for batch in batches:
        assert len({datasets[s.dataset].records[s.record].placement.bucket for s in batch}) == 1
    assert plan_epoch(datasets, 7, 1) == batches
    assert plan_epoch(datasets, 7, 2) != batches
    assert plan_epoch(datasets, 8, 1) != batches


def written_out(datasets, seed, epoch):
    """Return the batches of an epoch as lists of samples, by the rule: shuffle each bucket, then the batches."""
    batches = []
    for index, dataset in enumerate(datasets):
        buckets: dict[Any, list[Sample]] = {}
        for number, record in enumerate(dataset.records):
            samples = [Sample(index, number, repeat) for repeat in range(record.repeats)]
            buckets.setdefault(record.placement.bucket, []).extend(samples)
        for bucket, samples in sorted(buckets.items()):
            random_for(seed, "bucket", epoch, index, *bucket).shuffle(samples)
            size = dataset.options.batch_size
            batches += [tuple(samples[start : start + size]) for start in range(0, len(samples), size)]
    random_for(seed, "batches", epoch).shuffle(batches)
    return batches


def requests_written_out(plan):
    """Return the requests of a plan: batches in turn to the processes, the first ones again until all have as many."""
    for epoch in range(1, plan.num_epochs + 1):
        batches = written_out(plan.datasets, plan.seed, epoch)
        each = -(-len(batches) // plan.num_processes)
        mine = [batches[number % len(batches)] for number in range(each * plan.num_processes)]
        for number, samples in enumerate(mine[plan.rank :: plan.num_processes]):
            step = (epoch - 1) * -(-each // plan.accumulation) + number // plan.accumulation
            if plan.start_step <= step < plan.num_steps:
                yield BatchRequest(epoch, step, samples)


@pytest.mark.parametrize(("accumulation", "processes", "start"), [(1, 1, 0), (3, 1, 4), (2, 3, 5)])
def test_the_order_is_that_of_shuffled_lists(folder, accumulation, processes, start):
    one = datasets_of(folder, num_repeats=3)[0]
    records = tuple(dataclasses.replace(record, repeats=1 + n % 4) for n, record in enumerate(one.records))
    (larger,) = datasets_of(folder, num_repeats=2, dataset={"resolution": (128, 128), "batch_size": 3})
    datasets = [dataclasses.replace(one, records=records), larger]
    assert list(plan_epoch(datasets, 3, 2)) == written_out(datasets, 3, 2)
    assert num_batches(datasets) == len(written_out(datasets, 3, 2))
    for rank in range(processes):
        plan = RunPlan(datasets, 3, 17, accumulation, rank, processes, start)
        assert list(plan) == list(requests_written_out(plan))


def test_a_large_epoch_takes_few_bytes_a_draw(folder):
    (dataset,) = datasets_of(folder)
    many = [dataclasses.replace(dataset, records=dataset.records * 1000)]
    many = [dataclasses.replace(many[0], records=tuple(dataclasses.replace(r, repeats=10) for r in many[0].records))]
    tracemalloc.start()
    order = plan_epoch(many, 1, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 70_000
    assert sum(map(len, order)) == 70_000


def test_several_datasets_share_an_epoch_at_their_own_resolution(folder):
    datasets = datasets_of(folder) + datasets_of(folder, dataset={"resolution": (128, 128), "batch_size": 3})
    batches = plan_epoch(datasets, 1, 1)
    assert len(batches) == num_batches(datasets)
    assert all(len({sample.dataset for sample in batch}) == 1 for batch in batches)
    assert {sample.dataset for batch in batches for sample in batch} == {0, 1}


def test_processes_see_every_batch_and_make_as_many_steps(folder):
    datasets = datasets_of(folder, num_repeats=2)
    plans = [RunPlan(datasets, 3, 100, 2, rank, 3) for rank in range(3)]
    parts = [list(plan.requests(1)) for plan in plans]
    assert len({len(part) for part in parts}) == 1
    seen = {request.samples for part in parts for request in part}
    assert seen == set(plan_epoch(datasets, 3, 1))
    for requests in zip(*parts, strict=True):
        assert len({request.step for request in requests}) == 1


def test_a_plan_counts_steps_and_epochs_as_it_runs(folder):
    datasets = datasets_of(folder)
    plan = RunPlan(datasets, 3, 5, 2)
    requests = list(plan)
    assert plan.batches_per_epoch == num_batches(datasets)
    assert sorted({request.step for request in requests}) == list(range(5))
    assert max(request.epoch for request in requests) == plan.num_epochs
    per_step = Counter(request.step for request in requests)
    assert max(per_step.values()) == 2


def batches_of(datasets, workers, seed=5, cache=None):
    maker = BatchMaker(datasets, TaskMaker(seed, 100, 1.0, cache))
    plan = RunPlan(datasets, seed, 12, 2)
    return list(make_loader(maker, plan, workers))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")  # of few cores
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_number_of_workers_changes_nothing(folder, workers):
    datasets = datasets_of(
        folder,
        num_repeats=2,
        shuffle_caption=True,
        caption_dropout_rate=0.2,
        caption_tag_dropout_rate=0.2,
        flip_aug=True,
        random_crop=True,
        color_aug=True,
    )
    alone = batches_of(datasets, 0)
    for one, other in zip(alone, batches_of(datasets, workers), strict=True):
        assert (one.samples, one.captions, one.names) == (other.samples, other.captions, other.names)
        assert torch.equal(one.pixels, other.pixels)
    assert len({batch.captions for batch in alone}) > 3


def test_what_travels_to_a_worker_does_not_grow_with_the_pictures(folder):
    (dataset,) = datasets_of(folder, shuffle_caption=True)
    sizes = []
    for times in (1, 1000):
        many = [dataclasses.replace(dataset, records=dataset.records * times)]
        loader = make_loader(BatchMaker(many, TaskMaker(5, 100, 1.0, None)), RunPlan(many, 5, 2, 1), 0)
        assert isinstance(loader, torch.utils.data.DataLoader)
        sizes.append([len(pickle.dumps(part)) for part in (loader.dataset, *loader.sampler)])
    assert sizes[0][0] == sizes[1][0]
    assert max(map(max, sizes)) < 4000


@pytest.mark.skipif(sys.platform == "win32", reason="signals cannot wait on Windows")
def test_a_stop_leaves_alone_the_workers_that_are_only_starting(folder):
    datasets = datasets_of(folder)
    loader = make_loader(BatchMaker(datasets, TaskMaker(5, 4, 1.0, None)), RunPlan(datasets, 5, 4, 1), 1)
    before = set(multiprocessing.active_children())
    batches = load_batches(loader)
    sending = threading.Thread(target=send_to_new_workers, args=(before, signal.SIGTERM))
    sending.start()
    assert len(list(batches)) == 4
    sending.join()


def send_to_new_workers(before, number):
    """Send a signal to the first process that begins, as soon as it is there."""
    while not (new := set(multiprocessing.active_children()) - before):
        time.sleep(0.001)
    for process in new:
        os.kill(process.pid, number)


def test_a_run_can_begin_at_any_request(folder):
    datasets = datasets_of(folder, flip_aug=True, shuffle_caption=True, random_crop=True)
    maker = BatchMaker(datasets, TaskMaker(5, 100, 1.0, None))
    requests = list(RunPlan(datasets, 5, 12, 2))
    whole = batches_of(datasets, 0)
    for index in (1, 6, len(requests) - 1):
        batch = maker[requests[index]]
        assert batch.pixels is not None
        assert torch.equal(batch.pixels, whole[index].pixels)
        assert batch.captions == whole[index].captions


def test_flips_are_mirrors_in_half_of_the_samples(folder):
    plain, flipped = datasets_of(folder, num_repeats=40), datasets_of(folder, num_repeats=40, flip_aug=True)
    mirrored = total = 0
    for one, other in zip(batches_of(plain, 0), batches_of(flipped, 0), strict=True):
        for a, b in zip(one.pixels, other.pixels, strict=True):
            total += 1
            if not torch.equal(a, b):
                mirrored += 1
                assert torch.equal(a, b.flip(-1))
    assert 0.25 < mirrored / total < 0.75


def test_prior_loss_weight_goes_to_regularisation_pictures(folder, tmp_path):
    reg = tmp_path / "reg"
    reg.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(reg / f"{index}.png")
    subsets = (
        SubsetOptions(image_dir=folder, caption_extension=".txt"),
        SubsetOptions(image_dir=reg, is_reg=True, class_tokens="dog"),
    )
    datasets = build_datasets(
        [DatasetConfig(options=DatasetOptions(resolution=(64, 64), batch_size=4), subsets=subsets)],
        latents_cached=False,
    )
    assert datasets[0].num_images(is_reg=False) == datasets[0].num_images(is_reg=True) == 7
    maker = BatchMaker(datasets, TaskMaker(1, 10, 0.25, None))
    for request in RunPlan(datasets, 1, 4, 1):
        batch = maker[request]
        is_reg = [Path(name).parent == reg for name in batch.names]
        assert batch.loss_weights.tolist() == [0.25 if reg_ else 1.0 for reg_ in is_reg]
        assert all(caption == "dog" for caption, reg_ in zip(batch.captions, is_reg, strict=True) if reg_)


@pytest.mark.parametrize(
    ("num_training", "own", "expected"), [(5, [2, 2, 2], [2, 2, 2]), (10, [1, 1, 1], [4, 3, 3]), (2, [1, 1, 1], [1, 1])]
)
def test_regularisation_pictures_are_repeated_until_there_are_enough(num_training, own, expected):
    found = [Listed("a.png", SubsetOptions(num_repeats=repeats), ("",), (), None) for repeats in own]
    assert [number for _, number in regularisation_repeats(found, num_training)] == expected


def test_without_buckets_a_random_crop_is_a_window_of_the_picture(folder):
    datasets = datasets_of(folder, dataset={"enable_bucket": False}, random_crop=True, num_repeats=5)
    original = images.load_picture(folder / "p3.png")  # 200 x 100
    windows = [
        pixels
        for batch in batches_of(datasets, 0)
        for name, pixels in zip(batch.names, batch.pixels, strict=True)
        if name.endswith("p3.png")
    ]
    values = (windows[0].permute(1, 2, 0).add(1).mul(127.5)).round().to(torch.uint8).numpy()
    found = [
        (top, left)
        for top in range(100 - 64 + 1)
        for left in range(200 - 64 + 1)
        if np.array_equal(original[top : top + 64, left : left + 64], values)
    ]
    assert len(found) == 1


# ---- the latent cache ---------------------------------------------------------------------------------------


def make_cache(datasets, encoder=None, *, on_disk=True):
    return build_cache(datasets, encoder or MeanEncoder(), batch_size=2, on_disk=on_disk)


def entry_files(folder):
    return sorted(folder.glob("*.latents.safetensors"))


def test_cached_moments_are_those_of_the_pixels_mirrored_or_not(folder):
    datasets = datasets_of(folder, flip_aug=True, latents_cached=True)
    cached, live = batches_of(datasets, 0, cache=make_cache(datasets, on_disk=False)), batches_of(datasets, 0)
    for one, other in zip(cached, live, strict=True):
        torch.testing.assert_close(one.moments, MeanEncoder().moments(other.pixels))
        assert one.captions == other.captions


def test_a_second_run_reads_every_entry_and_encodes_none(folder):
    datasets = datasets_of(folder, latents_cached=True)
    encoder, none = MeanEncoder(), MeanEncoder()
    first = make_cache(datasets, encoder)
    assert sum(encoder.encoded) == 7
    assert len(entry_files(folder)) == 7
    second = make_cache(datasets, none)
    assert none.encoded == []
    for record in datasets[0].records:
        assert torch.equal(first.read(record, mirrored=False).moments, second.read(record, mirrored=False).moments)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("change", ["pixels", "vae", "resolution", "interpolation", "flip"])
def test_an_entry_is_used_only_for_what_it_was_made_from(folder, change):
    make_cache(datasets_of(folder, latents_cached=True))
    encoder, expected = MeanEncoder(), 7
    dataset: dict[str, Any] = {}
    subset: dict[str, Any] = {}
    if change == "pixels":
        picture = folder / "p2.png"
        Image.new("RGB", (64, 64), (1, 2, 3)).save(picture)
        expected = 1
    elif change == "vae":
        encoder = MeanEncoder("another")
    elif change == "resolution":
        dataset = {"resolution": (128, 128)}
        expected = 2  # of the others neither size nor crop change: they are below both areas
    elif change == "interpolation":
        subset = {"resize_interpolation": "nearest"}
    else:
        subset = {"flip_aug": True}
        expected = 14
    datasets = datasets_of(folder, latents_cached=True, dataset=dataset, **subset)
    cache = make_cache(datasets, encoder)
    if change == "resolution":
        expected = sum(
            a.placement != b.placement
            for a, b in zip(datasets[0].records, datasets_of(folder, latents_cached=True)[0].records, strict=True)
        )
        assert expected
    assert sum(encoder.encoded) == expected
    pixels = images.to_tensor(images.load_picture(folder / "p2.png"))[None]
    record = next(record for record in datasets[0].records if record.path.name == "p2.png")
    torch.testing.assert_close(cache.read(record, mirrored=False).moments, MeanEncoder().moments(pixels)[0])


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_entry_is_made_again(folder, damage):
    datasets = datasets_of(folder, latents_cached=True)
    encoder = MeanEncoder()
    good = make_cache(datasets)
    victim = entry_files(folder)[3]
    content = victim.read_bytes()
    victim.write_bytes(content[:-10] if damage is None else damage)
    again = make_cache(datasets, encoder)
    assert encoder.encoded == [1]
    assert victim.read_bytes() == content
    for record in datasets[0].records:
        assert torch.equal(good.read(record, mirrored=False).moments, again.read(record, mirrored=False).moments)


def test_entries_are_read_when_a_batch_needs_them(folder, monkeypatch):
    datasets = datasets_of(folder, flip_aug=True, latents_cached=True)
    in_memory = batches_of(datasets, 0, cache=make_cache(datasets, on_disk=False))
    cache = make_cache(datasets)
    monkeypatch.setattr(batches_module, "READING_THREADS", 2)
    found = batches_of(datasets, 0, cache=cache)
    for one, other in zip(in_memory, found, strict=True):
        assert (one.samples, one.names, one.captions) == (other.samples, other.names, other.captions)
        assert torch.equal(one.moments, other.moments)
    taken: list[BatchRequest] = []

    def requests():
        for request in RunPlan(datasets, 5, 12, 2):
            taken.append(request)
            yield request

    threads = threading.active_count()
    loaded = load_batches(ReadAhead(BatchMaker(datasets, TaskMaker(5, 100, 1.0, cache)), requests()))
    first = next(loaded)
    assert first.samples == in_memory[0].samples
    assert len(taken) <= 5
    loaded.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_an_entry_that_is_lost_during_the_run_ends_it_with_its_name(folder, damage):
    datasets = datasets_of(folder, latents_cached=True)
    cache = make_cache(datasets)
    files = entry_files(folder)
    loaded = load_batches(
        make_loader(BatchMaker(datasets, TaskMaker(5, 100, 1.0, cache)), RunPlan(datasets, 5, 80, 1), 0)
    )
    next(loaded)
    if damage == "gone":
        files[2].unlink()
    else:
        files[2].write_bytes(files[3].read_bytes() if damage == "another" else files[2].read_bytes()[:-8])
    with pytest.raises(UserError, match=f"latents of .*p2.png are gone or damaged .*{files[2].name}.*Start it again"):
        list(loaded)


def test_an_entry_of_a_former_version_serves_and_is_not_made_again(folder):
    datasets = datasets_of(folder, latents_cached=True)
    make_cache(datasets)
    for file in entry_files(folder):
        name, bucket, _, *ending = file.name.rsplit(".", 4)
        file.rename(file.with_name(".".join([name, bucket, *ending])))
    encoder = MeanEncoder()
    cache = make_cache(datasets, encoder)
    assert encoder.encoded == []
    assert len(batches_of(datasets, 0, cache=cache)) == len(batches_of(datasets, 0))


def test_subsets_that_treat_a_picture_differently_have_their_own_entries(folder):
    options = DatasetOptions(resolution=(64, 64), batch_size=2)
    subsets = tuple(
        SubsetOptions(image_dir=folder, caption_extension=".txt", resize_interpolation=way) for way in ("area", "box")
    )
    datasets = build_datasets([DatasetConfig(options=options, subsets=subsets)], latents_cached=True)
    cached, live = batches_of(datasets, 0, cache=make_cache(datasets)), batches_of(datasets, 0)
    for one, other in zip(cached, live, strict=True):
        torch.testing.assert_close(one.moments, MeanEncoder().moments(other.pixels))
    encoder = MeanEncoder()
    make_cache(datasets, encoder)
    assert encoder.encoded == []


def test_an_entry_that_another_run_replaces_between_its_reads_is_read_again(folder, monkeypatch):
    plain = datasets_of(folder, latents_cached=True)
    cache = make_cache(plain)
    plain_read = latent_cache.read_tensors

    def replaced_before(*args):
        monkeypatch.setattr(latent_cache, "read_tensors", plain_read)
        make_cache(datasets_of(folder, latents_cached=True, flip_aug=True))  # the mirror images come first in its files
        return plain_read(*args)

    before = {record.file: cache.read(record, mirrored=False).moments for record in plain[0].records}
    for record in plain[0].records[:1]:
        monkeypatch.setattr(latent_cache, "read_tensors", replaced_before)
        assert torch.equal(cache.read(record, mirrored=False).moments, before[record.file])
    assert latent_cache.read_tensors is plain_read


def test_latents_that_are_not_finite_are_refused_and_not_kept(folder):
    datasets = datasets_of(folder, latents_cached=True)
    with pytest.raises(UserError, match="NaN for .*p0.png.*name another with --vae"):
        make_cache(datasets, MeanEncoder(scale=float("nan")))
    assert entry_files(folder) == []


def test_cached_latents_with_a_random_crop_are_refused(folder):
    with pytest.raises(UserError, match="random_crop of .* needs pixels"):
        datasets_of(folder, latents_cached=True, random_crop=True)


def test_keys_make_streams_that_repeat_and_differ():
    one, again, other = (random_for(1, "a", *key).random() for key in ((2, 3), (2, 3), (23,)))
    assert one == again != other
