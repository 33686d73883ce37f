"""Post-training sparsity for ONNX graphs with I-OBS."""
