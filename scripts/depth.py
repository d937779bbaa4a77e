"""More turns through shared blocks, as many as each token needs, at evaluation: a mode of scripts/scoring.py.

    NUM_UNIQUE_BLOCKS=3 EVAL_DEPTH_LOOPS=2 EVAL_HALT_THRESHOLD=0.2 python train_gpt.py
    python export.py eval FILE --data DIR --tokenizer MODEL EVAL_DEPTH_LOOPS=2

A turn. Layer i of a model with L layers on U shared blocks uses block i mod U. An extra turn is U layers more, the
first L .. L + U - 1, with the blocks that this rule gives them: each block once, the cycle going on. They mix the stream
with its start x0 by their block's resid_mix, as every layer does, and attend to the keys and values of their own depth.
They take no skip: the second half of the stack has taken each output of the first, by a weight of its own. The final norm
and the head then read the stream behind a token's last turn.

Halting. A token goes on to a turn where the one before moved its normalised stream by at least EVAL_HALT_THRESHOLD, root
mean square over the width, from 0 (unmoved) to 2 (reversed); the one before the first is the stack's last U layers, their
skips included. (Graves 2016, arXiv 1603.08983, and Dehghani et al. 2019, arXiv 1807.03819, halt tokens by a learned unit;
here nothing was trained for it. Entropy would take every place, the context's too, through the head at each turn.) A token
that has halted stays so. Its stream is frozen, and the layers that follow make keys and values of it for the tokens after
it. A decision depends on the token's own stream, so on its past alone.

Places that have halted are computed and dropped: were they left out, shapes and thus rounding at a place would depend on
who goes on beside it, later tokens included, and a decision near the threshold could turn on that. So the number of ranks
changes no bit; another size of a batch rounds differently, which may turn decisions within that of the threshold.

The report: mean_loops, turns a target's place took; halted_k, the share of targets that took k; forward_cost, the products
with blocks' weights that those turns need (of halted tokens keys and values alone), in those of the plain pass, and
forward_cost_run, those that are computed. Attention's own products and the head are in neither.
"""
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import ArtifactError
from scoring import Evaluation, Score, distributions_with_sidecar, with_sidecar
from train_gpt import GPT, Config, rms_norm
from window_pass import WindowPass

MOST_LOOPS = 64


def problems(cfg: Config) -> list[str]:
    """What is wrong with the knobs of the depth."""
    return [text for wrong, text in (
        (cfg.eval_depth_loops > MOST_LOOPS, f"EVAL_DEPTH_LOOPS must be at most {MOST_LOOPS}, got {cfg.eval_depth_loops}"),
        (cfg.eval_depth_loops > 0 and cfg.unique_blocks >= cfg.num_layers,
         f"EVAL_DEPTH_LOOPS goes through shared blocks again, and the {cfg.num_layers} layers share none: train with"
         " NUM_UNIQUE_BLOCKS below NUM_LAYERS, or unset it"),
        (cfg.eval_halt_threshold > 0 and cfg.eval_depth_loops == 0,
         "EVAL_HALT_THRESHOLD asks for no score: set EVAL_DEPTH_LOOPS, whose turns it halts"),
    ) if wrong]


class DepthPass(WindowPass):
    """`WindowPass` of a model whose stack goes on for up to `loops` turns through its blocks."""

    def __init__(self, model: GPT, loops: int, threshold: float):
        super().__init__(model)
        self.loops, self.threshold = loops, threshold
        layers, unique = len(model.layer_blocks), len(self.blocks)
        if unique == layers:
            raise ArtifactError("meta.model.num_unique_blocks", None, "no shared blocks", "some, for EVAL_DEPTH_LOOPS")
        self.turn = [i % unique for i in range(layers, layers + unique)]

    @property
    def reach(self) -> int:
        window = self.blocks[0].attn.window
        return super().reach + self.loops * len(self.turn) * (window - 1) if window else 0

    def deepened(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The stream behind each token's last turn, (B, T, D), of ids (B, T), and how many it took, (B, T) int64."""
        (x0, *others), tables = self.inputs(ids)
        before, x = others[-len(self.turn)], self.blocks[self.model.layer_blocks[-1]](others[-1], x0, *tables)
        turns = torch.zeros_like(ids)
        going = torch.ones_like(ids, dtype=torch.bool)
        for _ in range(self.loops):
            going = going & (moved(before, x) >= self.threshold)
            before = x
            for number in self.turn:
                x = torch.where(going[..., None], self.blocks[number](x, x0, *tables), x)
            turns = turns + going
        return x, turns

    def features(self, ids: Tensor, last: int, step: int) -> Tensor:
        return rms_norm(self.deepened(ids)[0][:, -last:]).flatten(0, 1)

    def nats_and_turns(self, ids: Tensor, targets: Tensor, last: int = 0, step: int = 0) -> Tensor:
        """Cross-entropy of each target and the turns that its place took, (2, B, last or T) float32."""
        x, turns = self.deepened(ids)
        logits = self.model.logits(rms_norm(x[:, -last:]).flatten(0, 1)).float()
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        return torch.stack((nats, turns[:, -last:].float()))


def moved(before: Tensor, x: Tensor) -> Tensor:
    """How far apart two streams (..., D) are once normalised, (...) float32 in 0 .. 2."""
    return (rms_norm(x.float()) - rms_norm(before.float())).square().mean(-1).sqrt()


def deep(ev: Evaluation) -> tuple[Evaluation, DepthPass]:
    """The evaluation of the same text with the turns of the knobs, and its passes."""
    forward = DepthPass(ev.model, ev.cfg.eval_depth_loops, ev.cfg.eval_halt_threshold)
    deeper = replace(ev)
    deeper.forward = forward
    return deeper, forward


def score(ev: Evaluation) -> Iterator[Score]:
    """The model with its turns, by the windows of the knobs; and with the sidecar, where that is asked for too."""
    yield from with_sidecar(ev, deepened(ev))


def deepened(ev: Evaluation) -> Score:
    t0 = time.perf_counter()
    deeper, forward = deep(ev)
    nats, turns = deeper.score_windows("depth", deeper.windows, forward.nats_and_turns, 2)
    report = {"stride": ev.cfg.eval_stride or ev.length, "seq_len": ev.length, **compute_report(forward, turns)}
    return Score("depth", nats, time.perf_counter() - t0, report)


def distributions(ev: Evaluation, targets: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
    """Log-probabilities that these targets were scored with, (n, V), by score."""
    return distributions_with_sidecar(ev, deepened(ev), targets, deep(ev)[0].distributions(targets))


def isolated(cfg: Config) -> bool:
    """Whether scores depend on their document alone."""
    return cfg.eval_doc_isolated


def compute_report(forward: DepthPass, turns: np.ndarray) -> dict[str, float]:
    """What the turns of the targets, (N - 1,), come to; the keys are explained above."""
    loops, taken = forward.loops, np.bincount(turns.astype(np.int64), minlength=forward.loops + 1)
    going = (turns.size - np.cumsum(taken)[:-1]) / turns.size           # share of the targets that take each turn
    per_turn, block = len(forward.turn) / len(forward.model.layer_blocks), forward.blocks[0]
    whole = sum(linear.weight.numel() for linear in block.modules() if isinstance(linear, nn.Linear))
    kept = (block.attn.c_k.weight.numel() + block.attn.c_v.weight.numel()) / whole
    needed = np.where(going > 0, going + kept * (1 - going), 0.0)       # nobody asks for keys in a turn that nobody takes
    shares = {f"halted_{k}": round(int(count) / turns.size, 4) for k, count in enumerate(taken)}
    return {"loops": loops, "threshold": forward.threshold, "mean_loops": round(float(going.sum()), 4), **shares,
            "forward_cost": round(1 + per_turn * float(needed.sum()), 4), "forward_cost_run": round(1 + per_turn * loops, 4)}
