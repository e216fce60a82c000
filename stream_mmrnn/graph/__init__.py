"""ONNX files: read, checked, edited and run. Only `runtime` imports onnxruntime."""
