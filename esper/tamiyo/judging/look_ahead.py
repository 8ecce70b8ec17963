"""Try before you decide: what anybody can do without a policy, and what it costs."""

from __future__ import annotations

import math

from esper.errors import ConfigError
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.data import load_task
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.plain import Outcome
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.graph.facts import DecisionPoint

__all__ = ["LookAhead"]

_MOMENTS = (0.05, 0.15, 0.25)
"""Asked at the first two; each branch is trained to the next one, a tenth of the run further."""


class LookAhead:
    """Plays one run; at two decision points trains a branch for each of some candidates and keeps the best.

    The branch that is kept has been paid for as part of the run; all others, and every measurement of a held-out
    loss, are charged on top of it.

    Args:
        spec: The run.
        config: Price and budget.
        repeat: Of the run.
        candidates: Tried at each decision point beside WAIT, spread over all that are available.

    Attributes:
        episode: The run, as far as it has come.
        flops: Spent beside the run's own.

    Raises:
        ConfigError: Fewer than one candidate.
    """

    def __init__(
        self, spec: HostSpec, config: EpisodeConfig, *, repeat: int = 0, candidates: int = 4
    ) -> None:
        if candidates < 1:
            raise ConfigError(f"look-ahead needs at least one candidate, got {candidates}")
        self.episode = Episode(spec, config.with_settings(fractions=_MOMENTS), repeat=repeat)
        self.flops = 0.0
        self._num_candidates = candidates
        self._held_out = len(load_task(spec.task).held_out)

    def finish(self) -> Outcome:
        """Look ahead where that is due, and train to the end."""
        point = self.episode.advance()
        while point is not None and not self.episode.done:
            self.episode = self._best(self.episode, point)
            point = self.episode.point
        return self.episode.finish()

    def _best(self, episode: Episode, point: DecisionPoint) -> Episode:
        """The branch with the best utility at the next moment, charged for the others."""
        spent = episode.training_flops
        branches = []
        for index in (0, *self._tried(point)):
            branch = episode.branch()
            branch.act(index)
            branch.advance()
            self.flops += branch.training_flops - spent + float(branch.body.flops) * self._held_out
            branches.append((_worth(branch), -index, branch))
        best = max(branches, key=lambda found: found[:2])[2]
        self.flops -= best.training_flops - spent
        return best

    def _tried(self, point: DecisionPoint) -> list[int]:
        offered = [
            i for i, c in enumerate(point.candidates) if i and c.action != "hold" and not c.unavailable
        ]
        count = min(self._num_candidates, len(offered))
        return [offered[i * len(offered) // count] for i in range(count)]


def _worth(branch: Episode) -> float:
    loss = branch.measure()[0]
    return (
        -math.inf if math.isnan(loss) else -loss - branch.config.price * math.log(branch.body.num_parameters)
    )
