"""Tiny models and corpora, made in the session: no test reads a network or a large file."""

import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel, PreTrainedTokenizerFast

from embedistill import forecast
from embedistill.encoding import hardware
from embedistill.evaluation import trial
from embedistill.evaluation.costs import Start, measure_start

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
THEMES = {
    "sea": ["ship", "harbour", "sailor", "wave", "tide", "anchor", "captain", "storm", "fish", "net"],
    "farm": ["cow", "field", "tractor", "barn", "wheat", "farmer", "hen", "fence", "plough", "milk"],
    "code": ["loop", "array", "string", "function", "compiler", "bug", "test", "merge", "branch", "stack"],
    "food": ["bread", "cheese", "soup", "onion", "oven", "spoon", "recipe", "salt", "butter", "plate"],
}
GLUE = ["the", "a", "of", "in", "on", "with", "near", "under", "old", "new", "small", "big", ".", ","]


def write_sentence(rng: random.Random, n_words: int) -> str:
    words = THEMES[rng.choice(sorted(THEMES))]
    return " ".join(rng.choice(words if rng.random() < 0.6 else GLUE[:-2]) for _ in range(n_words)) + "."


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    rng = random.Random(7)
    return list(dict.fromkeys(write_sentence(rng, rng.randint(4, 16)) for _ in range(400)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    letters = [chr(code) for code in range(33, 127)]
    pieces = (
        SPECIAL
        + letters
        + [f"##{letter}" for letter in letters]
        + [*GLUE[:-2], *(word for words in THEMES.values() for word in words)]
    )
    tokenizer = Tokenizer(
        models.WordPiece(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=64,
    )


def make_teacher(folder: Path, architecture: str = "bert") -> Path:
    """Save a random 4-layer teacher of 32 dimensions whose layers matter, and return its folder."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
        "pad_token_id": 0,
    }
    model = BertModel(BertConfig(**sizes)) if architecture == "bert" else MPNetModel(MPNetConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    body = folder.parent / f"{folder.name}-body"
    model.save_pretrained(body)
    tokenizer.save_pretrained(body)
    transformer = Transformer(str(body), max_seq_length=48)
    SentenceTransformer(modules=[transformer, Pooling(32), Normalize()], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def mpnet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("models") / "mpnet", "mpnet")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """A .jsonl of titled texts."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rng = random.Random(11)
    made = [(text, " ".join(rng.sample(text.split(), 3))) for text in sentences[:160]]
    rows = [{"body": text, "title": title, "source": "made"} for text, title in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """A folder of evaluation sets in the form that --data takes."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(5)
    (folder / "sts").mkdir()
    for name in ("STSBenchmark", "STS12"):
        rows = []
        for number in range(40):
            first, other = write_sentence(rng, 7), write_sentence(rng, 7)
            shared = number % 6  # words that the two begin with
            second = " ".join([*first.split()[:shared], *other.split()[shared:]])
            rows.append({"sentence1": first, "sentence2": second, "score": shared})
        (folder / "sts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    beir = folder / "retrieval" / "Tiny"
    (beir / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(sentences[:30])]
    queries = [{"_id": f"q{i}", "text": " ".join(text.split()[:4])} for i, text in enumerate(sentences[:20])]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (beir / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judged = [f"q{i}\td{i}\t2\n" for i in range(20)] + ["q0\td5\t1\n"]
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path, teacher_dir: Path, corpus_file: Path) -> Path:
    """A recipe that runs in a few seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""\
name: tiny
seed: 1
teacher: {{model: {teacher_dir}, dtype: float32}}
corpus: {{source: {corpus_file}, text_column: body, query_column: title, holdout: 0.2}}
student: {{layers: 2, embedding_size: 16}}
training: {{epochs: 2, batch_size: 16, checkpoint_steps: 5, dtype: float32, learning_rate: 0.001}}
evaluation: {{tasks: [agreement, known-item], resamples: 200}}
search: {{question: where is the ship, results: 2}}
"""
    )
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests out of the user's folders."""
    monkeypatch.setenv("EMBEDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def reseeded(request: pytest.FixtureRequest) -> None:
    """Give each test random numbers of its own, whichever tests ran before it in the same process."""
    if random_numbers := getattr(request.module, "RNG", None):
        seed = zlib.crc32(request.node.name.encode())
        random_numbers.bit_generator.state = np.random.default_rng(seed).bit_generator.state


@pytest.fixture(scope="session", autouse=True)
def unmeasured() -> Iterator[None]:
    """Spare every run what only measures: how models start, in processes of their own, and how fast they would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "_SECONDS", 0.0)
        patch.setattr(hardware, "measure_products", lambda **_: {torch.float32: 2.0, torch.bfloat16: 1.0})
        patch.setattr(trial, "measure_start", lambda *_: Start(1.0, 100.0))
        yield


@pytest.fixture(autouse=True)
def real_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure how models start where a test is marked real_start."""
    if "real_start" in request.keywords:
        monkeypatch.setattr(trial, "measure_start", measure_start)


FORKS = """
import json, os, sys, traceback
module, code, runs = json.load(sys.stdin)
__import__(module)
from embedistill import forecast
from embedistill.encoding import hardware
from embedistill.evaluation import costs, trial
trial.measure_start = lambda *_: costs.Start(1.0, 100.0)  # as in the process of the tests
forecast._SECONDS = 0.0
exits = []
for arguments in runs:
    child = os.fork()
    if not child:
        sys.argv[1:] = arguments
        try:
            exec(code, {})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    exits.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(exits), flush=True)
"""


def run_in_forks(module: str, code: str, runs: Sequence[Sequence[str]], hash_seed: int = 0) -> list[int]:
    """Run some code once for each list of arguments, in processes of their own that share the import of a module.

    They share the order of sets and the state of numpy's random numbers too: what is compared with them is run apart,
    with another seed of hashes.

    Returns:
        Their exit codes; minus the signal of those that were killed.
    """
    given, environment = json.dumps([module, code, runs]), os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=given, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stderr)  # noqa: T201 - pytest shows it where a test fails
    exits: list[int] = json.loads(done.stdout.splitlines()[-1])
    return exits
