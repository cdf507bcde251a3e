"""Draw pictures with Stable Diffusion 1.x or 2.x and networks trained on it.

python gen_img_diffusers.py --ckpt model.safetensors --prompt "a photo of a cat --n blurry --w 768"
    --network_module networks.lora --network_weights mine.safetensors --network_mul 0.8
    --images_per_prompt 8 --batch_size 4 --steps 30 --sampler euler_a --fp16 --outdir outputs

python gen_img_diffusers.py --ckpt examples/pocket_model --prompt "a unicorn --w 128 --h 128" --outdir output/pictures
"""

from __future__ import annotations

import glob
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.generation import GenerateConfig
from library.config.options import parse
from library.config.retired import GENERATION
from library.config.tool_files import place_problems
from library.errors import Problems, UserError
from library.logs import choose_log_lines, run_script

if TYPE_CHECKING:
    from library.generation.infotext import Recorded
    from library.sampling.requests import Line

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(GenerateConfig, argv, description=__doc__, retired=GENERATION)
    choose_log_lines(config.console.console_log_level, config.console.console_log_file)
    config = with_checkpoint(config)
    problems = Problems()
    with problems:
        check(config)
    lines: list[Line] = []
    recorded: list[Recorded] = []
    with problems:
        lines = load_lines(config)
    with problems:
        recorded = load_recorded(config)
    problems.raise_if_any()
    warn_of_strengths(config, lines)
    if not (lines or recorded or config.prompts.interactive):
        raise UserError("what is to be drawn is missing: --prompt, --from_file, --from_picture or --interactive")

    warn_of_idle(config)
    # Torch takes seconds to import; up to here every mistake has been answered at once.
    from library.generation.recipe import generate

    generate(config, lines, recorded)
    return 0


def with_checkpoint(config: GenerateConfig) -> GenerateConfig:
    """Return the configuration with a pattern in --ckpt replaced by the one file that fits it."""
    import dataclasses

    path = config.checkpoint.ckpt
    if path is None or path.exists() or not glob.has_magic(str(path)):
        return config
    found = sorted(glob.glob(str(path)))  # noqa: PTH207 - a pattern may begin at the root
    if len(found) != 1:
        raise UserError(f"--ckpt: {len(found)} files fit {path}: name one")
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, ckpt=Path(found[0])))


def check(config: GenerateConfig) -> None:
    """Raise UserError that lists what is missing or does not fit, before anything is loaded."""
    checks = (model_problems, prompt_problems, image_problems, network_problems)
    lines = [line for problems_of in checks for line in problems_of(config)]
    if lines:
        raise UserError("\n".join(lines))


def model_problems(config: GenerateConfig) -> Iterator[str]:
    """Yield what is wrong with the options of model and sizes."""
    checkpoint, drawing, speed = config.checkpoint, config.drawing, config.speed
    if checkpoint.ckpt is None:
        yield "--ckpt is missing: the base model, a file or a Diffusers folder"
    elif not checkpoint.ckpt.exists():
        yield f"--ckpt: {checkpoint.ckpt} does not exist, and nothing is downloaded; name a file or a Diffusers folder"
    if checkpoint.vae is not None and not checkpoint.vae.exists():
        yield f"--vae: {checkpoint.vae} does not exist, and nothing is downloaded"
    for flag, side in (("--W", drawing.W), ("--H", drawing.H)):
        if side is not None and side % 8:
            yield f"{flag} must be a multiple of 8, got {side}; the next are {side // 8 * 8} and {side // 8 * 8 + 8}"
    if config.output.outdir.exists() and not config.output.outdir.is_dir():
        yield f"--outdir: {config.output.outdir} is not a folder"
    else:
        yield from place_problems("--outdir", config.output.outdir / "picture.png")
    if speed.fp16 and speed.bf16:
        yield "--fp16 and --bf16 were both given: leave one out"


def prompt_problems(config: GenerateConfig) -> Iterator[str]:
    """Yield what is wrong with the options of prompts, sampler and grid."""
    from library.generation.grid import read_axes
    from library.sampling.samplers import check_sampler

    prompts = config.prompts
    if prompts.interactive and (prompts.prompt or prompts.from_file or prompts.from_picture):
        yield "--interactive does not go with --prompt, --from_file and --from_picture"
    if prompts.interactive and config.output.grid:
        yield "--grid does not go with --interactive"
    yield from grid_problems(config)
    for checked, value in ((read_axes, config.output.grid or ()), (check_sampler, config.drawing.sampler)):
        try:
            checked(value)
        except UserError as error:
            yield str(error)


def grid_problems(config: GenerateConfig) -> Iterator[str]:
    """Yield which axes of --grid would change nothing."""
    names = [text.partition("=")[0] for text in config.output.grid or ()]
    networks, images = config.networks, config.images
    if "am" in names and (not networks.network_weights or networks.network_merge):
        yield "--grid: am is the strength of networks, and there are none that are not merged"
    if "strength" in names and images.image_path is None and images.highres_fix_scale is None:
        yield "--grid: strength is for pictures that begin with one: give --image_path or --highres_fix_scale"


def image_problems(config: GenerateConfig) -> Iterator[str]:
    """Yield what is wrong with pictures to begin with, ControlNets and embeddings."""
    from library.generation.starts import check_pictures, list_of

    images, control = config.images, config.control
    if images.mask_path is not None and images.image_path is None:
        yield "--mask_path needs --image_path: the picture of which a part is drawn anew"
    nets, guides = control.control_net_models or (), control.guide_image_path or ()
    if guides and not nets:
        yield "--guide_image_path is for ControlNets: give --control_net_models"
    elif len(nets) != len(guides):
        yield f"--guide_image_path must name a picture for each of {len(nets)} ControlNets, got {len(guides)}"
    for flag, path in (
        ("--image_path", images.image_path),
        ("--mask_path", images.mask_path),
        *(("--guide_image_path", path) for path in guides),
    ):
        try:
            check_pictures(list_of(flag, path))
        except UserError as error:
            yield str(error)
    for flag, paths in (
        ("--control_net_models", nets),
        ("--textual_inversion_embeddings", control.textual_inversion_embeddings or ()),
    ):
        for path in paths:
            if not path.exists():
                yield f"{flag}: {path} does not exist, and nothing is downloaded"
    yield from preparation_problems(control.control_net_preps or ())


def preparation_problems(texts: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with --control_net_preps."""
    from library.generation.starts import read_preparation

    for text in texts:
        try:
            read_preparation(text)
        except UserError as error:
            yield str(error)


def warn_of_idle(config: GenerateConfig) -> None:
    """Warn of options that change nothing; sd-scripts takes them without a word."""
    images = config.images
    if config.prompts.prompt and config.prompts.from_file:
        logger.warning("--prompt is not drawn, for --from_file is given")
    if images.strength is not None and images.image_path is None and images.highres_fix_scale is None:
        logger.warning("--strength is for pictures that begin with one: --image_path or --highres_fix_scale")


def network_problems(config: GenerateConfig) -> Iterator[str]:
    """Yield what is wrong with the networks."""
    modules, files = config.networks.network_module or (), config.networks.network_weights or ()
    multipliers, arguments = config.networks.network_mul or (), config.networks.network_args or ()
    if len(modules) != len(files):
        yield f"--network_module and --network_weights must name as many networks, got {len(modules)} and {len(files)}"
    for flag, given in (("--network_mul", multipliers), ("--network_args", arguments)):
        if len(given) > len(files):
            yield f"{flag} has {len(given)} values for {len(files)} networks"
    for text in arguments:
        if any("=" not in pair for pair in text.split(";") if pair):
            yield f"--network_args must be key=value;key=value for each network, got {text!r}"
    for name in modules:
        if importlib.util.find_spec(name if name.startswith("networks.") else name.split(".")[0]) is None:
            yield f"--network_module {name}: there is no such module; networks.lora reads files of most trainers"
    for path in files:
        if not path.is_file():
            yield f"--network_weights: {path} is not a file"


def load_lines(config: GenerateConfig) -> list[Line]:
    """Return the prompt lines of the options."""
    from library.sampling.requests import parse_line, read_lines

    prompts = config.prompts
    if prompts.from_file is not None:
        return read_lines(prompts.from_file)
    return [] if prompts.prompt is None else [parse_line(prompts.prompt, "--prompt")]


def warn_of_strengths(config: GenerateConfig, lines: Sequence[Line]) -> None:
    """Warn of strengths in prompts that no network has."""
    networks = config.networks
    number = len(networks.network_weights or ())
    number = 0 if networks.network_merge else max(0, number - (networks.network_merge_n_models or 0))
    for line in lines:
        strengths = line.options.get("multipliers", ())
        if len(strengths) > number:
            logger.warning("%s: --am has %d values, networks that can change: %d", line.place, len(strengths), number)


def load_recorded(config: GenerateConfig) -> list[Recorded]:
    """Return what pictures say of themselves: of --from_picture, or of --image_path where there is no prompt."""
    from library.generation.infotext import read_recorded
    from library.generation.starts import list_of

    prompts, images = config.prompts, config.images
    given = prompts.from_picture or ()
    has_prompts = prompts.prompt is not None or prompts.from_file is not None or prompts.interactive or given
    if not has_prompts and images.image_path is not None and images.image_path.exists():
        given = list_of("--image_path", images.image_path).files
    recorded = [read_recorded(path) for path in given]
    for record in recorded:
        for name, flag, path in (
            (record.begins_with, "--image_path", images.image_path),
            (record.mask, "--mask_path", images.mask_path),
        ):
            if name is not None and path is None:
                raise UserError(f"--from_picture: a picture was drawn with {name}, which it does not hold: give {flag}")
    return recorded


if __name__ == "__main__":
    run_script(main)
