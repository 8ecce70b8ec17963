"""Blocks that know their number, and configs that say how many there are.

Transformers' blocks carry their position (``layer_idx``: their place in the cache of keys and values), and
the model's config the number of blocks and, in lists, what is peculiar to each. One block more in the
container has to show in all of it, or generation reads another block's place. Told by shape and name;
nothing here imports the library.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from esper.kasmina.cache_place import numbered_in

__all__ = ["adopt_configs", "config_of", "deepen_configs", "is_config", "numbering", "renumber"]

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""What configs call the number of blocks where there is one stack."""

_SIDES = {
    "decoder": ("decoder_layers", "num_decoder_layers"),
    "encoder": ("encoder_layers", "num_encoder_layers"),
}
"""What the config of an encoder-decoder calls it, by a part of the container's name."""


def config_of(module: nn.Module) -> Any | None:
    """The config that ``module`` itself holds, if it looks like one of transformers."""
    config = module.__dict__.get("config")
    return config if is_config(config) else None


def is_config(value: Any) -> bool:
    """Whether ``value`` looks like a config of transformers."""
    return callable(getattr(value, "to_dict", None)) and callable(getattr(value, "to_json_string", None))


def numbering(blocks: list[nn.Module]) -> int | None:
    """The number of the first block, where all modules in each block know its position counted from there.

    Returns:
        None where that is not how they are numbered; 0 where no block knows a number.
    """
    known = [{number for _, _, number in numbered_in(block)} for block in blocks]
    starts = {number - position for position, numbers in enumerate(known) for number in numbers}
    return None if len(starts) > 1 else next(iter(starts), 0)


def renumber(blocks: list[nn.Module], start: int) -> None:
    """Give every module in ``blocks`` that knows a number the one of its block, counted from ``start``."""
    for position, block in enumerate(blocks):
        for module, name, _ in numbered_in(block):
            module.__dict__[name] = start + position


def adopt_configs(copy: nn.Module, original: nn.Module) -> None:
    """Let each module of ``copy`` hold the very config that its counterpart in ``original`` holds."""
    counterparts = dict(original.named_modules())
    for name, module in copy.named_modules():
        if config_of(module) is not None and name in counterparts:
            module.__dict__["config"] = counterparts[name].__dict__["config"]


def deepen_configs(model: nn.Module, container: str, position: int, count: int) -> None:
    """Note one block more in every config of ``model`` that says how many ``container`` holds.

    Args:
        model: The model, whose container is longer already. Its configs are changed in place.
        container: The container's name in it.
        position: Where the new block stands; it repeats the entries of the block before it.
        count: Blocks that there were before.
    """
    path = container.split(".")
    if any(
        isinstance(model.get_submodule(".".join(path[:end])), nn.ModuleList) for end in range(1, len(path))
    ):
        return  # one of several lists, as in the stages of a Swin: the plain fields count the stages
    owners = _owners(model, container)
    configs = {id(config): config for config in owners}
    for number, config in enumerate(configs.values()):
        # The stack's own config counts this stack; one that it shares with another stack has a name for each.
        own = number == 0 and len(configs) > 1
        names = _depth_names(config, container)
        for name in (*names, *_DEPTHS) if own else names:
            if getattr(config, name, None) == count:
                setattr(config, name, count + 1)
        for name, values in list(vars(config).items()):
            if "layer" in name and _per_block(values, count):
                longer = [*values[:position], values[position - 1], *values[position:]]
                setattr(config, name, type(values)(longer))


def _per_block(values: Any, count: int) -> bool:
    """Whether ``values`` lists something of each block; a list that counts upwards names blocks instead."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return False
    return not all(type(value) is int for value in values) or list(values) != sorted(set(values))


def _owners(model: nn.Module, container: str) -> list[Any]:
    """Configs of the modules around ``container``, the innermost first."""
    path = container.split(".")
    around = [model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)]
    return [config for config in map(config_of, around) if config is not None]


def _depth_names(config: Any, container: str) -> tuple[str, ...]:
    """Names under which ``config`` counts the blocks of ``container``."""
    for side, names in _SIDES.items():
        if side in container:
            found = tuple(name for name in names if hasattr(config, name))
            if found:
                return (*found, *_DEPTHS) if side == "encoder" else found
            # T5 counts its encoder's blocks by the plain name, and its decoder's by one of their own.
    return _DEPTHS
