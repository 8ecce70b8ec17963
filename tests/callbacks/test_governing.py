"""The governor through the callback: what explodes is undone, and the run ends as well as without it."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from runs import (
    QUICK,
    Every,
    Script,
    assert_registered,
    decisions,
    fit,
    growing,
    interventions,
    mlp,
    trainer,
    transitions,
)

from esper.kasmina.structure import all_seeds

WIDE = "bypass:host.layers.0->host.layers.1"
STRICT = {"check_interval_steps": 3, "min_checks": 3, "patience": 2, "embargo_steps": 30}
EPOCHS = 12


def explode(trainer: L.Trainer, module: L.LightningModule) -> None:
    with torch.no_grad():
        for seed in all_seeds(module):
            for p in seed.branch.parameters():
                p.mul_(1e10)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Validation loss of the host alone."""
    runner = trainer(tmp_path_factory.mktemp("control"), epochs=EPOCHS)
    fit(runner, mlp(hidden=(16, 8)))
    return float(runner.callback_metrics["val_loss"])


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("fossilized", [False, True])
def test_a_run_whose_seed_explodes_ends_as_well_as_the_control(fossilized, clip, control, tmp_path):
    lifecycle = QUICK if fossilized else QUICK | {"min_holding_steps": 500}
    callback = growing(tmp_path, (0.05, WIDE, "widen", 8), lifecycle=lifecycle, governor=STRICT)
    stages: list[str] = []

    def ruin(runner: L.Trainer, module: L.LightningModule) -> None:
        stages.extend(seed.stage for seed in all_seeds(module))
        explode(runner, module)

    module = mlp(hidden=(16, 8))
    runner = trainer(
        tmp_path,
        callback,
        Script({26: ruin}),
        Every(assert_registered),
        epochs=EPOCHS,
        gradient_clip_val=clip,
    )
    fit(runner, module)
    assert stages == (["fossilized"] if fossilized else ["holding"])
    acts = interventions(tmp_path)
    assert acts
    assert acts[0].step <= 26 + 3 * 3
    assert acts[0].measurements
    if fossilized:
        assert [act.action for act in acts] == ["rollback"]
        assert acts[0].target == WIDE
    assert all_seeds(module) == []
    assert any(t.target == "culled" and t.step >= 26 for t in transitions(tmp_path, "s1"))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert float(runner.callback_metrics["val_loss"]) < 1.25 * control + 0.05
    # Nothing left of it for the optimizer to stumble over.
    for state in runner.optimizers[0].state.values():
        assert float(state["exp_avg_sq"].max()) < 1e6


def test_the_site_of_a_rollback_stays_empty_for_its_embargo(tmp_path):
    callback = growing(tmp_path, (0.1, WIDE, "widen", 8), governor=STRICT)
    ask = {step: lambda *_: callback.germinate(WIDE, "widen", 4) for step in (60, 90)}
    runner = trainer(tmp_path, callback, Script({40: explode, **ask}), epochs=6)
    fit(runner, mlp(hidden=(16, 8)))
    (rollback,) = interventions(tmp_path)
    first, second = (r for r in decisions(tmp_path, "germinate") if r.decision.policy == "manual")
    assert f"under embargo until step {rollback.step + 30}" in first.refused
    assert second.applied
    assert second.seed_id == "s2"


def test_a_ruined_host_without_anything_grown_stops_growth_and_says_so(tmp_path):
    def ruin(runner: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad():
            next(module.parameters()).fill_(float("nan"))

    callback = growing(tmp_path, (0.8, WIDE, "widen", 8), governor=STRICT)
    fit(trainer(tmp_path, callback, Script({10: ruin}), epochs=3), mlp(hidden=(16, 8)))
    (halt,) = interventions(tmp_path)
    assert halt.action == "halt_growth"
    assert "learning rate" in halt.reason
    (refused,) = (r for r in decisions(tmp_path, "germinate") if r.refused)
    assert "the governor has stopped growth" in refused.refused
