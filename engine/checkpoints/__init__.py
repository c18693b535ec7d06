"""Checkpoints: files of any layout and format, as weights under their graphs' names."""
