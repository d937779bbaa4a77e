"""The byte ledger: every byte of an artifact has one owner, and each number agrees with a plain count of the same thing.

Guarantees: components, families and tensors sum exactly to the file; corrections, kept values and floats land in their own
component; entropies and errors equal slow plain ones; a file differs from itself by nothing; bad input gives one line, exit
code 2 and no output file. Run: python -m pytest tests/test_ledger.py (about 5 s on one core).
"""
from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import export  # noqa: E402
import ledger  # noqa: E402
import packing  # noqa: E402
from export import ExportOptions  # noqa: E402

FC, PROJ, SCALE = "blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight", "blocks.0.attn_scale"
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "small": {"int8_keep_float_max_numel": 16},
    "four_bits": {"int8_keep_float_max_numel": 16, "weight_quantization_bits": 4, "int8_scale_floor": 0.0},
    "columns": {"int8_keep_float_max_numel": 16, "int8_axis_mode": "col"},
    "f16_factors": {"int8_keep_float_max_numel": 16, "int8_residual_rank": 2, "int8_residual_storage": "f16"},
    "int8_factors": {"int8_keep_float_max_numel": 16, "int8_residual_rank": 1, "int8_residual_storage": "int8"},
    "lqer_factors": {"int8_keep_float_max_numel": 16, "int8_residual_rank": 1, "int8_residual_storage": "lqer"},
    "permuted": {"int8_keep_float_max_numel": 16, "export_permute": "mlp"},
}


def model_state(seed: int = 0) -> dict[str, Tensor]:
    """A tensor of every family, and one that is no float."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"tok_emb.weight": (61, 24), "blocks.0.attn.c_q.weight": (24, 24), "blocks.0.attn.c_k.weight": (8, 24),
              "blocks.0.attn.c_v.weight": (8, 24), "blocks.0.attn.proj.weight": (24, 24), FC: (48, 24), PROJ: (24, 48),
              SCALE: (24,), "blocks.0.attn.q_gain": (3,), "norm.weight": (5,)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()} | {"steps": torch.tensor([7, 300])}


def artifact(path: Path, state: Mapping[str, Tensor], **options: Any) -> Path:
    path.write_bytes(export.encode_artifact(dict(state), {"m": 1}, ExportOptions(**options)).data)
    return path


def hand_written(path: Path, meta: bytes = b"{}") -> Path:
    """A file from the format's table alone, every stream stored: the bytes of each part follow from the shapes."""
    rows = [  # dtype, codec, axis, layout, kept, rank, factors, kept_count, dims
        (SCALE, (0, 2, 0, 0, 0, 0, 0), 0, (5,)),
        (FC, (0, 0, 2, 0, 3, 1, 1), 2, (3, 4)),         # scales of both axes, int8 factors, two entries kept
        (PROJ, (0, 0, 0, 0, 1, 1, 0), 1, (4, 3)),       # scales of rows, fp16 factors, one row kept
        ("norm", (0, 1, 0, 0, 0, 0, 0), 0, (6,)),
        ("step", (8, 3, 0, 0, 0, 0, 0), 0, ()),
    ]
    streams = [
        np.arange(12, dtype="i1"), np.full(12, 3, "i1"),
        np.linspace(0.5, 2.0, 7 + 2 + 4).astype("<f2"),
        np.linspace(-1.0, 1.0, 2 + (4 + 3) + 3 + 6).astype("<f2"),
        np.linspace(0.1, 0.9, 5).astype("<f4"),
        np.frombuffer((1234).to_bytes(8, "little"), "u1"),
        np.arange(7, dtype="u1"),
        np.array([1, 10, 2], "<u4"),
    ]
    header = struct.pack("<I", len(meta)) + meta + struct.pack("<H", len(rows))
    for name, kinds, kept_count, dims in rows:
        header += bytes([len(name)]) + name.encode()
        header += struct.pack(f"<7BIB{len(dims)}I", *kinds, kept_count, len(dims), *dims)
    header += b"".join(struct.pack("<BI", 0, values.nbytes) for values in streams)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    coded = packer.compress(header) + packer.flush()
    body = coded + b"".join(v.view("u1").reshape(-1, v.itemsize).T.tobytes() for v in streams)
    data = struct.pack("<4sB3sIII", b"ANLM", 2, bytes(3), 20 + len(body) + 8, len(header), len(coded)) + body
    path.write_bytes(data + hashlib.blake2b(data, digest_size=8).digest())
    return path


def plain_entropy_bytes(values: np.ndarray) -> float:
    """Slowly, from the definition: of the first bytes of all values, then of the second ones, and so on."""
    raw, bits = values.tobytes(), 0.0
    for plane in range(values.itemsize):
        counts = Counter(raw[plane::values.itemsize])
        bits += sum(-n * math.log2(n / values.size) for n in counts.values())
    return bits / 8


def by_name(found: ledger.Ledger) -> dict[str, ledger.TensorBytes]:
    return {t.name: t for t in found.tensors}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = ledger.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


# ----------------------------------------------------------------------------------------------------------------------
# Sums and owners.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_byte_has_one_owner(tmp_path: Path, options: dict[str, Any]) -> None:
    path = artifact(tmp_path / "a.ptz", model_state(), **options)
    found, size = ledger.read_ledger(str(path)), os.path.getsize(path)
    assert found.file_bytes == size
    assert found.total_bytes == size + found.code_bytes == sum(found.components.values())
    assert size == sum(t.total_bytes for t in found.tensors) + found.components["metadata"]
    assert sum(family["bytes"] for family in found.families.values()) == size - found.components["metadata"]
    for component in ledger.TENSOR_COMPONENTS:
        assert found.components[component] == sum(t.components[component] for t in found.tensors)
    for t in found.tensors:
        assert t.total_bytes == sum(t.components.values())
        assert t.bits_per_weight == pytest.approx(8 * t.total_bytes / math.prod(t.shape))
    assert found.weights == sum(t.numel() for t in model_state().values())
    assert sum(s.coded_bytes for s in found.streams) == sum(t.total_bytes for t in found.tensors)


def test_hand_written_file_is_attributed_to_the_byte(tmp_path: Path) -> None:
    path = hand_written(tmp_path / "a.ptz")
    found = ledger.read_ledger(str(path))
    nothing = dict.fromkeys(ledger.TENSOR_COMPONENTS, 0)
    assert {name: t.components for name, t in by_name(found).items()} == {
        SCALE: nothing | {"floats": 5 * 4},
        FC: nothing | {"codes": 12, "scales": 7 * 2, "residuals": 2 * 2 + 7, "exceptions": 2 * 2 + 2 * 4},
        PROJ: nothing | {"codes": 12, "scales": 4 * 2, "residuals": 7 * 2, "exceptions": 3 * 2 + 4},
        "norm": nothing | {"floats": 6 * 2},
        "step": nothing | {"raw": 8},
    }
    assert found.components["metadata"] == os.path.getsize(path) - (20 + 49 + 44 + 12 + 8)
    assert {t.name: t.family for t in found.tensors} == {
        SCALE: "control", FC: "mlp fc", PROJ: "mlp proj", "norm": "other", "step": "other"}


def test_code_is_the_packed_submission(tmp_path: Path) -> None:
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("train_gpt.py", "export.py")}
    found = ledger.read_ledger(str(hand_written(tmp_path / "a.ptz")))
    assert found.code_bytes == found.components["code"] == len(packing.pack_code(sources))


@pytest.mark.parametrize("name", ["f16_factors", "int8_factors", "lqer_factors"])
def test_corrections_are_residuals_however_they_are_stored(tmp_path: Path, name: str) -> None:
    plain = ledger.read_ledger(str(artifact(tmp_path / "plain.ptz", model_state(), **OPTIONS["small"])))
    corrected = ledger.read_ledger(str(artifact(tmp_path / "a.ptz", model_state(), **OPTIONS[name])))
    assert plain.components["residuals"] == 0
    ranks = {row.name: row.rank for row in export.load_artifact(tmp_path / "a.ptz").plan}
    assert any(ranks.values())
    assert {t.name for t in corrected.tensors if t.components["residuals"]} == {n for n, rank in ranks.items() if rank}
    for before, after in zip(plain.tensors, corrected.tensors, strict=True):
        assert before.components["codes"] == after.components["codes"]
    if name == "int8_factors":      # a byte a value, all but incompressible, and two scales of two bytes
        fc = by_name(corrected)[FC].components["residuals"]
        assert 48 + 24 <= fc <= 48 + 24 + 2 * 2


def test_families_hold_their_tensors(tmp_path: Path) -> None:
    found = ledger.read_ledger(str(artifact(tmp_path / "a.ptz", model_state())))
    assert {name: (sums["tensors"], sums["weights"]) for name, sums in found.families.items()} == {
        "embedding": (1, 61 * 24), "attn q/k/v": (3, 24 * 24 + 2 * 8 * 24), "attn proj": (1, 24 * 24),
        "mlp fc": (1, 48 * 24), "mlp proj": (1, 24 * 48), "control": (2, 24 + 3), "other": (2, 5 + 2)}


@pytest.mark.parametrize(("total", "weights", "expected"), [
    (10, [1, 1, 1], [4, 3, 3]),         # equal remainders: the first
    (7, [3, 0, 5], [3, 0, 4]),          # 2.625, 0, 4.375
    (6, [100, 100, 101, 700], [1, 0, 1, 4]),    # 0.599, 0.599, 0.605, 4.196
    (0, [2, 3], [0, 0]), (0, [0], [0]), (9, [4], [9]), (2**40, [1, 2], [366503875925, 733007751851]),
])
def test_largest_remainders_round_up(total: int, weights: list[int], expected: list[int]) -> None:
    assert ledger.shared_out(total, weights) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Entropy and error.
# ----------------------------------------------------------------------------------------------------------------------


def test_entropy_of_known_codes(tmp_path: Path) -> None:
    four = torch.tensor([-1.0, -0.25, 0.25, 1.0]).repeat(64, 16)
    state = {"a.constant": torch.full((64, 64), 0.5), "b.four": four, "c.float": torch.ones(3)}
    found = ledger.read_ledger(str(artifact(tmp_path / "a.ptz", state, int8_keep_float_max_numel=16)))
    assert [t.entropy_bits for t in found.tensors] == [0.0, 2.0, None]
    entropies = {s.name: s.entropy_bytes for s in found.streams}
    assert entropies["codes:a.constant"] == 0
    assert entropies["codes:b.four"] == 64 * 64 * 2 / 8
    constant = by_name(found)["a.constant"].components      # deflate says 4096 equal bytes in a few
    assert 0 < constant["codes"] < 40
    assert constant["floats"] == constant["residuals"] == constant["exceptions"] == 0


@pytest.mark.parametrize("options", [OPTIONS["small"], OPTIONS["int8_factors"]])
def test_stream_entropies_equal_plain_ones(tmp_path: Path, options: dict[str, Any]) -> None:
    path = artifact(tmp_path / "a.ptz", model_state(), **options)
    values = export.load_artifact(path).values
    found = {s.name: s for s in ledger.read_ledger(str(path)).streams}
    held = {"f32": [SCALE, "blocks.0.attn.q_gain"], "f16": ["norm.weight"], "raw": ["steps"],
            "scales": [n for n in values if "codes" in values[n]], "factors": [n for n in values if "factors" in values[n]],
            **{f"codes:{n}": [n] for n in values if "codes" in values[n]}}
    assert found.keys() == {stream for stream, names in held.items() if names}
    for stream, s in found.items():
        joined = np.concatenate([values[name][stream.split(":")[0]] for name in sorted(held[stream])])
        assert (s.values, s.raw_bytes) == (joined.size, joined.nbytes)
        assert s.entropy_bytes == pytest.approx(plain_entropy_bytes(joined), rel=1e-12, abs=1e-12)


def test_coded_bytes_stand_beside_the_streams(tmp_path: Path) -> None:
    path = artifact(tmp_path / "a.ptz", model_state(), **OPTIONS["int8_factors"])
    parts = {name: n for name, n in export.load_artifact(path).parts.items() if n and name not in ledger.OVERHEAD}
    assert {s.name: s.coded_bytes for s in ledger.read_ledger(str(path)).streams} == parts


def test_errors_equal_plain_ones(tmp_path: Path) -> None:
    state = model_state()
    path = artifact(tmp_path / "a.ptz", state, **OPTIONS["four_bits"])
    decoded = export.load_artifact(path).state
    for t in ledger.read_ledger(str(path), state).tensors:
        pairs = list(zip(state[t.name].flatten().tolist(), decoded[t.name].flatten().tolist(), strict=True))
        error, energy = sum((a - b) ** 2 for a, b in pairs), sum(a * a for a, _ in pairs)
        assert t.rms_error == pytest.approx(math.sqrt(error / energy), rel=1e-9)
        assert t.max_error == max(abs(a - b) for a, b in pairs)
    errors = {t.name: t.rms_error for t in ledger.read_ledger(str(path), state).tensors}
    assert errors[SCALE] == errors["steps"] == 0
    assert 0.02 < (errors[FC] or 0) < 0.2       # four bits of a normal matrix


def test_without_checkpoint_there_are_no_errors(tmp_path: Path) -> None:
    found = ledger.read_ledger(str(artifact(tmp_path / "a.ptz", model_state())))
    assert {(t.rms_error, t.max_error) for t in found.tensors} == {(None, None)}


# ----------------------------------------------------------------------------------------------------------------------
# Two files.
# ----------------------------------------------------------------------------------------------------------------------


def test_a_file_differs_from_itself_by_nothing(tmp_path: Path) -> None:
    found = ledger.read_ledger(str(artifact(tmp_path / "a.ptz", model_state(), **OPTIONS["int8_factors"])))
    views = ledger.difference(found, found)
    assert [len(changes) for changes in views.values()] == [9, 7, 11]
    for changes in views.values():
        assert {(c.change_bytes, c.change_bits) for c in changes} == {(0, 0.0)}
        assert all(c.first_bytes == c.second_bytes is not None for c in changes)


def test_difference_sums_to_the_change_of_the_file(tmp_path: Path) -> None:
    first = ledger.read_ledger(str(artifact(tmp_path / "a.ptz", model_state(), **OPTIONS["small"])))
    second = ledger.read_ledger(str(artifact(tmp_path / "b.ptz", model_state(), **OPTIONS["four_bits"])))
    views = ledger.difference(first, second)
    sizes = [os.path.getsize(tmp_path / name) for name in ("a.ptz", "b.ptz")]
    assert sum(c.change_bytes for c in views["component"]) == sizes[1] - sizes[0] < 0
    metadata = next(c.change_bytes for c in views["component"] if c.name == "metadata")
    for view in ("family", "tensor"):
        assert sum(c.change_bytes for c in views[view]) == sizes[1] - sizes[0] - metadata
    fc = next(c for c in views["tensor"] if c.name == FC)
    assert fc.first_bits == pytest.approx(8 * (fc.first_bytes or 0) / (48 * 24))
    assert fc.change_bits == pytest.approx(8 * fc.change_bytes / (48 * 24))


def test_tensors_of_one_file_only_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = model_state()
    a = artifact(tmp_path / "a.ptz", {name: t for name, t in state.items() if name != "norm.weight"})
    b = artifact(tmp_path / "b.ptz", {name: t for name, t in state.items() if name != FC})
    code, out, err = run(capsys, a, b)
    assert (code, err) == (0, "")
    assert [line.split("  ")[-1] for line in out.splitlines() if "only in" in line] == [
        "mlp fc (only in the first)", f"{FC} (only in the first)", "norm.weight (only in the second)"]
    changes = {c.name: c for c in ledger.difference(*(ledger.read_ledger(str(p)) for p in (a, b)))["tensor"]}
    assert changes[FC].second_bytes is changes[FC].change_bits is None
    assert changes[FC].change_bytes == -(changes[FC].first_bytes or 0) < 0
    assert changes["norm.weight"].first_bytes is None
    assert changes["norm.weight"].change_bytes > 0


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written.
# ----------------------------------------------------------------------------------------------------------------------


def column(out: str, title: str) -> dict[str, int]:
    """The names of a printed table with their first numbers."""
    body = out.split(f"\n{title}")[1].split("\n\n")[0].splitlines()[2:]
    return {line.split("  ")[-1].strip(): int(line.split()[0].replace(",", "")) for line in body}


def test_printed_tables_sum_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = artifact(tmp_path / "a.ptz", model_state(), **OPTIONS["int8_factors"])
    code, out, err = run(capsys, path)
    assert (code, err) == (0, "")
    components, size = column(out, "by component"), os.path.getsize(path)
    total = components.pop("total")
    assert total == sum(components.values()) == size + components["code"]
    tensors = column(out, "by tensor")
    assert tensors.keys() == model_state().keys()
    assert sum(tensors.values()) == sum(column(out, "by family").values()) == size - components["metadata"]
    assert out.startswith(f"{path}: artifact {size:,} + code {components['code']:,} = {total:,} bytes of 16,000,000 (")
    assert "rms error" not in out


@pytest.mark.parametrize(("options", "shown"), [(b'"artifact_cap_bytes":200000', "of 200,000 ("),
                                               (b'"artifact_cap_bytes":0', "of no cap,"), (b"", "of 16,000,000 (")])
def test_total_is_held_against_the_cap_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: bytes, shown: str
) -> None:
    code, out, _ = run(capsys, hand_written(tmp_path / "a.ptz", b'{"export":{%b}}' % options))
    assert code == 0
    assert shown in out.splitlines()[0]


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = model_state()
    save_file(state, tmp_path / "w.safetensors")
    a, b = (artifact(tmp_path / f"{name}.ptz", state, **OPTIONS[name]) for name in ("small", "lqer_factors"))
    code, out, _ = run(capsys, a, b, "--checkpoint", tmp_path / "w.safetensors", "--json", tmp_path / "out.json")
    assert code == 0
    assert "rms second" in out
    held = json.loads((tmp_path / "out.json").read_text())
    ledgers = [ledger.read_ledger(str(path), state) for path in (a, b)]
    for found, plain in zip(ledgers, held["ledgers"], strict=True):
        tensors = [ledger.TensorBytes(**{**t, "shape": tuple(t["shape"])}) for t in plain.pop("tensors")]
        streams = [ledger.StreamBytes(**s) for s in plain.pop("streams")]
        assert ledger.Ledger(**plain, tensors=tuple(tensors), streams=tuple(streams)) == found
    assert held["difference"] == {view: [asdict(c) for c in cs] for view, cs in ledger.difference(*ledgers).items()}
    assert run(capsys, a, "--json", tmp_path / "one.json")[0] == 0
    assert json.loads((tmp_path / "one.json").read_text())["difference"] is None
    assert not list(tmp_path.glob("*.tmp"))


def test_png_shows_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    a, b = (artifact(tmp_path / f"{name}.ptz", model_state(), **OPTIONS[name]) for name in ("small", "four_bits"))
    pictures = []
    for number, files in enumerate(([a], [a, b])):
        path = tmp_path / f"{number}.png"
        assert run(capsys, *files, "--png", path)[0] == 0
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        pictures.append(image.imread(io.BytesIO(data)))
    for pixels in pictures:
        colours, counts = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0, return_counts=True)
        assert (counts > 300).sum() >= 5        # large areas: paper and several components
        assert len(colours) > 10
    assert pictures[1].shape[1] > pictures[0].shape[1]      # room for the second bar


def test_png_without_matplotlib_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = artifact(tmp_path / "a.ptz", model_state())
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    found = run(capsys, path, "--png", tmp_path / "a.png", "--json", tmp_path / "a.json")
    assert found == (2, "", "ledger.py: --png needs matplotlib: pip install matplotlib\n")
    assert os.listdir(tmp_path) == ["a.ptz"]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written.
# ----------------------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The line that a run leaves on stderr, which is all it leaves."""
    before = sorted(os.listdir(folder))
    code, out, err = run(capsys, *arguments, "--json", folder / "out.json", "--png", folder / "out.png")
    assert (code, out) == (2, "")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert sorted(os.listdir(folder)) == before
    return err.removesuffix("\n")


def test_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.ptz"
    assert refused(capsys, tmp_path, path) == f"ledger.py: [Errno 2] No such file or directory: '{path}'"
    good = artifact(tmp_path / "a.ptz", model_state())
    for arguments in ((good, path), (good, "--checkpoint", path)):
        assert refused(capsys, tmp_path, *arguments).endswith(f"No such file or directory: '{path}'")


def test_what_is_no_artifact_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, text = artifact(tmp_path / "a.ptz", model_state()), tmp_path / "text"
    text.write_text("once upon a time")
    line = f"ledger.py: {text}: artifact: magic at byte 0: found b'once', expected b'ANLM'"
    assert refused(capsys, tmp_path, text) == refused(capsys, tmp_path, good, text) == line
    data = good.read_bytes()
    (tmp_path / "cut").write_bytes(data[:-1])
    assert f"cut: artifact: file at byte {len(data) - 1}: found its end" in refused(capsys, tmp_path, tmp_path / "cut")
    (tmp_path / "flipped").write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    assert "flipped: artifact: checksum at byte" in refused(capsys, tmp_path, tmp_path / "flipped")


@pytest.mark.parametrize(("meta", "fault"), [
    (b'{"export":[]}', "meta.export: found [], expected an object"),
    (b'{"export":{"artifact_cap_bytes":-1}}', "meta.export.artifact_cap_bytes: found -1, expected bytes"),
    (b'{"export":{"artifact_cap_bytes":"big"}}', "meta.export.artifact_cap_bytes: found big, expected bytes"),
])
def test_strange_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], meta: bytes, fault: str) -> None:
    path = hand_written(tmp_path / "a.ptz", meta)
    assert refused(capsys, tmp_path, path) == f"ledger.py: {path}: artifact: {fault}"


def test_checkpoint_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, weights = model_state(), tmp_path / "w.safetensors"
    path = artifact(tmp_path / "a.ptz", state)
    at = f"ledger.py: {path}: tensor {FC}"
    for changed, fault in (
        ({FC: torch.zeros(48, 23)}, f"{at} has shape (48, 24) in the artifact, (48, 23) in the checkpoint"),
        ({FC: torch.full((48, 24), math.inf)}, f"{at} of the checkpoint holds a value that is not finite"),
    ):
        save_file(state | changed, weights)
        assert refused(capsys, tmp_path, path, "--checkpoint", weights) == fault
    save_file({name: t for name, t in state.items() if name != FC}, weights)
    assert refused(capsys, tmp_path, path, "--checkpoint", weights) == (
        f"{at} has shape (48, 24) in the artifact, none in the checkpoint")
    weights.write_text("no weights at all")
    assert refused(capsys, tmp_path, path, "--checkpoint", weights).startswith(
        f"ledger.py: {weights}: artifact: checkpoint at byte 0: found b'no weight'")


def test_reordered_tensors_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, weights = model_state(), tmp_path / "w.safetensors"
    path = artifact(tmp_path / "a.ptz", state, **OPTIONS["permuted"])
    save_file(state, weights)
    assert refused(capsys, tmp_path, path, "--checkpoint", weights) == (
        f"ledger.py: {path}: written with EXPORT_PERMUTE=mlp, so its tensors are reordered and errors cannot be compared"
        " tensor by tensor; use `export.py verify`")
    assert run(capsys, path)[0] == 0


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], ["a", "--nothing"]])
def test_wrong_command_lines_end_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ledger.main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ledger.py: ")
