"""Just enough of MongoDB's protocol to set a server up: BSON, OP_MSG, and login by SCRAM-SHA-256.

There is no mongosh in the wheels. Invariant: a command either returns the server's reply with `ok: 1`, or raises.
"""

import base64
import hashlib
import hmac
import secrets
import socket
import struct


class MongoError(Exception):
    def __init__(self, reply):
        super().__init__(reply.get("errmsg", "no reason given"))
        self.code = reply.get("code")


class Raw(bytes):
    """A value that has no use here (an object id, a timestamp …), kept so that it can be sent back as it came."""

    def __new__(cls, kind, data):
        raw = super().__new__(cls, data)
        raw.kind = kind
        return raw


class Connection:
    def __init__(self, port, timeout=10):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.request = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def run(self, database, command):
        """`command` is a dict whose first key is the command's name."""
        self.request += 1
        body = struct.pack("<I", 0) + b"\0" + encode({**command, "$db": database})
        self.socket.sendall(struct.pack("<iiii", 16 + len(body), self.request, 0, 2013) + body)
        (length,) = struct.unpack("<i", self._read(4))
        reply = decode(self._read(length - 4)[12 + 5 :])
        if reply.get("ok") != 1:
            raise MongoError(reply)
        return reply

    def login(self, user, password):
        first = "n=%s,r=%s" % (user, secrets.token_urlsafe(24))
        start = {"saslStart": 1, "mechanism": "SCRAM-SHA-256", "payload": b"n,," + first.encode()}
        reply = self.run("admin", {**start, "options": {"skipEmptyExchange": True}})
        final, signature = scram(password, first, reply["payload"].decode())
        proof = {"saslContinue": 1, "conversationId": reply["conversationId"], "payload": final.encode()}
        if self.run("admin", proof)["payload"].decode() != "v=" + signature:
            raise MongoError({"errmsg": "the server does not know the password"})

    def _read(self, count):
        data = b""
        while len(data) < count:
            chunk = self.socket.recv(count - len(data))
            if not chunk:
                raise ConnectionError("MongoDB closed the connection")
            data += chunk
        return data


def scram(password, client_first, server_first):
    """The client's last message and the signature that the server must answer with (RFC 5802, RFC 7677)."""
    fields = dict(part.split("=", 1) for part in server_first.split(","))
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(fields["s"]), int(fields["i"]))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    without_proof = "c=biws,r=" + fields["r"]
    message = ",".join((client_first, server_first, without_proof)).encode()
    signature = hmac.digest(hashlib.sha256(client_key).digest(), message, "sha256")
    proof = bytes(a ^ b for a, b in zip(client_key, signature))
    server = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), message, "sha256")
    return without_proof + ",p=" + base64.b64encode(proof).decode(), base64.b64encode(server).decode()


def encode(document):
    body = b"".join(_element(str(name), value) for name, value in document.items())
    return struct.pack("<i", len(body) + 5) + body + b"\0"


def _element(name, value):
    if value is None:
        kind, data = 0x0A, b""
    elif isinstance(value, bool):
        kind, data = 0x08, struct.pack("<?", value)
    elif isinstance(value, int):
        small = -(2**31) <= value < 2**31
        kind, data = (0x10, struct.pack("<i", value)) if small else (0x12, struct.pack("<q", value))
    elif isinstance(value, float):
        kind, data = 0x01, struct.pack("<d", value)
    elif isinstance(value, str):
        text = value.encode() + b"\0"
        kind, data = 0x02, struct.pack("<i", len(text)) + text
    elif isinstance(value, Raw):
        kind, data = value.kind, value
    elif isinstance(value, bytes):
        kind, data = 0x05, struct.pack("<iB", len(value), 0) + value
    elif isinstance(value, dict):
        kind, data = 0x03, encode(value)
    elif isinstance(value, list):
        kind, data = 0x04, encode(dict(enumerate(value)))
    else:
        raise TypeError("no BSON for %r" % type(value))
    return bytes([kind]) + name.encode() + b"\0" + data


def decode(data):
    raw = {0x07: 12, 0x09: 8, 0x11: 8, 0x13: 16}  # object id, date, timestamp, decimal
    numbers = {0x01: "<d", 0x08: "<?", 0x10: "<i", 0x12: "<q"}
    document, at = {}, 4
    while data[at]:
        kind = data[at]
        end = data.index(b"\0", at)
        name, at = data[at + 1 : end].decode(), end + 1
        if kind in numbers:
            size = struct.calcsize(numbers[kind])
            (value,) = struct.unpack_from(numbers[kind], data, at)
        elif kind in raw:
            size = raw[kind]
            value = Raw(kind, data[at : at + size])
        elif kind == 0x0A:
            size, value = 0, None
        else:
            (length,) = struct.unpack_from("<i", data, at)
            if kind == 0x02:
                size = 4 + length
                value = data[at + 4 : at + size - 1].decode()
            elif kind == 0x05:
                size = 5 + length
                value = data[at + 5 : at + size]
            elif kind in (0x03, 0x04):
                size = length
                value = decode(data[at : at + size])
                value = list(value.values()) if kind == 0x04 else value
            else:
                raise ValueError("unexpected BSON type 0x%02x" % kind)
        document[name] = value
        at += size
    return document
