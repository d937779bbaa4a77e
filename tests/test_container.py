"""The file format: what export.py writes, any process reads back bit for bit, and nothing else gets through.

Guarantees: the golden file of version 2 stays readable; equal states give equal bytes; a load equals the encoder's own
reconstruction and what a slow plain reader makes of the same bytes, for every axis, layout, radix, kept part and form of
correction; every truncation, flipped bit, mutation, bomb and malformed field is an ArtifactError that names its place,
in bounded memory. Run: python -m pytest tests/test_container.py (about 30 s on one core).
"""
from __future__ import annotations

import hashlib
import io
import json
import math
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import export
from export import ArtifactError, Choice, Export, ExportOptions, PlanRow, Stored, decode_artifact, encode_artifact

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden_v2.anlm"
GOLDEN_SHA256 = "e51c1733738a6d9bd6d24e3e088e00442c52a76fc4bb21aaa76288aa50e5beab"
GOLDEN_FINGERPRINT = "4d2c3c4abb02317ba7bbef693385f5af58f9602d94e0646e21cb3f62eea0c029"
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


def hand_made(name: str, shape: tuple[int, ...], codes: Sequence[int], *, axis: str = "row", dtype: str = "float32",
              kept: str = "none", kept_count: int = 0, rank: int = 0, factors: str = "f16") -> Stored:
    """An int tensor of these codes; all its other values are noise that is the same in every Python."""
    row, rng = PlanRow(name, shape, dtype, "int", axis, "rows", kept, kept_count, rank, factors), random.Random(name)
    values = {"codes": np.array(codes, np.int8)}
    for kind, n in row.counts.items():
        if kind == "index":
            most = {"rows": shape[0], "cols": shape[-1], "entries": row.numel}[kept]
            values[kind] = np.array(sorted(sorted(range(most), key=lambda _: rng.random())[:n]), np.uint32)
        elif kind == "factors":
            values[kind] = np.array([int(256 * rng.random()) for _ in range(n)], np.uint8)
        elif kind != "codes":
            low = 0.01 if kind == "scales" else -1.0
            values[kind] = np.array([low + (1 - low) * rng.random() for _ in range(n)], np.float16)
    return Stored(row, values)


def noise(name: str, n: int, limit: int) -> list[int]:
    """Codes of -limit..limit, both ends among them."""
    rng = random.Random(name)
    return [limit, -limit, *(int((2 * limit + 1) * rng.random()) - limit for _ in range(n))][:n]


def features() -> dict[str, Stored]:
    """Each axis, kept part and form of a correction, some of them together, and codes of many sizes."""
    made = [
        hand_made("both", (9, 8), noise("both", 72, 1), axis="both", kept="entries", kept_count=5, rank=1, factors="f16"),
        hand_made("col", (8, 9), noise("col", 72, 3), axis="col", kept="rows", kept_count=2, rank=2, factors="int8",
                  dtype="bfloat16"),
        hand_made("lqer", (5, 33), noise("lqer", 165, 60), kept="cols", kept_count=3, rank=2, factors="lqer",
                  dtype="float16"),
    ]
    return {stored.row.name: stored for stored in made}


FORMS = {"both": ("rows_by_scale", 2), "col": ("cols_by_scale", 4), "lqer": ("cols", 1), "a": ("rows", 0),
         "b": ("rows", 8)}      # layout and method of their codes, whatever would be smallest


def assembled(tensors: dict[str, Stored], meta: dict[str, Any] | None = None,
              forms: dict[str, tuple[str, int]] = FORMS) -> Export:
    """The file of hand-made tensors."""
    tensors, choose = dict(sorted(tensors.items())), export.pack_codes
    state = {name: export.restore(stored.row, stored.values) for name, stored in tensors.items()}

    def pack_codes(stored: Stored) -> tuple[str, int, bytes]:
        if stored.row.name not in forms:
            return choose(stored)
        layout, method = forms[stored.row.name]
        codes = export.arranged(stored.row, layout, stored.values["codes"], stored.values["scales"])
        raw = codes.tobytes() if method < 2 else digits_in_base(codes.tolist(), method - 1)
        return layout, method, deflated(raw) if method else raw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "pack_codes", pack_codes)
        return export.assembled(state, meta or {}, ExportOptions(int8_scale_floor=0.0), tensors)


def tiny_file() -> bytes:
    """Every stream of plain tensors."""
    options = ExportOptions(int8_scale_floor=0.0)
    choices = {"a": Choice("int", "col", 127), "b": Choice("int", "row", 7), "d": Choice("f32")}
    return assembled({
        name: export.store(name, t, choices.get(name, export.uniform_choice(name, t, options)), options)
        for name, t in tiny_state().items()}, {"m": 1}).data


def rich_file() -> bytes:
    """Every feature of int matrices."""
    return assembled(features(), {"m": 1}).data


TINY_FILES = {"plain": tiny_file, "rich": rich_file}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8)) for k in a)


def reconstruction(state: dict[str, Tensor], options: ExportOptions) -> dict[str, Tensor]:
    """What the encoder measures its error against."""
    stored = [export.store(name, w, export.uniform_choice(name, w, options), options) for name, w in sorted(state.items())]
    return {s.row.name: export.restore(s.row, s.values) for s in stored}


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


# A second writer and a second reader, from the docstring of export.py alone: plain struct and zlib, one value at a time.

ROW = {"name": b"w", "dtype": 0, "codec": 0, "axis": 0, "layout": 0, "kept": 0, "rank": 0, "factors": 0, "kept_count": 0,
       "dims": (2, 3)}
SHARED = {"scales": "e", "f16": "e", "f32": "f", "raw": "B", "factors": "B", "index": "I"}


def packed_row(**fields: Any) -> bytes:
    row = {"ndim": len(fields.get("dims", ROW["dims"])), **ROW, **fields}
    kinds = struct.pack("7B", *(row[k] for k in ("dtype", "codec", "axis", "layout", "kept", "rank", "factors")))
    end = struct.pack(f"<IB{len(row['dims'])}I", row["kept_count"], row["ndim"], *row["dims"])
    return bytes([len(row["name"])]) + row["name"] + kinds + end


def packed_header(rows: list[bytes], lengths: list[int], *, meta: bytes = b"{}", methods: list[int] | None = None) -> bytes:
    table = b"".join(struct.pack("<BI", m, n) for m, n in zip(methods or [0] * len(lengths), lengths, strict=True))
    return struct.pack("<I", len(meta)) + meta + struct.pack("<H", len(rows)) + b"".join(rows) + table


def deflated(raw: bytes, level: int = 9) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(raw) + packer.flush()


def packed_file(header: bytes, streams: bytes = b"") -> bytes:
    coded = deflated(header, level=0)       # deflate's stored blocks: the same length under any zlib
    fixed = struct.pack("<4sB3sIII", b"ANLM", 2, bytes(3), 0, len(header), len(coded))
    return sealed(fixed + coded + streams + bytes(8))


def planes(fmt: str, values: Sequence[float]) -> bytes:
    """All first bytes, then all second bytes, and so on."""
    packed = [struct.pack(f"<{fmt}", value) for value in values]
    return b"".join(bytes(column) for column in zip(*packed, strict=True))


def one_matrix(codes: bytes = bytes([1, 2, 3, 255, 254, 127]), scales: Sequence[float] = (1.0, 0.5), method: int = 0, *,
               f16: Sequence[float] = (), packed: Sequence[int] = (), index: Sequence[int] = (), **fields: Any) -> bytes:
    """A (2, 3) int matrix of rows x 1.0 and x 0.5, unless told otherwise."""
    streams = [codes, planes("e", scales), planes("e", f16), b"", b"", bytes(packed), planes("I", index)]
    header = packed_header([packed_row(**fields)], list(map(len, streams)), methods=[method, 0, 0, 0, 0, 0, 0])
    return packed_file(header, b"".join(streams))


def digits_in_base(codes: Sequence[int], m: int) -> bytes:
    """Digits code + m in base 2m + 1, as many as fit a byte, first digit lowest, zero digits at the end."""
    base, out = 2 * m + 1, []
    per = max(n for n in range(1, 9) if base**n <= 256)
    for start in range(0, len(codes), per):
        out.append(sum((code + m) * base**k for k, code in enumerate(codes[start:start + per])))
    return bytes(out)


def plain_read(data: bytes) -> dict[str, Tensor]:
    """The tensors of a sound file."""
    header_bytes, = struct.unpack_from("<I", data, 16)
    header, at = zlib.decompress(data[20:20 + header_bytes], -15), 0

    def take(fmt: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(f"<{fmt}")
        return struct.unpack_from(f"<{fmt}", header, at - struct.calcsize(f"<{fmt}"))

    take(f"{take('I')[0]}s")
    rows = []
    for _ in range(take("H")[0]):
        name, = take(f"{take('B')[0]}s")
        fields = zip(("dtype", "codec", "axis", "layout", "kept", "rank", "factors", "kept_count"), take("7BI"), strict=True)
        rows.append({"name": name.decode(), **dict(fields), "dims": take(f"{take('B')[0]}I")})
    formats = {f"codes:{row['name']}": "b" for row in rows if row["codec"] == 0} | SHARED
    streams, start = {}, 20 + header_bytes
    for stream, fmt in formats.items():
        method, size = take("BI")
        body = data[start:start + size]
        raw, size, start = zlib.decompress(body, -15) if method else body, struct.calcsize(fmt), start + size
        n = len(raw) // size
        streams[stream] = [struct.unpack(f"<{fmt}", bytes(raw[i::n]))[0] for i in range(n)]
        if method > 1:
            base = 2 * (method - 1) + 1
            per = max(n for n in range(1, 9) if base**n <= 256)
            streams[stream] = [byte // base**k % base - (method - 1) for byte in raw for k in range(per)]
    assert (at, start) == (len(header), len(data) - 8)
    dtypes = ("float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
    state = {}
    for row in rows:
        dtype, numel = getattr(torch, dtypes[row["dtype"]]), int(np.prod(row["dims"]))

        def own(kind: str, n: int) -> list[Any]:
            taken, streams[kind] = streams[kind][:n], streams[kind][n:]
            return taken

        if row["codec"] == 3:
            raw = bytes(own("raw", numel * torch.empty((), dtype=dtype).element_size()))
            state[row["name"]] = torch.frombuffer(bytearray(raw), dtype=dtype).view(row["dims"])
        else:
            values = (plain_int(row, streams[f"codes:{row['name']}"][:numel], own) if row["codec"] == 0
                      else own(("", "f16", "f32")[row["codec"]], numel))
            state[row["name"]] = torch.tensor(np.array(values, np.float32)).view(row["dims"]).to(dtype)
    assert not any(streams[kind] for kind in SHARED)
    return state


def plain_int(row: dict[str, Any], codes: list[int], own: Any) -> list[Any]:
    """The values of an int tensor in fp32, each operation rounded by itself."""
    f32 = np.float32
    if len(row["dims"]) != 2:
        scale, = own("scales", 1)
        return [f32(code) * f32(scale) for code in codes]
    rows, cols = row["dims"]
    by_row = own("scales", rows) if row["axis"] in (0, 2) else []
    by_col = own("scales", cols) if row["axis"] in (1, 2) else []
    row_order = sorted(range(rows), key=lambda i: by_row[i]) if row["layout"] == 2 else range(rows)
    col_order = sorted(range(cols), key=lambda j: by_col[j]) if row["layout"] == 3 else range(cols)
    places = [(i, j) for i in row_order for j in range(cols)] if row["layout"] in (0, 2) else [
        (i, j) for j in col_order for i in range(rows)]
    w = {}
    for (i, j), code in zip(places, codes, strict=True):
        w[i, j] = f32(code)
        w[i, j] = w[i, j] * f32(by_row[i]) if by_row else w[i, j]
        w[i, j] = w[i, j] * f32(by_col[j]) if by_col else w[i, j]
    for a, b in plain_factors(row, own):
        for i, j in w:
            w[i, j] = w[i, j] + a[i] * b[j]
    width = (0, cols, rows, 1)[row["kept"]]
    for at in own("index", row["kept_count"]):
        for k, value in enumerate(own("f16", width)):
            w[((), (at, k), (k, at), divmod(at, cols))[row["kept"]]] = f32(value)
    return [w[i, j] for i in range(rows) for j in range(cols)]


def plain_factors(row: dict[str, Any], own: Any) -> list[tuple[list[Any], list[Any]]]:
    """(a, b) of each rank in fp32."""
    (rows, cols), rank, f32 = row["dims"], row["rank"], np.float32
    n_a, n_b = rank * rows, rank * cols

    def signed(value: int, bits: int) -> int:
        return value - 2**bits if value >= 2 ** (bits - 1) else value

    if rank == 0:
        return []
    if row["factors"] == 0:
        a, b = [f32(v) for v in own("f16", n_a)], [f32(v) for v in own("f16", n_b)]
    elif row["factors"] == 1:
        a_scale, b_scale = own("scales", rank), own("scales", rank)
        a = [f32(signed(v, 8)) * f32(a_scale[n // rows]) for n, v in enumerate(own("factors", n_a))]
        b = [f32(signed(v, 8)) * f32(b_scale[n // cols]) for n, v in enumerate(own("factors", n_b))]
    else:
        (a_scale,), b_scale = own("scales", 1), own("scales", (n_b + 63) // 64)
        a_codes = [signed(byte >> shift & 3, 2) for byte in own("factors", (n_a + 3) // 4) for shift in (0, 2, 4, 6)][:n_a]
        b_codes = [signed(byte >> shift & 15, 4) for byte in own("factors", (n_b + 1) // 2) for shift in (0, 4)][:n_b]
        a = [f32(v) * f32(a_scale) for v in a_codes]
        b = [f32(v) * f32(b_scale[n // 64]) for n, v in enumerate(b_codes)]
    return [(a[k * rows:(k + 1) * rows], b[k * cols:(k + 1) * cols]) for k in range(rank)]


def fault_of(data: bytes) -> tuple[str, int | None, str, str]:
    with pytest.raises(ArtifactError) as caught:
        decode_artifact(data)
    return caught.value.field, caught.value.offset, str(caught.value.found), str(caught.value.expected)


# Golden file, second writer, second reader


def golden_export() -> Export:
    """What the golden file was written from."""
    state, options = golden_state(), ExportOptions()
    tensors = {name: export.store(name, w, export.uniform_choice(name, w, options), options) for name, w in state.items()}
    return assembled(tensors | features(), META)


def test_golden_file_is_read_as_ever() -> None:
    data = GOLDEN.read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    artifact, state = decode_artifact(data), golden_state()
    assert artifact.meta == META
    assert artifact.plan == (
        PlanRow("blocks.0.attn_scale", (24,), "float32", "f32"),
        PlanRow("blocks.0.mlp.fc.weight", (257, 256), "float32", "int", "row", "cols"),
        PlanRow("both", (9, 8), "float32", "int", "both", "rows_by_scale", "entries", 5, 1, "f16"),
        PlanRow("col", (8, 9), "bfloat16", "int", "col", "cols_by_scale", "rows", 2, 2, "int8"),
        PlanRow("lqer", (5, 33), "float16", "int", "row", "cols", "cols", 3, 2, "lqer"),
        PlanRow("mask", (1, 3), "bool", "raw"),
        PlanRow("small.weight", (257,), "float32", "f16"),
        PlanRow("step", (), "int64", "raw"),
        PlanRow("tok_emb.weight", (256, 257), "bfloat16", "int"),
    )
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
    assert fingerprint(artifact.state) == GOLDEN_FINGERPRINT
    assert same(artifact.state, plain_read(data))


def test_todays_writer_says_the_same_as_the_golden_file() -> None:
    """But for the order of the codes, which the writer may choose better one day."""
    old, new = decode_artifact(GOLDEN.read_bytes()), decode_artifact(golden_export().data)
    assert old.meta == new.meta
    assert [replace(row, layout="rows") for row in old.plan] == [replace(row, layout="rows") for row in new.plan]
    assert same(old.state, new.state)
    for name, values in old.values.items():
        assert values.keys() == new.values[name].keys()
        assert all(np.array_equal(array, new.values[name][kind]) for kind, array in values.items())
    uniform = decode_artifact(encode_artifact(golden_state(), META, ExportOptions()).data)
    assert uniform.meta == META
    assert same(uniform.state, {name: t for name, t in old.state.items() if name in golden_state()})


AXIS_EXAMPLES = [
    (0, (1.0, 0.5), [[1.0, 2.0, 3.0], [-0.5, -1.0, 63.5]]),
    (1, (1.0, 0.5, 2.0), [[1.0, 1.0, 6.0], [-1.0, -1.0, 254.0]]),
    (2, (1.0, 0.5, 1.0, 0.5, 2.0), [[1.0, 1.0, 6.0], [-0.5, -0.5, 127.0]]),
]


@pytest.mark.parametrize(("axis", "scales", "want"), AXIS_EXAMPLES)
def test_a_file_written_from_the_specification_alone_is_read(axis: int, scales: tuple[float, ...], want: Any) -> None:
    data = one_matrix(scales=scales, axis=axis)
    assert decode_artifact(data).state["w"].tolist() == want
    assert plain_read(data)["w"].tolist() == want


# Codes 1..6 in the order of the stream; places[k] is the (row, column) of code k + 1.
LAYOUT_EXAMPLES: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "rows": ({}, [[1, 2, 3], [2, 2.5, 3]]),
    "columns": ({"layout": 1}, [[1, 3, 5], [1, 2, 3]]),
    "rows by scale": ({"layout": 2}, [[4, 5, 6], [0.5, 1, 1.5]]),
    "equal rows keep their order": ({"layout": 2, "scales": (1.0, 1.0)}, [[1, 2, 3], [4, 5, 6]]),
    "columns by scale": ({"layout": 3, "axis": 1, "scales": (2.0, 4.0, 1.0)}, [[6, 20, 1], [8, 24, 2]]),
    "equal columns keep their order": ({"layout": 3, "axis": 1, "scales": (2.0, 1.0, 2.0)}, [[6, 1, 10], [8, 2, 12]]),
    "columns under row scales": ({"layout": 1, "axis": 0, "scales": (4.0, 1.0)}, [[4, 12, 20], [2, 4, 6]]),
    "rows by scale of both": ({"layout": 2, "axis": 2, "scales": (2.0, 1.0, 1.0, 2.0, 4.0)}, [[8, 20, 48], [1, 4, 12]]),
    "columns by scale of both": ({"layout": 3, "axis": 2, "scales": (2.0, 1.0, 4.0, 1.0, 2.0)}, [[40, 2, 12], [24, 2, 8]]),
}


@pytest.mark.parametrize("case", LAYOUT_EXAMPLES)
def test_each_layout_by_hand(case: str) -> None:
    fields, want = LAYOUT_EXAMPLES[case]
    data = one_matrix(bytes(range(1, 7)), **fields)
    artifact = decode_artifact(data)
    assert artifact.state["w"].tolist() == want
    assert plain_read(data)["w"].tolist() == want
    scales = fields.get("scales", (1.0, 0.5))
    rows = np.array(scales[:2] if fields.get("axis", 0) != 1 else (1, 1))
    cols = np.array(scales[-3:] if fields.get("axis", 0) != 0 else (1, 1, 1))
    assert (artifact.values["w"]["codes"].reshape(2, 3) * rows[:, None] * cols).tolist() == want     # codes in row order


CORRECTION_EXAMPLES: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "a row": ({"kept": 1, "kept_count": 1, "index": [1], "f16": [7, 8, 9]}, [[1, 2, 3], [7, 8, 9]]),
    "all rows": ({"kept": 1, "kept_count": 2, "index": [0, 1], "f16": range(6)}, [[0, 1, 2], [3, 4, 5]]),
    "columns": ({"kept": 2, "kept_count": 2, "index": [0, 2], "f16": [7, 8, 9, -1]}, [[7, 2, 9], [8, -1, -1]]),
    "entries": ({"kept": 3, "kept_count": 3, "index": [1, 3, 5], "f16": [7, 8, 0]}, [[1, 7, 3], [8, -1, 0]]),
    "a rank of f16": ({"rank": 1, "f16": [1, 2, 8, 16, 32]}, [[9, 18, 35], [15.5, 31, 127.5]]),
    "two ranks": ({"rank": 2, "f16": [1, 0, 0, 1, 8, 8, 8, 16, 16, 16]}, [[9, 10, 11], [15.5, 15, 79.5]]),
    "a rank of int8": ({"rank": 1, "factors": 1, "scales": (1, 0.5, 2, 0.25), "packed": [1, 255, 4, 8, 252]},
                       [[3, 6, 1], [-2.5, -5, 65.5]]),
    # a: codes 1, -2 of two bits, scale 2; b: codes 7, -8, 1 of four bits, scale 0.5
    "a rank of lqer": ({"rank": 1, "factors": 2, "scales": (1, 0.5, 2, 0.5), "packed": [0b1001, 0x87, 0x01]},
                       [[8, -6, 4], [-14.5, 15, 61.5]]),
    "f16 factors lie before kept values": (
        {"rank": 1, "kept": 1, "kept_count": 1, "index": [0], "f16": [1, 2, 8, 16, 32, 5, 6, 7]},
        [[5, 6, 7], [15.5, 31, 127.5]]),
}


@pytest.mark.parametrize("case", CORRECTION_EXAMPLES)
def test_each_correction_by_hand(case: str) -> None:
    fields, want = CORRECTION_EXAMPLES[case]
    data = one_matrix(**fields)
    assert decode_artifact(data).state["w"].tolist() == want
    assert plain_read(data)["w"].tolist() == want


# Round trip


@pytest.mark.parametrize(("sigmas", "thread_counts"), [(0.0, (1, 2, 5)), (3.0, (1, 5))])
def test_equal_states_give_equal_bytes_for_any_order_and_thread_count(
    sigmas: float, thread_counts: tuple[int, ...]
) -> None:
    state = {f"blocks.{i}.w": torch.randn(300, 311, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    state |= {"symmetric": torch.ones(300, 300), "skip_weights": torch.randn(2, 31), "gain": torch.randn(7),
              "vector": torch.randn(70_001, generator=torch.Generator().manual_seed(9))}
    options = ExportOptions("auto", int8_scale_floor=0.0, int8_clip_sigmas=sigmas, weight_quantization_bits=6)
    files = set()
    for threads in thread_counts:
        torch.set_num_threads(threads)
        names = list(state)
        random.Random(threads).shuffle(names)
        shuffled = {name: state[name] for name in names}
        files.add(encode_artifact(shuffled, dict(reversed(META.items())), options).data)
        files.add(encode_artifact(state, META, options).data)
    assert len(files) == 1


def test_a_fresh_process_with_an_empty_environment_reads_what_the_encoder_reconstructed(tmp_path: Path) -> None:
    options = ExportOptions(int8_axis_mode="col", int8_scale_floor=0.0, weight_quantization_bits=5)
    state = golden_state()
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
    options = ExportOptions(axis_mode, 0.0, weight_quantization_bits=bits)
    export_, encoder = encode_artifact(state, META, options), reconstruction(state, options)
    data, report = export_.data, export_.report
    artifact = decode_artifact(data)
    assert same(artifact.state, encoder)
    assert same(encoder, {name: export.restore(s.row, s.values) for name, s in export_.tensors.items()})
    assert artifact.plan == tuple(s.row for s in export_.tensors.values())
    assert all(artifact.state[k].dtype == v.dtype and artifact.state[k].shape == v.shape for k, v in state.items())
    assert artifact.parts == report.parts
    assert sum(report.parts.values()) == report.total_bytes == len(data)


def test_an_empty_state_and_an_empty_meta_are_a_file() -> None:
    artifact = decode_artifact(encode_artifact({}, {}, ExportOptions()).data)
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
    ours = encode_artifact(state, META, ExportOptions()).report.total_bytes
    assert ours < theirs - 2_000, f"{ours} against {theirs} bytes"


@pytest.mark.parametrize(("bits", "most"), [(8, 1.007), (6, 1.009), (4, 1.016), (3, 1.016), (2, 1.2)])
def test_codes_cost_little_more_than_their_entropy(bits: int, most: float) -> None:
    state = {"w": torch.randn(512, 512, generator=torch.Generator().manual_seed(0))}
    options = ExportOptions(int8_scale_floor=0.0, weight_quantization_bits=bits)
    data = encode_artifact(state, {}, options).data
    codes, _ = export.quantize(state["w"], 2 ** (bits - 1) - 1, "row", options)
    shares = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    entropy_bytes = -(shares * np.log2(shares)).sum() * codes.numel() / 8
    assert decode_artifact(data).parts["codes:w"] < most * entropy_bytes


@pytest.mark.parametrize("axis", ["row", "col", "both"])
@pytest.mark.parametrize("layout", ["rows", "cols", "rows_by_scale", "cols_by_scale"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (13, 1), (7, 11)])
def test_every_layout_is_read_as_written(shape: tuple[int, int], layout: str, axis: str) -> None:
    stored = hand_made("w", shape, noise("w", shape[0] * shape[1], 127), axis=axis)
    stored.values["scales"][1::3] = stored.values["scales"][0]      # some are equal
    possible = export.layouts_of(stored.row)
    assert (layout in possible) == ((layout, axis) not in (("rows_by_scale", "col"), ("cols_by_scale", "row")))
    if layout in possible:
        written = assembled({"w": stored}, forms={"w": (layout, 0)})
        artifact = decode_artifact(written.data)
        assert artifact.plan[0].layout == layout
        assert np.array_equal(artifact.values["w"]["codes"], stored.values["codes"])
        assert same(artifact.state, written.state)
        assert same(artifact.state, plain_read(written.data))


@pytest.mark.parametrize("factors", ["none", "f16", "int8", "lqer"])
@pytest.mark.parametrize("kept", ["none", "rows", "cols", "entries"])
@pytest.mark.parametrize("axis", ["row", "col", "both"])
def test_every_combination_is_restored_as_the_plain_reader_does(axis: str, kept: str, factors: str) -> None:
    tensors = {}
    for shape, dtype, rank, count in (((1, 1), "float32", 1, 1), ((5, 23), "bfloat16", 3, 4), ((17, 6), "float64", 6, 5),
                                      ((9, 40), "float16", 9, 7)):
        name = f"w{shape}"
        tensors[name] = hand_made(
            name, shape, noise(name, shape[0] * shape[1], 127), axis=axis, dtype=dtype, kept=kept,
            kept_count=0 if kept == "none" else count, rank=0 if factors == "none" else rank,
            factors="f16" if factors == "none" else factors)
    written = assembled(tensors)
    artifact = decode_artifact(written.data)
    assert same(artifact.state, plain_read(written.data))
    assert same(artifact.state, written.state)
    for name, stored in tensors.items():
        assert artifact.values[name].keys() == stored.values.keys()
        assert all(np.array_equal(array, stored.values[kind]) for kind, array in artifact.values[name].items())


# Radix digits

RADIX = {1: (3, 5), 2: (5, 3), 3: (7, 2), 4: (9, 2), 5: (11, 2), 6: (13, 2), 7: (15, 2)}    # m -> (base, digits a byte)


@pytest.mark.parametrize("m", RADIX)
def test_radix_digits_equal_the_plain_ones(m: int) -> None:
    base, per = RADIX[m]
    assert base**per <= 256 < base ** (per + 1)
    for n in (*range(1, 2 * per + 2), 97):
        codes = noise(f"{m} {n}", n, m)
        digits = digits_in_base(codes, m)
        assert len(digits) == -(-n // per)
        assert export.to_digits(np.array(codes, np.int8), m).tobytes() == digits
        data = one_matrix(deflated(digits), (1.0,) * n, 1 + m, dims=(n, 1))
        assert decode_artifact(data).state["w"].view(-1).tolist() == codes
        assert plain_read(data)["w"].view(-1).tolist() == codes


def test_codes_may_stay_below_what_their_method_can_say() -> None:
    for method in range(1, 9):
        codes = [1, 0, -1, 1, 1, -1]
        raw = digits_in_base(codes, method - 1) if method > 1 else bytes(code & 255 for code in codes)
        data = one_matrix(deflated(raw), (1.0, 1.0), method)
        assert decode_artifact(data).state["w"].view(-1).tolist() == codes


@pytest.mark.parametrize("m", RADIX)
def test_the_writer_takes_digits_where_they_are_shorter(m: int) -> None:
    stored = hand_made("w", (40, 50), noise("w", 2000, m))
    written = assembled({"w": stored})
    table = export.parse_header(export.unframe(written.data)[0])[2]
    assert table[0][0] == 1 + m
    assert same(decode_artifact(written.data).state, written.state)
    assert same(written.state, plain_read(written.data))
    per = RADIX[m][1]
    assert written.report.parts["codes:w"] <= 2000 / per + 30


@pytest.mark.parametrize("m", RADIX)
def test_bad_digits_are_refused(m: int) -> None:
    base, per = RADIX[m]
    most, codes = base**per - 1, noise("w", 2 * per + 1, m)
    good = digits_in_base(codes, m)
    for body, largest in (
        (bytes([most + 1]) + good[1:], most + 1),                       # a digit that the base has not
        (b"\xff" + good[1:], 255),
        (good[:2] + bytes([good[2] + base]), None),                     # after the last code a digit that is not zero
        (good[:2] + bytes([good[2] + base ** (per - 1)]), None),
    ):
        data = one_matrix(deflated(body), (1.0,), 1 + m, dims=(1, 2 * per + 1))
        found = f"bytes up to {largest or max(body)}, or digits after the last code"
        assert fault_of(data) == ("codes:w", export.unframe(data)[1], found, f"at most {most}, zeros")
    for body, found in ((good[:2], "2 bytes"), (good + b"\0", "more bytes")):
        data = one_matrix(deflated(body), (1.0,), 1 + m, dims=(1, 2 * per + 1))
        assert fault_of(data) == ("codes:w", export.unframe(data)[1], found, "a deflate stream of 3 bytes")


# Damage


def test_the_damaged_files_have_every_feature() -> None:
    files = [make() for make in TINY_FILES.values()]
    plain, rich = map(decode_artifact, files)
    methods = {method for data in files for method, _ in export.parse_header(export.unframe(data)[0])[2]}
    assert {row.codec for row in plain.plan} == {"int", "f16", "f32", "raw"}
    assert {row.axis for row in rich.plan} == {"row", "col", "both"}
    assert {row.layout for row in rich.plan} == {"cols", "rows_by_scale", "cols_by_scale"}
    assert {row.layout for row in plain.plan} == {"rows"}
    assert {row.kept for row in rich.plan} == {"rows", "cols", "entries"}
    assert {row.factors for row in rich.plan if row.rank} == {"f16", "int8", "lqer"}
    assert all(plain.parts[kind] or rich.parts[kind] for kind in SHARED)
    assert methods == {0, 1, 2, 4, 8}   # stored, deflated, and digits of three bases
    assert all(same(decode_artifact(data).state, plain_read(data)) for data in files)


@pytest.mark.parametrize("make", TINY_FILES)
def test_truncation_at_every_byte_is_rejected_by_name(make: str) -> None:
    data = TINY_FILES[make]()
    for size in range(len(data)):
        field, offset, found, _ = fault_of(data[:size])
        assert (field, offset) == (("magic", 0) if size < 4 else ("file", size)), size
        assert size < 4 or found == "its end"


@pytest.mark.parametrize("make", TINY_FILES)
def test_every_flipped_bit_is_rejected(make: str) -> None:
    data = TINY_FILES[make]()
    assert len(data) < 800
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
    files, rng = [make() for make in TINY_FILES.values()], random.Random(1)
    originals = [decode_artifact(data).state for data in files]
    for i in range(50_000):
        artifact = accepted(mutated(rng, files[i % 2]))
        assert artifact is None or same(artifact.state, originals[i % 2])


@pytest.mark.parametrize("where", ["file", "header"])
def test_10_000_mutations_under_a_right_checksum_never_escape_the_parser(where: str) -> None:
    files, rng = [make() for make in TINY_FILES.values()], random.Random(2)
    headers, survivors = [export.unframe(data) for data in files], [0, 0]
    for i in range(10_000):
        data, (header, start) = files[i % 2], headers[i % 2]
        damaged = sealed(mutated(rng, data)) if where == "file" else packed_file(mutated(rng, header), data[start:-8])
        artifact = accepted(damaged)
        if artifact is not None:
            survivors[i % 2] += 1
            assert [(k, tuple(v.shape), str(v.dtype)) for k, v in artifact.state.items()] == [
                (row.name, row.shape, f"torch.{row.dtype}") for row in artifact.plan]
            assert all(bool(v.isfinite().all()) for v in artifact.state.values())
            assert sum(artifact.parts.values()) == len(damaged)
            assert survivors[i % 2] % 100 or same(artifact.state, plain_read(damaged))
    # some land in weights and scales, which no parser can tell from others
    assert all(0 < n < 10_000 for n in survivors), survivors


# Malformed fields, one by one

FIXED_FAULTS = {
    "magic": (0, b"PK\x03\x04", ("magic", 0, "b'PK\\x03\\x04'", "b'ANLM'")),
    "version 1": (4, b"\x01", ("version", 4, "1", "2")),
    "version 3": (4, b"\x03", ("version", 4, "3", "2")),
    "reserved": (6, b"\x01", ("reserved", 5, "b'\\x00\\x01\\x00'", "b'\\x00\\x00\\x00'")),
    "raw 0": (12, b"\0", ("header_raw_bytes", 12, "0", "1..72240 for 70 coded bytes")),
    "raw bomb": (12, struct.pack("<I", 72_241), ("header_raw_bytes", 12, "72241", "1..72240 for 70 coded bytes")),
    "raw short": (12, bytes([64]), ("header", 20, "more bytes", "a deflate stream of 64 bytes")),
    "raw long": (12, bytes([66]), ("header", 20, "65 bytes", "a deflate stream of 66 bytes")),
    "coded 0": (16, b"\0", ("header_raw_bytes", 12, "65", "1..0 for 0 coded bytes")),
    "coded past the end": (16, bytes([81]), ("header_coded_bytes", 16, "81", "at most 80")),
    "coded long": (16, bytes([71]), ("header", 90, "1 bytes after the deflate stream", "none")),
    "coded short": (16, bytes([69]), ("header", 20, "64 bytes without an end", "a deflate stream of 65 bytes")),
    "deflate": (20, b"\xff", (
        "header", 20, "Error -3 while decompressing data: invalid block type", "a deflate stream of 65 bytes")),
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


def test_a_file_of_version_1_is_refused_in_plain_words() -> None:
    """Its frame is the same, so the message is about the version and nothing behind it."""
    fixed = struct.pack("<4sB3sIII", b"ANLM", 1, bytes(3), 0, 1, 1)
    for data in (sealed(fixed + bytes(10)), fixed + bytes(10)):
        with pytest.raises(ArtifactError) as caught:
            decode_artifact(data)
        assert str(caught.value) == "artifact: version at byte 4: found 1, expected 2"


TABLE, NONE = [6, 4, 0, 0, 0, 0, 0], [0] * 6     # lengths of the streams of one (2, 3) int matrix, and of no tensor
SQUARE = (40, 40)


def faulty_row(field: str, offset: int, found: object, expected: str, **fields: Any
               ) -> tuple[bytes, tuple[str, int, str, str]]:
    """A header of one row with a malformed field; without faults it would be the header of one (2, 3) int matrix."""
    return packed_header([packed_row(**fields)], TABLE), (f"header.row[0].{field}", offset, str(found), expected)


VECTOR = {"dims": [6]}
FLOAT = {"codec": 1}
GRID = {"codec": 4}         # whose rank byte holds log2 of the states
HEADER_FAULTS: dict[str, tuple[bytes, tuple[str, int, str, str]]] = {
    "empty": (b"\0", ("header.meta_bytes", 0, "1 bytes left", "4 bytes")),
    "meta_bytes": (struct.pack("<I", 2**20 + 1), ("header.meta_bytes", 0, "1048577", "2..1048576")),
    "meta cut": (struct.pack("<I", 9) + b"{}", ("header.meta", 4, "2 bytes left", "9 bytes")),
    "meta list": (packed_header([], NONE, meta=b"[]"), ("header.meta", 4, "a list", "a JSON object")),
    "meta spaces": (packed_header([], NONE, meta=b"{ }"), ("header.meta", 4, "another spelling", "canonical JSON")),
    "meta twice": (packed_header([], NONE, meta=b'{"a":1,"a":1}'), (
        "header.meta", 4, "another spelling", "canonical JSON")),
    "meta unsorted": (packed_header([], NONE, meta=b'{"b":1,"a":1}'), (
        "header.meta", 4, "another spelling", "canonical JSON")),
    "rows cut": (packed_header([], [])[:-2], ("header.rows", 6, "0 bytes left", "2 bytes")),
    "rows": (packed_header([], [])[:-2] + b"\x01\x10", ("header.rows", 6, "4097", "0..4096")),
    "row missing": (packed_header([packed_row()], [])[:8], ("header.row[0].name_bytes", 8, "0 bytes left", "1 bytes")),
    "no name": faulty_row("name_bytes", 8, 0, "1..255", name=b""),
    "name cut": (packed_header([packed_row()], [])[:9], ("header.row[0].name", 9, "0 bytes left", "1 bytes")),
    "name": faulty_row("name", 9, "'a\\x1b[2J'", "printable ASCII", name=b"a\x1b[2J"),
    "name not ASCII": faulty_row("name", 9, "'\\xc3\\xa9'", "printable ASCII", name=b"\xc3\xa9"),
    "name twice": (packed_header([packed_row(), packed_row()], [6, *TABLE]), (
        "header.row[1].name", 31, "'w'", "a name after 'w'")),
    "names unsorted": (packed_header([packed_row(), packed_row(name=b"a")], [6, *TABLE]), (
        "header.row[1].name", 31, "'a'", "a name after 'w'")),
    "dtype": faulty_row("dtype", 10, 10, "0..9", dtype=10),
    "codec": faulty_row("codec", 11, 5, "0..4", codec=5),
    "codec of floats": faulty_row("codec", 11, "raw", "int, f16, f32, grid", codec=3),
    "codec of integers on a grid": faulty_row("codec", 11, "grid", "raw", codec=4, dtype=8),
    "axis of a grid": faulty_row("axis", 12, "col", "row", axis=1, **GRID),
    "layout of a grid": faulty_row("layout", 13, "cols", "rows", layout=1, **GRID),
    "kept of a grid": faulty_row("kept", 14, "rows", "none", kept=1, kept_count=1, **GRID),
    "states of a grid": faulty_row("states", 15, 9, "0..8", rank=9, **GRID),
    "two states": faulty_row("states", 15, "2 for 2 dims", "0, 4..256 for 2 dims", rank=1, **GRID),
    "grid of a vector": faulty_row("states", 15, "0 for 1 dims", "0, 4..256 for 2 dims", **GRID, **VECTOR),
    "grid of a cube": faulty_row("states", 15, "8 for 3 dims", "0, 4..256 for 2 dims", rank=3, dims=[1, 2, 3], **GRID),
    "grid of a scalar": faulty_row("states", 15, "0 for 0 dims", "0, 4..256 for 2 dims", dims=[], **GRID),
    "factors of a grid": faulty_row("factors", 16, "int8", "f16", rank=2, factors=1, **GRID),
    "kept_count of a grid": faulty_row("kept_count", 17, 1, "0", rank=2, kept_count=1, **GRID),
    "codec of integers": faulty_row("codec", 11, "int", "raw", dtype=8),
    "axis": faulty_row("axis", 12, 3, "0..2", axis=3),
    "axis of a vector": faulty_row("axis", 12, "col", "row", axis=1, **VECTOR),
    "both axes of a vector": faulty_row("axis", 12, "both", "row", axis=2, **VECTOR),
    "axis of a cube": faulty_row("axis", 12, "col", "row", axis=1, dims=[1, 2, 3]),
    "axis of f16": faulty_row("axis", 12, "col", "row", axis=1, **FLOAT),
    "axis of raw": faulty_row("axis", 12, "both", "row", axis=2, dtype=6, codec=3),
    "layout": faulty_row("layout", 13, 4, "0..3", layout=4),
    "layout of a vector": faulty_row("layout", 13, "cols", "rows", layout=1, **VECTOR),
    "layout of f32": faulty_row("layout", 13, "rows_by_scale", "rows", layout=2, codec=2),
    "layout by no row scales": faulty_row("layout", 13, "rows_by_scale", "rows, cols, cols_by_scale", layout=2, axis=1),
    "layout by no column scales": faulty_row("layout", 13, "cols_by_scale", "rows, cols, rows_by_scale", layout=3),
    "kept": faulty_row("kept", 14, 4, "0..3", kept=4),
    "kept of a vector": faulty_row("kept", 14, "entries", "none", kept=3, kept_count=1, **VECTOR),
    "kept of a scalar": faulty_row("kept", 14, "entries", "none", kept=3, kept_count=1, dims=[]),
    "kept of f16": faulty_row("kept", 14, "rows", "none", kept=1, kept_count=1, **FLOAT),
    "rank": faulty_row("rank", 15, 33, "0..32", rank=33, dims=SQUARE),
    "rank above the rows": faulty_row("rank", 15, 3, "0..2", rank=3),
    "rank above the columns": faulty_row("rank", 15, 3, "0..2", rank=3, dims=[3, 2]),
    "rank of a vector": faulty_row("rank", 15, 1, "0", rank=1, **VECTOR),
    "rank of a cube": faulty_row("rank", 15, 1, "0", rank=1, dims=[1, 2, 3]),
    "rank of f16": faulty_row("rank", 15, 1, "0", rank=1, **FLOAT),
    "factors": faulty_row("factors", 16, 3, "0..2", rank=1, factors=3),
    "factors at rank 0": faulty_row("factors", 16, "int8", "f16", factors=1),
    "factors of a vector": faulty_row("factors", 16, "lqer", "f16", factors=2, **VECTOR),
    "kept_count of none": faulty_row("kept_count", 17, 1, "0", kept_count=1),
    "kept_count of f16": faulty_row("kept_count", 17, 2**32 - 1, "0", kept_count=2**32 - 1, **FLOAT),
    "no rows kept": faulty_row("kept_count", 17, 0, "1..2", kept=1),
    "too many rows kept": faulty_row("kept_count", 17, 3, "1..2", kept=1, kept_count=3),
    "no columns kept": faulty_row("kept_count", 17, 0, "1..3", kept=2),
    "too many columns kept": faulty_row("kept_count", 17, 4, "1..3", kept=2, kept_count=4),
    "no entries kept": faulty_row("kept_count", 17, 0, "1..6", kept=3),
    "too many entries kept": faulty_row("kept_count", 17, 7, "1..6", kept=3, kept_count=7),
    "too many of one kept": faulty_row("kept_count", 17, 2, "1", kept=3, kept_count=2, dims=[1, 1]),
    "ndim": faulty_row("ndim", 21, 9, "0..8", ndim=9),
    "dim": faulty_row("dims[1]", 26, 0, "1..1073741824", dims=[2, 0]),
    "dims cut": (packed_header([packed_row(dims=[2], ndim=2)], []), (
        "header.row[0].dims[1]", 26, "0 bytes left", "4 bytes")),
    "row cut": (packed_header([packed_row()], [])[:20], ("header.row[0].axis", 12, "8 bytes left", "9 bytes")),
    "product": (packed_header([packed_row(dims=[65_536, 65_536])], TABLE), (
        "bytes of all tensors", 30, str(4 * 2**32), "at most 1073741824")),
    "sum": (packed_header([packed_row(name=name, dims=[2**15, 2**12]) for name in (b"a", b"b", b"c")], [0] * 9), (
        "bytes of all tensors", 74, str(3 * 2**29), "at most 1073741824")),
    # 1 byte of code, 2 of value and 4 of index each: more than the 4 of the tensor that they restore
    "sum as stored": (packed_header([packed_row(kept=3, kept_count=10 * 2**24, dims=[2**14, 10 * 2**10])], TABLE), (
        "bytes of all tensors", 30, str(7 * 10 * 2**24 + 2 * 2**14), "at most 1073741824")),
    "method of codes": (packed_header([packed_row()], TABLE, methods=[9, 0, 0, 0, 0, 0, 0]), (
        "header.table[codes:w].method", 30, "9", "0..8")),
    **{f"method of {kind}": (packed_header([packed_row()], TABLE, methods=[2 * (i == k) for i in range(7)]), (
        f"header.table[{kind}].method", 30 + 5 * k, "2", "0..1")) for k, kind in enumerate(SHARED, 1)},
    "different states": (packed_header([packed_row(name=name, rank=rank, **GRID) for name, rank in ((b"a", 2), (b"b", 3))],
                                       [0] * 8), (
        "header.rows", 52, "trellises of [4, 8] states", "one for all matrices")),
    "states and none": (packed_header([packed_row(name=name, rank=rank, **GRID) for name, rank in ((b"a", 0), (b"b", 8))],
                                      [0] * 8), (
        "header.rows", 52, "trellises of [0, 256] states", "one for all matrices")),
    "sum on a grid": (packed_header([packed_row(dtype=1, dims=[2**14, 2**15], **GRID)], [0] * 8), (
        "bytes of all tensors", 30, str(2**31), "at most 1073741824")),
    "method of bases": (packed_header([packed_row(**GRID)], [0] * 8, methods=[0] * 6 + [2, 0]), (
        "header.table[bases].method", 60, "2", "0..1")),
    "method of positions": (packed_header([packed_row(**GRID)], [0] * 8, methods=[0] * 7 + [1]), (
        "header.table[positions].method", 65, "1", "0")),
    "table of a grid cut": (packed_header([packed_row(**GRID)], [0] * 7), (
        "header.table[positions].method", 65, "0 bytes left", "1 bytes")),
    "table cut": (packed_header([packed_row()], TABLE)[:-1], (
        "header.table[index].coded_bytes", 61, "3 bytes left", "4 bytes")),
    "trailing": (packed_header([packed_row()], TABLE) + b"xyz", ("header", 65, "3 bytes after its last field", "none")),
}


@pytest.mark.parametrize("case", HEADER_FAULTS)
def test_malformed_header_is_rejected(case: str) -> None:
    header, want = HEADER_FAULTS[case]
    assert fault_of(packed_file(header, bytes(10))) == want


@pytest.mark.parametrize("fields", [
    {"rank": 32, "dims": (32, 33)}, {"rank": 1, "factors": 2, "dims": (1, 1)}, {"kept": 1, "kept_count": 2},
    {"kept": 2, "kept_count": 3}, {"kept": 3, "kept_count": 6}, {"axis": 2, "layout": 2}, {"axis": 2, "layout": 3},
    {"axis": 1, "layout": 3}, {"layout": 2}, {"name": b" " * 255}, {"dims": (1,) * 8},
])
def test_the_largest_fields_are_no_faults(fields: dict[str, Any]) -> None:
    header = packed_header([packed_row(**fields)], [0] * 7)
    row = export.parse_header(header)[1][0]
    assert (row.rank, row.kept_count, len(row.name)) == (
        fields.get("rank", 0), fields.get("kept_count", 0), len(fields.get("name", b"w")))


@pytest.mark.parametrize("scales", [3, 5])
def test_streams_fill_the_file_exactly(scales: int) -> None:
    data = packed_file(packed_header([packed_row()], [6, scales, 0, 0, 0, 0, 0]), bytes(10))
    assert fault_of(data) == ("streams", 90, f"{6 + scales} bytes in the table", "10 up to the checksum")


NO_OBJECTS = {
    "deep": b"[" * 100_000 + b"]" * 100_000, "huge integer": b"9" * 900_000, "41 digits": b"1" * 41, "nan": b"NaN",
    "infinite": b"1e999", "minus infinity": b"-Infinity", "cut": b"[", "empty": b"", "not UTF-8": b'"\xff"',
}


@pytest.mark.parametrize("case", NO_OBJECTS)
def test_meta_that_is_no_plain_object_is_rejected(case: str) -> None:
    meta = b'{"a":' + NO_OBJECTS[case] + b"}"
    field, offset, _, expected = fault_of(packed_file(packed_header([], NONE, meta=meta)))
    assert (field, offset, expected) == ("header.meta", 4, "a JSON object")


STREAM_FAULTS: dict[str, tuple[bytes, tuple[str, str, str]]] = {
    "stored short": (one_matrix(codes=bytes(5)), ("codes:w", "5 stored bytes", "6")),
    "stored long": (one_matrix(codes=bytes(7)), ("codes:w", "7 stored bytes", "6")),
    "code below": (one_matrix(codes=bytes([0] * 5 + [128])), ("codes:w", "-128", "-127..127")),
    "deflated empty": (one_matrix(codes=b"", method=1), ("codes:w", "6 bytes in 0 deflated", "1..0")),
    "deflated noise": (one_matrix(codes=b"\xff\xff", method=1), (
        "codes:w", "Error -3 while decompressing data: invalid block type", "a deflate stream of 6 bytes")),
    "deflated long": (one_matrix(codes=deflated(bytes(7)), method=1), (
        "codes:w", "more bytes", "a deflate stream of 6 bytes")),
    "deflated short": (one_matrix(codes=deflated(bytes(5)), method=1), (
        "codes:w", "5 bytes", "a deflate stream of 6 bytes")),
    "deflated cut": (one_matrix(codes=deflated(b"abcdef")[:-1], method=1), (
        "codes:w", "6 bytes without an end", "a deflate stream of 6 bytes")),
    "scale zero": (one_matrix(scales=(0.0, 0.0)), ("scales of w", "0.0..0.0", "finite, above 0")),
    "scale negative": (one_matrix(scales=(1.0, -1.0)), ("scales of w", "-1.0..1.0", "finite, above 0")),
    "scale infinite": (one_matrix(scales=(1.0, math.inf)), ("scales of w", "1.0..inf", "finite, above 0")),
    "scale nan": (one_matrix(scales=(1.0, math.nan)), ("scales of w", "nan..nan", "finite, above 0")),
    "weight overflow": (one_matrix(codes=bytes([127] * 6), scales=(65504.0, 65504.0), dtype=1), (
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
    f32 = packed_file(packed_header([packed_row(codec=2, dims=[])], [0, 0, 4, 0, 0, 0]), b"\0\0\xc0\x7f")
    assert fault_of(f32)[0] == "values of w"
    f16 = packed_file(packed_header([packed_row(codec=1, dims=[])], [0, 2, 0, 0, 0, 0]), b"\0\x7c")
    assert fault_of(f16) == ("values of w", len(f16) - 10, "one not finite", "finite values")
    flag = packed_file(packed_header([packed_row(dtype=9, codec=3, dims=[])], [0, 0, 0, 1, 0, 0]), b"\x02")
    assert fault_of(flag) == ("raw of w", len(flag) - 9, "2", "0 or 1")
    unused = packed_file(packed_header([packed_row()], [6, 4, 2, 0, 0, 0, 0]), bytes(6) + b"\0\0\x3c\x3c" + b"\0\0")
    assert fault_of(unused)[0] == "f16"
    assert fault_of(unused)[2:] == ("2 stored bytes", "0")
    empty_deflate = packed_file(packed_header([], [2, 0, 0, 0, 0, 0], methods=[1, 0, 0, 0, 0, 0]), deflated(b""))
    assert fault_of(empty_deflate)[2:] == ("0 bytes in 2 deflated", "1..2064")


@pytest.mark.parametrize("raw_bytes", [6, 50_000_000])
def test_bombs_are_refused_without_unfolding(raw_bytes: int) -> None:
    bomb = deflated(bytes(60_000_000))              # 58 KB
    dims = [2, raw_bytes // 2]
    rows, lengths = [packed_row(dims=dims)], [len(bomb), 4, 0, 0, 0, 0, 0]
    data = packed_file(packed_header(rows, lengths, methods=[1, 0, 0, 0, 0, 0, 0]), bomb + bytes(4))
    tracemalloc.start()
    assert fault_of(data)[:3:2] == ("codes:w", "more bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * raw_bytes + 1_000_000
    header = packed_header([packed_row(dims=[2, 2**26])], [4, 4, 0, 0, 0, 0, 0], methods=[1, 0, 0, 0, 0, 0, 0])
    absurd = packed_file(header, bytes(8))
    assert fault_of(absurd)[2:] == (f"{2**27} bytes in 4 deflated", "1..4128")
    header = packed_header([packed_row(dims=[2, 2**26])], [4, 4, 0, 0, 0, 0, 0], methods=[2, 0, 0, 0, 0, 0, 0])
    assert fault_of(packed_file(header, bytes(8)))[2:] == (f"{-(-2**27 // 5)} bytes in 4 deflated", "1..4128")
    header = packed_header([packed_row(kept=3, kept_count=2**26, dims=[2, 2**26])], [0, 4, 0, 0, 0, 0, 4],
                           methods=[0, 0, 0, 0, 0, 0, 1])
    assert fault_of(packed_file(header, bytes(8)))[0] == "codes:w"


def test_sound_but_large_radix_streams_take_bounded_memory() -> None:
    """A few bytes a code for digits and their check."""
    n = 3_000_000
    data = one_matrix(deflated(bytes([121]) * -(-n // 5)), (1.0,), 2, dims=(1, n))
    tracemalloc.start()
    assert not decode_artifact(data).state["w"].any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * n


INDEX_FAULTS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "rows fall": ({"kept": 1, "kept_count": 2, "index": [1, 0], "f16": [0] * 6}, ("0..1", "ascending, below 2")),
    "a row twice": ({"kept": 1, "kept_count": 2, "index": [1, 1], "f16": [0] * 6}, ("1..1", "ascending, below 2")),
    "row 2 of 2": ({"kept": 1, "kept_count": 1, "index": [2], "f16": [0] * 3}, ("2..2", "ascending, below 2")),
    "columns fall": ({"kept": 2, "kept_count": 2, "index": [2, 1], "f16": [0] * 4}, ("1..2", "ascending, below 3")),
    "a column twice": ({"kept": 2, "kept_count": 2, "index": [0, 0], "f16": [0] * 4}, ("0..0", "ascending, below 3")),
    "column 3 of 3": ({"kept": 2, "kept_count": 2, "index": [0, 3], "f16": [0] * 4}, ("0..3", "ascending, below 3")),
    "entries fall": ({"kept": 3, "kept_count": 3, "index": [0, 5, 4], "f16": [0] * 3}, ("0..5", "ascending, below 6")),
    "an entry twice": ({"kept": 3, "kept_count": 2, "index": [5, 5], "f16": [0] * 2}, ("5..5", "ascending, below 6")),
    "entry 6 of 6": ({"kept": 3, "kept_count": 1, "index": [6], "f16": [0]}, ("6..6", "ascending, below 6")),
    "entry 2^32 - 1": ({"kept": 3, "kept_count": 2, "index": [0, 2**32 - 1], "f16": [0, 0]}, (
        f"0..{2**32 - 1}", "ascending, below 6")),
    "wrapped": ({"kept": 3, "kept_count": 2, "index": [2**32 - 1, 0], "f16": [0, 0]}, (
        f"0..{2**32 - 1}", "ascending, below 6")),
}


@pytest.mark.parametrize("case", INDEX_FAULTS)
def test_bad_index_is_rejected(case: str) -> None:
    fields, (found, expected) = INDEX_FAULTS[case]
    data = one_matrix(**fields)
    offset = len(data) - 8 - 4 * len(fields["index"])
    assert fault_of(data) == ("index of w", offset, found, expected)


CORRECTION_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "kept infinity": ({"kept": 3, "kept_count": 1, "index": [0], "f16": [math.inf]}, "values", "finite values"),
    "factor nan": ({"rank": 1, "f16": [math.nan, 0, 0, 0, 0]}, "values", "finite values"),
    "factor infinity under a kept row": (
        {"rank": 1, "f16": [math.inf, 0, 1, 1, 1, 5, 6, 7], "kept": 1, "kept_count": 1, "index": [0]}, "values",
        "finite values"),
    "factor nan under a kept column": (
        {"rank": 1, "f16": [0, 0, math.nan, 1, 1, 5, 6], "kept": 2, "kept_count": 1, "index": [0]}, "values",
        "finite values"),
    "overflow by a correction": (
        {"rank": 1, "f16": [60000, 0, 60000, 0, 0], "dtype": 1}, "values", "finite values"),
    "factor scale zero": ({"rank": 1, "factors": 1, "packed": [0] * 5, "scales": (1, 1, 0, 1)}, "scales",
                          "finite, above 0"),
    "factor scale nan": ({"rank": 1, "factors": 2, "packed": [0] * 3, "scales": (1, 1, math.nan, 1)}, "scales",
                         "finite, above 0"),
    "second column scale": ({"axis": 2, "scales": (1, 1, 1, -1, 1)}, "scales", "finite, above 0"),
}


@pytest.mark.parametrize("case", CORRECTION_FAULTS)
def test_bad_correction_values_are_rejected(case: str) -> None:
    fields, part, expected = CORRECTION_FAULTS[case]
    field, offset, _, want = fault_of(one_matrix(**fields))
    assert (field, want) == (f"{part} of w", expected)
    start = export.unframe(one_matrix(**fields))[1]
    assert offset == (start + 6 if part == "scales" else start)


@pytest.mark.parametrize(("fields", "want"), [
    ({"rank": 1, "f16": [0] * 4}, ("f16", "8 stored bytes", "10")),
    ({"rank": 1, "f16": [0] * 6}, ("f16", "12 stored bytes", "10")),
    ({"rank": 2, "factors": 1, "packed": [0] * 9, "scales": [1] * 6}, ("factors", "9 stored bytes", "10")),
    ({"rank": 2, "factors": 1, "packed": [0] * 10, "scales": [1] * 4}, ("scales", "8 stored bytes", "12")),
    ({"rank": 2, "factors": 2, "packed": [0] * 5, "scales": [1] * 4}, ("factors", "5 stored bytes", "4")),
    ({"rank": 2, "factors": 2, "packed": [0] * 4, "scales": [1] * 5}, ("scales", "10 stored bytes", "8")),
    ({"kept": 1, "kept_count": 1, "index": [0], "f16": [0] * 2}, ("f16", "4 stored bytes", "6")),
    ({"kept": 2, "kept_count": 1, "index": [0], "f16": [0] * 3}, ("f16", "6 stored bytes", "4")),
    ({"kept": 3, "kept_count": 1, "index": [0, 1], "f16": [0]}, ("index", "8 stored bytes", "4")),
    ({"kept": 3, "kept_count": 1, "f16": [0]}, ("index", "0 stored bytes", "4")),
    ({"axis": 2, "scales": [1] * 3}, ("scales", "6 stored bytes", "10")),
    ({"axis": 1, "scales": [1] * 2}, ("scales", "4 stored bytes", "6")),
])
def test_shared_streams_have_the_length_that_the_plan_says(fields: dict[str, Any], want: tuple[str, str, str]) -> None:
    field, _, found, expected = fault_of(one_matrix(**fields))
    assert (field, found, expected) == want


# What the writer refuses


def refusal(state: dict[str, Tensor], meta: Any = None) -> str:
    with pytest.raises(ArtifactError) as caught:
        encode_artifact(state, {} if meta is None else meta, ExportOptions(int8_scale_floor=0.0))
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


@pytest.mark.parametrize("meta", [{"a": 10**41}, {"a": {10: 0, 9: 0}}, {"a": "\ud800"}, {1: 0}, {"a": (1, 2)}])
def test_meta_that_is_written_is_read(meta: dict[str, Any]) -> None:
    """What a reader would refuse is refused before there is a file."""
    try:
        data = encode_artifact({}, meta, ExportOptions()).data
    except ArtifactError as fault:
        data, field = b"", fault.field
    assert decode_artifact(data).meta == json.loads(json.dumps(meta)) if data else field == "meta"


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
    plan = decode_artifact(GOLDEN.read_bytes()).plan
    assert [row["name"] for row in report["plan"]] == sorted(golden_state() | features())
    assert [{**row, "shape": tuple(row["shape"])} for row in report["plan"]] == [asdict(row) for row in plan]


def test_a_plan_that_is_not_the_states_is_a_bug() -> None:
    state, options = {"v": torch.ones(3), "w": torch.ones(2)}, ExportOptions()
    v, w = (export.store(name, t, Choice("f16"), options) for name, t in state.items())
    other = export.store("x", torch.ones(2), Choice("f16"), options)
    export.assembled(state, {}, options, {"v": v, "w": w})
    for wrong in ({}, {"v": v}, {"v": v, "w": w, "x": other}, {"w": w, "v": v}):
        with pytest.raises(AssertionError, match="exactly the state's tensors"):
            export.assembled(state, {}, options, wrong)
