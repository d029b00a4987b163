import json
import logging
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from conftest import write_sentence

from embedistill.cache.remote import pull, push
from embedistill.cache.shards import SUFFIX, list_shards
from embedistill.cache.store import MANIFEST, EmbeddingCache
from embedistill.encoding import cluster as cluster_module
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.cluster import TeacherSpec, encode_on_ray
from embedistill.encoding.local import LocalEncoder
from embedistill.errors import EmbedistillError, UsageError
from embedistill.teacher import locate

WINDOW = 40
BUCKET = "s3://bucket/embeddings"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A stand-in for S3; addresses of s3:// lead to it, here and in processes that are started."""
    server_module = pytest.importorskip("moto.server", reason="the stand-in for S3 needs moto[server]")
    s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "made-up")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("bucket")
        yield BUCKET
    server.stop()


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[str]:
    """Two nodes of one core on this machine, reached by its loopback address; yields the one that says it has a GPU."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # the path of a socket is short, unlike that of pytest's folder
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray takes the address that others reach
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        pytest.importorskip("ray.data", reason="there is no wheel of Ray for this Python on this platform")
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
        nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        with_gpu = nodes.add_node(**node, num_gpus=1)
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield with_gpu.node_id
        nodes.shutdown()


@pytest.fixture
def teacher(teacher_dir: Path, tmp_path: Path) -> CachedTeacher:
    """The local engine."""
    encoder = LocalEncoder(locate(str(teacher_dir), models_dir=tmp_path), torch.float32)
    encoder.window = WINDOW
    return CachedTeacher(encoder, tmp_path / "local")


def open_cache(teacher: CachedTeacher, root: Path) -> EmbeddingCache:
    return EmbeddingCache(root, teacher.encoder.describe("plain", "float16"))


@pytest.fixture
def spec(teacher_dir: Path) -> TeacherSpec:
    return TeacherSpec(str(teacher_dir), window=WINDOW)


@pytest.fixture
def texts() -> list[str]:
    """Twenty-four windows of different texts."""
    rng = random.Random(2)
    return list(dict.fromkeys(write_sentence(rng, 12) for _ in range(28 * WINDOW)))[: 24 * WINDOW]


def test_two_nodes_do_what_a_killed_run_left_with_the_bytes_of_the_local_engine(
    cluster: str,
    bucket: str,
    teacher: CachedTeacher,
    spec: TeacherSpec,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray.data import DataContext

    monkeypatch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 240)  # so that each does some
    cache = open_cache(teacher, tmp_path / "here")
    store = f"{bucket}/{cache.key}"
    kill_half_way(cache, spec, texts[: 18 * WINDOW], store)
    kept = len(list_store(store, SUFFIX))
    assert 2 <= kept < 18
    assert list_store(store, "/work-")
    assert not list_shards(cache.folder)

    capsys.readouterr()
    grown = [*texts, *texts[:100]]
    assert encode_on_ray(grown, "plain", cache, spec, store=bucket, workers=2) == (24 - kept) * WINDOW
    windows = [int(n) for n in re.findall(rf"(\d+) by {platform.node()} \(\w+\)", capsys.readouterr().err)]
    assert len(windows) == 2
    assert sum(windows) == 24 - kept
    assert not list_store(store, "/work-")
    assert not (cache.folder / ".running").exists()
    assert {Path(path).stem for path in list_store(store, SUFFIX)} == list_shards(cache.folder).keys()

    assert teacher.encode_missing(grown) == 24 * WINDOW
    assert list_shards(cache.folder) == list_shards(teacher.cache().folder)
    np.testing.assert_array_equal(cache.lookup(texts), teacher.cache().lookup(texts))

    fresh = open_cache(teacher, tmp_path / "elsewhere")
    assert encode_on_ray(texts, "plain", fresh, spec, store=bucket, workers=2) == 0
    np.testing.assert_array_equal(fresh.lookup(texts), teacher.cache().lookup(texts))


def test_a_window_that_fails_ends_the_run_and_the_others_are_kept(
    cluster: str,
    teacher: CachedTeacher,
    spec: TeacherSpec,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = texts[: 4 * WINDOW]
    cache = open_cache(teacher, tmp_path / "shared")
    message = rf"node {platform.node()} \({cluster[:8]}\): texts .*/work-\w+/4: .*run the same command again"
    with pytest.raises(EmbedistillError, match=message):
        encode_on_ray([*good, "\ud800"], "plain", cache, spec, store=None, workers=2, gpus=1)
    assert "Ray: the cluster has 1 GPUs, and 2 workers want 2; those without wait" in capsys.readouterr().err
    assert encode_on_ray(good, "plain", cache, spec, store=None, workers=1) == 0
    assert teacher.encode_missing(good) == len(good)
    assert list_shards(cache.folder) == list_shards(teacher.cache().folder)
    shards = {name + SUFFIX for name in list_shards(cache.folder)}
    assert {path.name for path in cache.folder.iterdir()} - shards <= {MANIFEST, "index", ".lock"}


DRIVER = """\
import json, sys
from pathlib import Path
from embedistill.cache.store import EmbeddingCache
from embedistill.encoding.cluster import TeacherSpec, encode_on_ray
folder, store, texts, spec = (json.loads(line) for line in sys.stdin)
cache = EmbeddingCache(Path(folder).parent, json.loads(Path(folder, "manifest.json").read_text()))
encode_on_ray(texts, "plain", cache, TeacherSpec(**spec), store=store, workers=1)
"""


def kill_half_way(cache: EmbeddingCache, spec: TeacherSpec, texts: list[str], store: str) -> None:
    """Start a driver, and kill it when two windows are done."""
    given = [str(cache.folder), store.rpartition("/")[0], texts, asdict(spec)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, text=True)
    driver.stdin.write("".join(json.dumps(line) + "\n" for line in given))
    driver.stdin.close()
    while len(list_store(store, SUFFIX)) < 2:
        assert driver.poll() is None, "the driver ended too early"
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    stored = -1
    while stored != (stored := len(list_store(store, SUFFIX))):  # until Ray has ended its workers
        time.sleep(2)


def list_store(store: str, part: str) -> list[str]:
    files, place = fsspec.url_to_fs(store)
    files.invalidate_cache()
    return [path for path in files.find(place) if part in path]


def test_without_ray_the_extra_is_named(
    teacher: CachedTeacher, spec: TeacherSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    teacher.encode_missing(["a", "b"])
    assert encode_on_ray(["b", "a"], "plain", teacher.cache(), spec, store=None, workers=2) == 0
    with pytest.raises(UsageError, match=r"engine ray: .*pip install 'embedistill\[ray\]'"):
        encode_on_ray(["a", "c"], "plain", teacher.cache(), spec, store=str(tmp_path / "store"), workers=2)


def test_another_teacher_on_a_node_is_refused(
    teacher: CachedTeacher, mpnet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, task = make_worker(teacher, mpnet_dir, tmp_path, monkeypatch)
    where, found, expected, do = json.loads(worker(task)["failure"])
    assert where == f"model {mpnet_dir}"
    assert found.startswith("weights_sha256 ")
    assert expected == teacher.encoder.located.weights_sha256
    assert do == "give all nodes the same model and the same versions"
    assert not list_shards(tmp_path / "shards")


def test_a_window_that_kills_its_workers_is_not_tried_for_ever(
    teacher: CachedTeacher, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, task = make_worker(teacher, teacher_dir, tmp_path, monkeypatch)
    failures = [worker(task)["failure"] for _ in range(6)]
    assert failures[:5] == [""] * 5
    assert "5 workers began them and died" in failures[5]
    assert len(list_shards(tmp_path / "shards")) == 1


def make_worker(
    teacher: CachedTeacher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[cluster_module.Worker, dict[str, str]]:
    """A worker outside of Ray, and a task for it."""
    monkeypatch.setattr(cluster_module, "_name_node", lambda: "node")
    manifest = teacher.encoder.describe("plain", "float16")
    worker = cluster_module.Worker(TeacherSpec(str(folder)), "plain", manifest, str(tmp_path / "shards"), cores=1)
    task = tmp_path / "work" / "0"
    task.mkdir(parents=True)
    (task / "texts.json").write_text(json.dumps(["a ship", "a cow"]))
    return worker, {"item": str(task)}


def test_shards_are_copied_once_and_verified(teacher: CachedTeacher, tmp_path: Path) -> None:
    for texts in (["a"], ["b"], ["c"]):
        teacher.encode_missing(texts)
    cache, store = teacher.cache(), tmp_path / "store"
    assert [push(str(store), cache.key, cache.folder) for _ in range(2)] == [3, 0]
    assert (store / cache.key / MANIFEST).read_bytes() == (cache.folder / MANIFEST).read_bytes()
    names = sorted(list_shards(cache.folder))
    damaged = store / cache.key / (names[1] + SUFFIX)
    damaged.write_bytes(damaged.read_bytes()[:-1])

    other = open_cache(teacher, tmp_path / "other")
    with pytest.raises(EmbedistillError, match=rf"shard .*{names[1]}\.arrow: sha256 .*delete it there"):
        pull(str(store), cache.key, other.folder)
    assert names[1] not in list_shards(other.folder)
    damaged.unlink()
    pull(str(store), cache.key, other.folder)
    assert sorted(list_shards(other.folder)) == [names[0], names[2]]
    assert pull(str(store), cache.key, other.folder) == 0
    assert [path.name for path in other.folder.glob(".*")] == []


def test_a_place_that_cannot_be_reached_is_named(bucket: str, teacher: CachedTeacher, tmp_path: Path) -> None:
    cache = teacher.cache()
    with pytest.raises(EmbedistillError, match=r"s3://no-such-bucket/x/.*check the address"):
        push("s3://no-such-bucket/x", cache.key, cache.folder)
    with pytest.raises(UsageError, match=r"nowhere://x/.*an address that fsspec knows"):
        pull("nowhere://x", cache.key, cache.folder)
