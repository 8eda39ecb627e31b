"""Statistics of the study: exact against enumeration and published examples, and right as often as they say."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ratlip.studies import compare
from ratlip.studies import statistics as st

# Differences in height of Darwin's crossed and self-fertilised maize; Fisher, "The Design of Experiments" (1935), 21.
DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)
SHARES = np.array([0.25, -0.05, 0.1, 0.1, 0.3, 0.15, 0.1, -0.05])  # many sums are equal up to rounding


def enumerated(d, delta=0.0):
    """The two-sided p value by its definition: the share of sign patterns whose |sum| is no less than the data's."""
    d = np.asarray(d) - delta
    sums = np.array([np.dot(signs, d) for signs in itertools.product((1, -1), repeat=len(d))])
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9))


def draws(rng, kind, size):
    """Samples of a distribution that is symmetric around 0, with standard deviation near 1."""
    if kind == "heavy":
        return rng.standard_t(3, size) / math.sqrt(3)
    return np.round(rng.normal(0, 1, size), 1) if kind == "coarse" else rng.normal(0, 1, size)


# -------------------------------------------------------------------------------------------- one sample


def test_means_of_all_subsets():
    np.testing.assert_allclose(st.subset_means(np.array([4.0, 1, 2])), [1, 1.5, 2, 7 / 3, 2.5, 3, 4])
    both = st.subset_means(np.array([[4.0, 1, 2], [0, 0, 3]]))
    np.testing.assert_allclose(both[1], [0, 0, 0, 1, 1.5, 1.5, 3])


@pytest.mark.parametrize("d", [[], [1.0, np.nan], [np.inf], range(21)])
def test_what_is_no_sample_is_refused(d):
    with pytest.raises(ValueError, match="finite differences are wanted"):
        st.sign_flip(np.array(d, dtype=float))


def test_fishers_example():
    """He counts 863 of the 32,768 patterns on one side: 5.267 % on both."""
    both, greater, less = st.sign_flip(DARWIN)
    assert both == 2 * 863 / 2**15 and greater == 863 / 2**15 and less > 0.97
    assert st.sign_flip(-DARWIN) == (both, less, greater)


@pytest.mark.parametrize("delta", [0.0, 0.05, 0.1, 0.2, -0.05])
def test_p_values_are_those_of_the_enumeration(delta):
    assert st.sign_flip(SHARES, delta)[0] == pytest.approx(enumerated(SHARES, delta), abs=1e-12)
    for seed in range(5):
        d = np.random.default_rng(seed).normal(0.5, 1, 7)
        assert st.sign_flip(d, delta)[0] == pytest.approx(enumerated(d, delta), abs=1e-12)
        scipy = stats.permutation_test((d - delta,), np.mean, permutation_type="samples", alternative="greater")
        assert st.sign_flip(d, delta)[1] == pytest.approx(scipy.pvalue, abs=1e-12)


def test_no_difference_is_no_evidence():
    assert st.sign_flip(np.zeros(8)) == (1, 1, 1)
    assert st.sign_flip(np.ones(8))[0] == 2 / 2**8


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.01])
def test_the_interval_holds_what_the_test_does_not_reject(alpha):
    for d in (DARWIN, SHARES, np.random.default_rng(3).normal(1, 2, 9)):
        low, high = st.interval(d, alpha)
        for inside in (low, high, (low + high) / 2):
            assert st.sign_flip(d, inside)[0] > alpha
        for outside in (low - 1e-6, high + 1e-6):
            assert st.sign_flip(d, outside)[0] <= alpha
        assert d.min() <= low < high <= d.max()


def test_five_seeds_have_no_interval_of_95_percent_and_six_have_their_range():
    assert st.interval(np.arange(5.0)) == (-math.inf, math.inf)
    assert st.interval(np.arange(6.0)) == (0, 5)


def test_the_t_interval_is_scipys():
    expected = stats.ttest_1samp(SHARES, 0).confidence_interval(0.95)
    assert st.t_interval(SHARES) == pytest.approx((expected.low, expected.high))
    assert st.t_interval(np.array([1.0])) == (-math.inf, math.inf)


@pytest.mark.parametrize("kind", ["normal", "heavy", "coarse"])
def test_under_the_null_the_test_is_wrong_as_often_as_it_says_and_the_interval_covers(kind):
    """8 seeds: rejections have probability 12/256 = 4.7 % where no sums are equal; 3,000 simulated studies."""
    rng = np.random.default_rng(11)
    samples = 0.3 + draws(rng, kind, (3000, 8))
    rejected = np.mean([st.sign_flip(d, 0.3)[0] <= 0.05 for d in samples])
    bounds = np.array([st.interval(d) for d in samples])
    covered = np.mean((bounds[:, 0] <= 0.3) & (bounds[:, 1] >= 0.3))
    error = 3 * math.sqrt(0.05 * 0.95 / 3000)
    assert 0.05 - error - 0.005 < rejected < 0.05 + error
    assert 0.95 - error < covered < 0.95 + error + 0.005
    assert np.mean([st.t_interval(d)[0] <= 0.3 <= st.t_interval(d)[1] for d in samples]) > 0.93


def test_holm():
    np.testing.assert_allclose(st.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(st.holm([0.5, 0.9, 0.02]), [1, 1, 0.06])


def test_holm_keeps_the_error_of_all_tests_together():
    """Six null contrasts of 9 seeds, all of one direction of error: any is rejected in 5 % of studies at most."""
    rng = np.random.default_rng(5)
    shared = rng.normal(size=(800, 1, 9))
    samples = (shared + rng.normal(size=(800, 6, 9))).round(2)
    wrong = [st.holm([st.sign_flip(d)[0] for d in study]).min() <= 0.05 for study in samples]
    assert np.mean(wrong) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 800)
    assert np.mean([min(st.sign_flip(d)[0] for d in study) <= 0.05 for study in samples]) > 0.1  # without it


# -------------------------------------------------------------------------------------- shares, equivalence


def test_an_interval_of_shares_stays_within_0_and_1_without_being_cut():
    for shares in ([1.0, 1.0, 0.99], [0.0, 0.01, 0.0], [0.2, 0.9]):
        low, high = st.share_interval(np.array(shares), 480)
        assert 0 < low < high < 1
        mirrored = st.share_interval(1 - np.array(shares), 480)
        assert mirrored == pytest.approx((1 - high, 1 - low))
    wider = st.share_interval(np.array([1.0, 1.0, 0.99]), 480)
    assert st.t_interval(np.array([1.0, 1.0, 0.99]))[1] > 1 > wider[1]
    assert st.share_interval(np.array([0.5, 0.5, 0.5]), 10) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        st.share_interval(np.array([0.5, 1.2]), 10)


def test_the_interval_of_shares_covers_the_typical_share():
    rng = np.random.default_rng(8)
    true = 1 / (1 + math.exp(-2.5))  # 92 %
    shares = rng.binomial(480, 1 / (1 + np.exp(-(2.5 + rng.normal(0, 0.7, (1500, 8)))))) / 480
    bounds = np.array([st.share_interval(each, 480) for each in shares])
    covered = np.mean((bounds[:, 0] <= true) & (true <= bounds[:, 1]))
    assert abs(covered - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 1500) + 0.005


def test_equivalence_is_the_90_percent_interval_within_the_margin():
    rng = np.random.default_rng(2)
    said = []
    for d in rng.normal(0.01, 0.045, (200, 8)):
        exact, students = st.equivalence(d)
        for p, (low, high) in ((exact, st.interval(d, 0.1)), (students, st.t_interval(d, 0.1))):
            assert (p <= 0.05) == (-0.05 < low and high < 0.05)
            said.append(p <= 0.05)
    assert 0.2 < np.mean(said) < 0.9
    assert st.equivalence(np.full(8, 0.06))[0] == 1 and st.equivalence(np.full(8, 0.06))[1] == 1
    assert st.equivalence(np.zeros(8)) == (2**-8, 0)
    assert st.equivalence(DARWIN / 1000, margin=0.05)[0] < 0.01 < st.equivalence(DARWIN / 1000, margin=0.021)[0]


@pytest.mark.parametrize("true", [0.05, -0.05])
def test_variants_that_differ_by_the_margin_are_rarely_called_equivalent(true):
    samples = np.random.default_rng(4).normal(true, 0.03, (3000, 8))
    exact, students = np.mean([np.array(st.equivalence(d)) <= 0.05 for d in samples], axis=0)
    for rate in (exact, students):
        assert 0.03 < rate < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 3000)


# ------------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize("tests, seeds", [(1, 6), (2, 7), (3, 7), (6, 8), (12, 9)])
def test_the_fewest_seeds_that_can_decide(tests, seeds):
    """Differences of one sign are the strongest evidence there is: they are enough with so many seeds, not one less."""
    p = [st.sign_flip(np.arange(1.0, n + 1))[0] for n in (seeds - 1, seeds)]
    assert p[1] * tests <= 0.05 < p[0] * tests
    assert st.fewest_seeds(tests) == seeds


def test_power_is_how_often_the_test_says_it():
    rng = np.random.default_rng(6)
    for n, effect, tests in ((8, 1.0, 1), (10, 0.9, 1), (10, 1.4, 6)):
        said = np.mean([st.sign_flip(d)[0] <= 0.05 / tests for d in rng.normal(effect, 1, (2000, n))])
        found = st.power_of(n, 2 * effect, 2, tests)
        assert found == pytest.approx(said, abs=4 * math.sqrt(0.25 / 2000))
        assert found == st.power_of(n, -2 * effect, 2, tests)
    # 8 seeds, Holm over 6: all signs must be equal
    assert st.power_of(8, 1.5, 1, 6) == pytest.approx(stats.norm.cdf(1.5) ** 8, abs=0.02)
    assert st.power_of(7, 99, 1, 6) == 0 and st.power_of(8, 99, 1, 6) == 1


def test_power_of_many_seeds_is_students():
    for tests, effect in ((1, 0.9), (6, 1.2)):
        rng = np.random.default_rng(7)  # the first number of seeds that is not simulated, against the sign-flip test
        said = np.mean([st.sign_flip(d)[0] <= 0.05 / tests for d in rng.normal(effect, 1, (1000, 13))])
        assert st.power_of(13, effect, 1, tests) == pytest.approx(said, abs=4 * math.sqrt(0.1 * 0.9 / 1000))
    shift = 0.7 * math.sqrt(25)
    expected = 1 - stats.nct.cdf(stats.t.ppf(1 - 0.025, 24), 24, shift)
    assert st.power_of(25, 0.7, 1) == pytest.approx(expected)


def test_seeds_needed_is_the_first_number_with_the_power():
    for mean, sd in ((0.1, 0.08), (0.05, 0.06), (0.3, 0.1)):
        n = st.seeds_needed(mean, sd, tests=6)
        assert st.power_of(n, mean, sd, 6) >= 0.8 and (n == 8 or st.power_of(n - 1, mean, sd, 6) < 0.8)
    assert st.seeds_needed(1.0, 0.1, tests=6) == 8 and st.seeds_needed(1.0, 0.1) == 6
    assert st.seeds_needed(0.001, 1.0) is None and st.seeds_needed(0.0, 1.0) is None
    # three pilot pairs: sd up by sqrt(2 / chi2(0.2, 2)) = 2.12
    assert st.seeds_needed(0.3, 0.1, 6, pilot=3) == st.seeds_needed(0.3, 0.2117, 6) > st.seeds_needed(0.3, 0.1, 6)


@pytest.mark.parametrize("n, tests", [(8, 1), (8, 6), (12, 6), (18, 6)])
def test_the_smallest_difference_seen_has_the_power(n, tests):
    x = st.smallest_seen(n, 0.1, tests)
    assert st.power_of(n, x, 0.1, tests) == pytest.approx(0.8, abs=0.001)
    assert st.smallest_seen(n, 0.2, tests) == pytest.approx(2 * x)


def test_seeds_too_few_to_decide_would_have_seen_nothing():
    assert st.smallest_seen(7, 0.1, tests=6) == math.inf and st.smallest_seen(2, 0.1) == math.inf


# ----------------------------------------------------------------------------------- curves, best of several


def test_the_area_is_the_mean_height_over_log_steps():
    assert st.area([10, 100, 1000], [0, 0.5, 1]) == pytest.approx(0.5)
    assert st.area([10, 100, 1000], [1, 0, 0]) == pytest.approx(0.25)
    steps = [100, 200, 400, 800, 1200]
    assert st.area(steps, [0.3] * 5) == pytest.approx(0.3)
    early, late = [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]
    widths = np.diff(np.log10(steps)) / math.log10(12)
    assert st.area(steps, early) == pytest.approx(1 - widths[0] / 2) and st.area(steps, late) == pytest.approx(
        widths[-1] / 2
    )


@pytest.mark.parametrize("steps, scores", [
    ([100, 200], [0.1, np.nan]), ([200, 100], [0.1, 0.2]), ([100, 100], [0.1, 0.2]), ([0, 100], [0.1, 0.2]),
    ([100], [0.1]), ([100, 200, 400], [0.1, 0.2]),
])  # fmt: skip
def test_a_curve_with_a_hole_has_no_area(steps, scores):
    with pytest.raises(ValueError, match="finite score at each of two or more ascending steps"):
        st.area(steps, scores)


def test_every_run_has_one_area_over_the_same_steps():
    """Rows come in any order; the runs of a seed lie side by side for `compare.differences`."""
    curves = {("a", 0): [0, 1], ("b", 0): [0, 0.5], ("a", 1): [1, 1], ("b", 1): [0.2, 0.2]}
    visits = pd.DataFrame(
        [
            {"label": label, "seed": seed, "step": step, "right": score}
            for (label, seed), scores in curves.items()
            for step, score in zip((100, 400), scores, strict=True)
        ]
    )
    found = st.areas(visits.sample(frac=1, random_state=3), "right")
    assert compare.differences(found, "a", "b", "right").to_dict() == pytest.approx({0: 0.25, 1: 0.8})
    with pytest.raises(ValueError, match=r"b, seed 1: visited at \[100\], other runs at \[100, 400\]"):
        st.areas(visits.iloc[:-1], "right")
    with pytest.raises(ValueError, match="visited at"):
        st.areas(pd.concat([visits, visits.iloc[-1:]]), "right")


def table(means, n=8, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    y = np.array(means) + rng.normal(0, 0.3, (n, 1)) + rng.normal(0, noise, (n, len(means)))
    return pd.DataFrame(y, columns=[f"h = {i}" for i in range(len(means))])


def test_a_clear_best_is_the_only_one():
    found = st.against_the_best(table([0.1, 0.9, 0.3]))
    assert found["is_best"].tolist() == found["may_be_best"].tolist() == [False, True, False]
    assert found.loc["h = 1", "difference"] == pytest.approx(0.6, abs=0.1)
    assert found.loc["h = 1", "low"] == 0 < 0.5 < found.loc["h = 1", "high"]
    assert found.loc["h = 0", "low"] < -0.7 < found.loc["h = 0", "high"] + 0.7 and found.loc["h = 0", "high"] == 0


def test_the_largest_mean_alone_makes_no_best():
    found = st.against_the_best(table([0.50, 0.51, 0.1], noise=0.1))
    assert found["may_be_best"].tolist() == [True, True, False] and not found["is_best"].any()
    assert (found["low"] <= found["difference"]).all() and (found["difference"] <= found["high"]).all()


def test_seeds_are_paired_in_the_sweep():
    """The seeds differ by 0.3, the variants by 0.1: only within the seeds is it seen."""
    y = table([0.5, 0.6], noise=0.02)
    assert st.against_the_best(y)["is_best"].tolist() == [False, True]
    mixed = pd.DataFrame({"h = 0": y["h = 0"], "h = 1": y["h = 1"].to_numpy()[::-1]})
    assert not st.against_the_best(mixed)["is_best"].any()


def test_two_variants_are_students_upper_bound_nearly():
    y = table([0.5, 0.55], n=12, noise=0.05, seed=4)
    d = (y["h = 1"] - y["h = 0"]).to_numpy()
    bound = d.mean() + stats.t.ppf(0.95, 11) * d.std(ddof=1) / math.sqrt(12)
    assert st.against_the_best(y).loc["h = 1", "high"] == pytest.approx(bound, rel=0.1)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("n", [6, 8])
def test_all_intervals_against_the_best_hold_together(n, unequal):
    """Four variants, two of them the best: all four true differences covered in 95 % of 400 simulated sweeps."""
    rng, truth = np.random.default_rng(9), np.array([0.5, 0.5, 0.4, 0.2])
    to_best = truth - [max(np.delete(truth, i)) for i in range(4)]
    covered, excluded = [], []
    for _ in range(400):
        noise = rng.normal(0, 1, (n, 4)) * (np.linspace(0.02, 0.2, 4) if unequal else 0.1)
        found = st.against_the_best(pd.DataFrame(truth + rng.normal(0, 0.3, (n, 1)) + noise))
        covered.append(((found["low"] <= to_best + 1e-12) & (to_best - 1e-12 <= found["high"])).all())
        excluded.append(not found["may_be_best"][3])
    assert np.mean(covered) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)
    assert np.mean(excluded) > 0.5


def test_a_sweep_that_cannot_be_judged():
    assert not st.against_the_best(table([0.1, 0.9], n=4))["is_best"].any()  # 2^-4 is more than 5 %
    y = table([0.1, 0.2])
    y.iloc[3, 0] = np.nan
    with pytest.raises(ValueError, match="no missing value"):
        st.against_the_best(y)
    assert st.against_the_best(pd.DataFrame({"a": [0.5] * 8, "b": [0.4] * 8}))["is_best"].tolist() == [True, False]


# ------------------------------------------------------------------------------------------------- words

PLAN = [(a, b, end) for a, b in (("RAT", "CAT"), ("SA", "norm"), ("paper", "published")) for end in ("area", "end")]


def answers(**given):
    """The plan's six contrasts, of which the first ones have these differences."""
    found = {key: pd.Series(d) if d is not None else None for key, d in zip(PLAN, given["d"], strict=True)}
    return [st.contrasts(found)[key] for key in PLAN]


def test_the_words():
    clear = np.array([0.2, 0.3, 0.25, 0.15, 0.3, 0.2, 0.22, 0.28])
    close = np.array([0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.0, -0.01])
    small = np.array([0.02, 0.03, 0.02, 0.025, 0.01, 0.03, 0.02, 0.02])
    open_ = np.array([0.2, -0.1, 0.15, -0.05, 0.1, 0.3, -0.2, 0.1])
    found = answers(d=[clear, -clear, close, small, open_, None])
    words = [st.word(each) for each in found]
    assert words[:4] == [
        "RAT faster here",
        "CAT better at the end here",
        "equivalent within 5 points",
        "SA better at the end here, but equivalent within 5 points",
    ]
    assert words[4] == f"inconclusive (could have seen {found[4].seen:.2f})" and words[5] == "not tested at this size"
    assert found[4].seen == st.smallest_seen(8, float(np.std(open_, ddof=1)), 6)


def test_a_contrast_says_what_its_parts_say():
    d = np.array([0.2, 0.3, 0.25, -0.05, 0.3, 0.2, 0.22, 0.28])
    (found, *_) = answers(d=[d, None, None, None, None, None])
    assert (found.a, found.b, found.end_point, found.n) == ("RAT", "CAT", "area", 8)
    assert (found.mean, found.sd) == (pytest.approx(0.2125), pytest.approx(stats.tstd(d)))
    assert (found.low, found.high) == st.interval(d) and (found.t_low, found.t_high) == st.t_interval(d)
    assert found.p == 4 / 256 and found.adjusted == pytest.approx(6 * 4 / 256)  # also for contrasts without runs
    assert st.word(found).startswith("inconclusive")


def test_seeds_too_few_say_so():
    (found, *_) = answers(d=[[0.5, 0.6], None, None, None, None, None])
    assert st.word(found) == "inconclusive (2 seeds cannot decide it)"
    (found, *_) = answers(d=[[0.5], None, None, None, None, None])
    assert st.word(found) == "inconclusive (1 seeds cannot decide it)"


def test_an_end_point_that_no_word_knows():
    with pytest.raises(ValueError, match="end points are area, end, not middle"):
        st.contrasts({("a", "b", "middle"): None})


def test_what_was_dropped_is_kept_in_the_answer():
    d = pd.Series([0.1] * 8)
    d.attrs["dropped"] = (3,)
    assert st.contrasts({("a", "b", "end"): d})["a", "b", "end"].dropped == (3,)
