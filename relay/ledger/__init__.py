"""The ledger: records of calls, their usage and cost, and the reports of them."""
