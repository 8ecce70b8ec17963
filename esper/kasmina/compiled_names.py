"""Names with and without the ``_orig_mod`` that ``torch.compile`` puts into those of a module that it wraps.

A checkpoint of a model whose parts were compiled in this way fits only a model that is compiled alike. The
weights are the same; the names, and the names in the records of the seeds, can be brought into agreement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import structs
from torch import nn

from esper.kasmina.layer import SEEDS
from esper.kasmina.seed import decode_state, encode_state
from esper.kasmina.sites import Site, site_name

__all__ = ["differ_by_compilation", "named_as_in"]

_WRAPPED = "_orig_mod"
_RECORD = "_extra_state"


def differ_by_compilation(model: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has the names of ``model`` apart from what compilation puts into them."""
    own, given = set(model.state_dict(keep_vars=True)), {key for key in state_dict if not _of_seed(key)}
    own = {key for key in own if not _of_seed(key)}
    return own != given and {_plain(key) for key in own} == {_plain(key) for key in given}


def named_as_in(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a state dict, seeds and all, as ``model`` names its modules.

    Args:
        model: Compiled in other parts than the model that was saved, or not at all.
        state_dict: Of a model for which :func:`differ_by_compilation` holds.
    """
    # The wrapper comes before the module inside, whose name is the one that parameters have.
    modules = {_plain(name): name for name, _ in model.named_modules()}
    renamed: dict[str, Any] = {}
    for key, value in state_dict.items():
        parts = _plain(key).split(".")
        # What a seed's branch holds has no module here yet.
        end = parts.index(SEEDS) if SEEDS in parts else len(parts) - 1
        name = ".".join([part for part in (modules[".".join(parts[:end])], *parts[end:]) if part])
        if SEEDS in parts and parts[-1] == _RECORD and len(parts) == end + 3:
            state = decode_state(value, key)
            value = encode_state(structs.replace(state, site=_renamed(state.site, modules)))
        renamed[name] = value
    return renamed


def _renamed(site: Site, modules: Mapping[str, str]) -> Site:
    source, target = modules[_plain(site.source)], modules[_plain(site.target)]
    return structs.replace(
        site,
        name=site_name(site.kind, source, target),
        source=source,
        target=target,
        through=tuple(modules[_plain(name)] for name in site.through),
    )


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def _of_seed(key: str) -> bool:
    return SEEDS in key.split(".")
