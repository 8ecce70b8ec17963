"""Networks that grow while they train.

``TamiyoCallback()`` in a Lightning trainer is all it takes; :func:`attach` does it without Lightning.
Names load on first use, so that importing this package costs nothing and needs neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.callbacks.tamiyo import TamiyoCallback
    from esper.errors import EsperError
    from esper.kasmina.blueprints.registry import blueprint
    from esper.kasmina.body import Body, attach, detach
    from esper.kasmina.export import export
    from esper.kasmina.loading import GrowableMixin, load
    from esper.kasmina.seed import Seed
    from esper.pretrained import export_pretrained

__all__ = [
    "Body",
    "EsperError",
    "GrowableMixin",
    "Seed",
    "TamiyoCallback",
    "attach",
    "blueprint",
    "detach",
    "export",
    "export_pretrained",
    "load",
]

_HOME_OF = {
    "Body": "esper.kasmina.body",
    "EsperError": "esper.errors",
    "GrowableMixin": "esper.kasmina.loading",
    "Seed": "esper.kasmina.seed",
    "TamiyoCallback": "esper.callbacks.tamiyo",
    "attach": "esper.kasmina.body",
    "blueprint": "esper.kasmina.blueprints.registry",
    "detach": "esper.kasmina.body",
    "export": "esper.kasmina.export",
    "export_pretrained": "esper.pretrained",
    "load": "esper.kasmina.loading",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("esper")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value  # so that the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
