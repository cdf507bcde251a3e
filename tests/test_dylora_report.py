"""Which rank of a DyLoRA to take: losses by rank against an oracle, intervals, files, mistakes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import statistics

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from PIL import Image
from runs import options
from safetensors.torch import load_file, save_file
from scripts import ROOT, python
from tensors import opened

import train_network
from library.errors import UserError
from library.models.tokenizer import load_clip_tokenizer
from library.randomness import generator_for
from library.training.charts import style
from library.training.charts.rank_plot import draw_ranks
from library.training.measure import picture_losses, rank_report
from library.training.measure.rank_results import BASE, compare_ranks
from networks import extract_lora_from_dylora, lora
from tools import dylora_report

RANKS = [2, 4, 6, 8]
SEED = 7


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_store):
    """Return (folder of a run, its pictures, base): a DyLoRA trained for a few steps, two of six pictures held out."""
    out = tmp_path_factory.mktemp("dylora")
    pictures = out / "train"
    folder = pictures / "1_sks dog"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a dog, tag{index}", encoding="utf-8")
    base = model_store("sd1")[1]["folder"]
    training = {
        "resolution": "64",
        "enable_bucket": None,
        "min_bucket_reso": None,
        "max_bucket_reso": None,
        "bucket_no_upscale": None,
        "network_module": "networks.dylora",
        "network_dim": 8,
        "network_alpha": 4,
        "network_args": ["unit=2"],
        "learning_rate": "3e-2",
        "max_train_steps": 6,
        "validation_split": 0.34,
        "validate_every_n_steps": 6,
    }
    assert train_network.main(options(base, pictures, out, **training)) == 0
    return out, pictures, base


def arguments(trained, save_to, **more):
    """Return a command line; None leaves an option out."""
    out, pictures, base = trained
    values = {
        "model": out / "x.safetensors",
        "pretrained_model_name_or_path": base,
        "train_data_dir": pictures,
        "caption_extension": ".txt",
        "resolution": "64",
        "save_to": save_to,
    } | more
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def run(trained, save_to, **more):
    assert dylora_report.main(arguments(trained, save_to, **more)) == 0
    return json.loads(save_to.with_name(f"{save_to.name}-report.json").read_text(encoding="utf-8"))


# ---- losses -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_losses_are_those_of_the_extracted_files(trained, model_store, tmp_path):
    """Against a computation of its own, with the file of each rank through networks.lora; and without any."""
    out, pictures, _ = trained
    record = run(trained, tmp_path / "all", timesteps=3, draws=2, train_batch_size=4)
    assert record["timesteps"] == [250, 500, 750]
    assert record["seed"] == SEED  # from the metadata
    files = sorted(pictures.rglob("*.png"))
    assert list(record["losses"]) == [str(rank) for rank in (BASE, *RANKS)]
    assert all(list(found) == [str(path) for path in files] for found in record["losses"].values())
    argv = ["--model", str(out / "x.safetensors"), "--save_to", str(tmp_path / "cut.safetensors")]
    assert extract_lora_from_dylora.main(argv) == 0
    models = model_store("sd1")[0]
    for rank in (BASE, 2, 6, 8):
        weights = load_file(tmp_path / f"cut-{rank:04d}.safetensors") if rank else None
        expected = oracle(models, weights, files, record["timesteps"], draws=2)
        for path, losses in zip(files, expected, strict=True):
            assert record["losses"][str(rank)][str(path)] == pytest.approx(losses, rel=1e-4), rank
    spread = [statistics.fmean(map(statistics.fmean, found.values())) for found in record["losses"].values()]
    assert min(abs(one - other) for one, other in itertools.pairwise(spread)) > 1e-3  # ranks do differ


@torch.no_grad()
def oracle(models, weights, files, timesteps, draws):
    """Return the losses of files at timesteps, written out from the definition."""
    unet, text_encoder = copy.deepcopy(models["unet"]), copy.deepcopy(models["text_encoder"])
    if weights is not None:
        network, _ = lora.create_network_from_weights(1.0, None, None, text_encoder, unet, weights)
        network.load_state_dict(weights)
        network.apply_to(text_encoder, unet)
    signal = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    rows = []
    for index, path in enumerate(files):
        pixels = torch.from_numpy(np.asarray(opened(path)).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        mean, log_variance = models["vae"].encode(pixels).latent_dist.parameters.chunk(2, dim=1)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        tokens = load_clip_tokenizer()(caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
        text = text_encoder(tokens)[0]
        columns: list[list[float]] = []
        for draw in range(draws):
            key: tuple[int | str, ...] = (SEED, "validation", 0, index, 0, *([draw] if draw else []))
            unit = torch.randn(mean.shape[1:], generator=generator_for(*key, "latents"))
            noise = torch.randn(mean.shape[1:], generator=generator_for(*key, "noise"))
            latents = (mean + (log_variance / 2).exp() * unit) * models["vae"].config.scaling_factor
            columns.append([])
            for timestep in timesteps:
                share = signal[timestep].float()
                noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
                prediction = unet(noisy, torch.tensor([timestep]), text).sample
                columns[-1].append(float((prediction - noise).square().mean()))
        rows.append(np.mean(columns, axis=0).tolist())
    return rows


@pytest.mark.slow
def test_what_is_held_out_is_measured_as_in_training(trained, tmp_path):
    """With the four timesteps of the validation the loss of the full rank is that of the training's last validation."""
    out, _, _ = trained
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog --w 64 --h 64 --s 1 --d 3\na cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    record = run(trained, tmp_path / "new" / "r", timesteps=4, validation_split=0.34, sample_prompts=prompts)
    lines = [json.loads(line) for line in (out / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validated = [line["loss/validation/step_average"] for line in lines if "loss/validation/step_average" in line]
    assert record["pictures"] == 2
    assert record["ranks"][-1]["loss"] == pytest.approx(validated[-1], rel=1e-5)
    check_files(tmp_path / "new" / "r", record, trained)


def check_files(name, record, trained):
    """What the files say agrees; sizes are those of the extracted files."""
    assert [row["rank"] for row in record["ranks"]] == [BASE, *RANKS]
    ranks = {row["rank"]: row for row in record["ranks"] if row["rank"]}
    assert ranks[record["best"]]["loss"] == min(row["loss"] for row in ranks.values())
    assert record["choice"] == min(rank for rank, row in ranks.items() if row["within_noise"])
    assert record["sentence"].startswith(f"Take rank {record['choice']}: ")
    table = name.with_name(f"{name.name}-report.md").read_text(encoding="utf-8")
    assert record["sentence"] in table
    assert all(
        f"| rank {rank} | {row['bytes'] / 1e6:.2f} MB | {row['loss']:.5f} ± " in table for rank, row in ranks.items()
    )
    argv = ["--model", str(trained[0] / "x.safetensors"), "--save_to", str(name.with_name("cut.safetensors"))]
    assert extract_lora_from_dylora.main(argv) == 0
    for rank, row in ranks.items():
        assert row["bytes"] == pytest.approx(name.with_name(f"cut-{rank:04d}.safetensors").stat().st_size, abs=1000)
    with Image.open(name.with_name(f"{name.name}-report.png")) as plot:
        assert plot.size == (style.WIDTH * style.SHARPNESS, style.HEIGHT * style.SHARPNESS)
    with Image.open(name.with_name(f"{name.name}-ranks.png")) as sheet:
        assert sheet.size == (200 + 68 * 5, 24 + 68 * 2)  # base model and four ranks of two prompts
        first, last = (np.asarray(sheet.crop((200 + 68 * n, 24, 264 + 68 * n, 88))) for n in (0, 4))
        assert (first != last).any()


# ---- intervals and the choice -------------------------------------------------------------------------------


def test_intervals_are_those_of_students_t():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980, 5000: 1.960}
    assert {degrees: round(picture_losses.t_quantile(degrees), 3) for degrees in table} == table
    mean, half = picture_losses.interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, half) == pytest.approx((2.5, 3.18245 * math.sqrt(5 / 3) / 2), rel=1e-4)


def losses_of(levels, noise=0.0, pictures=20):
    """Return rank -> losses: pictures of very different difficulty, ranks at levels, and noise of each pair."""
    rng = random.Random(0)
    difficulty = [rng.uniform(0, 1) for _ in range(pictures)]
    return {
        rank: {str(n): [hard + level + rng.gauss(0, noise)] * 2 for n, hard in enumerate(difficulty)}
        for rank, level in levels.items()
    }


@pytest.mark.parametrize(
    ("levels", "noise", "choice", "best", "words"),
    [
        ({0: 0.2, 4: 0.1, 8: 0.01, 12: 0.0, 16: 0.001}, 0.001, 12, 12, "every smaller rank loses more than the noise"),
        ({0: 0.2, 4: 0.1, 8: 0.01, 12: 0.0, 16: 0.001}, 0.03, 8, 12, "the smallest whose loss is within the noise"),
        ({0: 0.2, 4: 0.0, 8: 0.01}, 0.001, 4, 4, "the smallest one has the lowest loss"),
        ({0: 0.0, 4: 0.1, 8: 0.2}, 0.001, 4, 4, "nothing shows that the training helped"),
    ],
)
def test_the_smallest_rank_within_the_noise_of_the_best_is_chosen(levels, noise, choice, best, words):
    """Although pictures differ far more than ranks do: the noise of the pairs decides."""
    results = compare_ranks(losses_of(levels, noise), {rank: rank * 1000 for rank in levels if rank})
    assert (results.choice.rank, results.best.rank) == (choice, best)
    assert words in results.sentence()
    assert results.rows[0].loss.half > 0.1
    gains = [row.gain for row in results.rows]
    assert gains[0] in (0.0, None)


@pytest.mark.parametrize(("pictures", "is_doubtful"), [(3, True), (7, True), (8, False), (20, False)])
def test_few_pictures_are_a_reason_for_caution(pictures, is_doubtful):
    results = compare_ranks(losses_of({0: 0.2, 4: 0.1, 8: 0.0}, 0.01, pictures), {4: 1, 8: 2})
    assert bool(results.caution) is is_doubtful
    assert results.record()["caution"] == results.caution
    title = draw_ranks(results).axes[0].get_title(loc="left")
    assert ("\nCaution: " in title) is is_doubtful
    if is_doubtful:
        assert f"{pictures} pictures are few to choose a rank by" in title


def test_the_table_has_a_title_for_each_column_and_a_row_for_each_rank():
    results = compare_ranks(losses_of({0: 0.2, 4: 0.1, 8: 0.0}), {4: 1_000_000, 8: 2_000_000})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in results.table()]
    assert rows[0] == [
        *("", "file size", "loss", "loss above the best", "as good as the best?", "share of the best improvement"),
    ]
    assert set(rows[1]) == {"---"}
    assert {len(row) for row in rows} == {6}
    assert [(row[0], row[1], row[4], row[5]) for row in rows[2:]] == [
        ("base model", "", "no", "0.0%"),
        ("rank 4", "1.00 MB", "no", "50.0%"),
        ("rank 8", "2.00 MB", "best", "100.0%"),
    ]


# ---- the chart ----------------------------------------------------------------------------------------------


def chart_of(results):
    """Return axes, label -> x and y of what is drawn, and the ends of the intervals."""
    axes = draw_ranks(results).axes[0]
    drawn = {str(line.get_label()): np.array(line.get_xydata()) for line in axes.lines}
    (bars,) = (found for found in axes.collections if isinstance(found, LineCollection))
    return axes, drawn, np.array(bars.get_segments())


def test_the_chart_has_every_rank_its_interval_and_the_choice():
    results = compare_ranks(losses_of({0: 0.06, 4: 0.03, 8: 0.01, 12: 0.0, 16: 0.001}, 0.02), dict.fromkeys(RANKS, 1))
    axes, drawn, bars = chart_of(results)
    (line,) = (found for label, found in drawn.items() if label.startswith("loss of 20 pictures"))
    assert line.tolist() == [[row.rank, row.loss.mean] for row in results.ranks]
    for row, bar in zip(results.ranks, bars, strict=True):
        assert bar[:, 1] == pytest.approx([row.loss.mean - row.to_best.half, row.loss.mean + row.to_best.half])
    (chosen,) = (found for label, found in drawn.items() if label.startswith(f"rank {results.choice.rank}, the one"))
    assert chosen.tolist() == [[results.choice.rank, results.choice.loss.mean]]
    (best,) = (found for label, found in drawn.items() if label == f"lowest loss: rank {results.best.rank}")
    assert best.tolist() == [[results.best.rank, results.best.loss.mean]]
    base = next(found for label, found in drawn.items() if label.startswith("base model: "))
    assert set(base[:, 1]) == {results.rows[0].loss.mean}
    low, high = axes.get_ylim()
    assert low < bars[..., 1].min() < bars[..., 1].max() < high
    assert low < results.rows[0].loss.mean < high


def test_a_base_model_far_away_is_named_and_leaves_the_ranks_their_room():
    results = compare_ranks(losses_of({0: 5.0, 4: 0.03, 8: 0.0}, 0.001), {4: 1, 8: 2})
    axes, drawn, _ = chart_of(results)
    assert axes.get_ylim()[1] < results.rows[0].loss.mean
    label = f"base model: {results.rows[0].loss.mean:.5g}, above what is shown"
    assert drawn[label].size == 0


def test_the_sizes_of_the_files_are_above_their_ranks():
    sizes = {rank: rank * 1_500_000 for rank in range(1, 129)}
    results = compare_ranks(losses_of({0: 0.2} | {rank: 0.1 / rank for rank in sizes}, 0.001), sizes)
    figure = draw_ranks(results)
    (axes,) = figure.axes
    (above,) = axes.child_axes
    ranks = axes.get_xticks().tolist()
    assert ranks == list(range(8, 129, 8))
    assert above.get_xticks().tolist() == ranks
    texts = [label.get_text() for label in above.get_xticklabels()]
    assert texts == [f"{rank * 1.5:.3g}" for rank in ranks]


def test_equal_losses_are_no_obstacle():
    results = compare_ranks(losses_of({0: 0.0, 4: 0.0, 8: 0.0}), {4: 1, 8: 2})
    assert results.choice.rank == 4
    low, high = draw_ranks(results).axes[0].get_ylim()
    assert low < results.choice.loss.mean < high


def test_the_sheet_has_the_ranks_that_matter():
    assert rank_report.ranks_to_draw([4, 8], {4, 8}) == [0, 4, 8]
    shown = rank_report.ranks_to_draw(list(range(1, 129)), {3, 77})
    assert len(shown) <= rank_report.MOST_COLUMNS
    assert {0, 1, 3, 77, 128} <= set(shown)


# ---- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": None}, "--model is missing"),
        ({"model": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"unit": 3}, "--unit 3 does not divide the rank of"),
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"pretrained_model_name_or_path": "gone"}, "gone does not exist"),
        ({"train_data_dir": None}, "no training data"),
        ({"resolution": None}, "--resolution is missing"),
        ({"sample_prompts": "gone.txt"}, "--sample_prompts: gone.txt does not exist"),
        ({"timesteps": 0}, "--timesteps must be at least 1"),
        ({"draws": "x"}, "--draws must be a whole number"),
        ({"min_timestep": 900, "max_timestep": 100}, "--min_timestep 900 must be below"),
        ({"max_validation_steps": 1}, "at least 2 pictures are needed"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(trained, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(
        "library.training.measure.picture_losses.open_base", lambda *a, **k: pytest.fail("a model was loaded")
    )
    with pytest.raises(UserError) as caught:
        dylora_report.main(arguments(trained, tmp_path / "r", **more))
    assert message in str(caught.value)


def test_files_of_other_kinds_are_told(trained, tmp_path):
    path = tmp_path / "x.safetensors"
    down, up = ".lora_down.weight", ".lora_up.weight"
    for tensors, message in (
        ({"unet.weight": torch.ones(2)}, "is no LoRA file"),
        ({f"a{down}": torch.ones(8, 2), f"a{up}": torch.ones(2, 8)}, "--unit is missing"),
        ({f"a{down}": torch.ones(8, 2), f"b{down}": torch.ones(4, 2)}, "has modules of the ranks [4, 8]"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError) as caught:
            dylora_report.main(arguments(trained, tmp_path / "r", model=path))
        assert message in str(caught.value)


def test_the_script_runs_from_any_folder(tmp_path):
    words = ["--model", "gone.safetensors", "--resolution", 64, "--train_data_dir", "."]
    done = python(ROOT / "tools" / "dylora_report.py", *words, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "dylora_report.py: error: --model: gone.safetensors does not exist" in done.stderr
    assert "Traceback" not in done.stderr
