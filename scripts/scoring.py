"""Scores beside the plain one: windows that overlap (EVAL_STRIDE), and the frame of every other mode. The trainer and
`export.py eval` load this module when a knob of train_gpt.MODES asks.

    EVAL_STRIDE=64 EVAL_SEQ_LEN=1024 python train_gpt.py
    python export.py eval FILE --data DIR --tokenizer MODEL EVAL_STRIDE=64       # --sections FOLDER: goes on after a kill

A score is an array, the nats of every target in the order of the text: target t, 1 .. N - 1, is token t, and its nats stand
at t - 1. Sums are float64 over that array, so they depend neither on the ranks nor on the batches.

A mode is a row or more of train_gpt.MODES and a module with

    problems(cfg) -> list[str]                      what is wrong with its knobs, one line each
    score(ev: Evaluation) -> Iterator[Score]        its scores, each logged and put into summary.json as it comes

It starts from `ev.own`, the model's own score by the windows that the knobs ask for (side by side without EVAL_STRIDE),
which is computed once for all modes, or makes passes of its own. `problems` of this module gathers those of all modes that
the knobs ask for. With all knobs at their defaults it is not imported.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

import train_gpt
from export import tool, weights_digest, write_atomically
from train_gpt import GPT, ByteTable, Config, EvalResult, Job, Runtime, progress
from window_pass import FloatPass, WindowPass

PASS_TOKENS = 8192, 65_536          # of one forward pass on a CPU, where more would leave its caches, and elsewhere
SECTIONS = 32                       # parts of a pass over the text whose scores are kept until it is whole
LONGEST = 1 << 20                   # tokens of a window; bounds the rotary tables, as an artifact's header does
LINE_EVERY_S = 60.0                 # between lines of progress where there is no terminal


def problems(cfg: Config) -> list[str]:
    """What is wrong with the knobs of the windows, and of the other modes that they ask for."""
    length = cfg.eval_seq_len or cfg.train_seq_len
    windows = cfg.eval_stride != 0 or cfg.eval_doc_isolated
    asked = [name.upper() for name in ("eval_seq_len", "sw_eval_batch") if getattr(cfg, name)]
    known = not train_gpt.range_problems(cfg, [f for f in fields(cfg) if f.name in train_gpt.MODES])
    others = [tool(name) for name in dict.fromkeys(cfg.modes.values()) if name != "scoring" and known]
    return [text for wrong, text in (
        (cfg.eval_stride > length,
         f"EVAL_STRIDE must be at most EVAL_SEQ_LEN={length}, or targets would be left out, got {cfg.eval_stride}"),
        (cfg.eval_seq_len > LONGEST, f"EVAL_SEQ_LEN must be at most {LONGEST}, got {cfg.eval_seq_len}"),
        (asked and not windows and set(cfg.modes.values()) == {"scoring"},
         f"{' and '.join(asked)} asks for no score: set EVAL_STRIDE, EVAL_STRIDE={length} for windows side by side"),
        (not cfg.final_roundtrip_eval and not cfg.eval_artifact,
         f"{', '.join(cfg.modes)}: only an artifact that is evaluated is scored so; FINAL_ROUNDTRIP_EVAL must be 1"),
        (cfg.sdp_backend in ("flash", "cudnn") and 0 < cfg.eval_stride < length,
         f"SDP_BACKEND={cfg.sdp_backend} takes no mask, which EVAL_STRIDE needs in the last layer; use auto"),
    ) if wrong] + [text for module in others for text in module.problems(cfg)]


# ----------------------------------------------------------------------------------------------------------------------
# Windows: which tokens a target is predicted from. Rows of three numbers: `begin`, the first input; `first`, the first
# target that is scored; `stop`, one past the last. Inputs are begin .. stop - 2, their targets begin + 1 .. stop - 1.
# ----------------------------------------------------------------------------------------------------------------------


def stretches(tokens: int, starts: np.ndarray | Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(position of the first token, number of targets) of each stretch of text, (S,) int64 each. `starts` are the positions
    of the BOS tokens: a stretch begins with one and ends with the next as a target, so the end of a document is predicted
    from that document, as in the challenge, and every token but the first of the text is scored.
    """
    begins = np.unique(np.concatenate(([0], np.asarray(starts, dtype=np.int64))))
    targets = np.append(begins[1:], tokens - 1) - begins
    return begins[targets > 0], targets[targets > 0]


def layout(tokens: int, length: int, stride: int, starts: np.ndarray | Sequence[int] = ()) -> np.ndarray:
    """Windows, (W, 3) int64 in the order of the text, that score each target 1 .. tokens - 1 exactly once.

    No window has more than `length` inputs, and each scored target has at least length - stride + 1 of them before it,
    where its stretch of text (`starts`: document isolation) has them. Where a window begins does not depend on where its
    stretch ends, which no score may know: a stretch's last window is a short one.
    """
    begins, targets = stretches(tokens, starts)
    count = 1 + -(-np.maximum(targets - length, 0) // stride)                   # windows of each stretch
    begin, targets = np.repeat(begins, count), np.repeat(targets, count)
    k = np.arange(begin.size) - np.repeat(np.cumsum(count) - count, count)
    stop = begin + 1 + np.minimum(length + k * stride, targets)
    first = begin + 1 + np.where(k > 0, length + (k - 1) * stride, 0)
    return np.stack((begin + k * stride, first, stop), axis=1)


@dataclass(frozen=True)
class Batch:
    """Windows of one forward pass, (rows, 3), padded on the right to `length` inputs; the `last` have targets, 0 = all."""
    windows: np.ndarray
    length: int
    last: int

    @cached_property
    def targets(self) -> np.ndarray:
        """Which target each place of the pass predicts, (rows, last or length); it may lie beyond the text."""
        head = self.length - self.last if self.last else 0
        return self.windows[:, :1] + 1 + np.arange(head, self.length)

    @cached_property
    def step(self) -> int:
        """Tokens from each window's beginning to the next one's where that cuts them all into chunks, else 0."""
        steps = np.unique(np.diff(self.windows[:, 0]))
        step = int(steps[0]) if self.last and steps.size == 1 else 0
        return step if step > 0 and self.length % step == 0 else 0

    @cached_property
    def scored(self) -> np.ndarray:
        """Which of these places count, bool."""
        return (self.targets >= self.windows[:, 1:2]) & (self.targets < self.windows[:, 2:])

    def gather(self, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """(inputs (rows, length), targets (rows, last or length)), int64; places beyond the text hold its last token."""
        places = self.windows[:, :1] + np.arange(self.length), self.targets
        ids, targets = (torch.from_numpy(tokens[np.minimum(at, tokens.size - 1)].astype(np.int64)) for at in places)
        return ids, targets


def batches(windows: np.ndarray, budget_tokens: int, granule: int = 1, full: bool = False) -> list[Batch]:
    """The passes that these windows take, whatever the number of ranks.

    Windows that score all their targets open a stretch and differ in length: the longest come first, so that few places are
    padding. The others score some of their last places. `granule` rounds lengths up and `full` adds rows that score nothing
    to batches that would have fewer: compiled graphs are then few.
    """
    lengths, heads = windows[:, 2] - windows[:, 0] - 1, windows[:, 1] - windows[:, 0] - 1
    longest, found = int(lengths.max()), list[Batch]()

    def cut(group: np.ndarray) -> None:
        group = group[np.argsort(-lengths[group], kind="stable")]
        head = int(heads[group].min(initial=longest))           # places before the first that any of them scores
        while group.size:
            length = min(-(-int(lengths[group[0]]) // granule) * granule, longest)
            rows = max(1, budget_tokens // length)
            mine, group = group[:rows], group[rows:]
            block = windows[np.resize(mine, rows) if full else mine]
            block[mine.size:, 1] = block[mine.size:, 2]
            found.append(Batch(block, length, (length - head) % length))

    cut(np.flatnonzero(heads == 0))
    cut(np.flatnonzero(heads > 0))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What a mode gets and gives.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a mode found: `nats` (N - 1,) of the targets, and numbers for its line and for summary.json, seconds excepted."""
    name: str
    nats: np.ndarray
    seconds: float
    report: Mapping[str, Any]


@dataclass
class Evaluation:
    """One model on one text, split over the ranks: what every mode starts from. All that it gives is equal on all ranks."""
    model: GPT                      # with rotary tables as long as the windows
    rt: Runtime
    tokens: np.ndarray              # (N,), the text; targets are 1 .. N - 1
    table: ByteTable
    bos_id: int
    cfg: Config                     # its knobs of the evaluation; train_seq_len is the model's
    log: Callable[[str], None]
    kept: Path | None = None        # folder that keeps finished sections until they are whole; None = they are not kept

    @property
    def length(self) -> int:
        """Inputs of a window."""
        return self.cfg.eval_seq_len or self.cfg.train_seq_len

    @cached_property
    def windows(self) -> np.ndarray:
        """Those of the knobs. Where a target's score reaches back less far than the windows overlap, they overlap by no more
        than that: nothing changes but the time. (Tables of low precision tell positions apart that relatively are one.)
        """
        stride, reach = self.cfg.eval_stride or self.length, self.forward.reach
        if reach and self.model.cos.dtype is self.rt.dtype is torch.float32:
            stride = max(stride, self.length - reach + 1)
        starts = np.flatnonzero(self.tokens == self.bos_id) if self.cfg.eval_doc_isolated else ()
        return layout(self.tokens.size, self.length, stride, starts)

    @cached_property
    def forward(self) -> WindowPass:
        """The model's passes, for weights that stay as they are: another one for those that do not."""
        folds = self.rt.dtype is torch.float32 and not self.rt.compiled
        return FloatPass(self.model) if folds else WindowPass(self.model)

    def batches(self, windows: np.ndarray) -> list[Batch]:
        """Compiled graphs are few: lengths in quarters of a window, all batches whole."""
        rows, compiled = self.cfg.sw_eval_batch, self.rt.compiled
        budget = rows * self.length if rows else PASS_TOKENS[self.rt.device.type != "cpu"]
        return batches(windows, budget, max(1, self.length // 4) if compiled else 1, compiled)

    @cached_property
    def own(self) -> Score:
        """The model alone by `windows`. Its seconds leave out what a call before this one had done."""
        t0, stride = time.perf_counter(), self.cfg.eval_stride
        name = "_".join(["sliding_window"] * (stride > 0) + ["doc_isolated"] * self.cfg.eval_doc_isolated) or "windows"
        nats = self.score_windows(name, self.windows)
        return Score(name, nats, time.perf_counter() - t0, {"stride": stride or self.length, "seq_len": self.length})

    @cached_property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each target, (N - 1,) int64."""
        ids = torch.from_numpy(np.asarray(self.tokens).astype(np.int64)).to(self.table.own.device)
        return self.table.count(ids[:-1], ids[1:]).cpu().numpy()

    def result(self, score: Score) -> EvalResult:
        assert score.nats.shape == (self.tokens.size - 1,), "every target is scored exactly once"
        nats = float(score.nats.sum(dtype=np.float64))
        byte_count = int(self.bytes.sum())
        count = score.nats.size
        return EvalResult(nats / count, nats / math.log(2) / byte_count, count, byte_count, score.seconds)

    def score_windows(self, name: str, windows: np.ndarray, values_of: Callable[..., Tensor] | None = None, values: int = 1
                      ) -> np.ndarray:
        """Nats of the targets that these windows score, at their places of an (N - 1,) float32 array; others are NaN.
        Another pass may give several `values` of each target, (values, rows, places): (values, N - 1) is then returned.
        """
        work, values_of = self.batches(windows), self.rt.compile(values_of or self.forward.nats)
        parts = np.array_split(np.arange(len(work)), min(SECTIONS, len(work)))
        places = [np.concatenate([work[i].targets[work[i].scored] for i in part]) - 1 for part in parts]

        def section(number: int) -> np.ndarray:
            sizes = [int(work[i].scored.sum()) for i in parts[number]]
            ends, found = np.cumsum(sizes), torch.zeros(values, sum(sizes))
            for i, end, size in list(zip(parts[number], ends, sizes, strict=True))[self.rt.rank::self.rt.world_size]:
                found[:, end - size:end] = self.run_batch(work[i], values_of)
            return self.rt.reduce(found.to(self.rt.device)).flatten().cpu().numpy()     # other ranks have zeros: exact

        scored = np.full((values, self.tokens.size - 1), np.nan, dtype=np.float32)
        for at, found in zip(places, self.sections(name, [values * at.size for at in places], section), strict=True):
            scored[:, at] = found.reshape(values, -1)
        return scored if values > 1 else scored[0]

    def run_batch(self, batch: Batch, values_of: Callable[..., Tensor]) -> Tensor:
        """What the pass gives for the scored places, (..., n) float32 on the host."""
        ids, targets = batch.gather(self.tokens)
        with torch.inference_mode(), self.rt.autocast():
            found = values_of(ids.to(self.rt.device), targets.to(self.rt.device), batch.last, batch.step)
        return found.cpu()[..., torch.from_numpy(batch.scored)]

    def distributions(self, targets: Sequence[int] | np.ndarray) -> Tensor:
        """Log-probabilities that these targets were scored with, (n, V) float32 on the host: windows and passes are like
        those of `own`.
        """
        wanted = np.asarray(targets)
        chosen = np.searchsorted(self.windows[:, 1], wanted, side="right") - 1
        found = torch.empty(wanted.size, self.model.tok_emb.num_embeddings)
        for batch in self.batches(self.windows[np.unique(chosen)]):
            ids, _ = batch.gather(self.tokens)
            with torch.inference_mode(), self.rt.autocast():
                logits = self.forward.logits(ids.to(self.rt.device), batch.last, batch.step).cpu()
            logits = logits.view(*batch.targets.shape, -1)
            row, place = np.nonzero(batch.scored & np.isin(batch.targets, wanted))
            of = {int(batch.targets[r, p]): logits[r, p].log_softmax(-1) for r, p in zip(row, place, strict=True)}
            for i in (i for i, target in enumerate(wanted) if int(target) in of):
                found[i] = of[int(wanted[i])]
        return found

    # --- finished sections ----------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Of all that a score depends on but the number of ranks: weights, text, knobs, device, code."""
        digest = hashlib.blake2b(weights_digest(self.model.state_dict()).encode(), digest_size=16)
        knobs = {name: value for name, value in asdict(self.cfg).items() if name in train_gpt.MODES}
        device = self.rt.device.type, str(self.rt.dtype), self.rt.compiled, torch.__version__, torch.get_num_threads()
        digest.update(json.dumps([knobs, self.length, device, str(self.model.cos.dtype)]).encode())
        for path in train_gpt.source_files(self.cfg):
            digest.update(path.read_bytes())
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()

    def sections(self, name: str, sizes: Sequence[int], score: Callable[[int], np.ndarray]) -> list[np.ndarray]:
        """What `score(number)` gives for each section, (sizes[number],) float32 equal on all ranks. Finished ones are kept
        on disk until all are, so that a repeated call goes on behind them. Those that do not fit count for nothing and are
        written over: they can be had again for time alone.
        """
        found = self.kept_sections(name, sizes)
        t0 = told = time.perf_counter()
        before, total = sum(map(len, found)), sum(sizes)
        with progress(total, name, self.rt.master, before) as bar:
            for number in range(len(found), len(sizes)):
                found.append(score(number))
                if self.rt.master and self.kept is not None:
                    write_section(self.section(name, number), found[-1], self.fingerprint)
                bar.update(sizes[number])
                now, left = time.perf_counter(), sum(sizes[number + 1:])
                if bar.disable and left and now - told > LINE_EVERY_S:
                    told, pace_s = now, (now - t0) / (total - left - before)
                    self.log(f"{name}: {1 - left / total:.0%}, {left * pace_s:.0f} s to go")
        if self.rt.master and self.kept is not None:
            for number in range(len(sizes)):
                self.section(name, number).unlink(missing_ok=True)
            with contextlib.suppress(OSError):      # not empty: the user's own folder, or another mode's sections
                self.kept.rmdir()
        return found

    def section(self, name: str, number: int) -> Path:
        assert self.kept is not None
        return self.kept / f"{name}_{number:03d}.safetensors"

    def kept_sections(self, name: str, sizes: Sequence[int]) -> list[np.ndarray]:
        """The first sections, as far as a call before this one had finished them; rank 0 reads for all."""
        if self.kept is None:
            return []
        found: list[np.ndarray] = []
        for number, size in enumerate(sizes if self.rt.master else ()):
            path = self.section(name, number)
            if not path.exists():
                break
            nats = read_section(path, size, self.fingerprint)
            if nats is None:
                self.log(f"{path} is damaged or of another evaluation (weights, text, knobs or code differ): scored anew")
                break
            found.append(nats)
        whole = np.frombuffer(self.rt.broadcast(b"".join(nats.tobytes() for nats in found)), dtype=np.float32)
        ends = np.cumsum(sizes)
        count = int(np.searchsorted(ends, whole.size, side="right"))
        if count:
            self.log(f"{name}: {count} of {len(sizes)} sections were scored before, in {self.kept}")
        if self.rt.master:
            self.kept.mkdir(parents=True, exist_ok=True)
        return np.split(whole, ends[:count])[:count]


def write_section(path: Path, nats: np.ndarray, fingerprint: str) -> None:
    t = torch.from_numpy(np.ascontiguousarray(nats))
    said = {"fingerprint": fingerprint, "digest": weights_digest({"nats": t})}
    write_atomically(path, save_safetensors({"nats": t}, said))


def read_section(path: Path, size: int, fingerprint: str) -> np.ndarray | None:
    """The nats of a section, None where the file is damaged or belongs to another evaluation."""
    try:
        with safe_open(path, "pt") as file:
            said, nats = file.metadata() or {}, file.get_tensor("nats")
    except (OSError, SafetensorError):
        return None
    fits = said.get("fingerprint") == fingerprint and said.get("digest") == weights_digest({"nats": nats})
    return nats.numpy() if fits and nats.shape == (size,) else None


# ----------------------------------------------------------------------------------------------------------------------
# The sidecar on top of a mode that makes passes of its own.
# ----------------------------------------------------------------------------------------------------------------------


def with_sidecar(ev: Evaluation, found: Score) -> Iterator[Score]:
    """A mode's score, and the same with the sidecar where that is asked for too."""
    yield found
    if "sidecar_mode" in ev.cfg.modes.values():
        yield tool("sidecar_mode").applied(ev, found)


def distributions_with_sidecar(ev: Evaluation, found: Score, targets: Sequence[int] | np.ndarray, log_p: Tensor
                               ) -> dict[str, Tensor]:
    """Log-probabilities (n, V) that these targets were scored with, by the name of the score; `log_p` are the mode's."""
    given = {found.name: log_p}
    if "sidecar_mode" in ev.cfg.modes.values():
        given[f"{found.name}_sidecar"] = tool("sidecar_mode").written_out(ev, found.nats, targets, log_p)
    return given


# ----------------------------------------------------------------------------------------------------------------------
# The modes: this module's own, and all that the knobs ask for.
# ----------------------------------------------------------------------------------------------------------------------


def score(ev: Evaluation) -> Iterator[Score]:
    """The model alone, by the windows of the knobs."""
    if ev.cfg.eval_stride or ev.cfg.eval_doc_isolated:
        yield ev.own


def isolated(cfg: Config) -> bool:
    """Whether the scores claim to depend on the target's document alone; scripts/audit.py then proves it."""
    return cfg.eval_doc_isolated


def score_all(ev: Evaluation, scheme: str) -> dict[str, Any]:
    """Every mode that the knobs ask for, in the order of train_gpt.MODES: its two lines, and its entry of summary.json."""
    found: dict[str, Any] = {}
    for module in dict.fromkeys(ev.cfg.modes.values()):
        for one in tool(module).score(ev):
            result = ev.result(one)
            numbers = " ".join(f"{key}:{value}" for key, value in one.report.items())
            ev.log(f"final_{scheme}_{one.name} val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} {numbers} "
                   f"eval_time:{1000 * result.seconds:.0f}ms")
            ev.log(f"final_{scheme}_{one.name}_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")
            found[one.name] = asdict(result) | dict(one.report)
    return found


def score_job(job: Job, model: GPT, max_tokens: int) -> dict[str, Any]:
    """The modes of a run, on the model that its artifact holds."""
    t0 = time.perf_counter()
    tokens = job.data.val[:max_tokens + 1] if max_tokens else job.data.val
    ev = Evaluation(model, job.rt, tokens, job.table, job.data.tokenizer.bos_id, job.cfg, job.folder.log,
                    job.folder.path / "eval_sections")
    found = score_all(ev, job.cfg.export_scheme)
    job.seconds["eval_modes"] = time.perf_counter() - t0
    return found
