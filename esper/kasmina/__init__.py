"""The body: seeds inside a host model. Needs torch, and neither Lightning nor Hydra."""

from __future__ import annotations

from esper.kasmina.blueprints import blueprint
from esper.kasmina.body import Body, attach, detach
from esper.kasmina.seed import Seed, SeedState
from esper.kasmina.sites import Site
from esper.kasmina.topology import ModelTopology

__all__ = ["Body", "ModelTopology", "Seed", "SeedState", "Site", "attach", "blueprint", "detach"]
