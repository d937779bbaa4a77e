"""Shapes of equal bytes: operations as the model's, bytes as a file's, times as far off as they say.

Guarantees: forward, backward and Muon's operations equal PyTorch's own count; the machines' rates miss the known step times
by no more than they say; every proposal is a valid shape, fills the cap in a real export, and is found again; the spec is
read back as written and each of its arms is a configuration; wrong arguments give one line and exit code 2.
Run: bash scripts/test.sh tests/test_shapes.py
"""
from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, VARIANTS, config, tiny_shape
from test_rd_tools import random_state, random_statistics
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flops
import shapes
from export import ExportOptions, encode_artifact
from prediction import TAIL
from recipe import read_recipe, recipe_path
from train_gpt import GPT, Config, ModelShape, Muon, tensor_shapes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# ms a step on so many H100 with the challenge's baseline code: (machine, ms, changes of the baseline, source)
KNOWN_STEPS = (
    ("h100", 43.54, {}, "record log of the Naive Baseline, 13,780 steps"),
    ("h100", 44.5, {}, "h100send_sp1024_9x512_compgrid_20260320_015442, with regularisers"),
    ("h100", 87.97, {"num_layers": 14, "model_dim": 576}, "h100send_sp1024_d576_l14_20260320_013957, with regularisers"),
    ("h100", 51.89, {"train_seq_len": 2048}, "record log of LongContextSeq2048, 11,564 steps"),
    ("h100", 71.5, {"train_seq_len": 4096, "train_batch_tokens": 393_216}, "record log of TrainingOptSeq4096"),
    ("1xh100", 320.77, {}, "h1001x_sp1024_9x512_plain_20260320_031944"),
    ("1xh100", 320.69, {}, "h1001x_sp1024_9x512_targeted_20260320_033606"),
    ("1xh100", 324.56, {}, "h1001x_sp1024_9x512_compgrid_20260320_030259, with regularisers"),
)
# Not predicted by these rates: another pod of 8xH100 ran the baseline at 65.2 ms, 8xH200 at 41.60, and 11 layers of 512 with
# FlashAttention-3 at 84.5 ms (MLP 3x, 786,432 tokens, sequences of 2048) and 99.0 ms (MLP 4x, 4096 tokens).
SMALL = shapes.Grid(layers=(2, 4, 6, 8), vocabularies=(300,), mlp_mults=(1, 2, 3), kv_groups=(1, 2), sharing=(1, 2))


# --- operations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [17, 24])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operations_are_those_that_pytorch_counts(variant: str, seq_len: int) -> None:
    shape = tiny_shape(**VARIANTS[variant])
    model, ids = GPT(shape, seq_len), torch.zeros(3, seq_len, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH):      # the only kernel whose products the counter sees on a CPU
        with FlopCounterMode(display=False) as forward:
            loss = model(ids, ids)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert forward.get_total_flops() == 3 * flops.forward_flops(shape, seq_len)
    assert forward.get_total_flops() + backward.get_total_flops() == 3 * flops.train_flops(shape, seq_len)


def test_muons_operations_are_those_that_pytorch_counts() -> None:
    shape = tiny_shape(embed_dim=10, num_unique_blocks=2)
    model = GPT(shape, 8)
    updated = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "tok_emb.weight" and
               not any(part in name for part in ("skip_weights", "resid_mix"))]
    for p in updated:
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        Muon(updated, 0.1, 4, torch.float32, CPU).step()
    assert counter.get_total_flops() == flops.muon_flops(tensor_shapes(shape), 4)


def test_the_baseline_takes_159_million_operations_a_token() -> None:
    n = 9 * (2 * 512**2 + 2 * 512 * 256 + 4 * 512**2) + 1024 * 512
    assert flops.train_flops(ModelShape(), 1024) == 1024 * (6 * n + 12 * 9 * 512 * 1024)     # 6 N + 12 L H Q T a token
    assert flops.train_flops(ModelShape(num_unique_blocks=3), 1024) == flops.train_flops(ModelShape(), 1024)


# --- step times ---------------------------------------------------------------------------------------------------------


def errors(name: str) -> list[float]:
    """Predicted over measured step time, minus 1."""
    return [1000 * flops.MACHINES[name].step_s(flops.step_flops(replace(Config(), **changes))) / ms - 1
            for machine, ms, changes, _ in KNOWN_STEPS if machine == name]


def test_known_step_times_are_predicted_as_well_as_said() -> None:
    assert errors("h100") == pytest.approx([0.005, -0.017, -0.067, 0.143, -0.051], abs=0.001)
    assert errors("1xh100") == pytest.approx([0.004, 0.004, -0.008], abs=0.001)


def written_run(folder: Path, steps: dict[int, float], **knobs: object) -> Path:
    """A run folder with these training times in ms by step."""
    folder.mkdir()
    values = {name: getattr(Config(), name) for name in Config.__dataclass_fields__} | knobs
    (folder / "config.json").write_text(json.dumps({"knobs": values, "code_sha256": {}}))
    rows = [json.dumps({"kind": "train", "step": step, "train_ms": ms}) for step, ms in steps.items()]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_a_runs_pace_leaves_its_first_steps_out(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "run", {1: 9000, 10: 10_000, 200: 29_000, 400: 49_000}, model_dim=256, num_layers=4)
    cfg = Config(model_dim=256, num_layers=4)
    assert flops.machine(str(folder)).flops_per_s == pytest.approx(flops.step_flops(cfg) / 0.1)


def test_a_run_too_short_to_have_a_pace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1 logged steps from the tenth on, its pace needs two"):
        flops.machine(str(written_run(tmp_path / "run", {1: 10, 10: 100})))


def test_a_rate_measured_here_is_of_steps_that_were_run(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"NUM_LAYERS": "2", "MODEL_DIM": "16", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "TRAIN_SEQ_LEN": "16",
           "DEVICE": "cpu", "TRAIN_BATCH_TOKENS": "128", "VAL_BATCH_SIZE": "128", "VOCAB_SIZE": "260"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    made = flops.machine_here(warmup=1, steps=3)
    said = re.fullmatch(r"3 steps of 2x16 on device:cpu .*, ([0-9.]+) ms \([0-9.]+ to [0-9.]+\)", made.source)
    assert said is not None
    assert 1000 * made.step_s(flops.step_flops(config(env))) == pytest.approx(float(said[1]), abs=0.051)


# --- proposals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_are_alike_so_one_stands_for_all(variant: str) -> None:
    shape = tiny_shape(**VARIANTS[variant])
    assert shapes.weight_shapes(shape) == tensor_shapes(shape)


@pytest.fixture(scope="module")
def small() -> dict[str, list[shapes.Proposal]]:
    """Proposals for 300,000 bytes, a code of 1,000 bytes included."""
    chosen = {"int8": shapes.with_bits(ExportOptions(int8_keep_float_max_numel=256), "6/8"),
              "rd": shapes.with_bits(ExportOptions(export_scheme="rd", tcq_states=0), "3")}
    return {name: shapes.proposals(300_000, options, code_bytes=1000, grid=SMALL, base=ModelShape(rope_base=5000.0))
            for name, options in chosen.items()}


@pytest.mark.parametrize("scheme", ["int8", "rd"])
def test_proposals_are_valid_different_within_the_promise_and_found_again(
        scheme: str, small: dict[str, list[shapes.Proposal]]) -> None:
    found = small[scheme]
    assert len(found) >= 5
    assert len({p.name for p in found}) == len({p.shape for p in found}) == len(found)
    for p in found:
        assert p.shape.shape_problems() == []
        assert p.shape.rope_base == 5000.0
        assert p.shape.head_dim in range(32, 129)
        assert 0.99 * 300_000 <= p.total_bytes <= 300_000
    again = shapes.proposals(300_000, replace(found[0].options, artifact_cap_bytes=0), code_bytes=1000, grid=SMALL,
                             base=ModelShape(rope_base=5000.0))
    assert again == found
    assert any(p.shape.num_unique_blocks for p in found)


def trained_tails(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Normal rows whose largest weights stand out as those of trained ones do, which the prediction counts on."""
    return {name: torch.where(t.abs() == t.abs().amax(-1, keepdim=True), TAIL * t, t) if t.ndim == 2 else t
            for name, t in state.items()}


@pytest.mark.parametrize(("scheme", "every"), [("int8", 2), ("rd", 8)])
def test_a_proposals_real_artifact_fills_the_cap(scheme: str, every: int, small: dict[str, list[shapes.Proposal]]) -> None:
    """Within 1 % of its prediction, so 98 to 101 % of the cap; rd, which measures as it goes, is never above."""
    for p in small[scheme][::every]:
        state = trained_tails(random_state(tensor_shapes(p.shape)))
        known = random_statistics(state) if scheme == "rd" else None
        total = len(encode_artifact(state, {}, p.options, statistics=known, code_bytes=1000).data) + 1000
        assert total == pytest.approx(p.total_bytes, rel=0.01)
        assert total <= 300_000 or scheme != "rd"


def test_the_search_misses_no_width_of_its_family() -> None:
    options = shapes.with_bits(ExportOptions(int8_keep_float_max_numel=256), "5")
    totals = {}
    for width in shapes.WIDTHS[:40]:
        if heads := shapes.heads_for(width, 2):
            shape = ModelShape(num_layers=3, model_dim=width, num_heads=heads, num_kv_heads=heads // 2)
            totals[width] = shapes.predict_artifact_bytes(tensor_shapes(shape), options)
    assert len(totals) > 10
    for cap in list(totals.values())[3:10]:
        found = shapes.proposals(cap, options, grid=shapes.Grid(layers=(3,), mlp_mults=(2,), kv_groups=(2,)))
        assert [p.shape.model_dim for p in found] == [width for width, size in totals.items() if 0.99 * cap <= size <= cap]


def test_heads_are_as_near_to_64_wide_as_divides() -> None:
    assert [(width, shapes.heads_for(width, 2)) for width in (512, 576, 560, 384, 72)] == [
        (512, 8), (576, 8), (560, 10), (384, 6), (72, None)]


def test_every_depth_is_listed_before_any_depth_twice(small: dict[str, list[shapes.Proposal]]) -> None:
    found = small["int8"]
    depths = sorted({p.shape.num_layers for p in found})
    listed = shapes.spread_over_depths(reversed(found), len(depths), 256)
    assert [p.shape.num_layers for p in listed] == depths
    for p in listed:
        same = [flops.train_flops(q.shape, 256) for q in found if q.shape.num_layers == p.shape.num_layers]
        assert flops.train_flops(p.shape, 256) == min(same)


# --- command line -------------------------------------------------------------------------------------------------------

SEARCH = ["--iso-bytes", "900000", "--recipe", "mini_cpu", "--layers", "3:4", "--mlp", "2,3", "--device", "cpu"]


def test_the_spec_reads_back_and_every_arm_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "iso.toml"
    arguments = [*SEARCH, "--scheme", "rd", "--bits", "3", "3.5", "--vocab", "1024,2048", "--kv-groups", "1,2"]
    assert shapes.main([*arguments, "--toml", str(path), "--seeds", "1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    spec = tomllib.loads(path.read_text())
    assert (spec["name"], spec["base"], spec["seeds"]) == ("iso_900000_rd", "mini_cpu", [1, 2])
    assert spec["control"] in spec["arms"]
    assert [line.split()[0] for line in lines[4:-1]] == list(spec["arms"])
    base = read_recipe(recipe_path("mini_cpu"))
    for name, arm in spec["arms"].items():
        cfg, problems = Config.parse(base | {knob: str(value) for knob, value in arm.items()})
        assert problems == []
        assert (cfg.export_scheme, cfg.artifact_cap_bytes, cfg.export_allocate) == ("rd", 900_000, "uniform")
        assert name.endswith(f"_v{cfg.vocab_size}_b{cfg.export_bits:g}")
    assert ("# DATA_PATH and TOKENIZER_PATH of a tokenizer of 2048 tokens belong here" in path.read_text()) == any(
        arm["VOCAB_SIZE"] == 2048 for arm in spec["arms"].values())


def test_the_recipes_own_shape_is_the_control(tmp_path: Path) -> None:
    recipe, path = tmp_path / "own.env", tmp_path / "iso.toml"
    recipe.write_text("NUM_LAYERS=9\nMODEL_DIM=512\n")
    assert shapes.main(["--iso-bytes", "15700000", "--scheme", "int8_zlib", "--recipe", str(recipe), "--layers", "8:10",
                        "--toml", str(path)]) == 0
    spec = tomllib.loads(path.read_text())
    assert spec["control"] == "l9_d512_h8_k4_m2_v1024_b8"
    assert len(spec["arms"]) > 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--scheme", "rd"], "shapes.py: rd fits whatever bits remain: --bits must name those"),
    (["--scheme", "rd", "--bits", "x"], "shapes.py: --bits for rd must be a number, got 'x'"),
    (["--scheme", "rd", "--bits", "0"], "shapes.py: --bits 0: EXPORT_BITS must be above 0"),
    (["--scheme", "rd", "--bits", "99"], "shapes.py: --bits 99: EXPORT_BITS must be at most 9, got 99"),
    (["--scheme", "int8_zlib", "--recipe", "baseline_8xh100", "--bits", "6.5"],
     "shapes.py: --bits for int8_zlib must be a whole number, or two as 6/8, got '6.5'"),
    (["--scheme", "int8_zlib"], "shapes.py: CAP_POLICY=fit with EXPORT_ALLOCATE=hessian fits every shape to the cap"),
    (["--scheme", "rd", "--bits", "3", "--recipe", "nope"],
     "shapes.py: recipe nope: no such file, and none of scripts/recipes/ (baseline_8xh100, mini_cpu, "),
    (["--scheme", "rd", "--bits", "3", "--device", "nope"],
     "shapes.py: device nope: neither one of h100, 1xh100, 3090, cpu nor a run's folder"),
    (["--scheme", "rd", "--bits", "3", "--iso-bytes", "100"],
     "shapes.py: no shape of the grid fills 99% to all of 100 bytes: widen"),
    (["--scheme", "rd", "--bits", "3", "--layers", "9"],
     "shapes.py: argument --layers: wanted LOW:HIGH, both at least 2, got '9'"),
    (["--scheme", "rd", "--bits", "3", "--vocab", "0"],
     "shapes.py: argument --vocab: wanted whole numbers above 0, as 1024,4096, got '0'"),
])
def test_wrong_arguments_are_one_line_and_exit_code_2(
        arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "iso.toml"
    try:
        code: object = shapes.main([*SEARCH, *arguments, "--toml", str(path)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.out, path.exists()) == (2, "", False)
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
