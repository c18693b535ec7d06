"""TensorRT and TensorRT-RTX: engines that are built, kept and run."""
