"""A student's vocabulary: the pieces of its teacher's tokenizer that a corpus uses, and what no text can do without."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from embedistill.errors import UsageError

MODELS = ("WordPiece", "BPE", "Unigram")
FIRST_IDS = 4
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
BATCH = 1024

Counts = npt.NDArray[np.int64]
Ranks = dict[tuple[str, str], int]


def count_pieces(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counts:
    """Return how often texts use each piece, by token id, shape (highest id + 1,).

    Texts are counted to their end, without the special tokens around them. They are read once, a batch at a time, and
    the tokenizer is left as it is.

    Raises:
        UsageError: The tokenizer is of a kind that cannot be trimmed.
    """
    backend = _load_backend(_read_backend(tokenizer), tokenizer)
    backend.no_truncation()
    backend.no_padding()
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
        counts += np.bincount(ids, minlength=len(counts))
    return counts


def choose_pieces(tokenizer: PreTrainedTokenizerBase, counts: Counts, size: int) -> list[int]:
    """Choose which pieces a student keeps, and return their ids, ascending.

    Special and added tokens and every single character stay, so that a text the teacher can read has no new unknown
    token. The rest is filled by the highest count, then the lowest id; of BPE, a piece brings those it is merged from.

    Args:
        tokenizer: The teacher's tokenizer.
        counts: How often the corpus uses each piece, from `count_pieces`.
        size: How many pieces to keep; all of them if there are not more.

    Raises:
        UsageError: The size is below what has to stay, or the tokenizer is of a kind that cannot be trimmed.
    """
    state = _read_backend(tokenizer)
    ids: dict[str, int] = tokenizer.get_vocab()
    ranks = _rank_merges(state)
    kept = _choose_required(state, tokenizer, size)
    for piece in sorted(ids, key=lambda piece: (-counts[ids[piece]], ids[piece])):
        missing = {ids[part] for part in _derive(piece, ranks)} - kept
        if len(kept) + len(missing) <= size:
            kept |= missing
    return sorted(kept)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the same class and settings that has only some of the pieces.

    The new id of a piece is its position in `kept`, so that `table[kept]` is its table of embeddings. A text whose
    pieces are all kept is cut into the same pieces as before. The tokenizer given is left as it is.

    Args:
        tokenizer: The teacher's tokenizer.
        kept: Ids to keep, from `choose_pieces`.

    Raises:
        UsageError: The tokenizer is of a kind that cannot be trimmed.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    state = _read_backend(tokenizer)
    for container, key in _find_id_fields(state):
        container[key] = new_ids[container[key]]
    _trim_model(state["model"], new_ids)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = _load_backend(state, tokenizer)
    expected = {piece: new_ids[old] for piece, old in tokenizer.get_vocab().items() if old in new_ids}
    if trimmed.get_vocab() != expected:
        found = "added tokens between the pieces of its model"
        raise UsageError("the teacher's tokenizer", found, "them among these or after", "keep its whole vocabulary")
    return trimmed


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Check that a student can have so many pieces, before anything expensive.

    Raises:
        UsageError: The size is below what has to stay, or the tokenizer is of a kind that cannot be trimmed.
    """
    _choose_required(_read_backend(tokenizer), tokenizer, size)


def _read_backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the JSON of a tokenizer of the `tokenizers` library, if it is one that can be trimmed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise _refuse(f"{type(tokenizer).__name__}, which the library tokenizers does not back")
    state: dict[str, Any] = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] not in MODELS:
        raise _refuse(model["type"])
    affix = model.get("end_of_word_suffix") or (model["type"] == "BPE" and model["continuing_subword_prefix"])
    if affix:
        raise _refuse(f"BPE that marks the parts of a word by {affix!r}")
    return state


def _refuse(found: str) -> UsageError:
    expected = f"{', '.join(MODELS)}; of BPE, the kind of RoBERTa"
    return UsageError("the teacher's tokenizer", found, expected, "keep its whole vocabulary")


def _load_backend(state: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend, model = Tokenizer.from_str(json.dumps(state)), state["model"]
    if model["type"] == "Unigram":  # the library misreads the last bit of numbers in JSON, which decides between ties
        vocabulary = [(piece, score) for piece, score in model["vocab"]]
        backend.model = Unigram(vocabulary, model["unk_id"], model["byte_fallback"])
    backend.encode_special_tokens = tokenizer.split_special_tokens  # its JSON does not say
    return backend


def _find_id_fields(state: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield where in a tokenizer's JSON the id of a piece is written, the vocabulary aside, as (container, key)."""
    yield from ((token, "id") for token in state["added_tokens"])
    if state["padding"]:
        yield state["padding"], "pad_id"
    if state["model"].get("unk_id") is not None:
        yield state["model"], "unk_id"
    for processor in _flatten(state["post_processor"]):
        yield from ((processor[side], 1) for side in ("cls", "sep") if side in processor)
        for token in processor.get("special_tokens", {}).values():
            yield from ((token["ids"], position) for position in range(len(token["ids"])))


def _flatten(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the post-processors that one is made of."""
    if processor is None or processor["type"] != "Sequence":
        return [processor] if processor else []
    return [inner for part in processor["processors"] for inner in _flatten(part)]


def _rank_merges(state: dict[str, Any]) -> Ranks:
    return {(left, right): rank for rank, (left, right) in enumerate(state["model"].get("merges", []))}


def _choose_required(state: dict[str, Any], tokenizer: PreTrainedTokenizerBase, size: int) -> set[int]:
    """Return the ids that no student can do without; an error where they are more than it shall have."""
    ids, ranks = tokenizer.get_vocab(), _rank_merges(state)
    kept = {ids[part] for piece in _find_required(state, tokenizer) for part in _derive(piece, ranks)}
    if size < len(kept):
        expected = f"at least {len(kept)}: the special tokens and every single character"
        raise UsageError("student.vocabulary_size", str(size), expected, "raise it")
    return kept


def _find_required(state: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the pieces that no student can do without."""
    ids: dict[str, int] = tokenizer.get_vocab()
    named = {container[key] for container, key in _find_id_fields(state)} | set(tokenizer.all_special_ids)
    named.add(ids.get(state["model"].get("unk_token")))
    # RoBERTa's kind counts positions from padding's id 1, XLM-R's class expects the unknown token at 3.
    named.update(range(FIRST_IDS))
    prefix = state["model"].get("continuing_subword_prefix") or ""
    return [piece for piece in ids if ids[piece] in named or not _can_be_spelt(piece, prefix, ids)]


def _can_be_spelt(piece: str, prefix: str, ids: dict[str, int]) -> bool:
    """Say whether smaller pieces, of one character each, can stand for a piece."""
    continues = bool(prefix) and piece.startswith(prefix)
    characters = piece[len(prefix) :] if continues else piece
    letters = [(prefix if continues or at else "") + character for at, character in enumerate(characters)]
    return len(letters) > 1 and all(letter in ids for letter in letters) and not BYTE_PIECE.fullmatch(piece)


def _derive(piece: str, ranks: Ranks) -> set[str]:
    """Return a piece and those that BPE passes through on the way to it from single characters.

    They are all that it takes: merges inside of a piece do not depend on what is around it.
    """
    parts, passed = list(piece), {piece}
    while found := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        passed.add(parts[at])
    return passed if parts == [piece] else {piece}


def _trim_model(model: dict[str, Any], new_ids: dict[int, int]) -> None:
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in new_ids if old < len(model["vocab"])]
        return
    model["vocab"] = {piece: new_ids[old] for piece, old in model["vocab"].items() if old in new_ids}
    if model["type"] == "BPE":
        vocabulary = model["vocab"].keys()
        model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocabulary]
