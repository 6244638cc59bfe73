"""How a training stands: the best evaluation so far, the mean loss, and whether it has gone wrong."""

import math
from dataclasses import dataclass, field

# Passages this alike, for so many steps in a row after the warm-up, mean that the model tells nothing apart
# any more. A model that was only pretrained may begin there and leave it; dropout keeps equal texts below 1.
_COLLAPSED_COSINE, _COLLAPSED_STEPS = 0.98, 20
# fp16 steps in a row whose loss is no number; the loss scale halves at each, and cannot go on for ever.
_SKIPPED_STEPS = 20


@dataclass
class Standing:
    """What a training knows about its past: the best dev metric so far, at which step, and how many evaluations have
    not bettered it since; the base model's dev metrics; the sum of all batches' losses, and of how many. ``judged_by``
    names that metric and the dev rows' digests.
    """

    judged_by: list[str]
    best: float | None = None
    best_step: int | None = None
    without_gain: int = 0
    loss_sum: float = 0.0
    n_losses: int = 0
    before: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict, judged_by: list[str]) -> "Standing":
        """A checkpoint's; what another metric or other dev rows said cannot be compared, and is left out."""
        found = cls(**values)
        if found.judged_by == judged_by:
            return found
        before = found.before if found.judged_by[1:] == judged_by[1:] else {}
        return cls(judged_by, loss_sum=found.loss_sum, n_losses=found.n_losses, before=before)

    def note(self, value: float, step: int) -> None:
        """An evaluation's metric; higher is better."""
        if self.best is None or value > self.best:
            self.best, self.best_step, self.without_gain = value, step, 0
        else:
            self.without_gain += 1

    def ends(self, patience: int | None) -> bool:
        """Whether early stopping ends the training here."""
        return bool(patience) and self.without_gain >= patience


class Guard:
    """Ends a training that has gone wrong.

    Args:
        batches_a_step: whose gradients are added up before an update.
    """

    def __init__(self, batches_a_step: int):
        self._batches_a_step = batches_a_step
        self._alike = self._skipped = 0

    def check(self, step: int, loss: float, mean_cosine: float, warming_up: bool, skips: bool) -> None:
        """Look at a batch, of which there may be several a step.

        Args:
            mean_cosine: of the batch's passages with each other.
            warming_up: True while the learning rate rises, when passages may be alike.
            skips: True if a step whose loss is no number is passed over, and the loss scaled less from there on.

        Raises:
            ValueError: the loss is no number, or the embeddings have collapsed.
        """
        if not math.isfinite(loss):
            self._skipped += 1
            if not skips or self._skipped > _SKIPPED_STEPS * self._batches_a_step:
                raise ValueError(f"the loss is {loss} at step {step}; lower learning_rate, or train in float32 or bf16")
            return
        self._skipped = 0
        self._alike = self._alike + 1 if mean_cosine > _COLLAPSED_COSINE and not warming_up else 0
        if self._alike >= _COLLAPSED_STEPS * self._batches_a_step:
            raise ValueError(
                f"the embeddings have collapsed: at step {step} a batch's passages have a mean cosine of "
                f"{mean_cosine:.4f} with each other; lower learning_rate or raise embedding_temperature"
            )
