"""Decision points of further training hosts, where nothing is tried: what a student is taught beside the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from esper.tamiyo.environment.families import KNOWN
from esper.tamiyo.environment.workers import LocalWorkers
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.candidates import CandidateConfig
from esper.tamiyo.learning import checkpoint
from esper.tamiyo.learning.packed import PackedGraph, pack_many, unpack_many
from esper.tamiyo.oracle.plan import StatePlan, plan_states
from esper.tamiyo.oracle.records import StateRecord
from esper.tamiyo.oracle.trials import TRIED, reach

__all__ = ["fresh_graphs", "fresh_plans"]

_CHUNK = 8


def fresh_plans(records: Sequence[StateRecord], num: int) -> list[StatePlan]:
    """Plan states of training hosts that the table does not have, spread over its families."""
    families = sorted({record.family for record in records} & set(KNOWN))
    taken = {record.state_id for record in records}
    most = 1 + max((record.spec.number for record in records if record.split == "train"), default=-1)
    each = -(-num // len(families))
    plans = plan_states({family: {"train": most + each} for family in families})
    return [plan for plan in plans if plan.spec.number >= most and plan.state_id not in taken][:num]


def fresh_graphs(
    plans: Sequence[StatePlan],
    prices: Sequence[float],
    folder: Path,
    workers: LocalWorkers,
    done: Callable[[str], None],
    candidates: CandidateConfig = TRIED,
) -> list[PackedGraph]:
    """Bring runs to their states; a graph of each, the prices taken in turn.

    Args:
        plans: The states.
        prices: λ.
        folder: One file for some of the states, kept as soon as it is finished.
        workers: Processes.
        done: Told of each file.
        candidates: What is offered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [
        (folder / f"{start:05}.safetensors", list(plans[start : start + _CHUNK]), start)
        for start in range(0, len(plans), _CHUNK)
    ]
    todo = [chunk for chunk in chunks if not chunk[0].is_file()]
    for path, _, _ in chunks:
        if path.is_file():
            done(path.stem)
    size = max(1, workers.num_workers)
    work = partial(_reach_some, prices=tuple(prices), candidates=candidates)
    for start in range(0, len(todo), size):
        for name in workers.map(work, todo[start : start + size]):
            done(name)
    return [graph for path, _, _ in chunks for graph in unpack_many(checkpoint.load(path))]


def _reach_some(
    task: tuple[Path, list[StatePlan], int], prices: tuple[float, ...], candidates: CandidateConfig
) -> str:
    path, plans, first = task
    builder, graphs = ModelGraphBuilder(), []
    for number, plan in enumerate(plans, start=first):
        _, point = reach(plan, candidates=candidates)
        if point is None or all(candidate.unavailable for candidate in point.candidates[1:]):
            continue
        run = msgspec.structs.replace(point.run, price=prices[number % len(prices)])
        point = msgspec.structs.replace(point, run=run)
        graphs.append(PackedGraph.pack(builder.build(point).graph_data))
    checkpoint.save(path, pack_many(graphs))
    return path.stem
