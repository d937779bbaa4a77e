"""scripts/audit.py: an honest evaluator passes every rule, and each way to break one is found under that rule alone.

    bash scripts/test.sh tests/test_audit.py

Broken on purpose: a look-ahead of one token, a smear across BOS, windows that know where the text ends, an unnormalised
cache, a score that has seen its target, an update before scoring, weights left changed, a double-counted tail, a space
counted twice, documents of validation in training, a program that opens what it must not. Traces, hashes and ranks as
threads are checked by themselves.
"""
from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TinyData, filled_model, tiny_shape
from torch import Tensor

import train_gpt
from export import ExportOptions, encode_artifact, weights_digest
from train_gpt import ByteTable, Config, EvalResult, Runtime, Tokenizer, byte_table

sys.path.insert(0, str(ROOT / "scripts"))

import audit
import audit_process
import audit_rules
import audit_subject
import hygiene
import rank_threads
import scoring

BOS, VOCAB = 1, 23


@dataclass(frozen=True)
class Event:
    kind: str
    stretch: int
    first: int
    stop: int
    digest: str


WORDS = np.exp(np.linspace(-1, 1, VOCAB)) / np.exp(np.linspace(-1, 1, VOCAB)).sum()


# --- an evaluator to break --------------------------------------------------------------------------------------------


def text(size: int = 150) -> np.ndarray:
    """Few tokens, so that the cache has something to say; documents of 3 to 54."""
    ids = np.random.default_rng(3).integers(2, 12, size).astype(np.uint16)
    ids[[0, 3, 40, 60, 96]] = BOS
    return ids


def mixed(ev: scoring.Evaluation, targets: np.ndarray, add: Callable[[np.ndarray, int], np.ndarray]) -> Tensor:
    """Log of what `add(p, target)` makes of the model's distribution p (V,) at each target."""
    own = ev.distributions(targets).double().exp().numpy()
    return torch.from_numpy(np.log(np.stack([add(p, int(t)) for p, t in zip(own, targets, strict=True)])))


def mode(name: str, distribution: Callable[[scoring.Evaluation], Callable[[np.ndarray, int], np.ndarray]]) -> Any:
    """A mode whose scores are what it says its distributions are."""
    def distributions(ev: scoring.Evaluation, targets: np.ndarray) -> Tensor:
        return mixed(ev, np.asarray(targets), distribution(ev))

    def score(ev: scoring.Evaluation) -> Iterator[scoring.Score]:
        targets = np.arange(1, ev.tokens.size)
        nats = -distributions(ev, targets)[targets - 1, torch.from_numpy(ev.tokens[1:].astype(np.int64))].numpy()
        yield scoring.Score(name, nats, 0.0, {})

    return SimpleNamespace(score=score, distributions=distributions)


def one_hot(token: int) -> np.ndarray:
    return np.eye(VOCAB)[token]


def cache(ev: scoring.Evaluation, upto: int) -> np.ndarray:
    """Relative frequencies of the tokens before a target."""
    return np.bincount(ev.tokens[:upto], minlength=VOCAB) / upto


def honest(ev: scoring.Evaluation) -> Callable[[np.ndarray, int], np.ndarray]:
    return lambda p, t: 0.9 * p + 0.1 * cache(ev, t)


def looking_ahead(ev: scoring.Evaluation) -> Callable[[np.ndarray, int], np.ndarray]:
    """A hint from the token behind the target."""
    return lambda p, t: 0.9 * p + 0.1 * (one_hot(7 * int(ev.tokens[t + 1]) % VOCAB) if t + 1 < ev.tokens.size else WORDS)


def unnormalised(ev: scoring.Evaluation) -> Callable[[np.ndarray, int], np.ndarray]:
    """A cache put on top."""
    return lambda p, t: p + 0.01 * cache(ev, t)


def seeing(ev: scoring.Evaluation) -> Callable[[np.ndarray, int], np.ndarray]:
    """A cache that counts the target before it is scored; each of its distributions, looked at alone, sums to 1."""
    return lambda p, t: 0.9 * p + 0.1 * cache(ev, t + 1)


def knowing_the_end(ev: scoring.Evaluation) -> Callable[[np.ndarray, int], np.ndarray]:
    return lambda p, t: 0.9 * p + 0.1 * (WORDS if t > ev.tokens.size - 80 else cache(ev, t))


# --- one that learns --------------------------------------------------------------------------------------------------


class Learner:
    """SGD on the embedding after chunks of 16 targets, the whole text one document; `early` learns before it scores, `lying`
    says that it does not, and `leaving` leaves the model changed.
    """
    CHUNK = 16

    def __init__(self, early: bool = False, lying: bool = False, leaving: bool = False, traces: bool = True):
        self.early, self.lying, self.leaving = early, lying, leaving
        if traces:
            self.adapt = self.tell

    def run(self, ev: scoring.Evaluation) -> Iterator[tuple[Event, np.ndarray | None]]:
        """Events as they happen, with the log-probabilities of the targets of those that score."""
        model = ev.model if self.leaving else copy.deepcopy(ev.model)
        weight, ids = model.tok_emb.weight, torch.from_numpy(ev.tokens.astype(np.int64))

        def digest() -> str:
            return weights_digest({"weight": weight})

        def logits(first: int, stop: int) -> Tensor:
            begin = max(0, first - 17)
            return model.logits(model.features(ids[None, begin:stop - 1]))[0, first - 1 - begin:]

        yield Event("reset", 0, 1, 1, digest()), None
        for first in range(1, ev.tokens.size, self.CHUNK):
            stop = min(first + self.CHUNK, ev.tokens.size)
            for kind in ("update", "score") if self.early else ("score", "update"):
                if kind == "score":
                    with torch.no_grad():
                        found = logits(first, stop).log_softmax(-1).numpy()
                    yield Event("score", 0, first, stop, digest()), found
                else:
                    loss = torch.nn.functional.cross_entropy(logits(first, stop), ids[first:stop])
                    gradient, = torch.autograd.grad(loss, weight)
                    with torch.no_grad():
                        weight -= 0.3 * gradient
                    yield Event("update", 0, first, stop, digest()), None

    def rows(self, ev: scoring.Evaluation) -> np.ndarray:
        return np.concatenate([found for _, found in self.run(ev) if found is not None])

    def score(self, ev: scoring.Evaluation) -> Iterator[scoring.Score]:
        nats = -self.rows(ev)[np.arange(ev.tokens.size - 1), ev.tokens[1:]]
        yield scoring.Score("learned", nats, 0.0, {})

    def distributions(self, ev: scoring.Evaluation, targets: np.ndarray) -> Tensor:
        return torch.from_numpy(self.rows(ev)[np.asarray(targets) - 1])

    def tell(self, ev: scoring.Evaluation, trace: Callable[[Event], None]) -> None:
        events = [event for event, _ in self.run(ev)]
        if self.lying:      # the order that it should have had
            events[1::2], events[2::2] = events[2::2], events[1::2]
        for event in events:
            trace(event)


# --- the audit of them --------------------------------------------------------------------------------------------------


def table(vocab: int = VOCAB) -> ByteTable:
    return ByteTable(torch.full((vocab,), 2), torch.zeros(vocab, dtype=torch.bool), torch.zeros(vocab, dtype=torch.bool))


def subject(module: Any = None, changes: dict[str, Any] | None = None, **knobs: Any) -> audit_subject.Subject:
    cfg = replace(Config(), train_seq_len=24, **({"eval_stride": 8} | knobs))
    modules = {"scoring": scoring} | ({"mode": module} if module else {})
    model = filled_model(tiny_shape(vocab_size=VOCAB, num_layers=2))
    return audit_subject.Subject(model, CPU, table(), BOS, cfg, modules, **(changes or {}))


def broken_rules(subject: audit_subject.Subject, *asked: str) -> dict[str, str]:
    """Each rule about scores, or of those asked for, that does not hold -> what was wrong."""
    looked = audit.Audit(subject, text())
    verdicts = [audit.judge(rule, partial(audit.SCORE_RULES[rule], looked)) for rule in asked or audit.SCORE_RULES]
    return {v.rule: "\n".join(fault for finding in v.findings for fault in finding.faults)
            for v in verdicts if not v.holds}


@pytest.mark.parametrize("knobs", [{}, {"eval_doc_isolated": True}, {"eval_stride": 24}, {"eval_seq_len": 30}])
def test_the_evaluator_of_the_program_passes(knobs: dict[str, Any]) -> None:
    assert broken_rules(subject(**knobs)) == {}


@pytest.mark.parametrize("module", [mode("cached", honest), Learner()])
def test_honest_modes_pass(module: Any) -> None:
    assert broken_rules(subject(module)) == {}


def test_a_look_ahead_of_one_token_breaks_causality() -> None:
    found = broken_rules(subject(mode("ahead", looking_ahead)))
    assert list(found) == ["causality"]
    assert "ahead of target" in found["causality"]
    assert "sliding_window" not in found["causality"]


def test_a_score_that_knows_where_the_text_ends_breaks_causality() -> None:
    found = broken_rules(subject(mode("knowing", knowing_the_end)))
    assert list(found) == ["causality"]
    assert "the text cut after" in found["causality"]


def test_a_smear_across_bos_breaks_causality_where_isolation_is_claimed() -> None:
    """Windows over the whole text that are called isolated; without the claim they are legal."""
    def score(ev: scoring.Evaluation) -> Iterator[scoring.Score]:
        open_ev = replace(ev, cfg=replace(ev.cfg, eval_doc_isolated=False))
        yield scoring.Score("smeared", open_ev.own.nats, 0.0, {})

    def distributions(ev: scoring.Evaluation, targets: np.ndarray) -> Tensor:
        return replace(ev, cfg=replace(ev.cfg, eval_doc_isolated=False)).distributions(targets)

    module = SimpleNamespace(score=score, distributions=distributions)
    assert broken_rules(subject(module, eval_doc_isolated=True), "causality") == {}
    module.isolated = scoring.isolated
    found = broken_rules(subject(module, eval_doc_isolated=True))
    assert list(found) == ["causality"]
    assert "which no score behind it may notice (isolation is claimed): smeared" in found["causality"]


def test_an_unnormalised_cache_breaks_normalisation() -> None:
    found = broken_rules(subject(mode("cached", unnormalised)))
    assert list(found) == ["normalisation"]
    assert "cached: the distribution at target" in found["normalisation"]
    assert "cached: the probabilities of all tokens after the same 63 sum to 1.01" in found["normalisation"]


def test_a_score_that_has_seen_its_target_breaks_normalisation_however_its_distributions_look() -> None:
    found = broken_rules(subject(mode("seen", seeing)))
    assert list(found) == ["normalisation"]
    assert "distribution at target" not in found["normalisation"]
    assert "seen: the probabilities of all tokens after the same 63 sum to 1.0" in found["normalisation"]


def test_a_mode_without_distributions_breaks_normalisation() -> None:
    module = mode("cached", honest)
    del module.distributions
    found = broken_rules(subject(module))
    assert list(found) == ["normalisation"]
    assert "cached offers no distribution" in found["normalisation"]


def test_an_update_before_scoring_breaks_order_causality_and_normalisation() -> None:
    """Its scores know later targets of their chunk and their own: the other two rules are broken in truth."""
    found = broken_rules(subject(Learner(early=True)))
    assert set(found) == {"causality", "normalisation", "order"}
    assert "update of targets 1 .. 16: target 1 had not been scored" in found["order"]
    assert "learned of target" in found["causality"]
    assert "its distribution says" in found["normalisation"]


def test_a_trace_that_hides_it_does_not_fit_its_digests() -> None:
    found = broken_rules(subject(Learner(early=True, lying=True)), "order")
    assert "the last update or reset had left" in found["order"]


def test_learning_without_a_trace_breaks_order() -> None:
    found = broken_rules(subject(Learner(traces=False)), "order")
    assert list(found) == ["order"]
    assert "no mode's module has `adapt`" in found["order"]


def test_weights_that_stay_changed_break_order() -> None:
    found = broken_rules(subject(Learner(leaving=True)), "order")
    assert "the model's weights are not those of the artifact any more" in found["order"]


class DoubleTail(scoring.Evaluation):
    """Counts the last window's targets twice."""

    def result(self, score: scoring.Score) -> EvalResult:
        nats = np.append(score.nats, score.nats[-8:])
        total, size = float(nats.sum(dtype=np.float64)), int(self.bytes.sum() + self.bytes[-8:].sum())
        return EvalResult(total / nats.size, total / math.log(2) / size, nats.size, size, score.seconds)


class OverlappingWindows(scoring.Evaluation):
    """Scores the first window's last targets in the second one too."""

    @property
    def windows(self) -> np.ndarray:    # type: ignore[override]
        windows = scoring.layout(self.tokens.size, self.length, self.cfg.eval_stride)
        windows[1:2, 1] -= 4
        return windows


def double_plain_tail(token_nats: Any, tokens: np.ndarray, bytes_of: Any, rt: Runtime, **sizes: int) -> EvalResult:
    """Appends the last window again."""
    length = sizes["seq_len"]
    whole = (tokens.size - 1) // length * length
    return train_gpt.evaluate(token_nats, np.append(tokens[:whole + 1], tokens[whole - length + 1:whole + 1]), bytes_of, rt,
                              **sizes)


def tail_twice(ev: scoring.Evaluation) -> Iterator[scoring.Score]:
    yield scoring.Score("twice", np.append(ev.own.nats, ev.own.nats[-8:]), 0.0, {})


@pytest.mark.parametrize(("module", "changes", "said"), [
    (None, {"make": DoubleTail}, "sliding_window: reports tokens 157, its scores make 149"),
    (None, {"make": OverlappingWindows}, "pass sliding_window scored target 21 2 times"),
    (None, {"plain_sums": double_plain_tail}, "the plain windows of 149 targets sum to 168 tokens, each once makes 144"),
    (SimpleNamespace(score=tail_twice, distributions=scoring.Evaluation.distributions), {},
     "twice has 157 scores in shape (157,), there are 149 targets\ntwice refused: every target is scored exactly once"),
])
def test_a_double_counted_tail_breaks_once(module: Any, changes: dict[str, Any], said: str) -> None:
    found = broken_rules(subject(module, changes))
    assert list(found) == ["once"]
    assert said in found["once"]


# --- order: traces ------------------------------------------------------------------------------------------------------

GOOD = [Event("reset", 0, 1, 1, "a"), Event("score", 0, 1, 9, "a"), Event("update", 0, 1, 9, "b"),
        Event("score", 0, 9, 11, "b"), Event("reset", 10, 11, 11, "a"), Event("score", 10, 11, 17, "a"),
        Event("update", 10, 11, 17, "c"), Event("score", 10, 17, 21, "c"), Event("reset", 0, 1, 1, "a"),
        Event("score", 0, 21, 25, "a")]


def test_a_trace_of_two_states_side_by_side_holds() -> None:
    order = [0, 4, 1, 5, 6, 2, 3, 7, 8, 9]
    assert audit_rules.check_order("lora", GOOD, 24).faults == []
    assert audit_rules.check_order("lora", [GOOD[i] for i in order], 24).faults == []


@pytest.mark.parametrize(("at", "event", "fault"), [
    (2, Event("update", 0, 1, 10, "b"), "update of targets 1 .. 9: target 9 had not been scored"),
    (3, Event("score", 0, 9, 11, "a"), "score of targets 9 .. 10: with state a, the last update or reset had left b"),
    (3, Event("score", 0, 8, 11, "b"), "score of targets 8 .. 10: by a state that had learned from target 8"),
    (3, Event("score", 0, 9, 10, "b"), "target 10 was scored 0 times, 1 targets not once"),
    (4, Event("reset", 10, 11, 11, "z"), "a reset left state z, the first one was a"),
    (4, Event("update", 10, 1, 9, "a"), "update of targets 1 .. 8: no reset of stretch 10 came before it"),
    (9, Event("score", 0, 21, 26, "a"), "score of targets 21 .. 25: events are score, update and reset of targets 1 .. 24"),
    (9, Event("peek", 0, 21, 25, "a"), "peek of targets 21 .. 24: events are score, update and reset of targets 1 .. 24"),
])
def test_each_break_of_the_order_is_named(at: int, event: Event, fault: str) -> None:
    assert fault in audit_rules.check_order("lora", [*GOOD[:at], event, *GOOD[at + 1:]], 24).faults


# --- bytes --------------------------------------------------------------------------------------------------------------


def count_of(spaces: int, tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """Bytes of each target with a leading space counted so many times."""
    known = byte_table(tokenizer)

    def count(tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        once = known.count(ids[:-1], ids[1:])
        return (once + (spaces - 1) * (once - known.own[ids[1:]])).numpy()

    return count


def test_bytes_are_those_of_the_decoded_documents_and_a_space_counted_twice_is_found(tiny_data: TinyData) -> None:
    tokenizer = Tokenizer(tiny_data.tokenizer)
    first, split = audit_rules.check_bytes(count_of(1, tokenizer), tiny_data.val, tokenizer)
    assert (first.faults, first.count) == ([], 12)
    assert split.count == sum(len(t.encode()) for t in tiny_data.val_texts)
    twice, _ = audit_rules.check_bytes(count_of(2, tokenizer), tiny_data.val, tokenizer)
    size = len(tiny_data.val_texts[0].encode())
    assert len(twice.faults) == 12
    assert twice.faults[0].startswith(f"the document at token 0 decodes to {size} bytes, scored were ")
    never, _ = audit_rules.check_bytes(count_of(0, tokenizer), tiny_data.val, tokenizer)
    assert len(never.faults) == 12      # too few bytes are no less wrong where no token is unknown


def test_a_split_that_does_not_begin_with_bos_breaks_bytes(tiny_data: TinyData) -> None:
    tokenizer = Tokenizer(tiny_data.tokenizer)
    finding, = audit_rules.check_bytes(count_of(1, tokenizer), tiny_data.val[3:], tokenizer)
    assert finding.faults[0].endswith("not with a BOS (1), so its first bytes count for nothing")


def test_the_public_split_is_known_by_its_opening(monkeypatch: pytest.MonkeyPatch, tiny_data: TinyData) -> None:
    tokenizer, opening = Tokenizer(tiny_data.tokenizer), hashlib.sha256(tiny_data.val_texts[0].encode()).hexdigest()
    size = sum(len(t.encode()) for t in tiny_data.val_texts)
    monkeypatch.setattr(audit_rules, "PUBLIC_OPENING", opening)
    for known, wrong in (({12: (size - 3, 3)}, False), ({12: (size - 4, 3)}, True), ({11: (0, 0)}, False)):
        monkeypatch.setattr(audit_rules, "PUBLIC_BYTES", known)
        _, split = audit_rules.check_bytes(count_of(1, tokenizer), tiny_data.val, tokenizer)
        assert bool(split.faults) == wrong


# --- hygiene ------------------------------------------------------------------------------------------------------------


def documents(rng: np.random.Generator, sizes: list[int]) -> list[np.ndarray]:
    return [np.append(BOS, rng.integers(2, 1000, size)).astype(np.uint16) for size in sizes]


def test_documents_in_training_are_found_whole_cut_and_in_parts_however_shards_are_cut() -> None:
    rng = np.random.default_rng(0)
    val, train = documents(rng, [300, 5, 700, 64, 700, 700, 200]), documents(rng, [500, 90, 800, 3, 400])
    edited = val[2].copy()
    edited[:40] = [BOS, *range(2, 41)]
    half = np.append(train[1], val[4][1:400])
    train = [*train[:2], val[1], edited, half, val[0], *train[2:], val[5][:-30]]
    stream = np.concatenate(train)
    for cuts, piece in (([], 1 << 20), ([1, 700, 701, 1500], 1 << 20), ([333], 100), ([], 1)):
        found = hygiene.find_overlap(np.concatenate(val), np.split(stream, cuts), BOS, piece)
        assert found.equal == (0, 1)
        assert found.held == (0, 1, 2, 5)
        assert found.half == 4                      # those with n-grams: 0, 2, 4, 5
        assert (found.train_documents, found.train_tokens) == (len(train), stream.size)
        assert found.grams == 4 + 0 + 10 + 1 + 10 + 10 + 3


def test_nothing_in_common_is_nothing_found() -> None:
    rng = np.random.default_rng(1)
    for val in (documents(rng, [300, 5, 0]), documents(rng, [7])):
        found = hygiene.find_overlap(np.concatenate(val), [np.concatenate(documents(rng, [900, 70, 1]))], BOS)
        assert (found.equal, found.held, found.grams_found) == ((), (), 0)


# --- ranks as threads -----------------------------------------------------------------------------------------------------


def test_ranks_as_threads_exchange_what_ranks_would() -> None:
    def action(rt: Runtime) -> tuple[list[float], bytes, float]:
        torch.manual_seed(5)
        total = rt.reduce(torch.tensor([1.0 + rt.rank, 10.0]))
        drawn = float(torch.rand(()))
        return total.tolist(), rt.broadcast(b"one" if rt.rank == 1 else b"", source=1), drawn

    state = torch.get_rng_state()
    found = rank_threads.on_ranks(CPU, 3, action)
    assert [(total, data) for total, data, _ in found] == [([6.0, 30.0], b"one")] * 3
    assert len({drawn for _, _, drawn in found}) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_two_ranks_as_threads_give_the_bits_of_one() -> None:
    alone = subject(eval_doc_isolated=True, sw_eval_batch=2)
    assert np.array_equal(alone.evaluate_by_ranks(text())["sliding_window_doc_isolated"],
                          alone.evaluate(text())["sliding_window_doc_isolated"])


def test_a_rank_that_fails_or_leaves_early_ends_the_others() -> None:
    def failing(rt: Runtime) -> None:
        if rt.rank == 1:
            raise KeyError("rank 1")
        rt.reduce(torch.ones(1))

    with pytest.raises((KeyError, RuntimeError)):
        rank_threads.on_ranks(CPU, 2, failing)
    with pytest.raises(RuntimeError, match="rank 0 waits in its exchange 0, another has ended"):
        rank_threads.on_ranks(CPU, 2, lambda rt: rt.reduce(torch.ones(1)) if rt.rank == 0 else None)


# --- self-containment and the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    shape = tiny_shape(vocab_size=tiny_data.vocab_size, num_layers=2, rope_dtype="float32")
    path = tmp_path_factory.mktemp("run") / "a.ptz"
    meta = {"model": asdict(shape), "train_seq_len": 32, "tokenizer_sha256": Tokenizer(tiny_data.tokenizer).sha256}
    path.write_bytes(encode_artifact(filled_model(shape).state_dict(), meta, ExportOptions()).data)
    return path


def test_an_honest_artifact_passes_from_the_command_line(artifact: Path, tiny_data: TinyData, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(audit, "PROBE_TOKENS", 8)
    command = [str(artifact), "--data", str(tiny_data.folder), "--tokenizer", str(tiny_data.tokenizer), "--device", "cpu",
               "--tokens", "150", "EVAL_STRIDE=16", "EVAL_DOC_ISOLATED=1", "-o", str(tmp_path / "report.json")]
    code = audit.main(command)
    out, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert (code, report["holds"]) == (0, True), out
    assert out.endswith("audit: every rule holds\n")
    assert [rule["rule"] for rule in report["rules"]] == [
        "causality", "normalisation", "order", "bytes", "once", "hygiene", "self-containment"]
    assert all(rule["holds"] and any(finding["count"] for finding in rule["findings"]) for rule in report["rules"])
    assert "scores that export.py eval printed, against sums over targets here: 2," in out


def test_training_shards_that_hold_validation_documents_break_hygiene(tiny_data: TinyData) -> None:
    assert audit.judge("hygiene", lambda: audit.check_hygiene(tiny_data.val, str(tiny_data.folder), BOS, 0)).holds
    train = np.concatenate((tiny_data.train, tiny_data.val[:tiny_data.val.size // 2]))
    starts = int(np.count_nonzero(train[tiny_data.train.size:] == BOS)) - 1
    found = hygiene.find_overlap(tiny_data.val, [train], BOS)
    assert len(found.equal) == starts >= 3


@pytest.mark.parametrize(("allowed", "holds"), [(0, False), (3, True)])
def test_duplicates_are_the_users_to_allow(allowed: int, holds: bool, monkeypatch: pytest.MonkeyPatch,
                                           tiny_data: TinyData) -> None:
    starts = np.flatnonzero(tiny_data.val == BOS)
    monkeypatch.setattr(audit, "read_split", lambda _data, _split: [tiny_data.train, tiny_data.val[:starts[3]]])
    verdict = audit.judge("hygiene", lambda: audit.check_hygiene(tiny_data.val, "data", BOS, allowed))
    assert verdict.holds == holds
    assert ("--allow-duplicates 3" in "".join(verdict.lines())) != holds


def test_without_training_shards_hygiene_is_shown_as_not_checked(tmp_path: Path) -> None:
    verdict = audit.judge("hygiene", lambda: audit.check_hygiene(text(), str(tmp_path), BOS, 0))
    assert verdict.holds
    assert "not checked" in verdict.lines()[0]


def test_a_program_that_opens_what_it_must_not_breaks_self_containment(tmp_path: Path) -> None:
    (tmp_path / "input.bin").write_bytes(b"1")
    (tmp_path / "train.bin").write_bytes(b"2")
    (tmp_path / "program.py").write_text(
        "import json, socket, subprocess, sys, tempfile\n"
        "tempfile.TemporaryFile().close()\n"
        "for path in sys.argv[1:]:\n    open(path).read()\n"
        "socket.socket().close()\nsubprocess.run(['true'])\nprint('scored')\nsys.exit(3)\n")
    folder = tmp_path / "work"
    folder.mkdir()
    inputs = [tmp_path / "program.py", tmp_path / "input.bin"]
    watched = audit_process.run_watched([str(inputs[0]), str(inputs[1]), str(tmp_path / "train.bin")], folder)
    assert (watched.code, watched.out) == (3, "scored\n")
    faults = [fault for finding in audit_process.check_opened(watched, inputs) for fault in finding.faults]
    assert faults[:2] == ["the program ended with 3: it said nothing", f"opened {tmp_path / 'train.bin'}"]
    assert {fault.split()[0] for fault in faults[2:]} >= {"socket.__new__", "subprocess.Popen"}


def test_what_a_command_printed_must_be_the_sums_of_its_targets() -> None:
    nats, sizes = np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3])
    out = "final_rd_roundtrip_exact val_loss:2.00000000 val_bpb:1.44269504\nfinal_rd_sliding_window val_loss:2 val_bpb:1\n"
    printed = audit_process.printed_results(out)
    assert printed == {"roundtrip": (2.0, 1.44269504)}
    assert audit_process.check_printed(printed, {"roundtrip": nats}, sizes).faults == []
    assert audit_process.check_printed(printed, {"roundtrip": nats * 1.0001}, sizes).faults[0].startswith(
        "roundtrip: printed val_loss:2.00000000, its targets make 2.00020000")
    assert audit_process.check_printed({}, {"roundtrip": nats}, sizes).faults == ["printed were none; scores are roundtrip"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["EVAL_STRIDE=33"], "EVAL_STRIDE must be at most EVAL_SEQ_LEN=32, or targets would be left out, got 33"),
    (["MATRIX_LR=1"], "MATRIX_LR is no knob of an evaluation; those are EVAL_"),
    (["EVAL_STRIDE"], "a knob must be NAME=VALUE, got EVAL_STRIDE"),
    (["--tokens", "32"], "--tokens must be 0 or above a window's 32, got 32"),
    (["--tokens", "many"], "argument --tokens: must be a whole number of at least 0, got 'many'"),
    (["--allow-duplicates", "-1"], "argument --allow-duplicates: must be a whole number of at least 0, got '-1'"),
    (["-o", "/nowhere/report.json"], "argument -o/--output: no folder /nowhere for /nowhere/report.json"),
    (["--data", "/nowhere"], "no fineweb_val_*.bin in /nowhere (DATA_PATH); make them with data/prepare.py"),
    (["--tokenizer", "/nowhere"], "tokenizer /nowhere: cannot be read"),
])
def test_wrong_input_is_refused_in_one_line(arguments: list[str], message: str, artifact: Path, tiny_data: TinyData,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(artifact), "--data", str(tiny_data.folder), "--tokenizer", str(tiny_data.tokenizer)]
    with pytest.raises(SystemExit) as stop:
        audit.main([*command, *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"audit.py: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""
