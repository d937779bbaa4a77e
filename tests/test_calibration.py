"""Calibration: what an error in each matrix costs, learned from training tokens.

Guarantees: moments are those of the inputs recomputed by hand, gradients those of autograd token by token; every matrix of
every variant gets statistics that an export accepts; equal seeds give equal statistics; the model, its gradients and the
generator are as before; the loss that they predict is the one that is measured, within a small factor.
Run: python -m pytest tests/test_calibration.py (about 15 s).
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, VARIANTS, filled_model, fixed_batch, tiny_shape
from torch import Tensor

import calibration
from calibration import calibrate
from export import ExportOptions, Statistics, check_statistics, encode_artifact, expected_loss, matrices, shapes_of
from train_gpt import GPT, rms_norm, rotate

SEED = 5


def noisy_model(**changes: Any) -> GPT:
    model = filled_model(tiny_shape(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def ids_of(rows: int = 2, seq_len: int = 12) -> Tensor:
    return fixed_batch(3, 61, rows=rows, seq_len=seq_len)[0]


def statistics_of(model: GPT, *batches: Tensor, seed: int = SEED) -> Statistics:
    return calibrate(model, iter(batches or (ids_of(),)), CPU, seed)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert torch.allclose(found.double(), wanted.double(), rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def inputs_of(model: GPT, ids: Tensor) -> dict[str, list[Tensor]]:
    """The inputs (tokens, width) of c_q, attn.proj, mlp.fc and mlp.proj at each use, and of the head: the network written
    out once more, without hooks and without the modules' own forward passes.
    """
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        x = model.tok_emb.weight[ids]
        if model.embed_proj is not None:
            found["embed_proj.weight"] = [x]
            x = x @ model.embed_proj.weight.T
        x = x0 = rms_norm(x)
        skips: list[Tensor] = []
        for layer, b in enumerate(model.layer_blocks):
            block = model.blocks[b]
            if layer >= model.encoder_layers and skips:
                x = x + model.skip_weights[layer - model.encoder_layers] * skips.pop()
            x = block.resid_mix[0] * x + block.resid_mix[1] * x0
            attn, h = block.attn, rms_norm(x)
            found.setdefault(f"blocks.{b}.attn.c_q.weight", []).append(h)
            q, k, v = ((h @ w.weight.T).unflatten(-1, (n, -1)).transpose(1, 2) for w, n in (
                (attn.c_q, attn.heads), (attn.c_k, attn.kv_heads), (attn.c_v, attn.kv_heads)))
            cos, sin = model.cos[:ids.shape[1]], model.sin[:ids.shape[1]]
            q, k = (rotate(rms_norm(t), cos, sin) for t in (q, k))
            k, v = (t.repeat_interleave(attn.heads // attn.kv_heads, 1) for t in (k, v))
            scores = (q * attn.q_gain[:, None, None]) @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
            y = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
            found.setdefault(f"blocks.{b}.attn.proj.weight", []).append(y)
            x = x + block.attn_scale * (y @ attn.proj.weight.T)
            h = rms_norm(x)
            found.setdefault(f"blocks.{b}.mlp.fc.weight", []).append(h)
            h = (h @ block.mlp.fc.weight.T).clamp_min(0) ** 2
            found.setdefault(f"blocks.{b}.mlp.proj.weight", []).append(h)
            x = x + block.mlp_scale * (h @ block.mlp.proj.weight.T)
            if layer < model.encoder_layers:
                skips.append(x)
        found["features"] = [rms_norm(x)]
    return {name: [t.flatten(0, -2) for t in uses] for name, uses in found.items()}


def moment_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


# --- moments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["baseline", "two_layers", "all_heads_have_keys", "factorised", "untied"])
def test_moments_are_those_of_the_inputs(variant: str) -> None:
    model = noisy_model(**VARIANTS[variant])
    statistics, inputs = statistics_of(model), inputs_of(model, ids_of())
    for name, uses in inputs.items():
        if name != "features":
            close(statistics.terms[name][0].moment, moment_of(uses[0]))
    for b in range(len(model.blocks)):
        wanted = moment_of(inputs[f"blocks.{b}.attn.c_q.weight"][0])
        for name in ("c_k", "c_v"):
            close(statistics.terms[f"blocks.{b}.attn.{name}.weight"][0].moment, wanted)


@pytest.mark.parametrize("variant", ["shared_blocks", "one_block"])
def test_a_shared_blocks_moments_are_averaged_over_its_uses(variant: str) -> None:
    model = noisy_model(**VARIANTS[variant])
    statistics, inputs = statistics_of(model), inputs_of(model, ids_of())
    several = {name: uses for name, uses in inputs.items() if len(uses) > 1}
    assert several
    for name, uses in several.items():
        close(statistics.terms[name][0].moment, sum((moment_of(x) for x in uses), torch.zeros(())) / len(uses))
        assert not torch.allclose(moment_of(uses[0]).float(), moment_of(uses[1]).float(), rtol=1e-2)


def test_batches_are_averaged_by_tokens() -> None:
    model = noisy_model()
    first, second = ids_of(2, 12), ids_of(3, 12).flip(0)
    statistics = statistics_of(model, first, second)
    inputs = [inputs_of(model, ids) for ids in (first, second)]
    assert statistics.tokens == 60
    for name in ("blocks.1.attn.c_q.weight", "blocks.3.mlp.proj.weight"):
        close(statistics.terms[name][0].moment, moment_of(torch.cat([x[name][0] for x in inputs])))


def test_large_batches_are_cut_into_passes_of_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = noisy_model(), ids_of(6, 12)
    whole = statistics_of(model, ids)
    monkeypatch.setattr(calibration, "CALIBRATION_CHUNK_TOKENS", 25)
    sizes: list[tuple[int, ...]] = []
    observe = calibration.Calibration.observe

    def noted(self: calibration.Calibration, part: Tensor) -> None:
        sizes.append(tuple(part.shape))
        observe(self, part)

    monkeypatch.setattr(calibration.Calibration, "observe", noted)
    cut = statistics_of(model, ids)
    assert sizes == [(2, 12)] * 3
    assert cut.tokens == whole.tokens == 72
    for name, uses in whole.terms.items():
        if name != "tok_emb.weight":        # the labels, and with them all gradients, are other draws
            close(cut.terms[name][0].moment, uses[0].moment)


# --- gradients ------------------------------------------------------------------------------------------------------------


def sampled(logits: Tensor, seed: int = SEED) -> Tensor:
    """The labels that the calibration draws for its first pass."""
    return torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(seed)).flatten()


def output_gradients(model: GPT, ids: Tensor) -> dict[str, list[Tensor]]:
    """For each linear layer and use: d loss / d output (tokens, out), by adding a variable of zeros to each output."""
    zeros: dict[str, list[Tensor]] = {}

    def adding(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            zeros.setdefault(name, []).append(zero)
            return output + zero
        return hook

    handles = [m.register_forward_hook(adding(f"{name}.weight")) for name, m in model.named_modules()
               if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    logits = model.logits(model.features(ids).flatten(0, 1))
    loss = F.cross_entropy(logits, sampled(logits), reduction="sum")
    for handle in handles:
        handle.remove()
    flat = [z for uses in zeros.values() for z in uses]
    gradients = iter(torch.autograd.grad(loss, flat))
    return {name: [next(gradients).flatten(0, -2) for _ in uses] for name, uses in zeros.items()}


@pytest.mark.parametrize("variant", ["baseline", "factorised", "untied", "factorised_untied", "shared_blocks"])
def test_rows_are_the_mean_squares_of_autograds_gradients(variant: str) -> None:
    model, ids = noisy_model(**VARIANTS[variant]), ids_of()
    statistics, gradients = statistics_of(model), output_gradients(model, ids)
    for name, uses in gradients.items():
        squared = sum((g.double().square().sum(0) for g in uses), torch.zeros(())) / ids.numel()
        if name == "tok_emb.weight":
            term = next(t for t in statistics.terms[name] if t.moment.count_nonzero() <= t.moment.shape[0])
            close(term.moment, squared.diag(), 1e-3)
            close(term.rows, torch.bincount(ids.flatten(), minlength=61) / ids.numel())
        else:
            close(statistics.terms[name][0].rows, squared, 1e-3)


def test_a_row_statistic_is_what_finite_differences_of_each_tokens_loss_give() -> None:
    """The tied head: raising the logit of token v everywhere by h changes each token's loss by h g, of which rows[v] is the
    mean square; before the soft cap, which the difference goes through.
    """
    model, ids = noisy_model(), ids_of()
    term = next(t for t in statistics_of(model).terms["tok_emb.weight"] if t.moment.count_nonzero() > t.moment.shape[0])
    with torch.no_grad():
        x = model.features(ids).flatten(0, 1)
        labels = sampled(model.logits(x))
        raw = (x @ model.tok_emb.weight.T).double()

        def nats(v: int, h: float) -> Tensor:
            moved = raw.clone()
            moved[:, v] += h
            return F.cross_entropy(model.softcap * torch.tanh(moved / model.softcap), labels, reduction="none")

        for v in (0, 7, 60):
            slope = (nats(v, 1e-4) - nats(v, -1e-4)) / 2e-4
            assert float(term.rows[v]) == pytest.approx(float(slope.square().mean()), rel=1e-3)
    close(term.moment, moment_of(x))


def test_the_heads_of_a_factorised_model_are_uses_of_both_factors() -> None:
    model, ids = noisy_model(**VARIANTS["factorised"]), ids_of()
    statistics = statistics_of(model)
    x = inputs_of(model, ids)["features"][0]
    assert model.embed_proj is not None
    e, w = model.embed_proj.weight.detach(), model.tok_emb.weight.detach()
    (turned,) = (t for t in statistics.terms["embed_proj.weight"] if t.transposed)
    (head,) = (t for t in statistics.terms["tok_emb.weight"] if t.moment.count_nonzero() > t.moment.shape[0])
    close(turned.moment, moment_of(x))
    close(head.moment, moment_of(x @ e))
    narrow = (x @ e).requires_grad_()
    logits = model.softcap * torch.tanh(narrow @ w.T / model.softcap)
    (g,) = torch.autograd.grad(F.cross_entropy(logits, sampled(logits), reduction="sum"), narrow)
    close(turned.rows, g.square().mean(0), 1e-3)
    assert not head.transposed
    assert len(statistics.terms["embed_proj.weight"]) == len(statistics.terms["tok_emb.weight"]) == 2


# --- every variant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_matrix_of_every_variant_gets_statistics_that_an_export_takes(variant: str) -> None:
    model = noisy_model(**VARIANTS[variant])
    state, statistics = model.state_dict(), statistics_of(model)
    check_statistics(statistics, state)
    assert statistics.terms.keys() == matrices(shapes_of(state)).keys()
    assert statistics.tokens == 24
    tied, factorised = "lm_head.weight" not in state, "embed_proj.weight" in state
    for name, uses in statistics.terms.items():
        doubled = tied and (name == "tok_emb.weight" or (name == "embed_proj.weight" and factorised))
        assert len(uses) == 1 + doubled, name
        for t in uses:
            assert bool((t.rows >= 0).all() and (t.rows > 0).any())
            assert float(torch.linalg.eigvalsh(t.moment.double()).min()) >= -1e-5 * float(t.moment.diagonal().max())
    options = ExportOptions(int8_keep_float_max_numel=0, int8_residual_rank=1)
    assert encode_artifact(state, {}, options, statistics=statistics).data


def test_equal_seeds_give_equal_statistics_and_others_do_not() -> None:
    model = noisy_model()
    first, second, other = (statistics_of(model, seed=seed) for seed in (1, 1, 2))
    assert (first.weights, first.tokens) == (second.weights, second.tokens) == (other.weights, other.tokens)
    for name, uses in first.terms.items():
        for a, b in zip(uses, second.terms[name], strict=True):
            assert torch.equal(a.rows, b.rows)
            assert torch.equal(a.moment, b.moment)
    fc = "blocks.0.mlp.fc.weight"
    assert not torch.equal(first.terms[fc][0].rows, other.terms[fc][0].rows)
    assert torch.equal(first.terms[fc][0].moment, other.terms[fc][0].moment)


def test_calibrating_leaves_the_model_and_the_generator_as_they_were() -> None:
    model = noisy_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    statistics_of(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_are_gone_after_a_fault() -> None:
    def broken() -> Iterator[Tensor]:
        yield ids_of()
        raise OSError("the disk is gone")

    model = noisy_model()
    with pytest.raises(OSError):
        calibrate(model, broken(), CPU, SEED)
    assert not any(m._forward_hooks for m in model.modules())


# --- what it predicts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, Tensor, Tensor]:
    """A model that has learned a Markov chain: (model, ids, next ids)."""
    generator = torch.Generator().manual_seed(0)
    table = (2 * torch.randn(61, 61, generator=generator)).softmax(-1)

    def batch(rows: int) -> Tensor:
        ids = [torch.randint(61, (rows,), generator=generator)]
        for _ in range(24):
            ids.append(torch.multinomial(table[ids[-1]], 1, generator=generator).flatten())
        return torch.stack(ids, 1)

    model = filled_model(tiny_shape(num_layers=2, model_dim=48))
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.ndim == 2 and min(p.shape) > 2:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        ids = batch(16)
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    optimizer.zero_grad()
    ids = batch(150)
    return model, ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("part", ["blocks.0.attn.c_q", "blocks.1.attn.c_v", "blocks.1.attn.proj", "blocks.0.mlp.fc",
                                  "blocks.1.mlp.proj", "tok_emb"])
def test_the_predicted_loss_increase_is_the_measured_one_within_a_factor_of_three(
        trained: tuple[GPT, Tensor, Tensor], part: str) -> None:
    """Random errors of a tenth of the weights' size, each with its negative, so that the first order cancels."""
    model, ids, targets = trained
    statistics = calibrate(model, iter([ids]), CPU, 1)
    weight = model.get_parameter(f"{part}.weight")
    measured, predicted = [], []
    with torch.no_grad():
        start = float(model(ids, targets).double())
        original = weight.clone()
        for seed in range(4):
            error = 0.1 * original.std() * torch.randn(original.shape, generator=torch.Generator().manual_seed(seed))
            moved = []
            for sign in (1, -1):
                weight.copy_(original + sign * error)
                moved.append(float(model(ids, targets).double()))
            weight.copy_(original)
            measured.append(sum(moved) / 2 - start)
            predicted.append(expected_loss(error, statistics.terms[f"{part}.weight"]))
    ratio = sum(predicted) / sum(measured)
    assert sum(measured) > 0
    assert 1 / 3 < ratio < 3, (ratio, measured, predicted)
