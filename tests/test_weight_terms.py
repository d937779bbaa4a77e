"""Loss terms on the exporter's grid.

Guarantees: each term is zero where the export loses nothing, has the value that its definition gives by hand, and the
gradient of finite differences; empty and constant rows give neither infinities nor NaNs.
Run: bash scripts/test.sh tests/test_weight_terms.py (about 3 s).
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import export
import weight_terms
from export import ExportOptions
from weight_terms import Sample

INT8 = ExportOptions(int8_scale_floor=0.0)


@dataclass(frozen=True)
class Fixed(Sample):
    """With the variance of each row as it was: a constant of the gradient, and so of its finite differences."""
    variance: Tensor

    @property
    def power(self) -> Tensor:
        return self.variance


def gaussian(rows: int = 5, n: int = 12, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, n))) * torch.logspace(-2, 0, rows)[:, None]


def sample_of(w: Tensor, q_max: float = 7, at: Tensor | None = None) -> Sample:
    """As a 4-bit int8 export sees w."""
    clip, scale = export.clip_and_scale(w.float(), q_max, INT8)
    restored = export.rounded(w.float(), clip, scale, q_max) * scale.float()[:, None]
    step = scale.to(w.dtype)[:, None]
    return Sample("w", 1.0, w, torch.arange(w.shape[1]) if at is None else at, step, restored.to(w.dtype))


TERMS: dict[str, Callable[[Sample], Tensor]] = {
    "reconstruction": weight_terms.reconstruction, "grid": weight_terms.grid_distance,
    "smooth": weight_terms.scale_smoothness, "cluster": weight_terms.scale_clusters,
    "rank1": weight_terms.beyond_rank_one, "ternary": weight_terms.ternary_distance,
    "ternary groups": partial(weight_terms.ternary_distance, group=5),
    "outlier": partial(weight_terms.outlier_excess, sigmas=1.2),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_is_that_of_finite_differences(name, monkeypatch):
    monkeypatch.setattr(weight_terms, "POWER_STEPS", 300)       # to the exact correction
    term, w = TERMS[name], gaussian()
    fixed = sample_of(w, at=torch.tensor([0, 3, 4, 7, 11]))
    variance = fixed.power

    def value(rows: Tensor) -> Tensor:
        # What the quantiser and the correction do to the weights is held, the weights move.
        return term(Fixed("w", 1.0, rows, fixed.at, fixed.step, fixed.restored, variance))

    leaf = w.clone().requires_grad_()
    found, = torch.autograd.grad(value(leaf), leaf)
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) > 0
    held = held_constants(name, term, w, fixed, variance)
    for i, j in itertools.product(range(5), (0, 3, 5, 11)):
        shift = torch.zeros_like(w)
        shift[i, j] = 1e-6 * float(variance[i]) ** 0.5
        wanted = float(held(w + shift) - held(w - shift)) / (2 * float(shift[i, j]))
        assert float(found[i, j]) == pytest.approx(wanted, rel=1e-4, abs=1e-6 * float(found.abs().max())), (i, j)


def held_constants(name: str, term: Callable[[Sample], Tensor], w: Tensor, s: Sample, variance: Tensor
                   ) -> Callable[[Tensor], Tensor]:
    """The term with its best code or correction for w kept: only there is it a constant by definition."""
    if name.startswith("ternary"):
        group = 5 if "groups" in name else 12
        code = torch.cat([weight_terms.best_ternary(part) for part in w.split(group, 1)], 1)
        return lambda rows: ((rows - code)[:, s.at].square() / variance).mean()
    if name == "rank1":
        u, sizes, v = torch.linalg.svd(w - s.restored)
        nearest = s.restored + sizes[0] * u[:, :1] * v[:1]
        return lambda rows: ((rows - nearest)[:, s.at].square() / variance).mean()
    if name == "cluster":
        marks = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
        levels = w.abs().amax(1).log2().quantile(marks)
        return lambda rows: (rows.abs().amax(1).log2()[:, None] - levels).square().amin(1).mean()
    return lambda rows: term(Fixed("w", 1.0, rows, s.at, s.step, s.restored, variance))


@pytest.mark.parametrize("name", ["reconstruction", "grid", "rank1"])
def test_weights_on_the_grid_cost_nothing(name):
    codes = torch.from_numpy(np.random.default_rng(1).integers(-7, 8, (6, 20))).double()
    codes[:, 0] = 7                                                        # the clip is then the largest code's
    w = codes * torch.tensor([0.5, 0.25, 1.0, 2.0, 0.125, 4.0])[:, None]   # scales that fp16 holds exactly
    assert float(TERMS[name](sample_of(w))) == pytest.approx(0, abs=1e-12)


def test_the_reconstruction_error_is_the_exporters():
    w = gaussian(40, 300).float()
    codes, scale = export.quantize(w, 7, "row", INT8)
    error = w - export.dequantize(codes, scale, "row")
    wanted = (error.square().mean(1) / w.square().mean(1)).mean()
    assert float(weight_terms.reconstruction(sample_of(w))) == pytest.approx(float(wanted), rel=1e-5)


def test_the_distance_to_the_grid_is_one_half_a_step_off_and_a_half_on_average():
    step = 0.25
    w = (torch.arange(-8.0, 8.0) + 0.5)[None] * step
    sample = Sample("w", 1.0, w, torch.arange(16), torch.tensor([[step]]), torch.zeros_like(w))
    assert float(weight_terms.grid_distance(sample)) == pytest.approx(1)
    even = torch.linspace(0, 4, 1001)[None, :-1] * step
    sample = Sample("w", 1.0, even, torch.arange(1000), torch.tensor([[step]]), torch.zeros_like(even))
    assert float(weight_terms.grid_distance(sample)) == pytest.approx(0.5)


def test_the_cost_of_scales_is_in_octaves_between_neighbours():
    w = torch.tensor([[1.0, 0.5], [-4.0, 1.0], [4.0, 4.0], [2.0, -8.0]])
    assert float(weight_terms.scale_smoothness(sample_of(w))) == pytest.approx((4 + 0 + 1) / 3)
    assert float(weight_terms.scale_smoothness(sample_of(w[:1]))) == 0
    assert float(weight_terms.scale_smoothness(sample_of(3 * w))) == pytest.approx(5 / 3)


def test_scales_on_a_few_levels_cost_nothing():
    two = torch.tensor([1.0, 16.0]).repeat(50)[:, None] * torch.ones(100, 3)
    assert float(weight_terms.scale_clusters(sample_of(two))) == pytest.approx(0, abs=1e-9)
    spread = torch.logspace(0, 8, 100, base=2.0)[:, None] * torch.ones(100, 3)
    assert 0.01 < float(weight_terms.scale_clusters(sample_of(spread))) < (8 / 8) ** 2 / 4


def test_an_error_of_rank_one_is_repaired_and_no_other():
    rng = np.random.default_rng(2)
    a, b = torch.from_numpy(rng.normal(size=(9, 1))), torch.from_numpy(rng.normal(size=(1, 14)))
    restored = torch.from_numpy(rng.normal(size=(9, 14)))
    sample = Sample("w", 1.0, restored + a * b, torch.arange(14), torch.ones(9, 1), restored)
    assert float(weight_terms.beyond_rank_one(sample)) == pytest.approx(0, abs=1e-9)
    noise = torch.from_numpy(rng.normal(size=(9, 14)))
    both = Fixed("w", 1.0, restored + 9 * a * b + noise, torch.arange(14), torch.ones(9, 1), restored, torch.ones(9, 1))
    values = torch.linalg.svdvals(9 * a * b + noise)
    assert float(weight_terms.beyond_rank_one(both)) == pytest.approx(float(values[1:].square().sum()) / 126, rel=1e-3)


def test_the_best_ternary_code_is_the_best_of_all():
    rows = gaussian(7, 6, seed=3)
    found = (rows - weight_terms.best_ternary(rows)).square().sum(1)
    for i, row in enumerate(rows):
        tries = [np.array(signs) for signs in itertools.product((-1, 0, 1), repeat=6) if any(signs)]
        best = min(float(((row.numpy() - t * (t @ row.numpy()) / (t @ t)) ** 2).sum()) for t in tries)
        assert float(found[i]) == pytest.approx(best, rel=1e-9)


def test_ternary_rows_cost_nothing_and_gaussian_ones_0_19():
    ternary = torch.tensor([[0.3, -0.3, 0, 0.3], [0, 0, 0, 0], [2, 2, -2, 2]])
    assert float(weight_terms.ternary_distance(sample_of(ternary))) == pytest.approx(0, abs=1e-9)
    wide = torch.from_numpy(np.random.default_rng(4).normal(size=(8, 20_000)))
    assert float(weight_terms.ternary_distance(sample_of(wide))) == pytest.approx(0.190, abs=0.003)   # Max 1960, table I


def test_a_group_of_its_own_scale_costs_nothing():
    w = torch.tensor([[0.1, 0, -0.1, 3.0, 3.0, 0, 7.0]])
    assert float(weight_terms.ternary_distance(sample_of(w), group=3)) == pytest.approx(0, abs=1e-9)
    assert float(weight_terms.ternary_distance(sample_of(w))) > 0.1


def test_outliers_are_what_exceeds_the_spread():
    calm = torch.ones(3, 10)
    assert float(weight_terms.outlier_excess(sample_of(calm))) == 0
    wide = torch.from_numpy(np.random.default_rng(5).normal(size=(16, 100_000)))
    wanted = 2 * integrate.quad(lambda x: (x - 2) ** 2 * stats.norm.pdf(x), 2, 40)[0]
    assert float(weight_terms.outlier_excess(sample_of(wide), sigmas=2)) == pytest.approx(wanted, rel=0.02)
    assert 2 * integrate.quad(lambda x: (x - 4) ** 2 * stats.norm.pdf(x), 4, 40)[0] == pytest.approx(6e-6, rel=0.2)


@pytest.mark.parametrize("name", TERMS)
def test_empty_and_constant_rows_give_finite_values_and_gradients(name):
    w = torch.zeros(4, 12)
    w[1], w[2, 3] = 1.0, 1e-20
    leaf = w.requires_grad_()
    value = TERMS[name](sample_of(leaf))
    gradient, = torch.autograd.grad(value, leaf, allow_unused=True)
    assert bool(value.isfinite())
    assert gradient is None or bool(gradient.isfinite().all())
