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

import hashlib
import importlib
import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

if TYPE_CHECKING:
    from sensitivity_map import SensitivityMap

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


class ArtifactError(ValueError):
    """A file or state that cannot be an artifact; the offset is None where there are no bytes yet."""

    def __init__(self, field: str, offset: int | None, found: object, expected: object) -> None:
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"artifact: {field}{where}: found {found}, expected {expected}")
        self.field, self.offset, self.found, self.expected = field, offset, found, expected


class ExportRefused(ValueError):
    """The options cannot be carried out, on these weights or without the tools of a checkout."""


def require(holds: bool | np.bool_, field: str, offset: int | None, found: object, expected: object) -> None:
    if not holds:
        raise ArtifactError(field, offset, found, expected)


def tool(name: str) -> ModuleType:
    """A module of scripts/, which some options need and nothing does by default: a packed submission lacks it, because its
    bytes count. Raises ExportRefused where there is none.
    """
    folder = Path(__file__).resolve().parent / "scripts"
    if not (folder / f"{name}.py").is_file():
        raise ExportRefused(f"this option needs scripts/{name}.py beside export.py, found no {folder / name}.py, as a packed"
                            " submission has none; run from a checkout or leave the option at its default")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


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

    def tools(self) -> dict[str, str]:
        """What is asked beyond the uniform plan -> the module of scripts/ that does it."""
        return {asked: name for wanted, asked, name in (
            (self.int8_residual_rank > 0, f"INT8_RESIDUAL_RANK={self.int8_residual_rank}", "int8_plan"),
            (self.export_permute != "off", f"EXPORT_PERMUTE={self.export_permute}", "symmetries"),
            (self.export_rotate, "EXPORT_ROTATE=1", "symmetries"),
            (self.export_allocate != "uniform", f"EXPORT_ALLOCATE={self.export_allocate}", "int8_plan"),
            (self.cap_policy == "fit", "CAP_POLICY=fit", "int8_plan"),
        ) if wanted}

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


def weights_digest(state: Mapping[str, Tensor], start: bytes = b"") -> str:
    """BLAKE2b over `start`, names and values: statistics and maps belong to one set of weights."""
    digest = hashlib.blake2b(start, digest_size=16)
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
    weights: dict[str, Tensor] = {name: state[name].detach().cpu() for name in sorted(state)}
    meta = {**meta, "export": options.changed} if options.changed else dict(meta)
    if options.export_rotate:
        weights, statistics = tool("symmetries").rotated(weights, statistics)
    if options.solves:
        return tool("int8_plan").fitted(weights, meta, options, statistics, sensitivity, code_bytes)
    choices = {name: uniform_choice(name, t, options) for name, t in weights.items()}
    judge, gains = Judge(statistics), {}
    if options.export_permute != "off":
        weights, judge, gains = tool("symmetries").reordered(weights, choices, options, judge)
    tensors = quantised(weights, choices, options, judge)
    if options.int8_residual_rank:
        tensors = tool("int8_plan").correct(tensors, weights, judge, options, None)
    export = assembled(weights, meta, options, tensors)
    export.report = replace(export.report, permutation_gains=gains)
    return export


def quantised(state: Mapping[str, Tensor], choices: Mapping[str, Choice], options: ExportOptions, judge: Judge
              ) -> dict[str, Stored]:
    return {name: store(name, t, choices[name], options, weight_costs(terms) if (terms := judge.terms(name)) else None)
            for name, t in state.items()}


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


def main(argv: list[str] | None = None) -> int:
    """Run one verb; they live beside the analysis, because a submission needs none of them and its bytes count."""
    return tool("export_verbs").main(argv)


if __name__ == "__main__":
    from export import main as main_by_name  # so that every class exists once

    sys.exit(main_by_name())
