"""How variants are compared: paired differences over seeds, verdicts, and how many decimals are printed."""

import math

import numpy as np
import pandas as pd
import pytest

from ratlip.studies import compare, grad_cam, statistics


def frame(**variants) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"label": label, "seed": seed, "score": value}
            for label, values in variants.items()
            for seed, value in enumerate(values)
        ]
    )


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Verdicts of few seeds, so that a test can be read; that few decide nothing has a test of its own."""
    monkeypatch.setattr(compare, "FEWEST", 2)


def test_a_handful_of_seeds_decides_nothing(monkeypatch):
    monkeypatch.undo()
    assert statistics.fewest_seeds(6) == compare.FEWEST == 8
    for count, said in ((2, "undecided"), (7, "undecided"), (8, "supported")):
        values = 5 + 0.01 * np.arange(count)
        table = frame(a=values, b=[0.0] * count)
        assert compare.paired(table, "a", "b", "score").verdict == said
        coverage = pd.DataFrame({"label": "h = 8", "coverage": 0.99 + 0.001 * np.arange(count)})
        assert grad_cam.whole_object(coverage, "h = 8")[1] == said


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
        """By the order of the rows, the differences would be -7, 8 and 1, which decide nothing."""
        table = frame(a=[1.0, 9.0, 5.0], b=[0.1, 8.0, 3.9])
        shuffled = table.iloc[[1, 0, 2, 3, 5, 4]]
        found = compare.paired(shuffled, "a", "b", "score")
        assert found.mean == pytest.approx(1) and found.verdict == "supported"
        assert compare.differences(shuffled, "a", "b", "score").to_dict() == pytest.approx({0: 0.9, 1: 1.0, 2: 1.1})

    def test_the_verdict_rests_on_the_standard_error_of_the_mean(self):
        """Mean 2, s = 1: over 3 seeds t = 3.46 < 4.30, over 4 (s = 0.82) t = 4.9 > 3.18."""
        assert compare.half_interval([3.0, 1, 2]) == pytest.approx(4.3027 / math.sqrt(3), 1e-4)
        assert compare.half_interval([3.0, 1, 2, 2]) == pytest.approx(3.1824 * 0.8165 / 2, 1e-4)
        assert compare.paired(frame(a=[3.0, 1, 2], b=[0.0] * 3), "a", "b", "score").verdict == "undecided"
        assert compare.paired(frame(a=[3.0, 1, 2, 2], b=[0.0] * 4), "a", "b", "score").verdict == "supported"

    def test_turned_is_the_other_way_round(self):
        found = compare.paired(frame(a=[3.0, 5.0, 4.5, 4.0], b=[1.0, 2.0, 3.0, 0.5]), "a", "b", "score")
        other = compare.paired(frame(a=[3.0, 5.0, 4.5, 4.0], b=[1.0, 2.0, 3.0, 0.5]), "b", "a", "score")
        turned = found.turned()
        assert (turned.mean, turned.low, turned.high, turned.n) == (other.mean, other.low, other.high, other.n)
        assert turned.low < turned.mean < turned.high < 0 and turned.verdict == found.verdict == "supported"
        assert turned.turned() == found

    def test_each_score_has_its_direction(self):
        assert {column: up for column, (_, up) in compare.COMPARED.items()} == {
            "judge_all": True,
            "frechet_distance": False,
            "independent_similarity": True,
        }
        table = frame(a=[0.8, 0.9, 0.85], b=[0.1, 0.2, 0.16]).rename(columns={"score": "judge_all"})
        table["frechet_distance"] = table["judge_all"]  # as much higher, and worse for it
        table["independent_similarity"] = table["judge_all"]
        said = {column: each.verdict for column, each in compare.compare_variants(table, "a", "b").items()}
        assert said == {
            "judge_all": "supported",
            "frechet_distance": "contradicted",
            "independent_similarity": "supported",
        }

    def test_mean_and_standard_deviation_of_each_variant(self):
        found = compare.mean_and_sd(frame(b=[1.0, 2.0, 6.0], a=[4.0]), "score")
        assert list(found.index) == ["b", "a"] and found.loc["b"].tolist() == pytest.approx([3, math.sqrt(7), 3])
        assert found.loc["a", "mean"] == 4 and math.isnan(found.loc["a", "sd"]) and found.loc["a", "n"] == 1
        shown = compare.format_table(frame(b=[1.0, 2.0, 6.0], a=[4.0]), {"score": ("right", True)})
        assert shown["right"].to_dict() == {"b": "3.0 ± 2.6", "a": "4.0"}

    def test_one_seed_decides_nothing(self):
        found = compare.paired(frame(a=[9.0], b=[1.0]), "a", "b", "score")
        assert found.verdict == "undecided" and found.low == -math.inf

    @pytest.mark.parametrize("lost", [0, 1, 2, 3])
    @pytest.mark.parametrize("without", ["row", "number"])
    def test_a_seed_that_one_variant_lacks_is_left_out_of_both_and_said(self, lost, without):
        """Also one in the middle: the seeds after it keep their partners."""
        table = frame(a=[1.0, 12.0, 23.0, 34.0], b=[0.0, 10.0, 20.0, 30.0])
        at = (table["label"] == "b") & (table["seed"] == lost)
        table = table[~at] if without == "row" else table.assign(score=table["score"].mask(at))
        found = compare.paired(table, "a", "b", "score")
        kept = [seed + 1.0 for seed in range(4) if seed != lost]
        assert found.mean == pytest.approx(np.mean(kept)) and found.n == 3 and found.dropped == (lost,)
        assert str(found).endswith(f" (without seed {lost})")
        with pytest.raises(ValueError, match=f"score: a - b has no value at seed {lost}: a run is missing"):
            compare.differences(table, "a", "b", "score")

    def test_two_runs_of_one_seed_are_not_averaged(self):
        table = pd.concat([frame(a=[1.0, 2.0], b=[1.0, 1.0]), frame(a=[9.0])])
        with pytest.raises(ValueError, match="score: two runs of 'a' with seed 0; which is meant"):
            compare.paired(table, "a", "b", "score")

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
