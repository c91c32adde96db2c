"""Embedding, exact search, verification pairs, and what is measured with them."""
