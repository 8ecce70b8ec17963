"""The callback that makes a Lightning model grow while it trains."""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import msgspec
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.callbacks.averaging import Averages
from esper.callbacks.by_hand import ByHand
from esper.callbacks.checks import check_optimizers, check_resume, check_trainer, check_watching
from esper.callbacks.compilation import CompilationWatch
from esper.callbacks.distributed import ranks_of
from esper.callbacks.finetuning import restore_groups
from esper.callbacks.growth_table import GrowthTable
from esper.callbacks.guards import Guards
from esper.callbacks.hooks import HookSwitch
from esper.callbacks.lightning_run import LightningRun, batch_size
from esper.callbacks.loaders import generator_states, resume_loaders, warn_of_lost_places
from esper.callbacks.networks import keep_apart
from esper.callbacks.random_state import random_state, set_random_state
from esper.callbacks.records import Records
from esper.callbacks.sharding import before_loading, check_seeds, check_sharded, regrow, shards
from esper.errors import CheckpointError, GrowthError
from esper.interrupt import uninterrupted
from esper.kasmina.body import Body
from esper.kasmina.garbage import uncollected
from esper.kasmina.layer import SEEDS
from esper.kasmina.optimizer import group_names, reorder_groups
from esper.kasmina.probes import ProbeRunner
from esper.kasmina.sharded import put_at_rest
from esper.kasmina.structure import follow_state_dict, has_seeds
from esper.kasmina.topology import ModelTopology
from esper.kasmina.trace import Tracer
from esper.messages import Decision, Event, HealthSignal
from esper.tamiyo.config import TamiyoConfig, build_config
from esper.tamiyo.controller import Controller
from esper.tamiyo.policies import make_policy
from esper.tamiyo.recorder import Recorder

__all__ = ["TamiyoCallback"]

_STATE_VERSION = 2
_WATCH_HORIZON = 10_000
"""Steps by which a watched run of unknown length is paced; nothing is decided then."""


class TamiyoCallback(ByHand, L.Callback):
    """Grow a model where it is starved, while it trains.

    Add it to the callbacks of any trainer. It traces the first batch, watches every layer, and at
    safe points between optimizer steps lets a policy decide whether a seed germinates, and where.
    Checkpoints of the trainer hold everything: ``trainer.fit(ckpt_path=...)`` continues bit for bit.

    Args:
        config: All settings in one object; keyword arguments change single ones of it.
        listeners: Called with every decision, transition and intervention as it happens.
        **settings: Fields of :class:`~esper.tamiyo.config.TamiyoConfig`, such as ``policy="random"``,
            ``budget={"max_parameters_ratio": 1.5}`` or ``seed=1``. Sections may be mappings.

    Raises:
        ConfigError: An unknown setting or a value out of range.

    Example::

        trainer = L.Trainer(max_epochs=20, callbacks=[TamiyoCallback()])
    """

    def __init__(
        self,
        config: TamiyoConfig | None = None,
        *,
        listeners: Sequence[Callable[[Event], None]] = (),
        **settings: Any,
    ) -> None:
        self.config = build_config(config, **settings)
        self.listeners = list(listeners)
        make_policy(
            self.config.policy, **self.config.policy_options
        )  # wrong options fail here, not in epoch 3
        self.run_id = uuid.uuid4().hex[:12]
        self._hooks = HookSwitch(self, TamiyoCallback)
        self._compilation = CompilationWatch()
        self._restored: dict[str, Any] | None = None
        self._stage = "fit"
        self._averages: Averages | None = None
        self._table: GrowthTable | None = None
        self._fit_id = ""
        self._stop_reading: Callable[[], object] = _nothing
        self._reset()

    def _reset(self) -> None:
        self._run: LightningRun | None = None
        self._tracer: Tracer | None = None
        self._body: Body | None = None
        self._controller: Controller | None = None
        self._probes: ProbeRunner | None = None
        self._host_parameters: list[tuple[str, nn.Parameter]] = []
        self._guards = Guards(self.config.birth_lr_multiplier, self.config.seed_lr_multiplier)
        self._records: Records | None = None
        self._requests: list[Decision] = []
        self._last_step = 0
        self._steps_a_batch = 1
        self._evaluated = False
        self._just_traced = False
        self._step_started = 0.0
        self._quiet_until = 0
        self._hooks.all_on()

    # ---------------------------------------------------------------- Lightning's hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let checkpoints regrow the model, and refuse what growth cannot work with."""
        if stage == "fit" and self.config.policy == "off":
            check_watching(trainer)
        elif stage == "fit":
            # first, because it looks at what the module could do before
            check_trainer(trainer, TamiyoCallback)
        follow_state_dict(pl_module)
        self._stage = stage
        if stage != "fit" and shards(trainer):
            self._stop_reading = before_loading(trainer, lambda path: check_seeds(pl_module, path))
        if stage == "fit":
            self._restored = None  # of a fit that failed before it trained
            if self._body is not None and self._body.model is not pl_module:
                self._reset()
                self.run_id = uuid.uuid4().hex[:12]  # the journal may hold both runs
            self._averages = Averages(pl_module, trainer.callbacks)  # type: ignore[attr-defined]
            self._table = GrowthTable(trainer, pl_module)
            self._fit_id = uuid.uuid4().hex

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the optimizers, and put their groups in the order of the checkpoint."""
        growing = self.config.policy != "off"
        if growing:
            check_optimizers(trainer)
        if self._averages is not None:
            self._averages.check()
        self._run = LightningRun(
            trainer,
            pl_module,
            num_batches=self.config.probes.held_out_batches,
            horizon_steps=self.config.horizon_steps or (None if growing else _WATCH_HORIZON),
            ranks=ranks_of(trainer, talking=growing or has_seeds(pl_module)),
            seed=self.config.seed,
        )
        if shards(trainer):
            check_sharded(pl_module, self._run.optimizers)
            optimizers = self._run.optimizers
            self._stop_reading = before_loading(
                trainer, lambda path: regrow(pl_module, optimizers, path, self.state_key)
            )
        if has_seeds(pl_module):
            self._run.structure_changed()
        restore_groups(trainer, pl_module)
        if self._restored is not None and self._restored["groups"] is not None:
            reorder_groups(self._run.optimizers, self._restored["groups"], pl_module.named_parameters())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open journal and bus, and take up a restored run."""
        assert self._run is not None
        self._stop_reading()
        follow_state_dict(pl_module)  # again, where it was kept out of a sharded model's loading
        _ = self._run.total_steps  # a run whose length cannot be told is refused here, not after a batch
        same_run = 0 < self._last_step <= trainer.global_step
        self._last_step = trainer.global_step
        restored, self._restored = self._restored, None
        if restored is None and self._controller is not None and not same_run:
            # a run of its own, whose events may stand in the same journal
            self.run_id = uuid.uuid4().hex[:12]
        self._records = Records(
            self.config,
            self.run_id,
            trainer,
            self._heard_by(trainer),
            resumed_at=None if restored is None else trainer.global_step,
        )
        if restored is not None:
            if restored["topology"]:
                self._take_up(pl_module, restored)
                self._follow_seeds()
            self._requests = [
                msgspec.convert(item, Decision) for item in restored["requests"]
            ] + self._requests
        elif self._controller is not None and self._body is not None:  # a further fit() on the same model
            previous = self._controller
            self._begin(pl_module, self._body.topology)
            assert self._controller is not None
            self._controller.follow(previous, same_run=same_run)
        if self._body is not None:
            self._check_evaluation()
        if self.config.policy != "off":
            if restored is None:
                warn_of_lost_places(trainer)
            elif restored["random"] is not None:
                resume_loaders(trainer, restored.get("generators", []), restored["random"])
        self._records.mark("resume" if restored is not None else "start", trainer)
        self._compilation.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Trace the first batch; install the probes on sampled steps."""
        if self._controller is None:
            self._tracer = Tracer(pl_module)
            self._tracer.__enter__()
            return
        if self._probes is not None and not self._probes.active and self._sampled(self._last_step):
            self._step_started = time.perf_counter()
            self._probes.begin()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Read the topology off the graph of the first loss."""
        if self._tracer is not None and not self._tracer.finished:
            with uncollected():
                self._begin(pl_module, self._tracer.finish(loss))  # it is closed after the backward pass
            self._just_traced = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take gradient norms before clipping, and keep isolated seeds out of it."""
        if self._probes is not None and self._probes.active:
            self._probes.note_gradients()
        controller = self._controller
        if (
            controller is not None
            and self._wants_gradients(self._last_step)
            and getattr(trainer.precision_plugin, "scaler", None) is None  # it deals with inf by itself
        ):
            controller.warden.note_gradients(self._host_parameters)
        if self._body is not None and self._body.seeds:
            self._follow_seeds()  # one may have been put there by hand in the middle of a step
            self._guards.protect(trainer, optimizer, self._body.seeds)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act, when an optimizer step has been completed and something is due."""
        if self._tracer is not None:
            self._drop_tracer()
        controller, run, records = self._controller, self._run, self._records
        if controller is None:
            return
        assert run is not None
        assert records is not None
        run.last_batch = batch
        loss = _loss(outputs)
        if loss is not None and trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization:
            loss = loss.detach() * trainer.accumulate_grad_batches  # Lightning has divided it
        controller.note_batch(loss, batch_size(batch))
        step = trainer.global_step
        if step == self._last_step:
            return  # gradients are still being accumulated
        self._steps_a_batch = step - self._last_step
        self._last_step = step
        self._requests += [command.decision for command in records.commands()]
        if step >= self._quiet_until or self._requests:
            with uninterrupted():  # a model that is half changed could not be saved
                self._safe_point(trainer, step)
        else:
            controller.warden.pass_by(step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let an average that takes the module's place for validation have the seeds' stages and strengths."""
        self._sync_averages()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same for an average that takes the module's place at the end of training, before our hook."""
        self._sync_averages()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the records."""
        self._sync_averages()
        self._tell_compilations(trainer)
        if self._records is not None:
            size_and_cost = {} if self._body is None else self.summary()
            finite = {name: value for name, value in size_and_cost.items() if math.isfinite(value)}
            self._records.mark("end", trainer, **finite)
            self._records.tell_how_to_load(pl_module)
        self._close()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up a checkpoint that left nothing to train, so that what it holds can be summed up."""
        restored, self._restored = self._restored, None
        if restored is not None and restored["topology"]:
            self._take_up(pl_module, restored)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook, socket or open file behind."""
        self._drop_tracer()
        if self._run is not None:
            self._run.failed(exception)
        if self._records is not None:
            self._records.note(trainer, exception=type(exception).__name__)
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close whatever is still open."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, in plain types and tensors (``weights_only`` loads it)."""
        if self._run is not None and shards(self._run.trainer):
            put_at_rest(self._run.module)
        self._sync_averages()  # here, because states are asked for before any callback writes an average down
        common = {
            "version": _STATE_VERSION,
            "run_id": self.run_id,
            "fit": self._fit_id,
            "requests": [msgspec.to_builtins(decision) for decision in self._requests],
            "steps_a_batch": self._steps_a_batch,
            "random": None if self.config.policy == "off" else random_state(),
            "generators": [] if self._run is None else generator_states(self._run.trainer),
        }
        if self._controller is None or self._run is None or self._body is None:
            return {**common, "topology": None, "groups": None}
        return {
            **common,
            "topology": msgspec.to_builtins(self._body.topology),
            "groups": group_names(self._run.optimizers, self._body.model.named_parameters()),
            "controller": self._controller.state_dict(),
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume with what would lose the run's state; ``setup`` knows of no checkpoint yet."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        if self._stage == "fit" and self.config.policy != "off" and state.get("fit", "") != self._fit_id:
            check_resume(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the run starts.

        Raises:
            CheckpointError: It was written by another version.
        """
        if state_dict.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"the checkpoint's TamiyoCallback state has version {state_dict.get('version')!r}, this esper reads "
                f"{_STATE_VERSION}; resume with the esper that wrote it, or start afresh from the weights by esper.load"
            )
        if self._stage != "fit":
            return  # Lightning restores callbacks to test a checkpoint too; a later fit must not take it up
        if state_dict.get("fit") != self._fit_id:
            self._restored = state_dict
            self.run_id = state_dict["run_id"]
        # Else a finder of batch size or learning rate takes its trial back: our hooks were not called in it.
        if state_dict["random"] is not None and self.config.policy != "off":
            # Here, because the first iteration over a loader, which draws from it, may come with the optimizers.
            set_random_state(state_dict["random"])

    # ---------------------------------------------------------------- inside

    def _heard_by(self, trainer: L.Trainer) -> list[Callable[[Event], None]]:
        """Who is told of events: averages on every rank, the user's listeners on rank 0."""
        averages = [] if self._averages is None else [self._averages.note]
        return [*averages, *(self.listeners if trainer.is_global_zero else [])]

    def _sync_averages(self) -> None:
        if self._averages is not None:
            self._averages.sync()

    def _take_up(self, module: L.LightningModule, restored: Mapping[str, Any]) -> None:
        """Be where the checkpoint was written."""
        self._begin(module, msgspec.convert(restored["topology"], ModelTopology))
        assert self._controller is not None
        self._controller.load_state_dict(restored["controller"])
        self._steps_a_batch = restored["steps_a_batch"]

    def _begin(self, module: L.LightningModule, topology: ModelTopology) -> None:
        """Attach to the traced model and start the loop."""
        assert self._run is not None
        recorder = Recorder(self.run_id) if self._records is None else self._records.recorder
        self._body = Body(module, topology, seed=self.config.seed)
        self._body.on_change = self._wake
        policy = make_policy(self.config.policy, **self.config.policy_options)
        if self._records is not None:
            policy = self._records.recorded(policy)
        self._controller = Controller(self.config, self._body, self._run, policy, recorder)
        # Signals of other ranks would be dropped: their batches are like these. Of sharded layers there are none:
        # rank 0 would have to ask the others for their parts in the middle of a step.
        if self._run.ranks.rank == 0 and not shards(self._run.trainer):
            self._probes = ProbeRunner(self._body)
        self._list_host_parameters()
        self._evaluated = False
        self._quiet_until = 0
        self._hooks.all_on()
        assert self._table is not None
        self._table.begin(self._body.seeds)
        recorder.num_parameters = self._body.num_parameters

    def _safe_point(self, trainer: L.Trainer, step: int) -> None:
        """Do what is due between two optimizer steps, and find out when the next thing will be."""
        controller, body, run = self._controller, self._body, self._run
        assert controller is not None
        assert body is not None
        assert run is not None
        if shards(trainer):
            put_at_rest(body.model)
            if self._just_traced:
                self._list_host_parameters()  # within the step, other tensors stood in their places
        self._check_evaluation()
        self._tell_sites(trainer)
        self._finish_probe(trainer)
        for decision in self._requests:
            controller.request(decision)
        self._requests.clear()
        if not run.module.automatic_optimization:
            controller.follow_length(run.total_steps)
        controller.safe_point(step, trainer.current_epoch)
        if self._averages is not None:
            self._averages.follow()
        if self._table is not None:
            self._table.show(body.seeds, step)
        self._follow_seeds()
        self._tell_compilations(trainer)
        sampled, gradients, seeds = self._sampled(step), self._wants_gradients(step), bool(body.seeds)
        self._hooks.set("on_train_batch_start", sampled)
        self._hooks.set("on_before_backward", False)
        self._hooks.set("on_before_optimizer_step", sampled or gradients or seeds)
        if sampled or gradients or seeds:
            self._quiet_until = 0
        else:  # one batch before what needs a hook, to switch it on
            needs_hook = min(self._next_sample(step), controller.warden.next_gradients(step))
            self._quiet_until = min(controller.next_due(step), needs_hook - self._steps_a_batch)

    def _list_host_parameters(self) -> None:
        """Name the host's parameters; once, as walking a module's names takes longer than what is asked of them."""
        assert self._body is not None
        named = self._body.model.named_parameters()
        self._host_parameters = [(n, p) for n, p in named if SEEDS not in n.split(".")]

    def _wake(self) -> None:
        """Somebody has changed the body by hand: look at everything again, from this very batch on.

        Raises:
            GrowthError: Several processes train the model, and nobody can tell whether all of them did it.
        """
        if self._run is not None and not self._run.ranks.may_change:
            raise GrowthError(
                "several processes train this model, so it has to be changed in all of them between the same two "
                "steps; ask for it by germinate(...) or cull(...) of the callback, on rank 0 or on all ranks"
            )
        self._quiet_until = 0
        self._hooks.set("on_before_optimizer_step", True)
        if self._averages is not None:
            self._averages.follow()

    def _wants_gradients(self, step: int) -> bool:
        """Whether the governor judges the gradients of the batch after optimizer step ``step``."""
        assert self._controller is not None
        return self._controller.warden.wants_gradients(step + self._steps_a_batch)

    def _check_evaluation(self) -> None:
        """Give up sites that would mix samples, or that validation would not see; once, between steps: a pass
        within one would change buffers that its backward still needs.
        """
        run = self._run
        assert self._body is not None
        assert run is not None
        if self._evaluated or self.config.policy == "off":
            return
        if run.last_batch is not None:
            self._body.measure_layout(lambda part: run.loss(part, 0, moved=True), run.last_batch)
        if run.held_out():
            self._body.check_evaluation(run.held_out()[0])
        elif run.last_batch is not None:  # a test may come, and skip what training runs
            self._body.check_evaluation(run.recent())
        else:
            return  # continued without validation: after the first batch
        keep_apart(self._body, run.optimizers)
        run.check_alike(self.config, [site.name for site in self._body.sites])
        self._evaluated = True

    def _tell_sites(self, trainer: L.Trainer) -> None:
        """Write down, once a run, where seeds can attach and which layers were left out for what reason."""
        assert self._body is not None
        assert self._records is not None
        if self._just_traced and self.config.policy != "off":
            sites = [site.name for site in self._body.sites]
            self._records.note(trainer, sites=sites, refused=self._body.refused)
        self._just_traced = False

    def _tell_compilations(self, trainer: L.Trainer) -> None:
        """Write down what was compiled anew since the last safe point, and let the body know of it."""
        if self._body is not None:
            self._body.compiled = self._compilation.num_compilations > 0
        grown = self._controller is not None and self._controller.ledger.germinated > 0
        if self._records is not None and (news := self._compilation.news(grown=grown)) is not None:
            self._records.note(trainer, **news)

    def _sampled(self, step: int) -> bool:
        """Whether the batch after optimizer step ``step`` is probed: at the interval, and for isolated seeds' gates.

        Under manual optimization a batch may take several steps.
        """
        assert self._body is not None
        after = step + self._steps_a_batch
        if after >= self._next_sample(step):
            return True
        lifecycle = self.config.lifecycle
        isolating = lifecycle.mode == "isolated" and lifecycle.gate_due(after)
        return isolating and any(seed.stage == "training" for seed in self._body.seeds)

    def _next_sample(self, step: int) -> int:
        """First multiple of the probes' interval after ``step``."""
        interval = self.config.probes.interval_steps
        return (step // interval + 1) * interval if interval else sys.maxsize

    def _follow_seeds(self) -> None:
        assert self._body is not None
        assert self._run is not None
        if self._body.seeds or self._guards.mounted:  # else every step would ask for the optimizers
            scaled = getattr(self._run.trainer.precision_plugin, "scaler", None) is not None
            self._guards.follow(self._run.optimizers, self._body.seeds, scaled=scaled)

    def _finish_probe(self, trainer: L.Trainer) -> None:
        probes, controller = self._probes, self._controller
        if probes is None or controller is None or not probes.active:
            return
        step_ms = (time.perf_counter() - self._step_started) * 1e3
        signals = probes.end(
            step=trainer.global_step, epoch=trainer.current_epoch, ready=controller.gatekeeper.ready,
            scores=controller.scores,
        )  # fmt: skip
        recorder = controller.recorder
        recorder.step, recorder.epoch = trainer.global_step, trainer.current_epoch
        controller.note_health(signals)
        recorder.timing(step_ms, probes.latency_ms)
        if self.config.probes.log_health:
            figures = _health_metrics(signals)
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def _close(self) -> None:
        self._drop_tracer()
        self._stop_reading()
        if self._controller is not None:
            self._controller.close()
        if self._probes is not None:
            self._probes.cancel()
        self._guards.remove()
        if self._run is not None:
            self._run.close()
        self._compilation.stop()
        if self._records is not None:
            self._records.close()
            self._records = None

    def _drop_tracer(self) -> None:
        if self._tracer is not None:
            self._tracer.close()
            self._tracer = None


def _nothing() -> None:
    """Of a run whose strategy loads checkpoints as it is."""


def _loss(outputs: Any) -> Tensor | None:
    # A dict first, which it nearly always is: asking an abstract class takes longer than all the rest here.
    value = outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs
    return value if isinstance(value, Tensor) else None


def _health_metrics(signals: Sequence[HealthSignal]) -> dict[str, float]:
    """The figures of each layer that are worth a curve, under ``health/<layer>/<figure>``."""
    shown = (
        "health_score",
        "activation_variance",
        "dead_neuron_ratio",
        "dormancy",
        "effective_rank",
        "gradient_norm",
        "update_ratio",
    )
    return {
        f"health/{signal.layer_id}/{f'{signal.seed_id}/' if signal.seed_id else ''}{figure}": getattr(
            signal, figure
        )
        for signal in signals
        for figure in shown
    }
