"""``esper keys``: make keys, show them, and say who is trusted."""

from __future__ import annotations

from typing import Literal

from esper.oona.keys import Keys, create_keys, trust_client, trust_server

__all__ = ["keys_command"]


def keys_command(
    action: Literal["create", "show", "allow", "trust"], folder: str, *, key: str = "", name: str = ""
) -> str:
    """Carry one of the subcommands out.

    Args:
        action: ``create`` a pair, ``show`` the public half, ``allow`` a client, ``trust`` a server.
        folder: This machine's keys.
        key: Public key or file, of ``allow`` and ``trust``.
        name: Of the client.

    Returns:
        What to print; never a secret.

    Raises:
        ConfigError: Keys are missing, malformed or already there.
    """
    if action == "create":
        create_keys(folder)
    elif action == "allow":
        return f"{trust_client(folder, key, name)}: may connect from now on"
    elif action == "trust":
        return f"{trust_server(folder, key)}: the one service that this machine connects to"
    return _describe(Keys.load(folder))


def _describe(keys: Keys) -> str:
    known = keys.server_key() != keys.public
    server = keys.server_key().decode() if known else "none yet (`esper keys trust`), so this machine itself"
    clients = [f"  {key.decode()}  {name}" for key, name in keys.clients().items() if key != keys.public]
    return "\n".join(
        [
            f"public key: {keys.public.decode()}",
            f"connects to: {server}",
            "may connect here:",
            *(clients or ["  nobody else yet (`esper keys allow`)"]),
        ]
    )
