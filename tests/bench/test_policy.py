"""The judgement as a benchmark; its parts are tested in tests/tamiyo/judging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.bench import policy
from esper.errors import CheckpointError, ConfigError
from esper.tamiyo.judging.units import read_journal


def test_quick_runs_two_arms_on_two_hosts_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "judgement.json"
    figures = policy.run(quick=True, num_workers=0, out=str(out))
    assert figures["fresh_hosts"] == 2.0
    assert figures["num_failed"] == figures["num_left"] == 0.0
    assert figures["fresh_none_utility"] == 0.0
    assert (
        figures["fresh_shortcut_low"] <= figures["fresh_shortcut_utility"] <= figures["fresh_shortcut_high"]
    )
    assert figures["fresh_shortcut_flops"] == pytest.approx(1.0, abs=0.05)
    assert {"steps_fresh_shortcut_median", "steps_fresh_shortcut_parameters"} <= set(figures)
    written = json.loads(out.read_text())
    assert len(written["runs"]) == 8
    assert "Fresh hosts of known families, equal FLOPs" in out.with_suffix(".md").read_text()

    journal = out.with_suffix(".jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # killed while it wrote
    assert len(read_journal(journal)) == 3
    capsys.readouterr()
    again = policy.run(quick=True, num_workers=0, out=str(out))
    assert "3 of 4 units are in" in capsys.readouterr().err
    assert {k: v for k, v in again.items() if not k.endswith("_time")} == {
        k: v for k, v in figures.items() if not k.endswith("_time")
    }


def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no policy network at"):
        policy.run(weights=str(tmp_path / "none.safetensors"), families=("digits_mlp",))
    with pytest.raises(ConfigError, match="no arm moon"):
        policy.run(weights="", families=("digits_mlp",), arms=("moon",))
    with pytest.raises(ConfigError, match="should not hold price"):
        policy.run(weights="", families=("digits_mlp",), policy_options={"price": 0.1})
    with pytest.raises(ConfigError, match="unexpected keyword argument 'moon'"):
        policy.run(weights="", families=("digits_mlp",), policy_options={"moon": 1})
    with pytest.raises(ConfigError, match="a folder that exists"):
        policy.run(out=str(tmp_path / "no" / "judgement.json"))
    with pytest.raises(ConfigError, match="should not be negative"):
        policy.run(minutes=-1.0)
