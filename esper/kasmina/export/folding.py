"""Fold what can be folded of a model's seeds, and prove each fold on an example."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esper.errors import EsperError, ExportError
from esper.kasmina.body import mean_output
from esper.kasmina.example import Example
from esper.kasmina.export.draft import Branch, Draft, copy_model
from esper.kasmina.export.fold import (
    is_widening,
    merge_low_rank,
    stack_block,
    widen_layers,
    widening_groups,
)
from esper.kasmina.export.graph import single_chain
from esper.kasmina.export.verify import difference, outputs_of, tolerance
from esper.kasmina.trace import trace

__all__ = ["Expected", "folded_draft"]

_log = logging.getLogger(__name__)

Expected = Callable[[Example], list[Tensor]]
"""From an example to the outputs that an export has to have for it."""


def folded_draft(model: nn.Module, example: Example | None) -> tuple[Draft, Expected]:
    """Copy ``model`` and fold whatever can be folded of its seeds.

    Each fold is tried on a copy of the draft and kept if it holds on the example.

    Args:
        model: A model with or without seeds; it is not changed.
        example: What the folds are tried on; without it, structure alone has to prove them.

    Returns:
        The draft, and a function from an example to the outputs that the model has for it in evaluation.

    Raises:
        ExportError: The model cannot be copied, or a seed that has to be folded cannot.
    """
    draft = Draft.of(model)
    for note in draft.notes:
        _log.warning("%s", note)
    original = copy_model(model).eval()

    def expected(varied: Example) -> list[Tensor]:
        return outputs_of(original, varied)

    return _fold(draft, example, expected), expected


def _fold(draft: Draft, example: Example | None, expected: Expected) -> Draft:
    for branch in list(draft.branches):
        if hasattr(branch.module, "delta_weight"):
            draft = _attempt(draft, [branch.seed_id], lambda t, b: merge_low_rank(t, b[0]), example, expected)
    for branch in reversed(list(draft.branches)):  # the last one at a block first: all go right behind it
        if branch.reads == "block":
            draft = _attempt(
                draft, [branch.seed_id], lambda t, b: _stack(t, b[0], example), example, expected
            )
    for group in widening_groups(draft, _chains(draft, example)):
        ids = [branch.seed_id for branch in group]
        draft = _attempt(draft, ids, lambda t, b: widen_layers(t, b), example, expected)
    for branch in draft.branches:
        if branch.functional:
            raise ExportError(
                f"seed {branch.seed_id} at {branch.site} acts on a weight that is used without calling its layer, and "
                "could not be merged into it: " + "; ".join(draft.notes)
            )
    return draft


def _attempt(
    draft: Draft,
    ids: list[str],
    fold: Callable[[Draft, list[Branch]], str | None],
    example: Example | None,
    expected: Expected,
) -> Draft:
    """Fold the branches ``ids`` in a copy of ``draft``; return the copy, or ``draft`` with the reason noted."""
    trial = deepcopy(draft)
    reason = fold(trial, [branch for branch in trial.branches if branch.seed_id in ids])
    if reason is None and example is not None:
        wanted = expected(example)
        try:
            with trial.running() as model:
                gap = difference(wanted, outputs_of(model, example))
        except Exception as error:  # a host that looks at its layers may raise anything
            reason = f"the model fails with it: {type(error).__name__}: {error}"
        else:
            if gap > tolerance(wanted):
                reason = f"outputs would differ by {gap:.3g}"
    if reason is None:
        return trial
    draft.keep(ids, reason)
    return draft


def _stack(draft: Draft, branch: Branch, example: Example | None) -> str | None:
    """Stack, and make sure that the host really runs through the container."""
    reason = stack_block(draft, branch)
    if reason is not None:
        return reason
    if example is None:
        parents = [m for m in draft.model.modules() if any(child is branch.module for child in m.children())]
        iterated = all(isinstance(parent, nn.Sequential) for parent in parents)
        return (
            None
            if iterated
            else "without an example it is not known whether the host runs its blocks in a loop"
        )
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = branch.module.register_forward_hook(count)
    try:
        with draft.running() as model:
            example.run(model)
    except Exception as error:  # a host that indexes its blocks may raise anything
        return f"the model fails with one block more: {type(error).__name__}: {error}"
    finally:
        handle.remove()
    return None if calls == 1 else f"the host calls the inserted block {calls} times, and not once"


def _chains(draft: Draft, example: Example | None) -> list[Branch]:
    """Widening branches whose source layer's units are read by their target alone."""
    candidates = []
    for branch in filter(is_widening, draft.branches):
        mixing = [type(norm).__name__ for norm in branch.through if not isinstance(norm, _BatchNorm)]
        if mixing:
            draft.keep(
                [branch.seed_id], f"{mixing[0]} between the two layers would mix host units with new ones"
            )
        else:
            candidates.append(branch)
    if not candidates:
        return []
    if example is None:
        found = [b for b in candidates if type(b.source) is type(b.target) and single_chain(draft.model, b)]
    else:
        found = _traced_chains(draft, candidates, example)
    for branch in candidates:
        if not any(branch is other for other in found):
            draft.keep(
                [branch.seed_id], "it is not certain that only the layer it adds to reads its source layer"
            )
    return found


def _traced_chains(draft: Draft, candidates: list[Branch], example: Example) -> list[Branch]:
    names = {id(module): name for name, module in draft.model.named_modules()}
    try:
        topology = trace(draft.model, lambda: mean_output(draft.model(*example.args, **example.kwargs)))
    except EsperError as error:
        draft.notes.append(f"widened layers not folded: the model cannot be traced ({error})")
        return []
    layers = {layer.name: layer for layer in topology.layers}

    def alone(branch: Branch) -> bool:
        path = [names[id(m)] for m in (branch.source, *branch.through, branch.target)]
        return all(
            first in layers
            and layers[first].num_calls == 1
            and not layers[first].is_output
            and [edge.target for edge in topology.consumers(first)] == [second]
            for first, second in pairwise(path)
        )

    return [branch for branch in candidates if alone(branch)]
