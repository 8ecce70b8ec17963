"""The draft of an export: a plain copy of the host, and beside it the branches that still act on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from esper.errors import ExportError
from esper.kasmina.cache_place import cache_among, first_free_number, own_place
from esper.kasmina.example import forget_example
from esper.kasmina.layer import SEEDS, primary, replace_primary, restore_class, seeds_of
from esper.kasmina.seed import Seed
from esper.kasmina.structure import unfollow_state_dict

__all__ = ["Branch", "Draft", "copy_model"]

_ACTING = ("blending", "holding", "fossilized")
_LINKS = ("_trainer", "_fabric")
"""What ties a LightningModule to its run; a copy must not drag trainer, loaders and optimizers along."""


@dataclass(eq=False)
class Branch:
    """A seed's contribution: ``alpha * module(x)`` added to ``target``'s output.

    Attributes:
        seed_id: Of the seed.
        blueprint: What it is made of.
        site: Name of its site.
        module: The branch.
        reads: ``source``, ``output`` or ``block``, as the blueprint registered it.
        alpha: Weight.
        source: Layer whose input it reads (when ``reads`` is ``source``).
        target: Layer to whose output it adds.
        through: Parameterised layers on the way from source to target.
        functional: It adds to the target's weight, not to its output.
    """

    seed_id: str
    blueprint: str
    site: str
    module: nn.Module
    reads: str
    alpha: float
    source: nn.Module
    target: nn.Module
    through: tuple[nn.Module, ...]
    functional: bool

    @property
    def crosses(self) -> bool:
        """Whether it reads another layer's input, so that it cannot live at its target alone."""
        return self.reads == "source" and self.source is not self.target


@dataclass(eq=False)
class Draft:
    """A plain model and the branches that are not part of it yet; a deepcopy is an independent trial.

    Attributes:
        model: The copy of the host.
        branches: What acts beside it.
        folded: Seeds that the model holds now.
        left_out: Seeds that do not act yet.
        notes: What else a reader of the report should know.
        reasons: Why a seed was not folded, where folding was tried.
        layers: The host's modules that a folded seed became part of.
    """

    model: nn.Module
    branches: list[Branch]
    folded: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    layers: dict[str, tuple[nn.Module, ...]] = field(default_factory=dict)
    _inputs: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Draft:
        """Copy ``model`` and take its seeds out of the copy.

        Raises:
            ExportError: The model cannot be copied, or is a part of a model whose seeds reach outside it.
        """
        copy = copy_model(model).eval()
        draft = cls(copy, [])
        for name, module in copy.named_modules():
            for seed in seeds_of(module):
                assert isinstance(seed, Seed)
                draft._take(copy, name, seed)
        for module in copy.modules():
            module._modules.pop(SEEDS, None)
            restore_class(module)
        forget_example(copy)
        unfollow_state_dict(copy)
        return draft

    def _take(self, copy: nn.Module, name: str, seed: Seed) -> None:
        state = seed.state
        if state.stage not in _ACTING:
            self.left_out.append(state.seed_id)
            return
        if state.stage == "blending":
            self.notes.append(
                f"seed {state.seed_id} at {state.site.name} is still blending: exported at alpha = {state.alpha:.3g}"
            )

        def inside(layer: str) -> nn.Module:
            try:
                return copy.get_submodule(_renamed(layer, state.site.target, name))
            except AttributeError as error:
                raise ExportError(
                    f"seed {state.seed_id} at {state.site.name} reads layer {layer!r}, which lies outside the module "
                    "given to export; export the whole model"
                ) from error

        self.branches.append(
            Branch(
                seed_id=state.seed_id,
                blueprint=state.blueprint,
                site=state.site.name,
                module=seed.branch,
                reads=seed.reads,
                alpha=1.0 if state.stage != "blending" else state.alpha,
                source=inside(state.site.source),
                target=inside(state.site.target),
                through=tuple(inside(layer) for layer in state.site.through),
                functional=state.site.functional,
            )
        )

    def at(self, target: nn.Module) -> list[Branch]:
        """Branches that add to the output of ``target``, in the order in which they run."""
        return [branch for branch in self.branches if branch.target is target]

    def drop(self, branch: Branch) -> None:
        """Take ``branch`` off the list: the model holds it now."""
        self.branches = [other for other in self.branches if other is not branch]
        self.folded.append(branch.seed_id)
        block = branch.reads == "block"
        self.layers[branch.seed_id] = (branch.module,) if block else (branch.source, branch.target)

    def keep(self, seed_ids: list[str], reason: str) -> None:
        """Note why these seeds stay branches."""
        self.reasons |= dict.fromkeys(seed_ids, reason)
        self.notes.append(f"{', '.join(seed_ids)} not folded: {reason}")

    def adopt(self) -> str:
        """Register the branches as children of the model, so that a capture finds their weights.

        Returns:
            Name of the child that holds them, by seed id.
        """
        name = "grown"
        while hasattr(self.model, name):
            name += "_"
        self.model.add_module(
            name, nn.ModuleDict({branch.seed_id: branch.module for branch in self.branches})
        )
        return name

    # The two halves of what a seed layer does, for eager runs (by hooks) and for tracing alike.

    def note_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the input of ``layer`` if a branch reads it."""
        if any(branch.source is layer and branch.reads == "source" for branch in self.branches):
            self._inputs[id(layer)] = args[0] if args else next(iter(kwargs.values()))

    def add_branches(self, layer: nn.Module, y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output ``y`` of ``layer`` with the contributions of its branches."""
        for branch in self.at(layer):
            host = primary(y)
            if branch.reads == "block":
                # Where α is one the block's output is all there is; otherwise it counts by its change.
                output = primary(self._run_block(branch, host, args[1:], _further(args, kwargs)))
                y = replace_primary(
                    y, output if branch.alpha == 1.0 else host + branch.alpha * (output - host)
                )
                continue
            s = branch.module(host if branch.reads == "output" else self._inputs[id(branch.source)])
            y = replace_primary(y, host + (s if branch.alpha == 1.0 else branch.alpha * s))
        return y

    def _run_block(self, branch: Branch, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = cache_among(args, kwargs)
        if cache is None:
            return branch.module(x, *args, **kwargs)
        with own_place(cache, branch.module, branch.seed_id, first_free_number(self.model)):
            return branch.module(x, *args, **kwargs)

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The model with its branches at work, for as long as the block runs."""
        handles = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.note_input(layer, args, kwargs)

        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            return self.add_branches(layer, y, args, kwargs)

        for layer in {id(b.source): b.source for b in self.branches if b.reads == "source"}.values():
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        for layer in {id(b.target): b.target for b in self.branches}.values():
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
        try:
            yield self.model
        finally:
            for handle in handles:
                handle.remove()
            self._inputs.clear()


def copy_model(model: nn.Module) -> nn.Module:
    """Deepcopy ``model`` without the trainer that it may be linked to.

    Raises:
        ExportError: It holds something that cannot be copied.
    """
    links = [(m, link, m.__dict__[link]) for m in model.modules() for link in _LINKS if link in m.__dict__]
    for module, link, _ in links:
        module.__dict__[link] = None
    try:
        return deepcopy(model)
    except Exception as error:  # whatever the user's attributes raise
        raise ExportError(
            f"export works on a copy, but this {type(model).__name__} cannot be copied ({type(error).__name__}: "
            f"{error}); drop attributes such as tensors with a graph, or export the submodule that computes"
        ) from error
    finally:
        for module, link, value in links:
            module.__dict__[link] = value


def _renamed(layer: str, target: str, name: str) -> str:
    """The name of ``layer`` in a part, or a wrapper, of its model, in which ``target`` is called ``name``.

    Raises:
        AttributeError: The layer lies outside.
    """
    if target.endswith(name):
        prefix = target[: len(target) - len(name)]
        if not layer.startswith(prefix):
            raise AttributeError(layer)
        return layer[len(prefix) :]
    return name.removesuffix(target) + layer


def _further(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments but the first input, when that was given by keyword."""
    return kwargs if args else dict(list(kwargs.items())[1:])
