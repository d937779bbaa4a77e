"""What the terms of the objective cost: steps with and without them, in turns, on random tokens; needs no data.

    python scripts/bench_objective.py                           # CUDA: 9x512, 524,288 tokens; CPU: 4x192, 65,536
    EXPORT_SCHEME=rd EXPORT_BITS=3 CALIBRATION_TOKENS=16384 python scripts/bench_objective.py
    RATE_REG_MODEL=waterfill BENCH_ROUNDS=20 torchrun --standalone --nproc_per_node=8 scripts/bench_objective.py

Two jobs of the same knobs (the environment's), one with every weight term, the rate and the noise on at their default
intervals, take turns of COMPRESSION_REG_INTERVAL steps, so that a turn holds one evaluation. Prints one JSON object: the
median over the rounds of the ratio less 1, all of them, and what one refresh of the export's grid takes.
"""
from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import train_gpt  # noqa: E402  (the repository's root is not on the path before)
from bench import build, spread, timed  # noqa: E402

ON = {"COMPRESSION_REG_WEIGHT": "0.1", "COMPRESSION_GRID_REG_WEIGHT": "0.01", "COMPRESSION_SCALE_REG_WEIGHT": "0.01",
      "COMPRESSION_RANK1_REG_WEIGHT": "0.1", "TERNARY_REG_WEIGHT": "0.1", "OUTLIER_REG_WEIGHT": "0.1",
      "RATE_REG_WEIGHT": "0.01", "NOISE_QAT_STEP_SIGMAS": "0.3", "NOISE_QAT_START_FRAC": "0"}
CPU_TOKENS = {"TRAIN_BATCH_TOKENS": "65536"}    # of a step; bench's 8,192 would be all overhead


def turn(job: train_gpt.Job, steps: int) -> float:
    """Seconds a step."""
    def run() -> None:
        for _ in range(steps):
            train_gpt.train_step(job, 1.0, 0.9)
            job.step += 1

    return timed(job.rt, run) / steps


def main() -> int:
    rounds = int(os.environ.get("BENCH_ROUNDS", "8"))
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        if not train_gpt.torch.cuda.is_available():
            os.environ.update({name: os.environ.get(name, value) for name, value in CPU_TOKENS.items()})
        for name, terms in (("plain", {}), ("terms", ON)):
            (folder := Path(scratch) / name).mkdir()
            os.environ.update(terms)
            jobs.append(build(folder, joins=not jobs))
        plain, terms = jobs
        every = terms.cfg.compression_reg_interval
        for job in jobs:
            job.steps_left = 1e6
            turn(job, every)
        refresh_s = timed(terms.rt, lambda: terms.objective.refresh(terms))
        pairs = [(turn(plain, every), turn(terms, every)) for _ in range(rounds)]
        found = {
            "device": plain.rt.describe(), "shape": f"{plain.cfg.num_layers}x{plain.cfg.model_dim}",
            "batch_tokens": plain.cfg.train_batch_tokens, "every": every,
            "export": plain.cfg.export_scheme, "rate": plain.cfg.rate_reg_model,
            "plain_ms": spread([a for a, _ in pairs]), "terms_ms": spread([b for _, b in pairs]),
            "overhead": round(statistics.median(b / a for a, b in pairs) - 1, 4),
            "overhead_of_rounds": sorted(round(b / a - 1, 4) for a, b in pairs), "refresh_s": round(refresh_s, 3),
            "refresh_every": plain.cfg.export_grid_every, "when": time.strftime("%Y-%m-%d"),
        }
        if plain.rt.master:
            print(json.dumps(found, indent=1))
        plain.rt.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
