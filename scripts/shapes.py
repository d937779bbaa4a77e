"""Shapes of equal bytes: models whose artifact and packed code fill a cap to within 1 %, and what they cost to train.

    python scripts/shapes.py --iso-bytes 16000000 --scheme int8_zlib --bits 8 6
    python scripts/shapes.py --iso-bytes 16000000 --scheme rd --bits 3.5 --vocab 1024,4096 --layers 8:14 --toml iso.toml
    python scripts/shapes.py --iso-bytes 1000000 --scheme rd --bits 3.5 --recipe mini_cpu --layers 2:8 --measure
    python scripts/shapes.py --iso-bytes 16000000 --scheme rd --bits 3 --device logs/RUN_ID       # that run's pace

The size is that of `export.py predict`: from shapes and options, for trained weights, INT8_SCALE_FLOOR=0. A depth lists
its shapes by operations a token, fewest first; --top takes the first of each depth, then the second, and so on. That spreads
a sweep and forecasts no quality. --bits are the widths of matrices for int8_zlib (6/8: 6 for weights, 8 for embedding and
head), EXPORT_BITS for rd. --toml writes the list as a spec for scripts/sweep.py.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from export import ExportOptions, write_atomically  # noqa: E402
from export_verbs import OneLineParser  # noqa: E402  (neither folder is on the path before)
from flops import MACHINES, Machine, machine, machine_here, step_flops, train_flops  # noqa: E402
from prediction import predict_artifact_bytes, weights_of  # noqa: E402
from recipe import read_recipe, recipe_path  # noqa: E402
from train_gpt import Config, ModelShape, code_bytes, tensor_shapes  # noqa: E402

FILL = 0.99                             # of the cap that a proposal takes at least
WIDTHS = range(64, 2049, 8)             # tensor cores want rows of whole 16 bytes
HEAD_WIDTHS = range(32, 129, 8)         # what flash kernels take without padding
CALIBRATION_TOKENS = 524_288            # for rd where the recipe names none: a micro-batch of each of 8 ranks


@dataclass(frozen=True)
class Grid:
    """What is searched beside the width; a product of all."""
    layers: Sequence[int] = range(6, 17)
    vocabularies: Sequence[int] = (1024,)
    mlp_mults: Sequence[int] = (2, 3, 4)
    kv_groups: Sequence[int] = (1, 2, 4)        # query heads for each key and value head
    sharing: Sequence[int] = (1,)               # layers that use one block's weights; divides the layers


@dataclass(frozen=True)
class Proposal:
    """A shape that fills the cap under an export."""
    shape: ModelShape
    options: ExportOptions
    weights: int
    total_bytes: int            # predicted artifact and packed code

    @property
    def name(self) -> str:
        s = self.shape
        shared = f"_u{s.num_unique_blocks}" if s.num_unique_blocks else ""
        return (f"l{s.num_layers}_d{s.model_dim}_h{s.num_heads}_k{s.num_kv_heads}_m{s.mlp_mult}{shared}_v{s.vocab_size}"
                f"_b{bits_text(self.options).replace('/', '-')}")


def bits_text(options: ExportOptions) -> str:
    """The --bits that give these options."""
    if options.export_scheme == "rd":
        return f"{options.export_bits:g}"
    matrix, embedding = options.weight_quantization_bits, options.embed_quantization_bits
    return f"{matrix}" if matrix == embedding else f"{matrix}/{embedding}"


def with_bits(options: ExportOptions, text: str) -> ExportOptions:
    """Options whose steps follow from these --bits alone. Raises ValueError."""
    rd = options.export_scheme == "rd"
    try:
        matrix, _, embedding = text.partition("/")
        options = replace(options, export_bits=float(text)) if rd else replace(
            options, weight_quantization_bits=int(matrix), embed_quantization_bits=int(embedding or matrix),
            int8_scale_floor=0.0)
    except ValueError:
        wanted = "a number" if rd else "a whole number, or two as 6/8"
        raise ValueError(f"--bits for {options.export_scheme} must be {wanted}, got {text!r}") from None
    if faults := options.problems() or ["EXPORT_BITS must be above 0"] * (rd and options.export_bits == 0):
        raise ValueError(f"--bits {text}: {'; '.join(faults)}")
    if options.solves and not rd:
        raise ValueError(f"CAP_POLICY={options.cap_policy} with EXPORT_ALLOCATE={options.export_allocate} fits every shape"
                         " to the cap, whatever its bytes: start from a recipe without them")
    return options


def heads_for(width: int, kv_group: int) -> int | None:
    """The number of query heads whose width is nearest 64, the baseline's; None where no width of HEAD_WIDTHS fits."""
    fitting = [width // head for head in HEAD_WIDTHS if width % head == 0 and (width // head) % kv_group == 0]
    return min(fitting, key=lambda heads: (abs(math.log(width / heads / 64)), heads), default=None)


@lru_cache(maxsize=4096)
def weight_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """`tensor_shapes` of all blocks from that of one, because they are alike and a search asks a thousand times."""
    one = tensor_shapes(replace(shape, num_unique_blocks=1))
    return {name.replace("blocks.0.", f"blocks.{block}.", 1): size for name, size in one.items()
            for block in range(shape.unique_blocks if name.startswith("blocks.0.") else 1)}


def proposals(cap_bytes: int, options: ExportOptions, *, code_bytes: int = 0, base: ModelShape | None = None,
              grid: Grid | None = None) -> list[Proposal]:
    """Every shape of the grid whose predicted artifact and code take FILL to all of `cap_bytes`, in the grid's order; what
    the grid does not vary is `base`'s. Near 65,536 weights a tensor, where INT8_KEEP_FLOAT_MAX_NUMEL makes wider models
    smaller, one may be missed.
    """
    found: list[Proposal] = []
    base, grid = base or ModelShape(), grid or Grid()
    for layers, vocabulary, mult, group, share in product(
            grid.layers, grid.vocabularies, grid.mlp_mults, grid.kv_groups, grid.sharing):
        if layers % share == 0:
            deep = replace(base, num_layers=layers, vocab_size=vocabulary, mlp_mult=mult,
                           num_unique_blocks=0 if share == 1 else layers // share)
            family = [replace(deep, model_dim=width, num_heads=heads, num_kv_heads=heads // group)
                      for width in WIDTHS if (heads := heads_for(width, group))]
            found += filling(cap_bytes, options, code_bytes, [shape for shape in family if not shape.shape_problems()])
    return found


def filling(cap_bytes: int, options: ExportOptions, code_bytes: int, family: Sequence[ModelShape]) -> Iterator[Proposal]:
    """Those of a family, narrowest first, that fill the cap; the size grows with the width."""
    uncapped = replace(options, artifact_cap_bytes=0)           # rd would fit all larger models to the cap

    def total_bytes(shape: ModelShape) -> int:
        return predict_artifact_bytes(weight_shapes(shape), uncapped, code_bytes) + code_bytes

    for shape in family[bisect_left(family, FILL * cap_bytes, key=total_bytes):]:
        total = total_bytes(shape)
        if total > cap_bytes:
            return
        yield Proposal(shape, replace(options, artifact_cap_bytes=cap_bytes), weights_of(weight_shapes(shape)), total)


def spread_over_depths(found: Iterable[Proposal], top: int, seq_len: int) -> list[Proposal]:
    """At most `top`: of every depth the shape of fewest operations a token, then of every depth the second, and so on."""
    def cost(proposal: Proposal) -> tuple[int, int, str]:
        return proposal.shape.num_layers, train_flops(proposal.shape, seq_len), proposal.name

    ranks, ranked = Counter[int](), list[tuple[int, tuple[int, int, str], Proposal]]()
    for proposal in sorted(found, key=cost):
        ranks[proposal.shape.num_layers] += 1
        ranked.append((ranks[proposal.shape.num_layers], cost(proposal), proposal))
    return sorted((proposal for _, _, proposal in sorted(ranked, key=lambda entry: entry[:2])[:top]), key=cost)


# ----------------------------------------------------------------------------------------------------------------------
# Output: a table for people, a spec for scripts/sweep.py.
# ----------------------------------------------------------------------------------------------------------------------


def arm_knobs(proposal: Proposal, base: Config) -> dict[str, Any]:
    """The knobs that make the proposal of `base`: those of its shape, and of its export where they differ."""
    shape = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "num_unique_blocks", "vocab_size")
    knobs = {name: getattr(proposal.shape, name) for name in shape}
    knobs |= {f.name: value for f in fields(ExportOptions)
              if (value := getattr(proposal.options, f.name)) != getattr(base, f.name)}
    if proposal.options.export_scheme == "rd" and not base.calibration_tokens:
        knobs["calibration_tokens"] = CALIBRATION_TOKENS
    return {name.upper(): int(value) if isinstance(value, bool) else value for name, value in knobs.items()}


def table(found: Sequence[Proposal], base: Config, device: Machine) -> list[str]:
    """One line a proposal: bytes, operations, and what the device makes of them."""
    seconds = base.max_wallclock_seconds or 600.0
    width = max(len(p.name) for p in found)
    steps_head = f"steps in {seconds:g} s"
    rows = [f"{'shape':<{width}}  {'weights':>11}  {'bytes':>11}  of cap  MFLOP/token   ms/step  {steps_head}  Mtokens"]
    for p in found:
        cfg = replace(base, **asdict(p.shape))
        step_s = device.step_s(step_flops(cfg))
        steps = math.floor(seconds / step_s)
        rows.append(
            f"{p.name:<{width}}  {p.weights:>11,}  {p.total_bytes:>11,}  {p.total_bytes / p.options.artifact_cap_bytes:6.2%}"
            f"  {train_flops(p.shape, base.train_seq_len) / base.train_seq_len / 1e6:11.1f}  {1000 * step_s:8.1f}"
            f"  {steps:>{len(steps_head)}}  {steps * base.train_batch_tokens / 1e6:7,.1f}")
    return rows


def spec(found: Sequence[Proposal], base: Config, recipe: str, seeds: Sequence[int], name: str) -> str:
    """The list as a TOML file of scripts/sweep.py; the control is the recipe's own shape where it is among them."""
    control = next((p for p in found if p.shape == base.shape), found[0])
    text = [f"name = {json.dumps(name)}", f"base = {json.dumps(recipe)}", f"seeds = {json.dumps(list(seeds))}",
            f"control = {json.dumps(control.name)}"]
    for p in found:
        text += ["", f'[arms."{p.name}"]' if "." in p.name else f"[arms.{p.name}]"]
        text += [f"{knob} = {json.dumps(value)}" for knob, value in arm_knobs(p, base).items()]
        if p.shape.vocab_size != base.vocab_size:
            text.append(f"# DATA_PATH and TOKENIZER_PATH of a tokenizer of {p.shape.vocab_size} tokens belong here")
    return "\n".join(text) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Command line.
# ----------------------------------------------------------------------------------------------------------------------


def numbers(text: str) -> tuple[int, ...]:
    """1024,4096 as whole numbers above 0, each once."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"wanted whole numbers above 0, as 1024,4096, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def span(text: str) -> range:
    """6:16 as 6 to 16, both included."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 2 <= int(low) <= int(high)):
        raise argparse.ArgumentTypeError(f"wanted LOW:HIGH, both at least 2, got {text!r}")
    return range(int(low), int(high) + 1)


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(prog="shapes.py", description="Shapes whose artifact and code fill a cap, ready to sweep.")
    made.add_argument("--iso-bytes", type=numbers, required=True, metavar="CAP", help="decimal bytes of artifact and code")
    made.add_argument("--scheme", choices=("int8_zlib", "rd"), required=True, help="EXPORT_SCHEME")
    made.add_argument("--bits", nargs="+", metavar="B", help="int8_zlib: of all matrices, or 6/8 of weights and embedding"
                      " (default 8); rd: EXPORT_BITS")
    made.add_argument("--vocab", type=numbers, metavar="N,...", help="default: the recipe's")
    made.add_argument("--mlp", type=numbers, default=Grid.mlp_mults, metavar="N,...", help="MLP_MULT, default 2,3,4")
    made.add_argument("--kv-groups", type=numbers, default=Grid.kv_groups, metavar="N,...",
                      help="query heads for each key and value head, default 1,2,4")
    made.add_argument("--sharing", type=numbers, default=Grid.sharing, metavar="N,...",
                      help="layers that use one block's weights, default 1")
    made.add_argument("--layers", type=span, default=Grid.layers, metavar="LOW:HIGH", help="default 6:16")
    device = made.add_mutually_exclusive_group()
    device.add_argument("--device", default="h100", help=f"{', '.join(MACHINES)} or a run's folder: its pace (default h100)")
    device.add_argument("--measure", action="store_true",
                        help="time steps on this machine, of the shape of scripts/bench.py or of the environment's knobs")
    made.add_argument("--recipe", default="baseline_8xh100", help="what a proposal does not change (default %(default)s)")
    made.add_argument("--top", type=numbers, default=(20,), metavar="N", help="list so many, default 20")
    made.add_argument("--toml", type=Path, metavar="FILE", help="write a spec for scripts/sweep.py")
    made.add_argument("--seeds", type=numbers, default=(1337, 1338, 1339), metavar="N,...", help="of that spec")
    return made


def search(args: argparse.Namespace, base: Config, cap_bytes: int, top: int) -> tuple[list[Proposal], int]:
    """The proposals to list, and how many there are. Raises ValueError."""
    if args.scheme == "rd" and not args.bits:
        raise ValueError("rd fits whatever bits remain: --bits must name those that shapes of equal bytes shall have")
    same = base.export_scheme == args.scheme
    options = base.export_options if same else ExportOptions(export_scheme=args.scheme)
    grid = Grid(args.layers, args.vocab or (base.vocab_size,), args.mlp, args.kv_groups, args.sharing)
    widths = dict.fromkeys(with_bits(options, text) for text in args.bits or ["8"])
    found = [p for chosen in widths
             for p in proposals(cap_bytes, chosen, code_bytes=code_bytes(), base=base.shape, grid=grid)]
    if not found:
        raise ValueError(f"no shape of the grid fills {FILL:.0%} to all of {cap_bytes} bytes: widen --layers, --mlp,"
                         " --kv-groups or --bits")
    return spread_over_depths(found, top, base.train_seq_len), len(found)


def base_config(recipe: str) -> Config:
    """The configuration of a recipe. Raises ValueError."""
    path = recipe_path(recipe)
    base, problems = Config.parse(read_recipe(path))
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return base


def check_arms(found: Iterable[Proposal], base: Config, recipe: str) -> None:
    """Raises ValueError where the recipe with an arm's knobs is no configuration."""
    knobs = read_recipe(recipe_path(recipe))
    for p in found:
        if problems := Config.parse(knobs | {name: str(value) for name, value in arm_knobs(p, base).items()})[1]:
            raise ValueError(f"recipe {recipe} cannot be the base of {p.name}: {'; '.join(problems)}")


def main(arguments: list[str]) -> int:
    """Prints the table and writes the spec; every fault is one line and exit code 2, with nothing written."""
    args = parser().parse_args(arguments)
    (cap_bytes, *_), (top, *_) = args.iso_bytes, args.top
    try:
        base = base_config(args.recipe)
        device = machine_here() if args.measure else machine(args.device)
        found, count = search(args, base, cap_bytes, top)
        check_arms(found, base, args.recipe)
        if args.toml:
            text = spec(found, base, args.recipe, args.seeds, f"iso_{cap_bytes}_{args.scheme}")
            write_atomically(args.toml, text.encode())
    except (ValueError, OSError) as fault:
        print(f"shapes.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    print(f"{len(found)} of {count} shapes of the grid that are predicted to fill {FILL:.0%} to all of {cap_bytes:,} bytes,"
          f" packed code of {code_bytes():,} included")
    print(f"base {args.recipe}: {base.train_batch_tokens:,} tokens a step, sequences of {base.train_seq_len:,}")
    print(f"device {device.name}: {device.flops_per_s / 1e12:.4g} TFLOP/s, {device.source}")
    print("\n".join(table(found, base, device)))
    if args.toml:
        print(f"wrote {args.toml}: {len(found)} arms, {len(args.seeds)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
