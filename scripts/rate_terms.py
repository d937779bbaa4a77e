"""What an exporter will pay for weights, in bits a weight, as terms of a training loss (RATE_REG_WEIGHT, RATE_REG_MODEL).

    backslash_bits(x, fit_shape(x), eps=0.5)            # a fitted generalised Gaussian
    soft_entropy_bits(x, u)                             # one histogram, u uniform in (-1/2, 1/2)
    PriceList.learned(positions, levels).bits(x, level) # the tables of the rd coder
    PriceList.histograms(positions)[name].bits(x)       # those of the int8 coder
    Waterfill(model, rt, decay=0.9).bits(ids)           # what the water-filled quantiser needs at a fixed error

x is always weights / export step, the step without gradient. In units of the weights themselves a term would be a penalty on
scale, which an exporter whose step follows the weights cancels: Q(g W) = Q(W). Every value is a scalar, the mean over all
weights given, in float32 (float64 if x is). Nothing here draws a random number, and histograms are counted in integers,
whose sum knows no order: ranks that hold the same weights get the same values and gradients (but see Waterfill).
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import export
import train_gpt

LEAST, MOST = 0.1, 3.0      # shapes nu of a generalised Gaussian, those of BackSlash; 1 = Laplace, 2 = Gauss
TINY = 1e-30                # keeps logarithms of zeros finite in float32, far below any weight's square


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ----------------------------------------------------------------------------------------------------------------------
# BackSlash: a generalised Gaussian fitted to the weights.
# ----------------------------------------------------------------------------------------------------------------------


def moment_ratio(nu: float) -> float:
    """E x^2 / (E |x|)^2 of a generalised Gaussian, which falls with nu: 2 for Laplace, pi / 2 for Gauss."""
    return math.exp(math.lgamma(1 / nu) + math.lgamma(3 / nu) - 2 * math.lgamma(2 / nu))


def fit_shape(x: Tensor) -> float:
    """The shape nu in [0.1, 3] whose moment ratio is that of x, as BackSlash estimates it (Wu, Wen & Han 2025, arXiv
    2504.16968); 2 for zeros, which say nothing. Waits for the device: not for every update.
    """
    sizes = wide(x.detach()).abs()
    mean, square = torch.stack((sizes.mean(), sizes.square().mean())).tolist()
    if not mean:
        return 2.0
    low, high = LEAST, MOST
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if moment_ratio(middle) > square / mean**2 else (low, middle)
    return high


def backslash_bits(x: Tensor, nu: float, eps: float) -> Tensor:
    """Mean of -log2 p(|x| + eps) under p(t) = exp(-(|t| / alpha)^nu) / (2 alpha Gamma(1 + 1/nu)) with the likeliest alpha,
    alpha^nu = nu mean (|x| + eps)^nu. There the value has no slope in alpha, so the gradient is that of (|x| + eps)^nu
    alone, BackSlash's update lambda nu (|x| + eps)^(nu - 1) sign(x) (arXiv 2504.16968) times what makes it bits.

    At eps = 0 and many bits it is the entropy of round(x); it knows no rounding and falls below zero for x far below 1.
    """
    sizes = (wide(x).abs() + eps).clamp_min(TINY)       # at 0 without eps, nu < 1 has no gradient
    unit = sizes.detach().mean()                        # for powers that neither overflow nor vanish
    log2_alpha = unit.log2() + (nu * (sizes / unit).pow(nu).mean()).log2() / nu
    return log2_alpha + 1 + (1 / nu + math.lgamma(1 + 1 / nu)) / math.log(2)


# ----------------------------------------------------------------------------------------------------------------------
# Prices between integers, and the histogram's.
# ----------------------------------------------------------------------------------------------------------------------

COUNT_BITS = 32                 # a weight counts as 2^32, shared between two bins
LEAST_SHARE = 2.0**-64          # of a histogram's bin that is empty; a weight between bins has some share in both


def neighbours(z: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The entries of a table on both sides of z, int64: one of them twice where z is an integer, the last two beyond the
    end.
    """
    return z.detach().floor().clamp(0, size - 2).long(), z.detach().ceil().clamp(1, size - 1).long()


def interpolated(table: Tensor, z: Tensor, row: Tensor | int = 0) -> Tensor:
    """table (rows, size) at row and z, linear between entries and beyond the last two as between them. Where z is an integer
    two slopes meet and the gradient is 0, so that a weight of zero stays there.
    """
    size = table.shape[1]
    low, high = neighbours(z, size)
    first, second = table.take(row * size + low), table.take(row * size + high)
    return first + (z - low) * (second - first)


def soft_entropy_bits(x: Tensor, u: Tensor) -> Tensor:
    """Entropy of the histogram of y = x + u over the integers -127..127, y beyond them counted at the last and a y between
    two in both by its distance: noise for rounding (Balle et al. 2017, arXiv 1611.01704, section 3) and soft assignment
    (Agustsson et al. 2017, arXiv 1704.00648), with u of the shape of x, uniform in (-1/2, 1/2) or zero.

    Each y pays -log2 p, interpolated between the integers: the mean is the entropy itself. The gradient is the price's slope
    in y. It passes by p, exactly: what sum p log p gains through the logarithm by a change of p is sum dp = 0.
    Noise and kernel widen the histogram from a variance of s^2 + 1/12 to s^2 + 1/4, so the value is above the entropy of
    round(x): for Gaussian x by 0.02 bits at 3.3 bits and 0.23 at 1.5; with u = 0 by half of that.
    """
    size = 2 * export.MAX_CODE + 1
    z = ((wide(x) + u).clamp(-export.MAX_CODE, export.MAX_CODE) + export.MAX_CODE).flatten()
    with torch.no_grad():
        low, high = neighbours(z, size)
        shares = ((z - low) * 2**COUNT_BITS).long()
        counts = torch.zeros(size, dtype=torch.int64, device=z.device)
        counts.scatter_add_(0, high, shares).scatter_add_(0, low, 2**COUNT_BITS - shares)
        prices = -(counts.to(z.dtype) / (z.numel() * 2.0**COUNT_BITS)).clamp_min(LEAST_SHARE).log2()
    return interpolated(prices[None], z).mean()


# ----------------------------------------------------------------------------------------------------------------------
# The coder's own tables.
# ----------------------------------------------------------------------------------------------------------------------


class PriceList:
    """Bits of integers by context, as a coder that has seen them would charge, and between the integers by interpolation.

    `table` (contexts, symbols + 2) and `widths` (contexts,), the integers that share a symbol, are the whole of it.
    """

    def __init__(self, table: Tensor, widths: Tensor):
        self.table, self.widths = table, widths

    @classmethod
    def learned(cls, positions: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> PriceList:
        """Prices of the rd coder without a trellis, after all these matrices of integers; `levels` (broadcastable to each)
        are log2 of the expected magnitude in steps: log2 of the product of row and column means of |w| / step.
        """
        assert positions.keys() == levels.keys(), "levels are of other matrices"
        model, device = export.SymbolModel(0), next(iter(positions.values())).device
        raw_bits = torch.from_numpy(export.shifts(0)).to(device)
        counts = torch.zeros(model.counts.size, dtype=torch.int64, device=device)
        for name, q in positions.items():       # on the device: all weights of a model take a second elsewhere
            bucket = bucket_of(levels[name]).expand(q.shape)
            high = q.long() >> raw_bits[bucket]
            symbol = torch.where(high.abs() <= export.REACH, high + export.REACH, export.ESCAPE)
            counts += torch.bincount((2 * bucket * export.SYMBOLS + symbol).flatten(), minlength=counts.numel())
        model.counts += export.COUNT * counts.cpu().numpy().reshape(model.counts.shape)
        model.refresh()
        held = model.share.reshape(export.BUCKETS, 2, export.SYMBOLS)[:, 0, :export.ESCAPE] > 0
        rows = [continued(*row) for row in zip(model.prices()[:, 0, :export.ESCAPE], held, strict=True)]
        return cls(torch.tensor(np.array(rows), dtype=torch.float32, device=device), (2.0**raw_bits).float())

    @classmethod
    def histograms(cls, positions: Mapping[str, Tensor]) -> dict[str, PriceList]:
        """Prices of the int8 coder, a list of one context for each tensor: deflate spends its Huffman codes on each tensor
        alone, and they cost about its entropy. Counts start at one.
        """
        lists, most = {}, export.MAX_CODE
        for name, q in positions.items():
            counts = torch.bincount((q.long().clamp(-most, most) + most).flatten(), minlength=2 * most + 1).cpu().numpy()
            prices = math.log2(counts.sum() + counts.size) - np.log2(counts + 1)
            table = torch.tensor(continued(prices, counts > 0)[None], dtype=torch.float32, device=q.device)
            lists[name] = cls(table, torch.ones(1, device=q.device))
        return lists

    def bits(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """Mean price of x (weights in steps); `level` as in `learned`, broadcastable to x, and none for a histogram. Beyond
        what a file can say the steps are out of date, and there is no gradient.
        """
        context = 0 if level is None else bucket_of(level)
        width = self.widths[context]
        middle = (self.table.shape[1] - 1) // 2
        aim = wide(x).clamp(-export.MAX_AIM, export.MAX_AIM)
        z = (aim - (width - 1) / 2) / width + middle        # from the middle of the integers that share a symbol
        return interpolated(self.table, z, context).mean()


def bucket_of(level: Tensor) -> Tensor:
    """The coder's context of an expected magnitude 2^level, int64."""
    return (4 * (level.detach() - export.LOWEST_OCTAVE)).floor().clamp(0, export.BUCKETS - 1).long()


def continued(prices: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Prices (symbols,) with one more at each end. Symbols that nobody holds cost the same wherever they are, which pulls no
    weight back: they are priced by a line through those at their sides, or beyond the outermost by the mean slope from the
    cheapest to there, because the last difference between two rare symbols is chance. Where all are alike nothing is known
    of others, and nothing pulls: a matrix that starts as zeros must leave them.
    """
    cheapest = int(np.where(held, prices, np.inf).argmin())
    if held.sum() < 2:
        return np.full(prices.size + 2, prices[cheapest])
    held = held.copy()
    held[max(cheapest - 1, 0):cheapest + 2] = True      # a slope on both sides of the cheapest
    known, symbols = np.flatnonzero(held), np.arange(-1, prices.size + 1)
    found = np.interp(symbols, known, prices[known])
    for end, beyond in ((known[0], known[0] - symbols), (known[-1], symbols - known[-1])):
        found += (prices[end] - prices[cheapest]) / max(abs(end - cheapest), 1) * np.maximum(beyond, 0)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Water-filling: what the anisotropy of the inputs costs.
# ----------------------------------------------------------------------------------------------------------------------


def second_moment(inputs: Sequence[Tensor]) -> Tensor:
    """Mean of x x^T, (in, in), over the tokens of all uses (..., in) of a matrix."""
    uses = [wide(x).flatten(0, -2) for x in inputs]
    return sum((x.T @ x for x in uses), uses[0].new_zeros(())) / sum(map(len, uses))


def damped(moment: Tensor) -> Tensor:
    """By a share of the mean square input, as the exporter's statistics: dead inputs are not free."""
    added = export.DAMPING * moment.diagonal().mean() + TINY
    return moment + added * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def mean_log2_cholesky(moment: Tensor) -> Tensor:
    """Mean over j of log2 L_jj^2, moment = L L^T: log2 of the determinant, a dimension. Does not wait for the device."""
    factor = torch.linalg.cholesky_ex(moment, check_errors=False).L
    return 2 * factor.diagonal().log2().mean()


def waterfill_bits(w: Tensor, moment: Tensor, mean_log2: Tensor) -> Tensor:
    """Bits a weight of w (out, in) with steps proportional to 1 / L_jj where the error at the output has the power of the
    output, and 0.5 log2(1 / share) more where it has a share of it. With H = L L^T and s_j = mean_i w_ij^2 that is
    mean_j 0.5 log2(s_j L_jj^2) - 0.5 log2(mean_i w_i H w_i^T / in): reverse water-filling, the rate of WaterSIC (Lifar et
    al. 2026, arXiv 2603.04956). White weights on white inputs pay 0.

    The second part makes it the same for g w and for inputs g x. Every matrix stands between normalisations or gains, so
    with an error fixed in units of its own the term would be a penalty on scale, which the network undoes.
    """
    matrix = wide(w)
    gram = matrix.T @ matrix / len(matrix)
    power = (moment * gram).sum() / len(gram)
    return 0.5 * ((gram.diagonal() + TINY).log2().mean() + mean_log2 - (power + TINY).log2())


class Waterfill:
    """`waterfill_bits` of a model's matrices, whose inputs' covariances H are running means over the batches seen. H enters
    with the running value and the batch's gradient, and so reaches all weights before it in the network.

    Matrices are the linear layers', and the token embedding where it is tied: its inputs are the head's. Of a factorised
    head the projection is priced by its use on the way in. An embedding that is only looked up has no inputs.

    Ranks that give the same ids get the same values. Their gradients through attention may differ in the last bit on CUDA,
    where its backward pass adds in any order: average them before a step.
    """

    def __init__(self, model: train_gpt.GPT, rt: train_gpt.Runtime, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay of the running covariances must be in [0, 1), got {decay}")
        self.model, self.rt, self.decay = model, rt, decay
        self.layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, train_gpt.CastedLinear)}
        self.names = (*self.layers, *(["tok_emb.weight"] if model.lm_head is None else []))
        self.moments: dict[str, Tensor] = {}    # of the matrices that share their inputs, by the first of them
        self.batches = 0

    def inputs(self, ids: Tensor) -> dict[str, list[Tensor]]:
        """The inputs (..., in) of each matrix in one forward pass, with their graph; several where a block is shared."""
        found: dict[str, list[Tensor]] = {}

        def watch(name: str, layer: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
            return layer.register_forward_pre_hook(lambda _, args: found.setdefault(name, []).append(args[0]))

        handles = [watch(name, layer) for name, layer in self.layers.items()]
        try:
            with self.rt.autocast():
                x = self.model.features(ids)
                if self.model.lm_head is None and self.model.embed_proj is not None:
                    x = F.linear(x, self.model.embed_proj.weight.t().to(x.dtype))
        finally:
            for handle in handles:
                handle.remove()
        return found | {"tok_emb.weight" if self.model.lm_head is None else "lm_head.weight": [x]}

    def bits(self, ids: Tensor, only: Sequence[str] | None = None) -> Tensor:
        """Mean over the weights of the matrices (of `only` some of self.names), after one forward pass over ids (B, T) that
        updates the covariances of all. The caller takes torch.autograd.grad of it.
        """
        wanted = self.names if only is None else only
        assert set(wanted) <= set(self.names), f"not among the matrices with inputs: {set(wanted) - set(self.names)}"
        inputs, weights = self.inputs(ids), dict(self.model.named_parameters())
        first: dict[tuple[int, ...], str] = {}
        owner = {name: first.setdefault(tuple(map(id, uses)), name) for name, uses in inputs.items()}
        moments = self.observe({name: inputs[name] for name in first.values()})
        factored = {name: mean_log2_cholesky(moments[name]) for name in dict.fromkeys(owner[name] for name in wanted)}
        total = sum((weights[name].numel() * waterfill_bits(weights[name], moments[owner[name]], factored[owner[name]])
                     for name in wanted), torch.zeros((), device=ids.device))
        return total / sum(weights[name].numel() for name in wanted)

    def observe(self, inputs: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Takes one batch into the running means; returns them, damped, with the batch's gradient."""
        self.batches += 1
        share = (1 - self.decay) / (1 - self.decay**self.batches)       # the newest's; the first batch starts the mean
        found = {}
        for name, uses in inputs.items():
            batch = second_moment(uses)
            now = batch.detach()
            self.moments[name] = torch.lerp(self.moments.get(name, now), now, share)
            found[name] = damped(self.moments[name] + (batch - now))
        return found

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"batches": torch.tensor(self.batches), **{f"moment.{name}": t for name, t in self.moments.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave. Raises ValueError where that was another model's."""
        widths = {f"moment.{name}": self.model.get_parameter(name).shape[1] for name in self.names}
        found = {name: tuple(t.shape) for name, t in tensors.items() if name != "batches"}
        for name, shape in found.items():
            if name not in widths or shape != (widths[name], widths[name]):
                raise ValueError(f"running covariances: found {name} {shape}, this model has "
                                 f"{(widths[name], widths[name]) if name in widths else 'none of that name'}")
        self.batches = int(tensors["batches"])
        self.moments = {name.removeprefix("moment."): tensors[name].to(self.rt.device) for name in found}


# ----------------------------------------------------------------------------------------------------------------------
# The weight that a target asks for.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class DualAscent:
    """The weight of a rate term that a run's predicted bits a weight follow to a target (RATE_TARGET_BITS): multiplied by
    exp(rate x (predicted - target)) at each update, between `low` and `high` multiples of the start.
    """
    start: float
    target_bits: float
    rate: float
    low: float = 1 / 64
    high: float = 64.0
    log_multiple: float = field(default=0.0, init=False)

    @property
    def weight(self) -> float:
        return self.start * math.exp(self.log_multiple)

    def update(self, predicted_bits: float) -> float:
        """The new weight."""
        assert math.isfinite(predicted_bits), predicted_bits
        moved = self.log_multiple + self.rate * (predicted_bits - self.target_bits)
        self.log_multiple = min(max(moved, math.log(self.low)), math.log(self.high))
        return self.weight

    def state(self) -> dict[str, float]:
        return {"log_multiple": self.log_multiple}

    def load(self, state: Mapping[str, float]) -> None:
        self.log_multiple = float(state["log_multiple"])
