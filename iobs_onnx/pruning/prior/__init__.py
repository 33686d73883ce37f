"""What is decided before the first walk: how much of each site, and in which order of channels."""
