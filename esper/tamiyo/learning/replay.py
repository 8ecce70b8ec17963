"""Prioritised replay (Schaul, Quan, Antonoglou, Silver 2016, arXiv 1511.05952), proportional variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.errors import CheckpointError, DataFormatError
from esper.tamiyo.graph.data import CandidateGraph, ModelGraphState
from esper.tamiyo.learning.packed import PackedGraph, pack_many, unpack_many
from esper.tamiyo.learning.segment_tree import SegmentTree
from esper.tamiyo.learning.trajectory import Transition

__all__ = ["Chosen", "Experience", "ReplayBuffer", "Sample"]

_NUMBERS = ("logprob", "reward", "value", "urgency", "risk")


class Chosen(Protocol):
    """A decision that says which candidate it took.

    One that was drawn says with which log-probability too, as ``logprob``; one without it was the only one that its
    policy could have made, as :class:`~esper.tamiyo.network.decision.AdaptationDecision` is: its probability is 1.
    """

    @property
    def candidate(self) -> int: ...


@dataclass(frozen=True)
class Experience:
    """A transition as it is kept.

    Attributes:
        transition: State, action, outcome.
        target: λ-return of the trajectory it came with, under the policy that acted: the importance ratio corrects
            for this action, not for those after it. NaN when it came alone, and its target is a TD target.
        next_graph: State after it; only of one that came alone and did not end its episode.
        terminated: Nothing follows.
        born: Optimizer steps taken when it came.
    """

    transition: Transition
    target: float = math.nan
    next_graph: PackedGraph | None = None
    terminated: bool = False
    born: int = 0

    @property
    def ready(self) -> bool:
        """Whether there is something to learn from it: a target, or the means to make one."""
        return not math.isnan(self.target) or self.terminated or self.next_graph is not None


@dataclass(frozen=True)
class Sample:
    """What one draw gave.

    Attributes:
        index: Where each experience lies [n], for :meth:`ReplayBuffer.update_priorities`.
        experiences: Drawn, n of them; one may come twice.
        weights: Importance weights in (0, 1] [n].
    """

    index: NDArray[np.int64]
    experiences: Sequence[Experience]
    weights: NDArray[np.float64]


class ReplayBuffer:
    """Ring of experiences, drawn in proportion to (|TD error| + ε)^α.

    Args:
        capacity: Experiences kept; the oldest goes first.
        alpha: α of ibid., eq. 1.
        epsilon: ε, added to every |TD error|.
    """

    def __init__(self, capacity: int = 50_000, *, alpha: float = 0.6, epsilon: float = 1e-3) -> None:
        self.capacity = capacity
        self.alpha = alpha
        self.epsilon = epsilon
        self._kept: list[Experience] = []
        self._priorities = np.zeros(capacity)
        self._tree = SegmentTree(capacity)
        self._next = 0
        self._open: dict[str, int] = {}
        self._num_unread = 0
        self._sum_unread = 0.0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_ready(self) -> int:
        """How many can be drawn: those that still wait for what follows them cannot."""
        return int(np.count_nonzero(self._tree[np.arange(len(self))]))

    @property
    def can_sample(self) -> bool:
        """Whether anything can be drawn."""
        return self._tree.total > 0

    def add(self, experiences: Sequence[Experience], td_errors: Sequence[float]) -> NDArray[np.int64]:
        """Keep experiences and say where each lies; of more than fit the last stay.

        Raises:
            DataFormatError: A TD error is NaN or inf; nothing is kept.
        """
        if not np.isfinite(td_errors).all():
            raise DataFormatError(
                f"expected finite TD errors, got {np.asarray(td_errors)}; the reward or the critic is wrong"
            )
        index = (self._next + np.arange(len(experiences))) % self.capacity
        replaced = set(index.tolist())
        self._open = {run: at for run, at in self._open.items() if at not in replaced}
        for at, experience in zip(index.tolist(), experiences, strict=True):
            self._kept[at : at + 1] = [experience]
        self._next = int(self._next + len(experiences)) % self.capacity
        self._priorities[index] = np.abs(td_errors)
        self._weigh(index)
        return index

    def add_experience(
        self,
        *,
        state: ModelGraphState | CandidateGraph,
        action: Chosen,
        reward: float,
        next_state: ModelGraphState | CandidateGraph | None,
        td_error: float,
        episode: str = "",
        terminated: bool = False,
        born: int = 0,
    ) -> None:
        """Keep one transition of a running loop.

        Args:
            state: In which the decision was made.
            action: It.
            reward: That followed.
            next_state: State after it. None: the ``state`` of the next experience of the same episode; until that
                comes the transition is kept but not drawn.
            td_error: First guess of how much there is to learn from it; drawing it replaces the guess.
            episode: Tells loops apart that run at once.
            terminated: Nothing follows.
            born: Optimizer steps taken so far.

        Raises:
            DataFormatError: As in :class:`Transition`, or a NaN TD error, or one that ended and has a next state.
        """
        if terminated and next_state is not None:
            raise DataFormatError(
                "expected no next_state of a transition that ended its episode; drop one of them"
            )
        graph = PackedGraph.pack(_graph(state))
        experience = Experience(
            Transition(graph, action.candidate, getattr(action, "logprob", 0.0), reward),
            next_graph=None if next_state is None else PackedGraph.pack(_graph(next_state)),
            terminated=terminated,
            born=born,
        )
        previous = self._open.pop(episode, None)
        if previous is not None:
            self._complete(previous, next_graph=graph)
        (index,) = self.add([experience], [td_error])
        if not experience.ready:
            self._open[episode] = int(index)
        self._num_unread += 1
        self._sum_unread += reward

    def close(self, episode: str = "") -> None:
        """The episode's last transition ended it; does nothing when none waits."""
        previous = self._open.pop(episode, None)
        if previous is not None:
            self._complete(previous, terminated=True)

    def new_mean_reward(self) -> float | None:
        """Mean reward of what :meth:`add_experience` brought since this was last asked; None when nothing."""
        mean = self._sum_unread / self._num_unread if self._num_unread else None
        self._num_unread, self._sum_unread = 0, 0.0
        return mean

    def sample(self, num: int, generator: np.random.Generator, *, beta: float) -> Sample:
        """Draw ``num`` experiences, one from each of as many equal ranges of the total (ibid., B.2.1).

        The weights are ``(N·P(i))^-β`` over the largest such weight in the buffer (ibid., §3.4).

        Raises:
            DataFormatError: There is nothing to draw.
        """
        if not self.can_sample:
            raise DataFormatError(
                f"expected experiences to draw from, got {len(self)} of which none is complete; "
                "add some, and tell of ends with close()"
            )
        mass = (np.arange(num) + generator.random(num)) * (self._tree.total / num)
        index = self._tree.find(mass)
        weights = (self._tree[index] / self._tree.minimum) ** -beta
        return Sample(index, [self._kept[i] for i in index], weights)

    def probabilities(self) -> NDArray[np.float64]:
        """P(i) of each experience [len(self)]."""
        return self._tree[np.arange(len(self))] / self._tree.total

    def update_priorities(self, index: NDArray[np.int64], td_errors: NDArray[np.float64]) -> None:
        """Give the experiences ``index`` [n] new TD errors [n]."""
        self._priorities[index] = np.abs(td_errors)
        self._weigh(index)

    def _weigh(self, index: NDArray[np.int64]) -> None:
        ready = np.array([self._kept[i].ready for i in index])
        self._tree.set(index, np.where(ready, (self._priorities[index] + self.epsilon) ** self.alpha, 0.0))

    def _complete(self, index: int, **changes: Any) -> None:
        self._kept[index] = replace(self._kept[index], **changes)
        self._weigh(np.array([index]))

    def state_dict(self) -> dict[str, Any]:
        """Tensors under ``tensors``, JSON types under ``facts``."""
        following = [(i, e.next_graph) for i, e in enumerate(self._kept) if e.next_graph is not None]
        numbers = [[getattr(e.transition, name) for name in _NUMBERS] + [e.target] for e in self._kept]
        counts = [[e.transition.action, e.terminated, e.born] for e in self._kept]
        tensors = {
            "numbers": torch.tensor(numbers, dtype=torch.float64).view(len(self), len(_NUMBERS) + 1),
            "counts": torch.tensor(counts, dtype=torch.long).view(len(self), 3),
            "priorities": torch.from_numpy(self._priorities[: len(self)].copy()),
            "followed": torch.tensor([i for i, _ in following], dtype=torch.long),
            **{f"graphs.{k}": v for k, v in pack_many([e.transition.graph for e in self._kept]).items()},
            **{f"following.{k}": v for k, v in pack_many([graph for _, graph in following]).items()},
        }
        facts = {
            "capacity": self.capacity,
            "next": self._next,
            "open": self._open,
            "unread": [self._num_unread, self._sum_unread],
        }
        return {"tensors": tensors, "facts": facts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`; nothing changes when it raises.

        Raises:
            CheckpointError: Something is missing, does not fit together, or is of another capacity.
        """
        try:
            facts, tensors = state["facts"], state["tensors"]
            if facts["capacity"] != self.capacity:
                raise CheckpointError(
                    f"expected a replay buffer of capacity {self.capacity}, the checkpoint's has "
                    f"{facts['capacity']}; set replay_capacity as it was"
                )
            kept = _experiences(tensors)
            priorities = tensors["priorities"].numpy()
            ring, open_, unread = int(facts["next"]), dict(facts["open"]), facts["unread"]
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the replay buffer in this checkpoint is damaged: {error!r}") from error
        self._kept, self._next, self._open = kept, ring, open_
        self._num_unread, self._sum_unread = unread
        self._priorities = np.zeros(self.capacity)
        self._priorities[: len(kept)] = priorities
        self._tree = SegmentTree(self.capacity)
        if kept:
            self._weigh(np.arange(len(kept)))


def _graph(state: ModelGraphState | CandidateGraph) -> CandidateGraph:
    return state.graph_data if isinstance(state, ModelGraphState) else state


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _experiences(tensors: Mapping[str, Tensor]) -> list[Experience]:
    graphs = unpack_many(_part(tensors, "graphs."))
    following = dict(
        zip(tensors["followed"].tolist(), unpack_many(_part(tensors, "following.")), strict=True)
    )
    rows = zip(graphs, tensors["numbers"].tolist(), tensors["counts"].tolist(), strict=True)
    return [
        Experience(
            Transition(graph, action, **dict(zip(_NUMBERS, numbers[:-1], strict=True))),
            target=numbers[-1],
            next_graph=following.get(i),
            terminated=bool(terminated),
            born=born,
        )
        for i, (graph, numbers, (action, terminated, born)) in enumerate(rows)
    ]
