"""scripts/curve.py: from checkpoints to bytes and gaps of every scheme, and what is read off the curves.

Guarantees: a tiny model goes through every scheme that needs no other exporter, each file scored as read back; a repeated
call measures nothing again, a cut line is made good; interpolation, savings and the law's slope are those computed by hand.
Run: python -m pytest tests/test_curve.py (about 15 s).
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import TinyData, build_job, tiny_knobs

import curve
import peers
import train_gpt
from curve import Results, Scheme, bytes_at, frontier, gap_at, law_slope
from export import Artifact

needs_brotli = pytest.mark.skipif("brotli" not in peers.codecs_here(), reason="needs the package brotli")
NAMES = ["int8", "int8-allocated", "rtn", "gptq", "gptq-fine-embed"]


# ----------------------------------------------------------------------------------------------------------------------
# Curves.
# ----------------------------------------------------------------------------------------------------------------------


def test_the_frontier_drops_what_a_smaller_file_beats_and_what_has_no_logarithm():
    points = [(400, -0.1), (100, 8.0), (300, 3.0), (200, 2.0), (500, 1.0), (50, 9.0), (600, 0.0)]
    assert frontier(points) == [(50, 9.0), (100, 8.0), (200, 2.0), (500, 1.0)]
    assert frontier([]) == []


def test_interpolation_is_linear_in_logarithms_and_never_extrapolates():
    line = [(1024.0, 16.0), (4096.0, 1.0), (8192.0, 0.25)]
    assert gap_at(line, 2048) == pytest.approx(4.0)                     # half way in both logarithms
    assert gap_at(line, 4096) == pytest.approx(1.0)
    assert gap_at(line, 4096 * math.sqrt(2)) == pytest.approx(0.5)
    assert bytes_at(line, 4.0) == pytest.approx(2048)
    assert bytes_at(line, 0.5) == pytest.approx(4096 * math.sqrt(2))
    assert [gap_at(line, 1023), gap_at(line, 8193), bytes_at(line, 16.1), bytes_at(line, 0.24)] == [None] * 4
    assert gap_at([], 100) is None


@pytest.mark.parametrize("slope", [1.0, 0.5, 1.3])
def test_the_laws_slope_is_found(slope: float):
    points = [(bits, 11 * 4 ** (-slope * (bits - 3.3))) for bits in (2.0, 2.5, 3.1, 4.9)]
    assert law_slope(points) == pytest.approx(slope)
    outside = [(1.5, 1e6), (5.5, 1e6), (3.0, -1.0)]                     # neither range nor logarithm
    assert law_slope(points + outside) == pytest.approx(slope)
    assert law_slope(points[:1] + outside) is None


def results_of(**curves: list[tuple[float, float]]) -> Results:
    """Two checkpoints; the second one's gaps are twice the first one's."""
    def rows(name: str, factor: int) -> list[dict[str, Any]]:
        return [{"scheme": name, "point": i, "bytes": nbytes, "gap_mbpb": gap * factor, "bits_per_weight": nbytes / 1000,
                 "seconds": 1.0} for i, (nbytes, gap) in enumerate(curves[name])]

    factors = {"a": 1, "b": 2}
    return Results({checkpoint: {name: rows(name, factor) for name in curves} for checkpoint, factor in factors.items()})


def test_schemes_are_compared_at_equal_bytes_and_at_equal_gap():
    results = results_of(gptq=[(2048.0, 8.0), (100_000.0, 1.0), (4096.0, 1.0)], ours=[(1024.0, 16.0), (4096.0, 1.0)])
    first, outside, last = results.against("ours", "gptq")
    assert first["gap_ratio"] == pytest.approx({"n": 2, "mean": 0.5, "min": 0.5, "max": 0.5})   # 4 for 8 mbpb
    saved = 1 - math.sqrt(1024 * 2048) / 2048                                                  # 8 mbpb at 2^10.5 bytes
    assert first["saving"] == pytest.approx({"n": 2, "mean": saved, "min": saved, "max": saved})
    assert outside["gap_ratio"] == {"n": 0}
    assert last["gap_ratio"]["mean"] == pytest.approx(1.0)


def test_means_and_slopes_are_over_checkpoints():
    results = results_of(ours=[(2000.0, 16.0), (3000.0, 4.0), (4000.0, 1.0)])
    assert results.law("ours") == pytest.approx({"n": 2, "mean": 1.0, "min": 1.0, "max": 1.0})
    assert results.means("ours")[1]["gap_mbpb"] == {"n": 2, "mean": 6.0, "min": 4.0, "max": 8.0}


# ----------------------------------------------------------------------------------------------------------------------
# Coders.
# ----------------------------------------------------------------------------------------------------------------------


def test_integers_go_into_the_fewest_whole_bytes():
    assert curve.integer_bytes(np.array([-128, 0, 127])) == bytes([128, 0, 127])
    assert curve.integer_bytes(np.array([[-129, 1]])) == bytes([0x7F, 0x01, 0xFF, 0x00])
    with pytest.raises(ValueError, match=r"integers of 0\.\.32768 do not fit 16 bits"):
        curve.integer_bytes(np.array([0, 2**15]))


def test_coders_take_the_integers_of_each_tensor_and_our_own_is_the_file():
    rng = np.random.default_rng(0)
    values = {"a": {"positions": rng.integers(-3, 4, (40, 50))}, "b": {"positions": rng.integers(-500, 500, 700)},
              "c": {"f16": np.zeros(3)}}
    parts = {"frame": 20, "positions:a": 700, "positions:b": 900, "scales": 5}
    sizes = curve.coder_bytes(Artifact({}, (), {}, parts, values), ["rans", "zlib", "lzma"])
    assert sizes["rans"] == 1600
    for name in ("zlib", "lzma"):
        pack = peers.CODECS[name].pack
        low_and_high = values["b"]["positions"].astype("<i2").view(np.uint8).reshape(-1, 2).T.tobytes()
        assert sizes[name] == len(pack(values["a"]["positions"].astype(np.int8).tobytes())) + len(pack(low_and_high))


def test_unknown_coders_are_refused():
    assert curve.coders_of("all") == ["rans", *peers.codecs_here()]
    assert curve.coders_of("") == []
    with pytest.raises(ValueError, match=r"CODER must be of rans, .* or all, got rar"):
        curve.coders_of("zlib,rar")


# ----------------------------------------------------------------------------------------------------------------------
# Schemes of exporters that may not be here.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaterOptions:
    """The options of a rate-distortion exporter."""
    export_scheme: str = "int8"
    export_bits: float = 0.0
    tcq_states: int = 8


def test_rate_distortion_is_offered_where_the_exporter_has_it(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def encode(state: object, meta: object, options: LaterOptions, *, statistics: object) -> SimpleNamespace:
        asked.append((options, statistics))
        return SimpleNamespace(data=b"file")

    monkeypatch.setattr(curve, "ExportOptions", LaterOptions)
    monkeypatch.setattr(curve, "encode_artifact", encode)
    monkeypatch.setattr(curve, "decode_artifact", lambda data: SimpleNamespace(state={"of": data}))
    offered, subject = curve.schemes(), SimpleNamespace(state={}, meta={}, statistics=lambda: "known")
    for name, states in curve.RD_STATES.items():
        assert offered[name].points == (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
        assert offered[name].encode(cast(Any, subject), 2.5) == (b"file", {"of": b"file"})
        assert asked.pop() == (LaterOptions("rd", 2.5, states), "known")


# ----------------------------------------------------------------------------------------------------------------------
# End to end.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of training, saved."""
    folder = tmp_path_factory.mktemp("curve")
    knobs = tiny_knobs(tiny_data, folder) | {"ITERATIONS": "10", "SAVE_RAW_CHECKPOINT": "1", "RUN_ID": "curve"}
    job = build_job(knobs)
    train_gpt.train(job)
    train_gpt.export_model(job)
    return job.folder.path / "final_model.safetensors"


def command(checkpoint: Path, data: TinyData, output: Path, *more: str) -> list[str]:
    return [str(checkpoint), "--data", str(data.folder), "--tokenizer", str(data.tokenizer), "-o", str(output),
            "--device", "cpu", "--max-tokens", "512", "--calibration-tokens", "8192", *more]


@needs_brotli
def test_every_scheme_is_measured_once_and_summed_up(
        checkpoint: Path, tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch):
    few = {"int8-allocated": (0.5,), "rtn": (0.0,), "gptq": (-1.0, 0.0, 1.0), "gptq-fine-embed": (0.0, 1.0)}
    offered = {name: Scheme(name, few.get(name, s.points), s.encode, s.calibrated) for name, s in curve.schemes().items()}
    monkeypatch.setattr(curve, "schemes", lambda: offered)
    arguments = command(checkpoint, tiny_data, tmp_path / "out", "--schemes", ",".join(NAMES))
    assert curve.main(arguments) == 0
    first = capsys.readouterr().out
    assert all(f"| {name} |" in first for name in NAMES)
    summary = json.loads((tmp_path / "out.json").read_text())
    held = summary["checkpoints"][str(checkpoint)]
    assert {name: [row["point"] for row in rows] for name, rows in held.items()} == {"int8": [1.0]} | {
        name: list(points) for name, points in few.items()}
    sizes = [row["bytes"] for row in held["gptq"]]
    assert sizes == sorted(sizes, reverse=True)
    assert held["int8-allocated"][0]["bytes"] <= 0.5 * held["int8"][0]["bytes"]
    assert held["gptq"][1]["bits_per_weight"] == pytest.approx(8 * sizes[1] / job_weights(checkpoint))
    assert (tmp_path / "out.png").stat().st_size > 10_000

    monkeypatch.setattr(curve, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(curve, "float_bpb", lambda *_: pytest.fail("measured again"))
    assert curve.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]


def job_weights(checkpoint: Path) -> int:
    return sum(t.numel() for t in curve.export_verbs.read_with_meta(str(checkpoint), [])[0].values())


@needs_brotli
def test_a_cut_measurement_is_made_again(checkpoint: Path, tiny_data: TinyData, tmp_path: Path):
    output, lines = tmp_path / "out", tmp_path / "out.jsonl"
    arguments = command(checkpoint, tiny_data, output, "--schemes", "int8,rtn", "--peer", "rtn")
    assert curve.main(arguments) == 0
    whole = rows_of(output)
    lines.write_text(lines.read_text()[:-20])
    assert curve.main(arguments) == 0
    assert rows_of(output) == whole


def rows_of(output: Path) -> list[tuple[Any, ...]]:
    held = json.loads(output.with_suffix(".json").read_text())["checkpoints"]
    return [(row["scheme"], row["point"], row["bytes"], row["val_bpb"])
            for schemes in held.values() for rows in schemes.values() for row in rows]


def test_what_cannot_be_done_is_one_line(
        checkpoint: Path, tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    faults = {("--schemes", "int8,int3"): "--schemes must be of int8, ", ("--coder", "rar"): "CODER must be of rans, "}
    for more, message in faults.items():
        assert curve.main(command(checkpoint, tiny_data, tmp_path / "out", *more)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"curve.py: {message}")
        assert error.endswith(f", got {more[1].split(',')[-1]}\n")
    assert not (tmp_path / "out.jsonl").exists()
