"""The body: a host model that can carry seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.errors import AttachError, GrowthError
from esper.kasmina.blueprints import Cost, get_blueprint
from esper.kasmina.evaluation_pass import find_skipped
from esper.kasmina.example import forget_example
from esper.kasmina.find_sites import context_of, find_sites
from esper.kasmina.garbage import uncollected
from esper.kasmina.layer import SEEDS, SeedLayer, restore_class, swap_class
from esper.kasmina.optimizer import check_optimizer, register_parameters, unregister_parameters
from esper.kasmina.pricing import Prices
from esper.kasmina.reasons import why_no_site
from esper.kasmina.sample_dims import measure_sample_dims
from esper.kasmina.seed import Seed, SeedState
from esper.kasmina.sharded import is_sharded, why_unusable
from esper.kasmina.sites import Site
from esper.kasmina.structure import (
    SeedIndex,
    all_seeds,
    follow_state_dict,
    has_seeds,
    plant,
    unfollow_state_dict,
    uproot,
)
from esper.kasmina.topology import ModelTopology
from esper.kasmina.trace import trace
from esper.messages import HealthSignal

__all__ = ["Body", "attach", "detach"]


class Body:
    """Seeds, sites and topology of one host model.

    Args:
        model: The host; its eligible layers become seed layers in place.
        topology: As traced from it.
        seed: Base of the random numbers that initialise seeds.

    Attributes:
        topology: The traced data flow.
        sites: Where seeds can attach.
        refused: Layer name -> why it cannot carry seeds.
        on_change: Called after a seed was added or removed.
        compiled: ``torch.compile`` has compiled something of the host.
    """

    def __init__(self, model: nn.Module, topology: ModelTopology, *, seed: int = 0) -> None:
        self.model = model
        self.topology: ModelTopology
        self.sites: list[Site]
        self.refused: dict[str, str]
        self.on_change: Callable[[], None] | None = None
        self.compiled = False
        self.seed = seed
        self._next_id = 1 + max((_number(s.seed_id) for s in all_seeds(model)), default=0)
        self._health: Sequence[HealthSignal] = ()
        self._named: list[Site] = []
        self._by_name: dict[str, Site] = {}
        self._index = SeedIndex()
        # Counted once: to walk all names of a deep host takes longer than to decide on it.
        self._num_host = sum(
            p.numel()
            for name, p in model.named_parameters()
            if SEEDS not in name.split(".") and not is_lazy(p)
        )
        self._host_flops = sum(layer.flops for layer in topology.layers if not layer.block)
        self._settle(topology)
        follow_state_dict(model)
        for planted in self.seeds:
            planted.bind(self)

    @property
    def seeds(self) -> list[Seed]:
        """Every seed in the model."""
        return self._index.of(self.model)

    @property
    def num_parameters(self) -> int:
        """Parameters of host and seeds together."""
        return self._num_host + sum(p.numel() for seed in self.seeds for p in seed.parameters())

    @property
    def flops(self) -> int:
        """FLOPs of one forward pass of one sample: host and the seeds that run."""
        seeds = self.seeds
        if not seeds:  # asked for at every batch
            return self._host_flops
        return self._host_flops + sum(self.cost(s.site.name, s.blueprint, s.size).flops for s in seeds)

    def site(self, name: str | Site) -> Site:
        """The site called ``name``.

        Raises:
            GrowthError: There is none; the message lists those there are, or why the layer was refused.
        """
        wanted = name.name if isinstance(name, Site) else name
        if self._named is not self.sites:  # the list is replaced, never changed
            self._named, self._by_name = self.sites, {site.name: site for site in self.sites}
        if (found := self._by_name.get(wanted)) is not None:
            return found
        layer = wanted.split(":", 1)[-1].split("->")[-1]
        if layer in self.refused:
            raise GrowthError(
                f"no site {wanted!r}: layer {layer!r} was refused, because it is {self.refused[layer]}"
            )
        known = ", ".join(site.name for site in self.sites[:12]) or "none"
        more = f" and {len(self.sites) - 12} more" if len(self.sites) > 12 else ""
        raise GrowthError(f"no site {wanted!r} in this model; sites are {known}{more}")

    def default_size(self, site: str | Site, blueprint: str) -> int:
        """The size that ``blueprint`` has at ``site`` when none is asked for."""
        return get_blueprint(blueprint).default_size(context_of(self.model, self.topology, self.site(site)))

    def cost(self, site: str | Site, blueprint: str, size: int) -> Cost:
        """Parameters and forward FLOPs of a seed before it is built."""
        return self._prices.of(self._known_site(site), blueprint, size)

    def germinate(self, site: str | Site, blueprint: str, size: int | None = None) -> Seed:
        """Put a new seed at ``site``; the model's function does not change.

        Args:
            site: A site of this body, or its name.
            blueprint: Registered name; must fit the site.
            size: Units, rank or channels; the blueprint's default when None.

        Returns:
            The seed, in stage ``germinated``.

        Raises:
            GrowthError: Unknown site or blueprint, or they do not fit. Nothing was changed.
        """
        found = self.site(site)
        projections = self.topology.layer(found.target).output_projections if found.kind == "stack" else ()
        state = SeedState(
            seed_id=f"s{self._next_id}",
            site=found,
            blueprint=blueprint,
            size=self.default_size(found, blueprint) if size is None else size,
            output_projections=projections,
        )
        seed = plant(self.model, state, init_seed=_mix(self.seed, self._next_id))
        self._next_id += 1
        seed.bind(self)
        self._tell()
        return seed

    def cull(self, seed: Seed | str, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Remove ``seed``, its parameters' place in ``optimizers`` and their state there.

        Raises:
            GrowthError: The model has no such seed.
        """
        wanted = seed if isinstance(seed, str) else seed.seed_id
        found = next((s for s in self.seeds if s.seed_id == wanted), None)
        if found is None:
            known = ", ".join(s.seed_id for s in self.seeds) or "none"
            raise GrowthError(f"no seed {wanted!r} in this model; seeds are {known}")
        unregister_parameters(list(optimizers), list(found.parameters()))
        uproot(self.model, found)
        found.enter("culled", 0.0)
        self._tell()

    def register(self, *optimizers: torch.optim.Optimizer) -> int:
        """Give every seed parameter that no optimizer holds to the group of its host layer's weight.

        Args:
            *optimizers: All optimizers that train the host.

        Returns:
            How many parameters were added.

        Raises:
            UnsupportedError: An optimizer that cannot take new parameters, such as LBFGS.
            GrowthError: No group can be told to be the right one.
        """
        for optimizer in optimizers:
            check_optimizer(optimizer)
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        names = {id(p): name for name, p in self.model.named_parameters()}
        new: list[tuple[str, nn.Parameter]] = []
        anchors: list[nn.Parameter] = []
        for seed in self.seeds:
            for name, parameter in seed.branch.named_parameters():
                if id(parameter) not in held and parameter.requires_grad:
                    new.append((names[id(parameter)], parameter))
                    anchors.append(self._anchor(seed, name))
        register_parameters(list(optimizers), new, anchors)
        return len(new)

    def measure_layout(self, run: Callable[[Any], Any], batch: Any) -> None:
        """Find out which dimension of each layer's tensors counts samples; once, between two steps.

        Sites and blueprints that mixed samples, or met another number of rows, are given up.

        Args:
            run: Runs the model on a batch of the structure of ``batch``.
            batch: Some samples: tensors in any nesting of tuples, lists and dicts.
        """
        if not self.topology.layout_measured:
            self._settle(measure_sample_dims(self.model, self.topology, run, batch))

    def check_evaluation(self, run: Callable[[], Any]) -> None:
        """Find layers that an evaluation pass skips, and give up sites whose seeds it would not see.

        Args:
            run: Calls the model; runs in eval mode without gradients, a second time where layers were skipped.
        """
        skipped = find_skipped(self.model, run)
        functional = {site.target for site in self.sites if site.functional}
        for name in skipped.names - skipped.curable - functional:
            self.refused[name] = skipped.reason
        self.sites = [site for site in self.sites if not skipped.hides(self.model, site)]

    def manifest(self) -> list[SeedState]:
        """The record of every seed: all of it but the weights."""
        return [seed.state for seed in self.seeds]

    def health(self) -> list[HealthSignal]:
        """The health of each layer and seed on the last sampled step; empty before the first.

        The callback samples by itself; in a loop of one's own :class:`esper.kasmina.probes.ProbeRunner` does.
        """
        return list(self._health)

    def keep_health(self, signals: Sequence[HealthSignal]) -> None:
        """Remember what was measured on a sampled step."""
        self._health = signals

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's own state dict."""
        return {"next_id": self._next_id, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self._next_id = int(state["next_id"])
        self.seed = int(state["seed"])
        for seed in self.seeds:
            seed.bind(self)

    def _settle(self, topology: ModelTopology) -> None:
        """Find the sites of ``topology`` and let their layers carry seeds."""
        self.topology = topology
        self.sites = find_sites(self.model, topology)
        self.refused = dict(topology.refused) | why_no_site(self.model, topology, self.sites)
        if is_sharded(self.model):
            reasons = [(site, why_unusable(site.kind, functional=site.functional)) for site in self.sites]
            self.refused |= {site.target: reason for site, reason in reasons if reason}
            self.sites = [site for site, reason in reasons if not reason]
        self._prices = Prices(self.model, topology)
        for site in self.sites:
            self.refused.pop(site.target, None)
            swap_class(self.model.get_submodule(site.target), functional=site.functional)
            if not site.functional:
                swap_class(self.model.get_submodule(site.source))

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _known_site(self, site: str | Site) -> Site:
        if isinstance(site, Site):
            return site
        planted = next((s.site for s in self.seeds if s.site.name == site), None)
        return planted or self.site(site)

    def _anchor(self, seed: Seed, name: str) -> nn.Parameter:
        """The host parameter whose optimizer group a new parameter joins."""
        target = self.model.get_submodule(seed.site.target)
        if seed.site.kind == "stack":  # a copied block: each parameter follows its original
            # not get_parameter: where a seed acts on a weight, that attribute is no parameter any more
            return dict(target.named_parameters())[name]
        weight = target._parameters.get("weight")
        return weight if weight is not None else next(target.parameters())


def attach(
    model: nn.Module,
    example_input: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> Body:
    """Make ``model`` able to grow, in place.

    State-dict keys, parameter identity, ``isinstance`` and outputs do not change.

    Args:
        model: Any module.
        example_input: One input batch: a tensor, a tuple of positional or a dict of keyword arguments.
        loss: From the model's output to a scalar; by default the mean of all float outputs.
        seed: Base of the random numbers that initialise seeds.

    Returns:
        The body: sites, topology, and the means to grow.

    Raises:
        AttachError: The model cannot be traced, or is attached already.
    """
    if any(isinstance(module, SeedLayer) for module in model.modules()) and not has_seeds(model):
        raise AttachError("this model is attached already; call esper.detach(model) first")

    def run(given: Any) -> Any:
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)

    with uncollected():
        topology = trace(model, lambda: (loss or mean_output)(run(example_input)))
        body = Body(model, measure_sample_dims(model, topology, run, example_input), seed=seed)
    body.check_evaluation(lambda: run(example_input))
    return body


def detach(model: nn.Module) -> None:
    """Give every layer of ``model`` its original class back.

    Raises:
        AttachError: The model still carries seeds: export it, or cull them first.
    """
    if has_seeds(model):
        ids = ", ".join(seed.seed_id for seed in all_seeds(model))
        raise AttachError(
            f"the model still carries seeds ({ids}): esper.export it, or cull them before detaching"
        )
    for module in model.modules():
        restore_class(module)
    unfollow_state_dict(model)
    forget_example(model)


def mean_output(output: Any) -> Tensor:
    """The sum of the means of all float tensors in ``output``: a loss that every output reaches."""
    tensors = list(_float_tensors(output))
    if not tensors:
        raise AttachError(
            f"the model returned {type(output).__name__} without any float tensor; pass loss=, a function from the "
            "output to a scalar"
        )
    return torch.stack([tensor.float().mean() for tensor in tensors]).sum()


def _float_tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _float_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _float_tensors(item)


def _number(seed_id: str) -> int:
    return int(seed_id[1:]) if seed_id[1:].isdigit() else 0


def _mix(seed: int, number: int) -> int:
    """A 63-bit stream number from the base seed and the seed's own (splitmix64's finaliser)."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1
