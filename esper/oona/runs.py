"""How another process finds a running training: descriptors in a per-user runtime directory.

Each endpoint of a run writes ``<run>-<token>.<role>.json`` beside its socket file and holds a lock on it.
The lock, not the process id, says whether the run is alive: the kernel drops it with the process however
that ends, it cannot be mistaken for a later process with the same id, and it is right for containers that
share a directory but not their process ids.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import msgspec
import zmq

from esper.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: no such locks, so runs are not announced there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Announcement", "Role", "RunInfo", "announce", "find_runs", "reserve"]

Role = Literal["telemetry", "commands"]


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A running training, as its descriptors tell.

    ``telemetry`` and ``commands`` are ZeroMQ endpoints (empty: not offered), ``started`` is in Unix
    seconds, ``run_dir`` is the folder with the run's ``growth.jsonl`` (empty: none), ``keys`` the folder of
    keys without which it answers nobody (empty: none are needed).
    """

    run_id: str
    pid: int
    started: float
    telemetry: str = ""
    commands: str = ""
    run_dir: str = ""
    keys: str = ""


class _Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """What one descriptor file holds."""

    role: Role
    run_id: str
    pid: int
    address: str
    started: float
    run_dir: str = ""
    keys: str = ""


class Announcement:
    """A descriptor on disk, held for as long as its endpoint is open."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self.path = path
        self._handle = handle

    def withdraw(self) -> None:
        """Remove the descriptor and give up its lock. Idempotent."""
        self.path.unlink(missing_ok=True)
        self._handle.close()


def reserve(run_id: str, role: Role) -> Path:
    """A fresh path, without suffix, for the descriptor and socket of one endpoint.

    Raises:
        ConfigError: no runtime directory is usable, or all are too deep for a socket path.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", run_id)[:24]
    name = f"{readable}-{secrets.token_hex(4)}.{role}"
    problems = []
    for directory in _directories():
        stem = directory / name
        if len(os.fsencode(f"{stem}.sock")) > zmq.IPC_PATH_MAX_LEN:
            problems.append(f"{directory} is too deep for a socket path of {zmq.IPC_PATH_MAX_LEN} bytes")
            continue
        try:
            _make_private(directory)
        except OSError as error:
            problems.append(str(error))
        else:
            return stem
    raise ConfigError(
        f"expected a private directory for the sockets of run {run_id!r}, but {'; '.join(problems)}: "
        "set ESPER_RUNTIME_DIR to a short path of your own"
    )


def announce(
    stem: Path, *, role: Role, run_id: str, address: str, run_dir: str = "", keys: str = ""
) -> Announcement:
    """Publish the descriptor of one endpoint.

    Args:
        stem: what :func:`reserve` returned.
        role: what is offered at the address.
        run_id: the run's name.
        address: the bound endpoint.
        run_dir: the run's folder, or empty.
        keys: folder of the keys that the endpoint wants, or empty.

    Raises:
        OSError: the file cannot be written or locked.
    """
    if fcntl is None:
        raise OSError("this operating system has no file locks to announce a run with")
    path = stem.with_name(stem.name + ".json")
    descriptor = _Descriptor(
        role=role,
        run_id=run_id,
        pid=os.getpid(),
        address=address,
        started=time.time(),
        run_dir=run_dir,
        keys=keys,
    )
    draft = stem.with_name(stem.name + ".draft")
    handle = draft.open("wb")
    try:
        handle.write(msgspec.json.encode(descriptor))
        handle.flush()
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.rename(path)  # it appears complete and locked, so no reader takes it for a dead one
    except OSError:
        handle.close()
        draft.unlink(missing_ok=True)
        raise
    return Announcement(path, handle)


def find_runs() -> list[RunInfo]:
    """Trainings of this user that are running now on this machine, newest first.

    Descriptors whose process has died are removed, with their socket files.
    """
    runs: dict[tuple[str, int], RunInfo] = {}
    for descriptor in _living_descriptors():
        key = (descriptor.run_id, descriptor.pid)
        known = runs.get(key)
        if known is None:
            known = RunInfo(run_id=descriptor.run_id, pid=descriptor.pid, started=descriptor.started)
        runs[key] = msgspec.structs.replace(
            known,
            started=min(known.started, descriptor.started),
            run_dir=known.run_dir or descriptor.run_dir,
            keys=known.keys or descriptor.keys,
            **{descriptor.role: descriptor.address},
        )
    return sorted(runs.values(), key=lambda run: run.started, reverse=True)


def _living_descriptors() -> Iterator[_Descriptor]:
    for directory in _directories():
        if not _is_private(directory):
            continue  # another user's directory under our name: its content is not to be trusted
        for path in sorted(directory.glob("*.json")):
            try:
                if _is_alive(path):
                    yield msgspec.json.decode(path.read_bytes(), type=_Descriptor)
                else:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".sock").unlink(missing_ok=True)
            except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
                continue  # withdrawn while we looked, or written by another version of esper


def _is_alive(path: Path) -> bool:
    """Whether somebody holds the descriptor's lock."""
    if fcntl is None:
        return False
    with path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _directories() -> list[Path]:
    """Runtime directories in order of preference; a reader looks into all of them.

    A terminal and a job often differ in ``XDG_RUNTIME_DIR`` and ``TMPDIR``, hence more than one.
    """
    override = os.environ.get("ESPER_RUNTIME_DIR")
    if override:
        return [Path(override).absolute()]
    found = []
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(session) / "esper")
    user = str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
    found.append(Path(tempfile.gettempdir()) / f"esper-{user}")
    found.append(Path("/tmp") / f"esper-{user}")
    return list(dict.fromkeys(found))


def _make_private(directory: Path) -> None:
    """Create the directory for this user alone, or check that it already is.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=True)
    if not _is_private(directory):
        raise PermissionError(f"{directory} is not a directory that only you can enter (mode 0700)")


def _is_private(directory: Path) -> bool:
    try:
        status = directory.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return stat.S_ISDIR(status.st_mode) and mine and not status.st_mode & 0o077
