"""Are the error bars right? Simulated collections whose true means are known.

    python benchmarks/statistics_coverage.py                     # about three minutes on one core
    python benchmarks/statistics_coverage.py --trials 2000

For kinds of per-query values and numbers of queries as they occur: how often the 95% interval holds the
true mean, beside the plain percentile interval; and how often the paired test calls two systems different
at p <= 0.05 that are equal, and two that do differ by a little.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.evaluation import intervals
from utils.process import runtime

RESAMPLES = 1000
SIZES = (30, 50, 200, 1000)


def reciprocal_ranks(uniform: np.ndarray, hit: float) -> np.ndarray:
    """1 with probability ``hit``, then 1/2, 1/3, ... each taking half of what is left, and 0 after 1/10."""
    left = np.log(np.maximum((1 - uniform) / (1 - hit), 1e-12)) / np.log(0.5)
    rank = np.where(uniform < hit, 1, 2 + np.floor(left).clip(0))
    return np.where(rank <= 10, 1 / rank, 0.0)


# Uniform numbers to per-query values.
KINDS = {
    "hit rate 0.50": lambda u: (u < 0.50).astype(float),
    "hit rate 0.80": lambda u: (u < 0.80).astype(float),
    "hit rate 0.95": lambda u: (u < 0.95).astype(float),
    "MRR, 60% at rank 1": lambda u: reciprocal_ranks(u, 0.6),
    "MRR, 90% at rank 1": lambda u: reciprocal_ranks(u, 0.9),
    "NDCG, spread out": lambda u: np.clip(1.3 * u - 0.2, 0, 1),
    "recall of 3": lambda u: np.floor(u**0.5 * 4).clip(0, 3) / 3,
}


def truth(kind) -> float:
    """The mean over an even grid of a million uniform numbers."""
    return float(kind((np.arange(1_000_000) + 0.5) / 1_000_000).mean())


def coverage(kind, n: int, trials: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Shares of trials whose interval holds the true mean, plain percentile and ours; and our mean width."""
    mean = truth(kind)
    plain = ours = 0
    width = 0.0
    for trial in range(trials):
        values = kind(rng.random(n))[:, None]
        low, high = intervals.metric_interval(values, 0.95, RESAMPLES, seed=trial)
        ours += bool(low[0] <= mean + 1e-12 and mean - 1e-12 <= high[0])
        width += float(high[0] - low[0])
        low, high = np.quantile(intervals.resampled_means(values, RESAMPLES, seed=trial), (0.025, 0.975))
        plain += bool(low <= mean <= high)
    return plain / trials, ours / trials, width / trials


def alarms(kind, n: int, trials: int, shift: float, rng: np.random.Generator) -> float:
    """Share of trials with p <= 0.05, for two systems that agree on about two thirds of the queries."""
    count = 0
    for trial in range(trials):
        first, second = rng.random(n), rng.random(n)
        second = np.where(rng.random(n) < 2 / 3, first, second)
        differences = kind(np.clip(first + shift, 0, 1 - 1e-9)) - kind(second)
        count += bool(intervals.randomization_test(differences[:, None], RESAMPLES, seed=trial)[0] <= 0.05)
    return count / trials


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulated coverage and false alarms.")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    runtime.prepare()
    rng = np.random.default_rng(given.seed)
    started = time.monotonic()
    error = 1.96 * (0.95 * 0.05 / given.trials) ** 0.5
    print(f"{given.trials} trials each: a right 95% interval shows {0.95 - error:.3f} to {0.95 + error:.3f}, a right")
    print(f"5% test {0.05 - error:.3f} to {0.05 + error:.3f}.\n")
    print(
        f"{'values':<20} {'queries':>7} {'percentile':>10} {'ours':>7} {'width':>7} {'false alarms':>13} {'power':>7}"
    )
    for name, kind in KINDS.items():
        for n in SIZES:
            plain, ours, width = coverage(kind, n, given.trials, rng)
            false = alarms(kind, n, given.trials, 0.0, rng)
            power = alarms(kind, n, given.trials, 0.05, rng)
            print(
                f"{name:<20} {n:>7} {plain:>10.3f} {ours:>7.3f} {width:>7.3f} {false:>13.3f} {power:>7.3f}", flush=True
            )
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
