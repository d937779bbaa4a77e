"""What overlapping windows cost: the naive evaluator, which runs each window whole through the model with all its logits,
and ours, in turns on the same text.

    python scripts/bench_eval.py FILE --data DIR --tokenizer MODEL --tokens 8192            # an artifact or a checkpoint
    python scripts/bench_eval.py FILE --data DIR --tokenizer MODEL EVAL_SEQ_LEN=1024 EVAL_STRIDE=64 --naive-batch 32

Prints one JSON object: seconds of both over the rounds (of the process on a CPU, which other programs may share; of the
clock elsewhere), their ratios, and the largest difference of a target's nats. --naive-batch 0 takes ours.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402  (the repository's root is not on the path before)
import torch  # noqa: E402

import export_verbs  # noqa: E402
import scoring  # noqa: E402
from bench import spread  # noqa: E402
from train_gpt import MODES, byte_table  # noqa: E402


def naive(ev: scoring.Evaluation, rows: int) -> np.ndarray:
    """Nats of every target, (N - 1,): window by window in batches, logits of all places, the scored ones kept."""
    forward = ev.rt.compile(ev.model)
    last, stride = ev.tokens.size - 1, ev.cfg.eval_stride or ev.length
    found = np.full(last, np.nan, np.float32)
    ends = [*range(min(ev.length, last), last, stride), last]       # the last target of each window
    for at in range(0, len(ends), rows):
        begins = stride * np.arange(at, at + len(ends[at:at + rows]))
        places = np.minimum(begins[:, None] + np.arange(min(ev.length, last)), last - 1)
        x, y = (torch.from_numpy(ev.tokens[p].astype(np.int64)).to(ev.rt.device) for p in (places, places + 1))
        with torch.inference_mode(), ev.rt.autocast():
            nats = forward(x, y, reduction="none").float().cpu().numpy()
        for row, begin, end in zip(nats, begins, ends[at:at + rows], strict=True):
            new = 0 if end == ends[0] else ends[ends.index(end) - 1] - begin
            found[begin + new:end] = row[new:end - begin]
    return found


def timed(ev: scoring.Evaluation, action: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    clock = time.process_time if ev.rt.device.type == "cpu" else time.perf_counter
    ev.rt.synchronize()
    t0 = clock()
    found = action()
    ev.rt.synchronize()
    return clock() - t0, found


def evaluation(args: argparse.Namespace) -> scoring.Evaluation:
    """What the command line names. Raises ValueError, OSError."""
    state, meta = export_verbs.read_with_meta(args.file, [])
    cfg = export_verbs.mode_knobs({"EVAL_STRIDE": "64"} | export_verbs.named_values(args.knobs), meta)
    if cfg is None or cfg.eval_doc_isolated:
        raise ValueError("windows of EVAL_STRIDE over the whole text are compared; EVAL_DOC_ISOLATED must be 0")
    rt, model, tok = export_verbs.open_model(state, meta, args.tokenizer, args.device, cfg.eval_seq_len)
    val = export_verbs.paired_validation(args.data, tok, meta)[:args.tokens + 1]
    return scoring.Evaluation(model, rt, val, byte_table(tok, rt.device), tok.bos_id, cfg, print)


def main(arguments: list[str]) -> int:
    parser = export_verbs.OneLineParser(prog="bench_eval.py", description="What overlapping windows cost.")
    parser.add_argument("file")
    parser.add_argument("knobs", nargs="*", metavar="NAME=VALUE", help=f"of {', '.join(map(str.upper, MODES))}")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=8192, help="targets scored")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--naive-batch", type=int, default=32, help="windows of a naive pass; 32 is the challenge's")
    args = parser.parse_intermixed_args(arguments)
    try:
        ev = evaluation(args)
    except (ValueError, OSError) as fault:
        return parser.error(" ".join(str(fault).split()))
    model, rt = ev.model, ev.rt
    rows = args.naive_batch or ev.batches(ev.windows)[-1].windows.shape[0]

    def ours() -> np.ndarray:
        return ev.score_windows("ours", ev.windows)

    pairs = []
    for number in range(args.rounds + 1):       # the first is a warm-up
        order = [lambda: naive(ev, rows), ours][::1 if number % 2 else -1]
        taken = [timed(ev, action) for action in order][::1 if number % 2 else -1]
        pairs.append(taken)
    difference = max(float(np.abs(a[1] - b[1]).max()) for a, b in pairs)
    ratios = sorted(b[0] / a[0] for a, b in pairs[1:])
    print(json.dumps({
        "device": rt.describe(), "shape": f"{len(model.layer_blocks)}x{model.skip_weights.size(1)}",
        "targets": ev.tokens.size - 1, "seq_len": ev.length, "stride": ev.cfg.eval_stride, "naive_rows": rows,
        "naive_s": spread([a[0] for a, _ in pairs[1:]], 1),
        "ours_s": spread([b[0] for _, b in pairs[1:]], 1), "ratio": round(statistics.median(ratios), 4),
        "ratio_of_rounds": [round(r, 4) for r in ratios], "max_difference_nats": difference,
        "mean_nats": float(pairs[0][1][1].mean(dtype=np.float64)), "when": time.strftime("%Y-%m-%d")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
