"""Model: the challenge's network, and the user's variants of it.

Guarantees: names, initial draws and outputs are the baseline's; no token sees the future, in any variant; fast attention
equals slow attention; a shape, a header and a state dict say the same thing, and malformed ones are ArtifactErrors.
Run: python -m pytest tests/test_model.py (about 15 s).
"""
from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from conftest import CPU, CPU_BF16, TINY_SHAPE, VARIANTS, filled_model, fixed_batch, tiny_shape
from torch import Tensor

import train_gpt
from export import ArtifactError
from export_verbs import meta_from_state
from train_gpt import (
    GPT,
    ModelShape,
    build_model,
    causal_attention,
    load_model,
    rope_tables,
    rotate,
    shape_from_meta,
    tensor_shapes,
    window_attention,
)

BLOCK_SHAPES = {
    "attn_scale": (512,), "mlp_scale": (512,), "resid_mix": (2, 512), "attn.c_q.weight": (512, 512),
    "attn.c_k.weight": (256, 512), "attn.c_v.weight": (256, 512), "attn.proj.weight": (512, 512), "attn.q_gain": (8,),
    "mlp.fc.weight": (1024, 512), "mlp.proj.weight": (512, 1024),
}


# ----------------------------------------------------------------------------------------------------------------------
# Parity with the challenge's baseline.
# ----------------------------------------------------------------------------------------------------------------------


def test_names_and_shapes_of_the_default_network_are_the_baselines() -> None:
    wanted = {"tok_emb.weight": (1024, 512), "skip_weights": (1, 512)}
    wanted |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK_SHAPES.items()}
    assert tensor_shapes(ModelShape(num_layers=2)) == wanted
    assert tensor_shapes(ModelShape(num_layers=2, tie_embeddings=False)) == wanted | {"lm_head.weight": (1024, 512)}
    assert sum(math.prod(shape) for shape in tensor_shapes(ModelShape()).values()) == 17_059_912   # model_params of its log


def baseline_draws(shape: ModelShape, std: float) -> dict[str, Tensor]:
    """The random weights in the baseline's order: embedding, the blocks' matrices, head, then the tied embedding again."""
    d, kv, hidden = shape.model_dim, shape.num_kv_heads * shape.head_dim, shape.mlp_mult * shape.model_dim

    def linear(rows: int, cols: int) -> Tensor:
        gain = math.sqrt(2 / (1 + math.sqrt(5) ** 2))
        bound = math.sqrt(3) * (gain / math.sqrt(cols))
        return torch.empty(rows, cols).uniform_(-bound, bound)

    drawn = {"tok_emb.weight": torch.empty(shape.vocab_size, d).normal_(0, 1)}
    for i in range(shape.num_layers):
        for name, rows, cols in (("attn.c_q", d, d), ("attn.c_k", kv, d), ("attn.c_v", kv, d), ("attn.proj", d, d),
                                 ("mlp.fc", hidden, d), ("mlp.proj", d, hidden)):
            drawn[f"blocks.{i}.{name}.weight"] = linear(rows, cols) * (0 if name.endswith("proj") else 1)
    if shape.tie_embeddings:
        drawn["tok_emb.weight"] = torch.empty(shape.vocab_size, d).normal_(0, std)
    else:
        drawn["lm_head.weight"] = linear(shape.vocab_size, d) * 0
    return drawn


@pytest.mark.usefixtures("fresh_rng")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rt", [CPU, CPU_BF16], ids=["float32", "bfloat16"])
def test_initial_weights_are_the_baselines_draws(tied: bool, rt: train_gpt.Runtime) -> None:
    shape = tiny_shape(tie_embeddings=tied)
    torch.manual_seed(1337)
    wanted = baseline_draws(shape, std=0.005)
    after = torch.rand(1)
    torch.manual_seed(1337)
    state = build_model(shape, rt, 8).state_dict()
    assert torch.equal(torch.rand(1), after)     # not one draw more or less
    for name, value in wanted.items():
        dtype = rt.dtype if name == "tok_emb.weight" else torch.float32
        assert state[name].dtype is dtype
        torch.testing.assert_close(state[name], value.to(rt.dtype).to(dtype), rtol=2**-7 if rt is CPU_BF16 else 1e-6, atol=0)
    ones = {name for name in state if name.endswith(("attn_scale", "mlp_scale")) or name == "skip_weights"}
    mixes = {name for name in state if name.endswith("resid_mix")}
    gains = {name for name in state if name.endswith("q_gain")}
    assert wanted.keys() | ones | mixes | gains == state.keys()
    assert all((state[name] == 1).all() for name in ones)
    assert all((state[name] == torch.tensor([[1.0], [0.0]])).all() for name in mixes)
    assert all((state[name] == 1.5).all() for name in gains)


def test_bfloat16_start_holds_only_values_that_bfloat16_holds() -> None:
    for p in build_model(tiny_shape(), CPU_BF16, 8).parameters():
        assert torch.equal(p, p.bfloat16().to(p.dtype))


@pytest.mark.parametrize(("tied", "loss"), [(True, 6.663476), (False, 6.657419)])
def test_loss_is_the_baselines(tied: bool, loss: float) -> None:
    """Recorded from the challenge's script with the same weights and batch: 5 layers, 3 heads on 1, MLP x3, V 61."""
    model = filled_model(tiny_shape(num_layers=5, mlp_mult=3, tie_embeddings=tied))
    assert model(*fixed_batch(0, 61)).item() == pytest.approx(loss, abs=2e-5)


@pytest.mark.parametrize("changes", [
    {"num_unique_blocks": 4}, {"embed_dim": 24}, {"window_size": 64}, {"rope_dtype": "float32"},
], ids=str)
def test_knobs_that_change_nothing_give_the_baselines_graph(changes: dict[str, Any]) -> None:
    """All blocks unique, an embedding as wide as the model, a window beyond the sequence: the same names and numbers."""
    assert tensor_shapes(tiny_shape(**changes)) == tensor_shapes(tiny_shape())
    batch = fixed_batch(0, 61)
    assert torch.equal(filled_model(tiny_shape(**changes))(*batch), filled_model(tiny_shape())(*batch))


# ----------------------------------------------------------------------------------------------------------------------
# The loss.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(changes: dict[str, Any]) -> None:
    model = filled_model(tiny_shape(**changes))
    torch.nn.init.zeros_((model.tok_emb if model.lm_head is None else model.lm_head).weight)
    nats = model(*fixed_batch(0, 61), reduction="none")
    torch.testing.assert_close(nats, torch.full_like(nats, 4.110873864))    # ln 61


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_a_future_token_never_changes_an_earlier_loss(changes: dict[str, Any], length: int) -> None:
    model = filled_model(tiny_shape(**changes))
    ids = fixed_batch(1, 61, rows=2, seq_len=length)
    stream = torch.cat((ids[0], ids[1][:, -1:]), dim=1)                     # (2, length + 1)

    def losses(tokens: Tensor) -> Tensor:
        return model(tokens[:, :-1], tokens[:, 1:], reduction="none").detach()

    before = losses(stream)
    for changed in range(length + 1):
        other = stream.clone()
        other[0, changed] = (other[0, changed] + 17) % 61
        after = losses(other)
        torch.testing.assert_close(after[0, :max(changed - 1, 0)], before[0, :max(changed - 1, 0)], rtol=0, atol=1e-6)
        torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)  # nor that of another sequence
        if changed > 0:
            assert abs(after[0, changed - 1] - before[0, changed - 1]) > 1e-4   # its own loss it does change


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_mean_loss_is_the_mean_of_the_tokens_losses(changes: dict[str, Any]) -> None:
    model, batch = filled_model(tiny_shape(**changes)), fixed_batch(2, 61)
    nats = model(*batch, reduction="none")
    assert nats.shape == batch[1].shape
    torch.testing.assert_close(model(*batch), nats.mean())
    assert nats.std() > 0.1


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = filled_model(tiny_shape(**changes))
    model(*fixed_batch(0, 61)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.isfinite(p.grad).all()
        # attention to oneself alone does not depend on queries and keys
        if changes.get("window_size") != 1 or not any(part in name for part in ("c_q", "c_k", "q_gain")):
            assert p.grad.any(), name


def test_logits_stay_within_the_softcap() -> None:
    model = filled_model(tiny_shape(logit_softcap=2.5))
    logits = model.logits(100 * model.features(fixed_batch(0, 61)[0]))
    assert logits.abs().max() <= 2.5
    assert logits.abs().max() > 2.4


# ----------------------------------------------------------------------------------------------------------------------
# Attention and positions.
# ----------------------------------------------------------------------------------------------------------------------


def masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention with the full square of scores; position i sees max(0, i - window + 1) .. i."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    i, j = torch.arange(q.size(2))[:, None], torch.arange(q.size(2))[None, :]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    return scores.masked_fill((j > i) | (j <= i - window), -math.inf).softmax(dim=-1) @ v


def random_qkv(length: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, h, length, 6, generator=generator, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(("length", "window"), [
    (1, 1), (5, 1), (6, 2), (7, 2), (7, 3), (8, 4), (9, 4), (11, 5), (13, 12), (13, 13), (13, 14), (4, 100), (16, 8),
    (17, 8),
])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_window_attention_equals_masked_attention_in_value_and_gradient(length: int, window: int, kv_heads: int) -> None:
    qkv = random_qkv(length, 4, kv_heads)
    found, wanted = window_attention(*qkv, window), masked_attention(*qkv, window)
    torch.testing.assert_close(found, wanted)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found).sin()
    for mine, oracle in zip(*(torch.autograd.grad((t * weights).sum(), qkv) for t in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, oracle)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_equals_masked_attention_with_and_without_native_gqa(
    kv_heads: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not train_gpt.NATIVE_GQA:
        pytest.skip("this PyTorch has no enable_gqa")
    monkeypatch.setattr(train_gpt, "NATIVE_GQA", native)
    qkv = random_qkv(9, 4, kv_heads)
    torch.testing.assert_close(causal_attention(*qkv), masked_attention(*qkv, window=9))


def test_model_without_native_gqa_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = filled_model(tiny_shape()), fixed_batch(0, 61)
    before = model(*batch)
    monkeypatch.setattr(train_gpt, "NATIVE_GQA", not train_gpt.NATIVE_GQA)
    torch.testing.assert_close(model(*batch), before)


def test_a_window_of_the_model_hides_what_lies_before_it() -> None:
    """Two layers of window 3 reach back 2 x 2 tokens and no further."""
    model = filled_model(tiny_shape(num_layers=2, window_size=3))
    ids = fixed_batch(0, 61, rows=1, seq_len=12)[0]
    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % 61
    moved = (model.features(ids) - model.features(other)).abs().amax(dim=-1)[0] > 1e-6
    assert moved.tolist() == [False] * 2 + [True] * 5 + [False] * 5


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    length, width = 11, 10
    x = torch.randn(2, 3, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(length, width, 50.0, torch.float64)
    angles = torch.arange(length)[:, None] * 50.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(torch.ones_like(angles), -angles)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), dim=-1), rtol=0, atol=1e-6)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    cos, sin = rope_tables(64, 8, 10000.0, torch.float32)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    turned_q, turned_k = (rotate(t.expand(1, 1, 64, 8), cos, sin)[0, 0] for t in (q, k))
    products = turned_q @ turned_k.T
    for distance in (0, 1, 30):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (products[30, 0] - products[0, 0]).abs() > 1e-3


def test_float32_tables_tell_all_positions_apart_and_bfloat16_tables_round_those_above_256() -> None:
    dtypes = torch.float32, torch.bfloat16
    fine, coarse = (torch.cat(rope_tables(512, 64, 10000.0, dtype), dim=1).float() for dtype in dtypes)
    assert fine.shape == coarse.shape == (512, 64)
    assert len(fine.unique(dim=0)) == 512
    assert torch.equal(coarse[257], coarse[256])     # 257 is no bfloat16
    assert torch.equal(coarse[259], coarse[260])
    assert len(coarse.unique(dim=0)) == 257 + 128    # 0 .. 256 one by one, then the even ones to 512, which is 511's
    torch.testing.assert_close(coarse[:8], fine[:8], rtol=0, atol=0.05)


@pytest.mark.parametrize(("rope_dtype", "rt", "expected"), [
    ("auto", CPU, torch.float32), ("auto", CPU_BF16, torch.bfloat16), ("float32", CPU_BF16, torch.float32),
    ("bfloat16", CPU, torch.bfloat16),
])
def test_rope_dtype_chooses_the_tables(rope_dtype: str, rt: train_gpt.Runtime, expected: torch.dtype) -> None:
    model = build_model(tiny_shape(rope_dtype=rope_dtype), rt, 300)
    for found, wanted in zip((model.cos, model.sin), rope_tables(300, 8, 10000.0, expected), strict=True):
        assert torch.equal(found.float(), wanted.float())


# ----------------------------------------------------------------------------------------------------------------------
# Shared blocks, factorised embeddings.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "unique", "wanted"), [
    (5, 2, [0, 1, 0, 1, 0]), (4, 1, [0, 0, 0, 0]), (5, 3, [0, 1, 2, 0, 1]), (3, 0, [0, 1, 2]), (3, 3, [0, 1, 2]),
])
def test_layers_take_the_unique_blocks_in_turn(layers: int, unique: int, wanted: list[int]) -> None:
    shape = tiny_shape(num_layers=layers, num_unique_blocks=unique)
    assert GPT(shape, 8).layer_blocks == wanted
    assert {name.split(".")[1] for name in tensor_shapes(shape) if name.startswith("blocks.")} == set(map(str, wanted))


def test_shared_blocks_are_one_storage_and_compute_as_copies_would() -> None:
    shared = filled_model(tiny_shape(num_layers=5, num_unique_blocks=2))
    copies = GPT(tiny_shape(num_layers=5), 32)
    copies.load_state_dict({
        name: shared.state_dict()[name.replace(f"blocks.{name.split('.')[1]}.", f"blocks.{int(name.split('.')[1]) % 2}.")]
        if name.startswith("blocks.") else shared.state_dict()[name]
        for name in copies.state_dict()
    })
    batch = fixed_batch(0, 61)
    assert torch.equal(shared(*batch), copies(*batch))
    for model in (shared, copies):
        model(*batch).backward()
    summed = sum(copies.blocks[i].mlp.fc.weight.grad for i in (0, 2, 4))
    torch.testing.assert_close(shared.blocks[0].mlp.fc.weight.grad, summed)
    block = sum(p.numel() for p in shared.blocks[0].parameters())
    assert sum(p.numel() for p in copies.parameters()) - sum(p.numel() for p in shared.parameters()) == 3 * block


def test_tied_head_goes_back_through_the_factors_of_the_embedding() -> None:
    shape = tiny_shape(embed_dim=10)
    model = filled_model(shape)
    table, up = model.tok_emb.weight, model.embed_proj.weight               # (V, E), (D, E)
    assert (tuple(table.shape), tuple(up.shape)) == ((61, 10), (24, 10))
    assert tensor_shapes(shape) == tensor_shapes(tiny_shape()) | {"tok_emb.weight": (61, 10), "embed_proj.weight": (24, 10)}
    x = model.features(fixed_batch(0, 61)[0])
    torch.testing.assert_close(model.logits(x), 30 * torch.tanh(x @ up @ table.T / 30))


def test_factorised_embedding_equals_a_full_one_of_their_product() -> None:
    factorised, full = filled_model(tiny_shape(embed_dim=10)), filled_model(tiny_shape())
    state = {name: t for name, t in factorised.state_dict().items() if name != "embed_proj.weight"}
    state["tok_emb.weight"] = factorised.tok_emb.weight @ factorised.embed_proj.weight.T
    full.load_state_dict(state)
    torch.testing.assert_close(factorised(*fixed_batch(0, 61)), full(*fixed_batch(0, 61)))


# ----------------------------------------------------------------------------------------------------------------------
# Shapes, headers and states.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_tensor_shapes_are_those_of_a_real_model(changes: dict[str, Any]) -> None:
    shape = tiny_shape(**changes)
    state = GPT(shape, 8).state_dict()
    assert tensor_shapes(shape) == {name: tuple(t.shape) for name, t in state.items()}
    assert all(t.numel() for t in state.values())


def test_tensor_shapes_of_a_huge_model_need_no_memory() -> None:
    shapes = tensor_shapes(ModelShape(model_dim=1 << 15, num_heads=64, num_kv_heads=64, num_layers=4))
    assert sum(math.prod(shape) for shape in shapes.values()) > 30_000_000_000


def header(**changes: Any) -> dict[str, Any]:
    return {"model": asdict(tiny_shape(rope_dtype="float32", **changes)), "train_seq_len": 16}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_header_gives_back_the_shape_it_was_made_of(changes: dict[str, Any]) -> None:
    assert shape_from_meta(header(**changes)) == tiny_shape(rope_dtype="float32", **changes)


@pytest.mark.parametrize("name", [f.name for f in fields(ModelShape)])
def test_header_value_of_a_wrong_type_is_refused(name: str) -> None:
    good = asdict(tiny_shape())[name]
    for value in (None, "8", [8], {"a": 1}, 8, 8.0, True):
        if type(value) is not type(good):
            meta = header()
            meta["model"][name] = value
            with pytest.raises(ArtifactError, match=rf"meta\.model\.{name}"):
                shape_from_meta(meta)


@pytest.mark.parametrize("name", ["rope_base", "logit_softcap"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_header_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    meta = header()
    meta["model"][name] = value
    with pytest.raises(ArtifactError, match=r"meta\.model"):
        shape_from_meta(meta)


@pytest.mark.parametrize(("name", "value"), [
    ("vocab_size", 0), ("vocab_size", 65537), ("num_layers", 0), ("num_layers", -1), ("num_layers", 10**9),
    ("model_dim", 0), ("model_dim", 25), ("model_dim", 3 << 30), ("num_heads", 0), ("num_heads", 5), ("num_heads", 24),
    ("num_kv_heads", 2), ("num_kv_heads", 0), ("mlp_mult", 0), ("mlp_mult", 10**6), ("num_unique_blocks", 5),
    ("num_unique_blocks", -1), ("embed_dim", 25), ("embed_dim", -1), ("window_size", -1), ("rope_base", 1.0),
    ("rope_base", -5.0), ("rope_dtype", "int8"), ("logit_softcap", 0.0), ("logit_softcap", -1.0),
])
def test_header_value_out_of_range_is_refused(name: str, value: Any) -> None:
    meta = header()
    meta["model"][name] = value
    with pytest.raises(ArtifactError, match=r"meta\.model"):
        shape_from_meta(meta)


@pytest.mark.parametrize("model", [None, [], 3, "x", {}], ids=repr)
def test_header_without_a_model_is_refused(model: Any) -> None:
    for meta in ({"train_seq_len": 16, "model": model}, {"train_seq_len": 16}):
        with pytest.raises(ArtifactError, match=r"meta\.model"):
            shape_from_meta(meta)


@pytest.mark.parametrize("name", [f.name for f in fields(ModelShape)])
def test_header_with_a_missing_or_an_extra_key_is_refused(name: str) -> None:
    missing, extra = header(), header()
    del missing["model"][name]
    extra["model"][f"{name}_2"] = 1
    for meta in (missing, extra):
        with pytest.raises(ArtifactError, match=r"meta\.model"):
            shape_from_meta(meta)


@pytest.mark.parametrize("value", [None, 0, -1, "16", 16.0, True, (1 << 20) + 1])
def test_header_with_a_senseless_sequence_length_is_refused(value: Any) -> None:
    with pytest.raises(ArtifactError, match="train_seq_len"):
        shape_from_meta(header() | {"train_seq_len": value})


def test_header_of_a_huge_model_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few bytes must not make its reader allocate gigabytes."""
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the model was built before its tensors were compared")

    monkeypatch.setattr(train_gpt, "build_model", never)
    with pytest.raises(ArtifactError, match="tensor"):
        load_model(filled_model(tiny_shape()).state_dict(), header(model_dim=65532, num_kv_heads=3), CPU)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_loaded_model_computes_what_the_saved_one_did(changes: dict[str, Any]) -> None:
    model, batch = filled_model(tiny_shape(**changes)), fixed_batch(0, 61, seq_len=16)
    assert torch.equal(load_model(model.state_dict(), header(**changes), CPU)(*batch), model(*batch))


def test_state_that_does_not_fit_its_header_is_refused() -> None:
    state = filled_model(tiny_shape()).state_dict()
    broken = {
        "blocks.0.attn.q_gain": {name: t for name, t in state.items() if name != "blocks.0.attn.q_gain"},
        "extra": state | {"extra": torch.zeros(1)},
        "tok_emb.weight": state | {"tok_emb.weight": state["tok_emb.weight"].T},
    }
    for name, wrong in broken.items():
        with pytest.raises(ArtifactError, match=f"tensor {name}"):
            load_model(wrong, header(), CPU)


@pytest.mark.parametrize("changes", [
    *({k: v for k, v in changes.items() if k != "window_size"} for changes in VARIANTS.values()),
    {"vocab_size": 1, "num_heads": 1, "model_dim": 2}, {"num_heads": 12, "num_kv_heads": 4, "mlp_mult": 7},
], ids=str)
def test_shape_is_inferred_from_the_tensors(changes: dict[str, Any]) -> None:
    """All of it, but for what shapes cannot tell: window, RoPE, softcap, and the layers that share blocks."""
    shape = tiny_shape(**changes)
    given = {"NUM_LAYERS": str(shape.num_layers)} if shape.num_unique_blocks else {}
    meta = meta_from_state(GPT(shape, 8).state_dict(), given)
    assert meta["train_seq_len"] == 1024
    assert shape_from_meta(meta) == replace(shape, rope_dtype="float32")
    assert tensor_shapes(shape_from_meta(meta)) == tensor_shapes(shape)


def test_overrides_and_the_embeddings_dtype_complete_the_inferred_shape() -> None:
    state = build_model(tiny_shape(), CPU_BF16, 8).state_dict()
    meta = meta_from_state(state, {"ROPE_BASE": "500", "WINDOW_SIZE": "7", "LOGIT_SOFTCAP": "12.5", "TRAIN_SEQ_LEN": "256"})
    wanted = tiny_shape(rope_base=500.0, window_size=7, logit_softcap=12.5, rope_dtype="bfloat16")
    assert (shape_from_meta(meta), meta["train_seq_len"]) == (wanted, 256)


@pytest.mark.parametrize(("name", "value"), [
    ("tok_emb.weight", None), ("blocks.0.attn.c_k.weight", None), ("blocks.0.attn.q_gain", None),
    ("blocks.0.mlp.fc.weight", None), ("blocks.0.mlp.fc.weight", torch.tensor(1.0)),
    ("tok_emb.weight", torch.zeros(3)), ("tok_emb.weight", torch.zeros(70_000, 24)),
    ("blocks.0.attn.c_k.weight", torch.zeros(8, 0)), ("blocks.0.attn.c_k.weight", torch.zeros(0, 24)),
    ("blocks.0.attn.q_gain", torch.zeros(0)), ("blocks.0.attn.q_gain", torch.zeros(5)),
])
def test_state_that_is_no_gpt_is_refused(name: str, value: Tensor | None) -> None:
    state = filled_model(tiny_shape()).state_dict()
    broken = {n: t for n, t in state.items() if n != name} | ({} if value is None else {name: value})
    with pytest.raises(ArtifactError, match="checkpoint"):
        meta_from_state(broken, {})


@pytest.mark.parametrize("overrides", [
    {"ROPE_BASE": "x"}, {"ROPE_BAS": "5"}, {"NUM_LAYERS": "2"}, {"LOGIT_SOFTCAP": "0"},
], ids=str)
def test_overrides_that_make_no_sense_are_refused(overrides: dict[str, str]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(overrides))):
        meta_from_state(filled_model(tiny_shape()).state_dict(), overrides)


def test_the_tiny_shape_differs_from_the_defaults_where_it_can() -> None:
    """Otherwise a value read from a default instead of the header would go unnoticed."""
    assert not [name for name, value in TINY_SHAPE.items() if name != "mlp_mult" and value == getattr(ModelShape(), name)]
