"""Alembic's way in: the connection is given by relay/storage/database.py."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transaction_per_migration=False)
context.run_migrations()
