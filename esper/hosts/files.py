"""Where data files are found, and how a missing one is reported."""

from __future__ import annotations

import os
from pathlib import Path

from esper.errors import DataNotFoundError

__all__ = ["DATA_DIR_VARIABLE", "find_data_file"]

DATA_DIR_VARIABLE = "ESPER_DATA_DIR"


def find_data_file(relative: str, *, origin: str) -> Path:
    """Return the path of ``relative`` under the folder that ``ESPER_DATA_DIR`` names.

    Args:
        relative: Path below that folder.
        origin: Where a person can get the file, for the error's text.

    Raises:
        DataNotFoundError: If the variable is unset or the file is not there.
    """
    root = os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        raise DataNotFoundError(
            f"expected the data file {relative!r} below the folder that {DATA_DIR_VARIABLE} names, but "
            f"{DATA_DIR_VARIABLE} is not set; get it from {origin}, put it at <folder>/{relative}, and run "
            f"`export {DATA_DIR_VARIABLE}=<folder>` (the default experiment on digits needs no such file)"
        )
    path = Path(root) / relative
    if not path.is_file():
        raise DataNotFoundError(
            f"expected the data file {path}, but there is none; {DATA_DIR_VARIABLE} is {root!r}; get "
            f"the file from {origin} and put it there, or set {DATA_DIR_VARIABLE} to the folder that holds "
            f"{relative!r}"
        )
    return path
