"""Does a loss term pay? Arms that branch off one trunk a seed, each scored under several exports at equal bytes.

    python scripts/campaign.py run scripts/campaigns/terms.toml --slots 2      # again after a kill: it goes on where it was
    python scripts/campaign.py run SPEC --seeds 1337 --only plain,noise        # a part of it
    python scripts/campaign.py table SPEC -o table.md                          # paired differences from the control

A specification is that of scripts/sweep_spec.py (name, base, seeds, control, [knobs], [arms], [grid]) with

    branch = 300                # step at which all arms leave the trunk, which is the control's run; 0 = none, from scratch
    calibration_tokens = 32768  # that the exports below learn from
    val_tokens = 65536          # that they are scored on
    [exports.rd2]               # one table an export, knobs of the export
    EXPORT_SCHEME = "rd"
    EXPORT_BITS = [1.98, 2.0, 2.02]     # several: the mean over their files, because one at so few bits is a matter of luck
    [frozen]                    # arms whose FINISH_STEPS end at a file's own integers, and the export that it stands for
    freeze = "rd2"

Places (DATA_PATH, TOKENIZER_PATH, LOG_DIR, DEVICE) come from the environment. Every arm keeps its final float weights; a
score is the val_bpb of its artifact, written, read back and evaluated; it stands in LOG_DIR/NAME_ARM_sSEED/scores.json. Arms
of a seed share data, initial weights and everything up to the branch: their differences spread far less than runs do.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import export_verbs  # noqa: E402  (the repository's root is not on the path before)
import paired  # noqa: E402
from compare_exports import Subject, Way  # noqa: E402
from export import ExportOptions, load_artifact  # noqa: E402
from sweep_spec import PLACES, SpecError, as_knobs, base_knobs, expand, tomllib, write_object  # noqa: E402
from train_gpt import Config, parse_knob  # noqa: E402

SMALLEST_EFFECT = 0.001     # bpb; below it nobody would keep a term for its lines
FLOAT = "float"             # the weights before any export


@dataclass(frozen=True)
class Campaign:
    name: str
    seeds: list[int]
    control: str
    branch: int
    calibration_tokens: int
    val_tokens: int
    arms: dict[str, dict[str, str]]         # every knob that is set
    exports: dict[str, list[dict[str, Any]]]    # fields of ExportOptions, of each file
    frozen: dict[str, str]                  # arms scored by their own file, and the export that it stands for

    def folder(self, arm: str, seed: int) -> Path:
        return Path(self.arms[arm].get("LOG_DIR", "logs")) / f"{self.name}_{arm}_s{seed}"

    def exports_of(self, arm: str) -> list[str]:
        """Names of the exports that it is scored under."""
        return [self.frozen[arm]] if arm in self.frozen else list(self.exports)

    def problems(self) -> Iterator[str]:
        if self.control not in self.arms:
            yield f"control {self.control!r} is no arm"
        for arm, knobs in self.arms.items():
            cfg, faults = Config.parse(knobs)
            yield from (f"arm {arm}: {fault}" for fault in faults)
            if not faults and (arm in self.frozen) != (cfg.finish_steps > 0 and cfg.export_scheme == "rd"):
                yield f"arm {arm}: [frozen] must name those that have FINISH_STEPS under EXPORT_SCHEME=rd, and no others"
        for name, files in self.exports.items():
            yield from (f"export {name}: {fault}" for options in files for fault in ExportOptions(**options).problems())
        for arm, name in self.frozen.items():
            if arm not in self.arms or name not in self.exports:
                yield f"[frozen] {arm} = {name!r}: no such arm, or no such export"


def read_campaign(path: Path, env: Mapping[str, str]) -> Campaign:
    """Raises SpecError with every fault of the file."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        places = {name: env[name] for name in PLACES if name in env}
        common = base_knobs(path, raw.get("base")) | places | as_knobs(raw.get("knobs", {}))
        arms = {arm: common | knobs for arm, knobs in expand(raw).items()}
        exports = {name: files_of(table) for name, table in raw["exports"].items()}
        found = Campaign(raw["name"], raw["seeds"], raw["control"], raw.get("branch", 0), raw["calibration_tokens"],
                         raw["val_tokens"], arms, exports, raw.get("frozen", {}))
    except (OSError, ValueError, KeyError) as fault:
        raise SpecError([f"{path}: {type(fault).__name__}: {fault}"]) from fault
    if problems := [f"{path}: {fault}" for fault in found.problems()]:
        raise SpecError(problems)
    return found


def files_of(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of every file of an export: one, or as many as the values of a knob that is listed."""
    listed = [name for name, value in table.items() if isinstance(value, list)]
    tables = [{**table, name: value} for name in listed for value in table[name]] or [table]
    return [options_of(as_knobs(one)) for one in tables]


def options_of(knobs: Mapping[str, str]) -> dict[str, Any]:
    known = ExportOptions.__dataclass_fields__
    return {name.lower(): parse_knob(known[name.lower()], value) for name, value in knobs.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Train and score.
# ----------------------------------------------------------------------------------------------------------------------


def train(campaign: Campaign, arm: str, seed: int, threads: int) -> None:
    """Runs the trainer, unless the run is there. Raises CalledProcessError."""
    folder = campaign.folder(arm, seed)
    if (folder / "summary.json").exists():
        return
    env = {k: v for k, v in os.environ.items() if k not in {name.upper() for name in Config.__dataclass_fields__}}
    env |= campaign.arms[arm] | {"RUN_ID": folder.name, "SEED": str(seed), "SAVE_RAW_CHECKPOINT": "1", "RESUME": "auto",
                                 "OMP_NUM_THREADS": str(threads)}
    if arm == campaign.control and campaign.branch:
        env |= {"CHECKPOINT_EVERY": str(campaign.branch), "CHECKPOINT_KEEP": "1000"}
    elif campaign.branch and not list(folder.glob("checkpoints/*")):
        trunk = campaign.folder(campaign.control, seed)
        env["RESUME"] = str(trunk / "checkpoints" / f"step_{campaign.branch:08d}.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "campaign.out").open("a") as out:
        subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, stdout=out, stderr=out, check=True)


def scores_of(campaign: Campaign, arm: str, seed: int) -> dict[str, dict[str, Any]]:
    path = campaign.folder(arm, seed) / "scores.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def score(campaign: Campaign, arm: str, seed: int) -> dict[str, dict[str, Any]]:
    """Bytes and val_bpb of every export of the arm that scores.json lacks; each goes there at once."""
    folder, knobs = campaign.folder(arm, seed), campaign.arms[arm]
    path, found = folder / "scores.json", scores_of(campaign, arm, seed)
    state, meta = export_verbs.read_with_meta(str(folder / "final_model.safetensors"), [])
    subject = Subject(str(folder), state, meta, argparse.Namespace(
        data=knobs["DATA_PATH"], tokenizer=knobs["TOKENIZER_PATH"], device=knobs.get("DEVICE", "auto"),
        max_tokens=campaign.val_tokens, calibration_tokens=campaign.calibration_tokens))
    for name in (FLOAT, *campaign.exports_of(arm)):
        if name not in found:
            if name == FLOAT:
                files = [{"val_bpb": subject.evaluate(state).val_bpb}]
            elif arm in campaign.frozen:
                files = [own_file(subject, folder)]
            else:
                files = [subject.measure(Way(name, options, calibrated=options.get("export_scheme") == "rd"), {})
                         for options in campaign.exports[name]]
            means = {key: statistics.mean(row[key] for row in files) for key in ("val_bpb", "bytes") if key in files[0]}
            found[name] = means | {"files": [row["val_bpb"] for row in files]}
            write_object(path, found)
    return found


def own_file(subject: Subject, folder: Path) -> dict[str, float]:
    """Of the artifact that the run itself wrote."""
    path = folder / json.loads((folder / "summary.json").read_text(encoding="utf-8"))["artifact"]
    return {"bytes": path.stat().st_size, "val_bpb": subject.evaluate(load_artifact(str(path)).state).val_bpb}


def carry_out(campaign: Campaign, spec: Path, arms: list[str], seeds: list[int], slots: int, threads: int) -> int:
    """Trunks first, then the other arms seed by seed; returns how many failed."""
    def one(job: tuple[str, int]) -> int:
        arm, seed = job
        try:
            train(campaign, arm, seed, threads)
            if scores_of(campaign, arm, seed).keys() >= {FLOAT, *campaign.exports_of(arm)}:
                return 0
            scoring = [sys.executable, __file__, "score", str(spec), "--only", arm, "--seeds", str(seed)]
            env = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
            subprocess.run(scoring, env=env, check=True, stdout=subprocess.DEVNULL)
        except subprocess.CalledProcessError as fault:
            print(f"{arm} seed {seed}: failed with code {fault.returncode}, see {campaign.folder(arm, seed)}", flush=True)
            return 1
        print(f"{arm} seed {seed}: done", flush=True)
        return 0

    with ThreadPoolExecutor(slots) as pool:
        failed = sum(pool.map(one, [(campaign.control, seed) for seed in seeds]))
        return failed + sum(pool.map(one, [(arm, seed) for arm in arms for seed in seeds if arm != campaign.control]))


# ----------------------------------------------------------------------------------------------------------------------
# Tables.
# ----------------------------------------------------------------------------------------------------------------------


def table(campaign: Campaign) -> Iterator[str]:
    """Markdown: an arm a row, an export a column: difference from the control in mbpb, its interval, and that of bytes."""
    found = {arm: {seed: scores for seed in campaign.seeds if (scores := scores_of(campaign, arm, seed))}
             for arm in campaign.arms}
    control, names = found.pop(campaign.control), (FLOAT, *campaign.exports)
    yield f"| arm | n | {' | '.join(names)} |"
    yield "|---" * (len(names) + 2) + "|"
    cells = [f"{statistics.mean(rows):.5f}{size}" for name in names
             if (rows := [r[name]["val_bpb"] for r in control.values() if name in r])
             for size in [mean_bytes(control, name)]]
    yield f"| {campaign.control} (val_bpb, bytes) | {len(control)} | {' | '.join(cells)} |"
    compared = {name: paired.compare(values_of(found, name), values_of({"": control}, name)[""], SMALLEST_EFFECT)
                for name in names}
    for arm, scores in found.items():
        if scores:
            yield f"| {arm} | {len(scores)} | " + " | ".join(
                cell(compared[name][arm], scores, control, name) for name in names) + " |"


def values_of(found: Mapping[str, Mapping[int, Any]], name: str) -> dict[str, dict[int, float]]:
    return {arm: {seed: r[name]["val_bpb"] for seed, r in scores.items() if name in r} for arm, scores in found.items()}


def mean_bytes(scores: Mapping[int, Any], name: str) -> str:
    sizes = [r[name]["bytes"] for r in scores.values() if "bytes" in r.get(name, {})]
    return f" at {statistics.mean(sizes):,.0f}" if sizes else ""


def cell(c: paired.Comparison, scores: Mapping[int, Any], control: Mapping[int, Any], name: str) -> str:
    """`mean +- half of the interval` in mbpb, its own p, the verdict over all arms or the seeds it would need, bytes."""
    if c.difference is None:
        return ""
    shares = [scores[s][name]["bytes"] / control[s][name]["bytes"] - 1 for s in scores.keys() & control.keys()
              if "bytes" in scores[s].get(name, {})]
    more = f" ({statistics.mean(shares):+.1%} B)" if shares and abs(statistics.mean(shares)) >= 0.002 else ""
    half = "" if c.low is None or c.high is None else f" ± {500 * (c.high - c.low):.1f}"
    chance = f" p={c.p_paired:.1g}" if c.p_paired is not None and c.p_paired < 0.05 else ""
    verdict = {paired.BETTER: " **better**", paired.WORSE: " worse"}.get(
        c.verdict, f" ({c.seeds_needed} seeds)" if c.seeds_needed else "")
    return f"{1000 * c.difference:+.1f}{half}{chance}{verdict}{more}"


def arguments_of(arguments: list[str]) -> tuple[argparse.Namespace, Campaign]:
    """Ends the program with one line where they are wrong."""
    parser = export_verbs.OneLineParser(prog="campaign.py")
    parser.add_argument("verb", choices=("run", "score", "table"))
    parser.add_argument("spec", type=Path)
    parser.add_argument("--slots", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run on CPU")
    parser.add_argument("--only", default="", help="these arms, by commas")
    parser.add_argument("--seeds", default="", help="these seeds, by commas")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(arguments)
    try:
        campaign = read_campaign(args.spec, os.environ)
        args.only = args.only.split(",") if args.only else list(campaign.arms)
        args.seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else campaign.seeds
    except ValueError as error:
        return parser.error("; ".join(str(error).splitlines()))
    for given, known in ((args.only, campaign.arms), (args.seeds, campaign.seeds)):
        if unknown := [one for one in given if one not in known]:
            parser.error(f"{args.spec} has no {unknown[0]}; these are: {', '.join(map(str, known))}")
    return args, campaign


def main(arguments: list[str]) -> int:
    args, campaign = arguments_of(arguments)
    if args.verb == "run":
        return int(carry_out(campaign, args.spec, args.only, args.seeds, args.slots, args.threads) > 0)
    if args.verb == "score":
        for arm in args.only:
            for seed in args.seeds:
                score(campaign, arm, seed)
        return 0
    text = "\n".join(table(campaign)) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
