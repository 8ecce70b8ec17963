"""The server's side of CURVE: sockets that only known keys may connect to."""

from __future__ import annotations

import atexit
import logging
import os
import threading

import zmq
from zmq.auth.thread import ThreadAuthenticator

from esper.oona.keys import Keys

__all__ = ["Doorman", "doorman_of_process"]

_LOG = logging.getLogger("esper.oona")


class _Entrance:
    """What the authenticator asks about every handshake on the sockets of one folder of keys."""

    def __init__(self, keys: Keys, doorman: Doorman) -> None:
        self._keys = keys
        self._doorman = doorman

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether whoever holds the secret of ``key`` (Z85) may come in."""
        known = key in self._keys.clients()
        if not known:
            self._doorman.note_refusal(key.decode(), self._keys)
        return known


class Doorman:
    """Answers every CURVE handshake in one ZeroMQ context (RFC 27), in a thread of its own.

    Args:
        context: There may be one doorman in a context.

    Attributes:
        refused: Handshakes of unknown keys.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.refused = 0
        self._pid = os.getpid()
        self._logged: set[str] = set()
        self._authenticator = ThreadAuthenticator(context, log=_LOG)
        self._authenticator.start()

    def guard(self, socket: zmq.Socket[bytes], keys: Keys) -> None:
        """Let nobody but the folder's clients connect to ``socket``; call it before binding.

        Peers inside the process (``inproc``) are not asked.
        """
        domain = str(keys.folder.absolute())
        self._authenticator.configure_curve_callback(domain, _Entrance(keys, self))
        socket.zap_domain = domain.encode()
        socket.curve_server = True
        socket.curve_secretkey = keys.secret
        socket.curve_publickey = keys.public

    def note_refusal(self, key: str, keys: Keys) -> None:
        """Count a refused handshake, and say once for each key what to do about it."""
        self.refused += 1
        if key not in self._logged and len(self._logged) < 100:
            self._logged.add(key)
            _LOG.warning(
                "refused a connection: its key %s is not in %s; `esper keys allow %s KEY NAME` lets it in",
                key, keys.folder / "clients", keys.folder,
            )  # fmt: skip

    @property
    def closed(self) -> bool:
        """Whether it answers no more: closed, or inherited over a fork."""
        return self._pid != os.getpid() or not self._authenticator.is_alive()

    def close(self) -> None:
        """Answer no more handshakes. Idempotent; does nothing in a forked child."""
        if not self.closed:
            self._authenticator.stop()


_LOCK = threading.Lock()
_shared: Doorman | None = None


def doorman_of_process() -> Doorman:
    """The doorman of this process's shared context (:func:`esper.oona.endpoint.new_socket`), made when needed."""
    global _shared
    with _LOCK:
        if _shared is None or _shared.closed:
            _shared = Doorman(zmq.Context.instance())
            # before the context ends (endpoint._leave, registered earlier), which would wait for its socket
            atexit.register(_shared.close)
        return _shared
