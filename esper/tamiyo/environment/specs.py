"""One host run as plain, frozen facts: what is trained on what, for how long, and how.

Everything is a msgspec struct, so that a spec stands in the experience store and in the oracle table, travels
to worker processes, and gives the very same run anywhere.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from esper.errors import ConfigError
from esper.messages import Count, NonNegative

__all__ = [
    "SPLITS",
    "Architecture",
    "CNNShape",
    "Corpus",
    "DigitsTask",
    "FashionTask",
    "GPTShape",
    "HostSpec",
    "MLPShape",
    "PictureTask",
    "ResidualShape",
    "ShakespeareTask",
    "Shape",
    "Shift",
    "ShiftKind",
    "Split",
    "Task",
    "TeacherTask",
    "TextTask",
    "derived_seed",
]

Split = Literal["train", "validation", "test", "sealed"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "sealed")
"""``test`` holds fresh hosts of known families, ``sealed`` hosts of families that nothing is tuned on."""

Shape = Literal["random", "bottleneck", "sound"]
Corpus = Literal["reference", "datasets", "source"]
ShiftKind = Literal["labels", "inputs", "swap"]
Positive = Annotated[int, Meta(ge=1)]
Activation = Literal["relu", "gelu", "silu", "tanh"]


class MLPShape(msgspec.Struct, tag="mlp", frozen=True, kw_only=True):
    """Hidden widths of an :class:`esper.hosts.mlp.MLP`, from the input on."""

    hidden: tuple[Positive, ...]
    activation: Activation = "relu"


class ResidualShape(msgspec.Struct, tag="residual", frozen=True, kw_only=True):
    """A :class:`~esper.tamiyo.environment.nets.ResidualMLP`; ``shortcut``: its input also reaches the output."""

    width: Positive
    inner: tuple[Positive, ...]
    shortcut: bool = False
    activation: Activation = "relu"


class CNNShape(msgspec.Struct, tag="cnn", frozen=True, kw_only=True):
    """Channels and strides of an :class:`esper.hosts.cnn.CNN`."""

    widths: tuple[Positive, ...]
    strides: tuple[Positive, ...]
    norm: Literal["none", "group"] = "none"


class GPTShape(msgspec.Struct, tag="gpt", frozen=True, kw_only=True):
    """An :class:`esper.hosts.gpt.GPT` with a tied head; ``mlp_width`` hidden units in each block's MLP."""

    d_model: Positive
    depth: Positive
    num_heads: Positive
    mlp_width: Positive


class DigitsTask(msgspec.Struct, tag="digits", frozen=True, kw_only=True):
    """scikit-learn's digits; ``num_train`` of the 1078 training images."""

    num_train: Positive
    images: bool = False


class TeacherTask(msgspec.Struct, tag="teacher", frozen=True, kw_only=True):
    """Regression on the outputs of a random tanh network with hidden widths ``hidden``, drawn from ``seed``."""

    in_features: Positive
    hidden: tuple[Positive, ...]
    out_features: Positive
    num_train: Positive
    seed: Count


class PictureTask(msgspec.Struct, tag="picture", frozen=True, kw_only=True):
    """Regression of a picture's colours on coordinates and their sines and cosines at ``num_octaves`` octaves."""

    picture: Literal["china", "flower"]
    top: Count
    left: Count
    side: Positive
    num_octaves: Count
    seed: Count


class TextTask(msgspec.Struct, tag="text", frozen=True, kw_only=True):
    """The next character of a bundled text, in windows of ``context`` characters."""

    corpus: Corpus
    context: Positive


class FashionTask(msgspec.Struct, tag="fashion", frozen=True, kw_only=True):
    """Fashion-MNIST: 64 principal components, or images of 14 × 14 pixels; sealed."""

    num_train: Positive
    images: bool = False


class ShakespeareTask(msgspec.Struct, tag="shakespeare", frozen=True, kw_only=True):
    """The next character of tiny Shakespeare, in windows of ``context`` characters; sealed."""

    context: Positive


Architecture = MLPShape | ResidualShape | CNNShape | GPTShape
Task = DigitsTask | TeacherTask | PictureTask | TextTask | FashionTask | ShakespeareTask


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the data in the middle of a run.

    Attributes:
        kind: All ``labels`` permuted, all ``inputs`` permuted, or two labels that ``swap``.
        at: Steps from which each new phase holds, ascending.
    """

    kind: ShiftKind
    at: tuple[Positive, ...]


class HostSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One host run.

    Attributes:
        family: Name of its family (:data:`~esper.tamiyo.environment.families.FAMILIES`).
        split: Where it belongs.
        number: Of the host in its family and split.
        shape: How its widths were drawn.
        architecture: Of the network.
        task: What it is trained on.
        batch_size: Samples a step.
        total_steps: Optimizer steps.
        learning_rate: Peak of the schedule, tuned for its family and size.
        weight_decay: Of AdamW, on matrices.
        schedule: After 5 % of warmup, half a ``cosine`` down to zero, or ``constant``.
        shift: How the data change on the way; None when they do not.
    """

    family: str
    split: Split
    number: Count
    shape: Shape
    architecture: Architecture
    task: Task
    batch_size: Positive
    total_steps: Positive
    learning_rate: NonNegative
    weight_decay: NonNegative = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    shift: Shift | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"{self.name}: learning_rate must be positive, got {self.learning_rate}")
        if self.shift is not None:
            at = self.shift.at
            if not at or list(at) != sorted(set(at)) or at[-1] >= self.total_steps:
                raise ConfigError(
                    f"{self.name}: a shift needs ascending steps below total_steps={self.total_steps}, got {at}"
                )
            if self.shift.kind != "inputs" and not isinstance(self.task, DigitsTask | FashionTask):
                raise ConfigError(
                    f"{self.name}: only labels of classes can be permuted or swapped, got task {self.task}"
                )

    def shortened(self, total_steps: int) -> HostSpec:
        """The same run over at most ``total_steps`` steps, its shifts at the same shares of it."""
        if total_steps >= self.total_steps:
            return self
        shift = self.shift
        if shift is not None:
            at = {max(1, step * total_steps // self.total_steps) for step in shift.at}
            shift = msgspec.structs.replace(shift, at=tuple(sorted(at)))
        return msgspec.structs.replace(self, total_steps=total_steps, shift=shift)

    @property
    def name(self) -> str:
        """Names the run in messages and tables: ``family/split/number``."""
        return f"{self.family}/{self.split}/{self.number}"

    @property
    def seed(self) -> int:
        """Base of all random numbers of the run."""
        return derived_seed(self.name)


def derived_seed(*parts: object) -> int:
    """A 63-bit number that depends on all ``parts`` and on nothing else, in any process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
