"""Options: one declaration for command line, TOML, help and record; the list of them; the dataset file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import NEEDED
from scripts import ROOT

from library.config import toml_text
from library.config.command_line import build_parser, given_options, parse
from library.config.config_file import to_toml
from library.config.dataset import DataConfig, DatasetOptions, SubsetOptions
from library.config.dataset_file import read_datasets
from library.config.options import format_default, root_options
from library.config.retired import RETIRED
from library.config.train import TrainConfig, parse_train_config
from library.errors import Problems, UserError


def read(*argv):
    return parse(TrainConfig, [*NEEDED, *argv])


def test_the_list_of_options_is_the_recorded_one():
    lines = [
        f"{flag}\t{entry.kind.name}\t{format_default(entry.default)}"
        for flag, entry in sorted(root_options(TrainConfig).items())
    ]
    recorded = (ROOT / "tests" / "data" / "options.txt").read_text(encoding="utf-8").splitlines()
    assert lines == recorded, "an option came, went or changed: say so in CHANGELOG.md and record it here"


def test_retired_options_are_no_options():
    assert not set(RETIRED) & set(root_options(TrainConfig))


def test_every_option_of_the_reference_is_known_or_retired():
    known = set(root_options(TrainConfig)) | set(RETIRED)
    known |= {alias for entry in root_options(TrainConfig).values() for alias in entry.spec.aliases}
    named = (ROOT / "tests" / "data" / "sd_scripts_options.txt").read_text(encoding="utf-8").split()
    assert [name for name in named if name not in known] == []


def test_values_take_the_types_of_their_fields():
    config = read(
        "--resolution=512,768",
        "--network_dim",
        "8",
        "--text_encoder_lr",
        "1e-5",
        "2e-5",
        "--learning_rate=1e-4",
        "--network_args",
        "conv_dim=4",
        "conv_alpha=1",
        "--lr_warmup_steps",
        "10%",
        "--max_token_length",
        "150",
        "--v2",
    )
    assert config.dataset.resolution == (512, 768)
    assert config.network.network_dim == 8
    assert config.optimizer.text_encoder_lr == (1e-5, 2e-5)
    assert config.network.network_args == {"conv_dim": "4", "conv_alpha": "1"}
    assert config.schedule.lr_warmup_steps == 0.1
    assert config.text.max_token_length == 150
    assert config.model.v2 is True


def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        "\ufeff[one]\nnetwork_dim = 16\nlearning_rate = 1\nnetworkdim = 16\n[two]\nresolution = [512, 640]\nv2 = true\n"
        'text_encoder_lr = [1e-4, 1]\nnetwork_args = ["conv_dim=4"]\ncaption_extention = "txt"\n',
        encoding="utf-8",
    )
    config = read("--config_file", str(tmp_path / "a"), "--network_dim", "32")
    assert config.network.network_dim == 32
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.dataset.resolution == (512, 640)
    assert config.optimizer.text_encoder_lr == (1e-4, 1.0)
    assert config.subset.caption_extension == ".txt"
    assert config.saving.save_model_as == "safetensors"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("netwrk_dim = 4", "netwrk_dim is not known; did you mean network_dim?"),
        ("network_dim = 4.5", "network_dim must be a whole number, got 4.5"),
        ("network_dim = true", "network_dim must be a whole number, got True"),
        ("v2 = 2", "v2 must be true or false, got 2"),
        ('loss_type = "l3"', "loss_type must be one of l1, l2, huber, smooth_l1, got 'l3'"),
        ("lr_warmup_steps = 1.5", "lr_warmup_steps must be"),
        ("train_batch_size = 0", "train_batch_size must be at least 1, got 0"),
        ("caption_dropout_rate = 2", "caption_dropout_rate must be at most 1, got 2"),
        ("learning_rate = nan", "learning_rate must be at least 0, got nan"),
        ("deepspeed = true", "deepspeed is not available: an adapter"),
        ("a = ", "is not valid TOML"),
        ("image_dir = 'x'", "image_dir is not known"),
    ],
)
def test_the_file_is_checked_as_strictly_as_the_command_line(tmp_path, line, message):
    path = tmp_path / "a.toml"
    path.write_text(f"[x]\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read("--config_file", str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shufle_caption"], "--shufle_caption is not known; did you mean shuffle_caption?"),
        (["--max_train"], "--max_train is not known; it could be --max_train_steps, --max_train_epochs"),
        (["--resolution", "512x512"], '--resolution must be one number or "WIDTH,HEIGHT"'),
        (["--resolution", "32"], "a side is less than 64 pixels"),
        (["--network_args", "conv_dim"], "--network_args must be a list of key=value"),
        (["--seed"], "--seed: expected one argument"),
        (["--deepspeed"], "--deepspeed is not available: an adapter over a frozen base needs no sharding"),
        (["--output_name", "my", "model"], "unexpected argument 'model'"),
        (["--learning_rate", "fast"], "--learning_rate must be a number, got 'fast'"),
    ],
)
def test_mistakes_on_the_command_line_are_told(argv, message):
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert message in str(caught.value)


def test_options_that_change_nothing_are_ignored_with_a_warning(caplog):
    given = [
        "--lowram",
        "--fused_backward_pass",
        "--fused_optimizer_groups=7",
        "--diffusers_xformers",
    ]
    config = read(*given, "--train_text_encoder", "--disable_mmap_load_safetensors", "--network_dim=4")
    assert config.network.network_dim == 4
    assert [record.message.partition(" is ignored: ")[0] for record in caplog.records] == [
        *(name.partition("=")[0] for name in given),
        "--train_text_encoder",
        "--disable_mmap_load_safetensors",
    ]


def test_abbreviations_never_mean_options_of_other_scripts():
    assert read("--learning", "0.5").optimizer.learning_rate == 0.5


def test_the_record_of_a_run_repeats_it(tmp_path):
    argv = ["--output_dir", r"D:\data\x1\new", "--network_args", 'a="b"', "c=\x7f日本\t", "--resolution", "512"]
    argv += ["--learning_rate", "1e-4", "--lr_warmup_steps", "5", "--v2", "--dataset_repeats", "3", "--unet_lr", "1"]
    config = read(*argv)
    path = tmp_path / "r.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert toml_text.load(path)["saving"]["output_dir"] == r"D:\data\x1\new"
    assert parse(TrainConfig, ["--config_file", str(path)]) == read(*argv, "--config_file", str(path))


SCALARS = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text())
SECTIONS = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True),
    st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True), SCALARS | st.lists(SCALARS)),
)


@settings(deadline=None)
@given(SECTIONS)
def test_written_toml_reads_back(tmp_path_factory, sections):
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(toml_text.dump(sections), encoding="utf-8")
    assert repr(toml_text.load(path)) == repr(sections)  # repr: 1, 1.0 and True differ, nan equals itself


def test_help_names_every_option_with_its_meaning():
    text = build_parser(TrainConfig, None).format_help()
    for flag in root_options(TrainConfig):
        assert f"--{flag}" in text


def test_implied_options_are_set_once_and_said(base_argv, caplog):
    caplog.set_level("INFO")
    config = parse_train_config(
        [
            *base_argv,
            "--cache_latents_to_disk",
            "--cache_text_encoder_outputs_to_disk",
            "--use_8bit_adam",
            "--sample_every_n_steps=0",
        ],
        Problems(),
    )
    assert config.precision.cache_latents
    assert config.precision.cache_text_encoder_outputs
    assert config.optimizer.optimizer_type == "AdamW8bit"
    assert config.preview.sample_every_n_steps is None
    assert "--cache_latents is set to True" in caplog.text
    assert "--learning_rate is not given" in caplog.text
    assert "learning_rate" not in given_options(TrainConfig, base_argv, Problems()).values


@pytest.fixture
def base_argv(tmp_path):
    (tmp_path / "model.safetensors").touch()
    return [
        "--pretrained_model_name_or_path",
        str(tmp_path / "model.safetensors"),
        "--output_dir",
        str(tmp_path / "out"),
        "--network_module",
        "networks.lora",
        "--train_data_dir",
        str(tmp_path),
        "--resolution",
        "64",
    ]


# ---- the dataset file ---------------------------------------------------------------------------------------

EXAMPLE = {
    "general": {"shuffle_caption": True, "caption_extension": ".txt", "keep_tokens": 1, "batch_size": 3},
    "datasets": [
        {
            "resolution": 512,
            "batch_size": 4,
            "enable_bucket": True,
            "num_repeats": 2,
            "subsets": [
                {"image_dir": "img/subject", "class_tokens": "sks dog", "num_repeats": 10, "shuffle_caption": False},
                {"image_dir": "img/reg", "is_reg": True, "class_tokens": "dog", "keep_tokens": 0},
            ],
        },
        {"resolution": [768, 512], "subsets": [{"image_dir": "img/style"}]},
    ],
}


def datasets(tmp_path, content, *, suffix="json", dataset=None, subset=None):
    path = tmp_path / f"d.{suffix}"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_datasets(DataConfig(dataset_config=path), dataset or DatasetOptions(), subset or SubsetOptions())


def test_values_are_looked_up_from_the_subset_outwards(tmp_path):
    first, second = datasets(tmp_path, EXAMPLE, subset=SubsetOptions(flip_aug=True, num_repeats=5, keep_tokens=9))
    assert (first.options.resolution, first.options.batch_size, first.options.enable_bucket) == ((512, 512), 4, True)
    assert (second.options.resolution, second.options.batch_size, second.options.enable_bucket) == (
        (768, 512),
        3,
        False,
    )
    subject, reg = first.subsets
    (style,) = second.subsets
    assert [entry.num_repeats for entry in (subject, reg, style)] == [10, 2, 5]
    assert [entry.shuffle_caption for entry in (subject, reg, style)] == [False, True, True]
    assert [entry.keep_tokens for entry in (subject, reg, style)] == [1, 0, 1]
    assert all(entry.flip_aug and entry.caption_extension == ".txt" for entry in (subject, reg, style))
    assert reg.is_reg
    assert style.class_tokens is None


def test_the_dataset_file_of_the_documentation_is_read_as_toml(tmp_path):
    text = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'C:\\hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'C:\\fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\\reg'
  class_tokens = 'human'
  keep_tokens = 1
"""
    (found,) = datasets(tmp_path, text, suffix="toml")
    assert [entry.keep_tokens for entry in found.subsets] == [2, 3, 1]
    assert [str(entry.image_dir) for entry in found.subsets] == ["C:\\hoge", "C:\\fuga", "C:\\reg"]


BAD = [
    ({"genral": {}}, "genral is not known; did you mean general"),
    (
        {"general": {"shufle_caption": True}, "datasets": []},
        "general.shufle_caption is not known; did you mean shuffle_caption",
    ),
    ({"datasets": []}, "no [[datasets]] table"),
    ({"datasets": [{"resolution": 512, "subsets": [{}]}]}, "datasets[0].subsets[0].image_dir is missing"),
    (
        {"datasets": [{"resolution": 512, "image_dir": "x"}]},
        "datasets[0].image_dir does not belong here: it is set in [subsets]",
    ),
    (
        {"datasets": [{"resolution": 512, "subsets": [{"image_dir": "x", "batch_size": 2}]}]},
        "does not belong here: it is set in [general], [datasets]",
    ),
    (
        {"datasets": [{"resolution": 512, "subsets": [{"image_dir": "x", "num_repeats": "many"}]}]},
        "num_repeats must be a whole number, got 'many'",
    ),
    ({"datasets": [{"subsets": [{"image_dir": "x"}]}]}, "resolution is missing"),
    (
        {"datasets": [{"resolution": 500, "subsets": [{"image_dir": "x"}]}]},
        "datasets[0].resolution must be a multiple of 8 without buckets, got (500, 500)",
    ),
    ({"datasets": [{"resolution": 512, "subsets": [{"image_dir": "x", "is_reg": True}]}]}, "no subset to train on"),
    (
        {"datasets": [{"resolution": 128, "enable_bucket": True, "subsets": [{"image_dir": "x"}]}]},
        "datasets[0].min_bucket_reso 256 is more than",
    ),
    (
        {"datasets": [{"resolution": [512, 1536], "enable_bucket": True, "subsets": [{"image_dir": "x"}]}]},
        "max_bucket_reso 1024 is less than",
    ),
    (
        {
            "datasets": [
                {"resolution": 512, "enable_bucket": True, "bucket_reso_steps": 48, "subsets": [{"image_dir": "x"}]}
            ]
        },
        "datasets[0].bucket_reso_steps must be a multiple of 32, got 48",
    ),
    (
        {
            "datasets": [
                {"resolution": 64, "enable_bucket": True, "bucket_reso_steps": 128, "subsets": [{"image_dir": "x"}]}
            ]
        },
        "bucket_reso_steps 128 leaves no bucket in 64x64; lower it",
    ),
    ("{", "is not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_mistakes_in_the_dataset_file_name_their_place(tmp_path, content, message):
    with pytest.raises(UserError) as caught:
        datasets(tmp_path, content)
    assert message in str(caught.value)


def test_folders_give_repeats_and_class_tokens_in_order_of_their_names(tmp_path, caplog):
    for name in ("train/20_sks dog_v2", "train/3_cat", "train/nope", "train/0_off", "reg/1_dog"):
        (tmp_path / name).mkdir(parents=True)
    data = DataConfig(train_data_dir=tmp_path / "train", reg_data_dir=tmp_path / "reg")
    (found,) = read_datasets(data, DatasetOptions(resolution=(512, 512)), SubsetOptions())
    assert [(entry.num_repeats, entry.class_tokens, entry.is_reg) for entry in found.subsets] == [
        (20, "sks dog_v2", False),
        (3, "cat", False),
        (1, "dog", True),
    ]
    assert "nope is skipped" in caplog.text
    assert "num_repeats is 0" in caplog.text


def test_the_beginning_of_a_name_is_read_as_in_sd_scripts_and_warned_of(base_argv, caplog):
    config = parse_train_config([*base_argv, "--network_di", "7", "--save_every_n_ep=3", "--lowr"], Problems())
    assert config.network.network_dim == 7
    assert config.saving.save_every_n_epochs == 3
    assert "--network_di is read as --network_dim" in caplog.text
    assert "--lowram is ignored" in caplog.text
    with pytest.raises(UserError, match="--save_every_n is not known; it could be --save_every_n_epochs, --save_every"):
        parse(TrainConfig, [*base_argv, "--save_every_n", "3"])
    assert (
        parse_train_config([*base_argv, "--output_name", "x--network"], Problems()).saving.output_name == "x--network"
    )
