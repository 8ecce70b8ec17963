"""A Lightning trainer and its module, as the strategist wants to see them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from esper.callbacks.distributed import ProcessRanks, wrap_again
from esper.callbacks.held_out import first_batches
from esper.callbacks.run_length import estimated_steps
from esper.callbacks.sharding import shards
from esper.errors import GrowthError, UnsupportedError
from esper.kasmina.optimizer import unwrap
from esper.kasmina.sharded import fill_new_state, put_at_rest
from esper.kasmina.trace import preserved
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.ranks import Ranks

__all__ = ["BatchLoss", "LightningRun", "batch_size"]

_RECORDS = ("journal", "experience", "rewards", "bus")
_TORCH_OWN = frozenset(torch.nn.Module().__dict__)


class BatchLoss:
    """The module's loss on one fixed batch; calling it leaves logs and metrics as they were."""

    def __init__(self, run: LightningRun, batch: Any, index: int, *, moved: bool = False) -> None:
        self._run, self._batch, self._index, self._moved = run, batch, index, moved

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return batch_size(self._batch)

    def __call__(self) -> Tensor:
        """Run the module's step on the batch and return its loss.

        Raises:
            UnsupportedError: The step returned no loss.
        """
        return self._run.loss(self._batch, self._index, moved=self._moved)


class LightningRun:
    """Implements :class:`esper.tamiyo.host_run.HostRun` on a trainer.

    Args:
        trainer: The trainer, fitting.
        module: Its module.
        num_batches: Held-out batches to keep.
        horizon_steps: Length of the run where the trainer cannot tell it.
        ranks: The processes that train the module together; one by default.
        seed: Of a shuffling validation loader's order, as held-out batches are drawn from it.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        *,
        num_batches: int,
        horizon_steps: int | None,
        ranks: Ranks | None = None,
        seed: int = 0,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.trainer = trainer
        self.module = module
        self._num_batches = num_batches
        self._horizon_steps = horizon_steps
        self._seed = seed
        self._held_out: list[BatchLoss] | None = None
        self._held_out_step = "training_step" if module.automatic_optimization else "validation_step"
        self._no_held_out = "nothing: the run does not validate"
        self.last_batch: Any = None

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The torch optimizers, without Lightning's wrappers."""
        return [unwrap(optimizer) for optimizer in self.trainer.optimizers]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            UnsupportedError: The trainer has no end and no horizon was given.
        """
        steps = estimated_steps(self.trainer)
        if steps != float("inf") and steps > 0:
            return int(steps)
        if self._horizon_steps is None:
            raise UnsupportedError(
                "growth is planned over the length of the run, but the trainer has no known end (max_epochs=-1 or "
                "an iterable data set of unknown length); pass TamiyoCallback(horizon_steps=N), or set max_steps"
            )
        return self._horizon_steps

    def held_out(self) -> Sequence[BatchLoss]:
        """The first validation batches; empty when the run does not validate, or its loss on them cannot be had."""
        if self._held_out is None:
            batches = self._validation_batches()
            if batches and not self._has_loss_on(batches[0]):
                batches = []
            self._held_out = [BatchLoss(self, batch, index) for index, batch in enumerate(batches)]
        return self._held_out

    def held_out_source(self) -> str:
        """Where the held-out batches come from."""
        count = len(self.held_out())
        return f"the first {count} validation batches" if count else self._no_held_out

    def recent(self) -> BatchLoss:
        """The batch that was trained on last."""
        return BatchLoss(self, self.last_batch, 0, moved=True)

    def structure_changed(self) -> None:
        """Let DDP or FSDP2 know of it; the optimizers were told by whoever changed the structure."""
        wrap_again(self.trainer.strategy, self.module)
        if shards(self.trainer):
            for optimizer in self.optimizers:
                fill_new_state(optimizer)

    def check_alike(self, config: TamiyoConfig, sites: Sequence[str]) -> None:
        """Make sure that every process trains the same model with the same settings.

        Args:
            config: All settings; those of the records may differ.
            sites: Names of the sites that this process has found.

        Raises:
            GrowthError: They differ; every process raises it.
        """
        if self.ranks.size == 1:
            return
        settings = {f.name: repr(getattr(config, f.name)) for f in fields(config) if f.name not in _RECORDS}
        first, *others = self.ranks.exchange("settings and sites", [settings, list(sites)])
        for rank, (other, found) in enumerate(others, start=1):
            unlike = [name for name, value in first[0].items() if other[name] != value]
            unlike += sorted(set(found) ^ set(first[1]))[:5]
            if unlike:
                raise GrowthError(
                    "every process should find the same sites for seeds and have the same settings, but rank 0 and "
                    f"rank {rank} differ in {', '.join(unlike)}; give all processes the same, and let the model's "
                    "data flow hang neither on the rank nor on the data"
                )

    def failed(self, exception: BaseException) -> None:
        """Tell the other processes why this one stops, or find out why they did."""
        if isinstance(self.ranks, ProcessRanks):
            self.ranks.failed(exception)

    def close(self) -> None:
        """End the talk with the other processes; safe to call twice."""
        if isinstance(self.ranks, ProcessRanks):
            self.ranks.close()
        self.ranks = Ranks()

    def loss(self, batch: Any, index: int, *, moved: bool = False) -> Tensor:
        """The loss of the module's own step on ``batch``: ``training_step``, or ``validation_step``
        under manual optimization, where a training step would train. Validation batches of a form that
        ``training_step`` does not take go to ``validation_step`` too.

        Args:
            batch: As its loader gave it.
            index: Its number there.
            moved: It has been through the module's transfer hooks and is on the device already.

        Raises:
            UnsupportedError: The step returned no loss.
        """
        module = self.module
        of_training = "training_step" if module.automatic_optimization else "validation_step"
        name = of_training if moved else self._held_out_step
        step = getattr(module, name)
        # By position, as Lightning gives them: a module may call them what it likes.
        arguments = [index] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else []
        if name == "validation_step" and is_param_in_hook_signature(step, "dataloader_idx", min_args=3):
            arguments.append(0)
        with _silenced(module), _uncached_autocast(), self.trainer.precision_plugin.forward_context():
            if not moved:
                batch = module._on_before_batch_transfer(self.trainer.precision_plugin.convert_input(batch))
                batch = self.trainer.strategy.batch_to_device(batch)
            output = step(batch, *arguments)
        if shards(self.trainer) and not torch.is_grad_enabled():
            put_at_rest(module)  # what follows tells parameters by identity
        value = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"growth measures the loss of a batch by {type(module).__name__}.{name}, which should return a tensor "
                f"or a dict with 'loss', but returned {type(output).__name__}; return the loss there"
            )
        return value

    def _validation_batches(self) -> list[Any]:
        trainer = self.trainer
        if not trainer.enable_validation or not self._returns_loss():
            return []
        if trainer.val_dataloaders is None:
            with preserved(self.module):  # making a loader may draw, from a user's transforms or a split
                trainer.fit_loop.epoch_loop.val_loop.setup_data()
        return first_batches(trainer.val_dataloaders, self._num_batches, seed=self._seed)

    def _has_loss_on(self, batch: Any) -> bool:
        """Find the step that takes a validation batch: ``training_step`` does not have to, where the two loaders
        give batches of different forms.
        """
        failures = []
        steps = [self._held_out_step]
        if steps == ["training_step"] and is_overridden("validation_step", self.module):
            steps.append("validation_step")
        for name in steps:
            self._held_out_step = name
            try:
                with preserved(self.module), torch.no_grad():
                    self.module.eval()
                    self.loss(batch, 0)
            except Exception as error:  # a step may stumble on a foreign batch in any way: told below
                if isinstance(error, UnsupportedError) and name == steps[0]:
                    raise  # it gives no loss for a training batch either
                failures.append(f"{name}: {type(error).__name__}: {error}")
            else:
                return True
        rank_zero_warn(
            "growth has no held-out loss and measures on training batches, because no step of "
            f"{type(self.module).__name__} gave a loss for a validation batch ({'; '.join(failures)}); "
            "return the loss from validation_step"
        )
        self._no_held_out = "training batches: no step gave a loss for a validation batch"
        return False

    def _returns_loss(self) -> bool:
        return self.module.automatic_optimization or is_overridden("validation_step", self.module)


def batch_size(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor found in it, 1 when there is none."""
    if type(batch) in (tuple, list) and batch and type(batch[0]) is Tensor:
        shape = batch[0].shape
        if shape and shape[0]:
            return shape[0]  # nearly every batch, in a quarter of the time
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.dim() else 1
    if isinstance(batch, Mapping):
        items: Any = batch.values()
    elif isinstance(batch, (tuple, list)):
        items = batch
    else:
        items = vars(batch).values() if hasattr(batch, "__dict__") else ()
    for item in items:
        if isinstance(item, (Tensor, Mapping, tuple, list)) and (size := batch_size(item)):
            return size
    return 1


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Keep weights that a pass without gradients has cast from being used by a later pass that needs them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _silenced(module: L.LightningModule) -> Iterator[None]:
    """Run a step of ``module`` without its ``log`` calls, and without moving its metrics or what it gathers."""

    def ignore(*args: Any, **kwargs: Any) -> None:
        """Stands in for ``log`` and ``log_dict`` while a measurement runs."""

    with ExitStack() as stack:
        for metric in module.modules():
            if isinstance(metric, Metric):
                stack.callback(
                    _restore_metric, metric, metric._copy_state_dict(), metric._update_count, metric._computed
                )
        for name, value in module.__dict__.items():
            if name not in _TORCH_OWN and type(value) in (list, dict, set, int, float):
                stack.callback(_restore_gathered, module, name, value, copy.copy(value))
        for name in ("log", "log_dict"):
            previous = module.__dict__.get(name)
            module.__dict__[name] = ignore
            stack.callback(_restore_attribute, module, name, previous)
        yield


def _restore_metric(metric: Metric, state: dict[str, Any], count: int, computed: Any) -> None:
    for name, value in state.items():
        setattr(metric, name, value)
    metric._update_count = count
    metric._computed = computed


def _restore_gathered(module: torch.nn.Module, name: str, value: Any, before: Any) -> None:
    """Undo what a step appended or counted; a container stays the same object."""
    if isinstance(value, list):
        value[:] = before
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(before)
    module.__dict__[name] = value


def _restore_attribute(module: L.LightningModule, name: str, previous: Any) -> None:
    if previous is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = previous
