"""What can be wrong with the options of gen_img_diffusers.py, found before torch is imported."""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from library.config.generation import (
    ControlConfig,
    GenerateConfig,
    ImageConfig,
    NetworksConfig,
    PromptConfig,
)
from library.config.kinds import why_not
from library.config.prompts import PromptLine
from library.config.tool_files import check_place
from library.errors import Problems, UserError
from library.file_kinds import weight_format
from library.generation import a1111
from library.generation.dynamic_prompts import num_combinations
from library.generation.grid import read_axes
from library.generation.init_images import check_images, list_images, read_preparation
from library.generation.recorded import Recorded, read_recorded
from library.generation.requests import check_side, read_line, read_lines
from library.sampling.samplers import check_sampler

logger = logging.getLogger(__name__)


def with_checkpoint(config: GenerateConfig) -> GenerateConfig:
    """Return the configuration with a pattern in --ckpt replaced by the one file that fits it.

    Raises UserError if not one file fits.
    """
    path = config.checkpoint.ckpt
    if path.exists() or not glob.has_magic(str(path)):
        return config
    found = sorted(glob.glob(str(path)))  # noqa: PTH207 - a pattern may begin at the root
    if len(found) != 1:
        raise UserError(f"--ckpt: {len(found)} files fit {path}: name one")
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, ckpt=Path(found[0])))


def check(config: GenerateConfig, problems: Problems) -> None:
    """Add to problems what does not fit, before anything is loaded."""
    problems.run(check_model, config, problems)
    problems.run(check_prompts, config, problems)
    problems.run(check_init_images, config.images, problems)
    problems.run(check_control, config.control, problems)
    problems.run(check_networks, config.networks, problems)


def check_model(config: GenerateConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the options of model and sizes."""
    drawing, speed = config.drawing, config.speed
    for flag, side in (("--W", drawing.W), ("--H", drawing.H)):
        if side is not None:
            problems.run(check_side, side, flag)
    if config.output.outdir.exists() and not config.output.outdir.is_dir():
        problems.add(f"--outdir: {config.output.outdir} is not a folder")
    else:
        problems.run(check_place, "--outdir", config.output.outdir / "picture.png")
    if speed.fp16 and speed.bf16:
        problems.add("--fp16 and --bf16 were both given: leave one out")


def check_prompts(config: GenerateConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the options of prompts, sampler and grid."""
    prompts = config.prompts
    if prompts.interactive and (prompts.prompt or prompts.from_file or prompts.from_picture):
        problems.add("--interactive does not go with --prompt, --from_file and --from_picture")
    if prompts.interactive and config.output.grid:
        problems.add("--grid does not go with --interactive")
    check_grid(config, problems)
    problems.run(read_axes, config.output.grid or ())
    problems.run(check_sampler, config.drawing.sampler)


def check_grid(config: GenerateConfig, problems: Problems) -> None:
    """Add to problems which axes of --grid would change nothing."""
    names = [text.partition("=")[0] for text in config.output.grid or ()]
    networks, images = config.networks, config.images
    if "am" in names and (not networks.network_weights or networks.network_merge):
        problems.add("--grid: am is the strength of networks, and there are none that are not merged")
    if "strength" in names and images.image_path is None and images.highres_fix_scale is None:
        problems.add("--grid: strength is for pictures that begin with one: give --image_path or --highres_fix_scale")


def check_init_images(images: ImageConfig, problems: Problems) -> None:
    """Add to problems what is wrong with images to begin with."""
    if images.mask_path is not None and images.image_path is None:
        problems.add("--mask_path needs --image_path: the picture of which a part is drawn anew")
    for flag, path in (("--image_path", images.image_path), ("--mask_path", images.mask_path)):
        if path is not None:
            problems.run(check_images, flag, path)


def check_control(control: ControlConfig, problems: Problems) -> None:
    """Add to problems what is wrong with ControlNets and embeddings."""
    nets, guides = control.control_net_models or (), control.guide_image_path or ()
    if guides and not nets:
        problems.add("--guide_image_path is for ControlNets: give --control_net_models")
    elif len(nets) != len(guides):
        problems.add(f"--guide_image_path must name a picture for each of {len(nets)} ControlNets, got {len(guides)}")
    for path in guides:
        problems.run(check_images, "--guide_image_path", path)
    for path in control.textual_inversion_embeddings or ():
        if not path.exists():
            problems.add(f"--textual_inversion_embeddings: {path} does not exist, and nothing is downloaded")
    for path in (*nets, *(control.textual_inversion_embeddings or ())):
        if path.is_file():
            problems.run(weight_format, path)
    for text in control.control_net_preps or ():
        problems.run(read_preparation, text)


def check_networks(networks: NetworksConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the networks."""
    modules, files = networks.network_module or (), networks.network_weights or ()
    multipliers, arguments = networks.network_mul or (), networks.network_args or ()
    if len(modules) != len(files):
        problems.add(
            f"--network_module and --network_weights must name as many networks, got {len(modules)} and {len(files)}"
        )
    for flag, given in (("--network_mul", multipliers), ("--network_args", arguments)):
        if len(given) > len(files):
            problems.add(f"{flag} has {len(given)} values for {len(files)} networks")
    for name in modules:
        if importlib.util.find_spec(name if name.startswith("networks.") else name.split(".")[0]) is None:
            problems.add(
                f"--network_module {name}: there is no such module; networks.lora reads files of most trainers"
            )
    for path in files:
        if not path.is_file():
            problems.add(f"--network_weights: {why_not(path, 'a file')}")
        else:
            problems.run(weight_format, path)


def load_lines(prompts: PromptConfig) -> list[PromptLine]:
    """Return the prompt lines of the options."""
    if prompts.from_file is not None:
        return read_lines(prompts.from_file)
    return [] if prompts.prompt is None else [read_line(prompts.prompt, "--prompt")]


def warn_of_strengths(networks: NetworksConfig, lines: Sequence[PromptLine]) -> None:
    """Warn of strengths in prompts that no network has."""
    number = len(networks.network_weights or ())
    number = 0 if networks.network_merge else max(0, number - (networks.network_merge_n_models or 0))
    for line in lines:
        strengths = line.multipliers or ()
        if len(strengths) > number:
            logger.warning("%s: --am has %d values, networks that can change: %d", line.place, len(strengths), number)


def warn_of_tags(lines: Sequence[PromptLine]) -> None:
    """Warn of what other programs do not read as mere words: networks, and words that change during the sampling."""
    for line in lines:
        negative = line.negative_prompt or ""
        for text in (line.prompt, negative):
            tags = a1111.tags_in(text)
            if tags:
                logger.warning(
                    "%s: %s is read as words: networks are --network_weights, their strengths --network_mul and --am",
                    line.place,
                    ", ".join(tags),
                )
        words = a1111.only_words_here(line.prompt, negative)
        if words:
            logger.warning("%s: %s is read as words, not as in AUTOMATIC1111", line.place, ", ".join(words))


def warn_of_equal_pictures(config: GenerateConfig, lines: Sequence[PromptLine]) -> None:
    """Warn of prompts whose pictures will be equal, since they have one seed and begin with nothing that differs."""
    if config.images.image_path is not None or config.control.guide_image_path or config.output.grid:
        return
    prompts = config.prompts
    for line in lines:
        if line.seeds:
            number, seeds = (
                prompts.images_per_prompt * prompts.n_iter,
                len(set(line.seeds[: prompts.images_per_prompt])),
            )
        else:  # one for each repeat
            number, seeds = prompts.images_per_prompt, 1 if config.drawing.iter_same_seed else prompts.images_per_prompt
        if seeds < number and num_combinations(line.prompt) is None:
            why = "--d has" if line.seeds else "--iter_same_seed gives"
            given = "one seed" if seeds == 1 else f"{seeds} seeds"
            logger.warning("%s: %s %s for %d pictures, so that some will be equal", line.place, why, given, number)


def load_recorded(prompts: PromptConfig, images: ImageConfig, seed: int | None) -> list[Recorded]:
    """Return what pictures say of themselves: of --from_picture, or of --image_path where there is no prompt.

    seed is for pictures of which it is not known.
    """
    given = prompts.from_picture or ()
    has_prompts = prompts.prompt is not None or prompts.from_file is not None or prompts.interactive or given
    if not has_prompts and images.image_path is not None and images.image_path.exists():
        given = list_images("--image_path", images.image_path).files
    problems = Problems()
    recorded = [record for path in given if (record := problems.run(read_recorded, path, seed)) is not None]
    problems.raise_if_any()
    for picture, record in zip(given, recorded, strict=True):
        warn_of_settings(picture, record, images)
    for record in recorded:
        for name, flag, path in (
            (record.begins_with, "--image_path", images.image_path),
            (record.mask, "--mask_path", images.mask_path),
        ):
            if name is not None and path is None:
                raise UserError(f"--from_picture: a picture was drawn with {name}, which it does not hold: give {flag}")
    return recorded


def warn_of_settings(path: Path, record: Recorded, images: ImageConfig) -> None:
    """Warn of what a picture's text says and what is not drawn so."""
    left = list(record.left)
    begins = images.image_path is not None or images.highres_fix_scale is not None or record.request.highres is not None
    if record.request.strength is not None and not begins and record.begins_with is None:
        left.append(f"Denoising strength: {record.request.strength:g}")
    for sentence in record.told:
        logger.warning("%s: %s", path, sentence)
    if left:
        logger.warning("%s: the picture will differ, for this is not used: %s", path, ", ".join(left))
