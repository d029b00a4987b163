import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    CamembertTokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from embedistill.errors import UsageError
from embedistill.student.vocabulary import check_vocabulary, choose_pieces, count_pieces, trim_tokenizer

RARE = ["quartz jukebox 漢字 9 ß", "Æthel_vex #42 (漢) <k>", "zzzqqq-jjj 字"]
NAMES = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
FIRST = ["<s>", "<pad>", "</s>", "<unk>"]


def train(model: models.Model, texts: list[str], trainer: trainers.Trainer, **parts: object) -> dict:
    """Return the JSON of a tokenizer's model."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([*texts * 2, *RARE], trainer)
    return json.loads(tokenizer.to_str())["model"]


def train_wordpiece(texts: list[str], lowercase: bool) -> list[str]:
    trainer = trainers.WordPieceTrainer(vocab_size=400, show_progress=False)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    split = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    pieces = list(train(models.WordPiece(unk_token="[UNK]"), texts, trainer, **split)["vocab"])
    characters = {piece[-1] for piece in pieces}
    return list(dict.fromkeys([*pieces, *sorted(characters), *(f"##{letter}" for letter in sorted(characters))]))


def train_bpe(texts: list[str]) -> dict:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    return train(models.BPE(), texts, trainer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))


def train_unigram(texts: list[str]) -> list[tuple[str, float]]:
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    vocabulary = train(models.Unigram(), texts, trainer, pre_tokenizer=pre_tokenizers.Metaspace())["vocab"]
    return [(piece, score) for piece, score in vocabulary if piece != "<unk>"]


def number(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def make_bert(texts: list[str]) -> PreTrainedTokenizerBase:
    unused = [f"[unused{i}]" for i in range(9)]
    first = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = number([*first, *train_wordpiece(texts, lowercase=False)])
    return BertTokenizer(vocab=vocabulary, do_lower_case=False, model_max_length=40)


def make_mpnet(texts: list[str]) -> PreTrainedTokenizerBase:
    unused = [f"[unused{i}]" for i in range(9)]
    first = [*FIRST, "[PAD]", *unused, "[UNK]", "[CLS]"]
    vocabulary = number([*first, *train_wordpiece(texts, lowercase=True), "<mask>"])
    return MPNetTokenizer(vocab=vocabulary, model_max_length=40)


def make_roberta(texts: list[str]) -> PreTrainedTokenizerBase:
    model = train_bpe(texts)
    merges = [tuple(merge) for merge in model["merges"]]
    return RobertaTokenizer(vocab=number([*FIRST, *model["vocab"], "<mask>"]), merges=merges, model_max_length=40)


def make_modernbert(texts: list[str]) -> PreTrainedTokenizerBase:
    """Return byte-level BPE with all special tokens, and spaces that are not special, behind the model's pieces."""
    model = train_bpe(texts)
    tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("   ", normalized=True)])
    tokenizer.add_special_tokens(list(NAMES.values()))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **NAMES)


def make_xlm_roberta(texts: list[str]) -> PreTrainedTokenizerBase:
    vocabulary = [*((piece, 0.0) for piece in FIRST), *train_unigram(texts), ("<mask>", 0.0)]
    tokenizer = XLMRobertaTokenizer(vocab=vocabulary, model_max_length=40)
    tokenizer.add_tokens(["<query>"])
    return tokenizer


def make_camembert(texts: list[str]) -> PreTrainedTokenizerBase:
    first = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]
    vocabulary = [*((piece, 0.0) for piece in first), *train_unigram(texts), ("<mask>", 0.0)]
    return CamembertTokenizer(vocab=vocabulary, model_max_length=40)


def make_unigram(texts: list[str]) -> PreTrainedTokenizerBase:
    """Return Unigram whose special tokens are its last pieces, with BERT's post-processor."""
    vocabulary = [*train_unigram(texts), *((piece, 0.0) for piece in NAMES.values())]
    ids = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=ids["<unk>"]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.BertProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    tokenizer.enable_padding(pad_id=ids["<pad>"], pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, padding_side="left", **NAMES)


MAKERS: dict[str, Callable[[list[str]], PreTrainedTokenizerBase]] = {
    "bert": make_bert,
    "mpnet": make_mpnet,
    "roberta": make_roberta,
    "modernbert": make_modernbert,
    "xlm-roberta": make_xlm_roberta,
    "camembert": make_camembert,
    "unigram": make_unigram,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(request: pytest.FixtureRequest, sentences: list[str]) -> PreTrainedTokenizerBase:
    return MAKERS[request.param](sentences)


@pytest.fixture(scope="module")
def kept(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[int]:
    """What has to stay and 20 pieces more, so that many pieces of the corpus are gone."""
    counts = count_pieces(tokenizer, sentences)
    return choose_pieces(tokenizer, counts, find_smallest_size(tokenizer) + 20)


@pytest.fixture(scope="module")
def trimmed(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> PreTrainedTokenizerBase:
    return trim_tokenizer(tokenizer, kept)


@pytest.fixture(scope="module")
def texts(sentences: list[str]) -> list[str]:
    """The corpus; single words of it, of which some are kept; and noise of every character that teachers know."""
    rng = random.Random(13)
    alphabet = sorted({character for text in [*sentences, *RARE] for character in text})
    words = sorted({word for text in sentences for word in text.split()})
    noise = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(500)]
    return [*sentences, *words, *RARE, *noise, "", "a   b", "<mask> of the <s> ship"]


def find_smallest_size(tokenizer: PreTrainedTokenizerBase) -> int:
    with pytest.raises(UsageError) as caught:
        choose_pieces(tokenizer, count_pieces(tokenizer, []), 1)
    return int(caught.value.expected.split()[2].strip(":"))


def read(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, truncation=False, padding=False)["input_ids"]


def test_pieces_are_counted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    before = tokenizer.backend_tokenizer.to_str()
    counts = count_pieces(tokenizer, iter(["The ship, the sea.", "a ship near a new tide"]))
    pieces = {piece: counts[i] for piece, i in tokenizer.get_vocab().items() if counts[i]}
    by_hand = {"the": 2, "ship": 2, "a": 2, "near": 1, "new": 1, "tide": 1, ",": 1, ".": 1, "s": 1, "##e": 1, "##a": 1}
    assert pieces == by_hand
    assert (counts.shape, counts.dtype) == ((len(tokenizer),), np.int64)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_stream_is_counted_to_its_end() -> None:
    tokenizer = make_tokenizer()
    counts = count_pieces(tokenizer, (f"ship {'tide' * (i == 2499)}" for i in range(2500)))
    assert [counts[tokenizer.convert_tokens_to_ids(piece)] for piece in ("ship", "tide")] == [2500, 1]


def test_the_most_frequent_pieces_are_kept_and_ties_go_to_the_lowest_id() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    counts = count_pieces(tokenizer, ["storm storm tide wave wave barn"])
    always = [
        i for piece, i in ids.items() if piece in tokenizer.all_special_tokens or len(piece.removeprefix("##")) == 1
    ]
    assert find_smallest_size(tokenizer) == len(always)
    assert choose_pieces(tokenizer, counts, len(always)) == sorted(always)
    three = [ids["storm"], ids["wave"], ids["tide"]]
    assert ids["tide"] < ids["barn"]
    assert choose_pieces(tokenizer, counts, len(always) + 3) == sorted([*always, *three])


def test_too_small_a_vocabulary_is_an_error() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(UsageError, match=r"student\.vocabulary_size: 192; expected at least 193: the special"):
        choose_pieces(tokenizer, count_pieces(tokenizer, []), 192)
    with pytest.raises(UsageError, match=r"student\.vocabulary_size: 192; expected at least 193: the special"):
        check_vocabulary(tokenizer, 192)
    check_vocabulary(tokenizer, 193)


def test_all_kept_nothing_changes(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    whole = choose_pieces(tokenizer, count_pieces(tokenizer, []), 10**6)
    assert whole == list(range(len(tokenizer)))
    assert read(trim_tokenizer(tokenizer, whole), texts) == read(tokenizer, texts)


def test_kept_pieces_are_numbered_by_their_position(
    tokenizer: PreTrainedTokenizerBase, kept: list[int], trimmed: PreTrainedTokenizerBase
) -> None:
    assert len(trimmed) == len(kept) < len(tokenizer) - 20
    assert trimmed.convert_ids_to_tokens(list(range(len(kept)))) == tokenizer.convert_ids_to_tokens(kept)
    assert trimmed.special_tokens_map == tokenizer.special_tokens_map
    if tokenizer.pad_token_id < 4:
        assert trimmed.pad_token_id == tokenizer.pad_token_id


def test_no_text_has_a_new_unknown_token(
    tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    assert not any(tokenizer.unk_token_id in ids for ids in read(tokenizer, texts))
    assert not any(trimmed.unk_token_id in ids for ids in read(trimmed, texts))
    never_known = ["ship ☃ tide", "☃"]
    for old, new in zip(read(tokenizer, never_known), read(trimmed, never_known), strict=True):
        assert new.count(trimmed.unk_token_id) == old.count(tokenizer.unk_token_id)


def test_a_text_whose_pieces_are_kept_is_cut_as_before(
    tokenizer: PreTrainedTokenizerBase, kept: list[int], trimmed: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    pairs = list(zip(read(tokenizer, texts), read(trimmed, texts), strict=True))
    same = [(old, new) for old, new in pairs if set(old) <= set(kept)]
    assert 30 < len(same) < len(pairs) - 30
    for old, new in same:
        assert [kept[i] for i in new] == old
    for old, new in pairs:
        assert (kept[new[0]], kept[new[-1]]) == (old[0], old[-1])  # special tokens
        assert len(new) >= len(old)


def test_a_pair_of_texts_has_its_special_tokens(
    tokenizer: PreTrainedTokenizerBase, kept: list[int], trimmed: PreTrainedTokenizerBase
) -> None:
    old, new = tokenizer("a", "b"), trimmed("a", "b")
    assert [kept[i] for i in new["input_ids"]] == old["input_ids"]
    assert new.keys() == old.keys()


def test_the_same_text_is_decoded(
    tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    assert trimmed.batch_decode(read(trimmed, texts)) == tokenizer.batch_decode(read(tokenizer, texts))


def test_a_saved_tokenizer_is_the_same(
    tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path
) -> None:
    trimmed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(trimmed) is type(tokenizer)
    assert read(loaded, texts) == read(trimmed, texts)
    batch = {"padding": True, "truncation": True, "max_length": 9}
    assert loaded(texts, **batch) == trimmed(texts, **batch)
    assert loaded(texts, padding=True, truncation=True) == trimmed(texts, padding=True, truncation=True)
    for setting in ("model_max_length", "padding_side", "pad_token_id", "all_special_ids", "special_tokens_map"):
        assert getattr(loaded, setting) == getattr(trimmed, setting)
    assert loaded.model_max_length == 40
    assert loaded.padding_side == tokenizer.padding_side
    assert json.loads(loaded.backend_tokenizer.to_str()) == json.loads(trimmed.backend_tokenizer.to_str())


def test_the_teacher_keeps_its_tokenizer(sentences: list[str]) -> None:
    tokenizer = make_mpnet(sentences)
    tokenizer(sentences, truncation=True, padding=True)
    before = tokenizer.backend_tokenizer.to_str()
    trimmed = trim_tokenizer(tokenizer, choose_pieces(tokenizer, count_pieces(tokenizer, sentences), 200))
    trimmed(["a ship"])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_padding_that_the_backend_does_follows(sentences: list[str]) -> None:
    tokenizer = make_unigram(sentences)
    kept = choose_pieces(tokenizer, count_pieces(tokenizer, sentences), 80)
    padding = trim_tokenizer(tokenizer, kept).backend_tokenizer.padding
    assert kept[padding["pad_id"]] == tokenizer.pad_token_id


@pytest.mark.parametrize("make", [make_xlm_roberta, make_camembert, make_unigram])
def test_scores_are_kept_to_the_last_bit(
    make: Callable[[list[str]], PreTrainedTokenizerBase], sentences: list[str]
) -> None:
    tokenizer = make(sentences)
    kept = choose_pieces(tokenizer, count_pieces(tokenizer, sentences), 90)
    old, new = (
        json.loads(each.backend_tokenizer.to_str())["model"]["vocab"]
        for each in (tokenizer, trim_tokenizer(tokenizer, kept))
    )
    assert new == [old[i] for i in kept if i < len(old)]


@pytest.mark.parametrize("make", [make_roberta, make_modernbert])
def test_every_merge_has_its_parts(make: Callable[[list[str]], PreTrainedTokenizerBase], sentences: list[str]) -> None:
    tokenizer = make(sentences)
    smallest, counts = find_smallest_size(tokenizer), count_pieces(tokenizer, sentences)
    for more in range(0, 60, 7):
        kept = choose_pieces(tokenizer, counts, smallest + more)
        assert len(kept) == smallest + more
        model = json.loads(trim_tokenizer(tokenizer, kept).backend_tokenizer.to_str())["model"]
        made = {left + right for left, right in model["merges"]}
        assert {part for merge in model["merges"] for part in merge} | made <= model["vocab"].keys()
        special = {piece for piece in model["vocab"] if piece in tokenizer.all_special_tokens}
        assert {piece for piece in model["vocab"] if len(piece) > 1} - special == made  # none is out of reach


def make_small_bpe() -> PreTrainedTokenizerBase:
    vocabulary = number(["!", "!a", "!ab", "!abc", "a", "b", "c", "d", "bc", "ab", "abc", "abcd"])
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("abc", "d")]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=merges)))


def test_a_piece_brings_those_it_is_merged_from_on_the_way_that_is_taken() -> None:
    tokenizer = make_small_bpe()
    counts = count_pieces(tokenizer, ["abcd"])
    assert tokenizer.convert_ids_to_tokens(counts.nonzero()[0].tolist()) == ["abcd"]
    first = tokenizer.convert_ids_to_tokens([0, 1, 2, 3])  # the first ids stay
    pieces = tokenizer.convert_ids_to_tokens(choose_pieces(tokenizer, counts, 11))
    assert pieces == [*first, "a", "b", "c", "d", "ab", "abc", "abcd"]  # by way of ab, not of bc
    assert trim_tokenizer(tokenizer, [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]).tokenize("abcd") == ["abcd"]
    smaller = tokenizer.convert_ids_to_tokens(choose_pieces(tokenizer, counts, 10))
    assert "abcd" not in smaller  # it needs three places
    assert len(smaller) == 10


def test_a_piece_that_single_characters_cannot_spell_stays() -> None:
    vocabulary = number(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "aa", "##漢字", "##字", "a漢", "字a"]
    )
    tokenizer = BertTokenizer(vocab=vocabulary, tokenize_chinese_chars=False)
    kept = choose_pieces(tokenizer, count_pieces(tokenizer, []), 11)
    assert set(range(12)) - set(kept) == {vocabulary["aa"]}
    assert trim_tokenizer(tokenizer, kept).tokenize("aa漢字") == ["a", "##a", "##漢字"]


def test_bytes_stay() -> None:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["<unk>", "▁", "<", "0", "x", *"ABCDEF123456789", ">", "▁0x", "0x", *bytes_]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    trimmed = trim_tokenizer(tokenizer, choose_pieces(tokenizer, count_pieces(tokenizer, []), len(pieces) - 2))
    assert trimmed.tokenize("☃0x") == ["<0xE2>", "<0x98>", "<0x83>", "0", "x"]
    assert trimmed.decode(trimmed.encode("☃0x")) == "☃0x"


def test_special_tokens_are_still_split_if_the_teacher_splits_them() -> None:
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = True
    counts = count_pieces(tokenizer, ["<s>"])
    assert counts[tokenizer.convert_tokens_to_ids(["<s>", "<", "s", ">"])].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (models.WordLevel({"a": 0, "?": 1}, unk_token="?"), "WordLevel"),
        (models.BPE({"a": 0, "!a": 1}, [], continuing_subword_prefix="!"), "BPE that marks the parts of a word by '!'"),
        (models.BPE({"a": 0, "a!": 1}, [], end_of_word_suffix="!"), "BPE that marks the parts of a word by '!'"),
        (None, "ByT5Tokenizer, which the library tokenizers does not back"),
    ],
)
def test_what_cannot_be_trimmed_is_an_error(model: models.Model | None, found: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)) if model else ByT5Tokenizer()
    message = f"the teacher's tokenizer: {found}; expected WordPiece, BPE, Unigram"
    with pytest.raises(UsageError, match=message):
        count_pieces(tokenizer, ["a"])
    with pytest.raises(UsageError, match=message):
        choose_pieces(tokenizer, np.zeros(400, np.int64), 2)
    with pytest.raises(UsageError, match=message):
        trim_tokenizer(tokenizer, [0])


def test_a_piece_that_settings_name_stays() -> None:
    backend = Tokenizer(models.WordPiece(number(["a", "b", "##a", "##b", "ab", "ba", "aa"]), unk_token="ab"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.sep_token = "ba"
    assert choose_pieces(tokenizer, count_pieces(tokenizer, []), 6) == [0, 1, 2, 3, 4, 5]
    assert find_smallest_size(tokenizer) == 6


def test_added_tokens_stay() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<query>", "ship"])  # the second is a piece as well
    counts = count_pieces(tokenizer, [])
    trimmed = trim_tokenizer(tokenizer, choose_pieces(tokenizer, counts, find_smallest_size(tokenizer)))
    assert trimmed.tokenize("<query> ship tide") == ["<query>", "ship", "t", "##i", "##d", "##e"]


def test_added_tokens_between_pieces_are_an_error() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<query>"])
    kept = choose_pieces(tokenizer, count_pieces(tokenizer, []), 10**6)
    assert trim_tokenizer(tokenizer, kept).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(UsageError, match="the teacher's tokenizer: added tokens between the pieces of its model"):
        trim_tokenizer(tokenizer, [kept[-1], *kept[:-1]])
