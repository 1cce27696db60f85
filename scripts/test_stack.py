"""Tests of the stack on real servers: that it goes on after any interruption, and that each role can do no more than
nats.conf and the databases' users are meant to let it."""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from urllib.parse import urlsplit

sys.dont_write_bytecode = True

import clients  # noqa: E402
import programs  # noqa: E402
import servers  # noqa: E402

SCRIPT = programs.CHECKOUT / "scripts" / "stack"


class OneStack(unittest.TestCase):
    """Each class has a stack of its own, in a directory whose name is awkward on purpose."""

    def setUp(self):
        self.room = tempfile.TemporaryDirectory(prefix="watershed test ")
        self.addCleanup(self.room.cleanup)
        os.chmod(self.room.name, 0o711)
        self.home = Path(self.room.name) / "a stack"
        self.elsewhere = []
        self.addCleanup(self.stack, "down", "--wipe")

    def stack(self, action, *options):
        command = [sys.executable, SCRIPT, action, "--dir", self.home, *options]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)

    def up(self, *options):
        done = self.stack("up", "--free-ports", *options)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def urls(self):
        lines = self.stack("env").stdout.splitlines()
        exports = [line[len("export ") :] for line in lines if line.startswith("export ")]
        return dict(shlex.split(export)[0].split("=", 1) for export in exports)

    def processes(self):
        """Those of this stack; PostgreSQL may have been put elsewhere."""
        postgres = self.home / "postgres"
        if postgres.is_symlink():
            self.elsewhere.append(str(postgres.resolve()) + "/")
        places = [str(self.home) + "/", str(self.home) + "\0", *self.elsewhere]
        return sorted({one for place in places for one in self.processes_of(place)})

    def processes_of(self, directory):
        """The arguments of every process that has this directory among them, or works in it."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes().decode()
                works_in = os.readlink(process / "cwd") + "/"
            except (OSError, UnicodeDecodeError):
                continue
            if directory in arguments or works_in.startswith(directory):
                found.append(arguments.replace("\0", " "))
        return found


class LifeOfAStack(OneStack):
    def test_up_and_down_can_each_be_repeated(self):
        self.assertEqual(self.stack("status").returncode, 1)
        said = self.up()
        self.assertEqual(said.count("started"), 3)
        self.check_that_no_password_is_shown(said)
        self.assertEqual(self.up().count("already running"), 3)
        self.assertEqual(self.stack("status").returncode, 0)
        before = self.urls()
        self.assertIn("nats, postgres, mongodb", self.stack("down").stdout)
        self.assertIn("nothing was running", self.stack("down").stdout)
        self.assertEqual(self.stack("status").returncode, 1)
        self.up()
        self.assertEqual(self.urls(), before)
        self.stack("down", "--wipe")
        self.assertFalse(self.home.exists())
        self.assertEqual(self.processes(), [])

    def check_that_no_password_is_shown(self, said):
        passwords = {urlsplit(url).password for url in self.urls().values()}
        self.assertEqual(len(passwords), 11)
        shown = said + self.stack("status").stdout + "".join(self.processes())
        shown += "".join(log.read_text() for log in (self.home / "log").iterdir())
        self.assertEqual([password for password in passwords if password in shown], [])
        for file in ("env", "secrets.json"):
            self.assertEqual((self.home / file).stat().st_mode & 0o777, 0o600)

    def test_one_server_stops_and_comes_back_on_the_same_port(self):
        self.up()
        before = self.urls()
        for server in ("nats", "postgres", "mongodb"):
            self.assertIn(server, self.stack("down", server).stdout)
            self.assertEqual(self.stack("status").returncode, 1)
            self.up(server)
            self.assertEqual(self.stack("status").returncode, 0)
        self.assertEqual(self.urls(), before)

    def test_killed_servers_are_noticed_and_started_again(self):
        self.up()
        for record in (self.home / "run").glob("*.json"):
            os.kill(int(re.search(r'"pid": (\d+)', record.read_text())[1]), signal.SIGKILL)
        wait_until(lambda: self.stack("status").stdout.count("not running") == 3)
        self.assertEqual(self.up().count("started"), 3)

    def test_goes_on_after_being_killed_at_any_moment(self):
        for mode in (0o711, 0o700):  # as root, PostgreSQL has to be elsewhere if others cannot reach the directory
            os.chmod(self.room.name, mode)
            for _ in range(5):
                started = self.interruptible_up()
                time.sleep(random.uniform(0.1, 2.0))
                started.kill()
                started.wait()
                if random.random() < 0.3:
                    self.stack("down")
            self.up()
            self.assertEqual(self.stack("status").returncode, 0)
            servers = [arguments for arguments in self.processes() if not arguments.startswith("postgres: ")]
            self.assertEqual(len(servers), 3, servers)
            self.assertEqual((self.home / "postgres").is_symlink(), mode == 0o700 and os.geteuid() == 0)
            self.stack("down", "--wipe")
            self.assertEqual((self.processes(), self.home.exists()), ([], False))
            self.assertEqual([place for place in self.elsewhere if os.path.exists(place)], [])

    def test_an_interrupt_leaves_nothing_running(self):
        # NATS is started first; initdb, then, has a PostgreSQL of its own at work; MongoDB comes last.
        for at_work in ("nats-server", " --boot ", "mongod "):
            with self.subTest(at_work=at_work):
                started = self.interruptible_up()
                wait_until(lambda: any(at_work in arguments for arguments in self.processes()))
                started.send_signal(signal.SIGINT)
                self.assertNotEqual(started.wait(120), 0)
                self.assertEqual(self.processes(), [])
                self.stack("down", "--wipe")
                self.assertFalse(self.home.exists())

    def test_what_a_killed_script_has_left_at_work_does_not_hinder_wiping(self):
        started = self.interruptible_up()
        wait_until(lambda: any(" --boot " in arguments for arguments in self.processes()))
        started.kill()
        started.wait()
        said = self.stack("down", "--wipe").stdout
        self.assertFalse(self.home.exists(), said)

    def interruptible_up(self):
        command = [sys.executable, SCRIPT, "up", "--dir", self.home, "--free-ports"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def test_two_at_once_start_it_once(self):
        command = [sys.executable, SCRIPT, "up", "--dir", self.home, "--free-ports"]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = "".join(one.communicate(timeout=300)[0] for one in both)
        self.assertEqual([one.returncode for one in both], [0, 0])
        self.assertEqual((said.count("already running"), said.count(" started")), (3, 3), said)

    def test_a_taken_port_is_named_and_the_next_free_one_used(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            said = self.up("--nats-port", str(port), "--mongodb-port", str(port))
        self.assertIn("nats       port %d is taken, so" % port, said)
        self.assertIn("mongodb    port %d is taken, so" % port, said)
        self.assertEqual(self.stack("status").returncode, 0)

    def test_the_replica_set_follows_a_change_of_port(self):
        self.up("mongodb")
        self.stack("down", "mongodb")
        old = urlsplit(self.urls()["MONGODB_URL"]).port
        self.up("mongodb", "--mongodb-port", str(old + 1))
        self.assertNotEqual(urlsplit(self.urls()["MONGODB_URL"]).port, old)
        self.assertRegex(self.stack("status").stdout, "mongodb .* up\n")

    def test_a_stack_ends_with_the_process_that_it_is_for(self):
        with subprocess.Popen(["sleep", "1000"]) as process:
            self.up("--while-pid", str(process.pid))
            self.assertEqual(self.stack("status").returncode, 0)
            process.kill()
        wait_until(lambda: not self.home.exists() and not self.processes())

    def test_a_stack_of_before_gets_the_users_that_came_later(self):
        self.up("nats")
        before = self.urls()
        self.stack("down")
        secrets = json.loads((self.home / "secrets.json").read_text())
        del secrets["nats_sys"]
        (self.home / "secrets.json").write_text(json.dumps(secrets))
        self.assertIn("not running", self.stack("status").stdout)
        self.up("nats")
        self.assertEqual({**self.urls(), "NATS_SYS_URL": before["NATS_SYS_URL"]}, before)
        self.assertEqual(nats_refuses(self.urls()["NATS_SYS_URL"], "subscribe", ["_INBOX.>"]), [])

    def test_another_directory_is_left_alone(self):
        self.home.mkdir()
        (self.home / "log").write_text("mine")
        for action in (("up",), ("down", "--wipe")):
            self.stack(*action)
            self.assertEqual((self.home / "log").read_text(), "mine")
        self.assertIn("neither empty nor a stack's", self.stack("up").stdout)


class Permissions(OneStack):
    def test_nats_roles(self):
        self.up("nats")
        urls = self.urls()
        urls["NATS_CLIENT_URL"] = urls["NATS_URL"]
        for role, publish, subscribe in NATS_ROLES:
            url = urls["NATS_%s_URL" % role.upper()]
            for action, subjects, allowed in (
                ("publish", NATS_PUBLISHED, publish.split()),
                ("subscribe", NATS_SUBSCRIBED, subscribe.split()),
            ):
                with self.subTest(role=role, action=action):
                    refused = [subject for subject in subjects if subject not in allowed]
                    self.assertEqual(nats_refuses(url, action, subjects), refused)
        self.check_that_queries_are_answered_and_forgeries_not(urls)

    def check_that_queries_are_answered_and_forgeries_not(self, urls):
        async def serve(query, refusals):
            asked = await query.subscribe("qry.user.get", "q")
            await seen(query)

            import nats

            client = await nats.connect(urls["NATS_URL"])
            inbox = await client.subscribe("_INBOX.one")
            await client.publish("qry.user.get", b"{}", "_INBOX.one")
            await query.publish((await asked.next_msg(5)).reply, b"answer")
            self.assertEqual((await inbox.next_msg(5)).data, b"answer")
            # The reply subject is the client's choice: it must not make the service publish an event for it.
            await client.publish("qry.user.get", b"{}", "evt.user.registered")
            await query.publish((await asked.next_msg(5)).reply, b"forged")
            await seen(query)
            await client.close()
            self.assertIn('permissions violation for publish to "evt.user.registered"', str(refusals[0]).lower())

        clients.nats(urls["NATS_QUERY_URL"], serve, timeout=10)

    def test_nats_wants_a_password(self):
        self.up("nats")
        port = urlsplit(self.urls()["NATS_URL"]).port
        for login in ("", "client@", "client:wrong@", "operator:@"):
            with self.subTest(login=login), self.assertRaisesRegex(clients.NotYet, "Authorization Violation"):
                nats_refuses("nats://%s127.0.0.1:%d" % (login, port), "publish", [])

    def test_mongodb_roles(self):
        self.up("mongodb")
        for role, database, command, allowed in MONGODB_RIGHTS:
            with self.subTest(role=role, command=next(iter(command)), database=database):
                self.assertEqual(self.mongodb_allows(role, database, command), allowed)
        self.up("mongodb", "--test-databases")
        for role, allowed in (("PROJECTION_", True), ("QUERY_", False)):
            with self.subTest(role=role):
                self.assertEqual(self.mongodb_allows(role, "test_1", {"insert": "a", "documents": [{"a": 1}]}), allowed)
        self.assertTrue(self.mongodb_allows("QUERY_", "test_1", {"find": "a"}))

    def mongodb_allows(self, role, database, command):
        url = urlsplit(self.urls()["MONGODB_%sURL" % role])
        with clients.mongodb(url.port, url.username, url.password) as client:
            # Code 13: Unauthorized.
            return client[database].command(command, allowable_errors=[13]).get("code") != 13

    def test_mongodb_wants_a_password(self):
        self.up("mongodb")
        port = urlsplit(self.urls()["MONGODB_URL"]).port
        for command in ({"find": "a"}, {"createUser": "a", "pwd": "b", "roles": ["root"]}):
            with self.assertRaises(clients.NotYet), clients.mongodb(port) as client:
                client.admin.command(command)
        with self.assertRaises(clients.WrongPassword), clients.mongodb(port, "operator", "wrong") as client:
            client.admin.command("ping")

    def test_the_postgres_role(self):
        self.up("postgres")
        url = urlsplit(self.urls()["POSTGRES_URL"])
        own = {"PGPASSWORD": url.password, "PGUSER": "watershed", "PGDATABASE": "watershed"}
        more = "select rolsuper or rolcreaterole from pg_roles where rolname = user"
        self.assertEqual(self.psql(url, own, more), "f")
        self.psql(url, own, "create table a (b int); create database other")
        self.assertEqual(self.psql(url, own, "show listen_addresses"), "127.0.0.1")
        for wrong in ({"PGPASSWORD": ""}, {"PGPASSWORD": "wrong"}, {"PGUSER": "postgres"}):
            with self.subTest(wrong=wrong), self.assertRaises(subprocess.CalledProcessError):
                self.psql(url, {**own, **wrong}, "select 1")

    def psql(self, url, login, statement):
        program = programs.programs() / programs.POSTGRES / "psql"
        command = [program, "-XAt", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(url.port)]
        for one in statement.split("; "):
            command += ["-c", one]
        return subprocess.run(command, env=login, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


class Services(OneStack):
    """`make run`, `make up` and `make down`, with a cargo and three services that only pretend."""

    def setUp(self):
        super().setUp()
        stand_ins = Path(self.room.name)
        (stand_ins / "built").mkdir()
        services = ("%s-service" % service for service in ("command", "projection", "query"))
        for name in ("cargo", "built/watershed", *services):
            (stand_ins / name).write_text(STAND_IN % {"python": sys.executable, "room": stand_ins})
            (stand_ins / name).chmod(0o755)
        ports = {"WATERSHED_%s_PORT" % server: str(random.randrange(15000, 32000)) for server in SERVERS}
        path = "%s:%s" % (stand_ins, os.environ["PATH"])
        own = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
        self.environment = {**own, **ports, "PATH": path}
        self.addCleanup(self.watershed, "down")

    def watershed(self, action, **environment):
        with self.watershed_process(action, **environment) as process:
            return process.communicate(timeout=120)[0], process.returncode

    def watershed_process(self, action, **environment):
        command = [sys.executable, programs.CHECKOUT / "scripts" / "run", action, "--dir", self.home]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env={**self.environment, **environment}, **output)

    def services(self):
        return [one for one in self.processes_of(self.room.name) if "-service" in one]

    def test_run_stops_all_that_it_started(self):
        with self.watershed_process("run") as run:
            said = ""
            while "ready" not in said:
                said += run.stdout.readline()
            self.assertEqual(len(self.services()), 3)
            for action in ("run", "up"):
                refusal, code = self.watershed(action)
                self.assertIn("is running already", refusal)
                self.assertEqual(code, 1)
            run.send_signal(signal.SIGINT)
            said += run.stdout.read()
        self.assertEqual(run.returncode, 0, said)
        self.assertEqual(said.count("| finished"), 3, said)
        self.assertEqual((self.services(), self.processes()), ([], []))

    def test_run_leaves_the_servers_that_ran_before(self):
        self.up()
        with self.watershed_process("run") as run:
            while "ready" not in run.stdout.readline():
                pass
            run.send_signal(signal.SIGTERM)
            self.assertIn("ran before", run.stdout.read())
        self.assertEqual(run.returncode, 0)
        self.assertEqual(self.stack("status").returncode, 0)

    def test_run_takes_over_from_one_that_was_killed(self):
        for end in (signal.SIGKILL, signal.SIGTERM):
            with self.watershed_process("run") as run:
                while "ready" not in run.stdout.readline():
                    pass
                run.send_signal(end)
                run.stdout.read()
        self.assertEqual(self.services(), [])

    def test_up_and_down_can_each_be_repeated(self):
        for count in (0, 6):
            said, code = self.watershed("up")
            self.assertEqual((said.count("already running"), code), (count, 0), said)
        self.assertEqual(len(self.services()), 3)
        self.assertIn("runs in the background already", self.watershed("run")[0])
        self.assertIn("still runs on this data", self.stack("down", "--wipe").stdout)
        self.assertIn("command, projection, query, nats, postgres, mongodb", self.watershed("down")[0])
        self.assertEqual((self.services(), self.processes()), ([], []))
        self.assertEqual(self.watershed("down"), ("nothing was running\n", 0))

    def test_the_program_watershed_is_found_once_the_env_has_been_read(self):
        self.watershed("up")
        env = shlex.quote(str(self.home / "env"))
        script = '. %s; before="$PATH"; . %s; [ "$PATH" = "$before" ] && watershed' % (env, env)
        for shell in ("sh", "bash"):
            done = subprocess.run([shell, "-ec", script], stdout=subprocess.PIPE, text=True, env=self.environment)
            self.assertEqual((done.stdout.strip(), done.returncode), (self.urls()["NATS_URL"], 0))

    def test_each_service_has_a_port_for_metrics_and_logs_for_whoever_reads_them(self):
        for action, log_format in (("up", None), ("run", "text")):
            with self.watershed_process(action, METRICS_ADDRESS="127.0.0.1:9400") as process:
                while "ready" not in process.stdout.readline():
                    pass
                for port, service in enumerate(SERVICE_URLS, 9400):
                    lines = (self.home / "log" / (service + ".log")).read_text().splitlines()
                    told = dict(line.split("=", 1) for line in lines if "=" in line)
                    self.assertEqual(told["METRICS_ADDRESS"], "127.0.0.1:%d" % port)
                    self.assertEqual(told.get("LOG_FORMAT"), log_format)
                process.send_signal(signal.SIGTERM)
                process.stdout.read()
            self.watershed("down")
        said, code = self.watershed("up", METRICS_ADDRESS="9400")
        self.assertEqual(code, 1)
        self.assertIn("METRICS_ADDRESS is not host:port", said)

    def test_a_service_that_dies_ends_it_all_and_is_named(self):
        for action in ("up", "run"):
            said, code = self.watershed(action, DIES="projection-service")
            self.assertEqual(code, 1)
            self.assertIn("the projection service has ended", said)
            self.assertIn("I die", said)
            self.assertEqual((self.services(), self.processes()), ([], []))

    def test_each_service_gets_its_own_urls_only(self):
        self.watershed("up", **{server + "_PASSWORD_FILE": "/of/another/server" for server in SERVERS})
        urls = self.urls()
        for service, names in SERVICE_URLS.items():
            lines = (self.home / "log" / (service + ".log")).read_text().splitlines()
            given = dict(line.split("=", 1) for line in lines)
            self.assertEqual(given, {name: urls[stack_name] for name, stack_name in names.items()})

    def test_servers_of_ones_own_are_used_instead(self):
        own = {"NATS_URL": "nats://u:p@127.0.0.1:1", "MONGODB_URL": "mongodb://u:p@127.0.0.1:1"}
        said, code = self.watershed("up", **own, MONGODB_QUERY_URL="mongodb://q:p@127.0.0.1:1")
        self.assertEqual(code, 0, said)
        self.assertEqual(said.count("your own"), 2)
        self.assertEqual(set(self.urls()), {"POSTGRES_URL"})
        query = (self.home / "log" / "query.log").read_text().splitlines()
        self.assertEqual(set(query), {"NATS_URL=" + own["NATS_URL"], "MONGODB_URL=mongodb://q:p@127.0.0.1:1"})


SERVERS = ("NATS", "POSTGRES", "MONGODB")

STAND_IN = """#!%(python)s
import json, os, signal, sys, time

name = os.path.basename(sys.argv[0])
if name == "cargo":
    for program in ("command-service", "projection-service", "query-service", "built/watershed"):
        print(json.dumps({"executable": "%(room)s/" + program}))
elif name == "watershed":
    print(os.environ["NATS_URL"])
elif sys.argv[1:] == []:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    own = ("_URL", "_PASSWORD_FILE", "METRICS_ADDRESS", "LOG_FORMAT")
    print(*("=".join(item) for item in os.environ.items() if item[0].endswith(own)), sep="\\n", flush=True)
    if os.environ.get("DIES") == name:
        sys.exit("I die")
    open(os.environ["READY_FILE"], "w").close()
    signal.sigwait([signal.SIGTERM])
    print("finished", flush=True)
"""

SERVICE_URLS = {
    "command": {"NATS_URL": "NATS_COMMAND_URL", "POSTGRES_URL": "POSTGRES_URL"},
    "projection": {"NATS_URL": "NATS_PROJECTION_URL", "MONGODB_URL": "MONGODB_PROJECTION_URL"},
    "query": {"NATS_URL": "NATS_QUERY_URL", "MONGODB_URL": "MONGODB_QUERY_URL"},
}


class Health(OneStack):
    """The check of docker-compose.yml, on a real server."""

    def test_mongodb_is_healthy_while_it_can_be_written_to(self):
        self.up("mongodb")
        port = str(urlsplit(self.urls()["MONGODB_URL"]).port)
        self.assertEqual(self.health_of(port), 0)
        password = json.loads((self.home / "secrets.json").read_text())["mongodb_admin"]
        with clients.mongodb(int(port), "admin", password) as client:
            client.admin.command("replSetStepDown", 60, force=True)
        self.assertEqual(self.health_of(port), 1)
        self.stack("down", "mongodb")
        self.assertEqual(self.health_of(port), 1)

    def health_of(self, port):
        check = ["bash", programs.CHECKOUT / "scripts" / "docker" / "mongodb-health.sh", port]
        return subprocess.run(check, stderr=subprocess.DEVNULL, timeout=10).returncode


class Compose(unittest.TestCase):
    """docker-compose.yml, as far as it can be read without Docker."""

    compose = (programs.CHECKOUT / "docker-compose.yml").read_text()
    example = (programs.CHECKOUT / ".env.example").read_text()

    def test_the_servers_have_the_settings_of_a_stack(self):
        own = {"listen_addresses", "unix_socket_directories"}  # containers listen where the others are
        wanted = {item for item in servers.Postgres.settings.items() if item[0] not in own}
        self.assertEqual(set(re.findall(r"- -c(\w+)=(\S+)\n", self.compose)), wanted)
        parameters = set(re.findall(r"- --setParameter=(\w+)=(\S+)\n", self.compose))
        self.assertEqual(parameters, set(servers.MongoDB.parameters.items()))

    def test_nats_gets_every_password_from_its_file(self):
        named = set(re.findall(r"\$NATS_(\w+)_PASSWORD", (programs.CHECKOUT / "nats.conf").read_text()))
        script = (programs.CHECKOUT / "scripts" / "docker" / "nats.sh").read_text()
        self.assertEqual(set(re.search(r"for user in ([A-Z ]+);", script)[1].split()), named)

    def test_every_variable_stands_in_the_example(self):
        secrets = (programs.CHECKOUT / "docker-compose.secrets.yml").read_text()
        variables = set(re.findall(r"\$\{(\w+)", self.compose + secrets))
        variables |= set(re.findall(r"^ +([A-Z_]+):$", self.compose, re.M))
        documented = set(re.findall(r"^#([A-Z_]+)=", self.example, re.M))
        missing = {name for name in variables - documented if name.replace("_FILE", "") not in documented}
        self.assertEqual(missing, set(), "these variables of docker-compose.yml are to be added to .env.example")
        self.assertEqual(documented - variables - {"COMPOSE_FILE"}, set(), "docker-compose.yml does not use these")

    def test_passwords_that_nats_would_misread_are_refused_with_a_sentence(self):
        for password, said in (
            ("1abc", "must start with a letter"),
            ("12e9", "must start with a letter"),
            ("", "is empty"),
            ("a b", "must hold only letters"),
            ('"a"', "must start with a letter"),
            ("a#b", "must hold only letters"),
            ("True", "boolean"),
            ("no", "boolean"),
            ("a1b", ""),
            ("nothing-true_1", ""),
        ):
            with self.subTest(password=password):
                self.check("NATS_CLIENT_PASSWORD", password, said)
                with tempfile.NamedTemporaryFile("w") as file:
                    file.write(password + "\n")
                    file.flush()
                    self.check("NATS_CLIENT_PASSWORD", "development", said, NATS_CLIENT_PASSWORD_FILE=file.name)

    def test_other_passwords_fit_where_they_are_put(self):
        for name, password, said in (
            ("POSTGRES_PASSWORD", "1-a_b.c~d", ""),
            ("POSTGRES_PASSWORD", "a@b", "must hold only letters"),
            ("MONGODB_QUERY_PASSWORD", "a/b", "must hold only letters"),
            ("MONGODB_ADMIN_PASSWORD", "a/b", ""),
            ("MONGODB_KEY", "short", "6 characters"),
            ("MONGODB_KEY", "a-key-with-dashes", "only letters"),
            ("MONGODB_KEY", "development", ""),
        ):
            with self.subTest(name=name, password=password):
                self.check(name, password, said)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("p@ss/w:rd%41 #?\n")
            file.flush()
            self.check("POSTGRES_PASSWORD", "", "", POSTGRES_PASSWORD_FILE=file.name)
        self.check("POSTGRES_PASSWORD", "", "cannot be read", POSTGRES_PASSWORD_FILE=file.name)

    def check(self, name, password, said, **more):
        script = programs.CHECKOUT / "scripts" / "docker" / "passwords.sh"
        environment = {"PATH": os.environ["PATH"], "PASSWORDS": name, name: password, **more}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(["sh", script], env=environment, **output)
        self.assertEqual(done.returncode, 1 if said else 0, done.stdout)
        self.assertIn(said, done.stdout)
        if said:
            self.assertIn(name, done.stdout)
        if len(password) > 2:
            self.assertNotIn(password, done.stdout.replace("only letters", ""))


def nats_refuses(url, action, subjects):
    """Those of the subjects of which the server says that the user may not publish to them, or subscribe to them."""

    async def try_all(connection, refusals):
        refused = []
        for subject in subjects:
            name, _, queue = subject.partition(":")
            if action == "publish":
                await connection.publish(name)
            else:
                await connection.subscribe(name, queue)
            await seen(connection)
            if refusals:
                assert "permissions violation" in str(refusals[0]), refusals
                refused.append(subject)
                refusals.clear()
        return refused

    return clients.nats(url, try_all, timeout=20)


async def seen(connection):
    """Returns when the server has seen what was sent. The library's ping overtakes what it has not written out yet: the second
    one comes behind it."""
    await connection.flush()
    await connection.flush()


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError("not within %d s" % seconds)
        time.sleep(0.05)


# What each role may publish and subscribe: of everything listed here that, and nothing else. `:q` is in a queue group.
NATS_ROLES = [
    (
        "client",
        "cmd.a.b t1.cmd.a.b qry.a.b t1.qry.a.b $SRV.PING $SRV.STATS $SRV.STATS.query",
        "_INBOX.> _INBOX.command.> _INBOX.query.> evt.> t1.evt.> view.*.checkpoint t1.view.*.checkpoint",
    ),
    (
        "command",
        "evt.a.b evt.cmd.b evt.qry.b evt.view.a.checkpoint t1.evt.a.b journal.committed t1.journal.committed _INBOX.x "
        "$JS.API.STREAM.CREATE.EVENTS_t1 $JS.API.STREAM.DELETE.EVENTS $JS.API.STREAM.INFO.EVENTS "
        "$JS.API.STREAM.MSG.GET.EVENTS $SRV.STATS",
        "cmd.>:q t1.cmd.>:q ops.>:q t1.ops.>:q _INBOX.command.> journal.committed t1.journal.committed $SRV.PING.command _INBOX_command.>",
    ),
    (
        "projection",
        "view.a.checkpoint view.cmd.checkpoint t1.view.a.checkpoint _INBOX.x $JS.API.STREAM.INFO.EVENTS "
        "$JS.API.STREAM.MSG.GET.EVENTS $JS.API.CONSUMER.CREATE.EVENTS.c $JS.API.CONSUMER.INFO.EVENTS.c $JS.API.CONSUMER.DELETE.EVENTS.c "
        "$JS.API.CONSUMER.MSG.NEXT.EVENTS.c "
        # It may make and read any consumer.
        "$JS.API.CONSUMER.CREATE.EVENTS.subscriber $JS.API.CONSUMER.CREATE.EVENTS.subscriber.evt.a "
        "$JS.API.CONSUMER.INFO.EVENTS.subscriber $JS.API.CONSUMER.MSG.NEXT.EVENTS.subscriber",
        "ops.>:q t1.ops.>:q $SRV.PING.command _INBOX_projection.>",
    ),
    (
        "subscriber",
        "$JS.API.INFO $JS.API.STREAM.INFO.EVENTS $JS.API.STREAM.NAMES $JS.API.CONSUMER.CREATE.EVENTS.subscriber "
        "$JS.API.CONSUMER.CREATE.EVENTS.subscriber.evt.a $JS.API.CONSUMER.INFO.EVENTS.subscriber "
        "$JS.API.CONSUMER.MSG.NEXT.EVENTS.subscriber $JS.ACK.EVENTS.subscriber.1.1.1.1.1",
        "_INBOX_subscriber.>",
    ),
    (
        "sys",
        "$SYS.REQ.SERVER.PING $SYS.REQ.SERVER.PING.STATSZ $SYS.REQ.SERVER.PING.JSZ $SYS.REQ.SERVER.N1.VARZ "
        "$SYS.REQ.ACCOUNT.A1.CONNZ",
        "_INBOX.> _INBOX.command.> _INBOX.query.> $SYS.>",
    ),
    (
        "query",
        "_INBOX.x $SRV.STATS.query",
        "_INBOX.query.> qry.>:q t1.qry.>:q view.*.checkpoint t1.view.*.checkpoint $SRV.PING.command _INBOX_query.>",
    ),
]
NO_ROLE = (
    "ops.a.b t1.ops.a.b other $SYS.REQ.SERVER.N1.RELOAD $SYS.REQ.SERVER.N1.KICK $SYS.REQ.SERVER.N1.LDM $SYS.ACCOUNT.A1.CONNECT "
    "_INBOX_command.x _INBOX_projection.x _INBOX_query.x "
    "$JS.API.STREAM.PURGE.EVENTS $JS.API.STREAM.UPDATE.EVENTS $JS.API.STREAM.MSG.DELETE.EVENTS "
    "$JS.API.CONSUMER.CREATE.EVENTS $JS.API.CONSUMER.DURABLE.CREATE.EVENTS.c $JS.ACK.EVENTS.c.1.1.1.1.1 "
    # With a wildcard for the domain, this would read the messages of the consumer `c`.
    "$JS.ACK.EVENTS.c.1.subscriber.1.1.1",
    "> *.> cmd.> qry.> ops.> $JS.API.> $JS.ACK.> other",
)
NATS_PUBLISHED = sorted(set(" ".join([NO_ROLE[0], *(publish for _, publish, _ in NATS_ROLES)]).split()))
NATS_SUBSCRIBED = sorted(set(" ".join([NO_ROLE[1], *(subscribe for _, _, subscribe in NATS_ROLES)]).split()))

ONE = {"insert": "a", "documents": [{"a": 1}]}
INDEX = {"createIndexes": "a", "indexes": [{"key": {"a": 1}, "name": "a"}]}
MONGODB_RIGHTS = [
    ("PROJECTION_", "watershed", ONE, True),
    ("PROJECTION_", "watershed", INDEX, True),
    ("PROJECTION_", "watershed", {"create": "b"}, True),
    ("PROJECTION_", "watershed", {"drop": "b"}, True),
    ("PROJECTION_", "other", ONE, False),
    ("PROJECTION_", "admin", {"createUser": "x", "pwd": "y", "roles": []}, False),
    ("QUERY_", "watershed", {"find": "a"}, True),
    ("QUERY_", "watershed", {"explain": {"find": "a"}}, True),
    ("QUERY_", "watershed", ONE, False),
    ("QUERY_", "watershed", {"drop": "a"}, False),
    ("QUERY_", "other", {"find": "a"}, False),
    ("", "other", ONE, True),
    ("", "other", {"dropDatabase": 1}, True),
    ("", "admin", {"createUser": "x", "pwd": "y", "roles": []}, False),
    ("", "admin", {"shutdown": 1}, False),
]


if __name__ == "__main__":
    # The NATS library does not close the socket of a login that was refused.
    unittest.main(warnings="ignore")
