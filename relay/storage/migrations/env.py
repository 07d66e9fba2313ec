"""The entry point of Alembic, which runs on a connection of relay/storage/database.py."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transaction_per_migration=False)
context.run_migrations()
