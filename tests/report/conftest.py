"""Event lists as the controller writes them, and run folders made with the real writers."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from esper.messages import Decision, DecisionRecord, Event, RunRecord, TransitionRecord
from esper.report.folder import JOURNAL, METRICS, SUMMARY
from esper.report.journal import Journal
from esper.report.summary import ArmSummary, RunSummary, write_summary


def decision(
    step: int, seed_id: str = "", *, applied: bool = True, refused: str = "", **fields
) -> DecisionRecord:
    answer = Decision(**{"action": "germinate", "reason": "", "policy": "expressivity", **fields})
    return DecisionRecord("run", step, step // 45, answer, applied, refused, seed_id, 100, 0.0)


def transition(
    step: int, seed_id: str, source: str, target: str, *, parameters: int = 100, **fields
) -> TransitionRecord:
    given = {"site": "bypass:fc1->fc2", "blueprint": "widen", "reason": "", "measurements": {}, **fields}
    return TransitionRecord(
        "run", step, step // 45, seed_id, given["site"], given["blueprint"], source, target,
        given["reason"], given["measurements"], parameters, 0.0,
    )  # fmt: skip


def life(
    seed_id: str, start: int, length: int, parameters: int, *, culled: bool = False, **fields
) -> list[Event]:
    """All events of one seed, from its decision to its end."""
    after = parameters + 50
    events: list[Event] = [
        decision(start, seed_id, site=fields.get("site", "bypass:fc1->fc2"), size=16,
                 blueprint=fields.get("blueprint", "widen"), numbers={"score": 3.1, "floor": 1.2}),
        transition(start, seed_id, "dormant", "germinated", parameters=after, **fields),
        transition(start + 1, seed_id, "germinated", "training", parameters=after, **fields),
    ]  # fmt: skip
    if culled:
        return [
            *events,
            transition(start + length, seed_id, "training", "culled", parameters=parameters, **fields),
            transition(start + length, seed_id, "culled", "embargoed", parameters=parameters, **fields),
        ]
    return [
        *events,
        transition(start + length, seed_id, "training", "blending", parameters=after, **fields),
        transition(start + 2 * length, seed_id, "blending", "holding", parameters=after, **fields),
        transition(start + 3 * length, seed_id, "holding", "fossilized", parameters=after, **fields),
    ]


def in_order(*lives: list[Event], parameters: int = 100) -> list[Event]:
    """Merge lives by step, and count parameters again as one run would: a seed has 50."""
    merged = []
    for event in sorted((event for events in lives for event in events), key=lambda event: event.step):
        if isinstance(event, TransitionRecord):
            parameters += {"germinated": 50, "culled": -50}.get(event.target, 0)
        merged.append(msgspec.structs.replace(event, num_parameters=parameters))
    return merged


@pytest.fixture
def growth_events() -> list[Event]:
    """A run of 400 steps: one seed kept, one culled, and a decision to wait."""
    start = RunRecord("run", "start", 0, {"num_parameters": 100}, 0.0)
    wait = decision(5, action="wait", reason="no site clears its floor", applied=False)
    kept = life("s1", 40, 30, 100)
    gone = life("s2", 90, 40, 150, culled=True, site="parallel:fc3", blueprint="bottleneck")
    return [start, wait, *in_order(kept, gone)]


def write_metrics(path: Path, steps: int = 400, loss: float = 0.2, accuracy: bool = True) -> None:
    """Write a ``metrics.csv`` in the form of Lightning's CSVLogger: sparse rows, sorted columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["epoch", "step", "train_loss", *(["val_acc"] if accuracy else []), "val_loss"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in range(0, steps, 5):
            value = loss + 2.0 * np.exp(-step / 60)
            writer.writerow({"epoch": step // 40, "step": step, "train_loss": value})
            if step % 40 == 35:
                row = {"epoch": step // 40, "step": step, "val_loss": value + 0.05, "val_acc": 1 - value / 4}
                writer.writerow({key: row[key] for key in columns if key in row})


@pytest.fixture
def make_run(growth_events: list[Event]) -> Callable[..., Path]:
    """Return a function that writes a whole run folder: growth and one control."""

    def make(
        folder: Path, *, seed: int = 0, policy: str = "expressivity", gain: float = 0.05, **fields
    ) -> Path:
        write_metrics(folder / METRICS, loss=0.2)
        write_metrics(folder / "controls/host/metrics.csv", loss=0.5)
        with Journal(folder / JOURNAL) as journal:
            for event in growth_events:
                journal.write(event)
        host = 0.90 + 0.001 * seed
        arms = [
            ArmSummary(
                name="growth", policy=policy, accuracy=host + gain, loss=0.25 - gain, parameters=150,
                initial_parameters=100, training_flops=1.2e9, wall_time_s=12.0, steps=400, germinated=2,
                fossilized=1, culled=1, metrics=METRICS,
            ),
            ArmSummary(
                name="host", accuracy=host, loss=0.52, parameters=100, training_flops=6e8, wall_time_s=8.0,
                steps=400, metrics="controls/host/metrics.csv",
            ),
        ]  # fmt: skip
        given = {"experiment": "digits_mlp", "config_hash": f"hash-{policy}", **fields}
        summary = RunSummary(
            run_id=f"run-{seed}", seed=seed, versions={"esper": "0"}, started=0.0, arms=arms, **given
        )
        write_summary(folder / SUMMARY, summary)
        return folder

    return make
