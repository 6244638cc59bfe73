"""When a training is stopped early, or ended because it has gone wrong."""

import math

import pytest

from utils.training.guard import Guard, Standing

FINE = {"loss": 1.0, "mean_cosine": 0.3, "warming_up": False, "skips": False}


def test_the_first_of_equal_evaluations_is_the_best():
    standing = Standing(["ndcg@10", "digest"])
    for step, value in ((3, 0.1), (6, 0.5), (9, 0.4), (12, 0.5)):
        standing.note(value, step)
    assert (standing.best, standing.best_step, standing.without_gain) == (0.5, 6, 2)
    assert standing.ends(2) and not standing.ends(3) and not standing.ends(None)


def test_what_was_judged_by_something_else_is_no_best():
    values = {"judged_by": ["mrr@10"], "best": 0.9, "best_step": 4, "without_gain": 1, "loss_sum": 6.0, "n_losses": 3}
    assert Standing.of(values, ["mrr@10"]) == Standing(**values)
    assert Standing.of(values, ["ndcg@10"]) == Standing(["ndcg@10"], loss_sum=6.0, n_losses=3)
    values |= {"judged_by": ["mrr@10", "digest"], "before": {"ndcg@10": 0.5}}
    assert Standing.of(values, ["ndcg@10", "digest"]).before == {"ndcg@10": 0.5}
    assert Standing.of(values, ["ndcg@10", "another"]).before == {}


def test_a_loss_that_is_no_number_ends_the_training():
    guard = Guard(1)
    guard.check(1, **FINE)
    with pytest.raises(ValueError, match=r"^the loss is inf at step 2; lower learning_rate, or train in float32"):
        guard.check(2, **FINE | {"loss": math.inf})


@pytest.mark.parametrize("batches_a_step", [1, 2])
def test_fp16_passes_over_twenty_steps_without_a_loss_and_no_more(batches_a_step):
    guard, broken = Guard(batches_a_step), FINE | {"loss": math.nan, "skips": True}
    for _ in range(2):
        for _ in range(20 * batches_a_step):
            guard.check(1, **broken)
        guard.check(2, **FINE)  # the count begins again
    for _ in range(20 * batches_a_step):
        guard.check(3, **broken)
    with pytest.raises(ValueError, match=r"^the loss is nan at step 3"):
        guard.check(3, **broken)


@pytest.mark.parametrize("batches_a_step", [1, 2])
def test_passages_that_stay_alike_after_the_warm_up_end_the_training(batches_a_step):
    guard, alike = Guard(batches_a_step), FINE | {"mean_cosine": 0.99}
    for _ in range(100):
        guard.check(1, **alike | {"warming_up": True})
    for _ in range(20 * batches_a_step - 1):
        guard.check(2, **alike)
    guard.check(3, **FINE)  # the count begins again
    for _ in range(20 * batches_a_step - 1):
        guard.check(4, **alike)
    with pytest.raises(ValueError, match=r"^the embeddings have collapsed: at step 5 .* a mean cosine of 0\.9900 with"):
        guard.check(5, **alike)
