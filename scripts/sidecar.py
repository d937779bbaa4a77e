"""A sidecar to the model at evaluation: how often earlier tokens were followed by this one, mixed into its probabilities.

    sidecar = Sidecar(tokens, vocab_size, doc_starts=np.flatnonzero(tokens == bos_id))
    mixture = sidecar.learned_mixture(model_nats)                   # or .fixed_mixture(model_nats, 0.02, 0.1)
    mixture.nats.sum()                                              # in nats, of all targets

Tokens are numbered 0 .. N-1 and each but the first is a target; arrays over targets have N-1 entries, t-1 that of target t.
Every expert is a distribution over the vocabulary made of counts of tokens[:t] alone, and every mixture is linear in
probability with weights made of tokens[:t] and of the model's scores of targets before t. So the mixture at t is a
distribution, it needs no more of the model than its probability of the target, and no score depends on a later token. All
is computed from whole arrays in one process: the same bits for any number of ranks, and for any text that follows.

Fixed weights: (1 - a - b) model + a cache + b bigram. The cache is the relative frequency among the last tokens (Kuhn and De
Mori 1990, "A cache-based natural language model for speech recognition"; the unigram cache with which Grave et al. 2017,
"Improving neural language models with a continuous cache", compare); the bigram backs off to it (Witten and Bell 1991).

Learned weights: a chain of experts, the cache first, then contexts of growing length, in the document and in all text. Each
changes the distribution P before it to (1 - w) P + w F, where F is the plain relative frequency of what followed the
context; where the context is new P stands, which is the back-off. w is the posterior mean over a grid of fixed weights
(Cover 1991, "Universal portfolios", for two assets and on a grid), learned apart for each bucket of positions: how often the
context was seen, how many different tokens followed it, how surprised the model was by the token before. A Bayes mixture
of the plain model and the end of the chain closes it. For any text and any model, summed over the whole text,

    nats(mixture) <= min(nats(model), nats(chain)) + ln 2, which is one bit in total, and
    nats(after an expert) <= nats(before, mixed with it by the best weight in each bucket) + buckets * ln(len(GRID)).

Not here: mixing logits (PAQ), whose normaliser needs all V probabilities of the model and of each expert everywhere; and
updates after each token (soft-Bayes, exponentiated gradient), which no cumulative sum gives.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

GRID = np.array([0, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 19 / 20])  # weights of an expert; < 1, as F may be 0
GUARD = np.array([0.0, 1.0])            # all model or all chain
SURPRISE_NATS = (1.0, 3.0, 5.0)         # edges of the model's loss on the token before
TOTAL_BITS, DISTINCT_BITS = 8, 5        # counts are told apart by their length in bits, at most so many
CHUNK = 8192                            # positions worked on at once; (len(GRID), CHUNK) float64 stay in the cache
MOST_NATS = 600.0                       # of the model: beyond, what the chain leaves of a probability is no normal float64
SCOPES = ("doc", "stream")              # counts of the target's own document; of everything before the target


class SidecarError(ValueError):
    """An argument that cannot be used; the message says what was found and what is wanted."""


@dataclass(frozen=True)
class Counts:
    """What followed each target's context before the target; (N-1,) int32 each, all 0 where the context is new."""
    hits: np.ndarray        # times the target did
    total: np.ndarray       # times any token did
    distinct: np.ndarray    # number of different tokens that did


@dataclass(frozen=True)
class Step:
    """What one expert did for a mixture, over a whole text."""
    name: str               # cache, bigram, doc2, stream2, doc3, ... (numbers are n of n-grams, target included), guard
    share: float            # of targets that it had a say in
    mean_weight: float      # over these
    gain_nats: float        # off the sum; below 0 where it cost


@dataclass(frozen=True)
class Mixture:
    """Scores under a mixture, and the weights by which `Sidecar.distribution` writes out what made them."""
    nats: np.ndarray                            # (N-1,) float64
    steps: tuple[Step, ...]                     # in the order of mixing
    weights: dict[int, dict[str, float]]        # of each target asked for: expert: weight
    model_share: float                          # mean weight that the model is left with


class Sidecar:
    """The counts of one text, tokens (N,) of any integer type. Raises SidecarError.

    doc_starts: indices of the tokens that begin a document (BOS), increasing; without, all text is one document. Scope
    "doc" counts as if the text began with the last BOS before the target: a BOS is the last target of the document that it
    ends and the first context of its own. max_order: tokens of the longest n-grams, the target included. scopes: whose
    counts the learned mixture chains, in this order for each length; cache and bigram take the first.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, *, cache_size: int = 256, max_order: int = 5,
                 doc_starts: np.ndarray | None = None, scopes: Sequence[str] = SCOPES):
        tokens, starts = np.asarray(tokens), np.asarray([] if doc_starts is None else doc_starts)
        check_text(tokens, vocab_size, starts)
        check(cache_size >= 1, f"cache_size must be at least 1 token, got {cache_size}")
        check(max_order >= 2, f"max_order must be at least 2 (bigrams), got {max_order}")
        check(0 < len(set(scopes)) == len(scopes) and set(scopes) <= set(SCOPES),
              f"scopes must be of {' and '.join(SCOPES)}, got {', '.join(scopes) or 'none'}")
        self.tokens, self.doc_starts = tokens.astype(np.int64), starts.astype(np.int64)
        self.vocab_size, self.cache_size, self.max_order, self.scopes = vocab_size, cache_size, max_order, tuple(scopes)
        self.targets = self.tokens[1:]

    # --- counts ----------------------------------------------------------------------------------------------------------

    def documents(self, scope: str) -> np.ndarray:
        """Number of the document whose counts predict each target, (N-1,) int64: of the token before it."""
        if scope == "stream":
            return np.zeros(self.targets.size, dtype=np.int64)
        return np.searchsorted(self.doc_starts, np.arange(self.targets.size), side="right")

    def counts(self, scope: str) -> Iterator[Counts]:
        """Counts of contexts of 1, 2, ... max_order - 1 tokens.

        The last tokens of contexts are held sorted by (context, place), so the place in its group is how often a context
        was seen before. Sorting each group by the next token gives the groups of contexts one token longer.
        """
        n, vocab = self.targets.size, self.vocab_size
        goes_on = np.arange(n + 1) < n                          # False where no context of two tokens or more ends
        if scope == "doc":
            goes_on[self.doc_starts] = False
        at, first = sort_groups(self.documents(scope) * vocab + self.tokens[:-1], vocab * (self.doc_starts.size + 1))
        seen = np.arange(n) - first
        for _ in range(self.max_order - 1):
            counts, at, seen = self._counts_once(at, seen)
            yield counts
            at, seen = at[goes_on[at]], seen[goes_on[at]]       # who leaves was the last of its group: places stay in step

    def _counts_once(self, at: np.ndarray, seen: np.ndarray) -> tuple[Counts, np.ndarray, np.ndarray]:
        """Counts of the contexts that end `at` and were `seen` so often before, both sorted by (context, place); and the
        same two for the contexts one token longer. Left out is what stands alone: it was and will be new, and so will be
        every context that it ends.
        """
        alone = (seen == 0) & np.append(seen[1:] == 0, True)[:seen.size]
        at, seen = at[~alone], seen[~alone]
        first = np.arange(at.size) - seen
        order, first_next = sort_groups(first * self.vocab_size + self.tokens[at + 1], self.vocab_size * at.size)
        hits = np.empty_like(seen)
        hits[order] = np.arange(at.size) - first_next
        fresh = np.cumsum(hits == 0) - (hits == 0)
        counts = Counts(*(spread(values, at, self.targets.size) for values in (hits, seen, fresh - fresh[first])))
        return counts, at[order] + 1, hits[order]

    # --- experts: probability of each target, (N-1,) float64 ---------------------------------------------------------------

    def cache(self) -> np.ndarray:
        """(hits + 1 / V) / (window + 1), in the last `cache_size` tokens of the first scope: never 0, 1 / V at the start."""
        n = self.tokens.size
        begin = np.append(0, self.doc_starts)[np.append(0, self.documents(self.scopes[0]))]
        begin = np.maximum(begin, np.arange(n) - self.cache_size)       # of the window of every token, as a target
        at, _ = sort_groups(self.tokens, self.vocab_size)
        key = self.tokens[at] * n
        hits = spread(np.arange(n) - np.searchsorted(key + at, key + begin[at]), at, n)
        return (hits[1:] + 1 / self.vocab_size) / (np.arange(1, n) - begin[1:] + 1)

    def bigram(self) -> np.ndarray:
        """(hits + distinct * cache) / (total + distinct), Witten and Bell's escape; the cache where the context is new."""
        counts, cache = next(self.counts(self.scopes[0])), self.cache()
        known = counts.total + counts.distinct
        return np.where(known > 0, (counts.hits + counts.distinct * cache) / np.maximum(known, 1), cache)

    # --- mixtures ---------------------------------------------------------------------------------------------------------

    def fixed_mixture(self, model_nats: np.ndarray, cache_weight: float, bigram_weight: float,
                      watch: Sequence[int] = ()) -> Mixture:
        """(1 - a - b) model + a cache + b bigram, from the model's loss on each target, (N-1,) nats; `watch`: the targets
        whose weights to keep.
        """
        a, b = cache_weight, bigram_weight
        check(min(a, b) >= 0 and a + b < 1, f"weights must be at least 0, together below 1, got cache {a:g}, bigram {b:g}")
        mixing = Mixing(self._checked(model_nats), self._numbered(watch))
        mixing.add("cache", np.full(self.targets.size, a / (1 - b)), self.cache())
        mixing.add("bigram", np.full(self.targets.size, b), self.bigram())
        return mixing.result()

    def learned_mixture(self, model_nats: np.ndarray, watch: Sequence[int] = ()) -> Mixture:
        """The chain and its guard, from the model's loss on each target, (N-1,) nats; `watch`: the targets whose weights to
        keep. Never above the model's own sum by more than ln 2.
        """
        nats = self._checked(model_nats)
        mixing = Mixing(nats, self._numbered(watch))
        model = mixing.mixed
        surprise = np.digitize(np.append(0.0, nats)[:-1], SURPRISE_NATS).astype(np.uint16)
        mixing.learn("cache", self.cache(), surprise)
        for name, counts in self._chain():
            frequency, known = counts.hits / np.maximum(counts.total, 1), np.flatnonzero(counts.total)
            mixing.learn(name, frequency, buckets(surprise, counts), at=known)
        mixing.learn("guard", mixing.mixed, np.zeros_like(surprise), grid=GUARD, base=model)
        return mixing.result()

    def _chain(self) -> Iterator[tuple[str, Counts]]:
        for order, lengths in enumerate(zip(*(self.counts(scope) for scope in self.scopes), strict=True), 2):
            yield from ((f"{scope}{order}", counts) for scope, counts in zip(self.scopes, lengths, strict=True))

    def _checked(self, model_nats: np.ndarray) -> np.ndarray:
        nats = np.asarray(model_nats, dtype=np.float64)
        check(nats.shape == self.targets.shape, f"model_nats must have a value for each of {self.targets.size} targets,"
                                                f" got shape {nats.shape}")
        for i in np.flatnonzero(~((nats >= 0) & (nats <= MOST_NATS)))[:1]:
            raise SidecarError(f"model_nats must be in 0 .. {MOST_NATS:g}, got {nats[i]:g} for target {i + 1}")
        return nats

    def _numbered(self, watch: Sequence[int]) -> list[int]:
        for t in watch:
            check(1 <= t <= self.targets.size, f"targets are numbered 1 .. {self.targets.size}, got {t}")
        return [int(t) for t in watch]

    # --- distributions, one at a time and by plain counting: what an audit holds the arrays above against ------------------

    def distribution(self, target: int, model_probs: np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
        """The mixture's distribution (V,) at a target, from the model's there and `Mixture.weights[target]`."""
        model = np.asarray(model_probs, dtype=np.float64)
        check(model.shape == (self.vocab_size,), f"model_probs must be ({self.vocab_size},), got {model.shape}")
        mixed = model
        for name, weight in weights.items():
            if name == "guard":
                mixed = model + weight * (mixed - model)
            else:
                mixed = mixed + weight * (self.expert(name, target) - mixed)
        return mixed

    def expert(self, name: str, target: int) -> np.ndarray:
        """The distribution (V,) of one expert at a target; that of a context is all 0 where it is new."""
        names = ["cache", "bigram", *(f"{scope}{order}" for order in range(2, self.max_order + 1) for scope in SCOPES)]
        check(name in names, f"experts are {', '.join(names)}, got {name}")
        self._numbered([target])
        scope, vocab = name.rstrip("0123456789"), self.vocab_size
        past = self._past(scope if scope in SCOPES else self.scopes[0], target)
        recent = past[-self.cache_size:]
        cache = (np.bincount(recent, minlength=vocab) + 1 / vocab) / (recent.size + 1)
        if name == "cache":
            return cache
        hits = followers(past, 1 if name == "bigram" else int(name[len(scope):]) - 1, vocab)
        if name == "bigram":
            distinct = np.count_nonzero(hits)
            return (hits + distinct * cache) / (hits.sum() + distinct) if distinct else cache
        return hits / max(hits.sum(), 1)

    def _past(self, scope: str, target: int) -> np.ndarray:
        """The tokens that count for a target."""
        starts = self.doc_starts[self.doc_starts < target] if scope == "doc" else self.doc_starts[:0]
        return self.tokens[int(starts[-1]) if starts.size else 0:target]


class Mixing:
    """The probability of each target while experts are mixed in, one after another."""

    def __init__(self, model_nats: np.ndarray, watched: Sequence[int]):
        self.mixed = np.exp(-model_nats)
        self.steps: list[Step] = []
        self.weights: dict[int, dict[str, float]] = {t: {} for t in watched}
        self.model_weight = np.ones(model_nats.size)

    def add(self, name: str, weight: np.ndarray, expert: np.ndarray, base: np.ndarray | None = None) -> None:
        """(1 - weight) base + weight expert, (N-1,) each; the base is what was mixed so far, or the model under that."""
        self.model_weight = self.model_weight * (1 - weight) if base is None else 1 - weight * (1 - self.model_weight)
        base = self.mixed if base is None else base
        mixed = base + weight * (expert - base)
        acting = np.count_nonzero(weight)
        self.steps.append(Step(name, acting / max(weight.size, 1), float(weight.sum()) / max(acting, 1),
                               float(np.log(mixed / self.mixed).sum())))
        for t, known in self.weights.items():
            known[name] = float(weight[t - 1])
        self.mixed = mixed

    def learn(self, name: str, expert: np.ndarray, bucket: np.ndarray, at: np.ndarray | slice = slice(None),
              grid: np.ndarray = GRID, base: np.ndarray | None = None) -> None:
        """The same with the weight learned, at the targets `at` and 0 elsewhere."""
        under = self.mixed if base is None else base
        weight = np.zeros(expert.size)
        weight[at] = learned_weights(expert[at] / under[at], bucket[at], grid)
        self.add(name, weight, expert, base)

    def result(self) -> Mixture:
        share = float(self.model_weight.sum()) / max(self.model_weight.size, 1)
        return Mixture(-np.log(self.mixed), tuple(self.steps), self.weights, share)


def learned_weights(ratio: np.ndarray, bucket: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The expert's weight at each of n positions, (n,) float64: the mean of `grid` under its posterior given the positions
    before in the same bucket. ratio: expert over base, (n,), of the target; bucket: (n,) uint16.

    The prior is even, so a bucket loses at most ln(len(grid)) nats against the best of the grid: the mixture of a Bayes
    posterior's mean is the Bayes mixture, because a mixture is linear in its weight. Each bucket has its own sums, from
    its first position on: what comes later changes no bit of them.
    """
    weight, grid = np.empty(ratio.size), grid[:, None]
    order = np.argsort(bucket, kind="stable")                           # a radix sort
    edges = np.cumsum(np.bincount(bucket, minlength=1))
    for begin, end in zip(np.append(0, edges[:-1]), edges, strict=True):
        log_posterior = np.zeros((grid.size, 1))
        for start in range(begin, end, CHUNK):
            at = order[start:min(start + CHUNK, end)]
            gains = np.log(1 - grid + grid * ratio[at])                 # (J, chunk) nats
            log_posteriors = np.cumsum(np.concatenate((log_posterior, gains), axis=1), axis=1)
            log_posterior = log_posteriors[:, -1:] - log_posteriors[:, -1].max()
            before = log_posteriors[:, :-1]
            posterior = np.exp(before - before.max(axis=0))
            # Row by row: numpy's own sum has another order of terms for a chunk of one position than for more.
            weight[at] = sum(grid * posterior) / sum(posterior)
    return weight


def buckets(surprise: np.ndarray, counts: Counts) -> np.ndarray:
    """What the weight of a context's expert may depend on, (N-1,) uint16."""
    by_total = surprise * np.uint16(TOTAL_BITS + 1) + bit_length(counts.total, TOTAL_BITS)
    return by_total * np.uint16(DISTINCT_BITS + 1) + bit_length(counts.distinct, DISTINCT_BITS)


def sort_groups(key: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Equal keys side by side: order (n,) of indices by (key, index), and for each place in it where its group begins.

    Keys are in 0 .. bound. Where key and index fit in one word, words are sorted, five times as fast as an order.
    """
    place = np.arange(key.size)
    bits = key.size.bit_length()
    if bound.bit_length() + bits < 64:
        words = np.sort(key << bits | place)
        order, key = words & (1 << bits) - 1, words >> bits
    else:
        order = np.argsort(key, kind="stable")
        key = key[order]
    same = np.append(False, key[1:] == key[:-1])[:key.size]
    return order, np.maximum.accumulate(np.where(same, 0, place))


def followers(past: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """How often each token (V,) followed what the last `length` tokens of `past` are, within it."""
    if past.size <= length:
        return np.zeros(vocab_size, dtype=np.int64)
    grams = np.lib.stride_tricks.sliding_window_view(past, length + 1)
    return np.bincount(grams[(grams[:, :-1] == past[-length:]).all(axis=1), -1], minlength=vocab_size)


def spread(values: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """values at the indices `at` of (size,) int32, 0 elsewhere."""
    out = np.zeros(size, dtype=np.int32)
    out[at] = values
    return out


def bit_length(counts: np.ndarray, most: int) -> np.ndarray:
    """Binary digits of each count, 0 for 0, at most so many."""
    return np.minimum(np.frexp(counts.astype(np.float32))[1], most).astype(np.uint16)


def check(holds: bool | np.bool_, message: str) -> None:
    if not holds:
        raise SidecarError(message)


def check_text(tokens: np.ndarray, vocab_size: int, starts: np.ndarray) -> None:
    check(tokens.ndim == 1 and tokens.size > 0 and tokens.dtype.kind in "ui",
          f"tokens must be a row of at least one integer, got {tokens.dtype} of shape {tokens.shape}")
    check(tokens.min() >= 0 and tokens.max() < vocab_size,
          f"tokens must be in 0 .. {vocab_size - 1}, got {tokens.min()} .. {tokens.max()}")
    inside = starts.ndim == 1 and (starts.size == 0 or (
        starts.dtype.kind in "ui" and starts[0] >= 0 and starts[-1] < tokens.size and (starts[1:] > starts[:-1]).all()))
    check(inside, f"doc_starts must be increasing indices of the {tokens.size} tokens")
