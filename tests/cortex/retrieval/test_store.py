"""The store as LangChain sees it, what it refuses, and that its indexes never say anything but its table."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("bm25s")
pytest.importorskip("langchain_core")

from langchain_core.documents import Document

from esper.cortex.encoder import Encoder, HashingConfig, HashingEncoder
from esper.cortex.retrieval import HybridRetriever, PassageStore, reciprocal_rank_fusion, search_passages
from esper.errors import ConfigError, DataFormatError, DataNotFoundError

TEXTS = {
    "growth": "a narrow layer grows while the network trains",
    "pizza": "order a pizza with mushrooms",
    "weather": "it rains in the mountains all day long",
    "query": "parse_query reads the text of a database query",
}


def documents() -> list[Document]:
    return [
        Document(id=id_, page_content=text, metadata={"source": f"notes/{id_}.md", "length": len(text)})
        for id_, text in TEXTS.items()
    ]


def encoder(dimension: int = 256) -> HashingEncoder:
    return HashingEncoder(HashingConfig(dimension=dimension))


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    with PassageStore(tmp_path / "store", encoder()) as made:
        made.add_documents(documents())
        yield made


def best(store: PassageStore, question: str, **options: object) -> str | None:
    return store.similarity_search(question, 1, **options)[0].id


def test_scores_are_cosines_and_the_order_is_theirs(store: PassageStore) -> None:
    question = "which layer grows"
    found = store.similarity_search_with_score(question, 10)
    vectors = encoder().encode([question, *(document.page_content for document, _ in found)])
    assert [score for _, score in found] == pytest.approx((vectors[1:] @ vectors[0]).tolist(), abs=1e-6)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert len(found) == len(TEXTS)
    document = found[0][0]
    assert (document.id, document.page_content) == ("growth", TEXTS["growth"])
    assert document.metadata == {"source": "notes/growth.md", "length": len(TEXTS["growth"])}
    assert all(0 <= score <= 1 for _, score in store.similarity_search_with_relevance_scores(question, 4))


def test_vectors_of_any_length_are_compared_by_their_direction(tmp_path: Path) -> None:
    class Plane(HashingEncoder):
        fingerprint = "plane"  # type: ignore[assignment]
        dimension = 2  # type: ignore[assignment]

    with PassageStore(tmp_path, Plane()) as store:
        store.add_vectors(
            [Document(id="far", page_content="x"), Document(id="near", page_content="y")],
            [[100, 100], [0.1, 0]],
        )
        assert [d.id for d in store.similarity_search_by_vector([7.0, 0.5], 2)] == ["near", "far"]
        with pytest.raises(ConfigError, match="does not name its encoder"):
            PassageStore.open(tmp_path)


def test_a_document_is_replaced_deleted_and_found_by_id(store: PassageStore) -> None:
    store.add_documents([Document(id="pizza", page_content="the glacier melts", metadata={})])
    assert (best(store, "melting glacier"), len(store)) == ("pizza", 4)
    assert "mushrooms" not in {d.page_content for d in store.similarity_search("mushrooms pizza", 4)}
    assert [d.id for d in store.get_by_ids(["query", "nobody", "growth"])] == ["query", "growth"]
    assert store.delete(["pizza"])
    assert not store.delete(["pizza", "weather"])
    assert [d.id for d in store.similarity_search("anything", 9)] != []
    assert len(store.similarity_search("anything", 9)) == len(store) == 2
    assert len(search_passages(store, "glacier rains", mode="sparse")) == 0
    assert store.delete()
    assert (len(store), store.similarity_search("anything", 3)) == (0, [])
    assert search_passages(store, "anything") == []


def test_filters(store: PassageStore) -> None:
    assert best(store, "pizza", filter={"source": "notes/query.md"}) == "query"
    assert best(store, "pizza", filter={"source": ["notes/query.md", "notes/growth.md"]}) in (
        "query",
        "growth",
    )
    found = store.similarity_search("pizza", 9, filter={"source": "*/?[we]*"})
    assert found == []
    found = store.similarity_search("pizza", 9, filter={"source": "*/w*.md"})
    assert [d.id for d in found] == ["weather"]
    assert [h.document.id for h in search_passages(store, "order", filter={"length": 28})] == ["pizza"]
    with pytest.raises(ConfigError, match=r"no passage of this store has 'author'.*length, source"):
        store.similarity_search("pizza", filter={"author": "me"})
    with pytest.raises(ConfigError, match="letters, digits"):
        store.similarity_search("pizza", filter={"x') OR 1 --": "me"})
    with pytest.raises(ConfigError, match="text or a number"):
        store.similarity_search("pizza", filter={"source": None})


def test_as_a_retriever(store: PassageStore) -> None:
    assert store.as_retriever(search_kwargs={"k": 1}).invoke("mushrooms pizza")[0].id == "pizza"
    found = HybridRetriever(store=store, k=2, filter={"source": "notes/*"}).invoke("the database query")
    assert found[0].id == "query"
    assert found[0].metadata["score"] == pytest.approx(2 / 11)


def test_fusion_is_the_papers_sum() -> None:
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["c", "d"]])
    assert dict(fused) == pytest.approx({"c": 1 / 63 + 1 / 61, "a": 1 / 61, "b": 1 / 62, "d": 1 / 62})
    assert [item for item, _ in fused] == ["c", "a", "b", "d"]


def test_each_mode_ranks_by_its_own_score(store: PassageStore) -> None:
    for mode in ("hybrid", "dense", "sparse"):
        hits = search_passages(store, "database query parser", 2, mode=mode)  # type: ignore[arg-type]
        assert hits[0].document.id == "query"
        expected = {"dense": hits[0].cosine, "sparse": hits[0].bm25, "hybrid": pytest.approx(2 / 11)}[mode]
        assert hits[0].score == expected
    assert search_passages(store, "zzzz", mode="sparse") == []


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", {}, "blank"),
        (" \n", {}, "blank"),
        ("word " * 200_000, {}, "at most 20,000 characters"),
        ("fine", {"k": 0}, "at least 1"),
        ("fine", {"mode": "both"}, "one of hybrid"),
    ],
)
def test_questions_without_meaning_are_refused(
    store: PassageStore, question: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises((ConfigError, DataFormatError), match=message):
        search_passages(store, question, **options)  # type: ignore[arg-type]


def test_what_cannot_be_stored_leaves_the_store_as_it_was(store: PassageStore) -> None:
    new = [Document(id="a", page_content="fine"), Document(id="b", page_content="fine too")]
    for vectors, message in (
        (np.ones((2, 3)), r"shape \(n, 256\)"),
        (np.full((2, 256), np.nan), "NaN"),
        (np.zeros((2, 256)), "all zeros"),
        (np.ones((1, 256)), "each of 2 documents"),
    ):
        with pytest.raises(DataFormatError, match=message):
            store.add_vectors(new, vectors)
    with pytest.raises(DataFormatError, match="blank"):
        store.add_documents([new[0], Document(page_content=" ")])
    with pytest.raises(ConfigError, match="JSON"):
        store.add_documents([Document(page_content="fine", metadata={"x": {1, 2}})])
    with pytest.raises(ConfigError, match="twice"):
        store.add_documents([new[0], new[0]])
    with pytest.raises(ConfigError, match="an id for each"):
        store.add_documents(new, ids=["a"])
    for vector in ([1.0] * 3, [float("nan")] * 256, [0.0] * 256):
        with pytest.raises(DataFormatError, match="question's vector"):
            store.similarity_search_by_vector(vector)
    assert sorted(store.table.ids()) == sorted(TEXTS)


def test_another_encoders_store_is_refused(tmp_path: Path) -> None:
    PassageStore(tmp_path, encoder()).close()
    with pytest.raises(DataFormatError, match="use that encoder or another folder"):
        PassageStore(tmp_path, encoder(128))
    with PassageStore.open(tmp_path) as store:
        assert isinstance(store.encoder, Encoder)
        assert store.encoder.fingerprint == encoder().fingerprint
    with pytest.raises(DataNotFoundError, match="esper index"):
        PassageStore.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match="folder="):
        PassageStore.from_texts(["a"], encoder())
    with PassageStore.from_texts(["a b", "c d"], encoder(), folder=tmp_path / "new", ids=["x", "y"]) as store:
        assert best(store, "c d") == "y"


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "passages.sqlite").write_bytes(b"anything else " * 500)
    with pytest.raises(DataFormatError, match="no SQLite file"):
        PassageStore(folder, encoder())
    (folder / "passages.sqlite").unlink()
    with sqlite3.connect(folder / "passages.sqlite") as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(DataFormatError, match="another kind"):
        PassageStore(folder, encoder())
    db.close()
    with PassageStore(tmp_path / "other", encoder()) as store:
        store.add_documents(documents())
        with store.table.database.writing() as db:
            db.execute("UPDATE vectors SET vector = zeroblob(1024) WHERE row = 2")
        with pytest.raises(DataFormatError, match="not of length one"):
            store.similarity_search("pizza")
        with store.table.database.writing() as db:
            db.execute("UPDATE vectors SET vector = zeroblob(3) WHERE row = 2")
        with pytest.raises(DataFormatError, match="another length"):
            store.similarity_search("pizza")


def answers(store: PassageStore) -> list[list[tuple[str | None, float]]]:
    questions = [*TEXTS.values(), "pizza query", "glacier"]
    return [[(h.document.id, h.score) for h in search_passages(store, q, 10)] for q in questions]


def test_saved_indexes_answer_as_the_table_does(
    store: PassageStore, caplog: pytest.LogCaptureFixture
) -> None:
    folder = store.table.folder
    store.save()
    first = answers(store)
    with PassageStore.open(folder) as again:
        assert answers(again) == first
        again.delete(["pizza"])
        again.add_documents([Document(id="ice", page_content="the glacier melts")])
        changed = answers(again)
        assert changed == answers(store) != first  # the other one has seen it too
        again.save()
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["dense-3", "sparse-3"]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    flipped = folder / "dense-3" / "index.faiss"
    content = bytearray(flipped.read_bytes())
    content[-100] ^= 0x40
    flipped.write_bytes(bytes(content))
    shutil.rmtree(folder / "sparse-3")
    (folder / ".dense-9.tmp").mkdir()
    with PassageStore.open(folder) as again:
        assert answers(again) == changed
        told = " ".join(r.getMessage() for r in caplog.records)
        assert "the dense index" in told
        assert "the sparse index" in told
        again.save()
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["dense-3", "sparse-3"]


def test_nothing_in_a_store_is_a_pickle(store: PassageStore) -> None:
    store.save()
    kinds = {path.suffix for path in store.table.folder.rglob("*") if path.is_file()}
    assert kinds <= {".sqlite", ".sqlite-wal", ".sqlite-shm", ".faiss", ".npy", ".json"}
    for path in store.table.folder.rglob("*.npy"):
        np.load(path, allow_pickle=False)
    for path in store.table.folder.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
