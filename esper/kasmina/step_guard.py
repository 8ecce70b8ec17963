"""Keep isolated seeds out of the host's gradient clipping, and scale the steps of newborn seeds.

Lightning (2.6, ``Precision._wrap_closure``) runs ``optimizer.step(closure)``, and inside the closure:
forward, backward, ``on_before_optimizer_step``, clipping. Clipping by total norm would count an
isolated seed's gradient, so the host's update would no longer be what it is without the seed.
The guard takes such gradients away before the clipping and puts them back after the closure,
immediately before the update. Under a gradient scaler the closure runs before ``step()``; the
gradients are then put back as ``step()`` begins. The scaler has looked at every gradient by then, and skips
the step of the whole optimizer for one that is not finite; those of young seeds are therefore made finite
as they are accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from esper.errors import ConfigError
from esper.kasmina.optimizer import unwrap
from esper.kasmina.sharded import own_part, whole

__all__ = ["StepGuard"]

ClipAlgorithm = Literal["norm", "value"]


class StepGuard:
    """Hooks around the steps of one optimizer.

    A copy or a pickle of the optimizer does not carry the hooks (torch leaves them out of an
    optimizer's state), nor does its state dict. An optimizer that couples parameters beyond their own
    gradients (LAMB, Prodigy) is shielded from the clipping only.

    Args:
        optimizer: The optimizer or a wrapper around it.
    """

    def __init__(self, optimizer: Any) -> None:
        inner = unwrap(optimizer)
        self._num_dropped = 0
        self._zeroed: dict[torch.device, Tensor] = {}
        self._held: list[tuple[list[nn.Parameter], list[Tensor], float | None, ClipAlgorithm]] = []
        self._multipliers: dict[nn.Parameter, float] = {}
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []
        self._finite: dict[nn.Parameter, RemovableHandle] = {}
        self._handles = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]

    @property
    def num_dropped(self) -> int:
        """Gradients that were dropped because they held a NaN or an inf; reading it waits for the device."""
        return self._num_dropped + sum(int(count) for count in self._zeroed.values())

    def remove(self) -> None:
        """Take the hooks off the optimizer and forget everything."""
        for handle in (*self._handles, *self._finite.values()):
            handle.remove()
        self._finite.clear()
        self._held.clear()
        self._multipliers.clear()
        self._before.clear()

    def stash(
        self,
        seeds: Iterable[Iterable[nn.Parameter]],
        *,
        clip: float | None = None,
        algorithm: ClipAlgorithm = "norm",
    ) -> None:
        """Take the gradients of isolated seeds away until the update.

        Call it once in every ``on_before_optimizer_step`` while a seed is isolated: what an
        earlier, skipped step left behind is forgotten. Under manual optimization Lightning's
        ``clip_gradients`` comes before that hook and is not shielded.

        Args:
            seeds: The parameters of each isolated seed.
            clip: The trainer's ``gradient_clip_val``; each seed is clipped on its own.
            algorithm: The trainer's ``gradient_clip_algorithm``.
        """
        self._held.clear()
        for parameters in seeds:
            chosen = [p for p in parameters if p.grad is not None]
            gradients = [p.grad for p in chosen if p.grad is not None]
            for p in chosen:
                p.grad = None
            if chosen:
                self._held.append((chosen, gradients, clip or None, algorithm))

    @torch.no_grad()
    def shield(self, parameters: Iterable[nn.Parameter]) -> None:
        """Zero every gradient that holds a NaN or an inf, so that clipping cannot spread it to the host.

        For seeds that blend or hold; call it in ``on_before_optimizer_step``. Does not wait for the device.

        Args:
            parameters: Of seeds that are not yet part of the host.
        """
        for p in parameters:
            self._make_finite(p)

    def keep_finite(self, parameters: Iterable[nn.Parameter]) -> None:
        """Zero every gradient that holds a NaN or an inf as soon as a backward pass has accumulated it.

        For young seeds under a gradient scaler, which would skip the host's step for their sake, and halve its
        scale each time. A seed whose scaled gradient overflows where the host's does not misses its own step.
        :meth:`forget` ends it.

        Args:
            parameters: Of seeds that are not yet part of the host; those known already are passed over.
        """
        for p in parameters:
            if p not in self._finite:
                self._finite[p] = p.register_post_accumulate_grad_hook(self._make_finite)

    def scale_updates(self, parameters: Iterable[nn.Parameter], multiplier: float) -> None:
        """Apply ``multiplier`` times the optimizer's update: p ← p_old + m·(p_new − p_old).

        It multiplies the learning rate (and decoupled weight decay) for these parameters alone,
        whatever the optimizer, and leaves groups and schedulers as they are. A multiplier of 1 ends it.

        Raises:
            ConfigError: The multiplier is not a positive finite number.
        """
        if not (math.isfinite(multiplier) and multiplier > 0):
            raise ConfigError(
                f"a learning-rate multiplier must be a positive finite number, got {multiplier}"
            )
        for p in parameters:
            if multiplier == 1.0:
                self._multipliers.pop(p, None)
            else:
                self._multipliers[p] = multiplier

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop what is noted about parameters that leave the optimizer or became part of the host."""
        for p in parameters:
            self._multipliers.pop(p, None)
            if p in self._finite:
                self._finite.pop(p).remove()

    @torch.no_grad()
    def _make_finite(self, p: Tensor) -> None:
        if p.grad is None:
            return
        finite = whole(torch.isfinite(p.grad).all())
        grad = own_part(p.grad)
        grad.copy_(torch.where(finite, grad, torch.zeros_like(grad)))
        count = self._zeroed.setdefault(p.device, torch.zeros((), dtype=torch.int64, device=p.device))
        count += ~finite

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch passes the optimizer itself as the first positional argument.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._put_back()
            return None
        self._held.clear()

        def then_put_back() -> Any:
            result = closure()
            self._put_back()
            return result

        return args[:1], {**kwargs, "closure": then_put_back}

    def _put_back(self) -> None:
        if not self._held and not self._multipliers:
            self._before = []
            return  # every step of a run without young seeds comes by here
        with torch.no_grad():
            self._restore_all()

    def _restore_all(self) -> None:
        held, self._held = self._held, []
        for parameters, gradients, clip, algorithm in held:
            self._restore(parameters, gradients, clip, algorithm)
        self._before = [
            (p, p.detach().clone(), multiplier)
            for p, multiplier in self._multipliers.items()
            if p.grad is not None
        ]

    def _restore(
        self,
        parameters: list[nn.Parameter],
        gradients: list[Tensor],
        clip: float | None,
        algorithm: ClipAlgorithm,
    ) -> None:
        # One transfer from the device for all gradients of the seed.
        finite = torch.stack([torch.isfinite(g).all() for g in gradients]).tolist()
        chosen = []
        for p, g, ok in zip(parameters, gradients, finite, strict=True):
            if not ok:
                self._num_dropped += 1
            elif p.grad is None:  # else what is held is older than a gradient that is in use
                p.grad = g
                chosen.append(p)
        if clip is not None and chosen:
            if algorithm == "norm":
                nn.utils.clip_grad_norm_(chosen, clip)
            else:
                nn.utils.clip_grad_value_(chosen, clip)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._before:
            return
        before, self._before = self._before, []
        with torch.no_grad():
            for p, old, multiplier in before:
                p.copy_(torch.lerp(old, p, multiplier))
