"""Whether the proxies of scripts/proxies.py say what true files say: rank correlations over the checkpoints of runs.

    CHECKPOINT_EVERY=10 CHECKPOINT_KEEP=20 ITERATIONS=100 RUN_ID=a python train_gpt.py      # and more of other shapes
    python scripts/validate_proxies.py logs/a logs/b -o proxies.json
    python scripts/validate_proxies.py logs/a logs/b --knob INT8_KEEP_FLOAT_MAX_NUMEL=1024 --rd-tokens 8192

Every checkpoint is written as int8 under the baseline's floor of 1/127 and without a floor, by the run's other export knobs
and those of --knob; with --rd-tokens also as rd, at the one dial that plans RD_BITS a weight for the first run's last
checkpoint: rd always ends at the size asked, at a fixed dial its bytes are what one expected loss costs.

Each proxy has a true value of its own, in its own unit, so that runs of different shapes compare: code_bytes and
metadata_bytes those parts of the file; `_bits` the bits a weight of what they speak of, order0_bits of the codes,
coarse_bits of those in a file of COARSE_BITS; exceptions, their families and bytes what `index` and `f16` grow by in a file
that keeps the exceptions. Printed: Spearman's rho with it within each run and over all checkpoints, with n; the spread of
the true value (largest over smallest - 1, in the run where that is most); the median relative error where proxy and true
value are one quantity; rho with the whole file's size. pair_saved_bits speaks of no part of a file and has no row, and rd
has parts for the first three alone.
"""
from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import stats
from torch import Tensor

import export
import export_verbs
import proxies
import train_gpt
from export import Export, ExportOptions, Stored
from int8_plan import is_target
from runs import Run, RunError, find_runs

RD_BITS, FLOOR = 4.0, 1 / 127
MIN_CHECKPOINTS = 3
COUNTS = ("exceptions", "exception_families")     # in another unit than what they claim
Values = dict[str, float]
Scheme = Callable[[dict[str, Tensor], dict[str, Any], Run], tuple[proxies.Proxies, Values]]


@dataclass(frozen=True)
class Row:
    """One checkpoint under one scheme."""
    run: str
    step: int
    scheme: str
    weights: int
    proxies: Mapping[str, float | None]
    truths: Mapping[str, float]         # by the proxy that claims them, and total_bits


# ----------------------------------------------------------------------------------------------------------------------
# True values.
# ----------------------------------------------------------------------------------------------------------------------


def bytes_of(parts: Mapping[str, int], *kinds: str) -> int:
    return sum(size for part, size in parts.items() if part.partition(":")[0] in kinds)


def common_truths(made: Export) -> Values:
    """What files of any scheme tell."""
    parts, total = made.report.parts, len(made.data)
    codes = bytes_of(parts, "codes", "positions")
    return {"total_bits": 8 * total / made.report.weights, "predicted_bytes": total, "code_bytes": codes,
            "metadata_bytes": total - codes}


def int8_scheme(state: dict[str, Tensor], meta: dict[str, Any], run: Run, *, options: ExportOptions
                ) -> tuple[proxies.Proxies, Values]:
    """One int8 file, its coarse twin, and its twin with exceptions kept."""
    made = export.encode_artifact(state, meta, options)
    tensors, parts = made.tensors, made.report.parts
    bits = proxies.COARSE_BITS
    coarse = export.encode_artifact(state, meta, replace(
        options, weight_quantization_bits=bits, embed_quantization_bits=bits)).report.parts
    kept = export.assembled(made.state, meta, options, keeping_exceptions(made.state, tensors)).report.parts
    path = bytes_of(kept, "index", "f16") - bytes_of(parts, "index", "f16")
    integers = sum(codes.size for _, codes in proxies.with_integers(tensors))
    truths = common_truths(made) | dict.fromkeys(("exceptions", "exception_families", "exception_bytes"), path) | {
        "order0_bits": 8 * bytes_of(parts, "codes") / integers, "coarse_bits": 8 * bytes_of(coarse, "codes") / integers}
    subsets = {"embedding_bits": lambda row: row.codec == "int" and row.name in export.EMBED_NAMES,
               "early_projection_bits": lambda row: row.codec == "int" and is_target(row.name, "early_proj_combo"),
               "small_bits": lambda row: row.codec in ("f16", "f32")}
    for name, belongs in subsets.items():
        rows = [s.row for s in tensors.values() if belongs(s.row)]
        size = (bytes_of(parts, "f16", "f32") if name == "small_bits" else
                sum(parts[export.stream_of("codes", row)] for row in rows))
        if rows:
            truths[name] = 8 * size / sum(row.numel for row in rows)
    return proxies.measure(state, meta, options, tensors), truths


def keeping_exceptions(state: Mapping[str, Tensor], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with their exceptions kept as fp16 entries, the codes in their places 0."""
    found = dict(tensors)
    for name, stored in tensors.items():
        if stored.row.codec != "int" or len(stored.row.shape) != 2:
            continue
        at = proxies.exceptions_of(state[name]).view(-1).nonzero().view(-1).numpy()
        if at.size:
            codes = stored.values["codes"].copy()
            codes[at] = 0
            found[name] = Stored(replace(stored.row, kept="entries", kept_count=at.size), stored.values | {
                "codes": codes, "index": at.astype(np.uint32), "f16": state[name].view(-1)[at].half().numpy()})
    return found


class RdScheme:
    """rd without a target: all files at the dial of the first."""

    def __init__(self, options: ExportOptions, tokens: int):
        self.options, self.tokens, self.dial = options, tokens, math.nan

    def __call__(self, state: dict[str, Tensor], meta: dict[str, Any], run: Run) -> tuple[proxies.Proxies, Values]:
        state = dict(sorted(state.items()))
        statistics = export_verbs.calibrate_state(
            state, meta, data=run.knobs["data_path"], tokenizer=run.knobs["tokenizer_path"], device="cpu",
            tokens=self.tokens)
        grid = export.matrices(export.shapes_of(state))
        prepared = [export.prepare(name, state[name], statistics.terms[name]) for name in grid]
        if math.isnan(self.dial):
            self.dial = export.dial_for(prepared, RD_BITS * sum(math.prod(shape) for shape in grid.values()))
        prices = export.SymbolModel(int(self.options.tcq_states > 0)).prices()
        tensors = {p.name: export.stored_on_grid(state[p.name], p, self.dial, self.options, prices) for p in prepared} | {
            name: export.store(name, t, export.small_choice(t), ExportOptions(int8_scale_floor=0.0))
            for name, t in state.items() if name not in grid}
        meta |= {"export": self.options.changed}
        made = export.assembled(state, meta, self.options, {name: tensors[name] for name in state})
        return proxies.measure(state, meta, self.options, made.tensors), common_truths(made)


# ----------------------------------------------------------------------------------------------------------------------
# Correlations.
# ----------------------------------------------------------------------------------------------------------------------


def rho(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation; None where one side never changes."""
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    if len(pairs) < MIN_CHECKPOINTS or 1 in (len(set(first)), len(set(second))):
        return None
    found: Any = stats.spearmanr(first, second)
    return float(found.statistic)


def judged(rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    """What the rows of a scheme say about one proxy; None where it has no true value."""
    known = [(row, float(value), row.truths[name]) for row in rows
             if name in row.truths and (value := row.proxies[name]) is not None]
    if not known:
        return None
    by_run = {run: [(value, truth) for row, value, truth in known if row.run == run] for run in {row.run: 0 for row in rows}}
    spreads = [max(t for _, t in held) / min(t for _, t in held) - 1 for held in by_run.values()
               if held and min(t for _, t in held) > 0]
    return {"proxy": name, "within": {run: rho(held) for run, held in by_run.items()},
            "n_within": {run: len(held) for run, held in by_run.items()},
            "over": rho([(value, truth) for _, value, truth in known]), "n_over": len(known),
            "spread": max(spreads, default=None),
            "error": None if name in COUNTS else statistics.median(abs(v / t - 1) for _, v, t in known if t),
            "whole_file": rho([(value / row.weights if name.endswith("_bytes") else value, row.truths["total_bits"])
                               for row, value, _ in known])}


def shown(value: float | None, form: str = "+.3f") -> str:
    return "-" if value is None else format(value, form)


def table(scheme: str, found: Iterable[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of one scheme."""
    lines = [f"\n{scheme}\n", "| proxy | rho within each run (n) | over runs (n) | spread | error | rho with whole file |",
             "|---|---|---|---|---|---|"]
    for row in found:
        within = " ".join(f"{shown(value)} ({row['n_within'][run]})" for run, value in row["within"].items())
        cells = (row["proxy"], within, f"{shown(row['over'])} ({row['n_over']})", shown(row["spread"], ".2%"),
                 shown(row["error"], ".2%"), shown(row["whole_file"]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Command line.
# ----------------------------------------------------------------------------------------------------------------------


def checkpoints_of(run: Run) -> list[Path]:
    """By step. Raises RunError where there are too few to rank."""
    found = sorted((run.folder / "checkpoints").glob("step_*.safetensors"))
    if len(found) < MIN_CHECKPOINTS:
        raise RunError(f"{run.folder / 'checkpoints'} holds {len(found)} step_*.safetensors, wanted at least"
                       f" {MIN_CHECKPOINTS}; train with CHECKPOINT_EVERY and CHECKPOINT_KEEP")
    return found


def options_of(run: Run, knobs: Iterable[str]) -> ExportOptions:
    """The run's uniform int8 plan with `knobs` (NAME=VALUE) in place of its own. Raises ValueError."""
    known, values = {f.name.upper(): f for f in fields(ExportOptions)}, export_verbs.named_values(knobs)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"--knob takes the exporter's knobs, got {', '.join(unknown)}")
    own = {name: run.knobs[name] for f in known.values() if (name := f.name) in run.knobs and name not in (
        *export.RD_ONLY, "export_scheme", "export_allocate", "cap_policy")}
    options = ExportOptions(**own | {name.lower(): train_gpt.parse_knob(known[name], text) for name, text in values.items()})
    if options.solves:
        raise ValueError("--knob cannot set EXPORT_SCHEME, EXPORT_ALLOCATE or CAP_POLICY: the plan is uniform")
    if faults := options.problems():
        raise ValueError("; ".join(faults))
    return options


def measured(runs: Iterable[Run], knobs: Sequence[str], rd_tokens: int) -> list[Row]:
    """Every checkpoint under every scheme."""
    plans = [(run, checkpoints_of(run), options_of(run, knobs)) for run in runs]
    rd = RdScheme(ExportOptions(export_scheme="rd", tcq_states=0), rd_tokens)
    rows, count = [], sum(len(paths) for _, paths, _ in plans)
    with train_gpt.progress(count, "checkpoints", enabled=True) as bar:
        for run, paths, options in plans:
            schemes: dict[str, Scheme] = {
                "int8 floored at 1/127": partial(int8_scheme, options=replace(options, int8_scale_floor=FLOOR)),
                "int8 without a floor": partial(int8_scheme, options=replace(options, int8_scale_floor=0.0))}
            schemes |= {"rd at one dial": rd} if rd_tokens else {}
            for path in reversed(paths):            # rd's dial is that of a trained model
                state, meta = export_verbs.read_with_meta(str(path), [])
                weights, step = sum(t.numel() for t in state.values()), int(path.stem.rpartition("_")[2])
                for name, scheme in schemes.items():
                    proxy, truths = scheme(dict(state), meta, run)
                    rows.append(Row(run.run_id, step, name, weights, asdict(proxy), truths))
                bar.update()
            train_gpt.tqdm.write(f"{run.run_id}: {len(paths)} checkpoints")
    return rows


def main(arguments: list[str]) -> int:
    parser = export_verbs.OneLineParser(prog="validate_proxies.py", description="Proxies against true bytes.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs with checkpoints, or folders of such")
    parser.add_argument("--knob", action="append", default=[], metavar="NAME=VALUE", help="of the exporter, for the run's")
    parser.add_argument("--rd-tokens", type=int, default=0, help="calibration tokens of each rd file; 0 = no rd")
    parser.add_argument("-o", "--output", metavar="FILE.json", help="takes all rows and correlations")
    args = parser.parse_args(arguments)
    try:
        if args.rd_tokens < 0:
            raise ValueError(f"--rd-tokens must be at least 0, got {args.rd_tokens}")
        if args.output and not Path(args.output).parent.is_dir():
            raise ValueError(f"-o {args.output}: {Path(args.output).parent} is no folder")
        rows = measured(find_runs(args.runs), args.knob, args.rd_tokens)
        found = {scheme: [entry for f in fields(proxies.Proxies) if (entry := judged(
            [row for row in rows if row.scheme == scheme], f.name))] for scheme in dict.fromkeys(r.scheme for r in rows)}
        for scheme, entries in found.items():
            print(*table(scheme, entries), sep="\n")
        if args.output:
            text = json.dumps({"rows": [asdict(row) for row in rows], "correlations": found}, indent=1, allow_nan=False)
            export.write_atomically(Path(args.output), text.encode())
    except (ValueError, OSError) as fault:
        print(f"validate_proxies.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
