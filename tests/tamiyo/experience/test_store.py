"""The store gives back exactly what was written, to several writers at once, and after any of them was killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from experience_samples import GROW, SHUT, decision, outcome, point, topology
from experience_samples import signal as signal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.errors import ConfigError, DataFormatError, DataNotFoundError, StoreError
from esper.tamiyo.experience import DecisionFacts, ExperienceStore
from esper.tamiyo.experience.records import Incident, Observation
from esper.tamiyo.experience.schema import STEPS, check_kind, migrate

SAMPLES = str(Path(__file__).parents[1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deeper" / "experiences.sqlite"


@pytest.fixture
def store(path: Path):
    with ExperienceStore(path) as opened:
        yield opened


def test_a_decision_comes_back_exactly(store):
    facts = decision()
    assert store.add_decision(facts)
    kept = store.get("run:10")
    assert kept.decision == facts
    assert kept.decision.point == point()
    assert kept.decision.point.topology == topology()
    assert (kept.number, kept.seed_ids, kept.refused, kept.outcome) == (1, (), "", None)
    assert store.get("another") is None


numbers = st.floats(allow_nan=False)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    step=st.integers(0, 2**40),
    losses=st.lists(numbers, max_size=5),
    held_out=st.none() | numbers,
    score=st.none() | numbers,
    text=st.text(max_size=20),
    logprob=st.floats(max_value=0, min_value=-1e300),
)
def test_any_facts_come_back_exactly(store, step, losses, held_out, score, text, logprob):
    place = msgspec.structs.replace(GROW.placements[0], score=score, site=text)
    facts = point(step=7, steps=tuple(range(len(losses))), train_losses=tuple(losses), held_out_loss=held_out)
    facts = msgspec.structs.replace(
        facts,
        run=msgspec.structs.replace(facts.run, step=step),
        candidates=(facts.candidates[0], msgspec.structs.replace(GROW, placements=(place,))),
    )
    written = decision(decision_id=f"{len(store)}", point=facts, logprob=logprob)
    store.add_decision(written)
    assert store.get(written.decision_id).decision == written


def test_a_decision_that_is_written_twice_stands_there_once(store):
    assert store.add_decision(decision())
    assert not store.add_decision(decision(chosen=2))
    assert len(store) == 1
    assert store.get("run:10").decision.chosen == 1


def test_several_decisions_are_written_all_or_none(store):
    store.add_decision(decision(step=2))
    assert store.add_decisions([decision(step=i) for i in range(4)]) == 3
    with pytest.raises(ConfigError, match="one of 4 candidates"):
        store.add_decisions([decision("other", 1), decision("other", 2, chosen=9)])
    assert [e.decision.point.run.step for e in store.iterate()] == [2, 0, 1, 3]


def test_what_the_run_made_of_a_decision_is_added(store):
    store.add_decision(decision())
    store.note_applied("run:10", seed_ids=["s1"])
    store.note_applied("run:10", seed_ids=["s2"], refused="site is occupied")
    store.note_applied("run:10", seed_ids=["s2"], refused="site is occupied")
    kept = store.get("run:10")
    assert (kept.seed_ids, kept.refused) == (("s1", "s2"), "site is occupied")


def test_an_outcome_stays_once_it_is_final(store):
    facts = decision()
    store.add_decision(facts)
    early = outcome(facts, over=False, gain=0.3)
    assert not early.final
    assert store.add_outcome("run:10", early)
    assert store.get("run:10").outcome == early
    assert store.add_outcome("run:10", outcome(facts))
    assert not store.add_outcome("run:10", outcome(facts, gain=0.2))
    assert store.get("run:10").outcome == outcome(facts)


def test_queries_choose_by_run_policy_version_and_number(store):
    for i in range(150):
        facts = decision(f"run{i % 2}", i, policy="tamiyo" if i % 3 else "random", version=f"v{i % 2}")
        store.add_decision(facts)
        if i < 10:
            store.add_outcome(facts.decision_id, outcome(facts))

    def steps(**query):
        return [e.decision.point.run.step for e in store.iterate(**query)]

    assert steps() == list(range(150))
    assert steps(run_id="run1") == list(range(1, 150, 2))
    assert steps(policy="random") == list(range(0, 150, 3))
    assert steps(policy="random", version="v0", run_id="run0") == list(range(0, 150, 6))
    assert steps(since=147) == [147, 148, 149]
    assert steps(rewarded=True) == list(range(10))
    assert steps(rewarded=False, since=145) == [145, 146, 147, 148, 149]
    assert store.runs() == ["run0", "run1"]
    first = next(iter(store.iterate()))  # lazily: others may write while it is looked at
    store.add_decision(decision("later"))
    assert first.number == 1
    counts = {(c.policy, c.version): c for c in store.counts()}
    assert counts["random", "v0"].decisions == 25
    assert counts["tamiyo", "v1"].rewarded == 3
    assert counts["tamiyo", "v1"].mean_reward > 0


def test_runs_are_observed_ended_and_taken_back(store):
    for step in (1, 10, 20):
        store.add_decision(decision(step=step))
        facts = {
            "train_loss": float("inf"),
            "held_out_loss": None,
            "num_parameters": 72,
            "training_flops": 1e6,
        }
        store.observe("run", Observation(step=step, timestamp=1.0, **facts))
    store.note_incident("run", Incident(step=20, kind="cull", target="s1"), timestamp=2.0)
    store.add_outcome("run:1", outcome(decision(step=1)))
    store.end_run("run", 20)
    assert [o.step for o in store.observations("run")] == [1, 10, 20]
    assert store.incidents("run") == [Incident(step=20, kind="cull", target="s1")]
    assert store.ended("run") == 20
    assert store.undo_after("run", 10) == 1  # back to the checkpoint of step 10
    assert [o.step for o in store.observations("run")] == [1, 10]
    assert [e.decision.point.run.step for e in store.iterate()] == [1, 10]
    assert store.get("run:1").outcome is None
    assert (store.incidents("run"), store.ended("run")) == ([], None)
    assert store.add_decision(decision(step=20))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (decision(chosen=9), "one of 4 candidates, got 9"),
        (decision(chosen=3), "may not be: cooling"),
        (decision(logprob=0.5), "logarithm of a probability"),
        (decision(logprob=float("-inf")), "logarithm of a probability"),
        (decision(decision_id=""), "decision_id should be a text"),
        (decision(run_id="x" * 300), "run_id should be a text"),
        (decision(confidence=1.5), "confidence"),
        (
            decision(point=msgspec.structs.replace(point(), candidates=(GROW, SHUT))),
            "first candidate should be WAIT",
        ),
        (decision(point=point(step=12, parameters_left=-1)), "parameters_left"),
        (decision(point=point(host_parameters=2**80)), "cannot be stored"),
    ],
)
def test_what_nobody_could_learn_from_is_refused_and_leaves_nothing(store, facts: DecisionFacts, message):
    with pytest.raises(ConfigError, match=message):
        store.add_decision(facts)
    assert (len(store), store.runs()) == (0, [])


def test_outcomes_of_unknown_decisions_are_refused(store):
    with pytest.raises(ConfigError, match="add_decision comes first"):
        store.add_outcome("nobody", outcome(decision()))
    with pytest.raises(ConfigError, match="add_decision comes first"):
        store.note_applied("nobody")


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from experience_samples import decision
from esper.tamiyo.experience import ExperienceStore
store = ExperienceStore(sys.argv[2])
for i in range(int(sys.argv[4])):
    store.add_decision(decision(sys.argv[3], i, chosen=i % 3))
    print(i, flush=True)
"""


def writer(path: Path, run: str, count: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, SAMPLES, str(path), run, str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_write_at_once_to_a_store_that_neither_has_made(path):
    processes = [writer(path, run, 40) for run in ("a", "b")]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    with ExperienceStore(path, readonly=True) as store:
        store.check()
        for run in ("a", "b"):
            assert [e.decision.point.run.step for e in store.iterate(run_id=run)] == list(range(40))


def test_everything_acknowledged_survives_a_kill(path):
    process = writer(path, "killed", 100_000)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(40)]
    os.kill(process.pid, signal.SIGKILL)
    told += [int(line) for line in process.communicate()[0].split()]
    with ExperienceStore(path) as store:
        store.check()
        steps = [e.decision.point.run.step for e in store.iterate()]
        assert steps[: len(told)] == told == list(range(len(told)))
        assert len(steps) - len(told) in (0, 1)  # one may have been written and not told
        assert store.add_decision(decision("next"))


def test_a_child_process_opens_the_store_for_itself(store):
    store.add_decision(decision("parent", 1))
    child = os.fork()
    if child == 0:
        os._exit(0 if store.add_decision(decision("child", 2)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    store.add_decision(decision("parent", 3))
    assert sorted(e.decision.point.run.step for e in store.iterate()) == [1, 2, 3]
    store.check()


def test_another_writer_is_waited_for_and_then_told_of(path):
    with ExperienceStore(path, busy_timeout_s=0.05) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"database is locked.*more than 0.05 s"):
            store.add_decision(decision())
        other.execute("ROLLBACK")
        other.close()
        assert store.add_decision(decision())


def test_a_foreign_or_newer_file_is_refused_and_left_as_it_is(tmp_path):
    foreign, newer, text = tmp_path / "foreign", tmp_path / "newer", tmp_path / "text"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE customers (name TEXT)")
    db.close()
    ExperienceStore(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    text.write_text("not a database at all, but long enough to be looked at\n" * 50)
    for path, message in (
        (foreign, "another program's database .tables customers"),
        (newer, "version 99; a newer esper has written it"),
        (text, "a file that SQLite cannot read"),
    ):
        before = path.read_bytes()
        with pytest.raises(DataFormatError, match=message):
            ExperienceStore(path)
        assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "newer", "text"]


def test_damage_is_told_with_its_place(store, path):
    store.add_decision(decision())
    blob = bytearray(_one(path, "SELECT point FROM decisions")[0])
    blob[len(blob) // 2] ^= 1
    _change(path, "UPDATE decisions SET point = ?", bytes(blob))
    with pytest.raises(DataFormatError, match=r"decision run:10: expected packed .*the store is damaged"):
        store.get("run:10")
    with pytest.raises(DataFormatError, match="damaged"):
        store.check()
    _change(path, "UPDATE decisions SET point = ?", "a text")
    with pytest.raises(DataFormatError, match="expected bytes, got str"):
        list(store.iterate())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE decisions SET chosen = 17", "one of 4 candidates"),
        ("UPDATE decisions SET logprob = 3.0", "logarithm"),
        ("UPDATE decisions SET confidence = 'much'", "confidence"),
        ("UPDATE decisions SET seed_ids = 'x'", "damaged"),
        ("UPDATE decisions SET facts_version = 99", "facts of version 1, got version 99"),
        ("DELETE FROM parts", "part .* is missing"),
    ],
)
def test_rows_that_cannot_be_are_refused(path, change, message):
    with ExperienceStore(path) as store:
        store.add_decision(decision())
    _change(path, change)
    with ExperienceStore(path) as store, pytest.raises(DataFormatError, match=message):
        store.get("run:10")


def test_pages_that_were_overwritten_are_told_of(path):
    with ExperienceStore(path) as store:
        for i in range(20):
            store.add_decision(decision(step=i))
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with ExperienceStore(path) as store, pytest.raises(DataFormatError, match="damaged"):
        store.check()


def test_reading_only_changes_nothing_and_makes_nothing(path):
    with pytest.raises(DataNotFoundError, match="no such file"):
        ExperienceStore(path, readonly=True)
    ExperienceStore(path).close()
    with ExperienceStore(path, readonly=True) as store:
        assert len(store) == 0
        with pytest.raises(StoreError, match="for reading only"):
            store.add_decision(decision())
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        len(store)
    path.write_bytes(b"")
    with pytest.raises(DataFormatError, match="an empty file"):
        ExperienceStore(path, readonly=True)


def test_an_older_file_goes_through_the_steps_it_lacks_or_none(path):
    with ExperienceStore(path) as store:
        store.add_decision(decision())
    db = sqlite3.connect(path, isolation_level=None)
    broken = (*STEPS, "CREATE TABLE added (x);\nINSERT INTO nowhere VALUES (1);")
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        migrate(db, str(path), broken)
    assert check_kind(db, str(path)) == len(STEPS)
    newer = (*STEPS, "CREATE TABLE added (x);\nINSERT INTO added SELECT count(*) FROM decisions;\n")
    migrate(db, str(path), newer)
    assert check_kind(db, str(path), newer) == len(newer)
    assert db.execute("SELECT x FROM added").fetchone() == (1,)
    db.close()
    with pytest.raises(DataFormatError, match="a newer esper"):
        ExperienceStore(path)


def test_durability_is_asked_for(store):
    with store._file.reading() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_what_decision_points_share_is_kept_once(store, path):
    for i in range(20):
        store.add_decision(decision(step=i))
    assert _one(path, "SELECT count(*) FROM parts") == (
        1 + 18,
    )  # a topology, and the signals of steps 1 to 18
    again = [e.decision for e in store.iterate()]
    assert again == [decision(step=i) for i in range(20)]


def test_signals_come_back_in_their_order_whatever_it_is(store):
    signals = (signal_of(3), signal_of(3, "layer1"), signal_of(2), signal_of(3), signal_of(3, seed_id="s1"))
    facts = decision(point=msgspec.structs.replace(point(), signals=signals))
    store.add_decision(facts)
    assert store.get("run:10").decision.point.signals == signals
    bare = decision("bare", point=msgspec.structs.replace(point("bare"), signals=()))
    store.add_decision(bare)
    assert store.get("bare:10").decision == bare


def _one(path: Path, query: str):
    db = sqlite3.connect(path)
    row = db.execute(query).fetchone()
    db.close()
    return row


def _change(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as db:
        db.execute(statement, values)
    db.close()
