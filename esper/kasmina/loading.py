"""Load a grown model from a file: the structure first, then the weights, or nothing at all."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from esper.errors import CheckpointError
from esper.kasmina.compiled_names import differ_by_compilation, named_as_in
from esper.kasmina.export.files import METADATA_KEY, digest
from esper.kasmina.lazy import settle_by_state
from esper.kasmina.structure import conform, follow_state_dict
from esper.kasmina.validation import check_state_dict

__all__ = ["GrowableMixin", "load", "read_checkpoint", "state_dict_in"]

Model = TypeVar("Model", bound=nn.Module)


def load(model: Model, path: str | os.PathLike[str], *, strict: bool = True) -> Model:
    """Load weights into ``model``, growing and removing seeds so that it is as the file has it.

    Reads checkpoints of Lightning, plain ``torch.save(model.state_dict(), path)`` files and
    ``.safetensors``. Nothing is unpickled (``weights_only=True``). Which parts of the model are wrapped by
    ``torch.compile`` may differ from the model that was saved.

    Args:
        model: A fresh host, or one with seeds; need not be attached. Seeds that the file lacks are removed.
        path: The file.
        strict: Whether missing and unexpected keys of the host are errors; of seeds they always are.

    Returns:
        The same model.

    Raises:
        CheckpointError: The file is damaged, of another kind or of another model. The model is unchanged.
    """
    path = Path(path)
    state = state_dict_in(read_checkpoint(path), path)
    if differ_by_compilation(model, state):
        state = named_as_in(model, state)
    settle_by_state(model, state)
    try:
        states = check_state_dict(model, state, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}{_hint(model, state)}") from error
    conform(model, states)
    model.load_state_dict(state, strict=strict)
    return model


class GrowableMixin:
    """Makes ``load_state_dict``, and with it Lightning's ``load_from_checkpoint``, regrow a grown model.

    ``load_from_checkpoint`` builds a fresh module and runs no callback, so without this it stops at the
    seeds' keys, or drops them silently with ``strict=False``. Put it first among the bases::

        class Classifier(esper.GrowableMixin, L.LightningModule): ...
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Grow or ungrow to what ``state_dict`` holds, then load it.

        Args:
            state_dict: Of this model, grown or not.
            *args: As :meth:`torch.nn.Module.load_state_dict` takes them.
            **kwargs: As :meth:`torch.nn.Module.load_state_dict` takes them.

        Raises:
            CheckpointError: It is of another model or damaged; this model is unchanged.
        """
        assert isinstance(self, nn.Module), "GrowableMixin belongs in front of an nn.Module class"
        follow_state_dict(self)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU, without unpickling objects.

    Args:
        path: A ``.safetensors`` file, or one written by ``torch.save`` or by Lightning.

    Raises:
        CheckpointError: It is not there, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint at {path}, but there is no such file")
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a checkpoint or a state dict, but it holds a {type(content).__name__}"
        )
    return content


def state_dict_in(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model's weights in what a checkpoint file holds.

    Args:
        content: Of a Lightning checkpoint, or a state dict itself.
        path: Named in the error.

    Raises:
        CheckpointError: There are none.
    """
    state = content.get("state_dict", content) if "pytorch-lightning_version" in content else content
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: it holds no weights")
    strange = [
        key
        for key, value in state.items()
        if not isinstance(key, str) or not (isinstance(value, Tensor) or key.endswith("_extra_state"))
    ]
    if strange:
        shown = ", ".join(repr(key) for key in strange[:5])
        raise CheckpointError(
            f"{path}: expected a Lightning checkpoint or a state dict of tensors, but {shown} hold something else"
        )
    return dict(state)


def _read_torch(path: Path) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage makes it stumble on
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise CheckpointError(
            f"expected a checkpoint at {path}, but it does not load ({type(error).__name__}: {first}); it is damaged, "
            "or holds objects other than tensors and plain values"
        ) from error


def _check_archive(path: Path) -> None:
    """Compare the checksums of the archive, which torch writes but does not check."""
    if not zipfile.is_zipfile(path):
        return  # an old format, or no checkpoint at all: torch.load tells
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises struct, zlib, Unicode and other errors on damage
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged!r} in it does not match")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; it is damaged or no safetensors file"
        ) from error
    if METADATA_KEY in metadata:
        try:
            described = json.loads(metadata[METADATA_KEY])
            expected, aliases = str(described["sha256"]), dict(described["aliases"])
            names = {str(alias): tensors[name] for alias, name in aliases.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged: what esper wrote about it cannot be read ({error})"
            ) from error
        if digest(tensors) != expected:
            raise CheckpointError(f"{path} is damaged: the checksum of its weights does not match")
        tensors |= names
    return tensors


def _hint(model: nn.Module, state: Mapping[str, Any]) -> str:
    """What may help where all keys stand under a common prefix that the model lacks."""
    own = set(model.state_dict())
    for name in sorted({key.split(".")[0] for key in state}):
        inside = {key[len(name) + 1 :] for key in state if key.startswith(f"{name}.")}
        if inside and len(own & inside) > len(own) // 2:
            return f". Its keys under {name!r} look like this model's: load into the module that holds it as {name!r}"
    return ""
