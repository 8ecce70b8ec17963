"""Experiences as a Parquet table, a row each, for whatever reads tables."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from esper.atomic import replacing
from esper.errors import MissingExtraError
from esper.tamiyo.experience.records import Experience
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.graph.facts import FACTS_VERSION
from esper.tamiyo.rewards.config import COMPONENTS, HORIZONS, Horizon

__all__ = ["export_parquet"]

_ROWS_AT_ONCE = 256

_Read = Callable[[Experience], Any]

_COLUMNS: tuple[tuple[str, str, _Read], ...] = (
    ("number", "int64", lambda e: e.number),
    ("decision_id", "string", lambda e: e.decision.decision_id),
    ("run_id", "string", lambda e: e.decision.run_id),
    ("policy", "string", lambda e: e.decision.policy),
    ("version", "string", lambda e: e.decision.version),
    ("timestamp", "float64", lambda e: e.decision.point.timestamp),
    ("step", "int64", lambda e: e.decision.point.run.step),
    ("total_steps", "int64", lambda e: e.decision.point.run.total_steps),
    ("host_parameters", "int64", lambda e: e.decision.point.run.host_parameters),
    ("num_parameters", "int64", lambda e: e.decision.point.run.num_parameters),
    ("tokens_per_parameter", "float64", lambda e: e.decision.point.run.tokens_per_parameter),
    ("price", "float64", lambda e: e.decision.point.run.price),
    ("held_out_loss", "float64", lambda e: e.decision.point.run.held_out_loss),
    ("num_candidates", "int64", lambda e: len(e.decision.point.candidates)),
    ("chosen", "int64", lambda e: e.decision.chosen),
    ("action", "string", lambda e: e.decision.candidate.action),
    ("sites", "list", lambda e: [p.site or p.target for p in e.decision.candidate.placements]),
    ("blueprints", "list", lambda e: [p.blueprint for p in e.decision.candidate.placements]),
    ("parameters_added", "int64", lambda e: e.decision.candidate.parameters),
    ("logprob", "float64", lambda e: e.decision.logprob),
    ("confidence", "float64", lambda e: e.decision.confidence),
    ("uncertainty", "float64", lambda e: e.decision.uncertainty),
    ("seed_ids", "list", lambda e: list(e.seed_ids)),
    ("refused", "string", lambda e: e.refused),
    ("provenance", "string", lambda e: e.outcome and e.outcome.measured.provenance),
    ("held_out", "bool", lambda e: e.outcome and e.outcome.measured.held_out),
    ("adaptations_after", "int64", lambda e: e.outcome and e.outcome.measured.adaptations_after),
    ("final", "bool", lambda e: e.outcome and e.outcome.final),
    ("reward", "float64", lambda e: _reward(e, "total")),
    ("utility", "float64", lambda e: _reward(e, "utility")),
)
_PACKED: tuple[tuple[str, str, _Read], ...] = (
    ("point", "binary", lambda e: msgspec.msgpack.encode(e.decision.point)),
    ("measured", "binary", lambda e: e.outcome and msgspec.msgpack.encode(e.outcome.measured)),
)


def export_parquet(store: ExperienceStore, path: str | os.PathLike[str], *, policy: str | None = None) -> int:
    """Write a store's experiences as a Parquet file, a few at a time, and put it in place when it is whole.

    Beside plain columns each row has ``point`` and ``measured``, the decision point and the measurements whole, as
    msgpack of :class:`~esper.tamiyo.graph.facts.DecisionPoint` and
    :class:`~esper.tamiyo.rewards.branch.Outcome`; ``esper.facts_version`` in the file's metadata
    says of which version. What does not apply is null.

    Args:
        store: Others may write to it meanwhile; what they add may be in the file or not.
        path: The file; one that is there is replaced.
        policy: Of this policy alone.

    Returns:
        Rows written.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pa, parquet = _pyarrow()
    columns = [*_COLUMNS, *_reward_columns(), *_PACKED]
    types = {
        "int64": pa.int64(), "float64": pa.float64(), "string": pa.string(), "bool": pa.bool_(),
        "list": pa.list_(pa.string()), "binary": pa.binary(),
    }  # fmt: skip
    schema = pa.schema(
        [pa.field(name, types[kind]) for name, kind, _ in columns],
        metadata={"esper.facts_version": str(FACTS_VERSION)},
    )
    rows = 0
    with (
        replacing(Path(path)) as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for chunk in _chunks(store.iterate(policy=policy)):
            arrays = [pa.array([read(e) for e in chunk], types[kind]) for _, kind, read in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            rows += len(chunk)
    return rows


def _reward(experience: Experience, name: str) -> float | None:
    outcome = experience.outcome
    return None if outcome is None or outcome.reward is None else float(getattr(outcome.reward, name))


def _reward_columns() -> Iterator[tuple[str, str, _Read]]:
    """Total, utility and every component of each horizon, such as ``short_accuracy``."""
    for horizon in HORIZONS:
        for name in ("total", "utility", *COMPONENTS):
            yield f"{horizon}_{name}", "float64", _reader(horizon, name)


def _reader(horizon: Horizon, name: str) -> _Read:
    def read(experience: Experience) -> float | None:
        outcome = experience.outcome
        if outcome is None or outcome.reward is None or horizon not in outcome.reward.horizons:
            return None
        at = outcome.reward.horizons[horizon]
        return at.components[name] if name in COMPONENTS else float(getattr(at, name))

    return read


def _chunks(experiences: Iterable[Experience]) -> Iterator[list[Experience]]:
    waiting = iter(experiences)
    while chunk := list(itertools.islice(waiting, _ROWS_AT_ONCE)):
        yield chunk


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            "writing Parquet needs pyarrow, which is not installed; install it with: pip install 'esper[learn]'"
        ) from error
    return pyarrow, pyarrow.parquet
