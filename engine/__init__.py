"""Graphs, weights and engines of a model, without torch."""

import os
import sys

TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"
# Whether an app has imported that library before, so that it has begun to report its use already.
TELEMETRY_BEGAN = "onnxruntime" in sys.modules and os.environ.get(TELEMETRY_VARIABLE) != "1"
# ONNX Runtime's own wheels report their use: as soon as they are imported they write a device id
# into the home folder and look up a server, unless this is set. Here, because every process of
# this project imports this package before that library.
os.environ[TELEMETRY_VARIABLE] = "1"
