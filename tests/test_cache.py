import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from embedistill import cache as cache_module
from embedistill.cache import EmbeddingCache
from embedistill.errors import EmbedistillError
from embedistill.files import PART, remove, write_json, written_aside

ENCODING = {"teacher": "t", "dim": 4}


def vectors(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)


def test_vectors_are_found_by_text_in_any_order_and_by_another_process(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    first, second = vectors(3), vectors(2)
    cache.add(["a", "b", "c"], first)
    cache.add(["d", "e"], second)
    for opened in (cache, EmbeddingCache(tmp_path, ENCODING)):
        assert len(opened) == 5
        assert opened.missing(["e", "x", "a", "x"]) == ["x"]
        np.testing.assert_allclose(opened.lookup(["e", "a", "e"]), [second[1], first[0], second[1]], atol=1e-3)


def test_another_encoding_shares_nothing(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, ENCODING).add(["a"], vectors(1))
    assert EmbeddingCache(tmp_path, {**ENCODING, "teacher": "u"}).missing(["a"]) == ["a"]


def test_a_text_without_vector_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmbedistillError, match="no vector for 1 texts, the first 'a'"):
        EmbeddingCache(tmp_path, ENCODING).lookup(["a"])


def test_what_was_not_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a"], vectors(1))

    def fail(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cache_module, "write_json", fail)
    with pytest.raises(OSError, match="No space"):
        cache.add(["b"], vectors(1))
    monkeypatch.undo()
    again = EmbeddingCache(tmp_path, ENCODING)
    assert again.missing(["a", "b"]) == ["b"]
    again.add(["b"], vectors(1))
    assert len(EmbeddingCache(tmp_path, ENCODING)) == 2


def test_the_files_can_be_read_with_numpy_and_json_alone(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a", "b"], vectors(2))
    folder = tmp_path / cache.key
    assert json.loads((folder / "manifest.json").read_text()) == ENCODING
    stored = np.load(next(folder.glob("*.vectors.npy")), allow_pickle=False)
    hashes = np.load(next(folder.glob("*.texts.npy")), allow_pickle=False)
    assert (stored.dtype, stored.shape) == (np.float16, (2, 4))
    assert hashes[1].tobytes() == hashlib.sha256(b"b").digest()


def test_a_shard_of_another_shape_is_named(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a", "b"], vectors(2))
    np.save(next((tmp_path / cache.key).glob("*.vectors.npy")), np.zeros((1, 4), np.float16))
    with pytest.raises(EmbedistillError, match=r"of shape \(1, 4\); expected \(2, 4\)"):
        EmbeddingCache(tmp_path, ENCODING)


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
