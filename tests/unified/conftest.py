"""Fixtures of the tests of /v1."""

from __future__ import annotations

import pytest

from relay.upstream.model_lists import ModelLists


@pytest.fixture
def no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch no lists of models, which test_lists.py tests: the price list has the models then."""
    monkeypatch.setattr(ModelLists, "refresh", lambda *_: None)
