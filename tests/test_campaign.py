"""Campaigns: arms that branch off one trunk, scored under several exports.

Guarantees: an arm leaves its trunk at the branch and nowhere else; scores are those of files; a repeated call trains nothing
twice; the table holds paired differences; a specification that cannot work is refused in one line.
Run: bash scripts/test.sh tests/test_campaign.py (about 15 s).
"""
from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TinyData, tiny_knobs

import campaign
import train_gpt

SPEC = """
name = "t"
seeds = [1, 2]
control = "plain"
branch = 2
calibration_tokens = 512
val_tokens = 512
[knobs]
{knobs}
COMPRESSION_REG_INTERVAL = 1
[exports.int8]
INT8_KEEP_FLOAT_MAX_NUMEL = 200
[exports.rd2]
EXPORT_SCHEME = "rd"
EXPORT_BITS = [2, 2.1]
TCQ_STATES = 8
[arms.plain]
[arms.ternary]
INT8_KEEP_FLOAT_MAX_NUMEL = 200
TERNARY_REG_WEIGHT = 50
[arms.freeze]
EXPORT_SCHEME = "rd"
EXPORT_BITS = 2.05
TCQ_STATES = 8
CALIBRATION_TOKENS = 512
FINISH_STEPS = 4
[frozen]
freeze = "rd2"
"""


@pytest.fixture
def spec(tmp_path: Path, tiny_data: TinyData) -> Path:
    knobs = tiny_knobs(tiny_data, tmp_path) | {"TRAIN_LOG_EVERY": "1"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in knobs.items() if name != "RUN_ID"]
    path = tmp_path / "t.toml"
    path.write_text(SPEC.format(knobs="\n".join(lines)))
    return path


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train_loss"] for row in rows if row["kind"] == "train"}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains and scores here, in the main thread, which saves six starts of Python."""
    def run(command: list[str], env: Mapping[str, str], **_: Any) -> None:
        code = campaign.main(command[2:]) if command[2:3] == ["score"] else train_gpt.main(env)
        if code:
            raise subprocess.CalledProcessError(code, command)

    monkeypatch.setattr(campaign.subprocess, "run", run)
    monkeypatch.setattr(campaign, "ThreadPoolExecutor", lambda _: nullcontext(SimpleNamespace(map=map)))


@pytest.mark.usefixtures("in_this_process")
def test_arms_branch_off_their_trunk_and_are_scored_once(spec, tmp_path, capsys):
    assert campaign.main(["run", str(spec), "--seeds", "1"]) == 0
    trunk, arm = (tmp_path / "logs" / f"t_{name}_s1" for name in ("plain", "ternary"))
    assert sorted(losses(trunk)) == [1, 2, 3, 4]
    assert sorted(losses(arm)) == [3, 4]                            # the first two steps are the trunk's
    assert losses(arm)[3] == losses(trunk)[3]                       # of the same weights
    assert losses(arm)[4] != losses(trunk)[4]
    scores = json.loads((arm / "scores.json").read_text())
    assert list(scores) == ["float", "int8", "rd2"]
    assert 0 < scores["rd2"]["bytes"] < scores["int8"]["bytes"]
    assert len(scores["rd2"]["files"]) == 2
    assert scores["rd2"]["val_bpb"] == pytest.approx(sum(scores["rd2"]["files"]) / 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("logs/*/*") if path.name != "campaign.out"}
    assert campaign.main(["run", str(spec), "--seeds", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    assert campaign.main(["table", str(spec)]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["arm", "n", "float", "int8", "rd2"]
    control = json.loads((trunk / "scores.json").read_text())
    assert rows[3][:2] == ["ternary", "1"]
    for text, name in zip(rows[3][2:], ("float", "int8", "rd2"), strict=True):
        assert text.startswith(f"{1000 * (scores[name]['val_bpb'] - control[name]['val_bpb']):+.1f}")
    folder = tmp_path / "logs" / "t_freeze_s1"      # scored by the file that it wrote
    frozen = json.loads((folder / "scores.json").read_text())
    assert list(frozen) == ["float", "rd2"]
    assert frozen["rd2"]["bytes"] == (folder / "final_model.rd.anlm").stat().st_size
    assert frozen["rd2"]["val_bpb"] == pytest.approx(frozen["float"]["val_bpb"], abs=1e-3)
    assert rows[4][0] == "freeze"
    assert [bool(cell) for cell in rows[4][2:]] == [True, False, True]      # nothing under other exports


@pytest.mark.parametrize(("old", "new", "message"), [
    ('freeze = "rd2"', "", "arm freeze: [frozen] must name those that have FINISH_STEPS under EXPORT_SCHEME=rd"),
    ('freeze = "rd2"', 'freeze = "rd9"', "[frozen] freeze = 'rd9': no such arm, or no such export"),
    ('control = "plain"', 'control = "none"', "control 'none' is no arm"),
    ("TERNARY_REG_WEIGHT = 50", "TERNARY_REG_WEIGHT = -1", "arm ternary: TERNARY_REG_WEIGHT must be at least 0, got -1"),
    ("EXPORT_BITS = [2, 2.1]", "EXPORT_BITS = [2, 20]", "export rd2: EXPORT_BITS must be at most 9, got 20"),
    ("val_tokens = 512", "", "KeyError: 'val_tokens'"),
    ("name =", "name", "Decode"),
])
def test_a_specification_that_cannot_work_is_refused_in_one_line(spec, capsys, old, new, message):
    spec.write_text(spec.read_text().replace(old, new))
    with pytest.raises(SystemExit) as ended:
        campaign.main(["table", str(spec)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("flag", [["--only", "nobody"], ["--seeds", "9"]])
def test_an_unknown_arm_or_seed_is_refused(spec, capsys, flag):
    with pytest.raises(SystemExit):
        campaign.main(["table", str(spec), *flag])
    assert f"has no {flag[1]}; these are: " in capsys.readouterr().err
