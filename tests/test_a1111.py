"""Pictures of AUTOMATIC1111, Forge and other programs are drawn again, and ours are drawn there; what differs is told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from drawing import HIGHRES
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.generation import a1111, recorded

SETTINGS = "Steps: 2, Sampler: DDIM, CFG scale: 4, Seed: 5, Size: 64x64"
LORA = ["--network_module", "networks.lora", "--network_weights"]


def pictured(path: Path, text: str, key: str = "parameters") -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    Image.new("RGB", (64, 72)).save(path, pnginfo=info)
    return path


def read(tmp_path: Path, text: str) -> recorded.Recorded:
    return recorded.read_recorded(pictured(tmp_path / "read.png", text))


# ---- networks in prompts ------------------------------------------------------------------------------------


TAGS: dict[str, tuple[str, str, dict[str, float]]] = {
    "one": ("a fox <lora:px:0.5>", "a fox", {"px": 0.5}),
    "several, some within words": ("a<lora:px:0.5>fox, <lyco:other one:-.25> b", "afox,  b", {"px": 0.5, "other one": -0.25}),
    "without a strength": ("<lora:px>\na fox", "a fox", {"px": 1.0}),
    "for text encoder and U-Net": ("a <lora:px:0.5:0.75>", "a", {"px": 0.75}),
    "by names": ("a <lora:px:te=0.3:unet=0.6>", "a", {"px": 0.6}),
    "twice": ("a <lora:px:0.5> <lora:px:0.25>", "a", {"px": 0.5}),  # the last one, twice
    "with brackets, commas and dots": ("(a:1.2) <lora:my, (v2.1) px:1>", "(a:1.2)", {"my, (v2.1) px": 1.0}),
    "others": ("a <hypernet:hn:0.7> [b|c] <wibble:x>", "a  [b|c]", {}),
    "none": ("a < b: c > d, 1 <2: 3", "a < b: c > d, 1 <2: 3", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAGS)
def test_networks_are_taken_out_of_prompts(tmp_path, name):
    text, prompt, networks = TAGS[name]
    record = read(tmp_path, f"{text}\nNegative prompt: bad <lora:neg:0.1> <3\n{SETTINGS}")
    assert record.request.prompt == prompt
    assert record.request.negative_prompt == "bad  <3"
    assert {network.name: network.strength for network in record.networks} == networks
    assert record.told[-1] == "<lora:neg:0.1> in the negative prompt is left out: networks stand in the prompt alone"
    assert ("names the network px 2 times: it is drawn with its last strength (0.25)" in record.told[0]) is (
        name == "twice"
    )


@pytest.mark.parametrize(
    ("tag", "told"),
    [
        ("<lora:px:0.5:1>", "the strength 0.5 for the text encoder of <lora:px:0.5:1>"),
        ("<lora:px:1:1:8:lbw=OUTALL>", "lbw=OUTALL, 8 of <lora:px:1:1:8:lbw=OUTALL>"),
        ("<lora:px:strong>", "<lora:px:strong>"),
        ("<lora:px:nan>", "<lora:px:nan>"),
        ("<hypernet:hn:0.7>", "<hypernet:hn:0.7>"),
    ],
)
def test_what_a_network_has_beyond_its_strength_is_told(tmp_path, tag, told):
    assert read(tmp_path, f"a {tag}\n{SETTINGS}").left == (told,)


def renamed(path: Path, name: str, **metadata: str) -> Path:
    save_file(load_file(path), path.parent / name, metadata)
    return path.parent / name


@pytest.fixture
def network(two, tmp_path):
    """Return a LoRA file, and what draws with it at a strength."""
    path = tmp_path / "mine.safetensors"
    save_file(load_file(two[0][0]), path, {"ss_output_name": "the alias"})
    return path


def digest_of(path: Path) -> str:
    """Return the hash by which AUTOMATIC1111 knows a network."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("how", ["name", "alias", "hash", "hash of the file", "case"])
def test_a_network_is_found_among_the_files(draw, network, tmp_path, caplog, how):
    name = {"name": "mine", "alias": "the alias", "case": "MINE"}.get(how, "elsewhere")
    digest = {
        "hash": digest_of(network)[:12],
        "hash of the file": hashlib.sha256(network.read_bytes()).hexdigest()[:10],
    }
    hashes = f', Lora hashes: "{name}: {digest[how]}"' if how in digest else ""
    picture = pictured(tmp_path / "a.png", f"a cat <lora:{name}:0.5>\n{SETTINGS}{hashes}")
    with caplog.at_level("WARNING"):
        (found,) = draw("--from_picture", picture, *LORA, network, "--network_mul", 0.9)
    assert "network" not in caplog.text
    (expected,) = draw("--prompt", "a cat --d 5", *LORA, network, "--network_mul", 0.5)
    assert np.array_equal(found.pixels, expected.pixels)
    assert json.loads(found.texts["generation"])["networks"][0]["strength"] == 0.5


def test_networks_are_found_in_any_order_and_others_are_told(draw, two, network, tmp_path, caplog):
    files = [network, two[0][1]]
    text = f"a cat <lora:net1:0.25> <lora:lost one:0.7> <lora:mine:-0.5>\n{SETTINGS}"
    text += f', Lora hashes: "net1: {digest_of(two[0][1])[:12]}, mine: 0123456789ab"'
    picture = pictured(tmp_path / "a.png", text)
    modules = ["--network_module", "networks.lora", "networks.lora", "--network_weights"]
    with caplog.at_level("WARNING"):
        (found,) = draw("--from_picture", picture, *modules, *files)
    told = [network["strength"] for network in json.loads(found.texts["generation"])["networks"]]
    assert told == [-0.5, 0.25]
    assert "the network lost one at 0.7 of a picture is not among --network_weights: it is left out" in caplog.text
    assert "mine.safetensors has the name of a picture's network, but is another file" in caplog.text
    assert found.texts["prompt"] == "a cat"


def test_a_network_that_the_picture_does_not_have_keeps_its_strength(draw, network, tmp_path, caplog):
    picture = pictured(tmp_path / "a.png", f"a cat\n{SETTINGS}")
    with caplog.at_level("WARNING"):
        (found,) = draw("--from_picture", picture, *LORA, network, "--network_mul", 0.5)
    assert "a picture was drawn with other networks (none) than --network_weights has" in caplog.text
    (expected,) = draw("--prompt", "a cat --d 5", *LORA, network, "--network_mul", 0.5)
    assert np.array_equal(found.pixels, expected.pixels)


# ---- settings and lines -------------------------------------------------------------------------------------


LINES = {
    "templates": f"a fox\nNegative prompt: bad\n{SETTINGS}\nTemplate: a {{fox|owl}}\nNegative Template: {{bad|worse}}",
    "a template of several lines": f"a fox\nNegative prompt: bad\n{SETTINGS}\nTemplate: a {{fox|owl}},\nSteps: 9 of them",
    "a value of several lines": f'a fox\nNegative prompt: bad\n{SETTINGS}, Wildcard prompt: "a __x__,\nSeed: 3"\nfoo',
    "escaped line breaks": f'a fox\nNegative prompt: bad\n{SETTINGS}, Wildcard prompt: "a \\"x\\",\\nSeed: 3"',
    "other line ends": f"a fox\r\nNegative prompt: bad\r\n{SETTINGS}\r\nTemplate: x\r\n",
    "blank lines": f"a fox\nNegative prompt: bad\n{SETTINGS}\n\nTemplate: x\n\n",
    "a word without a value": f"a fox\nNegative prompt: bad\n{SETTINGS.replace(', Seed', ', oops, Seed')}",
}


@pytest.mark.parametrize("name", LINES)
def test_lines_and_values_of_extensions_do_no_harm(tmp_path, name):
    record = read(tmp_path, LINES[name])
    request = record.request
    assert (request.prompt, request.negative_prompt) == ("a fox", "bad")
    assert (request.steps, request.seed, request.sampler, request.width) == (2, 5, "ddim", 64)
    assert record.left == ()


def test_a_prompt_that_looks_like_settings_stays_a_prompt(tmp_path):
    prompt = "Steps: 9, Sampler: Euler, CFG scale: 1, Seed: 8\nSteps: many"
    assert read(tmp_path, f"{prompt}\n{SETTINGS}").request.prompt == prompt


LEFT = {
    "Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent": None,
    "Variation seed: 123, Variation seed strength: 0.2": None,
    "Schedule type: Karras": None,
    "ENSD: 31337, Eta: 0.5, RNG: NV": None,
    'ControlNet 0: "Module: canny, Model: x"': "ControlNet 0: Module: canny, Model: x",
    "ADetailer model: face_yolov8n.pt, ADetailer confidence: 0.3": None,
    "Refiner: sd_xl_refiner, Refiner switch at: 0.8": None,
    "Token merging ratio: 0.5, FreeU Stages: 1": None,
    "Denoising strength: 0.4": None,
    "Dynamic thresholding enabled: True": None,
}


@pytest.mark.parametrize("text", LEFT)
def test_settings_that_are_not_used_are_named_in_one_warning(draw, tmp_path, caplog, text):
    picture = pictured(tmp_path / "a.png", f"a cat\n{SETTINGS}, {text}, Version: v1.10.1, Clip skip: 2")
    with caplog.at_level("WARNING"):
        draw("--from_picture", picture)
    said = [record.message for record in caplog.records if "the picture will differ" in record.message]
    assert said == [f"{picture}: the picture will differ, for this is not used: {LEFT[text] or text}"]


def test_settings_that_change_nothing_are_not_told(draw, tmp_path, caplog):
    quiet = "RNG: CPU, ENSD: 0, Variation seed strength: 0, Schedule type: Uniform, Emphasis: Original, User: me"
    with caplog.at_level("WARNING"):
        draw("--from_picture", pictured(tmp_path / "a.png", f"a cat\n{SETTINGS}, {quiet}, Version: f2.0.1v1.10.1"))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("word", "schedule", "name", "told"),
    [
        ("DPM++ 2M Karras", "", "dpmsolver++", ["Schedule type: Karras"]),
        ("DPM++ 2M", "Karras", "dpmsolver++", ["Schedule type: Karras"]),
        ("DPM++ 2M", "Automatic", "dpmsolver++", ["Schedule type: Automatic, which is Karras there"]),
        ("DPM++ 2M", "Uniform", "dpmsolver++", []),
        ("DPM2 a Karras", "", "dpm_2_a", ["Schedule type: Karras"]),
        ("LMS Exponential", "", "lms", ["Schedule type: Exponential"]),
        ("Euler a", "Automatic", "euler_a", []),
        ("EULER A", "", "euler_a", []),
        ("k_euler", "", "k_euler", []),
        ("UniPC", "Simple", None, ["Schedule type: Simple"]),
    ],
)
def test_samplers_have_older_and_newer_names(word, schedule, name, told):
    assert a1111.sampler_of(word, schedule) == (name, told)


def test_the_size_is_that_of_the_picture_where_it_is_not_said(tmp_path):
    request = read(tmp_path, f"a\n{SETTINGS.replace(', Size: 64x64', '')}").request
    assert (request.width, request.height) == (64, 72)


def test_embeddings_of_a_picture_are_asked_for(draw, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        draw("--from_picture", pictured(tmp_path / "a.png", f'a\n{SETTINGS}, TI hashes: "bad: 12, worse: 34"'))
    assert "a picture has embeddings (bad, worse) that --textual_inversion_embeddings lacks" in caplog.text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"workflow": "{}"}, "is of ComfyUI, whose records cannot be read here; give the prompt by --prompt"),
        ({"prompt": '{"3": {}}'}, "is of ComfyUI"),
        ({"invokeai_metadata": "{}"}, "is of InvokeAI"),
        ({"Software": "NovelAI", "Comment": "{}"}, "is of NovelAI"),
        ({"Software": "GIMP", "Comment": "x"}, "does not say how it was drawn"),
        ({"parameters": "a fox, Steps: 3"}, "has no settings"),
        ({"parameters": f"a\n{SETTINGS}, Lora strengths: x: y"}, "Lora strengths: the strength of x must be a number"),
        ({"parameters": " "}, "does not say how it was drawn"),
    ],
)
def test_what_cannot_be_read_is_called_what_it_is(tmp_path, texts, message):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match=message):
        recorded.read_recorded(tmp_path / "a.png")


BAD_SETTINGS = [
    ("Size", "65x63", ["Size: 65x63: the width must be a multiple of 8, got 65", "Size: 65x63: the height must be at"]),
    ("Size", "64x32", ["Size: 64x32: the height must be at least 64, got 32"]),
    ("Size", "64 by 64", ["Size must be widthxheight in pixels, such as 512x768, got '64 by 64'"]),
    ("Size", "64x99999", ["Size: 64x99999: the height must be at most 16384, got 99999"]),
    ("Steps", "0", ["Steps must be at least 1, got 0"]),
    ("Steps", "4.0", ["Steps must be a whole number, got '4.0'"]),
    ("CFG scale", "abc", ["CFG scale must be a number, got 'abc'"]),
    ("CFG scale", "inf", ["CFG scale must be a finite number, got inf"]),
    ("Seed", "-1", ["Seed must be at least 0, got -1"]),
    ("Clip skip", "99", ["Clip skip must be at most 12, got 99"]),
    ("Denoising strength", "1.5", ["Denoising strength must be at most 1, got 1.5"]),
]


@pytest.mark.parametrize(("key", "value", "parts"), BAD_SETTINGS)
def test_settings_that_no_run_can_have_are_named(tmp_path, key, value, parts):
    pairs = dict(pair.split(": ") for pair in SETTINGS.split(", ")) | {key: value}
    with pytest.raises(UserError) as error:
        read(tmp_path, "a\n" + ", ".join(f"{name}: {text}" for name, text in pairs.items()))
    assert len(error.value.lines) == len(parts)
    for line, part in zip(error.value.lines, parts, strict=True):
        assert line.startswith(f"{tmp_path / 'read.png'}: {part}")


OWN = {"prompt": "a", "seed": 5, "width": 64, "height": 64, "steps": 2, "scale": 4.0, "sampler": "ddim"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 65}, "its text 'generation': width must be a multiple of 8, got 65"),
        ({"steps": 0}, "its text 'generation': steps must be at least 1, got 0"),
        ({"seed": "x"}, "its text 'generation': seed must be a whole number, got 'x'"),
        ({"sampler": "wobbly"}, "was drawn with the sampler 'wobbly', which is not here"),
    ],
)
def test_numbers_of_our_own_pictures_are_checked(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        recorded.read_recorded(pictured(tmp_path / "a.png", json.dumps(OWN | changed), "generation"))


def keyed(path: Path, keys: dict[str, str]) -> Path:
    """Write a picture with the keys of sd-scripts."""
    info = PngImagePlugin.PngInfo()
    for key, text in keys.items():
        info.add_text(key, text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return path


def test_keys_of_sd_scripts_are_named(tmp_path):
    keys = {"prompt": "a", "seed": "5", "steps": "many", "scale": "4", "sampler": "ddim"}
    with pytest.raises(UserError, match="a.png: steps must be a whole number, got 'many'"):
        recorded.read_recorded(keyed(tmp_path / "a.png", keys))
    record = recorded.read_recorded(keyed(tmp_path / "b.png", {"prompt": "a", "steps": "3"}), 9)
    assert (record.request.seed, record.request.steps, record.request.scale, record.request.sampler) == (
        9,
        3,
        None,
        None,
    )
    assert "drawn with 9" in record.told[0]
    assert record.told[1] == "scale, sampler is not recorded: that of the options is taken"


@pytest.mark.parametrize("seed", [[], ["--seed", 7]])
def test_a_picture_without_a_seed_is_drawn_with_a_new_one(draw, tmp_path, caplog, seed):
    picture = pictured(tmp_path / "a.png", f"a cat\n{SETTINGS.replace('Seed: 5, ', '')}")
    with caplog.at_level("WARNING"):
        (found,) = draw("--from_picture", picture, *seed)
    used = found.texts["seed"]
    assert used == "7" if seed else used.isdigit()
    assert (
        f"{picture}: the seed of the picture is not recorded: it is drawn with {used}, and will differ" in caplog.text
    )


ONLY_WORDS = {
    "a [dog:cat:0.5]": ["[dog:cat:0.5]"],
    "a [cat:10] [dog::.5]": ["[cat:10]", "[dog::.5]"],
    "a [red|blue] hat, [red|blue] coat": ["[red|blue]"],
    "a cat AND a dog :1.2 AND x": ["AND"],
    "[a [b:c:0.2] d:e:0.5]": ["[b:c:0.2]"],
    "[a], (b:1.2), [(c:1.2)], BREAK, LAND, a|b": [],
    r"a \[x|y\]": [],
}


@pytest.mark.parametrize("prompt", ONLY_WORDS)
def test_words_that_change_while_drawing_are_told_once(tmp_path, prompt):
    told = tuple(f"{word} (read as words)" for word in ONLY_WORDS[prompt])
    assert read(tmp_path, f"{prompt}\nNegative prompt: this AND that\n{SETTINGS}").left == told
    negative = [word for word in ONLY_WORDS[prompt] if word != "AND"]
    assert a1111.only_words_here("a", prompt) == negative


def test_words_that_change_while_drawing_are_told_of_prompts(draw, caplog):
    with caplog.at_level("WARNING"):
        draw("--prompt", "a [dog|cat] AND a hat --n [x:y:0.5]")
    assert "--prompt: [dog|cat], [x:y:0.5], AND is read as words, not as in AUTOMATIC1111" in caplog.text


def test_all_pictures_that_cannot_be_read_are_told_together(draw, tmp_path):
    files = [pictured(tmp_path / f"{name}.png", "x", name) for name in ("workflow", "other")]
    with pytest.raises(UserError, match=r"(?s)workflow.png is of ComfyUI.*other.png does not say"):
        draw("--from_picture", *files)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a_comfyui_picture_of_another_format_is_called_so(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = 'prompt:{"3": {}}', 'workflow:{"nodes": []}'
    Image.new("RGB", (64, 64)).save(tmp_path / f"a.{suffix}", exif=exif.tobytes())
    with pytest.raises(UserError, match="is of ComfyUI"):
        recorded.read_recorded(tmp_path / f"a.{suffix}")


COMMENTS = {
    "big end first": lambda text: b"UNICODE\0" + text.encode("utf-16-be"),
    "little end first": lambda text: b"UNICODE\0" + text.encode("utf-16-le"),
    "with a mark": lambda text: b"UNICODE\0" + text.encode("utf-16"),
    "UTF-8 under another name": lambda text: b"UNICODE\0" + text.encode("utf-8"),
    "ASCII": lambda text: b"ASCII\0\0\0" + text.encode("utf-8"),
    "no name": lambda text: b"\0" * 8 + text.encode("utf-8"),
    "no beginning": lambda text: text.encode("utf-8"),
}


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("name", COMMENTS)
def test_user_comments_are_read_in_every_encoding(tmp_path, name, suffix):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = COMMENTS[name](f"a 猫, é <lora:px:0.5>\n{SETTINGS}")
    Image.new("RGB", (64, 64)).save(tmp_path / f"a.{suffix}", exif=exif.tobytes())
    record = recorded.read_recorded(tmp_path / f"a.{suffix}")
    assert record.request.prompt == "a 猫, é"
    assert record.request.seed == 5
    assert record.networks[0].strength == 0.5


# ---- what is written ----------------------------------------------------------------------------------------


def test_networks_stand_in_the_prompt_where_automatic1111_looks(draw, two, tmp_path):
    strengths = ["--network_mul", 0.123456789, -1]
    (first,) = draw("--prompt", "a cat --n dog", *two[1], *strengths)
    text = first.texts["parameters"]
    assert text.startswith("a cat <lora:net0:0.123456789> <lora:net1:-1>\nNegative prompt: dog\nSteps: 2, ")
    assert first.texts["prompt"] == "a cat"
    digests = [digest_of(path)[:12] for path in two[0]]
    assert f'Lora hashes: "net0: {digests[0]}, net1: {digests[1]}"' in text
    assert "RNG: CPU" in text
    pasted = pictured(tmp_path / "pasted.png", text)  # as another program would write it
    (again,) = draw("--from_picture", pasted, *two[1])
    assert np.array_equal(again.pixels, first.pixels)
    assert again.texts["parameters"] == text


NAMES = {"odd, name (v2)": True, "a=b": False, "x[1]": True}


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_stand_in_a_prompt_is_told_in_the_settings(draw, two, tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(two[0][0].read_bytes())
    (first,) = draw("--prompt", "a cat", *LORA, path, "--network_mul", 0.5)
    text = first.texts["parameters"]
    assert (f"a cat <lora:{name}:0.5>\n" in text) is NAMES[name]
    assert (f'Networks of other modules: "{name} (networks.lora): 0.5"' in text) is not NAMES[name]
    (again,) = draw("--from_picture", pictured(tmp_path / "pasted.png", text), *LORA, path)
    assert np.array_equal(again.pixels, first.pixels)


def test_files_that_automatic1111_does_not_read_are_not_in_the_prompt(draw, two, tmp_path):
    from networks import convert_lora

    peft = tmp_path / "peft.safetensors"
    assert convert_lora.main(["--model", str(two[0][0]), "--save_to", str(peft), "--to", "diffusers"]) == 0
    (found,) = draw("--prompt", "a cat", *LORA, peft, "--network_mul", 0.5)
    assert found.texts["parameters"].startswith("a cat\nSteps")
    assert 'Networks of other modules: "peft (networks.lora): 0.5"' in found.texts["parameters"]


def test_two_stages_have_the_words_of_automatic1111(draw, tmp_path):
    (found,) = draw("--prompt", "a cat", *HIGHRES, "--steps", 3)
    text = found.texts["parameters"]
    assert "Steps: 2, Sampler: DDIM, CFG scale: 4, Seed: 5, Size: 64x64, " in text
    assert "Denoising strength: 0.6, Hires resize: 128x128, Hires steps: 3, Hires upscaler: Lanczos" in text


ODD_PROMPTS = [
    "a <lora:net0:0.5> cat <hypernet:x:1>",
    r"a \{red|blue\} cat, \(x\)",
    'say "a, b: c", <3',
    "Negative prompt: x, Steps: 3",
    "a cat BREAK (dog:1.3)",
]


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("suffix", ["png", "jpg", pytest.param("webp", marks=pytest.mark.slow)])
def test_odd_prompts_survive_the_round_trip(draw, two, tmp_path, suffix):
    lines = [f"{prompt} --d 5 --f {index}.{suffix}" for index, prompt in enumerate(ODD_PROMPTS)]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    words = [*two[1], "--network_mul", 0.7, 0.3, "--steps", 1, "--max_embeddings_multiples", 2]
    first = draw("--from_file", tmp_path / "p.txt", *words, "--emb_normalize_mode", "none", out="first")
    again = draw("--from_picture", *(shot.path for shot in first), *two[1], out="again")
    for one, other in zip(first, sorted(again, key=lambda shot: shot.path), strict=True):
        table = json.loads(one.texts["generation"])
        other_table = json.loads(other.texts["generation"])
        assert {**table, "multipliers": None} == {**other_table, "multipliers": None}
        assert one.texts["parameters"] == other.texts["parameters"]
        if suffix == "png":
            assert np.array_equal(one.pixels, other.pixels)


def test_networks_written_in_a_prompt_are_told_to_be_words(draw, caplog):
    with caplog.at_level("WARNING"):
        draw("--prompt", "a cat <lora:px:0.5> --n <lyco:y>")
    assert "--prompt: <lora:px:0.5> is read as words: networks are --network_weights" in caplog.text
    assert "--prompt: <lyco:y> is read as words" in caplog.text


def test_quotes_that_do_not_end_are_part_of_a_value():
    assert a1111.settings_at('One: "a" b, Two: "c\nrest') == ({"One": 'a" b', "Two": "c"}, "rest")


def test_vae_and_schedule_are_written_for_automatic1111(draw, model_store):
    vae = model_store("sd1")[1]["folder"] / "vae"
    text = draw("--prompt", "a cat", "--sampler", "dpmsolver++", "--vae", vae)[0].texts["parameters"]
    assert "Sampler: DPM++ 2M, Schedule type: Uniform, CFG" in text
    assert "VAE: vae, Version" in text
