"""Commands of the command line, one family a file; each adds its parsers with `add(commands)`."""
