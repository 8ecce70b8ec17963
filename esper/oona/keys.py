"""CURVE keys: who may talk to a run or to a service from another machine.

A folder holds everything one machine needs::

    own.key             its public key; may be shown to anyone
    own.key_secret      its secret key; mode 0600, refused when others can read it
    server.key          public key of the service that this machine connects to
    clients/NAME.key    public keys of those who may connect to this machine

The files are the certificates of ``zmq.auth``. Binding or connecting to anything beyond loopback needs such a
folder: both ends prove that they hold their key, and everything between them is encrypted (CurveZMQ, RFC 26).
The clients' folder is read at every handshake, so that a key can be added or taken away while a service runs.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import zmq
import zmq.auth
from zmq.utils import z85

from esper.errors import ConfigError

__all__ = ["Keys", "create_keys", "trust_client", "trust_server"]

_LOG = logging.getLogger("esper.oona")
_OWN, _SERVER, _CLIENTS = "own", "server", "clients"
_KEY_CHARACTERS = 40  # 32 bytes as Z85
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Keys:
    """The keys in one folder.

    Attributes:
        folder: Where they lie.
        public: This machine's public key, Z85.
        secret: Its secret key, Z85; not shown by ``repr``.
    """

    folder: Path
    public: bytes
    secret: bytes

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read and check the keys in ``folder``.

        Raises:
            ConfigError: There are none, they are damaged, or others can read the secret one.
        """
        folder = Path(folder)
        path = folder / f"{_OWN}.key_secret"
        if not path.is_file():
            raise ConfigError(
                f"expected keys in {folder}, found no {path.name}: make them with `esper keys create {folder}`"
            )
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"expected {path} to be readable by its owner alone, got mode {mode:04o}: `chmod 600 {path}`, "
                "and make new keys if others may have read it"
            )
        public, secret = _read(path)
        if secret is None:
            raise ConfigError(
                f"expected a secret key in {path}, found a public one alone: make new keys with "
                f"`esper keys create` in another folder"
            )
        return cls(folder, public, secret)

    def server_key(self) -> bytes:
        """Public key of the service that this machine may connect to; its own when it knows no other.

        Raises:
            ConfigError: The file is damaged.
        """
        path = self.folder / f"{_SERVER}.key"
        return _read(path)[0] if path.is_file() else self.public

    def clients(self) -> dict[bytes, str]:
        """Public key -> name of everybody who may connect, this machine itself (``own``) included.

        A file that holds no key is passed over with a warning: it must not lock everybody else out.
        """
        found = {self.public: _OWN}
        for path in sorted((self.folder / _CLIENTS).glob("*.key")):
            try:
                found[_read(path)[0]] = path.stem
            except ConfigError as error:
                _LOG.warning("a client's key is not used: %s", error)
        return found

    def secure_client(self, socket: zmq.Socket[bytes]) -> None:
        """Let ``socket`` prove this key, and accept none but the known server; call it before connecting."""
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public
        socket.curve_serverkey = self.server_key()

    def __repr__(self) -> str:
        return f"Keys({str(self.folder)!r}, public={self.public.decode()!r})"


def create_keys(folder: str | Path) -> Keys:
    """Make a pair of keys in ``folder``, and the folder for the clients' keys.

    Raises:
        ConfigError: There are keys already, or the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / f"{_OWN}.key_secret"
    if path.exists():
        raise ConfigError(
            f"expected a folder without keys, found {path}: nobody who knows the old ones could connect any more; "
            "choose another folder, or remove the file if that is meant"
        )
    public, secret = zmq.curve_keypair()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / _CLIENTS).mkdir(exist_ok=True)
        _write(path, public, secret)
        _write(folder / f"{_OWN}.key", public)
    except OSError as error:
        raise ConfigError(f"expected to write keys into {folder}, but: {error}") from error
    return Keys(folder, public, secret)


def trust_client(folder: str | Path, key: str, name: str) -> Path:
    """Let whoever holds the secret of ``key`` connect to the services of this machine.

    Args:
        folder: This machine's keys.
        key: A public key, or the path of a ``.key`` file.
        name: For the list; letters, digits, dots, dashes.

    Returns:
        The file that was written. Remove it to withdraw the permission; connections that stand are not cut.

    Raises:
        ConfigError: The key or the name is malformed, or there are no keys in ``folder``.
    """
    keys = Keys.load(folder)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"expected a name of letters, digits, dots and dashes, got {name!r}")
    public = _public(key)
    (keys.folder / _CLIENTS).mkdir(exist_ok=True)
    return _write(keys.folder / _CLIENTS / f"{name}.key", public)


def trust_server(folder: str | Path, key: str) -> Path:
    """Connect from this machine to none but the service whose public key is ``key``.

    Arguments and errors as :func:`trust_client`.
    """
    keys = Keys.load(folder)
    return _write(keys.folder / f"{_SERVER}.key", _public(key))


def _public(key: str) -> bytes:
    """A public key as given: itself, or in a file.

    Raises:
        ConfigError: It is neither.
    """
    if len(key) == _KEY_CHARACTERS and _is_key(key.encode(errors="replace")):
        return key.encode()
    path = Path(key)
    if path.suffix == ".key_secret":
        raise ConfigError(
            f"expected a public key (.key), got the secret one {path}: it leaves its machine never"
        )
    if not path.is_file():
        raise ConfigError(
            f"expected a public key of {_KEY_CHARACTERS} characters, or a .key file, got {key!r}: "
            "`esper keys show FOLDER` on the other machine prints it"
        )
    return _read(path)[0]


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a CURVE certificate in {path}, but: {error}") from error
    for key in (public, secret):
        if key is not None and not _is_key(key):
            raise ConfigError(
                f"expected keys of {_KEY_CHARACTERS} Z85 characters in {path}, got {len(key)} bytes"
            )
    return public, secret


def _is_key(key: bytes) -> bool:
    if len(key) != _KEY_CHARACTERS:
        return False
    try:
        return len(z85.decode(key)) == 32
    except (KeyError, ValueError):
        return False


def _write(path: Path, public: bytes, secret: bytes | None = None) -> Path:
    """Write a certificate; a secret one is never readable by others, not even for a moment."""
    lines = [
        f"#   ZeroMQ CURVE {'**Secret**' if secret else 'Public'} Certificate of esper",
        "curve",
        f'    public-key = "{public.decode()}"',
    ]
    flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if secret else os.O_TRUNC)
    if secret:
        lines.append(f'    secret-key = "{secret.decode()}"')
    with os.fdopen(os.open(path, flags, 0o600 if secret else 0o644), "w", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")
    return path
