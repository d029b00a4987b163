"""The closed vocabularies that recipes, the command line and the code behind them share."""

from __future__ import annotations

from typing import Literal

Kind = Literal["plain", "query", "document"]
"""What a text is, for models that have a prompt for each: `encode`, `encode_query`, `encode_document`."""

Dtype = Literal["auto", "float32", "bfloat16"]
"""The number format of matrix products; auto: bfloat16 where it is measured faster."""

Storage = Literal["float32", "float16", "bfloat16", "int8"]
"""The number format that a cache keeps vectors in."""

Fault = Literal["not-finite", "zero-norm", "cut", "equal", "outlier"]
"""The vector has a number that is not finite; no direction; its text was longer than the model sees; another text has
the very same vector; its neighbours are far away."""

By = Literal["random", "source", "length", "cost", "diversity"]
"""How texts are selected."""

Phase = Literal["all", "pairs", "queries"]
"""The texts of a phase of training."""

Curve = Literal["linear", "cosine"]
"""How a number goes from one value to another."""

OnBad = Literal["error", "skip"]
"""What becomes of what cannot be read: one error, or left out and counted."""

IndexKind = Literal["flat", "hnsw", "ivfpq"]
"""The FAISS index that retrieval is measured with."""

Encodes = Literal["student", "teacher"]
"""Who encodes the documents that are searched."""
