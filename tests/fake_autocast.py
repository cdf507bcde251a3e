"""What CUDA's autocast does to operations, for a device in Python (`fake_device.py`).

Which operations have a rule is read from torch's dispatcher, which knows those of CUDA in a build without it, too; which
rule it is comes from the lists in aten/src/ATen/autocast_mode.h (torch 2.13; the same in 2.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

KEY = "AutocastPrivateUse1"
HALF = (torch.float16, torch.bfloat16)

# In the type of autocast (the lower_precision_fp list).
NARROW = frozenset(["_convolution", "_convolution.deprecated", "conv1d", "conv2d", "conv3d", "conv_tbc", "convolution", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "cudnn_convolution", "cudnn_convolution_transpose", "linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addr", "addbmm", "baddbmm", "chain_matmul", "linalg_multi_dot", "linalg_vecdot", "einsum", "prelu", "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"])  # fmt: skip
# In float32 only if it is the type of an operand (the promote list).
PROMOTED = frozenset(
    [
        "addcdiv",
        "addcmul",
        "atan2",
        "bilinear",
        "cross",
        "dot",
        "vdot",
        "grid_sampler",
        "index_put",
        "scatter_add",
        "tensordot",
    ]
)
# In the operands' type with a sum in float32, unless a type is asked for (fp32_set_opt_dtype).
SUMMED = frozenset(["sum", "sum.dim_IntList", "prod", "prod.dim_int", "cumsum", "cumprod", "softmax.int", "log_softmax.int", "linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord"])  # fmt: skip
# All others with a rule are done in float32.

Narrowed = dict[int, tuple[Tensor, Tensor]]  # weight by id (kept alive) and its narrow copy


def autocast_kernels(operations: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the kernels under autocast of operations for which CUDA has a rule, by name."""
    narrowed: Narrowed = {}
    forget = torch.clear_autocast_cache

    def forget_all() -> None:
        narrowed.clear()
        forget()

    torch.clear_autocast_cache = forget_all  # which autocast calls when its outermost context ends
    for name, op in operations:
        yield name, _kernel(name, op, narrowed)


def _kernel(name: str, op: Any, narrowed: Narrowed) -> Callable[..., Any]:
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            if name in SUMMED:
                wide = {"dtype": torch.float32} if args[0].dtype in HALF and kwargs.get("dtype") is None else {}
                return op(*args, **kwargs | wide)
            dtype = torch.get_autocast_dtype("fakegpu") if name in NARROW else torch.float32
            if name in PROMOTED and all(one.dtype in HALF for one in args if isinstance(one, Tensor)):
                return op(*args, **kwargs)
            cast = [_cast(one, dtype, narrowed) for one in args]
            return op(*cast, **{key: _cast(one, dtype, narrowed) for key, one in kwargs.items()})

    return run


def _cast(value: Any, dtype: torch.dtype, narrowed: Narrowed) -> Any:
    """Return a value in a type; weights are narrowed once until autocast ends, as long as its cache is on."""
    if isinstance(value, list | tuple):
        return type(value)(_cast(one, dtype, narrowed) for one in value)
    if not isinstance(value, Tensor) or value.device.type != "fakegpu" or not value.is_floating_point():
        return value
    if value.dtype in (dtype, torch.float64):
        return value
    is_weight = value.dtype is torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()
    if dtype not in HALF or not is_weight or not torch.is_autocast_cache_enabled():
        return value.to(dtype)
    if id(value) not in narrowed:
        narrowed[id(value)] = value, value.to(dtype)
    return narrowed[id(value)][1]
