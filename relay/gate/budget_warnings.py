"""Warn when most of a budget is spent: once for each level and period, over all processes.

Owns the look at the budgets of this process, every few seconds: the log event and the count of a
warning, and the update of the accounts with what all processes have spent, from which the headers
of responses come (core/budget_headers.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from relay import log
from relay.core.budgets import Account, utc_text
from relay.core.pricing import usd_text
from relay.gate.leases import Leases
from relay.storage.budget_reports import BudgetReport, BudgetReports


class BudgetWarnings:
    """The warnings of this process."""

    def __init__(self, leases: Leases, reports: BudgetReports) -> None:
        self._leases, self._reports = leases, reports
        self._reserved: dict[str, int] = {}
        """What the database has as reserved of each lease; without those that have nothing."""

    async def look(self) -> None:
        """Warn of budgets that have reached a level. Raises what BudgetReports raises."""
        leases = self._leases
        accounts = leases.accounts
        if not accounts:
            return
        await self._note_reserved(accounts)
        near = await self._reports.near_limit(leases.worker, leases.clock())
        found = {(report.key, report.period_start_s): report for report in near}
        for account in accounts:
            report = found.get((account.key, account.span.start_s))
            own_nano = account.written.total_nano
            if report is not None:
                account.note_others(report.lost_nano - own_nano, report.raised_nano)
            elif account.is_near_limit:
                # It was raised or reset.
                account.note_others(-own_nano, account.raised_nano)
        for report in near:
            level = report.level
            if level > report.warned and await self._reports.warn(report, level):
                self._warn(report, level)

    async def _note_reserved(self, accounts: Sequence[Account]) -> None:
        reserved = {each.lease_id: each.reserved_nano for each in accounts if each.is_stored}
        known = self._reserved
        await self._reports.note_reserved(
            {id: nano for id, nano in reserved.items() if nano != known.get(id, 0)}
        )
        self._reserved = {id: nano for id, nano in reserved.items() if nano}

    def _warn(self, report: BudgetReport, level: int) -> None:
        self._leases.counts.warnings[report.rule, level] += 1
        end_s = report.period_end_s
        log.warn(
            "budgets.warning",
            budget=report.rule,
            subject=report.subject,
            percent=level,
            spent_usd=usd_text(report.lost_nano),
            limit_usd=usd_text(report.limit_nano + report.raised_nano),
            resets_at=None if end_s is None else utc_text(end_s),
        )
