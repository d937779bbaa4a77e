"""Guarantees of data/prepare.py: what a folder's manifest promises is on the disk, whatever broke off on the way there.

    pytest tests/test_prepare.py                              # no network: the hub is tests/hub_server.py on 127.0.0.1
    CORPUS_DIR=shared/data pytest tests/test_prepare.py       # also against real FineWeb tokenizers and tokens

- fineweb fetches what is missing, stale or damaged, nothing else, and refuses what contradicts the published manifest.
- embedded is the same for the same Python, splits by document, and its reference numbers equal a plain computation.
- tokenize equals a straightforward encoding for every compression, and after a kill at any moment.
- verify passes what the other verbs made and names each way in which a folder can be wrong.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tests")]

import prepare  # noqa: E402
from hub_server import FakeHub  # noqa: E402
from prepare import scored_bytes  # noqa: E402

from train_gpt import DataError, Tokenizer, byte_table, check_pairing, read_shard, read_split  # noqa: E402

WORDS = ("the", "of", "in", "water", "river", "bridge", "1984", "42", "café", "naïve", "日本", "quickly;", "\n\n")


def texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words))) + f" #{seed}.{i}" for i in range(count)]


def run(*arguments: object) -> int:
    return prepare.main([str(argument) for argument in arguments])


def write_docs(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_bytes(tokens: Sequence[int]) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


def plain_shards(documents: Sequence[str], encode: Callable[[str], list[int]], val: int, size: int) -> dict[str, bytes]:
    """The challenge's export, the straightforward way: whole splits in memory, cut at every `size` tokens."""
    files = {}
    for split, chosen in (("val", documents[:val]), ("train", documents[val:])):
        tokens = [token for text in chosen for token in (1, *encode(text))]
        for i in range(0, len(tokens), size):
            files[f"fineweb_{split}_{i // size:06d}.bin"] = shard_bytes(tokens[i:i + size])
    return files


class SimulatedKill(BaseException):
    """Stops the program between two renames, as SIGKILL would."""


def dies_at(call: int) -> Callable[..., None]:
    calls, replace = itertools.count(1), os.replace

    def dying(source: Any, target: Any) -> None:
        if next(calls) == call:
            raise SimulatedKill
        replace(source, target)

    return dying


def killed_at(call: int, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dies_at(call))
        with pytest.raises(SimulatedKill):
            run(*arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer of 320 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "fineweb_320_bpe.model"
    path.write_bytes(prepare.train_tokenizer(texts(200), 320))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# fineweb, against a local hub.
# ----------------------------------------------------------------------------------------------------------------------

SHARD_SIZE = 5000
DATASET = "datasets/fineweb10B_sp320"


@pytest.fixture(scope="module")
def export(model: Path) -> dict[str, bytes]:
    """A published export: its files by path in the repository."""
    tokenizer = Tokenizer(model)
    shards = plain_shards(texts(300), lambda text: tokenizer.encode([text])[0], val=60, size=SHARD_SIZE)
    counts = {split: [len(data) // 2 - 512 for name, data in shards.items() if split in name]
              for split in ("val", "train")}
    assert len(counts["val"]) == 2
    assert len(counts["train"]) >= 4
    stats = {f"{what}_{split}": value for split, sizes in counts.items()
             for what, value in (("files", len(sizes)), ("tokens", sum(sizes)))}
    manifest = {
        "version": "10B", "shard_size": SHARD_SIZE,
        "tokenizers": [{"name": "sp_bpe_320", "kind": "sentencepiece_bpe", "vocab_size": 320,
                        "model_path": "tokenizers/fineweb_320_bpe.model"}],
        "datasets": [{"name": "fineweb10B_sp320", "tokenizer_name": "sp_bpe_320", "vocab_size": 320, "stats": stats}],
    }
    files = {f"{DATASET}/{name}": data for name, data in shards.items()}
    files |= {
        "tokenizers/fineweb_320_bpe.model": model.read_bytes(), "manifest.json": json.dumps(manifest).encode(),
        "docs_selected.jsonl": b'{"text": "x"}\n' * 900, "docs_selected.source_manifest.json": b'{"num_docs": 900}',
    }
    return {f"datasets/{name}": data for name, data in files.items()}


@pytest.fixture
def hub(export: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(export) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
        monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
        monkeypatch.setattr(prepare, "DISK_MARGIN_BYTES", 0)
        yield hub


def fetch(root: Path, shards: int = 2, *more: str) -> int:
    return run("fineweb", "--variant", "sp320", "--train-shards", shards, "--root", root, *more)


def with_manifest(hub: FakeHub, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(hub.files["datasets/manifest.json"])
    change(manifest)
    hub.publish({"datasets/manifest.json": json.dumps(manifest).encode()})


def expected_files(export: dict[str, bytes], shards: int) -> dict[str, bytes]:
    """What lies under the data root after a fetch of the first `shards` training shards."""
    skipped = [f"train_{i:06d}" for i in range(shards, 100)] + ["docs_selected"]
    wanted = {name: data for name, data in export.items() if not any(part in name for part in skipped)}
    return {name.removeprefix("datasets/"): data for name, data in wanted.items()}


def test_fetches_the_first_shards_and_nothing_else(hub, export, tmp_path, capsys):
    assert fetch(tmp_path) == 0
    assert contents(tmp_path) == expected_files(export, 2)
    out = capsys.readouterr().out
    assert "documents re-encoded" in out
    assert "VOCAB_SIZE=320" in out
    assert not (tmp_path / DATASET / "manifest.json").exists()


def test_second_call_requests_only_what_is_new(hub, export, tmp_path):
    assert fetch(tmp_path) == 0
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert hub.downloads() == []
    assert fetch(tmp_path, 3) == 0
    assert hub.downloads() == [f"datasets/{DATASET}/fineweb_train_000002.bin"]
    assert contents(tmp_path) == expected_files(export, 3)


def test_complete_data_stays_usable_without_the_hub(hub, tmp_path, monkeypatch, capsys):
    assert fetch(tmp_path) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(tmp_path) == 0
    assert fetch(tmp_path, 3) == 2
    assert "willdepueoai/parameter-golf: cannot be listed" in capsys.readouterr().err


def test_documents_come_on_request(hub, export, tmp_path):
    assert fetch(tmp_path, 0, "--with-docs") == 0
    assert (tmp_path / "docs_selected.jsonl").read_bytes() == export["datasets/docs_selected.jsonl"]
    assert (tmp_path / "docs_selected.source_manifest.json").exists()


def test_repository_and_root_come_from_the_environment(export, tmp_path, monkeypatch):
    with FakeHub({name.replace("datasets/", "my/export/", 1): data for name, data in export.items()}) as other:
        monkeypatch.setenv("HF_ENDPOINT", other.endpoint)
        monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "somebody/else")
        monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "my/export")
        assert fetch(tmp_path) == 0
        assert any("/datasets/somebody/else" in request.path for request in other.requests)
    assert contents(tmp_path) == expected_files(export, 2)


def test_interrupted_transfer_is_resumed_where_it_broke(hub, export, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it resumes after whole chunks
    shard = f"datasets/{DATASET}/fineweb_train_000001.bin"
    hub.cut[shard] = [3000]
    assert fetch(tmp_path) == 0
    assert [request.start for request in hub.requests if request.path == shard and request.method == "GET"] == [0, 3000]
    assert contents(tmp_path) == expected_files(export, 2)


def test_killed_fetch_is_repeated_by_the_same_command(hub, export, tmp_path):
    killed_at(5, "fineweb", "--variant", "sp320", "--train-shards", 2, "--root", tmp_path)
    assert (tmp_path / ".fetch").exists()
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert contents(tmp_path) == expected_files(export, 2)
    assert 0 < len(hub.downloads()) < len(expected_files(export, 2))


def test_file_absent_from_the_repository_is_named_before_any_download(hub, tmp_path, capsys):
    del hub.files[f"datasets/{DATASET}/fineweb_train_000001.bin"]
    assert fetch(tmp_path) == 2
    assert f"has no file datasets/{DATASET}/fineweb_train_000001.bin" in capsys.readouterr().err
    assert hub.downloads() == ["datasets/manifest.json"]


def test_404_leaves_no_file_behind(hub, tmp_path, capsys):
    hub.hidden.add(f"datasets/{DATASET}/fineweb_train_000001.bin")
    assert fetch(tmp_path) == 2
    assert "fineweb_train_000001.bin came wrong twice" in capsys.readouterr().err
    assert not (tmp_path / DATASET / "fineweb_train_000001.bin").exists()
    hub.hidden.clear()
    assert fetch(tmp_path) == 0


def test_truncated_published_shard_is_refused(hub, export, tmp_path, capsys):
    shard = f"{DATASET}/fineweb_train_000001.bin"
    hub.files[f"datasets/{shard}"] = export[f"datasets/{shard}"][:-2]
    assert fetch(tmp_path) == 2
    captured = capsys.readouterr()
    assert "its header's 5000 tokens make 11024" in captured.out
    assert "came wrong twice" in captured.err
    assert not (tmp_path / shard).exists()
    assert hub.downloads().count(f"datasets/{shard}") == 2


def test_shard_whose_count_contradicts_the_manifest_is_refused(hub, tmp_path, capsys):
    shard = f"{DATASET}/fineweb_train_000001.bin"
    hub.files[f"datasets/{shard}"] = shard_bytes([1] * 4999)
    assert fetch(tmp_path) == 2
    assert "4999 tokens, the published manifest.json says 5000" in capsys.readouterr().out
    assert not (tmp_path / shard).exists()


@pytest.mark.parametrize("damage", ["truncated", "wrong magic", "emptied", "wrong count"])
def test_damaged_local_shard_is_fetched_again(hub, export, tmp_path, damage):
    assert fetch(tmp_path) == 0
    path = tmp_path / DATASET / "fineweb_val_000000.bin"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "wrong magic": b"\0" + data[1:], "emptied": b"",
                      "wrong count": shard_bytes([1] * 10)}[damage])
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert hub.downloads() == [f"datasets/{DATASET}/fineweb_val_000000.bin"]
    assert contents(tmp_path) == expected_files(export, 2)


def test_damaged_tokenizer_is_fetched_again(hub, export, tmp_path):
    assert fetch(tmp_path) == 0
    path = tmp_path / "tokenizers/fineweb_320_bpe.model"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert fetch(tmp_path) == 0
    assert contents(tmp_path) == expected_files(export, 2)


def test_stale_manifest_is_refreshed(hub, tmp_path, capsys):
    def shrink(manifest: dict[str, Any]) -> None:
        manifest["datasets"][0]["stats"] |= {"files_train": 1, "tokens_train": SHARD_SIZE}

    good = hub.files["datasets/manifest.json"]
    with_manifest(hub, shrink)
    assert fetch(tmp_path, 2) == 2
    assert "--train-shards asks for 2, fineweb10B_sp320 has 1" in capsys.readouterr().err
    hub.publish({"datasets/manifest.json": good})
    assert fetch(tmp_path, 2) == 0
    assert (tmp_path / "manifest.json").read_bytes() == good


def test_unlisted_variant_is_refused_with_the_listed_ones(hub, tmp_path, capsys):
    assert run("fineweb", "--variant", "sp999", "--root", tmp_path) == 2
    assert "lists no dataset fineweb10B_sp999, only fineweb10B_sp320" in capsys.readouterr().err


def test_manifest_that_leads_outside_the_data_root_is_refused(hub, tmp_path, capsys):
    with_manifest(hub, lambda manifest: manifest["tokenizers"][0].update(model_path="../evil.model"))
    assert fetch(tmp_path / "root") == 2
    assert "names ../evil.model, which lies outside the export" in capsys.readouterr().err
    assert not (tmp_path / "evil.model").exists()


def test_small_disk_is_refused_before_any_shard_is_requested(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "DISK_MARGIN_BYTES", 1000)
    size = sum(len(data) for data in expected_files(hub.files, 2).values()) - len(hub.files["datasets/manifest.json"])
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, size + 999))
    assert fetch(tmp_path) == 2
    assert f"{size + 999} bytes free, {size} to fetch and 1000 to spare are needed" in capsys.readouterr().err
    assert hub.downloads() == ["datasets/manifest.json"]
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, size + 1000))
    assert fetch(tmp_path) == 0


def test_published_tokenizer_that_did_not_make_the_shards_is_refused(hub, tmp_path, capsys):
    other = prepare.train_tokenizer(["zzz qq xx jj"] * 9 + texts(30, 9), 320)
    hub.publish({"datasets/tokenizers/fineweb_320_bpe.model": other})
    assert fetch(tmp_path) == 2
    assert "did not make the shards" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# embedded.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embedded")
    assert run("embedded", "--root", root) == 0
    return root


def test_embedded_is_the_same_twice(corpus, tmp_path):
    assert run("embedded", "--root", tmp_path) == 0
    assert contents(tmp_path) == contents(corpus)


def test_embedded_is_made_once(corpus, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "docstring_documents", lambda sources: pytest.fail("made again"))
    assert run("embedded", "--root", corpus) == 0
    assert "up to date" in capsys.readouterr().out


def test_embedded_has_the_promised_size_and_passes_verify(corpus):
    folder = corpus / "datasets/embedded_sp1024"
    assert run("verify", folder) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    val, train = (manifest["splits"][split]["text_bytes"] for split in ("val", "train"))
    assert val >= 100_000
    assert 0.05 < val / (val + train) < 0.07
    assert train > 1_500_000
    assert manifest["tokenizer"]["vocab_size"] == 1024
    reference = manifest["reference"]
    assert 2 < reference["bigram_bits_per_byte"] < 2.6 < 4 < reference["order0_bits_per_byte"] < 5


def test_embedded_killed_before_any_rename_ends_in_the_same_bytes(tmp_path, monkeypatch):
    sources = {f"{i}.py": repr(text).encode() for i, text in enumerate(texts(400, 7))}
    monkeypatch.setattr(prepare, "library_sources", lambda library: sources)
    monkeypatch.setattr(prepare, "EMBEDDED_VAL_BYTES", 10_000)
    monkeypatch.setattr(prepare, "EMBEDDED_VOCAB", 320)
    assert run("embedded", "--root", tmp_path / "whole") == 0
    whole, root = contents(tmp_path / "whole"), tmp_path / "killed"
    sources["0.py"] = b"'" + b"of another Python " * 20 + b"'"
    assert run("embedded", "--root", root) == 0
    sources["0.py"] = repr(texts(400, 7)[0]).encode()
    for call in range(1, 7):  # tokenizer, two shards with their progress, manifest
        killed_at(call, "embedded", "--root", root)
        assert not (root / "datasets/embedded_sp1024/manifest.json").exists()
    assert run("embedded", "--root", root) == 0
    assert contents(root) == whole


def test_embedded_splits_share_no_document():
    documents = [f"document {i} " + "x" * (300 + i % 50) for i in range(5000)]
    val, train = prepare.split_documents(documents)
    assert sorted(val + train) == sorted(documents)
    assert not set(val) & set(train)
    assert 100_000 <= sum(map(len, val)) < 110_000


def test_python_without_library_sources_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(tmp_path))
    assert run("embedded", "--root", tmp_path / "root") == 2
    assert "comes without its sources" in capsys.readouterr().err


def test_docstrings_come_in_source_order_and_dedented():
    source = b'''"""Module."""
class A:
    """Class

        indented
    """
    def f(self):
        """Method."""
if True:
    async def g():
        "Function."
x = "no docstring"
'''
    wanted = ["Module.", "Class\n\nindented", "Method.", "Function."]
    assert list(prepare.docstrings(prepare.ast.parse(source))) == wanted
    assert prepare.docstring_documents({"a.py": source, "b.py": b"", "pydoc_data/topics.py": b"topics = {}"}) == []


def test_reference_numbers_equal_a_plain_computation():
    assert prepare.order0_bits(np.array([0, 0, 1, 2])) == pytest.approx(1.5)
    rng = random.Random(1)
    train, val = ([rng.choice([0, 1, 1, 2, 2, 2, 3]) for _ in range(n)] for n in (200, 50))
    plain = plain_bigram_nats(train, val, 5)
    assert prepare.bigram_nats(np.array(train), np.array(val), 5) == pytest.approx(plain, rel=1e-9)


def plain_bigram_nats(train: list[int], val: list[int], vocab_size: int) -> float:
    def parts(fitted: list[int], previous: int, token: int) -> list[float]:
        followers = Counter(y for x, y in itertools.pairwise(fitted) if x == previous)
        unigram = Counter(fitted)[token] / len(fitted)
        bigram = followers[token] / followers.total() if followers else unigram
        return [bigram, unigram, 1 / vocab_size]

    cut = len(train) - len(train) // 10
    held_out = [parts(train[:cut], x, y) for x, y in itertools.pairwise(train[cut:])]
    weights = [1 / 3] * 3
    for _ in range(100):
        sums = [0.0] * 3
        for part in held_out:
            mixed = sum(w * p for w, p in zip(weights, part, strict=True))
            sums = [s + w * p / mixed for s, w, p in zip(sums, weights, part, strict=True)]
        weights = [s / len(held_out) for s in sums]
    return -sum(math.log(sum(w * p for w, p in zip(weights, parts(train, x, y), strict=True)))
                for x, y in itertools.pairwise(val))


# ----------------------------------------------------------------------------------------------------------------------
# tokenize.
# ----------------------------------------------------------------------------------------------------------------------

AWKWARD = ["", " ", "a", "  leading and trailing  ", "日本語 café", "tab\tand\nnewline", "x" * 5000, "<s>control</s>",
           "\u2581", "a\0b"]


def test_byte260_golden(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", ["hé", "", "a b"])
    assert run("tokenize", "--docs", docs, "--vocab", "byte260", "--val-docs", 2, "--out", tmp_path / "out") == 0
    files = contents(tmp_path / "out")
    assert files["fineweb_val_000000.bin"] == shard_bytes([1, 108, 199, 173, 1])
    assert files["fineweb_train_000000.bin"] == shard_bytes([1, 101, 36, 102])
    assert files["fineweb_train_000000.bin"][:16] == bytes.fromhex("88d83401 01000000 04000000 00000000")
    assert json.loads(files["fineweb_pure_byte_260.json"]) == {
        "tokenizer_type": "pure_byte", "vocab_size": 260,
        "config": {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256},
    }
    manifest = json.loads(files["manifest.json"])
    assert manifest["splits"]["val"] | {"documents_sha256": ""} == {
        "documents": 2, "tokens": 5, "text_bytes": 3, "scored_bytes": 3, "documents_sha256": ""
    }
    assert run("verify", tmp_path / "out") == 0


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_every_compression_equals_the_plain_encoding(tmp_path, model, suffix):
    documents = AWKWARD + texts(80, 5)
    docs = write_docs(tmp_path / "docs.jsonl", documents)
    if suffix:
        docs = compressed(docs, suffix)
    out = tmp_path / "out"
    assert run("tokenize", "--docs", docs, "--tokenizer-model", model, "--val-docs", 12, "--out", out,
               "--shard-tokens", 777, "--threads", 2) == 0
    tokenizer = Tokenizer(model)
    files = contents(out)
    manifest = json.loads(files.pop("manifest.json"))
    assert files.pop(model.name) == model.read_bytes()
    assert files == plain_shards(documents, lambda text: tokenizer.encode([text])[0], val=12, size=777)
    assert manifest["splits"]["train"]["text_bytes"] == sum(len(text.encode()) for text in documents[12:])
    assert run("verify", out) == 0


def compressed(docs: Path, suffix: str) -> Path:
    """The file again in two pieces, as concatenating compressed files makes them."""
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        compress[".zst"] = zstandard.ZstdCompressor().compress
    data, path = docs.read_bytes(), docs.with_name(docs.name + suffix)
    path.write_bytes(compress[suffix](data[:1000]) + compress[suffix](data[1000:]))
    return path


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_documents_cut_off_are_refused(tmp_path, suffix, capsys):
    path = compressed(write_docs(tmp_path / "docs.jsonl", texts(50)), suffix)
    path.write_bytes(path.read_bytes()[:-20])
    assert run("tokenize", "--docs", path, "--vocab", "byte260", "--val-docs", 2, "--out", tmp_path / "out") == 2
    assert "damaged or cut off after line" in capsys.readouterr().err
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"text": 1}', "", "\udcff", "[" * 100_000])
def test_malformed_document_is_refused_by_its_line(tmp_path, line, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", ["a", "b"])
    docs.write_bytes(docs.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    assert run("tokenize", "--docs", docs, "--vocab", "byte260", "--val-docs", 1, "--out", tmp_path / "out") == 2
    assert 'line 3 is not a JSON object with a string "text"' in capsys.readouterr().err


def test_half_a_surrogate_pair_reads_as_a_question_mark(tmp_path):
    docs = tmp_path / "docs.jsonl"
    docs.write_text('{"text": "a\\ud83d"}\n{"text": "b"}\n')
    assert run("tokenize", "--docs", docs, "--vocab", "byte260", "--val-docs", 1, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out/fineweb_val_000000.bin").read_bytes() == shard_bytes([1, ord("a") + 4, ord("?") + 4])


def test_tokenizer_is_trained_on_training_documents_only(tmp_path):
    train = texts(100, 3)
    for folder, val in (("a", "wwwww kkkkk zzzzz"), ("b", "qqqqq")):
        docs = write_docs(tmp_path / f"{folder}.jsonl", [val] * 20 + train)
        assert run("tokenize", "--docs", docs, "--vocab", 310, "--val-docs", 20, "--out", tmp_path / folder) == 0
    models = [(tmp_path / folder / "fineweb_310_bpe.model").read_bytes() for folder in "ab"]
    assert models[0] == models[1] == prepare.train_tokenizer(prepare.sentences_of(train), 310)
    assert Tokenizer(tmp_path / "a/fineweb_310_bpe.model").vocab_size == 310


def test_too_few_documents_leave_nothing_that_looks_whole(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", ["a", "b"])
    assert run("tokenize", "--docs", docs, "--vocab", "byte260", "--out", tmp_path / "out") == 2
    assert "2 documents leave none for train: the first 50000 are for validation" in capsys.readouterr().err
    assert contents(tmp_path / "out").keys() == {"fineweb_pure_byte_260.json"}


@pytest.mark.parametrize("drop", [False, True])
def test_training_documents_equal_to_validation_are_counted_or_dropped(tmp_path, drop, capsys):
    val, train = texts(20, 1), texts(30, 2)
    doubled = [*train[:10], val[3], val[3], val[17], *train[10:]]
    docs = write_docs(tmp_path / "docs.jsonl", val + doubled)
    assert run("tokenize", "--docs", docs, "--vocab", "byte260", "--val-docs", 20, "--out", tmp_path / "out",
               *(["--drop-duplicates"] if drop else [])) == 0
    assert f"duplicates_of_validation:3 ({'dropped' if drop else 'kept'})" in capsys.readouterr().out
    files = contents(tmp_path / "out")
    manifest = json.loads(files["manifest.json"])
    assert manifest["source"]["duplicates_of_validation"] == 3
    assert manifest["splits"]["train"]["documents"] == (30 if drop else 33)
    wanted = plain_shards(val + (train if drop else doubled), lambda text: [b + 4 for b in text.encode()], 20, 10**8)
    assert wanted.items() <= files.items()


@pytest.mark.parametrize("options", [["--vocab", "byte260"], ["--vocab", "320", "--drop-duplicates"]])
def test_export_killed_before_any_rename_ends_in_the_same_bytes(tmp_path, monkeypatch, options):
    """Every file of an export gets its name by a rename; each of them in turn is the one that no longer happens."""
    documents = texts(30, 1) + texts(15, 2)
    documents[35:35] = documents[:5]
    docs = write_docs(tmp_path / "docs.jsonl", documents)

    def export(out: Path) -> int:
        return run("tokenize", "--docs", docs, "--val-docs", 30, "--out", out, "--shard-tokens", 1000, *options)

    assert export(tmp_path / "whole/out") == 0
    whole = contents(tmp_path / "whole/out")
    assert len(whole) > 6
    call = 0
    for call in itertools.count(1):
        out = tmp_path / f"killed{call}/out"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dies_at(call))
            try:
                assert export(out) == 0
                break
            except SimulatedKill:
                pass
        assert not (out / "manifest.json").exists()
        assert export(out) == 0
        assert contents(out) == whole
    assert call > 2 * (len(whole) - 2)


def test_export_killed_with_sigkill_ends_in_the_same_bytes(tmp_path, model):
    docs = write_docs(tmp_path / "docs.jsonl", texts(12_000, 4))
    command = ["tokenize", "--docs", docs, "--tokenizer-model", model, "--val-docs", 50, "--shard-tokens", 40_000]
    whole, killed = tmp_path / "whole/out", tmp_path / "killed/out"
    assert run(*command, "--out", whole) == 0
    for shards in (2, 12):
        arguments = [sys.executable, ROOT / "data/prepare.py", *map(str, command), "--out", killed]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(killed.glob("fineweb_*.bin"))) < shards:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "manifest.json").exists()
    assert run(*command, "--out", killed) == 0
    assert contents(killed) == contents(whole)


def test_resuming_with_other_documents_or_options_is_refused(tmp_path, model, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", texts(40))
    command = ["tokenize", "--docs", docs, "--tokenizer-model", model, "--out", tmp_path / "out", "--shard-tokens", 500]
    killed_at(9, *command, "--val-docs", 9)
    assert run(*command, "--val-docs", 8) == 2
    assert "holds shards of another origin" in capsys.readouterr().err
    data = docs.read_bytes()
    docs.write_bytes(data.replace(b"a", b"e", 1))
    assert run(*command, "--val-docs", 9) == 2
    assert "was begun with other documents" in capsys.readouterr().err
    docs.write_bytes(data)
    assert run(*command, "--val-docs", 9) == 0
    assert run(*command, "--val-docs", 9) == 0
    assert "complete already" in capsys.readouterr().out


def test_foreign_shards_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/fineweb_train_000000.bin").write_bytes(shard_bytes([1, 2]))
    docs = write_docs(tmp_path / "docs.jsonl", texts(4))
    assert run("tokenize", "--docs", docs, "--vocab", "byte260", "--val-docs", 1, "--out", tmp_path / "out") == 2
    assert "holds shards of another origin" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"fineweb_train_000000.bin": shard_bytes([1, 2])}


def test_tokenizer_of_another_size_than_asked_for_is_refused(tmp_path, model, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", texts(4))
    assert run("tokenize", "--docs", docs, "--vocab", 1024, "--tokenizer-model", model, "--out", tmp_path / "out") == 2
    assert "has 320 entries, wanted 1024" in capsys.readouterr().err
    assert run("tokenize", "--docs", docs, "--out", tmp_path / "out") == 2
    assert "needs --vocab or --tokenizer-model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [
    ["nonsense"], ["fineweb", "--variant", "gpt2"], ["fineweb", "--train-shards", "-1"],
    ["tokenize", "--docs", "x", "--out", "y", "--vocab", "259"],
    ["tokenize", "--docs", "x", "--out", "y", "--val-docs", "0"],
])
def test_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# verify.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    docs = write_docs(tmp_path / "docs.jsonl", texts(30))
    assert run("tokenize", "--docs", docs, "--tokenizer-model", model, "--val-docs", 9, "--out", tmp_path / "out",
               "--shard-tokens", 700) == 0
    return tmp_path / "out"


def set_token(path: Path, index: int, token: int) -> None:
    tokens = np.array(read_shard(path))
    tokens[index] = token
    path.write_bytes(shard_bytes(tokens.tolist()))


def edit_manifest(folder: Path, *keys: str, value: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    inner = manifest
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


VAL = "fineweb_val_000000.bin"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: (f / VAL).write_bytes((f / VAL).read_bytes()[:-1]), "its header's 700 tokens make 2424"),
    "wrong magic": (lambda f: (f / VAL).write_bytes(b"\0" * 2424), "not a token shard, magic 0"),
    "flipped": (lambda f: set_token(f / VAL, 5, 300), "its manifest says"),
    "id too large": (lambda f: set_token(f / VAL, 5, 320), "holds id 320, the tokenizer has 320"),
    "missing": (lambda f: (f / VAL).unlink(), "fineweb_val_000000.bin: missing"),
    "foreign": (lambda f: shutil.copy(f / VAL, f / "fineweb_val_000077.bin"), "val_000077.bin: not in the manifest"),
    "documents": (lambda f: edit_manifest(f, "splits", "train", "documents", value=22), "21 train documents, its"),
    "scored": (lambda f: edit_manifest(f, "splits", "val", "scored_bytes", value=1), "bytes, its manifest says 1"),
    "tokenizer": (lambda f: edit_manifest(f, "tokenizer", "sha256", value="0" * 64), "did not make the shards"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "give it with --tokenizer"),
    "not a manifest": (lambda f: (f / "manifest.json").write_text("{}"), "not a manifest of prepare.py"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_fault(folder, damage, capsys):
    assert run("verify", folder) == 0
    change, message = DAMAGES[damage]
    change(folder)
    assert run("verify", folder) == 2
    assert message in capsys.readouterr().err


def test_verify_without_manifest_checks_pairing_and_bos(folder, model, capsys):
    (folder / "manifest.json").unlink()
    assert run("verify", folder, "--tokenizer", model) == 0
    assert "documents re-encoded" in capsys.readouterr().out
    set_token(folder / VAL, 0, 300)
    assert run("verify", folder, "--tokenizer", model) == 2
    assert "the val split begins with id 300, wanted BOS 1" in capsys.readouterr().err


def test_verify_checks_published_shards_against_the_published_manifest(hub, tmp_path, capsys):
    assert fetch(tmp_path) == 0
    assert run("verify", tmp_path / DATASET) == 0
    (tmp_path / DATASET / "fineweb_train_000001.bin").write_bytes(shard_bytes([1, 5, 6]))
    assert run("verify", tmp_path / DATASET) == 2
    assert "tokens 3, its manifest says 5000" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Real tokenizers and tokens.
# ----------------------------------------------------------------------------------------------------------------------

CORPUS = Path(os.environ.get("CORPUS_DIR", ""))
real = pytest.mark.skipif(not os.environ.get("CORPUS_DIR"), reason="CORPUS_DIR names no folder with FineWeb tokens")


@pytest.fixture(scope="module")
def fineweb_texts() -> list[str]:
    return list(prepare.DocumentFile(CORPUS / "fineweb_mini_sp1024/val_docs_decoded.jsonl.xz"))


def real_tokens(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    return np.array([token for ids in tokenizer.encode(documents) for token in (tokenizer.bos_id, *ids)], dtype="<u2")


@real
def test_fineweb_documents_give_the_challenge_ids(tmp_path):
    docs = CORPUS / "fineweb_mini_sp1024/val_docs_decoded.jsonl.xz"
    assert run("tokenize", "--docs", docs, "--tokenizer-model", CORPUS / "tokenizers/fineweb_1024_bpe.model",
               "--val-docs", 901, "--out", tmp_path / "out") == 0
    wanted = np.array(read_shard(CORPUS / "fineweb_mini_sp1024/fineweb_val_000000.bin"))
    ours = np.concatenate([np.concatenate(read_split(tmp_path / "out", split)) for split in ("val", "train")])
    assert np.array_equal(ours, wanted)


@real
@pytest.mark.parametrize("name", ["1024_bpe", "4096_bpe", "8192_bpe", "8192_bpe_sp8192"])
def test_scored_bytes_equal_the_text_for_real_tokenizers(fineweb_texts, name):
    tokenizer = Tokenizer(CORPUS / f"tokenizers/fineweb_{name}.model")
    tokens = real_tokens(tokenizer, fineweb_texts[:200])
    text_bytes = sum(len(text.encode()) for text in fineweb_texts[:200])
    assert scored_bytes(tokens, byte_table(tokenizer)) == prepare.decoded_bytes(tokens, tokenizer) == text_bytes


@real
def test_wrong_tokenizer_of_equal_vocabulary_is_refused(fineweb_texts, tmp_path):
    maker, other = (Tokenizer(CORPUS / f"tokenizers/fineweb_8192_bpe{end}.model") for end in ("_sp8192", ""))
    tokens = real_tokens(maker, fineweb_texts[:200])
    assert "re-encoded" in check_pairing(tmp_path, maker, tokens)
    with pytest.raises(DataError, match="did not make the shards"):
        check_pairing(tmp_path, other, tokens)


@real
def test_tokenizer_without_byte_fallback_never_counts_too_much(fineweb_texts):
    tokenizer = Tokenizer(CORPUS / "tokenizers/fineweb_2048_bpe_nobytefallback.model")
    table = byte_table(tokenizer)
    short = 0
    for text in [*fineweb_texts[:200], "日本 語", "a 日 b", "\u0001x"]:
        counted = scored_bytes(real_tokens(tokenizer, [text]), table)
        assert counted <= len(text.encode())
        short += counted < len(text.encode())
    assert short >= 3
