"""Generate pictures with Stable Diffusion 1.x, 2.x or XL and networks trained on it.

python gen_img_diffusers.py --ckpt model.safetensors --prompt "a photo of a cat --n blurry --w 768"
    --network_module networks.lora --network_weights mine.safetensors --network_mul 0.8
    --images_per_prompt 8 --batch_size 4 --steps 30 --sampler euler_a --fp16 --outdir outputs

python gen_img_diffusers.py --ckpt examples/pocket_model --prompt "a unicorn --w 128 --h 128" --outdir output/pictures
"""

from __future__ import annotations

from collections.abc import Sequence

from library.config.command_line import given_options
from library.config.effects import warn_of_idle
from library.config.generation import GenerateConfig
from library.config.options import build
from library.config.retired import GENERATION
from library.config.saving import ConsoleConfig
from library.errors import LessMemory, Problems, UserError
from library.logs import choose_log_lines, run_script

LESS_MEMORY = LessMemory(
    "add --fp16, --vae_tiling or --offload, or lower --batch_size, --W or --H", "lower --batch_size, --W or --H"
)


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Run the script with a command line; return the exit code. description is for --help."""
    problems = Problems()
    given = given_options(GenerateConfig, argv, problems, description=description, retired=GENERATION)
    config = build(GenerateConfig, given.values, problems, given.unreadable)
    problems.run(choose_logs, config.console)

    from library.generation import checks  # these read pictures; --help does not
    from library.models.hub import fetch_models, locate_models

    config = problems.run(checks.with_checkpoint, config) or config
    config = locate_models(config, problems)
    checks.check(config, problems)
    lines = problems.run(checks.load_lines, config.prompts) or []
    recorded = problems.run(checks.load_recorded, config.prompts, config.images, config.drawing.seed) or []
    problems.raise_if_any()
    checks.warn_of_strengths(config.networks, lines)
    checks.warn_of_equal_pictures(config, lines)
    checks.warn_of_tags(lines)
    if not (lines or recorded or config.prompts.interactive):
        raise UserError("no prompt is given: use --prompt, --from_file, --from_picture or --interactive")
    warn_of_idle(config)
    fetch_models(config)

    # Torch takes seconds to import, so all mistakes are reported before.
    from library.generation.recipe import generate

    generate(config, lines, recorded)
    return 0


def choose_logs(console: ConsoleConfig) -> None:
    """Configure the log lines by the options."""
    choose_log_lines(console.console_log_level, console.console_log_file)


if __name__ == "__main__":
    run_script(main, LESS_MEMORY)
