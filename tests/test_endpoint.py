import hashlib
import json
import logging
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedistill.encoding import endpoint
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.endpoint import PROBE, EndpointEncoder, normalise_url
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import read_json, write_json

DIM = 8
KEY = "sk-Secret/7f3a+b2"
Reply = tuple[int, dict[str, str], str]
SOON = {"Retry-After-Ms": "10"}


def vector_of(text: str, model: str = "served") -> list[float]:
    seed = int.from_bytes(hashlib.sha256(f"{model} {text}".encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=DIM).tolist()


def unit_of(texts: list[str]) -> np.ndarray:
    vectors = np.array([vector_of(text) for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def good(texts: list[str], model: str = "served") -> dict[str, Any]:
    rows = [{"object": "embedding", "index": i, "embedding": vector_of(text, model)} for i, text in enumerate(texts)]
    random.Random(len(texts)).shuffle(rows)
    tokens = sum(len(text.split()) for text in texts)
    return {"object": "list", "model": "m", "data": rows, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


class StandIn(ThreadingHTTPServer):
    """As much of an endpoint as the client asks for.

    `hook` may return another answer to the n-th request, those of the probe neither counted nor given to it unless
    `refuses_all`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.served = "served"
        self.refuses_all = False
        self.hook: Callable[[int, list[str]], Reply | None] = lambda _number, _texts: None
        self.asked: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts, server, answer = body["input"], self.server, None
        with server.lock:
            number = len(server.asked)
            server.keys.add(self.headers["Authorization"])
            server.bodies.append(body)
            probed = texts == [endpoint._PROBE_TEXT]
            if not probed:
                server.asked.append(texts)
                server.times.append(time.monotonic())
        if not probed or server.refuses_all:
            answer = server.hook(number, texts)
        if self.path != "/v1/embeddings":
            answer = 404, {}, "no such page"
        self.reply(*(answer or (200, {}, json.dumps(good(texts, server.served)))))

    def reply(self, code: int, headers: dict[str, str], text: str) -> None:
        content = text.encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = StandIn()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def make(server: StandIn, **options: Any) -> EndpointEncoder:
    return EndpointEncoder(server.url, "m", **{"batch": 3, "attempts": 3, **options})


def embed(encoder: EndpointEncoder, texts: list[str]) -> np.ndarray:
    return encoder.run(encoder.prepare(texts, "plain"), lambda _: None)[0].vectors


def first(replies: list[Reply]) -> Callable[[int, list[str]], Reply | None]:
    """Give these answers to the first requests."""
    return lambda number, _texts: replies[number] if number < len(replies) else None


def read_all(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_vectors_are_right_and_in_order_and_every_text_is_asked_once(
    server: StandIn, sentences: list[str], tmp_path: Path
) -> None:
    teacher = CachedTeacher(make(server), tmp_path, "float32")
    texts = sentences[:40] + sentences[:5]
    np.testing.assert_allclose(teacher.vectors(texts), unit_of(texts), atol=1e-6)
    again = CachedTeacher(make(server), tmp_path, "float32")
    np.testing.assert_allclose(again.vectors(texts[::-1], "query"), unit_of(texts[::-1]), atol=1e-6)
    assert Counter(text for asked in server.asked for text in asked) == Counter(sentences[:40])
    assert sorted(len(asked) for asked in server.asked) == [1, *[3] * 13]
    assert {body["model"] for body in server.bodies} == {"m"}
    assert server.keys == {f"Bearer {KEY}"}


def test_the_cache_is_of_the_address_and_the_name(server: StandIn, tmp_path: Path) -> None:
    cache = CachedTeacher(make(server), tmp_path, "float32").cache("document")
    assert read_json(cache.folder / "manifest.json") == {
        "teacher": f"{server.url} m",
        "api": server.url,
        "model": "m",
        "prompt": "",
        "normalised": True,
        "compute_dtype": "remote",
        "storage_dtype": "float32",
        "dim": DIM,
    }
    encoder = make(server)
    assert encoder.describe("plain", "float16") == {**encoder.describe("query", "int8"), "storage_dtype": "float16"}
    assert [body["input"] for body in server.bodies] == [[endpoint._PROBE_TEXT]] * 2


def test_prompts_of_a_recipe_are_sent_before_texts(server: StandIn, tmp_path: Path) -> None:
    encoder = EndpointEncoder(server.url, "m", prompts={"query": "q: ", "plain": "t: "})
    cached = CachedTeacher(encoder, tmp_path, "float32")
    cached.vectors(["ship"], "query")
    cached.vectors(["ship"], "document")
    assert [body["input"] for body in server.bodies][1:] == [["q: ship"], ["t: ship"]]
    manifests = [read_json(cached.cache(kind).folder / "manifest.json") for kind in ("query", "document")]
    assert [manifest["prompt"] for manifest in manifests] == ["q: ", "t: "]


def test_effort_and_progress(server: StandIn, sentences: list[str]) -> None:
    told: list[int] = []
    encoded, effort = make(server).run(sentences[:7], told.append)
    assert told == [3, 3, 1]
    assert (effort.texts, effort.tokens) == (7, sum(len(text.split()) for text in sentences[:7]))
    assert effort.seconds > 0
    assert (effort.flops, effort.padding) == (0, 0)
    np.testing.assert_allclose(encoded.norms, [np.linalg.norm(vector_of(text)) for text in sentences[:7]], rtol=1e-6)
    server.hook = lambda _number, texts: (200, {}, json.dumps({"data": good(texts)["data"]}))
    assert make(server).run(sentences[:7])[1].tokens == 0


def test_as_many_requests_at_a_time_as_wanted(server: StandIn, sentences: list[str]) -> None:
    together = threading.Barrier(3)
    inside, most = 0, 0

    def hook(_number: int, _texts: list[str]) -> Reply | None:
        nonlocal inside, most
        with server.lock:
            inside += 1
            most = max(most, inside)
        try:
            together.wait(5)
            time.sleep(0.05)
        except threading.BrokenBarrierError:
            return 400, {}, "alone"
        finally:
            with server.lock:
                inside -= 1
        return None

    server.hook = hook
    vectors = embed(make(server, concurrency=3, batch=1), sentences[:9])
    np.testing.assert_allclose(vectors, unit_of(sentences[:9]), atol=1e-6)
    assert most == 3


def test_half_a_surrogate_pair_is_sent_as_a_question_mark(server: StandIn) -> None:
    np.testing.assert_allclose(embed(make(server), ["a \ud800 b", "c"]), unit_of(["a ? b", "c"]), atol=1e-6)


@pytest.mark.parametrize("tail", ["", "/", "/embeddings", "/embeddings/", " "])
def test_one_address_has_one_form(server: StandIn, tail: str) -> None:
    encoder = EndpointEncoder(server.url + tail, "m")
    assert encoder.url == server.url
    assert encoder.describe("plain", "float16")["dim"] == DIM


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("localhost:8000/v1", "no address"),
        ("ftp://host/v1", "no address"),
        ("http:///v1", "no address"),
        ("http://my host/v1", "no address"),
        ("http://host:port/v1", "no address"),
        ("http://host:99999/v1", "no address"),
        ("http://[::1/v1", "no address"),
        ("http://user:hunter2@host/v1", "with a password"),
        ("http://host/v1?key=hunter2", "or a query"),
    ],
)
def test_what_is_no_address_or_holds_a_secret_is_refused(url: str, found: str) -> None:
    with pytest.raises(UsageError, match=rf"{found}.*expected .*http://localhost:8000/v1") as caught:
        normalise_url(url)
    assert "hunter2" not in str(caught.value)


def test_ports_and_numbers_are_addresses() -> None:
    for url in ("https://api.example.org/v1", "http://[::1]:8000/v1", "http://127.0.0.1:1/x/v1"):
        assert normalise_url(url) == url


def test_a_server_that_stumbles_is_asked_again(server: StandIn, sentences: list[str]) -> None:
    server.hook = first([(500, SOON, "oops"), (503, SOON, "<html>busy</html>")])
    np.testing.assert_allclose(embed(make(server), sentences[:3]), unit_of(sentences[:3]), atol=1e-6)
    assert server.asked == [sentences[:3]] * 3


def test_attempts_end(server: StandIn, sentences: list[str]) -> None:
    server.hook = lambda _number, _texts: (500, SOON, "oops")
    with pytest.raises(
        EmbedistillError, match=r"HTTP 500: oops \(up to 3 attempts\); what was stored is kept"
    ) as caught:
        embed(make(server), sentences[:3])
    assert caught.value.where == f"endpoint {server.url}, model m"
    assert caught.value.exit_code == 1
    assert len(server.asked) == 3


def test_a_server_says_how_long_to_wait(server: StandIn, sentences: list[str]) -> None:
    server.hook = first([(429, {"Retry-After": "1"}, "slow down")])
    np.testing.assert_allclose(embed(make(server), sentences[:3]), unit_of(sentences[:3]), atol=1e-6)
    assert server.times[1] - server.times[0] >= 1


def test_a_wait_of_an_hour_ends_the_run(server: StandIn, sentences: list[str]) -> None:
    server.hook = lambda _number, _texts: (429, {"Retry-After": "3600"}, "quota")
    with pytest.raises(EmbedistillError, match="HTTP 429, Retry-After 3600: quota"):
        embed(make(server, attempts=2), sentences[:3])
    assert len(server.asked) == 1


def test_an_answer_that_does_not_come_is_asked_for_again(server: StandIn, sentences: list[str]) -> None:
    over = threading.Event()

    def hook(number: int, _texts: list[str]) -> Reply | None:
        if number == 0:
            over.wait(20)
        return None

    server.hook = hook
    vectors = embed(make(server, timeout=3), sentences[:3])
    over.set()
    np.testing.assert_allclose(vectors, unit_of(sentences[:3]), atol=1e-6)
    assert len(server.asked) == 2


def test_a_server_that_is_not_there(server: StandIn) -> None:
    gone = EndpointEncoder("http://127.0.0.1:9/v1", "m", attempts=2)
    with pytest.raises(
        EmbedistillError, match=r"127.0.0.1:9.*no answer: .*refused.*\(2 attempts\).*see that the server"
    ):
        gone.describe("plain", "float16")


def changed(**values: Any) -> Callable[[list[str]], str]:
    """Answer with one row changed."""

    def answer(texts: list[str]) -> str:
        content = good(texts)
        content["data"][-1].update(values)
        return json.dumps(content)

    return answer


BAD = {
    "html": (lambda _: "<html>Gateway</html>", r"no vectors: <html>Gateway</html>; expected JSON"),
    "no json": (lambda _: '{"data": [', r"no vectors: .*; expected JSON"),
    "error": (lambda _: '{"error": {"message": "overloaded"}}', r"no vectors: .*overloaded.*; expected JSON"),
    "list": (lambda _: "[]", r"no vectors: \[\]; expected JSON"),
    "too few": (lambda texts: json.dumps(good(texts[:-1])), r"2 vectors .*; expected 3, numbered from 0"),
    "too many": (lambda texts: json.dumps(good([*texts, "x"])), r"4 vectors .*; expected 3, numbered from 0"),
    "none": (lambda _: '{"data": []}', r"0 vectors .*; expected 3, numbered from 0"),
    "twice": (changed(index=7), r"3 vectors numbered .*7.*; expected 3, numbered from 0"),
    "one doubled": (
        lambda texts: json.dumps({"data": [*good(texts)["data"], {"index": 0, "embedding": [1.0] * DIM}]}),
        r"4 vectors .*; expected 3, numbered from 0",
    ),
    "no index": (changed(index=None), r"3 vectors numbered .*None.*; expected 3, numbered from 0"),
    "dim of all": (
        lambda texts: json.dumps({"data": [{"index": i, "embedding": [1.0] * 4} for i in range(len(texts))]}),
        r"vectors of \[4\] numbers.*; expected 8 in each",
    ),
    "dim of one": (changed(embedding=[1.0] * 4), r"vectors of \[4, 8\] numbers.*; expected 8 in each"),
    "null": (changed(embedding=[None] + [1.0] * 7), "no finite numbers.*; expected finite numbers"),
    "NaN": (changed(embedding=[float("nan")] + [1.0] * 7), "no finite numbers.*; expected finite numbers"),
    "too large": (changed(embedding=[1e39] + [1.0] * 7), "no finite numbers.*; expected finite numbers"),
    "string": (changed(embedding=["0.5"] + [1.0] * 7), "no finite numbers.*; expected finite numbers"),
    "base64": (changed(embedding="AAAAAAAA"), "no.* numbers.*; expected finite numbers"),
    "nested": (changed(embedding=[[1.0]] + [1.0] * 7), "no numbers.*; expected finite numbers"),
    "no vector": (changed(embedding=None), r"no vectors: .*; expected JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_ends_in_an_error_and_nothing_is_stored(
    server: StandIn, sentences: list[str], tmp_path: Path, name: str
) -> None:
    answer, expected = BAD[name]
    server.hook = lambda _number, texts: (200, {}, answer(texts))
    teacher = CachedTeacher(make(server), tmp_path)
    with pytest.raises(EmbedistillError, match=f"{server.url}, model m: 3 bad answers, .*{expected}.*is kept: run"):
        teacher.encode_missing(sentences[:3])
    assert server.asked == [sentences[:3]] * 3
    assert len(teacher.cache()) == 0


def test_one_bad_answer_is_asked_for_again(server: StandIn, sentences: list[str]) -> None:
    server.hook = first([(200, {"Content-Type": "text/html"}, "<html>"), (200, {}, json.dumps(good(["one"])))])
    np.testing.assert_allclose(embed(make(server), sentences[:3]), unit_of(sentences[:3]), atol=1e-6)


def test_a_model_without_numbers_has_no_cache(server: StandIn, tmp_path: Path) -> None:
    server.refuses_all = True
    server.hook = lambda _number, _texts: (200, {}, '{"data": [{"index": 0, "embedding": []}]}')
    with pytest.raises(EmbedistillError, match=r"vectors of \[0\] numbers.*; expected one number in each"):
        CachedTeacher(make(server), tmp_path).cache()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_shown(
    server: StandIn,
    tmp_path: Path,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTHER_KEY", KEY + "\n")
    monkeypatch.delenv("OPENAI_API_KEY")
    server.refuses_all = True
    server.hook = lambda _number, _texts: (status, {}, json.dumps({"error": {"message": f"Wrong key: {KEY}!"}}))
    encoder = make(server, key_variable="OTHER_KEY")
    with pytest.raises(UsageError, match=r"Wrong key: \[key\]!.*environment variable OTHER_KEY$") as caught:
        CachedTeacher(encoder, tmp_path).vectors(["a"])
    assert server.keys == {f"Bearer {KEY}"}
    assert len(server.bodies) == 1
    seen = ["".join(traceback.format_exception(caught.value)), repr(encoder), caplog.text, *capsys.readouterr()]
    assert any(record.name.startswith("openai") for record in caplog.records)  # it was asked to say all
    assert KEY not in "".join(seen)


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, f"echo {KEY}"),
        (500, SOON, f"echo {KEY}"),
        (429, {"Retry-After": "999"}, KEY),
        (404, {}, KEY * 99),
    ],
)
def test_the_key_is_in_no_error_and_no_file(
    server: StandIn, sentences: list[str], tmp_path: Path, reply: Reply, capsys: pytest.CaptureFixture
) -> None:
    encoder = make(server, attempts=2)
    encoder.window = 6
    server.hook = lambda number, _texts: reply if number >= 2 else None
    teacher = CachedTeacher(encoder, tmp_path / "cache")
    with pytest.raises(EmbedistillError, match=r"\[key\]") as caught:
        teacher.vectors(sentences[:9])
    encoder.check_same(teacher.cache().folder)
    assert len(teacher.cache()) == 6
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
    assert KEY not in shown
    assert "Secret" not in shown
    assert len(caught.value.found) < 500
    assert KEY.encode() not in read_all(tmp_path / "cache")


def test_a_key_is_not_needed(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    embed(make(server), ["none of these"])
    assert server.keys == {"Bearer none"}
    server.hook = lambda _number, _texts: (404, {}, "none of these")
    with pytest.raises(UsageError, match="none of these"):
        embed(make(server), ["a"])


def test_a_key_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hunter2\nsk-hunter3")
    with pytest.raises(UsageError, match="environment variable OPENAI_API_KEY: has a character") as caught:
        EndpointEncoder("http://host/v1", "m")
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refused_request_is_not_sent_again(server: StandIn, sentences: list[str], status: int) -> None:
    server.hook = lambda _number, _texts: (status, {}, '{"detail": "no such model m"}')
    with pytest.raises(UsageError, match=rf"{server.url}, model m: HTTP {status}: .*no such model m.*in /v1"):
        embed(make(server), sentences[:3])
    assert len(server.asked) == 1


def test_a_text_that_is_too_long_is_shown(server: StandIn) -> None:
    server.hook = lambda _number, _texts: (400, {}, "maximum context length exceeded")
    with pytest.raises(UsageError, match="length exceeded; the longest of 3 texts has 9,999 characters: 'xxx"):
        embed(make(server), ["a", "x" * 9999, "b"])


def test_an_address_without_the_api(server: StandIn) -> None:
    with pytest.raises(UsageError, match="HTTP 404: no such page; check the address, which often ends in /v1"):
        EndpointEncoder(server.url.removesuffix("/v1"), "m").describe("plain", "float16")


def test_a_run_goes_on_where_the_server_died(server: StandIn, sentences: list[str], tmp_path: Path) -> None:
    def start() -> CachedTeacher:
        encoder = make(server, batch=2, concurrency=1, attempts=1)
        encoder.window = 4
        return CachedTeacher(encoder, tmp_path, "float32")

    texts = sentences[:18]
    server.hook = lambda number, _texts: (500, {}, "died") if number >= 5 else None
    died = start()
    with pytest.raises(EmbedistillError, match="died"):
        died.encode_missing(texts)
    assert died.cache().missing(texts) == texts[8:]
    server.hook = lambda _number, _texts: None
    server.asked.clear()
    later = start()
    assert later.encode_missing(texts) == 10
    assert [text for asked in server.asked for text in asked] == texts[8:]
    np.testing.assert_allclose(later.vectors(texts), unit_of(texts), atol=1e-6)


def test_another_model_behind_the_same_name(server: StandIn, tmp_path: Path) -> None:
    make(server).check_same(tmp_path)
    make(server).check_same(tmp_path)
    kept = (tmp_path / PROBE).read_bytes()
    server.served = "another"
    with pytest.raises(EmbedistillError, match=rf"model m: another model than .*cosine.*delete {tmp_path}") as caught:
        make(server).check_same(tmp_path)
    assert caught.value.expected == "at least 0.99"
    assert (tmp_path / PROBE).read_bytes() == kept


def test_the_noise_of_a_server_is_not_another_model(server: StandIn, tmp_path: Path) -> None:
    make(server).check_same(tmp_path)
    probe = read_json(tmp_path / PROBE)
    noise = np.random.default_rng(1).normal(size=DIM)
    for size, same in ((0.03, True), (0.3, False)):
        vector = np.array(probe["vector"]) + size * noise / np.linalg.norm(noise)
        write_json(tmp_path / PROBE, {**probe, "vector": (vector / np.linalg.norm(vector)).tolist()})
        if same:
            make(server).check_same(tmp_path)
        else:
            with pytest.raises(EmbedistillError, match="another model"):
                make(server).check_same(tmp_path)


def test_a_missing_package_is_named(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"openai is not installed.*pip install 'embedistill\[api\]'"):
        make(server).describe("plain", "float16")
