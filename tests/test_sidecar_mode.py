"""The sidecar as a mode of the evaluation: its scores are those of plain counts and of the model's own nats by whatever
windows, its distributions sum to one and are those that were scored, ranks share the bits of the first, and knobs that ask
for nothing or contradict each other are refused.

    bash scripts/test.sh tests/test_sidecar_mode.py
"""
from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TinyData, filled_model, tiny_knobs, tiny_shape
from test_scoring import BOS, evaluation, lines_of, text

import export
import train_gpt
from train_gpt import Runtime

sys.path.insert(0, str(ROOT / "scripts"))

import scoring
import sidecar
import sidecar_mode

VOCAB = 61


def words() -> np.ndarray:
    """`text` with few different tokens, so that contexts recur."""
    tokens = text()
    return np.where(tokens == BOS, BOS, 2 + tokens % 5).astype(np.uint16)


def ready(**knobs: Any) -> scoring.Evaluation:
    return evaluation(filled_model(tiny_shape()), words(), **knobs)


def counted(tokens: list[int], target: int, scope: str, size: int, a: float, b: float, nats: float) -> float:
    """Nats of one target under fixed weights, by looking through its past; a BOS belongs to the document that it ends."""
    start = max((t for t in range(target) if tokens[t] == BOS), default=0) if scope == "doc" else 0
    past, token = tokens[start:target], tokens[target]
    recent = past[-size:]
    cache = (recent.count(token) + 1 / VOCAB) / (len(recent) + 1)
    followed = Counter(after for before, after in itertools.pairwise(past) if before == past[-1])
    bigram = (followed[token] + len(followed) * cache) / (followed.total() + len(followed)) if followed else cache
    return -math.log((1 - a - b) * math.exp(-nats) + a * cache + b * bigram)


@pytest.mark.parametrize(("scope", "counts_in"), [("both", "doc"), ("doc", "doc"), ("stream", "stream")])
@pytest.mark.parametrize("windows", [{}, {"eval_stride": 8}, {"eval_stride": 5, "eval_doc_isolated": True}])
def test_fixed_weights_mix_plain_counts_into_the_models_own_score(
        scope: str, counts_in: str, windows: dict[str, Any]) -> None:
    ev = ready(eval_cache_mix_weight=0.1, eval_bigram_mix_weight=0.3, eval_cache_size=9, eval_sidecar_scope=scope, **windows)
    [found] = sidecar_mode.score(ev)
    tokens = ev.tokens.tolist()
    slow = [counted(tokens, t, counts_in, 9, 0.1, 0.3, float(ev.own.nats[t - 1])) for t in range(1, len(tokens))]
    assert np.allclose(found.nats, slow, rtol=0, atol=1e-12)
    assert (found.name, found.report["of"]) == ("sidecar", ev.own.name)
    assert found.report["scope"] == counts_in
    assert found.report["share"] == 0.4


@pytest.mark.parametrize("knobs", [
    {}, {"eval_ngram_order": 2}, {"eval_cache_size": 3}, {"eval_sidecar_scope": "doc"}, {"eval_sidecar_scope": "stream"}])
def test_each_knob_reaches_the_learned_chain(knobs: dict[str, Any]) -> None:
    ev = ready(eval_mix_learn=True, eval_stride=8, **knobs)
    scope = knobs.get("eval_sidecar_scope")
    car = sidecar.Sidecar(
        ev.tokens, VOCAB, doc_starts=np.array([0, 3, 4, 60, 95]), cache_size=knobs.get("eval_cache_size", 256),
        max_order=knobs.get("eval_ngram_order", 5), scopes=(scope,) if scope else ("doc", "stream"))
    wanted = car.learned_mixture(ev.own.nats, range(1, ev.tokens.size))
    [found] = sidecar_mode.score(ev)
    assert np.array_equal(found.nats, wanted.nats)
    assert found.nats.sum() < ev.own.nats.sum() - 10
    # A mixture is linear in the model: what is left of a model of ones, over that of zeros, is the model's weight.
    left = [(car.distribution(t, np.ones(VOCAB), w) - car.distribution(t, np.zeros(VOCAB), w)).mean()
            for t, w in wanted.weights.items()]
    assert found.report["share"] == pytest.approx(1 - np.mean(left), abs=1e-4)


@pytest.mark.parametrize("knobs", [
    {"eval_mix_learn": True, "eval_stride": 8}, {"eval_mix_learn": True, "eval_doc_isolated": True},
    {"eval_cache_mix_weight": 0.2, "eval_bigram_mix_weight": 0.1}, {"eval_bigram_mix_weight": 0.5, "eval_stride": 6}])
def test_distributions_sum_to_one_and_are_those_that_were_scored(knobs: dict[str, Any]) -> None:
    ev, targets = ready(**knobs), [1, 169, 60, 61, 95, 12]
    [found] = sidecar_mode.score(ev)
    log_p = sidecar_mode.distributions(ev, targets)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-5)
    scored = -log_p[torch.arange(6), torch.from_numpy(ev.tokens[targets].astype(np.int64))].numpy()
    assert np.abs(scored - found.nats[np.array(targets) - 1]).max() < 1e-5


def test_it_goes_on_top_of_any_models_nats() -> None:
    ev = ready(eval_mix_learn=True)
    uniform = np.full(ev.tokens.size - 1, math.log(VOCAB))
    score = scoring.Score("other", uniform, 2.0, {"chunk": 32})
    found = sidecar_mode.applied(ev, score)
    assert np.array_equal(found.nats, sidecar_mode.mixed(ev, uniform))
    assert found.nats.sum() < 0.9 * uniform.sum()
    assert found.name == "other_sidecar"
    assert (found.report["of"], found.report["chunk"]) == ("other", 32)
    assert found.seconds == pytest.approx(2.0 + found.report["sidecar_s"], abs=1e-3)
    log_p = sidecar_mode.written_out(ev, uniform, [7, 100], torch.full((2, VOCAB), -math.log(VOCAB)))
    assert log_p.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)
    scored = [-float(log_p[i, int(ev.tokens[t])]) for i, t in enumerate((7, 100))]
    assert scored == pytest.approx(found.nats[[6, 99]].tolist(), abs=1e-6)


def test_no_score_depends_on_later_tokens() -> None:
    knobs: dict[str, Any] = {"eval_mix_learn": True, "eval_stride": 8}
    changed = words()
    changed[100:] = 2 + np.arange(70) % 7
    a, b = (next(sidecar_mode.score(evaluation(filled_model(tiny_shape()), t, **knobs))).nats for t in (words(), changed))
    assert np.array_equal(a[:99], b[:99])
    assert not np.array_equal(a[99:], b[99:])


def test_other_ranks_take_the_bits_of_the_first_and_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(Runtime, "broadcast", lambda self, data: sent.append(data) or data if self.master else sent[-1])
    ev = ready(eval_mix_learn=True)
    [first] = sidecar_mode.score(ev)
    other = ready(eval_mix_learn=True)
    other.own = ev.own
    other.rt = replace(other.rt, rank=1, world_size=2)
    monkeypatch.setattr(sidecar_mode, "Sidecar", None)
    [second] = sidecar_mode.score(other)
    assert np.array_equal(first.nats, second.nats)
    assert first.report["share"] == second.report["share"]


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_prints_its_lines_and_the_artifact_alone_gives_them_again(
        tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {"EVAL_STRIDE": "8", "EVAL_MIX_LEARN": "1", "EVAL_NGRAM_ORDER": "4"}
    assert train_gpt.main(env) == 0
    folder = tmp_path / "logs" / "tiny"
    *_, own, own_exact, line, exact = lines_of((folder / "train.log").read_text())
    assert own.startswith("final_int8_zlib_sliding_window val_loss:")
    assert re.fullmatch(
        r"final_int8_zlib_sidecar val_loss:\d\.\d{4} val_bpb:\d\.\d{4} stride:8 seq_len:32 of:sliding_window mix:learned"
        r" order:4 cache:256 scope:doc\+stream share:0\.\d+ sidecar_s:\d\.\d+ eval_time:\d+ms", line)
    modes = json.loads((folder / "summary.json").read_text())["eval_modes"]
    mode, plain = modes["sidecar"], modes["sliding_window"]
    assert exact == f"final_int8_zlib_sidecar_exact val_loss:{mode['val_loss']:.8f} val_bpb:{mode['val_bpb']:.8f}"
    assert mode["val_bpb"] < plain["val_bpb"]
    assert (mode["tokens"], mode["bytes"]) == (plain["tokens"], plain["bytes"])
    assert mode["seconds"] == pytest.approx(plain["seconds"] + mode["sidecar_s"], abs=1e-3)

    capsys.readouterr()
    command = ["eval", str(folder / "final_model.int8.ptz"), "--data", env["DATA_PATH"], "--device", "cpu",
               "--tokenizer", env["TOKENIZER_PATH"]]
    assert export.main([*command, "EVAL_STRIDE=8", "EVAL_MIX_LEARN=1", "--eval-ngram-order", "4"]) == 0
    assert [line for line in lines_of(capsys.readouterr().out) if "_exact " in line][1:] == [own_exact, exact]
    assert export.main([*command, "EVAL_MIX_LEARN=1", "EVAL_CACHE_MIX_WEIGHT=0.1"]) == 2
    assert capsys.readouterr() == ("", "export.py eval: EVAL_MIX_LEARN=1 learns what EVAL_CACHE_MIX_WEIGHT would fix: drop"
                                   " EVAL_CACHE_MIX_WEIGHT, which can lose, or EVAL_MIX_LEARN\n")


BOTH = "EVAL_CACHE_MIX_WEIGHT and EVAL_BIGRAM_MIX_WEIGHT"


@pytest.mark.parametrize(("knobs", "message"), [
    ({"EVAL_CACHE_MIX_WEIGHT": "0.7", "EVAL_BIGRAM_MIX_WEIGHT": "0.3"},
     "EVAL_CACHE_MIX_WEIGHT + EVAL_BIGRAM_MIX_WEIGHT must be below 1, the model's own weight being the rest, got 1"),
    ({"EVAL_CACHE_MIX_WEIGHT": "-0.1"}, "EVAL_CACHE_MIX_WEIGHT must be at least 0, got -0.1"),
    ({"EVAL_BIGRAM_MIX_WEIGHT": "nan"}, "EVAL_BIGRAM_MIX_WEIGHT must be finite, got nan"),
    ({"EVAL_MIX_LEARN": "1", "EVAL_CACHE_MIX_WEIGHT": "0.1", "EVAL_BIGRAM_MIX_WEIGHT": "0.1"},
     f"EVAL_MIX_LEARN=1 learns what {BOTH} would fix: drop {BOTH}, which can lose, or EVAL_MIX_LEARN"),
    ({"EVAL_CACHE_SIZE": "9"},
     "EVAL_CACHE_SIZE asks for no score: set EVAL_MIX_LEARN=1, or EVAL_CACHE_MIX_WEIGHT or EVAL_BIGRAM_MIX_WEIGHT"),
    ({"EVAL_STRIDE": "8", "EVAL_NGRAM_ORDER": "4", "EVAL_SIDECAR_SCOPE": "doc"}, "EVAL_NGRAM_ORDER and EVAL_SIDECAR_SCOPE"
     " asks for no score: set EVAL_MIX_LEARN=1, or EVAL_CACHE_MIX_WEIGHT or EVAL_BIGRAM_MIX_WEIGHT"),
    ({"EVAL_BIGRAM_MIX_WEIGHT": "0.1", "EVAL_NGRAM_ORDER": "4"}, "EVAL_NGRAM_ORDER asks for no score:"
     " EVAL_BIGRAM_MIX_WEIGHT mixes no n-grams beyond bigrams, EVAL_MIX_LEARN=1 does"),
    ({"EVAL_MIX_LEARN": "1", "EVAL_CACHE_SIZE": "0"}, "EVAL_CACHE_SIZE must be at least 1, got 0"),
    ({"EVAL_MIX_LEARN": "1", "EVAL_NGRAM_ORDER": "1"}, "EVAL_NGRAM_ORDER must be at least 2, got 1"),
    ({"EVAL_MIX_LEARN": "1", "EVAL_SIDECAR_SCOPE": "window"},
     "EVAL_SIDECAR_SCOPE must be one of both, doc, stream, got 'window'"),
    ({"EVAL_MIX_LEARN": "1", "LOGIT_SOFTCAP": "1000"},
     "LOGIT_SOFTCAP must be at most 294 for a mixture in float64, got 1000"),
    ({"EVAL_MIX_LEARN": "1", "FINAL_ROUNDTRIP_EVAL": "0"},
     "EVAL_MIX_LEARN: only an artifact that is evaluated is scored so; FINAL_ROUNDTRIP_EVAL must be 1"),
])
def test_a_knob_that_cannot_work_is_refused_in_one_line(
        knobs: dict[str, str], message: str, tiny_env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_gpt.main(tiny_env | knobs) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
