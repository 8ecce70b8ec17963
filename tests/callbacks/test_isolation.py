"""A young seed does not move its host, whatever it does; the callback's part of that promise."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from runs import (
    QUICK,
    Every,
    Script,
    assert_registered,
    cnn,
    differing,
    fit,
    growing,
    mlp,
    stages,
    trainer,
    transitions,
    weights,
)

from esper.errors import ConfigError
from esper.hosts import DigitsData
from esper.kasmina.structure import all_seeds

SITES = (
    ("bypass:host.layers.0->host.layers.1", "widen", 6),
    ("bypass:host.layers.0->host.head", "shortcut", 4),
    ("parallel:host.layers.0", "lowrank", 2),
)

CLIPPINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def host_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(module).items() if "esper_seeds" not in name}


def fill(value: float) -> Any:
    def act(trainer: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad():
            for seed in all_seeds(module):
                for p in seed.branch.parameters():
                    p.fill_(value)

    return act


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_isolated_seed_leaves_the_hosts_training_bit_for_bit(clipping, optimizer, tmp_path):
    options = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.1}
    plain, host = mlp(**options), mlp(**options)
    fit(trainer(tmp_path, **CLIPPINGS[clipping]), plain)
    lifecycle = QUICK | {"mode": "isolated", "min_training_steps": 1000, "max_training_steps": 1000}
    callback = growing(tmp_path, *((0.1, *site) for site in SITES), lifecycle=lifecycle)
    runner = trainer(tmp_path, callback, **CLIPPINGS[clipping])
    fit(runner, host)
    assert [seed.stage for seed in all_seeds(host)] == ["training"] * 3
    assert differing(weights(plain), host_weights(host)) == []
    for seed in all_seeds(host):  # they did learn
        assert max(float(p.detach().abs().max()) for p in seed.branch.parameters()) > 0
        assert all(p in runner.optimizers[0].state for p in seed.branch.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", ["training", "blending", "holding"])
def test_a_poisoned_seed_never_reaches_the_host_and_is_culled(stage, value, tmp_path):
    lifecycle = QUICK | {
        "mode": "isolated",
        "min_training_steps": 8,
        "blend_steps": 8,
        "min_holding_steps": 12,
    }
    lifecycle |= {"gate_interval_steps": 4}
    at = {"training": 5, "blending": 14, "holding": 22}[stage]
    callback = growing(tmp_path, (0.0, *SITES[0]), lifecycle=lifecycle)
    seen: list[str] = []

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        assert torch.isfinite(runner.callback_metrics["train_loss"])
        assert all(torch.isfinite(p).all() for p in host_weights(module).values() if p.is_floating_point())
        assert_registered(runner, module)

    def poison(runner: L.Trainer, module: L.LightningModule) -> None:
        seen.extend(seed.stage for seed in all_seeds(module))
        fill(value)(runner, module)

    module = mlp(lr=0.01)
    runner = trainer(tmp_path, callback, Script({at: poison}), Every(look), gradient_clip_val=0.5, epochs=3)
    fit(runner, module)
    assert seen == [stage]
    assert all_seeds(module) == []
    cull = next(t for t in transitions(tmp_path, "s1") if t.target == "culled")
    assert at < cull.step <= at + 4
    assert "not finite" in cull.reason
    assert cull.measurements["non_finite"] >= 1
    assert stages(tmp_path, "s1")[-3:] == ["culled", "embargoed", "dormant"]


def test_a_seed_poisoned_while_isolated_leaves_the_host_as_if_it_had_never_been(tmp_path):
    plain, host = mlp(lr=0.01), mlp(lr=0.01)
    fit(trainer(tmp_path, gradient_clip_val=0.5), plain)
    callback = growing(
        tmp_path, (0.0, *SITES[0]), lifecycle=QUICK | {"mode": "isolated", "embargo_steps": 99}
    )
    fit(trainer(tmp_path, callback, Script({4: fill(float("nan"))}), gradient_clip_val=0.5), host)
    assert all_seeds(host) == []
    assert differing(weights(plain), weights(host)) == []


@pytest.mark.parametrize("mode", ["isolated", "direct"])
def test_seeds_reach_the_end_through_legal_stages_with_their_measurements(mode, tmp_path):
    callback = growing(tmp_path, *((0.05, *site) for site in SITES), lifecycle=QUICK | {"mode": mode})
    module = mlp(lr=0.01)
    runner = trainer(tmp_path, callback, Every(assert_registered), epochs=3)
    fit(runner, module)
    middle = ["training", "blending", "holding"] if mode == "isolated" else ["holding"]
    for seed_id in ("s1", "s2", "s3"):
        assert stages(tmp_path, seed_id) == ["dormant", "germinated", *middle, "fossilized"]
    for t in transitions(tmp_path):
        assert t.reason
        if t.source == "germinated":
            assert t.measurements["preserved_error"] <= 1e-6
            assert t.measurements["registered"] == 1.0
        if t.source == "training":
            assert t.measurements["gradient_norm"] > 0
            assert t.measurements["output_ratio"] > 0
        if t.source == "blending":
            assert t.measurements["alpha"] == 1.0
        if t.source == "holding":
            assert t.measurements["held_out_loss"] > 0
            assert {
                "contribution",
                "contribution_stderr",
                "contribution_fraction",
                "spread",
            } <= t.measurements.keys()
    assert callback.summary()["seeds_fossilized"] == 3
    assert callback.summary()["num_parameters"] == sum(p.numel() for p in module.parameters())


def test_images_with_batch_norm_grow_too(tmp_path):
    callback = growing(
        tmp_path,
        (0.1, "bypass:host.layers.0->host.layers.1", "conv_widen", 4),
        (0.2, "parallel:host.layers.2", "depthwise"),
    )
    module = cnn()
    fit(trainer(tmp_path, callback, Every(assert_registered)), module, DigitsData(images=True))
    assert [seed.blueprint for seed in all_seeds(module)] == ["conv_widen", "depthwise"]


def test_a_schedule_for_another_host_ends_the_run_with_the_names_there_are(tmp_path):
    callback = growing(tmp_path, (0.1, "bypass:fc1->fc2", "widen", 4))
    with pytest.raises(ConfigError, match=r"no site 'bypass:fc1->fc2'.*sites are .*host\.layers"):
        fit(trainer(tmp_path, callback), mlp())
