"""Runs as data: folders of logs/, read from config.json, summary.json, metrics.jsonl and sweep.json, never from prose.

A run's configuration is everything that decides its result but the seed: two runs of equal `configuration` and seed on one
machine give the same weights. sweep.json is there when scripts/sweep.py started the run; it names the arm.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Knobs that say where outputs go and how often state is kept; the weights, the artifact and its score do not depend on them.
WITHOUT_EFFECT = frozenset((
    "run_id", "log_dir", "resume", "checkpoint_every", "checkpoint_keep", "train_log_every", "save_raw_checkpoint"))
LOCK = "run.lock"       # held by the process of a run that scripts/sweep.py started, for as long as it lives

MARK_BYTES = 256        # two rows of metrics.jsonl; their train_ms never repeats


class RunError(ValueError):
    """A folder that is no run, or one of its files cannot be read; the message names file, found and wanted."""


@dataclass(frozen=True)
class Run:
    """One folder of logs/."""
    folder: Path
    config: dict[str, Any]                  # config.json: knobs, device, code_sha256, tokenizer_sha256, ...
    summary: dict[str, Any] | None          # summary.json, written last; None = not finished
    sweep: dict[str, Any] | None            # sweep.json, None = not started by a sweep
    scored_by: tuple[str, ...] = ()         # of `modes`: the first that the run has gives its score

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def knobs(self) -> dict[str, Any]:
        """Every field of train_gpt.Config by its name, as resolved."""
        return self.config["knobs"]

    @property
    def seed(self) -> int:
        return self.knobs["seed"]

    @property
    def timed(self) -> bool:
        """The schedule followed the clock, so the result depends on the machine's speed at that hour."""
        return self.knobs["max_wallclock_seconds"] > 0

    @property
    def arm(self) -> str:
        """The configuration's name: of the sweep's arm, else the RUN_ID without its seed."""
        if self.sweep is not None:
            return self.sweep["arm"]
        for mark in (f"_s{self.seed}", f"-s{self.seed}", f"_{self.seed}", f"-{self.seed}", str(self.seed)):
            if self.run_id.endswith(mark) and self.run_id != mark:
                return self.run_id.removesuffix(mark)
        return self.run_id

    @cached_property
    def configuration(self) -> str:
        """12 hex digits of all that decides the result but the seed: knobs, code, tokenizer, size of the data, threads."""
        return configuration_hash(self.knobs, self.code, self.data)

    @property
    def code(self) -> Any:
        """What names the code, by hashes: of the sweep's copy, else of the two files."""
        return self.sweep["code"] if self.sweep is not None else self.config["code_sha256"]

    @property
    def data(self) -> dict[str, Any]:
        return {name: self.config.get(name) for name in ("tokenizer_sha256", "train_tokens", "val_tokens")}

    @property
    def deciding(self) -> dict[str, Any]:
        """What `configuration` is the hash of, by name: knobs as in the environment, code, data."""
        code = self.code if isinstance(self.code, dict) else {"code": self.code}
        return {name.upper(): value for name, value in knobs_that_matter(self.knobs).items()} | code | self.data

    @property
    def score(self) -> Mapping[str, Any] | None:
        """The evaluation that counts: of the artifact after reading it back, None where there was none."""
        plain = self.summary["roundtrip"] if self.summary else None
        return next((self.modes[name] for name in self.scored_by if name in self.modes), plain)

    @property
    def modes(self) -> Mapping[str, Mapping[str, Any]]:
        """Its scores by other ways of evaluating (EVAL_STRIDE and the like), by their names in the log's final_ lines."""
        return (self.summary or {}).get("eval_modes", {})


def knobs_that_matter(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide the result, the seed left out."""
    return {name: value for name, value in knobs.items() if name not in WITHOUT_EFFECT and name != "seed"}


def configuration_hash(knobs: Mapping[str, Any], code: Any, data: Any) -> str:
    """12 hex digits over the knobs that matter, the seed left out, and any JSON that names code and data."""
    text = json.dumps([knobs_that_matter(knobs), code, data], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises RunError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise RunError(f"{path} cannot be read: {fault}") from fault
    if not isinstance(value, dict):
        raise RunError(f"{path} holds {type(value).__name__}, wanted an object")
    return value


def read_run(folder: str | os.PathLike[str]) -> Run:
    """A run's folder. Raises RunError, also where files of an unknown version lack what is needed."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder} is no run: it has no config.json")
    config, summary, sweep = (
        read_object(folder / name) if (folder / name).is_file() else None
        for name in ("config.json", "summary.json", "sweep.json"))
    assert config is not None
    wanted = {"config.json": (config, ("knobs", "code_sha256")), "sweep.json": (sweep, ("arm", "code")),
              "summary.json": (summary, ("pre_roundtrip", "roundtrip", "artifact_bytes", "total_bytes", "step"))}
    for name, (value, keys) in wanted.items():
        if missing := [key for key in keys if value is not None and key not in value]:
            raise RunError(f"{folder / name} lacks {', '.join(missing)}: written by another version?")
    if missing := [name for name in ("seed", "max_wallclock_seconds", "iterations") if name not in config["knobs"]]:
        raise RunError(f"{folder / 'config.json'} lacks the knobs {', '.join(missing)}: written by another version?")
    return Run(folder, config, summary, sweep)


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """The runs that are these folders or lie in them, by folder, each once. Raises RunError where a path holds none."""
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        inside = [path] if (path / "config.json").is_file() else [p.parent for p in sorted(path.glob("*/config.json"))]
        if not inside:
            raise RunError(f"{path} is no run and holds none: no config.json in it or one level below")
        found |= {folder.resolve(): read_run(folder) for folder in inside}
    return [found[folder] for folder in sorted(found)]


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a kind ("train", "val", ...), oldest first; a half-written last line is left out."""
    path, rows = folder / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as fault:
            if line is lines[-1]:
                break
            raise RunError(f"{path} holds a line that is no JSON: {line[:60]!r}") from fault
        if row["kind"] == kind:
            rows.append(row)
    return rows


@dataclass
class Tail:
    """The lines that are added to a file, whole ones only. Offset and mark may be kept, to go on in another process."""
    path: Path
    offset: int = 0         # bytes read so far
    mark: bytes = b""       # the last of them; not found there again: the file was cut or rewritten, as by a resumed run

    def read(self, limit_bytes: int = -1) -> tuple[bool, list[bytes]]:
        """(whether reading started over, the new lines); a file that is not there is empty."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset - len(self.mark))
                again = file.read(len(self.mark)) != self.mark
                file.seek(0 if again else self.offset)
                data = file.read(limit_bytes)
        except (FileNotFoundError, NotADirectoryError):
            again, data = self.offset > 0, b""
        if again:
            self.offset, self.mark = 0, b""
        whole = data[:data.rfind(b"\n") + 1]
        if whole:
            self.offset, self.mark = self.offset + len(whole), whole[-MARK_BYTES:]
        return again, whole.split(b"\n")[:-1]


def lock(folder: Path) -> int | None:
    """Takes the run's lock; an open descriptor to hand to its process, None while another process holds it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
