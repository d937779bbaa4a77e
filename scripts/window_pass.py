"""The model on windows of which only the last places are scored: the forward passes of scripts/scoring.py.

Both give the scores of `GPT.forward` for the places asked for. `WindowPass` reads the weights as they are at each call, in
any precision, and can be compiled. `FloatPass` is for float32 without a compiler, where memory traffic is half of the time:
it folds scales into weights once (weights must not change afterwards), works in place, and shares the first layer's
attention among windows that overlap.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import GPT, NATIVE_GQA, Block, causal_attention, rms_norm, rotate, window_attention

LARGEST_SCORE = 40.0        # e^40 and its sums are far from float32's limits: no maximum need be taken off


def last_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of the last tokens, q (B, H, n, C), to their `window` tokens, 0 = the whole prefix; k and v (B, K, T, C)."""
    j = torch.arange(k.size(2), device=q.device)
    i = j[-q.size(2):, None]
    mask, few = (j <= i) & (j > i - (window or j.numel())), k.size(1) < q.size(1)
    if few and not NATIVE_GQA:
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **({"enable_gqa": True} if few and NATIVE_GQA else {}))


def last_places(block: Block, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
    """What the block gives for the last places of x (B, T, D) alone, (B, last, D): all places have keys and values, but only
    these ask, and only they pass the MLP.
    """
    attn, mix = block.attn, block.resid_mix.to(x.dtype)
    x = mix[0] * x + mix[1] * x0
    h, x = rms_norm(x), x[:, -last:]
    sides = (attn.c_q, h[:, -last:], attn.heads), (attn.c_k, h, attn.kv_heads), (attn.c_v, h, attn.kv_heads)
    q, k, v = (linear(t).unflatten(-1, (count, -1)).transpose(1, 2) for linear, t, count in sides)
    q, k = rotate(rms_norm(q), cos[-last:], sin[-last:]), rotate(rms_norm(k), cos, sin)
    y = last_attention(q * attn.q_gain.to(q.dtype)[:, None, None], k, v, attn.window)
    x = x + block.attn_scale.to(x.dtype) * attn.proj(y.transpose(1, 2).flatten(2))
    return x + block.mlp_scale.to(x.dtype) * block.mlp(rms_norm(x))


class WindowPass:
    """Scores at the last places of each window, or at all of them."""

    def __init__(self, model: GPT):
        self.model = model
        self.blocks = [block for block in model.blocks if isinstance(block, Block)]

    @property
    def reach(self) -> int:
        """Inputs that can have a part in a score, the last one included; 0 = all."""
        window = self.blocks[0].attn.window
        return 1 + len(self.model.layer_blocks) * (window - 1) if window else 0

    def features(self, ids: Tensor, last: int, step: int) -> Tensor:
        """`GPT.features` of ids (B, T) at the `last` places of each row, 0 = all: (B * last, D). `step` > 0 says that each
        row begins so many tokens after the one above it in one text.
        """
        if not last:
            return self.model.features(ids).flatten(0, 1)
        (x0, *_, x), (cos, sin) = self.inputs(ids)
        return rms_norm(last_places(self.blocks[self.model.layer_blocks[-1]], x, x0, cos, sin, last)).flatten(0, 1)

    def inputs(self, ids: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """What each layer takes, (B, T, D) with its skip, of token ids (B, T), the first being x0; and the rotary tables."""
        model = self.model
        x = model.tok_emb(ids)
        found, skips = [rms_norm(x if model.embed_proj is None else model.embed_proj(x))], list[Tensor]()
        cos, sin = (table[: ids.size(1)].to(found[0].dtype) for table in (model.cos, model.sin))
        for layer, number in enumerate(model.layer_blocks[:-1]):
            x = self.blocks[number](found[-1], found[0], cos, sin)
            if layer < model.encoder_layers:
                skips.append(x)
            if layer + 1 >= model.encoder_layers and skips:
                x = x + model.skip_weights[layer + 1 - model.encoder_layers].to(x.dtype) * skips.pop()
            found.append(x)
        return found, (cos, sin)

    def logits(self, ids: Tensor, last: int = 0, step: int = 0) -> Tensor:
        """Soft-capped logits (B * last, V) of ids (B, T), float32."""
        return self.model.logits(self.features(ids, last, step)).float()

    def nats(self, ids: Tensor, targets: Tensor, last: int = 0, step: int = 0) -> Tensor:
        """Cross-entropy of each target, in the shape of `targets`: (B, T), or (B, last)."""
        return F.cross_entropy(self.logits(ids, last, step), targets.flatten(), reduction="none").view_as(targets)


class Folded:
    """A block's matrices, (in, out), scales included. The places of a head's queries and keys stand in the order of their
    rotation's pairs, so that a rotation is one complex product; scores do not depend on the order.
    """

    def __init__(self, block: Block):
        attn, mlp = block.attn, block.mlp
        width = attn.c_q.weight.size(0) // attn.heads
        pairs = torch.arange(width).view(2, -1).T.flatten()
        order = (torch.arange(attn.heads + attn.kv_heads)[:, None] * width + pairs).flatten().to(attn.c_q.weight.device)
        both = torch.cat((attn.c_q.weight, attn.c_k.weight))[order]
        self.q = both[:attn.heads * width].T.contiguous()
        self.kv = torch.cat((both[attn.heads * width:], attn.c_v.weight)).T.contiguous()
        self.qkv = torch.cat((self.q, self.kv), dim=1)
        self.gain = torch.cat((attn.q_gain, torch.ones_like(attn.c_k.weight[:attn.kv_heads, 0])))[:, None]
        self.attn_out = (block.attn_scale[:, None] * attn.proj.weight).T.contiguous()
        self.mlp_in = mlp.fc.weight.T.contiguous()
        self.mlp_out = (block.mlp_scale[:, None] * mlp.proj.weight).T.contiguous()
        self.mix = block.resid_mix


def scale_of(x: Tensor) -> Tensor:
    """The factor by which `rms_norm` multiplies x (..., D), (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(torch.finfo(x.dtype).eps).rsqrt_()


def normalise(heads: Tensor, gain: Tensor) -> Tensor:
    """`rms_norm` times the gain of each head (heads, 1), in place."""
    return heads.mul_(scale_of(heads).mul_(gain))


def turn(heads: Tensor, circle: Tensor) -> Tensor:
    """Rotates pairs of neighbours of `heads` (B, T, heads, C) by `circle` (T, 1, C / 2), complex, in place."""
    torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(circle)
    return heads


class FloatPass(WindowPass):
    """The same in float32 for weights that stay as they are, without gradients."""

    def __init__(self, model: GPT):
        super().__init__(model)
        with torch.inference_mode():
            attn = self.blocks[0].attn
            self.heads, self.kv_heads, self.window = attn.heads, attn.kv_heads, attn.window
            self.folded = [Folded(block) for block in self.blocks]
            self.circle = torch.complex(model.cos.float(), -model.sin.float())[:, None]
            # What the first layer does before its attention depends on the token alone: a row for each of the vocabulary.
            x = model.tok_emb.weight
            self.x0 = rms_norm(x if model.embed_proj is None else model.embed_proj(x))
            first = self.folded[0]
            self.x = first.mix.sum(0) * self.x0
            heads = (rms_norm(self.x) @ first.qkv).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
            normalise(heads[:, :len(first.gain)], first.gain)
            self.first_heads = heads                                                    # (V, H + 2 K, C), not rotated
            self.shares = not self.window and float(attn.q_gain.abs().max()) * heads.size(-1) ** 0.5 <= LARGEST_SCORE

    def features(self, ids: Tensor, last: int, step: int) -> Tensor:
        model, (rows, places), flat = self.model, ids.shape, ids.flatten()
        x0, skips = self.x0[flat], list[Tensor]()
        x = self.x[flat]                                                                # (B * T, D) everywhere
        for layer, number in enumerate(model.layer_blocks):
            own, final = self.folded[number], last if layer == len(model.layer_blocks) - 1 else 0
            if layer == 0:
                y = self.shared(ids, step) if step and self.shares else self.attention(*self.split(self.first_heads[ids]))
            else:
                if layer >= model.encoder_layers and skips:
                    x.addcmul_(skips.pop(), model.skip_weights[layer - model.encoder_layers])
                x = (x * own.mix[0]).addcmul_(x0, own.mix[1])
                y = self.attention(*self.project(own, (x * scale_of(x)).view(rows, places, -1), final))
                x = x.view(rows, places, -1)[:, -final:].flatten(0, 1)
            x.addmm_(y, own.attn_out)
            x.addmm_((x * scale_of(x) @ own.mlp_in).relu_().square_(), own.mlp_out)
            if layer < model.encoder_layers:
                skips.append(x)
        return x.mul_(scale_of(x))

    def logits(self, ids: Tensor, last: int = 0, step: int = 0) -> Tensor:
        model, x = self.model, self.features(ids, last, step).div_(self.model.softcap)
        if model.lm_head is None:
            x = x if model.embed_proj is None else x @ model.embed_proj.weight
        weight = (model.tok_emb if model.lm_head is None else model.lm_head).weight
        return F.linear(x, weight).tanh_().mul_(model.softcap)

    def nats(self, ids: Tensor, targets: Tensor, last: int = 0, step: int = 0) -> Tensor:
        logits = self.logits(ids, last, step)
        own = logits.gather(1, targets.view(-1, 1))[:, 0]
        total = logits.exp_().sum(-1).log_() if self.model.softcap <= LARGEST_SCORE else logits.logsumexp(-1)
        return total.sub_(own).view_as(targets)

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, and keys with values, of (..., H + 2 K, C)."""
        return heads[..., :self.heads, :], heads[..., self.heads:, :]

    def project(self, own: Folded, h: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Normalised queries (B, T or last, H, C), and keys with values (B, T, 2 K, C), of a normalised stream (B, T, D)."""
        if not last:
            heads = (h @ own.qkv).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
            normalise(heads[:, :, :len(own.gain)], own.gain)
            return self.split(heads)
        q = (h[:, -last:] @ own.q).unflatten(-1, (self.heads, -1))
        kv = (h @ own.kv).unflatten(-1, (2 * self.kv_heads, -1))
        normalise(kv[:, :, :self.kv_heads], own.gain[self.heads:])
        return normalise(q, own.gain[:self.heads]), kv

    def attention(self, q: Tensor, kv: Tensor) -> Tensor:
        """(B * n, D) for the last n places, of q (B, n, H, C) and kv (B, T, 2 K, C), not rotated yet."""
        places, asking = kv.size(1), q.size(1)
        turn(q, self.circle[places - asking:places])
        turn(kv[:, :, :self.kv_heads], self.circle[:places])
        q, k, v = (t.transpose(1, 2) for t in (q, *kv.chunk(2, dim=2)))
        if asking < places:
            y = last_attention(q, k, v, self.window)
        else:
            y = window_attention(q, k, v, self.window) if self.window else causal_attention(q, k, v)
        return y.transpose(1, 2).flatten(0, 1).flatten(1)

    def shared(self, ids: Tensor, step: int) -> Tensor:
        """The first layer's attention of windows (B, T) that begin `step` tokens apart, (B * T, D).

        There queries, keys and values are the same in all windows. A chunk of `step` tokens that is number o of its window
        attends to itself and the o before it, so that the sums of e^score and e^score * value over one chunk more each time
        serve one window after the other, and every pair of chunks is computed once. Rotations are relative: keys are turned
        by their place in the chunk, queries by that and the chunks between.
        """
        rows, chunks, groups = ids.size(0), ids.size(1) // step, self.heads // self.kv_heads
        text = torch.cat((ids[:-1, :step].flatten(), ids[-1]))
        q, kv = self.split(self.first_heads[text].unflatten(0, (-1, step)))                 # (J, step, heads, C), J chunks
        q = (q * q.size(-1) ** -0.5).transpose(1, 2).unflatten(1, (self.kv_heads, groups)).contiguous()
        k, v = kv.chunk(2, dim=2)                                                           # q (J, K, groups, step, C)
        k = turn(k, self.circle[:step]).permute(0, 2, 3, 1).contiguous()                    # (J, K, C, step)
        v = F.pad(v.transpose(1, 2), (0, 1), value=1.0)                                     # (J, K, step, C + 1)
        later = torch.full((step, step), -torch.inf, device=ids.device).triu(1)
        sums = torch.zeros(*q.shape[:-1], q.size(-1) + 1, device=ids.device)                # values, then the weights' own
        y = torch.empty(rows, chunks, step, self.heads, q.size(-1), device=ids.device)
        for o in range(chunks):
            circle = self.circle[o * step:(o + 1) * step, 0]
            asking = torch.view_as_real(torch.view_as_complex(q[o:].unflatten(-1, (-1, 2))) * circle).flatten(-2)
            weights = torch.bmm(asking.flatten(0, 1).flatten(1, 2), k[:len(k) - o].flatten(0, 1))
            if o == 0:
                weights.view(-1, step, step).add_(later)
            sums[o:].flatten(0, 1).flatten(1, 2).baddbmm_(weights.exp_(), v[:len(v) - o].flatten(0, 1))
            mine = sums[o:o + rows]                                                         # of window i its chunk i + o
            y[:, o] = (mine[..., :-1] / mine[..., -1:]).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return y.flatten(0, 2).flatten(1)
