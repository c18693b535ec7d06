"""How pictures are served: what batches gain, what a server costs, and what it keeps."""
