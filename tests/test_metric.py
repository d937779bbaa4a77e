"""Metric: bits per byte, where the bytes are those of the text and every token is scored once.

Guarantees: the bytes counted over the targets equal the UTF-8 length of the decoded text, whatever the tokenizer and the
text, and never exceed it; evaluation gives hand-computed numbers, whatever the batch size and the number of ranks.
Run: python -m pytest tests/test_metric.py (about 5 s); with CORPUS_DIR the challenge's tokenizers and text too.
"""
from __future__ import annotations

import json
import lzma
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, TinyData, story, tiny_shape, tokenize, train_sentencepiece
from prepare import scored_bytes
from torch import Tensor

from train_gpt import GPT, ByteTable, EvalResult, Runtime, Tokenizer, byte_table, evaluate, read_shard

AWKWARD_TEXTS = [
    "The silver river, the window and the garden.", " leading space", "double  spaces   inside", "trailing space ", "x",
    "tab\tand\nline", "digits 0123456789 and 1984", "\u2581", "a\u2581 b", "<s> </s> <unk> <0x41>", "\U0010ffff \ud7a3",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 end", "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd",
    "\u0b95\u0bbe\u0bb2\u0bc8 \ua9b2\ua9bc \U00012000\U00013080", "na\u00efve caf\u00e9 \ufb01\u00bd \u3000wide",
    "nul\x00 and \x7f\x85 controls",
]
BYTE_FALLBACK = [
    "fineweb_1024_bpe.model", "fineweb_4096_bpe.model", "fineweb_8192_bpe.model", "fineweb_8192_bpe_sp8192.model",
]


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of characters from everywhere in Unicode, with many blanks among them."""
    rng = random.Random(seed)
    ranges = [(32, 127), (32, 33), (0xA0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x900, 0xE00), (0x2000, 0x2C00),
              (0x4E00, 0xA000), (0x1F300, 0x1FA00), (0, 0xD800), (0xE000, 0x110000)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 30))) for _ in range(count)]


def documents(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, int]:
    """The texts as a stream of tokens, BOS before each, and the UTF-8 bytes of what the tokenizer decodes them to."""
    ids = tokenizer.encode(texts)
    stream = np.array([i for document in ids for i in [tokenizer.bos_id, *document]], dtype=np.uint16)
    return stream, sum(len(tokenizer.decode(document).encode()) for document in ids)


def check_bytes(tokenizer: Tokenizer, texts: list[str]) -> None:
    table = byte_table(tokenizer)
    for text in texts:                           # one at a time, so that errors cannot cancel
        stream, text_bytes = documents(tokenizer, [text])
        assert scored_bytes(stream, table) == text_bytes, ascii(text)
    stream, text_bytes = documents(tokenizer, texts)
    assert scored_bytes(stream, table) == text_bytes > 0


# ----------------------------------------------------------------------------------------------------------------------
# Bytes.
# ----------------------------------------------------------------------------------------------------------------------


def test_bytes_of_targets_are_those_of_the_text(sp_tokenizer: Path) -> None:
    check_bytes(Tokenizer(sp_tokenizer), AWKWARD_TEXTS + random_texts(500, seed=0) + story(20, seed=5))


def test_bytes_of_the_byte_tokenizer_are_those_of_the_text(byte_tokenizer: Path) -> None:
    texts = AWKWARD_TEXTS + random_texts(500, seed=1)
    check_bytes(Tokenizer(byte_tokenizer), texts)
    stream, text_bytes = documents(Tokenizer(byte_tokenizer), texts)
    assert text_bytes == sum(len(text.encode()) for text in texts) == stream.size - len(texts)


@pytest.mark.parametrize("name", BYTE_FALLBACK)
def test_bytes_of_the_challenges_tokenizers_are_those_of_the_text(name: str, corpus_dir: Path) -> None:
    check_bytes(Tokenizer(corpus_dir / "tokenizers" / name), AWKWARD_TEXTS + random_texts(1000, seed=2) + story(20, seed=5))


@pytest.mark.parametrize("name", BYTE_FALLBACK)
def test_scored_bytes_do_not_depend_on_the_tokenizer(name: str, corpus_dir: Path) -> None:
    """902 FineWeb documents hold 2,504,867 bytes of text for every tokenizer with the challenge's normaliser."""
    with lzma.open(corpus_dir / "fineweb_mini_sp1024" / "val_docs_decoded.jsonl.xz", "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in f]
    assert sum(len(text.encode()) for text in texts) == 2_504_867
    tokenizer = Tokenizer(corpus_dir / "tokenizers" / name)
    assert scored_bytes(tokenize(tokenizer.pieces, texts), byte_table(tokenizer)) == 2_504_867


def test_published_validation_shard_scores_the_bytes_of_its_text(corpus_dir: Path) -> None:
    tokens = read_shard(corpus_dir / "fineweb_mini_sp1024" / "fineweb_val_000000.bin")
    assert scored_bytes(tokens, byte_table(Tokenizer(corpus_dir / "tokenizers" / "fineweb_1024_bpe.model"))) == 2_504_867


def never_over_counts(tokenizer: Tokenizer, reference: Tokenizer, texts: list[str]) -> int:
    """How many texts lost bytes to unknown tokens; `reference` has byte fallback and the same normaliser."""
    table, fewer = byte_table(tokenizer), 0
    for text in texts:
        whole = len(reference.decode(reference.encode([text])[0]).encode())
        found = scored_bytes(documents(tokenizer, [text])[0], table)
        assert found <= whole, ascii(text)
        fewer += found < whole
    return fewer


def test_unknown_tokens_never_over_count(sp_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "unk.model").write_bytes(train_sentencepiece(story(300, seed=1), byte_fallback=False, vocab_size=200))
    fewer = never_over_counts(
        Tokenizer(tmp_path / "unk.model"), Tokenizer(sp_tokenizer), AWKWARD_TEXTS + random_texts(300, seed=3))
    assert fewer > 100


def test_unknown_tokens_of_the_published_tokenizer_never_over_count(corpus_dir: Path) -> None:
    folder = corpus_dir / "tokenizers"
    fewer = never_over_counts(
        Tokenizer(folder / "fineweb_2048_bpe_nobytefallback.model"), Tokenizer(folder / "fineweb_1024_bpe.model"),
        AWKWARD_TEXTS + random_texts(1000, seed=4))
    assert fewer > 100


def test_spaces_inside_pieces_count_one_byte_each(tmp_path: Path) -> None:
    """Pieces over word borders hold U+2581, three bytes in UTF-8, for a space of one."""
    path, phrases = tmp_path / "phrases.model", ["of the river", "in a garden", "by no means at all"]
    path.write_bytes(train_sentencepiece(story(100, seed=1, words=phrases), split_by_whitespace=False))
    tokenizer = Tokenizer(path)
    assert any("\u2581" in tokenizer.pieces.id_to_piece(i)[1:] for i in range(tokenizer.vocab_size))
    check_bytes(tokenizer, story(20, seed=5, words=phrases) + AWKWARD_TEXTS)


def test_bytes_of_a_leading_space_depend_on_the_token_before(sp_tokenizer: Path) -> None:
    """The challenge's rule, token by token: a leading space counts except after a control or unknown token."""
    tokenizer = Tokenizer(sp_tokenizer)
    table, sp = byte_table(tokenizer), tokenizer.pieces
    the, space, letter = (sp.piece_to_id(piece) for piece in ("\u2581the", "\u2581", "t"))
    byte = sp.piece_to_id("<0xE2>")
    cases = [(letter, the, 4), (byte, the, 4), (the, space, 1), (the, byte, 1), (the, letter, 1)]
    cases += [(control, the, 3) for control in (0, 1, 2, 3)] + [(1, space, 0), (the, 1, 0), (the, 3, 0)]
    previous, targets, wanted = (torch.tensor(column) for column in zip(*cases, strict=True))
    assert table.count(previous, targets).tolist() == wanted.tolist()
    assert table.count(previous.view(2, -1), targets.view(2, -1)).tolist() == wanted.view(2, -1).tolist()


@pytest.mark.parametrize("chunk", [1, 2, 7, 100, 10**6])
def test_scored_bytes_in_chunks_equal_those_at_once(chunk: int, tiny_data: TinyData) -> None:
    table = byte_table(Tokenizer(tiny_data.tokenizer))
    whole = torch.from_numpy(tiny_data.val.astype(np.int64))
    assert scored_bytes(tiny_data.val, table, chunk) == int(table.count(whole[:-1], whole[1:]).sum())
    for size in (1, 2, chunk, chunk + 1):
        part = tiny_data.val[:size].astype(np.int64)
        wanted = sum(int(table.count(torch.tensor(a), torch.tensor(b))) for a, b in pairwise(part))
        assert scored_bytes(tiny_data.val[:size], table, chunk) == wanted


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation.
# ----------------------------------------------------------------------------------------------------------------------


def table_of(own: list[int], leading_space: list[int], boundary: list[int]) -> ByteTable:
    return ByteTable(torch.tensor(own), torch.tensor(leading_space).bool(), torch.tensor(boundary).bool())


ONE_BYTE_EACH = table_of([1] * 1000, [0] * 1000, [0] * 1000)


def rough_nats(x: Tensor, y: Tensor) -> Tensor:
    """A loss that differs from token to token, and with the token before."""
    return (torch.sin(0.37 * x + 1.7 * y) + 1.5).float()


class OneRank(Runtime):
    """A rank whose sums stay its own: `reduce` notes them and gives ones."""

    def __init__(self, rank: int, world_size: int):
        super().__init__(torch.device("cpu"), torch.float32, False, rank=rank, world_size=world_size)
        self.sums = torch.zeros(3, dtype=torch.float64)

    def reduce(self, values: Tensor, *_args: object) -> Tensor:
        self.sums = values.clone()
        return torch.ones_like(values)


def over_ranks(
    world_size: int, token_nats: Callable[[Tensor, Tensor], Tensor], tokens: np.ndarray, table: ByteTable, **sizes: int
) -> tuple[float, float, float]:
    """Nats, tokens and bytes that `world_size` ranks add up to."""
    ranks = [OneRank(rank, world_size) for rank in range(world_size)]
    for rt in ranks:
        evaluate(token_nats, tokens, table, rt, **sizes)
    nats, count, size = sum(rt.sums for rt in ranks).tolist()  # type: ignore[union-attr]
    return nats, count, size


def test_evaluation_gives_the_numbers_of_a_hand_computation() -> None:
    """Two windows of three; targets 2 1 2 | 3 4 2 after 0 2 1 | 2 3 4; the last token is left out."""
    tokens = np.array([0, 2, 1, 2, 3, 4, 2, 4], dtype=np.uint16)
    table = table_of(own=[0, 1, 2, 3, 4], leading_space=[0, 0, 1, 1, 0], boundary=[1, 0, 0, 0, 0])
    result = evaluate(lambda x, y: y.float() / 2 + x, tokens, table, CPU, seq_len=3, batch_tokens=3)
    # nats (1+0.5+1 + 1.5+2+1) + (0+2+1 + 2+3+4) = 7 + 12; bytes (2+0) + 1 + (2+1) + (3+1) + 4 + (2+1)
    assert (result.tokens, result.bytes) == (6, 17)
    assert result.val_loss == pytest.approx(19 / 6, rel=1e-12)
    assert result.val_bpb == pytest.approx(19 / 17 / 0.6931471805599453, rel=1e-12)


def test_windows_are_cut_from_the_stream_one_after_the_other() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def note(x: Tensor, y: Tensor) -> Tensor:
        seen.extend(zip(x.tolist(), y.tolist(), strict=True))
        return torch.zeros(y.shape)

    evaluate(note, np.arange(11, dtype=np.uint16), ONE_BYTE_EACH, CPU, seq_len=5, batch_tokens=10)
    assert seen == [([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]), ([5, 6, 7, 8, 9], [6, 7, 8, 9, 10])]


@pytest.mark.parametrize("batch_tokens", [1, 7, 13, 14, 21, 35, 70, 10_000])
def test_result_does_not_depend_on_the_batch(batch_tokens: int) -> None:
    """Padded last batches included: 14 windows of 7 in batches of 1, 2, 3, 5, 10 and all."""
    tokens = np.random.default_rng(0).integers(0, 1000, 100).astype(np.uint16)
    shapes = set()

    def nats(x: Tensor, y: Tensor) -> Tensor:
        shapes.add(tuple(x.shape))
        return rough_nats(x, y)

    result = evaluate(nats, tokens, ONE_BYTE_EACH, CPU, seq_len=7, batch_tokens=batch_tokens)
    x, y = torch.from_numpy(tokens[:98].astype(np.int64)), torch.from_numpy(tokens[1:99].astype(np.int64))
    assert result.val_loss == pytest.approx(float(rough_nats(x, y).double().mean()), rel=1e-12)
    assert (result.tokens, result.bytes) == (98, 98)
    assert shapes == {(max(1, min(14, batch_tokens // 7)), 7)}      # one shape, so one compiled graph


@pytest.mark.parametrize("batch_tokens", [7, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 14, 20])
def test_ranks_together_score_every_token_once(world_size: int, batch_tokens: int) -> None:
    tokens = np.random.default_rng(1).permutation(1000)[:100].astype(np.uint16)       # all different
    scored: list[int] = []

    def nats(x: Tensor, y: Tensor) -> Tensor:
        scored.extend(y[y.any(dim=1)].flatten().tolist())      # padding is all zero
        return rough_nats(x, y)

    table = table_of(list(range(1000)), [1, 0] * 500, [0, 0, 1, 0] * 250)
    nats_sum, count, size = over_ranks(world_size, nats, tokens, table, seq_len=7, batch_tokens=batch_tokens)
    alone = evaluate(rough_nats, tokens, table, CPU, seq_len=7, batch_tokens=batch_tokens)
    assert sorted(scored) == sorted(tokens[1:99].tolist())
    assert (count, size) == (alone.tokens, alone.bytes) == (98, scored_bytes(tokens[:99], table))
    assert nats_sum / count == pytest.approx(alone.val_loss, rel=1e-12)


@pytest.mark.parametrize("max_tokens", [7, 20, 21, 98, 10_000])
def test_max_tokens_scores_the_first_so_many(max_tokens: int) -> None:
    tokens = np.random.default_rng(2).integers(0, 1000, 100).astype(np.uint16)

    def score(tokens: np.ndarray, max_tokens: int) -> EvalResult:
        return evaluate(rough_nats, tokens, ONE_BYTE_EACH, CPU, seq_len=7, batch_tokens=14, max_tokens=max_tokens)

    capped, cut = score(tokens, max_tokens), score(tokens[:max_tokens + 1], 0)
    assert capped.tokens == min(max_tokens, 99) // 7 * 7
    assert replace(capped, seconds=0.0) == replace(cut, seconds=0.0)


@pytest.mark.parametrize("batch_tokens", [1, 2, 4])
def test_sums_are_float64(batch_tokens: int) -> None:
    """2^24 + 1 is no float32, neither within a batch nor over batches."""
    tokens = np.array([0, 1, 0, 1, 0], dtype=np.uint16)
    result = evaluate(
        lambda x, y: torch.tensor([1.0, 2.0**24])[y], tokens, ONE_BYTE_EACH, CPU, seq_len=1, batch_tokens=batch_tokens)
    assert result.val_loss == (2**25 + 2) / 4


def test_model_with_uniform_logits_scores_the_logarithm_of_the_vocabulary() -> None:
    """An untied head starts at zero; at one byte a token that is log2 V bits per byte."""
    shape = tiny_shape(tie_embeddings=False)
    model = GPT(shape, max_seq_len=8)
    tokens = np.random.default_rng(3).integers(0, shape.vocab_size, 100).astype(np.uint16)
    result = evaluate(lambda x, y: model(x, y, reduction="none"), tokens, ONE_BYTE_EACH, CPU, seq_len=8, batch_tokens=24)
    assert result.val_loss == pytest.approx(math.log(61), abs=1e-6)
    assert result.val_bpb == pytest.approx(5.930737, abs=1e-5)
