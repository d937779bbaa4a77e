"""Sweeps: a specification becomes exactly the runs it names, each once, whatever is killed on the way.

    bash scripts/test.sh tests/test_sweep.py

The scheduler's tests put a stand-in in the trainer's place that writes a run's files and fails as it is told; what the
trainer itself must keep (a shared training gives the same bytes) is tested with the trainer.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TinyData, tiny_knobs

import recipe
import runs
import sweep
import sweep_spec
import train_gpt

# What a stand-in does is chosen by its MATRIX_LR in LOG_DIR/acts.json: exit codes of its attempts, val_bpb by step, pause.
STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
logs, name = Path(os.environ["LOG_DIR"]), os.environ["RUN_ID"]
folder, act = logs / name, json.loads((logs / "acts.json").read_text()).get(os.environ["MATRIX_LR"], {})
def note(word):
    with (logs / "events").open("a") as f:
        f.write(f"{word} {name} {os.environ['RESUME']} {os.environ.get('OMP_NUM_THREADS')}\\n")
def stop(number, frame):
    (folder / "checkpoint").write_text("here")
    note("stopped")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
note("start")
attempt = len([line for line in (logs / "events").read_text().splitlines() if line.startswith("start " + name)])
bpb = act.get("bpb", {"1": 2.0})
(folder / "config.json").write_text(json.dumps({"knobs": {"seed": int(os.environ["SEED"]), "max_wallclock_seconds": 0,
                                                           "iterations": 4}, "code_sha256": {}}))
for step, value in bpb.items():
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"kind": "val", "step": int(step), "val_loss": 1.0, "val_bpb": value}) + "\\n")
    for _ in range(int(act.get("pause_s", 0.02) * 50)):
        time.sleep(0.02)
note("end")
code = (act.get("exits", []) + [0] * attempt)[attempt - 1]
if code < 0:
    os.kill(os.getpid(), -code)
if code in (0, 3):
    (folder / "summary.json").write_text(json.dumps({
        "pre_roundtrip": {"val_bpb": value}, "roundtrip": {"val_bpb": value}, "artifact_bytes": 9, "total_bytes": 10,
        "under_cap": code == 0, "step": 4, "seconds": {"train": 1.0},
        "eval_modes": {name: {"val_bpb": bpb} for name, bpb in act.get("modes", {}).items()}}))
sys.exit(code)
"""


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(own)}" for key, own in value.items()) + "}"
    return json.dumps(value)


CODE_DIGEST = lru_cache(sweep_spec.code_digest)        # reading all sources takes most of a second


@pytest.fixture
def place(tmp_path: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a sweep over tiny data, with nothing of ours in the environment and the stand-in as the trainer."""
    for name in list(os.environ):
        if name in {f.upper() for f in train_gpt.Config.__dataclass_fields__}:
            monkeypatch.delenv(name)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "acts.json").write_text("{}")
    monkeypatch.setattr(sweep, "TRAINER", tmp_path / "stand_in.py")
    monkeypatch.setattr(sweep, "POLL_S", 0.02)
    monkeypatch.setattr(sweep_spec, "code_digest", CODE_DIGEST)
    knobs = {name: value for name, value in tiny_knobs(tiny_data, tmp_path).items() if name not in ("RUN_ID",)}
    (tmp_path / "tiny.env").write_text("SEED=7\n" + "".join(f"{name}={value}\n" for name, value in knobs.items()))
    return tmp_path


def write_spec(place: Path, **keys: Any) -> Path:
    path = place / "spec.toml"
    spec = {"name": "t", "base": "tiny.env", "seeds": [1, 2], **keys}
    path.write_text("".join(f"{key} = {inline(value)}\n" for key, value in spec.items()))
    return path


LRS = {"arms": {"a": {"MATRIX_LR": 0.01}, "b": {"MATRIX_LR": 0.02}, "c": {"MATRIX_LR": 0.03}}}


def act(place: Path, **acts: dict[str, Any]) -> None:
    """How the runs of each arm of LRS behave."""
    lr_of = {arm: str(knobs["MATRIX_LR"]) for arm, knobs in LRS["arms"].items()}
    (place / "logs" / "acts.json").write_text(json.dumps({lr_of[arm]: behaviour for arm, behaviour in acts.items()}))


def events(place: Path, word: str = "start") -> list[str]:
    """The arms whose runs noted this word, in order."""
    path = place / "logs" / "events"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line.split()[1].split("_s")[0] for line in lines if line.startswith(f"{word} ")]


def ledger(place: Path) -> dict[tuple[str, int], dict[str, Any]]:
    rows = json.loads((place / "logs" / "sweep_t.json").read_text())["runs"]
    return {(row["arm"], row["seed"]): row for row in rows}


def states(place: Path) -> Counter[str]:
    return Counter(row["state"] for row in ledger(place).values())


# ----------------------------------------------------------------------------------------------------------------------
# From a file to arms.
# ----------------------------------------------------------------------------------------------------------------------


def arms_of(place: Path, *extra: str, **keys: Any) -> dict[str, dict[str, str]]:
    spec = sweep_spec.read_spec(write_spec(place, **keys), dict(e.split("=") for e in extra), {})
    base = recipe.read_recipe(place / "tiny.env")       # whose seed no arm takes over
    assert all("SEED" not in knobs for knobs in spec.arms.values())
    return {arm: {k: v for k, v in knobs.items() if base.get(k) != v} for arm, knobs in spec.arms.items()}


def test_a_grid_is_every_combination_in_order(place: Path):
    assert arms_of(place, arms={"plain": {}}, grid={"MLP_MULT": [2, 3], "TIE_EMBEDDINGS": [True, False]}) == {
        "plain": {},
        "mlp_mult=2,tie_embeddings=1": {"MLP_MULT": "2", "TIE_EMBEDDINGS": "1"},
        "mlp_mult=2,tie_embeddings=0": {"MLP_MULT": "2", "TIE_EMBEDDINGS": "0"},
        "mlp_mult=3,tie_embeddings=1": {"MLP_MULT": "3", "TIE_EMBEDDINGS": "1"},
        "mlp_mult=3,tie_embeddings=0": {"MLP_MULT": "3", "TIE_EMBEDDINGS": "0"},
    }


def test_knobs_win_over_the_recipe_arms_over_both_and_arguments_over_all(place: Path):
    found = arms_of(place, "QK_GAIN_INIT=3", knobs={"ITERATIONS": 8, "MATRIX_LR": 0.5, "QK_GAIN_INIT": 2.0},
                    arms={"a": {"MATRIX_LR": 0.25}})
    assert found == {"a": {"ITERATIONS": "8", "MATRIX_LR": "0.25", "QK_GAIN_INIT": "3"}}


def test_places_of_the_environment_win_over_the_recipe_alone(place: Path):
    spec = write_spec(place, knobs={"DEVICE": "cpu"}, arms={"a": {}})
    knobs = sweep_spec.read_spec(spec, {}, {"DATA_PATH": "here", "DEVICE": "cuda", "MLP_MULT": "3"}).arms["a"]
    assert (knobs["DATA_PATH"], knobs["DEVICE"], "MLP_MULT" in knobs) == ("here", "cpu", False)


def test_random_draws_lie_where_they_should_and_depend_on_their_seed_alone(place: Path):
    def drawn(seed: int) -> list[dict[str, str]]:
        knobs = {"MATRIX_LR": {"low": 0.01, "high": 1.0, "log": True}, "MLP_MULT": {"low": 1, "high": 4},
                 "BETA1": {"low": 0.8, "high": 0.9}, "SDP_BACKEND": ["auto", "math"]}
        return list(arms_of(place, random={"draws": 400, "seed": seed, "knobs": knobs}).values())

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    lrs = [float(arm["MATRIX_LR"]) for arm in first]
    assert all(0.01 <= lr <= 1 for lr in lrs)
    assert 0.4 < sum(lr < 0.1 for lr in lrs) / len(lrs) < 0.6          # a decade each: log-uniform
    assert {arm.get("MLP_MULT", "2") for arm in first} == {"1", "2", "3", "4"}
    assert all(0.8 <= float(arm["BETA1"]) <= 0.9 for arm in first)
    assert {arm.get("SDP_BACKEND", "auto") for arm in first} == {"auto", "math"}


@pytest.mark.parametrize(("keys", "message"), [
    ({"arms": {}}, "no arm: give [arms.NAME] tables, a [grid] or [random] draws"),
    ({"seed": [1]}, "seed is no key of a sweep; these are: name, track, base"),
    ({"seeds": [1, 1]}, "seeds must be whole numbers, each once, got [1, 1]"),
    ({"seeds": 3}, "seeds must be a list, got 3"),
    ({"name": "../x"}, "name must be letters, digits, '_', '-' or '.', got '../x'"),
    ({"base": "nowhere"}, "recipe nowhere: no such file, and none of scripts/recipes/"),
    ({"control": "z"}, "control 'z' is no arm; these are: a, b, c"),
    ({"threads": 0}, "threads must be at least 1, got 0"),
    ({"score": ["sidecar", 1]}, "score must hold names, got ['sidecar', 1]"),
    ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ({"repeats": 2, "share_training": True}, "repeats would share one training, and show nothing"),
    ({"retries": -1}, "retries must be at least 0, got -1"),
    ({"grid": {"MLP_MULT": 2}}, "[grid] MLP_MULT must be a list of values, got 2"),
    ({"knobs": {"MLP_MULT": [2]}}, "MLP_MULT must be a number, a word or a truth value, got [2]"),
    ({"random": {"draws": 0}}, "[random] must have draws (at least 1)"),
    ({"random": {"draws": 1, "knobs": {"BETA1": {"low": 0, "high": 1, "log": True}}}},
     "BETA1 must be a list of values or {low, high"),
    ({"stop": {"rungs": [0]}}, "[stop] must have rungs (steps), keep (between 0 and 1) and at_least (2 or more)"),
])
def test_a_faulty_file_is_refused_by_name(place: Path, keys: dict[str, Any], message: str,
                                          capsys: pytest.CaptureFixture[str]):
    assert sweep.main([str(write_spec(place, **(LRS | keys)))]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith(f"sweep.py: {place / 'spec.toml'}: ")
    assert not events(place)


@pytest.mark.parametrize(("keys", "message"), [
    ({"arms": {"a": {"MATRIX_LRR": 1}}}, "arm a: MATRIX_LRR is not a knob of this version, did you mean MATRIX_LR?"),
    ({"arms": {"a": {"SEED": 1}}}, "arm a: SEED is not for a sweep, leave it out"),
    ({"arms": {"a": {"MODEL_DIM": 33}}}, "arm a: MODEL_DIM=33 must be NUM_HEADS=4 times an even head width"),
    ({"arms": {"a": {"ARTIFACT_CAP_BYTES": 1000}}}, "OVER THE CAP"),
    ({"arms": {"a": {"DATA_PATH": "nowhere"}}}, "arm a: no fineweb_train_*.bin"),
    ({"arms": {"a": {"LOG_DIR": "elsewhere"}}}, "all arms must have one LOG_DIR, got "),
    ({"stop": {"rungs": [2]}}, "[stop] rungs [2] must be multiples of VAL_LOSS_EVERY=0 below ITERATIONS=4"),
    ({"share_training": True, "knobs": {"MAX_WALLCLOCK_SECONDS": 5}}, "share_training needs fixed steps"),
    ({"share_training": True, "knobs": {"CHECKPOINT_EVERY": 3}}, "CHECKPOINT_EVERY=3 must divide ITERATIONS=4"),
])
def test_faults_of_any_arm_are_found_before_the_first_run(place: Path, keys: dict[str, Any], message: str,
                                                         capsys: pytest.CaptureFixture[str]):
    good = {"arms": {"good": {}, **keys.get("arms", {})}}
    assert sweep.main([str(write_spec(place, **(LRS | keys | good)))]) == 2
    assert message in capsys.readouterr().err
    assert not events(place)


def test_knobs_of_the_environment_are_refused_but_for_places(place: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("ITERATIONS", "9")
    monkeypatch.setenv("DEVICE", "cpu")
    assert sweep.main([str(write_spec(place, **LRS))]) == 2
    assert capsys.readouterr().err.startswith("sweep.py: ITERATIONS=9 is set in the environment, from which a sweep takes"
                                              " DATA_PATH, TOKENIZER_PATH, LOG_DIR, DEVICE alone")


SPECS = sorted((ROOT / "scripts" / "specs").glob("*.toml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_arms_of_a_shipped_sweep_have_no_fault(path: Path):
    spec = sweep_spec.read_spec(path, {}, {})
    assert spec.name == path.stem
    assert spec.control in spec.arms
    assert {problem for knobs in spec.arms.values() for problem in train_gpt.Config.parse(knobs)[1]} == set()


def test_the_users_sweeps_are_shipped():
    wanted = {"residual_budget", "iso_byte_shapes", "width_depth", "compression_outlier", "grid_refinement", "scale"}
    assert wanted | {"ternary", "sidecar"} <= {path.stem for path in SPECS}


# ----------------------------------------------------------------------------------------------------------------------
# Identity.
# ----------------------------------------------------------------------------------------------------------------------


def identities(place: Path, **keys: Any) -> dict[tuple[str, int], str]:
    planned = sweep_spec.plan(sweep_spec.read_spec(write_spec(place, **keys), {}, {}), {})
    return {(run.arm, run.seed): run.identity for run in planned}


def test_what_decides_a_result_changes_the_identity_and_nothing_else_does(place: Path, tiny_data: TinyData):
    same = {"a": {}, "kept": {"CHECKPOINT_EVERY": 2}, "logged": {"TRAIN_LOG_EVERY": 1},
            "elsewhere": {"DATA_PATH": str(place / "copy")}, "spelled_out": {"MATRIX_LR": 0.04, "DEVICE": "auto"}}
    (place / "copy").symlink_to(tiny_data.folder)
    other = {"lr": {"MATRIX_LR": 0.01}, "export": {"WEIGHT_QUANTIZATION_BITS": 6}, "dtype": {"COMPUTE_DTYPE": "bfloat16"}}
    found = identities(place, arms=same | other)
    assert len({found[arm, 1] for arm in same}) == 1
    assert len({found[arm, 1] for arm in ("a", *other)}) == 4
    assert len(set(found.values())) == 8                                    # both seeds
    assert not set(found.values()) & set(identities(place, arms=same | other, threads=2).values())


def test_another_tokenizer_or_shard_changes_the_identity(place: Path, tiny_data: TinyData):
    tokenizer = tiny_data.tokenizer
    before = sweep_spec.data_digest(str(tiny_data.folder), str(tokenizer))
    assert before == sweep_spec.data_digest(str(tiny_data.folder), str(tokenizer))
    copy = place / "data"
    copy.mkdir()
    for path in tiny_data.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert sweep_spec.data_digest(str(copy), str(tokenizer)) == before
    (copy / "fineweb_train_000001.bin").write_bytes(b"longer" * 400)
    assert sweep_spec.data_digest(str(copy), str(tokenizer)) != before
    (place / "t.model").write_bytes(tokenizer.read_bytes() + b"\0")
    assert sweep_spec.data_digest(str(tiny_data.folder), str(place / "t.model")) != before


def test_the_code_counts_without_its_comments_and_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "scripts").mkdir()
    sources = {"train_gpt.py": "import export\nx = 1\n", "export.py": "y = 2\n", "scripts/tool.py": "import deep\n",
               "scripts/deep.py": "z = 3\n", "scripts/unrelated.py": "q = 4\n"}
    monkeypatch.setattr(sweep_spec, "ROOT", tmp_path)

    def digest(*tools: str, **changes: str) -> str:
        for name, text in (sources | {k.replace("__", "/") + ".py": v for k, v in changes.items()}).items():
            (tmp_path / name).write_text(text)
        return sweep_spec.code_digest(tools)

    plain, with_tool = digest(), digest("tool")
    assert plain != with_tool
    assert digest(export='"""Why."""\ny = 2  # two\n') == plain
    assert digest(scripts__unrelated="q = 5\n") == plain
    assert digest(export="y = 3\n") != plain
    assert digest("tool", scripts__deep="z = 4\n") != with_tool


def test_one_configuration_under_two_names_runs_once_and_is_said(place: Path, capsys: pytest.CaptureFixture[str]):
    spec = write_spec(place, arms={"a": {"MATRIX_LR": 0.01}, "twin": {"MATRIX_LR": 0.01}})
    assert sweep.main([str(spec)]) == 0
    assert "warning: arms a and twin are the same configuration; it runs once" in capsys.readouterr().out
    assert events(place) == ["a", "a"]
    assert {key: row["state"] for key, row in ledger(place).items()} == dict.fromkeys(
        [("a", 1), ("twin", 1), ("a", 2), ("twin", 2)], "finished")


def test_repeats_are_runs_of_their_own_of_one_configuration(place: Path):
    assert sweep.main([str(write_spec(place, arms={"a": {"MATRIX_LR": 0.01}}, seeds=[1]))]) == 0
    assert sweep.main([str(write_spec(place, arms={"a": {"MATRIX_LR": 0.01}}, seeds=[1], repeats=3))]) == 0
    assert events(place) == ["a"] * 3                           # the first was there
    rows = json.loads((place / "logs" / "sweep_t.json").read_text())["runs"]
    assert len({row["run_id"] for row in rows}) == 3
    assert len({runs.read_run(place / "logs" / row["folder"]).configuration for row in rows}) == 1


def test_arms_that_end_by_the_clock_are_warned_of(place: Path, capsys: pytest.CaptureFixture[str]):
    spec = write_spec(place, arms={"a": {}, "timed": {"MAX_WALLCLOCK_SECONDS": 5}})
    assert sweep.main([str(spec), "--dry-run"]) == 0
    assert "warning: 1 of 2 arms end by the clock (MAX_WALLCLOCK_SECONDS)" in capsys.readouterr().out
    assert not events(place)


# ----------------------------------------------------------------------------------------------------------------------
# Running: each run once, whatever is killed.
# ----------------------------------------------------------------------------------------------------------------------


def test_every_run_runs_once_with_no_more_at_a_time_than_slots(place: Path, capsys: pytest.CaptureFixture[str]):
    act(place, a={"pause_s": 0.2}, b={"pause_s": 0.2}, c={"pause_s": 0.2})
    spec = write_spec(place, threads=3, **LRS)
    assert sweep.main([str(spec), "--slots", "2"]) == 0
    assert sorted(events(place)) == ["a", "a", "b", "b", "c", "c"] == sorted(events(place, "end"))
    together, most = 0, 0
    for line in (place / "logs" / "events").read_text().splitlines():
        together += 1 if line.startswith("start") else -1
        most = max(most, together)
        assert line.endswith(" auto 3")                         # RESUME, OMP_NUM_THREADS
    assert most == 2
    assert states(place) == {"finished": 6}
    out = capsys.readouterr().out
    assert "\x1b" not in out                                    # no terminal, no drawing
    assert out.count("finished val_bpb:2.00000 bytes:10 train:1s") == 6


def test_finished_runs_are_skipped_by_any_later_sweep(place: Path):
    assert sweep.main([str(write_spec(place, **LRS))]) == 0
    assert sweep.main([str(write_spec(place, **LRS))]) == 0
    assert len(events(place)) == 6
    renamed = {"other": {"MATRIX_LR": 0.02}, "new": {"MATRIX_LR": 0.09}}
    assert sweep.main([str(write_spec(place, arms=renamed))]) == 0
    assert sorted(events(place)[6:]) == ["new", "new"]
    assert ledger(place)["other", 1]["run_id"].startswith("b_s1_")          # the folder that has the result


def test_a_crash_is_tried_again_and_marked(place: Path):
    act(place, a={"exits": [-9, 0]}, b={"exits": [1, 1, 0]}, c={"exits": [3]})
    spec = write_spec(place, **LRS)
    assert sweep.main([str(spec)]) == 1
    assert states(place) == {"finished": 2, "failed": 2, "over_cap": 2}
    assert Counter(events(place)) == {"a": 4, "b": 4, "c": 2}
    rows = ledger(place)
    assert rows["a", 1]["note"] == "crashed 1 times (exit -9)"
    assert rows["b", 2]["note"].startswith("crashed 2 times (exit 1, 1); see ")
    assert sweep.main([str(spec)]) == 1                         # failed runs stay failed
    assert len(events(place)) == 10
    assert sweep.main([str(spec), "--retry-failed"]) == 0
    assert states(place) == {"finished": 4, "over_cap": 2}


def start_sweep(place: Path, spec: Path, *arguments: str) -> subprocess.Popen[str]:
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import sweep; from pathlib import Path;"
            f"sweep.TRAINER = Path({str(place / 'stand_in.py')!r}); sweep.POLL_S = 0.02; sys.exit(sweep.main(sys.argv[1:]))")
    return subprocess.Popen([sys.executable, "-c", code, str(spec), *arguments], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sweep_killed_outright_leaves_its_runs_to_the_next_call(place: Path, capsys: pytest.CaptureFixture[str]):
    act(place, a={"pause_s": 3.0})
    spec = write_spec(place, **(LRS | {"seeds": [1]}))
    process = start_sweep(place, spec, "--slots", "1")
    wait_for(lambda: events(place) == ["a"])
    process.kill()
    process.wait()
    assert sweep.main([str(spec), "--slots", "1"]) == 0
    assert "a seed 1: still running from an earlier call, waiting for it" in capsys.readouterr().out
    assert sorted(events(place)) == ["a", "b", "c"]                 # a was not started twice
    assert events(place, "end")[0] == "a"                           # and its slot stayed its own
    assert states(place) == {"finished": 3}


def test_a_stopped_sweep_stops_its_runs_in_good_order_and_goes_on_later(place: Path):
    act(place, a={"pause_s": 30.0}, b={"pause_s": 30.0})
    spec = write_spec(place, **(LRS | {"seeds": [1]}))
    process = start_sweep(place, spec, "--slots", "2")
    wait_for(lambda: sorted(events(place)) == ["a", "b"])
    assert sweep.main([str(spec)]) == 2                             # two calls at a time would fill the slots twice
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert sorted(events(place, "stopped")) == ["a", "b"]           # each had the time for its checkpoint
    assert states(place) == {"pending": 3}
    assert "the same command goes on from there" in (process.stdout.read() if process.stdout else "")
    act(place)
    assert sweep.main([str(spec)]) == 0
    assert states(place) == {"finished": 3}                         # being stopped is no crash


def test_runs_killed_with_their_sweep_start_again(place: Path):
    act(place, a={"pause_s": 30.0})
    spec = write_spec(place, **(LRS | {"seeds": [1]}))
    process = start_sweep(place, spec, "--slots", "1")
    wait_for(lambda: events(place) == ["a"])
    record = next((place / "logs").glob("a_s1_*/sweep.json"))
    wait_for(lambda: json.loads(record.read_text())["attempts"][0]["pid"] is not None)
    process.kill()
    os.kill(json.loads(record.read_text())["attempts"][0]["pid"], signal.SIGKILL)
    process.wait()
    act(place)
    assert sweep.main([str(spec)]) == 0
    assert sorted(events(place)) == ["a", "a", "b", "c"]
    assert [a["ended"] == "unknown" for a in json.loads(record.read_text())["attempts"]] == [True, False]


def test_hopeless_runs_are_halted_at_a_rung_but_never_the_control(place: Path):
    def losses(first: float) -> dict[str, Any]:
        return {"bpb": {"1": first, "2": first - 0.5, "3": first - 1}, "pause_s": 1.0}

    act(place, a=losses(3.9), b=losses(3.1), c=losses(3.2))
    arms = LRS["arms"] | {"d": {"MATRIX_LR": 0.04}}
    acts = json.loads((place / "logs" / "acts.json").read_text()) | {"0.04": losses(3.8)}
    (place / "logs" / "acts.json").write_text(json.dumps(acts))
    spec = write_spec(place, arms=arms, control="a", knobs={"VAL_LOSS_EVERY": 1},
                      stop={"rungs": [1, 2], "keep": 0.5, "at_least": 4}, seeds=[1])
    assert sweep.main([str(spec), "--slots", "4"]) == 0
    rows = ledger(place)
    assert {arm: row["state"] for (arm, _), row in rows.items()} == {
        "a": "finished", "b": "finished", "c": "finished", "d": "halted"}
    assert rows["d", 1]["note"] == "step 1: val_bpb 3.8000 is number 3 of 4"
    assert events(place, "stopped") == ["d"]
    assert sweep.main([str(spec)]) == 0
    assert len(events(place)) == 4                              # halted stays halted


def test_each_gpu_takes_one_run(place: Path, monkeypatch: pytest.MonkeyPatch):
    def slots(kind: str, gpus: str = "", slots: int = 0) -> tuple[list[str], bool]:
        return sweep.slots_for(argparse.Namespace(gpus=gpus, slots=slots), spec, {kind})

    spec = sweep_spec.read_spec(write_spec(place, **LRS), {}, {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert slots("cuda") == (["4", "6", "7"], True)
    assert slots("cuda", gpus="6") == (["6"], True)
    with pytest.raises(sweep_spec.SpecError, match="this machine has no GPU 5; it has 4, 6, 7"):
        slots("cuda", gpus="5,6")
    with pytest.raises(sweep_spec.SpecError, match="--slots is for CPU"):
        slots("cuda", slots=2)
    with pytest.raises(sweep_spec.SpecError, match="--gpus: the runs compute on cpu"):
        slots("cpu", gpus="0")
    job = sweep.Sweep(spec, sweep_spec.plan(spec, {}), ["6"], True, lambda line: None)
    assert job.environment(job.planned[0], "6")["CUDA_VISIBLE_DEVICES"] == "6"


def test_the_table_lists_counts_runs_under_way_and_arms_by_their_mean(place: Path):
    act(place, a={"bpb": {"1": 3.0}}, b={"bpb": {"1": 2.5}}, c={"exits": [1, 1]})
    spec = sweep_spec.read_spec(write_spec(place, **LRS), {}, {})
    job = sweep.Sweep(spec, sweep_spec.plan(spec, {}), ["x"], False, lambda line: None)
    while job.step():
        time.sleep(0.02)
    assert sweep.table(job) == [
        "", "sweep t: 4 finished, 2 failed", "  2.50000 val_bpb, n=2  b", "  3.00000 val_bpb, n=2  a"]


def test_a_terminal_gets_a_table_that_replaces_itself(place: Path):
    import pty

    act(place, a={"pause_s": 0.5}, b={"pause_s": 0.5}, c={"pause_s": 0.5})
    spec, (ours, theirs) = write_spec(place, **(LRS | {"seeds": [1]})), pty.openpty()
    with os.fdopen(theirs, "w") as out:
        screen = sweep.Screen(out)
        plan = sweep_spec.read_spec(spec, {}, {})
        job = sweep.Sweep(plan, sweep_spec.plan(plan, {}), ["x", "y", "z"], False, screen.say)
        assert sweep.carry_out(job, screen) == 0
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "sweep t: 3 running" in text
    assert "\x1b[5A\r\x1b[J" in text                            # up over an empty line, the counts and three runs


def test_arms_are_ranked_by_the_score_that_the_file_names(place: Path, capsys: pytest.CaptureFixture[str]):
    act(place, a={"bpb": {"4": 1.5}}, b={"bpb": {"4": 1.6}, "modes": {"x": 1.4}}, c={"bpb": {"4": 1.2}, "modes": {"x": 1.7}})
    assert sweep.main([str(write_spec(place, score=["y", "x"], seeds=[1], **LRS))]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"(\d\.\d{5}) val_bpb, n=1  (\w)", out)[-3:] == [("1.40000", "b"), ("1.50000", "a"), ("1.70000", "c")]
    assert " b seed 1: finished val_bpb:1.40000 bytes:10 " in out
    assert json.loads((place / "logs" / "sweep_t.json").read_text())["score"] == ["y", "x"]


# ----------------------------------------------------------------------------------------------------------------------
# With the trainer itself.
# ----------------------------------------------------------------------------------------------------------------------


def test_runs_that_share_a_training_get_the_same_bytes_as_if_they_had_trained(place: Path, monkeypatch: pytest.MonkeyPatch,
                                                                              capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sweep, "TRAINER", ROOT / "train_gpt.py")
    arms = {"eight": {}, "four": {"WEIGHT_QUANTIZATION_BITS": 4, "INT8_KEEP_FLOAT_MAX_NUMEL": 0, "INT8_RESIDUAL_RANK": 1}}
    shared, apart = place / "logs", place / "apart"
    spec = write_spec(place, seeds=[1], share_training=True, arms=arms)
    assert sweep.main([str(spec), "--slots", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("trained already") == 1
    text = (place / "tiny.env").read_text().replace(str(shared), str(apart))
    (place / "tiny.env").write_text(text)
    assert sweep.main([str(write_spec(place, seeds=[1], arms={"four": arms["four"]}))]) == 0
    found = [runs.read_run(next(logs.glob("four_s1_*"))) for logs in (shared, apart)]
    assert found[0].folder.name == found[1].folder.name
    assert found[0].configuration == found[1].configuration
    assert found[0].score == found[1].score | {"seconds": found[0].score["seconds"]}
    files = [(run.folder / "final_model.int8.ptz").read_bytes() for run in found]
    assert files[0] == files[1]
    assert math.isfinite(found[0].score["val_bpb"])
    assert [list((run.folder / "checkpoints").iterdir()) for run in found] == [[], []]     # the leader alone keeps one
