"""Optimizers as rows of a table; packages are imported when an optimizer is chosen."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from library.config.optimizer import OPTIMIZER_NAMES, OptimizerConfig
from library.config.options import nearest
from library.errors import Problems, UserError, is_out_of_memory, message_of, shown

logger = logging.getLogger(__name__)


CPU = torch.device("cpu")


class StepError(UserError):
    """The step of an optimizer fails on a device; it may be made for another one."""


@runtime_checkable
class AveragesWeights(Protocol):
    """A schedule-free optimizer, which switches the parameters between those of training and averaged ones."""

    def train(self) -> None:
        """Set the parameters of training."""

    def eval(self) -> None:
        """Set the averaged parameters."""


@runtime_checkable
class DerivesRate(Protocol):
    """An optimizer like transformers' Adafactor, which has no public method for the rate."""

    def _get_lr(self, param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        """Return the learning rate of a parameter."""


@dataclasses.dataclass(frozen=True)
class Substitute:
    """The same algorithm in pytorch-optimizer, for machines without the original package.

    renames maps arguments of the original to those of the substitute; defaults are the original's if they differ.
    """

    path: str
    renames: dict[str, str] = dataclasses.field(default_factory=dict)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerRow:
    """A name, its class, and the defaults of its arguments; implementation are defaults that only concern the speed.

    An elementwise optimizer ignores which matrix a number is in, so parameters can be laid out flat.
    """

    name: str
    path: str
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    implementation: dict[str, Any] = dataclasses.field(default_factory=dict)
    elementwise: bool = False
    substitute: Substitute | None = None


def _adaptive(name: str, package: str, renames: dict[str, str], defaults: dict[str, Any]) -> OptimizerRow:
    """Return the row of an optimizer that estimates its step size by D-adaptation."""
    substitute = Substitute(f"pytorch_optimizer.{name}", renames, defaults)
    return OptimizerRow(name, f"{package}.{name}", elementwise=True, substitute=substitute)


def _schedule_free(name: str, substitute: str) -> OptimizerRow:
    return OptimizerRow(
        name, f"schedulefree.{name}", elementwise=True, substitute=Substitute(f"pytorch_optimizer.{substitute}")
    )


ADAM_NAMES = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}

ROWS = (
    OptimizerRow("AdamW", "torch.optim.AdamW", implementation={"fused": True}, elementwise=True),
    OptimizerRow("AdamW8bit", "bitsandbytes.optim.AdamW8bit", elementwise=True),
    OptimizerRow("PagedAdamW", "bitsandbytes.optim.PagedAdamW", elementwise=True),
    OptimizerRow("PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit", elementwise=True),
    OptimizerRow("PagedAdamW32bit", "bitsandbytes.optim.PagedAdamW32bit", elementwise=True),
    OptimizerRow("Lion8bit", "bitsandbytes.optim.Lion8bit", elementwise=True),
    OptimizerRow("PagedLion8bit", "bitsandbytes.optim.PagedLion8bit", elementwise=True),
    OptimizerRow("SGDNesterov", "torch.optim.SGD", {"nesterov": True, "momentum": 0.9}, elementwise=True),
    OptimizerRow(
        "SGDNesterov8bit", "bitsandbytes.optim.SGD8bit", {"nesterov": True, "momentum": 0.9}, elementwise=True
    ),
    OptimizerRow(
        "Lion",
        "lion_pytorch.Lion",
        elementwise=True,
        substitute=Substitute("pytorch_optimizer.Lion", {"decoupled_weight_decay": "fixed_decay"}),
    ),
    _adaptive("Prodigy", "prodigyopt", ADAM_NAMES, {}),
    _adaptive("DAdaptAdaGrad", "dadaptation", {}, {"eps": 1e-6}),
    _adaptive("DAdaptAdam", "dadaptation", ADAM_NAMES, {}),
    _adaptive("DAdaptAdan", "dadaptation", {}, {"weight_decay": 0.02}),
    _adaptive("DAdaptLion", "dadaptation", {}, {"betas": (0.9, 0.99)}),
    _adaptive("DAdaptSGD", "dadaptation", {}, {"momentum": 0.0}),
    OptimizerRow("DAdaptation", "dadaptation.experimental.DAdaptAdamPreprint", elementwise=True),
    OptimizerRow("DAdaptAdamPreprint", "dadaptation.experimental.DAdaptAdamPreprint", elementwise=True),
    OptimizerRow("DAdaptAdanIP", "dadaptation.experimental.DAdaptAdanIP", elementwise=True),
    _schedule_free("AdamWScheduleFree", "ScheduleFreeAdamW"),
    _schedule_free("RAdamScheduleFree", "ScheduleFreeRAdam"),
    _schedule_free("SGDScheduleFree", "ScheduleFreeSGD"),
    OptimizerRow("AdaFactor", "transformers.optimization.Adafactor", {"relative_step": True}),
)
BY_NAME = {row.name.lower(): row for row in ROWS}


@dataclasses.dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer of --optimizer_type and --optimizer_args: an existing class, with all its arguments."""

    path: str
    kind: type
    recorded: dict[str, Any]  # the arguments that files tell
    elementwise: bool
    implementation: dict[str, Any] = dataclasses.field(default_factory=dict)  # those that only concern the speed

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments but the learning rate."""
        return self.implementation | self.recorded

    @property
    def sets_own_rate(self) -> bool:
        """Whether the optimizer computes its learning rate (Adafactor with relative_step)."""
        return bool(self.arguments.get("relative_step"))

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer averages weights instead of a schedule (Defazio et al. 2024, arXiv 2405.15682)."""
        return "schedulefree" in self.kind.__name__.lower()

    @property
    def finds_step_size(self) -> bool:
        """Whether the optimizer multiplies the learning rate by a step size that it estimates (D-adaptation)."""
        return self.kind.__name__.lower().startswith(("dadapt", "prodigy"))

    @property
    def record(self) -> str:
        """The text for ss_optimizer, as sd-scripts writes it: class, and arguments in parentheses if there are any."""
        arguments = ",".join(f"{key}={value}" for key, value in self.recorded.items())
        return f"{self.kind.__module__}.{self.kind.__qualname__}" + (f"({arguments})" if arguments else "")


def choose_optimizer(config: OptimizerConfig) -> OptimizerChoice:
    """Return the optimizer class and arguments; raises UserError for an unknown one or a missing package."""
    name = config.optimizer_type or "AdamW"
    row = BY_NAME.get(name.lower())
    if row is None and "." not in name and not hasattr(torch.optim, name):
        raise UserError(
            f"--optimizer_type must be one of {', '.join(OPTIMIZER_NAMES)}, a class of torch.optim, or "
            f"package.module.Class, got {shown(name)}{nearest(name, OPTIMIZER_NAMES)}"
        )
    if row is None:
        row = OptimizerRow(name, name if "." in name else f"torch.optim.{name}")
    given = config.optimizer_args or {}
    if row.substitute is not None and not _is_installed(row.path) and _is_installed(row.substitute.path):
        return _substituted(row, row.substitute, given)
    kind = import_class(row.path, "--optimizer_type", package="pytorch-optimizer" if row.substitute else None)
    arguments = read_arguments(kind, given, "--optimizer_args")
    # Each of these is another implementation, which does not go with the default one.
    implementation = {} if {"foreach", "capturable", "differentiable"} & set(arguments) else row.implementation
    return OptimizerChoice(row.path, kind, _with_defaults(row, arguments), row.elementwise, implementation)


def _is_installed(path: str) -> bool:
    return importlib.util.find_spec(path.split(".", maxsplit=1)[0]) is not None


def _substituted(row: OptimizerRow, substitute: Substitute, given: Mapping[str, str]) -> OptimizerChoice:
    kind = import_class(substitute.path, "--optimizer_type")
    renamed = {substitute.renames.get(key, key): text for key, text in given.items()}
    known = list(inspect.signature(kind).parameters)
    for key in renamed:
        if key not in known:  # the class would accept it silently
            raise UserError(f"--optimizer_args: {kind.__name__} has no {key}{nearest(key, known)}")
    arguments = substitute.defaults | read_arguments(kind, renamed, "--optimizer_args")
    package = row.path.split(".")[0]
    logger.info("%s of pytorch-optimizer is used, since %s is not installed", row.name, package)
    return OptimizerChoice(substitute.path, kind, arguments, row.elementwise)


def _with_defaults(row: OptimizerRow, given: dict[str, Any]) -> dict[str, Any]:
    if row.name == "AdaFactor" and given.get("warmup_init") and not given.get("relative_step", True):
        raise UserError("--optimizer_args: warmup_init=True needs relative_step=True")
    return row.defaults | given


def read_arguments(kind: type, texts: Mapping[str, str], option: str) -> dict[str, Any]:
    """Return the arguments of a class from key -> text, each of the type of its default.

    0 and 1 stand for False and True. Raises UserError that names option and argument for a text that is no value, a
    value of another type, and an argument that the class does not have.
    """
    parameters = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments, problems = {}, Problems()
    for key, text in texts.items():
        if key == "lr":
            problems.add(f"{option}: lr is given by --learning_rate, got lr={text}")
        elif key not in parameters and not takes_any:
            problems.add(f"{option}: {kind.__name__} has no {key}{nearest(key, list(parameters))}")
        else:
            default = parameters[key].default if key in parameters else None
            arguments[key] = problems.run(_read_argument, key, text, default, f"{option}: {key} of {kind.__name__}")
    problems.raise_if_any()
    return arguments


def _read_argument(key: str, text: str, default: Any, label: str) -> Any:
    return _of_type(default, read_literal(key, text, label.partition(":")[0]), label)


def _of_type(default: Any, value: Any, label: str) -> Any:
    """Return a value in the type of a default; None goes with every type, and a default of None tells no type."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        if value not in (True, False, None):
            raise UserError(f"{label} must be True or False, got {shown(value)}")
        return value if value is None else bool(value)
    if isinstance(default, int | float) and not is_number and value is not None:
        raise UserError(f"{label} must be a number, got {shown(value)}")
    if isinstance(default, tuple) and value is not None:
        if not isinstance(value, tuple | list) or len(value) != len(default):
            raise UserError(f"{label} must be {len(default)} values as in {default}, got {shown(value)}")
        return tuple(value)
    return value


def read_literal(key: str, text: str, option: str) -> Any:
    """Return the value of key=text in Python syntax: a number, True, None, (0.9, 0.999), 'a text'."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # those in its documentation
        raise UserError(
            f"{option}: {key} must be a number, True, False, None, a list or a quoted text, got {shown(text)}"
        ) from None


def import_class(path: str, option: str, *, package: str | None = None) -> type:
    """Return the class at a dotted path; raises UserError with the option and what to install or to write."""
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = package or module_name.split(".")[0].replace("_", "-")
        raise UserError(f"{option} {path}: {error}; try `pip install {package}`") from None
    except Exception as error:  # ".", or a module that fails during import
        raise UserError(f"{option} {path} cannot be imported: {message_of(error)}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"{option}: {module_name} has no class {class_name}{nearest(class_name, dir(module))}")
    return found


def build_optimizer(
    choice: OptimizerChoice, groups: list[dict[str, Any]], learning_rate: float
) -> torch.optim.Optimizer:
    """Return the optimizer over parameter groups; raises UserError for arguments that it does not accept."""
    groups = [group | {"params": list(group["params"])} for group in groups]
    if choice.sets_own_rate:
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    rate = None if choice.sets_own_rate else learning_rate
    try:
        optimizer = choice.kind(groups, lr=rate, **choice.arguments)
    except Exception as error:  # also of other packages' classes
        if is_out_of_memory(error):
            raise
        raise UserError(f"--optimizer_args: {choice.kind.__name__} refuses them: {message_of(error)}") from error
    if isinstance(optimizer, AveragesWeights):
        optimizer.train()
    return optimizer


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within this context the parameters are the averages of a schedule-free optimizer; no change with any other.

    Switching there and back rounds. The parameters are restored from a copy, so that saving does not change a run.
    """
    if not isinstance(optimizer, AveragesWeights):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copies = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, values in zip(parameters, copies, strict=True):
                parameter.copy_(values)


def warn_of_rates(choice: OptimizerChoice, config: OptimizerConfig) -> None:
    """Warn of unsuitable learning rates for an optimizer that estimates its step size."""
    if not choice.finds_step_size:
        return
    given = (config.learning_rate, config.unet_lr, *(config.text_encoder_lr or ()))
    rates = {rate for rate in given if rate is not None}
    if min(rates) <= 0.1:
        logger.warning(
            "%s finds the step size itself and multiplies it by the learning rate: 1.0 suits, got %g",
            choice.kind.__name__,
            min(rates),
        )
    if len(rates) > 1:
        logger.warning(
            "%s estimates one step size for all parts: give them the same learning rate", choice.kind.__name__
        )


def adapted_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return learning rate times estimated step size of each group; empty for optimizers that do not estimate it."""
    return [float(group["d"] * group["lr"]) for group in optimizer.param_groups if group.get("d") is not None]


def check_optimizer(choice: OptimizerChoice, learning_rate: float, device: torch.device = CPU) -> torch.optim.Optimizer:
    """Return the optimizer over one small matrix on a device after a step; raises UserError if the step fails.

    It is a StepError if no argument is to blame.
    """
    try:
        return _stepped(choice, learning_rate, device)
    except UserError as error:
        for key, value in reversed(choice.recorded.items()):  # those of the user come last
            rest = {name: other for name, other in choice.recorded.items() if name != key}
            if _works(dataclasses.replace(choice, recorded=rest), learning_rate, device):
                raise UserError(f"--optimizer_args {key}={value!r} is refused: {message_of(error)}") from error
        raise


def _works(choice: OptimizerChoice, learning_rate: float, device: torch.device) -> bool:
    try:
        return _stepped(choice, learning_rate, device) is not None
    except UserError:
        return False


def _stepped(choice: OptimizerChoice, learning_rate: float, device: torch.device) -> torch.optim.Optimizer:
    probe = torch.nn.Parameter(torch.ones(2, 2, device=device))
    optimizer = build_optimizer(choice, [{"params": [probe], "lr": learning_rate}], learning_rate)
    probe.grad = torch.ones_like(probe)
    try:
        optimizer.step()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise StepError(f"--optimizer_type {choice.kind.__name__} does not work here: {message_of(error)}") from error
    return optimizer


def current_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of each group, also if the optimizer computes it; 0 if unknown."""
    return [_current_rate(optimizer, group) for group in optimizer.param_groups]


def _current_rate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    if group["lr"] is not None:
        return float(group["lr"])
    state = next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), None)
    return float(optimizer._get_lr(group, state)) if state and isinstance(optimizer, DerivesRate) else 0.0
