"""What is given has the effect that it looks like, or a message says why not: conditions, precedence, values."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from runs import NEEDED

import gen_img_diffusers
from library.config import toml_text
from library.config.command_line import parse
from library.config.dataset import DataConfig, DatasetOptions, SubsetOptions
from library.config.dataset_file import read_datasets
from library.config.effects import idle_options, long_intervals
from library.config.generation import GenerateConfig
from library.config.optimizer import OptimizerConfig
from library.config.options import Option, all_options, flag_values, root_options
from library.config.prompts import parse_line
from library.config.retired import GUI_KEYS
from library.config.train import TrainConfig, check, parse_train_config, warn_of_idle_options, warn_of_long_intervals
from library.config.values import parse_pair_lists, parse_pairs
from library.errors import Problems, UserError
from library.models.hub import locate_models
from library.optim.optimizers import check_optimizer, choose_optimizer
from networks import convert_lora, extract_lora_from_models, merge_lora, resize_lora, svd_merge_lora
from tools import canny, convert_diffusers20_original_sd, dylora_report, merge_models, resize_images_to_resolution

ROOTS = {
    "train": TrainConfig,
    "generate": GenerateConfig,
    "merge": merge_lora.MergeConfig,
    "svd merge": svd_merge_lora.SvdMergeConfig,
    "resize": resize_lora.ResizeConfig,
    "extract": extract_lora_from_models.ExtractConfig,
    "convert": convert_lora.ConvertConfig,
    "convert models": convert_diffusers20_original_sd.ConvertConfig,
    "merge models": merge_models.MergeConfig,
    "report": dylora_report.ReportConfig,
    "resize pictures": resize_images_to_resolution.ResizeConfig,
    "canny": canny.CannyOptions,
}


def conditions(root: type, *fields: str) -> list[tuple[str, str]]:
    """Return (option, condition) of all options of a root."""
    options = all_options(root).values()
    return [(entry.flag, name) for entry in options for field in fields for name in getattr(entry.spec, field)]


def another_value(entry: Option) -> object:
    """Return a value that is not the default and not off."""
    if entry.kind.nargs == 0:
        return True
    if entry.kind.form.startswith("one of"):
        return next(word for word in entry.kind.form.removeprefix("one of ").split(", ") if word != str(entry.default))
    return (entry.default or 0) + 0.5 if isinstance(entry.default, int | float) else "x"


def defaults(root: type) -> dict[str, object]:
    return {flag: entry.default for flag, entry in all_options(root).items()}


def met(condition: str) -> dict[str, object]:
    """Return the value that meets a condition."""
    name, _, value = condition.partition("=")
    return {name: value or True}


# ---- conditions of options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS.values(), ids=list(ROOTS))
def test_conditions_name_options_and_values_that_exist(root):
    known = all_options(root)
    for flag, condition in conditions(root, "only_with", "not_with", "wins_over", "excludes"):
        name, sign, value = condition.partition("=")
        assert name in known, (flag, condition)
        assert not sign or value in known[name].kind.form.removeprefix("one of ").split(", "), (flag, condition)
    for entry in known.values():
        assert entry.spec.twin is None or known[entry.spec.twin].spec.only_with


@pytest.mark.parametrize("root", ROOTS.values(), ids=list(ROOTS))
def test_an_option_is_idle_until_one_of_its_conditions_holds(root):
    known = all_options(root)
    for flag in {flag for flag, _ in conditions(root, "only_with")}:
        entry = known[flag]
        given = defaults(root) | {flag: another_value(entry)}
        assert idle_options([entry], defaults(root), known) == []
        (text,) = idle_options([entry], given, known)
        assert text.startswith(f"{entry.label} ") and " has no effect without " in text
        for condition in entry.spec.only_with:
            assert known[condition.partition("=")[0]].label in text
            assert idle_options([entry], given | met(condition), known) == []


@pytest.mark.parametrize("root", ROOTS.values(), ids=list(ROOTS))
def test_an_option_is_idle_with_what_makes_it_so(root):
    known = all_options(root)
    for flag, condition in conditions(root, "not_with"):
        entry = known[flag]
        given = defaults(root) | {flag: another_value(entry)}
        for needed in entry.spec.only_with[:1]:
            given |= met(needed)
        assert idle_options([entry], given, known) == []
        (text,) = idle_options([entry], given | met(condition), known)
        assert f" has no effect with {known[condition.partition('=')[0]].label}" in text


def warnings_of(caplog, *words, subset=None, dataset=None):
    """Return the warnings about options of a training with one subset."""
    problems = Problems()
    config = parse_train_config([*NEEDED, *words], problems)
    problems.raise_if_any()
    caplog.clear()
    warn_of_idle_options(config, [(dataset or config.dataset, subset or config.subset)])
    return [record.message for record in caplog.records]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--save_every_n_epochs=1", "--save_last_n_steps=2"],
            "--save_last_n_steps 2 has no effect without --save_every_n_steps; "
            "--save_last_n_epochs is for --save_every_n_epochs",
        ),
        (["--save_every_n_steps=1", "--save_last_n_epochs=2"], "--save_last_n_steps is for --save_every_n_steps"),
        (["--save_last_n_steps_state=2", "--save_every_n_steps=1"], "without --save_state"),
        (["--sample_prompts=absent.txt"], "--sample_prompts absent.txt has no effect without --sample_every_n_steps"),
        (["--huber_c=0.5"], "--huber_c 0.5 has no effect without --loss_type huber or --loss_type smooth_l1"),
        (["--text_encoder_lr=1e-5", "--network_train_unet_only"], "has no effect with --network_train_unet_only"),
        (["--keep_tokens=2"], "--keep_tokens 2 has no effect without --shuffle_caption"),
        (["--prior_loss_weight=0.5"], "--prior_loss_weight 0.5 has no effect without --reg_data_dir or is_reg"),
        (["--in_json=m.json", "--reg_data_dir=r"], "--reg_data_dir r has no effect with --in_json"),
        (["--max_bucket_reso=2048"], "--max_bucket_reso 2048 has no effect without --enable_bucket"),
        (["--wandb_api_key=secret"], "--wandb_api_key ... has no effect without --log_with wandb or --log_with all"),
        (
            ["--metadata_author=me", "--save_model_as=ckpt"],
            "--metadata_author me has no effect with --save_model_as ckpt",
        ),
        (["--base_weights_multiplier", "0.5"], None),  # refused by a check: more numbers than files
    ],
)
def test_what_is_given_in_vain_is_told(caplog, words, told):
    found = warnings_of(caplog, *words)
    assert len(found) == 1
    assert told is None or told in found[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--save_every_n_epochs=1", "--save_last_n_epochs=2"],
        ["--huber_c=0.1", "--lr_scheduler_power=1", "--max_token_length=75", "--prior_loss_weight=1"],  # defaults
        ["--huber_c=0.5", "--loss_type=smooth_l1"],
        ["--keep_tokens=2", "--caption_tag_dropout_rate=0.1"],
        ["--adaptive_noise_scale=0", "--noise_offset=0", "--min_snr_gamma=0", "--caption_dropout_every_n_epochs=0"],
    ],
)
def test_what_has_an_effect_or_is_off_is_not_told(caplog, words):
    assert warnings_of(caplog, *words) == []


def test_an_option_of_one_of_several_subsets_has_an_effect(caplog):
    config = parse_train_config([*NEEDED, "--prior_loss_weight=0.5", "--keep_tokens=1"], Problems())
    plain = dataclasses.replace(config.subset, is_reg=True)
    shuffled = dataclasses.replace(config.subset, shuffle_caption=True)
    caplog.clear()
    warn_of_idle_options(config, [(config.dataset, plain), (config.dataset, shuffled)])
    assert caplog.text == ""
    warn_of_idle_options(config, [(config.dataset, plain), (config.dataset, dataclasses.replace(plain, keep_tokens=0))])
    assert [record.message for record in caplog.records] == [
        "--keep_tokens 1 has no effect without --shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step"
    ]


def test_values_of_the_command_line_that_the_dataset_file_replaces_are_told(caplog):
    words = ["--dataset_config=d.toml", "--resolution=512", "--flip_aug"]
    told = warnings_of(
        caplog, *words, dataset=DatasetOptions(resolution=(768, 768)), subset=SubsetOptions(flip_aug=False)
    )
    assert told == [
        "--resolution 512 512 is not used: d.toml sets another value",
        "--flip_aug is not used: d.toml sets another value",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sample_every_n_steps=100"], "--sample_every_n_steps 100 is more than the 12 steps of the run"),
        (["--save_every_n_epochs=4"], "--save_every_n_epochs 4 is more than the 3 epochs of the run"),
        (["--validate_every_n_steps=13"], "--validate_every_n_steps 13 is more than the 12 steps of the run"),
        (["--caption_dropout_every_n_epochs=9"], "--caption_dropout_every_n_epochs 9 is more than the 3 epochs"),
        (["--token_warmup_step=50"], "--token_warmup_step 50 is more than the 12 steps of the run"),
        (
            ["--lr_warmup_steps=40", "--lr_scheduler=cosine"],
            "--lr_warmup_steps 40 is more than the 12 steps of the run",
        ),
    ],
)
def test_an_interval_longer_than_the_run_is_told(caplog, words, told):
    config = parse_train_config([*NEEDED, *words], Problems())
    caplog.clear()
    warn_of_long_intervals(config, [(config.dataset, config.subset)], steps=12, epochs=3)
    assert told in caplog.text
    caplog.clear()
    warn_of_long_intervals(config, [(config.dataset, config.subset)], steps=100, epochs=9)
    assert caplog.text == ""


def test_every_interval_of_the_options_is_one_that_can_be_too_long():
    names = {name for name in root_options(TrainConfig) if "_every_n_" in name}
    assert names <= {entry.flag for entry in root_options(TrainConfig).values() if entry.spec.interval}
    assert long_intervals(root_options(TrainConfig).values(), dict.fromkeys(names, 5), steps=5, epochs=5) == []


def test_generation_tells_what_is_given_in_vain(caplog, tmp_path, monkeypatch):
    from library.generation import recipe

    monkeypatch.setattr(recipe, "generate", lambda *_: None)
    (tmp_path / "lines.txt").write_text("a dog", encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    words = ["--ckpt", tmp_path / "model.safetensors", "--outdir", tmp_path / "out", "--prompt", "a cat"]
    words += ["--from_file", tmp_path / "lines.txt", "--highres_fix_steps", "5", "--use_original_file_name"]
    assert gen_img_diffusers.main([str(word) for word in [*words, "--network_merge_n_models", "1"]]) == 0
    for told in (
        "--prompt a cat is not used: --from_file",
        "--highres_fix_steps 5 has no effect without --highres_fix_scale",
        "--use_original_file_name has no effect without --image_path",
        "--network_merge_n_models 1 has no effect without --network_weights",
    ):
        assert told in caplog.text


# ---- what counts if options exclude each other --------------------------------------------------------------

VALUES = {
    "max_train_steps": 3, "max_train_epochs": 2, "save_every_n_epochs": 2, "save_n_epoch_ratio": 2,
    "sample_every_n_steps": 2, "sample_every_n_epochs": 2, "initial_epoch": 2, "initial_step": 3,
    "network_dim": 2, "network_alpha": 2, "lr_scheduler": "cosine", "lr_scheduler_type": "StepLR",
    "optimizer_type": "SGD", "dataset_config": "d.toml", "train_data_dir": "pictures", "in_json": "m.json",
}  # fmt: skip
RIVALS = [
    pair for flag, other in conditions(TrainConfig, "wins_over", "excludes") for pair in ((flag, other), (other, flag))
]


def as_toml(flag: str) -> str:
    value = VALUES.get(flag, True)
    return f"{flag} = {str(value).lower() if isinstance(value, bool | int) else repr(value)}\n"


@pytest.mark.parametrize(("near", "far"), RIVALS)
def test_the_command_line_wins_over_what_it_excludes_in_the_file(tmp_path, caplog, near, far):
    caplog.set_level("INFO")
    file = tmp_path / "run.toml"
    file.write_text(as_toml(far), encoding="utf-8")
    words = [f"--{near}"] if near not in VALUES else [f"--{near}", str(VALUES[near])]
    problems = Problems()
    from library.config.command_line import given_options

    given = given_options(TrainConfig, ["--config_file", str(file), *words], problems)
    problems.raise_if_any()
    assert near in given.values
    assert far not in given.values
    assert f"--{near}" in caplog.text and "of the command line is used, not" in caplog.text
    assert f"of {file}" in caplog.text


def test_steps_on_the_command_line_win_over_epochs_in_the_file(tmp_path):
    (tmp_path / "a.toml").write_text("max_train_epochs = 10\nlearning_rate = 1e-3\n", encoding="utf-8")
    words = [*NEEDED, "--config_file", str(tmp_path / "a.toml"), "--max_train_steps", "3"]
    config = parse_train_config(words, Problems())
    assert (config.run.max_train_steps, config.run.max_train_epochs) == (3, None)


def test_the_value_that_is_used_is_the_one_that_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "a.toml").write_text("max_train_epochs = 10\nmax_train_steps = 70\n", encoding="utf-8")
    words = [*NEEDED, "--config_file", str(tmp_path / "a.toml"), "--max_train_epochs", "5"]
    assert parse_train_config(words, Problems()).run.max_train_epochs == 5
    assert "--max_train_epochs 5 of the command line is used, not --max_train_steps 70 of" in caplog.text


def test_within_one_place_the_loser_is_named(caplog):
    config = parse_train_config([*NEEDED, "--max_train_steps=9", "--max_train_epochs=2"], Problems())
    assert config.run.max_train_epochs == 2
    assert "--max_train_steps 9 is not used: --max_train_epochs 2 wins over it" in caplog.text


# ---- files of GUIs ------------------------------------------------------------------------------------------


def test_a_file_of_the_gui_runs_and_its_own_keys_are_named_once(tmp_path, caplog):
    file = tmp_path / "gui.toml"
    file.write_text(
        "epoch = 2\nnoise_offset_type = 'Original'\nstop_text_encoder_training = 0\npersistent_data_loader_workers = 1\n"
        "cache_latents = 0\ndynamo_backend = 'no'\nlr_scheduler_args = []\nnetwork_args = []\noptimizer_args = []\n"
        "vae = ''\nresume = ''\nlr_warmup_steps = ''\nmax_token_length = ''\nloraplus_unet_lr_ratio = 16\nseed = ''\n"
        "learning_rate = 0.0001\ntext_encoder_lr = [0.0001]\n",
        encoding="utf-8",
    )
    problems = Problems()
    config = parse_train_config([*NEEDED, "--config_file", str(file)], problems)
    problems.raise_if_any()
    assert config.run.persistent_data_loader_workers is True
    assert config.precision.cache_latents is False
    assert config.run.seed is None and config.text.max_token_length is None
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"{file}: keys of GUIs that a training does not read: epoch, noise_offset_type, "
        "loraplus_unet_lr_ratio (is read in network_args)"
    ]


def test_a_length_of_0_in_a_file_is_unset(tmp_path):
    file = tmp_path / "gui.toml"
    file.write_text("save_every_n_epochs = 0\nmax_train_epochs = 0\nnetwork_dim = 0\nseed = 0\n", encoding="utf-8")
    config = parse_train_config([*NEEDED, "--config_file", str(file)], Problems())
    assert (config.saving.save_every_n_epochs, config.run.max_train_epochs, config.run.seed) == (None, None, 0)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("broken.toml", 'output_dir = "D:\\sd', "is not valid TOML"),
        ("data.toml", "[[datasets]]\nresolution = 64\n", "is a dataset file; give it as --dataset_config"),
        ("gui.json", "{}", "--config_file is a TOML file, got "),
    ],
)
def test_a_file_that_is_none_is_told_alone(tmp_path, name, text, told):
    """Its options would all be told as missing."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse_train_config(["--config_file", str(tmp_path / name)], Problems())
    assert len(caught.value.lines) == 1
    assert told in str(caught.value)


def test_a_configuration_file_is_no_dataset_file(tmp_path):
    (tmp_path / "a.toml").write_text("output_dir = 'o'\ntrain_batch_size = 2\n", encoding="utf-8")
    with pytest.raises(UserError, match="is a configuration file; give it as --config_file"):
        read_datasets(DataConfig(dataset_config=tmp_path / "a.toml"), DatasetOptions(), SubsetOptions())


def test_keys_of_the_gui_are_no_options():
    assert not GUI_KEYS.keys() & root_options(TrainConfig).keys()


@pytest.mark.parametrize("words", [["--dynamo_backend", "no"], ["--dynamo_backend=NO"], ["--zero_stage", "2"]])
def test_a_retired_option_that_is_off_says_nothing(caplog, words):
    if words[0] == "--zero_stage":
        with pytest.raises(UserError, match="--zero_stage is not available"):
            parse(TrainConfig, [*NEEDED, *words])
        return
    parse(TrainConfig, [*NEEDED, "--learning_rate=1", *words])
    assert caplog.text == ""


# ---- values as people write them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["nesterov=False,", "momentum=0.9"], {"nesterov": "False", "momentum": "0.9"}),
        (["nesterov=False, momentum=0.9"], {"nesterov": "False", "momentum": "0.9"}),
        ("nesterov=False momentum=0.9", {"nesterov": "False", "momentum": "0.9"}),
        (["a=1,b=2,"], {"a": "1", "b": "2"}),
        (["betas=(0.9,", "0.99)", "eps=1e-8,"], {"betas": "(0.9, 0.99)", "eps": "1e-8"}),  # as a GUI splits at spaces
        (["betas=0.9,0.999", "d=1"], {"betas": "0.9,0.999", "d": "1"}),
        (["down_lr_weight=1,0,0.5"], {"down_lr_weight": "1,0,0.5"}),
        (["exclude=['a=b, c=d']"], {"exclude": "['a=b, c=d']"}),
        ([",", " conv_dim=4 ,"], {"conv_dim": "4"}),
        (["one=(0.5,)"], {"one": "(0.5,)"}),
        (['name="x, y=2", z=1'], {"name": '"x, y=2"', "z": "1"}),
    ],
)
def test_commas_between_arguments_separate_them(words, pairs):
    assert parse_pairs(words) == pairs


@pytest.mark.parametrize("words", [["a=1", "b"], ["=1"], ["a=1, a=2"], [3], ["a=1,", "0.9"]])
def test_what_is_no_list_of_arguments_is_refused(words):
    with pytest.raises(ValueError, match=r"has no key and value|is given twice"):
        parse_pairs(words)


def test_arguments_of_several_networks_may_have_commas():
    assert parse_pair_lists(["preset=a; b=1,", "c=2, d=3"]) == ({"preset": "a", "b": "1"}, {"c": "2", "d": "3"})


@pytest.mark.parametrize(
    ("words", "flag", "value"),
    [
        (["--text_encoder_lr", "1e-4,", "2e-4"], "text_encoder_lr", (1e-4, 2e-4)),
        (["--text_encoder_lr", "1e-4,2e-4"], "text_encoder_lr", (1e-4, 2e-4)),
        (["--base_weights_multiplier", "0.5", ",", "1"], None, None),
        (["--base_weights", "a.safetensors,", "b.safetensors"], "base_weights", (Path("a.safetensors"), Path("b.safetensors"))),
    ],
)  # fmt: skip
def test_commas_in_lists_of_numbers_and_paths(words, flag, value):
    problems = Problems()
    config = parse_train_config([*NEEDED, *words], problems)
    if flag is None:
        with pytest.raises(UserError, match="--base_weights_multiplier must be a list of float, got"):
            problems.raise_if_any()
    else:
        assert flag_values(config)[flag] == value


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("SGD", {"nesterov": "(False,)"}, "--optimizer_args: nesterov of SGD must be True or False, got (False,)"),
        ("AdamW", {"weight_decay": "'much'"}, "--optimizer_args: weight_decay of AdamW must be a number, got 'much'"),
        ("AdamW", {"betas": "0.9"}, "--optimizer_args: betas of AdamW must be 2 values as in (0.9, 0.999), got 0.9"),
        ("AdamW", {"weight_decy": "1"}, "--optimizer_args: AdamW has no weight_decy; did you mean weight_decay?"),
        ("AdamW", {"lr": "1"}, "--optimizer_args: lr is given by --learning_rate, got lr=1"),
        (
            "AdamW",
            {"eps": "-1.0"},
            "--optimizer_args eps=-1.0 is refused: --optimizer_args: AdamW refuses them: Invalid",
        ),
        ("Prodigy", {"d_coef": "(1,)"}, "--optimizer_args: d_coef of Prodigy must be a number, got (1,)"),
        ("AdaFactor", {"eps": "1"}, "--optimizer_args: eps of Adafactor must be 2 values as in (1e-30, 0.001), got 1"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(name, arguments, told):
    with pytest.raises(UserError) as caught:
        check_optimizer(choose_optimizer(OptimizerConfig(optimizer_type=name, optimizer_args=arguments)), 1e-3)
    assert told in str(caught.value)
    assert len(caught.value.lines) == 1


def test_arguments_are_read_in_the_type_of_their_defaults():
    given = {"amsgrad": "1", "maximize": "0", "betas": "[0.8, 0.9]", "weight_decay": "1"}
    choice = choose_optimizer(OptimizerConfig(optimizer_type="AdamW", optimizer_args=given))
    assert choice.arguments == {
        "fused": True, "amsgrad": True, "maximize": False, "betas": (0.8, 0.9), "weight_decay": 1,
    }  # fmt: skip
    assert type(choice.arguments["amsgrad"]) is bool
    check_optimizer(choice, 1e-3)


def test_all_wrong_arguments_are_told_together():
    given = {"amsgrad": "yes", "betas": "0.9", "nonsense": "1"}
    with pytest.raises(UserError) as caught:
        choose_optimizer(OptimizerConfig(optimizer_type="AdamW", optimizer_args=given))
    assert len(caught.value.lines) == 3


# ---- paths of Windows ---------------------------------------------------------------------------------------


def test_a_backslash_that_breaks_toml_is_explained(tmp_path):
    file = tmp_path / "a.toml"
    for line, shown in {
        'image_dir = "D:\\SD\\img"': r"write 'D:\SD\img' in single quotes, or D:/SD/img",
        'paths = ["C:\\Users\\me\\a", "b"]': r"write 'C:\Users\me\a' in single quotes, or C:/Users/me/a",
        'vae = "E:\\my models\\v.pt" # "x"': r"write 'E:\my models\v.pt' in single quotes",
        'image_dir = "\\\\server\\share"': r"write '\\server\share' in single quotes, or //server/share",
    }.items():
        file.write_text(f"seed = 1\n{line}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"line 2") as caught:
            parse(TrainConfig, [*NEEDED, "--config_file", str(file)])
        assert shown in str(caught.value)


def test_a_backslash_that_breaks_json_is_explained(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"general":\n {"image_dir": "D:\\SD\\img"}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"begins an escape: write D:/SD/img$"):
        read_datasets(DataConfig(dataset_config=file), DatasetOptions(), SubsetOptions())


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"C:\new\train", "C:/new/train"), (r"D:\tmp\files", "D:/tmp/files"), (r"E:\back\ready", "E:/back/ready")],
)
@pytest.mark.parametrize("key", ["image_dir", "output_dir", "pretrained_model_name_or_path", "base_weights"])
def test_a_path_that_escapes_changed_is_explained_in_one_line(tmp_path, key, written, meant):
    file = tmp_path / "a.toml"
    with pytest.raises(UserError) as caught:
        if key == "image_dir":
            text = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{written}"\n'
            file.write_text(text, encoding="utf-8")
            read_datasets(DataConfig(dataset_config=file), DatasetOptions(), SubsetOptions())
        else:
            file.write_text(f'{key} = "{written}"\n', encoding="utf-8")
            needed = [word for word in NEEDED if not word.startswith(f"--{key}")]
            parse(TrainConfig, ["--config_file", str(file), *(needed if len(needed) == len(NEEDED) else [])])
    (line,) = [line for line in caught.value.lines if key in line and "escape" in line]
    assert f"write '{written}' in single quotes, or {meant}" in line


def test_a_value_never_breaks_a_message_in_two():
    problems = Problems()
    problems.add("a\nb", "c")
    problems.run(check_all_of, "d\te\u2028f")
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    assert caught.value.lines == (r"a\nb", "c", r"no file d\te\u2028f")
    assert str(caught.value).splitlines() == list(caught.value.lines)


def check_all_of(value):
    raise UserError(f"no file {value}")


# ---- all mistakes together ----------------------------------------------------------------------------------


def test_all_mistakes_of_command_line_file_and_paths_are_told_together(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("netwrk_dim = 4\nseed = 'x'\nlosstype = 'l2'\nvae = 'absent.pt'\n", encoding="utf-8")
    words = [
        "--config_file",
        str(file),
        "--lerning_rate",
        "1",
        "--max_train_steps",
        "0",
        "--deepspeed",
        "--resolution=9",
    ]
    problems = Problems()
    config = locate_models(parse_train_config(words, problems), problems)
    check(config, problems)
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    text = str(caught.value)
    for told in (
        "netwrk_dim is not known; did you mean network_dim?",
        "losstype is not known; did you mean loss_type?",
        "seed must be a whole number, got 'x'",
        "--lerning_rate is not known; did you mean learning_rate?",
        "--max_train_steps must be at least 1, got 0",
        "--deepspeed is not available",
        "--resolution must be one number",
        "--network_module is missing",
        "--vae: absent.pt does not exist",
    ):
        assert told in text
    assert "--resolution is missing" not in text  # it was there
    assert len(set(caught.value.lines)) == len(caught.value.lines)


QUOTES_OF_A_VALUE = "does not exist; the quotes are part of the value: Windows' cmd takes only double quotes"


@pytest.mark.parametrize(
    ("option", "value"), [("dataset_config", "'a.toml'"), ("vae", "\u201cv.ckpt"), ("in_json", "`m`")]
)
def test_quotes_that_are_part_of_a_path_are_told(option, value):
    problems = Problems()
    config = parse_train_config([*NEEDED, f"--{option}={value}", "--resolution=64"], problems)
    check(locate_models(config, problems), problems)
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    assert any(line.startswith(f"--{option}: {value} {QUOTES_OF_A_VALUE}") for line in caught.value.lines)
    with pytest.raises(UserError, match=r"^--model: 'a b.safetensors' does not exist; the quotes are part"):
        resize_lora.main(["--model", "'a b.safetensors'", "--save_to", "o.safetensors"])
    with pytest.raises(UserError, match=f"{QUOTES_OF_A_VALUE}$"):
        toml_text.load_json(Path("'a.json'"))


def test_all_unknown_keys_of_a_dataset_file_are_told_together(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(
        "resolution = 64\n[general]\nrepeats = 3\n[[datasets]]\ntrain_batch_size = 2\nresolution = 9\n"
        "[[datasets.subsets]]\ncaption_ext = '.txt'\nbatch_size = 1\nimage_dir = 'x'\n[[datasets.subsets]]\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError) as caught:
        read_datasets(DataConfig(dataset_config=file), DatasetOptions(), SubsetOptions())
    for told, line in zip(
        (
            "resolution does not belong here: it is set in [general], [datasets]",
            "general.repeats is not known; did you mean num_repeats?",
            "datasets[0].train_batch_size is not known: it is batch_size in a dataset file",
            "datasets[0].resolution must be one number",
            "datasets[0].subsets[0].caption_ext is not known; did you mean caption_extension?",
            "datasets[0].subsets[0].batch_size does not belong here",
            "datasets[0].subsets[1].image_dir is missing",
            "resolution is missing",
        ),
        caught.value.lines,
        strict=True,
    ):
        assert told in line


@pytest.mark.parametrize(
    ("word", "told"),
    [("\u2014cache_latents", "two hyphens: --cache_latents"), ("^", "continues a line"), ("x", "after its")],
)
def test_a_word_that_belongs_to_no_option_is_explained(word, told):
    with pytest.raises(UserError, match=told):
        parse(TrainConfig, [*NEEDED, "--seed", "1", word])


# ---- prompt lines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "a girl -w 64 -h 64",
        "a girl \u2014w 64",
        "a girl --n bad \u2013h 64 --s 3",
        "x -d 1 --w 64",
        "a \uff0d\uff0dw 64",
    ],
)
def test_options_with_one_dash_are_warned_of(caplog, line):
    parse_line(line, "p.txt:1")
    assert "with two dashes" in caplog.text


@pytest.mark.parametrize("line", ["a girl --w 64", "sci-fi x-ray -5 degrees", "a - w", "one -w"])
def test_other_dashes_are_not(caplog, line):
    parse_line(line, "p.txt:1")
    assert caplog.text == ""


@pytest.mark.parametrize("space", ["\t", "  ", "\u3000", " \t "])
def test_any_white_space_separates_options_from_their_values(space):
    read = parse_line(f"a cat{space}--w{space}64{space}--n{space}bad one{space}--d{space}1,2", "p.txt:1")
    assert (read.prompt, read.width, read.negative_prompt, read.seeds) == ("a cat", 64, "bad one", (1, 2))


def test_annotations_of_conditions_are_tuples_of_names():
    """A condition without its comma would be read letter by letter."""
    for root in ROOTS.values():
        for entry in all_options(root).values():
            for field in ("only_with", "not_with", "wins_over", "excludes"):
                assert isinstance(getattr(entry.spec, field), tuple), (entry.flag, field)
    assert typing.get_type_hints(type(entry.spec))["only_with"] == tuple[str, ...]
