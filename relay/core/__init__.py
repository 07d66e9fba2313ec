"""Pure functions and records: no I/O, no clock, no imports from other packages of the relay."""
