"""The names of classes and functions that a pickle calls for: those of weights, harmless ones, and all others.

A pickle is a program that calls what it names. torch's restricted reader calls only what tensors need and refuses a
file that names anything else. What trainers store beside the weights, such as the settings of a callback, is not needed
here: an inert object takes the place of each class in the table below, which is neither imported nor called.
"""

from __future__ import annotations

import collections
import contextlib
import pickletools
import re
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # what pickles of Python 2 call otherwise
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from library.file_kinds import ZIP, first_bytes

# What the readers of pickles and archives raise for damaged ones.
DAMAGE = (ValueError, LookupError, ArithmeticError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
LEGACY_PICKLES = 4  # in a row, in a file without a zip archive: magic number, version, sizes of types, content


class Inert:
    """Takes the place of an object that is not needed; accepts any arguments and state, and keeps nothing."""

    def __new__(cls, *args: object) -> Any:
        del args
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        del args

    def __setstate__(self, state: object) -> None:
        del state


class InertTable(Inert):
    """Takes the place of a class of dictionaries: torch's reader fills only dictionaries of its own kinds."""

    def __new__(cls, *args: object) -> Any:
        del args
        return collections.OrderedDict()


class InertList(Inert):
    """Takes the place of a class of lists."""

    def __new__(cls, *args: object) -> Any:
        del args
        return []


class InertArray(Inert):
    """Takes the place of an array of NumPy, which could be a weight."""


class Parameters(collections.OrderedDict[str, Any]):
    """Takes the place of a module of torch that only holds tensors by name, and keeps these."""

    def __setstate__(self, state: Any) -> None:
        self.update(state["_parameters"])


class Harmless(NamedTuple):
    """Names that files of weights may have, what takes their place, and who stores them."""

    pattern: str
    stand_in: type[Inert | Parameters]
    reason: str


LIGHTNING = r"(pytorch_lightning|lightning(\.pytorch|_fabric)?)"
HARMLESS = (
    Harmless(rf"{LIGHTNING}\.(\w+\.)*callbacks\.[\w.]+", Inert, "Lightning: settings of callbacks, by their class"),
    Harmless(rf"{LIGHTNING}\.(\w+\.)*parsing\.AttributeDict", InertTable, "Lightning: hyperparameters"),
    Harmless(rf"{LIGHTNING}\.(\w+\.)*(enums|states|types)\.\w+", Inert, "Lightning: states of the trainer"),
    Harmless(r"omegaconf\.[\w.]+", Inert, "OmegaConf: the configuration of a training of CompVis"),
    Harmless(r"typing\.\w+", Inert, "OmegaConf: types of values"),
    Harmless(r"(easydict\.EasyDict|addict\.addict\.Dict|munch\.Munch)", InertTable, "configurations of trainings"),
    Harmless(r"(diffusers|transformers)\.([\w.]+\.)?(FrozenDict|BatchEncoding)", InertTable, "configurations"),
    Harmless(r"argparse\.Namespace|types\.SimpleNamespace", Inert, "options of a training"),
    Harmless(r"collections\.defaultdict|builtins\.dict", InertTable, "statistics, configurations"),
    Harmless(r"collections\.deque|builtins\.list", InertList, "the last losses of a training"),
    Harmless(
        r"builtins\.(int|float|str|bool|bytes|tuple|object|frozenset|slice|range|NoneType|type)", Inert, "plain values"
    ),
    Harmless(r"copyreg\._reconstructor", Inert, "how old pickles create any object"),
    Harmless(r"pathlib\.(_local\.)?\w+", Inert, "paths of the training"),
    Harmless(r"datetime\.\w+|uuid\.UUID|decimal\.Decimal|fractions\.Fraction", Inert, "times and numbers"),
    Harmless(r"numpy(\._?core)?\.multiarray\.scalar", Inert, "NumPy: a loss, a learning rate"),
    Harmless(r"numpy(\._?core)?\.multiarray\._reconstruct", InertArray, "NumPy: losses, states of generators"),
    Harmless(r"numpy\.(dtype|ndarray|bool_?|u?int\d+|float\d+|dtypes\.\w+)", Inert, "NumPy: the type of these"),
    Harmless(r"torch\.nn\.modules\.container\.ParameterDict", Parameters, "the first textual inversions"),
    Harmless(r"torch\.optim\.[\w.]+", Inert, "torch: optimizer or schedule, where not only its state is stored"),
)
# What torch's reader takes itself: tensors, their storages, types and containers.
WEIGHTS = (
    r"torch\.(cuda\.)?\w+Storage|torch\.storage\.(Typed|Untyped|_Legacy)Storage|torch\.(Size|device)"
    r"|torch\.(cuda\.)?(sparse\.)?\w*Tensor|torch\.(b?float|u?int|complex|q?u?int|per_tensor_|per_channel_)\w*"
    r"|torch\.(bool|half|double|long|short|strided|sparse_\w+)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|builtins\.(bytearray|set|complex)"
)


def stand_in_for(name: str) -> type[Inert | Parameters] | None:
    """Return what takes the place of a harmless class or function, None for another one."""
    return next((row.stand_in for row in HARMLESS if re.fullmatch(row.pattern, name)), None)


def is_of_weights(name: str) -> bool:
    """Return whether tensors need a class or function."""
    return re.fullmatch(WEIGHTS, name) is not None


def names_in(path: Path) -> set[str]:
    """Return the names that a pickle of torch calls for, `module.name`; nothing of it is run.

    In a damaged file these are the names before the damage.
    """
    names: set[str] = set()
    with contextlib.suppress(*DAMAGE):
        if first_bytes(path).startswith(ZIP):
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                with archive.open(member) as source:
                    names.update(names_of(source))
        else:
            with path.open("rb") as source:
                for _ in range(LEGACY_PICKLES):
                    names.update(names_of(source))
    return names


def names_of(source: IO[bytes]) -> Iterator[str]:
    """Yield the names in one pickle, at whose end the file then is."""
    pushed: list[Any] = []  # texts, as far as they are needed: newer pickles push module and name before the call
    memo: dict[int, Any] = {}
    argument: Any  # its type depends on the operation
    for operation, argument, _ in pickletools.genops(source):
        kind = operation.name
        if kind in ("GLOBAL", "INST"):
            yield present_name(*argument.split(" ", 1))
        elif kind == "STACK_GLOBAL":
            yield present_name(*(str(text) for text in ["?", "?", *pushed][-2:]))
        elif kind.startswith("EXT"):
            yield f"copyreg.extension_{argument}"
        elif kind == "MEMOIZE":
            memo[len(memo)] = pushed[-1] if pushed else None
        elif "PUT" in kind:
            memo[argument] = pushed[-1] if pushed else None
        elif "GET" in kind:
            pushed.append(memo.get(argument))
        elif isinstance(argument, str):
            pushed.append(argument)


def present_name(module: str, name: str) -> str:
    """Return the name in Python 3 of a class or function that a pickle names."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def stand_ins(names: Iterable[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what takes the place of each harmless name, in the form of `torch.serialization.safe_globals`."""
    found = ((stand_in_for(name), name) for name in names if not is_of_weights(name))
    return [(stand_in, name) for stand_in, name in found if stand_in is not None]
