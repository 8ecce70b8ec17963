"""Which dimension of each layer's tensors counts samples, and which sequences have lengths of their own.

torch's recurrent and transformer layers put the batch second unless told otherwise, a graph network has
nodes where others have samples, an encoder-decoder has two sequence lengths. A seed that averages over
tokens or lets them read each other has to know. The shapes of one batch cannot tell; an experiment can:
the host runs on a few samples, and again with another first sample. Where values differ is where that
sample lies. Then each sequence is shortened alone, as far as the host lets it be.

Legend: n samples of the experiment, B samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from msgspec import structs
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from esper.errors import AttachError
from esper.kasmina.eager import eagerly
from esper.kasmina.fast_path import without_fast_path
from esper.kasmina.layer import primary
from esper.kasmina.topology import LayerInfo, ModelTopology
from esper.kasmina.trace import preserved

__all__ = ["measure_sample_dims"]

_SAMPLES = 3
"""Samples of the experiment: enough to tell one from the others."""
_MAX_SEQUENCES = 6
"""Sequences that are shortened alone; each costs a forward pass on a few samples."""
_TOLERANCE = 1e-5
"""Differences below this share of the largest value are rounding."""

Run = Callable[[Any], Any]


@dataclass
class _Seen:
    """One layer's first input and output in one pass; None where it was given, or gave, no float tensor."""

    x: Tensor | None = None
    y: Tensor | None = None


class _Dims(NamedTuple):
    """Sample dimension of input and output, as :func:`_sample_dim` answers."""

    x: int | str
    y: int | str


_SAME, _MIXED = "same", "mixed"


def measure_sample_dims(model: nn.Module, topology: ModelTopology, run: Run, batch: Any) -> ModelTopology:
    """Find the sample dimension of every layer by running ``model`` on variants of ``batch``.

    Costs a few forward passes of at most three samples, in evaluation mode without gradients. Modes,
    buffers and random state are left as they were.

    Args:
        model: The host.
        topology: As traced; shapes in it are taken to have the batch first.
        run: Runs the model on a batch of the same structure as ``batch``.
        batch: Tensors in any nesting of tuples, lists and dicts, samples first.

    Returns:
        The topology with sample dimensions, and shapes that leave these out. Where the experiment fails,
        they are None throughout and ``layout_problem`` says why.
    """
    names = [layer.name for layer in topology.layers if layer.num_calls == 1]
    with eagerly(), preserved(model), without_fast_path(), torch.no_grad():
        model.eval()
        found, problem = None, "the batch holds no tensors"
        for wanted in _sizes(batch):
            try:
                few = _take(batch, wanted)
                found = _dims(model, names, run, few)
                break
            except Exception as error:  # the user's own code, given a batch that it may not expect
                problem = f"the host does not run on part of a batch: {type(error).__name__}: {error}"
        if found is None:
            return _unknown(topology, problem)
        mixing = next((name for name, dims in found.items() if _MIXED in dims), None)
        if mixing is not None:
            problem = f"layer {mixing!r} mixes what stands along the data's first dimension"
            return _unknown(topology, problem)
        lengths = _lengths(model, names, run, few)
    found = _inherited(topology, found)
    layers = tuple(
        _placed(layer, found[layer.name], lengths.get(layer.name, ((), ()))) if layer.name in found else layer
        for layer in topology.layers
    )
    return structs.replace(topology, layers=layers, layout_measured=True)


def _inherited(topology: ModelTopology, found: dict[str, _Dims]) -> dict[str, _Dims]:
    """``found``, with what layers that the data did not visibly reach take over from the layers that feed them.

    Behind a dead layer, or dozens of freshly initialised ones, another sample makes no difference that could
    be told from rounding.
    """
    nothing = _Dims(_SAME, _SAME)
    known = dict(found)
    inside: dict[str, _Dims] = {}
    for layer in topology.layers:  # producers stand first
        if layer.block or layer.name not in known:
            continue
        for edge in topology.producers(layer.name) if known[layer.name] == nothing else ():
            dim = _known_dim(known.get(edge.source, nothing))
            if dim is not None and topology.layer(edge.source).output_rows == layer.input_rows:
                known[layer.name] = _Dims(dim, dim)
                break
        outer = layer.name.rpartition(".")[0]
        while outer and _known_dim(known[layer.name]) is not None:
            inside.setdefault(outer, known[layer.name])
            outer = outer.rpartition(".")[0]
    return {name: inside.get(name, nothing) if dims == nothing else dims for name, dims in known.items()}


def _known_dim(dims: _Dims) -> int | None:
    """The sample dimension of a layer's output, or of its input where only that is known."""
    return dims.y if isinstance(dims.y, int) else dims.x if isinstance(dims.x, int) else None


def _unknown(topology: ModelTopology, problem: str) -> ModelTopology:
    layers = tuple(
        structs.replace(layer, input_samples=None, output_samples=None) for layer in topology.layers
    )
    return structs.replace(topology, layers=layers, layout_measured=True, layout_problem=problem)


def _placed(layer: LayerInfo, dims: _Dims, lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> LayerInfo:
    """``layer`` with its sample dimensions, its shapes without them."""
    x, y = dims.x, dims.y
    if x == y == _SAME:  # it sees nothing of the data, like an embedding of positions
        return structs.replace(layer, input_samples=None, output_samples=None)
    x_dim = x if isinstance(x, int) else y if isinstance(y, int) else 0
    y_dim = y if isinstance(y, int) else x_dim
    input_rows, input_shape = _apart(layer.input_rows, layer.input_shape, x_dim)
    output_rows, output_shape = _apart(layer.output_rows, layer.output_shape, y_dim)
    return structs.replace(
        layer,
        input_shape=input_shape,
        output_shape=output_shape,
        input_rows=input_rows,
        output_rows=output_rows,
        input_samples=x_dim,
        output_samples=y_dim,
        input_lengths=lengths[0],
        output_lengths=lengths[1],
    )


def _apart(rows: int, shape: tuple[int, ...], dim: int) -> tuple[int, tuple[int, ...]]:
    """Size of the dimension that counts samples, and the shape of one sample."""
    if dim == 0 or len(shape) < dim:
        return rows, shape
    whole = (rows, *shape)
    return whole[dim], (*whole[:dim], *whole[dim + 1 :])


# ---------------------------------------------------------------- the experiment


def _dims(model: nn.Module, names: Sequence[str], run: Run, few: Any) -> dict[str, _Dims]:
    base: dict[str, _Seen] = {}
    with _watched(model, names, base):
        run(few)
    other: dict[str, _Seen] = {}
    with _watched(model, names, other):
        run(_with_another_first(few))
    n = _num_samples(few)
    assert n is not None
    return {
        name: _Dims(_sample_dim(seen.x, other[name].x, n), _sample_dim(seen.y, other[name].y, n))
        for name, seen in base.items()
        if name in other
    }


def _sample_dim(a: Tensor | None, b: Tensor | None, n: int) -> int | str:
    """Dimension in which what differs between ``a`` and ``b`` belongs to the first of ``n`` samples.

    A sample may hold several entries of the dimension: neighbours (its windows, its tokens in one row), or
    every n-th (batches that were put behind one another).
    """
    if a is None or b is None:
        return _SAME
    if a.shape != b.shape:
        return _MIXED
    limit = _TOLERANCE * torch.nan_to_num(a.float()).abs().max() if a.numel() else 0.0
    differs = ((a.float() - b.float()).abs() > limit) | (a.isnan() != b.isnan())
    if not bool(differs.any()):
        return _SAME
    for dim in range(min(2, a.dim() - 1) or 1):
        size = a.shape[dim]
        if size % n:
            continue
        entries = differs.movedim(dim, 0).reshape(size, -1).any(dim=1)
        if not bool(entries[size // n :].any()) or not bool(entries.reshape(-1, n)[:, 1:].any()):
            return dim
    return _MIXED


def _lengths(
    model: nn.Module, names: Sequence[str], run: Run, few: Any
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layer -> first dimension behind the samples of its input and output, each time one sequence is shorter."""
    leaves, spec = pytree.tree_flatten(few)
    sequences = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 1]
    if len(sequences) < 2:
        return {}
    found: dict[str, tuple[list[int], list[int]]] = {}
    for index in sequences[:_MAX_SEQUENCES]:
        if leaves[index].shape[1] < 2:
            continue
        shorter = [leaf[:, :-1].contiguous() if i == index else leaf for i, leaf in enumerate(leaves)]
        seen: dict[str, _Seen] = {}
        try:
            with _watched(model, names, seen):
                run(pytree.tree_unflatten(shorter, spec))
        except Exception:  # this sequence cannot have a length of its own: nothing is to be learned
            continue
        for name, value in seen.items():
            ins, outs = found.setdefault(name, ([], []))
            ins.append(_length(value.x))
            outs.append(_length(value.y))
    return {name: (tuple(ins), tuple(outs)) for name, (ins, outs) in found.items()}


def _length(x: Tensor | None) -> int:
    return x.numel() // max(1, x.shape[-1]) if x is not None and x.dim() > 1 else 0


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], seen: dict[str, _Seen]) -> Iterator[None]:
    """Note the first input and output of each layer while the block runs."""
    handles = []

    def watch(name: str) -> None:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            seen.setdefault(name, _Seen(_kept(x), _kept(primary(output))))

        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    try:
        for name in names:
            watch(name)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(value: Any) -> Tensor | None:
    """A copy, because the host may write in place next."""
    usable = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    return value.detach().clone() if usable else None


# ---------------------------------------------------------------- batches


def _num_samples(batch: Any) -> int | None:
    """Size of the first dimension of the first tensor that has one."""
    sizes = (leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return next(sizes, None)


def _sizes(batch: Any) -> list[int]:
    """Numbers of samples to try: a few, then the whole batch, which alone may be consistent (a graph)."""
    size = _num_samples(batch)
    if not size:
        return []
    return [min(size, _SAMPLES)] if size <= _SAMPLES else [_SAMPLES, size]


def _take(batch: Any, count: int) -> Any:
    """The first ``count`` samples; a single one is taken twice."""
    size = _num_samples(batch)
    index = list(range(count)) if count > 1 else [0, 0]

    def few(leaf: Any) -> Any:
        samples = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return leaf[torch.tensor(index, device=leaf.device)] if samples else leaf

    return pytree.tree_map(few, batch)


def _with_another_first(batch: Any) -> Any:
    """The batch with other values in its first sample.

    Floats get noise on top. Whole numbers may be indices, so others take what another sample has, or
    their own in another order; only where that changes nothing in the whole batch are they counted down.

    Raises:
        AttachError: Nothing could be changed.
    """
    n = _num_samples(batch)
    generator = torch.Generator().manual_seed(0)
    changed = False

    def other(leaf: Any, *, count: bool = False) -> Any:
        nonlocal changed
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != n or leaf.numel() == 0:
            return leaf
        first = leaf[0]
        if leaf.is_floating_point():
            noise = torch.randn(first.shape, generator=generator).to(leaf)
            new = first + noise * (
                1.0 + torch.nan_to_num(first.float(), posinf=0.0, neginf=0.0).abs().max()
            ).to(leaf)
        else:
            orders = [sample for sample in leaf[1:] if not torch.equal(sample, first)]
            if first.dim() and not torch.equal(first.roll(1, -1), first):
                orders.append(first.roll(1, -1))
            if orders:
                new = orders[0]
            elif count and leaf.dtype != torch.bool:
                new = torch.where(first > 0, first - 1, first + 1)
            else:
                return leaf
        changed = True
        return torch.cat([new.unsqueeze(0), leaf[1:]])

    altered = pytree.tree_map(other, batch)
    if not changed:
        altered = pytree.tree_map(lambda leaf: other(leaf, count=True), batch)
    if not changed:
        raise AttachError("the batch holds nothing that could be changed in its first sample")
    return altered
