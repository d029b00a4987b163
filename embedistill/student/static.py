"""A static student: a vector a piece and no layers; a text's vector is the mean of those of its pieces.

Vectors of pieces distilled as in model2vec (Tulkens and van Dongen, 2024), each piece encoded alone and weighted by how
rare it is (SIF: Arora et al., 2017), then solved for: by ridge regression, on texts, onto the teacher's vectors. Beside
what the teacher makes of a piece alone, its embedding before the first layer is given to the regression. What the
regression leaves of each text is shared out over its pieces by a second one, in its dual form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor

from embedistill.encoding.packed import PackedBody, can_pack, pool, rough_format
from embedistill.progress import progress_bar
from embedistill.student.head import Matrix, solve_ridge
from embedistill.student.vocabulary import choose_pieces, count_pieces, trim_tokenizer
from embedistill.teacher import prompts_of

_RARITY = 1e-3  # a of SIF: pieces more frequent than this weigh less
_RIDGE = 1e-2
_DUAL_RIDGE = 3.0
_BATCH = 1_024


def build_static(
    teacher: SentenceTransformer,
    texts: Sequence[str],
    targets: Matrix,
    *,
    vocabulary_size: int | None = None,
    counted: Iterable[str] = (),
) -> SentenceTransformer:
    """Build an untrained student without layers.

    Args:
        teacher: The teacher in fp32; it is left as it is.
        texts: Texts to solve for the vectors on, as the model sees them: with their prompts.
        targets: Their vectors in the student's space, shape (n_texts, embedding_size).
        vocabulary_size: How many pieces to keep; default: all.
        counted: Texts whose pieces are counted; default: those to solve on.

    Returns:
        A plain SentenceTransformer of built-in modules: StaticEmbedding, Normalize.
    """
    tokenizer: Any = teacher.tokenizer
    counts = count_pieces(tokenizer, counted or texts)
    kept = choose_pieces(tokenizer, counts, vocabulary_size or len(counts))
    trimmed: Any = tokenizer if len(kept) == len(counts) else trim_tokenizer(tokenizer, kept)
    backend = Tokenizer.from_str(trimmed.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    share = ((counts[kept] + 0.5) / (counts[kept] + 0.5).sum()).astype(np.float32)
    features = _describe_pieces(teacher, kept) * (_RARITY / (_RARITY + share))[:, None]
    uses = _count_uses(backend, texts, len(kept))
    table = features @ solve_ridge((uses @ features).astype(np.float32), targets, _RIDGE)
    table += _share_out(uses, targets - uses @ table)
    module = StaticEmbedding(backend, embedding_weights=table.astype(np.float32))
    return SentenceTransformer(modules=[module, Normalize()], device=str(teacher.device), **prompts_of(teacher))


@torch.inference_mode()
def _describe_pieces(teacher: SentenceTransformer, pieces: list[int]) -> Matrix:
    """Return what each piece is before the first layer and what the teacher makes of it alone, in equal scale."""
    transformer: Any = teacher[0]
    tokenizer: Any = teacher.tokenizer
    around = tokenizer("")["input_ids"]  # the special tokens before and behind
    place = min(1, len(around))
    ids = torch.tensor([[*around[:place], piece, *around[place:]] for piece in pieces], device=teacher.device)
    packed = PackedBody(transformer.model, rough_format()) if can_pack(transformer.model) else None
    alone: list[Tensor] = []
    encoded: list[Tensor] = []
    with progress_bar("teacher encodes pieces", len(pieces), "pieces") as advance:
        for some in ids.split(_BATCH):  # type: ignore[no-untyped-call]
            if packed:
                states = packed.forward(list(some))[0]
            else:
                states = transformer.model(input_ids=some, attention_mask=torch.ones_like(some)).last_hidden_state
            alone.append(transformer.model.embeddings(input_ids=some[:, place : place + 1])[:, 0].float().cpu())
            encoded.append(pool(teacher[1], states.float()).cpu())
            advance(len(some))
    return torch.cat([part / part.std() for part in (torch.cat(alone), torch.cat(encoded))], 1).numpy()


def _count_uses(tokenizer: Tokenizer, texts: Sequence[str], n_pieces: int) -> Any:
    """Return the share of each piece in each text, as a sparse matrix (n_texts, n_pieces)."""
    found = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    rows = np.repeat(np.arange(len(found)), [len(ids) for ids in found])
    shares = np.repeat([1 / max(1, len(ids)) for ids in found], [len(ids) for ids in found])
    columns = np.fromiter((piece for ids in found for piece in ids), np.int64)
    return scipy.sparse.csr_matrix((shares, (rows, columns)), (len(found), n_pieces))


def _share_out(uses: Any, residual: Matrix) -> Matrix:
    """Return the smallest change of the pieces' vectors that explains what is left of each text, damped."""
    kernel = (uses @ uses.T).toarray()
    kernel += _DUAL_RIDGE * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    changed: Matrix = uses.T @ np.linalg.solve(kernel, residual)
    return changed
