"""Falsifiers: the figures of scripts/falsifiers.py are what they claim to be.

Guarantees: a file's bits, split over its matrices, are the bits of its coder; the learned density is one, over every parity;
k-means steps never raise the weighted error and books restore what was made of them; an ideal adaptive coder's bits are
those of counting by hand; vectors with feedback err less in the loss than without; flat steps keep what they should.
Run: python -m pytest tests/test_falsifiers.py (about 10 s).
"""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import export
import falsifiers
from export import ExportOptions, Statistics, Term, encode_artifact, prepare, weights_digest
from falsifiers import Books, Scaled, Setting

SIZES = {"blocks.0.mlp.fc.weight": (24, 16), "blocks.1.mlp.fc.weight": (24, 16), "tok_emb.weight": (40, 16)}


def term(out: int, cols: int, seed: int) -> Term:
    """Correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * cols, cols)) @ (np.eye(cols) + 0.3 * rng.normal(size=(cols, cols))) * np.logspace(0, 1, cols)
    return Term(torch.from_numpy(rng.uniform(0.5, 2.0, out)).float(), torch.from_numpy(x.T @ x / len(x)).float())


@pytest.fixture(scope="module")
def subject() -> tuple[dict[str, torch.Tensor], Statistics]:
    generator = torch.Generator().manual_seed(3)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SIZES.items()}
    terms = {name: (term(*shape, seed=i),) for i, (name, shape) in enumerate(SIZES.items())}
    return state, Statistics(weights_digest(state), 64, terms)


def exported(subject: tuple[dict[str, torch.Tensor], Statistics], states: int, bits: float = 3.5) -> export.Export:
    options = ExportOptions(export_scheme="rd", export_bits=bits, tcq_states=states)
    return encode_artifact(subject[0], {}, options, statistics=subject[1])


# ----------------------------------------------------------------------------------------------------------------------
# learned
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [0, 8])
def test_traced_bits_are_the_files(subject: Any, states: int) -> None:
    made = exported(subject, states)
    trace, writer = falsifiers.traced(made), export.SymbolWriter()
    values = {name: dict(s.values) for name, s in made.tensors.items()}
    export.code_grid(writer, [s.row for s in made.tensors.values()], values, None)
    everything = sum(float((16 - np.log2(shares)).sum()) for shares, _ in writer.operations)
    assert 0 < sum(trace.bits.values()) < everything
    assert set(trace.bits) == set(SIZES)
    assert {name: c.shape for name, c in trace.contexts.items()} == SIZES
    assert everything / 8 == pytest.approx(made.report.parts["positions"], abs=8 * export.STATE_BYTES + 8)
    assert falsifiers.adaptive_bits(trace, trace.contexts) == pytest.approx(sum(trace.bits.values()), rel=1e-9)


@pytest.mark.parametrize("spacing", [1, 2])
@pytest.mark.parametrize("parity", [0, 1])
def test_density_sums_to_one_over_the_alphabet(spacing: int, parity: int) -> None:
    torch.manual_seed(0)
    everything = torch.arange(-2**15, 2**15, dtype=torch.float32)
    positions = everything if spacing == 1 else everything[parity::2]
    net = falsifiers.Density(5, (7,))
    n = len(positions)
    with torch.no_grad():
        shares, means, scales = net(torch.randn(1, 5).expand(n, 5), torch.full((n,), 6.3))
    mass = falsifiers.masses(positions, shares, means, scales, spacing)
    assert float(mass.double().sum()) == pytest.approx(1, abs=1e-4)
    assert float(mass.min()) > 0
    magnitude = falsifiers.expected_magnitude(shares, means, scales)[0]
    if spacing == 1:
        inner = float((mass.double() * positions.abs()).sum()) - falsifiers.ESCAPE_MASS * 2**14     # what all share
        assert float(magnitude) == pytest.approx(inner, abs=0.1)


def test_expected_magnitude_of_a_centred_logistic_is_twice_log_two_scales() -> None:
    one = torch.ones(1, 1)
    assert float(falsifiers.expected_magnitude(one, 0 * one, 3 * one)) == pytest.approx(6 * math.log(2))
    assert float(falsifiers.expected_magnitude(one, -500 * one, 3 * one)) == pytest.approx(500)


def test_rounded_net_has_bytes_of_its_parameters() -> None:
    net = falsifiers.Density(5, (7,))
    assert falsifiers.quantised_bytes(net) == 5 * 7 + 7 + 7 * 9 + 9 + 2 * 4
    p = next(net.parameters()).detach()
    steps = p / (p.abs().max() / 127)
    assert torch.allclose(steps, steps.round(), atol=0.02)


def test_learned_density_finds_a_pattern_that_sizes_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights of a row of one sign, which turns from row to row: no magnitude tells that, the row above does."""
    monkeypatch.setattr(falsifiers, "BATCH", 1024)
    sign = torch.where(torch.arange(400) % 2 == 0, 1.0, -1.0)[:, None]
    state = {"tok_emb.weight": sign * (1 + 0.1 * torch.randn(400, 16, generator=torch.Generator().manual_seed(1)))}
    flat = Term(torch.ones(400), torch.eye(16))
    made = exported((state, Statistics(weights_digest(state), 64, {"tok_emb.weight": (flat,)})), 0, bits=4.0)
    row = falsifiers.learn(made, 150, free=False)
    assert row["hand_made"] - row["mixture"] > 0.2
    assert row["hand_made"] - row["above"] > 0.1
    assert row["gain"] == pytest.approx(row["hand_made"] - row["decoder"] - min(row["mixture"], row["context"]))


# ----------------------------------------------------------------------------------------------------------------------
# codebooks
# ----------------------------------------------------------------------------------------------------------------------


def sample(n: int = 600, dim: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(n, dim)), rng.uniform(0.1, 3.0, n)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_step_of_k_means_never_raises_the_weighted_error(stages: int) -> None:
    vectors, weights = sample()
    books = Books([vectors[k * 8:(k + 1) * 8] / (k + 1) for k in range(stages)], [np.full(8, 3.0)] * stages)
    errors = []
    for _ in range(6):
        found = falsifiers.in_chunks(vectors, books, weights)
        errors.append(falsifiers.distortion(vectors, books, weights, found))
        books = falsifiers.refitted(vectors, books, weights, found)
        errors.append(falsifiers.distortion(vectors, books, weights, found))
    halves = errors[1::2] if stages > 1 else errors[1:]       # a beam over several books may miss the nearest sum
    assert all(a >= b - 1e-2 * (stages > 1) for a, b in zip(errors[::2], errors[1::2], strict=True))
    assert halves[-1] < 0.8 * errors[0]


def test_nearest_is_the_nearest_and_pays_for_bits() -> None:
    vectors, weights = sample(50)
    book = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]])
    books = Books([book], [np.array([0.5, 2.0, 4.0])])
    squared = np.square(vectors[:, None] - book).sum(2)
    assert (falsifiers.nearest(vectors, books, weights)[:, 0] == squared.argmin(1)).all()
    dear = replace(books, penalty=0.7)
    expected = (weights[:, None] * squared + 0.7 * books.bits[0]).argmin(1)
    assert (falsifiers.nearest(vectors, dear, weights)[:, 0] == expected).all()


def test_additive_books_restore_the_sums_they_are_made_of() -> None:
    coarse, fine = np.array([[-4.0, 0], [4.0, 0], [0, 4.0]]), np.array([[-1.0, 0], [1.0, 0], [0, 1.0], [0, -1.0]])
    vectors = (coarse[:, None] + fine).reshape(-1, 2)
    books = Books([coarse, fine], [np.zeros(3), np.zeros(4)])
    found = falsifiers.nearest(vectors, books, np.ones(12))
    np.testing.assert_allclose(books.values(found), vectors)
    assert books.nbytes == 2 * 7 + 2 * 2
    np.testing.assert_allclose(books.stored().values(found), vectors, atol=0.02)


def test_index_bits_are_those_of_counting_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(falsifiers, "PRIORS", (1.0,))
    indices, contexts = np.array([0, 0, 1, 0]), np.array([0, 0, 0, 1])
    # context 0: 1/2 x 2/3 x 1/4 = 1/12; context 1: 1/2
    assert falsifiers.index_bits(indices, contexts, 2) == pytest.approx(math.log2(24))


@pytest.mark.parametrize("by", ["cost", "size"])
def test_vectors_with_feedback_lose_less_than_without(subject: Any, by: str) -> None:
    state, statistics = subject
    name = "blocks.0.mlp.fc.weight"
    p = prepare(name, state[name], statistics.terms[name])
    scaled = Scaled.of(p, by)
    vectors, weights = scaled.vectors(2)
    books = falsifiers.fitted(vectors, weights / weights.mean(), Setting(2, 32))
    alone = Scaled.of(replace(p, feedback=np.zeros_like(p.feedback)), by)

    def loss(columns: np.ndarray) -> float:
        matrix = np.empty(columns.T.shape)
        matrix[:, p.order] = columns.T
        return export.expected_loss(state[name] - torch.from_numpy(matrix).float(), statistics.terms[name])

    restored, found = scaled.quantised(books, 2)
    assert found.shape == (8, 24, 1)
    assert loss(restored) < 0.9 * loss(alone.quantised(books, 2)[0])
    plain = alone.quantised(books, 2)
    chosen = falsifiers.nearest(vectors, books, weights)
    if by == "cost":                    # without feedback a vector's code is its nearest entry
        assert (plain[1].reshape(-1, 1) == chosen).all()


def test_entropy_constrained_books_take_fewer_bits() -> None:
    vectors, weights = sample(4000)
    none = np.zeros(4000, np.int64)
    bits = []
    for setting in (Setting(2, 64), Setting(2, 64, price=1.0)):
        books = falsifiers.fitted(vectors, weights / weights.mean(), setting)
        bits.append(falsifiers.index_bits(falsifiers.in_chunks(vectors, books, weights / weights.mean())[:, 0], none, 64))
    assert bits[1] < bits[0]


def test_curve_is_interpolated_in_the_logarithm_and_goes_on() -> None:
    curve = [(100.0, 16.0), (200.0, 4.0), (300.0, 2.0)]
    assert [falsifiers.interpolated(curve, at) for at in (100, 150, 250, 0, 400)] == pytest.approx(
        [16, 8, math.sqrt(8), 64, 1])


# ----------------------------------------------------------------------------------------------------------------------
# anisotropy
# ----------------------------------------------------------------------------------------------------------------------


def test_gains_of_means_known_by_hand() -> None:
    assert falsifiers.mean_gain(np.array([4.0, 1.0])) == pytest.approx(0.5 * math.log2(2.5 / 2))
    assert falsifiers.mean_gain(np.full(5, 3.0)) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(sorted(falsifiers.cholesky_costs(np.diag([9.0, 1.0]))), [1.0, 9.0], rtol=1e-6)


def test_flattened_steps(subject: Any) -> None:
    state, statistics = subject
    name = "tok_emb.weight"
    p = prepare(name, state[name], statistics.terms[name])
    best, same = falsifiers.flattened(p, "best", False), falsifiers.flattened(p, "geometric", False)
    assert np.ptp(best.log_steps) == np.ptp(same.log_steps) == 0
    # at one step the loss is the step^2 times the arithmetic mean of the costs; water-filled it is 1 for every column
    assert float((p.costs * np.exp2(2 * (best.log_steps - p.log_steps[0])) / p.costs[0]).mean()) == pytest.approx(1)
    assert same.log_steps[0] - best.log_steps[0] == pytest.approx(p.gain_bits)
    rows = falsifiers.flattened(p, "filled", True)
    assert np.ptp(rows.row_steps) == 0
    assert np.ptp(rows.log_steps - p.log_steps) == pytest.approx(0, abs=1e-12)
