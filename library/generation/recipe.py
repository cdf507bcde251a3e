"""A run of gen_img_diffusers.py, from the models to the last file."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from library import NAME, VERSION
from library.config.generation import GenerateConfig
from library.config.model import ModelConfig
from library.errors import UserError, message_of
from library.files import file_sha256
from library.generation import grid as grids
from library.generation.artist import Artist, Drawn, Job, batches
from library.generation.controls import load_control_nets, with_embeddings
from library.generation.gallery import write_gallery
from library.generation.infotext import Recorded, RunFacts, texts_for
from library.generation.networks import DrawnNetworks, load_networks, show_metadata
from library.generation.output import Writer, save, unused
from library.generation.starts import list_of
from library.models.attention import use_xformers
from library.models.base import BaseModel, find_base, load_base
from library.models.precision import types_of
from library.sampling.requests import Line, Request, Seeds, num_pictures, parse_line, requests_of

logger = logging.getLogger(__name__)


def generate(config: GenerateConfig, lines: Sequence[Line], recorded: Sequence[Recorded]) -> None:
    """Draw the lines, or pictures again that were recorded, or what is typed."""
    if config.networks.network_show_meta:
        show_metadata(config.networks)
    axes = grids.read_axes(config.output.grid or ())
    device = device_of(config.speed.device)
    base = open_base(config, device)
    networks = load_networks(config, base, device)
    artist = Artist(
        config=config,
        base=base,
        networks=networks,
        device=device,
        starts=list_of("--image_path", config.images.image_path),
        masks=list_of("--mask_path", config.images.mask_path),
        guides=tuple(list_of("--guide_image_path", path) for path in config.control.guide_image_path or ()),
        nets=load_control_nets(config.control, base, device),
    )
    with run_facts(config, base, networks) as facts:
        session = Session(config, artist, facts, Writer(config.output))
        tell_differences(recorded, networks, session)
        try:
            if config.prompts.interactive:
                session.draw_typed()
            else:
                requests = [again(record, networks) for record in recorded]
                session.draw_all(requests + list(all_requests(config, lines)), axes)
        finally:  # also what was finished before Ctrl-C
            session.close()


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
        )
    )
    precision = "fp16" if speed.fp16 else "bf16" if speed.bf16 else "no"
    base = load_base(files, types_of(precision, half_vae=not speed.no_half_vae))
    if speed.opt_channels_last:
        base.unet.to(memory_format=torch.channels_last)
        base.vae.to(memory_format=torch.channels_last)
    if speed.xformers:
        use_xformers(device, base.unet, base.vae)
    if speed.vae_tiling or speed.vae_slices:
        base.vae.enable_tiling()
    if not speed.offload:
        for part in (base.unet, base.vae, *base.text_modules):
            part.to(device)
    return dataclasses.replace(base, texts=tuple(with_embeddings(config.control, text) for text in base.texts))


def device_of(name: str | None) -> torch.device:
    """Return the device of a name, or the GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise UserError(f"--device {name} cannot be used: {message_of(error)}; such as cpu, cuda or cuda:1") from None
    return device


def all_requests(config: GenerateConfig, lines: Sequence[Line]) -> Iterator[Request]:
    """Yield the requests of all repeats of the lines."""
    seeds = Seeds(config.drawing.seed, num_pictures(lines, config.prompts))
    order = random.Random(config.drawing.seed)
    for _ in range(config.prompts.n_iter):
        shuffled = order.sample(lines, len(lines)) if config.prompts.shuffle_prompts else lines
        yield from requests_of(config, shuffled, seeds)


@contextlib.contextmanager
def run_facts(
    config: GenerateConfig, base: BaseModel, networks: DrawnNetworks
) -> Iterator[concurrent.futures.Future[RunFacts]]:
    """Yield what all pictures have in common; the hash of the model is made while the first is drawn."""

    def facts() -> RunFacts:
        return RunFacts(
            model=config.checkpoint.ckpt.name,
            model_sha256=model_hash(config.checkpoint.ckpt),
            vae=config.checkpoint.vae.name if config.checkpoint.vae else None,
            networks=tuple(
                (n.options.network_module, n.path.name, n.sha256, n.multiplier if n.is_merged else None)
                for n in networks.all
            ),
            dtype=str(base.unet.dtype).removeprefix("torch."),
            version=f"{NAME} {VERSION}",
        )

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(facts)


def model_hash(path: Path) -> str:
    """Return the SHA-256 of a checkpoint; of a Diffusers folder that of its U-Net's weights."""
    if path.is_file():
        return file_sha256(path)
    files = [file for file in sorted((path / "unet").iterdir()) if file.suffix in (".safetensors", ".bin")]
    return file_sha256(files[0])


def tell_differences(recorded: Sequence[Recorded], networks: DrawnNetworks, session: Session) -> None:
    """Warn of pictures that were drawn with another model or other networks than this run has."""
    given = [network.sha256 for network in networks.all]
    for record in recorded:
        said = [digest for _, digest in record.networks]
        same = len(said) == len(given) and all(own.startswith(digest) for own, digest in zip(given, said, strict=True))
        if not same:
            names = ", ".join(name for name, _ in record.networks) or "none"
            logger.warning("a picture was drawn with other networks (%s) than --network_weights has", names)
        model = record.model_sha256
        if model and not session.facts.result().model_sha256.startswith(model):
            logger.warning("a picture was drawn with another model (SHA-256 %s...) than --ckpt", model[:10])
        if same and len(record.strengths) == len(networks.all):
            for strength, network in zip(record.strengths, networks.all, strict=True):
                if network.is_merged and network.multiplier != strength:
                    logger.warning("a picture was drawn with %s at %g, which is merged now", network.path, strength)


def again(record: Recorded, networks: DrawnNetworks) -> Request:
    """Return the request of a recorded picture, with strengths for the networks that are not merged in this run."""
    if len(record.strengths) != len(networks.all):
        return record.request
    pairs = zip(record.strengths, networks.all, strict=True)
    left = tuple(strength for strength, network in pairs if not network.is_merged)
    return dataclasses.replace(record.request, multipliers=left or None)


@dataclasses.dataclass
class Session:
    """Drawing and saving."""

    config: GenerateConfig
    artist: Artist
    facts: concurrent.futures.Future[RunFacts]
    writer: Writer
    entries: list[tuple[Path, Image.Image, str]] = dataclasses.field(default_factory=list)  # for --html

    def draw_all(self, requests: Sequence[Request], axes: Sequence[grids.Axis]) -> None:
        """Draw requests, or all combinations of the axes for each."""
        requests = list(requests)
        if not axes:
            self.draw(requests)
            return
        grids.check_words(axes, requests)
        pictures: dict[int, Image.Image] = {}
        try:
            self.draw([changed for request in requests for changed in grids.combinations(axes, request)], pictures)
        finally:  # with holes, after Ctrl-C
            self._write_sheets(axes, requests, pictures)

    def _write_sheets(
        self, axes: Sequence[grids.Axis], requests: Sequence[Request], pictures: dict[int, Image.Image]
    ) -> None:
        for label, sheet in grids.sheets(axes, requests, pictures) if pictures else ():
            path = unused(self.config.output.outdir / "grid.png")
            save(sheet, path, {"parameters": label})
            logger.info("grid: %s", path)

    def draw(self, requests: Sequence[Request], pictures: dict[int, Image.Image] | None = None) -> None:
        """Draw and save requests; pictures takes them by number, for a grid."""
        size = self.config.prompts.batch_size
        logger.info("%d pictures to %s, %d at a time", len(requests), self.config.output.outdir, size)
        jobs = (self.artist.job_of(request, number) for number, request in enumerate(requests))
        if pictures is not None:  # of a grid, neighbours are not alike: what can be drawn together comes together
            by_key: dict[object, list[Job]] = {}
            for job in jobs:
                by_key.setdefault(job.key, []).append(job)
            jobs = (job for group in by_key.values() for job in group)
        with tqdm(total=len(requests), desc="drawing", unit="picture") as bar:
            for group in batches(jobs, self.config.prompts.batch_size):
                with tqdm(total=None, desc="steps", unit="step", leave=False, disable=None) as steps:
                    for index, drawn in enumerate(self.artist.draw(group, steps.update)):
                        self._save(drawn, index % len(group))
                        if pictures is not None and drawn.stage != 0:
                            pictures[drawn.job.number] = drawn.image
                        bar.update(drawn.stage != 0)

    def draw_typed(self) -> None:
        """Draw what is typed, line by line, until the end of the input."""
        seeds = Seeds(self.config.drawing.seed, None)
        number = 0
        while True:
            try:
                text = input("prompt> ").encode(errors="replace").decode()  # half a character may have come
            except EOFError:
                return
            if not text.strip():
                continue
            try:
                line = parse_line(text, "prompt")
                jobs = []
                for request in requests_of(self.config, [line], seeds):
                    jobs.append(self.artist.job_of(request, number))
                    number += 1
                for group in batches(iter(jobs), self.config.prompts.batch_size):
                    for index, drawn in enumerate(self.artist.draw(group)):
                        logger.info("%s", self._save(drawn, index % len(group)))
            except UserError as error:
                logger.error("%s", error)

    def _save(self, drawn: Drawn, index: int) -> Path:
        job: Job = drawn.job
        texts = texts_for(
            job.request,
            self.facts.result(),
            job.multipliers,
            begins_with=job.start.name if job.start else None,
            mask=job.mask.name if job.mask else None,
        )
        path = self.writer.write(drawn, index, texts)
        if self.config.output.html:
            self.entries.append((path, drawn.image, texts["parameters"]))
        return path

    def close(self) -> None:
        """Write the page of the run, and tell what it made."""
        if self.entries:
            stamp = datetime.now().strftime("%Y%m%d%H%M%S")
            path = unused(self.config.output.outdir / f"gallery-{stamp}.html")
            write_gallery(path, self.entries, f"{len(self.entries)} pictures, {self.facts.result().model}")
            logger.info("gallery: %s", path)
