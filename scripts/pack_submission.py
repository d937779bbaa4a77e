"""Writes the challenge's record folder from finished runs of one configuration, one run a seed.

    python scripts/pack_submission.py logs/rd_s1337 logs/rd_s1338 logs/rd_s1339 -o 2026-05-01_RD --name "RD export" \\
        --author "A. Name" --github-id name --blurb "One sentence." --against ../records/X/submission.json

It holds train_gpt.py (all code, packed by scripts/packing.py), README.md, submission.json, requirements.txt, one
train_seed<N>.log a run, and the artifact of the lowest seed. The folder appears under its name once the packed file has,
in an otherwise empty folder and without a network, trained a step and scored that artifact: on the machine and in the
precision of the run to the eight digits of its log, elsewhere within 0.001 bpb.

A record must be better than the last by 0.005 nats a token at p < 0.01 (the challenge's README, "Submission Process").
--score ships the score of one of the runs' eval_modes (EVAL_STRIDE, TTT_MODE and the like) instead of the plain one.
--against takes that record's submission.json or its seeds' val_bpb, "1.0599,1.0613,1.0621", and gives the p-value of
Welch's one-sided t-test; against a single number, of the one-sample test. Nats a token depend on the tokenizer: 0.005 of
them become bpb by the runs' own ratio of val_bpb to val_loss.

Exit codes: 0 written, 2 refused (nothing was written).
"""
from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (the repository's root is not on the path before)
from scipy import stats  # noqa: E402

import packing  # noqa: E402
import train_gpt  # noqa: E402
from export_verbs import OneLineParser  # noqa: E402
from runs import WITHOUT_EFFECT, Run, RunError, find_runs  # noqa: E402

CAP_BYTES = 16_000_000
RECORD, NON_RECORD = "10min_16mb", "non-record-16mb"
TRACKS = RECORD, NON_RECORD, "non-record-unlimited-compute-16mb"
SEEDS, RECORD_SECONDS = 3, 600.0
MARGIN_NATS, P_VALUE = 0.005, 0.01
TOLERANCE_BPB = 0.001           # on another machine or in another precision; bfloat16 against float32 differ by some 0.0002
MACHINE = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")     # variables that verification keeps
DEVICE = re.compile(r"device:(\w+)\S* \((.*)\) world_size:(\d+) dtype:\w+ compile:\w+")     # as Runtime.describe says it


class Refused(train_gpt.ConfigError):
    """There can be no such folder."""


@dataclass(frozen=True)
class Code:
    """What ships as train_gpt.py, and what it was packed from."""
    sources: tuple[Path, ...]
    packed: bytes


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong with the runs.
# ----------------------------------------------------------------------------------------------------------------------


def code_of(run: Run) -> Code:
    """The packed code of a finished run, from a checkout of the version that it ran. Raises Refused."""
    if run.summary is None or run.score is None:
        why = "has no summary.json" if run.summary is None else "scored no artifact, FINAL_ROUNDTRIP_EVAL=0"
        raise Refused([f"{run.folder} is not finished: it {why}"])
    if run.knobs.get("sensitivity_map"):
        raise Refused([f"{run.folder}: SENSITIVITY_MAP is a file beside the counted bytes, a submission has none"])
    ran, here = run.config["code_sha256"], {}
    for name in ran:
        path = next((p for p in (ROOT / name, packing.SCRIPTS / name) if p.is_file()), None)
        here[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path else "none"
    names = {f.name for f in fields(train_gpt.Config)}
    cfg = train_gpt.Config(**{name: value for name, value in run.knobs.items() if name in names})
    sources = tuple(train_gpt.source_files(cfg))
    packed = packing.packed_code(sources)
    if ran == {"train_gpt.py": hashlib.sha256(packed).hexdigest()}:     # the run's code was this very file
        return Code(sources, packed)
    if differing := [f"{name} was {ran[name][:12]} and is {here[name][:12]}" for name in ran if ran[name] != here[name]]:
        raise Refused([f"{run.folder} ran other code: {', '.join(differing)} (sha256); check out the version of the run and"
                       " pack there"])
    if names != run.knobs.keys() or {p.name for p in sources} != ran.keys():
        raise Refused([f"{run.folder} has other knobs or files than this version: check out the version of the run"])
    return Code(sources, packed)


def run_problems(run: Run, code: Code, track: str) -> list[str]:
    """Why this run cannot be part of a submission."""
    summary, knobs = run.summary or {}, run.knobs
    total, cap = summary["artifact_bytes"] + len(code.packed), min(knobs["artifact_cap_bytes"] or CAP_BYTES, CAP_BYTES)
    artifact = run.folder / summary["artifact"]
    size = artifact.stat().st_size if artifact.is_file() else None
    train_s, eval_s = trained_s(run), evaluated_s(run)
    parts = [name.upper() for name in ("val_max_tokens", "roundtrip_val_max_tokens") if knobs[name]]
    return [f"{run.folder}: {text}" for wrong, text in (
        (summary["code_bytes"] != len(code.packed),
         f"counted {summary['code_bytes']} bytes of code, packed here they are {len(code.packed)}: another python-minifier?"
         " Install requirements.txt"),
        (total > cap, f"artifact {summary['artifact_bytes']} + code {len(code.packed)} = {total} bytes, the cap is {cap}"),
        (size != summary["artifact_bytes"],
         f"{artifact.name} has {size if size is not None else 'no'} bytes, summary.json says {summary['artifact_bytes']}"),
        (bool(parts), f"{' and '.join(parts)} scored a part of the validation tokens, a submission needs all of them"),
        (track == RECORD and train_s > RECORD_SECONDS + 1,
         f"trained {train_s:.0f} s, track {RECORD} allows {RECORD_SECONDS:.0f}; --track {NON_RECORD}?"),
        (track == RECORD and eval_s > RECORD_SECONDS,
         f"evaluated {eval_s:.0f} s, track {RECORD} allows {RECORD_SECONDS:.0f}; --track {NON_RECORD}?"),
        (not run.modes.keys() >= set(run.scored_by),
         f"has no score {' '.join(run.scored_by)}; its eval_modes are: {', '.join(run.modes) or 'none'}"),
        (DEVICE.fullmatch(run.config["device"]) is None, f"config.json has device {run.config['device']!r}, not a run's"),
    ) if wrong] + log_problems(run)


def trained_s(run: Run) -> float:
    """Training time, calibration included."""
    seconds = (run.summary or {})["seconds"]
    return seconds["train"] + seconds.get("calibrate", 0.0)


def evaluated_s(run: Run) -> float:
    """Time of all scores of the artifact."""
    seconds = (run.summary or {})["seconds"]
    return seconds["roundtrip"] + seconds.get("eval_modes", 0.0)


def score_line(run: Run) -> str:
    """How the log's line of the score begins."""
    return f"final_{(run.summary or {})['export_scheme']}_{(*run.scored_by, 'roundtrip')[0]}_exact "


def log_problems(run: Run) -> list[str]:
    """Where the log's last lines of a kind are not those of summary.json."""
    summary, score, path = run.summary or {}, run.score or {}, run.folder / "train.log"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    name = train_gpt.ARTIFACTS[summary["export_scheme"]][1]
    found = []
    for start, rest in (
        (score_line(run), f"val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}"),
        ("Code size: ", f"{summary['code_bytes']} bytes (packed)"),
        (f"Serialized model {name}: ", f"{summary['artifact_bytes']} bytes"),
        (f"Total submission size {name}: ", f"{summary['artifact_bytes'] + summary['code_bytes']} bytes"),
    ):
        said = next((line for line in reversed(lines) if line.startswith(start)), "no such line")
        if said != start + rest and not said.startswith(f"{start}{rest} ("):
            found.append(f"{path}: found {said!r}, summary.json makes it {start + rest!r}")
    return found


def set_problems(runs: Sequence[Run], allow_fewer_seeds: bool) -> list[str]:
    """Why these runs are no sample of one configuration."""
    first, seeds, found = runs[0], [run.seed for run in runs], []
    for run in runs[1:]:
        if run.configuration != first.configuration:
            matter = sorted(run.knobs.keys() - WITHOUT_EFFECT - {"seed"})
            differing = [f"{name.upper()} {first.knobs[name]} and {run.knobs[name]}"
                         for name in matter if run.knobs[name] != first.knobs[name]]
            found.append(f"{first.folder} and {run.folder} are of two configurations: "
                         + (", ".join(differing) or "the same knobs, but other code or data"))
        if run.seed in seeds[:runs.index(run)]:
            found.append(f"{run.folder} has seed {run.seed}, as {runs[seeds.index(run.seed)].folder}")
    if len(set(seeds)) < SEEDS and not allow_fewer_seeds:
        found.append(f"{len(set(seeds))} seeds ({', '.join(map(str, sorted(set(seeds))))}), a record needs {SEEDS};"
                     f" --allow-fewer-seeds packs a submission of track {NON_RECORD}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Against a record.
# ----------------------------------------------------------------------------------------------------------------------


def read_record(source: str) -> list[float]:
    """The val_bpb of a record's seeds, from its submission.json or numbers with commas. Raises Refused."""
    try:
        if not source.endswith(".json"):
            found = [float(text) for text in source.split(",")]
        else:
            record = json.loads(Path(source).read_text(encoding="utf-8"))
            seeds = record.get("seed_results", {}).values()
            found = [float(seed["val_bpb"]) for seed in seeds] or [float(record["val_bpb"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise Refused([f"--against {source}: wanted a record's submission.json with val_bpb, or numbers with commas"
                       f" ({type(fault).__name__}: {fault})"]) from None
    if not all(math.isfinite(bpb) and bpb > 0 for bpb in found):
        raise Refused([f"--against {source}: val_bpb must be above 0, found {found}"])
    return found


def compare(runs: Sequence[Run], record: Sequence[float]) -> dict[str, Any]:
    """The test that the runs are better than the record by the challenge's margin."""
    scores = [run.score or {} for run in runs]
    ours = [score["val_bpb"] for score in scores]
    margin = MARGIN_NATS * mean(score["val_bpb"] / score["val_loss"] for score in scores)
    if len(ours) < 2:
        p, test = math.nan, "no test, because one run has no spread"
    elif len(record) < 2:
        p = float(stats.ttest_1samp(ours, record[0] - margin, alternative="less").pvalue)      # pyright: ignore
        test = "one-sample t-test, one-sided, because the record is one number"
    else:
        shifted = [bpb - margin for bpb in record]
        p = float(stats.ttest_ind(shifted, ours, equal_var=False, alternative="greater").pvalue)   # pyright: ignore
        test = "Welch's t-test, one-sided"
    return {"test": test, "record_val_bpb": list(record), "margin_nats": MARGIN_NATS, "margin_bpb": round(margin, 6),
            "improvement_bpb": round(mean(record) - mean(ours), 8), "p_value": None if math.isnan(p) else float(f"{p:.4g}"),
            "meets_record_rule": p < P_VALUE}


# ----------------------------------------------------------------------------------------------------------------------
# Verification: the packed file in an empty folder, without a network.
# ----------------------------------------------------------------------------------------------------------------------

# A new network namespace has a loopback that is down; ranks on one machine need it.
LOOPBACK_UP = ("import fcntl,os,socket,struct,sys;fcntl.ioctl(socket.socket(),0x8914,struct.pack('16sh22x',b'lo',65));"
               "os.execv(sys.argv[1],sys.argv[1:])")
GUARD = """import sys
def refuse(event, arguments):
    host = {"socket.connect": lambda: arguments[1], "socket.getaddrinfo": lambda: arguments}.get(event, lambda: None)()
    if isinstance(host, tuple) and host[0] not in (None, "", "localhost", "127.0.0.1", "::1"):
        raise OSError(f"the network is off: {event} {host[0]}")
sys.addaudithook(refuse)
"""
Cut = Callable[[Sequence[str]], list[str]]


def network_cut(folder: Path) -> tuple[Cut, dict[str, str], str]:
    """(what makes a command one without a network, variables for it, how in words); `folder` is for its use.

    Best is a network namespace of its own, which holds for compiled code too. Where the machine forbids that, Python's audit
    hook refuses connections and look-ups beyond this host.
    """
    inside = ["unshare", "--map-root-user", "--net", sys.executable]
    probe = [*inside, "-c", LOOPBACK_UP, sys.executable, "-c", ""]
    if shutil.which("unshare") and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        variables = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        return lambda start: [*inside, "-c", LOOPBACK_UP, *start], variables, "in a network namespace of its own"
    return with_guard(folder)


def with_guard(folder: Path) -> tuple[Cut, dict[str, str], str]:
    (folder / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    return list, {"PYTHONPATH": str(folder)}, "by an audit hook on Python's sockets, for want of a network namespace"


def environment(knobs: Mapping[str, Any]) -> dict[str, str]:
    """Every knob, as a shell sets it, and nothing else but what a process needs on this machine."""
    kept = {name: os.environ[name] for name in MACHINE if name in os.environ}
    return kept | {name.upper(): as_text(value) for name, value in knobs.items()}


def as_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def verify(folder: Path, run: Run) -> dict[str, Any]:
    """Trains a step and scores the artifact with the folder's train_gpt.py; what was found. Raises Refused."""
    artifact, (kind, ranks) = (run.summary or {})["artifact"], machine_for(run)
    knobs = run.knobs | {name: str(Path(run.knobs[name]).resolve()) for name in ("data_path", "tokenizer_path")}
    knobs |= {"log_dir": "logs", "resume": ""} | ({} if kind == description(run)[0] else dict.fromkeys(
        ("device", "compute_dtype", "sdp_backend", "enable_torch_compile"), "auto"))
    with tempfile.TemporaryDirectory() as temporary:
        empty, guard = Path(temporary, "empty"), Path(temporary, "guard")
        for path in (empty, guard):
            path.mkdir()
        for name in ("train_gpt.py", artifact):
            shutil.copy(folder / name, empty)
        cut, variables, how = network_cut(guard)
        print(f"verifying on {kind} with {ranks} rank{'s' * (ranks > 1)}, the network cut {how}", flush=True)
        start = cut([sys.executable, *torchrun(ranks), "train_gpt.py"])
        plain = {name: getattr(train_gpt.Config, name) for name in train_gpt.MODES}
        run_alone("train a step", start, empty, variables | environment(knobs | plain | {
            "run_id": "step", "iterations": 1, "warmup_steps": 0, "max_wallclock_seconds": 0.0, "val_loss_every": 0,
            "val_max_tokens": run.knobs["train_seq_len"], "final_roundtrip_eval": False, "artifact_every": 0}))
        said = run_alone("score the artifact", start, empty, variables | environment(knobs | {
            "run_id": "score", "eval_artifact": artifact}))
        here = json.loads((empty / "logs" / "step" / "config.json").read_text(encoding="utf-8"))["device"]
    return verdict(run, said, here) | {"network": how}


def torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []


def run_alone(what: str, start: Sequence[str], folder: Path, env: Mapping[str, str]) -> str:
    """What the packed file prints. Raises Refused where it fails; an untrained artifact over the cap (3) is no failure."""
    done = subprocess.run(start, cwd=folder, env=env, text=True, capture_output=True, check=False)
    if done.returncode not in (0, 3):
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = [line for line in lines if line.startswith(("error:", "failed:"))] or lines[-1:]
        raise Refused([f"the packed file cannot {what}, exit code {done.returncode}: {line}" for line in said or ["silent"]])
    return done.stdout


def machine_for(run: Run) -> tuple[str, int]:
    """(kind of device, ranks) to verify on: the run's where this machine has them, else one of what there is."""
    kind, _, ranks = description(run)
    if kind == "cpu" or (kind == "cuda" and torch.cuda.device_count() >= ranks):
        return kind, ranks
    return ("cuda" if torch.cuda.is_available() else "cpu"), 1


def description(run: Run) -> tuple[str, str, int]:
    """(kind of device, its name, ranks) of a run that `run_problems` has passed."""
    match = DEVICE.fullmatch(run.config["device"])
    assert match is not None
    return match[1], match[2], int(match[3])


def verdict(run: Run, said: str, here: str) -> dict[str, Any]:
    """Compares the score in what the packed file printed with the log's. Raises Refused."""
    wanted = run.score or {}
    found = re.findall(rf"^{score_line(run)}val_loss:(\S+) val_bpb:(\S+)$", said, re.MULTILINE)
    if not found:
        raise Refused([f"the packed file scored no artifact: it printed no line {score_line(run)}"])
    loss, bpb = found[-1]
    same = here == run.config["device"]
    reproduced = (loss, bpb) == (f"{wanted['val_loss']:.8f}", f"{wanted['val_bpb']:.8f}") if same else (
        abs(float(bpb) - wanted["val_bpb"]) <= TOLERANCE_BPB)
    if not reproduced:
        how = "to all digits, on the same device and in the same precision" if same else f"within {TOLERANCE_BPB}, on {here}"
        raise Refused([f"the packed file scores val_loss:{loss} val_bpb:{bpb}, {run.folder} has"
                       f" val_loss:{wanted['val_loss']:.8f} val_bpb:{wanted['val_bpb']:.8f}; wanted it {how}"])
    return {"val_bpb": float(bpb), "device": here, "tolerance_bpb": 0.0 if same else TOLERANCE_BPB}


# ----------------------------------------------------------------------------------------------------------------------
# The folder's files.
# ----------------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> float | None:
    """The sample's standard deviation, None of a single value."""
    return stdev(values) if len(values) > 1 else None


def describe(runs: Sequence[Run], code: Code, given: Mapping[str, str], track: str) -> dict[str, Any]:
    """submission.json, in the challenge's keys; scores are means over the seeds, bytes_total is the largest."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        summary, score = run.summary or {}, run.score or {}
        rows[str(run.seed)] = {
            "val_loss": round(score["val_loss"], 8), "val_bpb": round(score["val_bpb"], 8),
            "pre_quant_val_bpb": round(summary["pre_roundtrip"]["val_bpb"], 8), "artifact_bytes": summary["artifact_bytes"],
            "bytes_total": summary["artifact_bytes"] + len(code.packed), "steps": summary["step"],
            "step_ms": round(1000 * summary["seconds"]["train"] / max(summary["step"], 1), 2),
            "train_time_s": round(trained_s(run), 1), "eval_time_s": round(evaluated_s(run), 1)}
    scores = {name: [row[name] for row in rows.values()] for name in ("val_loss", "val_bpb")}
    _, device, ranks = description(runs[0])
    return {
        **given, "track": track, "evaluation": (*runs[0].scored_by, "plain")[0],
        **{name: round(mean(values), 8) for name, values in scores.items()},
        **{f"{name}_std": None if (sd := spread(values)) is None else round(sd, 8) for name, values in scores.items()},
        "seeds": [run.seed for run in runs], "seed_results": rows,
        "bytes_total": max(row["bytes_total"] for row in rows.values()), "bytes_code": len(code.packed),
        "artifact_bytes_mean": round(mean(row["artifact_bytes"] for row in rows.values())),
        "hardware": f"{ranks}x {device}", "pytorch_version": runs[0].config["torch"],
        "python_version": runs[0].config["python"], "numpy_version": runs[0].config["numpy"]}


def command(run: Run, **changes: str) -> str:
    """The shell command of a run, every knob that is not at its default; paths as the challenge lays them out."""
    here = {"data_path": f"./data/datasets/{Path(run.knobs['data_path']).name}",
            "tokenizer_path": f"./data/tokenizers/{Path(run.knobs['tokenizer_path']).name}"}
    defaults = {f.name: f.default for f in fields(train_gpt.Config)}
    knobs = {name: value for name, value in (run.knobs | here).items()
             if value != defaults[name] and (name not in WITHOUT_EFFECT) and name not in changes}
    words = [f"{name.upper()}={shlex.quote(as_text(value))}" for name, value in (knobs | changes).items()]
    ranks = description(run)[2]
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    return " \\\n".join([*words, f"{start} train_gpt.py"])


def table(facts: Mapping[str, Any]) -> str:
    columns = {"val_bpb": ".8f", "val_loss": ".8f", "pre_quant_val_bpb": ".4f", "steps": ",", "step_ms": ".2f",
               "train_time_s": ".1f", "eval_time_s": ".1f", "artifact_bytes": ",", "bytes_total": ","}
    lines = [f"| seed | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for seed, row in facts["seed_results"].items():
        lines.append(f"| {seed} | {' | '.join(format(row[name], how) for name, how in columns.items())} |")
    for word, pick in (("mean", mean), ("sd", spread)):
        values = [pick([row[name] for row in facts["seed_results"].values()]) for name in ("val_bpb", "val_loss")]
        shown = ["" if value is None else f"{value:.8f}" for value in values] + [""] * (len(columns) - len(values))
        lines.append(f"| {word} | {' | '.join(shown)} |")
    return "\n".join(lines)


def readme(facts: Mapping[str, Any], runs: Sequence[Run], code: Code, checked: Mapping[str, Any]) -> str:
    first = runs[0]
    artifact, comparison = (first.summary or {})["artifact"], facts.get("comparison")
    tolerance = (f"within {checked['tolerance_bpb']} of its log, on another machine: {checked['device']}"
                 if checked["tolerance_bpb"] else f"and got the log's val_bpb to all eight digits, on {checked['device']}")
    against = "No record was given to compare with." if not comparison else (
        f"Against the record's {', '.join(map(str, comparison['record_val_bpb']))}: better by"
        f" {comparison['improvement_bpb']:.5f} bpb. That it is better by {MARGIN_NATS} nats a token, here"
        f" {comparison['margin_bpb']} bpb: {comparison['test']}, p = {comparison['p_value']}; that"
        f" {'meets' if comparison['meets_record_rule'] else 'does not meet'} the rule of p < {P_VALUE}.")
    return f"""# {facts['name']}

{facts['blurb']}

**val_bpb {facts['val_bpb']:.8f}**, mean of {len(runs)} seed{'s' * (len(runs) > 1)}; track {facts['track']};\
 at most {facts['bytes_total']:,} bytes of {CAP_BYTES:,}, code and artifact.

{table(facts)}

val_bpb and val_loss are those of the artifact after it was read back from disk ({facts['evaluation']} evaluation),\
 pre_quant_val_bpb that of the weights before.
Bytes are decimal: bytes_total = artifact_bytes + the {facts['bytes_code']:,} bytes of `train_gpt.py`.

{against}

Run on {facts['hardware']}, Python {facts['python_version']}, PyTorch {facts['pytorch_version']},\
 numpy {facts['numpy_version']}.

## To repeat it

```bash
pip install -r requirements.txt
{command(first, seed=str(first.seed))}
```

The other seeds differ in `SEED`. `{artifact}` is what seed {first.seed} wrote; this scores it, without training and
without the training shards:

```bash
{command(first, eval_artifact=artifact)}
```

Before this folder was written, `train_gpt.py` trained a step and scored `{artifact}` in an otherwise empty folder, the
network cut {checked['network']}, {tolerance}.

## Files

`train_gpt.py` is {', '.join(f'`{p.name}`' for p in code.sources)} in one: minified, compressed, and a loader. It is
Latin-1 text, as its first line says. The sources appear in tracebacks and to `inspect.getsource`.
`train_seed<N>.log` are the runs' logs as they were written.
"""


def requirements(code: Code) -> str:
    """The lines of the repository's requirements whose packages the code imports."""
    nodes = [node for path in code.sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    lines = [line for file in ("requirements.txt", "requirements-dev.txt")
             for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    return "".join(f"{line}\n" for line in lines if re.split(r"[<=>;]", line)[0].replace("-", "_") in names)


def write(folder: Path, runs: Sequence[Run], code: Code, facts: dict[str, Any]) -> None:
    """All files of the submission into an empty folder, verified. Raises Refused."""
    first = runs[0]
    (folder / "train_gpt.py").write_bytes(code.packed)
    shutil.copy(first.folder / (first.summary or {})["artifact"], folder)
    checked = verify(folder, first)
    for run in runs:
        shutil.copy(run.folder / "train.log", folder / f"train_seed{run.seed}.log")
    facts["verification"] = checked
    (folder / "submission.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements(code), encoding="utf-8")
    (folder / "README.md").write_text(readme(facts, runs, code, checked), encoding="utf-8")


def parser() -> OneLineParser:
    asked = OneLineParser(prog="pack_submission.py", description="Writes the challenge's record folder from finished runs.")
    asked.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run, or one that holds such")
    asked.add_argument("-o", "--output", type=Path, help="the folder to write; default <date>_<name>")
    for name in ("name", "author", "github-id", "blurb"):
        asked.add_argument(f"--{name}", required=True, help="as submission.json and README.md shall say it")
    asked.add_argument("--against", metavar="RECORD", help="a record's submission.json, or its seeds' val_bpb with commas")
    asked.add_argument("--score", metavar="NAME", help="of the runs' eval_modes; default: the plain one")
    asked.add_argument("--track", choices=TRACKS, default=RECORD)
    asked.add_argument("--allow-fewer-seeds", action="store_true", help=f"below {SEEDS}: the track is then {NON_RECORD}")
    return asked


def pack(args: Any) -> Path:
    """The submission's folder. Raises Refused, RunError."""
    by = (args.score,) if args.score else ()
    runs = sorted((replace(run, scored_by=by) for run in find_runs(args.runs)), key=lambda run: run.seed)
    track = NON_RECORD if args.track == RECORD and len({run.seed for run in runs}) < SEEDS else args.track
    output = args.output or Path(f"{time.strftime('%Y-%m-%d')}_{re.sub(r'[^A-Za-z0-9.]+', '_', args.name).strip('_')}")
    if output.exists():
        raise Refused([f"{output} exists; choose another -o or remove it"])
    if not output.absolute().parent.is_dir():
        raise Refused([f"{output}: there is no folder {output.parent} to write it in"])
    record = read_record(args.against) if args.against else None
    codes = [code_of(run) for run in runs]
    found = set_problems(runs, args.allow_fewer_seeds)
    found += [text for run, code in zip(runs, codes, strict=True) for text in run_problems(run, code, track)]
    if found:
        raise Refused(found)
    given = {"author": args.author, "github_id": args.github_id, "name": args.name, "blurb": args.blurb,
             "date": time.strftime("%Y-%m-%d")}
    facts = describe(runs, codes[0], given, track)
    if record:
        facts["comparison"] = compare(runs, record)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        write(folder, runs, codes[0], facts)
        folder.rename(output)
    if track == RECORD and not re.match("8x .*H100", facts["hardware"]):
        print(f"note: track {RECORD} is for 8x H100, these runs are of {facts['hardware']}")
    print(f"wrote:{output} val_bpb:{facts['val_bpb']:.8f} bytes_total:{facts['bytes_total']} track:{track}"
          + (f" p_value:{facts['comparison']['p_value']}" if record else ""))
    return output


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    try:
        pack(args)
    except (Refused, RunError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
