"""The virtual filesystem: paths, listings, open files."""
