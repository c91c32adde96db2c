"""Measurements: embedding, retrieval, verification pairs, statistics."""
