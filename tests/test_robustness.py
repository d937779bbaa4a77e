"""scripts/robustness.py: what pruning and corruption do to a file, and only that.

Guarantees: no pruning and no corruption are the identity; pruning zeroes the smallest weights of matrices alone, in number;
all of them pruned score as zeroed matrices do; corruption at a rate changes that share of the stored integers, within their
range, alike for a seed; a corrupted file can be written, read back and is what was scored; wrong flags end in one line.
Run: bash scripts/test.sh tests/test_robustness.py (about 12 s).
"""
from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyData, build_job, tiny_knobs
from safetensors.torch import save_file

import export
import export_verbs
import robustness
from compare_exports import Subject
from export import Artifact, ExportOptions
from robustness import corrupted, levels_of, positions_of, pruned, replaced, restored
from train_gpt import train_step

FORMATS = {
    "int8": ExportOptions(int8_keep_float_max_numel=0),
    "residual": ExportOptions(int8_keep_float_max_numel=0, int8_residual_rank=1),
    "rd-scalar": ExportOptions(export_scheme="rd", export_bits=4, tcq_states=0),
    "rd-8": ExportOptions(export_scheme="rd", export_bits=4, tcq_states=8),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> dict[str, Path]:
    """A trained tiny model as a checkpoint and in every format."""
    folder = tmp_path_factory.mktemp("files")
    job = build_job(tiny_knobs(tiny_data, folder))
    for _ in range(6):
        train_step(job, 1.0, 0.9)
    state = {name: t.detach().clone() for name, t in job.model.state_dict().items()}
    known = export_verbs.calibrate_state(state, job.meta, data=str(tiny_data.folder), tokenizer=str(tiny_data.tokenizer),
                                         device="cpu", tokens=1024)
    found = {"checkpoint": folder / "model.safetensors"}
    save_file(state, found["checkpoint"], {"artifact_meta": export.pack_meta(job.meta).decode()})
    for name, options in FORMATS.items():
        found[name] = folder / f"{name}.bin"
        export.save_artifact(found[name], state, job.meta, options, statistics=known)
    return found


@pytest.fixture(params=FORMATS)
def artifact(request: pytest.FixtureRequest, files: dict[str, Path]) -> Artifact:
    return export.load_artifact(files[request.param])


def flags(tiny_data: TinyData) -> list[str]:
    return ["--data", str(tiny_data.folder), "--tokenizer", str(tiny_data.tokenizer), "--device", "cpu",
            "--max-tokens", "256"]


# ----------------------------------------------------------------------------------------------------------------------
# Pruning.
# ----------------------------------------------------------------------------------------------------------------------


def test_no_pruning_is_the_identity(files: dict[str, Path]) -> None:
    state, _ = export_verbs.read_with_meta(str(files["checkpoint"]), [])
    found = pruned(state, 0)
    assert all(torch.equal(found[name], t) for name, t in state.items())


@pytest.mark.parametrize("percent", [1, 30, 99.9])
def test_the_smallest_weights_of_matrices_alone_are_zeroed(files: dict[str, Path], percent: float) -> None:
    state, _ = export_verbs.read_with_meta(str(files["checkpoint"]), [])
    before, found = {name: t.clone() for name, t in state.items()}, pruned(state, percent)
    matrices = export.matrices(export.shapes_of(state))
    assert "tok_emb.weight" in matrices
    for name, w in before.items():
        assert torch.equal(state[name], w)              # the caller's stay
        if name not in matrices:
            assert torch.equal(found[name], w)
            continue
        gone = (found[name] == 0) & (w != 0)
        assert abs(int(gone.sum()) + int((w == 0).sum()) - round(percent / 100 * w.numel())) <= int((w == 0).sum())
        assert torch.equal(found[name][~gone], w[~gone])
        assert not gone.any() or w[gone].abs().max() <= w[~gone & (w != 0)].abs().min()


def test_all_weights_pruned_score_as_zeroed_matrices(files: dict[str, Path], tiny_data: TinyData) -> None:
    state, meta = export_verbs.read_with_meta(str(files["checkpoint"]), [])
    args = Namespace(data=str(tiny_data.folder), tokenizer=str(tiny_data.tokenizer), device="cpu", max_tokens=256)
    subject = Subject("", state, meta, args)
    assert subject.evaluate(pruned(state, 100)).val_loss == pytest.approx(np.log(tiny_data.vocab_size), abs=1e-6)
    assert subject.evaluate(state).val_loss < np.log(tiny_data.vocab_size) - 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Corruption.
# ----------------------------------------------------------------------------------------------------------------------


def stored_integers(row: export.PlanRow, values: dict[str, np.ndarray]) -> np.ndarray:
    if row.codec == "grid":
        return levels_of(values["positions"].reshape(row.shape), row.states).reshape(-1)
    return values["codes"]


def test_no_corruption_is_the_identity(artifact: Artifact) -> None:
    found = restored(corrupted(artifact, 0.0, np.random.default_rng(1)))
    assert found.keys() == artifact.state.keys()
    assert all(torch.equal(found[name], t) for name, t in artifact.state.items())


def test_corruption_changes_its_share_of_the_integers_of_matrices(artifact: Artifact) -> None:
    share, found, changed, total = 0.05, corrupted(artifact, 0.05, np.random.default_rng(1)), 0, 0
    matrices = export.matrices(export.shapes_of(artifact.state))
    for row in artifact.plan:
        before, after = artifact.values[row.name], found[row.name].values
        if row.name not in matrices:
            assert all(np.array_equal(before[kind], after[kind]) for kind in before)
            continue
        own, other = stored_integers(row, before), stored_integers(row, after)
        assert own.min() <= other.min() <= other.max() <= own.max()
        assert other.dtype == own.dtype
        changed, total = changed + int((own != other).sum()), total + own.size
    assert abs(changed - share * total) < 5 * np.sqrt(share * total)


def test_a_corrupted_file_can_be_written_and_read_back(artifact: Artifact) -> None:
    tensors = corrupted(artifact, 0.05, np.random.default_rng(2))
    wanted = restored(tensors)
    options = ExportOptions(int8_scale_floor=0.0)
    again = export.decode_artifact(export.assembled(wanted, artifact.meta, options, tensors).data)
    assert all(torch.equal(again.state[name], t) for name, t in wanted.items())
    assert any(not torch.equal(again.state[name], t) for name, t in artifact.state.items())


def test_a_draw_is_its_seed(artifact: Artifact) -> None:
    draws = [restored(corrupted(artifact, 0.1, np.random.default_rng(seed))) for seed in (3, 3, 4)]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    assert any(not torch.equal(draws[0][name], draws[2][name]) for name in draws[0])


@pytest.mark.parametrize("states", [0, 4, 64])
def test_positions_of_their_levels_follow_the_trellis(states: int) -> None:
    levels = np.random.default_rng(1).integers(-5, 6, (50, 7))
    positions = positions_of(levels, states)
    assert np.array_equal(levels_of(positions, states), levels)
    for column in positions.T if states else ():
        state, following = 0, export.trellis(states)
        for position in column:
            assert position % 2 == state % 2
            state = following[state, position // 2 % 2]


def test_a_replaced_code_is_drawn_from_the_others_as_they_occur() -> None:
    codes = np.repeat(np.array([-7, 0, 2], np.int8), (3000, 6000, 1000))
    found = replaced(codes, 1.0, np.random.default_rng(1))
    shares = {-7: (0, 6 / 7, 1 / 7), 0: (3 / 4, 0, 1 / 4), 2: (1 / 3, 2 / 3, 0)}
    for code, wanted in shares.items():
        own = found[codes == code]
        assert [float((own == c).mean()) for c in shares] == pytest.approx(wanted, abs=0.08)


def test_every_other_code_can_replace_one() -> None:
    codes = np.repeat(np.arange(-3, 4, dtype=np.int8), 500)
    found = replaced(codes, 1.0, np.random.default_rng(1))
    assert (found != codes).all()
    assert found.dtype == np.int8
    for code in range(-3, 4):
        counts = np.unique(found[codes == code], return_counts=True)
        assert set(counts[0]) == set(range(-3, 4)) - {code}
        assert counts[1].min() > 50                     # of 83 expected


def test_codes_that_are_all_the_same_stay() -> None:
    assert np.array_equal(replaced(np.full(9, 4, np.int8), 1.0, np.random.default_rng(1)), np.full(9, 4))


# ----------------------------------------------------------------------------------------------------------------------
# The program.
# ----------------------------------------------------------------------------------------------------------------------


def test_files_become_a_table_and_figures(files: dict[str, Path], tiny_data: TinyData, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    paths = [str(files[name]) for name in ("checkpoint", "int8", "rd-8")]
    asked = [*paths, *flags(tiny_data), "--prune", "0", "90", "--corrupt", "0", "0.2", "--draws", "2", "-o", str(out)]
    assert robustness.main(asked) == 0
    written = json.loads(out.read_text())
    assert capsys.readouterr().out.endswith(written["table"] + "\n")
    head, _, *rows = written["table"].splitlines()
    assert head == "| file | val_bpb | 0 % pruned | 90 % pruned | 0 % of codes corrupted | 20 % of codes corrupted |"
    for path, row in zip(paths, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == path
        assert cells[2] == "+0.0"
        assert float(cells[3]) > 10
        own = [r for r in written["rows"] if r["file"] == path and (r["kind"], r["amount"]) == ("corrupt", 0.2)]
        if path == paths[0]:
            assert (cells[4:], own) == (["-", "-"], [])
            continue
        assert cells[4] == "+0.0 (sd 0.0, n 2)"
        (clean,) = (r["val_bpb"] for r in written["rows"] if r["file"] == path and r["kind"] == "none")
        mean = 1000 * (sum(r["val_bpb"] for r in own) / 2 - clean)
        assert len({r["val_bpb"] for r in own}) == 2
        assert float(cells[5].split()[0]) == pytest.approx(mean, abs=0.051)


@pytest.mark.parametrize(("changes", "fault"), [
    (["--prune", "101"], "--prune must be in 0..100, got 101"),
    (["--prune", "nan"], "--prune must be in 0..100, got nan"),
    (["--corrupt", "-0.1"], "--corrupt must be in 0..1, got -0.1"),
    (["--draws", "0"], "--draws must be at least 1, got 0"),
    (["--seed", "-1"], "--seed must be at least 0, got -1"),
    (["--corrupt", "0.1", "0.1"], "0.1 is given twice"),
    (["--output", "missing/out.json"], "argument -o/--output: no folder missing for missing/out.json"),
    (["--prune", "some"], "argument --prune: invalid float value: 'some'"),
    (["--data", "nowhere"], "no fineweb_val_*.bin in nowhere"),
])
def test_a_wrong_flag_ends_in_one_line(changes: list[str], fault: str, files: dict[str, Path], tiny_data: TinyData,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = robustness.main([str(files["int8"]), *flags(tiny_data), *changes])
    except SystemExit as end:       # argparse's own
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.count("\n") == 1
    assert said.err.startswith("robustness.py: ")
    assert fault in said.err
    assert said.out == ""


def test_a_missing_file_is_named_before_any_work(files: dict[str, Path], tiny_data: TinyData,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert robustness.main([str(files["int8"]), "none.bin", *flags(tiny_data)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "robustness.py: none.bin: no such file\n")
