"""Reports: what runs say is what tables, files and the page show; traps are named; nothing that was planned is dropped.

Guarantees: numbers equal hand-computed ones in all outputs; every trap has its flag and a clean study none; a ledger's
missing runs are listed with their reasons; equal inputs give equal bytes; names from outside stay text; wrong input gives
one line, exit code 2 and no file; the page, in a real browser, shows the rows and flags, sorts, requests nothing, logs no
error and fits a phone. Run folders are files written here; one test feeds real runs.
Run: bash scripts/test.sh tests/test_report.py (about 20 s on one core, 4 of them for the browser).
"""
from __future__ import annotations

import json
import math
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import browser
import pytest
from conftest import TinyData, tiny_knobs

import train_gpt

pytest.importorskip("scipy", reason="reports need scipy")
import arms
import report
import runs

CODE_BYTES = 51_000
BPB = {"base": (1.2270, 1.2281, 1.2265), "wide": (1.2240, 1.2252, 1.2234), "noisy": (1.2290, 1.2250, 1.2285),
       "same": (1.2270, 1.2281, 1.2265)}
KNOBS: dict[str, dict[str, Any]] = {"base": {}, "wide": {"model_dim": 576}, "noisy": {"matrix_lr": 0.08},
                                    "same": {"rope_base": 20000.0}}
RD_PARTS = {"frame": 20, "header": 509, "codes:blocks.0.resid_mix": 64, "codes:blocks.1.resid_mix": 64, "scales": 12,
            "f16": 295, "f32": 0, "raw": 0, "factors": 0, "index": 0, "bases": 77, "positions": 15_700_951, "checksum": 8}


def merged(value: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the changes, those of inner objects merged too."""
    def both(old: Any, new: Any) -> Any:
        return merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else new

    return value | {key: both(value.get(key), change) for key, change in changes.items()}


def write_run(folder: Path, seed: int, bpb: float, *, config: Mapping[str, Any] | None = None,
              summary: Mapping[str, Any] | None = None, finished: bool = True) -> Path:
    """A run's folder of two validations and three training rows; the changes are merged into its two files."""
    knobs = {f.name: f.default for f in train_gpt.fields(train_gpt.Config)} | {
        "seed": seed, "run_id": folder.name, "iterations": 40, "max_wallclock_seconds": 0.0}
    parts = (summary or {}).get("parts", RD_PARTS)
    artifact_bytes = sum(parts.values())
    scores = {"val_loss": bpb * 1.7, "tokens": 62_021_846, "bytes": 151_077_000, "seconds": 10.0}
    total, cap = artifact_bytes + CODE_BYTES, (summary or {}).get("cap_bytes", 16_000_000)
    files = {"config.json": merged({
        "knobs": knobs, "device": "device:cpu (x86_64) world_size:1 dtype:float32 compile:False",
        "code_sha256": {"train_gpt.py": "a" * 64, "export.py": "b" * 64}, "python": "3.11.7", "torch": "2.13.0",
        "numpy": "2.4.6", "tokenizer_sha256": "c" * 64, "train_tokens": 10_000, "val_tokens": 1000}, config or {})}
    if finished:
        files["summary.json"] = merged({
            "run_id": folder.name, "step": 40, "iterations": 40, "seed": seed, "train_tokens_seen": 40 * 524_288,
            "params": 17_000_000, "pre_roundtrip": scores | {"val_bpb": bpb - 0.001},
            "roundtrip": scores | {"val_bpb": bpb}, "export_scheme": "rd", "artifact": "final_model.rd.anlm",
            "artifact_bytes": artifact_bytes, "code_bytes": CODE_BYTES, "total_bytes": total, "cap_bytes": cap,
            "under_cap": not 0 < cap < total, "bits_per_weight": 3.0, "floored_share": 0.0, "rms_error": 0.1,
            "planned_bytes": 0, "expected_nats": None, "permutation_gains": {}, "parts": parts,
            "eval_modes": {},
            "seconds": {"prepare": 1.0, "train": 30.0, "export": 2.0}}, summary or {})
    rows = [{"kind": "val", "step": step, "val_loss": bpb, "val_bpb": bpb + 1 / (1 + step), "train_ms": 1.0}
            for step in (0, 40)]
    rows += [{"kind": "train", "step": step, "train_loss": 2 + seed / step, "lr_scale": 1.0, "train_ms": 1.0}
             for step in (1, 20, 39)]
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_arms(logs: Path, names: Sequence[str] = ("base", "wide", "noisy")) -> Path:
    for name in names:
        for seed, bpb in enumerate(BPB[name], 1):
            write_run(logs / f"{name}_s{seed}", seed, bpb, config={"knobs": KNOBS[name]})
    return logs


def write_ledger(logs: Path, rows: Sequence[Mapping[str, Any]], control: str | None = "base") -> Path:
    path = logs / "sweep_width.json"
    path.write_text(json.dumps({"sweep": "width", "spec": "width.toml", "control": control, "runs": rows}))
    return path


def planned(run_id: str, arm: str, seed: int, state: str = "finished", note: str = "") -> dict[str, Any]:
    return {"run_id": run_id, "arm": arm, "seed": seed, "state": state, "folder": run_id, "note": note}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = report.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def study_of(path: Path, control: str | None = "base", cap_bytes: int | None = None) -> arms.Study:
    return arms.read_study([str(path)], control, 0.0005, cap_bytes)


def flags_of(path: Path, control: str | None = "base") -> list[tuple[str, str]]:
    return [(flag.kind, flag.text) for flag in study_of(path, control).flags]


def flat(text: str) -> str:
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------------------------------
# Numbers.
# ----------------------------------------------------------------------------------------------------------------------


def test_arms_are_ranked_with_means_and_spreads_of_the_artifacts_score(tmp_path: Path) -> None:
    study = study_of(write_arms(tmp_path / "logs"))
    assert [arm.name for arm in study.arms] == ["wide", "base", "noisy"]
    base = study.arms[1]
    assert base is study.control
    mean, sd = base.mean_sd(lambda entry: entry.val_bpb)
    assert mean == pytest.approx(3.6816 / 3)
    assert sd == pytest.approx(math.sqrt((0.0002**2 + 0.0009**2 + 0.0007**2) / 2))
    assert base.of_summary("total_bytes") == (15_702_000 + CODE_BYTES, 0.0)
    assert base.mean_sd(lambda entry: entry.gap_bpb) == (pytest.approx(0.001), pytest.approx(0.0, abs=1e-12))


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """wide - base is -3.0, -2.9, -3.1 mbpb: m = -3.0, s = 0.1; noisy - base is 2.0, -3.1, 2.0."""
    found = study_of(write_arms(tmp_path / "logs")).comparisons
    assert found["wide"].difference == pytest.approx(-0.003)
    assert found["wide"].high == pytest.approx(-0.003 + 4.302652730 * 0.0001 / math.sqrt(3))
    assert (found["wide"].verdict, found["noisy"].verdict) == ("better", "underpowered")
    assert found["noisy"].difference == pytest.approx(0.0003)


def test_parts_sum_to_the_total_in_few_components(tmp_path: Path) -> None:
    parts = study_of(write_run(tmp_path / "base_s1", 1, 1.2)).arms[0].parts()
    assert parts == {"metadata": 537, "codes": 128, "scales": 12, "f16": 295, "f32": 0, "raw": 0, "factors": 0, "index": 0,
                     "bases": 77, "positions": 15_700_951, "code": CODE_BYTES}


def test_sqlite_holds_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, path = write_arms(tmp_path / "logs"), tmp_path / "report.sqlite"
    path.write_text("what was there before")
    assert run(capsys, logs, "--control", "base", "--sqlite", path)[0] == 0
    with sqlite3.connect(path) as base:
        assert base.execute("SELECT run_id, arm, seed, val_bpb, total_bytes, over_cap, json_extract(knobs, '$.model_dim')"
                            " FROM runs WHERE arm = 'wide' ORDER BY seed").fetchall() == [
            (f"wide_s{seed}", "wide", seed, bpb, 15_753_000, 0, 576) for seed, bpb in enumerate(BPB["wide"], 1)]
        assert base.execute("SELECT arm, rank, n, is_control, differs_in FROM arms ORDER BY rank").fetchall() == [
            ("wide", 1, 3, 0, "MODEL_DIM 512 -> 576"), ("base", 2, 3, 1, ""), ("noisy", 3, 3, 0, "MATRIX_LR 0.04 -> 0.08")]
        (verdict, control, difference), = base.execute(
            "SELECT verdict, control, difference_bpb FROM comparisons WHERE arm = 'wide'")
        assert (verdict, control, difference) == ("better", "base", pytest.approx(-0.003))
        assert base.execute("SELECT kind, text FROM flags").fetchall() == []
    base.close()


def test_terminal_shows_verdicts_arms_and_knobs_in_120_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, long = write_arms(tmp_path / "logs"), "w" * 90
    write_run(logs / f"{long}_s1", 1, 1.23, config={"knobs": {"num_layers": 10, "data_path": "d" * 150}})
    code, out, err = run(capsys, logs, "--control", "base")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 120
    rows = {line.split()[0]: line.split() for line in out.split("Against base\n")[1].split("\n\n")[0].splitlines()}
    assert rows["wide"][:7] == ["wide", "better", "3", "-0.00300", "-0.00325", "to", "-0.00275"]
    assert rows["noisy"][1:4] == ["underpowered", "3", "+0.00030"]
    assert re.search(r"^ +2  base \(control\) +3 of 3  1\.22720  0\.00082 +\+0\.00100  15,702,000 ", out, re.MULTILINE)
    assert re.search(r"^wide +MODEL_DIM +576 +512$", out, re.MULTILINE)
    assert "Against base: 1 better, 2 underpowered." in out


def test_without_a_control_nothing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, write_arms(tmp_path / "logs"))[1]
    assert "3 arms, no control named (--control ARM): nothing is compared." in out
    assert "Knobs that differ from wide" in out     # the best arm


def test_markdown_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, path = write_arms(tmp_path / "logs"), tmp_path / "report.md"
    write_run(logs / "wide_s4", 4, 1.22, config={"knobs": KNOBS["wide"]}, finished=False)
    assert run(capsys, logs, "--control", "base", "--markdown", path, "--title", "Widths")[0] == 0
    text = path.read_text()
    assert text.startswith("# Widths\n\n- **missing**: wide: n=3 of 4 seeds: wide_s4 (seed 4) unfinished: no summary.json;"
                           " last logged step 40 of 40\n")
    assert "| wide | better | 3 | -0.00300 | -0.00325 to -0.00275 |" in text
    assert len([line for line in text.splitlines() if re.match(r"\| \w+_s\d \|", line)]) == 10
    for line in (line for line in text.splitlines() if line.startswith("|---")):
        assert line.count("|") == text.splitlines()[text.splitlines().index(line) - 1].count("|")


# ----------------------------------------------------------------------------------------------------------------------
# Traps, each by its flag.
# ----------------------------------------------------------------------------------------------------------------------


def test_a_clean_study_has_no_flag(tmp_path: Path) -> None:
    assert flags_of(write_arms(tmp_path / "logs", ("base", "wide", "noisy", "same"))) == []


def test_one_configuration_under_two_names_is_flagged(tmp_path: Path) -> None:
    logs = write_arms(tmp_path / "logs", ("base",))
    path = write_run(logs / "alias_s1", 1, 1.2270, config={"knobs": {"log_dir": "elsewhere"}})
    (kind, text), = [flag for flag in flags_of(logs) if flag[0] != "missing"]
    assert kind == "same configuration"
    assert text == f"alias and base are one configuration ({runs.read_run(path).configuration}) under several names"


def test_one_name_for_two_configurations_is_flagged_with_what_differs(tmp_path: Path) -> None:
    logs = write_arms(tmp_path / "logs", ("base",))
    write_run(logs / "base_s4", 4, 1.2, config={"knobs": {"num_layers": 10}, "code_sha256": {"export.py": "d" * 64}})
    assert flags_of(logs) == [("mixed configuration", "base holds 2 configurations; base_s1 -> base_s4: NUM_LAYERS 9 -> 10,"
                                                      " export.py bbbbbbbb -> dddddddd")]


@pytest.mark.parametrize(("mixed", "text"), [
    (True, "the ranking mixes runs that followed the clock (wide) with runs of fixed steps (base)"),
    (False, "the runs followed the clock (MAX_WALLCLOCK_SECONDS), so the machine's speed is part of the result; rank on"
            " fixed steps")])
def test_timed_runs_are_flagged(tmp_path: Path, mixed: bool, text: str) -> None:
    for name, seconds in (("base", 0.0 if mixed else 600.0), ("wide", 600.0)):
        write_run(tmp_path / f"{name}_s1", 1, 1.2, config={"knobs": {"max_wallclock_seconds": seconds} | KNOBS[name]})
    assert flags_of(tmp_path) == [("timed", text)]


@pytest.mark.parametrize(("scored", "text"), [
    ({"tokens": 40_540_000}, "equal bytes, so val_bpb compares, losses a token do not"),
    ({"tokens": 40_540_000, "bytes": 99}, "not the same text, so val_bpb cannot be compared")])
def test_runs_scored_on_another_text_are_flagged(tmp_path: Path, scored: dict[str, int], text: str) -> None:
    write_run(tmp_path / "base_s1", 1, 1.2)
    write_run(tmp_path / "wide_s1", 1, 1.2, config={"knobs": KNOBS["wide"]}, summary={"roundtrip": scored})
    assert flags_of(tmp_path) == [("validation", f"scored on 62,021,846 tokens, 151,077,000 bytes (base); 40,540,000 tokens,"
                                                 f" {scored.get('bytes', 151_077_000):,} bytes (wide): {text}")]
    wide = next(arm for arm in study_of(tmp_path).arms if arm.name == "wide")
    assert wide.scored[0].gap_bpb is None       # before and after read different tokens


@pytest.mark.parametrize(("config", "text"), [
    ({"device": "device:cuda (H100)"}, "more than one device: device:cpu (x86_64) world_size:1 dtype:float32 compile:False"
                                       " (base); device:cuda (H100) (wide)"),
    ({"torch": "2.6.0"}, "more than one torch version: 2.13.0 (base); 2.6.0 (wide)")])
def test_several_machines_are_flagged(tmp_path: Path, config: dict[str, str], text: str) -> None:
    write_run(tmp_path / "base_s1", 1, 1.2)
    write_run(tmp_path / "wide_s1", 1, 1.2, config={"knobs": KNOBS["wide"], **config})
    assert flags_of(tmp_path) == [("machine", text)]


def test_repeated_runs_are_one_seed_and_flagged(tmp_path: Path) -> None:
    for name, bpb in (("a", 1.2000), ("b", 1.2004), ("c", 1.2000)):
        write_run(tmp_path / name / "base_s1", 1, bpb)
    write_run(tmp_path / "a" / "base_s2", 2, 1.3)
    study = arms.read_study([str(tmp_path / name) for name in "abc"], None, 0.0005, None)
    assert study.arms[0].by_seed == {1: pytest.approx(3.6004 / 3), 2: 1.3}
    assert [flag.text for flag in study.flags] == ["base: 3 runs of seed 1, val_bpb 0.0004 apart; their mean counts"]
    study = arms.read_study([str(tmp_path / name) for name in "ac"], None, 0.0005, None)
    assert study.arms[0].by_seed == {1: 1.2, 2: 1.3}
    assert [flag.text for flag in study.flags] == ["base: 2 runs of seed 1, repeated bit for bit"]


def scored_so(tmp_path: Path) -> Path:
    """Two arms by two seeds: wide is worse by the plain score, better by the sidecar's, which base lacks; one text."""
    texts = {"val_loss": 2.0, "tokens": 1000, "bytes": 2500, "seconds": 1.0}
    for seed in (1, 2):
        write_run(tmp_path / f"base_s{seed}", seed, 1.2 + seed / 100, summary={"eval_modes": {
            "sliding_window": texts | {"val_bpb": 1.19 + seed / 100}}})
        modes = {"sliding_window": texts | {"val_bpb": 1.3},
                 "sidecar": texts | {"val_bpb": 1.1 + seed / 100, "val_loss": 1.9}}
        write_run(tmp_path / f"wide_s{seed}", seed, 1.3, config={"knobs": KNOBS["wide"]}, summary={"eval_modes": modes})
    return tmp_path


def test_a_score_beside_the_plain_one_ranks_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = scored_so(tmp_path)
    assert [arm.name for arm in study_of(logs).arms] == ["base", "wide"]
    rows = [planned(f"{arm}_s{seed}", arm, seed) for arm in ("base", "wide") for seed in (1, 2)]
    ledger = write_ledger(logs, rows)
    ledger.write_text(json.dumps(json.loads(ledger.read_text()) | {"score": ["sidecar", "sliding_window"]}))
    study = study_of(ledger)
    assert [(arm.name, arm.by_seed) for arm in study.arms] == [
        ("wide", {1: 1.11, 2: 1.12}), ("base", {1: pytest.approx(1.2), 2: pytest.approx(1.21)})]
    assert [(flag.kind, flag.text) for flag in study.flags] == []
    assert study.arms[0].scored[0].gap_bpb == pytest.approx(0.001)         # the round trip is the plain score's
    assert run(capsys, ledger)[1].count("by the evaluation sidecar or else sliding_window") == 0
    run(capsys, ledger, "--markdown", tmp_path / "a.md", "--sqlite", tmp_path / "a.sqlite")
    assert "by the evaluation sidecar or else sliding_window where there is one" in (tmp_path / "a.md").read_text()
    with sqlite3.connect(tmp_path / "a.sqlite") as base:
        assert base.execute("SELECT val_bpb, val_loss FROM runs WHERE arm = 'wide' AND seed = 1").fetchall() == [(1.11, 1.9)]
    assert "1  base" in run(capsys, ledger, "--score", "")[1]
    ledger.write_text(json.dumps(json.loads(ledger.read_text()) | {"score": ["ttt", "sidecar"]}))       # no ttt so far
    assert [arm.by_seed[1] for arm in study_of(ledger).arms] == [1.11, 1.21]


@pytest.mark.parametrize(("arguments", "text"), [
    (["--score", "ttt"], "report.py: no run has the score ttt; beside the plain one there are sliding_window, sidecar"),
    (["--score", "sidecar,x"], "report.py: no run has the score x; beside the plain one there are sliding_window, sidecar")])
def test_a_score_that_no_run_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
                                            text: str) -> None:
    code, _, err = run(capsys, scored_so(tmp_path), *arguments)
    assert (code, err.strip()) == (2, text)


def test_ledgers_that_name_different_scores_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, paths = scored_so(tmp_path), []
    for name in ("sidecar", "sliding_window"):
        paths.append(logs / f"sweep_{name}.json")
        paths[-1].write_text(json.dumps({"control": None, "score": [name], "runs": [planned("wide_s1", "wide", 1)]}))
    assert "the ledgers name the scores" in run(capsys, *paths)[2]
    assert "choose one by --score NAME,..." in run(capsys, *paths)[2]
    assert "1.11" in run(capsys, *paths, "--score", "sidecar")[1]
    paths[0].write_text(json.dumps({"control": None, "score": "sidecar", "runs": []}))
    assert "score (a list of names, or none)" in run(capsys, paths[0])[2]


def test_over_cap_runs_are_ranked_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_arms(tmp_path / "logs", ("base", "wide"))
    out = run(capsys, logs, "--control", "base", "--cap", 15_752_999)[1]
    assert ("! over the cap: wide: 3 of 3 runs are over the cap, by up to 1 bytes: ranked, but no valid submission"
            in flat(out))
    assert re.search(r"^ +1  wide \(over the cap: 3 of 3\) ", out, re.MULTILINE)
    assert run(capsys, logs, "--control", "base", "--cap", 15_753_000)[1].startswith("Against base: 1 better.")
    write_run(logs / "wide_s4", 4, 1.2, config={"knobs": KNOBS["wide"]}, summary={"cap_bytes": 1_000_000})
    assert "wide: 1 of 4 runs are over the cap, by up to 14,753,000 bytes" in flat(run(capsys, logs)[1])
    assert "over the cap" not in run(capsys, logs, "--cap", 0)[1].split("Against")[0]


def test_bytes_at_the_step_floor_are_flagged(tmp_path: Path) -> None:
    write_run(tmp_path / "base_s1", 1, 1.2, summary={"floored_share": 0.9})
    assert [kind for kind, _ in flags_of(tmp_path)] == ["step floor"]


def test_runs_without_a_score_are_listed_with_the_reason(tmp_path: Path) -> None:
    logs = write_arms(tmp_path / "logs", ("base", "wide"))
    write_run(logs / "wide_s4", 4, 1.2, finished=False)
    write_run(logs / "wide_s5", 5, 1.2, summary={"roundtrip": None})
    write_run(logs / "wide_s6", 6, 1.2, summary={"roundtrip": {"val_bpb": math.nan}})
    write_run(logs / "base_s7", 7, 1.2)
    study = study_of(logs)
    assert study.comparisons["wide"].pairs == 3
    assert [flag.text for flag in study.flags] == [
        "wide: n=3 of 7 seeds: wide_s4 (seed 4) unfinished: no summary.json; last logged step 40 of 40;"
        " wide_s5 (seed 5) finished: its artifact was not evaluated (FINAL_ROUNDTRIP_EVAL=0);"
        " wide_s6 (seed 6) finished: val_bpb is nan; no run of the control's seed 7"]


# ----------------------------------------------------------------------------------------------------------------------
# Ledgers of sweeps.
# ----------------------------------------------------------------------------------------------------------------------


def test_a_ledger_names_arms_and_control_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_arms(tmp_path / "logs", ("base", "wide"))
    rows = [planned(f"{name}_s{seed}", f"arm {name}", seed) for name in ("base", "wide") for seed in (1, 2, 3)]
    rows[3]["state"] = "over_cap"
    rows += [planned("wide_s4", "arm wide", 4, "failed", "exit code 1:\n out of memory"),
             planned("base_s4", "arm base", 4, "pending"), planned("gone_s1", "arm gone", 1),
             planned("late_s1", "arm late", 1, "halted")]
    code, out, err = run(capsys, write_ledger(logs, rows, "arm base"), logs / "wide_s1")     # a folder twice counts once
    assert (code, err) == (0, "")
    assert [flat(flag) for flag in out.split("\n\n")[0].replace("\n    ", " ").splitlines()] == [
        "! missing: arm wide: n=3 of 4 seeds: wide_s4 (seed 4) failed: exit code 1: out of memory",
        "! missing: arm base: n=3 of 4 seeds: base_s4 (seed 4) pending",
        "! missing: arm gone: n=0 of 4 seeds: gone_s1 (seed 1) finished: its folder is not here; no run of the control's"
        " seeds 2, 3, 4",
        "! missing: arm late: n=0 of 4 seeds: late_s1 (seed 1) halted; no run of the control's seeds 2, 3, 4"]
    assert "Against arm base: 1 better, 2 underpowered." in out
    assert re.search(r"^ +1  arm wide +3 of 4 ", out, re.MULTILINE)


def test_two_arms_of_a_ledger_that_share_their_runs_are_both_ranked_and_flagged(tmp_path: Path) -> None:
    logs = write_arms(tmp_path / "logs", ("base",))
    rows = [planned(f"base_s{seed}", arm, seed) | {"arm": arm} for arm in ("base", "twin") for seed in (1, 2, 3)]
    path = write_ledger(logs, rows)
    assert [(arm.name, arm.n) for arm in study_of(path).arms] == [("base", 3), ("twin", 3)]
    assert [kind for kind, _ in flags_of(path)] == ["same configuration"]


def test_the_flag_chooses_another_control_than_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_arms(tmp_path / "logs", ("base", "wide"))
    rows = [planned(f"{name}_s{seed}", name, seed) for name in ("base", "wide") for seed in (1, 2, 3)]
    assert "Against wide: 1 worse." in run(capsys, write_ledger(logs, rows), "--control", "wide")[1]
    assert "no control named" in run(capsys, write_ledger(logs, rows, None))[1]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written.
# ----------------------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    before = sorted(os.listdir(folder))
    code, out, err = run(capsys, *arguments, "--markdown", folder / "out.md", "--sqlite", folder / "out.sqlite")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sorted(os.listdir(folder)) == before
    return err.removeprefix("report.py: ").removesuffix("\n")


def test_paths_without_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, tmp_path, tmp_path).startswith(f"{tmp_path} is no run and holds none: no config.json in it")
    (tmp_path / "text").write_text("once upon a time")
    assert refused(capsys, tmp_path, tmp_path / "text").startswith(f"{tmp_path / 'text'} cannot be read: Expecting value")


def test_an_unknown_control_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_arms(tmp_path / "logs", ("base", "wide"))
    assert refused(capsys, tmp_path, logs, "--control", "bass") == "control bass: no such arm; there are base, wide"


@pytest.mark.parametrize(("changes", "fault"), [
    ({"total_bytes": "many"}, "total_bytes is 'many', wanted a number of bytes"),
    ({"code_bytes": None}, "code_bytes is None, wanted a number of bytes"),
    ({"parts": [1]}, "parts must sum to artifact_bytes=15702000, got [1]"),
    ({"artifact_bytes": 5}, "parts must sum to artifact_bytes=5, got {'frame': 20"),
    ({"roundtrip": {"val_bpb": "low"}}, "roundtrip is {'val_loss'"),
    ({"pre_roundtrip": None}, "pre_roundtrip is None, wanted numbers val_loss, val_bpb, tokens, bytes"),
])
def test_strange_summaries_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any],
                                       fault: str) -> None:
    path = write_run(tmp_path / "base_s1", 1, 1.2) / "summary.json"
    path.write_text(json.dumps(merged(json.loads(path.read_text()), changes)))
    assert refused(capsys, tmp_path, tmp_path).startswith(f"{path}: {fault}")


def test_strange_metrics_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "base_s1", 1, 1.2) / "metrics.jsonl"
    path.write_text('{"kind": "val", "step": 1}\n')
    assert refused(capsys, tmp_path, tmp_path, "--html", tmp_path / "out.html") == (
        f'{path}: a val row is {{"kind": "val", "step": 1}}, wanted step and val_bpb')


@pytest.mark.parametrize(("ledger", "fault"), [
    ({"runs": {}}, "is no sweep's ledger: wanted an object with control (an arm or null), runs (a list)"),
    ({"control": 5, "runs": []}, "is no sweep's ledger: wanted an object with control (an arm or null), runs (a list)"),
    ({"runs": [{"run_id": "x"}]}, ': run 0 of the ledger is {"run_id": "x"}, wanted run_id (str), arm (str), seed (int)'),
    ({"runs": [planned("x", "a", 1, "lost")]}, ": run x has the state 'lost', wanted one of finished, over_cap, failed,"),
    ({"runs": [planned("base_s1", "a", 2)]}, ": run base_s1 has seed 2, its config.json says 1"),
])
def test_strange_ledgers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], ledger: Any, fault: str) -> None:
    write_run(tmp_path / "base_s1", 1, 1.2)
    path = tmp_path / "sweep_x.json"
    path.write_text(json.dumps(ledger))
    assert refused(capsys, tmp_path, path).startswith(f"{path}{'' if fault.startswith(':') else ' '}{fault}")


def test_unprintable_names_and_rival_controls_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_ledger(tmp_path, [planned("x", "a\x1b[2J", 1, "pending")], None)
    assert refused(capsys, tmp_path, path) == "run 'x' of arm 'a\\x1b[2J': names must be of printable characters"
    paths = []
    for control in ("a", "b"):
        (tmp_path / control).mkdir()
        paths.append(write_ledger(tmp_path / control, [planned("x", control, 1, "pending")], control))
    assert refused(capsys, tmp_path, *paths) == "the ledgers name the controls a, b; choose one by --control ARM"


@pytest.mark.parametrize(("arguments", "fault"), [
    ([], "report.py: the following arguments are required: PATH"),
    (["x", "--smallest-effect", "0"], "report.py: argument --smallest-effect: wanted bits per byte above 0, got '0'"),
    (["x", "--smallest-effect", "nan"], "report.py: argument --smallest-effect: wanted bits per byte above 0, got 'nan'"),
    (["x", "--cap", "16MB"], "report.py: argument --cap: wanted a number of bytes, got '16MB'"),
])
def test_wrong_command_lines_end_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], fault: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert (stopped.value.code, *capsys.readouterr()) == (2, "", f"{fault}\n")


@pytest.mark.parametrize(("package", "line"), [("scipy", "the report needs scipy: pip install scipy"),
                                               ("matplotlib", "--html needs matplotlib: pip install matplotlib")])
def test_missing_packages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                    package: str, line: str) -> None:
    find = report.importlib.util.find_spec
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    logs = write_arms(tmp_path / "logs", ("base",))
    assert refused(capsys, tmp_path, logs, "--html", tmp_path / "out.html") == line


# ----------------------------------------------------------------------------------------------------------------------
# Real runs, and the page in a real browser.
# ----------------------------------------------------------------------------------------------------------------------


def test_real_runs_have_the_keys_of_the_folders_written_here(
    tmp_path: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {"VAL_LOSS_EVERY": "2"}
    for arm, rate in (("a", "0.04"), ("b", "0.08")):
        assert train_gpt.main(env | {"MATRIX_LR": rate, "SEED": "1", "RUN_ID": f"{arm}_s1", "NUM_LAYERS": "2"}) == 0
    capsys.readouterr()
    logs, path = tmp_path / "logs", tmp_path / "report.sqlite"
    code, out, err = run(capsys, logs, "--control", "a", "--sqlite", path)
    assert (code, err) == (0, "")
    assert re.search(r"^b +MATRIX_LR +0\.08 +0\.04$", out, re.MULTILINE)
    with sqlite3.connect(path) as base:
        for run_id, bpb, total in base.execute("SELECT run_id, val_bpb, total_bytes FROM runs"):
            summary = json.loads((logs / run_id / "summary.json").read_text())
            assert (bpb, total) == (summary["roundtrip"]["val_bpb"], summary["total_bytes"])
    base.close()
    written = write_run(tmp_path / "written", 1, 1.2)
    for name in ("config.json", "summary.json"):
        real, ours = (json.loads((folder / name).read_text()) for folder in (logs / "a_s1", written))
        assert real.keys() == ours.keys()
        assert real.get("knobs", {}).keys() == ours.get("knobs", {}).keys()
    for kind in arms.METRICS:
        real, ours = (runs.read_metrics(folder, kind)[0] for folder in (logs / "a_s1", written))
        assert real.keys() == ours.keys()


EVIL = "<script>document.title='taken'<∕script> $x$ & \"q\""

PROBE = """(() => {
  const rows = id => [...document.querySelectorAll(`#${id} tbody tr`)].map(row => [...row.cells].map(c => c.textContent));
  const column = (id, i) => rows(id).map(row => row[i]);
  const head = [...document.querySelectorAll("#arm-table thead button")].find(b => b.textContent === "val_bpb");
  const before = column("arm-table", 1);
  head.click(); const up = column("arm-table", 3);
  head.click(); const down = column("arm-table", 3);
  return {title: document.title, verdicts: rows("verdict-table"), before, up, down,
          sorted: head.parentNode.getAttribute("aria-sort"), runs: rows("run-table").length,
          flags: [...document.querySelectorAll(".flags li")].map(li => li.textContent),
          sections: [...document.querySelectorAll("section")].map(s => s.id),
          plots: [...document.querySelectorAll("figure")].map(f => f.id),
          alts: [...document.querySelectorAll("figure svg")].map(s => s.getAttribute("aria-label")),
          tall: [...document.querySelectorAll("figure svg")].every(s => s.getBoundingClientRect().height > 100),
          ids: [...document.querySelectorAll("[id]")].map(e => e.id)};
})()"""
FITS = "[document.documentElement.scrollWidth, innerWidth, getComputedStyle(document.body).backgroundColor]"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every verdict, flags and a hostile name; report.md, report.sqlite and logs lie beside it."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("page")
    logs = write_arms(folder / "logs", ("base", "wide", "noisy", "same"))
    write_run(logs / f"{EVIL}_s1", 1, 1.3, config={"knobs": {"num_layers": 12}}, summary={"cap_bytes": 1_000_000})
    write_all(logs, folder)
    return folder / "report.html"


def write_all(logs: Path, folder: Path) -> None:
    flags = [text for kind in ("html", "markdown", "sqlite") for text in (f"--{kind}", str(folder / f"report.{kind}"))]
    assert report.main([str(logs), "--control", "base", *flags]) == 0


def test_equal_inputs_give_equal_bytes(page: Path, tmp_path: Path) -> None:
    write_all(page.parent / "logs", tmp_path)
    for name in ("report.html", "report.markdown", "report.sqlite"):
        assert (tmp_path / name).read_bytes() == (page.parent / name).read_bytes()
    assert page.stat().st_size < 1_000_000


def test_the_page_works_in_a_browser(page: Path, tmp_path: Path) -> None:
    """One start: rows, flags, plots, sorting, escaping, no request, no error, no sideways scrolling on a phone, themes."""
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser on PATH: one of {', '.join(browser.NAMES)}")
    with browser.Browser(program, tmp_path / "profile") as seen:
        seen.open(page)
        found, looks = seen.evaluate(PROBE), []
        for width_px, scheme in ((390, "light"), (1280, "light"), (1280, "dark")):
            seen.look(width_px, scheme)
            looks.append(seen.evaluate(FITS))
        requests = [event["request"]["url"] for event in seen.heard("Network.requestWillBeSent")]
        faults = [seen.heard(method) for method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert faults == [[], [], []]
    assert found["title"] == "Report"
    assert [row[:4] for row in found["verdicts"]] == [
        ["wide", "better", "3", "-0.00300"], ["same", "no effect", "3", "+0.00000"],
        ["noisy", "underpowered", "3", "+0.00030"], [EVIL, "underpowered", "1", "+0.07300"]]
    assert found["before"][:2] == ["wide", "base (control)"]
    assert found["up"] == sorted(found["up"])
    assert found["down"] == found["up"][::-1]
    assert (found["sorted"], found["runs"]) == ("descending", 13)
    assert [flag.split(":")[0] for flag in found["flags"]] == ["missing", "over the cap"]
    assert EVIL in found["flags"][0]
    assert found["sections"] == ["verdicts", "flags", "plots", "all-runs", "computed"]
    assert found["plots"] == [f"plot-{name}" for name in ("differences", "frontier", "losses", "gaps", "parts")]
    assert all("wide" in alt and EVIL in alt for alt in found["alts"])
    assert found["tall"]
    assert len(set(found["ids"])) == len(found["ids"])
    for (inner, outer, _), width_px in zip(looks, (390, 1280, 1280), strict=True):
        assert inner <= outer == width_px
    assert looks[1][2] != looks[2][2]


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    """As text, where there is no browser: no address but the names of SVG's own vocabularies, no date."""
    text = page.read_text()
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert re.findall(r"(?:src|href)=\"(?!#|data:,)[^\"]*", text) == []
    assert "<script>document" not in text
    assert not re.search(r"\d{4}-\d\d-\d\dT", text)
