"""What Cortex says when a package of its extra is not installed."""

from __future__ import annotations

from esper.errors import MissingExtraError

__all__ = ["missing_extra"]


def missing_extra(part: str, package: str, extra: str = "cortex") -> MissingExtraError:
    """Return the error for ``part`` of Cortex, which needs ``package``."""
    return MissingExtraError(
        f"{part} needs the package {package}, which is not installed; run: pip install 'esper[{extra}]'"
    )
