"""What a recipe's student will cost, before anything is encoded or trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from embedistill.architectures import read_config, with_sizes
from embedistill.encoding.hardware import choose_dtype, find_training_device
from embedistill.encoding.local import LocalEncoder
from embedistill.errors import UsageError
from embedistill.forecast import Forecast, choose_by_speed, forecast
from embedistill.recipe import Recipe, ShapeSection, StudentSection, TrainingSection
from embedistill.sources import check_corpus, read_records
from embedistill.student.head import Matrix
from embedistill.student.planning import TransformerPlan, choose_sizes, list_neighbours, plan_transformer
from embedistill.student.vocabulary import check_vocabulary
from embedistill.teacher import default_cache_dir, load, locate
from embedistill.training.batches import Rows, count_tokens

_SAMPLE = 128


@dataclass(frozen=True)
class Outlook:
    """What a recipe will cost.

    Attributes:
        forecasts: Of the teacher, the student, and three of its neighbours.
        texts: How many texts of the corpus are encoded and trained on.
        encode_hours: For the teacher to encode them, if none is in the cache.
    """

    forecasts: list[Forecast]
    texts: int
    encode_hours: float


def plan(recipe: Recipe, cache_dir: str | Path | None = None) -> Outlook:
    """Return what a recipe's student and three neighbours will cost, as stand-ins of their sizes were timed here.

    Args:
        recipe: From `load_recipe`, with a student that is made of its teacher's weights.
        cache_dir: Folder for models; default: `default_cache_dir()`.

    Raises:
        EmbedistillError: The student cannot be planned, or the corpus or the teacher cannot be read.
    """
    if recipe.student.origin != "teacher" or recipe.teacher.api:
        raise UsageError("student.from", recipe.student.origin, "teacher: only what is cut out of it is planned")
    check_corpus(recipe.corpus)
    located = locate(
        recipe.teacher.model,
        recipe.teacher.revision,
        models_dir=Path(cache_dir or default_cache_dir()) / "models",
        prompts=recipe.teacher.prompts,
    )
    config = read_config(located.path)
    teacher = load(located)
    check_pieces(recipe.student, teacher.tokenizer)
    sizes = plan_student(recipe.student, config, teacher).sizes
    training = recipe.training
    n_texts, sample = _sample_corpus(recipe, max(_SAMPLE, training.batch_size))
    batch = _fill_batch(count_tokens(teacher, sample), training)
    steps = training.epochs * n_texts / len(batch)
    forecasts = forecast(
        teacher,
        {"student": sizes, **list_neighbours(config, sizes)},
        recipe.student.embedding_size or teacher.get_embedding_dimension() or sizes.hidden_size,
        step_texts=[sample[row] for row in batch],
        steps=min(steps, training.steps or steps),
        most_hours=training.minutes / 60 if training.minutes else None,
        dtype=choose_dtype(training.dtype, find_training_device()),
    )
    encoder = LocalEncoder(located, choose_dtype(recipe.teacher.dtype))
    encoder.run(encoder.prepare(sample[:8], recipe.corpus.kind))
    start = time.perf_counter()
    some = sample[:_SAMPLE]
    encoder.run(encoder.prepare(some, recipe.corpus.kind))
    return Outlook(forecasts, n_texts, (time.perf_counter() - start) / len(some) * n_texts / 3600)


def plan_student(section: StudentSection, config: dict[str, Any], teacher: SentenceTransformer) -> TransformerPlan:
    """Return what a student made of its teacher's weights shall be: as it is written, or as a budget chooses."""
    if not section.budgets:
        if section.via:
            config = with_sizes(config, plan_section(config, section.via, "student.via").sizes)
        return plan_section(config, section, "student")
    ((name, budget),) = section.budgets.items()
    size = section.embedding_size or teacher.get_embedding_dimension() or 0
    if name == "speedup":
        return TransformerPlan(choose_by_speed(teacher, config, size, budget))
    most = budget * 1e6 if name == "max_mb_int8" else budget
    return TransformerPlan(choose_sizes(config, size, most, f"student.{name}"))


def check_pieces(section: StudentSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check, before anything is encoded, that student and assistant can have the pieces that they shall have.

    Raises:
        UsageError: They cannot.
    """
    whole = len(tokenizer.get_vocab()) if section.origin == "static" else None  # whose pieces are counted at any size
    for one in (section.via, section):
        size = one and (one.vocabulary_size or whole)
        if size:
            check_vocabulary(tokenizer, size)


def plan_section(config: dict[str, Any], section: ShapeSection, where: str) -> TransformerPlan:
    """Return what the sizes of a section stand for."""
    sizes = {name: getattr(section, name) for name in ShapeSection.model_fields}
    return plan_transformer(config, **sizes, where=where)


def _fill_batch(lengths: Matrix, section: TrainingSection) -> Rows:
    """Return the rows, among texts of these lengths in tokens, of a batch as it is on average."""
    size = section.batch_size
    if section.batch_tokens:
        size = min(size, max(1, int(section.batch_tokens / lengths.mean())))
    size = min(size, len(lengths))
    middles = (np.arange(size) + 0.5) / size * len(lengths)
    return np.argsort(lengths, kind="stable")[middles.astype(np.int64)]


def _sample_corpus(recipe: Recipe, size: int) -> tuple[int, list[str]]:
    """Return how many texts a recipe encodes, and some of them, chosen at random."""
    section = recipe.corpus
    rng = np.random.default_rng(recipe.seed)
    sample: list[str] = []
    count = n_records = 0
    for record in read_records(section):
        if record is None or len(record.text) < section.min_characters:
            continue
        n_records += 1
        for text in record.texts:
            place = count if count < size else int(rng.integers(0, count + 1))
            if place < size:
                sample[place : place + 1] = [text]
            count += 1
    if not sample:
        raise UsageError(", ".join(section.sources), "no text", "a corpus")
    share = min(1.0, (section.select.size or n_records) / n_records) * (1 - section.holdout)
    return round(share * count), sample


def to_table(outlook: Outlook, title: str) -> Table:
    """Return a plan as a table: a column a model, a row a figure."""
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for one in outlook.forecasts:
        table.add_column(escape(one.name), justify="right")
    teacher = outlook.forecasts[0].speed.texts_per_second
    rows: dict[str, Callable[[Forecast], str]] = {
        "layers x width": lambda one: f"{one.sizes.layers} x {one.sizes.hidden_size}",
        "heads, neurons": lambda one: f"{one.sizes.num_attention_heads}, {one.sizes.intermediate_size}",
        "pieces": lambda one: f"{one.sizes.vocabulary_size:,}",
        "parameters": lambda one: f"{one.parameters / 1e6:.1f} M",
        "of them embeddings": lambda one: f"{one.embedding_parameters / 1e6:.1f} M",
        "MB fp32 / fp16 / int8": lambda one: " / ".join(f"{one.megabytes(bits):.0f}" for bits in (32, 16, 8)),
        "GFLOP, text of 32 tokens": lambda one: f"{one.flops / 1e9:.2f}",
        "texts/s, such texts": lambda one: f"{one.speed.texts_per_second:.0f}",
        "times the teacher's": lambda one: f"{one.speed.texts_per_second / teacher:.1f}",
        "ms for one alone": lambda one: f"{one.speed.latency_ms:.1f}",
        "hours of training": lambda one: "" if one.training_hours is None else f"{one.training_hours:.2f}",
    }
    for label, show in rows.items():
        table.add_row(label, *(show(one) for one in outlook.forecasts))
    table.caption = (
        f"{outlook.texts:,} texts; the teacher encodes them in {outlook.encode_hours:.2f} h where the cache has none"
    )
    return table
