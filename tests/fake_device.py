"""A GPU that is not there: the device `fakegpu`, in pure Python, over the memory of the CPU.

    python tests/fake_device.py SCRIPT WORDS...              # a script of the suite, whose device it is
    python tests/fake_device.py --report SCRIPT WORDS...     # the same, and where the host waited for it

The device is torch's PrivateUse1. Each operation for which the CPU has a kernel is one operation of the device: its
operands are checked as CUDA checks them, then the CPU's kernel runs on their memory. Copies that a GPU makes while the
host goes on are made late here, so that a host that reads too early reads NaN. Autocast follows CUDA's lists
(`fake_autocast.py`), since those of the CPU differ.

It shows tensors on the wrong device, generators of the wrong device, types that clash under CUDA's autocast, fp16 with
a scaler, what the host reads or overwrites too early, and where it waits; and by counting, what reaches the device
(`RECORD`). It cannot show what only `torch.cuda` has, what CUDA's kernels round otherwise, speed, or memory.

The interface of torch for such a device is private: `missing()` says what of it is absent in the torch that runs.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import inspect
import runpy
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
NAME = "fakegpu"
KEY = "PrivateUse1"
aten = torch.ops.aten
Key, KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet


def missing() -> str | None:
    """Return what this device needs and the torch that runs does not have, or None."""
    needed = (
        "torch.utils.backend_registration._setup_privateuseone_for_python_backend",
        "torch._C._acc.register_python_privateuseone_hook",
        "torch._C._to_dlpack",
        "torch._C._from_dlpack",
        "torch._C._AutoDispatchBelowAutograd",
        "torch._C._ExcludeDispatchKeyGuard",
        "torch._C._dispatch_has_kernel_for_dispatch_key",
    )
    for path in needed:
        value: Any = sys.modules["torch"]
        for name in path.split(".")[1:]:
            value = getattr(value, name, None)
        if value is None:
            return f"torch {torch.__version__} has no {path}"
    return None


# ---- what is recorded -----------------------------------------------------------------------------------------------


class Wait(NamedTuple):
    """A place of the suite at which the host waits for the device."""

    why: str
    file: str  # below the suite's folder
    function: str
    line: int


class Record:
    """What reached the device since `clear`: operations by name, launches by part, waits of the host by place.

    A part is what `part` says when the operation is given; what autograd's thread gives is the part "backward".
    """

    def __init__(self) -> None:
        self.operations: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[Wait] = collections.Counter()
        self.bytes = 0  # on the device now; counted only with shapes alone
        self.part = ""
        self.weigh: Callable[[str, Sequence[Any]], int] = lambda name, args: 1  # launches of an operation
        self._thread = threading.get_ident()

    def clear(self) -> None:
        """Begin anew."""
        self.operations.clear()
        self.launches.clear()
        self.waits.clear()

    def free(self, number: int) -> None:
        """Note that memory was given back."""
        self.bytes -= number

    def operation(self, name: str, args: Sequence[Any]) -> None:
        """Note an operation."""
        self.operations[name] += 1
        part = self.part if threading.get_ident() == self._thread else "backward"
        self.launches[part] += self.weigh(name, args)

    def wait(self, why: str) -> None:
        """Note a wait with the innermost line of the suite."""
        frame = inspect.currentframe()
        while frame is not None:
            code, path = frame.f_code, Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not path.name.startswith("fake_") and "site-packages" not in path.parts:
                self.waits[Wait(why, path.relative_to(ROOT).as_posix(), code.co_name, frame.f_lineno)] += 1
                return
            frame = frame.f_back
        self.waits[Wait(why, "", "outside the suite", 0)] += 1

    def __str__(self) -> str:
        lines = [f"{number:7} {one.why:22} {one.file}:{one.line} {one.function}" for one, number in self.by_number()]
        operations = [f"{number:7} {name}" for name, number in self.operations.most_common(20)]
        return "\n".join(["waits of the host", *lines, f"{self.operations.total()} operations, such as", *operations])

    def by_number(self) -> list[tuple[Wait, int]]:
        """Return the waits, the most frequent first."""
        return self.waits.most_common()


RECORD = Record()

# ---- memory ---------------------------------------------------------------------------------------------------------

DL_CPU, DL_OTHER = 1, 12  # devices in DLPack: torch reads kDLExtDev as PrivateUse1


class _DeviceField(ctypes.Structure):
    """The beginning of a DLManagedTensor: where the memory is, and on what."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("index", ctypes.c_int32))


_content_of = ctypes.pythonapi.PyCapsule_GetPointer
_content_of.restype, _content_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _seen_from(kind: int, tensor: Tensor) -> Tensor:
    """Return a tensor of another device over the memory of this one, with its strides."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:  # which DLPack has only in newer torch
        return _seen_from(kind, tensor.view(torch.uint8)).view(tensor.dtype)
    capsule = torch._C._to_dlpack(tensor)
    field = ctypes.cast(_content_of(capsule, b"dltensor"), ctypes.POINTER(_DeviceField)).contents
    field.type, field.index = kind, 0
    return torch._C._from_dlpack(capsule)


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a tensor on the device."""
    return _seen_from(DL_CPU, tensor)


def on_device(tensor: Tensor) -> Tensor:
    """Return a tensor on the device over the memory of a CPU tensor."""
    return _seen_from(DL_OTHER, tensor)


def is_fake(value: object) -> bool:
    """Return whether a value is a tensor on the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


class _Pages(np.ndarray):
    """Memory that says when it is given back; numpy takes it from the system when it is touched."""

    given_back: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.given_back is not None:
            self.given_back()


def _pages(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, _Pages]:
    """Return a CPU tensor over memory that says when it is given back."""
    reach = 1 + sum((number - 1) * step for number, step in zip(size, stride, strict=True)) if all(size) else 0
    pages = np.empty(max(reach, 1) * dtype.itemsize, np.uint8).view(_Pages)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).as_strided(size, stride), pages


_pinned: set[int] = set()  # addresses of storages


def pin(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor that is marked as pinned memory; the memory is as pageable as any."""
    result, pages = _pages(tensor.shape, torch.empty_like(tensor).stride(), tensor.dtype)
    address = result.untyped_storage().data_ptr()
    _pinned.add(address)
    pages.given_back = lambda: _pinned.discard(address)
    return result.copy_(tensor)


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a CPU tensor is one of `pin`, or a view of it."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _pinned


# ---- the queue of the device ----------------------------------------------------------------------------------------


class Queue:
    """What the device has not done yet: copies to and from pinned memory."""

    def __init__(self) -> None:
        self.length = self.done = 0
        self._pending: collections.deque[Callable[[], None]] = collections.deque()

    def add(self, action: Callable[[], None]) -> None:
        """Take something that is done when the host next waits."""
        self._pending.append(action)
        self.length += 1

    def drain(self, until: int | None = None) -> None:
        """Do all that is pending, or the first part of it."""
        while self._pending and (until is None or self.done < until):
            self.done += 1
            self._pending.popleft()()

    def wait(self, why: str) -> None:
        """Let the host wait for the device."""
        RECORD.wait(why)
        self.drain()


QUEUE = Queue()


class Event:
    """torch.Event on the device: a point in its queue."""

    def __init__(self, device: object = None, **_: object) -> None:
        self.device = torch.device(NAME, 0)
        self._at: int | None = None

    def record(self, stream: object = None) -> None:
        """Stand for all that was given to the device so far."""
        self._at = QUEUE.length

    def query(self) -> bool:
        """Return whether the device has come so far; it has always just done so."""
        if self._at is not None:
            QUEUE.drain(self._at)
        return True

    def synchronize(self) -> None:
        """Wait for the device to come so far."""
        if self._at is not None:
            RECORD.wait("event")
            QUEUE.drain(self._at)

    def wait(self, stream: object = None) -> None:
        """Let a stream wait, not the host."""

    def elapsed_time(self, other: Event) -> float:
        """Return no time at all, in milliseconds."""
        return 0.0


def _has_same_layout(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and one.shape == other.shape and one.stride() == other.stride()


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy within the device, to it, or from it.

    Between devices CUDA waits, unless it is told not to and the memory is pinned and needs no conversion on the host.
    """
    RECORD.operation("aten::copy_", (source, target))
    if is_fake(source) and is_fake(target):
        if COMPUTE.has_values:
            on_host(target).copy_(on_host(source))
        return target
    host = target if is_fake(source) else source
    goes_on = non_blocking and is_pinned(host) and (is_fake(source) or _has_same_layout(source, target))
    if not goes_on:
        QUEUE.wait("copy to the device" if is_fake(target) else "copy to the host")
    if not COMPUTE.has_values:
        if is_fake(source):
            target.zero_()
    elif is_fake(target):
        on_host(target).copy_(source)
        if goes_on:
            sent = source.detach().clone()
            QUEUE.add(lambda: _hold_unchanged(source, sent))
    elif goes_on:
        sent = on_host(source).clone()
        _spoil(target)
        QUEUE.add(lambda: _fill(target, sent))
    else:
        target.copy_(on_host(source))
    return target


def _spoil(tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    elif tensor.dtype is not torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def _fill(target: Tensor, sent: Tensor) -> None:
    target.copy_(sent)


def _hold_unchanged(source: Tensor, sent: Tensor) -> None:
    now, then = (one.reshape(-1).view(torch.uint8) for one in (source, sent))
    if not torch.equal(now, then):
        raise RuntimeError("pinned memory was overwritten before the device had read it")


def to_copy(
    tensor: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
    **_: Any,
) -> Tensor:
    """Return a copy in another type or on another device; on the host, pinned where CUDA's would be."""
    device = tensor.device if device is None else device
    form = memory_format or torch.preserve_format
    result = torch.empty_like(tensor, dtype=dtype or tensor.dtype, device=device, memory_format=form)
    if non_blocking and device.type == "cpu":
        result = pin(result)
    return result.copy_(tensor, non_blocking)


def number(tensor: Tensor) -> Any:
    """Return the number in a tensor, as .item() and bool() do."""
    QUEUE.wait("a number")
    return aten._local_scalar_dense.default(on_host(tensor)) if COMPUTE.has_values else 0


# ---- operations -----------------------------------------------------------------------------------------------------

# Operations whose results have the sizes that the data give: the host waits to allocate them.
SIZED_BY_DATA = ("nonzero", "masked_select", "_unique", "unique_", "equal", "bincount", "histc")
INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")


class Compute:
    """How the device finds the results of an operation: with the CPU's kernels, or as shapes alone."""

    def __init__(self) -> None:
        self.has_values = True

    def operand(self, tensor: Tensor) -> Tensor:
        """Return what stands for a tensor of the device in the operation."""
        if self.has_values:
            return on_host(tensor)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def result(self, tensor: Tensor) -> Tensor:
        """Return a result as a tensor of the device."""
        return on_device(tensor) if self.has_values else empty_strided(tensor.shape, tensor.stride(), tensor.dtype)


COMPUTE = Compute()


def _check(name: str, value: object) -> None:
    """Raise RuntimeError for an operand that CUDA does not take beside tensors of its own."""
    if isinstance(value, torch.Generator):
        raise RuntimeError(f"{name}: expected a '{NAME}' generator, but found one of '{value.device.type}'")
    if isinstance(value, Tensor) and value.ndim:
        if not name.startswith(INDEXING):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found {NAME}:0 and {value.device}"
            )
        QUEUE.wait("indices from the host")


def _wait_for_sizes(name: str, args: Sequence[Any]) -> None:
    """Note the waits of an operation whose result has a size that the data give."""
    if name.startswith(INDEXING):
        for one in args[1]:
            if one is not None and one.dtype in (torch.bool, torch.uint8):
                QUEUE.wait("indices by a mask")
    elif name.removeprefix("aten::").startswith(SIZED_BY_DATA):
        QUEUE.wait(name.removeprefix("aten::").split(".")[0])


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device."""
    name = op.name()
    RECORD.operation(name, args)
    own: dict[int, tuple[Tensor, Tensor]] = {}  # what stands for an operand (kept alive), the operand

    def inwards(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == NAME:
            inner = COMPUTE.operand(value)
            own[id(inner)] = inner, value
            return inner
        if isinstance(value, list | tuple):
            return [inwards(one) for one in value]
        if isinstance(value, torch.device):
            return torch.device("cpu" if COMPUTE.has_values else "meta")
        _check(name, value)
        return value

    def outwards(value: Any) -> Any:
        if isinstance(value, Tensor):
            return own[id(value)][1] if id(value) in own else COMPUTE.result(value)
        return type(value)(map(outwards, value)) if isinstance(value, list | tuple) else value

    _wait_for_sizes(name, args)
    inner_args, inner_kwargs = [inwards(one) for one in args], {key: inwards(one) for key, one in kwargs.items()}
    # Borrowed memory cannot grow: a result that is still to get its size gets memory of its own.
    outs = {argument.name for argument in op._schema.arguments if argument.is_out}
    unsized = [key for key, one in kwargs.items() if key in outs and is_fake(one) and not one.numel()]
    for key in unsized:
        inner_kwargs[key] = torch.empty_like(inner_kwargs[key])
        own[id(inner_kwargs[key])] = inner_kwargs[key], kwargs[key]
    with torch._C._AutoDispatchBelowAutograd():
        result = op(*inner_args, **inner_kwargs)
    for key in unsized:
        aten.set_.source_Tensor(kwargs[key], COMPUTE.result(inner_kwargs[key]))
    return outwards(result)


def empty(size: Sequence[int], *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    """Return new memory."""
    form = memory_format or torch.contiguous_format
    if COMPUTE.has_values:
        return on_device(torch.empty(size, dtype=dtype, memory_format=form, device="cpu"))
    shape = torch.empty(size, memory_format=form, device="meta")
    return empty_strided(size, shape.stride(), dtype)


def empty_strided(size: Sequence[int], stride: Sequence[int], dtype: Any = None, **_: Any) -> Tensor:
    """Return new memory with given strides."""
    if COMPUTE.has_values:
        return on_device(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))
    result, pages = _pages(size, stride, dtype or torch.get_default_dtype())
    RECORD.bytes += pages.nbytes
    number = pages.nbytes
    pages.given_back = lambda: RECORD.free(number)
    return on_device(result)


def resize(tensor: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
    """Give a tensor another size, and memory for it."""
    new = empty(size, dtype=tensor.dtype, memory_format=memory_format)
    kept = min(tensor.numel(), new.numel())
    if COMPUTE.has_values and kept:
        on_host(new).view(-1)[:kept] = on_host(tensor).reshape(-1)[:kept]
    return aten.set_.source_Tensor(tensor, new)


def convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    """Return the gradients of a convolution."""
    *geometry, wanted = rest
    return run(aten.convolution_backward.default, gradient, x, weight, None, *geometry, wanted)


FLASH = 1  # of torch's SDPBackend


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    """Return attention, fused where the CPU has it fused: torch asks each device which kinds it has."""
    inner = [None if one is None else COMPUTE.operand(one) for one in (q, k, v, attn_mask)]
    choose: Any = torch._fused_sdp_choice
    if COMPUTE.has_values and choose(*inner, dropout_p, is_causal, **more) != FLASH:
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, **more)[0]
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    more.pop("enable_gqa", None)
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, **more)[0]


# ---- registration ---------------------------------------------------------------------------------------------------

OWN: dict[str, Callable[..., Any]] = {
    "empty.memory_format": empty,
    "empty_strided": empty_strided,
    "resize_": resize,
    "_to_copy": to_copy,
    "_copy_from": copy_from,
    "_local_scalar_dense": number,
    "convolution_overrideable": lambda *args: run(aten.convolution.default, *args),
    "convolution_backward_overrideable": convolution_backward,
    "scaled_dot_product_attention": attention,
    "record_stream": lambda tensor, stream: None,
}
# The CPU's kernels of these move no data and look at no device.
VIEWS = ("as_strided", "view", "_reshape_alias", "unfold", "set_", "set_.source_Tensor", "set_.source_Storage",
         "set_.source_Storage_storage_offset", "is_set_to", "_has_same_storage_numel")  # fmt: skip
# One launch each on CUDA; the CPU takes them apart.
FUSED = ("_foreach_",)

MODULE = types.SimpleNamespace(
    is_available=lambda: True,
    is_initialized=lambda: True,
    _is_in_bad_fork=lambda: False,
    device_count=lambda: 1,
    current_device=lambda: 0,
    set_device=lambda device: None,
    synchronize=lambda device=None: QUEUE.wait("synchronize"),
    empty_cache=lambda: None,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
)
_libraries: list[torch.library.Library] = []  # what is registered ends with them


def _operation(name: str, package: str = "aten") -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, package), packet), overload or "default")


def _kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(op, *args, **kwargs)


def _view(op: Any) -> Callable[..., Any]:
    cpu = KeySet(Key.CPU)
    return lambda *args, **kwargs: op.redispatch(cpu, *args, **kwargs)


def _pinning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of torch that makes tensors, with pinned memory that is none."""

    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        result = make(*args, **kwargs)
        return pin(result) if pin_memory else result

    return made


def take_package(name: str) -> None:
    """Run the operations of an installed package, such as bitsandbytes', by its kernels for the CPU."""
    if importlib.util.find_spec(name) is None:
        return
    importlib.import_module(name)
    library = torch.library.Library(name, "IMPL")
    _libraries.append(library)
    for full in torch._C._dispatch_get_all_op_names():
        package, _, operation = full.partition("::")
        if package == name and torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU"):
            library.impl(operation, _kernel(_operation(operation, name)), KEY)


def install(*, shapes_only: bool = False) -> torch.device:
    """Register the device, once in a process, and return it; with shapes alone, memory is never read or written."""
    import torch.fx.experimental._config
    import torch.utils._device
    from fake_autocast import autocast_kernels
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    device = torch.device(NAME, 0) if _libraries else None
    if device is not None:
        return device
    COMPUTE.has_values = not shapes_only
    if shapes_only:  # then every entry counts as one that is not zero
        torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
    _setup_privateuseone_for_python_backend(NAME, backend_module=MODULE)
    every, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((every, library))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name[6:] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    for name in names:
        if name in OWN:
            library.impl(name, OWN[name], KEY)
        elif name in VIEWS:
            library.impl(name, _view(_operation(name)), KEY)
        elif has_kernel(f"aten::{name}", "CPU") or name.startswith(FUSED):
            library.impl(name, _kernel(_operation(name)), KEY)
    library.impl("scaled_dot_product_attention", attention, f"Autograd{KEY}")
    library.impl("_pin_memory", lambda tensor, device=None: pin(tensor), "CPU")
    library.impl("is_pinned", lambda tensor, device=None: is_pinned(tensor), "CPU")
    every.fallback(torch.library.fallthrough_kernel, f"Autocast{KEY}")
    for name, kernel in autocast_kernels([(name, _operation(name)) for name in names
                                          if has_kernel(f"aten::{name}", "AutocastCUDA")]):  # fmt: skip
        library.impl(name, kernel, f"Autocast{KEY}")
    for name, value in {"Event": Event}.items():
        setattr(torch, name, value)
    torch.utils._device._device_constructors()  # what `with torch.device(...)` looks for, before it is replaced here
    for name in ("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "randn", "rand"):
        setattr(torch, name, _pinning(getattr(torch, name)))
    torch.accelerator.synchronize = MODULE.synchronize
    take_package("bitsandbytes")
    return torch.device(NAME, 0)


def install_for_accelerate(*, shapes_only: bool = False) -> torch.device:
    """Register the device and let accelerate choose it."""
    from accelerate.state import PartialState

    device = install(shapes_only=shapes_only)
    PartialState.default_device = property(lambda self: device)
    return device


def main(words: list[str]) -> None:
    """Run a script on the device."""
    reports = words[0] == "--report"
    script, *sys.argv[1:] = words[reports:]
    sys.argv[0] = script
    sys.path[:0] = [str(Path(script).resolve().parent), str(ROOT)]
    install_for_accelerate()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if reports:
            sys.stdout.write(f"{RECORD}\n")


if __name__ == "__main__":
    # The module is imported a second time by others: there has to be one device.
    sys.modules["fake_device"] = sys.modules["__main__"]
    main(sys.argv[1:])
