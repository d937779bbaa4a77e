"""Proxies of an artifact's complexity: each agrees with a plain count of the same thing, and their sum with true files.

Guarantees: entropies, families, description lengths and collisions equal slow plain ones; what an exporter cancels moves no
proxy and what it pays for does; predicted bytes are within 1 % of true ones, int8 and rd; the size gauge logs them; the
validator ranks, and refuses bad input in one line. Run: bash scripts/test.sh tests/test_proxies.py (15 s on one core).
"""
from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyData, tiny_knobs
from torch import Tensor

import export
import proxies
import size_gauge
import train_gpt
import validate_proxies
from export import ExportOptions, encode_artifact
from runs import read_metrics

ROLES = {"tok_emb.weight": (300, 64), "blocks.{}.attn.c_q.weight": (64, 64), "blocks.{}.attn.proj.weight": (64, 64),
         "blocks.{}.mlp.fc.weight": (160, 64), "blocks.{}.mlp.proj.weight": (64, 160), "blocks.{}.attn_scale": (64,)}
SHAPES = {role.format(block): shape for role, shape in ROLES.items() for block in range(2)}
META = {"model": {"width": 64}}
PLAIN = {"int8_scale_floor": 0.0, "int8_keep_float_max_numel": 64}


def options_of(**changes: Any) -> ExportOptions:
    return ExportOptions(**(PLAIN | changes))


def normal_state(sigma: float = 0.05, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: sigma * torch.randn(shape, generator=rng) + (len(shape) < 2) for name, shape in SHAPES.items()}


def measured(state: Mapping[str, Tensor], **changes: Any) -> proxies.Proxies:
    return proxies.measure(state, META, options_of(**changes))


def matrices_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: w for name, w in state.items() if w.ndim == 2}


def plain_entropy(symbols: Sequence[Any]) -> float:
    """Bits of all of them under their own histogram, one by one."""
    counts = Counter(symbols)
    return -sum(math.log2(counts[symbol] / len(symbols)) for symbol in symbols)


# ----------------------------------------------------------------------------------------------------------------------
# Bytes.
# ----------------------------------------------------------------------------------------------------------------------


def heavy_tailed(seed: int) -> dict[str, Tensor]:
    return {name: w * (1 + 3 * (w.abs() > 0.1)) for name, w in normal_state(seed=seed).items()}


CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "normal": (normal_state(), {}),
    "heavy tails": (heavy_tailed(1), {}),
    "under the floor": (normal_state(0.1), {"int8_scale_floor": 1 / 127}),
    "nearly all under the floor": (normal_state(0.01), {"int8_scale_floor": 1 / 127}),
    "four bits": (normal_state(), {"weight_quantization_bits": 4, "embed_quantization_bits": 4}),
    "three bits": (normal_state(), {"weight_quantization_bits": 3, "embed_quantization_bits": 3}),
    "columns": (normal_state(), {"int8_axis_mode": "col"}),
    "halves": (normal_state(), {"int8_keep_float_max_numel": 5000}),
    "corrected": (normal_state(), {"int8_residual_rank": 1}),
    "permuted": (normal_state(), {"export_permute": "mlp"}),
}


@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_within_1_percent_of_the_file(case: str) -> None:
    state, changes = CASES[case]
    made = encode_artifact(state, META, options_of(**changes))
    found = proxies.measure(made.state, META, options_of(**changes), made.tensors)
    codes = sum(size for part, size in made.report.parts.items() if part.startswith("codes"))
    assert found.predicted_bytes == pytest.approx(len(made.data), rel=0.01)
    assert found.code_bytes == pytest.approx(codes, rel=0.012)
    assert found.metadata_bytes == pytest.approx(len(made.data) - codes, abs=30)
    assert found.predicted_bytes == found.code_bytes + found.metadata_bytes


def on_grid(w: Tensor, states: int) -> export.Stored:
    """Steps of w's rows and columns, a third of their rms, and the nearest positions that the trellis allows."""
    octaves = [(np.log2(w.square().mean(dim).sqrt().numpy()) * export.OCTAVE / unit).round().astype(np.int64) * unit
               for dim, unit in ((1, export.ROW_TABLE), (0, export.COL_TABLE))]
    sizes = octaves[0]
    rows, cols = np.zeros_like(sizes), octaves[1] - 48
    aim = w.numpy() / export.steps(rows)[:, None] / export.steps(cols)
    positions, state, doubled = np.zeros(w.shape, np.int64), np.zeros(w.shape[1], np.int64), int(states > 0)
    for i in range(len(aim)):
        parity = state & doubled
        code = np.rint((aim[i] - parity) / (1 + doubled)).astype(np.int64)
        positions[i], state = (code << doubled) + parity, export.trellis(states)[state, code & 1]
    kinds = {"row_steps": rows, "col_steps": cols, "row_sizes": sizes}
    bases = [export.middle_of(v) for v in (cols, rows, sizes)] + [export.COL_TABLE, export.ROW_TABLE, export.ROW_TABLE]
    return export.Stored(export.PlanRow("w", tuple(w.shape), "float32", "grid", states=states), {
        "bases": np.array(bases, np.int16), "positions": positions.astype(np.int32).reshape(-1),
        **{kind: values.astype(np.int16) for kind, values in kinds.items()}})


@pytest.mark.parametrize("states", [0, 8])
def test_predicted_bytes_of_a_grid_are_within_2_percent_of_the_file(states: int) -> None:
    """Its coder learns the contexts that the prediction knows from the start."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn((512, 128), generator=rng) * torch.arange(1, 129) / 2000
    options, tensors = ExportOptions(export_scheme="rd", export_bits=4.0, tcq_states=states), {"w": on_grid(w, states)}
    made = export.assembled({"w": w}, META | {"export": options.changed}, options, tensors)
    found = proxies.measure({"w": w}, META, options, tensors)
    assert found.predicted_bytes == pytest.approx(len(made.data), rel=0.02)
    assert found.coarse_bits is None
    codes = (tensors["w"].values["positions"] >> (states > 0)).tolist()
    assert found.order0_bits == pytest.approx(plain_entropy(codes) / w.numel())


def test_a_block_costs_its_huffman_code_and_never_more_than_the_codes_themselves() -> None:
    rng = np.random.default_rng(0)
    flat = rng.integers(-127, 128, 40_000).astype(np.int8)
    assert proxies.deflated_bytes(flat) == flat.size
    few = np.repeat(np.array([0, 1, -1, 100], np.int8), [16_000, 8_000, 4_000, 4_000])[rng.permutation(32_000)]
    for codes in (few, np.rint(20 * rng.standard_normal(60_000)).clip(-127, 127).astype(np.int8)):
        coded = export.deflate_by(codes.tobytes(), export.STRATEGIES[0])        # Huffman codes alone
        assert proxies.deflated_bytes(codes) == pytest.approx(len(coded), rel=0.001)


def test_the_plan_of_a_state_is_the_exporters_own() -> None:
    state = normal_state()
    made, ours = encode_artifact(state, META, options_of()).tensors, proxies.uniform(state, options_of())
    assert list(made) == list(ours)
    for name, stored in ours.items():
        assert all(np.array_equal(stored.values[kind], made[name].values[kind]) for kind in made[name].values)


def test_protected_bits_are_those_of_their_streams() -> None:
    state = normal_state() | {"blocks.4.mlp.proj.weight": normal_state()["blocks.0.mlp.proj.weight"] * 0}   # not early
    made, found = encode_artifact(state, META, options_of()), measured(state)
    parts = made.report.parts
    early = [f"blocks.{i}.{part}.proj.weight" for i in range(2) for part in ("attn", "mlp")]
    assert found.embedding_bits == pytest.approx(8 * parts["codes:tok_emb.weight"] / (300 * 64), rel=0.01)
    assert found.early_projection_bits == pytest.approx(
        8 * sum(parts[f"codes:{name}"] for name in early) / sum(state[name].numel() for name in early), rel=0.01)
    assert found.small_bits == 8 * parts["f32"] / (2 * 64)


# ----------------------------------------------------------------------------------------------------------------------
# Bits.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [0.0, 1 / 127])
def test_entropies_equal_plain_counts(floor: float) -> None:
    state, found = normal_state(0.08), measured(normal_state(0.08), int8_scale_floor=floor)
    for bits, value in ((8, found.order0_bits), (proxies.COARSE_BITS, found.coarse_bits)):
        total = weights = 0.0
        for w in matrices_of(state).values():
            step = np.maximum(w.abs().amax(1).numpy() / (2 ** (bits - 1) - 1), floor).astype(np.float16).astype(np.float32)
            total += plain_entropy(np.rint(w.numpy() / step[:, None]).reshape(-1).tolist())
            weights += w.numel()
        assert value == pytest.approx(total / weights, rel=1e-3)


def test_collisions_equal_a_count_over_all_pairs_of_symbols() -> None:
    symbols = [3, 1, 3, 3, 0, 1, 7]
    alike = sum(a == b for a, b in itertools.combinations(symbols, 2))
    assert proxies.collision_bits(np.bincount(symbols)) == pytest.approx(-math.log2(alike / math.comb(7, 2)))
    assert proxies.collision_bits(np.bincount([0, 1, 2])) == pytest.approx(math.log2(3))      # one coincidence is granted


def test_pairs_of_independent_codes_save_nothing_and_pairs_of_a_codebook_do() -> None:
    """16 words at random take 4 bits a pair; its codes alone, 16 first and 16 second ones apart, 5 bits each."""
    rng, words = torch.Generator().manual_seed(0), torch.stack([torch.arange(16), 40 + torch.arange(16)], 1)
    row = words[torch.randint(16, (256, 64), generator=rng)].reshape(256, 128).float()
    book = {"blocks.0.mlp.fc.weight": torch.cat([row / 127, torch.ones(256, 1)], 1)}      # 1: one step for all; left over
    assert measured(book).pair_saved_bits == pytest.approx(3.0, abs=0.01)
    independent = measured(normal_state()).pair_saved_bits
    assert independent is not None
    assert abs(independent) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Exceptions.
# ----------------------------------------------------------------------------------------------------------------------


def with_outliers(places: Sequence[tuple[int, int, int]], size: float = 1.0) -> dict[str, Tensor]:
    """Two layers' matrices of one role, +-0.01, with outliers at (layer, row, column)."""
    sign = 1 - 2.0 * (torch.arange(160)[:, None] + torch.arange(64)) .remainder(2)
    state = {f"blocks.{layer}.mlp.fc.weight": 0.01 * sign for layer in range(2)}
    state = {name: w.clone() for name, w in state.items()}
    for layer, row, col in places:
        state[f"blocks.{layer}.mlp.fc.weight"][row, col] = size
    return state


def test_families_are_the_rows_and_columns_of_a_role_and_their_price_counts_subsets() -> None:
    places = [(0, 5, 9), (1, 5, 9), (1, 5, 30), (0, 7, 9)]
    found = measured(with_outliers(places))
    assert found.exceptions == 4
    assert found.exception_families == 2 + 2        # rows 5 and 7, columns 9 and 30, in whichever layer

    def gamma(n: int) -> int:
        return 2 * math.floor(math.log2(n + 1)) + 1

    ways = [1 + gamma(2) + math.log2(math.comb(groups, 2)) + gamma(4) + math.log2(math.comb(2 * places_each, 4))
            for groups, places_each in ((160, 2 * 64), (64, 2 * 160))]
    assert found.exception_bytes == pytest.approx((min(ways) + 4 * 16) / 8, rel=1e-9)


def test_more_outliers_take_longer_to_tell_and_scattered_ones_longer_than_those_of_a_family() -> None:
    scattered = [(i % 2, 3 * i, (7 * i) % 64) for i in range(24)]
    lengths = [measured(with_outliers(scattered[:n])).exception_bytes for n in (0, 1, 6, 24)]
    assert lengths == sorted(set(lengths))
    column = measured(with_outliers([(i % 2, 3 * i, 9) for i in range(24)]))
    assert column.exception_bytes < 0.9 * lengths[-1]
    assert column.exception_families == 24 + 1


def test_exceptions_are_beyond_four_rms_of_their_row() -> None:
    w = torch.full((2, 1000), 0.01)
    w[0, 3], w[1, 3] = 0.0405, 0.0400       # four times the rms of the rows with it: 0.04031, 0.04030
    assert proxies.exceptions_of(w).nonzero().tolist() == [[0, 3]]


# ----------------------------------------------------------------------------------------------------------------------
# Invariances.
# ----------------------------------------------------------------------------------------------------------------------


def scaled_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each row by a power of two, which fp16 scales follow exactly."""
    return {name: w * 2.0 ** (torch.arange(len(w))[:, None] % 5 - 2) if w.ndim == 2 else w for name, w in state.items()}


def test_without_a_floor_the_size_of_rows_moves_nothing_but_their_scales() -> None:
    plain, scaled = (asdict(measured(state)) for state in (normal_state(), scaled_rows(normal_state())))
    moved = {name for name in plain if plain[name] != scaled[name]}
    assert moved <= {"metadata_bytes", "predicted_bytes"}


def test_under_the_floor_larger_weights_cost_more() -> None:
    small, large = (measured(normal_state(sigma), int8_scale_floor=1 / 127) for sigma in (0.05, 0.1))
    for name in ("predicted_bytes", "code_bytes", "order0_bits", "embedding_bits", "early_projection_bits"):
        assert getattr(small, name) < getattr(large, name)
    assert small.exceptions == large.exceptions


def test_the_order_of_tensors_and_the_generator_do_not_matter(fresh_rng: None) -> None:
    before = torch.get_rng_state()
    state = normal_state()
    assert measured(state) == measured(dict(reversed(state.items()))) == measured(state)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("state", [
    {"skip_weights": torch.ones(3, 4)}, {"blocks.0.mlp.fc.weight": torch.zeros(64, 64)},
    {"blocks.0.mlp.fc.weight": torch.arange(-32.0, 33)[:, None].bfloat16(), "n": torch.tensor(3)},
    {"bank": torch.ones(4, 5, 6)}], ids=["no matrix", "zeros", "one column", "no pairs of rows"])
def test_awkward_states_have_proxies_that_json_can_hold(state: dict[str, Tensor]) -> None:
    found = measured(state)
    json.dumps(asdict(found), allow_nan=False)
    assert found.predicted_bytes == pytest.approx(len(encode_artifact(state, META, options_of()).data), abs=40)


# ----------------------------------------------------------------------------------------------------------------------
# In a run, and against its checkpoints.
# ----------------------------------------------------------------------------------------------------------------------


UNTRAINED_ROWS = 0.1    # of the prediction: embeddings of tokens that never came are alike, and deflate finds that


@pytest.fixture(scope="module")
def run_folder(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, measured and kept every second one; the code is not packed, which takes longer than all else."""
    knobs = tiny_knobs(tiny_data, tmp_path_factory.mktemp("proxies")) | {
        "ITERATIONS": "6", "ARTIFACT_EVERY": "2", "CHECKPOINT_EVERY": "2", "CHECKPOINT_KEEP": "9",
        "INT8_KEEP_FLOAT_MAX_NUMEL": "512"}
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_gpt, size_gauge):
            patch.setattr(module, "code_bytes", lambda _: 40_000)
        assert train_gpt.main(knobs) == 0
    return Path(knobs["LOG_DIR"]) / knobs["RUN_ID"]


def test_the_size_gauge_logs_all_proxies_beside_the_true_size(run_folder: Path) -> None:
    rows = read_metrics(run_folder, "artifact")
    assert rows
    for row in rows:
        assert {f.name for f in fields(proxies.Proxies)} <= row.keys()
        assert row["predicted_bytes"] == pytest.approx(row["artifact_bytes"], rel=UNTRAINED_ROWS)
        assert 0 < row["stable_rank_share"] < row["rank_share"] <= 1
    said = (run_folder / "train.log").read_text()
    assert f"predicted_bytes:{rows[-1]['predicted_bytes']:.0f} metadata_bytes:" in said


@pytest.mark.parametrize(("values", "rank", "stable"), [
    ([2.0, 2.0, 2.0], 3, 3.0), ([4.0, 2.0, 0.0], 2, 1.25), ([1.0, 1.1e-3, 0.9e-3], 2, 1.0), ([0.0, 0.0, 0.0], 0, 0.0),
])
def test_gauges_of_a_known_spectrum(values: list[float], rank: int, stable: float) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double(), full_matrices=False)
    found = size_gauge.ranks((u * torch.tensor(values) @ vh).float())
    assert int(found[0]) == rank
    assert float(found[1]) == pytest.approx(stable, abs=1e-4)


def test_the_share_of_rank_is_the_mean_over_the_matrices_of_the_blocks() -> None:
    thin = torch.diag(torch.tensor([3.0, 3.0, 0.0, 0.0]))
    state = {"blocks.0.mlp.fc.weight": torch.eye(4), "blocks.1.mlp.fc.weight": thin, "tok_emb.weight": thin,
             "blocks.0.resid_mix": torch.zeros(2, 4)}
    assert size_gauge.rank_shares(state) == pytest.approx({"rank_share": 0.75, "stable_rank_share": 0.75})


def test_every_proxy_but_one_is_ranked_against_its_own_true_value(
        run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "found.json"
    monkeypatch.setattr(export, "compiled", lambda _: None)     # quicker than compiling, on 34,000 weights
    assert validate_proxies.main([str(run_folder), "--rd-tokens", "512", "-o", str(output)]) == 0
    said, found = capsys.readouterr().out, json.loads(output.read_text())
    names = {f.name for f in fields(proxies.Proxies)}
    schemes = ("int8 floored at 1/127", "int8 without a floor", "rd at one dial")
    assert list(found["correlations"]) == list(schemes)
    for scheme in schemes[:2]:
        assert {entry["proxy"] for entry in found["correlations"][scheme]} == names - {"pair_saved_bits"}
        predicted = found["correlations"][scheme][0]
        assert predicted["proxy"] == "predicted_bytes"
        assert predicted["error"] < UNTRAINED_ROWS
        assert predicted["n_within"] == {"tiny": 3}
        assert f"{scheme}\n\n| proxy |" in said
    assert len(found["rows"]) == 9
    floored = [row for row in found["rows"] if row["scheme"] == schemes[0]]
    assert [row["step"] for row in floored] == [6, 4, 2]


def test_true_values_of_exceptions_are_those_of_a_file_that_keeps_them() -> None:
    state = dict(sorted(with_outliers([(0, 5, 9), (1, 5, 30)]).items()))
    tensors = validate_proxies.keeping_exceptions(state, proxies.uniform(state, options_of()))
    made = export.assembled(state, META, options_of(), tensors)
    artifact = export.decode_artifact(made.data)
    assert {row.name: (row.kept, row.kept_count) for row in artifact.plan} == dict.fromkeys(state, ("entries", 1))
    for name, (row, col) in zip(state, ((5, 9), (5, 30)), strict=True):
        assert artifact.state[name][row, col] == 1.0
        assert artifact.values[name]["index"].tolist() == [row * 64 + col]


def test_rho_is_that_of_ranks_and_nothing_where_one_side_never_changes() -> None:
    assert validate_proxies.rho([(1, 10), (2, 20), (9, 15), (10, 900)]) == pytest.approx(0.8)     # 1 - 6 * 2 / (4 * 15)
    assert validate_proxies.rho([(1, 1), (2, 1), (3, 1)]) is None
    assert validate_proxies.rho([(1, 1), (2, 2)]) is None


FAULTS = {
    "no such run": (["nowhere"], "nowhere is no run and holds none"),
    "no exporter's knob": (["RUN", "--knob", "MODEL_DIM=8"], "--knob takes the exporter's knobs, got MODEL_DIM"),
    "no value": (["RUN", "--knob", "INT8_AXIS_MODE"], "a knob must be NAME=VALUE, got INT8_AXIS_MODE"),
    "no number": (["RUN", "--knob", "INT8_CLIP_SIGMAS=wide"], "INT8_CLIP_SIGMAS must be a number, got 'wide'"),
    "out of range": (["RUN", "--knob", "WEIGHT_QUANTIZATION_BITS=9"], "WEIGHT_QUANTIZATION_BITS must be 2..8 or 16, got 9"),
    "another plan": (["RUN", "--knob", "EXPORT_SCHEME=rd"], "--knob cannot set EXPORT_SCHEME"),
    "tokens": (["RUN", "--rd-tokens", "-1"], "--rd-tokens must be at least 0, got -1"),
    "no folder": (["RUN", "-o", "nowhere/x.json"], "-o nowhere/x.json: nowhere is no folder"),
    "no run named": ([], "the following arguments are required: RUN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_done_is_one_line(fault: str, run_folder: Path, capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments, message = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    arguments = [str(run_folder) if argument == "RUN" else argument for argument in arguments]
    try:
        code: Any = validate_proxies.main(arguments)
    except SystemExit as left:
        code = left.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"validate_proxies.py: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_of_too_few_checkpoints_is_refused(
        run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((run_folder / "config.json").read_text())
    assert validate_proxies.main([str(tmp_path)]) == 2
    assert "holds 0 step_*.safetensors, wanted at least 3; train with CHECKPOINT_EVERY" in capsys.readouterr().err


def test_a_trained_state_is_predicted_under_both_floors(run_folder: Path) -> None:
    state, meta = validate_proxies.export_verbs.read_with_meta(
        str(run_folder / "checkpoints" / "step_00000006.safetensors"), [])
    state["tok_emb.weight"] = state["tok_emb.weight"][260:]      # no fallback bytes: see UNTRAINED_ROWS
    for floor in (0.0, 1 / 127):
        options = ExportOptions(int8_scale_floor=floor, int8_keep_float_max_numel=512)
        true_bytes = len(encode_artifact(state, meta, options).data)
        assert proxies.measure(state, meta, options).predicted_bytes == pytest.approx(true_bytes, rel=0.015)
