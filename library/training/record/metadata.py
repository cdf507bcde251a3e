"""The metadata of a saved network: `ss_*` keys as sd-scripts writes them, and `modelspec.*` keys.

Web UIs read several of them, so names and formats are fixed. All values are text.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import mimetypes
import random
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from library import NAME, VERSION
from library.adapters.alphas import NOTE, note_on_alphas
from library.adapters.metadata import common
from library.adapters.names import roles_of
from library.config.model import ModelConfig
from library.config.saving import MetadataConfig
from library.config.train import TrainConfig
from library.data.batches import RunPlan, count_draws
from library.data.buckets import Size, mean_aspect_error
from library.data.captions import tag_counts
from library.data.records import Dataset, ImageRecord
from library.errors import UserError
from library.files import file_sha256
from library.models.checkpoint import Checkpoint
from library.models.family import ModelFamily
from library.training.run.interruption import StopRequest
from library.training.run.progress import Progress
from library.weight_file import file_legacy_hash, open_weights

logger = logging.getLogger(__name__)

# Kept under --no_metadata: the keys that readers need.
MINIMUM = frozenset(
    f"ss_{name}"
    for name in ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
)

# Names of options that are recorded as ss_NAME, in the order of the file; None if unset.
RECORDED = """
    output_name learning_rate unet_lr gradient_checkpointing gradient_accumulation_steps lr_warmup_steps lr_scheduler
    network_module network_dim network_alpha network_dropout mixed_precision clip_skip max_token_length cache_latents
    seed noise_offset debiased_estimation_loss noise_offset_random_strength
    ip_noise_gamma_random_strength multires_noise_iterations multires_noise_discount adaptive_noise_scale
    ip_noise_gamma training_comment max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs
    caption_tag_dropout_rate prior_loss_weight min_snr_gamma scale_weight_norms loss_type huber_schedule huber_scale
    huber_c resize_interpolation face_crop_aug_range full_fp16 fp8_base fp8_base_unet validate_every_n_steps
    validate_every_n_epochs max_validation_steps validation_seed validation_split
"""
RENAMED = {"debiased_estimation_loss": "debiased_estimation"}  # after ss_
WAITED_AT_ONCE = 0.2  # seconds: on Windows no signal ends a longer wait for a thread
REVISIONS = {"pretrained_model_name_or_path": "sd_model_revision", "vae": "vae_revision"}  # commits on the hub
FIXED = {"ss_lowram": False, "ss_sd_scripts_commit_hash": "(unknown)"}
# The same for a subset of ss_datasets, and for the dataset of a run with --train_data_dir.
SUBSET_RECORDED = """
    num_repeats color_aug flip_aug random_crop shuffle_caption keep_tokens keep_tokens_separator secondary_separator
    enable_wildcard caption_prefix caption_suffix resize_interpolation
"""
FOLDERS_RECORDED = """
    resolution color_aug flip_aug random_crop shuffle_caption enable_bucket bucket_no_upscale min_bucket_reso
    max_bucket_reso keep_tokens
"""


def training_metadata(
    config: TrainConfig,
    plan: RunPlan,
    *,
    family: ModelFamily,
    predicts_v: bool,
    zero_snr: bool,
    optimizer: str,
    alphas: Mapping[str, float],
) -> dict[str, Any]:
    """Return what is known when training starts: the ss_* values, and a note if diffusers will misread the file.

    optimizer is its class and arguments as text, alphas those of the modules in the file.
    """
    datasets = plan.datasets
    values: dict[str, Any] = {
        "ss_session_id": random.SystemRandom().randrange(2**32),
        "ss_training_started_at": time.time(),
        "ss_v2": family.name == "sd2",
        "ss_base_model_version": family.base_version(predicts_v=predicts_v),
        "ss_optimizer": optimizer,
        "ss_num_train_images": sum(dataset.num_images(is_reg=False) for dataset in datasets),
        "ss_num_validation_images": sum(len(dataset.held_out) for dataset in datasets),
        "ss_num_reg_images": sum(dataset.num_images(is_reg=True) for dataset in datasets),
        "ss_text_encoder_lr": listed(config.optimizer.text_encoder_lr),
        "ss_sd_model_name": config.model.title_of("pretrained_model_name_or_path"),
    }
    values |= FIXED | recorded(config, RECORDED)
    values["ss_zero_terminal_snr"] = zero_snr
    values["ss_max_train_steps"] = plan.num_steps
    values["ss_num_epochs"] = plan.num_epochs
    values["ss_num_batches_per_epoch"] = plan.batches_per_epoch
    if config.network.dim_from_weights and config.network.network_weights is not None:
        values |= shapes_from_weights(config.network.network_weights, alphas.values())
    if (note := note_on_alphas(alphas)) is not None:
        values[NOTE] = note
    if config.network.network_args or config.network.network_dropout is not None:
        arguments = config.network.network_args or {}
        values["ss_network_args"] = json.dumps({"dropout": config.network.network_dropout} | arguments)
    if config.model.vae is not None:
        values["ss_vae_name"] = config.model.title_of("vae")
    values |= {f"ss_{REVISIONS[model.field]}": model.name.revision for model in config.model.from_hub}
    if config.data.dataset_config:
        return values | describe_datasets(datasets)
    return values | describe_folders(config, datasets, plan.num_processes)


def shapes_from_weights(path: Path, alphas: Collection[float]) -> dict[str, str]:
    """Return rank and alpha of a network that takes its ranks from a file; none if the file is of another kind."""
    shapes = open_weights(path).shapes
    ranks = {shapes[name][0] for _, role, name in roles_of(shapes) if role == "down"}
    return {"ss_network_dim": common(ranks), "ss_network_alpha": common(set(alphas))} if ranks and alphas else {}


def recorded(config: TrainConfig, names: str) -> dict[str, Any]:
    """Return ss_ key -> value of options, in the order of the names."""
    values = {name: value for section in vars(config).values() for name, value in vars(section).items()}
    return {f"ss_{RENAMED.get(name, name)}": values[name] for name in names.split()}


def listed(values: tuple[float, ...] | None) -> list[float] | None:
    """Return values as a list, which sd-scripts writes also for one, since each text encoder can have its own."""
    return None if values is None else list(values)


# --------------------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------------------


def describe_datasets(datasets: list[Dataset]) -> dict[str, Any]:
    """Return the values of the datasets of a run with --dataset_config."""
    return {
        "ss_datasets": json.dumps([_describe_dataset(dataset) for dataset in datasets]),
        "ss_tag_frequency": json.dumps(tag_frequency(record for dataset in datasets for record in dataset.records)),
        "ss_dataset_dirs": json.dumps(dataset_dirs(datasets, is_reg=False)),
    }


def _describe_dataset(dataset: Dataset) -> dict[str, Any]:
    by_source: dict[Path, list[ImageRecord]] = {}
    for record in dataset.records:
        by_source.setdefault(record.subset.source, []).append(record)
    options = dataset.options
    return {
        "is_dreambooth": not any(record.subset.metadata_file for record in dataset.records),
        "batch_size_per_device": options.batch_size,
        "num_train_images": dataset.num_images(is_reg=False),
        "num_reg_images": dataset.num_images(is_reg=True),
        "resolution": list(options.size),
        "enable_bucket": options.enable_bucket,
        "min_bucket_reso": options.min_bucket_reso,
        "max_bucket_reso": options.longest_side,
        "tag_frequency": tag_frequency(dataset.records),
        "bucket_info": bucket_info(dataset),
        "resize_interpolation": None,
        "subsets": [_describe_subset(records) for records in by_source.values()],
    }


def _describe_subset(records: Sequence[ImageRecord]) -> dict[str, Any]:
    subset = records[0].subset
    kind = {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    if subset.metadata_file is not None:
        kind = {"metadata_file": subset.metadata_file.name}
    return {
        "img_count": len(records),
        **{key: getattr(subset, key) for key in SUBSET_RECORDED.split()},
        "image_dir": subset.image_dir.name if subset.image_dir else None,
        **kind,
    }


def describe_folders(config: TrainConfig, datasets: list[Dataset], num_processes: int) -> dict[str, Any]:
    """Return the values of the dataset of a run with --train_data_dir."""
    batch_size = config.dataset.batch_size
    return {
        "ss_batch_size_per_device": batch_size,
        "ss_total_batch_size": batch_size * num_processes * config.run.gradient_accumulation_steps,
        **recorded(config, FOLDERS_RECORDED),
        "ss_max_bucket_reso": config.dataset.longest_side,
        "ss_dataset_dirs": json.dumps(dataset_dirs(datasets, is_reg=False)),
        "ss_reg_dataset_dirs": json.dumps(dataset_dirs(datasets, is_reg=True)),
        "ss_tag_frequency": json.dumps(tag_frequency(record for dataset in datasets for record in dataset.records)),
        "ss_bucket_info": json.dumps(bucket_info(datasets[0])),
    }


def tag_frequency(records: Iterable[ImageRecord]) -> dict[str, dict[str, int]]:
    """Return name of the source -> tag -> its count in the captions, or in the tags of a metadata file."""
    texts: dict[str, list[str]] = {}
    for record in records:
        texts.setdefault(record.subset.source.name, []).extend(record.tags)
    return {name: tag_counts(tags) for name, tags in texts.items()}


def bucket_info(dataset: Dataset) -> dict[str, Any] | None:
    """Return resolution and number of samples of each bucket, and the mean aspect-ratio error; None without buckets."""
    if not dataset.options.enable_bucket:
        return None
    return {
        "buckets": {
            str(number): {"resolution": list(bucket), "count": draws}
            for number, (bucket, draws) in enumerate(count_draws(dataset).items())
        },
        "mean_img_ar_error": mean_aspect_error([(record.size, record.placement) for record in dataset.records]),
    }


def dataset_dirs(datasets: list[Dataset], *, is_reg: bool) -> dict[str, dict[str, int]]:
    """Return name of the source -> its repeats and number of pictures; equal names get " (2)" and so on."""
    found: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        folders: dict[Path, list[ImageRecord]] = {}
        for record in dataset.records:
            if record.subset.is_reg == is_reg:
                folders.setdefault(record.subset.source, []).append(record)
        for folder, records in folders.items():
            name, number = folder.name, 2
            while name in found:
                name, number = f"{folder.name} ({number})", number + 1
            found[name] = {"n_repeats": records[0].subset.num_repeats, "img_count": len(records)}
    return found


# --------------------------------------------------------------------------------------------------------------
# At saving
# --------------------------------------------------------------------------------------------------------------


class BackgroundHashes:
    """Hashes of files, computed while training goes on; the first save waits for them."""

    def __init__(self, files: Mapping[str, Path], stop: StopRequest) -> None:
        """Start hashing the files; their keys are part of the names in the metadata."""
        self._files, self._stop = files, stop
        self._values: dict[str, str] = {}
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for name, path in self._files.items():
            self._values[f"ss_{name}_hash"] = file_legacy_hash(path)
            self._values[f"ss_new_{name}_hash"] = file_sha256(path)

    def values(self) -> dict[str, str]:
        """Wait for the hashes and return the ss_*_hash values; after a stop only those that are known."""
        if self._thread.is_alive() and not self._stop.cut_short(self._wait):
            logger.warning("the file is saved without the hash of the base model, which would take longer")
        return dict(self._values)

    def _wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(WAITED_AT_ONCE)


def files_to_hash(model: ModelConfig, vae: Checkpoint) -> dict[str, Path]:
    """Return name in the metadata -> file, of the base model and of --vae; what has several files is left out."""
    whole = Path(model.pretrained_model_name_or_path)
    files = {"sd_model": [whole] if whole.is_file() else []}
    if model.vae is not None:
        files["vae"] = [path for part in vae.parts.values() for path in part.paths]
    return {name: paths[0] for name, paths in files.items() if len(paths) == 1}


@dataclasses.dataclass(frozen=True)
class FileMetadata:
    """Provides the metadata of the files that a run saves."""

    config: TrainConfig
    family: ModelFamily
    predicts_v: bool
    resolution: Size  # of the first dataset
    started: Mapping[str, Any]  # the ss_* values known when training starts
    hashes: BackgroundHashes

    def at(self, progress: Progress, num_epochs: int) -> dict[str, str]:
        """Return all metadata of a file that is saved now, after num_epochs complete epochs."""
        best = dict(zip(("ss_best_validation_loss", "ss_best_validation_step"), progress.best or (), strict=False))
        now = {"ss_training_finished_at": time.time(), "ss_steps": progress.step, "ss_epoch": num_epochs}
        values = {**self.started, **self.hashes.values(), **best, **now}
        if self.config.metadata.no_metadata:
            values = {key: value for key, value in values.items() if key in MINIMUM}
        spec = modelspec(self.config, self.family, predicts_v=self.predicts_v, resolution=self.resolution)
        return {key: str(value) for key, value in values.items()} | spec


def modelspec(config: TrainConfig, family: ModelFamily, *, predicts_v: bool, resolution: Size) -> dict[str, str]:
    """Return the modelspec.* keys of a LoRA (SAI model specification 1.0.1)."""
    now = datetime.now()
    options = vars(config.metadata) | {"metadata_thumbnail": thumbnail(config.metadata)}
    texts = {name.removeprefix("metadata_"): text for name, text in options.items() if name.startswith("metadata_")}
    title = texts.pop("title") or config.saving.output_name or f"LoRA@{now.timestamp():.0f}"
    loss = config.loss
    has_range = loss.min_timestep is not None or loss.max_timestep is not None
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.architecture(predicts_v=predicts_v)}/lora",
        "implementation": family.implementation,
        "implementation_version": f"{NAME}/{VERSION}",
        "title": title,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": now.isoformat(timespec="seconds"),
        "prediction_type": "v" if predicts_v else "epsilon",
        **texts,
        "encoder_layer": config.text.clip_skip,
        "timestep_range": "{},{}".format(*loss.timestep_range) if has_range else None,
    }
    return {f"modelspec.{key}": str(value) for key, value in values.items() if value is not None}


def thumbnail(metadata: MetadataConfig) -> str | None:
    """Return the thumbnail as a data URL, or None; raises UserError for a file that cannot be read."""
    given = metadata.metadata_thumbnail
    if given is None or given.startswith("data:"):
        return given
    try:
        content = Path(given).read_bytes()
    except OSError as error:
        raise UserError(f"--metadata_thumbnail: {given} cannot be read: {error}") from None
    kind = mimetypes.guess_type(given)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
