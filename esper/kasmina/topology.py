"""What a model is made of and how data flows between its layers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

__all__ = ["Edge", "LayerInfo", "ModelTopology"]


class LayerInfo(msgspec.Struct, frozen=True):
    """One parameterised layer, or one block of layers, as one traced training step saw it.

    Shapes leave out the batch dimension. ``num_parameters`` counts the module's own parameters and
    its children's. ``flops`` is one forward pass of one sample (2 per multiply-add, dense layers and
    convolutions). ``is_output``: reaches the loss without passing another layer.
    ``reads_input``: fed by the host's float input without passing another layer.
    ``output_projections``: for a residual block, the layers that write to its residual stream.
    """

    name: str
    type: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    num_parameters: int
    flops: int
    num_calls: int
    block: bool = False
    image: bool = False
    is_output: bool = False
    reads_input: bool = False
    output_projections: tuple[str, ...] = ()


class Edge(msgspec.Struct, frozen=True):
    """Data flows from layer ``source`` to layer ``target`` through operations ``ops``, in order.

    ``ops`` holds names such as ``relu`` or ``leaky_relu:0.01`` for what is understood, and the
    autograd node's name for the rest.
    """

    source: str
    target: str
    ops: tuple[str, ...] = ()


class ModelTopology(msgspec.Struct, frozen=True):
    """The traced data-flow graph of a host model.

    Attributes:
        layers: By data flow, producers first.
        edges: Between leaf layers.
        refused: Layer name -> why it cannot carry seeds.
        num_parameters: Of the whole host.
        positions: Output positions a sample: tokens of a sequence, else 1.
        transformer: The host has attention and residual blocks.
    """

    layers: tuple[LayerInfo, ...]
    edges: tuple[Edge, ...]
    refused: dict[str, str]
    num_parameters: int
    positions: int = 1
    transformer: bool = False

    @property
    def layer_names(self) -> list[str]:
        """Names of all layers, producers first."""
        return [layer.name for layer in self.layers]

    def layer(self, name: str) -> LayerInfo:
        """The layer called ``name``.

        Raises:
            KeyError: There is none.
        """
        return next(layer for layer in self.layers if layer.name == name)

    def consumers(self, name: str) -> Sequence[Edge]:
        """Edges that leave layer ``name``."""
        return [edge for edge in self.edges if edge.source == name]

    def producers(self, name: str) -> Sequence[Edge]:
        """Edges that enter layer ``name``."""
        return [edge for edge in self.edges if edge.target == name]
