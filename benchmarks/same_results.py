"""Show that a redesign changes no result: a fixed list of runs, recorded at one revision and compared at another.

python benchmarks/same_results.py record before.json                   # at the revision that is right
python benchmarks/same_results.py compare before.json                  # after each change
python benchmarks/same_results.py compare before.json --only "train-*" --repository ../other_checkout

Each run executes command lines of the scripts on tiny models and pictures that are made here from fixed seeds. Recorded
are exit codes, what is printed, and every file: its tensors, metadata, pixels and texts. Left out are paths, times,
random session numbers and progress bars. Equal records need the same machine and the same versions of packages.
`compare` prints what differs and exits with 1 if anything does.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder; that of a script comes in its place in turn

from benchmarks.same_results_runs import RUNS, TEXT_FILES

if TYPE_CHECKING:
    import torch

Record = dict[str, dict[str, str]]  # run -> item -> what it is: its text, or the hash of its bytes

SHOWN = 15  # lines of a difference
MOST_TEXT = 200_000  # letters; of longer texts the hash is kept
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
ENVIRONMENT |= dict.fromkeys(("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"), "error")
# Command lines run in forks of a process that has imported what takes seconds, and nothing of the suite.
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("accelerate", "cv2", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition"),
    *("diffusers.models.controlnets.multicontrolnet", "diffusers.image_processor", "torch.utils.tensorboard"),
    *("transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip"),
]

# ---- what the runs are given --------------------------------------------------------------------------------


def make_files(folder: Path) -> None:
    """Write photographs, captions, masks and settings: what every run finds in its folder."""
    rng = np.random.default_rng(0)

    def picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (6, 6, len(mode)), dtype=np.uint8)
        Image.fromarray(coarse.squeeze()).resize(size, Image.Resampling.BICUBIC).save(path)

    for index, size in enumerate([(64, 64), (96, 64), (64, 96), (80, 80), (70, 64), (64, 64)]):
        for data in ("pictures", "train/2_sks dog"):
            picture(folder / data / f"{index}.png", size)
            (folder / data / f"{index}.txt").write_text(f"a dog, tag{index % 3}, 1girl, blue_sky", encoding="utf-8")
            (folder / data / f"{index}.caption").write_text(f"a (dog:1.{index}) [in] the image", encoding="utf-8")
        picture(folder / "masks" / f"{index}.png", size, "L")
    for index in range(2):
        picture(folder / "reg" / "1_dog" / f"{index}.png", (64, 64))
        picture(folder / "transparent" / f"{index}.png", (96, 64), "RGBA")
    picture(folder / "photo.png", (64, 64))
    picture(folder / "mask.png", (64, 64), "L")
    for name, text in TEXT_FILES.items():
        (folder / name).write_text(text, encoding="utf-8")


def make_models(folder: Path) -> None:
    """Write base models of every family, tuned ones, LoRA files, a ControlNet, an embedding, and the pocket model."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny
    import torch
    from diffusers import ControlNetModel
    from safetensors.torch import load_file, save_file

    unread = shutil.ignore_patterns("*.py", "*.md", "*.png", "__pycache__")
    shutil.copytree(ROOT / "examples" / "pocket_model", folder / "pocket", ignore=unread)
    for family in ("sd1", "sd2", "sdxl"):
        models = tiny.make_models(family)
        dtype = torch.float32 if family == "sd1" else torch.float16
        base = load_file(tiny.write_checkpoint(models, family, folder / f"{family}.safetensors", dtype))
        keyed = torch.Generator().manual_seed(1)
        unet = models["unet"].state_dict()
        if family == "sdxl":  # its LoRA files have the original names
            unet = {name.partition("diffusion_model.")[2]: tensor for name, tensor in base.items()}
        layers = {f"lora_unet.{name}": tensor for name, tensor in unet.items()}
        for part in sorted(name for name in models if name.startswith("text_encoder")):
            number = "" if family != "sdxl" else "2" if part.endswith("2") else "1"
            layers |= {f"lora_te{number}.{name}": tensor for name, tensor in tiny.text_state(models[part]).items()}
        for name, rank in (("lora", 4), ("other", 2)):
            tensors, metadata = lora_of(layers, rank, keyed)
            save_file(tensors, folder / f"{family}-{name}.safetensors", metadata)
        tuned = {
            key: tensor + 0.01 * torch.randn(tensor.shape, generator=keyed).to(tensor)
            for key, tensor in base.items()
            if tensor.is_floating_point()
        }
        save_file(base | tuned, folder / f"{family}-tuned.safetensors")
        if family == "sd1":
            tiny.write_folder(models, family, folder / "sd1")
            torch.manual_seed(2)
            control = ControlNetModel.from_unet(models["unet"])
            for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
                torch.nn.init.normal_(block.weight, std=0.05)
            torch.nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight, std=0.3)
            control.save_pretrained(folder / "control")
            save_file({"emb_params": torch.randn((2, 64), generator=keyed)}, folder / "sksword.safetensors")


def lora_of(layers: dict[str, torch.Tensor], rank: int, keyed: torch.Generator) -> tuple[dict, dict[str, str]]:
    """Return tensors and metadata of a LoRA with random weights on attention and the first convolutions of resnets."""
    import torch

    tensors = {}
    for name, weight in layers.items():
        if not re.search(r"(attn.*(to_|proj)|conv1|in_layers\.2).*\.weight$", name) or weight.ndim < 2:
            continue
        module = name.removesuffix(".weight").replace(".", "_")
        outputs, inputs, *kernel = weight.shape
        tensors[f"{module}.lora_down.weight"] = torch.randn((rank, inputs, *kernel), generator=keyed) / inputs
        tensors[f"{module}.lora_up.weight"] = torch.randn((outputs, rank, *[1 for _ in kernel]), generator=keyed) / 9
        tensors[f"{module}.alpha"] = torch.tensor(rank / 2)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2)}
    return tensors, metadata | {"ss_tag_frequency": '{"x": {"a dog": 2}}', "ss_output_name": f"rank{rank}"}


# ---- what came out ------------------------------------------------------------------------------------------

# What may differ between two runs of the same code -> what is recorded in its place.
UNSTEADY = (
    (re.compile(r"(?m)^[^\n:]*\.py:\d+: (?=\w*Warning)"), "PLACE: "),
    (re.compile(r"(?<![\d.])20\d{12}(?!\d)"), "TIME"),
    (re.compile(r"\b\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?(\.\d+)?"), "TIME"),
    (re.compile(r"events\.out\.tfevents\S*"), "events.out.tfevents"),
    (re.compile(r"\b[\d.]+ (s|min|ms|seconds?)\b"), "DURATION"),
)
UNSTEADY_METADATA = re.compile(r"ss_session_id|ss_training_(started|finished)_at|sshs_\w*|modelspec\.date")
BAR = re.compile(r"(?P<name>[^|\r\n]*?):? *\d+%\|[^|\r\n]*\| *[^\s/]+/(?P<total>\S+) \[[^]\r\n]*\](\x1b\[A)?")


class Folders:
    """Where a run happens: what is taken out of texts."""

    def __init__(self, work: Path, repository: Path) -> None:
        self.names = {str(work): "WORK", str(repository): "REPOSITORY", sys.prefix: "PYTHON"}

    def steady(self, text: str) -> str:
        """Return a text without what differs between two runs of the same code: paths and times."""
        for path, name in self.names.items():
            text = text.replace(path, name)
        for pattern, replacement in UNSTEADY:
            text = pattern.sub(replacement, text)
        return text

    def printed(self, text: str) -> str:
        """Return what a script printed, with a list of its progress bars in place of how they went on."""
        bars = sorted({f"progress bar: {bar['name'].strip()}, of {bar['total']}" for bar in BAR.finditer(text)})
        lines = [line.rstrip() for line in re.split(r"[\r\n]", BAR.sub("\n", text).replace("\x1b[A", ""))]
        return self.steady("\n".join([line for line in lines if line] + bars))


def short_hash(data: bytes) -> str:
    """Return the first twelve digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def read_safetensors(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return the metadata of a file, and of each tensor its type, shape and hash."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = {key: value for key, value in header.pop("__metadata__", {}).items() if not UNSTEADY_METADATA.match(key)}
    lines = []
    for name, entry in sorted(header.items()):
        start, end = (begin + offset for offset in entry["data_offsets"])
        lines.append(f"{name} {entry['dtype']} {entry['shape']} {short_hash(data[start:end])}")
    return {
        "tensors": "\n".join(lines),
        "metadata": steady("\n".join(f"{key}: {value}" for key, value in sorted(metadata.items()))),
    }


def read_pickle(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return each tensor and value of a file of torch.save."""
    import torch

    def walk(value: object, name: str) -> Iterator[str]:
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            yield f"{name} {value.dtype} {list(value.shape)} {short_hash(data)}"
        elif isinstance(value, dict):
            for key, part in value.items():
                yield from walk(part, f"{name}/{key}")
        elif isinstance(value, (list, tuple)) and any(isinstance(part, (dict, torch.Tensor)) for part in value):
            for index, part in enumerate(value):
                yield from walk(part, f"{name}/{index}")
        else:
            yield f"{name} {value!r}"

    return {"content": steady("\n".join(walk(torch.load(path, weights_only=False, map_location="cpu"), "")))}


def read_picture(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return mode, size and pixels of a picture, and the texts in its file."""
    with Image.open(path) as file:
        pixels = f"{file.mode} {file.size} {short_hash(file.tobytes())}"
        texts = "\n".join(f"{key}: {value}" for key, value in sorted(file.info.items(), key=str))
    return {"pixels": pixels, "texts": steady(texts)}


def read_metrics(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return the lines of a file of metrics, without times."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [{key: line[key] for key in line if key.partition("/")[0] != "time"} for line in lines]
    return {"content": "\n".join(map(json.dumps, kept))}


def read_events(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return the numbers that were logged to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(path)).Reload()
    scalars = [f"{tag} {event.step} {event.value}" for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    tensors = [(tag, event) for tag in events.Tags()["tensors"] for event in events.Tensors(tag)]
    texts = [f"{tag} {event.step} {tensor_util.make_ndarray(event.tensor_proto)}" for tag, event in tensors]
    return {"content": steady("\n".join(sorted(scalars + texts)))}


def read_text(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return a text, or the hash of what is none."""
    data = path.read_bytes()
    try:
        return {"content": steady(data.decode("utf-8"))}
    except UnicodeDecodeError:
        return {"content": short_hash(data)}


def read_nothing(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return nothing of an index of pictures, which holds the times of files: only its name is compared."""
    return {}


READERS = {".safetensors": read_safetensors, ".jsonl": read_metrics, ".sqlite": read_nothing}
READERS |= dict.fromkeys((".png", ".jpg", ".webp"), read_picture) | dict.fromkeys((".ckpt", ".pt", ".bin"), read_pickle)


def execute(script: Path, words: list[str], folder: Path) -> None:
    """Run a script in this process as `python script words` would in the folder, and send what it prints to files."""
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv, sys.path[0] = [str(script), *words], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def run_all(name: str, work: Path, args: argparse.Namespace) -> dict[str, str]:
    """Execute the command lines of a run in a folder of its own and return everything that came out."""
    folder = work / name
    shutil.copytree(work / "files", folder)
    folders = Folders(work, args.repository)
    items = {}
    for number, line in enumerate(RUNS[name], 1):
        script, *words = shlex.split(line)
        code: int | None
        if args.python:
            with Path(f"{folder}.stdout").open("wb") as out, Path(f"{folder}.stderr").open("wb") as err:
                command = [args.python, str(args.repository / script), *words]
                code = subprocess.run(command, cwd=folder, stdout=out, stderr=err, check=False).returncode
        else:
            process = FORKS.Process(target=execute, args=(args.repository / script, words, folder))
            process.start()
            process.join()
            code = process.exitcode
        items[f"{number} {script}: exit code"] = str(code)
        for stream in ("stdout", "stderr"):
            text = Path(f"{folder}.{stream}").read_text(encoding="utf-8", errors="replace")
            items[f"{number} {script}: {stream}"] = folders.printed(text)
    items |= contents(folder, work / "files", folders)
    shutil.rmtree(folder)
    return items


OF_THE_MOMENT = ("-run.json", "-report.html")  # files that are full of times; what else is in them is in others, too


def contents(folder: Path, given: Path, folders: Folders) -> dict[str, str]:
    """Return names and contents of the files in a folder, but for those that were given and are as they were."""
    items: dict[str, str] = {}
    names = [f"{path.name} is gone" for path in given.glob("*") if not (folder / path.name).exists()]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        own = path.relative_to(folder)
        if (given / own).is_file() and (given / own).read_bytes() == path.read_bytes():
            continue
        name = folders.steady(own.as_posix())
        names.append(name)
        if name.endswith(OF_THE_MOMENT):
            continue
        read = read_events if "tfevents" in name else READERS.get(path.suffix, read_text)
        items |= {
            f"{name}: {kind}": text if len(text) < MOST_TEXT else short_hash(text.encode())
            for kind, text in read(path, folders.steady).items()
        }
    return items | {"files": "\n".join(names)}


def make_record(args: argparse.Namespace) -> Record:
    """Execute the runs that were asked for, several at a time."""
    names = [name for name in RUNS if fnmatch.fnmatch(name, args.only)]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(temporary).resolve()
        make_files(work / "files")
        making = FORKS.Process(target=make_models, args=(work / "models",))
        making.start()
        making.join()
        if making.exitcode:
            raise SystemExit("the models could not be made")

        def timed(name: str) -> dict[str, str]:
            begin = time.perf_counter()
            items = run_all(name, work, args)
            codes = " ".join(text for item, text in items.items() if item.endswith(": exit code"))
            print(f"{name}: {time.perf_counter() - begin:.0f} s, exit {codes}", file=sys.stderr, flush=True)
            return items

        given = contents(work / "models", work / "none", Folders(work, args.repository))
        return {"given": given} | dict(zip(names, pool.map(timed, names), strict=True))


def difference(before: str | None, after: str | None) -> list[str]:
    """Return at most SHOWN lines that say how a text changed."""
    if before is None or after is None:
        return ["is new" if before is None else "is gone"]
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]
    if len(lines) > SHOWN:  # the end, too: there an error says what it is
        lines[SHOWN - 6 : -5] = [f"... {len(lines) - SHOWN + 1} more lines"]
    return [line[:300] for line in lines] or ["in how lines end"]


def compare(before: Record, after: Record) -> bool:
    """Print for each run that it is equal or how it differs; return whether all are equal."""
    for name in {**before, **after}:
        old, items = before.get(name, {}), after.get(name, {})
        changed = [item for item in {**old, **items} if old.get(item) != items.get(item)]
        print(f"{name}: {'equal' if not changed else f'{len(changed)} items differ'}")
        for item in changed:
            print(f"  {item}", *difference(old.get(item), items.get(item)), sep="\n    ")
    return before == after


def main() -> int:
    """Run the script with the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="the record: JSON")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs whose names match, such as 'train-*'")
    parser.add_argument("--repository", type=Path, default=ROOT, help="folder of the scripts that are run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--python", help="start this interpreter for each command line: slower, as a user does")
    args = parser.parse_args()
    args.repository = args.repository.resolve()
    os.environ |= ENVIRONMENT
    FORKS.set_forkserver_preload(PRELOADED)
    begin = time.perf_counter()
    before: Record = json.loads(args.file.read_text(encoding="utf-8")) if args.command == "compare" else {}
    after = make_record(args)
    print(f"{len(after) - 1} runs in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    if args.command == "compare":
        asked = {name: before[name] for name in before if name == "given" or fnmatch.fnmatch(name, args.only)}
        return 0 if compare(asked, after) else 1
    args.file.write_text(json.dumps(after, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
