"""Bad files of options, datasets, captions and prompts, each a row of a table; see `refusals.Refused`."""

from __future__ import annotations

import json

import pytest
from refusals import rows, write
from runs import BY_FILE

CONFIG_FILES = {
    "no TOML": ("network_dim = ", "c.toml is not valid TOML: Invalid value"),
    "brackets": ("x = " + "[" * 5000, "c.toml is not valid TOML: maximum recursion depth"),
    "not UTF-8": (
        "output_name = 'é'".encode("latin-1"),
        "c.toml is not UTF-8 text (probably Windows-1252",
        "save it as",
    ),
    "Shift JIS": (
        "output_name = '赤い花'".encode("cp932"),
        "c.toml is not UTF-8 text (probably cp932 (Shift JIS)): save",
    ),
    "UTF-16": ("network_dim = 4".encode("utf-16"), "c.toml is not UTF-8 text (probably UTF-16): save it as UTF-8"),
    "unknown key": ("[a]\nnetwrk_dim = 4", "c.toml: netwrk_dim is not known; did you mean network_dim?"),
    "rate of 0 for one encoder": ("text_encoder_lr1 = 0.0", "c.toml: text_encoder_lr1 is not available: the rates of"),
    "retired": ("dataset_class = 'mine'", "c.toml: dataset_class is not available: a foreign dataset class"),
    "of another type": ("network_dim = 4.5", "c.toml: network_dim must be a whole number, got 4.5"),
    "a date": ("network_dim = 1979-05-27", "c.toml: network_dim must be a whole number, got datetime.date"),
    "a list": ("wandb_run_name = ['a']", "c.toml: wandb_run_name must be a text, got ['a']"),
    "a switch as text": ("xformers = 'yes'", "c.toml: xformers must be true or false, got 'yes'"),
    "infinite": ("lr_warmup_steps = inf", "c.toml: lr_warmup_steps must be", "got inf"),
    "a file name with a NUL": ('vae = "a\\u0000b"', "c.toml: vae must be a path, got 'a\\x00b'"),
    "a key of the dataset file": ("image_dir = 'x'", "c.toml: image_dir is not known"),
    "a secret is not shown": ("wandb_api_key = 12345", "c.toml: wandb_api_key must be a text, got something else"),
}
DATASETS = {
    "empty": ("d.toml", "", "d.toml: no [[datasets]] table"),
    "one bracket": ("d.toml", "[datasets]\nresolution = 64", "d.toml: no [[datasets]] table"),
    "another ending": ("d.yaml", "", "--dataset_config must be a .toml or .json file, got "),
    "no table": ("d.toml", "datasets = [1]", "d.toml: datasets[0] must be a table, got 1"),
    "subsets are no list": ("d.toml", "[[datasets]]\nsubsets = 3", "datasets[0].subsets must be an array of", "got 3"),
    "unknown key": ("d.toml", "IMG num_repeat = 3", "subsets[0].num_repeat is not known; did you mean num_repeats?"),
    "key of a dataset": ("d.toml", "IMG batch_size = 3", "batch_size does not belong here: it is set in [general], "),
    "no folder": ("d.toml", "[[datasets]]\nsubsets = [{}]", "datasets[0].subsets[0].image_dir is missing"),
    "folder is a number": ("d.toml", "[[datasets]]\nsubsets = [{image_dir = 3}]", "image_dir must be a path, got 3"),
    "absent folder": (
        "d.toml",
        "[[datasets]]\nresolution = 64\nsubsets = [{image_dir = 'no'}]",
        "image_dir no does not exist",
    ),
    "separator": ("d.toml", "IMG caption_separator = ''", "caption_separator must be a text of at least one", "''"),
    "range": ("d.toml", "IMG face_crop_aug_range = [nan, 2]", 'face_crop_aug_range must be "LOW,HIGH"', "[nan, 2]"),
    "endless": ("d.toml", "IMG token_warmup_step = inf", "token_warmup_step must be a finite number, got inf"),
    "repeated for ever": (
        "d.toml",
        "IMG num_repeats = 100000000000",
        "num_repeats must be at most 1000000, got 100000000000",
    ),
    "never repeated": ("d.toml", "IMG num_repeats = 0", "no subset to train on in ", "num_repeats of 1 or more"),
    "all held out": (
        "d.toml",
        "IMG validation_split = 1.0",
        "validation_split holds out all 4 pictures in ",
        "lower it",
    ),
    "mask without loss": (
        "d.toml",
        "IMG conditioning_data_dir = 'train/1_sks dog'",
        "masks for the loss: add --masked_loss",
    ),
    "no JSON": ("d.json", '{"datasets":', "d.json is not valid JSON: Expecting value: line 1 column 13"),
    "JSON of brackets": ("d.json", "[" * 100_000, "d.json is not valid JSON: maximum recursion depth"),
    "JSON of digits": ("d.json", '{"datasets": [' + "9" * 5000 + "]}", "d.json is not valid JSON: Exceeds the limit"),
    "JSON list": ("d.json", "[]", "d.json must be a table, got []"),
    "JSON null": ("d.json", '{"general": null}', "d.json: general must be a table, got None"),
    "half a character": (
        "d.json",
        '{"datasets": [{"resolution": 64, "subsets": [{"image_dir": "a", "class_tokens": "\\ud800"}]}]}',
        "datasets[0].subsets[0].class_tokens must be a text, got '\\ud800'",
    ),
    "JSON in UTF-16": ("d.json", "{}".encode("utf-16"), "d.json is not UTF-8 text (probably UTF-16): save it"),
    "JSON in Shift JIS": (
        "d.json",
        '{"a": "写真"}'.encode("cp932"),
        "d.json is not UTF-8 text (probably cp932 (Shift JIS))",
    ),
}
METADATA = {
    "empty": ("m.json", "", "m.json cannot be read: Expecting value: line 1"),
    "not UTF-8": (
        "m.json",
        '{"0": {"caption": "é"}}'.encode("latin-1"),
        "m.json is not UTF-8 text (probably Windows-1252 (Latin-1)): save it",
    ),
    "no object": ("m.json", "[]", "m.json must be an object of picture names, got list"),
    "no pictures": ("m.json", "{}", "no pictures (.png, .jpg", "m.json"),
    "an entry is a number": ("m.json", '{"0": 3}', "m.json must have texts as caption and tags:\n  0: got 3"),
    "tags are a list": (
        "m.json",
        '{"0": {"tags": ["a"]}}',
        "1 entries of metadata_file",
        "0: got {'tags': ['a']}",
    ),
    "half a character": ("m.json", '{"0": {"caption": "\\ud800"}}', "must have texts as caption", "\\ud800"),
    "absent pictures": (
        "m.json",
        '{"a": {}, "b": {}, "0": {}}',
        "2 of 3 pictures of ",
        "are not there; they",
        "\n  a\n  b",
    ),
    "a name of 5000 letters": ("m.json", json.dumps({"a" * 300: {}}), "1 of 1 pictures of ", "\n  aaaa"),
    "the root as a picture": ("m.json", '{"/": {}}', "1 of 1 pictures of ", "\n  /"),
    "brackets": ("m.json", "[" * 100_000, "m.json cannot be read: maximum recursion depth"),
    "line cut short": ("m.jsonl", '{"image_path": "0"}\n{"image_pa', "1 lines of ", "line 2: Unterminated"),
    "line without a picture": ("m.jsonl", '{"caption": "a"}', "line 1: got {'caption': 'a'}"),
    "picture is a number": ("m.jsonl", '\n{"image_path": 3}', "line 2: got {'image_path': 3}"),
}
PROMPTS = {
    "empty": ("p.txt", "# nothing\n", "p.txt has no prompts"),
    "another ending": ("p.yaml", "a", "--sample_prompts must be a .txt, .toml or .json file, got"),
    "not UTF-8": ("p.txt", b"\xe9", "p.txt is not UTF-8 text (probably Windows-1252"),
    "Shift JIS": ("p.txt", "赤い花".encode("cp932"), "p.txt is not UTF-8 text (probably cp932 (Shift JIS)): save it"),
    "unknown option": ("p.txt", "a\nb --q 3", "p.txt:2: --q is not known (known: --n --w --h"),
    "an option of drawing": (
        "p.txt",
        "a --ow 3",
        "p.txt:1: --ow is an option of gen_img_diffusers.py, which previews do",
    ),
    "width in words": ("p.txt", "a --w big", "p.txt:1: --w must be a whole number, got 'big'"),
    "no width": ("p.txt", "a --w", "p.txt:1: --w must be a whole number, got ''"),
    "vast width": ("p.txt", "a --w 99999999", "p.txt:1: --w must be at most 16384, got 99999999"),
    "vast seed": ("p.txt", f"a --d {10**30}", f"p.txt:1: --d must be at most {2**63 - 1}, got 1000"),
    "scale is NaN": ("p.txt", "a --l nan", "p.txt:1: --l must be a finite number, got nan"),
    "unknown sampler": ("p.txt", "a --ss eulr", "p.txt:1: --ss must be one of ddim, pndm", "got 'eulr'"),
    "no table": ("p.toml", "x = 3", "p.toml has no [prompt] table"),
    "no prompt": ("p.toml", "[prompt]\nwidth = 64", "p.toml: prompt.subset[0]: prompt is missing"),
    "unknown key": ("p.toml", "[prompt]\nwidh = 64", "prompt.subset[0]: widh is not known; did you mean width?"),
    "prompt is a number": ("p.toml", "[prompt]\nprompt = 3", "prompt.subset[0]: prompt must be a text, got 3"),
    "width is infinite": ("p.toml", "[prompt]\nprompt = 'a'\nwidth = inf", "width must be a whole number", "got inf"),
    "height is a switch": ("p.toml", "[prompt]\nprompt = 'a'\nheight = true", "height must be a whole", "got True"),
    "one subset": ("p.toml", "[prompt.subset]\nprompt = 'a'", "prompt.subset must be an array of tables"),
    "JSON object": ("p.json", "{}", "p.json must hold a list of texts or objects, got {}"),
    "JSON number": ("p.json", '["a", 3]', "p.json[1] must be a text or an object, got 3"),
    "JSON null": ("p.json", '[{"prompt": null}]', "p.json[0]: prompt is missing"),
    "JSON infinite": ("p.json", '[{"prompt": "a", "scale": Infinity}]', "p.json[0]: scale must be a finite number"),
    "JSON digits": ("p.json", '[{"prompt": "a", "width": ' + "9" * 5000 + "}]", "p.json is not valid JSON: Exceeds"),
    "half a character": ("p.json", '[{"prompt": "\\ud800"}]', "p.json[0]: prompt must be a text, got '\\ud800'"),
}
FOLDER_NAMED = ("dataset_config", "network_weights", "base_weights", "sample_prompts", "log_tracker_config")


@rows(CONFIG_FILES)
def test_files_of_options(refused, tmp_path, case):
    content, *fragments = case
    message = refused({"config_file": write(tmp_path / "c.toml", content)}, *fragments)
    assert "12345" not in message


@rows(DATASETS)
def test_dataset_files(refused, tmp_path, pictures, case):
    name, content, *fragments = case
    if isinstance(content, str) and content.startswith("IMG "):
        head = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{pictures / '1_sks dog'}'\n"
        content = head + content.removeprefix("IMG ")
    refused({"dataset_config": write(tmp_path / name, content), **BY_FILE}, *fragments)


@rows(METADATA)
def test_metadata_files(refused, tmp_path, pictures, case):
    name, content, *fragments = case
    refused({"in_json": write(tmp_path / name, content), "train_data_dir": pictures / "1_sks dog"}, *fragments)


@rows(PROMPTS)
def test_prompt_files(refused, tmp_path, case):
    name, content, *fragments = case
    refused({"sample_prompts": write(tmp_path / name, content), "sample_every_n_steps": 1}, *fragments)


@pytest.mark.parametrize("option", FOLDER_NAMED)
def test_a_folder_where_a_file_is_wanted(refused, option):
    given = {option: ["train"] if option == "base_weights" else "train", "sample_at_first": option == "sample_prompts"}
    refused(given | ({"train_data_dir": None} if option == "dataset_config" else {}), f"--{option}: train is a folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[tensorboard]\nfoo = 3", "tensorboard.foo is not known"), ("[foo]", "foo is not known: the tables are [")],
)
def test_files_for_the_trackers(refused, tmp_path, content, message):
    path = write(tmp_path / "t.toml", content)
    refused({"log_tracker_config": path, "logging_dir": tmp_path / "logs"}, "t.toml: ", message)
