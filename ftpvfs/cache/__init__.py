"""What lies on this machine's disk: the index shared by all processes."""
