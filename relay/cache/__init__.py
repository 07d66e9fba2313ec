"""The cache: stored responses, and calls in flight that identical calls share."""
