"""What a user asks of the callback by hand: seeds, health, figures, a check-up."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from esper.callbacks.compilation import CompilationWatch
from esper.callbacks.doctor import Checkup, check_up
from esper.errors import GrowthError
from esper.kasmina.body import Body
from esper.kasmina.sites import Site
from esper.messages import Decision, HealthSignal
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.controller import Controller

__all__ = ["ByHand"]


class ByHand:
    """The part of a growing callback that has nothing to do with Lightning's hooks.

    Attributes:
        config: All settings.
    """

    config: TamiyoConfig
    _body: Body | None
    _controller: Controller | None
    _compilation: CompilationWatch
    _requests: list[Decision]

    @property
    def body(self) -> Body:
        """The attached host: topology, sites, seeds.

        Raises:
            GrowthError: No batch has been trained on yet, so nothing is known about the model.
        """
        if self._body is None:
            raise GrowthError("the model is traced on its first training batch; call trainer.fit(...) first")
        return self._body

    def germinate(self, site: str | Site, blueprint: str, size: int | None = None) -> None:
        """Ask for a seed by hand; it is vetted and applied at the next safe point of the run."""
        name = site.name if isinstance(site, Site) else site
        self._requests.append(
            Decision(
                action="germinate", site=name, blueprint=blueprint, size=size or 0, policy="manual",
                reason="asked for by hand",
            )
        )  # fmt: skip

    def cull(self, seed_id: str) -> None:
        """Ask for the removal of a seed by hand at the next safe point."""
        self._requests.append(
            Decision(action="cull", site=seed_id, policy="manual", reason="asked for by hand")
        )

    def recycle(self, layer: str) -> None:
        """Ask by hand that the dormant units of ``layer`` be re-initialised at the next safe point."""
        self._requests.append(
            Decision(action="recycle", site=layer, policy="manual", reason="asked for by hand")
        )

    def health(self) -> list[HealthSignal]:
        """The last health signal of each layer and seed; empty before the first sampled step."""
        return [] if self._controller is None else list(self._controller.health.values())

    def doctor(self, model: L.LightningModule, batch: Any, *, trainer: L.Trainer | None = None) -> Checkup:
        """Print what can grow in ``model``, what cannot and why, what conflicts, and what growth could cost.

        Everything happens on a copy: the model, its gradients and buffers and all random numbers stay as they are.

        Args:
            model: That will be trained.
            batch: One of its training batches.
            trainer: That will train it, to look at its settings.

        Returns:
            What was printed, as data.

        Raises:
            AttachError: The model cannot be copied, or fails on the batch.
        """
        from rich.console import Console

        from esper.callbacks.tamiyo import TamiyoCallback  # here, because it builds on this
        from esper.report.checkup import checkup_tables

        found = check_up(
            model, batch, callback_type=TamiyoCallback, budget=self.config.budget, trainer=trainer
        )
        Console(highlight=False).print(checkup_tables(found.as_dict()))
        return found

    def summary(self) -> dict[str, float]:
        """Size and cost of the run: ``num_parameters``, ``training_flops``, the seeds' counts, and how often
        ``torch.compile`` compiled a function during the last ``fit``, and how often one that it had compiled before.

        Raises:
            GrowthError: No batch has been trained on yet.
        """
        body = self.body
        assert self._controller is not None
        ledger = self._controller.ledger
        return {
            "num_parameters": body.num_parameters,
            "trainable_parameters": sum(p.numel() for p in body.model.parameters() if p.requires_grad),
            "host_parameters": ledger.host_parameters,
            "training_flops": ledger.training_flops,
            "scoring_flops": ledger.scoring_flops,
            "measuring_flops": ledger.measuring_flops,
            "num_samples": ledger.num_samples,
            "seeds_germinated": ledger.germinated,
            "seeds_fossilized": ledger.fossilized,
            "seeds_culled": ledger.culled,
            "layers_recycled": ledger.recycled,
            "compilations": self._compilation.num_compilations,
            "recompilations": self._compilation.num_recompilations,
        }
