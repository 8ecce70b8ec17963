"""Checkpoints that a kill in the middle of writing cannot break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from esper.atomic import replacing

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and move it there in one step.

    Lightning's own (2.6.6) writes to the system's temporary folder first. Where that is another file system
    than the checkpoint's, as on most clusters, its last step is a copy, and a job that is killed in it leaves
    half a file under the name of the last checkpoint::

        Trainer(plugins=[AtomicCheckpointIO()], callbacks=[TamiyoCallback()])

    Addresses such as ``s3://`` go Lightning's way.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; takes no storage options, as the class it extends."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(str(path).removeprefix("file://"))
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as temporary:
            torch.save(checkpoint, temporary)
