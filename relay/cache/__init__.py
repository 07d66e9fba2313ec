"""The cache: stored answers, and calls in flight that identical calls share."""
