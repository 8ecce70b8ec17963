"""What a model is made of and how data flows between its layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import msgspec

__all__ = ["Edge", "LayerInfo", "ModelTopology"]


class LayerInfo(msgspec.Struct, frozen=True):
    """One parameterised layer, or one block of layers, as one traced training step saw it.

    Shapes leave out the batch dimension. ``num_parameters`` counts the module's own parameters and
    its children's. ``flops`` is one forward pass of one sample (2 per multiply-add, dense layers and
    convolutions). ``is_output``: reaches the loss without passing another layer.
    ``reads_input``: fed by the host's float input without passing another layer.
    ``output_projections``: for a residual block, the layers that write to its residual stream.
    ``plain_call``: it is given one value and gives back one.
    ``region``: which region of gradient checkpointing it is in; 0 outside of all.
    ``input_samples``, ``output_samples``: the dimension that counts samples, None where it is not known,
    and ``input_rows``, ``output_rows`` its size in the traced batch (0: not seen). ``input_lengths``,
    ``output_lengths``: vectors a batch each time one of the data's sequences was shorter than the others
    (:mod:`esper.kasmina.sample_dims`).
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
    plain_call: bool = False
    region: int = 0
    input_samples: int | None = 0
    output_samples: int | None = 0
    input_rows: int = 0
    output_rows: int = 0
    input_lengths: tuple[int, ...] = ()
    output_lengths: tuple[int, ...] = ()


class Edge(msgspec.Struct, frozen=True):
    """Data flows from layer ``source`` to layer ``target`` through operations ``ops``, in order.

    ``ops`` holds names such as ``relu`` or ``leaky_relu:0.01`` for what is understood, and the
    autograd node's name for the rest.
    """

    source: str
    target: str
    ops: tuple[str, ...] = ()


class ModelTopology(msgspec.Struct, frozen=True, dict=True):
    """The traced data-flow graph of a host model; looking a layer or its neighbours up takes no walk.

    Attributes:
        layers: By data flow, producers first.
        edges: Between leaf layers; of the many that feed a long residual sum, the nearest and the earliest
            (:mod:`esper.kasmina.flow`).
        refused: Layer name -> why it cannot carry seeds.
        num_parameters: Of the whole host.
        positions: Output positions a sample: tokens of a sequence, else 1.
        transformer: The host has attention and residual blocks.
        layout_measured: Sample dimensions were looked for, and not only taken to be the first ones.
        layout_problem: Why they could not be found; empty where they were.
    """

    layers: tuple[LayerInfo, ...]
    edges: tuple[Edge, ...]
    refused: dict[str, str]
    num_parameters: int
    positions: int = 1
    transformer: bool = False
    layout_measured: bool = False
    layout_problem: str = ""

    @property
    def layer_names(self) -> list[str]:
        """Names of all layers, producers first."""
        return [layer.name for layer in self.layers]

    def layer(self, name: str) -> LayerInfo:
        """The layer called ``name``.

        Raises:
            KeyError: There is none.
        """
        return self._by_name[name]

    def consumers(self, name: str) -> Sequence[Edge]:
        """Edges that leave layer ``name``."""
        return self._leaving.get(name, ())

    def producers(self, name: str) -> Sequence[Edge]:
        """Edges that enter layer ``name``."""
        return self._entering.get(name, ())

    def feeds(self, source: str, target: str) -> bool:
        """Whether an edge leads from ``source`` to ``target``."""
        return (source, target) in self._pairs

    # Worked out on first use; equality, copies and the wire know the fields alone.

    @cached_property
    def _by_name(self) -> dict[str, LayerInfo]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def _leaving(self) -> dict[str, list[Edge]]:
        found: dict[str, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(edge.source, []).append(edge)
        return found

    @cached_property
    def _entering(self) -> dict[str, list[Edge]]:
        found: dict[str, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(edge.target, []).append(edge)
        return found

    @cached_property
    def _pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset((edge.source, edge.target) for edge in self.edges)
