"""Extra turns through shared blocks: what a turn is, that halting freezes a token and looks at its past alone, that a score
without turns is the plain one, and that the report adds up.

    bash scripts/test.sh tests/test_depth.py
"""
from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VARIANTS, TinyData, filled_model, run_two_ranks, tiny_knobs, tiny_shape
from test_scoring import BOS, Killed, evaluation, lines_of, naive, text

import export
import train_gpt
from train_gpt import GPT, Block, rms_norm

sys.path.insert(0, str(ROOT / "scripts"))

import depth
import scoring
from window_pass import WindowPass

SHARED = ["shared_blocks", "one_block", "everything"]
AT_ONCE = 2.5           # no normalised stream moves so far
SOME = {"shared_blocks": 0.115, "one_block": 0.13, "everything": 0.135}    # between the moves of different tokens


def shared(name: str) -> GPT:
    return filled_model(tiny_shape(**VARIANTS[name]))


def nats_and_turns(name: str, tokens: np.ndarray | None = None, **knobs: Any) -> np.ndarray:
    ev, forward = depth.deep(evaluation(shared(name), tokens, **knobs))
    return ev.score_windows("depth", ev.windows, forward.nats_and_turns, values=2)


def longer(name: str, loops: int) -> GPT:
    """The model with the layers of so many turns behind its own; its skips are used up where they begin."""
    model = copy.deepcopy(shared(name))
    unique, layers = len(model.blocks), len(model.layer_blocks)
    model.layer_blocks = [i % unique for i in range(layers + loops * unique)]
    return model


# --- turns and halting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "unique", "turn"), [(5, 2, [1, 0]), (4, 1, [0]), (4, 3, [1, 2, 0]), (6, 3, [0, 1, 2])])
def test_a_turn_goes_on_with_the_cycle_of_blocks(layers: int, unique: int, turn: list[int]) -> None:
    model = filled_model(tiny_shape(num_layers=layers, num_unique_blocks=unique))
    assert depth.DepthPass(model, 1, 0.0).turn == turn


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("loops", [1, 3])
def test_turns_without_halting_are_further_layers_without_skips(name: str, loops: int) -> None:
    found = nats_and_turns(name, eval_depth_loops=loops)
    assert np.abs(found[0] - naive(longer(name, loops), text(), 24, 24, [])).max() < 1e-5
    assert (found[1] == loops).all()


def test_one_turn_is_the_blocks_called_by_hand() -> None:
    model, ids = shared("shared_blocks"), torch.from_numpy(text()[:25].astype(np.int64))[None]
    first, second = (block for block in model.blocks if isinstance(block, Block))
    tables = model.cos[:24], model.sin[:24]
    with torch.no_grad():
        x0 = rms_norm(model.tok_emb(ids[:, :-1]))
        a = first(x0, x0, *tables)
        b = second(a, x0, *tables)
        c = first(b + model.skip_weights[0] * b, x0, *tables)
        d = second(c + model.skip_weights[1] * a, x0, *tables)
        e = first(d, x0, *tables)
        end = first(second(e, x0, *tables), x0, *tables)               # layers 5 and 6 of 5 over 2 blocks
        wanted = F.cross_entropy(model.logits(rms_norm(end))[0], ids[0, 1:], reduction="none")
        assert torch.equal(depth.DepthPass(model, 1, 0.0).nats_and_turns(ids[:, :-1], ids[:, 1:])[0, 0], wanted)


@pytest.mark.parametrize("name", SHARED)
def test_where_all_tokens_halt_at_once_scores_are_the_plain_ones_bit_for_bit(name: str) -> None:
    whole = text()[:7 * 24 + 1]
    ev = evaluation(shared(name), whole)
    ev.forward = WindowPass(ev.model)               # the same kernels
    found = nats_and_turns(name, whole, eval_depth_loops=3, eval_halt_threshold=AT_ONCE)
    assert np.array_equal(found[0], ev.own.nats)
    assert (found[1] == 0).all()
    for stride in (0, 8):                           # where the plain pass ends at the scored places, rounding differs
        found = nats_and_turns(name, eval_depth_loops=3, eval_halt_threshold=AT_ONCE, eval_stride=stride)
        assert np.abs(found[0] - evaluation(shared(name), eval_stride=stride).own.nats).max() < 1e-5


def test_moves_lie_between_zero_and_two() -> None:
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(depth.moved(x, 3 * x), torch.zeros(50), atol=1e-6)
    assert torch.allclose(depth.moved(x, -x), torch.full((50,), 2.0), atol=1e-4)
    assert depth.moved(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item() == pytest.approx(2**0.5, abs=1e-4)


def test_with_one_block_a_token_halted_before_the_turn_has_its_plain_score_and_others_the_whole_turns() -> None:
    """Keys and values of a single layer's turn are made from its input, whoever goes on."""
    plain, whole, some = (nats_and_turns("one_block", eval_depth_loops=1, eval_halt_threshold=threshold)
                          for threshold in (AT_ONCE, 0.0, SOME["one_block"]))
    halted = some[1] == 0
    assert 20 < halted.sum() < 150
    assert np.array_equal(some[0], np.where(halted, plain[0], whole[0]))


def token_by_token(model: GPT, ids: torch.Tensor, loops: int, threshold: float) -> tuple[torch.Tensor, list[int]]:
    """(stream (T, D), turns) of one window, each token put back by itself where it has halted."""
    forward = WindowPass(model)
    (x0, *others), tables = forward.inputs(ids[None])
    unique = len(forward.blocks)
    x = forward.blocks[model.layer_blocks[-1]](others[-1], x0, *tables)[0]
    before, layer, turns = others[-unique][0], len(model.layer_blocks), [0] * ids.numel()
    for loop in range(loops):
        going = []
        for t in range(ids.numel()):
            a, b = (stream[t] / stream[t].square().mean().sqrt() for stream in (before, x))
            going.append(turns[t] == loop and float((a - b).square().mean().sqrt()) >= threshold)
        turns, before = [n + g for n, g in zip(turns, going, strict=True)], x
        for i in range(layer, layer + unique):
            new = forward.blocks[i % unique](x[None], x0, *tables)[0]
            x = torch.stack([new[t] if going[t] else x[t] for t in range(ids.numel())])
        layer += unique
    return x, turns


@pytest.mark.parametrize("name", SHARED)
def test_a_halted_token_is_frozen_and_seen_as_it_is(name: str) -> None:
    model, ids = shared(name), torch.from_numpy(text()[:25].astype(np.int64))
    with torch.no_grad():
        x, wanted = token_by_token(model, ids[:-1], 3, SOME[name])
        nats = F.cross_entropy(model.logits(rms_norm(x)), ids[1:], reduction="none")
        found = depth.DepthPass(model, 3, SOME[name]).nats_and_turns(ids[None, :-1], ids[None, 1:])[:, 0]
    assert found[1].tolist() == wanted
    assert len(set(wanted)) > 1
    assert torch.allclose(found[0], nats, atol=1e-6)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("stride", [0, 8])
def test_neither_scores_nor_halting_depend_on_later_tokens(name: str, stride: int) -> None:
    knobs: dict[str, Any] = {"eval_depth_loops": 2, "eval_halt_threshold": SOME[name], "eval_stride": stride}
    whole = nats_and_turns(name, **knobs)
    assert len(np.unique(whole[1])) > 1
    for cut in (50, 100, 105):
        changed = text()
        changed[cut:] = 2 + (changed[cut:] * 3) % 50
        other = nats_and_turns(name, changed, **knobs)
        assert np.array_equal(other[:, :cut - 1], whole[:, :cut - 1])
        assert not np.array_equal(other[0, cut - 1:], whole[0, cut - 1:])


# --- windows, batches, distributions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_windows_are_those_of_the_knobs(name: str, isolated: bool) -> None:
    starts = np.flatnonzero(text() == BOS).tolist() if isolated else []
    found = nats_and_turns(name, eval_depth_loops=2, eval_stride=5, eval_doc_isolated=isolated, sw_eval_batch=3)
    assert np.abs(found[0] - naive(longer(name, 2), text(), 24, 5, starts)).max() < 1e-5


def test_windows_overlap_as_far_as_the_turns_look_back() -> None:
    model = filled_model(tiny_shape(window_size=2, num_unique_blocks=2))
    ev, forward = depth.deep(evaluation(model, eval_depth_loops=3, eval_stride=1))
    assert forward.reach == 11                      # 4 layers and 6 more, each one token further
    plain = scoring.layout(170, 24, 1)
    assert len(ev.windows) < 0.2 * len(plain)
    found = [ev.score_windows("depth", windows, forward.nats_and_turns, values=2) for windows in (ev.windows, plain)]
    assert np.abs(found[0] - found[1]).max() < 1e-5


def test_the_size_of_a_batch_changes_rounding_alone() -> None:
    knobs: dict[str, Any] = {"eval_depth_loops": 2, "eval_halt_threshold": SOME["shared_blocks"], "eval_stride": 6}
    whole = nats_and_turns("shared_blocks", **knobs)
    for rows in (1, 5):
        assert np.abs(nats_and_turns("shared_blocks", sw_eval_batch=rows, **knobs) - whole).max() < 1e-5


def test_distributions_sum_to_one_and_are_those_that_were_scored() -> None:
    ev = evaluation(shared("everything"), eval_depth_loops=2, eval_halt_threshold=SOME["everything"], eval_stride=6)
    targets = [1, 169, 40, 95]
    log_p = depth.distributions(ev, targets)["depth"]
    assert torch.allclose(log_p.exp().sum(1), torch.ones(4), atol=1e-5)
    [found] = depth.score(ev)
    scored = -log_p[torch.arange(4), torch.from_numpy(ev.tokens[targets].astype(np.int64))].numpy()
    assert np.abs(scored - found.nats[np.array(targets) - 1]).max() < 1e-5


WORKER = """
import os, sys
import numpy as np
sys.path[:0] = [sys.argv[2] + "/tests", sys.argv[2]]
import torch
from dataclasses import replace
from conftest import CPU
import test_depth
torch.set_num_threads(1)
rt = replace(CPU, rank=int(os.environ["RANK"]), world_size=2)
rt.start("auto")
for score in test_depth.depth.score(replace(test_depth.both_modes(), rt=rt)):
    np.save(f"{sys.argv[1]}/{rt.rank}_{score.name}.npy", score.nats)
rt.stop()
"""


def both_modes() -> scoring.Evaluation:
    return evaluation(shared("shared_blocks"), eval_depth_loops=2, eval_halt_threshold=SOME["shared_blocks"],
                      eval_stride=6, sw_eval_batch=2, eval_mix_learn=True)


def test_two_ranks_give_the_bits_of_one_with_the_sidecar_too(tmp_path: Path) -> None:
    run_two_ranks(WORKER, tmp_path)
    alone = list(depth.score(both_modes()))
    assert [one.name for one in alone] == ["depth", "depth_sidecar"]
    for one in alone:
        for rank in range(2):
            assert np.array_equal(np.load(tmp_path / f"{rank}_{one.name}.npy"), one.nats)


def test_an_interrupted_evaluation_goes_on_to_the_same_scores_and_report(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs: dict[str, Any] = {"eval_depth_loops": 2, "eval_halt_threshold": SOME["one_block"], "sw_eval_batch": 1}
    [whole] = depth.score(evaluation(shared("one_block"), **knobs))
    real, calls = scoring.Evaluation.run_batch, iter(range(4))

    def run_batch(self: scoring.Evaluation, *given: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise Killed
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(scoring.Evaluation, "run_batch", run_batch)
        with pytest.raises(Killed):
            list(depth.score(evaluation(shared("one_block"), kept=tmp_path / "kept", **knobs)))
    lines: list[str] = []
    [again] = depth.score(evaluation(shared("one_block"), kept=tmp_path / "kept", lines=lines, **knobs))
    assert lines == [f"depth: 4 of 8 sections were scored before, in {tmp_path / 'kept'}"]
    assert np.array_equal(again.nats, whole.nats)
    assert again.report == whole.report


# --- the report ---------------------------------------------------------------------------------------------------------


def test_the_report_counts_turns_and_products() -> None:
    """A block here: 24 x (24 + 8 + 8 + 24) of attention and 24 x 96 of the MLP, keys and values a tenth of 3,840."""
    forward = depth.DepthPass(shared("shared_blocks"), 2, 0.25)
    assert depth.compute_report(forward, np.array([0, 0, 1, 2], dtype=np.float32)) == {
        "loops": 2, "threshold": 0.25, "mean_loops": 0.75, "halted_0": 0.5, "halted_1": 0.25, "halted_2": 0.25,
        "forward_cost": 1.35, "forward_cost_run": 1.8}      # 1 + 2/5 (0.75 + 0.1 * 1.25); 1 + 2/5 * 2
    nobody = depth.compute_report(forward, np.zeros(3, dtype=np.float32))
    assert (nobody["halted_0"], nobody["mean_loops"], nobody["forward_cost"]) == (1, 0, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.1, SOME["one_block"], AT_ONCE])
def test_the_report_adds_up(threshold: float) -> None:
    ev = evaluation(shared("one_block"), eval_depth_loops=3, eval_halt_threshold=threshold)
    [found] = depth.score(ev)
    turns = nats_and_turns("one_block", eval_depth_loops=3, eval_halt_threshold=threshold)[1]
    shares = [found.report[f"halted_{k}"] for k in range(4)]
    assert shares == pytest.approx([(turns == k).mean() for k in range(4)], abs=1e-4)
    assert sum(shares) == pytest.approx(1, abs=3e-4)
    assert found.report["mean_loops"] == pytest.approx(turns.mean(), abs=1e-4)
    assert 1 <= found.report["forward_cost"] <= found.report["forward_cost_run"] == 1.75
    assert (found.report["forward_cost"] == 1.75) == (threshold == 0)


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_prints_its_lines_and_the_artifact_alone_gives_them_again(
        tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {"NUM_LAYERS": "4", "NUM_UNIQUE_BLOCKS": "2", "EVAL_DEPTH_LOOPS": "1",
                                             "EVAL_HALT_THRESHOLD": "0.3", "EVAL_MIX_LEARN": "1"}
    assert train_gpt.main(env) == 0
    folder = tmp_path / "logs" / "tiny"
    _, _, line, exact, mixed, *rest = lines_of((folder / "train.log").read_text())
    assert re.fullmatch(
        r"final_int8_zlib_depth val_loss:\d\.\d{4} val_bpb:\d\.\d{4} stride:32 seq_len:32 loops:1 threshold:0\.3"
        r" mean_loops:\S+ halted_0:\S+ halted_1:\S+ forward_cost:1\.\d+ forward_cost_run:1\.5 eval_time:\d+ms", line)
    assert mixed.startswith("final_int8_zlib_depth_sidecar val_loss:")
    assert " of:depth mix:learned " in mixed
    modes = json.loads((folder / "summary.json").read_text())["eval_modes"]
    assert list(modes) == ["depth", "depth_sidecar", "sidecar"]
    mode = modes["depth"]
    assert exact == f"final_int8_zlib_depth_exact val_loss:{mode['val_loss']:.8f} val_bpb:{mode['val_bpb']:.8f}"
    assert mode["tokens"] == tiny_data.val.size - 1
    assert mode["halted_0"] + mode["halted_1"] == pytest.approx(1, abs=2e-4)

    capsys.readouterr()
    command = ["eval", str(folder / "final_model.int8.ptz"), "--data", env["DATA_PATH"], "--device", "cpu",
               "--tokenizer", env["TOKENIZER_PATH"]]
    assert export.main([*command, "EVAL_DEPTH_LOOPS=1", "--eval-halt-threshold", "0.3", "EVAL_MIX_LEARN=1"]) == 0
    wanted = [exact, *(line for line in rest if "_exact " in line)]
    assert [line for line in lines_of(capsys.readouterr().out) if "_exact " in line][1:] == wanted


UNSHARED = ("EVAL_DEPTH_LOOPS goes through shared blocks again, and the 3 layers share none: train with NUM_UNIQUE_BLOCKS"
            " below NUM_LAYERS, or unset it")


@pytest.mark.parametrize(("knobs", "message"), [
    ({"EVAL_DEPTH_LOOPS": "1"}, UNSHARED),
    ({"EVAL_DEPTH_LOOPS": "1", "NUM_UNIQUE_BLOCKS": "3"}, UNSHARED),
    ({"EVAL_DEPTH_LOOPS": "-1"}, "EVAL_DEPTH_LOOPS must be at least 0, got -1"),
    ({"EVAL_DEPTH_LOOPS": "65", "NUM_UNIQUE_BLOCKS": "1"}, "EVAL_DEPTH_LOOPS must be at most 64, got 65"),
    ({"EVAL_HALT_THRESHOLD": "0.1"}, "EVAL_HALT_THRESHOLD asks for no score: set EVAL_DEPTH_LOOPS, whose turns it halts"),
    ({"EVAL_HALT_THRESHOLD": "-1"}, "EVAL_HALT_THRESHOLD must be at least 0, got -1.0"),
    ({"EVAL_HALT_THRESHOLD": "nan"}, "EVAL_HALT_THRESHOLD must be finite, got nan"),
])
def test_a_knob_that_cannot_work_is_refused_in_one_line(
        knobs: dict[str, str], message: str, tiny_env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_gpt.main(tiny_env | knobs) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_model_without_shared_blocks_is_refused_whatever_the_knobs_say() -> None:
    with pytest.raises(export.ArtifactError, match="no shared blocks"):
        next(depth.score(evaluation(filled_model(tiny_shape()), eval_depth_loops=1)))


def test_the_command_line_asks_the_artifact_whether_blocks_are_shared(
        tiny_env: dict[str, str], tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tiny_shape(vocab_size=tiny_data.vocab_size)
    meta = {"model": vars(shape), "train_seq_len": 32}
    file = tmp_path / "model.ptz"
    file.write_bytes(export.encode_artifact(filled_model(shape).state_dict(), meta, export.ExportOptions()).data)
    command = ["eval", str(file), "--data", tiny_env["DATA_PATH"], "--tokenizer", tiny_env["TOKENIZER_PATH"]]
    assert export.main([*command, "EVAL_DEPTH_LOOPS=1"]) == 2
    assert capsys.readouterr() == ("", f"export.py eval: {UNSHARED.replace('the 3', 'the 4')}\n")
