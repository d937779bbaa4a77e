"""The command that scores an artifact, run under scripts/watched.py with its inputs alone: what it opens and prints."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from audit_rules import Finding, Nats

ROOT = Path(__file__).resolve().parent.parent
PRINTED_TOLERANCE = 1e-6        # relative; lines have eight decimals
# Where Python and the packages have their code; a program that is scored may open that, its own sources and its inputs.
CODE_FOLDERS = {str(Path(path).resolve()) for key, path in sysconfig.get_paths().items() if key.endswith(("stdlib", "lib"))}
CODE_FOLDERS |= {str(Path(module.__file__ or "").resolve().parents[1]) for module in (np, torch)}
CODE_ARCHIVES = {entry for entry in sys.path if entry.endswith(".zip")}     # of the standard library, where there is one
SYSTEM_FILES = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/dev/shm/", "/dev/nvidia")


@dataclass(frozen=True)
class Watched:
    """What a program printed and opened; paths are those of the files that links lead to."""
    code: int
    out: str
    error: str
    opened: tuple[tuple[str, str], ...]     # (event, what)
    scratch: str                            # folder for temporary files, empty at the start


def run_watched(command: Sequence[str], folder: Path) -> Watched:
    """Runs a Python program in an empty folder of its own, with an environment that names nothing."""
    record, scratch = folder / "opened.jsonl", folder / "scratch"
    scratch.mkdir()
    kept = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT")
    env = {name: os.environ[name] for name in kept if name in os.environ} | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(scratch),
        "TMPDIR": str(scratch)}
    watcher = [sys.executable, str(ROOT / "scripts" / "watched.py"), str(record)]
    done = subprocess.run([*watcher, *command], cwd=scratch, env=env, capture_output=True, text=True, check=False)
    lines = record.read_text().splitlines() if record.exists() else []
    return Watched(done.returncode, done.stdout, done.stderr, tuple(tuple(json.loads(line)) for line in lines), str(scratch))


def eval_command(file: str, shards: Sequence[Path], tokenizer: str, arguments: Iterable[str], folder: Path) -> list[str]:
    """`export.py eval` on a folder that links to the validation shards alone."""
    data = folder / "data"
    data.mkdir()
    for path in shards:
        (data / path.name).symlink_to(path.resolve())
    return [str(ROOT / "export.py"), "eval", str(Path(file).resolve()), "--data", str(data),
            "--tokenizer", str(Path(tokenizer).resolve()), *arguments]


def check_opened(watched: Watched, inputs: Iterable[str | Path]) -> Iterator[Finding]:
    """A watched program came to its end and opened its inputs and code alone."""
    if watched.code != 0:
        last = (watched.error.strip().splitlines() or ["it said nothing"])[-1]
        yield Finding("the program's exit code", watched.code, faults=[f"the program ended with {watched.code}: {last}"])
    wanted, sources = CODE_ARCHIVES | {str(Path(path).resolve()) for path in inputs}, {str(ROOT), str(ROOT / "scripts")}
    files = Finding("files opened: inputs, and code of Python, its packages and the program", len(watched.opened))
    others = Finding("sockets and other programs")
    for event, what in watched.opened:
        if event not in ("open", "ctypes.dlopen"):
            others.faults.append(f"{event} {what}")
            continue
        path = Path(os.path.realpath(what))
        source = path.suffix in (".py", ".pyc") and str(path.parent).removesuffix("/__pycache__") in sources
        known = what == "None" or str(path) in wanted or source or what.startswith((*SYSTEM_FILES, watched.scratch))
        if not known and not any(str(path).startswith(folder + os.sep) for folder in CODE_FOLDERS):
            files.faults.append(f"opened {what}")
    yield files
    yield others


def printed_results(out: str) -> dict[str, tuple[float, float]]:
    """(val_loss, val_bpb) of each score in the lines of an evaluation."""
    found = re.findall(r"^final_(?:int8_zlib|rd)_(\w+)_exact val_loss:(\S+) val_bpb:(\S+)$", out, re.MULTILINE)
    return {name: (float(loss), float(bpb)) for name, loss, bpb in found}


def check_printed(printed: Mapping[str, tuple[float, float]], scores: Nats, byte_counts: np.ndarray) -> Finding:
    """What the command printed about a text, against its scores and the bytes of its targets (N - 1,)."""
    finding = Finding("scores that export.py eval printed, against sums over targets here", len(printed),
                      tolerance=PRINTED_TOLERANCE)
    if scores.keys() != printed.keys():
        finding.fault(f"printed were {', '.join(printed) or 'none'}; scores are {', '.join(scores)}")
    for name in scores.keys() & printed.keys():
        nats, size = scores[name], int(byte_counts[:scores[name].size].sum())
        total = float(nats.sum(dtype=np.float64))
        for key, said, made in zip(("val_loss", "val_bpb"), printed[name],
                                   (total / nats.size, total / np.log(2) / size), strict=True):
            finding.worst = max(finding.worst, abs(said / made - 1))
            if not abs(said / made - 1) <= PRINTED_TOLERANCE:
                finding.fault(f"{name}: printed {key}:{said:.8f}, its targets make {made:.8f}")
    return finding
