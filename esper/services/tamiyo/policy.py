"""The document's name for :class:`esper.tamiyo.network.network.TamiyoNetwork`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from esper.errors import CheckpointError, ConfigError
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import load_network, shipped

__all__ = ["EnhancedTamiyoPolicyGNN", "PolicyConfig"]

_LOG = logging.getLogger("esper.services.tamiyo")
_VARIABLE = "ESPER_TAMIYO_WEIGHTS"
_SIZES = (
    "node_feature_dim",
    "edge_feature_dim",
    "global_feature_dim",
    "candidate_feature_dim",
    "hidden_dim",
    "num_gnn_layers",
    "num_attention_heads",
)


class EnhancedTamiyoPolicyGNN(TamiyoNetwork):
    """The policy network, with the weights that the package ships where they fit the config.

    Args:
        config: Sizes and thresholds; thresholds are the config's, whatever the weights came with.
        weights: Safetensors file to begin with. None: the file that the environment variable ESPER_TAMIYO_WEIGHTS
            names, else the shipped ones if there are any of this size, else fresh random ones, which is logged.

    Raises:
        CheckpointError: ``weights``, or what the variable names, is no policy network of this size.
    """

    def __init__(self, config: PolicyConfig | None = None, weights: str | Path | None = None) -> None:
        config = config if config is not None else PolicyConfig()
        super().__init__(config)
        self.eval()
        named = weights if weights is not None else os.environ.get(_VARIABLE)
        if named:
            self._begin_with(load_network(named), str(named))
            return
        try:
            self._begin_with(load_network(shipped()), "the shipped weights")
        except (ConfigError, CheckpointError) as error:
            _LOG.warning("the policy network begins with random weights, because %s", error)

    def _begin_with(self, network: TamiyoNetwork, where: str) -> None:
        different = [
            f"{name} {getattr(network.config, name)} instead of {getattr(self.config, name)}"
            for name in _SIZES
            if getattr(network.config, name) != getattr(self.config, name)
        ]
        if different:
            raise CheckpointError(f"{where} belong to a network with {', '.join(different)}")
        self.load_state_dict(network.state_dict())
