"""One alpha for all modules of a file: diffusers takes one for many of them, whatever the file says.

Read from diffusers 0.42.1 (`get_peft_kwargs` and `_get_alpha_name`), which turns the alphas of a file in the names of
sd-scripts into a configuration of PEFT. The commonest alpha of a part (U-Net, each text encoder) is that of the part.
Others are entries by module, but the entries of attention layers have names that match no layer, and so have those of
text encoders since transformers 5.6.
"""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from library.adapters.low_rank import Change
from library.adapters.names import spelled

logger = logging.getLogger(__name__)

NOTE = "alphas_note"  # metadata of a file that diffusers misreads
# Modules that have the commonest alpha of their part in diffusers.
WITHOUT_OWN = re.compile(r"lora_te|.*_to_(q|k|v|out_0)$")


def misread(alphas: Mapping[str, float], written: Collection[str] | None = None) -> list[str]:
    """Return the modules (by their names in files of sd-scripts) that diffusers applies with another alpha.

    written are those whose alpha is in the file (None: all); diffusers gives the others the commonest one, too. Where
    two alphas are equally common, the order of the tensors decides in diffusers, and all modules count as misread.
    """
    given = alphas.keys() if written is None else written
    parts: dict[str, dict[str, float]] = {}
    for name, alpha in alphas.items():
        if name.startswith("lora_"):  # only such files have alphas that are turned into a configuration
            parts.setdefault(spelled(name).part, {})[name] = alpha
    found = []
    for part in parts.values():
        counts = collections.Counter(alpha for name, alpha in part.items() if name in given).most_common(2)
        if not counts:  # without any alpha, diffusers takes the rank of each module
            continue
        common = counts[0][0] if len({count for _, count in counts}) == len(counts) else None
        affected = (name for name in part if name not in given or WITHOUT_OWN.match(name))
        found += [name for name in affected if part[name] != common]
    return found


def note_on_alphas(alphas: Mapping[str, float]) -> str | None:
    """Return in words that diffusers misreads a file with such alphas by module, and the ways out; None if not so."""
    number = len(misread(alphas))
    if not number:
        return None
    return (
        f"diffusers takes one alpha for all attention layers: {number} of {len(alphas)} modules of the file are too "
        "strong or too weak there, other programs read the alpha of each; --network_args one_alpha=True writes files "
        "that diffusers reads, too, and networks/convert_lora.py converts existing ones"
    )


def with_one_alpha(changes: Mapping[str, Change], source: Path) -> dict[str, Change]:
    """Return the same changes, all with the largest alpha if diffusers would misread them as they are.

    The ratio of the alphas is multiplied into the factors. source is the file that the log message names.
    """
    alphas = {name: change.alpha for name, change in changes.items()}
    if not misread(alphas):
        return dict(changes)
    largest = max(alphas.values(), key=abs)
    logger.info(
        "%s: the modules have %d alphas, of which diffusers would take one for all; now all have alpha %g, and the "
        "matrices are scaled to match",
        source,
        len(set(alphas.values())),
        largest,
    )
    return {name: change.with_alpha(largest) for name, change in changes.items()}
