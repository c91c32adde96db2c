"""The methods under one budget."""
