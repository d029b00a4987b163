"""From records as they were read to what is trained on and what is held out, with every loss counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

from embedistill.choices import By
from embedistill.corpus.filtering import Rule, drop_near_duplicates
from embedistill.corpus.records import Record, Split, normalise
from embedistill.corpus.selection import Embed, select
from embedistill.errors import UsageError

_EXAMPLES = 10


@dataclass
class Funnel:
    """How many records were read, and what became of them; with some of those that were left out, by reason."""

    read: int = 0
    bad: int = 0
    short: int = 0
    damaged: int = 0
    language: int = 0
    duplicate: int = 0
    near_duplicate: int = 0
    not_selected: int = 0
    in_evaluation: int = 0
    in_holdout: int = 0
    train: int = 0
    holdout: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """The counts by name."""
        return {name: count for name, count in asdict(self).items() if name != "examples"}

    def __str__(self) -> str:
        """Name the counts that are not zero."""
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.counts.items() if count)

    def drop(self, reason: str, text: str) -> None:
        """Count a record that is left out, and keep its text as one of ten examples."""
        setattr(self, reason, getattr(self, reason) + 1)
        if len(self.examples.setdefault(reason, [])) < _EXAMPLES:
            self.examples[reason].append(text[:200])


def prepare(
    records: Iterable[Record | None],
    *,
    find_rule: Callable[[Record], Rule | None],
    size: int | None,
    holdout: float,
    seed: int,
    by: By = "random",
    embed: Embed | None = None,
    near_duplicates: bool = True,
    evaluation_texts: Collection[str] = (),
) -> tuple[dict[Split, list[Record]], Funnel]:
    """Filter, deduplicate, select and split records.

    A record whose text is held out is not trained on; one that shares but a query or a negative with what is held out
    is trained on without it.

    Orders come from hashes of seed and text: they do not depend on the order in which the records were read. Groups are
    drawn from by one, and what was selected comes in another, which random selection takes the first of: of a group of
    which little is taken, all stands at the head of the order that it was drawn by, and with it would be held out.

    Args:
        records: What was read; None is a bad row.
        find_rule: Names the rule that a record breaks, which is then left out.
        size: At most this many records are selected; None: all.
        holdout: Share of the selected records that is held out.
        seed: Seed of the order.
        by: How records are selected.
        embed: What diversity is told by.
        near_duplicates: Whether texts that are nearly the same are kept.
        evaluation_texts: No training record holds one of these texts, whatever its case and spacing.

    Raises:
        UsageError: Fewer than two records are left for training or for evaluation.
    """
    funnel = Funnel()
    unique = list(_sift(records, find_rule, funnel))
    order = _shuffle(unique, f"{seed}")
    if not near_duplicates:
        order, repeated = drop_near_duplicates(order)
        for record in repeated:
            funnel.drop("near_duplicate", record.text)
    final = f"{seed}:order"
    drawn_from = _shuffle(order, final) if by == "random" else order
    selected = _shuffle(select(drawn_from, size, by, embed), final)
    funnel.not_selected = len(order) - len(selected)
    cut = max(2, round(holdout * len(selected)))
    held_out, rest = selected[:cut], selected[cut:]
    train = list(_keep_apart(rest, held_out, evaluation_texts, funnel))
    funnel.train, funnel.holdout = len(train), len(held_out)
    if len(train) < 2 or len(held_out) < 2:
        found = f"{len(train)} records to train on and {len(held_out)} to hold out ({funnel})"
        raise UsageError("corpus", found, "two of each at the very least", "give it more texts, or loosen its filters")
    return {"train": train, "holdout": held_out}, funnel


def _keep_apart(
    records: Iterable[Record], held_out: Iterable[Record], evaluation_texts: Iterable[str], funnel: Funnel
) -> Iterator[Record]:
    """Yield the records that hold nothing of an evaluation and no held-out text, without held-out queries."""
    judged = {normalise(text) for text in evaluation_texts}
    kept_out = {normalise(text) for record in held_out for text in (record.text, *record.texts)}
    for record in records:
        query, negative = (
            None if text and normalise(text) in kept_out else text for text in (record.query, record.negative)
        )
        fresh = replace(record, query=query, negative=negative)
        if any(normalise(text) in judged for text in (record.text, *record.texts)):
            funnel.drop("in_evaluation", record.text)
        elif any(normalise(text) in kept_out for text in (record.text, record.document, fresh.document)):
            funnel.drop("in_holdout", record.text)
        else:
            yield fresh


def _shuffle(records: Iterable[Record], seed: str) -> list[Record]:
    """Return records in an order by chance, the same for the same seed, whatever order they come in."""

    def place(record: Record) -> bytes:
        query = f"\0{record.query}" if record.query else ""
        return hashlib.sha256(f"{seed}:{record.text}{query}".encode()).digest()

    return sorted(records, key=place)


def _sift(
    records: Iterable[Record | None], find_rule: Callable[[Record], Rule | None], funnel: Funnel
) -> Iterable[Record]:
    """Yield the records that break no rule and are no others' copies, and count the rest.

    A text may come again with another query.
    """
    seen: set[tuple[str, str]] = set()
    for record in records:
        funnel.read += 1
        if record is None:
            funnel.bad += 1
            continue
        rule, normal = find_rule(record), (normalise(record.text), normalise(record.query or ""))
        if rule:
            funnel.drop(rule, record.text)
        elif normal in seen:
            funnel.drop("duplicate", record.text)
        else:
            seen.add(normal)
            yield record
