"""Live runs in the terminal: a table of where each one stands, and their curves.

    python scripts/watch.py                                             # every run of logs/, redrawn until Ctrl-C
    python scripts/watch.py logs/sweep_NAME.json --select w288 --x seconds --log
    python scripts/watch.py logs/RUN_ID --y lr_scale --once             # plain text, as wherever there is no terminal
    python scripts/watch.py logs --tensorboard DIR --wandb PROJECT      # copies all rows there too, each once

A PATH is a run's folder, a folder of runs, or the ledger of a sweep. Only the runs' files are read, as they grow; nothing is
written but what --tensorboard and --wandb ask for. `left` is training time, to ITERATIONS or to the wallclock cap. `stalled`
is a run without a new line for ten times as long as its rows usually take. The first column is a run's sign in the curves.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

import runs
from sinks import SINKS, Sink, SinkError, open_sink

POINTS = 600                # a curve is halved at twice as many; a terminal shows two a column
PACE_ROWS = 8               # rows that tell the pace
SILENT_S = 120.0            # never called stalled before: a validation writes no rows
SILENT_ELSEWHERE_S = 900.0  # the same for compiling and exporting, which have no pace
SINK_SHARE = 0.5            # of the time between redraws, for what a sink has to catch up with
ACTIVE = ("running", "finishing", "starting", "stalled")
X_AXES = ("step", "seconds", "tokens")
Y_KEYS = "train_loss,val_bpb"


# ----------------------------------------------------------------------------------------------------------------------
# Runs: what their files tell, read as they grow.
# ----------------------------------------------------------------------------------------------------------------------


class Curve:
    """One key over a run, thinned to about POINTS points; the newest always stays."""

    def __init__(self) -> None:
        self.columns = array("d"), array("d"), array("d")       # step, train_ms (nan where the row has none), value

    def add(self, step: float, train_ms: float, value: float) -> None:
        steps, times, values = self.columns
        steps.append(step)
        times.append(train_ms)
        values.append(value)
        if len(steps) > 2 * POINTS:
            self.columns = tuple(column[::2] for column in self.columns)   # of an odd length: the last one stays

    def over(self, x_axis: str, batch_tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """(x, y), those that are numbers, by rising x."""
        step, train_ms, y = (np.array(column) for column in self.columns)
        x = {"step": step, "seconds": train_ms / 1000, "tokens": step * batch_tokens}[x_axis]
        kept = np.isfinite(x) & np.isfinite(y)
        order = np.argsort(x[kept], kind="stable")
        return x[kept][order], y[kept][order]


class Watched:
    """One run as its files tell it so far. `told` is its row in a sweep's ledger, empty without one."""

    def __init__(self, folder: Path, index: int, told: Mapping[str, Any]):
        self.folder, self.index, self.told = folder, index, told
        self.tail = runs.Tail(folder / "metrics.jsonl")
        self.seen: dict[str, tuple[int, int]] = {}
        self.run: runs.Run | None = None
        self.fault = self.last_line = ""
        self.forget()

    def forget(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.newest: dict[str, float] = {}
        self.pace: deque[tuple[int, float]] = deque(maxlen=PACE_ROWS)   # (step, train_ms)
        self.step = 0

    def poll(self) -> None:
        again, lines = self.tail.read()
        if again:
            self.forget()
        for line in thinned(lines):
            self.add(line)
        self.changed("metrics.jsonl")       # its time says how long the run has been silent
        if self.changed("config.json", "summary.json", "sweep.json"):
            self.run, self.fault = None, ""
            if "config.json" in self.seen:
                try:
                    self.run = runs.read_run(self.folder)
                except runs.RunError as fault:
                    self.fault = str(fault)
        if self.changed("train.log"):
            self.last_line = last_line(self.folder / "train.log")

    def add(self, line: bytes) -> None:
        """A row of metrics.jsonl; what a killed process left half-written is passed over."""
        try:
            row = json.loads(line.decode())     # a str is spared the guess of its encoding
            kind, step, train_ms = row["kind"], int(row["step"]), float(row.get("train_ms", math.nan))
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        self.step = max(self.step, step)
        if kind == "train" and math.isfinite(train_ms):
            self.pace.append((step, train_ms))
        for key, value in row.items():
            if key not in ("kind", "step") and isinstance(value, (int, float)):
                self.newest[key] = value
                if key not in self.curves:
                    self.curves[key] = Curve()
                self.curves[key].add(step, train_ms, value)

    def changed(self, *names: str) -> bool:
        """Whether one of these files is new, gone or another since the last call."""
        before = [self.seen.pop(name, None) for name in names]
        for name in names:
            with contextlib.suppress(OSError):
                found = os.stat(self.folder / name)
                self.seen[name] = found.st_mtime_ns, found.st_size
        return before != [self.seen.get(name) for name in names]

    @property
    def knobs(self) -> Mapping[str, Any]:
        return self.run.knobs if self.run else {}

    @property
    def name(self) -> str:
        name = self.told.get("arm") or (self.run.arm if self.run and self.run.sweep else self.folder.name)
        return printable(str(name))

    @property
    def seed(self) -> str:
        return str(self.told.get("seed", self.knobs.get("seed", "")))

    @property
    def summary(self) -> Mapping[str, Any] | None:
        """summary.json, but not that of before a finished run was resumed to go on further."""
        summary = self.run.summary if self.run else None
        return summary if summary and summary["step"] >= self.step else None

    @property
    def step_ms(self) -> float:
        """Of the newest rows; nan before the first."""
        if len(self.pace) < 2:
            return self.pace[0][1] / self.pace[0][0] if self.pace else math.nan
        (step_0, ms_0), (step_1, ms_1) = self.pace[0], self.pace[-1]
        return (ms_1 - ms_0) / max(step_1 - step_0, 1)

    @property
    def ahead(self) -> tuple[float, float]:
        """(share done, training seconds left) by whichever comes first, steps or clock; nan where not known."""
        if self.run is None or not self.pace:
            return math.nan, math.nan
        iterations, cap_s, spent_s = self.knobs["iterations"], self.knobs["max_wallclock_seconds"], self.pace[-1][1] / 1000
        share, left_s = self.step / max(iterations, 1), max(iterations - self.step, 0) * self.step_ms / 1000
        if cap_s:
            share, left_s = max(share, spent_s / cap_s), min(left_s, max(cap_s - spent_s, 0))
        return min(share, 1.0), left_s

    def silence_limit_s(self) -> float:
        """How long no new line is nothing unusual."""
        if len(self.pace) < 2 or self.ahead[0] == 1.0:
            return SILENT_ELSEWHERE_S
        gap_ms = max(b[1] - a[1] for a, b in itertools.pairwise(self.pace))
        return max(SILENT_S, 10 * max(gap_ms, self.knobs.get("train_log_every", 0) * self.step_ms) / 1000)

    def state(self, now_s: float) -> str:
        if self.fault:
            return "unreadable"
        if self.summary:
            cap_bytes = self.summary.get("cap_bytes", 0)
            return "over cap" if 0 < cap_bytes < self.summary["total_bytes"] else "finished"
        if (told := self.told.get("state", "running")) != "running":
            return printable(str(told))
        if self.run and self.run.sweep and self.run.sweep.get("halted"):
            return "halted"
        for words, state in (("failed:", "failed"), ("stopped by signal", "stopped")):
            if self.last_line.startswith(words):
                return state
        touched_s = max((mtime_ns for mtime_ns, _ in self.seen.values()), default=0) / 1e9
        if touched_s and now_s - touched_s > self.silence_limit_s():
            return "stalled"
        return "starting" if not self.step else "finishing" if self.ahead[0] == 1.0 else "running"


def thinned(lines: Sequence[bytes]) -> Iterable[bytes]:
    """Of a long backlog about POINTS train rows, the newest and all others: parsing every row delays the first frame."""
    count = len(lines)
    if count < 2 * POINTS:
        return lines
    others = [i for i, line in enumerate(lines) if b'"kind": "train"' not in line]
    return [lines[i] for i in sorted({*range(0, count, count // POINTS), *range(count - PACE_ROWS, count), *others})]


def last_line(path: Path) -> str:
    """Of a log, where the trainer says that it failed or was stopped."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return file.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    return ""


def printable(name: str) -> str:
    """A folder's name may hold anything; a column needs characters of width 1."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in name)


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "metrics.jsonl").is_file()


def read_sweep(path: Path) -> dict[Path, Mapping[str, Any]]:
    """Folder -> row of a sweep's ledger; arms of equal knobs share a folder and its line. Raises RunError."""
    rows = runs.read_object(path).get("runs")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("folder"), str) for row in rows):
        raise runs.RunError(f"{path} is no ledger of a sweep: wanted runs, a list of objects that name their folder")
    found: dict[Path, Mapping[str, Any]] = {}
    for row in rows:
        folder = (path.parent / row["folder"]).resolve()
        twin = found.get(folder)
        found[folder] = row if twin is None else row | {"arm": f"{twin.get('arm')}={row.get('arm')}"}
    return found


class Watch:
    """The runs below some paths. Raises RunError where a path is not there or is no ledger."""

    def __init__(self, paths: Sequence[Path], select: str = ""):
        self.paths, self.select = paths, select
        self.known: dict[Path, Watched] = {}
        self.ledgers = {path: read_sweep(path) for path in paths if path.is_file()}
        if gone := [str(path) for path in paths if not path.exists()]:
            raise runs.RunError(f"{', '.join(gone)}: not found; wanted a run's folder, a folder of runs or sweep_NAME.json")
        self.poll()

    def folders(self) -> dict[Path, Mapping[str, Any]]:
        found: dict[Path, Mapping[str, Any]] = {}
        for path in self.paths:
            if path in self.ledgers:
                with contextlib.suppress(runs.RunError):    # it was whole at the start: keep what it said
                    self.ledgers[path] = read_sweep(path)
                found |= self.ledgers[path]
            else:
                inside = [path] if is_run(path) else filter(is_run, sorted(path.glob("*")))
                found = {folder.resolve(): {} for folder in inside} | found
        return found

    def poll(self) -> None:
        """Reads what is new, notices runs that appeared and vanished."""
        folders = self.folders()
        self.known = {folder: run for folder, run in self.known.items() if folder in folders}
        for folder, told in folders.items():
            if folder not in self.known:
                taken = {run.index for run in self.known.values()}
                index = next(i for i in itertools.count() if i not in taken)
                self.known[folder] = Watched(folder, index, told)
            self.known[folder].told = told
            self.known[folder].poll()

    @property
    def runs(self) -> list[Watched]:
        """Those selected, by folder."""
        return [run for folder, run in sorted(self.known.items())
                if self.select in run.name or self.select in printable(folder.name)]


# ----------------------------------------------------------------------------------------------------------------------
# Table: one line a run, as many columns as fit.
# ----------------------------------------------------------------------------------------------------------------------

SHOWN = ("run", "seed", "state", "step", "", "done", "train_loss", "val_bpb", "roundtrip", "bytes", "of cap", "ms/step",
         "left")
KEPT_FIRST = ("run", "state", "val_bpb", "done", "seed", "left", "train_loss", "step", "roundtrip", "bytes", "of cap",
              "ms/step", "")
BAR = 10


def known(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def cells(run: Watched, state: str, bar: str) -> dict[str, str]:
    """Column -> text. `bar` is the two characters of a progress bar: done and to do."""
    share, left_s = run.ahead
    summary, iterations = run.summary, run.knobs.get("iterations")
    share = 1.0 if summary else share
    measured, cap = (summary["total_bytes"], summary.get("cap_bytes")) if summary else (
        run.newest.get("artifact_bytes"), run.knobs.get("artifact_cap_bytes"))
    filled = 0 if math.isnan(share) else int(share * BAR)
    sign = "" if summary or measured is None else "~"           # ARTIFACT_EVERY weighs the artifact without the code
    score = summary["roundtrip"] if summary else None
    return {
        "run": run.name, "seed": run.seed, "state": state,
        "step": f"{run.step}/{iterations}" if iterations else str(run.step),
        "": bar[0] * filled + bar[1] * (BAR - filled), "done": known(share, ".0%"),
        "train_loss": known(run.newest.get("train_loss"), ".4f"), "val_bpb": known(run.newest.get("val_bpb"), ".4f"),
        "roundtrip": known(score["val_bpb"] if score else None, ".4f"), "bytes": sign + known(measured, ","),
        "of cap": known(measured / cap if measured is not None and cap else None, ".1%"),
        "ms/step": known(run.step_ms, ".1f"), "left": duration(left_s) if state in ("running", "stalled") else "-",
    }


def table(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The head and a line a row, at most `width` wide: what does not fit leaves by KEPT_FIRST."""
    wide = {name: max(len(name), *(len(row[name]) for row in rows)) for name in SHOWN}
    longest, wide["run"] = wide["run"], min(wide["run"], 12)
    kept, room = [], width + 2
    for name in KEPT_FIRST:
        if wide[name] + 2 <= room:
            kept.append(name)
            room -= wide[name] + 2
    wide["run"] = min(longest, wide["run"] + room)
    return ["  ".join(f"{shortened(row[name], wide[name]):{'<' if name in ('run', 'state', '') else '>'}{wide[name]}}"
                      for name in SHOWN if name in kept) for row in ({name: name for name in SHOWN}, *rows)]


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "~"


# ----------------------------------------------------------------------------------------------------------------------
# Curves. plotext takes 94 to 160 ms for 50 runs, uniplot labels a logarithmic axis by powers of ten alone, which a loss does
# not cross, and either would have to be installed on the machine that trains.
# ----------------------------------------------------------------------------------------------------------------------

SIGNS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = (36, 33, 35, 32, 34, 31, 96, 93, 95, 92, 94, 91)                      # of the terminal's own sixteen
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])    # bit of each dot in a cell of 4 x 2


@dataclass(frozen=True)
class Style:
    """What the output can show: escape codes, and characters beyond ASCII."""
    colour: bool
    unicode: bool

    def paint(self, text: str, index: int) -> str:
        return f"\x1b[{COLOURS[index % len(COLOURS)]}m{text}\x1b[0m" if self.colour else text


Series = Sequence[tuple[int, np.ndarray, np.ndarray]]       # (the run's index, x, y), x rising


def extent(x: np.ndarray, y: np.ndarray, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) row that a curve passes in each column, the first above the second where it passes none.
    x and y are in units of columns and rows.
    """
    centres = np.arange(math.ceil(x[0]), math.floor(x[-1]) + 1)
    at = np.rint(np.concatenate([x, centres])).astype(int)
    height = np.rint(np.concatenate([y, np.interp(centres, x, y)])).astype(int)
    low, high = np.full(columns, rows), np.full(columns, -1)
    np.minimum.at(low, at, height)
    np.maximum.at(high, at, height)
    both = (high[1:] >= 0) & (high[:-1] >= 0)               # neighbours touch, however steep the curve
    down, up = np.minimum(low[1:], high[:-1] + 1), np.maximum(high[1:], low[:-1] - 1)
    return np.append(low[:1], np.where(both, down, low[1:])), np.append(high[:1], np.where(both, up, high[1:]))


def canvas(series: Series, bounds: tuple[float, float, float, float], width: int, height: int, style: Style) -> list[str]:
    """The curves in height lines of width characters, later ones over earlier ones. bounds: lowest and highest x, then y."""
    dot_rows, dot_columns = BRAILLE.shape if style.unicode else (1, 1)
    rows, columns = height * dot_rows, width * dot_columns
    x_low, x_high, y_low, y_high = bounds
    owner, dots = np.full((height, width), -1), np.zeros((rows, columns), bool)
    for index, x, y in series:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        low, high = extent(across * (columns - 1), up * (rows - 1), columns, rows)
        heights = np.maximum(high - low + 1, 0)
        column, first = np.repeat(np.arange(columns), heights), np.repeat(np.cumsum(heights) - heights, heights)
        row = rows - 1 - (np.repeat(low, heights) + np.arange(len(column)) - first)
        dots[row, column] = True
        owner[row // dot_rows, column // dot_columns] = index
    cells = dots.reshape(height, dot_rows, width, dot_columns)
    bits = (cells * BRAILLE[:dot_rows, None, :dot_columns]).sum((1, 3))
    lines = []
    for owners, codes in zip(owner.tolist(), bits.tolist(), strict=True):
        pieces = itertools.groupby(zip(owners, codes, strict=True), key=lambda cell: cell[0])
        lines.append("".join(
            " " * len(list(piece)) if index < 0 else style.paint("".join(
                chr(0x2800 + code) if style.unicode else SIGNS[index % len(SIGNS)] for _, code in piece), index)
            for index, piece in pieces))
    return lines


def ticks(low: float, high: float, count: int, log: bool) -> list[str]:
    """Labels of `count` evenly spaced values, from high to low, with the digits that tell neighbours apart."""
    values = [10**v if log else v for v in np.linspace(high, low, count).tolist()]
    apart = min((abs(a - b) for a, b in itertools.pairwise(values)), default=1.0)
    digits = min(max(1 - math.floor(math.log10(apart)), 0), 8) if apart else 4
    return [f"{value:,.{digits}f}" for value in values]


def span(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def plot(title: str, series: Series, width: int, height: int, style: Style, *, x_axis: str, log: bool) -> list[str]:
    """A panel of `height` lines of `width` characters: title, curves beside their scale, the ends of the x axis."""
    if log:
        series = [(i, x[y > 0], np.log10(y[y > 0])) for i, x, y in series if (y > 0).any()]
    if not series:
        return [f"{shortened(title, width):<{width}}", *[" " * width] * (height - 1)]
    (x_low, x_high), (y_low, y_high) = (span(np.concatenate(columns)) for columns in list(zip(*series, strict=True))[1:])
    labels = ticks(y_low, y_high, height - 2, log)
    margin = max(map(len, labels))
    side = "│" if style.unicode else "|"
    drawn = canvas(series, (x_low, x_high, y_low, y_high), width - margin - 1, height - 2, style)
    ends = f"{x_low:,.0f}", f"{x_axis} {x_high:,.0f}"
    every = 3 if height > 8 else 2
    return [f"{shortened(title + (' (log)' if log else ''), width):^{width}}",
            *((f"{label if i % every == 0 or i == height - 3 else '':>{margin}}" + side + line)
              for i, (label, line) in enumerate(zip(labels, drawn, strict=True))),
            f"{'':{margin + 1}}{ends[0]}{ends[1]:>{max(width - margin - 1 - len(ends[0]), 0)}}"[:width]]


# ----------------------------------------------------------------------------------------------------------------------
# Frames: the table over the curves.
# ----------------------------------------------------------------------------------------------------------------------

SIDE_BY_SIDE = 100      # columns from which panels stand beside each other
PANEL = 7               # lines of the smallest panel; twice as many where nothing limits them
NARROW = 30             # columns below which no panel fits


@dataclass(frozen=True)
class View:
    """What to draw of the runs."""
    y_keys: tuple[str, ...]
    x_axis: str
    log: bool

    def panel(self, watched: Sequence[Watched], key: str, width: int, height: int, style: Style) -> list[str]:
        series = [(run.index, *run.curves[key].over(self.x_axis, run.knobs.get("train_batch_tokens", math.nan)))
                  for run in watched if key in run.curves]
        series = [(index, x, y) for index, x, y in series if len(x)]
        held = ", ".join(sorted({key for run in watched for key in run.curves}))
        title = key if series else f"no {key} over {self.x_axis} so far; the rows hold {held or 'nothing'}"
        return plot(title, series, width, height, style, x_axis=self.x_axis, log=self.log)

    def across(self, width: int) -> int:
        """How many panels stand beside each other."""
        return max(1, min(len(self.y_keys), 2 * width // SIDE_BY_SIDE))

    def panels(self, watched: Sequence[Watched], width: int, height: int, style: Style) -> list[str]:
        """One panel a key; keys for which there is no room are left out."""
        across = self.across(width)
        down = min(-(-len(self.y_keys) // across), height // PANEL)
        lines: list[str] = []
        for row in range(down):
            keys = self.y_keys[row * across:(row + 1) * across]
            each = height // down if row < down - 1 else height - len(lines)
            drawn = [self.panel(watched, key, (width - 2 * (across - 1)) // across, each, style) for key in keys]
            lines += ["  ".join(parts) for parts in zip(*drawn, strict=True)]
        return lines


def frame(watch: Watch, view: View, width: int, height: int | None, style: Style, now_s: float) -> list[str]:
    """At most `height` lines of at most `width` characters; None = as many as it takes."""
    watched = watch.runs
    states = {run.folder: run.state(now_s) for run in watched}
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
    heading = f"{len(watched)} {'run' if len(watched) == 1 else 'runs'}: {counts or 'none yet'}"
    if not watched:
        return [shortened(heading, width)]
    if not style.colour and len(watched) > 1:       # letters tell curves apart, dots without colours do not
        style = Style(colour=False, unicode=False)
    first = sorted(watched, key=lambda run: states[run.folder] not in ACTIVE)
    if height is not None:
        room = max(height - 2 - max(PANEL + 1, 2 * height // 5), 1)
        heading += f"; {len(first) - room} not shown" if len(first) > room else ""
        first = first[:room]
    bar, signs = "█░" if style.unicode else "#.", [style.paint(SIGNS[run.index % len(SIGNS)], run.index) for run in first]
    head, *body = table([cells(run, states[run.folder], bar) for run in first], max(width - 2, 1))
    lines = [shortened(heading, width), f"  {head}"[:width], *map(" ".join, zip(signs, body, strict=True))]
    left = 2 * PANEL * -(-len(view.y_keys) // view.across(width)) if height is None else height - len(lines)
    if left >= PANEL and width >= NARROW:
        lines += view.panels(watched, width, left, style)
    return lines if height is None else lines[:height]


def terminal_size() -> tuple[int, int]:
    """(columns, lines); of text that no terminal shows 120 columns, unless COLUMNS says otherwise."""
    with contextlib.suppress(OSError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns and size.lines:
            return size.columns, size.lines
    size = shutil.get_terminal_size((120, 40))
    return size.columns, size.lines


def shows_unicode() -> bool:
    try:
        "⣿█│".encode(sys.stdout.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@contextlib.contextmanager
def full_screen() -> Iterator[None]:
    """The alternate screen without a cursor; the terminal is as before after it, also where a signal ends the program."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def live(watch: Watch, view: View, every_s: float, mirrors: Sequence[Sink]) -> NoReturn:
    """Redraws until a signal comes, at once where the window changes its size."""
    style = Style(colour=True, unicode=shows_unicode())
    with full_screen():
        while True:
            t0, size = time.monotonic(), terminal_size()
            lines = frame(watch, view, *size, style, time.time())
            # Each line is cleared before it is written, with the last one all below: after a full line that would take its
            # last character.
            sys.stdout.write("\x1b[H" + "".join(f"\x1b[K{line}\r\n" for line in lines[:-1]) + "\x1b[J" + lines[-1])
            sys.stdout.flush()
            mirror(watch, mirrors, deadline_s=t0 + SINK_SHARE * every_s)
            while time.monotonic() - t0 < every_s and terminal_size() == size:
                time.sleep(min(0.1, every_s))
            watch.poll()


def mirror(watch: Watch, mirrors: Sequence[Sink], deadline_s: float = math.inf) -> None:
    """Hands every run to every sink until it has all, or until the deadline."""
    pairs = list(itertools.product(mirrors, [watched.run for watched in watch.runs if watched.run is not None]))
    quiet = not pairs or deadline_s < math.inf or not sys.stderr.isatty()
    for sink, run in tqdm(pairs, desc="copied runs", leave=False, disable=quiet):
        while time.monotonic() < deadline_s and sink(run):
            pass


def check(watch: Watch, view: View) -> None:
    """Raises RunError where there is nothing to print, now or ever."""
    if not watch.runs:
        where = ", ".join(map(str, watch.paths)) + (f" with {watch.select!r} in its name" if watch.select else "")
        raise runs.RunError(f"{where}: no run (a folder with config.json or metrics.jsonl)")
    held = sorted({key for run in watch.runs for key in run.curves})
    if held and not set(held) & set(view.y_keys):
        raise runs.RunError(f"--y {','.join(view.y_keys)}: no row holds it; the rows hold {', '.join(held)}")


def main(arguments: list[str]) -> int:
    # export_verbs.OneLineParser would bring torch along: seconds before the first frame.
    parser = argparse.ArgumentParser(prog="watch.py", description="Live runs in the terminal.")
    parser.error = lambda message: parser.exit(2, f"watch.py: {message}\n")
    parser.add_argument("paths", metavar="PATH", nargs="*", type=Path, default=[Path("logs")],
                        help="a run's folder, a folder of runs, or sweep_NAME.json (default: logs)")
    parser.add_argument("--select", metavar="TEXT", default="", help="only runs with this in their name or arm")
    parser.add_argument("--y", metavar="KEY[,KEY]", default=Y_KEYS, help=f"keys of the rows to draw (default: {Y_KEYS})")
    parser.add_argument("--x", choices=X_AXES, default="step", help="against this (default: step)")
    parser.add_argument("--log", action="store_true", help="logarithmic y axis")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="between redraws (default: 2)")
    parser.add_argument("--once", action="store_true", help="print plain text once, also on a terminal")
    for kind, sink in SINKS.items():
        parser.add_argument(f"--{kind}", metavar=sink.target, help=f"copy rows, knobs and summaries to this {sink.target}")
    args = parser.parse_args(arguments)
    view = View(tuple(filter(None, args.y.split(","))), args.x, args.log)
    if not 0 < args.every < math.inf:
        parser.error(f"--every wants seconds above 0, got {args.every}")
    if not view.y_keys:
        parser.error(f"--y wants keys of the rows, got {args.y!r}")
    try:
        with contextlib.ExitStack() as stack:
            watch = Watch(args.paths, args.select)
            mirrors = [stack.enter_context(open_sink(kind, vars(args)[kind])) for kind in SINKS if vars(args)[kind]]
            if sys.stdout.isatty() and not args.once and os.environ.get("TERM") != "dumb":
                # A sink may ask for a login: before the full screen.
                mirror(watch, mirrors, time.monotonic() + SINK_SHARE * args.every)
                live(watch, view, args.every, mirrors)
            check(watch, view)
            mirror(watch, mirrors)
            print("\n".join(frame(watch, view, terminal_size()[0], None, Style(False, shows_unicode()), time.time())))
    except (runs.RunError, SinkError, OSError) as fault:
        parser.error(" ".join(str(fault).split()))
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
