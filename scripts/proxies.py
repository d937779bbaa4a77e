"""How complex the artifact of the weights under way will be, and where its bytes will lie, without coding it.

Every proxy is a pure function of what an export holds before it is bytes: tensors quantised by the exporter's own
`quantize` (`uniform`, or `Export.tensors` of any plan, rd's included), and for some the weights themselves. Sizes of codes
are predicted; all else is small and goes through the exporter's own packing. scripts/validate_proxies.py compares each with
true bytes, ARTIFACT_EVERY logs them beside the true size. 17 million weights take 0.8 s on one core, a file of them 1.4 s.
"""
from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import export
from export import ExportOptions, Stored
from int8_plan import is_target

COARSE_BITS = 4             # of the grid that is there before its refinement
EXCEPTION_SIGMAS = 4.0      # root mean squares of its row beyond which a weight is an exception
EXCEPTION_BITS = 16         # of an exception's own value, fp16
BLOCK_SYMBOLS = 2**15 - 1   # of a deflate block at memory level 9; each has a Huffman code of its own
TABLE_BYTES, TABLE_SYMBOL_BYTES = 17.0, 0.29    # of a block's code lengths, by symbols held (normal codes, 8 to 251 held)
MATCH_FACTOR = 1.35         # of the entropy: what deflate's matches reach where most symbols are zero
UNSEEN = 2.0**-9            # symbols that the coder's prior grants what it leaves to the escape
LANE_BYTES = 3              # of each lane of the rANS coder, which say nothing
RD_SIDE_BYTES = 0.65                    # of steps and sizes, for each row and each column (2 and 36 million weights: 0.66)
BLOCK = re.compile(r"^blocks\.\d+\.")


@dataclass(frozen=True)
class Proxies:
    """All gauges of one set of weights. `_bits` are a weight of the tensors they speak of, None where there are none."""
    predicted_bytes: float              # the artifact
    code_bytes: float                   # its `codes`, or `positions`, which hold steps too
    metadata_bytes: float               # all the rest
    order0_bits: float | None           # entropy of the codes, a histogram for each tensor
    coarse_bits: float | None           # the same of codes of COARSE_BITS
    embedding_bits: float | None        # of tok_emb and lm_head
    early_projection_bits: float | None     # of mlp.proj and attn.proj in the first four blocks
    small_bits: float | None            # of what is stored as floats
    exceptions: int                     # weights beyond EXCEPTION_SIGMAS
    exception_families: int             # rows and columns of roles that hold them
    exception_bytes: float              # to tell which weights they are and what they are
    pair_saved_bits: float | None       # what pairs of neighbouring codes leave less than independent codes would


def measure(state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions,
            tensors: Mapping[str, Stored] | None = None) -> Proxies:
    """The proxies of `state` (name -> weight) as `tensors` hold it, by default under the uniform plan of `options`; `meta`
    is what encode_artifact would get.
    """
    tensors = uniform(state, options) if tensors is None else tensors
    meta = {**meta, "export": options.changed} if options.changed else meta
    coded = code_bytes(tensors)
    total, metadata = sum(coded.values()), metadata_bytes(tensors, meta, coded)
    rest: dict[str, Any] = {**code_entropies(state, tensors, options), **protected_bits(tensors, coded),
                            **exception_families(state, tensors), **pair_reuse(tensors)}
    return Proxies(total + metadata, total, metadata, **rest)


def uniform(state: Mapping[str, Tensor], options: ExportOptions) -> dict[str, Stored]:
    """What encode_artifact holds of the state under the uniform plan, before corrections."""
    ordered = {name: state[name] for name in sorted(state)}
    choices = {name: export.uniform_choice(name, t, options) for name, t in ordered.items()}
    return export.quantised(ordered, choices, options, export.Judge())


def with_integers(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, integers (rows, cols)) of the quantised tensors; what is no matrix is one row. Under a trellis the lowest bit
    of a position is known before, and left out.
    """
    for name, stored in tensors.items():
        row = stored.row
        if row.codec in ("int", "grid"):
            integers = stored.values["codes"] if row.codec == "int" else stored.values["positions"] >> (row.states > 0)
            yield name, integers.reshape(-1, row.shape[-1] if len(row.shape) == 2 else row.numel)


def entropy(counts: np.ndarray) -> float:
    """Bits of all symbols together under their own histogram (order 0)."""
    held = counts[counts > 0]
    return float(held @ np.log2(held.sum() / held))


def counts_of(integers: np.ndarray) -> np.ndarray:
    """How often each occurs, from the least on."""
    flat = integers.reshape(-1)
    return np.bincount(flat.view(np.uint8) if flat.dtype == np.int8 else flat - flat.min())


def mean(total: float, count: int) -> float | None:
    return total / count if count else None


# ----------------------------------------------------------------------------------------------------------------------
# Bytes: what the file's parts will take.
# ----------------------------------------------------------------------------------------------------------------------


def code_bytes(tensors: Mapping[str, Stored]) -> dict[str, float]:
    """Tensor -> bytes of its integers: of its stream `codes:NAME`, or its share of `positions`."""
    deflated = {name: deflated_bytes(codes.reshape(-1)) for name, codes in with_integers(tensors)
                if tensors[name].row.codec == "int"}
    return deflated | grid_bytes({name: s for name, s in tensors.items() if s.row.codec == "grid"})


def deflated_bytes(codes: np.ndarray) -> float:
    """What deflate makes of int8 codes (n,) in row order: a Huffman code a block, of several codes a symbol where they are
    small.
    """
    limit = int(np.abs(codes.astype(np.int16)).max())
    small = 1 <= limit <= export.MAX_RADIX_CODE
    symbols = export.to_digits(codes, limit) if small else codes.view(np.uint8)
    total = sum(block_bytes(np.bincount(symbols[at:at + BLOCK_SYMBOLS], minlength=256))
                for at in range(0, symbols.size, BLOCK_SYMBOLS))
    return min(total, float(codes.size))


def block_bytes(counts: np.ndarray) -> float:
    """A block of symbols (256,) counts, its table and its end mark included."""
    held = np.append(counts[counts > 0], 1)
    bits = min(huffman_bits(held), MATCH_FACTOR * entropy(held))
    return bits / 8 + TABLE_BYTES + TABLE_SYMBOL_BYTES * held.size


def huffman_bits(shares: np.ndarray) -> float:
    """Mean length of a Huffman code: the sum of the weights of its inner nodes."""
    heap = [float(share) for share in shares]
    heapq.heapify(heap)
    total = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, merged)
        total += merged
    return total


def grid_bytes(tensors: Mapping[str, Stored]) -> dict[str, float]:
    """Tensor -> bytes of its positions under the coder's contexts, adaptive from the coder's prior (the evidence of a
    Dirichlet prior is what an ideal adaptive code takes), and of its steps. Contexts know the columns' whole means, where
    the coder learns them row by row.
    """
    if not tensors:
        return {}
    doubled = int(max(s.row.states for s in tensors.values()) > 0)
    alpha = torch.from_numpy(np.maximum(export.SymbolModel(doubled).counts / export.COUNT, UNSEEN))
    counts, raw_bits = {}, {}
    for name, stored in tensors.items():
        contexts, symbols, raw = in_contexts(stored, doubled)
        counts[name] = torch.from_numpy(np.bincount(contexts * export.SYMBOLS + symbols, minlength=alpha.numel()))
        raw_bits[name] = float(raw.sum())
    after = torch.stack(list(counts.values())).sum(0).view(alpha.shape) + alpha
    joint = torch.lgamma(after.sum(1)) - torch.lgamma(alpha.sum(1)) - (torch.lgamma(after) - torch.lgamma(alpha)).sum(1)
    # A tensor pays by the final table, and by its weights for lanes and for what learning the table took.
    price = -(after / after.sum(1, keepdim=True)).log2().view(-1)
    own = {name: float(count.double() @ price) for name, count in counts.items()}
    weights = sum(s.row.numel for s in tensors.values())
    learning = float(joint.sum()) / math.log(2) - sum(own.values())
    shared = learning + 8 * LANE_BYTES * export.lanes_of(weights)
    return {name: (own[name] + raw_bits[name] + shared * s.row.numel / weights) / 8 + RD_SIDE_BYTES * sum(s.row.shape)
            for name, s in tensors.items()}


def in_contexts(stored: Stored, doubled: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(contexts, symbols, raw bits) of a grid matrix's positions, (n,) each."""
    values = {kind: v.astype(np.int64) for kind, v in stored.values.items()}
    positions = values["positions"].reshape(stored.row.shape)
    level = np.clip((values["row_sizes"] - values["row_steps"])[:, None] - values["col_steps"],
                    -export.FIXED_ONE, export.FIXED_ONE)
    learned = np.log2(np.maximum((np.abs(positions) * np.exp2(-level / export.OCTAVE)).mean(0), 2.0**-16))
    quarter = np.floor((level / export.OCTAVE + learned - export.LOWEST_OCTAVE) * 4)
    buckets = quarter.clip(0, export.BUCKETS - 1).astype(np.int64)
    parity, raw = positions & doubled, export.shifts(doubled)[buckets]
    symbols = export.split_codes((positions - parity) >> doubled, raw)
    raw = np.where(symbols == export.ESCAPE, export.ESCAPED_BITS, raw)
    return (2 * buckets + parity).reshape(-1), symbols.reshape(-1), raw


def metadata_bytes(tensors: Mapping[str, Stored], meta: Mapping[str, Any], coded: Mapping[str, float]) -> float:
    """What is neither codes nor positions: frame, header, scales, floats, raw tensors, corrections, index. All of it is
    packed as in the file; of the header only layouts and the lengths of `coded` streams are not the final ones.
    """
    plan = tuple(s.row for s in tensors.values())
    table, total = [], float(export.FIXED.size + export.CHECKSUM_BYTES)
    for stream in export.stream_counts(plan):
        kind, _, name = stream.partition(":")
        if kind == "codes":
            table.append((export.DEFLATE, round(coded[name])))
        elif kind == "positions":
            table.append((export.STORED, round(sum(coded[row.name] for row in plan if row.codec == "grid"))))
        else:
            method, body = export.pack_stream([s.values[kind] for s in tensors.values() if kind in s.values])
            table.append((method, len(body)))
            total += len(body)
    return total + len(export.deflate(export.pack_header(export.pack_meta(dict(meta)), plan, table)))


# ----------------------------------------------------------------------------------------------------------------------
# Bits: where the bytes of codes come from.
# ----------------------------------------------------------------------------------------------------------------------


def code_entropies(state: Mapping[str, Tensor], tensors: Mapping[str, Stored], options: ExportOptions
                   ) -> dict[str, float | None]:
    """order0_bits: what the integers take without contexts. coarse_bits: the same of int8 tensors in a file of COARSE_BITS.

    What a refinement from there would take is no gauge: without a floor it is log2 of the steps' ratio (4.17 of 4.18 bits)
    whatever the weights are, and ranked true refinements at a rho of -0.82.
    """
    order0, coarse, all_weights, int_weights = 0.0, 0.0, 0, 0
    q_max = 2 ** (COARSE_BITS - 1) - 1
    for name, integers in with_integers(tensors):
        order0, all_weights = order0 + entropy(counts_of(integers)), all_weights + integers.size
        if tensors[name].row.codec == "int":
            axis = tensors[name].row.axis
            codes = export.quantize(state[name].detach().cpu(), q_max, "row" if axis == "both" else axis, options)[0]
            coarse, int_weights = coarse + entropy(counts_of(codes.numpy())), int_weights + integers.size
    return {"order0_bits": mean(order0, all_weights), "coarse_bits": mean(coarse, int_weights)}


def protected_bits(tensors: Mapping[str, Stored], coded: Mapping[str, float]) -> dict[str, float | None]:
    """Bits a weight of what exporters spare, each under its own rule of storage; scales are left to metadata_bytes."""
    def of_codes(names: Iterable[str]) -> float | None:
        chosen = [name for name in names if name in coded]
        return mean(8 * sum(coded[name] for name in chosen), sum(tensors[name].row.numel for name in chosen))

    floats = [s for s in tensors.values() if s.row.codec in ("f16", "f32")]
    packed = sum(len(export.pack_stream([s.values[kind] for s in floats if kind in s.values])[1]) for kind in ("f16", "f32"))
    return {"embedding_bits": of_codes(export.EMBED_NAMES),
            "early_projection_bits": of_codes(name for name in tensors if is_target(name, "early_proj_combo")),
            "small_bits": mean(8 * packed, sum(s.row.numel for s in floats))}


# ----------------------------------------------------------------------------------------------------------------------
# Exceptions: a list of the weights that a coarse grid would miss.
# ----------------------------------------------------------------------------------------------------------------------


def exceptions_of(w: Tensor) -> Tensor:
    """Which weights (rows, cols) lie beyond EXCEPTION_SIGMAS root mean squares of their row."""
    w = w.detach().cpu().float()
    return w.abs() > EXCEPTION_SIGMAS * w.square().mean(1, keepdim=True).sqrt()


def exception_families(state: Mapping[str, Tensor], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Exceptions of the quantised matrices, the families that hold them, and the bytes to tell them. A family is a row, or
    a column, of all the layers' matrices of a role. Each role tells its exceptions by rows or by columns, whichever is
    shorter: which families there are, which of their weights are exceptions, and the values.
    """
    roles: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    for name, stored in tensors.items():
        if stored.row.codec in ("int", "grid") and len(stored.row.shape) == 2:
            roles.setdefault((BLOCK.sub("", name), stored.row.shape), []).append(exceptions_of(state[name]))
    count, families, bits = 0, 0, 0.0
    for masks in roles.values():
        hits = torch.stack(masks)                                       # (layers, rows, cols)
        found, ways = int(hits.sum()), []
        for dim, other in ((1, 2), (2, 1)):
            groups, held = hits.shape[dim], int(hits.any(other).any(0).sum())
            ways.append(1 + told(held, groups) + told(found, held * hits.numel() // groups))
            families += held
        count, bits = count + found, bits + min(ways) + EXCEPTION_BITS * found
    return {"exceptions": count, "exception_families": families, "exception_bytes": bits / 8}


def told(count: int, places: int) -> float:
    """Bits that name a subset: its size (Elias 1975, gamma code of count + 1) and its number among all of that size."""
    choices = math.lgamma(places + 1) - math.lgamma(count + 1) - math.lgamma(places - count + 1)
    return 2 * math.floor(math.log2(count + 1)) + 1 + choices / math.log(2)


# ----------------------------------------------------------------------------------------------------------------------
# Codebook: do neighbouring codes come in the same pairs again?
# ----------------------------------------------------------------------------------------------------------------------

def pair_reuse(tensors: Mapping[str, Stored]) -> dict[str, float | None]:
    """Bits a weight that a codebook of pairs (columns 2k and 2k + 1 of a row) could save: how far the collision entropy
    (Renyi 1961, order 2) of a pair, halved, lies below that of a code, the mean over tensors by weights. Neither depends
    on how many pairs there are, as a share of distinct pairs does, which ranked code bytes over shapes at a rho of 0.58
    (the pairs' collision entropy itself: 0.92); neither coder of the exporter uses pairs.
    """
    saved, weights = 0.0, 0
    for _, integers in with_integers(tensors):
        pairs = integers[:, :integers.shape[1] // 2 * 2].clip(-128, 127).astype(np.uint8).reshape(-1, 2).astype(np.intp)
        if len(pairs) > 1:
            alone = collision_bits(np.bincount(pairs.reshape(-1)))
            saved += (alone - collision_bits(np.bincount(pairs[:, 0] * 256 + pairs[:, 1])) / 2) * pairs.size
            weights += pairs.size
    return {"pair_saved_bits": mean(saved, weights)}


def collision_bits(counts: np.ndarray) -> float:
    """-log2 of the chance that two of the symbols are alike, without bias; at least one coincidence is taken for granted."""
    held, n = counts[counts > 0].astype(float), int(counts.sum())
    return math.log2(n * (n - 1) / max(2.0, float(held @ (held - 1))))
