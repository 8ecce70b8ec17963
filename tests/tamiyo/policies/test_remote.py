"""``policy=remote``: late answers, lost services, and a training that never waits."""

from __future__ import annotations

import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from loop import Loop
from runs import QUICK as QUICK_GATES
from runs import Every, decisions, mlp, trainer
from service_points import make_point
from service_processes import Served
from service_threads import QUICK, serving, wait_for

from esper.callbacks import TamiyoCallback
from esper.errors import ConfigError
from esper.hosts import DigitsData
from esper.messages import DecisionRecord
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.policies import make_policy
from esper.tamiyo.service.client import ServiceClient
from esper.tamiyo.service.deciders import Choice
from esper.tamiyo.service.server import DecisionServer

NOWHERE = "tcp://127.0.0.1:9"


class First:
    """Chooses the first thing that can be grown, as long as nothing has grown."""

    name, version = "first", ""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    def choose(self, points: Sequence[DecisionPoint]) -> list[Choice]:
        time.sleep(self.delay_s)
        return [self._choose(point) for point in points]

    def _choose(self, point: DecisionPoint) -> Choice:
        for index, candidate in enumerate(point.candidates):
            grows = candidate.action == "grow" and len(candidate.placements) == 1
            if grows and not candidate.unavailable and not point.run.seeds:
                return Choice(index, "the first", confidence=0.9, value=0.1)
        return Choice(0, "there is one already")


def run_until(loop: Loop, condition: Callable[[], Any], what: str, *, seconds: float = 15.0) -> Any:
    """Train on until something holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"trained {seconds:g} s for {what}: {loop.decisions[-1:]}"
        loop.run()
        time.sleep(0.001)
    return found


def remote_loop(service: DecisionServer | str, **options: Any) -> Loop:
    address = service if isinstance(service, str) else service.address
    chosen = {"address": address, "candidates": {"scored": False}, "max_age": 1.0, **options}
    return Loop(
        policy=make_policy("remote", **chosen), total_steps=10_000, probes={"decision_interval": 2e-3}
    )


def said(loop: Loop, text: str) -> int:
    """At how many decision points a text was among the reasons."""
    return sum(text in record.decision.reason for record in loop.decisions)


def grown(loop: Loop) -> list[DecisionRecord]:
    return [record for record in loop.decisions if record.decision.action == "germinate"]


def test_a_late_answer_is_applied_at_the_next_step_and_reported(tmp_path: Path) -> None:
    with serving(tmp_path, chooser=First(delay_s=0.02)) as service:
        loop = remote_loop(service)
        (record,) = run_until(loop, lambda: grown(loop), "growth")
        assert record.applied
        assert record.decision.policy == "remote"
        assert record.decision.reason == "first: the first"
        assert record.decision.confidence == 0.9
        asked_at = int(record.decision.numbers["asked_at_step"])
        assert asked_at < record.step
        assert [seed.seed_id for seed in loop.body.seeds] == [record.seed_id]
        stored = run_until(
            loop, lambda: (e := service.desk.book.store.get(f"run:{asked_at}")).seed_ids and e, "the report"
        )
        assert stored.seed_ids == (record.seed_id,)
        waits = run_until(
            loop, lambda: [d for d in loop.decisions if "already" in d.decision.reason], "a WAIT"
        )
        assert "first waits: there is one already" in waits[0].decision.reason
        loop.controller.close()


def test_training_does_not_wait_for_a_service_that_is_not_there(tmp_path: Path) -> None:
    plain, lonely = Loop(total_steps=10_000), remote_loop(NOWHERE, timeout_ms=3.6e6)
    plain.run(400)
    lonely.run(400)  # within this test's time, not within twenty answers' that never come
    assert {record.decision.action for record in lonely.decisions} == {"wait"}
    assert "the answer to step 1 is under way" in lonely.decisions[-1].decision.reason
    for a, b in zip(plain.model.parameters(), lonely.model.parameters(), strict=True):
        assert a.equal(b)  # and nothing else has changed either
    lonely.controller.close()


def test_a_missing_answer_is_given_up_and_the_fallback_decides() -> None:
    loop = remote_loop(
        NOWHERE, timeout_ms=30.0, fallback="random", fallback_options={"num_events": 1, "start": 0.0}
    )
    (record,) = run_until(loop, lambda: grown(loop), "the fallback")
    assert record.decision.policy == "random"
    waiting = remote_loop(NOWHERE, timeout_ms=30.0)
    run_until(waiting, lambda: said(waiting, "not answered in time"), "the timeout")
    assert not grown(waiting)
    for each in (loop, waiting):
        each.controller.close()


def test_an_answer_that_is_too_old_is_not_applied_and_the_service_hears_why(tmp_path: Path) -> None:
    with serving(tmp_path, chooser=First(delay_s=0.1)) as service:
        loop = remote_loop(service, max_age=1e-4)
        run_until(loop, lambda: said(loop, "steps late"), "the late answer")
        assert not grown(loop)
        store = service.desk.book.store
        wait_for(lambda: any("steps late" in e.refused for e in store.iterate()), "the report")
        loop.controller.close()


def test_what_the_vetting_refuses_is_reported(tmp_path: Path) -> None:
    with serving(tmp_path, chooser=First()) as service:
        loop = remote_loop(service)
        loop.controller.warden.governor.halted = "diverged twice"
        (record, *_) = run_until(loop, lambda: grown(loop), "an answer")
        assert not record.applied
        store = service.desk.book.store
        wait_for(lambda: any("diverged twice" in e.refused for e in store.iterate()), "the report")
        loop.controller.close()


def test_a_run_that_is_continued_gets_the_same_answer_again(tmp_path: Path) -> None:
    with serving(tmp_path, chooser=First()) as service:
        first = remote_loop(service).run(5)
        state = first.controller.policy.state_dict()
        assert pickle.loads(pickle.dumps(state)) == state
        run_until(first, lambda: grown(first), "growth")
        first.controller.close()
        asked = int(grown(first)[0].decision.numbers["asked_at_step"])
        again = remote_loop(service)
        run_until(again, lambda: grown(again), "growth")
        again.controller.close()
        assert int(grown(again)[0].decision.numbers["asked_at_step"]) == asked
        assert grown(again)[0].decision.site == grown(first)[0].decision.site
        assert service.stats.repeats >= 1
        continued = make_policy("remote", address=service.address)
        continued.load_state_dict(state)
        assert continued.state_dict() == state


def test_a_killed_service_is_picked_up_again_and_nothing_it_decided_is_lost(tmp_path: Path) -> None:
    def ask(client: ServiceClient, step: int) -> Any:
        client.ask(f"other:{step}", step, make_point("other", step))
        wait_for(lambda: client.answered, "an answer", seconds=30)
        return client.take()[0]

    served = Served(tmp_path, decider="wait")
    address = f"tcp://127.0.0.1:{served.port}"
    loop = remote_loop(address, timeout_ms=200.0)
    try:
        with ServiceClient(address, "other") as client:
            first = ask(client, 1)
            run_until(loop, lambda: said(loop, "wait waits") >= 3, "answers")
            assert served.end(signal.SIGKILL)[0] == -signal.SIGKILL
            wait_for(lambda: client.state.startswith("lost"), "the loss to be noticed")
            client.ask("other:2", 2, make_point("other", 2))
            run_until(loop, lambda: said(loop, "lost the") and said(loop, "not answered"), "the loss to show")
            step, before = loop.step, said(loop, "wait waits")
            assert not client.answered
            served = Served(tmp_path, served.port, decider="wait")
            run_until(loop, lambda: said(loop, "wait waits") >= before + 3, "answers of the new service")
            assert loop.step > step
            wait_for(lambda: client.answered, "the answer that the old service owed", seconds=30)
            assert [answer.request_id for answer in client.take()] == ["other:2"]
            assert ask(client, 1) == first
            heard = said(loop, "wait waits")
            loop.controller.close()
        status, text = served.end(signal.SIGINT)
        assert status == 0, text
        assert "ending after" in text
    finally:
        served.kill()
    with ExperienceStore(tmp_path / "x.db", readonly=True) as store:
        stored = [experience.decision.point.run.step for experience in store.iterate(run_id="run")]
        assert stored == sorted(stored)
        assert len(stored) >= heard
        assert [e.decision.decision_id for e in store.iterate(run_id="other")] == ["other:1", "other:2"]
        store.check()


def test_a_lightning_run_grows_by_a_service_and_hangs_up_at_its_end(tmp_path: Path) -> None:
    with serving(tmp_path, chooser=First()) as service:
        callback = TamiyoCallback(
            policy="remote",
            policy_options={"address": service.address, "max_age": 1.0, "candidates": {"scored": False}},
            window=(0.0, 1.0),
            lifecycle=QUICK_GATES,
            horizon_steps=400,
            journal=str(tmp_path / "growth.jsonl"),
            bus=None,
        )

        def look(trainer: L.Trainer, module: L.LightningModule) -> None:
            time.sleep(2e-3)
            trainer.should_stop = trainer.should_stop or bool(callback.body.seeds)

        fit = trainer(tmp_path, callback, Every(look), epochs=20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice is not about this
            fit.fit(mlp(), DigitsData(batch_size=64))
        assert [seed.stage for seed in callback.body.seeds]
        wait_for(lambda: service.stats.num_runs == 0, "the run to leave")
        (grown_by,) = [r for r in decisions(tmp_path) if r.decision.action == "germinate"]
        assert grown_by.decision.policy == "remote"
        store = service.desk.book.store
        assert callback.run_id in {experience.decision.run_id for experience in store.iterate()}


def test_a_forked_child_asks_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, decider="wait") as service:
        loop = remote_loop(service)
        run_until(loop, lambda: sum(service.stats.decisions.values()) >= 1, "a decision")
        child = os.fork()
        if child == 0:
            loop.run(60)
            os._exit(0 if "not connected" in loop.decisions[-1].decision.reason else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        before = sum(service.stats.decisions.values())
        run_until(loop, lambda: sum(service.stats.decisions.values()) > before, "the parent to go on")
        loop.controller.close()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"address": "tcp://192.0.2.1:7350"}, "esper keys create"),
        ({"timeout_ms": 0.0}, "timeout_ms should be positive"),
        ({"fallback": "remote"}, "another policy than remote"),
        ({"fallback_options": {"start": 0.1}}, "waiting has no fallback_options"),
        ({"fallback": "nobody"}, "no policy named 'nobody'"),
        ({"max_age": 0.0}, "max_age"),
        ({"candidates": {"colour": 1}}, "candidates has no option colour"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_policy("remote", **options)


def test_defaults_of_the_service_and_of_the_policy_meet() -> None:
    assert QUICK["address"] != make_policy("remote").config.address == "tcp://127.0.0.1:7350"  # type: ignore[attr-defined]
