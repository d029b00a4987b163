r"""A model that model2vec distilled, as a sentence-transformers folder to evaluate beside embedistill's students.

    python -m venv m2v
    m2v/bin/pip install 'model2vec[distill]'
    m2v/bin/python -c "from model2vec.distill import distill; distill('TEACHER').save_pretrained('m2v-model')"
    python eval/from_model2vec.py m2v-model model2vec
    embedistill evaluate runs/mpnet-static --teacher TEACHER --baseline model2vec --data SETS

It has an environment of its own since it needs an older transformers. `distill` sees no text: the teacher encodes each
piece of its vocabulary alone, PCA cuts that to 256 dimensions, and SIF weighs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer


def main() -> None:
    """Convert a folder of model2vec."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="what save_pretrained wrote")
    parser.add_argument("out", type=Path, help="new folder")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.source / "tokenizer.json"))
    vectors = load_file(given.source / "model.safetensors")["embeddings"]
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors), Normalize()]).save(
        str(given.out)
    )


if __name__ == "__main__":
    main()
