"""A student made from its teacher's own weights: vocabulary, depth and width, and a head that is solved."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import Tensor, nn

from embedistill.architectures import Sizes, find_words, keep_layers, read_sizes
from embedistill.encoding.local import cut_batches, one_thread_a_batch
from embedistill.encoding.packed import PackedBody, can_pack, pool, rough_format
from embedistill.progress import note, progress_bar
from embedistill.student.depth import SEARCH_TEXTS, search_layers
from embedistill.student.head import Matrix, project, solve_ridge
from embedistill.student.planning import TransformerPlan
from embedistill.student.selection import select_narrow
from embedistill.student.vocabulary import choose_pieces, count_pieces, trim_tokenizer
from embedistill.student.width import fit_narrow
from embedistill.teacher import encode_with_progress, prompts_of

_BATCH_TOKENS = 4096  # of a core
_FIT_TOKENS = 120_000
_FIT_LENGTH = 256
_SELECT_TEXTS = 500
_BRIDGE_TEXTS = 300
_FEWEST_TEXTS = 8  # that similarities are correlated on
_FEWEST_TOKENS = 16  # for each neuron, to fit a student as wide as its teacher
_HEAD_TOKENS = 1_000_000  # as estimated from the texts of the fit
_MOST_FITTED = 2 / 3  # of the layers: with more, what is cut is near enough to its teacher
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def build_student(
    teacher: SentenceTransformer,
    plan: TransformerPlan,
    texts: Sequence[str],
    vectors: Matrix,
    *,
    projection: Matrix | None = None,
    counted: Iterable[str] = (),
) -> tuple[SentenceTransformer, list[int]]:
    """Build an untrained student out of its teacher's weights.

    Args:
        teacher: The teacher in fp32; it is left as it is. Its modules are a transformer, a pooling, and whatever else.
        plan: The sizes and layers.
        texts: Texts to fit on, as the model sees them: with their prompts. The first 64 are for the search of layers
            alone; of the others the blocks are fitted on as many as make 120,000 tokens, and the head on as many as
            make a million: it has many weights, and the more texts it is solved on, the better a student starts.
        vectors: The teacher's vectors of the texts, shape (n_texts, dim).
        projection: The PCA that the student's space is, shape (dim, embedding_size); None: the teacher's own space.
        counted: Texts whose pieces are counted where the vocabulary is trimmed; default: those to fit on.

    Returns:
        A plain SentenceTransformer of built-in modules: transformer, the teacher's pooling, Dense, Normalize; and the
        layers it is made of.
    """
    modules: list[nn.Module] = [copy.deepcopy(module).cpu().eval() for module in (teacher[0], teacher[1])]
    transformer: Any = modules[0]
    sizes = plan.sizes
    if sizes.vocabulary_size < read_sizes(transformer.model.config.to_dict()).vocabulary_size:
        n_pieces = _trim(transformer, counted or texts, sizes.vocabulary_size)
        sizes = replace(sizes, vocabulary_size=n_pieces)
    body = SentenceTransformer(modules=modules, device="cpu")
    cut = min(SEARCH_TEXTS, len(texts) // 4)
    searched = slice(0, cut if cut >= _FEWEST_TEXTS else SEARCH_TEXTS)
    ids = tokenize(transformer, texts[cut:])
    fitted = _is_fitted(transformer.model, sizes, sum(len(text) for text in ids))
    bridged_on = texts[cut : cut + _BRIDGE_TEXTS] if fitted else ()
    layers = plan.layers or search_layers(body, sizes.layers, texts[searched], vectors[searched], bridged_on)
    note(f"Layers of the student: {', '.join(map(str, layers))} of its teacher's, counted from 0")
    if fitted:
        transformer.model = fit_narrow(transformer.model, sizes, layers, ids, vectors[cut : cut + len(ids)])
    elif replace(sizes, layers=0) == replace(read_sizes(transformer.model.config.to_dict()), layers=0):
        transformer.model = keep_layers(transformer.model, layers)
    else:
        transformer.model = select_narrow(transformer.model, sizes, layers, ids=ids[:_SELECT_TEXTS])
    n_texts = math.ceil(len(ids) * _HEAD_TOKENS / sum(len(text) for text in ids))
    texts, vectors = texts[cut : cut + n_texts], vectors[cut : cut + n_texts]
    pooling: Any = modules[1]
    own = {"embedding_dimension": sizes.hidden_size, "include_prompt": True}  # prompts are parts of what it trains on
    modules[1] = Pooling(**pooling.get_config_dict() | own)
    packed = teacher.device.type == "cpu" and can_pack(transformer.model)
    pooled = _embed_roughly(modules, texts) if packed else None
    return add_head(modules, teacher, texts, project(vectors, projection), pooled), layers


def add_head(
    modules: list[nn.Module],
    teacher: SentenceTransformer,
    texts: Sequence[str],
    targets: Matrix,
    pooled: Matrix | None = None,
) -> SentenceTransformer:
    """Return a student of some modules and a head, solved by ridge regression onto targets (n_texts, dim).

    What the modules make of the texts is computed where it is not given, shape (n_texts, width).
    """
    if pooled is None:
        body = SentenceTransformer(modules=modules, device=str(teacher.device))
        pooled = encode_with_progress(body, "student", texts, unit=False)
    weight = torch.from_numpy(solve_ridge(pooled, targets).T.copy())
    head = Dense(pooled.shape[1], targets.shape[1], bias=False, activation_function=nn.Identity(), init_weight=weight)
    return SentenceTransformer(modules=[*modules, head, Normalize()], device=str(teacher.device), **prompts_of(teacher))


def _embed_roughly(modules: list[nn.Module], texts: Sequence[str]) -> Matrix:
    """Return what a transformer and a pooling make of texts, (n_texts, width), roughly and without padding."""
    transformer: Any = modules[0]
    found = transformer.tokenizer(list(texts), truncation=True, max_length=transformer.max_seq_length)["input_ids"]
    ids = [torch.tensor(one) for one in found]
    body = PackedBody(transformer.model, rough_format())

    def run(numbers: list[int]) -> tuple[list[int], Tensor]:
        states = body.forward([ids[number] for number in numbers])
        return numbers, torch.cat([pool(modules[1], some) for some in states])

    pooling: Any = modules[1]
    pooled = np.empty((len(ids), pooling.get_embedding_dimension()), np.float32)
    batches = cut_batches([len(one) for one in ids], _BATCH_TOKENS, padded=False)
    with one_thread_a_batch() as threads, progress_bar("student encodes", len(ids), "texts") as advance:
        for numbers, vectors in threads.map(run, batches):
            pooled[numbers] = vectors.numpy()
            advance(len(numbers))
    return pooled


def list_body(model: SentenceTransformer) -> list[nn.Module]:
    """Return the modules of a model without what makes its vectors unit: what a head can be put on."""
    modules: list[nn.Module] = [copy.deepcopy(module) for module in model]
    for module in modules:
        if isinstance(module, Pooling):
            module.include_prompt = True  # prompts are parts of the texts that a student is trained on
    return [module for module in modules if not isinstance(module, Normalize)]


def _trim(transformer: Any, texts: Iterable[str], size: int) -> int:
    """Cut the vocabulary of a transformer module, its table, its tokenizer and its settings; return the pieces left."""
    tokenizer, model = transformer.tokenizer, transformer.model
    kept = choose_pieces(tokenizer, count_pieces(tokenizer, texts), size)
    table = find_words(model)
    places = {old: new for new, old in enumerate(kept)}
    padding = table.padding_idx
    table.weight = nn.Parameter(table.weight[kept].detach().clone())
    table.num_embeddings, table.padding_idx = len(kept), None if padding is None else places[padding]
    model.config.vocab_size = len(kept)
    for name in _SPECIAL_IDS:
        old = getattr(model.config, name, None)
        if isinstance(old, int):
            setattr(model.config, name, places.get(old))
    transformer.processor = trim_tokenizer(tokenizer, kept)
    return len(kept)


def _is_fitted(model: Any, sizes: Sizes, n_tokens: int) -> bool:
    """Say whether a student is fitted. Where it only loses some layers, or on few tokens, it is better cut."""
    own = read_sizes(model.config.to_dict())
    whole = replace(sizes, layers=own.layers) == own
    better_cut = sizes.layers > _MOST_FITTED * own.layers or n_tokens < _FEWEST_TOKENS * sizes.intermediate_size
    return can_pack(model) and not (whole and better_cut)


def tokenize(transformer: Any, texts: Sequence[str]) -> list[Tensor]:
    """Return the token ids of the first texts, up to 256 of each and 120,000 in all."""
    length = min(_FIT_LENGTH, transformer.max_seq_length or _FIT_LENGTH)
    found: list[Tensor] = []
    n_tokens = 0
    for start in range(0, len(texts), 1000):
        some = list(texts[start : start + 1000])
        for ids in transformer.tokenizer(some, truncation=True, max_length=length)["input_ids"]:
            n_tokens += len(ids)
            if found and n_tokens > _FIT_TOKENS:
                return found
            found.append(torch.tensor(ids))
    return found
