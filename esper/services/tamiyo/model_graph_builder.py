"""The document's module for what :mod:`esper.tamiyo.graph` builds."""

from esper.kasmina.topology import ModelTopology
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.data import ModelGraphState

__all__ = ["ModelGraphBuilder", "ModelGraphState", "ModelTopology"]
