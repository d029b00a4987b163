"""From texts to cached vectors: right ones, each once, whatever the teacher, the format and the moment of a kill."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_in_forks
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from embedistill.cache.shards import Encoded
from embedistill.cache.store import EmbeddingCache
from embedistill.encoding import hardware, local
from embedistill.encoding.cached import CachedTeacher, describe_effort, iter_missing
from embedistill.encoding.hardware import choose_dtype, measure_products
from embedistill.encoding.local import Effort, LocalEncoder, cut_batches
from embedistill.encoding.packed import PackedBody, can_pack, count_flops
from embedistill.encoding.targets import find_faults
from embedistill.errors import EmbedistillError
from embedistill.evaluation.trial import make_candidate
from embedistill.teacher import LocatedModel, load, locate

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 40}
FAMILIES = {
    "bert": lambda: BertModel(BertConfig(**SIZES, pad_token_id=0)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES, pad_token_id=1)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=60, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_position_embeddings=40, pad_token_id=0
        )
    ),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**SIZES, pad_token_id=1)),
}


def find(folder: Path) -> LocatedModel:
    return locate(str(folder), models_dir=folder.parent)


def make_cached(folder: Path, root: Path, dtype: torch.dtype = torch.float32) -> CachedTeacher:
    return CachedTeacher(LocalEncoder(find(folder), dtype), root)


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    """Texts of very different length, some longer than the model sees."""
    return [*sentences[:90], "ship", "the cow . " * 40, " ".join(sentences[:9]), "é ü — ?"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_padding_the_layers_give_what_the_model_gives(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    assert can_pack(model)
    ids = [torch.randint(3, 60, (length,)) for length in (9, 9, 5, 3, 3, 3, 1)]
    found = PackedBody(model, torch.float32).forward(ids)
    assert [tuple(hidden.shape) for hidden in found] == [(2, 9, 16), (1, 5, 16), (3, 3, 16), (1, 1, 16)]
    rows = [row for hidden in found for row in hidden]
    with torch.inference_mode():
        for row, text in zip(rows, ids, strict=True):
            expected = model(input_ids=text[None], attention_mask=torch.ones(1, len(text), dtype=torch.long))
            torch.testing.assert_close(row, expected.last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_known() -> None:
    assert not can_pack(ModernBertModel(ModernBertConfig(**SIZES, pad_token_id=0)))
    assert not can_pack(BertModel(BertConfig(**SIZES, hidden_act="relu")))
    assert not can_pack(BertModel(BertConfig(**SIZES, is_decoder=True)))
    assert not can_pack(object())


def test_flops_of_a_layer_worked_out_by_hand() -> None:
    model = BertModel(BertConfig(**SIZES))
    weights = 3 * (4 * 16 * 16 + 2 * 16 * 24)
    pairs = 3 * (4 * 5 * 5 * 16 + 4 * 7 * 7 * 16)
    assert count_flops(model, [5, 7]) == 2 * weights * 12 + pairs


@pytest.mark.parametrize("architecture", ["packed", "padded", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_those_of_the_library(
    architecture: str,
    dtype: torch.dtype,
    mpnet_dir: Path,
    tmp_path: Path,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = mpnet_dir
    if architecture == "padded":
        monkeypatch.setattr(local, "can_pack", lambda model: False)
    if architecture == "plain":
        tokenizer = load(find(mpnet_dir)).tokenizer
        torch.manual_seed(0)
        folder = tmp_path / "static"
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu").save(str(folder))
    encoder = LocalEncoder(find(folder), dtype)
    ticks: list[int] = []
    encoded, effort = encoder.run(encoder.prepare(texts, "plain"), ticks.append)
    expected = load(find(folder)).encode(texts, normalize_embeddings=True)
    cosines = (encoded.vectors * expected).sum(axis=1)
    assert cosines.min() > (0.99 if dtype == torch.bfloat16 else 0.999999)
    assert sum(ticks) == effort.texts == len(texts)
    assert encoded.vectors.dtype == np.float32
    if architecture == "plain":
        assert not encoded.cut.any()
        return
    lengths = [len(load(find(folder)).tokenizer(text)["input_ids"]) for text in texts]
    assert encoded.tokens.tolist() == [min(48, length) for length in lengths]
    assert encoded.cut.tolist() == [length > 48 for length in lengths]
    assert 0 < encoded.cut.sum() < len(texts)
    assert effort.tokens == encoded.tokens.sum()
    assert (effort.padding > 0) == (architecture == "padded")


@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [("tokenizer_config.json", "padding_side", "left"), ("config_sentence_transformers.json", "truncate_dim", 8)],
)
def test_what_the_fast_ways_do_not_cover_is_left_to_the_library(
    file: str, setting: str, value: Any, mpnet_dir: Path, tmp_path: Path, texts: list[str]
) -> None:
    shutil.copytree(mpnet_dir, tmp_path / "changed")
    settings = json.loads((tmp_path / "changed" / file).read_text())
    (tmp_path / "changed" / file).write_text(json.dumps({**settings, setting: value}))
    encoder = LocalEncoder(find(tmp_path / "changed"), torch.float32)
    assert value in {encoder.model.tokenizer.padding_side, encoder.model.truncate_dim}
    for text in texts[:5]:  # one at a time: where padding is on the left, vectors depend on it
        encoded, effort = encoder.run(encoder.prepare([text], "plain"))
        expected = load(find(tmp_path / "changed")).encode([text], normalize_embeddings=True)
        np.testing.assert_allclose(encoded.vectors, expected, atol=1e-5)
        assert (effort.texts, effort.tokens, effort.flops) == (1, 0, 0)


def test_products_alone_may_be_rough_and_only_without_padding(
    mpnet_dir: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(products: torch.dtype) -> Any:
        return make_candidate("student", find(mpnet_dir), products=products).encode(texts, "plain")

    exact, rough = encode(torch.float32), encode(torch.bfloat16)
    encoder = LocalEncoder(find(mpnet_dir), torch.bfloat16)
    np.testing.assert_array_equal(rough, encoder.run(encoder.prepare(texts, "plain"))[0].vectors)
    assert 0 < np.abs(rough - exact).max() < 0.02
    monkeypatch.setattr(local, "can_pack", lambda model: False)
    np.testing.assert_allclose(encode(torch.bfloat16), exact, atol=1e-6)


def test_threads_are_as_they_were(mpnet_dir: Path, texts: list[str]) -> None:
    before = torch.get_num_threads()
    encoder = LocalEncoder(find(mpnet_dir), torch.float32)
    encoder.run(encoder.prepare(texts, "plain"))
    assert torch.get_num_threads() == before


def test_a_device_that_is_out_of_memory_gets_smaller_batches(
    mpnet_dir: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "can_pack", lambda model: False)
    encoder = LocalEncoder(find(mpnet_dir), torch.float32)
    run, sizes = encoder._run_one_padded, []

    def limited(ids: list[torch.Tensor], extra: dict[str, Any]) -> Any:
        sizes.append(len(ids) * max(len(row) for row in ids))
        if sizes[-1] > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(ids, extra)

    monkeypatch.setattr(encoder, "_run_one_padded", limited)
    encoded, _ = encoder.run(encoder.prepare(texts, "plain"))
    expected = load(find(mpnet_dir)).encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(encoded.vectors, expected, atol=1e-5)
    assert sizes[0] > 700
    assert "Out of memory on cpu: batches of 512 tokens from here on" in capsys.readouterr().err
    sizes.clear()
    encoder.run(encoder.prepare(texts, "plain"))
    assert max(sizes) <= 512  # what was learnt stays


def test_batches_are_of_like_length_and_within_the_budget() -> None:
    lengths = [3, 9, 4, 9, 1, 20]
    assert list(cut_batches(lengths, 18, padded=False)) == [[5], [1, 3], [2, 0, 4]]
    assert list(cut_batches(lengths, 8, padded=True)) == [[5], [1], [3], [2, 0], [4]]
    assert list(cut_batches([], 8, padded=True)) == []


def test_padding_is_small_where_lengths_are_sorted() -> None:
    lengths = np.random.default_rng(0).geometric(0.05, size=8192).clip(3, 384).tolist()
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in cut_batches(lengths, 4096, padded=True))
    assert 1 - sum(lengths) / padded < 0.05


def test_every_text_is_encoded_once(
    mpnet_dir: Path, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_cached(mpnet_dir, tmp_path).encode_missing(sentences[:60] + sentences[:10]) == 60
    grown = make_cached(mpnet_dir, tmp_path)
    assert grown.encode_missing(iter(sentences[:70])) == 10
    monkeypatch.setattr(LocalEncoder, "run", lambda *_: pytest.fail("encoded again"))
    vectors = make_cached(mpnet_dir, tmp_path).vectors(sentences[:70][::-1])
    np.testing.assert_allclose(vectors, load(find(mpnet_dir)).encode(sentences[:70])[::-1], atol=1e-3)


def test_what_another_process_encoded_meanwhile_is_not_encoded_again(
    mpnet_dir: Path, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, other = make_cached(mpnet_dir, tmp_path), make_cached(mpnet_dir, tmp_path)
    cached.encoder.window = 10
    some = [sentences[0], *sentences[:35]]
    writing = EmbeddingCache.writing

    def late(self: EmbeddingCache) -> Any:
        if self is cached.cache():
            assert other.encode_missing(some[:30]) == 29
        return writing(self)

    monkeypatch.setattr(EmbeddingCache, "writing", late)
    assert cached.encode_missing(some) == 6


def test_windows_hold_what_is_missing_in_order_each_text_once(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, {"dim": 2, "storage_dtype": "float16"})
    cache.add(["b"], Encoded.of(np.ones((1, 2), np.float32)))
    stream = iter(["a", "b", "a", "c", "d", "a", "e", "c", "f", "b"])
    assert list(iter_missing(cache, stream, 2)) == [["a", "c"], ["d", "e"], ["f"]]


def test_everything_that_changes_a_vector_is_in_the_key(teacher_dir: Path, mpnet_dir: Path) -> None:
    def key(encoder: LocalEncoder, storage: Any = "float16", kind: Any = "plain") -> str:
        return json.dumps(encoder.describe(kind, storage), sort_keys=True)

    encoder = LocalEncoder(find(teacher_dir), torch.float32)
    seen = {"as it is": key(encoder), "storage": key(encoder, "int8")}
    assert key(LocalEncoder(find(teacher_dir), torch.float32)) == seen["as it is"]
    assert key(encoder, kind="query") == seen["as it is"]
    seen["compute dtype"] = key(LocalEncoder(find(teacher_dir), torch.bfloat16))
    seen["another teacher"] = key(LocalEncoder(find(mpnet_dir), torch.float32))
    encoder.model.max_seq_length = 7
    seen["max_seq_length"] = key(encoder)
    encoder.model.prompts = {"query": "query: ", "passage": "passage: "}
    seen["query prompt"], seen["document prompt"] = key(encoder, kind="query"), key(encoder, kind="document")
    encoder.model.default_prompt_name = "query"
    assert key(encoder) == seen["query prompt"]
    for name, module in {"pooling": Pooling(32, "cls"), "normalisation": Normalize()}.items():
        other = LocalEncoder(find(teacher_dir), torch.float32)
        other.model = SentenceTransformer(modules=[other.model[0], module], device="cpu")
        seen[name] = key(other)
    assert len(set(seen.values())) == len(seen), seen


def test_weights_and_settings_are_in_the_key(teacher_dir: Path, tmp_path: Path) -> None:
    model = load(find(teacher_dir))
    keys = []
    for number in range(3):
        if number == 1:
            with torch.no_grad():
                next(model.parameters())[5, 5] += 1e-3
        folder = tmp_path / str(number) / "model"
        model.save(str(folder), create_model_card=False)
        if number == 2:
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            tokenizer["normalizer"]["lowercase"] = False
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        described = LocalEncoder(find(folder), torch.float32).describe("plain", "float16")
        keys.append((described["weights_sha256"], described["settings_sha256"]))
    assert keys[0][0] != keys[1][0] == keys[2][0]
    assert keys[0][1] == keys[1][1] != keys[2][1]


def test_queries_and_documents_have_prompts_of_their_own(mpnet_dir: Path, tmp_path: Path, sentences: list[str]) -> None:
    model = load(find(mpnet_dir))
    model.prompts = {"query": "find the ship : ", "document": "old barn : "}
    model.save(str(tmp_path / "prompted"))
    cached = make_cached(tmp_path / "prompted", tmp_path / "cache")
    some = sentences[:20]
    for kind, expected in (
        ("plain", model.encode(some)),
        ("query", model.encode_query(some)),
        ("document", model.encode_document(some)),
    ):
        np.testing.assert_allclose(cached.vectors(some, kind), expected, atol=1e-3)
    assert len({cached.cache(kind).key for kind in ("plain", "query", "document")}) == 3
    read = cached.open_targets({"document": some[:5], "query": some[:3]})
    expected = np.concatenate([model.encode_document(some[:5]), model.encode_query(some[:3])])
    np.testing.assert_allclose(read(np.array([6, 0, 4, 7])), expected[[6, 0, 4, 7]], atol=1e-3)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.local import LocalEncoder
from embedistill.teacher import locate
import embedistill.files as files

folder, root, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
calls = 0
def counting(function):
    def wrapped(*arguments, **keywords):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return wrapped
files._sync = counting(files._sync)
Path.replace = counting(Path.replace)
encoder = LocalEncoder(locate(str(folder), models_dir=folder.parent), torch.float32)
encoder.window = 25
texts = Path(sys.argv[4]).read_text().splitlines()
CachedTeacher(encoder, root).encode_missing(texts)
"""


def test_a_kill_at_any_moment_changes_no_bit(mpnet_dir: Path, tmp_path: Path, sentences: list[str]) -> None:
    (tmp_path / "texts").write_text("\n".join(sentences[:120]))

    moments = [2, 4, 5, 3, 1]  # before a rename, with the manifest or shards before it; behind one

    def run(root: str, kills: list[int], hash_seed: int) -> list[int]:
        runs = [[str(mpnet_dir), str(tmp_path / root), str(at), str(tmp_path / "texts")] for at in kills]
        return run_in_forks("embedistill.encoding.cached", KILLED, runs, hash_seed)

    assert run("killed", [*moments, 0], hash_seed=0) == [*[-signal.SIGKILL] * len(moments), 0]
    assert run("whole", [0], hash_seed=1) == [0]

    def read(root: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((tmp_path / root).glob("*/*.arrow"))}

    assert len(read("whole")) == 5
    assert read("killed") == read("whole")


def test_a_stream_is_read_no_further_than_two_windows_ahead(
    mpnet_dir: Path, tmp_path: Path, sentences: list[str]
) -> None:
    cached = make_cached(mpnet_dir, tmp_path)
    cached.encoder.window = 10
    stored_when_read = []

    def stream() -> Iterator[str]:
        for text in sentences[:100]:
            stored_when_read.append(len(cached.cache()))
            yield text

    assert cached.encode_missing(stream()) == 100
    assert max(number - stored for number, stored in enumerate(stored_when_read)) < 20


def test_a_teacher_whose_vectors_are_not_finite_is_stopped(
    mpnet_dir: Path, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalEncoder, "_pool", lambda _, hidden, *__: np.full((len(hidden), 32), np.nan, np.float32))
    cached = make_cached(mpnet_dir, tmp_path)
    with pytest.raises(EmbedistillError, match=r"5 of 5 vectors are not finite.*set teacher\.dtype=float32"):
        cached.encode_missing(sentences[:5])
    assert len(cached.cache()) == 0


def test_faults_of_vectors_are_found(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32) * 0.05 + np.eye(1, 32)
    raw[10, 1] = np.inf
    raw[20] = 0
    raw[[31, 32]] = raw[30]
    raw[40, 0] = -1
    cut = np.arange(60) == 50
    cache = EmbeddingCache(tmp_path, {"dim": 32, "storage_dtype": "float32"})
    texts = [f"text {number}" for number in range(60)]
    cache.add(texts, Encoded.of(raw, cut=cut))
    found = {fault: numbers.tolist() for fault, numbers in find_faults(cache, texts).items()}
    assert found == {"not-finite": [10], "zero-norm": [20], "cut": [50], "equal": [31, 32], "outlier": [40]}
    found = find_faults(cache, texts[:3])
    assert all(len(numbers) == 0 for numbers in found.values())


def test_the_number_format_is_measured_or_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("float32") == torch.float32
    assert choose_dtype("bfloat16") == torch.bfloat16
    for faster, expected in ((1.2, torch.float32), (1.3, torch.bfloat16)):
        rates = {torch.float32: 1.0, torch.bfloat16: faster}
        monkeypatch.setattr(hardware, "measure_products", lambda rates=rates, **_: rates)
        assert choose_dtype("auto") == expected


def test_the_rate_of_products_is_measured_in_both_formats() -> None:
    rates = measure_products(0.01, 64)
    assert set(rates) == {torch.float32, torch.bfloat16}
    assert min(rates.values()) > 0


def test_what_an_encoding_took_is_said() -> None:
    effort = Effort(10, 90, 10, 1.0, 2e9) + Effort(10, 100, 0, 1.0, 4e9)
    assert describe_effort(effort, 1e10) == (
        "20 texts in 2.0 s, 10.0 texts/s, 95 tokens/s, padding 5.0%, "
        "3 GFLOP/s, 30% of what this machine's products reach"
    )
    assert describe_effort(Effort(4, seconds=2.0), None) == "4 texts in 2.0 s, 2.0 texts/s"


def test_a_static_teacher_reads_to_the_end_and_has_a_key(mpnet_dir: Path, tmp_path: Path, texts: list[str]) -> None:
    tokenizer = SentenceTransformer(str(mpnet_dir), device="cpu").tokenizer
    module = StaticEmbedding(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), embedding_dim=8)
    model = SentenceTransformer(modules=[module, Normalize()], device="cpu")
    model.save(str(tmp_path / "static"))
    located = locate(str(tmp_path / "static"), models_dir=tmp_path)
    cached = CachedTeacher(LocalEncoder(located, torch.float32), tmp_path / "cache", "float32")
    assert cached.encode_missing(texts, "document") == len(set(texts))
    np.testing.assert_allclose(cached.vectors(texts, "document"), model.encode(texts), atol=1e-6)
    assert cached.encoder.describe("document", "float32")["max_seq_length"] is None


def test_a_teacher_that_cuts_queries_earlier_keeps_them_apart(mpnet_dir: Path, tmp_path: Path) -> None:
    """sentence-transformers 6 has lengths by kind: the same text has two vectors then."""
    plain = LocalEncoder(find(mpnet_dir), torch.float32)
    assert plain.describe("query", "float16") == plain.describe("document", "float16")
    model = SentenceTransformer(str(mpnet_dir), device="cpu")
    model[0].query_length = 4  # type: ignore[union-attr]
    model.save_pretrained(str(tmp_path / "short"))
    short = LocalEncoder(find(tmp_path / "short"), torch.float32)
    assert short.describe("query", "float16") != short.describe("document", "float16")
    text = ["ship wave sand stone water light"]
    queries, documents = (
        CachedTeacher(short, tmp_path / "cache").vectors(text, kind) for kind in ("query", "document")
    )
    np.testing.assert_allclose(queries, short.model.encode_query(text), atol=1e-3)
    np.testing.assert_allclose(documents, short.model.encode_document(text), atol=1e-3)
    assert float((queries * documents).sum()) < 0.999
