"""scripts/sidecar.py: counts are those of a plain dictionary, every mixture is a distribution made of the past alone, and
learned weights lose no more than their bound on any text.

    bash scripts/test.sh tests/test_sidecar.py
"""
from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import sidecar
from sidecar import GRID, GUARD, SCOPES, Sidecar, SidecarError, learned_weights

LN2 = math.log(2)


@dataclass(frozen=True)
class Text:
    tokens: np.ndarray
    vocab_size: int
    starts: np.ndarray

    def sidecar(self, **options: Any) -> Sidecar:
        settings: dict[str, Any] = {"cache_size": 7, "max_order": 4} | options
        return Sidecar(self.tokens, self.vocab_size, doc_starts=self.starts, **settings)


def random_text(seed: int, size: int = 300, vocab: int = 4) -> Text:
    """Few tokens, so that contexts recur; documents begin with any token, some follow each other at once."""
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.choice(size, size // 25, replace=False))
    return Text(rng.integers(0, vocab, size).astype(np.uint16), vocab, starts)


def prose(size: int = 1500) -> Text:
    """The README's bytes; a paragraph is a document, which begins with the second of two line feeds."""
    data = np.frombuffer((ROOT / "README.md").read_bytes()[:size], dtype=np.uint8)
    return Text(data, 256, np.flatnonzero((data[1:] == 10) & (data[:-1] == 10)) + 1)


TEXTS: dict[str, Callable[[], Text]] = {
    "random": lambda: random_text(0),
    "more_random": lambda: random_text(1, size=400, vocab=11),
    "prose": prose,
    "one_document": lambda: Text(random_text(2).tokens, 4, np.array([], dtype=np.int64)),
    "bos_first": lambda: Text(random_text(3).tokens, 4, np.array([0, 1, 50, 51, 298, 299])),
    "one_word": lambda: Text(np.full(200, 3), 5, np.array([0, 90])),
    "edges_of_the_vocabulary": lambda: Text(np.tile([0, 1023, 1023, 0, 0], 40), 1024, np.array([7])),
}


@pytest.fixture(params=TEXTS)
def text(request: pytest.FixtureRequest) -> Text:
    return TEXTS[request.param]()


def model_of(text: Text, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A model that knows nothing: its distributions (N-1, V), and its loss on each target in nats."""
    probs = np.random.default_rng(seed).dirichlet(np.full(text.vocab_size, 0.5), text.tokens.size - 1) * 0.99
    probs += 0.01 / text.vocab_size
    return probs, -np.log(probs[np.arange(text.tokens.size - 1), text.tokens[1:].astype(int)])


# --- counts and experts -------------------------------------------------------------------------------------------------


def past_of(text: Text, target: int, scope: str) -> list[int]:
    starts = [s for s in text.starts if s < target] if scope == "doc" else []
    return text.tokens[int(starts[-1]) if starts else 0:target].tolist()


def dictionary_counts(text: Text, scope: str, length: int) -> list[tuple[int, int, int]]:
    """(hits, total, distinct) of each target, learned token by token; a new document begins with an empty dictionary."""
    table: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    context: deque[int] = deque(maxlen=length)
    starts, found = set(text.starts.tolist()), []
    for t in range(1, text.tokens.size):
        if scope == "doc" and t - 1 in starts:
            table.clear()
            context.clear()
        context.append(int(text.tokens[t - 1]))
        known = table[tuple(context)] if len(context) == length else Counter()
        found.append((known[int(text.tokens[t])], sum(known.values()), sum(1 for n in known.values() if n)))
        known[int(text.tokens[t])] += 1
    return found


@pytest.mark.parametrize("scope", SCOPES)
def test_counts_are_those_of_a_dictionary(text: Text, scope: str) -> None:
    for length, counts in enumerate(text.sidecar(max_order=6).counts(scope), 1):
        found = list(zip(counts.hits.tolist(), counts.total.tolist(), counts.distinct.tolist(), strict=True))
        assert found == dictionary_counts(text, scope, length), f"contexts of {length}"


@pytest.mark.parametrize("scope", SCOPES)
def test_cache_and_bigram_are_their_formulas(text: Text, scope: str) -> None:
    car = text.sidecar(scopes=[scope])
    cache, bigram = car.cache(), car.bigram()
    for t, (hits, total, distinct) in enumerate(dictionary_counts(text, scope, 1), 1):
        recent, token = past_of(text, t, scope)[-7:], int(text.tokens[t])
        expected = (recent.count(token) + 1 / text.vocab_size) / (len(recent) + 1)
        assert cache[t - 1] == pytest.approx(expected, rel=1e-14)
        smoothed = (hits + distinct * expected) / (total + distinct) if total else expected
        assert bigram[t - 1] == pytest.approx(smoothed, rel=1e-14)


def test_counts_of_a_document_are_those_of_it_alone(text: Text) -> None:
    """Its last target is the BOS of the next one, if there is one."""
    whole = list(text.sidecar().counts("doc"))
    bounds = sorted({0, *text.starts.tolist()})
    for begin, end in zip(bounds, [*bounds[1:], text.tokens.size - 1], strict=True):
        alone = Sidecar(text.tokens[begin:end + 1], text.vocab_size, max_order=4).counts("stream")
        for a, b in zip(whole, alone, strict=True):
            for part in ("hits", "total", "distinct"):
                assert np.array_equal(getattr(a, part)[begin:end], getattr(b, part))


def test_each_expert_is_a_distribution_or_silent(text: Text) -> None:
    car = text.sidecar()
    names = ["cache", "bigram", "doc2", "stream2", "doc3", "stream3", "doc4", "stream4"]
    known = {"cache": car.cache(), "bigram": car.bigram()} | {
        f"{scope}{n}": counts.hits / np.maximum(counts.total, 1)
        for scope in SCOPES for n, counts in enumerate(car.counts(scope), 2)}
    for t in range(1, text.tokens.size, 7):
        for name in names:
            probs = car.expert(name, t)
            silent = name[-1].isdigit() and not probs.any()
            assert probs.sum() == pytest.approx(0 if silent else 1, abs=1e-12)
            assert probs.min() >= 0
            assert probs[int(text.tokens[t])] == pytest.approx(known[name][t - 1], rel=1e-14)


# --- mixtures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_every_score_is_of_a_distribution_over_the_vocabulary(text: Text, kind: str) -> None:
    probs, nats = model_of(text)
    car, watch = text.sidecar(), range(1, text.tokens.size, 5)
    mixture = car.learned_mixture(nats, watch) if kind == "learned" else car.fixed_mixture(nats, 0.1, 0.25, watch)
    assert list(mixture.weights) == list(watch)
    for t, weights in mixture.weights.items():
        mixed = car.distribution(t, probs[t - 1], weights)
        assert mixed.sum() == pytest.approx(1, abs=1e-12)
        assert mixed.min() > 0
        assert -math.log(mixed[int(text.tokens[t])]) == pytest.approx(mixture.nats[t - 1], abs=1e-12)
        assert all(0 <= w <= 1 for w in weights.values())


def test_fixed_weights_are_the_formula(text: Text) -> None:
    _, nats = model_of(text)
    car = text.sidecar()
    mixture = car.fixed_mixture(nats, 0.03, 0.2)
    expected = 0.77 * np.exp(-nats) + 0.03 * car.cache() + 0.2 * car.bigram()
    assert np.allclose(np.exp(-mixture.nats), expected, rtol=1e-13, atol=0)
    assert sum(step.gain_nats for step in mixture.steps) == pytest.approx(nats.sum() - mixture.nats.sum(), abs=1e-9)
    assert np.allclose(car.fixed_mixture(nats, 0.0, 0.0).nats, nats, rtol=1e-14, atol=1e-15)


def test_the_chain_is_mixed_step_by_step_as_reported(text: Text) -> None:
    _, nats = model_of(text)
    mixture = text.sidecar().learned_mixture(nats)
    assert [step.name for step in mixture.steps] == [
        "cache", "doc2", "stream2", "doc3", "stream3", "doc4", "stream4", "guard"]
    assert sum(step.gain_nats for step in mixture.steps) == pytest.approx(nats.sum() - mixture.nats.sum(), abs=1e-9)


@pytest.mark.parametrize("cut", [1, 2, 60, 149, 150, 151])
def test_no_bit_up_to_a_token_depends_on_what_comes_after_it(text: Text, cut: int) -> None:
    """Another text from token `cut` on, or none: scores of targets before it, and the weights at it, keep their bits."""
    _, nats = model_of(text)
    rng = np.random.default_rng(cut)
    other_tokens, other_nats = text.tokens.copy(), nats.copy()
    other_tokens[cut:] = rng.integers(0, text.vocab_size, text.tokens.size - cut)
    other_nats[cut - 1:] = rng.exponential(3.0, nats.size - cut + 1)
    known, watch = text.starts[text.starts < cut], [t for t in (1, 2, cut - 1, cut) if 1 <= t <= cut]
    here = text.sidecar().learned_mixture(nats, watch)
    other = Text(other_tokens, text.vocab_size, np.append(known, cut).astype(int))
    changed = other.sidecar().learned_mixture(other_nats, watch)
    ended = Text(text.tokens[:cut + 1], text.vocab_size, known).sidecar().learned_mixture(nats[:cut], watch)
    for mixture in (changed, ended):
        assert np.array_equal(mixture.nats[:cut - 1], here.nats[:cut - 1])
        assert mixture.weights == here.weights


def test_a_long_text_keeps_its_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the chunks in which weights are learned."""
    monkeypatch.setattr(sidecar, "CHUNK", 64)
    text = random_text(5, size=4000, vocab=30)
    _, nats = model_of(text)
    whole = text.sidecar().learned_mixture(nats)
    for cut in (63, 64, 65, *range(990, 1010), 2049):
        part = Text(text.tokens[:cut + 1], 30, text.starts[text.starts < cut]).sidecar().learned_mixture(nats[:cut])
        assert np.array_equal(part.nats, whole.nats[:cut])


def test_the_same_call_gives_the_same_bits_whatever_the_integer_type() -> None:
    text = prose()
    _, nats = model_of(text)
    a, b = (Sidecar(text.tokens.astype(kind), 256, doc_starts=text.starts).learned_mixture(nats)
            for kind in ("<u2", np.int64))
    assert np.array_equal(a.nats, b.nats)
    assert a.steps == b.steps


def test_keys_too_wide_for_a_word_are_sorted_alike() -> None:
    key = np.random.default_rng(0).integers(0, 50, 1000)
    for narrow, wide in zip(sidecar.sort_groups(key, 50), sidecar.sort_groups(key, 1 << 62), strict=True):
        assert np.array_equal(narrow, wide)


# --- what learning can lose ---------------------------------------------------------------------------------------------


def bayes_one_by_one(ratio: np.ndarray, bucket: np.ndarray, grid: np.ndarray) -> list[float]:
    """The posterior's mean before each position, updated by Bayes' rule after it."""
    beliefs = {b: np.full(grid.size, 1 / grid.size) for b in set(bucket.tolist())}
    weights = []
    for r, b in zip(ratio.tolist(), bucket.tolist(), strict=True):
        weights.append(float(beliefs[b] @ grid))
        beliefs[b] = beliefs[b] * (1 - grid + grid * r)
        beliefs[b] /= beliefs[b].sum()
    return weights


@pytest.mark.parametrize("chunk", [1, 7, 8192])
@pytest.mark.parametrize("grid", [GRID, GUARD], ids=["grid", "guard"])
def test_learned_weights_are_bayes_rule(monkeypatch: pytest.MonkeyPatch, grid: np.ndarray, chunk: int) -> None:
    monkeypatch.setattr(sidecar, "CHUNK", chunk)
    rng = np.random.default_rng(chunk)
    ratio, bucket = rng.lognormal(0, 1, 500), rng.integers(0, 5, 500).astype(np.uint16) * 3
    assert np.allclose(learned_weights(ratio, bucket, grid), bayes_one_by_one(ratio, bucket, grid), rtol=1e-10, atol=1e-14)


RATIOS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "never_right": lambda rng, n: np.zeros(n),
    "always_right": lambda rng, n: np.full(n, 1e6),
    "turns_bad": lambda rng, n: np.repeat([3.0, 0.0], [n // 2, n - n // 2]),
    "turns_good": lambda rng, n: np.repeat([0.0, 3.0], [n // 2, n - n // 2]),
    "alternates": lambda rng, n: np.resize([2.0, 0.0], n),
    "heavy_tails": lambda rng, n: rng.lognormal(-4, 5, n),
}


@pytest.mark.parametrize("kind", RATIOS)
def test_a_bucket_loses_at_most_the_logarithm_of_the_grid(kind: str) -> None:
    rng = np.random.default_rng(0)
    ratio, bucket = RATIOS[kind](rng, 3000), rng.integers(0, 3, 3000).astype(np.uint16)
    weight = learned_weights(ratio, bucket, GRID)
    for b in range(3):
        mine = bucket == b
        gained = np.log(1 - weight[mine] + weight[mine] * ratio[mine]).sum()
        best = np.log(1 - GRID[:, None] + GRID[:, None] * ratio[mine]).sum(axis=1).max()
        assert gained >= best - math.log(GRID.size) - 1e-9


LOSSES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "perfect": lambda rng, n: np.zeros(n),
    "hopeless": lambda rng, n: np.full(n, 600.0),
    "perfect_then_hopeless": lambda rng, n: np.repeat([0.0, 20.0], [n // 2, n - n // 2]),
    "hopeless_then_perfect": lambda rng, n: np.repeat([20.0, 0.0], [n // 2, n - n // 2]),
    "alternates": lambda rng, n: np.resize([0.0, 12.0], n),
    "random": lambda rng, n: rng.exponential(2.0, n),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_no_text_and_no_model_cost_more_than_one_bit(text: Text, loss: str) -> None:
    nats = LOSSES[loss](np.random.default_rng(1), text.tokens.size - 1)
    mixture = text.sidecar().learned_mixture(nats)
    assert np.isfinite(mixture.nats).all()
    assert mixture.nats.min() >= 0
    assert mixture.nats.sum() <= nats.sum() + LN2 + 1e-9
    assert mixture.steps[-1].gain_nats >= -LN2 - 1e-9         # nor against the chain


def test_tokens_that_no_context_foretells_cost_at_most_one_bit() -> None:
    """Uniform tokens, and a model that knows it: nothing is to be gained."""
    for seed in range(5):
        tokens = np.random.default_rng(seed).integers(0, 64, 5000)
        nats = np.full(4999, math.log(64))
        assert nats.sum() - 2.0 < Sidecar(tokens, 64).learned_mixture(nats).nats.sum() <= nats.sum() + LN2 + 1e-8


def test_what_recurs_is_learned() -> None:
    """A text of one random line over and over: after some lines hardly anything of it costs."""
    line = np.random.default_rng(0).integers(0, 64, 40)
    nats = np.full(40 * 50 - 1, math.log(64))
    learned = Sidecar(np.tile(line, 50), 64).learned_mixture(nats).nats
    assert learned[-400:].mean() < 0.05 * math.log(64)


# --- edges and faults ---------------------------------------------------------------------------------------------------


def test_a_text_of_one_token_has_nothing_to_score() -> None:
    car = Sidecar(np.array([3]), 5, doc_starts=np.array([0]))
    for mixture in (car.learned_mixture(np.array([])), car.fixed_mixture(np.array([]), 0.1, 0.1)):
        assert mixture.nats.shape == (0,)
        assert all(step.share == 0 and step.gain_nats == 0 for step in mixture.steps)


def test_the_first_targets_have_an_empty_past() -> None:
    car = Sidecar(np.array([4, 4]), 5, doc_starts=np.array([0]))
    assert car.cache() == pytest.approx([(1 + 1 / 5) / 2])          # the BOS itself is in it
    mixture = car.learned_mixture(np.array([1.0]), [1])
    assert mixture.weights[1] == {"cache": pytest.approx(GRID.mean()), "guard": 0.5} | {
        f"{scope}{n}": 0.0 for n in range(2, 6) for scope in SCOPES}


TOKENS = np.array([0, 1, 2, 1, 0])
ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"tokens": np.array([], dtype=np.int64)}, r"tokens must be a row of at least one integer, got int64 of shape \(0,\)"),
    ({"tokens": TOKENS.reshape(1, 5)}, r"tokens must be a row of at least one integer, got int64 of shape \(1, 5\)"),
    ({"tokens": TOKENS / 2}, r"tokens must be a row of at least one integer, got float64 of shape \(5,\)"),
    ({"tokens": TOKENS + 1}, r"tokens must be in 0 \.\. 2, got 1 \.\. 3"),
    ({"tokens": TOKENS - 1}, r"tokens must be in 0 \.\. 2, got -1 \.\. 1"),
    ({"cache_size": 0}, "cache_size must be at least 1 token, got 0"),
    ({"max_order": 1}, r"max_order must be at least 2 \(bigrams\), got 1"),
    ({"scopes": []}, "scopes must be of doc and stream, got none"),
    ({"scopes": ["doc", "doc"]}, "scopes must be of doc and stream, got doc, doc"),
    ({"scopes": ["window"]}, "scopes must be of doc and stream, got window"),
    ({"doc_starts": np.array([2, 1])}, "doc_starts must be increasing indices of the 5 tokens"),
    ({"doc_starts": np.array([1, 1])}, "doc_starts must be increasing indices of the 5 tokens"),
    ({"doc_starts": np.array([5])}, "doc_starts must be increasing indices of the 5 tokens"),
    ({"doc_starts": np.array([-1])}, "doc_starts must be increasing indices of the 5 tokens"),
    ({"doc_starts": np.array([True])}, "doc_starts must be increasing indices of the 5 tokens"),
    ({"doc_starts": np.array([[1]])}, "doc_starts must be increasing indices of the 5 tokens"),
]


@pytest.mark.parametrize(("changes", "message"), ARGUMENTS)
def test_a_wrong_argument_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SidecarError, match=f"^{message}$"):
        Sidecar(**{"tokens": TOKENS, "vocab_size": 3} | changes)


NATS = np.ones(4)
LOSS, WEIGHTS = r"model_nats must be in 0 \.\. 600, got ", "weights must be at least 0, together below 1, got cache "
CALLS: list[tuple[Callable[[Sidecar], Any], str]] = [
    (lambda car: car.learned_mixture(NATS[1:]), r"model_nats must have a value for each of 4 targets, got shape \(3,\)"),
    (lambda car: car.learned_mixture(np.array([1, -1e-9, 1, -2])), LOSS + "-1e-09 for target 2"),
    (lambda car: car.fixed_mixture(np.array([1, 1, np.nan, 1]), 0, 0), LOSS + "nan for target 3"),
    (lambda car: car.fixed_mixture(np.array([np.inf, 1, 1, 1]), 0, 0), LOSS + "inf for target 1"),
    (lambda car: car.fixed_mixture(NATS, -0.1, 0), WEIGHTS + r"-0\.1, bigram 0"),
    (lambda car: car.fixed_mixture(NATS, 0.5, 0.5), WEIGHTS + r"0\.5, bigram 0\.5"),
    (lambda car: car.fixed_mixture(NATS, np.nan, 0), WEIGHTS + "nan, bigram 0"),
    (lambda car: car.learned_mixture(NATS, [0]), r"targets are numbered 1 \.\. 4, got 0"),
    (lambda car: car.learned_mixture(NATS, [5]), r"targets are numbered 1 \.\. 4, got 5"),
    (lambda car: car.expert("doc6", 1), "experts are cache, bigram, doc2, .*, stream5, got doc6"),
    (lambda car: car.expert("cache", 0), r"targets are numbered 1 \.\. 4, got 0"),
    (lambda car: car.distribution(1, np.ones(2) / 2, {}), r"model_probs must be \(3,\), got \(2,\)"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_a_wrong_call_is_one_clear_line(call: Callable[[Sidecar], Any], message: str) -> None:
    with pytest.raises(SidecarError, match=f"^{message}$"):
        call(Sidecar(TOKENS, 3))
