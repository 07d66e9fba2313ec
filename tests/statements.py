"""Share compiled SQL statements among the databases of a test process.

SQLAlchemy compiles each statement once for each of its engines, and each test has new engines. This
saves a tenth of the CPU time of the tests with a database.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy.engine import Dialect, Engine


class _Statements(dict[Any, Any]):
    """Compiled statements by SQLAlchemy's keys without their first part, the engine's dialect."""

    def get(self, key: tuple[Any, ...], default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __setitem__(self, key: tuple[Any, ...], compiled: Any) -> None:
        super().__setitem__(key[1:], compiled)


_BY_DIALECT: dict[type[Dialect], _Statements] = defaultdict(_Statements)
_create = Engine.__init__


def _create_sharing(engine: Engine, pool: Any, dialect: Dialect, *arguments: Any, **options: Any) -> None:
    _create(engine, pool, dialect, *arguments, **options)
    engine._compiled_cache = _BY_DIALECT[type(dialect)]  # type: ignore[assignment]


def share_compiled_statements() -> None:
    """Let all engines that are created from now on share what they compile."""
    Engine.__init__ = _create_sharing  # type: ignore[method-assign]
