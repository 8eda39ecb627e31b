"""How variants are compared: paired differences over seeds, verdicts, and how many decimals are printed."""

import math

import numpy as np
import pandas as pd
import pytest

from ratlip.studies import compare


def frame(**variants) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"label": label, "seed": seed, "score": value}
            for label, values in variants.items()
            for seed, value in enumerate(values)
        ]
    )


class TestDifferences:
    def test_the_interval_is_students(self):
        found = compare.paired(frame(a=[3.0, 5.0, 4.0], b=[1.0, 2.0, 3.0]), "a", "b", "score")
        # differences 2, 3, 1: mean 2, s = 1, t(0.975, 2) = 4.3027
        assert found.mean == pytest.approx(2) and found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), 1e-4)
        assert found.verdict == "undecided" and found.n == 3

    def test_verdicts_follow_the_direction_of_the_score(self):
        table = frame(a=[3.0, 3.1, 3.2], b=[1.0, 1.1, 1.21])
        assert compare.paired(table, "a", "b", "score").verdict == "supported"
        assert compare.paired(table, "b", "a", "score").verdict == "contradicted"
        assert compare.paired(table, "a", "b", "score", higher_is_better=False).verdict == "contradicted"

    def test_pairs_are_made_by_seed(self):
        table = frame(a=[1.0, 9.0], b=[0.0, 8.0])
        assert compare.paired(table.sample(frac=1, random_state=1), "a", "b", "score").verdict == "supported"

    def test_one_seed_decides_nothing(self):
        found = compare.paired(frame(a=[9.0], b=[1.0]), "a", "b", "score")
        assert found.verdict == "undecided" and found.low == -math.inf

    def test_a_seed_that_one_variant_lacks_is_left_out(self):
        assert compare.paired(frame(a=[1.0, 2.0, 3.0], b=[1.0, 2.0]), "a", "b", "score").n == 2

    def test_a_missing_variant_is_named(self):
        with pytest.raises(ValueError, match="no runs of 'c'; there are a, b"):
            compare.paired(frame(a=[1.0], b=[1.0]), "c", "a", "score")

    def test_several_scores_together(self):
        def said(*verdicts):
            return compare.verdict([compare.Difference(0, 0, 0, 2, each) for each in verdicts])

        assert said("undecided", "supported") == "supported"
        assert said("contradicted", "undecided") == "contradicted"
        assert said("supported", "contradicted") == said("undecided") == said() == "undecided"

    def test_the_training_clip_does_not_judge(self):
        columns = {
            "judge_all": [1.0],
            "frechet_distance": [2.0],
            "clip_similarity": [0.9],
            "independent_similarity": [np.nan],
        }
        assert list(compare.score_columns(pd.DataFrame(columns))) == ["judge_all", "frechet_distance"]


@pytest.mark.parametrize(
    "values, digits",
    [
        ((0.26, 0.3), 2),
        ((8.06,), 1),
        ((-4.3, 0.1), 1),
        ((128.0, 3.0), 0),
        ((0.001,), 2),
        ((0.0,), 2),
        ((math.inf, 2.0), 1),
    ],
)
def test_two_digits_are_shown(values, digits):
    assert compare.decimals(*values) == digits


@pytest.mark.parametrize(
    "mean, sd, shown",
    [
        (0.5512, 0.0712, "0.55 ± 0.07"),
        (12.34, 4.56, "12 ± 5"),
        (123.4, 45.6, "123 ± 46"),
        (0.0123, 0.0012, "0.012 ± 0.001"),
        (0.5, np.nan, "0.50"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (np.nan, np.nan, "-"),
        (None, np.nan, "-"),
    ],
)
def test_plus_minus(mean, sd, shown):
    assert compare.plus_minus(mean, sd) == shown
