"""``attention``: channels weigh each other in a feature map, tokens read earlier ones in a sequence.

Both read the host layer's own output y and add to it. Legend: B batch, C channels or units, H, W height
and width, T tokens, d width of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.blueprints.units import he, zero
from esper.kasmina.sites import BuildContext

__all__ = ["CausalHead", "SqueezeExcite", "attention"]


class SqueezeExcite(nn.Module):
    """``y · tanh(W₂ relu(W₁ mean_hw(y)))``: added to y, it scales each channel by a factor in (0, 2).

    Source: Hu et al. 2018, arXiv 1709.01507. Deviation: additive with a gate around zero (their
    sigmoid minus a half, doubled), so that it starts without effect.

    Shape:
        y: (B, C, H, W); output the same.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = he(nn.Linear(channels, hidden))
        self.excite = zero(nn.Linear(hidden, channels))

    def forward(self, y: Tensor) -> Tensor:
        """Return the change of ``y``."""
        gate = torch.tanh(self.excite(F.relu(self.squeeze(y.mean(dim=(2, 3))))))
        return y * gate[:, :, None, None]


class CausalHead(nn.Module):
    """One self-attention head in which token t reads tokens <= t, so that it cannot leak the future.

    Scores, softmax and mixture in one head of width d; the input is normalised without parameters, since
    a layer's raw output may have any scale. Source: Vaswani et al. 2017, arXiv 1706.03762.

    Args:
        units: C.
        width: d.
        samples: Dimension that counts samples: 0 or 1.

    Shape:
        y: (B, T, C), or (T, B, C) with ``samples=1``; output the same.
    """

    def __init__(self, units: int, width: int, samples: int = 0) -> None:
        super().__init__()
        self.units, self.width, self.samples = units, width, samples
        self.qkv = nn.Linear(units, 3 * width, bias=False)
        self.out = zero(nn.Linear(width, units, bias=False))

    def forward(self, y: Tensor) -> Tensor:
        """Return what each token takes from those before it."""
        if self.samples == 1:
            y = y.transpose(0, 1)
        q, k, v = self.qkv(F.layer_norm(y, (self.units,))).split(self.width, dim=-1)
        tokens = y.shape[1]
        later = y.new_ones((tokens, tokens), dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2)) * self.width**-0.5
        mixed = scores.masked_fill(later, float("-inf")).softmax(dim=-1) @ v
        result: Tensor = self.out(mixed)
        return result.transpose(0, 1) if self.samples == 1 else result


def _reason(context: BuildContext) -> str | None:
    site = context.site
    if site.functional:
        return "its weight is used without calling it, so it has no output of its own; use 'lowrank'"
    if site.image:
        return None
    if len(site.target_shape) != 2:
        return (
            f"its output should be a feature map or a sequence of vectors, but has shape {site.target_shape}"
        )
    if site.target_samples is None:
        return "it is not known which dimension of its output counts samples, so it might mix different ones"
    if site.target_shape[0] < 2:
        return "a sequence of one token has nothing to attend to"
    if site.target_shape[1] < 2:
        return "tokens of one unit are all alike once normalised"
    return None


def _size(context: BuildContext) -> int:
    quarter = context.site.target_units // 4
    return max(4, quarter) if context.site.image else min(64, max(8, quarter))


@blueprint("attention", kinds=("parallel",), reads="output", default_size=_size, accepts=_reason)
def attention(context: BuildContext, size: int) -> nn.Module:
    """Squeeze-excite with ``size`` hidden units at a feature map; a causal head that wide at tokens."""
    site = context.site
    if site.image:
        return SqueezeExcite(site.target_units, size)
    return CausalHead(site.target_units, size, site.target_samples or 0)
