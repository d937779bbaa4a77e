"""The sidecar (scripts/sidecar.py) as a mode of scripts/scoring.py: counts of earlier tokens, mixed into a model's scores.

    EVAL_MIX_LEARN=1 EVAL_STRIDE=64 python train_gpt.py
    python export.py eval FILE --data DIR --tokenizer MODEL EVAL_CACHE_MIX_WEIGHT=0.02 EVAL_BIGRAM_MIX_WEIGHT=0.1

EVAL_MIX_LEARN=1 learns the weights of a chain of n-grams on the way and loses at most one bit in the whole text. Fixed
weights mix a cache and bigrams, may lose anything, and count in one scope: EVAL_SIDECAR_SCOPE=both is doc there. A document
begins with its BOS, which as a target is the last one of the document before.

The mixture needs a model's nats of all targets and nothing else, so it goes on top of any mode: `applied` to its Score,
`mixed` with its nats, `written_out` for an audit. Rank 0 computes and the others take its bits.
"""
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from scoring import Evaluation, Score
from sidecar import MOST_NATS, SCOPES, Mixture, Sidecar
from train_gpt import Config

MOST_SOFTCAP = MOST_NATS / 2 - 6    # a target's nats are at most 2 softcaps + ln VOCAB_SIZE, which is below 12


def problems(cfg: Config) -> list[str]:
    """What is wrong with the knobs of the sidecar."""
    weights = {name.upper(): getattr(cfg, name) for name in ("eval_cache_mix_weight", "eval_bigram_mix_weight")}
    fixed = " and ".join(name for name, weight in weights.items() if weight)
    options = "eval_cache_size", "eval_ngram_order", "eval_sidecar_scope"
    asked = " and ".join(name.upper() for name in options if getattr(cfg, name) != getattr(Config, name))
    total = sum(weights.values())
    return [text for wrong, text in (
        (total >= 1,
         f"{' + '.join(weights)} must be below 1, the model's own weight being the rest, got {total:g}"),
        (fixed and cfg.eval_mix_learn,
         f"EVAL_MIX_LEARN=1 learns what {fixed} would fix: drop {fixed}, which can lose, or EVAL_MIX_LEARN"),
        (asked and not fixed and not cfg.eval_mix_learn,
         f"{asked} asks for no score: set EVAL_MIX_LEARN=1, or {' or '.join(weights)}"),
        (cfg.eval_ngram_order != Config.eval_ngram_order and fixed and not cfg.eval_mix_learn,
         f"EVAL_NGRAM_ORDER asks for no score: {fixed} mixes no n-grams beyond bigrams, EVAL_MIX_LEARN=1 does"),
        ((fixed or cfg.eval_mix_learn) and cfg.logit_softcap > MOST_SOFTCAP,
         f"LOGIT_SOFTCAP must be at most {MOST_SOFTCAP:g} for a mixture in float64, got {cfg.logit_softcap:g}"),
    ) if wrong]


def score(ev: Evaluation) -> Iterator[Score]:
    """The model by the windows of the knobs, with the sidecar."""
    yield applied(ev, ev.own)


def applied(ev: Evaluation, score: Score) -> Score:
    """A score with the sidecar mixed in; its seconds are those of both. Raises SidecarError."""
    t0, cfg = time.perf_counter(), ev.cfg
    nats, share = shared(ev, score.nats)
    weights = {"mix": "learned", "order": cfg.eval_ngram_order} if cfg.eval_mix_learn else {
        "mix": "fixed", "cache_weight": cfg.eval_cache_mix_weight, "bigram_weight": cfg.eval_bigram_mix_weight}
    spent_s = time.perf_counter() - t0
    return Score("sidecar" if score is ev.own else f"{score.name}_sidecar", nats, score.seconds + spent_s, {
        **score.report, "of": score.name, **weights, "cache": cfg.eval_cache_size, "scope": "+".join(scopes(cfg)),
        "share": round(share, 4), "sidecar_s": round(spent_s, 3)})


def mixed(ev: Evaluation, nats: np.ndarray) -> np.ndarray:
    """Nats (N - 1,) of the targets under the mixture, float64, from a model's (N - 1,). Raises SidecarError."""
    return shared(ev, nats)[0]


def distributions(ev: Evaluation, targets: Sequence[int] | np.ndarray) -> Tensor:
    """Log-probabilities of the mixture at these targets of `score`, (n, V) float64."""
    return written_out(ev, ev.own.nats, targets, ev.distributions(targets))


def written_out(ev: Evaluation, nats: np.ndarray, targets: Sequence[int] | np.ndarray, log_p: Tensor) -> Tensor:
    """The same on top of any model: its nats of all targets, (N - 1,), and its log-probabilities at these, (n, V)."""
    car = sidecar_of(ev)
    weights = mixture(car, ev.cfg, nats, targets).weights
    rows = zip(targets, log_p.double().exp().numpy(), strict=True)
    return torch.from_numpy(np.log([car.distribution(int(t), probs, weights[int(t)]) for t, probs in rows]))


def shared(ev: Evaluation, nats: np.ndarray) -> tuple[np.ndarray, float]:
    """Nats under the mixture and the mean weight of the sidecar in it, the same bits on all ranks."""
    found = np.zeros(0)
    if ev.rt.master:
        mine = mixture(sidecar_of(ev), ev.cfg, nats)
        found = np.append(mine.nats, 1 - mine.model_share)
    found = np.frombuffer(ev.rt.broadcast(found.tobytes()))
    return found[:-1], float(found[-1])


def sidecar_of(ev: Evaluation) -> Sidecar:
    return Sidecar(ev.tokens, ev.model.tok_emb.num_embeddings, doc_starts=np.flatnonzero(ev.tokens == ev.bos_id),
                   cache_size=ev.cfg.eval_cache_size, max_order=ev.cfg.eval_ngram_order, scopes=scopes(ev.cfg))


def scopes(cfg: Config) -> tuple[str, ...]:
    """Whose counts are mixed: fixed weights have one scope."""
    asked = SCOPES if cfg.eval_sidecar_scope == "both" else (cfg.eval_sidecar_scope,)
    return asked if cfg.eval_mix_learn else asked[:1]


def mixture(car: Sidecar, cfg: Config, nats: np.ndarray, watch: Sequence[int] | np.ndarray = ()) -> Mixture:
    watched = [int(t) for t in watch]
    if cfg.eval_mix_learn:
        return car.learned_mixture(nats, watched)
    return car.fixed_mixture(nats, cfg.eval_cache_mix_weight, cfg.eval_bigram_mix_weight, watched)
