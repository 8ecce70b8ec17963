"""``schedule``: fixed growth, decided before the run: a list of seeds, or a rhythm over like sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from esper.errors import ConfigError
from esper.messages import Decision
from esper.tamiyo.policies.base import Choice, EventPolicy, Pause, wait
from esper.tamiyo.policies.events import EventConfig, check_options
from esper.tamiyo.policies.shape import WIDENING
from esper.tamiyo.policies.sizes import Place, Room, largest_size

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState, SiteView

__all__ = ["ScheduleConfig", "ScheduleEntry", "SchedulePolicy"]


@dataclass(frozen=True)
class ScheduleEntry:
    """One seed of a fixed list.

    Attributes:
        fraction: Share of the run at which it germinates.
        site: Name of the site.
        blueprint: Registered name that fits there.
        size: Its size; 0 for the largest that an equal share of the budget pays.
    """

    fraction: float
    site: str
    blueprint: str
    size: int = 0

    def __post_init__(self) -> None:
        check_options(
            self,
            (0.0 <= self.fraction <= 1.0, "fraction should lie in [0, 1]"),
            (bool(self.site and self.blueprint), "site and blueprint should be names"),
            (self.size >= 0, "size should not be negative"),
        )


@dataclass(frozen=True)
class ScheduleConfig(EventConfig):
    """Options.

    Attributes:
        entries: ``(fraction, site, blueprint[, size])`` of each seed; replaces the rhythm, and with it
            ``num_events``, ``start``, ``end`` and ``order``.
        order: ``round_robin``: one site an event, in turn; ``uniform``: all of them, equally large.
        blueprints: The rhythm goes over sites that one of these fits: ``widen`` and ``conv_widen`` grow
            width, ``stack`` grows depth.
    """

    entries: tuple[ScheduleEntry, ...] = ()
    order: Literal["round_robin", "uniform"] = "round_robin"
    blueprints: tuple[str, ...] = WIDENING

    def __post_init__(self) -> None:
        super().__post_init__()
        text = isinstance(self.blueprints, str)
        check_options(
            self,
            (self.order in ("round_robin", "uniform"), "order should be 'round_robin' or 'uniform'"),
            (not text and bool(self.blueprints), "blueprints should be a list of names, and not empty"),
        )
        object.__setattr__(self, "blueprints", tuple(self.blueprints))  # lists come from files
        object.__setattr__(self, "entries", tuple(map(_entry, self.entries)))


class SchedulePolicy(EventPolicy[ScheduleConfig]):
    """Grows as it was told, budget permitting."""

    name: str = "schedule"
    config_type: ClassVar[type[ScheduleConfig]] = ScheduleConfig

    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__(config)
        self._done: set[int] = set()

    def decide(self, state: GrowthState) -> list[Decision]:
        """Answer a decision point with what is due, or one WAIT."""
        return self._from_list(state) if self.config.entries else super().decide(state)

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Take the next site in turn, or all of them."""
        matching = self._matching(state)
        free = [(view, blueprint) for view, blueprint in matching if not view.unavailable]
        wanted = " or ".join(self.config.blueprints)
        if not free:
            return Pause(f"no site for {wanted} is {'free' if matching else 'in this host'}")
        if self.config.order == "round_robin":
            turn = self.events.used % len(matching)
            in_turn = [pair for pair in matching[turn:] + matching[:turn] if pair in free][:1]
        else:
            seeds = [seed.site for seed in state.seeds]
            # Where not all may germinate at once, those that have grown least go first.
            in_turn = sorted(free, key=lambda pair: seeds.count(pair[0].site.name))
            in_turn = in_turn[: state.germinations_left]
        places: list[Place] = [(view.site.name, blueprint) for view, blueprint in in_turn]
        size = self.fit(state, places)
        if not size:
            return self.too_small(state, f"{wanted} at {len(places)} sites")
        reason = f"event {self.events.used + 1} of {self.config.num_events} of the fixed schedule"
        return [Choice(site, blueprint, size, reason) for site, blueprint in places]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**super().state_dict(), "done": sorted(self._done)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._done = set(state["done"])

    def _matching(self, state: GrowthState) -> list[tuple[SiteView, str]]:
        pairs = []
        for view in state.sites:
            blueprint = next((name for name in self.config.blueprints if name in view.site.blueprints), None)
            if blueprint is not None:
                pairs.append((view, blueprint))
        return pairs

    def _from_list(self, state: GrowthState) -> list[Decision]:
        """Germinate every entry that is due; one that cannot now stays due while the window is open."""
        views = {view.site.name: view for view in state.sites}
        self._check_names(views)
        numbers = {**self._numbers(state), "entries_done": len(self._done)}
        pending = [i for i in range(len(self.config.entries)) if i not in self._done]
        late = 1e-6 * state.total_steps
        due = [i for i in pending if state.step + late >= self.config.entries[i].fraction * state.total_steps]
        if not pending:
            return [wait(self.name, f"all {len(self._done)} entries of the schedule are done", numbers)]
        if not due:
            following = min(self.config.entries[i].fraction for i in pending)
            return [wait(self.name, f"the next entry falls at {following:.0%} of the run", numbers)]
        if not state.window_open:
            return [wait(self.name, f"{len(due)} entries are due, but the growth window is closed", numbers)]
        decisions: list[Decision] = []
        refused: list[str] = []
        taken: set[str] = set()
        room = Room.left(state)
        for index in due:
            entry = self.config.entries[index]
            busy = "occupied" if entry.site in taken else views[entry.site].unavailable
            busy = busy or (
                "" if len(decisions) < state.germinations_left else "late: no germination is left"
            )
            if busy:
                refused.append(f"{entry.site} is {busy}")
                continue
            size = self._size(state, entry, room, parts=len(pending) - len(decisions))
            if not size:
                refused.append(f"{entry.blueprint} at {entry.site} does not fit the budget")
                continue
            cost = state.cost(entry.site, entry.blueprint, size)
            room = room.after(cost)
            taken.add(entry.site)
            self._done.add(index)
            reason = f"entry {index + 1} of {len(self.config.entries)} of the fixed schedule"
            choice = Choice(entry.site, entry.blueprint, size, reason)
            decisions.append(self._germinate(state, choice, numbers))
        return decisions or [wait(self.name, f"entries are due, but {'; '.join(refused)}", numbers)]

    def _size(self, state: GrowthState, entry: ScheduleEntry, room: Room, *, parts: int) -> int:
        if entry.size:
            return entry.size if room.holds(state.cost(entry.site, entry.blueprint, entry.size)) else 0
        places = [(entry.site, entry.blueprint)]
        found = largest_size(state, places, room.part(parts), least=self.least(state, places), reserve=room)
        return 0 if found is None else found.size

    def _check_names(self, views: dict[str, SiteView]) -> None:
        for entry in self.config.entries:
            if entry.site not in views:
                some = ", ".join(list(views)[:12]) or "none"
                raise ConfigError(f"schedule: no site {entry.site!r} in this host; sites are {some}")
            known = views[entry.site].site.blueprints
            if entry.blueprint not in known:
                raise ConfigError(
                    f"schedule: blueprint {entry.blueprint!r} does not fit {entry.site!r}; "
                    f"{', '.join(known)} do"
                )


def _entry(value: ScheduleEntry | Sequence[Any]) -> ScheduleEntry:
    if isinstance(value, ScheduleEntry):
        return value
    if isinstance(value, str) or not isinstance(value, Sequence) or not 3 <= len(value) <= 4:
        raise ConfigError(
            f"schedule: an entry should be (fraction, site, blueprint) or (fraction, site, blueprint, size), "
            f"got {value!r}"
        )
    fraction, site, blueprint = value[:3]
    return ScheduleEntry(float(fraction), str(site), str(blueprint), int(value[3]) if len(value) == 4 else 0)
