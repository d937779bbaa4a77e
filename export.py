"""Tensors to bytes and back: plan, quantise, code, one checked file. Two schemes: int8 codes under deflate, and
rate-distortion (EXPORT_SCHEME=rd), which puts matrices on a trellis grid with its own entropy coder.

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
      1         codec: 0 int, 1 f16, 2 f32, 4 grid (for float dtypes; grid: matrices only), 3 raw (for all others)
      1         axis: who owns a scale, 0 = each row, 1 = each column, 2 = each row and each column (1, 2: int matrices
                only); an int tensor which is no matrix is one row
      1         layout of the codes: 0 row after row, 1 column after column, 2 rows in ascending order of their scales,
                3 columns so (1: matrices; 2 needs row scales and 3 column scales; equal scales keep their order)
      1         kept: 0 none, 1 rows, 2 columns, 3 entries (int matrices only)
      1         rank of the correction, 0..32, at most the rows and the columns (above 0: int matrices only); of a grid
                matrix log2 of the trellis's states instead: 0 (none) or 2..8, in all of them alike
      1         factors: how the correction is stored, 0 f16, 1 int8, 2 lqer (0 at rank 0)
      4         kept_count: slices or entries kept, at least 1 if any, at most as many as there are
      1         ndim, 0..8, then 4 each: dims, at least 1
    5 each    the table, one entry per stream: method u8 (0 stored, 1 raw deflate, 2..8 deflated radix digits, `codes`
              only; `positions` 0), coded_bytes u32

Streams, in this order: `codes` of each int tensor (int8, -127..127); then those that all tensors share in plan order:
`scales` (fp16, finite, above zero), `f16`, `f32`, `raw` (bool bytes are 0 or 1), `factors` (bytes), `index` (u32); and if
there is a grid matrix `bases` (i16, six for each) and `positions`, whose length the table alone says. The others'
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

A grid matrix is position x 2^((row step + column step) / 32) in fp32, one rounding, the mantissa of the power rounded down,
then a cast. Steps and row sizes are exponents, base + unit x integer, within +-1024; `bases` holds the bases of column
steps, row steps and row sizes, then their units, at least 1. With a trellis a column starts in state 0; a position is
2 x code + the state's lowest bit, and the next state is (s >> 1) ^ (h0 >> 1)(s & 1) ^ (h1 >> 1)(code & 1), with TRELLISES'
h0 and h1; without one it is the code.

`positions` is interleaved rANS: log2 of the lanes u8, 3..10; the lanes' states, 5 bytes each, at least 2^24; words u16. It
codes matrices of integers, row after row, the k-th column of a row in lane k modulo the lanes: a row's symbols, then, if
any has some, its raw bits. First the integers of column steps, a column for each matrix, for each set of matrices with
equally many columns in the order of first appearance; then for each set with equally many rows those of row steps, then of
row sizes, and then their positions side by side. A state x gives the slot x mod 2^16; the symbol whose share holds it, from
`start`; and share x (x >> 16) + slot - start, below 2^24 followed by a word. It ends with every word used and every state at
2^24.

A symbol is (code >> raw bits) + 63, or 127 = escape, followed by 16 bits of the code's two's complement. Its context is 2 x
bucket + parity. The bucket is floor((level + learned + 192) / 8), 0..79: level = row size - row step - column step (for
steps and sizes 0), within +-512; learned = 4 k - 512, k being how many of floor(2^(0/32)), floor(2^(4/32)), ...,
floor(2^(1532/32)) are at most floor(2^16 S / E) at row i, for i below 32 and multiples of 8, else as before. S and E start
at 8 x floor(2^((512 + level) / 32)) of the first row; each row adds 2^16 |position| to S, which stays at most 2^46, and
floor(2^((512 + level) / 32)) to E. A code has max(bucket // 4 - 8 - t, 0) raw bits, t = 1 with a trellis. The shares of a
context are of 2^16: floor(count x (2^16 - 4) / all counts), 4 for the escape, what is missing to the first of the largest;
a symbol without a share is escaped. Counts start at `prior`, steps and sizes having theirs, grow by 64 a symbol, and make
new shares after the row in which max(512, seen // 8) came together.

A reader rejects, as ArtifactError, whatever breaks a line above, and: tensors beyond 2^30 bytes in all, a raw length
above 1032 x the coded one (deflate's limit), a deflate stream that ends before or after its raw length or its coded
bytes, more than 8192 positions or 64 rows and columns for a byte of `positions`, bytes left over anywhere. Lengths are
bounded before anything is allocated. Offsets count from the start of the file; those of fields named `header.*` from the
start of the inflated header.
"""
from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
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
CODECS = ("int", "f16", "f32", "raw", "grid")
AXES = ("row", "col", "both")
LAYOUTS = ("rows", "cols", "rows_by_scale", "cols_by_scale")
KEPT = ("none", "rows", "cols", "entries")
FACTORS = ("f16", "int8", "lqer")
STREAM_TYPES = {"codes": "i1", "scales": "<f2", "f16": "<f2", "f32": "<f4", "raw": "u1", "factors": "u1", "index": "<u4",
                "bases": "<i2"}

BASES = ("col_steps", "row_steps", "row_sizes", "col_steps_unit", "row_steps_unit", "row_sizes_unit")

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
    """A module of scripts/, which some options need and nothing does by default: a packed submission has those of its runs
    alone, because their bytes count. Raises ExportRefused where there is none.
    """
    folder = Path(__file__).resolve().parent / "scripts"
    if name in getattr(__spec__ and __spec__.loader, "sources", ()):     # of a packed file that carries the tool
        return importlib.import_module(name)
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


RD_ONLY = ("export_bits", "tcq_states", "tcq_lambda")          # fields that one scheme alone has
ANY_SCHEME = ("export_scheme", "artifact_cap_bytes", "cap_policy")
FINEST_BITS = 9.0       # a weight; beyond, rd spends no more


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
    export_scheme: str = knob(
        "int8_zlib", "Export", "rd = rate-distortion: second-order quantisation on a trellis grid and its own entropy coder;"
        " needs CALIBRATION_TOKENS", choices=("int8_zlib", "rd"), free=True)
    export_bits: float = knob(
        0.0, "Export", "rd: bits a weight that the artifact may take; 0 = as many as fit ARTIFACT_CAP_BYTES", free=True)
    tcq_states: int = knob(
        64, "Export", "rd: states of the trellis: 0 = none, 4, 8, ..., 256; more take fewer bits and longer", free=True)
    tcq_lambda: float = knob(
        0.15, "Export", "rd: squared error, in steps, that saving a bit is worth", free=True)
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
        rd = self.export_scheme == "rd"
        foreign = [f.name.upper() for f in knobs if (f.name in RD_ONLY) != rd and f.name not in ANY_SCHEME
                   and getattr(self, f.name) != f.default and not any(f.name.upper() in text for text in found)]
        return found + [text for wrong, text in (
            (bool(foreign), f"EXPORT_SCHEME={self.export_scheme} has no use for {', '.join(foreign)}; unset one of them"),
            (self.tcq_states not in (0, *TRELLISES),
             f"TCQ_STATES must be 0, {', '.join(map(str, TRELLISES))}, got {self.tcq_states}"),
            (rd and self.export_bits == 0 and self.artifact_cap_bytes == 0,
             "EXPORT_SCHEME=rd needs EXPORT_BITS or ARTIFACT_CAP_BYTES above 0"),
            (FINEST_BITS < self.export_bits < math.inf,
             f"EXPORT_BITS must be at most {FINEST_BITS:g}, got {self.export_bits:g}"),
            (self.int8_scale_floor > 1, f"INT8_SCALE_FLOOR must be in 0..1, got {self.int8_scale_floor}"),
            (self.int8_residual_rank > MAX_RANK,
             f"INT8_RESIDUAL_RANK must be at most {MAX_RANK}, got {self.int8_residual_rank}"),
            (self.export_allocate != "uniform" and unused,
             f"EXPORT_ALLOCATE={self.export_allocate} chooses what {', '.join(unused)} would set; unset one of them"),
            (self.solves and not rd and self.artifact_cap_bytes == 0,
             f"CAP_POLICY={self.cap_policy} with EXPORT_ALLOCATE={self.export_allocate} needs ARTIFACT_CAP_BYTES above 0"),
        ) if wrong]

    @property
    def solves(self) -> bool:
        """The export fits itself to the cap."""
        return self.cap_policy == "fit" or self.export_allocate != "uniform" or self.export_scheme == "rd"

    def tools(self) -> dict[str, str]:
        """What is asked beyond the uniform plan -> the module of scripts/ that does it."""
        return {asked: name for wanted, asked, name in (
            (self.int8_residual_rank > 0, f"INT8_RESIDUAL_RANK={self.int8_residual_rank}", "int8_plan"),
            (self.export_permute != "off", f"EXPORT_PERMUTE={self.export_permute}", "symmetries"),
            (self.export_rotate, "EXPORT_ROTATE=1", "symmetries"),
            (self.export_allocate != "uniform", f"EXPORT_ALLOCATE={self.export_allocate}", "int8_plan"),
            (self.cap_policy == "fit" and self.export_scheme != "rd", "CAP_POLICY=fit", "int8_plan"),
            (self.export_scheme == "rd", "EXPORT_SCHEME=rd", "calibration"),
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
    states: int = 0         # of the trellis of a grid matrix; 0 = none

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
        if self.codec == "grid":
            return {"bases": len(BASES)}
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
        return max(stored, self.numel * max(DTYPES[self.dtype], 4 * (self.codec == "grid")))


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
    yield f"{'codec':5} {'codes':>6} {'axis':4} {'layout':13} {'kept':11} {'rank':10} {'dtype':8} {'shape':>12}  tensor"
    for row, values in ((s.row, s.values) for s in tensors):
        shape = "x".join(map(str, row.shape)) or "scalar"
        codes, grid = values.get("codes", values.get("positions")), row.codec == "grid"
        limit = "" if codes is None else f"±{int(np.abs(codes).max())}"
        kept = "" if row.kept == "none" else f"{row.kept_count} {row.kept}"
        rank = f"{row.states} states" if grid else f"{row.rank} {row.factors}" if row.rank else ""
        yield (f"{row.codec:5} {limit:>6} {'' if grid else row.axis:4} {'' if grid else row.layout:13} {kept:11} {rank:10}"
               f" {row.dtype:8} {shape:>12}  {row.name}")


def stream_of(kind: str, row: PlanRow) -> str:
    """Codes have a stream per tensor, so that each gets its own code lengths; everything else is shared."""
    return f"codes:{row.name}" if kind == "codes" else kind


def stream_counts(plan: Sequence[PlanRow]) -> dict[str, int]:
    """Stream -> number of values, in the order of the file."""
    counts = {stream_of("codes", row): row.numel for row in plan if row.codec == "int"}
    grid = any(row.codec == "grid" for row in plan)
    for kind in ("scales", "f16", "f32", "raw", "factors", "index", *(["bases"] if grid else [])):
        counts[kind] = sum(row.counts.get(kind, 0) for row in plan)
    return counts | ({"positions": 0} if grid else {})      # whose length only its decoder knows


# ----------------------------------------------------------------------------------------------------------------------
# Quantise: one symmetric uniform grid, shared by the training simulation, the writer and the reader.
# ----------------------------------------------------------------------------------------------------------------------


def quantize(w: Tensor, q_max: float, axis: str, options: ExportOptions) -> tuple[Tensor, Tensor]:
    """Round w to int8 codes in [-q_max, q_max]; the fp16 scales, one per row or per column, are those of the file."""
    rows = as_rows(w.float(), axis)                             # (slices that own a scale, their weights)
    clip, scale = clip_and_scale(rows, q_max, options)
    codes = rounded(rows, clip, scale, q_max).to(torch.int8)
    return as_rows(codes, axis).contiguous().view(w.shape), scale


def clip_and_scale(rows: Tensor, q_max: float, options: ExportOptions) -> tuple[Tensor, Tensor]:
    """What each row is clipped to, fp32, and its step, fp16."""
    clip = clip_magnitude(rows, options.int8_clip_sigmas)
    return clip, stored_scale(clip, q_max, options.int8_scale_floor)


def rounded(rows: Tensor, clip: Tensor, scale: Tensor, q_max: float) -> Tensor:
    """The integers of some columns of rows, as floats."""
    clipped = torch.maximum(torch.minimum(rows, clip[:, None]), -clip[:, None])
    limit = math.floor(q_max + 0.5)
    return (clipped / scale.float()[:, None]).round().clamp(-limit, limit)


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
    if row.codec == "grid":
        value = grid_values(values["positions"].reshape(row.shape), values["row_steps"], values["col_steps"])
        return torch.from_numpy(value).to(getattr(torch, row.dtype))
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
# Trellis grid: weights on every second point of a grid, which points being the business of a state machine.
# ----------------------------------------------------------------------------------------------------------------------

OCTAVE = 32             # exponents of steps and sizes count 1/32 octaves
MAX_EXPONENT = 32 * OCTAVE
MAX_GRID_RATIOS = 2**13, 2**6           # positions, and rows and columns, a byte of their stream: far beyond trained models
TRELLISES = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24), 128: (0o235, 0o126),
             256: (0o515, 0o362)}       # states -> parity checks (h0, h1) (Ungerboeck 1982, table I, one dimension)


@lru_cache(maxsize=4096)
def power(exponent: int) -> int:
    """floor(2^(exponent / OCTAVE)) for exponents of at least 0, in integers: the same on every machine."""
    root = 1 << exponent
    for _ in range(OCTAVE.bit_length() - 1):
        root = math.isqrt(root)
    return root


def steps(exponents: np.ndarray) -> np.ndarray:
    """2^(exponents / OCTAVE) as fp32, the mantissa rounded down."""
    mantissas = np.array([power(23 * OCTAVE + k) for k in range(OCTAVE)], np.float32)   # integers below 2^24
    return np.ldexp(mantissas[exponents % OCTAVE], exponents // OCTAVE - 23)


@lru_cache(maxsize=16)
def trellis(states: int) -> np.ndarray:
    """Next states (states, 2) by state and by the second bit of the position. A state's lowest bit is the parity that the
    position must have (union quantiser; Marcellin & Fischer 1990, section V); without a trellis there is one state.
    """
    following = np.zeros((max(states, 1), 2), np.int64)
    h0, h1 = TRELLISES.get(states, (0, 0))
    for state in range(states):
        for bit in (0, 1):
            following[state, bit] = (state >> 1) ^ (h0 >> 1) * (state & 1) ^ (h1 >> 1) * bit
    return following


def grid_values(positions: np.ndarray, row_steps: np.ndarray, col_steps: np.ndarray) -> np.ndarray:
    """Positions (rows, cols) x 2^((row step + column step) / OCTAVE), one rounding each, fp32."""
    low = int(row_steps.min()) + int(col_steps.min())
    table = steps(np.arange(low, int(row_steps.max()) + int(col_steps.max()) + 1))
    return positions.astype(np.float32) * table[row_steps[:, None].astype(np.int64) + col_steps - low]


# ----------------------------------------------------------------------------------------------------------------------
# Symbol coder: adaptive integer tables by expected magnitude, interleaved rANS. Nothing in it is a float.
# ----------------------------------------------------------------------------------------------------------------------

SCALE_BITS = 16                         # shares of a table add up to 2^16
LANE_LOW, WORD_BITS = 2**24, 16         # a lane's state is in [2^24, 2^40) and moves 16 bits at a time
STATE_BYTES = 5
REACH = 63                              # symbols are -63..63 and the escape
SYMBOLS, ESCAPE = 2 * REACH + 2, 2 * REACH + 1
ESCAPE_SHARE, ESCAPED_BITS = 4, 16
BUCKETS, LOWEST_OCTAVE = 80, -6         # four to an octave of the expected |position|; the first is at 2^-6
FIXED_ONE = 16 * OCTAVE                 # log2 of 1.0 in the column's running means
PRIOR_ROWS = 8                          # rows that the expectation before the first one weighs
COUNT = 64                              # what one symbol adds to a count
PRIOR_COUNT = 32                        # symbols that a context's table weighs before it has seen any


def shifts(doubled: int) -> np.ndarray:
    """(BUCKETS,) low bits that are coded as they are: what is left is expected at 4..8."""
    octave = np.arange(BUCKETS) // 4 + LOWEST_OCTAVE - doubled
    return np.maximum(octave - 2, 0)


class SymbolModel:
    """Counts of symbols by context (2 x bucket + parity), and the shares that coder and decoder derive from them."""

    def __init__(self, doubled: int):
        self.doubled = doubled          # 1: a position is 2 x code + parity
        self.counts = np.array([prior(bucket, parity, doubled) for bucket in range(BUCKETS) for parity in (0, 1)])
        self.waiting: list[np.ndarray] = []
        self.fresh, self.seen = 0, 0
        self.refresh()

    def observe(self, flat: np.ndarray) -> None:
        """Counts symbols, given as context x SYMBOLS + symbol; they take effect at the next refresh."""
        self.waiting.append(flat)
        self.fresh += flat.size
        if self.fresh >= max(512, self.seen // 8):
            self.counts += COUNT * np.bincount(np.concatenate(self.waiting), minlength=self.counts.size).reshape(
                self.counts.shape)
            self.seen, self.fresh, self.waiting = self.seen + self.fresh, 0, []
            self.refresh()

    def refresh(self) -> None:
        """Shares of 2^16; a symbol without one takes the escape, which always has some."""
        share = self.counts * (2**SCALE_BITS - ESCAPE_SHARE) // self.counts.sum(1, keepdims=True)
        share[:, ESCAPE] = ESCAPE_SHARE
        share[np.arange(len(share)), share.argmax(1)] += 2**SCALE_BITS - share.sum(1)
        self.share = share.reshape(-1)
        self.start = (share.cumsum(1) - share).reshape(-1)
        self.by_slot: np.ndarray | None = None

    def symbols(self, contexts: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """The symbol whose share holds the slot."""
        if self.by_slot is None:
            self.by_slot = np.repeat(np.tile(np.arange(SYMBOLS, dtype=np.uint8), len(self.counts)), self.share)
        return self.by_slot[(contexts << SCALE_BITS) + slots]

    def prices(self) -> np.ndarray:
        """(BUCKETS, 2, SYMBOLS) bits of each symbol with its raw ones; float64, for the quantiser."""
        share = self.share.reshape(BUCKETS, 2, SYMBOLS)
        bits = SCALE_BITS - np.log2(np.maximum(share, 1)) + shifts(self.doubled)[:, None, None]
        escape = SCALE_BITS - np.log2(share[:, :, ESCAPE:]) + ESCAPED_BITS
        return np.where((share > 0) & (np.arange(SYMBOLS) != ESCAPE), bits, escape)


@lru_cache(maxsize=4 * BUCKETS)
def prior(bucket: int, parity: int, doubled: int) -> tuple[int, ...]:
    """Counts before any symbol, PRIOR_COUNT in all: geometric in |position| with the bucket's mean."""
    kept_bits = int(shifts(doubled)[bucket])
    mean = power((bucket * 2 + 1) * OCTAVE // 8 + LOWEST_OCTAVE * OCTAVE + FIXED_ONE) >> kept_bits
    fall, weight, by_size = (mean << 16) // (mean + 2**16), 2**40, []
    for _ in range(2 * REACH + 2):
        by_size.append(weight)
        weight = weight * fall >> 16
    shape = [by_size[abs((t << doubled) + parity * doubled)] for t in range(-REACH, REACH + 1)]
    return (*(PRIOR_COUNT * COUNT * w // sum(shape) for w in shape), 0)


class SymbolWriter:
    """Collects what `rans_encode` writes: (shares, starts) of 2^16, symbol by symbol, in the order of the reader."""

    def __init__(self) -> None:
        self.operations: list[tuple[np.ndarray, np.ndarray]] = []

    def code(self, model: SymbolModel, contexts: np.ndarray, raw_bits: np.ndarray, parity: np.ndarray,
             given: np.ndarray | None) -> np.ndarray:
        """Codes the given positions by their contexts, and returns them."""
        assert given is not None, "a writer is given what it writes"
        codes = (given - parity) >> model.doubled
        symbols = split_codes(codes, raw_bits)
        seen = contexts * SYMBOLS + symbols
        escaped = (symbols == ESCAPE) | (model.share[seen] == 0)
        flat = np.where(escaped, contexts * SYMBOLS + ESCAPE, seen)
        self.operations.append((model.share[flat].astype(np.uint32), model.start[flat].astype(np.uint32)))
        bits = np.where(escaped, ESCAPED_BITS, raw_bits)
        if bits.any():
            low = (codes & ((1 << bits) - 1)) << (SCALE_BITS - bits)
            self.operations.append(((1 << (SCALE_BITS - bits)).astype(np.uint32), low.astype(np.uint32)))
        model.observe(seen)
        return given

    def encoded(self) -> bytes:
        """Range asymmetric numeral systems (Duda 2013, arXiv 1311.2540, section 3.3), interleaved: the k-th of an
        operation's shares goes to lane k modulo the lanes. One byte for log2 of the lanes, their states, then words of
        two bytes in the order in which the reader wants them.
        """
        lanes = lanes_of(sum(shares.size for shares, _ in self.operations))
        states, words = np.full(lanes, LANE_LOW, np.uint64), []
        for shares, starts in reversed(self.operations):
            for at in reversed(range(0, shares.size, lanes)):
                share, start = shares[at:at + lanes].astype(np.uint64), starts[at:at + lanes].astype(np.uint64)
                x = states[:share.size]
                full = x >= share << np.uint64(24)
                words.append(x[full].astype("<u2"))
                x = np.where(full, x >> np.uint64(WORD_BITS), x)
                quotient = x // share
                states[:share.size] = (quotient << np.uint64(SCALE_BITS)) + (x - quotient * share) + start
        head = states.astype("<u8").view("u1").reshape(lanes, 8)[:, :STATE_BYTES]
        tail = np.concatenate(words[::-1]) if words else np.zeros(0, "<u2")
        return bytes([lanes.bit_length() - 1]) + head.tobytes() + tail.tobytes()


class SymbolReader:
    """The reverse of SymbolWriter; whatever the bytes are, it ends or raises ArtifactError."""

    def __init__(self, body: bytes, offset: int):
        self.offset = offset
        log_lanes = body[0] if body else -1
        require(3 <= log_lanes <= 10, "positions.lanes", offset, log_lanes, "3..10")
        self.lanes = 2**log_lanes
        start = 1 + STATE_BYTES * self.lanes
        sound = len(body) >= start and (len(body) - start) % 2 == 0
        require(sound, "positions", offset, f"{len(body)} bytes", f"{start} and then words of two")
        head = np.zeros((self.lanes, 8), np.uint8)
        head[:, :STATE_BYTES] = np.frombuffer(body[1:start], np.uint8).reshape(self.lanes, STATE_BYTES)
        self.states = head.view("<i8").reshape(-1).astype(np.int64)
        self.words, self.at = np.frombuffer(body[start:], "<u2").astype(np.int64), 0
        require((self.states >= LANE_LOW).all(), "positions.states", offset + 1, int(self.states.min()), f">= {LANE_LOW}")

    def code(self, model: SymbolModel, contexts: np.ndarray, raw_bits: np.ndarray, parity: np.ndarray,
             _given: np.ndarray | None) -> np.ndarray:
        """The positions that were written in these contexts."""
        symbols = self.symbols(model, contexts)
        escaped = symbols == ESCAPE
        bits = np.where(escaped, ESCAPED_BITS, raw_bits)
        codes = np.where(escaped, 0, symbols - REACH) << np.where(escaped, 0, raw_bits)
        if bits.any():
            low = self.raw(bits)
            codes = np.where(escaped, low - ((low >> (ESCAPED_BITS - 1)) << ESCAPED_BITS), codes + low)
            symbols = np.where(escaped, split_codes(codes, raw_bits), symbols)
        model.observe(contexts * SYMBOLS + symbols)
        return (codes << model.doubled) + parity

    def symbols(self, model: SymbolModel, contexts: np.ndarray) -> np.ndarray:
        found = np.empty(contexts.size, np.int64)
        for at in range(0, contexts.size, self.lanes):
            own = contexts[at:at + self.lanes]
            symbols = model.symbols(own, self.states[:own.size] & (2**SCALE_BITS - 1))
            flat = own * SYMBOLS + symbols
            self.advance(model.share[flat], model.start[flat])
            found[at:at + self.lanes] = symbols
        return found

    def raw(self, bits: np.ndarray) -> np.ndarray:
        """Integers of so many bits each."""
        found = np.empty(bits.size, np.int64)
        for at in range(0, bits.size, self.lanes):
            rest = SCALE_BITS - bits[at:at + self.lanes]
            value = (self.states[:rest.size] & (2**SCALE_BITS - 1)) >> rest
            self.advance(1 << rest, value << rest)
            found[at:at + self.lanes] = value
        return found

    def advance(self, share: np.ndarray, start: np.ndarray) -> None:
        x = self.states[:share.size]
        x = share * (x >> SCALE_BITS) + (x & (2**SCALE_BITS - 1)) - start
        low = np.flatnonzero(x < LANE_LOW)
        end = self.at + low.size
        require(end <= self.words.size, "positions", self.offset, f"{self.words.size} words", "more")
        x[low] = x[low] << WORD_BITS | self.words[self.at:end]
        self.states[:share.size], self.at = x, end

    def finish(self) -> None:
        done = self.at == self.words.size and bool((self.states == LANE_LOW).all())
        require(done, "positions", self.offset, f"{self.words.size - self.at} words left or states that do not end",
                "a stream that ends with its last position")


def split_codes(codes: np.ndarray, raw_bits: np.ndarray) -> np.ndarray:
    """Symbols of integers whose lowest raw_bits are coded apart."""
    high = codes >> raw_bits
    return np.where(np.abs(high) <= REACH, high + REACH, ESCAPE)


def lanes_of(symbols: int) -> int:
    """How many states are coded side by side: each takes three bytes that say nothing."""
    return 2 ** min(max(round(math.log2(max(symbols, 1) / 2**15)), 3), 10)


Coder = SymbolWriter | SymbolReader
Values = dict[str, np.ndarray]          # of one tensor, by kind


def code_matrix(coder: Coder, model: SymbolModel, levels: np.ndarray, widths: Sequence[int], col_steps: np.ndarray,
                states: int, given: np.ndarray | None) -> np.ndarray:
    """Integers (rows, columns), row after row. The context of each is its expected magnitude, that is 2^((level - column
    step) / OCTAVE) x what the column so far has of all that was expected so, and the parity that the trellis demands (a
    ratio of sums: the mean of ratios is in the hands of rows where next to nothing is expected). `levels` (rows, parts) are
    those of parts of `widths` columns.
    """
    following, raw_bits = trellis(states), shifts(model.doubled)
    table = np.array([power(k) for k in range(0, 48 * OCTAVE, 4)])
    expectations = np.array([power(FIXED_ONE + k) for k in range(-FIXED_ONE, FIXED_ONE + 1)])
    state, learned = np.zeros(len(col_steps), np.int64), np.zeros(len(col_steps), np.int64)
    sums, expected, found = 0, 0, np.zeros((len(levels), len(col_steps)), np.int32)
    for i in range(len(levels)):
        level = np.clip(np.repeat(levels[i], widths) - col_steps, -FIXED_ONE, FIXED_ONE)
        if not i:
            sums = expected = PRIOR_ROWS * expectations[level + FIXED_ONE]
        if i < 32 or i % 8 == 0:        # the ratios move slowly, and this is most of the work
            learned = 4 * np.searchsorted(table, (sums << 16) // expected, side="right") - FIXED_ONE
        buckets = np.clip((level + learned - LOWEST_OCTAVE * OCTAVE) // (OCTAVE // 4), 0, BUCKETS - 1)
        parity = state & model.doubled
        found[i] = row = coder.code(model, 2 * buckets + parity, raw_bits[buckets], parity,
                                    None if given is None else given[i].astype(np.int64))
        state = following[state, (row >> model.doubled) & 1]
        sums = np.minimum(sums + (np.abs(row).astype(np.int64) << 16), 2**46)
        expected = expected + expectations[level + FIXED_ONE]
    return found


def groups_of(plan: Iterable[PlanRow], dim: int) -> list[list[PlanRow]]:
    """The matrices of the grid, those of equal size on the dim together."""
    found: dict[int, list[PlanRow]] = {}
    for row in plan:
        if row.codec == "grid":
            found.setdefault(row.shape[dim], []).append(row)
    return list(found.values())


def code_grid(coder: Coder, plan: Sequence[PlanRow], values: Mapping[str, Values], offset: int | None) -> SymbolModel:
    """Codes what is in `values`, or fills it in: column steps, row steps and sizes, positions. Side by side go the steps of
    matrices with equally many columns, then sizes and positions of those with equally many rows.
    """
    writes = isinstance(coder, SymbolWriter)
    model, side = SymbolModel(int(max(row.states for row in plan) > 0)), SymbolModel(0)

    def code_side(group: Sequence[PlanRow], kinds: Sequence[str], length: int) -> None:
        """Exponents of all matrices and kinds as columns of one matrix of differences from their bases, in their units."""
        owners = [(values[row.name], kind) for kind in kinds for row in group]
        bases, units = (np.array([own["bases"][BASES.index(kind + what)] for own, kind in owners], np.int64)
                        for what in ("", "_unit"))
        given = (np.stack([own[kind] for own, kind in owners], 1) - bases) // units if writes else None
        count = len(owners)
        found = code_matrix(coder, side, np.zeros((length, 1), np.int64), [count], np.zeros(count, np.int64), 0, given)
        exponents = found * units + bases
        most = int(np.abs(exponents).max())
        require(most <= MAX_EXPONENT, "positions", offset, f"an exponent of {most}", f"at most {MAX_EXPONENT}")
        for (own, kind), column in zip(owners, exponents.T, strict=True):
            own[kind] = column.astype(np.int16)

    for group in groups_of(plan, 1):
        code_side(group, ("col_steps",), group[0].shape[1])
    for group in groups_of(plan, 0):
        code_side(group, ("row_steps", "row_sizes"), group[0].shape[0])
        own = [values[row.name] for row in group]
        levels = np.stack([v["row_sizes"].astype(np.int64) - v["row_steps"] for v in own], 1)
        widths = [row.shape[1] for row in group]
        given = np.concatenate([v["positions"].reshape(row.shape) for v, row in zip(own, group, strict=True)], 1
                               ) if writes else None
        wide = code_matrix(coder, model, levels, widths, np.concatenate([v["col_steps"] for v in own]).astype(np.int64),
                           group[0].states, given)
        for v, part in zip(own, np.split(wide, np.cumsum(widths)[:-1], 1), strict=True):
            v["positions"] = part.reshape(-1)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Rate-distortion export: water-filled steps, error feedback, trellis search, one dial for the size.
# ----------------------------------------------------------------------------------------------------------------------

GRID_DAMPING = 0.02     # of the mean cost of a weight's own size, added to each row's and each column's
FEEDBACK_BLOCK = 64     # columns between two updates of all the columns to come
MAX_AIM = 2**15 - 2     # steps; what the escape can say
GAUSS_RATE = 13.0       # a rate of 0.5 log2(1 + 13 (sigma / step)^2) bits is 1.85 + log2(sigma / step) at high resolution
RD_WINDOW_BYTES, MAX_DIALS = 2000, 8
COL_TABLE, ROW_TABLE = 4, 8             # column steps are multiples of 1/8 octave, row steps and sizes of 1/4


@dataclass(frozen=True)
class Curvature:
    """What errors of one matrix (out, in) cost, as one Kronecker product: 0.5 * sum_i rows[i] (e moment e^T)_ii nats."""
    rows: np.ndarray        # (out,) float64
    moment: np.ndarray      # (in, in) float64


def curvature(w: np.ndarray, terms: Sequence[Term]) -> Curvature:
    """All uses of a matrix in one product with their margins, damped so that no error larger than the weights themselves is
    free. The damping is in units of each row's and column's own size: scaling one and its cost changes nothing else.
    """
    rows, moment, total = np.zeros(w.shape[0]), np.zeros((w.shape[1], w.shape[1])), 0.0
    for term in terms:
        inner, outer = term.moment.double().numpy(), term.rows.double().numpy()
        first, second = (np.diag(inner), np.diag(outer)) if term.transposed else (outer, inner)
        rows, moment = rows + first * np.trace(second), moment + second * first.sum()
        total += first.sum() * np.trace(second)
    moment, tiny = moment / max(total, 1e-300), 1e-30       # not the rows: none may move when another is scaled
    size = np.maximum((w * w).mean(1), tiny * max(float((w * w).mean()), tiny))
    rows = rows + GRID_DAMPING * max(float((rows * size).mean()), tiny) / size      # no gradient at all: all rows alike
    size = np.maximum((w * w * rows[:, None]).mean(0), tiny * max(float((w * w * rows[:, None]).mean()), tiny))
    cost = np.diag(moment) * size
    return Curvature(rows, moment + np.diag((GRID_DAMPING * max(float(cost.mean()), tiny) + 1e-9 * cost) / size))


@dataclass
class Prepared:
    """One matrix before its dial is set. Columns stand in the order of quantisation, those of most energy first."""
    name: str
    columns: np.ndarray     # (in, out) float64: the matrix, transposed
    feedback: np.ndarray    # (in, in) strictly upper: what an error in column j adds to the target of column l
    order: np.ndarray       # (in,) which column of the matrix stands where
    row_steps: np.ndarray   # (out,) exponents
    log_steps: np.ndarray   # (in,) log2 of the columns' steps at dial 0
    log_sizes: np.ndarray   # (in,) log2 of the columns' rms, in row steps
    costs: np.ndarray       # (in,) squared Cholesky diagonal

    @property
    def gain_bits(self) -> float:
        """Bits a weight that steps by column save against one step: 0.5 log2 of arithmetic over geometric mean of the
        squared Cholesky diagonal (WaterSIC: Lifar et al. 2026, arXiv 2603.04956).
        """
        return 0.5 * (math.log2(self.costs.mean()) - float(np.log2(self.costs).mean()))


def prepare(name: str, w: Tensor, terms: Sequence[Term]) -> Prepared:
    """Water-filling: with moment = M M^T, M upper triangular, the loss after optimal feedback is the sum of
    rows[i] M_jj^2 e_ij^2, so every weight's step is the dial / (sqrt(rows[i]) M_jj) (reverse water-filling over the
    conditional variances; GPTQ's recursion, arXiv 2210.17323, in the Cholesky form of arXiv 2603.04956, section 4).
    """
    matrix = w.double().numpy()
    cost = curvature(matrix, terms)
    energy = np.diag(cost.moment) * np.einsum("ij,i,ij->j", matrix, cost.rows, matrix)
    order = np.argsort(-energy, kind="stable")
    factor = np.linalg.cholesky(cost.moment[np.ix_(order[::-1], order[::-1])])[::-1, ::-1]
    diagonal = np.diag(factor).copy()
    row_log = -0.5 * np.log2(cost.rows)
    middle = float(np.rint(np.median(row_log) * OCTAVE / ROW_TABLE)) * ROW_TABLE / OCTAVE    # moves no step off its table
    row_steps = ROW_TABLE * np.rint((row_log - middle).clip(-8, 8) * OCTAVE / ROW_TABLE)
    columns = np.ascontiguousarray(matrix.T[order])
    sizes = 0.5 * np.log2(np.maximum(np.square(columns / np.exp2(row_steps / OCTAVE)).mean(1), 1e-30))
    return Prepared(name, columns, np.triu(factor / diagonal, 1), order, row_steps.astype(np.int64),
                    middle - np.log2(diagonal), sizes, diagonal**2)


def on_grid(p: Prepared, dial: float, states: int, penalty: float, prices: np.ndarray) -> dict[str, np.ndarray]:
    """The matrix's values for the file: positions, steps, and the sizes of rows that the coder's contexts start from."""
    half = 1.0 if states else 0.0       # a trellis has a grid of twice the density
    step_rows = steps(p.row_steps).astype(np.float64)
    peaks = (np.abs(p.columns) / step_rows).max(1)
    peaks = np.log2(np.maximum(peaks, max(float(peaks.max()) * 2.0**-10, 2.0**-20)))
    log_steps = (p.log_steps + dial - half).clip(peaks - MAX_AIM.bit_length() + 2, peaks + 3)  # positions up to 2^13, or 0
    col_steps = (COL_TABLE * np.rint(log_steps * OCTAVE / COL_TABLE)).clip(min=-MAX_EXPONENT).astype(np.int64)
    most = 2.0 ** float(peaks.max())
    require(col_steps.max() <= MAX_EXPONENT, f"tensor {p.name}", None, f"magnitudes up to {most:g}", "up to 2^40")
    step_cols = steps(col_steps).astype(np.float64)
    sizes = np.abs(p.columns) / step_cols[:, None] / step_rows
    usual = np.maximum(sizes.mean(1), 1e-30)
    level = np.log2(usual)[:, None] + np.log2(np.maximum((sizes / usual[:, None]).mean(0), 1e-30))
    buckets = np.rint(4 * (level - LOWEST_OCTAVE)).clip(0, BUCKETS - 1).astype(np.int64)
    placed = with_feedback(p, step_rows, step_cols, buckets, prices, penalty, states)
    positions, ordered = np.empty(placed.T.shape, np.int32), col_steps
    positions[:, p.order] = placed.T
    col_steps = np.empty_like(ordered)
    col_steps[p.order] = ordered
    return described(positions, p.row_steps, col_steps)


def described(positions: np.ndarray, row_steps: np.ndarray, col_steps: np.ndarray) -> dict[str, np.ndarray]:
    """Positions (rows, cols) and the exponents of their steps with what else the file says of them."""
    magnitudes = np.abs(positions)
    usual = magnitudes.mean(0) + 2.0**-12           # of a column: wide ones must not speak for the row
    reach = (magnitudes / usual).mean(1) * np.exp2((np.log2(usual) + col_steps / OCTAVE).mean())
    lowest = (float(reach.max()) or float(np.exp2(col_steps.mean() / OCTAVE))) * 2.0**-12
    reach = np.maximum(reach, lowest)               # rows of zeros
    sizes = (ROW_TABLE * np.rint(np.log2(reach) * OCTAVE / ROW_TABLE)).astype(np.int64) + row_steps
    sizes = sizes.clip(-MAX_EXPONENT, MAX_EXPONENT)     # of nearly empty matrices
    bases = [middle_of(v) for v in (col_steps, row_steps, sizes)] + [COL_TABLE, ROW_TABLE, ROW_TABLE]
    kinds = {"bases": np.array(bases), "row_steps": row_steps, "col_steps": col_steps, "row_sizes": sizes}
    return {"positions": positions.reshape(-1), **{kind: values.astype(np.int16) for kind, values in kinds.items()}}


def middle_of(exponents: np.ndarray) -> int:
    return int(np.sort(exponents)[exponents.size // 2])


def with_feedback(p: Prepared, step_rows: np.ndarray, step_cols: np.ndarray, buckets: np.ndarray, prices: np.ndarray,
                  penalty: float, states: int) -> np.ndarray:
    """Positions (in, out): column after column, each error pushed into the targets of the columns to come. A column's rows
    cost the same and are independent, so a trellis can run down them.
    """
    targets, errors, placed = p.columns.copy(), np.zeros_like(p.columns), np.zeros(p.columns.shape, np.int64)
    search, ways, raw_bits = compiled(best_path) or plain_path, arrivals(states), shifts(int(states > 0))
    for first in range(0, len(targets), FEEDBACK_BLOCK):
        end = min(first + FEEDBACK_BLOCK, len(targets))
        for j in range(first, end):
            step = step_rows * step_cols[j]
            aim = np.clip(targets[j] / step, -MAX_AIM, MAX_AIM)
            placed[j] = search(aim, buckets[j], prices, raw_bits, penalty, *ways)
            errors[j] = p.columns[j] - placed[j] * step
            targets[j + 1:end] += p.feedback[j, j + 1:end, None] * errors[j]
        targets[end:] += p.feedback[first:end, end:].T @ errors[first:end]
    return placed


@lru_cache(maxsize=4)
def compiled(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray] | None:
    """The function as machine code, kept beside this file where it can be, or None where numba is not installed."""
    try:
        import numba  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:        # no file to keep it by: a packed one
        return numba.njit(nogil=True)(function)


@lru_cache(maxsize=16)
def arrivals(states: int) -> tuple[np.ndarray, np.ndarray]:
    """(states, ways) each: the state that a way into a state comes from, and the position modulo 4 that it takes."""
    if not states:
        return np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)
    following = trellis(states)
    ways = [[(s, (s & 1) + 2 * bit) for s, bit in np.argwhere(following == n)] for n in range(states)]
    source, kind = np.array(ways).transpose(2, 0, 1)
    return np.ascontiguousarray(source), np.ascontiguousarray(kind)


def best_path(aim: np.ndarray, buckets: np.ndarray, prices: np.ndarray, raw_bits: np.ndarray, penalty: float,
              source: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Positions (rows,) of least squared distance to `aim`, in steps, plus penalty x bits (Viterbi 1967). Loops that numba
    compiles; `plain_path` is the same in numpy, tie for tie.
    """
    rows, (states, ways) = aim.size, source.shape
    doubled = 1 if states > 1 else 0
    subsets = 4 if doubled else 1
    place, own = np.empty((rows, subsets), np.int64), np.empty(subsets)
    cost, fresh = np.full(states, np.inf), np.empty(states)
    picks = np.zeros((rows, states), np.uint8)
    cost[0] = 0.0
    for i in range(rows):
        b = buckets[i]
        for d in range(subsets):        # positions equal to d modulo the subsets: the two around the aim, and zero
            low, own[d], parity = d + subsets * math.floor((aim[i] - d) / subsets), np.inf, d & 1
            for k in range(3 if d == 0 else 2):
                p = low + k * subsets if k < 2 else 0
                symbol = ((p - parity) >> doubled >> raw_bits[b]) + REACH
                c = (aim[i] - p) ** 2 + penalty * prices[b, parity, symbol if 0 <= symbol < ESCAPE else ESCAPE]
                if c < own[d]:
                    own[d], place[i, d] = c, p
        least = np.inf
        for n in range(states):
            c, pick = cost[source[n, 0]] + own[kind[n, 0]], 0
            if ways > 1:
                other = cost[source[n, 1]] + own[kind[n, 1]]
                if other < c:
                    c, pick = other, 1
            fresh[n], picks[i, n] = c, pick
            least = min(least, c)
        for n in range(states):
            cost[n] = fresh[n] - least
    state, found = cost.argmin(), np.empty(rows, np.int64)
    for i in range(rows - 1, -1, -1):
        pick = picks[i, state]
        found[i] = place[i, kind[state, pick]]
        state = source[state, pick]
    return found


def plain_path(aim: np.ndarray, buckets: np.ndarray, prices: np.ndarray, raw_bits: np.ndarray, penalty: float,
               source: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """`best_path` in numpy, for machines without numba: 8 us a weight at 8 states."""
    states = len(source)
    doubled = int(states > 1)
    subsets = 4 if doubled else 1
    kinds = np.arange(subsets)
    low = kinds + subsets * np.floor((aim[:, None] - kinds) / subsets).astype(np.int64)
    tries = np.stack([low, low + subsets, np.where(kinds == 0, 0, low)], 2)                # (rows, subsets, 3)
    parity = (kinds & 1)[:, None]
    symbols = ((tries - parity) >> doubled >> raw_bits[buckets][:, None, None]) + REACH
    symbols = np.where((symbols >= 0) & (symbols < ESCAPE), symbols, ESCAPE)
    costs = (aim[:, None, None] - tries) ** 2 + penalty * prices[buckets[:, None, None], parity, symbols]
    best = costs.argmin(2)[:, :, None]
    place, own = (np.take_along_axis(a, best, 2)[:, :, 0] for a in (tries, costs))
    everyone, picks = np.arange(states), np.zeros((len(aim), states), np.int64)
    cost = np.where(everyone == 0, 0.0, np.inf)
    for i in range(len(aim)):
        ways = cost[source] + own[i][kind]
        picks[i] = ways.argmin(1)
        cost = ways[everyone, picks[i]]
        cost = cost - cost.min()
    state, found = int(cost.argmin()), np.empty(len(aim), np.int64)
    for i in range(len(aim) - 1, -1, -1):
        found[i] = place[i, kind[state, picks[i, state]]]
        state = source[state, picks[i, state]]
    return found


def stored_on_grid(w: Tensor, p: Prepared, dial: float, options: ExportOptions, prices: np.ndarray) -> Stored:
    values = on_grid(p, dial, options.tcq_states, options.tcq_lambda, prices)
    return Stored(PlanRow(p.name, tuple(w.shape), dtype_name(w), "grid", states=options.tcq_states), values)


def small_choice(tensor: Tensor) -> Choice:
    """How rd stores what is no matrix: 8 bits cost nothing where a share of 0.01 in the error of the weights does."""
    if dtype_name(tensor) not in FLOATS:
        return Choice("raw")
    return Choice("int", "row", MAX_CODE) if tensor.numel() >= 64 else Choice("f16")


def with_small(state: dict[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, placed: Mapping[str, Stored]
               ) -> Export:
    """The file of matrices that are `placed` and of all that is none."""
    exact = replace(options, int8_scale_floor=0.0)
    return assembled(state, meta, options, {
        name: placed[name] if name in placed else store(name, t, small_choice(t), exact) for name, t in state.items()})


def planned_bits(prepared: Sequence[Prepared], dial: float) -> float:
    """What the positions will take, of the form that a Gaussian's rate has at high and at low resolution."""
    total = 0.0
    for p in prepared:
        ratio = np.exp2(2 * (p.log_sizes - p.log_steps - dial))
        total += 0.5 * p.columns.shape[1] * float(np.log2(1 + GAUSS_RATE * ratio).sum())
    return total


def dial_for(prepared: Sequence[Prepared], bits: float) -> float:
    """The dial whose planned bits these are; steps grow with it."""
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if planned_bits(prepared, middle) > bits else (low, middle)
    return high


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The results in order; whatever the number of threads, each item is the work of one."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, items))


def rd_budget(options: ExportOptions, weights: int, code_bytes: int) -> tuple[int, float, float]:
    """(most, aim, window) in bytes of an rd artifact of so many weights."""
    cap = options.artifact_cap_bytes - code_bytes if options.artifact_cap_bytes else math.inf
    most = math.floor(min(options.export_bits / 8 * weights or math.inf, cap, FINEST_BITS / 8 * weights + RD_WINDOW_BYTES))
    return most, most - min(RD_WINDOW_BYTES / 4, most / 200), min(RD_WINDOW_BYTES, most / 100)


def rate_distortion(state: dict[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, statistics: Statistics,
                    code_bytes: int, reserve_bytes: int, given: Iterable[Mapping[str, Stored]]) -> Export:
    """The export of least expected loss in the bytes that EXPORT_BITS or the cap leaves, at most RD_WINDOW_BYTES below them.
    One dial sets all steps, because all costs are in nats: at equal cost x step^2 no bit is worth more elsewhere (Shoham &
    Gersho 1988). Raises ArtifactError where the coarsest grid is too large.
    """
    names = [name for name, t in state.items() if name in matrices({name: t.shape}) and dtype_name(t) in FLOATS]
    prepared = in_threads(lambda name: prepare(name, state[name], statistics.terms[name]), names)
    high, aim, window = rd_budget(options, sum(t.numel() for t in state.values()), code_bytes)
    high, aim, overhead, found, note = high - reserve_bytes, aim - reserve_bytes, 0.0, [], ""
    for placed in given:
        made = with_small(state, meta, options, placed)
        made.report = replace(made.report, planned_bytes=high, expected_nats=0.0)
        if len(made.data) <= high:
            return made
        note = f"the integers of FINISH_STEPS take more than {high} bytes: placed anew"
    prices = SymbolModel(int(options.tcq_states > 0)).prices()
    for _ in range(MAX_DIALS):
        dial = dial_for(prepared, 8 * aim - overhead)
        stored = in_threads(lambda p, dial=dial, prices=prices: stored_on_grid(state[p.name], p, dial, options, prices),
                            prepared)
        export = with_small(state, meta, options, {s.row.name: s for s in stored})
        export.dial = dial
        found.append(export)
        if high - window <= len(export.data) <= high or not names:
            break
        overhead, prices = 8 * len(export.data) - planned_bits(prepared, dial), export.prices
    fitting = [e for e in found if len(e.data) <= high]
    smallest = min(len(e.data) for e in found)
    require(bool(fitting), "plan", None, f"{smallest} bytes at the coarsest tried beside {code_bytes} of code",
            f"at most {high}; choose a smaller shape or more bits")
    best = max(fitting, key=lambda e: len(e.data))
    loss = sum(expected_loss(state[name] - restore(s.row, s.values).to(state[name].dtype), statistics.terms[name])
               for name, s in best.tensors.items() if name in names)
    slow = "" if compiled(best_path) else "numba is not installed: the search for paths took 20 to 80 times as long"
    best.report = replace(best.report, planned_bytes=high, expected_nats=loss, note=note or slow,
                          step_gains={p.name: p.gain_bits for p in prepared})
    return best


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
                 KEPT.index(row.kept), row.rank + max(row.states.bit_length() - 1, 0), FACTORS.index(row.factors))
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
    states = {row.states for row in plan if row.codec == "grid"}
    require(len(states) <= 1, "header.rows", cursor.at, f"trellises of {sorted(states)} states", "one for all matrices")
    table = []
    for stream in stream_counts(plan):
        most = {"codes": DEFLATE + MAX_RADIX_CODE, "positions": STORED}.get(stream.partition(":")[0], DEFLATE)
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
    codec = kind("codec", CODECS, [c for c in CODECS if (c == "raw") != (dtype in FLOATS)])
    tail = cursor.at                    # what the next fields may be depends on the shape, which follows them
    cursor.take(struct.calcsize("<5BI"), f"{field}.axis")
    ndim = cursor.number("B", f"{field}.ndim", 0, MAX_NDIM)
    shape = tuple(cursor.number("<I", f"{field}.dims[{d}]", 1, MAX_RAW_BYTES) for d in range(ndim))
    end, cursor.at, matrix = cursor.at, tail, codec == "int" and ndim == 2
    axis = kind("axis", AXES, AXES if matrix else AXES[:1])
    bare = PlanRow(name, shape, dtype, codec, axis)
    layout = kind("layout", LAYOUTS, layouts_of(bare) if matrix else LAYOUTS[:1])
    kept = kind("kept", KEPT, KEPT if matrix else KEPT[:1])
    states = 0
    if codec == "grid":
        start = cursor.at
        log_states = cursor.number("B", f"{field}.states", 0, 8)
        states = 2**log_states if log_states else 0
        require(log_states != 1 and ndim == 2, f"{field}.states", start, f"{states} for {ndim} dims", "0, 4..256 for 2 dims")
    rank = 0 if codec == "grid" else cursor.number("B", f"{field}.rank", 0, min(MAX_RANK, *shape) if matrix else 0)
    factors = kind("factors", FACTORS, FACTORS if rank else FACTORS[:1])
    most = {"none": 0, "rows": shape[0], "cols": shape[1], "entries": bare.numel}[kept] if matrix else 0
    count = cursor.number("<I", f"{field}.kept_count", min(most, 1), most)
    cursor.at = end
    return replace(bare, layout=layout, kept=kept, kept_count=count, rank=rank, factors=factors, states=states)


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


def parse_grid(plan: Sequence[PlanRow], values: dict[str, dict[str, np.ndarray]], body: bytes, offsets: Mapping[str, int]
               ) -> None:
    """Fills in the steps and positions of all grid matrices."""
    for row in (row for row in plan if row.codec == "grid"):
        units = values[row.name]["bases"][len(BASES) // 2:]
        require(units.min() >= 1, f"bases of {row.name}", offsets["bases"], f"a unit of {units.min()}", "at least 1")
    check_grid_bytes(plan, len(body), offsets["positions"])
    reader = SymbolReader(body, offsets["positions"])
    code_grid(reader, plan, values, offsets["positions"])
    reader.finish()


def check_grid_bytes(plan: Iterable[PlanRow], coded_bytes: int, offset: int | None) -> None:
    """Keeps a small hostile file from long work; the writer keeps to it too."""
    shapes = [row.shape for row in plan if row.codec == "grid"]
    for what, count, ratio in zip(("positions", "rows and columns"), (sum(map(math.prod, shapes)), sum(map(sum, shapes))),
                                  MAX_GRID_RATIOS, strict=True):
        most = ratio * coded_bytes
        require(count <= most, "positions", offset, f"{count} {what} in {coded_bytes} bytes", f"at most {most}")


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
    step_gains: dict[str, float] = field(default_factory=dict)          # bits a weight by water-filling, predicted
    note: str = ""              # which lever ran out, if one did

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / max(self.weights, 1)

    def lines(self) -> list[str]:
        """What an export says beside its size."""
        error = self.total_bytes / self.planned_bytes - 1 if self.planned_bytes else 0.0
        nats = "" if self.expected_nats is None else f" expected_loss_increase:{self.expected_nats:.6f}"
        gains = " ".join(f"{kind}:{nbytes}" for kind, nbytes in self.permutation_gains.items())
        steps = " ".join(f"{name}:{bits:.2f}" for name, bits in self.step_gains.items())
        return [text for shown, text in (
            (steps, f"water-filling: bits a weight gained over one step a matrix {steps}"),
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
    prices: np.ndarray = field(default_factory=lambda: np.zeros(0))     # of the coder's symbols, if any, in bits
    dial: float = 0.0                   # rd: that of all steps


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
    reserve_bytes: int = 0, placed: Iterable[Mapping[str, Stored]] = (),
) -> Export:
    """The bytes of the file, and what they cost and lose. `statistics` weigh errors; EXPORT_ALLOCATE=hessian and
    EXPORT_SCHEME=rd need them as =sensitivity needs its map. The total that is fitted to the cap includes `code_bytes`, and
    rd leaves `reserve_bytes` of it free. The first of the ways in which matrices are `placed` already that fits is stored
    so. Raises ArtifactError, ValueError.
    """
    if faults := options.problems():
        raise ValueError("; ".join(faults))
    for wanted, needs, given in (
        (options.export_allocate == "hessian", "EXPORT_ALLOCATE=hessian needs calibration statistics", statistics),
        (options.export_allocate == "sensitivity", "EXPORT_ALLOCATE=sensitivity needs a map", sensitivity),
        (options.export_scheme == "rd", "EXPORT_SCHEME=rd needs calibration statistics", statistics),
    ):
        if wanted and given is None:
            raise ValueError(needs)
    require(len(state) <= MAX_TENSORS, "state", None, f"{len(state)} tensors", f"at most {MAX_TENSORS}")
    for name in state:
        check_tensor(name, state[name])
    if statistics is not None:
        check_statistics(statistics, state)
    weights: dict[str, Tensor] = {name: state[name].detach().cpu() for name in sorted(state)}
    meta = {**meta, "export": options.changed} if options.changed else dict(meta)
    if options.export_scheme == "rd":
        assert statistics is not None
        return rate_distortion(weights, meta, options, statistics, code_bytes, reserve_bytes, placed)
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
    quantised, floored, error, energy, prices = 0, 0.0, 0.0, 0.0, np.zeros(0)
    coded: dict[str, tuple[int, bytes]] = {}
    for name, stored in tensors.items():
        w, restored = state[name], restore(stored.row, stored.values)
        if not bool(restored.isfinite().all()):
            peak = float(w.double().abs().max())
            raise ArtifactError(f"tensor {name}", None, f"magnitudes up to {peak:g}", f"what {stored.row.codec} can hold")
        if stored.row.codec in ("int", "grid"):
            quantised, energy = quantised + w.numel(), energy + sum_squares(w)
            error += sum_squares(w.double() - restored)
        if stored.row.codec == "int":
            layout, method, body = pack_codes(stored)
            stored.row, coded[stream_of("codes", stored.row)] = replace(stored.row, layout=layout), (method, body)
            at_floor = float((stored.values["scales"] <= np.float16(options.int8_scale_floor)).mean())
            floored += w.numel() * at_floor
    plan = tuple(s.row for s in tensors.values())
    for stream in list(stream_counts(plan))[len(coded):]:
        if stream == "positions":
            writer = SymbolWriter()
            prices = code_grid(writer, plan, {name: s.values for name, s in tensors.items()}, None).prices()
            coded[stream] = STORED, writer.encoded()
            check_grid_bytes(plan, len(coded[stream][1]), None)
        else:
            coded[stream] = pack_stream([s.values[stream] for s in tensors.values() if stream in s.values])
    table = [(method, len(body)) for method, body in coded.values()]
    text = pack_meta(dict(meta))
    require(pack_meta(parse_meta(text, "meta", None)) == text, "meta", None, "keys that are no strings", "a JSON object")
    data, header_bytes = frame(pack_header(text, plan, table), (body for _, body in coded.values()))
    parts = part_bytes(header_bytes, coded, table)
    assert sum(parts.values()) == len(data)
    rms_error = math.sqrt(error / energy) if energy else 0.0
    report = SizeReport(len(data), parts, sum(row.numel for row in plan), floored / max(quantised, 1), rms_error)
    return Export(state, tensors, data, report, prices)


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
    streams, offsets, at, positions = {}, {}, start, b""
    for (stream, count), (method, coded_bytes) in zip(counts.items(), table, strict=True):
        body = data[at:at + coded_bytes]
        if stream == "positions":
            positions = body
        else:
            streams[stream] = parse_stream(body, method, stream, count, at)
        offsets[stream], at = at, at + coded_bytes
    used, values = dict.fromkeys(counts, 0), {}
    for row in plan:
        own = values[row.name] = {}
        for kind, count in row.counts.items():
            stream = stream_of(kind, row)
            own[kind] = streams[stream][used[stream]:used[stream] + count]
            used[stream] += count
    assert used == counts
    if "positions" in offsets:
        parse_grid(plan, values, positions, offsets)
    state = {row.name: parse_tensor(row, values[row.name], offsets) for row in plan}
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
