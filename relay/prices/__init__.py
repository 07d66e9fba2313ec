"""Price lists, and the cost of calls."""
