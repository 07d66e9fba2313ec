"""Processes and their sockets: listen, serve, drain, supervise workers, shed load."""
