"""The public export pipeline of the challenge's entries, as the opponent of our own exporters: written from its description.

    data = encode_peer(state, statistics, PeerOptions())        # bytes of the file
    restored = decode_peer(data)                                # what a reader of these bytes gets, fp32

GPTQ (Frantar et al. 2022, arXiv 2210.17323) on full Hessians X^T X: columns by falling diagonal, the error of each spread
over those to come. Every row has one step, k standard deviations over the largest code: 6 bits and k = 12.85 for the blocks,
8 bits and k = 20 for the embedding, whose Hessian is of the head's inputs. After entropy coding the size depends only on
k / 2^bits, so `PeerOptions.coarser` draws the whole curve. What is no matrix is kept in fp16; brotli 11 or another of CODECS
packs.

Where entries differ or a plainer form is smaller, the opponent gets the smaller. Of a 4x256 model at k = 12.85, brotli:
torch.save of the dict with a byte shuffle of stride 2 over all of it, 950,569 bytes; a plain concatenation so, 947,862; with
matrices transposed, as later entries have them, 937,138 to 943,168 (trifles such as a padding byte change what brotli does);
a stream for each kind of matrix, as those have too, 933,802. The shuffle is kept for the fp16 values where it saves bytes.
Entries also keep matrices of up to 65,536 weights in fp16. On their shapes there are none; on small models most of the file
would be those, so every matrix is quantised unless `keep_numel` says otherwise.

The file: u8, 1 if the first stream is shuffled; u8 count of streams, their u32 lengths; the streams, each under the codec by
itself. First stream: u32 length of a JSON list of [name, "q" or "f", shape], the list, padded with spaces to an even offset;
fp16 steps of all matrices, fp16 values of the rest. Then for each kind of matrix int8 codes, column after column.
"""
from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import lzma
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from export import EMBED_NAMES, FLOATS, Statistics, Term, dtype_name, is_control

KEEP_NUMEL = 65_536         # matrices of up to so many weights stay in fp16 in the public entries
BLOCK_COLUMNS = 128         # columns whose errors are spread together; changes the speed alone
MAX_BITS = 8                # codes are int8
LENGTH = struct.Struct("<I")
LEAST_STEP = 2.0**-24       # the least positive fp16, for rows without spread


@dataclass(frozen=True)
class PeerOptions:
    """The defaults are those of the public entry; bits set the largest code, sigmas the row deviations it stands for."""
    block_bits: int = 6
    block_sigmas: float = 12.85
    embed_bits: int = 8
    embed_sigmas: float = 20.0
    keep_numel: int = 0         # KEEP_NUMEL as the entries; 0 = every matrix is quantised
    feedback: bool = True       # False: plain rounding on the same grids
    damping: float = 0.01       # share of the mean of a Hessian's diagonal that is added to it

    def coarser(self, octaves: float, embed_octaves: float | None = None) -> PeerOptions:
        """Steps wider by 2^octaves, about as many bits a weight fewer; the embedding's may have its own."""
        block = regrid(self.block_bits, self.block_sigmas, octaves)
        embed = regrid(self.embed_bits, self.embed_sigmas, octaves if embed_octaves is None else embed_octaves)
        return replace(self, block_bits=block[0], block_sigmas=block[1], embed_bits=embed[0], embed_sigmas=embed[1])

    def grid(self, name: str) -> tuple[int, float]:
        """(largest code, standard deviations that it stands for) of a matrix."""
        bits, sigmas = (self.embed_bits, self.embed_sigmas) if name in EMBED_NAMES else (self.block_bits, self.block_sigmas)
        return 2 ** (bits - 1) - 1, sigmas


def regrid(bits: int, sigmas: float, octaves: float) -> tuple[int, float]:
    """(bits, sigmas) of a step wider by 2^octaves; a finer one gets more bits, so that its clip cuts nothing off."""
    wider = min(max(bits, bits + math.ceil(-octaves)), max(bits, MAX_BITS))
    return wider, sigmas * 2**octaves * (2 ** (wider - 1) - 1) / (2 ** (bits - 1) - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Quantise: one matrix at a time.
# ----------------------------------------------------------------------------------------------------------------------


def row_steps(w: np.ndarray, q_max: int, sigmas: float) -> np.ndarray:
    """fp16 steps (out,) of w (out, in): `sigmas` standard deviations of a row are mapped to the code q_max."""
    spread = w.std(axis=1, ddof=1 if w.shape[1] > 1 else 0)
    return np.maximum(sigmas * spread / q_max, LEAST_STEP).astype(np.float16)


def rounded(w: np.ndarray, steps: np.ndarray, q_max: int) -> np.ndarray:
    """int8 codes (out, in) of the nearest points."""
    return np.clip(np.rint(w / steps.astype(np.float64)[:, None]), -q_max, q_max).astype(np.int8)


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """U (in, in), upper, with U^T U the inverse of the damped Hessian: row j says how an error of column j is spread."""
    mean = float(hessian.diagonal().mean())
    damped = hessian + (damping * mean if mean > 0 else 1.0) * np.eye(len(hessian))
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T


def gptq(w: np.ndarray, hessian: np.ndarray, steps: np.ndarray, q_max: int, damping: float = 0.01) -> np.ndarray:
    """int8 codes (out, in) of w (out, in) under the Hessian (in, in) of its inputs, all in float64."""
    order = np.argsort(-hessian.diagonal(), kind="stable")
    upper = inverse_factor(hessian[np.ix_(order, order)].astype(np.float64), damping)
    left = np.ascontiguousarray(w.T[order], dtype=np.float64)       # (in, out): what is still to be quantised
    codes, wide = np.empty(left.shape, np.int8), steps.astype(np.float64)
    for start in range(0, len(left), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(left))
        errors = np.empty((stop - start, left.shape[1]))
        for j in range(start, stop):
            code = np.clip(np.rint(left[j] / wide), -q_max, q_max)
            codes[j] = code
            errors[j - start] = (left[j] - code * wide) / upper[j, j]
            left[j + 1:stop] -= upper[j, j + 1:stop, None] * errors[j - start]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    restored = np.empty_like(codes)
    restored[order] = codes
    return np.ascontiguousarray(restored.T)


def input_moment(terms: Sequence[Term]) -> np.ndarray | None:
    """Mean of x x^T over the inputs of a matrix. Of a tied embedding's uses it is the head's, which alone mixes columns."""
    uses = [term.moment.double().numpy() for term in terms if not term.transposed]
    mixing = [h for h in uses if np.count_nonzero(h) > np.count_nonzero(h.diagonal())]
    return next(iter(mixing + uses), None)


def quantise_peer(name: str, w: np.ndarray, terms: Sequence[Term], options: PeerOptions) -> tuple[np.ndarray, np.ndarray]:
    """(int8 codes, fp16 steps) of one matrix; without statistics of it, plain rounding."""
    q_max, sigmas = options.grid(name)
    steps, hessian = row_steps(w, q_max, sigmas), input_moment(terms)
    if not options.feedback or hessian is None:
        return rounded(w, steps, q_max), steps
    return gptq(w, hessian, steps, q_max, options.damping), steps


# ----------------------------------------------------------------------------------------------------------------------
# Code: byte planes and a general-purpose codec.
# ----------------------------------------------------------------------------------------------------------------------


class Codec(NamedTuple):
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes], bytes]


def optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"this codec needs the package {package}: pip install -r requirements-dev.txt") from None


def lrzip(data: bytes, *flags: str) -> bytes:
    """The binary `lrzip`, which holds zpaq, from file to file."""
    binary = shutil.which("lrzip")
    if binary is None:
        raise ValueError("this codec needs the program lrzip, found none")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(data)
        subprocess.run([binary, *flags, "-q", "-o", str(target), str(source)], check=True, capture_output=True)
        return target.read_bytes()


LZMA_FILTERS: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
CODECS = {
    "brotli": Codec(lambda raw: optional("brotli").compress(raw, quality=11, lgwin=24),
                    lambda data: optional("brotli").decompress(data)),
    "zstd": Codec(lambda raw: optional("zstandard").ZstdCompressor(level=22).compress(raw),
                  lambda data: optional("zstandard").ZstdDecompressor().decompress(data)),
    "lzma": Codec(lambda raw: lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA_FILTERS),
                  lambda data: lzma.decompress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS)),
    "zlib": Codec(lambda raw: zlib.compress(raw, 9), zlib.decompress),
    "zpaq": Codec(lambda raw: lrzip(raw, "-z", "-L", "9"), lambda data: lrzip(data, "-d")),
}


def codecs_here() -> list[str]:
    """Those whose package or program is installed."""
    found = {"brotli": importlib.util.find_spec("brotli"), "zstd": importlib.util.find_spec("zstandard"),
             "zpaq": shutil.which("lrzip")}
    return [name for name in CODECS if found.get(name, name)]


def shuffle_bytes(raw: bytes) -> bytes:
    """All even bytes, then all odd ones: the halves of fp16 values apart."""
    return raw[0::2] + raw[1::2]


def unshuffle_bytes(shuffled: bytes) -> bytes:
    raw, evens = bytearray(len(shuffled)), -(-len(shuffled) // 2)
    raw[0::2], raw[1::2] = shuffled[:evens], shuffled[evens:]
    return bytes(raw)


# ----------------------------------------------------------------------------------------------------------------------
# File: writer and reader.
# ----------------------------------------------------------------------------------------------------------------------


def is_quantised(name: str, tensor: Tensor, options: PeerOptions) -> bool:
    return tensor.ndim == 2 and not is_control(name) and tensor.numel() > options.keep_numel


def by_kind(name: str) -> tuple[str, str]:
    """Sorts the same matrix of all layers together, as the later entries do."""
    return name.split(".", 2)[-1], name


def encode_peer(state: Mapping[str, Tensor], statistics: Statistics | None, options: PeerOptions, codec: str = "brotli"
                ) -> bytes:
    """The bytes of a peer's file. Raises ValueError where feedback lacks statistics, or a codec its package."""
    if options.feedback and statistics is None:
        raise ValueError("error feedback needs calibration statistics")
    return serialised(quantised_state(state, statistics, options), codec)


def quantised_state(state: Mapping[str, Tensor], statistics: Statistics | None, options: PeerOptions
                    ) -> dict[str, tuple[np.ndarray, ...]]:
    """Tensor -> (int8 codes, fp16 steps), or (fp16 values,) of one that is kept."""
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for name in sorted(state, key=by_kind):
        tensor = state[name].detach().cpu()
        if dtype_name(tensor) not in FLOATS:
            raise ValueError(f"tensor {name} is {dtype_name(tensor)}; the peers' format holds floats")
        if is_quantised(name, tensor, options):
            terms = statistics.terms.get(name, ()) if statistics else ()
            found[name] = quantise_peer(name, tensor.double().numpy(), terms, options)
        else:
            found[name] = (tensor.half().numpy(),)
    return found


def serialised(tensors: Mapping[str, tuple[np.ndarray, ...]], codec: str) -> bytes:
    """The file of these values, in their order."""
    pack = CODECS[codec].pack
    kinds = [[name, "q" if len(parts) == 2 else "f", parts[0].shape] for name, parts in tensors.items()]
    table = json.dumps(kinds, separators=(",", ":")).encode()
    table += b" " * (len(table) % 2)
    pairs = {name: parts for name, parts in tensors.items() if len(parts) == 2}
    halves = [steps for _, steps in pairs.values()] + [parts[0] for parts in tensors.values() if len(parts) == 1]
    first = b"".join([LENGTH.pack(len(table)), table, *(part.tobytes() for part in halves)])
    plain, shuffled = pack(first), pack(shuffle_bytes(first))
    streams = [min(plain, shuffled, key=len)]
    streams += [pack(b"".join(np.ascontiguousarray(pairs[name][0].T).tobytes() for name in group))
                for group in grouped(pairs)]
    return b"".join([bytes([streams[0] is shuffled, len(streams)]), *(LENGTH.pack(len(s)) for s in streams), *streams])


def grouped(names: Iterable[str]) -> list[list[str]]:
    """Neighbours of a kind share a stream."""
    return [list(group) for _, group in itertools.groupby(names, key=lambda name: by_kind(name)[0])]


def decode_peer(data: bytes, codec: str = "brotli") -> dict[str, Tensor]:
    """The fp32 state that the bytes hold. They are our own: nothing but their length is checked."""
    first, *groups = (CODECS[codec].unpack(stream) for stream in split_streams(data))
    kinds, halves = parse_first(unshuffle_bytes(first) if data[0] else first)
    matrices = {name: shape for name, kind, shape in kinds if kind == "q"}
    kept = {name: shape for name, kind, shape in kinds if kind == "f"}
    parts = iter(halves.split([shape[0] for shape in matrices.values()] + [math.prod(shape) for shape in kept.values()]))
    steps = {name: next(parts) for name in matrices}
    state = {name: next(parts).view(shape) for name, shape in kept.items()}
    raw, at = b"".join(groups), 0
    for name, (rows, cols) in matrices.items():
        codes = np.frombuffer(raw, np.int8, rows * cols, at).reshape(cols, rows).T.astype(np.float32)
        state[name], at = torch.from_numpy(codes) * steps[name][:, None], at + rows * cols
    assert at == len(raw), "the codes are exactly those of the table"
    return state


def split_streams(data: bytes) -> list[bytes]:
    lengths = struct.unpack_from(f"<{data[1]}I", data, 2)
    ends = list(itertools.accumulate(lengths, initial=2 + LENGTH.size * len(lengths)))
    assert ends[-1] == len(data), "the streams fill the file"
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def parse_first(raw: bytes) -> tuple[list[tuple[str, str, list[int]]], Tensor]:
    """The table, and the fp16 values in fp32."""
    start = LENGTH.size + LENGTH.unpack_from(raw)[0]
    halves = np.frombuffer(raw, "<f2", offset=start)
    return json.loads(raw[LENGTH.size:start]), torch.from_numpy(halves.astype(np.float32))
