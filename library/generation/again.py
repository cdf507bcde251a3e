"""Images that are generated again: the networks of a record among those of a run, and what differs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from library.files import file_sha256
from library.generation.a1111 import number
from library.generation.infotext import RunFacts
from library.generation.networks import LoadedNetwork, LoadedNetworks
from library.generation.recorded import Recorded, RecordedNetwork, plain
from library.generation.requests import Request

logger = logging.getLogger(__name__)


def again(record: Recorded, networks: LoadedNetworks) -> Request:
    """Return the request of a recorded image, with strengths for the networks that are not merged in this run.

    Networks of which the record says nothing keep their own strength.
    """
    found = matches(record.networks, networks.all)
    strengths = [
        network.multiplier if match is None or match.strength is None else match.strength
        for network, match in zip(networks.all, found, strict=True)
    ]
    left = tuple(s for s, network in zip(strengths, networks.all, strict=True) if not network.is_merged)
    return dataclasses.replace(record.request, multipliers=left or None)


def matches(recorded: Sequence[RecordedNetwork], given: Sequence[LoadedNetwork]) -> list[RecordedNetwork | None]:
    """Return the recorded network that each of a run is: that of its hash, or else of its name."""
    found: list[RecordedNetwork | None] = [None] * len(given)
    tests: tuple[Callable[[LoadedNetwork, RecordedNetwork], bool], ...] = (has_hash, has_name)
    left = list(recorded)
    for is_same in tests:
        for index, network in enumerate(given):
            match = next((entry for entry in left if found[index] is None and is_same(network, entry)), None)
            if match is not None:
                found[index] = match
                left = [entry for entry in left if entry is not match]
    return found


def has_hash(network: LoadedNetwork, recorded: RecordedNetwork) -> bool:
    """Return whether a network has a hash or its beginning: of its tensors, or of its file, as web sites have it."""
    digest = recorded.digest.lower()
    if not digest:
        return False
    return any(known.startswith(digest) for known in network.hashes) or file_hash(network.path).startswith(digest)


@functools.cache
def file_hash(path: Path) -> str:
    """Return the SHA-256 of a network's file."""
    return file_sha256(path)


def has_name(network: LoadedNetwork, recorded: RecordedNetwork) -> bool:
    """Return whether a network has a name: that of its file, or the one that its training gave it."""
    name = plain(recorded.name)
    return name in {plain(word) for word in (network.path.name, network.path.stem, network.alias)}


def tell_differences(
    recorded: Sequence[Recorded],
    networks: LoadedNetworks,
    facts: concurrent.futures.Future[RunFacts],
    embeddings: Sequence[Path],
) -> None:
    """Warn of images that were generated with other models, networks or settings than this run has."""
    for record in recorded:
        found = matches(record.networks, networks.all)
        lost = [entry for entry in record.networks if not any(entry is match for match in found)]
        new = [network for network, match in zip(networks.all, found, strict=True) if match is None]
        if lost or new:
            names = ", ".join(entry.name for entry in record.networks) or "none"
            logger.warning("a picture was drawn with other networks (%s) than --network_weights has", names)
        for entry in lost:
            logger.warning("the network %s of a picture is not among --network_weights: it is left out", shown(entry))
        for network, match in zip(networks.all, found, strict=True):
            tell_network(network, match)
        words = [word for word in record.embeddings if plain(word) not in {plain(path.stem) for path in embeddings}]
        if words:
            logger.warning("a picture has embeddings (%s) that --textual_inversion_embeddings lacks", ", ".join(words))
        model = record.model_sha256
        if model and not facts.result().model_sha256.startswith(model.lower()):
            logger.warning("a picture was drawn with another model (SHA-256 %s...) than --ckpt", model[:10])
        if record.zero_snr and not facts.result().zero_snr:
            logger.warning("a picture was drawn with zero terminal SNR: give --zero_terminal_snr, or it will differ")
        if facts.result().zero_snr and not record.zero_snr:
            logger.warning("a picture was drawn without zero terminal SNR, which this model has: it will differ")


def tell_network(network: LoadedNetwork, match: RecordedNetwork | None) -> None:
    """Warn of a network that acts otherwise than in a picture."""
    if match is None:
        return
    if match.digest and not has_hash(network, match):
        logger.warning("%s has the name of a picture's network, but is another file", network.path)
    if network.is_merged and match.strength not in (None, network.multiplier):
        logger.warning("a picture was drawn with %s at %g, which is merged now", network.path, match.strength)


def shown(network: RecordedNetwork) -> str:
    """Return a network of a picture for a message."""
    return network.name if network.strength is None else f"{network.name} at {number(network.strength)}"
