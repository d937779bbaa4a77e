"""Where the bytes of an artifact go: by component, by family, by tensor, beside the entropy of each stream and the cap.

    python scripts/ledger.py final_model.int8.ptz
    python scripts/ledger.py final_model.int8.ptz --checkpoint final_model.safetensors      # and what each tensor lost
    python scripts/ledger.py A.ptz B.ptz --json difference.json --png difference.png        # what B spends otherwise than A

Components: codes (of int8 matrices, or the positions of grid matrices); scales; steps (what a grid matrix has beside its
positions: steps, sizes, bases); residuals (the factors of corrections, their scales included); exceptions (kept values and
their index); floats (tensors stored as fp16 or fp32); raw (tensors that are no floats); metadata (frame, header, checksum);
code (the packed submission). All but code sum exactly to the file.

Tensors share every stream but that of their codes, and deflate codes a stream as one. Its coded bytes are attributed to
tensors in proportion to their raw bytes, rounded by largest remainders; those of the stream `positions` in proportion to the
bits that the coder's own shares give to each symbol. Entropies are of order 0, summed over byte planes: coded bytes fall
below them only where neighbours depend on each other. A code of a trellis is the position without its lowest bit, which the
state tells; the entropy of `positions` is what its shares sum to, so that coded/entropy is the coder's overhead.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (the repository's root is not on the path before)
from torch import Tensor  # noqa: E402

import export  # noqa: E402
import export_verbs  # noqa: E402

TENSOR_COMPONENTS: tuple[str, ...] = ("codes", "scales", "steps", "residuals", "exceptions", "floats", "raw")
OTHER_COMPONENTS = ("metadata", "code")
OVERHEAD = ("frame", "header", "checksum")      # parts of a file that belong to no tensor: its metadata
FAMILIES = {                                    # family -> parts of names, the first match counts
    "embedding": ("tok_emb", "lm_head", "embed_proj"),
    "attn q/k/v": ("attn.c_q", "attn.c_k", "attn.c_v"),
    "attn proj": ("attn.proj",),
    "mlp fc": ("mlp.fc",),
    "mlp proj": ("mlp.proj",),
    "control": export.CONTROL_NAMES,
    "other": ("",),
}
Read = TypeVar("Read")


@dataclass(frozen=True)
class TensorBytes:
    """What one tensor takes, and what it lost if its original is known."""
    name: str
    family: str
    codec: str
    shape: tuple[int, ...]
    weights: int
    components: dict[str, int]      # of TENSOR_COMPONENTS
    total_bytes: int
    bits_per_weight: float
    entropy_bits: float | None      # of order 0, of one code; None without codes
    rms_error: float | None         # relative to the original's rms
    max_error: float | None         # absolute


@dataclass(frozen=True)
class StreamBytes:
    """One stream: its values before and after coding."""
    name: str
    values: int
    raw_bytes: int
    coded_bytes: int
    entropy_bytes: float


@dataclass(frozen=True)
class Ledger:
    """Every byte of a file; `components` holds the packed code too and sums to `total_bytes`."""
    path: str
    file_bytes: int
    code_bytes: int
    total_bytes: int
    cap_bytes: int                  # 0 = no cap
    weights: int
    bits_per_weight: float          # of the file, without the code
    components: dict[str, int]
    families: dict[str, dict[str, int]]     # family -> tensors, weights, bytes
    tensors: tuple[TensorBytes, ...]
    streams: tuple[StreamBytes, ...]


@dataclass(frozen=True)
class Change:
    """One line of the difference of two files; None where a file lacks the thing. Bits are bits per weight."""
    name: str
    first_bytes: int | None
    second_bytes: int | None
    first_bits: float | None
    second_bits: float | None
    change_bytes: int
    change_bits: float | None


def family_of(name: str) -> str:
    return next(family for family, parts in FAMILIES.items() if any(part in name for part in parts))


def entropy_bytes(values: np.ndarray) -> float:
    """The order-0 entropy of all values together, each byte plane by itself."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T
    counts = [found[found > 0] for found in (np.bincount(plane) for plane in planes)]
    return sum(float((n * np.log2(values.size / n)).sum()) for n in counts) / 8


def shared_out(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in proportion to the weights, in whole parts that sum to it; the largest remainders are rounded up."""
    whole = max(sum(weights), 1)
    parts, remainders = [total * w // whole for w in weights], [total * w % whole for w in weights]
    for i in sorted(range(len(weights)), key=lambda i: -remainders[i])[:total - sum(parts)]:
        parts[i] += 1
    return parts


class Tally(export.SymbolWriter):
    """Codes nothing, but adds up the bits of all symbols, by tensor and component."""

    def __init__(self, plan: Sequence[export.PlanRow]) -> None:
        super().__init__()
        self.bits = {(row.name, part): 0.0 for row in plan if row.codec == "grid" for part in ("codes", "steps")}
        self.owners = owners_of_symbols(plan)

    def code(self, model: export.SymbolModel, contexts: np.ndarray, raw_bits: np.ndarray, parity: np.ndarray,
             given: np.ndarray | None) -> np.ndarray:
        found, owners = super().code(model, contexts, raw_bits, parity, given), next(self.owners)
        bits = sum((export.SCALE_BITS - np.log2(shares) for shares, _ in self.operations), np.zeros(1))
        self.operations.clear()
        starts = np.cumsum([0] + [count for _, _, count in owners])
        assert starts[-1] == bits.size, "the coder goes another way"
        for (name, part, _), own in zip(owners, np.add.reduceat(bits, starts[:-1]), strict=True):
            self.bits[name, part] += float(own)
        return found


def owners_of_symbols(plan: Sequence[export.PlanRow]) -> Iterator[list[tuple[str, str, int]]]:
    """For each row of symbols, in the order of `export.code_grid`: (tensor, component, symbols) from left to right."""
    for group in export.groups_of(plan, 1):
        yield from [[(row.name, "steps", 1) for row in group]] * group[0].shape[1]
    for group in export.groups_of(plan, 0):
        yield from [[(row.name, "steps", 1) for _ in ("row_steps", "row_sizes") for row in group]] * group[0].shape[0]
        yield from [[(row.name, "codes", row.shape[1]) for row in group]] * group[0].shape[0]


def symbol_bits(plan: Sequence[export.PlanRow], values: Mapping[str, export.Values]) -> dict[tuple[str, str], float]:
    """(tensor, component) -> bits in the stream `positions`."""
    tally = Tally(plan)
    if tally.bits:
        export.code_grid(tally, plan, values, None)
    return tally.bits


def codes_of(row: export.PlanRow, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The codes of a matrix, of whichever kind; None without."""
    return values["positions"] >> int(row.states > 0) if row.codec == "grid" else values.get("codes")


def stream_of(kind: str, row: export.PlanRow) -> str:
    """All of a grid matrix but its bases goes through one coder."""
    return "positions" if row.codec == "grid" and kind != "bases" else export.stream_of(kind, row)


def pieces_of(row: export.PlanRow, values: Mapping[str, np.ndarray]) -> list[tuple[str, str, int]]:
    """(stream, component, raw bytes) of all that one tensor has in the file, but for what goes through the symbol coder."""
    if row.codec == "grid":
        return [("bases", "steps", values["bases"].nbytes)]
    found = []
    for kind, own in values.items():
        split = {"raw" if kind == "raw" else "floats": own.size}
        if row.codec == "int":
            scales, kept = sum(row.scale_counts), row.kept_values
            split = {
                "codes": {"codes": own.size},
                "scales": {"scales": scales, "residuals": own.size - scales},
                "f16": {"residuals": own.size - kept, "exceptions": kept},
                "factors": {"residuals": own.size},
                "index": {"exceptions": own.size},
            }[kind]
        found += [(export.stream_of(kind, row), component, n * own.itemsize) for component, n in split.items()]
    return found


def attribute(artifact: export.Artifact, bits: Mapping[tuple[str, str], float]) -> dict[str, dict[str, int]]:
    """Tensor -> component -> coded bytes; `bits` as by `symbol_bits`."""
    pieces: dict[str, list[tuple[str, str, int]]] = {}
    for row in artifact.plan:
        for stream, component, raw_bytes in pieces_of(row, artifact.values[row.name]):
            pieces.setdefault(stream, []).append((row.name, component, raw_bytes))
    if bits:
        pieces["positions"] = [(name, component, round(64 * own)) for (name, component), own in bits.items()]
    found = {row.name: dict.fromkeys(TENSOR_COMPONENTS, 0) for row in artifact.plan}
    for stream, owners in pieces.items():
        coded = shared_out(artifact.parts[stream], [weight for _, _, weight in owners])
        for (name, component, _), nbytes in zip(owners, coded, strict=True):
            found[name][component] += nbytes
    return found


def measure_streams(artifact: export.Artifact, positions_bits: float) -> tuple[StreamBytes, ...]:
    """The streams that hold anything, in the order of the file."""
    held: dict[str, list[np.ndarray]] = {}
    for row in artifact.plan:
        for kind, own in artifact.values[row.name].items():
            held.setdefault(stream_of(kind, row), []).append(own)
    return tuple(StreamBytes(
        name, sum(own.size for own in held[name]), sum(own.nbytes for own in held[name]), nbytes,
        positions_bits / 8 if name == "positions" else entropy_bytes(np.concatenate(held[name])))
        for name, nbytes in artifact.parts.items() if name in held)


def code_entropy(codes: np.ndarray | None) -> float | None:
    """The order-0 entropy of one code, in bits."""
    if codes is None:
        return None
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum()) / codes.size


def error_of(name: str, original: Mapping[str, Tensor] | None, decoded: Tensor) -> tuple[float | None, float | None]:
    """(relative rms, largest) error of a tensor; None without an original."""
    if original is None:
        return None, None
    shape = tuple(original[name].shape) if name in original else "none"
    if shape != tuple(decoded.shape):
        raise ValueError(f"tensor {name} has shape {tuple(decoded.shape)} in the artifact, {shape} in the checkpoint")
    w = original[name].double()
    if not bool(w.isfinite().all()):
        raise ValueError(f"tensor {name} of the checkpoint holds a value that is not finite")
    error = w - decoded.double()
    return math.sqrt(float(error.square().sum()) / max(float(w.square().sum()), 1e-300)), float(error.abs().max())


def options_in(artifact: export.Artifact, original: Mapping[str, Tensor] | None) -> int:
    """The cap that the file was written for; refuses to compare reordered tensors with their originals."""
    options = artifact.meta.get("export", {})
    export.require(isinstance(options, dict), "meta.export", None, options, "an object")
    cap_bytes = options.get("artifact_cap_bytes", export.ExportOptions().artifact_cap_bytes)
    export.require(type(cap_bytes) is int and cap_bytes >= 0, "meta.export.artifact_cap_bytes", None, cap_bytes, "bytes")
    order = options.get("export_permute", "off")
    if original is not None and order != "off":
        raise ValueError(f"written with EXPORT_PERMUTE={order}, so its tensors are reordered and errors cannot be compared"
                         " tensor by tensor; use `export.py verify`")
    return cap_bytes


def read_ledger(path: str, original: Mapping[str, Tensor] | None = None) -> Ledger:
    """The ledger of a file, with errors where the checkpoint's tensors are given."""
    import train_gpt

    artifact = export.load_artifact(path)
    cap_bytes, bits, tensors = options_in(artifact, original), symbol_bits(artifact.plan, artifact.values), []
    coded = attribute(artifact, bits)
    for row in artifact.plan:
        parts, entropy_bits = coded[row.name], code_entropy(codes_of(row, artifact.values[row.name]))
        nbytes = sum(parts.values())
        tensors.append(TensorBytes(row.name, family_of(row.name), row.codec, row.shape, row.numel, parts, nbytes,
                                   8 * nbytes / row.numel, entropy_bits,
                                   *error_of(row.name, original, artifact.state[row.name])))
    file_bytes, code_bytes = sum(artifact.parts.values()), train_gpt.code_bytes()
    weights, components = sum(t.weights for t in tensors), dict.fromkeys(TENSOR_COMPONENTS, 0)
    families = {family: {"tensors": 0, "weights": 0, "bytes": 0} for family in FAMILIES}
    for t in tensors:
        for key, n in (("tensors", 1), ("weights", t.weights), ("bytes", t.total_bytes)):
            families[t.family][key] += n
        for component, n in t.components.items():
            components[component] += n
    components |= {"metadata": sum(artifact.parts[part] for part in OVERHEAD), "code": code_bytes}
    assert sum(components.values()) == file_bytes + code_bytes, "a part of the file belongs to nobody"
    return Ledger(str(path), file_bytes, code_bytes, file_bytes + code_bytes, cap_bytes, weights,
                  8 * file_bytes / max(weights, 1), components, {f: sums for f, sums in families.items() if sums["tensors"]},
                  tuple(tensors), measure_streams(artifact, sum(bits.values())))


def change(name: str, first: tuple[int, int] | None, second: tuple[int, int] | None) -> Change:
    """From (bytes, weights) on both sides."""
    a, b = (side and side[0] for side in (first, second))
    a_bits, b_bits = (side and 8 * side[0] / max(side[1], 1) for side in (first, second))
    change_bits = None if a_bits is None or b_bits is None else b_bits - a_bits
    return Change(name, a, b, a_bits, b_bits, (b or 0) - (a or 0), change_bits)


def difference(first: Ledger, second: Ledger) -> dict[str, list[Change]]:
    """What changes by component (its bits spread over all weights), by family and by tensor."""
    views = [{
        "component": {name: (nbytes, side.weights) for name, nbytes in side.components.items()},
        "family": {name: (sums["bytes"], sums["weights"]) for name, sums in side.families.items()},
        "tensor": {t.name: (t.total_bytes, t.weights) for t in side.tensors},
    } for side in (first, second)]
    return {view: [change(name, a.get(name), b.get(name)) for name in {**a, **b}]
            for view, a, b in ((view, views[0][view], views[1][view]) for view in views[0])}


def table(title: str, head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns flush right but for the last, the name."""
    cells = [head.split("|"), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return ["", title, *("  ".join([f"{c:>{n}}" for c, n in zip(row, widths, strict=False)] + [row[-1]]) for row in cells)]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def heading(ledger: Ledger) -> str:
    share = f"{ledger.cap_bytes:,} ({ledger.total_bytes / ledger.cap_bytes:.2%})" if ledger.cap_bytes else "no cap"
    return (f"{ledger.path}: artifact {ledger.file_bytes:,} + code {ledger.code_bytes:,} = {ledger.total_bytes:,} bytes"
            f" of {share}, {ledger.bits_per_weight:.4f} bits a weight")


def ledger_lines(ledger: Ledger) -> list[str]:
    """The tables of one file."""
    parts = [name for name in TENSOR_COMPONENTS if ledger.components[name]]
    errors = any(t.rms_error is not None for t in ledger.tensors)
    head = "|".join(["bytes", *parts, "bits/w", "H/code", *["rms error", "max error"] * errors, "tensor"])
    sizes, total = {**ledger.components, "total": ledger.total_bytes}, ledger.total_bytes
    return [
        heading(ledger),
        *table("by component", "bytes|share|component", [[f"{n:,}", f"{n / total:.2%}", name] for name, n in sizes.items()]),
        *table("by family", "bytes|share|bits/w|tensors|weights|family", [
            [f"{sums['bytes']:,}", f"{sums['bytes'] / total:.2%}", f"{8 * sums['bytes'] / sums['weights']:.4f}",
             str(sums["tensors"]), f"{sums['weights']:,}", name] for name, sums in ledger.families.items()]),
        *table("by tensor (H/code: order-0 entropy of a code, in bits)", head, [
            [f"{t.total_bytes:,}", *(f"{t.components[part]:,}" for part in parts), f"{t.bits_per_weight:.4f}",
             number(t.entropy_bits, ".4f"), *[number(t.rms_error, ".6f"), number(t.max_error, ".3g")] * errors, t.name]
            for t in ledger.tensors]),
        *table("by stream", "values|raw|coded|entropy|coded/entropy|stream", [
            [f"{s.values:,}", f"{s.raw_bytes:,}", f"{s.coded_bytes:,}", f"{s.entropy_bytes:,.0f}",
             number(s.coded_bytes / s.entropy_bytes if s.entropy_bytes else None, ".4f"), s.name] for s in ledger.streams]),
    ]


def difference_lines(first: Ledger, second: Ledger) -> list[str]:
    """The tables of two files."""
    found = [f"first   {heading(first)}", f"second  {heading(second)}",
             f"change  {second.total_bytes - first.total_bytes:+,} bytes, "
             f"{second.bits_per_weight - first.bits_per_weight:+.4f} bits a weight"]
    lost = [{t.name: t.rms_error for t in side.tensors if t.rms_error is not None} for side in (first, second)]
    for view, changes in difference(first, second).items():
        errors = view == "tensor" and any(lost)
        head = "first|second|bytes|first|second|bits/w|" + "rms first|rms second|" * errors + view
        only = {c.name: f" (only in the {'second' if c.first_bytes is None else 'first'})" for c in changes
                if c.first_bytes is None or c.second_bytes is None}
        found += table(f"difference by {view}", head, [
            [number(c.first_bytes, ","), number(c.second_bytes, ","), f"{c.change_bytes:+,}", number(c.first_bits, ".4f"),
             number(c.second_bits, ".4f"), number(c.change_bits, "+.4f"),
             *[number(side.get(c.name), ".6f") for side in lost if errors], c.name + only.get(c.name, "")] for c in changes])
    return found


def as_json(ledgers: Sequence[Ledger]) -> dict[str, Any]:
    """Everything that is known, in JSON's own types."""
    views = difference(*ledgers) if len(ledgers) == 2 else None
    return {"ledgers": [asdict(ledger) for ledger in ledgers],
            "difference": views and {view: [asdict(c) for c in changes] for view, changes in views.items()}}


def draw(ledgers: Sequence[Ledger]) -> bytes:
    """A PNG of stacked bars, one a file: by component and by family, both with metadata and code."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as fault:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from fault
    views = {"component": [ledger.components for ledger in ledgers], "family": [
        {**{name: sums["bytes"] for name, sums in ledger.families.items()},
         **{name: ledger.components[name] for name in OTHER_COMPONENTS}} for ledger in ledgers]}
    figure = Figure(figsize=(7 + 2 * len(ledgers), 6), layout="constrained")
    for axes, (view, bars) in zip(figure.subplots(1, 2, sharey=True), views.items(), strict=True):
        bottom = np.zeros(len(bars))
        for name in dict.fromkeys((*TENSOR_COMPONENTS, *FAMILIES, *OTHER_COMPONENTS)):
            heights = np.array([bar.get(name, 0) for bar in bars])
            if not heights.any():
                continue
            axes.bar(range(len(bars)), heights, bottom=bottom, label=f"{name}: {', '.join(f'{n:,}' for n in heights)}")
            bottom += heights
        caps = {ledger.cap_bytes for ledger in ledgers if 0 < ledger.cap_bytes < 2 * ledger.total_bytes}
        for cap in caps:    # far above the bars it would flatten them
            axes.axhline(cap, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(bars)), [Path(ledger.path).name.replace("$", r"\$") for ledger in ledgers])
        axes.set(title=f"bytes by {view}", xlim=(-0.6, len(bars) - 0.4), ylim=(0, 1.05 * max([*bottom, *caps])))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), fontsize=8)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def named(path: str, read: Callable[[str], Read]) -> Read:
    """What `read` makes of the file; its faults name the file."""
    try:
        return read(path)
    except ValueError as fault:
        raise ValueError(f"{path}: {fault}") from fault


def main(arguments: list[str]) -> int:
    """Print the ledger; every fault of the input becomes one line and exit code 2, with nothing written."""
    parser = export_verbs.OneLineParser(prog="ledger.py", description="Where the bytes of an artifact go.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("second", nargs="?", metavar="FILE2", help="compare this file with the first")
    for flag, text in (("checkpoint", "the weights before the export: adds the error of each tensor"),
                       ("json", "write everything there"), ("png", "draw the bytes there")):
        parser.add_argument(f"--{flag}", metavar="FILE", help=text)
    args = parser.parse_args(arguments)
    try:
        original = named(args.checkpoint, export_verbs.read_checkpoint)[0] if args.checkpoint else None
        ledgers = [named(path, lambda path: read_ledger(path, original)) for path in (args.file, args.second)
                   if path is not None]
        text = json.dumps(as_json(ledgers), indent=1, allow_nan=False) + "\n"
        outputs = {args.png: draw(ledgers) if args.png else b"", args.json: text.encode()}
        for path in filter(None, outputs):
            export.write_atomically(Path(path), outputs[path])
    except (ValueError, OSError) as fault:
        print(f"ledger.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    print("\n".join(ledger_lines(ledgers[0]) if len(ledgers) == 1 else difference_lines(*ledgers)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
