"""scripts/sensitivity.py: the losses are those of a plain re-implementation, a run that was cut goes on where it was, bad
input is one line and exit code 2, and only a map of training tokens may plan an artifact.

    python -m pytest tests/test_sensitivity.py
"""
from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TinyData, build_job, tiny_knobs
from torch import Tensor

import export
import export_verbs
import train_gpt

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "scripts"))
import sensitivity
from sensitivity_map import read_sensitivity

BITS, BASE_BITS = (2, 4, 8), 4
TOKENS = 256
CALIBRATION = "256"
Q = "blocks.1.attn.c_q.weight"


@dataclass(frozen=True)
class Case:
    """A small trained model on disk."""
    checkpoint: Path
    statistics: export.Statistics
    state: dict[str, Tensor]
    meta: dict[str, Any]
    data: TinyData

    def command(self, output: Path, /, **changes: str | None) -> list[str]:
        """The usual command line; a flag changed to None is left out."""
        flags = {"--data": str(self.data.folder), "--tokenizer": str(self.data.tokenizer), "--max-tokens": str(TOKENS),
                 "--bits": "2,4,8", "--device": "cpu", "-o": str(output),
                 **{"--" + name.replace("_", "-"): value for name, value in changes.items()}}
        given = [part for flag, value in flags.items() if value is not None for part in (flag, value)]
        return [str(self.checkpoint), *given]

    @property
    def matrices(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.state.items() if t.ndim == 2 and not export.is_control(name)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Case:
    folder = tmp_path_factory.mktemp("sensitivity")
    job = build_job(tiny_knobs(tiny_data, folder) | {"NUM_LAYERS": "2"})
    for _ in range(20):
        train_gpt.train_step(job, 1.0, 0.9)
    state = {name: t.detach().clone() for name, t in job.model.state_dict().items()}
    train_gpt.write_checkpoint(folder / "model.safetensors", state, {"artifact_meta": job.meta})
    statistics = export_verbs.calibrate_state(
        state, job.meta, data=str(tiny_data.folder), tokenizer=str(tiny_data.tokenizer), device="cpu",
        tokens=int(CALIBRATION))
    return Case(folder / "model.safetensors", statistics, state, job.meta, tiny_data)


@dataclass(frozen=True)
class Made:
    output: Path
    found: dict[str, Any]
    lines: list[str]
    evaluations: int

    def file(self, end: str) -> Path:
        return Path(f"{self.output}.{end}")


class Counter:
    """Stands before train_gpt.evaluate; `stop_after` so many calls it is interrupted."""

    def __init__(self, stop_after: int = -1):
        self.calls, self.left, self.evaluate = 0, stop_after, train_gpt.evaluate

    def __call__(self, *args: Any, **kwargs: Any) -> train_gpt.EvalResult:
        if self.calls == self.left:
            raise KeyboardInterrupt
        self.calls += 1
        return self.evaluate(*args, **kwargs)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    found = Counter()
    monkeypatch.setattr(train_gpt, "evaluate", found)
    return found


@pytest.fixture(scope="module")
def made(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One whole map with statistics."""
    output, counter, said = tmp_path_factory.mktemp("map") / "map", Counter(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(train_gpt, "evaluate", counter)
        assert sensitivity.main(case.command(output, calibration_tokens=CALIBRATION)) == 0
    return Made(output, json.loads(Path(f"{output}.json").read_text()), said.getvalue().splitlines(), counter.calls)


def rounded_rows(w: Tensor, bits: int) -> Tensor:
    """The grid by hand: a step a row, from the quantile of its magnitudes, rounded to fp16."""
    limit = 2 ** (bits - 1) - 1
    clip = torch.quantile(w.abs(), export.CLIP_QUANTILE, dim=1)[:, None]
    step = (clip / limit).half().float()
    return (w.clamp(-clip, clip) / step).round().clamp(-limit, limit) * step


def loss_with(case: Case, changed: dict[str, Tensor]) -> float:
    """The validation loss, nats per token, of a model with these tensors: window by window."""
    model = train_gpt.GPT(train_gpt.shape_from_meta(case.meta), case.meta["train_seq_len"])
    model.load_state_dict(case.state | changed)
    seq_len, val = case.meta["train_seq_len"], torch.from_numpy(case.data.val.astype(np.int64))
    with torch.no_grad():
        losses = [model(val[i:i + seq_len][None], val[i + 1:i + seq_len + 1][None]).item()
                  for i in range(0, TOKENS, seq_len)]
    return sum(losses) / len(losses)


def point(found: dict[str, Any], name: str, bits: int, kind: str = "points", of: str = "tensors") -> dict[str, Any]:
    return next(p for p in found[of][name][kind] if p["bits"] == bits)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured.
# ----------------------------------------------------------------------------------------------------------------------


def test_the_map_holds_every_matrix_family_and_width(case: Case, made: Made) -> None:
    found = made.found
    assert (found["format"], found["split"], found["tokens"]) == (1, "val", TOKENS)
    assert found["checkpoint_digest"] == export.weights_digest(case.state)
    assert {name: tuple(about["shape"]) for name, about in found["tensors"].items()} == {
        name: tuple(w.shape) for name, w in case.matrices.items()}
    assert list(found["families"]) == ["embedding", "attn q", "attn k", "attn v", "attn proj", "mlp fc", "mlp proj"]
    assert sorted(n for about in found["families"].values() for n in about["members"]) == sorted(case.matrices)
    for about in (*found["tensors"].values(), *found["families"].values()):
        assert tuple(p["bits"] for p in about["points"]) == tuple(p["bits"] for p in about["residual"]) == BITS
        assert {p["rank"] for p in about["residual"]} == {1}
        assert about["keep_float"]["bits"] == 16


@pytest.mark.parametrize("name", ["tok_emb.weight", Q, "blocks.0.mlp.proj.weight"])
@pytest.mark.parametrize("bits", BITS)
def test_the_increase_of_one_matrix_is_that_of_a_plain_implementation(case: Case, made: Made, name: str, bits: int) -> None:
    q, found = rounded_rows(case.state[name], bits), point(made.found, name, bits)
    assert made.found["base_loss"] == pytest.approx(loss_with(case, {}), abs=1e-6)
    assert found["nats"] == pytest.approx(loss_with(case, {name: q}) - loss_with(case, {}), abs=2e-6)
    w = case.state[name].double()
    assert found["relative_error"] == pytest.approx(float((w - q).square().sum() / w.square().sum()), rel=1e-3)


def test_a_family_is_measured_as_one(case: Case, made: Made) -> None:
    members = made.found["families"]["mlp fc"]["members"]
    changed = {name: rounded_rows(case.state[name], 2) for name in members}
    found = point(made.found, "mlp fc", 2, of="families")
    assert len(members) == 2
    assert found["nats"] == pytest.approx(loss_with(case, changed) - loss_with(case, {}), abs=2e-6)
    assert found["bytes"] == sum(point(made.found, name, 2)["bytes"] for name in members)
    error = sum(float((case.state[name] - q).double().square().sum()) for name, q in changed.items())
    energy = sum(float(case.state[name].double().square().sum()) for name in members)
    assert found["relative_error"] == pytest.approx(error / energy, rel=1e-3)


def test_keeping_one_matrix_is_measured_against_everything_at_the_base_width(case: Case, made: Made) -> None:
    changed = {name: rounded_rows(w, BASE_BITS) for name, w in case.matrices.items()}
    kept = {**changed, Q: case.state[Q].half().float()}
    found = made.found["tensors"][Q]["keep_float"]
    assert made.found["base_bits_loss"] == pytest.approx(loss_with(case, changed), abs=1e-6)
    assert found["nats"] == pytest.approx(loss_with(case, changed) - loss_with(case, kept), abs=2e-6)
    assert found["bytes"] <= 2 * case.state[Q].numel()


def test_a_residual_is_the_leading_singular_pair_of_the_error(case: Case, made: Made) -> None:
    for name in case.matrices:
        q = rounded_rows(case.state[name], 2).double()
        error = case.state[name].double() - q
        spectrum = torch.linalg.svdvals(error).square()
        best = float(spectrum[1:].sum() / case.state[name].double().square().sum())
        found = point(made.found, name, 2, "residual")["relative_error"]
        plain = point(made.found, name, 2)["relative_error"]
        # int8 factors and a few power iterations leave a little of what the best pair removes
        assert best * (1 - 1e-6) <= found <= best + 0.3 * (plain - best)
        assert point(made.found, name, 2, "residual")["bytes"] > point(made.found, name, 2)["bytes"]


def test_more_bits_err_less_and_take_more_bytes(made: Made) -> None:
    for about in (*made.found["tensors"].values(), *made.found["families"].values()):
        for kind in ("points", "residual"):
            rows = [*about[kind], about["keep_float"]]
            for coarse, fine in pairwise(rows):
                assert fine["relative_error"] < coarse["relative_error"] / 3
                assert fine["bytes"] > coarse["bytes"]


def test_bytes_are_those_of_an_artifact(case: Case, made: Made) -> None:
    """One matrix, exported by itself at 4 bits: the streams of codes and scales."""
    options = export.ExportOptions(int8_scale_floor=0.0, weight_quantization_bits=4, int8_keep_float_max_numel=0)
    parts = export.encode_artifact({Q: case.state[Q]}, {}, options).report.parts
    found = point(made.found, Q, 4)
    assert found["bytes"] == pytest.approx(parts[f"codes:{Q}"] + parts["scales"], rel=0.01)
    half = made.found["tensors"][Q]["keep_float"]
    assert found["nats_per_byte"] == pytest.approx(found["nats"] / (half["bytes"] - found["bytes"]))
    assert half["nats_per_byte"] == pytest.approx(half["nats"] / (half["bytes"] - found["bytes"]))


def test_the_model_is_left_as_it_was(case: Case, made: Made) -> None:
    """A trial leaves nothing behind for the next one."""
    args = sensitivity.arguments(case.command(made.output))
    evaluation = sensitivity.open_evaluation(args, case.state, case.meta)
    zeros = {name: torch.zeros_like(w) for name, w in case.matrices.items()}
    assert evaluation.loss(zeros) != evaluation.loss({}) == made.found["base_loss"]


# ----------------------------------------------------------------------------------------------------------------------
# The estimate.
# ----------------------------------------------------------------------------------------------------------------------


def test_the_estimate_is_the_second_order_one(case: Case, made: Made) -> None:
    terms = case.statistics.terms
    for name, bits in ((Q, 2), ("tok_emb.weight", 4)):
        error = (case.state[name] - rounded_rows(case.state[name], bits)).double()
        total = 0.0
        for term in terms[name]:
            e = error.T if term.transposed else error
            for row, weight in zip(e, term.rows.tolist(), strict=True):
                total += 0.5 * weight * float(row @ term.moment.double() @ row)
        assert point(made.found, name, bits)["expected_nats"] == pytest.approx(total, rel=1e-3)


def test_cheap_evaluates_nothing_and_is_no_plan(
    case: Case, made: Made, counter: Counter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = case.command(tmp_path / "map", calibration_tokens=CALIBRATION)
    assert sensitivity.main([*flags, "--cheap"]) == 0
    found = json.loads((tmp_path / "map.json").read_text())
    assert counter.calls == 0
    assert found["base_loss"] is None
    assert point(found, Q, 2) | {"nats": 0, "nats_per_byte": 0} == point(made.found, Q, 2) | {"nats": 0, "nats_per_byte": 0}
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert "not measured" in capsys.readouterr().out
    with pytest.raises(export.ArtifactError, match="sensitivity map: found TypeError"):
        read_sensitivity(tmp_path / "map.json", export.shapes_of(case.state))


@pytest.mark.parametrize(("a", "b", "wanted"), [
    ([1, 2, 3], [10, 20, 15], 0.5),                         # 1 - 6 (0 + 1 + 1) / (3 * 8)
    ([1, 2, 3, 4], [-1, -2, -3, -9], -1.0),
    ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),               # ranks 1.5 1.5 3 against 1 2 3
    ([5, 5, 7, 7], [1, 2, 2, 3], 3 / math.sqrt(4 * 4.5)),   # ranks 1.5 1.5 3.5 3.5 against 1 2.5 2.5 4
    ([1, 1], [1, 2], math.nan),
    ([1], [1], math.nan),
])
def test_spearman_by_hand(a: list[float], b: list[float], wanted: float) -> None:
    assert sensitivity.spearman(a, b) == pytest.approx(wanted, nan_ok=True)


def test_the_agreement_counts_what_rose(made: Made) -> None:
    pairs = [(p["nats"], p["expected_nats"]) for about in made.found["tensors"].values() for p in about["points"]
             if p["nats"] > 0]
    wanted = sensitivity.spearman(*zip(*pairs, strict=True))
    assert f"spearman:{wanted:.4f} n:{len(pairs)}" in made.lines
    assert any(line.startswith("spearman_2_bits:") for line in made.lines)
    assert wanted > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Cut, finished, read again.
# ----------------------------------------------------------------------------------------------------------------------


def test_each_loss_is_evaluated_once(made: Made) -> None:
    """Two models and, for each target, every width with and without residual and the kept one; one family is one matrix."""
    targets = len(made.found["tensors"]) + len(made.found["families"]) - 1
    assert made.evaluations == 2 + targets * (2 * len(BITS) + 1)


def test_a_finished_run_evaluates_nothing(case: Case, made: Made, counter: Counter) -> None:
    before = {end: made.file(end).read_bytes() for end in ("json", "csv", "cache.jsonl")}
    assert sensitivity.main(case.command(made.output, calibration_tokens=CALIBRATION)) == 0
    assert counter.calls == 0
    assert {end: made.file(end).read_bytes() for end in before} == before


@pytest.mark.parametrize("cut", [0, 25], ids=["between lines", "inside a line"])
def test_a_cut_run_goes_on(case: Case, made: Made, counter: Counter, tmp_path: Path, cut: int) -> None:
    lines = made.file("cache.jsonl").read_bytes().splitlines(keepends=True)
    half = lines[:len(lines) // 2]
    (tmp_path / "map.cache.jsonl").write_bytes(b"".join(half)[:-cut or None])
    assert sensitivity.main(case.command(tmp_path / "map", calibration_tokens=CALIBRATION)) == 0
    kept = half[:-1] if cut else half
    assert counter.calls == made.evaluations - sum(b'"of": "loss ' in line for line in kept) > 0
    assert (tmp_path / "map.json").read_bytes() == made.file("json").read_bytes()
    assert len(sensitivity.Cache(tmp_path / "map.cache.jsonl").values) == len(lines)     # none lost, none twice


def test_an_interrupt_keeps_what_was_measured(
    case: Case, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_gpt, "evaluate", Counter(stop_after=7))
    assert sensitivity.main(case.command(tmp_path / "map")) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.cache.jsonl"]
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "map.cache.jsonl").read_text().count('"of": "loss ') == 7


@pytest.mark.parametrize("change", ["weights", "tokens", "max_tokens"])
def test_a_cache_of_something_else_is_not_used(
    case: Case, made: Made, counter: Counter, tmp_path: Path, change: str
) -> None:
    (tmp_path / "map.cache.jsonl").write_bytes(made.file("cache.jsonl").read_bytes())
    flags = case.command(tmp_path / "map", bits="8", residual_rank="0", **{
        "max_tokens": {"max_tokens": "128"}, "tokens": {"split": "train"}, "weights": {}}[change])
    if change == "weights":
        state = case.state | {"skip_weights": case.state["skip_weights"] + 0.01}
        flags[0] = str(tmp_path / "other.safetensors")
        train_gpt.write_checkpoint(Path(flags[0]), state, {"artifact_meta": case.meta})
    assert sensitivity.main(flags) == 0
    assert counter.calls == 2 + 2 * (len(case.matrices) + 6)
    assert json.loads((tmp_path / "map.json").read_text())["base_loss"] != made.found["base_loss"]


def test_the_table_has_a_row_for_each_measurement(made: Made) -> None:
    with made.file("csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (len(made.found["tensors"]) + len(made.found["families"])) * (2 * len(BITS) + 1)
    row = next(r for r in rows if (r["name"], r["measurement"], r["bits"]) == (Q, "residual", "4"))
    wanted = point(made.found, Q, 4, "residual")
    assert (float(row["nats"]), int(row["bytes"]), row["rank"]) == (wanted["nats"], wanted["bytes"], "1")


def test_only_a_map_of_training_tokens_may_plan(
    case: Case, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "only a map of --split train may plan an artifact" in made.lines[-1]
    with pytest.raises(export.ArtifactError, match="found one measured on the val split"):
        read_sensitivity(made.file("json"), export.shapes_of(case.state))
    assert sensitivity.main(case.command(tmp_path / "map", split="train", residual_rank="0")) == 0
    assert "(may plan an artifact)" in capsys.readouterr().out.splitlines()[-1]
    found = json.loads((tmp_path / "map.json").read_text())
    read = read_sensitivity(tmp_path / "map.json", export.shapes_of(case.state))
    assert found["split"] == "train"
    p = point(found, "tok_emb.weight", 2)
    assert read.loss("tok_emb.weight", p["relative_error"]) == pytest.approx(p["nats"], rel=1e-6)
    assert found["tensors"][Q]["residual"] == []


@pytest.mark.parametrize(("name", "family"), [
    ("tok_emb.weight", "embedding"), ("blocks.10.attn.c_v.weight", "attn v"), ("blocks.3.attn.proj.weight", "attn proj"),
    ("blocks.3.mlp.proj.weight", "mlp proj"), ("lm_head.weight", "head"), ("embed_proj.weight", "other"),
])
def test_families(name: str, family: str) -> None:
    assert sensitivity.family_of(name) == family


def test_matrices_come_in_the_order_of_their_blocks() -> None:
    state = {f"blocks.{b}.w": torch.ones(2, 2) for b in (10, 2)}
    state |= {"blocks.1.resid_mix": torch.ones(2, 2), "v": torch.ones(2)}
    assert list(sensitivity.matrices_of(state)) == ["blocks.2.w", "blocks.10.w"]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input.
# ----------------------------------------------------------------------------------------------------------------------


def with_a_nan(case: Case, folder: Path) -> str:
    broken = case.state[Q].clone()
    broken[1, 2] = math.nan
    train_gpt.write_checkpoint(folder / "nan.safetensors", case.state | {Q: broken}, {"artifact_meta": case.meta})
    return str(folder / "nan.safetensors")


BAD = {
    "no checkpoint": (lambda case, f: {0: str(f / "none")}, "none"),
    "text as checkpoint": (lambda case, f: {0: str(case.data.folder / "manifest.json")}, "checkpoint"),
    "nan": (lambda case, f: {0: with_a_nan(case, f)}, f"{Q} beyond half precision"),
    "other tokenizer": (lambda case, f: {"tokenizer": "OTHER"}, "is not the artifact's"),
    "no tokenizer": (lambda case, f: {"tokenizer": str(f / "none")}, "none"),
    "no data": (lambda case, f: {"data": str(f)}, "no fineweb_val_*.bin"),
    "few tokens": (lambda case, f: {"max_tokens": "31"}, "one sequence needs 33"),
    "negative tokens": (lambda case, f: {"max_tokens": "-1"}, "--max-tokens must be at least 0, got -1"),
    "one bit": (lambda case, f: {"bits": "1,2"}, "bits must be in 2..8, got 1,2"),
    "nine bits": (lambda case, f: {"bits": "9"}, "bits must be in 2..8, got 9"),
    "no bits": (lambda case, f: {"bits": ""}, "bits must be in 2..8"),
    "base bits": (lambda case, f: {"base_bits": "16"}, "--base-bits"),
    "rank": (lambda case, f: {"residual_rank": "33"}, "--residual-rank must be in 0..32, got 33"),
    "negative calibration": (lambda case, f: {"calibration_tokens": "-1"}, "--calibration-tokens must be at least 0"),
    "much calibration": (lambda case, f: {"calibration_tokens": "99999999"}, "training tokens, calibration wants"),
    "test split": (lambda case, f: {"split": "test"}, "--split"),
    "device": (lambda case, f: {"device": "abacus"}, "DEVICE"),
    "nowhere to write": (lambda case, f: {"o": None, "output": str(f / "none" / "map")}, "is no folder"),
    "no data flag": (lambda case, f: {"data": None}, "the following arguments are required: --data"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: Case, fault: str, counter: Counter, other_sp_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    given.mkdir()
    out.mkdir()
    changes = BAD[fault][0](case, given)
    checkpoint = changes.pop(0, None)
    changes = {k: str(other_sp_tokenizer) if v == "OTHER" else v for k, v in changes.items()}
    flags = case.command(out / "map", **changes)
    flags[0] = checkpoint or flags[0]
    try:
        code = sensitivity.main(flags)
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("sensitivity.py: ")
    assert BAD[fault][1] in said.err
    assert list(out.iterdir()) == []
    assert counter.calls == 0


@pytest.mark.parametrize("missing", ["matplotlib", "calibration"])
def test_what_is_missing_is_said_before_any_work(
    case: Case, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = case.command(tmp_path / "map")
    if missing == "matplotlib":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        wanted = "sensitivity.py: the picture needs matplotlib, which is not installed\n"
    else:
        flags, wanted = [*flags, "--cheap"], "sensitivity.py: --cheap needs --calibration-tokens\n"
    flags[0] = "never read"
    with pytest.raises(SystemExit, match="2"):
        sensitivity.main(flags)
    assert capsys.readouterr().err == wanted
    assert list(tmp_path.iterdir()) == []
