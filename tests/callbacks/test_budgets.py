"""Budgets hold whatever is asked for, and every answer stands in the journal with its reason."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as L
import pytest
from runs import QUICK, Every, Script, decisions, fit, growing, mlp, trainer

from esper.callbacks import TamiyoCallback
from esper.hosts import DigitsData

WIDE = "bypass:host.layers.0->host.layers.1"
NEXT = "bypass:host.layers.1->host.layers.2"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"
HELD = QUICK | {"min_holding_steps": 500}
"""Seeds stay on their way to the end."""


def refusals(folder: Path) -> list[str]:
    return [r.refused for r in decisions(folder) if r.refused]


def ask(callback: TamiyoCallback, *sites: tuple[str, str, int]) -> None:
    for site in sites:
        callback.germinate(*site)


def test_parameters_never_exceed_the_budget_whatever_is_asked_for(tmp_path):
    callback = growing(tmp_path, budget={"max_parameters_ratio": 1.3, "site_cooldown_steps": 0})
    ratio: list[float] = []

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        ratio.append(callback.body.num_parameters / callback._controller.ledger.host_parameters)

    acts = {
        step: lambda *_: ask(callback, (WIDE, "widen", 3), (RANK, "lowrank", 2)) for step in range(5, 30, 3)
    }
    fit(trainer(tmp_path, callback, Script(acts), Every(look)), mlp())
    assert 1.2 < max(ratio) <= 1.3
    assert any("parameters are more than the" in reason for reason in refusals(tmp_path))


def test_every_other_limit_refuses_with_its_reason(tmp_path):
    callback = growing(
        tmp_path,
        lifecycle=HELD,
        budget={
            "max_parameters_ratio": 20.0,
            "max_seeds_alive": 3,
            "max_germinations_per_epoch": 2,
            "site_cooldown_steps": 9,
        },
    )
    acts = {
        2: lambda *_: ask(callback, (WIDE, "widen", 3)),
        4: lambda *_: ask(callback, (WIDE, "widen", 3)),
        6: lambda *_: callback.cull("s1"),
        7: lambda *_: ask(callback, (WIDE, "widen", 3)),
        8: lambda *_: ask(callback, (NEXT, "widen", 2), (RANK, "lowrank", 1)),
        18: lambda *_: ask(callback, (RANK, "lowrank", 1), (NEXT, "widen", 2), (LONG, "shortcut", 2)),
        35: lambda *_: ask(callback, ("parallel:host.head", "lowrank", 1)),
        36: lambda *_: ask(callback, ("nowhere", "widen", 1), (LONG, "stack", 1), (LONG, "no such thing", 1)),
        37: lambda *_: callback.cull("s77"),
        38: lambda *_: callback.recycle("host.nowhere"),
    }
    most: list[int] = []
    fit(
        trainer(
            tmp_path,
            callback,
            Script(acts),
            Every(lambda *_: most.append(len(callback.body.seeds))),
            epochs=3,
        ),
        mlp(),
    )
    reasons = refusals(tmp_path)
    expected = (
        f"site {WIDE} is cooling down until step",
        f"site {WIDE} is under embargo until step",
        "epoch 0 has had its 2 germinations",
        f"site {NEXT} holds a seed that is still on its way",
        "3 seeds are alive, as many as max_seeds_alive allows",
        "no site 'nowhere' in this model",
        "stack",
        "no such thing",
        "there is no seed 's77'",
        "there is no layer 'host.nowhere'",
    )
    for wanted in expected:
        assert any(wanted in reason for reason in reasons), (wanted, reasons)
    assert len(reasons) == len(expected)
    assert max(most) == 3
    for record in decisions(tmp_path):
        assert not (record.applied and record.refused)


def test_a_site_with_a_seed_on_its_way_takes_no_other(tmp_path):
    callback = growing(tmp_path, lifecycle=HELD)
    acts = {2: lambda *_: ask(callback, (WIDE, "widen", 3)), 5: lambda *_: ask(callback, (WIDE, "widen", 3))}
    fit(trainer(tmp_path, callback, Script(acts), epochs=1), mlp())
    assert refusals(tmp_path) == [f"site {WIDE} holds a seed that is still on its way"]


def test_a_flops_budget_refuses_seeds_and_counts_everything(tmp_path):
    callback = growing(tmp_path, budget={"max_parameters_ratio": 20.0, "max_flops_ratio": 0.2})
    acts = {
        4: lambda *_: ask(callback, (WIDE, "widen", 40)),
        5: lambda *_: ask(callback, (WIDE, "widen", 2)),
    }
    fit(trainer(tmp_path, callback, Script(acts)), mlp())
    assert [r.applied for r in decisions(tmp_path, "germinate")] == [False, True]
    assert "training FLOPs are more than the budget leaves" in refusals(tmp_path)[0]
    summary = callback.summary()
    host = 2 * (64 * 16 + 16 * 4 + 4 * 12 + 12 * 10)
    samples = 2 * 1078
    assert summary["num_samples"] == samples
    assert callback._controller.ledger.host_training_flops == 3 * host * samples
    seed = 3 * 2 * (64 * 2 + 2 * 4) * (samples - 6 * 64)
    assert summary["training_flops"] == 3 * host * samples + seed + summary["measuring_flops"]
    assert summary["scoring_flops"] == 0
    assert summary["measuring_flops"] > 0


@pytest.mark.parametrize("fraction", [0.03, 0.3])
def test_scoring_sites_stays_within_its_share_of_the_run(fraction, tmp_path):
    callback = growing(
        tmp_path,
        policy="expressivity",
        policy_options={"num_events": 3, "start": 0.0, "end": 0.6},
        probes={"decision_interval": 0.05, "max_samples": 64, "held_out_batches": 1},
        budget={"max_parameters_ratio": 20.0, "max_scoring_fraction": fraction},
    )
    fit(trainer(tmp_path, callback, epochs=6), mlp(hidden=(8, 8, 8)), DigitsData(eval_batch_size=64))
    summary = callback.summary()
    assert 0 < summary["scoring_flops"] <= fraction * summary["training_flops"]


def test_every_decision_point_is_written_down_with_its_numbers(tmp_path):
    callback = growing(
        tmp_path, policy="random", policy_options={"num_events": 2, "min_size": 2},
        probes={"decision_interval": 0.1},
    )  # fmt: skip
    fit(trainer(tmp_path, callback), mlp())
    records = decisions(tmp_path)
    assert len(records) >= 10
    assert {"wait", "germinate"} == {r.decision.action for r in records}
    for record in records:
        assert record.decision.reason
        assert record.decision.policy == "random"
        assert {"fraction", "parameters_left", "train_loss"} <= record.decision.numbers.keys()
        assert math.isfinite(record.decision.numbers["train_loss"])
        assert record.num_parameters > 0
    grown = [r for r in records if r.decision.action == "germinate"]
    assert all(r.applied and r.seed_id for r in grown)
    assert grown[-1].num_parameters == callback.body.num_parameters


def test_the_mean_training_loss_does_not_depend_on_accumulation(tmp_path):
    losses = []
    for name, accumulate in (("one", 1), ("four", 4)):
        callback = growing(tmp_path / name, probes={"decision_interval": 1.0})
        runner = trainer(
            tmp_path, callback, accumulate_grad_batches=accumulate, limit_train_batches=8, epochs=1
        )
        fit(runner, mlp(lr=1e-9, schedule="constant"))
        losses.append(decisions(tmp_path / name)[0].decision.numbers["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
