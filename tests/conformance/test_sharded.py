"""Growth in two real processes under FSDP2 (gloo): seeds are sharded, trained, saved and taken back like layers.

What the processes do stands in :mod:`sharded_runs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded_runs
import torch
from launching import launch_all
from lightning.pytorch.callbacks import EMAWeightAveraging
from runs import decisions, fit, growing, interventions, mlp, plain_lines, stages, trainer
from torch import Tensor

from esper import load
from esper.callbacks import TamiyoCallback
from esper.callbacks.sharding import check_sharded
from esper.callbacks.strategies import strategy_conflicts
from esper.errors import ConfigError, UnsupportedError
from esper.kasmina.structure import all_seeds
from esper.tamiyo.config import build_config

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(everywhere: Path) -> list[dict[str, Any]]:
    """What the two processes brought back."""
    (group,) = launch_all([(sharded_runs.everything, everywhere, 2)], timeout_s=220)
    for rank, ended in enumerate(group):
        assert not ended.error, f"rank {rank}: {ended.error}"
    return [ended.result for ended in group]


def unlike(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two results differ in a bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [p for key in a.keys() | b.keys() for p in unlike(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if repr(a) == repr(b) else [path]


def test_ranks_are_alike_and_every_parameter_is_divided_between_them(ranks):
    first, second = (of["grown"] for of in ranks)
    assert unlike(first["whole"], second["whole"]) == []
    for name, numel in first["parts"].items():
        assert numel + second["parts"][name] == first["whole"]["weights"][name].numel()
    grown = [name for name in first["parts"] if "esper_seeds" in name]
    assert len(grown) == 7
    assert all(first["parts"][name] and second["parts"][name] for name in grown)


def test_a_seed_grows_and_fossilises(ranks, everywhere):
    assert set(ranks[0]["grown"]["whole"]["stages"]) == {"s1", "s2", "s3"}
    folder = everywhere / "grown" / "whole"
    assert stages(folder, "s1") == ["dormant", "germinated", "holding", "fossilized"]
    assert [d.seed_id for d in decisions(folder, "germinate")] == ["s1", "s2", "s3"]


def test_the_run_is_the_one_under_ddp(ranks, everywhere):
    for of in ranks:
        sharded, ddp = of["grown"]["whole"], of["grown"]["ddp"]
        assert sharded["stages"] == ddp["stages"]
        for name, value in ddp["weights"].items():
            if value.is_floating_point():
                torch.testing.assert_close(sharded["weights"][name], value, rtol=1e-5, atol=1e-6)
        assert sharded["summary"]["num_parameters"] == ddp["summary"]["num_parameters"]


@pytest.mark.parametrize("step", sharded_runs.STEPS)
def test_a_run_resumes_bit_for_bit_also_between_a_birth_and_its_first_step(step, ranks, everywhere):
    folder = everywhere / "grown"
    for of in ranks:
        assert unlike(of["grown"]["whole"], of["grown"][f"from{step}"]) == []
    lines = [line for line in plain_lines(folder / "whole") if line["step"] > step]
    assert [line for line in plain_lines(folder / f"from{step}") if line["step"] > step] == lines


def test_a_checkpoint_loads_into_an_unsharded_module(ranks, everywhere):
    path = max((everywhere / "grown" / "whole").glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    module = load(mlp(), path)
    weights = ranks[0]["grown"]["whole"]["weights"]
    assert unlike(dict(module.state_dict()), weights) == []
    assert {seed.seed_id: seed.stage for seed in all_seeds(module)} == ranks[0]["grown"]["whole"]["stages"]


def test_lightning_may_not_drop_seeds_where_it_tests_a_sharded_module(ranks):
    for of in ranks:
        assert of["grown"]["not_regrown"].startswith("CheckpointError")
        assert "holds seeds s1, s2, s3, but" in of["grown"]["not_regrown"]


def test_a_bad_loss_on_one_rank_culls_on_all(ranks, everywhere):
    (cull,) = interventions(everywhere / "undone")
    assert (cull.action, cull.step) == ("cull", 16)
    assert unlike(ranks[0]["undone"]["end"], ranks[1]["undone"]["end"]) == []
    assert all(value.isfinite().all() for value in ranks[0]["undone"]["end"]["weights"].values())


def test_a_rollback_puts_every_part_back_and_a_culled_seed_too(ranks):
    for of in ranks:
        kept = of["undone"]["kept"]
        assert kept["seeds"] == [kept["seeds"][1] - 1, kept["seeds"][1]]
        assert unlike(kept["before"], kept["after"]) == []


def test_every_blueprint_gets_the_gradients_that_it_gets_unsharded(ranks):
    for of in ranks:
        plain, sharded = of["gradients"]["sites"]
        assert sharded == [name for name in plain if not name.startswith("stack:")]
        assert len(of["gradients"]["worst"]) >= 6
        for name, (preserved, difference) in of["gradients"]["worst"].items():
            assert preserved, name
            assert difference < 1e-4, (name, difference)


def test_a_nan_in_one_processs_part_of_a_gradient_is_dropped_on_all(ranks):
    for of in ranks:
        first, *others = of["edges"]["shielded"]
        assert first == 0
        assert all(others)
        assert of["edges"]["dropped"] == 1


# ---------------------------------------------------------------- what is refused


def test_what_shows_only_once_a_model_is_sharded_is_refused_then(ranks):
    for of in ranks:
        edges = of["edges"]
        assert "works with Adam and AdamW, but the optimizers are SGD" in edges["sgd"]
        assert edges["adam"] == ""
        assert "leave mp_policy out" in edges["mixed"]
        assert "this SeedLinear's lie on none; call fully_shard" in edges["replicated"]
        assert "the weights of 'second' are sharded by FSDP2" in edges["recycled"]


def test_a_module_that_shards_nothing_is_refused():
    with pytest.raises(UnsupportedError, match="but nothing is sharded; call it there"):
        check_sharded(mlp(), [])


def test_manual_optimization_is_refused(tmp_path):
    module = mlp()
    module.automatic_optimization = False
    runner = trainer(tmp_path, strategy=sharded_runs.strategy(), devices=2)
    (conflict,) = strategy_conflicts(runner, module, build_config(policy="schedule", sharded="experimental"))
    assert "manual optimization under FSDP2" in conflict[0]


def test_it_has_to_be_asked_for(tmp_path):
    runner = trainer(tmp_path, growing(tmp_path), strategy=sharded_runs.strategy(), devices=2)
    runner.strategy.connect(mlp())
    with pytest.raises(UnsupportedError, match=r"one device, or TamiyoCallback.*sharded='experimental'"):
        runner.callbacks[0].setup(runner, mlp(), "fit")
    with pytest.raises(ConfigError, match="sharded should be"):
        TamiyoCallback(sharded="yes")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"policy": "expressivity"}, "policy='expressivity' under FSDP2"),
        ({"widen_start": "closed_form"}, "takes gradients outside of the training step"),
        ({"lifecycle": {"mode": "isolated"}}, "lifecycle.mode='isolated' under FSDP2"),
        ({"finish": "retrain"}, "finish='retrain' under FSDP2"),
        ({"birth_lr_multiplier": 0.5}, "leave both at 1"),
        ({"experience": "store.sqlite"}, "experience under FSDP2"),
    ],
)
def test_settings_that_were_not_made_right_are_refused(settings, reason, tmp_path):
    config = build_config(**({"policy": "schedule", "sharded": "experimental"} | settings))
    runner = trainer(tmp_path, strategy=sharded_runs.strategy(), devices=2)
    (conflict,) = strategy_conflicts(runner, mlp(), config)
    assert reason in "; ".join(conflict)


@pytest.mark.parametrize(
    ("strategy", "options", "reason"),
    [
        ({"save_distributed_checkpoint": True}, {}, "save_distributed_checkpoint=False"),
        ({"data_parallel_size": 1, "tensor_parallel_size": 2}, {}, "tensor_parallel_size=1"),
        ({}, {"precision": "bf16-true"}, "precision='bf16-true' under FSDP2"),
        ({}, {"callbacks": [EMAWeightAveraging()]}, "averaged weights under FSDP2"),
    ],
)
def test_trainers_that_were_not_tried_are_refused(strategy, options, reason, tmp_path):
    runner = trainer(tmp_path, strategy=sharded_runs.strategy(**strategy), devices=2, **options)
    (conflict,) = strategy_conflicts(runner, mlp(), build_config(policy="schedule", sharded="experimental"))
    assert reason in "; ".join(conflict)


def test_a_module_that_has_grown_already_is_refused(tmp_path):
    module = mlp()
    fit(trainer(tmp_path, growing(tmp_path, *sharded_runs.EVENTS), max_steps=4), module)
    assert all_seeds(module)
    runner = trainer(tmp_path, strategy=sharded_runs.strategy(), devices=2)
    (conflict,) = strategy_conflicts(runner, module, build_config(policy="schedule", sharded="experimental"))
    assert "a module with seeds under FSDP2" in conflict[0]
