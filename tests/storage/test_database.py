"""The file of a new SQLite database."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from relay.storage.database import _create

WAL_VERSION = b"\2\2"
"""Bytes 18 and 19 of a database file in WAL mode: https://www.sqlite.org/fileformat2.html"""


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_only_its_owner_can_read_a_new_database(
    has_hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_hard_links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no hard links")))
    file = tmp_path / "data" / "relay.db"
    _create(file)
    _create(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_a_new_database_has_its_name_only_when_it_is_in_wal_mode(tmp_path: Path) -> None:
    """SQLite refuses one of two processes that switch the same file to WAL at once."""
    file = tmp_path / "relay.db"
    _create(file)
    assert file.read_bytes()[18:20] == WAL_VERSION
