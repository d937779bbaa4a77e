"""Rate terms: what an exporter will pay for weights, as terms of a training loss.

Guarantees: every value is the one that scipy, numpy, the coder itself or the exporter's quantiser gives; every gradient is
that of finite differences, through weights, activations and fitted parameters; scaling what must not matter changes nothing;
zeros and bfloat16 give finite numbers; neither the generator, the model nor its compiled form is touched; a resumed state
goes on as if nothing had been. Run: bash scripts/test.sh tests/test_rate_terms.py (20 s on one core).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, CPU_BF16, VARIANTS, fixed_batch
from scipy import stats
from test_calibration import ids_of, inputs_of, moment_of, noisy_model
from test_grid import bits_of, gaussian, grid_matrix, placed, written
from torch import Tensor

import export
import rate_terms
import train_gpt
from rate_terms import DualAscent, PriceList, Waterfill, backslash_bits, fit_shape, moment_ratio, soft_entropy_bits

BITS_OF_UNIT_GAUSS = 0.5 * math.log2(2 * math.pi * math.e)
ZEROS = torch.zeros(4, 6)


def draws(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(draws(seed).normal(size=shape))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(draws(seed).uniform(-0.5, 0.5, shape))


def gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(value(x), x)[0]


def differences(value: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar by every element of x, float64."""
    assert x.dtype == torch.float64
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        ends = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved.view(-1)[i] += sign * step
            ends.append(float(value(moved)))
        found.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return found


def same_gradient(value: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 1e-6, step: float = 1e-5) -> None:
    found, wanted = gradient(value, x), differences(value, x, step)
    assert float(wanted.abs().max()) > 0
    assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def entropy_of(q: np.ndarray) -> float:
    return float(stats.entropy(np.unique(q, return_counts=True)[1], base=2))


def finite(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient, after a look at value and gradient."""
    found = gradient(value, x)
    assert bool(value(x).isfinite())
    assert bool(found.isfinite().all())
    return found


# --- BackSlash ------------------------------------------------------------------------------------------------------------


def test_the_moment_ratio_is_that_of_laplace_and_gauss() -> None:
    assert moment_ratio(1.0) == pytest.approx(2.0)
    assert moment_ratio(2.0) == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("nu", [0.3, 0.7, 1.0, 1.6, 2.0, 2.9])
def test_the_fitted_shape_is_the_one_whose_moments_these_are(nu: float) -> None:
    """Two sizes, of shares that make their moment ratio exactly that of nu."""
    large = 1 + math.sqrt(63 * (moment_ratio(nu) - 1))       # one in 64, where the mean of all is 1
    sizes = torch.tensor([large] + [(64 - large) / 63] * 63, dtype=torch.float64)
    assert fit_shape(37 * sizes * torch.tensor([1.0, -1.0] * 32)) == pytest.approx(nu, abs=1e-9)


@pytest.mark.parametrize("nu", [0.5, 1.0, 2.0])
def test_the_fitted_shape_of_a_sample_is_its_own(nu: float) -> None:
    x = stats.gennorm.ppf((np.arange(40_000) + 0.5) / 40_000, nu)
    assert fit_shape(torch.from_numpy(x)) == pytest.approx(nu, rel=0.01)


@pytest.mark.parametrize(("x", "nu"), [([1.0, -1.0, 1.0], 3.0), ([1.0] + [0.0] * 10**6, 0.1), ([0.0, 0.0], 2.0)])
def test_a_shape_beyond_the_range_is_its_end_and_zeros_are_gauss(x: list[float], nu: float) -> None:
    assert fit_shape(torch.tensor(x)) == pytest.approx(nu, abs=1e-9)


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("nu", [0.6, 1.0, 2.0])
def test_backslash_is_the_code_length_under_the_likeliest_density(nu: float, eps: float) -> None:
    x = 3 * normal(40, 50)
    sizes = np.abs(x.numpy()) + eps
    alpha = (nu * (sizes**nu).mean()) ** (1 / nu)
    wanted = -stats.gennorm.logpdf(sizes, nu, scale=alpha).mean() / math.log(2)
    assert float(backslash_bits(x, nu, eps)) == pytest.approx(wanted, abs=1e-12)
    for other in (0.98 * alpha, 1.02 * alpha):
        assert -stats.gennorm.logpdf(sizes, nu, scale=other).mean() / math.log(2) > wanted


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("nu", [0.6, 1.0, 2.0])
def test_backslashs_gradient_is_the_papers_and_that_of_the_whole_value(nu: float, eps: float) -> None:
    """The differences move alpha too: at the likeliest it has no slope."""
    x = 3 * normal(5, 8)
    same_gradient(lambda t: backslash_bits(t, nu, eps), x)
    paper = nu * (x.abs() + eps) ** (nu - 1) * x.sign()
    ratio = gradient(lambda t: backslash_bits(t, nu, eps), x) / paper
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-9)
    assert float(ratio[0, 0]) > 0


@pytest.mark.parametrize(("nu", "spread"), [(2.0, 4.0), (1.0, 4.0), (0.6, 6.0)])
def test_backslash_is_near_the_entropy_of_integers_at_many_bits(nu: float, spread: float) -> None:
    x = spread * stats.gennorm.ppf((np.arange(40_000) + 0.5) / 40_000, nu)
    assert float(backslash_bits(torch.from_numpy(x), nu, 0.0)) == pytest.approx(entropy_of(np.rint(x)), abs=0.06)


def test_backslash_in_steps_knows_no_scale_of_the_weights_and_counts_that_of_the_step() -> None:
    w, step = normal(6, 9), 0.1 + torch.rand(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bits = backslash_bits(w / step, 1.3, 0.5)
    assert float(backslash_bits(8 * w / (8 * step), 1.3, 0.5)) == float(bits)
    assert float(backslash_bits(8 * w / step, 1.3, 8 * 0.5)) == pytest.approx(float(bits) + 3, abs=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("nu", [0.1, 0.5, 1.0, 2.0, 3.0])
def test_backslash_of_zeros_is_finite_and_leaves_them(nu: float, eps: float) -> None:
    assert not finite(lambda t: backslash_bits(t, nu, eps), ZEROS).any()
    some = ZEROS.clone()
    some[0] = torch.linspace(-40, 40, 6)
    found = finite(lambda t: backslash_bits(t, nu, eps), some)
    assert not found[1:].any()
    assert bool((found[0] * some[0] > 0).all())


# --- soft entropy ---------------------------------------------------------------------------------------------------------


def soft_histogram(y: np.ndarray) -> np.ndarray:
    """Shares of -127..127 by the triangular kernel, one weight after the other."""
    found = np.zeros(255)
    for value in np.clip(y, -127, 127).ravel():
        found += np.maximum(0, 1 - np.abs(value - np.arange(-127, 128)))
    return found / y.size


@pytest.mark.parametrize("spread", [0.4, 2.0, 60.0])
def test_soft_entropy_is_that_of_the_triangular_histogram(spread: float) -> None:
    x, u = spread * normal(30, 40), noise(30, 40)
    wanted = stats.entropy(soft_histogram((x + u).numpy()), base=2)
    assert float(soft_entropy_bits(x, u)) == pytest.approx(wanted, abs=1e-9)
    assert float(soft_entropy_bits(x.float(), u.float())) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("spread", [0.4, 2.0, 30.0])
def test_soft_entropys_gradient_is_that_of_the_histograms_entropy(spread: float) -> None:
    """The differences move the histogram; the gradient holds it fixed."""
    x, u = spread * normal(5, 12), noise(5, 12)
    oracle = differences(lambda t: torch.tensor(stats.entropy(soft_histogram((t + u).numpy()), base=2)), x)
    assert torch.allclose(gradient(lambda t: soft_entropy_bits(t, u), x), oracle, atol=1e-6)


def test_soft_entropy_is_above_that_of_rounding_by_what_noise_and_kernel_widen() -> None:
    for spread, with_noise, without in ((0.6, 0.23, 0.12), (2.4, 0.02, 0.01)):
        x, u = spread * normal(100_000), noise(100_000)
        entropy = entropy_of(np.rint(x.numpy()))
        assert float(soft_entropy_bits(x, u)) - entropy == pytest.approx(with_noise, abs=0.01)
        assert float(soft_entropy_bits(x, 0 * u)) - entropy == pytest.approx(without, abs=0.01)


def test_soft_entropy_knows_no_order_of_the_weights() -> None:
    x, u = 2 * normal(3000).float(), noise(3000).float()
    order = torch.from_numpy(draws(3).permutation(3000))
    first, second = (gradient(lambda t, u=v: soft_entropy_bits(t, u), t) for t, v in ((x, u), (x[order], u[order])))
    assert torch.equal(first[order], second)


def test_weights_beyond_the_last_integer_are_counted_there_without_a_gradient() -> None:
    x = torch.tensor([300.0, -300.0, 1.2, -0.3])
    assert float(soft_entropy_bits(x, torch.zeros(4))) == pytest.approx(
        stats.entropy(soft_histogram(x.numpy()), base=2), abs=1e-6)
    assert gradient(lambda t: soft_entropy_bits(t, torch.zeros(4)), x)[:2].tolist() == [0, 0]


def test_soft_entropy_of_zeros_is_zero_and_leaves_them() -> None:
    assert float(soft_entropy_bits(ZEROS, ZEROS)) == 0
    assert not finite(lambda t: soft_entropy_bits(t, ZEROS), ZEROS).any()
    finite(lambda t: soft_entropy_bits(t, noise(4, 6).float()), ZEROS)


# --- price lists ----------------------------------------------------------------------------------------------------------


def uneven(rows: int, cols: int, spread: float, seed: int = 0) -> Tensor:
    """Normal weights in steps, of rows and columns of unequal sizes."""
    rng = draws(seed)
    sizes = np.exp(0.4 * rng.normal(size=(rows, 1))) * np.exp(0.5 * rng.normal(size=(1, cols)))
    return torch.from_numpy(spread * sizes * rng.normal(size=(rows, cols)))


def level_of(x: Tensor) -> Tensor:
    """log2 of the expected magnitude by row and column means, as `export.on_grid` computes it."""
    sizes = x.abs()
    usual = sizes.mean(0)
    return usual.log2() + (sizes / usual).mean(1, keepdim=True).log2()


def coder_prices(positions: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> tuple[export.SymbolModel, np.ndarray]:
    """The coder's model after it has seen these, by its own functions; and the buckets that hold something."""
    model, raw_bits, seen = export.SymbolModel(0), export.shifts(0), []
    for name, q in positions.items():
        bucket = np.floor(4 * (levels[name].numpy() + 6)).clip(0, 79).astype(int) + np.zeros(q.shape, int)
        seen.append((2 * bucket * export.SYMBOLS + export.split_codes(q.numpy(), raw_bits[bucket])).ravel())
    model.observe(np.concatenate(seen))
    return model, np.unique(np.concatenate(seen) // (2 * export.SYMBOLS))


@pytest.mark.parametrize("spread", [0.3, 2.0, 30.0])
def test_an_integers_price_is_the_coders_own(spread: float) -> None:
    """Of integers that share a symbol, in the middle of them; of symbols that somebody holds."""
    x = {"a": uneven(64, 96, spread), "b": uneven(48, 32, spread / 2, seed=1)}
    positions, levels = {n: t.round().long() for n, t in x.items()}, {n: level_of(t) for n, t in x.items()}
    prices, (model, buckets) = PriceList.learned(positions, levels), coder_prices(positions, levels)
    checked = 0
    for bucket in buckets:
        wanted, bits = model.prices()[bucket, 0], int(export.shifts(0)[bucket])
        share = model.share.reshape(export.BUCKETS, 2, export.SYMBOLS)[bucket, 0]
        level = torch.tensor(bucket / 4 - 6 + 0.01)
        for symbol in np.flatnonzero(share[:export.ESCAPE]):
            q = torch.tensor([float((int(symbol) - export.REACH) << bits) + (2**bits - 1) / 2], dtype=torch.float64)
            assert float(prices.bits(q, level)) == pytest.approx(wanted[symbol], abs=1e-5)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("spread", [0.7, 20.0])
def test_a_price_lists_total_is_that_of_the_coded_file(spread: float) -> None:
    """Within 3 % (1.7 to 7 bits a weight): the coder pays for learning its tables and for the sizes of rows as well."""
    owned, positions, levels = [], {}, {}
    for name, seed in (("a", 0), ("b", 1)):
        x = uneven(512, 512, spread, seed)
        q = x.round().long()
        sizes = np.rint(32 * level_of(x).mean(1).numpy())
        owned.append(grid_matrix(name, q.numpy(), 0, row_sizes=sizes))
        positions[name], levels[name] = q, level_of(x)
    prices, (body, _) = PriceList.learned(positions, levels), written(*owned)
    total_bits = sum(float(prices.bits(q.double(), levels[name])) * q.numel() for name, q in positions.items())
    assert 0.97 < total_bits / (8 * len(body)) < 1.0


def test_a_histograms_price_is_the_smoothed_entropy_and_near_deflate() -> None:
    q = (30 * normal(300, 200)).round().clamp(-127, 127).long()
    lists = PriceList.histograms({"a": q, "b": q // 8})
    counts = np.bincount(q.numpy().ravel() + 127, minlength=255) + 1
    wanted = -(counts - 1) @ np.log2(counts / counts.sum()) / q.numel()
    assert float(lists["a"].bits(q.double())) == pytest.approx(wanted, abs=1e-5)
    assert wanted == pytest.approx(entropy_of(q.numpy()), abs=0.01)
    coded_bits = 8 * len(export.deflate(q.numpy().astype(np.int8).tobytes())) / q.numel()
    assert wanted == pytest.approx(coded_bits, rel=0.02)
    assert float(lists["b"].bits((q // 8).double())) == pytest.approx(entropy_of(q.numpy() // 8), abs=0.01)


def test_a_price_lists_gradient_is_its_slope() -> None:
    x, other = uneven(6, 9, 3.0), uneven(64, 96, 3.0)
    prices = PriceList.learned({"a": other.round().long()}, {"a": level_of(other)})
    same_gradient(lambda t: prices.bits(t, level_of(x)), x)
    histogram = PriceList.histograms({"a": other.round().long()})["a"]
    same_gradient(histogram.bits, x)


def test_outliers_are_pulled_back_from_beyond_every_reach() -> None:
    other = uneven(64, 96, 3.0)
    lists = PriceList.learned({"a": other.round().long()}, {"a": level_of(other)}), *PriceList.histograms(
        {"a": other.round().long()}).values()
    for prices, level in zip(lists, (torch.tensor(1.0), None), strict=True):
        for far in (49.7, 62.5, 64.5, 1000.0):
            x = torch.tensor([far, -far], dtype=torch.float64)
            same_gradient(lambda t, p=prices, v=level: p.bits(t, v), x)
            above, below = gradient(lambda t, p=prices, v=level: p.bits(t, v), x).tolist()
            assert above > 0.01
            assert below < -0.01


@pytest.mark.parametrize("level", [-math.inf, -6.0])
def test_a_price_list_of_zeros_is_finite_and_pulls_nothing(level: float) -> None:
    """Else it would hold a matrix that starts as zeros until the next list."""
    prices = PriceList.learned({"a": ZEROS.long()}, {"a": torch.tensor(level)})
    assert not finite(lambda t: prices.bits(t, torch.tensor(level)), ZEROS).any()
    histogram = PriceList.histograms({"a": ZEROS.long()})["a"]
    assert not finite(histogram.bits, ZEROS).any()
    assert not gradient(histogram.bits, ZEROS + 5.3).any()
    assert not finite(lambda t: prices.bits(t, torch.tensor(level)), ZEROS + 1e20).any()     # on steps made for zeros


def test_symbols_without_a_share_are_priced_by_their_sides_and_the_outermost_by_the_mean_slope() -> None:
    prices, held = np.array([30.0, 8, 30, 2, 3, 30, 30]), np.array([0, 1, 0, 1, 1, 0, 0], bool)
    found = rate_terms.continued(prices, held)
    assert found.tolist() == [14, 11, 8, 30, 2, 3, 4, 5, 6]     # its neighbour's own price: the escape is one step away


def exp_golomb_bits(q: np.ndarray, k: int) -> np.ndarray:
    """Lengths of exp-Golomb codes of order k of signed integers by zigzag, BackSlash's storage (arXiv 2504.16968)."""
    u = 2 * np.abs(q) - (q > 0)
    return 2 * np.floor(np.log2(u / 2**k + 1)) + 1 + k


def test_exp_golomb_lengths_are_those_of_the_code() -> None:
    assert exp_golomb_bits(np.array([0, 1, -1, 2, -2, 3, -3, 4]), 0).tolist() == [1, 3, 3, 5, 5, 5, 5, 7]
    assert exp_golomb_bits(np.array([0, 1, -1, 2, 7]), 2).tolist() == [3, 3, 3, 3, 7]


@pytest.mark.parametrize(("nu", "spread", "golomb", "entropy"), [
    (2.0, 3.4, 3.82, 3.32), (2.0, 0.85, 1.84, 1.46), (1.0, 1.7, 3.55, 3.22), (1.0, 0.4, 1.62, 1.28)])
def test_exp_golomb_costs_more_than_the_entropy_coder(nu: float, spread: float, golomb: float, entropy: float) -> None:
    """Bits of the best order of five and of the entropy, which the price list meets: the code that BackSlash stores its
    weights in takes 10 to 27 % more on integers of the very densities that it fits.
    """
    x = torch.from_numpy(spread * stats.gennorm.ppf((np.arange(40_000) + 0.5) / 40_000, nu)).view(200, 200)
    q, level = x.round().long(), x.abs().mean().log2()
    best = min(exp_golomb_bits(q.numpy(), k).mean() for k in range(5))
    price = float(PriceList.learned({"a": q}, {"a": level}).bits(q.double(), level))
    assert (best, entropy_of(q.numpy())) == pytest.approx((golomb, entropy), abs=0.005)
    assert price == pytest.approx(entropy, abs=0.01)


# --- water-filling --------------------------------------------------------------------------------------------------------


def double_model(**changes: Any) -> train_gpt.GPT:
    return noisy_model(**changes).double()


def plain_waterfill(w: Tensor, moment: Tensor) -> float:
    """The formula, row by row and column by column."""
    moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    factor = torch.linalg.cholesky(moment)
    bits = sum(0.5 * math.log2(float(w[:, j].square().mean()) * float(factor[j, j]) ** 2) for j in range(w.shape[1]))
    power = sum(float(row @ moment @ row) for row in w) / len(w)
    return bits / w.shape[1] - 0.5 * math.log2(power / w.shape[1])


@pytest.mark.parametrize("variant", ["baseline", "shared_blocks", "factorised", "untied", "factorised_untied"])
def test_waterfills_value_is_the_formula_on_the_inputs_of_every_matrix(variant: str) -> None:
    model = double_model(**VARIANTS[variant])
    inputs, ids, total, count = inputs_of(model, ids_of()), ids_of(), 0.0, 0
    head = inputs.pop("features")
    if model.lm_head is not None:
        inputs["lm_head.weight"] = head
    else:
        inputs["tok_emb.weight"] = head if model.embed_proj is None else [head[0] @ model.embed_proj.weight]
    for name in [name for name in inputs if "c_q" in name]:
        inputs |= {name.replace("c_q", other): inputs[name] for other in ("c_k", "c_v")}
    waterfill = Waterfill(model, CPU, 0.0)
    assert set(waterfill.names) == set(inputs)
    for name, uses in inputs.items():
        w = model.get_parameter(name).detach()
        value = plain_waterfill(w, torch.stack([moment_of(x.detach()) for x in uses]).mean(0))
        assert float(waterfill.bits(ids, [name]).detach()) == pytest.approx(value, abs=1e-9)
        total, count = total + w.numel() * value, count + w.numel()
    assert float(waterfill.bits(ids).detach()) == pytest.approx(total / count, abs=1e-9)


@pytest.mark.parametrize("slant", [0.0, 1.0])
def test_waterfills_value_is_what_the_water_filled_quantiser_pays(slant: float) -> None:
    """Beside 0.254 bits of uniform steps (Gish & Pierce 1968), those that `export.prepare` and the coder spend at the error
    that they make, whatever the inputs' spectrum.
    """
    rows, cols = 512, 64
    basis = torch.linalg.qr(gaussian(cols, cols, seed=1)).Q
    moment = basis @ torch.diag(torch.exp2(slant * normal(cols))) @ basis.T
    w = gaussian(rows, cols) * torch.exp2(0.5 * normal(cols, seed=2))
    p = export.prepare("w", w, [export.Term(torch.ones(rows), moment)])
    writer, values = placed(p, w, export.dial_for([p], 4.5 * w.numel()), 0, 0.0)
    error = w - export.restore(export.PlanRow("w", (rows, cols), "float64", "grid"), values)
    paid = bits_of([o for o in writer.operations if o[0].size == cols]) / w.numel()
    share = float((error @ moment * error).sum() / (w @ moment * w).sum())
    moment = rate_terms.damped(moment)
    found = float(rate_terms.waterfill_bits(w, moment, rate_terms.mean_log2_cholesky(moment)))
    assert paid == pytest.approx(found + 0.5 * math.log2(1 / share) + 0.254, abs=0.06)      # 0.04 for learning its tables


def test_white_weights_on_white_inputs_pay_nothing_and_scales_do_not_matter() -> None:
    white = rate_terms.damped(torch.eye(7, dtype=torch.float64))
    w = torch.linalg.qr(normal(7, 7)).Q
    assert float(rate_terms.waterfill_bits(w, white, rate_terms.mean_log2_cholesky(white))) == pytest.approx(0, abs=1e-9)
    x, w = normal(50, 7) * torch.arange(1, 8), normal(5, 7)
    values = []
    for gain, size in ((1.0, 1.0), (1e-4, 1.0), (1.0, 1e-4), (300.0, 70.0)):
        moment = rate_terms.damped(rate_terms.second_moment([size * x]))
        values.append(float(rate_terms.waterfill_bits(gain * w, moment, rate_terms.mean_log2_cholesky(moment))))
    assert values == pytest.approx([values[0]] * 4, abs=1e-8)


PROBED = ["tok_emb.weight", "blocks.0.attn.c_k.weight", "blocks.0.mlp.fc.weight", "blocks.0.attn_scale", "skip_weights",
          "blocks.1.mlp.proj.weight", "blocks.1.attn.q_gain"]


@pytest.mark.parametrize("only", [None, ["blocks.1.mlp.proj.weight"]])
def test_waterfills_gradient_is_that_of_the_batch_through_weights_and_activations(only: list[str] | None) -> None:
    model, ids = double_model(num_layers=2), ids_of()
    params = dict(model.named_parameters())

    def value() -> Tensor:
        return Waterfill(model, CPU, 0.0).bits(ids, only)

    found = torch.autograd.grad(value(), [params[name] for name in PROBED])
    for name, whole in zip(PROBED, found, strict=True):
        flat, probes = params[name].detach().view(-1), [0, params[name].numel() // 2, params[name].numel() - 1]
        wanted = []
        for i in probes:
            kept, ends = float(flat[i]), []
            for sign in (1, -1):
                flat[i] = kept + sign * 1e-5
                ends.append(float(value().detach()))
            flat[i] = kept
            wanted.append((ends[0] - ends[1]) / 2e-5)
        assert whole.view(-1)[probes].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        assert float(whole.abs().max()) > 1e-6


def test_the_running_value_has_the_batchs_gradient() -> None:
    """After two batches H = (decay a + b) / (decay + 1), and its gradient is that of b alone, whole."""
    model, name, decay = double_model(num_layers=2), "blocks.0.mlp.proj.weight", 0.5
    a, b = fixed_batch(1, 61)[0], fixed_batch(2, 61)[0]
    fc, w = model.get_parameter("blocks.0.mlp.fc.weight"), model.get_parameter(name)
    waterfill = Waterfill(model, CPU, decay)
    waterfill.bits(a)
    value = waterfill.bits(b, [name])
    first, second = (rate_terms.second_moment(Waterfill(model, CPU, 0).inputs(ids)[name]) for ids in (a, b))
    running = (decay * first + second).detach() / (decay + 1)
    assert float(value.detach()) == pytest.approx(plain_waterfill(w.detach(), running), abs=1e-9)
    damped = rate_terms.damped(running).requires_grad_()
    slope = torch.autograd.grad(rate_terms.waterfill_bits(w, damped, rate_terms.mean_log2_cholesky(damped)), damped)[0]
    slope = slope + 0.01 * slope.trace() / len(slope) * torch.eye(len(slope), dtype=torch.float64)
    wanted = torch.autograd.grad((slope * second).sum(), fc)[0]
    assert torch.allclose(torch.autograd.grad(value, fc)[0], wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("zeroed", ["blocks.0.attn.proj.weight", "blocks.0.mlp.fc.weight", "tok_emb.weight"])
def test_zero_matrices_and_dead_inputs_leave_value_and_gradients_finite(zeroed: str) -> None:
    """Zeros of mlp.fc make all inputs of mlp.proj zero; of the embedding, those of the first block."""
    model = noisy_model()
    with torch.no_grad():
        model.get_parameter(zeroed).zero_()
    value = Waterfill(model, CPU, 0.9).bits(ids_of())
    assert bool(value.isfinite())
    for g in torch.autograd.grad(value, list(model.parameters()), allow_unused=True):
        assert g is None or bool(g.isfinite().all())


def test_bfloat16_gives_nearly_the_same_value_and_gradients_of_the_weights_own_types() -> None:
    exact = float(Waterfill(noisy_model(), CPU, 0.0).bits(ids_of()).detach())
    model = noisy_model()
    model.tok_emb.to(torch.bfloat16)
    value = Waterfill(model, CPU_BF16, 0.0).bits(ids_of())
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(exact, abs=0.02)
    for g in torch.autograd.grad(value, [model.tok_emb.weight, model.blocks[0].mlp.fc.weight]):
        assert bool(g.isfinite().all())
    w, u = model.tok_emb.weight.detach(), torch.zeros(model.tok_emb.weight.shape)
    lists = PriceList.histograms({"w": (w / 0.1).round().long()})
    for term in (lambda t: backslash_bits(t, fit_shape(t), 0.5), lambda t: soft_entropy_bits(t, u), lists["w"].bits):
        assert term(w / 0.1).dtype == torch.float32
        assert finite(term, w / 0.1).dtype == torch.bfloat16


def test_a_pass_leaves_hooks_gradients_weights_and_the_generator_alone() -> None:
    model, before = noisy_model(), torch.get_rng_state()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    waterfill = Waterfill(model, CPU, 0.9)
    with pytest.raises(IndexError):
        waterfill.bits(torch.full((1, 4), 10**6))
    waterfill.bits(ids_of())
    x = uneven(4, 6, 2.0)
    prices = PriceList.learned({"a": x.round().long()}, {"a": level_of(x)})
    for value in (backslash_bits(x, fit_shape(x), 0.5), soft_entropy_bits(x, 0 * x), prices.bits(x, level_of(x))):
        assert bool(value.isfinite())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_model_is_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, (x, y), counter = noisy_model(num_layers=2), fixed_batch(3, 61), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    compiled(x, y).backward()
    torch.autograd.grad(Waterfill(model, CPU, 0.9).bits(x), model.tok_emb.weight)
    compiled(x, y).backward()
    assert counter.frame_count == 1


def test_a_restored_state_goes_on_as_if_nothing_had_been() -> None:
    model, batches = noisy_model(num_layers=2), [fixed_batch(i, 61)[0] for i in range(3)]
    whole = Waterfill(model, CPU, 0.8)
    for ids in batches[:2]:
        whole.bits(ids)
    other = Waterfill(model, CPU, 0.8)
    other.load({name: t.clone() for name, t in whole.state().items()})
    assert torch.equal(other.bits(batches[2]), whole.bits(batches[2]))
    assert other.state().keys() == whole.state().keys()
    assert all(torch.equal(t, whole.state()[name]) for name, t in other.state().items())


@pytest.mark.parametrize(("name", "side", "fault"), [
    ("moment.blocks.0.mlp.fc.weight", 3, r"found moment\.blocks\.0\.mlp\.fc\.weight \(3, 3\), this model has \(24, 24\)"),
    ("moment.blocks.9.mlp.fc.weight", 24, r"found moment\.blocks\.9\.mlp\.fc\.weight \(24, 24\), this model has none"),
])
def test_another_models_state_is_rejected(name: str, side: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Waterfill(noisy_model(), CPU, 0.8).load({"batches": torch.tensor(1), name: torch.eye(side)})


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_forgets_nothing_or_less_is_rejected(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay of the running covariances must be in \[0, 1\), got"):
        Waterfill(noisy_model(), CPU, decay)


# --- dual ascent ----------------------------------------------------------------------------------------------------------


def test_the_weight_grows_while_too_much_is_predicted_and_ends_at_the_target() -> None:
    """A made-up run whose bits fall with the logarithm of the weight: 3 at 0.01, a bit less for each factor of e."""
    dual = DualAscent(start=0.01, target_bits=1.5, rate=0.3)
    predicted, weights = 3.0, [dual.weight]
    for _ in range(60):
        weights.append(dual.update(predicted))
        predicted = 3.0 - math.log(weights[-1] / 0.01)
    assert weights[1] == pytest.approx(0.01 * math.exp(0.3 * 1.5))
    assert weights == sorted(weights)
    assert predicted == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize(("predicted", "weight"), [(1e9, 0.01 * 8), (-1e9, 0.01 / 4)])
def test_the_weight_stays_between_its_multiples(predicted: float, weight: float) -> None:
    dual = DualAscent(start=0.01, target_bits=2.0, rate=0.1, low=1 / 4, high=8.0)
    assert dual.update(predicted) == pytest.approx(weight)
    assert dual.update(2.0) == pytest.approx(weight)


def test_a_restored_weight_goes_on() -> None:
    first, second = (DualAscent(start=0.01, target_bits=2.0, rate=0.1) for _ in range(2))
    first.update(3.7)
    second.load(first.state())
    assert second.weight == first.weight
    assert second.update(2.5) == first.update(2.5)
