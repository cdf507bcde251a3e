"""The commands that people want after a run: draw with its network, merge it, train it on; go on after a stop."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from library.config.options import all_options, flag_values
from library.config.prompts import Prompt
from library.config.train import TrainConfig
from library.config.values import latent_side
from library.data.records import Dataset
from library.shell import command_line
from library.training.record.run_files import RunFiles, state_folder

PICTURES = 4  # drawn by the command that draws
LONGEST = 200  # letters of a prompt in a command


def commands_after_end(
    config: TrainConfig, datasets: Sequence[Dataset], prompts: Sequence[Prompt], num_steps: int, num_processes: int
) -> dict[str, str]:
    """Return title -> command for what comes after a finished run of so many steps."""
    return {
        "draw with it": draw_command(config, datasets, prompts),
        "merge it into the model": merge_command(config),
        f"train it on{keys_to_give(config)}": train_on_command(config, num_steps, num_processes),
    }


def draw_command(config: TrainConfig, datasets: Sequence[Dataset], prompts: Sequence[Prompt]) -> str:
    """Return the command that draws pictures with the network: of the first preview's prompt, or of a caption."""
    model, files = config.model, RunFiles(config.saving)
    networks = [*(config.network.base_weights or ()), files.network]
    size = datasets[0].options.size
    text, width, height = caption_of(datasets), *size
    if prompts:
        text, width, height = prompts[0].prompt, prompts[0].width or size[0], prompts[0].height or size[1]
    precision = {"no": (), "fp16": ("--fp16",), "bf16": ("--bf16",)}[config.precision.mixed_precision]
    words = [
        *("--ckpt", model.pretrained_model_name_or_path),
        *(("--vae", model.vae) if model.vae else ()),
        *(("--v_parameterization",) if model.v_parameterization else ()),
        *(("--zero_terminal_snr",) if model.v_parameterization and config.loss.zero_terminal_snr else ()),
        *("--network_module", *[config.network.network_module] * len(networks)),
        *("--network_weights", *networks),
        *(("--network_mul", *strengths(config)) if len(networks) > 1 else ()),
        *("--prompt", " ".join(text.split())[:LONGEST] or "a picture"),
        *("--W", latent_side(width), "--H", latent_side(height), "--images_per_prompt", PICTURES, *precision),
        *("--outdir", files.network.with_name(f"{files.network.stem}-pictures")),
    ]
    return command_line("gen_img_diffusers.py", words)


def caption_of(datasets: Sequence[Dataset]) -> str:
    """Return the first caption of the pictures that are trained on; "" if none has one."""
    records = (record for dataset in datasets for record in dataset.records if not record.subset.is_reg)
    return next((text for record in records for text in record.caption if text.strip()), "")


def strengths(config: TrainConfig) -> list[str]:
    """Return the strengths of the files that the network was trained over, and its own."""
    given = config.network.base_weights_multiplier or ()
    rest = len(config.network.base_weights or ()) - len(given)
    return [f"{strength:g}" for strength in (*given, *[1.0] * rest, 1.0)]


def merge_command(config: TrainConfig) -> str:
    """Return the command that merges the network, and what it was trained over, into the base model."""
    model, network = Path(config.model.pretrained_model_name_or_path), RunFiles(config.saving).network
    suffix = ".safetensors" if model.suffix.lower() in (".safetensors", ".ckpt", ".pt") else ""  # else it is a folder
    words = [
        *("--sd_model", model),
        *("--models", *(config.network.base_weights or ()), network),
        *("--ratios", *strengths(config)),
        *("--save_to", network.with_name(f"{network.stem}-merged{suffix}")),
    ]
    return command_line("networks/merge_lora.py", words)


def train_on_command(config: TrainConfig, num_steps: int, num_processes: int) -> str:
    """Return the command that trains for as many steps again: from the state, or with a new optimizer."""
    files, state = RunFiles(config.saving), config.state
    if state.save_state or state.save_state_on_train_end:
        words = [*resuming(config, files.network, num_steps), "--max_train_steps", 2 * num_steps]
        return train_command(config, words, num_processes)
    number = re.fullmatch(r"(.*)-(\d{1,3})", files.network.stem)
    name = f"{number[1]}-{int(number[2]) + 1}" if number else f"{files.network.stem}-2"
    words = ["--network_weights", files.network, "--output_name", name, "--seed", (config.run.seed or 0) + 1]
    words += ["--resume="] if state.resume else []
    words += ["--initial_step", 0] if began_later(config) else []
    return train_command(config, words, num_processes)


def go_on_command(config: TrainConfig, network: Path, num_steps: int, num_processes: int) -> str:
    """Return the command that goes on with a run that was stopped after a step, from the state of a network."""
    return train_command(config, resuming(config, network, num_steps), num_processes)


def resuming(config: TrainConfig, network: Path, num_steps: int) -> list[object]:
    """Return the options by which a run goes on after a step, also if the record names the step at which it began."""
    return ["--resume", state_folder(network), *(("--initial_step", num_steps) if began_later(config) else ())]


def began_later(config: TrainConfig) -> bool:
    """Return whether the run was told at which step to begin."""
    return config.state.initial_step is not None or config.state.initial_epoch is not None


def train_command(config: TrainConfig, words: Iterable[object], num_processes: int) -> str:
    """Return the command that trains with the record of this run and further options."""
    start = ("python",) if num_processes == 1 else ("accelerate", "launch", "--num_processes", str(num_processes))
    options = RunFiles(config.saving).options
    return command_line("train_network.py", ["--config_file", options, *words], start=start)


def keys_to_give(config: TrainConfig) -> str:
    """Return which options of the run are not in its record because they are secret, as a remark; "" if none."""
    values = flag_values(config)
    names = [entry.label for flag, entry in all_options(TrainConfig).items() if entry.spec.secret and values[flag]]
    return f" (with {' and '.join(names)} again)" if names else ""
