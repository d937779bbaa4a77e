"""The tools on files of EXPORT_SCHEME=rd: verbs, byte ledger, size prediction, benchmark of the codec.

Guarantees: the verbs write, list, extract, score and verify such a file, and say in one line what they lack; the ledger's
bytes sum exactly to the file and follow the bits that the coder gave each tensor; a size is predicted where the export
aims, and what cannot fit is refused before a run. Run: python -m pytest tests/test_rd_tools.py (about 50 s on one core).
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyData, filled_model, tiny_shape
from safetensors.torch import load_file, save_file
from torch import Tensor

import bench_codec
import export
import ledger
import prediction
import train_gpt
from export import ExportOptions, Statistics, Term, matrices, shapes_of, weights_digest
from train_gpt import ModelShape, tensor_shapes

SMALL = ModelShape(vocab_size=300, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, mlp_mult=2)


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) * 0.05 + (len(shape) < 2) for name, shape in shapes.items()}


def random_statistics(state: Mapping[str, Tensor], seed: int = 0) -> Statistics:
    """Correlated inputs, and rows, columns and tensors of different costs."""
    rng = torch.Generator().manual_seed(seed)

    def uneven(n: int) -> Tensor:
        return torch.randn(n, generator=rng).exp()

    terms = {}
    for name, (rows, cols) in matrices(shapes_of(state)).items():
        x = torch.randn(2 * cols, cols, generator=rng) * uneven(cols)
        x = x + x.roll(1, 1)
        terms[name] = (Term(1e-3 * uneven(1) * uneven(rows), x.T @ x / len(x)),)
    return Statistics(weights_digest(state), 1000, terms)


def rd(**options: Any) -> ExportOptions:
    return ExportOptions(export_scheme="rd", **({"tcq_states": 8} | options))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one model: rd with and without a trellis, int8, and the checkpoint."""
    folder, state = tmp_path_factory.mktemp("rd"), random_state(tensor_shapes(SMALL))
    known = random_statistics(state)
    files = {"rd": rd(export_bits=3.0), "plain": rd(export_bits=2.0, tcq_states=0), "int8": ExportOptions()}
    for name, options in files.items():
        export.save_artifact(folder / name, state, {"m": 1}, options, statistics=known)
    save_file(state, folder / "checkpoint")
    return {path.name: path for path in folder.iterdir()}


# --- verbs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_data: TinyData) -> Path:
    shape = tiny_shape(vocab_size=tiny_data.vocab_size)
    meta = {"model": asdict(shape), "train_seq_len": 32}
    state = {name: w.detach().clone() for name, w in filled_model(shape).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"artifact_meta": json.dumps(meta)})
    return tmp_path / "model.safetensors"


def test_the_verbs_know_such_files(checkpoint: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> list[str]:
        assert export.main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out.splitlines()

    target, all_of_it = checkpoint.with_name("model.ptz"), checkpoint.with_name("all.safetensors")
    data = ["--data", tiny_data.folder, "--tokenizer", tiny_data.tokenizer, "--device", "cpu"]
    knobs = ["EXPORT_SCHEME=rd", "EXPORT_BITS=4", "TCQ_STATES=4"]
    out = run("write", checkpoint, "-o", target, *knobs, "CALIBRATION_TOKENS=512", *data)
    size = target.stat().st_size
    assert out[-1].startswith(f"wrote:{target} total_bytes:{size} ")
    weights = sum(w.numel() for w in load_file(checkpoint).values())
    assert weights / 2 - 2000 <= size <= weights / 2
    again = checkpoint.with_name("flags.ptz")
    run("write", checkpoint, "-o", again, "--export-scheme", "rd", "--export-bits", "4", "--tcq-states=4",
        "--calibration-tokens", "512", *data)
    assert again.read_bytes() == target.read_bytes()
    table = run("inspect", target)
    assert sum(line.startswith("grid ") for line in table) == len(matrices(shapes_of(load_file(checkpoint))))
    parts = json.loads("\n".join(run("inspect", target, "--json")))["parts"]
    assert sum(parts.values()) == size
    assert parts["positions"] > 0.8 * size
    assert run("verify", target, checkpoint, "--calibration-tokens", 512, *data)[-1].endswith(" differing:0")
    run("extract", target, "--to", all_of_it)
    decoded = export.load_artifact(target).state
    assert all(torch.equal(w, decoded[name]) for name, w in load_file(all_of_it).items())
    lines = run("eval", target, "--max-tokens", 256, *data)
    assert lines[0].startswith("final_rd_roundtrip val_loss:")
    assert lines[1].startswith("final_rd_roundtrip_exact val_loss:")
    assert run("eval", checkpoint, "--max-tokens", 256, *data)[0].startswith("final_int8_zlib_roundtrip val_loss:")


@pytest.mark.parametrize(("arguments", "message"), [
    (["EXPORT_BITS=3"], "EXPORT_SCHEME=rd needs calibration statistics: give --calibration-tokens N, --data DIR and"
                        " --tokenizer MODEL"),
    (["EXPORT_BITS=3", "CALIBRATION_TOKENS=9"], "--calibration-tokens needs --data DIR and --tokenizer MODEL"),
    (["EXPORT_BITS=3", "CALIBRATION_TOKENS=512", "--data", "{data}", "--tokenizer", "{none}"], "{none}"),
    (["EXPORT_BITS=3", "CALIBRATION_TOKENS=512", "--data", "{none}", "--tokenizer", "{tokenizer}"], "{none}"),
    (["EXPORT_BITS=3", "CALIBRATION_TOKENS=99999999", "--data", "{data}", "--tokenizer", "{tokenizer}"],
     "training tokens, calibration wants"),
    (["EXPORT_BITS=12"], "EXPORT_BITS must be at most 9, got 12"),
    (["EXPORT_BITS=3", "INT8_AXIS_MODE=col"], "EXPORT_SCHEME=rd has no use for INT8_AXIS_MODE"),
    (["ARTIFACT_CAP_BYTES=0"], "EXPORT_SCHEME=rd needs EXPORT_BITS or ARTIFACT_CAP_BYTES above 0"),
])
def test_what_a_write_lacks_is_said_in_one_line(
    arguments: list[str], message: str, checkpoint: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"data": tiny_data.folder, "tokenizer": tiny_data.tokenizer, "none": checkpoint.with_name("none")}
    target = checkpoint.with_name("out")
    asked = ["write", str(checkpoint), "-o", str(target), "EXPORT_SCHEME=rd", *(a.format(**names) for a in arguments)]
    assert export.main(asked) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message.format(**names) in err
    assert not target.exists()


def test_verify_says_that_it_needs_the_statistics(small: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    both = small["checkpoint"].with_name("with_meta")
    save_file(load_file(small["checkpoint"]), both, {"artifact_meta": "{}"})
    assert export.main(["verify", str(small["rd"]), str(both)]) == 2
    assert capsys.readouterr() == ("", "export.py verify: EXPORT_SCHEME=rd needs calibration statistics: give"
                                       " --calibration-tokens N, --data DIR and --tokenizer MODEL\n")


def test_values_of_foreign_names_are_no_knobs_of_a_write(checkpoint: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        export.main(["write", str(checkpoint), "-o", "out", "NUM_LAYERS=3"])
    assert caught.value.code == 2


# --- ledger ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rd", "plain"])
def test_every_byte_has_one_owner(small: dict[str, Path], name: str) -> None:
    found, size = ledger.read_ledger(str(small[name]), load_file(small["checkpoint"])), os.path.getsize(small[name])
    assert size == sum(t.total_bytes for t in found.tensors) + found.components["metadata"]
    assert found.total_bytes == size + found.code_bytes == sum(found.components.values())
    assert sum(s.coded_bytes for s in found.streams) == size - found.components["metadata"]
    grid = [t for t in found.tensors if t.codec == "grid"]
    parts = export.load_artifact(small[name]).parts
    assert sum(t.components["codes"] + t.components["steps"] for t in grid) == parts["positions"] + parts["bases"]
    for t in grid:
        assert {part for part, nbytes in t.components.items() if nbytes} == {"codes", "steps"}
        assert 0.4 * sum(t.shape) < t.components["steps"] < 1.5 * sum(t.shape) + 20
        assert t.rms_error is not None
        assert 0.005 < t.rms_error < 1.5        # of weights whose errors cost nothing, more than all
        assert t.entropy_bits is not None
        assert 8 * t.components["codes"] / t.weights < 1.15 * t.entropy_bits + 0.1     # contexts cost a small matrix
    rest = [t for t in found.tensors if t.codec != "grid"]
    assert not any(t.components["steps"] for t in rest)


def test_positions_are_shared_out_by_the_coders_own_bits(small: dict[str, Path]) -> None:
    artifact = export.load_artifact(small["rd"])
    writer = export.SymbolWriter()
    export.code_grid(writer, artifact.plan, artifact.values, None)
    assert len(writer.encoded()) == artifact.parts["positions"]
    wanted = sum(float((16 - np.log2(shares)).sum()) for shares, _ in writer.operations)
    found = ledger.symbol_bits(artifact.plan, artifact.values)
    assert sum(found.values()) == pytest.approx(wanted, rel=1e-12)
    stream = next(s for s in ledger.read_ledger(str(small["rd"])).streams if s.name == "positions")
    assert stream.entropy_bytes == pytest.approx(wanted / 8)
    assert 0 < stream.coded_bytes - stream.entropy_bytes < 0.002 * stream.coded_bytes + 50     # 8 lanes of five bytes
    assert stream.values == sum(row.numel + 2 * row.shape[0] + row.shape[1] for row in artifact.plan if row.codec == "grid")


def test_bits_go_to_the_tensor_whose_errors_cost(tmp_path: Path) -> None:
    """A hundredfold cost is worth a tenth of the step, log2(10) = 3.3 bits more."""
    state = random_state({"a.weight": (96, 96), "b.weight": (96, 96)})
    costs = {"a.weight": 1e-3, "b.weight": 1e-1}
    terms = {name: (Term(torch.full((96,), cost), torch.eye(96)),) for name, cost in costs.items()}
    known = Statistics(weights_digest(state), 1000, terms)
    export.save_artifact(tmp_path / "file", state, {}, rd(export_bits=4.0), statistics=known)
    a, b = ledger.read_ledger(str(tmp_path / "file"), state).tensors
    assert 3.0 < 8 * (b.components["codes"] - a.components["codes"]) / a.weights < 3.6
    assert (a.rms_error or 0) == pytest.approx(10 * (b.rms_error or 0), rel=0.15)


def test_an_int8_and_an_rd_file_are_compared(small: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                             ) -> None:
    first, second = small["int8"], small["rd"]
    arguments = [first, second, "--checkpoint", small["checkpoint"], "--json", tmp_path / "out.json"]
    assert ledger.main([str(a) for a in arguments]) == 0
    assert "rms second" in capsys.readouterr().out
    held = json.loads((tmp_path / "out.json").read_text())
    change = os.path.getsize(second) - os.path.getsize(first)
    assert sum(c["change_bytes"] for c in held["difference"]["component"]) == change < 0
    steps = next(c for c in held["difference"]["component"] if c["name"] == "steps")
    assert (steps["first_bytes"], steps["second_bytes"]) == (0, steps["change_bytes"])
    assert steps["change_bytes"] > 0


def test_the_printed_table_and_the_picture_hold_steps(small: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert ledger.main([str(small["rd"]), str(small["int8"]), "--png", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert ledger.main([str(small["rd"])]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[-1:] == ["steps"] for line in lines)
    assert any(line[:2] == ["bytes", "codes"] and "steps" in line for line in lines)


# --- prediction -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "small": SMALL,
    "wide": ModelShape(vocab_size=512, num_layers=2, model_dim=96, num_heads=4, num_kv_heads=2, mlp_mult=4),
    "deep": ModelShape(vocab_size=128, num_layers=7, model_dim=48, num_heads=4, num_kv_heads=4, mlp_mult=3),
    "untied": ModelShape(vocab_size=700, num_layers=2, model_dim=80, num_heads=2, num_kv_heads=1, tie_embeddings=False),
}


@pytest.mark.parametrize(("name", "asked"), [
    ("small", {"export_bits": 1.5}), ("untied", {"export_bits": 1.5}), ("wide", {"export_bits": 3.0}),
    ("deep", {"export_bits": 3.0}), ("small", {"export_bits": 9.0}), ("untied", {"export_bits": 9.0}),
    ("deep", {"artifact_cap_bytes": 60_000}), ("wide", {"artifact_cap_bytes": 60_000})])
def test_the_predicted_size_is_the_files(name: str, asked: dict[str, Any]) -> None:
    """Within 1 %, or within the window in which the export is content: 2,000 bytes, above 1 % below 200,000 bytes."""
    shapes, code_bytes = tensor_shapes(SHAPES[name]), 20_000
    state, options = random_state(shapes), rd(**asked, tcq_states=0)
    known = random_statistics(state)
    size = len(export.encode_artifact(state, {}, options, statistics=known, code_bytes=code_bytes).data)
    predicted = prediction.predict_artifact_bytes(shapes, options, code_bytes)
    assert predicted == pytest.approx(size, rel=0.01)
    most = export.rd_budget(options, prediction.weights_of(shapes), code_bytes)[0]
    assert prediction.rd_least_bytes(shapes) < predicted <= most
    line, refused = prediction.prediction_line(shapes, options, code_bytes)
    assert (line.endswith(" under the cap"), refused) == (True, False)


def test_large_models_are_predicted_where_the_export_aims() -> None:
    shapes = {f"blocks.{i}.w": (2048, 2048) for i in range(9)}      # 37,748,736 weights
    for asked, most in (({"export_bits": 3.0}, 14_155_776), ({"artifact_cap_bytes": 16_000_000}, 15_940_000),
                        ({"export_bits": 8.0}, 15_940_000), ({"artifact_cap_bytes": 0, "export_bits": 8.0}, 37_748_736),
                        ({"artifact_cap_bytes": 10**9}, 42_469_328)):
        assert prediction.predict_artifact_bytes(shapes, rd(**asked), 60_000) == most - export.RD_WINDOW_BYTES // 4


@pytest.mark.parametrize(("asked", "verdict"), [
    ({"artifact_cap_bytes": 21_000}, "OVER THE CAP"),
    ({"artifact_cap_bytes": 10_000, "cap_policy": "warn"}, "OVER THE CAP"),     # rd writes nothing above the cap
    ({"export_bits": 0.01}, "OVER EXPORT_BITS=0.01, which allows an artifact of 96 bytes"),
])
def test_what_cannot_fit_is_refused_before_a_run(asked: dict[str, Any], verdict: str) -> None:
    shapes = tensor_shapes(SMALL)
    line, refused = prediction.prediction_line(shapes, rd(**asked), 20_000)
    assert refused
    assert line.endswith(f" {verdict}")
    assert f"artifact {prediction.rd_least_bytes(shapes)} + code 20000" in line


def test_the_least_size_is_about_that_of_the_coarsest_grid() -> None:
    """Matrices of tiny weights cost nothing but their steps and sizes."""
    shapes = tensor_shapes(SHAPES["wide"])
    state = {name: w * (0.01 if len(shapes[name]) == 2 else 1.0) for name, w in random_state(shapes).items()}
    known = random_statistics(state)
    size = len(export.encode_artifact(state, {}, rd(export_bits=0.25, tcq_states=0), statistics=known).data)
    assert 0.5 * prediction.rd_least_bytes(shapes) < size


def test_predict_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    knobs = {"EXPORT_SCHEME": "rd", "EXPORT_BITS": "2.5", "CALIBRATION_TOKENS": "4096"}
    code_bytes = train_gpt.code_bytes(export.ExportOptions(export_scheme="rd"))
    weights = sum(math.prod(s) for s in tensor_shapes(train_gpt.Config().shape).values())
    artifact = math.floor(2.5 / 8 * weights) - 500
    assert export.main(["predict", *(f"{k}={v}" for k, v in knobs.items())]) == 0
    assert capsys.readouterr().out == (
        f"predicted: artifact {artifact} + code {code_bytes} = {artifact + code_bytes} bytes of 16000000 under the cap\n")
    assert export.main(["predict", "EXPORT_SCHEME=rd", "EXPORT_BITS=0.001", "CALIBRATION_TOKENS=4096"]) == 2


# --- benchmark ------------------------------------------------------------------------------------------------------------


def test_the_codecs_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_codec.main(["--weights", "20000", "--states", "0", "8", "--threads", "1"]) == 0
    lines = [dict(pair.split(":") for pair in line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("states") for line in lines] == [None, None, "0", "0", "8", "8"]
    for line in lines[3::2]:
        parts = sum(int(line[f"{part}_bytes"]) for part in ("weight_symbol", "side_symbol", "other"))
        assert abs(int(line["file_bytes"]) - parts) < 100       # what the lanes take
        assert 0 < float(line["coder_overhead"]) < 0.05
