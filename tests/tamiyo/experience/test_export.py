"""A store as a Parquet table, and as what people look at."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
from experience_samples import decision, outcome

from esper.cli import main
from esper.errors import MissingExtraError
from esper.messages import RunRecord
from esper.report.journal import Journal
from esper.report.rewards import find_store, reward_table
from esper.report.table import render_text
from esper.tamiyo.experience import ExperienceStore
from esper.tamiyo.experience.export import export_parquet
from esper.tamiyo.experience.tables import correlation_table, policy_table, reward_correlations
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.rewards import Outcome
from esper.tamiyo.rewards.config import COMPONENTS, HORIZONS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Four runs: better and worse adaptations, waits, and decisions of another policy without outcomes."""
    path = tmp_path / "experiences.sqlite"
    with ExperienceStore(path) as store:
        for run in range(4):
            for step in (1, 5, 9):
                facts = decision(f"run{run}", step, chosen=0 if step == 5 else 1)
                store.add_decision(facts)
                store.add_outcome(facts.decision_id, outcome(facts, gain=0.02 * run - 0.01 * step))
            store.add_decision(decision(f"run{run}", 20, policy="random", version=""))
        store.note_applied("run0:1", seed_ids=["s1"])
        store.note_applied("run0:20", refused="no place")
    return path


def test_the_table_holds_everything(path, tmp_path):
    out = tmp_path / "table.parquet"
    with ExperienceStore(path, readonly=True) as store:
        assert export_parquet(store, out) == 16
        experiences = list(store.iterate())
    table = pq.read_table(out)
    assert table.schema.metadata[b"esper.facts_version"] == b"1"
    rows = table.to_pylist()
    assert [row["number"] for row in rows] == list(range(1, 17))
    row, first = rows[0], experiences[0]
    assert first.outcome is not None
    assert first.outcome.reward is not None
    assert (row["run_id"], row["policy"], row["action"], row["step"]) == ("run0", "tamiyo", "grow", 1)
    assert (row["sites"], row["blueprints"], row["seed_ids"]) == (["bypass:a->b"], ["widen"], ["s1"])
    assert row["logprob"] == first.decision.logprob
    assert (row["provenance"], row["final"]) == ("control", True)
    assert row["reward"] == first.outcome.reward.total
    for horizon in HORIZONS:
        at = first.outcome.reward.horizons[horizon]
        assert {name: row[f"{horizon}_{name}"] for name in COMPONENTS} == at.components
        assert row[f"{horizon}_utility"] == at.utility
    assert msgspec.msgpack.decode(row["point"], type=DecisionPoint) == first.decision.point
    assert msgspec.msgpack.decode(row["measured"], type=Outcome) == first.outcome.measured
    bare = rows[3]
    assert bare["policy"] == "random"
    assert {bare[name] for name in ("reward", "provenance", "final", "measured", "long_total")} == {None}


def test_one_policy_alone_and_an_empty_store(path, tmp_path):
    with ExperienceStore(path, readonly=True) as store:
        assert export_parquet(store, tmp_path / "a.parquet", policy="random") == 4
        assert export_parquet(store, tmp_path / "b.parquet", policy="nobody") == 0
    assert pq.read_table(tmp_path / "b.parquet").num_rows == 0


def test_without_pyarrow_the_extra_is_named(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with ExperienceStore(path) as store, pytest.raises(MissingExtraError, match=r"esper\[learn\]"):
        export_parquet(store, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_table_of_policies_counts_and_averages(path):
    with ExperienceStore(path, readonly=True) as store:
        counts = store.counts()
        text = render_text(policy_table(counts, title="store"), width=100)
    random, tamiyo = counts
    assert (random.policy, random.decisions, random.refused, random.rewarded, random.mean_reward) == (
        "random",
        4,
        1,
        0,
        None,
    )
    assert (tamiyo.policy, tamiyo.runs, tamiyo.decisions, tamiyo.waits, tamiyo.rewarded) == (
        "tamiyo",
        4,
        12,
        4,
        12,
    )
    assert "tamiyo v1" in text
    assert "33.3 %" in text


def test_correlations_are_shown_with_their_intervals(path):
    with ExperienceStore(path, readonly=True) as store:
        found = reward_correlations(store)
    assert {c.count for c in found} == {8}  # waits earn nothing by definition
    text = render_text(correlation_table(found), width=110)
    accuracy = next(line for line in text.splitlines() if "accuracy" in line)
    assert "+1.00 (+1.00 … +1.00)" in accuracy
    assert "8 adaptations of 4 runs" in text


def test_the_command_shows_and_exports(path, tmp_path, capsys):
    assert main(["experiences", "show", str(path), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "16 decisions" in shown
    assert "random" in shown
    assert "innovation" in shown
    out = tmp_path / "out.parquet"
    assert main(["experiences", "export", str(path), str(out)]) == 0
    assert "16 experiences" in capsys.readouterr().out
    assert pq.read_table(out).num_rows == 16


def test_the_command_tells_of_what_is_no_store(tmp_path, capsys):
    assert main(["experiences", "show", str(tmp_path / "nowhere")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "text").write_text("no database\n" * 100)
    assert main(["experiences", "export", str(tmp_path / "text"), str(tmp_path / "out")]) == 2
    assert "expected an experience store" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_run_shows_the_correlations_of_its_store(path, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    start = RunRecord("run0", "start", 0, {"experience": str(path)}, 1.0)
    with Journal(folder / "growth.jsonl") as journal:
        journal.write(start)
    assert main(["report", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "Spearman" in shown
    assert "growth.png" in shown
    path.rename(folder / "experiences.sqlite")  # what was moved into the run's folder is found there
    assert find_store(folder, [start]) == find_store(folder, []) == folder / "experiences.sqlite"


def test_a_run_without_experiences_has_no_such_table(tmp_path):
    assert (
        find_store(tmp_path, [RunRecord("run0", "start", 0, {"experience": str(tmp_path / "gone")}, 1.0)])
        is None
    )
    ExperienceStore(tmp_path / "experiences.sqlite").close()
    assert reward_table(tmp_path / "experiences.sqlite") is None
