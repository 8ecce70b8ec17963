"""Find a model's topology by walking the autograd graph of one training step.

Each module's input and output pass through an identity node that carries its name. After the
forward pass the graph from the loss back to the data *is* the data flow: Python control flow,
skips and custom modules need no special treatment. The values are not changed by a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from msgspec import structs
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.errors import AttachError
from esper.kasmina.activations import op_name
from esper.kasmina.eager import eagerly
from esper.kasmina.example import keep_example
from esper.kasmina.flow import DataFlow, Label
from esper.kasmina.foreign import left_alone
from esper.kasmina.layer import SEEDS, base_class, primary, replace_primary
from esper.kasmina.lazy import settle_by_pass
from esper.kasmina.recompute import current_region, walkable_checkpoints
from esper.kasmina.topology import Edge, LayerInfo, ModelTopology

__all__ = ["Tracer", "preserved", "trace"]

_IMAGE_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.ConvTranspose2d)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SUMS = ("add", "clone")
_HOMOGENEOUS = (
    "reshape",
    "dropout",
    "nativedropout",
    "mul",
    "div",
    "tocopy",
    "view",
    "unsafeview",
    "transpose",
)
"""Operations that keep zeros zero: allowed between a projection and the residual stream."""
_PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


class _Mark(torch.autograd.Function):
    """Identity with a label; the anchor makes a node exist even where nothing upstream is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, label: Label) -> Tensor:
        ctx.label = label
        return x.clone()  # a copy, not a view: the host may write in place next

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Call:
    """What one module's calls in the traced step looked like."""

    def __init__(self, module: nn.Module, leaf: bool) -> None:
        self.module, self.leaf = module, leaf
        self.count = 0
        self.input_rows = self.output_rows = 0
        self.plain = False  # one value in, one out
        self.input_shape: tuple[int, ...] | None = None
        self.output_shape: tuple[int, ...] | None = None
        self.entry: Any = None  # autograd node of the marked input
        self.exit: Any = None
        self.region: object | None = None  # of gradient checkpointing


class Tracer:
    """Watches one forward pass of ``model``; :meth:`finish` turns it into a topology.

    Usage::

        with Tracer(model) as tracer:
            loss = training_step(model, batch)
        topology = tracer.finish(loss)      # before backward frees the graph

    Compiled regions run eagerly until :meth:`close`, because hooks added after compilation are ignored
    by it. So does the backward pass, when it comes before that: what gradient checkpointing computes
    again there has to be what it computed before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.refused: dict[str, str] = {}
        self._calls: dict[str, _Call] = {}
        self._order: list[str] = []
        self._handles: list[Any] = []
        self._while_open = ExitStack()
        self._finished = False

    def __enter__(self) -> Tracer:
        for module in (self.model, *self.model.children()):
            self._handles.append(module.register_forward_pre_hook(_keep_call, with_kwargs=True))
        alone = left_alone(self.model)
        self.refused.update({name: reason for name, reason in alone.items() if reason})
        for name, module in self.model.named_modules():
            if not name or name in alone or SEEDS in name.split("."):
                continue
            role = self._role(name, module)
            if role is not None:
                self._watch(name, module, leaf=role == "leaf")
        self._while_open.enter_context(eagerly())
        self._while_open.enter_context(walkable_checkpoints())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks and let compiled code run compiled again; safe to call twice."""
        self._remove_hooks()
        self._while_open.close()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` has been called."""
        return self._finished

    def finish(self, loss: Tensor) -> ModelTopology:
        """Walk the graph behind ``loss``, take the hooks off and return the topology.

        Args:
            loss: The training loss, before ``backward`` ran.

        Raises:
            AttachError: The loss has no graph, so nothing can be learned about the data flow.
        """
        if loss.grad_fn is None:
            raise AttachError(
                "tracing needs a loss that depends on the model through autograd, but the loss has no grad_fn; "
                "return the undetached loss from training_step, and do not run it under no_grad"
            )
        self._remove_hooks()
        self._finished = True
        flow = DataFlow({name: place for place, name in enumerate(self._order)})
        outputs = flow.all_into(loss.grad_fn)
        flow.into(loss.grad_fn)  # the operations behind the last layers count too
        edges: list[Edge] = []
        reads_input: set[str] = set()
        for name in self._order:
            call = self._calls[name]
            if call.leaf and call.entry is not None:
                found, from_data = flow.into(call.entry)
                edges.extend(Edge(source, name, ops) for source, ops in found.items())
                if from_data:
                    reads_input.add(name)
        for name, call in self._calls.items():
            if call.count == 0 and self._is_candidate(call):
                self.refused[name] = (
                    "never called as a module in training: its parameters are used functionally, "
                    "or a fast path skips it; seed the block around it instead"
                )
            elif call.count > 1 and self._is_candidate(call):
                self.refused[name] = (
                    f"called {call.count} times in one forward pass: a seed would run each time"
                )
        regions = _numbered(self._calls[name].region for name in self._order)
        layers = [
            self._info(name, outputs, reads_input, region)
            for name, region in zip(self._order, regions, strict=True)
        ]
        flops = _flops_inside(layers)
        layers = [
            structs.replace(layer, flops=flops.get(layer.name, 0)) if layer.block else layer
            for layer in layers
        ]
        ends = [layer for layer in layers if layer.is_output]
        positions = max((_positions(layer) for layer in ends), default=1)
        # LogSoftmax is the cross-entropy of any classifier.
        attends = any("scaleddotproduct" in op.lower() or op.startswith("Softmax") for op in flow.ops_seen)
        attends = attends or any(
            isinstance(call.module, nn.MultiheadAttention) for call in self._calls.values()
        )
        for call in self._calls.values():
            call.entry = call.exit = call.region = None  # let the step's graph go
        return ModelTopology(
            layers=tuple(layers),
            edges=tuple(edges),
            refused=dict(self.refused),
            num_parameters=_host_parameters(self.model),
            positions=positions,
            transformer=attends and any(layer.output_projections for layer in layers),
        )

    def _role(self, name: str, module: nn.Module) -> str | None:
        own = list(module.parameters(recurse=False))
        children = any(
            any(True for _ in child.parameters()) for key, child in module.named_children() if key != SEEDS
        )
        if isinstance(module, nn.MultiheadAttention) or (own and not children):
            return "leaf"
        if children and not isinstance(module, _CONTAINERS):
            return "block"
        if isinstance(module, _CONTAINERS) and children and type(module) is nn.Sequential:
            self.refused[name] = (
                "an nn.Sequential iterates over its children, so it cannot carry a seed of its own"
            )
        return None

    def _watch(self, name: str, module: nn.Module, leaf: bool) -> None:
        call = self._calls[name] = _Call(module, leaf)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call.count += 1
            if call.count == 1:
                self._order.append(name)
                call.region = current_region()
                call.plain = sum(value is not None for value in (*args, *kwargs.values())) == 1
            key = None if args else next(iter(kwargs), None)
            value: Any = args[0] if args else kwargs.get(key or "")
            if not _markable(value):
                return None
            if call.count == 1:
                call.input_rows, call.input_shape = value.shape[0], tuple(value.shape[1:])
            marked = self._mark(value, Label(name, "in", leaf))
            if call.count == 1:
                call.entry = marked.grad_fn
            if args:
                return (marked, *args[1:]), kwargs
            return args, {**kwargs, str(key): marked}

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            value = primary(output)
            call.plain = call.plain and value is output
            if not _markable(value):
                return None
            marked = self._mark(value, Label(name, "out", leaf))
            if call.count == 1:
                call.output_rows, call.output_shape = value.shape[0], tuple(value.shape[1:])
                call.exit = marked.grad_fn
            return replace_primary(output, marked)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _mark(self, x: Tensor, label: Label) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        anchor = torch.zeros((), requires_grad=True)
        marked: Tensor = _Mark.apply(x, anchor, label)
        return marked

    def _residual_projections(self, name: str, call: _Call) -> tuple[str, ...]:
        """Layers that write to the residual stream of block ``name``; empty if it is no pre-norm block.

        The block's output has to be its input plus outputs of linear layers, so that zeroing these
        layers makes the block the identity. Every path back from the output is followed through
        additions and aliases until it meets a layer (which is then a projection) or the block's input.
        """
        if call.exit is None or call.entry is None or call.input_shape != call.output_shape:
            return ()
        projections: list[str] = []
        reached_input = False
        seen = {call.exit}
        stack: list[tuple[Any, bool]] = [(call.exit, True)]  # (node, only identities so far)
        while stack:
            node, pure = stack.pop()
            label = getattr(node, "label", None)
            if isinstance(label, Label):
                if label.leaf and label.side == "out":
                    layer = self._calls[label.name].module
                    linear = isinstance(layer, _PROJECTIONS) or type(layer).__name__ == "Conv1D"
                    if not linear or not label.name.startswith(f"{name}."):
                        return ()
                    projections.append(label.name[len(name) + 1 :])
                    continue
                if node is call.entry:
                    if not pure:
                        return ()
                    reached_input = True
                    continue
                successors = node.next_functions[:1]
            else:
                op = op_name(node).lower().split("backward")[0]
                if op not in _SUMS:
                    if op not in _HOMOGENEOUS:
                        return ()
                    pure = False
                successors = node.next_functions
            for following, _ in successors:
                if (
                    following is not None
                    and following not in seen
                    and type(following).__name__ != "AccumulateGrad"
                ):
                    seen.add(following)
                    stack.append((following, pure))
        return tuple(sorted(projections)) if reached_input else ()

    def _info(self, name: str, outputs: set[str], reads_input: set[str], region: int) -> LayerInfo:
        call = self._calls[name]
        module = call.module
        shape = call.output_shape or ()
        image = isinstance(module, _IMAGE_LAYERS) and len(shape) == 3
        info = LayerInfo(
            name=name,
            type=base_class(module).__name__,
            input_shape=call.input_shape or (),
            output_shape=shape,
            input_rows=call.input_rows,
            output_rows=call.output_rows,
            plain_call=call.plain,
            num_parameters=_host_parameters(module),
            flops=0,
            num_calls=call.count,
            block=not call.leaf,
            image=image,
            is_output=name in outputs,
            reads_input=name in reads_input,
            region=region,
            output_projections=() if call.leaf else self._residual_projections(name, call),
        )
        if call.leaf and not isinstance(module, nn.Embedding):
            matrices = sum(
                p.numel() for key, p in module.named_parameters() if p.dim() > 1 and SEEDS not in key
            )
            info = structs.replace(info, flops=2 * matrices * _positions(info))
        return info

    @staticmethod
    def _is_candidate(call: _Call) -> bool:
        return not call.leaf or isinstance(call.module, (nn.Linear, nn.Conv2d))


def trace(model: nn.Module, forward: Callable[[], Tensor]) -> ModelTopology:
    """Trace ``model`` by one call of ``forward``, leaving everything as it was.

    Args:
        model: The host.
        forward: Runs the model in training mode and returns a loss.

    Returns:
        The topology; modes, buffers, random state and gradients are restored.
    """
    settle_by_pass(model, forward)
    with preserved(model):
        model.train()
        with torch.enable_grad(), Tracer(model) as tracer:
            loss = forward()
            return tracer.finish(loss)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore training flags, buffers and the random state when the block ends; compiled code runs eagerly in it."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    # Asked for only where there can be any: a walk over the names of a deep host takes as long as running it.
    parameters = model.parameters() if torch.cuda.is_initialized() else ()
    devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
    try:
        with eagerly(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def _keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remember a few samples of what the model was called with: an export proves itself on them."""
    if "forward" not in module.__dict__:  # else Lightning has put a step of its own in its place, for DDP
        keep_example(module, args, kwargs)


def _markable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _numbered(regions: Iterable[object | None]) -> list[int]:
    """A number for each region of gradient checkpointing, by order of appearance; 0 outside of all."""
    numbers: dict[int, int] = {}
    return [0 if region is None else numbers.setdefault(id(region), len(numbers) + 1) for region in regions]


def _flops_inside(layers: list[LayerInfo]) -> dict[str, int]:
    """Module -> FLOPs of all leaf layers below it."""
    found: dict[str, int] = {}
    for layer in layers:
        if not layer.block:
            name = layer.name
            while "." in name:
                name = name.rpartition(".")[0]
                found[name] = found.get(name, 0) + layer.flops
    return found


def _positions(layer: LayerInfo) -> int:
    shape = layer.output_shape[1:] if layer.image else layer.output_shape[:-1]
    result = 1
    for size in shape:
        result *= size
    return result


def _host_parameters(module: nn.Module) -> int:
    return sum(
        p.numel() for name, p in module.named_parameters() if SEEDS not in name.split(".") and not is_lazy(p)
    )
