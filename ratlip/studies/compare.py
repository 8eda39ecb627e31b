"""What a comparison of variants says: paired differences over seeds, their intervals, the words for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

# The scores by which variants are compared: column -> (label, higher is better). The training CLIP's similarity is
# not among them: the generator was trained to raise it.
COMPARED = {
    "judge_all": ("all attributes right", True),
    "frechet_distance": ("Fréchet distance", False),
    "independent_similarity": ("similarity, independent CLIP", True),
}


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


def score_columns(frame: pd.DataFrame, names: dict[str, str] | None = None) -> dict[str, tuple[str, bool]]:
    """Those of `COMPARED` that all runs have: column -> (label, from `names` where it has one; higher is better)."""
    there = [column for column in COMPARED if column in frame and frame[column].notna().all()]
    return {column: ((names or {}).get(column, COMPARED[column][0]), COMPARED[column][1]) for column in there}


def paired(frame: pd.DataFrame, a: str, b: str, column: str, higher_is_better: bool = True) -> Difference:
    """Mean of a - b over the seeds that both variants have, with a 95 % t interval.

    The verdict on "a is better than b": "supported" or "contradicted" where the interval lies on one side of
    zero, else "undecided". Two seeds leave one degree of freedom, and an interval of 12.7 standard errors.
    """
    wide = frame.pivot_table(index="seed", columns="label", values=column)
    if a not in wide or b not in wide:
        raise ValueError(f"no runs of {a if a not in wide else b!r}; there are {', '.join(wide.columns)}")
    differences = (wide[a] - wide[b]).dropna().to_numpy()
    mean, reach = float(np.mean(differences)), half_interval(differences)
    said = "supported" if (mean > 0) == higher_is_better else "contradicted"
    return Difference(mean, mean - reach, mean + reach, len(differences), said if abs(mean) > reach else "undecided")


def half_interval(values) -> float:
    """Half the width of the 95 % t interval of the mean of `values` (n,); infinite for one value."""
    from scipy import stats  # half a second that a run of 03_train need not wait for

    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else np.inf


def compare_variants(frame: pd.DataFrame, a: str, b: str) -> dict[str, Difference]:
    """The paired difference a - b in every score of `score_columns`."""
    return {column: paired(frame, a, b, column, up) for column, (_, up) in score_columns(frame).items()}


def verdict(differences: Iterable[Difference]) -> str:
    """What several scores say together: "supported" where one does and none contradicts, or the reverse.

    Else "undecided": no score decides, or two disagree.
    """
    said = {each.verdict for each in differences} - {"undecided"}
    return said.pop() if len(said) == 1 else "undecided"


def plain_label(label: str) -> str:
    """A score's label without the fingerprint of a CLIP: "FD (small CLIP ab12cd)" -> "FD (small CLIP)"."""
    return re.sub(r" [0-9a-f]{6}\b", "", label)


def mean_and_sd(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean, standard deviation over seeds (NaN for one) and number of runs of each variant, in the given order."""
    return frame.groupby("label", sort=False)[column].agg(mean="mean", sd="std", n="count")


def format_table(frame: pd.DataFrame, scores: dict[str, tuple[str, bool]]) -> pd.DataFrame:
    """Mean ± standard deviation over seeds as text: one row a variant, one column a score of `score_columns`."""
    columns = {}
    for column, (name, _) in scores.items():
        found = mean_and_sd(frame, column)
        digits = decimals(*found["mean"])
        spread = {label: f" ± {sd:.{digits}f}" if n > 1 else "" for label, _, sd, n in found.itertuples()}
        columns[name] = {label: f"{mean:.{digits}f}{spread[label]}" for label, mean in found["mean"].items()}
    return pd.DataFrame(columns)


def decimals(*values: float, figures: int = 2, most: int = 2) -> int:
    """Decimals (0 to `most`) that show `figures` figures of the largest value: more would be another machine's."""
    largest = max((abs(value) for value in values if np.isfinite(value)), default=0)
    return int(np.clip(figures - 1 - np.floor(np.log10(largest)), 0, most)) if largest else most


def plus_minus(mean: float | None, sd: float) -> str:
    """`8.1 ± 0.4`: as many decimals as the standard deviation's first figure has, two at most (three where the mean is
    below 0.1); the mean alone, with two figures, where there is no standard deviation; "-" where there is no mean.
    """
    if mean is None or not np.isfinite(mean):
        return "-"
    first = sd if np.isfinite(sd) and sd > 0 else abs(mean) / 10 or 0.01
    digits = decimals(first, figures=1, most=2 if abs(mean) >= 0.1 else 3)
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if np.isfinite(sd) else "")
