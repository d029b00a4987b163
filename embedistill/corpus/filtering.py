"""Which texts are not worth a teacher's time: rules with a name each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from embedistill.corpus.records import Record, normalise
from embedistill.errors import UsageError

Rule = Literal["short", "damaged", "language"]

_SIMILAR = 0.8
_PERMUTATIONS = 64
_SHINGLE = 5
_CERTAIN_CHARACTERS = 40  # below, a language cannot be told with any certainty


def make_filter(min_characters: int, *, damaged: bool, language: str | None) -> Callable[[Record], Rule | None]:
    """Return what names the first rule that a record breaks; None: it breaks none.

    short: fewer characters than asked for, or nothing but its own query. damaged: text that was decoded wrongly, by
    ftfy's heuristic, or holds U+FFFD. language: another language, by langid, of texts of at least 40 characters.

    Args:
        min_characters: Of a text.
        damaged: Whether to look for damage.
        language: The ISO 639-1 code of the only language wanted; None: any.

    Raises:
        UsageError: A rule needs a package that is not installed.
    """
    is_bad = _load("ftfy.badness", "corpus.drop_damaged").is_bad if damaged else None
    classify = load_classifier("corpus.language") if language else None

    def find(record: Record) -> Rule | None:
        text = record.text
        if len(text) < min_characters or not record.document:
            return "short"
        if is_bad and ("\ufffd" in text or is_bad(text)):
            return "damaged"
        if classify and classify(text) not in {language, None}:
            return "language"
        return None

    return find


def load_classifier(what: str) -> Callable[[str], str | None]:
    """Return what tells the language of a text, its ISO 639-1 code by langid; None of one of under 40 characters.

    Raises:
        UsageError: py3langid is not installed; `what` needs it.
    """
    classify = _load("py3langid", what).classify
    return lambda text: str(classify(text)[0]) if len(text) >= _CERTAIN_CHARACTERS else None


def drop_near_duplicates(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records whose texts are unlike all before them, and those that are not.

    A text that comes again with another query is the same text. Alike are texts whose runs of five characters have a
    Jaccard similarity of about 0.8, by MinHash with 64 permutations and locality-sensitive hashing (Broder, 1997;
    datasketch): near the border, chance decides.

    Raises:
        UsageError: datasketch is not installed.
    """
    datasketch = _load("datasketch", "corpus.near_duplicates")
    index = datasketch.MinHashLSH(threshold=_SIMILAR, num_perm=_PERMUTATIONS)
    kept: list[Record] = []
    dropped: list[Record] = []
    is_new: dict[str, bool] = {}
    for number, record in enumerate(records):
        text = normalise(record.text)
        if text not in is_new:
            shingles = {text[start : start + _SHINGLE].encode() for start in range(max(1, len(text) - _SHINGLE + 1))}
            sketch = datasketch.MinHash(num_perm=_PERMUTATIONS)
            sketch.update_batch(list(shingles))
            is_new[text] = not index.query(sketch)
            if is_new[text]:
                index.insert(number, sketch)
        (kept if is_new[text] else dropped).append(record)
    return kept, dropped


@functools.cache
def _load(module: str, setting: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        do = "pip install 'embedistill[filter]'"
        raise UsageError(setting, f"{module.split('.', maxsplit=1)[0]} is not installed", do=do) from None
