"""Reference modules in torch, whose attributes are the keys of checkpoints."""
