"""Procedural pictures of flowers: `species` says what they look like, `blooms` paints them."""
