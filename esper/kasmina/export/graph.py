"""Turn a draft with branches into plain torch: locally, as a ``torch.fx`` graph, or as a program."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from esper.errors import ExportError
from esper.kasmina.example import Example
from esper.kasmina.export.draft import Branch, Draft
from esper.kasmina.export.numbering import config_of

__all__ = [
    "capture_graph",
    "capture_program",
    "dynamic_shapes",
    "exported_program",
    "forgo_cache",
    "needs_esper",
    "place_branches",
    "single_chain",
]


def needs_esper(module: nn.Module) -> bool:
    """Whether ``module``'s own class is defined by esper."""
    return type(module).__module__.split(".")[0] == "esper"


def place_branches(draft: Draft) -> nn.Module:
    """Put every branch next to its layer, in the layer's place, and return the model.

    A stacked block gives an ``nn.Sequential`` of the two, a branch a small graph of layer and branch. The
    host's own classes and its control flow stay.

    Raises:
        ExportError: A branch crosses layers, or some class cannot be imported without esper.
    """
    for branch in draft.branches:
        if branch.crosses:
            raise ExportError(
                f"seed {branch.seed_id} at {branch.site} reads another layer's input, so it needs a graph of the model"
            )
    for target in {id(b.target): b.target for b in draft.branches}.values():
        branches = draft.at(target)
        if all(b.reads == "block" and b.alpha == 1.0 for b in branches):
            grown: nn.Module = nn.Sequential(target, *(b.module for b in branches))
        else:
            grown = _trace(_Beside(target, branches), leaves=(target, *_blocks_of(branches)))
        grown.train(target.training)
        if draft.model is target:
            draft.model = grown
        else:
            _replace(draft.model, target, grown)
    for name, module in draft.model.named_modules():
        if needs_esper(module):
            raise ExportError(f"{name or 'the model'!r} is of esper's own class {type(module).__qualname__}")
    return draft.model


def capture_graph(draft: Draft, example: Example | None) -> fx.GraphModule:
    """Trace the model with its branches symbolically into a graph over plain layers.

    Submodules, parameters and the choice between training and evaluation (of modules; not of
    ``F.dropout(..., self.training)`` in the host's own code) stay alive.

    Args:
        draft: Model and branches.
        example: Decides conditions on shapes of the inputs; without it any condition ends the trace.

    Raises:
        ExportError: The host's control flow cannot be traced.
    """
    if draft.branches:
        draft.adopt()
    return _trace(draft.model, draft=draft, example=example)


def capture_program(draft: Draft, example: Example) -> nn.Module:
    """Capture the model with its branches by ``torch.export``; for evaluation only, and without a cache.

    Raises:
        ExportError: torch.export cannot capture it.
    """
    if draft.branches:
        draft.adopt()
    forgo_cache(draft.model)
    with draft.running() as model:
        module = exported_program(model, example).module()
    assert isinstance(module, nn.Module)
    return module


def forgo_cache(model: nn.Module) -> None:
    """Let a transformer run without its cache of keys and values, which is no tensor that a program could return."""
    for module in model.modules():
        config = config_of(module)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]


def exported_program(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """Run ``torch.export`` with as many free dimensions as it finds, the batch among them.

    Raises:
        ExportError: torch.export cannot capture the model.
    """
    if example.batch_size == 1:
        example = example.with_batch(2)  # a size of one would be taken for a constant
    with torch.no_grad():
        try:
            return torch.export.export(
                model,
                example.args,
                example.kwargs,
                dynamic_shapes=dynamic_shapes(model, example),
                strict=False,
            )
        except Exception as error:  # torch.export raises from many places
            raise ExportError(
                f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: {_first_line(error)}"
            ) from error


def dynamic_shapes(model: nn.Module, example: Example) -> dict[str, Any]:
    """Free dimensions by argument name: all of them, as far as the model lets them be free."""
    names = _bound(model, example)
    free = torch.export.Dim.AUTO

    def dims(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {
            axis: free for axis, size in enumerate(value.shape) if size > 1
        }  # torch takes 0 and 1 for constants

    shapes: dict[str, Any] = pytree.tree_map(dims, names)
    return shapes


def single_chain(model: nn.Module, branch: Branch) -> bool:
    """Whether a symbolic trace proves that ``branch``'s source layer feeds its target alone.

    For models without an example input; False also when the model cannot be traced.
    """
    try:
        graph = _trace(model)
    except ExportError:
        return False
    modules = dict(graph.named_modules())
    calls: dict[int, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(id(modules[node.target]), []).append(node)
    ours = [calls.get(id(layer), []) for layer in (branch.source, branch.target)]
    if any(len(found) != 1 for found in ours):
        return False
    node, end = ours[0][0], ours[1][0]
    while node is not end:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return True


class _Beside(nn.Module):
    """A layer with the branches that stand at its output; exists to be traced."""

    def __init__(self, layer: nn.Module, branches: list[Branch]) -> None:
        super().__init__()
        self.layer = layer
        self.branches = nn.ModuleDict({branch.seed_id: branch.module for branch in branches})
        self._draft = Draft(self, branches)

    def forward(self, x: Any) -> Any:
        self._draft.note_input(self.layer, (x,), {})
        return self._draft.add_branches(self.layer, self.layer(x), (x,), {})


class _Tracer(fx.Tracer):
    """A symbolic tracer that runs a draft's branches and decides conditions on the inputs' shapes."""

    def __init__(self, draft: Draft | None, example: Example | None, leaves: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self._draft = draft
        self._example = example
        self._leaves = {id(leaf) for leaf in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._draft is None:
            return super().call_module(m, forward, args, kwargs)
        self._draft.note_input(m, args, kwargs)
        y = super().call_module(m, forward, args, kwargs)
        return self._draft.add_branches(m, y, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self._example is None:
            return super().to_bool(obj)
        value = self._value(obj.node, _bound(self.root, self._example))
        if isinstance(value, Tensor):
            raise TraceError("the host's control flow depends on the values of its input")
        return bool(value)

    def _value(self, node: fx.Node, inputs: dict[str, Any]) -> Any:
        """What ``node`` is for the example; only for what follows from the inputs without layers."""
        if node.op == "placeholder" and node.target in inputs:
            return inputs[str(node.target)]
        if node.op not in ("call_function", "call_method"):
            raise TraceError(f"a condition depends on {node.op} {node.target}")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self._value(n, inputs))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _trace(
    root: nn.Module,
    *,
    draft: Draft | None = None,
    example: Example | None = None,
    leaves: tuple[nn.Module, ...] = (),
) -> fx.GraphModule:
    tracer = _Tracer(draft, example, leaves)
    try:
        graph = tracer.trace(root)
    except Exception as error:  # a host's forward may raise anything when given proxies
        raise ExportError(
            f"torch.fx cannot trace {type(root).__name__}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    module = fx.GraphModule(root, graph, class_name=type(root).__name__)
    graph = module.graph
    graph.eliminate_dead_code()
    graph.lint()
    for node in graph.nodes:
        node.meta = {}  # holds the classes of the modules that were traced through
        node.type = None  # the host's annotations, as strings where it postpones them: they cannot be pickled
    module.recompile()
    module.delete_all_unused_submodules()
    # Pickled along by reference, and needed by nothing: the result has to live without esper.
    module._tracer_cls = graph._tracer_cls = None
    module.train(root.training)
    return module


def _bound(model: nn.Module, example: Example) -> dict[str, Any]:
    """The example's arguments by name, with the defaults of the others that fx turns into inputs."""
    bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs)
    return dict(bound.arguments)


def _blocks_of(branches: list[Branch]) -> tuple[nn.Module, ...]:
    return tuple(branch.module for branch in branches if branch.reads == "block")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever a module of ``model`` holds ``old`` as a child."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
