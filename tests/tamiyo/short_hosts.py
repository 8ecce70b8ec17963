"""Short runs that several test files share."""

from __future__ import annotations

import msgspec

from esper.tamiyo.environment.families import sample_host
from esper.tamiyo.environment.specs import HostSpec


def short(family: str, number: int = 0, steps: int = 60) -> HostSpec:
    """A training host whose run is cut to ``steps`` steps of at most 32 samples."""
    spec = sample_host(family, "train", number)
    return msgspec.structs.replace(spec.shortened(steps), batch_size=min(spec.batch_size, 32))
