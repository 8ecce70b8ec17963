"""Export a grown model of transformers to its own kind: the same class, with more blocks or wider ones.

A GPT-2 of six blocks that grew to twelve *is* a GPT-2 of twelve blocks: its config says so, and
``from_pretrained`` loads it where esper is not installed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper.errors import ExportError, MissingExtraError
from esper.kasmina.example import Example, kept_example
from esper.kasmina.export.draft import Draft
from esper.kasmina.export.folding import Expected, folded_draft
from esper.kasmina.export.graph import needs_esper
from esper.kasmina.export.own_config import UnfitError, changed_fields, fitted_config
from esper.kasmina.export.own_kind import rebuilt
from esper.kasmina.export.report import PretrainedReport
from esper.kasmina.export.verify import check_batches
from esper.kasmina.structure import all_seeds
from esper.kasmina.trace import preserved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PretrainedReport", "export_pretrained", "save_pretrained"]

_log = logging.getLogger(__name__)

_INSTEAD = "esper.export keeps such seeds as branches beside the host's layers"


def export_pretrained(model: nn.Module, example_input: Any = None, *, fill: bool = False) -> PreTrainedModel:
    """Return a grown model of transformers as a larger model of its own class.

    ``stack`` seeds become blocks of the host's ``ModuleList`` and count in the config
    (``num_hidden_layers``, lists such as ``layer_types``); ``widen`` seeds become wider layers, if every
    block was widened alike (``intermediate_size``); ``lowrank`` seeds are merged into the weights. The
    result is built by the class from the new config, and its outputs are those of the grown model in
    evaluation within 1e-5 (of the largest output, where that is above one). It is in evaluation mode, on the
    same device and in the same dtype, with the generation config; tied weights are tied. Save it with its own
    ``save_pretrained``.

    Args:
        model: A ``PreTrainedModel`` with or without seeds, or a module (a LightningModule) that holds one;
            it is not changed.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of the
            ``PreTrainedModel``. By default what the model kept when it was traced, else random tokens or
            images of the config's sizes. The result is proved on it.
        fill: Where blocks were widened unequally, fill the narrower ones up with new units that are silent but
            can learn (random fan-in, zero fan-out). Otherwise that is an error.

    Raises:
        ExportError: The grown model is none of its class any more: the message says which seeds stand in the
            way and what to do. Or the module holds no ``PreTrainedModel``, or several.
        MissingExtraError: ``transformers`` is not installed.
    """
    return _export(model, example_input, fill)[0]


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], example_input: Any = None, *, fill: bool = False
) -> PretrainedReport:
    """Export ``model`` to its own kind and write it to ``folder``, as ``from_pretrained`` reads it.

    The folder is written under another name, read back, compared with the model, and then put into place.

    Args:
        model: See :func:`export_pretrained`.
        folder: Must not exist, or be empty; its parent must exist.
        example_input: See :func:`export_pretrained`.
        fill: See :func:`export_pretrained`.

    Returns:
        What was exported.

    Raises:
        ExportError: See :func:`export_pretrained`; or the folder holds something, or cannot be read back.
        MissingExtraError: ``transformers`` is not installed.
    """
    folder = Path(folder)
    if not folder.parent.is_dir():
        raise ExportError(f"the parent of the folder {str(folder)!r} does not exist; create it first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"expected {str(folder)!r} to be a new or an empty folder, but it holds something")
    made, report, expected, example = _export(model, example_input, fill)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        written = Path(place) / "model"
        _log.info("writing %s to %s", report.kind, folder)
        kind: Any = type(made)
        with _quietly():
            made.save_pretrained(written)
            loaded, trouble = kind.from_pretrained(
                written, dtype=made.dtype, output_loading_info=True, **report.options
            )
        if any(trouble.values()):
            raise ExportError(f"{report.kind} does not read back what it wrote: {trouble}; nothing was kept")
        loaded.to(made.device)
        check_batches(expected, loaded, example)
        if folder.exists():
            folder.rmdir()
        written.replace(folder)
    return report


def _export(
    model: nn.Module, example_input: Any, fill: bool
) -> tuple[PreTrainedModel, PretrainedReport, Expected, Example]:
    host = _pretrained_part(model)
    example = _example(host, example_input)
    draft, expected = folded_draft(host, example)
    if draft.branches:
        raise ExportError(_in_the_way(host, draft))
    try:
        recipe = fitted_config(draft.model, fill=fill)
    except UnfitError as error:
        raise ExportError(_unequal(host, draft, error)) from error
    made: Any = rebuilt(draft.model, recipe)
    changed = changed_fields(host.config, recipe.config)
    try:
        worst = check_batches(expected, made, example)
    except ExportError as error:
        raise ExportError(
            f"{error}: a {type(host).__name__} built with {', '.join(changed) or 'its config'} as grown computes "
            "something else from the same weights. A block's number may enter its computation (as with "
            "scale_attn_by_inverse_layer_idx, or where even and odd blocks differ); use esper.export"
        ) from error
    report = PretrainedReport(
        kind=type(made).__name__,
        changed=changed,
        folded=tuple(draft.folded),
        left_out=tuple(draft.left_out),
        num_parameters=sum(parameter.numel() for parameter in made.parameters()),
        max_difference=worst,
        notes=(
            *draft.notes,
            *_filled(draft.model, made),
            *_left_behind(model, host),
            *_generation_trouble(host, made, example),
        ),
        options=recipe.options,
    )
    _log.info("%s", report)
    return made, report, expected, example


def _pretrained_part(model: nn.Module) -> PreTrainedModel:
    """The one ``PreTrainedModel`` that ``model`` is or holds.

    Raises:
        ExportError: There is none, there are several, or seeds stand outside it.
        MissingExtraError: ``transformers`` is not installed.
    """
    kind = _import_transformers().PreTrainedModel
    found: dict[int, tuple[str, nn.Module]] = {}

    def search(module: nn.Module, name: str) -> None:
        if isinstance(module, kind):
            found[id(module)] = (name, module)
            return
        for key, child in module.named_children():
            search(child, f"{name}.{key}" if name else key)

    search(model, "")
    parts = list(found.values())
    if len(parts) != 1:
        names = ", ".join(repr(name) for name, _ in parts)
        raise ExportError(
            f"expected a transformers PreTrainedModel, or a module that holds one, but {type(model).__name__} holds "
            f"{len(parts)}{f' ({names}); export each by itself' if parts else '; esper.export takes any module'}"
        )
    name, part = parts[0]
    inside = {id(seed) for seed in all_seeds(part)}
    outside = [seed for seed in all_seeds(model) if id(seed) not in inside]
    if outside:
        shown = ", ".join(f"{seed.seed_id} at {seed.site.name}" for seed in outside)
        raise ExportError(
            f"{type(model).__name__} holds its PreTrainedModel as {name!r}, but grew outside it too: {shown}; cull "
            f"these seeds, or use esper.export for the whole module"
        )
    if needs_esper(part):
        raise ExportError(f"{type(part).__name__} is a class of esper, which its readers would need")
    assert isinstance(part, kind)
    return part


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "exporting to a class of transformers needs that package, which is not installed; run: "
            "pip install 'esper[finetune]'"
        ) from error
    return transformers


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars and advice, which would stand between our messages."""
    logging_ = _import_transformers().utils.logging
    level, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(level)
        if bars:
            logging_.enable_progress_bar()


def _example(host: PreTrainedModel, given: Any) -> Example:
    if given is not None:
        return Example.of(given).like(host)
    return kept_example(host) or _made_up(host)


def _made_up(host: PreTrainedModel) -> Example:
    """Random tokens or images of the sizes in the config.

    Raises:
        ExportError: The model takes something else.
    """
    config = host.config
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    if host.main_input_name == "input_ids":
        text = config.get_text_config()
        length = min(8, getattr(text, "max_position_embeddings", None) or 8)
        inputs["input_ids"] = torch.randint(text.vocab_size, (2, length), generator=generator)
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    elif host.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (2, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(host.dtype)
    else:
        raise ExportError(
            f"the export is proved on an example, and none can be made up for {type(host).__name__}, which takes "
            f"{host.main_input_name}; pass example_input="
        )
    return Example((), inputs).like(host)


def _filled(grown: nn.Module, made: nn.Module) -> list[str]:
    """A note, if the export has more parameters than the grown model."""
    more = sum(p.numel() for p in made.parameters()) - sum(p.numel() for p in grown.parameters())
    return [f"{more:,} parameters of silent units fill up the blocks that were widened less"] if more else []


def _left_behind(model: nn.Module, host: nn.Module) -> list[str]:
    """A note, if ``model`` has parameters outside the ``host`` that is exported."""
    inside = {id(parameter) for parameter in host.parameters()}
    rest = {n: p.numel() for n, p in model.named_parameters() if id(p) not in inside}
    if not rest:
        return []
    first = next(iter(rest))
    return [
        f"{sum(rest.values()):,} parameters of {type(model).__name__} outside its {type(host).__name__} are not in the "
        f"export ({first}{' and others' if len(rest) > 1 else ''})"
    ]


def _generation_trouble(host: PreTrainedModel, made: PreTrainedModel, example: Example) -> list[str]:
    """A note, if the grown model generates and the exported one fails to.

    transformers 5.23 sizes the cache of a T5 by its encoder's blocks, so a deeper decoder finds no place in it.
    """
    prompt = example.kwargs.get("input_ids", example.args[0] if example.args else None)
    if not made.can_generate() or prompt is None:
        return []
    for model in (host, made):
        try:
            with preserved(model), _quietly():
                model.eval()
                model.generate(prompt, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
        except Exception as error:  # whatever the class raises
            if model is host:
                return []
            return [
                f"generation with a cache fails in this version of transformers ({type(error).__name__}: {error}); "
                "call generate(use_cache=False), or grow encoder and decoder alike"
            ]
    return []


def _in_the_way(host: nn.Module, draft: Draft) -> str:
    """Which branches are left, why, and what can be done about each."""
    lines = [
        f"seed {branch.seed_id} ({branch.blueprint} at {branch.site}"
        f"{f', blending at {branch.alpha:.2g}' if branch.alpha != 1.0 else ''}): "
        + draft.reasons.get(branch.seed_id, "a branch of its own, for which the class has no layer")
        for branch in draft.branches
    ]
    some_blend = any(branch.alpha != 1.0 for branch in draft.branches)
    wait = "let blending seeds finish, " if some_blend else ""
    return (
        f"this grown {type(host).__name__} is none of its class any more: {'; '.join(lines)}. To export it as its own "
        f"kind {wait}cull these seeds; {_INSTEAD}"
    )


def _unequal(host: nn.Module, draft: Draft, error: UnfitError) -> str:
    """Which folded seeds made layers that no config of the class makes."""
    names = {id(module): name for name, module in draft.model.named_modules()}

    def behind(blame: Callable[[str, str], bool]) -> list[str]:
        return [
            seed_id
            for seed_id, layers in draft.layers.items()
            if any(blame(names[id(layer)], odd) for layer in layers for odd in error.names)
        ]

    guilty = behind(lambda layer, odd: odd.startswith(f"{layer}."))
    sites = {seed.seed_id: f"{seed.blueprint} at {seed.site.name}" for seed in all_seeds(host)}
    shown = ", ".join(f"seed {seed_id} ({sites[seed_id]})" for seed_id in guilty)
    because = f" In the way: {shown}." if guilty else ""
    return (
        f"this grown {type(host).__name__} is none of its class any more: {error}.{because} To export it as its own "
        "kind grow all blocks alike (for a width: the same number of units in each), cull these seeds, or pass "
        "fill=True, which fills narrower blocks up with silent units; esper.export takes the model as it is"
    )
