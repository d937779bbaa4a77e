"""The last phase of a rate-distortion run: matrices rounded in every step, or frozen in turn, at the integers of the file.

Guarantees: what is rounded lies on the grid that the file can say, whose scale follows the size; groups freeze in order and
never move again while the others do; the file holds exactly the weights that were trained last, within its bytes, cut off by
the clock or not; the rates follow their schedule; a resumed run ends as a whole one (two ranks: test_objective.py).
Run: bash scripts/test.sh tests/test_finishing.py (about 20 s).
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import build_job, config
from torch import Tensor

import export
import finishing
import train_gpt
from train_gpt import Job, lr_scale, train_step

pytestmark = pytest.mark.usefixtures("fresh_rng")

KNOBS = {"EXPORT_SCHEME": "rd", "EXPORT_BITS": "3", "CALIBRATION_TOKENS": "512", "TCQ_STATES": "8", "ITERATIONS": "12",
         "FINISH_STEPS": "8", "WARMDOWN_ITERS": "2"}
ROUND = KNOBS | {"TCQ_STATES": "0"}
GROUPS = [["tok_emb.weight"]] + [
    [f"blocks.{i}.{part}.weight" for part in ("attn.c_k", "attn.c_q", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")]
    for i in range(3)]


def stepped(job: Job, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        job.steps_left = job.cfg.iterations - job.step
        found.append(float(train_step(job, lr_scale(job.cfg, job.step, 0.0), 0.9)))
        job.step += 1
    return found


def matrices_of(job: Job) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in job.objective.matrices.items()}


# --- rounding -----------------------------------------------------------------------------------------------------------


def seen_by(job: Job) -> dict[str, Tensor]:
    with job.objective.as_finished():
        return matrices_of(job)


def test_steps_of_the_phase_see_points_of_the_files_grid_and_move_the_weights_between_them(tiny_env):
    job = build_job(tiny_env | ROUND)
    stepped(job, 4)
    assert all(torch.equal(p, matrices_of(job)[name]) for name, p in seen_by(job).items())      # not yet
    stepped(job, 2)
    seen, whole, phase = seen_by(job), matrices_of(job), job.objective.last_phase
    assert any(not torch.equal(p, whole[name]) for name, p in seen.items())
    for name, p in seen.items():
        units = p.double() / phase.steps[name].double()
        assert torch.allclose(units, units.round(), atol=1e-5)
        nearest = (whole[name] / phase.steps[name]).abs()
        assert torch.equal(units.abs().round(), (nearest + 0.5).floor().double())


def test_rounded_weights_are_those_of_the_file_and_of_the_last_validation(tiny_env):
    env = tiny_env | ROUND | {"ITERATIONS": "64", "FINISH_STEPS": "48", "WARMDOWN_ITERS": "40", "SAVE_RAW_CHECKPOINT": "1"}
    assert train_gpt.main(env) == 0
    folder = Path(env["LOG_DIR"]) / "tiny"
    artifact = export.load_artifact(folder / "final_model.rd.anlm")
    weights = train_gpt.load_safetensors((folder / "final_model.safetensors").read_bytes())
    assert {row.states for row in artifact.plan if row.codec == "grid"} == {0}
    same = [torch.equal(artifact.state[name], weights[name]) for group in GROUPS for name in group]
    found, said = json.loads((folder / "summary.json").read_text()), (folder / "train.log").read_text()
    assert "placed anew" not in said
    assert all(same)
    assert found["roundtrip"]["val_loss"] == pytest.approx(found["pre_roundtrip"]["val_loss"], abs=2e-3)    # 8-bit vectors
    assert 0.96 * 3 <= found["bits_per_weight"] <= 3
    looks = [line.split() for line in said.splitlines() if line.startswith("rounded:")]
    assert len(looks) == finishing.LAST_LOOK + 1
    bits, wanted = (float(looks[-1][i].split(":")[1]) for i in (2, 3))
    assert bits == pytest.approx(wanted, rel=0.03)


def test_the_estimate_of_the_size_is_near_the_coded_one(tiny_env):
    job = build_job(tiny_env | ROUND | {"ITERATIONS": "40"})
    stepped(job, 34)
    phase = job.objective.last_phase
    phase.measure(job, coded=True)
    assert 0.9 < phase.ratio < 1.25         # 34,000 weights; 1.03 for 590,000


def test_integers_that_do_not_fit_get_more_zeros(tiny_env):
    job = build_job(tiny_env | ROUND)
    stepped(job, 12)
    known, phase = export.tool("calibration").statistics_now(job, 512), job.objective.last_phase
    state, whole = {name: t.clone() for name, t in job.model.state_dict().items()}, matrices_of(job)
    candidates = [phase.placed(whole, at) for at in (0.5, 0.6, 0.7)]
    zeros = [sum(int((s.values["positions"] == 0).sum()) for s in placed.values()) for placed in candidates]
    assert zeros[0] < zeros[1] < zeros[2]

    def made(placed: list[dict[str, export.Stored]], bits: float) -> export.Export:
        options = export.ExportOptions(**(vars(job.cfg.export_options) | {"export_bits": bits}))
        return export.encode_artifact(state, job.meta, options, statistics=known, placed=placed)

    sizes = [len(made([placed], 9.0).data) for placed in candidates]
    assert sizes[0] > sizes[1] > sizes[2]
    weights = sum(t.numel() for t in state.values())
    for i, size in enumerate(sizes):        # the first that fits; headers of other options differ by a few bytes
        found = made(candidates, 8 * (size + 64) / weights)
        assert "placed anew" not in found.report.note
        assert all((found.tensors[name].values["positions"] == s.values["positions"]).all()
                   for name, s in candidates[i].items())
    assert "placed anew" in made(candidates, 8 * (sizes[2] - 64) / weights).report.note


def test_the_search_for_more_zeros_starts_where_they_should_fit(tiny_env):
    job = build_job(tiny_env | ROUND)
    stepped(job, 12)
    whole, phase = matrices_of(job), job.objective.last_phase
    phase.measure(job, coded=True)
    sizes = [phase.ratio * phase.entropy_bits(whole, 0.5 + 0.004 * k) + phase.other for k in range(50)]
    room = 8 * export.rd_budget(job.cfg.export_options, sum(t.numel() for t in job.model.state_dict().values()), 0)[0]
    first = next((k for k, size in enumerate(sizes) if size <= room), 50)
    candidates = list(job.objective.finish(job))
    assert 1 <= len(candidates) <= finishing.TRIES
    start = phase.placed(whole, 0.5 + 0.004 * max(first - 1, 0))
    assert all((s.values["positions"] == start[name].values["positions"]).all() for name, s in candidates[0].items())


def test_rounding_leaves_the_schedule_alone(tiny_env):
    one, other = (config(tiny_env | ROUND | {"ITERATIONS": "100", "WARMDOWN_ITERS": "40", "FINISH_STEPS": n})
                  for n in ("0", "60"))
    assert [lr_scale(one, step, 0.0) for step in range(100)] == [lr_scale(other, step, 0.0) for step in range(100)]


# --- freezing -----------------------------------------------------------------------------------------------------------


def test_groups_are_what_stands_outside_the_blocks_and_then_the_blocks(tiny_env):
    assert build_job(tiny_env | KNOBS).objective.last_phase.groups == GROUPS
    names = ["blocks.10.a", "blocks.2.b", "lm_head.weight", "blocks.2.a"]
    assert finishing.groups_of(names) == [["lm_head.weight"], ["blocks.2.a", "blocks.2.b"], ["blocks.10.a"]]


def test_groups_freeze_in_turn_and_what_is_frozen_never_moves(tiny_env):
    job = build_job(tiny_env | KNOBS)
    stepped(job, 4)
    assert not job.objective.last_phase.placed
    for part in range(4):       # two steps each
        stepped(job, 1)
        frozen = {name for group in GROUPS[:part + 1] for name in group}
        assert set(job.objective.last_phase.placed) == frozen
        first = matrices_of(job)
        stepped(job, 1)
        moved = {name for name, p in matrices_of(job).items() if not torch.equal(p, first[name])}
        assert moved == set(first) - frozen


def test_the_file_holds_the_weights_that_were_trained_last(tiny_env):
    env = tiny_env | KNOBS | {"ITERATIONS": "16", "SAVE_RAW_CHECKPOINT": "1"}
    assert train_gpt.main(env) == 0
    folder = Path(env["LOG_DIR"]) / "tiny"
    artifact = export.load_artifact(folder / "final_model.rd.anlm")
    weights = train_gpt.load_safetensors((folder / "final_model.safetensors").read_bytes())
    for name in (name for group in GROUPS for name in group):
        assert torch.equal(artifact.state[name], weights[name]), name
    found = json.loads((folder / "summary.json").read_text())
    assert 0.93 * 3 <= found["bits_per_weight"] <= 3
    assert found["roundtrip"]["val_loss"] == pytest.approx(found["pre_roundtrip"]["val_loss"], abs=2e-3)    # 8-bit vectors
    assert (folder / "train.log").read_text().count("frozen: step:") == 4


def test_integers_that_take_too_much_are_placed_anew(tiny_env):
    job = build_job(tiny_env | KNOBS)
    stepped(job, 12)
    options = export.ExportOptions(**(vars(job.cfg.export_options) | {"export_bits": 2.0}))
    known = export.tool("calibration").calibrate(job.model, iter([job.loader.next_batch()[0]]), job.rt, 1)
    placed = job.objective.finish(job)
    made = export.encode_artifact(job.model.state_dict(), job.meta, options, statistics=known, placed=placed)
    assert "placed anew" in made.report.note
    assert made.report.bits_per_weight <= 2


def test_the_rates_fall_before_the_phase_and_again_in_it(tiny_env):
    cfg = config(tiny_env | KNOBS | {"ITERATIONS": "100", "FINISH_STEPS": "20", "WARMDOWN_ITERS": "40", "FINISH_LR": "0.2"})
    found = [lr_scale(cfg, step, 0.0) for step in (0, 40, 60, 79, 80, 90, 99)]
    assert found == pytest.approx([1, 1, 0.5, 1 / 40, 0.2, 0.1, 0.01])
    timed = config(tiny_env | KNOBS | {"ITERATIONS": "1000", "MAX_WALLCLOCK_SECONDS": "10", "FINISH_STEPS": "20",
                                       "WARMDOWN_ITERS": "40", "FINISH_LR": "0.2"})
    found = [lr_scale(timed, step, 100.0 * step) for step in (10, 40, 60, 79, 80, 90, 99)]
    assert found == pytest.approx([1, 1, 0.5, 1 / 40, 0.2, 0.1, 0.01])


@pytest.mark.parametrize(("knobs", "at"), [(KNOBS, 3), (KNOBS, 6), (ROUND, 7)])
def test_a_resumed_run_goes_on_as_if_uninterrupted(tiny_env, knobs, at):
    env = tiny_env | knobs
    whole, second = (build_job(env | {"RUN_ID": name}) for name in ("whole", "second"))
    stepped(whole, at)
    saved = whole.save()
    losses = stepped(whole, 12 - at)
    second.restore(saved)
    assert stepped(second, 12 - at) == losses
    assert all(torch.equal(p, matrices_of(whole)[name]) for name, p in matrices_of(second).items())
    files = [export.encode_artifact(
        job.model.state_dict(), job.meta, job.cfg.export_options, placed=job.objective.finish(job),
        statistics=export.tool("calibration").statistics_now(job, 512)).data for job in (whole, second)]
    assert files[0] == files[1]


def test_a_phase_that_the_clock_cut_off_is_finished_at_the_export(tiny_env):
    job = build_job(tiny_env | KNOBS)
    stepped(job, 8)
    assert len(job.objective.last_phase.placed) < len(job.objective.matrices)
    (placed,) = job.objective.finish(job)
    assert set(placed) == set(job.objective.matrices)
    assert all(torch.equal(export.restore(s.row, s.values), job.objective.matrices[name]) for name, s in placed.items())


@pytest.mark.parametrize(("steps", "fault"), [("3", True), ("4", False)])
def test_a_phase_has_a_step_for_each_group(tiny_env, steps, fault):
    problems = train_gpt.Config.parse(tiny_env | KNOBS | {"FINISH_STEPS": steps})[1]
    line = "FINISH_STEPS freezes the embedding and 3 blocks in turn under TCQ_STATES above 0: it must be 0 or at least" \
        " 4, got 3"
    assert problems == [line] * fault


def test_tuning_steps_are_refused_beside_it(tiny_env, capsys):
    assert train_gpt.main(tiny_env | KNOBS | {"EXPORT_TUNE_STEPS": "2"}) == 2
    assert "FINISH_STEPS trains what EXPORT_TUNE_STEPS would tune; unset one of them" in capsys.readouterr().err
