"""What learning may look at: prices that leave labels true, splits apart, nothing sealed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from pipeline_tables import names, records, tiny_config

from esper.errors import DataFormatError
from esper.tamiyo.oracle.records import utilities
from esper.tamiyo.oracle.table import write_table
from esper.tamiyo.pipeline.dataset import (
    Dataset,
    Urgency,
    make_dataset,
    open_records,
    spread,
    wait_is_best,
)

PRICES = (0.0, 0.3)


def open_data(urgency: list[Urgency] | None = None) -> Dataset:
    return make_dataset([r for r in records() if r.split != "sealed"], PRICES, urgency or ())


def test_every_state_at_every_price_with_its_own_utility() -> None:
    data = open_data()
    assert [len(data.train), len(data.validation), len(data.test)] == [12, 6, 6]
    free, dear = data.train[:2]
    assert (free.price, dear.price) == PRICES
    np.testing.assert_allclose(dear.means, utilities(dear.record, 0.3).mean(axis=1))
    assert free.state.point is not None
    assert dear.state.point is not None
    assert (free.state.point.run.price, dear.state.point.run.price) == PRICES
    assert not np.array_equal(free.row.graph.floats, dear.row.graph.floats)
    assert free.means[2] > dear.means[2]  # the candidate is larger, so it is worth less at a price


def test_sealed_states_are_let_go_of_when_the_table_is_read(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    found = open_records(config.table)
    assert {record.split for record in found} == {"train", "validation", "test"}
    assert len(found) == len(records()) - 1


def test_there_is_no_place_for_sealed_or_misplaced_states() -> None:
    sealed = make_dataset([r for r in records() if r.split == "train"], PRICES)
    data = open_data()
    for wrong in (
        {"train": data.validation},
        {"test": data.train},
        {"validation": (dataclasses.replace(data.train[0], record=records()[-1]),)},
    ):
        with pytest.raises(AssertionError):
            dataclasses.replace(data, **wrong)
    assert names(sealed.train).isdisjoint(names(data.validation) | names(data.test))
    with pytest.raises(KeyError, match="sealed"):
        make_dataset(records(), PRICES)


def test_a_table_without_a_split_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "table", [r for r in records() if r.split == "train"])
    with pytest.raises(DataFormatError, match="none of validation"):
        open_records(tmp_path / "table")


def test_urgency_is_a_label_only_where_it_is_true() -> None:
    first = open_data().train[0]
    best = int(np.nanargmax(first.means))
    known = Urgency(state_id=first.record.state_id, candidate=best, cost=0.2)
    other = Urgency(state_id=first.record.state_id, candidate=best + 1, cost=0.9)
    data = open_data([known, other])
    assert data.train[0].row.urgency == 0.2
    assert math.isnan(data.train[2].row.urgency)  # of another state nothing was measured
    waiting = next(case for case in data.train if int(np.nanargmax(case.means)) == 0)
    assert waiting.row.urgency == 0.0


def test_wait_is_best_where_nothing_is_worth_more_than_noise() -> None:
    found = {case.record.spec.number: wait_is_best(case) for case in open_data().train if case.price == 0.0}
    assert found == {number: number % 3 == 2 for number in range(6)}


def test_every_beginning_of_the_order_is_spread() -> None:
    data = open_data()
    order = spread(data.train)
    assert sorted(order) == sorted(names(data.train))
    assert order[0] == "train-0"


def test_the_digest_follows_outcomes_and_prices() -> None:
    some = [r for r in records() if r.split != "sealed"]
    digest = make_dataset(some, PRICES).digest
    assert make_dataset(list(reversed(some)), PRICES).digest == digest
    assert make_dataset(some, (0.0,)).digest != digest
    assert make_dataset(some[1:], PRICES).digest != digest
