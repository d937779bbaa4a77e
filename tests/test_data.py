"""Data: shards, tokenizers, that they belong together, and the loader's stream.

Guarantees: a malformed shard or tokenizer is a DataError that says what was found; a tokenizer that did not make the
shards is refused; every world size and micro-batch consumes the baseline's stream; a sought loader is one that got there.
Run: python -m pytest tests/test_data.py (about 10 s); with CORPUS_DIR the published shards and tokenizers too.
"""
from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import BYTE260, CPU, TinyData, config, story, tokenize, train_sentencepiece, train_stream, write_shard

from train_gpt import (
    DataError,
    Loader,
    Runtime,
    Tokenizer,
    TokenStream,
    check_pairing,
    load_data,
    read_shard,
    read_split,
    read_validation,
    sample_documents,
)

AWKWARD_TEXTS = [
    "plain words", "Numbers 1234567890 and 3.14", "snowman \u2603, family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u10d2\u10d0\u10db\u10d0\u10e0 \u0b95\u0bbe\u0bb2\u0bc8 \ua9b2\ua9bc", "na\u00efve caf\u00e9", "x",
]


# ----------------------------------------------------------------------------------------------------------------------
# Shards.
# ----------------------------------------------------------------------------------------------------------------------


def malformed_shard(kind: str, path: Path) -> None:
    tokens = [1, 2, 3]
    good = write_shard(path, tokens).read_bytes()
    contents = {
        "empty": b"", "short_header": good[:1023], "header_only": good[:1024], "one_byte_short": good[:-1],
        "one_token_short": good[:-2], "trailing_byte": good + b"\0", "trailing_token": good + b"\0\0",
        "byte_swapped": np.frombuffer(good[:1024], dtype="<i4").byteswap().tobytes() + good[1024:],
    }
    headers: dict[str, dict[str, int]] = {
        "wrong_magic": {"magic": 20240521}, "wrong_version": {"version": 2}, "count_too_large": {"count": 4},
        "count_too_small": {"count": 2}, "negative_count": {"count": -1}, "huge_count": {"count": 2**31 - 1},
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind in headers:
        write_shard(path, tokens, **headers[kind])
    elif kind == "zero_tokens":
        write_shard(path, [])
    else:
        path.unlink()
        if kind == "directory":
            path.mkdir()


@pytest.mark.parametrize(("kind", "found"), [
    ("missing", "cannot be read"), ("directory", "cannot be read"), ("empty", "0 bytes, shorter"),
    ("short_header", "1023 bytes, shorter"), ("header_only", "1024 bytes, its header's 3 tokens make 1030"),
    ("one_byte_short", "1029 bytes, its header's 3 tokens make 1030"),
    ("one_token_short", "1028 bytes, its header's 3 tokens make 1030"),
    ("trailing_byte", "1031 bytes, its header's 3 tokens make 1030"),
    ("trailing_token", "1032 bytes, its header's 3 tokens make 1030"),
    ("wrong_magic", "magic 20240521 version 1"), ("byte_swapped", "not a token shard"),
    ("wrong_version", "magic 20240520 version 2"), ("zero_tokens", "its header's 0 tokens"),
    ("count_too_large", "its header's 4 tokens make 1032"), ("count_too_small", "its header's 2 tokens make 1028"),
    ("negative_count", "its header's -1 tokens"), ("huge_count", "its header's 2147483647 tokens"),
])
def test_malformed_shard_is_refused_with_what_was_found(kind: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "fineweb_train_000000.bin"
    malformed_shard(kind, path)
    with pytest.raises(DataError, match=re.escape(found)) as caught:
        read_shard(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "data/prepare.py" in str(caught.value)


@pytest.mark.parametrize("tokens", [[7], [0, 65535], list(range(1000))])
def test_shard_gives_back_its_tokens(tokens: list[int], tmp_path: Path) -> None:
    assert read_shard(write_shard(tmp_path / "a.bin", tokens)).tolist() == tokens


def test_shard_is_memory_mapped_and_read_only(tmp_path: Path) -> None:
    """A 3 GB shard, all hole: reading it, or a private copy, would take its size in memory."""
    path, count = tmp_path / "big.bin", 1_500_000_000
    write_shard(path, [], count=count)
    with path.open("r+b") as f:
        f.truncate(1024 + 2 * count)
    shard = read_shard(path)
    assert isinstance(shard, np.memmap)
    assert not shard.flags.writeable
    assert (shard.size, int(shard[-1])) == (count, 0)


def test_shards_of_a_split_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", [number])
    write_shard(tmp_path / "fineweb_val_000000.bin", [99])
    assert [int(shard[0]) for shard in read_split(tmp_path, "train")] == [1, 2, 10]


def test_split_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no fineweb_val_\*\.bin in .*data/prepare\.py"):
        read_split(tmp_path, "val")


def test_validation_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_val_000000.bin", range(32))
    with pytest.raises(DataError, match="has 32 tokens, one sequence needs 33"):
        read_validation(tmp_path, seq_len=32, vocab_size=64)
    assert read_validation(tmp_path, seq_len=31, vocab_size=64).tolist() == list(range(32))


def test_validation_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_val_000000.bin", range(32))
    with pytest.raises(DataError, match="holds token 31, VOCAB_SIZE=31"):
        read_validation(tmp_path, seq_len=8, vocab_size=31)


def test_every_reason_against_the_data_is_given_at_once(tiny_env: dict[str, str], tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2], count=3)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 2])
    cfg = config(tiny_env | {"DATA_PATH": str(tmp_path), "VOCAB_SIZE": "500"})
    data, problems = load_data(cfg)
    assert data is None
    for part in ("its header's 3 tokens", "has 2 tokens, one sequence needs 33", "VOCAB_SIZE=500, but tokenizer"):
        assert sum(part in problem for problem in problems) == 1
    assert len(problems) == 3


# ----------------------------------------------------------------------------------------------------------------------
# The ring and the loader.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [7], [3, 1, 5], [1, 1, 1], [100, 2]])
def test_ring_takes_what_repeated_concatenation_holds(sizes: list[int]) -> None:
    shards = np.split(np.arange(sum(sizes), dtype=np.uint16), np.cumsum(sizes)[:-1])
    stream, size = TokenStream(shards), sum(sizes)
    endless = np.tile(np.concatenate(shards), 8)
    for start, count in itertools.product(range(2 * size), (1, 2, size - 1, size, size + 1, 2 * size + 3)):
        if count:
            np.testing.assert_array_equal(stream.take(start, count), endless[start:start + count])


def baseline_steps(tokens: np.ndarray, batch_tokens: int, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The challenge's stream, one token at a time: 8 spans of batch_tokens / 8 + 1 a step, targets shifted by one."""
    endless = itertools.cycle(tokens.tolist())
    while True:
        inputs, targets = [], []
        for _ in range(8):
            span = list(itertools.islice(endless, batch_tokens // 8 + 1))
            for at in range(0, batch_tokens // 8, seq_len):
                inputs.append(span[at:at + seq_len])
                targets.append(span[at + 1:at + seq_len + 1])
        yield np.array(inputs), np.array(targets)


def loaders(env: dict[str, str], data: TinyData, world_size: int, micro_batch_tokens: int) -> list[Loader]:
    cfg = config(env | {"MICRO_BATCH_TOKENS": str(micro_batch_tokens)})
    return [
        Loader(train_stream(data), cfg, Runtime(torch.device("cpu"), torch.float32, False, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]


def global_step(ranks: list[Loader]) -> tuple[np.ndarray, np.ndarray]:
    """One step of all ranks: inputs and targets in the order of time, then of the ranks."""
    batches = [loader.next_batch() for _ in range(ranks[0].per_rank) for loader in ranks]
    assert all(x.dtype == y.dtype == torch.int64 and x.shape == y.shape for x, y in batches)
    x, y = (torch.cat([batch[side] for batch in batches]).numpy() for side in (0, 1))
    return x, y


@pytest.mark.parametrize(("world_size", "micro_batch_tokens"), [
    (1, 0), (2, 0), (4, 0), (8, 0),              # the baseline's eighth: 64 tokens, two sequences
    (1, 32), (2, 32), (16, 32),                  # half a span
    (1, 128), (4, 128), (2, 256), (1, 512),      # several spans, up to the whole step
])
def test_all_world_sizes_and_micro_batches_consume_the_baselines_stream(
    world_size: int, micro_batch_tokens: int, tiny_env: dict[str, str], tiny_data: TinyData
) -> None:
    ranks = loaders(tiny_env, tiny_data, world_size, micro_batch_tokens)
    wanted = baseline_steps(tiny_data.train, batch_tokens=512, seq_len=32)
    steps = tiny_data.train.size // 520 + 3      # round the ring and beyond
    for _ in range(steps):
        for found, oracle in zip(global_step(ranks), next(wanted), strict=True):
            np.testing.assert_array_equal(found, oracle)


def test_a_sought_loader_is_one_that_served_so_many_steps(tiny_env: dict[str, str], tiny_data: TinyData) -> None:
    served, sought = (loaders(tiny_env, tiny_data, world_size=2, micro_batch_tokens=0) for _ in range(2))
    for step in range(4):
        for loader in sought:
            loader.next_batch()                  # a batch is already on its way when it jumps
            loader.seek(step)
        assert [loader.step for loader in served + sought] == [step] * 4
        for a, b in zip(global_step(served), global_step(sought), strict=True):
            np.testing.assert_array_equal(a, b)


def test_training_token_beyond_the_vocabulary_is_refused(tiny_env: dict[str, str]) -> None:
    cfg = config(tiny_env | {"VOCAB_SIZE": "300"})
    tokens = np.full(5000, 299, dtype=np.uint16)
    Loader(TokenStream([tokens]), cfg, CPU).next_batch()
    tokens[70] = 300                             # in the second micro-batch
    loader = Loader(TokenStream([tokens]), cfg, CPU)
    loader.next_batch()
    with pytest.raises(DataError, match=r"holds token 300, VOCAB_SIZE=300 allows 299"):
        loader.next_batch()


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers.
# ----------------------------------------------------------------------------------------------------------------------


def without_piece(model: bytes, piece: str, replacement: str) -> bytes:
    """The SentencePiece model with one piece renamed to another of equal length."""
    old, new = (b"\x0a" + bytes([len(text.encode())]) + text.encode() for text in (piece, replacement))   # field 1, length
    assert len(old) == len(new)
    assert model.count(old) == 1
    return model.replace(old, new)


def test_sentencepiece_round_trip(sp_tokenizer: Path) -> None:
    tokenizer = Tokenizer(sp_tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (384, 1)
    assert tokenizer.encode(AWKWARD_TEXTS) == spm.SentencePieceProcessor(model_file=str(sp_tokenizer)).encode(AWKWARD_TEXTS)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(AWKWARD_TEXTS)] == AWKWARD_TEXTS


def test_byte_tokenizer_round_trip(byte_tokenizer: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (260, 1)
    assert tokenizer.encode(["A\u00e9", ""]) == [[65 + 4, 0xC3 + 4, 0xA9 + 4], []]
    texts = [*AWKWARD_TEXTS, " lead", "two  spaces\n\ttab", "\x00"]
    assert [tokenizer.decode([1, *ids]) for ids in tokenizer.encode(texts)] == texts    # BOS is no text


def test_tokenizer_names_its_file_by_sha256(byte_tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "abc.json"
    path.write_text('{"tokenizer_type": "pure_byte", "config": ' + json.dumps(BYTE260["config"]) + "}")
    assert Tokenizer(path).sha256 == "8451023209f03757c91774c3b9a353075b760eb5a0ac4692d491c1e0e905f96c"
    assert Tokenizer(byte_tokenizer).sha256 != Tokenizer(path).sha256


@pytest.mark.parametrize("data", [b"", b"garbage", b"\0" * 100, b"[1]", b"\xff\xfe{"], ids=repr)
def test_file_that_is_no_tokenizer_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(DataError, match=re.escape(f"tokenizer {tmp_path / 'x.model'}")):
        Tokenizer(tmp_path / "x.model")


def test_truncated_sentencepiece_model_is_refused(sp_tokenizer: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "cut.model", sp_tokenizer.read_bytes()
    for size in (1, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"cut\.model"):
            Tokenizer(path)


@pytest.mark.parametrize("spec", [
    "{", "{}", '{"tokenizer_type": "pure_byte"}', json.dumps(BYTE260 | {"tokenizer_type": "bpe"}),
    json.dumps(BYTE260 | {"config": None}), json.dumps(BYTE260 | {"config": BYTE260["config"] | {"byte_offset": 3}}),  # type: ignore[operator]
    json.dumps(BYTE260 | {"config": {"pad_id": 0}}), '{"a":' * 100_000, "{\xff",
], ids=lambda spec: spec[:40])
def test_json_that_is_not_the_byte_tokenizers_is_refused(spec: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(spec.encode("latin-1"))
    with pytest.raises(DataError, match="not a pure_byte tokenizer"):
        Tokenizer(tmp_path / "x.json")


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.model: cannot be read .*TOKENIZER_PATH"):
        Tokenizer(tmp_path / "none.model")


def test_tokenizer_without_the_space_piece_is_refused(sp_tokenizer: Path, tmp_path: Path) -> None:
    """Such a model turns a lone space into three byte tokens, which would be counted as three bytes."""
    path = tmp_path / "no_space.model"
    path.write_bytes(without_piece(sp_tokenizer.read_bytes(), "\u2581", "\u2582"))
    broken = spm.SentencePieceProcessor(model_file=str(path))
    assert len(broken.encode("Q Q")) == 2 + 3
    with pytest.raises(DataError, match="lacks the bare space piece"):
        Tokenizer(path)


def test_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no_bos.model").write_bytes(train_sentencepiece(story(50, seed=1), bos_id=-1, eos_id=1, unk_id=2))
    with pytest.raises(DataError, match="has no BOS"):
        Tokenizer(tmp_path / "no_bos.model")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and shards belong together.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_data(tiny_data: TinyData, tmp_path: Path) -> Path:
    """The tiny data as it would be published: no manifest."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_data.folder, folder)
    (folder / "manifest.json").unlink()
    return folder


def test_manifest_accepts_its_tokenizer(tiny_data: TinyData) -> None:
    assert check_pairing(tiny_data.folder, Tokenizer(tiny_data.tokenizer), tiny_data.val) == "manifest"


def test_manifest_refuses_another_tokenizer(tiny_data: TinyData, other_sp_tokenizer: Path) -> None:
    other = Tokenizer(other_sp_tokenizer)
    assert other.vocab_size == tiny_data.vocab_size
    with pytest.raises(DataError, match=rf"{other.sha256[:16]}.*did not make the shards.*TOKENIZER_PATH"):
        check_pairing(tiny_data.folder, other, tiny_data.val)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"tokenizer": null}', '{"tokenizer": {}}', '{"tokenizer": "sha"}', "\xff\xfe",
    '{"tokenizer":' * 100_000,
], ids=lambda text: text[:30])
def test_broken_manifest_is_refused(text: str, tiny_data: TinyData, bare_data: Path) -> None:
    (bare_data / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest\.json: names no tokenizer sha256"):
        check_pairing(bare_data, Tokenizer(tiny_data.tokenizer), tiny_data.val)


@pytest.mark.parametrize("sha256", [None, 0, "", ["a"]])
def test_manifest_with_a_senseless_sha256_is_refused(sha256: Any, tiny_data: TinyData, bare_data: Path) -> None:
    (bare_data / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": sha256}}))
    with pytest.raises(DataError, match=r"did not make the shards|names no tokenizer sha256"):
        check_pairing(bare_data, Tokenizer(tiny_data.tokenizer), tiny_data.val)


def test_manifest_that_cannot_be_read_is_refused(tiny_data: TinyData, bare_data: Path) -> None:
    (bare_data / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json"):
        check_pairing(bare_data, Tokenizer(tiny_data.tokenizer), tiny_data.val)


def test_without_manifest_the_right_tokenizer_passes_by_encoding_again(tiny_data: TinyData, bare_data: Path) -> None:
    how = check_pairing(bare_data, Tokenizer(tiny_data.tokenizer), tiny_data.val)
    assert len(tiny_data.val_texts) == 12
    assert how == "11/11 documents re-encoded"       # the last one may be cut


def test_without_manifest_another_tokenizer_of_the_same_size_is_refused(
    tiny_data: TinyData, bare_data: Path, other_sp_tokenizer: Path
) -> None:
    with pytest.raises(DataError, match=r"of 11 validation documents .* only \d+ gave the same ids"):
        check_pairing(bare_data, Tokenizer(other_sp_tokenizer), tiny_data.val)


@pytest.mark.parametrize(("damaged", "passes"), [(2, True), (3, False)])
def test_one_document_in_a_hundred_may_differ(damaged: int, passes: bool, sp_tokenizer: Path, tmp_path: Path) -> None:
    """Documents cut inside a character, or written by another normaliser, are few: 2 of 200 pass, 3 do not."""
    tokenizer = Tokenizer(sp_tokenizer)
    letters = [tokenizer.encode([c])[0][0] for c in "the"]      # three tokens that encode to fewer when read again
    assert tokenizer.encode(["the"])[0] != letters
    good = tokenize(tokenizer.pieces, ["the silver river"] * (200 - damaged + 1))
    val = np.concatenate([np.array([1, *letters] * damaged, dtype=np.uint16), good])
    if passes:
        assert check_pairing(tmp_path, tokenizer, val) == f"{200 - damaged}/200 documents re-encoded"
    else:
        with pytest.raises(DataError, match=f"only {200 - damaged} gave the same ids"):
            check_pairing(tmp_path, tokenizer, val)


def test_validation_without_bos_is_refused(sp_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no BOS \(id 1\) among the first 1000 validation tokens"):
        check_pairing(tmp_path, Tokenizer(sp_tokenizer), np.full(1000, 9, dtype=np.uint16))


def test_validation_without_a_whole_document_is_refused(sp_tokenizer: Path, tmp_path: Path) -> None:
    val = np.concatenate([[1], np.full(500_000, 9)]).astype(np.uint16)      # its only document goes beyond the sample
    with pytest.raises(DataError, match="no whole document"):
        check_pairing(tmp_path, Tokenizer(sp_tokenizer), val)


def test_sampled_documents_are_whole() -> None:
    def sample(*args: int, **caps: int) -> list[list[int]]:
        return [document.tolist() for document in sample_documents(np.array(args), 1, **caps)]

    stream = (5, 1, 6, 7, 1, 1, 8, 1, 9, 9)          # the last document may go on in what was not kept
    assert sample(*stream) == sample(*stream, max_tokens=9) == [[6, 7], [8]]
    assert sample(*stream, max_tokens=7) == [[6, 7]]
    assert sample(*stream, max_documents=1) == [[6, 7]]
    assert sample(1, 6, 7) == [[6, 7]]               # but a lone one is all there is
    assert sample(1, 6, 7, max_tokens=2) == []


def test_published_shards_belong_to_their_tokenizer(corpus_dir: Path) -> None:
    folder, tokenizer = corpus_dir / "fineweb_mini_sp1024", Tokenizer(corpus_dir / "tokenizers" / "fineweb_1024_bpe.model")
    val = read_validation(folder, seq_len=1024, vocab_size=1024)
    assert val.size == 1_040_298
    same, of = map(int, check_pairing(folder, tokenizer, val).split()[0].split("/"))
    assert of == 256
    assert same >= 0.99 * of


def test_two_published_tokenizers_of_one_size_are_told_apart(corpus_dir: Path, tmp_path: Path) -> None:
    one, two = (
        Tokenizer(corpus_dir / "tokenizers" / name) for name in ("fineweb_8192_bpe.model", "fineweb_8192_bpe_sp8192.model")
    )
    assert one.vocab_size == two.vocab_size == 8192
    val = tokenize(one.pieces, story(40, seed=4))
    assert check_pairing(tmp_path, one, val) == "39/39 documents re-encoded"
    with pytest.raises(DataError, match="did not make the shards"):
        check_pairing(tmp_path, two, val)
