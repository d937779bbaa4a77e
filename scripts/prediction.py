"""What an artifact will weigh before there are weights: from shapes, options and what deflate makes of normal weights."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from export import (
    CHECKSUM_BYTES,
    FIXED,
    MAX_RADIX_CODE,
    ExportOptions,
    digits_per_byte,
    matrices,
    rd_budget,
    storage,
)
from int8_plan import aim
from proxies import RD_SIDE_BYTES, huffman_bits

TAIL = 1.07     # largest weight of a trained row over that of normals (rows of three 4x256 models: 1.05..1.09)
RD_REST_BYTES, RD_FIXED_BYTES = 0.9, 800            # for each value of what is no matrix; frame, header and bases


def prediction_line(shapes: Mapping[str, tuple[int, ...]], options: ExportOptions, code_bytes: int) -> tuple[str, bool]:
    """The line about the total to expect, and whether CAP_POLICY refuses it."""
    artifact, cap = predict_artifact_bytes(shapes, options, code_bytes), options.artifact_cap_bytes
    total = artifact + code_bytes
    over = bool(cap) and total > cap
    verdict = "" if not cap else " OVER THE CAP" if over else " under the cap"
    most = rd_budget(options, weights_of(shapes), code_bytes)[0] if options.export_scheme == "rd" else math.inf
    if artifact > most and not over:
        verdict = f" OVER EXPORT_BITS={options.export_bits:g}, which allows an artifact of {most} bytes"
    line = f"predicted: artifact {artifact} + code {code_bytes} = {total} bytes of {cap}{verdict}"
    return line, artifact > most or (over and options.cap_policy != "warn")


def predict_artifact_bytes(shapes: Mapping[str, tuple[int, ...]], options: ExportOptions, code_bytes: int = 0) -> int:
    """The size of a trained model's artifact from its shapes alone: within 1 % at 3 bits and above unless
    INT8_SCALE_FLOOR sets the steps, within 2 % at 2 bits.

    It assumes normal weights with one sigma per row, fp32 tensors, and meta of some 400 bytes; `auto` counts as rows.
    Under a floor other than 0 an undertrained model comes out smaller, because the floor and not the weights sets its
    steps. An export that fits itself to the cap, and any of EXPORT_SCHEME=rd, is predicted where it will aim, as far as
    its coarsest and finest plans allow.
    """
    if options.export_scheme == "rd":
        return max(round(rd_budget(options, weights_of(shapes), code_bytes)[1]), rd_least_bytes(shapes))
    if options.solves:
        finest, coarsest = (
            predicted_bytes(shapes, replace(options, cap_policy="warn", export_allocate="uniform", int8_scale_floor=0.0,
                                            int8_clip_sigmas=0.0, int8_keep_float_max_numel=numel), q_max)
            for numel, q_max in ((2**62, None), (1024, 1.0)))
        high = options.artifact_cap_bytes - code_bytes
        # Ternary codes depend most on the shape of the weights' distribution: better to refuse than to end over the cap.
        return round(min(max(aim(high), 1.15 * coarsest), finest))
    return round(predicted_bytes(shapes, options, None))


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def rd_least_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """About what it takes with all positions at zero: steps, sizes, what is no matrix, and the header."""
    grid = matrices(shapes)
    rest = sum(math.prod(shape) for name, shape in shapes.items() if name not in grid)
    return round(RD_SIDE_BYTES * sum(map(sum, grid.values())) + RD_REST_BYTES * rest + RD_FIXED_BYTES)


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
