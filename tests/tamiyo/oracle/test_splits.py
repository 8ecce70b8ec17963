"""Hosts of one split never turn up in another."""

from __future__ import annotations

import msgspec
import pytest
from oracle_states import make_record

from esper.errors import DataFormatError
from esper.tamiyo.environment.specs import FashionTask
from esper.tamiyo.oracle.splits import check_splits, of_split


def test_states_of_one_host_may_share_a_split() -> None:
    records = [make_record(0), make_record(0, state_id="later"), make_record(1, split="test")]
    check_splits(records)
    assert [r.state_id for r in of_split(records, "train")] == ["train-0", "later"]
    with pytest.raises(DataFormatError, match="no split 'all'"):
        of_split(records, "all")


def test_leaks_are_refused() -> None:
    with pytest.raises(DataFormatError, match="twice in the table"):
        check_splits([make_record(0), make_record(0)])
    twin = make_record(1, split="validation")
    twin = msgspec.structs.replace(
        twin, spec=msgspec.structs.replace(make_record(0).spec, split="validation", number=9)
    )
    with pytest.raises(DataFormatError, match="random numbers only"):
        check_splits([make_record(0), twin])


def test_sealed_tasks_stay_sealed() -> None:
    record = make_record(0)
    spec = msgspec.structs.replace(record.spec, task=FashionTask(num_train=1000))
    with pytest.raises(DataFormatError, match="belong to the sealed split"):
        check_splits([msgspec.structs.replace(record, spec=spec)])
    spec = msgspec.structs.replace(record.spec, split="sealed")
    with pytest.raises(DataFormatError, match="belong to the sealed split"):
        check_splits([msgspec.structs.replace(record, spec=spec)])
    sealed = make_record(3, split="sealed")
    spec = msgspec.structs.replace(sealed.spec, family="digits_mlp")
    with pytest.raises(DataFormatError, match="is sealed and open"):
        check_splits([make_record(0), msgspec.structs.replace(sealed, spec=spec)])
