"""Steps for tools that prune among other things; each needs its extra, and only its own module."""
