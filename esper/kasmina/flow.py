"""Which layers feed a place, read off the autograd graph in one pass over it.

In a residual host each layer's input is a sum of all earlier outputs, so that listing them for every layer
takes a number of steps, and of edges, that grows with the square of the depth. What feeds a node is
therefore worked out once for each node, from what feeds its inputs, and cut to :data:`NEAREST` and
:data:`EARLIEST` layers: the nearest ones carry reachability and activations on, the earliest ones the
shortest way through the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from esper.kasmina.activations import op_name

__all__ = ["EARLIEST", "NEAREST", "DataFlow", "Label", "Sources"]

NEAREST = 28
"""Layers that feed a place and ran last before it: all that are kept, besides the earliest."""
EARLIEST = 4
"""Layers that feed a place and ran first."""
_MAX_OPS = 32
"""Operations of one way that are told by name."""
_HANDED_ON = "RegisterPostBackwardFunctionBackward"
"""Through it FSDP2 passes a unit's inputs as they are."""
_CUT = "..."
"""Stands for the operations beyond; no blueprint takes it for one that it knows."""


class Label(NamedTuple):
    """What a marked node stands for: the input (``in``) or output (``out``) of a module."""

    name: str
    side: str
    leaf: bool


class Sources(NamedTuple):
    """What feeds a place: layer -> operations on the way, in order; and whether raw data does."""

    layers: dict[str, tuple[str, ...]]
    from_data: bool


@dataclass(frozen=True, slots=True)
class _Way:
    """Operations from a layer to a node, as a list linked backwards, so that ways share their beginnings."""

    before: _Way | None
    op: str
    length: int

    @staticmethod
    def extended(way: _Way | None, op: str) -> _Way:
        if way is None:
            return _Way(None, op, 1)
        if way.length < _MAX_OPS:
            return _Way(way, op, way.length + 1)
        return way if way.op == _CUT else _Way(way.before, _CUT, _MAX_OPS)

    @staticmethod
    def ops(way: _Way | None) -> tuple[str, ...]:
        found = []
        while way is not None:
            found.append(way.op)
            way = way.before
        return tuple(reversed(found))


class _Feed(NamedTuple):
    ways: dict[str, _Way | None]
    from_data: bool


_NOTHING = _Feed({}, False)
_DATA = _Feed({}, True)


class DataFlow:
    """The part of an autograd graph that lies between leaf layers.

    Args:
        order: Leaf layer -> its place in the order in which layers ran.
    """

    def __init__(self, order: Mapping[str, int]) -> None:
        self.ops_seen: set[str] = set()
        """Names of all operations that were passed."""
        self._order = order
        self._feeds: dict[Any, _Feed] = {}

    def into(self, start: Any) -> Sources:
        """What feeds node ``start`` without passing another leaf layer; the nearest and the earliest of them."""
        feed = self._feed(start)
        return Sources({name: _Way.ops(way) for name, way in feed.ways.items()}, feed.from_data)

    def all_into(self, start: Any) -> set[str]:
        """The names of all leaf layers that feed node ``start``."""
        found: set[str] = set()
        seen, stack = {start}, [start]
        while stack:
            node = stack.pop()
            if (name := _leaf_output(node)) is not None:
                found.add(name)
                continue
            for following in _inputs(node):
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        return found

    def _feed(self, start: Any) -> _Feed:
        feeds = self._feeds
        stack = [start]
        while stack:  # depth first without recursion: a host of ten thousand layers is as deep
            node = stack[-1]
            if node in feeds:
                stack.pop()
                continue
            if (name := _leaf_output(node)) is not None:
                feeds[node] = _Feed({name: None}, False)
                continue
            inputs = _inputs(node)
            missing = [following for following in inputs if following not in feeds]
            if missing:
                stack.extend(missing)
                continue
            feeds[node] = self._join(node, [feeds[following] for following in inputs])
        return feeds[start]

    def _join(self, node: Any, inputs: list[_Feed]) -> _Feed:
        if isinstance(getattr(node, "label", None), Label):
            if node.next_functions[0][0] is None:
                return _DATA
            return inputs[0] if inputs else _NOTHING
        op = op_name(node)
        if op == _HANDED_ON and len(inputs) == 1:
            return inputs[0]
        self.ops_seen.add(op)
        ways: dict[str, _Way | None] = {}
        for feed in reversed(inputs):
            for name, way in feed.ways.items():
                # Of several ways the shortest is told: x * sigmoid(x) is a product of x.
                if name not in ways or _length(way) < _length(ways[name]):
                    ways[name] = way
        if len(ways) > NEAREST + EARLIEST:
            kept = sorted(ways, key=self._order.__getitem__)
            ways = {name: ways[name] for name in (*kept[:EARLIEST], *kept[-NEAREST:])}
        ways = {name: _Way.extended(way, op) for name, way in ways.items()}
        return _Feed(ways, any(feed.from_data for feed in inputs))


def _leaf_output(node: Any) -> str | None:
    label = getattr(node, "label", None)
    return label.name if isinstance(label, Label) and label.leaf and label.side == "out" else None


def _inputs(node: Any) -> list[Any]:
    """Nodes that feed ``node``; parameters are not data."""
    successors = node.next_functions
    if isinstance(getattr(node, "label", None), Label):
        successors = successors[:1]  # the other one is the mark's anchor
    return [
        following
        for following, _ in successors
        if following is not None and type(following).__name__ != "AccumulateGrad"
    ]


def _length(way: _Way | None) -> int:
    return 0 if way is None else way.length
