"""What clients reach over HTTP: calls, management, reports, health."""
