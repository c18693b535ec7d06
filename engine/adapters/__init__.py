"""Adapters: what is added to a model's weights, or to its words, before it runs."""
