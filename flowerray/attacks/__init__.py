"""Attacks on an embedder's retrieval: our own projected gradient descent, and a bank of others."""
