"""What a sweep is: from a TOML file to the list of runs, each with its knobs, its identity and the folder it goes to.

    name = "shapes"                     # names the ledger: LOG_DIR/sweep_shapes.json
    track = "mini"                      # free text
    base = "mini_cpu"                   # a recipe: a name in scripts/recipes/ or a path, relative to this file
    seeds = [1337, 1338, 1339]
    control = "deep"                    # the arm that the others are compared with
    threads = 1                         # of a run on CPU; another number of threads rounds differently
    repeats = 1                         # runs of each arm and seed: more than one asks how repeatable a result is
    retries = 1                         # times that a crashed run is started again
    score = ["sidecar"]                 # the first of these eval_modes that a run has is its score, else the plain one
    share_training = false              # true: runs that differ in export or evaluation alone train once

    [knobs]                             # the same in all arms, over the recipe's
    ITERATIONS = 400
    [arms.deep]                         # one table an arm
    NUM_LAYERS = 6
    [grid]                              # and or instead: every combination is an arm
    MATRIX_LR = [0.02, 0.04]
    [random]                            # and or instead: DRAWS arms of drawn values
    draws = 10
    seed = 1
    [random.knobs]
    MATRIX_LR = {low = 0.01, high = 0.1, log = true}    # a whole number where both ends are
    MLP_MULT = [2, 3, 4]
    [stop]                              # successive halving, see scripts/sweep.py
    rungs = [100, 200]                  # steps at which runs of one seed are compared by val_bpb
    keep = 0.5                          # the share of them that goes on
    at_least = 4                        # none stops before so many got there
"""
from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import export  # noqa: E402  (the repository's root is not on the path before)
import train_gpt  # noqa: E402
from recipe import read_recipe, recipe_path  # noqa: E402
from runs import WITHOUT_EFFECT  # noqa: E402
from train_gpt import Config, ConfigError  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

PLACES = ("DATA_PATH", "TOKENIZER_PATH", "LOG_DIR", "DEVICE")    # knobs that a sweep takes from the environment
DATA_KNOBS = ("DATA_PATH", "TOKENIZER_PATH", "TRAIN_SEQ_LEN", "VOCAB_SIZE")
OWN = ("RUN_ID", "RESUME", "SEED", "EVAL_ARTIFACT")             # knobs that a sweep sets, and one that trains nothing
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
KINDS = {"name": str, "track": str, "base": str, "seeds": list, "control": str, "score": list, "threads": int,
         "repeats": int, "retries": int, "share_training": bool, "knobs": dict, "arms": dict, "grid": dict, "random": dict,
         "stop": dict}


class SpecError(ConfigError):
    """The sweep cannot run as asked."""


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) in its asynchronous form (Li et al. 2020, arXiv
    1810.05934): a run goes on while it is, at each rung behind it, among the best `keep` of those of its seed.
    """
    rungs: tuple[int, ...]
    keep: float
    at_least: int


@dataclass(frozen=True)
class Spec:
    """A sweep as its file describes it, recipe and arguments merged in."""
    path: Path
    name: str
    track: str
    seeds: tuple[int, ...]
    control: str | None
    score: tuple[str, ...]                  # eval_modes that score a run, see report.py --score
    threads: int
    repeats: int
    retries: int
    share_training: bool
    arms: dict[str, dict[str, str]]         # every knob of an arm that is set, as environment variables
    stop: Halving | None


@dataclass(frozen=True)
class Planned:
    """One run of a sweep. `identity` is equal exactly where configuration, seed, code, data, kind of machine and number of
    the repeat are; runs of equal `training` end with the same weights.
    """
    arm: str
    seed: int
    repeat: int                             # from 0
    knobs: dict[str, str]
    cfg: Config
    code: str
    identity: str
    training: str
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.arm} seed {self.seed}" + (f" repeat {self.repeat}" if self.repeat else "")


def read_spec(path: Path, extra: Mapping[str, str], env: Mapping[str, str]) -> Spec:
    """The sweep of a TOML file. An arm's knobs are the recipe's, over it PLACES of `env`, over these [knobs], the arm's own,
    and `extra`. Raises SpecError.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise SpecError([f"{path} cannot be read: {fault}"]) from fault
    problems = [f"{path}: {key} is no key of a sweep; these are: {', '.join(KINDS)}" for key in raw.keys() - KINDS.keys()]
    problems += [f"{path}: {key} must be a {kind.__name__}, got {raw[key]!r}"
                 for key, kind in KINDS.items() if key in raw and type(raw[key]) is not kind]
    if problems:
        raise SpecError(sorted(problems))
    seeds = raw.get("seeds", [1337, 1338, 1339])
    problems += [text for wrong, text in (
        (not NAME.fullmatch(raw.get("name", "")), f"name must be letters, digits, '_', '-' or '.', got {raw.get('name')!r}"),
        (not seeds or len(set(map(str, seeds))) < len(seeds) or any(type(seed) is not int for seed in seeds),
         f"seeds must be whole numbers, each once, got {seeds}"),
        (any(type(name) is not str for name in raw.get("score", [])), f"score must hold names, got {raw.get('score')}"),
        (raw.get("threads", 1) < 1, f"threads must be at least 1, got {raw.get('threads')}"),
        (raw.get("repeats", 1) < 1, f"repeats must be at least 1, got {raw.get('repeats')}"),
        (raw.get("repeats", 1) > 1 and raw.get("share_training"), "repeats would share one training, and show nothing"),
        (raw.get("retries", 1) < 0, f"retries must be at least 0, got {raw.get('retries')}"),
    ) if wrong]
    arms = attempt(problems, lambda: expand(raw), {})
    base = attempt(problems, lambda: base_knobs(path, raw.get("base")), {})
    stop = attempt(problems, lambda: read_halving(raw.get("stop")), None)
    if raw.get("control") is not None and arms and raw["control"] not in arms:
        problems.append(f"control {raw['control']!r} is no arm; these are: {', '.join(arms)}")
    if problems:
        raise SpecError([f"{path}: {problem}" for problem in problems])
    places = {name: env[name] for name in PLACES if name in env}
    common = base | places | as_knobs(raw.get("knobs", {}))
    return Spec(path, raw["name"], raw.get("track", ""), tuple(seeds), raw.get("control"), tuple(raw.get("score", [])),
                raw.get("threads", 1), raw.get("repeats", 1), raw.get("retries", 1), raw.get("share_training", False),
                {arm: common | knobs | dict(extra) for arm, knobs in arms.items()}, stop)


def attempt(problems: list[str], read: Any, otherwise: Any) -> Any:
    """What `read` gives; its ValueError becomes one more problem."""
    try:
        return read()
    except ValueError as fault:
        problems.append(str(fault))
        return otherwise


def base_knobs(spec: Path, base: str | None) -> dict[str, str]:
    if not base:
        return {}
    beside = spec.parent / base
    knobs = read_recipe(beside if beside.is_file() else recipe_path(base))
    return {name: value for name, value in knobs.items() if name not in OWN}     # a recipe's seed is for single runs


def as_knobs(table: Mapping[str, Any]) -> dict[str, str]:
    """TOML values as environment variables. Raises ValueError."""
    for name, value in table.items():
        if type(value) not in (str, int, float, bool):
            raise ValueError(f"{name} must be a number, a word or a truth value, got {value!r}")
    return {name: str(int(value)) if isinstance(value, bool) else str(value) for name, value in table.items()}


def expand(raw: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The arms of a spec by name, in its order: [arms], then [grid], then [random]. Raises ValueError."""
    as_knobs(raw.get("knobs", {}))
    arms: dict[str, dict[str, str]] = {}
    for name, table in raw.get("arms", {}).items():
        if not NAME.fullmatch(name) or not isinstance(table, dict):
            raise ValueError(f"[arms.{name}] must be a table of knobs, its name letters, digits, '_', '-' or '.'")
        arms[name] = as_knobs(table)
    grid = raw.get("grid", {})
    if faulty := [name for name, values in grid.items() if not isinstance(values, list) or not values]:
        raise ValueError(f"[grid] {faulty[0]} must be a list of values, got {grid[faulty[0]]!r}")
    drawn = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    for table in drawn + draw(raw.get("random")):
        knobs = as_knobs(table)
        arms.setdefault(",".join(f"{name.lower()}={value}" for name, value in knobs.items()), knobs)
    if not arms:
        raise ValueError("no arm: give [arms.NAME] tables, a [grid] or [random] draws")
    return arms


def draw(table: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The values of [random]; they depend on its seed alone. Raises ValueError."""
    if table is None:
        return []
    draws, knobs = table.get("draws"), table.get("knobs")
    if type(draws) is not int or draws < 1 or not isinstance(knobs, dict) or not knobs or table.keys() - {
            "draws", "seed", "knobs"}:
        raise ValueError("[random] must have draws (at least 1), a seed and [random.knobs], and nothing else")
    rng = random.Random(table.get("seed", 0))
    return [{name: draw_one(rng, name, choice) for name, choice in knobs.items()} for _ in range(draws)]


def draw_one(rng: random.Random, name: str, choice: Any) -> Any:
    """One value of a list, or between low and high: uniform or log-uniform, to four digits, whole where both ends are."""
    if isinstance(choice, list) and choice:
        return rng.choice(choice)
    table = choice if isinstance(choice, dict) else {}
    low, high, log = table.get("low"), table.get("high"), table.get("log", False)
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or low >= high or (log and low <= 0):
        raise ValueError(f"[random.knobs] {name} must be a list of values or {{low, high, log}} with low below high"
                         f" (above 0 for log), got {choice!r}")
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)
    return round(value) if type(low) is type(high) is int else float(f"{value:.4g}")


def read_halving(table: Mapping[str, Any] | None) -> Halving | None:
    """Raises ValueError."""
    if table is None:
        return None
    rungs, keep, at_least = table.get("rungs"), table.get("keep", 0.5), table.get("at_least", 4)
    if (table.keys() - {"rungs", "keep", "at_least"} or not isinstance(rungs, list) or not rungs
            or any(type(rung) is not int or rung < 1 for rung in rungs) or not 0 < keep < 1
            or type(at_least) is not int or at_least < 2):
        raise ValueError("[stop] must have rungs (steps), keep (between 0 and 1) and at_least (2 or more),"
                         f" got {dict(table)}")
    return Halving(tuple(sorted(rungs)), keep, at_least)


# ----------------------------------------------------------------------------------------------------------------------
# From a spec to runs: every fault of every arm found before the first run starts.
# ----------------------------------------------------------------------------------------------------------------------


def plan(spec: Spec, env: Mapping[str, str]) -> list[Planned]:
    """The runs of a sweep, seed by seed, so that a comparison is whole as early as can be. Raises SpecError."""
    problems, planned = environment_problems(env), list[Planned]()
    data_of, code_of = lru_cache(data_digest), lru_cache(code_digest)
    faults_of_data = lru_cache(lambda *place: train_gpt.load_data(Config.parse(dict(place))[0])[1])
    for seed in spec.seeds:
        for arm, knobs in spec.arms.items():
            knobs = knobs | {"SEED": str(seed)}
            cfg, faults = Config.parse(knobs)
            faults += [f"{name} is not for a sweep, leave it out" for name in OWN if name in spec.arms[arm]]
            rt = train_gpt.Runtime.from_config(cfg, {})
            if not faults:
                faults = stop_problems(spec, cfg) + rt.problems(cfg) + cfg.world_problems(1) + train_gpt.export_problems(cfg)
            faults += faults_of_data(*((name, knobs[name]) for name in DATA_KNOBS if name in knobs))
            problems += [f"arm {arm}: {fault}" for fault in faults]
            if not problems:
                machine = rt.device.type, str(rt.dtype), rt.compiled, spec.threads if rt.device.type == "cpu" else 0
                code = [code_of(tuple(sorted(set(c.tools().values())))) for c in (cfg, replace(cfg, **after_training(cfg)))]
                rest = [data_of(cfg.data_path, cfg.tokenizer_path), machine]
                planned += [planned_run(arm, knobs, cfg, code, rest, repeat) for repeat in range(spec.repeats)]
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    folders = {run.identity: run.folder for run in reversed(planned)}       # arms that are the same share the first one's
    return [replace(run, folder=folders[run.identity]) for run in planned]


def planned_run(arm: str, knobs: dict[str, str], cfg: Config, code: Sequence[str], rest: list[Any], repeat: int) -> Planned:
    """The run, its two hashes (`code` has those of the code for both), and its folder: an existing one of this identity,
    whatever its arm's name, or a new one.
    """
    identity, training = (
        hashlib.sha256(json.dumps([{f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in left_out},
                                   own, rest + [repeat] * (repeat > 0)], sort_keys=True).encode()).hexdigest()[:10]
        for left_out, own in zip((NOT_IDENTITY, NOT_IDENTITY | after_training(cfg).keys()), code, strict=True))
    logs = Path(cfg.log_dir)
    name = re.sub(r"[^A-Za-z0-9_.=-]+", "_", arm)[:80]
    folder = next(iter(sorted(logs.glob(f"*_s{cfg.seed}_{identity}"))), logs / f"{name}_s{cfg.seed}_{identity}")
    return Planned(arm, cfg.seed, repeat, knobs, cfg, code[0], identity, training, folder)


# Instead of where data and device are, an identity has what they are.
NOT_IDENTITY = WITHOUT_EFFECT | {"data_path", "tokenizer_path", "device"}
# Knobs that the weights at the end of a run of fixed steps do not depend on, with their defaults.
AFTER_TRAINING = {f.name: f.default for f in fields(Config)
                  if f.metadata["group"] in ("Export", "Evaluation") and f.metadata["free"]}


def after_training(cfg: Config) -> dict[str, Any]:
    """Those of a run: terms of the objective see the export, which is then no longer of the time after."""
    exports = {f.name for f in fields(Config) if f.metadata["group"] == "Export"} if cfg.has_objective else set()
    return {name: default for name, default in AFTER_TRAINING.items() if name not in exports}


def environment_problems(env: Mapping[str, str]) -> list[str]:
    known = {f.name.upper() for f in fields(Config)} - set(PLACES)
    return [f"{name}={env[name]} is set in the environment, from which a sweep takes {', '.join(PLACES)} alone: unset it,"
            " and put it under [knobs] or behind the file if it is meant" for name in sorted(env.keys() & known)]


def stop_problems(spec: Spec, cfg: Config) -> list[str]:
    timed, every = cfg.max_wallclock_seconds > 0, cfg.val_loss_every
    rungs = spec.stop.rungs if spec.stop else ()
    return [text for wrong, text in (
        (timed and spec.stop, "[stop] compares runs at equal steps; MAX_WALLCLOCK_SECONDS must be 0"),
        (any(not every or rung % every or rung >= cfg.iterations for rung in rungs),
         f"[stop] rungs {list(rungs)} must be multiples of VAL_LOSS_EVERY={every} below ITERATIONS={cfg.iterations}"),
        (timed and spec.share_training, "share_training needs fixed steps; MAX_WALLCLOCK_SECONDS must be 0"),
        (spec.share_training and cfg.checkpoint_every and cfg.iterations % cfg.checkpoint_every,
         f"share_training needs a checkpoint at the last step: CHECKPOINT_EVERY={cfg.checkpoint_every} must divide"
         f" ITERATIONS={cfg.iterations}"),
    ) if wrong]


def data_digest(data_path: str, tokenizer_path: str) -> str:
    """Of the tokenizer's bytes, the shards' names and sizes, and the manifest that describes them."""
    digest, tokenizer = hashlib.sha256(), Path(tokenizer_path)
    digest.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")
    folder = Path(data_path)
    for path in sorted(folder.glob("*.bin")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    manifest = folder / "manifest.json"
    digest.update(manifest.read_bytes() if manifest.is_file() else b"")
    return digest.hexdigest()


def code_digest(tools: Iterable[str]) -> str:
    """16 hex digits of what computes a run: trainer, exporter, these modules of scripts/ and those they import; comments
    and docstrings do not count.
    """
    waiting, sources = ["train_gpt", "export", *tools], dict[str, str]()
    while waiting:
        name = waiting.pop()
        path = next((p for p in (ROOT / f"{name}.py", ROOT / "scripts" / f"{name}.py") if p.is_file()), None)
        if path is None or name in sources:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting.append(node.module)
            elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        sources[name] = ast.dump(tree)
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    export.write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def check_log_folder(planned: Sequence[Planned]) -> None:
    """All runs go to one folder that can be written to. Raises SpecError."""
    folders = sorted({run.cfg.log_dir for run in planned})
    if len(folders) > 1:
        raise SpecError([f"all arms must have one LOG_DIR, got {', '.join(folders)}"])
    if not os.access(next(p for p in (Path(folders[0]), *Path(folders[0]).absolute().parents) if p.exists()), os.W_OK):
        raise SpecError([f"LOG_DIR={folders[0]} cannot be written to"])
