"""Write an exported model to a file, and prove the file by reading it back."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from esper.atomic import replacing
from esper.errors import ExportError, MissingExtraError
from esper.kasmina.example import Example, kept_example
from esper.kasmina.export.exporter import export_with_report
from esper.kasmina.export.graph import dynamic_shapes, exported_program, forgo_cache
from esper.kasmina.export.report import ExportReport
from esper.kasmina.export.verify import check_batches, difference, outputs_of, tolerance

__all__ = ["FORMATS", "METADATA_KEY", "digest", "save"]

METADATA_KEY = "esper"
"""Entry of a safetensors file's metadata that holds what esper knows about it, as JSON."""


def save(model: nn.Module, path: str | os.PathLike[str], example_input: Any = None) -> ExportReport:
    """Export ``model`` and write it to ``path``; the suffix chooses the format.

    - ``.pt``: a program of ``torch.export``, read by ``torch.export.load``; the batch size stays free.
    - ``.onnx``: an ONNX model, checked with onnxruntime.
    - ``.safetensors``: the exported weights, with a description of the layers as JSON in the metadata.

    The file is written under another name, read back, compared with the model, and then moved into
    place: ``path`` never holds half a file or one that does not work.

    Args:
        model: See :func:`~esper.kasmina.export.exporter.export`.
        path: Its folder must exist.
        example_input: See :func:`~esper.kasmina.export.exporter.export`; needed for ``.pt`` and ``.onnx``
            unless the model kept one.

    Raises:
        ExportError: Unknown suffix, no example where one is needed, or the file does not hold the model.
        MissingExtraError: ``.onnx`` without the ``onnx`` extra.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ExportError(f"the suffix should be one of {', '.join(FORMATS)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ExportError(f"the folder of {str(path)!r} does not exist; create it first")
    example = kept_example(model) if example_input is None else Example.of(example_input).like(model)
    if example is None and path.suffix != ".safetensors":
        raise ExportError(f"writing {path.name!r} needs an example input; pass example_input=")
    plain, report = export_with_report(model, example)
    if path.suffix != ".safetensors":
        forgo_cache(plain)
    with replacing(path) as temporary:
        FORMATS[path.suffix](plain, temporary, example, report)
    return report


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of ``tensors``; safetensors has no checksum of its own."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        result.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        result.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _write_program(plain: nn.Module, path: Path, example: Example | None, report: ExportReport) -> None:
    assert example is not None
    program = exported_program(plain, example)
    with path.open("wb") as file:  # given a path, torch complains about any suffix but .pt2
        torch.export.save(program, file)
    with path.open("rb") as file:
        loaded = torch.export.load(io.BytesIO(file.read())).module()
    assert isinstance(loaded, nn.Module)
    check_batches(lambda varied: outputs_of(plain, varied), loaded, example)


def _write_onnx(plain: nn.Module, path: Path, example: Example | None, report: ExportReport) -> None:
    assert example is not None
    runtime = _import_onnx()
    if example.batch_size == 1:
        example = example.with_batch(2)
    try:
        program = torch.onnx.export(
            plain,
            example.args,
            kwargs=example.kwargs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic_shapes(plain, example),
        )
        assert program is not None
        program.save(str(path), external_data=False)
    except Exception as error:  # torch.onnx raises from many places
        raise ExportError(f"torch.onnx cannot write the model: {type(error).__name__}: {error}") from error
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    sizes = [example] + ([example.with_batch(example.batch_size + 1)] if example.batch_size else [])
    for varied in sizes:
        expected = outputs_of(plain, varied)
        given = [t.detach().cpu().numpy() for t in varied.tensors]
        names = [value.name for value in session.get_inputs()]
        if len(names) != len(given):
            raise ExportError(f"the ONNX model has {len(names)} inputs, the example {len(given)} tensors")
        actual = [torch.from_numpy(y) for y in session.run(None, dict(zip(names, given, strict=True)))]
        gap = difference(expected, actual)
        if gap > tolerance(expected):
            raise ExportError(
                f"onnxruntime's outputs differ from the model's by {gap:.3g}; nothing was written"
            )


def _import_onnx() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"writing .onnx needs {error.name}, which is not installed; run: pip install 'esper[onnx]'"
        ) from error
    return onnxruntime


def _write_safetensors(plain: nn.Module, path: Path, example: Example | None, report: ExportReport) -> None:
    tensors, aliases = _without_aliases(plain.state_dict())
    described = {
        "format": 1,
        "kind": "export",
        "route": report.route,
        "folded": list(report.folded),
        "branches": list(report.branches),
        "left_out": list(report.left_out),
        "layers": {name: repr(m) for name, m in plain.named_modules() if not list(m.children()) and name},
        "aliases": aliases,
        "sha256": digest(tensors),
    }
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(described)})
    try:
        loaded = load_file(path)
        with safe_open(path, framework="pt") as file:
            written = json.loads(file.metadata()[METADATA_KEY])
    except SafetensorError as error:
        raise ExportError(f"the file written cannot be read back: {error}") from error
    if digest(loaded) != written["sha256"]:
        raise ExportError("the weights read back are not those written; the disk may be full or damaged")


def _without_aliases(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without the second names of tied ones, and those names."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"safetensors holds tensors only, but {name!r} is {type(value).__name__}")
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


_Writer = Callable[[nn.Module, Path, Example | None, ExportReport], None]
FORMATS: dict[str, _Writer] = {
    ".pt": _write_program,
    ".onnx": _write_onnx,
    ".safetensors": _write_safetensors,
}
"""Writers by suffix."""
