"""CURVE keys: made safely, checked when read, and asked for beyond loopback."""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path

import pytest
import zmq

from esper.cli import main
from esper.errors import ConfigError
from esper.messages import TOPICS, RunRecord
from esper.oona import BusConfig, CommandInbox, Publisher, Subscriber, find_runs
from esper.oona.keys import Keys, create_keys, trust_client, trust_server

NOTE = RunRecord("r", "note", 3, {"text": "secret plans"}, 0.0)


def heard(publisher: Publisher, subscriber: Subscriber, *, timeout_s: float = 5.0) -> bool:
    """Whether a message gets from one to the other."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        publisher.wait_for_subscriber(TOPICS["growth"], timeout_s=0.02)
        publisher.publish(NOTE)
        if subscriber.poll(20):
            return True
    return False


def test_the_secret_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    os.umask(0)
    try:
        keys = create_keys(tmp_path / "keys")
    finally:
        os.umask(0o022)
    secret = tmp_path / "keys" / "own.key_secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert keys.secret not in (tmp_path / "keys" / "own.key").read_bytes()
    assert Keys.load(tmp_path / "keys") == keys
    assert keys.secret.decode() not in repr(keys)


def test_keys_are_not_made_over_old_ones(tmp_path: Path) -> None:
    keys = create_keys(tmp_path)
    with pytest.raises(ConfigError, match="expected a folder without keys"):
        create_keys(tmp_path)
    assert Keys.load(tmp_path) == keys


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    create_keys(tmp_path)
    (tmp_path / "own.key_secret").chmod(0o640)
    with pytest.raises(ConfigError, match=r"owner alone, got mode 0640: `chmod 600"):
        Keys.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("curve\n", "No public key"),
        ('curve\n public-key = "short"\n', "40 Z85 characters"),
        (f'curve\n public-key = "{"~" * 40}"\n', "40 Z85 characters"),
        (f'curve\n public-key = "{"a" * 40}"\n', "public one alone"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "own.key_secret"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}|{match}"):
        Keys.load(tmp_path)


def test_a_folder_without_keys_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="esper keys create"):
        Keys.load(tmp_path)


def test_others_are_trusted_by_key_or_file(tmp_path: Path) -> None:
    here, there = create_keys(tmp_path / "here"), create_keys(tmp_path / "there")
    trust_client(here.folder, there.public.decode(), "laptop")
    trust_server(there.folder, str(here.folder / "own.key"))
    assert here.clients() == {here.public: "own", there.public: "laptop"}
    assert there.server_key() == here.public
    assert here.server_key() == here.public  # whoever knows no other service can only reach its own


@pytest.mark.parametrize(
    ("key", "name", "match"),
    [
        ("nonsense", "a", "expected a public key of 40 characters"),
        ("there/own.key_secret", "a", "got the secret one"),
        ("there/own.key", "../a", "expected a name"),
    ],
)
def test_what_is_no_public_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str, match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    create_keys("here")
    create_keys("there")
    with pytest.raises(ConfigError, match=match):
        trust_client("here", key, name)
    assert list(Path("here/clients").iterdir()) == []


def test_a_damaged_clients_file_does_not_lock_the_others_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = create_keys(tmp_path)
    (tmp_path / "clients" / "broken.key").write_text("?")
    assert keys.clients() == {keys.public: "own"}
    assert "broken.key" in caplog.text


def test_beyond_loopback_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loopback only .* without keys.*esper keys create"):
        BusConfig(transport="tcp", address="tcp://0.0.0.0:*")
    create_keys(tmp_path)
    config = BusConfig(transport="tcp", address="tcp://0.0.0.0:*", keys=str(tmp_path))
    with Publisher("r", config) as publisher:
        assert publisher.addresses[1].startswith("tcp://0.0.0.0:")
        found = find_runs()[0]
        assert found.telemetry.startswith("tcp://127.0.0.1:")
        with Subscriber(found) as subscriber:  # the same user's: it finds the keys
            assert heard(publisher, subscriber)


@pytest.mark.parametrize("host", ["", "127.0.0.1@x", "a b", "a/b", "[::", "ex;ample"])
def test_malformed_hosts_are_refused_with_keys_too(host: str) -> None:
    with pytest.raises(ConfigError, match=r"expected bus.address to be tcp://"):
        BusConfig(transport="tcp", address=f"tcp://{host}:5555", keys="keys")


def test_keys_belong_to_tcp() -> None:
    with pytest.raises(ConfigError, match="transport=tcp alone"):
        BusConfig(transport="ipc", keys="keys")


def test_missing_keys_show_when_the_address_is_bound(tmp_path: Path) -> None:
    config = BusConfig(transport="tcp", keys=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="esper keys create"), Publisher("r", config):
        pass


def test_known_keys_get_in_and_unknown_ones_do_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = create_keys(tmp_path / "run")
    friend, stranger = create_keys(tmp_path / "friend"), create_keys(tmp_path / "stranger")
    trust_client(run.folder, friend.public.decode(), "friend")
    for visitor in (friend, stranger):
        trust_server(visitor.folder, run.public.decode())
    config = BusConfig(transport="tcp", keys=str(run.folder), announce=False)
    with Publisher("r", config) as publisher:
        address = publisher.addresses[1]
        with Subscriber(address) as bare:
            assert not heard(publisher, bare, timeout_s=0.3)
        with Subscriber(address, config=BusConfig(transport="tcp", keys=str(stranger.folder))) as unknown:
            assert not heard(publisher, unknown, timeout_s=0.3)
            assert f"its key {stranger.public.decode()} is not in" in caplog.text
            assert "esper keys allow" in caplog.text
        with Subscriber(address, config=BusConfig(transport="tcp", keys=str(friend.folder))) as known:
            assert heard(publisher, known)
        trust_client(run.folder, stranger.public.decode(), "no-stranger")  # without a restart
        with Subscriber(address, config=BusConfig(transport="tcp", keys=str(stranger.folder))) as known:
            assert heard(publisher, known)


def test_a_run_with_keys_takes_commands_of_its_own_user(tmp_path: Path) -> None:
    create_keys(tmp_path)
    with CommandInbox("r", BusConfig(transport="tcp", keys=str(tmp_path))) as inbox:
        found = find_runs()[0]
        assert found.keys == str(tmp_path)
        keys = Keys.load(found.keys)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        with context.socket(zmq.REQ) as socket:
            socket.linger = 0
            keys.secure_client(socket)
            socket.connect(found.commands)
            socket.send(b"not a command")
            deadline = time.monotonic() + 5
            while not socket.poll(10) and time.monotonic() < deadline:
                inbox.poll()
            assert b"not an esper bus" in socket.recv()
        assert inbox.stats.refused == 1


def test_the_command_makes_shows_and_trusts_without_telling_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    assert main(["keys", "create", here]) == main(["keys", "create", there]) == 0
    assert "nobody else yet" in capsys.readouterr().out
    public = Keys.load(there).public.decode()
    assert main(["keys", "allow", here, public, "laptop"]) == 0
    assert main(["keys", "trust", there, f"{here}/own.key"]) == 0
    assert main(["keys", "show", here]) == main(["keys", "show", there]) == 0
    shown = capsys.readouterr().out
    assert f"  {public}  laptop" in shown
    assert f"connects to: {Keys.load(here).public.decode()}" in shown
    for folder in (here, there):
        assert Keys.load(folder).secret.decode() not in shown
    assert main(["keys", "create", here]) == 2
    assert "expected a folder without keys" in capsys.readouterr().err
