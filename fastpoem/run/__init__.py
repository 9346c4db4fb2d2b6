"""A run: the loop, what it logs, what it saves, and `fit`, which puts the house together."""
