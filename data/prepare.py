"""Makes, fetches and checks the token shards that train_gpt.py reads. data/README.md describes the files.

    python data/prepare.py embedded                                       # from this Python's docstrings, no network
    python data/prepare.py fineweb --variant sp1024 --train-shards 10     # the challenge's published shards
    python data/prepare.py tokenize --docs docs_selected.jsonl.zst --vocab 4096 --out data/datasets/mine_sp4096
    python data/prepare.py verify data/datasets/mine_sp4096

Each ends with what a run needs to know of the data, for instance

    val documents:40 tokens:39270 text_bytes:102892 scored_bytes:99482
    train documents:354 tokens:626651 text_bytes:1723522
    DATA_PATH=data/datasets/embedded_sp1024 TOKENIZER_PATH=data/tokenizers/embedded_1024_bpe.model VOCAB_SIZE=1024

Files appear under a temporary name and are renamed when whole, manifest.json last: after a kill at any point the same
command goes on from what is finished. Exit codes: 0 done, 2 the request or the data is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

DATA_ROOT = Path(__file__).resolve().parent
SHARD_TOKENS = 100_000_000    # the challenge's; a document may run over from one shard into the next
VAL_DOCUMENTS = 50_000        # the challenge's; the first documents of its order are the validation split
TOKENIZER_DOCUMENTS = 200_000  # SentencePiece holds its training text in memory: about 0.6 GB of FineWeb


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=(__doc__ or "").partition("\n\n")[0], allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, allow_abbrev=False)

    sub = verb("embedded", "a 2 MB corpus from the docstrings of this Python's library")
    sub.add_argument("--root", type=Path, default=DATA_ROOT, help="holds datasets/ and tokenizers/")

    sub = verb("fineweb", "the challenge's published shards and tokenizer")
    sub.add_argument("--variant", default="sp1024", type=variant, help="sp<VOCABULARY> or byte260")
    sub.add_argument("--train-shards", type=at_least(0), default=80, metavar="N", help="the first N (default 80)")
    sub.add_argument("--with-docs", action="store_true", help="also docs_selected.jsonl (tens of GB), to tokenize anew")
    sub.add_argument("--root", type=Path, default=DATA_ROOT, help="holds datasets/, tokenizers/ and manifest.json")

    sub = verb("tokenize", "shards from documents, one JSON object with a text a line")
    sub.add_argument("--docs", type=Path, required=True, help=".jsonl, .jsonl.xz, .jsonl.zst or .jsonl.gz")
    sub.add_argument("--out", type=Path, required=True, help="folder for shards, tokenizer and manifest")
    sub.add_argument("--vocab", type=vocabulary, metavar="N|byte260", help="entries of the vocabulary to train")
    sub.add_argument("--tokenizer-model", type=Path, metavar="M", help="use this tokenizer instead of training one")
    sub.add_argument("--tokenizer-train-docs", type=at_least(1), default=TOKENIZER_DOCUMENTS, metavar="N",
                     help="train it on the first N training documents (default %(default)s)")
    sub.add_argument("--val-docs", type=at_least(1), default=VAL_DOCUMENTS, metavar="N",
                     help="the first N documents are validation (default %(default)s)")
    sub.add_argument("--drop-duplicates", action="store_true",
                     help="leave out training documents equal to a validation document, else only counted")
    sub.add_argument("--shard-tokens", type=at_least(1), default=SHARD_TOKENS, metavar="N", help="default %(default)s")
    sub.add_argument("--threads", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="default: all cores")

    sub = verb("verify", "checks every shard, the hashes and the scored bytes of a folder")
    sub.add_argument("dir", type=Path, metavar="DIR")
    sub.add_argument("--tokenizer", type=Path, metavar="MODEL", help="default: the one that the manifest names")
    return parser


def at_least(low: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return whole_number


def variant(text: str) -> str:
    if not re.fullmatch(r"byte260|sp[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"must be sp<VOCABULARY> or byte260, got {text!r}")
    return text


def vocabulary(text: str) -> int | str:
    """260 byte values and specials are always there; shards hold uint16."""
    if text == "byte260":
        return text
    if not text.isdecimal() or not 260 < int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"must be byte260 or a whole number above 260, at most 65536, got {text!r}")
    return int(text)


if __name__ == "__main__":
    build_parser().parse_args()  # a wrong command line is answered before the two seconds that importing torch takes

sys.path.insert(0, str(DATA_ROOT.parent))
import torch  # noqa: E402

from train_gpt import (  # noqa: E402
    SHARD_HEADER_BYTES,
    SHARD_MAGIC,
    SHARD_VERSION,
    ByteTable,
    DataError,
    Tokenizer,
    byte_table,
    check_pairing,
    read_shard,
    read_split,
    write_atomically,
)

# ----------------------------------------------------------------------------------------------------------------------
# Small parts: lines, hashes, JSON files.
# ----------------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of ours or of the published repository; None where there is no file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it and run the command again") from None
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Documents: the texts of a .jsonl file, plain or compressed, in constant memory.
# ----------------------------------------------------------------------------------------------------------------------


class DocumentFile:
    """Iterating gives the texts in order, from the start each time; `position` counts bytes of the file as stored."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        try:
            self.bytes = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); --docs must name the documents") from None

    def __iter__(self) -> Iterator[str]:
        number = 0
        try:
            with self.path.open("rb") as raw, contextlib.closing(self._lines(raw)) as lines:
                for line in lines:
                    number += 1
                    self.position = raw.tell()
                    yield text_of(line, f"{self.path}: line {number}")
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{self.path}: damaged or cut off after line {number} ({error}); get it again") from None

    def _lines(self, raw: io.BufferedReader) -> Generator[bytes, None, None]:
        if self.path.suffix == ".zst":
            yield from lines_of(zstd_chunks(raw))
        elif self.path.suffix == ".xz":
            with lzma.open(raw) as lines:
                yield from lines
        elif self.path.suffix == ".gz":
            with gzip.open(raw) as lines:
                yield from lines
        else:
            yield from raw


def text_of(line: bytes, where: str) -> str:
    """JSON can spell half a surrogate pair, which has no UTF-8: a question mark, as with the challenge's byte260."""
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f'{where} is not a JSON object with a string "text"') from None
    return text.encode("utf-8", "replace").decode()


def zstd_chunks(raw: io.BufferedReader) -> Iterator[bytes]:
    """The contents of all frames. (zstandard's own reader takes a file that was cut off for a short one.)"""
    try:
        from zstandard import ZstdDecompressor, ZstdError
    except ImportError:
        raise DataError(f"{raw.name}: reading .zst needs the package zstandard: pip install zstandard") from None
    frame = None
    while data := raw.read(1 << 16):
        while data:
            frame = frame or ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except ZstdError as error:
                raise EOFError(str(error)) from None
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends within a frame")


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    tail = b""
    for chunk in chunks:
        *whole, tail = (tail + chunk).split(b"\n")
        yield from whole
    if tail:
        yield tail


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: trained with the challenge's options, or its byte tokenizer.
# ----------------------------------------------------------------------------------------------------------------------


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model; one thread and no file name in it, so that equal text gives equal bytes."""
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.999, byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
            num_threads=1, minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"training a tokenizer of {vocab_size} entries failed: {reason}") from None
    return model.getvalue()


def sentences_of(texts: Iterable[str]) -> Iterator[str]:
    """As the challenge feeds its trainer, which itself skips texts above 4,192 bytes."""
    for text in texts:
        if stripped := text.replace("\0", " ").strip():
            yield stripped


def byte_tokenizer() -> bytes:
    """The challenge's byte260: four specials, then the 256 byte values."""
    offset = Tokenizer.BYTE_OFFSET
    config = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": offset, "byte_count": 256}
    spec = {"tokenizer_type": "pure_byte", "config": config, "vocab_size": offset + 256}
    return (json.dumps(spec, indent=2, sort_keys=True) + "\n").encode()


def tokenizer_entry(tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """What a manifest says of the tokenizer; its file is named relative to the manifest's folder."""
    return {
        "file": Path(os.path.relpath(tokenizer.path, out)).as_posix(),
        "sha256": tokenizer.sha256,
        "kind": "byte" if tokenizer.pieces is None else "sentencepiece",
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Export: documents to shards. Each finished shard is a point from which a killed run goes on.
# ----------------------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    text: str
    split: str
    text_bytes: int
    sha256: bytes
    duplicate: bool  # a training document equal to one of validation


@dataclass
class Counts:
    """What one split holds. Each document's hash is folded into the one before: h = sha256(h + sha256(document))."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    documents_sha256: str = "0" * 64

    def add(self, document: Document, tokens: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.text_bytes += document.text_bytes
        chain = bytes.fromhex(self.documents_sha256) + document.sha256
        self.documents_sha256 = hashlib.sha256(chain).hexdigest()


@dataclass
class Progress:
    """Where an export stands at its last finished shard; progress.json while it is under way."""

    request: dict[str, Any]        # all that decides what is written
    tokenizer: dict[str, Any]
    documents: int = 0             # taken from the input, dropped ones included
    tokens_of_next: int = 0        # of the document after those, how many tokens the last shard ends with
    duplicates: int = 0
    splits: dict[str, Counts] = field(default_factory=lambda: {"val": Counts(), "train": Counts()})
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Progress | None:
        if (value := read_json(path)) is None:
            return None
        try:
            return cls(**{**value, "splits": {split: Counts(**counts) for split, counts in value["splits"].items()}})
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: not a progress file of this version; delete the folder and start again") from None


class ShardWriter:
    def __init__(self, path: Path, split: str):
        self.path, self.split, self.tokens = path, split, 0
        self.temporary = path.with_name(path.name + ".tmp")
        self.file = self.temporary.open("wb")
        self.file.write(bytes(SHARD_HEADER_BYTES))

    def append(self, tokens: np.ndarray) -> None:
        self.file.write(tokens.astype("<u2", copy=False).tobytes())
        self.tokens += tokens.size

    def finish(self) -> dict[str, Any]:
        """Writes the header, now that the length is known, and gives the file its name; returns its manifest entry."""
        header = np.zeros(SHARD_HEADER_BYTES // 4, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self.tokens
        with self.file:
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
        entry = {"tokens": self.tokens, "sha256": file_sha256(self.temporary)}
        os.replace(self.temporary, self.path)
        return entry


class Export:
    def __init__(self, out: Path, tokenizer: Tokenizer, progress: Progress, *, val_documents: int,
                 shard_tokens: int = SHARD_TOKENS, drop_duplicates: bool = False):
        self.out, self.tokenizer, self.progress = out, tokenizer, progress
        self.val_documents, self.shard_tokens, self.drop_duplicates = val_documents, shard_tokens, drop_duplicates
        self.shard: ShardWriter | None = None

    def run(self, texts: Iterable[str], threads: int, report: Callable[[], object] = lambda: None) -> None:
        """Writes all shards, from the progress on: BOS and tokens of each document, validation first."""
        documents = self._named(texts)
        self._replay(itertools.islice(documents, self.progress.documents))
        for document, ids in encoded(documents, self.tokenizer, threads):
            self._write(document, ids)
            report()
        self._finish_shard()
        for split, counts in self.progress.splits.items():
            if not counts.documents:
                clear(self.out)
                total, val = self.progress.documents, self.val_documents
                raise DataError(f"{total} documents leave none for {split}: the first {val} are for validation")

    def _named(self, texts: Iterable[str]) -> Iterator[Document]:
        """Splits by number, compares by hash; 8 bytes a validation document suffice (20 M documents: odds of 1e-7)."""
        in_validation = set()
        for number, text in enumerate(texts):
            data = text.encode()
            sha256 = hashlib.sha256(data).digest()
            if number < self.val_documents:
                in_validation.add(sha256[:8])
                yield Document(text, "val", len(data), sha256, duplicate=False)
            else:
                yield Document(text, "train", len(data), sha256, duplicate=sha256[:8] in in_validation)

    def _replay(self, documents: Iterable[Document]) -> None:
        """Passes over what is on disk already and proves that it came from these very documents."""
        again = {split: Counts(tokens=counts.tokens) for split, counts in self.progress.splits.items()}
        for document in documents:
            if not (document.duplicate and self.drop_duplicates):
                again[document.split].add(document, 0)
        if again != self.progress.splits:
            raise DataError(f"{self.out}: was begun with other documents than these; delete it or choose another --out")

    def _write(self, document: Document, ids: np.ndarray) -> None:
        dropped = document.duplicate and self.drop_duplicates
        if not dropped:
            self._append(document.split, np.insert(ids, 0, self.tokenizer.bos_id))
            self.progress.splits[document.split].add(document, ids.size + 1)
        self.progress.duplicates += document.duplicate
        self.progress.documents += 1
        self.progress.tokens_of_next = 0

    def _append(self, split: str, tokens: np.ndarray) -> None:
        if self.shard and self.shard.split != split:
            self._finish_shard()
        while (start := self.progress.tokens_of_next) < tokens.size:
            if self.shard is None:
                number = sum(name.startswith(f"fineweb_{split}_") for name in self.progress.shards)
                self.shard = ShardWriter(self.out / f"fineweb_{split}_{number:06d}.bin", split)
            piece = tokens[start:start + self.shard_tokens - self.shard.tokens]
            self.shard.append(piece)
            self.progress.tokens_of_next += piece.size
            if self.shard.tokens == self.shard_tokens:
                self._finish_shard()

    def _finish_shard(self) -> None:
        if self.shard is not None:
            name = self.shard.path.name
            self.progress.shards[name] = self.shard.finish()
            say(f"wrote {name} tokens:{self.shard.tokens} documents_so_far:{self.progress.documents}")
            self.shard = None
            write_json(self.out / "progress.json", asdict(self.progress))


def encoded(documents: Iterable[Document], tokenizer: Tokenizer, threads: int) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids, in order; a few batches are under way (SentencePiece leaves the interpreter lock)."""
    def encode(batch: Sequence[Document]) -> list[np.ndarray]:
        return [np.array(ids, dtype="<u2") for ids in tokenizer.encode([document.text for document in batch])]

    waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches(documents):
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > 2 * threads:
                first, ids = waiting.popleft()
                yield from zip(first, ids.result(), strict=True)
        for batch, ids in waiting:
            yield from zip(batch, ids.result(), strict=True)


def batches(documents: Iterable[Document], text_bytes: int = 1 << 20) -> Iterator[list[Document]]:
    """Of about a megabyte each, so that memory does not follow the length of documents."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.text_bytes
        if size >= text_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_manifest(export: Export, source: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Completes an export: manifest.json last of all, then nothing is left to resume."""
    out, progress = export.out, export.progress
    splits = {split: asdict(counts) for split, counts in progress.splits.items()}
    splits["val"]["scored_bytes"] = scored_bytes(np.concatenate(read_split(out, "val")), byte_table(export.tokenizer))
    manifest = {"format": 1, "name": out.resolve().name, "tokenizer": progress.tokenizer, "splits": splits,
                "shards": progress.shards, "source": source, **more}
    write_json(out / "manifest.json", manifest)
    remove([out / "progress.json"])
    return manifest


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of an export of ours in `out`, None where there is none. Raises DataError."""
    manifest = read_json(out / "manifest.json")
    if manifest is not None and not {"tokenizer", "splits", "shards", "source"} <= manifest.keys():
        raise DataError(f"{out / 'manifest.json'}: not a manifest of prepare.py; delete it and prepare the data again")
    return manifest


def clear(out: Path) -> None:
    """Readies a folder of ours for a new export. The manifest goes first: nothing may look whole that is not."""
    out.mkdir(parents=True, exist_ok=True)
    remove([out / "manifest.json", out / "progress.json", *out.glob("fineweb_*.bin"), *out.glob("*.tmp")])


def describe(out: Path, manifest: dict[str, Any]) -> None:
    for split, counts in manifest["splits"].items():
        say(" ".join([split, *(f"{key}:{value}" for key, value in counts.items() if key != "documents_sha256")]))
    for name, value in manifest.get("reference", {}).items():
        say(f"{name}:{value:.4f}")
    entry = manifest["tokenizer"]
    describe_run(out, out / entry["file"], entry["vocab_size"])


def describe_run(data_path: Path, tokenizer: Path, vocab_size: int) -> None:
    """The three knobs that train_gpt.py wants, to be put before its command."""
    paths = [os.path.relpath(path) for path in (data_path, tokenizer)]
    say(f"DATA_PATH={paths[0]} TOKENIZER_PATH={paths[1]} VOCAB_SIZE={vocab_size}")


# ----------------------------------------------------------------------------------------------------------------------
# embedded: English text that every Python carries, split by document, and two numbers any learning must beat.
# ----------------------------------------------------------------------------------------------------------------------

EMBEDDED_RECIPE = 1          # raise it when anything below changes the output
EMBEDDED_SEED = 1337
EMBEDDED_MIN_BYTES = 200     # shorter documents are dropped
EMBEDDED_VAL_SHARE = 0.055   # of the text
EMBEDDED_VAL_BYTES = 100_000  # and at least this much
EMBEDDED_VOCAB = 1024
# Installed packages, tests, and what some distributions ship separately or not at all.
EMBEDDED_SKIPPED = frozenset({
    "__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "sitecustomize.py", "test", "tests", "tkinter", "turtle.py", "turtledemo",
})


def embedded(args: argparse.Namespace) -> None:
    out, tokenizer_path = args.root / "datasets/embedded_sp1024", args.root / "tokenizers/embedded_1024_bpe.model"
    sources = library_sources(Path(sysconfig.get_path("stdlib")))
    digest = hashlib.sha256()
    for name, data in sources.items():
        digest.update(f"{name} {len(data)}\n".encode() + data)
    source = {"recipe": EMBEDDED_RECIPE, "python": platform.python_version(), "sources_sha256": digest.hexdigest()}
    if (manifest := finished(out, source)) is not None:
        say(f"{out}: up to date")
        describe(out, manifest)
        return
    clear(out)
    val, train = split_documents(docstring_documents(sources))
    tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
    # SentencePiece skips texts above 4,192 bytes, most of this corpus: it gets paragraphs.
    paragraphs = (paragraph for text in train for paragraph in text.split("\n\n"))
    write_atomically(tokenizer_path, train_tokenizer(sentences_of(paragraphs), EMBEDDED_VOCAB))
    tokenizer = Tokenizer(tokenizer_path)
    export = Export(out, tokenizer, Progress(source, tokenizer_entry(tokenizer, out)), val_documents=len(val))
    export.run(val + train, threads=1)
    describe(out, write_manifest(export, source, reference=reference_lines(out, tokenizer, "".join(val).encode())))


def finished(out: Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in `out`, if it has this source and every file it names is there with its hash."""
    manifest = read_manifest(out)
    if manifest is None or manifest["source"] != source:
        return None
    hashes = {name: entry["sha256"] for name, entry in manifest["shards"].items()}
    hashes[manifest["tokenizer"]["file"]] = manifest["tokenizer"]["sha256"]
    intact = all((out / name).is_file() and file_sha256(out / name) == sha256 for name, sha256 in hashes.items())
    return manifest if intact else None


def library_sources(library: Path) -> dict[str, bytes]:
    """The library's sources by name, and the help topics; read, never imported."""
    skipped = re.compile(r"config-.*|_sysconfigdata_.*")  # written when this Python was built
    paths = {path.relative_to(library): path for path in library.rglob("*.py")}
    chosen = {
        name.as_posix(): path for name, path in paths.items()
        if not any(part in EMBEDDED_SKIPPED or skipped.fullmatch(part) for part in name.parts)
        or name.as_posix() == "pydoc_data/topics.py"
    }
    return {name: chosen[name].read_bytes() for name in sorted(chosen)}


def docstring_documents(sources: dict[str, bytes]) -> list[str]:
    """A document a module, its docstrings in source order, and one a help topic; neither tiny nor twice the same."""
    documents = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        for name, data in sources.items():
            try:
                module = ast.parse(data)
            except (SyntaxError, ValueError):  # a stray file for another Python
                continue
            if name == "pydoc_data/topics.py":
                tables = [node.value for node in module.body if isinstance(node, ast.Assign)]
                documents += [text for table in tables for _, text in sorted(ast.literal_eval(table).items())]
            else:
                documents.append("\n\n".join(docstrings(module)))
    return list(dict.fromkeys(text for text in documents if len(text.encode()) >= EMBEDDED_MIN_BYTES))


def docstrings(node: ast.AST) -> Iterator[str]:
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if documented and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):  # definitions stand nowhere else
            yield from docstrings(child)


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """(validation, training) in shuffled order; no document is more than a tenth of the validation text."""
    shuffled = list(documents)
    random.Random(EMBEDDED_SEED).shuffle(shuffled)
    wanted = max(EMBEDDED_VAL_SHARE * sum(len(text.encode()) for text in documents), EMBEDDED_VAL_BYTES)
    val: list[str] = []
    train: list[str] = []
    taken = 0
    for text in shuffled:
        size = len(text.encode())
        if taken < wanted and size <= wanted / 10:
            val.append(text)
            taken += size
        else:
            train.append(text)
    if taken < wanted:
        raise DataError(
            f"the library in {sysconfig.get_path('stdlib')} has too little text ({taken} bytes for validation, wanted"
            f" {wanted:.0f}); this Python comes without its sources, use another"
        )
    return val, train


def reference_lines(out: Path, tokenizer: Tokenizer, val_text: bytes) -> dict[str, float]:
    train, val = (np.concatenate(read_split(out, split)).astype(np.int64) for split in ("train", "val"))
    bigram_bits = bigram_nats(train, val, tokenizer.vocab_size) / np.log(2)
    return {
        "order0_bits_per_byte": order0_bits(np.frombuffer(val_text, dtype=np.uint8)),
        "bigram_bits_per_byte": float(bigram_bits / scored_bytes(val, byte_table(tokenizer))),
    }


def order0_bits(symbols: np.ndarray) -> float:
    """Entropy of the symbols' own distribution, bits each."""
    p = np.bincount(symbols) / symbols.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def bigram_nats(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy, summed over the targets of `val`, of bigram, unigram and uniform distributions fitted on `train`,
    mixed with the weights that suit its last tenth best when fitted on the rest.
    """
    cut = train.size - train.size // 10
    held_out = mixture_parts(train[:cut], train[cut:], vocab_size)
    weights = np.full(3, 1 / 3)
    for _ in range(100):  # expectation maximisation; the likelihood has one maximum
        shares = weights[:, None] * held_out
        weights = (shares / shares.sum(axis=0)).mean(axis=1)
    return float(-np.log(weights @ mixture_parts(train, val, vocab_size)).sum())


def mixture_parts(fitted: np.ndarray, scored: np.ndarray, vocab_size: int) -> np.ndarray:
    """(3, targets): what bigram, unigram and uniform distribution give each target; a token never seen before any other
    has the unigram for its bigram.
    """
    pairs = np.bincount(fitted[:-1] * vocab_size + fitted[1:], minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    seen = pairs.sum(axis=1)
    x, y = scored[:-1], scored[1:]
    unigram = (np.bincount(fitted, minlength=vocab_size) / fitted.size)[y]
    bigram = np.where(seen[x] > 0, pairs[x, y] / np.maximum(seen[x], 1), unigram)
    return np.stack([bigram, unigram, np.full(y.size, 1 / vocab_size)])


# ----------------------------------------------------------------------------------------------------------------------
# tokenize: shards in the challenge's order and format from any documents.
# ----------------------------------------------------------------------------------------------------------------------


def tokenize(args: argparse.Namespace) -> None:
    documents, out = DocumentFile(args.docs), args.out
    request = tokenize_request(args, documents)
    manifest, progress = read_manifest(out), Progress.load(out / "progress.json")
    found = manifest["source"].get("request") if manifest else progress.request if progress else None
    if found != request and (manifest or progress or any(out.glob("fineweb_*.bin"))):
        raise DataError(f"{out}: holds shards of another origin ({json.dumps(found)}, wanted {json.dumps(request)});"
                        " choose another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    remove(out.glob("*.tmp"))
    if manifest is not None:
        check_shards(out, manifest["shards"])
        remove([out / "progress.json"])
        say(f"{out}: complete already")
        describe(out, manifest)
        return
    if progress is None:
        tokenizer = make_tokenizer(args, documents)
        progress = Progress(request, tokenizer_entry(tokenizer, out))
        write_json(out / "progress.json", asdict(progress))
    else:
        tokenizer = Tokenizer(out / progress.tokenizer["file"])
        if tokenizer.sha256 != progress.tokenizer["sha256"]:
            raise DataError(f"{tokenizer.path}: changed since this export was begun; delete {out} and start again")
        check_shards(out, progress.shards)
        say(f"resuming after {progress.documents} documents and {len(progress.shards)} shards")
    export = Export(out, tokenizer, progress, val_documents=args.val_docs, shard_tokens=args.shard_tokens,
                    drop_duplicates=args.drop_duplicates)
    t0 = time.monotonic()
    with tqdm(total=documents.bytes, desc="tokenize", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        export.run(documents, args.threads, lambda: bar.update(documents.position - bar.n))
    say(f"documents:{progress.documents} seconds:{time.monotonic() - t0:.1f}")
    say(f"duplicates_of_validation:{progress.duplicates} ({'dropped' if args.drop_duplicates else 'kept'})")
    describe(out, write_manifest(export, {"request": request, "duplicates_of_validation": progress.duplicates}))


def tokenize_request(args: argparse.Namespace, documents: DocumentFile) -> dict[str, Any]:
    """Everything that decides what is written; a folder is only ever continued with the same. Raises DataError."""
    tokenizer: dict[str, Any] = {"vocab": args.vocab}
    if args.tokenizer_model is not None:
        given = Tokenizer(args.tokenizer_model)
        wanted = {"byte260": 260}.get(args.vocab, args.vocab) or given.vocab_size
        if given.vocab_size != wanted or given.vocab_size > 65536:
            raise DataError(f"{given.path}: has {given.vocab_size} entries, wanted {wanted} (at most 65536: uint16)")
        tokenizer = {"sha256": given.sha256}
    elif args.vocab is None:
        raise DataError("tokenize needs --vocab or --tokenizer-model")
    elif args.vocab != "byte260":
        tokenizer["train_docs"] = args.tokenizer_train_docs
    return {
        "docs": {"file": documents.path.name, "bytes": documents.bytes}, "tokenizer": tokenizer,
        "val_docs": args.val_docs, "shard_tokens": args.shard_tokens, "drop_duplicates": args.drop_duplicates,
    }


def make_tokenizer(args: argparse.Namespace, documents: DocumentFile) -> Tokenizer:
    """The tokenizer in its place in the output folder: copied, written, or trained on training documents only."""
    if args.tokenizer_model is not None:
        name, data = args.tokenizer_model.name, args.tokenizer_model.read_bytes()
    elif args.vocab == "byte260":
        name, data = "fineweb_pure_byte_260.json", byte_tokenizer()
    else:
        say(f"training a tokenizer of {args.vocab} entries on up to {args.tokenizer_train_docs} documents")
        texts = itertools.islice(documents, args.val_docs, args.val_docs + args.tokenizer_train_docs)
        name, data = f"fineweb_{args.vocab}_bpe.model", train_tokenizer(sentences_of(texts), args.vocab)
    write_atomically(args.out / name, data)
    return Tokenizer(args.out / name)


def check_shards(out: Path, shards: dict[str, dict[str, Any]]) -> None:
    """A quick look, header and length only: `verify` reads every byte. Raises DataError."""
    for name, entry in shards.items():
        if read_shard(out / name).size != entry["tokens"]:
            raise DataError(f"{out / name}: changed since it was written; delete {out} and start again")


# ----------------------------------------------------------------------------------------------------------------------
# fineweb: the published export, driven by its manifest.json, pinned to one commit of the repository.
# ----------------------------------------------------------------------------------------------------------------------

DISK_MARGIN_BYTES = 1 << 30  # left free after all is fetched
HASHED_BYTES = 1 << 24       # larger files are hashed when they arrive, not on every later call


@dataclass(frozen=True)
class Published:
    """A file of the published export: what the manifest and the repository say of it, None where they say nothing."""

    name: str                   # under the export's root there, under the data root here
    tokens: int | None = None   # of a shard
    size: int | None = None
    oid: str | None = None      # SHA-256 of a large file, git's blob hash of a small one

    def fault(self, path: Path, arrived: bool = False) -> str:
        """Why the file at `path` is not this one; empty when nothing speaks against it."""
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{path}: {size} bytes, published are {self.size}"
        if path.suffix == ".bin":
            try:
                tokens = read_shard(path).size
            except DataError as error:
                return str(error)
            if self.tokens is not None and tokens != self.tokens:
                return f"{path}: {tokens} tokens, the published manifest.json says {self.tokens}"
        if self.oid and (arrived or size <= HASHED_BYTES) and self.oid != file_oid(path, len(self.oid)):
            return f"{path}: its hash differs from the published {self.oid[:16]}"
        return ""


def file_oid(path: Path, digits: int) -> str:
    if digits == 64:
        return file_sha256(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class HubError(DataError):
    """The repository could not be reached or lacks something."""


class Hub:
    """The published repository; the only code that knows huggingface_hub. Whatever goes wrong there is a HubError."""

    def __init__(self, env: Mapping[str, str]):
        self.repo = env.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
        self.prefix = PurePosixPath(env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets"))
        self.endpoint = env.get("HF_ENDPOINT")
        self.commit = ""

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the errors of a bad line are its HTTP client's, which differs between versions
            line = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise HubError(f"{self.repo}: {what}: {type(error).__name__}: {line}") from error

    def look_up(self, files: Sequence[Published]) -> list[Published]:
        """The files with size and hash, all of the same commit."""
        from huggingface_hub import HfApi

        paths = [str(self.prefix / file.name) for file in files]
        with self._errors("cannot be listed"):
            api = HfApi(endpoint=self.endpoint)
            self.commit = self.commit or api.dataset_info(self.repo).sha or "main"
            entries = {}
            for start in range(0, len(paths), 100):
                some = paths[start:start + 100]
                found = api.get_paths_info(self.repo, some, revision=self.commit, repo_type="dataset")
                entries.update({entry.path: entry for entry in found})
        known = []
        for file, path in zip(files, paths, strict=True):
            if (entry := entries.get(path)) is None:
                raise HubError(f"{self.repo}: has no file {path} (commit {self.commit[:12]})")
            known.append(replace(file, size=entry.size, oid=entry.lfs.sha256 if entry.lfs else entry.blob_id))
        return known

    def download(self, file: Published, folder: Path, force: bool) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        path = str(self.prefix / file.name)
        with self._errors(path):
            return Path(hf_hub_download(self.repo, path, repo_type="dataset", revision=self.commit, local_dir=folder,
                                        force_download=force, endpoint=self.endpoint))

    def fetch(self, file: Published, root: Path) -> None:
        """Puts the file in its place under `root` once it is proved right; a second attempt forgets every cache."""
        target = root / file.name
        for force in (False, True):
            try:
                found = self.download(file, root / ".fetch", force)
                problem = file.fault(found, arrived=True)
                if not problem:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(found, target)
                    return
            except HubError as error:
                problem = str(error)
            say(f"{problem}{'' if force else '; fetching it once more'}")
        raise HubError(f"{self.repo}: {file.name} came wrong twice, see above")


def fineweb(args: argparse.Namespace) -> None:
    root, hub = args.root, Hub(os.environ)
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / ".fetch", ignore_errors=True)  # left by a killed run
    dataset = f"fineweb10B_{args.variant}"
    try:
        [manifest_file] = hub.look_up([Published("manifest.json")])
        if manifest_file.fault(root / "manifest.json"):
            hub.fetch(manifest_file, root)
        files, model, vocab_size = published_files(root, dataset, args.train_shards, args.with_docs)
        fetch_missing(hub, hub.look_up(files), root)
    except HubError as error:  # without a network, what is complete stays usable
        if not (root / "manifest.json").is_file():
            raise
        files, model, vocab_size = published_files(root, dataset, args.train_shards, args.with_docs)
        if any(file.fault(root / file.name) for file in files):
            raise
        say(f"{error}; all that was asked for is here already")
    folder, tokenizer = root / "datasets" / dataset, Tokenizer(root / model)
    if tokenizer.vocab_size != vocab_size:
        raise DataError(f"{tokenizer.path}: has {tokenizer.vocab_size} entries, its manifest.json says {vocab_size}")
    say(f"pairing:{check_pairing(folder, tokenizer, np.concatenate(read_split(folder, 'val')))}")
    describe_run(folder, tokenizer.path, vocab_size)


def published_files(
    root: Path, dataset: str, train_shards: int | None = None, with_docs: bool = False
) -> tuple[list[Published], str, int]:
    """Files wanted, name of the tokenizer, its vocabulary, by the published manifest under `root`; None: all shards."""
    manifest = read_json(root / "manifest.json") or {}
    try:
        datasets, tokenizers = ({entry["name"]: entry for entry in manifest[key]} for key in ("datasets", "tokenizers"))
        if (entry := datasets.get(dataset)) is None:
            raise DataError(f"{root / 'manifest.json'}: lists no dataset {dataset}, only {', '.join(sorted(datasets))}")
        shards = {split: published_shards(manifest, entry, split) for split in ("val", "train")}
        if train_shards is not None and train_shards > len(shards["train"]):
            raise DataError(f"--train-shards asks for {train_shards}, {dataset} has {len(shards['train'])}")
        tokenizer = tokenizers[entry["tokenizer_name"]]
        artifacts = [tokenizer[key] for key in ("model_path", "path", "vocab_path") if tokenizer.get(key)]
        files = [Published(name) for name in artifacts] + shards["val"] + shards["train"][:train_shards]
        files += [Published(f"docs_selected.{end}") for end in ("source_manifest.json", "jsonl") if with_docs]
        for file in files:
            if PurePosixPath(file.name).is_absolute() or ".." in PurePosixPath(file.name).parts:
                raise DataError(f"{root / 'manifest.json'}: names {file.name}, which lies outside the export")
        return files, artifacts[0], int(entry["vocab_size"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{root / 'manifest.json'}: not the challenge's manifest ({error!r})") from None


def published_shards(manifest: dict[str, Any], entry: dict[str, Any], split: str) -> list[Published]:
    """All shards of a split; every one is full but the last, which holds the rest of the split's tokens."""
    stats = entry["stats"]
    files, total, full = int(stats[f"files_{split}"]), stats.get(f"tokens_{split}"), manifest.get("shard_size")
    sizes: list[int | None] = [None] * files
    if files and total is not None and full is not None:
        sizes = [full] * (files - 1) + [total - full * (files - 1)]
        if not 0 < total - full * (files - 1) <= full:
            raise DataError(f"manifest.json: {entry['name']} has {total} {split} tokens in {files} shards of {full}")
    folder = f"datasets/{entry['name']}/fineweb_{split}"
    return [Published(f"{folder}_{number:06d}.bin", tokens) for number, tokens in enumerate(sizes)]


def fetch_missing(hub: Hub, files: list[Published], root: Path) -> None:
    wanted = [file for file in files if file.fault(root / file.name)]
    needed = sum(file.size or 0 for file in wanted)
    say(f"files complete:{len(files) - len(wanted)} to_fetch:{len(wanted)} bytes:{needed}")
    free = shutil.disk_usage(root).free
    if wanted and needed + DISK_MARGIN_BYTES > free:
        raise DataError(f"{root}: {free} bytes free, {needed} to fetch and {DISK_MARGIN_BYTES} to spare are needed;"
                        " nothing was fetched; free some or ask for fewer --train-shards")
    for number, file in enumerate(wanted, 1):
        hub.fetch(file, root)
        say(f"fetched {number}/{len(wanted)} {file.name} {file.size} bytes")
    shutil.rmtree(root / ".fetch", ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# verify: all that a folder of shards promises, checked from the bytes up.
# ----------------------------------------------------------------------------------------------------------------------


def verify(args: argparse.Namespace) -> None:
    folder, root = args.dir, args.dir.resolve().parent.parent
    manifest = read_manifest(folder)
    if manifest is not None:
        promised, model = manifest["shards"], folder / manifest["tokenizer"]["file"]
    elif folder.resolve().name.startswith("fineweb10B_") and (root / "manifest.json").exists():
        files, name, _ = published_files(root, folder.resolve().name)
        promised, model = {Path(file.name).name: {"tokens": file.tokens} for file in files if file.tokens}, root / name
    else:
        promised, model = {}, None
    if (model := args.tokenizer or model) is None:
        raise DataError(f"{folder}: has no manifest.json to name its tokenizer; give it with --tokenizer")
    tokenizer = Tokenizer(model)
    faults = [f"{folder / name}: missing" for name in promised if manifest and not (folder / name).exists()]
    for path in sorted(folder.glob("fineweb_*.bin")):
        faults += verify_shard(path, tokenizer, promised.get(path.name, {}))
    if promised:
        faults += [f"{path}: not in the manifest" for path in folder.glob("fineweb_*.bin") if path.name not in promised]
    faults = faults or verify_splits(folder, tokenizer, manifest["splits"] if manifest else {})
    if faults:
        raise DataError("\n".join(faults))
    say(f"{folder}: all checks passed")


def verify_shard(path: Path, tokenizer: Tokenizer, promised: dict[str, Any]) -> list[str]:
    try:
        tokens = read_shard(path)
    except DataError as error:
        return [str(error)]
    top, sha256 = int(tokens.max()), file_sha256(path)
    documents = int(np.count_nonzero(tokens == tokenizer.bos_id))
    say(f"{path.name} tokens:{tokens.size} documents:{documents} max_id:{top} sha256:{sha256[:16]}")
    return [f"{path}: {text}" for wrong, text in (
        (top >= tokenizer.vocab_size, f"holds id {top}, the tokenizer has {tokenizer.vocab_size} entries"),
        *((promised.get(key, value) != value, f"{key} {value}, its manifest says {promised.get(key)}")
          for key, value in (("tokens", tokens.size), ("sha256", sha256))),
    ) if wrong]


def verify_splits(folder: Path, tokenizer: Tokenizer, promised: dict[str, Any]) -> list[str]:
    found: dict[str, dict[str, int]] = {}
    faults = []
    for split in ("val", "train"):
        shards = read_split(folder, split)
        if shards[0][0] != tokenizer.bos_id:
            faults.append(f"{folder}: the {split} split begins with id {shards[0][0]}, wanted BOS {tokenizer.bos_id}")
        documents = sum(int(np.count_nonzero(shard == tokenizer.bos_id)) for shard in shards)
        found[split] = {"documents": documents, "tokens": sum(shard.size for shard in shards)}
    val = np.concatenate(read_split(folder, "val"))
    say(f"pairing:{check_pairing(folder, tokenizer, val)}")
    scored, decoded = scored_bytes(val, byte_table(tokenizer)), decoded_bytes(val, tokenizer)
    found["val"]["scored_bytes"] = scored
    unknown = int(np.count_nonzero(val == tokenizer.pieces.unk_id())) if tokenizer.pieces else 0
    say(f"val scored_bytes:{scored} decoded_bytes:{decoded} unknown_tokens:{unknown}")
    if scored > decoded or (scored < decoded and not unknown):  # an unknown token decodes to a sign, and scores nothing
        faults.append(f"{folder}: the metric counts {scored} validation bytes, the text they decode to has {decoded}")
    return faults + [
        f"{folder}: {found[split][key]} {split} {key}, its manifest says {value}"
        for split, counts in promised.items() for key, value in counts.items() if found[split].get(key, value) != value
    ]


def scored_bytes(tokens: np.ndarray, table: ByteTable, chunk: int = 1 << 22) -> int:
    """Bytes that all targets of a stream add up to (its first token is no target)."""
    total = 0
    for start in range(0, tokens.size - 1, chunk):
        piece = torch.from_numpy(np.asarray(tokens[start:start + chunk + 1]).astype(np.int64))
        total += int(table.count(piece[:-1], piece[1:]).sum())
    return total


def decoded_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the documents' texts, the slow and independent way."""
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    ends = np.append(starts[1:], tokens.size)
    with tqdm(total=tokens.size, desc="decode", unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        total = 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            total += len(tokenizer.decode(tokens[start + 1:end].tolist()).encode())
            bar.update(end - start)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        {"embedded": embedded, "fineweb": fineweb, "tokenize": tokenize, "verify": verify}[args.verb](args)
    except (DataError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
