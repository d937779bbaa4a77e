"""Compares ways to evaluate the same files: val_bpb and seconds of each on each text, paired over the files (say, of several
seeds).

    python scripts/compare_modes.py --tokenizer MODEL --data DIR --data DIR2 -o OUT seed1.ptz seed2.ptz seed3.ptz
    python scripts/compare_modes.py ... --way "EVAL_STRIDE=16" --way "EVAL_STRIDE=16 TTT_MODE=lora TTT_LR=0.03"

A way is knobs between spaces; without any, the README's are taken. Each result goes at once into OUT.jsonl, from which a
repeated call takes what is there. OUT.md holds a table for each text: for every score that the knobs give the mean over the
files, the mean difference to the plain score with the least and the largest, and the median seconds.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export
import export_verbs

PLAIN = "plain"
WAYS = (
    "EVAL_STRIDE=64 EVAL_MIX_LEARN=1 TTT_MODE=lora TTT_LR=0.01",
    "EVAL_STRIDE=64 TTT_MODE=lora",
    "EVAL_STRIDE=64 TTT_MODE=sgd TTT_CHUNK=128",
    "EVAL_STRIDE=64 EVAL_DOC_ISOLATED=1",
    "EVAL_MIX_LEARN=1",
    "EVAL_CACHE_MIX_WEIGHT=0.05 EVAL_BIGRAM_MIX_WEIGHT=0.05",
)
Key = tuple[str, str, int, str]     # file, text, tokens, way


def knobs_of(way: str, meta: Mapping[str, Any]) -> Any:
    """The configuration of a way. Raises ValueError."""
    cfg = export_verbs.mode_knobs(export_verbs.named_values(way.split()), meta)
    if cfg is None:
        raise ValueError(f"--way {way!r} asks for no score beside the plain one")
    return cfg


def measure(path: str, data: str, ways: list[str], args: argparse.Namespace, done: Mapping[Key, Any]
            ) -> Iterator[tuple[Key, Any]]:
    """What is not done yet of one file on one text: (key, {score: {val_bpb, seconds}})."""
    state, meta, plan = export_verbs.read_with_plan(path, [])
    where = {"data": data, "tokenizer": args.tokenizer, "device": args.device, "max_tokens": args.max_tokens}
    for way in (PLAIN, *ways):
        key = path, data, args.max_tokens, way
        if key in done:
            continue
        if way == PLAIN:
            found = {PLAIN: vars(export_verbs.evaluate_artifact(state, meta, **where))}
        else:
            scheme = export_verbs.scheme_of(plan)
            found = export_verbs.score_modes(state, meta, knobs_of(way, meta), scheme, kept=None, **where)
        yield key, {name: {of: score[of] for of in ("val_bpb", "seconds", "tokens")} for name, score in found.items()}


def table(files: list[str], data: str, ways: list[str], tokens: int, done: Mapping[Key, Any]) -> Iterator[str]:
    """Markdown of one text."""
    plain = [done[path, data, tokens, PLAIN][PLAIN] for path in files]
    yield f"{data}: {plain[0]['tokens']} targets, {len(files)} files"
    yield ""
    yield "| knobs | score | val_bpb | against plain, mbpb (least .. largest) | s |"
    yield "|---|---|---|---|---|"
    for way in (PLAIN, *ways):
        for name in done[files[0], data, tokens, way]:
            found = [done[path, data, tokens, way][name] for path in files]
            gaps = [1000 * (a["val_bpb"] - b["val_bpb"]) for a, b in zip(found, plain, strict=True)]
            gap = "" if way == PLAIN else f"{statistics.mean(gaps):+.1f} ({min(gaps):+.1f} .. {max(gaps):+.1f})"
            knobs = "" if way == PLAIN else f"`{way}`"
            yield (f"| {knobs} | {name} | {statistics.mean(a['val_bpb'] for a in found):.5f} | {gap} |"
                   f" {statistics.median(a['seconds'] for a in found):.1f} |")
    yield ""


def read_done(lines: Path) -> dict[Key, Any]:
    """What an earlier call found. Raises ValueError."""
    found = dict[Key, Any]()
    for number, text in enumerate(lines.read_text(encoding="utf-8").splitlines() if lines.exists() else (), 1):
        try:
            row = json.loads(text)
            found[row["file"], row["data"], row["tokens"], row["way"]] = row["scores"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{lines}: line {number} is no result of this program: {text[:60]!r}; remove it") from None
    return found


def command_line() -> argparse.ArgumentParser:
    parser = export_verbs.OneLineParser(prog="compare_modes.py", description="Compares ways to evaluate the same files.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="an artifact or a checkpoint")
    parser.add_argument("-o", "--output", required=True, type=export_verbs.output_path, metavar="OUT",
                        help="OUT.jsonl and OUT.md")
    parser.add_argument("--data", required=True, action="append", metavar="DIR", help="may be given more than once")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-tokens", type=int, default=0, help="0 = the whole validation split")
    parser.add_argument("--way", action="append", metavar="KNOBS", help="may be given more than once")
    return parser


def main(arguments: list[str]) -> int:
    parser = command_line()
    args = parser.parse_args(arguments)
    ways = [" ".join(way.split()) for way in args.way or WAYS]
    lines = Path(f"{args.output}.jsonl")
    try:
        done = read_done(lines)
        for path in args.files:
            meta = export_verbs.read_with_meta(path, [])[1]
            for way in ways:
                knobs_of(way, meta)
        for path in args.files:
            for data in args.data:
                for key, scores in measure(path, data, ways, args, done):
                    done[key] = scores
                    row = dict(zip(("file", "data", "tokens", "way"), key, strict=True)) | {"scores": scores}
                    with lines.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    except (ValueError, OSError) as fault:
        return parser.error(" ".join(str(fault).split()))
    text = "\n".join(line for data in args.data for line in table(args.files, data, ways, args.max_tokens, done))
    export.write_atomically(Path(f"{args.output}.md"), text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
