"""The last phase of a run that ends in a rate-distortion file (FINISH_STEPS, EXPORT_SCHEME=rd): what it scores was trained.

Rounding (TCQ_STATES=0): every step sees the weights rounded to the grid of the file, gradients pass straight through (Bengio
et al. 2013, arXiv 1308.3432), and in the end the file holds those very integers. The grid is the one that an export at the
phase's start would lay out, water-filled over rows and columns; its common scale follows the size that the integers have, so
that the file ends at EXPORT_BITS or at the cap.

Freezing (a trellis, whose paths no step could follow): matrices get their integers one group after the other, the embedding
first and then block by block, and what is not yet frozen is trained on, so that it repairs what the frozen ones lost. Each
group is placed as an export would place it, with error feedback and trellis, on statistics of the network as it is by then,
its frozen part included (incremental quantisation: Zhou et al. 2017, arXiv 1702.03044; here by depth, and placed by second
order). Each group's dial is that at which it and all to come are planned to fill what the plans of those before left.

A trellis and feedback say more with a bit, but weights that were trained as their own integers need fewer: logs/LOG.md.
"""
from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

import export
from calibration import statistics_now
from train_gpt import Job, Runtime, code_bytes

MOST_TOKENS = 32_768        # of one look at the network; freezing takes as many as there are groups
SLACK = 0.005               # share of the bytes that freezing leaves free for what plans miss
SIDE_BITS = 5.2             # of steps and sizes, for each row and each column
NEAREST, TRIES = 0.5, 10    # of a step, from which on a weight goes to the larger integer: later where they do not fit
LOOKS, LAST_LOOK = 32, 30   # the grid's scale follows the size so often in a phase, and not at its very end
CODED_LOOKS = (0, LAST_LOOK)    # those that make a file, which takes 10 s for 17 million weights


def from_rank_zero(rt: Runtime, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What rank 0 makes, on every rank: sums of two GPUs may differ in the last bit."""
    if rt.world_size == 1:
        return make()
    mine = make() if rt.master else {}
    return load_safetensors(rt.broadcast(save_safetensors({key: t.cpu().contiguous() for key, t in mine.items()})))


def look(job: Job, names: list[str]) -> tuple[dict[str, Tensor], export.Statistics, list[export.Prepared]]:
    """The state of this step, its statistics, and matrices of it as an export would prepare them."""
    known = statistics_now(job, min(job.cfg.calibration_tokens, MOST_TOKENS))
    state = {name: t.detach().cpu() for name, t in job.model.state_dict().items()}
    return state, known, export.in_threads(lambda name: export.prepare(name, state[name].float(), known.terms[name]), names)


def budget_bits(job: Job) -> tuple[float, float]:
    """(most, aimed at) of the whole file."""
    weights = sum(t.numel() for t in job.model.state_dict().values())
    most, aim, _ = export.rd_budget(job.cfg.export_options, weights, code_bytes(job.cfg))
    return 8.0 * most, 8 * aim


# ----------------------------------------------------------------------------------------------------------------------
# Rounding.
# ----------------------------------------------------------------------------------------------------------------------


class Rounding:
    """The grid of every matrix, and its scale."""
    frozen = ()

    def __init__(self, matrices: Mapping[str, Tensor]):
        self.matrices = matrices
        self.row_steps: dict[str, Tensor] = {}      # (out,) exponents of the file, int64
        self.log_steps: dict[str, Tensor] = {}      # (in,) log2 of the columns' steps at dial 0, float64
        self.steps: dict[str, Tensor] = {}          # (out, in) float32, those of now
        self.dial, self.looks = 0.0, 0
        self.ratio, self.other = 1.0, 0.0           # coded to estimated bits, and bits of the file beside those; of a look

    def advance(self, job: Job) -> None:
        """Lays the grid out at the phase's first step, and lets its scale follow the size of the integers."""
        done = 1 - job.steps_left / job.cfg.finish_steps
        if not self.steps:
            self.lay_out(job)
        turn = int(done * LOOKS + 1e-9)
        if self.looks <= turn <= LAST_LOOK:
            coded = any(self.looks <= at <= turn for at in CODED_LOOKS)
            self.looks = turn + 1
            found = from_rank_zero(job.rt, lambda: {"found": self.measure(job, coded)})["found"]
            bits, self.ratio, self.other = found.tolist()
            most, weights = budget_bits(job)[1] - self.other, sum(p.numel() for p in self.matrices.values())
            job.folder.log(f"rounded: step:{job.step} bits_per_weight:{bits / weights:.4f} wanted:{most / weights:.4f}")
            self.set_dial(self.dial + (bits - most) / weights)      # a bit is about an octave

    def lay_out(self, job: Job) -> None:
        def make() -> dict[str, Tensor]:
            prepared = look(job, list(self.matrices))[2]
            dial = export.dial_for(prepared, budget_bits(job)[1] - self.side_bits())
            found = {"dial": torch.tensor(dial, dtype=torch.float64)}
            for p in prepared:
                logs = np.empty_like(p.log_steps)
                logs[p.order] = p.log_steps
                found |= {f"rows/{p.name}": torch.from_numpy(p.row_steps), f"cols/{p.name}": torch.from_numpy(logs)}
            return found

        self.load(from_rank_zero(job.rt, make))

    def set_dial(self, dial: float) -> None:
        """Steps as the file can say them, and as its reader multiplies them."""
        self.dial = dial
        for name, p in self.matrices.items():
            rows, cols = self.row_steps[name], self.exponents(name)
            low = int(rows.min() + cols.min())
            table = export.steps(np.arange(low, int(rows.max() + cols.max()) + 1))
            self.steps[name] = torch.from_numpy(table)[rows[:, None] + cols - low].to(p.device)

    def exponents(self, name: str) -> Tensor:
        """(in,) of the columns' steps."""
        table, most = export.COL_TABLE, export.MAX_EXPONENT // 2
        return table * ((self.log_steps[name] + self.dial) * export.OCTAVE / table).round().clamp(-most, most).long()

    def integers(self, name: str, rows: Tensor, at: float = NEAREST) -> Tensor:
        """(out, in) float32."""
        units = rows / self.steps[name]
        return units.sign() * (units.abs() + (1 - at)).floor().clamp(max=export.MAX_AIM)

    def rounded(self, name: str, rows: Tensor) -> Tensor:
        return self.integers(name, rows) * self.steps[name]

    def measure(self, job: Job, coded: bool) -> Tensor:
        """(bits of all integers, steps and sizes, ratio, other), float64; the last two anew where coded."""
        bits = self.entropy_bits(self.matrices)
        if coded:
            state = {name: t.detach().cpu() for name, t in sorted(job.model.state_dict().items())}
            placed = self.placed({name: p.detach().float() for name, p in self.matrices.items()})
            parts = export.with_small(state, job.meta, job.cfg.export_options, placed).report.parts
            self.ratio, self.other = 8 * parts["positions"] / bits, 8.0 * (sum(parts.values()) - parts["positions"])
        return torch.tensor([self.ratio * bits, self.ratio, self.other], dtype=torch.float64)

    def side_bits(self) -> float:
        """Of steps and sizes."""
        return SIDE_BITS * sum(sum(p.shape) for p in self.matrices.values())

    @torch.no_grad()
    def entropy_bits(self, whole: Mapping[str, Tensor], at: float = NEAREST) -> float:
        """The same and all integers' given the magnitudes that row and column let expect, as the coder codes them."""
        size = 2 * export.MAX_CODE + 1
        counts = torch.zeros(export.BUCKETS * size, dtype=torch.int64)
        for name, p in whole.items():
            codes = self.integers(name, p.float(), at).clamp(-export.MAX_CODE, export.MAX_CODE)
            usual = codes.abs().mean(0) + 2.0**-12
            level = usual.log2() + (codes.abs() / usual).mean(1, keepdim=True).clamp_min(2.0**-12).log2()
            bucket = (4 * (level - export.LOWEST_OCTAVE)).round().clamp(0, export.BUCKETS - 1).long()
            flat = (bucket * size + codes.long() + export.MAX_CODE).flatten()
            counts += torch.bincount(flat, minlength=counts.numel()).cpu()
        table = counts.view(export.BUCKETS, size).double()
        nats = torch.special.entr(table).sum() - torch.special.entr(table.sum(1)).sum()
        return self.side_bits() + float(nats) / math.log(2)

    def finish(self, job: Job) -> Iterator[dict[str, export.Stored]]:
        """The integers of the file; where they do not fit, ever more zeros, from where they should. The weights become
        those rounded to the nearest.
        """
        whole = {name: p.detach().float().clone() for name, p in self.matrices.items()}
        with torch.no_grad():
            for name, p in self.matrices.items():
                p.copy_(self.rounded(name, whole[name]))
        most = budget_bits(job)[0] - self.other
        ats = [NEAREST + 0.004 * k for k in range(50)]
        first = bisect_left(ats, True, key=lambda at: self.ratio * self.entropy_bits(whole, at) <= most)
        return (self.placed(whole, at) for at in ats[max(first - 1, 0):][:TRIES])

    def placed(self, whole: Mapping[str, Tensor], at: float = NEAREST) -> dict[str, export.Stored]:
        found = {}
        for name, w in whole.items():
            row = export.PlanRow(name, tuple(w.shape), export.dtype_name(self.matrices[name]), "grid")
            integers = self.integers(name, w, at).int().cpu().numpy()
            values = export.described(integers, self.row_steps[name].numpy(), self.exponents(name).numpy())
            found[name] = export.Stored(row, values)
        return found

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        if not self.steps:
            return {}
        found = {"dial": torch.tensor(self.dial, dtype=torch.float64),
                 "looks": torch.tensor([self.looks, self.ratio, self.other], dtype=torch.float64)}
        for name in self.matrices:
            found |= {f"rows/{name}": self.row_steps[name], f"cols/{name}": self.log_steps[name]}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        if "looks" in tensors:
            looks, self.ratio, self.other = tensors["looks"].tolist()
            self.looks = int(looks)
        self.row_steps, self.log_steps = ({name: tensors[f"{kind}/{name}"].cpu() for name in self.matrices}
                                          for kind in ("rows", "cols"))
        self.set_dial(float(tensors["dial"]))


# ----------------------------------------------------------------------------------------------------------------------
# Freezing.
# ----------------------------------------------------------------------------------------------------------------------


def groups_of(names: list[str]) -> list[list[str]]:
    """What stands outside the blocks, then the blocks."""
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        block = re.match(r"blocks\.(\d+)\.", name)
        found.setdefault(int(block[1]) if block else -1, []).append(name)
    return [found[block] for block in sorted(found)]


class Freezing:
    """Which matrices are frozen, at which integers."""

    def __init__(self, matrices: Mapping[str, Tensor], states: int):
        self.matrices, self.groups, self.states = matrices, groups_of(list(matrices)), states
        self.placed: dict[str, export.Stored] = {}
        self.done = 0               # groups
        self.spent = 0.0            # bits that the frozen ones were planned to take
        self.overhead = 0.0         # bits of the file beyond the plan, as of the first group
        self.prices = np.zeros(0)   # of the coder's symbols, as of then

    @property
    def frozen(self) -> list[str]:
        return list(self.placed)

    def advance(self, job: Job) -> None:
        """Freezes the groups whose turn has come: they share the phase's steps evenly."""
        behind = 1 - job.steps_left / job.cfg.finish_steps
        while self.done < min(len(self.groups), int(len(self.groups) * behind + 1e-9) + 1):
            self.freeze(job)

    def freeze(self, job: Job) -> None:
        """Gives the next group its integers."""
        self.take(from_rank_zero(job.rt, lambda: self.place(job)))
        self.done += 1
        with torch.no_grad():
            for name in self.groups[self.done - 1]:
                stored = self.placed[name]
                self.matrices[name].copy_(export.restore(stored.row, stored.values))
        job.folder.log(f"frozen: step:{job.step} matrices:{len(self.placed)}/{len(self.matrices)}")

    def place(self, job: Job) -> dict[str, Tensor]:
        """The next group's values for the file, by `state`'s names."""
        options = job.cfg.export_options
        state, known, prepared = look(job, [name for group in self.groups[self.done:] for name in group])
        if not self.done:
            made = export.encode_artifact(state, job.meta, options, statistics=known, code_bytes=code_bytes(job.cfg))
            self.prices, self.overhead = made.prices, 8 * len(made.data) - export.planned_bits(prepared, made.dial)
        dial = export.dial_for(prepared, (1 - SLACK) * budget_bits(job)[1] - self.overhead - self.spent)
        own = [p for p in prepared if p.name in self.groups[self.done]]
        self.spent += export.planned_bits(own, dial)
        placed = export.in_threads(lambda p: export.stored_on_grid(state[p.name], p, dial, options, self.prices), own)
        return {f"{s.row.name}/{kind}": torch.from_numpy(array) for s in placed for kind, array in s.values.items()}

    def take(self, found: Mapping[str, Tensor]) -> None:
        """Adds values by `state`'s names to what is placed."""
        for key, values in found.items():
            name, kind = key.rsplit("/", 1)
            matrix = self.matrices[name]
            row = export.PlanRow(name, tuple(matrix.shape), export.dtype_name(matrix), "grid", states=self.states)
            self.placed.setdefault(name, export.Stored(row, {})).values[kind] = values.cpu().numpy()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        if not self.done:
            return {}
        numbers = torch.tensor([self.done, self.spent, self.overhead], dtype=torch.float64)
        values = {f"values/{name}/{kind}": torch.from_numpy(array)
                  for name, s in self.placed.items() for kind, array in s.values.items()}
        return {"numbers": numbers, "prices": torch.from_numpy(self.prices), **values}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        done, self.spent, self.overhead = tensors["numbers"].tolist()
        self.done, self.prices, self.placed = int(done), tensors["prices"].cpu().numpy(), {}
        self.take({key.removeprefix("values/"): t for key, t in tensors.items() if key.startswith("values/")})

    def finish(self, job: Job) -> list[dict[str, export.Stored]]:
        """All matrices at the file's integers."""
        while self.done < len(self.groups):
            self.freeze(job)
        return [self.placed]
