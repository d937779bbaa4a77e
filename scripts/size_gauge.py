"""The true size of an artifact of the weights under way, its proxies and the ranks of the matrices: ARTIFACT_EVERY. The
trainer loads this module when that is set.
"""
from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from export import EMBED_NAMES, ArtifactError, ExportOptions, ExportRefused, SizeReport, encode_artifact
from proxies import Proxies, measure
from train_gpt import Job, code_bytes

NEGLIGIBLE = 1e-3       # of the largest singular value: what lies below it adds nothing to the rank


class SizeGauge:
    """Measures the true size of an artifact of the weights under way, in a thread beside the training. Where the plan needs
    statistics of the final weights, the uniform plan that fits the cap stands in for it.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="size")
        self.pending: tuple[int, Future[tuple[SizeReport, Proxies, dict[str, float]]]] | None = None

    def measure(self, job: Job) -> None:
        if not job.rt.master:
            return
        if self.pending is not None and not self.pending[1].done():
            job.folder.log(f"step:{job.step} artifact size not measured: that of step {self.pending[0]} is still under way")
            return
        self.finish(job)
        options, code = job.cfg.export_options, code_bytes(job.cfg)
        if options.export_allocate != "uniform":
            options = replace(options, export_allocate="uniform", cap_policy="fit")
        state = {name: t.detach().cpu().clone() for name, t in job.model.state_dict().items()}
        self.pending = job.step, self.pool.submit(look, state, job.meta, options, code)

    def finish(self, job: Job) -> None:
        """Logs the measurement under way, once it is done."""
        if self.pending is not None:
            (step, future), self.pending = self.pending, None
            try:
                size, proxies, shares = future.result()
            except (ArtifactError, ExportRefused) as error:
                job.folder.log(f"step:{step} artifact size not measured: {error}")
                return
            total_bytes = size.total_bytes + code_bytes(job.cfg)
            job.folder.log(f"step:{step} artifact_bytes:{size.total_bytes} total_bytes:{total_bytes} "
                           f"bits_per_weight:{size.bits_per_weight:.3f} rms_error:{size.rms_error:.5f} "
                           f"predicted_bytes:{proxies.predicted_bytes:.0f} metadata_bytes:{proxies.metadata_bytes:.0f} "
                           f"exceptions:{proxies.exceptions} families:{proxies.exception_families} "
                           + " ".join(f"{name}:{share:.3f}" for name, share in shares.items()))
            job.folder.metric(kind="artifact", step=step, artifact_bytes=size.total_bytes, rms_error=size.rms_error,
                              **asdict(proxies), **shares)


def look(state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, code: int
         ) -> tuple[SizeReport, Proxies, dict[str, float]]:
    """Size and proxies of one export, the proxies seeing its own integers, of whatever plan; and the ranks."""
    made = encode_artifact(state, meta, options, code_bytes=code)
    return made.report, measure(made.state, meta, options, made.tensors), rank_shares(state)


def rank_shares(state: Mapping[str, Tensor]) -> dict[str, float]:
    """rank_share, stable_rank_share: of the largest that a matrix could have, the mean over those that Muon trains."""
    matrices = [w for name, w in state.items() if name.endswith(".weight") and name not in EMBED_NAMES]
    found = [(*map(float, ranks(w)), min(w.shape)) for w in matrices]
    count = max(len(found), 1)
    return {"rank_share": sum(rank / most for rank, _, most in found) / count,
            "stable_rank_share": sum(stable / most for _, stable, most in found) / count}


@torch.no_grad()
def ranks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix (rows, cols), as scalars on its device: its numerical rank, that is how many singular values are above
    NEGLIGIBLE of the largest, and its stable rank ||w||_F^2 / ||w||_2^2. Both are 0 of a zero matrix.
    """
    values = torch.linalg.svdvals(w.float())
    largest = values[0].clamp_min(torch.finfo(torch.float32).tiny)
    return (values > NEGLIGIBLE * largest).sum(), (values / largest).square().sum()
