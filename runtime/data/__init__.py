"""Calibration data of every kind, as feeds."""
