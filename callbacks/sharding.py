"""Growth under Lightning's ModelParallelStrategy with FSDP2: what is tried, and a run that is taken up again.

Lightning loads a sharded model's checkpoint after its layers are sharded, parameter by parameter, and passes
over what the file holds beyond them. The structure is therefore regrown before that, from the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Adam, AdamW, Optimizer

from esper.errors import CheckpointError, UnsupportedError
from esper.kasmina.loading import read_checkpoint, state_dict_in
from esper.kasmina.optimizer import reorder_groups
from esper.kasmina.seed import SeedState
from esper.kasmina.sharded import is_sharded, units
from esper.kasmina.structure import (
    all_seeds,
    conform,
    has_seeds,
    seed_states_in,
    unfollow_state_dict,
)
from esper.tamiyo.config import TamiyoConfig

__all__ = ["before_loading", "check_seeds", "check_sharded", "regrow", "shards", "untried"]

POLICIES = ("schedule", "random", "uniform")
"""Policies that decide without gradients of their own and without health signals."""


def shards(trainer: L.Trainer) -> bool:
    """Whether a trainer's strategy is the one that FSDP2 is used under."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def untried(
    trainer: L.Trainer, module: L.LightningModule, config: TamiyoConfig
) -> Iterator[tuple[str, str, str]]:
    """What goes beyond the part of growth under FSDP2 that works and is tested.

    Args:
        trainer: With a ModelParallelStrategy.
        module: The module to train.
        config: With ``sharded="experimental"``.

    Yields:
        What, why, and the way out.
    """
    strategy: Any = trainer.strategy
    if strategy._save_distributed_checkpoint:
        yield (
            "ModelParallelStrategy(save_distributed_checkpoint=True)",
            "what it writes is loaded into a model that has to have its seeds already",
            "save_distributed_checkpoint=False",
        )
    if strategy._tensor_parallel_size != 1:
        yield (
            f"ModelParallelStrategy(tensor_parallel_size={strategy._tensor_parallel_size!r})",
            "a layer's weight is divided over two dimensions then, and a seed's is not",
            "tensor_parallel_size=1, data_parallel_size=the number of processes",
        )
    if trainer.precision != "32-true":
        yield (
            f"precision={trainer.precision!r} under FSDP2",
            "nobody has tried it with seeds",
            "precision='32-true'",
        )
    if not module.automatic_optimization:
        yield (
            "manual optimization under FSDP2",
            "nobody has tried it with seeds",
            "automatic_optimization, or strategy='ddp'",
        )
    if has_seeds(module):
        yield (
            "a module with seeds under FSDP2",
            "configure_model would shard them as parts of their layers, and a resumed run as units of their own",
            "begin from an ungrown module, resume by ckpt_path, or esper.export the grown one first",
        )
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        yield (
            "averaged weights under FSDP2",
            "torch copies no sharded module, and nobody has tried averages of seeds",
            "leave the averaging callback out",
        )
    for setting, needed, why in _settings(config):
        yield f"{setting} under FSDP2", why, needed


def _settings(config: TamiyoConfig) -> Iterator[tuple[str, str, str]]:
    gradients = "it takes gradients outside of the training step, which FSDP2 would add to the step's"
    whole = "it needs whole weights, of which each process holds a part"
    if config.policy not in POLICIES:
        why = "it takes gradients or health signals, which are measured on whole weights"
        yield (
            f"policy={config.policy!r}",
            f"policy={POLICIES[0]!r}, or {' or '.join(map(repr, POLICIES[1:]))}",
            why,
        )
    if config.widen_start != "random":
        yield f"widen_start={config.widen_start!r}", "widen_start='random'", gradients
    if config.lifecycle.mode != "direct":
        why = "its gates look at gradients of seeds, which lie in several processes"
        yield f"lifecycle.mode={config.lifecycle.mode!r}", "lifecycle.mode='direct'", why
    if config.finish != "keep":
        yield f"finish={config.finish!r}", "finish='keep'", whole
    if config.birth_lr_multiplier != 1.0 or config.seed_lr_multiplier != 1.0:
        why = "scaled updates were not tried on sharded parameters"
        yield "birth_lr_multiplier or seed_lr_multiplier", "leave both at 1", why
    if config.experience is not None:
        why = "stored decisions are described by health signals, which are not measured here"
        yield "experience", "experience=None", why


def check_sharded(module: L.LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Refuse what only shows once ``configure_model`` and ``configure_optimizers`` have run.

    Raises:
        UnsupportedError: With the way out.
    """
    if not is_sharded(module):
        raise UnsupportedError(
            f"{type(module).__name__}.configure_model should call torch.distributed.fsdp.fully_shard on the layers "
            "under ModelParallelStrategy, but nothing is sharded; call it there, or use strategy='ddp'"
        )
    mixed = [unit for unit in units(module) if unit._get_fsdp_state()._mp_policy.param_dtype is not None]
    if mixed:
        raise UnsupportedError(
            "growth under FSDP2 was tried in full precision only, but fully_shard was given a MixedPrecisionPolicy "
            f"for {len(mixed)} modules; leave mp_policy out"
        )
    other = sorted({type(o).__name__ for o in optimizers if type(o) not in (Adam, AdamW)})
    if other:
        raise UnsupportedError(
            f"growth under FSDP2 works with Adam and AdamW, but the optimizers are {', '.join(other)}: torch's sharded "
            "checkpoints want a state of every parameter, and a new one's is known of these two; use AdamW"
        )


def before_loading(trainer: L.Trainer, act: Callable[[Path], object]) -> Callable[[], object]:
    """Have ``act`` called with the file that a trainer's strategy is about to load into a sharded module.

    Only the strategy is told which one that is: Lightning calls no hook between that and the loading.

    Returns:
        What undoes it.
    """
    strategy: Any = trainer.strategy
    load = strategy.load_checkpoint

    def act_and_load(checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        act(Path(checkpoint_path))
        return load(checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = act_and_load
    return lambda: strategy.__dict__.pop("load_checkpoint", None)


def regrow(module: L.LightningModule, optimizers: Sequence[Optimizer], path: Path, state_key: str) -> None:
    """Give a freshly sharded module the seeds that a checkpoint holds, before Lightning loads its values.

    Args:
        module: Sharded, without seeds.
        optimizers: Of the run, unwrapped; they get the new parameters in the order of the checkpoint.
        path: Of the checkpoint.
        state_key: Of our callback in it.

    Raises:
        CheckpointError: It is damaged, of another model, or was written without the callback.
    """
    content, states = _read(path)
    groups = content.get("callbacks", {}).get(state_key, {}).get("groups")
    if states and groups is None:
        raise CheckpointError(
            f"{path} holds {len(states)} seeds but no state of the callback that grew them, so their places in the "
            "optimizers are unknown; resume from a checkpoint that was not saved by save_weights_only"
        )
    # It would take the values, which Lightning loads one by one, for those of an ungrown model.
    unfollow_state_dict(module)
    conform(module, states)
    if groups is not None:
        reorder_groups(optimizers, groups, module.named_parameters())


def check_seeds(module: L.LightningModule, path: Path) -> None:
    """Make sure that a module has the seeds of a checkpoint; Lightning passes over those that are not there.

    Raises:
        CheckpointError: It has others.
    """
    saved = sorted(state.seed_id for state in _read(path)[1])
    found = sorted(seed.seed_id for seed in all_seeds(module))
    if saved != found:
        raise CheckpointError(
            f"{path} holds seeds {', '.join(saved) or 'none'}, but the sharded module that it is to be loaded into has "
            f"{', '.join(found) or 'none'}; under ModelParallelStrategy only fit(ckpt_path=...) regrows a module: "
            "esper.load it into an unsharded one, and test that"
        )


def _read(path: Path) -> tuple[dict[str, Any], list[SeedState]]:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a distributed checkpoint, which growth does not read; use one that was saved with "
            "ModelParallelStrategy(save_distributed_checkpoint=False)"
        )
    content = read_checkpoint(path)
    return content, seed_states_in(state_dict_in(content, path))
