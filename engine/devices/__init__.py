"""A device beside the processor: its memory and its queue of work."""
