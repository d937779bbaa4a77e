"""MUON_VARIANT=numuon: Muon with updates of limited rank.

    MUON_VARIANT=numuon NUMUON_RANK_FRAC_FINAL=0.25 python train_gpt.py

NuMuon (Dolatabadi et al. 2026, arXiv 2603.03597) steps by the first k singular directions of the momentum, U_k V_k^T, where
Muon takes all of them: the best step within a ball of the nuclear norm beside Muon's of the spectral norm. k falls over the
run, from full rank, where Newton-Schulz does the work as in Muon, to NUMUON_RANK_FRAC_FINAL of it. There is no Nesterov look
ahead. The buffer is Muon's, b <- momentum b + gradient; the paper's average is (1 - momentum) b, of the same singular
vectors, while the momentum stays.

The directions come from randomised block Krylov iteration (Musco & Musco 2015, arXiv 1504.05477), started from those of the
step before, so that two products with the Gram matrix suffice. QR is Householder's: after a good start the second block adds
next to nothing to the first, where Cholesky's breaks down. The small eigenproblem is solved in float64, whose squares keep
float32's digits. This part is not compiled: k changes, and its time goes into factorisations that a compiler leaves alone.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from train_gpt import Config, Muon

RANK_FALLS_UNTIL = 0.8      # share of the run; the final rank holds from there
OVERSAMPLING = 8            # directions carried along beyond the k that are used
BLOCKS = 2                  # of the Krylov space


class NuMuon(Muon):
    """Muon with updates whose rank falls over the run; `right` of a matrix's state are the directions to start from."""

    def __init__(self, cfg: Config, *given: Any):
        super().__init__(*given)
        self.cfg = cfg

    def update(self, p: Tensor, momentum: Tensor) -> Tensor:
        full = min(p.shape)
        share = rank_fraction(self.cfg, self.param_groups[0]["progress"])
        rank = max(1, math.ceil(share * full - 1e-9))       # 0.7 of 10 is 7, not the 8 that rounding makes of it
        if rank == full:
            return self.orthogonalise(momentum, self.backend_steps, self.dtype)
        g = momentum if p.size(0) <= p.size(1) else momentum.T
        start = starting_block(self.state[p].get("right"), g, min(rank + OVERSAMPLING, full), self.cfg.seed)
        left, right, self.state[p]["right"] = leading_directions(g, start, rank)
        return left @ right.T if g is momentum else right @ left.T


def rank_fraction(cfg: Config, progress: float) -> float:
    """Share of full rank when a share `progress` of the run is done: 1 until NUMUON_HOLD_FRAC, then falling to the last."""
    done = (progress - cfg.numuon_hold_frac) / (RANK_FALLS_UNTIL - cfg.numuon_hold_frac)
    done = min(max(done, 0.0), 1.0)
    fallen = (1 - math.cos(math.pi * done)) / 2 if cfg.numuon_rank_schedule == "cosine" else done
    return 1 - fallen * (1 - cfg.numuon_rank_frac_final)


def starting_block(before: Tensor | None, g: Tensor, width: int, seed: int) -> Tensor:
    """(cols, width): the first directions of the step before, random ones where it had fewer."""
    if before is None or before.size(1) < width:
        drawn = torch.randn(g.size(1), width, generator=torch.Generator().manual_seed(seed)).to(g.device)
        before = drawn if before is None else torch.cat([before, drawn[:, before.size(1):]], 1)
    return before[:, :width]


def leading_directions(g: Tensor, start: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors of g (rows, cols), rows <= cols: left (rows, rank), right (cols, rank), and right ones as many as
    `start` (cols, width) has, to start the next search from. Directions of singular values that float32 cannot tell from
    zero count as absent: they are zero, and next time's start keeps this one's.
    """
    a = g / (g.norm() + 1e-30)      # the powers of singular values below stay in range
    rows, width = a.size(0), start.size(1)
    if BLOCKS * width < rows:
        blocks = [a @ start]
        for _ in range(BLOCKS - 1):
            blocks.append(a @ (a.T @ blocks[-1]))
        basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    else:
        basis = torch.eye(rows, device=a.device)    # the Krylov space is everything
    projected = (basis.T @ a).double()
    values, vectors = torch.linalg.eigh(projected @ projected.T)                    # ascending
    values, vectors = values.flip(0)[:width].clamp_min(0).sqrt(), vectors.flip(1)[:, :width]
    present = values > values[0] * max(g.shape) * torch.finfo(torch.float32).eps
    left = (basis @ vectors.float()) * present
    right = (projected.T @ vectors / values.clamp_min(1e-30)).float()
    following = torch.where(present, right, start).contiguous()
    return left[:, :rank], right[:, :rank] * present[:rank], following
