"""Price lists, and what a call costs by them."""
