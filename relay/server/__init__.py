"""The serving process: listen, serve, drain, supervise workers, shed load."""
