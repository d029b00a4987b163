import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedistill import hub, teacher, wheels
from embedistill.choices import Kind
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import sha256_file
from embedistill.teacher import encode, find_prompt, load, locate
from embedistill.wheels import WheelModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def know(folder: Path) -> dict[str, WheelModel]:
    digest = sha256_file(folder / "model.safetensors")
    return {"org/tiny": WheelModel(wheels=(), folder="", weights_sha256=digest)}


def test_a_folder_is_found_first(teacher_dir: Path, tmp_path: Path) -> None:
    found = locate(str(teacher_dir), models_dir=tmp_path)
    assert (found.way, found.path) == ("folder", teacher_dir)
    assert found.weights_sha256 == sha256_file(teacher_dir / "model.safetensors")


def test_wheels_are_the_last_way_and_are_unpacked_once(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "fetch_from_wheels", lambda model, target: target.symlink_to(teacher_dir))
    ways = [locate("org/tiny", models_dir=tmp_path, wheel_models=know(teacher_dir)).way for _ in range(2)]
    assert ways == ["wheels", "wheels unpacked earlier"]


def test_other_weights_are_an_error_whatever_way_they_came(teacher_dir: Path, mpnet_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "org--tiny").symlink_to(mpnet_dir)
    with pytest.raises(EmbedistillError, match=r"weights with sha256 .*; expected .*other or damaged weights"):
        locate("org/tiny", models_dir=tmp_path, wheel_models=know(teacher_dir))


def test_a_snapshot_without_its_modules_is_not_taken_for_the_model(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = shutil.copytree(teacher_dir, tmp_path / "snapshot")
    monkeypatch.setattr(teacher.huggingface_hub, "snapshot_download", lambda *_, **__: str(partial))
    assert locate("org/tiny", models_dir=tmp_path).way == "hub cache"
    (partial / "model.safetensors").rename(partial / "1_Pooling" / "model.safetensors")  # of another module
    with pytest.raises(UsageError, match="model org/tiny: not found"):
        locate("org/tiny", models_dir=tmp_path)
    (partial / "1_Pooling" / "model.safetensors").rename(partial / "model.safetensors")
    shutil.rmtree(partial / "1_Pooling")
    with pytest.raises(UsageError, match="model org/tiny: not found"):
        locate("org/tiny", models_dir=tmp_path)


def test_a_name_without_an_organisation_is_one_of_sentence_transformers(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "fetch_from_wheels", lambda model, target: target.symlink_to(teacher_dir))
    known = {"sentence-transformers/tiny": next(iter(know(teacher_dir).values()))}
    found = locate("tiny", models_dir=tmp_path, wheel_models=known)
    assert (found.name, found.way) == ("sentence-transformers/tiny", "wheels")


def test_a_model_whose_weights_are_not_all_there_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher_dir, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file({f"bert.{name}": weight for name, weight in weights.items()}, tmp_path / "m" / "model.safetensors")
    load(locate(str(tmp_path / "m"), models_dir=tmp_path))  # as of a model with a head of its own
    lost = "encoder.layer.0.output.dense.weight"
    save_file({name: weights[name] for name in weights if name != lost}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UsageError, match=rf"no weights for 1 parameters, such as {lost}: they would be random"):
        load(locate(str(tmp_path / "m"), models_dir=tmp_path))


def test_prompts_of_a_recipe_stand_before_texts(teacher_dir: Path, tmp_path: Path) -> None:
    plain = load(locate(str(teacher_dir), models_dir=tmp_path))
    prompts: dict[Kind, str] = {"query": "ship : ", "document": "barn : "}
    model = load(locate(str(teacher_dir), models_dir=tmp_path, prompts=prompts))
    for kind, prompt in {"plain": "", **prompts}.items():
        np.testing.assert_allclose(encode(model, ["old tide"], kind), plain.encode([f"{prompt}old tide"]), atol=1e-6)
        assert find_prompt(model, kind) == prompt
    model = load(locate(str(teacher_dir), models_dir=tmp_path, prompts={"plain": "sea : "}))
    np.testing.assert_allclose(encode(model, ["old tide"]), plain.encode(["sea : old tide"]), atol=1e-6)


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model org/none: not found: not a folder .* not on the Hub \(no answer\)"):
        locate("org/none", models_dir=tmp_path)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(UsageError, match="not found"):
        locate(str(tmp_path / "m"), models_dir=tmp_path)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="expected a sentence-transformers folder"):
        load(locate(str(tmp_path / "m"), models_dir=tmp_path))


class HubStandIn(BaseHTTPRequestHandler):
    """As much of the Hub as snapshot_download asks for, serving one folder as org/tiny."""

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        headers, content, code = {}, b"", 200
        if path.startswith("/api/models/org/tiny/revision/") or path == "/api/models/org/tiny":
            content = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode()
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": str(file.relative_to(self.folder)),
                    "size": file.stat().st_size,
                    "oid": sha256_file(file)[:40],
                }
                for file in files
            ]
            content = json.dumps(entries).encode()
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            file = self.folder / path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
            content = file.read_bytes()
            headers = {"ETag": f'"{sha256_file(file)}"', "X-Repo-Commit": COMMIT}
        elif path != "/":
            code = 404
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(HubStandIn, folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def locate_in_process(endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "from pathlib import Path; from embedistill.teacher import locate\n"
        f"found = locate('org/tiny', models_dir=Path({str(home)!r})); print(found.way, found.weights_sha256)"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_hub_then_its_cache(teacher_dir: Path, tmp_path: Path) -> None:
    digest = sha256_file(teacher_dir / "model.safetensors")
    with serve(teacher_dir) as endpoint:
        first = locate_in_process(endpoint, tmp_path)
    assert first.stdout.split() == ["hub", digest], first.stderr
    second = locate_in_process(endpoint, tmp_path)  # the server is gone
    assert second.stdout.split() == ["hub", "cache", digest], second.stderr


@pytest.mark.parametrize("lacking", ["model.safetensors", "modules.json"])
def test_the_hub_has_models_without_safetensors_and_without_modules(
    teacher_dir: Path, tmp_path: Path, lacking: str
) -> None:
    served = shutil.copytree(teacher_dir, tmp_path / "served")
    if lacking == "model.safetensors":
        torch.save(load_file(served / lacking), served / "pytorch_model.bin")
    (served / lacking).unlink()
    with serve(served) as endpoint:
        done = locate_in_process(endpoint, tmp_path)
    kept = "model.safetensors" if lacking == "modules.json" else "pytorch_model.bin"
    assert done.stdout.split() == ["hub", sha256_file(served / kept)], done.stderr


def test_a_hub_that_does_not_answer_is_given_up_soon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    assert not hub.reachable()
    hub.reachable.cache_clear()
    assert "Hub: no answer from http://127.0.0.1:9 within 5 s; going on without it" in capsys.readouterr().err


def test_vectors_are_unit_and_as_the_library_makes_them(
    teacher_dir: Path, sentences: list[str], tmp_path: Path
) -> None:
    model = load(locate(str(teacher_dir), models_dir=tmp_path))
    vectors = encode(model, sentences[:50])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors, model.encode(sentences[:50]), atol=1e-6)


def test_the_wheel_table_is_the_default() -> None:
    assert locate.__kwdefaults__["wheel_models"] is wheels.WHEEL_MODELS
