"""Test-time training, score first.

    bash scripts/test.sh tests/test_ttt.py

Guarantees: the nats are those of a plain loop over one document at a time with explicit weights, in every mode and shape of
chunk; nothing is scored with what was not scored before (later tokens perturbed, and the trace of resets, scores and updates
with their digests); documents start anew at the same bits, or do not, as TTT_RESET says; a rate of zero changes nothing;
time that is up ends the learning and not the scoring; the model stays as it was, after a failure too; two ranks and an
interrupted evaluation give the bits of one; a run, its artifact and summary.json agree; knobs that cannot work are refused.
"""
from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU_BF16, ROOT, VARIANTS, TinyData, fill, filled_model, run_two_ranks, tiny_knobs, tiny_shape
from test_scoring import BOS, evaluation, lines_of, text
from torch import Tensor

import export
import train_gpt
from train_gpt import GPT, CastedLinear, build_model

sys.path.insert(0, str(ROOT / "scripts"))

import ttt
from window_pass import WindowPass

LENGTH = 24             # of the windows of `evaluation`; `text` has documents of 3, 1, 56, 35 and 75 tokens
LORA = {"ttt_mode": "lora", "ttt_chunk": 12, "ttt_lr": 0.003}
SGD = {"ttt_mode": "sgd", "ttt_chunk": 12, "ttt_lr": 0.003}
BY_DOC = SGD | {"ttt_reset": "doc"}
MODES = [pytest.param(knobs, id=name) for name, knobs in (("lora", LORA), ("sgd", SGD), ("sgd_doc", BY_DOC))]


@pytest.fixture(scope="module")
def model() -> GPT:
    return filled_model(tiny_shape(num_layers=2))


def nats_of(model: GPT, knobs: dict[str, Any], tokens: np.ndarray | None = None) -> np.ndarray:
    return ttt.adapt(evaluation(model, tokens, **knobs)).nats


# --- scores -------------------------------------------------------------------------------------------------------------


class Slow:
    """One state, adapted plainly: the weights of a copy, or matrices added to them and to the logits."""

    def __init__(self, model: GPT, knobs: dict[str, Any]):
        self.model = copy.deepcopy(model)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        learned = list(self.model.parameters())
        if knobs["ttt_mode"] == "lora":
            start = ttt.Adapters(model, evaluation(model, **knobs).cfg)
            for name, down in start.down.items():
                up = torch.zeros(start.sizes[name], len(down))
                self.pairs[name] = down.clone().requires_grad_(), up.requires_grad_()
            learned = [t for pair in self.pairs.values() for t in pair]
        rate = knobs["ttt_lr"]
        self.optimizer = (torch.optim.SGD(learned, rate, momentum=0.9) if knobs.get("ttt_optimizer") == "sgd"
                          else torch.optim.Adam(learned, rate, betas=(0.9, 0.95)))
        self.matrices = {name: (m, m.weight.detach()) for name, m in self.model.blocks.named_modules()
                         if isinstance(m, CastedLinear) and self.pairs}

    def nats(self, ids: Tensor) -> Tensor:
        """Of the successor of each of ids[:-1]."""
        for name, (matrix, weight) in self.matrices.items():
            down, up = self.pairs[name]
            matrix._parameters.pop("weight", None)
            matrix.weight = weight + up @ down      # type: ignore[assignment]
        features = self.model.features(ids[None, :-1])[0]
        logits = self.model.logits(features)
        if self.pairs:
            down, up = self.pairs["head"]
            logits = logits + features @ down.T @ up.T
        return -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def slow_windows(edges: list[int], first: int, stop: int, step: int) -> Iterable[tuple[int, int, int]]:
    """(first input, first target, one past the last) of the windows of a chunk, target by target."""
    while first < stop:
        edge = max(e for e in edges if e < first)
        here = min([stop, *(e + 1 for e in edges if e >= first)])
        full = max(first + step, edge + 1 + LENGTH)     # where it would end if the text went on
        z = min(here, full)
        yield max(edge, full - 1 - LENGTH), first, z
        first = z


def slow_scores(model: GPT, tokens: np.ndarray, knobs: dict[str, Any]) -> np.ndarray:
    ids, found = torch.from_numpy(tokens.astype(np.int64)), np.full(tokens.size - 1, np.nan)
    starts = np.flatnonzero(tokens == BOS).tolist()
    resets = knobs["ttt_mode"] == "lora" or knobs.get("ttt_reset") == "doc"
    edges = starts if resets or knobs.get("eval_doc_isolated") else [0]
    whole = min(knobs["ttt_chunk"], LENGTH)
    step = min(knobs.get("eval_stride") or whole, whole)
    begins = starts if resets else [0]
    for begin, last in zip(begins, [*begins[1:], tokens.size - 1], strict=True):
        state = Slow(model, knobs)
        for first in range(begin + 1, last + 1, knobs["ttt_chunk"]):
            stop = min(first + knobs["ttt_chunk"], last + 1)
            for a, f, z in slow_windows(edges, first, stop, step):
                found[f - 1:z - 1] = state.nats(ids[a:z]).detach()[f - a - 1:]
            for _ in range(knobs.get("ttt_epochs", 1) if stop <= last else 0):
                loss = torch.cat([state.nats(ids[a:z])[f - a - 1:] for a, f, z in slow_windows(edges, first, stop, whole)])
                state.optimizer.zero_grad()
                loss.mean().backward()
                state.optimizer.step()
    return found


@pytest.mark.parametrize("knobs", [
    LORA, LORA | {"ttt_chunk": 20, "ttt_epochs": 2, "ttt_rank": 3}, LORA | {"ttt_chunk": 24, "sw_eval_batch": 2},
    LORA | {"ttt_chunk": 30, "eval_stride": 7}, LORA | {"ttt_optimizer": "sgd"}, LORA | {"ttt_chunk": 17, "eval_stride": 4},
    SGD, BY_DOC, SGD | {"ttt_optimizer": "sgd"}, SGD | {"eval_doc_isolated": True, "ttt_chunk": 20},
    SGD | {"ttt_chunk": 60, "eval_stride": 5, "ttt_epochs": 2, "sw_eval_batch": 2},
    SGD | {"ttt_chunk": 24, "eval_stride": 9, "eval_doc_isolated": True}, BY_DOC | {"ttt_chunk": 50, "sw_eval_batch": 1},
], ids=lambda knobs: " ".join(map(str, knobs.values())))
def test_scores_are_those_of_a_plain_loop_with_explicit_weights(knobs: dict[str, Any], model: GPT) -> None:
    nats, wanted = nats_of(model, knobs), slow_scores(model, text(), knobs)
    assert np.abs(nats - wanted).max() < 2e-3
    assert np.abs(nats - nats_of(model, knobs | {"ttt_lr": 0.0})).max() > 0.2      # a hundred times what may differ


@pytest.mark.parametrize("variant", ["everything", "factorised", "shared_blocks"])
def test_scores_of_other_networks_are_those_of_the_plain_loop(variant: str) -> None:
    other = filled_model(tiny_shape(**VARIANTS[variant]))
    for knobs in (LORA | {"ttt_chunk": 20}, SGD | {"ttt_chunk": 30}):
        assert np.abs(nats_of(other, knobs) - slow_scores(other, text(), knobs)).max() < 2e-3


@pytest.mark.parametrize("knobs", MODES)
def test_a_rate_of_zero_gives_the_scores_of_windows_with_that_stride(knobs: dict[str, Any], model: GPT) -> None:
    own = evaluation(model, eval_stride=12, eval_doc_isolated=knobs is not SGD).own.nats
    assert np.abs(nats_of(model, knobs | {"ttt_lr": 0.0}) - own).max() < 2e-5


@pytest.mark.parametrize("knobs", MODES)
def test_bfloat16_passes_learn_what_float32_passes_learn(knobs: dict[str, Any], model: GPT) -> None:
    half = build_model(tiny_shape(num_layers=2), CPU_BF16, 32)
    fill(half)
    found, wanted = ttt.adapt(replace(evaluation(half, **knobs), rt=CPU_BF16)).nats, nats_of(model, knobs)
    learned = np.abs(wanted - nats_of(model, knobs | {"ttt_lr": 0.0})).mean()
    assert np.abs(found - wanted).mean() < 0.2 * learned


def test_rates_and_chunks_of_their_own(model: GPT) -> None:
    own = {"lora adam": (0.003, 64), "lora sgd": (0.003, 64), "sgd adam": (0.0003, 32_768), "sgd sgd": (0.003, 32_768)}
    for name, wanted in own.items():
        mode, optimizer = name.split()
        cfg = evaluation(model, ttt_mode=mode, ttt_optimizer=optimizer).cfg
        assert (ttt.learning_rate(cfg), ttt.chunk_size(cfg)) == wanted


@pytest.mark.parametrize("knobs", MODES)
def test_distributions_are_those_that_targets_were_scored_with_also_under_the_sidecar(knobs: dict[str, Any], model: GPT
                                                                                      ) -> None:
    ev = evaluation(model, eval_mix_learn=True, **knobs)
    scores = {one.name: one.nats for one in ttt.score(ev)}
    targets = np.array([1, 12, 13, 70, text().size - 1])
    given = ttt.distributions(ev, targets)
    assert list(given) == list(scores) == ["ttt", "ttt_sidecar"]
    assert np.abs(scores["ttt"] - scores["ttt_sidecar"]).max() > 0.1
    for name, log_p in given.items():
        rows = log_p.double().numpy()
        assert np.abs(np.exp(rows).sum(1) - 1).max() < 1e-5
        assert np.abs(-rows[np.arange(targets.size), text()[targets]] - scores[name][targets - 1]).max() < 1e-4


# --- what may be learned when -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", MODES)
def test_no_score_depends_on_a_later_token(knobs: dict[str, Any], model: GPT) -> None:
    before = nats_of(model, knobs)
    for at in (104, 108):                       # within a chunk, its last target or the next one's first
        tokens = text()
        tokens[at:] = 2 + (tokens[at:] + 9) % 50
        after = nats_of(model, knobs, tokens)
        assert np.array_equal(before[:at - 1], after[:at - 1])
        assert (before[at - 1:] != after[at - 1:]).mean() > 0.9


@pytest.mark.parametrize("knobs", MODES)
def test_a_document_depends_on_what_came_before_only_without_resets(knobs: dict[str, Any], model: GPT) -> None:
    tokens = text()
    tokens[62:95] = 7                           # all but the beginning of the document that the BOS at 95 ends
    before, after = nats_of(model, knobs), nats_of(model, knobs, tokens)
    assert np.array_equal(before[95:], after[95:]) == (knobs is not SGD)
    assert not np.array_equal(before[62:95], after[62:95])


def legal(events: Iterable[ttt.Event], last: int) -> str:
    """What is wrong with a trace; nothing if scores come first, and every target 1 .. last is scored once."""
    state: dict[int, str] = {}
    upto: dict[int, int] = {}
    fresh, scored = set[str](), list[int]()
    for e in events:
        if e.kind == "reset":
            state[e.stretch], upto[e.stretch] = e.digest, e.first
            fresh.add(e.digest)
        elif e.kind == "score":
            if e.digest != state[e.stretch]:
                return "scored with another state than the last update left"
            if e.first != upto[e.stretch]:
                return "scored out of order"
            upto[e.stretch] = e.stop
            scored += range(e.first, e.stop)
        else:
            if e.stop > upto[e.stretch]:
                return "learned from targets that were not scored"
            if e.digest == state[e.stretch]:
                return "an update that changes nothing"
            state[e.stretch] = e.digest
    if sorted(scored) != list(range(1, last + 1)):
        return "not every target is scored once"
    return "" if len(fresh) == 1 else "resets to different states"


@pytest.mark.parametrize("knobs", MODES)
def test_the_trace_shows_scores_before_updates_from_one_state_a_reset(knobs: dict[str, Any], model: GPT) -> None:
    events: list[ttt.Event] = []
    ev = evaluation(model, **knobs | {"ttt_epochs": 2})
    told = ttt.adapt(ev, events.append)
    assert legal(events, 169) == ""
    assert np.array_equal(told.nats, ttt.adapt(ev).nats)
    kinds = [e.kind for e in events]
    assert kinds.count("reset") == (1 if knobs is SGD else 5)
    assert kinds.count("update") == told.report["updates"] == 2 * (14 if knobs is SGD else 4 + 2 + 6)
    assert told.report["adapted_tokens"] == 12 * kinds.count("update") // 2
    last = next(e for e in reversed(events) if e.kind == "update")
    score = next(i for i, e in enumerate(events) if e.kind == "score" and e.first == last.first)
    rest = [e for e in events if e is not last]
    assert legal(rest, 169) == "scored with another state than the last update left"
    assert legal([*rest[:score], last, *rest[score:]], 169) == "learned from targets that were not scored"


# --- time, failures, ranks, interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", MODES)
def test_time_that_is_up_before_it_began_leaves_the_scores_without_learning(knobs: dict[str, Any], model: GPT) -> None:
    lines: list[str] = []
    found = ttt.adapt(evaluation(model, lines=lines, **knobs | {"ttt_max_seconds": 1e-9}))
    assert np.abs(found.nats - nats_of(model, knobs | {"ttt_lr": 0.0})).max() < 2e-5
    assert found.report == {"mode": knobs["ttt_mode"], "updates": 0, "adapted_tokens": 0, "learning_share": 0.0}
    assert lines == ["ttt: TTT_MAX_SECONDS=1e-09 ended the learning after 0 of 169 targets; the others were scored by what"
                     " had been learned of their text until then"]


def test_time_that_is_up_under_way_keeps_what_was_learned_and_learns_no_more(
        model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    whole = nats_of(model, SGD)
    monkeypatch.setattr(ttt.time, "perf_counter", lambda: float(next(clock)))
    events: list[ttt.Event] = []
    found = ttt.adapt(evaluation(model, **SGD | {"ttt_max_seconds": 12.0}), events.append)
    scored = round(found.report["learning_share"] * 169)
    assert 0 < scored < 160
    assert np.array_equal(found.nats[:scored], whole[:scored])
    assert not np.array_equal(found.nats[scored + 12:], whole[scored + 12:])
    assert max(e.stop for e in events if e.kind == "update") == scored + 1
    assert len({e.digest for e in events if e.first > scored}) == 1
    assert (found.report["updates"], found.report["adapted_tokens"]) == (scored // 12, scored)
    assert legal(events, 169) == ""


@pytest.mark.parametrize("knobs", MODES)
def test_the_model_stays_as_it_was(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled_model(tiny_shape(num_layers=2))
    before, features, calls = export.weights_digest(model.state_dict()), WindowPass.features, iter(range(5))
    wanted = nats_of(model, knobs)

    def fail(self: WindowPass, *given: Any) -> Tensor:
        if next(calls, None) is None:
            raise MemoryError
        return features(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(WindowPass, "features", fail)
        with pytest.raises(MemoryError):
            nats_of(model, knobs)
    assert export.weights_digest(model.state_dict()) == before
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert np.array_equal(nats_of(model, knobs), wanted)


RANKED = [LORA | {"sw_eval_batch": 2}, SGD | {"ttt_chunk": 50, "eval_stride": 10, "sw_eval_batch": 1}, SGD]
WORKER = """
import os, sys
import numpy as np
sys.path[:0] = [sys.argv[2] + "/tests", sys.argv[2]]
import torch
from dataclasses import replace
from conftest import CPU, filled_model, tiny_shape
import test_ttt
torch.set_num_threads(1)
rt = replace(CPU, rank=int(os.environ["RANK"]), world_size=2)
rt.start("auto")
for number, knobs in enumerate(test_ttt.RANKED):
    ev = replace(test_ttt.evaluation(filled_model(tiny_shape(num_layers=2)), **knobs), rt=rt)
    found = test_ttt.ttt.adapt(ev)
    np.save(f"{sys.argv[1]}/{rt.rank}_{number}.npy", found.nats)
    late = test_ttt.ttt.adapt(replace(ev, cfg=replace(ev.cfg, ttt_max_seconds=1e-9)))
    assert late.report["updates"] == 0 and late.report["learning_share"] == 0, late.report
rt.stop()
"""


def test_two_ranks_give_the_bits_of_one(tmp_path: Path, model: GPT) -> None:
    run_two_ranks(WORKER, tmp_path)
    for number, knobs in enumerate(RANKED):
        alone = nats_of(model, knobs)
        for rank in range(2):
            assert np.array_equal(np.load(tmp_path / f"{rank}_{number}.npy"), alone)


@pytest.mark.parametrize(("knobs", "kept"), [(LORA | {"sw_eval_batch": 1}, 3), (BY_DOC, 3), (SGD, 0),
                                             (LORA | {"sw_eval_batch": 1, "ttt_max_seconds": 1e9}, 0)])
def test_an_interrupted_evaluation_goes_on_where_nothing_learned_is_lost(
        knobs: dict[str, Any], kept: int, tmp_path: Path, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = ttt.Adaptation.run, iter(range(3))

    def die(self: ttt.Adaptation, unit: ttt.Unit) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        run(self, unit)

    whole = ttt.adapt(evaluation(model, **knobs))
    with monkeypatch.context() as patch:
        patch.setattr(ttt.Adaptation, "run", die)
        with pytest.raises(KeyboardInterrupt):
            ttt.adapt(evaluation(model, kept=tmp_path / "kept", **knobs))
    assert len(list(tmp_path.glob("kept/*"))) == kept
    lines: list[str] = []
    again = ttt.adapt(evaluation(model, kept=tmp_path / "kept", lines=lines, **knobs))
    assert np.array_equal(again.nats, whole.nats)
    assert again.report == whole.report
    assert lines == [f"ttt: 3 of 5 sections were scored before, in {tmp_path / 'kept'}"] * (kept > 0)


def test_a_rate_that_is_too_high_is_told(model: GPT) -> None:
    lines: list[str] = []
    knobs = SGD | {"ttt_lr": 1e38, "ttt_optimizer": "sgd"}
    assert not np.isfinite(ttt.adapt(evaluation(model, lines=lines, **knobs)).nats).all()
    assert lines == ["warning: ttt: scores are not finite; TTT_LR=1e+38 is too high"]


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_and_its_artifact_alone_give_the_same_lines(
        tmp_path: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {"VAL_MAX_TOKENS": "300", "EVAL_STRIDE": "16"}
    env |= {"TTT_MODE": "lora", "TTT_CHUNK": "16"}
    assert train_gpt.main(env) == 0
    folder = tmp_path / "logs" / "tiny"
    *_, line, exact = wanted = lines_of((folder / "train.log").read_text())
    assert [one.split()[0] for one in wanted[::2]] == [
        f"final_int8_zlib_{name}" for name in ("roundtrip", "sliding_window", "ttt")]
    assert re.fullmatch(r"final_int8_zlib_ttt val_loss:\d\.\d{4} val_bpb:\d\.\d{4} mode:lora updates:\d+ adapted_tokens:\d+"
                        r" learning_share:1.0 eval_time:\d+ms", line)
    mode = json.loads((folder / "summary.json").read_text())["eval_modes"]["ttt"]
    assert exact == f"final_int8_zlib_ttt_exact val_loss:{mode['val_loss']:.8f} val_bpb:{mode['val_bpb']:.8f}"
    assert (mode["tokens"], mode["mode"], mode["adapted_tokens"]) == (300, "lora", 16 * mode["updates"])
    capsys.readouterr()
    command = ["eval", str(folder / "final_model.int8.ptz"), "--data", env["DATA_PATH"], "--device", "cpu", "--tokenizer",
               env["TOKENIZER_PATH"], "--max-tokens", "300", "TTT_MODE=lora", "--ttt-chunk", "16"]
    assert export.main(command) == 0
    assert lines_of(capsys.readouterr().out)[-1] == exact


@pytest.mark.parametrize(("knobs", "message"), [
    ({"TTT_MODE": "full"}, "TTT_MODE must be one of off, lora, sgd, got 'full'"),
    ({"TTT_LR": "0.1", "TTT_CHUNK": "8"}, "TTT_LR and TTT_CHUNK asks for no score: set TTT_MODE to lora or sgd"),
    ({"TTT_MODE": "lora", "TTT_RESET": "never"},
     "TTT_MODE=lora adapts each document by itself, TTT_RESET=never is for TTT_MODE=sgd; unset it"),
    ({"TTT_MODE": "sgd", "TTT_RANK": "4"},
     "TTT_RANK is for TTT_MODE=lora, TTT_MODE=sgd adapts whole weights; unset TTT_RANK=4"),
    ({"TTT_MODE": "lora", "TTT_RANK": "0"}, "TTT_RANK must be at least 1, got 0"),
    ({"TTT_MODE": "lora", "TTT_LR": "inf"}, "TTT_LR must be finite, got inf"),
    ({"TTT_MODE": "lora", "TTT_LR": "-2"}, "TTT_LR must be at least -1, got -2.0"),
    ({"TTT_MODE": "lora", "TTT_CHUNK": "-1"}, "TTT_CHUNK must be at least 0, got -1"),
    ({"TTT_MODE": "lora", "TTT_EPOCHS": "0"}, "TTT_EPOCHS must be at least 1, got 0"),
    ({"TTT_MODE": "lora", "TTT_OPTIMIZER": "muon"}, "TTT_OPTIMIZER must be one of adam, sgd, got 'muon'"),
    ({"TTT_MODE": "lora", "TTT_RESET": "bos"}, "TTT_RESET must be one of auto, doc, never, got 'bos'"),
    ({"TTT_MODE": "lora", "TTT_MAX_SECONDS": "-1"}, "TTT_MAX_SECONDS must be at least 0, got -1.0"),
    ({"TTT_MODE": "lora", "FINAL_ROUNDTRIP_EVAL": "0"},
     "TTT_MODE: only an artifact that is evaluated is scored so; FINAL_ROUNDTRIP_EVAL must be 1"),
    ({"TTT_STEPS": "4"}, "TTT_STEPS is not a knob of this version. Unset it to go on"),
])
def test_a_knob_that_cannot_work_is_refused_in_one_line(
        knobs: dict[str, str], message: str, tiny_env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_gpt.main(tiny_env | knobs) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
