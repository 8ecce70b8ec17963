"""One host run with decision points at which it pauses, from which it can be branched, and which ends somewhere.

The loop is plain; everything that grows is what a user's run has: the same body, controller, gates, governor
and ledger that :class:`esper.TamiyoCallback` drives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from esper.errors import CheckpointError, ConfigError, GrowthError
from esper.kasmina.body import Body, attach
from esper.kasmina.layer import SEEDS
from esper.kasmina.optimizer import reorder_groups
from esper.kasmina.probes import ProbeRunner
from esper.messages import DecisionRecord, Event, GovernorRecord
from esper.tamiyo.controller import Controller
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.nets import build_network
from esper.tamiyo.environment.plain import CoursePoint, Outcome, evaluate, look_steps
from esper.tamiyo.environment.questions import Questions
from esper.tamiyo.environment.run import EpisodeRun
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.environment.stream import Stream, make_optimizer, rate_factors
from esper.tamiyo.graph.carry_out import decisions
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.recorder import Recorder
from esper.tamiyo.snapshot import Snapshot, capture, renew_optimizer_state
from esper.tamiyo.state import Policy

__all__ = ["Episode"]

_STATE_VERSION = 1


class Episode:
    """Trains one host and asks what to do at decision points.

    ::

        episode = Episode(sample_host("digits_mlp", "train", 0), price=0.03)
        while (point := episode.advance()) is not None:
            episode.act(choose(point))          # index into point.candidates; 0 is WAIT
        outcome = episode.finish()

    A decision is carried out at the safe point after the next step, as one that came from a service would be.
    Weights, order of the data and shifts depend on (spec, repeat) alone. The figures of a run are the same
    wherever it is repeated with the same number of torch threads; one is fastest for nets this small.

    Args:
        spec: The host run.
        config: How it is asked and what it may spend; keyword arguments change single fields of it.
        repeat: Another repeat has other first weights and another order of the data.
        policy: Decides by itself in the place of whoever calls :meth:`act`; then :meth:`advance` runs to the end.
        **settings: Fields of :class:`~esper.tamiyo.environment.config.EpisodeConfig`.

    Raises:
        ConfigError: A setting is unknown or out of range.
        DataNotFoundError: A sealed host's data are not below ``ESPER_DATA_DIR``.
    """

    def __init__(
        self,
        spec: HostSpec,
        config: EpisodeConfig | None = None,
        *,
        repeat: int = 0,
        policy: Policy | None = None,
        **settings: Any,
    ) -> None:
        self._prepare(spec, (config or EpisodeConfig()).with_settings(**settings), repeat)
        body = attach(self._model, self._stream.batch(0)[0], seed=spec.seed)
        self._begin(body, policy)

    def _prepare(self, spec: HostSpec, config: EpisodeConfig, repeat: int) -> None:
        self.spec, self.config, self.repeat = spec, config, repeat
        self.step = 0
        """Optimizer steps taken so far."""
        self._stream = Stream(spec, repeat)
        first = self._stream.phases[0]
        self._loss_of = first.loss
        self._model: nn.Module = build_network(spec, first.input_shape, first.num_outputs, repeat=repeat)
        self._model.train()
        self._optimizer = make_optimizer(self._model, spec)
        self._rates = [spec.learning_rate * factor for factor in rate_factors(spec)]
        self._losses: list[Tensor] = []
        self._course: list[CoursePoint] = []
        self._looks = frozenset(look_steps(spec, config.decision_interval))
        self._refused: list[str] = []
        self._rollbacks = 0
        self._seconds = 0.0

    def _begin(self, body: Body, policy: Policy | None) -> None:
        spec, config = self.spec, self.config
        self._body = body
        self._host_parameters = [
            (name, p) for name, p in self._model.named_parameters() if SEEDS not in name.split(".")
        ]
        self._num_host = sum(p.numel() for _, p in self._host_parameters)
        self._run = EpisodeRun(spec, self._model, self._optimizer, self._stream)
        self._questions = Questions(spec, config)
        settings = config.tamiyo_config(spec)
        self._controller = Controller(
            settings,
            body,
            self._run,
            policy or self._questions,
            Recorder(self.run_id, listeners=(self._hear,)),
        )
        self._probes = ProbeRunner(body)

    @property
    def run_id(self) -> str:
        """Names the run in decision points and records."""
        return f"{self.spec.name}#{self.repeat}"

    @property
    def body(self) -> Body:
        """The attached host, with what has been grown."""
        return self._body

    @property
    def point(self) -> DecisionPoint | None:
        """The decision point at which the run stands; None when none is open."""
        return self._questions.open

    @property
    def done(self) -> bool:
        """Whether nothing will be asked any more, after the open decision point if there is one."""
        return self._questions.done or self._controller.policy is not self._questions

    def advance(self) -> DecisionPoint | None:
        """Train to the next decision point.

        Returns:
            The decision point; None when the run is over.

        Raises:
            GrowthError: The last decision point was not answered.
        """
        if self.point is not None:
            raise GrowthError(
                f"{self.run_id} waits for an answer at step {self.step}; call act() before advance()"
            )
        started = time.perf_counter()
        while self.point is None and self.step < self.spec.total_steps:
            self._train_step()
        self._seconds += time.perf_counter() - started
        return self.point

    def act(self, candidate_index: int) -> None:
        """Answer the open decision point.

        Args:
            candidate_index: Of the candidate to carry out; 0 waits.

        Raises:
            GrowthError: No decision point is open.
            ConfigError: There is no such candidate, or it may not be chosen. The point stays open.
        """
        point = self.point
        if point is None:
            raise GrowthError(f"{self.run_id} stands at no decision point; call advance() first")
        if not 0 <= candidate_index < len(point.candidates):
            raise ConfigError(
                f"candidate must be one of 0 to {len(point.candidates) - 1} at step {self.step} of "
                f"{self.run_id}, got {candidate_index}"
            )
        candidate = point.candidates[candidate_index]
        if candidate.unavailable:
            raise ConfigError(
                f"candidate {candidate_index} ({candidate.action}) may not be chosen at step {self.step} of "
                f"{self.run_id}: {candidate.unavailable}"
            )
        chosen = decisions(candidate, policy=Questions.name, reason="chosen from outside")
        self._questions.answered(chosen, self.step)
        for decision in chosen:
            if decision.action != "wait":
                self._controller.request(decision)

    def measure(self) -> tuple[float, float]:
        """Loss and accuracy on all held-out samples of the present phase; charged to nobody, and nothing changes."""
        data = self._stream.phase(max(0, self.step - 1))
        return evaluate(self._model, data, data.held_out)

    @property
    def training_flops(self) -> float:
        """Spent so far, statistics, scores and culled seeds included."""
        return self._controller.ledger.training_flops

    def branch(self, *, repeat: int | None = None) -> Episode:
        """Copy the run as it is now; what is done to one does not reach the other.

        Args:
            repeat: From here on, see the batches in the order of this repeat.
        """
        return self._copy(self._state(), self._body, repeat)

    def finish(self) -> Outcome:
        """Train to the end, waiting at every decision point that is left, and evaluate."""
        if self.point is not None:
            self.act(0)
        self._questions.close()
        self.advance()
        last = self._stream.phases[-1]
        held_out, test = (evaluate(self._model, last, part) for part in (last.held_out, last.test))
        ledger = self._controller.ledger
        return Outcome(
            held_out_loss=held_out[0],
            held_out_accuracy=held_out[1],
            test_loss=test[0],
            test_accuracy=test[1],
            host_parameters=self._num_host,
            num_parameters=self._body.num_parameters,
            training_flops=self.training_flops,
            germinated=ledger.germinated,
            culled=ledger.culled,
            recycled=ledger.recycled,
            rollbacks=self._rollbacks,
            refused=tuple(self._refused),
            train_losses=tuple(torch.stack(self._losses).tolist()),
            course=self._whole_course(held_out[0]),
            wall_seconds=self._seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on: plain types and tensors, for another process or a file."""
        return {
            "version": _STATE_VERSION,
            "spec": msgspec.to_builtins(self.spec),
            "config": self.config.to_dict(),
            "repeat": self.repeat,
            **self._state(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Episode:
        """Continue a run that :meth:`state_dict` wrote down.

        Raises:
            CheckpointError: It is none, or of another version.
        """
        if state.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"expected the state of an Episode of version {_STATE_VERSION}, got {state.get('version')!r}"
            )
        spec = msgspec.convert(state["spec"], HostSpec)
        origin = cls(spec, EpisodeConfig.from_dict(state["config"]), repeat=state["repeat"])
        return origin._copy(state, origin._body, None)

    def _copy(self, state: Mapping[str, Any], like: Body, repeat: int | None) -> Episode:
        """An episode in ``state``, whose body has the topology and sites of ``like``."""
        copy = object.__new__(Episode)
        copy._prepare(self.spec, self.config, self.repeat)
        if repeat is not None:
            copy.repeat, copy._stream = repeat, Stream(self.spec, repeat)
        body = Body(copy._model, like.topology, seed=self.spec.seed)
        body.sites, body.refused = list(like.sites), dict(like.refused)
        copy._begin(body, None)
        copy._load(state)
        copy._questions.history.plan = self._questions.history.plan  # places and prices of the same topology
        return copy

    def _state(self) -> dict[str, Any]:
        if self._controller.policy is not self._questions:
            raise GrowthError(
                f"{self.run_id} is decided by policy {self._controller.policy.name!r}; only a run that is asked "
                "can be branched or written down"
            )
        return {
            "step": self.step,
            "snapshot": capture(self._model, self._optimizer, step=self.step).state_dict(),
            "controller": self._controller.state_dict(),
            "course": [msgspec.to_builtins(point) for point in self._course],
            "losses": torch.stack(self._losses) if self._losses else torch.empty(0),
            "refused": list(self._refused),
            "rollbacks": self._rollbacks,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        snapshot = Snapshot.from_state_dict(state["snapshot"])
        self._model.load_state_dict(snapshot.model)
        self._body.register(self._optimizer)
        reorder_groups([self._optimizer], snapshot.groups, self._model.named_parameters())
        renew_optimizer_state(self._model, self._optimizer, snapshot)
        self._controller.load_state_dict(state["controller"])
        self.step = int(state["step"])
        self._losses = list(state["losses"].unbind())
        self._course = [msgspec.convert(point, CoursePoint) for point in state["course"]]
        self._refused, self._rollbacks = list(state["refused"]), int(state["rollbacks"])
        if self.step:
            self._run.note(self.step, *self._stream.batch(self.step - 1))

    def _train_step(self) -> None:
        controller, optimizer = self._controller, self._optimizer
        x, y = self._stream.batch(self.step)
        rate = self._rates[self.step]
        for group in optimizer.param_groups:
            group["lr"] = rate
        step = self.step + 1
        probes = self._probes if self._sampled(step) else None
        if probes is not None:
            probes.begin()
        optimizer.zero_grad()
        loss = self._loss_of(self._model(x), y)
        loss.backward()
        if probes is not None:
            probes.note_gradients()
        if controller.warden.wants_gradients(step):
            controller.warden.note_gradients(self._host_parameters)
        optimizer.step()
        loss = loss.detach()
        self.step = step
        self._losses.append(loss)
        self._run.note(step, x, y)
        controller.note_batch(loss, len(x))
        epoch = step * self.spec.batch_size // self._run.num_train
        if probes is not None:
            ready = controller.gatekeeper.ready
            measured = probes.end(step=step, epoch=epoch, ready=ready, scores=controller.scores)
            # Times would make two runs of one seed differ, and those of nets this small say nothing.
            signals = [msgspec.structs.replace(s, execution_latency=0.0, timestamp=0.0) for s in measured]
            controller.note_health(signals)
            self._questions.history.extend(signals)
        if self.config.follow and step in self._looks:  # before anything is changed here
            self._course.append(CoursePoint(step, self.measure()[0], self.training_flops))
        controller.safe_point(step, epoch)

    def _sampled(self, step: int) -> bool:
        """Whether step ``step`` is watched: where the controller looks, while anybody will ask."""
        asked = self._controller.policy is self._questions
        return step in self._looks and not (asked and self._questions.done)

    def _whole_course(self, final_loss: float) -> tuple[CoursePoint, ...]:
        course, end = self._course, self.spec.total_steps
        if course and course[-1].step < end:
            return (*course, CoursePoint(end, final_loss, self.training_flops))
        return tuple(course)

    def _hear(self, event: Event) -> None:
        if isinstance(event, DecisionRecord) and event.refused:
            self._refused.append(f"step {event.step}: {event.refused}")
        elif isinstance(event, GovernorRecord) and event.action == "rollback":
            self._rollbacks += 1
