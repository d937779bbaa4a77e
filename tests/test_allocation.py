"""Allocation: the steps of all tensors from one price of a byte, and a file that ends below the cap.

Guarantees: rate curves are sorted; the solver stays within its budget and within the hull's bound of the optimum; an
allocated plan expects less loss than the uniform one of the same bytes; of 200 random models and schemes none ends over its
cap, those in reach end in the window below it, the others say which lever ran out.
Run: python -m pytest tests/test_allocation.py (about a minute).
"""
from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import export
import int8_plan
from export import (
    ArtifactError,
    Choice,
    ExportOptions,
    Judge,
    Statistics,
    Term,
    decode_artifact,
    encode_artifact,
    expected_loss,
    matrices,
    restore,
    shapes_of,
    weights_digest,
)
from int8_plan import Curve, rate_curve, solve
from sensitivity_map import SensitivityMap
from train_gpt import ModelShape, tensor_shapes


def random_state(shape: ModelShape, seed: int, scale: float = 0.05) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=generator) * scale + (1.0 if len(s) < 2 else 0.0)
            for name, s in tensor_shapes(shape).items()}


def random_statistics(state: dict[str, Tensor], seed: int, spread: float = 1.5) -> Statistics:
    """Rows and columns of very different costs, and tensors too."""
    generator = torch.Generator().manual_seed(seed)

    def uneven(n: int) -> Tensor:
        return (spread * torch.randn(n, generator=generator)).exp()

    terms = {}
    for name, (rows, cols) in matrices(shapes_of(state)).items():
        x = torch.randn(2 * cols, cols, generator=generator) * uneven(cols).sqrt()
        terms[name] = (Term(1e-3 * uneven(1) * uneven(rows), x.T @ x / (2 * cols)),)
    return Statistics(weights_digest(state), 1000, terms)


def line_map(state: dict[str, Tensor], seed: int = 0) -> SensitivityMap:
    rng = random.Random(seed)
    slopes = {name: 10 ** rng.uniform(-2, 1) for name in matrices(shapes_of(state))}
    return SensitivityMap({name: ((1e-6, 1e-6 * s), (1e-2, 1e-2 * s)) for name, s in slopes.items()})


def loss_of(data: bytes, state: dict[str, Tensor], statistics: Statistics) -> float:
    """From the file and the statistics alone; for exports that reorder nothing."""
    decoded = decode_artifact(data).state
    return sum(expected_loss(state[name].double() - decoded[name].double(), uses) for name, uses in statistics.terms.items())


MEDIUM = ModelShape(vocab_size=300, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, mlp_mult=2)   # 81,000 weights


# --- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "messages"), [
    ({}, []),
    ({"cap_policy": "fit"}, []),
    ({"export_allocate": "hessian"}, []),
    ({"export_allocate": "hessian", "weight_quantization_bits": 6},
     ["EXPORT_ALLOCATE=hessian chooses what WEIGHT_QUANTIZATION_BITS would set; unset one of them"]),
    ({"export_allocate": "sensitivity", "int8_axis_mode": "col", "int8_clip_sigmas": 4.0, "embed_quantization_bits": 7},
     ["EXPORT_ALLOCATE=sensitivity chooses what INT8_AXIS_MODE, INT8_CLIP_SIGMAS, EMBED_QUANTIZATION_BITS would set;"
      " unset one of them"]),
    ({"export_allocate": "hessian", "artifact_cap_bytes": 0},
     ["CAP_POLICY=refuse with EXPORT_ALLOCATE=hessian needs ARTIFACT_CAP_BYTES above 0"]),
    ({"cap_policy": "fit", "artifact_cap_bytes": 0},
     ["CAP_POLICY=fit with EXPORT_ALLOCATE=uniform needs ARTIFACT_CAP_BYTES above 0"]),
    ({"int8_residual_rank": 33}, ["INT8_RESIDUAL_RANK must be at most 32, got 33"]),
    ({"int8_residual_power_iters": 0}, ["INT8_RESIDUAL_POWER_ITERS must be at least 1, got 0"]),
    ({"int8_scale_floor": 1.5}, ["INT8_SCALE_FLOOR must be in 0..1, got 1.5"]),
    ({"int8_scale_floor": math.nan}, ["INT8_SCALE_FLOOR must be finite, got nan"]),
    ({"int8_clip_sigmas": -1.0}, ["INT8_CLIP_SIGMAS must be at least 0, got -1.0"]),
    ({"int8_keep_float_max_numel": -1}, ["INT8_KEEP_FLOAT_MAX_NUMEL must be at least 0, got -1"]),
    ({"artifact_cap_bytes": -5}, ["ARTIFACT_CAP_BYTES must be at least 0, got -5"]),
    ({"export_allocate": "fisher"},
     ["EXPORT_ALLOCATE must be uniform, hessian or sensitivity, got 'fisher'"]),
    ({"cap_policy": "hope"}, ["CAP_POLICY must be refuse, warn or fit, got 'hope'"]),
    ({"export_permute": "heads"}, ["EXPORT_PERMUTE must be off, mlp or all, got 'heads'"]),
    ({"int8_residual_storage": "f8"}, ["INT8_RESIDUAL_STORAGE must be auto, f16, int8 or lqer, got 'f8'"]),
    ({"weight_quantization_bits": 1, "embed_quantization_bits": 9},
     ["WEIGHT_QUANTIZATION_BITS must be 2..8 or 16, got 1", "EMBED_QUANTIZATION_BITS must be 2..8 or 16, got 9"]),
], ids=str)
def test_conflicts_of_options_have_their_messages_and_stop_an_export(options: dict[str, Any], messages: list[str]) -> None:
    assert ExportOptions(**options).problems() == messages
    if messages:
        with pytest.raises(ValueError) as caught:
            encode_artifact({"w": torch.ones(2, 2)}, {}, ExportOptions(**options))
        assert str(caught.value) == "; ".join(messages)


@pytest.mark.parametrize(("allocate", "message"), [
    ("hessian", "EXPORT_ALLOCATE=hessian needs calibration statistics"),
    ("sensitivity", "EXPORT_ALLOCATE=sensitivity needs a map"),
])
def test_an_allocation_without_its_knowledge_says_what_it_needs(allocate: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        encode_artifact({"w": torch.ones(2, 2)}, {}, ExportOptions(export_allocate=allocate))
    assert str(caught.value) == message


# --- curves ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", ["uniform", "hessian"])
@pytest.mark.parametrize("w", [
    torch.linspace(-1, 1, 2400).view(60, 40).T ** 3, torch.full((1, 1), -2.0), torch.linspace(-1, 1, 97)[:, None],
    torch.zeros(5, 7), torch.full((8, 9), 0.3), torch.linspace(-1, 1, 50),
    torch.linspace(-1, 1, 403).view(13, 31).bfloat16(), torch.linspace(-1, 1, 256).view(16, 16) * 1e-9,
], ids=["matrix", "1x1", "column", "zeros", "constant", "vector", "bfloat16", "tiny"])
def test_a_rate_curve_goes_up_in_bytes_and_down_in_loss(w: Tensor, allocate: str) -> None:
    statistics = random_statistics({"w": w}, 3) if w.ndim == 2 and allocate == "hessian" else None
    curve = rate_curve("w", w, Judge(statistics), ExportOptions(export_allocate=allocate, int8_scale_floor=0.0))
    assert len(curve.choices) == len(curve.nbytes) == len(curve.loss) >= 1
    assert (np.diff(curve.nbytes) >= 0).all()
    assert (np.diff(curve.loss) < 0).all()
    assert np.isfinite(curve.loss).all()


@pytest.mark.parametrize(
    "family", [Choice("int", "row"), Choice("int", "col"), Choice("int", "both", weighted=True)], ids=str)
def test_a_curves_point_is_what_storing_its_choice_gives(family: Choice) -> None:
    """At an anchor exactly; between two of them, within a few per cent."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    statistics = random_statistics({"w": w}, 5)
    judge, options = Judge(statistics), ExportOptions(export_allocate="hessian", int8_scale_floor=0.0)
    costs = export.weight_costs(statistics.terms["w"])
    points = {c.q_max: (n, g) for n, g, c in int8_plan.interpolated("w", w, family, costs, judge, options)}
    for q_max, tolerance in ((8.0, 1e-6), (64.0, 1e-6), (2 ** 2.5, 0.1), (2 ** 4.5, 0.1)):
        stored = export.store("w", w, export.replace(family, q_max=q_max), options, costs)
        loss = expected_loss(w.double() - restore(stored.row, stored.values).double(), statistics.terms["w"])
        assert points[q_max][1] == pytest.approx(loss, rel=tolerance)


@pytest.mark.parametrize("magnitude", [1e12, 1e30])     # beyond even the product of a row's and a column's step
@pytest.mark.parametrize("options", [{"cap_policy": "fit"}, {"export_allocate": "hessian"}], ids=str)
def test_weights_beyond_half_precision_are_refused(options: dict[str, Any], magnitude: float) -> None:
    state = {"w": torch.linspace(-1, 1, 64).view(8, 8) * magnitude}
    with pytest.raises(ArtifactError) as caught:
        encode_artifact(state, {}, ExportOptions(**options), statistics=random_statistics(state, 1))
    assert str(caught.value) == (
        f"artifact: tensor w: found magnitudes up to {magnitude:g}, expected what half precision can hold")


def test_weights_that_overflow_at_some_steps_only_are_stored_by_others() -> None:
    """1e6 is beyond fp16 as a weight and as the step of one code, and not as that of 127."""
    w = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 3e5
    state = {"w": w, "v.attn_scale": torch.full((4,), 1e6)}
    for options in ({"cap_policy": "fit"}, {"export_allocate": "hessian"}):
        found = encode_artifact(state, {}, ExportOptions(**options), statistics=random_statistics(state, 1))
        decoded = decode_artifact(found.data).state
        assert float((decoded["w"] - state["w"]).norm() / state["w"].norm()) < 0.02
        assert torch.equal(decoded["v.attn_scale"], state["v.attn_scale"])


# --- the solver -----------------------------------------------------------------------------------------------------------


def tables(draw: st.DrawFn) -> dict[str, Curve]:
    curves = {}
    for i in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 5))
        nbytes = sorted(draw(st.lists(st.integers(1, 200), min_size=n, max_size=n, unique=True)))
        loss = sorted(draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n, unique=True)), reverse=True)
        curves[str(i)] = Curve([Choice("int")] * n, np.array(nbytes, np.float64), np.array(loss, np.float64))
    return curves


def plans(curves: dict[str, Curve]) -> list[tuple[float, float]]:
    """(bytes, loss) of every combination."""
    return [(sum(c.nbytes[k] for c, k in zip(curves.values(), at, strict=True)),
             sum(c.loss[k] for c, k in zip(curves.values(), at, strict=True)))
            for at in itertools.product(*(range(len(c.nbytes)) for c in curves.values()))]


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull's vertices, ascending in bytes, descending in loss."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if found and (y >= found[-1][1] or x == found[-1][0]):
            continue
        while len(found) > 1 and ((found[-1][1] - found[-2][1]) * (x - found[-2][0])
                                  >= (y - found[-2][1]) * (found[-1][0] - found[-2][0])):
            found.pop()
        found.append((x, y))
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_the_solver_against_exhaustive_search(data: st.DataObject) -> None:
    curves = data.draw(st.composite(tables)())
    smallest, largest = (sum(c.nbytes[k] for c in curves.values()) for k in (0, -1))
    budget = data.draw(st.integers(0, int(largest) + 20))
    at, price = solve(curves, budget)
    nbytes = sum(c.nbytes[at[name]] for name, c in curves.items())
    loss = sum(c.loss[at[name]] for name, c in curves.items())
    assert price > 0
    if budget < smallest:
        assert set(at.values()) == {0}
        return
    assert nbytes <= budget
    everything = plans(curves)
    assert loss >= min(g for n, g in everything if n <= budget)
    assert loss <= min(g for n, g in hull(everything) if n <= budget)
    if budget >= largest:
        assert (nbytes, loss) == (largest, sum(c.loss[-1] for c in curves.values()))


def test_what_is_left_of_the_budget_is_filled_by_upgrades() -> None:
    """The Lagrangian's answer at 16 bytes is (1, 10) = 11; a second upgrade of 5 bytes fits too."""
    a = Curve([Choice("int")] * 2, np.array([1.0, 6.0]), np.array([10.0, 9.0]))
    b = Curve([Choice("int")] * 2, np.array([1.0, 10.0]), np.array([100.0, 1.0]))
    assert solve({"a": a, "b": b}, 15)[0] == {"a": 0, "b": 1}
    assert solve({"a": a, "b": b}, 16)[0] == {"a": 1, "b": 1}
    assert solve({"a": a, "b": b}, 9)[0] == {"a": 1, "b": 0}
    assert solve({"a": a, "b": b}, 1)[0] == {"a": 0, "b": 0}


# --- plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_an_allocated_plan_expects_less_loss_than_the_uniform_one_of_its_bytes(seed: int) -> None:
    shape = tiny_shape(num_layers=2, vocab_size=61 + seed)
    state = random_state(shape, seed)
    statistics = random_statistics(state, seed + 100)
    for bits in (3, 6):
        uniform = encode_artifact(state, {}, ExportOptions(
            int8_keep_float_max_numel=0, int8_scale_floor=0.0, weight_quantization_bits=bits, embed_quantization_bits=bits))
        allocated = encode_artifact(state, {}, ExportOptions(
            export_allocate="hessian", artifact_cap_bytes=len(uniform.data)), statistics=statistics)
        assert len(allocated.data) <= len(uniform.data)
        assert loss_of(allocated.data, state, statistics) < 0.8 * loss_of(uniform.data, state, statistics)


@pytest.mark.parametrize("options", [
    {"export_allocate": "hessian"}, {"export_allocate": "sensitivity"}, {"cap_policy": "fit", "int8_scale_floor": 0.0},
    {"export_allocate": "hessian", "int8_residual_rank": 2}, {"export_allocate": "hessian", "export_rotate": True},
], ids=str)
@pytest.mark.parametrize("cap", [30_000, 55_000])
def test_the_planned_bytes_are_the_files_within_half_a_percent(options: dict[str, Any], cap: int) -> None:
    state = random_state(MEDIUM, 1)
    found = encode_artifact(state, {}, ExportOptions(**options, artifact_cap_bytes=cap + 1000), code_bytes=1000,
                            statistics=random_statistics(state, 2), sensitivity=line_map(state))
    assert cap - 20_000 <= len(found.data) <= cap
    assert len(found.data) >= 0.97 * cap
    assert found.report.planned_bytes == pytest.approx(len(found.data), rel=0.005)
    assert found.report.total_bytes == len(found.data)
    assert f"allocated: planned {found.report.planned_bytes} bytes, came to {len(found.data)} (" in found.report.lines()[-1]
    assert (found.report.expected_nats is None) == ("export_allocate" not in options)


def test_the_expected_loss_that_is_reported_is_that_of_the_file() -> None:
    state = random_state(MEDIUM, 3)
    statistics = random_statistics(state, 4)
    options = ExportOptions(export_allocate="hessian", artifact_cap_bytes=35_000)
    found = encode_artifact(state, {}, options, statistics=statistics)
    assert found.report.expected_nats == pytest.approx(loss_of(found.data, state, statistics), rel=0.1)


def test_the_reported_loss_of_a_fine_plan_is_nats_alone() -> None:
    """Controls have no statistics: their error relative to themselves is in another unit and no part of the sum."""
    state = random_state(MEDIUM, 3)
    statistics = random_statistics(state, 4)
    tiny = Statistics(statistics.weights, 1, {
        name: tuple(export.replace(t, rows=1e-6 * t.rows) for t in uses) for name, uses in statistics.terms.items()})
    found = encode_artifact(state, {}, ExportOptions(export_allocate="hessian", artifact_cap_bytes=50_000), statistics=tiny)
    assert found.report.expected_nats == pytest.approx(loss_of(found.data, state, tiny), rel=0.1)


def test_a_measured_map_decides_where_the_bytes_go() -> None:
    """Of two equal matrices the one whose error costs a thousand times as much gets the finer steps."""
    state = random_state(MEDIUM, 5)
    first, second = "blocks.0.mlp.fc.weight", "blocks.1.mlp.fc.weight"
    state[second] = state[first].clone()
    points = dict(line_map(state).points)
    points[first], points[second] = ((1e-6, 1e-3), (1e-2, 10.0)), ((1e-6, 1e-6), (1e-2, 1e-2))
    found = encode_artifact(state, {}, ExportOptions(export_allocate="sensitivity", artifact_cap_bytes=35_000),
                            sensitivity=SensitivityMap(points))
    decoded = decode_artifact(found.data).state
    errors = [float((decoded[name] - state[name]).norm()) for name in (first, second)]
    assert errors[0] < 0.2 * errors[1]


def test_two_allocations_of_the_same_weights_give_the_same_bytes() -> None:
    state = random_state(MEDIUM, 6)
    options = ExportOptions(export_allocate="hessian", artifact_cap_bytes=35_000, export_permute="mlp", int8_residual_rank=1)
    first, second = (encode_artifact(state, {}, options, statistics=random_statistics(state, 7)).data for _ in range(2))
    assert first == second


def test_a_finest_plan_below_the_window_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_plan, "FIT_WINDOW_BYTES", 1000)
    state = random_state(tiny_shape(), 1)
    found = encode_artifact(state, {}, ExportOptions(cap_policy="fit", artifact_cap_bytes=10**6))
    short = 10**6 - 1000 - len(found.data)
    assert found.report.note == (f"{short} bytes short of the window: every tensor is at its finest"
                                 " (INT8_SCALE_FLOOR=0.00787402)")
    assert found.report.lines()[-1] == f"warning: {found.report.note}"
    free = encode_artifact(state, {}, ExportOptions(cap_policy="fit", artifact_cap_bytes=10**6, int8_scale_floor=0.0))
    assert free.report.note.endswith("every tensor is at its finest")


@pytest.mark.parametrize(("cap", "code"), [(100, 0), (1, 0), (50_000, 50_000), (50_000, 60_000), (2000, 0)])
@pytest.mark.parametrize("options", [{"cap_policy": "fit"}, {"export_allocate": "hessian"}], ids=str)
def test_a_cap_below_the_coarsest_plan_names_the_lever(options: dict[str, Any], cap: int, code: int) -> None:
    state = random_state(tiny_shape(), 2)
    with pytest.raises(ArtifactError) as caught:
        encode_artifact(state, {"k": "x" * 500}, ExportOptions(**options, artifact_cap_bytes=cap), code_bytes=code,
                        statistics=random_statistics(state, 3))
    assert re.fullmatch(rf"artifact: plan: found \d+ bytes at its coarsest beside {code} of code, expected at most "
                        rf"ARTIFACT_CAP_BYTES={cap}; choose a smaller shape", str(caught.value))


# --- cap discipline -------------------------------------------------------------------------------------------------------


def random_case(rng: random.Random) -> tuple[dict[str, Tensor], dict[str, Any], Statistics | None, int]:
    """(state, options without a cap, statistics, code bytes)."""
    heads = rng.choice([1, 2, 4])
    shape = ModelShape(
        vocab_size=rng.choice([1, 7, 61, 128]), num_layers=rng.choice([2, 3]), num_unique_blocks=rng.choice([1, 1, 2]),
        model_dim=heads * rng.choice([2, 6, 8, 12]), num_heads=heads, num_kv_heads=rng.choice([1, heads]),
        mlp_mult=rng.choice([1, 2, 3]), embed_dim=rng.choice([0, 0, 3]), tie_embeddings=rng.random() < 0.7)
    state = random_state(shape, rng.randrange(10**6), scale=10 ** rng.uniform(-3, 0.5))
    if rng.random() < 0.2:
        state["tok_emb.weight"] = state["tok_emb.weight"].bfloat16()
    allocate = rng.choice(["uniform", "uniform", "hessian"])
    options: dict[str, Any] = {
        "cap_policy": "fit", "export_allocate": allocate, "export_permute": rng.choice(["off", "off", "mlp", "all"]),
        "export_rotate": rng.random() < 0.3, "int8_residual_rank": rng.choice([0, 0, 0, 1, 3]),
        "int8_residual_storage": rng.choice(["auto", "f16", "int8", "lqer"]), "int8_residual_power_iters": 2,
        "int8_targeted_residual_mode": rng.choice(["off", "early_proj_combo"]),
        "int8_scale_floor": rng.choice([0.0, 0.0, 1 / 127]), "int8_keep_float_max_numel": rng.choice([0, 65_536])}
    if allocate == "uniform":
        options |= {"int8_axis_mode": rng.choice(["row", "col", "auto"]), "int8_clip_sigmas": rng.choice([0.0, 3.0, 5.0]),
                    "weight_quantization_bits": rng.choice([2, 5, 8, 16])}
    given = allocate == "hessian" or rng.random() < 0.2
    return state, options, random_statistics(state, rng.randrange(10**6)) if given else None, rng.choice([0, 31_000])


def fitted_bytes(state: dict[str, Tensor], options: dict[str, Any], statistics: Statistics | None, cap: int, code: int
                 ) -> tuple[int | None, str]:
    """(bytes, note), or (None, the refusal); whatever is written reads back as the writer's own tensors."""
    try:
        found = encode_artifact(state, {"of": "a test"}, ExportOptions(**options, artifact_cap_bytes=cap), code_bytes=code,
                                statistics=statistics)
    except ArtifactError as error:
        return None, str(error)
    decoded = decode_artifact(found.data).state
    assert all(torch.equal(decoded[name], restore(s.row, s.values)) for name, s in found.tensors.items())
    return len(found.data), found.report.note


@pytest.mark.parametrize("seed", range(4))
def test_no_file_ends_over_its_cap(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten random models and schemes each. The models are small, so most windows are made narrower."""
    rng = random.Random(seed)
    for case in range(10):
        state, options, statistics, code = random_case(rng)
        raw = sum(t.numel() for t in state.values())
        high = int(rng.choice([0.02, 0.3, 0.5, 0.7, 0.9, 1.2, 4.0]) * raw) + rng.randrange(700)
        window = rng.choice([20_000, max(400, high // 10)])
        monkeypatch.setattr(int8_plan, "FIT_WINDOW_BYTES", window)
        cap = max(high + code, 1)
        nbytes, text = fitted_bytes(state, options, statistics, cap, code)
        where = f"seed {seed} case {case}: {nbytes} bytes of {cap} with {code} of code, window {window}: {text} {options}"
        if nbytes is None:
            refusal = re.fullmatch(r"artifact: plan: found (\d+) bytes at its coarsest beside (\d+) of code, expected at"
                                   r" most ARTIFACT_CAP_BYTES=(\d+); choose a smaller shape", text)
            assert refusal, where
            assert (int(refusal[2]), int(refusal[3])) == (code, cap), where
            assert int(refusal[1]) + code > cap, where
            if not options["int8_residual_rank"]:       # with corrections: the test of refusals below
                enough = int(refusal[1]) + code + 60    # meta holds the cap itself
                assert fitted_bytes(state, options, statistics, enough, code)[0] is not None, where
        elif text:
            assert nbytes + code < cap - window, where
            if not options["int8_scale_floor"]:         # with a floor: the test of notes below
                finest, _ = fitted_bytes(state, options, statistics, 10 * cap + 10**6, code)
                assert finest is not None
                assert abs(finest - nbytes) <= 60, where
        else:
            assert cap - window <= nbytes + code <= cap, where


def test_a_refusal_is_true() -> None:
    """The bytes that it says the coarsest plan takes are enough for an export. Here corrections make the int tensors of the
    coarsest plan larger than half precision would be, so the search has no order to go by.
    """
    shape = ModelShape(vocab_size=61, num_layers=3, num_unique_blocks=2, model_dim=8, num_heads=4, num_kv_heads=4,
                       mlp_mult=1, embed_dim=3)
    state = random_state(shape, 1, scale=0.003)
    options = {"cap_policy": "fit", "int8_residual_rank": 3, "int8_residual_storage": "f16", "int8_axis_mode": "col"}
    nbytes, text = fitted_bytes(state, options, None, 389, 0)
    assert nbytes is None
    enough = int(text.split()[3]) + 20                  # meta holds the cap itself
    for cap in range(enough, enough + 200, 20):
        nbytes, text = fitted_bytes(state, options, None, cap, 0)
        assert nbytes is not None, text


def test_a_note_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it says that every tensor is at its finest, a higher cap gives no larger file."""
    monkeypatch.setattr(int8_plan, "FIT_WINDOW_BYTES", 200)
    state = random_state(tiny_shape(num_layers=2), 1)
    finest, _ = fitted_bytes(state, {"cap_policy": "fit"}, None, 10**6, 0)
    assert finest is not None
    for cap in range(finest - 4000, finest, 500):
        nbytes, note = fitted_bytes(state, {"cap_policy": "fit"}, None, cap, 0)
        assert nbytes is not None
        assert ("every tensor is at its finest" in note) == (abs(nbytes - finest) < 60 and bool(note)), (cap, nbytes, note)


def test_corrections_fill_what_lies_between_codes_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix takes 80 kB in codes at their finest and 140 in half precision: what is kept of it lies between."""
    monkeypatch.setattr(int8_plan, "FIT_WINDOW_BYTES", 500)
    state = {"w": torch.randn(256, 320, generator=torch.Generator().manual_seed(0))}
    statistics, options = random_statistics(state, 1), ExportOptions(export_allocate="hessian", artifact_cap_bytes=85_000)
    found = encode_artifact(state, {}, options, statistics=statistics)
    monkeypatch.setattr(int8_plan, "KEPT_SHARES", {})
    bare = encode_artifact(state, {}, options, statistics=statistics)
    assert (found.tensors["w"].row.codec, found.tensors["w"].row.kept != "none") == ("int", True)
    assert len(bare.data) < len(found.data) <= 85_000
    assert loss_of(found.data, state, statistics) < loss_of(bare.data, state, statistics)
