"""val_bpb against bytes: every export scheme at many sizes, on the same checkpoints and calibration tokens.

    python scripts/curve.py --data DIR --tokenizer MODEL -o OUT seed1.safetensors seed2.safetensors ...
    python scripts/curve.py ... --schemes int8,gptq,rd-8             # some of them; --list says which there are
    CODER=all python scripts/curve.py ... --schemes rd-8             # the integers of rd files under general-purpose coders

Every file is written, read back from its bytes and evaluated; the gap is its val_bpb minus that of the float weights, in
thousandths (mbpb). Each measurement goes at once into OUT.jsonl, keyed by weights, scheme, point and tokens, from which a
repeated call takes it: after a change to an exporter, name another OUT. OUT.json holds the summary, OUT.png the curves.

The summary compares the schemes with the peer's (--peer). For each of the peer's files: the gap of another scheme at its
bytes, between neighbouring points of that scheme on log axes, and the bytes at its gap; nothing is extrapolated. The law
G(R) = G0 4^-(R-R0) says that log4 of the gap falls by 1 a bit: `law` is the slope that fits 2 to 5 bits.
"""
from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch import Tensor

import export
import export_verbs
import peers
from compare_exports import Subject
from export import ExportOptions, decode_artifact, encode_artifact
from peers import PeerOptions
from sensitivity import Cache

Point = float
Encoded = tuple[bytes, dict[str, Tensor]]           # a file, and what a reader gets from it
Curve = list[tuple[float, float]]                   # (bytes, gap in mbpb) by rising bytes, falling gap
Row = dict[str, Any]

OCTAVES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)       # of the peer's steps; 0 = its own
SHARES = (0.5, 0.4, 0.3)                                    # of the baseline's bytes
RD_BITS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)               # of the whole file, a weight
RD_STATES = {"rd-scalar": 0, "rd-8": 8, "rd-64": 64, "rd-256": 256}
LAW_BITS = (2.0, 5.0)


# ----------------------------------------------------------------------------------------------------------------------
# Schemes: a name, its sizes, and how a file of one size is made.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    name: str
    points: tuple[Point, ...]
    encode: Callable[[Subject, Point], Encoded]
    calibrated: bool = True


def int8(subject: Subject, _: Point) -> Encoded:
    return ours(subject, {})


def allocated(subject: Subject, share: Point) -> Encoded:
    """Steps by calibration statistics, in a share of the baseline's bytes."""
    cap = round(share * len(int8(subject, 1.0)[0]))
    return ours(subject, {"export_allocate": "hessian", "artifact_cap_bytes": cap}, calibrated=True)


def rate_distortion(states: int) -> Callable[[Subject, Point], Encoded]:
    """A target in bits a weight; the trellis has so many states, 0 = scalar rounding."""
    def encode(subject: Subject, bits: Point) -> Encoded:
        return ours(subject, {"export_scheme": "rd", "export_bits": bits, "tcq_states": states}, calibrated=True)
    return encode


def ours(subject: Subject, options: Mapping[str, Any], calibrated: bool = False) -> Encoded:
    known = subject.statistics() if calibrated else None
    data = encode_artifact(subject.state, subject.meta, ExportOptions(**options), statistics=known).data
    return data, decode_artifact(data).state


def peer(codec: str = "brotli", embed_finer: float = 0.0, **changes: Any) -> Callable[[Subject, Point], Encoded]:
    """The public pipeline with steps wider by 2^octaves, the embedding's finer than that by 2^embed_finer."""
    def encode(subject: Subject, octaves: Point) -> Encoded:
        options = PeerOptions(**changes).coarser(octaves, octaves - embed_finer)
        known = subject.statistics() if options.feedback else None
        data = peers.encode_peer(subject.state, known, options, codec)
        return data, peers.decode_peer(data, codec)
    return encode


def schemes() -> dict[str, Scheme]:
    """Those that can run here."""
    found = [
        Scheme("int8", (1.0,), int8, calibrated=False),
        Scheme("int8-allocated", SHARES, allocated),
        Scheme("rtn", (-1.0, 0.0), peer(feedback=False), calibrated=False),
        Scheme("gptq", OCTAVES, peer()),
        Scheme("gptq-fine-embed", OCTAVES[3:], peer(embed_finer=2.0)),
    ]
    if "zpaq" in peers.codecs_here():
        found.append(Scheme("gptq-zpaq", OCTAVES[3::2], peer("zpaq")))
    if "export_bits" in {f.name for f in fields(ExportOptions)}:
        found += [Scheme(name, RD_BITS, rate_distortion(states)) for name, states in RD_STATES.items()]
    return {scheme.name: scheme for scheme in found}


# ----------------------------------------------------------------------------------------------------------------------
# Coders: the integers of one of our files under general-purpose coders, a stream for each tensor as in the file.
# ----------------------------------------------------------------------------------------------------------------------

INTEGERS = "positions"      # the kind of stream that holds them
OWN_CODER = "rans"


def integer_bytes(values: np.ndarray) -> bytes:
    """int8 where they fit, else int16, all low bytes before all high ones."""
    if values.min() >= -128 and values.max() <= 127:
        return values.astype(np.int8).tobytes()
    if values.min() < -(2**15) or values.max() >= 2**15:
        raise ValueError(f"integers of {values.min()}..{values.max()} do not fit 16 bits")
    return export.to_planes(np.ascontiguousarray(values.reshape(-1), dtype=np.int16))


def coder_bytes(artifact: export.Artifact, coders: Iterable[str]) -> dict[str, int]:
    """Coder -> bytes of all integers; the file's own coder is what its parts say."""
    raws = [integer_bytes(kinds[INTEGERS]) for kinds in artifact.values.values() if INTEGERS in kinds]
    own = sum(size for part, size in artifact.parts.items() if part.partition(":")[0] == INTEGERS)
    return {coder: own if coder == OWN_CODER else sum(len(peers.CODECS[coder].pack(raw)) for raw in raws)
            for coder in coders}


# ----------------------------------------------------------------------------------------------------------------------
# Curves: what lies between the points, and what they say together.
# ----------------------------------------------------------------------------------------------------------------------


def frontier(points: Iterable[tuple[float, float]]) -> Curve:
    """The points that no smaller file beats; gaps at or below 0 are noise and leave, since they have no logarithm."""
    kept: Curve = []
    for nbytes, gap in sorted(points):
        if gap > 0 and (not kept or gap < kept[-1][1]):
            kept.append((nbytes, gap))
    return kept


def between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Piecewise linear through (xs, ys), xs rising; None outside."""
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    return float(np.interp(x, xs, ys))


def gap_at(curve: Curve, nbytes: float) -> float | None:
    """Gap in mbpb at a size: log gap against log bytes."""
    found = between(math.log2(nbytes), [math.log2(b) for b, _ in curve], [math.log2(g) for _, g in curve])
    return None if found is None else 2**found


def bytes_at(curve: Curve, gap: float) -> float | None:
    """Size at a gap in mbpb."""
    rising = curve[::-1]
    found = between(math.log2(gap), [math.log2(g) for _, g in rising], [math.log2(b) for b, _ in rising])
    return None if found is None else 2**found


def law_slope(points: Iterable[tuple[float, float]]) -> float | None:
    """How much log4 of the gap falls a bit, by least squares over (bits a weight, gap) in LAW_BITS; 1 = the law."""
    inside = [(bits, math.log(gap, 4)) for bits, gap in points if LAW_BITS[0] <= bits <= LAW_BITS[1] and gap > 0]
    if len({bits for bits, _ in inside}) < 2:
        return None
    return -statistics.linear_regression(*zip(*inside, strict=True)).slope


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    return {"n": len(values), "mean": statistics.mean(values), "min": min(values), "max": max(values)}


@dataclass(frozen=True)
class Results:
    """What has been measured: checkpoint -> scheme -> its rows, in the order of its points."""
    rows: dict[str, dict[str, list[Row]]]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for held in self.rows.values() for name in held))

    def curve(self, checkpoint: str, name: str) -> Curve:
        return frontier((row["bytes"], row["gap_mbpb"]) for row in self.rows[checkpoint].get(name, ()))

    def at_point(self, name: str, point: Point) -> list[Row]:
        """A row of each checkpoint."""
        return [row for held in self.rows.values() for row in held.get(name, ()) if row["point"] == point]

    def points(self, name: str) -> list[Point]:
        return list(dict.fromkeys(row["point"] for held in self.rows.values() for row in held.get(name, ())))

    def means(self, name: str) -> list[dict[str, Any]]:
        """Over the checkpoints, for each point."""
        return [{"point": point} | {key: spread([row[key] for row in self.at_point(name, point)])
                                    for key in ("bytes", "bits_per_weight", "gap_mbpb", "seconds")}
                for point in self.points(name)]

    def against(self, name: str, rival: str) -> list[dict[str, Any]]:
        """For each point of the rival: our gap over its gap at its bytes, and the share of its bytes saved at its gap."""
        found = []
        for point in self.points(rival):
            ratios, savings = [], []
            for checkpoint, held in self.rows.items():
                curve = self.curve(checkpoint, name)
                for row in held.get(rival, ()):
                    if row["point"] == point and row["gap_mbpb"] > 0:
                        gap, nbytes = gap_at(curve, row["bytes"]), bytes_at(curve, row["gap_mbpb"])
                        ratios += [gap / row["gap_mbpb"]] if gap is not None else []
                        savings += [1 - nbytes / row["bytes"]] if nbytes is not None else []
            found.append({"point": point, "gap_ratio": spread(ratios), "saving": spread(savings)})
        return found

    def law(self, name: str) -> dict[str, float]:
        slopes = [law_slope((row["bits_per_weight"], row["gap_mbpb"]) for row in held.get(name, ()))
                  for held in self.rows.values()]
        return spread([slope for slope in slopes if slope is not None])

    def summary(self, rival: str) -> dict[str, Any]:
        names = self.names()
        return {"peer": rival, "checkpoints": self.rows, "means": {name: self.means(name) for name in names},
                "law": {name: self.law(name) for name in names},
                "against_peer": {name: self.against(name, rival) for name in names if name != rival}}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring and printing.
# ----------------------------------------------------------------------------------------------------------------------


def float_bpb(subject: Subject) -> float:
    return subject.evaluate(subject.state).val_bpb


def measure(subject: Subject, scheme: Scheme, point: Point, base_bpb: float, coders: Sequence[str]) -> Row:
    """Write, read back, evaluate."""
    if scheme.calibrated:
        subject.statistics()        # outside the exporter's time
    t0 = time.perf_counter()
    data, state = scheme.encode(subject, point)
    seconds, weights = time.perf_counter() - t0, sum(t.numel() for t in subject.state.values())
    result = subject.evaluate(state)
    row = {"checkpoint": subject.path, "scheme": scheme.name, "point": point, "bytes": len(data), "val_bpb": result.val_bpb,
           "bits_per_weight": 8 * len(data) / weights, "gap_mbpb": 1000 * (result.val_bpb - base_bpb), "seconds": seconds}
    if coders and scheme.name in RD_STATES:
        row["coders"] = coder_bytes(decode_artifact(data), coders)
    print(f"{subject.path} {scheme.name} {point:g}: bytes:{row['bytes']} bits:{row['bits_per_weight']:.3f} "
          f"gap_mbpb:{row['gap_mbpb']:+.3f} seconds:{seconds:.1f}", flush=True)
    return row


def run(args: argparse.Namespace, chosen: Sequence[Scheme], coders: Sequence[str]) -> Results:
    """Everything that is not known yet is measured."""
    cache, rows = Cache(Path(f"{args.output}.jsonl")), {}
    for path in args.checkpoints:
        state, meta = export_verbs.read_with_meta(path, [])
        subject, held = Subject(path, state, meta, args), rows.setdefault(path, {})
        facts = (export.weights_digest(state), args.max_tokens)
        base = cache.get(("float", *facts), functools.partial(float_bpb, subject))
        for scheme, point in [(each, point) for each in chosen for point in each.points]:
            key = (scheme.name, point, *facts, args.calibration_tokens, *(coders if scheme.name in RD_STATES else ()))
            row = cache.get(key, functools.partial(measure, subject, scheme, point, base, coders))
            held.setdefault(scheme.name, []).append(row | {"checkpoint": path})
    return Results(rows)


def ranged(values: Mapping[str, float], form: str) -> str:
    """mean (min..max), or a dash."""
    if not values["n"]:
        return "-"
    return f"{values['mean']:{form}} ({values['min']:{form}}..{values['max']:{form}})"


def table(results: Results, rival: str, coders: Sequence[str]) -> Iterator[str]:
    """Markdown; ranges are over the checkpoints."""
    yield "| scheme | point | n | bytes | bits a weight | gap, mbpb (min..max) | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for name in results.names():
        for row in results.means(name):
            yield (f"| {name} | {row['point']:g} | {row['bytes']['n']} | {row['bytes']['mean']:,.0f} | "
                   f"{row['bits_per_weight']['mean']:.3f} | {ranged(row['gap_mbpb'], '+.3f')} | "
                   f"{row['seconds']['mean']:.1f} |")
    yield f"\n| scheme | at {rival}'s point | gap / its gap, equal bytes | bytes saved, equal gap |"
    yield "|---|---|---|---|"
    for name in results.names():
        for row in results.against(name, rival) if name != rival else ():
            if row["gap_ratio"]["n"] or row["saving"]["n"]:
                yield f"| {name} | {row['point']:g} | {ranged(row['gap_ratio'], '.3f')} | {ranged(row['saving'], '.2%')} |"
    yield f"\n| scheme | slope of log4 gap a bit, {LAW_BITS[0]:g} to {LAW_BITS[1]:g} bits (1 = the law) |"
    yield "|---|---|"
    for name in results.names():
        if (law := results.law(name))["n"]:
            yield f"| {name} | {ranged(law, '.3f')} |"
    if coders:
        yield from coder_table(results, coders)


def coder_table(results: Results, coders: Sequence[str]) -> Iterator[str]:
    """Mean bytes of the integers of rd files."""
    yield f"\n| scheme | point | {' | '.join(coders)} |"
    yield "|---|---" + "|---" * len(coders) + "|"
    for name in (name for name in results.names() if name in RD_STATES):
        for point in results.points(name):
            rows = results.at_point(name, point)
            sizes = (f"{statistics.mean(row['coders'][coder] for row in rows):,.0f}" for coder in coders)
            yield f"| {name} | {point:g} | {' | '.join(sizes)} |"


def draw(results: Results, path: Path) -> None:
    """A line a scheme through its means, a dot for each checkpoint; gaps at or below 0 have no place on a log axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, name in enumerate(results.names()):
        means = sorted((row["bytes"]["mean"], row["gap_mbpb"]["mean"]) for row in results.means(name))
        means = [(nbytes, gap) for nbytes, gap in means if gap > 0]
        dots = [(row["bytes"], row["gap_mbpb"]) for held in results.rows.values() for row in held.get(name, ())
                if row["gap_mbpb"] > 0]
        if means:
            axes.plot(*zip(*means, strict=True), "-" if len(means) > 1 else "s", color=f"C{i}", label=name, linewidth=1.2)
        if dots:
            axes.plot(*zip(*dots, strict=True), ".", color=f"C{i}", markersize=4, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="bytes of the file", ylabel="val_bpb - float, mbpb")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def coders_of(text: str) -> list[str]:
    """Names separated by commas; all = those that are installed."""
    known = [OWN_CODER, *peers.codecs_here()]
    names = known if text == "all" else [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"CODER must be of {', '.join(known)} or all, got {', '.join(unknown)}")
    return names


def command_line() -> argparse.ArgumentParser:
    parser = export_verbs.OneLineParser(prog="curve.py", description="val_bpb against bytes of export schemes.")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="OUT.jsonl, OUT.json and OUT.png")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-tokens", type=int, default=131_072, help="validation tokens; 0 = all")
    parser.add_argument("--calibration-tokens", type=int, default=131_072, help="training tokens, the same for all schemes")
    parser.add_argument("--schemes", default=",".join(schemes()), help="default: %(default)s")
    parser.add_argument("--peer", default="gptq", help="the scheme that the others are compared with")
    parser.add_argument("--coder", default=os.environ.get("CODER", ""), help=f"{OWN_CODER}, {', '.join(peers.CODECS)}, all")
    return parser


def main(argv: list[str]) -> int:
    args = command_line().parse_args(argv)
    offered = schemes()
    try:
        coders = coders_of(args.coder)
        if unknown := [name for name in args.schemes.split(",") if name not in offered]:
            raise ValueError(f"--schemes must be of {', '.join(offered)}, got {', '.join(unknown)}")
        results = run(args, [offered[name] for name in args.schemes.split(",")], coders)
    except (ValueError, OSError) as fault:
        print(f"curve.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    export.write_atomically(Path(f"{args.output}.json"), (json.dumps(results.summary(args.peer), indent=1) + "\n").encode())
    print(*table(results, args.peer, coders), sep="\n")
    if importlib.util.find_spec("matplotlib"):
        draw(results, Path(f"{args.output}.png"))
    else:
        print(f"no {args.output}.png: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
