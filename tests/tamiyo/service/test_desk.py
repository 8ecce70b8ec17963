"""The service without sockets: order, repeats, back-pressure, gates, refusals, and what is on disk when."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from service_points import make_point, make_topology

from esper.errors import ConfigError, DataFormatError
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.service.book import ExperienceBook
from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.deciders import Choice, RuleDecider, make_decider
from esper.tamiyo.service.desk import Desk
from esper.tamiyo.service.protocol import (
    Answer,
    Ask,
    Beat,
    BeatBack,
    Busy,
    Hello,
    Leave,
    Noted,
    Refusal,
    Reply,
    Report,
    Welcome,
    topology_hash,
    write,
)

QUICK: dict[str, Any] = {"cycle_ms": 0.0, "cooldown_s": 0.0, "http_address": ""}


class Clock:
    """Monotonic and wall time that stand still until they are moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ByStep:
    """Chooses the candidate that the point's step names; a step of 99 breaks it."""

    name, version = "by-step", "1"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.choice: int | None = None

    def choose(self, points: Sequence[DecisionPoint]) -> list[Choice]:
        self.batches.append(len(points))
        if any(point.run.step == 99 for point in points):
            raise ZeroDivisionError("step 99")
        chosen = [point.run.step if self.choice is None else self.choice for point in points]
        return [
            Choice(index, f"step {p.run.step}", value=0.25) for index, p in zip(chosen, points, strict=True)
        ]


class Bench:
    """A desk with its clock, and short ways to say things to it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.settings = folder, settings
        self.clock = Clock()
        self.decider = ByStep()
        self.open()

    def open(self) -> None:
        self.book = ExperienceBook(self.folder / "x.db")
        self.desk = Desk(
            ServiceConfig(**(QUICK | self.settings)), self.decider, self.book, service_id="s", clock=self.clock,
            wall=self.clock,
        )  # fmt: skip

    def restart(self) -> None:
        self.book.close()
        self.open()

    def hello(self, run: str = "run") -> Reply | None:
        hello = Hello(run_id=run, topology=topology_hash(make_topology()))
        return self.desk.take(run.encode(), write(hello))

    def ask(self, step: int, run: str = "run", *, sequence: int = -1, request: str = "") -> Reply | None:
        ask = Ask(
            run_id=run,
            request_id=request or f"{run}:{step}",
            sequence=step if sequence < 0 else sequence,
            point=make_point(run, step),
        )
        return self.desk.take(run.encode(), write(ask))

    def answers(self) -> list[tuple[str, int]]:
        return [(r.request_id, r.candidate) for _, r in self.desk.decide() if isinstance(r, Answer)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.book.close()


def refused(reply: Reply | None) -> str:
    assert isinstance(reply, Refusal), reply
    return reply.cause


def test_a_decision_is_on_disk_before_it_is_answered(bench: Bench) -> None:
    assert isinstance(bench.hello(), Welcome)
    assert bench.ask(1) is None
    ((sender, answer),) = bench.desk.decide()
    assert sender == b"run"
    assert isinstance(answer, Answer)
    assert (answer.candidate, answer.reason, answer.value, answer.decider) == (1, "step 1", 0.25, "by-step")
    with ExperienceStore(bench.folder / "x.db", readonly=True) as others:
        (stored,) = others.iterate()
    assert stored.decision.decision_id == "run:1"
    assert stored.decision.point == make_point("run", 1)
    assert (stored.decision.chosen, stored.decision.policy, stored.decision.version) == (1, "by-step", "1")


def test_a_run_is_answered_in_order_and_runs_share_a_pass(bench: Bench) -> None:
    for run in ("a", "b"):
        bench.hello(run)
        for step in (1, 2):
            assert bench.ask(step, run) is None
    assert bench.answers() == [("a:1", 1), ("b:1", 1)]
    assert bench.answers() == [("a:2", 2), ("b:2", 2)]
    assert bench.decider.batches == [2, 2]


def test_a_run_waits_for_its_cycle(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cycle_ms=100.0)
    bench.hello()
    bench.ask(1)
    bench.ask(2)
    assert bench.answers() == [("run:1", 1)]
    assert bench.desk.wait_s() == pytest.approx(0.1)
    bench.clock.now += 0.05
    assert bench.answers() == []
    bench.clock.now += 0.06
    assert bench.desk.wait_s() == 0.0
    assert bench.answers() == [("run:2", 2)]
    bench.book.close()


def test_a_repeated_request_gets_the_stored_answer_also_after_a_restart(bench: Bench) -> None:
    bench.hello()
    bench.ask(1)
    ((_, first),) = bench.desk.decide()
    assert bench.ask(1) == first
    bench.restart()
    assert bench.ask(1) == first  # whether or not the run has said hello again
    assert bench.decider.batches == [1]
    assert len(bench.book.store) == 1
    assert bench.desk.stats.repeats == 1


def test_a_request_that_waits_is_not_queued_twice(bench: Bench) -> None:
    bench.hello()
    assert bench.ask(1) is None
    assert bench.ask(1) is None
    assert bench.answers() == [("run:1", 1)]
    assert bench.answers() == []


def test_a_crash_between_answer_and_experience_is_mended_by_the_repeat(bench: Bench) -> None:
    bench.hello()
    bench.ask(1)
    ((_, first),) = bench.desk.decide()
    bench.book.close()
    with sqlite3.connect(bench.folder / "x.db") as db:
        db.execute("DELETE FROM decisions")
    db.close()
    bench.open()
    assert bench.ask(1) == first
    assert bench.book.store.get("run:1") is not None


def test_an_answer_that_a_power_failure_took_is_put_together_from_its_experience(bench: Bench) -> None:
    bench.hello()
    bench.ask(1)
    ((_, first),) = bench.desk.decide()
    assert isinstance(first, Answer)
    bench.book.close()
    for path in bench.folder.glob("x.db.answers*"):
        path.unlink()
    bench.open()
    again = bench.ask(1)
    assert isinstance(again, Answer)
    assert (again.candidate, again.decider, again.version) == (first.candidate, "by-step", "1")
    assert bench.decider.batches == [1]


def test_a_request_of_another_run_is_not_given_away(bench: Bench) -> None:
    bench.hello("a")
    bench.hello("b")
    bench.ask(1, "a", request="x")
    bench.desk.decide()
    assert refused(bench.ask(1, "b", request="x")) == "invalid"


@pytest.mark.parametrize(("most", "each"), [(3, 9), (9, 3)])
def test_a_full_queue_says_when_to_come_back(tmp_path: Path, most: int, each: int) -> None:
    bench = Bench(tmp_path, max_queue=most, max_queue_per_run=each, retry_after_ms=70)
    bench.hello()
    assert [bench.ask(step) for step in (1, 2, 3)] == [None] * 3
    busy = bench.ask(4)
    assert isinstance(busy, Busy)
    assert (busy.retry_after_ms, busy.waiting, busy.request_id) == (70, 3, "run:4")
    bench.answers()
    assert bench.ask(4) is None
    assert bench.desk.stats.busy == 1
    bench.book.close()


def test_what_cannot_be_decided_is_refused_and_counted(bench: Bench) -> None:
    assert refused(bench.ask(1)) == "unregistered"
    bench.hello()
    assert bench.ask(5) is None
    assert refused(bench.ask(5, request="late")) == "order"
    assert refused(bench.desk.take(b"run", b"noise")) == "malformed"
    stranger = Hello(run_id="run", topology="0" * 64)
    bench.desk.take(b"run", write(stranger))
    assert refused(bench.ask(6)) == "topology"
    bench.hello()
    wrong = Ask(run_id="run", request_id="w", sequence=9, point=make_point("other"))
    assert refused(bench.desk.take(b"run", write(wrong))) == "invalid"
    assert (
        refused(bench.desk.take(b"run", write(Report(run_id="run", request_id="?", applied=True))))
        == "invalid"
    )
    assert bench.desk.stats.refusals == {
        "unregistered": 1, "order": 1, "malformed": 1, "topology": 1, "invalid": 2,
    }  # fmt: skip


def test_a_point_that_breaks_the_decider_spoils_no_other(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    for run, step in (("a", 1), ("b", 99), ("c", 2), ("d", 50)):
        bench.hello(run)
        bench.ask(step, run)
    replies = dict(bench.desk.decide())
    assert isinstance(replies[b"a"], Answer)
    assert isinstance(replies[b"c"], Answer)
    assert "ZeroDivisionError: step 99" in replies[b"b"].reason  # type: ignore[union-attr]
    assert "candidate 50 of" in replies[b"d"].reason  # type: ignore[union-attr]
    assert bench.desk.stats.refusals == {"undecided": 2}
    assert "failed on a point of run b" in caplog.text


def test_a_cooldown_outlives_a_restart_and_ends_with_a_refusal_by_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cooldown_s=30.0)
    bench.hello()
    bench.ask(1)
    assert bench.answers() == [("run:1", 1)]
    bench.restart()
    bench.hello()
    bench.ask(2)
    ((_, gated),) = bench.desk.decide()
    assert isinstance(gated, Answer)
    assert (gated.candidate, gated.preferred, gated.gate) == (0, 2, "cooldown")
    assert "less than 30 s" in gated.reason
    report = Report(run_id="run", request_id="run:1", applied=False, refused="no room")
    assert isinstance(bench.desk.take(b"run", write(report)), Noted)
    bench.ask(3)
    assert bench.answers() == [("run:3", 3)]
    stored = bench.book.store.get("run:1")
    assert stored is not None
    assert stored.refused == "no room"
    assert bench.desk.stats.gated == {"cooldown": 1}
    bench.restart()
    bench.hello()
    assert list(bench.desk.runs.get("run").cadence.adapted_at) == ["run:3"]  # type: ignore[union-attr]
    bench.book.close()


def test_what_cannot_be_stored_is_not_decided(bench: Bench) -> None:
    bench.hello()
    bench.ask(1)
    bench.book.store.close()
    ((_, reply),) = bench.desk.decide()
    assert refused(reply) == "unstored"
    assert not bench.desk.store_works
    bench.restart()
    bench.hello()
    assert isinstance(bench.ask(1), Answer)  # it had been answered, and now its experience is there too
    assert len(bench.book.store) == 1


def test_what_came_of_a_run_is_written_when_it_leaves(bench: Bench) -> None:
    bench.hello()
    losses = [2.0 / (1 + 0.1 * i) for i in range(20)]
    for i, loss in enumerate(losses):
        step = 5 * (i + 1)
        point = make_point("run", step, losses=losses[: i + 1])
        run = msgspec.structs.replace(point.run, held_out_loss=loss)
        ask = Ask(
            run_id="run",
            request_id=f"run:{step}",
            sequence=step,
            point=msgspec.structs.replace(point, run=run, timestamp=float(step)),
            training_flops=1e3 * step,
        )
        bench.decider.choice = 1 if i == 10 else 0
        assert bench.desk.take(b"run", write(ask)) is None
        bench.desk.decide()
    report = Report(run_id="run", request_id="run:55", applied=True, step=55, seed_ids=("s1",))
    for _ in range(2):
        assert isinstance(bench.desk.take(b"run", write(report)), Noted)
    bench.desk.take(b"run", write(Leave(run_id="run")))
    bench.restart()  # closing waits for the outcomes
    store = bench.book.store
    assert store.ended("run") == 100
    assert [o.training_flops for o in store.observations("run")][:2] == [5e3, 1e4]
    assert [(i.step, i.target) for i in store.incidents("run")] == [(55, "s1")]
    grown = store.get("run:55")
    assert grown is not None
    assert grown.outcome is not None
    assert grown.outcome.reward is not None
    assert grown.outcome.reward.provenance.startswith("fitted")
    assert grown.outcome.final


def test_silent_runs_are_forgotten_and_heartbeats_say_so(bench: Bench) -> None:
    def beat(number: int) -> BeatBack:
        reply = bench.desk.take(b"run", write(Beat(run_id="run", number=number)))
        assert isinstance(reply, BeatBack)
        return reply

    assert not beat(1).registered
    bench.hello()
    bench.ask(1)
    bench.clock.now += 50
    assert beat(2).registered
    bench.clock.now += 50
    assert bench.desk.expire() == []
    bench.clock.now += 11
    assert bench.desk.expire() == ["run"]
    assert (bench.desk.stats.num_runs, bench.desk.stats.num_waiting, bench.desk.stats.expired) == (0, 0, 1)
    assert not beat(3).registered


def test_a_run_that_leaves_takes_its_requests_along(bench: Bench) -> None:
    bench.hello()
    bench.ask(1)
    bench.desk.take(b"run", write(Leave(run_id="run")))
    assert bench.desk.decide() == []
    assert bench.desk.stats.num_waiting == 0


def test_there_is_room_for_so_many_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_runs=1)
    bench.hello("a")
    assert refused(bench.hello("b")) == "full"
    assert isinstance(bench.hello("a"), Welcome)
    bench.book.close()


def test_a_service_that_ends_takes_nothing_new(bench: Bench) -> None:
    bench.hello()
    bench.ask(1)
    bench.desk.stopping = True
    assert refused(bench.ask(2)) == "stopping"
    assert refused(bench.hello("b")) == "stopping"
    assert bench.answers() == [("run:1", 1)]


def test_files_that_are_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.db.answers").write_bytes(b"my diary" * 200)
    with pytest.raises(DataFormatError, match="expected the answers of a service"):
        ExperienceBook(tmp_path / "x.db")
    assert (tmp_path / "x.db.answers").read_bytes() == b"my diary" * 200


def test_rules_decide_over_candidates() -> None:
    points = [make_point(), make_point(widths=(16, 16, 16, 16, 3))]
    neck, even = make_decider("cond(size=small, ratio=0.5)").choose(points)
    assert points[0].candidates[neck.candidate].placements[0].source == "net.0"
    assert even.candidate == 0
    chosen = RuleDecider("cond(size=large, ratio=0.7)")
    assert chosen.name == "cond(size=large, ratio=0.7)"
    with pytest.raises(ConfigError, match="expected a decider of tamiyo, wait, random"):
        make_decider("oracle of Delphi")
