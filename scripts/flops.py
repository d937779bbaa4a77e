"""The arithmetic of a training step and the time that it takes: exact matrix products, and rates of machines as measured.

A step's matrix products are 6 operations for each weight that a token passes plus 12 * layers * width * positions for the
attention over the whole square, masked half included (Kaplan et al. 2020, arXiv 2001.08361; Chowdhery et al. 2022, arXiv
2204.02311, appendix B), plus Muon's iterations. Everything else (norms, softmax, optimiser, communication) is in the rate: a
machine's operations a second are those of a whole measured step, so a rate holds for like shapes, batches and code.
"""
from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import bench
from export import EMBED_NAMES, matrices
from runs import RunError, read_metrics, read_run
from train_gpt import Config, ModelShape, tensor_shapes, train_step


def forward_flops(shape: ModelShape, seq_len: int) -> int:
    """Operations of the matrix products of one sequence's way to its logits, two a multiply-add."""
    width, heads = shape.model_dim, shape.num_heads + shape.num_kv_heads
    block = 2 * width * heads * shape.head_dim + 2 * width * shape.mlp_mult * width
    head = shape.vocab_size * (shape.embedding_width if shape.tie_embeddings else width)
    uses = 0 if shape.embedding_width == width else 2 if shape.tie_embeddings else 1
    weights = shape.num_layers * block + head + uses * width * shape.embedding_width
    return 2 * seq_len * weights + 4 * width * shape.num_layers * scored_pairs(seq_len, shape.window_size)


def scored_pairs(seq_len: int, window: int) -> int:
    """(query, key) pairs that attention multiplies for one sequence and head: those masked in its blocks are among them."""
    if not 0 < window < seq_len:
        return seq_len**2
    blocks = -(-seq_len // window)
    return window**2 + (blocks - 1) * 2 * window**2


def train_flops(shape: ModelShape, seq_len: int) -> int:
    """Forward and backward of one sequence: each product has two in the backward pass, for its inputs and its weights."""
    return 3 * forward_flops(shape, seq_len)


def muon_flops(shapes: Mapping[str, tuple[int, ...]], iterations: int) -> int:
    """Newton-Schulz on every matrix that Muon updates, once for all ranks together."""
    total = 0
    for name, size in matrices(shapes).items():
        small, large = sorted(size)
        total += 0 if name in EMBED_NAMES else iterations * (4 * small**2 * large + 2 * small**3)
    return total


def step_flops(cfg: Config) -> int:
    """One optimiser step over all ranks."""
    update = muon_flops(tensor_shapes(cfg.shape), cfg.muon_backend_steps)
    return cfg.train_batch_tokens // cfg.train_seq_len * train_flops(cfg.shape, cfg.train_seq_len) + update


@dataclass(frozen=True)
class Machine:
    """What computes a step, all devices of a run together."""
    name: str
    flops_per_s: float      # a step's matrix products over its whole time
    source: str             # where the rate comes from, and how far it is to be trusted

    def step_s(self, flops: int) -> float:
        return flops / self.flops_per_s


# 24.1 % and 26.2 % of an H100's 989 TFLOP/s (dense bfloat16), fitted to the challenge's baseline code on the step times that
# tests/test_shapes.py lists. The whole square of attention fits them better than its causal half, which misses them by up
# to 19 %. Public records with FlashAttention-3 and fused kernels reach 35 %, with code that this trainer does not have.
MACHINES = {machine.name: machine for machine in (
    Machine("h100", 8 * 238.5e12, "fitted to 5 known step times, missed by up to 14 %; pods alike have differed by half"),
    Machine("1xh100", 259.3e12, "fitted to 3 known step times of 9x512, missed by up to 1 %"),
    Machine("3090", 0.25 * 71e12, "no step time is known: 25 % of 71 TFLOP/s (bfloat16) assumed, as on the H100"),
    Machine("cpu", 100e9, "2 cores of a server CPU, from one run of 4x192; CPUs differ by several times: measure"),
)}


def machine(name: str) -> Machine:
    """One of MACHINES, or that of a run, given by its folder. Raises ValueError."""
    if name in MACHINES:
        return MACHINES[name]
    if not Path(name).is_dir():
        raise ValueError(f"device {name}: neither one of {', '.join(MACHINES)} nor a run's folder")
    return machine_of_run(Path(name))


def machine_of_run(folder: Path) -> Machine:
    """The rate of a run's steps after the tenth, which leaves the first calls of kernels out. Raises RunError."""
    run = read_run(folder)
    counted = (*(f.name for f in fields(ModelShape)), "train_batch_tokens", "train_seq_len", "muon_backend_steps")
    if missing := [name for name in counted if name not in run.knobs]:
        raise RunError(f"{folder / 'config.json'} lacks the knobs {', '.join(missing)}: written by another version?")
    cfg = Config(**{name: run.knobs[name] for name in counted})
    rows = [row for row in read_metrics(folder, "train") if row["step"] >= 10]
    if len(rows) < 2:
        raise RunError(f"{folder} has {len(rows)} logged steps from the tenth on, its pace needs two: a longer run, or a"
                       " smaller TRAIN_LOG_EVERY")
    step_s = (rows[-1]["train_ms"] - rows[0]["train_ms"]) / (rows[-1]["step"] - rows[0]["step"]) / 1000
    return Machine(str(folder), step_flops(cfg) / step_s, f"steps {rows[0]['step']} to {rows[-1]['step']} of this run")


def machine_here(warmup: int = 3, steps: int = 10) -> Machine:
    """Times the trainer's own steps on this process's device, as scripts/bench.py does: its shape unless the environment has
    knobs of another. Raises ValueError where those are wrong.
    """
    problems = Config.parse(os.environ)[1]
    if problems:
        raise ValueError("; ".join(problems))
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        job = bench.build(Path(scratch))
        stack.callback(job.rt.stop)
        seconds = [bench.timed(job.rt, lambda: train_step(job, 1.0, 0.9)) for _ in range(warmup + steps)][warmup:]
    cfg, step_s = job.cfg, statistics.median(seconds)
    return Machine("here", step_flops(cfg) / step_s,
                   f"{steps} steps of {cfg.num_layers}x{cfg.model_dim} on {job.rt.describe()}, {1000 * step_s:.1f} ms"
                   f" ({1000 * min(seconds):.1f} to {1000 * max(seconds):.1f})")
