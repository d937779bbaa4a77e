"""Several ranks as threads of one process, to see what an evaluator does with its text on more than one of them: no network,
no second copy of PyTorch. One thread runs at a time, from one exchange to the next, in the order of ranks, and each has its
own state of PyTorch's generator, so that what they compute is what processes would.
"""
from __future__ import annotations

import contextlib
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train_gpt import Runtime


class Meeting:
    """Where the ranks exchange what they have."""

    def __init__(self, size: int):
        self.size, self.turn, self.ended = size, 0, set[int]()
        self.condition = threading.Condition()
        self.rounds: dict[int, dict[int, Any]] = defaultdict(dict)      # of each exchange: rank -> value
        self.calls = [0] * size
        self.generators = [torch.get_rng_state()] * size

    def begin(self, rank: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.turn == rank)
        torch.set_rng_state(self.generators[rank])

    def give_way(self, rank: int) -> None:
        with self.condition:
            others = [(rank + i) % self.size for i in range(1, self.size + 1)]
            self.turn = next((other for other in others if other not in self.ended), -1)
            self.condition.notify_all()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank brings to its exchange of the same number, in the order of ranks."""
        number, self.generators[rank] = self.calls[rank], torch.get_rng_state()
        self.calls[rank] += 1
        self.rounds[number][rank] = value
        self.give_way(rank)
        self.begin(rank)
        if len(self.rounds[number]) < self.size:
            raise RuntimeError(f"rank {rank} waits in its exchange {number}, another has ended")
        return [self.rounds[number][other] for other in range(self.size)]

    def end(self, rank: int) -> None:
        self.ended.add(rank)
        self.give_way(rank)


@dataclass
class ThreadRank(Runtime):
    """One of the ranks; what it shares goes through `reduce` and `broadcast`, as in a run. A copy that is made one of one
    shares nothing.
    """
    meeting: Meeting = field(kw_only=True)

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.world_size == 1:
            return values
        found = torch.stack(self.meeting.exchange(self.rank, values.clone()))
        return values.copy_(found.amax(0) if op == dist.ReduceOp.MAX else found.sum(0))

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        return data if self.world_size == 1 else self.meeting.exchange(self.rank, data)[source]


@contextlib.contextmanager
def unlocked_properties() -> Iterator[None]:
    """Before Python 3.12 a cached_property holds a lock of its class while it is computed, so a rank that exchanges
    something meanwhile would keep the others from theirs for ever. Ranks take turns and share no object: they need no lock.
    """
    def get(self: Any, instance: Any, _owner: Any = None) -> Any:
        if instance is None:
            return self
        known = instance.__dict__
        if self.attrname not in known:
            known[self.attrname] = self.func(instance)
        return known[self.attrname]

    before = functools.cached_property.__get__
    try:
        setattr(functools.cached_property, "__get__", get)  # noqa: B010
        yield
    finally:
        setattr(functools.cached_property, "__get__", before)  # noqa: B010


def on_ranks(rt: Runtime, size: int, action: Callable[[Runtime], Any]) -> list[Any]:
    """What `action` gives on each of the ranks; the first exception of theirs is raised."""
    meeting, found, faults = Meeting(size), [None] * size, list[BaseException]()

    def run(rank: int) -> None:
        meeting.begin(rank)
        try:
            found[rank] = action(ThreadRank(rt.device, rt.dtype, rt.compiled, rank, size, meeting=meeting))
        except BaseException as fault:      # raised below, in the thread that asked
            faults.append(fault)
        finally:
            meeting.end(rank)

    before, threads = torch.get_rng_state(), [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    with unlocked_properties():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.set_rng_state(before)
    for fault in faults[:1]:
        raise fault
    return found
