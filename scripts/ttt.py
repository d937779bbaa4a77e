"""Test-time training, score first (TTT_MODE): the model learns, while a text is scored, from what has been scored of it. The
trainer and `export.py eval` load this module when a knob TTT_* asks.

    TTT_MODE=lora python train_gpt.py
    python export.py eval FILE --data DIR --tokenizer MODEL TTT_MODE=sgd TTT_CHUNK=1024

A stretch of text is cut into chunks of TTT_CHUNK targets. A chunk is scored in full, its nats are stored, and only then do
TTT_EPOCHS steps follow down the gradient of its mean cross-entropy; a stretch's last chunk has nothing left to learn for.

    lora   adapters of rank TTT_RANK beside every matrix of the blocks and behind the logits, for each document its own.
           Documents of like length go through a pass together, adapters stacked; the batches do not depend on the ranks,
           and each is one rank's work.
    sgd    all weights. With TTT_RESET=never they learn along the whole text: all ranks walk through it together, split the
           windows of a chunk, and add the gradients of its parts in one order; with doc they start anew at each document.

With TTT_RESET=doc (lora's only way) a document is a text of its own: nothing before it is context, its last target is the
BOS that ends it, and weights and moments begin at the same bits for each. With never the context reaches back over
documents, unless EVAL_DOC_ISOLATED is set. A window has EVAL_SEQ_LEN inputs (0: TRAIN_SEQ_LEN)
where the text has them. It scores a whole chunk, or EVAL_STRIDE (0: EVAL_SEQ_LEN) of its targets where that
is less: without learning the scores are those of windows with that stride (where it divides EVAL_SEQ_LEN, to the window).
Updates take the fewest windows that hold the chunk.

The model itself is never written to. The same bits come out for any number of ranks, and again on the same machine; with
TTT_MAX_SECONDS they depend on its pace. Passes are not compiled. An interrupted evaluation goes on behind its finished
sections with TTT_RESET=doc and no TTT_MAX_SECONDS, else from the start: what was learned is not kept.
"""
from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from export import weights_digest
from scoring import (
    PASS_TOKENS,
    SECTIONS,
    Batch,
    Evaluation,
    Score,
    batches,
    distributions_with_sidecar,
    stretches,
    with_sidecar,
)
from train_gpt import GPT, CastedLinear, Config
from window_pass import WindowPass

PIECE_TOKENS = 4096         # of one pass under sgd, whose gradients are added up: a chunk of 32,768 is work for 8 ranks
BETAS = 0.9, 0.95           # of adam
MOMENTUM = 0.9              # of sgd
SEED = 0                    # of the adapters' random half


def chunk_size(cfg: Config) -> int:
    return cfg.ttt_chunk or {"lora": 64, "sgd": 32_768}[cfg.ttt_mode]


def learning_rate(cfg: Config) -> float:
    own = 0.0003 if (cfg.ttt_mode, cfg.ttt_optimizer) == ("sgd", "adam") else 0.003
    return own if cfg.ttt_lr < 0 else cfg.ttt_lr


def problems(cfg: Config) -> list[str]:
    """What is wrong with the knobs of the test-time training."""
    asked = [name.upper() for name, module in train_gpt.MODES.items()
             if module == "ttt" and getattr(cfg, name) != getattr(Config, name)]
    return [text for wrong, text in (
        (cfg.ttt_mode == "off", f"{' and '.join(asked)} asks for no score: set TTT_MODE to lora or sgd"),
        (cfg.ttt_mode == "lora" and cfg.ttt_reset == "never",
         "TTT_MODE=lora adapts each document by itself, TTT_RESET=never is for TTT_MODE=sgd; unset it"),
        (cfg.ttt_mode == "sgd" and cfg.ttt_rank != Config.ttt_rank,
         f"TTT_RANK is for TTT_MODE=lora, TTT_MODE=sgd adapts whole weights; unset TTT_RANK={cfg.ttt_rank}"),
        (cfg.ttt_mode != "off" and cfg.sdp_backend in ("flash", "cudnn"),
         f"SDP_BACKEND={cfg.sdp_backend} takes no mask, which TTT_MODE needs in the last layer; use auto"),
    ) if wrong]


# ----------------------------------------------------------------------------------------------------------------------
# What learns: float32 tensors beside a model that stays as it is, with their optimiser.
# ----------------------------------------------------------------------------------------------------------------------


class Learner(ABC):
    """Tensors that a pass adds to the model or takes in its place. After `reset` nothing is left of what was learned."""
    stacked = False                     # whether they have a row for each stretch of text
    tensors: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    def __init__(self, model: GPT, cfg: Config):
        self.model, self.cfg = model, cfg

    @abstractmethod
    def fresh(self, rows: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors before anything was learned, for so many stretches."""

    def nats(self, ids: Tensor, targets: Tensor, last: int) -> Tensor:
        """As `WindowPass.nats`, by the tensors as they are; row i of a stack serves row i of the ids."""
        return F.cross_entropy(self.logits(ids, last), targets.flatten(), reduction="none").view_as(targets)

    @abstractmethod
    def logits(self, ids: Tensor, last: int) -> Tensor:
        """As `WindowPass.logits`."""

    def reset(self, rows: int) -> None:
        self.tensors = {name: t.detach().clone().requires_grad_() for name, t in self.fresh(rows)}
        held, lr = list(self.tensors.values()), learning_rate(self.cfg)
        adam = self.cfg.ttt_optimizer == "adam"
        self.optimizer = torch.optim.Adam(held, lr, BETAS) if adam else torch.optim.SGD(held, lr, MOMENTUM)

    def step(self, gradient: Tensor) -> None:
        """One update by the gradients of all tensors, end to end."""
        held = list(self.tensors.values())
        for t, g in zip(held, gradient.split([t.numel() for t in held]), strict=True):
            t.grad = g.view_as(t)
        self.optimizer.step()

    def digest(self, row: int) -> str:
        """Of all that later scores depend on: tensors and moments, of one stretch."""
        held = dict(self.tensors)
        for name, t in self.tensors.items():
            moments = self.optimizer.state.get(t, {}).items()
            held |= {f"{name}.{key}": value for key, value in moments if isinstance(value, Tensor)}
        return weights_digest({name: t[row] if self.stacked and t.ndim else t for name, t in held.items()})


class Weights(Learner):
    """All weights, in float32."""

    class Pass(nn.Module):
        """The logits as a module, in which others can stand for the model's parameters."""

        def __init__(self, model: GPT):
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, last: int) -> Tensor:
            return WindowPass(self.model).logits(ids, last)

    def fresh(self, rows: int) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.float()) for name, p in self.Pass(self.model).named_parameters())

    def logits(self, ids: Tensor, last: int) -> Tensor:
        module = self.Pass(self.model)
        now = {name: self.tensors[name].to(p.dtype) for name, p in module.named_parameters()}
        return torch.func.functional_call(module, now, (ids, last))


class Adapters(Learner):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): x -> x down^T up^T is added to what a matrix of a block makes of
    x (rows, T, in), and to the soft-capped logits; down (rows, r, in), the same draw for every stretch, up (rows, out, r),
    zero until something was learned.
    """
    stacked = True

    def __init__(self, model: GPT, cfg: Config):
        super().__init__(model, cfg)
        self.matrices = {name: m for name, m in model.blocks.named_modules() if isinstance(m, CastedLinear)}
        shapes = {name: tuple(m.weight.shape) for name, m in self.matrices.items()}
        shapes["head"] = model.tok_emb.num_embeddings, model.skip_weights.size(1)
        generator, device = torch.Generator().manual_seed(SEED), model.skip_weights.device
        self.sizes = {name: out for name, (out, _) in shapes.items()}
        self.down = {name: (torch.randn(cfg.ttt_rank, width, generator=generator) * width ** -0.5).to(device)
                     for name, (_, width) in shapes.items()}

    def fresh(self, rows: int) -> Iterator[tuple[str, Tensor]]:
        for name, down in self.down.items():
            yield f"{name}.down", down.repeat(rows, 1, 1)
            yield f"{name}.up", down.new_zeros(rows, self.sizes[name], self.cfg.ttt_rank)

    def added(self, name: str, x: Tensor) -> Tensor:
        down, up = (self.tensors[f"{name}.{side}"][:x.size(0)] for side in ("down", "up"))
        return x @ down.mT @ up.mT

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """The blocks' matrices with their adapters."""
        def watch(name: str, matrix: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def add(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                return output + self.added(name, inputs[0])

            return matrix.register_forward_hook(add)

        handles = [watch(name, matrix) for name, matrix in self.matrices.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, ids: Tensor, last: int) -> Tensor:
        with self.beside():
            features = WindowPass(self.model).features(ids, last, 0).unflatten(0, (ids.size(0), -1))    # (rows, n, D)
        return (self.model.logits(features) + self.added("head", features)).float().flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The order of things: scored, stored, learned from.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """What a trace gets, in the order in which it happens to a stretch of text. `digest` is of all that is adapted: at a
    reset of the state after it, at a score of the state that scores, at an update of the state after it.
    """
    kind: str               # reset, score, update
    stretch: int            # position of the first token of the text that the state belongs to
    first: int              # targets first .. stop - 1: scored, or learned from; none at a reset
    stop: int
    digest: str


@dataclass(frozen=True)
class Unit:
    """Stretches of text that go through their chunks in step, the longest first, and which of their chunks."""
    begins: np.ndarray      # (S,), position of the first token of each
    targets: np.ndarray     # (S,), of each
    chunks: range

    def spans(self, chunk: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(first, stop) of the targets of that chunk in those of the stretches that have it."""
        has = self.targets > chunk * size
        first = self.begins[has] + 1 + chunk * size
        return first, np.minimum(first + size, self.begins[has] + 1 + self.targets[has])

    def places(self, size: int) -> np.ndarray:
        """Where the nats of its targets stand."""
        stops = np.minimum(self.targets, self.chunks.stop * size)
        return np.concatenate([np.arange(begin + self.chunks.start * size, begin + stop)
                               for begin, stop in zip(self.begins, stops, strict=True)])


def aligned(windows: np.ndarray) -> Batch:
    """The pass of windows whose order must stay."""
    length, head = int((windows[:, 2] - windows[:, 0]).max()) - 1, int((windows[:, 1] - windows[:, 0]).min()) - 1
    return Batch(windows, length, (length - head) % length)


class Adaptation:
    """One walk through a text."""

    def __init__(self, ev: Evaluation, trace: Callable[[Event], None] | None, log_p: dict[int, Tensor]):
        cfg, begins = ev.cfg, np.flatnonzero(ev.tokens == ev.bos_id)
        self.ev, self.cfg, self.trace, self.log_p, self.size = ev, cfg, trace, log_p, chunk_size(cfg)
        self.learner = (Adapters if cfg.ttt_mode == "lora" else Weights)(ev.model, cfg)
        self.resets = isolated(cfg)
        self.begins, self.targets = stretches(ev.tokens.size, begins if self.resets else ())
        self.edges, _ = stretches(ev.tokens.size, begins if self.resets or cfg.eval_doc_isolated else ())   # of contexts
        self.rt = replace(ev.rt, rank=0, world_size=1) if self.resets else ev.rt    # of those that share a unit
        self.longest = min(self.size, ev.length)                                    # targets of a window that is learned
        self.stride = min(cfg.eval_stride or self.longest, self.longest)            # and of one that is scored
        tokens = PASS_TOKENS[ev.rt.device.type != "cpu"] if self.learner.stacked else PIECE_TOKENS
        self.rows = cfg.sw_eval_batch or max(1, tokens // ev.length)
        self.nats = np.zeros(ev.tokens.size - 1, np.float32)                        # those that this rank has scored
        self.t0, self.stopped = time.perf_counter(), False
        self.lost = np.zeros(3, np.int64)       # updates, targets to learn from, targets scored: since time was up

    @property
    def units(self) -> list[Unit]:
        """The work, whatever the number of ranks: documents that go through together, or one text's chunks in turn."""
        chunks = -(-self.targets // self.size)
        if not self.resets:
            return [Unit(self.begins, self.targets, range(chunk, chunk + 1)) for chunk in range(int(chunks[0]))]
        order, rows = np.argsort(-self.targets, kind="stable"), self.rows if self.learner.stacked else 1
        parts = (order[at:at + rows] for at in range(0, order.size, rows))
        return [Unit(self.begins[part], self.targets[part], range(int(chunks[part[0]]))) for part in parts]

    def run(self, unit: Unit) -> None:
        if unit.chunks.start == 0:
            self.learner.reset(unit.begins.size)
            self.tell("reset", unit, unit.begins + 1, unit.begins + 1)
        for chunk in unit.chunks:
            self.run_chunk(unit, *unit.spans(chunk, self.size), unit.spans(chunk + 1, self.size)[0].size)

    def run_chunk(self, unit: Unit, first: np.ndarray, stop: np.ndarray, going_on: int) -> None:
        """Scores targets first .. stop - 1 of each stretch; then the first `going_on` stretches learn from theirs. Where one
        pass serves both, it is made once.
        """
        learns = self.in_time() and going_on > 0
        passes = self.passes(first, stop, self.stride)
        at_once = learns and len(passes) == 1 and self.stride == self.longest
        self.tell("score", unit, first, stop)
        nats = None
        for batch in passes[self.rt.rank::self.rt.world_size]:
            self.note(batch)
            with torch.set_grad_enabled(at_once):
                nats = self.forward(batch)
            self.nats[batch.targets[batch.scored] - 1] = nats.detach().float().cpu().numpy()[batch.scored]
        if self.stopped:
            self.lost += self.cfg.ttt_epochs * going_on, (stop - first)[:going_on].sum(), (stop - first).sum()
        if learns:
            ready = passes if at_once else self.passes(first[:going_on], stop[:going_on], self.longest)
            self.learn(unit, first[:going_on], stop[:going_on], ready, nats if at_once else None)

    def learn(self, unit: Unit, first: np.ndarray, stop: np.ndarray, passes: Sequence[Batch], nats: Tensor | None) -> None:
        """The updates by targets first .. stop - 1 of each stretch. `nats` are those of the only pass, if it was made."""
        share = np.zeros(max(len(batch.windows) for batch in passes) if self.learner.stacked else 1, np.float32)
        share[:first.size] = 1 / (stop - first)                     # a stretch that ends has no part in the loss
        held = list(self.learner.tensors.values())
        for epoch in range(self.cfg.ttt_epochs):
            parts = held[0].new_zeros(len(passes), sum(t.numel() for t in held))
            for i in range(self.rt.rank, len(passes), self.rt.world_size):
                found = self.forward(passes[i]) if epoch or nats is None else nats
                weight = torch.from_numpy(share[:len(passes[i].windows), None] * passes[i].scored).to(found.device)
                gradients = torch.autograd.grad((found * weight).sum(), held)
                torch.cat([g.flatten() for g in gradients], out=parts[i])
            self.learner.step(self.rt.reduce(parts).sum(0))         # other ranks have zeros: exact, and summed in one order
            self.tell("update", unit, first, stop)

    def forward(self, batch: Batch) -> Tensor:
        ids, targets = (t.to(self.rt.device) for t in batch.gather(self.ev.tokens))
        with self.rt.autocast():
            return self.learner.nats(ids, targets, batch.last)

    def note(self, batch: Batch) -> None:
        """Keeps the log-probabilities, (V,), of those targets that are wanted and scored by this pass."""
        at = np.nonzero(batch.scored & np.isin(batch.targets, list(self.log_p)))
        if at[0].size:
            with torch.no_grad(), self.rt.autocast():
                logits = self.learner.logits(batch.gather(self.ev.tokens)[0].to(self.rt.device), batch.last)
            found = logits.view(*batch.targets.shape, -1)[at].log_softmax(-1).cpu()
            self.log_p.update(zip(batch.targets[at].tolist(), found, strict=True))

    def passes(self, first: np.ndarray, stop: np.ndarray, step: int) -> list[Batch]:
        """Those that score these targets of each stretch by windows that advance by `step`. A stack takes a window of each
        stretch at a time, where the same places of all windows count.
        """
        windows = [self.windows(int(a), int(z), step) for a, z in zip(first, stop, strict=True)]
        if not self.learner.stacked:
            return batches(windows[0], self.rows * self.ev.length)
        return [aligned(np.stack([mine[k] for mine in windows if len(mine) > k])) for k in range(len(windows[0]))]

    def windows(self, first: int, stop: int, step: int) -> np.ndarray:
        """Rows as of `scoring.layout` for targets first .. stop - 1, (W, 3)."""
        edges = self.edges[np.searchsorted(self.edges, first) - 1:np.searchsorted(self.edges, stop - 1)]
        starts, stops = np.maximum(edges + 1, first), np.append(edges[1:] + 1, stop)
        return np.concatenate([self.within(*piece, step) for piece in zip(edges, starts, stops, strict=True)])

    def within(self, edge: int, first: int, stop: int, step: int) -> np.ndarray:
        """The same where the context begins at `edge`. Where windows begin does not depend on where the text ends."""
        opening = max(first + step, edge + 1 + self.ev.length)      # as far as all that was before fits into a window
        full = np.arange(opening, max(stop, opening) + step, step)
        stops = np.minimum(full, stop)
        return np.stack((np.maximum(edge, full - 1 - self.ev.length), np.append(first, stops[:-1]), stops), axis=1)

    def in_time(self) -> bool:
        """Whether there is time to learn; once there is none there never is."""
        if self.cfg.ttt_max_seconds and not self.stopped:
            elapsed_s = torch.tensor(time.perf_counter() - self.t0, device=self.rt.device, dtype=torch.float32)
            self.stopped = float(self.rt.reduce(elapsed_s, torch.distributed.ReduceOp.MAX)) > self.cfg.ttt_max_seconds
        return not self.stopped

    def tell(self, kind: str, unit: Unit, first: np.ndarray, stop: np.ndarray) -> None:
        if self.trace is not None:
            for row, (begin, a, z) in enumerate(zip(unit.begins, first, stop, strict=False)):
                self.trace(Event(kind, int(begin), int(a), int(z), self.learner.digest(row)))


def adapt(ev: Evaluation, trace: Callable[[Event], None] | None = None, log_p: dict[int, Tensor] | None = None) -> Score:
    """The score of the knobs; of the stretches that this rank adapts to, `trace` is told of every reset, score and update,
    and `log_p` gets what the targets that are its keys were scored with, (V,) float32.
    """
    t0, work = time.perf_counter(), Adaptation(ev, trace, {} if log_p is None else log_p)
    units, rt = work.units, ev.rt
    parts = np.array_split(np.arange(len(units)), min(SECTIONS, len(units)))
    places = [np.concatenate([units[i].places(work.size) for i in part]) for part in parts]

    def section(number: int) -> np.ndarray:
        for i in parts[number][rt.rank::rt.world_size] if work.resets else parts[number]:
            work.run(units[i])
        # A copy that PyTorch owns: a thread of the process group may be the last to drop it, without Python's lock.
        return rt.reduce(torch.tensor(work.nats[places[number]], device=rt.device)).cpu().numpy()

    whole = trace is not None or log_p is not None or ev.cfg.ttt_max_seconds > 0 or not work.resets
    nats = np.empty_like(work.nats)
    frame = replace(ev, kept=None) if whole else ev
    for at, found in zip(places, frame.sections("ttt", [at.size for at in places], section), strict=True):
        nats[at] = found
    return Score("ttt", nats, time.perf_counter() - t0, report(work, nats))


def report(work: Adaptation, nats: np.ndarray) -> dict[str, str | int | float]:
    """What it took, and after what share of the targets time was up (1: never)."""
    cfg, chunks = work.cfg, -(-work.targets // work.size) - 1       # those of each stretch that are learned from
    lost = torch.tensor(work.lost, device=work.ev.rt.device)
    updates, learned, scored = (np.array([cfg.ttt_epochs * chunks.sum(), work.size * chunks.sum(), nats.size])
                                - (work.ev.rt.reduce(lost) if work.resets else lost).cpu().numpy()).tolist()
    if scored < nats.size:
        work.ev.log(f"ttt: TTT_MAX_SECONDS={cfg.ttt_max_seconds:g} ended the learning after {scored} of {nats.size} targets;"
                    " the others were scored by what had been learned of their text until then")
    if not np.isfinite(nats).all():
        work.ev.log(f"warning: ttt: scores are not finite; TTT_LR={learning_rate(cfg):g} is too high")
    return {"mode": cfg.ttt_mode, "updates": updates, "adapted_tokens": learned,
            "learning_share": round(scored / nats.size, 4)}


def score(ev: Evaluation) -> Iterator[Score]:
    """The model as it learns from what it has scored; and with the sidecar, where that is asked for too."""
    yield from with_sidecar(ev, adapt(ev))


def distributions(ev: Evaluation, targets: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
    """Log-probabilities that these targets were scored with, (n, V), by score."""
    log_p = {int(target): torch.empty(0) for target in targets}
    found = adapt(ev, log_p=log_p)
    return distributions_with_sidecar(ev, found, targets, torch.stack([log_p[int(target)] for target in targets]))


def isolated(cfg: Config) -> bool:
    """Whether scores depend on their document alone."""
    return {"auto": cfg.ttt_mode == "lora"}.get(cfg.ttt_reset, cfg.ttt_reset == "doc")
