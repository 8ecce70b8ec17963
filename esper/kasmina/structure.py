"""Plant and uproot seeds, and make a model's structure follow a state dict.

A seed's structure travels in the state dict itself (:meth:`Seed.get_extra_state`), because
``save_weights_only`` checkpoints and plain ``torch.save(model.state_dict())`` hold nothing else,
and Lightning's callback hooks come too late to regrow (LIGHTNING.md §2). A pre-hook on the root
module reads it before any weight is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from esper.errors import CheckpointError, EsperError, GrowthError
from esper.kasmina.blueprints import get_blueprint, make_branch
from esper.kasmina.cache_place import first_free_number
from esper.kasmina.compiled_names import differ_by_compilation
from esper.kasmina.fast_path import close_after, open_for
from esper.kasmina.layer import SEEDS, Tap, get_slot, rest, seeds_of, swap_class
from esper.kasmina.lazy import settle_by_state
from esper.kasmina.seed import Seed, SeedState
from esper.kasmina.sharded import is_sharded, put_at_rest, shard_as, why_unusable
from esper.kasmina.sites import BuildContext, Site
from esper.kasmina.validation import check_state_dict, seed_states_in

__all__ = [
    "SeedIndex",
    "all_seeds",
    "build_context",
    "conform",
    "follow_state_dict",
    "follows_state_dict",
    "has_seeds",
    "plant",
    "seed_states_in",
    "unfollow_state_dict",
    "uproot",
]


_num_changes = 0
"""Seeds planted and uprooted in this process so far, in whatever model."""


class SeedIndex:
    """The seeds of one model, looked up once for each change of structure.

    A walk over all modules costs as much as a small layer's forward pass, and a training step asks
    for the seeds several times. Only :func:`plant` and :func:`uproot` change what there is.
    """

    def __init__(self) -> None:
        self._at = -1
        self._seeds: tuple[Seed, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {"_at": -1, "_seeds": ()}  # in another process, or in a copy, changes are counted afresh

    def of(self, model: nn.Module) -> list[Seed]:
        """What :func:`all_seeds` returns; always for the same model."""
        if self._at != _num_changes:
            self._seeds, self._at = tuple(all_seeds(model)), _num_changes
        return list(self._seeds)


def _note_change() -> None:
    global _num_changes
    _num_changes += 1


def all_seeds(model: nn.Module) -> list[Seed]:
    """Every seed in ``model``, in module order."""
    return [seed for module in model.modules() for seed in seeds_of(module) if isinstance(seed, Seed)]


def has_seeds(model: nn.Module) -> bool:
    """Whether ``model`` carries any seed."""
    return any(SEEDS in module._modules for module in model.modules())


def build_context(model: nn.Module, site: Site, output_projections: tuple[str, ...] = ()) -> BuildContext:
    """Look up the layers of ``site`` in ``model``.

    Raises:
        GrowthError: The model has no such layer.
    """
    try:
        return BuildContext(
            site, model.get_submodule(site.source), model.get_submodule(site.target), output_projections
        )
    except AttributeError as error:
        raise GrowthError(
            f"site {site.name!r} needs layers {site.source!r} and {site.target!r}, but the model has "
            f"no such layer ({error}); was the seed grown in another model?"
        ) from error


def plant(model: nn.Module, state: SeedState, *, init_seed: int) -> Seed:
    """Build the seed that ``state`` describes and put it into ``model``.

    Args:
        model: The host.
        state: Site, blueprint, size, stage.
        init_seed: Seeds the branch's random initialisation; the global random state is untouched.

    Returns:
        The seed, on the device and in the dtype of its target layer.

    Raises:
        GrowthError: The site or the blueprint does not fit the model. Nothing was changed.
    """
    site = state.site
    context = build_context(model, site, state.output_projections)
    entry = get_blueprint(state.blueprint)
    sharded = is_sharded(model)
    if sharded and (reason := why_unusable(site.kind, functional=site.functional)):
        raise GrowthError(f"no seed can grow at {site.name!r}: its layer is {reason}; choose another site")
    if sharded:
        put_at_rest(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(init_seed)
        branch = make_branch(entry, context, state.size, device=torch.device("cpu"))
    reference = next(context.target_layer.parameters())
    branch.to(device=reference.device, dtype=reference.dtype)
    if sharded:
        shard_as(branch, context.target_layer)
    tap = Tap() if site.source != site.target and entry.reads == "source" else None
    seed = Seed(state, branch, entry.reads, tap)
    seed.to(device=reference.device)
    seed.train(context.target_layer.training)
    if entry.reads == "block":
        seed.first_free_number = first_free_number(model)

    swap_class(context.target_layer, functional=site.functional)
    get_slot(context.target_layer)
    if tap is not None:
        swap_class(context.source_layer)
        get_slot(context.source_layer).taps.append(tap)
    if SEEDS not in context.target_layer._modules:
        context.target_layer.add_module(SEEDS, nn.ModuleDict())
    holder = context.target_layer._modules[SEEDS]
    assert isinstance(holder, nn.ModuleDict)
    holder[state.seed_id] = seed
    open_for(model, site.target, seed)
    _note_change()
    return seed


def uproot(model: nn.Module, seed: Seed) -> None:
    """Take ``seed`` out of ``model``; what is left is as if it had never been there."""
    target = model.get_submodule(seed.site.target)
    holder = target._modules[SEEDS]
    assert isinstance(holder, nn.ModuleDict)
    del holder[seed.seed_id]
    _note_change()
    if len(holder) == 0:
        del target._modules[SEEDS]
    if seed.tap is not None:
        source = model.get_submodule(seed.site.source)
        slot = get_slot(source)
        slot.taps = [tap for tap in slot.taps if tap is not seed.tap]
        rest(source)
    rest(target)
    close_after(model, seed.site.target)


def conform(model: nn.Module, wanted: list[SeedState]) -> None:
    """Plant and uproot until ``model`` carries exactly the ``wanted`` seeds.

    Seeds that are there already, with the same site, blueprint and size, stay as they are.

    Raises:
        CheckpointError: A wanted seed does not fit the model. Nothing was changed.
    """
    present = {seed.seed_id: seed for seed in all_seeds(model)}
    kept = {
        state.seed_id
        for state in wanted
        if state.seed_id in present and _same_structure(present[state.seed_id].state, state)
    }
    missing = [state for state in wanted if state.seed_id not in kept]
    for state in missing:
        try:
            context = build_context(model, state.site, state.output_projections)
            make_branch(get_blueprint(state.blueprint), context, state.size, device=torch.device("meta"))
        except EsperError as error:
            raise CheckpointError(
                f"seed {state.seed_id!r} of the checkpoint does not fit this model: {error}"
            ) from error
    for seed_id, seed in present.items():
        if seed_id not in kept:
            uproot(model, seed)
    for state in missing:
        plant(model, state, init_seed=0)


def follow_state_dict(model: nn.Module) -> None:
    """Make ``model.load_state_dict`` grow or ungrow the model first; does nothing the second time."""
    if not follows_state_dict(model):
        model.register_load_state_dict_pre_hook(_before_load)


def follows_state_dict(model: nn.Module) -> bool:
    """Whether ``model.load_state_dict`` grows or ungrows the model first."""
    return any(
        getattr(hook, "hook", hook) is _before_load for hook in model._load_state_dict_pre_hooks.values()
    )


def unfollow_state_dict(model: nn.Module) -> None:
    """Undo :func:`follow_state_dict`, so that nothing in ``model`` refers to esper any more."""
    for module in model.modules():
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", hook) is _before_load:
                del module._load_state_dict_pre_hooks[key]


def _before_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    settle_by_state(module, state_dict, prefix)
    # All of it is checked before the first seed is planted: a foreign checkpoint changes nothing.
    try:
        states = check_state_dict(module, state_dict, prefix=prefix, strict=strict)
    except CheckpointError as error:
        if not prefix and differ_by_compilation(module, state_dict):
            raise CheckpointError(
                f"{error}. Its keys and this model's differ by the '_orig_mod' of torch.compile(part): compile the "
                "same parts before the checkpoint is loaded, or load its weights by esper.load, which renames them"
            ) from error
        raise
    conform(module, states)


def _same_structure(a: SeedState, b: SeedState) -> bool:
    return (a.site.name, a.blueprint, a.size) == (b.site.name, b.blueprint, b.size)
