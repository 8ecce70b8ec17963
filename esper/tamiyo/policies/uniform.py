"""``uniform``: like seeds of one size at every like place, as adapters on a pretrained network are laid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from esper.errors import ConfigError
from esper.tamiyo.policies.base import Choice, EventPolicy, Pause
from esper.tamiyo.policies.events import EventConfig, check_options

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState, SiteView

__all__ = ["UniformConfig", "UniformPolicy"]


@dataclass(frozen=True)
class UniformConfig(EventConfig):
    """Options.

    Attributes:
        num_events: Growth events; each lays seeds at all places, of as large a size as an equal share of the
            parameters that are left allows.
        start: Share of the run at the first event: adapters have nothing to wait for.
        blueprints: What is laid: at each site the first of these that fits there.
        layers: Which target layers, by qualified name or its last parts (``query``); empty for all but the
            output layers, which a new task trains anyway.
        min_saved: Grow only while held-out loss pays for it: before every event but the first, the seeds of
            the last one are switched off and on, and unless that saves at least this share of the held-out
            loss, growth ends. 0 never asks.
    """

    num_events: int = 1
    start: float = 0.0
    blueprints: tuple[str, ...] = ("lowrank",)
    layers: tuple[str, ...] = ()
    min_saved: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        text = isinstance(self.blueprints, str) or isinstance(self.layers, str)
        check_options(
            self,
            (not text, "blueprints and layers should be lists of names, not one string"),
            (bool(self.blueprints), "blueprints should not be empty"),
            (0.0 <= self.min_saved < 1.0, "min_saved should lie in [0, 1)"),
        )
        object.__setattr__(self, "blueprints", tuple(self.blueprints))  # lists come from files
        object.__setattr__(self, "layers", tuple(self.layers))


class UniformPolicy(EventPolicy[UniformConfig]):
    """Seeds everywhere alike: the default for a frozen network, where no score was found to place them better
    (GROWTH.md §7).

    All places are used at once or none: while a seed of the last event is on its way, a place rests after a
    cull, or the budget allows fewer germinations than there are places, the event waits.
    """

    name: str = "uniform"
    config_type: ClassVar[type[UniformConfig]] = UniformConfig

    def __init__(self, config: UniformConfig) -> None:
        super().__init__(config)
        self._known: list[str] = []
        self._verdict = ""

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Lay a seed at every place, or say why not yet, or not any more."""
        if self._verdict:
            return Pause(self._verdict)
        places = self._places(state)
        closed = [f"{view.site.name} is {view.unavailable}" for view, _ in places if view.unavailable]
        if closed:
            return Pause(f"{len(closed)} of {len(places)} places are not free: {closed[0]}")
        if len(places) > state.germinations_left:
            return Pause(
                f"{len(places)} places want a seed at once, but {state.germinations_left} germinations are left in "
                "this epoch; raise budget.max_germinations_per_epoch (and max_seeds_alive)"
            )
        numbers = {"num_places": float(len(places))}
        if self.events.used and self.config.min_saved:
            saved = self._saved(state)
            if saved is None:
                return Pause(
                    "the run holds no data out, so growth cannot be asked to pay for itself", numbers
                )
            numbers["saved"] = saved
            if saved < self.config.min_saved:
                self._verdict = (
                    f"growth has ended: the seeds of event {self.events.used} save {saved:.2%} of the held-out loss, "
                    f"less than {self.config.min_saved:.2%}"
                )
                return Pause(self._verdict, numbers)
        wanted = [(view.site.name, blueprint) for view, blueprint in places]
        size = self.fit(state, wanted)
        if not size:
            return self.too_small(state, f"{' or '.join(self.config.blueprints)} at {len(places)} places")
        self._known = [seed.seed_id for seed in state.seeds]
        reason = f"event {self.events.used + 1} of {self.config.num_events}: size {size} at all {len(places)} places"
        return [Choice(site, blueprint, size, reason, numbers=numbers) for site, blueprint in wanted]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**super().state_dict(), "known": list(self._known), "verdict": self._verdict}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._known = list(state["known"])
        self._verdict = str(state["verdict"])

    def _places(self, state: GrowthState) -> list[tuple[SiteView, str]]:
        """Every site that is meant, with what is laid there; one a target layer.

        Raises:
            ConfigError: No site of this host is meant.
        """
        found: dict[str, tuple[SiteView, str]] = {}
        for view in state.sites:
            target = view.site.target
            blueprint = next((name for name in self.config.blueprints if name in view.site.blueprints), None)
            if blueprint is not None and self._meant(state, target):
                found.setdefault(target, (view, blueprint))
        if not found:
            fitting = sorted(
                {v.site.target for v in state.sites if set(self.config.blueprints) & {*v.site.blueprints}}
            )
            raise ConfigError(
                f"uniform: no layer for {' or '.join(self.config.blueprints)} is meant by layers="
                f"{list(self.config.layers)}; layers that one fits: {', '.join(fitting[:12]) or 'none'}"
            )
        return list(found.values())

    def _meant(self, state: GrowthState, target: str) -> bool:
        if self.config.layers:
            return any(f".{target}".endswith(f".{layer}") for layer in self.config.layers)
        return not state.topology.layer(target).is_output

    def _saved(self, state: GrowthState) -> float | None:
        """Share of the held-out loss that the seeds of the last event save; 0 when all of them were culled."""
        last = [seed.seed_id for seed in state.seeds if seed.seed_id not in self._known]
        return state.measure_saving(last) if last else 0.0
