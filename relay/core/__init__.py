"""Pure parts: no socket, no file, no clock of their own. Imports nothing of the relay."""
