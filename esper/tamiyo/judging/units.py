"""One arm on one match, in a worker process: both views of it, measured, and written down at once."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from esper.errors import DataFormatError
from esper.tamiyo.environment.arms import run_from_scratch
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.shapes import count_parameters
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.judging.arms import Arm, Learned, Played, host_flops, play
from esper.tamiyo.judging.equal_flops import fit_steps
from esper.tamiyo.judging.matches import Match
from esper.tamiyo.judging.trial import VIEWS, Trial, View

__all__ = ["SCRATCH", "Unit", "read_journal", "work"]

SCRATCH = "scratch"
"""Arm that trains the shape which the learned policy arrived at from the first step."""


@dataclass(frozen=True)
class Unit:
    """Work for one process.

    Attributes:
        name: Of the arm.
        arm: Who trains.
        match: What.
        journal: File that the trials are added to; empty for none.
        deadline: Of :func:`time.time`; a unit that has not begun by then is left for another time.
    """

    name: str
    arm: Arm
    match: Match
    journal: str = ""
    deadline: float = math.inf

    @property
    def key(self) -> str:
        """Digest of all that the trials depend on, beside the code."""
        content = msgspec.msgpack.encode((self.name, self.arm, self.match), order="deterministic")
        return hashlib.blake2b(content, digest_size=12).hexdigest()


class _Entry(msgspec.Struct, frozen=True):
    key: str
    trials: list[Trial]


def work(unit: Unit) -> list[Trial] | None:
    """Train, at equal steps and at equal FLOPs; None where the deadline has passed.

    A run that raises an error becomes a failed trial, with the reason.
    """
    if time.time() >= unit.deadline:
        return None
    try:
        trials = _trials(unit)
    except Exception as error:  # one failed run must not cost the others; the figures count it
        names = [unit.name, SCRATCH] if _has_scratch(unit.arm) else [unit.name]
        trials = [_failed(unit.match, name, view, error) for name in names for view in VIEWS]
    if unit.journal:
        _add(Path(unit.journal), _Entry(unit.key, trials))
    return trials


def read_journal(path: Path) -> dict[str, list[Trial]]:
    """Key of a unit -> its trials; a last line that a kill cut short is removed.

    Raises:
        DataFormatError: A line is no entry of a journal.
    """
    if not path.is_file():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
        path.write_bytes(b"".join(lines))
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = msgspec.json.decode(line, type=_Entry)
        except msgspec.DecodeError as error:
            raise DataFormatError(
                f"{path}, line {number}: expected the trials of one unit, got {line[:60]!r} ({error}); "
                "delete the file to play everything again"
            ) from error
        found[entry.key] = entry.trials
    return found


def _add(path: Path, entry: _Entry) -> None:
    """One write to a file that is open for appending: workers do not write into each other's lines."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, msgspec.json.encode(entry) + b"\n")
    finally:
        os.close(handle)


def _has_scratch(arm: Arm) -> bool:
    return isinstance(arm, Learned) and arm.scratch


def _trials(unit: Unit) -> list[Trial]:
    match, spec = unit.match, unit.match.spec
    planned = 3.0 * host_flops(match) * spec.batch_size * spec.total_steps
    first = _timed(partial(play, unit.arm, match, spec))
    trials = [_trial(match, unit.name, "steps", spec.total_steps, planned, first)]
    if _has_scratch(unit.arm):
        trials.append(_from_scratch(match, "steps", first, planned))
    try:
        steps, fitted = fit_steps(
            lambda steps: _timed(partial(play, unit.arm, match, spec.shortened(steps))),
            lambda timed: timed.played.flops / planned,
            first,
            spec.total_steps,
        )
    except Exception as error:  # the run at equal steps is sound all the same
        names = [unit.name, SCRATCH] if _has_scratch(unit.arm) else [unit.name]
        return [*trials, *(_failed(match, name, "flops", error) for name in names)]
    trials.append(_trial(match, unit.name, "flops", steps, planned, fitted))
    if _has_scratch(unit.arm):
        trials.append(_from_scratch(match, "flops", fitted, planned))
    return trials


@dataclass(frozen=True)
class _Timed:
    played: Played
    seconds: float


def _timed(run: Callable[[], Played]) -> _Timed:
    """Processor time: two runs of one process in a row cannot disturb each other's, other processes hardly do."""
    started = time.process_time()
    played = run()
    return _Timed(played, time.process_time() - started)


def _from_scratch(match: Match, view: View, grown: _Timed, planned: float) -> Trial:
    """The grown shape with fresh weights, for as many steps as the host, or as its FLOPs allow."""
    episode = grown.played.episode
    assert episode is not None
    spec = match.spec
    if view == "flops":
        flops_a_step = 3.0 * float(episode.body.flops) * spec.batch_size
        spec = spec.shortened(max(1, round(planned / flops_a_step)))
    try:
        timed = _timed(lambda: _scratch(episode, spec))
    except Exception as error:  # the run that grew the shape is sound all the same
        return _failed(match, SCRATCH, view, error)
    return _trial(match, SCRATCH, view, spec.total_steps, planned, timed)


def _scratch(episode: Episode, spec: HostSpec) -> Played:
    outcome = run_from_scratch(episode, spec)
    return Played(outcome, outcome.training_flops)


def _trial(match: Match, name: str, view: View, steps: int, planned: float, timed: _Timed) -> Trial:
    played, outcome, watched = timed.played, timed.played.outcome, timed.played.watched
    return Trial(
        **_who(match, name, view),
        total_steps=steps,
        flops_ratio=played.flops / planned,
        test_loss=_finite(outcome.test_loss),
        test_accuracy=_finite(outcome.test_accuracy),
        held_out_loss=_finite(outcome.held_out_loss),
        host_parameters=count_parameters(match.spec.architecture, match.spec.task),
        num_parameters=outcome.num_parameters,
        seconds=timed.seconds,
        germinated=outcome.germinated,
        culled=outcome.culled,
        recycled=outcome.recycled,
        rollbacks=outcome.rollbacks,
        asked=watched.asked if watched else 0,
        waited=watched.waited if watched else 0,
        fell_back=watched.fell_back if watched else 0,
    )


def _failed(match: Match, name: str, view: View, error: Exception) -> Trial:
    return Trial(**_who(match, name, view), error=f"{type(error).__name__}: {error}")


def _who(match: Match, name: str, view: View) -> dict[str, Any]:
    spec = match.spec
    return {
        "arm": name,
        "view": view,
        "group": match.group,
        "family": spec.family,
        "host": spec.name,
        "shape": spec.shape,
        "repeat": match.repeat,
        "price": match.price,
        "budget": match.budget,
        "planned_steps": spec.total_steps,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
