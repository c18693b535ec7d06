"""Benchmarks: each answers one question and writes JSON."""

import runtime  # noqa: F401  # which refuses a stranger's package `engine`
