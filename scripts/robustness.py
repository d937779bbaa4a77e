"""How much damage weights survive: pruning by magnitude, and random corruption of an artifact's codes.

    python scripts/robustness.py FILE... --data DIR --tokenizer MODEL [--prune 10 30 50] [--corrupt 0.01] [-o OUT.json]

Pruning sets the smallest so many percent of each matrix, by magnitude, to zero. Corruption replaces a random share of the
stored integers of an artifact's matrices, each by another one of its tensor, drawn as often as they occur there; --draws
seeded draws give mean and spread. In a file with a trellis the stored integers are positions without their parity: a wrong
one puts the rest of its column on another path, where the integers stay and their parities change. That is counted too,
as a reader of the damaged file would meet it. FILE is an artifact or a checkpoint; checkpoints have no codes to corrupt.

Figures are val_bpb minus that of the undamaged file, in thousandths (mbpb).
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch import Tensor

import export
import export_verbs
from compare_exports import Subject
from export import Artifact, Stored


@dataclass(frozen=True)
class Damage:
    """One measurement; `draw` tells repetitions of a corruption apart."""
    file: str
    kind: str           # "none", "prune" or "corrupt"
    amount: float       # percent of the weights, or share of the codes
    draw: int
    val_loss: float
    val_bpb: float


def pruned(state: Mapping[str, Tensor], percent: float) -> dict[str, Tensor]:
    """The state with the smallest `percent` % of each matrix at zero."""
    found = dict(state)
    for name in export.matrices(export.shapes_of(state)):
        w = state[name].clone()
        w.view(-1)[w.view(-1).abs().argsort(stable=True)[:round(percent / 100 * w.numel())]] = 0
        found[name] = w
    return found


def corrupted(artifact: Artifact, share: float, rng: np.random.Generator) -> dict[str, Stored]:
    """The tensors of a file with `share` of the stored integers of its matrices replaced."""
    found = {row.name: Stored(row, dict(artifact.values[row.name])) for row in artifact.plan}
    for name in export.matrices({row.name: row.shape for row in artifact.plan}):
        row, values = found[name].row, found[name].values
        if row.codec == "int":
            values["codes"] = replaced(values["codes"], share, rng)
        elif row.codec == "grid":
            levels = levels_of(values["positions"].reshape(row.shape), row.states)
            values["positions"] = positions_of(replaced(levels, share, rng), row.states).reshape(-1)
    return found


def replaced(codes: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Codes of which a random share is another one of them, as frequent ones more often; as they are where all are equal."""
    known = np.sort(codes, axis=None)
    first, end = (np.searchsorted(known, codes, side) for side in ("left", "right"))
    if known[0] == known[-1]:
        return codes
    drawn = rng.integers(0, known.size - (end - first))
    drawn += np.where(drawn >= first, end - first, 0)   # never a code equal to the one that was there
    return np.where(rng.random(codes.shape) < share, known[drawn], codes)


def levels_of(positions: np.ndarray, states: int) -> np.ndarray:
    """What a file says of each position (rows, cols): all of it, or under a trellis all but the parity."""
    return positions >> int(states > 0)


def positions_of(levels: np.ndarray, states: int) -> np.ndarray:
    """The positions that a reader makes of levels (rows, cols), column by column down the rows."""
    if not states:
        return levels
    following, state, found = export.trellis(states), np.zeros(levels.shape[1], np.int64), np.empty_like(levels)
    for i, row in enumerate(levels):
        found[i] = 2 * row + (state & 1)
        state = following[state, row & 1]
    return found


def restored(tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {name: export.restore(s.row, s.values) for name, s in tensors.items()}


def measure(path: str, args: argparse.Namespace) -> Iterator[Damage]:
    state, meta, plan = export_verbs.read_with_plan(path, [])
    subject, artifact = Subject(path, state, meta, args), export.load_artifact(path) if plan else None

    def scored(kind: str, amount: float, draw: int, damaged: dict[str, Tensor]) -> Damage:
        result = subject.evaluate(damaged)
        return Damage(path, kind, amount, draw, result.val_loss, result.val_bpb)

    yield scored("none", 0, 0, state)
    for percent in args.prune:
        yield scored("prune", percent, 0, pruned(state, percent))
    if artifact is None:
        return
    for share in args.corrupt:
        for draw in range(args.draws):
            rng = np.random.default_rng((args.seed, draw))
            yield scored("corrupt", share, draw, restored(corrupted(artifact, share, rng)))


def gaps(found: Sequence[Damage], file: str, kind: str, amount: float) -> list[float]:
    """In mbpb, one for each draw."""
    (clean,) = (d.val_bpb for d in found if (d.file, d.kind) == (file, "none"))
    return [1000 * (d.val_bpb - clean) for d in found if (d.file, d.kind, d.amount) == (file, kind, amount)]


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.1f} (sd {sd:.1f}, n {len(values)})"


def table(found: Sequence[Damage], args: argparse.Namespace) -> Iterator[str]:
    yield (f"| file | val_bpb | {' | '.join(f'{percent:g} % pruned' for percent in args.prune)} | "
           f"{' | '.join(f'{100 * share:g} % of codes corrupted' for share in args.corrupt)} |")
    yield "|---|---" + "|---" * (len(args.prune) + len(args.corrupt)) + "|"
    for clean in (d for d in found if d.kind == "none"):
        cells = [f"{gaps(found, clean.file, 'prune', percent)[0]:+.1f}" for percent in args.prune]
        cells += [spread(gaps(found, clean.file, "corrupt", share)) for share in args.corrupt]
        yield f"| {clean.file} | {clean.val_bpb:.4f} | {' | '.join(cells)} |"


def command_line() -> argparse.ArgumentParser:
    parser = export_verbs.OneLineParser(prog="robustness.py", description="Pruning curves and corrupted codes.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("-o", "--output", type=export_verbs.output_path, metavar="OUT.json")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-tokens", type=int, default=131_072, help="validation tokens; 0 = all")
    parser.add_argument("--prune", type=float, nargs="+", default=[10.0, 20.0, 30.0, 40.0, 50.0, 60.0], metavar="PERCENT")
    parser.add_argument("--corrupt", type=float, nargs="+", default=[0.01], metavar="SHARE", help="of the codes")
    parser.add_argument("--draws", type=int, default=5, help="of each corruption")
    parser.add_argument("--seed", type=int, default=1337)
    return parser


def faults_of(args: argparse.Namespace) -> list[str]:
    faults = [f"{flag} must be in 0..{most:g}, got {value:g}"
              for flag, values, most in (("--prune", args.prune, 100.0), ("--corrupt", args.corrupt, 1.0))
              for value in values if not 0 <= value <= most]
    faults += [f"{flag} must be at least {low}, got {value}"
               for flag, value, low in (("--draws", args.draws, 1), ("--seed", args.seed, 0)) if value < low]
    faults += [f"{value} is given twice" for values in (args.files, args.prune, args.corrupt)
               for value in dict.fromkeys(values) if values.count(value) > 1]
    return faults + [f"{path}: no such file" for path in args.files if not Path(path).is_file()]


def main(arguments: list[str]) -> int:
    args = command_line().parse_args(arguments)
    found: list[Damage] = []
    try:
        if faults := faults_of(args):
            raise ValueError("; ".join(faults))
        for path in args.files:
            for damage in measure(path, args):
                found.append(damage)
                print(" ".join(f"{key}:{value}" for key, value in asdict(damage).items()), flush=True)
    except (ValueError, OSError) as fault:
        print(f"robustness.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    return export_verbs.publish([asdict(damage) for damage in found], table(found, args), args.output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
