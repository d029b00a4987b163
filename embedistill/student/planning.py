"""What a student shall be, checked against its teacher before anything is loaded, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoConfig

from embedistill.architectures import ARCHITECTURES, Sizes, count_parameters, read_sizes, resize
from embedistill.errors import UsageError

_NARROWEST = 8
_LADDER = (  # depth and width, as shares of the teacher's
    *((3, 4, 1, 1), (1, 2, 1, 1), (1, 3, 1, 1), (1, 2, 2, 3), (1, 2, 1, 2), (1, 3, 1, 2)),
    *((1, 3, 13, 32), (1, 4, 1, 3), (1, 4, 1, 4), (1, 6, 1, 4), (1, 6, 1, 6), (1, 12, 1, 6)),
)
_FEWEST_PIECES = 32_000


@dataclass(frozen=True)
class TransformerPlan:
    """What a student made of its teacher's weights shall be.

    Attributes:
        sizes: Its sizes.
        layers: Which of the teacher's layers it is made of; None: the best so many, to be found.
    """

    sizes: Sizes
    layers: list[int] | None = None


def plan_transformer(
    config: Mapping[str, Any],
    layers: int | list[int],
    *,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    vocabulary_size: int | None = None,
    where: str = "student",
) -> TransformerPlan:
    """Return what a student made of its teacher's weights shall be, every size written out.

    Args:
        config: The teacher's configuration, from `read_config`.
        layers: How many to keep, or which, counted from 0.
        hidden_size: Default: the teacher's.
        num_attention_heads: Default: the most that divide hidden_size, and no more than the teacher's.
        intermediate_size: Default: in proportion to hidden_size.
        vocabulary_size: Default: the teacher's.
        where: The section that the sizes stand in, for errors.

    Raises:
        UsageError: The teacher has no such layers, or less than is asked for, or heads do not divide the hidden size.
    """
    teacher = read_sizes(config)
    norm_first = ARCHITECTURES[config["model_type"]].norm_first
    count = layers if isinstance(layers, int) else len(layers)
    width = hidden_size or teacher.hidden_size
    unit = 2 if norm_first else 1  # rotary positions turn pairs of a head's dimensions
    fitting = [n for n in range(1, teacher.num_attention_heads + 1) if width % (n * unit) == 0]
    heads = num_attention_heads or max(fitting, default=1)
    inner = intermediate_size or -(-teacher.intermediate_size * width // teacher.hidden_size // 8) * 8
    sizes = Sizes(
        count, width, heads, min(inner, teacher.intermediate_size), vocabulary_size or teacher.vocabulary_size
    )
    for name, most in vars(teacher).items():
        if getattr(sizes, name) > most:
            raise UsageError(f"{where}.{name}", str(getattr(sizes, name)), f"at most the teacher's {most}")
    if width % (heads * unit) or width < _NARROWEST:
        expected = f"heads of equal{', even' if norm_first else ''} size in hidden_size {width}, at least {_NARROWEST}"
        do = "choose another number of heads, or another width"
        raise UsageError(f"{where}.num_attention_heads", f"{heads} heads", expected, do)
    if isinstance(layers, int):
        return TransformerPlan(sizes)
    if not layers or any(not 0 <= layer < teacher.layers for layer in layers) or sorted(set(layers)) != layers:
        raise UsageError(f"{where}.layers", str(layers), f"ascending numbers from 0 to {teacher.layers - 1}")
    if norm_first and layers[0] != 0:
        found, expected = str(layers), "layer 0 among them, which alone reads without a norm"
        raise UsageError(f"{where}.layers", found, expected, "add 0 to the list")
    return TransformerPlan(sizes, layers)


def list_rungs(config: Mapping[str, Any]) -> list[Sizes]:
    """Return sizes that a budget chooses among, the most parameters first: depth and width fall together."""
    teacher = read_sizes(config)
    rungs = []
    for layers, of_layers, width, of_width in _LADDER:
        hidden = max(_NARROWEST, teacher.hidden_size * width // of_width // 8 * 8)
        rungs.append(plan_transformer(config, max(1, teacher.layers * layers // of_layers), hidden_size=hidden).sizes)
    return rungs


def choose_sizes(config: Mapping[str, Any], embedding_size: int, max_parameters: float, where: str) -> Sizes:
    """Return the largest sizes within a number of parameters: the transformer first, then as many pieces as are left.

    No more than half of the pieces are given up, of a large vocabulary all but 32,000.

    Args:
        config: The teacher's configuration, from `read_config`.
        embedding_size: Dimension of the student's embeddings.
        max_parameters: The head's among them.
        where: The setting, for errors.

    Raises:
        UsageError: Not even the smallest fits.
    """
    fewest = min(_FEWEST_PIECES, read_sizes(config).vocabulary_size // 2)
    full = AutoConfig.for_model(**config)
    for sizes in list_rungs(config):
        _words, rest = count_parameters(resize(full, sizes, list(range(sizes.layers))))
        rest += sizes.hidden_size * embedding_size
        pieces = min(sizes.vocabulary_size, int((max_parameters - rest) // sizes.hidden_size))
        if pieces >= fewest:
            return replace(sizes, vocabulary_size=pieces)
    least = rest + fewest * sizes.hidden_size
    raise UsageError(where, f"{max_parameters:,.0f} parameters", f"at least {least:,}", "or student.from=static")


def list_neighbours(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Sizes]:
    """Return sizes near a student's, by what is different."""
    width = max(_NARROWEST, sizes.hidden_size * 2 // 3 // 8 * 8)
    narrow = plan_transformer(config, sizes.layers, hidden_size=width, vocabulary_size=sizes.vocabulary_size).sizes
    return {
        "half the layers": replace(sizes, layers=max(1, sizes.layers // 2)),
        "narrower": narrow,
        "half the pieces": replace(sizes, vocabulary_size=sizes.vocabulary_size // 2),
    }
