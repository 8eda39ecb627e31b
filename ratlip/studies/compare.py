"""What a comparison of variants says: paired differences over seeds, their intervals, the words for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

# Seeds below which nothing is decided: with fewer, six tests that are corrected for their number cannot decide at all
# (`statistics.fewest_seeds`). A few short runs say how far apart variants are, and no verdict follows.
FEWEST = 8

# The scores by which variants are compared: column -> (label, higher is better). The training CLIP's similarity is
# not among them: the generator was trained to raise it.
COMPARED = {
    "judge_all": ("all attributes right", True),
    "frechet_distance": ("Fréchet distance", False),
    "independent_similarity": ("similarity, independent CLIP", True),
}


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % t interval over `n` seeds, and what follows from it.

    `dropped`: seeds that one variant alone has, and that therefore do not count.
    """

    mean: float
    low: float
    high: float
    n: int
    verdict: str
    dropped: tuple[int, ...] = ()

    def turned(self) -> Difference:
        """b - a in place of a - b, with the same verdict: for scores where lower is better."""
        return replace(self, mean=-self.mean, low=-self.high, high=-self.low)

    def __str__(self) -> str:
        digits = decimals(self.low, self.high)
        without = f" (without seed {', '.join(map(str, self.dropped))})" if self.dropped else ""
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]{without}"


def score_columns(frame: pd.DataFrame, names: dict[str, str] | None = None) -> dict[str, tuple[str, bool]]:
    """Those of `COMPARED` that all runs have: column -> (label, from `names` where it has one; higher is better)."""
    there = [column for column in COMPARED if column in frame and frame[column].notna().all()]
    return {column: ((names or {}).get(column, COMPARED[column][0]), COMPARED[column][1]) for column in there}


def differences(frame: pd.DataFrame, a: str, b: str, column: str, *, drop: bool = False) -> pd.Series:
    """a - b in one score, by seed (ascending), from one row a run with `label` and `seed`.

    A seed that one variant lacks (no run, or no number) raises ValueError; with `drop` it is left out for both, and
    named in `attrs["dropped"]`. ValueError also for two runs of one variant and seed, and for a variant without runs.
    """
    rows = frame[frame["label"].isin([a, b])]
    if missing := [each for each in (a, b) if each not in set(rows["label"])]:
        there = ", ".join(frame["label"].unique())
        raise ValueError(f"no runs of {missing[0]!r}; there are {there}")
    if (twice := rows.duplicated(["label", "seed"])).any():
        label, seed = rows.loc[twice, ["label", "seed"]].iloc[0]
        raise ValueError(f"{column}: two runs of {label!r} with seed {seed}; which is meant?")
    wide = rows.pivot(index="seed", columns="label", values=column).sort_index()
    found = wide[a] - wide[b]
    lost = tuple(int(seed) for seed in found.index[found.isna()])
    if lost and not drop:
        raise ValueError(f"{column}: {a} - {b} has no value at seed {', '.join(map(str, lost))}: a run is missing")
    kept = found.dropna().rename(column)
    kept.attrs["dropped"] = lost
    return kept


def paired(frame: pd.DataFrame, a: str, b: str, column: str, higher_is_better: bool = True) -> Difference:
    """Mean of a - b over the seeds that both variants have (`differences`), with a 95 % t interval.

    The verdict on "a is better than b": "supported" or "contradicted" where the interval lies on one side of
    zero and there are `FEWEST` seeds at least, else "undecided".
    """
    found = differences(frame, a, b, column, drop=True)
    mean, reach = float(np.mean(found)), half_interval(found)
    said = "supported" if (mean > 0) == higher_is_better else "contradicted"
    verdict = said if abs(mean) > reach and len(found) >= FEWEST else "undecided"
    return Difference(mean, mean - reach, mean + reach, len(found), verdict, found.attrs["dropped"])


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
