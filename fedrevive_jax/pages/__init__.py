"""Pages to read in a browser: one file each, which needs no network."""
