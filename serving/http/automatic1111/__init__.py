"""Automatic1111's API: its bodies, names, options and answers over the jobs of this server."""
