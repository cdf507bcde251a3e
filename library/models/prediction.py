"""What a base model predicts, noise or v, and whether its schedule ends in pure noise: from its files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from library.models import family as families
from library.models import keys
from library.models.checkpoint import WHOLE, Checkpoint, scheduler_of

logger = logging.getLogger(__name__)

# Empty tensors that files of SDXL models bring: web UIs go by them, and metadata are lost more often.
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
KNOWN = {"epsilon": False, "v": True, "v_prediction": True}  # in metadata and in schedulers -> whether v is predicted
V_BIAS = f"{keys.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09  # standard deviation of that bias: larger in SD 2.x models that predict v, smaller in the others


class Prediction(NamedTuple):
    """What a model predicts, as far as its files tell."""

    predicts_v: bool | None  # None: nothing tells
    zero_snr: bool = False  # whether it was trained with pure noise at the last timestep
    sign: str = ""  # what tells it, as the end of a sentence
    is_sure: bool = True  # or else a guess from the weights


def prediction_of(checkpoint: Checkpoint) -> Prediction:
    """Return what a model predicts, from the strongest sign.

    Those are the scheduler of a folder; of a file the tensors, then the metadata, then for SD 2.x the spread of a bias,
    which ComfyUI goes by, too.
    """
    if checkpoint.is_folder:
        scheduler = scheduler_of(checkpoint.path)
        if scheduler is None:
            return Prediction(None)
        return Prediction(
            KNOWN.get(scheduler.get("prediction_type", "epsilon")),
            bool(scheduler.get("rescale_betas_zero_snr")),
            "by the scheduler of the folder",
        )
    names, said = checkpoint.parts[WHOLE].shapes, checkpoint.metadata.get("modelspec.prediction_type")
    zero_snr = ZERO_SNR_MARKER in names
    if V_MARKER in names:
        found = (V_MARKER, ZERO_SNR_MARKER) if zero_snr else (V_MARKER,)
        return Prediction(True, zero_snr, f"by its tensors {' and '.join(found)}")
    if said in KNOWN:
        return Prediction(KNOWN[said], zero_snr, "by its metadata")
    if checkpoint.family is families.SD2 and V_BIAS in names:
        spread = float(checkpoint.read(V_BIAS).float().std(unbiased=False))
        return Prediction(spread > V_SPREAD, zero_snr, "by the spread of a bias, which is no proof", is_sure=False)
    return Prediction(None, zero_snr)


def settled(found: Prediction, source: Path, *, predicts_v: bool, zero_snr: bool) -> tuple[bool, bool]:
    """Return whether v is predicted, and whether the schedule ends in pure noise: by the options or the files.

    predicts_v and zero_snr are the options. Logs what the files add to them, and where they contradict them.
    """
    says_v = bool(found.predicts_v) and found.is_sure
    is_v = predicts_v or says_v
    ends_in_noise = zero_snr or (is_v and found.zero_snr)
    # A guess is told and not used: the same command line would train something else than before.
    if found.predicts_v and not is_v:
        logger.warning("%s seems to predict v, %s: if it does, give --v_parameterization", source, found.sign)
    if found.predicts_v is False and found.is_sure and predicts_v:
        logger.warning("--v_parameterization was given, but %s predicts noise, %s; v is used", source, found.sign)
    if found.zero_snr and not is_v:
        logger.warning(
            "%s has zero terminal SNR, which only models that predict v can use, and nothing says that it does: "
            "if it does, give --v_parameterization",
            source,
        )
    added = {"--v_parameterization": is_v and not predicts_v, "--zero_terminal_snr": ends_in_noise and not zero_snr}
    names = [name for name, is_added in added.items() if is_added]
    if names:
        what = "v with zero terminal SNR" if ends_in_noise else "v"
        verb = "is" if len(names) == 1 else "are"
        logger.info("%s predicts %s, %s: %s %s set", source, what, found.sign, " and ".join(names), verb)
    return is_v, ends_in_noise
