"""``finish="retrain"``: once the search is over, train the found shape from fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.blueprints import get_blueprint, make_branch
from esper.kasmina.body import Body
from esper.kasmina.layer import SEEDS
from esper.kasmina.structure import build_context
from esper.tamiyo.host_run import HostRun
from esper.tamiyo.snapshot import renew_optimizer_state

__all__ = ["Retraining"]


class Retraining:
    """Keeps the host's first weights until they are needed again.

    The learning-rate schedule goes on where it is.

    Args:
        body: The host, untrained as yet.
        run: Gives the optimizers, whose moments are cleared.
        seed: Of the ordinary initialisation of what was grown.
    """

    def __init__(self, body: Body, run: HostRun, seed: int) -> None:
        self._body = body
        self._run = run
        self._seed = seed
        self._host_start: dict[str, Tensor] | None = {
            name: value.detach().clone()
            for name, value in body.model.state_dict().items()
            if isinstance(value, Tensor)
        }

    @property
    def done(self) -> bool:
        """Whether the network has been started afresh."""
        return self._host_start is None

    def due(self, fraction: float, window_end: float) -> bool:
        """Whether the growth window is over and every seed is settled."""
        if self.done or fraction <= window_end:
            return False
        return all(seed.stage == "fossilized" for seed in self._body.seeds)

    def apply(self) -> None:
        """Give the host its first weights back and grown branches ordinary ones; forget all moments."""
        assert self._host_start is not None
        model = self._body.model
        with torch.no_grad():
            live = model.state_dict()
            for name, value in self._host_start.items():
                if name in live and SEEDS not in name.split("."):
                    live[name].copy_(value)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            for seed in self._body.seeds:
                context = build_context(model, seed.site, seed.record.output_projections)
                # A branch anew, because not every module of a blueprint can reset itself; then with the
                # initialisation that a net of this shape would have, not the silent one of a birth.
                fresh = make_branch(
                    get_blueprint(seed.blueprint), context, seed.size, device=torch.device("cpu")
                )
                for module in fresh.modules():
                    reset = getattr(module, "reset_parameters", None)
                    if callable(reset):
                        reset()
                seed.branch.load_state_dict(fresh.state_dict())
        renew_optimizer_state(model, self._run.optimizers, None)
        self._host_start = None

    def state_dict(self) -> dict[str, Any]:
        """The first weights, while they are kept."""
        return {"host_start": self._host_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self._host_start = state["host_start"]
