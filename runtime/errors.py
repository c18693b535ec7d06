"""What the runtime raises; the tree is drawn in `engine.errors`."""

from engine.errors import (
    BackendError,
    GraphError,
    LatentrtError,
    ModelError,
    OutputError,
    RequestError,
)

__all__ = [
    "BackendError",
    "GraphError",
    "LatentrtError",
    "ModelError",
    "OutputError",
    "RequestError",
]
