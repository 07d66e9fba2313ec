"""A connection to a provider is used again only while nothing has happened on it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from relay.upstream.protocol import FINAL_STATUSES, ProviderConnection


class Idle(NamedTuple):
    connection: ProviderConnection
    peer: socket.socket


@pytest.fixture
async def idle() -> AsyncIterator[Idle]:
    """An idle connection, and the provider's side of it. Nothing is read while a test runs."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport, connection = await loop.create_connection(lambda: ProviderConnection(FINAL_STATUSES, loop), *listener.getsockname())
        peer, _ = listener.accept()
        with peer:
            yield Idle(connection, peer)
        transport.abort()


async def test_it_is_used_again_while_nothing_has_arrived(idle: Idle) -> None:
    assert idle.connection.is_connected()


async def test_it_is_not_used_again_once_something_has_arrived_that_belongs_to_no_request(idle: Idle) -> None:
    idle.peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
    assert not idle.connection.is_connected()


async def test_it_is_not_used_again_once_the_provider_has_closed_it(idle: Idle) -> None:
    idle.peer.close()
    assert not idle.connection.is_connected()
