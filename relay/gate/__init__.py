"""Access control: who a caller is, what it may do, and its limits."""
