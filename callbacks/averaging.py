"""Averages of weights beside a growing run: their copies of the module grow and are culled with it.

Lightning's averaging callbacks (2.6) keep a deepcopy of the module and pair it with the module by the order
of parameters and buffers. As soon as the two differ in structure, weights land on other layers, silently. So
every change of structure is mirrored at once, within the safe point at which it happens; what the callbacks
do afterwards, before or behind ours in the list, then pairs the right tensors.

The average of a seed begins at the seed's own first value. Growth preserves the function, so that is the
average over the run as if the seed had been there, silent, from its first step.
"""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as L
import msgspec
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from esper.errors import GrowthError, UnsupportedError
from esper.kasmina.layer import SEEDS
from esper.kasmina.structure import all_seeds, conform, follow_state_dict
from esper.messages import DecisionRecord, Event, GovernorRecord

__all__ = ["Averages", "averaged_copy"]

_Averaging = StochasticWeightAveraging | WeightAveraging


def averaged_copy(callback: L.Callback) -> nn.Module | None:
    """The copy of the module in which an averaging callback gathers; None for other callbacks, or before ``setup``."""
    if isinstance(callback, StochasticWeightAveraging):
        return callback._average_model
    if isinstance(callback, WeightAveraging) and callback._average_model is not None:
        return callback._average_model.module
    return None


class Averages:
    """Keeps the copies of a trainer's averaging callbacks in the shape of the module.

    Make it in ``setup``, before a checkpoint is loaded: the copies then regrow from theirs.

    Args:
        module: The module that grows.
        callbacks: All of the trainer's.
    """

    def __init__(self, module: L.LightningModule, callbacks: Iterable[L.Callback]) -> None:
        self._module = module
        self._callbacks = [callback for callback in callbacks if isinstance(callback, _Averaging)]
        self._restart = False
        for copy in self._copies():
            # Made before the module got its hook; a copy that is still to be made takes the hook along.
            follow_state_dict(copy)

    def check(self) -> None:
        """Refuse a callback whose average is no copy of the whole module; call it before training.

        A copy that came from no checkpoint gets the seeds of the module, which did.

        Raises:
            UnsupportedError: Its average has other layers than the module.
        """
        for callback in self._callbacks:
            copy = averaged_copy(callback)
            if copy is not None and (different := _difference(_host(self._module), _host(copy))):
                raise UnsupportedError(
                    f"growth needs the average of {type(callback).__name__} to be a copy of the module, to grow it "
                    f"along, but they differ in {different}; average the whole LightningModule, as the callback does "
                    "unless its setup is overridden"
                )
        self.follow()

    def follow(self) -> None:
        """Give every copy the seeds that the module has now; call it after each change, before the next step.

        Raises:
            GrowthError: A copy differs from the module in more than seeds.
        """
        for copy in self._copies():
            _mirror(self._module, copy)
        if self._restart:
            self._restart = False
            self._begin_again()

    def sync(self) -> None:
        """Give the seeds of every copy the stage and the strength α of the originals.

        They are facts of the run and no weights to be averaged: an average would trail behind a blend, and
        stand in a checkpoint as a strength that no step had. Call it before a copy is exchanged or saved.
        """
        for copy in self._copies():
            for seed, twin in zip(all_seeds(self._module), all_seeds(copy), strict=True):
                assert seed.seed_id == twin.seed_id
                twin.adopt(msgspec.structs.replace(seed.state))

    def note(self, event: Event) -> None:
        """Hear what happens to the run; a listener of its events.

        After a rollback, and when the found shape starts afresh, what was averaged belongs to weights that the
        run has given up; the next :meth:`follow` begins the averages again from the weights as they are.
        """
        if isinstance(event, GovernorRecord):
            self._restart |= event.action == "rollback"
        elif isinstance(event, DecisionRecord):
            self._restart |= event.applied and event.decision.policy == "finish=retrain"

    def _copies(self) -> list[nn.Module]:
        found = [averaged_copy(callback) for callback in self._callbacks]
        return [copy for copy in found if copy is not None]

    def _begin_again(self) -> None:
        for callback in self._callbacks:
            copy = averaged_copy(callback)
            if copy is None:
                continue
            _copy_values(_tensors(self._module), _tensors(copy))
            if isinstance(callback, WeightAveraging):
                assert callback._average_model is not None
                callback._average_model.n_averaged.zero_()
            elif callback.n_averaged is not None:
                callback.n_averaged.zero_()


def _mirror(module: nn.Module, copy: nn.Module) -> None:
    """Plant and uproot in ``copy`` until its tensors correspond to those of ``module``, one by one and in order."""
    present = {seed.seed_id for seed in all_seeds(copy)}
    seeds = all_seeds(module)
    conform(copy, [msgspec.structs.replace(seed.state) for seed in seeds])
    _order_seeds(module, copy)
    if different := _difference(_tensors(module), _tensors(copy)):
        raise GrowthError(
            f"the averaged copy of the module should differ from it in values only, but it does in {different}; "
            "do not change the module's layers during a run that averages weights"
        )
    twins = {seed.seed_id: seed for seed in all_seeds(copy)}
    for seed in seeds:
        # Untrained: whatever was done since it was planted (a fitted start) belongs to its first value.
        if seed.seed_id not in present or seed.record.age_steps == 0:
            _copy_values(_tensors(seed), _tensors(twins[seed.seed_id]))


def _difference(originals: dict[str, Tensor], averages: dict[str, Tensor]) -> str:
    """What keeps the tensors of two modules from corresponding one by one; empty when nothing does."""
    if different := sorted(originals.keys() ^ averages.keys()):
        return ", ".join(different[:5])
    shapes = [name for name, value in originals.items() if averages[name].shape != value.shape]
    if shapes:
        return f"the shapes of {', '.join(shapes[:5])}"
    return "" if [*originals] == [*averages] else "the order of their layers"


def _order_seeds(module: nn.Module, copy: nn.Module) -> None:
    """Put the seeds of each layer of ``copy`` in the order of ``module``; after a rollback it may be another."""
    for name, holder in module.named_modules():
        if name.split(".")[-1] == SEEDS:
            twin = copy.get_submodule(name)._modules
            for seed_id in holder._modules:
                twin[seed_id] = twin.pop(seed_id)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, in the order in which averaging callbacks pair them."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _host(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in _tensors(module).items() if SEEDS not in name.split(".")}


@torch.no_grad()
def _copy_values(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
