"""Tensors to bytes and back: plan, quantise, correct, deflate, one checked file.

    python export.py predict NUM_LAYERS=9 MODEL_DIM=512              # predicted: artifact ... + code ... = ... bytes
    python export.py write final_model.pt -o final_model.int8.ptz    # wrote:final_model.int8.ptz total_bytes:... ...
    python export.py inspect final_model.int8.ptz                    # the plan and the bytes of every part
    python export.py eval final_model.int8.ptz --data DIR --tokenizer MODEL
    python export.py extract final_model.int8.ptz TENSOR             # one tensor; --to model.safetensors takes them all
    python export.py verify final_model.int8.ptz final_model.pt      # exit 1 unless the same export gives the same bytes

The file format, version 2. Integers and floats are little-endian; sections touch without gaps.

    offset    bytes  field
    0         4      magic, "ANLM"
    4         1      version, 2
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
    2         rows, 0..4096, then so many plan rows, strictly ascending by name:
      1         name_bytes, 1..255, then the name: printable ASCII
      1         dtype the tensor gets back: 0 float32, 1 float16, 2 bfloat16, 3 float64, 4 uint8, 5 int8, 6 int16,
                7 int32, 8 int64, 9 bool
      1         codec: 0 int, 1 f16, 2 f32 (for float dtypes), 3 raw (for all others)
      1         axis: who owns a scale, 0 = each row, 1 = each column, 2 = each row and each column (1, 2: int matrices
                only); an int tensor which is no matrix is one row
      1         layout of the codes: 0 row after row, 1 column after column, 2 rows in ascending order of their scales,
                3 columns so (1: matrices; 2 needs row scales and 3 column scales; equal scales keep their order)
      1         kept: 0 none, 1 rows, 2 columns, 3 entries (int matrices only)
      1         rank of the correction, 0..32, at most the rows and the columns (above 0: int matrices only)
      1         factors: how the correction is stored, 0 f16, 1 int8, 2 lqer (0 at rank 0)
      4         kept_count: slices or entries kept, at least 1 if any, at most as many as there are
      1         ndim, 0..8, then 4 each: dims, at least 1
    5 each    the table, one entry per stream: method u8 (0 stored, 1 raw deflate, 2..8 deflated radix digits, `codes`
              only), coded_bytes u32

Streams, in this order: `codes` of each int tensor (int8, -127..127); then those that all tensors share in plan order:
`scales` (fp16, finite, above zero), `f16`, `f32`, `raw` (bool bytes are 0 or 1), `factors` (bytes), `index` (u32). Their
raw lengths follow from the plan; an empty stream is stored. Values of two and four bytes lie as byte planes: all first
bytes, then all second bytes, and so on. Floats are finite. Method 1 + m says that |code| is at most m: digits code + m in
base 2m + 1, as many as fit a byte, first digit lowest, zero digits at the end.

An int matrix (rows, cols) is restored in fp32, each operation rounded by itself: code x row scale, x column scale; then for
each rank k in turn + a[k, row] x b[k, col]; then the kept values overwrite theirs; then a cast to its dtype. It takes its
scales (rows, then columns, then those of its factors), f16 values (factors a, b, then the kept values in index order) and
factors. The index holds row or column numbers or flat positions, strictly ascending. Factors a (rank, rows) and
b (rank, cols) are f16; or int8 codes with a scale for each k, those of a first; or lqer (Zhang et al. 2024, arXiv
2402.02446): a as two's-complement 2-bit codes with one scale, b as 4-bit codes with a scale for each 64 of b in order,
packed from the low bits of a byte, a and b each from a new byte.

A reader rejects, as ArtifactError, whatever breaks a line above, and: tensors beyond 2^30 bytes in all, a raw length
above 1032 x the coded one (deflate's limit), a deflate stream that ends before or after its raw length or its coded
bytes, bytes left over anywhere. Lengths are bounded before anything is allocated. Offsets count from the start of the
file; those of fields named `header.*` from the start of the inflated header.
"""
from __future__ import annotations

import ast
import base64
import hashlib
import heapq
import json
import lzma
import math
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

MAGIC, VERSION = b"ANLM", 2
FIXED = struct.Struct("<4sB3sIII")      # magic, version, reserved, file_bytes, header_raw_bytes, header_coded_bytes
CHECKSUM_BYTES = 8
MAX_RAW_BYTES = 2**30                   # of all tensors of a file together, as stored or as restored
MAX_HEADER_BYTES = 2**20
MAX_INT_DIGITS = 40                     # in meta; longer ones take old Pythons quadratic time to parse
MAX_TENSORS, MAX_NDIM, MAX_RANK = 4096, 8, 32
MAX_DEFLATE_RATIO = 1032                # 258 bytes for two bits, the most that deflate can say
STORED, DEFLATE = 0, 1                  # methods; DEFLATE + m holds radix digits of codes up to m
MAX_RADIX_CODE = 7                      # two digits in base 15 fit a byte, two in base 17 do not
MAX_CODE = 127

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "uint8": 1, "int8": 1, "int16": 2, "int32": 4,
          "int64": 8, "bool": 1}        # name -> bytes; the order is the file's enumeration, as in the next five lines
FLOATS = ("float32", "float16", "bfloat16", "float64")
CODECS = ("int", "f16", "f32", "raw")
AXES = ("row", "col", "both")
LAYOUTS = ("rows", "cols", "rows_by_scale", "cols_by_scale")
KEPT = ("none", "rows", "cols", "entries")
FACTORS = ("f16", "int8", "lqer")
STREAM_TYPES = {"codes": "i1", "scales": "<f2", "f16": "<f2", "f32": "<f4", "raw": "u1", "factors": "u1", "index": "<u4"}

CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight")   # substrings; these stay fp32
EMBED_NAMES = ("tok_emb.weight", "lm_head.weight")
CLIP_QUANTILE = 0.9999984               # of |w| in a row, the baseline's: next to the largest below 600,000 weights
LQER_GROUP = 64                         # 4-bit values that share a scale
FIT_WINDOW_BYTES = 20_000               # an export that fits itself to the cap ends at most so far below it


class ArtifactError(ValueError):
    """A file or state that cannot be an artifact; the offset is None where there are no bytes yet."""

    def __init__(self, field: str, offset: int | None, found: object, expected: object) -> None:
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"artifact: {field}{where}: found {found}, expected {expected}")
        self.field, self.offset, self.found, self.expected = field, offset, found, expected


class ExportRefused(ValueError):
    """The options cannot be carried out on these weights."""


def require(holds: bool | np.bool_, field: str, offset: int | None, found: object, expected: object) -> None:
    if not holds:
        raise ArtifactError(field, offset, found, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Options: what a user may ask of an export; the trainer's knobs of the same names, the flags of `write`.
# ----------------------------------------------------------------------------------------------------------------------


def knob(default: Any, group: str, text: str, *, low: float = 0, choices: Sequence[str] = (), free: bool = False) -> Any:
    """A field with its documentation; a number must be at least `low`, a word one of `choices`, and a `free` knob may
    change between a checkpoint and its resumption.
    """
    return field(default=default, metadata={"group": group, "help": text, "low": low, "choices": choices, "free": free})


def range_problems(values: Any, knobs: Iterable[Field[Any]]) -> list[str]:
    """The numbers among the knobs of `values` that are not finite or too low."""
    found = []
    for f in knobs:
        value, low = getattr(values, f.name), f.metadata["low"]
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{f.name.upper()} must be finite, got {value}")
        elif not isinstance(value, (bool, str)) and value < low:
            found.append(f"{f.name.upper()} must be at least {low}, got {value}")
    return found


@dataclass(frozen=True)
class ExportOptions:
    """What the exporter may choose; the field `int8_axis_mode` is the knob INT8_AXIS_MODE."""
    int8_axis_mode: str = knob(
        "row", "Export", "one step a row, a column, or per tensor whichever errs less",
        choices=("row", "col", "auto"), free=True)
    int8_scale_floor: float = knob(
        1 / 127, "Export", "smallest quantisation step; the baseline's 1/127 dominates while weights are below 1;"
        " 0 = steps follow the weights", free=True)
    int8_clip_sigmas: float = knob(
        0.0, "Export", "largest weight that a row's codes reach, in the row's standard deviations: the size then depends"
        " on the shape alone; 0 = the largest there is", free=True)
    int8_keep_float_max_numel: int = knob(
        65_536, "Export", "tensors of up to so many weights are stored in half precision", free=True)
    weight_quantization_bits: int = knob(8, "Export", "bits of a matrix weight, 2 to 8; 16 = half precision", free=True)
    embed_quantization_bits: int = knob(8, "Export", "the same for the embedding and the head", free=True)
    int8_residual_rank: int = knob(
        0, "Export", "largest rank of a tensor's correction after quantisation; 0 = none", free=True)
    int8_residual_budget_bytes: int = knob(
        65_536, "Export", "bytes that all low-rank corrections together may take", free=True)
    int8_residual_power_iters: int = knob(8, "Export", "power iterations for each rank of a correction", low=1, free=True)
    int8_residual_storage: str = knob(
        "auto", "Export", "how corrections are stored; auto = per tensor what removes most error a byte",
        choices=("auto", *FACTORS), free=True)
    int8_targeted_residual_mode: str = knob(
        "off", "Export", "tensors that may have a correction; off = all, early = the first 4 blocks, combo = mlp.proj and"
        " attn.proj", choices=("off", "all_mlp_proj", "early_mlp_proj", "all_attn_proj", "early_proj_combo"), free=True)
    export_permute: str = knob(
        "off", "Export", "reorder what the network lets us reorder, where it saves bytes: mlp = hidden units, all = heads,"
        " value and stream dimensions too", choices=("off", "mlp", "all"), free=True)
    export_rotate: bool = knob(
        False, "Export", "1 = turn each value head so that a triangle of its weights is zero (0.4 to 1.1 % fewer bytes"
        " at 8 bits)", free=True)
    export_allocate: str = knob(
        "uniform", "Export", "who sets each tensor's steps: uniform = the knobs above; hessian, sensitivity = the least"
        " expected loss that fits ARTIFACT_CAP_BYTES, from CALIBRATION_TOKENS or a map of scripts/sensitivity.py",
        choices=("uniform", "hessian", "sensitivity"), free=True)
    artifact_cap_bytes: int = knob(16_000_000, "Export", "artifact plus packed code, decimal bytes; 0 = no cap", free=True)
    cap_policy: str = knob(
        "refuse", "Export", "a run predicted over the cap is refused or warned of; fit = the export chooses its steps so"
        " that it ends within 20,000 bytes below the cap", choices=("refuse", "warn", "fit"), free=True)

    def problems(self) -> list[str]:
        """One message per fault: the knob, the value wanted, the value found."""
        knobs, widths = fields(ExportOptions), (*range(2, 9), 16)
        found = range_problems(self, knobs)
        found += [f"{f.name.upper()} must be {', '.join(c[:-1])} or {c[-1]}, got {getattr(self, f.name)!r}"
                  for f in knobs if (c := f.metadata["choices"]) and getattr(self, f.name) not in c]
        found += [f"{name.upper()} must be 2..8 or 16, got {getattr(self, name)}"
                  for name in ("weight_quantization_bits", "embed_quantization_bits") if getattr(self, name) not in widths]
        chosen = ("int8_axis_mode", "int8_clip_sigmas", "weight_quantization_bits", "embed_quantization_bits")
        unused = [f.name.upper() for f in knobs if f.name in chosen and getattr(self, f.name) != f.default]
        return found + [text for wrong, text in (
            (self.int8_scale_floor > 1, f"INT8_SCALE_FLOOR must be in 0..1, got {self.int8_scale_floor}"),
            (self.int8_residual_rank > MAX_RANK,
             f"INT8_RESIDUAL_RANK must be at most {MAX_RANK}, got {self.int8_residual_rank}"),
            (self.export_allocate != "uniform" and unused,
             f"EXPORT_ALLOCATE={self.export_allocate} chooses what {', '.join(unused)} would set; unset one of them"),
            (self.solves and self.artifact_cap_bytes == 0,
             f"CAP_POLICY={self.cap_policy} with EXPORT_ALLOCATE={self.export_allocate} needs ARTIFACT_CAP_BYTES above 0"),
        ) if wrong]

    @property
    def solves(self) -> bool:
        """The export fits itself to the cap."""
        return self.cap_policy == "fit" or self.export_allocate != "uniform"

    @property
    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults; a file's meta holds them, so that the export can be repeated."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


# ----------------------------------------------------------------------------------------------------------------------
# Plan: how each tensor is stored, decided once, written into the header, never derived again from a name.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRow:
    """How one tensor is stored: all that a reader needs to find and restore it."""
    name: str
    shape: tuple[int, ...]
    dtype: str              # what the state had and gets back
    codec: str              # one of CODECS
    axis: str = "row"       # which slices of an int matrix own a scale; "row" for everything else
    layout: str = "rows"    # order of the codes in their stream
    kept: str = "none"      # which part of an int matrix is stored as fp16 instead
    kept_count: int = 0     # rows, columns or entries of it
    rank: int = 0           # of the correction that is added to an int matrix
    factors: str = "f16"    # how the correction is stored

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def scale_counts(self) -> tuple[int, int]:
        """Scales of rows and of columns."""
        if len(self.shape) != 2:
            return 1, 0
        return (self.shape[0] if self.axis != "col" else 0), (self.shape[1] if self.axis != "row" else 0)

    @property
    def kept_values(self) -> int:
        return self.kept_count * {"rows": self.shape[-1:], "cols": self.shape[:1]}.get(self.kept, (1,))[0]

    @property
    def counts(self) -> dict[str, int]:
        """Kind of stream -> how many of its values this tensor takes."""
        if self.codec != "int":
            return {self.codec: self.numel * (DTYPES[self.dtype] if self.codec == "raw" else 1)}
        counts = {"codes": self.numel, "scales": sum(self.scale_counts)}
        for kind, n in factor_counts(self).items() if self.rank else ():
            counts[kind] = counts.get(kind, 0) + n
        if self.kept != "none":
            counts["f16"] = counts.get("f16", 0) + self.kept_values
            counts["index"] = self.kept_count
        return counts

    @property
    def raw_bytes(self) -> int:
        """What this tensor takes in memory, as stored or as restored, whichever is more."""
        stored = sum(n * np.dtype(STREAM_TYPES[kind]).itemsize for kind, n in self.counts.items())
        return max(stored, self.numel * DTYPES[self.dtype])


def factor_counts(row: PlanRow) -> dict[str, int]:
    """Kind of stream -> values that a correction of this rank takes."""
    rows, cols = row.rank * row.shape[0], row.rank * row.shape[1]
    return {"f16": {"f16": rows + cols}, "int8": {"factors": rows + cols, "scales": 2 * row.rank},
            "lqer": {"factors": -(-rows // 4) + -(-cols // 2), "scales": 1 + -(-cols // LQER_GROUP)}}[row.factors]


@dataclass(frozen=True)
class Choice:
    """How the writer quantises one tensor: what it decides and a reader need not know."""
    codec: str                  # one of CODECS
    axis: str = "row"
    q_max: float = 0.0          # the code that the clip is mapped to
    weighted: bool = False      # steps by what an error costs instead of by each slice's own clip


@dataclass
class Stored:
    """One tensor on its way into the file: its row, and its values by kind of stream."""
    row: PlanRow
    values: dict[str, np.ndarray]


def is_name(name: str) -> bool:
    """What a file may hold as a name, and `inspect` print on any terminal."""
    return 1 <= len(name) <= 255 and name.isascii() and name.isprintable()


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuses what the format cannot hold."""
    dtype, shape = dtype_name(tensor), tuple(tensor.shape)
    require(is_name(name), f"tensor {name!a}", None, f"{len(name)} characters", "a name of 1..255 printable ASCII ones")
    dense = dtype in DTYPES and tensor.layout == torch.strided
    require(dense, f"tensor {name}", None, f"{dtype} {tensor.layout}", f"dense {', '.join(DTYPES)}")
    sized = len(shape) <= MAX_NDIM and tensor.numel() > 0
    require(sized, f"tensor {name}", None, f"shape {shape}", f"at most {MAX_NDIM} dims, none of them 0")
    require(bool(tensor.isfinite().all()), f"tensor {name}", None, "a value that is not finite", "finite values")


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items()}


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def storage(name: str, shape: Sequence[int], dtype: str, options: ExportOptions) -> Choice:
    """The uniform plan's choice for a tensor, by the baseline's rule; axis `auto` is left to `uniform_choice`."""
    if dtype not in FLOATS:
        return Choice("raw")
    if any(part in name for part in CONTROL_NAMES):
        return Choice("f32")
    bits = options.embed_quantization_bits if name in EMBED_NAMES else options.weight_quantization_bits
    if math.prod(shape) <= options.int8_keep_float_max_numel or bits == 16:
        return Choice("f16")
    axis = options.int8_axis_mode if len(shape) == 2 else "row"
    return Choice("int", axis, 2 ** (bits - 1) - 1)


def uniform_choice(name: str, tensor: Tensor, options: ExportOptions) -> Choice:
    choice = storage(name, tensor.shape, dtype_name(tensor), options)
    return replace(choice, axis=better_axis(tensor, choice.q_max, options)) if choice.axis == "auto" else choice


def better_axis(w: Tensor, q_max: float, options: ExportOptions) -> str:
    """The axis whose rounding loses less; rows win ties, which the order of summation must not decide."""
    row_loss, col_loss = (
        sum_squares(w.double() - dequantize(*quantize(w, q_max, axis, options), axis)) for axis in ("row", "col"))
    return "col" if col_loss < row_loss * (1 - 1e-9) else "row"


def plan_lines(tensors: Iterable[Stored]) -> Iterator[str]:
    """The plan as a table."""
    yield f"{'codec':5} {'codes':>5} {'axis':4} {'layout':13} {'kept':11} {'rank':7} {'dtype':8} {'shape':>12}  tensor"
    for row, values in ((s.row, s.values) for s in tensors):
        shape = "x".join(map(str, row.shape)) or "scalar"
        codes = values.get("codes")
        limit = "" if codes is None else f"±{int(np.abs(codes).max())}"
        kept = "" if row.kept == "none" else f"{row.kept_count} {row.kept}"
        rank = f"{row.rank} {row.factors}" if row.rank else ""
        yield (f"{row.codec:5} {limit:>5} {row.axis:4} {row.layout:13} {kept:11} {rank:7} {row.dtype:8} {shape:>12}"
               f"  {row.name}")


def stream_of(kind: str, row: PlanRow) -> str:
    """Codes have a stream per tensor, so that each gets its own code lengths; everything else is shared."""
    return f"codes:{row.name}" if kind == "codes" else kind


def stream_counts(plan: Sequence[PlanRow]) -> dict[str, int]:
    """Stream -> number of values, in the order of the file."""
    counts = {stream_of("codes", row): row.numel for row in plan if row.codec == "int"}
    for kind in ("scales", "f16", "f32", "raw", "factors", "index"):
        counts[kind] = sum(row.counts.get(kind, 0) for row in plan)
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# Quantise: one symmetric uniform grid, shared by the training simulation, the writer and the reader.
# ----------------------------------------------------------------------------------------------------------------------


def quantize(w: Tensor, q_max: float, axis: str, options: ExportOptions) -> tuple[Tensor, Tensor]:
    """Round w to int8 codes in [-q_max, q_max]; the fp16 scales, one per row or per column, are those of the file."""
    rows = as_rows(w.float(), axis)                             # (slices that own a scale, their weights)
    clip = clip_magnitude(rows, options.int8_clip_sigmas)
    scale = stored_scale(clip, q_max, options.int8_scale_floor)
    clipped = torch.maximum(torch.minimum(rows, clip[:, None]), -clip[:, None])
    limit = math.floor(q_max + 0.5)
    codes = (clipped / scale.float()[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return as_rows(codes, axis).contiguous().view(w.shape), scale


def quantize_weighted(w: Tensor, q_max: float, axis: str, costs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Round a matrix by steps that shrink with the square root of what an error costs; four rms are mapped to q_max.

    At high rates the least expected loss for a given entropy has cost x step^2 equal everywhere (reverse water-filling;
    Cover & Thomas 2006, section 10.3.3). `costs` holds those of rows and of columns, whose product is a weight's.
    """
    # Damped as a Hessian's diagonal: what never occurred in the calibration is rare, not free.
    row, col = ((c + DAMPING * c.mean()).clamp_min(1e-30).rsqrt().float() for c in costs)
    row = row if axis != "col" else torch.ones_like(row)
    col = col / col.log().mean().exp() if axis != "row" else torch.ones_like(col)
    step = 4 / q_max * (w.double() / row[:, None] / col).square().mean().sqrt().float()
    row, col = (row, col * step) if axis == "col" else (row * step, col)
    row, col = (side.half().clamp_min(2**-24) for side in (row, col))
    codes = (w.float() / row.float()[:, None] / col.float()).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
    return codes, {"row": row, "col": col, "both": torch.cat([row, col])}[axis]


def dequantize(codes: Tensor, scale: Tensor, axis: str) -> Tensor:
    """Code x scale in fp32; each product is rounded once, so every machine gets the same bits."""
    if codes.ndim != 2:
        return codes.float() * scale.float().reshape(())
    if axis == "both":
        return codes.float() * scale[:codes.shape[0]].float()[:, None] * scale[codes.shape[0]:].float()
    return codes.float() * scale.float().unsqueeze(1 if axis == "row" else 0)


def as_rows(w: Tensor, axis: str) -> Tensor:
    """w as a matrix with one scale per row, its own inverse for matrices; whatever is no matrix is a single row."""
    if w.ndim != 2:
        return w.reshape(1, -1)
    return w if axis == "row" else w.T


def clip_magnitude(rows: Tensor, sigmas: float = 0.0) -> Tensor:
    """`sigmas` root mean squares of each row, or if 0 the CLIP_QUANTILE of |w|: torch.quantile's value, fp32 rank included,
    without its sort and its size limit.
    """
    if sigmas:
        return sigmas * rows.double().square().mean(1).sqrt().float()
    n = rows.shape[1]
    rank = float(np.float32(CLIP_QUANTILE) * np.float32(n - 1))
    below, weight = int(rank), rank - int(rank)
    top = torch.topk(rows.abs(), n - below, dim=1).values       # descending; the last one has the rank `below`
    low, high = top[:, -1], top[:, max(n - below - 2, 0)]
    # Two roundings on purpose: lerp may fuse them on one machine and not on another.
    return high - (high - low) * (1 - weight) if weight >= 0.5 else low + (high - low) * weight


def stored_scale(clip: Tensor, q_max: float, floor: float) -> Tensor:
    """The step that maps clip to q_max, as the fp16 of the file; never zero, and wide enough to reach the clip."""
    scale = (clip / q_max).clamp_min(floor).half().clamp_min(2**-24)    # the least positive fp16, for all-zero rows
    # Below 2^-14 fp16 has few digits: a step rounded down by half a code or more at the clip becomes the next one up.
    short = (clip > (q_max + 0.5) * scale.float()) & scale.isfinite()
    return torch.where(short, (scale.view(torch.int16) + 1).view(torch.half), scale)


def sum_squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def store(name: str, tensor: Tensor, choice: Choice, options: ExportOptions,
          costs: tuple[Tensor, Tensor] | None = None) -> Stored:
    """Carry out a choice: the row and the values of one tensor, before any correction."""
    tensor = tensor.detach().cpu().contiguous()
    row = PlanRow(name, tuple(tensor.shape), dtype_name(tensor), choice.codec, choice.axis)
    if choice.codec == "raw":
        return Stored(row, {"raw": tensor.reshape(-1).view(torch.uint8).numpy()})
    if choice.codec != "int":
        value = tensor.half() if choice.codec == "f16" else tensor.float()
        return Stored(row, {choice.codec: value.reshape(-1).numpy()})
    if choice.weighted:
        assert costs is not None, "weighted steps need costs"
        codes, scales = quantize_weighted(tensor, choice.q_max, choice.axis, costs)
    else:
        codes, scales = quantize(tensor, choice.q_max, choice.axis, options)
    return Stored(row, {"codes": codes.reshape(-1).numpy(), "scales": scales.numpy()})


def restore(row: PlanRow, values: Mapping[str, np.ndarray]) -> Tensor:
    """The tensor that a reader gets; the writer takes its error figures from here too."""
    if row.codec == "raw":
        return torch.from_numpy(np.frombuffer(values["raw"].tobytes(), row.dtype).copy()).view(row.shape)
    parts = {kind: torch.from_numpy(np.ascontiguousarray(array)) for kind, array in values.items() if kind != "index"}
    if row.codec != "int":
        return parts[row.codec].view(row.shape).to(getattr(torch, row.dtype))
    own = sum(row.scale_counts)
    tensor = dequantize(parts["codes"].view(row.shape), parts["scales"][:own], row.axis)
    if row.rank:
        for a, b in zip(*restore_factors(row, parts, own), strict=True):
            tensor = tensor + a[:, None] * b
    if row.kept != "none":
        at = torch.from_numpy(values["index"].astype(np.int64))
        view = {"rows": tensor, "cols": tensor.T, "entries": tensor.view(-1, 1)}[row.kept]
        view[at] = parts["f16"][-row.kept_values:].float().view(row.kept_count, -1)
    return tensor.to(getattr(torch, row.dtype))


def restore_factors(row: PlanRow, parts: Mapping[str, Tensor], own_scales: int) -> tuple[Tensor, Tensor]:
    """Factors a (rank, rows) and b (rank, cols) of a correction, fp32."""
    (rows, cols), rank = row.shape, row.rank
    split = rank * rows
    if row.factors == "f16":
        values = parts["f16"][:split + rank * cols].float()
        return values[:split].view(rank, rows), values[split:].view(rank, cols)
    scales, packed = parts["scales"][own_scales:].float(), parts["factors"]
    if row.factors == "int8":
        a, b = packed[:split].view(torch.int8).view(rank, rows), packed[split:].view(torch.int8).view(rank, cols)
        return a.float() * scales[:rank, None], b.float() * scales[rank:, None]
    a_bytes = -(-split // 4)
    a, b = unpack_bits(packed[:a_bytes], 2)[:split], unpack_bits(packed[a_bytes:], 4)[:rank * cols]
    b_scales = scales[1:].repeat_interleave(LQER_GROUP)[:rank * cols]
    return (a.float() * scales[0]).view(rank, rows), (b.float() * b_scales).view(rank, cols)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Two's-complement codes of 2 or 4 bits in bytes, the first code lowest."""
    per = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.int16) & (2**bits - 1), (0, -codes.numel() % per)).view(-1, per)
    return (codes << (bits * torch.arange(per))).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    digits = (packed[:, None].to(torch.int16) >> (bits * torch.arange(8 // bits))) & (2**bits - 1)
    return torch.where(digits >= 2 ** (bits - 1), digits - 2**bits, digits).view(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Expected loss: what an error in a tensor costs, from calibration statistics, a measured map, or its size alone.
# ----------------------------------------------------------------------------------------------------------------------

DAMPING = 0.01          # share of the mean that is added to each cost, as to a Hessian's diagonal


@dataclass(frozen=True)
class Term:
    """One use of a matrix (out, in). To second order an error e of it costs 0.5 * sum_i rows[i] (e moment e^T)_ii nats a
    token: Fisher information, Kronecker-factored, of which the output side keeps the diagonal (Martens & Grosse 2015, arXiv
    1503.05671, section 3). With rows = 1 this is the layer-wise objective of GPTQ (arXiv 2210.17323, equation 1).
    """
    rows: Tensor                # (out,) mean square of the gradient by each output, nats^2
    moment: Tensor              # (in, in) mean of x x^T over the inputs x
    transposed: bool = False    # the use is of the transposed matrix


@dataclass(frozen=True)
class Statistics:
    """What calibration tokens say about the matrices of one model."""
    weights: str                            # `weights_digest` of the model
    tokens: int
    terms: Mapping[str, tuple[Term, ...]]   # name of a matrix -> its uses


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """BLAKE2b over names and values: statistics and maps belong to one set of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def matrices(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Those of a model that steps are allocated to."""
    return {name: tuple(shape) for name, shape in shapes.items() if len(shape) == 2 and not is_control(name)}


def check_statistics(statistics: Statistics, state: Mapping[str, Tensor]) -> None:
    """Raises ArtifactError when they are of other weights."""
    found, wanted = statistics.weights, weights_digest(state)
    require(found == wanted, "calibration statistics", None, f"those of other weights ({found})",
            f"those of these ({wanted})")
    for name, shape in matrices({name: t.shape for name, t in state.items() if t.is_floating_point()}).items():
        uses = statistics.terms.get(name, ())
        found = [(t.rows.numel(), t.moment.shape[0])[::-1 if t.transposed else 1] for t in uses]
        require(set(found) == {shape}, f"calibration statistics of {name}", None, found or "none", shape)


def is_control(name: str) -> bool:
    return any(part in name for part in CONTROL_NAMES)


def expected_loss(error: Tensor, terms: Iterable[Term]) -> float:
    """Increase of the loss by `error` (out, in) in nats a token."""
    total = 0.0
    for term in terms:
        e = (error.T if term.transposed else error).float()
        total += 0.5 * float((e @ term.moment * e).sum(1).double() @ term.rows.double())
    return total


def weight_costs(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Costs of rows (out,) and of columns (in,): the margins of the expected loss of single weights' errors."""
    row, col = torch.zeros(()), torch.zeros(())
    for term in terms:
        inputs = term.moment.diagonal()
        first, second = (inputs, term.rows) if term.transposed else (term.rows, inputs)
        row, col = row + first * second.mean(), col + second * first.mean()
    return row, col


class Judge:
    """Says what an error in a tensor costs, in nats a token where it knows: by a measured map, by calibration statistics, or
    else by the error's squared size relative to the tensor's mean square (then in no unit).
    """

    def __init__(self, statistics: Statistics | None = None, sensitivity: SensitivityMap | None = None):
        self.statistics, self.sensitivity = statistics, sensitivity

    def terms(self, name: str) -> tuple[Term, ...]:
        return self.statistics.terms.get(name, ()) if self.statistics else ()

    def loss(self, name: str, w: Tensor, error: Tensor) -> float:
        relative = sum_squares(error) / max(sum_squares(w), 1e-300)
        if self.sensitivity is not None and name in self.sensitivity.points:    # it knows the matrices, no controls
            return self.sensitivity.loss(name, relative)
        terms = self.terms(name)
        return expected_loss(error, terms) if terms else relative * w.numel()


@dataclass(frozen=True)
class SensitivityMap:
    """Measured by scripts/sensitivity.py: for each matrix the squared relative errors of its quantisation at several widths,
    and the loss increase of each in nats a token.
    """
    points: Mapping[str, tuple[tuple[float, float], ...]]      # ascending by error

    def loss(self, name: str, relative: float) -> float:
        """Interpolated on logarithmic axes; beyond the ends in proportion to the squared error."""
        errors, nats = (np.array(side) for side in zip(*self.points[name], strict=True))
        at = float(np.clip(relative, errors[0], errors[-1]))
        value = math.exp(np.interp(math.log(max(at, 1e-300)), np.log(errors), np.log(nats)))
        return value * relative / at if at else 0.0


def read_sensitivity(path: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]]) -> SensitivityMap:
    """A map of a model with these tensors, measured on training tokens. Raises ArtifactError."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        split, points = found["split"], {}
        for name, entry in found["tensors"].items():
            pairs = sorted((float(p["relative_error"]), float(p["nats"])) for p in entry["points"])
            if not np.isfinite(pairs).all():
                raise ValueError(f"{name} has a point that is not finite")
            line = float(np.median([nats / error for error, nats in pairs if error > 0 and nats > 0] or [0.0]))
            # Fine quantisation can help by chance: points below a tenth of the line through the origin are put there.
            points[name] = tuple((e, max(nats, 0.1 * line * e, 1e-300)) for e, nats in pairs if e > 0)
        measured = {name: tuple(entry["shape"]) for name, entry in found["tensors"].items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as fault:
        reason = " ".join(f"{type(fault).__name__} ({fault})".split())[:200]
        raise ArtifactError("sensitivity map", None, reason, "a JSON file of scripts/sensitivity.py") from None
    require(split == "train", "sensitivity map", None, f"one measured on the {split} split",
            "one measured on training tokens (--split train): validation data must not shape an artifact")
    wanted = matrices(shapes)
    for name in sorted(wanted.keys() | measured.keys()):
        require(measured.get(name) == wanted.get(name) and bool(points.get(name)), f"sensitivity map, tensor {name}", None,
                measured.get(name, "nothing"), f"{wanted.get(name, 'nothing')}: the map is of another model")
    return SensitivityMap(points)


# ----------------------------------------------------------------------------------------------------------------------
# Corrections: low-rank factors and kept values, added where they remove most expected loss a byte.
# ----------------------------------------------------------------------------------------------------------------------

TARGETS = {     # INT8_TARGETED_RESIDUAL_MODE -> (substrings of the names, blocks)
    "off": (("",), None), "all_mlp_proj": (("mlp.proj.",), None), "early_mlp_proj": (("mlp.proj.",), 4),
    "all_attn_proj": (("attn.proj.",), None), "early_proj_combo": (("mlp.proj.", "attn.proj."), 4),
}
KEPT_SHARES = {"rows": 1 / 64, "cols": 1 / 64, "entries": 1 / 1024}     # what a plan may keep of a matrix: all or none of it


def is_target(name: str, mode: str) -> bool:
    """Whether a tensor may have a correction."""
    parts, blocks = TARGETS[mode]
    block = re.match(r"blocks\.(\d+)\.", name)
    return any(part in name for part in parts) and (blocks is None or (block is not None and int(block[1]) < blocks))


def low_rank(error: Tensor, terms: Sequence[Term], rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors a (rank, out), b (rank, in) such that sum_k a_k b_k^T removes the most expected loss from `error` (out, in).

    One direction after the other by power iteration on e H e^T D, D = diag(rows) and H = moment: its leading eigenvector u
    with b = u^T e is the leading singular pair of D^(1/2) e H^(1/2) (weighted low-rank approximation; Eckart & Young 1936
    for D = H = I, where it is the SVD's). Several uses add up inside the iteration; their common b is that of the sum of
    their row costs. The start is the row of the largest weighted norm, so nothing is random.
    """
    uses = [t for t in terms if not t.transposed] or [Term(torch.ones(error.shape[0]), torch.eye(error.shape[1]))]
    cost = sum((t.rows for t in uses), torch.zeros(())).clamp_min(1e-30)
    rest, a, b = error.float(), [], []
    for _ in range(min(rank, *error.shape)):
        u = torch.zeros(error.shape[0])
        u[int(((rest * rest).sum(1) * cost).argmax())] = 1.0
        for _ in range(iterations):
            u = sum((rest @ (t.moment @ (rest.T @ (t.rows * u))) for t in uses), torch.zeros(()))
            u = u / u.norm().clamp_min(1e-30)
        v = rest.T @ (cost * u) / (cost * u * u).sum().clamp_min(1e-30)
        rest = rest - u[:, None] * v
        size = v.norm().clamp_min(1e-30).sqrt()
        a.append(u * size)
        b.append(v / size)
    return torch.stack(a), torch.stack(b)


def store_factors(error: Tensor, terms: Sequence[Term], a: Tensor, b: Tensor, kind: str) -> dict[str, Tensor]:
    """The factors as the file will hold them; b is fitted once more to what is left of a after rounding."""
    if kind == "f16":
        return {"f16": torch.cat([a.half().reshape(-1), b.half().reshape(-1)])}
    bits, grid = (8, 127.0) if kind == "int8" else (2, 1.5)
    scale = a.abs().amax(1) if kind == "int8" else a.abs().amax().reshape(1)
    scale = (scale / grid).half().clamp_min(2**-24)
    codes = (a / scale.float()[:, None]).round().clamp(-(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1)
    stored = codes * scale.float()[:, None]
    uses = [t.rows for t in terms if not t.transposed]
    cost = torch.stack(uses).sum(0).clamp_min(1e-30) if uses else torch.ones(a.shape[1])
    cost = cost / cost.mean()
    normal = (stored * cost) @ stored.T
    normal = normal + 1e-6 * normal.diagonal().mean().clamp_min(1e-30) * torch.eye(len(a))
    b = torch.linalg.solve(normal.double(), ((stored * cost) @ error.float()).double()).float()
    if kind == "int8":
        b_scale = (b.abs().amax(1) / 127).half().clamp_min(2**-24)
        b_codes = (b / b_scale.float()[:, None]).round().clamp(-127, 127)
        values = torch.cat([codes.reshape(-1), b_codes.reshape(-1)]).to(torch.int8).view(torch.uint8)
        return {"factors": values, "scales": torch.cat([scale, b_scale])}
    groups = torch.nn.functional.pad(b.reshape(-1), (0, -b.numel() % LQER_GROUP)).view(-1, LQER_GROUP)
    b_scale = (groups.abs().amax(1) / 7.5).half().clamp_min(2**-24)
    b_codes = (groups / b_scale.float()[:, None]).round().clamp(-8, 7).reshape(-1)[:b.numel()]
    values = torch.cat([pack_bits(codes.reshape(-1), 2), pack_bits(b_codes, 4)])
    return {"factors": values, "scales": torch.cat([scale, b_scale])}


def corrected(stored: Stored, error: Tensor, terms: Sequence[Term], a: Tensor, b: Tensor, kind: str) -> Stored:
    """`stored` with a correction of its error."""
    row, values = replace(stored.row, rank=len(a), factors=kind), dict(stored.values)
    for stream, part in store_factors(error, terms, a, b, kind).items():
        own = values.get(stream, np.zeros(0, STREAM_TYPES[stream]))
        values[stream] = np.concatenate([own, part.numpy()])
    return Stored(row, values)


def keeping(stored: Stored, w: Tensor, error: Tensor, terms: Sequence[Term], kind: str) -> Stored:
    """`stored` with the slices or entries of the largest expected loss kept in half precision, their codes zero."""
    row_cost, col_cost = weight_costs(terms) if terms else (torch.ones(w.shape[0]), torch.ones(w.shape[1]))
    loss = error.float().square() * row_cost[:, None] * col_cost
    loss = {"rows": loss.sum(1), "cols": loss.sum(0), "entries": loss.view(-1)}[kind]
    count = max(1, int(loss.numel() * KEPT_SHARES[kind]))
    at = loss.topk(count).indices.sort().values
    codes = torch.from_numpy(stored.values["codes"].copy()).view(w.shape)
    view, source = {"rows": (codes, w), "cols": (codes.T, w.T), "entries": (codes.view(-1), w.reshape(-1))}[kind]
    view[at] = 0
    values = {**stored.values, "codes": codes.reshape(-1).numpy(), "index": at.numpy().astype(np.uint32),
              "f16": source[at].half().reshape(-1).numpy()}
    return Stored(replace(stored.row, kept=kind, kept_count=count), values)


@dataclass(frozen=True)
class Offer:
    """One way to store a tensor: what it takes and leaves."""
    stored: Stored
    nbytes: int         # beyond the plain one
    loss: float         # expected

    @property
    def low_rank_bytes(self) -> int:
        return self.nbytes if self.stored.row.rank else 0


def offers(plain: Stored, w: Tensor, judge: Judge, options: ExportOptions, keep: bool) -> list[Offer]:
    """The plain tensor first, then every correction that the options allow and that lowers the expected loss."""
    error = w.double() - restore(plain.row, plain.values).double()
    found, terms = [Offer(plain, 0, judge.loss(plain.row.name, w, error))], judge.terms(plain.row.name)
    ways: list[Stored] = [keeping(plain, w, error, terms, kind) for kind in KEPT_SHARES] if keep else []
    if options.int8_residual_rank and is_target(plain.row.name, options.int8_targeted_residual_mode):
        a, b = low_rank(error, terms, options.int8_residual_rank, options.int8_residual_power_iters)
        kinds = FACTORS if options.int8_residual_storage == "auto" else (options.int8_residual_storage,)
        ways += [corrected(plain, error, terms, a[:r], b[:r], kind) for r in range(1, len(a) + 1) for kind in kinds]
    for way in ways:
        left = judge.loss(plain.row.name, w, w.double() - restore(way.row, way.values).double())
        if left < found[0].loss:
            extra = {kind: n - plain.row.counts.get(kind, 0) for kind, n in way.row.counts.items()}
            nbytes = sum(n * np.dtype(STREAM_TYPES[kind]).itemsize for kind, n in extra.items())
            found.append(Offer(way, nbytes, left))
    return found


def spend(offered: Mapping[str, Sequence[Offer]], budget: int, price: float, room: float = math.inf) -> dict[str, Stored]:
    """Take offers, whichever removes most loss a byte, while those of low rank fit the budget, all together fit the room,
    and they remove more than `price` a byte.
    """
    taken = {name: way[0] for name, way in offered.items()}
    while True:
        steps = [((now.loss - offer.loss) / (offer.nbytes - now.nbytes), name, k) for name, now in taken.items()
                 for k, offer in enumerate(offered[name]) if now.nbytes < offer.nbytes <= now.nbytes + room
                 and offer.low_rank_bytes - now.low_rank_bytes <= budget]
        rate, name, k = max(steps, default=(0.0, "", 0))
        if rate <= price:
            return {name: offer.stored for name, offer in taken.items()}
        before, taken[name] = taken[name], offered[name][k]
        budget -= taken[name].low_rank_bytes - before.low_rank_bytes
        room -= taken[name].nbytes - before.nbytes


def correct(tensors: Mapping[str, Stored], state: Mapping[str, Tensor], judge: Judge, options: ExportOptions,
            price: float | None, room: float = math.inf) -> dict[str, Stored]:
    """Add corrections within INT8_RESIDUAL_BUDGET_BYTES. With a price (loss a byte), as an allocation pays it elsewhere,
    only what is worth it, kept values included. Raises ExportRefused when the budget holds none.
    """
    rank, budget = options.int8_residual_rank, options.int8_residual_budget_bytes
    found = {
        name: offers(stored, state[name], judge, options, keep=price is not None)
        for name, stored in tensors.items() if stored.row.codec == "int" and len(stored.row.shape) == 2
        and (price is not None or (rank and is_target(name, options.int8_targeted_residual_mode)))}
    cheapest = min((offer.nbytes for way in found.values() for offer in way[1:]), default=0)
    if rank and price is None and cheapest > budget:
        raise ExportRefused(f"INT8_RESIDUAL_BUDGET_BYTES={budget} holds no correction: the smallest takes {cheapest} bytes")
    return {**tensors, **spend(found, budget, price or 0.0, room)}


# ----------------------------------------------------------------------------------------------------------------------
# Symmetries: reorderings that leave the network's function as it is; the file stores none of them.
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Allocation: the steps of all tensors from one price of a byte.
# ----------------------------------------------------------------------------------------------------------------------

ANCHORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 127.0)     # q_max at which bytes and loss are measured
STEPS_PER_OCTAVE = 32                                       # between them both are interpolated, on logarithmic axes


@dataclass(frozen=True)
class Curve:
    """What each choice for one tensor takes and loses; only those that no other choice beats in both."""
    choices: list[Choice]
    nbytes: np.ndarray      # ascending
    loss: np.ndarray        # descending


def rate_curve(name: str, w: Tensor, judge: Judge, options: ExportOptions) -> Curve:
    """Measure the choices for one tensor: by the deflated size of codes and scales, and the judge's view of the error."""
    w = w.detach().cpu()
    points: list[tuple[float, float, Choice]] = []
    half = store(name, w, Choice("f16"), options)
    points.append((len(pack_stream([half.values["f16"]])[1]), judged(judge, w, half), Choice("f16")))
    if is_control(name) or w.ndim < 2:
        full = store(name, w, Choice("f32"), options)
        points.append((len(pack_stream([full.values["f32"]])[1]), 0.0, Choice("f32")))
        if is_control(name):
            points = points[:1] if options.export_allocate != "uniform" and math.isfinite(points[0][1]) else points[1:]
    costs = weight_costs(judge.terms(name)) if judge.terms(name) else None
    if not is_control(name):
        for choice in int_choices(name, w, costs is not None, options):
            points += interpolated(name, w, choice, costs, judge, options)
    points.sort(key=lambda p: (p[0], p[1]))
    lowest, front = math.inf, []
    for point in points:
        if point[1] < lowest:
            lowest = point[1]
            front.append(point)
    peak = float(w.abs().max())
    require(bool(front), f"tensor {name}", None, f"magnitudes up to {peak:g}", "what half precision can hold")
    nbytes, loss, choices = zip(*front, strict=True)
    return Curve(list(choices), np.array(nbytes, np.float64), np.array(loss))


def judged(judge: Judge, w: Tensor, stored: Stored) -> float:
    left = restore(stored.row, stored.values)
    return judge.loss(stored.row.name, w, w.double() - left.double()) if bool(left.isfinite().all()) else math.inf


def int_choices(name: str, w: Tensor, with_costs: bool, options: ExportOptions) -> list[Choice]:
    """The families of steps that an allocation compares; the uniform plan's alone where nothing says what errors cost."""
    if w.ndim != 2:
        return [Choice("int")]
    if options.export_allocate == "uniform":
        axis = options.int8_axis_mode
        return [Choice("int", better_axis(w, 127, options) if axis == "auto" else axis)]
    return [Choice("int", "row"), Choice("int", "col")] + (
        [Choice("int", axis, weighted=True) for axis in AXES] if with_costs else [])


def interpolated(name: str, w: Tensor, family: Choice, costs: tuple[Tensor, Tensor] | None, judge: Judge,
                 options: ExportOptions) -> list[tuple[float, float, Choice]]:
    """(bytes, loss, choice) along one family: measured at ANCHORS, interpolated between."""
    nbytes, loss = [], []
    for q_max in ANCHORS:
        stored = store(name, w, replace(family, q_max=q_max), options, costs)
        layout = layouts_of(stored.row)[-1]     # by scale, for matrices
        coded = pack_codes(stored, [layout], thorough=False)[2]
        nbytes.append(len(coded) + len(pack_stream([stored.values["scales"]])[1]))
        loss.append(max(judged(judge, w, stored), 1e-300))
    octaves = np.arange(0, np.log2(ANCHORS[-1]), 1 / STEPS_PER_OCTAVE)
    log_loss = np.interp(octaves, np.log2(ANCHORS), np.log(loss))
    sizes = np.interp(octaves, np.log2(ANCHORS), nbytes)
    return [(float(n), math.exp(g), replace(family, q_max=float(2**o)))
            for n, g, o in zip(sizes, log_loss, octaves, strict=True)]


def solve(curves: Mapping[str, Curve], budget: float) -> tuple[dict[str, int], float]:
    """(the choice for each tensor, loss a byte at the margin) of the least total loss within the budget.

    Each tensor minimises loss + price x bytes by itself and the price is bisected (Shoham & Gersho 1988); what is left of
    the budget goes to the single upgrades that remove most loss a byte. Where even the smallest choices exceed the budget
    these are the answer.
    """
    def pick(price: float) -> dict[str, int]:
        return {name: int((c.loss + price * c.nbytes).argmin()) for name, c in curves.items()}

    def size(at: Mapping[str, int]) -> float:
        return sum(curves[name].nbytes[k] for name, k in at.items())

    low, high = -80.0, 80.0                                 # ln of the price: below low everything is at its finest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(pick(math.exp(middle))) > budget else (low, middle)
    at, price = pick(math.exp(high)), math.exp(high)
    left = budget - size(at)
    while left > 0:
        best = (0.0, "", 0)
        for name, c in curves.items():
            k = at[name]
            more = c.nbytes[k + 1:] - c.nbytes[k]
            fits = int(np.searchsorted(more, left, side="right"))
            if fits:
                rates = (c.loss[k] - c.loss[k + 1:k + 1 + fits]) / np.maximum(more[:fits], 1e-9)
                best = max(best, (float(rates.max()), name, k + 1 + int(rates.argmax())))
        if best[0] <= 0:
            break
        left -= curves[best[1]].nbytes[best[2]] - curves[best[1]].nbytes[at[best[1]]]
        at[best[1]] = best[2]
    return at, price


# ----------------------------------------------------------------------------------------------------------------------
# Entropy coding: byte planes and deflate, the smallest of a few strategies.
# ----------------------------------------------------------------------------------------------------------------------

# Measured on int8 codes of normal weights, above their order-0 entropy: Huffman-only 0.6 % at 7.4 bits a code and 1.5 %
# at 3.2, where level 9 has 0.9 and 16.5 %. Filtered wins where zeros come in runs, the default on header and scales.
STRATEGIES = (zlib_ng.Z_HUFFMAN_ONLY, zlib_ng.Z_FILTERED, zlib_ng.Z_DEFAULT_STRATEGY)
MAX_DEFAULT_STRATEGY_BYTES = 2**16      # beyond, filtered is as good as the default within 0.2 %


def to_planes(values: np.ndarray) -> bytes:
    """All first bytes, then all second bytes, ...: exponents beside exponents (after deflate fp16 -8 %, fp32 -10 %)."""
    assert sys.byteorder == "little", "numpy's and torch's native values are written as they are"
    return values.view("u1").reshape(-1, values.itemsize).T.tobytes()


def from_planes(raw: bytes, dtype: str) -> np.ndarray:
    return np.frombuffer(raw, "u1").reshape(np.dtype(dtype).itemsize, -1).T.copy().reshape(-1).view(dtype)


def deflate(raw: bytes) -> bytes:
    """The smallest raw deflate stream of a few strategies; of a long one those that win on its start."""
    start = raw[:MAX_DEFAULT_STRATEGY_BYTES]
    tries = {strategy: deflate_by(start, strategy) for strategy in STRATEGIES}
    if len(start) == len(raw):
        return min(tries.values(), key=len)
    best = min(STRATEGIES[:-1], key=lambda strategy: len(tries[strategy]))
    return deflate_by(raw, best)


def deflate_by(raw: bytes, strategy: int) -> bytes:
    """Memory level 9 halves the number of Huffman tables (-0.2 % on int8 codes)."""
    packer = zlib_ng.compressobj(9, zlib_ng.DEFLATED, -zlib_ng.MAX_WBITS, 9, strategy)
    return packer.compress(raw) + packer.flush()


def to_digits(codes: np.ndarray, limit: int) -> np.ndarray:
    """Codes of -limit..limit as digits in base 2 limit + 1, several to a byte: deflate spends at least a bit on a symbol."""
    per = digits_per_byte(limit)
    digits = np.zeros(-(-codes.size // per) * per, np.uint8)
    digits[:codes.size] = codes + limit
    return (digits.reshape(-1, per) * digit_values(limit)).sum(1, dtype=np.uint8)


def from_digits(packed: np.ndarray, limit: int, count: int) -> np.ndarray:
    digits = packed[:, None] // digit_values(limit) % np.uint8(2 * limit + 1)
    return digits.reshape(-1)[:count].view(np.int8) - np.int8(limit)


def digit_values(limit: int) -> np.ndarray:
    return ((2 * limit + 1) ** np.arange(digits_per_byte(limit))).astype(np.uint8)


def digits_per_byte(limit: int) -> int:
    per = 1
    while (2 * limit + 1) ** (per + 1) <= 256:
        per += 1
    return per


def arranged(row: PlanRow, layout: str, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A tensor's codes, given in row order, in the order of a layout."""
    if layout == "rows":
        return codes
    slices = codes.reshape(row.shape) if layout.startswith("rows") else codes.reshape(row.shape).T
    return slices[slice_order(row, layout, scales)].reshape(-1)


def in_row_order(row: PlanRow, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The reverse of `arranged` for the row's own layout."""
    if row.layout == "rows":
        return codes
    by_rows = row.layout.startswith("rows")
    slices = np.empty(row.shape if by_rows else row.shape[::-1], np.int8)
    slices[slice_order(row, row.layout, scales)] = codes.reshape(slices.shape)
    return (slices if by_rows else slices.T).reshape(-1)


def slice_order(row: PlanRow, layout: str, scales: np.ndarray) -> slice | np.ndarray:
    """Rows or columns in the order of their scales, or as they are."""
    n_row, n_col = row.scale_counts
    own = scales[:n_row] if layout.startswith("rows") else scales[n_row:n_row + n_col]
    return np.argsort(own, kind="stable") if layout.endswith("by_scale") else slice(None)


def layouts_of(row: PlanRow) -> list[str]:
    """Those that a tensor can have; the reader derives the order from the scales, so sorting costs nothing."""
    if len(row.shape) != 2:
        return ["rows"]
    n_row, n_col = row.scale_counts
    return ["rows", "cols"] + ["rows_by_scale"] * bool(n_row) + ["cols_by_scale"] * bool(n_col)


def pack_codes(stored: Stored, layouts: Sequence[str] = (), thorough: bool = True) -> tuple[str, int, bytes]:
    """(layout, method, coded bytes), the smallest of the layouts; a quick look tries Huffman codes alone."""
    row, codes = stored.row, stored.values["codes"].reshape(-1)
    limit, tries = int(np.abs(codes).max()), []
    for layout in layouts or layouts_of(row):
        own = arranged(row, layout, codes, stored.values["scales"])
        raws = [(DEFLATE, own.tobytes())]
        if 1 <= limit <= MAX_RADIX_CODE:
            raws.append((DEFLATE + limit, to_digits(own, limit).tobytes()))
        for method, raw in raws if thorough else raws[-1:]:
            coded = deflate(raw) if thorough else deflate_by(raw, zlib_ng.Z_HUFFMAN_ONLY)
            tries.append((layout, method, coded) if len(coded) < len(own) else (layout, STORED, own.tobytes()))
    return min(tries, key=lambda t: len(t[2]))


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


def pack_header(meta: bytes, plan: tuple[PlanRow, ...], table: Iterable[tuple[int, int]]) -> bytes:
    """The header before deflate; the table holds (method, coded bytes) of each stream."""
    parts = [struct.pack("<I", len(meta)), meta, struct.pack("<H", len(plan))]
    for row in plan:
        name, ndim = row.name.encode("ascii"), len(row.shape)
        kinds = (tuple(DTYPES).index(row.dtype), CODECS.index(row.codec), AXES.index(row.axis), LAYOUTS.index(row.layout),
                 KEPT.index(row.kept), row.rank, FACTORS.index(row.factors))
        parts += [struct.pack("B", len(name)), name, struct.pack(f"<7BIB{ndim}I", *kinds, row.kept_count, ndim, *row.shape)]
    return b"".join(parts + [struct.pack("<BI", *entry) for entry in table])


def parse_header(raw: bytes) -> tuple[dict[str, Any], tuple[PlanRow, ...], list[tuple[int, int]]]:
    """(meta, plan, table): every field bounded, nothing left over."""
    cursor = Cursor(raw)
    text = cursor.take(cursor.number("<I", "header.meta_bytes", 2, MAX_HEADER_BYTES), "header.meta")
    meta = parse_meta(text, "header.meta", 4)
    require(pack_meta(meta) == text, "header.meta", 4, "another spelling", "canonical JSON")
    plan: list[PlanRow] = []
    for i in range(cursor.number("<H", "header.rows", 0, MAX_TENSORS)):
        plan.append(parse_row(cursor, f"header.row[{i}]", plan[-1].name if plan else ""))
    check_total(plan, cursor.at)
    table = []
    for stream in stream_counts(plan):
        most = DEFLATE + MAX_RADIX_CODE if stream.startswith("codes:") else DEFLATE
        table.append((cursor.number("B", f"header.table[{stream}].method", STORED, most),
                      cursor.number("<I", f"header.table[{stream}].coded_bytes", 0, 2**32 - 1)))
    require(cursor.at == len(raw), "header", cursor.at, f"{len(raw) - cursor.at} bytes after its last field", "none")
    return meta, tuple(plan), table


def parse_row(cursor: Cursor, field: str, previous_name: str) -> PlanRow:
    def kind(name: str, among: Sequence[str], allowed: Sequence[str]) -> str:
        start = cursor.at
        value = str(among[cursor.number("B", f"{field}.{name}", 0, len(among) - 1)])
        require(value in allowed, f"{field}.{name}", start, value, ", ".join(allowed))
        return value

    size = cursor.number("B", f"{field}.name_bytes", 1, 255)
    start, name = cursor.at, cursor.take(size, f"{field}.name").decode("latin-1")
    require(is_name(name), f"{field}.name", start, ascii(name), "printable ASCII")
    require(name > previous_name, f"{field}.name", start, ascii(name), f"a name after {previous_name!a}")
    dtype = kind("dtype", tuple(DTYPES), tuple(DTYPES))
    codec = kind("codec", CODECS, CODECS[:3] if dtype in FLOATS else CODECS[3:])
    tail = cursor.at                    # what the next fields may be depends on the shape, which follows them
    cursor.take(struct.calcsize("<5BI"), f"{field}.axis")
    ndim = cursor.number("B", f"{field}.ndim", 0, MAX_NDIM)
    shape = tuple(cursor.number("<I", f"{field}.dims[{d}]", 1, MAX_RAW_BYTES) for d in range(ndim))
    end, cursor.at, matrix = cursor.at, tail, codec == "int" and ndim == 2
    axis = kind("axis", AXES, AXES if matrix else AXES[:1])
    bare = PlanRow(name, shape, dtype, codec, axis)
    layout = kind("layout", LAYOUTS, layouts_of(bare) if matrix else LAYOUTS[:1])
    kept = kind("kept", KEPT, KEPT if matrix else KEPT[:1])
    rank = cursor.number("B", f"{field}.rank", 0, min(MAX_RANK, *shape) if matrix else 0)
    factors = kind("factors", FACTORS, FACTORS if rank else FACTORS[:1])
    most = {"none": 0, "rows": shape[0], "cols": shape[1], "entries": bare.numel}[kept] if matrix else 0
    count = cursor.number("<I", f"{field}.kept_count", min(most, 1), most)
    cursor.at = end
    return replace(bare, layout=layout, kept=kept, kept_count=count, rank=rank, factors=factors)


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
    limit, raw_bytes = method - DEFLATE, count * np.dtype(dtype).itemsize
    if method == STORED:
        require(len(body) == raw_bytes, stream, offset, f"{len(body)} stored bytes", raw_bytes)
        return from_planes(body, dtype)
    if limit:
        raw_bytes = -(-count // digits_per_byte(limit))
    most = MAX_DEFLATE_RATIO * len(body)
    require(1 <= raw_bytes <= most, stream, offset, f"{raw_bytes} bytes in {len(body)} deflated", f"1..{most}")
    raw = inflate(body, raw_bytes, stream, offset)
    if not limit:
        return from_planes(raw, dtype)
    packed = np.frombuffer(raw, np.uint8)
    codes, largest = from_digits(packed, limit, count), (2 * limit + 1) ** digits_per_byte(limit) - 1
    sound = packed.max() <= largest and (to_digits(codes, limit) == packed).all()
    require(sound, stream, offset, f"bytes up to {packed.max()}, or digits after the last code", f"at most {largest}, zeros")
    return codes


def parse_tensor(row: PlanRow, values: dict[str, np.ndarray], offsets: Mapping[str, int]) -> Tensor:
    """Restore one tensor from streams that may say anything; its codes come out in row order."""
    if row.codec == "int":
        scales, stream = values["scales"], stream_of("codes", row)
        sound = (np.isfinite(scales) & (scales > 0)).all()
        require(sound, f"scales of {row.name}", offsets["scales"], f"{scales.min()}..{scales.max()}", "finite, above 0")
        low = int(values["codes"].min())
        require(low >= -MAX_CODE, stream, offsets[stream], low, f"{-MAX_CODE}..{MAX_CODE}")
        values["codes"] = in_row_order(row, values["codes"], scales)
    if row.kept != "none":
        at = values["index"].astype(np.int64)
        most = row.numel if row.kept == "entries" else row.shape[KEPT.index(row.kept) - 1]
        ascending = (np.diff(at, prepend=-1) > 0).all() and at[-1] < most
        require(ascending, f"index of {row.name}", offsets["index"], f"{at.min()}..{at.max()}", f"ascending, below {most}")
    if row.dtype == "bool":
        high = int(values["raw"].max())
        require(high <= 1, f"raw of {row.name}", offsets["raw"], high, "0 or 1")
    tensor = restore(row, values)
    stream = stream_of(next(iter(values)), row)
    finite = bool(tensor.isfinite().all()) and all(np.isfinite(array).all() for array in values.values())
    require(finite, f"values of {row.name}", offsets[stream], "one not finite", "finite values")     # factors too
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
    floored_share: float        # of the quantised weights: those whose step sits at INT8_SCALE_FLOOR
    rms_error: float            # of the quantised weights, relative to their own rms
    planned_bytes: int = 0      # what an allocation expected the total to be; 0 = there was none
    expected_nats: float | None = None          # loss increase that its statistics or map expect, nats a token
    permutation_gains: dict[str, int] = field(default_factory=dict)     # bytes saved by kind of symmetry
    note: str = ""              # which lever ran out, if one did

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / max(self.weights, 1)

    def lines(self) -> list[str]:
        """What an export says beside its size."""
        error = self.total_bytes / self.planned_bytes - 1 if self.planned_bytes else 0.0
        nats = "" if self.expected_nats is None else f" expected_loss_increase:{self.expected_nats:.6f}"
        gains = " ".join(f"{kind}:{nbytes}" for kind, nbytes in self.permutation_gains.items())
        return [text for shown, text in (
            (gains, f"permuted: bytes saved {gains}"),
            (self.planned_bytes,
             f"allocated: planned {self.planned_bytes} bytes, came to {self.total_bytes} ({error:+.2%}){nats}"),
            (self.note, f"warning: {self.note}"),
        ) if shown]


@dataclass
class Export:
    """An export before and after it is bytes."""
    state: dict[str, Tensor]            # in the order of the file: permuted if that was asked for
    tensors: dict[str, Stored]
    data: bytes
    report: SizeReport


@dataclass
class Artifact:
    meta: dict[str, Any]
    plan: tuple[PlanRow, ...]
    state: dict[str, Tensor]
    parts: dict[str, int]                           # in the order of the file, summing exactly to its length
    values: dict[str, dict[str, np.ndarray]]        # tensor -> its values by kind of stream


def encode_artifact(
    state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, *,
    statistics: Statistics | None = None, sensitivity: SensitivityMap | None = None, code_bytes: int = 0,
) -> Export:
    """The bytes of the file, and what they cost and lose. `statistics` weigh errors; EXPORT_ALLOCATE=hessian needs them as
    =sensitivity needs its map. The total that is fitted to the cap includes `code_bytes`. Raises ArtifactError, ValueError.
    """
    if faults := options.problems():
        raise ValueError("; ".join(faults))
    for needed, given in (("hessian", statistics), ("sensitivity", sensitivity)):
        if options.export_allocate == needed and given is None:
            what = "calibration statistics" if needed == "hessian" else "a map"
            raise ValueError(f"EXPORT_ALLOCATE={needed} needs {what}")
    require(len(state) <= MAX_TENSORS, "state", None, f"{len(state)} tensors", f"at most {MAX_TENSORS}")
    for name in state:
        check_tensor(name, state[name])
    if statistics is not None:
        check_statistics(statistics, state)
    state = {name: state[name].detach().cpu() for name in sorted(state)}
    meta = {**meta, "export": options.changed} if options.changed else dict(meta)
    if options.export_rotate:
        state, statistics = rotated(state, statistics)
    if options.solves:
        return fitted(state, meta, options, statistics, sensitivity, code_bytes)
    choices = {name: uniform_choice(name, t, options) for name, t in state.items()}
    state, judge, gains = reordered(state, choices, options, Judge(statistics))
    export = carried_out(state, meta, options, choices, judge, None)
    export.report = replace(export.report, permutation_gains=gains)
    return export


def quantised(state: Mapping[str, Tensor], choices: Mapping[str, Choice], options: ExportOptions, judge: Judge
              ) -> dict[str, Stored]:
    return {name: store(name, t, choices[name], options, weight_costs(terms) if (terms := judge.terms(name)) else None)
            for name, t in state.items()}


def reordered(state: dict[str, Tensor], choices: Mapping[str, Choice], options: ExportOptions, judge: Judge
              ) -> tuple[dict[str, Tensor], Judge, dict[str, int]]:
    """State and judge in the order that EXPORT_PERMUTE finds for these choices, and the bytes saved by kind of symmetry."""
    gains: dict[str, int] = {}
    if options.export_permute == "off":
        return state, judge, gains
    tensors = quantised(state, choices, options, judge)
    state, statistics = permuted(state, tensors, judge.statistics, options.export_permute, gains)
    return state, Judge(statistics, judge.sensitivity), gains


def carried_out(state: dict[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, choices: Mapping[str, Choice],
                judge: Judge, price: float | None, room: float = math.inf) -> Export:
    """Quantise by the choices, correct, write."""
    tensors = correct(quantised(state, choices, options, judge), state, judge, options, price, room)
    return assembled(state, meta, options, tensors)


def assembled(state: dict[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, tensors: dict[str, Stored]
              ) -> Export:
    """The bytes of stored tensors."""
    assert list(tensors) == sorted(state), "the plan's rows are exactly the state's tensors"
    check_total((s.row for s in tensors.values()), None)
    quantised, floored, error, energy = 0, 0.0, 0.0, 0.0
    coded: dict[str, tuple[int, bytes]] = {}
    for name, stored in tensors.items():
        w, restored = state[name], restore(stored.row, stored.values)
        if not bool(restored.isfinite().all()):
            peak = float(w.double().abs().max())
            raise ArtifactError(f"tensor {name}", None, f"magnitudes up to {peak:g}", f"what {stored.row.codec} can hold")
        if stored.row.codec == "int":
            layout, method, body = pack_codes(stored)
            stored.row, coded[stream_of("codes", stored.row)] = replace(stored.row, layout=layout), (method, body)
            at_floor = float((stored.values["scales"] <= np.float16(options.int8_scale_floor)).mean())
            quantised, floored = quantised + w.numel(), floored + w.numel() * at_floor
            error, energy = error + sum_squares(w.double() - restored), energy + sum_squares(w)
    plan = tuple(s.row for s in tensors.values())
    for stream in list(stream_counts(plan))[len(coded):]:
        coded[stream] = pack_stream([s.values[stream] for s in tensors.values() if stream in s.values])
    table = [(method, len(body)) for method, body in coded.values()]
    text = pack_meta(dict(meta))
    require(pack_meta(parse_meta(text, "meta", None)) == text, "meta", None, "keys that are no strings", "a JSON object")
    data, header_bytes = frame(pack_header(text, plan, table), (body for _, body in coded.values()))
    parts = part_bytes(header_bytes, coded, table)
    assert sum(parts.values()) == len(data)
    rms_error = math.sqrt(error / energy) if energy else 0.0
    report = SizeReport(len(data), parts, sum(row.numel for row in plan), floored / max(quantised, 1), rms_error)
    return Export(state, tensors, data, report)


def fitted(state: dict[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, statistics: Statistics | None,
           sensitivity: SensitivityMap | None, code_bytes: int) -> Export:
    """The export of least expected loss whose bytes and `code_bytes` end within FIT_WINDOW_BYTES below the cap."""
    allocates = options.export_allocate != "uniform"
    if allocates:
        options = replace(options, int8_scale_floor=0.0)
    judge = Judge(statistics, sensitivity)
    view = judge if allocates else Judge()
    curves = {name: rate_curve(name, t, view, options) for name, t in state.items() if dtype_name(t) in FLOATS}
    high = options.artifact_cap_bytes - code_bytes
    low, overhead, plans, aim = high - FIT_WINDOW_BYTES, 0.0, [], high - min(FIT_WINDOW_BYTES / 4, high / 200)
    best, best_is_finest, best_choices, gains = None, False, {}, {}
    while True:
        at, price = solve(curves, aim - overhead)
        choices = {name: curves[name].choices[at[name]] if name in curves else Choice("raw") for name in state}
        if not plans:
            state, judge, gains = reordered(state, choices, options, judge)
        export = carried_out(state, meta, options, choices, judge, price if allocates else None)
        total = len(export.data)
        nbytes, loss = (sum(float(side[at[name]]) for name, side in sides) for sides in (
            [(name, c.nbytes) for name, c in curves.items()],
            [(name, c.loss) for name, c in curves.items() if not is_control(name)]))    # nothing says theirs in nats
        export.report = replace(
            export.report, planned_bytes=round(nbytes + overhead), expected_nats=loss if allocates else None)
        if total <= high and (best is None or total >= len(best.data)):
            best, best_choices = export, choices
            best_is_finest = all(at[name] == len(c.nbytes) - 1 for name, c in curves.items())
        coarsest, finest = (all(at[name] == k % len(c.nbytes) for name, c in curves.items()) for k in (0, -1))
        accurate = abs(total - nbytes - overhead) <= 0.005 * total
        stuck = at in plans or len(plans) == 10     # the steps between two plans can be larger than the window
        plans.append(at)
        if (low <= total <= high and accurate) or (coarsest and total > high) or (finest and total < low) or stuck:
            break
        overhead = total - nbytes       # what the curves do not see: header, shared streams, layouts, corrections
    if best is not None and len(best.data) < low and allocates and not best_is_finest:
        best = filled(best, low, high, lambda room: carried_out(state, meta, options, best_choices, judge, 0.0, room))
    if best is None:        # corrections can make a coarse plan larger than a fine one: the last resort has none
        choices = {name: curves[name].choices[0] if name in curves else Choice("raw") for name in state}
        best = export = carried_out(state, meta, replace(options, int8_residual_rank=0), choices, judge, None)
        best.report = replace(best.report, planned_bytes=len(best.data))
    if len(best.data) > high:
        raise ArtifactError("plan", None, f"{len(best.data)} bytes at its coarsest beside {code_bytes} of code",
                            f"at most ARTIFACT_CAP_BYTES={options.artifact_cap_bytes}; choose a smaller shape")
    best.report = replace(best.report, permutation_gains=gains)
    if len(best.data) < low:
        floor = f" (INT8_SCALE_FLOOR={options.int8_scale_floor:.6g})" if options.int8_scale_floor else ""
        why = "every tensor is at its finest" if best_is_finest else "no finer choice of a tensor fits"
        best.report = replace(best.report, note=f"{low - len(best.data)} bytes short of the window: {why}{floor}")
    return best


def filled(best: Export, low: float, high: float, with_room: Callable[[float], Export]) -> Export:
    """Where the steps between plans are larger than the window, corrections fill it, worth their price elsewhere or not."""
    plain = len(with_room(0.0).data)
    room = wanted = (low + high) / 2 - plain
    for _ in range(4):
        export = with_room(room)
        if len(best.data) < len(export.data) <= high:
            report = replace(export.report, planned_bytes=best.report.planned_bytes, expected_nats=best.report.expected_nats)
            best = replace(export, report=report)
        if low <= len(export.data) <= high:
            break
        room *= wanted / max(len(export.data) - plain, 1)   # the room counts bytes before deflate
    return best


def part_bytes(header_bytes: int, streams: Iterable[str], table: Iterable[tuple[int, int]]) -> dict[str, int]:
    coded = {stream: coded_bytes for stream, (_, coded_bytes) in zip(streams, table, strict=True)}
    return {"frame": FIXED.size, "header": header_bytes, **coded, "checksum": CHECKSUM_BYTES}


def decode_artifact(data: bytes) -> Artifact:
    """The state, bit for bit as the encoder reconstructed it."""
    raw_header, start = unframe(data)
    meta, plan, table = parse_header(raw_header)
    counts, end = stream_counts(plan), len(data) - CHECKSUM_BYTES
    total = sum(coded_bytes for _, coded_bytes in table)
    require(start + total == end, "streams", start, f"{total} bytes in the table", f"{end - start} up to the checksum")
    streams, offsets, at = {}, {}, start
    for (stream, count), (method, coded_bytes) in zip(counts.items(), table, strict=True):
        streams[stream] = parse_stream(data[at:at + coded_bytes], method, stream, count, at)
        offsets[stream], at = at, at + coded_bytes
    used, state, values = dict.fromkeys(counts, 0), {}, {}
    for row in plan:
        own = values[row.name] = {}
        for kind, count in row.counts.items():
            stream = stream_of(kind, row)
            own[kind] = streams[stream][used[stream]:used[stream] + count]
            used[stream] += count
        state[row.name] = parse_tensor(row, own, offsets)
    assert used == counts
    return Artifact(meta, plan, state, part_bytes(start - FIXED.size, counts, table), values)


def save_artifact(path: str | os.PathLike[str], state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions,
                  **given: Any) -> Export:
    """Write the file, whole or not at all; `given` as for `encode_artifact`."""
    export = encode_artifact(state, meta, options, **given)
    write_atomically(Path(path), export.data)
    return export


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


TAIL = 1.07     # largest weight of a trained row over that of normals (rows of three 4x256 models: 1.05..1.09)


def predict_artifact_bytes(shapes: Mapping[str, tuple[int, ...]], options: ExportOptions, code_bytes: int = 0) -> int:
    """The size of a trained model's artifact from its shapes alone: within 1 % at 3 bits and above unless
    INT8_SCALE_FLOOR sets the steps, within 2 % at 2 bits.

    It assumes normal weights with one sigma per row, fp32 tensors, and meta of some 400 bytes; `auto` counts as rows.
    Under a floor other than 0 an undertrained model comes out smaller, because the floor and not the weights sets its
    steps. An export that fits itself to the cap is predicted where it will aim, as far as its coarsest and finest plans
    allow.
    """
    if options.solves:
        finest, coarsest = (
            predicted_bytes(shapes, replace(options, cap_policy="warn", export_allocate="uniform", int8_scale_floor=0.0,
                                            int8_clip_sigmas=0.0, int8_keep_float_max_numel=numel), q_max)
            for numel, q_max in ((2**62, None), (1024, 1.0)))
        high = options.artifact_cap_bytes - code_bytes
        # Ternary codes depend most on the shape of the weights' distribution: better to refuse than to end over the cap.
        return round(min(max(high - min(FIT_WINDOW_BYTES / 4, high / 200), 1.15 * coarsest), finest))
    return round(predicted_bytes(shapes, options, None))


def predicted_bytes(shapes: Mapping[str, tuple[int, ...]], options: ExportOptions, q_max: float | None) -> float:
    """The sum over tensors; `q_max` replaces that of the options."""
    total = FIXED.size + CHECKSUM_BYTES + 500.0                 # 500: meta and the rest of the deflated header
    for name, shape in shapes.items():
        numel, choice = math.prod(shape), storage(name, shape, "float32", options)
        total += 7                                              # a plan row, deflated
        if choice.codec == "int":
            n_scales = shape[choice.axis == "col"] if len(shape) == 2 else 1
            bits_a_code, per_byte, table_bytes = code_statistics(
                numel // n_scales, numel, q_max or choice.q_max, options.int8_clip_sigmas)
            tables = math.ceil(numel / per_byte / 2**15) * table_bytes
            total += min(numel * bits_a_code / 8 + tables, numel)
            total += 1.3 * n_scales                             # a mantissa byte each; the exponents are alike
        else:
            total += numel * {"f16": 1.69, "f32": 3.2}[choice.codec]    # trained controls after planes and deflate
    extra = options.int8_residual_budget_bytes if options.int8_residual_rank else 0
    return total + extra


@lru_cache(maxsize=1024)
def code_statistics(n: int, numel: int, q_max: float, sigmas: float) -> tuple[float, int, float]:
    """(bits a code, codes a byte, bytes a Huffman table) when deflate codes rows of n normals, rounded by the step
    max|x| / q_max, or sigmas / q_max where sigmas is not 0.
    """
    normal, slices = NormalDist(), 1 if sigmas else 16
    clips = [sigmas or TAIL * normal.inv_cdf((1 + ((i + 0.5) / slices) ** (1 / n)) / 2) for i in range(slices)]
    reach = TAIL * normal.inv_cdf(1 - 0.25 / numel) / min(clips)        # of the tensor's largest weight, in clips
    limit = max(1, math.floor(min(1.0, reach) * q_max + 0.5))
    shares = np.zeros(limit + 1)                                        # of codes by magnitude
    for clip in clips:
        below = [2 * normal.cdf((code + 0.5) * clip / q_max) - 1 for code in range(limit)] + [1.0]
        shares += np.diff(below, prepend=0.0) / slices
    codes = np.concatenate([shares[:0:-1] / 2, shares[:1], shares[1:] / 2])
    entropy = -float(codes @ np.log2(np.maximum(codes, 1e-300)))
    per_byte = digits_per_byte(limit) if limit <= MAX_RADIX_CODE else 1
    symbols = codes
    for _ in range(per_byte - 1):
        symbols = np.outer(symbols, codes).reshape(-1)
    held = float((1 - np.exp(-(2**15) * symbols)).sum())                # that a block of 2^15 symbols holds
    # Where most bytes are those of zeros, deflate's matches beat Huffman codes of single bytes; the factors were measured
    # there. Trained rows, with more weights near zero and far out than normals, take 0.025 bits less; at 2 bits more.
    bits = min(huffman_bits(symbols) / per_byte, (1.45 if limit == 1 else 1.35) * entropy)
    shape = -0.025 if limit > 1 else 0.0 if q_max > 1 else 0.01 if sigmas else 0.04
    return bits + shape, per_byte, 20 + 0.2 * held


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


def main(argv: list[str] | None = None) -> int:
    """Run one verb; they live beside the analysis, because a submission needs none of them and its bytes count."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))
    import export_verbs  # pyright: ignore[reportMissingImports]

    return export_verbs.main(argv)


if __name__ == "__main__":
    from export import main as main_by_name  # so that every class exists once

    sys.exit(main_by_name())
