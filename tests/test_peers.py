"""scripts/peers.py: the public pipeline, our opponent, is what its description says and loses nothing on the way to bytes.

Guarantees: GPTQ gives the codes of a plain column-by-column one; its feedback never costs more than rounding; the bytes hold
every code and every fp16 value, under each codec installed; their size follows the entropy; steps are what k and bits say.
Run: python -m pytest tests/test_peers.py (about 10 s).
"""
from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from conftest import filled_model, tiny_shape
from torch import Tensor

import peers
from export import Statistics, Term, is_control, weights_digest
from peers import CODECS, PeerOptions, codecs_here, decode_peer, encode_peer, gptq, rounded, row_steps

needs_brotli = pytest.mark.skipif("brotli" not in codecs_here(), reason="needs the package brotli")


def problem(seed: int, rows: int, cols: int, samples: int, mixing: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(weights, correlated second moments of their inputs)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, cols)) * np.exp(rng.standard_normal(cols))
    x = x @ (np.eye(cols) + mixing * rng.standard_normal((cols, cols)) / math.sqrt(cols))
    return 0.1 * rng.standard_normal((rows, cols)), x.T @ x / samples


def plain_gptq(w: np.ndarray, hessian: np.ndarray, steps: np.ndarray, q_max: int, damping: float) -> np.ndarray:
    """Optimal brain quantisation in a fixed order, row by row: the inverse of what is left is taken anew for each column,
    without any factorisation or block (Hassibi & Stork 1993, equation 5).
    """
    n = w.shape[1]
    damped = hessian + damping * np.mean([hessian[i, i] for i in range(n)]) * np.eye(n)
    order = sorted(range(n), key=lambda i: -hessian[i, i])
    codes = np.zeros(w.shape, np.int64)
    for r in range(w.shape[0]):
        left = [float(v) for v in w[r]]
        for done, j in enumerate(order):
            rest = order[done:]
            inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
            codes[r, j] = max(-q_max, min(q_max, round(left[j] / float(steps[r]))))
            error = left[j] - codes[r, j] * float(steps[r])
            for at, i in enumerate(rest):
                left[i] -= error * inverse[0, at] / inverse[0, 0]
    return codes


def cost(w: np.ndarray, codes: np.ndarray, steps: np.ndarray, hessian: np.ndarray) -> float:
    """tr(E H E^T)."""
    error = w - codes * steps.astype(np.float64)[:, None]
    return float(np.einsum("ij,jk,ik", error, hessian, error))


def random_model(seed: int = 0) -> tuple[dict[str, Tensor], Statistics]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(t.shape, generator=generator) * 0.1
             for name, t in filled_model(tiny_shape()).state_dict().items()}
    terms = {}
    for name, w in state.items():
        if w.ndim == 2 and not is_control(name):
            x = torch.randn(3 * w.shape[1], w.shape[1], generator=generator)
            terms[name] = (Term(torch.ones(w.shape[0]), x.T @ x / len(x)),)
    return state, Statistics(weights_digest(state), 100, terms)


# ----------------------------------------------------------------------------------------------------------------------
# GPTQ.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols", "samples", "q_max"), [
    (1, 1, 5, 3), (3, 2, 9, 31), (5, 7, 40, 31), (4, 23, 60, 7), (6, 16, 8, 31), (2, 31, 100, 127)])
def test_the_codes_are_those_of_a_plain_column_by_column_reference(rows: int, cols: int, samples: int, q_max: int):
    for seed in range(4):
        w, hessian = problem(seed, rows, cols, samples)
        steps = row_steps(w, q_max, 4.0)
        assert (gptq(w, hessian, steps, q_max, 0.01) == plain_gptq(w, hessian, steps, q_max, 0.01)).all()


@pytest.mark.parametrize("block", [1, 3, 128])
def test_blocks_of_columns_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch):
    w, hessian = problem(5, 9, 20, 80)
    steps = row_steps(w, 31, 12.85)
    whole = gptq(w, hessian, steps, 31)
    monkeypatch.setattr(peers, "BLOCK_COLUMNS", block)
    assert (gptq(w, hessian, steps, 31) == whole).all()


def test_feedback_never_costs_more_than_rounding():
    for seed in range(40):
        w, hessian = problem(seed, rows=24, cols=8 + seed, samples=200)
        steps = row_steps(w, 31, 12.85 * 2 ** (seed % 3))
        with_feedback = cost(w, gptq(w, hessian, steps, 31), steps, hessian)
        assert with_feedback <= cost(w, rounded(w, steps, 31), steps, hessian), seed


@pytest.mark.parametrize("hessian", [np.zeros((6, 6)), np.eye(6), np.diag([3.0, 0, 2, 0, 1, 5])])
def test_where_no_inputs_mix_it_is_plain_rounding(hessian: np.ndarray):
    w, _ = problem(1, 5, 6, 10)
    steps = row_steps(w, 31, 12.85)
    assert (gptq(w, hessian, steps, 31) == rounded(w, steps, 31)).all()


def test_steps_are_k_standard_deviations_over_the_largest_code():
    w = np.random.default_rng(0).standard_normal((4, 50)) * np.array([[1e-3], [0.1], [1.0], [0.0]])
    expected = [float(np.float16(12.85 * torch.tensor(row).std().item() / 31)) for row in w[:3]]
    assert row_steps(w, 31, 12.85).tolist() == [*expected, 2.0**-24]


def test_coarser_grids_change_the_step_alone():
    own = PeerOptions()
    for octaves in (-2.0, -0.7, 0.0, 1.3):
        changed = own.coarser(octaves)
        for name in ("blocks.0.mlp.fc.weight", "tok_emb.weight"):
            (q, k), (own_q, own_k) = changed.grid(name), own.grid(name)
            assert k / q == pytest.approx(own_k / own_q * 2**octaves)
            assert q >= own_q
    assert own.coarser(0.0) == own
    assert own.coarser(1.0, -1.0).grid("tok_emb.weight") == own.coarser(-1.0).grid("tok_emb.weight")


def test_the_embeddings_hessian_is_the_heads():
    rows, mixing, diagonal = torch.ones(3), torch.full((2, 2), 0.5) + torch.eye(2), torch.eye(2)
    head, lookup = Term(rows, mixing), Term(rows, diagonal)
    other = Term(torch.ones(2), torch.ones(3, 3), transposed=True)
    for terms in ((head, lookup), (lookup, head), (other, lookup, head)):
        assert (peers.input_moment(terms) == mixing.numpy()).all()
    assert (peers.input_moment((lookup,)) == diagonal.numpy()).all()
    assert peers.input_moment(()) is None
    assert peers.input_moment((other,)) is None


# ----------------------------------------------------------------------------------------------------------------------
# Bytes.
# ----------------------------------------------------------------------------------------------------------------------


def test_shuffled_bytes_come_back():
    for size in (0, 1, 2, 7, 100, 255):
        raw = bytes((i * 37) % 256 for i in range(size))
        assert peers.unshuffle_bytes(peers.shuffle_bytes(raw)) == raw
    assert peers.shuffle_bytes(b"aAbBc") == b"abcAB"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("options", [
    PeerOptions(), PeerOptions(keep_numel=peers.KEEP_NUMEL), PeerOptions(keep_numel=700), PeerOptions(feedback=False),
    PeerOptions().coarser(-2.0)])
def test_the_bytes_hold_every_value(codec: str, options: PeerOptions):
    if codec not in codecs_here():
        pytest.skip(f"{codec} is not installed")
    state, known = random_model()
    restored = decode_peer(encode_peer(state, known, options, codec), codec)
    assert restored.keys() == state.keys()
    for name, parts in peers.quantised_state(state, known, options).items():
        expected = torch.from_numpy(parts[0]).float()
        if len(parts) == 2:
            expected = expected * torch.from_numpy(parts[1]).float()[:, None]
        assert torch.equal(restored[name], expected.view_as(state[name])), name


def test_what_is_quantised_follows_kind_and_size():
    state, known = random_model()
    codes = {name for name, parts in peers.quantised_state(state, known, PeerOptions()).items() if len(parts) == 2}
    assert codes == known.terms.keys()
    kept = peers.quantised_state(state, known, PeerOptions(keep_numel=700))
    assert {name for name, parts in kept.items() if len(parts) == 2} == {n for n in codes if state[n].numel() > 700}


@needs_brotli
def test_our_container_is_smaller_than_that_of_torch_save():
    state, known = random_model()
    tensors = peers.quantised_state(state, known, PeerOptions())
    buffer = io.BytesIO()
    torch.save({name: [torch.from_numpy(part) for part in parts] for name, parts in tensors.items()}, buffer)
    theirs = CODECS["brotli"].pack(peers.shuffle_bytes(buffer.getvalue()))
    assert len(peers.serialised(tensors, "brotli")) < len(theirs)


@needs_brotli
@pytest.mark.parametrize("octaves", [-1.0, 0.0, 1.0])
def test_the_size_follows_the_entropy(octaves: float):
    """Normal weights: within 3 % of the order-0 entropy of the codes, which falls by a bit an octave."""
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    options = PeerOptions(feedback=False).coarser(octaves)
    state = {"blocks.0.mlp.fc.weight": w}
    codes, steps = peers.quantised_state(state, None, options)["blocks.0.mlp.fc.weight"]
    share = np.unique(codes, return_counts=True)[1] / codes.size
    bits = float(-(share * np.log2(share)).sum())
    assert bits == pytest.approx(2.047 - math.log2(12.85 / 31) - octaves, abs=0.05)
    nbytes = len(encode_peer(state, None, options)) - steps.nbytes
    assert codes.size * bits / 8 * 0.99 < nbytes < codes.size * bits / 8 * 1.03


# ----------------------------------------------------------------------------------------------------------------------
# Faults.
# ----------------------------------------------------------------------------------------------------------------------


def test_feedback_without_statistics_is_refused():
    with pytest.raises(ValueError, match="error feedback needs calibration statistics"):
        encode_peer({"w": torch.ones(2, 2)}, None, PeerOptions())


def test_tensors_that_are_no_floats_are_refused():
    with pytest.raises(ValueError, match="tensor n is int64; the peers' format holds floats"):
        encode_peer({"n": torch.arange(3)}, None, PeerOptions(feedback=False), "zlib")


def test_a_missing_package_is_one_clear_message():
    with pytest.raises(ValueError, match="needs the package no_such_codec: pip install -r requirements-dev"):
        peers.optional("no_such_codec")


def test_a_missing_program_is_one_clear_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    assert "zpaq" not in codecs_here()
    with pytest.raises(ValueError, match="this codec needs the program lrzip, found none"):
        CODECS["zpaq"].pack(b"")
