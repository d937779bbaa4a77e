"""Launchers: what they run is what they print, recipes are sound, and every fault is said at once.

Guarantees: a dry run prints the very command and knobs and does nothing; arguments win over the environment, that over the
recipe; a printed command is a shell command that gives the same knobs; Python and the shell read recipes alike; every
recipe is a configuration that its ranks can run and whose artifact fits the cap, or says why not; a launcher really runs.
Run: bash scripts/test.sh tests/test_launchers.py
"""
from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, TinyData, tiny_knobs

import train_gpt
from prediction import prediction_line
from recipe import FOLDER, read_recipe, recipe_path
from train_gpt import Config, tensor_shapes

RECIPES = sorted(path.stem for path in FOLDER.glob("*.env"))
LAUNCHERS = {   # launcher -> its recipe, its last command behind the interpreter's folder
    "smoke_cpu": ("smoke_cpu", "python scripts/show_run.py logs/x"),
    "mini_cpu": ("mini_cpu", "python train_gpt.py"),
    "proxy_3090": ("proxy_3090", "python train_gpt.py"),
    "run_1xh100": ("baseline_8xh100", "python train_gpt.py"),
    "run_8xh100": ("baseline_8xh100", "torchrun --standalone --nproc_per_node=8 train_gpt.py"),
    "run_multinode": ("baseline_8xh100", "torchrun --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500"
                      " --nproc_per_node=8 train_gpt.py"),
}
NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


def launch(name: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """A launcher in an environment of nothing but a path, a home and `env`."""
    bare = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    path = os.path.relpath(ROOT / "scripts" / f"{name}.sh", cwd)
    return subprocess.run(["bash", path, *arguments], env=bare | env, cwd=cwd, capture_output=True, text=True, check=False,
                          timeout=120)


def dry(name: str, *arguments: str, **env: str) -> str:
    done = launch(name, *arguments, **({"DRY_RUN": "1", "RUN_ID": "x"} | (NODES if name == "run_multinode" else {}) | env))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def assignments(printed: str) -> dict[str, str]:
    return dict(re.fullmatch(r"([A-Z0-9_]+)=(.*) \\", line).groups()        # type: ignore[union-attr]
                for line in printed.splitlines() if line.endswith("\\"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def shell(command: str) -> str:
    """Its output, run in the repository's root."""
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True,
                          text=True, check=True).stdout


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment as the launchers make it, whose programs are this interpreter's."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    for name, module in (("python", ""), ("torchrun", " -m torch.distributed.run")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    (folder / (".installed-" + shell("cat requirements.txt requirements.txt | cksum | tr -d ' \\n'"))).touch()
    return folder


# --- dry runs -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_command_and_its_knobs() -> None:
    assert dry("proxy_3090", "proxy_3090_180s", "SEED=1338") == """\
# recipe: scripts/recipes/proxy_3090_180s.env
DATA_PATH=./data/datasets/fineweb10B_sp1024 \\
TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model \\
SEED=1338 \\
NUM_LAYERS=12 \\
MODEL_DIM=384 \\
NUM_HEADS=6 \\
NUM_KV_HEADS=3 \\
TRAIN_SEQ_LEN=1024 \\
TRAIN_BATCH_TOKENS=32768 \\
MICRO_BATCH_TOKENS=16384 \\
ITERATIONS=20000 \\
MAX_WALLCLOCK_SECONDS=180 \\
WARMDOWN_ITERS=1200 \\
WARMUP_STEPS=20 \\
VAL_LOSS_EVERY=0 \\
VAL_MAX_TOKENS=1048576 \\
VAL_BATCH_SIZE=524288 \\
TRAIN_LOG_EVERY=100 \\
INT8_SCALE_FLOOR=0 \\
RUN_ID=x \\
DEVICE=cuda \\
.venv/bin/python train_gpt.py
"""


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_runs_its_recipe_and_makes_nothing_when_dry(name: str, tmp_path: Path) -> None:
    recipe, command = LAUNCHERS[name]
    printed = dry(name, VENV=str(tmp_path / "venv"))
    knobs = assignments(printed)
    wanted = read_recipe(recipe_path(recipe)) | {"RUN_ID": "x"}
    assert {knob: knobs[knob] for knob in wanted} == wanted
    assert knobs.keys() - wanted.keys() == {
        "smoke_cpu": set(), "mini_cpu": set(), "run_multinode": {"DEVICE", "MICRO_BATCH_TOKENS"}}.get(name, {"DEVICE"})
    assert knobs["DEVICE"] == ("cpu" if name.endswith("_cpu") else "cuda")
    assert f"# recipe: scripts/recipes/{recipe}.env" in printed.splitlines()
    assert printed.splitlines()[-1] == f"{tmp_path}/venv/bin/{command}"
    assert not (tmp_path / "venv").exists()


def test_a_run_without_a_name_gets_the_recipes_and_the_time() -> None:
    printed = launch("run_1xh100", "targeted_9x512", DRY_RUN="1").stdout
    assert re.fullmatch(r"targeted_9x512_\d{8}_\d{6}", assignments(printed)["RUN_ID"])


def test_arguments_win_over_the_environment_and_that_over_the_recipe() -> None:
    knobs = assignments(dry("mini_cpu", "SEED=1", "NUM_LAYERS=5", SEED="2", MODEL_DIM="128", CHECKPOINT_EVERY="9"))
    assert (knobs["SEED"], knobs["NUM_LAYERS"], knobs["MODEL_DIM"], knobs["NUM_HEADS"]) == ("1", "5", "128", "4")
    assert knobs["CHECKPOINT_EVERY"] == "9"         # printed, though the recipe does not name it


def test_a_printed_command_can_be_copied() -> None:
    printed = dry("mini_cpu", "LOG_DIR=my logs/$HOME; 'x'")
    command = printed.replace(".venv/bin/python train_gpt.py", "env")
    given = dict(line.split("=", 1) for line in shell(command).splitlines())
    assert given["LOG_DIR"] == "my logs/$HOME; 'x'"
    assert read_recipe(recipe_path("mini_cpu")).items() <= given.items()


def test_a_recipe_may_be_a_file_of_the_callers_folder(tmp_path: Path) -> None:
    (tmp_path / "own.env").write_text("# mine\n\nSEED=5\r\nNUM_LAYERS=3")
    done = launch("mini_cpu", "own.env", cwd=tmp_path, DRY_RUN="1", RUN_ID="x")
    assert done.stdout.splitlines()[0] == f"# recipe: {tmp_path}/own.env"
    assert assignments(done.stdout) == {
        "SEED": "5", "NUM_LAYERS": "3", "RUN_ID": "x", "DATA_PATH": "./data/datasets/fineweb10B_sp1024",
        "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model"}


def test_more_than_eight_ranks_get_a_micro_batch_each() -> None:
    assert assignments(dry("run_multinode"))["MICRO_BATCH_TOKENS"] == "32768"
    assert assignments(dry("run_multinode", "MICRO_BATCH_TOKENS=16384"))["MICRO_BATCH_TOKENS"] == "16384"
    assert "MICRO_BATCH_TOKENS" not in assignments(dry("run_multinode", NNODES="1", NODE_RANK="0"))
    cfg, _ = Config.parse({"MICRO_BATCH_TOKENS": "32768"})
    assert cfg.world_problems(16) == []


def test_the_prose_of_a_corpus_folder_is_tokenised_first(tmp_path: Path) -> None:
    if (ROOT / "data/datasets/prose_sp1024/manifest.json").exists():
        pytest.skip("this checkout has the prose already")
    lines = dry("mini_cpu", CORPUS_DIR=str(tmp_path)).splitlines()
    assert lines[0] == (f".venv/bin/python data/prepare.py tokenize --docs {tmp_path}/docs_prose.jsonl.xz --tokenizer-model"
                        f" {tmp_path}/tokenizers/fineweb_1024_bpe.model --val-docs 2000 --out data/datasets/prose_sp1024")
    assert "tokenize" not in dry("mini_cpu", CORPUS_DIR=str(tmp_path), DATA_PATH="elsewhere")


@pytest.mark.parametrize("name", [*LAUNCHERS, "quickstart"])
def test_help_is_the_launchers_head(name: str) -> None:
    done = launch(name, "--help")
    source = (ROOT / "scripts" / f"{name}.sh").read_text().splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), source[1:]))
    assert (done.returncode, done.stdout.splitlines()) == (0, [line.removeprefix("# ") for line in head])
    assert "bash scripts/" in done.stdout or name == "quickstart"


# --- faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments", "env", "message"), [
    ("mini_cpu", ["nope"], {}, f"recipe nope: no such file, and none of scripts/recipes/ ({' '.join(RECIPES)})"),
    ("mini_cpu", ["mini_cpu", "proxy_3090"], {}, "two recipes, mini_cpu and proxy_3090: wanted one"),
    ("mini_cpu", ["NUM_LAYRES=3"], {}, "NUM_LAYRES=3: NUM_LAYRES is not a knob of this version; README.md lists them"),
    ("mini_cpu", ["seed=3"], {}, "seed=3: wanted a recipe or KNOB=value, --help explains"),
    ("mini_cpu", ["--seed"], {}, "--seed: wanted a recipe or KNOB=value, --help explains"),
    ("mini_cpu", [], {"DATA_PATH": "nowhere"}, "no fineweb_train_*.bin in DATA_PATH=nowhere; make them: python"
     " data/prepare.py tokenize --docs DOCS.jsonl.xz --vocab 1024 --val-docs 2000 --out nowhere"),
    ("run_1xh100", [], {"DEVICE": "cpu", "DATA_PATH": "/nowhere/fineweb10B_sp4096"}, "no fineweb_train_*.bin in"
     " DATA_PATH=/nowhere/fineweb10B_sp4096; make them: python data/prepare.py fineweb --variant sp4096 --train-shards 80"),
    ("run_8xh100", [], {"CUDA_VISIBLE_DEVICES": "0,1"},
     "wanted 8 GPUs, found 2 (nvidia-smi -L, CUDA_VISIBLE_DEVICES); DRY_RUN=1 only prints"),
    ("run_multinode", [], {}, "NNODES must be the number of nodes, got ''"),
    ("run_multinode", [], NODES | {"NODE_RANK": "2"},
     "NODE_RANK must be 0 to 1, another on each of NNODES=2 nodes, got '2'"),
    ("run_multinode", [], NODES | {"NODE_RANK": ""},
     "NODE_RANK must be 0 to 1, another on each of NNODES=2 nodes, got ''"),
    ("run_multinode", [], NODES | {"MASTER_ADDR": ""}, "MASTER_ADDR must be the address of the node of rank 0, got ''"),
    ("run_multinode", [], NODES | {"MASTER_PORT": "70000"}, "MASTER_PORT must be 1 to 65535, got '70000'"),
    ("run_multinode", [], NODES | {"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE must be a whole number above 0, got 'x'"),
    ("run_multinode", [], NODES, "RUN_ID must be set, alike on every node"),
])
def test_a_fault_is_one_line_and_exit_code_2(name: str, arguments: list[str], env: dict[str, str], message: str) -> None:
    done = launch(name, *arguments, **env)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_gpus_are_counted_where_none_are_named(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: NVIDIA H100\\nGPU 1: NVIDIA H100\\n'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert "wanted 8 GPUs, found 2 " in launch("run_8xh100", PATH=path).stderr
    assert "no fineweb_train_*.bin" in launch("run_1xh100", PATH=path, DATA_PATH="nowhere").stderr


def test_a_missing_tokenizer_is_said(tiny_data: TinyData) -> None:
    done = launch("mini_cpu", DATA_PATH=str(tiny_data.folder), TOKENIZER_PATH="no.model")
    assert done.stderr.startswith("error: TOKENIZER_PATH=no.model is no file; python data/prepare.py tokenize")
    assert done.returncode == 2


# --- recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_configuration_that_its_ranks_can_run(name: str) -> None:
    knobs = read_recipe(recipe_path(name))
    cfg, problems = Config.parse(knobs)
    assert problems == []
    assert knobs.keys() <= {f.name.upper() for f in fields(Config)}
    assert cfg.world_problems(1 if name.endswith("_cpu") or name.startswith("proxy") else 8) == []
    assert cfg.world_problems(1) == []
    assert (recipe_path(name).read_text()).startswith("# ")
    assert knobs["SEED"] == "1337"
    assert f"_sp{cfg.vocab_size}" in cfg.data_path or name == "sp4096_14x560"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_the_cap_or_says_why_not(name: str) -> None:
    cfg, _ = Config.parse(read_recipe(recipe_path(name)))
    line, refused = prediction_line(tensor_shapes(cfg.shape), cfg.export_options, train_gpt.code_bytes())
    assert not refused, line
    assert ("OVER" in line) == ("Over the cap: " in recipe_path(name).read_text()), line


def test_the_baseline_recipe_is_the_default_configuration() -> None:
    cfg, _ = Config.parse(read_recipe(recipe_path("baseline_8xh100")))
    assert cfg == Config()


def test_the_two_proxies_differ_in_what_ends_them_alone() -> None:
    steps, seconds = (read_recipe(recipe_path(name)) for name in ("proxy_3090", "proxy_3090_180s"))
    assert {knob for knob, value in steps.items() if seconds[knob] != value} == {"ITERATIONS", "MAX_WALLCLOCK_SECONDS"}
    assert steps.keys() == seconds.keys()


@pytest.mark.parametrize("line", [
    "SEED", "seed=1", "SEED =1", "SEED= 1", "SEED=1 ", " SEED=1", "=1", "SEED=1\nSEED=1", " # x"])
def test_python_and_the_shell_refuse_the_same_lines(line: str, tmp_path: Path) -> None:
    path = tmp_path / "own.env"
    path.write_text(f"NUM_LAYERS=3\n{line}\n")
    with pytest.raises(ValueError, match="wanted KNOB=value, each knob once, no blanks around it"):
        read_recipe(path)
    done = launch("mini_cpu", str(path), DRY_RUN="1")
    assert (done.returncode, done.stdout) == (2, "")
    wanted = "wanted KNOB=value, each knob once, no blanks around it"
    assert done.stderr == f"error: {path}: {wanted}, got: {line.splitlines()[-1]}\n"


def test_a_recipes_unknown_knob_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.env").write_text("NUM_LAYRES=3\n")
    done = launch("mini_cpu", "own.env", cwd=tmp_path, DRY_RUN="1")
    assert done.stderr == f"error: {tmp_path}/own.env: NUM_LAYRES is not a knob of this version; README.md lists them\n"


def test_the_shell_knows_every_knob() -> None:
    assert sorted(shell(". scripts/lib.sh; knob_names").split()) == sorted(f.name.upper() for f in fields(Config))


# --- real runs ----------------------------------------------------------------------------------------------------------


def test_a_launcher_really_runs(tiny_data: TinyData, tmp_path: Path, environment: Path) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {
        "VENV": str(environment), "MICRO_BATCH_TOKENS": "512", "CALIBRATION_TOKENS": "512", "ARTIFACT_CAP_BYTES": "80000",
        "VAL_MAX_TOKENS": "512"}
    done = launch("mini_cpu", "SEED=7", **env)
    assert done.returncode == 0, done.stderr
    knobs = json.loads((tmp_path / "logs" / "tiny" / "config.json").read_text())["knobs"]
    assert (knobs["seed"], knobs["export_allocate"], knobs["num_layers"], knobs["warmup_steps"]) == (7, "hessian", 3, 0)
    assert json.loads((tmp_path / "logs" / "tiny" / "summary.json").read_text())["under_cap"]
    assert "final_int8_zlib_roundtrip_exact" in done.stdout


def test_the_trainers_exit_code_is_the_launchers(tiny_data: TinyData, environment: Path) -> None:
    (environment / "bin" / "python").write_text("#!/bin/sh\necho $$ $PPID\nexit 130\n")
    done = launch("run_1xh100", VENV=str(environment), DEVICE="cpu", DATA_PATH=str(tiny_data.folder),
                  TOKENIZER_PATH=str(tiny_data.tokenizer))
    pid, parent = done.stdout.splitlines()[-1].split()
    assert (done.returncode, parent) == (130, str(os.getpid()))     # it took the shell's place, so signals reach it
    assert pid != parent


def test_a_launcher_really_runs_under_torchrun(tiny_data: TinyData, tmp_path: Path, environment: Path) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {
        "VENV": str(environment), "DEVICE": "cpu", "NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "GPUS_PER_NODE": "1"}
    done = launch("run_multinode", **env)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "logs" / "tiny" / "summary.json").read_text())["step"] == 4


def test_quick_start_and_smoke_run_the_same_steps(tmp_path: Path, environment: Path) -> None:
    """A stand-in for Python writes down what it was called with; the quick start prints nothing of its own."""
    log = tmp_path / "calls"
    (environment / "bin" / "python").write_text(
        f'#!/bin/sh\necho "$* layers=$NUM_LAYERS steps=$ITERATIONS device=$DEVICE" >> {log}\n')
    outputs = {name: launch(name, VENV=str(environment), RUN_ID="x", ITERATIONS="7") for name in ("quickstart", "smoke_cpu")}
    calls = log.read_text().splitlines()
    steps = ["data/prepare.py embedded", "train_gpt.py", "scripts/show_run.py logs/x"]
    assert calls[:3] == [f"{step} layers=4 steps=7 device=auto" for step in steps]
    assert calls[3:] == [f"{step} layers=4 steps=7 device=cpu" for step in steps]
    assert (outputs["quickstart"].stdout, outputs["quickstart"].returncode) == ("", 0)
    assert outputs["smoke_cpu"].stdout.splitlines()[0] == f"{environment}/bin/python data/prepare.py embedded"


def test_a_failed_step_ends_the_quick_start_with_its_code(environment: Path) -> None:
    (environment / "bin" / "python").write_text('#!/bin/sh\n[ "$1" != train_gpt.py ] || exit 3\necho "$1"\n')
    done = launch("quickstart", VENV=str(environment), RUN_ID="x")
    assert (done.returncode, done.stdout) == (3, "data/prepare.py\n")
