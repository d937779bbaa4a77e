"""Artifact-native language-model trainer for the 16,000,000-byte "Parameter Golf" challenge.

    bash scripts/quickstart.sh                                     # embedded corpus, CPU or GPU, end to end in minutes
    torchrun --standalone --nproc_per_node=8 train_gpt.py          # the challenge's baseline on 8xH100
    RUN_ID=one ITERATIONS=2000 MAX_WALLCLOCK_SECONDS=0 python train_gpt.py      # fixed steps on one device

Every knob is an environment variable; `Config` below is their glossary and README.md their table. A run trains, exports the
weights with `export.py`, reads the artifact back from disk into a fresh model, evaluates that, and ends with

    final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2276 eval_time:1400ms
    final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22761234

All its outputs lie in logs/<RUN_ID>/. Exit codes: 0 success, 1 the run failed, 2 the configuration is wrong (nothing was
done), 3 the run finished and was saved but its artifact is over the cap, 130/143 stopped by a signal after a checkpoint.
"""
from __future__ import annotations

import contextlib
import difflib
import gc
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from export import (
    Artifact,
    ArtifactError,
    ExportOptions,
    ExportRefused,
    SizeReport,
    decode_artifact,
    encode_artifact,
    knob,
    plan_lines,
    range_problems,
    shapes_of,
    storage,
    tool,
    weights_digest,
    write_atomically,
)

# ----------------------------------------------------------------------------------------------------------------------
# Config: every knob of a run, its unit, the meaning of zero, and the faults a value can have.
# ----------------------------------------------------------------------------------------------------------------------

TERMS = ("compression_reg_weight", "compression_grid_reg_weight", "compression_scale_reg_weight",
         "compression_rank1_reg_weight", "ternary_reg_weight", "outlier_reg_weight", "rate_reg_weight",
         "noise_qat_step_sigmas", "finish_steps")      # knobs that bring scripts/objective.py into the training
# Knobs that ask for more than the plain score -> the module of scripts/ whose `score` gives it.
MODES = {"eval_stride": "scoring", "eval_seq_len": "scoring", "eval_doc_isolated": "scoring", "sw_eval_batch": "scoring",
         **dict.fromkeys(("ttt_mode", "ttt_rank", "ttt_lr", "ttt_chunk", "ttt_epochs", "ttt_optimizer", "ttt_reset",
                          "ttt_max_seconds"), "ttt"),
         "eval_depth_loops": "depth", "eval_halt_threshold": "depth", **dict.fromkeys(("eval_mix_learn", "eval_ngram_order",
         "eval_cache_mix_weight", "eval_bigram_mix_weight", "eval_cache_size", "eval_sidecar_scope"), "sidecar_mode")}
SPANS_PER_STEP = 8  # the challenge cuts a step's tokens into 8 spans of tokens/8 + 1, one a GPU on its 8xH100


class ConfigError(ValueError):
    """The run cannot start as asked; `problems` holds one line for each fault found."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class ModelShape:
    """What a reader needs to rebuild the network around an artifact's weights; stored in every artifact's header."""
    vocab_size: int = knob(1024, "Model", "tokens in the vocabulary; must be the tokenizer's", low=1)
    num_layers: int = knob(9, "Model", "transformer layers; the first half feeds the second through skip connections", low=2)
    num_unique_blocks: int = knob(0, "Model", "blocks with weights of their own, used in turn by the layers; 0 = all")
    model_dim: int = knob(512, "Model", "width of the residual stream", low=1)
    embed_dim: int = knob(0, "Model", "width of the token embedding, below MODEL_DIM factorises it; 0 = MODEL_DIM")
    num_heads: int = knob(8, "Model", "query heads", low=1)
    num_kv_heads: int = knob(4, "Model", "key and value heads (grouped-query attention); divides NUM_HEADS", low=1)
    mlp_mult: int = knob(2, "Model", "hidden units of the relu^2 MLP, in multiples of MODEL_DIM", low=1)
    tie_embeddings: bool = knob(True, "Model", "1 = the output head is the token embedding")
    window_size: int = knob(0, "Model", "attention sees this many tokens, itself included; 0 = the whole prefix")
    rope_base: float = knob(10000.0, "Model", "base of the rotary position frequencies")
    rope_dtype: str = knob(
        "auto", "Model", "precision of the rotary tables; auto = the compute dtype, as the baseline, whose bfloat16"
        " tables round positions above 256", choices=("auto", "float32", "bfloat16"))
    logit_softcap: float = knob(30.0, "Model", "logits are softcap * tanh(logits / softcap)")

    @property
    def unique_blocks(self) -> int:
        return self.num_unique_blocks or self.num_layers

    @property
    def embedding_width(self) -> int:
        return self.embed_dim or self.model_dim

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def shape_problems(self) -> list[str]:
        if found := range_problems(self, fields(ModelShape)):
            return found
        return [text for wrong, text in (
            (self.vocab_size > 65536, f"VOCAB_SIZE must fit the shards' uint16, at most 65536, got {self.vocab_size}"),
            (self.num_unique_blocks > self.num_layers,
             f"NUM_UNIQUE_BLOCKS must be 0 (all) to NUM_LAYERS={self.num_layers}, got {self.num_unique_blocks}"),
            (self.embed_dim > self.model_dim,
             f"EMBED_DIM must be 0 (MODEL_DIM) to MODEL_DIM={self.model_dim}, got {self.embed_dim}"),
            (self.model_dim % self.num_heads != 0 or self.head_dim % 2 != 0,
             f"MODEL_DIM={self.model_dim} must be NUM_HEADS={self.num_heads} times an even head width (RoPE pairs)"),
            (self.num_heads % self.num_kv_heads != 0,
             f"NUM_KV_HEADS must divide NUM_HEADS={self.num_heads}, got {self.num_kv_heads}"),
            (self.rope_base <= 1, f"ROPE_BASE must be above 1, got {self.rope_base}"),
            (self.logit_softcap <= 0, f"LOGIT_SOFTCAP must be above 0, got {self.logit_softcap}"),
        ) if wrong]


@dataclass(frozen=True)
class Config(ExportOptions, ModelShape):
    """Every knob of a run: the field `iterations` is set by the environment variable ITERATIONS."""
    run_id: str = knob("", "Run", "names the folder of all outputs; empty = date, time and four random digits", free=True)
    log_dir: str = knob("logs", "Run", "folder that holds the run folders", free=True)
    seed: int = knob(1337, "Run", "seeds the initial weights; the order of the data does not depend on it")
    device: str = knob("auto", "Run", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "cpu", "mps"))
    compute_dtype: str = knob(
        "auto", "Run", "autocast dtype; auto = bfloat16 on cuda, float32 elsewhere", choices=("auto", "float32", "bfloat16"))
    enable_torch_compile: str = knob("auto", "Run", "1 or 0; auto = on cuda only", choices=("auto", "0", "1"), free=True)
    sdp_backend: str = knob(
        "auto", "Run", "attention kernel on cuda; auto = flash where it can run, else memory-efficient, else math",
        choices=("auto", "flash", "efficient", "math", "cudnn"), free=True)

    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "Data", "folder of fineweb_{train,val}_*.bin shards")
    tokenizer_path: str = knob(
        "./data/tokenizers/fineweb_1024_bpe.model", "Data", "SentencePiece .model, or the byte tokenizer's .json")
    train_batch_tokens: int = knob(524_288, "Data", "tokens a step over all ranks", low=1)
    train_seq_len: int = knob(1024, "Data", "tokens a training sequence; evaluation uses it too", low=1)
    micro_batch_tokens: int = knob(
        0, "Data", "tokens a forward pass; 0 = an eighth of the step. Changes memory and speed, not the data or the maths",
        free=True)

    iterations: int = knob(20_000, "Schedule", "optimiser steps; the wallclock cap wins if it comes first", free=True)
    max_wallclock_seconds: float = knob(
        600.0, "Schedule", "training time, evaluation excluded; 0 = no cap, the schedule then counts steps", free=True)
    warmdown_iters: int = knob(1200, "Schedule", "steps over which the learning rate falls to zero at the end; 0 = never")
    warmup_steps: int = knob(20, "Schedule", "untimed steps that prime the kernels; everything is restored after", free=True)

    val_batch_size: int = knob(524_288, "Evaluation", "an eighth of this many tokens is one forward pass", free=True, low=1)
    val_loss_every: int = knob(1000, "Evaluation", "steps between validations; 0 = only at the end", free=True)
    val_max_tokens: int = knob(0, "Evaluation", "validate on the first so many tokens; 0 = all", free=True)
    final_roundtrip_eval: bool = knob(True, "Evaluation", "1 = evaluate the artifact after reading it back", free=True)
    roundtrip_val_max_tokens: int = knob(0, "Evaluation", "cap of that evaluation; 0 = VAL_MAX_TOKENS", free=True)
    eval_artifact: str = knob("", "Evaluation", "a file to evaluate instead of training, knobs as in its run", free=True)
    eval_stride: int = knob(
        0, "Evaluation", "score the artifact also by windows that advance by so many targets, each with at least"
        " EVAL_SEQ_LEN - EVAL_STRIDE tokens of context where they exist; 0 = not", free=True)
    eval_seq_len: int = knob(
        0, "Evaluation", "tokens of those windows, more than TRAIN_SEQ_LEN too; 0 = TRAIN_SEQ_LEN", free=True)
    eval_doc_isolated: bool = knob(
        False, "Evaluation", "1 = there the context starts anew at each BOS; without EVAL_STRIDE windows lie side by side",
        free=True)
    sw_eval_batch: int = knob(
        0, "Evaluation", "windows a forward pass there; 0 = as many as hold 8,192 tokens on a CPU, 65,536 elsewhere",
        free=True)
    ttt_mode: str = knob(
        "off", "Evaluation", "score also while learning from what was scored: lora = adapters for each document, sgd = all"
        " weights", choices=("off", "lora", "sgd"), free=True)
    ttt_lr: float = knob(-1.0, "Evaluation", "its rate; below 0 = 0.003, 0.0003 for all weights by adam", free=True, low=-1)
    ttt_chunk: int = knob(0, "Evaluation", "targets scored before each update; 0 = 64 for lora, 32,768 for sgd", free=True)
    ttt_epochs: int = knob(1, "Evaluation", "updates by each chunk, once it is scored", free=True, low=1)
    ttt_rank: int = knob(8, "Evaluation", "rank of lora's adapters", free=True, low=1)
    ttt_optimizer: str = knob("adam", "Evaluation", "sgd has momentum 0.9", choices=("adam", "sgd"), free=True)
    ttt_reset: str = knob("auto", "Evaluation", "what was learned is forgotten at each BOS, or never; auto = doc for lora,"
                          " else never", choices=("auto", "doc", "never"), free=True)
    ttt_max_seconds: float = knob(0.0, "Evaluation", "seconds after which it only scores; 0 = no limit", free=True)
    eval_mix_learn: bool = knob(False, "Evaluation", "1 = also score mixed with earlier n-grams, weights learned", free=True)
    eval_cache_mix_weight: float = knob(0.0, "Evaluation", "or by fixed weights: of a cache of the last tokens", free=True)
    eval_bigram_mix_weight: float = knob(0.0, "Evaluation", "and of what has followed the token before", free=True)
    eval_cache_size: int = knob(256, "Evaluation", "tokens that the cache holds", free=True, low=1)
    eval_ngram_order: int = knob(5, "Evaluation", "tokens of the longest n-grams, for EVAL_MIX_LEARN", free=True, low=2)
    eval_sidecar_scope: str = knob("both", "Evaluation", "whose tokens count", choices=("both", "doc", "stream"), free=True)
    eval_depth_loops: int = knob(0, "Evaluation", "most extra turns through shared blocks; 0 = no such score", free=True)
    eval_halt_threshold: float = knob(0.0, "Evaluation", "a token that moved less takes no more; 0 = all do", free=True)
    train_log_every: int = knob(200, "Evaluation", "steps between train_loss lines after the first ten; 0 = none", free=True)

    checkpoint_every: int = knob(
        0, "Checkpoint", "steps between checkpoints; 0 = none, except when a signal stops the run", free=True)
    checkpoint_keep: int = knob(2, "Checkpoint", "newest checkpoints kept", free=True, low=1)
    resume: str = knob(
        "", "Checkpoint", "a checkpoint's path, or auto = the newest of this RUN_ID, from scratch if none", free=True)
    save_raw_checkpoint: bool = knob(
        False, "Checkpoint", "1 = keep the final float weights as final_model.safetensors", free=True)

    embed_lr: float = knob(0.6, "Optimiser", "Adam, token embedding when untied")
    head_lr: float = knob(0.008, "Optimiser", "Adam, output head when untied")
    tied_embed_lr: float = knob(0.05, "Optimiser", "Adam, tied token embedding")
    matrix_lr: float = knob(0.04, "Optimiser", "Muon, matrices")
    scalar_lr: float = knob(0.04, "Optimiser", "Adam, vectors and scalars")
    muon_momentum: float = knob(0.95, "Optimiser", "momentum after its warm-up")
    muon_backend_steps: int = knob(5, "Optimiser", "Newton-Schulz iterations", low=1)
    muon_dtype: str = knob(
        "auto", "Optimiser", "precision of those iterations; auto = the compute dtype (the baseline always takes bfloat16)",
        choices=("auto", "float32", "bfloat16"))
    muon_momentum_warmup_start: float = knob(0.85, "Optimiser", "momentum at step 0")
    muon_momentum_warmup_steps: int = knob(500, "Optimiser", "steps from there to MUON_MOMENTUM; 0 = none")
    muon_variant: str = knob("muon", "Optimiser", "numuon = updates of falling rank", choices=("muon", "numuon"))
    numuon_rank_frac_final: float = knob(0.25, "Optimiser", "rank of an update from 80 % of the run on; 1 = full")
    numuon_rank_schedule: str = knob("cosine", "Optimiser", "how it falls until then", choices=("cosine", "linear"))
    numuon_hold_frac: float = knob(0.1, "Optimiser", "share of the run, from its start, at full rank")
    beta1: float = knob(0.9, "Optimiser", "Adam")
    beta2: float = knob(0.95, "Optimiser", "Adam")
    adam_eps: float = knob(1e-8, "Optimiser", "Adam")
    grad_clip_norm: float = knob(0.0, "Optimiser", "largest global gradient norm; 0 = no clipping")
    tied_embed_init_std: float = knob(0.005, "Optimiser", "standard deviation of the initial tied embedding")
    qk_gain_init: float = knob(1.5, "Optimiser", "initial gain of each query head after QK normalisation", low=-math.inf)

    compression_reg_weight: float = knob(0.0, "Objective", "loss per squared error of the export, in row variances; 0 = off")
    compression_grid_reg_weight: float = knob(0.0, "Objective", "loss per sin^2 of the distance to the export's grid")
    compression_scale_reg_weight: float = knob(0.0, "Objective", "loss per squared octave between stored scales")
    compression_scale_reg_model: str = knob(
        "smooth", "Objective", "between neighbours, or to the nearest of 8 levels", choices=("smooth", "cluster"))
    compression_rank1_reg_weight: float = knob(0.0, "Objective", "loss per squared error that no rank-1 correction repairs")
    ternary_reg_weight: float = knob(0.0, "Objective", "loss per squared distance to the best ternary code of each row")
    ternary_reg_group: int = knob(0, "Objective", "weights of a row that share a ternary code; 0 = all")
    outlier_reg_weight: float = knob(0.0, "Objective", "loss per squared excess of weights over the spread of their row")
    outlier_reg_sigmas: float = knob(4.0, "Objective", "spreads of a row from which on weights are in excess")
    outlier_reg_tensors: str = knob("*", "Objective", "tensors that this is aimed at, a pattern as of file names")
    compression_reg_interval: int = knob(16, "Objective", "steps between evaluations of all terms, rate included", low=1)
    compression_reg_warmup_steps: int = knob(0, "Objective", "steps over which all terms grow to their weights")
    compression_reg_sample_tensors: int = knob(4, "Objective", "matrices an evaluation looks at; 0 = all")
    compression_reg_max_cols: int = knob(512, "Objective", "columns of each that it looks at; 0 = all")
    rate_reg_weight: float = knob(0.0, "Objective", "loss per bit a weight of the artifact; 0 = off")
    rate_reg_model: str = knob(
        "entropy", "Objective", "what a bit is: of a fitted generalised Gaussian, of noisy histograms, of the coder's own"
        " tables, or of water-filling over the inputs' covariance", choices=("backslash", "entropy", "coder", "waterfill"))
    rate_reg_nu: float = knob(0.0, "Objective", "backslash: shape of the generalised Gaussian, 0.1 to 3; 0 = fitted")
    rate_reg_eps: float = knob(0.5, "Objective", "backslash: export steps added to |w|")
    rate_target_bits: float = knob(
        0.0, "Objective", "bits a weight of the codes that RATE_REG_WEIGHT is adapted to reach; 0 = a fixed weight")
    noise_qat_step_sigmas: float = knob(
        0.0, "Objective", "train through uniform noise of this step, in spreads of a row, laid out as the export's; 0 = off")
    noise_qat_start_frac: float = knob(0.7, "Objective", "share of the training after which the noise sets in")
    finish_steps: int = knob(
        0, "Objective", "last steps that see the weights as the file will hold them: rounded each step, or, where a trellis"
        " places them (EXPORT_SCHEME=rd, TCQ_STATES above 0), frozen in turn; 0 = none")
    finish_lr: float = knob(0.12, "Objective", "share of the learning rates that freezing starts with, falling to zero")
    export_grid_every: int = knob(
        1000, "Objective", "steps between looks at the export: rd's steps, price lists, the shape of the weights", low=1)

    calibration_tokens: int = knob(
        0, "Export", "training tokens, inside the training time, from which the export learns what errors cost; 0 = none",
        free=True)
    export_tune_steps: int = knob(
        0, "Export", "rd: steps, inside the training time, that tune the file's steps and small tensors after quantisation;"
        " 0 = none", free=True)
    sensitivity_map: str = knob("", "Export", "file of scripts/sensitivity.py for EXPORT_ALLOCATE=sensitivity", free=True)
    artifact_every: int = knob(
        0, "Export", "steps between measurements of the artifact's size, beside the training; 0 = none", free=True)

    @classmethod
    def parse(cls, env: Mapping[str, str]) -> tuple[Config, list[str]]:
        """The knobs that `env` sets, and every malformed value, unknown name and inconsistency (malformed ones read as
        their defaults, so that further faults are found in the same pass).
        """
        values: dict[str, Any] = {}
        problems = unknown_knobs(env)
        for f in fields(cls):
            if f.name.upper() in env:
                try:
                    values[f.name] = parse_knob(f, env[f.name.upper()])
                except ValueError as error:
                    problems.append(str(error))
        cfg = cls(**values)
        return cfg, problems + cfg.problems()

    @property
    def has_objective(self) -> bool:
        """Something beside the cross-entropy acts on the weights."""
        return any(getattr(self, name) for name in TERMS)

    @property
    def freezing_steps(self) -> int:
        """FINISH_STEPS where they freeze the weights; where they round them the schedule is that of other steps."""
        return self.finish_steps if self.export_scheme == "rd" and self.tcq_states else 0

    @property
    def shape(self) -> ModelShape:
        return ModelShape(**{f.name: getattr(self, f.name) for f in fields(ModelShape)})

    @property
    def micro_batch(self) -> int:
        """Tokens in one forward pass."""
        return self.micro_batch_tokens or self.train_batch_tokens // SPANS_PER_STEP

    @property
    def micro_batches(self) -> int:
        """Forward passes in one step over all ranks."""
        return self.train_batch_tokens // self.micro_batch

    @property
    def eval_batch_tokens(self) -> int:
        return self.val_batch_size // SPANS_PER_STEP

    @property
    def export_options(self) -> ExportOptions:
        return ExportOptions(**{f.name: getattr(self, f.name) for f in fields(ExportOptions)})

    @property
    def modes(self) -> dict[str, str]:
        """What is asked of the evaluation beside the plain score -> the module that does it."""
        return {name.upper(): module for name, module in MODES.items() if getattr(self, name) != getattr(Config, name)}

    def tools(self) -> dict[str, str]:
        return super().tools() | self.modes | {asked: name for wanted, asked, name in (
            (self.calibration_tokens > 0, f"CALIBRATION_TOKENS={self.calibration_tokens}", "calibration"),
            (self.export_tune_steps > 0, f"EXPORT_TUNE_STEPS={self.export_tune_steps}", "tuning"),
            (self.sensitivity_map, f"SENSITIVITY_MAP={self.sensitivity_map}", "sensitivity_map"),
            *((getattr(self, name), f"{name.upper()}={getattr(self, name):g}", "objective") for name in TERMS),
            (self.artifact_every > 0, f"ARTIFACT_EVERY={self.artifact_every}", "size_gauge"),
            (self.muon_variant == "numuon", "MUON_VARIANT=numuon", "numuon"),
        ) if wanted}

    def problems(self) -> list[str]:
        found = range_problems(self, [f for f in fields(self) if f not in (*fields(ModelShape), *fields(ExportOptions))])
        found += [
            f"{name.upper()} must be in [0, 1), got {getattr(self, name)}"
            for name in ("muon_momentum", "muon_momentum_warmup_start", "beta1", "beta2")
            if not 0 <= getattr(self, name) < 1]
        found += self.shape_problems() + self.export_options.problems()
        rd = self.export_scheme == "rd"
        found += [text for wrong, text in (
            (self.export_allocate == "hessian" and not self.calibration_tokens,
             "EXPORT_ALLOCATE=hessian needs CALIBRATION_TOKENS"),
            (self.export_allocate == "sensitivity" and not self.sensitivity_map,
             "EXPORT_ALLOCATE=sensitivity needs SENSITIVITY_MAP"),
            (rd and not self.calibration_tokens, "EXPORT_SCHEME=rd needs CALIBRATION_TOKENS"),
            (rd and self.artifact_every > 0, "ARTIFACT_EVERY measures EXPORT_SCHEME=int8_zlib alone; unset one of them"),
            (self.export_tune_steps > 0 and not rd, "EXPORT_TUNE_STEPS needs EXPORT_SCHEME=rd"),
            (not 0 < self.numuon_rank_frac_final <= 1,
             f"NUMUON_RANK_FRAC_FINAL must be above 0 and at most 1, got {self.numuon_rank_frac_final}"),
            (self.numuon_hold_frac >= 0.8, f"NUMUON_HOLD_FRAC must be below 0.8, got {self.numuon_hold_frac}"),
        ) if wrong]
        found += self.objective_problems()
        if self.modes:
            with contextlib.suppress(ExportRefused):        # a missing module is export_problems' to report
                found += tool("scoring").problems(self)
        if self.adam_eps <= 0:
            found.append(f"ADAM_EPS must be above 0, got {self.adam_eps}")
        if self.run_id != Path(self.run_id).name or self.run_id in (".", ".."):
            found.append(f"RUN_ID must be a plain folder name, got {self.run_id!r}")
        if self.seed >= 2**63:
            found.append(f"SEED must be below 2^63, got {self.seed}")
        sizes = self.train_batch_tokens, self.train_seq_len, self.val_batch_size
        return found + (self.batch_problems() if min(sizes) >= 1 and self.micro_batch_tokens >= 0 else [])

    def objective_problems(self) -> list[str]:
        plain = self.export_scheme == "rd" or (not self.solves and self.int8_axis_mode != "auto")
        return [text for wrong, text in (
            (self.has_objective and not plain, "training can see EXPORT_SCHEME=rd, or int8 steps that no solver chooses:"
             " with a knob of group Objective EXPORT_ALLOCATE must be uniform, CAP_POLICY not fit, INT8_AXIS_MODE not auto"),
            (0 < self.rate_target_bits < math.inf and not self.rate_reg_weight,
             "RATE_TARGET_BITS needs RATE_REG_WEIGHT to start from"),
            (self.rate_target_bits > 0 and self.export_scheme == "rd",
             "RATE_TARGET_BITS is for int8 grids; EXPORT_SCHEME=rd ends at EXPORT_BITS or the cap by itself"),
            (not (self.rate_reg_nu == 0 or 0.1 <= self.rate_reg_nu <= 3),
             f"RATE_REG_NU must be 0 or in 0.1..3, got {self.rate_reg_nu:g}"),
            (self.noise_qat_start_frac >= 1, f"NOISE_QAT_START_FRAC must be below 1, got {self.noise_qat_start_frac:g}"),
            (self.finish_steps > self.iterations,
             f"FINISH_STEPS must be at most ITERATIONS={self.iterations}, got {self.finish_steps}"),
            (0 < self.freezing_steps <= self.unique_blocks,
             f"FINISH_STEPS freezes the embedding and {self.unique_blocks} blocks in turn under TCQ_STATES above 0: it must"
             f" be 0 or at least {self.unique_blocks + 1}, got {self.finish_steps}"),
            (self.finish_steps > 0 and self.export_tune_steps > 0,
             "FINISH_STEPS trains what EXPORT_TUNE_STEPS would tune; unset one of them"),
        ) if wrong]

    def batch_problems(self) -> list[str]:
        span = SPANS_PER_STEP * self.train_seq_len
        return [text for wrong, text in (
            (self.train_batch_tokens % span != 0,
             f"TRAIN_BATCH_TOKENS must be a multiple of {SPANS_PER_STEP} * TRAIN_SEQ_LEN = {span},"
             f" got {self.train_batch_tokens}"),
            (self.micro_batch_tokens > 0
             and (self.micro_batch % self.train_seq_len != 0 or self.train_batch_tokens % self.micro_batch != 0),
             f"MICRO_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN={self.train_seq_len} that divides"
             f" TRAIN_BATCH_TOKENS={self.train_batch_tokens}, got {self.micro_batch_tokens}"),
            (self.eval_batch_tokens < self.train_seq_len,
             f"VAL_BATCH_SIZE must be at least {SPANS_PER_STEP} * TRAIN_SEQ_LEN = {span}, got {self.val_batch_size}"),
            *((0 < getattr(self, name) < self.train_seq_len,
               f"{name.upper()} must be 0 (none) or at least TRAIN_SEQ_LEN={self.train_seq_len}, got {getattr(self, name)}")
              for name in ("val_max_tokens", "roundtrip_val_max_tokens")),
        ) if wrong]

    def world_problems(self, world_size: int) -> list[str]:
        if self.micro_batches % world_size == 0:
            return []
        working = [n for n in range(1, self.micro_batches + 1) if self.micro_batches % n == 0]
        return [
            f"WORLD_SIZE={world_size} does not divide the {self.micro_batches} micro-batches of a step; these do:"
            f" {', '.join(map(str, working))} (MICRO_BATCH_TOKENS={self.micro_batch} sets how many there are)"]


def parse_knob(f: Field[Any], text: str) -> Any:
    """The value of one environment variable, by the type of the field's default; raises ValueError naming the knob."""
    name, kind, choices = f.name.upper(), type(f.default), f.metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {text!r}")
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name} must be 0 or 1, got {text!r}")
        return text == "1"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {text!r}") from None


def unknown_knobs(env: Mapping[str, str]) -> list[str]:
    """Variables that look like a knob and are none: one of our families' names, or a near miss of a knob's name."""
    known = {f.name.upper() for f in fields(Config)}
    families = (
        "ARTIFACT_", "CALIBRATION_", "COMPRESSION_", "CONTROL_TENSOR_", "EVAL_", "EXPORT_", "FINISH_", "INT8_",
        "MICRO_BATCH_", "MUON_", "NOISE_QAT_", "NUMUON_", "OUTLIER_REG_", "RATE_REG_", "SW_", "TERNARY_", "TRAIN_", "TTT_",
        "VAL_", "WARMDOWN_", "WARMUP_")
    found = []
    for name in sorted(env.keys() - known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.88)
        if near or name.startswith(families):
            meant = f", did you mean {near[0]}?" if near else "."
            found.append(f"{name} is not a knob of this version{meant} Unset it to go on")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Runtime: the one place that knows devices, ranks, precision, compilation and where the log goes.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Runtime:
    """Where this process computes. `device_problems` first, then `start`; the rest of the file asks it, never torch.cuda."""
    device: torch.device
    dtype: torch.dtype           # of the autocast matrix products and of the token embedding
    compiled: bool
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_config(cls, cfg: Config, env: Mapping[str, str]) -> Runtime:
        """Resolves every `auto`; touches no device. Ranks come from torchrun's RANK, WORLD_SIZE and LOCAL_RANK."""
        kind = cfg.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        local_rank = int(env.get("LOCAL_RANK", "0"))
        dtype = {"auto": torch.bfloat16 if kind == "cuda" else torch.float32}.get(cfg.compute_dtype)
        return cls(
            device=torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind),
            dtype=dtype or getattr(torch, cfg.compute_dtype),
            compiled={"auto": kind == "cuda"}.get(cfg.enable_torch_compile, cfg.enable_torch_compile == "1"),
            rank=int(env.get("RANK", "0")),
            world_size=int(env.get("WORLD_SIZE", "1")), local_rank=local_rank)

    def problems(self, cfg: Config) -> list[str]:
        """Why this machine cannot compute as asked."""
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(self.device.type, True)
        if not available:
            return [f"DEVICE={self.device.type} is not available to this PyTorch ({torch.__version__}); use auto or cpu"]
        if self.device.type == "cuda" and self.local_rank >= torch.cuda.device_count():
            return [f"LOCAL_RANK={self.local_rank} has no GPU, this machine has {torch.cuda.device_count()}"]
        on_cuda = self.device.type == "cuda"
        return [text for wrong, text in (
            (self.device.type == "mps" and self.world_size > 1, "DEVICE=mps runs one process, WORLD_SIZE must be 1"),
            (cfg.sdp_backend != "auto" and not on_cuda,
             f"SDP_BACKEND={cfg.sdp_backend} is a kernel of cuda, the device is {self.device.type}; use auto"),
            (cfg.sdp_backend in ("flash", "cudnn") and (cfg.window_size > 0 or self.dtype is torch.float32),
             f"SDP_BACKEND={cfg.sdp_backend} takes neither WINDOW_SIZE's mask nor float32; use auto"),
            (cfg.muon_variant == "numuon" and self.device.type == "mps",
             "MUON_VARIANT=numuon computes in float64, which DEVICE=mps cannot; use another device or muon"),
        ) if wrong]

    def start(self, sdp_backend: str) -> None:
        """Sets the global switches of the device and joins the process group."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
            wanted = ("flash", "efficient", "math") if sdp_backend == "auto" else (sdp_backend,)
            torch.backends.cuda.enable_flash_sdp("flash" in wanted)
            torch.backends.cuda.enable_mem_efficient_sdp("efficient" in wanted)
            torch.backends.cuda.enable_math_sdp("math" in wanted)
            torch.backends.cuda.enable_cudnn_sdp("cudnn" in wanted)
        if self.world_size > 1:
            on_gpu = self.device.type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=self.device if on_gpu else None)

    def bind_thread(self) -> None:
        """A thread that pins memory would otherwise open a context on the first GPU, for every rank."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def stop(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def master(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        half = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if half else contextlib.nullcontext()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiled else function

    def wrap(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The (compiled) model as training calls it: under DDP when there are several ranks."""
        if self.world_size == 1:
            return forward
        assert isinstance(forward, nn.Module)
        ids = [self.local_rank] if self.device.type == "cuda" else None
        return DistributedDataParallel(forward, device_ids=ids, broadcast_buffers=False)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """`values` summed (or maximised) over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=op)
        return values

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of the rank `source` on every rank; the others pass anything."""
        if self.world_size == 1:
            return data
        size = torch.tensor(len(data), device=self.device)
        dist.broadcast(size, src=source)
        if not size:
            return b""
        buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, src=source)
        return buffer.cpu().numpy().tobytes()

    def peak_memory_mib(self) -> tuple[int, int]:
        """(allocated, reserved) MiB: of the GPU, elsewhere the process's largest resident size twice."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        import resource  # not on every platform; only a CPU or MPS run asks

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform != "darwin" else 1 << 20)
        return peak, peak

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        precision = str(self.dtype).removeprefix("torch.")
        return f"device:{self.device} ({name}) world_size:{self.world_size} dtype:{precision} compile:{self.compiled}"


class RunFolder:
    """logs/<RUN_ID>/ and what goes there: train.log, metrics.jsonl, config.json, summary.json. Silent on ranks above 0."""

    def __init__(self, path: Path, master: bool):
        self.path, self.master = path, master
        self.checkpoints = path / "checkpoints"
        if master:
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def log(self, line: str) -> None:
        if not self.master:
            return
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        with (self.path / "train.log").open("a", encoding="utf-8") as f:
            f.write(line + "\n")

    def metric(self, **row: Any) -> None:
        if self.master:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    def forget_metrics_from(self, step: int) -> None:
        """Drops the rows that a run going on at `step` writes again (its validation there too), and a half-written one."""
        path = self.path / "metrics.jsonl"
        if self.master and path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    row = json.loads(line)
                    kept += [line + "\n"] if row["step"] < step or (row["step"], row["kind"]) == (step, "train") else []
            write_atomically(path, "".join(kept).encode())

    def write_json(self, name: str, value: Any) -> None:
        if self.master:
            write_atomically(self.path / name, (json.dumps(value, indent=1) + "\n").encode())


def progress(iterable_total: int, what: str, enabled: bool, initial: int = 0) -> tqdm[Any]:
    """A bar on a terminal, nothing elsewhere: log lines tell the same there."""
    return tqdm(total=iterable_total, desc=what, initial=initial, leave=False, disable=not (enabled and sys.stderr.isatty()))


# ----------------------------------------------------------------------------------------------------------------------
# Data: token shards, the tokenizer that must belong to them, and the loader whose position is one number.
# ----------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 256 * 4  # 256 little-endian int32: magic, version, number of tokens, zeros


class DataError(ValueError):
    """A shard, tokenizer or manifest that cannot be used; the message says what was found, wanted, and what to do."""


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, (tokens,) uint16, memory-mapped read-only. Raises DataError."""
    again = "fetch or prepare it again with data/prepare.py"
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_BYTES // 4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {again}") from None
    if size < SHARD_HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, shorter than the {SHARD_HEADER_BYTES}-byte header; {again}")
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(f"{path}: not a token shard, magic {header[0]} version {header[1]},"
                        f" wanted {SHARD_MAGIC} version {SHARD_VERSION}; {again}")
    tokens = int(header[2])
    if tokens < 1 or size != SHARD_HEADER_BYTES + 2 * tokens:
        wanted_bytes = SHARD_HEADER_BYTES + 2 * tokens
        raise DataError(f"{path}: {size} bytes, its header's {tokens} tokens make {wanted_bytes}; {again}")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(tokens,))


def read_split(data_path: str | Path, split: str) -> list[np.ndarray]:
    """All shards of `split` ("train" or "val") in the order of their names. Raises DataError."""
    paths = sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise DataError(f"no fineweb_{split}_*.bin in {data_path} (DATA_PATH); make them with data/prepare.py")
    return [read_shard(path) for path in paths]


class Tokenizer:
    """A SentencePiece model or the challenge's 260-token byte tokenizer behind one face. Raises DataError.

    `sha256` is that of the file: two tokenizers of equal vocabulary size decode each other's ids to nonsense.
    """

    BYTE_OFFSET = 4  # the byte tokenizer: pad 0, bos 1, eos 2, unk 3, then the 256 byte values

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path}: cannot be read ({error.strerror}); TOKENIZER_PATH must name it") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.pieces: Any = None   # the SentencePiece processor; None for the byte tokenizer
        if data[:1] == b"{":
            self.vocab_size, self.bos_id = self._read_byte_tokenizer(data), 1
            return
        try:
            self.pieces = spm.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError):
            raise DataError(f"tokenizer {path}: neither a SentencePiece model nor the byte tokenizer's JSON") from None
        self.vocab_size, self.bos_id = int(self.pieces.vocab_size()), int(self.pieces.bos_id())
        if self.bos_id < 0:
            raise DataError(f"tokenizer {path}: has no BOS token, which separates the documents of a shard")
        if self.pieces.piece_to_id("\u2581") == self.pieces.unk_id():
            raise DataError(
                f"tokenizer {path}: lacks the bare space piece U+2581; a lone space would fall back to its three bytes and"
                " be counted three times, so val_bpb would be too good; train it with the space character in its vocabulary")

    def _read_byte_tokenizer(self, data: bytes) -> int:
        wanted = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": self.BYTE_OFFSET, "byte_count": 256}
        try:
            spec = json.loads(data)
            if spec["tokenizer_type"] != "pure_byte" or spec["config"] != wanted:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"tokenizer {self.path}: JSON, but not a pure_byte tokenizer with {wanted}") from None
        return self.BYTE_OFFSET + 256

    def encode(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        if self.pieces is None:
            return [[b + self.BYTE_OFFSET for b in text.encode("utf-8", "replace")] for text in texts]
        return self.pieces.encode(list(texts), out_type=int, num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        if self.pieces is None:
            data = bytes(i - self.BYTE_OFFSET for i in ids if i >= self.BYTE_OFFSET)
            return data.decode("utf-8", "replace")
        return self.pieces.decode([int(i) for i in ids])


def sample_documents(tokens: np.ndarray, bos_id: int, max_documents: int = 256, max_tokens: int = 400_000
                     ) -> list[np.ndarray]:
    """The first documents of a token stream without their BOS, the last left out (a cap may cut it) unless it is alone."""
    head = np.asarray(tokens[:max_tokens])
    starts = np.flatnonzero(head == bos_id)
    if starts.size == 0:
        raise DataError(f"no BOS (id {bos_id}) among the first {head.size} validation tokens; wrong tokenizer or shards")
    ends = np.append(starts[1:], head.size if starts.size == 1 and head.size == tokens.size else starts[-1])
    documents = [head[a + 1:b] for a, b in zip(starts, ends, strict=True) if b > a + 1]
    return documents[:max_documents]


def check_pairing(data_path: str | Path, tokenizer: Tokenizer, val_tokens: np.ndarray) -> str:
    """Proves that tokenizer and shards belong together; returns how. Raises DataError.

    Prepared data names its tokenizer's SHA-256 in manifest.json. Published shards have no such manifest: their documents
    are decoded and encoded again, and at least 99 % of them must give the very ids.
    """
    manifest = Path(data_path) / "manifest.json"
    if manifest.exists():
        try:
            wanted = json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{manifest}: names no tokenizer sha256; prepare the data again or remove the file") from None
        if wanted != tokenizer.sha256:
            raise DataError(
                f"tokenizer {tokenizer.path} (sha256 {tokenizer.sha256[:16]}) did not make the shards in {data_path}"
                f" (sha256 {str(wanted)[:16]}); set TOKENIZER_PATH to the one that did")
        return "manifest"
    documents = sample_documents(val_tokens, tokenizer.bos_id)
    if not documents:
        raise DataError(f"the first validation tokens in {data_path} hold no whole document to check the tokenizer with")
    texts = [tokenizer.decode(ids.tolist()) for ids in documents]
    same = sum(again == ids.tolist() for again, ids in zip(tokenizer.encode(texts), documents, strict=True))
    if same < 0.99 * len(documents):
        raise DataError(
            f"tokenizer {tokenizer.path} did not make the shards in {data_path}: of {len(documents)} validation documents"
            f" decoded and encoded again only {same} gave the same ids, wanted 99 %; set TOKENIZER_PATH to the one that did")
    return f"{same}/{len(documents)} documents re-encoded"


class TokenStream:
    """The shards of a split as one endless ring of tokens."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = list(shards)
        self.starts = np.cumsum([0] + [shard.size for shard in shards])
        self.size = int(self.starts[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of the ring, (count,) uint16, crossing shards and the end as needed."""
        pieces = []
        while count > 0:
            start %= self.size
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[i][start - int(self.starts[i]):][:count]
            pieces.append(piece)
            start, count = start + piece.size, count - piece.size
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Loader:
    """The baseline's stream of batches, whatever the world size and the micro-batch: step s takes 8 spans of tokens/8 + 1
    from the ring, each cut into sequences whose targets are shifted by one. The position is the number of steps consumed.
    """

    def __init__(self, stream: TokenStream, cfg: Config, rt: Runtime):
        self.stream, self.rt = stream, rt
        self.seq_len, self.vocab_size = cfg.train_seq_len, cfg.vocab_size
        self.span_tokens = cfg.train_batch_tokens // SPANS_PER_STEP
        self.rows = cfg.micro_batch // cfg.train_seq_len              # sequences a micro-batch
        self.per_rank = cfg.micro_batches // rt.world_size            # micro-batches a step on this rank
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=rt.bind_thread)
        self.seek(0)

    def seek(self, step: int) -> None:
        self.served = step * self.per_rank
        self.ahead: Future[Tensor] = self.pool.submit(self._read, self.served)

    @property
    def step(self) -> int:
        """Whole steps consumed."""
        return self.served // self.per_rank

    def position(self, step: int) -> int:
        """Where a step's tokens begin in the ring."""
        return step * SPANS_PER_STEP * (self.span_tokens + 1)

    def _read(self, index: int) -> Tensor:
        """Micro-batch `index` of this rank, (rows, seq_len + 1) int64 on the host."""
        step, k = divmod(index, self.per_rank)
        first_row = (k * self.rt.world_size + self.rt.rank) * self.rows
        step_start = self.position(step)
        rows = []
        for row in range(first_row, first_row + self.rows):
            span, offset = divmod(row * self.seq_len, self.span_tokens)
            rows.append(self.stream.take(step_start + span * (self.span_tokens + 1) + offset, self.seq_len + 1))
        batch = np.stack(rows)
        if batch.max() >= self.vocab_size:
            raise DataError(
                f"a training shard holds token {batch.max()}, VOCAB_SIZE={self.vocab_size} allows {self.vocab_size - 1};"
                " check the data with: python data/prepare.py verify DIR")
        tokens = torch.from_numpy(batch.astype(np.int64))
        return tokens.pin_memory() if self.rt.device.type == "cuda" else tokens

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next micro-batch, (rows, seq_len) int64 each; reads the one after meanwhile."""
        tokens = self.ahead.result().to(self.rt.device, non_blocking=True)
        self.served += 1
        self.ahead = self.pool.submit(self._read, self.served)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Metric: bits per byte of validation text, by the challenge's byte rule, summed in float64.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes that a target token adds to the text, by the challenge's rule: a piece's own bytes, and one for a leading
    space unless the token before it is a boundary (control, unknown or unused). Tensors of (vocab_size,).
    """
    own: Tensor             # int64, bytes of the piece without its leading space; 0 for boundary tokens
    leading_space: Tensor   # bool
    boundary: Tensor        # bool

    def count(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Bytes of each target given the token before it, int64 in the shape of `targets`."""
        return self.own[targets] + (self.leading_space[targets] & ~self.boundary[previous]).long()


def byte_table(tokenizer: Tokenizer, device: torch.device | str = "cpu") -> ByteTable:
    own = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    leading_space = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    boundary = np.ones(tokenizer.vocab_size, dtype=np.bool_)
    if tokenizer.pieces is None:
        own[Tokenizer.BYTE_OFFSET:], boundary[Tokenizer.BYTE_OFFSET:] = 1, False
    else:
        sp = tokenizer.pieces
        for i in range(tokenizer.vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            piece = sp.id_to_piece(i)
            leading_space[i] = piece.startswith("\u2581") and not sp.is_byte(i)
            text = piece[int(leading_space[i]):].replace("\u2581", " ")  # a space inside a piece is one byte too
            own[i] = 1 if sp.is_byte(i) else len(text.encode("utf-8"))
    return ByteTable(*(torch.from_numpy(a).to(device) for a in (own, leading_space, boundary)))


@dataclass(frozen=True)
class EvalResult:
    """val_loss in nats per token, val_bpb in bits per byte of text."""
    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float


def evaluate(
    token_nats: Callable[[Tensor, Tensor], Tensor], tokens: np.ndarray, table: ByteTable, rt: Runtime,
    *, seq_len: int, batch_tokens: int, max_tokens: int = 0,
) -> EvalResult:
    """Scores consecutive windows of `seq_len` targets, each window on its own, split over the ranks.

    `token_nats(x, y)` gives the cross-entropy of each target, (B, T) nats. Sums are float64 over single tokens, so the
    result depends on world size and batch size only through the kernels' rounding. The last partial window is left out,
    as in the challenge. A batch shorter than the others is padded, so that one compiled graph serves all.
    """
    t0 = time.perf_counter()
    windows = (min(max_tokens, tokens.size - 1) if max_tokens else tokens.size - 1) // seq_len
    first, last = windows * rt.rank // rt.world_size, windows * (rt.rank + 1) // rt.world_size
    batch = max(1, min(batch_tokens // seq_len, windows))
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    with torch.inference_mode(), progress(last - first, "evaluate", rt.master) as bar:
        for start in range(first, last, batch):
            count = min(batch, last - start)
            piece = np.asarray(tokens[start * seq_len:(start + count) * seq_len + 1]).astype(np.int64)
            x, y = (torch.zeros(batch, seq_len, dtype=torch.int64) for _ in range(2))
            x[:count], y[:count] = (torch.from_numpy(side.reshape(count, seq_len)) for side in (piece[:-1], piece[1:]))
            x, y = x.to(rt.device), y.to(rt.device)
            with rt.autocast():
                nats = token_nats(x, y)[:count]
            counted = table.count(x[:count], y[:count])
            sums += torch.tensor([float(nats.double().sum() if rt.device.type != "mps" else nats.cpu().double().sum()),
                                  count * seq_len, int(counted.sum())], dtype=torch.float64)
            bar.update(count)
    sums = rt.reduce(sums.to(rt.device) if rt.world_size > 1 else sums)
    nats_sum, token_count, byte_count = sums.tolist()
    return EvalResult(
        val_loss=nats_sum / token_count, val_bpb=nats_sum / math.log(2) / byte_count,
        tokens=int(token_count), bytes=int(byte_count), seconds=time.perf_counter() - t0)


# ----------------------------------------------------------------------------------------------------------------------
# Model: the challenge's baseline GPT, small parts first.
# Shape letters: B sequences, T tokens, V vocabulary, D model_dim, E embedding width, H query heads, K key/value heads,
# C head width.
# ----------------------------------------------------------------------------------------------------------------------

CONTROL_TENSORS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")  # vectors that steer; kept in float32
NATIVE_GQA = "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """A bias-free linear layer: float32 weight for the optimiser, cast to the input's dtype for the product."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


def rope_tables(length: int, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position x frequency, (length, width / 2) each (Su et al. 2021, arXiv 2104.09864).

    Everything is computed in `dtype`. The baseline casts its frequencies to bfloat16 with the rest of the model, which
    rounds positions above 256; a model must be evaluated with the tables it was trained with.
    """
    frequencies = (1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)).to(dtype)
    angles = torch.outer(torch.arange(length, dtype=dtype), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + C/2) of x (B, T, H, C) or (B, H, T, C) by tables that broadcast to it."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token to its whole prefix; q (B, H, T, C), k and v (B, K, T, C) with K dividing H."""
    if k.size(1) == q.size(1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if NATIVE_GQA:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of each token to the last `window` tokens, itself included; shapes as `causal_attention`.

    The sequence is cut into blocks of `window`: a block's queries need the keys of their own block and the one before, so
    the cost is T * 2 * window instead of T * T on every device, and one (window, 2 window) mask serves all blocks.
    """
    batch, heads, length, width = q.shape
    if window >= length:
        return causal_attention(q, k, v)
    k, v = (t.repeat_interleave(heads // t.size(1), dim=1) for t in (k, v))
    blocks = -(-length // window)
    q, k, v = (F.pad(t, (0, 0, 0, blocks * window - length)) for t in (q, k, v))
    first = F.scaled_dot_product_attention(q[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True)

    def fold(t: Tensor) -> Tensor:  # (B, H, n * window, C) -> (B * n, H, window, C)
        return t.reshape(batch, heads, blocks - 1, window, width).transpose(1, 2).flatten(0, 1)

    pairs_k, pairs_v = (torch.cat((fold(t[:, :, :-window]), fold(t[:, :, window:])), dim=2) for t in (k, v))
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)[None, :]
    rest = F.scaled_dot_product_attention(fold(q[:, :, window:]), pairs_k, pairs_v, attn_mask=(j > i) & (j <= i + window))
    rest = rest.unflatten(0, (batch, blocks - 1)).transpose(1, 2).reshape(batch, heads, -1, width)
    return torch.cat((first, rest), dim=2)[:, :, :length]


class Attention(nn.Module):
    """Grouped-query causal self-attention with normalised, rotated queries and keys and a learned gain per query head."""

    def __init__(self, shape: ModelShape, qk_gain_init: float):
        super().__init__()
        self.heads, self.kv_heads, self.window = shape.num_heads, shape.num_kv_heads, shape.window_size
        kv_dim = self.kv_heads * shape.head_dim
        self.c_q = CastedLinear(shape.model_dim, shape.model_dim)
        self.c_k = CastedLinear(shape.model_dim, kv_dim)
        self.c_v = CastedLinear(shape.model_dim, kv_dim)
        self.proj = CastedLinear(shape.model_dim, shape.model_dim)
        self.q_gain = nn.Parameter(torch.full((shape.num_heads,), qk_gain_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        sides = (self.c_q, self.heads), (self.c_k, self.kv_heads), (self.c_v, self.kv_heads)
        heads = [linear(x).unflatten(-1, (count, -1)).transpose(1, 2) for linear, count in sides]    # (B, count, T, C)
        q, k = (rotate(rms_norm(t), cos, sin) for t in heads[:2])
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        y = window_attention(q, k, heads[2], self.window) if self.window else causal_attention(q, k, heads[2])
        return self.proj(y.transpose(1, 2).flatten(2))               # (B, T, D)


class MLP(nn.Module):
    """Two linear layers around relu^2 (So et al. 2021, arXiv 2109.08668)."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.fc = CastedLinear(shape.model_dim, shape.mlp_mult * shape.model_dim)
        self.proj = CastedLinear(shape.mlp_mult * shape.model_dim, shape.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    """Mixes the stream with its start x0, then adds attention and MLP, each scaled per dimension."""

    def __init__(self, shape: ModelShape, qk_gain_init: float):
        super().__init__()
        self.attn = Attention(shape, qk_gain_init)
        self.mlp = MLP(shape)
        self.attn_scale = nn.Parameter(torch.ones(shape.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(shape.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(shape.model_dim), torch.zeros(shape.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x), cos, sin)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The network of `shape`; parameter names and the order of random draws are the baseline's.

    Layer i uses block i modulo the number of unique blocks. With EMBED_DIM the embedding is (V, E) times (E, D), and a
    tied head goes back through the same two factors.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: ModelShape, max_seq_len: int, *, qk_gain_init: float = 1.5, tied_embed_init_std: float = 0.005,
                 rope_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.softcap = shape.logit_softcap
        self.encoder_layers = shape.num_layers // 2
        self.layer_blocks = [i % shape.unique_blocks for i in range(shape.num_layers)]
        self.tok_emb = nn.Embedding(shape.vocab_size, shape.embedding_width)
        factorised = shape.embedding_width < shape.model_dim
        self.embed_proj = CastedLinear(shape.embedding_width, shape.model_dim) if factorised else None
        self.skip_weights = nn.Parameter(torch.ones(self.encoder_layers, shape.model_dim))
        blocks = [Block(shape, qk_gain_init) for _ in range(shape.unique_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = None if shape.tie_embeddings else CastedLinear(shape.model_dim, shape.vocab_size)
        cos, sin = rope_tables(max_seq_len, shape.head_dim, shape.rope_base, rope_dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if shape.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=tied_embed_init_std)
        closing = [linear for block in blocks for linear in (block.attn.proj, block.mlp.proj)]
        for linear in [*closing, *([] if self.lm_head is None else [self.lm_head])]:
            nn.init.zeros_(linear.weight)

    def features(self, ids: Tensor) -> Tensor:
        """The normalised final stream, (B, T, D), of token ids (B, T)."""
        x = self.tok_emb(ids)
        if self.embed_proj is not None:
            x = self.embed_proj(x)
        x = x0 = rms_norm(x)
        cos, sin = (table[: ids.size(1)].to(x.dtype) for table in (self.cos, self.sin))
        skips: list[Tensor] = []
        for layer, block in enumerate(self.layer_blocks):
            if layer >= self.encoder_layers and skips:
                x = x + self.skip_weights[layer - self.encoder_layers].to(x.dtype) * skips.pop()
            x = self.blocks[block](x, x0, cos, sin)
            if layer < self.encoder_layers:
                skips.append(x)
        return rms_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Soft-capped logits (..., V) of features (..., D)."""
        if self.lm_head is not None:
            x = self.lm_head(x)
        else:
            if self.embed_proj is not None:
                x = F.linear(x, self.embed_proj.weight.t().to(x.dtype))
            x = F.linear(x, self.tok_emb.weight)
        return self.softcap * torch.tanh(x / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats: the mean, or with reduction="none" that of each target, (B, T)."""
        logits = self.logits(self.features(ids).flatten(0, 1))
        nats = F.cross_entropy(logits.float(), targets.flatten(), reduction=reduction)
        return nats.view_as(targets) if reduction == "none" else nats


def build_model(shape: ModelShape, rt: Runtime, max_seq_len: int, **init: float) -> GPT:
    """A model on the runtime's device: matrices and vectors float32, the token embedding in the compute dtype. Initial
    values are those that the compute dtype holds, as the baseline's, which casts its model down and matrices up again.
    """
    rope_dtype = rt.dtype if shape.rope_dtype == "auto" else getattr(torch, shape.rope_dtype)
    model = GPT(shape, max_seq_len, rope_dtype=rope_dtype, **init).to(rt.device)
    for p in model.parameters():
        p.data = p.data.to(rt.dtype).to(torch.float32)
    model.tok_emb.to(rt.dtype)
    return model


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights, without allocating them."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in GPT(shape, max_seq_len=1).state_dict().items()}


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers: Muon for matrices, Adam for the embedding, the head and everything that is a vector.
# ----------------------------------------------------------------------------------------------------------------------


def orthogonalise(g: Tensor, steps: int, dtype: torch.dtype, eps: float = 1e-7) -> Tensor:
    """The nearest (semi-)orthogonal matrix to g, roughly: Newton-Schulz in `dtype` with the quintic coefficients of
    Jordan et al. 2024 ("Muon", https://kellerjordan.github.io/posts/muon/), singular values end in about 0.7 .. 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(dtype)
    x = x / (x.norm() + eps)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz. Each rank updates every world_size-th matrix and holds its state; one
    all-reduce of the updates (the others contribute zeros) gives all ranks the same weights.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, backend_steps: int, dtype: torch.dtype, rt: Runtime):
        super().__init__(params, {"lr": lr, "momentum": 0.0, "progress": 0.0})
        self.backend_steps, self.dtype, self.rt = backend_steps, dtype, rt
        self.orthogonalise = rt.compile(orthogonalise)

    def owned(self) -> Iterator[tuple[int, Tensor, bool]]:
        """(owning rank, matrix, whether that is this rank) in parameter order."""
        for i, p in enumerate(self.param_groups[0]["params"]):
            yield i % self.rt.world_size, p, i % self.rt.world_size == self.rt.rank

    def momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def gathered(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The state of every matrix, sent by the rank that holds it; all ranks must iterate."""
        for owner, p, mine in self.owned():
            state = self.state.get(p, {})
            yield p, state if self.rt.world_size == 1 else load_safetensors(
                self.rt.broadcast(save_safetensors(state) if mine else b"", owner))

    def update(self, p: Tensor, momentum: Tensor) -> Tensor:
        """The direction of a step of p, before its scale by shape."""
        assert p.grad is not None
        nesterov = p.grad.add(momentum, alpha=self.param_groups[0]["momentum"])
        return self.orthogonalise(nesterov, self.backend_steps, self.dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        total = sum(p.numel() for p in group["params"])
        updates = torch.zeros(total, device=self.rt.device, dtype=self.dtype)
        slots = updates.split([p.numel() for p in group["params"]])
        for (_, p, mine), slot in zip(self.owned(), slots, strict=True):
            if mine and p.grad is not None:
                momentum = self.momentum_of(p).mul_(group["momentum"]).add_(p.grad)
                slot.copy_((self.update(p, momentum) * max(1, p.size(0) / p.size(1)) ** 0.5).flatten())
        self.rt.reduce(updates)
        for p, slot in zip(group["params"], slots, strict=True):
            p.add_(slot.view_as(p).to(p.dtype), alpha=-group["lr"])


def build_optimizers(model: GPT, cfg: Config, rt: Runtime) -> list[torch.optim.Optimizer]:
    """The baseline's groups: embedding, head, matrices (Muon), vectors. They partition the model's parameters."""
    head: list[Tensor] = [] if model.lm_head is None else [model.lm_head.weight]
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, p in model.named_parameters():
        if p is not model.tok_emb.weight and not any(p is h for h in head):
            is_vector = p.ndim < 2 or any(control in name for control in CONTROL_TENSORS)
            (vectors if is_vector else matrices).append(p)

    def adam(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)

    muon_dtype = rt.dtype if cfg.muon_dtype == "auto" else getattr(torch, cfg.muon_dtype)
    given = matrices, cfg.matrix_lr, cfg.muon_backend_steps, muon_dtype, rt
    optimizers = [
        adam([model.tok_emb.weight], cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr),
        *([adam(head, cfg.head_lr)] if head else []),
        tool("numuon").NuMuon(cfg, *given) if cfg.muon_variant == "numuon" else Muon(*given),
        adam(vectors, cfg.scalar_lr)]
    grouped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters())), "optimiser groups must partition the parameters"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step and of the training time.
# ----------------------------------------------------------------------------------------------------------------------


def lr_scale(cfg: Config, step: int, elapsed_ms: float) -> float:
    """Factor on every learning rate: 1, then linear to 0 over the last WARMDOWN_ITERS steps, or over the time that so many
    steps take at the pace so far when a wallclock cap is set. Steps that freeze come after that, linear from FINISH_LR to 0.
    """
    left, step_ms, last = steps_left(cfg, step, elapsed_ms), elapsed_ms / max(step, 1), cfg.freezing_steps
    if left <= last > 0:
        return cfg.finish_lr * left / last
    if cfg.warmdown_iters == 0:
        return 1.0
    if cfg.max_wallclock_seconds == 0:
        return min(1.0, max(0.0, (cfg.iterations - last - step) / cfg.warmdown_iters))
    remaining_ms = max(1000 * cfg.max_wallclock_seconds - elapsed_ms - last * step_ms, 0.0)
    return min(1.0, remaining_ms / max(cfg.warmdown_iters * step_ms, 1e-9))


def steps_left(cfg: Config, step: int, elapsed_ms: float) -> float:
    """Steps to come, at the pace so far when a wallclock cap is set."""
    left_ms = 1000 * cfg.max_wallclock_seconds - elapsed_ms
    by_clock = left_ms * step / elapsed_ms if cfg.max_wallclock_seconds and step and elapsed_ms else math.inf
    return max(0.0, min(cfg.iterations - step, by_clock))


def muon_momentum(cfg: Config, step: int) -> float:
    """Linear from its start to MUON_MOMENTUM over the warm-up steps."""
    done = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return (1 - done) * cfg.muon_momentum_warmup_start + done * cfg.muon_momentum


def calibration_ms(cfg: Config, step: int, elapsed_ms: float) -> float:
    """Time to keep for it: a second for first calls of its kernels, and twice the pace so far, uncompiled as it is (for
    steps of EXPORT_TUNE_STEPS 1.5 times); at most a quarter of the cap, because the first step's pace is not the run's.
    """
    steps = 2 * cfg.calibration_tokens / cfg.train_batch_tokens + 1.5 * cfg.export_tune_steps
    needed_ms = 1000 + steps * elapsed_ms / max(step, 1)
    return min(needed_ms, 250 * cfg.max_wallclock_seconds) if cfg.calibration_tokens else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint: everything a run needs to go on as if it had never stopped, in one safetensors file.
# ----------------------------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or belongs to another run."""


def optimizer_tensors(model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All optimiser state by parameter name, `optimizer.<name>.<key>`; every rank must call, Muon's state is gathered."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for optimizer in optimizers:
        for p, state in optimizer.gathered() if isinstance(optimizer, Muon) else optimizer.state.items():
            found |= {f"optimizer.{names[id(p)]}.{key}": value for key, value in state.items()}
    return found


def restore_optimizers(tensors: Mapping[str, Tensor], model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        optimizer.state.clear()
        mine = {id(p) for _, p, owned in optimizer.owned() if owned} if isinstance(optimizer, Muon) else None
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            prefix = f"optimizer.{names[id(p)]}."
            state = {key.removeprefix(prefix): t.to(p.device) for key, t in tensors.items() if key.startswith(prefix)}
            if state and (mine is None or id(p) in mine):
                optimizer.state[p] = state


def random_state(rt: Runtime) -> dict[str, Tensor]:
    on_gpu = rt.device.type == "cuda"
    return {"rng.cpu": torch.get_rng_state()} | ({"rng.cuda": torch.cuda.get_rng_state()} if on_gpu else {})


def restore_random_state(tensors: Mapping[str, Tensor], rt: Runtime) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if rt.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """A safetensors file whose metadata values are JSON."""
    host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, save_safetensors(host, {k: json.dumps(v, sort_keys=True) for k, v in metadata.items()}))


def read_checkpoint_metadata(path: Path) -> dict[str, Any]:
    """The "training" entry of a checkpoint. Raises CheckpointError."""
    try:
        with safe_open(path, "pt") as f:
            training = json.loads((f.metadata() or {})["training"])
            found, _ = training["format"], training["config"].keys()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: damaged, or no training checkpoint of this program ({error})") from None
    if found != CHECKPOINT_FORMAT:
        raise CheckpointError(f"checkpoint {path}: format {found}, wanted {CHECKPOINT_FORMAT}")
    return training


def checkpoint_digest(tensors: Mapping[str, Tensor], training: Mapping[str, Any]) -> str:
    """BLAKE2b of all that a restored run depends on; safetensors itself has no checksum."""
    return weights_digest(tensors, json.dumps(training, sort_keys=True).encode())


def checkpoint_to_resume(cfg: Config) -> Path | None:
    """The file that RESUME names; with auto the newest of this run, None when there is none yet."""
    if cfg.resume != "auto":
        return Path(cfg.resume) if cfg.resume else None
    found = sorted((Path(cfg.log_dir) / cfg.run_id / "checkpoints").glob("step_*.safetensors"))
    return found[-1] if found else None


def resume_problems(cfg: Config) -> list[str]:
    """Why the checkpoint that RESUME names cannot continue under this configuration. From another run's one may branch off:
    with other terms of the objective, or another export for them to see.
    """
    if cfg.resume == "auto" and not cfg.run_id:
        return ["RESUME=auto needs RUN_ID to know which run to resume"]
    path = checkpoint_to_resume(cfg)
    if path is None:
        return []
    branches = path.resolve().parent.parent != (Path(cfg.log_dir) / cfg.run_id).resolve()
    try:
        then = read_checkpoint_metadata(path)["config"]
    except CheckpointError as error:
        return [f"RESUME: {error}"]
    return [
        f"RESUME: {path} was trained with {f.name.upper()}={then.get(f.name)}, now it is {getattr(cfg, f.name)};"
        " set it back or start a new run"
        for f in fields(cfg) if f.name in then and then[f.name] != getattr(cfg, f.name)
        and not (branches and f.metadata["group"] in ("Objective", "Export"))
        and (not f.metadata["free"] or (cfg.has_objective and f.metadata["group"] == "Export"))]


# ----------------------------------------------------------------------------------------------------------------------
# Train: the job, one step, and the loop around it.
# ----------------------------------------------------------------------------------------------------------------------


class TrainingDiverged(RuntimeError):
    """The loss is not finite."""


class Stopped(RuntimeError):
    """A signal ended the run after it had written a checkpoint."""

    def __init__(self, signal_number: int, checkpoint: Path):
        super().__init__(f"stopped by signal {signal_number}; continue with RESUME=auto or RESUME={checkpoint}")
        self.signal_number = signal_number


class Clock:
    """Training time in ms: runs between `resume` and `pause`, waiting for the device at both ends."""

    def __init__(self, rt: Runtime):
        self.rt, self.total_ms = rt, 0.0
        self.t0: float | None = None   # perf_counter seconds while running

    def resume(self) -> None:
        self.rt.synchronize()
        self.t0 = time.perf_counter()

    def pause(self) -> None:
        self.rt.synchronize()
        self.total_ms, self.t0 = self.elapsed_ms(), None

    def elapsed_ms(self) -> float:
        return self.total_ms + (0.0 if self.t0 is None else 1000 * (time.perf_counter() - self.t0))


@dataclass(frozen=True)
class Data:
    """What a run reads: the training ring, all validation tokens, the tokenizer and how it was shown to fit them."""
    train: TokenStream
    val: np.ndarray
    tokenizer: Tokenizer
    pairing: str


@dataclass
class Job:
    """Everything one training run owns; `step` counts the updates made."""
    cfg: Config
    rt: Runtime
    folder: RunFolder
    data: Data
    table: ByteTable
    model: GPT
    compiled: Callable[..., Tensor]   # the model for evaluation
    forward: Callable[..., Tensor]    # the same under DDP, for training
    optimizers: list[torch.optim.Optimizer]
    loader: Loader
    clock: Clock
    gauge: Any                        # measures the artifact under way: ARTIFACT_EVERY; None = nobody does
    objective: Any = None             # what the loss has beside the cross-entropy; None = nothing
    step: int = 0
    steps_left: float = math.inf      # to come, estimated when the clock ends the run
    last_checkpoint: str = "none was written"
    modes: dict[str, Any] = field(default_factory=dict)     # scores beside the plain one, by name
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(cls, cfg: Config, rt: Runtime, folder: RunFolder, data: Data) -> Job:
        torch.manual_seed(cfg.seed)
        model = build_model(cfg.shape, rt, cfg.train_seq_len, qk_gain_init=cfg.qk_gain_init,
                            tied_embed_init_std=cfg.tied_embed_init_std)
        compiled = rt.compile(model)
        job = cls(cfg, rt, folder, data, byte_table(data.tokenizer, rt.device), model, compiled, rt.wrap(compiled),
                  build_optimizers(model, cfg, rt), Loader(data.train, cfg, rt), Clock(rt),
                  tool("size_gauge").SizeGauge() if cfg.artifact_every else None)
        job.objective = tool("objective").Objective(job) if cfg.has_objective else None
        return job

    @property
    def meta(self) -> dict[str, Any]:
        """What an artifact says about the model beside its weights."""
        shape = asdict(self.cfg.shape)
        if shape["rope_dtype"] == "auto":
            shape["rope_dtype"] = str(self.rt.dtype).removeprefix("torch.")
        return {"model": shape, "train_seq_len": self.cfg.train_seq_len, "tokenizer_sha256": self.data.tokenizer.sha256}

    def evaluate(self, forward: Callable[..., Tensor], max_tokens: int) -> EvalResult:
        return evaluate(
            lambda x, y: forward(x, y, reduction="none"), self.data.val, self.table, self.rt,
            seq_len=self.cfg.train_seq_len, batch_tokens=self.cfg.eval_batch_tokens, max_tokens=max_tokens)

    def save(self) -> Path:
        """Writes logs/<RUN_ID>/checkpoints/step_NNNNNNNN.safetensors and drops the oldest ones beyond CHECKPOINT_KEEP."""
        path = self.folder.checkpoints / f"step_{self.step:08d}.safetensors"
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizers) | random_state(self.rt)
        tensors |= self.objective.state() if self.objective is not None else {}
        if self.rt.master:
            training = {"format": CHECKPOINT_FORMAT, "config": asdict(self.cfg), "step": self.step,
                        "loader_step": self.loader.step, "train_ms": self.clock.elapsed_ms(),
                        "train_tokens": self.data.train.size}
            training["digest"] = checkpoint_digest(tensors, training)
            write_checkpoint(path, tensors, {"artifact_meta": self.meta, "training": training})
            found = sorted(self.folder.checkpoints.glob("step_*.safetensors"))
            mine = found.index(path) + 1        # beyond it lie those of a continuation that a RESUME=path gave up
            for other in found[:max(0, mine - self.cfg.checkpoint_keep)] + found[mine:]:
                other.unlink()
        self.last_checkpoint = str(path)
        return path

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint; rank 0 reads the file, so it need not exist on the other nodes."""
        metadata = json.dumps(read_checkpoint_metadata(path)).encode() if self.rt.master else b""
        training = json.loads(self.rt.broadcast(metadata))
        tensors = load_safetensors(self.rt.broadcast(path.read_bytes() if self.rt.master else b""))
        if training.pop("digest", None) != checkpoint_digest(tensors, training):
            raise CheckpointError(f"checkpoint {path}: damaged, its digest is not that of its contents")
        if training["train_tokens"] != self.data.train.size:
            raise CheckpointError(f"checkpoint {path}: trained on shards of {training['train_tokens']} tokens,"
                                  f" DATA_PATH now holds {self.data.train.size}")
        self.model.load_state_dict(
            {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
        restore_optimizers(tensors, self.model, self.optimizers)
        restore_random_state(tensors, self.rt)
        if self.objective is not None:
            self.objective.load(tensors)
        self.step, self.clock.total_ms = training["step"], training["train_ms"]
        self.loader.seek(training["loader_step"])
        self.last_checkpoint = str(path)
        self.folder.log(f"resumed: step:{self.step} from {path}")


def train_step(job: Job, lr: float, momentum: float, progress: float = 0.0) -> Tensor:
    """One update over the global batch; returns this rank's mean cross-entropy in nats per token."""
    micro_steps = job.loader.per_rank
    if job.objective is not None:
        job.objective.before(job)        # weights as the export would have them
    mean_ce = torch.zeros((), device=job.rt.device)
    for micro_step in range(micro_steps):
        if isinstance(job.forward, DistributedDataParallel):
            job.forward.require_backward_grad_sync = micro_step == micro_steps - 1   # one all-reduce per update
        x, y = job.loader.next_batch()                                               # (rows, T) int64 each
        with job.rt.autocast():
            ce = job.forward(x, y)
        mean_ce += ce.detach()
        (ce * (1.0 / micro_steps)).backward()
    if job.objective is not None:
        job.objective.after(job)         # the weights themselves again, gradients of the terms added
    if job.cfg.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(job.model.parameters(), job.cfg.grad_clip_norm)
    for optimizer in job.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr
            if isinstance(optimizer, Muon):
                group["momentum"], group["progress"] = momentum, progress
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean_ce / micro_steps


def warm_up(job: Job) -> None:
    """Runs WARMUP_STEPS steps to compile and prime the kernels, then puts weights, optimisers, loader and RNG back."""
    t0 = time.perf_counter()
    weights = {name: t.clone() for name, t in job.model.state_dict().items()}
    rng, known = random_state(job.rt), job.objective.state() if job.objective is not None else {}
    for step in range(job.cfg.warmup_steps):
        train_step(job, 1.0, muon_momentum(job.cfg, 0), step / job.cfg.warmup_steps)
        if step < 20 or (step + 1) % 10 == 0:
            job.folder.log(f"warmup_step:{step + 1}/{job.cfg.warmup_steps}")
    job.model.load_state_dict(weights)
    for optimizer in job.optimizers:
        optimizer.state.clear()
    if job.objective is not None:
        job.objective.load(known)
    restore_random_state(rng, job.rt)
    job.loader.seek(0)
    job.seconds["warmup"] = time.perf_counter() - t0


class LossWatch:
    """Stops a run whose loss is not finite. Looks at a step's loss when the next one is under way: no device stall."""

    def __init__(self, job: Job):
        self.job = job
        self.pending: tuple[int, float, Tensor] | None = None

    def push(self, lr: float, loss: Tensor) -> None:
        self.check()
        self.pending = self.job.step, lr, loss

    def check(self) -> None:
        if self.pending is not None:
            (step, lr, loss), self.pending = self.pending, None
            if not math.isfinite(float(loss)):
                raise TrainingDiverged(
                    f"train_loss is {float(loss)} at step {step} with the learning rates at {lr:.4g} of their knobs;"
                    f" last checkpoint: {self.job.last_checkpoint}")


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT add their number to the list instead of ending the process; a second one ends it."""
    seen: list[int] = []

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(job: Job, signals: Sequence[int]) -> tuple[float, int]:
    """(training ms, signal number or 0): the largest over the ranks, so that all of them take the same decisions."""
    elapsed_ms, number = job.clock.elapsed_ms(), max(signals, default=0)
    if job.rt.world_size == 1:
        return elapsed_ms, number
    pair = job.rt.reduce(torch.tensor([elapsed_ms, number], dtype=torch.float64, device=job.rt.device), dist.ReduceOp.MAX)
    return float(pair[0]), int(pair[1])


def validate(job: Job) -> EvalResult:
    job.clock.pause()
    with job.objective.as_finished() if job.objective is not None else contextlib.nullcontext():
        result = job.evaluate(job.compiled, job.cfg.val_max_tokens)
    job.seconds["validate"] = job.seconds.get("validate", 0.0) + result.seconds
    train_ms = job.clock.total_ms
    job.folder.log(
        f"step:{job.step}/{job.cfg.iterations} val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} "
        f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(job.step, 1):.2f}ms")
    job.folder.metric(kind="val", step=job.step, val_loss=result.val_loss, val_bpb=result.val_bpb, train_ms=train_ms)
    job.clock.resume()
    return result


def log_step(job: Job, loss: Tensor, lr: float, elapsed_ms: float) -> None:
    mean = float(job.rt.reduce(loss.clone())) / job.rt.world_size
    job.folder.log(
        f"step:{job.step}/{job.cfg.iterations} train_loss:{mean:.4f} "
        f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / job.step:.2f}ms")
    job.folder.metric(kind="train", step=job.step, train_loss=mean, lr_scale=lr, train_ms=elapsed_ms)
    if job.objective is not None:
        job.objective.log(job)


def train(job: Job) -> EvalResult:
    """Trains to ITERATIONS or the wallclock cap and returns the last validation. Raises TrainingDiverged, Stopped."""
    cfg, watch, stop_at = job.cfg, LossWatch(job), max(job.cfg.iterations, job.step)
    cap_ms = 1000 * cfg.max_wallclock_seconds or math.inf
    job.clock.resume()
    elapsed_ms, _ = agree(job, [])
    with caught_signals() as signals, progress(cfg.iterations, "train", job.rt.master, job.step) as bar:
        while True:
            last = job.step >= stop_at
            if last or (cfg.val_loss_every and job.step % cfg.val_loss_every == 0):
                watch.check()
                result = validate(job)
                if last:
                    break
            # The calibration ahead counts as spent: it lies inside the training time.
            spent_ms = elapsed_ms + calibration_ms(cfg, job.step, elapsed_ms)
            lr, job.steps_left = lr_scale(cfg, job.step, spent_ms), steps_left(cfg, job.step, spent_ms)
            loss = train_step(job, lr, muon_momentum(cfg, job.step), job.step / max(job.step + job.steps_left, 1))
            job.step += 1
            watch.push(lr, loss)
            elapsed_ms, signal_number = agree(job, signals)
            bar.update()
            full = elapsed_ms + calibration_ms(cfg, job.step, elapsed_ms) >= cap_ms
            if cfg.train_log_every and (job.step <= 10 or job.step % cfg.train_log_every == 0 or full):
                log_step(job, loss, lr, elapsed_ms)
            if full:
                stop_at = job.step
            if job.gauge is not None and job.step % cfg.artifact_every == 0:
                job.gauge.measure(job)
            if signal_number or (cfg.checkpoint_every and job.step % cfg.checkpoint_every == 0):
                watch.check()
                path = job.save()
                if signal_number:
                    raise Stopped(signal_number, path)
    job.clock.pause()
    if job.gauge is not None:
        job.gauge.finish(job)
    if job.step < cfg.iterations:
        job.folder.log(
            f"stopping_early: wallclock_cap train_time:{job.clock.total_ms:.0f}ms step:{job.step}/{cfg.iterations}")
    job.seconds["train"] = job.clock.total_ms / 1000
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Finish: export, read back from disk into a fresh model, evaluate that, sum up.
# ----------------------------------------------------------------------------------------------------------------------

ARTIFACTS = {"int8_zlib": ("final_model.int8.ptz", "int8+zlib"), "rd": ("final_model.rd.anlm", "rd")}   # file, name in logs


def source_files(cfg: ExportOptions | None = None) -> list[Path]:
    """What a submission packs: this file, export.py and the tools that a run asks for; one and the same once packed."""
    modules = sys.modules["export"], *map(tool, cfg.tools().values() if cfg else ())
    files = list(dict.fromkeys(Path(file or "").resolve() for file in (__file__, *(m.__file__ for m in modules))))
    return files if len(files) == 1 else tool("packing").with_imports(files)


@lru_cache(maxsize=1)
def code_bytes(cfg: ExportOptions | None = None) -> int:
    """Size of the submission's code once packed, tools of that run included."""
    files = source_files(cfg)
    return files[0].stat().st_size if len(files) == 1 else tool("packing").packed_code_bytes(files)


def export_model(job: Job) -> SizeReport | None:
    """Writes the artifact (rank 0 only, the others get None) and prints the challenge's size lines."""
    placed = job.objective.finish(job) if job.objective is not None else ()     # weights are the file's from here on
    statistics = tool("calibration").calibrate_job(job) if job.cfg.calibration_tokens else None
    t0, cfg, export, state = time.perf_counter(), job.cfg, None, job.model.state_dict()
    file_name, name = ARTIFACTS[cfg.export_scheme]
    weights = job.folder.path / "final_model.safetensors"
    reserve = tool("tuning").reserve_bytes(state) if cfg.export_tune_steps else 0
    if job.rt.master:
        write_checkpoint(weights, state, {"artifact_meta": job.meta})       # first: a failing export loses nothing
        job.folder.log(f"Serialized model: {weights.stat().st_size} bytes")
        export = encode_artifact(state, job.meta, cfg.export_options, statistics=statistics, sensitivity=read_map(cfg),
                                 code_bytes=code_bytes(cfg), reserve_bytes=reserve, placed=placed)
    if cfg.export_tune_steps:
        export = tool("tuning").tune(job, export, reserve)
    if export is None:
        return None
    write_atomically(job.folder.path / file_name, export.data)
    if not cfg.save_raw_checkpoint:
        weights.unlink()
    report = export.report
    for line in (*plan_lines(export.tensors.values()), *report.lines()) if report.planned_bytes else report.lines():
        job.folder.log(line)
    code, raw = code_bytes(cfg), sum(t.numel() * t.element_size() for t in state.values())
    job.folder.log(f"Code size: {code} bytes (packed)")
    job.folder.log(
        f"Serialized model {name}: {report.total_bytes} bytes (bits_per_weight:{report.bits_per_weight:.3f} "
        f"raw:{raw} ratio:{raw / report.total_bytes:.2f}x)")
    job.folder.log(f"Total submission size {name}: {report.total_bytes + code} bytes")
    if report.floored_share > 0.5:
        job.folder.log(
            f"warning: the step of {report.floored_share:.0%} of the quantised weights sits at INT8_SCALE_FLOOR="
            f"{cfg.int8_scale_floor:.6g}: size and error then depend on how long the model trained; 0 removes the floor")
    job.seconds["export"] = time.perf_counter() - t0
    return report


def load_model(artifact_state: Mapping[str, Tensor], meta: Mapping[str, Any], rt: Runtime, max_seq_len: int = 0) -> GPT:
    """A fresh model with an artifact's weights, for sequences as long as its training's or `max_seq_len`. Raises
    ArtifactError when they do not fit together.
    """
    shape = shape_from_meta(meta)
    wanted, found = tensor_shapes(shape), shapes_of(artifact_state)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ArtifactError(f"tensor {name}", 0, found.get(name, "nothing"), wanted.get(name, "nothing"))
    model = build_model(shape, rt, max(int(meta["train_seq_len"]), max_seq_len))
    model.load_state_dict(dict(artifact_state))
    return model


def shape_from_meta(meta: Mapping[str, Any]) -> ModelShape:
    """The network that an artifact's header describes. Raises ArtifactError."""
    values = meta.get("model")
    names = {f.name: f for f in fields(ModelShape)}
    if not isinstance(values, dict) or values.keys() != names.keys():
        raise ArtifactError("meta.model", 0, values, f"an object with the keys {', '.join(names)}")
    for name, f in names.items():
        kind, value, choices = type(f.default), values[name], f.metadata["choices"]
        if type(value) is not kind or (kind is float and not math.isfinite(value)) or (choices and value not in choices):
            raise ArtifactError(f"meta.model.{name}", 0, value, f"a {kind.__name__} as {f.default!r}")
    shape = ModelShape(**values)
    limits = {"num_layers": 4096, "model_dim": 1 << 16, "mlp_mult": 256, "num_heads": 4096}
    faults = shape.shape_problems() + [f"{k} above {v}" for k, v in limits.items() if getattr(shape, k) > v]
    seq_len = meta.get("train_seq_len")
    longest = 1 if faults else min(1 << 20, (1 << 26) // shape.head_dim)   # keeps a hostile file's rotary tables small
    if type(seq_len) is not int or not 1 <= seq_len <= longest:
        faults.append(f"train_seq_len must be in 1 .. {longest}, got {seq_len!r}")
    if faults:
        raise ArtifactError("meta.model", 0, "; ".join(faults), "a consistent shape")
    return shape


def roundtrip(job: Job) -> EvalResult:
    """Reads the artifact from disk (rank 0; the others receive its bytes) and evaluates it in a fresh model."""
    scheme = job.cfg.export_scheme
    path = Path(job.cfg.eval_artifact or job.folder.path / ARTIFACTS[scheme][0])
    artifact: Artifact = decode_artifact(job.rt.broadcast(path.read_bytes() if job.rt.master else b""))
    for key in ("train_seq_len", "tokenizer_sha256"):
        if artifact.meta.get(key) != job.meta[key]:
            raise ArtifactError(f"meta.{key}", None, artifact.meta.get(key), f"{job.meta[key]}, that of the knobs")
    model = load_model(artifact.state, artifact.meta, job.rt, job.cfg.eval_seq_len)
    max_tokens = job.cfg.roundtrip_val_max_tokens or job.cfg.val_max_tokens
    result = job.evaluate(job.rt.compile(model), max_tokens)
    job.seconds["roundtrip"] = result.seconds
    job.folder.log(
        f"final_{scheme}_roundtrip val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} "
        f"eval_time:{1000 * result.seconds:.0f}ms")
    job.folder.log(f"final_{scheme}_roundtrip_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")
    if job.cfg.modes:
        job.modes = tool("scoring").score_job(job, model, max_tokens)
    return result


def summarise(job: Job, before: EvalResult, report: SizeReport, after: EvalResult | None) -> int:
    """Writes summary.json, says how the total stands against the cap, and returns the exit code."""
    code, cap = code_bytes(job.cfg), job.cfg.artifact_cap_bytes
    total = report.total_bytes + code
    over = bool(cap) and total > cap
    job.folder.write_json("summary.json", {
        "run_id": job.folder.path.name, "step": job.step, "iterations": job.cfg.iterations, "seed": job.cfg.seed,
        "train_tokens_seen": job.step * job.cfg.train_batch_tokens, "params": sum(p.numel() for p in job.model.parameters()),
        "pre_roundtrip": asdict(before), "roundtrip": asdict(after) if after else None,
        "eval_modes": job.modes,
        "export_scheme": job.cfg.export_scheme, "artifact": ARTIFACTS[job.cfg.export_scheme][0],
        "artifact_bytes": report.total_bytes, "code_bytes": code, "total_bytes": total,
        "cap_bytes": cap, "under_cap": not over, "bits_per_weight": report.bits_per_weight,
        "floored_share": report.floored_share, "rms_error": report.rms_error, "planned_bytes": report.planned_bytes,
        "expected_nats": report.expected_nats, "permutation_gains": report.permutation_gains, "parts": report.parts,
        "seconds": job.seconds})
    job.folder.log(f"summary: total {total} bytes of {cap or 'no'} cap, outputs in {job.folder.path}")
    if over:
        job.folder.log(f"OVER THE CAP by {total - cap} bytes ({total} > ARTIFACT_CAP_BYTES={cap}): not a valid submission;"
                       " everything was saved. Choose a smaller shape or fewer bits")
    return 3 if over else 0


# ----------------------------------------------------------------------------------------------------------------------
# main: check everything, then prepare, train, finish.
# ----------------------------------------------------------------------------------------------------------------------


def read_validation(data_path: str | Path, seq_len: int, vocab_size: int) -> np.ndarray:
    """All validation tokens, (tokens,) uint16. Raises DataError."""
    shards = read_split(data_path, "val")
    tokens = shards[0] if len(shards) == 1 else np.concatenate(shards)
    if tokens.size <= seq_len:
        raise DataError(f"the validation split in {data_path} has {tokens.size} tokens, one sequence needs {seq_len + 1}")
    if tokens.max() >= vocab_size:
        raise DataError(f"the validation split in {data_path} holds token {tokens.max()}, VOCAB_SIZE={vocab_size}")
    return tokens


def load_data(cfg: Config) -> tuple[Data | None, list[str]]:
    """The data of a run, or every reason why it cannot be used."""
    problems: list[str] = []

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except DataError as error:
            problems.append(str(error))
            return None

    tokenizer = attempt(lambda: Tokenizer(cfg.tokenizer_path))
    read = "val" if cfg.eval_artifact else "train"      # a score needs no training data
    train = attempt(lambda: TokenStream(read_split(cfg.data_path, read)))
    val = attempt(lambda: read_validation(cfg.data_path, cfg.train_seq_len, cfg.vocab_size))
    if tokenizer is not None and tokenizer.vocab_size != cfg.vocab_size:
        problems.append(f"VOCAB_SIZE={cfg.vocab_size}, but tokenizer {cfg.tokenizer_path} has {tokenizer.vocab_size} tokens")
    if problems or tokenizer is None or train is None or val is None:
        return None, problems
    pairing = attempt(lambda: check_pairing(cfg.data_path, tokenizer, val))
    return (None, problems) if problems else (Data(train, val, tokenizer, pairing), [])


def folder_problems(cfg: Config) -> list[str]:
    """Why the run's folder cannot take its outputs: it exists already, or the disk is too small."""
    found = [] if not cfg.eval_artifact or Path(cfg.eval_artifact).is_file() else [
        f"EVAL_ARTIFACT={cfg.eval_artifact}: no such file"]
    path = Path(cfg.log_dir) / cfg.run_id
    if cfg.run_id and path.exists() and not cfg.resume:
        found.append(f"RUN_ID={cfg.run_id} exists in {cfg.log_dir}; choose another, or RESUME=auto continues it")
    base = next(p for p in (path, *path.absolute().parents) if p.exists())
    weights = sum(math.prod(s) for s in tensor_shapes(cfg.shape).values()) if not cfg.shape_problems() else 0
    checkpoints = (cfg.checkpoint_keep + 1 if cfg.checkpoint_every else 1) * 12 * weights  # weights and two moments, float32
    wanted = checkpoints + 3 * weights + (10 << 20)
    free = shutil.disk_usage(base).free
    if not os.access(base, os.W_OK):
        found.append(f"LOG_DIR={cfg.log_dir} cannot be written to")
    elif free < wanted:
        found.append(f"LOG_DIR={cfg.log_dir} has {free} bytes free, checkpoints and artifact may need {wanted}")
    return found


def read_map(cfg: Config) -> Any:
    """The SensitivityMap of SENSITIVITY_MAP, None without. Raises ArtifactError."""
    path, shapes = cfg.sensitivity_map, tensor_shapes(cfg.shape)
    return tool("sensitivity_map").read_sensitivity(path, shapes) if path else None


def predicted_size(cfg: Config) -> tuple[str, bool]:
    """The line about the total to expect, and whether CAP_POLICY refuses it."""
    try:
        prediction = tool("prediction")
    except ExportRefused:
        return "predicted: no size, a packed file runs without scripts/prediction.py", False
    return prediction.prediction_line(tensor_shapes(cfg.shape), cfg.export_options, code_bytes(cfg))


def export_problems(cfg: Config) -> list[str]:
    """Why there can be no such export: a tool or a map that cannot be used, a size over the cap."""
    found = []
    packed = sys.modules["export"].__file__ == __file__
    for asked, name in (cfg.tools() | ({} if packed else {"the size of the code": "packing"})).items():
        try:
            tool(name)
        except ExportRefused as error:
            found.append(f"{asked}: {error}")
    plain = [s for n, s in tensor_shapes(cfg.shape).items() if storage(n, s, "float32", cfg.export_options).codec == "int"]
    if cfg.has_objective and cfg.export_scheme != "rd" and not any(len(s) == 2 for s in plain):
        found.append("no matrix is exported in int8, so the terms of group Objective have nothing to see: all have at most"
                     f" INT8_KEEP_FLOAT_MAX_NUMEL={cfg.int8_keep_float_max_numel} weights, or 16 bits")
    if found:
        return found
    line, refused = predicted_size(cfg)
    remedy = "choose a smaller shape" + ("" if cfg.cap_policy == "fit" else ", fewer bits, CAP_POLICY=fit or =warn")
    found += [f"{line} (CAP_POLICY={cfg.cap_policy}): {remedy}"] * refused
    try:
        read_map(cfg)
    except ArtifactError as error:
        found.append(f"SENSITIVITY_MAP={cfg.sensitivity_map}: {error}")
    return found


def preflight(env: Mapping[str, str]) -> tuple[Config, Runtime, Data]:
    """Everything that can be wrong before any work, reported together. Raises ConfigError."""
    cfg, problems = Config.parse(env)
    rt = Runtime.from_config(cfg, env)
    problems += rt.problems(cfg)
    if not problems:
        problems += cfg.world_problems(rt.world_size) + export_problems(cfg)
    data, data_problems = load_data(cfg)
    problems += data_problems
    if rt.master:
        problems += folder_problems(cfg) + resume_problems(cfg)
    if problems or data is None:
        raise ConfigError(problems)
    return cfg, rt, data


def describe(job: Job) -> None:
    """The header of the log, and config.json: all that decides the result."""
    cfg, data, log = job.cfg, job.data, job.folder.log
    job.folder.write_json("config.json", {
        "knobs": asdict(cfg) | {"run_id": job.folder.path.name}, "device": job.rt.describe(),
        "code_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source_files(cfg)},
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "tokenizer_sha256": data.tokenizer.sha256, "train_tokens": data.train.size, "val_tokens": data.val.size})
    log(f"run:{job.folder.path} seed:{cfg.seed} {job.rt.describe()}")
    log(f"tokenizer:{data.tokenizer.path} vocab:{cfg.vocab_size} pairing:{data.pairing}")
    log(f"train_loader:shards:{len(data.train.shards)} tokens:{data.train.size} val_tokens:{data.val.size}")
    log(f"model_params:{sum(p.numel() for p in job.model.parameters())}"
        f" micro_batches:{cfg.micro_batches} of {cfg.micro_batch} tokens")
    if cfg.unique_blocks < cfg.num_layers:
        log("layer_blocks:" + " ".join(f"{layer}->{block}" for layer, block in enumerate(job.model.layer_blocks)))
    log(predicted_size(cfg)[0])


def run(cfg: Config, rt: Runtime, data: Data) -> int:
    """One run from preflight's results to its exit code."""
    t0 = time.perf_counter()
    name = cfg.run_id or f"{time.strftime('%Y%m%d_%H%M%S')}_{secrets.token_hex(2)}"
    folder = RunFolder(Path(cfg.log_dir) / name, rt.master)
    rt.start(cfg.sdp_backend)
    try:
        return carry_out(Job.build(cfg, rt, folder, data), t0)
    except Stopped as stop:
        folder.log(str(stop))
        return 128 + stop.signal_number
    except (TrainingDiverged, CheckpointError, DataError, ArtifactError, ExportRefused) as error:
        folder.log(f"failed: {error}; what was saved is in {folder.path}")
        return 1
    finally:
        # The job's reducer must go first: were it the last to hold the process group, its end would wait, with Python's lock
        # held, for threads that need the lock to drop their tensors.
        gc.collect()
        rt.stop()


def carry_out(job: Job, t0: float) -> int:
    """Everything from warm-up to the summary; returns the exit code."""
    cfg, folder = job.cfg, job.folder
    if cfg.eval_artifact:
        roundtrip(job)
        return 0
    describe(job)
    job.seconds["prepare"] = time.perf_counter() - t0
    warm_up(job)
    checkpoint = checkpoint_to_resume(cfg)
    if checkpoint is not None:
        job.restore(checkpoint)
    folder.forget_metrics_from(job.step)
    before = train(job)
    folder.log("peak memory allocated: {} MiB reserved: {} MiB".format(*job.rt.peak_memory_mib()))
    report = export_model(job)
    after = roundtrip(job) if cfg.final_roundtrip_eval else None
    return summarise(job, before, report, after) if report is not None else 0


def main(env: Mapping[str, str]) -> int:
    try:
        cfg, rt, data = preflight(env)
    except ConfigError as error:
        rank = env.get("LOCAL_RANK", "0")
        if rank != "0":
            time.sleep(5)  # torchrun ends all ranks with the first: let rank 0 speak for a fault that all of them have
        print("\n".join(f"error: {'' if rank == '0' else f'rank {rank}: '}{p}" for p in error.problems), file=sys.stderr)
        return 2
    return run(cfg, rt, data)


if __name__ == "__main__":
    from train_gpt import main as _main  # re-enters by name, so that every class exists once

    sys.exit(_main(os.environ))
