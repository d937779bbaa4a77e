"""What makes a score legal, as checks of evaluators that they know nothing about. scripts/audit.py applies them.

An evaluator is any function of the tokens of a text, (N,), that gives its scores by name: nats of targets 1, 2, ..., that of
target t at t - 1, as many as it scores (the plain windows leave out what fills none). Checks see the numbers alone, so they
hold for windows, mixtures and models that learn while they score. A mode's module (see scripts/scoring.py) adds to that

    distributions(ev, targets) -> Tensor (n, V), or {score's name: Tensor} where it gives several scores
                                    log-probabilities that these targets are scored with, of a text scored from its start
    adapt(ev, trace)                of a mode that learns: scores the text and calls `trace` with each Event as it happens
    isolated(cfg) -> bool           whether it claims that scores depend on the target's document alone; without: no claim

A mode without `distributions` fails the rule of normalisation, unless its score is the model's own, and one that computes
gradients without `adapt` fails that of order. What ranks share goes through `ev.rt.reduce` and `ev.rt.broadcast` alone.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from train_gpt import EvalResult, Runtime, Tokenizer

Nats = Mapping[str, np.ndarray]
Evaluate = Callable[[np.ndarray], Nats]
SUM_TOLERANCE = 1e-5            # of a distribution's sum
# Of nats, where other batches may round otherwise. Float32: 1e-5 between batches (tests/test_scoring.py), more where a model
# learns from rounded gradients; one token of another future or another distribution moves a score by hundredths.
ROUNDING_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
FAULTS_SHOWN = 4
# The challenge's validation split (shared by all its tokenizers): SHA-256 of its first document's text; bytes and their
# tolerance for so many documents of it. 902 is the excerpt of 1,040,298 tokens that the mini track uses.
PUBLIC_OPENING = "f8086a5188033cce1308aaff56ea436f266eb044b643477ac3a5a55c2d7728e6"
PUBLIC_BYTES = {50_000: (151_077_000, 10_000), 902: (2_504_867, 0)}


@dataclass
class Finding:
    """What one check looked at, and what it found wrong."""
    what: str
    count: int = 0
    worst: float = 0.0          # the largest deviation
    tolerance: float = 0.0
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.faults.append(text)

    @property
    def line(self) -> str:
        told = f", largest deviation {self.worst:.3g} of {self.tolerance:g} tolerated" if self.tolerance else ""
        return f"{self.what}: {self.count}{told}"

    @property
    def shown(self) -> list[str]:
        left = len(self.faults) - FAULTS_SHOWN
        return self.faults[:FAULTS_SHOWN] + [f"and {left} more"] * (left > 0)


# ----------------------------------------------------------------------------------------------------------------------
# Causality: a score is what it is, whatever comes after its target.
# ----------------------------------------------------------------------------------------------------------------------


def other_tokens(tokens: np.ndarray, at: slice, bos_id: int, vocab_size: int, seed: int) -> np.ndarray:
    """The text with every token of a stretch changed, but those that begin documents."""
    changed, ids = np.array(tokens), np.delete(np.arange(vocab_size), bos_id)
    piece = changed[at].astype(np.int64)
    step = np.random.default_rng(seed).integers(1, ids.size, piece.size)
    changed[at] = np.where(piece == bos_id, bos_id, ids[(piece - (piece > bos_id) + step) % ids.size])
    return changed


def other_documents(tokens: np.ndarray, after: int, bos_id: int, vocab_size: int, seed: int) -> np.ndarray:
    """The text with other tokens and other documents after a token: what began there goes on, a new one begins."""
    changed = other_tokens(tokens, slice(after + 1, None), bos_id, vocab_size, seed)
    later = changed[after + 1:]
    later[later == bos_id] = (bos_id + 1) % vocab_size
    later[1:2] = bos_id
    return changed


def choose_cuts(units: Mapping[str, np.ndarray], tokens: int, each: int, seed: int) -> list[tuple[int, str]]:
    """Tokens to change everything after: just before the first target of some units (windows, documents, ...), and at it."""
    rng, found = np.random.default_rng(seed), dict[int, str]()
    for kind, firsts in units.items():
        inside = np.unique(firsts[(firsts > 2) & (firsts < tokens - 2)])
        for first in sorted(rng.choice(inside, min(each, inside.size), replace=False).tolist()):
            found.setdefault(first - 1, f"before the {kind} that begins at {first}")
            found.setdefault(first, f"in the {kind} that begins at {first}")
    return sorted(found.items())


def compare(finding: Finding, before: Nats, after: Nats, part: slice, said: str) -> None:
    """Scores of a part of the targets, counted from 0, that may not differ by more than the finding's tolerance."""
    if before.keys() != after.keys():
        finding.fault(f"{said}: {', '.join(before)} became {', '.join(after)}")
    for name in before.keys() & after.keys():
        size = min(before[name].size, after[name].size)     # plain windows leave out what fills none
        a, b = (nats[name][:size][part].astype(np.float64) for nats in (before, after))
        difference = np.where(a == b, 0.0, np.abs(a - b))
        finding.count += difference.size
        finding.worst = max(finding.worst, float(np.nan_to_num(difference, nan=math.inf).max(initial=0.0)))
        for i in np.flatnonzero(~(difference <= finding.tolerance))[:1]:
            finding.fault(f"{said}: {name} of target {i + 1 + (part.start or 0)} went from {a[i]:.6f} to {b[i]:.6f} nats")


def check_future(evaluate: Evaluate, base: Nats, tokens: np.ndarray, cuts: Sequence[tuple[int, str]],
                 alphabet: tuple[int, int], seed: int, tolerance: float = 0.0, where: str = "") -> Finding:
    """Every token after each cut is changed. Documents stay where they are, so windows, batches and shapes of all passes do
    too, and each score up to the cut must be the same bits. `base`: the scores of the text as it is; `alphabet`: the id of
    BOS and the size of the vocabulary.
    """
    finding = Finding(f"scores up to {len(cuts)} cuts with other tokens after them{where}", tolerance=tolerance)
    for i, (cut, said) in enumerate(cuts):
        changed = other_tokens(tokens, slice(cut + 1, None), *alphabet, seed + i)
        compare(finding, base, evaluate(changed), slice(0, cut), f"tokens after {cut} changed, {said}{where}")
    return finding


def check_other_ends(evaluate: Evaluate, base: Nats, tokens: np.ndarray, cut: int, alphabet: tuple[int, int], seed: int,
                     tolerance: float) -> Finding:
    """The text ends at a cut, or goes on with other documents: passes may be put together otherwise and round otherwise."""
    finding = Finding("scores up to a cut with other documents or nothing after it", tolerance=tolerance)
    fresh = other_documents(tokens, cut, *alphabet, seed)
    compare(finding, base, evaluate(fresh), slice(0, cut), f"other documents after {cut}")
    compare(finding, base, evaluate(tokens[:cut + 1]), slice(0, cut), f"the text cut after {cut}")
    return finding


def check_isolation(evaluate: Evaluate, base: Nats, tokens: np.ndarray, names: Sequence[str], starts: Sequence[int],
                    alphabet: tuple[int, int], seed: int, tolerance: float = 0.0) -> Finding:
    """Every token before some documents is changed: their scores may not notice. The BOS itself ends the one before it."""
    finding = Finding(f"scores of {', '.join(names)} with other documents before them", tolerance=tolerance)
    base = {name: base[name] for name in names}
    for i, start in enumerate(starts):
        found = evaluate(other_tokens(tokens, slice(0, start), *alphabet, seed + i))
        compare(finding, base, {name: found[name] for name in base if name in found}, slice(start, None),
                f"tokens before the BOS at {start} changed, which no score behind it may notice (isolation is claimed)")
    return finding


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation: what a target is scored with is a distribution over the vocabulary.
# ----------------------------------------------------------------------------------------------------------------------


def check_sums(given: Mapping[str, Tensor | None], nats: Nats, tokens: np.ndarray, targets: np.ndarray, tolerance: float
               ) -> list[Finding]:
    """Distributions as the modes give them out: they sum to 1, and were what the score was made with."""
    sums = Finding("sums of distributions at sampled targets", tolerance=SUM_TOLERANCE)
    agreed = Finding("their values at the target against the score, nats", tolerance=tolerance)
    for name, scored in nats.items():
        log_p = given.get(name)
        if log_p is None:
            sums.fault(f"{name} offers no distribution: its module has no `distributions` that gives it")
            continue
        inside = targets <= scored.size
        rows, at = log_p.double().cpu().numpy()[inside], targets[inside]
        deviation = np.abs(np.exp(rows).sum(axis=1) - 1)
        gap = np.abs(-rows[np.arange(at.size), tokens[at]] - scored[at - 1])
        for finding, off, text in ((sums, deviation, "sums to 1 +-"), (agreed, gap, "differs from its score by")):
            finding.count += at.size
            finding.worst = max(finding.worst, float(np.nan_to_num(off, nan=math.inf).max(initial=0.0)))
            for i in np.flatnonzero(~(off <= finding.tolerance))[:1]:
                finding.fault(f"{name}: the distribution at target {at[i]} {text} {off[i]:.6g}")
    return [sums, agreed]


def substitute(evaluate: Evaluate, text: np.ndarray, ids: Iterable[int]) -> dict[str, np.ndarray]:
    """Probabilities that the evaluator gives to each of these tokens in place of the text's last one, by name of score."""
    found: dict[str, list[float]] = {}
    for token in ids:
        changed = np.array(text)
        changed[-1] = token
        for name, nats in evaluate(changed).items():
            if nats.size == text.size - 1:
                found.setdefault(name, []).append(float(np.exp(-np.float64(nats[-1]))))
    return {name: np.array(p) for name, p in found.items()}


def check_every_token(evaluate: Evaluate, text: np.ndarray, vocab_size: int) -> Finding:
    """A text's last token, replaced by each of the vocabulary: the probabilities of the scores sum to 1. Asks nothing of
    the evaluator, and catches one that has seen the target.
    """
    finding = Finding(f"sums of scores over all {vocab_size} tokens in a target's place", tolerance=SUM_TOLERANCE)
    for name, p in substitute(evaluate, text, range(vocab_size)).items():
        finding.count += 1
        finding.worst = max(finding.worst, abs(float(p.sum()) - 1))
        if not abs(float(p.sum()) - 1) <= SUM_TOLERANCE:
            finding.fault(f"{name}: the probabilities of all tokens after the same {text.size - 1} sum to {p.sum():.6f}")
    return finding


def check_some_tokens(evaluate: Evaluate, given: Mapping[str, Tensor | None], text: np.ndarray, count: int, seed: int,
                      tolerance: float) -> Finding:
    """The same for evaluators too slow for each token: some of them, against the distribution given out for that target."""
    finding = Finding("scores of other tokens in a target's place against its distribution, nats", tolerance=tolerance)
    for name, log_p in given.items():
        if log_p is None:
            finding.fault(f"{name} offers no distribution: its module has no `distributions` that gives it")
            continue
        last = log_p[-1].double().cpu().numpy()
        ids = np.unique(np.concatenate((np.argsort(-last)[:count // 2],
                                        np.random.default_rng(seed).integers(0, last.size, count // 2))))
        for token, p in zip(ids, substitute(evaluate, text, ids.tolist()).get(name, ()), strict=False):
            off = abs(math.log(p) - float(last[token])) if p > 0 else math.inf
            finding.count += 1
            finding.worst = max(finding.worst, off)
            if not off <= tolerance:
                finding.fault(f"{name}: token {token} after the same {text.size - 1} is scored"
                              f" {-math.log(max(p, 1e-300)):.6f} nats, its distribution says {-last[token]:.6f}")
    return finding


# ----------------------------------------------------------------------------------------------------------------------
# Order: scores first, learns after, and only from what it has scored.
# ----------------------------------------------------------------------------------------------------------------------


class Event(Protocol):
    """One thing that happens to a stretch of text, whose adapted state is its own.

    "reset": the state is the first one again, `digest` after (first = stop); "score": targets first .. stop - 1 are scored
    with the state of that digest; "update": the state learned from these targets, digest after. Digests are of all that
    later scores depend on, values and optimiser's moments (export.weights_digest). A stretch's first event is a reset.
    """
    @property
    def kind(self) -> str: ...
    @property
    def stretch(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def digest(self) -> str: ...


@dataclass
class State:
    """What the events of one stretch have told so far."""
    digest: str
    learned: int = 0            # the last target that it learned from since its reset


def check_order(name: str, events: Iterable[Event], targets: int) -> Finding:
    """The trace of a mode that adapts: each target is scored once, by a state that has learned from targets before it alone,
    all of them scored before; between updates the state keeps its digest, and a reset restores the first.
    """
    finding = Finding(f"events of {name}'s trace")
    scored, states, first_digest = np.zeros(targets + 2, dtype=np.int64), dict[int, State](), ""
    for event in events:
        finding.count += 1
        said = f"{event.kind} of targets {event.first} .. {event.stop - 1}"
        if event.kind == "reset":
            first_digest = first_digest or event.digest
            if event.digest != first_digest:
                finding.fault(f"a reset left state {event.digest}, the first one was {first_digest}")
            states[event.stretch] = State(event.digest)
        elif event.stretch not in states:
            finding.fault(f"{said}: no reset of stretch {event.stretch} came before it")
        elif event.kind not in ("score", "update") or not 1 <= event.first < event.stop <= targets + 1:
            finding.fault(f"{said}: events are score, update and reset of targets 1 .. {targets}")
        else:
            faults = follow(event, states[event.stretch], scored)
            finding.faults += [f"{said}: {text}" for text in faults]
    if not any(state.learned for state in states.values()):
        finding.fault("nothing was learned of so short a text, so nothing is proven: --tokens must be more than a chunk")
    wrong = np.flatnonzero(scored[1:-1] != 1) + 1
    if wrong.size:
        finding.fault(f"target {wrong[0]} was scored {scored[wrong[0]]} times, {wrong.size} targets not once")
    return finding


def follow(event: Event, state: State, scored: np.ndarray) -> list[str]:
    """Faults of a score or an update after what came before it, which it is added to."""
    part = slice(event.first, event.stop)
    if event.kind == "score":
        scored[part] += 1
        return [text for wrong, text in (
            (event.digest != state.digest, f"with state {event.digest}, the last update or reset had left {state.digest}"),
            (state.learned >= event.first, f"by a state that had learned from target {state.learned}"),
        ) if wrong]
    state.digest, state.learned = event.digest, max(state.learned, event.stop - 1)
    early = event.first + int(np.argmin(scored[part]))
    return [] if scored[part].all() else [f"target {early} had not been scored"]


# ----------------------------------------------------------------------------------------------------------------------
# Bytes and counts.
# ----------------------------------------------------------------------------------------------------------------------


def check_bytes(count: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, tokenizer: Tokenizer) -> list[Finding]:
    """Bytes of each target, `count(tokens)` (N - 1,), against the text that the tokenizer decodes, document by document."""
    finding = Finding("documents whose scored bytes are those of their decoded text")
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    if starts.size == 0 or starts[0] != 0:
        finding.fault(f"the text begins with token {tokens[0]}, not with a BOS ({tokenizer.bos_id}), so its first bytes"
                      " count for nothing")
        return [finding]
    summed = np.add.reduceat(np.append(0, count(tokens)), starts)       # a BOS is the last target of the one before: 0 bytes
    unknown = -1 if tokenizer.pieces is None else tokenizer.pieces.unk_id()
    total, opening = 0, ""
    for start, end, scored in zip(starts.tolist(), [*starts[1:].tolist(), tokens.size], summed.tolist(), strict=True):
        ids = tokens[start + 1:end]
        text = tokenizer.decode(ids.tolist())
        size, total = len(text.encode()), total + scored
        finding.count += 1
        opening = opening or hashlib.sha256(text.encode()).hexdigest()
        # An unknown token decodes to a sign of its own and scores nothing: fewer bytes make a score worse, never better.
        if scored > size or (scored < size and not (ids == unknown).any()):
            finding.worst = max(finding.worst, abs(scored - size))
            finding.fault(f"the document at token {start} decodes to {size} bytes, scored were {scored}")
    return [finding, check_public_split(opening, starts.size, total)]


def check_public_split(opening: str, documents: int, scored_bytes: int) -> Finding:
    """The known bytes of the challenge's validation split, when the text begins as it does."""
    if opening != PUBLIC_OPENING:
        return Finding(f"not the public validation split, no known sum; {documents} documents, bytes", scored_bytes)
    if documents not in PUBLIC_BYTES:
        return Finding(f"a part of the public validation split, no known sum; {documents} of 50000 documents, bytes",
                       scored_bytes)
    wanted, tolerance = PUBLIC_BYTES[documents]
    finding = Finding(f"bytes of {documents} documents of the public validation split, known to be {wanted} +- {tolerance}",
                      scored_bytes)
    if abs(scored_bytes - wanted) > tolerance:
        finding.fault(f"{documents} documents of the public validation split have {wanted} +- {tolerance} bytes, scored were"
                      f" {scored_bytes}")
    return finding


def check_array(name: str, nats: np.ndarray, wanted: int) -> list[str]:
    """Faults of a score's array: a finite loss of at least 0 for each of the wanted targets."""
    if nats.shape != (wanted,):
        return [f"{name} has {nats.size} scores in shape {nats.shape}, there are {wanted} targets"]
    bad = np.flatnonzero(~(np.isfinite(nats) & (nats >= 0)))
    return [f"{name}: {bad.size} targets have no score, the first is {bad[0] + 1} with {nats[bad[0]]}"] if bad.size else []


def check_result(name: str, nats: np.ndarray, byte_counts: np.ndarray, result: EvalResult, tolerance: float) -> list[str]:
    """Faults of what is reported about an array of scores; the tolerance is relative."""
    total, size = float(nats.sum(dtype=np.float64)), int(byte_counts[:nats.size].sum())
    wanted = {"tokens": nats.size, "bytes": size, "val_loss": total / nats.size, "val_bpb": total / math.log(2) / size}
    return [f"{name}: reports {key} {getattr(result, key)}, its scores make {value}" for key, value in wanted.items()
            if not abs(getattr(result, key) - value) <= tolerance * abs(value)]


def check_windows(windows: np.ndarray, tokens: int) -> Finding:
    """Windows (W, 3) of begin, first scored target, end: each target of the text in exactly one of them."""
    finding = Finding("targets of the whole split in exactly one window", tokens - 1)
    edges = np.zeros(tokens + 1, dtype=np.int64)
    np.add.at(edges, windows[:, 1], 1)
    np.add.at(edges, windows[:, 2], -1)
    times = np.cumsum(edges)[1:tokens]
    for t in np.flatnonzero(times != 1)[:1]:
        finding.fault(f"target {t + 1} is in {times[t]} windows, {int((times != 1).sum())} targets not in one")
    return finding


def check_plain_sums(evaluate: Callable[..., EvalResult], rt: Runtime, targets: int, seq_len: int, batch_tokens: int
                     ) -> Finding:
    """The challenge's windows, with numbers for losses and bytes that stand for their places: whatever is left out or
    counted twice changes the sums.
    """
    scored, places = targets // seq_len * seq_len, np.arange(targets + 1)
    finding = Finding(f"targets of {targets} in the sums of the plain windows, each once", scored)
    weight = torch.from_numpy(np.random.default_rng(0).integers(1, 1 << 20, targets + 1)).float()     # exact in float32
    result = evaluate(lambda _x, y: weight.to(y.device)[y], places, PlaceBytes(), rt, seq_len=seq_len,
                      batch_tokens=batch_tokens)
    wanted = scored, places[1:scored + 1].sum(), float(weight[1:scored + 1].double().sum())
    found = result.tokens, result.bytes, result.val_loss * result.tokens
    for what, have, want in zip(("tokens", "bytes", "nats"), found, wanted, strict=True):
        if not abs(have - want) <= 1e-12 * want:
            finding.fault(f"the plain windows of {targets} targets sum to {have:.0f} {what}, each once makes {want:.0f}")
    return finding


class PlaceBytes:
    """Stands for a ByteTable: a target's place for its bytes."""

    def count(self, _previous: Tensor, targets: Tensor) -> Tensor:
        return targets
