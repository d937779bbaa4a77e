"""Guarantees of scripts/pack_submission.py: what it writes scores what its logs say, and what cannot be shown is refused.

    bash scripts/test.sh tests/test_submission.py
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyData, tiny_knobs

import pack_submission
import packing
import train_gpt
from runs import read_run

SEEDS = (1337, 1338, 1339)
ABOUT = ["--name", "A tiny test", "--author", "A. Name", "--github-id", "name", "--blurb", "As small as it gets."]
Edit = Callable[[Path, dict[str, Any], dict[str, Any]], object]     # folder, config and summary of a run


@pytest.fixture(scope="module")
def trained(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """logs/ with three finished runs, which scored their artifacts in two more ways."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in SEEDS:
        env = tiny_knobs(tiny_data, folder) | {"SEED": str(seed), "RUN_ID": f"tiny_s{seed}", "ITERATIONS": "2",
                                                 "EVAL_STRIDE": "16", "EVAL_MIX_LEARN": "1"}
        assert train_gpt.main(env) == 0
    return folder / "logs"


@pytest.fixture
def logs(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "logs"))


def edit(folder: Path, change: Edit) -> None:
    """Applies a change to config.json and summary.json of a run."""
    read = {name: json.loads((folder / name).read_text()) for name in ("config.json", "summary.json")}
    change(folder, read["config.json"], read["summary.json"])
    for name, value in read.items():
        (folder / name).write_text(json.dumps(value))


def pack(logs: Path, *arguments: str) -> int:
    return pack_submission.main([str(logs), "-o", str(logs.parent / "out"), *ABOUT, *arguments])


# ----------------------------------------------------------------------------------------------------------------------
# The folder.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def submission(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("records")
    record = parent.parent / "submission.json"
    record.write_text(json.dumps({"val_bpb": 9.0, "seed_results": {"1": {"val_bpb": 9.0}, "2": {"val_bpb": 9.2}}}))
    asked = ["-o", str(parent / "out"), *ABOUT, "--against", str(record), "--score", "sidecar"]
    assert pack_submission.main([str(trained), *asked]) == 0
    assert os.listdir(parent) == ["out"]
    return parent / "out"


def test_the_folder_holds_what_the_challenge_asks_for_and_its_numbers_are_the_runs(submission: Path, trained: Path) -> None:
    assert sorted(os.listdir(submission)) == sorted([
        "README.md", "final_model.int8.ptz", "requirements.txt", "submission.json", "train_gpt.py",
        *(f"train_seed{seed}.log" for seed in SEEDS)])
    runs = {seed: trained / f"tiny_s{seed}" for seed in SEEDS}
    for seed, run in runs.items():
        assert (submission / f"train_seed{seed}.log").read_bytes() == (run / "train.log").read_bytes()
    assert (submission / "final_model.int8.ptz").read_bytes() == (runs[1337] / "final_model.int8.ptz").read_bytes()
    facts = json.loads((submission / "submission.json").read_text())
    found = [json.loads((run / "summary.json").read_text()) for run in runs.values()]
    scores = [summary["eval_modes"]["sidecar"]["val_bpb"] for summary in found]
    assert all(score < summary["roundtrip"]["val_bpb"] for score, summary in zip(scores, found, strict=True))
    mean = sum(scores) / 3
    assert facts["val_bpb"] == pytest.approx(mean, abs=1e-8)
    assert facts["val_bpb_std"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 2), abs=1e-8)
    assert (facts["author"], facts["github_id"], facts["track"]) == ("A. Name", "name", "10min_16mb")
    assert facts["seeds"] == list(SEEDS)
    code = (submission / "train_gpt.py").stat().st_size
    assert facts["bytes_code"] == code == found[0]["code_bytes"]
    assert facts["evaluation"] == "sidecar"
    assert facts["bytes_total"] == max((run / "final_model.int8.ptz").stat().st_size for run in runs.values()) + code
    assert facts["verification"]["tolerance_bpb"] == 0.0
    assert f"{facts['verification']['val_bpb']:.8f}" == f"{scores[0]:.8f}"
    readme = (submission / "README.md").read_text()
    for seed, score in zip(SEEDS, scores, strict=True):
        assert f"| {seed} | {score:.8f} |" in readme
    assert f"p = {facts['comparison']['p_value']}" in readme
    assert "NUM_LAYERS=3" in readme
    assert str(trained.parent) not in readme
    packages = re.findall(r"^([\w-]+)", (submission / "requirements.txt").read_text(), re.MULTILINE)
    assert {"torch", "numpy", "sentencepiece", "zlib-ng", "safetensors", "tqdm"} <= set(packages)
    assert not {"python-minifier", "huggingface_hub", "scipy", "pytest"} & set(packages)


def test_the_readmes_command_scores_the_artifact(submission: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    shutil.copytree(submission, tmp_path / "judge")
    command = re.findall(r"```bash\n(.*?)```", (submission / "README.md").read_text(), re.DOTALL)[1]
    command = re.sub(r"DATA_PATH=\S+", f"DATA_PATH={tiny_data.folder}", command)
    command = re.sub(r"TOKENIZER_PATH=\S+", f"TOKENIZER_PATH={tiny_data.tokenizer}", command)
    command = command.replace("python train_gpt.py", f"{sys.executable} train_gpt.py")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path / "judge", text=True, capture_output=True, check=False,
                          env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    exact = [line for line in (submission / "train_seed1337.log").read_text().splitlines() if "_sidecar_exact" in line]
    assert done.stdout.splitlines()[-1:] == exact


def test_fewer_seeds_are_no_record(logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checked = {"val_bpb": 1.0, "device": "x", "tolerance_bpb": 0.001, "network": "not at all"}
    monkeypatch.setattr(pack_submission, "verify", lambda folder, run: checked)
    shutil.rmtree(logs / "tiny_s1337")
    shutil.rmtree(logs / "tiny_s1339")
    assert pack(logs, "--allow-fewer-seeds", "--against", "9.0,9.1") == 0
    facts = json.loads((logs.parent / "out" / "submission.json").read_text())
    assert (facts["track"], facts["seeds"], facts["val_bpb_std"]) == ("non-record-16mb", [1338], None)
    assert facts["comparison"]["p_value"] is None
    assert not facts["comparison"]["meets_record_rule"]
    assert "track:non-record-16mb" in capsys.readouterr().out
    assert "within 0.001 of its log, on another machine: x" in (logs.parent / "out" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: one for each way in which runs can be wrong.
# ----------------------------------------------------------------------------------------------------------------------


def spoil_log(folder: Path, old: str, new: str) -> None:
    text = (folder / "train.log").read_text()
    assert old in text
    (folder / "train.log").write_text(text.replace(old, new))


SPOILED: dict[str, tuple[Edit, str]] = {
    "no score": (lambda f, c, s: s.update(roundtrip=None), "not finished: it scored no artifact, FINAL_ROUNDTRIP_EVAL=0"),
    "other code": (lambda f, c, s: c["code_sha256"].update({"export.py": "0" * 64}),
                   r"ran other code: export.py was 000000000000 and is [0-9a-f]{12} \(sha256\); check out the version"),
    "other knobs": (lambda f, c, s: c["knobs"].update(unheard_of=1), r"has other knobs or files than this version"),
    "another configuration": (lambda f, c, s: c["knobs"].update(matrix_lr=0.5),
                              r"are of two configurations: MATRIX_LR 0\.04 and 0\.5"),
    "other data": (lambda f, c, s: c.update(train_tokens=7), r"two configurations: the same knobs, but other code or data"),
    "the same seed": (lambda f, c, s: c["knobs"].update(seed=1337), r"tiny_s1339 has seed 1337, as .*tiny_s1337"),
    "another count": (lambda f, c, s: s.update(code_bytes=39_999), r"counted 39999 bytes of code, packed here they are \d+"),
    "too large": (lambda f, c, s: s.update(artifact_bytes=16_000_000), r"16000000 \+ code \d+ = \d+ bytes, the cap is"),
    "another artifact": (lambda f, c, s: (f / s["artifact"]).write_bytes(b"12"), "final_model.int8.ptz has 2 bytes, sum"),
    "no artifact": (lambda f, c, s: (f / s["artifact"]).unlink(), r"final_model.int8.ptz has no bytes, sum"),
    "part of the data": (lambda f, c, s: c["knobs"].update(val_max_tokens=64), r"VAL_MAX_TOKENS scored a part of the valid"),
    "a map": (lambda f, c, s: c["knobs"].update(sensitivity_map="m"), r"SENSITIVITY_MAP is a file beside the counted bytes"),
    "too long": (lambda f, c, s: s["seconds"].update(train=590.0, calibrate=20.0), "trained 610 s, track 10min_16mb allows"),
    "too slow": (lambda f, c, s: s["seconds"].update(roundtrip=700.0), r"evaluated 700 s, track 10min_16mb allows 600"),
    "too slow by modes": (lambda f, c, s: s["seconds"].update(roundtrip=300.0, eval_modes=301.0), "evaluated 601 s, track"),
    "no machine": (lambda f, c, s: c.update(device="an abacus"), r"config.json has device 'an abacus', not a run's"),
    "another score": (lambda f, c, s: s["roundtrip"].update(val_bpb=1.25), "json makes it .final_int8.* val_bpb:1.25000000"),
    "a log's code": (lambda f, c, s: spoil_log(f, "Code size: ", "Code size: 1"), r"found 'Code size: 1\d+ bytes \(pack"),
    "a log's total": (lambda f, c, s: spoil_log(f, "submission size int8+zlib: ", "submission size int8+zlib: 1"),
                      r"found 'Total submission size int8\+zlib: 1\d+ bytes', summary.json makes it"),
    "a log's artifact": (lambda f, c, s: spoil_log(f, "Serialized model int8+zlib: ", "Serialized model int8+zlib: 1"),
                         r"found 'Serialized model int8\+zlib: 1\d+ bytes .*, summary.json makes it"),
    "no log": (lambda f, c, s: (f / "train.log").unlink(), "train.log: found 'no such line', summary.json makes it 'fi"),
}


def assert_refused(logs: Path, message: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    before = sorted(os.listdir(logs.parent))
    capsys.readouterr()
    assert pack(logs, *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert all(line.startswith("error: ") for line in error.splitlines())
    assert sorted(os.listdir(logs.parent)) == before


@pytest.mark.parametrize("fault", SPOILED)
def test_what_the_files_contradict_is_refused(fault: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = SPOILED[fault]
    edit(logs / "tiny_s1339", change)
    assert_refused(logs, message, capsys)


def test_an_unfinished_run_is_refused(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs / "tiny_s1338" / "summary.json").unlink()
    assert_refused(logs, r"tiny_s1338 is not finished: it has no summary\.json", capsys)


def test_a_score_that_no_run_has_is_refused(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(logs, "--score", "ttt") == 2
    assert capsys.readouterr().err.count("has no score ttt; its eval_modes are: sliding_window, sidecar") == 3


def test_missing_seeds_are_refused(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(logs / "tiny_s1338")
    assert_refused(logs, r"2 seeds \(1337, 1339\), a record needs 3; --allow-fewer-seeds packs", capsys)


def test_a_cap_of_the_runs_own_holds(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in SEEDS:
        edit(logs / f"tiny_s{seed}", lambda f, c, s: c["knobs"].update(artifact_cap_bytes=40_000))
    assert_refused(logs, r"= \d+ bytes, the cap is 40000", capsys)


def test_an_existing_folder_is_left_alone(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs.parent / "out").mkdir()
    assert_refused(logs, r"out exists; choose another -o or remove it", capsys)


def test_a_folder_is_not_made_for_the_output(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(logs, r"there is no folder .*nowhere to write it in", capsys, "-o", str(logs / "nowhere" / "out"))


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    assert_refused(tmp_path / "logs", r"is no run and holds none", capsys)


def test_what_cannot_be_verified_is_not_written(logs: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    size = json.loads((logs / "tiny_s1337" / "summary.json").read_text())["code_bytes"]
    code = b"print('error: no trainer');raise SystemExit(1)".ljust(size)
    monkeypatch.setattr(packing, "packed_code", lambda sources: code)
    assert_refused(logs, r"the packed file cannot train a step, exit code 1: error: no trainer", capsys)


def test_a_run_of_the_packed_file_itself_is_accepted(logs: Path) -> None:
    folder = logs / "tiny_s1337"
    packed = packing.packed_code(train_gpt.source_files(train_gpt.Config(**read_run(folder).knobs)))
    edit(folder, lambda f, c, s: c.update(code_sha256={"train_gpt.py": hashlib.sha256(packed).hexdigest()}))
    assert pack_submission.code_of(read_run(folder)).packed == packed


HERE = "device:cpu (x86_64) world_size:1 dtype:float32 compile:False"
LINE = "final_rd_roundtrip_exact val_loss:{} val_bpb:{}\n"


@pytest.mark.parametrize(("said", "device", "message"), [
    (LINE.format("2.00000001", "1.20000000"), HERE, r"val_loss:2\.00000000 val_bpb:1\.20000000; wanted it to all digits"),
    (LINE.format("2.00000000", "1.20000001"), HERE, "wanted it to all digits, on the same device"),
    (LINE.format("2.00000000", "1.20100100"), HERE.replace("cpu", "cuda:0"), "wanted it within 0.001, on device:cuda:0"),
    ("final_rd_roundtrip val_loss:2.0000 val_bpb:1.2000\n", HERE, "scored no artifact"),
])
def test_another_score_is_refused(said: str, device: str, message: str) -> None:
    run = pack_submission.Run(Path("logs/a"), {"device": HERE}, {
        "roundtrip": {"val_loss": 2.0, "val_bpb": 1.2}, "export_scheme": "rd"}, None)
    with pytest.raises(pack_submission.Refused, match=message):
        pack_submission.verdict(run, said, device)
    for loss, bpb, where, tolerance in (("2.00000000", "1.20000000", HERE, 0.0), ("2.1", "1.2009", "elsewhere", 0.001)):
        found = pack_submission.verdict(run, said + LINE.format(loss, bpb), where)
        assert found == {"val_bpb": float(bpb), "device": where, "tolerance_bpb": tolerance}


def test_verification_takes_the_runs_ranks_where_the_machine_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_submission.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(pack_submission.torch.cuda, "is_available", lambda: True)
    for device, ranks, wanted in (("cpu", 2, ("cpu", 2)), ("cuda:0", 2, ("cuda", 2)), ("cuda:0", 8, ("cuda", 1))):
        config = {"device": f"device:{device} (a b (c)) world_size:{ranks} dtype:bfloat16 compile:True"}
        run = pack_submission.Run(Path("logs/a"), config, None, None)
        assert pack_submission.machine_for(run) == wanted
        assert pack_submission.description(run)[1] == "a b (c)"


# ----------------------------------------------------------------------------------------------------------------------
# The network.
# ----------------------------------------------------------------------------------------------------------------------

CONNECT = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), timeout=5).close()
for attempt in (lambda: socket.create_connection(("192.0.2.1", 9), timeout=5), lambda: socket.getaddrinfo("host.invalid", 9),
                lambda: socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5).close()):
    try:
        attempt()
        print("through")
    except TimeoutError:
        print("timed out")
    except OSError as error:
        print("refused", error)
"""


@pytest.mark.parametrize("how", ["network_cut", "with_guard"])
def test_the_verified_program_reaches_this_host_alone(how: str, tmp_path: Path) -> None:
    cut, variables, words = getattr(pack_submission, how)(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as outside:
        start = cut([sys.executable, "-c", CONNECT, str(outside.getsockname()[1])])
        run = subprocess.run(start, text=True, capture_output=True, check=True, env={"PATH": os.environ["PATH"]} | variables)
    far, unknown, near = run.stdout.splitlines()
    assert far.startswith("refused")
    assert unknown.startswith("refused")
    assert near.startswith("refused") == ("namespace of its own" in words)
    assert ("the network is off: socket." in far) == ("audit hook" in words)


# ----------------------------------------------------------------------------------------------------------------------
# Against a record.
# ----------------------------------------------------------------------------------------------------------------------


def runs_of(scores: list[float]) -> list[pack_submission.Run]:
    """Runs of a tokenizer with 2 nats a token for each bit a byte."""
    return [pack_submission.Run(Path(f"logs/{i}"), {}, {"roundtrip": {"val_bpb": bpb, "val_loss": 2 * bpb}}, None)
            for i, bpb in enumerate(scores)]


def test_the_p_value_is_welchs_of_an_improvement_beyond_the_margin() -> None:
    ours, record = [1.058, 1.060, 1.059], [1.065, 1.068, 1.066, 1.067]
    found = pack_submission.compare(runs_of(ours), record)
    assert found["margin_bpb"] == 0.0025
    assert found["improvement_bpb"] == pytest.approx(0.0075)
    # By hand: variances 1e-6 of 3 and 5/3 e-6 of 4; t = 0.005 / sqrt(1e-6/3 + 1.25e-6/3), 4.9592 degrees of freedom.
    t, df = 0.005 / math.sqrt(0.75e-6), 0.75e-6**2 / ((1e-6 / 3)**2 / 2 + (1.25e-6 / 3)**2 / 3)
    density = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    tail = sum((1 + (t + (i + 0.5) / 1000) ** 2 / df) ** (-(df + 1) / 2) for i in range(400_000)) / 1000
    assert found["p_value"] == pytest.approx(density * tail, rel=1e-3)
    assert found["meets_record_rule"]


@pytest.mark.parametrize(("ours", "record", "test", "meets"), [
    ([1.0575, 1.0585], [1.0600, 1.0610], "Welch's t-test, one-sided", False),       # better by exactly the margin: p = 1/2
    ([1.0499, 1.0500, 1.0501], [1.0600], "one-sample t-test, one-sided, because the record is one number", True),
    ([1.0600, 1.0601, 1.0602], [1.0500], "one-sample t-test, one-sided, because the record is one number", False),
])
def test_the_margin_must_be_beaten(ours: list[float], record: list[float], test: str, meets: bool) -> None:
    found = pack_submission.compare(runs_of(ours), record)
    assert (found["test"], found["meets_record_rule"]) == (test, meets)
    if len(record) > 1:
        assert found["p_value"] == pytest.approx(0.5, abs=1e-6)


def test_a_record_is_read_as_numbers_or_as_the_challenge_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    seeds = '{"val_bpb": 1.06, "seed_results": {"42": {"val_bpb": 1.05}, "0": {"val_bpb": 1.07}}}'
    for text, wanted in ((seeds, [1.05, 1.07]), ('{"val_bpb": 1.2243657}', [1.2243657])):
        path.write_text(text)
        assert pack_submission.read_record(str(path)) == wanted
    assert pack_submission.read_record("1.0599,1.0613") == [1.0599, 1.0613]


@pytest.mark.parametrize("content", ["", "[1.0]", '{"val_bpb": null}', '{"seed_results": {"1": {}}}', "no file", "numbers"])
def test_a_record_that_cannot_be_read_is_refused(content: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = logs.parent / "record.json"
    if content != "no file":
        path.write_text(content)
    source = "1.06;1.07" if content == "numbers" else str(path)
    assert_refused(logs, r"--against .*: wanted a record's submission\.json with val_bpb, or numbers with commas", capsys,
                   "--against", source)


def test_a_score_that_is_none_is_refused(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(logs, r"val_bpb must be above 0, found \[1\.06, -1\.0\]", capsys, "--against", "1.06,-1")
