"""Read and check gateway.yaml, and build frozen objects from it."""
