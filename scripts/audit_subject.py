"""The evaluator that scripts/audit.py looks at: a model, the modes of its knobs, and the texts on which they are tried."""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scoring
import train_gpt
from audit_rules import Event, Nats
from rank_threads import on_ranks
from train_gpt import GPT, ByteTable, Config, EvalResult, Runtime

PLAIN = "roundtrip"             # the plain score's name in the lines of a run
PLAIN_BATCH_TOKENS = 65_536     # of `export.py eval`


@dataclass
class Seen:
    """What one evaluation of a text gave, and what it did meanwhile."""
    nats: dict[str, np.ndarray] = field(default_factory=dict)
    results: dict[str, EvalResult | str] = field(default_factory=dict)      # as reported, or why not
    passes: dict[str, np.ndarray] = field(default_factory=dict)             # times that each target was scored in a pass
    modules: dict[str, str] = field(default_factory=dict)                   # of each score but the plain one
    own: set[str] = field(default_factory=set)                              # scores that are the model's own
    gradients: int = 0                                                      # calls of autograd


@dataclass
class Subject:
    """The evaluator under audit: a model and the modes of its knobs, on any text."""
    model: GPT
    rt: Runtime
    table: ByteTable
    bos_id: int
    cfg: Config
    modules: Mapping[str, Any]      # of modes, by name, as score_all goes through them
    make: Callable[..., scoring.Evaluation] = scoring.Evaluation
    plain_sums: Callable[..., EvalResult] = train_gpt.evaluate

    @property
    def vocab_size(self) -> int:
        return self.model.tok_emb.num_embeddings

    def evaluation(self, tokens: np.ndarray, rt: Runtime | None = None, model: GPT | None = None) -> scoring.Evaluation:
        return self.make(model or self.model, rt or self.rt, tokens, self.table, self.bos_id, self.cfg, lambda _line: None)

    def plain_length(self, tokens: np.ndarray) -> int:
        """Targets of a plain window; a text that fills none is one by itself."""
        return min(self.cfg.train_seq_len, tokens.size - 1)

    def plain(self, tokens: np.ndarray) -> tuple[np.ndarray, EvalResult]:
        """The challenge's evaluation, its losses one by one."""
        found: list[Tensor] = []

        def token_nats(x: Tensor, y: Tensor) -> Tensor:
            found.append(self.model(x, y, reduction="none"))
            return found[-1]

        result = self.plain_sums(token_nats, tokens, self.table, self.rt, seq_len=self.plain_length(tokens),
                                 batch_tokens=max(PLAIN_BATCH_TOKENS, self.cfg.train_seq_len))
        scored = (tokens.size - 1) // self.plain_length(tokens) * self.plain_length(tokens)
        return torch.cat(found).flatten()[:scored].float().cpu().numpy(), result

    def see(self, tokens: np.ndarray) -> Seen:
        seen, ev = Seen(), self.evaluation(tokens)
        seen.passes = watch_passes(ev)
        seen.nats[PLAIN], seen.results[PLAIN] = self.plain(tokens)
        with gradient_calls() as calls:
            for name, module in self.modules.items():
                for one in module.score(ev):
                    seen.nats[one.name], seen.modules[one.name] = one.nats, name
                    seen.results[one.name] = attempt(lambda one=one: ev.result(one))
                    if one.nats is ev.__dict__.get("own", one).nats:
                        seen.own.add(one.name)
        seen.gradients = len(calls)
        return seen

    def evaluate(self, tokens: np.ndarray) -> Nats:
        found = {one.name: one.nats for one in self.scores(self.evaluation(tokens))}
        return {PLAIN: self.plain(tokens)[0]} | found

    def scores(self, ev: scoring.Evaluation) -> Iterator[scoring.Score]:
        for module in self.modules.values():
            yield from module.score(ev)

    def evaluate_by_ranks(self, tokens: np.ndarray) -> Nats:
        """The modes on two ranks, which give the same. (The plain windows are each on their own.)"""
        def rank(rt: Runtime) -> Nats:
            ev = self.evaluation(tokens, rt, copy.deepcopy(self.model))
            return {one.name: one.nats for one in self.scores(ev)}

        first, second = on_ranks(self.rt, 2, rank)
        for name, nats in first.items():
            if not np.array_equal(nats, second[name], equal_nan=True):
                raise ValueError(f"two ranks give different scores of {name}")
        return first

    def plain_distributions(self, tokens: np.ndarray, targets: np.ndarray) -> Tensor:
        length, found = self.plain_length(tokens), list[Tensor]()
        for target in targets:
            begin = (target - 1) // length * length
            ids = torch.from_numpy(np.asarray(tokens[begin:begin + length]).astype(np.int64))[None].to(self.rt.device)
            with torch.inference_mode(), self.rt.autocast():
                logits = self.model.logits(self.model.features(ids))[0, target - 1 - begin]
            found.append(logits.float().log_softmax(-1).cpu())
        return torch.stack(found)

    def distributions(self, seen: Seen, tokens: np.ndarray, targets: np.ndarray) -> dict[str, Tensor | None]:
        """Log-probabilities (n, V) of each score, None where its module gives none."""
        given: dict[str, Tensor | None] = {PLAIN: self.plain_distributions(tokens, targets)}
        for module_name, module in self.modules.items():
            ev, names = self.evaluation(tokens), [name for name, of in seen.modules.items() if of == module_name]
            if hasattr(module, "distributions"):
                found = module.distributions(ev, targets)
                given |= {name: found.get(name) for name in names} if isinstance(found, Mapping) else {names[0]: found}
            else:
                given |= {name: ev.distributions(targets) if name in seen.own else None for name in names}
        return given

    def events(self, tokens: np.ndarray) -> dict[str, list[Event]]:
        """The traces of the modes that adapt."""
        found: dict[str, list[Event]] = {name: [] for name, module in self.modules.items() if hasattr(module, "adapt")}
        for name, events in found.items():
            self.modules[name].adapt(self.evaluation(tokens), events.append)
        return found

    def isolated(self, seen: Seen) -> list[str]:
        """The scores that claim to depend on their document alone. (The sidecar on top of one learns from all of them.)"""
        claims = {name for name, module in self.modules.items() if getattr(module, "isolated", lambda _cfg: False)(self.cfg)}
        return [name for name, module in seen.modules.items() if module in claims and not name.endswith("sidecar")]


def attempt(action: Callable[[], EvalResult]) -> EvalResult | str:
    try:
        return action()
    except AssertionError as fault:
        return f"refused: {fault}"


def watch_passes(ev: scoring.Evaluation) -> dict[str, np.ndarray]:
    """Counts, from now on and by the pass's name, how often the passes of this evaluation score each target, (N,)."""
    counts: dict[str, np.ndarray] = {}
    score_windows, run_batch, running = ev.score_windows, ev.run_batch, [""]

    def score(name: str, *settings: Any) -> np.ndarray:
        running[0] = name
        counts.setdefault(name, np.zeros(ev.tokens.size, dtype=np.int64))
        return score_windows(name, *settings)

    def run(batch: scoring.Batch, values_of: Callable[..., Tensor]) -> Tensor:
        if running[0] in counts:
            np.add.at(counts[running[0]], batch.targets[batch.scored], 1)
        return run_batch(batch, values_of)

    setattr(ev, "score_windows", score)     # noqa: B010  (a method of this one object)
    setattr(ev, "run_batch", run)           # noqa: B010
    return counts


@contextlib.contextmanager
def gradient_calls() -> Iterator[list[str]]:
    """The calls of autograd inside, which a model that learns cannot do without."""
    calls: list[str] = []
    before = {name: getattr(torch.autograd, name) for name in ("backward", "grad")}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return before[name](*args, **kwargs)
        return call

    try:
        for name in before:
            setattr(torch.autograd, name, counted(name))
        yield calls
    finally:
        for name, function in before.items():
            setattr(torch.autograd, name, function)


# ----------------------------------------------------------------------------------------------------------------------
# Texts: a stretch of the split, and short ones for what takes an evaluation a token.
# ----------------------------------------------------------------------------------------------------------------------


def choose_stretch(tokens: np.ndarray, bos_id: int, size: int) -> tuple[int, int]:
    """(begin, end) of `size` tokens from a BOS on, with as many documents as can be beside one that fills half of them; the
    longest document where none does.
    """
    if tokens.size <= size:
        return 0, tokens.size
    starts = np.flatnonzero(tokens[:-size] == bos_id)
    if starts.size == 0:
        return 0, size
    every = np.flatnonzero(tokens == bos_id)
    first, last = np.searchsorted(every, starts), np.searchsorted(every, starts + size)
    longest = np.array([np.diff(np.append(every[a:b], s + size)).max() for a, b, s in zip(first, last, starts, strict=True)])
    best = np.lexsort((last - first, np.minimum(longest, size // 2)))[-1]
    return int(starts[best]), int(starts[best]) + size


def probe_text(tokens: np.ndarray, length: int) -> np.ndarray:
    """The stretch's `length` tokens before whose last one the same token as there has stood most often: what counts of
    earlier tokens would say has a part in the score.
    """
    length = min(length, tokens.size)
    views = np.lib.stride_tricks.sliding_window_view(tokens, length)
    end = int((views[:, :-2] == views[:, -2:-1]).sum(axis=1).argmax())
    return np.array(views[end])


def adapted_text(tokens: np.ndarray, events: Iterable[Event]) -> np.ndarray:
    """The text's beginning up to a few targets behind those of the first update."""
    stop = next((event.stop for event in events if event.kind == "update"), tokens.size)
    return np.array(tokens[:stop + 4])


def sample_targets(tokens: np.ndarray, bos_id: int, count: int, seed: int) -> np.ndarray:
    """Targets of a text: the first, the last, some BOS and those behind them, and others by chance."""
    rng, starts = np.random.default_rng(seed), np.flatnonzero(tokens[1:-1] == bos_id) + 1
    some = rng.choice(starts, min(count // 8, starts.size), replace=False)
    return np.unique(np.concatenate(([1, tokens.size - 1], some, some + 1, rng.integers(1, tokens.size, count))))
