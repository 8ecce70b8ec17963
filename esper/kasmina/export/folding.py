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
    containers_of,
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

    wanted = None if example is None else expected(example)
    return _fold(draft, example, wanted), expected


def _fold(draft: Draft, example: Example | None, wanted: list[Tensor] | None) -> Draft:
    low_rank = [[branch.seed_id] for branch in draft.branches if hasattr(branch.module, "delta_weight")]
    draft = _fold_all(draft, low_rank, lambda t, b: merge_low_rank(t, b[0]), example, wanted)
    # The last one at a block first: all go right behind it.
    blocks = [[branch.seed_id] for branch in reversed(draft.branches) if branch.reads == "block"]
    draft = _fold_all(draft, blocks, lambda t, b: _stack(t, b[0], example), example, wanted)
    wider = [[b.seed_id for b in group] for group in widening_groups(draft, _chains(draft, example))]
    draft = _fold_all(draft, wider, widen_layers, example, wanted)
    for branch in draft.branches:
        if branch.functional:
            raise ExportError(
                f"seed {branch.seed_id} at {branch.site} acts on a weight that is used without calling its layer, and "
                "could not be merged into it: " + "; ".join(draft.notes)
            )
    return draft


def _fold_all(
    draft: Draft,
    groups: list[list[str]],
    fold: Callable[[Draft, list[Branch]], str | None],
    example: Example | None,
    wanted: list[Tensor] | None,
) -> Draft:
    """Fold each of ``groups`` of seeds that can be; all in one copy of the draft if that holds, else one by one.

    Copies and runs cost as much as the model is large, and adapters may stand at every layer of it.

    Args:
        draft: Not changed but for notes.
        groups: Seeds that have to be folded in one go.
        fold: Folds one group; returns why it cannot, without having changed anything.
        example: What the result is tried on.
        wanted: Its outputs.
    """
    together, fault = _attempt(draft, groups, fold, example, wanted)
    if fault is None:
        return together
    for ids in groups:
        trial, fault = _attempt(draft, [ids], fold, example, wanted) if len(groups) > 1 else (together, fault)
        if fault is None:
            draft = trial
        else:
            draft.keep(ids, fault)
    return draft


def _attempt(
    draft: Draft,
    groups: list[list[str]],
    fold: Callable[[Draft, list[Branch]], str | None],
    example: Example | None,
    wanted: list[Tensor] | None,
) -> tuple[Draft, str | None]:
    """Fold ``groups`` in a copy of ``draft``, and try it; return the copy, and why it does not hold."""
    if not groups:
        return draft, None
    trial = deepcopy(draft)
    for ids in groups:
        reason = fold(trial, [branch for branch in trial.branches if branch.seed_id in ids])
        if reason is not None:
            trial.keep(ids, reason)
    return trial, None if example is None or wanted is None else _fault(trial, example, wanted)


def _fault(trial: Draft, example: Example, wanted: list[Tensor]) -> str | None:
    """Why the folds in ``trial`` do not hold: other outputs, or blocks that the host does not run in turn."""
    blocks = [layers[0] for layers in trial.layers.values() if len(layers) == 1]
    calls = dict.fromkeys(map(id, blocks), 0)

    def count(block: nn.Module, *_: Any) -> None:
        calls[id(block)] += 1

    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        with trial.running() as model:
            gap = difference(wanted, outputs_of(model, example))
    except Exception as error:  # a host that looks at its layers, or indexes its blocks, may raise anything
        return f"the model fails with it: {type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    if wrong := [number for number in calls.values() if number != 1]:
        return f"the host calls the inserted block {wrong[0]} times, and not once"
    return f"outputs would differ by {gap:.3g}" if gap > tolerance(wanted) else None


def _stack(draft: Draft, branch: Branch, example: Example | None) -> str | None:
    """Stack, where it is known, or can be tried, that the host runs through the container."""
    lists = [c for c in containers_of(draft.model, branch.target) if isinstance(c, nn.ModuleList)]
    if example is None and lists:
        return "without an example it is not known whether the host runs its blocks in a loop"
    return stack_block(draft, branch)


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
