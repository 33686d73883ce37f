"""The report of a run: its record, and how it is told and drawn."""
