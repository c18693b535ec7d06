"""Graphs, weights and engines of a model, without torch."""

import os

# ONNX Runtime's own wheels report their use: as soon as they are imported they write a device id
# into the home folder and look up a server, unless this is set. Here, because every process of
# this project imports this package before that library.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
