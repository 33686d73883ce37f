"""Activations to measure: exposed, cut into segments, and taken out to be run."""
