"""Does any export profit from a low rank of the weights at equal bytes? The falsifier of MUON_VARIANT=numuon.

    python scripts/low_rank.py CHECKPOINT... --data DIR --tokenizer MODEL [--rates 1 2 3 4] [-o OUT.json]

For the matrices of each role and each rate, in bits a weight, two files by the rd exporter at equal bytes: the matrices
themselves, and their best factors of some rank. With costs of Kronecker form, rows (out,) and the inputs' moment L L^T, the
factors that lose least come from the SVD of diag(rows)^0.5 W L = U S V^T; an error in either factor then has costs of that
form too, exactly, so that the exporter's water-filling and error feedback fit them as they fit any matrix. All of --ranks,
shares of full rank, are tried, and the best one stands for low rank. Losses are export.expected_loss, bytes those of a
file's streams, without frame and header.

A cell of the table: bits a weight that low rank takes more than rd for the same loss, by the law that loss falls by 4 a bit
(negative: low rank wins; where its factors, at most 9 bits a weight, cannot use all the bytes, the law flatters it); the
rank that does so; and what truncation to that rank loses with factors that have no errors,
as a share of all that rd loses. Where that share alone is above 1, no quantiser of the factors can win at that rank.
"""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

import export
import export_verbs
from compare_exports import Subject
from export import ExportOptions, Statistics, Term
from falsifiers import role_of
from size_gauge import ranks

Terms = Mapping[str, Sequence[Term]]
Row = dict[str, Any]
OUTER = ("frame", "header", "checksum")     # parts of a file that hold no weights


@dataclass(frozen=True)
class Factors:
    """All directions of one matrix (out, in), the most costly to lose first; `values` (n,) are the singular values."""
    left: Tensor        # (out, n)
    right: Tensor       # (n, in)
    values: Tensor
    rows: Tensor        # (out,) costs, and with them
    moment: Tensor      # (in, in)

    @classmethod
    def of(cls, w: Tensor, terms: Sequence[Term]) -> Factors:
        cost = export.curvature(w.double().numpy(), terms)
        rows, moment = torch.from_numpy(cost.rows), torch.from_numpy(cost.moment)
        root, factor = rows.sqrt()[:, None], torch.linalg.cholesky(moment)
        u, values, vh = torch.linalg.svd(root * w.double() @ factor, full_matrices=False)
        right = torch.linalg.solve_triangular(factor, vh, upper=False, left=False)
        half = values.clamp_min(1e-30).sqrt()
        return cls(u * half / root, half[:, None] * right, values, rows, moment)

    def cut(self, rank: int) -> tuple[dict[str, Tensor], dict[str, tuple[Term, ...]]]:
        """The two factors of a rank, and what errors in each of them cost while the other has none."""
        state = {"left": self.left[:, :rank].float().contiguous(), "right": self.right[:rank].float().contiguous()}
        values = self.values[:rank]
        terms = {"left": (Term(self.rows, values.diag().float()),), "right": (Term(values, self.moment.float()),)}
        return state, terms


def coded(state: Mapping[str, Tensor], terms: Terms, bits: float, states: int) -> tuple[int, dict[str, Tensor]]:
    """(bytes, what a reader gets) of an rd file that takes `bits` a weight."""
    statistics = Statistics(export.weights_digest(state), 0, {name: tuple(uses) for name, uses in terms.items()})
    options = ExportOptions(export_scheme="rd", export_bits=min(bits, export.FINEST_BITS), tcq_states=states)
    made = export.encode_artifact(state, {}, options, statistics=statistics)
    nbytes = sum(size for part, size in made.report.parts.items() if part not in OUTER)
    return nbytes, {name: export.restore(s.row, s.values) for name, s in made.tensors.items()}


def total_loss(state: Mapping[str, Tensor], restored: Mapping[str, Tensor], terms: Terms) -> float:
    """Expected loss of all matrices, nats a token."""
    return sum(export.expected_loss(w.float() - restored[name], terms[name]) for name, w in state.items())


def truncated(factors: Mapping[str, Factors], share: float) -> tuple[dict[str, Tensor], Terms, dict[str, Tensor]]:
    """(state of the factors, their terms, their products) at a share of full rank."""
    state, terms, products = {}, {}, {}
    for name, f in factors.items():
        parts, costs = f.cut(max(1, round(share * len(f.values))))
        state |= {f"{name}.{side}": t for side, t in parts.items()}
        terms |= {f"{name}.{side}": uses for side, uses in costs.items()}
        products[name] = parts["left"] @ parts["right"]
    return state, terms, products


def compare(state: Mapping[str, Tensor], terms: Terms, rate: float, shares: Sequence[float], states: int) -> Iterator[Row]:
    """A row for each rank: low rank against rd at `rate` bits a weight of these matrices. There is none where rd loses
    nothing, as before a training, nor for a rank whose factors cannot be as coarse as they would have to be.
    """
    weights = sum(w.numel() for w in state.values())
    own_bytes, restored = coded(state, terms, rate, states)
    own_loss = total_loss(state, restored, terms)
    if own_loss == 0:
        return
    factors = {name: Factors.of(w, terms[name]) for name, w in state.items()}
    for share in shares:
        parts, costs, products = truncated(factors, share)
        try:
            nbytes, restored = coded(parts, costs, rate * weights / sum(t.numel() for t in parts.values()), states)
        except export.ArtifactError:
            continue
        loss = total_loss(state, {name: restored[f"{name}.left"] @ restored[f"{name}.right"] for name in state}, terms)
        yield {"rate": rate, "share": share, "rd_bytes": own_bytes, "rd_nats": own_loss, "bytes": nbytes, "nats": loss,
               "truncation_nats": total_loss(state, products, terms),
               "excess_bits": 0.5 * math.log2(loss / own_loss) + 8 * (nbytes - own_bytes) / weights}


def measure(subject: Subject, args: argparse.Namespace) -> Iterator[Row]:
    """Every role, rate and rank of one checkpoint."""
    terms, roles = subject.statistics().terms, dict[str, dict[str, Tensor]]()
    for name in export.matrices(export.shapes_of(subject.state)):
        roles.setdefault(role_of(name)[0], {})[name] = subject.state[name].float()
    for role, state in roles.items():
        gauges = np.mean([[float(g) for g in ranks(w)] + [min(w.shape)] for w in state.values()], 0)
        for rate in args.rates:
            for row in compare(state, {name: terms[name] for name in state}, rate, args.ranks, args.states):
                yield {"checkpoint": subject.path, "role": role, "rank": gauges[0], "stable_rank": gauges[1],
                       "full_rank": gauges[2]} | row


def best_of(rows: Sequence[Row]) -> list[Row]:
    """The rank of each checkpoint, role and rate that does best."""
    found: dict[tuple[str, str, float], Row] = {}
    for row in rows:
        key = row["checkpoint"], row["role"], row["rate"]
        if key not in found or row["excess_bits"] < found[key]["excess_bits"]:
            found[key] = row
    return list(found.values())


def cell(row: Row) -> str:
    return (f"{row['excess_bits']:+.2f} (rank {row['share']:.0%}, truncation "
            f"{row['truncation_nats'] / row['rd_nats']:.2f})")


def table(rows: Sequence[Row], rates: Sequence[float]) -> Iterator[str]:
    best = best_of(rows)
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in best):
        yield f"| {checkpoint} | full, rank, stable rank | {' | '.join(f'{rate:g} bits' for rate in rates)} |"
        yield "|---|---" + "|---" * len(rates) + "|"
        for role in dict.fromkeys(row["role"] for row in best):
            own = {row["rate"]: row for row in best if (row["checkpoint"], row["role"]) == (checkpoint, role)}
            if own:
                one = next(iter(own.values()))
                yield (f"| {role} | {one['full_rank']:.0f}, {one['rank']:.0f}, {one['stable_rank']:.1f} | "
                       f"{' | '.join(cell(own[rate]) if rate in own else '-' for rate in rates)} |")
        yield ""
    won = [row for row in best if row["excess_bits"] < 0]
    for row in won:
        yield f"low rank wins: {row['checkpoint']} {row['role']} at {row['rate']:g} bits by {-row['excess_bits']:.3f} bits"
    yield f"low_rank_better:{len(won)} of:{len(best)}"


def command_line() -> argparse.ArgumentParser:
    parser = export_verbs.OneLineParser(prog="low_rank.py", description="Low rank against rd at equal bytes.")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("-o", "--output", type=export_verbs.output_path, metavar="OUT.json")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0], metavar="BITS", help="a weight")
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5, 0.75, 1.0], metavar="SHARE")
    parser.add_argument("--states", type=int, default=8, choices=(0, *export.TRELLISES), help="of the trellis")
    return parser


def main(arguments: list[str]) -> int:
    args = command_line().parse_args(arguments)
    try:
        for flag, values, most in (("--rates", args.rates, export.FINEST_BITS), ("--ranks", args.ranks, 1.0)):
            if wrong := [value for value in values if not 0 < value <= most]:
                raise ValueError(f"{flag} must be above 0 and at most {most:g}, got {', '.join(f'{v:g}' for v in wrong)}")
        subjects = [Subject(path, *export_verbs.read_with_meta(path, []), args) for path in args.checkpoints]
        rows = []
        for row in (row for subject in subjects for row in measure(subject, args)):
            rows.append(row)
            print(" ".join(f"{k}:{v:.5g}" if isinstance(v, float) else f"{k}:{v}" for k, v in row.items()), flush=True)
    except (ValueError, OSError) as fault:
        print(f"low_rank.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    return export_verbs.publish(rows, table(rows, args.rates), args.output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
