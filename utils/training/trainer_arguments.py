"""The arguments of a training as PaddleNLP's Trainer takes them."""

import logging
import math
from dataclasses import fields
from typing import TYPE_CHECKING

from ..arguments.fields import ELSEWHERE
from ..arguments.training import TrainArguments
from ..encoding import engines
from ..models.checkpoint import Checkpoint
from ..models.paddlenlp import import_paddlenlp
from .encoder import multiplies_bfloat16

if TYPE_CHECKING:
    from paddlenlp.trainer import TrainingArguments

logger = logging.getLogger(__name__)

# What a product of a number of steps and of epochs may lie above a whole number by rounding.
_ROUNDING = 1e-6


def trainer_arguments(
    given: TrainArguments, base: Checkpoint, n_steps: int, n_ranks: int, has_dev: bool
) -> "TrainingArguments":
    """PaddleNLP's TrainingArguments; what does not suit the device or the data is changed, and said.

    Args:
        n_steps: of an epoch.
        has_dev: whether there are dev rows to evaluate.

    Raises:
        ValueError: PaddleNLP refuses them.
    """
    import_paddlenlp()
    from paddlenlp.trainer import TrainingArguments

    theirs = {f.name for f in fields(TrainingArguments)}
    ours = {f.name for f in fields(TrainArguments) if f.metadata["help"] != ELSEWHERE}
    options = {name: getattr(given, name) for name in theirs & ours} | given.trainer_options()
    on_gpu = engines.device() == "gpu"
    for name in ("bf16", "fp16"):
        if options.get(name) and not on_gpu:
            options[name] = False  # the Trainer's way is a GPU's
            if name == "fp16" or not multiplies_bfloat16(base):
                logger.warning("warning: %s is not used on this processor; training in float32", name)
    if options.pop("sharding", None) and n_ranks > 1:
        logger.info("sharding saves memory only and is not used: every rank keeps the whole optimizer")
    settled = {
        "do_train": True, "device": engines.device(), "disable_tqdm": True, "unified_checkpoint": False,
        "fp16_opt_level": "O1", "recompute": False, "skip_profile_timer": True, "load_best_model_at_end": False,
    }  # fmt: skip
    for name in ("device", "unified_checkpoint", "fp16_opt_level"):
        if options.get(name) not in (None, settled[name]):
            logger.info("%s is %r, not %r, as this training needs it", name, settled[name], options[name])
    options |= settled
    options["gradient_accumulation_steps"] = 1  # the loader's steps have all their batches
    if given.max_steps < 0:  # the Trainer rounds a part of an epoch down, to no step at all
        options["max_steps"] = max(1, math.ceil(n_steps * given.num_train_epochs - _ROUNDING))
    options.setdefault("report_to", ["visualdl"])
    options["do_eval"] = has_dev  # true alone would make PaddleNLP evaluate every few steps
    if not has_dev:
        options["evaluation_strategy"] = "no"
    try:
        arguments = TrainingArguments(**options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        raise ValueError(f"PaddleNLP's Trainer does not take these arguments: {reason}") from error
    arguments.decay_steps = given.decay_steps  # its SFTConfig's, which its Trainer asks for
    return arguments
