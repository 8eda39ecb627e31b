"""Statistics of the study: what runs in pairs can say about two variants, and the words for it.

Pure functions over arrays. All begins with the differences d (n,) of two variants, one a seed (`compare.differences`).

The sign-flip test (Fisher 1935) supposes one thing: where they differ by delta, d - delta is as likely as delta - d,
each seed for itself. It is then exact for any distribution and any n. With all 2^n sign patterns it needs no sampling:
flipping the seeds F takes twice their part from the sum, so that the pattern is at least as extreme as the data exactly
where the mean of F lies on the other side of delta. The 2^n - 1 means of subsets therefore give its p values, and its
confidence interval too, which runs from the k-th smallest to the k-th largest of them (Hartigan, "Using subsample
values as typical values", JASA 1969). Such an interval lies within the range of the differences seen: one of shares
never leaves [-1, 1], and nothing is clipped. A t interval, which does not know that, is given beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

ALPHA, POWER, MARGIN = 0.05, 0.8, 0.05
MOST, SIMULATED = 20, 12  # seeds whose 2^n patterns are gone through: once, and in each of `DRAWS` simulated studies
DRAWS, SEED = 4000, 2024  # of simulated studies behind a power; their number leaves it 0.006 of standard error
END_POINTS = {"area": "faster", "end": "better at the end"}  # what a decided difference in each is called


def subset_means(d: np.ndarray, k: int | None = None) -> np.ndarray:
    """Means of all nonempty subsets of the last axis: (..., n) -> (..., 2^n - 1), ascending, or (...) the k-th alone.

    ValueError for no difference, for more than `MOST`, and for one that is not finite.
    """
    d = np.asarray(d, dtype=np.float64)
    if not 1 <= d.shape[-1] <= MOST or not np.isfinite(d).all():
        raise ValueError(f"1 to {MOST} finite differences are wanted, not {d.shape[-1]} with {d[~np.isfinite(d)]}")
    sums, counts = np.zeros((*d.shape[:-1], 1)), np.zeros(1)
    for i in range(d.shape[-1]):
        sums, counts = np.concatenate([sums, sums + d[..., i : i + 1]], -1), np.concatenate([counts, counts + 1])
    means = sums[..., 1:] / counts[1:]
    return np.sort(means, axis=-1) if k is None else np.partition(means, k, axis=-1)[..., k]


def sign_flip(d: np.ndarray, delta: float = 0.0) -> tuple[float, float, float]:
    """Exact p values of the sign-flip test for differences d (n,) around `delta`.

    (two-sided; one-sided, small where they are greater; one-sided, small where they are less). The smallest possible
    are 2^(1-n) and 2^-n.
    """
    means, patterns = subset_means(d), 2 ** len(d)
    slack = 1e-12 * max(np.abs(d).max(), abs(delta), 1e-300)  # sums of equal shares in another order are equal
    greater = (1 + np.count_nonzero(means <= delta + slack)) / patterns
    less = (1 + np.count_nonzero(means >= delta - slack)) / patterns
    return min(1.0, 2 * min(greater, less)), greater, less


def _rank(n: int, alpha: float) -> int:
    """Which of the subset means bounds an interval of level 1 - alpha; 0: none does, n is too small for it."""
    return int(np.floor(alpha / 2 * 2**n + 1e-9))


def interval(d: np.ndarray, alpha: float = ALPHA) -> tuple[float, float]:
    """All centres that the two-sided sign-flip test does not reject at `alpha`; infinite where n is too small."""
    k, means = _rank(len(d), alpha), subset_means(d)
    return (float(means[k - 1]), float(means[-k])) if k else (-np.inf, np.inf)


def t_interval(d: np.ndarray, alpha: float = ALPHA) -> tuple[float, float]:
    """Student's interval of the mean of d (n,), for normal differences; infinite for one. It may leave [-1, 1]."""
    n, mean = len(d), float(np.mean(d))
    reach = stats.t.ppf(1 - alpha / 2, n - 1) * np.std(d, ddof=1) / np.sqrt(n) if n > 1 else np.inf
    return mean - float(reach), mean + float(reach)


def share_interval(shares: np.ndarray, images: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Interval of the typical share over seeds: Student's on the logit scale, so that it stays within (0, 1).

    `shares` (n,), each of `images` images. A share of 0 or 1 has no logit: half an image is added to both sides of each
    (Haldane, Anscombe 1956). What is covered is the share whose logit is the mean logit: the median of the seeds where
    the logits are symmetric, and not their mean.
    """
    shares = np.asarray(shares, dtype=np.float64)
    if ((shares < 0) | (shares > 1)).any():
        raise ValueError(f"shares lie between 0 and 1, not {shares}")
    hits = shares * images
    low, high = t_interval(np.log((hits + 0.5) / (images - hits + 0.5)), alpha)
    return float(1 / (1 + np.exp(-low))), float(1 / (1 + np.exp(-high)))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's (1979) adjusted p values (m,), in their order: all at most alpha are rejected together."""
    p, order = np.asarray(p, dtype=np.float64), np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]))
    return adjusted


def equivalence(d: np.ndarray, margin: float = MARGIN) -> tuple[float, float]:
    """p values of the two one-sided tests that the centre lies within (-margin, margin): sign-flip's and Student's.

    At most alpha exactly where the interval of level 1 - 2 alpha lies within the margin (Schuirmann 1987).
    """
    exact = max(sign_flip(d, -margin)[1], sign_flip(d, margin)[2])
    n, mean, sd = len(d), np.mean(d), np.std(d, ddof=1) if len(d) > 1 else np.inf
    if n < 2 or sd == 0:
        return exact, float(n < 2 or abs(mean) >= margin)
    sides = (margin - mean, margin + mean)
    return exact, float(max(stats.t.sf(side / (sd / np.sqrt(n)), n - 1) for side in sides))


# --------------------------------------------------------------------------------------------------- power


def fewest_seeds(tests: int, alpha: float = ALPHA) -> int:
    """The fewest seeds with which the sign-flip test can reject at all after Holm's correction for `tests` tests.

    With n seeds p is 2^(1-n) at least, and the smallest of the p values must be alpha / tests at most.
    """
    return next(n for n in range(1, 64) if _rank(n, alpha / tests))


@lru_cache(maxsize=256)
def _least_effects(n: int, alpha: float) -> np.ndarray:
    """For `DRAWS` simulated samples of n standard normal differences: the mean that had to be added to be seen.

    The interval moves with the sample, so that an added mean is seen exactly where it exceeds minus the lower bound.
    """
    if not (k := _rank(n, alpha)):
        return np.full(DRAWS, np.inf)
    rng, rows = np.random.default_rng([SEED, n]), max(1, 2**22 // 2**n)
    parts = [min(rows, DRAWS - start) for start in range(0, DRAWS, rows)]
    return np.concatenate([-subset_means(rng.standard_normal((part, n)), k - 1) for part in parts])


def power_of(n: int, mean: float, sd: float, tests: int = 1, alpha: float = ALPHA) -> float:
    """Probability that the sign-flip test at alpha / tests says that a true mean of normal differences is there.

    Simulated from fixed seeds; above 12 seeds, the t test's (noncentral t), which is within two points of it.
    """
    effect, level = abs(mean) / sd if sd else np.inf, alpha / tests
    if n <= SIMULATED:
        return float(np.mean(_least_effects(n, level) < effect))
    return float(stats.nct.sf(stats.t.ppf(1 - level / 2, n - 1), n - 1, effect * np.sqrt(n)))


def seeds_needed(
    mean: float, sd: float, tests: int = 1, *, power: float = POWER, alpha: float = ALPHA, pilot: int | None = None
) -> int | None:
    """The fewest seeds that see a true difference `mean` with `power`, at Holm's strictest step; None: over 200.

    `sd`: standard deviation of the differences. `pilot`: that it was estimated from so few pairs; the upper limit of
    its 80 % confidence interval is then taken in its place (Browne 1995), as half of all pilots underestimate it.
    """
    if pilot:
        sd *= float(np.sqrt((pilot - 1) / stats.chi2.ppf(0.2, pilot - 1)))
    numbers = range(fewest_seeds(tests, alpha), 201)
    return next((n for n in numbers if power_of(n, mean, sd, tests, alpha) >= power), None)


def smallest_seen(n: int, sd: float, tests: int = 1, *, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true difference that n seeds would have seen with `power`; infinite where n is too small to decide.

    `sd`: of the differences, as estimated; at Holm's strictest step.
    """
    if n <= SIMULATED:
        return sd * float(np.quantile(_least_effects(n, alpha / tests), power, method="higher"))
    low, high = 0.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(n, middle, 1, tests, alpha) >= power else (middle, high)
    return sd * high


# ----------------------------------------------------------------------------- curves, the best of several


def area(steps: ArrayLike, scores: ArrayLike) -> float:
    """Area under scores (v,) over log10(steps (v,)) by trapezoids, divided by the width: in units of the score.

    All runs that are compared must have the same steps. ValueError where steps do not ascend from 1 or a score is not
    finite: a visit that is missing is not bridged.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if x.shape != y.shape or len(x) < 2 or x[0] < 1 or (np.diff(x) <= 0).any() or not np.isfinite(y).all():
        raise ValueError(f"an area wants a finite score at each of two or more ascending steps, not {x} with {y}")
    x = np.log10(x)
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def areas(visits: pd.DataFrame, column: str) -> pd.DataFrame:
    """The `area` of each run's `column`: columns label, seed, `column`, one row a run, for `compare.differences`.

    `visits`: one row a visit (label, seed, step, `column`). ValueError where the runs were not visited at equal steps.
    """
    rows, wanted = [], sorted(set(visits["step"].tolist()))
    for (label, seed), curve in visits.sort_values("step").groupby(["label", "seed"], sort=False):
        if curve["step"].tolist() != wanted:
            raise ValueError(f"{label}, seed {seed}: visited at {curve['step'].tolist()}, other runs at {wanted}")
        rows.append({"label": label, "seed": seed, column: area(wanted, curve[column])})
    return pd.DataFrame(rows)


def against_the_best(table: pd.DataFrame, alpha: float = ALPHA) -> pd.DataFrame:
    """Simultaneous intervals of each variant's mean minus the best of the other means (Hsu's constrained MCB).

    `table`: one row a seed, one column a variant, higher is better. Columns of the result: difference (of the means),
    low, high; `may_be_best`: high > 0, it cannot be excluded; `is_best`: low = 0, no other can be. With a probability
    of 1 - alpha all intervals are right at once, whichever the best is, since each variant in its turn is the control
    of simultaneous upper bounds (Edwards and Hsu, JASA 1983; Hsu, "Multiple Comparisons", 1996, chapter 4).

    Their critical value is the quantile of the largest studentised mean of residuals over all 2^n flips of whole seeds,
    which keep the variants of a seed together: any covariance between variants, unequal variances. Not exact as the
    sign-flip test is; in simulations of 7 variants (8 to 12 seeds; normal, unequal, skewed) it covered 94.5 to 97.6 %.
    Unbounded where 2^n alpha < 1. ValueError for a missing value.
    """
    y = table.to_numpy(dtype=np.float64)
    n, count = y.shape
    if count < 2 or n > 16 or not np.isfinite(y).all():
        raise ValueError(f"2 variants at least, 16 seeds at most and no missing value are wanted:\n{table}")
    mean = y.mean(axis=0)
    upper = np.full((count, count), np.inf)  # [i, j]: mean i - mean j is less, for all j at once
    for i in range(count if 2**n * alpha >= 1 else 0):
        others = np.arange(count) != i
        d = y[:, [i]] - y[:, others]
        upper[i, others] = d.mean(axis=0) + _largest(d, alpha) * d.std(axis=0, ddof=1) / np.sqrt(n)
    high = np.maximum(0, upper.min(axis=1))
    rows = {}
    for i, name in enumerate(table.columns):
        rivals = [j for j in range(count) if j != i and high[j] > 0]
        low = min([0.0, *(-upper[j, i] for j in rivals)])
        rows[name] = {"difference": mean[i] - np.delete(mean, i).max(), "low": low, "high": high[i]}
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.assign(may_be_best=found["high"] > 0, is_best=(found["low"] == 0) & (found["high"] > 0))


def _largest(d: np.ndarray, alpha: float) -> float:
    """The 1 - alpha quantile over all sign patterns of max_j t_j, for the residuals of d (n, m)."""
    n, residuals = len(d), d - d.mean(axis=0)
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    flipped = signs @ residuals / n
    error = np.sqrt(np.maximum((residuals**2).mean(axis=0) - flipped**2, 0) / (n - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(flipped == 0, 0, flipped / error)  # a constant difference has no residuals
    return float(np.quantile(t.max(axis=1), 1 - alpha, method="higher"))


# ----------------------------------------------------------------------------------------- a plan's answers


@dataclass(frozen=True)
class Contrast:
    """One contrast of the plan in one end point, as `a` - `b`, positive where a is better; see `contrasts`."""

    a: str
    b: str
    end_point: str
    n: int
    mean: float
    sd: float
    low: float
    high: float
    t_low: float
    t_high: float
    p: float
    adjusted: float
    equivalent: float
    seen: float
    margin: float = MARGIN
    alpha: float = ALPHA
    dropped: tuple[int, ...] = field(default=())


def contrasts(
    found: Mapping[tuple[str, str, str], pd.Series | None], *, alpha: float = ALPHA, margin: float = MARGIN
) -> dict[tuple[str, str, str], Contrast | None]:
    """All tests of a plan together: (a, b, end point of `END_POINTS`) -> its `Contrast`, None where there are no runs.

    `found`: the differences a - b by seed (`compare.differences`), positive where a is better. Holm's correction counts
    every test of the plan, also one without runs (as if its p were 1), separately for differences and equivalences.
    `low`, `high`: 95 % sign-flip interval of this difference alone; `t_low`, `t_high`: Student's; `p`, `adjusted`: of
    the two-sided sign-flip test; `equivalent`: adjusted p of equivalence within `margin`; `seen`: the smallest true
    difference that these seeds would have seen with 80 % power.
    """
    if unknown := {key[2] for key in found} - END_POINTS.keys():
        raise ValueError(f"end points are {', '.join(END_POINTS)}, not {', '.join(unknown)}")
    there = {key: np.asarray(d, dtype=np.float64) for key, d in found.items() if d is not None and len(d)}
    p = holm(np.array([sign_flip(there[key])[0] if key in there else 1.0 for key in found]))
    same = holm(np.array([equivalence(there[key], margin)[0] if key in there else 1.0 for key in found]))
    answers: dict[tuple[str, str, str], Contrast | None] = dict.fromkeys(found)
    for key, adjusted, equivalent in zip(found, p, same, strict=True):
        if key in there:
            d = there[key]
            sd = float(np.std(d, ddof=1)) if len(d) > 1 else np.nan
            seen = smallest_seen(len(d), sd, len(found), alpha=alpha) if len(d) > 1 else np.inf
            bounds = (*interval(d, alpha), *t_interval(d, alpha), sign_flip(d)[0], float(adjusted), float(equivalent))
            dropped = tuple(getattr(found[key], "attrs", {}).get("dropped", ()))
            answers[key] = Contrast(*key, len(d), float(np.mean(d)), sd, *bounds, seen, margin, alpha, dropped)
    return answers


def word(found: Contrast | None) -> str:
    """What a contrast says: the better variant with `faster here` or `better at the end here`, `equivalent within 5
    points`, both (a difference that is there, and small), `inconclusive (could have seen x)`, or `not tested at this
    size`.
    """
    if found is None:
        return "not tested at this size"
    said = []
    if found.adjusted <= found.alpha:
        said.append(f"{found.a if found.mean > 0 else found.b} {END_POINTS[found.end_point]} here")
    if found.equivalent <= found.alpha:
        said.append(f"equivalent within {100 * found.margin:.0f} points")
    if said:
        return ", but ".join(said)
    could = f"could have seen {found.seen:.2f}" if np.isfinite(found.seen) else f"{found.n} seeds cannot decide it"
    return f"inconclusive ({could})"
