"""Guarantees of scripts/watch.py and scripts/sinks.py: what the table says of a run in every state, that files may grow, be
rewritten, appear and vanish, that every frame fits, that the terminal is left as it was, and that copies hold each row once.

    bash scripts/test.sh tests/test_watch.py

Run folders are written as files here. The copy in TensorBoard is read back with TensorBoard's own reader; Weights & Biases
is a module that records what is called.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import runs
import sinks
import watch
from train_gpt import RunFolder
from watch import Style, View, Watch, Watched

SCRIPT = str(ROOT / "scripts" / "watch.py")
PLAIN = Style(colour=False, unicode=False)
DOTS = Style(colour=True, unicode=True)
VIEW = View(("train_loss", "val_bpb"), "step", False)
KNOBS = {"seed": 1337, "iterations": 100, "max_wallclock_seconds": 0.0, "train_batch_tokens": 512, "train_log_every": 1,
         "artifact_cap_bytes": 16_000_000, "matrix_lr": 0.04, "tie_embeddings": True, "rope_dtype": "auto"}
SUMMARY = {"step": 100, "artifact_bytes": 15_000_000, "total_bytes": 15_900_000, "cap_bytes": 16_000_000, "under_cap": True,
           "pre_roundtrip": {"val_bpb": 1.20}, "roundtrip": {"val_bpb": 1.2345}, "seconds": {"train": 5.0}}

Row = dict[str, Any]


def train_row(step: int, **changes: Any) -> Row:
    """50 ms a step, of which no two are alike."""
    return {"kind": "train", "step": step, "train_loss": 7 - step / 20, "train_ms": 50.0 * step + step / 1e4} | changes


def val_row(step: int) -> Row:
    return {"kind": "val", "step": step, "val_loss": 4.0, "val_bpb": 3 - step / 100, "train_ms": 50.0 * step}


def artifact_row(step: int) -> Row:
    return {"kind": "artifact", "step": step, "artifact_bytes": 4_000_000, "rms_error": 0.01}


def append(folder: Path, *rows: Row) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_run(folder: Path, *rows: Row, summary: dict[str, Any] | None = None, log: str = "", **knobs: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"knobs": KNOBS | knobs, "code_sha256": {}}))
    append(folder, *rows)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if log:
        (folder / "train.log").write_text(log)
    return folder


def followed(folder: Path) -> Watched:
    run = Watched(folder, 0, {})
    run.poll()
    return run


def row_of(folder: Path, now_s: float | None = None) -> dict[str, str]:
    run = followed(folder)
    return watch.cells(run, run.state(time.time() if now_s is None else now_s), "#.")


def curve(run: Watched, key: str) -> list[tuple[float, float]]:
    x, y = run.curves[key].over("step", 1.0)
    return list(zip(x.tolist(), y.tolist(), strict=True))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert watch.main([*map(str, arguments), "--once"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        watch.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    return err.rstrip("\n")


# ----------------------------------------------------------------------------------------------------------------------
# What the table says.
# ----------------------------------------------------------------------------------------------------------------------


def test_a_running_run_tells_pace_share_and_time_left(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", val_row(0), train_row(10), artifact_row(10), train_row(20), train_row(40))
    assert row_of(folder) == {
        "run": "r", "seed": "1337", "state": "running", "step": "40/100", "": "####......", "done": "40%",
        "train_loss": "5.0000", "val_bpb": "3.0000", "roundtrip": "-", "bytes": "~4,000,000", "of cap": "25.0%",
        "ms/step": "50.0", "left": "0:03"}


def test_the_wallclock_cap_counts_where_it_comes_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", train_row(10), train_row(40), iterations=20_000, max_wallclock_seconds=3.0)
    row = row_of(folder)
    assert (row["done"], row["left"], row["step"]) == ("67%", "0:01", "40/20000")


def test_the_pace_is_that_of_the_newest_rows(tmp_path: Path) -> None:
    slow_start = [train_row(step, train_ms=1000.0 * step) for step in range(1, 11)]
    rows = [train_row(10 + i, train_ms=10_000 + 20.0 * i) for i in range(1, watch.PACE_ROWS + 1)]
    assert row_of(make_run(tmp_path / "r", *slow_start, *rows))["ms/step"] == "20.0"


def test_a_finished_run_shows_its_artifact(tmp_path: Path) -> None:
    row = row_of(make_run(tmp_path / "r", train_row(100), val_row(100), summary=SUMMARY))
    assert {name: row[name] for name in ("state", "done", "roundtrip", "bytes", "of cap", "left")} == {
        "state": "finished", "done": "100%", "roundtrip": "1.2345", "bytes": "15,900,000", "of cap": "99.4%", "left": "-"}


@pytest.mark.parametrize(("summary", "state"), [
    ({"total_bytes": 16_000_000}, "finished"), ({"total_bytes": 16_000_001}, "over cap"),
    ({"total_bytes": 16_000_001, "cap_bytes": 0}, "finished"), ({"roundtrip": None}, "finished"),
    ({"step": 99}, "finishing"),        # left over from before the run was resumed to go on further
])
def test_a_summary_decides_the_state(tmp_path: Path, summary: dict[str, Any], state: str) -> None:
    assert row_of(make_run(tmp_path / "r", train_row(99), train_row(100), summary=SUMMARY | summary))["state"] == state


@pytest.mark.parametrize(("log", "state"), [
    ("step:1/100\nfailed: train_loss is nan at step 7; what was saved is in r\n", "failed"),
    ("stopped by signal 15; continue with RESUME=auto\n", "stopped"),
    ("stopped by signal 15; continue with RESUME=auto\nstep:8/100 train_loss:2.0\n", "running"),
])
def test_the_last_words_of_the_log_decide_the_state(tmp_path: Path, log: str, state: str) -> None:
    assert row_of(make_run(tmp_path / "r", train_row(7), train_row(8), log=log))["state"] == state


@pytest.mark.parametrize(("silent_s", "knobs", "rows", "state"), [
    (119, {}, (train_row(10), train_row(11)), "running"),                       # a validation may take that long
    (121, {}, (train_row(10), train_row(11)), "stalled"),
    (121, {"train_log_every": 300}, (train_row(10), train_row(11)), "running"),     # 15 s a row, not 50 ms
    (151, {"train_log_every": 300}, (train_row(10), train_row(11)), "stalled"),
    (121, {}, (train_row(10), train_row(11, train_ms=20_500.0)), "running"),
    (899, {}, (), "starting"),                                                   # compiles
    (901, {}, (), "stalled"),
    (899, {}, (train_row(99), train_row(100)), "finishing"),                     # exports
    (901, {}, (train_row(99), train_row(100)), "stalled"),
])
def test_silence_counts_by_the_runs_own_pace(tmp_path: Path, silent_s: float, knobs: dict[str, Any],
                                             rows: tuple[Row, ...], state: str) -> None:
    folder = make_run(tmp_path / "r", *rows, **knobs)
    for path in folder.iterdir():
        os.utime(path, (1000.0, 1000.0))
    assert row_of(folder, now_s=1000.0 + silent_s)["state"] == state


def test_a_run_without_config_is_shown_with_what_is_known(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", train_row(3))
    config = (folder / "config.json").rename(tmp_path / "later")
    run = followed(folder)
    row = watch.cells(run, run.state(time.time()), "#.")
    assert (row["step"], row["state"], row["done"], row["seed"], row["left"]) == ("3", "running", "-", "", "-")
    config.rename(folder / "config.json")
    run.poll()
    assert watch.cells(run, "running", "#.")["step"] == "3/100"


def test_files_of_another_version_are_called_unreadable(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", train_row(3))
    (folder / "config.json").write_text('{"knobs": {}}')
    assert row_of(folder)["state"] == "unreadable"


def test_a_ledger_names_arms_and_tells_of_runs_without_a_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "x1", train_row(10), train_row(20))
    make_run(tmp_path / "x2", train_row(100), summary=SUMMARY)
    arms = ("wide", "running"), ("wide", "finished"), ("deep", "queued"), ("deep", "lost")
    told = [{"run_id": f"x{i}", "arm": arm, "seed": i, "state": state, "folder": f"x{i}", "note": ""}
            for i, (arm, state) in enumerate(arms, 1)]
    ledger = tmp_path / "sweep_a.json"
    ledger.write_text(json.dumps({"sweep": "a", "control": "wide", "runs": told}))
    seen = Watch([ledger])
    assert [(run.name, run.seed, run.state(time.time())) for run in seen.runs] == [
        ("wide", "1", "running"), ("wide", "2", "finished"), ("deep", "3", "queued"), ("deep", "4", "lost")]
    assert [run.seed for run in Watch([ledger], "dee").runs] == ["3", "4"]
    assert [run.seed for run in Watch([ledger], "x2").runs] == ["2"]
    assert len(Watch([tmp_path, ledger]).runs) == 4          # a run that two paths name is one run
    ledger.write_text("{")
    seen.poll()
    assert len(seen.runs) == 4


def test_the_arm_of_a_sweep_is_the_name_without_a_ledger(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x1", train_row(1))
    (folder / "sweep.json").write_text('{"arm": "wide", "code": "c"}')
    assert row_of(folder)["run"] == "wide"
    assert row_of(folder)["state"] == "running"
    (folder / "sweep.json").write_text('{"arm": "wide", "code": "c", "halted": "behind at step 50"}')
    assert row_of(folder)["state"] == "halted"


def test_arms_that_share_a_folder_share_a_line(tmp_path: Path) -> None:
    ledger = tmp_path / "sweep_a.json"
    ledger.write_text(json.dumps({"runs": [{"arm": arm, "seed": 1, "state": "pending", "folder": "x"} for arm in "pq"]}))
    assert [run.name for run in Watch([ledger]).runs] == ["p=q"]


# ----------------------------------------------------------------------------------------------------------------------
# Files that change.
# ----------------------------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_come_and_a_half_written_one_when_it_is_whole(tmp_path: Path) -> None:
    run = followed(make_run(tmp_path / "r", train_row(1)))
    line = json.dumps(train_row(2)) + "\n"
    for piece, steps in ((line[:20], [1]), (line[20:-1], [1]), (line[-1:], [1, 2])):
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(piece)
        run.poll()
        assert [x for x, _ in curve(run, "train_loss")] == steps


@pytest.mark.parametrize("line", [
    '{"kind": "train", "st', "[]", "3", "null", '{"kind": "train"}', '{"kind": "val", "step": "x"}',
    '{"kind": "train", "step": 1, "train_ms": []}', "\xff"])
def test_a_line_that_is_no_row_is_passed_over(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path / "r", train_row(1))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    append(folder, train_row(2))
    assert [x for x, _ in curve(followed(folder), "train_loss")] == [1, 2]


def test_a_resumed_run_shows_what_its_file_holds_now(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", *[train_row(step) for step in range(1, 31)], val_row(30))
    run = followed(folder)
    trainer = RunFolder(folder, master=True)
    trainer.forget_metrics_from(20)
    trainer.metric(**train_row(21, train_loss=1.0))
    run.poll()
    assert curve(run, "train_loss") == curve(followed(folder), "train_loss")
    assert (run.step, run.newest["train_loss"], "val_bpb" in run.newest) == (21, 1.0, False)


def test_a_rewritten_file_is_noticed_although_it_has_grown_past_the_old_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", *[train_row(step) for step in range(1, 11)])
    run = followed(folder)
    (folder / "metrics.jsonl").unlink()
    append(folder, *[train_row(step, train_ms=51.0 * step) for step in range(1, 21)])
    run.poll()
    assert [x for x, _ in curve(run, "train_loss")] == list(range(1, 21))


def test_a_rewritten_file_of_the_same_beginning_is_not_read_twice(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", train_row(1), train_row(2))
    tail = runs.Tail(folder / "metrics.jsonl")
    assert (tail.read()[0], tail.offset) == (False, (folder / "metrics.jsonl").stat().st_size)
    RunFolder(folder, master=True).forget_metrics_from(2)
    append(folder, train_row(3))
    assert tail.read() == (False, [json.dumps(train_row(3)).encode()])


def test_a_kept_offset_goes_on_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\nthr")
    first = runs.Tail(path)
    assert first.read() == (False, [b"one", b"two"])
    path.write_bytes(b"one\ntwo\nthree\n")
    assert runs.Tail(path, first.offset, first.mark).read() == (False, [b"three"])
    path.write_bytes(b"one\nTWO\nthree\n")
    assert runs.Tail(path, first.offset, first.mark).read() == (True, [b"one", b"TWO", b"three"])
    path.unlink()
    assert first.read() == (True, [])
    assert first.read() == (False, [])


def test_a_bounded_read_gives_whole_lines_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = [b"x" * (i % 7) for i in range(100)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    tail, found = runs.Tail(path), []
    while part := tail.read(20)[1]:
        found += part
    assert found == lines


def test_runs_appear_and_vanish_and_keep_their_signs(tmp_path: Path) -> None:
    for name in "bc":
        make_run(tmp_path / name, train_row(1))
    seen = Watch([tmp_path])
    signs = {run.name: run.index for run in seen.runs}
    make_run(tmp_path / "a", train_row(1))
    seen.poll()
    assert [run.name for run in seen.runs] == ["a", "b", "c"]
    assert {run.name: run.index for run in seen.runs} == signs | {"a": 2}
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    (tmp_path / "b").rmdir()
    seen.poll()
    assert [run.name for run in seen.runs] == ["a", "c"]


def test_of_a_long_run_every_validation_and_the_newest_row_are_kept(tmp_path: Path) -> None:
    rows = [row for step in range(1, 6010) for row in (train_row(step), val_row(step))[:1 if step % 500 else 2]]
    folder = make_run(tmp_path / "r", *rows)
    run = followed(folder)
    full = {step: 7 - step / 20 for step in range(1, 6010)}
    losses = curve(run, "train_loss")
    assert watch.POINTS <= len(losses) <= 2 * watch.POINTS
    assert all(full[int(x)] == y for x, y in losses)
    assert max(np.diff([x for x, _ in losses])) <= 2 * 6009 / watch.POINTS
    assert [x for x, _ in losses[-watch.PACE_ROWS:]] == list(range(6010 - watch.PACE_ROWS, 6010))
    assert [x for x, _ in curve(run, "val_bpb")] == list(range(500, 6001, 500))
    assert (run.step, run.newest["train_loss"], round(run.step_ms, 1)) == (6009, full[6009], 50.0)
    for step in range(6010, 8001):      # and when they come one by one
        run.add(json.dumps(train_row(step)).encode())
    losses = curve(run, "train_loss")
    assert len(losses) <= 2 * watch.POINTS
    assert losses[-1][0] == 8000


def test_watching_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "r", train_row(1), summary=SUMMARY)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    printed(capsys, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ----------------------------------------------------------------------------------------------------------------------
# Frames.
# ----------------------------------------------------------------------------------------------------------------------


def slow_extent(x: np.ndarray, y: np.ndarray, columns: int, rows: int) -> tuple[list[int], list[int]]:
    """Column by column: rows of the points in it and of the line at its centre, then steps filled towards the neighbour."""
    spans: list[tuple[int, int] | None] = []
    for c in range(columns):
        inside = [y[i] for i in range(len(x)) if round(x[i]) == c]
        if x[0] <= c <= x[-1]:
            j = max(i for i in range(len(x)) if x[i] <= c)
            k = min(j + 1, len(x) - 1)
            inside.append(y[j] if x[k] == x[j] else y[j] + (y[k] - y[j]) * (c - x[j]) / (x[k] - x[j]))
        spans.append((min(map(round, inside)), max(map(round, inside))) if inside else None)
    low, high = [s[0] if s else rows for s in spans], [s[1] if s else -1 for s in spans]
    for c in range(1, columns):
        before, here = spans[c - 1], spans[c]
        if before and here and here[0] > before[1]:
            low[c] = before[1] + 1
        if before and here and here[1] < before[0]:
            high[c] = before[0] - 1
    return low, high


@pytest.mark.parametrize("points", [1, 2, 3, 40, 400])
def test_a_curve_passes_the_dots_that_a_plain_loop_finds(points: int) -> None:
    rng = np.random.default_rng(points)
    for columns, rows in ((1, 1), (7, 5), (61, 24)):
        x, y = np.sort(rng.random(points)) * (columns - 1), rng.random(points) * (rows - 1)
        low, high = watch.extent(x, y, columns, rows)
        assert (low.tolist(), high.tolist()) == slow_extent(x, y, columns, rows)


DIAGONAL = ["    a", "   a ", "  a  ", " a   ", "a    "]


def line_of(*ys: float) -> watch.Series:
    return [(0, np.arange(len(ys), dtype=float), np.array(ys, dtype=float))]


def test_a_straight_line_is_the_diagonal() -> None:
    assert watch.canvas(line_of(0, 1, 2, 3, 4), (0, 4, 0, 4), 5, 5, PLAIN) == DIAGONAL
    assert watch.canvas(line_of(0, 4), (0, 4, 0, 4), 5, 5, PLAIN) == [" a   "] * 4 + ["a    "]      # steep, without a gap


def test_a_panel_has_its_scale_beside_it() -> None:
    assert watch.plot("loss", line_of(20, 30, 40, 50, 60), 16, 7, PLAIN, x_axis="step", log=False) == [
        "      loss      ",
        "60|           aa",
        "  |        aaa  ",
        "40|     aaa     ",
        "  |  aaa        ",
        "20|aa           ",
        "   0      step 4",
    ]


def test_an_exponential_is_straight_on_a_logarithmic_axis() -> None:
    lines = watch.plot("loss", line_of(1, 10, 100, 1000, 10_000), 14, 7, PLAIN, x_axis="step", log=True)
    assert [line[-5:] for line in lines[1:6]] == DIAGONAL
    assert [line[:8].strip() for line in lines[1:6]] == ["10,000.0", "", "100.0", "", "1.0"]
    assert lines[0].strip() == "loss (log)"


def test_a_cell_of_braille_has_the_dots_of_its_curve() -> None:
    rise = chr(0x2800 + 0x40 + 0x20 + 0x10 + 0x08)      # the lowest dot of the left column, the other three of the right one
    assert watch.canvas(line_of(0, 1), (0, 1, 0, 1), 1, 1, Style(colour=False, unicode=True)) == [rise]


def test_a_later_curve_covers_an_earlier_one() -> None:
    series = [(0, *line_of(0, 0, 0)[0][1:]), (1, np.array([1.0, 2.0]), np.array([0.0, 0.0]))]
    assert watch.canvas(series, (0, 2, 0, 1), 3, 1, PLAIN) == ["abb"]
    coloured = watch.canvas(series, (0, 2, 0, 1), 3, 1, Style(colour=True, unicode=False))
    assert coloured == ["\x1b[36ma\x1b[0m\x1b[33mbb\x1b[0m"]


def test_values_that_have_no_logarithm_are_left_out_and_infinite_ones_never_drawn(tmp_path: Path) -> None:
    assert watch.plot("loss", line_of(0, -1), 20, 7, PLAIN, x_axis="step", log=True)[1:] == [" " * 20] * 6
    rows = train_row(1), train_row(2, train_loss=math.nan), train_row(3, train_loss=math.inf)
    run = followed(make_run(tmp_path / "r", *rows))
    assert curve(run, "train_loss") == [(1, 6.95)]
    assert watch.cells(run, "running", "#.")["train_loss"] == "inf"


def test_axes_in_seconds_and_tokens(tmp_path: Path) -> None:
    run = followed(make_run(tmp_path / "r", train_row(10), artifact_row(10), train_row(20)))
    assert run.curves["train_loss"].over("seconds", 512)[0].tolist() == [0.500001, 1.000002]
    assert run.curves["train_loss"].over("tokens", 512)[0].tolist() == [5120, 10240]
    assert run.curves["artifact_bytes"].over("seconds", 512)[0].tolist() == []       # its rows carry no time


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9]*m", "", line)


@pytest.mark.parametrize("style", [PLAIN, DOTS])
@pytest.mark.parametrize("size", [(60, 15), (80, 24), (99, 50), (100, 15), (250, 70), (20, 4), (1, 1)])
@pytest.mark.parametrize("count", [1, 3, 60])
def test_every_frame_fits_the_terminal(tmp_path: Path, size: tuple[int, int], count: int, style: Style) -> None:
    for i in range(count):
        make_run(tmp_path / f"{'a rather long name of an arm ' * (i % 2)}{i}", train_row(10), val_row(10), train_row(20),
                 summary=SUMMARY if i % 3 else None)
    width, height = size
    lines = [plain(line) for line in watch.frame(Watch([tmp_path]), VIEW, width, height, style, time.time())]
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    if width >= 60:
        assert len(lines) == height
        assert f"{count} run" in lines[0]
        assert "train_loss" in lines[min(count, height - 2 - max(8, 2 * height // 5)) + 2]
        assert all(word in lines[1] for word in ("run", "state", "val_bpb", "done"))


def test_running_runs_come_first_where_not_all_fit(tmp_path: Path) -> None:
    for i in range(30):
        make_run(tmp_path / f"r{i:02}", train_row(10), train_row(20), summary=None if i == 17 else SUMMARY)
    lines = watch.frame(Watch([tmp_path]), VIEW, 60, 15, PLAIN, time.time())
    assert lines[0] == "30 runs: 29 finished, 1 running; 25 not shown"
    assert lines[2].split()[1:4] == ["r17", "1337", "running"]


def test_the_output_is_plain_text_without_a_terminal(tmp_path: Path) -> None:
    for name in ("one", "two\x1b[31m", "drei\u4e09"):
        make_run(tmp_path / name, train_row(10), val_row(10), train_row(20), val_row(20))
    for encoding, paths in (("utf-8", ["."]), ("ascii", ["."]), ("ascii", ["one"]), ("utf-8", ["one"])):
        done = subprocess.run([sys.executable, SCRIPT, *paths], cwd=tmp_path, capture_output=True, timeout=60,
                              env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "90"})
        text = done.stdout.decode(encoding)
        assert (done.returncode, done.stderr, "\x1b" in text) == (0, b"", False)
        assert ("⠒" in text or "⠤" in text or "⡠" in text) == (encoding == "utf-8" and paths == ["one"])
        assert max(map(len, text.splitlines())) <= 90
        assert "train_loss" in text.splitlines()[1]
        assert ("two?[31m" in text and "drei?" in text) == (paths == ["."])


def test_watching_needs_no_torch() -> None:
    code = "import sys; sys.path.insert(0, 'scripts'); import watch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# Wrong arguments.
# ----------------------------------------------------------------------------------------------------------------------


def test_wrong_arguments_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = make_run(tmp_path / "r", train_row(1)), tmp_path / "empty"
    empty.mkdir()
    no_ledger, no_json = tmp_path / "a.json", tmp_path / "b.json"
    no_ledger.write_text('{"runs": [{"arm": "x"}]}')
    no_json.write_text("{")
    for arguments, line in (
        ([tmp_path / "no"], f"{tmp_path / 'no'}: not found; wanted a run's folder, a folder of runs or sweep_NAME.json"),
        ([empty, "--once"], f"{empty}: no run (a folder with config.json or metrics.jsonl)"),
        ([run, "--once", "--select", "zz"],
         f"{run} with 'zz' in its name: no run (a folder with config.json or metrics.jsonl)"),
        ([no_ledger], f"{no_ledger} is no ledger of a sweep: wanted runs, a list of objects that name their folder"),
        ([run, "--once", "--y", "loss"], "--y loss: no row holds it; the rows hold train_loss, train_ms"),
        ([run, "--every", "0"], "--every wants seconds above 0, got 0.0"),
        ([run, "--every", "nan"], "--every wants seconds above 0, got nan"),
        ([run, "--y", ","], "--y wants keys of the rows, got ','"),
    ):
        assert refused(capsys, *arguments) == f"watch.py: {line}"
    assert refused(capsys, no_json).startswith(f"watch.py: {no_json} cannot be read: ")
    assert refused(capsys, run, "--x", "hours").startswith("watch.py: argument --x: invalid choice: 'hours'")
    assert refused(capsys, run, "--colour").startswith("watch.py: unrecognized arguments")


def test_a_key_that_has_no_rows_yet_is_named_in_its_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "r", train_row(1))
    assert "no val_bpb over step so far; the rows hold train_loss" in printed(capsys, run)


# ----------------------------------------------------------------------------------------------------------------------
# On a terminal.
# ----------------------------------------------------------------------------------------------------------------------


class Terminal:
    """watch.py on a pseudo-terminal of its own, and everything it wrote there."""

    def __init__(self, columns: int, lines: int, *arguments: str | Path, **env: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, SCRIPT, *map(str, arguments)],
                      os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | env)
        self.resize(columns, lines)
        self.modes, self.text, self.quiet = termios.tcgetattr(self.fd), "", False

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> bool:
        """Whether there was more; after the end there is none."""
        self.quiet = not select.select([self.fd], [], [], 0.1)[0]
        if self.quiet:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.text += data.decode("utf-8", "replace")
        return bool(data)

    def until(self, seen: Callable[[list[str]], bool]) -> list[str]:
        """Reads on until a whole frame has it; that frame's lines."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.read():
            whole = self.text.split("\x1b[H")[1:] if self.quiet else self.text.split("\x1b[H")[1:-1]
            for body in reversed(whole):
                lines = [re.sub(r"^\x1b\[[JK]", "", plain(line)) for line in body.replace("\r", "").split("\n")]
                if seen(lines):
                    return lines
        raise AssertionError(f"never seen; the end of the output: {self.text[-2000:]!r}")

    def end(self, send: Callable[[], object]) -> int:
        """The exit status, after all output was read; the terminal must be as it was."""
        send()
        while self.read():
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                raise AssertionError("ended before its output did")
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def on_terminal(columns: int, lines: int, *arguments: str | Path, **env: str) -> Iterator[Terminal]:
    terminal = Terminal(columns, lines, *arguments, **env)
    try:
        yield terminal
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(terminal.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(terminal.pid, 0)


ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def test_a_terminal_is_redrawn_resized_and_left_as_it_was_by_ctrl_c(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", train_row(10), train_row(20))
    with on_terminal(60, 15, tmp_path, "--every", "0.2") as terminal:
        first = terminal.until(lambda lines: "20%" in lines[2])
        assert len(first) == 15
        append(folder, train_row(30), val_row(30))
        second = terminal.until(lambda lines: "30%" in lines[2])
        assert "2.7000" in second[2]
        make_run(tmp_path / "s", train_row(1))
        terminal.until(lambda lines: lines[0].startswith("2 runs"))
        terminal.resize(120, 30)
        wide = terminal.until(lambda lines: len(lines) == 30)
        assert max(map(len, wide)) <= 120
        assert "of cap" in wide[1]
        modes = termios.tcgetattr(terminal.fd)
        assert terminal.end(lambda: os.write(terminal.fd, b"\x03")) == 0
        assert modes == terminal.modes
    assert terminal.text.startswith(ENTER)
    assert terminal.text.rstrip("\r\n").endswith(LEAVE)
    assert (terminal.text.count(ENTER), terminal.text.count(LEAVE)) == (1, 1)
    assert "Traceback" not in terminal.text
    assert not re.search(r"[^\nH]\x1b\[[JK]", plain(terminal.text))      # it would take a character


def test_a_terminal_is_left_as_it_was_by_a_signal(tmp_path: Path) -> None:
    with on_terminal(80, 24, tmp_path, "--every", "600", PYTHONIOENCODING="ascii") as terminal:
        assert terminal.until(lambda lines: bool(lines[0])) == ["0 runs: none yet"]
        make_run(tmp_path / "r", train_row(10), train_row(20))
        terminal.resize(70, 20)                                 # is drawn at once
        assert len(terminal.until(lambda lines: lines[0].startswith("1 run"))) == 20
        assert terminal.end(lambda: os.kill(terminal.pid, signal.SIGTERM)) == 128 + signal.SIGTERM
    assert terminal.text.endswith(LEAVE)
    assert terminal.text.isascii()


@pytest.mark.parametrize(("arguments", "env"), [(["--once"], {}), ([], {"TERM": "dumb"})])
def test_a_terminal_gets_plain_text_where_it_is_asked_for(tmp_path: Path, arguments: list[str], env: dict[str, str]) -> None:
    make_run(tmp_path / "r", train_row(10), train_row(20))
    with on_terminal(70, 24, tmp_path, *arguments, **env) as terminal:
        assert terminal.end(lambda: None) == 0
    assert "\x1b" not in terminal.text
    assert max(map(len, terminal.text.splitlines())) <= 70
    assert terminal.text.startswith("1 run: 1 running")


# ----------------------------------------------------------------------------------------------------------------------
# Copies in TensorBoard.
# ----------------------------------------------------------------------------------------------------------------------


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value), as TensorBoard shows it; tags of which it was told to forget all are not listed."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    held = {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: values for tag, values in held.items() if values}


def copied(capsys: pytest.CaptureFixture[str], logs: Path, to: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    printed(capsys, logs, "--tensorboard", to)
    return board(to / "r")


def expected(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("kind", "step"):
                found.setdefault(f"{row['kind']}/{key}", []).append((row["step"], round(float(np.float32(value)), 4)))
    return found


def test_tensorboard_holds_every_row_once_however_often_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [val_row(0), train_row(1), train_row(2), val_row(2), train_row(3), artifact_row(2)]      # a size comes late
    folder, to = make_run(tmp_path / "logs" / "r", *rows), tmp_path / "board"
    assert copied(capsys, tmp_path / "logs", to) == expected(rows)
    files = sorted(to.rglob("*"))
    assert copied(capsys, tmp_path / "logs", to) == expected(rows)
    assert sorted(to.rglob("*")) == files
    append(folder, train_row(4))
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"step": 4}))
    found = copied(capsys, tmp_path / "logs", to)
    assert copied(capsys, tmp_path / "logs", to) == found
    numbers = {"step": 4, "artifact_bytes": 15_000_000, "total_bytes": 15_900_000, "cap_bytes": 16_000_000,
               "pre_roundtrip/val_bpb": 1.2, "roundtrip/val_bpb": 1.2345, "seconds/train": 5.0}
    assert found == expected([*rows, train_row(4)]) | {f"summary/{name}": [(4, value)] for name, value in numbers.items()}


def test_tensorboard_holds_what_a_resumed_run_wrote_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "board"
    folder = make_run(tmp_path / "logs" / "r", *[train_row(step) for step in range(1, 31)], val_row(30))
    copied(capsys, tmp_path / "logs", to)
    trainer = RunFolder(folder, master=True)
    trainer.forget_metrics_from(20)
    again = [train_row(step, train_loss=1.0) for step in range(21, 26)]
    for row in again:
        trainer.metric(**row)
    rows = [train_row(step) for step in range(1, 21)] + again
    assert copied(capsys, tmp_path / "logs", to) == expected(rows)
    trainer.forget_metrics_from(0)          # from scratch, and looked at before its first row
    assert copied(capsys, tmp_path / "logs", to) == expected(rows)
    append(folder, train_row(1, train_loss=5.5))
    assert copied(capsys, tmp_path / "logs", to) == expected([train_row(1, train_loss=5.5)])


def test_tensorboard_gets_knobs_and_the_times_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    folder = make_run(tmp_path / "logs" / "r", train_row(20))
    os.utime(folder / "config.json", (5000.0, 5000.0))
    printed(capsys, folder, "--tensorboard", tmp_path / "board")
    events = accumulator.EventAccumulator(str(tmp_path / "board" / "r"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = plugin.HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: value.string_value or value.number_value for name, value in hparams.items()} == KNOBS
    assert [event.wall_time for event in events.Scalars("train/train_loss")] == [pytest.approx(5001.0, abs=0.01)]


def test_a_long_run_is_copied_in_chunks_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sinks, "CHUNK_BYTES", 300)
    rows = [train_row(step) for step in range(1, 41)]
    make_run(tmp_path / "logs" / "r", *rows, summary=SUMMARY)
    found = copied(capsys, tmp_path / "logs", tmp_path / "board")
    assert {tag: values for tag, values in found.items() if tag.startswith("train/")} == expected(rows)
    assert found["summary/total_bytes"] == [(40, 15_900_000)]


# ----------------------------------------------------------------------------------------------------------------------
# Copies in Weights & Biases.
# ----------------------------------------------------------------------------------------------------------------------


class FakeWandb(SimpleNamespace):
    """What the package's documentation lists, recorded."""

    class Error(Exception):
        pass

    class Settings(SimpleNamespace):
        pass

    def __init__(self) -> None:
        super().__init__(started=[])

    def init(self, *, project: str, id: str, name: str, config: Any, **how: Any) -> Any:
        if project == "refused":
            raise self.Error("no\nAPI key")
        assert how.keys() == {"resume", "reinit", "dir", "settings"}
        assert (how["resume"], how["reinit"], Path(how["dir"]).is_dir()) == ("allow", "create_new", True)
        assert (how["settings"].silent, how["settings"].console) == (True, "off")       # the screen belongs to the curves
        run = SimpleNamespace(
            project=project, id=id, name=name, config=dict(config), rows=[], summary={}, finished=0, metrics=[])
        run.log = lambda row: run.rows.append(dict(row))
        run.define_metric = lambda name, step_metric: run.metrics.append((name, step_metric))
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        self.started.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_row_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: FakeWandb) -> None:
    folder = make_run(tmp_path / "a#r", train_row(1), val_row(1), train_row(2), artifact_row(1))
    printed(capsys, tmp_path, "--wandb", "golf")
    (run,) = wandb.started
    assert (run.project, run.id, run.name, run.config, run.finished) == ("golf", "a-r", "a#r", KNOBS, 1)
    assert run.metrics == [("*", "step")]
    assert run.rows == [
        {"step": 1, "train/train_loss": 6.95, "train/train_ms": 50.0001},
        {"step": 1, "val/val_loss": 4.0, "val/val_bpb": 2.99, "val/train_ms": 50.0},
        {"step": 2, "train/train_loss": 6.9, "train/train_ms": 100.0002},
        {"step": 1, "artifact/artifact_bytes": 4_000_000, "artifact/rms_error": 0.01}]
    assert run.summary == {}
    printed(capsys, tmp_path, "--wandb", "golf")
    assert len(wandb.started) == 1
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    for _ in range(2):
        printed(capsys, tmp_path, "--wandb", "golf")
    assert [(run.rows, run.finished) for run in wandb.started[1:]] == [([], 1)]
    assert wandb.started[1].summary["summary/roundtrip/val_bpb"] == 1.2345
    printed(capsys, tmp_path, "--wandb", "another")
    assert len(wandb.started[2].rows) == 4


def test_wandb_goes_on_after_the_steps_it_has_where_a_run_was_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                      wandb: FakeWandb) -> None:
    folder = make_run(tmp_path / "r", *[train_row(step) for step in range(1, 31)], val_row(30))
    printed(capsys, tmp_path, "--wandb", "golf")
    trainer = RunFolder(folder, master=True)
    trainer.forget_metrics_from(20)
    append(folder, *[train_row(step, train_ms=60.0 * step) for step in range(21, 33)])
    printed(capsys, tmp_path, "--wandb", "golf")
    assert [row["step"] for row in wandb.started[1].rows] == [31, 32]
    append(folder, val_row(30), val_row(40))
    printed(capsys, tmp_path, "--wandb", "golf")
    assert [row["step"] for row in wandb.started[2].rows] == [40]


# ----------------------------------------------------------------------------------------------------------------------
# Copies that cannot be made.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "module", "package"), [
    ("--tensorboard", "torch.utils.tensorboard", "tensorboard"), ("--wandb", "wandb", "wandb")])
def test_a_missing_package_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                    flag: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(capsys, make_run(tmp_path / "r"), "--once", flag, tmp_path / "to")
    assert line.startswith(f"watch.py: {flag} needs {package}: pip install {package} (")
    assert not (tmp_path / "to").exists()


def test_a_copy_that_cannot_be_made_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                     wandb: FakeWandb) -> None:
    pytest.importorskip("tensorboard")
    one, two = (make_run(tmp_path / name / "r", train_row(1)) for name in ("logs", "more"))
    file = tmp_path / "file"
    file.write_text("")
    board = tmp_path / "board"
    state = board / "r" / "copied.json"
    printed(capsys, one, "--tensorboard", board)
    for text, places, line in (
        ("{}", [one, "--wandb", "refused"], "--wandb refused: no API key"),
        ("{}", [one, two, "--wandb", "golf"], f"--wandb: {one} and {two} have one name, their copies would mix; watch one"),
        ("{}", [one, "--tensorboard", file], f"--tensorboard {file}: [Errno 20] Not a directory"),
        ('{"offset": 0}', [one, "--tensorboard", board], f"{state} lacks 'mark'; delete its folder to copy the run anew"),
        ("{", [one, "--tensorboard", board], f"{state} cannot be read: "),
    ):
        state.write_text(text)
        assert refused(capsys, *places, "--once").startswith(f"watch.py: {line}")
