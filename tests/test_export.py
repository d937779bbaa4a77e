"""Plan, quantiser, size prediction, checkpoints and the command line of export.py, and the tools of those.

Guarantees: the plan follows the baseline's rule in one deterministic order; codes and scales equal a slow plain
quantiser's, are off by at most half a step, and scale with the weights; predicted sizes of trained models are within 1 %;
checkpoints are told apart by content and never trusted; the packed submission runs alone; the verbs say what they did in
one line and write nothing on a fault. Run: python -m pytest tests/test_export.py (about 20 s on one core).
"""
from __future__ import annotations

import io
import json
import math
import os
import random
import subprocess
import sys
import types
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import export
import export_verbs
import int8_plan
import prediction
import train_gpt
from export import ArtifactError, Choice, ExportOptions, dequantize, quantize, uniform_choice

ROOT = Path(__file__).resolve().parent.parent
FLOOR = 1 / 127


def normal(*shape: int, sigma: float = 1.0, seed: int = 0) -> Tensor:
    return sigma * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Options and plan


def test_every_fault_of_the_options_names_its_knob() -> None:
    assert ExportOptions().problems() == []
    assert ExportOptions("col", 0.0, weight_quantization_bits=2, embed_quantization_bits=16).problems() == []
    assert ExportOptions("diag", -0.5, weight_quantization_bits=9, embed_quantization_bits=1).problems() == [
        "INT8_SCALE_FLOOR must be at least 0, got -0.5",
        "INT8_AXIS_MODE must be row, col or auto, got 'diag'",
        "WEIGHT_QUANTIZATION_BITS must be 2..8 or 16, got 9",
        "EMBED_QUANTIZATION_BITS must be 2..8 or 16, got 1",
    ]
    assert ExportOptions(int8_scale_floor=float("nan")).problems() == ["INT8_SCALE_FLOOR must be finite, got nan"]
    with pytest.raises(ValueError, match="INT8_AXIS_MODE must be row, col or auto, got 'diag'"):
        export.encode_artifact({}, {}, ExportOptions("diag"))


OPTION_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "floor": ({"int8_scale_floor": 1.5}, "INT8_SCALE_FLOOR must be in 0..1, got 1.5"),
    "sigmas": ({"int8_clip_sigmas": -1.0}, "INT8_CLIP_SIGMAS must be at least 0, got -1.0"),
    "endless sigmas": ({"int8_clip_sigmas": float("inf")}, "INT8_CLIP_SIGMAS must be finite, got inf"),
    "numel": ({"int8_keep_float_max_numel": -1}, "INT8_KEEP_FLOAT_MAX_NUMEL must be at least 0, got -1"),
    "rank": ({"int8_residual_rank": 33}, "INT8_RESIDUAL_RANK must be at most 32, got 33"),
    "negative rank": ({"int8_residual_rank": -1}, "INT8_RESIDUAL_RANK must be at least 0, got -1"),
    "iterations": ({"int8_residual_power_iters": 0}, "INT8_RESIDUAL_POWER_ITERS must be at least 1, got 0"),
    "storage": ({"int8_residual_storage": "f32"}, "INT8_RESIDUAL_STORAGE must be auto, f16, int8 or lqer, got 'f32'"),
    "target": ({"int8_targeted_residual_mode": "on"}, "INT8_TARGETED_RESIDUAL_MODE must be off, all_mlp_proj,"
               " early_mlp_proj, all_attn_proj or early_proj_combo, got 'on'"),
    "permute": ({"export_permute": "x"}, "EXPORT_PERMUTE must be off, mlp or all, got 'x'"),
    "allocate": ({"export_allocate": "x"}, "EXPORT_ALLOCATE must be uniform, hessian or sensitivity, got 'x'"),
    "cap": ({"artifact_cap_bytes": -1}, "ARTIFACT_CAP_BYTES must be at least 0, got -1"),
    "policy": ({"cap_policy": "x"}, "CAP_POLICY must be refuse, warn or fit, got 'x'"),
    "chosen twice": (
        {"export_allocate": "hessian", "int8_axis_mode": "col", "weight_quantization_bits": 6},
        "EXPORT_ALLOCATE=hessian chooses what INT8_AXIS_MODE, WEIGHT_QUANTIZATION_BITS would set; unset one of them"),
    "no cap": ({"cap_policy": "fit", "artifact_cap_bytes": 0},
               "CAP_POLICY=fit with EXPORT_ALLOCATE=uniform needs ARTIFACT_CAP_BYTES above 0"),
}


@pytest.mark.parametrize("case", OPTION_FAULTS)
def test_one_fault_is_one_message(case: str) -> None:
    changes, message = OPTION_FAULTS[case]
    assert ExportOptions(**changes).problems() == [message]
    with pytest.raises(ValueError) as caught:
        export.encode_artifact({"w": torch.ones(3)}, {}, ExportOptions(**changes))
    assert str(caught.value) == message


def test_the_file_holds_the_options_that_are_not_the_defaults() -> None:
    changes = {"int8_axis_mode": "col", "int8_scale_floor": 0.0, "embed_quantization_bits": 6}
    meta = {"a": 1}
    for options, want in ((ExportOptions(), {}), (ExportOptions(**changes), {"export": changes})):
        assert options.changed == want.get("export", {})
        data = export.encode_artifact({"w": torch.ones(3)}, meta, options).data
        assert export.decode_artifact(data).meta == {"a": 1, **want}
    assert meta == {"a": 1}


def test_plan_follows_the_baselines_rule() -> None:
    state = {
        "tok_emb.weight": torch.zeros(1024, 65).bfloat16(),
        "lm_head.weight": torch.zeros(65, 1024),
        "blocks.0.attn.c_q.weight": torch.zeros(256, 256),
        "blocks.0.attn.c_k.weight": torch.zeros(256, 257),
        "blocks.0.attn.q_gain": torch.zeros(8),
        "blocks.0.resid_mix": torch.zeros(2, 40_000),
        "bias": torch.zeros(65_537),
        "half": torch.zeros(3, dtype=torch.float16),
        "double": torch.zeros(3, dtype=torch.float64),
        "counter": torch.zeros((), dtype=torch.int64),
    }
    options = ExportOptions("col", 0.0, weight_quantization_bits=6, embed_quantization_bits=4)
    want = {
        "bias": Choice("int", "row", 31),
        "blocks.0.attn.c_k.weight": Choice("int", "col", 31),
        "blocks.0.attn.c_q.weight": Choice("f16"),
        "blocks.0.attn.q_gain": Choice("f32"),
        "blocks.0.resid_mix": Choice("f32"),
        "counter": Choice("raw"),
        "double": Choice("f16"),
        "half": Choice("f16"),
        "lm_head.weight": Choice("int", "col", 7),
        "tok_emb.weight": Choice("int", "col", 7),
    }
    assert {name: uniform_choice(name, w, options) for name, w in state.items()} == want
    plan = export.decode_artifact(export.encode_artifact(state, {}, options).data).plan
    assert [(row.name, row.codec, row.axis) for row in plan] == [(name, c.codec, c.axis) for name, c in want.items()]
    assert [row.dtype for row in plan] == ["float32"] * 5 + ["int64", "float64", "float16", "float32", "bfloat16"]
    assert all((row.kept, row.rank) == ("none", 0) for row in plan)
    backwards = export.encode_artifact(dict(reversed(state.items())), {}, options)
    assert export.decode_artifact(backwards.data).plan == plan
    bits = ExportOptions(weight_quantization_bits=16, embed_quantization_bits=8)
    kept = {name: uniform_choice(name, w, bits) for name, w in state.items()}
    assert kept["bias"] == Choice("f16")
    assert kept["tok_emb.weight"] == Choice("int", "row", 127)
    small = ExportOptions(int8_keep_float_max_numel=7)
    assert uniform_choice("w", torch.zeros(7), small) == Choice("f16")
    assert uniform_choice("w", torch.zeros(8), small) == Choice("int", "row", 127)
    assert uniform_choice("w", torch.zeros(1), ExportOptions(int8_keep_float_max_numel=0)) == Choice("int", "row", 127)


def test_auto_takes_the_axis_with_the_smaller_error_and_rows_on_a_tie() -> None:
    spread = normal(300, 300)
    slope = torch.logspace(-2, 1, 300)
    state = {"by_row": spread * slope[:, None], "by_col": spread * slope, "tie": torch.ones(300, 300),
             "vector": normal(70_000)}
    axes = {name: uniform_choice(name, w, ExportOptions("auto", 0.0)).axis for name, w in state.items()}
    assert axes == {"by_row": "row", "by_col": "col", "tie": "row", "vector": "row"}


# Quantise


def steps(floor: float, sigmas: float = 0.0) -> ExportOptions:
    return ExportOptions(int8_scale_floor=floor, int8_clip_sigmas=sigmas)


def plain_clip(row: np.ndarray, sigmas: float) -> np.float32:
    """Some root mean squares of the row, or the percentile by sorting."""
    if sigmas:
        return np.float32(np.float64(sigmas) * math.sqrt(math.fsum(float(w) ** 2 for w in row) / len(row)))
    ordered = sorted(abs(row))
    rank = np.float32(0.9999984) * np.float32(len(row) - 1)
    low, high = ordered[int(rank)], ordered[min(int(rank) + 1, len(row) - 1)]
    share = rank - np.float32(int(rank))
    return high - (high - low) * (np.float32(1) - share) if share >= 0.5 else low + (high - low) * share


def plain_quantize(rows: np.ndarray, bits: int, floor: float, sigmas: float) -> tuple[list[list[int]], list[np.float16]]:
    """One row at a time, one weight at a time."""
    q_max, codes, scales = 2 ** (bits - 1) - 1, [], []
    for row in rows.astype(np.float32):
        clip = plain_clip(row, sigmas)
        with np.errstate(over="ignore"):
            scale = np.float16(max(clip / np.float32(q_max), np.float32(floor)))
        scale = max(scale, np.float16(2**-24))
        if clip > np.float32(q_max + 0.5) * np.float32(scale):
            scale = np.nextafter(scale, np.float16(np.inf))
        scales.append(scale)
        clipped = [min(max(w, -clip), clip) / np.float32(scale) for w in row]
        codes.append([min(max(round(float(w)), -q_max), q_max) for w in clipped])
    return codes, scales


AWKWARD: dict[str, Tensor] = {
    "1x1": torch.tensor([[-0.3]]),
    "primes": normal(13, 31),
    "one row": normal(1, 101),
    "one column": normal(101, 1),
    "vector": normal(97),
    "cube": normal(3, 5, 7),
    "constant": torch.full((5, 7), 0.25),
    "zero": torch.zeros(3, 5),
    "some zero rows": normal(6, 9) * (torch.arange(6) % 2)[:, None],
    "huge rows": normal(4, 19, sigma=1e5),
    "tiny rows": normal(7, 23, sigma=1e-6),
    "tiniest": torch.full((2, 3), 1e-9),
    "subnormal steps": torch.logspace(-8, -2, 60)[:, None] * normal(60, 17),
    "half a code beyond": torch.tensor([[15.5, -15.5, 3.0]]) * 2**-24,
    "bf16": normal(11, 17).bfloat16(),
    "fp16": normal(11, 17).half(),
    "one outlier": torch.cat([normal(1, 700, sigma=1e-3), torch.tensor([[50.0]])], dim=1),
    "ties": torch.arange(-254, 255).float()[None, :] / 2,
}


@pytest.mark.parametrize("sigmas", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("floor", [0.0, FLOOR])
@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("case", AWKWARD)
def test_quantiser_equals_the_plain_one(case: str, axis: str, floor: float, sigmas: float) -> None:
    w = AWKWARD[case]
    rows = (w if axis == "row" else w.T) if w.ndim == 2 else w.reshape(1, -1)
    for bits in (2, 5, 8):
        codes, scale = quantize(w, 2 ** (bits - 1) - 1, axis, steps(floor, sigmas))
        want_codes, want_scale = plain_quantize(rows.float().numpy(), bits, floor, sigmas)
        got = codes.T if axis == "col" and w.ndim == 2 else codes.reshape(rows.shape)
        assert codes.shape == w.shape
        assert codes.dtype == torch.int8
        assert codes.is_contiguous()
        assert scale.dtype == torch.float16
        assert scale.tolist() == [float(s) for s in want_scale]
        assert got.tolist() == want_codes


def test_quantising_a_tiny_matrix_by_hand() -> None:
    w = torch.tensor([[7.0, -3.4, 0.4], [0.0, 0.0, 0.0], [-1.75, 0.9, 0.125]])
    codes, scale = quantize(w, 7, "row", steps(0.0))       # steps 7 / 7, the least fp16, and 1.75 / 7
    assert codes.tolist() == [[7, -3, 0], [0, 0, 0], [-7, 4, 0]]
    assert scale.tolist() == [1.0, 2**-24, 0.25]
    assert dequantize(codes, scale, "row").tolist() == [[7.0, -3.0, 0.0], [0.0, 0.0, 0.0], [-1.75, 1.0, 0.0]]
    codes, scale = quantize(w, 7, "col", steps(0.5))       # steps 1, 0.5 (the floor; 3.4 / 7 is less), 0.5
    assert codes.tolist() == [[7, -7, 1], [0, 0, 0], [-2, 2, 0]]
    assert scale.tolist() == [1.0, 0.5, 0.5]
    assert dequantize(codes, scale, "col")[2].tolist() == [-2.0, 1.0, 0.0]
    w = torch.tensor([[7.0, -1.0, 1.0, 7.0]])       # rms 5: a clip of one rms is 5 and what lies beyond is cut off there
    codes, scale = quantize(w, 5, "row", steps(0.0, 1.0))
    assert (codes.tolist(), scale.tolist()) == ([[5, -1, 1, 5]], [1.0])
    codes, scale = quantize(w, 5, "row", steps(0.0, 2.0))
    assert (codes.tolist(), scale.tolist()) == ([[4, 0, 0, 4]], [2.0])      # 3.5 and 0.5 to even


def test_codes_between_whole_widths_reach_the_nearest_code() -> None:
    """An allocation asks for any q_max: codes end at the clip over the step, which is the q_max."""
    w = normal(40, 60)
    for q_max in (1.0, 1.4, 2.5, 22.6, 127.0):
        codes, scale = quantize(w, q_max, "row", steps(0.0))
        assert int(codes.abs().max()) == int(q_max + 0.5)
        assert bool(((w - dequantize(codes, scale, "row")).abs() <= 0.501 * scale.float()[:, None]).all())


def test_axis_both_multiplies_both_scales() -> None:
    codes, scale = torch.tensor([[1, -2, 3], [4, 5, -127]], dtype=torch.int8), torch.tensor([0.5, 2, 1, 4, 0.25]).half()
    assert dequantize(codes, scale, "both").tolist() == [[0.5, -4.0, 0.375], [8.0, 40.0, -63.5]]


@pytest.mark.parametrize("shape", [
    (1, 1), (5, 1), (3, 2), (64, 512), (101, 509), (4000, 3), (1, 100_003), (2, 1_000_003),
])
def test_clip_is_torchs_quantile(shape: tuple[int, int]) -> None:
    magnitudes = normal(*shape).abs()
    assert torch.equal(export.clip_magnitude(magnitudes), torch.quantile(magnitudes, 0.9999984, dim=1))


def test_what_lies_beyond_the_percentile_is_clipped_to_it() -> None:
    w = torch.full((1_300_000,), 0.01)
    w[5], w[7] = 0.9, -0.9
    codes, scale = quantize(w, 127, "row", steps(FLOOR))
    assert int(codes.min()) == -1
    assert int(codes.max()) == 1
    assert scale.tolist() == [float(np.float16(FLOOR))]


@pytest.mark.parametrize("sigmas", [0.5, 3.0])
def test_what_lies_beyond_the_sigmas_is_clipped_to_them(sigmas: float) -> None:
    w = normal(5, 4001, sigma=0.3)
    codes, scale = quantize(w, 31, "row", steps(0.0, sigmas))
    clip = sigmas * w.square().mean(1, keepdim=True).sqrt()
    restored = dequantize(codes, scale, "row")
    assert bool((restored.abs() <= 1.001 * clip).all())
    beyond = w.abs() > clip
    assert 10 < int(beyond.sum()) < w.numel()
    assert bool((codes.abs()[beyond] == 31).all())
    assert bool(((w - restored).abs() <= 0.51 * scale.float()[:, None])[~beyond].all())
    assert torch.equal(quantize(torch.zeros(2, 3), 31, "row", steps(0.0, sigmas))[0], torch.zeros(2, 3, dtype=torch.int8))


def test_codes_are_the_baselines_but_for_the_rounding_of_its_scale() -> None:
    """The baseline rounds with the fp32 scale, then stores fp16; no other code may differ, and none by more than 1."""
    w = torch.cat([normal(64, 512, sigma=s, seed=i) for i, s in enumerate((0.02, 0.3, 5.0))])
    codes, scale = quantize(w, 127, "row", steps(FLOOR))
    clip = torch.quantile(w.abs(), 0.9999984, dim=1)
    exact = (clip / 127).clamp_min(FLOOR)
    clipped = torch.maximum(torch.minimum(w, clip[:, None]), -clip[:, None])
    theirs = (clipped / exact[:, None]).round().clamp(-127, 127)
    assert torch.equal(scale, exact.half())
    quotient, drift = w / exact[:, None], (scale.float() / exact - 1).abs()[:, None]
    near_a_tie = ((quotient - quotient.floor() - 0.5).abs() <= 1.01 * drift * quotient.abs() + 1e-4)
    differs = codes != theirs.to(torch.int8)
    assert bool((near_a_tie | ~differs).all())
    assert 0 < int(differs.sum()) < 0.01 * w.numel()
    assert float((codes.float() - theirs).abs().max()) == 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), cols=st.sampled_from([1, 2, 3, 7, 31, 127]), exponent=st.integers(-22, 14),
       bits=st.integers(2, 8), axis=st.sampled_from(["row", "col"]), floor=st.sampled_from([0.0, FLOOR]),
       sigmas=st.sampled_from([0.0, 0.0, 1.0, 3.5]), seed=st.integers(0, 99))
@example(rows=1, cols=1, exponent=-22, bits=8, axis="row", floor=0.0, sigmas=0.0, seed=0)
def test_error_is_at_most_half_a_step(
    rows: int, cols: int, exponent: int, bits: int, axis: str, floor: float, sigmas: float, seed: int
) -> None:
    w = normal(rows, cols, sigma=2.0**exponent, seed=seed)
    codes, scale = quantize(w, 2 ** (bits - 1) - 1, axis, steps(floor, sigmas))
    error, lines = (w - dequantize(codes, scale, axis)).abs(), w.abs()
    if axis == "col":
        error, lines = error.T, lines.T
    clip, half_step = export.clip_magnitude(lines, sigmas)[:, None], scale.float()[:, None] * (0.5 + 1e-5)
    assert bool((error <= half_step + (lines - clip).clamp_min(0)).all())      # beyond the clip: what was clipped off
    assert float(scale.min()) > 0
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("gamma", [2.0**-6, 0.5, 8.0, 1024.0])
@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("sigmas", [0.0, 3.0])
def test_without_a_floor_scaling_the_weights_scales_the_steps_alone(gamma: float, axis: str, sigmas: float) -> None:
    w = normal(37, 53, sigma=0.3)
    codes, scale = quantize(w, 31, axis, steps(0.0, sigmas))
    scaled_codes, scaled = quantize(gamma * w, 31, axis, steps(0.0, sigmas))
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scaled.float(), gamma * scale.float())
    assert not torch.equal(codes, quantize(w / 64, 31, axis, steps(FLOOR, sigmas))[0])


def test_report_tells_error_and_floored_share() -> None:
    w = torch.cat([normal(100, 700, sigma=0.01), normal(300, 700, sigma=2.0)])
    report = export.encode_artifact({"w": w, "gain": torch.ones(9)}, {}, ExportOptions()).report
    restored = dequantize(*quantize(w, 127, "row", steps(FLOOR)), "row")
    assert report.floored_share == pytest.approx(0.25)
    assert report.weights == 400 * 700 + 9
    assert report.rms_error == pytest.approx(float((w - restored).norm() / w.norm()), rel=1e-4)
    assert report.bits_per_weight == pytest.approx(8 * report.total_bytes / report.weights)
    assert export.encode_artifact({"w": w}, {}, steps(0.0)).report.floored_share == 0


# Prediction


SHAPES = {
    "wide": {"tok_emb.weight": (1024, 128), "blocks.0.mlp.fc.weight": (1024, 512), "blocks.0.mlp.proj.weight": (96, 768)},
    "small": {"tok_emb.weight": (257, 256), "blocks.0.attn_scale": (256,), "head": (8, 64)},
    "tall": {"w": (8192, 24)},
}


def sizes(shapes: dict[str, tuple[int, ...]], options: ExportOptions, spread: float) -> tuple[int, int]:
    """(predicted, true) of normals whose spread varies along each row or column by `spread`, in logarithms."""
    state = {name: normal(*shape, sigma=0.1 * (i + 1), seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for w in state.values():
        if w.ndim == 2:
            slices = w if options.int8_axis_mode == "row" else w.T
            slices *= (spread * normal(slices.shape[1], seed=99)).exp()
    meta = {"model": {f"a_knob_named_{i}": i * i for i in range(40)}}
    true_bytes = export.encode_artifact(state, meta, options).report.total_bytes
    return prediction.predict_artifact_bytes(shapes, options), true_bytes


def all_bits(bits: int, axis_mode: str, sigmas: float = 0.0) -> ExportOptions:
    return ExportOptions(axis_mode, 0.0, sigmas, weight_quantization_bits=bits, embed_quantization_bits=bits)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("axis_mode", ["row", "col"])
def test_prediction_of_a_trained_model_is_within_1_percent(bits: int, axis_mode: str) -> None:
    """Trained rows have the largest weights and the entropy of normals whose spread varies by some 15 %."""
    predicted, true_bytes = sizes(SHAPES["wide"], all_bits(bits, axis_mode), 0.15)
    assert predicted == pytest.approx(true_bytes, rel=0.01)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("sigmas", [3.0, 5.0])
def test_prediction_of_clipped_steps_is_within_1_percent(bits: int, sigmas: float) -> None:
    for spread in (0.0, 0.15):
        predicted, true_bytes = sizes(SHAPES["wide"], all_bits(bits, "row", sigmas), spread)
        assert predicted == pytest.approx(true_bytes, rel=0.01)


@pytest.mark.parametrize("bits", [7, 8])
def test_prediction_of_plain_normals_is_within_2_percent(bits: int) -> None:
    for shapes in SHAPES.values():
        predicted, true_bytes = sizes(shapes, all_bits(bits, "row"), 0.0)
        assert predicted == pytest.approx(true_bytes, rel=0.02)


def test_prediction_counts_fp16_and_knows_that_a_floor_shrinks_untrained_models() -> None:
    state = {"w": normal(512, 512, sigma=0.02)}
    for options, holds in ((ExportOptions(weight_quantization_bits=16), lambda p, t: p == pytest.approx(t, rel=0.06)),
                           (ExportOptions(), lambda p, t: p > 1.5 * t)):
        true_bytes = export.encode_artifact(state, {}, options).report.total_bytes
        assert holds(prediction.predict_artifact_bytes({"w": (512, 512)}, options), true_bytes)


def test_prediction_of_a_fit_is_where_it_will_aim() -> None:
    shapes = {"w": (512, 512)}

    def fit(cap: int) -> ExportOptions:
        return ExportOptions(cap_policy="fit", artifact_cap_bytes=cap)

    for cap in (100_000, 200_000):
        true_bytes = export.encode_artifact({"w": normal(512, 512)}, {}, fit(cap)).report.total_bytes
        assert cap - int8_plan.FIT_WINDOW_BYTES <= true_bytes <= cap
        assert prediction.predict_artifact_bytes(shapes, fit(cap)) == pytest.approx(true_bytes, rel=0.01)
        assert prediction.predict_artifact_bytes(shapes, fit(cap + 40_000), code_bytes=40_000) == (
            prediction.predict_artifact_bytes(shapes, fit(cap)))
    for few, many in ((1_000, 10_000), (10**7, 10**8)):     # beyond its coarsest and its finest plan a cap says nothing
        assert prediction.predict_artifact_bytes(shapes, fit(few)) == prediction.predict_artifact_bytes(shapes, fit(many))
    large = {f"blocks.{i}.w": (2048, 2048) for i in range(8)}
    assert prediction.predict_artifact_bytes(large, fit(16_000_000)) == 16_000_000 - int8_plan.FIT_WINDOW_BYTES // 4


@pytest.mark.parametrize("shares", [[0.5, 0.25, 0.125, 0.125], [0.9, 0.1], [0.4, 0.3, 0.2, 0.1]])
def test_huffman_bits(shares: list[float]) -> None:
    lengths = {4: [1, 2, 3, 3], 2: [1, 1]}[len(shares)]
    assert prediction.huffman_bits(np.array(shares)) == pytest.approx(np.dot(shares, lengths))


# Saving


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    export.save_artifact(path, {"w": torch.ones(3)}, {}, ExportOptions())
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="tensor w: found a value that is not finite"):
        export.save_artifact(path, {"w": torch.tensor([float("nan")])}, {}, ExportOptions())

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        export.save_artifact(path, {"w": torch.zeros(3)}, {}, ExportOptions())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]


def test_saving_never_moves_or_changes_the_weights(tmp_path: Path) -> None:
    state = {"w": torch.nn.Parameter(normal(300, 300)), "h": normal(5, 3).T}
    copies = {name: tensor.detach().clone() for name, tensor in state.items()}
    report = export.save_artifact(tmp_path / "model", state, {"a": 1}, ExportOptions()).report
    artifact = export.load_artifact(tmp_path / "model")
    assert all(torch.equal(state[name], copy) for name, copy in copies.items())
    assert report.total_bytes == (tmp_path / "model").stat().st_size
    assert artifact.meta == {"a": 1}
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in artifact.state.values())


# Checkpoints


def baseline_dict() -> dict[str, Any]:
    """What the challenge's trainer pickles: codes, scales and dtypes beside what it keeps."""
    return {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {"tok_emb.weight": torch.tensor([[1, -2], [3, 127]], dtype=torch.int8),
                      "bias": torch.tensor([5, -5], dtype=torch.int8)},
        "scales": {"tok_emb.weight": torch.tensor([0.5, 0.25]).half(), "bias": torch.tensor(0.1)},
        "dtypes": {"tok_emb.weight": "bfloat16", "bias": "float32"},
        "passthrough": {"q_gain": torch.tensor([1.5]), "small": torch.tensor([0.1]).half(), "n": torch.tensor(7)},
        "qmeta": {"tok_emb.weight": {"scheme": "per_row", "axis": 0}},
        "passthrough_orig_dtypes": {"small": "float32"},
    }


def saved(obj: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def test_checkpoints_are_told_apart_by_content(tmp_path: Path) -> None:
    path, state = tmp_path / "misleading.txt", {"w": normal(3, 4).bfloat16(), "n": torch.tensor([3])}

    def read() -> tuple[dict[str, Tensor], Any]:
        return export_verbs.read_checkpoint(path)

    path.write_bytes(saved(state))
    assert read()[1] is None
    assert torch.equal(read()[0]["w"], state["w"])
    assert torch.equal(read()[0]["n"], state["n"])
    save_file(state, path)
    assert read()[1] is None
    assert torch.equal(read()[0]["w"], state["w"])
    save_file({"model.w": state["w"], "optimizer.w": normal(2), "rng": torch.ones(1)}, path,
              {"artifact_meta": '{"a": 1}'})
    assert read()[1] == {"a": 1}
    assert list(read()[0]) == ["w"]
    assert torch.equal(read()[0]["w"], state["w"])
    for level in (1, 6, 9):
        path.write_bytes(zlib.compress(saved(baseline_dict()), level))
        loaded, meta = read()
        assert meta is None
        assert loaded.keys() == {"tok_emb.weight", "bias", "q_gain", "small", "n"}
        assert loaded["tok_emb.weight"].dtype == torch.bfloat16
        assert loaded["tok_emb.weight"].tolist() == [[0.5, -1.0], [0.75, 31.75]]
        assert torch.equal(loaded["bias"], torch.tensor([5.0, -5.0]) * 0.1)
        assert torch.equal(loaded["small"], torch.tensor([0.1]).half().float())
        assert loaded["n"].dtype == torch.int64


def changed(**parts: Any) -> bytes:
    return zlib.compress(saved({**baseline_dict(), **parts}))


def safetensors_with(meta: str) -> bytes:
    header = json.dumps({"__metadata__": {"artifact_meta": meta}}).encode()
    return len(header).to_bytes(8, "little") + header


class Evil:
    """Unpickles into a call, where unpickling may call."""
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickle-ran",)


DENSE = "checkpoint tensor 'w' at byte 0: found a Tensor, expected a dense tensor"
BAD_CHECKPOINTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"",
              "checkpoint at byte 0: found b'', expected a safetensors file, a PyTorch zip or a zlib stream"),
    "text": (lambda: b"hello world", "checkpoint at byte 0: found b'hello wor', expected a safetensors file"),
    "artifact": (lambda: export.encode_artifact({}, {}, ExportOptions()).data, "checkpoint at byte 0: found b'ANLM"),
    "evil": (lambda: saved({"w": Evil()}), "checkpoint at byte 0: found UnpicklingError"),
    "list": (lambda: saved([torch.ones(1)]), "checkpoint at byte 0: found a list, expected a dict of named tensors"),
    "numbers": (lambda: saved({1: torch.ones(1)}), "checkpoint at byte 0: found a dict, expected a dict of named"),
    "no tensor": (lambda: saved({"w": 1.5}), "checkpoint tensor 'w' at byte 0: found a float, expected a dense tensor"),
    "sparse": (lambda: saved({"w": torch.eye(2).to_sparse()}), DENSE),
    "meta device": (lambda: saved({"w": torch.empty(3, device="meta")}), DENSE),
    "zero strides": (lambda: saved({"w": torch.zeros(1).expand(2**20, 2**20)}),
                     f"checkpoint at byte 0: found {2**42} bytes of tensors, expected at most {2**30}"),
    "zlib cut": (lambda: zlib.compress(saved(baseline_dict()))[:-9], "checkpoint at byte 0: found no end at its"),
    "zlib trailing": (lambda: zlib.compress(saved(baseline_dict())) + b"x", "checkpoint at byte 0: found no end at"),
    "zlib of text": (lambda: zlib.compress(b"text"), "checkpoint at byte 0: found BadZipFile"),
    "no format": (lambda: zlib.compress(saved({"w": torch.ones(1)})),
                  "checkpoint __quant_format__ at byte 0: found None, expected int8_clean_per_row_v1"),
    "no scales": (lambda: changed(scales={}), "checkpoint at byte 0: found tensors without scales or dtype"),
    "no codes": (lambda: changed(quantized=None), "checkpoint at byte 0: found a NoneType"),
    "dtype": (lambda: changed(dtypes={"tok_emb.weight": "Storage", "bias": "float32"}),
              "checkpoint dtypes at byte 0: found ['Storage']"),
    "dtypes": (lambda: changed(dtypes=3), "checkpoint at byte 0: found TypeError"),
    "scale shape": (lambda: changed(scales={"tok_emb.weight": torch.ones(3), "bias": torch.tensor(1.0)}),
                    "checkpoint tensor 'tok_emb.weight' at byte 0: found torch.int8, scales (3,)"),
    "code dtype": (lambda: changed(quantized={"tok_emb.weight": torch.ones(2, 2), "bias": torch.ones(1)}),
                   "checkpoint tensor 'tok_emb.weight' at byte 0: found torch.float32"),
    "safetensors cut": (lambda: (100).to_bytes(8, "little") + b"{}", "checkpoint at byte 0: found SafetensorError"),
    "meta list": (lambda: safetensors_with("[1]"), "checkpoint artifact_meta: found a list, expected a JSON"),
    "meta cut": (lambda: safetensors_with('{"a":'), "checkpoint artifact_meta: found JSONDecodeError"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, want = BAD_CHECKPOINTS[case]
    path = tmp_path / "checkpoint"
    path.write_bytes(make())
    with pytest.raises(ArtifactError) as caught:
        export_verbs.read_checkpoint(path)
    assert str(caught.value).startswith(f"artifact: {want}"), str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_zlib_and_zip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_verbs, "MAX_RAW_BYTES", 2**16)
    (tmp_path / "zlib").write_bytes(zlib.compress(bytes(2**20)))
    with pytest.raises(ArtifactError, match="found no end at its 65536 bytes, expected a zlib stream of below 65536"):
        export_verbs.read_checkpoint(tmp_path / "zlib")
    for method, copies in ((zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_STORED, 50)):      # 50 entries of the same bytes
        with zipfile.ZipFile(tmp_path / "zip", "w", method) as archive:
            archive.writestr("archive/data.pkl", bytes(2**20))
            archive.filelist *= copies
        with pytest.raises(ArtifactError, match="found a compressed archive, expected stored entries"):
            export_verbs.read_checkpoint(tmp_path / "zip")


@pytest.mark.parametrize("kind", ["pt", "ptz", "safetensors"])
def test_mutated_checkpoints_raise_nothing_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    if kind == "safetensors":
        save_file({"w": normal(3, 4)}, path, {"artifact_meta": '{"a":1}'})
        data = path.read_bytes()
    else:
        data = zlib.compress(saved(baseline_dict()), 0) if kind == "ptz" else saved({"w": normal(3, 4)})
    rng, refused = random.Random(0), 0
    for i in range(400):
        damaged = bytearray(data if i % 4 else data[:rng.randrange(len(data))])
        for _ in range(min(len(damaged), rng.randint(1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            state, _ = export_verbs.read_checkpoint(path)
            assert all(isinstance(tensor, Tensor) for tensor in state.values())
        except ArtifactError:
            refused += 1
    assert refused > 100


# Command line

CODE_BYTES = 1_000


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands in for what the verbs take from the trainer."""
    calls = types.SimpleNamespace(knobs=None, evaluated=None)

    def meta_from_state(state: dict[str, Tensor], overrides: dict[str, str]) -> dict[str, Any]:
        calls.knobs = overrides
        return {"model": {"tensors": len(state)}}

    def evaluate_artifact(state: dict[str, Tensor], meta: dict[str, Any], **arguments: Any) -> types.SimpleNamespace:
        calls.evaluated = (sorted(state), meta, arguments)
        return types.SimpleNamespace(val_loss=2.0726993, val_bpb=1.22761234567, tokens=9, bytes=21, seconds=1.4)

    monkeypatch.setattr(export_verbs, "meta_from_state", meta_from_state)
    monkeypatch.setattr(export_verbs, "evaluate_artifact", evaluate_artifact)
    monkeypatch.setattr(train_gpt, "code_bytes", lambda *_: CODE_BYTES)
    return calls


def checkpoint(folder: Path, **changes: Tensor | None) -> Path:
    """Ours, with its meta; a change of None leaves the tensor out."""
    path = folder / "ours.safetensors"
    state = {"w": normal(300, 301), "q_gain": torch.ones(8)} | changes
    save_file({f"model.{name}": t for name, t in state.items() if t is not None}, path, {"artifact_meta": '{"a": 1}'})
    return path


def test_write_inspect_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = checkpoint(tmp_path), tmp_path / "model"
    flags = ["--weight-quantization-bits", "6", "--int8-axis-mode", "auto"]
    assert export.main(["write", str(source), "-o", str(target), *flags]) == 0
    size = target.stat().st_size
    out = capsys.readouterr().out
    assert out.startswith(f"wrote:{target} total_bytes:{size} bits_per_weight:")
    assert out.count("\n") == 1
    assert export.main(["inspect", str(target)]) == 0
    table = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(table) if line.endswith("part"))
    parts = [int(line.split()[0]) for line in table[start + 1:]]
    assert sum(parts[:-1]) == parts[-1] == size
    assert table[0] == 'meta: {"a": 1, "export": {"int8_axis_mode": "auto", "weight_quantization_bits": 6}}'
    layout = export.load_artifact(target).plan[1].layout
    assert any(line.split() == ["int", "±31", "row", layout, "float32", "300x301", "w"] for line in table)
    assert export.main(["inspect", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["parts"].values()) == report["total_bytes"] == size
    assert report["meta"] == {"a": 1, "export": {"int8_axis_mode": "auto", "weight_quantization_bits": 6}}
    assert [(row["name"], row["codec"]) for row in report["plan"]] == [("q_gain", "f32"), ("w", "int")]
    assert export.main(["verify", str(target), str(source)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "equal   q_gain rms_error:0.000000 max_error:0"
    assert out[-1] == "tensors:2 differing:0"
    assert out[1].startswith("equal   w rms_error:0.029")


@pytest.mark.parametrize("flags", [
    [], ["--int8-scale-floor", "0", "--int8-clip-sigmas", "3.5"], ["--int8-axis-mode", "col"],
    ["--weight-quantization-bits", "16"], ["--int8-keep-float-max-numel", "0"],
    ["--int8-residual-rank", "2", "--int8-residual-storage", "lqer"], ["--export-rotate", "1"],
    ["--cap-policy", "fit", "--artifact-cap-bytes", "60000"],
])
def test_verify_repeats_the_export_by_the_options_in_the_file(
    flags: list[str], tmp_path: Path, trainer: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = checkpoint(tmp_path), tmp_path / "model"
    assert export.main(["write", str(source), "-o", str(target), *flags]) == 0
    assert export.main(["verify", str(target), str(source)]) == 0
    assert capsys.readouterr().out.endswith("tensors:2 differing:0\n")
    checkpoint(tmp_path, w=normal(300, 301, seed=1))
    assert export.main(["verify", str(target), str(source)]) == 1
    assert capsys.readouterr().out.endswith("tensors:2 differing:1\n")


def test_inspect_shows_axes_layouts_kept_values_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["inspect", str(ROOT / "tests" / "data" / "golden_v2.anlm")]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[2] == ["codec", "codes", "axis", "layout", "kept", "rank", "dtype", "shape", "tensor"]
    for row in ("int ±1 both rows_by_scale 5 entries 1 f16 float32 9x8 both",
                "int ±3 col cols_by_scale 2 rows 2 int8 bfloat16 8x9 col",
                "int ±60 row cols 3 cols 2 lqer float16 5x33 lqer",
                "raw row rows int64 scalar step"):
        assert row.split() in table


def test_verify_finds_every_difference(
    tmp_path: Path, trainer: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = checkpoint(tmp_path), tmp_path / "model"
    export.main(["write", str(source), "-o", str(target)])
    w = normal(300, 301)
    nudged = w.clone()
    nudged[7, 7] += 1.0
    for change, line in (
        ({"w": nudged}, "differs w rms_error:"),
        ({"q_gain": torch.ones(8).double()}, "differs q_gain torch.float32 (8,), in the checkpoint torch.float64 (8,)"),
        ({"w": w[:, :300].contiguous()}, "differs w torch.float32 (300, 301), in the checkpoint torch."),
        ({"extra": torch.ones(1)}, "differs extra only in the checkpoint"),
        ({"q_gain": None}, "differs q_gain only in the file"),
    ):
        assert export.main(["verify", str(target), str(checkpoint(tmp_path, **change))]) == 1
        out = capsys.readouterr().out
        assert line in out
        assert out.endswith("differing:1\n")


@pytest.mark.parametrize(("asked", "found"), [
    ({"bogus": 1, "another": 2}, "['another', 'bogus']"), (3, "[3]"), ([], "[[]]"), (None, "[None]"),
    ({"int8_residual_rank": "two"}, "['int8_residual_rank']"), ({"int8_scale_floor": None}, "['int8_scale_floor']"),
    ({"int8_clip_sigmas": [1.0]}, "['int8_clip_sigmas']"), ({"export_permute": 1}, "['export_permute']"),
    ({"cap_policy": {}}, "['cap_policy']"),
])
def test_verify_refuses_foreign_options(
    asked: Any, found: str, tmp_path: Path, trainer: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    export.save_artifact(tmp_path / "model", {"w": torch.ones(2)}, {"export": asked}, ExportOptions())
    assert export.main(["verify", str(tmp_path / "model"), str(checkpoint(tmp_path))]) == 2
    want = f"export.py verify: artifact: meta.export: found {found}, expected options of this version\n"
    assert capsys.readouterr() == ("", want)


def test_write_refuses_more_than_the_cap_unless_it_only_warns(
    tmp_path: Path, trainer: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = checkpoint(tmp_path), tmp_path / "model"
    state = {"w": normal(300, 301), "q_gain": torch.ones(8)}

    def total(cap: int) -> int:
        return CODE_BYTES + export.encode_artifact(state, {"a": 1}, ExportOptions(artifact_cap_bytes=cap)).report.total_bytes

    def write(cap: int, *flags: str) -> int:
        return export.main(["write", str(source), "-o", str(target), "--artifact-cap-bytes", str(cap), *flags])

    about = total(70_000)           # the cap is in the file, whose size depends on its digits
    least = next(cap for cap in range(about - 20, about + 20) if total(cap) <= cap)
    for cap in (60_000, least - 1):
        assert write(cap) == 2
        assert capsys.readouterr() == ("", (
            f"export.py write: artifact and code take {total(cap)} bytes, ARTIFACT_CAP_BYTES={cap}; nothing was written:"
            " --cap-policy fit makes it fit, warn writes it all the same\n"))
        assert not target.exists()
    assert write(least) == 0
    assert target.stat().st_size + CODE_BYTES == total(least)
    assert write(0) == 0
    assert target.stat().st_size + CODE_BYTES == total(0)
    assert write(60_000, "--cap-policy", "warn") == 0
    assert target.stat().st_size + CODE_BYTES > 60_000
    assert write(60_000, "--cap-policy", "fit") == 0
    assert target.stat().st_size + CODE_BYTES <= 60_000


def test_challenge_checkpoints_get_their_meta_from_the_trainer(tmp_path: Path, trainer: types.SimpleNamespace) -> None:
    source, target = tmp_path / "final_model.pt", tmp_path / "model"
    source.write_bytes(saved({"w": normal(300, 300)}))
    knobs = ["--knob", "ROPE_BASE=5000", "--knob", "NOTE=a=b"]
    assert export.main(["write", str(source), "-o", str(target), *knobs]) == 0
    assert trainer.knobs == {"ROPE_BASE": "5000", "NOTE": "a=b"}
    assert export.load_artifact(target).meta == {"model": {"tensors": 1}}
    assert export.main(["verify", str(target), str(source), "--knob", "ROPE_BASE=7"]) == 0
    assert trainer.knobs == {"ROPE_BASE": "7"}


def test_eval_prints_the_challenges_lines(
    tmp_path: Path, trainer: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    export.save_artifact(tmp_path / "model", {"w": torch.ones(2)}, {"a": 1}, ExportOptions())
    arguments = ["--data", "d", "--tokenizer", "t", "--max-tokens", "99"]
    assert export.main(["eval", str(tmp_path / "model"), *arguments]) == 0
    assert trainer.evaluated == (["w"], {"a": 1}, {"data": "d", "tokenizer": "t", "device": "auto", "max_tokens": 99,
                                                   "batch_tokens": 65_536})
    assert capsys.readouterr().out.splitlines() == [
        "final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2276 eval_time:1400ms",
        "final_int8_zlib_roundtrip_exact val_loss:2.07269930 val_bpb:1.22761235",
    ]


def test_extract_gives_the_tensors_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"w": normal(300, 301), "half": normal(3, 5).half(), "flags": torch.tensor([True, False])}
    file, target = tmp_path / "model", tmp_path / "out.safetensors"
    export.save_artifact(file, state, {"a": 1}, ExportOptions())
    decoded = export.load_artifact(file).state
    assert export.main(["extract", str(file), "half"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("half float16 (3, 5) rms:")
    assert out[1].startswith("tensor([[")
    for chosen, names in ((["w"], ["w"]), ([], ["flags", "half", "w"])):
        assert export.main(["extract", str(file), *chosen, "--to", str(target)]) == 0
        assert capsys.readouterr().out == f"wrote:{target} tensors:{len(names)} bytes:{target.stat().st_size}\n"
        loaded, meta = export_verbs.read_checkpoint(target)
        assert (sorted(loaded), meta) == (names, {"a": 1})
        assert all(torch.equal(loaded[name], decoded[name]) and loaded[name].dtype == decoded[name].dtype for name in names)


def test_predict_prints_the_total_of_the_knobs(monkeypatch: pytest.MonkeyPatch, trainer: types.SimpleNamespace,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    knobs = {"NUM_LAYERS": "2", "MODEL_DIM": "128", "INT8_SCALE_FLOOR": "0"}
    cfg, problems = train_gpt.Config.parse(knobs)
    assert problems == []
    artifact = prediction.predict_artifact_bytes(train_gpt.tensor_shapes(cfg.shape), cfg.export_options)
    want = f"predicted: artifact {artifact} + code {CODE_BYTES} = {artifact + CODE_BYTES} bytes of 16000000 under the cap\n"
    monkeypatch.setenv("NUM_LAYERS", "2")
    monkeypatch.setenv("MODEL_DIM", "96")       # the command line comes before it
    assert export.main(["predict", "MODEL_DIM=128", "INT8_SCALE_FLOOR=0"]) == 0
    assert capsys.readouterr().out == want
    cap = ["ARTIFACT_CAP_BYTES=1000", "MODEL_DIM=128", "INT8_SCALE_FLOOR=0"]
    over = want.replace("16000000 under the cap", "1000 OVER THE CAP")
    for policy, code in (("refuse", 2), ("warn", 0)):
        assert export.main(["predict", *cap, f"CAP_POLICY={policy}"]) == code
        assert capsys.readouterr().out == over


@pytest.mark.parametrize(("arguments", "message"), [
    (["write", "{ours}", "-o", "{out}", "--weight-quantization-bits", "9", "--int8-axis-mode", "x"],
     "INT8_AXIS_MODE must be row, col or auto, got 'x'; WEIGHT_QUANTIZATION_BITS must be 2..8 or 16, got 9"),
    (["write", "{ours}", "-o", "{out}", "--knob", "ROPE"], "a knob must be NAME=VALUE, got ROPE"),
    (["write", "{ours}", "-o", "{out}", "--knob", "A=1"], "carries its configuration, which --knob A=1 cannot change"),
    (["write", "{nan}", "-o", "{out}"], "artifact: tensor w: found a value that is not finite"),
    (["write", "{missing}", "-o", "{out}"], "No such file or directory"),
    (["write", "{ours}", "-o", "{missing}/out"], "No such file or directory"),
    (["write", "{text}", "-o", "{out}"], "artifact: checkpoint at byte 0: found b'text'"),
    (["write", "{ours}", "-o", "{out}", "--calibration-tokens", "9"],
     "--calibration-tokens needs --data DIR and --tokenizer MODEL"),
    (["write", "{ours}", "-o", "{out}", "--export-allocate", "hessian"],
     "EXPORT_ALLOCATE=hessian needs calibration statistics"),
    (["write", "{ours}", "-o", "{out}", "--sensitivity-map", "{text}"],
     "artifact: sensitivity map: found JSONDecodeError"),
    (["write", "{ours}", "-o", "{out}", "--int8-residual-rank", "2", "--int8-residual-budget-bytes", "10"],
     "INT8_RESIDUAL_BUDGET_BYTES=10 holds no correction: the smallest takes"),
    (["write", "{ours}", "-o", "{out}", "--cap-policy", "fit", "--artifact-cap-bytes", "3000"],
     "beside 1000 of code, expected at most ARTIFACT_CAP_BYTES=3000; choose a smaller shape"),
    (["inspect", "{text}"], "artifact: magic at byte 0: found b'text', expected b'ANLM'"),
    (["inspect", "{missing}"], "No such file or directory"),
    (["verify", "{text}", "{ours}"], "artifact: magic at byte 0"),
    (["verify", "{golden}", "{text}"], "artifact: checkpoint at byte 0: found b'text'"),
    (["extract", "{golden}"], "name a tensor or give --to FILE.safetensors; the file holds blocks.0.attn_scale, blocks."),
    (["extract", "{golden}", "w", "--to", "{out}"], "holds no tensor 'w', but blocks.0.attn_scale, blocks."),
    (["extract", "{text}", "w"], "artifact: magic at byte 0"),
    (["predict", "NUM_LAYERS"], "a knob must be NAME=VALUE, got NUM_LAYERS"),
    (["predict", "NUM_LAYERS=x", "CAP_POLICY=y"], "NUM_LAYERS must be a whole number, got 'x'; CAP_POLICY must be"),
])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, trainer: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path).rename(tmp_path / "ours")
    save_file({"w": torch.tensor([float("nan")])}, tmp_path / "nan", {"artifact_meta": "{}"})
    (tmp_path / "text").write_text("text")
    before = sorted(os.listdir(tmp_path))
    paths = {name: str(tmp_path / name) for name in ("ours", "nan", "text", "missing", "out")}
    paths["golden"] = str(ROOT / "tests" / "data" / "golden_v2.anlm")
    assert export.main([argument.format(**paths) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"export.py {arguments[0]}: ")
    assert message in captured.err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: verb"),
    (["write"], "the following arguments are required: checkpoint, -o/--output"),
    (["nonsense"], "invalid choice: 'nonsense'"),
    (["write", "x", "-o", "y", "--weight-quantization-bits", "six"], "invalid int value: 'six'"),
    (["write", "x", "-o", "y", "--export-rotate", "yes"], "invalid as_bool value: 'yes'"),
    (["write", "x", "-o", "y", "--axis-mode", "row"], "unrecognized arguments: --axis-mode row"),
    (["eval", "x"], "the following arguments are required: --data, --tokenizer"),
])
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        export.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("verb", export_verbs.VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A stray % in the text of a knob would raise here."""
    with pytest.raises(SystemExit) as caught:
        export.main([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: export.py {verb} ")


def test_the_script_itself_reports_a_damaged_file(tmp_path: Path) -> None:
    """Run as a script the module enters itself by name; were ArtifactError two classes, this would be a traceback."""
    (tmp_path / "damaged").write_bytes((ROOT / "tests" / "data" / "golden_v2.anlm").read_bytes()[:-1])
    command = [sys.executable, "export.py", "inspect", str(tmp_path / "damaged")]
    run = subprocess.run(command, cwd=ROOT, env={}, text=True, capture_output=True)
    want = "export.py inspect: artifact: file at byte 2064: found its end, expected 2065 bytes\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", want)
