"""Tunes what a rate-distortion file holds beside its integers (EXPORT_TUNE_STEPS): the steps of rows and columns and the
small tensors, by Adam on training batches, with the integers frozen.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import export
import train_gpt

LEARNING_RATE = 1e-3        # of log gains and of small tensors, falling to zero over the steps


def reserve_bytes(state: Mapping[str, Tensor]) -> int:
    """What tuned steps take beyond untuned ones, whose tables are 8 and 4 times as coarse."""
    shapes = export.matrices(export.shapes_of(state)).values()
    return sum(3 * rows + 2 * cols for rows, cols in shapes) // 8


def tune(job: train_gpt.Job, written: export.Export | None, reserve: int) -> export.Export | None:
    """The export with tuned steps; every rank takes part, rank 0 gives and gets. A tuned file that takes more than the
    reserve is given up for the untuned one.
    """
    job.clock.resume()
    before = job.clock.total_ms
    artifact = export.decode_artifact(job.rt.broadcast(written.data if written else b""))
    gains, small = descend(job, artifact)
    job.clock.pause()
    took_ms = job.clock.total_ms - before
    job.seconds["tune"] = took_ms / 1000
    job.folder.log(f"tuned: steps:{job.cfg.export_tune_steps} time:{took_ms:.0f}ms train_time:{job.clock.total_ms:.0f}ms")
    if written is None:
        return None
    made = retuned(written, artifact.meta, gains, small)
    high = written.report.planned_bytes + reserve
    made.report = replace(made.report, planned_bytes=high, step_gains=written.report.step_gains)
    if len(made.data) > high:
        job.folder.log(f"warning: the tuned file takes {len(made.data)} of {high} bytes; kept the untuned one")
        return written
    return made


def descend(job: train_gpt.Job, artifact: export.Artifact) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(log2 gains of rows and columns of each grid matrix, the tuned small tensors)."""
    model = train_gpt.load_model(artifact.state, artifact.meta, job.rt)
    grids = [row.name for row in artifact.plan if row.codec == "grid"]
    frozen = {name: p.detach() for name, p in model.named_parameters()}
    small = {name: nn.Parameter(p.clone()) for name, p in frozen.items() if name not in grids}
    device = job.rt.device
    gains = {name: tuple(nn.Parameter(torch.zeros(n, device=device)) for n in frozen[name].shape) for name in grids}
    tuned = [*small.values(), *(gain for pair in gains.values() for gain in pair)]
    adam = torch.optim.Adam(tuned, lr=LEARNING_RATE, betas=(job.cfg.beta1, job.cfg.beta2), eps=job.cfg.adam_eps)
    count = job.cfg.micro_batches // job.rt.world_size
    for step in range(job.cfg.export_tune_steps):
        for _ in range(count):
            x, y = job.loader.next_batch()
            now = small | {name: frozen[name] * torch.exp2(row[:, None] + col) for name, (row, col) in gains.items()}
            with job.rt.autocast():
                loss = torch.func.functional_call(model, now, (x, y)) / job.cfg.micro_batches
            loss.backward()
        for p in tuned:
            p.grad = job.rt.reduce(p.grad) if p.grad is not None else None
        adam.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / job.cfg.export_tune_steps)
        adam.step()
        adam.zero_grad(set_to_none=True)
    return ({name: (row.detach().cpu(), col.detach().cpu()) for name, (row, col) in gains.items()},
            {name: p.detach().cpu() for name, p in small.items()})


def retuned(written: export.Export, meta: Mapping[str, object], gains: Mapping[str, tuple[Tensor, Tensor]],
            small: Mapping[str, Tensor]) -> export.Export:
    """The same integers with other steps and small tensors."""
    options, tensors, state = export.ExportOptions(int8_scale_floor=0.0), dict(written.tensors), dict(written.state)
    for name, tensor in small.items():
        tensors[name] = export.store(name, tensor, export.small_choice(tensor), options)
    for name, pair in gains.items():
        values = dict(tensors[name].values)
        for kind, gain in zip(("row_steps", "col_steps"), pair, strict=True):
            values[kind] = values[kind] + np.rint(export.OCTAVE * gain.double().numpy()).astype(np.int16)
        middles = [export.middle_of(values[kind]) for kind in ("col_steps", "row_steps")]
        values["bases"] = np.array([*middles, values["bases"][2], 1, 1, values["bases"][5]], np.int16)
        tensors[name] = export.Stored(tensors[name].row, values)
    return export.assembled(state, meta, options, tensors)
