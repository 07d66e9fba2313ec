"""gateway.yaml, read, checked and frozen."""
