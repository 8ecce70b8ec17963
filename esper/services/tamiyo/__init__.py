"""Tamiyo under the names of its design document, so that its integration example runs as written.

The parts themselves are in :mod:`esper.tamiyo`: ``collection``, ``graph``, ``network``, ``learning``, ``service``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.services.tamiyo.analyzer import LayerNode, ModelGraphAnalyzer
    from esper.services.tamiyo.health_collector import ProductionHealthCollector
    from esper.services.tamiyo.main import TamiyoService
    from esper.services.tamiyo.model_graph_builder import ModelGraphBuilder, ModelGraphState, ModelTopology
    from esper.services.tamiyo.policy import EnhancedTamiyoPolicyGNN, PolicyConfig
    from esper.services.tamiyo.policy_trainer import ProductionPolicyTrainer, ProductionTrainingConfig

__all__ = [
    "EnhancedTamiyoPolicyGNN",
    "LayerNode",
    "ModelGraphAnalyzer",
    "ModelGraphBuilder",
    "ModelGraphState",
    "ModelTopology",
    "PolicyConfig",
    "ProductionHealthCollector",
    "ProductionPolicyTrainer",
    "ProductionTrainingConfig",
    "TamiyoService",
]

_MODULES = {
    "EnhancedTamiyoPolicyGNN": "policy",
    "LayerNode": "analyzer",
    "ModelGraphAnalyzer": "analyzer",
    "ModelGraphBuilder": "model_graph_builder",
    "ModelGraphState": "model_graph_builder",
    "ModelTopology": "model_graph_builder",
    "PolicyConfig": "policy",
    "ProductionHealthCollector": "health_collector",
    "ProductionPolicyTrainer": "policy_trainer",
    "ProductionTrainingConfig": "policy_trainer",
    "TamiyoService": "main",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
