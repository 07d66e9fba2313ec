"""Storage: the database of the ledger, and volatile state in memory or Redis. The only package that
imports database drivers.
"""
