"""Guarantees of the packed file: it is the same program, alone, in fewer bytes, and its size is what runs count.

    bash scripts/test.sh tests/test_packing.py
"""
from __future__ import annotations

import inspect
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyData, tiny_knobs
from hypothesis import example, given
from hypothesis import strategies as st

import export
import packing
import train_gpt

ROOT = Path(train_gpt.__file__).parent
FAKE_EXPORT = '''"""A docstring that costs nothing."""
from dataclasses import dataclass
# a comment
@dataclass
class Thing:
    """Another docstring."""
    x: int = 1  # and a comment
def boom():
    """Only a docstring before the fault."""
    raise KeyError("boom")
def silent():
    """Nothing else."""
def tool(name):
    return name in __spec__.loader.sources
'''
FAKE_TOOL = "import train_gpt\nDOUBLED = 2 * train_gpt.ANSWER\n"
FAKE_TRAIN = '''"""The program."""
from __future__ import annotations
import inspect, sys
import export
from export import Thing
ANSWER = 21
def main():
    assert sys.modules["export"] is export and export.Thing is Thing and export.silent() is None
    assert __name__ == "__main__" and sys.modules["train_gpt"] is sys.modules["__main__"]
    print(export.__file__ == __file__, inspect.getsource(export.boom).strip().splitlines()[-1].strip())
    print(inspect.getsource(main)[:10], sys.argv[1:], export.__doc__)
    import doubling
    print(doubling.DOUBLED, export.tool("doubling"), export.tool("train"))
    export.boom()
if __name__ == "__main__":
    from train_gpt import main as again
    assert again is main
    again()
'''
FAKES = {"train_gpt.py": FAKE_TRAIN, "export.py": FAKE_EXPORT, "doubling.py": FAKE_TOOL}


def run_alone(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=kept | env, text=True, capture_output=True, check=False)


def packed_trainer(folder: Path, **knobs: object) -> int:
    """Writes train_gpt.py with the tools of a run of these knobs; its bytes."""
    files = train_gpt.source_files(train_gpt.Config(**knobs))     # pyright: ignore[reportArgumentType]
    folder.mkdir(exist_ok=True)
    return (folder / "train_gpt.py").write_bytes(packing.packed_code(files))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An otherwise empty folder with the packed trainer."""
    folder = tmp_path_factory.mktemp("submission")
    packed_trainer(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The form of the file.
# ----------------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
@example(bytes(range(256)))
@example(b"\0001\0008\0\0009\\0\\\0007\r\n\"'\n\r\0")
def test_a_literal_is_read_back_as_its_bytes(data: bytes) -> None:
    source = b"# coding:latin-1\nx=" + packing.literal(data).encode("latin-1")
    assert source.count(b"\n") == 1
    names: dict[str, str] = {}
    exec(compile(source, "literal", "exec"), names)
    assert names["x"].encode("latin-1") == data


def test_the_packed_file_runs_alone_and_shows_its_source_in_tracebacks(tmp_path: Path) -> None:
    packed = packing.pack_code(FAKES)
    assert packed == packing.pack_code({name.removesuffix(".py"): FAKES[name] for name in sorted(FAKES)})
    (tmp_path / "submission.py").write_bytes(packed)
    run = run_alone(tmp_path, "submission.py", "--flag")
    assert run.stdout.splitlines() == [
        "True def boom():raise KeyError('boom')", "def main() ['--flag'] None", "42 True False"]
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "KeyError: 'boom'"
    assert "export.boom()" in run.stderr
    assert "raise KeyError('boom')" in run.stderr
    assert len(run.stderr) < 2000, "a line of the traceback holds the payload"
    assert os.listdir(tmp_path) == ["submission.py"]


def test_what_only_readers_of_the_source_need_does_not_weigh() -> None:
    size = len(packing.pack_code(FAKES))
    noise = " ".join(str(i) for i in random.Random(0).sample(range(10**6), 200))
    knob = f'x = knob(1, "Group", "{noise}", low=2)\ndef knob(default, group, text, *, low): return low\n'
    assert "(1,'','',low=2)" in packing.minified({"m": knob})["m"]
    silent = FAKE_EXPORT + f"# {noise}\ndef f():\n    '''{noise}'''\n"
    assert len(packing.pack_code(FAKES | {"export.py": silent})) < size + 30
    assert len(packing.pack_code(FAKES | {"export.py": FAKE_EXPORT + f"TABLE = '{noise}'\n"})) > size + 300


def test_names_that_another_module_reaches_keep_them() -> None:
    sources = {"a": "def taken():0\ndef reached():0\ndef alone_with_a_long_name():0\nalone_with_a_long_name();taken()\n",
               "train_gpt": "import a\nfrom a import taken\na.reached()\n"}
    text = packing.minified(sources)["a"]
    assert "def taken" in text
    assert "def reached" in text
    assert "alone_with_a_long_name" not in text


def test_a_package_without_the_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match="packing needs train_gpt, got export"):
        packing.pack_code({"export": FAKE_EXPORT})


# ----------------------------------------------------------------------------------------------------------------------
# The count: that of the file that ships, remembered.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Small sources, and an empty memory."""
    monkeypatch.setattr(packing, "CACHE", tmp_path / "cache")
    for name, source in FAKES.items():
        (tmp_path / name).write_text(source)
    return [tmp_path / name for name in FAKES]


def test_packed_bytes_are_those_of_the_file_that_ships(sources: list[Path], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    size = packing.packed_code_bytes(sources)
    packed = tmp_path / "packed.py"
    packed.write_bytes(packing.pack_code(FAKES))
    for module in (train_gpt, export):      # in a packed file both modules have its path
        monkeypatch.setattr(module, "__file__", str(packed))
    assert train_gpt.code_bytes.__wrapped__() == size == packed.stat().st_size


def test_sources_are_packed_once_until_they_change(sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = packing.packed_code_bytes(sources)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_code", lambda _: pytest.fail("packed again"))
        assert packing.packed_code_bytes(sources) == size
    sources[1].write_text(FAKE_EXPORT + "TABLE = 'something more'\n")
    assert packing.packed_code_bytes(sources) > size


def test_the_memory_is_bounded_and_shared_by_processes_at_once(sources: list[Path]) -> None:
    sizes = range(100, 100 + 3 * packing.CACHED_FILES)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda size: packing.remember(packing.CACHE / f"packed-{size % 10}", bytes(10 * (size % 10))), sizes))
    left = list(packing.CACHE.iterdir())
    assert 0 < len(left) <= packing.CACHED_FILES + 8        # as many again as prune at the same moment
    assert all(file.stat().st_size == 10 * int(file.name.removeprefix("packed-")) for file in left)


def test_a_folder_that_cannot_be_written_to_costs_only_time(sources: list[Path]) -> None:
    packing.CACHE.write_text("a file, so that nothing can be written below it")
    assert packing.packed_code_bytes(sources) == packing.packed_code_bytes(sources) == len(packing.pack_code(FAKES))


def test_tools_bring_the_tools_that_they_import() -> None:
    found = train_gpt.source_files(train_gpt.Config(export_rotate=True))
    assert [p.name for p in found] == ["train_gpt.py", "export.py", "symmetries.py"]
    found = train_gpt.source_files(train_gpt.Config(cap_policy="fit"))
    assert [p.name for p in found] == ["train_gpt.py", "export.py", "int8_plan.py", "sensitivity_map.py", "symmetries.py"]


def test_the_command_prints_the_size_and_checks_it_only_when_told(monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"train_gpt": "x=1\n", "export": "y=2\n"}
    monkeypatch.setattr(packing, "minified", lambda sources: texts)
    size = len(packing.self_extracting(texts))
    for wanted, arguments, code in ((size, ["--check"], 0), (size - 1, ["--check"], 1), (size - 1, [], 0)):
        monkeypatch.setattr(packing, "WANTED_BYTES", wanted)
        assert packing.main(arguments) == code
        said = re.fullmatch(rf"packed code: {size} bytes of {wanted} wanted \(train_gpt.py (\d+), export.py (\d+)\)\n",
                            capsys.readouterr().out)
        assert said is not None
        assert sum(map(int, said.groups())) == size
    assert packing.main(["--chekc"]) == 2
    assert capsys.readouterr().err == "usage: python scripts/packing.py [--check]\n"


# ----------------------------------------------------------------------------------------------------------------------
# The trainer, packed, against the trainer.
# ----------------------------------------------------------------------------------------------------------------------

BAD = {"NUM_HEADS": "5", "TIE_EMBEDDINGS": "yes", "VAL_LOSS_EVRY": "3", "TTT_STEPS": "1", "INT8_AXIS_MODE": "both",
       "ADAM_EPS": "0", "TRAIN_BATCH_TOKENS": "100", "EXPORT_SCHEME": "rd", "TCQ_STATES": "7"}
ASK = """
import dataclasses, inspect, json, sys, train_gpt as t, export as e
cfg, problems = t.Config.parse(json.loads(sys.argv[1]))
knobs = {f.name: f.default for f in dataclasses.fields(t.Config)}
sources = [inspect.getsource(f) for f in (t.GPT.forward, t.Muon.step, e.encode_artifact)]
artifact = e.decode_artifact(open(sys.argv[2], "rb").read())
print(json.dumps([knobs, problems, sources, artifact.meta, e.weights_digest(artifact.state)]))
"""


def test_knobs_faults_and_shapes_are_those_of_the_sources(plain: Path) -> None:
    golden = ROOT / "tests" / "data" / "golden_v2.anlm"
    asked = run_alone(plain, "-c", ASK, json.dumps(BAD), str(golden))
    assert asked.returncode == 0, asked.stderr
    knobs, problems, sources, meta, digest = json.loads(asked.stdout)
    assert knobs == {f.name: f.default for f in fields(train_gpt.Config)}
    assert problems == train_gpt.Config.parse(BAD)[1]
    assert any("VAL_LOSS_EVRY is not a knob of this version, did you mean VAL_LOSS_EVERY?" in p for p in problems)
    artifact = export.load_artifact(golden)
    assert (meta, digest) == (artifact.meta, export.weights_digest(artifact.state))
    for source, function in zip(sources, (train_gpt.GPT.forward, train_gpt.Muon.step, export.encode_artifact), strict=True):
        assert f"def {function.__name__}(" in source
        assert len(source) < len(inspect.getsource(function))


def outputs(log_dir: str | Path) -> dict[str, bytes]:
    """What a run's folder holds beside prose and times."""
    return {p.name: p.read_bytes() for p in Path(log_dir, "tiny").iterdir() if p.suffix in (".ptz", ".anlm", ".safetensors")}


def exact_line(log_dir: str | Path) -> str:
    line, = re.findall(r"^final_\w+_roundtrip_exact .*$", Path(log_dir, "tiny", "train.log").read_text(), re.MULTILINE)
    return line


SCHEMES: dict[str, Mapping[str, str]] = {
    "rd": {"EXPORT_SCHEME": "rd", "CALIBRATION_TOKENS": "256", "TCQ_STATES": "4", "EXPORT_BITS": "3"},
    "tools": {"SAVE_RAW_CHECKPOINT": "1", "INT8_RESIDUAL_RANK": "1", "EXPORT_PERMUTE": "mlp", "ARTIFACT_EVERY": "2"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_run_gives_the_weights_the_artifact_and_the_score_of_a_plain_one(
        scheme: str, tmp_path: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {"ITERATIONS": "2", "NUM_LAYERS": "2", "MODEL_DIM": "16"} | dict(SCHEMES[scheme])
    cfg, problems = train_gpt.Config.parse(env)
    assert problems == []
    size = packed_trainer(tmp_path / "packed", **{name.lower(): getattr(cfg, name.lower()) for name in SCHEMES[scheme]})
    (tmp_path / "packed" / "numba.py").write_text("raise ImportError('not for a submission')\n")
    run = run_alone(tmp_path / "packed", "train_gpt.py", **env | {"LOG_DIR": "logs"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "predicted: no size, a packed file runs without scripts/prediction.py\n" in run.stdout
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)       # the two searches sum in another order
        export.compiled.cache_clear()
        assert train_gpt.main(env) == 0
    export.compiled.cache_clear()
    packed_logs, plain_logs = tmp_path / "packed" / "logs", env["LOG_DIR"]
    assert outputs(packed_logs) == outputs(plain_logs)
    assert exact_line(packed_logs) == exact_line(plain_logs)
    for logs in (packed_logs, plain_logs):
        assert json.loads(Path(logs, "tiny", "summary.json").read_text())["code_bytes"] == size


def test_two_packed_ranks_train_as_one_and_a_file_is_scored_without_training_data(
        plain: Path, tmp_path: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]) -> None:
    env = tiny_knobs(tiny_data, tmp_path) | {"ITERATIONS": "2"}
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py")
    run = run_alone(plain, *command, **env)
    assert run.returncode == 0, run.stdout + run.stderr
    two = float(exact_line(env["LOG_DIR"]).rpartition(":")[2])
    artifact, only_val = Path(env["LOG_DIR"], "tiny", "final_model.int8.ptz"), tmp_path / "only_val"
    only_val.mkdir()
    for name in ("fineweb_val_000000.bin", "manifest.json"):
        (only_val / name).write_bytes((tiny_data.folder / name).read_bytes())
    score = env | {"EVAL_ARTIFACT": str(artifact), "DATA_PATH": str(only_val), "RUN_ID": "score"}
    assert train_gpt.main(score) == 0
    assert float(capsys.readouterr().out.rsplit("val_bpb:", 1)[1]) == pytest.approx(two, abs=2e-8)
    assert train_gpt.main(env | {"RUN_ID": "one"}) == 0
    summary = json.loads(Path(env["LOG_DIR"], "one", "summary.json").read_text())
    assert np.isclose(summary["roundtrip"]["val_bpb"], two, rtol=1e-4)
