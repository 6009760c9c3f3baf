"""A trained network outside the framework: as ONNX or an exported program, and its predictions for image files."""
