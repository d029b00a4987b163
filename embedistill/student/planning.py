"""What a student shall be, checked against its teacher before anything is loaded, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedistill.architectures import ARCHITECTURES, Sizes, read_sizes
from embedistill.errors import UsageError


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
    count = layers if isinstance(layers, int) else len(layers)
    width = hidden_size or teacher.hidden_size
    heads = num_attention_heads or max(n for n in range(1, teacher.num_attention_heads + 1) if width % n == 0)
    inner = intermediate_size or -(-teacher.intermediate_size * width // teacher.hidden_size // 8) * 8
    sizes = Sizes(
        count, width, heads, min(inner, teacher.intermediate_size), vocabulary_size or teacher.vocabulary_size
    )
    for name, most in vars(teacher).items():
        if getattr(sizes, name) > most:
            raise UsageError(f"{where}.{name}", str(getattr(sizes, name)), f"at most the teacher's {most}")
    if width % heads or width < 4:
        do = "choose another number of heads, or another width"
        raise UsageError(f"{where}.num_attention_heads", f"{heads} heads", f"a divisor of hidden_size {width}", do)
    if isinstance(layers, int):
        return TransformerPlan(sizes)
    if not layers or any(not 0 <= layer < teacher.layers for layer in layers) or sorted(set(layers)) != layers:
        raise UsageError(f"{where}.layers", str(layers), f"ascending numbers from 0 to {teacher.layers - 1}")
    if ARCHITECTURES[config["model_type"]].norm_first and layers[0] != 0:
        found, expected = str(layers), "layer 0 among them, which alone reads without a norm"
        raise UsageError(f"{where}.layers", found, expected, "add 0 to the list")
    return TransformerPlan(sizes, layers)
