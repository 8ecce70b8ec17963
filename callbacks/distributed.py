"""Several training processes: how their strategists talk, and how DDP learns that the model has grown.

What the ranks of a run tell each other goes over a gloo group of its own, beside the one that reduces
gradients, at steps that every rank knows from its step count. An ordinary step has no collective.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.callbacks.failure_watch import FailureWatch
from esper.errors import EsperError, GrowthError, RankError
from esper.kasmina.layer import SEEDS
from esper.kasmina.structure import all_seeds
from esper.tamiyo.ranks import Ranks

__all__ = ["ProcessRanks", "WatchingRanks", "ranks_of", "wrap_again"]

_HEADER_BYTES = 1024
_LENGTH_BYTES = 8
_TELL_S = 10.0
_SENTENCE = 2000
_num_runs = itertools.count()


class WatchingRanks(Ranks):
    """Ranks that only watch: each for itself, without a word to the others; rank 0 keeps the records.

    Args:
        rank: Number of this process.
        num_processes: How many there are.
    """

    closed = (
        "several processes train this model, and with policy='off' they do not talk to each other; use "
        "policy='schedule' with policy_options={'num_events': 0} to grow by hand"
    )

    def __init__(self, rank: int, num_processes: int) -> None:
        self.rank = rank
        self.num_processes = num_processes
        self.may_change = False


class ProcessRanks(Ranks):
    """The processes of ``torch.distributed``'s default group. Every rank has to make one at the same time."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.num_processes = self.size
        self._group: Any = dist.new_group(backend="gloo")
        self.may_change = False
        self._told = False
        self._watch = FailureWatch(f"esper/{next(_num_runs)}", self.rank, self.size)

    def exchange(self, about: str, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of ranks.

        Raises:
            RankError: Another rank has failed, or the ranks are at different points of the run.
        """
        return self._answers(about, self._swap(msgspec.msgpack.encode([about, True, value])))

    def attempt(self, about: str, compute: Callable[[], Any]) -> list[Any]:
        """Every rank's answer of ``compute``, or the same error on all of them.

        Raises:
            GrowthError: What one of them raised that is an :class:`~esper.errors.EsperError`.
            RankError: Another rank has failed otherwise.
        """
        answer: list[Any]
        try:
            answer = [compute(), ""]
        except EsperError as error:
            answer = [None, str(error)]
        answers = self.exchange(about, answer)
        for rank, (_, refused) in enumerate(answers):
            if refused:
                raise GrowthError(f"{refused} (rank {rank})")
        return [value for value, _ in answers]

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's rows one below the other, on this rank's device. Shape: [n, F] to [Σn, F]."""
        raw = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        parts = self.exchange("a sample of activations", [list(x.shape), raw])
        found = [
            torch.frombuffer(bytearray(raw), dtype=x.dtype).reshape(shape) for shape, raw in parts if raw
        ]
        return torch.cat(found).to(x.device) if found else x

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which an error on one rank becomes an error on all.

        Raises:
            RankError: Another rank has failed.
        """
        self.may_change = True
        try:
            yield
        except RankError:
            raise  # every rank knows
        except Exception as error:
            self._tell(error)
            raise
        finally:
            self.may_change = False

    def failed(self, exception: BaseException) -> None:
        """Say why this rank stops, or learn from the others why it has to; call it when training ends by an error.

        A process that goes away leaves the others with a broken connection and no reason. The first one's
        reason is added to what the others raise.
        """
        if self._told or isinstance(exception, RankError) or not isinstance(exception, Exception):
            return  # every rank knows; or a person has interrupted them all
        told = self._watch.report(f"rank {self.rank} failed first: {_sentence(exception)}")
        if told:
            exception.add_note(told)

    def close(self) -> None:
        """End the talk between the ranks; safe to call twice."""
        self._watch.stop()
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _tell(self, error: Exception) -> None:
        message = msgspec.msgpack.encode(["", False, _sentence(error)])
        if len(message) > _HEADER_BYTES - _LENGTH_BYTES:
            message = msgspec.msgpack.encode(["", False, _sentence(error)[: _HEADER_BYTES // 4]])
        try:
            self._swap(message, timeout_s=_TELL_S)
        except RuntimeError:
            return  # the others have gone on to train; there they will find that this rank is missing
        self._told = True

    def _answers(self, about: str, messages: Sequence[bytes]) -> list[Any]:
        decoded = [msgspec.msgpack.decode(message) for message in messages]
        for rank, (_, fine, value) in enumerate(decoded):
            if not fine:
                raise RankError(f"rank {rank} failed, so all ranks stop: {value}")
        subjects = {subject for subject, _, _ in decoded}
        if subjects != {about}:
            spoken = ", ".join(f"rank {rank} at {subject!r}" for rank, (subject, _, _) in enumerate(decoded))
            raise RankError(
                f"all ranks should be at the same point of the run, but {spoken}; do the processes train the same "
                "model with the same settings and equally many batches?"
            )
        return [value for _, _, value in decoded]

    def _swap(self, message: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        """Every rank's message: in one collective while all are short, in two otherwise."""
        room = _HEADER_BYTES - _LENGTH_BYTES
        first = self._all_gather(_padded(len(message), message[:room], _HEADER_BYTES), timeout_s)
        lengths = [int.from_bytes(part[:_LENGTH_BYTES], "little") for part in first]
        longest = max(lengths)
        if longest <= room:
            return [part[_LENGTH_BYTES : _LENGTH_BYTES + n] for part, n in zip(first, lengths, strict=True)]
        whole = self._all_gather(_padded(len(message), message, longest + _LENGTH_BYTES), timeout_s)
        return [part[_LENGTH_BYTES : _LENGTH_BYTES + n] for part, n in zip(whole, lengths, strict=True)]

    def _all_gather(self, buffer: bytearray, timeout_s: float | None) -> list[bytes]:
        own = torch.frombuffer(buffer, dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        work = dist.all_gather(parts, own, group=self._group, async_op=True)
        assert work is not None
        if timeout_s is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=timeout_s))
        return [part.numpy().tobytes() for part in parts]


def ranks_of(trainer: L.Trainer, *, talking: bool) -> Ranks:
    """The ranks of a trainer that is fitting.

    Args:
        trainer: Its strategy is set up.
        talking: Whether the model can change, so that they have to agree; the same on every rank.
    """
    if trainer.world_size == 1:
        return Ranks()
    return ProcessRanks() if talking else WatchingRanks(trainer.global_rank, trainer.world_size)


def wrap_again(strategy: Any, module: L.LightningModule) -> None:
    """Let DDP reduce the gradients of the parameters that ``module`` has now; nothing to do without DDP.

    Rank 0's parameters and buffers become every rank's. Parameters of a seed that takes no part in the loss
    yet are left out, because DDP would wait for their gradients; so are the seeds' own counters, which DDP
    would overwrite with rank 0's before each forward.

    Args:
        strategy: The trainer's.
        module: The trainer's module, unwrapped.
    """
    if not isinstance(strategy.model, DistributedDataParallel):
        return
    name = "_ddp_params_and_buffers_to_ignore"
    given = [key for key in getattr(module, name, []) if SEEDS not in key.split(".")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, [*given, *_not_reduced(module)]
    )
    strategy.model = module
    strategy.configure_ddp()


def _not_reduced(module: nn.Module) -> list[str]:
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    found = []
    for seed in all_seeds(module):
        found += [seed.alpha, seed.non_finite]
        if seed.stage == "germinated":
            found += [*seed.parameters()]
    return [names[id(tensor)] for tensor in found]


def _padded(length: int, content: bytes, size: int) -> bytearray:
    buffer = bytearray(size)
    buffer[:_LENGTH_BYTES] = length.to_bytes(_LENGTH_BYTES, "little")
    buffer[_LENGTH_BYTES : _LENGTH_BYTES + len(content)] = content
    return buffer


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_SENTENCE]
