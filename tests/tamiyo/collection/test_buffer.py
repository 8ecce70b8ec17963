"""Two lanes: nothing of high priority is lost before the last normal signal is."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
from telemetry import signal

from esper.errors import ConfigError
from esper.signal_table import SignalTable
from esper.tamiyo.collection.buffer import HealthSignalBuffer
from esper.tamiyo.collection.keys import KeyTable
from esper.tamiyo.collection.priority import Priority
from esper.tamiyo.collection.ring import SignalBlock, SignalRing

KEYS = KeyTable()


def block(priorities: list[int], first: int = 0) -> SignalBlock:
    """Signals whose step is their place in the order of arrival."""
    signals = [signal(step=first + index) for index in range(len(priorities))]
    keys = np.array([KEYS.of("run", "fc1")] * len(signals), dtype=np.int64)
    return SignalBlock.of(
        SignalTable.of(signals), keys, np.array(priorities), published=float(first), first=first
    )


def steps(taken: SignalBlock | None) -> list[int]:
    return [] if taken is None else [each.step for each in taken.table(KEYS)]


N, H = Priority.NORMAL, Priority.ANOMALY


def test_thinned_signals_are_left_out_and_figures_survive() -> None:
    made = block([N, Priority.THINNED, Priority.ERROR], first=5)
    assert made.sequence.tolist() == [5, 7]
    assert made.priorities.tolist() == [N, Priority.ERROR]
    assert made.published.tolist() == [5.0, 5.0]
    assert made.table(KEYS).signals == [signal(step=5), signal(step=7)]


def test_high_priority_comes_first_and_each_lane_is_in_order() -> None:
    buffer = HealthSignalBuffer(10)
    buffer.add(block([N, H, N, H]))
    buffer.add(block([H, N], first=4))
    assert steps(buffer.take(4)) == [1, 3, 4, 0]
    assert steps(buffer.take(100)) == [2, 5]
    assert buffer.take(1) is None


def test_normal_signals_go_first_and_the_oldest_of_them() -> None:
    buffer = HealthSignalBuffer(4)
    buffer.add(block([N, H, N, N]))
    buffer.add(block([H, H, N], first=4))
    assert (buffer.drops.normal, buffer.drops.high) == (3, 0)
    assert steps(buffer.take(10)) == [1, 4, 5, 6]


def test_high_priority_goes_only_when_nothing_else_is_left() -> None:
    buffer = HealthSignalBuffer(3)
    buffer.add(block([H, N]))
    buffer.add(block([H, H, H], first=2))
    assert (buffer.drops.normal, buffer.drops.high) == (1, 1)
    buffer.add(block([N], first=5))  # a normal one never pushes out a high one
    assert (buffer.drops.normal, buffer.drops.high) == (2, 1)
    assert steps(buffer.take(10)) == [2, 3, 4]


def test_a_block_larger_than_everything_leaves_its_newest() -> None:
    buffer = HealthSignalBuffer(3)
    buffer.add(block([N] * 2))
    buffer.add(block([H] * 5, first=2))
    assert (buffer.drops.normal, buffer.drops.high) == (2, 2)
    assert steps(buffer.take(10)) == [4, 5, 6]
    buffer.add(block([N] * 5, first=7))
    assert steps(buffer.take(10)) == [9, 10, 11]


def test_against_a_plain_model_of_two_queues() -> None:
    draw = random.Random(0)
    buffer = HealthSignalBuffer(20)
    high: deque[int] = deque()
    normal: deque[int] = deque()
    lost = {"normal": 0, "high": 0}
    arrived = 0
    for _ in range(500):
        priorities = [H if draw.random() < 0.4 else N for _ in range(draw.randrange(12))]
        buffer.add(block(priorities, arrived))
        # high ones of a block are placed before its normal ones
        for wanted, lane in ((H, high), (N, normal)):
            for index, priority in enumerate(priorities):
                if priority != wanted:
                    continue
                if wanted == N and len(high) == 20:
                    lost["normal"] += 1
                    continue
                lane.append(arrived + index)
                if len(high) + len(normal) > 20:
                    lost["normal" if normal else "high"] += 1
                    (normal or high).popleft()
        arrived += len(priorities)
        assert len(buffer) == len(high) + len(normal)
        assert buffer.num_high == len(high)
        if draw.random() < 0.6:
            num = draw.randrange(15)
            num = min(num, len(high) + len(normal))
            assert steps(buffer.take(num)) == [(high or normal).popleft() for _ in range(num)]
    assert lost == {"normal": buffer.drops.normal, "high": buffer.drops.high}
    assert lost["high"] > 0


def test_a_ring_wraps_and_begins_anew_when_it_is_empty() -> None:
    ring = SignalRing(5)
    ring.push(block([N] * 4))
    assert steps(ring.pop(3)) == [0, 1, 2]
    ring.push(block([N] * 4, first=4))
    assert steps(ring.block()) == [3, 4, 5, 6, 7]
    assert ring.tags()[2].tolist() == [3, 4, 5, 6, 7]
    assert steps(ring.at(np.array([4, 0]))) == [7, 3]
    assert steps(ring.pop(9)) == [3, 4, 5, 6, 7]
    assert len(ring) == ring._start == 0
    ring.keep_newest(block([N] * 12))
    assert steps(ring.block()) == [7, 8, 9, 10, 11]


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="buffer_size"):
        HealthSignalBuffer(0)
