"""Connections to NATS and MongoDB by their own libraries, which lie beside the servers' programs.

Invariant: whatever a server does not do is raised as `NotYet`, within the timeout.
"""

import asyncio
import socket
import sys
from contextlib import contextmanager

import programs


class NotYet(Exception):
    """The server does not answer, or not as it should."""


class WrongPassword(NotYet):
    """The server answers, and refuses the login."""


@contextmanager
def mongodb(port, user=None, password=None, timeout=10):
    """A client of this one server, whatever its replica set is. Without a user it is not logged in."""
    _find_libraries()
    from pymongo import MongoClient
    from pymongo.errors import PyMongoError

    # The library would wait for a server that is not there.
    socket.create_connection(("127.0.0.1", port), timeout).close()
    options = {name: timeout * 1000 for name in ("serverSelectionTimeoutMS", "connectTimeoutMS", "socketTimeoutMS")}
    if user:
        options.update(username=user, password=password, authSource="admin", authMechanism="SCRAM-SHA-256")
    with MongoClient("127.0.0.1", port, directConnection=True, **options) as client:
        try:
            yield client
        except PyMongoError as error:
            raise (WrongPassword if getattr(error, "code", None) == 18 else NotYet)(str(error)) from error


def nats(url, work, timeout=5):
    """What `await work(connection, refusals)` returns; the server's refusals gather in that list as they come."""
    _find_libraries()
    import nats as library

    async def talk():
        refusals = []

        async def refused(error):
            refusals.append(error)

        options = {"connect_timeout": timeout, "allow_reconnect": False, "error_cb": refused}
        connection = await library.connect(url, **options)
        try:
            return await work(connection, refusals)
        finally:
            await connection.close()

    try:
        return asyncio.run(asyncio.wait_for(talk(), 3 * timeout))
    except (library.errors.Error, asyncio.TimeoutError) as error:
        raise NotYet(str(error) or type(error).__name__) from error


def _find_libraries():
    path = str(programs.programs() / programs.LIBRARIES)
    if path not in sys.path:
        sys.path.insert(0, path)
