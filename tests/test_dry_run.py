"""What a dry run tells is what the run then does; and the memory it counts is what a step holds."""

from __future__ import annotations

import contextlib
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
from library.models.base import BaseModel, TextEncoder
from library.models.conditioning import LiveConditioner
from library.models.tokenizer import load_clip_tokenizer
from library.networks.trainable import build_network
from library.training.rehearse import memory


@pytest.fixture(autouse=True)
def _without_the_estimate(request, monkeypatch):
    """Spare the seconds that counting memory takes, but in the tests of it."""
    if "memory" not in request.node.name:
        known = memory.MemoryEstimate(*range(1, 8))
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
    real = LiveConditioner.encode

    def spying(self, texts, options):
        fed.extend(texts)
        return real(self, texts, options)

    monkeypatch.setattr(LiveConditioner, "encode", spying)
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


def test_it_tells_hits_and_misses_of_the_cache(base, pictures, tmp_path):
    more = {"cache_latents_to_disk": True}
    assert "latents: 0 of 4 are valid on disk, 4 will be encoded" in dry(base, pictures, tmp_path, **more)
    train(base, pictures, tmp_path / "run", **more)
    assert "latents: 4 of 4 are valid on disk, 0 will be encoded" in dry(base, pictures, tmp_path, **more)
    Image.new("RGB", (64, 64)).save(pictures / "1_sks dog" / "0.png")
    assert "latents: 3 of 4 are valid on disk, 1 will be encoded" in dry(base, pictures, tmp_path, **more)


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


def loaded(made):
    import tiny

    family = tiny.FAMILIES["sd1"]
    text = TextEncoder(family.text_models[0], load_clip_tokenizer(), made["text_encoder"])
    return BaseModel(family, predicts_v=False, unet=made["unet"], vae=made["vae"], texts=(text,))


@pytest.mark.parametrize(
    ("checkpointing", "dtype"),
    [
        (True, torch.bfloat16),
        pytest.param(True, torch.float32, marks=pytest.mark.slow),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(False, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_memory_told_is_what_a_step_with_real_tensors_holds(checkpointing, dtype):
    import tiny

    size, batch, windows = (128, 192), 2, 2
    fake = loaded({name: model.to("meta") for name, model in tiny.make_models("sd1").items()})
    network = network_over(fake, checkpointing=checkpointing, device="meta")
    told = memory.step_activations(fake, network, dtype, size=size, batch=batch, windows=windows)

    real = loaded({name: model.to(dtype) for name, model in tiny.make_models("sd1").items()})
    network = network_over(real, checkpointing=checkpointing, device="cpu")
    with memory.PeakMemory() as peak:
        parts = (real.unet, *real.text_modules)
        peak.ignore(memory.weights_of([*(module for part in parts for module in part.modules()), *network.modules()]))
        memory._make_step(real, network, dtype, size=size, batch=batch, windows=windows)
    trained = sum(p.numel() * p.element_size() for p in network.all_parameters())
    assert told == pytest.approx(peak.peak - trained, rel=0.1)


def test_the_memory_of_a_run_is_told_by_part(base, pictures, tmp_path):
    text = dry(base, pictures, tmp_path, cache_latents=True, network_train_unet_only=True)
    (total,) = re.findall(r"memory on the device: ([\d.]+) GB", text)
    parts = dict(re.findall(r"(unet|text encoder|vae|adapter|gradients|optimizer|activations) ([\d.]+)", text))
    assert float(total) == pytest.approx(sum(map(float, parts.values())), abs=0.03)
    assert parts["vae"] == parts["text encoder"] == "0.00"  # both leave the device


@pytest.mark.slow
def test_checkpointing_and_smaller_types_need_less_memory():
    import tiny

    def told(checkpointing, dtype):
        models = loaded({name: model.to("meta") for name, model in tiny.make_models("sd1").items()})
        network = network_over(models, checkpointing=checkpointing, device="meta")
        return memory.step_activations(models, network, dtype, size=(128, 128), batch=2, windows=1)

    assert told(True, torch.float32) < 0.6 * told(False, torch.float32)
    assert told(False, torch.bfloat16) < 0.7 * told(False, torch.float32)


def test_the_state_of_an_optimizer_is_measured():
    from library.config.optimizer import OptimizerConfig
    from library.optim.optimizers import choose_optimizer

    def per_parameter(name):
        return memory.state_bytes_per_parameter(choose_optimizer(OptimizerConfig(optimizer_type=name)), 1e-3)

    assert per_parameter("AdamW") == pytest.approx(8, rel=0.01)
    assert per_parameter("SGD") == 0
    assert 2 <= per_parameter("AdamW8bit") < 2.2


def test_weights_are_counted_in_their_type(model_store):
    unet = model_store("sd1")[0]["unet"]
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert memory.weight_bytes(unet, torch.float16) == 2 * count
    assert memory.weight_bytes(unet, torch.float16, in_eight_bits=True) < 1.1 * count


def test_metrics_of_a_run_are_untouched_by_a_dry_run(base, pictures, tmp_path):
    train(base, pictures, tmp_path)
    before = (tmp_path / "x-metrics.jsonl").read_bytes(), (tmp_path / "x.safetensors").read_bytes()
    dry(base, pictures, tmp_path)
    assert before == ((tmp_path / "x-metrics.jsonl").read_bytes(), (tmp_path / "x.safetensors").read_bytes())
    assert json.loads(before[0].splitlines()[0])["step"] == 1
