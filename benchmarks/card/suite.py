"""The suite's own scripts, run for the report: command lines, models, pictures, and what a run leaves."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from words import words

from benchmarks.card.rows import NotHere, Value
from benchmarks.card.running import NO_CARD, python
from benchmarks.card.setting import Setting, forget_peak, free, peaks, wait_for_device

if TYPE_CHECKING:
    from library.training.run.events import Event, Moment

ROOT = Path(__file__).resolve().parents[2]
POCKET = {"sd1": ROOT / "examples" / "pocket_model", "sdxl": ROOT / "examples" / "pocket_xl"}
FULL_SIDE = {"sd1": 512, "sdxl": 1024}  # pixels
TINY_SIDE = 64
RANK = 32

Options = Mapping[str, object]


def need_options(root: type, options: Options) -> None:
    """Raise NotHere for an option that this checkout does not have."""
    from library.config.options import root_options

    known = {name for entry in root_options(root).values() for name in (entry.flag, *entry.spec.aliases)}
    missing = sorted(set(options) - known)
    if missing:
        raise NotHere("this checkout has no " + ", ".join(f"--{name}" for name in missing))


# ---- models and pictures -----------------------------------------------------------------------------------------


def full_model(setting: Setting, family: str) -> Path:
    """Return a checkpoint of the published sizes with random weights in fp16, or a tiny one; written if need be."""
    path = setting.work / f"{'tiny' if setting.tiny else 'random'}-{family}.safetensors"
    if not path.exists():
        if setting.tiny:
            import tiny

            tiny.write_checkpoint(tiny.make_models(family), family, path)
        else:
            from benchmarks.start_up import write_model

            write_model(path, family)
    return path


def noise_pictures(setting: Setting, number: int) -> Path:
    """Return a folder of training with pictures and captions."""
    folder = setting.work / f"noise-{number}"
    if not folder.exists():
        from benchmarks.start_up import write_pictures

        temporary = setting.work / f"noise-{number}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        for picture in sorted(write_pictures(temporary / "1_x", number).iterdir()):
            picture.with_suffix(".txt").write_text(f"a photo of {picture.stem}, noise, colours", encoding="utf-8")
        temporary.rename(folder)
    return folder


def small_pictures(setting: Setting, number: int = 12) -> Path:
    """Return a folder of training with small drawings and captions, which the pocket models understand."""
    folder = setting.work / f"drawings-{number}"
    if not folder.exists():
        temporary = setting.work / f"drawings-{number}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "1_x").mkdir(parents=True)
        for picture in sorted((ROOT / "examples" / "unicorn" / "images").glob("*.png"))[:number]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, temporary / "1_x")
        temporary.rename(folder)
    return folder


# ---- training ----------------------------------------------------------------------------------------------------


def small_training(setting: Setting, family: str, name: str, **more: object) -> dict[str, object]:
    """Return the options of a training of a pocket model, the same on every device."""
    options: dict[str, object] = {
        "pretrained_model_name_or_path": POCKET[family],
        "train_data_dir": small_pictures(setting),
        "caption_extension": ".txt",
        "resolution": TINY_SIDE if setting.tiny else 128,
        "train_batch_size": 2,
        "output_dir": setting.folder("trained"),
        "output_name": name,
        "overwrite": True,  # of a run before, with another setting
        "network_module": "networks.lora",
        "network_dim": 4,
        "learning_rate": "1e-3",
        "max_train_steps": setting.steps(20),
        "max_data_loader_n_workers": 0,
        "seed": 7,
        "cache_latents": True,
        "console_log_level": "WARNING",
    }
    return options | more


def full_training(setting: Setting, family: str, name: str, batch: int, **more: object) -> dict[str, object]:
    """Return the options of a training of a model of the published size, without its number of steps.

    SD 1.x trains both parts, SDXL the U-Net with captions encoded ahead: as most people do.
    """
    options: dict[str, object] = {
        "pretrained_model_name_or_path": full_model(setting, family),
        "train_data_dir": noise_pictures(setting, 8),
        "caption_extension": ".txt",
        "resolution": TINY_SIDE if setting.tiny else FULL_SIDE[family],
        "train_batch_size": batch,
        "output_dir": setting.folder("trained"),
        "output_name": name,
        "overwrite": True,  # of a run before, with another setting
        "network_module": "networks.lora",
        "network_dim": 4 if setting.tiny else RANK,
        "network_alpha": 1,
        "learning_rate": "1e-5",
        "seed": 1,
        "max_data_loader_n_workers": 2 if setting.on_card else 0,
        "cache_latents": True,
        "console_log_level": "WARNING",
    }
    if family == "sdxl":
        options |= {"network_train_unet_only": True, "cache_text_encoder_outputs": True}
    return options | more


def network_file(options: Options) -> Path:
    """Return the file that a run with options writes."""
    return Path(str(options["output_dir"])) / f"{options['output_name']}.safetensors"


def losses(options: Options) -> list[float]:
    """Return the losses of the steps of a run, as it logged them; one that was left out is infinite."""
    path = Path(str(options["output_dir"])) / f"{options['output_name']}-metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss/current" in line or "left_out" in line]
    return [line.get("loss/current", float("inf")) for line in steps]


def train(setting: Setting, options: Options, events: Sequence[Event] = ()) -> list[float]:
    """Train in this process as the script does, with further events; return the losses."""
    import train_network
    from library.config.train import TrainConfig, check, parse_train_config
    from library.data.records import load_datasets
    from library.errors import Problems
    from library.training import recipe

    need_options(TrainConfig, options)
    free(setting)
    problems = Problems()
    config = parse_train_config(words(**options), problems)
    check(config, problems)
    problems.raise_if_any()
    prompts = train_network.load_prompts(config.preview)
    recipe.train(config, load_datasets(config), prompts, further_events=list(events))
    return losses(options)


def draw(setting: Setting, options: Options) -> list[Path]:
    """Draw in this process as the script does; return the pictures."""
    import gen_img_diffusers
    from library.config.generation import GenerateConfig

    need_options(GenerateConfig, options)
    free(setting)
    folder = Path(str(options["outdir"]))
    shutil.rmtree(folder, ignore_errors=True)
    device = {"device": setting.device}
    code = gen_img_diffusers.main(words(**options, **device, sequential_file_name=True))
    if code:
        raise RuntimeError(f"gen_img_diffusers.py ended with {code}")
    return sorted(folder.glob("*.png"))


class Started:
    """A script of the suite in a process of its own; on_cpu: one that sees no card, while this process uses it."""

    def __init__(self, setting: Setting, script: str, options: Options, *, on_cpu: bool) -> None:
        from library.config.train import TrainConfig

        if script == "train_network.py":
            need_options(TrainConfig, options)
        self._log = setting.folder("logs") / f"{options.get('output_name', Path(script).stem)}.log"
        with self._log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                python(ROOT / script, *words(**options)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | (NO_CARD if on_cpu else {}),
                cwd=ROOT,
            )
        self._script, self.options = script, options
        atexit.register(self._process.kill)  # it does not outlive this process, whatever happens

    def wait(self) -> None:
        """Wait for its end; raises RuntimeError with its last line if it did not end well."""
        code = self._process.wait()
        if code:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            print(text)  # for the log of the part
            raise RuntimeError(f"{self._script} ended with {code}: {(text.strip() or 'no output').splitlines()[-1]}")


# ---- timing ------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """What a timed run shows."""

    seconds: float  # a step
    peaks: dict[str, float | None]
    losses: list[float]

    def values(self, batch: int) -> dict[str, Value]:
        """Return the columns of a table."""
        return {"batch": batch, "steps/s": 1 / self.seconds, "pictures/s": batch / self.seconds, **self.peaks}


class Windows(NamedTuple):
    """Steps before the clock is read, and then windows of several steps, between which the device is waited for."""

    warm_up: int
    number: int
    steps: int

    @property
    def total(self) -> int:
        return self.warm_up + self.number * self.steps


def windows_of(setting: Setting) -> Windows:
    """Return how long a run is timed."""
    if setting.tiny:
        return Windows(1, 1, 2)
    return Windows(5, 3, 5) if setting.quick else Windows(6, 5, 8)


class Clock:
    """Notes the time at the ends of the windows only: a wait after each step would take the host's lead from it."""

    def __init__(self, setting: Setting, windows: Windows) -> None:
        self._setting, self._windows = setting, windows
        self.times: list[float] = []

    def note(self, moment: Moment) -> None:
        """Note the time if a window ends, or the warm-up."""
        self.note_step(moment.progress.step)

    def note_step(self, step: int) -> None:
        """Note the time if a window ends with a step (from 1)."""
        timed = step - self._windows.warm_up
        if timed < 0 or timed % self._windows.steps:
            return
        wait_for_device(self._setting)
        self.times.append(time.perf_counter())
        if timed == 0:
            forget_peak(self._setting)

    @property
    def seconds(self) -> float:
        """The median over the windows of the seconds of a step."""
        import statistics

        pairs = zip(self.times, self.times[1:], strict=False)
        return statistics.median((end - start) / self._windows.steps for start, end in pairs)


def timed_training(setting: Setting, options: Options) -> Timed:
    """Train, and time the steps; the options lack only their number."""
    from library.training.run.events import Event, Every, Needs

    windows = windows_of(setting)
    clock = Clock(setting, windows)
    found: list[dict[str, float | None]] = []

    def note(moment: Moment) -> None:
        clock.note(moment)
        if moment.progress.step == windows.total:
            found.append(peaks(setting))

    trace = train(
        setting, {**options, "max_train_steps": windows.total}, [Event("clock", Every(1), note, Needs.NOTHING)]
    )
    return Timed(clock.seconds, found[0], trace)


def timed_step(setting: Setting, steps: Iterator[object]) -> Timed:
    """Time what makes a step each time that it is asked for the next one."""
    windows = windows_of(setting)
    clock = Clock(setting, windows)
    for number in range(1, windows.total + 1):
        next(steps)
        clock.note_step(number)
    return Timed(clock.seconds, peaks(setting), [])


def prepare_paths() -> None:
    """Make the suite, and the tiny models of its tests, importable."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
