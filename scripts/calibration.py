"""What an error in each matrix costs, learned from training tokens: CALIBRATION_TOKENS. The trainer loads this module when
that is set.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Statistics, Term, weights_digest
from train_gpt import GPT, CastedLinear, Job, Runtime

CALIBRATION_CHUNK_TOKENS = 8192     # tokens a forward and backward pass; the uncompiled model keeps every activation


class Calibration:
    """Second moments of the inputs of each matrix and of the gradients at its outputs, summed over tokens and uses. Labels
    are drawn from the model: the expectation of the squared gradient is then the Fisher information, which bounds how the
    loss curves (Martens 2020, arXiv 1412.1193, section 9), where the data's labels would add the noise of their errors.
    """

    def __init__(self, model: GPT, rt: Runtime, seed: int):
        self.model, self.rt, self.tokens = model, rt, 0
        self.sums: dict[tuple[str, str], list[Tensor]] = {}     # (matrix, use) -> squared gradients, inputs' moment, uses
        self.generator = torch.Generator(rt.device).manual_seed(seed + rt.rank)

    def add(self, name: str, use: str, rows: Tensor | None, moment: Tensor | None) -> None:
        """Adds to the sums; a matrix that is used several times in a pass has its inputs' moments averaged."""
        parts = rows, moment, None if moment is None else torch.ones((), device=self.rt.device)
        zero = torch.zeros((), dtype=torch.float64, device=self.rt.device)
        held = self.sums.setdefault((name, use), [zero for _ in parts])
        self.sums[name, use] = [a if b is None else a + b for a, b in zip(held, parts, strict=True)]

    def watch(self, name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Embedding):    # row v is the output wherever the token is v
                counts = torch.bincount(inputs[0].flatten(), minlength=module.num_embeddings).float()
                self.add(name, "input", counts, None)
                output.register_hook(lambda g: self.add(name, "input", None, squares(g).diag()))
            else:
                x = inputs[0].detach().flatten(0, -2).float()
                self.add(name, "linear", None, x.T @ x)
                output.register_hook(lambda g: self.add(name, "linear", squares(g), None))

        def squares(g: Tensor) -> Tensor:
            return g.flatten(0, -2).float().square().sum(0)

        return module.register_forward_hook(note)

    def observe(self, ids: Tensor) -> None:
        """One forward and backward pass over ids (B, T)."""
        model = self.model
        with self.rt.autocast():
            features = model.features(ids).flatten(0, 1)
            logits = model.logits(features).float()
        with torch.no_grad():
            shares = logits.softmax(-1)
            labels = torch.multinomial(shares, 1, generator=self.generator)
            if model.lm_head is None:
                g = shares.scatter_add(1, labels, -torch.ones_like(labels, dtype=shares.dtype))
                g = g * (1 - (logits / model.softcap).square())     # before the soft cap
                x = features.float()
                if model.embed_proj is not None:
                    back = g @ model.tok_emb.weight.float()
                    self.add("embed_proj.weight", "transposed", back.square().sum(0), x.T @ x)
                    x = x @ model.embed_proj.weight
                self.add("tok_emb.weight", "head", g.square().sum(0), x.T @ x)
        F.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
        model.zero_grad(set_to_none=True)
        self.tokens += ids.numel()

    def statistics(self) -> Statistics:
        """Means over the tokens of all ranks."""
        tokens = float(self.rt.reduce(torch.tensor(float(self.tokens), device=self.rt.device)))
        passes = {key: float(uses) for key, (_, _, uses) in self.sums.items()}
        terms: dict[str, tuple[Term, ...]] = {}
        for (name, use), (rows, moment, _) in sorted(self.sums.items()):
            rows, moment = (self.rt.reduce(t.clone()).cpu() / tokens for t in (rows, moment))
            calls = passes[name, use] / passes["tok_emb.weight", "input"]
            terms[name] = (*terms.get(name, ()), Term(rows.float(), (moment / calls).float(), use == "transposed"))
        return Statistics(weights_digest(self.model.state_dict()), int(tokens), terms)


def calibrate(model: GPT, batches: Iterator[Tensor], rt: Runtime, seed: int) -> Statistics:
    """Statistics of a model on ids (B, T), each batch this rank's own."""
    calibration = Calibration(model, rt, seed)
    handles = [calibration.watch(f"{name}.weight", m) for name, m in model.named_modules()
               if isinstance(m, (CastedLinear, nn.Embedding))]
    try:
        for batch in batches:
            for ids in batch.split(max(1, CALIBRATION_CHUNK_TOKENS // batch.shape[1])):
                calibration.observe(ids)
    finally:
        for handle in handles:
            handle.remove()
    return calibration.statistics()


def calibrate_job(job: Job) -> Statistics:
    """Statistics of the trained weights on the training tokens that come next."""
    job.clock.resume()
    before = job.clock.total_ms
    count = -(-job.cfg.calibration_tokens // (job.cfg.micro_batch * job.rt.world_size))     # micro-batches a rank
    batches = (job.loader.next_batch()[0] for _ in range(count))
    statistics = calibrate(job.model, batches, job.rt, job.cfg.seed)
    job.clock.pause()
    took_ms = job.clock.total_ms - before
    job.seconds["calibrate"] = took_ms / 1000
    job.folder.log(f"calibrated: tokens:{statistics.tokens} time:{took_ms:.0f}ms train_time:{job.clock.total_ms:.0f}ms")
    return statistics


def batch_start(job: Job, rows: int) -> Tensor:
    """The first sequences of the step under way, ids (rows, T), whatever the rank."""
    loader = job.loader
    ids = loader.stream.take(loader.position(job.step), rows * loader.seq_len).astype(np.int64)
    return torch.from_numpy(ids).view(rows, loader.seq_len).to(job.rt.device)


def statistics_now(job: Job, tokens: int) -> Statistics:
    """Statistics of the weights under way on the first tokens of the step, which every rank would find alike."""
    ids = batch_start(job, max(1, tokens // job.cfg.train_seq_len))
    return calibrate(job.model, iter([ids]), replace(job.rt, rank=0, world_size=1), job.cfg.seed)
