"""A multilayer perceptron with any hidden widths, well shaped or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

from esper.errors import ConfigError
from esper.hosts.common import activation_by_name, nearest_width, num_parameters, require_positive

__all__ = ["MLP", "MLPConfig"]


@dataclass(frozen=True)
class MLPConfig:
    """Shape of an :class:`MLP`.

    Attributes:
        in_features: Inputs a sample has once it is flattened.
        hidden: Width of each hidden layer, from the input on. The default is badly shaped on purpose:
            its 4-wide layer throws away what the 16 before it found.
        num_classes: Outputs (logits).
        activation: One of :data:`esper.hosts.common.ACTIVATIONS`.
    """

    in_features: int = 64
    hidden: tuple[int, ...] = (16, 4, 16, 6)
    num_classes: int = 10
    activation: str = "relu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))  # lists come from files
        require_positive(
            "MLPConfig", in_features=self.in_features, hidden=self.hidden, num_classes=self.num_classes
        )
        activation_by_name(self.activation)

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, weights and biases, without building it."""
        widths = (self.in_features, *self.hidden, self.num_classes)
        return sum((d_in + 1) * d_out for d_in, d_out in pairwise(widths))

    def uniform_like(self, num_parameters: int) -> MLPConfig:
        """Return the config of equal depth and one width whose parameters are nearest to ``num_parameters``.

        Raises:
            ConfigError: If there is no hidden layer whose width could be chosen.
        """
        require_positive("uniform_like", num_parameters=num_parameters)
        depth = len(self.hidden)
        if depth == 0:
            raise ConfigError("uniform_like needs an MLP with at least one hidden layer, got hidden=()")
        width = nearest_width(lambda w: replace(self, hidden=(w,) * depth).num_parameters, num_parameters)
        return replace(self, hidden=(width,) * depth)


class MLP(nn.Module):
    """``head(act(layers[-1](... act(layers[0](x)))))``.

    Children: ``layers`` (:class:`~torch.nn.ModuleList` of hidden Linears) and ``head`` (Linear).

    Shape:
        x: (B, ...) with ``in_features`` values a sample; output: (B, num_classes).
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.act = activation_by_name(config.activation)
        widths = (config.in_features, *config.hidden)
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out) for d_in, d_out in pairwise(widths))
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, ...) to logits (B, num_classes)."""
        x = x.flatten(1)
        for layer in self.layers:
            x = self.act(layer(x))
        return self.head(x)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, as built."""
        return num_parameters(self)

    def uniform_like(self, num_parameters: int) -> MLP:
        """Build a fresh MLP of equal depth and one width, of nearly ``num_parameters`` parameters."""
        return MLP(self.config.uniform_like(num_parameters))
