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


@pytest.mark.parametrize("damage", ["shape", "cut", "gone"])
def test_a_damaged_shard_is_forgotten_and_encoded_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = EmbeddingCache(tmp_path, ENCODING)
    cache.add(["a", "b"], vectors(2))
    cache.add(["c"], vectors(1))
    shard = max((tmp_path / cache.key).glob("*.vectors.npy"), key=lambda path: path.stat().st_size)
    match damage:
        case "shape":
            np.save(shard, np.zeros((1, 4), np.float16))
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-3])
        case "gone":
            shard.unlink()
    again = EmbeddingCache(tmp_path, ENCODING)
    assert again.missing(["a", "b", "c"]) == ["a", "b"]
    assert "is damaged; its 2 texts are encoded again" in capsys.readouterr().err
    again.add(["a", "b"], vectors(2))
    assert len(EmbeddingCache(tmp_path, ENCODING)) == 3


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
