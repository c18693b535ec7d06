"""Benchmarks: each answers one question and writes JSON."""
