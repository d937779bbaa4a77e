"""What a report is about: runs gathered into arms (configurations over seeds), ranked, compared, and checked for traps.

A run counts once it has a finite score of its artifact, read back. All others stay in the study with the reason why they do
not. Several runs of one arm and seed are one value, their mean: seeds are what varies, and a repeat is no new seed.
"""
from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import paired
import runs
from runs import Run, RunError

SCORED_STATES = ("finished", "over_cap")
STATES = (*SCORED_STATES, "failed", "halted", "pending", "running")
UNFINISHED = "unfinished"           # of a run that no ledger speaks of
METRICS = {"val": "val_bpb", "train": "train_loss"}     # kind of a row of metrics.jsonl -> its number
BYTES = ("artifact_bytes", "code_bytes", "total_bytes", "cap_bytes")


@dataclass(frozen=True)
class Entry:
    """One run that was planned or started. `run` and the numbers are there where it counts, else `note` says why not."""
    run_id: str
    arm: str
    seed: int
    state: str                      # of STATES, or UNFINISHED
    note: str
    folder: Path
    run: Run | None
    cap_bytes: int                  # 0 = no cap

    @property
    def summary(self) -> dict[str, Any]:
        assert self.run is not None
        assert self.run.summary is not None
        return self.run.summary

    @property
    def val_bpb(self) -> float | None:
        return self.run.score["val_bpb"] if self.run and self.run.score else None

    @property
    def gap_bpb(self) -> float | None:
        """What the round trip costs; None where both evaluations did not read the same."""
        if self.run is None:
            return None
        before, after = self.summary["pre_roundtrip"], self.summary["roundtrip"]
        same = all(before[key] == after[key] for key in ("tokens", "bytes"))
        return after["val_bpb"] - before["val_bpb"] if same else None

    @property
    def over_cap(self) -> bool:
        return self.run is not None and 0 < self.cap_bytes < self.summary["total_bytes"]


@dataclass(frozen=True)
class Arm:
    """One name and the runs under it."""
    name: str
    entries: tuple[Entry, ...]

    @cached_property
    def scored(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.run is not None]

    @cached_property
    def runs(self) -> list[Run]:
        return [entry.run for entry in self.entries if entry.run is not None]

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """seed -> val_bpb."""
        return self.per_seed(lambda entry: entry.val_bpb)

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def planned(self) -> set[int]:
        return {entry.seed for entry in self.entries}

    def per_seed(self, value: Callable[[Entry], float | None]) -> dict[int, float]:
        """seed -> mean over its repeats (statistics.mean is exact: equal values give that value)."""
        held: dict[int, list[float]] = defaultdict(list)
        for entry in self.scored:
            if (found := value(entry)) is not None:
                held[entry.seed].append(found)
        return {seed: statistics.mean(held[seed]) for seed in sorted(held)}

    def mean_sd(self, value: Callable[[Entry], float | None]) -> tuple[float | None, float | None]:
        """Over the seeds; no sd of one."""
        values = list(self.per_seed(value).values())
        return (statistics.mean(values) if values else None), (statistics.stdev(values) if len(values) > 1 else None)

    @property
    def mean(self) -> float | None:
        return self.mean_sd(lambda entry: entry.val_bpb)[0]

    def of_summary(self, key: str) -> tuple[float | None, float | None]:
        """Mean and sd of a number of summary.json."""
        return self.mean_sd(lambda entry: entry.summary[key])

    def parts(self) -> dict[str, float]:
        """Mean bytes of each component of the total, the packed code included."""
        found: dict[str, float] = {}
        for entry in self.scored:
            for name, nbytes in [*entry.summary["parts"].items(), ("code", entry.summary["code_bytes"])]:
                group = component_of(name)
                found[group] = found.get(group, 0.0) + nbytes / len(self.scored)
        return found


@dataclass(frozen=True)
class Flag:
    """A trap: what is wrong with the comparison, in one sentence."""
    kind: str
    text: str


@dataclass(frozen=True)
class Study:
    """Arms by mean val_bpb, best first, those without a score last."""
    arms: tuple[Arm, ...]
    control: Arm | None
    smallest_effect: float
    scored_by: tuple[str, ...]      # see read_study

    @cached_property
    def comparisons(self) -> dict[str, paired.Comparison]:
        """Of every arm but the control, by name, in the arms' order."""
        if self.control is None:
            return {}
        return paired.compare({arm.name: arm.by_seed for arm in self.arms if arm is not self.control},
                              self.control.by_seed, self.smallest_effect)

    @property
    def entries(self) -> list[Entry]:
        return [entry for arm in self.arms for entry in arm.entries]

    def wanted_seeds(self, arm: Arm) -> set[int]:
        """Those that its comparison needs: its own and the control's."""
        return arm.planned | (self.control.planned if self.control else set())

    @property
    def reference(self) -> Arm | None:
        """What the arms' knobs are shown against: the control, else the best arm."""
        return self.control or next((arm for arm in self.arms if arm.runs), None)

    def changes(self, arm: Arm) -> list[tuple[str, Any, Any]]:
        """(name, in the reference, in the arm) of all that decides the result and differs; of each the first run."""
        if self.reference is None or not self.reference.runs or not arm.runs:
            return []
        return changes(self.reference.runs[0], arm.runs[0])

    @cached_property
    def flags(self) -> list[Flag]:
        return [flag for check in CHECKS for flag in check(self)]


def component_of(part: str) -> str:
    """The component of a part of summary.json: all codes: are one, and so is what belongs to no tensor."""
    return "metadata" if part in ("frame", "header", "checksum") else part.split(":")[0]


def changes(first: Run, second: Run) -> list[tuple[str, Any, Any]]:
    a, b = first.deciding, second.deciding
    return [(name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]


# ----------------------------------------------------------------------------------------------------------------------
# Reading: folders, and the ledgers of sweeps.
# ----------------------------------------------------------------------------------------------------------------------


def read_study(paths: Sequence[str], control: str | None, smallest_effect: float, cap_bytes: int | None,
               scored_by: str | None = None) -> Study:
    """Everything at these paths: a run's folder, a folder of runs, a sweep's ledger. `scored_by`: the first of these
    eval_modes, between commas, that a run has is its score, else the plain one. None for it or the control: the ledgers'
    choice. Raises ValueError.
    """
    found: dict[tuple[Path, str], Entry] = {}
    ledgers = {path: read_ledger(path) for path in map(Path, paths) if path.is_file()}
    if control is None:
        control = agreed([ledger["control"] for ledger in ledgers.values()], "controls", "--control ARM")
    asked = scored_by is not None
    if not asked:
        scored_by = agreed([",".join(ledger["score"]) or None for ledger in ledgers.values()], "scores", "--score NAME,...")
    rules = Rules(cap_bytes, tuple(name for name in (scored_by or "").split(",") if name))
    for path in map(Path, paths):
        entries = ([read_planned(path, number, row, rules) for number, row in enumerate(ledgers[path]["runs"])]
                   if path in ledgers else [entry_of(run, run.arm, UNFINISHED, "", rules) for run in runs.find_runs([path])])
        known = {folder for folder, _ in found}     # what came first names a run; one ledger may give it two names
        found |= {(folder, entry.arm): entry for entry in entries if (folder := entry.folder.resolve()) not in known}
    modes = dict.fromkeys(mode for entry in found.values() if entry.run for mode in entry.run.modes)
    if asked and (unknown := [mode for mode in rules.scored_by if mode not in modes]):     # a sweep's may be still to come
        there = ", ".join(modes) or "none"
        raise RunError(f"no run has the score {', '.join(unknown)}; beside the plain one there are {there}")
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(found.values(), key=lambda entry: (entry.arm, entry.seed, entry.run_id)):
        if not all(text and text.isprintable() for text in (entry.arm, entry.run_id)):
            raise RunError(f"run {entry.run_id!r} of arm {entry.arm!r}: names must be of printable characters")
        groups[entry.arm].append(entry)
    if control is not None and control not in groups:
        raise RunError(f"control {control}: no such arm; there are {', '.join(groups)}")
    arms = sorted((Arm(arm, tuple(entries)) for arm, entries in groups.items()),
                  key=lambda arm: (arm.mean is None, arm.mean or 0.0, arm.name))
    return Study(tuple(arms), next((arm for arm in arms if arm.name == control), None), smallest_effect, rules.scored_by)


@dataclass(frozen=True)
class Rules:
    """How runs are counted: their cap, None = each run's own, and what scores them."""
    cap_bytes: int | None
    scored_by: tuple[str, ...]


def agreed(named: Iterable[str | None], what: str, flag: str) -> str | None:
    """What all ledgers that name something name. Raises RunError where they name several."""
    found = [*dict.fromkeys(name for name in named if name is not None)]
    if len(found) > 1:
        raise RunError(f"the ledgers name the {what} {', '.join(found)}; choose one by {flag}")
    return found[0] if found else None


def read_ledger(path: Path) -> dict[str, Any]:
    """What a sweep planned: its control, its score, and its runs. Raises RunError."""
    ledger = {"control": None, "score": []} | runs.read_object(path)
    if not (isinstance(ledger.get("runs"), list) and isinstance(ledger.get("control"), str | None)
            and isinstance(ledger["score"], list) and all(isinstance(name, str) for name in ledger["score"])):
        raise RunError(f"{path} is no sweep's ledger: wanted an object with control (an arm or null), runs (a list)"
                       " and score (a list of names, or none)")
    return ledger


def read_planned(path: Path, number: int, row: Any, rules: Rules) -> Entry:
    """One run of a ledger."""
    wanted: dict[str, type] = {"run_id": str, "arm": str, "seed": int, "state": str, "folder": str, "note": str}
    if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in wanted.items()):
        kinds = ", ".join(f"{key} ({kind.__name__})" for key, kind in wanted.items())
        raise RunError(f"{path}: run {number} of the ledger is {json.dumps(row)[:200]}, wanted {kinds}")
    if row["state"] not in STATES:
        raise RunError(f"{path}: run {row['run_id']} has the state {row['state']!r}, wanted one of {', '.join(STATES)}")
    folder, row = path.parent / row["folder"], row | {"note": " ".join(row["note"].split())}
    if row["state"] not in SCORED_STATES or not (folder / "config.json").is_file():
        note = row["note"] if row["state"] not in SCORED_STATES else "its folder is not here"
        return Entry(row["run_id"], row["arm"], row["seed"], row["state"], note, folder, None, rules.cap_bytes or 0)
    run = runs.read_run(folder)
    if run.seed != row["seed"]:
        raise RunError(f"{path}: run {row['run_id']} has seed {row['seed']}, its config.json says {run.seed}")
    return entry_of(run, row["arm"], row["state"], row["note"], rules)


def entry_of(run: Run, arm: str, state: str, note: str, rules: Rules) -> Entry:
    """The entry of a run's folder; it counts if its artifact has a finite score. Raises RunError."""
    summary, run = run.summary, replace(run, scored_by=rules.scored_by)
    if summary is None:
        return Entry(run.run_id, arm, run.seed, state, note or progress_of(run), run.folder, None, rules.cap_bytes or 0)
    check_summary(run)
    cap = summary["cap_bytes"] if rules.cap_bytes is None else rules.cap_bytes
    if run.score is None:
        note = "its artifact was not evaluated (FINAL_ROUNDTRIP_EVAL=0)"
    elif not math.isfinite(run.score["val_bpb"]):
        note = f"val_bpb is {run.score['val_bpb']}"
    else:
        state = "over_cap" if 0 < cap < summary["total_bytes"] else "finished"
        return Entry(run.run_id, arm, run.seed, state, note, run.folder, run, cap)
    return Entry(run.run_id, arm, run.seed, "finished", note, run.folder, None, cap)


def progress_of(run: Run) -> str:
    """How far a run without summary.json came."""
    steps = [row["step"] for kind in METRICS for row in metric_rows(run, kind)]
    return f"no summary.json; last logged step {max(steps, default=0)} of {run.knobs['iterations']}"


def check_summary(run: Run) -> None:
    """What the report reads is there and of its kind. Raises RunError."""
    summary, where = run.summary or {}, run.folder / "summary.json"
    for key in BYTES:
        if type(summary.get(key)) is not int or summary[key] < 0:
            raise RunError(f"{where}: {key} is {summary.get(key)!r}, wanted a number of bytes")
    parts = summary.get("parts")
    sizes = list(parts.values()) if isinstance(parts, dict) else []
    if any(type(nbytes) is not int for nbytes in sizes) or sum(sizes) != summary["artifact_bytes"]:
        raise RunError(f"{where}: parts must sum to artifact_bytes={summary['artifact_bytes']}, got {parts!r:.200}")
    for stage, result in ({key: summary[key] for key in ("pre_roundtrip", "roundtrip")} | dict(run.modes)).items():
        if result is None and stage == "roundtrip":
            continue
        if not isinstance(result, dict) or not all(
                isinstance(result.get(key), int | float) for key in ("val_loss", "val_bpb", "tokens", "bytes")):
            raise RunError(f"{where}: {stage} is {result!r:.200}, wanted numbers val_loss, val_bpb, tokens, bytes")


# ----------------------------------------------------------------------------------------------------------------------
# Traps.
# ----------------------------------------------------------------------------------------------------------------------


def value_text(value: Any) -> str:
    """A knob's value; hashes by their first digits."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text[:8] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text or "''"


def change_text(found: Iterable[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{name} {value_text(a)} -> {value_text(b)}" for name, a, b in found)


def seed_text(seeds: Iterable[int]) -> str:
    seeds = sorted(seeds)
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def missing(study: Study) -> Iterator[Flag]:
    """Runs that were planned or started and do not count, and seeds of the control that an arm lacks."""
    for arm in study.arms:
        lost = [f"{entry.run_id} (seed {entry.seed}) {entry.state}{': ' * bool(entry.note)}{entry.note}"
                for entry in arm.entries if entry.run is None]
        wanted = study.wanted_seeds(arm)
        if never := wanted - arm.planned:
            lost.append(f"no run of the control's {seed_text(never)}")
        if lost:
            yield Flag("missing", f"{arm.name}: n={arm.n} of {len(wanted)} seeds: {'; '.join(lost)}")


def aliases(study: Study) -> Iterator[Flag]:
    names: dict[str, list[str]] = defaultdict(list)
    for arm in study.arms:
        for configuration in {run.configuration for run in arm.runs}:
            names[configuration].append(arm.name)
    for configuration in sorted(c for c, held in names.items() if len(held) > 1):
        yield Flag("same configuration", f"{' and '.join(sorted(names[configuration]))} are one configuration"
                                         f" ({configuration}) under several names")


def mixtures(study: Study) -> Iterator[Flag]:
    for arm in study.arms:
        kinds: dict[str, Run] = {}      # the first run of each
        for run in arm.runs:
            kinds.setdefault(run.configuration, run)
        if len(kinds) > 1:
            first, *others = kinds.values()
            texts = (f"{first.run_id} -> {run.run_id}: {change_text(changes(first, run))}" for run in others)
            yield Flag("mixed configuration", f"{arm.name} holds {len(kinds)} configurations; {'; '.join(texts)}")


def repeats(study: Study) -> Iterator[Flag]:
    for arm in study.arms:
        held: dict[int, list[float]] = defaultdict(list)
        for entry in arm.scored:
            held[entry.seed].append(entry.val_bpb or math.nan)
        for seed, values in held.items():
            if len(values) > 1:
                apart = max(values) - min(values)
                text = f"val_bpb {apart:.2g} apart; their mean counts" if apart else "repeated bit for bit"
                yield Flag("repeated run", f"{arm.name}: {len(values)} runs of seed {seed}, {text}")


def clocks(study: Study) -> Iterator[Flag]:
    timed = sorted({arm.name for arm in study.arms if any(run.timed for run in arm.runs)})
    fixed = sorted({arm.name for arm in study.arms if any(not run.timed for run in arm.runs)})
    if timed and fixed:
        yield Flag("timed", f"the ranking mixes runs that followed the clock ({', '.join(timed)}) with runs of fixed steps"
                            f" ({', '.join(fixed)})")
    elif timed:
        yield Flag("timed", "the runs followed the clock (MAX_WALLCLOCK_SECONDS), so the machine's speed is part of the"
                            " result; rank on fixed steps")


def groups_of(study: Study, key: Callable[[Run], Any]) -> dict[Any, list[str]]:
    """value -> the arms with runs of that value, in order of the arms."""
    held: dict[Any, dict[str, None]] = defaultdict(dict)
    for arm in study.arms:
        for run in arm.runs:
            held[key(run)][arm.name] = None
    return {value: list(names) for value, names in held.items()}


def scored_texts(study: Study) -> Iterator[Flag]:
    """Scored bytes belong to the text, so they must agree; tokens may differ with the tokenizer alone."""
    kinds = groups_of(study, lambda run: tuple((run.score or {})[key] for key in ("tokens", "bytes")))
    if len(kinds) > 1:
        verdict = ("not the same text, so val_bpb cannot be compared" if len({nbytes for _, nbytes in kinds}) > 1 else
                   "equal bytes, so val_bpb compares, losses a token do not")
        listed = "; ".join(f"{tokens:,} tokens, {nbytes:,} bytes ({', '.join(names)})"
                           for (tokens, nbytes), names in kinds.items())
        yield Flag("validation", f"scored on {listed}: {verdict}")


def machines(study: Study) -> Iterator[Flag]:
    for what, key in (("device", "device"), ("torch version", "torch")):
        kinds = groups_of(study, lambda run, key=key: str(run.config.get(key)))
        if len(kinds) > 1:
            yield Flag("machine", f"more than one {what}: "
                       + "; ".join(f"{value} ({', '.join(names)})" for value, names in kinds.items()))


def caps(study: Study) -> Iterator[Flag]:
    for arm in study.arms:
        over = [entry for entry in arm.scored if entry.over_cap]
        if over:
            worst = max(entry.summary["total_bytes"] - entry.cap_bytes for entry in over)
            yield Flag("over the cap", f"{arm.name}: {len(over)} of {len(arm.scored)} runs are over the cap, by up to"
                                       f" {worst:,} bytes: ranked, but no valid submission")


def floors(study: Study) -> Iterator[Flag]:
    names = [arm.name for arm in study.arms if any(run.summary and run.summary.get("floored_share", 0) > 0.5
                                                   for run in arm.runs)]
    if names:
        yield Flag("step floor", f"most weights of {', '.join(names)} sit at INT8_SCALE_FLOOR: their bytes depend on how"
                                 " long they trained, and must not be ranked")


CHECKS: Sequence[Callable[[Study], Iterator[Flag]]] = (
    aliases, mixtures, scored_texts, clocks, missing, repeats, caps, floors, machines)


# ----------------------------------------------------------------------------------------------------------------------
# Loss curves.
# ----------------------------------------------------------------------------------------------------------------------


def metric_rows(run: Run, kind: str) -> list[dict[str, Any]]:
    """Those of read_metrics, each with a step and the number of METRICS. Raises RunError."""
    found, key = runs.read_metrics(run.folder, kind), METRICS[kind]
    for row in found:
        if not isinstance(row.get("step"), int) or not isinstance(row.get(key), int | float):
            raise RunError(f"{run.folder / 'metrics.jsonl'}: a {kind} row is {json.dumps(row)[:200]}, wanted step and {key}")
    return found


def curves(arm: Arm, kind: str) -> list[tuple[int, float, float, float]]:
    """(step, mean, least, largest) over the scored runs of an arm, at the steps that all of them logged."""
    held = [{row["step"]: row[METRICS[kind]] for row in metric_rows(run, kind)} for run in arm.runs]
    held = [{step: value for step, value in rows.items() if math.isfinite(value)} for rows in held if rows]
    common = sorted(set.intersection(*map(set, held))) if held else []
    columns = [(step, [rows[step] for rows in held]) for step in common]
    return [(step, statistics.fmean(values), min(values), max(values)) for step, values in columns]
