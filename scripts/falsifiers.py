"""Tries to beat the rate-distortion scheme of export.py with ideas that cost more code, and says whether they do.

    python scripts/falsifiers.py learned CHECKPOINT... --data DIR --tokenizer MODEL [-o OUT.json]
    python scripts/falsifiers.py codebooks CHECKPOINT... --data DIR --tokenizer MODEL [-o OUT.json]
    python scripts/falsifiers.py anisotropy CHECKPOINT... --data DIR --tokenizer MODEL [-o OUT.json]

learned     A small network predicts each integer of a file from what its decoder already knows: neural weight compression
            (Ryu et al. 2025, arXiv 2510.11234) reduced to the part that could still win. It is trained on that very file
            and pays for its own 8-bit parameters. `mixture`: its density codes the integers; `context`: its expected
            magnitude replaces the hand-made one of the adaptive coder. `free` is a net ten times the size that also sees
            the left neighbours, its parameters not counted. Below KILL_BITS a weight the idea is dead. `above` is what a
            hand-made context would make of the main thing that nets found: the rows of tokens that training never sees are
            nearly one vector (cosine 0.8), so that the row above tells signs; taken for the groups that it helps.
codebooks   Vectors of neighbouring weights from codebooks that all layers of a role share: k-means as in ClusComp (Liao et
            al. 2025, arXiv 2503.13089), additive as in AQLM (Egiazarian et al. 2024, arXiv 2401.06118). They get the steps,
            the order and the error feedback of rd, within a vector exactly, and an ideal adaptive coder that nobody has
            written; each is compared with rd at equal bytes, interpolated between --bits. A name like `4x256x2 cost 1.0`
            is: weights a vector x entries x codebooks added up, normalisation, price of a bit in units of the slope of the
            Gaussian's rate-distortion curve. `cost` divides by rd's water-filled steps, `size` by the sizes of rows and
            columns.
anisotropy  What unequal steps are worth: the gain that theory predicts for each matrix, and that of the measured loss.

Prints key:value lines and a Markdown table; OUT takes all figures.
"""
from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

import export
import export_verbs
from compare_exports import Subject
from export import BUCKETS, LOWEST_OCTAVE, OCTAVE, SCALE_BITS, ExportOptions, PlanRow, Prepared, SymbolModel

KILL_BITS = 0.03        # a weight; what a scheme with a decoder of its own must save to be worth its code
Values = export.Values
Row = dict[str, Any]    # of a result


def role_of(name: str) -> tuple[str, int]:
    """What a matrix does, and in which block."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return (name[found.end():], int(found[1])) if found else (name, 0)


def rd_export(subject: Subject, bits: float, states: int) -> export.Export:
    options = ExportOptions(export_scheme="rd", export_bits=bits, tcq_states=states)
    return export.encode_artifact(subject.state, subject.meta, options, statistics=subject.statistics())


# ----------------------------------------------------------------------------------------------------------------------
# What the coder of a file did: the contexts and the bits of every integer.
# ----------------------------------------------------------------------------------------------------------------------


class Tally(export.SymbolWriter):
    """A writer that remembers whose symbols it wrote, in which contexts, for how many bits."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[SymbolModel, np.ndarray, np.ndarray]] = []

    def code(self, model: SymbolModel, contexts: np.ndarray, raw_bits: np.ndarray, parity: np.ndarray,
             given: np.ndarray | None) -> np.ndarray:
        before = len(self.operations)
        found = super().code(model, contexts, raw_bits, parity, given)
        self.calls.append((model, contexts, sum_bits(shares for shares, _ in self.operations[before:])))
        return found


def sum_bits(operations: Iterable[np.ndarray]) -> np.ndarray:
    """Bits of each symbol, by its shares of 2^16 in one operation or in several."""
    return np.sum([SCALE_BITS - np.log2(shares) for shares in operations], 0)


@dataclass
class Trace:
    """The grid matrices of a file, side by side as the coder takes them."""
    groups: list[list[PlanRow]]
    values: dict[str, Values]
    contexts: dict[str, np.ndarray]     # (rows, columns) of each matrix
    bits: dict[str, float]              # of each matrix's positions
    doubled: int

    @property
    def weights(self) -> int:
        return sum(row.numel for group in self.groups for row in group)


def traced(made: export.Export) -> Trace:
    plan = [s.row for s in made.tensors.values()]
    values, writer = {name: dict(s.values) for name, s in made.tensors.items()}, Tally()
    model = export.code_grid(writer, plan, values, None)
    groups, own, contexts, bits = export.groups_of(plan, 0), iter([c for c in writer.calls if c[0] is model]), {}, {}
    for group in groups:
        calls = [next(own) for _ in range(group[0].shape[0])]
        names, ends = [row.name for row in group], np.cumsum([row.shape[1] for row in group])[:-1]
        contexts |= zip(names, np.split(np.stack([call[1] for call in calls]), ends, 1), strict=True)
        parts = np.split(np.sum([call[2] for call in calls], 0), ends)
        bits |= {name: float(part.sum()) for name, part in zip(names, parts, strict=True)}
    assert next(own, None) is None, "every symbol belongs to a matrix"
    return Trace(groups, values, contexts, bits, model.doubled)


def adaptive_bits(trace: Trace, contexts: Mapping[str, np.ndarray]) -> float:
    """What the coder's tables take in these contexts instead of its own."""
    writer, model = Tally(), SymbolModel(trace.doubled)
    raw = export.shifts(trace.doubled)
    for group in trace.groups:
        wide = np.concatenate([contexts[row.name] for row in group], 1)
        given = np.concatenate([trace.values[row.name]["positions"].reshape(row.shape) for row in group], 1)
        for own, positions in zip(wide, given.astype(np.int64), strict=True):
            writer.code(model, own, raw[own // 2], own % 2, positions)
            writer.operations.clear()
    return sum(float(bits.sum()) for _, _, bits in writer.calls)


def bits_with_above(trace: Trace) -> float:
    """Bits where the coder keeps tables apart by the weight above, in five classes of its expected magnitude, for those
    groups of matrices that this helps.
    """
    raw, total = export.shifts(trace.doubled), 0.0
    for group in trace.groups:
        contexts = np.concatenate([trace.contexts[row.name] for row in group], 1)
        given = np.concatenate([trace.values[row.name]["positions"].reshape(row.shape) for row in group], 1).astype(np.int64)
        above = np.pad(given, ((1, 0), (0, 0)))[:-1] / np.exp2(contexts // 2 / 4 + LOWEST_OCTAVE)
        writer, models = Tally(), [SymbolModel(trace.doubled) for _ in range(5)]
        for own, positions, classes in zip(contexts, given, np.rint(above).clip(-2, 2) + 2, strict=True):
            for k, model in enumerate(models):
                here = np.flatnonzero(classes == k)
                if here.size:
                    writer.code(model, own[here], raw[own[here] // 2], own[here] % 2, positions[here])
            writer.operations.clear()
        total += min(sum(trace.bits[row.name] for row in group), sum(float(bits.sum()) for _, _, bits in writer.calls))
    return total


# ----------------------------------------------------------------------------------------------------------------------
# learned: a conditional density for the integers of one file, trained on it.
# ----------------------------------------------------------------------------------------------------------------------

COMPONENTS = 3          # logistics in a mixture
ESCAPE_MASS = 2.0**-14  # shared by all 2^16 integers, so that none is impossible
HIDDEN, FREE_HIDDEN = (24,), (76, 76)
STEPS, BATCH = 600, 8192
LEFT = 3                # features of the left neighbours, the last ones; a decoder that has them cannot decode whole rows


def features(row: PlanRow, values: Values, contexts: np.ndarray, roles: Sequence[str], layers: int) -> np.ndarray:
    """(rows, columns, features) that the decoder knows before each integer, those of the left neighbours last."""
    rows, cols = row.shape
    positions = values["positions"].reshape(row.shape).astype(np.float32)
    own = values["row_sizes"].astype(np.float32) - values["row_steps"], values["col_steps"].astype(np.float32)
    level = np.clip((own[0][:, None] - own[1]) / OCTAVE, -16, 16)
    expected = np.exp2(contexts // 2 / 4 + LOWEST_OCTAVE).astype(np.float32)
    relative, ones = positions / np.exp2(level), np.ones(cols, np.float32)
    recent = forgetting_mean(np.abs(relative), ones, 8)         # the coder's does not forget
    drift = forgetting_mean(relative, 0 * ones, 64)
    above = np.pad(positions, ((2, 0), (0, 0)))
    left = np.pad(positions, ((0, 0), (4, 0)))
    role, layer = role_of(row.name)
    wide = np.ones(row.shape, np.float32)
    return np.stack([
        np.log2(expected) / 2, (level - level.mean()) / 2, np.log2(recent + 1e-3) / 2, contexts % 2 - 0.5,
        np.clip(drift * np.exp2(level) / expected, -4, 4),
        *(np.clip(p / expected, -4, 4) for p in (above[1:-1], np.abs(above[1:-1]), np.abs(above[:-2]))),
        np.arange(rows)[:, None] / rows - 0.5 * wide, np.arange(cols) / cols - 0.5 * wide,
        (own[0] - own[0].mean())[:, None] / OCTAVE * wide, (own[1] - own[1].mean()) / OCTAVE * wide,
        layer / max(layers - 1, 1) * wide, *(float(role == r) * wide for r in roles),
        *(np.clip(p / expected, -4, 4) for p in (left[:, 3:-1], np.abs(left[:, 3:-1]),
                                                 sum(np.abs(left[:, k:k - 4]) for k in range(4)) / 4)),
    ], 2).astype(np.float32)


def forgetting_mean(values: np.ndarray, start: np.ndarray, rows: float) -> np.ndarray:
    """Down each column, the mean of the values above, the last `rows` of which weigh most."""
    found, mean = np.empty(values.shape, np.float32), start
    for i in range(len(values)):
        found[i], mean = mean, mean + (values[i] - mean) / np.float32(min(rows, i + 1.0))
    return found


class Density(nn.Module):
    """A mixture of logistics over the integers, in units of the magnitude that the coder expects."""

    def __init__(self, inputs: int, hidden: Sequence[int]):
        super().__init__()
        sizes = (inputs, *hidden, 3 * COMPONENTS)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        with torch.no_grad():
            last = self.layers[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(0.1)
            last.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -0.5, 0.0, 0.5, *np.log([0.5, 0.5, 0.5])]))

    def forward(self, x: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(shares, means, scales), each (n, COMPONENTS)."""
        for layer in self.layers[:-1]:
            x = torch.nn.functional.silu(layer(x))
        logits, means, logs = self.layers[-1](x).chunk(3, 1)
        return logits.softmax(1), means * expected[:, None], logs.clamp(-6, 4).exp() * expected[:, None]


def masses(positions: Tensor, shares: Tensor, means: Tensor, scales: Tensor, spacing: int) -> Tensor:
    """Probability of each integer among those of its parity (spacing 2) or among all (1)."""
    far = -(positions[:, None] - means).abs()       # the logistic is symmetric; its left tail keeps its digits
    within = torch.sigmoid((far + spacing / 2) / scales) - torch.sigmoid((far - spacing / 2) / scales)
    return (1 - ESCAPE_MASS) * (shares * within).sum(1) + ESCAPE_MASS * spacing / 2**16


def expected_magnitude(shares: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """Mean of |x| over a mixture of logistics: 2 s log(2 cosh(m / 2 s)) for each."""
    half = means.abs() / (2 * scales)
    return (shares * 2 * scales * (half + torch.log1p(torch.exp(-2 * half)))).sum(1)


@dataclass
class Samples:
    """All integers of a file with their features."""
    x: Tensor                   # (n, features)
    expected: Tensor            # (n,)
    positions: Tensor           # (n,)
    names: list[PlanRow]        # in this order
    spacing: int

    def batch(self, index: Tensor | slice, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[index, :inputs], self.expected[index], self.positions[index]


def samples_of(trace: Trace) -> Samples:
    rows = [row for group in trace.groups for row in group]
    roles, layers = sorted({role_of(row.name)[0] for row in rows}), 1 + max(role_of(row.name)[1] for row in rows)
    parts = [features(row, trace.values[row.name], trace.contexts[row.name], roles, layers) for row in rows]
    x = torch.from_numpy(np.concatenate([part.reshape(-1, part.shape[2]) for part in parts]))
    positions = np.concatenate([trace.values[row.name]["positions"] for row in rows])
    return Samples(x, torch.exp2(2 * x[:, 0]), torch.from_numpy(positions.astype(np.float32)), rows, 1 + trace.doubled)


def trained(samples: Samples, hidden: Sequence[int], inputs: int, steps: int) -> Density:
    torch.manual_seed(1337)
    net = Density(inputs, hidden)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, expected, positions = samples.batch(torch.randint(len(samples.x), (BATCH,)), inputs)
        shares, means, scales = net(x, expected)
        loss = -masses(positions, shares, means, scales, samples.spacing).log2().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def quantised_bytes(net: nn.Module) -> int:
    """Rounds the parameters to 8 bits, one fp16 scale a tensor; returns the bytes of both."""
    total = 0
    for p in net.parameters():
        scale = (p.abs().max() / 127).clamp_min(2**-24).half().float()
        p.copy_((p / scale).round().clamp(-127, 127) * scale)
        total += p.numel() + 2
    return total


@torch.no_grad()
def judged(net: Density, samples: Samples, inputs: int, trace: Trace) -> tuple[dict[str, float], float]:
    """Bits of each matrix by the net's density, and of all by the adaptive tables in contexts of its expected magnitude."""
    bits, buckets = [], []
    for at in range(0, len(samples.x), 2**16):
        x, expected, positions = samples.batch(slice(at, at + 2**16), inputs)
        shares, means, scales = net(x, expected)
        bits.append(-masses(positions, shares, means, scales, samples.spacing).log2())
        magnitude = expected_magnitude(shares, means, scales)
        buckets.append((4 * (magnitude.log2() - LOWEST_OCTAVE)).floor().clamp(0, BUCKETS - 1).long())
    split = torch.cat(buckets).numpy()
    ends = np.cumsum([row.numel for row in samples.names])[:-1]
    contexts = {row.name: 2 * part.reshape(row.shape) + trace.contexts[row.name] % 2
                for row, part in zip(samples.names, np.split(split, ends), strict=True)}
    each = np.split(torch.cat(bits).numpy(), ends)
    own = {row.name: float(part.sum(dtype=np.float64)) for row, part in zip(samples.names, each, strict=True)}
    return own, adaptive_bits(trace, contexts)


def learn(made: export.Export, steps: int, free: bool) -> Row:
    """Bits a weight of one file's positions by hand-made and by learned densities."""
    trace = traced(made)
    samples, weights = samples_of(trace), trace.weights
    row: Row = {"bytes": len(made.data), "hand_made": sum(trace.bits.values()) / weights,
                "above": bits_with_above(trace) / weights}
    for name, hidden, inputs in (("", HIDDEN, samples.x.shape[1] - LEFT), ("free_", FREE_HIDDEN, samples.x.shape[1])):
        if name and not free:
            continue
        net = trained(samples, hidden, inputs, steps)
        row[f"{name}parameters"] = sum(p.numel() for p in net.parameters())
        decoder = 0.0 if name else 8 * quantised_bytes(net) / weights
        own, context = judged(net, samples, inputs, trace)
        mixture, context = sum(own.values()) / weights, context / weights
        row |= {f"{name}mixture": mixture, f"{name}context": context}
        row |= {} if name else {"decoder": decoder, "by_role": gains_by_role(samples.names, trace.bits, own)}
        row[f"{name}gain"] = row["hand_made"] - decoder - min(mixture, context)
    return row


def gains_by_role(rows: Sequence[PlanRow], before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Bits a weight of each role that the density saves over the hand-made contexts."""
    saved: dict[str, list[PlanRow]] = {}
    for row in rows:
        saved.setdefault(role_of(row.name)[0], []).append(row)
    return {role: round(sum(before[r.name] - after[r.name] for r in own) / sum(r.numel for r in own), 4)
            for role, own in saved.items()}


def learned(subjects: Sequence[Subject], args: argparse.Namespace) -> Iterator[Row]:
    for subject in subjects:
        for states in args.states:
            for bits in args.bits:
                t0 = time.perf_counter()
                row = learn(rd_export(subject, bits, states), args.steps, not args.no_free)
                yield {"checkpoint": subject.path, "states": states, "bits": bits} | row | {"s": time.perf_counter() - t0}


def learned_table(rows: Sequence[Row]) -> Iterator[str]:
    names = [name for name in ("hand_made", "above", "mixture", "context", "decoder", "gain", "free_mixture", "free_context",
                               "free_gain") if name in rows[0]]
    yield f"| states | bits | n | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for key in dict.fromkeys((row["states"], row["bits"]) for row in rows):
        own = [row for row in rows if (row["states"], row["bits"]) == key]
        figures = (f"{np.mean([row[name] for row in own]):.4f}" for name in names)
        yield f"| {key[0]} | {key[1]:g} | {len(own)} | {' | '.join(figures)} |"
    gains = [row["gain"] for row in rows]
    best = max(row.get("free_gain", 0.0) for row in rows)
    roles = (f"{role}:{np.mean([row['by_role'][role] for row in rows]):+.4f}" for role in rows[0]["by_role"])
    yield ""
    yield f"mixture's gain by role, its parameters not counted: {' '.join(roles)}"
    yield (f"gain_bits_mean:{np.mean(gains):+.4f} min:{min(gains):+.4f} max:{max(gains):+.4f} free_gain_max:{best:+.4f} "
           f"needed:{KILL_BITS} verdict:{'alive' if np.mean(gains) >= KILL_BITS else 'dead'}")


# ----------------------------------------------------------------------------------------------------------------------
# codebooks: vectors of weights, entries shared by all layers of a role.
# ----------------------------------------------------------------------------------------------------------------------

TRAINING_VECTORS, ROUNDS, BEAM = 2**15, 12, 4
PRIORS = (0.5, 0.1, 0.02)       # symbols that each entry counts before any; the best of them is taken for nothing


@dataclass(frozen=True)
class Setting:
    """One codebook scheme."""
    dim: int                    # weights in a vector
    entries: int                # of each codebook
    stages: int = 1             # codebooks whose entries add up
    by: str = "cost"            # normalisation
    price: float = 0.0          # of a bit, in slopes of a Gaussian's rate-distortion curve
    shared: bool = False        # one set of codebooks for all roles

    @property
    def name(self) -> str:
        return f"{self.dim}x{self.entries}x{self.stages} {self.by} {self.price}{' shared' if self.shared else ''}"


SETTINGS = (Setting(2, 256, by="size", price=1.0), Setting(2, 256, 2, by="size", price=1.0), Setting(2, 256, by="size"),
            Setting(2, 256, 2, price=1.0), Setting(4, 1024, by="size", price=1.0),
            Setting(4, 256, 2, by="size", price=1.0), Setting(4, 1024, by="size"), Setting(2, 256, price=1.0),
            Setting(4, 1024, by="size", price=1.0, shared=True), Setting(4, 256, by="size"), Setting(2, 256),
            Setting(4, 256, 2, by="size"), Setting(2, 64, by="size", price=1.0), Setting(4, 1024, price=1.0))


@dataclass
class Books:
    """Codebooks (entries, dim) each, and the bits that an entry's index is expected to take."""
    entries: list[np.ndarray]
    bits: list[np.ndarray]
    penalty: float = 0.0        # squared error that a bit is worth

    @property
    def nbytes(self) -> int:
        """8 bits a number and an fp16 scale for each book."""
        return sum(book.size + 2 for book in self.entries)

    def stored(self) -> Books:
        return replace(self, entries=[eight_bits(book) for book in self.entries])

    def values(self, found: np.ndarray) -> np.ndarray:
        """(n, dim) of indices (n, stages)."""
        return np.sum([book[own] for book, own in zip(self.entries, found.T, strict=True)], 0)


def eight_bits(book: np.ndarray) -> np.ndarray:
    scale = float(np.float16(max(np.abs(book).max() / 127, 2.0**-24)))
    return (book / scale).round().clip(-127, 127) * scale


def nearest(vectors: np.ndarray, books: Books, weights: np.ndarray, turn: np.ndarray | None = None) -> np.ndarray:
    """Indices (n, stages) of least weights x |vector - turn(sum of entries)|^2 + penalty x bits, by a beam over stages."""
    rest, cost = vectors[:, None], np.zeros((len(vectors), 1))
    found = np.zeros((len(vectors), 1, 0), np.int64)
    fee = (books.penalty / np.maximum(weights, 1e-30))[:, None, None]
    for stage, (book, bits) in enumerate(zip(books.entries, books.bits, strict=True)):
        book = book if turn is None else book @ turn.T
        scores = np.square(book).sum(1) - 2 * rest @ book.T + cost[:, :, None] + fee * bits
        flat, keep = scores.reshape(len(vectors), -1), BEAM if stage + 1 < len(books.entries) else 1
        keep = min(keep, flat.shape[1])
        best = flat.argmin(1)[:, None] if keep == 1 else np.argpartition(flat, keep - 1, 1)[:, :keep]
        parent, entry = best // len(book), best % len(book)
        cost = np.take_along_axis(flat, best, 1)
        rest = np.take_along_axis(rest, parent[:, :, None], 1) - book[entry]
        found = np.concatenate([np.take_along_axis(found, parent[:, :, None], 1), entry[:, :, None]], 2)
    return found[:, 0]


def in_chunks(vectors: np.ndarray, books: Books, weights: np.ndarray) -> np.ndarray:
    return np.concatenate([nearest(vectors[at:at + 4096], books, weights[at:at + 4096])
                           for at in range(0, len(vectors), 4096)])


def distortion(vectors: np.ndarray, books: Books, weights: np.ndarray, found: np.ndarray) -> float:
    """Weighted mean squared error of a weight."""
    return float(weights @ np.square(vectors - books.values(found)).mean(1) / weights.sum())


def refitted(vectors: np.ndarray, books: Books, weights: np.ndarray, found: np.ndarray) -> Books:
    """The other half of a k-means step: each book in turn at the weighted means of what the others leave to its entries."""
    books = replace(books, entries=list(books.entries), bits=list(books.bits))
    for stage, own in enumerate(found.T):
        size = len(books.entries[stage])
        rest = vectors - books.values(found) + books.entries[stage][own]
        mass = np.bincount(own, weights, size)
        sums = np.stack([np.bincount(own, weights * column, size) for column in rest.T], 1)
        books.entries[stage] = np.where(mass[:, None] > 0, sums / np.maximum(mass, 1e-300)[:, None], books.entries[stage])
        counts = np.bincount(own, minlength=size) + 0.5
        books.bits[stage] = np.log2(counts.sum() / counts)
    return books


def fitted(vectors: np.ndarray, weights: np.ndarray, setting: Setting, seed: int = 1337) -> Books:
    """Weighted k-means; with a price first without, then entropy-constrained (Chou, Lookabaugh & Gray 1989)."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(vectors))[:TRAINING_VECTORS]
    vectors, weights = vectors[chosen], weights[chosen]
    books, rest = Books([], []), vectors
    for _ in range(setting.stages):                 # each further book starts from what the ones before leave
        book = rest[rng.choice(len(rest), setting.entries, replace=len(rest) < setting.entries)].copy()
        books = Books([*books.entries, book], [*books.bits, np.full(setting.entries, math.log2(setting.entries))])
        for _ in range(ROUNDS):
            found = in_chunks(vectors, books, weights)
            books = refitted(vectors, books, weights, found)
        rest = vectors - books.values(in_chunks(vectors, books, weights))
    if setting.price:
        error = setting.dim * distortion(vectors, books, weights, in_chunks(vectors, books, weights)) * weights.mean()
        books.penalty = setting.price * 2 * math.log(2) * error / setting.dim
        for _ in range(ROUNDS):
            books = refitted(vectors, books, weights, in_chunks(vectors, books, weights))
    return books.stored()


def index_bits(indices: np.ndarray, contexts: np.ndarray, entries: int) -> float:
    """Bits of an ideal adaptive coder with a table for each context: each index takes log2 of (n + prior x entries) over
    (its own count + prior), all counts being those of the indices before it.
    """
    counts = np.zeros((int(contexts.max()) + 1, entries))
    np.add.at(counts, (contexts, indices), 1)
    return min(prior_bits(counts, prior) for prior in PRIORS)


def prior_bits(counts: np.ndarray, prior: float) -> float:
    start = np.full(counts.shape, prior)
    seen, before = (torch.lgamma(torch.from_numpy(a)).sum(1) for a in (counts + start, start))
    total, empty = (torch.lgamma(torch.from_numpy(a.sum(1))) for a in (counts + start, start))
    return float((total - empty - seen + before).sum()) / math.log(2)


@dataclass
class Scaled:
    """A prepared matrix with the scales that its vectors are divided by; columns in the order of quantisation."""
    p: Prepared
    rows: np.ndarray            # (out,)
    cols: np.ndarray            # (in,)
    row_weights: np.ndarray     # (out,) cost of a squared error in units of the scales, up to the columns' part
    col_weights: np.ndarray     # (in,)

    @classmethod
    def of(cls, p: Prepared, by: str) -> Scaled:
        steps = export.steps(p.row_steps).astype(np.float64), np.exp2(np.rint(p.log_steps * 8) / 8)
        scales = steps
        if by == "size":
            rows = np.sqrt(np.square(p.columns / steps[1][:, None]).mean(0)).clip(1e-12)
            scales = rows, np.sqrt(np.square(p.columns / rows).mean(1)).clip(1e-12)
        return cls(p, *scales, np.square(scales[0] / steps[0]), np.square(scales[1] / steps[1]))

    def vectors(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, dim) vectors and what a squared error of each costs."""
        y = (self.p.columns / self.cols[:, None] / self.rows).reshape(-1, dim, len(self.rows)).transpose(0, 2, 1)
        weights = self.col_weights.reshape(-1, dim).mean(1)[:, None] * self.row_weights
        return y.reshape(-1, dim), weights.reshape(-1)

    def buckets(self, dim: int) -> np.ndarray:
        """(groups, out) contexts: half octaves of the magnitude that rows and columns let expect, in steps of rd."""
        y = np.abs(self.p.columns / self.cols[:, None] / self.rows)
        y *= np.sqrt(self.col_weights)[:, None] * np.sqrt(self.row_weights)
        groups = y.reshape(-1, dim, y.shape[1]).mean(1)
        expected = groups.mean(1)[:, None] * groups.mean(0) / max(float(groups.mean()), 1e-30)
        return np.rint(2 * np.log2(expected.clip(2.0**-20, 2.0**20))).astype(np.int64) + 40

    def quantised(self, books: Books, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """(restored columns (in, out), indices (groups, out, stages)): vector after vector, errors pushed into the columns
        to come. Within a vector the feedback turns the codebook, so that the search sees the very loss.
        """
        p, targets, errors, found = self.p, self.p.columns.copy(), np.zeros_like(self.p.columns), []
        restored = np.empty_like(targets)
        for first in range(0, len(targets), dim):
            own = slice(first, first + dim)
            inside, scale = p.feedback[own, own], self.cols[own]
            root = np.sqrt(self.col_weights[own])
            turn = root[:, None] * (np.eye(dim) + inside.T * scale / scale[:, None])
            aim = (targets[own] + inside.T @ p.columns[own]) / scale[:, None] / self.rows * root[:, None]
            found.append(nearest(aim.T, books, self.row_weights, turn))
            restored[own] = books.values(found[-1]).T * scale[:, None] * self.rows
            errors[own] = p.columns[own] - restored[own]
            targets[first + dim:] += p.feedback[own, first + dim:].T @ errors[own]
        return restored, np.stack(found)


def prepared_of(subject: Subject) -> list[Prepared]:
    terms = subject.statistics().terms
    return [export.prepare(name, subject.state[name], terms[name])
            for name in export.matrices({name: t.shape for name, t in subject.state.items()})]


def by_codebooks(subject: Subject, prepared: Sequence[Prepared], setting: Setting, base: Mapping[str, Tensor],
                 side_bytes: float) -> tuple[float, dict[str, Tensor]]:
    """(bytes, state) of a scheme; what is no matrix is as in `base` and takes, with the steps, `side_bytes`."""
    state, nbytes, families = dict(base), side_bytes, {}
    for p in prepared:
        families.setdefault("" if setting.shared else role_of(p.name)[0], []).append(Scaled.of(p, setting.by))
    for family in families.values():
        vectors, weights = (np.concatenate(a) for a in zip(*(s.vectors(setting.dim) for s in family), strict=True))
        books = fitted(vectors, weights / weights.mean(), setting)
        books.penalty *= float(weights.mean())
        made = [s.quantised(books, setting.dim) for s in family]
        for s, (restored, _) in zip(family, made, strict=True):
            matrix = np.empty(restored.T.shape)
            matrix[:, s.p.order] = restored.T
            state[s.p.name] = torch.from_numpy(matrix).to(subject.state[s.p.name].dtype)
        indices = np.concatenate([found.reshape(-1, setting.stages) for _, found in made])
        tensors = np.repeat(np.arange(len(made)), [found[..., 0].size for _, found in made])
        buckets = np.concatenate([s.buckets(setting.dim).reshape(-1) for s in family])
        bits = sum(min(index_bits(own, contexts, setting.entries) for contexts in (tensors, buckets)) for own in indices.T)
        nbytes += books.nbytes + bits / 8
    return nbytes, state


def interpolated(curve: Sequence[tuple[float, float]], nbytes: float) -> float:
    """The gap at so many bytes, on a logarithmic axis; beyond the ends the last two points go on."""
    sizes, gaps = (np.array(side, float) for side in zip(*sorted(curve), strict=True))
    logs = np.log(np.maximum(gaps, 1e-9))
    at = int(np.clip(np.searchsorted(sizes, nbytes), 1, len(sizes) - 1))
    slope = (logs[at] - logs[at - 1]) / (sizes[at] - sizes[at - 1])
    return float(np.exp(logs[at] + slope * (nbytes - sizes[at])))


def codebooks(subjects: Sequence[Subject], args: argparse.Namespace) -> Iterator[Row]:
    for subject in subjects:
        base, numel = subject.evaluate(subject.state).val_bpb, sum(t.numel() for t in subject.state.values())
        prepared, reference, curve = prepared_of(subject), rd_export(subject, 2.5, args.states[0]), []
        for bits in args.bits:
            made = rd_export(subject, bits, args.states[0])
            gap = 1000 * (subject.evaluate(export.decode_artifact(made.data).state).val_bpb - base)
            curve.append((len(made.data), gap))
            yield {"checkpoint": subject.path, "rd_bytes": len(made.data), "rd_gap_mbpb": gap}
        side_bytes = len(reference.data) - sum(traced(reference).bits.values()) / 8
        rest = export.decode_artifact(reference.data).state
        for setting in SETTINGS:
            if args.only and setting.name not in args.only:
                continue
            t0 = time.perf_counter()
            nbytes, state = by_codebooks(subject, prepared, setting, rest, side_bytes)
            gap = 1000 * (subject.evaluate(state).val_bpb - base)
            rd_gap = interpolated(curve, nbytes)
            row = {"setting": setting.name, "bytes": round(nbytes), "bits_per_weight": 8 * nbytes / numel, "gap_mbpb": gap,
                   "rd_gap_mbpb": rd_gap}
            worse = gap / rd_gap if rd_gap > 0 and gap > 0 else math.nan
            yield {"checkpoint": subject.path} | asdict(setting) | row | {
                "excess_mbpb": gap - rd_gap, "excess_bits": 0.5 * math.log2(worse), "s": time.perf_counter() - t0}


def codebooks_table(rows: Sequence[Row]) -> Iterator[str]:
    rows = [row for row in rows if "setting" in row]
    yield "| codebooks | n | bytes | bits a weight | gap, mbpb | rd's gap in these bytes | difference (min..max) | in bits |"
    yield "|---" * 8 + "|"
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        mean = {key: float(np.mean([row[key] for row in own])) for key in own[0] if isinstance(own[0][key], (int, float))}
        low, high = (f(row["excess_mbpb"] for row in own) for f in (min, max))
        yield (f"| {name} | {len(own)} | {mean['bytes']:,.0f} | {mean['bits_per_weight']:.3f} | {mean['gap_mbpb']:.2f} | "
               f"{mean['rd_gap_mbpb']:.2f} | {mean['excess_mbpb']:+.2f} ({low:+.2f}..{high:+.2f}) | "
               f"{mean['excess_bits']:+.3f} |")
    won = sum(row["excess_mbpb"] < 0 for row in rows)
    yield ""
    yield f"codebooks_better:{won} of:{len(rows)} verdict:{'alive' if 2 * won > len(rows) else 'dead'}"


# ----------------------------------------------------------------------------------------------------------------------
# anisotropy: unequal steps, predicted and measured.
# ----------------------------------------------------------------------------------------------------------------------


def mean_gain(costs: np.ndarray) -> float:
    """Bits a weight of water-filled steps over one: 0.5 log2 of arithmetic over geometric mean."""
    return 0.5 * (math.log2(costs.mean()) - float(np.log2(costs).mean()))


def cholesky_costs(moment: np.ndarray) -> np.ndarray:
    """Squared Cholesky diagonal in the order of quantisation; a share of 1e-9 keeps rounding from making it singular."""
    moment = moment + 1e-9 * float(np.trace(moment)) / len(moment) * np.eye(len(moment))
    order = np.argsort(-np.diag(moment), kind="stable")[::-1]
    return np.square(np.diag(np.linalg.cholesky(moment[np.ix_(order, order)])))


def predicted(p: Prepared, w: Tensor, terms: Sequence[export.Term]) -> Row:
    """Gains of one matrix in bits a weight, on its input side and on its output side."""
    matrix = w.double().numpy()
    damped = export.curvature(matrix, terms)
    with mock.patch.object(export, "GRID_DAMPING", 0.0):
        plain = export.curvature(matrix, terms)
    positive = np.maximum(plain.rows, 1e-9 * plain.rows.mean())
    return {"matrix": p.name, "weights": w.numel(), "columns_bits": p.gain_bits,
            "columns_undamped_bits": mean_gain(cholesky_costs(plain.moment)), "rows_bits": mean_gain(damped.rows),
            "rows_undamped_bits": mean_gain(positive)}


def flattened(p: Prepared, cols: str, rows: bool) -> Prepared:
    """The same matrix with one step for all columns (`best`: the one of least loss, `geometric`: their mean) or all rows."""
    log_steps, row_steps, sizes = p.log_steps, p.row_steps, p.log_sizes
    if cols != "filled":
        one = log_steps.mean() if cols == "geometric" else -0.5 * math.log2(np.exp2(-2 * log_steps).mean())
        log_steps = np.full_like(log_steps, one)
    if rows:
        log_steps = log_steps - 0.5 * math.log2(np.exp2(-2 * row_steps / OCTAVE).mean())
        row_steps = np.zeros_like(row_steps)
        sizes = 0.5 * np.log2(np.maximum(np.square(p.columns).mean(1), 1e-30))
    return replace(p, log_steps=log_steps, row_steps=row_steps, log_sizes=sizes)


WAYS: dict[str, Callable[[Prepared], Prepared]] = {
    "water-filled": lambda p: p, "one column step": lambda p: flattened(p, "best", False),
    "one column step, geometric": lambda p: flattened(p, "geometric", False),
    "one row step": lambda p: flattened(p, "filled", True), "one step a matrix": lambda p: flattened(p, "best", True)}


def prepared_by(change: Callable[[Prepared], Prepared]) -> Callable[..., Prepared]:
    prepare = export.prepare
    return lambda *given: change(prepare(*given))


def anisotropy(subjects: Sequence[Subject], args: argparse.Namespace) -> Iterator[Row]:
    for subject in subjects:
        terms, base = subject.statistics().terms, subject.evaluate(subject.state).val_bpb
        for p in prepared_of(subject):
            yield {"checkpoint": subject.path} | predicted(p, subject.state[p.name], terms[p.name])
        for bits in args.bits:
            filled: Row = {}
            for way, change in WAYS.items():
                with mock.patch.object(export, "prepare", prepared_by(change)):
                    made = rd_export(subject, bits, args.states[0])
                gap = 1000 * (subject.evaluate(export.decode_artifact(made.data).state).val_bpb - base)
                row: Row = {"way": way, "bits": bits, "bytes": len(made.data), "gap_mbpb": gap,
                            "expected_mnats": 1000 * (made.report.expected_nats or 0.0)}
                filled = filled or row
                row["measured_bits"] = 0.5 * math.log2(max(gap, 1e-9) / max(filled["gap_mbpb"], 1e-9))
                row["expected_bits"] = 0.5 * math.log2(row["expected_mnats"] / filled["expected_mnats"])
                yield {"checkpoint": subject.path} | row


def anisotropy_table(rows: Sequence[Row]) -> Iterator[str]:
    matrices, ways = [row for row in rows if "matrix" in row], [row for row in rows if "way" in row]
    keys = ("columns_bits", "columns_undamped_bits", "rows_bits", "rows_undamped_bits")
    yield "| matrix | columns | undamped | rows | undamped |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys(row["matrix"] for row in matrices):
        own = [row for row in matrices if row["matrix"] == name]
        yield f"| {name} | {' | '.join(f'{np.mean([row[k] for row in own]):.3f}' for k in keys)} |"
    sizes = np.array([row["weights"] for row in matrices])
    means = (f"{np.average([row[k] for row in matrices], weights=sizes):.3f}" for k in keys)
    yield f"| all, by weights | {' | '.join(means)} |"
    yield ""
    yield "| steps | bits | n | bytes | gap, mbpb | that in bits a weight | second-order loss in bits a weight |"
    yield "|---" * 7 + "|"
    for key in dict.fromkeys((row["bits"], row["way"]) for row in ways):
        own = [row for row in ways if (row["bits"], row["way"]) == key]
        mean = {k: float(np.mean([row[k] for row in own])) for k in ("bytes", "gap_mbpb", "measured_bits", "expected_bits")}
        yield (f"| {key[1]} | {key[0]:g} | {len(own)} | {mean['bytes']:,.0f} | {mean['gap_mbpb']:.2f} | "
               f"{mean['measured_bits']:+.3f} | {mean['expected_bits']:+.3f} |")


VERBS = {"learned": (learned, learned_table), "codebooks": (codebooks, codebooks_table),
         "anisotropy": (anisotropy, anisotropy_table)}


def main(argv: list[str]) -> int:
    parser = export_verbs.OneLineParser(prog="falsifiers.py")
    parser.add_argument("verb", choices=tuple(VERBS))
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("-o", "--output", type=export_verbs.output_path, metavar="OUT")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-tokens", type=int, default=65_536, help="of each evaluation")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--bits", type=float, nargs="+", default=[1.8, 2.5, 3.5], help="a weight")
    parser.add_argument("--states", type=int, nargs="+", default=[8, 0], help="of the trellis; only `learned` takes several")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the network's training")
    parser.add_argument("--no-free", action="store_true", help="without the larger network")
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING", help="codebooks of these names")
    args = parser.parse_args(argv)
    measure, table = VERBS[args.verb]
    subjects = [Subject(path, *export_verbs.read_with_meta(path, []), args) for path in args.checkpoints]
    rows = []
    for row in measure(subjects, args):
        rows.append(row)
        print(" ".join(f"{k}:{v:.4f}" if isinstance(v, float) else f"{k}:{v}" for k, v in row.items()), flush=True)
    return export_verbs.publish(rows, table(rows), args.output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
