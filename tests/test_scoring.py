"""Overlapping windows and the frame of the evaluation's modes.

    bash scripts/test.sh tests/test_scoring.py

Guarantees: windows score each target exactly once with the context that the knobs promise, against a slow layout in plain
Python; the passes made for them give what the whole model gives for every variant of the network, to 1e-5 nats; isolation
resets at BOS; the nats are the same bits for any number of ranks and after an interruption, and the same to 1e-5 for any
batch; the lines and summary.json of a run, EVAL_ARTIFACT and `export.py eval` agree; knobs that cannot work are refused;
unset, nothing is imported.
"""
from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, CPU_BF16, ROOT, VARIANTS, TinyData, fill, filled_model, run_two_ranks, tiny_knobs, tiny_shape

import export
import train_gpt
from train_gpt import GPT, ByteTable, Config, build_model, evaluate, load_model, rope_tables

sys.path.insert(0, str(ROOT / "scripts"))

import compare_modes
import export_verbs
import scoring
import window_pass

BOS = 1
Begins = dict[int, int]


# --- windows ------------------------------------------------------------------------------------------------------------


def slow_layout(tokens: int, length: int, stride: int, starts: list[int]) -> Begins:
    """The first input of each target's window, target by target and window by window."""
    begins: Begins = {}
    edges = sorted({0, *starts})
    for a, z in zip(edges, [*edges[1:], tokens - 1], strict=True):      # z is the stretch's last target
        scored = a
        while scored < z:
            new = length if scored == a else stride
            upto = min(scored + new, z)
            for target in range(scored + 1, upto + 1):
                assert target not in begins
                begins[target] = max(a, scored + new - length)
            scored = upto
    return begins


def begins_of(windows: np.ndarray) -> Begins:
    found: Begins = {}
    for begin, first, stop in windows.tolist():
        for target in range(first, stop):
            assert target not in found, "scored twice"
            found[target] = begin
    return found


def random_layouts() -> list[tuple[int, int, int, list[int]]]:
    rng = random.Random(5)
    edge = [(2, 1, 1, []), (2, 9, 3, [0]), (3, 1, 1, [0, 1, 2]), (50, 7, 7, [0, 49]), (50, 64, 1, []), (9, 8, 8, []),
            (10, 8, 8, [])]
    return edge + [(n := rng.randint(2, 300), length := rng.randint(1, 40), rng.randint(1, length),
                    sorted(rng.sample(range(n), rng.randint(0, min(n, 12))))) for _ in range(400)]


def test_windows_are_those_of_the_slow_layout_and_score_each_target_once() -> None:
    for n, length, stride, starts in random_layouts():
        windows = scoring.layout(n, length, stride, starts)
        found = begins_of(windows)
        assert found == slow_layout(n, length, stride, starts), (n, length, stride, starts)
        assert sorted(found) == list(range(1, n))
        assert (windows[:, 2] - 1 - windows[:, 0]).max() <= length


def test_every_target_has_the_promised_context_where_its_document_has_it() -> None:
    for n, length, stride, starts in random_layouts():
        for target, begin in begins_of(scoring.layout(n, length, stride, starts)).items():
            own = max((a for a in (0, *starts) if a < target), default=0)     # a BOS target belongs to what it ends
            assert own <= begin
            assert target - begin >= min(length - stride + 1, target - own)


def test_the_batches_of_windows_hold_each_of_them_once_however_they_are_cut() -> None:
    for n, length, stride, starts in random_layouts()[::12]:
        windows = scoring.layout(n, length, stride, starts)
        for budget, granule, full in ((1, 1, False), (100, 1, False), (100, 5, True), (10**6, 7, True)):
            seen = np.concatenate([b.targets[b.scored] for b in scoring.batches(windows, budget, granule, full)])
            assert sorted(seen.tolist()) == list(range(1, n))


# --- scores -------------------------------------------------------------------------------------------------------------


def text(n: int = 170, vocab: int = 61) -> np.ndarray:
    ids = np.random.default_rng(3).integers(2, vocab, n).astype(np.uint16)
    ids[[0, 3, 4, 60, 95]] = BOS
    return ids


def table(vocab: int = 61) -> ByteTable:
    return ByteTable(torch.arange(vocab) % 5 + 1, torch.arange(vocab) % 3 == 0, torch.arange(vocab) < 2)


def evaluation(model: GPT, tokens: np.ndarray | None = None, kept: Path | None = None, lines: list[str] | None = None,
               **knobs: Any) -> scoring.Evaluation:
    cfg = replace(Config(), train_seq_len=24, **knobs)
    log = print if lines is None else lines.append
    return scoring.Evaluation(model, CPU, text() if tokens is None else tokens, table(), BOS, cfg, log, kept)


def naive(model: GPT, tokens: np.ndarray, length: int, stride: int, starts: list[int]) -> np.ndarray:
    """Nats of each target: its window alone through the whole model."""
    found = np.zeros(tokens.size - 1)
    ids = torch.from_numpy(tokens.astype(np.int64))
    begins = slow_layout(tokens.size, length, stride, starts)
    with torch.no_grad():
        for begin in set(begins.values()):
            mine = [target for target, b in begins.items() if b == begin]
            x, y = ids[None, begin:max(mine)], ids[None, begin + 1:max(mine) + 1]
            nats = model(x, y, reduction="none")[0]
            for target in mine:
                found[target - 1] = nats[target - begin - 1]
    return found


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("isolated", [False, True])
def test_scores_are_those_of_every_window_alone_through_the_whole_model(name: str, isolated: bool) -> None:
    model, tokens = filled_model(tiny_shape(**VARIANTS[name])), text()
    starts = np.flatnonzero(tokens == BOS).tolist() if isolated else []
    for stride in (8, 5):
        ev = evaluation(model, eval_stride=stride, eval_doc_isolated=isolated, sw_eval_batch=3)
        assert np.abs(ev.own.nats - naive(model, tokens, 24, stride, starts)).max() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rt", [CPU, CPU_BF16])
def test_the_last_places_alone_get_what_the_whole_model_gives_them(name: str, rt: train_gpt.Runtime) -> None:
    model = build_model(tiny_shape(**VARIANTS[name]), rt, 32)
    fill(model)
    ids = torch.from_numpy(text()[:96].astype(np.int64)).view(4, 24)
    with torch.no_grad(), rt.autocast():
        whole = model.features(ids)
        for last in (1, 7, 24):
            mine = window_pass.WindowPass(model).features(ids, last, 0)
            assert torch.allclose(mine.view(4, last, -1), whole[:, -last:], atol=1e-6 if rt is CPU else 0.03)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_first_layer_shared_by_windows_is_that_of_each_alone(name: str) -> None:
    model, tokens = filled_model(tiny_shape(**VARIANTS[name])), torch.from_numpy(text().astype(np.int64))
    with torch.inference_mode():
        fast = window_pass.FloatPass(model)
        ids = torch.stack([tokens[6 * i:6 * i + 24] for i in range(5)])
        assert torch.allclose(fast.features(ids, 6, 6), model.features(ids)[:, -6:].flatten(0, 1), atol=1e-5)
        assert torch.allclose(fast.features(ids, 0, 0), model.features(ids).flatten(0, 1), atol=1e-5)


def test_logits_too_large_to_sum_as_they_are_take_the_other_path() -> None:
    model, tokens = filled_model(tiny_shape(logit_softcap=200.0)), text()
    with torch.no_grad():
        model.tok_emb.weight.mul_(200)
        logits = model.logits(model.features(torch.from_numpy(tokens[None, :24].astype(np.int64))))
    assert logits.max() > 100               # e^100 is no float32
    ev = evaluation(model, eval_stride=8)
    assert np.allclose(ev.own.nats, naive(model, tokens, 24, 8, []), rtol=1e-5, atol=1e-4)


def test_scores_too_large_to_sum_as_they_are_take_the_other_path() -> None:
    model = filled_model(tiny_shape())
    for block in model.blocks:
        torch.nn.init.constant_(block.attn.q_gain, 100.0)      # type: ignore[union-attr, arg-type]
    assert not window_pass.FloatPass(model).shares
    ev = evaluation(model, eval_stride=8)
    assert np.abs(ev.own.nats - naive(model, text(), 24, 8, [])).max() < 1e-4


def test_windows_of_a_model_that_looks_back_less_far_overlap_less_for_the_same_scores() -> None:
    model = filled_model(tiny_shape(window_size=3))
    ev = evaluation(model, eval_stride=2)
    assert ev.forward.reach == 9
    assert len(ev.windows) < 0.2 * len(scoring.layout(170, 24, 2))
    assert np.abs(ev.own.nats - naive(model, text(), 24, 2, [])).max() < 1e-5


def test_side_by_side_windows_score_what_the_plain_evaluator_scores() -> None:
    model, tokens = filled_model(tiny_shape()), text()
    plain = evaluate(lambda x, y: model(x, y, reduction="none"), tokens, table(), CPU, seq_len=24, batch_tokens=48)
    ev = evaluation(model, eval_stride=24)
    both = slice(0, plain.tokens)
    assert plain.tokens == 168
    assert ev.own.nats[both].sum(dtype=np.float64) == pytest.approx(plain.val_loss * plain.tokens, abs=1e-4)
    assert ev.bytes[both].sum() == plain.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_longer_windows_than_the_training_had_get_the_tables_of_a_model_built_for_them(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    shape = tiny_shape(rope_dtype=name)
    meta = {"model": vars(shape), "train_seq_len": 24}
    state = filled_model(shape).state_dict()
    model = load_model(state, meta, CPU, 640)
    cos, sin = rope_tables(640, shape.head_dim, shape.rope_base, dtype)
    assert model.cos.dtype is dtype
    assert torch.equal(model.cos, cos)
    assert torch.equal(model.sin, sin)
    assert torch.equal(load_model(state, meta, CPU).cos, cos[:24])
    tokens = np.resize(text(), 700)
    ev = evaluation(model, tokens, eval_stride=300, eval_seq_len=600)
    longer = GPT(shape, 640, rope_dtype=dtype)
    longer.load_state_dict(state)
    assert np.abs(ev.own.nats - naive(longer, tokens, 600, 300, [])).max() < 2e-5


def test_isolated_scores_depend_on_their_own_document_alone() -> None:
    model, tokens = filled_model(tiny_shape()), text()
    changed = tokens.copy()
    changed[90:95] = 7                                  # the end of a document; position 95 holds a BOS
    for isolated in (True, False):
        a, b = (evaluation(model, t, eval_stride=8, eval_doc_isolated=isolated).own.nats for t in (tokens, changed))
        assert np.array_equal(a[:89], b[:89])           # nothing looks ahead
        assert not np.array_equal(a[89:95], b[89:95])   # the BOS itself is predicted from the document that it ends
        assert np.array_equal(a[95:], b[95:]) == isolated


def test_the_size_of_a_batch_changes_rounding_alone() -> None:
    model = filled_model(tiny_shape())
    for isolated in (False, True):
        whole = evaluation(model, eval_stride=6, eval_doc_isolated=isolated).own.nats
        for rows in (1, 2, 5, 1000):
            mine = evaluation(model, eval_stride=6, eval_doc_isolated=isolated, sw_eval_batch=rows).own.nats
            assert np.abs(mine - whole).max() < 1e-5


def test_the_few_shapes_of_compiled_graphs_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt.Runtime, "compile", lambda self, function: function)
    model = filled_model(tiny_shape())
    for isolated in (False, True):
        ev = evaluation(model, eval_stride=6, eval_doc_isolated=isolated, sw_eval_batch=4)
        plain = ev.own.nats
        ev = replace(ev, rt=replace(CPU, compiled=True))
        assert np.abs(ev.own.nats - plain).max() < 1e-5
        shapes = {(b.windows.shape[0], b.length, b.last) for b in ev.batches(ev.windows)}
        assert len(shapes) <= 5


def test_distributions_are_those_that_the_targets_were_scored_with() -> None:
    for variant in ("baseline", "everything"):
        ev = evaluation(filled_model(tiny_shape(**VARIANTS[variant])), eval_stride=6, eval_doc_isolated=True)
        targets = [1, 169, 40, 41, 95, 12, 40]
        log_p = ev.distributions(targets)
        assert torch.allclose(log_p.exp().sum(1), torch.ones(7), atol=1e-5)
        mine = -log_p[torch.arange(7), torch.from_numpy(ev.tokens[targets].astype(np.int64))]
        assert np.abs(mine.numpy() - ev.own.nats[np.array(targets) - 1]).max() < 1e-5


# --- ranks and interruptions --------------------------------------------------------------------------------------------

WORKER = """
import os, sys
import numpy as np
sys.path[:0] = [sys.argv[2] + "/tests", sys.argv[2]]
import torch
from dataclasses import replace
from pathlib import Path
from conftest import CPU, filled_model, tiny_shape
import test_scoring
torch.set_num_threads(1)
rt = replace(CPU, rank=int(os.environ["RANK"]), world_size=2)
rt.start("auto")
lines = []
for isolated in (False, True):      # behind sections that one rank finished, and from the start
    ev = test_scoring.evaluation(filled_model(tiny_shape()), None, Path(sys.argv[1], "kept"), lines, eval_stride=6,
                                 eval_doc_isolated=isolated, sw_eval_batch=2)
    np.save(f"{sys.argv[1]}/{rt.rank}_{int(isolated)}.npy", replace(ev, rt=rt).own.nats)
Path(f"{sys.argv[1]}/{rt.rank}.txt").write_text("\\n".join(lines))
rt.stop()
"""


def test_two_ranks_give_the_bits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "kept", 9, monkeypatch)
    run_two_ranks(WORKER, tmp_path)
    assert re.fullmatch(r"sliding_window: 9 of \d+ sections were scored before, in \S+", (tmp_path / "0.txt").read_text())
    for isolated in (False, True):
        alone = evaluation(filled_model(tiny_shape()), eval_stride=6, eval_doc_isolated=isolated, sw_eval_batch=2).own.nats
        for rank in range(2):
            assert np.array_equal(np.load(tmp_path / f"{rank}_{int(isolated)}.npy"), alone)


class Killed(Exception):
    pass


def interrupted(kept: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that dies in its batch number `after`."""
    real, calls = scoring.Evaluation.run_batch, iter(range(after))

    def run_batch(self: scoring.Evaluation, *given: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise Killed
        return real(self, *given)

    ev = evaluation(filled_model(tiny_shape()), kept=kept, eval_stride=6, sw_eval_batch=2)
    with monkeypatch.context() as patch:
        patch.setattr(scoring.Evaluation, "run_batch", run_batch)
        with pytest.raises(Killed):
            ev.score_windows("sliding_window", ev.windows)


def resumed(kept: Path, monkeypatch: pytest.MonkeyPatch, tokens: np.ndarray | None = None
            ) -> tuple[np.ndarray, int, list[str]]:
    """(nats, batches that it took, lines) of the same evaluation called again."""
    real, lines, calls = scoring.Evaluation.run_batch, list[str](), list[int]()

    def run_batch(self: scoring.Evaluation, *given: Any) -> torch.Tensor:
        calls.append(1)
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(scoring.Evaluation, "run_batch", run_batch)
        ev = evaluation(filled_model(tiny_shape()), tokens, kept, lines, eval_stride=6, sw_eval_batch=2)
        return ev.own.nats, len(calls), lines


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, batches, _ = resumed(tmp_path / "a", monkeypatch)
    interrupted(tmp_path / "b", 9, monkeypatch)
    assert len(list((tmp_path / "b").iterdir())) == 9
    nats, again, lines = resumed(tmp_path / "b", monkeypatch)
    assert np.array_equal(nats, whole)
    assert again == batches - 9
    assert lines == [f"sliding_window: 9 of {batches} sections were scored before, in {tmp_path / 'b'}"]
    assert list(tmp_path.iterdir()) == []       # sections go when all are there


def test_sections_of_another_evaluation_count_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = text()
    other[5] = 9
    fresh, batches, _ = resumed(tmp_path / "a", monkeypatch, other)
    interrupted(tmp_path / "b", 9, monkeypatch)
    nats, again, lines = resumed(tmp_path / "b", monkeypatch, other)
    assert np.array_equal(nats, fresh)
    assert again == batches
    assert lines == [f"{tmp_path / 'b' / 'sliding_window_000.safetensors'} is damaged or of another evaluation (weights,"
                     " text, knobs or code differ): scored anew"]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_section_is_scored_anew(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, batches, _ = resumed(tmp_path / "a", monkeypatch)
    interrupted(tmp_path / "b", 9, monkeypatch)
    path = tmp_path / "b" / "sliding_window_004.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-3], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[how])
    nats, again, lines = resumed(tmp_path / "b", monkeypatch)
    assert np.array_equal(nats, whole)
    assert again == batches - 4
    assert lines[0].startswith(f"{path} is damaged or of another evaluation")


@pytest.mark.parametrize("change", [
    {"eval_stride": 7}, {"eval_doc_isolated": True}, {"sw_eval_batch": 3}, {"eval_seq_len": 30}])
def test_each_knob_is_part_of_the_fingerprint(change: dict[str, Any]) -> None:
    model = filled_model(tiny_shape())
    same: dict[str, Any] = {"eval_stride": 6, "sw_eval_batch": 2}
    other = same | change
    assert evaluation(model, **same).fingerprint == evaluation(model, **same).fingerprint
    assert evaluation(model, **same).fingerprint != evaluation(model, **other).fingerprint


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> tuple[dict[str, str], Path]:
    """A run scored by windows of twice its training's length."""
    folder = tmp_path_factory.mktemp("run")
    env = tiny_knobs(tiny_data, folder) | {"EVAL_STRIDE": "8", "EVAL_SEQ_LEN": "64", "EVAL_DOC_ISOLATED": "1"}
    assert train_gpt.main(env) == 0
    return env, folder / "logs" / "tiny"


def lines_of(text: str) -> list[str]:
    return re.findall(r"^final_.*$", text, re.MULTILINE)


def test_a_run_prints_the_lines_of_its_modes_below_the_plain_ones_and_sums_them_up(run_folder, tiny_data: TinyData) -> None:
    _, folder = run_folder
    plain, plain_exact, line, exact = lines_of((folder / "train.log").read_text())
    assert plain.startswith("final_int8_zlib_roundtrip val_loss:")
    assert plain_exact.startswith("final_int8_zlib_roundtrip_exact val_loss:")
    assert re.fullmatch(r"final_int8_zlib_sliding_window_doc_isolated val_loss:\d\.\d{4} val_bpb:\d\.\d{4} stride:8"
                        r" seq_len:64 eval_time:\d+ms", line)
    found = json.loads((folder / "summary.json").read_text())
    mode = found["eval_modes"]["sliding_window_doc_isolated"]
    assert exact == (f"final_int8_zlib_sliding_window_doc_isolated_exact val_loss:{mode['val_loss']:.8f}"
                     f" val_bpb:{mode['val_bpb']:.8f}")
    assert (mode["tokens"], mode["stride"], mode["seq_len"]) == (tiny_data.val.size - 1, 8, 64)
    assert mode["bytes"] == sum(len(t.encode()) for t in tiny_data.val_texts)
    assert found["seconds"]["eval_modes"] >= mode["seconds"] > 0
    assert not (folder / "eval_sections").exists()


def test_an_artifact_alone_gives_the_lines_of_its_run(run_folder, capsys: pytest.CaptureFixture[str]) -> None:
    env, folder = run_folder
    wanted = [line for line in lines_of((folder / "train.log").read_text()) if "_exact " in line]
    again = env | {"RUN_ID": "again", "EVAL_ARTIFACT": str(folder / "final_model.int8.ptz")}
    assert train_gpt.main(again) == 0
    assert [line for line in lines_of(capsys.readouterr().out) if "_exact " in line] == wanted
    command = ["eval", str(folder / "final_model.int8.ptz"), "--data", env["DATA_PATH"], "--device", "cpu", "--tokenizer",
               env["TOKENIZER_PATH"], "EVAL_STRIDE=8", "--eval-seq-len", "64", "EVAL_DOC_ISOLATED=1"]
    assert export.main([*command, "--sections", str(folder / "kept")]) == 0
    assert [line for line in lines_of(capsys.readouterr().out) if "_exact " in line] == wanted
    assert not (folder / "kept").exists()


def test_ways_are_compared_by_the_scores_of_the_run(run_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    env, folder = run_folder
    way = "EVAL_STRIDE=8 EVAL_SEQ_LEN=64 EVAL_DOC_ISOLATED=1"
    made = export.decode_artifact((folder / "final_model.int8.ptz").read_bytes())
    train_gpt.write_checkpoint(tmp_path / "half.safetensors", {name: t / 2 for name, t in made.state.items()},
                               {"artifact_meta": made.meta})
    asked = [str(folder / "final_model.int8.ptz"), str(tmp_path / "half.safetensors"), "--data", env["DATA_PATH"],
             "--tokenizer", env["TOKENIZER_PATH"], "--device", "cpu", "-o", str(tmp_path / "out")]
    assert compare_modes.main([*asked, "--way", way]) == 0
    rows = [line.split(" | ") for line in (tmp_path / "out.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["plain", "sliding_window_doc_isolated"]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    scores = {(row["file"], name): score["val_bpb"] for row in found for name, score in row["scores"].items()}
    summary = json.loads((folder / "summary.json").read_text())
    of_run = [summary["roundtrip"]["val_bpb"], summary["eval_modes"]["sliding_window_doc_isolated"]["val_bpb"]]
    assert [scores[asked[0], row[1]] for row in rows] == pytest.approx(of_run, rel=1e-7)
    gaps = [1000 * (scores[path, rows[1][1]] - scores[path, "plain"]) for path in asked[:2]]
    assert rows[1][3] == f"{sum(gaps) / 2:+.1f} ({min(gaps):+.1f} .. {max(gaps):+.1f})"
    monkeypatch.setattr(export_verbs, "score_modes", None)      # all is there: nothing is evaluated again
    capsys.readouterr()
    assert compare_modes.main([*asked, "--way", way]) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "out.md").read_text().strip()
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"file": "half')
    with pytest.raises(SystemExit):
        compare_modes.main([*asked, "--way", way])
    assert "out.jsonl: line 5 is no result of this program" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    for wrong, message in (("EVAL_STRIDE=33", "EVAL_STRIDE must be at most EVAL_SEQ_LEN=32"), ("EVAL_STRIDE=0", "asks for")):
        with pytest.raises(SystemExit):
            compare_modes.main([*asked, "--way", wrong])
        assert message in capsys.readouterr().err


def test_a_cap_on_the_tokens_holds_for_the_windows_too(run_folder, tiny_data: TinyData, tmp_path: Path) -> None:
    env, folder = run_folder
    again = env | {"LOG_DIR": str(tmp_path), "EVAL_ARTIFACT": str(folder / "final_model.int8.ptz"), "VAL_MAX_TOKENS": "96",
                   "EVAL_DOC_ISOLATED": "0", "EVAL_STRIDE": "32", "EVAL_SEQ_LEN": "0"}
    assert train_gpt.main(again) == 0
    scores = [list(map(float, re.findall(r"val_\w+:(\S+)", line)))
              for line in lines_of((tmp_path / "tiny" / "train.log").read_text()) if "_exact " in line]
    assert scores[0] == pytest.approx(scores[1], rel=1e-7)      # 96 targets, in three windows side by side


def test_a_mode_is_a_row_and_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that halves the nats of the model's own score."""
    def score(ev: scoring.Evaluation) -> Any:
        yield scoring.Score("halved", ev.own.nats / 2, 1.5, {"weight": 0.5})

    monkeypatch.setitem(train_gpt.MODES, "eval_doc_isolated", "halving")
    monkeypatch.setattr(scoring, "tool", lambda name: scoring if name == "scoring" else SimpleNamespace(score=score))
    lines: list[str] = []
    ev = evaluation(filled_model(tiny_shape()), lines=lines, eval_stride=6, eval_doc_isolated=True)
    found = scoring.score_all(ev, "rd")
    assert list(found) == ["sliding_window_doc_isolated", "halved"]
    assert found["halved"]["val_bpb"] == pytest.approx(found["sliding_window_doc_isolated"]["val_bpb"] / 2)
    assert re.fullmatch(r"final_rd_halved val_loss:\S+ val_bpb:\S+ weight:0.5 eval_time:1500ms", lines[2])


@pytest.mark.parametrize(("knobs", "message"), [
    ({"EVAL_STRIDE": "33"}, "EVAL_STRIDE must be at most EVAL_SEQ_LEN=32, or targets would be left out, got 33"),
    ({"EVAL_STRIDE": "-1"}, "EVAL_STRIDE must be at least 0, got -1"),
    ({"EVAL_STRIDE": "64x"}, "EVAL_STRIDE must be a whole number, got '64x'"),
    ({"EVAL_STRIDE": "8", "EVAL_SEQ_LEN": "2000000"}, "EVAL_SEQ_LEN must be at most 1048576, got 2000000"),
    ({"EVAL_STRIDE": "8", "SW_EVAL_BATCH": "-2"}, "SW_EVAL_BATCH must be at least 0, got -2"),
    ({"EVAL_DOC_ISOLATED": "yes"}, "EVAL_DOC_ISOLATED must be 0 or 1, got 'yes'"),
    ({"EVAL_SEQ_LEN": "64"},
     "EVAL_SEQ_LEN asks for no score: set EVAL_STRIDE, EVAL_STRIDE=64 for windows side by side"),
    ({"SW_EVAL_BATCH": "4"},
     "SW_EVAL_BATCH asks for no score: set EVAL_STRIDE, EVAL_STRIDE=32 for windows side by side"),
    ({"EVAL_STRIDE": "8", "FINAL_ROUNDTRIP_EVAL": "0"},
     "EVAL_STRIDE: only an artifact that is evaluated is scored so; FINAL_ROUNDTRIP_EVAL must be 1"),
    ({"SW_EVAL_BACH": "4"}, "SW_EVAL_BACH is not a knob of this version, did you mean SW_EVAL_BATCH? Unset it to go on"),
])
def test_a_knob_that_cannot_work_is_refused_in_one_line(
        knobs: dict[str, str], message: str, tiny_env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_gpt.main(tiny_env | knobs) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_command_line_refuses_them_too(run_folder, capsys: pytest.CaptureFixture[str]) -> None:
    env, folder = run_folder
    command = ["eval", str(folder / "final_model.int8.ptz"), "--data", env["DATA_PATH"]]
    assert export.main([*command, "--tokenizer", env["TOKENIZER_PATH"], "EVAL_STRIDE=33"]) == 2
    assert capsys.readouterr() == (
        "", "export.py eval: EVAL_STRIDE must be at most EVAL_SEQ_LEN=32, or targets would be left out, got 33\n")


def test_these_knobs_may_change_when_a_run_is_resumed(run_folder) -> None:
    for name in train_gpt.MODES:
        assert Config.__dataclass_fields__[name].metadata["free"]
        assert Config.__dataclass_fields__[name].metadata["group"] == "Evaluation"


def test_with_the_knobs_at_their_defaults_nothing_is_imported(run_folder, tmp_path: Path) -> None:
    program = ("import os, sys, train_gpt; code = train_gpt.main(os.environ);"
               " print(code, sorted({'scoring', 'window_pass', 'sidecar', 'depth', 'ttt'} & sys.modules.keys()))")
    knobs = {name: value for name, value in run_folder[0].items() if name.lower() not in train_gpt.MODES}
    knobs |= {"LOG_DIR": str(tmp_path), "EVAL_ARTIFACT": str(run_folder[1] / "final_model.int8.ptz"), "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")} | knobs
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(lines_of(done.stdout)) == 2
    assert done.stdout.splitlines()[-1] == "0 []"
