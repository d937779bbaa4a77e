"""Guarantees of whole runs: parity with the challenge's baseline, the round trip, resumption, stops, refusals, submissions.

    bash scripts/test.sh tests/test_run.py

The golden losses were recorded from the challenge's baseline trainer on CPU (only its device lines changed) with the same
seed, shards, knobs and micro-batches; its data is the formula in `formula_tokens`, or the real FineWeb tokens of CORPUS_DIR.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import export_verbs
import train_gpt

ROOT = Path(train_gpt.__file__).parent

BASELINE_FLOAT32 = (
    5.562379, 5.771084, 5.903475, 5.955106, 5.90413, 5.744579, 5.667221, 5.603103, 5.535041, 5.478978, 5.451352, 5.431488,
    5.429409, 5.378269, 5.31389, 5.257613, 5.154694, 5.092008, 4.95386, 4.854751, 4.744285, 4.589101, 4.453923, 4.343914,
    4.207175, 4.112185, 4.032579, 3.936469, 3.882254, 3.876788, 3.796945, 3.744068, 3.674764, 3.58387, 3.549486, 3.49144,
    3.456017, 3.408154, 3.367526, 3.359843,
)
BASELINE_BFLOAT16 = (
    5.562381, 5.77308, 5.90399, 5.955347, 5.904795, 5.744301, 5.666476, 5.600581, 5.534942, 5.477958, 5.45156, 5.431548,
    5.430678, 5.380866, 5.3171, 5.260643, 5.157551, 5.096362, 4.954982, 4.85626,
)

BASELINE_FINEWEB = (   # 4 layers x 128, 8,192 tokens a step, sequences of 256, no warmdown
    6.93474, 7.12234, 6.80583, 6.59272, 6.43176, 6.29576, 5.93608, 5.93099, 5.78098, 5.99631,
)


def formula_tokens(count: int, start: int) -> np.ndarray:
    """A skewed, slightly repetitive stream of ids below 260 with BOS every 97 tokens."""
    i = np.arange(start, start + count, dtype=np.uint64)
    x = (i * np.uint64(2654435761) % np.uint64(2**32)) >> np.uint64(16)
    y = i // np.uint64(5) * np.uint64(40503) % np.uint64(65536)
    tokens = (4 + ((x * x >> np.uint64(24)) + (y >> np.uint64(10))) % 256).astype("<u2")
    tokens[::97] = 1
    return tokens


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, tokens.size
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "fineweb_train_000000.bin", formula_tokens(60_000, 0))
    write_shard(folder / "fineweb_val_000000.bin", formula_tokens(4_097, 1_000_000))
    config = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}
    (folder / "byte260.json").write_text(json.dumps({"tokenizer_type": "pure_byte", "config": config, "vocab_size": 260}))
    return folder


@pytest.fixture
def env(data: Path, tmp_path: Path) -> dict[str, str]:
    """The golden runs' knobs; a step takes some 30 ms."""
    digest = hashlib.sha256((data / "byte260.json").read_bytes()).hexdigest()
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": digest}}))
    return {
        "DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "byte260.json"), "VOCAB_SIZE": "260", "LOG_DIR": str(tmp_path),
        "RUN_ID": "run", "DEVICE": "cpu", "ITERATIONS": "40", "WARMUP_STEPS": "0", "TRAIN_BATCH_TOKENS": "2048",
        "TRAIN_SEQ_LEN": "64", "NUM_LAYERS": "4", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
        "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "VAL_BATCH_SIZE": "8192", "WARMDOWN_ITERS": "20",
        "TRAIN_LOG_EVERY": "1",
    }


def metrics(env: dict[str, str], kind: str = "train") -> list[dict]:
    path = Path(env["LOG_DIR"]) / env["RUN_ID"] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["kind"] == kind]


def losses(env: dict[str, str]) -> list[tuple[int, float]]:
    return [(row["step"], row["train_loss"]) for row in metrics(env)]


def summary(env: dict[str, str]) -> dict:
    return json.loads((Path(env["LOG_DIR"]) / env["RUN_ID"] / "summary.json").read_text())


def outputs(env: dict[str, str]) -> Path:
    return Path(env["LOG_DIR"]) / env["RUN_ID"]


def code_bytes(env: dict[str, str]) -> int:
    """What the code of such a run weighs, the tools that it needs included."""
    return train_gpt.code_bytes(train_gpt.Config.parse(env)[0])


def start(env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")], env=bare_environment() | env, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


def bare_environment() -> dict[str, str]:
    """What a process needs to start, and no knob."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1"}


def wait_for_step(env: dict[str, str], step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(s >= step for s, _ in losses(env)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- parity with the challenge's baseline -------------------------------------------------------------------------------


@pytest.mark.parametrize(("knobs", "golden", "val_loss", "tolerance"), [
    ({"MUON_DTYPE": "bfloat16"}, BASELINE_FLOAT32, 3.328970, 5e-4),
    ({"COMPUTE_DTYPE": "bfloat16", "ITERATIONS": "20", "WARMDOWN_ITERS": "0"}, BASELINE_BFLOAT16, None, 5e-3),    # its half
])
def test_the_loss_curve_is_the_baselines(env, knobs, golden, val_loss, tolerance):
    env |= knobs
    assert train_gpt.main(env) == 0
    found = [loss for _, loss in losses(env)]
    assert found[:20] == pytest.approx(golden[:20], abs=tolerance)
    assert found == pytest.approx(golden, abs=4 * tolerance)
    if val_loss:
        assert summary(env)["pre_roundtrip"]["val_loss"] == pytest.approx(val_loss, abs=2 * tolerance)


def test_on_real_fineweb_the_loss_curve_is_the_baselines(env, tmp_path, corpus_dir):
    tokens = train_gpt.read_shard(corpus_dir / "fineweb_mini_sp1024" / "fineweb_val_000000.bin")
    write_shard(tmp_path / "fineweb_val_000000.bin", np.asarray(tokens[:131_073]))
    (tmp_path / "fineweb_train_000000.bin").symlink_to(corpus_dir / "fineweb_mini_sp1024" / "fineweb_train_000000.bin")
    env |= {
        "DATA_PATH": str(tmp_path), "TOKENIZER_PATH": str(corpus_dir / "tokenizers" / "fineweb_1024_bpe.model"),
        "VOCAB_SIZE": "1024", "TRAIN_BATCH_TOKENS": "8192", "TRAIN_SEQ_LEN": "256", "MODEL_DIM": "128",
        "WARMDOWN_ITERS": "0", "VAL_BATCH_SIZE": "524288", "VAL_MAX_TOKENS": "256", "FINAL_ROUNDTRIP_EVAL": "0",
        "ITERATIONS": str(len(BASELINE_FINEWEB)),
    }
    assert train_gpt.main(env) == 0
    assert [loss for _, loss in losses(env)] == pytest.approx(BASELINE_FINEWEB, abs=5e-3)


# --- one run, from shards to the score of the file ----------------------------------------------------------------------


def test_a_run_scores_the_file_that_it_wrote(env, capfd):
    env |= {"ITERATIONS": "12", "SAVE_RAW_CHECKPOINT": "1"}
    assert train_gpt.main(env) == 0
    log, found, folder = (outputs(env) / "train.log").read_text(), summary(env), outputs(env)
    for line in (
        r"^step:12/12 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
        r"^step:12/12 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
        r"^peak memory allocated: \d+ MiB reserved: \d+ MiB$",
        r"^Serialized model int8\+zlib: \d+ bytes ", r"^Total submission size int8\+zlib: \d+ bytes$",
        r"^final_int8_zlib_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms$",
        r"^final_int8_zlib_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    ):
        assert re.search(line, log, re.MULTILINE), line
    assert log in capfd.readouterr().out
    artifact = folder / "final_model.int8.ptz"
    assert found["artifact_bytes"] == artifact.stat().st_size == sum(found["parts"].values())
    assert found["total_bytes"] == found["artifact_bytes"] + found["code_bytes"] <= found["cap_bytes"] == 16_000_000
    loaded = export.load_artifact(artifact)
    again = export_verbs.evaluate_artifact(loaded.state, loaded.meta, data=env["DATA_PATH"], tokenizer=env["TOKENIZER_PATH"],
                                           device="cpu", batch_tokens=1024)
    assert again.val_bpb == pytest.approx(found["roundtrip"]["val_bpb"], rel=1e-12)
    state, meta = export_verbs.read_checkpoint(folder / "final_model.safetensors")
    assert meta == loaded.meta
    raw = export_verbs.evaluate_artifact(state, meta, data=env["DATA_PATH"], tokenizer=env["TOKENIZER_PATH"], device="cpu",
                                         batch_tokens=1024)
    assert raw.val_bpb == pytest.approx(found["pre_roundtrip"]["val_bpb"], rel=1e-12)
    assert raw.val_bpb != again.val_bpb
    knobs = json.loads((folder / "config.json").read_text())["knobs"]
    assert knobs["iterations"] == 12
    assert knobs["run_id"] == "run"


def test_the_artifact_alone_scores_the_same_in_an_empty_environment(env):
    env["ITERATIONS"] = "3"
    assert train_gpt.main(env) == 0
    exact = re.search(r"final_int8_zlib_roundtrip_exact .*", (outputs(env) / "train.log").read_text())[0]
    command = [sys.executable, str(ROOT / "export.py"), "eval", str(outputs(env) / "final_model.int8.ptz"), "--data",
               env["DATA_PATH"], "--tokenizer", env["TOKENIZER_PATH"], "--device", "cpu", "--batch-tokens", "1024"]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1"}, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert exact in done.stdout.splitlines()


@pytest.mark.parametrize("knobs", [
    {"NUM_UNIQUE_BLOCKS": "2", "TIE_EMBEDDINGS": "0"}, {"WINDOW_SIZE": "24", "EMBED_DIM": "32"},
    {"NUM_UNIQUE_BLOCKS": "3", "WINDOW_SIZE": "16", "EMBED_DIM": "24", "TIE_EMBEDDINGS": "0", "MLP_MULT": "3"},
])
def test_every_architecture_trains_exports_reloads_and_scores(env, knobs):
    env |= knobs | {"ITERATIONS": "15", "WARMDOWN_ITERS": "0"}
    assert train_gpt.main(env) == 0
    curve, found = losses(env), summary(env)
    assert curve[-1][1] < curve[0][1]
    assert found["roundtrip"]["val_bpb"] == pytest.approx(found["pre_roundtrip"]["val_bpb"], abs=0.05)
    blocks = {name.split(".")[1] for name in found_names(env) if name.startswith("blocks.")}
    assert len(blocks) == int(knobs.get("NUM_UNIQUE_BLOCKS", 4))
    if "NUM_UNIQUE_BLOCKS" in knobs:
        assert re.search(r"^layer_blocks:0->0 1->1 ", (outputs(env) / "train.log").read_text(), re.MULTILINE)


def found_names(env: dict[str, str]) -> set[str]:
    return set(export.load_artifact(outputs(env) / "final_model.int8.ptz").state)


def test_the_challenges_own_checkpoints_can_be_written_and_scored(env, tmp_path):
    env |= {"ITERATIONS": "5", "SAVE_RAW_CHECKPOINT": "1"}
    assert train_gpt.main(env) == 0
    state, _ = export_verbs.read_checkpoint(outputs(env) / "final_model.safetensors")
    torch.save(state, tmp_path / "final_model.pt")
    arguments = ["write", str(tmp_path / "final_model.pt"), "-o", str(tmp_path / "a.ptz"), "--knob", "TRAIN_SEQ_LEN=64",
                 "--knob", "TRAIN_BATCH_TOKENS=2048"]
    assert export.main(arguments) == 0
    ours = export.load_artifact(outputs(env) / "final_model.int8.ptz")
    theirs = export.load_artifact(tmp_path / "a.ptz")
    assert theirs.meta["model"] == ours.meta["model"]
    assert all(torch.equal(t, theirs.state[name]) for name, t in ours.state.items())


def test_the_challenges_int8_artifact_is_scored_as_it_is(env, tmp_path, capsys):
    """A dict of int8 codes and scales under torch.save and zlib, as the baseline's trainer leaves it."""
    env |= {"ITERATIONS": "5", "SAVE_RAW_CHECKPOINT": "1", "MODEL_DIM": "256", "NUM_LAYERS": "2"}
    assert train_gpt.main(env) == 0
    state, _ = export_verbs.read_checkpoint(outputs(env) / "final_model.safetensors")
    large = {name: export.quantize(t, 127, "row", export.ExportOptions()) for name, t in state.items() if t.numel() > 65_536}
    small = {name: t.half() if t.ndim == 2 and "resid_mix" not in name else t for name, t in state.items()}
    kept = {name: t for name, t in small.items() if name not in large}
    packed = {
        "__quant_format__": "int8_clean_per_row_v1", "quantized": {name: codes for name, (codes, _) in large.items()},
        "scales": {name: scale for name, (_, scale) in large.items()}, "dtypes": dict.fromkeys(large, "float32"),
        "passthrough": kept, "qmeta": {name: {"scheme": "per_row", "axis": 0} for name in large},
        "passthrough_orig_dtypes": {name: "float32" for name, t in kept.items() if t.dtype is torch.float16},
    }
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    theirs = tmp_path / "theirs.int8.ptz"
    theirs.write_bytes(zlib.compress(buffer.getvalue(), 9))
    capsys.readouterr()
    assert large
    knobs = ["--knob", "TRAIN_SEQ_LEN=64", "--knob", "TRAIN_BATCH_TOKENS=2048"]
    assert export.main(["eval", str(theirs), "--data", env["DATA_PATH"], "--tokenizer", env["TOKENIZER_PATH"],
                        "--device", "cpu", *knobs]) == 0
    scored = re.search(r"_exact val_loss:(\S+)", capsys.readouterr().out)[1]
    assert float(scored) == pytest.approx(summary(env)["roundtrip"]["val_loss"], abs=1e-4)


# --- stopping and going on ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    knobs = {
        "DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "byte260.json"), "VOCAB_SIZE": "260", "LOG_DIR": str(folder),
        "RUN_ID": "whole", "DEVICE": "cpu", "ITERATIONS": "14", "WARMUP_STEPS": "1", "TRAIN_BATCH_TOKENS": "2048",
        "TRAIN_SEQ_LEN": "64", "NUM_LAYERS": "2", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
        "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "5", "VAL_BATCH_SIZE": "8192", "WARMDOWN_ITERS": "6",
        "TRAIN_LOG_EVERY": "1", "CHECKPOINT_EVERY": "4", "SAVE_RAW_CHECKPOINT": "1",
    }
    digest = hashlib.sha256((data / "byte260.json").read_bytes()).hexdigest()
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": digest}}))
    process = start(knobs)
    assert process.wait(timeout=120) == 0, process.communicate()[0]
    return knobs


def assert_same_run(env: dict[str, str], whole: dict[str, str]) -> None:
    """Weights, loss log and artifact are those of the uninterrupted run, bit for bit."""
    for name in ("final_model.safetensors", "final_model.int8.ptz"):
        assert (outputs(env) / name).read_bytes() == (outputs(whole) / name).read_bytes(), name
    assert losses(env) == losses(whole)
    for key in ("step", "val_loss", "val_bpb"):
        assert [row[key] for row in metrics(env, "val")] == [row[key] for row in metrics(whole, "val")]


def test_a_run_killed_at_any_step_and_resumed_ends_bit_identical(uninterrupted, tmp_path):
    env = uninterrupted | {"LOG_DIR": str(tmp_path), "RUN_ID": "cut"}
    for step, resume in ((2, ""), (8, "auto")):     # before the first checkpoint, and behind one
        process = start(env | {"RESUME": resume})
        wait_for_step(env, step, process)
        process.kill()
        process.wait()
    resumed = start(env | {"RESUME": "auto"})
    assert resumed.wait(timeout=120) == 0, resumed.communicate()[0]
    assert_same_run(env, uninterrupted)


def test_sigterm_writes_a_checkpoint_first_and_the_run_goes_on_from_there(uninterrupted, tmp_path):
    env = uninterrupted | {"LOG_DIR": str(tmp_path), "RUN_ID": "asked", "CHECKPOINT_EVERY": "0"}
    process = start(env)
    wait_for_step(env, 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    saved = sorted((outputs(env) / "checkpoints").iterdir())
    assert len(saved) == 1
    assert int(saved[0].stem.removeprefix("step_")) == losses(env)[-1][0] >= 3
    resumed = start(env | {"RESUME": str(saved[0])})
    assert resumed.wait(timeout=120) == 0, resumed.communicate()[0]
    assert_same_run(env, uninterrupted)


def test_only_the_newest_checkpoints_are_kept(uninterrupted):
    kept = sorted(p.name for p in (outputs(uninterrupted) / "checkpoints").iterdir())
    assert kept == ["step_00000008.safetensors", "step_00000012.safetensors"]


def test_resuming_with_another_model_is_refused(uninterrupted, capsys):
    env = uninterrupted | {"RESUME": "auto", "MATRIX_LR": "0.03", "ITERATIONS": "20"}
    assert train_gpt.main(env) == 2
    error = capsys.readouterr().err
    assert "was trained with MATRIX_LR=0.04, now it is 0.03" in error
    assert "ITERATIONS" not in error


def test_a_damaged_checkpoint_is_refused(uninterrupted, tmp_path, capsys):
    broken = tmp_path / "step_00000008.safetensors"
    broken.write_bytes((outputs(uninterrupted) / "checkpoints" / broken.name).read_bytes()[:5000])
    assert train_gpt.main(uninterrupted | {"RUN_ID": "other", "RESUME": str(broken)}) == 2
    assert "damaged" in capsys.readouterr().err


def test_warm_up_leaves_no_trace(env):
    env["ITERATIONS"] = "4"
    assert train_gpt.main(env) == 0
    plain = losses(env)
    warmed = env | {"RUN_ID": "warmed", "WARMUP_STEPS": "3"}
    assert train_gpt.main(warmed) == 0
    assert losses(warmed) == plain
    assert (outputs(warmed) / "final_model.int8.ptz").read_bytes() == (outputs(env) / "final_model.int8.ptz").read_bytes()


def test_the_wallclock_cap_ends_the_run_with_a_scored_artifact(env):
    env |= {"MAX_WALLCLOCK_SECONDS": "0.3", "ITERATIONS": "100000"}
    assert train_gpt.main(env) == 0
    found = summary(env)
    assert 1 <= found["step"] < 100_000
    assert found["roundtrip"] is not None
    assert "stopping_early: wallclock_cap train_time:" in (outputs(env) / "train.log").read_text()


def test_an_artifact_over_the_cap_that_is_only_warned_of_is_loud_saved_and_exits_with_3(env):
    env |= {"ITERATIONS": "2", "ARTIFACT_CAP_BYTES": "100000", "CAP_POLICY": "warn"}
    assert train_gpt.main(env) == 3
    assert not summary(env)["under_cap"]
    assert (outputs(env) / "final_model.int8.ptz").is_file()
    log = (outputs(env) / "train.log").read_text()
    assert re.search(r"^predicted: .* OVER THE CAP$", log, re.MULTILINE)
    assert re.search(r"^OVER THE CAP by \d+ bytes", log, re.MULTILINE)


def test_a_diverging_run_stops_and_names_step_rate_and_checkpoint(env):
    env |= {"SCALAR_LR": "3e38", "CHECKPOINT_EVERY": "1"}
    assert train_gpt.main(env) == 1
    log = (outputs(env) / "train.log").read_text()
    assert re.search(r"^failed: train_loss is (nan|inf) at step [2-9] with the learning rates at 1 of their knobs; "
                     r"last checkpoint: .*step_0000000\d\.safetensors; what was saved", log, re.MULTILINE)
    assert not (outputs(env) / "summary.json").exists()


def test_an_export_that_fails_keeps_the_weights(env):
    env |= {"MATRIX_LR": "1e30", "ITERATIONS": "3", "WARMDOWN_ITERS": "0"}   # beyond half precision, yet the loss is finite
    assert train_gpt.main(env) == 1
    assert "expected what f16 can hold" in (outputs(env) / "train.log").read_text()
    assert (outputs(env) / "final_model.safetensors").is_file()
    assert not (outputs(env) / "final_model.int8.ptz").exists()


# --- the size of the artifact -------------------------------------------------------------------------------------------


def text_of(env: dict[str, str]) -> str:
    return (outputs(env) / "train.log").read_text()


def only_problem(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line by which a run refuses to start, having created nothing."""
    assert train_gpt.main(env) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not outputs(env).exists()
    return line


def test_a_shape_predicted_over_the_cap_is_refused_before_any_work(env, capsys):
    line = only_problem(env | {"ARTIFACT_CAP_BYTES": "100000"}, capsys)
    assert re.fullmatch(r"error: predicted: artifact \d+ \+ code \d+ = \d+ bytes of 100000 OVER THE CAP"
                        r" \(CAP_POLICY=refuse\): choose a smaller shape, fewer bits, CAP_POLICY=fit or =warn", line)


def test_a_shape_that_no_plan_can_fit_is_refused_before_any_work(env, capsys):
    env |= {"CAP_POLICY": "fit"}
    cap = str(code_bytes(env) + 3000)
    line = only_problem(env | {"ARTIFACT_CAP_BYTES": cap}, capsys)
    assert re.fullmatch(rf"error: predicted: artifact \d+ \+ code \d+ = \d+ bytes of {cap} OVER THE CAP \(CAP_POLICY=fit\): "
                        "choose a smaller shape", line)


def test_cap_policy_fit_ends_below_the_cap(env):
    env |= {"ITERATIONS": "3", "CAP_POLICY": "fit", "INT8_SCALE_FLOOR": "0"}
    cap = code_bytes(env) + 100_000
    env |= {"ARTIFACT_CAP_BYTES": str(cap)}
    assert train_gpt.main(env) == 0
    found = summary(env)
    assert found["under_cap"]
    assert cap - 20_000 <= found["total_bytes"] <= cap == found["cap_bytes"]
    assert found["total_bytes"] == code_bytes(env) + (outputs(env) / "final_model.int8.ptz").stat().st_size
    assert found["planned_bytes"] == pytest.approx(found["artifact_bytes"], rel=0.005)
    assert found["expected_nats"] is None
    meta = export.load_artifact(outputs(env) / "final_model.int8.ptz").meta
    assert meta["export"] == {"cap_policy": "fit", "artifact_cap_bytes": cap, "int8_scale_floor": 0.0}


def test_an_allocation_by_calibration_runs_from_shards_to_the_score_and_can_be_repeated(env):
    env |= {"ITERATIONS": "10", "EXPORT_ALLOCATE": "hessian", "CALIBRATION_TOKENS": "1000"}
    cap = code_bytes(env) + 60_000
    env |= {"ARTIFACT_CAP_BYTES": str(cap)}
    again = env | {"RUN_ID": "again"}
    assert train_gpt.main(env) == train_gpt.main(again) == 0
    log, found = text_of(env), summary(env)
    assert re.search(r"^calibrated: tokens:1024 time:\d+ms train_time:\d+ms$", log, re.MULTILINE)     # whole micro-batches
    assert re.search(r"^codec +codes axis +layout +kept +rank +dtype +shape +tensor$", log, re.MULTILINE)
    for name in found_names(env):
        assert re.search(rf"  {re.escape(name)}$", log, re.MULTILINE), name
    planned, came, nats = re.search(r"^allocated: planned (\d+) bytes, came to (\d+) \([+-]\d\.\d\d%\)"
                                    r" expected_loss_increase:(\d\.\d{6})$", log, re.MULTILINE).groups()
    assert (int(planned), int(came)) == (found["planned_bytes"], found["artifact_bytes"])
    assert float(nats) == pytest.approx(found["expected_nats"], abs=1e-6)
    assert cap - 20_000 <= found["total_bytes"] <= cap
    assert int(planned) == pytest.approx(int(came), rel=0.005)
    assert found["roundtrip"]["val_bpb"] == pytest.approx(found["pre_roundtrip"]["val_bpb"], abs=0.1)
    assert 0 < found["seconds"]["calibrate"] < 60
    first, second = ((outputs(run) / "final_model.int8.ptz").read_bytes() for run in (env, again))
    assert first == second


def test_calibration_changes_nothing_of_the_training(env):
    env |= {"ITERATIONS": "3", "SAVE_RAW_CHECKPOINT": "1"}
    calibrated = env | {"RUN_ID": "calibrated", "CALIBRATION_TOKENS": "512"}
    assert train_gpt.main(env) == train_gpt.main(calibrated) == 0
    assert losses(env) == losses(calibrated)
    for name in ("final_model.safetensors", "final_model.int8.ptz"):
        assert (outputs(env) / name).read_bytes() == (outputs(calibrated) / name).read_bytes()
    assert "calibrated: tokens:512 " in text_of(calibrated)
    assert "calibrated:" not in text_of(env)


@pytest.mark.parametrize(("allocate", "needed"), [("hessian", "CALIBRATION_TOKENS"), ("sensitivity", "SENSITIVITY_MAP")])
def test_an_allocation_without_its_source_is_refused_in_one_line(env, capsys, allocate, needed):
    assert only_problem(env | {"EXPORT_ALLOCATE": allocate}, capsys) == f"error: EXPORT_ALLOCATE={allocate} needs {needed}"


def write_map(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    points = [{"relative_error": 1e-4, "nats": 1e-4}, {"relative_error": 1e-2, "nats": 1e-2}]
    tensors = {name: {"shape": list(shape), "points": points} for name, shape in export.matrices(shapes).items()}
    path.write_text(json.dumps({"split": "train", "tensors": tensors}))
    return path


def test_a_map_of_another_shape_is_refused_in_one_line(env, capsys, tmp_path):
    other = train_gpt.tensor_shapes(train_gpt.Config.parse(env | {"MODEL_DIM": "32"})[0].shape)
    path = write_map(tmp_path / "map.json", other)
    line = only_problem(env | {"EXPORT_ALLOCATE": "sensitivity", "SENSITIVITY_MAP": str(path)}, capsys)
    assert line == (f"error: SENSITIVITY_MAP={path}: artifact: sensitivity map, tensor blocks.0.attn.c_k.weight:"
                    " found (16, 32), expected (32, 64): the map is of another model")


def test_an_allocation_by_a_map_runs_to_the_score(env, tmp_path):
    path = write_map(tmp_path / "map.json", train_gpt.tensor_shapes(train_gpt.Config.parse(env)[0].shape))
    env |= {"ITERATIONS": "2", "EXPORT_ALLOCATE": "sensitivity", "SENSITIVITY_MAP": str(path)}
    cap = code_bytes(env) + 60_000
    env |= {"ARTIFACT_CAP_BYTES": str(cap)}
    assert train_gpt.main(env) == 0
    found = summary(env)
    assert cap - 20_000 <= found["total_bytes"] <= cap
    assert found["expected_nats"] > 0


def test_measuring_the_size_beside_the_training_changes_nothing_of_it(env):
    env |= {"ITERATIONS": "9", "CHECKPOINT_EVERY": "9"}
    measured = env | {"RUN_ID": "measured", "ARTIFACT_EVERY": "4"}
    assert train_gpt.main(env) == train_gpt.main(measured) == 0
    log = text_of(measured)
    size = r"artifact_bytes:(\d+) total_bytes:(\d+) bits_per_weight:\d+\.\d{3} rms_error:\d\.\d{5} predicted"
    lines = re.findall(rf"^step:(\d+) {size}", log, re.MULTILINE)
    busy = r"^step:(\d+) artifact size not measured: that of step \d+ is still under way$"
    skipped = re.findall(busy, log, re.MULTILINE)
    assert sorted(int(step) for step in [*skipped, *(line[0] for line in lines)]) == [4, 8]
    assert lines[0][0] == "4"
    for _, artifact, total in lines:
        assert int(total) == int(artifact) + code_bytes(measured)
    assert [str(row["artifact_bytes"]) for row in metrics(measured, "artifact")] == [line[1] for line in lines]
    assert "artifact_bytes:" not in text_of(env)
    assert losses(env) == losses(measured)
    assert (outputs(env) / "final_model.int8.ptz").read_bytes() == (outputs(measured) / "final_model.int8.ptz").read_bytes()


def test_the_size_under_way_is_that_of_the_weights_at_that_step(env):
    """Measured at the last step, it is the final artifact's."""
    env |= {"ITERATIONS": "4", "ARTIFACT_EVERY": "4"}
    assert train_gpt.main(env) == 0
    (row,) = metrics(env, "artifact")
    assert (row["step"], row["artifact_bytes"]) == (4, summary(env)["artifact_bytes"])


@pytest.mark.parametrize("knobs", [{}, {"ARTIFACT_EVERY": "1"}], ids=["at the end", "under way"])
def test_a_correction_budget_that_holds_nothing_ends_in_a_line_and_keeps_the_weights(env, knobs):
    env |= {"ITERATIONS": "2", "INT8_RESIDUAL_RANK": "1", "INT8_RESIDUAL_BUDGET_BYTES": "1"}
    env |= {"INT8_KEEP_FLOAT_MAX_NUMEL": "0"}
    assert train_gpt.main(env | knobs) == 1
    assert "INT8_RESIDUAL_BUDGET_BYTES=1 holds no correction: the smallest takes " in text_of(env)
    assert (outputs(env) / "final_model.safetensors").is_file()


def test_the_calibration_counts_inside_the_wallclock_cap(env):
    """The training stops at the first step whose time and what is set aside for the calibration fill the cap."""
    env |= {"MAX_WALLCLOCK_SECONDS": "3", "ITERATIONS": "100000", "CALIBRATION_TOKENS": "4096", "WARMUP_STEPS": "1",
            "TRAIN_LOG_EVERY": "1"}
    assert train_gpt.main(env) == 0
    log = text_of(env)
    trained = int(re.search(r"^stopping_early: wallclock_cap train_time:(\d+)ms", log, re.MULTILINE)[1])
    line = r"^calibrated: tokens:4096 time:(\d+)ms train_time:(\d+)ms$"
    took, total = map(int, re.search(line, log, re.MULTILINE).groups())
    assert total == pytest.approx(trained + took, abs=2)
    cfg, rows = train_gpt.Config.parse(env)[0], metrics(env, "train")
    full = [row["train_ms"] + train_gpt.calibration_ms(cfg, row["step"], row["train_ms"]) >= 3000 for row in rows]
    assert full == [False] * (len(rows) - 1) + [True]
    assert trained >= rows[-1]["train_ms"] - 1


def test_the_time_set_aside_follows_the_pace():
    knobs = {"CALIBRATION_TOKENS": "100", "TRAIN_BATCH_TOKENS": "16384", "MAX_WALLCLOCK_SECONDS": "600"}
    cfg = train_gpt.Config.parse(knobs)[0]
    assert train_gpt.calibration_ms(cfg, 10, 500.0) == pytest.approx(1000 + 2 * 100 / 16384 * 50)
    assert train_gpt.calibration_ms(train_gpt.Config.parse(knobs | {"MAX_WALLCLOCK_SECONDS": "3"})[0], 10, 500.0) == 750
    assert train_gpt.calibration_ms(train_gpt.Config.parse({})[0], 10, 500.0) == 0


# --- rate-distortion runs -----------------------------------------------------------------------------------------------

RD = {"ITERATIONS": "10", "EXPORT_SCHEME": "rd", "CALIBRATION_TOKENS": "1000", "TCQ_STATES": "8"}


def test_a_rate_distortion_run_ends_just_below_the_cap_and_can_be_repeated(env):
    cap = code_bytes(env) + 45_000
    env |= RD | {"ARTIFACT_CAP_BYTES": str(cap)}
    again = env | {"RUN_ID": "again"}
    assert train_gpt.main(env) == train_gpt.main(again) == 0
    log, found = text_of(env), summary(env)
    assert cap - 2000 <= found["total_bytes"] <= cap
    assert (found["export_scheme"], found["artifact"]) == ("rd", "final_model.rd.anlm")
    assert f"Serialized model rd: {found['artifact_bytes']} bytes (" in log
    assert re.search(r"^water-filling: .* blocks\.0\.attn\.c_k\.weight:\d\.\d\d ", log, re.MULTILINE)
    exact = re.search(r"^final_rd_roundtrip_exact val_loss:(\S+) val_bpb:\S+$", log, re.MULTILINE)
    assert float(exact[1]) == pytest.approx(found["roundtrip"]["val_loss"], abs=1e-8)
    assert found["roundtrip"]["val_bpb"] == pytest.approx(found["pre_roundtrip"]["val_bpb"], abs=0.05)
    first, second = ((outputs(run) / found["artifact"]).read_bytes() for run in (env, again))
    assert first == second
    state = export.decode_artifact(first).state
    assert set(state) == set(train_gpt.tensor_shapes(train_gpt.Config.parse(env)[0].shape))


def test_tuned_steps_keep_the_integers_and_the_cap_on_one_rank_and_on_two(env):
    env |= {"NUM_LAYERS": "2"}
    cap = code_bytes(env | RD | {"EXPORT_TUNE_STEPS": "3"}) + 30_000
    plain = env | RD | {"ARTIFACT_CAP_BYTES": str(cap)}
    tuned, two = plain | {"RUN_ID": "tuned", "EXPORT_TUNE_STEPS": "3"}, plain | {"RUN_ID": "two", "EXPORT_TUNE_STEPS": "3"}
    assert train_gpt.main(tuned) == 0
    done = torchrun(2, two)
    assert done.returncode == 0, done.stdout + done.stderr
    for run in (tuned, two):
        assert re.search(r"^tuned: steps:3 time:\d+ms train_time:\d+ms$", text_of(run), re.MULTILINE)
        assert summary(run)["total_bytes"] <= cap
        values = export.load_artifact(outputs(run) / "final_model.rd.anlm").values.values()
        assert all(list(own["bases"][3:]) == [1, 1, 8] for own in values if "bases" in own)
    assert summary(two)["roundtrip"]["val_loss"] == pytest.approx(summary(tuned)["roundtrip"]["val_loss"], abs=5e-3)


@pytest.mark.parametrize(("knobs", "message"), [
    ({"EXPORT_SCHEME": "rd"}, "EXPORT_SCHEME=rd needs CALIBRATION_TOKENS"),
    (RD | {"ARTIFACT_EVERY": "5"}, "ARTIFACT_EVERY measures EXPORT_SCHEME=int8_zlib alone; unset one of them"),
    ({"EXPORT_TUNE_STEPS": "2"}, "EXPORT_TUNE_STEPS needs EXPORT_SCHEME=rd"),
    (RD | {"TCQ_STATES": "3"}, "TCQ_STATES must be 0, 4, 8, 16, 32, 64, 128, 256, got 3"),
    (RD | {"INT8_AXIS_MODE": "col"}, "EXPORT_SCHEME=rd has no use for INT8_AXIS_MODE; unset one of them"),
    ({"EXPORT_BITS": "3"}, "EXPORT_SCHEME=int8_zlib has no use for EXPORT_BITS; unset one of them"),
    (RD | {"EXPORT_BITS": "12"}, "EXPORT_BITS must be at most 9, got 12"),
])
def test_a_rate_distortion_knob_that_cannot_work_is_refused_in_one_line(env, capsys, knobs, message):
    assert only_problem(env | knobs, capsys) == f"error: {message}"


# --- the same result however the work is cut ----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["64", "2048"])
def test_the_micro_batch_changes_memory_and_not_the_losses(env, tokens):
    env |= {"ITERATIONS": "6", "WARMDOWN_ITERS": "0", "MICRO_BATCH_TOKENS": tokens}
    assert train_gpt.main(env) == 0
    assert [loss for _, loss in losses(env)] == pytest.approx(
        [5.562379, 5.771084, 5.903475, 5.955106, 5.90413, 5.744579], abs=3e-3)


def torchrun(ranks: int, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*command, str(ROOT / "train_gpt.py")], env=bare_environment() | env, cwd=ROOT,
                          capture_output=True, text=True, check=False)


def test_two_ranks_agree_with_one(env):
    env |= {"ITERATIONS": "6", "CHECKPOINT_EVERY": "4"}
    assert train_gpt.main(env) == 0
    two = env | {"RUN_ID": "two"}
    done = torchrun(2, two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [x for _, x in losses(two)] == pytest.approx([x for _, x in losses(env)], abs=1e-3)
    assert summary(two)["roundtrip"]["val_loss"] == pytest.approx(summary(env)["roundtrip"]["val_loss"], abs=1e-3)
    assert done.stdout.count("final_int8_zlib_roundtrip_exact") == 1


def test_a_world_size_that_does_not_fit_is_refused_once_with_those_that_do(env):
    three = torchrun(3, env)
    assert three.returncode != 0
    assert three.stderr.count("WORLD_SIZE=3 does not divide the 8 micro-batches of a step; these do: 1, 2, 4, 8") == 1


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_all_faults_are_reported_together_before_any_work(env, data, tmp_path, capsys):
    bad = env | {"NUM_HEADS": "5", "TIE_EMBEDDINGS": "yes", "VAL_LOSS_EVRY": "3", "DATA_PATH": str(tmp_path),
                 "TOKENIZER_PATH": str(tmp_path / "no.model")}
    assert train_gpt.main(bad) == 2
    error = capsys.readouterr().err
    for part in ("MODEL_DIM=64 must be NUM_HEADS=5", "TIE_EMBEDDINGS must be 0 or 1, got 'yes'",
                 "did you mean VAL_LOSS_EVERY", "no.model", "no fineweb_train_*.bin"):
        assert part in error
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(env, capsys):
    outputs(env).mkdir()
    assert train_gpt.main(env) == 2
    assert "RUN_ID=run exists" in capsys.readouterr().err
    assert not list(outputs(env).iterdir())


def test_a_file_is_scored_only_by_the_tokenizer_and_the_length_that_it_was_trained_with(env, capsys):
    assert only_problem(env | {"EVAL_ARTIFACT": "nothing.ptz"}, capsys) == "error: EVAL_ARTIFACT=nothing.ptz: no such file"
    golden = str(ROOT / "tests" / "data" / "golden_v2.anlm")
    assert train_gpt.main(env | {"EVAL_ARTIFACT": golden}) == 1
    assert text_of(env).startswith("failed: artifact: meta.train_seq_len: found ")
    assert not (outputs(env) / "config.json").exists()


def test_a_full_disk_is_seen_before_the_work(env, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert train_gpt.main(env) == 2
    assert "has 1000 bytes free" in capsys.readouterr().err


# --- the submission -----------------------------------------------------------------------------------------------------


NEEDS_A_TOOL = {    # knobs -> what each of them asks for
    "INT8_RESIDUAL_RANK": ("1", "int8_plan"), "EXPORT_PERMUTE": ("mlp", "symmetries"), "EXPORT_ROTATE": ("1", "symmetries"),
    "EXPORT_ALLOCATE": ("hessian", "int8_plan"), "CAP_POLICY": ("fit", "int8_plan"),
    "SENSITIVITY_MAP": ("m", "sensitivity_map"), "ARTIFACT_EVERY": ("2", "size_gauge"),
    "CALIBRATION_TOKENS": ("512", "calibration"),
}


def test_a_packed_file_refuses_what_needs_scripts_before_any_work(env, tmp_path, monkeypatch, capsys):
    for module in (train_gpt, export):      # in a packed file both have its path
        monkeypatch.setattr(module, "__file__", str(tmp_path / "packed.py"))
    env |= {knob: value for knob, (value, _) in NEEDS_A_TOOL.items()}
    assert train_gpt.main(env) == 2
    assert not outputs(env).exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(NEEDS_A_TOOL)
    for knob, (value, tool) in NEEDS_A_TOOL.items():
        start = f"error: {knob}={value}: this option needs scripts/{tool}.py beside export.py, found no {tmp_path}/"
        assert any(line.startswith(start) for line in said), (knob, said)
    assert train_gpt.Config(export_tune_steps=1).tools() == {"EXPORT_TUNE_STEPS=1": "tuning"}


def test_two_files_without_scripts_are_told_apart_from_a_packed_one(env, tmp_path, monkeypatch, capsys):
    """The size of their code could not be counted at the end."""
    monkeypatch.setattr(export, "__file__", str(tmp_path / "export.py"))
    assert train_gpt.main(env) == 2
    assert "the size of the code: this option needs scripts/packing.py" in capsys.readouterr().err
    with pytest.raises(export.ExportRefused, match=r"needs scripts/packing\.py beside export\.py, found no"):
        export.tool("packing")


# --- on a GPU (skipped without one) ---------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_the_loss_curve_on_cuda_is_the_baselines(env, compiled):
    env |= {"DEVICE": "cuda", "ENABLE_TORCH_COMPILE": compiled, "WARMUP_STEPS": "2"}
    assert train_gpt.main(env) == 0
    assert [loss for _, loss in losses(env)][:20] == pytest.approx(BASELINE_BFLOAT16[:20], abs=3e-2)
    assert summary(env)["roundtrip"]["val_bpb"] == pytest.approx(summary(env)["pre_roundtrip"]["val_bpb"], abs=0.05)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("knobs", [{"EXPORT_ALLOCATE": "hessian", "CAP_POLICY": "fit"}, {"EXPORT_SCHEME": "rd"},
                                   {"EXPORT_SCHEME": "rd", "EXPORT_TUNE_STEPS": "2"}], ids=["int8", "rd", "tuned"])
def test_on_cuda_a_calibrated_run_fits_the_cap(env, compiled, knobs):
    env |= {"DEVICE": "cuda", "ENABLE_TORCH_COMPILE": compiled, "WARMUP_STEPS": "2", "ITERATIONS": "5"} | knobs
    cap = code_bytes(env) + 40_000
    env |= {"CALIBRATION_TOKENS": "2048", "ARTIFACT_CAP_BYTES": str(cap)}
    assert train_gpt.main(env) == 0
    assert summary(env)["total_bytes"] <= cap
    assert summary(env)["roundtrip"]["val_bpb"] == pytest.approx(summary(env)["pre_roundtrip"]["val_bpb"], abs=0.1)


@pytest.mark.gpu
@needs_gpu
def test_on_cuda_the_window_trains_and_a_repeated_run_gives_the_same_artifact(env):
    env |= {"DEVICE": "cuda", "WINDOW_SIZE": "24", "ITERATIONS": "5", "WARMDOWN_ITERS": "0"}
    again = env | {"RUN_ID": "again"}
    assert train_gpt.main(env) == train_gpt.main(again) == 0
    assert losses(env) == losses(again)
    assert (outputs(env) / "final_model.int8.ptz").read_bytes() == (outputs(again) / "final_model.int8.ptz").read_bytes()
