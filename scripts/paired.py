"""Arms against one control over equal seeds: difference, interval, p, what the seeds at hand could have found, a verdict.

Values are bits per byte, lower is better. For the n seeds that an arm shares with the control, d = arm - control has mean m
and standard deviation s (of n - 1); t(q) is the quantile q of Student's t with n - 1 degrees of freedom; alpha = 0.05.

    interval    m -+ t(1 - alpha/2) s / sqrt(n)
    p           P(|T| > |m| sqrt(n) / s)
    Holm's p    of a arms with n >= 2, ascending: the k-th is the largest of (a - i + 1) p_i over i <= k, at most 1
                (Holm 1979, Scandinavian Journal of Statistics 6:65)
    Welch's p   of the two means over all seeds of each, pairs ignored, degrees of freedom by Satterthwaite; decides nothing
    power(D)    P(|T'| > t(1 - alpha/2)), T' noncentral t with n - 1 degrees of freedom and noncentrality D sqrt(n) / s
    MDD         the minimum detectable difference: the D of power 0.8. With few seeds the normal approximation
                (1.96 + 0.84) s / sqrt(n) is far too small: 5.8 times for n = 2, 2.0 for 3, 1.3 for 5
    needs       the least n' > n with which the smallest effect that matters has power 0.8, at alpha / a (Holm's strictest
                step, so that it is enough whatever the other arms show) and with s as it is

Verdict, in this order:
    underpowered    n < 2
    better, worse   Holm's p < alpha; the sign of m decides
    no effect       the interval lies inside -+ the smallest effect that matters; identical pairs (all d = 0) are so
    underpowered    neither: the difference may matter, and these seeds cannot tell
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special, stats

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 10_000     # nobody trains more; the search for `seeds_needed` ends there
VERDICTS = BETTER, WORSE, NO_EFFECT, UNDERPOWERED = "better", "worse", "no effect", "underpowered"


@dataclass(frozen=True)
class Comparison:
    """An arm against the control, in bits per byte; None = the pairs do not tell."""
    pairs: int
    difference: float | None            # arm - control, mean over the pairs
    low: float | None                   # 95 % interval of the difference
    high: float | None
    p_paired: float | None
    p_holm: float | None                # p_paired adjusted for the number of arms; the verdict's
    p_welch: float | None
    detectable: float | None            # minimum detectable difference
    seeds_needed: int | None            # where underpowered, with two pairs or more; MOST_SEEDS + 1 = more than that
    verdict: str


def compare(arms: Mapping[str, Mapping[int, float]], control: Mapping[int, float], smallest_effect: float,
            ) -> dict[str, Comparison]:
    """Each arm, seed -> value, against the control. Raises ValueError where the smallest effect is not above 0."""
    if not 0 < smallest_effect < math.inf:
        raise ValueError(f"the smallest effect must be above 0 and finite, got {smallest_effect:g}")
    paired = {name: np.array([values[seed] - control[seed] for seed in sorted(values.keys() & control.keys())])
              for name, values in arms.items()}
    p = {name: paired_p(d) for name, d in paired.items() if d.size >= 2}
    adjusted = dict(zip(p, holm(p.values()), strict=True))
    return {name: judge(d, p.get(name), adjusted.get(name), welch_p([*arms[name].values()], [*control.values()]),
                        smallest_effect, ALPHA / max(len(p), 1)) for name, d in paired.items()}


def judge(d: np.ndarray, p: float | None, p_holm: float | None, p_welch: float | None, smallest_effect: float,
          alpha_each: float) -> Comparison:
    """The rule above, for the differences (pairs,) of one arm."""
    n = d.size
    if p is None or p_holm is None:
        return Comparison(n, float(d[0]) if n else None, None, None, None, None, p_welch, None, None, UNDERPOWERED)
    mean, sd, (low, high), needed = float(d.mean()), spread(d), interval(d), None
    if p_holm < ALPHA:
        verdict = BETTER if mean < 0 else WORSE
    elif -smallest_effect <= low and high <= smallest_effect:
        verdict = NO_EFFECT
    else:
        verdict, needed = UNDERPOWERED, seeds_needed(sd, smallest_effect, n, alpha_each)
    return Comparison(n, mean, low, high, p, p_holm, p_welch, detectable(sd, n), needed, verdict)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals and p values.
# ----------------------------------------------------------------------------------------------------------------------


def spread(values: np.ndarray) -> float:
    """The standard deviation of n - 1; exactly 0 where all values are one, which a rounded mean would blur."""
    return 0.0 if (values == values[0]).all() else float(values.std(ddof=1))


def interval(d: np.ndarray) -> tuple[float, float]:
    half = float(stats.t.ppf(1 - ALPHA / 2, d.size - 1)) * spread(d) / math.sqrt(d.size)
    return float(d.mean()) - half, float(d.mean()) + half


def two_sided(mean: float, error: float, freedom: float) -> float:
    """P(|T| > |mean / error|); without any error a difference is certain and its absence too."""
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean / error), freedom))


def paired_p(d: np.ndarray) -> float:
    return two_sided(float(d.mean()), spread(d) / math.sqrt(d.size), d.size - 1)


def welch_p(a: list[float], b: list[float]) -> float | None:
    """Of two independent samples with variances of their own; None with fewer than two values on a side."""
    if min(len(a), len(b)) < 2:
        return None
    first, second = np.array(a), np.array(b)
    squares = [spread(x) ** 2 / x.size for x in (first, second)]
    error = sum(squares)
    freedom = error**2 / sum(s**2 / (x.size - 1) for s, x in zip(squares, (first, second), strict=True)) if error else 1.0
    return two_sided(float(first.mean() - second.mean()), math.sqrt(error), freedom)


def holm(p: Iterable[float]) -> list[float]:
    """Adjusted p values, in the order given."""
    values = list(p)
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


# ----------------------------------------------------------------------------------------------------------------------
# Power.
# ----------------------------------------------------------------------------------------------------------------------

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(128)      # on (-1, 1)


def power_function(n: int, alpha: float = ALPHA) -> Callable[[float], float]:
    """The chance that n pairs give p < alpha, as a function of the noncentrality D sqrt(n) / s.

    T' = (Z + noncentrality) / W with W^2 = chi^2 / freedom: the normal probabilities given W, integrated over W. scipy's own
    nct (1.17) returns nan for many noncentralities above 9; where it does not, both agree to 1e-12.
    """
    freedom, critical = n - 1, stats.t.isf(alpha / 2, n - 1)
    low, high = stats.chi.ppf(1e-14, freedom), stats.chi.isf(1e-14, freedom)
    chi = low + (high - low) * (NODES + 1) / 2
    mass = NODE_WEIGHTS * (high - low) / 2 * stats.chi.pdf(chi, freedom)
    reach = critical * chi / math.sqrt(freedom)
    return lambda shift: float(mass @ (special.ndtr(shift - reach) + special.ndtr(-shift - reach)))


def detectable(sd: float, n: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The difference that n pairs, whose differences have this standard deviation, find with this power."""
    reached = power_function(n, alpha)
    top = 2.0
    while reached(top) < power:
        top *= 2
    shift: Any = optimize.brentq(lambda shift: reached(shift) - power, 0.0, top, xtol=1e-10)
    return float(shift) * sd / math.sqrt(n)


def seeds_needed(sd: float, effect: float, more_than: int, alpha: float = ALPHA, power: float = POWER) -> int:
    """The least number of pairs above `more_than` that find `effect` with this power; MOST_SEEDS + 1 = no reasonable one."""
    def enough(n: int) -> bool:
        return power_function(n, alpha)(effect * math.sqrt(n) / sd) >= power

    low, high = more_than, more_than + 1        # low is not enough, or not allowed
    while not enough(high):
        if high > MOST_SEEDS:
            return MOST_SEEDS + 1
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= MOST_SEEDS else MOST_SEEDS + 1
