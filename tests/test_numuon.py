"""MUON_VARIANT=numuon: steps of limited rank.

Guarantees: updates are U_k V_k^T of the momentum as an SVD finds it; at full rank the polar factor, and in the full-rank
phase Muon's own iteration; the rank follows its schedule; a run goes on from a checkpoint bit for bit; two ranks equal one;
a changing rank compiles nothing anew; faults of the knobs are named; the gauges of rank are right.
Run: bash scripts/test.sh tests/test_numuon.py (about 15 s, most of it two processes that start).
"""
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import CPU, TinyData, build_job, config, muon_of
from safetensors import safe_open
from test_checkpoint import assert_same, snapshot
from test_optim import SMOOTH, assert_close_weights, random_matrix, run_two_ranks, weights_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import numuon
import train_gpt
from numuon import NuMuon, leading_directions, rank_fraction, starting_block
from size_gauge import ranks
from train_gpt import Config, Runtime, orthogonalise, train_step

NUMUON = {"MUON_VARIANT": "numuon"}
RATE = 0.02


def best_update(g: Tensor, rank: int) -> Tensor:
    """U_k V_k^T in float64, by an SVD."""
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return u[:, :rank] @ vh[:rank]


def decaying(rows: int, cols: int, factor: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values are the powers of `factor`."""
    u, s, vh = torch.linalg.svd(random_matrix(rows, cols, seed).double(), full_matrices=False)
    return (u * factor ** torch.arange(len(s)) @ vh).float()


def numuon_of(*shapes: tuple[int, int], rt: Runtime = CPU, **knobs: str) -> tuple[list[nn.Parameter], NuMuon]:
    parameters = [nn.Parameter(random_matrix(*shape, seed=i)) for i, shape in enumerate(shapes)]
    return parameters, NuMuon(config(NUMUON | knobs), parameters, RATE, 5, torch.float32, rt)


# ----------------------------------------------------------------------------------------------------------------------
# The directions.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols", "rank"), [(64, 64, 5), (40, 90, 3), (61, 67, 1)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_krylov_converges_to_the_svd_in_a_few_warm_starts(rows: int, cols: int, rank: int, scale: float) -> None:
    g, width = decaying(rows, cols, 0.8), rank + numuon.OVERSAMPLING
    assert numuon.BLOCKS * width < rows, "the space must not be everything"
    start, errors = starting_block(None, g, width, seed=1), []
    for _ in range(4):
        left, right, start = leading_directions(scale * g, start, rank)
        errors.append(float((left @ right.T - best_update(g, rank)).abs().max()))
    assert errors[-1] < 1e-4
    assert errors[-1] <= errors[0]
    assert start.shape == (cols, width)


def test_a_warm_start_beats_a_cold_one() -> None:
    """On a flat spectrum, where two products are far from enough."""
    g, rank = decaying(96, 96, 0.99), 16
    cold = starting_block(None, g, rank + numuon.OVERSAMPLING, seed=1)
    start, found = cold, []
    for _ in range(8):
        left, right, start = leading_directions(g, start, rank)
        found.append(float((left @ right.T * g).sum()))         # what the update gains to first order
    best = float((best_update(g, rank) * g).sum())
    assert found[0] < 0.98 * best
    assert 0.995 * best < found[-1] <= best * (1 + 1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 9), (16, 16), (17, 31)])
def test_full_rank_is_the_polar_factor(rows: int, cols: int) -> None:
    g = random_matrix(rows, cols)
    left, right, _ = leading_directions(g, starting_block(None, g, rows, seed=1), rows)
    torch.testing.assert_close((left @ right.T).double(), best_update(g, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_an_update_has_unit_singular_values_as_many_as_its_rank(rank: int) -> None:
    g = random_matrix(50, 70)
    left, right, _ = leading_directions(g, starting_block(None, g, rank + 8, seed=1), rank)
    values = torch.linalg.svdvals(left @ right.T)
    torch.testing.assert_close(values, (torch.arange(50) < rank).float(), rtol=0, atol=1e-5)


def test_directions_of_small_singular_values_stay_orthonormal() -> None:
    """The Gram matrix squares them: 1e-5 of the largest would be lost in float32."""
    g = decaying(40, 40, 10 ** (-5 / 39))
    left, right, _ = leading_directions(g, starting_block(None, g, 40, seed=1), 40)
    for side in (left, right):
        torch.testing.assert_close(side.T @ side, torch.eye(40), rtol=0, atol=1e-3)


def test_a_matrix_of_lower_rank_gets_no_more_directions_than_it_has() -> None:
    g = random_matrix(48, 3) @ random_matrix(3, 64, seed=1)
    start = starting_block(None, g, 18, seed=1)
    left, right, following = leading_directions(g, start, 10)
    torch.testing.assert_close((left @ right.T).double(), best_update(g, 3), rtol=0, atol=1e-4)
    assert int(torch.linalg.matrix_rank(following)) == 18       # the next search starts with as many as this one


def test_a_zero_matrix_has_a_zero_update_and_keeps_its_start() -> None:
    g = torch.zeros(30, 40)
    start = starting_block(None, g, 10, seed=1)
    left, right, following = leading_directions(g, start, 2)
    assert torch.equal(left @ right.T, g)
    assert torch.equal(following, start)


def test_a_block_shrinks_to_its_first_directions_and_grows_by_random_ones() -> None:
    g, before = torch.zeros(30, 40), random_matrix(40, 10)
    assert torch.equal(starting_block(before, g, 6, seed=1), before[:, :6])
    wide = starting_block(before, g, 15, seed=1)
    assert torch.equal(wide[:, :10], before)
    assert torch.equal(wide[:, 10:], starting_block(None, g, 15, seed=1)[:, 10:])
    assert not torch.equal(wide, starting_block(before, g, 15, seed=2))


# ----------------------------------------------------------------------------------------------------------------------
# The schedule.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "progress", "expected"), [
    ("cosine", 0.0, 1.0), ("cosine", 0.1, 1.0), ("cosine", 0.45, 0.625), ("cosine", 0.8, 0.25), ("cosine", 1.0, 0.25),
    ("cosine", 0.275, 0.25 + 0.375 * (1 + math.sqrt(0.5))),
    ("linear", 0.0, 1.0), ("linear", 0.1, 1.0), ("linear", 0.275, 0.8125), ("linear", 0.8, 0.25), ("linear", 1.0, 0.25),
])
def test_rank_holds_falls_and_holds(schedule: str, progress: float, expected: float) -> None:
    cfg = config(NUMUON | {"NUMUON_RANK_SCHEDULE": schedule})
    assert rank_fraction(cfg, progress) == pytest.approx(expected)


def test_rank_starts_to_fall_at_once_without_a_hold() -> None:
    cfg = config(NUMUON | {"NUMUON_HOLD_FRAC": "0", "NUMUON_RANK_FRAC_FINAL": "0.5", "NUMUON_RANK_SCHEDULE": "linear"})
    assert [rank_fraction(cfg, p) for p in (0.0, 0.4, 0.8)] == pytest.approx([1.0, 0.75, 0.5])


def test_training_tells_the_optimiser_its_progress(tiny_env: dict[str, str]) -> None:
    job = build_job(tiny_env | NUMUON | {"WARMUP_STEPS": "2"})
    seen: list[float] = []
    update = NuMuon.update

    def noted(self: NuMuon, p: Tensor, momentum: Tensor) -> Tensor:
        seen.append(self.param_groups[0]["progress"])
        return update(self, p, momentum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NuMuon, "update", noted)
        train_gpt.warm_up(job)
        assert list(dict.fromkeys(seen)) == [0.0, 0.5]          # both kinds of step are primed
        seen.clear()
        train_gpt.train(job)
    assert list(dict.fromkeys(seen)) == [0.0, 0.25, 0.5, 0.75]


def test_the_clock_ends_the_progress_of_a_capped_run(tiny_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_job(tiny_env | NUMUON | {"ITERATIONS": "1000", "MAX_WALLCLOCK_SECONDS": "4"})
    monkeypatch.setattr(job.clock, "elapsed_ms", lambda: 1000.0 * job.step)
    seen: list[float] = []
    step = train_gpt.train_step
    monkeypatch.setattr(train_gpt, "train_step", lambda *given: (seen.append(given[3]), step(*given))[1])
    train_gpt.train(job)
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.75])


# ----------------------------------------------------------------------------------------------------------------------
# The optimiser.
# ----------------------------------------------------------------------------------------------------------------------


def test_steps_equal_a_plain_implementation() -> None:
    shapes = [(12, 12), (30, 10), (10, 30), (1, 8), (7, 1)]
    parameters, optimizer = numuon_of(*shapes)
    weights, velocities = [p.detach().double() for p in parameters], [torch.zeros(shape).double() for shape in shapes]
    for step, (momentum, progress, share) in enumerate(((0.85, 0.45, 0.625), (0.95, 0.8, 0.25), (0.95, 1.0, 0.25))):
        optimizer.param_groups[0] |= {"momentum": momentum, "progress": progress}
        for i, (p, shape) in enumerate(zip(parameters, shapes, strict=True)):
            p.grad = random_matrix(*shape, seed=100 * step + i)
            velocities[i] = momentum * velocities[i] + p.grad.double()
            if (rank := math.ceil(share * min(shape))) < min(shape):
                update = best_update(velocities[i], rank)
            else:
                update = orthogonalise(velocities[i].float(), 5, torch.float32).double()
            weights[i] = weights[i] - RATE * max(1, shape[0] / shape[1]) ** 0.5 * update
        optimizer.step()
        for p, wanted in zip(parameters, weights, strict=True):
            torch.testing.assert_close(p.detach().double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("share", "full", "rank"), [("0.7", 10, 7), ("0.3", 10, 3), ("0.25", 10, 3), ("1e-9", 10, 1)])
def test_the_rank_is_the_share_rounded_up(share: str, full: int, rank: int) -> None:
    (p,), optimizer = numuon_of((full, 40), NUMUON_RANK_FRAC_FINAL=share)
    optimizer.param_groups[0]["progress"] = 1.0
    values = torch.linalg.svdvals(optimizer.update(p, random_matrix(full, 40)))
    assert int((values > 0.5).sum()) == rank


def test_the_full_rank_phase_is_newton_schulz_of_the_momentum() -> None:
    (p,), optimizer = numuon_of((24, 40))
    p.grad = random_matrix(24, 40, seed=5)
    before, wanted = p.detach().clone(), orthogonalise(p.grad, 5, torch.float32)
    optimizer.param_groups[0] |= {"momentum": 0.9, "progress": 0.1}
    optimizer.step()
    assert torch.equal(p, before.add(wanted, alpha=-RATE))
    assert set(optimizer.state[p]) == {"momentum_buffer"}


def test_a_changing_rank_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counter, **how))
    shapes = [(24, 40), (40, 24), (24, 40)]
    parameters, optimizer = numuon_of(*shapes, rt=Runtime(torch.device("cpu"), torch.float32, compiled=True))
    compiled = []
    for step in range(20):
        optimizer.param_groups[0] |= {"momentum": 0.9, "progress": step / 20}
        for i, p in enumerate(parameters):
            p.grad = random_matrix(*p.shape, seed=10 * step + i)
        optimizer.step()
        compiled.append(counter.frame_count)
    assert compiled == [2] * 20         # Newton-Schulz, once for each shape


def trained_stable_rank(env: dict[str, str]) -> float:
    """Mean over the matrices after a short training."""
    job = build_job(env)
    for _ in range(12):
        train_step(job, 1.0, 0.9, progress=1.0)
    return torch.stack([ranks(p)[1] for p in muon_of(job.optimizers).param_groups[0]["params"]]).mean().item()


def test_the_stable_rank_of_the_weights_falls_below_muons(tiny_env: dict[str, str]) -> None:
    plain = trained_stable_rank(tiny_env)
    limited = trained_stable_rank(tiny_env | NUMUON | {"NUMUON_RANK_FRAC_FINAL": "0.1", "RUN_ID": "limited"})
    assert limited < 0.7 * plain


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and ranks.
# ----------------------------------------------------------------------------------------------------------------------


LOW = NUMUON | {"NUMUON_RANK_FRAC_FINAL": "0.1"}       # 4 of 32: the Krylov space is not everything
FINAL = 0.9                                             # progress at which that holds


def trained_numuon(env: dict[str, str]) -> train_gpt.Job:
    job = build_job(env | LOW)
    for _ in range(3):
        train_step(job, 1.0, 0.9, FINAL)
        job.step += 1
    return job


def test_a_run_resumes_bit_for_bit(tiny_env: dict[str, str]) -> None:
    job = trained_numuon(tiny_env)
    path = job.save()
    with safe_open(path, "pt") as file:
        assert file.get_tensor("optimizer.blocks.0.attn.c_q.weight.right").shape == (32, 4 + 8)
    wanted = snapshot(job)
    other = build_job(tiny_env | LOW | {"SEED": "7", "RUN_ID": "other"})
    other.restore(path)
    assert_same(snapshot(other), wanted)
    for each in (job, other):
        each.loader.seek(3)
        train_step(each, 1.0, 0.9, FINAL)
    assert_same(other.model.state_dict(), job.model.state_dict())
    states = ({name: t for name, t in snapshot(each).items() if name.startswith("optimizer.")} for each in (job, other))
    assert_same(*states)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> list[dict[str, Any]]:
    """Three steps late in a run, in two processes."""
    return run_two_ranks(tmp_path_factory.mktemp("ranks"), tiny_data, progress=FINAL, **LOW)


def test_two_ranks_equal_one(two_ranks: list[dict[str, Any]], tiny_env: dict[str, str]) -> None:
    """Up to the rounding of gradients, whose means are summed in another order."""
    assert_close_weights(two_ranks[0]["weights"], two_ranks[1]["weights"], atol=0)
    assert_close_weights(two_ranks[0]["weights"], weights_of(trained_numuon(tiny_env | SMOOTH)), atol=2e-4)


def test_two_ranks_resume_bit_for_bit(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["resumed_is_same"] for rank in two_ranks] == [True, True]
    with safe_open(two_ranks[0]["path"], "pt") as file:
        held = {name for name in file.keys() if name.startswith("optimizer.blocks.")}   # noqa: SIM118, it is no dict
    matrices = {name.rpartition(".")[0] for name in held if name.endswith(".momentum_buffer")}
    assert {name for name in held if name.endswith(".right")} == {f"{name}.right" for name in matrices}


# ----------------------------------------------------------------------------------------------------------------------
# Knobs and gauges.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("knob", "value", "fault"), [
    ("MUON_VARIANT", "adamuon", "MUON_VARIANT must be one of muon, numuon, got 'adamuon'"),
    ("NUMUON_RANK_SCHEDULE", "step", "NUMUON_RANK_SCHEDULE must be one of cosine, linear, got 'step'"),
    ("NUMUON_RANK_FRAC_FINAL", "0", "NUMUON_RANK_FRAC_FINAL must be above 0 and at most 1, got 0.0"),
    ("NUMUON_RANK_FRAC_FINAL", "1.5", "NUMUON_RANK_FRAC_FINAL must be above 0 and at most 1, got 1.5"),
    ("NUMUON_HOLD_FRAC", "0.8", "NUMUON_HOLD_FRAC must be below 0.8, got 0.8"),
    ("NUMUON_HOLD_FRAC", "-0.1", "NUMUON_HOLD_FRAC must be at least 0, got -0.1"),
    ("NUMUON_RANK", "64", "NUMUON_RANK is not a knob of this version. Unset it to go on"),
])
def test_a_wrong_knob_is_named(knob: str, value: str, fault: str) -> None:
    assert Config.parse(NUMUON | {knob: value})[1] == [fault]


def test_a_device_without_float64_is_refused() -> None:
    cfg = config(NUMUON | {"DEVICE": "mps"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        (fault,) = Runtime.from_config(cfg, {}).problems(cfg)
    assert fault.startswith("MUON_VARIANT=numuon computes in float64, which DEVICE=mps cannot")


def test_only_numuon_needs_the_module() -> None:
    assert Config().tools() == {}
    assert Config(muon_variant="numuon").tools() == {"MUON_VARIANT=numuon": "numuon"}
