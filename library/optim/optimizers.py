"""Optimizers as rows of a table; packages are imported when a row is chosen."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import logging
from typing import Any

import torch

from library.config.optimizer import OptimizerConfig
from library.config.options import nearest
from library.config.values import split_pairs
from library.errors import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OptimizerRow:
    """A name users know, the class it stands for, arguments that apply unless given.

    An elementwise optimizer treats every number by itself, so that parameters can be laid out flat.
    """

    name: str
    path: str
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    elementwise: bool = False


ROWS = (
    OptimizerRow("AdamW", "torch.optim.AdamW", {"fused": True}, elementwise=True),
    OptimizerRow("AdamW8bit", "bitsandbytes.optim.AdamW8bit"),
    OptimizerRow("PagedAdamW", "bitsandbytes.optim.PagedAdamW"),
    OptimizerRow("PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"),
    OptimizerRow("PagedAdamW32bit", "bitsandbytes.optim.PagedAdamW32bit"),
    OptimizerRow("Lion8bit", "bitsandbytes.optim.Lion8bit"),
    OptimizerRow("PagedLion8bit", "bitsandbytes.optim.PagedLion8bit"),
    OptimizerRow("SGDNesterov", "torch.optim.SGD", {"nesterov": True, "momentum": 0.9}, elementwise=True),
    OptimizerRow("SGDNesterov8bit", "bitsandbytes.optim.SGD8bit", {"nesterov": True, "momentum": 0.9}),
    OptimizerRow("Lion", "lion_pytorch.Lion", elementwise=True),
    OptimizerRow("AdaFactor", "transformers.optimization.Adafactor", {"relative_step": True}),
)
BY_NAME = {row.name.lower(): row for row in ROWS}


@dataclasses.dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer that is known to exist, with all its arguments: what --optimizer_type and _args mean."""

    path: str
    kind: type
    arguments: dict[str, Any]
    elementwise: bool

    @property
    def sets_own_rate(self) -> bool:
        """Whether the optimizer derives its learning rate itself (Adafactor with relative_step)."""
        return bool(self.arguments.get("relative_step"))

    @property
    def record(self) -> str:
        """The text for ss_optimizer: class, and the arguments that were given."""
        arguments = ",".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.kind.__module__}.{self.kind.__qualname__}" + (f"({arguments})" if arguments else "")


def choose_optimizer(config: OptimizerConfig) -> OptimizerChoice:
    """Return the optimizer class and arguments; raises UserError for an unknown one or a missing package."""
    name = config.optimizer_type or "AdamW"
    row = BY_NAME.get(name.lower())
    if row is None:
        row = OptimizerRow(name, name if "." in name else f"torch.optim.{name}")
    given = {key: read_literal(key, text) for key, text in split_pairs(config.optimizer_args).items()}
    return OptimizerChoice(
        row.path, import_class(row.path, "--optimizer_type"), _with_defaults(row, given), row.elementwise
    )


def _with_defaults(row: OptimizerRow, given: dict[str, Any]) -> dict[str, Any]:
    defaults = row.defaults
    if row.name == "AdamW" and {"foreach", "capturable", "differentiable"} & set(given):
        defaults = {}
    if row.name == "AdaFactor" and given.get("warmup_init") and not given.get("relative_step", True):
        raise UserError("--optimizer_args: warmup_init=True needs relative_step=True")
    return defaults | given


def read_literal(key: str, text: str) -> Any:
    """Return the value of key=text as Python writes it: a number, True, None, (0.9, 0.999), 'a text'."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(
            f"--optimizer_args: {key} must be a number, True, False, None, a list or a quoted text, got {text}"
        ) from None


def import_class(path: str, option: str) -> type:
    """Return the class at a dotted path; raises UserError that names the option and what to install or to write."""
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.split(".")[0].replace("_", "-")
        raise UserError(f"{option} {path}: {error}; try `pip install {package}`") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        near = nearest(class_name, [row.name for row in ROWS] if option == "--optimizer_type" else dir(module))
        raise UserError(f"{option}: {module_name} has no class {class_name}{near}")
    return found


def build_optimizer(
    choice: OptimizerChoice, groups: list[dict[str, Any]], learning_rate: float
) -> torch.optim.Optimizer:
    """Return the optimizer over parameter groups; raises UserError for arguments that it does not take."""
    groups = [group | {"params": list(group["params"])} for group in groups]
    if choice.sets_own_rate:
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    rate = None if choice.sets_own_rate else learning_rate
    try:
        return choice.kind(groups, lr=rate, **choice.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args: {choice.kind.__name__} refuses them: {error}") from None


def check_optimizer(choice: OptimizerChoice, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer over one small matrix after a step; raises UserError if it cannot be used so."""
    if choice.kind.__name__.lower().endswith("schedulefree"):
        raise UserError(
            f"--optimizer_type {choice.kind.__name__}: schedule-free optimizers are planned, but not in this version"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.nn.Parameter(torch.ones(2, 2, device=device))
    optimizer = build_optimizer(choice, [{"params": [probe], "lr": learning_rate}], learning_rate)
    probe.grad = torch.ones_like(probe)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--optimizer_type {choice.kind.__name__} does not work here: {error}") from None
    return optimizer


def current_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of each group, also where the optimizer derives it."""
    rates = []
    for group in optimizer.param_groups:
        if group["lr"] is None:
            state = next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), None)
            rates.append(float(optimizer._get_lr(group, state)) if state else 0.0)
        else:
            rates.append(float(group["lr"]))
    return rates
