"""Network modules, the suite's and third parties' (lycoris.kohya, ...): import, calls, and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import traceback
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from library.config.network import NetworkConfig
from library.config.values import written
from library.errors import UserError, is_out_of_memory, shortened
from library.models.base import BaseModel
from library.models.family import ModelFamily, detect_family
from library.networks.protocol import ChecksArguments, Network, NetworkModule, ReadsFiles
from library.networks.third_party import no_layers_by_preset, with_alphas
from library.networks.views import Models, canonical_names, models_for
from library.weight_file import check_adapter, check_name, open_weights, read_weights

PACKAGES = {"lycoris": "lycoris-lora"}  # module -> package on PyPI, if its name differs
# Advice for known failures: first part of the module's name, part of the message, advice.
HINTS = (
    (
        "lycoris",
        "duplicated lora name",
        "its default preset takes layers of the U-Net twice; add preset=attn-mlp to --network_args",
    ),
    ("lycoris", "IA3Module.make_module_from_state_dict", "this version of it writes files of IA3, but reads none"),
)


@dataclasses.dataclass(frozen=True)
class ImportedModule:
    """A network module with the options of its networks."""

    module: NetworkModule
    options: NetworkConfig

    @property
    def name(self) -> str:
        return self.options.network_module

    @property
    def is_foreign(self) -> bool:
        return is_foreign(self.options)

    @property
    def arguments(self) -> dict[str, str]:
        return self.options.network_args or {}

    def models(self, base: BaseModel, *, without: Collection[int] = ()) -> Models:
        """Return the models as the module takes them; text encoders with these numbers, from 0, get no network."""
        return models_for(base, is_foreign=self.is_foreign, without=without)

    def create(self, models: Models) -> Network | None:
        """Return a new network with rank, alpha, dropout and arguments of the options."""
        options = self.options
        with module_errors(options, "create_network"):
            return self.module.create_network(
                1.0,
                options.network_dim,
                options.network_alpha,
                models.vae,
                models.text_encoder,
                models.unet,
                neuron_dropout=options.network_dropout,
                **{"dropout": options.network_dropout} | self.arguments,
            )

    def read(
        self,
        path: Path,
        base: BaseModel,
        models: Models,
        *,
        multiplier: float = 1.0,
        weights: Mapping[str, Tensor] | None = None,
        arguments: Mapping[str, Any],
    ) -> tuple[Network | None, Mapping[str, Tensor]]:
        """Return (network over models with the shapes of a file, the file's tensors); weights are these, if read."""
        module = self.module
        if not isinstance(module, ReadsFiles):
            raise UserError(f"--network_module {self.name} has no create_network_from_weights, which reads files")
        weights = read_weights(path) if weights is None else weights
        if not self.is_foreign:
            return module.create_network_from_weights(multiplier, str(path), *models, weights, **arguments)
        named = canonical_names(weights, base, path)
        with no_layers_by_preset(self.module):
            network, _ = module.create_network_from_weights(
                multiplier, str(path), *models, with_alphas(named), **arguments
            )
        return network, named


def find_module(config: NetworkConfig) -> ImportedModule:
    """Import and return the network module of the options; raises UserError if that fails."""
    name = config.network_module
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        package = PACKAGES.get((error.name or "").split(".")[0])
        advice = f"pip install {package}" if package else "networks.lora trains a LoRA"
        raise UserError(f"--network_module {name}: {error}; {advice}") from None
    except Exception as error:
        if not is_foreign(config):
            raise
        raise UserError(failure(config, "import", error)) from error
    if not isinstance(module, NetworkModule):
        raise UserError(f"--network_module {name} is no network module: it has no create_network")
    return ImportedModule(module, config)


def check_network(config: NetworkConfig) -> None:
    """Raise UserError for no network module, for unknown arguments, or for damaged adapter files."""
    check_arguments(config, None)
    found = find_module(config)
    module = found.module
    needs_files = {"--base_weights": config.base_weights, "--dim_from_weights": config.dim_from_weights}
    for option, given in needs_files.items():
        if given and not isinstance(module, ReadsFiles):
            raise UserError(f"{option}: {config.network_module} has no create_network_from_weights; leave {option} out")
    for path in (config.network_weights, *(config.base_weights or ())):
        if path is not None:
            refuse_model(path)
            check_adapter(path)
            if found.is_foreign:
                check_name(path)


def check_arguments(config: NetworkConfig, family: ModelFamily | None) -> None:
    """Raise UserError for arguments that a network module does not know, or not for models of a family."""
    found, is_sgm = find_module(config), None if family is None else family.has_checkpoint_paths
    module = found.module
    if isinstance(module, ChecksArguments):
        with module_errors(config, "check_network_args"):
            module.check_network_args(
                config.network_dim, found.arguments, from_file=config.dim_from_weights, is_sgm=is_sgm
            )


def refuse_model(path: Path) -> None:
    """Raise UserError for a file that holds a base model; of safetensors only the header is read."""
    shapes = open_weights(path).shapes
    try:
        detect_family(shapes, str(path))
    except UserError:
        return
    if not any("lora" in name for name in shapes):
        raise UserError(f"{path} is a base model, not a LoRA file: are two options swapped?")


def is_foreign(config: NetworkConfig) -> bool:
    """Return whether the network module is a third party's."""
    return not config.network_module.startswith("networks.")


@contextlib.contextmanager
def module_errors(config: NetworkConfig, doing: str, file: Path | None = None) -> Iterator[None]:
    """Turn exceptions of a network module into a UserError.

    A ValueError of the suite's own modules becomes its message; any other exception of theirs is a bug and passes.
    Any exception of a foreign module is reported with its line of code and the arguments.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if is_foreign(config):
            raise UserError(failure(config, doing, error)) from error
        if isinstance(error, ValueError):
            place = "" if file is None or str(file) in str(error) else f"{file}: "
            raise UserError(f"--network_module {config.network_module}: {place}{error}") from None
        raise


def failure(config: NetworkConfig, doing: str, error: Exception) -> str:
    """Return one line: what failed in a foreign module, where, with which arguments, and advice."""
    package = config.network_module.split(".")[0]
    frames = traceback.extract_tb(error.__traceback__)
    # The last frame in the module's own package; the frames below it are those of torch and others.
    own = [frame for frame in frames if package in Path(frame.filename).with_suffix("").parts]
    place = (own or frames)[-1]
    message = " ".join(str(error).split()) or place.line or "no message"
    arguments = " ".join(written(config.network_args or {})) or "none"
    advice = [text for first, part, text in HINTS if package == first and part in message]
    return (
        f"--network_module {config.network_module} failed in {doing}: {type(error).__name__}: {shortened(message)} "
        f"({Path(place.filename).name}:{place.lineno}); --network_args: {arguments}; "
        f"{advice[0] if advice else 'see the documentation of the module'}"
    )
