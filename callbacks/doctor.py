"""Look at a model before it is trained: what can grow, what conflicts, and what growth could cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.callbacks.checks import Conflict, conflicts, optimizer_conflicts
from esper.callbacks.random_state import drawn_apart
from esper.errors import AttachError, EsperError
from esper.kasmina.body import mean_output
from esper.kasmina.diagnosis import Diagnosis, SitePrices, diagnose
from esper.kasmina.example import Example
from esper.kasmina.sites import Site
from esper.quiet import quiet
from esper.tamiyo.config import BudgetConfig

__all__ = ["Checkup", "check_up"]

_SEED = 0
"""Of random numbers that the model draws while it is looked at: two looks tell the same."""


@dataclass(frozen=True)
class Checkup:
    """What a look at a model found.

    Attributes:
        model: Its class.
        diagnosis: Sites, refused layers, prices.
        conflicts: With the trainer's settings and the optimizers; refusals and warnings.
        budget: Under which growth would go on.
        notes: What could not be looked at.
    """

    model: str
    diagnosis: Diagnosis
    conflicts: tuple[Conflict, ...]
    budget: BudgetConfig
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether something can grow and nothing would be refused."""
        return bool(self.diagnosis.sites) and all(c.kind != "refused" for c in self.conflicts)

    @property
    def parameters_allowed(self) -> int:
        """Parameters that the budget lets growth add, as :meth:`esper.tamiyo.ledger.Ledger.parameters_left` counts."""
        found = self.diagnosis
        base = found.num_trained or found.num_parameters
        return max(0, int(self.budget.max_parameters_ratio * base) - base - found.num_grown)

    @property
    def flops_allowed(self) -> tuple[int, int]:
        """Forward FLOPs a sample that so many parameters add, at the place where they add least, and most."""
        rates = [s.usual.flops / s.usual.parameters for s in self.diagnosis.sites if s.usual.parameters]
        allowed = self.parameters_allowed
        return round(min(rates, default=0.0) * allowed), round(max(rates, default=0.0) * allowed)

    def as_dict(self) -> dict[str, Any]:
        """The whole of it in plain values, as ``esper doctor --json`` prints it."""
        ratio = self.budget.max_flops_ratio
        low, high = self.flops_allowed
        return {
            "model": self.model,
            "healthy": self.healthy,
            "host": {
                "parameters": self.diagnosis.num_parameters,
                "trained_parameters": self.diagnosis.num_trained,
                "forward_flops": self.diagnosis.flops,
            },
            "budget": {
                "max_parameters_ratio": self.budget.max_parameters_ratio,
                "max_flops_ratio": ratio if math.isfinite(ratio) else None,
                "parameters_allowed": self.parameters_allowed,
                "forward_flops_least": low,
                "forward_flops_most": high,
            },
            "sites": [_site_dict(entry) for entry in self.diagnosis.sites],
            "refused": self.diagnosis.refused,
            "faults": self.diagnosis.faults,
            "conflicts": [asdict(conflict) for conflict in self.conflicts],
            "notes": list(self.notes),
        }


def _site_dict(entry: SitePrices) -> dict[str, Any]:
    site: Site = entry.site
    return {
        "site": site.name,
        "kind": site.kind,
        "source": site.source,
        "target": site.target,
        "blueprints": list(site.blueprints),
        "usual": entry.usual._asdict(),
        "cheapest": entry.cheapest._asdict(),
    }


def check_up(
    model: nn.Module,
    batch: Any,
    *,
    callback_type: type[L.Callback],
    budget: BudgetConfig,
    trainer: L.Trainer | None = None,
    step: bool = True,
) -> Checkup:
    """Look at ``model`` without changing it: everything happens on a copy, with random numbers set aside.

    Args:
        model: A LightningModule, or any module.
        batch: What its training step is given; of a plain module, its input: a tensor, a tuple of positional or a
            dict of keyword arguments.
        callback_type: The class of our callback.
        budget: Limits of growth.
        trainer: Whose settings are looked at; a LightningModule can be looked at without.
        step: Whether ``batch`` is for the training step; False if it is for ``forward``.

    Raises:
        AttachError: The model cannot be copied, or fails on the batch.
    """
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    found: list[Conflict] = []
    notes: list[str] = []
    with drawn_apart(_SEED), quiet():
        patient = _copied(model)
        if isinstance(patient, L.LightningModule):
            batch = _moved(patient, batch)
            patient.trainer = _bare_trainer() if trainer is None else trainer
        own_step = step and isinstance(patient, L.LightningModule)
        run = _step_run(patient) if own_step else _forward_run(patient)
        diagnosis = diagnose(patient, _explained(run, name), batch if own_step else Example.of(batch))
        if isinstance(model, L.LightningModule) and isinstance(patient, L.LightningModule):
            if trainer is not None:
                found += conflicts(trainer, callback_type, model)
            found += _look_at_optimizers(patient, notes)
    return Checkup(name, diagnosis, tuple(found), budget, tuple(notes))


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a part of the user's module raises that cannot be copied
        raise AttachError(
            f"the doctor looks at a copy, but a {type(model).__name__} cannot be copied "
            f"({type(error).__name__}: {error}); keep what cannot be copied (files, locks, generators) out of the "
            "module, or look at its network alone"
        ) from error


def _moved(module: L.LightningModule, batch: Any) -> Any:
    """A copy of ``batch``, through the module's own transfer hooks.

    Before the module has a trainer: the hooks would ask that for its loaders.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    own = module._on_before_batch_transfer(copy.deepcopy(batch))
    return module._apply_batch_transfer_handler(own, device=device)


def _step_run(module: nn.Module) -> Callable[[Any], Tensor]:
    """The module's own loss on a batch."""
    assert isinstance(module, L.LightningModule)
    name = "training_step" if module.automatic_optimization else "validation_step"
    if not is_overridden(name, module):
        raise AttachError(
            f"the loss of a batch is taken from {type(module).__name__}.{name}, which it does not have; define it, or "
            "give an input for forward instead"
        )
    function = getattr(module, name)
    index = [0] if is_param_in_hook_signature(function, "batch_idx", min_args=2) else []
    module.__dict__["log"] = module.__dict__["log_dict"] = _ignore  # there is no loop to log to

    def run(batch: Any) -> Tensor:
        output = function(batch, *index)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise AttachError(
                f"{type(module).__name__}.{name} should return the loss, a tensor or a dict with 'loss', but returned "
                f"{type(output).__name__}"
            )
        return loss

    return run


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict``."""


def _forward_run(model: nn.Module) -> Callable[[Example], Tensor]:
    """A loss made of all that the model's forward returns."""
    return lambda example: mean_output(model(*example.args, **example.kwargs))


def _explained(run: Callable[[Any], Tensor], name: str) -> Callable[[Any], Tensor]:
    """Tell which model failed, and on what, when it does."""

    def loss(batch: Any) -> Tensor:
        try:
            return run(batch)
        except EsperError:
            raise
        except Exception as error:  # a user's module may raise anything
            raise AttachError(
                f"{name} failed on the batch that the doctor gave it: {type(error).__name__}: {error}; give a batch "
                "that it can be trained on"
            ) from error

    return loss


def _bare_trainer() -> L.Trainer:
    """What a step finds when it asks ``self.trainer`` for its epoch or its number of devices."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _look_at_optimizers(module: L.LightningModule, notes: list[str]) -> list[Conflict]:
    """Conflicts with the optimizers that ``module`` configures; a note where it cannot do so yet."""
    if not is_overridden("configure_optimizers", module):
        return []
    try:
        configured = module.configure_optimizers()
    except Exception as error:  # it may need the trainer's loaders, which no one has set up
        notes.append(
            f"the optimizers were not looked at: configure_optimizers failed outside of a run "
            f"({type(error).__name__}: {error})"
        )
        return []
    return optimizer_conflicts(_optimizers_in(configured))


def _optimizers_in(value: Any) -> Iterator[Optimizer]:
    """The optimizers in whatever form ``configure_optimizers`` may return them."""
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, Mapping):
        yield from _optimizers_in(value.get("optimizer"))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _optimizers_in(item)
