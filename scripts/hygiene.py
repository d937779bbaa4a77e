"""Whether validation documents stand in the training shards: by hashes of whole documents and of n-grams of 64 tokens.

    overlap = find_overlap(val_tokens, train_shards, bos_id)
    overlap.equal, overlap.held                 # documents that are one of training's; that are in them almost whole

An n-gram's hash is a polynomial of random 64-bit numbers of its tokens, modulo 2^64, which sums from the shard's start
give for every place at once (Karp and Rabin 1987). Validation's are taken side by side, 64 tokens apart from each document's
start, and looked up at every place of training: any stretch of 127 tokens in common holds one. Shards are read in pieces, so
memory is that of a piece (some hundred MB) and of the validation split's hashes, 8 bytes for 64 tokens.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

GRAM = 64                       # tokens: some 150 bytes, longer than phrases and titles that many pages share
HELD_SHARE = 0.9                # of a document's n-grams from which on it counts as held: all but a heading or an edit
LEAST_GRAMS = 2                 # below that a document is told by its whole alone
PIECE_TOKENS = 1 << 21
SIEVE_BITS = 24                 # of a hash; a table of as many bytes turns most places away before the search
BASE = 0x9E3779B97F4A7C15       # odd, so that powers have inverses


@dataclass(frozen=True)
class Overlap:
    """What of a validation split stands in training."""
    documents: int
    equal: tuple[int, ...]      # numbers of documents that are token for token one of training's
    held: tuple[int, ...]       # of documents with HELD_SHARE of their n-grams in training, equal ones included
    half: int                   # documents with half of them or more
    grams: int
    grams_found: int
    train_documents: int
    train_tokens: int


def token_numbers() -> np.ndarray:
    """A random number for each token id, (65536,) uint64."""
    return np.random.default_rng(1337).integers(0, 1 << 64, 1 << 16, dtype=np.uint64)


class Hashes:
    """Hashes of stretches of texts of up to `longest` tokens; equal stretches have equal hashes wherever they stand."""

    def __init__(self, longest: int):
        self.numbers = token_numbers()
        self.extend(longest)

    def extend(self, longest: int) -> None:
        """Powers of the base and of its inverse."""
        self.powers, self.inverses = (
            np.cumprod(np.append(np.uint64(1), np.full(longest, base, dtype=np.uint64)), dtype=np.uint64)
            for base in (BASE, pow(BASE, -1, 1 << 64)))

    def sums(self, tokens: np.ndarray) -> np.ndarray:
        """(N + 1,) uint64, wrapping."""
        if tokens.size >= self.powers.size:
            self.extend(2 * tokens.size)
        return np.append(np.uint64(0), np.cumsum(self.numbers[tokens] * self.powers[:tokens.size], dtype=np.uint64))

    def stretches(self, sums: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (sums[end] - sums[begin]) * self.inverses[begin]

    def everywhere(self, sums: np.ndarray) -> np.ndarray:
        """Of the n-gram that begins at each place."""
        count = max(sums.size - GRAM, 0)
        return (sums[GRAM:] - sums[:count]) * self.inverses[:count]


def pieces(shards: Sequence[np.ndarray], bos_id: int, piece_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, starts of documents) of the shards as one stream, each document whole in one piece; what stands before the
    first BOS comes with it.
    """
    rest = np.zeros(0, dtype=np.uint16)
    for shard in shards:
        for at in range(0, shard.size, piece_tokens):
            rest = np.concatenate((rest, shard[at:at + piece_tokens]))
            starts = np.flatnonzero(rest == bos_id)
            if starts.size > 1:
                yield rest[:starts[-1]], starts[:-1]
                rest = rest[starts[-1]:]
    if rest.size:
        yield rest, np.flatnonzero(rest == bos_id)


def grams_of(starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, number of the document) of n-grams side by side from behind each BOS."""
    begin, end = starts + 1, np.append(starts[1:], size)
    count = (end - begin) // GRAM
    document = np.repeat(np.arange(starts.size), count)
    return begin[document] + GRAM * (np.arange(document.size) - np.repeat(np.cumsum(count) - count, count)), document


def members(values: np.ndarray, wanted: np.ndarray, sieve: np.ndarray) -> np.ndarray:
    """Places in `wanted`, sorted, of those of the values that are in it."""
    values = values[sieve[values >> np.uint64(64 - SIEVE_BITS)]]
    at = np.minimum(np.searchsorted(wanted, values), wanted.size - 1)
    return at[wanted[at] == values]


def sieve_of(wanted: np.ndarray) -> np.ndarray:
    sieve = np.zeros(1 << SIEVE_BITS, dtype=np.bool_)
    sieve[wanted >> np.uint64(64 - SIEVE_BITS)] = True
    return sieve


def fingerprints(hashes: Hashes, tokens: np.ndarray, bos_id: int, piece_tokens: int
                 ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the documents of a split: the hash of each; those of all their n-grams, and the number of the document of each."""
    whole, grams, document, before = [], [], [], 0
    for piece, starts in pieces([tokens], bos_id, piece_tokens):
        sums, (places, number) = hashes.sums(piece), grams_of(starts, piece.size)
        whole.append(hashes.stretches(sums, starts, np.append(starts[1:], piece.size)))
        grams.append(hashes.stretches(sums, places, places + GRAM))
        document.append(before + number)
        before += starts.size
    return np.concatenate(whole), np.concatenate(grams), np.concatenate(document)


def find_overlap(val: np.ndarray, shards: Sequence[np.ndarray], bos_id: int, piece_tokens: int = PIECE_TOKENS,
                 told: Callable[[int], object] = lambda _tokens: None) -> Overlap:
    """Looks the documents of `val` (N,) up in the shards; `told` hears how many of their tokens were read."""
    hashes = Hashes(piece_tokens)
    whole, every, document = fingerprints(hashes, val, bos_id, piece_tokens)
    grams, which = np.unique(every, return_inverse=True)
    found, equal, sieve = np.zeros(grams.size, dtype=np.bool_), np.zeros(whole.size, dtype=np.bool_), sieve_of(grams)
    train_documents = train_tokens = 0
    for tokens, starts in pieces(shards, bos_id, piece_tokens):
        sums = hashes.sums(tokens)
        if grams.size:
            found[members(hashes.everywhere(sums), grams, sieve)] = True
        equal |= np.isin(whole, hashes.stretches(sums, starts, np.append(starts[1:], tokens.size)))
        train_documents, train_tokens = train_documents + starts.size, train_tokens + tokens.size
        told(train_tokens)
    count, hits = (np.bincount(document, weights, whole.size) for weights in (None, found[which].astype(float)))
    long = count >= LEAST_GRAMS
    held = equal | (long & (hits >= HELD_SHARE * count))
    return Overlap(whole.size, tuple(np.flatnonzero(equal).tolist()), tuple(np.flatnonzero(held).tolist()),
                   int((long & (hits >= count / 2)).sum()), every.size, int(hits.sum()), train_documents, train_tokens)
