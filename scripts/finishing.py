"""The last phase of a run that ends in a rate-distortion file (FINISH_STEPS, EXPORT_SCHEME=rd): matrices get their integers
one group after the other, the embedding first and then block by block, and what is not yet frozen is trained on, so that it
repairs what the frozen ones lost. In the end the weights are those of the file: what is evaluated was optimised.

Each group is placed as an export would place it, with error feedback and trellis, on statistics of the network as it is
by then, its frozen part included (incremental quantisation: Zhou et al. 2017, arXiv 1702.03044; here by depth, and placed
by second order). Each group's dial is that at which it and all to come are planned to fill what the plans of those before
left. Rounding to the nearest point with straight-through gradients, the other way to do it, is no stand-in for feedback and
trellis: at 2 bits it cost 27 mbpb in 100 of 600 steps (logs/LOG.md).
"""
from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

import export
from calibration import statistics_now
from train_gpt import Job, code_bytes

MOST_TOKENS = 32_768        # of one look at the network; a phase takes as many as there are groups
SLACK = 0.005               # share of the bytes that is left free for what plans miss


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

    def advance(self, job: Job) -> None:
        """Freezes the groups whose turn has come: they share the phase's steps evenly."""
        behind = 1 - job.steps_left / job.cfg.finish_steps
        while self.done < min(len(self.groups), int(len(self.groups) * behind + 1e-9) + 1):
            self.freeze(job)

    def freeze(self, job: Job) -> None:
        """Rank 0 places the next group; the others receive its integers."""
        found = self.place(job) if job.rt.master else {}
        if job.rt.world_size > 1:
            found = load_safetensors(job.rt.broadcast(save_safetensors(found)))
        self.take(found)
        self.done += 1
        with torch.no_grad():
            for name in self.groups[self.done - 1]:
                stored = self.placed[name]
                self.matrices[name].copy_(export.restore(stored.row, stored.values))
        job.folder.log(f"frozen: step:{job.step} matrices:{len(self.placed)}/{len(self.matrices)}")

    def place(self, job: Job) -> dict[str, Tensor]:
        """The next group's values for the file, by `state`'s names."""
        cfg, options = job.cfg, job.cfg.export_options
        known = statistics_now(job, min(cfg.calibration_tokens, MOST_TOKENS))
        state = {name: t.detach().cpu() for name, t in job.model.state_dict().items()}
        left = [name for group in self.groups[self.done:] for name in group]
        prepared = export.in_threads(lambda name: export.prepare(name, state[name].float(), known.terms[name]), left)
        _, aim, _ = export.rd_budget(options, sum(t.numel() for t in state.values()), code_bytes(cfg))
        if not self.done:
            made = export.encode_artifact(state, job.meta, options, statistics=known, code_bytes=code_bytes(cfg))
            self.prices, self.overhead = made.prices, 8 * len(made.data) - export.planned_bits(prepared, made.dial)
        dial = export.dial_for(prepared, 8 * aim * (1 - SLACK) - self.overhead - self.spent)
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
        numbers = torch.tensor([self.done, self.spent, self.overhead], dtype=torch.float64)
        values = {f"values/{name}/{kind}": torch.from_numpy(array)
                  for name, s in self.placed.items() for kind, array in s.values.items()}
        return {"numbers": numbers, "prices": torch.from_numpy(self.prices), **values}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        done, self.spent, self.overhead = tensors["numbers"].tolist()
        self.done, self.prices, self.placed = int(done), tensors["prices"].cpu().numpy(), {}
        self.take({key.removeprefix("values/"): t for key, t in tensors.items() if key.startswith("values/")})

    def finish(self, job: Job) -> dict[str, export.Stored]:
        """All matrices at the file's integers."""
        while self.done < len(self.groups):
            self.freeze(job)
        return self.placed
