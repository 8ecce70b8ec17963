"""The supervised stage: value models of the table, their student, a baseline, thresholds, and the learning curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esper.tamiyo.environment.workers import LocalWorkers
from esper.tamiyo.learning.boosting import BoostedValues
from esper.tamiyo.learning.config import SupervisedConfig
from esper.tamiyo.learning.packed import PackedGraph
from esper.tamiyo.learning.rows import ValueRow
from esper.tamiyo.learning.supervised import predict
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.pipeline.config import LearnConfig
from esper.tamiyo.pipeline.dataset import Case, Dataset, spread
from esper.tamiyo.pipeline.deciding import greedy, readings
from esper.tamiyo.pipeline.fits import Fit, Fitted, fit_all
from esper.tamiyo.pipeline.gate import Gate, Read, calibrate
from esper.tamiyo.pipeline.judging import utility

__all__ = ["CurvePoint", "Supervised", "planned_fits", "supervised_stage"]

Predictions = list[NDArray[np.float64]]


@dataclass(frozen=True)
class CurvePoint:
    """A network that has seen the first states of the table.

    Attributes:
        num_states: How many.
        fit: Of the network.
    """

    num_states: int
    fit: Fitted


@dataclass(frozen=True)
class Supervised:
    """What the stage leaves behind.

    Attributes:
        network: The value model that goes on, with thresholds and knowledge of its training states.
        name: Of its fit.
        gate: Its thresholds.
        members: All value models of the table.
        students: Fitted to what the members say.
        ensemble: Mean prediction of the members on validation states.
        boosting: The baseline.
        curve: By number of states.
        validation: Mean utility on validation states, without thresholds, by name: every fit, ``ensemble``,
            ``boosting``.
    """

    network: TamiyoNetwork
    name: str
    gate: Gate
    members: Sequence[Fitted]
    students: Sequence[Fitted]
    boosting: BoostedValues
    curve: Sequence[CurvePoint]
    validation: dict[str, float]


def supervised_stage(
    config: LearnConfig,
    data: Dataset,
    fresh: Sequence[PackedGraph],
    workers: LocalWorkers,
    folder: Path,
    done: Callable[[str], None],
) -> Supervised:
    """Fit everything and choose on validation states.

    Args:
        config: Of the learning.
        data: The table.
        fresh: Decision points of further training hosts.
        workers: Processes.
        folder: For finished fits.
        done: Told of each.
    """
    members, curve, transfer = _fits(config, data)
    fitted = fit_all(_distinct([*members, *(f for _, f in curve), *transfer.values()]), folder, workers, done)
    teachers = [fitted[f.name] for f in members]
    settings = members[0].config
    teach = _students(config, data, fresh, teachers, settings)
    students = list(fit_all(teach, folder, workers, done).values())
    boosting = BoostedValues(max_iterations=config.effort.max_trees, seed=config.seed)
    boosting.fit(data.rows("train"), data.rows("validation"))

    rows = data.rows("validation")
    predicted = {f.name: predict(f.network(), rows, settings.temperature) for f in [*teachers, *students]}
    predicted["ensemble"] = _mean([predicted[f.name] for f in teachers])
    predicted["boosting"] = boosting.predict(rows)
    worth = {
        name: utility(data.validation, greedy(values, data.validation)) for name, values in predicted.items()
    }
    best = max([*students, *teachers], key=lambda f: worth[f.name])
    network = best.network()
    _remember(network, data.train, data.validation, config.known_share)
    unknown = [
        _read_unknown(fitted[f.name], family, data, config.known_share) for family, f in transfer.items()
    ]
    gate = calibrate(network.config, Read(data.validation, readings(network, data.validation)), unknown)
    network.config = gate.config(network.config)
    return Supervised(
        network=network,
        name=best.name,
        gate=gate,
        members=teachers,
        students=students,
        boosting=boosting,
        curve=[CurvePoint(num, fitted[f.name]) for num, f in curve],
        validation=worth,
    )


def network_config(hidden: int) -> PolicyConfig:
    """Sizes of a network of some width, with the dropout that was best for a table of this size."""
    return PolicyConfig(hidden_dim=hidden, feature_dropout=0.3, head_dropout=0.3)


def planned_fits(config: LearnConfig, data: Dataset) -> int:
    """How many networks will be fitted."""
    members, curve, transfer = _fits(config, data)
    students = min(2, config.effort.num_seeds) if len(members) > 1 else 0
    return len(_distinct([*members, *(f for _, f in curve), *transfer.values()])) + students


def _distinct(fits: Sequence[Fit]) -> list[Fit]:
    return list({f.name: f for f in fits}.values())


def _fits(config: LearnConfig, data: Dataset) -> tuple[list[Fit], list[tuple[int, Fit]], dict[str, Fit]]:
    """Members, points of the learning curve, and one fit without each family."""
    effort = config.effort
    train, validation = data.rows("train"), data.rows("validation")

    def fit(name: str, hidden: int, seed: int, own: Sequence[ValueRow], stop: Sequence[ValueRow]) -> Fit:
        settings = SupervisedConfig(
            batch_size=effort.batch_size,
            max_epochs=effort.max_epochs,
            weight_decay=1e-2,
            keep="last",
            seed=1000 * config.seed + seed,
        )
        return Fit(name, network_config(hidden), settings, own, stop)

    members = [
        fit(f"member-{hidden}-{seed}", hidden, seed, train, validation)
        for hidden in effort.hidden_sizes
        for seed in range(effort.num_seeds)
    ]
    first = effort.hidden_sizes[0]
    order = spread(data.train)
    curve = []
    for num in _sizes(len(order), effort.curve_points):
        own = set(order[:num])
        if num == len(order):
            curve.append((num, members[0]))
            continue
        rows = [case.row for case in data.train if case.record.state_id in own]
        curve.append((num, fit(f"curve-{num}", first, 500, rows, validation)))
    transfer = {}
    for family in sorted({case.record.family for case in data.train}) if effort.transfer else []:
        own_rows, stop = (
            [c.row for c in cases if c.record.family != family] for cases in (data.train, data.validation)
        )
        if own_rows and stop:
            transfer[family] = fit(f"without-{family}", first, 600, own_rows, stop)
    return members, curve, transfer


def _sizes(most: int, points: int) -> list[int]:
    """Numbers of states up to ``most``, each about twice the one before."""
    return sorted({max(2, math.ceil(most / 2**k)) for k in range(points)} & set(range(1, most + 1)) | {most})


def _students(
    config: LearnConfig,
    data: Dataset,
    fresh: Sequence[PackedGraph],
    teachers: Sequence[Fitted],
    settings: SupervisedConfig,
) -> list[Fit]:
    """Fits of what the teachers say together, on the table's training states and on fresh ones.

    The mean of several networks is better than each (Lakshminarayanan et al. 2017), and one network can learn to
    say it (Hinton et al. 2015), of states where nothing was tried too. What was measured of harm and urgency stays.
    """
    if len(teachers) < 2:
        return []
    rows = data.rows("train") + [_unmeasured(graph) for graph in fresh]
    each = [predict(teacher.network(), rows, settings.temperature) for teacher in teachers]
    lessons = []
    for i, row in enumerate(rows):
        said = np.stack([values[i] for values in each])
        known = np.where(row.tried | (~np.isnan(said[0]) & row.graph.mask), 1.0, np.nan)
        lessons.append(replace(row, utility=said.mean(0) * known, stderr=said.std(0) / math.sqrt(len(said))))
    hidden = config.effort.hidden_sizes[-1]
    return [
        Fit(
            f"student-{hidden}-{seed}",
            network_config(hidden),
            replace(settings, seed=1000 * config.seed + 700 + seed),
            lessons,
            data.rows("validation"),
        )
        for seed in range(min(2, config.effort.num_seeds))
    ]


def _unmeasured(graph: PackedGraph) -> ValueRow:
    utility = np.full(graph.num_candidates, np.nan)
    utility[0] = 0.0
    return ValueRow(graph, utility)


def _mean(predictions: Sequence[Predictions]) -> Predictions:
    return [np.mean(values, axis=0) for values in zip(*predictions, strict=True)]


def _remember(
    network: TamiyoNetwork, train: Sequence[Case], validation: Sequence[Case], known_share: float
) -> None:
    known, stop = ([case.state.graph_data for case in cases] for cases in (train, validation))
    network.novelty.fit(known, stop, known_share=known_share)


def _read_unknown(fitted: Fitted, family: str, data: Dataset, known_share: float) -> Read:
    """What a network says of the family that it was trained without."""
    network = fitted.network()
    train, validation = (
        [c for c in cases if c.record.family != family] for cases in (data.train, data.validation)
    )
    _remember(network, train, validation, known_share)
    own = [case for case in (*data.train, *data.validation) if case.record.family == family]
    return Read(own, readings(network, own))
