"""The depth benchmark grows what it says it grows, at equal FLOPs; what it finds out is in experiments/depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.bench import depth
from esper.bench._depth_arms import DepthRun, num_steps, train_depth
from esper.errors import ConfigError, DataNotFoundError


def test_all_arms_spend_the_same_flops() -> None:
    shallow, deep = 1_000, 2_900
    spent = {}
    for arm in ("shallow", "deep", "grown"):
        steps, before = num_steps(DepthRun(arm, 0, 1e-3, deep_steps=500), shallow, deep)  # type: ignore[arg-type]
        early = before if arm == "grown" else (steps if arm == "shallow" else 0)
        spent[arm] = early * shallow + (steps - early) * deep
        if arm == "grown":
            assert early * shallow == pytest.approx(0.2 * spent[arm], rel=0.01)
    assert max(spent.values()) == pytest.approx(min(spent.values()), rel=0.01)


def test_the_grown_arm_ends_with_the_deep_nets_blocks(data_dir: Path) -> None:
    tiny = {"deep_steps": 6, "depths": (1, 3), "batch_size": 2, "context": 16, "split": "val"}
    grown, deep = (train_depth(DepthRun(arm, 0, 1e-3, **tiny)) for arm in ("grown", "deep"))  # type: ignore[arg-type]
    assert grown["blocks"] == deep["blocks"] == 3
    assert grown["parameters"] == deep["parameters"]
    assert grown["steps"] > deep["steps"]
    assert 0 < grown["loss"] < 6


def test_missing_data_are_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    with pytest.raises(DataNotFoundError, match="export ESPER_DATA_DIR"):
        depth.run(quick=True)


def test_depths_must_grow() -> None:
    with pytest.raises(ConfigError, match="two growing depths"):
        depth.run(depths=(4, 2))
