"""Just enough of the NATS protocol to check a server and to make a request where the `nats` CLI is not installed.

Invariant: nothing that the server says is passed over in silence; an error of its is raised.
"""

import json
import secrets
import socket
from collections import namedtuple
from urllib.parse import unquote, urlsplit

Message = namedtuple("Message", "subject reply headers body")


class NatsError(Exception):
    pass


class Connection:
    def __init__(self, url, timeout=5):
        url = urlsplit(url if "://" in url else "nats://" + url)
        self.socket = socket.create_connection((url.hostname, url.port or 4222), timeout)
        self.stream = self.socket.makefile("rwb")
        self.subscriptions = 0
        self.messages = []
        try:
            self._log_in({"user": unquote(url.username or ""), "pass": unquote(url.password or "")})
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.socket.close()

    def subscribe(self, subject, queue=""):
        self.subscriptions += 1
        self.stream.write(b"SUB %s %s %d\r\n" % (subject.encode(), queue.encode(), self.subscriptions))

    def publish(self, subject, body=b"", reply="", headers=()):
        block = b"NATS/1.0\r\n" + b"".join(b"%s: %s\r\n" % (n.encode(), v.encode()) for n, v in headers) + b"\r\n"
        sizes = (len(block), len(block) + len(body))
        self.stream.write(b"HPUB %s %s %d %d\r\n" % (subject.encode(), reply.encode(), *sizes) + block + body + b"\r\n")

    def request(self, subject, body=b"", headers=()):
        inbox = "_INBOX." + secrets.token_hex(11)
        self.subscribe(inbox)
        self.publish(subject, body, inbox, headers)
        self.stream.flush()
        return self.next()

    def flush(self):
        """Returns when the server has seen everything sent so far."""
        self.stream.write(b"PING\r\n")
        self.stream.flush()
        while True:
            message = self._read()
            if message is None:
                return
            self.messages.append(message)

    def next(self):
        while not self.messages:
            message = self._read()
            if message:
                self.messages.append(message)
        return self.messages.pop(0)

    def _log_in(self, login):
        self.info = json.loads(self._line()[len("INFO ") :])
        options = {"verbose": False, "pedantic": False, "lang": "python", "headers": True, "no_responders": True}
        self.stream.write(b"CONNECT %s\r\n" % json.dumps({**login, **options}).encode())
        self.flush()

    def _read(self):
        """The next message, or None for the answer to a ping."""
        while True:
            line = self._line()
            kind, _, rest = line.partition(" ")
            if kind in ("MSG", "HMSG"):
                return self._message(rest.split(), kind == "HMSG")
            if kind == "PONG":
                return None
            if kind == "PING":
                self.stream.write(b"PONG\r\n")
                self.stream.flush()
            elif kind == "-ERR":
                raise NatsError(rest.strip("'"))

    def _message(self, fields, with_headers):
        sizes = [int(size) for size in fields[-2 if with_headers else -1 :]]
        reply = fields[2] if len(fields) == 3 + len(sizes) else ""
        data = self.stream.read(sizes[-1] + 2)[:-2]
        block = data[: sizes[0]] if with_headers else b""
        return Message(fields[0], reply, block.decode().strip().split("\r\n"), data[len(block) :])

    def _line(self):
        line = self.stream.readline()
        if not line:
            raise ConnectionError("NATS closed the connection")
        return line.decode().rstrip("\r\n")
