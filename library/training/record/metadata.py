"""What a saved network says of itself: `ss_*` keys as sd-scripts writes them, and `modelspec.*` keys.

Web UIs read several of them; so names and forms are facts. All values are texts.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import mimetypes
import random
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from library import NAME, VERSION
from library.config.saving import MetadataConfig
from library.config.train import TrainConfig
from library.data.batches import RunPlan, samples_by_bucket
from library.data.buckets import Size, mean_aspect_error
from library.data.captions import tag_counts
from library.data.records import Dataset, ImageRecord
from library.errors import UserError
from library.files import file_sha256
from library.models.family import ModelFamily
from library.training.run.progress import Progress
from library.weight_file import file_legacy_hash

# Kept under --no_metadata: what readers need.
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)

# ss_ key -> (section, field) of the option it records. Options of later versions are None, as where unset.
RECORDED = {
    "ss_output_name": ("saving", "output_name"),
    "ss_learning_rate": ("optimizer", "learning_rate"),
    "ss_unet_lr": ("optimizer", "unet_lr"),
    "ss_gradient_checkpointing": ("precision", "gradient_checkpointing"),
    "ss_gradient_accumulation_steps": ("run", "gradient_accumulation_steps"),
    "ss_lr_warmup_steps": ("schedule", "lr_warmup_steps"),
    "ss_lr_scheduler": ("schedule", "lr_scheduler"),
    "ss_network_module": ("network", "network_module"),
    "ss_network_dim": ("network", "network_dim"),
    "ss_network_alpha": ("network", "network_alpha"),
    "ss_network_dropout": ("network", "network_dropout"),
    "ss_mixed_precision": ("precision", "mixed_precision"),
    "ss_clip_skip": ("text", "clip_skip"),
    "ss_max_token_length": ("text", "max_token_length"),
    "ss_cache_latents": ("precision", "cache_latents"),
    "ss_seed": ("run", "seed"),
    "ss_noise_offset": ("loss", "noise_offset"),
    "ss_zero_terminal_snr": ("loss", "zero_terminal_snr"),
    "ss_debiased_estimation": ("loss", "debiased_estimation_loss"),
    "ss_noise_offset_random_strength": ("loss", "noise_offset_random_strength"),
    "ss_ip_noise_gamma_random_strength": ("loss", "ip_noise_gamma_random_strength"),
    "ss_multires_noise_iterations": ("loss", "multires_noise_iterations"),
    "ss_multires_noise_discount": ("loss", "multires_noise_discount"),
    "ss_adaptive_noise_scale": ("loss", "adaptive_noise_scale"),
    "ss_ip_noise_gamma": ("loss", "ip_noise_gamma"),
    "ss_training_comment": ("metadata", "training_comment"),
    "ss_max_grad_norm": ("optimizer", "max_grad_norm"),
    "ss_caption_dropout_rate": ("subset", "caption_dropout_rate"),
    "ss_caption_dropout_every_n_epochs": ("subset", "caption_dropout_every_n_epochs"),
    "ss_caption_tag_dropout_rate": ("subset", "caption_tag_dropout_rate"),
    "ss_prior_loss_weight": ("data", "prior_loss_weight"),
    "ss_min_snr_gamma": ("loss", "min_snr_gamma"),
    "ss_scale_weight_norms": ("network", "scale_weight_norms"),
    "ss_loss_type": ("loss", "loss_type"),
    "ss_huber_schedule": ("loss", "huber_schedule"),
    "ss_huber_scale": ("loss", "huber_scale"),
    "ss_huber_c": ("loss", "huber_c"),
    "ss_resize_interpolation": ("subset", "resize_interpolation"),
    "ss_face_crop_aug_range": ("subset", "face_crop_aug_range"),
    "ss_full_fp16": ("precision", "full_fp16"),
    "ss_fp8_base": ("precision", "fp8_base"),
    "ss_fp8_base_unet": ("precision", "fp8_base_unet"),
    "ss_validate_every_n_steps": ("validation", "validate_every_n_steps"),
    "ss_validate_every_n_epochs": ("validation", "validate_every_n_epochs"),
    "ss_max_validation_steps": ("validation", "max_validation_steps"),
    "ss_validation_seed": ("dataset", "validation_seed"),
    "ss_validation_split": ("subset", "validation_split"),
}
FIXED = {
    "ss_lowram": False,
    "ss_sd_scripts_commit_hash": "(unknown)",
}
SUBSET_RECORDED = (
    "num_repeats",
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "resize_interpolation",
)


def training_metadata(
    config: TrainConfig, plan: RunPlan, *, family: ModelFamily, predicts_v: bool, optimizer: str
) -> dict[str, Any]:
    """Return the ss_* values known when training starts; optimizer is its class with its arguments."""
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
        "ss_text_encoder_lr": _single(config.optimizer.text_encoder_lr),
        "ss_sd_model_name": Path(config.model.pretrained_model_name_or_path).name,
    }
    values |= FIXED
    values |= {key: getattr(getattr(config, section), field) for key, (section, field) in RECORDED.items()}
    values["ss_max_train_steps"] = plan.num_steps
    values["ss_num_epochs"] = plan.num_epochs
    values["ss_num_batches_per_epoch"] = plan.batches_per_epoch
    if config.network.network_args or config.network.network_dropout is not None:
        arguments = config.network.network_args or {}
        values["ss_network_args"] = json.dumps({"dropout": config.network.network_dropout} | arguments)
    if config.model.vae is not None:
        values["ss_vae_name"] = config.model.vae.name
    described = (
        describe_datasets(datasets)
        if config.data.dataset_config
        else describe_folders(config, datasets, plan.num_processes)
    )
    return values | described


def _single(values: tuple[float, ...] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else None if values is None else list(values)


# --------------------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------------------


def describe_datasets(datasets: list[Dataset]) -> dict[str, Any]:
    """Return the dataset values of a run with --dataset_config."""
    return {
        "ss_datasets": json.dumps([_describe_dataset(dataset, index) for index, dataset in enumerate(datasets)]),
        "ss_tag_frequency": json.dumps(tag_frequency([record for dataset in datasets for record in dataset.records])),
        "ss_dataset_dirs": json.dumps(dataset_dirs(datasets, is_reg=False)),
    }


def _describe_dataset(dataset: Dataset, index: int) -> dict[str, Any]:
    sources: list[Path] = list(dict.fromkeys(record.subset.source for record in dataset.records))
    options = dataset.options
    return {
        "is_dreambooth": not any(record.subset.metadata_file for record in dataset.records),
        "batch_size_per_device": options.batch_size,
        "num_train_images": dataset.num_images(is_reg=False),
        "num_reg_images": dataset.num_images(is_reg=True),
        "resolution": list(options.size),
        "enable_bucket": options.enable_bucket,
        "min_bucket_reso": options.min_bucket_reso,
        "max_bucket_reso": options.max_bucket_reso,
        "tag_frequency": tag_frequency(list(dataset.records)),
        "bucket_info": bucket_info(dataset, index),
        "resize_interpolation": None,
        "subsets": [_describe_subset(dataset, source) for source in sources],
    }


def _describe_subset(dataset: Dataset, source: Path) -> dict[str, Any]:
    records = [record for record in dataset.records if record.subset.source == source]
    subset = records[0].subset
    kind = {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    if subset.metadata_file is not None:
        kind = {"metadata_file": subset.metadata_file.name}
    return {
        "img_count": len(records),
        **{key: getattr(subset, key) for key in SUBSET_RECORDED},
        "image_dir": subset.image_dir.name if subset.image_dir else None,
        **kind,
    }


def describe_folders(config: TrainConfig, datasets: list[Dataset], num_processes: int) -> dict[str, Any]:
    """Return the dataset values of a run with --train_data_dir."""
    options, subset = config.dataset, config.subset
    records = [record for dataset in datasets for record in dataset.records]
    return {
        "ss_batch_size_per_device": options.batch_size,
        "ss_total_batch_size": options.batch_size * num_processes * config.run.gradient_accumulation_steps,
        "ss_resolution": options.resolution,
        "ss_color_aug": subset.color_aug,
        "ss_flip_aug": subset.flip_aug,
        "ss_random_crop": subset.random_crop,
        "ss_shuffle_caption": subset.shuffle_caption,
        "ss_enable_bucket": options.enable_bucket,
        "ss_bucket_no_upscale": options.bucket_no_upscale,
        "ss_min_bucket_reso": options.min_bucket_reso,
        "ss_max_bucket_reso": options.max_bucket_reso,
        "ss_keep_tokens": subset.keep_tokens,
        "ss_dataset_dirs": json.dumps(dataset_dirs(datasets, is_reg=False)),
        "ss_reg_dataset_dirs": json.dumps(dataset_dirs(datasets, is_reg=True)),
        "ss_tag_frequency": json.dumps(tag_frequency(records)),
        "ss_bucket_info": json.dumps(bucket_info(datasets[0], 0)),
    }


def tag_frequency(records: list[ImageRecord]) -> dict[str, dict[str, int]]:
    """Return name of the source -> tag -> count over captions, or over the tags of a metadata file."""
    texts: dict[str, list[str]] = {}
    for record in records:
        texts.setdefault(record.subset.source.name, []).extend(record.tags)
    return {name: tag_counts(tags) for name, tags in texts.items()}


def bucket_info(dataset: Dataset, index: int) -> dict[str, Any] | None:
    """Return resolutions and draws of the buckets, and the mean error of the aspect ratio; None without buckets."""
    if not dataset.options.enable_bucket:
        return None
    grouped = sorted(samples_by_bucket(dataset, index).items())
    return {
        "buckets": {
            str(number): {"resolution": list(bucket), "count": len(samples)}
            for number, (bucket, samples) in enumerate(grouped)
        },
        "mean_img_ar_error": mean_aspect_error([(record.size, record.placement) for record in dataset.records]),
    }


def dataset_dirs(datasets: list[Dataset], *, is_reg: bool) -> dict[str, dict[str, int]]:
    """Return name of the source -> repeats and pictures; equal names get " (2)" and so on."""
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

    def __init__(self, files: Mapping[str, Path | None]) -> None:
        """Begin to hash the files, given by the part of their names in the metadata; folders are left out."""
        self._files = files
        self._values: dict[str, str] = {}
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for name, path in self._files.items():
            if path is not None and path.is_file():
                self._values[f"ss_{name}_hash"] = file_legacy_hash(path)
                self._values[f"ss_new_{name}_hash"] = file_sha256(path)

    def values(self) -> dict[str, str]:
        """Return the ss_*_hash values."""
        self._thread.join()
        return self._values


@dataclasses.dataclass(frozen=True)
class FileMetadata:
    """The metadata of the files that a run saves."""

    config: TrainConfig
    family: ModelFamily
    predicts_v: bool
    resolution: Size  # of the first dataset
    started: Mapping[str, Any]  # the ss_* values known when training starts
    hashes: BackgroundHashes

    def at(self, progress: Progress, num_epochs: int) -> dict[str, str]:
        """Return the whole metadata of a file that is saved now, after a number of whole epochs."""
        best = dict(zip(("ss_best_validation_loss", "ss_best_validation_step"), progress.best or (), strict=False))
        now = {"ss_training_finished_at": time.time(), "ss_steps": progress.step, "ss_epoch": num_epochs}
        values = {**self.started, **self.hashes.values(), **best, **now}
        if self.config.metadata.no_metadata:
            values = {key: value for key, value in values.items() if key in MINIMUM}
        spec = modelspec(self.config, self.family, predicts_v=self.predicts_v, resolution=self.resolution)
        return {key: str(value) for key, value in values.items()} | spec


def modelspec(config: TrainConfig, family: ModelFamily, *, predicts_v: bool, resolution: Size) -> dict[str, str]:
    """Return the modelspec.* keys (specification 1.0.1) of a LoRA-type network."""
    now = datetime.now()
    metadata = config.metadata
    title = metadata.metadata_title or config.saving.output_name or f"LoRA@{now.timestamp():.0f}"
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.architecture(predicts_v=predicts_v)}/lora",
        "implementation": "diffusers",
        "implementation_version": f"{NAME}/{VERSION}",
        "title": title,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": now.isoformat(timespec="seconds"),
        "prediction_type": "v" if predicts_v else "epsilon",
        "author": metadata.metadata_author,
        "description": metadata.metadata_description,
        "license": metadata.metadata_license,
        "tags": metadata.metadata_tags,
        "usage_hint": metadata.metadata_usage_hint,
        "thumbnail": thumbnail(metadata),
        "merged_from": metadata.metadata_merged_from,
        "trigger_phrase": metadata.metadata_trigger_phrase,
        "preprocessor": metadata.metadata_preprocessor,
        "is_negative_embedding": metadata.metadata_is_negative_embedding,
        "encoder_layer": config.text.clip_skip,
        "timestep_range": _timestep_range(config),
    }
    return {f"modelspec.{key}": str(value) for key, value in values.items() if value is not None}


def _timestep_range(config: TrainConfig) -> str | None:
    if config.loss.min_timestep is None and config.loss.max_timestep is None:
        return None
    return "{},{}".format(*config.loss.timestep_range)


def thumbnail(metadata: MetadataConfig) -> str | None:
    """Return the thumbnail as a data URL; raises UserError for a file that is not there."""
    given = metadata.metadata_thumbnail
    if given is None or given.startswith("data:"):
        return given
    try:
        content = Path(given).read_bytes()
    except OSError as error:
        raise UserError(f"--metadata_thumbnail: {given} cannot be read: {error}") from None
    kind = mimetypes.guess_type(given)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
