"""Checkpoint: a run goes on from the file as if it had never stopped, and a file that cannot do that is refused.

Guarantees: save then restore is the identity for weights, optimisers, data position, generator and clock; damaged files are
CheckpointErrors; changed knobs are named; writing is atomic; the newest are kept; metrics are neither lost nor doubled.
Run: python -m pytest tests/test_checkpoint.py (about 15 s).
"""
from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyData, build_job, config, tiny_knobs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from train_gpt import (
    CheckpointError,
    Config,
    Job,
    RunFolder,
    TokenStream,
    checkpoint_to_resume,
    optimizer_tensors,
    resume_problems,
    train_step,
    write_atomically,
    write_checkpoint,
)

pytestmark = pytest.mark.usefixtures("fresh_rng")


def snapshot(job: Job) -> dict[str, Tensor]:
    """Everything that decides how a run goes on, as tensors; reads one micro-batch and one random number."""
    found = {f"model.{name}": t.clone() for name, t in job.model.state_dict().items()}
    found |= {name: t.clone() for name, t in optimizer_tensors(job.model, job.optimizers).items()}
    position = torch.tensor([job.step, job.loader.step, job.clock.total_ms], dtype=torch.float64)
    x, y = job.loader.next_batch()
    return found | {"position": position, "x": x, "y": y, "random": torch.rand(4)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype is wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


def trained_job(env: dict[str, str], steps: int = 3) -> Job:
    job = build_job(env)
    job.clock.total_ms = 1234.5
    for _ in range(steps):
        train_step(job, 1.0, 0.9)
        job.step += 1
    return job


# ----------------------------------------------------------------------------------------------------------------------
# Save and restore.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [
    {}, {"COMPUTE_DTYPE": "bfloat16"}, {"TIE_EMBEDDINGS": "0", "EMBED_DIM": "8", "NUM_UNIQUE_BLOCKS": "2"},
], ids=str)
def test_restoring_what_was_saved_is_the_identity(knobs: dict[str, str], tiny_env: dict[str, str]) -> None:
    job = trained_job(tiny_env | knobs)
    path = job.save()
    wanted = snapshot(job)
    other = trained_job(tiny_env | knobs | {"SEED": "7", "RUN_ID": "other"}, steps=1)
    assert not torch.equal(other.model.blocks[0].mlp.fc.weight, job.model.blocks[0].mlp.fc.weight)
    other.restore(path)
    assert_same(snapshot(other), wanted)
    losses = []
    for each in (job, other):
        each.loader.seek(3)
        losses.append([train_step(each, 1.0, 0.9).item() for _ in range(2)])
    assert losses[0] == losses[1]
    assert_same(other.model.state_dict(), job.model.state_dict())


def test_saving_changes_nothing(tiny_env: dict[str, str]) -> None:
    saved, untouched = trained_job(tiny_env), trained_job(tiny_env | {"RUN_ID": "untouched"})
    torch.manual_seed(5)
    saved.save()
    first = snapshot(saved)
    torch.manual_seed(5)
    assert_same(first, snapshot(untouched))


def test_checkpoint_holds_all_state_under_the_parameters_names(tiny_env: dict[str, str]) -> None:
    job = trained_job(tiny_env, steps=1)
    names = set(load_file(job.save()))
    matrices = {n for n, p in job.model.named_parameters() if n.startswith("blocks.") and n.endswith(".weight")}
    wanted = {f"model.{n}" for n in job.model.state_dict()} | {"rng.cpu"}
    wanted |= {f"optimizer.{n}.momentum_buffer" for n in matrices}
    wanted |= {
        f"optimizer.{n}.{key}" for n, _ in job.model.named_parameters() if n not in matrices
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert names - {"rng.cuda"} == wanted


def test_checkpoint_before_the_first_step_restores(tiny_env: dict[str, str]) -> None:
    job = build_job(tiny_env)
    path = job.save()
    wanted = snapshot(job)
    other = trained_job(tiny_env | {"RUN_ID": "other"})
    other.restore(path)
    assert_same(snapshot(other), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Files that cannot be used.
# ----------------------------------------------------------------------------------------------------------------------


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as f:
        return f.metadata()


def with_training(path: Path, text: str) -> None:
    """Rewrites the checkpoint with another "training" entry."""
    save_file(load_file(path), path, metadata_of(path) | {"training": text})


def with_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors)
    save_file(tensors, path, metadata)


def without_key(key: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        training = json.loads(metadata_of(path)["training"])
        del training[key]
        with_training(path, json.dumps(training))
    return damage


def edit(function: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(function(path.read_bytes()))


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8:header_bytes])["model.blocks.0.mlp.fc.weight"]["data_offsets"]
    data[header_bytes + begin + 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "directory": become_directory,
    "empty": edit(lambda data: b""),
    "garbage": edit(lambda data: b"garbage" * 100),
    "one_byte_short": edit(lambda data: data[:-1]),
    "half": edit(lambda data: data[:len(data) // 2]),
    "cut_in_the_header": edit(lambda data: data[:100]),
    "trailing_byte": edit(lambda data: data + b"\0"),
    "huge_header_length": edit(lambda data: b"\xff" * 8 + data[8:]),
    "no_metadata": lambda path: save_file(load_file(path), path),
    "raw_weights": lambda path: save_file(load_file(path), path, {"artifact_meta": "{}"}),
    "a_flipped_bit_in_a_weight": flip_a_bit,
    "training_is_no_json": lambda path: with_training(path, "{"),
    "training_is_a_list": lambda path: with_training(path, "[]"),
    "training_is_null": lambda path: with_training(path, "null"),
    "training_is_empty": lambda path: with_training(path, "{}"),
    "training_is_nested_deeply": lambda path: with_training(path, "[" * 100_000),
    "another_format": lambda path: with_training(
        path, metadata_of(path)["training"].replace('"format": 1', '"format": 2')),
    "no_step": without_key("step"),
    "no_loader_step": without_key("loader_step"),
    "no_clock": without_key("train_ms"),
    "no_train_tokens": without_key("train_tokens"),
    "a_weight_is_missing": lambda path: with_tensors(path, lambda t: t.pop("model.skip_weights")),
    "a_weight_too_many": lambda path: with_tensors(path, lambda t: t.update({"model.extra": torch.zeros(1)})),
    "a_weight_of_another_shape": lambda path: with_tensors(
        path, lambda t: t.update({"model.skip_weights": torch.zeros(3)})),
    "no_weights": lambda path: with_tensors(
        path, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.")]),
    "no_generator": lambda path: with_tensors(path, lambda t: t.pop("rng.cpu")),
    "half_a_generator": lambda path: with_tensors(path, lambda t: t.update({"rng.cpu": t["rng.cpu"][:100].clone()})),
    "a_momentum_is_missing": lambda path: with_tensors(
        path, lambda t: t.pop("optimizer.blocks.0.mlp.fc.weight.momentum_buffer")),
    "a_moment_of_another_shape": lambda path: with_tensors(
        path, lambda t: t.update({"optimizer.skip_weights.exp_avg": torch.zeros(5)})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_refused(damage: Callable[[Path], object], tiny_env: dict[str, str]) -> None:
    job = trained_job(tiny_env, steps=1)
    path = job.save()
    damage(path)
    with pytest.raises(CheckpointError, match=f"checkpoint {path}: "):
        job.restore(path)


@pytest.mark.parametrize("name", [
    "missing", "directory", "empty", "garbage", "one_byte_short", "half", "cut_in_the_header", "trailing_byte",
    "huge_header_length", "no_metadata", "raw_weights", "training_is_no_json", "training_is_a_list", "training_is_null",
    "training_is_empty", "training_is_nested_deeply", "another_format",
])
def test_file_that_is_no_checkpoint_is_a_problem_of_the_configuration(name: str, tiny_env: dict[str, str]) -> None:
    """It is found before any work, together with the other faults."""
    path = trained_job(tiny_env, steps=1).save()
    DAMAGES[name](path)
    (line,) = resume_problems(config(tiny_env | {"RESUME": str(path)}))
    assert line.startswith(f"RESUME: checkpoint {path}: ")


@pytest.mark.parametrize("then", [None, [], "x", 3], ids=repr)
def test_checkpoint_without_its_knobs_is_a_problem_of_the_configuration(then: Any, tiny_env: dict[str, str]) -> None:
    path = trained_job(tiny_env, steps=1).save()
    training = json.loads(metadata_of(path)["training"])
    training["config"] = then
    for damaged in (training, {key: value for key, value in training.items() if key != "config"}):
        with_training(path, json.dumps(damaged))
        (line,) = resume_problems(config(tiny_env | {"RESUME": str(path)}))
        assert line.startswith(f"RESUME: checkpoint {path}: ")


def test_mutated_header_restores_or_is_refused(tiny_env: dict[str, str]) -> None:
    """Any byte of the header changed: a CheckpointError, or a change that does no harm; never another exception."""
    job = trained_job(tiny_env, steps=1)
    path = job.save()
    good = path.read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    rng, refused = random.Random(0), 0
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(header_bytes)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            job.restore(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_checkpoint_of_other_shards_is_refused(tiny_env: dict[str, str]) -> None:
    job = trained_job(tiny_env, steps=1)
    path, size = job.save(), job.data.train.size
    job.data = replace(job.data, train=TokenStream(job.data.train.shards[:-1]))
    with pytest.raises(CheckpointError, match=f"trained on shards of {size} tokens, DATA_PATH now holds 1010"):
        job.restore(path)


# ----------------------------------------------------------------------------------------------------------------------
# Which knobs may change.
# ----------------------------------------------------------------------------------------------------------------------


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Config:
    """The configuration of a run that has written a checkpoint, resuming it."""
    job = build_job(tiny_knobs(tiny_data, tmp_path_factory.mktemp("saved")))
    return replace(job.cfg, resume=str(job.save()))


def test_the_same_knobs_may_resume(saved: Config) -> None:
    assert resume_problems(saved) == []


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.name != "resume"])
def test_each_changed_knob_is_named_unless_it_is_free(name: str, saved: Config) -> None:
    before, after = getattr(saved, name), other_value(getattr(saved, name))
    found = resume_problems(replace(saved, **{name: after}))
    if next(f for f in fields(Config) if f.name == name).metadata["free"]:
        assert found == []
    else:
        (line,) = found
        assert f"{name.upper()}={before}" in line
        assert f"now it is {after}" in line


def test_what_decides_the_weights_is_not_free() -> None:
    free = {f.name for f in fields(Config) if f.metadata["free"]}
    decisive = {f.name for f in fields(Config) if f.metadata["group"] in ("Model", "Optimiser", "Data")}
    decisive |= {"seed", "warmdown_iters", "compute_dtype"}
    assert free & decisive == {"micro_batch_tokens"}
    assert free >= {"run_id", "iterations", "max_wallclock_seconds", "checkpoint_every", "micro_batch_tokens"}


def test_auto_takes_the_newest_of_this_run_or_none(tmp_path: Path) -> None:
    cfg = Config(log_dir=str(tmp_path), run_id="a", resume="auto")
    assert checkpoint_to_resume(cfg) is None
    assert resume_problems(cfg) == []
    folder = RunFolder(tmp_path / "a", master=True).checkpoints
    for name in ("step_00000009", "step_00000010", "other"):
        (folder / f"{name}.safetensors").touch()
    (folder / "step_00000011.safetensors.tmp").touch()
    assert checkpoint_to_resume(cfg) == folder / "step_00000010.safetensors"
    assert checkpoint_to_resume(replace(cfg, run_id="b")) is None
    assert checkpoint_to_resume(replace(cfg, resume="some/file")) == Path("some/file")
    assert checkpoint_to_resume(replace(cfg, resume="")) is None


def test_auto_without_a_run_is_refused() -> None:
    (line,) = resume_problems(Config(resume="auto"))
    assert "RESUME=auto needs RUN_ID" in line


# ----------------------------------------------------------------------------------------------------------------------
# Files on disk.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("write", [
    lambda path: write_atomically(path, b"new"),
    lambda path: write_checkpoint(path, {"w": torch.ones(3)}, {"training": {}}),
    lambda path: RunFolder(path.parent, master=True).write_json(path.name, {"a": 1}),
], ids=["bytes", "checkpoint", "json"])
def test_a_write_that_fails_leaves_the_old_file(
    write: Callable[[Path], None], function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]
    write(path)
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_checkpoints_are_kept(keep: int, tiny_env: dict[str, str]) -> None:
    job = build_job(tiny_env | {"CHECKPOINT_KEEP": str(keep)})
    for job.step in (1, 9, 10, 100):
        job.save()
    steps = [f"step_{step:08d}.safetensors" for step in (1, 9, 10, 100)]
    assert sorted(path.name for path in job.folder.checkpoints.iterdir()) == steps[-keep:]


def test_a_run_that_went_back_continues_from_its_own_checkpoints(tiny_env: dict[str, str]) -> None:
    """Those of the abandoned continuation are newer by their step only: they neither push out nor precede its own."""
    job = build_job(tiny_env | {"CHECKPOINT_KEEP": "2"})
    paths = []
    for job.step in (10, 20):
        paths.append(job.save())
    job.restore(paths[0])
    job.step = 11
    mine = job.save()
    assert mine.exists()
    assert checkpoint_to_resume(replace(job.cfg, resume="auto")) == mine


def test_metrics_that_a_resumed_run_writes_again_are_dropped(tmp_path: Path) -> None:
    """At step 2 the checkpoint is written after the training row and before the validation."""
    folder = RunFolder(tmp_path / "run", master=True)
    rows = [("val", 0), ("train", 1), ("train", 2), ("val", 2), ("train", 3), ("val", 4)]
    for kind, step in rows:
        folder.metric(kind=kind, step=step, loss=0.5)
    path = folder.path / "metrics.jsonl"
    with path.open("a") as f:
        f.write('{"kind": "train", "st')             # killed while writing
    folder.forget_metrics_from(2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in kept] == rows[:3]
    folder.metric(kind="val", step=2, loss=0.25)
    assert json.loads(path.read_text().splitlines()[3]) == {"kind": "val", "step": 2, "loss": 0.25}


def test_ranks_above_zero_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", master=False)
    folder.log("line")
    folder.metric(kind="train", step=1)
    folder.write_json("summary.json", {})
    folder.forget_metrics_from(0)
    assert not folder.path.exists()
