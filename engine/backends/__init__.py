"""Backends: what runs a graph with its weights, one folder for each library."""
