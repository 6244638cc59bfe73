"""Each loss against its formula, written out with loops."""

import math

import numpy as np
import pytest

from utils.arguments.training import LOSS_TYPES
from utils.training import losses
from utils.training.losses import LOSSES, Targets, objective

N, G, D, T, MARGIN = 5, 3, 7, 0.3, 0.4


@pytest.fixture(scope="module")
def batch():
    paddle = pytest.importorskip("paddle")
    rng = np.random.default_rng(0)
    queries, passages = (rng.normal(size=(n, D)).astype(np.float32) for n in (N, N * G))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    ignored = rng.random((N, N * G)) < 0.2
    ignored[np.arange(N), np.arange(N) * G] = False
    scores = rng.normal(size=(N, G)).astype(np.float32)
    return paddle, queries, passages, ignored, scores


def value(name, batch, temperature=T, **changes):
    paddle, queries, passages, ignored, scores = batch
    targets = Targets(G, paddle.to_tensor(ignored), temperature, MARGIN, paddle.to_tensor(scores))
    return float(LOSSES[name].function(paddle.to_tensor(queries), paddle.to_tensor(passages), targets))


def negatives(ignored, i):
    return [j for j in range(N * G) if j != i * G and not ignored[i, j]]


def test_contrastive(batch):
    _, q, p, ignored, _ = batch
    terms = []
    for i in range(N):
        positive = math.exp(q[i] @ p[i * G] / T)
        terms.append(-math.log(positive / (positive + sum(math.exp(q[i] @ p[j] / T) for j in negatives(ignored, i)))))
    assert value("contrastive", batch) == pytest.approx(np.mean(terms), rel=1e-5)


def test_symmetric(batch):
    _, q, p, ignored, _ = batch
    terms = []
    for i in range(N):
        positive = math.exp(q[i] @ p[i * G] / T)
        passages = sum(math.exp(q[i] @ p[j] / T) for j in negatives(ignored, i))
        queries = sum(math.exp(q[j] @ p[i * G] / T) for j in range(N) if j != i and not ignored[j, i * G])
        terms += [-math.log(positive / (positive + others)) for others in (passages, queries)]
    assert value("symmetric", batch) == pytest.approx(np.mean(terms), rel=1e-5)


def test_triplet(batch):
    _, q, p, ignored, _ = batch
    terms = [
        max(
            0,
            MARGIN + np.linalg.norm(q[i] - p[i * G]) - min(np.linalg.norm(q[i] - p[j]) for j in negatives(ignored, i)),
        )
        for i in range(N)
    ]
    assert value("triplet", batch) == pytest.approx(np.mean(terms), rel=1e-5)


def test_hinge(batch):
    _, q, p, ignored, _ = batch
    terms = [np.mean([max(0, MARGIN - q[i] @ p[i * G] + q[i] @ p[j]) for j in negatives(ignored, i)]) for i in range(N)]
    assert value("hinge", batch) == pytest.approx(np.mean(terms), rel=1e-5)


def test_pairwise_logistic(batch):
    _, q, p, ignored, _ = batch
    terms = [
        np.mean([math.log1p(math.exp((q[i] @ p[j] - q[i] @ p[i * G]) / T)) for j in negatives(ignored, i)])
        for i in range(N)
    ]
    assert value("pairwise_logistic", batch) == pytest.approx(np.mean(terms), rel=1e-5)


def test_cosent(batch):
    _, q, p, ignored, _ = batch
    total = sum(
        math.exp((q[i] @ p[j] - q[k] @ p[k * G]) / T) for k in range(N) for i in range(N) for j in negatives(ignored, i)
    )
    assert value("cosent", batch) == pytest.approx(math.log1p(total), rel=1e-5)


@pytest.mark.parametrize("unknown", [False, True])
def test_distillation(batch, unknown):
    paddle, q, p, ignored, scores = batch
    scores = scores.copy()
    if unknown:
        scores[1, 2] = np.nan
    divergence, squares = [], []
    for i in range(N):
        own = [g for g in range(G) if not np.isnan(scores[i, g])]
        student = np.array([q[i] @ p[i * G + g] / T for g in own], np.float64)
        teacher = scores[i, own].astype(np.float64)
        log_s, log_t = (x - np.log(np.exp(x).sum()) for x in (student, teacher))
        divergence.append((np.exp(log_t) * (log_t - log_s)).sum())
        squares += list(((student[0] - student[1:]) - (teacher[0] - teacher[1:])) ** 2)
    changed = (paddle, q, p, ignored, scores)
    assert value("kl", changed) == pytest.approx(np.mean(divergence), rel=1e-5)
    assert value("margin_mse", changed) == pytest.approx(np.mean(squares), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_query_without_negatives_is_no_nan(batch, name):
    paddle, q, p, ignored, scores = batch
    everything = np.ones_like(ignored)
    everything[np.arange(N), np.arange(N) * G] = False
    assert math.isfinite(value(name, (paddle, q, p, everything, scores)))


def test_matryoshka_is_the_weighted_sum_of_normalised_cuts(batch):
    paddle, q, p, ignored, _ = batch
    targets = Targets(G, paddle.to_tensor(ignored), T)
    q, p = paddle.to_tensor(q * 3), paddle.to_tensor(p * 2)  # lengths must not matter
    both = objective(losses.contrastive, True, [4, D], [0.5, 2.0])(q, p, targets)
    four, seven = (objective(losses.contrastive, True)(q[:, :d], p[:, :d], targets) for d in (4, D))
    assert float(both) == pytest.approx(0.5 * float(four) + 2 * float(seven), rel=1e-6)


def test_matryoshka_trains_the_full_width_too(batch):
    paddle, q, p, ignored, _ = batch
    targets = Targets(G, paddle.to_tensor(ignored), T)
    q, p = paddle.to_tensor(q), paddle.to_tensor(p)
    for weights in (None, [0.5]):
        left_out = objective(losses.contrastive, True, [4], weights)(q, p, targets)
        named = objective(losses.contrastive, True, [4, D], weights and [*weights, 1.0])(q, p, targets)
        assert float(left_out) == float(named)


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(ValueError, match="expected one of contrastive, inf_cl, symmetric, triplet"):
        losses.get("infonce")


def test_the_arguments_know_every_loss():
    assert tuple(LOSSES) == LOSS_TYPES
