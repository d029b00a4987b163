"""Encode texts with a teacher that is only known by its answers: a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import torch

from embedistill.cache.shards import Encoded, Vectors
from embedistill.choices import Kind, Storage
from embedistill.encoding.local import Effort
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import read_json, write_json

PROBE = "probe.json"

_PROBE_TEXT = "The quick brown fox jumps over the lazy dog, and 17 of its friends in Zürich watch."
_SAME_COSINE = 0.99
_ROUNDS_A_WINDOW = 8
_BAD_ANSWERS = 3
_SHOWN = 300
_KEPT = "what was stored is kept: run the same command again to go on"


class EndpointEncoder:
    """A teacher behind any endpoint that has the embeddings API of OpenAI.

    The key is read from the environment, sent to the endpoint, and shown or written nowhere.

    Args:
        url: Address of the API, such as http://localhost:8000/v1.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; it may be unset where the server wants none.
        batch: Texts of a request.
        concurrency: Requests at a time.
        timeout: Seconds to wait for an answer.
        attempts: How often a request is sent before a server that is down, busy or silent is given up.
        prompts: What is sent before texts of a kind; nothing where a kind is not there.

    Raises:
        UsageError: `url` is no address, or one with a secret in it; the key cannot be sent.
    """

    dtype = torch.float32

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        batch: int = 64,
        concurrency: int = 4,
        timeout: float = 60.0,
        attempts: int = 8,
        prompts: Mapping[Kind, str] | None = None,
    ) -> None:
        self._prompts = prompts or {}
        self.url, self.model = normalise_url(url), model
        self.window = batch * concurrency * _ROUNDS_A_WINDOW
        self._key_variable, self._key = key_variable, _read_key(key_variable)
        self._batch, self._concurrency, self._timeout, self._attempts = batch, concurrency, timeout, attempts

    @functools.cached_property
    def _client(self) -> Any:
        """The client, which many threads may use.

        It sends again after 408, 409, 429, 5xx, a timeout and a broken connection. It waits as long as Retry-After says
        up to two minutes. It gives up at once on a longer wait: that is a used-up quota
        rather than a busy server, and a run that ends and says so is better than one that sleeps for hours.
        """
        return _import_openai().OpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=max(0, self._attempts - 1),
            timeout=self._timeout,
        )

    @functools.cached_property
    def _probe(self) -> npt.NDArray[np.float32]:
        """The vector of a fixed text, shape (dim,)."""
        return self._embed([_PROBE_TEXT])[0].reshape(-1)

    def describe(self, kind: Kind, storage: Storage) -> dict[str, Any]:
        """Return everything known that changes a vector: the key of a cache. It takes one request, once.

        Raises:
            EmbedistillError: The endpoint does not answer, or not with a vector.
        """
        return {
            "teacher": f"{self.url} {self.model}",
            "api": self.url,
            "model": self.model,
            "prompt": self._find_prompt(kind),
            "normalised": True,
            "compute_dtype": "remote",
            "storage_dtype": storage,
            "dim": len(self._probe),
        }

    def check_same(self, folder: Path) -> None:
        """Make sure that the model is the one that filled a cache: a name does not tell.

        Args:
            folder: The cache's folder, which keeps the vector of a fixed text to compare with.

        Raises:
            EmbedistillError: It is another model.
        """
        probe = Encoded.of(self._probe[None]).vectors[0]
        if not (folder / PROBE).is_file():
            write_json(folder / PROBE, {"text": _PROBE_TEXT, "vector": probe.tolist()})
        cosine = float(probe @ np.array(read_json(folder / PROBE)["vector"], np.float32))
        if not cosine >= _SAME_COSINE:
            found = f"another model than the one that filled its cache: cosine {cosine:.3f} of the vectors of one text"
            do = f"serve the new model under another name, or delete {folder} to encode everything again"
            raise EmbedistillError(self._where, found, f"at least {_SAME_COSINE}", do)

    def prepare(self, texts: Sequence[str], kind: Kind) -> list[str]:
        """Make texts fit to be sent: half of a surrogate pair is no UTF-8."""
        prompt = self._find_prompt(kind)
        return [(prompt + text).encode("utf-8", "replace").decode() for text in texts]

    def run(self, prepared: Sequence[str], advance: Callable[[int], None] = lambda _: None) -> tuple[Encoded, Effort]:
        """Encode texts and say what it took; `advance` is told how many are done, request by request.

        Raises:
            UsageError: The endpoint refuses the key, the model or the texts.
            EmbedistillError: It does not answer, or not with one vector a text.
        """
        start, done, tokens = time.perf_counter(), 0, 0
        raw = np.empty((len(prepared), len(self._probe)), np.float32)
        batches = [prepared[first : first + self._batch] for first in range(0, len(prepared), self._batch)]
        embed = functools.partial(self._embed, dim=len(self._probe))
        with ThreadPoolExecutor(self._concurrency) as pool:
            for vectors, used in pool.map(embed, batches):
                raw[done : done + len(vectors)] = vectors
                done, tokens = done + len(vectors), tokens + used
                advance(len(vectors))
        return Encoded.of(raw), Effort(done, tokens, seconds=time.perf_counter() - start)

    def _find_prompt(self, kind: Kind) -> str:
        return self._prompts.get(kind, self._prompts.get("plain", ""))

    @property
    def _where(self) -> str:
        return f"endpoint {self.url}, model {self.model}"

    def _embed(self, texts: Sequence[str], dim: int | None = None) -> tuple[Vectors, int]:
        """Return the vectors of one request and its tokens; a bad answer is asked for again."""
        for _ in range(_BAD_ANSWERS):
            body = self._request(texts)
            try:
                return read_answer(body, len(texts), dim)
            except EmbedistillError as error:
                bad = error
        found = self._redact(f"{_BAD_ANSWERS} bad answers, the last with {bad.found}: {body}")
        raise EmbedistillError(self._where, found, bad.expected, _KEPT)

    def _request(self, texts: Sequence[str]) -> str:
        openai = _import_openai()
        create = self._client.embeddings.with_raw_response.create
        try:
            answer = create(model=self.model, input=list(texts), encoding_format="float")
        except openai.APIStatusError as error:
            raise self._explain_refusal(error, texts) from None  # the client's error may hold the key
        except openai.APIConnectionError as error:
            found = f"no answer: {self._redact(f'{error} {error.__cause__}')} ({self._attempts} attempts)"
            raise EmbedistillError(self._where, found, do=f"see that the server runs; {_KEPT}") from None
        return str(answer.text)

    def _explain_refusal(self, error: Any, texts: Sequence[str]) -> EmbedistillError:
        status, wait = error.status_code, error.response.headers.get("retry-after")
        found = self._redact(f"HTTP {status}{f', Retry-After {wait}' if wait else ''}: {error.response.text}")
        if status in {401, 403}:
            return UsageError(self._where, found, do=f"set the key in the environment variable {self._key_variable}")
        if status in {408, 409, 429} or status >= 500:
            return EmbedistillError(self._where, f"{found} (up to {self._attempts} attempts)", do=_KEPT)
        if status in {400, 413, 422}:
            longest = max(texts, key=len)
            found += f"; the longest of {len(texts)} texts has {len(longest):,} characters: {longest!r:.60}"
        do = "check the address, which often ends in /v1, the model's name, and the length of the texts"
        return UsageError(self._where, found, do=do)

    def _redact(self, text: str) -> str:
        """Return the beginning of what a server said, without the key."""
        return " ".join((text.replace(self._key, "[key]") if self._key else text).split())[:_SHOWN]


def normalise_url(url: str) -> str:
    """Return the address of an API in one form: without /embeddings and slashes at its end.

    Raises:
        UsageError: It is no http(s) address, or has a password or a query: it is written to files, a secret is not.
    """
    where, expected = "teacher's endpoint", "an address such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname if parts.scheme in {"http", "https"} and parts.port != 0 else None
    except ValueError:
        host = None
    if host is None or not re.fullmatch(r"[\w.-]+|[\da-f:]+", host):
        raise UsageError(where, "no address of a server", expected)
    if parts.password or parts.username or parts.query or parts.fragment:
        raise UsageError(where, "an address with a password or a query", expected)
    return url.strip().rstrip("/").removesuffix("/embeddings").rstrip("/")


def read_answer(body: str, count: int, dim: int | None = None) -> tuple[Vectors, int]:
    """Read the answer to a request.

    Args:
        body: JSON in the form of OpenAI.
        count: Texts that were asked for.
        dim: Dimension of the vectors; None: any.

    Returns:
        One vector a text, shape (count, dim), in the order of the texts, and the tokens used; 0: not known.

    Raises:
        EmbedistillError: It is anything else.
    """
    try:
        answer = json.loads(body)
        rows = {row["index"]: row["embedding"] for row in answer["data"]}
        sizes = sorted({len(vector) for vector in rows.values()})
        usage = answer.get("usage") or {}
        tokens = usage.get("total_tokens")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _bad("no vectors", "JSON with data, a list of index and embedding of each text") from None
    if len(answer["data"]) != count or rows.keys() != set(range(count)):
        raise _bad(f"{len(answer['data'])} vectors numbered {list(rows)!r:.60}", f"{count}, numbered from 0")
    if sizes != [dim or max(1, *sizes)]:
        raise _bad(f"vectors of {sizes} numbers", f"{dim or 'one number'} in each")
    return _check_numbers([rows[number] for number in range(count)]), tokens if isinstance(tokens, int) else 0


def _check_numbers(rows: Sequence[Sequence[float]]) -> Vectors:
    try:
        found = np.array(rows)
        with np.errstate(over="ignore"):
            vectors: Vectors = found.astype(np.float32)
    except (ValueError, TypeError):
        raise _bad("values that are no numbers", "finite numbers") from None
    if found.ndim != 2 or found.dtype.kind not in "fi" or not np.isfinite(vectors).all():
        raise _bad("values that are no finite numbers", "finite numbers")
    return vectors


def _bad(found: str, expected: str) -> EmbedistillError:
    return EmbedistillError("answer", found, expected)


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # the client's own error would show it
        raise UsageError(f"environment variable {variable}", "has a character that no key has", "ASCII without spaces")
    return key


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        do = "pip install 'embedistill[api]'"
        raise UsageError("teacher's endpoint", "the package openai is not installed", "the extra api", do) from error
    return openai
