"""Compare models on STS, FAISS retrieval and agreement with the teacher, with an interval on every figure."""
