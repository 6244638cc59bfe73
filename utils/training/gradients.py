"""One batch to gradients: embed, gather over ranks, loss, and back through the encoder.

The loss is split from the encoder at the pooled vectors. Each rank computes the loss of the whole batch
from the gathered vectors, takes the gradient with respect to its own, and sends that back through the
encoder. Summed over ranks, the parameters' gradients are those of one process with the whole batch, for
any loss, if dropout is the same. With a chunk size the encoder sees the batch in chunks, twice: without
gradients for the vectors, and again chunk by chunk for the backward pass (GradCache, Gao et al., 2021), so
that memory is bounded by a chunk. Dropout is seeded by a chunk's place in the whole batch, so both passes
agree. It is the same on any number of ranks only where all of them hold whole chunks; without a chunk size,
each rank's part of the batch is one chunk.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..models.tokenizers.tokenizer import padded
from ..ranks.group import Ranks, through_gloo
from .batches import TrainingBatch
from .encoder import TrainableEncoder
from .losses import LossFunction, Targets

if TYPE_CHECKING:
    from paddle import Tensor


@dataclass(frozen=True)
class _Chunk:
    """Queries of a batch with their passages. ``position`` counts queries over the whole batch."""

    query_tokens: list[Sequence[int]]
    passage_tokens: list[Sequence[int]]
    position: int


@dataclass
class Outcome:
    """What a step found out: the batch's loss, and the mean cosine of its passages with each other.

    Where negatives are not shared, a rank knows of its own part only; the batch's are the means ``over`` the ranks.
    """

    loss: float
    mean_cosine: float

    def over(self, ranks: Ranks) -> "Outcome":
        """The mean of what all ranks found, on every rank: NaN if one of them found no number."""
        found = ranks.gather_object((self.loss, self.mean_cosine))
        return Outcome(*(sum(values) / ranks.size for values in zip(*found, strict=True)))


class GradientStep:
    """Adds a batch's gradients to the parameters' ``grad``; call ``reduce`` before the optimizer's step.

    Args:
        objective: the loss over pooled vectors (``losses.objective``).
        targets: its settings; group size, mask and scores are filled in per batch.
        chunk_size: queries in memory at a time; None for all of them at once.
        shared: True if the passages of all ranks are negatives of every query.
        autocast: the context of the forward passes.
        scale: applied to the loss before its backward pass (loss scaling, accumulation).
    """

    def __init__(
        self,
        encoder: TrainableEncoder,
        objective: LossFunction,
        targets: Targets,
        pad_ids: tuple[int, int],
        seed: int,
        chunk_size: int | None = None,
        rank: int = 0,
        shared: bool = True,
        autocast: Callable = contextlib.nullcontext,
        scale: Callable = lambda loss: loss,
    ):
        self.encoder, self.objective, self.targets, self.pad_ids = encoder, objective, targets, pad_ids
        self.seed, self.chunk_size, self.rank, self.shared = seed, chunk_size, rank, shared
        self.autocast, self.scale = autocast, scale

    def __call__(self, batch: TrainingBatch) -> Outcome:
        """Forward and backward of one batch."""
        import paddle

        chunks = self._split(batch)
        replayed = len(chunks) > 1
        with paddle.no_grad() if replayed else contextlib.nullcontext():
            vectors = [self._embed(chunk, batch) for chunk in chunks]
        gradients, outcome = self._vector_gradients(vectors, batch)
        for chunk, pair, pair_gradients in zip(chunks, vectors, gradients, strict=True):
            pair = self._embed(chunk, batch) if replayed else pair
            paddle.autograd.backward(list(pair), list(pair_gradients))
        return outcome

    def _split(self, batch: TrainingBatch) -> list[_Chunk]:
        n, group_size = len(batch.query_tokens), self.targets.group_size
        size = self.chunk_size or n
        first = sum(batch.counts[: self.rank])
        return [
            _Chunk(
                batch.query_tokens[start : start + size],
                batch.passage_tokens[start * group_size : (start + size) * group_size],
                first + start,
            )
            for start in range(0, n, size)
        ]

    def _embed(self, chunk: _Chunk, batch: TrainingBatch) -> tuple["Tensor", "Tensor"]:
        """Pooled vectors of a chunk's queries and passages."""
        pooled = []
        for side, tokens in enumerate((chunk.query_tokens, chunk.passage_tokens)):
            self.encoder.seed_dropout(self.seed, batch.number, chunk.position, side)
            with self.autocast():
                pooled.append(self.encoder.embed(*padded(tokens, self.pad_ids[side])))
        return pooled[0], pooled[1]

    def _vector_gradients(
        self, vectors: list[tuple["Tensor", "Tensor"]], batch: TrainingBatch
    ) -> tuple[list[tuple["Tensor", "Tensor"]], Outcome]:
        """The loss's gradients with respect to this rank's vectors, chunk by chunk."""
        import paddle

        own = [paddle.concat([pair[side].detach() for pair in vectors]).astype("float32") for side in (0, 1)]
        group_size, counts = self.targets.group_size, batch.counts
        if self.shared:
            first, weight = sum(counts[: self.rank]), 1.0
            whole = [_gathered(own[0], counts), _gathered(own[1], [count * group_size for count in counts])]
        else:
            # Each rank's mean loss counts as much as it has queries, so that the sum is the batch's mean.
            first, weight, whole = 0, counts[self.rank] / sum(counts), own
        for tensor in whole:
            tensor.stop_gradient = False
        scores = paddle.to_tensor(batch.scores) if batch.scores is not None else None
        targets = replace(self.targets, ignored=paddle.to_tensor(batch.ignored), scores=scores)
        loss = self.objective(whole[0], whole[1], targets)
        self.scale(loss * weight).backward()
        n = counts[self.rank]
        bounds = (first, first + n), (first * group_size, (first + n) * group_size)
        gradients = [tensor.grad[a:b] for tensor, (a, b) in zip(whole, bounds, strict=True)]
        cuts = [list(itertools.accumulate((len(pair[side]) for pair in vectors), initial=0)) for side in (0, 1)]
        chunked = [
            tuple(gradients[side][cuts[side][i] : cuts[side][i + 1]].astype(pair[side].dtype) for side in (0, 1))
            for i, pair in enumerate(vectors)
        ]
        value = float(loss) * (1.0 if self.shared else weight * len(counts))
        # Paddle's softmax on a CPU turns rows of NaN into finite numbers, so the loss alone does not tell.
        if not all(np.isfinite(tensor.detach().numpy()).all() for tensor in whole):
            value = math.nan
        return chunked, Outcome(value, _mean_cosine(whole[1].detach().numpy()))


def reduce(parameters: Sequence["Tensor"]) -> None:
    """Sum the gradients over ranks, in place; a parameter without one on some rank counts zeros there."""
    import paddle
    import paddle.distributed as dist

    if dist.get_world_size() == 1:
        return
    parameters = [p for p in parameters if not p.stop_gradient]
    missing = paddle.to_tensor([p.grad is not None for p in parameters], "int32")
    with through_gloo():
        dist.all_reduce(missing)
        for parameter, n_ranks in zip(parameters, missing.tolist(), strict=True):
            if n_ranks:
                if parameter.grad is None:
                    parameter.grad = paddle.zeros_like(parameter)
                dist.all_reduce(parameter.grad)


def _gathered(own: "Tensor", counts: list[int]) -> "Tensor":
    """Every rank's rows, in rank order, float32."""
    if len(counts) == 1:
        return own.clone()
    import paddle
    import paddle.distributed as dist

    most = max(counts)
    if len(own) < most:
        own = paddle.concat([own, paddle.zeros([most - len(own), own.shape[1]], own.dtype)])
    parts: list = []
    with through_gloo():
        dist.all_gather(parts, own)
    return paddle.concat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _mean_cosine(vectors: np.ndarray) -> float:
    """The mean cosine of distinct rows with each other; 0 for a single row."""
    n = len(vectors)
    if n < 2:
        return 0.0
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return float((np.square(unit.sum(0, dtype=np.float64)).sum() - n) / (n * (n - 1)))
