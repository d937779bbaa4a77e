"""The sensitivity map: what quantising each matrix alone, and each family of matrices, costs a model in nats per token.

    python scripts/sensitivity.py final_model.safetensors --data DIR --tokenizer MODEL -o map       # map.json, .csv, .png
    python scripts/sensitivity.py final_model.safetensors --data DIR --tokenizer MODEL -o map --split train
    python scripts/sensitivity.py final_model.safetensors --calibration-tokens 65536 --cheap ...  # the estimate alone

Each matrix alone, then each family, is stored in three ways and the model evaluated with what a reader would get back:

    points       row-wise codes of each of --bits, no floor under the steps, everything else in float
    residual     the same with a correction of --residual-rank, int8 factors, fitted to the plain squared error
    keep_float   everything else at --base-bits, it alone in half precision

`nats` is the increase of the loss over the model in float; for keep_float the decrease under that with everything at
--base-bits. `relative_error` is ||W - Q||^2 / ||W||^2. `bytes` are those of the matrix after entropy coding.
`nats_per_byte` is nats over the bytes by which it differs from the model it is compared with: half precision for points
and residual, --base-bits for keep_float; null where both are equal. `expected_nats` is the second-order estimate from
--calibration-tokens, null without.

Every measurement goes at once into OUT.cache.jsonl, keyed by weights, tokens and device: an interrupted run goes on where it
was. Only a map of --split train may plan an artifact (EXPORT_ALLOCATE=sensitivity).
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (the repository's root is not on the path before)
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import export  # noqa: E402
import export_verbs  # noqa: E402
import int8_plan  # noqa: E402
import train_gpt  # noqa: E402

OPTIONS = export.ExportOptions(int8_scale_floor=0.0)
WIDTHS = range(2, 9)
MAX_HALF = 65_504.0             # the largest fp16: beyond it neither half precision nor a scale holds a weight
BATCH_TOKENS = 65_536           # as `export.py eval`, so that base_loss is its val_loss
PAIRING_TOKENS = 1 << 19        # enough for train_gpt.check_pairing
FAMILIES = {                    # in this order; names by their ends
    "embedding": "tok_emb.weight", "attn q": "attn.c_q.weight", "attn k": "attn.c_k.weight", "attn v": "attn.c_v.weight",
    "attn proj": "attn.proj.weight", "mlp fc": "mlp.fc.weight", "mlp proj": "mlp.proj.weight", "head": "lm_head.weight",
    "other": "",
}


class Form(NamedTuple):
    """How a matrix is stored: codes of so many bits, 0 = half precision, with a correction of a rank, 0 = none."""
    bits: int
    rank: int = 0


class Trial(NamedTuple):
    """A changed model: some matrices in one form, all others at so many bits, 0 = float."""
    names: tuple[str, ...]
    form: Form
    others_bits: int = 0


HALF = Form(0)
FLOAT_MODEL = Trial((), HALF)


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Cache:
    """Values by content, a JSON line each, on disk as soon as they exist."""

    def __init__(self, path: Path):
        data = path.read_bytes() if path.exists() else b""
        self.path, self.values = path, {}
        self.cut = bool(data) and not data.endswith(b"\n")      # the last write was interrupted: its line is lost
        for line in data.split(b"\n"):
            try:
                entry = json.loads(line)
                self.values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, facts: Sequence[Any], compute: Callable[[], Any]) -> Any:
        key = digest_of(json.dumps(facts).encode())
        if key not in self.values:
            value = compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self.cut + json.dumps({"key": key, "of": facts[0], "value": value}) + "\n")
            self.cut, self.values[key] = False, value
        return self.values[key]


@dataclass(frozen=True)
class Subject:
    """The weights under measurement, and what the command line gave with them."""
    matrices: Mapping[str, Tensor]      # fp of any kind, in the order of the report
    digest: str
    cache: Cache
    statistics: export.Statistics | None
    statistics_digest: str


@dataclass(frozen=True)
class Evaluation:
    """How the loss of a changed model is found, and all that it depends on beside the weights."""
    facts: tuple[Any, ...]
    loss: Callable[[Mapping[str, Tensor]], float]
    tokens: int


# ----------------------------------------------------------------------------------------------------------------------
# One matrix: stored in a form, its bytes, its error, the estimate.
# ----------------------------------------------------------------------------------------------------------------------


def matrices_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every float matrix that is no control tensor, blocks in the order of their numbers. Raises ValueError."""
    found = {name: t for name, t in state.items() if t.ndim == 2 and t.is_floating_point() and not export.is_control(name)}
    unfit = [name for name, w in found.items() if not bool((w.abs() <= MAX_HALF).all())]      # NaN too
    if unfit or not found:
        what = f"{', '.join(unfit)} beyond half precision" if unfit else "no float matrix"
        raise ValueError(f"the checkpoint has {what}: nothing to measure")
    return dict(sorted(found.items(), key=lambda item: [int(part) if part.isdigit() else part
                                                        for part in re.split(r"(\d+)", item[0])]))


def family_of(name: str) -> str:
    return next(family for family, end in FAMILIES.items() if name.endswith(end))


def stored_as(name: str, w: Tensor, form: Form) -> export.Stored:
    if not form.bits:
        return export.store(name, w, export.Choice("f16"), OPTIONS)
    plain = export.store(name, w, export.Choice("int", "row", 2 ** (form.bits - 1) - 1), OPTIONS)
    if not form.rank:
        return plain
    error = w.double() - export.restore(plain.row, plain.values).double()
    squared = (export.Term(torch.ones(w.shape[0]), torch.eye(w.shape[1])),)     # statistics must not change a measurement
    a, b = int8_plan.low_rank(error, squared, form.rank, OPTIONS.int8_residual_power_iters)
    return int8_plan.corrected(plain, error, squared, a, b, "int8")


def restored_as(name: str, w: Tensor, form: Form) -> Tensor:
    stored = stored_as(name, w, form)
    return export.restore(stored.row, stored.values)


def coded_bytes(stored: export.Stored) -> int:
    """After entropy coding; the layout is within 0.4 % of the smallest one, in a third of the time of trying all."""
    codes = len(export.pack_codes(stored, ["rows_by_scale"])[2]) if stored.row.codec == "int" else 0
    return codes + sum(len(export.pack_stream([values])[1]) for kind, values in stored.values.items() if kind != "codes")


def cost_of(subject: Subject, name: str, form: Form) -> tuple[int, float, float | None]:
    """(coded bytes, squared relative error, expected nats where there are statistics)."""
    def compute() -> tuple[int, float, float | None]:
        w, stored = subject.matrices[name], stored_as(name, subject.matrices[name], form)
        error = w.double() - export.restore(stored.row, stored.values).double()
        relative = export.sum_squares(error) / max(export.sum_squares(w), 1e-300)
        expected = export.expected_loss(error, subject.statistics.terms[name]) if subject.statistics else None
        return coded_bytes(stored), relative, expected

    nbytes, relative, expected = subject.cache.get(
        (f"cost {name} {label(form)}", subject.digest, subject.statistics_digest), compute)
    return nbytes, relative, expected


def label(form: Form) -> str:
    return f"{form.bits} bits rank {form.rank}" if form.bits else "half"


# ----------------------------------------------------------------------------------------------------------------------
# Losses: every trial of the map, each evaluated once.
# ----------------------------------------------------------------------------------------------------------------------


def trials_of(targets: Sequence[tuple[str, ...]], forms: Sequence[Form], base_bits: int) -> list[Trial]:
    """What a map needs, without repetition (a family may be one matrix)."""
    found = [FLOAT_MODEL, Trial((), HALF, base_bits)]
    for names in targets:
        found += [*(Trial(names, form) for form in forms), Trial(names, HALF, base_bits)]
    return list(dict.fromkeys(found))


def measure(trials: Sequence[Trial], subject: Subject, evaluation: Evaluation) -> dict[Trial, float]:
    """The loss of each trial, nats per token."""
    @functools.cache
    def all_at(bits: int) -> dict[str, Tensor]:
        return {name: restored_as(name, w, Form(bits)) for name, w in subject.matrices.items()}

    def loss(trial: Trial) -> float:
        others = all_at(trial.others_bits) if trial.others_bits else {}
        found = evaluation.loss({**others, **{n: restored_as(n, subject.matrices[n], trial.form) for n in trial.names}})
        if not math.isfinite(found):
            raise ValueError(f"the loss is {found} with {', '.join(trial.names) or 'nothing'} as {label(trial.form)}")
        return found

    losses, plain = {}, not sys.stderr.isatty()
    with train_gpt.progress(len(trials), "sensitivity", True) as bar:
        for done, trial in enumerate(trials, 1):
            what = f"loss {'+'.join(trial.names)} {label(trial.form)}, others {trial.others_bits} bits"
            losses[trial] = subject.cache.get((what, subject.digest, *evaluation.facts), functools.partial(loss, trial))
            bar.update()
            if plain and done * 10 // len(trials) > (done - 1) * 10 // len(trials):
                print(f"measured:{done}/{len(trials)}", flush=True)
    return losses


def read_tokens(data: str, split: str, seq_len: int, max_tokens: int, tokenizer: train_gpt.Tokenizer) -> np.ndarray:
    """The first whole windows of a split and one token more. Raises DataError."""
    stream = train_gpt.TokenStream(train_gpt.read_split(data, split))
    targets = min(max_tokens or stream.size, stream.size - 1) // seq_len * seq_len
    if not targets:
        raise train_gpt.DataError(f"the {split} split in {data} has {stream.size} tokens and --max-tokens is {max_tokens},"
                                  f" one sequence needs {seq_len + 1}")
    train_gpt.check_pairing(data, tokenizer, stream.take(0, min(stream.size, PAIRING_TOKENS)))
    tokens = stream.take(0, targets + 1)
    if tokens.max() >= tokenizer.vocab_size:
        raise train_gpt.DataError(f"the {split} split in {data} holds token {tokens.max()}, of {tokenizer.vocab_size}")
    return tokens


def open_evaluation(args: argparse.Namespace, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Evaluation:
    rt, model, tokenizer = export_verbs.open_model(state, meta, args.tokenizer, args.device)
    seq_len = int(meta["train_seq_len"])
    tokens = read_tokens(args.data, args.split, seq_len, args.max_tokens, tokenizer)
    table, held = train_gpt.byte_table(tokenizer, rt.device), model.state_dict()

    def loss(changed: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            for name, w in changed.items():
                held[name].copy_(w)
            result = train_gpt.evaluate(
                lambda x, y: model(x, y, reduction="none"), tokens, table, rt,
                seq_len=seq_len, batch_tokens=max(BATCH_TOKENS, seq_len))
            for name in changed:
                held[name].copy_(state[name])
        return result.val_loss

    digest = digest_of(tokens.astype("<u2").tobytes())
    facts = (digest, meta["model"], seq_len, args.max_tokens, rt.device.type, str(rt.dtype))
    return Evaluation(facts, loss, tokens.size - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The map: measurements as one JSON object, a table and a picture.
# ----------------------------------------------------------------------------------------------------------------------


def entry(subject: Subject, names: Sequence[str], form: Form, reference: Form, nats: float | None) -> dict[str, Any]:
    """One measurement; the bytes, errors and estimates of several matrices add up."""
    nbytes, relative, expected = zip(*(cost_of(subject, name, form) for name in names), strict=True)
    energies = [export.sum_squares(subject.matrices[name]) for name in names]
    error = sum(r * energy for r, energy in zip(relative, energies, strict=True))
    differing = abs(sum(nbytes) - sum(cost_of(subject, name, reference)[0] for name in names))
    return {
        "bits": form.bits or 16, **({"rank": form.rank} if form.rank else {}),
        "relative_error": relative[0] if len(names) == 1 else error / max(sum(energies), 1e-300),
        "nats": nats, "bytes": sum(nbytes), "nats_per_byte": nats / differing if nats is not None and differing else None,
        "expected_nats": sum(expected) if subject.statistics and form != HALF else None}


def entries(subject: Subject, names: tuple[str, ...], forms: Sequence[Form], base_bits: int,
            losses: Mapping[Trial, float]) -> dict[str, Any]:
    """All that the map says about one matrix or family; without losses only what needs none."""
    found: dict[str, Any] = {"points": [], "residual": []}
    for form in forms:
        nats = losses[Trial(names, form)] - losses[FLOAT_MODEL] if losses else None
        found["residual" if form.rank else "points"].append(entry(subject, names, form, HALF, nats))
    kept = losses[Trial((), HALF, base_bits)] - losses[Trial(names, HALF, base_bits)] if losses else None
    return {**found, "keep_float": entry(subject, names, HALF, Form(base_bits), kept)}


def map_of(subject: Subject, args: argparse.Namespace, evaluation: Evaluation | None) -> dict[str, Any]:
    """Everything measured, in the format that sensitivity_map.read_sensitivity reads."""
    forms = [Form(bits, rank) for rank in sorted({0, args.residual_rank}) for bits in args.bits]
    families: dict[str, tuple[str, ...]] = {}
    for name in sorted(subject.matrices, key=lambda name: list(FAMILIES).index(family_of(name))):
        families[family_of(name)] = (*families.get(family_of(name), ()), name)
    with train_gpt.progress(len(subject.matrices), "bytes and errors", True) as bar:
        for name in subject.matrices:
            for form in (*forms, HALF, Form(args.base_bits)):
                cost_of(subject, name, form)
            bar.update()
    trials = trials_of([*((name,) for name in subject.matrices), *families.values()], forms, args.base_bits)
    losses = measure(trials, subject, evaluation) if evaluation else {}

    def about(names: tuple[str, ...]) -> dict[str, Any]:
        return entries(subject, names, forms, args.base_bits, losses)

    return {
        "format": 1, "checkpoint_digest": subject.digest,
        "split": args.split if evaluation else "train",         # the split of statistics
        "tokens": evaluation.tokens if evaluation else 0,
        "base_loss": losses.get(FLOAT_MODEL), "base_bits": args.base_bits,
        "base_bits_loss": losses.get(Trial((), HALF, args.base_bits)),
        "tensors": {name: {"shape": list(w.shape), **about((name,))} for name, w in subject.matrices.items()},
        "families": {family: {"members": list(names), **about(names)} for family, names in families.items()}}


def csv_of(found: Mapping[str, Any]) -> bytes:
    """One row a measurement."""
    columns = ("bits", "rank", "nats", "expected_nats", "relative_error", "bytes", "nats_per_byte")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("of", "name", "measurement", *columns))
    for of in ("tensors", "families"):
        for name, about in found[of].items():
            for kind in ("points", "residual", "keep_float"):
                rows = about[kind] if kind != "keep_float" else [about[kind]]
                writer.writerows((of, name, kind, *(row.get(column) for column in columns)) for row in rows)
    return text.getvalue().encode()


def picture_of(found: Mapping[str, Any]) -> bytes:
    """Matrices x bits, log10 of the increase; the estimate's where nothing was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, value = list(found["tensors"]), "nats" if found["base_loss"] is not None else "expected_nats"
    widths = [point["bits"] for point in found["tensors"][names[0]]["points"]]
    nats = np.array([[point[value] for point in found["tensors"][name]["points"]] for name in names])
    shown = np.log10(np.where(nats > 0, nats, np.nan))
    figure, axes = plt.subplots(figsize=(4 + 0.7 * len(widths), 1.6 + 0.26 * len(names)), layout="constrained")
    axes.set_facecolor("lightgrey")
    image = axes.imshow(shown, aspect="auto", cmap="viridis")
    middle = np.nanmean(shown) if (nats > 0).any() else 0.0
    for y, x in zip(*np.nonzero(nats > 0), strict=True):
        color = "white" if shown[y, x] < middle else "black"
        axes.text(x, y, f"{shown[y, x]:.1f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8)
    axes.set_xlabel("bits")
    what = "Measured" if value == "nats" else "Expected"
    axes.set_title(f"{what} increase of the loss, {found['split']} split", fontsize=10)
    figure.colorbar(image, label="log10 nats per token (grey: none)")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    plt.close(figure)
    return data.getvalue()


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where a side is constant or shorter than two."""
    def ranks(values: Sequence[float]) -> np.ndarray:
        _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[at]

    x, y = ranks(a), ranks(b)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() and y.std() else math.nan


def agreement(found: Mapping[str, Any]) -> str:
    """How the estimate ranks the matrices and widths against the measurement, where that is above zero."""
    pairs = [(p["bits"], p["nats"], p["expected_nats"])
             for about in found["tensors"].values() for p in about["points"] if p["nats"] > 0]

    def over(bits: Sequence[int]) -> str:
        chosen = [pair for pair in pairs if pair[0] in bits]
        return f"{spearman([nats for _, nats, _ in chosen], [e for _, _, e in chosen]):.4f} n:{len(chosen)}"

    widths = sorted({bits for bits, _, _ in pairs})
    return "\n".join([f"spearman:{over(widths)}", *(f"spearman_{bits}_bits:{over([bits])}" for bits in widths)])


# ----------------------------------------------------------------------------------------------------------------------
# Command line.
# ----------------------------------------------------------------------------------------------------------------------


def widths(text: str) -> list[int]:
    """The widths in "2,3,4", ascending."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) in WIDTHS for part in parts):
        raise argparse.ArgumentTypeError(f"bits must be in {WIDTHS[0]}..{WIDTHS[-1]}, got {text}")
    return sorted({int(part) for part in parts})


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = export_verbs.OneLineParser(prog="sensitivity.py", description="What quantising each matrix costs.")
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="OUT.json, OUT.csv, OUT.png, OUT.cache.jsonl")
    parser.add_argument("--data", metavar="DIR", required=True)
    parser.add_argument("--tokenizer", metavar="MODEL", required=True)
    parser.add_argument("--split", choices=("val", "train"), default="val", help="only train may plan an artifact")
    parser.add_argument("--max-tokens", type=int, default=65_536, help="the split's first ones; 0 = all")
    parser.add_argument("--bits", type=widths, default=list(WIDTHS), metavar="2,3,...")
    parser.add_argument("--base-bits", type=int, choices=WIDTHS, default=4, help="of everything else, for keep_float")
    parser.add_argument("--residual-rank", type=int, default=1, help="0 = no residual")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--calibration-tokens", type=int, default=0, help="training tokens for the second-order estimate")
    parser.add_argument("--cheap", action="store_true", help="that estimate alone, no evaluation")
    parser.add_argument("--knob", action="append", default=[], metavar="NAME=VALUE", help="for checkpoints without meta")
    args = parser.parse_args(argv)
    for wrong, text in (
        (args.max_tokens < 0, f"--max-tokens must be at least 0, got {args.max_tokens}"),
        (not 0 <= args.residual_rank <= export.MAX_RANK,
         f"--residual-rank must be in 0..{export.MAX_RANK}, got {args.residual_rank}"),
        (args.calibration_tokens < 0, f"--calibration-tokens must be at least 0, got {args.calibration_tokens}"),
        (args.cheap and not args.calibration_tokens, "--cheap needs --calibration-tokens"),
        (not Path(args.output).parent.is_dir(), f"{Path(args.output).parent} is no folder"),
        (importlib.util.find_spec("matplotlib") is None, "the picture needs matplotlib, which is not installed"),
    ):
        if wrong:
            parser.error(text)
    return args


def statistics_key(statistics: export.Statistics | None) -> str:
    """What cached estimates belong to."""
    terms = {} if statistics is None else statistics.terms
    sums = [(name, k, float(t.rows.double().sum()), float(t.moment.double().sum()))
            for name, uses in sorted(terms.items()) for k, t in enumerate(uses)]
    return digest_of(json.dumps(sums).encode()) if sums else ""


def run(args: argparse.Namespace) -> None:
    state, meta = export_verbs.read_with_meta(args.checkpoint, args.knob)
    matrices = matrices_of(state)
    evaluation = None if args.cheap else open_evaluation(args, state, meta)
    statistics = None if not args.calibration_tokens else export_verbs.calibrate_state(
        state, meta, data=args.data, tokenizer=args.tokenizer, device=args.device, tokens=args.calibration_tokens)
    cache = Cache(Path(f"{args.output}.cache.jsonl"))
    subject = Subject(matrices, export.weights_digest(state), cache, statistics, statistics_key(statistics))
    found = map_of(subject, args, evaluation)
    outputs = {"json": (json.dumps(found, indent=1) + "\n").encode(), "csv": csv_of(found), "png": picture_of(found)}
    for end, data in outputs.items():
        export.write_atomically(Path(f"{args.output}.{end}"), data)
    if statistics and evaluation:
        print(agreement(found))
    about = "the estimate alone, not measured: it plans no artifact" if not evaluation else "may plan an artifact" if (
        args.split == "train") else "analysis alone: only a map of --split train may plan an artifact"
    loss = "" if not evaluation else f" tokens:{evaluation.tokens} base_loss:{found['base_loss']:.6f}"
    print(f"wrote:{args.output}.json,.csv,.png split:{found['split']}{loss} ({about})")


def main(argv: Sequence[str]) -> int:
    """Every fault of the input becomes one line and exit code 2."""
    args = arguments(argv)
    try:
        run(args)
    except (ValueError, OSError) as fault:
        print(f"sensitivity.py: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sensitivity.py: interrupted; the same command goes on from {args.output}.cache.jsonl", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
