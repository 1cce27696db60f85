"""A stack: one directory with the data, passwords, logs and running processes of its own NATS, PostgreSQL and MongoDB.

Invariant: whatever was interrupted, `up` goes on from there and `down` stops exactly what was started; the directory is
changed by one script at a time, and only if it is a stack's.
"""

import errno
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import processes
import programs
from processes import Failure, Record, say
from servers import ENVIRONMENT, NO_ANSWER, MongoDB, Nats, Postgres

SERVERS = (Nats, Postgres, MongoDB)
NAMES = tuple(server.name for server in SERVERS)

PATIENCE = 90  # seconds for a server to answer or to end; PostgreSQL and MongoDB may have a journal to replay


def default_home():
    return os.environ.get("WATERSHED_STACK") or programs.CHECKOUT / ".stack"


def default_ports():
    """Those that the user wants instead of the usual ones."""
    variables = {name: "WATERSHED_%s_PORT" % name.upper() for name in NAMES}
    try:
        return {name: int(os.environ[variable]) for name, variable in variables.items() if os.environ.get(variable)}
    except ValueError as error:
        raise Failure("a WATERSHED_…_PORT is not a port: %s" % error)


class Stack:
    def __init__(self, home, mongodb_cache=1.0):
        self.home = Path(home).resolve()
        self.mongodb_cache = mongodb_cache  # in GB
        self.started = []  # the names of the servers that this script started

    def up(self, names=NAMES, ports=None, free_ports=False, test_databases=False, while_pid=None):
        """Returns when all of `names` answer."""
        with self._locked():
            self._claim()
            self.programs  # fetched before anything is started
            self._state["test_databases"] |= test_databases
            if while_pid:
                self._start_keeper(while_pid)
            servers = [server(self) for server in SERVERS if server.name in names]
            try:
                for server in servers:
                    if not self.record(server.name).pid():
                        self.started.append(server.name)
                        self._start(server, (ports or {}).get(server.name), free_ports)
                for server in servers:
                    self._await(server, free_ports)
                self._write_env()
            except BaseException:
                # A Ctrl-C too leaves nothing half started.
                self._stop(self.started)
                raise

    def down(self, names=NAMES, wipe=False):
        """Stops what runs and returns its names; the data stays unless `wipe`."""
        if not self.exists():
            return []
        with self._locked():
            if wipe:
                self._refuse_wiping_under_services()
            if wipe or set(names) == set(NAMES):
                self._stop_keeper()
            stopped = self._stop(names)
            if wipe:
                self._wipe()
        return stopped

    def status(self):
        """For each server: its name, its port if it ever had one, and what is wrong, if anything is."""
        return [(server.name, *self._state_of(server)) for server in SERVERS]

    def env(self):
        try:
            return (self.home / "env").read_text()
        except FileNotFoundError:
            raise Failure("no stack has been started in %s" % self.home)

    def keep(self, pid, start):
        """Ends the stack, data and all, when the process has ended."""
        while processes.start_time(pid) == start:
            time.sleep(0.5)
        self.down(wipe=True)

    def claim(self):
        """Makes the directory a stack's, with passwords, and places for records and logs."""
        with self._locked():
            self._claim()

    def exists(self):
        return self._secrets_file.exists()

    def urls(self):
        """Those of the servers that run."""
        running = [server(self) for server in SERVERS if self.record(server.name).pid()]
        return {name: url for server in running for name, url in server.urls(self._state["ports"][server.name]).items()}

    def knows(self, url):
        """Whether the URL is, or was, one of this stack's."""
        return self.exists() and self.masked(url) != url

    # What the servers ask of their stack.

    @cached_property
    def programs(self):
        return programs.programs()

    @property
    def test_databases(self):
        return self._state["test_databases"]

    def secret(self, name):
        # A stack that was made before there was this user has none until it is next brought up.
        return self._secrets.get(name)

    def record(self, name):
        return Record(self.home / "run" / (name + ".json"))

    @property
    def bin(self):
        """For programs that are typed by name once `env` has been read."""
        return self.home / "bin"

    def link(self, name, program):
        """Makes a program one of those."""
        self.bin.mkdir(exist_ok=True)
        new = self.bin / (name + ".new")
        with suppress(FileNotFoundError):
            new.unlink()
        new.symlink_to(program)
        new.replace(self.bin / name)

    def log(self, name):
        return self.home / "log" / (name + ".log")

    def masked(self, text):
        for secret in self._secrets.values():
            text = text.replace(secret, "***")
        return text

    # How.

    def _locked(self):
        return processes.lock(self.home / "lock", 900, "waiting: another script is at work on %s" % self.home)

    def _claim(self):
        if not self.exists():
            strange = [entry.name for entry in self.home.iterdir() if entry.name not in ("lock", "servers")]
            if any(not name.endswith(".new") for name in strange):
                raise Failure("%s is neither empty nor a stack's directory" % self.home)
            processes.write_private(self._secrets_file, json.dumps(_new_secrets()))
        elif _new_secrets().keys() - self._secrets.keys():
            # The stack was made before there were all of these users.
            self._secrets = {**_new_secrets(), **self._secrets}
            processes.write_private(self._secrets_file, json.dumps(self._secrets))
        for part in ("run", "log"):
            (self.home / part).mkdir(mode=0o700, exist_ok=True)

    def _start(self, server, wanted, free_ports):
        ports = self._state["ports"]
        others = [port for name, port in ports.items() if name != server.name]
        preferred = wanted or ports.get(server.name) or (_random_port() if free_ports else server.port)
        port = _free_port(preferred, others, free_ports)
        if port != preferred:
            say("%-10s port %d is taken, so %d" % (server.name, preferred, port))
        ports[server.name] = port
        processes.write_private(self.home / "state.json", json.dumps(self._state))
        server.start(port)

    def _await(self, server, free_ports):
        started = server.name in self.started
        deadline = time.monotonic() + PATIENCE
        while True:
            port = self._state["ports"][server.name]
            pid = self.record(server.name).pid()
            try:
                if pid:
                    server.set_up(port)
                    say("%-10s 127.0.0.1:%d %s" % (server.name, port, "started" if started else "already running"))
                    return
                trouble = "ended as soon as it was started"
            except NO_ANSWER as error:
                trouble = "does not answer on port %d: %s" % (port, error)
            if not pid and started and _taken(port):
                # Somebody took the port after we looked.
                self._start(server, None, free_ports)
            elif not pid or time.monotonic() > deadline:
                log = self.log(server.name)
                raise Failure(self.masked("%s %s\n%s:\n%s" % (server.name, trouble, log, processes.last_lines(log))))
            time.sleep(0.1)

    def _stop(self, names):
        running = {self.record(server.name): server.stop_signal for server in SERVERS if server.name in names}
        stopped = [record.name for record in running if record.pid()]
        processes.stop(running, PATIENCE)
        return stopped

    def _state_of(self, server):
        if not self.exists():
            return None, "not running"
        port = self._state["ports"].get(server.name)
        if not self.record(server.name).pid():
            return port, "not running"
        try:
            return port, server(self).check(port)
        except NO_ANSWER as error:
            return port, "running, but does not answer: " + self.masked(str(error))

    def _write_env(self):
        lines = ["# Made by scripts/stack; read it with: . %s" % shlex.quote(str(self.home / "env"))]
        lines += ["export %s='%s'" % item for item in self.urls().items()]
        # Read twice, it changes nothing more.
        bin = shlex.quote(str(self.bin))
        lines += ['case ":$PATH:" in *:%s:*) ;; *) export PATH=%s:"$PATH" ;; esac' % (bin, bin)]
        processes.write_private(self.home / "env", "\n".join(lines) + "\n")

    def _start_keeper(self, pid):
        start = processes.start_time(pid)
        if not start:
            raise Failure("there is no process %d to wait for" % pid)
        keeper = self.record("keeper")
        if not keeper.pid():
            script = programs.CHECKOUT / "scripts" / "stack"
            argv = [sys.executable, script, "keep", "--dir", self.home, pid, start]
            processes.start(keeper, argv, self.log("keeper"), ENVIRONMENT)

    def _stop_keeper(self):
        keeper = self.record("keeper")
        if keeper.pid() != os.getpid():
            processes.stop({keeper: signal.SIGTERM}, 10)

    def _refuse_wiping_under_services(self):
        ours = [*NAMES, "keeper"]
        for path in (self.home / "run").glob("*.json"):
            if path.stem not in ours and Record(path).pid():
                raise Failure("%s still runs on this data; stop it first with: make down" % path.stem)

    def _wipe(self):
        Postgres(self).wipe()
        for part in ("nats", "mongodb", "log", "run", "bin"):
            if (self.home / part).exists():
                shutil.rmtree(self.home / part)
        # The passwords last but for the lock: without them the rest would not be known as a stack's.
        for file in (*self.home.glob("*.new"), "env", "state.json", "secrets.json", "lock"):
            with suppress(FileNotFoundError):
                (self.home / file).unlink()
        with suppress(OSError):
            self.home.rmdir()

    @property
    def _secrets_file(self):
        return self.home / "secrets.json"

    @cached_property
    def _secrets(self):
        return json.loads(self._secrets_file.read_text())

    @cached_property
    def _state(self):
        try:
            return json.loads((self.home / "state.json").read_text())
        except FileNotFoundError:
            return {"ports": {}, "test_databases": False}


def _new_secrets():
    """Letters and digits, a letter first, so that they can stand in a URL, in SQL and in nats.conf."""
    users = ["nats_" + user for user in Nats.users] + ["postgres_watershed"]
    users += ["mongodb_" + user for user in (*MongoDB.users, "key")]
    return {user: "s" + secrets.token_hex(20) for user in users}


def _free_port(port, others, free_ports):
    while port in others or _taken(port):
        port = _random_port() if free_ports else port + 1
    return port


def _random_port():
    """Below those that the kernel gives to outgoing connections, so that it stays free while a server is down."""
    return random.randrange(15000, 32000)


def _taken(port):
    if port > 65535:
        raise Failure("there is no free port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False
