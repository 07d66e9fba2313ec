"""Meters: what looks at passing bytes and tells usage. They change nothing and never raise."""
