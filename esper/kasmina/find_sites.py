"""From a traced topology to the places where seeds can attach."""

from __future__ import annotations

from collections import Counter

from msgspec import structs
from torch import nn

from esper.kasmina.activations import is_activation
from esper.kasmina.blueprints import fitting
from esper.kasmina.linear_like import features
from esper.kasmina.reasons import BlockLists
from esper.kasmina.sites import BuildContext, Site, site_name
from esper.kasmina.topology import LayerInfo, ModelTopology

__all__ = ["context_of", "find_sites"]

_DENSE = (nn.Linear, nn.Conv2d)
_MAX_LONG = 64
"""Long bypasses of one host; all of them where there are fewer."""
_MAX_LONG_TARGETS = 8
"""Output layers that are chosen where there are too many."""
_NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm,
)  # fmt: skip


def find_sites(model: nn.Module, topology: ModelTopology) -> list[Site]:
    """List every site of ``model`` at which at least one registered blueprint fits.

    Args:
        model: The host that ``topology`` was traced from.
        topology: Its layers and edges.

    Returns:
        Sites in data-flow order: parallel, bypass (long ones last), then stack.
    """
    usable = {layer.name: layer for layer in topology.layers if _usable(topology, layer)}
    dense = [layer for layer in usable.values() if isinstance(model.get_submodule(layer.name), _DENSE)]
    candidates: dict[str, Site] = {}
    for layer in dense:
        _add(candidates, _site("parallel", layer, layer))
    for layer in usable.values():
        module = model.get_submodule(layer.name)
        if isinstance(module, nn.MultiheadAttention):
            _add(candidates, _functional_site(layer))
        elif not layer.block and not isinstance(module, _DENSE) and features(module) is not None:
            _add(candidates, _site("parallel", layer, layer))
    dense_names = {layer.name for layer in dense}
    for first in dense:
        for second, ops, through in _next_dense(model, topology, first.name, dense_names):
            _add(candidates, _site("bypass", first, usable[second], ops=ops, through=through))
    for site in _long_bypasses(model, topology, usable):
        known = candidates.get(site.name)
        _add(candidates, structs.replace(known, long=True) if known else site)
    blocks = BlockLists(model)
    for layer in usable.values():
        if layer.output_projections and blocks.why_not_stacked(layer) is None:
            _add(candidates, _site("stack", layer, layer))
    together = [
        site
        for site in candidates.values()
        if site.functional or (_in_one_region(topology, site) and _same_rows(topology, site))
    ]
    return [site for site in (_fitted(model, topology, site) for site in together) if site.blueprints]


def context_of(model: nn.Module, topology: ModelTopology, site: Site) -> BuildContext:
    """The build context of ``site``, with a block's output projections from the topology."""
    projections = topology.layer(site.target).output_projections if site.kind == "stack" else ()
    return BuildContext(site, model.get_submodule(site.source), model.get_submodule(site.target), projections)


def _in_one_region(topology: ModelTopology, site: Site) -> bool:
    """Whether gradient checkpointing computes source and target again together (:mod:`esper.kasmina.recompute`)."""
    return topology.layer(site.source).region == topology.layer(site.target).region


def _same_rows(topology: ModelTopology, site: Site) -> bool:
    """Whether source and target always have as many rows: samples, and vectors a sample where both have several.

    A graph's nodes become one row a graph, windows of an image one row an image; the tokens of an encoder
    are not those of the decoder, even in a batch in which there happen to be as many.
    """
    source, target = topology.layer(site.source), topology.layer(site.target)
    if source.input_rows and target.output_rows and source.input_rows != target.output_rows:
        return False
    several = len(site.source_shape) == 2 and len(site.target_shape) == 2
    return not several or source.input_lengths == target.output_lengths


def _fitted(model: nn.Module, topology: ModelTopology, site: Site) -> Site:
    return structs.replace(site, blueprints=fitting(context_of(model, topology, site)))


def _usable(topology: ModelTopology, layer: LayerInfo) -> bool:
    known = layer.num_calls == 1 and len(layer.input_shape) > 0 and len(layer.output_shape) > 0
    return known and layer.name not in topology.refused


def _add(candidates: dict[str, Site], site: Site) -> None:
    candidates[site.name] = site


def _site(
    kind: str, source: LayerInfo, target: LayerInfo, *, ops: tuple[str, ...] = (), through: tuple[str, ...] = (),
    long: bool = False,
) -> Site:  # fmt: skip
    assert kind in ("parallel", "bypass", "stack")
    return Site(
        name=site_name(kind, source.name, target.name),  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        source=source.name,
        target=target.name,
        source_shape=source.input_shape,
        target_shape=target.output_shape,
        ops=ops,
        through=through,
        long=long,
        image=target.image,
        source_samples=source.input_samples,
        target_samples=target.output_samples,
    )


def _functional_site(attention: LayerInfo) -> Site:
    """``out_proj`` of a torch attention module: its weight is read without calling it."""
    name = f"{attention.name}.out_proj"
    shape = attention.output_shape
    return Site(site_name("parallel", name, name), "parallel", name, name, shape, shape, functional=True)


def _next_dense(
    model: nn.Module, topology: ModelTopology, start: str, dense: set[str]
) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Dense layers fed by ``start`` alone, through operations and at most normalisation layers."""
    found = []
    stack: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [(start, (), ())]
    while stack:
        name, ops, through = stack.pop()
        for edge in topology.consumers(name):
            if len(topology.producers(edge.target)) != 1:
                continue
            path = ops + edge.ops
            if edge.target in dense:
                same = _type_of(model, start) is _type_of(model, edge.target)
                if same:
                    found.append((edge.target, path, through))
            elif isinstance(model.get_submodule(edge.target), _NORMS):
                stack.append((edge.target, path, (*through, edge.target)))
    return found


def _type_of(model: nn.Module, name: str) -> type:
    """``nn.Linear`` or ``nn.Conv2d``, whichever layer ``name`` is a kind of."""
    layer = model.get_submodule(name)
    return next(cls for cls in _DENSE if isinstance(layer, cls))


def _long_bypasses(model: nn.Module, topology: ModelTopology, usable: dict[str, LayerInfo]) -> list[Site]:
    """From the host's float input, and from the layers after it, to each output layer; no more than a few.

    In a residual host every block comes right after the input layer.
    """
    leaves = [layer for layer in usable.values() if not layer.block]
    inputs = [layer for layer in leaves if layer.reads_input]
    if inputs:
        after = {edge.target for layer in inputs for edge in topology.consumers(layer.name)}
        early = [layer for layer in leaves if layer.name in after and layer not in inputs]
    else:  # token hosts: the first layer that is given floats
        early = [layer for layer in leaves if not layer.type.startswith("Embedding")][:1]
    outputs = [
        layer for layer in leaves if layer.is_output and isinstance(model.get_submodule(layer.name), _DENSE)
    ]
    sources = [*inputs, *early]
    if len(sources) * len(outputs) > _MAX_LONG:
        outputs = _spread(outputs, max(1, _MAX_LONG // len(sources), _MAX_LONG_TARGETS))
        sources = _spread(sources, _MAX_LONG // len(outputs))
    # Several non-linearities lie on the way: hidden units along it get the one that the host uses most.
    ops = (_usual_activation(topology),)
    called = {layer.name: place for place, layer in enumerate(topology.layers)}
    return [
        _site("bypass", source, target, ops=ops, long=True)
        for target in outputs
        for source in sources
        if called[source.name] < called[target.name]  # else its input is not there yet when the target runs
    ]


def _spread(layers: list[LayerInfo], count: int) -> list[LayerInfo]:
    """``count`` of the layers at equal distances, the first among them."""
    return layers if len(layers) <= count else [layers[i * len(layers) // count] for i in range(count)]


def _usual_activation(topology: ModelTopology) -> str:
    """The non-linearity between most pairs of layers; ``relu`` where none is understood."""
    counts = Counter(op for edge in topology.edges for op in edge.ops if is_activation(op))
    return counts.most_common(1)[0][0] if counts else "relu"
