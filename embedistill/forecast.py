"""What a student will cost, before it is made: a stand-in of its sizes, with made-up weights, is counted and timed."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn
from transformers import AutoModel

from embedistill.architectures import Sizes, count_parameters, read_sizes, resize
from embedistill.encoding.packed import count_flops
from embedistill.errors import UsageError
from embedistill.student.planning import list_rungs
from embedistill.teacher import encode, prompts_of
from embedistill.training.packed import without_padding

TOKENS = 32
_BATCH = 32
_SECONDS = 0.5
_MOST_WORDS = 64


@dataclass(frozen=True)
class Speed:
    """How fast a model encodes texts of 32 tokens: texts/s in batches of 32, and ms for one text alone (median)."""

    texts_per_second: float
    latency_ms: float


@dataclass(frozen=True)
class Forecast:
    """What a model will cost.

    Attributes:
        name: What it is.
        sizes: Its sizes.
        embedding_parameters: Parameters of its table of words.
        other_parameters: All others, the head's among them.
        flops: Floating-point operations for a text of 32 tokens.
        speed: As a stand-in was timed.
        training_hours: For training as a recipe says; None for the teacher.
    """

    name: str
    sizes: Sizes
    embedding_parameters: int
    other_parameters: int
    flops: float
    speed: Speed
    training_hours: float | None = None

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.embedding_parameters + self.other_parameters

    def megabytes(self, bits: int) -> float:
        """Return the size of its weights at so many bits each."""
        return self.parameters * bits / 8e6


def make_text(tokenizer: Any, tokens: int = TOKENS) -> str:
    """Return a text of so many tokens, those around it included, or of as near as repeated words come to it."""
    texts = [" ".join(["the"] * n) for n in range(1, _MOST_WORDS)]
    return min(texts, key=lambda text: abs(len(tokenizer(text)["input_ids"]) - tokens))


def measure(models: dict[str, SentenceTransformer]) -> dict[str, Speed]:
    """Return how fast models encode texts of 32 tokens, counted by the first one's tokenizer; they take turns."""
    batch = [make_text(next(iter(models.values())).tokenizer)] * _BATCH
    for model in models.values():
        encode(model, batch)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    while any(sum(map(sum, times)) < _SECONDS or len(times[1]) < 3 for times in found.values()):
        for name, model in models.items():
            for times, some in zip(found[name], (batch, batch[:1]), strict=True):
                start = time.perf_counter()
                encode(model, some)
                times.append(time.perf_counter() - start)
    return {
        name: Speed(len(batch) / statistics.median(full), 1000 * statistics.median(single))
        for name, (full, single) in found.items()
    }


def make_stand_in(teacher: SentenceTransformer, sizes: Sizes, embedding_size: int) -> SentenceTransformer:
    """Return a model of the sizes of a student of a teacher, whose weights are made up."""
    transformer: Any = copy.copy(teacher[0])
    transformer._modules = dict(transformer._modules)
    config = resize(transformer.model.config, sizes, list(range(sizes.layers)))
    config.vocab_size = read_sizes(transformer.model.config.to_dict()).vocabulary_size  # the tokenizer is the teacher's
    transformer.model = AutoModel.from_config(config).eval()
    pooling: Any = Pooling(sizes.hidden_size)
    head = Dense(sizes.hidden_size, embedding_size, bias=False, activation_function=nn.Identity())
    modules = [transformer, pooling, head, Normalize()]
    return SentenceTransformer(modules=modules, device=str(teacher.device), **prompts_of(teacher))


def forecast(
    teacher: SentenceTransformer,
    students: dict[str, Sizes],
    embedding_size: int,
    *,
    step_texts: Sequence[str] = (),
    steps: float = 0.0,
    most_hours: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Forecast]:
    """Return what a teacher costs, and what students of some sizes will, timed beside each other.

    Args:
        teacher: The teacher, loaded.
        students: Their sizes by name.
        embedding_size: Dimension of their embeddings.
        step_texts: The texts of one step of training.
        steps: How many steps the training takes.
        most_hours: What it takes at most.
        dtype: Number format of the training.
    """
    stand_ins = {name: make_stand_in(teacher, sizes, embedding_size) for name, sizes in students.items()}
    speeds = measure({"teacher": teacher, **stand_ins})
    body: Any = teacher[0]
    config = body.model.config
    own = read_sizes(config.to_dict())
    found = [_describe("teacher", own, config, body.model, speeds["teacher"])]
    for name, sizes in students.items():
        stand_in: Any = stand_ins[name][0]
        one = _describe(name, sizes, config, stand_in.model, speeds[name])
        head = sizes.hidden_size * embedding_size
        one = replace(one, other_parameters=one.other_parameters + head, flops=one.flops + 2 * head)
        hours = steps * time_step(stand_ins[name], step_texts, dtype) / 3600 if step_texts else None
        if hours is not None and most_hours is not None:
            hours = min(hours, most_hours)
        found.append(replace(one, training_hours=hours))
    return found


def compare_forecast(planned: Sequence[Forecast], models: dict[str, SentenceTransformer]) -> list[dict[str, Any]]:
    """Return what was forecast of a teacher and its student beside what is measured: rows of what, planned, measured.

    Speeds are compared as ratios to the teacher's of the same moment, as a shared machine's changes.
    """
    (before, after), (base, speed) = planned, measure({role: models[role] for role in ("teacher", "student")}).values()
    parameters = sum(parameter.numel() for parameter in models["student"].parameters())
    figures = {
        "million parameters": (after.parameters / 1e6, parameters / 1e6),
        "times the teacher's texts/s": (
            after.speed.texts_per_second / before.speed.texts_per_second,
            speed.texts_per_second / base.texts_per_second,
        ),
        "of the teacher's latency": (
            after.speed.latency_ms / before.speed.latency_ms,
            speed.latency_ms / base.latency_ms,
        ),
    }
    return [{"what": what, "planned": then, "measured": now} for what, (then, now) in figures.items()]


def _describe(name: str, sizes: Sizes, config: Any, model: Any, speed: Speed) -> Forecast:
    words, rest = count_parameters(resize(config, sizes, list(range(sizes.layers))))
    return Forecast(name, sizes, words, rest, count_flops(model, [TOKENS]), speed)


def _wait(model: SentenceTransformer) -> None:
    """Wait until an accelerator has done what it was given."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize()


def time_step(model: SentenceTransformer, texts: Sequence[str], dtype: torch.dtype) -> float:
    """Return the seconds of one step of training on some texts: the faster of two."""
    model.train()
    seconds = []
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0)
    with without_padding(model, dtype):
        for _ in range(2):
            _wait(model)
            start = time.perf_counter()
            features: Any = {
                name: value.to(model.device)
                for name, value in model.preprocess(list(texts)).items()
                if isinstance(value, torch.Tensor)
            }
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                vectors = model(features)["sentence_embedding"]
            vectors.square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            _wait(model)
            seconds.append(time.perf_counter() - start)
    model.eval()
    return min(seconds)


def choose_by_speed(teacher: SentenceTransformer, config: dict[str, Any], embedding_size: int, speedup: float) -> Sizes:
    """Return the largest sizes whose stand-in encodes so many times as fast as its teacher.

    Raises:
        UsageError: Not even the smallest does.
    """
    best = 0.0
    for sizes in list_rungs(config):
        speeds = measure({"teacher": teacher, "student": make_stand_in(teacher, sizes, embedding_size)})
        best = speeds["student"].texts_per_second / speeds["teacher"].texts_per_second
        if best >= speedup:
            return sizes
    raise UsageError("student.speedup", f"{speedup:g}", f"at most {best:.1f} here", "or student.from=static")
