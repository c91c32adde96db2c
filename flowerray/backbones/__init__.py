"""Backbones before any training."""
