"""Everything that a run writes down or sends: journal, experiences, bus, listeners."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn.parameter import is_lazy

from esper.kasmina.loading import GrowableMixin
from esper.kasmina.structure import has_seeds
from esper.messages import Command, Event, RunRecord
from esper.oona import CommandInbox, Publisher
from esper.report.journal import Journal
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.experience.recording import ExperienceRecorder, RecordingPolicy
from esper.tamiyo.recorder import Recorder
from esper.tamiyo.state import Policy

__all__ = ["Records"]

_INBOX_INTERVAL_S = 0.05


class Records:
    """The open journal, store of experiences and bus of one ``fit``, and the recorder that feeds them.

    Args:
        config: Where journal and experiences go, and the bus.
        run_id: Of the run.
        trainer: Gives the folder.
        listeners: Called with every event, on every rank; journal, experiences and bus are rank 0's.
        resumed_at: Optimizer steps of the checkpoint that is continued; what the journal says of later
            ones is dropped, because it will be said again. None for a new run.
    """

    def __init__(
        self,
        config: TamiyoConfig,
        run_id: str,
        trainer: L.Trainer,
        listeners: Sequence[Callable[[Event], None]],
        *,
        resumed_at: int | None,
    ) -> None:
        growing = config.policy != "off"
        path = Path(config.journal or "growth.jsonl")
        if not config.journal and (growing or config.bus is not None):
            # On every rank: Lightning asks rank 0 for the folder, once a fit.
            path = Path(trainer.log_dir or trainer.default_root_dir) / path
        self._config = config
        self._run_id = run_id
        self._journal: Journal | None = None
        self._publisher: Publisher | None = None
        self._inbox: CommandInbox | None = None
        self._inbox_read_at = float("-inf")
        self._undone: int | None = None
        self._experiences: ExperienceRecorder | None = None
        if trainer.is_global_zero and growing and config.experience is not None:
            # first, because a file that is no store is refused
            self._experiences = ExperienceRecorder(config.experience, run_id, rewards=config.rewards)
            listeners = [*listeners, self._experiences.hear]
        if trainer.is_global_zero and (config.journal or (growing and not trainer.fast_dev_run)):  # type: ignore[attr-defined]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(path)
            if resumed_at is not None:
                self._undone = self._journal.truncate_after(resumed_at, run_id)
        if trainer.is_global_zero and config.bus is not None:
            self._publisher = Publisher(run_id, config.bus, run_dir=path.parent).open()
            self._inbox = CommandInbox(run_id, config.bus, run_dir=path.parent).open()
        self.recorder = Recorder(run_id, self._journal, self._publisher, listeners)

    def recorded(self, policy: Policy) -> Policy:
        """``policy``, with its decisions recorded where experiences are kept."""
        return policy if self._experiences is None else RecordingPolicy(policy, self._experiences)

    def commands(self) -> list[Command]:
        """What has come in; a person does not notice a twentieth of a second, a short step would notice the look."""
        now = time.monotonic()
        if self._inbox is None or now - self._inbox_read_at < _INBOX_INTERVAL_S:
            return []
        self._inbox_read_at = now
        return self._inbox.poll()

    def mark(self, event: Literal["start", "resume", "end"], trainer: L.Trainer, **info: Any) -> None:
        """Record begin, continuation or end of the run.

        A continuation tells in ``events_undone`` how many events had been written after its checkpoint:
        they were taken out of the journal, because what happens after the checkpoint happens once more.
        """
        facts = {
            "policy": self._config.policy,
            "seed": self._config.seed,
            "torch": str(torch.__version__),
            "num_parameters": sum(p.numel() for p in trainer.lightning_module.parameters() if not is_lazy(p)),
        }
        if self._config.experience is not None:
            facts["experience"] = str(Path(self._config.experience).absolute())
        if event == "resume" and self._undone is not None:
            facts["events_undone"] = self._undone
        self.recorder.run(RunRecord(self._run_id, event, trainer.global_step, {**facts, **info}, time.time()))

    def note(self, trainer: L.Trainer, **info: Any) -> None:
        """Record plain facts."""
        self.recorder.run(RunRecord(self._run_id, "note", trainer.global_step, info, time.time()))

    def tell_how_to_load(self, module: L.LightningModule) -> None:
        """Say it where ``load_from_checkpoint`` would stop at the seeds' keys: it asks no callback."""
        if has_seeds(module) and not isinstance(module, GrowableMixin):
            rank_zero_info(
                f"{type(module).__name__} has grown: load its checkpoints by esper.load(model, path), or let the class "
                "inherit from esper.GrowableMixin, in front, so that its load_from_checkpoint regrows them"
            )

    def close(self) -> None:
        """Close journal, experiences and bus."""
        for resource in (self._inbox, self._publisher, self._journal, self._experiences):
            if resource is not None:
                resource.close()
