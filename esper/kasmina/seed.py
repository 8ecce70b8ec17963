"""A seed: a branch at a site, with a stage and a weight α."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from esper.errors import CheckpointError, GrowthError, LifecycleError
from esper.kasmina.autograd import all_finite, guard_gradient, guarded_add, isolate
from esper.kasmina.cache_place import cache_among, own_place
from esper.kasmina.layer import Tap, primary, replace_primary
from esper.kasmina.sites import Site
from esper.messages import Stage

__all__ = ["Seed", "SeedState", "decode_state", "encode_state"]


class SeedState(msgspec.Struct):
    """All of a seed but its weights, as it travels inside the state dict.

    Attributes:
        seed_id: Unique in its model for good; a module name (no dots).
        site: Where it stands.
        blueprint: Registered name of what it is made of.
        size: Units, rank or channels, as its blueprint understands it.
        stage: Current stage.
        alpha: Weight of the contribution in [0, 1].
        age_steps: Optimizer steps since germination.
        stage_age_steps: Optimizer steps since the current stage was entered.
        non_finite: Forward passes whose contribution held a NaN or an inf.
        radius: Relative length of the step that the seed is fitted to while isolated.
        output_projections: See :class:`~esper.kasmina.sites.BuildContext`.
        facts: Last measured facts by name (gradient norm, contribution, ...).
        contributions: Held-out loss with the seed off minus on, one a measurement in this stage.
    """

    seed_id: str
    site: Site
    blueprint: str
    size: int
    stage: Stage = "germinated"
    alpha: float = 0.0
    age_steps: int = 0
    stage_age_steps: int = 0
    non_finite: int = 0
    radius: float = 0.1
    output_projections: tuple[str, ...] = ()
    facts: dict[str, float] = msgspec.field(default_factory=dict)
    contributions: list[float] = msgspec.field(default_factory=list)


# MessagePack rather than JSON: a diverging seed's facts hold NaN and inf, which JSON cannot write.
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(SeedState)


_PATHS: dict[Stage, str] = {"germinated": "absent", "training": "isolated", "fossilized": "merged"}
"""What runs in a stage; ``felt`` in all others. A compiled model is compiled anew when a seed takes another
path, and not when the stage alone changes."""

_SHARDED_LOADING = "torch.distributed.checkpoint.state_dict"

_QUIET = ("absent", "isolated")
"""Paths on which a seed may not be felt by its host."""


class Seed(nn.Module):
    """A branch that adds to a host layer's output according to its stage.

    Args:
        state: What and where it is.
        branch: The module that computes the contribution.
        reads: ``source`` (the tensor at the site's source), ``output`` (the target's own output),
            or ``block`` (the branch is a further block: its contribution is its output minus its input).
        tap: Filled by the source layer when that is not the target.
    """

    alpha: Tensor
    non_finite: Tensor

    def __init__(self, state: SeedState, branch: nn.Module, reads: str, tap: Tap | None) -> None:
        super().__init__()
        self.branch = branch
        self.reads = reads
        self.tap = tap
        self._state = state
        self._override: float | None = None
        self._body: weakref.ref[Any] | None = None
        self._path = _PATHS.get(state.stage, "felt")
        self.observed: tuple[Tensor, Tensor] | None = None
        self.observing = False
        self.first_free_number = 0  # of the host's blocks; where a further block's place in a cache may be
        # Buffers, not Python numbers: a blending step then neither recompiles nor syncs a device.
        self.register_buffer("alpha", torch.tensor(state.alpha), persistent=False)
        self.register_buffer("non_finite", torch.tensor(state.non_finite), persistent=False)
        self._set_branch_mode()

    @property
    def state(self) -> SeedState:
        """The seed's record with the current α and counts read back from their buffers."""
        self._state.alpha = float(self.alpha)
        self._state.non_finite = int(self.non_finite)
        return self._state

    @property
    def record(self) -> SeedState:
        """The record itself, without reading α and counts back from the device."""
        return self._state

    @property
    def seed_id(self) -> str:
        """Unique name of the seed in its model."""
        return self._state.seed_id

    @property
    def site(self) -> Site:
        """Where the seed stands."""
        return self._state.site

    @property
    def blueprint(self) -> str:
        """Registered name of what the seed is made of."""
        return self._state.blueprint

    @property
    def size(self) -> int:
        """Units, rank or channels of the branch."""
        return self._state.size

    @property
    def stage(self) -> Stage:
        """Current stage."""
        return self._state.stage

    @property
    def num_parameters(self) -> int:
        """Parameters of the branch."""
        return sum(p.numel() for p in self.branch.parameters())

    def enter(self, stage: Stage, alpha: float) -> None:
        """Take on ``stage`` with weight ``alpha``; legality is the lifecycle's business."""
        self._state.stage = stage
        self._state.stage_age_steps = 0
        self._state.contributions = []
        if not (stage == "fossilized" and self._path == "felt" and self._is_compiled()):
            self._path = _PATHS.get(stage, "felt")
        self.alpha.fill_(alpha)
        self._set_branch_mode()

    def _is_compiled(self) -> bool:
        """Whether another path would have the host compiled anew; at full strength both give the same bits."""
        body = None if self._body is None else self._body()
        return body is not None and body.compiled

    def set_alpha(self, alpha: float) -> None:
        """Set the weight of the contribution, in place and without a device sync."""
        self.alpha.fill_(alpha)

    @contextmanager
    def overridden(self, alpha: float) -> Iterator[None]:
        """Act with weight ``alpha`` whatever the stage, for a held-out comparison without gradients."""
        self._override, previous = alpha, self._override
        try:
            yield
        finally:
            self._override = previous

    def train(self, mode: bool = True) -> Seed:
        """Switch mode; the branch of an isolated seed stays in evaluation (see :meth:`_set_branch_mode`)."""
        super().train(mode)
        self._set_branch_mode()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Seed:
        alpha = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != alpha.dtype:
            # In half precision a resumed run, which casts the model anew, would blend by other weights.
            self.alpha = alpha.to(self.alpha.device)
        return self

    def bind(self, body: Any) -> None:
        """Remember the body, so that :meth:`advance` and :meth:`cull` work by hand."""
        self._body = weakref.ref(body)

    def advance(self) -> None:
        """Move to the next stage by hand, past its gate.

        Raises:
            LifecycleError: There is no next stage.
        """
        order: tuple[Stage, ...] = ("germinated", "training", "blending", "holding", "fossilized")
        if self.stage not in order[:-1]:
            raise LifecycleError(
                f"seed {self.seed_id} is {self.stage}; only a seed on its way to fossilized advances"
            )
        following = order[order.index(self.stage) + 1]
        # By hand there is no schedule: blending starts half way, so that the seed is undetached and felt.
        self.enter(following, {"training": 0.0, "blending": 0.5}.get(following, 1.0))

    def cull(self, *optimizers: torch.optim.Optimizer) -> None:
        """Take the seed out of its model and its parameters out of ``optimizers``.

        Raises:
            GrowthError: The seed belongs to no attached model.
        """
        body = None if self._body is None else self._body()
        if body is None:
            raise GrowthError(
                f"seed {self.seed_id} belongs to no attached model; call attach(model, ...) first"
            )
        body.cull(self, optimizers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_body": None, "observed": None}

    def forward(self, x: Any, y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the host output ``y`` with this seed's contribution, as its stage has it.

        Args:
            x: First input of the target layer.
            y: Its output so far (a tensor, or a tuple or list that begins with one).
            args: The target's further positional arguments, for a stacked block.
            kwargs: The target's keyword arguments, for a stacked block.
        """
        if self.site.functional:
            return y  # the contribution is already in the weight that made y
        source = self.tap.take() if self.tap is not None else x
        path = self._path
        host = primary(y)
        if self._override is not None:
            if self._override == 0.0:
                return y
            s = self._contribution(source, host, args, kwargs)
            if self.observing:
                self.observed = (s.detach(), host.detach())
            return replace_primary(y, guarded_add(host, s, torch.full_like(self.alpha, self._override)))
        if path == "absent" or (path == "isolated" and not torch.is_grad_enabled()):
            return y
        if path == "isolated":
            s = self._contribution(source, host, args, kwargs, detach=True)
            self._note(s, host)
            return replace_primary(y, isolate(host, s, self._state.radius))
        if path == "merged":
            return replace_primary(y, host + self._contribution(source, host, args, kwargs))
        s = self._contribution(source, host, args, kwargs, guard=True)
        self._note(s, host)
        return replace_primary(y, guarded_add(host, s, self.alpha))

    def on_weight(self, weight: Tensor) -> Tensor:
        """Return the host's ``weight`` with this seed's contribution (functional sites only).

        Args:
            weight: The target's weight so far, [out_features, in_features].
        """
        path = self._path
        if self._override is None and (
            path == "absent" or (path == "isolated" and not torch.is_grad_enabled())
        ):
            return weight
        delta = self.branch.delta_weight().to(weight.dtype)  # type: ignore[operator]
        if self._override is not None:
            if self.observing:
                self.observed = (delta.detach(), weight.detach())
            return guarded_add(weight, delta, torch.full_like(self.alpha, self._override))
        if path == "merged":
            return weight + delta
        self._note(delta, weight)
        return (
            isolate(weight, delta, self._state.radius)
            if path == "isolated"
            else guarded_add(weight, delta, self.alpha)
        )

    def get_extra_state(self) -> Tensor:
        """The seed's record as bytes in a uint8 tensor, so that any state-dict format carries it."""
        return encode_state(self.state)

    def set_extra_state(self, state: Tensor) -> None:
        """Take on a record written by :meth:`get_extra_state`.

        Raises:
            CheckpointError: The bytes are not a seed record.
        """
        if type(state).__module__ == _SHARDED_LOADING:
            return  # a mark in a record's place: torch loads a sharded model's parameters one by one
        self.adopt(decode_state(state, self._state.seed_id))

    def adopt(self, state: SeedState) -> None:
        """Replace the seed's record, with α and counts."""
        self._state = state
        self._path = _PATHS.get(state.stage, "felt")
        self.alpha.fill_(state.alpha)
        self.non_finite.fill_(state.non_finite)
        self._set_branch_mode()

    def extra_repr(self) -> str:
        state = self._state
        return f"{state.blueprint}({state.size}) at {state.site.name}, {state.stage}, alpha={float(self.alpha):.3g}"

    def _contribution(
        self, source: Any, host: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
        *, detach: bool = False, guard: bool = False,
    ) -> Tensor:  # fmt: skip
        x = host if self.reads in ("output", "block") else source
        if x is None:
            raise GrowthError(
                f"seed {self.seed_id} at {self.site.name}: layer {self.site.source!r} should have run before "
                f"{self.site.target!r} in this forward pass, but did not. Cull the seed, or call both layers; where "
                "gradient checkpointing runs them again, in one checkpointed region."
            )
        if self.branch.training != (self.training and self._path not in _QUIET):
            self._set_branch_mode()  # Lightning restores modes after validation flag by flag, past train()
        if detach:
            x = x.detach()
        elif guard:
            x = guard_gradient(x)
        if self.reads == "block":
            # A copy: a block that adds to its input in place would write into the host's value.
            cache = cache_among(args, kwargs)
            if cache is None:
                s = primary(self.branch(x.clone(), *args, **kwargs)) - x
            else:
                with own_place(cache, self.branch, self.seed_id, self.first_free_number):
                    s = primary(self.branch(x.clone(), *args, **kwargs)) - x
        else:
            s = self.branch(x)
        return s if s.dtype == host.dtype else s.to(host.dtype)

    def _note(self, s: Tensor, host: Tensor) -> None:
        if self.training and torch.is_grad_enabled():
            if torch._C._functorch.peek_interpreter_stack() is None:  # torch.func's transforms count nothing
                with torch.no_grad():
                    self.non_finite += ~all_finite(s)
            if self.observing and self._state.stage != "fossilized":  # part of the host, whatever its path
                self.observed = (s.detach(), host.detach())

    def _set_branch_mode(self) -> None:
        """Keep an isolated seed's branch in evaluation, else in the seed's own mode.

        Dropout would draw from the host's random stream, which isolation promises not to shift; the
        whole branch is switched because blocks call ``F.dropout(x, p, self.training)`` as well.
        """
        self.branch.train(self.training and self._path not in _QUIET)


def encode_state(state: SeedState) -> Tensor:
    """A seed record as a 1-d uint8 tensor."""
    return torch.frombuffer(bytearray(_ENCODER.encode(state)), dtype=torch.uint8)


def decode_state(data: Tensor, where: str) -> SeedState:
    """Decode a seed record from its uint8 tensor.

    Args:
        data: As written by :meth:`Seed.get_extra_state`.
        where: Named in the error.

    Raises:
        CheckpointError: The bytes are not a seed record.
    """
    if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.dim() != 1:
        got = f"{data.dtype} {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise CheckpointError(f"seed record at {where!r}: expected a 1-d uint8 tensor, got {got}")
    try:
        return _DECODER.decode(bytes(data.cpu().numpy()))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"seed record at {where!r} cannot be read ({error}); the checkpoint is damaged or from another version"
        ) from error
