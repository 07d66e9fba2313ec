"""Answers that are kept: what identical calls need not ask for again."""
