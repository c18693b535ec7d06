"""Hints of pictures, for controls: edges, gray, blurred pixels, a user's ONNX file."""
