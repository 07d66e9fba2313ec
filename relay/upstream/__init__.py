"""Connections to providers; no other package connects to them."""
