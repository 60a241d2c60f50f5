"""Adapters trained on a model whose experts stay in a store, and are read layer by layer."""
