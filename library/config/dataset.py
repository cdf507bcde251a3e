"""Options of datasets and their subsets, for the command line and the dataset file.

A value is looked up in the subset, its dataset, `[general]`, then on the command line; `levels` lists which of
the first three take a key. `library.config.dataset_file` does the lookup.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from library.config.options import for_all, for_datasets, for_subsets, option
from library.config.values import parse_extension, parse_range, parse_resolution, parse_separator

MEGAPIXEL = 1_000_000
LEAST_STEP = 32  # of bucket_reso_steps, in pixels: of the families that take the smallest
BUCKETS = ("enable_bucket",)
NOT_ENLARGED = ("bucket_no_upscale",)
BY_TAGS = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures are."""

    dataset_config: Path | None = option(
        None,
        "dataset definition file (.toml or .json)",
        wins_over=("train_data_dir", "in_json"),
    )
    train_data_dir: Path | None = option(None, "folder whose sub-folders N_name hold the training pictures")
    reg_data_dir: Path | None = option(
        None, "folder whose sub-folders N_name hold regularisation pictures", not_with=("dataset_config", "in_json")
    )
    in_json: Path | None = option(
        None, "metadata file (.json or .jsonl) with the captions of the pictures in --train_data_dir itself"
    )
    skip_cache_check: bool = option(
        False, "take what is remembered of the pictures without looking whether they have changed since"
    )
    check_pictures: bool = option(
        False, "read every picture whole, whatever is remembered of it", wins_over=("skip_cache_check",)
    )
    prior_loss_weight: float = option(
        1.0, "weight of the loss of regularisation pictures", only_with=("reg_data_dir", "is_reg")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Dataset: one resolution, batch size and set of buckets."""

    resolution: tuple[int, int] | None = for_datasets(
        None,
        "training size in pixels",
        parse=parse_resolution,
        form='one number or "WIDTH,HEIGHT", each at least 64',
    )
    batch_size: int = for_datasets(1, "pictures in a batch", flag="train_batch_size", minimum=1)
    enable_bucket: bool = for_datasets(False, "group pictures by aspect ratio instead of cropping all alike")
    min_bucket_reso: int = for_datasets(
        256, "shortest side of a bucket in pixels", minimum=64, only_with=BUCKETS, not_with=NOT_ENLARGED
    )
    max_bucket_reso: int | None = for_datasets(
        None,
        "longest side of a bucket in pixels; unset: 2048 if the resolution has a megapixel or more, else 1024",
        minimum=64,
        only_with=BUCKETS,
        not_with=NOT_ENLARGED,
    )
    bucket_reso_steps: int = for_datasets(
        64,
        "sides of buckets are multiples of this; itself a multiple of 64, or for SDXL of 32",
        minimum=LEAST_STEP,
        only_with=BUCKETS,
    )
    bucket_no_upscale: bool = for_datasets(False, "never enlarge a picture to fill its bucket", only_with=BUCKETS)
    validation_seed: int | None = for_datasets(
        None, "seed of the validation split and of its noise; unset: --seed", minimum=0, only_with=("validation_split",)
    )
    network_multiplier: float = for_datasets(
        1.0, "strength of the adapter for this dataset; accepted, no effect", file_only=True
    )

    @property
    def size(self) -> tuple[int, int]:
        """The resolution as (width, height); `library.config.dataset_file` requires one of each dataset."""
        assert self.resolution is not None
        return self.resolution

    @property
    def longest_side(self) -> int:
        """Longest side of a bucket in pixels.

        Unset it grows with the resolution: at 1024x1024 and 1024, every bucket but the square one would be smaller.
        """
        if self.max_bucket_reso is not None:
            return self.max_bucket_reso
        return 2048 if self.size[0] * self.size[1] >= MEGAPIXEL else 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """Pictures and captions: of all subsets, unless the dataset file says otherwise."""

    num_repeats: int = for_all(1, "times a picture is used in an epoch", flag="dataset_repeats", maximum=1_000_000)
    caption_extension: str = for_all(
        ".caption",
        "extension of caption files",
        aliases=("caption_extention",),
        parse=parse_extension,
        form="an extension such as .txt",
    )
    caption_separator: str = for_all(
        ",",
        "separator of the tags of a caption",
        parse=parse_separator,
        form="a text of at least one character",
        only_with=(*BY_TAGS, "keep_tokens_separator", "secondary_separator", "metadata_file", "in_json"),
    )
    shuffle_caption: bool = for_all(False, "shuffle the tags of a caption")
    keep_tokens: int = for_all(
        0, "leading tags that shuffling and dropping leave in place", minimum=0, only_with=BY_TAGS
    )
    keep_tokens_separator: str = for_all("", "text that ends the tags to keep, instead of a number")
    secondary_separator: str | None = for_all(None, "separator inside a group of tags that moves as one")
    enable_wildcard: bool = for_all(False, "choose one of {a|b|c}, and one line of several, at random")
    caption_prefix: str | None = for_all(None, "text put before every caption")
    caption_suffix: str | None = for_all(None, "text put after every caption")
    caption_dropout_rate: float = for_all(0.0, "share of captions replaced by an empty one", minimum=0, maximum=1)
    caption_dropout_every_n_epochs: int = for_all(
        0, "drop all captions in every n-th epoch; 0 never", minimum=0, interval="epochs"
    )
    caption_tag_dropout_rate: float = for_all(0.0, "share of tags dropped", minimum=0, maximum=1)
    token_warmup_min: int = for_all(
        1, "tags used at the start of the token warm-up", minimum=0, only_with=("token_warmup_step",)
    )
    token_warmup_step: float = for_all(
        0.0, "steps until all tags are used; below 1 a share of all steps", minimum=0, interval="steps"
    )
    color_aug: bool = for_all(False, "vary hue and gamma a little")
    flip_aug: bool = for_all(False, "mirror half of the pictures")
    random_crop: bool = for_all(False, "crop at random instead of from the centre")
    resize_interpolation: Interpolation | None = for_all(
        None, "how pictures are resized; unset: area to shrink, lanczos to enlarge"
    )
    face_crop_aug_range: tuple[float, float] | None = for_all(
        None,
        "crop round the face named in the file name (NAME_x_y_w_h), to this many times its size",
        parse=parse_range,
        form='"LOW,HIGH", two numbers above 0',
    )
    alpha_mask: bool = for_all(False, "weight the loss by the transparency of the pictures")
    conditioning_data_dir: Path | None = for_subsets(
        None, "folder of the masks of --masked_loss, named like the pictures"
    )
    validation_split: float = for_all(
        0.0, "share of the pictures held out for measuring the loss", minimum=0, maximum=1
    )
    class_tokens: str | None = for_all(None, "caption of pictures that have no caption file", file_only=True)
    image_dir: Path | None = for_subsets(None, "folder of the pictures", file_only=True)
    metadata_file: Path | None = for_subsets(
        None, "metadata file (.json or .jsonl) that lists pictures with captions", file_only=True
    )
    is_reg: bool = for_subsets(False, "regularisation pictures", file_only=True)
    custom_attributes: dict | None = for_all(
        None,
        "free table; diff_output_preservation = true makes the base model's own prediction the target",
        file_only=True,
    )

    @property
    def preserves_output(self) -> bool:
        """Whether the target is the base model's own prediction."""
        return bool((self.custom_attributes or {}).get("diff_output_preservation"))

    @property
    def source(self) -> Path:
        """The metadata file that lists the pictures, or their folder."""
        return self.metadata_file or self.folder

    @property
    def folder(self) -> Path:
        """The folder of the pictures: image_dir, else the folder of the metadata file."""
        folder = self.image_dir or (self.metadata_file and self.metadata_file.parent)
        assert folder is not None  # library.config.dataset_file requires one of the two of each subset
        return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset with its subsets, every value looked up."""

    options: DatasetOptions
    subsets: tuple[SubsetOptions, ...]
    place: str = ""  # in the dataset file, for messages; empty if the options are the command line's
