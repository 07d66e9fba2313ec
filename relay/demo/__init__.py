"""The built-in provider: a first call needs no key."""
