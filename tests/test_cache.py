import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedistill.cache import shards, store
from embedistill.cache.shards import Encoded
from embedistill.cache.store import EmbeddingCache
from embedistill.cache.upkeep import (
    export_vectors,
    find_cache,
    import_vectors,
    list_caches,
    prune_caches,
    read_encoding,
    verify_caches,
)
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import PART, remove, write_json, written_aside

ENCODING = {"teacher": "t", "dim": 4, "storage_dtype": "float16"}


def encoded(n: int, seed: int = 0) -> Encoded:
    return Encoded.of(np.random.default_rng([n, seed]).normal(size=(n, 4)).astype(np.float32))


def shard_of(cache: EmbeddingCache, text: str) -> Path:
    """Return the shard that has a text."""
    digest = hashlib.sha256(text.encode()).digest()
    (found,) = [path for path in cache.folder.glob("*.arrow") if digest in path.read_bytes()]
    return found


def test_vectors_are_found_by_text_in_any_order_and_by_another_process(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    first, second = encoded(3), encoded(2)
    cache.add(["a", "b", "c"], first)
    cache.add(["d", "e"], second)
    for opened in (cache, EmbeddingCache(tmp_path, ENCODING)):
        assert len(opened) == 5
        assert opened.missing(["e", "x", "a", "x"]) == ["x"]
        expected = [second.vectors[1], first.vectors[0], second.vectors[1]]
        np.testing.assert_allclose(opened.lookup(["e", "a", "e"]), expected, atol=1e-3)
    assert cache.lookup([]).shape == (0, 4)


def test_a_vector_of_any_length_is_kept_as_a_unit_vector_with_its_length() -> None:
    made = Encoded.of(np.array([[3, 4], [0, 0], [np.nan, 1]], np.float32))
    np.testing.assert_allclose(made.vectors[:2], [[0.6, 0.8], [0, 0]], atol=1e-7)
    np.testing.assert_array_equal(made.norms, np.array([5, 0, np.nan], np.float32))


@pytest.mark.parametrize(
    ("storage", "bytes_a_number", "worst"),
    [("float32", 4, 1e-7), ("float16", 2, 2**-11), ("bfloat16", 2, 2**-8), ("int8", 1, 1 / 127)],
)
def test_every_number_format_keeps_vectors_to_its_precision(
    tmp_path: Path, storage: str, bytes_a_number: int, worst: float
) -> None:
    cache = EmbeddingCache(tmp_path, {**ENCODING, "dim": 64, "storage_dtype": storage})
    raw = np.random.default_rng(1).normal(size=(500, 64)).astype(np.float32)
    raw[7, 3] = np.nan
    made = Encoded.of(raw)
    cache.add([str(number) for number in range(500)], made)
    kept = EmbeddingCache(tmp_path, {**ENCODING, "dim": 64, "storage_dtype": storage}).lookup(
        [str(n) for n in range(500)]
    )
    usable = np.delete(np.arange(500), 7)
    if storage == "int8":  # a step is 1/127 of the largest number of its dimension: half of one at most
        largest = np.abs(made.vectors[usable]).max(axis=0)
        assert (np.abs(kept[usable] - made.vectors[usable]) <= largest / 254 * 1.0001).all()
    assert np.abs(kept[usable] - made.vectors[usable]).max() <= worst * np.abs(made.vectors[usable]).max()
    cosines = (kept[usable] * made.vectors[usable]).sum(1) / np.linalg.norm(kept[usable], axis=1)
    assert cache.worst_cosine() == pytest.approx(cosines.min(), abs=1e-6)
    assert np.isnan(cache.read_facts(cache.locate(["7"]))[0]).all()
    overhead = shard_of(cache, "1").stat().st_size - 500 * (64 * bytes_a_number + 32 + 4 + 4)
    assert 0 < overhead < 5_000


def test_another_encoding_shares_nothing(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, ENCODING).add(["a"], encoded(1))
    for change in ({"teacher": "u"}, {"storage_dtype": "float32"}, {"prompt": "query: "}):
        assert EmbeddingCache(tmp_path, {**ENCODING, **change}).missing(["a"]) == ["a"]


def test_a_text_without_vector_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmbedistillError, match="no vector for 1 texts, the first 'a'"):
        EmbeddingCache(tmp_path, ENCODING).lookup(["a"])


def test_what_was_not_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a"], encoded(1))

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("embedistill.files._sync", fail)
    with pytest.raises(OSError, match="No space"):
        cache.add(["b"], encoded(1, 1))
    monkeypatch.undo()
    again = EmbeddingCache(tmp_path, ENCODING)
    assert again.missing(["a", "b"]) == ["b"]
    again.add(["b"], encoded(1, 1))
    assert len(EmbeddingCache(tmp_path, ENCODING)) == 2


def test_the_files_can_be_read_with_pyarrow_and_json_alone(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    made = Encoded.of(np.eye(2, 4, dtype=np.float32) * 3, np.array([5, 6], np.int32), np.array([False, True]))
    cache.add(["a", "b"], made)
    assert json.loads((cache.folder / "manifest.json").read_text()) == ENCODING
    (path,) = cache.folder.glob("*.arrow")
    table = pa.ipc.open_file(str(path)).read_all().to_pydict()
    assert table == {
        "text": [hashlib.sha256(text).digest() for text in (b"a", b"b")],
        "vector": [[1, 0, 0, 0], [0, 1, 0, 0]],
        "norm": [3, 3],
        "tokens": [5, 6],
        "cut": [False, True],
    }
    assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_shard_is_set_aside_and_encoded_again(
    tmp_path: Path, damage: str, indexed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "_RECENT_ROWS", (0, 0) if indexed else (99, 99))
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a", "b"], encoded(2))
    cache.add(["c"], encoded(1))
    assert (cache.folder / "index").exists() == indexed
    shard = shard_of(cache, "a")
    match damage:
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-3])
        case "gone":
            shard.unlink()
        case "other":
            shard.write_bytes(b"no shard at all")
    again = EmbeddingCache(tmp_path, ENCODING)
    assert again.missing(["a", "b", "c"]) == ["a", "b"]
    assert ("is damaged" in capsys.readouterr().err) == (damage != "gone")
    again.add(["a", "b"], encoded(2))
    np.testing.assert_allclose(
        EmbeddingCache(tmp_path, ENCODING).lookup(["b", "c"]), [encoded(2).vectors[1], encoded(1).vectors[0]], atol=1e-3
    )


def test_a_shard_that_cannot_be_opened_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a"], encoded(1))
    shard = shard_of(cache, "a")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(shards.pa, "memory_map", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        shards.Shard(shard, 4, "float16")
    monkeypatch.setattr(shards, "sha256_file", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        verify_caches(tmp_path)
    assert shard.is_file()


def test_verify_finds_a_flipped_byte_names_the_shard_and_only_its_texts_are_missing(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a", "b"], encoded(2))
    cache.add(["c"], encoded(1))
    assert verify_caches(tmp_path) == []
    shard = shard_of(cache, "a")
    content = bytearray(shard.read_bytes())
    content[content.index(encoded(2).vectors.astype(np.float16).tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UsageError, match="0 of that key"):
        verify_caches(tmp_path, "xyz")
    assert verify_caches(tmp_path) == [shard]
    assert shard.with_suffix(".damaged").read_bytes() == content
    assert EmbeddingCache(tmp_path, ENCODING).missing(["a", "b", "c"]) == ["a", "b"]
    assert verify_caches(tmp_path) == []


@pytest.mark.parametrize("state", ["whole", "gone", "cut", "flipped", "of fewer shards", "without its contents"])
def test_the_index_is_only_a_short_cut(tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_RECENT_ROWS", (4, 99))
    cache = EmbeddingCache(tmp_path, ENCODING)
    made = {}
    for number in range(12):
        texts = [f"{number}-{i}" for i in range(5)]
        cache.add(texts, encoded(5, number))
        made |= dict(zip(texts, encoded(5, number).vectors, strict=True))
        if number == 5:
            shutil.copytree(cache.folder / "index", tmp_path / "early")
    index = cache.folder / "index"
    match state:
        case "gone":
            shutil.rmtree(index)
        case "cut":
            (index / "rows.npy").write_bytes((index / "rows.npy").read_bytes()[:-9])
        case "flipped":
            content = bytearray((index / "rows.npy").read_bytes())
            content[-8] ^= 1
            (index / "rows.npy").write_bytes(content)
        case "without its contents":
            (index / "contents.json").write_text('{"sha256": ')
        case "of fewer shards":
            shutil.rmtree(index)
            (tmp_path / "early").rename(index)
    opened = EmbeddingCache(tmp_path, ENCODING)
    assert len(opened) == 60
    texts = sorted(made)[::-1]
    np.testing.assert_allclose(opened.lookup(texts), [made[text] for text in texts], atol=1e-3)
    assert opened.missing([*texts, "x"]) == ["x"]


def test_a_cache_of_many_shards_holds_no_file_open(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    for number in range(10):
        cache.add([str(number)], encoded(1, number))
    held = Path("/proc/self/fd")  # where there is such a folder
    before = len(list(held.glob("*")))
    opened = EmbeddingCache(tmp_path, ENCODING)
    expected = [encoded(1, number).vectors[0] for number in range(10)]
    np.testing.assert_allclose(opened.lookup([str(number) for number in range(10)]), expected, atol=1e-3)
    assert len(list(held.glob("*"))) == before


def _write(root: Path, first: int) -> None:
    cache = EmbeddingCache(root, ENCODING)
    for number in range(first, first + 20):
        cache.add([str(number), f"{number} too"], encoded(2, number))


def test_two_writers_and_a_reader_at_the_same_time(tmp_path: Path) -> None:
    reader = EmbeddingCache(tmp_path, ENCODING)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, first)) for first in (0, 10)]  # ten texts in common
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        reader.refresh()
        found = [str(number) for number in range(30) if not reader.missing([str(number)])]
        assert len(found) >= seen
        seen = len(found)
        np.testing.assert_allclose(
            reader.lookup(found), np.reshape([encoded(2, int(n)).vectors[0] for n in found], (-1, 4)), atol=1e-3
        )
    assert [writer.exitcode for writer in writers] == [0, 0]
    final = EmbeddingCache(tmp_path, ENCODING)
    assert final.missing([f"{number}{tail}" for number in range(30) for tail in ("", " too")]) == []
    assert verify_caches(tmp_path) == []


def test_a_second_process_that_would_encode_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    said = []

    def note(text: str) -> None:
        said.append(text)
        (tmp_path / "go on").touch()

    monkeypatch.setattr(store, "note", note)
    code = (
        "import sys, time; from pathlib import Path; from embedistill.cache.store import EmbeddingCache\n"
        f"cache = EmbeddingCache(Path({str(tmp_path)!r}), {ENCODING!r})\n"
        "with cache.writing():\n    print('held', flush=True)\n"
        f"    while not Path({str(tmp_path / 'go on')!r}).exists(): time.sleep(0.01)\n"
        "    import numpy as np; from embedistill.cache.shards import Encoded\n"
        "    cache.add(['a'], Encoded.of(np.ones((1, 4), np.float32)))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with cache.writing():
            assert cache.missing(["a"]) == []  # the other was waited for, and what it wrote is known
    assert "another process is encoding into it; waiting for it to end" in said[0]
    with cache.writing():  # and the lock is free again
        assert len(said) == 1


def test_encodings_are_listed_found_and_pruned(tmp_path: Path) -> None:
    old, new = (EmbeddingCache(tmp_path, {**ENCODING, "teacher": name}) for name in ("old", "new"))
    old.add(["a", "b"], encoded(2))
    new.add(["a"], encoded(1))
    long_ago = time.time() - 40 * 86_400
    os.utime(old.folder / "manifest.json", (long_ago, long_ago))
    facts = list_caches(tmp_path)
    assert [(found.teacher, found.rows, found.dim, found.storage) for found in facts] == [
        ("new", 1, 4, "float16"),
        ("old", 2, 4, "float16"),
    ]
    assert facts[1].bytes == sum(file.stat().st_size for file in old.folder.iterdir())
    assert find_cache(tmp_path, new.key[:8]).key == new.key
    os.utime(old.folder / "manifest.json", (long_ago, long_ago))
    with pytest.raises(UsageError, match=r"cache 'xyz' in .*: 0 of that key; expected one of"):
        find_cache(tmp_path, "xyz")
    (new.folder / f".x{PART}").write_text("left by a kill")
    os.utime(new.folder / f".x{PART}", (long_ago, long_ago))
    with old.writing():
        assert prune_caches(tmp_path, older_than=30 * 86_400) == []  # a process is at work in it
    os.utime(old.folder / "manifest.json", (long_ago, long_ago))
    assert [found.teacher for found in prune_caches(tmp_path, older_than=30 * 86_400)] == ["old"]
    assert not (new.folder / f".x{PART}").exists()
    assert [found.teacher for found in list_caches(tmp_path)] == ["new"]
    assert prune_caches(tmp_path, keep=10**9) == []
    assert [found.teacher for found in prune_caches(tmp_path, keep=10)] == ["new"]
    assert list_caches(tmp_path) == []


def test_vectors_go_out_to_parquet_and_come_back(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "one", ENCODING)
    cache.add(["a", "b", "c"], encoded(3))
    target = tmp_path / "out.parquet"
    assert export_vectors(cache, ["c", "x", "a", "c"], target) == 2
    table = pq.read_table(target)
    assert table.column_names == ["text", "embedding"]
    assert table["text"].to_pylist() == ["c", "a"]
    np.testing.assert_allclose(table["embedding"].to_pylist(), encoded(3).vectors[[2, 0]], atol=1e-3)
    assert read_encoding(target) == ENCODING
    other = EmbeddingCache(tmp_path / "two", ENCODING)
    assert import_vectors(other, target) == 2
    assert import_vectors(other, target) == 0
    np.testing.assert_allclose(other.lookup(["a", "c"]), encoded(3).vectors[[0, 2]], atol=1e-3)


def test_a_file_that_cannot_be_taken_in_says_why(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "one", ENCODING)
    cases = {
        "expected a parquet file": None,
        "no column 'embedding'; expected one of: text, vector": {"text": ["a"], "vector": [[1.0]]},
        "rows of different lengths": {"text": ["a", "b"], "embedding": [[1.0], [1.0, 2.0, 3.0]]},
        "text is of int64; expected strings": {"text": [1], "embedding": [[1.0]]},
        "embedding is of string; expected lists of numbers": {"text": ["a"], "embedding": ["b"]},
        "a row without text or vector": {"text": ["a", None], "embedding": [[1.0], [1.0]]},
        "embedding has 2 dimensions; expected 4": {"text": ["a"], "embedding": [[1.0, 2.0]]},
    }
    for message, columns in cases.items():
        path = tmp_path / "in.parquet"
        path.write_text("x") if columns is None else pq.write_table(pa.table(columns), path)
        with pytest.raises(UsageError, match=message):
            import_vectors(cache, path)
    assert len(cache) == 0


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})

    def fail_half_way() -> None:
        with written_aside(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert json.loads(path.read_text()) == {"a": 1}
    assert not list(tmp_path.glob(f".*{PART}"))


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with written_aside(tmp_path / "d") as part:
            part.mkdir()
            (part / content).write_text("")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["new"]
    remove(tmp_path / "d")
    remove(tmp_path / "d")
    assert not (tmp_path / "d").exists()
