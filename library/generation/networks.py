"""Networks for generation: loaded from files of any trainer, in the forward pass or merged, at any strength."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from library.adapters.lora_file import LoraFile, read_lora, to_state_dict
from library.adapters.names import ALL_ROLES, kind_of, roles_of
from library.adapters.readers import reads_wholly
from library.config.generation import GenerateConfig, NetworksConfig
from library.config.network import NetworkConfig
from library.errors import UserError, named
from library.models.base import BaseModel
from library.networks.applied import apply_file
from library.networks.merging import merge_file
from library.networks.modules import find_module, is_foreign, module_errors
from library.networks.protocol import HasMultiplier
from library.networks.third_party import check_matrices, is_for_lycoris, words_in
from library.networks.views import SECOND_TEXT, with_canonical_names
from library.weight_file import EMBEDDING, check_adapter, data_sha256, open_weights, read_metadata

logger = logging.getLogger(__name__)

# Modules with which a file acts as in other programs.
COMMON_MODULES = ("networks.lora", "networks.dylora", "lycoris.kohya")


@dataclasses.dataclass
class LoadedNetwork:
    """A network of the run."""

    options: NetworkConfig
    path: Path
    multiplier: float  # of --network_mul
    is_merged: bool
    hashes: tuple[str, ...]  # by which programs know it, first the SHA-256 of its tensors
    alias: str  # its name in its metadata
    has_tag: bool  # whether AUTOMATIC1111 reads it by `<lora:name:1>`
    applied: HasMultiplier | None = None  # None where it is merged or added to the weights

    @property
    def sha256(self) -> str:
        """The SHA-256 of its tensors."""
        return self.hashes[0]


@dataclasses.dataclass
class LoadedNetworks:
    """The networks of a run, in order."""

    all: list[LoadedNetwork]
    models: BaseModel
    base: dict[torch.nn.Parameter, torch.Tensor] | None = None  # weights without networks, with --network_pre_calc
    added: tuple[float, ...] | None = None  # strengths with which they are in the weights now

    @property
    def changeable(self) -> list[LoadedNetwork]:
        """Those whose strength a prompt can change."""
        return [network for network in self.all if not network.is_merged]

    def multipliers(self, asked: Sequence[float] | None) -> tuple[float, ...]:
        """Return the strength of each changeable network for --am: the last number is for all that are left."""
        own = [network.multiplier for network in self.changeable]
        if asked is None:
            return tuple(own)
        return tuple(asked[min(index, len(asked) - 1)] for index in range(len(own)))

    def set(self, multipliers: Sequence[float]) -> None:
        """Make the changeable networks act with these strengths."""
        for network, multiplier in zip(self.changeable, multipliers, strict=True):
            if network.applied is not None:
                network.applied.set_multiplier(multiplier)
        if self.base is not None and tuple(multipliers) != self.added:
            with contextlib.nullcontext() if self.added is None else nothing_told_again():
                self._add_to_weights(self.base, multipliers)
            self.added = tuple(multipliers)

    @torch.no_grad()
    def _add_to_weights(self, base: Mapping[torch.nn.Parameter, torch.Tensor], multipliers: Sequence[float]) -> None:
        for parameter, weight in base.items():
            parameter.copy_(weight)
        for network, multiplier in zip(self.changeable, multipliers, strict=True):
            if network.applied is None:
                merge_one(network, multiplier, self.models)


@contextlib.contextmanager
def nothing_told_again() -> Iterator[None]:
    """Within this context the modules of the suite tell nothing but errors: they add files that they added before."""
    modules = logging.getLogger("networks")
    level = modules.level
    modules.setLevel(logging.ERROR)
    try:
        yield
    finally:
        modules.setLevel(level)


def options_of(config: NetworksConfig) -> list[tuple[NetworkConfig, Path, float]]:
    """Return module options, file and strength of each network of the command line."""
    modules, files = config.network_module or (), config.network_weights or ()
    multipliers, arguments = config.network_mul or (), config.network_args or ()
    rows = []
    for index, (name, path) in enumerate(zip(modules, files, strict=True)):
        given = arguments[index] if index < len(arguments) else None
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        rows.append((NetworkConfig(network_module=name, network_args=given), path, multiplier))
    return rows


def show_metadata(config: NetworksConfig) -> None:
    """Show what the files of the networks say of themselves."""
    for path in config.network_weights or ():
        text = json.dumps(dict(sorted(read_metadata(path).items())), ensure_ascii=False, indent=2)
        logger.info("%s: %s", path, text)


def check_files(networks: NetworksConfig, embeddings: Sequence[Path]) -> None:
    """Raise UserError for files that are damaged or that their modules cannot draw; warn of what is not drawn.

    embeddings are the files of --textual_inversion_embeddings. What a foreign module takes shows only when it reads.
    """
    for settings, path, _ in options_of(networks):
        names = open_weights(path).shapes.keys()
        words = words_in(names)
        if words and path not in embeddings:
            logger.warning(
                "%s holds embeddings, which are not used (%s): name it in --textual_inversion_embeddings, too",
                path,
                ", ".join(words),
            )
        if is_foreign(settings):
            check_foreign(path)
            continue
        try:
            file = read_lora(path)
        except UserError as error:
            advice = "; --network_module lycoris.kohya draws what LyCORIS trained" if is_for_lycoris(names) else ""
            raise UserError(f"{error}{advice}") from None
        warn_of_modules(file)
        left = names - {name for _, _, name in roles_of(names, ALL_ROLES)}
        left = {name for name in left if not name.startswith(EMBEDDING)}
        if left:
            advice = "; --network_module lycoris.kohya draws norms" if "norm" in map(kind_of, left) else ""
            logger.warning(
                "%s: %s does not draw %d of %d tensors (%s)%s",
                path,
                settings.network_module,
                len(left),
                len(names),
                named(sorted(left)),
                advice,
            )


def check_foreign(path: Path) -> None:
    """Raise UserError for a damaged file of a foreign module, or one that has a module under two names."""
    check_adapter(path)
    shapes = open_weights(path).shapes
    check_matrices(shapes, path)
    is_alone = not any(name.startswith(SECOND_TEXT) for name in shapes)
    with_canonical_names(shapes, path, is_alone=is_alone, unet={})


def warn_of_modules(file: LoraFile) -> None:
    """Warn of the modules of a file that no model of its family has: they are not drawn."""
    lost = sorted({module for module, _, _ in roles_of(file.strange, ALL_ROLES)})
    if lost:
        logger.warning(
            "%s: %d of %d modules are layers of no %s and are left out: %s",
            file.path,
            len(lost),
            len(lost) + len(file.changes),
            "SD 1.x or 2.x model" if file.family is None else f"{file.family.title} model",
            named(lost),
        )


def load_networks(config: GenerateConfig, models: BaseModel, device: torch.device) -> LoadedNetworks:
    """Return the networks of a run, merged or applied to the models; raises UserError for files of other models.

    Foreign networks are always applied: lycoris merges a LoHa or LoKr with its alpha / rank taken twice.
    """
    options = config.networks
    networks = []
    for index, (settings, path, multiplier) in enumerate(options_of(options)):
        wanted = options.network_merge or index < (options.network_merge_n_models or 0)
        if is_foreign(settings) and (wanted or options.network_pre_calc):
            logger.warning("%s is not merged but applied: merging is safe with networks of this suite only", path)
        is_merged = wanted and not is_foreign(settings)
        networks.append(described(settings, path, multiplier, is_merged=is_merged))
    found = LoadedNetworks(networks, models)
    for network in networks:
        if network.is_merged:
            merge_one(network, network.multiplier, models)
            logger.info("%s is merged into the model with strength %g", network.path, network.multiplier)
    if options.network_pre_calc and found.changeable:
        parts = (models.unet, *models.text_modules)
        found.base = {p: p.detach().clone() for part in parts for p in part.parameters() if p.ndim > 1}
    for network in found.changeable:
        if found.base is None or is_foreign(network.options):
            apply_one(network, models, device)
    return found


def described(options: NetworkConfig, path: Path, multiplier: float, *, is_merged: bool) -> LoadedNetwork:
    """Return a network that does not act yet, with what identifies it in other programs.

    AUTOMATIC1111 takes the hash in the metadata where there is one, which lycoris begins with 0x.
    """
    file = open_weights(path)
    own = file.metadata.get("sshs_model_hash", "").lower()
    hashes = (data_sha256(path), own, own.removeprefix("0x"))
    return LoadedNetwork(
        options,
        path,
        multiplier,
        is_merged,
        hashes=tuple(dict.fromkeys(filter(None, hashes))),
        alias=file.metadata.get("ss_output_name", ""),
        has_tag=options.network_module in COMMON_MODULES and reads_wholly("AUTOMATIC1111", file.shapes, file.metadata),
    )


def weights_of(network: LoadedNetwork, models: BaseModel) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a file as our modules read them, whoever wrote it; None for a foreign module."""
    if is_foreign(network.options):
        return None
    file = read_lora(network.path)
    if file.family is not None and file.family != models.family:
        raise UserError(f"{network.path} is for {file.family.title}, the model is {models.family.title}")
    return to_state_dict(file.changes, torch.float32)  # `check_files` told what is left out


def apply_one(network: LoadedNetwork, models: BaseModel, device: torch.device) -> None:
    """Make a network act in the forward pass of the models, on the device where they will work."""
    with module_errors(network.options, "create_network_from_weights", network.path):
        module = find_module(network.options)
        weights = weights_of(network, models)
        network.applied = apply_file(module, network.path, models, network.multiplier, device=device, weights=weights)


def merge_one(network: LoadedNetwork, multiplier: float, models: BaseModel) -> None:
    """Add a network to the weights of the models."""
    with module_errors(network.options, "merge_to", network.path):
        module = find_module(network.options)
        merge_file(module, network.path, multiplier, models, weights_of(network, models))
