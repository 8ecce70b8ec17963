"""``esper serve``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from esper.tamiyo.service.config import load_config
from esper.tamiyo.service.server import DecisionServer

__all__ = ["serve"]


def serve(source: str = "default", settings: Sequence[str] = ()) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish what is queued.

    Args:
        source: Name of a file in ``conf/service``, or the path of one.
        settings: What differs, as ``KEY=VALUE``.

    Returns:
        Exit status.

    Raises:
        ConfigError: A setting is wrong, or an address cannot be bound.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    service = DecisionServer(load_config(source, settings))
    with service.until_signal():
        pages = f", {service.web.url}/metrics" if service.web is not None else ""
        print(
            f"serving at {service.address}{pages}; {service.desk.decider.name} decides, experiences go to "
            f"{service.config.store}",
            flush=True,
        )
        service.run()
    return 0
