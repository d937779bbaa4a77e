"""Times a training step, evaluation, export and load of one shape on this machine, with random tokens; needs no data.

    python scripts/bench.py                                   # CUDA: the baseline, 9x512, 524,288 tokens; CPU: 4x192, 8,192
    NUM_LAYERS=12 MODEL_DIM=384 NUM_HEADS=6 NUM_KV_HEADS=3 TRAIN_BATCH_TOKENS=32768 python scripts/bench.py
    ENABLE_TORCH_COMPILE=0 BENCH_STEPS=50 torchrun --standalone --nproc_per_node=8 scripts/bench.py

Knobs are the trainer's. Prints one JSON object: medians with their extremes over BENCH_STEPS steps after BENCH_WARMUP ones.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (the repository's root is not on the path before)

import export  # noqa: E402
import train_gpt  # noqa: E402

CPU_SHAPE = {"NUM_LAYERS": "4", "MODEL_DIM": "192", "NUM_HEADS": "3", "NUM_KV_HEADS": "3", "TRAIN_BATCH_TOKENS": "8192",
             "TRAIN_SEQ_LEN": "256", "VAL_BATCH_SIZE": "65536"}
BYTE_TOKENIZER = {"tokenizer_type": "pure_byte", "vocab_size": 260, "config": {
    "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}}


def timed(rt: train_gpt.Runtime, action: Callable[[], object]) -> float:
    rt.synchronize()
    t0 = time.perf_counter()
    action()
    rt.synchronize()
    return time.perf_counter() - t0


def spread(seconds: list[float], scale: float = 1000) -> dict[str, float]:
    return {"median": round(scale * statistics.median(seconds), 3), "min": round(scale * min(seconds), 3),
            "max": round(scale * max(seconds), 3), "n": len(seconds)}


def build(folder: Path, joins: bool = True) -> train_gpt.Job:
    """A job of the environment's knobs; the first of a process joins the process group."""
    cfg, _ = train_gpt.Config.parse(os.environ)
    rt = train_gpt.Runtime.from_config(cfg, os.environ)
    cfg, problems = train_gpt.Config.parse((CPU_SHAPE if rt.device.type == "cpu" else {}) | dict(os.environ))
    problems += rt.problems(cfg) + cfg.world_problems(rt.world_size)
    if problems:
        raise SystemExit("\n".join(problems))
    (folder / "byte260.json").write_text(json.dumps(BYTE_TOKENIZER))
    tokens = np.random.default_rng(0).integers(4, 260, 4_000_000, dtype=np.uint16)
    tokenizer = train_gpt.Tokenizer(folder / "byte260.json")
    data = train_gpt.Data(train_gpt.TokenStream([tokens]), tokens[:262_145], tokenizer, "none")
    if joins:
        rt.start(cfg.sdp_backend)
    return train_gpt.Job.build(cfg, rt, train_gpt.RunFolder(folder / "run", rt.master), data)


def measure(job: train_gpt.Job, warmup: int, steps: int) -> dict[str, object]:
    rt, cfg = job.rt, job.cfg
    for _ in range(warmup):
        train_gpt.train_step(job, 1.0, 0.9)
    step_s = [timed(rt, lambda: train_gpt.train_step(job, 1.0, 0.9)) for _ in range(steps)]
    job.evaluate(job.compiled, cfg.eval_batch_tokens)
    result = job.evaluate(job.compiled, 0)
    state = {name: t.cpu() for name, t in job.model.state_dict().items()}
    path = job.folder.path / "bench.ptz"
    known = export.tool("calibration").calibrate_job(job) if cfg.calibration_tokens else None
    options, code = cfg.export_options, train_gpt.code_bytes(cfg)
    export_s = timed(rt, lambda: export.save_artifact(path, state, job.meta, options, statistics=known, code_bytes=code))
    load_s = timed(rt, lambda: export.load_artifact(path))
    return {
        "device": rt.describe(), "torch": train_gpt.torch.__version__, "params": sum(t.numel() for t in state.values()),
        "shape": f"{cfg.num_layers}x{cfg.model_dim}", "batch_tokens": cfg.train_batch_tokens, "micro_batch": cfg.micro_batch,
        "step_ms": spread(step_s), "tokens_per_s": round(cfg.train_batch_tokens / statistics.median(step_s)),
        "eval_tokens_per_s": round(result.tokens / result.seconds), "peak_memory_mib": rt.peak_memory_mib()[0],
        "calibrate_s": round(job.seconds.get("calibrate", 0.0), 2), "export_s": round(export_s, 2),
        "load_s": round(load_s, 2), "artifact_bytes": path.stat().st_size,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        job = build(Path(scratch))
        try:
            found = measure(job, int(os.environ.get("BENCH_WARMUP", "3")), int(os.environ.get("BENCH_STEPS", "10")))
            if job.rt.master:
                print(json.dumps(found, indent=1))
        finally:
            job.rt.stop()
