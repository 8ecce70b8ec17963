"""Signals as columns: exact round trip, lazy objects, and nothing but MessageError for anything else."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import MessageError
from esper.messages import TOPICS, HealthSignal, SignalBatch
from esper.oona import decode, encode
from esper.signal_table import SignalTable

COUNT = st.integers(0, 2**64 - 1)
FRACTION = st.floats(0.0, 1.0)
POSITIVE = st.floats(0.0)
SIGNAL = st.builds(
    HealthSignal, layer_id=st.text(max_size=8), seed_id=st.text(max_size=8), chunk_id=COUNT, epoch=COUNT,
    step=COUNT, activation_variance=POSITIVE, dead_neuron_ratio=FRACTION, dormancy=FRACTION,
    avg_correlation=st.floats(-1.0, 1.0), effective_rank=POSITIVE, gradient_norm=POSITIVE,
    gradient_snr=POSITIVE, update_ratio=POSITIVE, expressivity=POSITIVE,
    is_ready_for_transition=st.booleans(), health_score=FRACTION, execution_latency=POSITIVE,
    error_count=COUNT, active_seeds=COUNT, total_seeds=COUNT, timestamp=st.floats(allow_nan=False),
)  # fmt: skip


def signal(**changes: Any) -> HealthSignal:
    values: dict[str, Any] = dict.fromkeys(HealthSignal.__struct_fields__[2:], 0)
    return HealthSignal(**({"layer_id": "net.fc1", "seed_id": ""} | values | changes))


def step_columns(num: int) -> dict[str, Any]:
    return {
        "step": 7, "epoch": 2, "timestamp": 1.5, "statistics": np.linspace(0, 1, 8 * num).reshape(8, num),
        "expressivity": [0.5] * num, "ready": [True] * num, "health": [0.75] * num, "latency_ms": [3.0] * num,
        "error_count": np.full(num, 4.0), "active_seeds": [1] * num, "total_seeds": [2] * num,
    }  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(SIGNAL, max_size=6))
def test_signals_travel_exactly(signals: list[HealthSignal]) -> None:
    batch = SignalBatch.of("r", 3, 1, signals, 2.5)
    arrived = decode(encode(batch))
    assert isinstance(arrived, SignalBatch)
    assert arrived == batch
    assert arrived.signals == signals
    assert [arrived.table.row(index) for index in range(len(signals))] == signals
    assert all(type(s.is_ready_for_transition) is bool and type(s.step) is int for s in arrived.signals)


def test_the_table_of_a_step_names_its_columns_right() -> None:
    table = SignalTable.of_step(["a", "a"], ["", "s1"], **step_columns(2))
    x = step_columns(2)["statistics"]
    assert table.signals[1] == signal(
        layer_id="a", seed_id="s1", epoch=2, step=7, timestamp=1.5, expressivity=0.5, health_score=0.75,
        is_ready_for_transition=True, execution_latency=3.0, error_count=4, active_seeds=1, total_seeds=2,
        activation_variance=x[0, 1], dead_neuron_ratio=x[1, 1], dormancy=x[2, 1], avg_correlation=x[3, 1],
        effective_rank=x[4, 1], gradient_norm=x[5, 1], gradient_snr=x[6, 1], update_ratio=x[7, 1],
    )  # fmt: skip
    assert SignalTable.of(table.signals) == table
    assert SignalTable.of(table) is table


def test_a_table_is_a_sequence_of_signals() -> None:
    signals = [signal(step=step) for step in range(3)]
    table = SignalTable.of(signals)
    assert len(table) == 3
    assert list(table) == signals == table
    assert table[-1] == signals[2]
    assert table[:2] == signals[:2]
    assert table.column("step").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        table.column("step")[0] = 5
    assert repr(table) == "SignalTable(3 signals of 1 layers)"
    assert SignalTable.of([]).signals == []


def test_objects_are_built_once() -> None:
    batch = decode(encode(SignalBatch.of("r", 1, 1, [signal()], 1.0)))
    assert isinstance(batch, SignalBatch)
    assert batch.signals is batch.signals


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"health_score": 1.01}, r"health_score in \[0, 1\], got 1\.01 for layer 'net\.fc1'"),
        ({"dead_neuron_ratio": -0.1}, r"dead_neuron_ratio in \[0, 1\]"),
        ({"dormancy": math.inf}, r"dormancy in \[0, 1\]"),
        ({"avg_correlation": -1.5, "seed_id": "s1"}, r"\[-1, 1\], got -1\.5 for layer .*, seed 's1'"),
        ({"effective_rank": -1.0}, r"effective_rank in \[0, inf\]"),
        ({"gradient_norm": math.nan}, r"gradient_norm in \[0, inf\], got nan"),
        ({"timestamp": math.nan}, "timestamp"),
    ],
)
def test_what_is_out_of_range_is_refused_by_the_reader(changes: dict[str, Any], match: str) -> None:
    batch = SignalBatch.of("r", 1, 1, [signal(), signal(**changes)], 1.0)
    with pytest.raises(MessageError, match=match):
        decode(encode(batch))
    with pytest.raises(MessageError, match=match):
        _ = batch.signals


@pytest.mark.parametrize(
    ("ids", "columns", "match"),
    [
        (b"", b"", "MessagePack of layer ids"),
        (msgspec.msgpack.encode((["a"], [""], [""])), bytes(145), "MessagePack of layer ids"),
        (msgspec.msgpack.encode((["a"], [3])), bytes(145), "MessagePack of layer ids"),
        (b"\x92\x91\xa1\xff\x91\xa0", bytes(145), "MessagePack of layer ids"),
        (b"\x92\xdd\xff\xff\xff\xff", bytes(145), "MessagePack of layer ids"),
        (msgspec.msgpack.encode((["a", "b"], [""])), bytes(290), "each of 2 layer ids, got 1"),
        (msgspec.msgpack.encode((["a"], [""])), bytes(144), "145 bytes for each of 1 signals, got 144"),
        (msgspec.msgpack.encode(([], [])), b"\0", "each of 0 signals, got 1"),
        (msgspec.msgpack.encode((["a"], [""])), bytes(144) + b"\2", "0 or 1 in is_ready_for_transition"),
        (msgspec.msgpack.encode((["x" * 70_000], [3])), bytes(145), "MessagePack of layer ids"),
    ],
)
def test_malformed_columns_are_refused(ids: bytes, columns: bytes, match: str) -> None:
    with pytest.raises(MessageError, match=match):
        decode(encode(SignalBatch("r", 1, 1, ids, columns, 1.0)))


def test_ids_too_long_to_be_kept_are_read_all_the_same() -> None:
    signals = [signal(layer_id="x" * 70_000)]
    batch = decode(encode(SignalBatch.of("r", 1, 1, signals, 1.0)))
    assert isinstance(batch, SignalBatch)
    assert batch.signals == signals


@settings(deadline=None, max_examples=300)
@given(ids=st.binary(max_size=40), columns=st.binary(max_size=300))
def test_arbitrary_columns_raise_nothing_else(ids: bytes, columns: bytes) -> None:
    for given_ids in (ids, msgspec.msgpack.encode((["a", "b"], ["", "s"]))):
        try:
            decode(encode(SignalBatch("r", 1, 1, given_ids, columns, 1.0)))
        except MessageError:
            continue


@settings(deadline=None, max_examples=500)
@given(
    signals=st.lists(SIGNAL, min_size=1, max_size=3),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 30),
)
def test_damaged_batches_give_valid_signals_or_a_message_error(
    signals: list[HealthSignal], changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(encode(SignalBatch.of("r", 1, 1, signals, 1.0)))
    begin = len(TOPICS["health"]) + 1 + 22  # the payload; damaged headers are tests/oona/test_codec.py's
    for position, value in changes:
        data[begin + position % (len(data) - begin)] = value
    try:
        batch = decode(bytes(data[: len(data) - cut]))
    except MessageError:
        return
    assert isinstance(batch, SignalBatch)
    # the ranges of HealthSignal's own annotations, as an independent check
    msgspec.msgpack.decode(msgspec.msgpack.encode(batch.signals), type=list[HealthSignal])


@pytest.mark.parametrize(
    "changes",
    [
        {"statistics": np.zeros((8, 3))},
        {"statistics": np.zeros((8, 1))},
        {"health": [0.5]},
        {"health": [0.5, "good"]},
        {"health": [0.5] * 3, "latency_ms": [1.0]},
        {"active_seeds": [1, -1]},
        {"ready": [True]},
        {"ready": [True, 300]},
        {"error_count": [1]},
        {"step": -1},
    ],
)
def test_columns_that_do_not_fit_are_refused_where_they_are_made(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match=r"in every column of the signals"):
        SignalTable.of_step(["a", "b"], ["", ""], **(step_columns(2) | changes))
    with pytest.raises(MessageError, match=r"in every column of the signals"):
        SignalTable.of_step(["a", "b"], [""], **step_columns(2))


@pytest.mark.parametrize("changes", [{"health_score": "good"}, {"step": -1}, {"step": 1.5}])
def test_objects_with_values_of_another_type_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match=f"in the field {next(iter(changes))}"):
        SignalTable.of([signal(**changes)])


def test_columns_chosen_from_a_table_make_another() -> None:
    table = SignalTable.of([signal(layer_id=name, step=step) for step, name in enumerate("abc")])
    floats, counts, flags = (block[:, [2, 0]] for block in table.blocks)
    chosen = SignalTable.of_blocks(("c", "a"), table.seed_ids[:2], floats, counts, flags)
    assert list(chosen) == [table[2], table[0]]
    assert SignalTable.read(chosen.ids, chosen.columns) == chosen
