"""The true size of an artifact of the weights under way, and its proxies: ARTIFACT_EVERY. The trainer loads this module when
that is set.
"""
from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from export import ArtifactError, ExportOptions, ExportRefused, SizeReport, encode_artifact
from proxies import Proxies, measure
from train_gpt import Job, code_bytes


class SizeGauge:
    """Measures the true size of an artifact of the weights under way, in a thread beside the training. Where the plan needs
    statistics of the final weights, the uniform plan that fits the cap stands in for it.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="size")
        self.pending: tuple[int, Future[tuple[SizeReport, Proxies]]] | None = None

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
        self.pending = job.step, self.pool.submit(size_and_proxies, state, job.meta, options, code)

    def finish(self, job: Job) -> None:
        """Logs the measurement under way, once it is done."""
        if self.pending is not None:
            (step, future), self.pending = self.pending, None
            try:
                size, proxies = future.result()
            except (ArtifactError, ExportRefused) as error:
                job.folder.log(f"step:{step} artifact size not measured: {error}")
                return
            total_bytes = size.total_bytes + code_bytes(job.cfg)
            job.folder.log(f"step:{step} artifact_bytes:{size.total_bytes} total_bytes:{total_bytes} "
                           f"bits_per_weight:{size.bits_per_weight:.3f} rms_error:{size.rms_error:.5f} "
                           f"predicted_bytes:{proxies.predicted_bytes:.0f} metadata_bytes:{proxies.metadata_bytes:.0f} "
                           f"exceptions:{proxies.exceptions} families:{proxies.exception_families}")
            job.folder.metric(kind="artifact", step=step, artifact_bytes=size.total_bytes, rms_error=size.rms_error,
                              **asdict(proxies))


def size_and_proxies(state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions, code: int
                     ) -> tuple[SizeReport, Proxies]:
    """Both of one export: the proxies see its own integers, of whatever plan."""
    made = encode_artifact(state, meta, options, code_bytes=code)
    return made.report, measure(made.state, meta, options, made.tensors)
