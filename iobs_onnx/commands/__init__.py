"""Commands of the command line, one a file; each adds its parser with `add(commands)` and runs."""
