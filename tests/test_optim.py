"""Optimisers, schedules and the step that uses them.

Guarantees: the groups partition the parameters and have the baseline's rates; Muon equals a plain implementation; a few
steps give the baseline's losses; how a step is cut into micro-batches and ranks does not change it.
Run: python -m pytest tests/test_optim.py (about 25 s, most of it two processes that start).
"""
from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    TINY_SHAPE,
    VARIANTS,
    TinyData,
    build_job,
    config,
    filled_model,
    fixed_batch,
    muon_of,
    tiny_knobs,
    tiny_shape,
)
from torch import Tensor, nn

from train_gpt import Job, Muon, build_optimizers, lr_scale, muon_momentum, orthogonalise, train_step, warm_up


def env_of(changes: dict[str, Any]) -> dict[str, str]:
    """The environment that sets these fields of a shape."""
    return {name.upper(): str(int(value) if isinstance(value, bool) else value) for name, value in changes.items()}


def tiny_optimizers(changes: dict[str, Any], **env: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = filled_model(tiny_shape(**changes))
    return model, build_optimizers(model, config({"DEVICE": "cpu"} | env_of(TINY_SHAPE | changes) | env), CPU)


# ----------------------------------------------------------------------------------------------------------------------
# Groups and rates.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_groups_partition_the_parameters(changes: dict[str, Any]) -> None:
    model, optimizers = tiny_optimizers(changes)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[str]] = {"matrix": [], "embedding": [], "head": [], "vector": []}
    for optimizer in optimizers:
        (group,) = optimizer.param_groups
        members = [names[id(p)] for p in group["params"]]
        kind = {"tok_emb.weight": "embedding", "lm_head.weight": "head"}.get(members[0], "vector")
        found["matrix" if isinstance(optimizer, Muon) else kind] += members
    assert sorted(chain.from_iterable(found.values())) == sorted(names.values())
    assert found["embedding"] == ["tok_emb.weight"]
    assert found["head"] == (["lm_head.weight"] if "lm_head.weight" in names.values() else [])
    assert {name for name in found["matrix"] if not name.startswith("blocks.")} <= {"embed_proj.weight"}
    assert all(name.endswith(".weight") for name in found["matrix"])
    assert not any(name.endswith(".weight") for name in found["vector"])


@pytest.mark.parametrize(("tied", "rates"), [
    (True, {"tok_emb.weight": 0.05, "blocks.0.attn.c_q.weight": 0.04, "skip_weights": 0.04}),
    (False, {"tok_emb.weight": 0.6, "lm_head.weight": 0.008, "blocks.0.attn.c_q.weight": 0.04, "skip_weights": 0.04}),
])
def test_rates_and_betas_are_the_baselines(tied: bool, rates: dict[str, float]) -> None:
    model, optimizers = tiny_optimizers({"tie_embeddings": tied})
    parameters = dict(model.named_parameters())
    for name, rate in rates.items():
        (group,) = [g for o in optimizers for g in o.param_groups if any(p is parameters[name] for p in g["params"])]
        assert group["lr"] == group["base_lr"] == rate
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Adam):
            assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.95), 1e-8)
            assert optimizer.defaults["weight_decay"] == 0
    assert muon_of(optimizers).backend_steps == 5


def test_every_rate_has_its_own_knob() -> None:
    knobs = {"EMBED_LR": "0.1", "HEAD_LR": "0.2", "MATRIX_LR": "0.3", "SCALAR_LR": "0.4", "TIED_EMBED_LR": "0.5"}
    untied = tiny_optimizers({"tie_embeddings": False}, **knobs)[1]
    tied = tiny_optimizers({}, **knobs)[1]
    assert sorted(o.param_groups[0]["lr"] for o in untied) == [0.1, 0.2, 0.3, 0.4]
    assert sorted(o.param_groups[0]["lr"] for o in tied) == [0.3, 0.4, 0.5]


# ----------------------------------------------------------------------------------------------------------------------
# Muon.
# ----------------------------------------------------------------------------------------------------------------------


def plain_orthogonalise(g: Tensor, steps: int) -> Tensor:
    """What the iteration does, seen from the singular values: each goes through the quintic by itself."""
    u, s, vh = torch.linalg.svd(g.double() / (g.double().norm() + 1e-7), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def random_matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (13, 13), (31, 17), (17, 31), (64, 8)], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonalise_moves_each_singular_value_by_the_quintic(shape: tuple[int, int], steps: int) -> None:
    g = random_matrix(*shape)
    found = orthogonalise(g, steps, torch.float32)
    torch.testing.assert_close(found.double(), plain_orthogonalise(g, steps), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (64, 24), (24, 64), (1, 1), (1, 9)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_orthogonalise_brings_all_singular_values_near_one(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    """For matrices whose singular values lie within a factor of 30."""
    u, s, vh = torch.linalg.svd(random_matrix(*shape), full_matrices=False)
    g = scale * (u * torch.logspace(0, -1.5, len(s))) @ vh
    found = torch.linalg.svdvals(orthogonalise(g, 5, dtype).float())
    assert 0.6 < found.min() <= found.max() < 1.3


def test_orthogonalise_keeps_a_zero_matrix_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(5, 3), 5, torch.float32), torch.zeros(5, 3))


def test_muon_equals_a_plain_implementation_over_several_steps() -> None:
    shapes = [(12, 12), (30, 10), (10, 30), (1, 8), (7, 1)]
    parameters = [nn.Parameter(random_matrix(*shape, seed=i)) for i, shape in enumerate(shapes)]
    weights = [p.detach().double() for p in parameters]
    velocities = [torch.zeros_like(w) for w in weights]
    muon = Muon(parameters, lr=0.02, backend_steps=5, dtype=torch.float32, rt=CPU)
    for step, momentum in enumerate((0.85, 0.9, 0.95, 0.95)):
        muon.param_groups[0]["momentum"] = momentum
        muon.param_groups[0]["lr"] = lr = 0.02 / (step + 1)
        for i, p in enumerate(parameters):
            g = random_matrix(*shapes[i], seed=100 * step + i)
            p.grad = g.clone()
            velocities[i] = momentum * velocities[i] + g.double()
            update = plain_orthogonalise(g.double() + momentum * velocities[i], 5)    # Nesterov looks one step ahead
            rows, cols = shapes[i]
            weights[i] = weights[i] - lr * max(1, rows / cols) ** 0.5 * update
        muon.step()
        for p, wanted in zip(parameters, weights, strict=True):
            torch.testing.assert_close(p.detach().double(), wanted, rtol=0, atol=1e-5)


def test_muon_leaves_a_matrix_without_gradient_alone() -> None:
    still, moved = nn.Parameter(random_matrix(4, 4)), nn.Parameter(random_matrix(4, 4))
    muon = Muon([still, moved], lr=0.1, backend_steps=5, dtype=torch.float32, rt=CPU)
    moved.grad = random_matrix(4, 4, seed=2)
    muon.step()
    assert torch.equal(still, random_matrix(4, 4))
    assert not torch.equal(moved, random_matrix(4, 4))
    assert still not in muon.state


@pytest.mark.parametrize(("knob", "compute", "expected"), [
    ("auto", "float32", torch.float32), ("auto", "bfloat16", torch.bfloat16), ("bfloat16", "float32", torch.bfloat16),
    ("float32", "bfloat16", torch.float32),
])
def test_muon_dtype_follows_its_knob(knob: str, compute: str, expected: torch.dtype, tiny_env: dict[str, str]) -> None:
    job = build_job(tiny_env | {"MUON_DTYPE": knob, "COMPUTE_DTYPE": compute})
    assert muon_of(job.optimizers).dtype is expected
    train_step(job, 1.0, 0.9)
    assert all(torch.isfinite(p).all() for p in job.model.parameters())


@pytest.mark.parametrize(("tied", "losses"), [
    (True, [6.663476, 5.165887, 4.707037, 4.452923]), (False, [6.657419, 5.138098, 4.824027, 4.315737]),
])
def test_losses_of_the_first_steps_are_the_baselines(tied: bool, losses: list[float]) -> None:
    """Recorded from the challenge's model and optimisers, with Newton-Schulz in float32 and momentum 0.9."""
    changes = {"num_layers": 5, "mlp_mult": 3, "tie_embeddings": tied}
    model, optimizers = tiny_optimizers(changes, MUON_DTYPE="float32")
    muon_of(optimizers).param_groups[0]["momentum"] = 0.9
    found = []
    for step in range(4):
        loss = model(*fixed_batch(step, 61))
        loss.backward()
        found.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert found == pytest.approx(losses, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "expected"), [
    (0, 1.0), (79, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (99, 0.05), (100, 0.0),
])
def test_rate_falls_over_the_last_steps_when_steps_are_fixed(step: int, expected: float) -> None:
    cfg = config({"ITERATIONS": "100", "WARMDOWN_ITERS": "20", "MAX_WALLCLOCK_SECONDS": "0"})
    assert lr_scale(cfg, step, elapsed_ms=1e9) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("step", "elapsed_s", "expected"), [
    (0, 0, 1.0), (1, 0, 1.0), (100, 10, 1.0), (4800, 480, 1.0), (4801, 480.1, 0.999), (5400, 540, 0.5), (5988, 598.8, 0.01),
    (6000, 600, 0.0), (6001, 601, 0.0),             # 100 ms a step: 1,200 steps are the last 120 s
    (500, 500, 0.0833333333), (100, 599, 0.0001391208),                 # slower steps: warm-down from the start
])
def test_rate_falls_over_the_last_seconds_under_a_wallclock_cap(step: int, elapsed_s: float, expected: float) -> None:
    assert lr_scale(config({}), step, 1000 * elapsed_s) == pytest.approx(expected, abs=1e-3 if expected == 0.999 else 1e-9)


@pytest.mark.parametrize("cap", ["0", "600"])
def test_no_warmdown_keeps_the_rate(cap: str) -> None:
    cfg = config({"WARMDOWN_ITERS": "0", "MAX_WALLCLOCK_SECONDS": cap})
    assert {lr_scale(cfg, step, ms) for step in (0, 10, 19_999) for ms in (0.0, 6e5)} == {1.0}


def test_warmdown_longer_than_the_run_starts_below_one() -> None:
    cfg = config({"ITERATIONS": "100", "WARMDOWN_ITERS": "400", "MAX_WALLCLOCK_SECONDS": "0"})
    assert [lr_scale(cfg, step, 0.0) for step in (0, 50, 99)] == [0.25, 0.125, 0.0025]


@pytest.mark.parametrize(("step", "expected"), [
    (0, 0.85), (1, 0.8502), (250, 0.9), (499, 0.9498), (500, 0.95), (20_000, 0.95),
])
def test_momentum_warms_up_as_the_baselines(step: int, expected: float) -> None:
    assert muon_momentum(config({}), step) == pytest.approx(expected, abs=1e-12)
    assert muon_momentum(config({"MUON_MOMENTUM_WARMUP_STEPS": "0"}), step) == 0.95


# ----------------------------------------------------------------------------------------------------------------------
# The step.
# ----------------------------------------------------------------------------------------------------------------------


def weights_of(job: Job) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in job.model.state_dict().items()}


def assert_close_weights(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        difference = float((found[name] - wanted[name]).abs().max())
        assert difference <= atol, name


SMOOTH = {"ADAM_EPS": "1e-4"}   # at 1e-8 Adam turns the rounding noise of a gradient near zero into a whole step


@pytest.fixture
def one_rank(tiny_env: dict[str, str]) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of three steps in one process, eight micro-batches each."""
    job = build_job(tiny_env | SMOOTH)
    losses = [train_step(job, 1.0, 0.9).item() for _ in range(3)]
    return weights_of(job), losses


def test_a_step_returns_the_mean_loss_of_its_tokens(tiny_env: dict[str, str]) -> None:
    job = build_job(tiny_env)
    batches = [job.loader.next_batch() for _ in range(8)]
    x, y = (torch.cat(side) for side in zip(*batches, strict=True))
    before = job.model(x, y).item()
    job.loader.seek(0)
    assert train_step(job, 1.0, 0.9).item() == pytest.approx(before, abs=1e-5)
    assert job.model(x, y).item() < before - 0.01       # and learns from them


@pytest.mark.parametrize("micro_batch_tokens", ["32", "128", "512"])
def test_micro_batches_do_not_change_the_step(
    micro_batch_tokens: str, tiny_env: dict[str, str], one_rank: tuple[dict[str, Tensor], list[float]]
) -> None:
    job = build_job(tiny_env | SMOOTH | {"MICRO_BATCH_TOKENS": micro_batch_tokens, "RUN_ID": "other"})
    losses = [train_step(job, 1.0, 0.9).item() for _ in range(3)]
    assert losses == pytest.approx(one_rank[1], abs=1e-5)
    assert_close_weights(weights_of(job), one_rank[0])


def test_rate_and_momentum_reach_the_optimisers(tiny_env: dict[str, str]) -> None:
    job = build_job(tiny_env)
    before = weights_of(job)
    train_step(job, 0.0, 0.7)
    assert_close_weights(weights_of(job), before, atol=0)
    assert muon_of(job.optimizers).param_groups[0]["momentum"] == 0.7
    train_step(job, 0.25, 0.7)
    assert sorted(o.param_groups[0]["lr"] for o in job.optimizers) == pytest.approx([0.01, 0.01, 0.0125])
    assert all(p.grad is None for p in job.model.parameters())


def test_gradient_clipping_limits_the_step(tiny_env: dict[str, str]) -> None:
    """A norm far under Adam's epsilon and Newton-Schulz' leaves next to nothing of the update."""
    moved = {}
    for norm in ("0", "1e-12"):
        job = build_job(tiny_env | {"GRAD_CLIP_NORM": norm})
        before = weights_of(job)
        train_step(job, 1.0, 0.9)
        moved[norm] = max(float((t - before[name]).abs().max()) for name, t in weights_of(job).items())
    assert moved["0"] > 1e-2
    assert moved["1e-12"] < 1e-4


def test_warm_up_leaves_no_trace(tiny_env: dict[str, str]) -> None:
    """Weights, optimiser state, loader and generator are as before: the steps after it are bit for bit those without."""
    def draw(*_: object) -> None:
        torch.rand(1)      # as a network with dropout would

    results = []
    for steps in ("0", "3"):
        job = build_job(tiny_env | {"WARMUP_STEPS": steps})
        hook = job.model.register_forward_pre_hook(draw)
        warm_up(job)
        hook.remove()
        results.append(([train_step(job, 1.0, 0.9).item() for _ in range(2)], torch.rand(3).tolist(), weights_of(job)))
    (plain_losses, plain_random, plain_weights), (losses, random, weights) = results
    assert (losses, random) == (plain_losses, plain_random)
    assert_close_weights(weights, plain_weights, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Two ranks.
# ----------------------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys
from pathlib import Path
import torch
from train_gpt import Job, RunFolder, preflight, train_step

torch.set_num_threads(1)
cfg, rt, data = preflight(os.environ)
rt.start(cfg.sdp_backend)

def build():
    return Job.build(cfg, rt, RunFolder(Path(cfg.log_dir) / cfg.run_id, rt.master), data)

job = build()
progress = float(sys.argv[2])
losses = [float(rt.reduce(train_step(job, 1.0, 0.9, progress))) / rt.world_size for _ in range(3)]
weights = {name: t.clone() for name, t in job.model.state_dict().items()}
job.step = 3
path = job.save()
result = job.evaluate(job.compiled, 0)
message = rt.broadcast(b"from rank 0" if rt.master else b"ignored")
train_step(job, 1.0, 0.9, progress)
resumed = build()
resumed.restore(path)
train_step(resumed, 1.0, 0.9, progress)
same = all(torch.equal(a, b) for a, b in zip(job.model.parameters(), resumed.model.parameters(), strict=True))
torch.save({"weights": weights, "losses": losses, "path": str(path), "message": message, "resumed_is_same": same,
            "eval": [result.val_loss, result.val_bpb, result.tokens, result.bytes]}, Path(sys.argv[1]) / f"rank{rt.rank}.pt")
rt.stop()
"""


def run_two_ranks(folder: Path, tiny_data: TinyData, progress: float = 0.0, **knobs: str) -> list[dict[str, Any]]:
    """What two processes over gloo got, started as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")} | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    } | tiny_knobs(tiny_data, folder) | SMOOTH | {"RUN_ID": "ranks", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | knobs
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(progress)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> list[dict[str, Any]]:
    return run_two_ranks(tmp_path_factory.mktemp("ranks"), tiny_data)


def test_two_ranks_equal_one(two_ranks: list[dict[str, Any]], one_rank: tuple[dict[str, Tensor], list[float]]) -> None:
    weights, losses = one_rank
    assert two_ranks[0]["losses"] == pytest.approx(losses, abs=1e-5)
    assert_close_weights(two_ranks[0]["weights"], weights)


def test_ranks_are_bit_identical_to_each_other(two_ranks: list[dict[str, Any]]) -> None:
    assert_close_weights(two_ranks[0]["weights"], two_ranks[1]["weights"], atol=0)
    assert two_ranks[0]["eval"] == two_ranks[1]["eval"]
    assert two_ranks[0]["losses"] == two_ranks[1]["losses"]


def test_two_ranks_evaluate_as_one(two_ranks: list[dict[str, Any]], tiny_env: dict[str, str]) -> None:
    job = build_job(tiny_env)
    job.model.load_state_dict(two_ranks[0]["weights"])
    alone = job.evaluate(job.compiled, 0)
    assert two_ranks[0]["eval"] == pytest.approx([alone.val_loss, alone.val_bpb, alone.tokens, alone.bytes], rel=1e-6)


def test_broadcast_gives_every_rank_the_bytes_of_the_first(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["message"] for rank in two_ranks] == [b"from rank 0"] * 2
    assert CPU.broadcast(b"alone") == b"alone"


def test_two_ranks_resume_bit_for_bit(two_ranks: list[dict[str, Any]]) -> None:
    """Each holds the momentum of half the matrices; the checkpoint holds it all, and each finds its half again."""
    assert [rank["resumed_is_same"] for rank in two_ranks] == [True, True]


def test_a_checkpoint_of_two_ranks_continues_on_one(two_ranks: list[dict[str, Any]], tiny_env: dict[str, str]) -> None:
    through, alone = (build_job(tiny_env | SMOOTH | {"RUN_ID": name}) for name in ("through", "alone"))
    through.restore(Path(two_ranks[0]["path"]))
    assert_close_weights(weights_of(through), two_ranks[0]["weights"], atol=0)
    for _ in range(3):
        train_step(alone, 1.0, 0.9)
    for job in (through, alone):
        train_step(job, 1.0, 0.9)
    assert_close_weights(weights_of(through), weights_of(alone))
