"""What the tests share: the repository on the path, one thread, tiny tokenizers and data, and builders of small things.

Tests import the plain functions by `from conftest import ...`. CORPUS_DIR names a folder with real tokenizers (tokenizers/)
and shards (fineweb_mini_sp1024/); tests that need it are skipped without.
"""
from __future__ import annotations

import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train_gpt import (  # noqa: E402
    GPT,
    Config,
    Job,
    ModelShape,
    Muon,
    RunFolder,
    Runtime,
    TokenStream,
    load_data,
    read_split,
)

CPU = Runtime(device=torch.device("cpu"), dtype=torch.float32, compiled=False)
CPU_BF16 = Runtime(device=torch.device("cpu"), dtype=torch.bfloat16, compiled=False)

BYTE260 = {
    "tokenizer_type": "pure_byte",
    "config": {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256},
    "vocab_size": 260,
}
TINY_SHAPE = {"vocab_size": 61, "num_layers": 4, "model_dim": 24, "num_heads": 3, "num_kv_heads": 1, "mlp_mult": 2}
VARIANTS: dict[str, dict[str, Any]] = {   # each changes TINY_SHAPE; together they reach every branch of the model
    "baseline": {},
    "odd_layers": {"num_layers": 5},
    "two_layers": {"num_layers": 2},
    "all_heads_have_keys": {"num_kv_heads": 3},
    "window": {"window_size": 3},
    "window_of_one": {"window_size": 1},
    "wide_window": {"window_size": 64},
    "shared_blocks": {"num_layers": 5, "num_unique_blocks": 2},
    "one_block": {"num_unique_blocks": 1},
    "factorised": {"embed_dim": 10},
    "untied": {"tie_embeddings": False},
    "factorised_untied": {"embed_dim": 10, "tie_embeddings": False},
    "everything": {"window_size": 5, "num_unique_blocks": 3, "embed_dim": 7, "tie_embeddings": False, "mlp_mult": 3},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------------------
# Text, tokenizers and shards.
# ----------------------------------------------------------------------------------------------------------------------

COMMON = (
    "the of and to in a is that for it was on are as with they at be this from have or by one had not but what all were"
    " when we there can an your which their said if do will each about how up out them then she many some so these would"
    " other into has more her two like him see time could no make than first been its who now people my made over did"
    " down only way find use may water long little very after words called just where most know 1984 27 forest river"
    " mountain morning evening silver window garden letter answer travel distance harbour winter, summer; stone: bread."
)
WORDS = COMMON.split()


def story(documents: int, seed: int, words: Sequence[str] = WORDS) -> list[str]:
    """Documents of 3 to 9 sentences over a small vocabulary: text that a tokenizer and a model can learn from."""
    rng = random.Random(seed)
    return [
        " ".join(
            " ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + "." for _ in range(rng.randint(3, 9))
        )
        for _ in range(documents)
    ]


def train_sentencepiece(texts: Sequence[str], **changes: Any) -> bytes:
    """A model with the challenge's options, of 384 pieces unless told otherwise."""
    options = {
        "model_type": "bpe", "vocab_size": 384, "byte_fallback": True, "split_digits": True, "num_threads": 1,
        "normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "character_coverage": 0.999,
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False, "minloglevel": 2,
    }
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **(options | changes))
    return model.getvalue()


def write_shard(path: Path, tokens: Sequence[int] | np.ndarray, **header: int) -> Path:
    """A shard of the challenge's format; `magic`, `version` and `count` override what the header says."""
    head = np.zeros(256, dtype="<i4")
    head[:3] = header.get("magic", 20240520), header.get("version", 1), header.get("count", len(tokens))
    path.write_bytes(head.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def tokenize(processor: spm.SentencePieceProcessor, texts: Sequence[str]) -> np.ndarray:
    """BOS before each document, as the challenge's shards."""
    return np.array([i for text in texts for i in [processor.bos_id(), *processor.encode(text)]], dtype=np.uint16)


@dataclass(frozen=True)
class TinyData:
    """A prepared data folder and what it holds."""

    folder: Path
    tokenizer: Path
    vocab_size: int
    train: np.ndarray     # the shards' tokens end to end
    val: np.ndarray
    val_texts: list[str]


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte260") / "byte260.json"
    path.write_text(json.dumps(BYTE260))
    return path


@pytest.fixture(scope="session")
def sp_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    path.write_bytes(train_sentencepiece(story(300, seed=1)))
    return path


@pytest.fixture(scope="session")
def other_sp_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tokenizer of the same vocabulary size, trained on the words written backwards."""
    path = tmp_path_factory.mktemp("sp") / "other.model"
    path.write_bytes(train_sentencepiece(story(300, seed=1, words=[word[::-1] for word in WORDS])))
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, sp_tokenizer: Path) -> TinyData:
    """Three training shards of awkward sizes, one of validation, and the manifest that pairs them with the tokenizer."""
    import hashlib

    folder = tmp_path_factory.mktemp("data")
    processor = spm.SentencePieceProcessor(model_file=str(sp_tokenizer))
    val_texts = story(12, seed=3)
    train, val = tokenize(processor, story(120, seed=2)), tokenize(processor, val_texts)
    for number, shard in enumerate(np.split(train, [1009, 1010])):     # the middle one holds a single token
        write_shard(folder / f"fineweb_train_{number:06d}.bin", shard)
    write_shard(folder / "fineweb_val_000000.bin", val)
    digest = hashlib.sha256(sp_tokenizer.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": digest}}))
    return TinyData(folder, sp_tokenizer, processor.vocab_size(), train, val, val_texts)


@pytest.fixture(scope="session")
def corpus_dir() -> Path:
    folder = os.environ.get("CORPUS_DIR", "")
    if not folder:
        pytest.skip("needs real tokenizers and shards: set CORPUS_DIR")
    return Path(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Runs and models.
# ----------------------------------------------------------------------------------------------------------------------


def tiny_knobs(data: TinyData, folder: Path) -> dict[str, str]:
    """A run that learns something in a few dozen steps of about 20 ms on one core."""
    return {
        "DATA_PATH": str(data.folder), "TOKENIZER_PATH": str(data.tokenizer), "VOCAB_SIZE": str(data.vocab_size),
        "LOG_DIR": str(folder / "logs"), "RUN_ID": "tiny", "DEVICE": "cpu", "NUM_LAYERS": "3", "MODEL_DIM": "32",
        "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "512", "VAL_BATCH_SIZE": "512",
        "ITERATIONS": "4", "WARMDOWN_ITERS": "2", "WARMUP_STEPS": "0", "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0",
    }


@pytest.fixture
def tiny_env(tmp_path: Path, tiny_data: TinyData) -> dict[str, str]:
    return tiny_knobs(tiny_data, tmp_path)


@pytest.fixture
def fresh_rng() -> Iterator[None]:
    """Puts PyTorch's generator back afterwards."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def config(env: Mapping[str, str]) -> Config:
    cfg, problems = Config.parse(env)
    assert problems == []
    return cfg


def build_job(env: Mapping[str, str]) -> Job:
    """A job on the CPU, ready for its first step."""
    cfg = config(env)
    data, problems = load_data(cfg)
    assert data is not None, problems
    rt = Runtime.from_config(cfg, {})
    return Job.build(cfg, rt, RunFolder(Path(cfg.log_dir) / cfg.run_id, master=True), data)


def run_two_ranks(program: str, folder: Path) -> None:
    """Two processes of a gloo group run a Python program; its arguments are the folder and the repository's root."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")} | {
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen([sys.executable, "-c", program, str(folder), str(ROOT)], env=env | {"RANK": str(rank)},
                              stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said


def train_stream(data: TinyData) -> TokenStream:
    return TokenStream(read_split(data.folder, "train"))


def tiny_shape(**changes: Any) -> ModelShape:
    return ModelShape(**(TINY_SHAPE | changes))


def fill(model: nn.Module) -> None:
    """Deterministic weights, no generator involved, that leave no part of the network without effect."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            offset = 1.0 if p.ndim < 2 or "resid_mix" in name or "skip" in name else 0.0
            wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i)
            p.copy_((0.3 * wave + offset).view_as(p))


def filled_model(shape: ModelShape, max_seq_len: int = 32) -> GPT:
    model = GPT(shape, max_seq_len)
    fill(model)
    return model


def fixed_batch(step: int, vocab_size: int, rows: int = 4, seq_len: int = 19) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets without a generator; another batch for every step."""
    ids = (torch.arange(rows * (seq_len + 1)) * 7 + step * 5) % 53
    ids = ((ids * ids + step) % vocab_size).view(rows, seq_len + 1)
    return ids[:, :-1], ids[:, 1:]


def muon_of(optimizers: Sequence[torch.optim.Optimizer]) -> Muon:
    return next(optimizer for optimizer in optimizers if isinstance(optimizer, Muon))


LONGEST = ("test_run", "test_objective", "test_finishing", "test_campaign", "test_remote", "test_sweep", "test_prepare",
           "test_scoring", "test_packing", "test_submission", "test_numuon", "test_optim", "test_launchers", "test_rd_tools")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first: a worker takes whole files, and the last one should not be alone with a long one."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
