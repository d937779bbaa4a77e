"""What the loss of a run has beside the cross-entropy: terms on the exporter's own grid, a rate in bits, noise of the step
of the export, and a last phase trained through its rounding. The trainer loads this when a knob of group Objective asks.

Once per update, for all micro-batches and ranks together: `before` puts weights as the export would have them in place
(noise, rounding) and `after` puts the weights themselves back and adds the gradients of the terms, taken there. Weights are
equal on all ranks and every draw is seeded by SEED and step, so terms are too, whatever the world size; the compiled graph
never changes, because what it reads does. An evaluation every COMPRESSION_REG_INTERVAL steps counts for all of them.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial

import numpy as np
import torch
from torch import Tensor

import export
import rate_terms
import weight_terms
from calibration import batch_start, statistics_now
from finishing import Freezing, Rounding, from_rank_zero
from train_gpt import Config, Job, Runtime
from weight_terms import TINY, Sample

GRID_TOKENS = 16_384        # that rd's steps are learned from under way; the last export has CALIBRATION_TOKENS
PROBE_SHARE = 64            # a probe of the inputs' covariance takes so small a part of a batch ...
PROBE_TOKENS = 4096         # ... and at most so many tokens
PROBE_DECAY = 0.95          # of the running covariance, a probe
DUAL_RATE = 0.1             # growth of log RATE_REG_WEIGHT for each bit above the target, an evaluation
NAME = "objective."         # of its tensors in a checkpoint


def terms_of(cfg: Config) -> list[tuple[str, float, Callable[[Sample], Tensor]]]:
    """(name in logs, weight, function) of the terms that are on, the rate excepted."""
    smooth = cfg.compression_scale_reg_model == "smooth"
    found = (
        ("reconstruction", cfg.compression_reg_weight, weight_terms.reconstruction),
        ("grid", cfg.compression_grid_reg_weight, weight_terms.grid_distance),
        ("scale", cfg.compression_scale_reg_weight,
         weight_terms.scale_smoothness if smooth else weight_terms.scale_clusters),
        ("rank1", cfg.compression_rank1_reg_weight, weight_terms.beyond_rank_one),
        ("ternary", cfg.ternary_reg_weight, partial(weight_terms.ternary_distance, group=cfg.ternary_reg_group)),
        ("outlier", cfg.outlier_reg_weight, partial(weight_terms.outlier_excess, sigmas=cfg.outlier_reg_sigmas)),
    )
    return [term for term in found if term[1]]


@dataclass
class Grid:
    """rd's grid of one matrix (out, in) as `export.prepare` and the dial lay it out."""
    rows: Tensor        # (out, 1) steps of rows
    cols: Tensor        # (1, in) steps of columns
    level: Tensor       # (out, in) log2 of the expected |weight| in steps, as the coder's contexts start from

    @property
    def step(self) -> Tensor:
        return self.rows * self.cols

    def noise_step(self, factor: float) -> Tensor:
        """So many times the step, and no more error than the weights themselves, which is what rounding to zero makes
        (reverse water-filling; Cover & Thomas 2006, section 10.3.3).
        """
        rms = self.step * torch.exp2(self.level) * (np.pi / 2) ** 0.5       # of a Gaussian with this mean magnitude
        return torch.minimum(self.step * factor, rms * 12**0.5)


def water_filled(job: Job, names: list[str]) -> dict[str, Grid]:
    """The grids that an export of now would choose, from the training tokens of the step under way."""
    cfg = job.cfg
    known = statistics_now(job, GRID_TOKENS)
    state = {name: t.detach().float().cpu() for name, t in job.model.state_dict().items()}
    prepared = export.in_threads(lambda name: export.prepare(name, state[name], known.terms[name]), names)
    weights, small = sum(t.numel() for t in state.values()), sum(t.numel() for n, t in state.items() if n not in names)
    _, aim, _ = export.rd_budget(cfg.export_options, weights, 0)
    sides = sum(sum(state[name].shape) for name in names)
    dial = export.dial_for(prepared, 8 * (aim - small - sides / 2))     # small tensors and steps measured: about so many
    return {p.name: grid_of(p, dial, job.rt.device) for p in prepared}


def agreed(rt: Runtime, make: Callable[[], dict[str, Grid]]) -> dict[str, Grid]:
    """The grids that rank 0 makes, on every rank: sums of two GPUs may differ in the last bit, and steps are rounded."""
    sent = from_rank_zero(rt, lambda: {
        f"{name}/{part}": t for name, grid in make().items() for part, t in vars(grid).items()})
    names = dict.fromkeys(key.rsplit("/", 1)[0] for key in sent)
    return {name: Grid(*(sent[f"{name}/{part}"].to(rt.device) for part in ("rows", "cols", "level"))) for name in names}


def order0_bits(codes: Tensor) -> Tensor:
    """Entropy of a matrix's integers, bits each: what a Huffman code of its own takes, within a percent."""
    counts = torch.bincount((codes.long() + export.MAX_CODE).flatten(), minlength=2 * export.MAX_CODE + 1)
    shares = counts / counts.sum()
    return torch.special.entr(shares).sum() / np.log(2)


def grid_of(p: export.Prepared, dial: float, device: torch.device) -> Grid:
    rows = export.steps(p.row_steps).astype(np.float64)
    cols = np.empty(len(p.order))
    cols[p.order] = np.exp2(p.log_steps + dial)
    sizes = np.abs(p.columns.T[:, np.argsort(p.order)]) / rows[:, None] / cols
    usual = np.maximum(sizes.mean(0), TINY)
    level = np.log2(usual) + np.log2(np.maximum((sizes / usual).mean(1), TINY))[:, None]
    return Grid(*(torch.from_numpy(a).float().to(device) for a in (rows[:, None], cols[None, :], level)))


class Objective:
    """The terms of one run, and what they know of the export."""

    def __init__(self, job: Job):
        cfg = job.cfg
        self.cfg, self.rd, self.terms = cfg, cfg.export_scheme == "rd", terms_of(cfg)
        self.options = cfg.export_options
        named = dict(job.model.named_parameters())
        self.choices = {name: export.storage(name, p.shape, "float32", self.options) for name, p in named.items()}
        own = export.matrices(export.shapes_of(named)) if self.rd else [
            name for name, p in named.items() if p.ndim == 2 and self.choices[name].codec == "int"]
        self.matrices: dict[str, Tensor] = {name: named[name] for name in sorted(own)}
        self.known = dict(self.matrices)        # without those that were all zero at the last refresh: they have no step yet
        self.last_phase = Freezing(self.matrices, self.options.tcq_states) if cfg.freezing_steps else Rounding(self.matrices)
        self.grids: dict[str, Grid] = {}
        self.noise_factor = 1.0         # from rd's steps to the noise's
        self.shape = cfg.rate_reg_nu    # of the generalised Gaussian
        self.prices: dict[str, rate_terms.PriceList] = {}       # of each matrix; rd has one list, of no name
        self.waterfill = rate_terms.Waterfill(job.model, job.rt, PROBE_DECAY) if self.rates_by("waterfill") else None
        aim = cfg.rate_target_bits
        self.dual = rate_terms.DualAscent(cfg.rate_reg_weight, aim, DUAL_RATE) if aim else None
        self.kept: dict[str, Tensor] = {}       # weights while others stand in their place
        self.values: dict[str, Tensor] = {}     # of the last evaluation
        self.due_at = 0                 # step of the next refresh
        # 1 = noise, 2 = rounding, each on the grid of its first step: noise makes idle what has coarse steps, and what is
        # idle gets coarser ones. With a new grid every 50 steps 4x128 diverged.
        self.phase = 0
        self.device = job.rt.device

    def rates_by(self, model: str) -> bool:
        return self.cfg.rate_reg_weight > 0 and self.cfg.rate_reg_model == model

    # --- around the forward passes --------------------------------------------------------------------------------------

    def before(self, job: Job) -> None:
        """Refreshes what is known of the export, and lets the step see its noise or its rounding."""
        cfg = self.cfg
        finishes = bool(cfg.finish_steps) and job.steps_left <= cfg.finish_steps
        noisy = cfg.noise_qat_step_sigmas > 0 and job.step >= cfg.noise_qat_start_frac * (job.step + job.steps_left)
        phase = 2 if finishes else int(noisy)
        on_own_grid = finishes and self.rd
        due = phase > self.phase or (job.step >= self.due_at and (not phase or len(self.known) < len(self.matrices)))
        if due and (self.terms or cfg.rate_reg_weight or (phase and not on_own_grid)):
            self.refresh(job)
        self.phase = phase
        if on_own_grid:
            self.last_phase.advance(job)
        if phase == 2:
            self.finished()
        elif phase == 1:
            generator = self.generator(job)
            self.replace(self.known, lambda name, rows: self.noisy(name, rows, generator))

    @torch.no_grad()
    def replace(self, names: Iterable[str], seen: Callable[[str, Tensor], Tensor]) -> None:
        """Puts what is made of a matrix's rows in its place, until `put_back`."""
        for name in names:
            p, axis = self.matrices[name], self.choices[name].axis
            self.kept[name] = p.detach().clone()
            p.copy_(export.as_rows(seen(name, export.as_rows(p.float(), axis)), axis))

    def finished(self) -> None:
        """The weights as the file would hold them now; those that are frozen do already."""
        if not self.rd:
            self.replace(self.known, lambda name, rows: self.quantised(name, rows)[1])
        elif isinstance(self.last_phase, Rounding):
            self.replace(self.matrices, self.last_phase.rounded)

    @torch.no_grad()
    def put_back(self) -> None:
        for name, kept in self.kept.items():
            self.matrices[name].copy_(kept)
        self.kept.clear()

    @contextmanager
    def as_finished(self) -> Iterator[None]:
        """For a validation: in the last phase, what the file would score."""
        if self.phase == 2:
            self.finished()
        try:
            yield
        finally:
            self.put_back()

    def noisy(self, name: str, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows with uniform noise: as rd lays its steps out, else of one step in each row's own spread."""
        spread = rows.square().mean(1, keepdim=True).sqrt() * self.cfg.noise_qat_step_sigmas
        step = self.grids[name].noise_step(self.noise_factor) if self.rd else spread
        return rows + step * (torch.rand(rows.shape, generator=generator, device=rows.device) - 0.5)

    def after(self, job: Job) -> None:
        """Puts the weights back and adds the gradients of the terms there."""
        self.put_back()
        if job.step % self.cfg.compression_reg_interval == 0 and (self.terms or self.cfg.rate_reg_weight):
            self.add_gradients(job)
        for name in self.last_phase.frozen:     # no gradient, and no optimiser moves it
            self.matrices[name].grad = None

    def add_gradients(self, job: Job) -> None:
        total = self.total(job) * self.cfg.compression_reg_interval * self.ramp(job.step)
        params = [p for p in job.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, g in zip(params, torch.autograd.grad(total, params, allow_unused=True), strict=True):
                if g is not None:
                    if self.waterfill is not None and self.device.type == "cuda":   # where attention sums in any order
                        g = job.rt.reduce(g) / job.rt.world_size
                    p.grad = g if p.grad is None else p.grad.add_(g)

    def finish(self, job: Job) -> Iterable[Mapping[str, export.Stored]]:
        """The matrices at the integers of the file, where a last phase places them; the clock may have cut its end off."""
        return self.last_phase.finish(job) if self.phase == 2 and self.rd else ()

    def generator(self, job: Job) -> torch.Generator:
        """Of this step, the same on every rank."""
        return torch.Generator(self.device).manual_seed((self.cfg.seed * 1_000_003 + job.step) % 2**63)

    def ramp(self, step: int) -> float:
        grown = self.cfg.compression_reg_warmup_steps
        return min(1.0, (step + 1) / grown) if grown else 1.0

    # --- the terms ------------------------------------------------------------------------------------------------------

    def total(self, job: Job) -> Tensor:
        """Weighted sum of all terms on the sample of this step; notes their values."""
        samples = list(self.samples(job.step))
        self.values, total = {}, torch.zeros((), device=job.rt.device)
        for name, weight, function in self.terms:
            aimed = [s for s in samples if name != "outlier" or fnmatch(s.name, self.cfg.outlier_reg_tensors)]
            value = sum((s.share * function(s) for s in aimed), torch.zeros((), device=job.rt.device))
            self.values[name], total = value.detach(), total + weight * value
        if self.cfg.rate_reg_weight:
            bits = self.rate(job, samples)
            self.values["bits"], total = bits.detach(), total + self.rate_weight(samples) * bits
        return total

    def samples(self, step: int) -> Iterator[Sample]:
        """Some columns of some matrices: large ones in proportion oftener (systematic sampling; Madow 1949), all columns
        alike, so that the sum of share x term has the expectation of the mean over all weights.
        """
        cfg, draw = self.cfg, random.Random(f"{self.cfg.seed} {step}")
        weights = sum(p.numel() for p in self.known.values())
        sizes = np.array([p.numel() for p in self.known.values()]) / weights
        count = cfg.compression_reg_sample_tensors
        points = (np.arange(count) + draw.random()) / max(count, 1)
        chosen = np.searchsorted(sizes.cumsum()[:-1], points, side="right") if count else np.arange(len(sizes))
        names = list(self.known)
        for i in chosen:
            name, p = names[i], self.known[names[i]]
            rows = export.as_rows(p.float(), self.choices[name].axis)
            n = rows.shape[1]
            width = min(cfg.compression_reg_max_cols or n, n)
            at = (torch.arange(width, device=p.device) + draw.randrange(n)) % n
            yield Sample(name, 1 / count if count else float(sizes[i]), rows, at, *self.quantised(name, rows.detach()))

    def quantised(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(steps, what a reader gets) of one matrix's slices; rd's trellis and feedback are left to the export itself."""
        if self.rd:
            step = self.grids[name].step
            return step, (rows / step).round() * step
        q_max = self.choices[name].q_max
        clip, scale = export.clip_and_scale(rows, q_max, self.options)
        step = scale.float()[:, None]
        return step, export.rounded(rows, clip, scale, q_max) * step

    def rate(self, job: Job, samples: list[Sample]) -> Tensor:
        """Bits a weight by RATE_REG_MODEL."""
        if self.waterfill is not None:
            tokens = min(max(self.cfg.train_batch_tokens // PROBE_SHARE, 1), PROBE_TOKENS)
            return self.waterfill.bits(batch_start(job, max(1, tokens // self.cfg.train_seq_len)))
        generator = self.generator(job)
        return sum((s.share * self.bits_of(s, generator) for s in samples), torch.zeros((), device=job.rt.device))

    def bits_of(self, s: Sample, generator: torch.Generator) -> Tensor:
        x = s.w / s.steps
        if self.rates_by("backslash"):
            return rate_terms.backslash_bits(x, self.shape, self.cfg.rate_reg_eps)
        if self.rates_by("entropy"):
            return rate_terms.soft_entropy_bits(x, torch.rand(x.shape, generator=generator, device=x.device) - 0.5)
        return self.prices[""].bits(x, self.grids[s.name].level[:, s.at]) if self.rd else self.prices[s.name].bits(x)

    def rate_weight(self, samples: list[Sample]) -> float:
        """RATE_REG_WEIGHT, or what RATE_TARGET_BITS has made of it."""
        if self.dual is None:
            return self.cfg.rate_reg_weight
        now = sum(s.share * order0_bits((s.restored / s.step).round()) for s in samples)
        return self.dual.update(float(now))

    # --- what is known of the export ------------------------------------------------------------------------------------

    def refresh(self, job: Job) -> None:
        """Steps of rd, price lists and the shape of the weights' distribution, from the weights of now; soon again while
        projections stand at their initial zeros.
        """
        self.known = {name: p for name, p in self.matrices.items() if bool(p.any())}
        whole = len(self.known) == len(self.matrices)
        self.due_at = job.step + (self.cfg.export_grid_every if whole else min(self.cfg.export_grid_every, job.step + 1))
        if self.rd:
            self.grids = agreed(job.rt, lambda: water_filled(job, list(self.known)))
        with torch.no_grad():
            units = {name: self.in_steps(name) for name in self.known}
            if self.rd and self.cfg.noise_qat_step_sigmas:
                self.noise_factor = self.cfg.noise_qat_step_sigmas * self.mean_spread()
            if self.rates_by("backslash") and not self.cfg.rate_reg_nu:
                self.shape = rate_terms.fit_shape(torch.cat([x.flatten() for x in units.values()]))
            if self.rates_by("coder"):
                codes = {name: x.round() for name, x in units.items()}
                levels = {name: grid.level for name, grid in self.grids.items()}
                self.prices = {"": rate_terms.PriceList.learned(codes, levels)} if self.rd else (
                    rate_terms.PriceList.histograms(codes))

    def in_steps(self, name: str) -> Tensor:
        rows = export.as_rows(self.matrices[name].float(), self.choices[name].axis)
        return rows / self.quantised(name, rows)[0]

    def mean_spread(self) -> float:
        """Geometric mean over all weights of their row's spread in their steps; rd."""
        spreads = {name: p.float().square().mean(1, keepdim=True).clamp_min(TINY).sqrt() for name, p in self.known.items()}
        logs = [(spread / self.grids[name].step).log2().flatten() for name, spread in spreads.items()]
        return float(2 ** torch.cat(logs).mean())

    # --- logs and checkpoints -------------------------------------------------------------------------------------------

    def log(self, job: Job) -> None:
        """The terms as last evaluated, each in its own unit, beside the cross-entropy that train_loss is."""
        if self.values:
            values = {name: float(v) for name, v in self.values.items()}
            if self.dual is not None:
                values["rate_weight"] = self.dual.weight
            job.folder.log(f"step:{job.step}/{job.cfg.iterations} " + " ".join(f"{k}:{v:.6g}" for k, v in values.items()))
            job.folder.metric(kind="terms", step=job.step, **values)

    def state(self) -> dict[str, Tensor]:
        """Everything that the terms to come depend on, by names that a checkpoint can hold."""
        numbers = [self.due_at, self.noise_factor, self.shape, self.phase, self.dual.log_multiple if self.dual else 0.0]
        known = [float(name in self.known) for name in self.matrices]
        found = {"numbers": torch.tensor(numbers + known, dtype=torch.float64)}
        for name, grid in self.grids.items():
            found |= {f"grid/{name}/rows": grid.rows, f"grid/{name}/cols": grid.cols, f"grid/{name}/level": grid.level}
        for name, prices in self.prices.items():
            found |= {f"prices/{name}/table": prices.table, f"prices/{name}/widths": prices.widths}
        if self.waterfill is not None:
            found |= {f"waterfill/{key}": t for key, t in self.waterfill.state().items()}
        found |= {f"last/{key}": t for key, t in self.last_phase.state().items()}
        return {NAME + key: t.clone() for key, t in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave; nothing when the checkpoint is of a run without these terms."""
        found = {key.removeprefix(NAME): t for key, t in tensors.items() if key.startswith(NAME)}
        if not found:
            return
        due_at, self.noise_factor, self.shape, phase, multiple, *known = found["numbers"].tolist()
        self.due_at, self.phase = int(due_at), int(phase)
        self.known = {name: p for (name, p), seen in zip(self.matrices.items(), known, strict=True) if seen}
        if self.dual is not None:
            self.dual.load({"log_multiple": multiple})

        def parts(kind: str, name: str, *of: str) -> list[Tensor]:
            return [found[f"{kind}/{name}/{part}"].to(self.device) for part in of]

        self.grids = {name: Grid(*parts("grid", name, "rows", "cols", "level"))
                      for name in self.matrices if f"grid/{name}/rows" in found}
        self.prices = {name: rate_terms.PriceList(*parts("prices", name, "table", "widths"))
                       for name in ("", *self.matrices) if f"prices/{name}/table" in found}
        for prefix, owner in (("waterfill/", self.waterfill), ("last/", self.last_phase)):
            mine = {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}
            if owner is not None and mine:
                owner.load(mine)
