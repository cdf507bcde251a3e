"""Options of datasets and their subsets: command line, dataset file and inheritance share these fields.

A value is looked up in the subset, its dataset, `[general]`, then on the command line (`levels` says which of
the first three take a key). `library.config.dataset_file` does the lookup.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from library.config.options import option
from library.config.values import parse_extension, parse_range, parse_resolution, parse_separator

EVERYWHERE = ("general", "datasets", "subsets")
DATASET = ("general", "datasets")
SUBSET = ("subsets",)

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures are."""

    dataset_config: Path | None = option(None, "dataset definition file (.toml or .json)")
    train_data_dir: Path | None = option(None, "folder whose sub-folders N_name hold the training pictures")
    reg_data_dir: Path | None = option(None, "folder whose sub-folders N_name hold regularisation pictures")
    in_json: Path | None = option(
        None, "metadata file (.json or .jsonl) with the captions of the pictures in --train_data_dir itself"
    )
    prior_loss_weight: float = option(1.0, "weight of the loss of regularisation pictures")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Dataset: one resolution, batch size and set of buckets."""

    resolution: tuple[int, int] | None = option(
        None,
        "training size in pixels",
        parse=parse_resolution,
        form='one number or "WIDTH,HEIGHT", each at least 64',
        levels=DATASET,
    )
    batch_size: int = option(1, "pictures in a batch", flag="train_batch_size", minimum=1, levels=DATASET)
    enable_bucket: bool = option(False, "group pictures by aspect ratio instead of cropping all alike", levels=DATASET)
    min_bucket_reso: int = option(256, "shortest side of a bucket in pixels", minimum=64, levels=DATASET)
    max_bucket_reso: int = option(1024, "longest side of a bucket in pixels", minimum=64, levels=DATASET)
    bucket_reso_steps: int = option(
        64, "sides of buckets are multiples of this; itself a multiple of 64", minimum=64, levels=DATASET
    )
    bucket_no_upscale: bool = option(False, "never enlarge a picture to fill its bucket", levels=DATASET)
    validation_seed: int | None = option(
        None, "seed of what is held out and of its noise; unset: --seed", minimum=0, levels=DATASET
    )
    network_multiplier: float = option(
        1.0, "strength of the adapter for this dataset; accepted, no effect", file_only=True, levels=DATASET
    )

    @property
    def size(self) -> tuple[int, int]:
        """The resolution as (width, height); `library.config.dataset_file` requires one of each dataset."""
        assert self.resolution is not None
        return self.resolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """Pictures and captions: of all subsets, unless the dataset file says otherwise."""

    num_repeats: int = option(
        1, "times a picture is seen in an epoch", flag="dataset_repeats", maximum=1_000_000, levels=EVERYWHERE
    )
    caption_extension: str = option(
        ".caption",
        "extension of caption files",
        aliases=("caption_extention",),
        parse=parse_extension,
        form="an extension such as .txt",
        levels=EVERYWHERE,
    )
    caption_separator: str = option(
        ",",
        "what separates the tags of a caption",
        parse=parse_separator,
        form="a text of at least one character",
        levels=EVERYWHERE,
    )
    shuffle_caption: bool = option(False, "shuffle the tags of a caption", levels=EVERYWHERE)
    keep_tokens: int = option(
        0, "leading tags that shuffling and dropping leave in place", minimum=0, levels=EVERYWHERE
    )
    keep_tokens_separator: str = option("", "text that ends the tags to keep, instead of a number", levels=EVERYWHERE)
    secondary_separator: str | None = option(
        None, "separator inside a group of tags that moves as one", levels=EVERYWHERE
    )
    enable_wildcard: bool = option(False, "draw one of {a|b|c}, and one line of several", levels=EVERYWHERE)
    caption_prefix: str | None = option(None, "text put before every caption", levels=EVERYWHERE)
    caption_suffix: str | None = option(None, "text put after every caption", levels=EVERYWHERE)
    caption_dropout_rate: float = option(
        0.0, "share of captions replaced by an empty one", minimum=0, maximum=1, levels=EVERYWHERE
    )
    caption_dropout_every_n_epochs: int = option(
        0, "drop all captions in every n-th epoch; 0 never", minimum=0, levels=EVERYWHERE
    )
    caption_tag_dropout_rate: float = option(0.0, "share of tags dropped", minimum=0, maximum=1, levels=EVERYWHERE)
    token_warmup_min: int = option(1, "tags shown at the start of the token warm-up", minimum=0, levels=EVERYWHERE)
    token_warmup_step: float = option(
        0.0, "steps until all tags are shown; below 1 a share of all steps", minimum=0, levels=EVERYWHERE
    )
    color_aug: bool = option(False, "vary hue and gamma a little", levels=EVERYWHERE)
    flip_aug: bool = option(False, "mirror half of the pictures", levels=EVERYWHERE)
    random_crop: bool = option(False, "crop at random instead of from the centre", levels=EVERYWHERE)
    resize_interpolation: Interpolation | None = option(
        None, "how pictures are resized; unset: area to shrink, lanczos to enlarge", levels=EVERYWHERE
    )
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        "crop round the face that the file name tells (NAME_x_y_w_h), so that the crop is this many times its size",
        parse=parse_range,
        form='"LOW,HIGH", two numbers above 0',
        levels=EVERYWHERE,
    )
    alpha_mask: bool = option(False, "weight the loss by the transparency of the pictures", levels=EVERYWHERE)
    conditioning_data_dir: Path | None = option(
        None, "folder of the masks of --masked_loss, named like the pictures", levels=SUBSET
    )
    validation_split: float = option(
        0.0, "share of the pictures that is held out to measure the loss on", minimum=0, maximum=1, levels=EVERYWHERE
    )
    class_tokens: str | None = option(
        None, "caption of pictures that have no caption file", file_only=True, levels=EVERYWHERE
    )
    image_dir: Path | None = option(None, "folder of the pictures", file_only=True, levels=SUBSET)
    metadata_file: Path | None = option(
        None, "metadata file (.json or .jsonl) that lists pictures with captions", file_only=True, levels=SUBSET
    )
    is_reg: bool = option(False, "regularisation pictures", file_only=True, levels=SUBSET)
    custom_attributes: dict | None = option(
        None,
        "free table; diff_output_preservation = true makes the base model's own prediction the target",
        file_only=True,
        levels=EVERYWHERE,
    )

    @property
    def preserves_output(self) -> bool:
        """Whether the pictures hold the network to what the base model predicts."""
        return bool((self.custom_attributes or {}).get("diff_output_preservation"))

    @property
    def source(self) -> Path:
        """Where the pictures come from: the metadata file that lists them, or their folder."""
        return self.metadata_file or self.folder

    @property
    def folder(self) -> Path:
        """Where the pictures are: image_dir, else beside the metadata file."""
        folder = self.image_dir or (self.metadata_file and self.metadata_file.parent)
        assert folder is not None  # library.config.dataset_file requires one of the two of each subset
        return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset with its subsets, every value looked up."""

    options: DatasetOptions
    subsets: tuple[SubsetOptions, ...]
