"""Flowers that are painted: the data set that needs no network."""
