"""A small pre-norm decoder-only transformer.

Architecture after Radford et al. 2019 (GPT-2): learned positions, LayerNorm before each sublayer,
residual projections initialised smaller with depth. Deviation: no dropout unless asked for.

Legend: B batch, T positions, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.errors import ConfigError
from esper.hosts.common import activation_by_name, num_parameters, require_positive

__all__ = ["GPT", "GPTConfig"]

_TOLERANCE = 0.01  # sizes within 1 % of the wanted count are equally good: then keep the mlp ratio
_INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a :class:`GPT`.

    Attributes:
        vocab_size: Distinct tokens.
        context: Longest sequence, in tokens.
        d_model: Width of the residual stream; a multiple of ``num_heads``.
        depth: Blocks.
        num_heads: Attention heads of each block.
        mlp_ratio: Hidden width of a block's MLP over ``d_model`` (rounded to whole units).
        dropout: Probability on embeddings, attention weights and residual branches.
        tied: Whether the head shares the token embedding's weight.
        activation: Of the MLPs; one of :data:`esper.hosts.common.ACTIVATIONS`.
    """

    vocab_size: int = 66
    context: int = 64
    d_model: int = 64
    depth: int = 2
    num_heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    tied: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        require_positive(
            "GPTConfig",
            vocab_size=self.vocab_size,
            context=self.context,
            d_model=self.d_model,
            depth=self.depth,
            num_heads=self.num_heads,
        )
        if self.d_model % self.num_heads:
            raise ConfigError(
                f"GPTConfig.d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}"
            )
        if self.mlp_width < 1:
            raise ConfigError(f"GPTConfig.mlp_ratio must give at least one unit, got {self.mlp_ratio}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"GPTConfig.dropout must lie in [0, 1), got {self.dropout}")
        activation_by_name(self.activation)

    @property
    def mlp_width(self) -> int:
        """Hidden units of each block's MLP."""
        return round(self.mlp_ratio * self.d_model)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the network, without building it."""
        d, m, v = self.d_model, self.mlp_width, self.vocab_size
        attention = (d + 1) * 3 * d + (d + 1) * d
        mlp = (d + 1) * m + (m + 1) * d
        block = attention + mlp + 4 * d  # two LayerNorms
        head = 0 if self.tied else v * d
        return v * d + self.context * d + self.depth * block + 2 * d + head

    def uniform_like(self, num_parameters: int) -> GPTConfig:
        """Return a config of the same ``d_model`` whose depth and MLP ratio fit ``num_parameters``.

        Nearly every depth can meet the count through the MLP's width, so among the shapes within 1 %
        the one whose ratio is nearest to this config's is taken; without one within 1 %, the nearest count.
        """
        require_positive("uniform_like", num_parameters=num_parameters)
        d = self.d_model
        fixed = replace(self, depth=1, mlp_ratio=1.0 / d).num_parameters
        block = replace(self, depth=2, mlp_ratio=1.0 / d).num_parameters - fixed
        deepest = max(1, 1 + (num_parameters - fixed) // block)
        candidates = []
        for depth in range(1, deepest + 1):
            # with one hidden unit in each of the depth blocks; each further unit adds depth * (2d + 1)
            spare = num_parameters - (fixed + (depth - 1) * block)
            width = max(1, 1 + round(spare / (depth * (2 * d + 1))))
            candidates.append(replace(self, depth=depth, mlp_ratio=width / d))

        def badness(config: GPTConfig) -> tuple[float, float, int]:
            miss = abs(config.num_parameters - num_parameters)
            beyond = 0.0 if miss <= _TOLERANCE * num_parameters else float(miss)
            return beyond, abs(math.log(config.mlp_width / self.mlp_width)), miss

        return min(candidates, key=badness)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which position t sees positions <= t.

    Children: ``qkv`` (Linear D -> 3D) and ``out`` (Linear D -> D), both called as modules.

    Shape:
        x: (B, T, D); output: (B, T, D).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it."""
        batch, length, d_model = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, d_model // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, d_model))


class FeedForward(nn.Module):
    """``proj(act(fc(x)))`` at every position. Children: ``fc`` and ``proj`` (Linear).

    Shape:
        x: (B, T, D); output: (B, T, D).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.act = activation_by_name(config.activation)
        self.fc = nn.Linear(config.d_model, config.mlp_width)
        self.proj = nn.Linear(config.mlp_width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position on its own."""
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    """One pre-norm transformer block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``.

    Its output has its input's shape, so it is a site for stacking.

    Shape:
        x: (B, T, D); output: (B, T, D).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.mlp = FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """Add both sublayers' contributions to the residual stream."""
        x = x + F.dropout(self.attn(self.norm1(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only language model.

    Children: ``tokens`` and ``positions`` (Embedding), ``blocks`` (ModuleList of :class:`Block`),
    ``norm`` (LayerNorm), ``head`` (Linear without bias, its weight ``tokens.weight`` when tied).

    Shape:
        tokens: (B, T) integers, T <= context; output: logits (B, T, V).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights as GPT-2 does: std 0.02, projections into the residual stream / sqrt(2 * depth)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_residual = name.endswith((".attn.out", ".mlp.proj"))
                std = _INIT_STD / math.sqrt(2 * self.config.depth) if into_residual else _INIT_STD
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows each position.

        Raises:
            ConfigError: If the sequence is longer than the context.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ConfigError(
                f"GPT expects at most context={self.config.context} tokens, got {length}; "
                "shorten the sequence or build the host with a longer context"
            )
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, as built; a tied head counts once."""
        return num_parameters(self)

    def uniform_like(self, num_parameters: int) -> GPT:
        """Build a fresh GPT of the same ``d_model`` with nearly ``num_parameters`` parameters."""
        return GPT(self.config.uniform_like(num_parameters))
