"""Copies of runs in TensorBoard or Weights & Biases, each row once: what --tensorboard and --wandb of scripts/watch.py do.

    with open_sink("tensorboard", "DIR") as sink:
        while sink(run):        # a runs.Run; true while there is more to copy
            pass

Copied are the numbers of metrics.jsonl under kind/key (train/train_loss, val/val_bpb) at their step, the knobs as
hyperparameters, and the numbers of summary.json under summary/. What was copied stands beside the copy, in
DIR/RUN_ID/copied.json or in RUN/wandb/PROJECT.copied.json, so that a later call goes on where this one ended. A resumed run
drops rows and writes them anew: TensorBoard then gets the whole run again and forgets the first rows; Weights & Biases
forgets nothing, so there the rows of the steps that it has stay as they were first.
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import runs

CHUNK_BYTES = 1 << 16       # of metrics.jsonl that one call copies: a tenth of a second
Sink = Callable[[runs.Run], bool]


class SinkError(ValueError):
    """A package that is not installed, or a place that cannot be written to; the message says which."""


class Writer(Protocol):
    """One run's copy while it is open."""

    def row(self, step: int, numbers: Mapping[str, float], at_s: float) -> None: ...
    def summary(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard: https://docs.pytorch.org/docs/stable/tensorboard.html
# ----------------------------------------------------------------------------------------------------------------------


class BoardWriter:
    def __init__(self, folder: Path, run: runs.Run, anew: bool):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=0 if anew else None)     # readers drop what came before
        events = self.writer.file_writer
        assert events is not None
        # Not add_hparams: that opens a second file, and a reader that has gone on to it never returns to this one.
        for summary in hparams(dict(run.knobs), dict.fromkeys(("summary/roundtrip/val_bpb", "summary/total_bytes"))):
            events.add_summary(summary)

    def row(self, step: int, numbers: Mapping[str, float], at_s: float) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step, walltime=at_s)

    def summary(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(f"summary/{name}", value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


# ----------------------------------------------------------------------------------------------------------------------
# Weights & Biases: https://docs.wandb.ai/ref/python
# ----------------------------------------------------------------------------------------------------------------------


class WandbWriter:
    def __init__(self, project: str, run: runs.Run):
        import wandb  # pyright: ignore[reportMissingImports]

        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_code=True, disable_git=True)
        run_id = "".join("-" if c in "/\\#?%:" else c for c in run.run_id)     # what its ids must not hold
        try:
            self.run = wandb.init(project=project, id=run_id, name=run.run_id, dir=str(run.folder), config=run.knobs,
                                  resume="allow", reinit="create_new", settings=quiet)
        except wandb.Error as fault:
            raise SinkError(f"--wandb {project}: {fault}") from fault
        # A step of their own: W&B drops a row whose step is below one it has, and the size of an artifact comes late.
        self.run.define_metric("*", step_metric="step")

    def row(self, step: int, numbers: Mapping[str, float], at_s: float) -> None:
        self.run.log({"step": step, **numbers})

    def summary(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.summary.update({f"summary/{name}": value for name, value in numbers.items()})

    def flush(self) -> None:
        pass        # its own process sends

    def close(self) -> None:
        self.run.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Copying: what is new of a run goes to its writer, and into a file what has gone.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A place for copies. `forgets`: rows can be taken back."""
    target: str
    package: str
    module: str
    forgets: bool
    home: Callable[[str, runs.Run], Path]           # (target, run) -> the file that says what was copied
    open: Callable[[str, runs.Run, bool], Writer]   # (target, run, whether to forget what was copied)


SINKS = {
    "tensorboard": Kind("DIR", "tensorboard", "torch.utils.tensorboard", True,
                        lambda target, run: Path(target, run.run_id, "copied.json"),
                        lambda target, run, anew: BoardWriter(Path(target, run.run_id), run, anew)),
    "wandb": Kind("PROJECT", "wandb", "wandb", False,
                  lambda target, run: run.folder / "wandb" / f"{target.replace('/', '-')}.copied.json",
                  lambda target, run, _: WandbWriter(target, run)),
}


class Copy:
    """One run on its way to one place."""

    def __init__(self, kind: Kind, target: str, run: runs.Run):
        self.kind, self.target, self.home = kind, target, kind.home(target, run)
        self.writer: Writer | None = None
        self.home.parent.mkdir(parents=True, exist_ok=True)
        done = runs.read_object(self.home) if self.home.is_file() else {"offset": 0, "mark": "", "steps": {}, "summary": ""}
        try:
            self.tail = runs.Tail(run.folder / "metrics.jsonl", done["offset"], done["mark"].encode("latin-1"))
            self.steps: dict[str, int] = done["steps"]      # kind of row -> the last step copied
            self.summary: str = done["summary"]             # digest of what was copied of it
        except (KeyError, AttributeError) as fault:
            raise SinkError(f"{self.home} lacks {fault}; delete its folder to copy the run anew") from fault

    def advance(self, run: runs.Run) -> bool:
        """Copies the next chunk, after the last one the summary; whether there may be more."""
        again, lines = self.tail.read(CHUNK_BYTES)
        if again and self.kind.forgets:
            self.steps, self.summary = {}, ""
            self.close()
        for row in map(read_row, lines):
            if row is not None and row["step"] > self.steps.get(row["kind"], -1):
                self.copy_row(run, row)
        if lines:
            if self.writer is not None:
                self.writer.flush()
            self.save()
        elif run.summary is not None:
            self.finish(run, numbers_of(run.summary))
        return bool(lines)

    def opened(self, run: runs.Run) -> Writer:
        """Where nothing copied so far counts, a place that forgets is made to: its files may hold rows all the same."""
        if self.writer is None:
            self.writer = self.kind.open(self.target, run, not self.steps)
        return self.writer

    def copy_row(self, run: runs.Run, row: Mapping[str, Any]) -> None:
        """Its time is that of the run's start and its training time since: right also for a run of last week."""
        at_s = (run.folder / "config.json").stat().st_mtime + row.get("train_ms", 0.0) / 1000
        numbers = {f"{row['kind']}/{key}": value for key, value in numbers_of(row).items() if key != "step"}
        self.opened(run).row(row["step"], numbers, at_s)
        self.steps[row["kind"]] = row["step"]

    def finish(self, run: runs.Run, numbers: Mapping[str, float]) -> None:
        digest = hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]
        if digest != self.summary:
            self.opened(run).summary(max(self.steps.values(), default=0), numbers)
        self.close()
        if digest != self.summary:
            self.summary = digest
            self.save()

    def save(self) -> None:
        part = self.home.with_suffix(".part")
        part.write_text(json.dumps({"offset": self.tail.offset, "mark": self.tail.mark.decode("latin-1"),
                                    "steps": self.steps, "summary": self.summary}), encoding="utf-8")
        os.replace(part, self.home)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def read_row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None for what a killed process left half-written."""
    try:
        row = json.loads(line)
        return row if isinstance(row["kind"], str) and isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def numbers_of(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in an object, those of inner objects under outer/inner."""
    found: dict[str, float] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= numbers_of(inner, f"{prefix}{key}/")
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool):
            found[prefix + key] = inner
    return found


@contextlib.contextmanager
def open_sink(kind: str, target: str) -> Iterator[Sink]:
    """A function that copies the next chunk of a run to `target`, true while there is more. kind: a key of SINKS.
    Raises SinkError, here where the package is missing, in the function where two runs have one name or a file fails.
    """
    place, copies = SINKS[kind], {}     # copies: RUN_ID -> (folder, Copy)
    try:
        importlib.import_module(place.module)
    except ImportError as fault:
        raise SinkError(f"--{kind} needs {place.package}: pip install {place.package} ({fault})") from fault

    def sink(run: runs.Run) -> bool:
        try:
            if run.run_id not in copies:
                copies[run.run_id] = run.folder, Copy(place, target, run)
            folder, copy = copies[run.run_id]
            if folder != run.folder:
                raise SinkError(f"--{kind}: {folder} and {run.folder} have one name, their copies would mix; watch one")
            return copy.advance(run)
        except OSError as fault:
            raise SinkError(f"--{kind} {target}: {fault}") from fault

    try:
        yield sink
    finally:
        for _, copy in copies.values():
            copy.close()
