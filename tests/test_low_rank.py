"""scripts/low_rank.py: the comparison of low rank with rd is the one that it claims to be.

Guarantees: factors are those that lose least, by the costs that the exporter uses; what errors in a factor cost is exactly
what its own terms say; a matrix of low rank makes low rank win and a Gaussian one makes it lose; bytes are those of a file's
streams; wrong flags end in one line.
Run: bash scripts/test.sh tests/test_low_rank.py (about 8 s).
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TinyData, build_job, tiny_knobs
from safetensors.torch import save_file
from torch import Tensor

import export
import low_rank
from export import ExportOptions, Statistics, Term
from low_rank import Factors, best_of, coded, compare, total_loss
from train_gpt import train_step

ROWS, COLS = 96, 64


def random_matrix(rows: int, cols: int, seed: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int = 5) -> Term:
    """Inputs of unequal sizes that depend on one another, outputs of unequal costs."""
    x = random_matrix(200, COLS, seed) @ (torch.eye(COLS) + 0.3 * random_matrix(COLS, COLS, seed + 1))
    x = x * torch.logspace(0, 0.7, COLS)
    return Term(random_matrix(ROWS, 1, seed + 2).square().view(-1) + 0.1, x.T @ x / 200)


def as_used(w: Tensor, term: Term) -> Term:
    """The costs with the exporter's damping."""
    cost = export.curvature(w.double().numpy(), [term])
    return Term(torch.from_numpy(cost.rows), torch.from_numpy(cost.moment).float())


@pytest.fixture
def factors() -> tuple[Tensor, Term, Factors]:
    w, term = random_matrix(ROWS, COLS, 1), correlated()
    return w, as_used(w, term), Factors.of(w, [term])


def test_factors_of_full_rank_are_the_matrix(factors: tuple[Tensor, Term, Factors]) -> None:
    w, _, f = factors
    parts, _ = f.cut(COLS)
    torch.testing.assert_close(parts["left"] @ parts["right"], w, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 8, 63])
def test_truncation_loses_the_singular_values_left_out_and_no_more(factors: tuple[Tensor, Term, Factors], rank: int) -> None:
    w, term, f = factors
    parts, _ = f.cut(rank)
    loss = export.expected_loss(w - parts["left"] @ parts["right"], [term])
    assert loss == pytest.approx(0.5 * float(f.values[rank:].square().sum()), rel=1e-3)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    assert loss < export.expected_loss(w - (u[:, :rank] * s[:rank]) @ vh[:rank], [term])     # what ignores the costs


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_error_in_a_factor_costs_what_its_terms_say(factors: tuple[Tensor, Term, Factors], side: str) -> None:
    _, term, f = factors
    parts, terms = f.cut(10)
    error = 0.1 * random_matrix(*parts[side].shape, seed=9)
    product = error @ parts["right"] if side == "left" else parts["left"] @ error
    assert export.expected_loss(error, terms[side]) == pytest.approx(export.expected_loss(product, [term]), rel=1e-3)


def test_bytes_are_those_of_the_streams() -> None:
    state, terms = {"w": random_matrix(ROWS, COLS, 1)}, {"w": (correlated(),)}
    nbytes, restored = coded(state, terms, 3.0, 0)
    options = ExportOptions(export_scheme="rd", export_bits=3.0, tcq_states=0)
    made = export.encode_artifact(state, {}, options, statistics=Statistics(export.weights_digest(state), 0, terms))
    parts = export.decode_artifact(made.data).parts
    assert nbytes == len(made.data) - parts["frame"] - parts["header"] - parts["checksum"]
    assert torch.equal(restored["w"], export.decode_artifact(made.data).state["w"])


def test_low_rank_wins_where_rank_is_low_and_loses_on_noise() -> None:
    term = correlated()
    low = random_matrix(ROWS, 2, 1) @ random_matrix(2, COLS, 2)
    for w, wins in ((low, True), (random_matrix(ROWS, COLS, 3), False)):
        rows = list(compare({"w": w}, {"w": (term,)}, 3.0, [0.0625, 0.25, 0.5], 0))
        best = min(row["excess_bits"] for row in rows)
        assert (best < -1) if wins else (best > 0.3)
        assert [row["share"] for row in rows] == [0.0625, 0.25, 0.5]
        for row in rows:
            assert 0 < row["bytes"] <= 1.1 * row["rd_bytes"]
            assert row["truncation_nats"] <= row["nats"]


def test_what_cannot_be_compared_has_no_row() -> None:
    w = random_matrix(ROWS, COLS, 3)
    nothing = Term(torch.zeros(ROWS), torch.zeros(COLS, COLS))
    assert list(compare({"w": w}, {"w": (nothing,)}, 3.0, [0.5], 0)) == []
    assert [r["share"] for r in compare({"w": w}, {"w": (correlated(),)}, 0.47, [0.1, 1.0], 0)] == [0.1]    # not so coarse


def test_losses_of_several_matrices_add_up() -> None:
    state = {"a": random_matrix(ROWS, COLS, 1), "b": random_matrix(ROWS, COLS, 2)}
    terms = {"a": (correlated(),), "b": (correlated(20),)}
    zero = {name: torch.zeros(ROWS, COLS) for name in state}
    wanted = sum(export.expected_loss(state[name], terms[name]) for name in state)
    assert total_loss(state, zero, terms) == pytest.approx(wanted)
    assert total_loss(state, state, terms) == 0


def test_a_rate_without_a_row_has_a_dash() -> None:
    row = {"checkpoint": "c", "role": "q", "rate": 2.0, "excess_bits": -0.25, "share": 0.5, "truncation_nats": 1.0,
           "rd_nats": 4.0, "full_rank": 8, "rank": 7.0, "stable_rank": 2.5}
    assert list(low_rank.table([row], [1.0, 2.0])) == [
        "| c | full, rank, stable rank | 1 bits | 2 bits |", "|---|---|---|---|",
        "| q | 8, 7, 2.5 | - | -0.25 (rank 50%, truncation 0.25) |", "",
        "low rank wins: c q at 2 bits by 0.250 bits", "low_rank_better:1 of:1"]


def test_the_best_rank_stands_for_low_rank() -> None:
    rows = [{"checkpoint": c, "role": "q", "rate": 2.0, "excess_bits": bits} for c, bits in
            (("a", 0.5), ("a", 0.2), ("a", 0.3), ("b", -0.1))]
    assert [row["excess_bits"] for row in best_of(rows)] == [0.2, -0.1]


# ----------------------------------------------------------------------------------------------------------------------
# The program.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, tiny_data: TinyData) -> list[str]:
    job = build_job(tiny_knobs(tiny_data, tmp_path))
    train_step(job, 1.0, 0.9)       # before it, no gradient reaches most matrices
    save_file(job.model.state_dict(), tmp_path / "model.safetensors", {"artifact_meta": export.pack_meta(job.meta).decode()})
    return [str(tmp_path / "model.safetensors"), "--data", str(tiny_data.folder), "--tokenizer", str(tiny_data.tokenizer),
            "--device", "cpu", "--calibration-tokens", "1024"]


def test_a_checkpoint_becomes_a_table_and_a_verdict(command: list[str], tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert low_rank.main([*command, "--rates", "4", "--ranks", "0.5", "--states", "0", "-o", str(out)]) == 0
    written = json.loads(out.read_text())
    head, _, *rows, _, verdict = (line for line in written["table"].splitlines() if not line.startswith("low rank wins"))
    assert head.startswith(f"| {command[0]} | full, rank, stable rank | 4 bits |")
    roles = ["attn.c_k.weight", "attn.c_q.weight", "attn.c_v.weight", "attn.proj.weight", "mlp.fc.weight",
             "mlp.proj.weight", "tok_emb.weight"]
    assert sorted(row.split("|")[1].strip() for row in rows) == roles
    won = sum(row["excess_bits"] < 0 for row in written["rows"])
    assert verdict == f"low_rank_better:{won} of:7"
    assert capsys.readouterr().out.endswith(written["table"] + "\n")


@pytest.mark.parametrize(("changes", "fault"), [
    (["--rates", "0"], "--rates must be above 0 and at most 9, got 0"),
    (["--ranks", "1.5"], "--ranks must be above 0 and at most 1, got 1.5"),
    (["--states", "3"], "argument --states: invalid choice: 3"),
    (["--output", "missing/out.json"], "argument -o/--output: no folder missing for missing/out.json"),
    (["--data", "nowhere"], "no fineweb_train_*.bin in nowhere"),
])
def test_a_wrong_flag_ends_in_one_line(changes: list[str], fault: str, command: list[str],
                                       capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = low_rank.main([*command, *changes])
    except SystemExit as end:       # argparse's own
        code = end.code
    said = capsys.readouterr()
    assert (code, said.err.count("\n"), said.out) == (2, 1, "")
    assert said.err.startswith("low_rank.py: ")
    assert fault in said.err
