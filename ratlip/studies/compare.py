"""What a comparison of variants says: paired differences over seeds, their intervals, the words for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterable

import numpy as np
import pandas as pd


def plain(label: str) -> str:
    """A score's label without the fingerprint of a CLIP: "FD (small CLIP ab12cd)" -> "FD (small CLIP)"."""
    return re.sub(r" [0-9a-f]{6}\b", "", label)


def summary(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean, standard deviation over seeds (NaN for one) and number of runs of each variant, in the given order."""
    return frame.groupby("label", sort=False)[column].agg(mean="mean", sd="std", n="count")


def table(frame: pd.DataFrame, scores: dict[str, tuple[str, bool]]) -> pd.DataFrame:
    """Mean ± standard deviation over seeds as text: one row a variant, one column a score of `quality`."""
    columns = {}
    for column, (name, _) in scores.items():
        found = summary(frame, column)
        digits = decimals(*found["mean"])
        columns[name] = {
            label: f"{row['mean']:.{digits}f}" + (f" ± {row['sd']:.{digits}f}" if row["n"] > 1 else "")
            for label, row in found.iterrows()
        }
    return pd.DataFrame(columns)


def decimals(*values: float, figures: int = 2, most: int = 2) -> int:
    """Decimals (0 to `most`) that show the largest of `values` with so many figures: more would be another machine's."""
    largest = max((abs(value) for value in values if np.isfinite(value)), default=0)
    return int(np.clip(figures - 1 - np.floor(np.log10(largest)), 0, most)) if largest else most


def plus_minus(mean: float | None, sd: float) -> str:
    """`8.1 ± 0.4`: as many decimals as the standard deviation's first figure has, two at most (three where the
    mean is below 0.1); the mean alone, with two figures, where there is no standard deviation; `-` without a mean.
    """
    if mean is None or not np.isfinite(mean):
        return "-"
    size = sd if np.isfinite(sd) and sd > 0 else abs(mean) / 10
    digits = decimals(size, figures=1, most=2 if abs(mean) >= 0.1 else 3) if size else 2
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if np.isfinite(sd) else "")


mean_and_sd = summary


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % t interval over `n` seeds, and what follows from it."""

    mean: float
    low: float
    high: float
    n: int
    verdict: str

    def turned(self) -> Difference:
        """b - a in place of a - b, with the same verdict: for scores where lower is better."""
        return Difference(-self.mean, -self.high, -self.low, self.n, self.verdict)

    def __str__(self) -> str:
        digits = decimals(self.low, self.high)
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def half_interval(values) -> float:
    """Half the width of the 95 % t interval of the mean of `values` (n,); infinite for one value."""
    from scipy import stats  # half a second that a run of 03_train need not wait for

    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else np.inf


def paired(frame: pd.DataFrame, a: str, b: str, column: str, higher_is_better: bool = True) -> Difference:
    """Mean of a - b over the seeds that both variants have, with a 95 % t interval.

    The verdict on "a is better than b": "supported" or "contradicted" where the interval lies on one side of
    zero, else "undecided". Two seeds leave one degree of freedom, and an interval of 12.7 standard errors.
    """
    wide = frame.pivot_table(index="seed", columns="label", values=column)
    if a not in wide or b not in wide:
        raise ValueError(f"no runs of {a if a not in wide else b!r}; there are {', '.join(wide.columns)}")
    differences = (wide[a] - wide[b]).dropna().to_numpy()
    n, mean = len(differences), float(np.mean(differences))
    reach = half_interval(differences)
    better = mean if higher_is_better else -mean
    decided = abs(mean) > reach
    verdict = ("supported" if better > 0 else "contradicted") if decided else "undecided"
    return Difference(mean, mean - reach, mean + reach, n, verdict)


def quality(frame: pd.DataFrame, names: dict[str, str] | None = None) -> dict[str, tuple[str, bool]]:
    """The scores by which variants are compared, as far as the runs have them: column -> (label, higher is better).

    The training CLIP's similarity is not among them: the generator was trained to raise it.
    """
    every = {
        "judge_all": ("all attributes right", True),
        "frechet_distance": ("Fréchet distance", False),
        "independent_similarity": ("similarity, independent CLIP", True),
    }
    return {
        column: ((names or {}).get(column, label), up)
        for column, (label, up) in every.items()
        if column in frame and frame[column].notna().all()
    }


def compare(frame: pd.DataFrame, a: str, b: str) -> dict[str, Difference]:
    """The paired difference a - b in every score of `quality`."""
    return {column: paired(frame, a, b, column, up) for column, (_, up) in quality(frame).items()}


def verdict(differences: Iterable[Difference]) -> str:
    """What several scores say together: "supported" where one does and none contradicts, or the reverse.

    Else "undecided": no score decides, or two disagree.
    """
    said = {each.verdict for each in differences} - {"undecided"}
    return said.pop() if len(said) == 1 else "undecided"
