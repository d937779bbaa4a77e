"""Corrections: what is added to a quantised matrix removes expected loss, costs what it says, and never makes it worse.

Guarantees: the factors are the truncated SVD's, weighted by the calibration's Terms where there are any; storage reads back
as written; a budget is a bound; the targeted modes touch the tensors they name and no others; the expected loss is the
double sum of its definition; maps and statistics of another model are refused.
Run: python -m pytest tests/test_corrections.py (about 15 s).
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import filled_model, tiny_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import export
import int8_plan
from export import (
    FACTORS,
    ArtifactError,
    Choice,
    ExportOptions,
    Judge,
    Statistics,
    Stored,
    Term,
    check_statistics,
    decode_artifact,
    encode_artifact,
    expected_loss,
    restore,
    save_artifact,
    store,
    sum_squares,
    weight_costs,
    weights_digest,
)
from int8_plan import Offer, corrected, is_target, low_rank, offers, spend, store_factors
from sensitivity_map import SensitivityMap, read_sensitivity

PLAIN = ExportOptions(int8_keep_float_max_numel=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def term(rows: int, cols: int, seed: int = 0, transposed: bool = False) -> Term:
    """Rows of several magnitudes and a full moment; for a transposed use the sides change places."""
    out, into = (cols, rows) if transposed else (rows, cols)
    x = normal(2 * into, into, seed=seed + 1) * torch.linspace(0.2, 2.0, into)
    return Term(normal(out, seed=seed).exp(), x.T @ x / (2 * into), transposed)


def slow_loss(error: Tensor, terms: Sequence[Term]) -> float:
    """The definition, entry by entry: 0.5 sum_i rows_i sum_jk e_ij moment_jk e_ik."""
    total = 0.0
    for t in terms:
        e = error.double().T.tolist() if t.transposed else error.double().tolist()
        moment, rows = t.moment.double().tolist(), t.rows.double().tolist()
        for i, row in enumerate(e):
            total += 0.5 * rows[i] * sum(
                row[j] * moment[j][k] * row[k] for j in range(len(row)) for k in range(len(row)))
    return total


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def product(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ki,kj->ij", a.double(), b.double())


def spectrum(rows: int, cols: int, values: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with these singular values; its singular vectors."""
    u, _ = torch.linalg.qr(normal(rows, len(values), seed=5).double())
    v, _ = torch.linalg.qr(normal(cols, len(values), seed=6).double())
    return (u * torch.tensor(values).double() @ v.T).float(), u, v


# --- factors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols", "rank"), [(13, 29, 3), (29, 13, 5), (8, 8, 8), (1, 7, 1), (7, 1, 1), (40, 40, 2)])
def test_without_terms_the_factors_remove_what_the_svd_removes(rows: int, cols: int, rank: int) -> None:
    error = normal(rows, cols)
    left = sum_squares(error.double() - product(*low_rank(error, (), rank, 400)))
    singular = torch.linalg.svdvals(error.double())
    assert float(singular[:rank].square().sum()) - (sum_squares(error) - left) <= 1e-3 * sum_squares(error)
    assert left >= float(singular[rank:].square().sum()) * (1 - 1e-9)


def test_the_directions_are_the_singular_vectors_where_the_spectrum_has_gaps() -> None:
    error, u, v = spectrum(20, 31, [8.0, 4.0, 2.0, 1.0])
    a, b = low_rank(error, (), 3, 40)
    for k, value in enumerate((8.0, 4.0, 2.0)):
        assert float(a[k].double() @ u[:, k]) ** 2 == pytest.approx(value, rel=1e-4)      # each side carries the root
        assert float(b[k].double() @ v[:, k]) ** 2 == pytest.approx(value, rel=1e-4)
        assert float(a[k].norm() * b[k].norm()) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(("rows", "cols", "rank"), [(11, 17, 1), (17, 11, 4), (6, 6, 6), (1, 9, 1)])
def test_with_one_term_the_removed_loss_is_that_of_the_weighted_svd(rows: int, cols: int, rank: int) -> None:
    error, t = normal(rows, cols, seed=3), term(rows, cols)
    weighted = t.rows.double().sqrt()[:, None] * error.double() @ root(t.moment)
    best = 0.5 * float(torch.linalg.svdvals(weighted)[rank:].square().sum())
    whole = slow_loss(error, [t])
    left = slow_loss(error.double() - product(*low_rank(error, [t], rank, 400)), [t])
    assert left == pytest.approx(best, abs=1e-3 * whole)
    plain = slow_loss(error.double() - product(*low_rank(error, (), rank, 400)), [t])
    assert left <= plain + 1e-6 * whole


@pytest.mark.parametrize("seed", range(6))
def test_with_several_terms_each_direction_lowers_the_loss(seed: int) -> None:
    error, terms = normal(12, 15, seed=seed), [term(12, 15, seed=10 + seed), term(12, 15, seed=40 + seed)]
    a, b = low_rank(error, terms, 5, 30)
    losses = [slow_loss(error.double() - product(a[:k], b[:k]), terms) for k in range(6)]
    assert losses == sorted(losses, reverse=True)


def test_the_correction_follows_the_column_that_the_inputs_weigh() -> None:
    """The same error: the largest part of it lies in column 2, the inputs in column 6."""
    error = 0.1 * normal(9, 8)
    error[:, 2] += 3.0
    error[:, 6] += torch.where(torch.arange(9) % 2 == 0, 1.0, -1.0)
    moment = torch.full((8,), 1e-4)
    moment[6] = 100.0
    _, plain = low_rank(error, (), 1, 50)
    _, weighted = low_rank(error, [Term(torch.ones(9), moment.diag())], 1, 50)
    assert int(plain[0].abs().argmax()) == 2
    assert int(weighted[0].abs().argmax()) == 6


@pytest.mark.parametrize(("shape", "rank", "kept"), [((1, 5), 9, 1), ((5, 1), 2, 1), ((3, 4), 32, 3), ((1, 1), 32, 1)])
def test_a_rank_above_the_matrix_is_cut(shape: tuple[int, int], rank: int, kept: int) -> None:
    error = normal(*shape)
    a, b = low_rank(error, (), rank, 200)
    assert (a.shape, b.shape) == ((kept, shape[0]), (kept, shape[1]))
    assert torch.allclose(product(a, b).float(), error, atol=1e-3)


@pytest.mark.parametrize("error", [torch.zeros(4, 6), torch.full((4, 6), 0.25), torch.full((1, 1), -1e-20)], ids=str)
def test_degenerate_errors_give_finite_factors(error: Tensor) -> None:
    for terms in ((), [term(*error.shape)]):
        a, b = low_rank(error, terms, 3, 8)
        assert bool(a.isfinite().all() and b.isfinite().all())
        assert torch.allclose(product(a, b).float(), error, atol=1e-6)
        for kind in FACTORS:
            assert all(bool(part.float().isfinite().all()) for part in store_factors(error, terms, a, b, kind).values())


# --- storage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), [((5, 7), 1), ((64, 65), 3), ((3, 130), 2), ((1, 1), 1), ((31, 2), 2)])
@pytest.mark.parametrize("kind", FACTORS)
def test_stored_factors_are_what_the_reader_adds(kind: str, shape: tuple[int, int], rank: int) -> None:
    """Decoded here from the format's own words, not by the reader's code."""
    w = normal(*shape)
    plain = store("w", w, Choice("int", "row", 3), PLAIN)
    base = restore(plain.row, plain.values)
    a, b = low_rank(w - base, (), rank, 8)
    fixed = corrected(plain, w - base, (), a, b, kind)
    rows, cols = shape
    if kind == "f16":
        values = fixed.values["f16"].astype(np.float32)
        a_back, b_back = values[:rank * rows], values[rank * rows:]
    else:
        scales, packed = fixed.values["scales"][rows:].astype(np.float32), fixed.values["factors"]
        if kind == "int8":
            codes = packed.view(np.int8).astype(np.float32)
            a_back = codes[:rank * rows] * np.repeat(scales[:rank], rows)
            b_back = codes[rank * rows:] * np.repeat(scales[rank:], cols)
        else:
            def digits(part: np.ndarray, bits: int, count: int) -> np.ndarray:
                found = [int(byte) >> shift & 2**bits - 1 for byte in part for shift in range(0, 8, bits)][:count]
                return np.array([d - 2**bits if d >= 2 ** (bits - 1) else d for d in found], np.float32)
            a_bytes = math.ceil(rank * rows / 4)
            a_back = digits(packed[:a_bytes], 2, rank * rows) * scales[0]
            b_back = digits(packed[a_bytes:], 4, rank * cols) * scales[1 + np.arange(rank * cols) // 64]
            assert packed.size == a_bytes + math.ceil(rank * cols / 2)
    wanted = base.numpy().copy()
    for k in range(rank):
        wanted = wanted + a_back.reshape(rank, rows)[k][:, None] * b_back.reshape(rank, cols)[k]
    assert np.array_equal(restore(fixed.row, fixed.values).numpy(), wanted)
    assert {k: v.size for k, v in fixed.values.items()} == fixed.row.counts
    assert (fixed.row.rank, fixed.row.factors) == (rank, kind)


@pytest.mark.parametrize(("kind", "worst"), [("f16", 1.001), ("int8", 1.01), ("lqer", 1.6)])
def test_rounded_factors_leave_little_more_than_exact_ones(kind: str, worst: float) -> None:
    error, _, _ = spectrum(48, 64, [9.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    a, b = low_rank(error, (), 2, 40)
    zero = Stored(store("w", error, Choice("int", "row", 1), PLAIN).row,
                  {"codes": np.zeros(error.numel(), np.int8), "scales": np.ones(48, np.float16)})
    fixed = corrected(zero, error, (), a, b, kind)
    left = sum_squares(error - restore(fixed.row, fixed.values))
    exact = sum_squares(error.double() - product(a, b))
    assert exact <= left * (1 + 1e-6)
    assert math.sqrt(left / sum_squares(error)) <= worst * math.sqrt(exact / sum_squares(error)) + (kind == "lqer") * 0.35


def value_bytes(stored: Stored) -> int:
    return sum(v.nbytes for v in stored.values.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 2), st.booleans(),
       st.sampled_from(["normal", "constant", "zero rows", "one entry"]))
def test_a_residual_never_increases_the_error_it_is_scored_on(
        rows: int, cols: int, seed: int, rank: int, uses: int, keep: bool, kind: str) -> None:
    w = normal(rows, cols, seed=seed)
    if kind == "constant":
        w = torch.full((rows, cols), 0.3)
    elif kind == "zero rows":
        w[::2] = 0
    elif kind == "one entry":
        w = torch.zeros(rows, cols)
        w[seed % rows, seed % cols] = 7.0
    terms = {"w": tuple(term(rows, cols, seed=seed + i, transposed=bool((seed + i) % 2)) for i in range(uses))}
    judge = Judge(Statistics("", 1, terms))
    plain = store("w", w, Choice("int", "row", 1 + seed % 7), PLAIN)
    options = ExportOptions(int8_residual_rank=rank, int8_residual_power_iters=1 + seed % 3)
    found = offers(plain, w, judge, options, keep)
    assert found[0] == Offer(plain, 0, found[0].loss)
    for offer in found[1:]:
        error = w.double() - restore(offer.stored.row, offer.stored.values).double()
        score = slow_loss(error, terms["w"]) if uses else sum_squares(error) / max(sum_squares(w), 1e-300) * w.numel()
        assert offer.loss == pytest.approx(score, rel=1e-3, abs=1e-9)
        assert offer.loss < found[0].loss
        assert offer.nbytes == value_bytes(offer.stored) - value_bytes(plain)
        assert offer.nbytes > 0


# --- spending -----------------------------------------------------------------------------------------------------------


def menu(*points: tuple[int, float], name: str = "w", rank: int = 1) -> list[Offer]:
    """The plain tensor of loss points[0][1], then offers of (bytes, loss)."""
    row = replace(store(name, torch.ones(2, 2), Choice("int", "row", 1), PLAIN).row, rank=rank)
    return [Offer(Stored(row, {"n": np.array([nbytes])}), nbytes, loss) for nbytes, loss in points]


def taken_bytes(taken: dict[str, Stored]) -> dict[str, int]:
    return {name: int(s.values["n"][0]) for name, s in taken.items()}


def test_spending_takes_what_removes_most_loss_a_byte_first() -> None:
    offered = {"a": menu((0, 10.0), (10, 5.0), (20, 4.0)), "b": menu((0, 10.0), (10, 7.0), (30, 1.0))}
    # a to 10 bytes removes 0.5 a byte; then b to 10 or 30 removes 0.3, and to 30 from 0 takes 30 bytes; a to 20 removes 0.1.
    assert taken_bytes(spend(offered, 9, 0.0)) == {"a": 0, "b": 0}
    assert taken_bytes(spend(offered, 10, 0.0)) == {"a": 10, "b": 0}
    assert taken_bytes(spend(offered, 20, 0.0)) == {"a": 10, "b": 10}
    assert taken_bytes(spend(offered, 50, 0.0)) == {"a": 20, "b": 30}


def test_the_budget_is_that_of_low_rank_and_the_room_that_of_all() -> None:
    offered = {"a": menu((0, 10.0), (10, 5.0)), "b": menu((0, 10.0), (10, 7.0), (30, 1.0), rank=0)}
    assert taken_bytes(spend(offered, 9, 0.0)) == {"a": 0, "b": 30}
    assert taken_bytes(spend(offered, 10, 0.0, 29)) == {"a": 10, "b": 10}
    assert taken_bytes(spend(offered, 10, 0.0, 9)) == {"a": 0, "b": 0}
    assert taken_bytes(spend(offered, 10, 0.0, 40)) == {"a": 10, "b": 30}


def test_spending_pays_no_more_than_the_price() -> None:
    offered = {"a": menu((0, 10.0), (10, 5.0), (20, 4.0)), "b": menu((0, 10.0), (10, 7.0), (30, 6.9))}
    assert taken_bytes(spend(offered, 1000, 0.45)) == {"a": 10, "b": 0}
    assert taken_bytes(spend(offered, 1000, 0.2)) == {"a": 10, "b": 10}
    assert taken_bytes(spend(offered, 1000, 0.6)) == {"a": 0, "b": 0}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 0.99)), max_size=5), min_size=1, max_size=5),
       st.integers(0, 150), st.floats(0, 0.05))
def test_spending_stays_within_the_budget_and_stops_only_when_nothing_worth_it_fits(
        tables: list[list[tuple[int, float]]], budget: int, price: float) -> None:
    offered = {str(i): menu((0, 1.0), *table) for i, table in enumerate(tables)}
    taken = taken_bytes(spend(offered, budget, price))
    loss = {name: next(o.loss for o in offered[name] if o.stored is s)
            for name, s in spend(offered, budget, price).items()}
    left = budget - sum(taken.values())
    assert left >= 0
    for name, way in offered.items():
        for offer in way:
            more = offer.nbytes - taken[name]
            assert not (0 < more <= left and (loss[name] - offer.loss) / more > price)


# --- whole exports ------------------------------------------------------------------------------------------------------


NAMES = [f"blocks.{b}.{part}.weight" for b in range(6) for part in ("attn.c_q", "attn.proj", "mlp.fc", "mlp.proj")]
NAMES += ["tok_emb.weight", "lm_head.weight", "embed_proj.weight"]
TARGETED = {
    "off": NAMES,
    "all_mlp_proj": [f"blocks.{b}.mlp.proj.weight" for b in range(6)],
    "early_mlp_proj": [f"blocks.{b}.mlp.proj.weight" for b in range(4)],
    "all_attn_proj": [f"blocks.{b}.attn.proj.weight" for b in range(6)],
    "early_proj_combo": [f"blocks.{b}.{part}.weight" for b in range(4) for part in ("attn.proj", "mlp.proj")],
}


def test_every_mode_has_its_names() -> None:
    choices = next(f.metadata["choices"] for f in export.fields(ExportOptions) if f.name == "int8_targeted_residual_mode")
    assert sorted(choices) == sorted(TARGETED) == sorted(int8_plan.TARGETS)


@pytest.mark.parametrize("mode", TARGETED)
def test_targeted_modes_correct_the_tensors_they_name_and_no_others(mode: str) -> None:
    assert [name for name in NAMES if is_target(name, mode)] == sorted(TARGETED[mode], key=NAMES.index)
    state = {name: normal(16, 16, seed=i) for i, name in enumerate(NAMES)}
    options = ExportOptions(int8_keep_float_max_numel=0, int8_residual_rank=1, int8_targeted_residual_mode=mode,
                            weight_quantization_bits=2, embed_quantization_bits=2, int8_scale_floor=0.0)
    rows = decode_artifact(encode_artifact(state, {}, options).data).plan
    assert {row.name for row in rows if row.rank} == set(TARGETED[mode])


def model_state(**changes: Any) -> dict[str, Tensor]:
    """The tiny model with noise, since its sines are nearly of low rank."""
    state = filled_model(tiny_shape(num_layers=2, **changes)).state_dict()
    return {name: t + 0.05 * normal(*t.shape, seed=i) for i, (name, t) in enumerate(state.items())}


@pytest.mark.parametrize("storage", ["auto", *FACTORS])
@pytest.mark.parametrize("rank", [1, 4])
def test_an_export_with_corrections_reads_back_bit_for_bit_with_a_smaller_error_within_its_budget(
        rank: int, storage: str) -> None:
    state, budget = model_state(), 1500
    options = {"int8_keep_float_max_numel": 0, "weight_quantization_bits": 4, "embed_quantization_bits": 4,
               "int8_scale_floor": 0.0}
    plain = encode_artifact(state, {}, ExportOptions(**options))
    fixed = encode_artifact(state, {}, ExportOptions(
        **options, int8_residual_rank=rank, int8_residual_storage=storage, int8_residual_budget_bytes=budget))
    artifact = decode_artifact(fixed.data)
    for name, stored in fixed.tensors.items():
        assert torch.equal(artifact.state[name], restore(stored.row, stored.values)), name
        w = state[name].double()
        assert sum_squares(w - artifact.state[name]) <= sum_squares(w - decode_artifact(plain.data).state[name])
    assert fixed.report.rms_error < plain.report.rms_error
    extra = sum(value_bytes(s) - value_bytes(plain.tensors[name]) for name, s in fixed.tensors.items())
    assert 0 < extra <= budget
    ranks = {row.rank for row in artifact.plan}
    assert max(ranks) <= rank
    assert {row.factors for row in artifact.plan if row.rank} <= set(FACTORS if storage == "auto" else [storage])
    assert len(fixed.data) - len(plain.data) <= budget + 200


def test_a_budget_below_the_smallest_correction_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    options = ExportOptions(int8_keep_float_max_numel=0, int8_residual_rank=2, int8_residual_budget_bytes=3)
    message = r"^INT8_RESIDUAL_BUDGET_BYTES=3 holds no correction: the smallest takes \d+ bytes$"
    with pytest.raises(ValueError, match=message):
        save_artifact(tmp_path / "a.ptz", model_state(), {}, options)
    assert not list(tmp_path.iterdir())


def test_the_smallest_budget_named_in_the_refusal_is_enough() -> None:
    options = {"int8_keep_float_max_numel": 0, "int8_residual_rank": 2, "weight_quantization_bits": 3}
    with pytest.raises(ValueError) as caught:
        encode_artifact(model_state(), {}, ExportOptions(**options, int8_residual_budget_bytes=1))
    smallest = int(str(caught.value).split()[-2])
    with pytest.raises(ValueError):
        encode_artifact(model_state(), {}, ExportOptions(**options, int8_residual_budget_bytes=smallest - 1))
    found = encode_artifact(model_state(), {}, ExportOptions(**options, int8_residual_budget_bytes=smallest))
    assert sum(s.row.rank for s in found.tensors.values()) == 1


@pytest.mark.parametrize("kind", ["rows", "cols", "entries"])
def test_kept_values_are_the_most_expensive_errors(kind: str) -> None:
    w = normal(64, 128)
    t = Term(torch.ones(64), torch.ones(128).diag())
    w[10], w[:, 77] = w[10] * 1.5, w[:, 77] * 1.5
    plain = store("w", w, Choice("int", "row", 2), PLAIN)
    error = (w - restore(plain.row, plain.values)).double()
    kept = int8_plan.keeping(plain, w, error, [t], kind)
    squared = error.square()
    scores = {"rows": squared.sum(1), "cols": squared.sum(0), "entries": squared.reshape(-1)}[kind]
    count = {"rows": 1, "cols": 2, "entries": 8}[kind]
    assert sorted(kept.values["index"].tolist()) == sorted(np.argsort(-scores.numpy())[:count].tolist())
    left = (w - restore(kept.row, kept.values)).double().square()
    gone = {"rows": left.sum(1), "cols": left.sum(0), "entries": left.reshape(-1)}[kind]
    assert float(gone[kept.values["index"].astype(np.int64)].max()) < 1e-3
    assert kept.row.kept_count == count


# --- expected loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", [[False], [True], [False, True], [True, True, False]])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (7, 5), (1, 6)])
def test_expected_loss_is_the_double_sum_of_its_definition(shape: tuple[int, int], uses: list[bool]) -> None:
    error, terms = normal(*shape), [term(*shape, seed=i, transposed=t) for i, t in enumerate(uses)]
    assert expected_loss(error, terms) == pytest.approx(slow_loss(error, terms), rel=1e-5)
    assert expected_loss(2 * error, terms) == pytest.approx(4 * expected_loss(error, terms), rel=1e-5)


def test_expected_loss_of_a_hand_computed_case() -> None:
    """0.5 * (2 * (1*1*1 + 2*1*0.5*3 + 3*4*3) + 5 * 0) for e = [[1, 3], [0, 0]]."""
    t = Term(torch.tensor([2.0, 5.0]), torch.tensor([[1.0, 0.5], [0.5, 4.0]]))
    error = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert expected_loss(error, [t]) == pytest.approx(0.5 * 2 * (1 + 3 + 36))
    turned = Term(t.rows, t.moment, transposed=True)
    assert expected_loss(error, [turned]) == pytest.approx(0.5 * (2 * 1 + 5 * 9))


@pytest.mark.parametrize("transposed", [False, True])
def test_costs_are_the_margins_of_the_losses_of_single_weights(transposed: bool) -> None:
    t = term(4, 6, transposed=transposed)
    single = torch.zeros(4, 6)
    for i in range(4):
        for j in range(6):
            e = torch.zeros(4, 6)
            e[i, j] = 1.0
            single[i, j] = 2 * slow_loss(e, [t])
    row, col = weight_costs([t])
    assert torch.allclose(row, single.mean(1), rtol=1e-4)
    assert torch.allclose(col, single.mean(0), rtol=1e-4)
    twice = weight_costs([t, t])
    assert torch.allclose(twice[0], 2 * row)


def test_a_judge_without_knowledge_scores_relative_squares() -> None:
    w, error = normal(5, 9), 0.1 * normal(5, 9, seed=1)
    wanted = float(error.double().square().sum() / w.double().square().sum()) * 45
    assert Judge().loss("w", w, error.double()) == pytest.approx(wanted, rel=1e-9)
    assert Judge(Statistics("", 1, {"other": (term(5, 9),)})).loss("w", w, error.double()) == pytest.approx(wanted, rel=1e-9)
    assert Judge().loss("w", torch.zeros(5, 9), torch.zeros(5, 9)) == 0


def test_a_map_passes_through_its_points_and_goes_on_in_proportion() -> None:
    found = SensitivityMap({"w": ((1e-6, 2e-5), (1e-4, 5e-3), (1e-2, 0.3))})
    for error, nats in found.points["w"]:
        assert found.loss("w", error) == pytest.approx(nats, rel=1e-9)
    assert found.loss("w", 1e-5) == pytest.approx(math.sqrt(2e-5 * 5e-3), rel=1e-9)    # half-way on both logarithmic axes
    assert found.loss("w", 4e-2) == pytest.approx(4 * 0.3, rel=1e-9)
    assert found.loss("w", 1e-8) == pytest.approx(2e-7, rel=1e-9)
    assert found.loss("w", 0.0) == 0
    values = [found.loss("w", float(x)) for x in np.logspace(-9, 1, 200)]
    assert values == sorted(values)


SHAPES = {"a.weight": (3, 4), "b.attn_scale": (7,), "c.weight": (5, 2)}


def map_file(path: Path, **changes: Any) -> Path:
    points = [{"relative_error": 1e-4, "nats": 1e-3}, {"relative_error": 1e-2, "nats": 0.2}]
    tensors = {name: {"shape": list(SHAPES[name]), "points": points} for name in ("a.weight", "c.weight")}
    path.write_text(json.dumps({"split": "train", "tensors": tensors} | changes))
    return path


def test_a_map_is_read(tmp_path: Path) -> None:
    found = read_sensitivity(map_file(tmp_path / "m.json"), SHAPES)
    assert found.points == dict.fromkeys(("a.weight", "c.weight"), ((1e-4, 1e-3), (1e-2, 0.2)))


def test_points_that_help_by_chance_are_lifted_to_a_tenth_of_the_line(tmp_path: Path) -> None:
    points = [{"relative_error": e, "nats": nats} for e, nats in ((1e-6, -1e-5), (1e-4, 1e-3), (0, 0))]
    tensors = {"a.weight": {"shape": [3, 4], "points": points}}
    found = read_sensitivity(map_file(tmp_path / "m.json", tensors=tensors), {"a.weight": (3, 4)})
    (low, lifted), second = found.points["a.weight"]
    assert (low, second) == (1e-6, (1e-4, 1e-3))
    assert lifted == pytest.approx(0.1 * (1e-3 / 1e-4) * 1e-6)


@pytest.mark.parametrize(("changes", "message"), [
    ({"split": "val"}, "artifact: sensitivity map: found one measured on the val split, expected one measured on training"
                       " tokens (--split train): validation data must not shape an artifact"),
    ({"tensors": {}}, "artifact: sensitivity map, tensor a.weight: found nothing, expected (3, 4): the map is of another"
                      " model"),
    ({"tensors": {"a.weight": {"shape": [3, 5], "points": [{"relative_error": 1, "nats": 1}]}}},
     "artifact: sensitivity map, tensor a.weight: found (3, 5), expected (3, 4): the map is of another model"),
    ({"tensors": {"a.weight": {"shape": [3, 4]}}},
     "artifact: sensitivity map: found KeyError ('points'), expected a JSON file of scripts/sensitivity.py"),
    ({"tensors": []}, "artifact: sensitivity map: found AttributeError ('list' object has no attribute 'items'), expected a"
                      " JSON file of scripts/sensitivity.py"),
])
def test_a_bad_map_is_refused_by_its_own_message(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_sensitivity(map_file(tmp_path / "m.json", **changes), SHAPES)
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "kind"), [
    ("no json", "JSONDecodeError"), ("{}", "KeyError ('split')"), ("[1]", "TypeError"), ("{" * 3000, "JSONDecodeError"),
    ('{"split":"train"}', "KeyError ('tensors')"),
    ('{"split":"train","tensors":{"a":{"shape":[1,1],"points":[{"relative_error":"x","nats":1}]}}}', "ValueError"),
])
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        read_sensitivity(tmp_path / "m.json", SHAPES)
    message = str(caught.value)
    assert message.startswith(f"artifact: sensitivity map: found {kind}")
    assert message.endswith(", expected a JSON file of scripts/sensitivity.py")
    assert "\n" not in message


def test_a_map_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="sensitivity map: found FileNotFoundError"):
        read_sensitivity(tmp_path / "none.json", SHAPES)


@pytest.mark.parametrize("nats", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["relative_error", "nats"])
def test_a_map_with_a_value_that_is_not_finite_is_refused(tmp_path: Path, key: str, nats: str) -> None:
    path = map_file(tmp_path / "m.json")
    value = {"relative_error": "0.01", "nats": "0.2"}[key]
    path.write_text(path.read_text().replace(f'"{key}": {value}', f'"{key}": {nats}', 1))
    with pytest.raises(ArtifactError, match="sensitivity map"):
        read_sensitivity(path, SHAPES)


# --- statistics belong to one set of weights ----------------------------------------------------------------------------


def statistics_for(state: dict[str, Tensor], **changes: tuple[Term, ...]) -> Statistics:
    terms = {name: (term(*t.shape),) for name, t in state.items() if t.ndim == 2}
    return Statistics(weights_digest(state), 10, terms | changes)


def test_statistics_of_the_same_weights_are_accepted() -> None:
    state = {"w": normal(3, 5), "v": normal(4), "n": torch.arange(6).view(2, 3)}
    check_statistics(statistics_for(state, w=(term(3, 5), term(3, 5, transposed=True))), state)


def test_statistics_of_other_weights_are_refused() -> None:
    state = {"w": normal(3, 5)}
    given = statistics_for(state)
    changed = {"w": state["w"] + torch.eye(3, 5) * 1e-6}
    for other in (changed, {"x": state["w"]}, {"w": state["w"].double()}, {"w": state["w"].view(5, 3)}):
        with pytest.raises(ArtifactError) as caught:
            check_statistics(given, other)
        assert str(caught.value) == (f"artifact: calibration statistics: found those of other weights ({given.weights}),"
                                     f" expected those of these ({weights_digest(other)})")


@pytest.mark.parametrize(("terms", "found"), [
    ((), "none"), ((term(5, 3),), "[(5, 3)]"), ((term(3, 5), term(3, 4)), "[(3, 5), (3, 4)]"),
    ((term(5, 3, transposed=True),), "[(5, 3)]"),
], ids=["missing", "turned", "second use", "transposed use"])
def test_statistics_that_miss_a_tensor_or_its_shape_are_refused(terms: tuple[Term, ...], found: str) -> None:
    state = {"w": normal(3, 5)}
    with pytest.raises(ArtifactError) as caught:
        check_statistics(statistics_for(state, w=terms), state)
    assert str(caught.value) == f"artifact: calibration statistics of w: found {found}, expected (3, 5)"


def test_an_export_refuses_statistics_of_other_weights() -> None:
    state = {"w": normal(3, 5)}
    with pytest.raises(ArtifactError, match="those of other weights"):
        encode_artifact(state, {}, PLAIN, statistics=statistics_for({"w": normal(3, 5, seed=9)}))
