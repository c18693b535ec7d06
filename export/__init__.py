"""Reference modules in torch, and their tracing to ONNX."""
