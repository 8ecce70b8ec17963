"""What growth has cost and what it may still cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.kasmina.body import Body
from esper.kasmina.layer import SEEDS
from esper.tamiyo.config import BudgetConfig

__all__ = ["Ledger"]


class Ledger:
    """Counts training FLOPs, germinations and parameters against a budget.

    A training step of a network with F forward FLOPs a sample costs 3·F·samples (forward once,
    backward twice). Scoring sites and seeds that were culled later are charged like everything else.

    Args:
        budget: The limits.
        host_parameters: Parameters of the ungrown host.
        host_flops: Forward FLOPs a sample of the ungrown host.
        num_processes: Processes that train on equally many samples each; what one does, all do.
    """

    def __init__(
        self, budget: BudgetConfig, host_parameters: int, host_flops: int, *, num_processes: int = 1
    ) -> None:
        self.budget = budget
        self.num_processes = num_processes
        self.host_parameters = host_parameters
        self.host_flops = host_flops
        self.base_parameters: int | None = None
        self.training_flops = 0.0
        self.host_training_flops = 0.0
        self.scoring_flops = 0.0
        self.measuring_flops = 0.0
        self.num_samples = 0
        self.germinated = 0
        self.fossilized = 0
        self.culled = 0
        self.recycled = 0
        self._epoch = -1
        self._germinated_this_epoch = 0
        self._last_use: dict[str, int] = {}
        self._embargo: dict[str, int] = {}

    def charge_step(self, body_flops: int, num_samples: int) -> None:
        """Charge one batch of training, of this process and as many of every other."""
        num_samples *= self.num_processes
        self.num_samples += num_samples
        self.training_flops += 3.0 * body_flops * num_samples
        self.host_training_flops += 3.0 * self.host_flops * num_samples

    def charge_scoring(self, flops: float) -> None:
        """Charge the scoring of sites, which has a budget of its own (:meth:`may_score`)."""
        self.scoring_flops += flops * self.num_processes
        self.training_flops += flops * self.num_processes

    def charge_measurement(self, flops: float) -> None:
        """Charge any other pass over held-out batches: for a gate, a birth or a recycled layer."""
        self.measuring_flops += flops * self.num_processes
        self.training_flops += flops * self.num_processes

    def may_score(self, flops: float, step: int, total_steps: int) -> bool:
        """Whether scoring for ``flops`` keeps it within its share of the whole run's training FLOPs."""
        expected = self.host_training_flops / max(1, step) * total_steps
        return self.scoring_flops + flops * self.num_processes <= self.budget.max_scoring_fraction * expected

    def parameters_left(self, body: Body) -> int:
        """Parameters that may still be added.

        The budget's ratio is to the parameters of the host that were trained when this was first asked; to all
        of them where none was. A frozen network of millions would otherwise allow seeds of millions.
        """
        if self.base_parameters is None:
            trained = sum(
                p.numel()
                for name, p in body.model.named_parameters()
                if p.requires_grad and SEEDS not in name.split(".")
            )
            self.base_parameters = trained or self.host_parameters
        grown = body.num_parameters - self.host_parameters
        return int(self.budget.max_parameters_ratio * self.base_parameters) - self.base_parameters - grown

    def flops_left(self, step: int, total_steps: int) -> float:
        """Training FLOPs that growth may still add over the rest of the run."""
        if self.budget.max_flops_ratio == float("inf"):
            return float("inf")
        expected = self.host_training_flops / max(1, step) * total_steps
        return self.budget.max_flops_ratio * expected - (self.training_flops - self.host_training_flops)

    def germinations_left(self, epoch: int) -> int:
        """Germinations that this epoch still allows."""
        used = self._germinated_this_epoch if epoch == self._epoch else 0
        return self.budget.max_germinations_per_epoch - used

    def note_germination(self, site: str, step: int, epoch: int) -> None:
        """Count a germination at ``site``."""
        if epoch != self._epoch:
            self._epoch, self._germinated_this_epoch = epoch, 0
        self._germinated_this_epoch += 1
        self.germinated += 1
        self._last_use[site] = step

    def embargo(self, site: str, until_step: int) -> None:
        """Close ``site`` until ``until_step``."""
        self._embargo[site] = max(until_step, self._embargo.get(site, 0))

    @property
    def embargoes(self) -> int:
        """Sites that are closed."""
        return len(self._embargo)

    def lifted(self, step: int) -> list[str]:
        """Sites whose embargo has just run out; they are open again."""
        over = [site for site, until in self._embargo.items() if step >= until]
        for site in over:
            del self._embargo[site]
        return over

    def unavailable(self, site: str, step: int) -> str:
        """Why ``site`` may not be used now; empty when it may."""
        if site in self._embargo:
            return f"under embargo until step {self._embargo[site]}"
        last = self._last_use.get(site)
        if last is not None and step - last < self.budget.site_cooldown_steps:
            return f"cooling down until step {last + self.budget.site_cooldown_steps}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {key.lstrip("_"): _copy(value) for key, value in vars(self).items() if key not in _GIVEN}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        for key in vars(self):
            if key not in _GIVEN:
                setattr(self, key, _copy(state[key.lstrip("_")]))


_GIVEN = ("budget", "num_processes")
"""What a run is given, and does not take over from a checkpoint."""


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
