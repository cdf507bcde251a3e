"""Random input: whatever a user writes is read in its declared type or refused as a UserError, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import types
import typing
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import NEEDED

from library.config.dataset import DataConfig, DatasetConfig, DatasetOptions, SubsetOptions
from library.config.dataset_file import ALL_KEYS, read_datasets
from library.config.options import root_options, sections_of
from library.config.prompts import PREVIEW_OPTIONS, RETIRED_OPTIONS, Prompt, parse_preview, preview_of
from library.config.retired import RETIRED
from library.config.samplers import SAMPLER_NAMES
from library.config.train import TrainConfig, parse_train_config
from library.data.captions import Moment, possible_captions, sample_caption, split_tags
from library.errors import Problems, UserError
from library.models.prompt_weights import parse_weights

quickly = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    # How slow inputs are made says how busy the machine is.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ---- values -------------------------------------------------------------------------------------------------

NUMBERS = st.integers(-3, 3) | st.integers(60, 2000) | st.sampled_from([-(10**400), 10**9, 2**63, 10**400])
SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0, -0.5, 1.5, 1e300, math.inf, -math.inf, math.nan])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", ".txt", "txt", "64", "96,64", "1,2", "10%", "1e400", "nan", "-inf", "true", "a=b", "=", "\0", "\ud800", "../x"]
)
PLAIN = st.none() | st.booleans() | NUMBERS | SHARES | TEXTS
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4
)


def has_type(value, annotation):
    """Return whether a value is of the type that a field declares; a bool is no int, and an int no float."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple:
        is_open = arguments[-1] is Ellipsis
        return (
            type(value) is tuple
            and (is_open or len(value) == len(arguments))
            and all(has_type(item, arguments[0 if is_open else index]) for index, item in enumerate(value))
        )
    if origin is dict:
        return type(value) is dict and all(type(text) is str for pair in value.items() for text in pair)
    if annotation in (None, type(None)):
        return value is None
    return isinstance(value, Path) if annotation is Path else type(value) is annotation


def check_types(section):
    for name, annotation in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        assert has_type(value, annotation), f"{name} is {value!r}, not {annotation}"
        for number in value if isinstance(value, tuple) else (value,):
            assert not isinstance(number, float) or math.isfinite(number), name


# ---- options ------------------------------------------------------------------------------------------------

FLAGS = sorted({*root_options(TrainConfig), *RETIRED} - {"help"})
ENTRIES = [
    (entry, typing.get_type_hints(section)[entry.field])
    for name, section in sections_of(TrainConfig)
    for entry in root_options(TrainConfig).values()
    if entry.section == name
]
WORDS = (
    st.sampled_from(FLAGS).map("--{}".format)
    | st.sampled_from(FLAGS).map(lambda flag: f"--{flag[: len(flag) // 2]}")
    | st.tuples(st.sampled_from(FLAGS), TEXTS).map(lambda pair: "--{}={}".format(*pair))
    | PLAIN.map(str)
    | st.sampled_from(["-", "--", "-x", "--=", "--x=3", "a b", "512", "1e-4"])
)


@quickly
@given(st.lists(WORDS, max_size=6))
def test_a_command_line_is_read_or_refused(words):
    try:
        problems = Problems()
        config = parse_train_config([*NEEDED, *words], problems)
        problems.raise_if_any()
    except UserError as error:
        assert str(error)
    except SystemExit as ended:
        assert ended.code == 0
        assert any(word.startswith(("-h", "--h")) for word in words)
    else:
        for field in dataclasses.fields(config):
            check_types(getattr(config, field.name))


@pytest.mark.parametrize(("entry", "annotation"), ENTRIES, ids=[entry.flag for entry, _ in ENTRIES])
@settings(quickly, max_examples=20)
@given(value=VALUES)
def test_every_option_takes_or_refuses_any_value_of_a_file(entry, annotation, value):
    try:
        read = entry.read(value, "x")
    except UserError as error:
        assert str(error).startswith("x ")
    else:
        assert read is None or has_type(read, annotation)


# ---- the dataset file ---------------------------------------------------------------------------------------

FITTING = {
    "resolution": st.sampled_from([64, "96,64", [64, 128], 512]),
    "image_dir": st.sampled_from(["a", "b"]),
    "metadata_file": st.just("m.json"),
    "caption_extension": st.sampled_from([".txt", "caption"]),
    "resize_interpolation": st.sampled_from(["area", "box"]),
    "face_crop_aug_range": st.sampled_from(["1,2", [1.5, 3]]),
    "min_bucket_reso": st.just(64),
    "bucket_reso_steps": st.just(64),
}
BY_KIND = {
    "flag": st.booleans(),
    "int": st.integers(1, 3),
    "float": SHARES,
    "str": TEXTS,
    "table": st.dictionaries(TEXTS, PLAIN),
}


def tables(level, required):
    """Return what makes a table of a level: fitting values for most keys, now and then a wrong one."""
    keys = {
        name: FITTING.get(name, BY_KIND.get(entry.kind.name, TEXTS))
        for name, entry in ALL_KEYS.items()
        if level in entry.spec.levels
    }
    fitting = st.fixed_dictionaries(
        {name: keys[name] for name in required}, optional={name: keys[name] for name in keys if name not in required}
    )
    odd = st.dictionaries(st.sampled_from([*ALL_KEYS, "cache_info"]) | TEXTS, VALUES, max_size=1)
    return st.tuples(st.sets(st.sampled_from(sorted(keys)), max_size=4), fitting, st.none() | odd).map(
        lambda parts: {key: parts[1][key] for key in parts[1] if key in parts[0] or key in required} | (parts[2] or {})
    )


SUBSETS = st.lists(tables("subsets", ["image_dir"]), min_size=1, max_size=2)
DATASETS = st.tuples(tables("datasets", ["resolution"]), SUBSETS | PLAIN).map(lambda p: p[0] | {"subsets": p[1]})
FILES = st.fixed_dictionaries(
    {"datasets": st.lists(DATASETS, min_size=1, max_size=2) | VALUES}, optional={"general": tables("general", [])}
)


@settings(quickly, max_examples=50)  # large: most of the time goes into making them
@given(table=FILES | VALUES)
def test_a_dataset_file_is_read_or_refused(tmp_path, table):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    try:
        found = read_datasets(DataConfig(dataset_config=path), DatasetOptions(), SubsetOptions())
    except UserError as error:
        assert str(error)
        return
    assert found
    for dataset in found:
        assert type(dataset) is DatasetConfig
        assert dataset.subsets
        for section in (dataset.options, *dataset.subsets):
            check_types(section)


def test_the_random_dataset_files_are_read_often_enough(tmp_path):
    """A fuzz whose every file is refused for the first key would hold nothing."""
    outcomes: Counter[str] = Counter()

    @settings(quickly, max_examples=300)  # a few of ten are read: enough of them to count
    @given(table=FILES)
    def count(table):
        path = tmp_path / "d.json"
        path.write_text(json.dumps(table), encoding="utf-8")
        try:
            read_datasets(DataConfig(dataset_config=path), DatasetOptions(), SubsetOptions())
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1

    count()
    assert min(outcomes["read"], outcomes["refused"]) > 20, outcomes


# ---- prompts ------------------------------------------------------------------------------------------------

LINE_WORDS = st.sampled_from([*PREVIEW_OPTIONS, *RETIRED_OPTIONS, "q", "W"]).map("--{}".format)
LINES = st.lists(LINE_WORDS | PLAIN.map(str) | st.sampled_from(SAMPLER_NAMES), max_size=8).map(" ".join)
BRACKETED = st.text(alphabet="ab ,日:.0123456789+-()[]\\", max_size=60) | st.text(max_size=20)


@quickly
@given(LINES | st.text(max_size=40))
def test_a_line_of_a_prompt_file_is_read_or_refused(line):
    try:
        prompt = preview_of(parse_preview(line, "p.txt:1"))
    except UserError as error:
        assert str(error).startswith("p.txt:1: ")
        return
    for name, annotation in typing.get_type_hints(Prompt).items():
        assert has_type(getattr(prompt, name), annotation), name
    for side in (prompt.width, prompt.height):
        assert side is None or (side % 8 == 0 and 64 <= side <= 16384)
    assert 1 <= prompt.steps <= 1000
    assert math.isfinite(prompt.scale)


@settings(quickly, max_examples=500)
@given(BRACKETED)
def test_weights_of_a_prompt_are_numbers_and_its_words_are_kept(prompt):
    runs = parse_weights(prompt)
    assert runs
    assert all(math.isfinite(weight) for _, weight in runs)
    assert all(one[1] != other[1] for one, other in itertools.pairwise(runs)), "neighbours are joined"

    def words(text):
        return [letter for letter in text if letter.isalpha()]

    assert words("".join(text for text, _ in runs)) == words(prompt)


@quickly
@given(st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"])))
def test_a_prompt_without_brackets_is_one_run_of_weight_one(prompt):
    assert parse_weights(prompt) == [(prompt, 1.0)]


@quickly
@given(st.text(alphabet="ab ,日()[]", max_size=60))
def test_brackets_take_nothing_but_themselves(prompt):
    def bare(text):
        return "".join(letter for letter in text if letter not in "()[]")

    assert bare("".join(text for text, _ in parse_weights(prompt))) == bare(prompt)


# ---- captions -----------------------------------------------------------------------------------------------


def with_rules(values):
    return SubsetOptions(**values)


TEXTS = st.text(alphabet="ab ,.|{}日", max_size=30) | st.text(max_size=15)
CAPTIONS = st.lists(TEXTS, min_size=1, max_size=3).map(tuple)
AFFIXES = st.none() | st.sampled_from(["", "x", "{a|b}", "{{c}}", "p, q", "|||"]) | st.text(max_size=4)
RATES = st.sampled_from([0.0, 0.3, 1.0])
RULES = st.fixed_dictionaries(
    {},
    optional={
        "caption_separator": st.sampled_from([",", ".", ", ", "b"]),
        "shuffle_caption": st.booleans(),
        "keep_tokens": st.integers(0, 4),
        "keep_tokens_separator": st.sampled_from(["", "|||", ",", "a"]),
        "secondary_separator": st.none() | st.sampled_from([";", "a", ","]),
        "enable_wildcard": st.booleans(),
        "caption_prefix": AFFIXES,
        "caption_suffix": AFFIXES,
        "caption_dropout_rate": RATES,
        "caption_dropout_every_n_epochs": st.integers(0, 2),
        "caption_tag_dropout_rate": RATES,
        "token_warmup_min": st.integers(0, 3),
        "token_warmup_step": st.sampled_from([0.0, 0.5, 4.0]),
    },
).map(with_rules)
MOMENTS = st.builds(Moment, epoch=st.integers(1, 4), step=st.integers(0, 12), num_steps=st.integers(1, 10))
SEEDS = st.integers(0, 100)


@settings(quickly, max_examples=500)
@given(CAPTIONS, RULES, MOMENTS, SEEDS)
def test_a_sample_of_a_caption_is_one_of_what_is_possible(caption, rules, moment, seed):
    sample = sample_caption(caption, rules, moment, random.Random(seed))
    assert isinstance(sample, str)
    possible = possible_captions(caption, rules)
    assert possible is None or sample in possible


@quickly
@given(CAPTIONS, MOMENTS, SEEDS)
def test_without_rules_the_first_text_stays_as_it_is(caption, moment, seed):
    assert sample_caption(caption, SubsetOptions(), moment, random.Random(seed)) == caption[0]


@quickly
@given(TEXTS, st.integers(0, 4), MOMENTS, SEEDS)
def test_shuffled_tags_are_the_same_tags_and_the_first_ones_stay(text, kept, moment, seed):
    rules = SubsetOptions(shuffle_caption=True, keep_tokens=kept)
    fixed, flexible, ending = split_tags(text, rules)
    tags = sample_caption((text,), rules, moment, random.Random(seed)).split(", ")
    assert tags[: len(fixed)] == fixed
    assert Counter(tags) == Counter(fixed + flexible + ending)
