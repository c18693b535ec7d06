"""Graphs, weights and engines of a model, without torch."""
