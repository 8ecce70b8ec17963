"""A trained policy network as a safetensors file that knows its sizes, its features and its card."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from esper.atomic import replacing
from esper.errors import CheckpointError, ConfigError
from esper.kasmina.export.files import METADATA_KEY, digest
from esper.tamiyo.graph.facts import FACTS_VERSION
from esper.tamiyo.graph.features import (
    CANDIDATE_FEATURES,
    EDGE_FEATURES,
    GLOBAL_FEATURES,
    NODE_FEATURES,
)
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork

__all__ = ["FeatureNames", "card_path", "load_network", "save_network", "shipped"]

_FORMAT = 1
_SHIPPED = "tamiyo.safetensors"
_RETRAIN = "train a network with this version (esper learn policy), or use the version that wrote the file"


@dataclass(frozen=True)
class FeatureNames:
    """What each column means that a network reads, in order."""

    node: tuple[str, ...]
    edge: tuple[str, ...]
    run: tuple[str, ...]
    candidate: tuple[str, ...]

    @classmethod
    def current(cls) -> FeatureNames:
        """The features that this version builds graphs with."""
        tables = (NODE_FEATURES, EDGE_FEATURES, GLOBAL_FEATURES, CANDIDATE_FEATURES)
        return cls(*(tuple(spec.name for spec in table) for table in tables))

    @property
    def sizes(self) -> dict[str, int]:
        """The fields of :class:`PolicyConfig` that they decide."""
        return {
            "node_feature_dim": len(self.node),
            "edge_feature_dim": len(self.edge),
            "global_feature_dim": len(self.run),
            "candidate_feature_dim": len(self.candidate),
        }


def save_network(
    network: TamiyoNetwork,
    path: str | os.PathLike[str],
    *,
    card: str,
    features: FeatureNames | None = None,
) -> None:
    """Write a network with all that is needed to use it, and a model card beside it.

    Args:
        network: Trained; its weights must be finite.
        path: Ends in ``.safetensors``; its folder must exist. The card goes to :func:`card_path`.
        card: Markdown: what it was trained on, how it was judged, where it fails.
        features: What the network was trained on; those of this version if None.

    Raises:
        ConfigError: The path or the card will not do, features and network do not fit, or a weight is not
            finite.
    """
    path, features = Path(path), features or FeatureNames.current()
    wrong = [
        f"{name} is {getattr(network.config, name)}, but {size} features are named"
        for name, size in features.sizes.items()
        if getattr(network.config, name) != size
    ]
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    wrong += [
        f"{name} is not finite everywhere" for name, value in tensors.items() if not value.isfinite().all()
    ]
    if path.suffix != ".safetensors":
        wrong.append("the file name should end in .safetensors")
    if not card.strip():
        wrong.append("the model card is empty; say what the network was trained on and how it was judged")
    if wrong:
        raise ConfigError(f"a policy network cannot be saved to {path}: {'; '.join(wrong)}")
    described = {
        "format": _FORMAT,
        "kind": "policy",
        "facts_version": FACTS_VERSION,
        "config": dataclasses.asdict(network.config),
        "features": dataclasses.asdict(features),
        "sha256": digest(tensors),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(described)})
    with replacing(card_path(path)) as temporary:
        temporary.write_text(card, encoding="utf-8")


def load_network(path: str | os.PathLike[str], *, features: FeatureNames | None = None) -> TamiyoNetwork:
    """Read a network that :func:`save_network` wrote; it is in eval mode.

    Args:
        path: The file. Nothing in it is executed or unpickled.
        features: What graphs are built with; those of this version if None.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind, or made for other features.
    """
    path = Path(path)
    described, tensors = _read(path)
    config = _config(path, described["config"])
    _check_features(path, described["features"], features or FeatureNames.current())
    network = TamiyoNetwork(config)
    _check_tensors(path, tensors, network.state_dict(), described["sha256"])
    network.load_state_dict(tensors)
    return network.eval()


def card_path(path: str | os.PathLike[str]) -> Path:
    """Where the model card of the weights at ``path`` lies: beside them, as Markdown."""
    return Path(path).with_suffix(".md")


def shipped() -> Path:
    """The weights that came with this installation.

    Raises:
        ConfigError: None came with it.
    """
    path = Path(str(resources.files("esper.tamiyo") / "weights" / _SHIPPED))
    if not path.is_file():
        raise ConfigError(
            f"policy 'tamiyo' needs trained weights, and none came with this installation ({path} does not exist); "
            "train some (esper learn policy) and pass their file as the policy's option weights=..., or choose "
            "another policy, such as 'expressivity'"
        )
    return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors; of a sound file of the right kind."""
    if not path.is_file():
        raise CheckpointError(f"no policy network at {path}; pass the .safetensors file that training wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        described = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no sound safetensors file ({error}); copy or train it anew"
        ) from error
    kind = described.get("kind") if isinstance(described, dict) else None
    if kind != "policy":
        raise CheckpointError(
            f"{path} should hold a policy network, but holds {kind or 'something unnamed'!r}"
        )
    for name, ours in (("format", _FORMAT), ("facts_version", FACTS_VERSION)):
        if described.get(name) != ours:
            raise CheckpointError(
                f"{path} has {name} {described.get(name)}, this version reads {ours}; {_RETRAIN}"
            )
    missing = {"config", "features", "sha256"} - set(described)
    if missing:
        raise CheckpointError(f"{path} does not say its {', '.join(sorted(missing))}; copy or train it anew")
    return described, tensors


def _config(path: Path, stored: Any) -> PolicyConfig:
    known = {field.name for field in dataclasses.fields(PolicyConfig)}
    names = set(stored) if isinstance(stored, Mapping) else set()
    if names != known:
        raise CheckpointError(
            f"{path}: its config lacks {sorted(known - names)} and has unknown {sorted(names - known)}; {_RETRAIN}"
        )
    try:
        return msgspec.convert(stored, PolicyConfig)
    except (msgspec.ValidationError, ConfigError) as error:
        raise CheckpointError(f"{path}: its config is not valid: {error}; copy or train it anew") from error


def _check_features(path: Path, stored: Any, features: FeatureNames) -> None:
    try:
        theirs = msgspec.convert(stored, FeatureNames)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: its feature names are not valid: {error}") from error
    differences = []
    for field in dataclasses.fields(FeatureNames):
        old, new = getattr(theirs, field.name), getattr(features, field.name)
        if old != new:
            gone, added = [n for n in old if n not in new], [n for n in new if n not in old]
            what = (
                f"without {gone or 'none'} of the old and with {added or 'none'} new"
                if gone or added
                else "reordered"
            )
            differences.append(f"{field.name} features are {what}")
    if differences:
        raise CheckpointError(f"{path} was trained on other features: {'; '.join(differences)}; {_RETRAIN}")


def _check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor], sha256: str) -> None:
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not part of the network" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        ours, theirs = wanted[name], found[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            wrong.append(
                f"{name} should be {tuple(ours.shape)} {ours.dtype}, is {tuple(theirs.shape)} {theirs.dtype}"
            )
        elif not bool(torch.isfinite(theirs).all()):
            wrong.append(f"{name} is not finite everywhere")
    if wrong:
        raise CheckpointError(
            f"{path} does not fit its own config: {'; '.join(sorted(wrong)[:6])}; copy it anew"
        )
    if digest(found) != sha256:
        raise CheckpointError(f"{path} is damaged: its weights are not those that were saved; copy it anew")
