"""Export a grown model as plain torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn

from esper.errors import ExportError
from esper.kasmina.example import Example, kept_example
from esper.kasmina.export.draft import Draft
from esper.kasmina.export.folding import folded_draft
from esper.kasmina.export.graph import capture_graph, capture_program, needs_esper, place_branches
from esper.kasmina.export.report import ExportReport, Route
from esper.kasmina.export.verify import check_batches

__all__ = ["export", "export_with_report"]

_log = logging.getLogger(__name__)


def export(model: nn.Module, example_input: Any = None) -> nn.Module:
    """Return a copy of a grown model in plain torch modules that runs without esper.

    Seeds become part of the host where that is possible: ``widen`` and ``conv_widen`` as really wider
    layers, ``lowrank`` in the weight, ``stack`` in the host's ``Sequential`` or ``ModuleList``. The others
    stay branches, in a ``torch.fx`` graph or, for control flow that cannot be traced, in a program of
    ``torch.export``. Seeds that do not act yet (germinated, isolated) are left out; blending ones are
    exported at their α, with a warning. The result is in evaluation mode, on the same device; its outputs
    are those of the model in evaluation within 1e-5 (of the largest output, where that is above one).

    Args:
        model: A model with or without seeds, or a part of one; it is not changed.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments. By default what the
            model kept when it was traced. Every step of the export is proved on it.

    Raises:
        ExportError: No route gives the same outputs; the message lists what was tried.
    """
    return export_with_report(model, example_input)[0]


def export_with_report(model: nn.Module, example_input: Any = None) -> tuple[nn.Module, ExportReport]:
    """As :func:`export`, with an account of what became of each seed.

    Args:
        model: See :func:`export`.
        example_input: See :func:`export`.
    """
    example = kept_example(model) if example_input is None else Example.of(example_input).like(model)
    draft, expected = folded_draft(model, example)
    failures: list[str] = []
    for route, build in _routes(draft, example):
        trial = deepcopy(draft)
        try:
            result = build(trial)
            worst = None if example is None else check_batches(expected, result, example)
        except ExportError as error:
            failures.append(f"{route}: {error}")
            continue
        report = ExportReport(
            route=route,
            folded=tuple(draft.folded),
            branches=tuple(branch.seed_id for branch in draft.branches),
            left_out=tuple(draft.left_out),
            max_difference=worst,
            notes=(*draft.notes, *(f"not exported as {failure}" for failure in failures)),
        )
        _log.info("%s", report)
        return result, report
    hint = (
        ""
        if example is not None
        else "; pass example_input=, which allows further ways and proves the result"
    )
    tried = "; ".join((*draft.notes, *failures))
    raise ExportError(f"{type(model).__name__} cannot be exported{hint}. Tried: {tried}")


def _routes(draft: Draft, example: Example | None) -> list[tuple[Route, Callable[[Draft], nn.Module]]]:
    routes: list[tuple[Route, Callable[[Draft], nn.Module]]] = []
    if not any(b.crosses for b in draft.branches) and not any(needs_esper(m) for m in draft.model.modules()):
        routes.append(("modules", place_branches))
    routes.append(("graph", lambda trial: capture_graph(trial, example)))
    if example is not None:
        routes.append(("program", lambda trial: capture_program(trial, example)))
    return routes
