"""A run of gen_img_diffusers.py, from the models to the last file."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from library import NAME, VERSION
from library.config.generation import DrawingConfig, GenerateConfig, PromptConfig
from library.config.model import ModelConfig
from library.config.prompts import PromptLine
from library.errors import UserError, message_of
from library.files import file_sha256
from library.generation import grid as grids
from library.generation.again import again, tell_differences
from library.generation.control_nets import load_control_nets
from library.generation.embeddings import with_embeddings
from library.generation.image_generator import GeneratedImage, ImageGenerator
from library.generation.infotext import NetworkFacts, RunFacts
from library.generation.init_images import list_images
from library.generation.jobs import ImageLists, Job, JobMaker, in_batch_order
from library.generation.networks import LoadedNetworks, check_files, load_networks, show_metadata
from library.generation.output import Writer, in_name, save, unused
from library.generation.recorded import Recorded
from library.generation.requests import Request, Seeds, all_requests, read_line, requests_of
from library.models.attention import use_xformers
from library.models.base import BaseModel, find_base, load_base
from library.models.checkpoint import UNET, weight_files
from library.models.family import check_flags
from library.models.memory_format import use_channels_last
from library.models.precision import check_bf16, describe, types_of
from library.progress import Bar, step_shown_on
from library.sampling.previews import side_of

logger = logging.getLogger(__name__)


def generate(config: GenerateConfig, lines: Sequence[PromptLine], recorded: Sequence[Recorded]) -> None:
    """Generate the images of lines, of those that were recorded, or of what is typed, and write them."""
    if config.networks.network_show_meta:
        show_metadata(config.networks)
    axes = grids.read_axes(config.output.grid or ())
    device = device_of(config.speed.device)
    check_files(config.networks, config.control.textual_inversion_embeddings or ())
    base = open_base(config, device)
    networks = load_networks(config, base, device)
    control_nets = load_control_nets(config.control.control_net_models or (), base, device)
    if config.speed.opt_channels_last:
        use_channels_last(*control_nets)
    generator = ImageGenerator(
        config.images,
        config.control,
        config.speed,
        base,
        networks,
        device,
        control_nets,
    )
    maker = JobMaker(
        config.prompts,
        config.drawing,
        config.images,
        image_lists(config),
        networks,
        base.family,
        side_of(base),
        base.texts[0],
    )
    with run_facts(config, base, networks) as facts:
        writer = Writer(config.output, facts)
        session = Session(generator, writer, config.prompts.batch_size)
        tell_differences(recorded, networks, facts, config.control.textual_inversion_embeddings or ())
        try:
            if config.prompts.interactive:
                generate_typed(session, maker, config.prompts, config.drawing)
                return
            requests = [again(record, networks) for record in recorded] + list(all_requests(config, lines))
            if axes:
                generate_grid(session, maker, requests, axes)
                return
            for _ in session.generate(map(maker.job_of, requests, range(len(requests))), len(requests)):
                pass
        finally:  # also what was finished before Ctrl-C
            writer.close()


def open_base(config: GenerateConfig, device: torch.device) -> BaseModel:
    """Return the model in its types on its device, and with the words of embeddings."""
    checkpoint, speed = config.checkpoint, config.speed
    files = find_base(
        ModelConfig(
            pretrained_model_name_or_path=str(checkpoint.ckpt),
            v2=checkpoint.v2,
            v_parameterization=checkpoint.v_parameterization,
            vae=checkpoint.vae,
            tokenizer_cache_dir=checkpoint.tokenizer_cache_dir,
            variant=checkpoint.variant,
        ),
        zero_snr=checkpoint.zero_terminal_snr,
    )
    check_flags(files.checkpoint.family, checkpoint.ckpt, v1=checkpoint.v1, sdxl=checkpoint.sdxl)
    if files.zero_snr and not files.predicts_v:
        raise UserError("--zero_terminal_snr is for models that predict v: give --v_parameterization, too, if it does")
    if speed.bf16:
        check_bf16("--bf16", "--fp16", describe(device))
    precision = "fp16" if speed.fp16 else "bf16" if speed.bf16 else "no"
    base = load_base(files, types_of(precision, vae_overflows=files.vae_overflows, no_half_vae=speed.no_half_vae))
    if speed.opt_channels_last:
        use_channels_last(base.unet, base.vae)
    if speed.xformers:
        use_xformers(device, base.unet, base.vae)
    if speed.vae_tiling or speed.vae_slices:
        base.vae.enable_tiling()
    if not speed.offload:
        for part in (base.unet, base.vae, *base.text_modules):
            part.to(device)
    embeddings = config.control.textual_inversion_embeddings or ()
    return dataclasses.replace(base, texts=with_embeddings(base.texts, embeddings))


def device_of(name: str | None) -> torch.device:
    """Return the device of a name, or the GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise UserError(f"--device {name} cannot be used: {message_of(error)}; such as cpu, cuda or cuda:1") from None
    return device


def image_lists(config: GenerateConfig) -> ImageLists:
    """Return the images of the options, to begin with and to be guided by."""
    images, guides = config.images, config.control.guide_image_path or ()
    return ImageLists(
        init_images=list_images("--image_path", images.image_path) if images.image_path else None,
        masks=list_images("--mask_path", images.mask_path) if images.mask_path else None,
        control_images=tuple(list_images("--guide_image_path", path) for path in guides),
    )


@contextlib.contextmanager
def run_facts(
    config: GenerateConfig, base: BaseModel, networks: LoadedNetworks
) -> Iterator[concurrent.futures.Future[RunFacts]]:
    """Yield what all images have in common; the model is hashed while the first is generated."""

    def facts() -> RunFacts:
        return RunFacts(
            model=config.checkpoint.title_of("ckpt"),
            model_sha256=model_hash(config.checkpoint.ckpt, config.checkpoint.variant),
            vae=config.checkpoint.title_of("vae") if config.checkpoint.vae else None,
            networks=tuple(
                NetworkFacts(
                    module=network.options.network_module,
                    file=network.path.name,
                    sha256=network.sha256,
                    merged=network.multiplier if network.is_merged else None,
                    has_tag=network.has_tag,
                )
                for network in networks.all
            ),
            dtype=str(base.unet.dtype).removeprefix("torch."),
            version=f"{NAME} {VERSION}",
            zero_snr=base.zero_snr,
        )

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(facts)


def model_hash(path: Path, variant: str | None) -> str:
    """Return the SHA-256 of a checkpoint; of a Diffusers folder that of its U-Net's weights, of shards the first."""
    return file_sha256(path if path.is_file() else weight_files(path / UNET, variant=variant)[0])


# --------------------------------------------------------------------------------------------------------------
# What consumes images
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Session:
    """Generates images and writes each as soon as it is finished."""

    generator: ImageGenerator
    writer: Writer
    batch_size: int

    def generate(
        self, jobs: Iterable[Job], total: int, titles: Mapping[int, str] | None = None
    ) -> Iterator[GeneratedImage]:
        """Yield the images of jobs, written, with a bar that shows the steps of a batch, too.

        titles are parts of names of files, by the number of the image.
        """
        logger.info("%d pictures to %s, %d at a time", total, self.writer.options.outdir, self.batch_size)
        bar: Bar[None] = Bar(total=total, desc="drawing", unit="picture")
        with bar:
            for generated in self.generator.generate(jobs, self.batch_size, step_shown_on(bar)):
                self.writer.write(generated, (titles or {}).get(generated.job.number, ""))
                bar.update(generated.is_final)
                yield generated


def generate_grid(session: Session, maker: JobMaker, requests: Sequence[Request], axes: Sequence[grids.Axis]) -> None:
    """Generate all combinations of the axes for each request, and write their sheets."""
    grids.check_words(axes, requests)
    changed = [combination for request in requests for combination in grids.combinations(axes, request)]
    titles = dict(enumerate(grids.titles(axes) * len(requests)))
    jobs = in_batch_order(map(maker.job_of, changed, range(len(changed))))
    images: dict[int, Image.Image] = {}
    try:
        for generated in session.generate(jobs, len(changed), titles):
            if generated.is_final:
                images[generated.job.number] = generated.image
    finally:  # with holes, after Ctrl-C
        for label, sheet in grids.sheets(axes, requests, images) if images else ():
            name = f"grid_{in_name(label)}.png" if label else "grid.png"
            path = unused(session.writer.options.outdir / name)
            save(sheet, path, {"parameters": label})
            logger.info("grid: %s", path)


def generate_typed(session: Session, maker: JobMaker, prompts: PromptConfig, drawing: DrawingConfig) -> None:
    """Generate the images of what is typed, line by line, until the end of the input."""
    seeds = Seeds(drawing.seed, None)
    number = 0
    while True:
        try:
            text = input("prompt> ").encode(errors="replace").decode()  # half a character may have come
        except EOFError:
            return
        if not text.strip():
            continue
        try:
            jobs = []
            for request in requests_of(prompts, drawing, [read_line(text, "prompt")], seeds):
                jobs.append(maker.job_of(request, number))
                number += 1
            for generated in session.generator.generate(jobs, session.batch_size):
                logger.info("%s", session.writer.write(generated))
        except UserError as error:
            for line in error.lines:
                logger.error("%s", line)
