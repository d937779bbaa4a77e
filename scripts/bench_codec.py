"""Times the rate-distortion export stage by stage on synthetic weights; needs no model and no data.

    python scripts/bench_codec.py --weights 2000000 --states 8            # seconds
    python scripts/bench_codec.py --states 0 8 64 --threads 2             # 36,000,000 weights, minutes

Weights are normals with lognormal scales of rows and columns, in the shapes of 11 layers with keys of half the width, an
MLP of 4 x the width and a vocabulary of 16 x; moments are those of mixed features with a decaying spectrum. Prints
`key:value` lines: seconds of each stage, bytes of the weights' symbols and beside them, and by how much the positions'
stream is longer than what the coder's own shares say (coder_overhead).
"""
from __future__ import annotations

import argparse
import cProfile
import math
import pstats
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (the repository's root is not on the path before)
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import export  # noqa: E402
import ledger  # noqa: E402

LAYERS, VOCABULARY = 11, 16             # blocks; tokens of the vocabulary for each channel of the width
WEIGHTS_A_SQUARE = 11 * LAYERS + VOCABULARY         # of a width x width matrix, in all
SPREAD = 0.5                            # standard deviation of the logarithms of scales
Result = TypeVar("Result")


def shapes_for(weights: int) -> dict[str, tuple[int, ...]]:
    """Tensors of about so many weights; the width is a multiple of 8."""
    width = max(8, 8 * round(math.sqrt(weights / WEIGHTS_A_SQUARE) / 8))
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (VOCABULARY * width, width)}
    for layer in range(LAYERS):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in {
            "attn.c_q.weight": (width, width), "attn.c_k.weight": (width // 2, width),
            "attn.c_v.weight": (width // 2, width), "attn.proj.weight": (width, width),
            "mlp.fc.weight": (4 * width, width), "mlp.proj.weight": (width, 4 * width),
            "attn_scale": (width,), "mlp_scale": (width,), "resid_mix": (2, width)}.items()}
    return shapes


def lognormal(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.exp(SPREAD * rng.standard_normal(n)).astype(np.float32)


def synthetic_state(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, Tensor]:
    """Normals of standard deviation 0.03 x the scales of their row and column; controls around 1."""
    state = {}
    for name, shape in shapes.items():
        w = rng.standard_normal(shape, np.float32)
        scales = lognormal(shape[0], rng)[:, None] * lognormal(shape[-1], rng) if name.endswith("weight") else None
        state[name] = torch.from_numpy(1 + w / 9 if scales is None else 0.03 * w * scales)
    return state


def synthetic_terms(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[export.Term, ...]:
    """One use with lognormal rows, and the moment of mixed features whose energies fall as 1 / rank."""
    width = shape[1]
    mixing = rng.standard_normal((width, width), np.float32) / np.sqrt(np.arange(1, width + 1, dtype=np.float32))[:, None]
    moment = torch.from_numpy(mixing.T @ mixing + 0.01 * np.eye(width, dtype=np.float32))
    return (export.Term(torch.from_numpy(1e-4 * lognormal(shape[0], rng) ** 2), moment),)


def timed(action: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and its seconds."""
    t0 = time.perf_counter()
    return action(), time.perf_counter() - t0


def say(**values: Any) -> None:
    """One line; floats with four digits after the point."""
    shown = {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in values.items()}
    print(" ".join(f"{key}:{value}" for key, value in shown.items()), flush=True)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def profiled(stage: str, action: Callable[[], Result]) -> Result:
    """Prints where the time of a stage goes: the functions with most of it."""
    profile = cProfile.Profile()
    result = profile.runcall(action)
    print(f"profile:{stage}")
    pstats.Stats(profile).sort_stats("tottime").print_stats(14)
    return result


def measure(state: dict[str, Tensor], prepared: list[export.Prepared], bits: float, states: int, profile: bool) -> None:
    """Placing, the file's bytes, coding and decoding at one number of states."""
    options = export.ExportOptions(export_scheme="rd", export_bits=bits, tcq_states=states)
    dial = export.dial_for(prepared, bits * sum(p.columns.size for p in prepared))
    prices = export.SymbolModel(int(states > 0)).prices()
    placed, place_s = timed(lambda: export.in_threads(
        lambda p: export.stored_on_grid(state[p.name], p, dial, options, prices), prepared))
    rest = [export.store(name, w, export.small_choice(w), options) for name, w in state.items()
            if not name.endswith("weight")]
    tensors = {s.row.name: s for s in sorted([*placed, *rest], key=lambda s: s.row.name)}
    say(states=states, place_s=place_s, **measure_coder(tensors))
    symbols = ledger.symbol_bits([s.row for s in tensors.values()], {name: s.values for name, s in tensors.items()})
    codes, side = (sum(n for (_, part), n in symbols.items() if part == wanted) / 8 for wanted in ("codes", "steps"))
    whole = export.assembled(dict(sorted(state.items())), {}, options, tensors)
    file_bytes, coded = len(whole.data), whole.report.parts["positions"]
    say(states=states, file_bytes=file_bytes, bits_per_weight=8 * file_bytes / sum(p.columns.size for p in prepared),
        weight_symbol_bytes=round(codes), side_symbol_bytes=round(side), other_bytes=file_bytes - coded,
        beside_bytes=round(file_bytes - codes), coder_overhead=coded / (codes + side) - 1, peak_gib=peak_gib())
    if profile:
        profiled("coding", lambda: measure_coder(tensors))


def measure_whole(state: dict[str, Tensor], terms: Mapping[str, tuple[export.Term, ...]], bits: float, states: int) -> None:
    """A whole export to a size, the search for the dial included, and its reading."""
    options = export.ExportOptions(export_scheme="rd", export_bits=bits, tcq_states=states)
    statistics = export.Statistics(export.weights_digest(state), 1, terms)
    made, export_s = timed(lambda: export.encode_artifact(state, {}, options, statistics=statistics))
    _, read_s = timed(lambda: export.decode_artifact(made.data))
    say(states=states, export_s=export_s, read_s=read_s, file_bytes=len(made.data), most_bytes=made.report.planned_bytes,
        peak_gib=peak_gib())


def measure_coder(tensors: Mapping[str, export.Stored]) -> dict[str, float]:
    """Seconds of coding, its model's and its arithmetic's parts, and of decoding, which must find the same."""
    plan, values = [s.row for s in tensors.values()], {name: s.values for name, s in tensors.items()}
    writer = export.SymbolWriter()
    _, model_s = timed(lambda: export.code_grid(writer, plan, values, None))
    body, rans_s = timed(writer.encoded)
    found = {row.name: {"bases": values[row.name]["bases"]} for row in plan if row.codec == "grid"}
    _, decode_s = timed(lambda: decode(body, plan, found))
    same = all(np.array_equal(own[kind], values[name][kind]) for name, own in found.items() for kind in own)
    assert same, "the decoder found other positions"
    return {"encode_s": model_s + rans_s, "encode_model_s": model_s, "encode_rans_s": rans_s, "decode_s": decode_s}


def decode(body: bytes, plan: Sequence[export.PlanRow], values: Mapping[str, dict[str, np.ndarray]]) -> None:
    """Fills in `values`, as parse_grid."""
    reader = export.SymbolReader(body, 0)
    export.code_grid(reader, plan, values, 0)
    reader.finish()


def main(arguments: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(description="Times the rate-distortion export on synthetic weights.")
    parser.add_argument("--weights", type=int, default=36_000_000)
    parser.add_argument("--states", type=int, nargs="+", default=[8], choices=(0, *export.TRELLISES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=float, default=3.0, help="of a weight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="also whole exports to that size, and their reading")
    parser.add_argument("--profile", action="store_true", help="coding and decoding once more under cProfile")
    args = parser.parse_args(list(arguments))
    torch.set_num_threads(args.threads)
    rng, shapes = np.random.default_rng(args.seed), shapes_for(args.weights)
    state = synthetic_state(shapes, rng)
    terms = {name: synthetic_terms(shape, rng) for name, shape in export.matrices(shapes).items()}
    say(weights=sum(w.numel() for w in state.values()), matrices=len(terms), width=shapes["tok_emb.weight"][1],
        threads=args.threads, bits=args.bits, compiled=export.compiled(export.best_path) is not None)
    tiny = export.prepare("tiny", torch.ones(8, 8), synthetic_terms((8, 8), rng))
    for states in args.states:          # compiles, which takes seconds and belongs to no stage
        export.on_grid(tiny, 0.0, states, 0.1, export.SymbolModel(int(states > 0)).prices())
    prepared, prepare_s = timed(lambda: export.in_threads(
        lambda name: export.prepare(name, state[name], terms[name]), list(terms)))
    say(prepare_s=prepare_s, peak_gib=peak_gib())
    for states in args.states:
        measure(state, prepared, args.bits, states, args.profile)
    del prepared
    for states in args.states if args.whole else ():
        measure_whole(state, terms, args.bits, states)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
