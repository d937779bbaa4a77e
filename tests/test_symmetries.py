"""Symmetries: reorderings and rotations of weights that leave the network's function as it is.

Guarantees: every symmetry found permutes the state and not the logits, in every variant of the model; value rotations make
their zeros and keep the logits, the norms and the statistics' traces; calibration statistics move with the weights; an
export that reorders has the same codes in another order and never more bytes.
Run: python -m pytest tests/test_symmetries.py (about 15 s).
"""
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import CPU, VARIANTS, filled_model, fixed_batch, tiny_shape
from torch import Tensor

from calibration import calibrate
from export import (
    ExportOptions,
    Statistics,
    Term,
    decode_artifact,
    encode_artifact,
    expected_loss,
    weights_digest,
)
from symmetries import Symmetry, find_symmetries, rotated
from train_gpt import GPT, rope_tables, rotate

KINDS = {"mlp", "kv_head", "query_head", "value", "stream", "embedding"}


def noisy_model(seed: int = 1, **changes: Any) -> GPT:
    """In float64, every entry its own, so that no two units are alike."""
    model = filled_model(tiny_shape(**changes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def logits_of(model: GPT, state: dict[str, Tensor] | None = None) -> Tensor:
    ids, _ = fixed_batch(0, 61, rows=2, seq_len=13)
    if state is not None:
        other = GPT(tiny_shape(**SHAPE_OF[id(model)]), 32).double()
        other.load_state_dict(state)
        model = other
    with torch.no_grad():
        return model.logits(model.features(ids))


SHAPE_OF: dict[int, dict[str, Any]] = {}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> GPT:
    changes = VARIANTS[request.param]
    made = noisy_model(**changes)
    SHAPE_OF[id(made)] = changes
    return made


def shuffled(units: int, seed: int) -> Tensor:
    """An order in which not every unit stays."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    return order if not torch.equal(order, torch.arange(units)) else order.roll(1)


def same_up_to_rounding(a: Tensor, b: Tensor) -> None:
    """float64: the sums are reordered, nothing else."""
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-10), float((a - b).abs().max())


# --- permutations ---------------------------------------------------------------------------------------------------------


def test_every_symmetry_changes_the_state_and_not_the_logits(model: GPT) -> None:
    state, before = model.state_dict(), logits_of(model)
    symmetries = find_symmetries(state, "all")
    for seed, symmetry in enumerate(symmetries):
        changed = symmetry.apply(shuffled(symmetry.units, seed), state)
        moved = {name for name, t in changed.items() if not torch.equal(t, state[name])}
        assert moved == {name for name, _, _ in symmetry.places}
        same_up_to_rounding(logits_of(model, changed), before)


def test_all_symmetries_together_change_the_state_and_not_the_logits(model: GPT) -> None:
    state = model.state_dict()
    for seed, symmetry in enumerate(find_symmetries(state, "all")):
        state = symmetry.apply(shuffled(symmetry.units, seed), state)
    same_up_to_rounding(logits_of(model, state), logits_of(model))


def test_leaving_out_one_place_changes_the_logits() -> None:
    """So the test above can fail, and no place is without need."""
    model = noisy_model()
    SHAPE_OF[id(model)] = {}
    state, before = model.state_dict(), logits_of(model)
    for symmetry in find_symmetries(state, "all"):
        for k in range(len(symmetry.places)):
            partial = Symmetry(symmetry.kind, symmetry.places[:k] + symmetry.places[k + 1:])
            changed = partial.apply(shuffled(partial.units, 3), state)
            assert float((logits_of(model, changed) - before).abs().max()) > 1e-6, (symmetry.kind, symmetry.places[k][:2])


def expected_kinds(changes: dict[str, Any]) -> dict[str, int]:
    """From the shape: 3 heads of width 8; a group has 3 query heads for one key head, or one for three."""
    blocks = changes.get("num_unique_blocks", changes.get("num_layers", 4))
    kv_heads = changes.get("num_kv_heads", 1)
    counts = {"mlp": blocks, "value": blocks * kv_heads, "stream": 1}
    counts |= {"kv_head": blocks} if kv_heads > 1 else {"query_head": blocks}
    return counts | ({"embedding": 1} if "embed_dim" in changes else {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_symmetry_that_the_shape_has_is_found_once(variant: str) -> None:
    state = filled_model(tiny_shape(**VARIANTS[variant])).state_dict()
    kinds = [s.kind for s in find_symmetries(state, "all")]
    assert {kind: kinds.count(kind) for kind in kinds} == expected_kinds(VARIANTS[variant])
    assert set(kinds) <= KINDS
    assert [s.kind for s in find_symmetries(state, "mlp")] == ["mlp"] * expected_kinds(VARIANTS[variant])["mlp"]


def test_groups_of_query_heads_move_with_their_key_heads() -> None:
    """Two groups of two heads: what the tiny shape has not."""
    shape = {"num_heads": 4, "num_kv_heads": 2}
    model = noisy_model(**shape)
    SHAPE_OF[id(model)] = shape
    state, before = model.state_dict(), logits_of(model)
    symmetries = find_symmetries(state, "all")
    kinds = [s.kind for s in symmetries]
    assert {kind: kinds.count(kind) for kind in kinds} == {"mlp": 4, "kv_head": 4, "query_head": 8, "value": 8, "stream": 1}
    for seed, symmetry in enumerate(symmetries):
        same_up_to_rounding(logits_of(model, symmetry.apply(shuffled(symmetry.units, seed), state)), before)


@pytest.mark.parametrize("state", [
    {}, {"weight": torch.ones(3, 3)}, {"blocks.0.other": torch.ones(4)}, {"blocks.0.mlp.fc.weight": torch.ones(2, 2)},
    {"tok_emb.weight": torch.ones(4, 4)},
], ids=["empty", "matrix", "block", "half an mlp", "embedding"])
def test_a_state_that_is_no_gpt_has_no_symmetry_of_a_gpt(state: dict[str, Tensor]) -> None:
    for mode in ("mlp", "all"):
        assert {s.kind for s in find_symmetries(state, mode)} <= {"stream"}
    assert find_symmetries({k: v for k, v in state.items() if not k.startswith("blocks.")}, "all") == []


@pytest.mark.parametrize("state", [
    {"blocks.0.attn.q_gain": torch.ones(2)}, {"blocks.0.mlp.fc.weight": torch.ones(2)},
    {"blocks.0.attn.c_q.weight": torch.ones(())},
], ids=["a lone gain", "a vector of an mlp's name", "a scalar of a matrix's name"])
def test_names_of_a_gpt_on_other_tensors_do_not_break_the_search(state: dict[str, Tensor]) -> None:
    """An export of any state must succeed or end in ArtifactError."""
    assert find_symmetries(state, "all") == []


# --- statistics move with the weights -------------------------------------------------------------------------------------


def statistics_of(model: GPT) -> Statistics:
    ids, _ = fixed_batch(2, 61, rows=2, seq_len=16)
    return calibrate(model, iter([ids]), CPU, 3)


@pytest.mark.parametrize("variant", [
    "baseline", "all_heads_have_keys", "factorised", "untied", "shared_blocks", "everything",
])
def test_statistics_of_a_reordered_model_give_the_same_losses(variant: str) -> None:
    model = noisy_model(**VARIANTS[variant]).float()
    state, statistics = model.state_dict(), statistics_of(model)
    errors = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(i))
              for i, (name, t) in enumerate(state.items()) if name in statistics.terms}
    before = {name: expected_loss(e, statistics.terms[name]) for name, e in errors.items()}
    for seed, symmetry in enumerate(find_symmetries(state, "all")):
        order = shuffled(symmetry.units, seed)
        statistics = symmetry.apply_to_statistics(order, statistics, state)
        errors = {name: t for name, t in symmetry.apply(order, {**state, **errors}).items() if name in errors}
        after = {name: expected_loss(e, statistics.terms[name]) for name, e in errors.items()}
        assert after == pytest.approx(before, rel=1e-4), symmetry.kind
        state = symmetry.apply(order, state)


def test_statistics_of_a_reordered_model_are_those_that_calibrating_it_gives() -> None:
    """An independent oracle: permute first and calibrate then."""
    model = noisy_model(num_layers=2).float()
    state, statistics = model.state_dict(), statistics_of(model)
    for seed, symmetry in enumerate(find_symmetries(state, "all")):
        order = shuffled(symmetry.units, seed)
        statistics = symmetry.apply_to_statistics(order, statistics, state)
        state = symmetry.apply(order, state)
    other = GPT(tiny_shape(num_layers=2), 32)
    other.load_state_dict(state)
    wanted = statistics_of(other)
    assert wanted.terms.keys() == statistics.terms.keys()
    for name, uses in wanted.terms.items():
        for ours, theirs in zip(statistics.terms[name], uses, strict=True):
            scale = float(theirs.moment.abs().max())
            assert torch.allclose(ours.moment, theirs.moment, rtol=1e-3, atol=1e-4 * scale), name
            assert torch.allclose(ours.rows, theirs.rows, rtol=1e-2, atol=1e-4 * float(theirs.rows.max())), name


# --- value rotations ------------------------------------------------------------------------------------------------------


def heads_of(state: dict[str, Tensor], name: str) -> Tensor:
    width = 8
    return state[name].view(-1, width, state[name].shape[1])


def test_rotating_values_changes_the_state_and_not_the_logits(model: GPT) -> None:
    state = model.state_dict()
    turned, _ = rotated(state, None)
    changed = {name for name in state if not torch.equal(state[name], turned[name])}
    assert changed == {n for n in state if n.endswith(("attn.c_v.weight", "attn.proj.weight"))}
    same_up_to_rounding(logits_of(model, turned), logits_of(model))
    single = {name: t.float() for name, t in state.items()}
    back = {name: t.double() for name, t in rotated(single, None)[0].items()}
    difference = (logits_of(model, back) - logits_of(model, {n: t.double() for n, t in single.items()})).abs().max()
    assert float(difference) < 1e-4


def test_each_value_head_has_its_triangle_of_zeros_and_keeps_its_norms(model: GPT) -> None:
    state = model.state_dict()
    turned, _ = rotated(state, None)
    for name in (n for n in state if n.endswith("attn.c_v.weight")):
        for before, after in zip(heads_of(state, name), heads_of(turned, name), strict=True):
            square = after[:, :8]
            zeros = (square.abs() < 1e-12).sum()
            assert int(zeros) == 8 * 7 // 2
            assert float(square.tril(-1).abs().max()) < 1e-12
            assert bool((square.diagonal() > 0).all())                       # the one canonical form
            assert torch.allclose(before.T @ before, after.T @ after, rtol=1e-10, atol=1e-12)
        proj = name.replace("c_v", "proj")
        assert torch.allclose((turned[proj] @ turned[proj].T).diagonal(), (state[proj] @ state[proj].T).diagonal())


def test_rotating_twice_is_rotating_once() -> None:
    state = noisy_model().state_dict()
    once, _ = rotated(state, None)
    twice, _ = rotated(once, None)
    for name, t in once.items():
        assert torch.allclose(twice[name], t, atol=1e-12)


def test_the_zeros_are_codes_of_zero_in_the_file() -> None:
    state = noisy_model(num_layers=2).float().state_dict()
    options = ExportOptions(int8_keep_float_max_numel=0, export_rotate=True, int8_scale_floor=0.0)
    artifact = decode_artifact(encode_artifact(state, {}, options).data)
    for name in (n for n in state if n.endswith("attn.c_v.weight")):
        for head in heads_of(artifact.state, name):
            assert not bool(head[:, :8].tril(-1).any())


@pytest.mark.parametrize("variant", ["baseline", "all_heads_have_keys"])
def test_statistics_turn_with_the_values(variant: str) -> None:
    """proj sees R x, so its inputs' moment is R H R^T; R from the weights before and after."""
    model = noisy_model(**VARIANTS[variant]).float()
    state, statistics = model.state_dict(), statistics_of(model)
    turned, after = rotated(state, statistics)
    assert after is not None
    for b in range(4):
        v, proj = f"blocks.{b}.attn.c_v.weight", f"blocks.{b}.attn.proj.weight"
        heads = list(zip(heads_of(state, v), heads_of(turned, v), strict=True))
        turns = [x_after.double() @ torch.linalg.pinv(x_before.double()) for x_before, x_after in heads]
        both = torch.block_diag(*(turn for turn in turns for _ in range(3 // len(turns))))
        (before_term,), (after_term,) = statistics.terms[proj], after.terms[proj]
        wanted = both @ before_term.moment.double() @ both.T
        scale = float(before_term.moment.abs().max())
        assert torch.allclose(after_term.moment.double(), wanted, atol=1e-4 * scale)
        assert float(after_term.moment.trace()) == pytest.approx(float(before_term.moment.trace()), rel=1e-5)
        assert torch.equal(after_term.rows, before_term.rows)
        (v_before,), (v_after,) = statistics.terms[v], after.terms[v]
        assert torch.equal(v_after.moment, v_before.moment)
        assert v_after.rows.view(-1, 8).sum(1).tolist() == pytest.approx(v_before.rows.view(-1, 8).sum(1).tolist(), rel=1e-5)
        assert float(v_after.rows.view(-1, 8).std(1).max()) < 1e-6 * float(v_after.rows.max())
    for name in statistics.terms.keys() - {n for n in state if n.endswith(("c_v.weight", "attn.proj.weight"))}:
        assert statistics.terms[name] is after.terms[name]


# --- what is no symmetry --------------------------------------------------------------------------------------------------


def turned_pair(state: dict[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    """The pair (1, 5) of each head's 8 query/key dimensions, mixed by a (2, 2) matrix in q and k of block 0."""
    state = dict(state)
    for name in ("blocks.0.attn.c_q.weight", "blocks.0.attn.c_k.weight"):
        heads = state[name].clone().view(-1, 8, state[name].shape[1])
        heads[:, [1, 5]] = torch.einsum("ij,hjd->hid", turn.double(), heads[:, [1, 5]])
        state[name] = heads.view(state[name].shape)
    return state


def test_of_a_rope_pair_only_common_rotations_leave_the_logits_alone() -> None:
    model = noisy_model()
    SHAPE_OF[id(model)] = {}
    state, before = model.state_dict(), logits_of(model)
    angle = torch.tensor(0.9)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert float((logits_of(model, turned_pair(state, turn)) - before).abs().max()) < 1e-6      # cos, sin are of float32
    same_up_to_rounding(logits_of(model, turned_pair(state, quarter)), before)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert float((logits_of(model, turned_pair(state, swap)) - before).abs().max()) > 1e-4


def test_exchanging_a_pairs_rows_turns_its_rotation_around() -> None:
    """q^T S R(d) S k = q^T R(-d) k, on the rotation that the model uses."""
    cos, sin = (t.double() for t in rope_tables(6, 2, 10.0, torch.float32))
    q, k = torch.tensor([0.3, -1.2]).double(), torch.tensor([0.7, 0.4]).double()

    def score(a: Tensor, b: Tensor, i: int, j: int) -> float:
        return float(rotate(a, cos[i], sin[i]) @ rotate(b, cos[j], sin[j]))

    for i in range(6):
        for j in range(6):
            assert score(q.flip(0), k.flip(0), i, j) == pytest.approx(score(q, k, j, i), abs=1e-6)
    assert abs(score(q, k, 4, 1) - score(q, k, 1, 4)) > 0.1


# --- whole exports --------------------------------------------------------------------------------------------------------


def uneven_state(**changes: Any) -> dict[str, Tensor]:
    """Units of very different sizes in no order, as training leaves them: what reordering can use."""
    generator = torch.Generator().manual_seed(8)
    state = {}
    for name, t in filled_model(tiny_shape(**changes)).state_dict().items():
        noise = torch.randn(t.shape, generator=generator)
        if t.ndim == 2 and "resid_mix" not in name and "skip" not in name:
            noise = noise * torch.randn(t.shape[0], 1, generator=generator).exp()
            noise = noise * (0.7 * torch.randn(t.shape[1], generator=generator)).exp()
        state[name] = noise + (t.ndim < 2)
    return state


@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("mode", ["mlp", "all"])
@pytest.mark.parametrize("variant", ["baseline", "all_heads_have_keys", "everything"])
def test_a_reordered_export_has_the_same_logits_and_no_more_bytes(variant: str, mode: str, axis: str) -> None:
    changes = {"mlp_mult": 4, **VARIANTS[variant]}
    state = uneven_state(**changes)
    options = {"int8_keep_float_max_numel": 0, "int8_scale_floor": 0.0, "int8_axis_mode": axis}
    plain = encode_artifact(state, {}, ExportOptions(**options))
    moved = encode_artifact(state, {}, ExportOptions(**options, export_permute=mode))
    gains = moved.report.permutation_gains
    assert all(gain >= 0 for gain in gains.values())
    codes = {part: size for part, size in plain.report.parts.items() if part.startswith("codes:")}
    saved = sum(size - moved.report.parts[part] for part, size in codes.items())
    # The gains are those of a quick look (one strategy, the best layout); the file's own strategies can only do better each.
    assert saved == pytest.approx(sum(gains.values()), abs=12 * len(codes))
    assert sum(codes.values()) - saved <= sum(codes.values())
    meta = len(b'"export":{"export_permute":"all"}')
    assert len(moved.data) <= len(plain.data) + meta + 40
    models = []
    for export in (plain, moved):
        other = GPT(tiny_shape(**changes), 32).double()
        other.load_state_dict({n: t.double() for n, t in decode_artifact(export.data).state.items()})
        ids, _ = fixed_batch(0, 61, rows=2, seq_len=13)
        with torch.no_grad():
            models.append(other.logits(other.features(ids)))
    same_up_to_rounding(models[0], models[1])
    if any(gains.values()):
        assert any(not torch.equal(moved.state[name], state[name]) for name in state)
    for name, stored in plain.tensors.items():
        if "codes" in stored.values:
            other_codes = moved.tensors[name].values["codes"]
            assert sorted(stored.values["codes"].tolist()) == sorted(other_codes.tolist())


@pytest.mark.parametrize("spread", [0.3, 0.5, 1.0])
def test_reordering_saves_the_bytes_it_reports_where_units_differ_in_size(spread: float) -> None:
    """Columns of different sizes under row scales: runs of alike codes for the Huffman tables of a long stream."""
    generator = torch.Generator().manual_seed(2)
    hidden = (spread * torch.randn(1024, generator=generator)).exp()
    fc, proj = torch.randn(1024, 128, generator=generator), torch.randn(128, 1024, generator=generator) * hidden
    state = {"blocks.0.mlp.fc.weight": fc, "blocks.0.mlp.proj.weight": proj, "blocks.0.attn.q_gain": torch.ones(4)}
    state |= {f"blocks.0.attn.{name}.weight": torch.ones(8, 128) for name in ("c_q", "c_k", "c_v")}
    state["blocks.0.attn.proj.weight"] = torch.ones(128, 8)
    options = {"int8_keep_float_max_numel": 1024, "int8_scale_floor": 0.0}
    plain = encode_artifact(state, {}, ExportOptions(**options))
    moved = encode_artifact(state, {}, ExportOptions(**options, export_permute="mlp"))
    assert len(moved.data) < (1 - spread / 80) * len(plain.data)
    header = moved.report.parts["header"] - plain.report.parts["header"]
    assert moved.report.permutation_gains == {"mlp": pytest.approx(len(plain.data) + header - len(moved.data), abs=16)}
    a, b = (decode_artifact(e.data).state for e in (plain, moved))
    products = [s["blocks.0.mlp.proj.weight"].double() @ s["blocks.0.mlp.fc.weight"].double() for s in (a, b)]
    assert torch.allclose(products[0], products[1], atol=1e-6 * float(products[0].abs().max()))


def test_statistics_of_other_weights_cannot_slip_in_after_a_reordering() -> None:
    """The digest is that of the checkpoint, before rotation and reordering, and so it is checked."""
    state = uneven_state(num_layers=2)
    terms = {name: (Term(torch.ones(t.shape[0]), torch.eye(t.shape[1])),) for name, t in state.items()
             if t.ndim == 2 and "resid_mix" not in name and "skip" not in name}
    options = ExportOptions(int8_keep_float_max_numel=0, export_permute="all", export_rotate=True)
    first = encode_artifact(state, {}, options, statistics=Statistics(weights_digest(state), 1, terms))
    assert math.isfinite(first.report.rms_error)
    with pytest.raises(ValueError, match="those of other weights"):
        encode_artifact(first.state, {}, options, statistics=Statistics(weights_digest(state), 1, terms))
