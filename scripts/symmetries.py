"""Symmetries: reorderings and rotations that leave the network's function as it is; the file stores none of them.

EXPORT_PERMUTE and EXPORT_ROTATE. `export.py` loads this module when one of them asks for it.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from export import Choice, ExportOptions, Judge, Statistics, Stored, pack_codes, quantised


@dataclass(frozen=True)
class Symmetry:
    """Units that may change places. Each place is (tensor, dim, positions (units, width) of the units on that dim).

    What may be exchanged in a GPT of this program, when every tensor that touches a unit follows:
    - hidden units of an MLP, because relu^2 is elementwise: rows of fc, columns of mlp.proj;
    - key/value heads, each with its group of query heads, and query heads inside a group, q_gain included;
    - value dimensions of a key/value head: rows of c_v, columns of attn.proj at all heads of its group;
    - dimensions of the residual stream, on which RMSNorm is symmetric and all else elementwise or linear;
    - dimensions of a factorised embedding.
    Query/key dimensions may not: the pair (i, i + C/2) turns by an angle of its own per position, so two pairs are no
    equals, and exchanging the two of a pair is a reflection, which turns the rotation by the distance d into the one by -d
    (q^T S R(d) S k = q^T R(-d) k). Only common rotations of a pair's two rows in q and k remain, quarter turns among them.
    """
    kind: str
    places: tuple[tuple[str, int, Tensor], ...]

    @property
    def units(self) -> int:
        return len(self.places[0][2])

    def index(self, place: tuple[str, int, Tensor], order: Tensor, size: int) -> Tensor:
        """Where each position of the place's dim comes from when the units stand in `order`."""
        index, positions = torch.arange(size), place[2]
        index[positions.reshape(-1)] = positions[order].reshape(-1)
        return index

    def apply(self, order: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(state)
        for place in self.places:
            name, dim, _ = place
            changed[name] = changed[name].index_select(dim, self.index(place, order, changed[name].shape[dim]))
        return changed

    def apply_to_statistics(self, order: Tensor, statistics: Statistics, state: Mapping[str, Tensor]) -> Statistics:
        terms = dict(statistics.terms)
        for place in self.places:
            name, dim, _ = place
            if name in terms:
                index = self.index(place, order, state[name].shape[dim])
                terms[name] = tuple(
                    replace(t, rows=t.rows[index]) if (dim == 0) != t.transposed
                    else replace(t, moment=t.moment[index][:, index]) for t in terms[name])
        return replace(statistics, terms=terms)


def find_symmetries(state: Mapping[str, Tensor], mode: str) -> list[Symmetry]:
    """Those of the state that EXPORT_PERMUTE=mlp or all may use; none for a state that is no GPT of this program."""
    found = []
    for block in block_names(state):
        fc, proj = block + "mlp.fc.weight", block + "mlp.proj.weight"
        hidden = torch.arange(state[fc].shape[0])[:, None]
        found.append(Symmetry("mlp", ((fc, 0, hidden), (proj, 1, hidden))))
        if mode == "all":
            found += head_symmetries(state, block + "attn.")
    return found + (stream_symmetries(state) if mode == "all" and found else [])


def block_names(state: Mapping[str, Tensor]) -> list[str]:
    """`blocks.N.` for each block; none unless every block's tensors have the shapes of a GPT of this program."""
    found = sorted({m[0] for name in state if (m := re.match(r"blocks\.\d+\.", name))})
    ends = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    for block in found:
        shapes = [tuple(state[name].shape) for end in ends if (name := f"{block}{end}.weight") in state]
        heads = state[block + "attn.q_gain"].numel() if block + "attn.q_gain" in state else 0
        if len(shapes) < len(ends) or any(len(shape) != 2 for shape in shapes) or heads == 0:
            return []
        (inner, dim), k, v, out, fc, proj = shapes
        width = max(inner // heads, 1)
        groups = k[0] // width
        fits = k == v == (groups * width, dim) and out == (dim, inner) and fc[1] == dim and proj == fc[::-1]
        if not fits or inner != heads * width or groups == 0 or heads % groups:
            return []
    return found


def head_symmetries(state: Mapping[str, Tensor], at: str) -> list[Symmetry]:
    q, k, v, proj, gain = (at + name for name in ("c_q.weight", "c_k.weight", "c_v.weight", "proj.weight", "q_gain"))
    heads = state[gain].numel()
    width = state[q].shape[0] // heads
    groups = state[k].shape[0] // width
    rows = torch.arange(heads * width).view(groups, -1)                 # of the query heads of each group
    kv_rows = torch.arange(groups * width).view(groups, width)
    gains = torch.arange(heads).view(groups, -1)
    found = [Symmetry("kv_head", ((q, 0, rows), (k, 0, kv_rows), (v, 0, kv_rows), (gain, 0, gains), (proj, 1, rows)))]
    for g in range(groups):
        own = rows[g].view(-1, width)                                   # (heads of the group, width)
        found.append(Symmetry("query_head", ((q, 0, own), (gain, 0, gains[g][:, None]), (proj, 1, own))))
        found.append(Symmetry("value", ((v, 0, kv_rows[g][:, None]), (proj, 1, own.T))))
    return [s for s in found if s.units > 1]


def stream_symmetries(state: Mapping[str, Tensor]) -> list[Symmetry]:
    """The residual stream, and the narrow side of a factorised embedding."""
    factorised = "embed_proj.weight" in state
    dims = {"skip_weights": 1, "attn_scale": 0, "mlp_scale": 0, "resid_mix": 1, "c_q.weight": 1, "c_k.weight": 1,
            "c_v.weight": 1, "fc.weight": 1, "proj.weight": 0, "lm_head.weight": 1}
    dims |= {"embed_proj.weight": 0} if factorised else {"tok_emb.weight": 1}
    ends = {name: dim for name in state for end, dim in dims.items() if name == end or name.endswith(f".{end}")}
    size = {state[name].shape[dim] if state[name].ndim > dim else 0 for name, dim in ends.items()}
    if len(size) != 1:
        return []
    units = torch.arange(size.pop())[:, None]
    found = [Symmetry("stream", tuple((name, dim, units) for name, dim in sorted(ends.items())))]
    if factorised:
        narrow = torch.arange(state["embed_proj.weight"].shape[1])[:, None]
        found.append(Symmetry("embedding", (("tok_emb.weight", 1, narrow), ("embed_proj.weight", 1, narrow))))
    return found


def rotated(state: dict[str, Tensor], statistics: Statistics | None) -> tuple[dict[str, Tensor], Statistics | None]:
    """The state with a triangle of zeros in each value head: the canonical form of the continuous symmetry v -> R v, which
    attention passes on to attn.proj unchanged (rotational redundancy: He et al. 2024, arXiv 2410.01309; zeros stand for
    its bits back, and need no second pass of the decoder).

    R^T is the orthogonal factor of the head's first C columns, C (C - 1) / 2 zeros; fp64 inside, so logits keep to fp32
    rounding. The symmetry is larger, GL(C), but a general matrix would scale errors. Queries and keys allow one angle a
    RoPE pair alone, because a rotation must commute with the position's own: C / 2 zeros a head, under 0.01 % of a file.
    The stream allows none: attn_scale, mlp_scale, resid_mix and skip_weights act on single dimensions
    (diag(s) R = R diag(s) for all R only if s is constant), and relu^2 allows none within an MLP.
    Of c_v's gradients the rotation mixes more than their mean squares tell; their mean over the head is kept.
    """
    state, terms = dict(state), dict(statistics.terms) if statistics else {}
    for block in block_names(state):
        gain, v, proj = (f"{block}attn.{end}" for end in ("q_gain", "c_v.weight", "proj.weight"))
        width = state[proj].shape[1] // state[gain].numel()
        groups = state[v].shape[0] // width
        turn = torch.zeros(groups, width, width, dtype=torch.float64)
        for g, head in enumerate(state[v].double().view(groups, width, -1)):
            q, r = torch.linalg.qr(head[:, :width])
            turn[g] = (q * r.diagonal().sign().where(r.diagonal() != 0, torch.ones(()))).T if head.shape[1] >= width else q.T
        both = torch.block_diag(*turn.repeat_interleave(state[gain].numel() // groups, 0))
        for name, value in ((v, torch.block_diag(*turn) @ state[v].double()), (proj, state[proj].double() @ both.T)):
            state[name] = value.to(state[name].dtype)
        if proj in terms:
            terms[proj] = tuple(replace(t, moment=(both @ t.moment.double() @ both.T).float()) for t in terms[proj])
            terms[v] = tuple(replace(t, rows=t.rows.view(groups, width).mean(1).repeat_interleave(width)) for t in terms[v])
    return state, replace(statistics, terms=terms) if statistics else None


def orderings(symmetry: Symmetry, codes: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Orders worth measuring: ascending mean |code| over all places, and over each of the two largest (a chain of nearest
    neighbours in L1 was never the smallest).
    """
    profiles = []
    for name, dim, positions in symmetry.places:
        if name in codes:
            matrix = codes[name].float() if dim == 0 else codes[name].float().T
            profiles.append(matrix[positions].reshape(symmetry.units, -1))
    if not profiles:
        return
    profiles.sort(key=lambda p: -p.shape[1])
    sizes = [p.abs().mean(1) for p in profiles]
    yield torch.stack([s * p.shape[1] for s, p in zip(sizes, profiles, strict=True)]).sum(0).argsort(stable=True)
    for size in sizes[:2]:
        yield size.argsort(stable=True)


def reordered(state: dict[str, Tensor], choices: Mapping[str, Choice], options: ExportOptions, judge: Judge
              ) -> tuple[dict[str, Tensor], Judge, dict[str, int]]:
    """State and judge in the order that EXPORT_PERMUTE finds for these choices, and the bytes saved by kind of symmetry."""
    gains: dict[str, int] = {}
    tensors = quantised(state, choices, options, judge)
    state, statistics = permuted(state, tensors, judge.statistics, options.export_permute, gains)
    return state, Judge(statistics, judge.sensitivity), gains


def permuted(state: Mapping[str, Tensor], tensors: Mapping[str, Stored], statistics: Statistics | None, mode: str,
             gains: dict[str, int]) -> tuple[dict[str, Tensor], Statistics | None]:
    """The state (and its statistics) in the order whose codes take the fewest bytes, symmetry by symmetry. `tensors` holds
    the codes of the given order; `gains` counts the bytes saved by kind of symmetry.
    """
    state, now = dict(state), {n: s for n, s in tensors.items() if s.row.codec == "int" and len(s.row.shape) == 2}
    for symmetry in find_symmetries(state, mode):
        touched = [name for name in dict.fromkeys(name for name, _, _ in symmetry.places) if name in now]
        codes = {name: torch.from_numpy(now[name].values["codes"]).view(now[name].row.shape) for name in touched}
        before = best = sum(coded_bytes(now[name]) for name in touched)
        chosen = None
        for order in orderings(symmetry, codes):
            moved = {name: moved_codes(symmetry, order, now[name]) for name in touched}
            nbytes = sum(map(coded_bytes, moved.values()))
            if nbytes < best:
                best, chosen = nbytes, (order, moved)
        gains[symmetry.kind] = gains.get(symmetry.kind, 0) + before - best
        if chosen is not None:
            order, moved = chosen
            now |= moved
            if statistics is not None:
                statistics = symmetry.apply_to_statistics(order, statistics, state)
            state = symmetry.apply(order, state)
    return state, statistics


def coded_bytes(stored: Stored) -> int:
    return len(pack_codes(stored, thorough=False)[2])


def moved_codes(symmetry: Symmetry, order: Tensor, stored: Stored) -> Stored:
    """Codes and scales of one tensor in the new order."""
    row = stored.row
    codes = stored.values["codes"].reshape(row.shape)
    scales = list(np.split(stored.values["scales"], [row.scale_counts[0]]))
    for place in symmetry.places:
        if place[0] == row.name:
            dim = place[1]
            index = symmetry.index(place, order, row.shape[dim]).numpy()
            codes = codes.take(index, axis=dim)
            scales[dim] = scales[dim][index] if scales[dim].size else scales[dim]
    return Stored(row, {"codes": codes.reshape(-1), "scales": np.concatenate(scales)})
