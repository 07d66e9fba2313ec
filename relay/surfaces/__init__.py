"""What clients speak to the relay."""
