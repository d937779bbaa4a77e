"""Config: a run starts only when its whole configuration makes sense, and says everything that is wrong with it at once.

Guarantees: knobs parse by type and strictly; defaults are the challenge's baseline; malformed values, unknown names and
inconsistent shapes are reported in one list; no combination of values makes the parser itself fail; no knob is dead.
Run: python -m pytest tests/test_config.py (about 6 s).
"""
from __future__ import annotations

import ast
import random
from dataclasses import fields

import pytest
from conftest import ROOT, config

from train_gpt import Config, ConfigError, Runtime, preflight, tensor_shapes

# The challenge's defaults, typed off its script; what they mean is in Config.
BASELINE = {
    "DATA_PATH": "./data/datasets/fineweb10B_sp1024", "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model",
    "SEED": 1337, "VAL_BATCH_SIZE": 524288, "VAL_LOSS_EVERY": 1000, "TRAIN_LOG_EVERY": 200, "ITERATIONS": 20000,
    "WARMDOWN_ITERS": 1200, "WARMUP_STEPS": 20, "TRAIN_BATCH_TOKENS": 524288, "TRAIN_SEQ_LEN": 1024,
    "MAX_WALLCLOCK_SECONDS": 600.0, "QK_GAIN_INIT": 1.5, "VOCAB_SIZE": 1024, "NUM_LAYERS": 9, "NUM_KV_HEADS": 4,
    "MODEL_DIM": 512, "NUM_HEADS": 8, "MLP_MULT": 2, "TIE_EMBEDDINGS": True, "ROPE_BASE": 10000.0, "LOGIT_SOFTCAP": 30.0,
    "EMBED_LR": 0.6, "HEAD_LR": 0.008, "TIED_EMBED_LR": 0.05, "TIED_EMBED_INIT_STD": 0.005, "MATRIX_LR": 0.04,
    "SCALAR_LR": 0.04, "MUON_MOMENTUM": 0.95, "MUON_BACKEND_STEPS": 5, "MUON_MOMENTUM_WARMUP_START": 0.85,
    "MUON_MOMENTUM_WARMUP_STEPS": 500, "BETA1": 0.9, "BETA2": 0.95, "ADAM_EPS": 1e-8, "GRAD_CLIP_NORM": 0.0,
}
# What leaves the baseline's graph, data and file alone.
OFF = {
    "NUM_UNIQUE_BLOCKS": 0, "WINDOW_SIZE": 0, "EMBED_DIM": 0, "ROPE_DTYPE": "auto", "MICRO_BATCH_TOKENS": 0,
    "VAL_MAX_TOKENS": 0, "INT8_SCALE_FLOOR": 1 / 127, "INT8_AXIS_MODE": "row", "WEIGHT_QUANTIZATION_BITS": 8,
    "EMBED_QUANTIZATION_BITS": 8, "ARTIFACT_CAP_BYTES": 16_000_000, "INT8_CLIP_SIGMAS": 0.0,
    "INT8_KEEP_FLOAT_MAX_NUMEL": 65_536, "INT8_RESIDUAL_RANK": 0, "EXPORT_PERMUTE": "off", "EXPORT_ROTATE": False,
    "EXPORT_ALLOCATE": "uniform",
    "CAP_POLICY": "refuse", "CALIBRATION_TOKENS": 0, "SENSITIVITY_MAP": "", "ARTIFACT_EVERY": 0,
    "RUN_ID": "", "RESUME": "", "CHECKPOINT_EVERY": 0, "DEVICE": "auto",
}
# The names of the user's earlier programs (design, section 2): each is a knob here or is refused, never ignored.
EARLIER_NAMES = """
NUM_UNIQUE_BLOCKS WINDOW_SIZE EMBED_DIM COMPRESSION_REG_WEIGHT COMPRESSION_REG_INTERVAL COMPRESSION_REG_WARMUP_STEPS
COMPRESSION_REG_SAMPLE_TENSORS COMPRESSION_REG_MAX_COLS COMPRESSION_GRID_REG_WEIGHT COMPRESSION_SCALE_REG_WEIGHT
COMPRESSION_RANK1_REG_WEIGHT TERNARY_REG_WEIGHT OUTLIER_REG_WEIGHT EVAL_CACHE_MIX_WEIGHT EVAL_BIGRAM_MIX_WEIGHT
EVAL_CACHE_SIZE EVAL_SEQ_LEN EVAL_STRIDE VAL_MAX_TOKENS ROUNDTRIP_VAL_MAX_TOKENS FINAL_ROUNDTRIP_EVAL SAVE_RAW_CHECKPOINT
ENABLE_TORCH_COMPILE SDP_BACKEND INT8_AXIS_MODE INT8_RESIDUAL_RANK INT8_RESIDUAL_BUDGET_BYTES INT8_RESIDUAL_POWER_ITERS
INT8_TARGETED_RESIDUAL_MODE WEIGHT_QUANTIZATION_BITS EMBED_QUANTIZATION_BITS
"""
ORDINARY_NAMES = """
RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR
MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE
TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS CUDA_VISIBLE_DEVICES NCCL_DEBUG NCCL_IB_DISABLE
PYTORCH_CUDA_ALLOC_CONF PATH HOME USER LOGNAME SHELL SHLVL PWD OLDPWD LANG LC_ALL TERM TMPDIR TZ EDITOR PAGER DISPLAY
HOSTNAME MAIL LS_COLORS _ VIRTUAL_ENV PYTHONPATH PYTHONUNBUFFERED CONDA_PREFIX SSH_AUTH_SOCK SLURM_JOB_ID SLURM_NTASKS
CI HF_HOME HF_ENDPOINT HF_TOKEN MATCHED_FINEWEB_REPO_ID WANDB_API_KEY COLUMNS LINES CORPUS_DIR CHECKPOINT_DISABLE
"""

FLOAT_KNOBS = sorted(f.name.upper() for f in fields(Config) if type(f.default) is float)
INT_KNOBS = sorted(f.name.upper() for f in fields(Config) if type(f.default) is int)
BOOL_KNOBS = sorted(f.name.upper() for f in fields(Config) if type(f.default) is bool)
CHOICE_KNOBS = sorted(f.name.upper() for f in fields(Config) if f.metadata["choices"])


def problems_of(**env: object) -> list[str]:
    return Config.parse({name: str(value) for name, value in env.items()})[1]


def test_defaults_are_the_baselines() -> None:
    cfg = config({})
    assert {name: getattr(cfg, name.lower()) for name in BASELINE | OFF} == BASELINE | OFF


def test_every_type_of_knob_is_parsed() -> None:
    cfg = config({
        "ITERATIONS": "30", "MATRIX_LR": "2e-2", "TIE_EMBEDDINGS": "0", "FINAL_ROUNDTRIP_EVAL": "1",
        "DATA_PATH": "/some/where", "INT8_AXIS_MODE": "col", "MAX_WALLCLOCK_SECONDS": "0",
    })
    assert (cfg.iterations, cfg.matrix_lr, cfg.data_path, cfg.int8_axis_mode) == (30, 0.02, "/some/where", "col")
    assert cfg.tie_embeddings is False
    assert cfg.final_roundtrip_eval is True
    assert type(cfg.max_wallclock_seconds) is float


@pytest.mark.parametrize("text", ["", "true", "True", "yes", "no", "2", "-1", "1.0", " 1"])
@pytest.mark.parametrize("name", BOOL_KNOBS)
def test_booleans_are_0_or_1_and_nothing_else(name: str, text: str) -> None:
    assert problems_of(**{name: text}) == [f"{name} must be 0 or 1, got {text!r}"]


@pytest.mark.parametrize("text", ["", "many", "1.5", "1e3", "0x10", "nan"])
@pytest.mark.parametrize("name", INT_KNOBS)
def test_malformed_whole_numbers_name_the_knob_and_the_value(name: str, text: str) -> None:
    assert problems_of(**{name: text}) == [f"{name} must be a whole number, got {text!r}"]


@pytest.mark.parametrize("name", FLOAT_KNOBS)
def test_malformed_numbers_name_the_knob_and_the_value(name: str) -> None:
    assert problems_of(**{name: "0,5"}) == [f"{name} must be a number, got '0,5'"]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOAT_KNOBS)
def test_values_that_are_not_finite_are_refused(name: str, text: str) -> None:
    found = problems_of(**{name: text})
    assert found
    assert all(line.startswith(f"{name} must be ") and line.endswith(f"got {text}") for line in found)


@pytest.mark.parametrize("name", CHOICE_KNOBS)
def test_choices_are_listed_when_missed(name: str) -> None:
    choices = next(f.metadata["choices"] for f in fields(Config) if f.name.upper() == name)
    assert problems_of(**{name: "tpu"}) == [f"{name} must be one of {', '.join(choices)}, got 'tpu'"]
    needed = {"hessian": {"CALIBRATION_TOKENS": 1}, "sensitivity": {"SENSITIVITY_MAP": "map.json"},
              "rd": {"CALIBRATION_TOKENS": 1}, "EVAL_SIDECAR_SCOPE": {"EVAL_MIX_LEARN": 1},
              "TTT_OPTIMIZER": {"TTT_MODE": "lora"}, "TTT_RESET": {"TTT_MODE": "sgd"}}
    for choice in choices:
        assert problems_of(**{name: choice}, **needed.get(name, {}), **needed.get(choice, {})) == []


@pytest.mark.parametrize(("env", "wanted"), [
    ({"NUM_KV_HEADS": 3}, "NUM_HEADS=8"),
    ({"NUM_HEADS": 7, "NUM_KV_HEADS": 7}, "MODEL_DIM=512"),
    ({"NUM_HEADS": 512}, "even head width"),
    ({"NUM_UNIQUE_BLOCKS": 10}, "NUM_LAYERS=9"),
    ({"EMBED_DIM": 513}, "MODEL_DIM=512"),
    ({"VOCAB_SIZE": 65537}, "at most 65536"),
    ({"WINDOW_SIZE": -1}, "at least 0"),
    ({"NUM_LAYERS": 0}, "at least"),
    ({"ROPE_BASE": 1.0}, "above 1"),
    ({"LOGIT_SOFTCAP": 0.0}, "above 0"),
    ({"ITERATIONS": -1}, "at least 0"),
    ({"CHECKPOINT_KEEP": 0}, "at least 1"),
    ({"BETA2": 1.0}, "[0, 1)"),
    ({"ADAM_EPS": 0.0}, "above 0"),
    ({"TRAIN_BATCH_TOKENS": 8192 + 1024}, "a multiple of 8 * TRAIN_SEQ_LEN = 8192"),
    ({"VAL_BATCH_SIZE": 8191}, "at least 8 * TRAIN_SEQ_LEN = 8192"),
    ({"MICRO_BATCH_TOKENS": 3 * 1024}, "divides TRAIN_BATCH_TOKENS=524288"),
    ({"MICRO_BATCH_TOKENS": 512}, "a multiple of TRAIN_SEQ_LEN=1024"),
    ({"WEIGHT_QUANTIZATION_BITS": 9}, "2..8 or 16"),
    ({"EMBED_QUANTIZATION_BITS": 1}, "2..8 or 16"),
    ({"INT8_SCALE_FLOOR": -1.0}, "at least 0"),
    ({"INT8_SCALE_FLOOR": 1.5}, "0..1"),
    ({"INT8_RESIDUAL_RANK": 33}, "at most 32"),
    ({"INT8_RESIDUAL_POWER_ITERS": 0}, "at least 1"),
    ({"CALIBRATION_TOKENS": -1}, "at least 0"),
], ids=str)
def test_inconsistent_value_is_refused_with_what_was_found_and_wanted(env: dict[str, float], wanted: str) -> None:
    name, value = next(iter(env.items()))
    assert any(name in line and str(value) in line and wanted in line for line in problems_of(**env))


@pytest.mark.parametrize("run_id", ["a/b", "a/", "/a", "../a", "..", "."])
def test_run_id_with_a_path_in_it_is_refused(run_id: str) -> None:
    assert problems_of(RUN_ID=run_id) == [f"RUN_ID must be a plain folder name, got {run_id!r}"]


@pytest.mark.parametrize("seed", [2**64, 10**30])
def test_seed_that_torch_cannot_take_is_refused(seed: int) -> None:
    (line,) = problems_of(SEED=seed)
    assert line.startswith("SEED must be ")


@pytest.mark.parametrize("name", ["VAL_MAX_TOKENS", "ROUNDTRIP_VAL_MAX_TOKENS"])
def test_validation_on_less_than_one_sequence_is_refused(name: str) -> None:
    """It would score nothing and divide by zero after the training."""
    (line,) = problems_of(**{name: 1023})
    assert line.startswith(f"{name} must be ")
    assert problems_of(**{name: 1024}) == []


def test_malformed_unknown_and_inconsistent_are_reported_together() -> None:
    found = problems_of(
        ITERATIONS="many", TIE_EMBEDDINGS="yes", MATRX_LR=0.1, TTT_LR=0.1, NUM_KV_HEADS=3, BETA1=2, RUN_ID="a/b",
        TRAIN_BATCH_TOKENS=1000, WEIGHT_QUANTIZATION_BITS=1,
    )
    assert sorted(text.split()[0] for text in found) == [
        "BETA1", "ITERATIONS", "MATRX_LR", "NUM_KV_HEADS", "RUN_ID", "TIE_EMBEDDINGS", "TRAIN_BATCH_TOKENS", "TTT_LR",
        "WEIGHT_QUANTIZATION_BITS",
    ]


def test_data_faults_join_the_list_of_the_configuration(tmp_path) -> None:
    env = {"ITERATIONS": "many", "DATA_PATH": str(tmp_path), "TOKENIZER_PATH": str(tmp_path / "none.model"), "DEVICE": "cpu",
           "LOG_DIR": str(tmp_path)}
    with pytest.raises(ConfigError) as caught:
        preflight(env)
    text = str(caught.value)
    for part in ("ITERATIONS must be", "no fineweb_train_*.bin", "no fineweb_val_*.bin", "none.model: cannot be read"):
        assert part in text
    assert caught.value.problems == text.split("\n")


@pytest.mark.parametrize(("name", "near"), [
    ("MATRX_LR", "MATRIX_LR"), ("ITERATION", "ITERATIONS"), ("NUM_LAYER", "NUM_LAYERS"), ("VOCABSIZE", "VOCAB_SIZE"),
    ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"), ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"), ("MODEL_DIMS", "MODEL_DIM"),
    ("GRAD_CLIPNORM", "GRAD_CLIP_NORM"),
])
def test_near_miss_of_a_knob_is_refused_with_a_suggestion(name: str, near: str) -> None:
    (line,) = problems_of(**{name: 1})
    assert line.startswith(f"{name} is not a knob")
    assert f"did you mean {near}?" in line


@pytest.mark.parametrize("name", [
    "TRAIN_TOKENS", "VAL_SOMETHING", "MUON_NESTEROV_OFF", "TTT_STEPS", "RATE_REG_LAMBDA", "NOISE_QAT_START",
    "CONTROL_TENSOR_NAME_PATTERNS", "EXPORT_MODE",
])
def test_unknown_name_of_a_knobs_family_is_refused(name: str) -> None:
    (line,) = problems_of(**{name: 1})
    assert line.startswith(f"{name} is not a knob")


@pytest.mark.parametrize("name", EARLIER_NAMES.split())
def test_earlier_programs_knobs_are_honoured_or_refused(name: str) -> None:
    known = {f.name.upper() for f in fields(Config)}
    assert name in known or any(line.startswith(f"{name} is not a knob") for line in problems_of(**{name: 1}))


def test_torchruns_and_ordinary_variables_are_accepted() -> None:
    assert problems_of(**dict.fromkeys(ORDINARY_NAMES.split(), 1)) == []


def test_world_size_that_does_not_fit_lists_those_that_do() -> None:
    cfg = config({"TRAIN_BATCH_TOKENS": str(12 * 8192), "MICRO_BATCH_TOKENS": "8192"})
    assert cfg.micro_batches == 12
    for works in (1, 2, 3, 4, 6, 12):
        assert cfg.world_problems(works) == []
    for fails in (5, 8, 24):
        (text,) = cfg.world_problems(fails)
        assert f"WORLD_SIZE={fails} does not divide the 12 micro-batches" in text
        assert " 1, 2, 3, 4, 6, 12 " in text


def test_a_micro_batch_is_an_eighth_of_the_step_unless_told() -> None:
    assert (config({}).micro_batch, config({}).micro_batches) == (65536, 8)
    cfg = config({"MICRO_BATCH_TOKENS": "131072"})
    assert (cfg.micro_batch, cfg.micro_batches) == (131072, 4)


def test_no_combination_of_values_breaks_the_parser() -> None:
    """Whatever the environment holds gives problems or a configuration whose model and batches can be counted."""
    rng = random.Random(0)
    numbers = ["-1", "0", "1", "2", "3", "7", "8", "64", "1000", "1024", "65536", "65537", str(2**70),
               "1e9", "nan", "inf", "x", ""]
    shaping = ["NUM_LAYERS", "NUM_UNIQUE_BLOCKS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "VOCAB_SIZE",
               "TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS", "MICRO_BATCH_TOKENS", "VAL_BATCH_SIZE"]
    accepted = 0
    for _ in range(4000):
        names = rng.sample(shaping, rng.randint(1, 4)) + rng.sample(INT_KNOBS + FLOAT_KNOBS, rng.randint(0, 1))
        cfg, problems = Config.parse({name: rng.choice(numbers) for name in names})
        if not problems:
            accepted += 1
            assert cfg.micro_batches >= 1
            assert cfg.micro_batch * cfg.micro_batches == cfg.train_batch_tokens
            assert cfg.eval_batch_tokens >= cfg.train_seq_len
    assert accepted > 100


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_accepted_shape_has_no_empty_tensor(layers: int) -> None:
    """A tensor without elements cannot be exported: the run would fail after its training."""
    cfg, problems = Config.parse({"NUM_LAYERS": str(layers)})
    assert problems or all(0 not in shape for shape in tensor_shapes(cfg.shape).values())


def test_runtime_takes_its_ranks_from_torchrun() -> None:
    rt = Runtime.from_config(config({"DEVICE": "cpu"}), {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (rt.rank, rt.world_size, rt.local_rank, rt.master, rt.device.type) == (3, 4, 1, False, "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# No dead knob: the source is read, not run.
# ----------------------------------------------------------------------------------------------------------------------


KNOB_CLASSES = ("Config", "ModelShape", "ExportOptions")


def is_config(node: ast.expr, inside: bool) -> bool:
    """Whether an expression is a Config or a part of one: cfg, shape, options, x.cfg, x.shape, self in KNOB_CLASSES."""
    if isinstance(node, ast.Name):
        return node.id in ({"self"} if inside else {"cfg", "shape", "options"})
    return isinstance(node, ast.Attribute) and node.attr in ("cfg", "shape")


def reads(tree: ast.AST, inside: bool) -> set[str]:
    return {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and is_config(node.value, inside)
    }


def knobs_read(*sources: str) -> set[str]:
    """Attributes of a Config that the sources read, directly or through a property that is itself read; what only the
    checks (`problems` and its kind) look at does not count.
    """
    classes, rest = [], []
    for node in (node for source in sources for node in ast.parse(source).body):
        inside = isinstance(node, ast.ClassDef) and node.name in KNOB_CLASSES
        (classes if inside else rest).append(node)
    properties = {
        f.name: reads(f, inside=True) for c in classes for f in c.body
        if isinstance(f, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id == "property" for d in f.decorator_list)
    }
    found = set().union(*(reads(node, inside=False) for node in rest))
    while True:
        more = found.union(*(properties[name] for name in found & properties.keys()))
        if more == found:
            return found
        found = more


def test_every_knob_is_read_by_the_program() -> None:
    trainer, *exporters = ((ROOT / name).read_text(encoding="utf-8") for name in (
        "train_gpt.py", "export.py", "scripts/int8_plan.py", "scripts/symmetries.py", "scripts/numuon.py",
        "scripts/objective.py", "scripts/scoring.py", "scripts/sidecar_mode.py", "scripts/depth.py", "scripts/ttt.py"))
    knobs = {f.name for f in fields(Config)}
    assert knobs - knobs_read(trainer, *exporters) == set()
    silenced = trainer.replace(".grad_clip_norm", ".seed").replace("self.num_unique_blocks or", "")
    unread = [source.replace("options.int8_residual_storage", "options.int8_residual_rank") for source in exporters]
    wanted = {"grad_clip_norm", "num_unique_blocks", "int8_residual_storage"}
    assert knobs - knobs_read(silenced, *unread) == wanted                             # the check itself can fail
