"""How sure a mean over queries is: bootstrap intervals, and a randomisation test for two systems.

The queries are taken as a sample of the queries that could have been asked. All draws come from the
given seed, in blocks of bounded size, and do not depend on how many values are looked at together.
"""

from statistics import NormalDist

import numpy as np

# Draws are made in blocks of at most this many (resamples x queries).
_BLOCK = 1 << 22


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of a confidence interval for the mean of each column.

    Args:
        values: float64 [n, columns], a row for each query. All columns see the same resamples.

    Returns:
        float64 [columns] twice; both equal the mean where n is 1 or all values are the same.

    The bias-corrected and accelerated bootstrap (Efron, JASA 82, 1987), whose acceleration for a mean is
    the sample's skewness over 6 sqrt(n), at levels widened as Student's t widens the normal's (Hesterberg,
    The American Statistician 69, 2015, section 5.3): the plain percentile interval is too narrow for few
    queries.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    mean = values.mean(axis=0)
    means = resampled_means(values, resamples, seed)
    normal = NormalDist()
    spread = values.std(axis=0)
    steady = spread > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    low, high = mean.copy(), mean.copy()
    if n < 2:
        return low, high
    z = _widened(normal.inv_cdf(0.5 + confidence / 2), n)
    for column in np.flatnonzero(steady):
        drawn = np.sort(means[:, column])
        centred = (values[:, column] - mean[column]) / spread[column]
        acceleration = float((centred**3).mean()) / (6 * n**0.5)
        # Half of the draws that equal the mean count as below it: such ties are common with 0-or-1 values.
        slack = 1e-12 * max(1.0, abs(mean[column]))
        below = np.searchsorted(drawn, mean[column] - slack), np.searchsorted(drawn, mean[column] + slack)
        share = min(max(sum(below) / (2 * resamples), 0.5 / resamples), 1 - 0.5 / resamples)
        bias = normal.inv_cdf(share)
        ends = []
        for side in (-z, z):
            moved = bias + (bias + side) / max(1 - acceleration * (bias + side), 1e-6)
            ends.append(float(np.quantile(drawn, normal.cdf(moved))))
        low[column], high[column] = ends
    return low, high


def wilson_interval(shares: np.ndarray, n: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of a confidence interval for the share of ones among ``n`` values of 0 or 1.

    Wilson's score interval (JASA 22, 1927): float64 [columns] twice.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (shares + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * np.sqrt(shares * (1 - shares) / n + z * z / (4 * n * n))
    # At 0 and 1 the ends meet the share itself, but for rounding.
    return np.minimum(centre - reach, shares).clip(0), np.maximum(centre + reach, shares).clip(None, 1)


def metric_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """As ``bootstrap_interval``, for values from 0 to 1, with Wilson's interval where all of them are 0 or 1.

    Such a column is a hit rate, or another metric that found everything or nothing. Resampling 30 hits
    out of 30 can only give 30 again; Wilson's interval knows that the next query may miss, and for a
    given mean no values between 0 and 1 are more uncertain than zeros and ones.
    """
    values = np.asarray(values, np.float64)
    low, high = bootstrap_interval(values, confidence, resamples, seed)
    binary = ((values == 0) | (values == 1)).all(axis=0)
    low[binary], high[binary] = wilson_interval(values.mean(axis=0)[binary], len(values), confidence)
    return low, high


def resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of each column over ``n`` rows drawn with replacement: float64 [resamples, columns]."""
    n = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]), np.float64)
    step = max(1, _BLOCK // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, n, (size, n))
        drawn += np.arange(size)[:, None] * n
        # How often each row was drawn turns the sums into one matrix product.
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means[start : start + size] = times.astype(np.float64) @ values / n
    return means


def randomization_test(differences: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Two-sided p-value of each column's mean difference between two systems: float64 [columns].

    Args:
        differences: float64 [n, columns], one system's value minus the other's, for each query.

    If the systems were alike, each query's difference could as well have had the other sign. The p-value
    is the share of sign patterns whose absolute mean reaches the observed one (Fisher's paired
    randomisation test; Smucker, Allan and Carterette, CIKM 2007): over all 2^n patterns if they are no
    more than ``resamples``, else over random ones, the observed pattern counted as one of them, so that
    it is never 0.
    """
    differences = np.asarray(differences, np.float64)
    n = len(differences)
    observed = np.abs(differences.sum(axis=0))
    # Sums of the same numbers in another order may differ in the last bits: those are equal.
    reaches = observed - 1e-12 * np.maximum(np.abs(differences).sum(axis=0), 1e-300)
    exact = n < 31 and 2**n <= resamples
    total = 2**n if exact else resamples
    count = np.zeros(differences.shape[1], np.int64)
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // n)
    for start in range(0, total, step):
        size = min(step, total - start)
        if exact:
            flips = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1
        else:
            drawn = np.frombuffer(rng.bytes(size * (-(-n // 8))), np.uint8).reshape(size, -1)
            flips = np.unpackbits(drawn, axis=1)[:, :n]
        sums = (1.0 - 2.0 * flips) @ differences
        count += (np.abs(sums) >= reaches).sum(axis=0)
    return count / total if exact else (count + 1) / (total + 1)


def _widened(z: float, n: int) -> float:
    """The normal quantile that makes a percentile interval as wide as Student's with n - 1 degrees of freedom."""
    v = n - 1
    # Cornish and Fisher's expansion of Student's quantile about the normal's.
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return t * (n / v) ** 0.5
