"""Tensors to bytes and back: plan, quantise, deflate, one checked file.

    python export.py write final_model.pt -o final_model.int8.ptz    # wrote:final_model.int8.ptz total_bytes:... ...
    python export.py inspect final_model.int8.ptz                    # the plan and the bytes of every part
    python export.py eval final_model.int8.ptz --data DIR --tokenizer MODEL
    python export.py verify final_model.int8.ptz final_model.pt      # exit 1 unless equal bit for bit

The file format, version 1. Integers and floats are little-endian; sections touch without gaps.

    offset    bytes  field
    0         4      magic, "ANLM"
    4         1      version, 1
    5         3      reserved, zero
    8         4      file_bytes, the length of the whole file
    12        4      header_raw_bytes, 1..1,048,576
    16        4      header_coded_bytes, at least 1
    20        ...    header, a raw deflate stream (RFC 1951)
    ...       ...    the streams, back to back in the order of the header's table
    end - 8   8      checksum, BLAKE2b-64 of every byte before it

The inflated header:

    bytes     field
    4         meta_bytes, then so many bytes of meta: a JSON object, ASCII, keys sorted, no spaces, no NaN or infinity,
              integers of at most 40 digits
    4         scale_floor, fp32 in 0..1: what `verify` needs to quantise a checkpoint again
    2         rows, 0..4096, then so many plan rows, strictly ascending by name:
      1         name_bytes, 1..255, then the name: printable ASCII
      1         dtype the tensor gets back: 0 float32, 1 float16, 2 bfloat16, 3 float64, 4 uint8, 5 int8, 6 int16,
                7 int32, 8 int64, 9 bool
      1         codec: 0 int, 1 f16, 2 f32 (for float dtypes), 3 raw (for all others)
      1         bits: int 2..8, f16 16, f32 32, raw 8 per byte of the dtype
      1         ndim, 0..8
      1         axis: 0 = a scale per row, 1 = a scale per column (int matrices only); an int tensor which is no
                matrix is one row
      4 each    dims, at least 1
    5 each    the table, one entry per stream: method u8 (0 stored, 1 raw deflate), coded_bytes u32

Streams, in this order: `codes` of each int tensor (int8 in [-q_max, q_max], q_max = 2^(bits-1) - 1); then four that
all tensors share in plan order: `scales` (fp16, finite, above zero), `f16`, `f32`, `raw` (bool bytes are 0 or 1).
Their raw lengths follow from the plan; an empty stream is stored. Values of two and four bytes lie as byte planes: all
first bytes, then all second bytes, and so on. A weight is code x scale in fp32, cast to its dtype. Floats are finite.

A reader rejects, as ArtifactError, whatever breaks a line above, and: tensors beyond 2^30 bytes in all, a raw length
above 1032 x the coded one (deflate's limit), a deflate stream that ends before or after its raw length or its coded
bytes, bytes left over anywhere. Lengths are bounded before anything is allocated. Offsets count from the start of the
file; those of fields named `header.*` from the start of the inflated header.
"""
from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import heapq
import io
import json
import lzma
import math
import os
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

MAGIC, VERSION = b"ANLM", 1
FIXED = struct.Struct("<4sB3sIII")      # magic, version, reserved, file_bytes, header_raw_bytes, header_coded_bytes
CHECKSUM_BYTES = 8
MAX_RAW_BYTES = 2**30                   # of all tensors of a file together, as stored or as restored
MAX_HEADER_BYTES = 2**20
MAX_INT_DIGITS = 40                     # in meta; longer ones take old Pythons quadratic time to parse
MAX_TENSORS, MAX_NDIM = 4096, 8
MAX_DEFLATE_RATIO = 1032                # 258 bytes for two bits, the most that deflate can say
STORED, DEFLATE = 0, 1

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "uint8": 1, "int8": 1, "int16": 2, "int32": 4,
          "int64": 8, "bool": 1}        # name -> bytes; the order is the file's enumeration
FLOATS = ("float32", "float16", "bfloat16", "float64")
CODECS = ("int", "f16", "f32", "raw")
AXES = ("row", "col")
STREAM_TYPES = {"codes": "i1", "scales": "<f2", "f16": "<f2", "f32": "<f4", "raw": "u1"}

CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight")   # substrings; these stay fp32
EMBED_NAMES = ("tok_emb.weight", "lm_head.weight")
KEEP_FLOAT_MAX_NUMEL = 65_536           # float tensors up to this size are kept as fp16
CLIP_QUANTILE = 0.9999984               # of |w| in a row, the baseline's: next to the largest below 600,000 weights


class ArtifactError(ValueError):
    """A file or state that cannot be an artifact; the offset is None where there are no bytes yet."""

    def __init__(self, field: str, offset: int | None, found: object, expected: object) -> None:
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"artifact: {field}{where}: found {found}, expected {expected}")
        self.field, self.offset, self.found, self.expected = field, offset, found, expected


def require(holds: bool | np.bool_, field: str, offset: int | None, found: object, expected: object) -> None:
    if not holds:
        raise ArtifactError(field, offset, found, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Plan: how each tensor is stored, decided once, written into the header, never derived again from a name.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportOptions:
    """What the exporter may choose."""
    axis_mode: str = "row"          # row | col | auto: per tensor the axis with the smaller squared error
    scale_floor: float = 1 / 127    # smallest quantisation step, the baseline's; 0 = none, which is scale-invariant
    weight_bits: int = 8            # 2..8 = integer codes, 16 = fp16
    embed_bits: int = 8             # the same for tok_emb.weight and lm_head.weight

    def problems(self) -> list[str]:
        """One message per fault: the knob, the value wanted, the value found."""
        widths = (*range(2, 9), 16)
        return [text for wrong, text in (
            (self.axis_mode not in (*AXES, "auto"), f"INT8_AXIS_MODE must be row, col or auto, got {self.axis_mode!r}"),
            (not 0 <= self.scale_floor <= 1, f"INT8_SCALE_FLOOR must be in 0..1, got {self.scale_floor}"),
            (self.weight_bits not in widths, f"WEIGHT_QUANTIZATION_BITS must be 2..8 or 16, got {self.weight_bits}"),
            (self.embed_bits not in widths, f"EMBED_QUANTIZATION_BITS must be 2..8 or 16, got {self.embed_bits}"),
        ) if wrong]


@dataclass(frozen=True)
class PlanRow:
    """How one tensor is stored."""
    name: str
    shape: tuple[int, ...]
    dtype: str      # what the state had and gets back
    codec: str      # one of CODECS
    bits: int       # per value before entropy coding
    axis: str       # which slices of an int matrix own a scale; "row" for everything else

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def counts(self) -> dict[str, int]:
        """Kind of stream -> how many of its values this tensor takes."""
        if self.codec == "int":
            n_scales = self.shape[AXES.index(self.axis)] if len(self.shape) == 2 else 1
            return {"codes": self.numel, "scales": n_scales}
        return {self.codec: self.numel * (DTYPES[self.dtype] if self.codec == "raw" else 1)}

    @property
    def raw_bytes(self) -> int:
        """What this tensor takes in memory, as stored or as restored, whichever is more."""
        stored = sum(n * np.dtype(STREAM_TYPES[kind]).itemsize for kind, n in self.counts.items())
        return max(stored, self.numel * DTYPES[self.dtype])


def make_plan(state: Mapping[str, Tensor], options: ExportOptions) -> tuple[PlanRow, ...]:
    """One row per tensor, ascending by name whatever the order of the dict."""
    if faults := options.problems():
        raise ValueError("; ".join(faults))
    return tuple(plan_row(name, state[name], options) for name in sorted(state))


def plan_row(name: str, tensor: Tensor, options: ExportOptions) -> PlanRow:
    """Decide one row; a tensor that the format cannot hold is refused here."""
    dtype, shape, axis = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), options.axis_mode
    require(is_name(name), f"tensor {name!a}", None, f"{len(name)} characters", "a name of 1..255 printable ASCII ones")
    dense = dtype in DTYPES and tensor.layout == torch.strided
    require(dense, f"tensor {name}", None, f"{dtype} {tensor.layout}", f"dense {', '.join(DTYPES)}")
    sized = len(shape) <= MAX_NDIM and tensor.numel() > 0
    require(sized, f"tensor {name}", None, f"shape {shape}", f"at most {MAX_NDIM} dims, none of them 0")
    codec, bits = storage(name, tensor.numel(), dtype, options)
    if codec != "int" or len(shape) != 2:
        axis = "row"
    elif axis == "auto":
        axis = better_axis(tensor, bits, options.scale_floor)
    return PlanRow(name, shape, dtype, codec, bits, axis)


def is_name(name: str) -> bool:
    """What a file may hold as a name, and `inspect` print on any terminal."""
    return 1 <= len(name) <= 255 and name.isascii() and name.isprintable()


def storage(name: str, numel: int, dtype: str, options: ExportOptions) -> tuple[str, int]:
    """Codec and bits of a tensor, by the baseline's rule."""
    if dtype not in FLOATS:
        return "raw", 8 * DTYPES[dtype]
    if any(part in name for part in CONTROL_NAMES):
        return "f32", 32
    bits = options.embed_bits if name in EMBED_NAMES else options.weight_bits
    return ("f16", 16) if numel <= KEEP_FLOAT_MAX_NUMEL or bits == 16 else ("int", bits)


def better_axis(w: Tensor, bits: int, floor: float) -> str:
    """The axis whose rounding loses less; rows win ties, which the order of summation must not decide."""
    row_loss, col_loss = (
        sum_squares(w.double() - dequantize(*quantize(w, bits, axis, floor), axis)) for axis in AXES)
    return "col" if col_loss < row_loss * (1 - 1e-9) else "row"


def stream_of(kind: str, row: PlanRow) -> str:
    """Codes have a stream per tensor, so that each gets its own code lengths; everything else is shared."""
    return f"codes:{row.name}" if kind == "codes" else kind


def stream_counts(plan: Sequence[PlanRow]) -> dict[str, int]:
    """Stream -> number of values, in the order of the file."""
    counts = {stream_of("codes", row): row.numel for row in plan if row.codec == "int"}
    for kind in ("scales", "f16", "f32", "raw"):
        counts[kind] = sum(row.counts.get(kind, 0) for row in plan)
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# Quantise: one symmetric uniform grid, shared by the training simulation, the writer and the reader.
# ----------------------------------------------------------------------------------------------------------------------


def quantize(w: Tensor, bits: int, axis: str, floor: float) -> tuple[Tensor, Tensor]:
    """Round w to int8 codes in [-q_max, q_max]; the fp16 scales, one per row or per column, are those of the file."""
    q_max = 2 ** (bits - 1) - 1
    rows = as_rows(w.float(), axis)                             # (slices that own a scale, their weights)
    clip = clip_magnitude(rows)
    scale = stored_scale(clip, q_max, floor)
    clipped = torch.maximum(torch.minimum(rows, clip[:, None]), -clip[:, None])
    codes = (clipped / scale.float()[:, None]).round().clamp(-q_max, q_max).to(torch.int8)
    return as_rows(codes, axis).contiguous().view(w.shape), scale


def dequantize(codes: Tensor, scale: Tensor, axis: str) -> Tensor:
    """Code x scale in fp32; each product is rounded once, so every machine gets the same bits."""
    if codes.ndim != 2:
        return codes.float() * scale.float().reshape(())
    return codes.float() * scale.float().unsqueeze(1 if axis == "row" else 0)


def as_rows(w: Tensor, axis: str) -> Tensor:
    """w as a matrix with one scale per row, its own inverse for matrices; whatever is no matrix is a single row."""
    if w.ndim != 2:
        return w.reshape(1, -1)
    return w if axis == "row" else w.T


def clip_magnitude(rows: Tensor) -> Tensor:
    """CLIP_QUANTILE of |w| per row: torch.quantile's value, fp32 rank included, without its sort and its size limit."""
    n = rows.shape[1]
    rank = float(np.float32(CLIP_QUANTILE) * np.float32(n - 1))
    below, weight = int(rank), rank - int(rank)
    top = torch.topk(rows.abs(), n - below, dim=1).values       # descending; the last one has the rank `below`
    low, high = top[:, -1], top[:, max(n - below - 2, 0)]
    # Two roundings on purpose: lerp may fuse them on one machine and not on another.
    return high - (high - low) * (1 - weight) if weight >= 0.5 else low + (high - low) * weight


def stored_scale(clip: Tensor, q_max: int, floor: float) -> Tensor:
    """The step that maps clip to q_max, as the fp16 of the file; never zero, and wide enough to reach the clip."""
    scale = (clip / q_max).clamp_min(floor).half().clamp_min(2**-24)    # the least positive fp16, for all-zero rows
    # Below 2^-14 fp16 has few digits: a step rounded down by half a code or more at the clip becomes the next one up.
    short = (clip > (q_max + 0.5) * scale.float()) & scale.isfinite()
    return torch.where(short, (scale.view(torch.int16) + 1).view(torch.half), scale)


def sum_squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def store(row: PlanRow, tensor: Tensor, floor: float) -> dict[str, np.ndarray]:
    """The values of one tensor, by kind of stream."""
    tensor = tensor.detach().cpu().contiguous()
    require(bool(tensor.isfinite().all()), f"tensor {row.name}", None, "a value that is not finite", "finite values")
    if row.codec == "raw":
        return {"raw": tensor.reshape(-1).numpy().view("u1")}
    if row.codec == "int":
        values = dict(zip(("codes", "scales"), quantize(tensor, row.bits, row.axis, floor), strict=True))
    else:
        values = {row.codec: tensor.half() if row.codec == "f16" else tensor.float()}
    return {kind: value.reshape(-1).numpy() for kind, value in values.items()}


def restore(row: PlanRow, values: Mapping[str, np.ndarray]) -> Tensor:
    """The tensor that a reader gets; the writer takes its error figures from here too."""
    if row.codec == "raw":
        return torch.from_numpy(np.frombuffer(values["raw"].tobytes(), row.dtype).copy()).view(row.shape)
    parts = {kind: torch.from_numpy(array) for kind, array in values.items()}
    if row.codec == "int":
        tensor = dequantize(parts["codes"].view(row.shape), parts["scales"], row.axis)
    else:
        tensor = parts[row.codec].view(row.shape)
    return tensor.to(getattr(torch, row.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Entropy coding: byte planes and deflate, the smallest of a few strategies.
# ----------------------------------------------------------------------------------------------------------------------

# Measured on int8 codes of normal weights, above their order-0 entropy: Huffman-only 0.6 % at 7.4 bits a code and 1.5 %
# at 3.2, where level 9 has 0.9 and 16.5 %. Filtered wins where zeros come in runs, the default on header and scales.
STRATEGIES = (zlib_ng.Z_HUFFMAN_ONLY, zlib_ng.Z_FILTERED, zlib_ng.Z_DEFAULT_STRATEGY)
MAX_DEFAULT_STRATEGY_BYTES = 2**16      # beyond, filtered is as good within 0.2 %; trying both takes twice as long


def to_planes(values: np.ndarray) -> bytes:
    """All first bytes, then all second bytes, ...: exponents beside exponents (after deflate fp16 -8 %, fp32 -10 %)."""
    assert sys.byteorder == "little", "numpy's and torch's native values are written as they are"
    return values.view("u1").reshape(-1, values.itemsize).T.tobytes()


def from_planes(raw: bytes, dtype: str) -> np.ndarray:
    return np.frombuffer(raw, "u1").reshape(np.dtype(dtype).itemsize, -1).T.copy().reshape(-1).view(dtype)


def deflate(raw: bytes) -> bytes:
    """The smallest raw deflate stream; memory level 9 halves the number of Huffman tables (-0.2 % on int8 codes)."""
    tries = []
    for strategy in STRATEGIES if len(raw) <= MAX_DEFAULT_STRATEGY_BYTES else STRATEGIES[:-1]:
        packer = zlib_ng.compressobj(9, zlib_ng.DEFLATED, -zlib_ng.MAX_WBITS, 9, strategy)
        tries.append(packer.compress(raw) + packer.flush())
    return min(tries, key=len)


def inflate(coded: bytes, raw_bytes: int, field: str, offset: int) -> bytes:
    """Exactly raw_bytes from exactly these bytes; never allocates more than that."""
    unpacker, wanted = zlib_ng.decompressobj(-zlib_ng.MAX_WBITS), f"a deflate stream of {raw_bytes} bytes"
    try:
        raw = unpacker.decompress(coded, raw_bytes + 1)     # one more, so that the end mark is reached and seen
    except zlib_ng.error as fault:  # pyright: ignore[reportGeneralTypeIssues]  (typed as an instance in its stub)
        raise ArtifactError(field, offset, str(fault), wanted) from None
    require(len(raw) <= raw_bytes, field, offset, "more bytes", wanted)
    require(unpacker.eof, field, offset, f"{len(raw)} bytes without an end", wanted)
    require(len(raw) == raw_bytes, field, offset, f"{len(raw)} bytes", wanted)
    rest = len(unpacker.unused_data)
    require(rest == 0, field, offset + len(coded) - rest, f"{rest} bytes after the deflate stream", "none")
    return raw


# ----------------------------------------------------------------------------------------------------------------------
# Container: header and frame, writer and reader side by side in the order of the docstring.
# ----------------------------------------------------------------------------------------------------------------------


class Cursor:
    """Takes the fields of the inflated header in order; a fault names the field and the byte where it starts."""

    def __init__(self, block: bytes) -> None:
        self.block, self.at = block, 0

    def take(self, size: int, field: str) -> bytes:
        left = len(self.block) - self.at
        require(size <= left, field, self.at, f"{left} bytes left", f"{size} bytes")
        self.at += size
        return self.block[self.at - size:self.at]

    def number(self, fmt: str, field: str, low: float, high: float) -> Any:
        start = self.at
        value, = struct.unpack(fmt, self.take(struct.calcsize(fmt), field))
        require(low <= value <= high, field, start, value, f"{low}..{high}" if low < high else low)
        return value


def pack_meta(meta: Any, field: str = "meta", offset: int | None = None) -> bytes:
    """Canonical JSON: equal dicts give equal bytes."""
    require(isinstance(meta, dict), field, offset, f"a {type(meta).__name__}", "a JSON object")
    try:
        return json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as fault:
        raise ArtifactError(field, offset, f"{type(fault).__name__} ({fault})", "a JSON object") from None


def parse_meta(text: bytes, field: str, offset: int | None) -> dict[str, Any]:
    """A JSON object of finite numbers; whatever else the parser accepts or raises ends here."""
    def bounded_int(digits: str) -> int:
        if len(digits) > MAX_INT_DIGITS:
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    try:
        meta = json.loads(text.decode("utf-8"), parse_int=bounded_int)
    except (ValueError, RecursionError) as fault:
        raise ArtifactError(field, offset, f"{type(fault).__name__} ({fault})", "a JSON object") from None
    pack_meta(meta, field, offset)      # refuses NaN and infinity
    return meta


def pack_header(meta: bytes, scale_floor: float, plan: tuple[PlanRow, ...], table: Iterable[tuple[int, int]]) -> bytes:
    """The header before deflate; the table holds (method, coded bytes) of each stream."""
    parts = [struct.pack("<I", len(meta)), meta, struct.pack("<fH", scale_floor, len(plan))]
    for row in plan:
        name, ndim = row.name.encode("ascii"), len(row.shape)
        kinds = (list(DTYPES).index(row.dtype), CODECS.index(row.codec), row.bits, ndim, AXES.index(row.axis))
        parts += [struct.pack("B", len(name)), name, struct.pack(f"<5B{ndim}I", *kinds, *row.shape)]
    return b"".join(parts + [struct.pack("<BI", *entry) for entry in table])


def parse_header(raw: bytes) -> tuple[dict[str, Any], float, tuple[PlanRow, ...], list[tuple[int, int]]]:
    """(meta, scale_floor, plan, table): every field bounded, nothing left over."""
    cursor = Cursor(raw)
    text = cursor.take(cursor.number("<I", "header.meta_bytes", 2, MAX_HEADER_BYTES), "header.meta")
    meta = parse_meta(text, "header.meta", 4)
    require(pack_meta(meta) == text, "header.meta", 4, "another spelling", "canonical JSON")
    scale_floor = cursor.number("<f", "header.scale_floor", 0.0, 1.0)
    plan: list[PlanRow] = []
    for i in range(cursor.number("<H", "header.rows", 0, MAX_TENSORS)):
        plan.append(parse_row(cursor, f"header.row[{i}]", plan[-1].name if plan else ""))
    check_total(plan, cursor.at)
    table = [(cursor.number("B", f"header.table[{stream}].method", STORED, DEFLATE),
              cursor.number("<I", f"header.table[{stream}].coded_bytes", 0, 2**32 - 1))
             for stream in stream_counts(plan)]
    require(cursor.at == len(raw), "header", cursor.at, f"{len(raw) - cursor.at} bytes after its last field", "none")
    return meta, scale_floor, tuple(plan), table


def parse_row(cursor: Cursor, field: str, previous_name: str) -> PlanRow:
    size = cursor.number("B", f"{field}.name_bytes", 1, 255)
    start, name = cursor.at, cursor.take(size, f"{field}.name").decode("latin-1")
    require(is_name(name), f"{field}.name", start, ascii(name), "printable ASCII")
    require(name > previous_name, f"{field}.name", start, ascii(name), f"a name after {previous_name!a}")
    dtype = tuple(DTYPES)[cursor.number("B", f"{field}.dtype", 0, len(DTYPES) - 1)]
    codec = CODECS[cursor.number("B", f"{field}.codec", *((0, 2) if dtype in FLOATS else (3, 3)))]
    low, high = {"int": (2, 8), "f16": (16, 16), "f32": (32, 32), "raw": (8 * DTYPES[dtype],) * 2}[codec]
    bits = cursor.number("B", f"{field}.bits", low, high)
    ndim = cursor.number("B", f"{field}.ndim", 0, MAX_NDIM)
    axis = AXES[cursor.number("B", f"{field}.axis", 0, 1 if codec == "int" and ndim == 2 else 0)]
    shape = tuple(cursor.number("<I", f"{field}.dims[{d}]", 1, MAX_RAW_BYTES) for d in range(ndim))
    return PlanRow(name, shape, dtype, codec, bits, axis)


def check_total(plan: Iterable[PlanRow], offset: int | None) -> None:
    total = sum(row.raw_bytes for row in plan)
    require(total <= MAX_RAW_BYTES, "bytes of all tensors", offset, total, f"at most {MAX_RAW_BYTES}")


def frame(header: bytes, streams: Iterable[bytes]) -> tuple[bytes, int]:
    """(the file, the coded length of its header)."""
    require(len(header) <= MAX_HEADER_BYTES, "header_raw_bytes", None, len(header), f"at most {MAX_HEADER_BYTES}")
    coded = deflate(header)
    body = b"".join((coded, *streams))
    data = FIXED.pack(MAGIC, VERSION, bytes(3), FIXED.size + len(body) + CHECKSUM_BYTES, len(header), len(coded)) + body
    return data + hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest(), len(coded)


def unframe(data: bytes) -> tuple[bytes, int]:
    """(the inflated header, where the streams start), once length and checksum agree."""
    require(data[:4] == MAGIC, "magic", 0, data[:4], MAGIC)
    shortest = FIXED.size + CHECKSUM_BYTES
    require(len(data) >= shortest, "file", len(data), "its end", f"at least {shortest} bytes")
    _, version, reserved, file_bytes, raw_bytes, coded_bytes = FIXED.unpack_from(data)
    require(version == VERSION, "version", 4, version, VERSION)
    require(reserved == bytes(3), "reserved", 5, reserved, bytes(3))
    require(len(data) >= file_bytes, "file", len(data), "its end", f"{file_bytes} bytes")
    require(len(data) == file_bytes, "file", file_bytes, f"{len(data) - file_bytes} more bytes", "its end")
    end = file_bytes - CHECKSUM_BYTES
    checksum = hashlib.blake2b(memoryview(data)[:end], digest_size=CHECKSUM_BYTES).digest()
    require(data[end:] == checksum, "checksum", end, data[end:].hex(), checksum.hex())
    room, start = end - FIXED.size, FIXED.size + coded_bytes
    most = min(MAX_HEADER_BYTES, MAX_DEFLATE_RATIO * coded_bytes)
    require(1 <= raw_bytes <= most, "header_raw_bytes", 12, raw_bytes, f"1..{most} for {coded_bytes} coded bytes")
    require(coded_bytes <= room, "header_coded_bytes", 16, coded_bytes, f"at most {room}")
    return inflate(data[FIXED.size:start], raw_bytes, "header", FIXED.size), start


def pack_stream(arrays: list[np.ndarray]) -> tuple[int, bytes]:
    """(method, coded bytes) of a stream."""
    raw = to_planes(np.concatenate(arrays)) if arrays else b""
    coded = deflate(raw)
    return (DEFLATE, coded) if len(coded) < len(raw) else (STORED, raw)


def parse_stream(body: bytes, method: int, stream: str, count: int, offset: int) -> np.ndarray:
    """The values of one stream."""
    dtype = STREAM_TYPES[stream.partition(":")[0]]
    raw_bytes, most = count * np.dtype(dtype).itemsize, MAX_DEFLATE_RATIO * len(body)
    if method == STORED:
        require(len(body) == raw_bytes, stream, offset, f"{len(body)} stored bytes", raw_bytes)
        return from_planes(body, dtype)
    require(1 <= raw_bytes <= most, stream, offset, f"{raw_bytes} bytes in {len(body)} deflated", f"1..{most}")
    return from_planes(inflate(body, raw_bytes, stream, offset), dtype)


def parse_tensor(row: PlanRow, values: Mapping[str, np.ndarray], offsets: Mapping[str, int]) -> Tensor:
    """Restore one tensor from streams that may say anything."""
    if row.codec == "int":
        low, high, q_max = int(values["codes"].min()), int(values["codes"].max()), 2 ** (row.bits - 1) - 1
        stream, scales = stream_of("codes", row), values["scales"]
        require(-q_max <= low and high <= q_max, stream, offsets[stream], f"{low}..{high}", f"{-q_max}..{q_max}")
        sound = (np.isfinite(scales) & (scales > 0)).all()
        require(sound, f"scales of {row.name}", offsets["scales"], f"{scales.min()}..{scales.max()}", "finite, above 0")
    if row.dtype == "bool":
        high = int(values["raw"].max())
        require(high <= 1, f"raw of {row.name}", offsets["raw"], high, "0 or 1")
    tensor = restore(row, values)
    stream = stream_of(next(iter(values)), row)
    require(bool(tensor.isfinite().all()), f"values of {row.name}", offsets[stream], "one not finite", "finite values")
    return tensor


# ----------------------------------------------------------------------------------------------------------------------
# Save, load, report: whole states, and where the bytes went.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeReport:
    """What an export cost and lost."""
    total_bytes: int
    parts: dict[str, int]       # in the order of the file, summing exactly to total_bytes
    weights: int                # elements of all tensors
    floored_share: float        # of the quantised weights: those whose step sits at scale_floor
    rms_error: float            # of the quantised weights, relative to their own rms

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / max(self.weights, 1)


@dataclass
class Artifact:
    meta: dict[str, Any]
    plan: tuple[PlanRow, ...]
    state: dict[str, Tensor]
    parts: dict[str, int]       # in the order of the file, summing exactly to its length
    scale_floor: float          # of the quantiser that made it, for `verify`


def encode_artifact(
    state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions
) -> tuple[bytes, SizeReport]:
    """The bytes of the file, and what they cost and lose."""
    return encode_plan(state, meta, make_plan(state, options), options.scale_floor)


def encode_plan(
    state: Mapping[str, Tensor], meta: Mapping[str, Any], plan: tuple[PlanRow, ...], scale_floor: float
) -> tuple[bytes, SizeReport]:
    """Carry out a plan, whoever made it."""
    assert [row.name for row in plan] == sorted(state), "the plan's rows are exactly the state's tensors"
    require(len(plan) <= MAX_TENSORS, "state", None, f"{len(plan)} tensors", f"at most {MAX_TENSORS}")
    check_total(plan, None)
    arrays: dict[str, list[np.ndarray]] = {stream: [] for stream in stream_counts(plan)}
    quantised, floored, error, energy = 0, 0.0, 0.0, 0.0
    for row in plan:
        stored, w = store(row, state[row.name], scale_floor), state[row.name].detach().cpu()
        restored = restore(row, stored)
        if not bool(restored.isfinite().all()):
            peak = float(w.double().abs().max())
            raise ArtifactError(f"tensor {row.name}", None, f"magnitudes up to {peak:g}", f"what {row.codec} can hold")
        for kind, values in stored.items():
            arrays[stream_of(kind, row)].append(values)
        if row.codec == "int":
            at_floor = float((stored["scales"] <= np.float16(scale_floor)).mean())
            quantised, floored = quantised + row.numel, floored + row.numel * at_floor
            error, energy = error + sum_squares(w.double() - restored), energy + sum_squares(w)
    methods, bodies = zip(*map(pack_stream, arrays.values()), strict=True)
    table = list(zip(methods, map(len, bodies), strict=True))
    data, header_bytes = frame(pack_header(pack_meta(dict(meta)), scale_floor, plan, table), bodies)
    parts = part_bytes(header_bytes, arrays, table)
    assert sum(parts.values()) == len(data)
    rms_error = math.sqrt(error / energy) if energy else 0.0
    return data, SizeReport(len(data), parts, sum(row.numel for row in plan), floored / max(quantised, 1), rms_error)


def part_bytes(header_bytes: int, streams: Iterable[str], table: Iterable[tuple[int, int]]) -> dict[str, int]:
    coded = {stream: coded_bytes for stream, (_, coded_bytes) in zip(streams, table, strict=True)}
    return {"frame": FIXED.size, "header": header_bytes, **coded, "checksum": CHECKSUM_BYTES}


def decode_artifact(data: bytes) -> Artifact:
    """The state, bit for bit as the encoder reconstructed it."""
    raw_header, start = unframe(data)
    meta, scale_floor, plan, table = parse_header(raw_header)
    counts, end = stream_counts(plan), len(data) - CHECKSUM_BYTES
    total = sum(coded_bytes for _, coded_bytes in table)
    require(start + total == end, "streams", start, f"{total} bytes in the table", f"{end - start} up to the checksum")
    values, offsets, at = {}, {}, start
    for (stream, count), (method, coded_bytes) in zip(counts.items(), table, strict=True):
        values[stream] = parse_stream(data[at:at + coded_bytes], method, stream, count, at)
        offsets[stream], at = at, at + coded_bytes
    used, state = dict.fromkeys(counts, 0), {}
    for row in plan:
        own = {}
        for kind, count in row.counts.items():
            stream = stream_of(kind, row)
            own[kind] = values[stream][used[stream]:used[stream] + count]
            used[stream] += count
        state[row.name] = parse_tensor(row, own, offsets)
    assert used == counts
    return Artifact(meta, plan, state, part_bytes(start - FIXED.size, counts, table), scale_floor)


def save_artifact(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions
) -> SizeReport:
    """Write the file, whole or not at all."""
    data, report = encode_artifact(state, meta, options)
    write_atomically(Path(path), data)
    return report


def write_atomically(path: Path, data: bytes) -> None:
    """The file holds all of `data` or is what it was: temporary name, flush to disk, rename."""
    temporary = path.with_name(path.name + ".tmp")   # a killed write is overwritten by the next
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and check a file."""
    size, most = os.stat(path).st_size, MAX_RAW_BYTES + MAX_HEADER_BYTES + FIXED.size + CHECKSUM_BYTES
    require(size <= most, "file", 0, f"{size} bytes", f"at most {most}")
    return decode_artifact(Path(path).read_bytes())


def predict_artifact_bytes(shapes: Mapping[str, tuple[int, ...]], options: ExportOptions) -> int:
    """The size of a trained model's artifact from its shapes alone, within 2 %.

    It assumes normal weights with one sigma per row and a step that each row's largest weight sets, fp32 tensors, and
    meta of some 400 bytes; `auto` counts as rows. Under a floor other than 0 an undertrained model comes out smaller,
    because the floor and not the largest weight sets its steps.
    """
    total = FIXED.size + CHECKSUM_BYTES + 500.0                 # 500: meta and the rest of the deflated header
    for name, shape in shapes.items():
        numel = math.prod(shape)
        codec, bits = storage(name, numel, "float32", options)
        total += 7                                              # a plan row, deflated
        if codec == "int":
            n_scales = shape[options.axis_mode == "col"] if len(shape) == 2 else 1
            bits_a_code, table_bytes = code_statistics(numel // n_scales, bits)
            total += min(numel * bits_a_code / 8 + math.ceil(numel / 2**15) * table_bytes, numel)
            total += 1.3 * n_scales                             # a mantissa byte each; the exponents are alike
        else:
            total += numel * {"f16": 1.75, "f32": 3.2}[codec]   # trained controls after planes and deflate
    return round(total)


@lru_cache(maxsize=1024)
def code_statistics(n: int, bits: int) -> tuple[float, float]:
    """(bits a code, bytes a Huffman table) when deflate codes rows of n normals rounded by the step max|x| / q_max."""
    q_max, normal, slices = 2 ** (bits - 1) - 1, NormalDist(), 16
    shares = np.zeros(q_max + 1)                                # of codes by magnitude, over slices of max|x|'s law
    for i in range(slices):
        step = normal.inv_cdf((1 + ((i + 0.5) / slices) ** (1 / n)) / 2) / q_max
        below = [2 * normal.cdf((code + 0.5) * step) - 1 for code in range(q_max)] + [1.0]
        shares += np.diff(below, prepend=0.0) / slices
    codes = np.concatenate([shares[:0:-1] / 2, shares[:1], shares[1:] / 2])
    entropy = -float(codes @ np.log2(np.maximum(codes, 1e-300)))
    symbols = float((1 - np.exp(-(2**15) * codes)).sum())       # that a block of 2^15 codes holds
    # Where most codes are 0, at 2 bits, matches beat a Huffman code of single symbols; 1.32 was measured there.
    return min(huffman_bits(codes), 1.32 * entropy), 20 + 0.2 * symbols


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


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours and the challenge's, told apart by their first bytes and never trusted.
# ----------------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(state, meta or None) of a .safetensors file, the baseline's final_model.pt, or its final_model.int8.ptz."""
    with open(path, "rb") as file:
        head = file.read(9)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        try:
            if head[:4] == b"PK\x03\x04":
                return checked_state(load_torch(file, size)), None
            if head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0:       # zlib's own check
                require(size <= MAX_RAW_BYTES, "checkpoint", 0, f"{size} bytes", f"at most {MAX_RAW_BYTES}")
                raw = inflate_zlib(file.read())
                return restore_baseline(load_torch(io.BytesIO(raw), len(raw))), None
            if head[8:] == b"{":
                return load_safetensors(path)
        except ArtifactError:
            raise
        except Exception as fault:      # the parsers of other people's formats raise whatever they like
            reason = " ".join(f"{type(fault).__name__} ({fault})".split())[:200]
            raise ArtifactError("checkpoint", 0, reason, "a readable checkpoint") from fault
    raise ArtifactError("checkpoint", 0, head, "a safetensors file, a PyTorch zip or a zlib stream")


def load_torch(file: BinaryIO | io.BytesIO, size: int) -> Any:
    """torch.load without pickle's powers, of an archive that cannot unfold into more than it is."""
    entries = zipfile.ZipFile(file).infolist()
    flat = sum(e.file_size for e in entries) <= size and all(e.compress_type == zipfile.ZIP_STORED for e in entries)
    require(flat, "checkpoint", 0, "a compressed archive", "stored entries, as torch.save writes them")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def inflate_zlib(data: bytes) -> bytes:
    unpacker = zlib_ng.decompressobj()
    raw = unpacker.decompress(data, MAX_RAW_BYTES)
    whole = unpacker.eof and not unpacker.unused_data
    require(whole, "checkpoint", 0, f"no end at its {len(raw)} bytes", f"a zlib stream of below {MAX_RAW_BYTES} bytes")
    return raw


def load_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A checkpoint of ours may hold more than the model: its weights then carry the prefix `model.`."""
    from safetensors import safe_open  # only checkpoints need it

    with safe_open(path, framework="pt", device="cpu") as file:
        text, names = (file.metadata() or {}).get("artifact_meta"), list(file.keys())
        names = [name for name in names if name.startswith("model.")] or names
        state = checked_state({name.removeprefix("model."): file.get_tensor(name) for name in names})
    return state, None if text is None else parse_meta(text.encode(), "checkpoint artifact_meta", None)


def checked_state(state: Any) -> dict[str, Tensor]:
    """A dict of dense tensors of bounded size; a pickle can claim any shape through strides of zero."""
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    require(named, "checkpoint", 0, f"a {type(state).__name__}", "a dict of named tensors")
    for name, t in state.items():
        dense = isinstance(t, Tensor) and t.layout == torch.strided and not (t.is_nested or t.is_quantized or t.is_meta)
        require(dense, f"checkpoint tensor {name!a}", 0, f"a {type(t).__name__}", "a dense tensor")
    total = sum(t.numel() * t.element_size() for t in state.values())
    require(total <= MAX_RAW_BYTES, "checkpoint", 0, f"{total} bytes of tensors", f"at most {MAX_RAW_BYTES}")
    return {name: tensor.detach() for name, tensor in state.items()}


def restore_baseline(packed: Any) -> dict[str, Tensor]:
    """The state in the baseline's int8 dict: codes x scales, beside kept tensors in the dtype they had."""
    form = packed.get("__quant_format__") if isinstance(packed, dict) else None
    require(form == "int8_clean_per_row_v1", "checkpoint __quant_format__", 0, repr(form), "int8_clean_per_row_v1")
    codes, scales, state = (checked_state(packed.get(part)) for part in ("quantized", "scales", "passthrough"))
    dtypes = {**packed.get("dtypes", {}), **packed.get("passthrough_orig_dtypes", {})}
    paired = codes.keys() == scales.keys() and codes.keys() <= dtypes.keys() <= codes.keys() | state.keys()
    require(paired and not codes.keys() & state.keys(), "checkpoint", 0, "tensors without scales or dtype", "both")
    unknown = sorted({str(dtype) for dtype in dtypes.values()} - set(FLOATS))
    require(not unknown, "checkpoint dtypes", 0, unknown, ", ".join(FLOATS))
    for name, q in codes.items():
        scale = scales[name].float()
        fits = q.dtype == torch.int8 and tuple(scale.shape) in ((), tuple(q.shape[:1]))
        found = f"{q.dtype}, scales {tuple(scale.shape)}"
        require(fits, f"checkpoint tensor {name!a}", 0, found, "int8 codes and a scale, or one per row")
        state[name] = q.float() * scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))
    return {name: t.to(getattr(torch, dtypes[name])) if name in dtypes else t for name, t in state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Code size: the sources as the one file that a submission ships, which is what the cap counts.
# ----------------------------------------------------------------------------------------------------------------------

ENTRY = "train_gpt"
# The hook is for Pythons before 3.13, whose own printer of tracebacks looks for source lines in files alone.
UNPACKER = '''\
import base64,linecache,lzma,sys,traceback,types
sys.excepthook=traceback.print_exception
for n,s in zip(*[iter(lzma.decompress(base64.b85decode("{payload}")).decode().split("\\0"))]*2):
 m=sys.modules[__name__] if n=="{entry}" else types.ModuleType(n)
 m.__file__,f,sys.modules[n]=__file__,__file__+"/"+n+".py",m
 linecache.cache[f]=len(s),None,s.splitlines(True),f
 exec(compile(s,f,"exec"),m.__dict__)
'''


def pack_code(sources: Mapping[str, str]) -> str:
    """One self-extracting file: other modules are registered by name, then train_gpt runs in the file's own place."""
    by_name = {Path(name).stem: source for name, source in sources.items()}
    if ENTRY not in by_name:
        raise ValueError(f"packing needs {ENTRY}, got {', '.join(by_name) or 'nothing'}")
    names = [*sorted(by_name.keys() - {ENTRY}), ENTRY]
    text = "\0".join(part for name in names for part in (name, without_comments(by_name[name])))
    packed = lzma.compress(text.encode("utf-8"), format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return UNPACKER.format(payload=base64.b85encode(packed).decode("ascii"), entry=ENTRY)


def without_comments(source: str) -> str:
    """The same program without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def packed_code_bytes(paths: Iterable[str | os.PathLike[str]]) -> int:
    """What the sources weigh in a submission; in a packed file, where they share one path, the size of that file."""
    distinct = sorted({Path(path).resolve() for path in paths})
    if len(distinct) == 1:
        return distinct[0].stat().st_size
    return len(pack_code({path.name: path.read_text(encoding="utf-8") for path in distinct}).encode("utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Command line: write, inspect, eval, verify.
# ----------------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def write_verb(args: argparse.Namespace) -> int:
    options = ExportOptions(args.axis_mode, args.scale_floor, args.weight_bits, args.embed_bits)
    if faults := options.problems():
        raise ValueError("; ".join(faults))
    state, meta = read_with_meta(args.checkpoint, args.knob)
    report = save_artifact(args.output, state, meta, options)
    print(f"wrote:{args.output} total_bytes:{report.total_bytes} bits_per_weight:{report.bits_per_weight:.4f} "
          f"rms_error:{report.rms_error:.6f} floored_share:{report.floored_share:.4f}")
    return 0


def read_with_meta(path: str, knobs: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, meta) of an artifact or of any checkpoint; `knobs` (NAME=VALUE) complete one that comes without meta."""
    if malformed := [knob for knob in knobs if "=" not in knob]:
        raise ValueError(f"--knob must be NAME=VALUE, got {', '.join(malformed)}")
    with open(path, "rb") as file:
        is_artifact = file.read(len(MAGIC)) == MAGIC
    if is_artifact:
        artifact = load_artifact(path)
        state, meta = artifact.state, artifact.meta
    else:
        state, meta = read_checkpoint(path)
    if meta is None:
        import train_gpt

        return state, train_gpt.meta_from_state(state, dict(knob.split("=", 1) for knob in knobs))
    if knobs:
        raise ValueError(f"{path} carries its configuration, which --knob {', '.join(knobs)} cannot change")
    return state, meta


def inspect_verb(args: argparse.Namespace) -> int:
    artifact = load_artifact(args.file)
    total = sum(artifact.parts.values())
    if args.json:
        plan = [asdict(row) for row in artifact.plan]
        print(json.dumps({"meta": artifact.meta, "scale_floor": artifact.scale_floor, "plan": plan,
                          "parts": artifact.parts, "total_bytes": total}, indent=1))
        return 0
    print(f"meta: {json.dumps(artifact.meta)}\nscale_floor: {artifact.scale_floor:g}\n")
    print(f"{'codec':5} {'bits':>4} {'axis':4} {'dtype':8} {'shape':>12}  tensor")
    for row in artifact.plan:
        shape = "x".join(map(str, row.shape)) or "scalar"
        print(f"{row.codec:5} {row.bits:4} {row.axis:4} {row.dtype:8} {shape:>12}  {row.name}")
    print(f"\n{'bytes':>11} {'share':>7}  part")
    for part, size in (*artifact.parts.items(), ("total", total)):
        print(f"{size:11} {size / total:7.2%}  {part}")
    return 0


def eval_verb(args: argparse.Namespace) -> int:
    import train_gpt

    state, meta = read_with_meta(args.file, args.knob)
    result = train_gpt.evaluate_artifact(state, meta, data=args.data, tokenizer=args.tokenizer, device=args.device,
                                         max_tokens=args.max_tokens, batch_tokens=args.batch_tokens)
    name = "final_int8_zlib_roundtrip"
    print(f"{name} val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} eval_time:{1000 * result.seconds:.0f}ms")
    print(f"{name}_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")
    return 0


def verify_verb(args: argparse.Namespace) -> int:
    """Quantise the checkpoint again by the file's own plan: each tensor must come out bit for bit as in the file."""
    artifact, (state, _) = load_artifact(args.file), read_checkpoint(args.checkpoint)
    plan, differing = {row.name: row for row in artifact.plan}, 0
    for name in sorted(state.keys() | plan.keys()):
        verdict, note = "differs", f"only in the {'file' if name in plan else 'checkpoint'}"
        if name in state and name in plan:
            decoded, original = artifact.state[name], state[name]
            note = f"{decoded.dtype} {tuple(decoded.shape)}, in the checkpoint {original.dtype} {tuple(original.shape)}"
            if (decoded.shape, decoded.dtype) == (original.shape, original.dtype):
                again = restore(plan[name], store(plan[name], original, artifact.scale_floor))
                verdict = "equal" if same_bits(decoded, again) else "differs"
                error = original.double() - decoded.double()
                rms_error = math.sqrt(sum_squares(error) / max(sum_squares(original), 1e-300))
                note = f"rms_error:{rms_error:.6f} max_error:{float(error.abs().max()):.3g}"
        differing += verdict == "differs"
        print(f"{verdict:7} {ascii(name)[1:-1]} {note}")
    print(f"tensors:{len(state.keys() | plan.keys())} differing:{differing}")
    return 1 if differing else 0


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def command_line() -> argparse.ArgumentParser:
    defaults = ExportOptions()
    parser = OneLineParser(prog="export.py", description="Tensors to bytes and back.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    write, inspect, evaluate, verify = (verbs.add_parser(name, help=text) for name, text in (
        ("write", "quantise and compress a checkpoint"),
        ("inspect", "print the plan and the bytes of every part"),
        ("eval", "validate the model in an artifact or a checkpoint"),
        ("verify", "compare the file with its checkpoint, tensor by tensor"),
    ))
    write.set_defaults(run=write_verb)
    write.add_argument("checkpoint")
    write.add_argument("-o", "--output", required=True)
    write.add_argument("--axis-mode", default=defaults.axis_mode)
    write.add_argument("--scale-floor", type=float, default=defaults.scale_floor)
    write.add_argument("--weight-bits", type=int, default=defaults.weight_bits)
    write.add_argument("--embed-bits", type=int, default=defaults.embed_bits)
    for verb in (write, evaluate):
        verb.add_argument("--knob", action="append", default=[], metavar="NAME=VALUE", help="for checkpoints without meta")
    inspect.set_defaults(run=inspect_verb)
    inspect.add_argument("file")
    inspect.add_argument("--json", action="store_true")
    evaluate.set_defaults(run=eval_verb)
    evaluate.add_argument("file")
    evaluate.add_argument("--data", required=True, metavar="DIR")
    evaluate.add_argument("--tokenizer", required=True, metavar="MODEL")
    evaluate.add_argument("--device", default="auto")
    evaluate.add_argument("--max-tokens", type=int, default=0, help="0 = the whole validation split")
    evaluate.add_argument("--batch-tokens", type=int, default=65_536)
    verify.set_defaults(run=verify_verb)
    verify.add_argument("file")
    verify.add_argument("checkpoint")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; every fault of the input becomes one line and exit code 2."""
    args = command_line().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as fault:
        print(f"export.py {args.verb}: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from export import main as main_by_name  # so that every class exists once

    sys.exit(main_by_name())
