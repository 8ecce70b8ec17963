"""Blueprints: what a seed can be made of. Importing this package registers the built-in ones."""

from esper.kasmina.blueprints import attention, conv, dense, norm, shortcut, stack
from esper.kasmina.blueprints.registry import (
    Blueprint,
    Cost,
    blueprint,
    cost,
    fitting,
    get_blueprint,
    make_branch,
    names,
)

__all__ = ["Blueprint", "Cost", "blueprint", "cost", "fitting", "get_blueprint", "make_branch", "names"]

_BUILT_IN = (attention, conv, dense, norm, shortcut, stack)
"""Named so that no tool takes the imports, which register by running, for unused ones."""
