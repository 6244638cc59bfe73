"""Training losses: pure functions of tensors, and one registry of them by name.

Every function takes query vectors [n, d], passage vectors [n * g, d] and a ``Targets``, and returns a
scalar. Passages stand in groups of g: the positive of query i is row i * g, its hard negatives follow it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddle import Tensor

LossFunction = Callable[["Tensor", "Tensor", "Targets"], "Tensor"]


@dataclass(frozen=True)
class Targets:
    """What a loss must know besides the vectors.

    group_size: g, passages a query.
    ignored: bool [n, n * g], True where a passage is no negative of a query (a known positive, or an equal
        text); False at the queries' own positives.
    temperature: divides the similarities of the losses that say so.
    margin: in units of cosine (hinge) or of distance (triplet).
    scores: a teacher's, float32 [n, g], for the distillation losses; NaN where it gave none, and there the
        passage does not count.
    """

    group_size: int
    ignored: "Tensor | None" = None
    temperature: float = 0.02
    margin: float = 0.2
    scores: "Tensor | None" = None


@dataclass(frozen=True)
class Loss:
    """A registry entry: the function, and what it needs of the data."""

    function: LossFunction
    needs_scores: bool = False
    needs_group: bool = False


def contrastive(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """InfoNCE (van den Oord et al., 2018): cross-entropy of the positive among all passages of the batch.

    Similarities are divided by the temperature; ignored passages are left out of the denominator.
    """
    import paddle.nn.functional as functional

    logits = _without_ignored(_products(queries, passages) / targets.temperature, targets)
    return functional.cross_entropy(logits, _positive_columns(len(queries), targets.group_size))


def inf_cl(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """PaddleNLP's loss of that name, whose kernels compute InfoNCE in tiles: of similarities without a temperature."""
    return contrastive(queries, passages, replace(targets, temperature=1.0))


def symmetric(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """The mean of InfoNCE in both directions: the positive among all passages, and the query among all queries.

    As CLIP has it for images and texts (Radford et al., 2021). Queries that a positive is known to answer, too, are
    left out of its denominator.
    """
    import paddle
    import paddle.nn.functional as functional

    logits = _without_ignored(_products(queries, passages) / targets.temperature, targets)
    columns = _positive_columns(len(queries), targets.group_size)
    to_queries = paddle.index_select(logits, columns, axis=1).transpose([1, 0])
    found = functional.cross_entropy(logits, columns)
    return (found + functional.cross_entropy(to_queries, paddle.arange(len(queries)))) / 2


def triplet(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """Batch-hard triplet loss (Hermans et al., 2017): max(0, margin + d(q, positive) - d(q, nearest negative)).

    d is the Euclidean distance; a query without any negative counts 0.
    """
    import paddle
    import paddle.nn.functional as functional

    squared = (queries**2).sum(-1, keepdim=True) + (passages**2).sum(-1) - 2 * _products(queries, passages)
    distances = paddle.sqrt(paddle.clip(squared, min=1e-12))
    positive, negative = _split(distances, targets)
    nearest_one = paddle.where(_is_negative(targets), negative, paddle.full_like(negative, 1e9)).min(-1)
    return functional.relu(targets.margin + positive.squeeze(-1) - nearest_one).mean()


def hinge(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """Mean over queries and their negatives of max(0, margin - s(q, positive) + s(q, negative))."""
    import paddle.nn.functional as functional

    positive, others = _split(_products(queries, passages), targets)
    return _mean_over_negatives(functional.relu(targets.margin - positive + others), targets)


def pairwise_logistic(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """Mean over queries and their negatives of log(1 + exp((s(q, negative) - s(q, positive)) / temperature)).

    RankNet's loss (Burges et al., 2005).
    """
    import paddle.nn.functional as functional

    positive, others = _split(_products(queries, passages) / targets.temperature, targets)
    return _mean_over_negatives(functional.softplus(others - positive), targets)


def cosent(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """CoSENT (Su, 2022): log(1 + sum of exp((s(negative pair) - s(positive pair)) / temperature)).

    The sum runs over every positive pair and every negative pair of the whole batch, whatever their queries.
    """
    import paddle

    positive, others = _split(_products(queries, passages) / targets.temperature, targets)
    others = paddle.where(_is_negative(targets), others, paddle.full_like(others, -1e9))
    # The double sum is a product of two sums, so its logarithm is a sum of two.
    both = paddle.logsumexp(-positive.flatten()) + paddle.logsumexp(others.flatten())
    return paddle.nn.functional.softplus(both)


def kl_distillation(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """Mean KL divergence of the student's distribution over a query's own group from the teacher's.

    The student's logits are similarities divided by the temperature; the teacher's are its scores.
    """
    import paddle
    import paddle.nn.functional as functional

    teacher, known = _teacher(targets)
    student = _own_group(queries, passages, targets) / targets.temperature
    teacher, student = (
        functional.log_softmax(paddle.where(known, side, paddle.full_like(side, -1e9))) for side in (teacher, student)
    )
    return paddle.where(known, teacher.exp() * (teacher - student), paddle.zeros_like(teacher)).sum(-1).mean()


def margin_mse(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """MarginMSE (Hofstaetter et al., 2020): squared error of positive-minus-negative margins to the teacher's.

    The student's margins are differences of similarities divided by the temperature, so that cosines can
    reach a cross-encoder's range; a temperature of 1 gives the paper's formula.
    """
    teacher, known = _teacher(targets)
    student = _own_group(queries, passages, targets) / targets.temperature
    difference = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
    counted = known[:, 1:].astype(student.dtype)
    return (difference**2 * counted).sum() / counted.sum().clip(min=1)


LOSSES: dict[str, Loss] = {
    "contrastive": Loss(contrastive),
    "inf_cl": Loss(inf_cl),
    "symmetric": Loss(symmetric),
    "triplet": Loss(triplet),
    "hinge": Loss(hinge),
    "pairwise_logistic": Loss(pairwise_logistic),
    "cosent": Loss(cosent),
    "kl": Loss(kl_distillation, needs_scores=True, needs_group=True),
    "margin_mse": Loss(margin_mse, needs_scores=True, needs_group=True),
}


def get(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in LOSSES:
        raise ValueError(f"loss_type is {name!r}; expected one of {', '.join(LOSSES)}")
    return LOSSES[name]


def objective(
    function: LossFunction, normalize: bool, dims: Sequence[int] | None = None, weights: Sequence[float] | None = None
) -> LossFunction:
    """A loss over pooled vectors: normalised, and summed over leading dimensions if ``dims`` are given.

    Matryoshka representation learning (Kusupati et al., 2022): the weighted sum of the loss over the first
    ``dims[0]``, ``dims[1]``, ... dimensions, each cut normalised by itself. Weights default to 1. The full width
    is a part of the sum, with weight 1 where ``dims`` do not name it.
    """
    parts = list(zip(dims or [], weights or [1.0] * len(dims or []), strict=True))

    def whole(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
        import paddle.nn.functional as functional

        width = queries.shape[-1]
        full = [] if any(dim == width for dim, _ in parts) else [(width, 1.0)]
        total = 0.0
        for dim, weight in parts + full:
            sides = (queries[:, :dim], passages[:, :dim])
            if normalize:
                sides = tuple(functional.normalize(side, axis=-1) for side in sides)
            total = total + weight * function(*sides, targets)
        return total

    return whole


def _products(queries: "Tensor", passages: "Tensor") -> "Tensor":
    return queries.matmul(passages, transpose_y=True)


def _positive_columns(n: int, group_size: int) -> "Tensor":
    import paddle

    return paddle.arange(n) * group_size


def _split(scores: "Tensor", targets: Targets) -> tuple["Tensor", "Tensor"]:
    """Scores of the positives [n, 1], and all scores [n, n * g] (see ``_is_negative`` for which count)."""
    import paddle

    columns = _positive_columns(len(scores), targets.group_size).unsqueeze(-1)
    return paddle.take_along_axis(scores, columns, axis=1), scores


def _is_negative(targets: Targets) -> "Tensor":
    """True where a passage is a negative of a query, bool [n, n * g]."""
    import paddle

    n, columns = targets.ignored.shape
    own = paddle.arange(columns).unsqueeze(0) == _positive_columns(n, targets.group_size).unsqueeze(-1)
    return ~(targets.ignored | own)


def _without_ignored(logits: "Tensor", targets: Targets) -> "Tensor":
    import paddle

    return paddle.where(targets.ignored, paddle.full_like(logits, -1e9), logits)


def _mean_over_negatives(values: "Tensor", targets: Targets) -> "Tensor":
    """Mean over queries of the mean over each query's negatives; a query without negatives counts 0."""
    counted = _is_negative(targets).astype(values.dtype)
    return ((values * counted).sum(-1) / counted.sum(-1).clip(min=1)).mean()


def _own_group(queries: "Tensor", passages: "Tensor", targets: Targets) -> "Tensor":
    """Similarities of each query to its own group, [n, g]."""
    groups = passages.reshape([len(queries), targets.group_size, -1])
    return (queries.unsqueeze(1) * groups).sum(-1)


def _teacher(targets: Targets) -> tuple["Tensor", "Tensor"]:
    """The teacher's scores [n, g], 0 where it gave none, and where it gave one, bool [n, g]."""
    import paddle

    if targets.scores is None:
        raise ValueError("this loss learns from a teacher; expected pos_scores and neg_scores in the rows")
    known = ~paddle.isnan(targets.scores)
    return paddle.where(known, targets.scores, paddle.zeros_like(targets.scores)), known
