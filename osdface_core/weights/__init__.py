"""Weight files: their catalogue, fetching, checking, and reading pickled ones as data."""
