"""Which hosts a policy may learn from, which it may be tuned on, and which it has never seen.

A host's random numbers follow from its name, and its split is part of that, so hosts of different splits are
drawn apart. What is left to check is that a table keeps to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from esper.errors import DataFormatError
from esper.tamiyo.environment.specs import SPLITS, FashionTask, HostSpec, ShakespeareTask
from esper.tamiyo.oracle.records import StateRecord

__all__ = ["check_splits", "of_split", "recipe"]


def of_split(records: Sequence[StateRecord], split: str) -> list[StateRecord]:
    """Return the states of one split.

    Raises:
        DataFormatError: There is no such split.
    """
    if split not in SPLITS:
        raise DataFormatError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    return [record for record in records if record.split == split]


def recipe(spec: HostSpec) -> bytes:
    """What a host is apart from its name: two hosts of one recipe differ in nothing but random numbers."""
    plain = msgspec.structs.replace(spec, split="train", number=0)
    return msgspec.msgpack.encode(plain, order="deterministic")


def check_splits(records: Sequence[StateRecord]) -> None:
    """Check that nothing leaks from one split into another.

    Raises:
        DataFormatError: A state is twice in the table, a sealed task outside the sealed split or another one in
            it, a family both sealed and open, or hosts of one recipe are in two splits.
    """
    states: set[str] = set()
    recipes: dict[bytes, StateRecord] = {}
    families: dict[str, StateRecord] = {}
    for record in records:
        if record.state_id in states:
            raise DataFormatError(f"state {record.state_id!r} is twice in the table")
        states.add(record.state_id)
        sealed = isinstance(record.spec.task, FashionTask | ShakespeareTask)
        if sealed != (record.split == "sealed"):
            raise DataFormatError(
                f"state {record.state_id!r} of split {record.split} trains on {record.spec.task}; Fashion-MNIST and "
                "tiny Shakespeare belong to the sealed split, and only they"
            )
        family = families.setdefault(record.family, record)
        if (family.split == "sealed") != sealed:
            raise DataFormatError(
                f"family {record.family!r} is sealed and open: {family.state_id}, {record.state_id}"
            )
        twin = recipes.setdefault(recipe(record.spec), record)
        if twin.split != record.split:
            raise DataFormatError(
                f"the hosts of {twin.state_id!r} ({twin.split}) and {record.state_id!r} ({record.split}) differ in "
                "random numbers only"
            )
