"""The file format: what export.py writes, any process reads back bit for bit, and nothing else gets through.

Guarantees: the golden file of version 1 stays readable; equal states give equal bytes; a load equals the encoder's own
reconstruction; every truncation, flipped bit, mutation, bomb and malformed field is an ArtifactError that names its
place, in bounded memory. Run: python -m pytest tests/test_container.py (about 30 s on one core).
"""
from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import export
from export import ArtifactError, ExportOptions, decode_artifact, encode_artifact, encode_plan, make_plan

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden_v1.anlm"
GOLDEN_SHA256 = "873934ce6f04b4da30fcbcd8e290fe881ec8c5943469c67511db1023390b0199"
META = {"model": {"dim": 8, "tied": True}, "note": "e\u0301", "rope": 1e4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden_state() -> dict[str, Tensor]:
    """Exact in binary, and periodic, so that the file stays small."""
    i, j = torch.arange(257)[:, None], torch.arange(256)[None, :]
    matrix = ((3 * i + 5 * j) % 17 - 8) / 32 * 2.0 ** (i % 4)
    return {
        "tok_emb.weight": (matrix.T.contiguous() / 8).bfloat16(),
        "blocks.0.mlp.fc.weight": matrix.float(),
        "blocks.0.attn_scale": torch.arange(24).float() / 7,
        "small.weight": ((i % 5) * 0.1).reshape(-1).float(),
        "step": torch.tensor(20_000),
        "mask": torch.tensor([[True, False, True]]),
    }


def tiny_state() -> dict[str, Tensor]:
    """Every stream, in as few bytes as can be."""
    return {
        "a": torch.tensor([[0.7, -0.1, 0.0], [0.02, 3.0, -0.5]]),
        "b": torch.tensor([-2.0, 0.0, 1.0, 4.0, -7.0], dtype=torch.bfloat16),
        "c": torch.tensor([0.1, -2.5]),
        "d": torch.tensor(1 / 3),
        "e": torch.tensor([True, False, True]),
        "f": torch.tensor([[-1], [2**40]]),
    }


def tiny_file(state: dict[str, Tensor] | None = None) -> bytes:
    state = state or tiny_state()
    rows = {row.name: row for row in make_plan(state, ExportOptions())}
    rows |= {"a": replace(rows["a"], codec="int", bits=8, axis="col"), "b": replace(rows["b"], codec="int", bits=4),
             "d": replace(rows["d"], codec="f32", bits=32)}
    return encode_plan(state, {"m": 1}, tuple(rows.values()), 0.0)[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8)) for k in a)


def reconstruction(state: dict[str, Tensor], options: ExportOptions) -> dict[str, Tensor]:
    """What the encoder measures its error against."""
    plan = make_plan(state, options)
    return {row.name: export.restore(row, export.store(row, state[row.name], options.scale_floor)) for row in plan}


def fingerprint(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        t = state[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sealed(data: bytes | bytearray) -> bytes:
    """The same file with its length and checksum set right."""
    body = bytearray(data[:-8])
    if len(body) >= 12:
        body[8:12] = struct.pack("<I", len(body) + 8)
    return bytes(body) + hashlib.blake2b(body, digest_size=8).digest()


# A second writer, from the format's table alone: plain struct, every stream stored.

ROW = {"name": b"w", "dtype": 0, "codec": 0, "bits": 8, "ndim": 2, "axis": 0, "dims": (2, 3)}


def packed_row(**fields: Any) -> bytes:
    row = {**ROW, **fields}
    kinds = struct.pack("5B", row["dtype"], row["codec"], row["bits"], row["ndim"], row["axis"])
    return bytes([len(row["name"])]) + row["name"] + kinds + struct.pack(f"<{len(row['dims'])}I", *row["dims"])


def packed_header(
    rows: list[bytes], lengths: list[int], *, meta: bytes = b"{}", floor: float = 0.0, methods: list[int] | None = None
) -> bytes:
    table = b"".join(struct.pack("<BI", m, n) for m, n in zip(methods or [0] * len(lengths), lengths, strict=True))
    return struct.pack("<I", len(meta)) + meta + struct.pack("<fH", floor, len(rows)) + b"".join(rows) + table


def deflated(raw: bytes, level: int = 9) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(raw) + packer.flush()


def packed_file(header: bytes, streams: bytes = b"") -> bytes:
    coded = deflated(header, level=0)       # deflate's stored blocks: the same length under any zlib
    fixed = struct.pack("<4sB3sIII", b"ANLM", 1, bytes(3), 0, len(header), len(coded))
    return sealed(fixed + coded + streams + bytes(8))


def one_matrix(codes: bytes = bytes([1, 2, 3, 255, 254, 127]), scales: bytes = bytes([0, 0, 0x3C, 0x38]),
               method: int = 0, **fields: Any) -> bytes:
    """A (2, 3) int matrix of rows x 1.0 and x 0.5, unless told otherwise."""
    lengths = [len(codes), len(scales), 0, 0, 0]
    return packed_file(packed_header([packed_row(**fields)], lengths, methods=[method, 0, 0, 0, 0]), codes + scales)


def fault_of(data: bytes) -> tuple[str, int | None, str, str]:
    with pytest.raises(ArtifactError) as caught:
        decode_artifact(data)
    return caught.value.field, caught.value.offset, str(caught.value.found), str(caught.value.expected)


# Golden file and second writer


def test_golden_file_is_read_as_ever() -> None:
    data = GOLDEN.read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    artifact, state = decode_artifact(data), golden_state()
    assert artifact.meta == META
    assert artifact.scale_floor == float(np.float32(1 / 127))
    assert [(r.name, r.shape, r.dtype, r.codec, r.bits, r.axis) for r in artifact.plan] == [
        ("blocks.0.attn_scale", (24,), "float32", "f32", 32, "row"),
        ("blocks.0.mlp.fc.weight", (257, 256), "float32", "int", 8, "row"),
        ("mask", (1, 3), "bool", "raw", 8, "row"),
        ("small.weight", (257,), "float32", "f16", 16, "row"),
        ("step", (), "int64", "raw", 64, "row"),
        ("tok_emb.weight", (256, 257), "bfloat16", "int", 8, "row"),
    ]
    # Rows peak at 1/4, 1/2, 1 and 2: the floor sets the step of the first three.
    rows = np.arange(257)[:, None] % 4
    step = np.float16(np.where(rows == 3, 2 / 127, 1 / 127)).astype(np.float32)
    codes = (state["blocks.0.mlp.fc.weight"].numpy() / step).round().clip(-127, 127)
    assert np.array_equal(artifact.state["blocks.0.mlp.fc.weight"].numpy(), codes * step)
    for name in ("blocks.0.attn_scale", "step", "mask"):
        assert torch.equal(artifact.state[name], state[name])
    assert torch.equal(artifact.state["small.weight"], state["small.weight"].half().float())
    assert artifact.state["tok_emb.weight"].dtype == torch.bfloat16
    error = artifact.state["tok_emb.weight"].float() - state["tok_emb.weight"].float()
    assert 1e-3 < float(error.abs().max()) < 1 / 254 + 2e-4     # half the floor's step, and what bf16 rounds off


def test_todays_writer_says_the_same_as_the_golden_file() -> None:
    data, _ = encode_artifact(golden_state(), META, ExportOptions())
    old, new = decode_artifact(GOLDEN.read_bytes()), decode_artifact(data)
    assert (old.meta, old.plan, old.scale_floor) == (new.meta, new.plan, new.scale_floor)
    assert same(old.state, new.state)


def test_a_file_written_from_the_specification_alone_is_read() -> None:
    artifact = decode_artifact(one_matrix())
    assert artifact.state["w"].tolist() == [[1.0, 2.0, 3.0], [-0.5, -1.0, 63.5]]
    by_column = one_matrix(scales=bytes([0, 0, 0, 0x3C, 0x38, 0x40]), axis=1)
    assert decode_artifact(by_column).state["w"].tolist() == [[1.0, 1.0, 6.0], [-1.0, -1.0, 254.0]]


# Round trip


def test_equal_states_give_equal_bytes_for_any_order_and_thread_count() -> None:
    state = {f"blocks.{i}.w": torch.randn(300, 311, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    state |= {"symmetric": torch.ones(300, 300), "skip_weights": torch.randn(2, 31), "gain": torch.randn(7)}
    options = ExportOptions(axis_mode="auto", scale_floor=0.0, weight_bits=6)
    files = set()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        names = list(state)
        random.Random(threads).shuffle(names)
        files.add(encode_artifact({name: state[name] for name in names}, dict(reversed(META.items())), options)[0])
        files.add(encode_artifact(state, META, options)[0])
    assert len(files) == 1


def test_a_fresh_process_with_an_empty_environment_reads_what_the_encoder_reconstructed(tmp_path: Path) -> None:
    state, options = golden_state(), ExportOptions(axis_mode="col", scale_floor=0.0, weight_bits=5)
    export.save_artifact(tmp_path / "model", state, META, options)
    encoder = reconstruction(state, options)
    code = ("import sys; sys.path.insert(0, 'tests'); import export, test_container as t\n"
            "print(t.fingerprint(export.load_artifact(sys.argv[1]).state))")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], cwd=ROOT, env={}, text=True,
                         capture_output=True, check=True)
    assert run.stdout.strip() == fingerprint(encoder)


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("axis_mode", ["row", "col", "auto"])
def test_load_equals_reconstruction_and_parts_sum_to_the_file(bits: int, axis_mode: str) -> None:
    state = golden_state() | {"lm_head.weight": torch.randn(101, 700), "vector": torch.randn(70_001),
                              "cube": torch.randn(5, 3, 7)}
    options = ExportOptions(axis_mode, 0.0, bits, 8)
    data, report = encode_artifact(state, META, options)
    artifact = decode_artifact(data)
    encoder = reconstruction(state, options)
    assert same(artifact.state, encoder)
    assert all(artifact.state[k].dtype == v.dtype and artifact.state[k].shape == v.shape for k, v in state.items())
    assert artifact.parts == report.parts
    assert sum(report.parts.values()) == report.total_bytes == len(data)


def test_an_empty_state_and_an_empty_meta_are_a_file() -> None:
    artifact = decode_artifact(encode_artifact({}, {}, ExportOptions())[0])
    assert (artifact.meta, artifact.plan, artifact.state) == ({}, (), {})


@pytest.mark.parametrize("sigma", [0.02, 0.3])
def test_smaller_than_the_baselines_pickle_under_zlib_9(sigma: float) -> None:
    state = {f"blocks.{i}.mlp.fc.weight": sigma * torch.randn(512, 256) for i in range(4)}
    state |= {"tok_emb.weight": sigma * torch.randn(1024, 128), "blocks.0.attn_scale": torch.randn(256)}
    payload: dict[str, Any] = {"codes": {}, "scales": {}, "rest": {"blocks.0.attn_scale": state["blocks.0.attn_scale"]}}
    for name, w in state.items():
        if w.ndim == 2:
            step = (w.abs().amax(1) / 127).clamp_min(1 / 127)
            payload["codes"][name], payload["scales"][name] = (w / step[:, None]).round().to(torch.int8), step.half()
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    theirs = len(zlib.compress(buffer.getvalue(), 9))
    ours = encode_artifact(state, META, ExportOptions())[1].total_bytes
    assert ours < theirs - 2_000, f"{ours} against {theirs} bytes"


@pytest.mark.parametrize(("bits", "most"), [(8, 1.007), (6, 1.009), (4, 1.016)])
def test_codes_cost_little_more_than_their_entropy(bits: int, most: float) -> None:
    state = {"w": torch.randn(512, 512, generator=torch.Generator().manual_seed(0))}
    data, _ = encode_artifact(state, {}, ExportOptions(scale_floor=0.0, weight_bits=bits))
    codes, _ = export.quantize(state["w"], bits, "row", 0.0)
    shares = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    entropy_bytes = -(shares * np.log2(shares)).sum() * codes.numel() / 8
    assert decode_artifact(data).parts["codes:w"] < most * entropy_bytes


# Damage


def test_truncation_at_every_byte_is_rejected_by_name() -> None:
    data = tiny_file()
    for size in range(len(data)):
        field, offset, found, _ = fault_of(data[:size])
        assert (field, offset) == (("magic", 0) if size < 4 else ("file", size)), size
        assert size < 4 or found == "its end"


def test_every_flipped_bit_is_rejected() -> None:
    data = tiny_file()
    assert len(data) < 350
    names = set()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        names.add(fault_of(bytes(damaged))[0])
    assert names == {"magic", "version", "reserved", "file", "checksum"}


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to three of: a byte changed, bytes removed, bytes doubled, a run of one value."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, kind, size = rng.randrange(len(out)), rng.randrange(8), rng.randint(1, 4)
        if kind == 0:
            del out[at:at + size]
        elif kind == 1:
            out[at:at] = out[at:at + size]
        elif kind == 2:
            out[at:at + size] = bytes([rng.choice((0, 1, 127, 128, 255))]) * len(out[at:at + size])
        elif kind < 6:
            out[at] = rng.randrange(256)
        else:
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def accepted(data: bytes) -> export.Artifact | None:
    """What is read, or None for an ArtifactError that has its place; anything else fails the test."""
    try:
        return decode_artifact(data)
    except ArtifactError as error:
        fault = error
    assert isinstance(fault.offset, int)
    assert str(fault).startswith(f"artifact: {fault.field} at byte {fault.offset}: found ")
    return None


def test_50_000_mutations_are_rejected_or_harmless() -> None:
    data, rng = tiny_file(), random.Random(1)
    original = decode_artifact(data).state
    for _ in range(50_000):
        artifact = accepted(mutated(rng, data))
        assert artifact is None or same(artifact.state, original)


@pytest.mark.parametrize("where", ["file", "header"])
def test_25_000_mutations_under_a_right_checksum_never_escape_the_parser(where: str) -> None:
    data, rng = tiny_file(), random.Random(2)
    header, start = export.unframe(data)
    streams, survivors = data[start:-8], 0
    for _ in range(25_000):
        damaged = sealed(mutated(rng, data)) if where == "file" else packed_file(mutated(rng, header), streams)
        artifact = accepted(damaged)
        if artifact is not None:
            survivors += 1
            assert [(k, tuple(v.shape), str(v.dtype)) for k, v in artifact.state.items()] == [
                (row.name, row.shape, f"torch.{row.dtype}") for row in artifact.plan]
            assert all(bool(v.isfinite().all()) for v in artifact.state.values())
            assert sum(artifact.parts.values()) == len(damaged)
    assert 0 < survivors < 20_000      # some land in weights and scales, which no parser can tell from others


# Malformed fields, one by one

FIXED_FAULTS = {
    "magic": (0, b"PK\x03\x04", ("magic", 0, "b'PK\\x03\\x04'", "b'ANLM'")),
    "version": (4, b"\x02", ("version", 4, "2", "1")),
    "reserved": (6, b"\x01", ("reserved", 5, "b'\\x00\\x01\\x00'", "b'\\x00\\x00\\x00'")),
    "raw 0": (12, b"\0", ("header_raw_bytes", 12, "0", "1..58824 for 57 coded bytes")),
    "raw bomb": (12, struct.pack("<I", 58_825), ("header_raw_bytes", 12, "58825", "1..58824 for 57 coded bytes")),
    "raw short": (12, bytes([51]), ("header", 20, "more bytes", "a deflate stream of 51 bytes")),
    "raw long": (12, bytes([53]), ("header", 20, "52 bytes", "a deflate stream of 53 bytes")),
    "coded 0": (16, b"\0", ("header_raw_bytes", 12, "52", "1..0 for 0 coded bytes")),
    "coded past the end": (16, bytes([68]), ("header_coded_bytes", 16, "68", "at most 67")),
    "coded long": (16, bytes([58]), ("header", 77, "1 bytes after the deflate stream", "none")),
    "coded short": (16, bytes([56]), ("header", 20, "51 bytes without an end", "a deflate stream of 52 bytes")),
    "deflate": (20, b"\xff", (
        "header", 20, "Error -3 while decompressing data: invalid block type", "a deflate stream of 52 bytes")),
}


@pytest.mark.parametrize("case", FIXED_FAULTS)
def test_malformed_frame_is_rejected(case: str) -> None:
    at, value, want = FIXED_FAULTS[case]
    data = one_matrix()
    assert fault_of(sealed(data[:at] + value + data[at + len(value):])) == want


def test_length_field_names_truncation_and_trailing_bytes() -> None:
    data = tiny_file()
    assert fault_of(data[:-1]) == ("file", len(data) - 1, "its end", f"{len(data)} bytes")
    assert fault_of(data + b"!!") == ("file", len(data), "2 more bytes", "its end")
    assert fault_of(b"ANLM") == ("file", 4, "its end", "at least 28 bytes")
    assert fault_of(b"") == ("magic", 0, "b''", "b'ANLM'")
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    assert fault_of(damaged) == ("checksum", len(data) - 8, damaged[-8:].hex(), data[-8:].hex())


TABLE = [6, 4, 0, 0, 0]     # lengths of the streams of one (2, 3) int matrix
HEADER_FAULTS: dict[str, tuple[bytes, tuple[str, int, str, str]]] = {
    "empty": (b"\0", ("header.meta_bytes", 0, "1 bytes left", "4 bytes")),
    "meta_bytes": (struct.pack("<I", 2**20 + 1), ("header.meta_bytes", 0, "1048577", "2..1048576")),
    "meta cut": (struct.pack("<I", 9) + b"{}", ("header.meta", 4, "2 bytes left", "9 bytes")),
    "meta list": (packed_header([], [0] * 4, meta=b"[]"), (
        "header.meta", 4, "a list", "a JSON object")),
    "meta spaces": (packed_header([], [0] * 4, meta=b"{ }"), ("header.meta", 4, "another spelling", "canonical JSON")),
    "meta twice": (packed_header([], [0] * 4, meta=b'{"a":1,"a":1}'), (
        "header.meta", 4, "another spelling", "canonical JSON")),
    "scale_floor nan": (packed_header([], [0] * 4, floor=float("nan")), ("header.scale_floor", 6, "nan", "0.0..1.0")),
    "scale_floor": (packed_header([], [0] * 4, floor=-1.0), ("header.scale_floor", 6, "-1.0", "0.0..1.0")),
    "rows cut": (packed_header([], [])[:-2], ("header.rows", 10, "0 bytes left", "2 bytes")),
    "rows": (packed_header([], [])[:-2] + b"\x01\x10", ("header.rows", 10, "4097", "0..4096")),
    "row missing": (packed_header([packed_row()], [])[:12], (
        "header.row[0].name_bytes", 12, "0 bytes left", "1 bytes")),
    "no name": (packed_header([packed_row(name=b"")], TABLE), ("header.row[0].name_bytes", 12, "0", "1..255")),
    "name": (packed_header([packed_row(name=b"a\x1b[2J")], TABLE), (
        "header.row[0].name", 13, "'a\\x1b[2J'", "printable ASCII")),
    "name not ASCII": (packed_header([packed_row(name=b"\xc3\xa9")], TABLE), (
        "header.row[0].name", 13, "'\\xc3\\xa9'", "printable ASCII")),
    "name twice": (packed_header([packed_row(), packed_row()], [6, *TABLE]), (
        "header.row[1].name", 28, "'w'", "a name after 'w'")),
    "names unsorted": (packed_header([packed_row(), packed_row(name=b"a")], [6, *TABLE]), (
        "header.row[1].name", 28, "'a'", "a name after 'w'")),
    "dtype": (packed_header([packed_row(dtype=10)], TABLE), ("header.row[0].dtype", 14, "10", "0..9")),
    "codec": (packed_header([packed_row(codec=3)], TABLE), ("header.row[0].codec", 15, "3", "0..2")),
    "codec of integers": (packed_header([packed_row(dtype=8)], TABLE), ("header.row[0].codec", 15, "0", "3")),
    "bits": (packed_header([packed_row(bits=9)], TABLE), ("header.row[0].bits", 16, "9", "2..8")),
    "bits of f16": (packed_header([packed_row(codec=1)], TABLE), ("header.row[0].bits", 16, "8", "16")),
    "bits of raw": (packed_header([packed_row(dtype=6, codec=3)], TABLE), ("header.row[0].bits", 16, "8", "16")),
    "ndim": (packed_header([packed_row(ndim=9)], TABLE), ("header.row[0].ndim", 17, "9", "0..8")),
    "axis": (packed_header([packed_row(axis=2)], TABLE), ("header.row[0].axis", 18, "2", "0..1")),
    "axis of a vector": (packed_header([packed_row(axis=1, ndim=1, dims=[6])], TABLE), (
        "header.row[0].axis", 18, "1", "0")),
    "dim": (packed_header([packed_row(dims=[2, 0])], TABLE), ("header.row[0].dims[1]", 23, "0", "1..1073741824")),
    "dims cut": (packed_header([packed_row(dims=[2])], []), ("header.row[0].dims[1]", 23, "0 bytes left", "4 bytes")),
    "product": (packed_header([packed_row(dims=[65_536, 65_536])], TABLE), (
        "bytes of all tensors", 27, str(4 * 2**32), "at most 1073741824")),
    "sum": (packed_header([packed_row(name=name, dims=[2**15, 2**12]) for name in (b"a", b"b", b"c")], [0] * 7), (
        "bytes of all tensors", 57, str(3 * 2**29), "at most 1073741824")),
    "method": (packed_header([packed_row()], TABLE, methods=[0, 2, 0, 0, 0]), (
        "header.table[scales].method", 32, "2", "0..1")),
    "table cut": (packed_header([packed_row()], TABLE)[:-1], (
        "header.table[raw].coded_bytes", 48, "3 bytes left", "4 bytes")),
    "trailing": (packed_header([packed_row()], TABLE) + b"xyz", ("header", 52, "3 bytes after its last field", "none")),
}


@pytest.mark.parametrize("case", HEADER_FAULTS)
def test_malformed_header_is_rejected(case: str) -> None:
    header, want = HEADER_FAULTS[case]
    assert fault_of(packed_file(header, bytes(10))) == want


@pytest.mark.parametrize("scales", [3, 5])
def test_streams_fill_the_file_exactly(scales: int) -> None:
    data = packed_file(packed_header([packed_row()], [6, scales, 0, 0, 0]), bytes(10))
    assert fault_of(data) == ("streams", 77, f"{6 + scales} bytes in the table", "10 up to the checksum")


NO_OBJECTS = {
    "deep": b"[" * 100_000 + b"]" * 100_000, "huge integer": b"9" * 900_000, "41 digits": b"1" * 41, "nan": b"NaN",
    "infinite": b"1e999", "minus infinity": b"-Infinity", "cut": b"[", "empty": b"", "not UTF-8": b'"\xff"',
}


@pytest.mark.parametrize("case", NO_OBJECTS)
def test_meta_that_is_no_plain_object_is_rejected(case: str) -> None:
    meta = b'{"a":' + NO_OBJECTS[case] + b"}"
    field, offset, _, expected = fault_of(packed_file(packed_header([], [0] * 4, meta=meta)))
    assert (field, offset, expected) == ("header.meta", 4, "a JSON object")


STREAM_FAULTS: dict[str, tuple[bytes, tuple[str, str, str]]] = {
    "stored short": (one_matrix(codes=bytes(5)), ("codes:w", "5 stored bytes", "6")),
    "stored long": (one_matrix(codes=bytes(7)), ("codes:w", "7 stored bytes", "6")),
    "code below": (one_matrix(codes=bytes([0] * 5 + [128])), ("codes:w", "-128..0", "-127..127")),
    "code above": (one_matrix(codes=bytes([0] * 5 + [8]), bits=4), ("codes:w", "0..8", "-7..7")),
    "deflated empty": (one_matrix(codes=b"", method=1), ("codes:w", "6 bytes in 0 deflated", "1..0")),
    "deflated noise": (one_matrix(codes=b"\xff\xff", method=1), (
        "codes:w", "Error -3 while decompressing data: invalid block type", "a deflate stream of 6 bytes")),
    "deflated long": (one_matrix(codes=deflated(bytes(7)), method=1), (
        "codes:w", "more bytes", "a deflate stream of 6 bytes")),
    "deflated short": (one_matrix(codes=deflated(bytes(5)), method=1), (
        "codes:w", "5 bytes", "a deflate stream of 6 bytes")),
    "deflated cut": (one_matrix(codes=deflated(b"abcdef")[:-1], method=1), (
        "codes:w", "6 bytes without an end", "a deflate stream of 6 bytes")),
    "scale zero": (one_matrix(scales=bytes(4)), ("scales of w", "0.0..0.0", "finite, above 0")),
    "scale negative": (one_matrix(scales=bytes([0, 0, 0x3C, 0xBC])), ("scales of w", "-1.0..1.0", "finite, above 0")),
    "scale infinite": (one_matrix(scales=bytes([0, 0, 0x3C, 0x7C])), ("scales of w", "1.0..inf", "finite, above 0")),
    "scale nan": (one_matrix(scales=bytes([0, 0, 0x3C, 0x7E])), ("scales of w", "nan..nan", "finite, above 0")),
    "weight overflow": (one_matrix(codes=bytes([127] * 6), scales=bytes([255, 255, 0x7B, 0x7B]), dtype=1), (
        "values of w", "one not finite", "finite values")),
}


@pytest.mark.parametrize("case", STREAM_FAULTS)
def test_malformed_stream_is_rejected(case: str) -> None:
    data, want = STREAM_FAULTS[case]
    field, offset, found, expected = fault_of(data)
    assert (field, found, expected) == want
    start = export.unframe(data)[1]
    assert offset == (len(data) - 12 if field.startswith("scales") else start)


def test_bytes_after_a_deflate_stream_are_rejected_where_they_are() -> None:
    coded = deflated(b"abcdef")
    data = one_matrix(codes=coded + b"##", method=1)
    offset = export.unframe(data)[1] + len(coded)
    assert fault_of(data) == ("codes:w", offset, "2 bytes after the deflate stream", "none")


def test_shared_streams_are_checked() -> None:
    f32 = packed_file(packed_header([packed_row(codec=2, bits=32, ndim=0, dims=[])], [0, 0, 4, 0]), b"\0\0\xc0\x7f")
    assert fault_of(f32)[0] == "values of w"
    flag = packed_file(packed_header([packed_row(dtype=9, codec=3, ndim=0, dims=[])], [0, 0, 0, 1]), b"\x02")
    assert fault_of(flag) == ("raw of w", len(flag) - 9, "2", "0 or 1")
    unused = packed_file(packed_header([packed_row()], [6, 4, 2, 0, 0]), bytes(6) + b"\0\0\x3c\x3c" + b"\0\0")
    assert fault_of(unused)[0] == "f16"
    assert fault_of(unused)[2:] == ("2 stored bytes", "0")
    empty_deflate = packed_file(packed_header([], [2, 0, 0, 0], methods=[1, 0, 0, 0]), deflated(b""))
    assert fault_of(empty_deflate)[2:] == ("0 bytes in 2 deflated", "1..2064")


@pytest.mark.parametrize("raw_bytes", [6, 50_000_000])
def test_bombs_are_refused_without_unfolding(raw_bytes: int) -> None:
    bomb = deflated(bytes(60_000_000))              # 58 KB
    dims = [2, raw_bytes // 2]
    rows, lengths = [packed_row(dims=dims)], [len(bomb), 4, 0, 0, 0]
    data = packed_file(packed_header(rows, lengths, methods=[1, 0, 0, 0, 0]), bomb + bytes(4))
    tracemalloc.start()
    assert fault_of(data)[:3:2] == ("codes:w", "more bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * raw_bytes + 1_000_000
    header = packed_header([packed_row(dims=[2, 2**26])], [4, 4, 0, 0, 0], methods=[1, 0, 0, 0, 0])
    absurd = packed_file(header, bytes(8))
    assert fault_of(absurd)[2:] == (f"{2**27} bytes in 4 deflated", "1..4128")


# What the writer refuses


def refusal(state: dict[str, Tensor], meta: Any = None) -> str:
    with pytest.raises(ArtifactError) as caught:
        encode_artifact(state, {} if meta is None else meta, ExportOptions(scale_floor=0.0))
    return str(caught.value)


def big(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((257, 256), value, dtype=dtype)


WRITER_FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "nan": ({"w": torch.tensor([0.0, float("nan")])},
            "tensor w: found a value that is not finite, expected finite values"),
    "inf": ({"w": big(float("inf"))}, "tensor w: found a value that is not finite, expected finite values"),
    "fp16 overflow": ({"w": torch.tensor([7e4])}, "tensor w: found magnitudes up to 70000, expected what f16 can hold"),
    "scale overflow": ({"w": big(1e7)}, "tensor w: found magnitudes up to 1e+07, expected what int can hold"),
    "fp32 overflow": ({"q_gain": torch.tensor([1e300], dtype=torch.float64)},
                      "tensor q_gain: found magnitudes up to 1e+300, expected what f32 can hold"),
    "restored overflow": ({"w": big(65504, torch.float16)},
                          "tensor w: found magnitudes up to 65504, expected what int can hold"),
    "empty tensor": ({"w": torch.zeros(3, 0)}, "tensor w: found shape (3, 0), expected at most 8 dims, none of them 0"),
    "nine dims": ({"w": torch.zeros([1] * 9)},
                  f"tensor w: found shape {(1,) * 9}, expected at most 8 dims, none of them 0"),
    "no name": ({"": torch.zeros(1)}, "tensor '': found 0 characters, expected a name of 1..255 printable ASCII ones"),
    "name": ({"\u00e9": torch.zeros(1)},
             "tensor '\\xe9': found 1 characters, expected a name of 1..255 printable ASCII ones"),
}


@pytest.mark.parametrize("case", WRITER_FAULTS)
def test_writer_refuses_what_the_format_cannot_hold(case: str) -> None:
    state, want = WRITER_FAULTS[case]
    assert refusal(state) == f"artifact: {want}"


def test_writer_refuses_foreign_tensors_and_meta() -> None:
    assert "found complex64" in refusal({"w": torch.zeros(1, dtype=torch.complex64)})
    assert "found float32 torch.sparse_coo" in refusal({"w": torch.eye(3).to_sparse()})
    for meta in ({"a": float("nan")}, {"a": object()}, {"a": {1: 0, "b": 0}}):
        assert refusal({}, meta).startswith("artifact: meta: found ")
    assert refusal({}, {"a": "x" * 2**20}).startswith("artifact: header_raw_bytes: found ")


def test_writer_refuses_more_than_a_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_RAW_BYTES", 2**18)
    encode_artifact({"w": torch.zeros(2**16)}, {}, ExportOptions())
    many = {str(i): torch.zeros(1) for i in range(4097)}
    assert refusal(many) == "artifact: state: found 4097 tensors, expected at most 4096"
    want = "artifact: bytes of all tensors: found 262148, expected at most 262144"
    assert refusal({"v": torch.zeros(()), "w": torch.zeros(2**16)}) == want


def test_inspect_json_of_the_golden_file_sums_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["inspect", str(GOLDEN), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["parts"].values()) == report["total_bytes"] == GOLDEN.stat().st_size
    assert [row["name"] for row in report["plan"]] == sorted(golden_state())
