"""What every pass knows of a graph: its tensors, names, attributes and walks over it."""
