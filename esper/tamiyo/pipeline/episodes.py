"""Whole runs played by a chooser, kept as soon as they are finished, and compared host by host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from esper.atomic import replacing
from esper.errors import DataFormatError
from esper.report.statistics import Estimate, bootstrap_mean
from esper.tamiyo.environment.assignments import AssignmentConfig, numbered_assignments
from esper.tamiyo.environment.choosers import MakeChooser
from esper.tamiyo.environment.families import sample_host
from esper.tamiyo.environment.game import Assignment
from esper.tamiyo.environment.rollout import Rollouts
from esper.tamiyo.environment.specs import Split, derived_seed

__all__ = ["EpisodeResult", "hosts_to_play", "paired", "play_all"]


class EpisodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one run ended.

    Attributes:
        host: Name of the run.
        price: λ.
        utility: U against the run without growth, in nats.
        actions: Decisions other than WAIT.
    """

    host: str
    price: float
    utility: float
    actions: int


def hosts_to_play(families: Sequence[str], split: Split, num: int, seed: int) -> list[Assignment]:
    """Runs of different hosts, the families in turn, each at a price and a budget drawn for it."""
    drawn = numbered_assignments(
        AssignmentConfig(families=tuple(families), split=split), derived_seed("judged", seed, split), num
    )
    specs = [sample_host(families[i % len(families)], split, i // len(families)) for i in range(num)]
    return [msgspec.structs.replace(d, spec=spec) for d, spec in zip(drawn, specs, strict=True)]


def play_all(
    assignments: Sequence[Assignment],
    make: MakeChooser,
    path: Path,
    rollouts: Rollouts,
    done: Callable[[str], None],
) -> list[EpisodeResult]:
    """Play every assignment once; those that ``path`` holds are not played again.

    Args:
        assignments: The runs.
        make: Makes who decides.
        path: JSON file of finished runs.
        rollouts: Processes.
        done: Told of each run.

    Raises:
        DataFormatError: The file is damaged.
    """
    finished = _read(path)[: len(assignments)]
    for result in finished:
        done(result.host)
    size = max(1, 4 * rollouts.num_workers)
    while len(finished) < len(assignments):
        part = assignments[len(finished) : len(finished) + size]
        for played in rollouts.play(part, make):
            actions = sum(step.action != 0 for step in played.trajectory.steps)
            name, price = played.assignment.spec.name, played.assignment.price
            finished.append(EpisodeResult(host=name, price=price, utility=played.utility, actions=actions))
            done(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(msgspec.json.encode(finished))
    return finished


def paired(ours: Sequence[EpisodeResult], others: Sequence[EpisodeResult]) -> Estimate:
    """Mean difference of utilities over runs, with an interval; positive is better for ``ours``."""
    assert [r.host for r in ours] == [r.host for r in others]
    return bootstrap_mean([a.utility - b.utility for a, b in zip(ours, others, strict=True)])


def _read(path: Path) -> list[EpisodeResult]:
    if not path.is_file():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[EpisodeResult])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise DataFormatError(f"{path} holds no finished episodes: {error}; delete it") from error
