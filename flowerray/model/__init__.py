"""The embedder, and how its arithmetic is done."""
