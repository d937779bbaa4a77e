"""The statistics of a report: textbook values, hand-computed ones, all permutations, simulations, and the rule of verdicts.

Guarantees: t intervals, paired, Welch's and Holm's p equal published examples; the power and what follows from it agree with
simulation and with a published table; each verdict is reached exactly where its rule says; nothing becomes nan.
Run: bash scripts/test.sh tests/test_paired.py (about 5 s on one core).
"""
from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest

paired = pytest.importorskip("paired", reason="needs scipy")

# Student (1908), The probable error of a mean, Biometrika 6:1: extra hours of sleep of ten patients by two drugs.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def seeds(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values, 1))


def one(arm: list[float], control: list[float], smallest_effect: float = 0.0005) -> paired.Comparison:
    return paired.compare({"arm": seeds(arm)}, seeds(control), smallest_effect)["arm"]


# ----------------------------------------------------------------------------------------------------------------------
# Intervals and p values.
# ----------------------------------------------------------------------------------------------------------------------


def test_students_sleep_data_give_the_published_values() -> None:
    """As R prints them: t.test(extra ~ group, data = sleep) with and without paired = TRUE."""
    found = one(SLEEP_1, SLEEP_2)
    assert found.difference == pytest.approx(-1.58, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(-2.4598858, abs=5e-8), pytest.approx(-0.7001142, abs=5e-8))
    assert found.p_paired == found.p_holm == pytest.approx(0.002833, abs=5e-7)
    assert found.p_welch == pytest.approx(0.07939, abs=5e-6)
    assert found.verdict == "better"        # lower is better
    assert one(SLEEP_2, SLEEP_1).verdict == "worse"


def test_three_pairs_by_hand() -> None:
    """d = 1, 2, 3: m = 2, s = 1, t = 2 sqrt(3); with 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(t^2 + 2)."""
    found = one([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t, half = 2 * math.sqrt(3), 4.302652730 / math.sqrt(3)
    assert found.p_paired == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-12)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_two_pairs_by_hand() -> None:
    """One degree of freedom is Cauchy's distribution: P(|T| > t) = 1 - 2 atan(t) / pi; t(0.975) = tan(0.475 pi)."""
    found = one([1.001, 1.002], [1.0, 1.0])
    assert found.p_paired == pytest.approx(1 - 2 * math.atan(3) / math.pi, rel=1e-9)
    assert found.high == pytest.approx(0.0015 + math.tan(0.475 * math.pi) * 0.0005, rel=1e-9)


def test_p_agrees_with_all_permutations() -> None:
    """The signs of 14 differences in all 16,384 ways: near the t test, which is no permutation test."""
    d = np.random.default_rng(7).normal(0.4, 1.0, 14)
    signs = 1 - 2 * ((np.arange(2**14)[:, None] >> np.arange(14)) & 1)
    exact = float((abs(signs @ d) >= abs(d.sum()) - 1e-12).mean())
    assert paired.paired_p(d) == pytest.approx(exact, abs=0.01)
    assert 0.01 < exact < 0.5


def test_holm_by_hand() -> None:
    """0.01, 0.04, 0.03, 0.005 sorted: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 not below its predecessor."""
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.6, 0.9]) == [1.0, 1.0]
    assert paired.holm([0.2]) == [0.2]
    assert paired.holm([]) == []


# ----------------------------------------------------------------------------------------------------------------------
# Power.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_a_detectable_difference_is_detected_four_times_in_five(n: int) -> None:
    """Simulated t tests on n normal differences around the minimum detectable one; critical values from printed tables."""
    critical = {2: 12.706, 3: 4.303, 5: 2.776, 12: 2.201}[n]
    draws = np.random.default_rng(n).normal(paired.detectable(0.0007, n), 0.0007, (200_000, n))
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(n))
    assert (abs(t) > critical).mean() == pytest.approx(0.8, abs=0.004)     # 4.5 standard errors


def test_the_normal_approximation_would_promise_too_much() -> None:
    normal = [(1.959964 + 0.841621) / math.sqrt(n) for n in (2, 3, 5, 2000)]
    ratios = [paired.detectable(1.0, n) / approximate for n, approximate in zip((2, 3, 5, 2000), normal, strict=True)]
    assert [round(ratio, 1) for ratio in ratios] == [5.8, 2.0, 1.3, 1.0]


def test_seeds_needed_equal_cohens() -> None:
    """Effects of 0.8, 0.5 and 0.2 standard deviations, power 0.8, two-sided 0.05: 15, 34 and 199 pairs (G*Power 3, matched
    pairs; Faul et al. 2007, Behavior Research Methods 39:175)."""
    assert [paired.seeds_needed(1.0, effect, 2) for effect in (0.8, 0.5, 0.2)] == [15, 34, 199]


def test_seeds_needed_are_the_least_that_suffice() -> None:
    n = paired.seeds_needed(0.0007, 0.0005, 3)
    assert paired.detectable(0.0007, n) <= 0.0005 < paired.detectable(0.0007, n - 1)
    assert paired.seeds_needed(0.0007, 0.0005, 3, alpha=0.01) > n
    assert paired.seeds_needed(0.0007, 0.0005, 500) == 501      # never as many as were not enough
    assert paired.seeds_needed(0.0007, 1e-9, 3) == paired.MOST_SEEDS + 1


def test_power_without_an_effect_is_alpha() -> None:
    assert [paired.power_function(n)(0.0) for n in (2, 3, 10, 10_000)] == pytest.approx([0.05] * 4, abs=1e-9)
    assert paired.power_function(4, 0.01)(0.0) == pytest.approx(0.01, abs=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts.
# ----------------------------------------------------------------------------------------------------------------------

BASE = [1.2270, 1.2281, 1.2265, 1.2277]


def shifted(*by: float) -> list[float]:
    return [value + change for value, change in zip(BASE, by, strict=True)]


@pytest.mark.parametrize(("changes", "verdict"), [
    ((-0.002, -0.0021, -0.0019, -0.002), "better"),
    ((0.002, 0.0021, 0.0019, 0.002), "worse"),
    ((0.0001, -0.0001, 0.0002, -0.0002), "no effect"),      # half width 0.0003
    ((0.0003, -0.0003, 0.0006, -0.0006), "underpowered"),   # half width 0.0009
    ((0.0, 0.0, 0.0, 0.0), "no effect"),
    ((0.0001, 0.00012, 0.00009, 0.0001), "worse"),          # sure, however small
])
def test_verdicts(changes: tuple[float, ...], verdict: str) -> None:
    found = one(shifted(*changes), BASE)
    assert found.verdict == verdict
    assert (found.seeds_needed is not None) == (verdict == "underpowered")


def test_the_smallest_effect_decides_between_no_effect_and_underpowered() -> None:
    arm = shifted(0.0003, -0.0003, 0.0006, -0.0006)
    assert one(arm, BASE, 0.0005).verdict == "underpowered"
    assert one(arm, BASE, 0.001).verdict == "no effect"


def test_identical_pairs_are_no_effect_and_nothing_is_nan() -> None:
    found = one(BASE, BASE)
    assert astuple(found) == (4, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, None, "no effect")
    constant = one([1.5, 1.5, 1.5], [1.0, 1.0, 1.0])        # no spread anywhere, yet a difference
    assert astuple(constant) == (3, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, None, "worse")


@pytest.mark.parametrize(("arm", "pairs", "difference"), [({}, 0, None), ({9: 1.0}, 0, None), ({1: 1.5, 9: 1.0}, 1, 0.5)])
def test_fewer_than_two_pairs_are_underpowered(arm: dict[int, float], pairs: int, difference: float | None) -> None:
    found = paired.compare({"arm": arm}, {1: 1.0, 2: 1.0}, 0.0005)["arm"]
    assert (found.pairs, found.difference, found.verdict) == (pairs, difference, "underpowered")
    assert found.low is found.high is found.p_paired is found.p_holm is found.detectable is found.seeds_needed is None


def test_only_equal_seeds_are_pairs() -> None:
    control = {1: 10.0, 2: 20.0, 3: 30.0}
    found = paired.compare({"arm": {3: 31.0, 2: 22.0, 4: 99.0}}, control, 0.0005)["arm"]
    assert (found.pairs, found.difference) == (2, 1.5)


def test_several_arms_are_judged_by_holms_p() -> None:
    """One arm of p = 0.03 is better alone, but not as one of three; an arm of one pair is no test and counts for none."""
    arm = seeds([1.0 + d for d in (-0.001, -0.0004, -0.0012, -0.0003, -0.0001)])
    noise = {f"other{i}": seeds([1.0 + d for d in changes]) for i, changes in enumerate((
        (0.001, -0.001, 0.002, -0.002, 0.0), (0.002, -0.001, 0.001, -0.002, 0.0)))}
    control = seeds([1.0] * 5)
    alone = paired.compare({"arm": arm, "single": {1: 1.1}}, control, 0.0005)["arm"]
    among = paired.compare({"arm": arm, **noise}, control, 0.0005)["arm"]
    assert 0.02 < alone.p_paired < 0.05
    assert (alone.verdict, among.verdict) == ("better", "underpowered")
    assert (alone.p_holm, among.p_holm) == (alone.p_paired, pytest.approx(3 * alone.p_paired))
    assert among.detectable == alone.detectable


@pytest.mark.parametrize("effect", [0.0, -0.1, math.inf, math.nan])
def test_a_smallest_effect_must_be_above_zero(effect: float) -> None:
    with pytest.raises(ValueError, match="the smallest effect must be above 0 and finite, got"):
        paired.compare({}, {}, effect)


def test_sure_verdicts_are_wrong_as_often_as_alpha_says() -> None:
    """Without any effect, three arms at a time: some arm is called better or worse in at most 5 % of 2,000 reports."""
    rng = np.random.default_rng(11)
    wrong = 0
    for _ in range(2000):
        values = rng.normal(0.0, 1.0, (4, 3))
        p = [paired.paired_p(values[arm] - values[3]) for arm in range(3)]
        wrong += min(paired.holm(p)) < paired.ALPHA
    assert 0.02 < wrong / 2000 < 0.064      # 0.05 + 3 standard errors
