"""Graphs: an architecture as ONNX without weights, and what goes in and comes out."""
