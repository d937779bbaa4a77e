"""The int8 plan where the knobs leave it open: corrections of single tensors, and the steps of all within the cap.

INT8_RESIDUAL_RANK, EXPORT_ALLOCATE and CAP_POLICY=fit. `export.py` loads this module when one of them asks for it.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export import (
    AXES,
    FACTORS,
    FLOATS,
    LQER_GROUP,
    STREAM_TYPES,
    ArtifactError,
    Choice,
    Export,
    ExportOptions,
    ExportRefused,
    Judge,
    Statistics,
    Stored,
    Term,
    assembled,
    better_axis,
    dtype_name,
    is_control,
    layouts_of,
    pack_codes,
    pack_stream,
    quantised,
    require,
    restore,
    store,
    weight_costs,
)
from sensitivity_map import SensitivityMap
from symmetries import reordered

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


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Two's-complement codes of 2 or 4 bits in bytes, the first code lowest."""
    per = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.int16) & (2**bits - 1), (0, -codes.numel() % per)).view(-1, per)
    return (codes << (bits * torch.arange(per))).sum(1).to(torch.uint8)


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
# Fit: allocation, symmetries and corrections together, until the file ends below the cap.
# ----------------------------------------------------------------------------------------------------------------------

FIT_WINDOW_BYTES = 20_000       # an export that fits itself to the cap ends at most so far below it


def aim(most: float) -> float:
    """The size to plan for where at most so many bytes may come out."""
    return most - min(FIT_WINDOW_BYTES / 4, most / 200)


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
    low, overhead, plans = high - FIT_WINDOW_BYTES, 0.0, []
    best, best_is_finest, best_choices, gains = None, False, {}, {}
    while True:
        at, price = solve(curves, aim(high) - overhead)
        choices = {name: curves[name].choices[at[name]] if name in curves else Choice("raw") for name in state}
        if not plans and options.export_permute != "off":
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


def carried_out(state: dict[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, choices: Mapping[str, Choice],
                judge: Judge, price: float | None, room: float = math.inf) -> Export:
    """Quantise by the choices, correct, write."""
    tensors = correct(quantised(state, choices, options, judge), state, judge, options, price, room)
    return assembled(state, meta, options, tensors)
