"""The rate-distortion scheme: trellis grid, symbol coder, error feedback, and the files that hold them.

Guarantees: steps are exact powers; the trellis is the published code and its search finds the best path, whoever runs it;
quantiser and coder keep their distances from the Gaussian rate-distortion bound; the coder gives back every matrix within
its reach and costs what its own shares say; error feedback equals the explicit conditional minimum; steps are water-filled;
loss falls by four a bit; a whole file ends in its window, reads back bit for bit, says the same twice and without numba, and
whatever its bytes become they end in ArtifactError or in tensors. Run:
python -m pytest tests/test_grid.py (60 s on one core).
"""
from __future__ import annotations

import hashlib
import itertools
import math
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, filled_model, tiny_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from test_container import GRID, fault_of, fingerprint, mutated, packed_file, packed_header, packed_row, planes, same, sealed
from torch import Tensor

import export
from export import (
    ESCAPE,
    MAX_AIM,
    OCTAVE,
    REACH,
    SYMBOLS,
    TRELLISES,
    ArtifactError,
    ExportOptions,
    PlanRow,
    Prepared,
    Statistics,
    SymbolModel,
    SymbolReader,
    SymbolWriter,
    Term,
    arrivals,
    best_path,
    code_grid,
    compiled,
    decode_artifact,
    encode_artifact,
    matrices,
    on_grid,
    plain_path,
    power,
    prepare,
    shapes_of,
    shifts,
    steps,
    trellis,
    weights_digest,
)

ALL_STATES = (0, *TRELLISES)
NO_NUMBA = "import sys; sys.modules['numba'] = None\n"      # whose import then fails


# Numbers that are the same everywhere: a linear congruential generator (Knuth's MMIX constants), no library involved.


def lcg(seed: int, n: int) -> list[int]:
    """n integers of 31 bits."""
    found, x = [], seed
    for _ in range(n):
        x = (6364136223846793005 * x + 1442695040888963407) % 2**64
        found.append(x >> 33)
    return found


def bell(seed: int, shape: tuple[int, ...], spread: int) -> np.ndarray:
    """Integers of a bell's shape, about +-spread."""
    n = math.prod(shape)
    values = np.array(lcg(seed, 4 * n), dtype=np.int64).reshape(4, n) % (spread + 1)
    return (values.sum(0) - 2 * spread).reshape(shape)


def on_trellis(codes: np.ndarray, states: int) -> np.ndarray:
    """Positions of any integer codes (rows, columns): each column a walk of its own."""
    if not states:
        return codes
    following, state, found = trellis(states), np.zeros(codes.shape[1], np.int64), np.zeros_like(codes)
    for i, row in enumerate(codes):
        found[i] = 2 * row + (state & 1)
        state = following[state, row & 1]
    return found


def grid_matrix(name: str, positions: np.ndarray, states: int, **exponents: Any) -> tuple[PlanRow, dict[str, np.ndarray]]:
    """A row of the plan and its values; all exponents 0 unless told otherwise."""
    rows, cols = positions.shape
    values: dict[str, np.ndarray] = {
        "bases": np.array([0, 0, 0, 1, 1, 1], np.int16), "row_steps": np.zeros(rows, np.int16),
        "col_steps": np.zeros(cols, np.int16), "row_sizes": np.zeros(rows, np.int16)}
    values |= {kind: np.array(v, np.int16) for kind, v in exponents.items()}
    values["positions"] = positions.astype(np.int32).reshape(-1)
    return PlanRow(name, (rows, cols), "float32", "grid", states=states), values


def written(*owned: tuple[PlanRow, dict[str, np.ndarray]]) -> tuple[bytes, SymbolWriter]:
    writer = SymbolWriter()
    code_grid(writer, [row for row, _ in owned], {row.name: values for row, values in owned}, None)
    return writer.encoded(), writer


def read(body: bytes, *owned: tuple[PlanRow, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """What a reader makes of it, who knows nothing but plan and bases."""
    found = {row.name: {"bases": values["bases"]} for row, values in owned}
    reader = SymbolReader(body, 0)
    code_grid(reader, [row for row, _ in owned], found, 0)
    reader.finish()
    return found


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- steps and trellis ----------------------------------------------------------------------------------------------------


def test_power_is_the_floor_of_the_exact_root() -> None:
    """floor(2^(k / 32)) = m exactly if m^32 <= 2^k < (m + 1)^32."""
    found = [power(k) for k in range(0, 50 * OCTAVE)]
    assert all(m**OCTAVE <= 2**k < (m + 1) ** OCTAVE for k, m in enumerate(found))
    assert found == sorted(found)
    assert [power(OCTAVE * k) for k in range(50)] == [2**k for k in range(50)]


def test_steps_are_powers_with_the_mantissa_rounded_down() -> None:
    exponents = np.arange(-64 * OCTAVE, 64 * OCTAVE + 1)
    found = steps(exponents)
    assert found.dtype == np.float32
    assert (np.diff(found) > 0).all()
    with localcontext() as context:
        context.prec = 60
        for e, step in zip(exponents.tolist(), found, strict=True):
            exact = Decimal(2) ** (Decimal(e) / OCTAVE)
            assert Decimal(float(step)) <= exact < Decimal(float(np.nextafter(step, np.float32(np.inf))))
    assert all(Fraction(float(steps(np.array([OCTAVE * k]))[0])) == Fraction(2) ** k for k in range(-64, 65))
    shifted = [found[np.arange(OCTAVE) + OCTAVE * k] for k in range(128)]
    assert all(np.array_equal(a * 2, b) for a, b in itertools.pairwise(shifted))
    assert np.array_equal(steps(exponents.astype(np.int16)), found)


def test_grid_values_are_one_product_each() -> None:
    positions, rows, cols = bell(1, (13, 7), 900), bell(2, (13,), 400), bell(3, (7,), 400)
    found = export.grid_values(positions, rows.astype(np.int16), cols.astype(np.int16))
    wanted = [[np.float32(positions[i, j]) * steps(rows[i:i + 1] + cols[j])[0] for j in range(7)] for i in range(13)]
    assert found.dtype == np.float32
    assert found.tolist() == np.array(wanted).tolist()


@pytest.mark.parametrize("states", TRELLISES)
def test_each_state_has_two_ways_in_and_two_out(states: int) -> None:
    following = trellis(states)
    assert following.shape == (states, 2)
    assert sorted(following.reshape(-1).tolist()) == sorted([*range(states)] * 2)
    assert all(a != b for a, b in following.tolist())
    source, kind = arrivals(states)
    ways = {(int(s), int(k)): n for n in range(states) for s, k in zip(source[n], kind[n], strict=True)}
    assert ways == {(s, (s & 1) + 2 * bit): int(following[s, bit]) for s in range(states) for bit in (0, 1)}
    reached = {0}
    for _ in range(states.bit_length() - 1):
        reached = {int(n) for s in reached for n in following[s]}
    assert reached == set(range(states))        # after log2(states) steps from zero, hence from anywhere: the code is linear


@pytest.mark.parametrize("states", TRELLISES)
def test_walks_satisfy_the_parity_check_equation(states: int) -> None:
    """Ungerboeck's other definition of the code: sum_j h0_j z0_(k-j) + h1_j z1_(k-j) = 0 modulo 2, for each k."""
    h0, h1 = TRELLISES[states]
    assert max(h0, h1).bit_length() == states.bit_length()
    positions = on_trellis(bell(states, (400, 3), 6), states)
    assert {int(p) % 4 for p in positions.reshape(-1)} == {0, 1, 2, 3}
    bits = np.concatenate([np.zeros((20, 2, 3), np.int64), np.stack([positions & 1, positions >> 1 & 1], 1)])
    for k in range(20, 420):
        checks = sum((h0 >> j & 1) * bits[k - j, 0] + (h1 >> j & 1) * bits[k - j, 1] for j in range(10))
        assert not np.any(checks % 2)


@pytest.mark.parametrize(("states", "distance"), [(4, 9), (8, 10), (16, 11), (32, 13), (64, 14), (128, 16)])
def test_free_distance_is_the_published_one(states: int, distance: int) -> None:
    """Squared, in grid steps (Ungerboeck 1982, table I): the least over all walks that leave state zero and return. A code
    is linear, so walks differ by a walk, and positions modulo 4 that differ by 0, 1, 2, 3 are 0, 1, 2, 1 apart.
    """
    following, apart = trellis(states), (0, 1, 4, 1)
    best = {int(following[0, 1]): apart[2]}
    queue, found = list(best), math.inf
    while queue:
        state = queue.pop()
        for bit in (0, 1):
            following_state, cost = int(following[state, bit]), best[state] + apart[(state & 1) + 2 * bit]
            if following_state == 0:
                found = min(found, cost)
            elif cost < best.get(following_state, math.inf):
                best[following_state] = cost
                queue.append(following_state)
    assert found == distance


# --- search ---------------------------------------------------------------------------------------------------------------


def problem(seed: int, rows: int, states: int, *, halves: bool = False) -> tuple[np.ndarray, ...]:
    """Aims of all sizes, buckets, random prices and what the searches take beside them."""
    rng = generator(seed)
    aim = rng.standard_normal(rows) * rng.choice([1, 5, 300, 2e4], rows)
    aim = np.clip(np.rint(2 * aim) / 2 if halves else aim, -MAX_AIM, MAX_AIM)
    buckets = rng.integers(0, export.BUCKETS, rows)
    prices = rng.integers(0, 4, (export.BUCKETS, 2, SYMBOLS)) / 2 if halves else 8 * rng.random(
        (export.BUCKETS, 2, SYMBOLS))
    return aim, buckets, prices, shifts(int(states > 0))


@pytest.mark.parametrize("states", ALL_STATES)
def test_compiled_interpreted_and_plain_searches_agree(states: int) -> None:
    """Bit for bit, ties too: half-integer aims and prices have many."""
    fast = compiled(best_path)
    rows, trials = max(400 // max(states, 4), 6), 4
    for seed, (halves, penalty) in itertools.product(range(trials), ((False, 0.0), (False, 0.3), (True, 0.0), (True, 0.5))):
        args = (*problem(seed, rows, states, halves=halves), penalty, *arrivals(states))
        wanted = plain_path(*args)
        assert np.array_equal(best_path(*args), wanted)
        assert fast is None or np.array_equal(fast(*args), wanted)


def test_machine_code_agrees_on_long_columns() -> None:
    fast = compiled(best_path)
    if fast is None:
        pytest.skip("numba is not installed")
    for states in (0, 8, 64):
        args = (*problem(9, 2000, states), 0.2, *arrivals(states))
        assert np.array_equal(fast(*args), plain_path(*args))


def is_walk(positions: Sequence[int], states: int) -> bool:
    state = 0
    for p in positions:
        if (p - state) % 2:
            return False
        state = int(trellis(states)[state, p >> 1 & 1])
    return True


def cost_of(path: Sequence[int], aim: np.ndarray, buckets: np.ndarray, prices: np.ndarray, raw_bits: np.ndarray,
            penalty: float, doubled: int) -> float:
    total = 0.0
    for p, a, b in zip(path, aim.tolist(), buckets.tolist(), strict=True):
        parity = p % 2 * doubled
        symbol = ((p - parity) // (1 + doubled) // 2 ** int(raw_bits[b])) + REACH
        total += (a - p) ** 2 + penalty * prices[b, parity, symbol if 0 <= symbol < ESCAPE else ESCAPE]
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("states", [0, 4, 8])
def test_no_other_path_is_better(states: int, seed: int) -> None:
    """Against all paths over -4..4, with a model's prices, which grow with the magnitude: then the two positions around
    the aim and zero are all that can be best.
    """
    rng, rows, doubled = generator(seed), 5 if states else 4, int(states > 0)
    raw_bits, penalty = shifts(doubled), (0.0, 0.15, 0.4)[seed % 3]
    buckets = rng.integers(4 * 4, 4 * 7, rows)          # means of 1/4 to 2
    aim, prices = 1.6 * rng.standard_normal(rows).clip(-1.9, 1.9), SymbolModel(doubled).prices()
    positions = plain_path(aim, buckets, prices, raw_bits, penalty, *arrivals(states)).tolist()
    paths = [path for path in itertools.product(range(-4, 5), repeat=rows) if not states or is_walk(path, states)]
    found, best = (min(cost_of(path, aim, buckets, prices, raw_bits, penalty, doubled) for path in some)
                   for some in ([positions], paths))
    assert tuple(positions) in paths or max(map(abs, positions)) > 4
    assert found <= best + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_of_its_candidates_the_search_takes_the_best_at_any_prices(seed: int) -> None:
    """Two around the aim in each class modulo 4, and zero; prices that follow no rule."""
    rng, states, rows = generator(seed), (4, 8)[seed % 2], 7
    aim, buckets = 3 * rng.standard_normal(rows), rng.integers(0, 30, rows)
    prices, raw_bits = 9 * rng.random((export.BUCKETS, 2, SYMBOLS)), shifts(1)
    around = [[*range(math.ceil(a) - 4, math.ceil(a) + 4), 0] for a in aim.tolist()]
    paths: list[tuple[tuple[int, ...], int, float]] = [((), 0, 0.0)]
    for i in range(rows):       # of paths that end in one state the best one is kept (Bellman)
        longer: dict[int, tuple[tuple[int, ...], int, float]] = {}
        for (path, state, cost), p in itertools.product(paths, around[i]):
            if (p - state) % 2 == 0:
                end = int(trellis(states)[state, p >> 1 & 1])
                c = cost + cost_of([p], aim[i:i + 1], buckets[i:i + 1], prices, raw_bits, 0.7, 1)
                if end not in longer or c < longer[end][2]:
                    longer[end] = (*path, p), end, c
        paths = list(longer.values())
    best = min(paths, key=lambda path: path[2])
    found = plain_path(aim, buckets, prices, raw_bits, 0.7, *arrivals(states)).tolist()
    assert is_walk(found, states)
    assert cost_of(found, aim, buckets, prices, raw_bits, 0.7, 1) == pytest.approx(best[2], abs=1e-9)


@pytest.mark.parametrize("states", [0, 8])
def test_the_largest_aims_fit_the_escape(states: int) -> None:
    aim = np.array([MAX_AIM, -MAX_AIM] * 5, float) + np.linspace(-0.9, 0, 10)
    found = plain_path(aim, np.zeros(10, np.int64), SymbolModel(int(states > 0)).prices(), shifts(int(states > 0)), 0.15,
                       *arrivals(states))
    body, _ = written(m := grid_matrix("w", found[:, None], states))
    assert np.array_equal(read(body, m)["w"]["positions"], found)


# --- distance from the bound ----------------------------------------------------------------------------------------------


def gaussian(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(generator(seed).standard_normal((rows, cols)))


def identity(rows: int, cols: int) -> Term:
    return Term(torch.ones(rows), torch.eye(cols))


def bits_of(operations: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """What the model's shares say that these cost."""
    return sum(float((export.SCALE_BITS - np.log2(shares.astype(float))).sum()) for shares, _ in operations)


def placed(p: Prepared, w: Tensor, dial: float, states: int, penalty: float = 0.15
           ) -> tuple[SymbolWriter, dict[str, np.ndarray]]:
    """What is coded, after two passes, the second with the first one's prices."""
    prices = SymbolModel(int(states > 0)).prices()
    row, values, writer = PlanRow("w", tuple(w.shape), "float32", "grid", states=states), {}, SymbolWriter()
    for _ in range(2):
        values, writer = on_grid(p, dial, states, penalty, prices), SymbolWriter()
        prices = code_grid(writer, [row], {"w": values}, None).prices()
    return writer, values


@pytest.mark.parametrize("bits", [3.0, 2.1])
@pytest.mark.parametrize(("states", "gap"), [(0, 0.26), (4, 0.094), (8, 0.079), (64, 0.052), (256, 0.038)])
def test_distance_from_the_gaussian_bound(states: int, gap: float, bits: float) -> None:
    """rate + 0.5 log2(error / variance) is 0 at best for normal weights (Cover & Thomas 2006, theorem 10.3.2), and 0.254
    for uniform steps at high rates; here without steps and sizes, which take 0.01 or less.
    """
    if states > 64 and compiled(best_path) is None:
        pytest.skip("numba is not installed")
    w = gaussian(512, 256 if states < 256 else 128)
    p = prepare("w", w, [identity(*w.shape)])
    writer, values = placed(p, w, export.dial_for([p], bits * w.numel()), states)
    restored = export.restore(PlanRow("w", tuple(w.shape), "float64", "grid", states=states), values)
    rate = bits_of([o for o in writer.operations if o[0].size == w.shape[1]]) / w.numel()
    assert abs(rate - bits) < 0.3
    assert abs(rate + 0.5 * math.log2(float((w - restored).square().mean() / w.square().mean())) - gap) < 0.02


# --- coder ----------------------------------------------------------------------------------------------------------------


def assert_read_back(*owned: tuple[PlanRow, dict[str, np.ndarray]]) -> None:
    body, _ = written(*owned)
    found = read(body, *owned)
    for row, values in owned:
        assert found[row.name].keys() == values.keys()
        assert all(np.array_equal(found[row.name][kind], array) for kind, array in values.items())
        assert found[row.name]["positions"].dtype == np.int32
        assert all(found[row.name][kind].dtype == np.int16 for kind in ("row_steps", "col_steps", "row_sizes"))


@st.composite
def grid_matrices(draw: st.DrawFn) -> list[tuple[PlanRow, dict[str, np.ndarray]]]:
    """One to four matrices, of equal rows or columns among them, from zeros to the escape's reach, steps of any spread."""
    states = draw(st.sampled_from(ALL_STATES))
    sizes, found = st.sampled_from([1, 2, 3, 7, 13, 31]), []
    for i in range(draw(st.integers(1, 4))):
        rows, cols, seed = draw(sizes), draw(sizes), draw(st.integers(0, 2**32))
        rng, reach = generator(seed), draw(st.sampled_from([0, 1, 5, 62, 63, 64, 127, 1000, 2**14]))
        codes = rng.integers(-reach, reach + 1, (rows, cols))
        if draw(st.booleans()):         # most of them are small, a few are not
            codes = np.where(rng.random((rows, cols)) < 0.9, codes % 3 - 1, codes)
        spread = draw(st.sampled_from([0, 3, 200, export.MAX_EXPONENT]))
        exponents = {kind: rng.integers(-spread, spread + 1, n) for kind, n in (
            ("row_steps", rows), ("col_steps", cols), ("row_sizes", rows))}
        found.append(grid_matrix(f"w{i}", on_trellis(codes, states), states, **exponents))
    return found


@settings(max_examples=16, deadline=None, derandomize=True)
@given(grid_matrices())
def test_every_matrix_is_read_back(owned: list[tuple[PlanRow, dict[str, np.ndarray]]]) -> None:
    assert_read_back(*owned)


@pytest.mark.parametrize("states", [0, 4, 256])
def test_extremes_are_read_back(states: int) -> None:
    """The largest and the least that the escape can say, alone, after zeros, and where sizes announce something else."""
    ends = np.array([2**15 - 1, -(2**15)])
    for codes, size in ((ends[:1, None], 0), (ends[1:, None], 0), (np.zeros((97, 1), np.int64), 0),
                        (np.repeat([[0], *ends[:, None], [0]], [300, 1, 1, 9], 0), 0), (ends[:, None], 32 * OCTAVE),
                        (np.zeros((89, 2), np.int64), 32 * OCTAVE), (np.tile(ends, (50, 3)), 15 * OCTAVE)):
        sizes = np.full(len(codes), size)
        assert_read_back(grid_matrix("w", on_trellis(codes, states), states, row_sizes=sizes))


def test_units_and_bases_are_taken_back() -> None:
    row, values = grid_matrix("w", on_trellis(bell(1, (11, 5), 9), 4), 4)
    values["bases"] = np.array([-7, 1000, -1024, 4, 3, 8], np.int16)
    values["col_steps"] = np.array([-7, -3, 1, -1023, 1021], np.int16)
    values["row_steps"] = np.array([1000 + 3 * (i - 6) for i in range(11)], np.int16)
    values["row_sizes"] = np.array([-1024 + 8 * i * i for i in range(11)], np.int16)
    assert_read_back((row, values))


CODED_DIGESTS = {0: "65b3a8f002b68795", 8: "798edb23d199bfb6", 256: "81fbad9830773797"}


def fixed_matrices(states: int) -> list[tuple[PlanRow, dict[str, np.ndarray]]]:
    """Two groups, raw bits, escapes and zeros, made of integers alone."""
    wide = bell(1, (60, 40), 30) >> (np.arange(40) % 6)
    wide[7, 3], wide[50, 11], wide[:, 9] = 30_000, -30_000, 0
    tall = bell(2, (60, 17), 3000)
    return [
        grid_matrix("a", on_trellis(wide, states), states, col_steps=bell(3, (40,), 60), row_sizes=bell(4, (60,), 9)),
        grid_matrix("b", on_trellis(tall, states), states, row_steps=bell(5, (60,), 20), row_sizes=bell(6, (60,), 20)),
        grid_matrix("c", on_trellis(bell(7, (13, 40), 2), states), states),
    ]


@pytest.mark.parametrize("states", CODED_DIGESTS)
def test_coded_bytes_are_the_same_everywhere(states: int) -> None:
    owned = fixed_matrices(states)
    assert_read_back(*owned)
    body, _ = written(*owned)
    assert hashlib.blake2b(body, digest_size=8).hexdigest() == CODED_DIGESTS[states]


def test_coded_bytes_do_not_depend_on_the_order_of_the_values() -> None:
    owned = fixed_matrices(8)
    body, _ = written(*owned)
    writer, values = SymbolWriter(), {row.name: dict(reversed(own.items())) for row, own in owned[::-1]}
    code_grid(writer, [row for row, _ in owned], values, None)
    assert writer.encoded() == body


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize("spread", [3, 60, 3000])
def test_the_stream_is_as_long_as_its_shares_say(spread: int, states: int) -> None:
    body, writer = written(grid_matrix("w", on_trellis(bell(1, (400, 90), spread), states), states))
    lanes = 2 ** body[0]
    assert abs(8 * len(body) - bits_of(writer.operations)) < 0.003 * 8 * len(body) + 8 * (1 + export.STATE_BYTES * lanes)


@pytest.mark.parametrize("step", [0.4, 1.0])
def test_a_gaussian_source_costs_its_entropy(step: float) -> None:
    """All that the adaptive tables have to learn is within 1 % at 200,000 symbols."""
    positions = np.rint(generator(1).standard_normal((800, 250)) / step).astype(np.int64)
    shares = np.unique(positions, return_counts=True)[1] / positions.size
    entropy = -float((shares * np.log2(shares)).sum()) * positions.size
    assert abs(8 * len(written(grid_matrix("w", positions, 0))[0]) / entropy - 1) < 0.01


def test_columns_of_different_sizes_cost_their_own_entropies() -> None:
    """What no table for all could know: columns of scales 1/4 to 64, sizes not announced, and a third of them zero."""
    scale = 2.0 ** (np.arange(120) % 9 - 2)
    scale[::3] = 0
    positions = np.rint(generator(2).standard_normal((1500, 120)) * scale).astype(np.int64)
    entropy = 0.0
    for column in positions.T:
        shares = np.unique(column, return_counts=True)[1] / column.size
        entropy -= float((shares * np.log2(shares)).sum()) * column.size
    bits = 8 * len(written(grid_matrix("w", positions, 0))[0])
    assert bits < 1.04 * entropy


def test_rows_where_next_to_nothing_is_expected_leave_the_columns_alone() -> None:
    """Half of the rows hold an integer or so in five hundred, each five hundred times what is expected there."""
    scale = 2.0 ** (np.arange(64) % 5 - 2)
    wide = np.rint(2 * generator(3).standard_normal((1500, 64)) * scale)
    thin = np.where(generator(4).random(wide.shape) < 0.002 * scale, 1, 0)
    positions = np.stack([thin, wide], 1).reshape(-1, 64).astype(np.int64)
    sizes = np.tile(np.rint(32 * np.log2([0.002, 1.6])), 1500)
    entropy = 0.0
    for part in (*positions[::2].T, *positions[1::2].T):
        shares = np.unique(part, return_counts=True)[1] / part.size
        entropy -= float((shares * np.log2(shares)).sum()) * part.size
    whole, side = (8 * len(written(grid_matrix("w", p, 0, row_sizes=sizes))[0]) for p in (positions, 0 * positions))
    assert whole - side < 1.02 * entropy        # the mean of ratios: 1.04


class PlainTables:
    """Shares by context, which follow the counts when an eighth more symbols have been seen."""

    def __init__(self, doubled: int) -> None:
        self.counts = {(b, p): list(export.prior(b, p, doubled)) for b in range(80) for p in (0, 1)}
        self.fresh, self.seen, self.shares = [], 0, {}

    def shares_of(self, context: tuple[int, int]) -> list[int]:
        if context not in self.shares:
            counts = self.counts[context]
            share = [c * (2**16 - 4) // sum(counts) for c in counts]
            share[-1] = 4
            share[share.index(max(share))] += 2**16 - sum(share)
            self.shares[context] = share
        return self.shares[context]

    def saw(self, pairs: list[tuple[tuple[int, int], int]]) -> None:
        self.fresh += pairs
        if len(self.fresh) >= max(512, self.seen // 8):
            for context, symbol in self.fresh:
                self.counts[context][symbol] += 64
            self.seen, self.fresh, self.shares = self.seen + len(self.fresh), [], {}


def plain_positions(body: bytes, row: PlanRow, values: Mapping[str, np.ndarray]) -> list[list[int]]:
    """The positions of one matrix decoded without numpy, one symbol at a time, Python's integers throughout: a second
    reader, for a file whose exponents are all zero.
    """
    (rows, cols), lanes = row.shape, 2 ** body[0]
    states = [int.from_bytes(body[1 + 5 * k:6 + 5 * k], "little") for k in range(lanes)]
    words = [int.from_bytes(body[i:i + 2], "little") for i in range(1 + 5 * lanes, len(body), 2)][::-1]

    def advance(lane: int, share: int, start: int) -> None:
        states[lane] = share * (states[lane] >> 16) + states[lane] % 2**16 - start
        if states[lane] < 2**24:
            states[lane] = states[lane] << 16 | words.pop()

    def matrix(tables: PlainTables, rows: int, cols: int, doubled: int) -> list[list[int]]:
        state, learned, sums, found = [0] * cols, [0] * cols, [8 << 16] * cols, []
        for i in range(rows):
            if i < 32 or i % 8 == 0:
                for j, total in enumerate(sums):
                    k = 0
                    while power(4 * k) <= total // (8 + i):
                        k += 1
                    learned[j] = 4 * k - 512
            bucket = [min(max((x + 6 * 32) // 8, 0), 79) for x in learned]
            contexts = [(b, s % 2 * doubled) for b, s in zip(bucket, state, strict=True)]
            symbols = []
            for j, context in enumerate(contexts):
                slot, symbol, share = states[j % lanes] % 2**16, 0, tables.shares_of(context)
                while slot >= share[symbol]:
                    slot, symbol = slot - share[symbol], symbol + 1
                symbols.append(symbol)
                advance(j % lanes, share[symbol], sum(share[:symbol]))
            raw = [max(b // 4 - 8 - doubled, 0) for b in bucket]
            kept = [16 if symbol == 127 else n for symbol, n in zip(symbols, raw, strict=True)]
            codes = [0 if symbol == 127 else (symbol - 63) << n for symbol, n in zip(symbols, kept, strict=True)]
            for j, n in enumerate(kept if any(kept) else []):
                low = states[j % lanes] % 2**16 >> (16 - n)
                advance(j % lanes, 2 ** (16 - n), low << (16 - n))
                codes[j] += low - 2**16 * (symbols[j] == 127 and low >= 2**15)
            high = [code >> n for code, n in zip(codes, raw, strict=True)]
            tables.saw([(c, h + 63 if abs(h) <= 63 else 127) for c, h in zip(contexts, high, strict=True)])
            found.append([(code << doubled) + c[1] for code, c in zip(codes, contexts, strict=True)])
            state = [int(trellis(row.states)[s, code & 1]) for s, code in zip(state, codes, strict=True)]
            sums = [total + (abs(p) << 16) for total, p in zip(sums, found[-1], strict=True)]
        return found

    side, tables = PlainTables(0), PlainTables(int(row.states > 0))
    assert matrix(side, cols, 1, 0) == [[0]] * cols
    assert matrix(side, rows, 2, 0) == [[0, 0]] * rows
    found = matrix(tables, rows, cols, int(row.states > 0))
    assert words == []
    assert states == [2**24] * lanes
    return found


@pytest.mark.parametrize("states", [0, 4, 64])
def test_a_plain_decoder_reads_the_same_positions(states: int) -> None:
    codes = bell(1, (70, 21), 40) >> (np.arange(21) % 5)
    codes[3:, 4] = bell(2, (67,), 2000)
    codes[40, 2], codes[41, 2] = 32_767, -32_768
    row, values = grid_matrix("w", on_trellis(codes, states), states)
    assert plain_positions(written((row, values))[0], row, values) == values["positions"].reshape(row.shape).tolist()


# --- error feedback and water-filling -------------------------------------------------------------------------------------


def correlated(seed: int, rows: int, cols: int, decay: float = 3.0) -> tuple[Tensor, Term]:
    """Normal weights and a moment of inputs whose energies fall by exp(-decay) along random directions, uneven rows."""
    rng = generator(seed)
    basis = np.linalg.qr(rng.standard_normal((cols, cols)))[0]
    moment = basis * np.exp(-decay * np.arange(cols) / cols) @ basis.T
    outputs = np.exp(0.5 * rng.standard_normal(rows))
    return torch.from_numpy(rng.standard_normal((rows, cols))), Term(torch.from_numpy(outputs), torch.from_numpy(moment))


def second_order(error: np.ndarray, rows: np.ndarray, moment: np.ndarray) -> float:
    return float(np.einsum("ij,jk,ik,i->", error, moment, error, rows))


def explicit_feedback(w: np.ndarray, moment: np.ndarray, order: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Column after column: given the errors so far, what the rest must be for the least e moment e^T, rounded (the optimal
    brain surgeon's update with the inverse of the block that remains; GPTQ, arXiv 2210.17323, section 3).
    """
    target, positions, left = w.copy(), np.zeros(w.shape, np.int64), list(order)
    while left:
        j, inverse = left[0], np.linalg.inv(moment[np.ix_(left, left)])
        positions[:, j] = np.rint(target[:, j] / step[:, j])
        error = target[:, j] - positions[:, j] * step[:, j]
        target[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        left.pop(0)
    return positions


def steps_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """(rows, columns) float64."""
    return steps(values["row_steps"].astype(np.int64)[:, None] + values["col_steps"]).astype(np.float64)


@pytest.mark.parametrize(("seed", "rows", "cols"), [(0, 5, 7), (1, 11, 23), (2, 3, 130), (3, 1, 66), (4, 9, 1)])
def test_feedback_is_the_explicit_conditional_minimum(seed: int, rows: int, cols: int) -> None:
    w, term = correlated(seed, rows, cols)
    p = prepare("w", w, [term])
    values = on_grid(p, -1.0, 0, 0.0, SymbolModel(0).prices())
    cost, step = export.curvature(w.numpy(), [term]), steps_of(values)
    positions = values["positions"].reshape(rows, cols)
    assert np.array_equal(positions, explicit_feedback(w.numpy(), cost.moment, p.order, step))
    assert sorted(p.order.tolist()) == [*range(cols)]
    # the identity of prepare's docstring: what is left of the loss is each column's own rounding, by its Cholesky diagonal
    error = (w.numpy() - positions * step)[:, p.order]
    rounding = error.copy()
    for j in range(1, cols):
        rounding[:, j] += error[:, :j] @ p.feedback[:j, j]
    assert np.abs(rounding / step[:, p.order]).max() <= 0.5 + 1e-9
    loss = second_order(w.numpy() - positions * step, cost.rows, cost.moment)
    assert (cost.rows[:, None] * p.costs * rounding**2).sum() == pytest.approx(loss, rel=1e-9)


def test_feedback_is_never_worse_than_rounding_with_the_same_steps() -> None:
    ratios = []
    for seed in range(30):
        w, term = correlated(seed, 17, 40)
        values = on_grid(prepare("w", w, [term]), -1.0, 0, 0.0, SymbolModel(0).prices())
        step, (rows, moment) = steps_of(values), (term.rows.numpy(), term.moment.numpy())
        with_, without = (second_order(w.numpy() - positions * step, rows, moment) for positions in (
            values["positions"].reshape(w.shape), np.rint(w.numpy() / step)))
        ratios.append(with_ / without)
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.9


def test_a_trellis_with_feedback_beats_feedback_alone() -> None:
    """The trellis runs down the rows of a column, before its errors move on: at equal bytes it loses less."""
    w, term = correlated(1, 300, 80)
    found = {}
    for states in (0, 4, 8, 64):
        p = prepare("w", w, [term])
        writer, values = placed(p, w, export.dial_for([p], 3.0 * w.numel()), states)
        error = w.numpy() - values["positions"].reshape(w.shape) * steps_of(values)
        loss = second_order(error, term.rows.numpy(), term.moment.numpy())
        found[states] = math.log2(loss) / 2 + bits_of(writer.operations) / w.numel()     # bits at equal loss
    assert found[0] - found[4] > 0.12
    assert found[4] - found[8] > -0.01
    assert found[8] - found[64] > -0.01
    assert found[4] > found[64]


def test_loss_falls_by_four_a_bit() -> None:
    """Of expected loss, at the bytes of each, steps and sizes included; the first bit falls short, as it must."""
    w, term = correlated(2, 400, 96)
    p, losses = prepare("w", w, [term]), {}
    for bits in (2, 3, 4, 5):
        writer, values = placed(p, w, export.dial_for([p], bits * w.numel()), 8)
        restored = export.restore(PlanRow("w", tuple(w.shape), "float64", "grid", states=8), values)
        rate = 8 * len(writer.encoded()) / w.numel()
        losses[bits] = export.expected_loss((w - restored).float(), [Term(term.rows.float(), term.moment.float())]), rate
    for bits in (3, 4):
        (loss, rate), (finer, more) = losses[bits], losses[bits + 1]
        assert 0.9 < finer / loss * 4 ** (more - rate) < 1.1
    assert 3 < losses[2][0] / losses[3][0] < 4.4


def test_every_weight_costs_the_same() -> None:
    """rows[i] x M_jj^2 x step^2 is one number, within half a unit of each table of steps."""
    w, term = correlated(3, 60, 50, decay=8.0)
    p = prepare("w", w, [term])
    cost = export.curvature(w.numpy(), [term])
    for dial in (-2.0, 0.3):
        step = steps_of(on_grid(p, dial, 0, 0.0, SymbolModel(0).prices()))[:, p.order]
        level = 0.5 * np.log2(cost.rows[:, None] * p.costs) + np.log2(step) - dial
        assert np.abs(level).max() <= (export.ROW_TABLE + export.COL_TABLE) / 2 / OCTAVE + 1e-6
        assert abs(level.mean()) < 0.05
        trellised = steps_of(on_grid(p, dial, 4, 0.0, SymbolModel(1).prices()))[:, p.order]
        assert np.allclose(trellised, step / 2)


def test_gain_is_half_the_log_of_arithmetic_over_geometric_mean() -> None:
    """By hand: costs 1, 4, 16, 64 have means 21.25 and 8; the damping of 0.02 of the mean moves that a little."""
    energies = torch.tensor([16.0, 1.0, 64.0, 4.0])
    w = torch.ones(8, 4, dtype=torch.float64)
    p = prepare("w", w, [Term(torch.ones(8), energies.diag())])
    damped = np.sort(energies.numpy() + 0.02 * 21.25 + 1e-9 * energies.numpy())[::-1]
    wanted = 0.5 * math.log2(damped.mean() / damped.prod() ** 0.25)
    assert p.gain_bits == pytest.approx(wanted, rel=1e-6)
    assert abs(p.gain_bits - 0.5 * math.log2(21.25 / 8)) < 0.15
    assert p.order.tolist() == [2, 0, 3, 1]
    assert prepare("w", w, [identity(8, 4)]).gain_bits == pytest.approx(0, abs=1e-12)


def scaled(w: Tensor, term: Term, rows: Tensor, cols: Tensor) -> tuple[Tensor, Term]:
    """The same network by other numbers: outputs times `rows`, inputs divided by `cols`."""
    return w * rows[:, None] * cols, Term(term.rows / rows**2, term.moment / cols[:, None] / cols)


@pytest.mark.parametrize("states", [0, 8])
def test_scaling_rows_changes_their_steps_alone(states: int) -> None:
    """By powers of two and bit for bit: one row, each by its own, all together, also with all columns. (Columns apart move
    the damping, which takes a row's size from its weights alone.)
    """
    w, term = correlated(4, 90, 40)
    p = prepare("w", w, [term])
    dial = export.dial_for([p], 3.0 * w.numel())
    writer, values = placed(p, w, dial, states)
    one_row, apart = torch.ones(90), torch.from_numpy(2.0 ** generator(0).integers(-2, 3, 90))
    one_row[17] = 16.0
    ones, together = torch.ones(40), (torch.full((90,), 1 / 4), torch.full((40,), 64.0))
    for rows, cols in ((one_row, ones), (apart, ones), together):
        moved, other = scaled(w, term, rows, cols)
        q = prepare("w", moved, [other])
        again, found = placed(q, moved, dial, states)
        assert np.array_equal(found["positions"], values["positions"])
        assert np.array_equal(steps_of(found), steps_of(values) * rows.double().numpy()[:, None] * cols.double().numpy())
        assert abs(len(again.encoded()) - len(writer.encoded())) < 90       # a step and a size of each row


def test_dead_inputs_and_outputs_and_zero_rows_are_no_trouble() -> None:
    """What never occurs is stored coarsely, not refused and not at infinite steps."""
    w, term = correlated(6, 30, 20)
    w[3], w[:, 5] = 0, 0
    moment, rows = term.moment.clone(), term.rows.clone()
    moment[7], moment[:, 7], rows[4] = 0, 0, 0
    for terms in ([Term(rows, moment)], [Term(torch.zeros(30), torch.zeros(20, 20))],
                  [Term(rows, moment), Term(torch.ones(20), torch.eye(30), transposed=True)]):
        for matrix in (w, torch.zeros_like(w)):
            p = prepare("w", matrix, terms)
            _, values = placed(p, matrix, export.dial_for([p], 3.0 * w.numel()), 4)
            restored = export.restore(PlanRow("w", (30, 20), "float64", "grid", states=4), values)
            assert bool(restored.isfinite().all())
            assert float((restored - matrix).abs().max()) <= 3 * float(matrix.abs().max())


# --- whole files ----------------------------------------------------------------------------------------------------------


def tiny_state(**changes: Any) -> dict[str, Tensor]:
    """A model's weights: periodic ones and noise that no version of a library changes."""
    state = dict(filled_model(tiny_shape(**changes)).state_dict())
    for i, (name, t) in enumerate(sorted(state.items())):
        if t.ndim == 2:
            state[name] = t + torch.from_numpy(bell(i, tuple(t.shape), 1000) / 2000).float()
    return state


def statistics_for(state: Mapping[str, Tensor]) -> Statistics:
    """One use of each matrix, two of the embedding; energies spread over an octave or two."""
    terms = {}
    for i, (name, (rows, cols)) in enumerate(sorted(matrices(shapes_of(state)).items())):
        mix = torch.from_numpy(bell(50 + i, (cols, cols + 3), 100) / 100).float()
        outputs = torch.from_numpy(np.abs(bell(90 + i, (rows,), 100)) + 1.0).float() / 1000
        terms[name] = (Term(outputs, mix @ mix.T / cols),)
        if name == "tok_emb.weight":
            used = torch.from_numpy(np.abs(bell(7, (rows,), 100)) / 100).float()
            terms[name] += (Term(torch.ones(cols), used.diag(), transposed=True),)
    return Statistics(weights_digest(state), 1000, terms)


def rd(**changes: Any) -> ExportOptions:
    return replace(ExportOptions(export_scheme="rd", tcq_states=4, artifact_cap_bytes=0), **changes)


SMALL = {"num_layers": 2, "model_dim": 24, "vocab_size": 61}
LARGE = {"num_layers": 2, "model_dim": 96, "vocab_size": 61}


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, Tensor], Statistics]:
    state = tiny_state(**SMALL)
    return state, statistics_for(state)


@pytest.fixture(scope="module")
def large() -> tuple[dict[str, Tensor], Statistics]:
    state = tiny_state(**LARGE)
    return state, statistics_for(state)


@pytest.fixture(scope="module")
def small_file(small: tuple[dict[str, Tensor], Statistics]) -> bytes:
    state, statistics = small
    return encode_artifact(state, {"m": 1}, rd(export_bits=5.0), statistics=statistics).data


@pytest.mark.parametrize("states", [0, 8])
def test_a_file_is_read_as_it_was_reconstructed(small: tuple[dict[str, Tensor], Statistics], states: int) -> None:
    state, statistics = small
    written = encode_artifact(state, {"m": 1}, rd(export_bits=6.0, tcq_states=states), statistics=statistics)
    artifact = decode_artifact(written.data)
    assert same(artifact.state, {name: export.restore(s.row, s.values) for name, s in written.tensors.items()})
    assert artifact.plan == tuple(s.row for s in written.tensors.values())
    assert artifact.parts == written.report.parts
    assert sum(artifact.parts.values()) == len(written.data) == written.report.total_bytes
    assert all(artifact.state[k].dtype == v.dtype and artifact.state[k].shape == v.shape for k, v in state.items())
    assert {row.name for row in artifact.plan if row.codec == "grid"} == set(matrices(shapes_of(state)))
    assert {row.states for row in artifact.plan if row.codec == "grid"} == {states}
    assert 0 < written.report.rms_error < 0.2
    assert artifact.meta["m"] == 1
    for name, values in artifact.values.items():
        assert all(np.array_equal(array, written.tensors[name].values[kind]) for kind, array in values.items())
    losses = sum(export.expected_loss(state[name] - artifact.state[name], terms)
                 for name, terms in statistics.terms.items())
    assert written.report.expected_nats == pytest.approx(losses, rel=1e-5)


def test_equal_states_give_equal_bytes(small: tuple[dict[str, Tensor], Statistics], small_file: bytes) -> None:
    state, statistics = small
    shuffled = dict(sorted(state.items(), key=lambda item: hashlib.md5(item[0].encode()).digest()))
    turned = replace(statistics, terms=dict(reversed(statistics.terms.items())))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            again = encode_artifact(shuffled, {"m": 1}, rd(export_bits=5.0), statistics=turned)
            assert again.data == small_file
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("target", "states"), [(30_000, 4), (48_000, 0), (75_001, 8)])
def test_the_total_ends_in_its_window(large: tuple[dict[str, Tensor], Statistics], target: int, states: int) -> None:
    state, statistics = large
    written = encode_artifact(state, {}, rd(artifact_cap_bytes=target + 1234, tcq_states=states), statistics=statistics,
                              code_bytes=1234)
    assert target - export.RD_WINDOW_BYTES <= len(written.data) <= target
    assert written.report.planned_bytes == target


def test_bits_are_of_the_whole_artifact_and_the_cap_still_holds(large: tuple[dict[str, Tensor], Statistics]) -> None:
    state, statistics = large
    numel = sum(t.numel() for t in state.values())
    for bits, cap, most in ((3.0, 10**6, 3.0 * numel / 8), (6.0, 40_000, 40_000)):
        written = encode_artifact(state, {}, rd(export_bits=bits, artifact_cap_bytes=cap), statistics=statistics)
        assert most - export.RD_WINDOW_BYTES - 1 <= len(written.data) <= most


def test_more_room_is_never_more_loss(small: tuple[dict[str, Tensor], Statistics]) -> None:
    state, statistics = small
    losses = [encode_artifact(state, {}, rd(export_bits=bits), statistics=statistics).report.expected_nats
              for bits in (4.0, 5.0, 6.0)]
    assert losses[0] > 2 * losses[1] > 4 * losses[2] > 0


def test_what_cannot_fit_is_refused_and_nothing_is_written(
    small: tuple[dict[str, Tensor], Statistics], tmp_path: Path
) -> None:
    state, statistics = small
    with pytest.raises(ArtifactError, match=r"plan: found \d+ bytes at the coarsest tried .* expected at most 500"):
        export.save_artifact(tmp_path / "model", state, {}, rd(artifact_cap_bytes=500), statistics=statistics)
    assert list(tmp_path.iterdir()) == []


def test_the_finest_grid_is_bounded(small: tuple[dict[str, Tensor], Statistics]) -> None:
    """A cap far above what the weights can use is no reason to store noise."""
    state, statistics = small
    written = encode_artifact(state, {}, rd(artifact_cap_bytes=16_000_000), statistics=statistics)
    assert len(written.data) <= export.FINEST_BITS / 8 * sum(t.numel() for t in state.values()) + export.RD_WINDOW_BYTES
    reconstruction = {name: export.restore(s.row, s.values) for name, s in written.tensors.items()}
    assert same(decode_artifact(written.data).state, reconstruction)


@pytest.mark.parametrize("case", ["one zero matrix", "a zero row and column", "no gradient", "all zero", "other dtypes"])
def test_awkward_states_are_files(small: tuple[dict[str, Tensor], Statistics], case: str) -> None:
    state, statistics = ({**small[0]}, small[1])
    name, terms = "blocks.0.attn.proj.weight", dict(statistics.terms)
    if case == "one zero matrix":
        state[name] = torch.zeros_like(state[name])
    elif case == "a zero row and column":
        state[name] = state[name].clone()
        state[name][3], state[name][:, 5] = 0, 0
    elif case == "no gradient":
        terms[name] = tuple(Term(t.rows * 0, t.moment) for t in terms[name])
        terms["blocks.1.attn.proj.weight"] = tuple(Term(t.rows, t.moment * 0) for t in terms[name])
    elif case == "all zero":
        state = {name: torch.zeros_like(t) for name, t in state.items()}
    else:
        state |= {name: state[name].bfloat16(), "blocks.0.mlp.fc.weight": state["blocks.0.mlp.fc.weight"].double(),
                  "step": torch.tensor(7), "mask": torch.tensor([True])}
    given = Statistics(weights_digest(state), 1, terms)
    written = encode_artifact(state, {}, rd(export_bits=5.0), statistics=given)
    artifact = decode_artifact(written.data)
    assert same(artifact.state, {n: export.restore(s.row, s.values) for n, s in written.tensors.items()})
    assert all(artifact.state[n].dtype == t.dtype for n, t in state.items())
    if "zero matrix" in case:
        assert not artifact.state[name].any()


def test_statistics_are_needed_and_must_be_of_these_weights(small: tuple[dict[str, Tensor], Statistics]) -> None:
    state, statistics = small
    with pytest.raises(ValueError) as caught:
        encode_artifact(state, {}, rd(export_bits=4.0))
    assert str(caught.value) == "EXPORT_SCHEME=rd needs calibration statistics"
    other = {**state, "blocks.0.attn.c_q.weight": state["blocks.0.attn.c_q.weight"] * 2}
    with pytest.raises(ArtifactError, match="calibration statistics: found those of other weights"):
        encode_artifact(other, {}, rd(export_bits=4.0), statistics=statistics)
    fewer = replace(statistics, terms={k: v for k, v in statistics.terms.items() if "c_q" not in k})
    with pytest.raises(ArtifactError, match=r"calibration statistics of blocks\.0\.attn\.c_q\.weight: found none"):
        encode_artifact(state, {}, rd(export_bits=4.0), statistics=fewer)


OPTION_FAULTS: dict[str, tuple[ExportOptions, str]] = {
    "of the other scheme": (rd(export_bits=4.0, int8_axis_mode="col", export_permute="mlp", export_allocate="hessian"), (
        "EXPORT_SCHEME=rd has no use for INT8_AXIS_MODE, EXPORT_PERMUTE, EXPORT_ALLOCATE; unset one of them")),
    "of rd": (ExportOptions(export_bits=3.0, tcq_states=8, tcq_lambda=0.3), (
        "EXPORT_SCHEME=int8_zlib has no use for EXPORT_BITS, TCQ_STATES, TCQ_LAMBDA; unset one of them")),
    "states": (rd(export_bits=4.0, tcq_states=5), "TCQ_STATES must be 0, 4, 8, 16, 32, 64, 128, 256, got 5"),
    "no size": (rd(), "EXPORT_SCHEME=rd needs EXPORT_BITS or ARTIFACT_CAP_BYTES above 0"),
    "bits": (rd(export_bits=9.5), "EXPORT_BITS must be at most 9, got 9.5"),
    "negative bits": (rd(export_bits=-1.0), "EXPORT_BITS must be at least 0, got -1.0"),
    "lambda": (rd(export_bits=4.0, tcq_lambda=math.inf), "TCQ_LAMBDA must be finite, got inf"),
    "scheme": (ExportOptions(export_scheme="zip"), "EXPORT_SCHEME must be int8_zlib or rd, got 'zip'"),
}


@pytest.mark.parametrize("case", OPTION_FAULTS)
def test_faulty_options_are_named(case: str, small: tuple[dict[str, Tensor], Statistics]) -> None:
    options, want = OPTION_FAULTS[case]
    assert want in options.problems()
    with pytest.raises(ValueError) as caught:
        encode_artifact(small[0], {}, options, statistics=small[1])
    assert want in str(caught.value)


# --- damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_file() -> bytes:
    """Two matrices on a grid beside a vector, in a few hundred bytes."""
    a, b = (torch.from_numpy(bell(i, shape, 100) / 100) for i, shape in ((1, (9, 12)), (2, (9, 5))))
    state = {"a": a.float(), "b": b.half(), "c": torch.arange(3.0)}
    terms = {name: (identity(*state[name].shape),) for name in ("a", "b")}
    statistics = Statistics(weights_digest(state), 1, terms)
    return encode_artifact(state, {}, rd(artifact_cap_bytes=700), statistics=statistics).data


def outcome(data: bytes) -> str:
    """The field that is refused, or "" for finite tensors of the plan's shapes; nothing else, and soon."""
    t0 = time.monotonic()
    artifact, found = None, ""
    try:
        artifact = decode_artifact(data)
    except ArtifactError as fault:
        found, offset = fault.field, fault.offset
    if artifact is None:
        assert isinstance(offset, int)
    else:
        assert [(name, tuple(t.shape)) for name, t in artifact.state.items()] == [
            (row.name, row.shape) for row in artifact.plan]
        assert all(bool(t.isfinite().all()) for t in artifact.state.values())
        assert sum(artifact.parts.values()) == len(data)
    assert time.monotonic() - t0 < 5
    return found


def test_truncations_and_flipped_bits_are_refused(short_file: bytes) -> None:
    for at in range(len(short_file)):
        damaged = bytearray(short_file)
        damaged[at] ^= 1 << at % 8
        assert outcome(bytes(damaged)) in ("magic", "version", "reserved", "file", "checksum")
        assert outcome(short_file[:at]) in ("magic", "file")


@pytest.mark.parametrize("which", ["positions", "file", "header"])
def test_mutations_under_a_right_checksum_are_refused_or_tensors(short_file: bytes, small_file: bytes, which: str) -> None:
    """The decoder ends on any bytes, with a refusal or with some weights, and in seconds."""
    rng, outcomes = random.Random(3), []
    parts = {data: decode_artifact(data).parts for data in (small_file, short_file)}
    for i in range({"positions": 40, "file": 100, "header": 250}[which]):
        data = small_file if i % 25 == 0 else short_file
        header, start = export.unframe(data)
        at = len(data) - 8 - parts[data]["positions"]
        if which == "header":
            damaged = packed_file(mutated(rng, header), data[start:-8])
        elif which == "file":
            damaged = sealed(mutated(rng, data))
        else:
            damaged = bytearray(data)
            damaged[rng.randrange(at, len(data) - 8)] = rng.randrange(256)
            damaged = sealed(damaged)
        outcomes.append(outcome(damaged))
    refused = {field.partition(".")[0].partition("[")[0] for field in outcomes}
    assert len(refused - {""}) > (which != "positions"), refused


def grid_file(body: bytes, bases: Sequence[int] = (0, 0, 0, 1, 1, 1), count: int = 1, **fields: Any) -> bytes:
    """A file of `count` grid matrices, written from the format alone."""
    rows = [packed_row(**GRID, **fields | {"name": b"w%d" % i}) for i in range(count)]
    coded = planes("h", [*bases] * count)
    return packed_file(packed_header(rows, [0, 0, 0, 0, 0, 0, len(coded), len(body)]), coded + body)


def test_a_file_written_from_the_specification_alone_is_read() -> None:
    """Restored by hand: 2^(k / 32) with the mantissa rounded down, k the sum of the two steps."""
    body, _ = written(grid_matrix("w", np.array([[2, -4, 0], [1, 3, -1]]), 0, row_steps=[32, -16], col_steps=[0, 8, 64]))
    root = [np.float32(math.floor(2 ** (k / 32) * 2**23) / 2**23) for k in (8, 16, 24)]
    wanted = [[4, -8 * root[0], 0], [root[1] / 2, 3 * root[2] / 2, -2 * root[1]]]
    assert decode_artifact(grid_file(body)).state["w0"].tolist() == np.array(wanted, np.float32).tolist()


def test_malformed_positions_are_refused() -> None:
    body, _ = written(grid_matrix("w", np.array([[2, -4, 0], [1, 3, -1]]), 0))
    assert decode_artifact(grid_file(body)).state["w0"].tolist() == [[2, -4, 0], [1, 3, -1]]
    head = 1 + export.STATE_BYTES * 8
    assert body[0] == 3
    start = export.unframe(grid_file(body))[1] + 12
    low = body[:1] + (2**24 - 1).to_bytes(5, "little") + body[6:]
    for damaged, want in (
        (b"", ("positions", "6 positions in 0 bytes", "at most 0")),
        (b"\2" + body[1:], ("positions.lanes", "2", "3..10")),
        (b"\x0b" + body[1:], ("positions.lanes", "11", "3..10")),
        (body[:head - 1], ("positions", f"{head - 1} bytes", f"{head} and then words of two")),
        (body + b"!", ("positions", f"{len(body) + 1} bytes", f"{head} and then words of two")),
        (low, ("positions.states", str(2**24 - 1), f">= {2**24}")),
    ):
        field, offset, found, expected = fault_of(grid_file(damaged))
        assert (field, found, expected) == want
        assert offset == start + (field == "positions.states")
    field, offset, _, expected = fault_of(grid_file(body + b"!!"))
    assert (field, offset, expected) == ("positions", start, "a stream that ends with its last position")
    long, _ = written(grid_matrix("w", np.array([[2, -4, 900], [1000, 3, -1]]), 0))
    assert len(long) > head
    data = grid_file(long[:-2])
    assert fault_of(data) == ("positions", export.unframe(data)[1] + 12, f"{(len(long) - head) // 2 - 1} words", "more")


@pytest.mark.parametrize("unit", [0, -1, -(2**15)])
@pytest.mark.parametrize("which", [3, 4, 5])
def test_units_below_one_are_refused(which: int, unit: int) -> None:
    body, _ = written(grid_matrix("w", np.zeros((2, 3), np.int64), 0))
    bases = [0, 0, 0, 1, 1, 1]
    bases[which] = unit
    data = grid_file(body, bases)
    assert fault_of(data) == ("bases of w0", export.unframe(data)[1], f"a unit of {unit}", "at least 1")


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("base", [1025, -1025, 2**15 - 1, -(2**15)])
def test_exponents_out_of_range_are_refused(which: int, base: int) -> None:
    body, _ = written(grid_matrix("w", np.zeros((2, 3), np.int64), 0))
    bases = [0, 0, 0, 1, 1, 1]
    bases[which] = base
    data = grid_file(body, bases)
    assert fault_of(data) == ("positions", export.unframe(data)[1] + 12, f"an exponent of {abs(base)}", "at most 1024")
    bases[which] = 1024 if base > 0 else -1024
    kinds = ("col_steps", "row_steps", "row_sizes")
    exponents = {kind: np.full(3 if kind == "col_steps" else 2, e) for kind, e in zip(kinds, bases, strict=False)}
    body, _ = written(grid_matrix("w", np.ones((2, 3), np.int64), 0, **exponents, bases=bases))
    step = 2.0 ** ((bases[0] + bases[1]) / OCTAVE)
    assert decode_artifact(grid_file(body, bases)).state["w0"].tolist() == [[step] * 3] * 2


def test_more_positions_than_their_bytes_can_say_are_refused_at_once() -> None:
    body, _ = written(grid_matrix("w", np.zeros((2, 3), np.int64), 0))
    for dims in ((2**13, len(body) + 1), (2**14, 2**14), (2**28, 1)):
        t0, data = time.monotonic(), grid_file(body, dims=dims)
        field, offset, found, expected = fault_of(data)
        assert (field, offset) == ("positions", export.unframe(data)[1] + 12)
        assert (found, expected) == (f"{math.prod(dims)} positions in {len(body)} bytes", f"at most {2**13 * len(body)}")
        assert time.monotonic() - t0 < 0.5
    assert outcome(grid_file(body, dims=(300, 300))) == "positions"


# --- without numba --------------------------------------------------------------------------------------------------------


def test_a_fresh_process_without_numba_says_and_reads_the_same(small_file: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(small_file)
    code = NO_NUMBA + (
        "sys.path.insert(0, 'tests'); import export, test_grid as t, test_container as c; from pathlib import Path\n"
        "print(c.fingerprint(export.load_artifact(sys.argv[1]).state), export.compiled(export.best_path))\n"
        "state = t.tiny_state(**t.SMALL); statistics = t.statistics_for(state)\n"
        "data = export.encode_artifact(state, {'m': 1}, t.rd(export_bits=5.0), statistics=statistics).data\n"
        "print(data == Path(sys.argv[1]).read_bytes())")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], cwd=ROOT, env={}, text=True,
                         capture_output=True, check=False)
    assert run.stdout.split() == [fingerprint(decode_artifact(small_file).state), "None", "True"], run.stderr
