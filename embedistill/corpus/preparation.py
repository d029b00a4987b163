"""From records as they were read to what is trained on and what is held out, with every loss counted."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from embedistill.corpus.records import Record, Split
from embedistill.errors import UsageError


@dataclass
class Funnel:
    """How many records were read, and what became of them."""

    read: int = 0
    bad: int = 0
    short: int = 0
    duplicate: int = 0
    not_selected: int = 0
    in_evaluation: int = 0
    train: int = 0
    holdout: int = 0

    def __str__(self) -> str:
        """Name the counts that are not zero."""
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in asdict(self).items() if count)


def prepare(
    records: Iterable[Record | None],
    *,
    min_characters: int,
    size: int | None,
    holdout: float,
    seed: int,
    evaluation_texts: Collection[str] = (),
) -> tuple[dict[Split, list[Record]], Funnel]:
    """Filter, deduplicate, select and split records.

    The order, and with it selection and split, comes from a hash of seed and text: it does not depend on the order in
    which the records were read.

    Args:
        records: What was read; None is a bad row.
        min_characters: Shorter texts are dropped.
        size: At most this many records are selected, at random; None: all.
        holdout: Share of the selected records that is held out.
        seed: Seed of the order.
        evaluation_texts: No training record holds one of these texts, whatever its case and spacing.

    Raises:
        UsageError: Fewer than two records are left for training or for evaluation.
    """
    funnel = Funnel()
    unique: dict[str, Record] = {}
    for record in records:
        funnel.read += 1
        if record is None:
            funnel.bad += 1
        elif len(record.text) < min_characters or not record.document:
            funnel.short += 1
        elif _normal(record.text) in unique:
            funnel.duplicate += 1
        else:
            unique[_normal(record.text)] = record
    order = sorted(unique.values(), key=lambda record: hashlib.sha256(f"{seed}:{record.text}".encode()).digest())
    selected = order[:size]
    funnel.not_selected = len(order) - len(selected)
    cut = max(2, round(holdout * len(selected)))
    held_out, rest = selected[:cut], selected[cut:]
    seen = {_normal(text) for text in evaluation_texts} | {
        _normal(text) for record in held_out for text in record.texts
    }
    train = [record for record in rest if not any(_normal(text) in seen for text in record.texts)]
    funnel.in_evaluation = len(rest) - len(train)
    funnel.train, funnel.holdout = len(train), len(held_out)
    if len(train) < 2 or len(held_out) < 2:
        found = f"{len(train)} records to train on and {len(held_out)} to hold out ({funnel})"
        raise UsageError("corpus", found, "two of each at the very least", "give it more texts, or loosen its filters")
    return {"train": train, "holdout": held_out}, funnel


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
