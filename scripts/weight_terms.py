"""Loss terms on the exporter's own grid: each a mean over the weights of a sample, zero where the export loses nothing.

A term is a pure function of a Sample; its value is a scalar without a batch, a rank or a step in it. Straight-through: what
the quantiser does to the weights (codes, scales, best codes) is a constant of the gradient (Bengio et al. 2013, arXiv
1308.3432). COMPRESSION_*, TERNARY_* and OUTLIER_* set their weights; scripts/objective.py samples and adds them up.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLUSTERS = 8            # levels that COMPRESSION_SCALE_REG_MODEL=cluster draws the scales of a matrix to
POWER_STEPS = 4         # power iterations for the correction of rank 1, from a start that already knows the errors
TINY = 1e-30            # keeps empty rows from dividing by zero; no weight that matters is near it


@dataclass(frozen=True)
class Sample:
    """Part of one matrix under the export of now. A slice owns a scale: a row, or a column with INT8_AXIS_MODE=col."""
    name: str
    share: float        # of the estimate of the mean over all matrices' weights
    rows: Tensor        # (slices, n) the matrix with its graph
    at: Tensor          # (columns,) which of the n columns are sampled
    step: Tensor        # (slices, 1) or (slices, n): distance of neighbouring reconstruction points
    restored: Tensor    # (slices, n) what a reader of the artifact gets

    @property
    def w(self) -> Tensor:
        """(slices, columns) the sampled weights, with their graph."""
        return self.rows[:, self.at]

    @property
    def steps(self) -> Tensor:
        """(slices, 1) or (slices, columns)."""
        return self.step if self.step.shape[1] == 1 else self.step[:, self.at]

    @property
    def power(self) -> Tensor:
        """(slices, 1) mean square of whole slices, without graph: the row's variance, its mean being zero to 1 %."""
        return self.rows.detach().square().mean(1, keepdim=True).clamp_min(TINY)


def reconstruction(sample: Sample) -> Tensor:
    """COMPRESSION_REG_WEIGHT: mean squared error of the export, in units of the row's variance."""
    error = sample.w - sample.restored[:, sample.at]
    return (error.square() / sample.power).mean()


def grid_distance(sample: Sample) -> Tensor:
    """COMPRESSION_GRID_REG_WEIGHT: mean of sin^2(pi w / step): 0 on the grid, 1 half a step off it, 1/2 where weights are
    spread evenly; smooth, so that a weight half-way feels no jump.
    """
    return torch.sin(torch.pi * sample.w / sample.steps).square().mean()


def log_scales(sample: Sample) -> Tensor:
    """(slices,) log2 of what sets each slice's scale, with its graph: the largest weight where the step is the slice's, and
    its root mean square where steps follow the loss.
    """
    if sample.step.shape[1] == 1:
        return sample.rows.abs().amax(1).clamp_min(TINY).log2()
    return 0.5 * sample.rows.square().mean(1).clamp_min(TINY).log2()


def scale_smoothness(sample: Sample) -> Tensor:
    """COMPRESSION_SCALE_REG_WEIGHT: mean squared difference of neighbouring scales, in octaves^2: what a coder pays that
    predicts each from the one before.
    """
    scales = log_scales(sample)
    return scales.diff().square().mean() if len(scales) > 1 else scales.sum() * 0


def scale_clusters(sample: Sample) -> Tensor:
    """The same weight with COMPRESSION_SCALE_REG_MODEL=cluster: mean squared distance of scales to the nearest of CLUSTERS
    levels, their quantiles, in octaves^2.
    """
    scales = log_scales(sample)
    marks = (torch.arange(CLUSTERS, device=scales.device) + 0.5) / CLUSTERS
    levels = scales.detach().quantile(marks.to(scales.dtype))
    return (scales[:, None] - levels).square().amin(1).mean()


def beyond_rank_one(sample: Sample) -> Tensor:
    """COMPRESSION_RANK1_REG_WEIGHT: mean squared error that is left once the best correction of rank 1 is added, in units of
    the row's variance (Eckart & Young 1936; the correction is what INT8_RESIDUAL_RANK=1 stores).
    """
    error = sample.rows.detach() - sample.restored
    b = error.square().sum(0).sqrt() + TINY
    for _ in range(POWER_STEPS):
        a = error @ b
        b = error.T @ (a / a.norm().clamp_min(TINY))
    a = error @ b / b.square().sum().clamp_min(TINY)
    left = sample.w - (sample.restored + a[:, None] * b)[:, sample.at]
    return (left.square() / sample.power).mean()


def best_ternary(rows: Tensor) -> Tensor:
    """The nearest of {-s, 0, s} to each row with the best s for it, (rows, n): keeping the k largest gains
    (sum of them)^2 / k (Li et al. 2016, arXiv 1605.04711, equation 6; solved exactly by sorting).
    """
    sizes = rows.abs().sort(1, descending=True).values
    counts = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype)
    sums = sizes.cumsum(1)
    k = (sums.square() / counts).argmax(1, keepdim=True)
    scale, least = sums.gather(1, k) / (k + 1), sizes.gather(1, k)
    return scale * rows.sign() * (rows.abs() >= least)


def ternary_distance(sample: Sample, group: int = 0) -> Tensor:
    """TERNARY_REG_WEIGHT: mean squared distance to the best ternary code of each row, or with TERNARY_REG_GROUP of each so
    many weights of it, in units of the row's variance. A Gaussian row has 0.19.
    """
    rows = sample.rows.detach()
    width = rows.shape[1]
    group = min(group or width, width)
    whole = width // group * group
    parts = [best_ternary(rows[:, :whole].reshape(-1, group)).view(-1, whole)]
    if whole < width:
        parts.append(best_ternary(rows[:, whole:]))
    return ((sample.w - torch.cat(parts, 1)[:, sample.at]).square() / sample.power).mean()


def outlier_excess(sample: Sample, sigmas: float = 4.0) -> Tensor:
    """OUTLIER_REG_WEIGHT: mean squared excess of |w| over OUTLIER_REG_SIGMAS root mean squares of its row, in units of the
    row's variance. A Gaussian row has 6e-6 at 4.
    """
    spread = sample.power.sqrt()
    return ((sample.w.abs() / spread - sigmas).clamp_min(0).square()).mean()
