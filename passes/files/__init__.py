"""Models on disk: read without touching weights, refused where unsound, written whole."""
