"""Compares ways to export the same checkpoints: bytes and val_bpb of each, paired over checkpoints (say, of several seeds).

    python scripts/compare_exports.py --data DIR --tokenizer MODEL -o OUT seed1.safetensors seed2.safetensors ...

Every file is written, read back and evaluated. Residual budgets are those of a model of 17 million weights, scaled to the
checkpoint's. A row with a share of another's bytes is fitted to them. Each result goes at once into OUT.jsonl, from which a
repeated call takes what is there; OUT.md holds the table: mean over the checkpoints, with the standard deviation of the gap
and the largest and smallest paired difference from the named control.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export
import export_verbs
import train_gpt

FULL_WEIGHTS = 17_059_912                       # of the challenge's baseline, for which the budgets are meant
BUDGETS = (65_536, 98_304, 131_072)
MODES = ("off", "all_mlp_proj", "early_mlp_proj", "all_attn_proj", "early_proj_combo")
PLAIN: dict[str, Any] = {"int8_scale_floor": 0.0, "int8_keep_float_max_numel": 1024}    # scale-invariant, all matrices
FIVE = PLAIN | {"weight_quantization_bits": 5, "embed_quantization_bits": 5}
EVERYTHING = {"export_permute": "all", "export_rotate": True, "int8_residual_rank": 4}


@dataclass(frozen=True)
class Way:
    """One way to export."""
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    control: str = "baseline"       # the row that it is compared with
    share: float = 0.0              # above 0: fitted to this share of the control's bytes
    calibrated: bool = False        # statistics are given


def ways() -> Iterator[Way]:
    yield Way("baseline")
    yield Way("no floor", {"int8_scale_floor": 0.0})
    yield Way("8 bits", PLAIN)
    for bits in (6, 5, 4):
        yield Way(f"{bits} bits", PLAIN | {"weight_quantization_bits": bits, "embed_quantization_bits": bits}, "8 bits")
    for base, options in (("baseline", {}), ("5 bits", FIVE)):
        for budget in BUDGETS:
            for mode in MODES:
                extra = {"int8_residual_rank": 1, "int8_residual_budget_bytes": budget, "int8_targeted_residual_mode": mode}
                yield Way(f"{base} + rank 1 {mode} {budget}", options | extra, base)
        best = {"int8_residual_rank": 4, "int8_residual_budget_bytes": BUDGETS[-1]}
        for storage in export.FACTORS:
            yield Way(f"{base} + rank 4 {storage}", options | best | {"int8_residual_storage": storage}, base)
        yield Way(f"{base} + rank 4, weighted", options | best, base, calibrated=True)
        for name, extra in (("permute mlp", {"export_permute": "mlp"}), ("permute all", {"export_permute": "all"}),
                            ("rotate", {"export_rotate": True})):
            yield Way(f"{base} + {name}", options | extra, base)
    hessian: dict[str, Any] = {"export_allocate": "hessian"}
    for base in ("baseline", "8 bits", "6 bits", "5 bits", "4 bits"):
        yield Way(f"allocated, bytes of {base}", hessian, base, 1.0, calibrated=True)
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        yield Way(f"allocated, {share:.0%} of baseline", hessian, "baseline", share, calibrated=True)
    yield Way("allocated + permute, rotate, rank 4, 40% of baseline", hessian | EVERYTHING, "baseline", 0.4, calibrated=True)
    yield Way("allocated + rank 4, 40% of baseline", hessian | {"int8_residual_rank": 4}, "baseline", 0.4, calibrated=True)
    yield Way("uniform, fitted to 40% of baseline", PLAIN | {"cap_policy": "fit"}, "baseline", 0.4)


@dataclass
class Subject:
    """One checkpoint, open for evaluation."""
    path: str
    state: dict[str, Any]
    meta: dict[str, Any]
    args: argparse.Namespace
    known: export.Statistics | None = None

    def statistics(self) -> export.Statistics:
        if self.known is None:
            args = self.args
            self.known = export_verbs.calibrate_state(self.state, self.meta, data=args.data, tokenizer=args.tokenizer,
                                                      device=args.device, tokens=args.calibration_tokens)
        return self.known

    def evaluate(self, state: dict[str, Any]) -> train_gpt.EvalResult:
        args = self.args
        return export_verbs.evaluate_artifact(state, self.meta, data=args.data, tokenizer=args.tokenizer,
                                              device=args.device, max_tokens=args.max_tokens)

    def measure(self, way: Way, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write, read back, evaluate."""
        scale = sum(t.numel() for t in self.state.values()) / FULL_WEIGHTS
        options = dict(way.options)
        if "int8_residual_budget_bytes" in options:
            options["int8_residual_budget_bytes"] = round(scale * options["int8_residual_budget_bytes"])
        if way.share:
            options["artifact_cap_bytes"] = round(way.share * done[way.control]["bytes"])
        t0 = time.perf_counter()
        made = export.encode_artifact(self.state, self.meta, export.ExportOptions(**options),
                                      statistics=self.statistics() if way.calibrated else None)
        seconds = time.perf_counter() - t0
        result = self.evaluate(export.decode_artifact(made.data).state)
        report = made.report
        return {"bytes": len(made.data), "val_bpb": result.val_bpb, "val_loss": result.val_loss, "seconds": seconds,
                "planned_bytes": report.planned_bytes, "expected_nats": report.expected_nats,
                "permutation_gains": report.permutation_gains}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Markdown: rows are ways, figures are over the checkpoints that have them."""
    yield "| export | n | bytes | val_bpb - float, mbpb (sd) | bytes - control | mbpb - control (min..max) |"
    yield "|---|---|---|---|---|---|"
    for way in ways():
        rows = [r for r in results.values() if way.name in r and way.control in r]
        if not rows:
            continue
        gaps = [1000 * (r[way.name]["val_bpb"] - r["float"]["val_bpb"]) for r in rows]
        steps = [1000 * (r[way.name]["val_bpb"] - r[way.control]["val_bpb"]) for r in rows]
        nbytes = statistics.mean(r[way.name]["bytes"] for r in rows)
        share = nbytes / statistics.mean(r[way.control]["bytes"] for r in rows) - 1
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        against = "" if way.name == way.control else (
            f"{share:+.2%} | {statistics.mean(steps):+.3f} ({min(steps):+.3f}..{max(steps):+.3f})")
        yield (f"| {way.name} | {len(rows)} | {nbytes:,.0f} | {statistics.mean(gaps):+.3f} ({spread:.3f}) | "
               f"{against or '| '} |")


def main(argv: list[str]) -> int:
    parser = export_verbs.OneLineParser(prog="compare_exports.py")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="OUT.jsonl and OUT.md")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-tokens", type=int, default=131_072)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--only", default="", help="ways whose name holds this text, and their controls")
    args = parser.parse_args(argv)
    lines, results = Path(f"{args.output}.jsonl"), {path: {} for path in args.checkpoints}
    for text in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else ():
        row = json.loads(text)
        results.setdefault(row["checkpoint"], {})[row["name"]] = row
    needed = {name for way in ways() if args.only in way.name for name in (way.name, way.control)}
    for path in args.checkpoints:
        state, meta = export_verbs.read_with_meta(path, [])
        subject, done = Subject(path, state, meta, args), results[path]
        for way in (None, *(way for way in ways() if way.name in needed | {"baseline"})):
            name = way.name if way else "float"
            if name not in done:
                row = subject.measure(way, done) if way else {"val_bpb": subject.evaluate(state).val_bpb}
                done[name] = row | {"checkpoint": path, "name": name}
                with lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[name]) + "\n")
                gap = 1000 * (done[name]["val_bpb"] - done["float"]["val_bpb"])
                print(f"{path} {name}: bytes:{row.get('bytes', 0)} val_bpb:{row['val_bpb']:.5f} gap_mbpb:{gap:+.3f}",
                      flush=True)
    text = "\n".join(table(results)) + "\n"
    export.write_atomically(Path(f"{args.output}.md"), text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
