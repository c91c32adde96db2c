"""Retrieval under attack: measured, audited, watched."""
