"""Train a student on cached teacher embeddings."""
