"""What a dry run tells is what the run then does; and the memory it counts is what a step holds."""

from __future__ import annotations

import contextlib
import copy
import json
import re

import pytest
import torch
from PIL import Image
from runs import options, train
from tensors import metadata

import train_network
from library.config.options import build
from library.config.train import TrainConfig
from library.errors import Problems, UserError
from library.models import family as families
from library.models import memory as peaks
from library.models.base import BaseModel, TextEncoder
from library.models.conditioning import LiveConditioner
from library.models.precision import types_of
from library.models.tokenizer import load_clip_tokenizer
from library.networks.trainable import build_network
from library.optim.flat import TrainedWeights
from library.safetensors_io import read_header
from library.training.rehearse import dry_run as dry_run_module
from library.training.rehearse import memory
from library.training.rehearse.dry_run import take_types


@pytest.fixture(autouse=True)
def _without_the_estimate(request, monkeypatch):
    """Spare the seconds that counting memory takes, but in the tests of it."""
    if "memory" not in request.node.name:
        known = [memory.Stage("training", {"U-Net": 1})]
        monkeypatch.setattr("library.training.rehearse.dry_run.estimate_memory", lambda *args, **more: known)


def dry(base, pictures, out, **more):
    assert train_network.main(options(base, pictures, out, dry_run=True, **more)) == 0
    return (out / "x-dry_run.txt").read_text(encoding="utf-8")


def test_a_dry_run_loads_no_weights_and_trains_nothing(base, pictures, tmp_path, monkeypatch):
    from library.training.rehearse import dry_run

    real = dry_run.load_base
    empty: list[BaseModel] = []

    def spying(*given, **named):
        empty.append(real(*given, **named))
        return empty[-1]

    monkeypatch.setattr(dry_run, "load_base", spying)
    dry(base, pictures, tmp_path)
    assert len(empty) == 1
    assert all(parameter.is_meta for parameter in empty[0].vae.parameters())
    assert sorted(path.name for path in tmp_path.glob("x*")) == ["x-blocks.png", "x-dry_run.txt", "x-pictures.png"]


def test_it_counts_as_the_run_does(base, pictures, tmp_path):
    more = {"max_train_epochs": 2, "gradient_accumulation_steps": 3, "train_batch_size": 2, "dataset_repeats": 5}
    text = dry(base, pictures, tmp_path / "dry", **more)
    train(base, pictures, tmp_path / "run", **more)
    written = metadata(tmp_path / "run" / "x.safetensors")
    match = re.search(r"an epoch: (\d+) draws -> (\d+) batches / 3 to a step = (\d+) steps", text)
    assert match
    assert match[1] == written["ss_num_train_images"]
    assert match[2] == written["ss_num_batches_per_epoch"]
    assert f"the run: {written['ss_max_train_steps']} steps (--max_train_epochs 2 x {match[3]}) = 2 epochs" in text


def test_it_counts_the_processes_of_any_launcher(base, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "4 batches = 4 steps" in dry(base, pictures, tmp_path)
    for name, value in {"SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "4 batches / 2 processes = 2 steps" in dry(base, pictures, tmp_path)


def test_it_tells_the_captions_that_are_fed(base, pictures, tmp_path, monkeypatch):
    fed = []
    real = LiveConditioner.read

    def spying(self, texts, options):
        fed.extend(texts)
        return real(self, texts, options)

    monkeypatch.setattr(LiveConditioner, "read", spying)
    more = {"shuffle_caption": True, "caption_dropout_rate": 0.3, "max_train_steps": 4}
    text = dry(base, pictures, tmp_path / "dry", **more)
    train(base, pictures, tmp_path / "run", **more)
    told = re.findall(r"^ +(\d+) tokens  \d\.png: '(.*)'$", text, re.MULTILINE)
    assert [caption for _, caption in told] == fed
    tokenizer = load_clip_tokenizer()
    assert [int(number) for number, _ in told] == [len(tokenizer(caption).input_ids) - 2 for caption in fed]


def test_captions_that_are_cut_are_told_with_what_is_lost(base, pictures, tmp_path):
    caption = pictures / "1_sks dog" / "0.txt"
    caption.write_text("word " * 75 + "the lost end", encoding="utf-8")
    text = dry(base, pictures, tmp_path)
    assert re.search(r"78 tokens, without 'the lost end\s*': 'word word", text)
    assert "1 captions have more than 75 tokens and are cut" in text
    assert "are cut" not in dry(base, pictures, tmp_path, max_token_length=150)


def test_a_dry_run_and_a_run_say_the_same(base, pictures, tmp_path, caplog, monkeypatch):
    from library.training import recipe

    def stop(*given):
        raise UserError("far enough")

    monkeypatch.setattr(recipe, "make_network", stop)
    (pictures / "1_sks dog" / "0.txt").write_text("sky " * 74, encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sky " * 230, encoding="utf-8")
    more = {"caption_prefix": "a fine old photograph of my cat", "sample_prompts": prompts, "sample_at_first": True}
    told = []
    for is_dry in (True, False):
        caplog.clear()
        with pytest.raises(UserError, match="far enough") if not is_dry else contextlib.nullcontext():
            train_network.main(options(base, pictures, tmp_path / "o", dry_run=is_dry, **more))
        told.append([line.getMessage() for line in caplog.records if "cut" in line.getMessage()])
    assert told[0] == told[1]
    assert len(told[0]) == 2
    text = (tmp_path / "o" / "x-dry_run.txt").read_text(encoding="utf-8")
    assert told[0][0] in text
    assert re.search(r"81 tokens  0.png: 'a fine old photograph of my cat sky", text)


def test_it_tells_buckets_fits_regularisation_and_validation(base, pictures, tmp_path):
    reg = tmp_path / "reg" / "1_dog"
    reg.mkdir(parents=True)
    Image.new("RGB", (230, 100)).save(reg / "r.png")
    text = dry(base, pictures, tmp_path, reg_data_dir=reg.parent, validation_split=0.25)
    assert re.search(r"64x64: \d+ pictures, \d+ draws, \d+ batches", text)
    assert re.search(r"r\.png: 230x100, resized to 147x64, cut by 19x0, 3 times, regularisation", text)
    assert "1 further pictures are held out for validation" in text
    with Image.open(tmp_path / "x-pictures.png") as sheet:
        assert sheet.height > 2 * 64


@pytest.mark.parametrize(("number", "text"), [(8, "8 pictures"), (12, "8 of 12 pictures")])
def test_the_sheet_says_how_many_pictures_it_shows(number, text):
    assert dry_run_module.shown_of(number, dry_run_module.SHEET_COLUMNS) == text


def test_it_tells_hits_and_misses_of_the_cache(base, pictures, tmp_path):
    more = {"cache_latents_to_disk": True}
    assert "latents: 0 of 4 are valid on disk, 4 will be encoded" in dry(base, pictures, tmp_path, **more)
    train(base, pictures, tmp_path / "run", **more)
    assert "latents: 4 of 4 are valid on disk, 0 will be encoded" in dry(base, pictures, tmp_path, **more)
    Image.new("RGB", (64, 64)).save(pictures / "1_sks dog" / "0.png")
    assert "latents: 3 of 4 are valid on disk, 1 will be encoded" in dry(base, pictures, tmp_path, **more)


def test_the_size_told_of_latents_is_that_of_the_cache(base, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run_module, "GIGA", 1)
    more = {"cache_latents": True, "flip_aug": True}
    text = dry(base, pictures, tmp_path, network_train_unet_only=True, **more)
    found = re.search(r"latents: (\d+\.\d\d) GB of main memory", text)
    assert found
    told = float(found[1])
    assert re.search(r"captions are encoded all before the first step: at most [1-9]\d+\.\d\d GB", text)
    train(base, pictures, tmp_path / "run", cache_latents_to_disk=True, flip_aug=True)
    headers = [read_header(file) for file in pictures.rglob("*.latents.safetensors")]
    assert told == sum(info.end - info.start for header in headers for info in header.tensors.values())
    assert f"all take {told:.2f} GB beside" in dry(base, pictures, tmp_path, cache_latents_to_disk=True, flip_aug=True)


def test_it_tells_modules_parameters_and_rates(base, pictures, tmp_path):
    more = {"network_dim": 2, "unet_lr": "1e-3", "text_encoder_lr": "1e-4", "network_args": ["loraplus_lr_ratio=4"]}
    text = dry(base, pictures, tmp_path / "dry", **more)
    weights = train(base, pictures, tmp_path / "run", **more)
    trained = sum(tensor.numel() for name, tensor in weights.items() if "alpha" not in name)
    numbers = re.findall(r"^  (\S.*): ([\d,]+) parameters, learning rate (\S+)$", text, re.MULTILINE)
    assert sum(int(number.replace(",", "")) for _, number, _ in numbers) == trained
    assert {name: rate for name, _, rate in numbers} == {
        "textencoder": "0.0001",
        "textencoder plus": "0.0004",
        "unet": "0.001",
        "unet plus": "0.004",
    }
    assert f"{len(weights) // 3} LoRAModule" in text


def test_all_conflicts_are_told_at_once(base, pictures, tmp_path):
    more = {
        "lr_warmup_steps": 5,
        "adaptive_noise_scale": 0.1,
        "cache_latents": True,
        "color_aug": True,
        "min_bucket_reso": 128,
        "bucket_no_upscale": None,
        "sample_at_first": True,
        "optimizer_type": "AdamWW",
    }
    with pytest.raises(UserError) as caught:
        dry(base, pictures, tmp_path / "out", **more)
    lines = str(caught.value).splitlines()
    for part in ("no warm-up", "--adaptive_noise_scale", "--sample_prompts", "min_bucket_reso 128"):
        assert sum(part in line for line in lines) == 1, part
    more |= {"min_bucket_reso": 64}
    with pytest.raises(UserError) as caught:
        dry(base, pictures, tmp_path / "out", **more)
    assert "color_aug" in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- memory -------------------------------------------------------------------------------------------------


def network_over(models, *, checkpointing, device):
    from library.training.prepare.placing import enable_gradient_checkpointing

    given = {"network_module": "networks.lora", "network_dim": 4, "seed": 1}
    config = build(TrainConfig, given, Problems())  # neither a model nor a folder is needed
    network = build_network(
        config.network, config.optimizer, models, checkpointing=checkpointing, device=torch.device(device)
    )
    network.groups(config.optimizer)
    if checkpointing:
        enable_gradient_checkpointing(models, network)
    network.train()
    return network


def loaded(name, made):
    import tiny

    family = tiny.FAMILIES[name]
    texts = tuple(TextEncoder(row, load_clip_tokenizer(), made[row.folder]) for row in family.text_models)
    return BaseModel(family, predicts_v=False, zero_snr=False, unet=made["unet"], vae=made["vae"], texts=texts)


def counted(models, network, types, pictures):
    """Return the peak of a step, counted on shapes, besides weights and gradients."""
    with memory.fake_weights([models.unet, *models.text_modules], network, types.unet) as peak_of:
        return peak_of(lambda: memory.make_step(models, network, types, pictures))


@pytest.mark.parametrize(
    ("name", "checkpointing", "mixed"),
    [
        pytest.param("sd1", True, "bf16", marks=pytest.mark.slow),
        pytest.param("sdxl", True, "bf16", marks=pytest.mark.slow),
        pytest.param("sd1", True, "no", marks=pytest.mark.slow),
        pytest.param("sd1", False, "bf16", marks=pytest.mark.slow),
        pytest.param("sdxl", False, "no", marks=pytest.mark.slow),
    ],
)
def test_the_memory_told_is_what_a_step_with_real_tensors_holds(name, checkpointing, mixed):
    import tiny

    pictures, types = memory.Pictures((128, 192), 2, windows=2), types_of(mixed)
    fake = loaded(name, {part: model.to("meta") for part, model in tiny.make_models(name).items()})
    take_types(fake, types)
    told = counted(fake, network_over(fake, checkpointing=checkpointing, device="meta"), types, pictures)

    real = loaded(name, {part: model.to(types.unet) for part, model in tiny.make_models(name).items()})
    network = network_over(real, checkpointing=checkpointing, device="cpu")
    copies = TrainedWeights([{"params": network.parameters()}], types.unet).copies
    network.compute_with(copies)
    with peaks.PeakMemory() as peak:
        parts = (real.unet, *real.text_modules)
        peak.ignore(peaks.weights_of([*(module for part in parts for module in part.modules()), *network.modules()]))
        peak.ignore(tensor for copy in copies.values() for tensor in (copy, copy.grad))
        memory.make_step(real, network, types, pictures)
    assert told == pytest.approx(peak.peak, rel=0.1)


def stages_told(text):
    """Return title -> (total, {part: size}) of the stages in a report, GB, and the title of the largest."""
    (largest,) = re.findall(r"memory on the device: [\d.]+ GB \((.*)\) and", text)
    found = {}
    for title, total, parts in re.findall(r"^  (.*): ([\d.]+) GB: (.*)$", text, re.MULTILINE):
        sizes = {name: float(size) for name, size in re.findall(r"([A-Za-z][^,]*) ([\d.]+)", parts)}
        found[title] = (float(total), sizes)
    return found, largest


def test_the_memory_of_a_run_is_told_by_stage(base, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --w 128 --h 192\na cat --w 64 --h 64", encoding="utf-8")
    more = {"cache_latents": True, "network_train_unet_only": True, "sample_prompts": prompts, "vae_batch_size": 2}
    told, largest = stages_told(dry(base, pictures, tmp_path, **more, sample_every_n_steps=1))
    assert list(told) == [
        "encoding pictures, 128x64 in batches of 2",
        "encoding captions",
        "training, 128x64",
        "drawing previews, 128x192",
        "decoding previews, 128x192",
    ]
    for total, parts in told.values():
        assert total == pytest.approx(sum(parts.values()), abs=0.03)
    assert told[largest][0] == max(total for total, _ in told.values())
    beside = {title: set(parts) for title, (_, parts) in told.items()}
    models = {"U-Net", "text encoders", "VAE"}
    assert [names & models for names in beside.values()] == [
        {"VAE"},
        {"text encoders"},
        {"U-Net"},
        {"U-Net"},
        {"VAE"},
    ]


@pytest.mark.slow
def test_the_memory_of_parts_that_stay_is_told(base, pictures, tmp_path):
    told, largest = stages_told(dry(base, pictures, tmp_path, train_batch_size=2))
    assert list(told) == [largest] == ["training, 128x64 in batches of 2"]
    assert {"U-Net", "text encoders", "VAE", "network", "gradients", "optimizer"} < set(told[largest][1])


@pytest.mark.slow
def test_memory_of_checkpointing_and_smaller_types():
    import tiny

    def told(checkpointing, mixed):
        models = loaded("sd1", {part: model.to("meta") for part, model in tiny.make_models("sd1").items()})
        take_types(models, types_of(mixed))
        network = network_over(models, checkpointing=checkpointing, device="meta")
        return counted(models, network, types_of(mixed), memory.Pictures((128, 128), 2))

    assert told(True, "no") < 0.6 * told(False, "no")
    assert told(False, "bf16") < 0.7 * told(False, "no")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "side", "options", "most"),
    [
        (families.SDXL, 1024, {"no_half_vae": True}, 6.2),
        (families.SDXL, 1024, {"no_half_vae": True, "fp8_base": True}, 3.6),
        (families.SD1, 512, {}, 2.05),
        (families.SD1, 512, {"fp8_base": True}, 1.2),
    ],
)
def test_the_memory_of_models_of_the_published_sizes(family, side, options, most):
    import full_size

    stages = full_size.count(
        family,
        side,
        network_dim=4,
        network_train_unet_only=True,
        gradient_checkpointing=True,
        optimizer_type="AdamW8bit",
        **options,
    )
    assert len(stages) == 5
    assert 0.9 * most < max(stage.total for stage in stages) / 1e9 <= most


def test_the_state_of_an_optimizer_is_measured():
    from library.config.optimizer import OptimizerConfig
    from library.optim.optimizers import choose_optimizer

    def per_parameter(name, dtype=torch.float32):
        return memory.state_bytes_per_parameter(choose_optimizer(OptimizerConfig(optimizer_type=name)), 1e-3, dtype)

    assert per_parameter("AdamW") == pytest.approx(8, rel=0.01)
    assert per_parameter("AdamW", torch.bfloat16) == pytest.approx(4, rel=0.01)
    assert per_parameter("AdamW", torch.float16) == pytest.approx(8, rel=0.01)  # in float32
    assert per_parameter("SGD") == 0
    assert 2 <= per_parameter("AdamW8bit") < 2.2


def test_weights_are_counted_in_their_type(model_store):
    from library.models.eight_bit import store_in_eight_bits

    unet = copy.deepcopy(model_store("sd1")[0]["unet"]).to(torch.float16)
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert peaks.weight_bytes(unet) == 2 * count
    store_in_eight_bits(unet)
    assert peaks.weight_bytes(unet) < 1.1 * count


def test_metrics_of_a_run_are_untouched_by_a_dry_run(base, pictures, tmp_path):
    train(base, pictures, tmp_path)
    before = (tmp_path / "x-metrics.jsonl").read_bytes(), (tmp_path / "x.safetensors").read_bytes()
    dry(base, pictures, tmp_path)
    assert before == ((tmp_path / "x-metrics.jsonl").read_bytes(), (tmp_path / "x.safetensors").read_bytes())
    assert json.loads(before[0].splitlines()[0])["step"] == 1
