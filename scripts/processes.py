"""What the scripts start: servers, which outlive them, and what they wait for.

Invariant: a process writes down who it is before it becomes a server, so no interrupted try leaves one that nobody
knows; and nobody is signalled unless pid, start time and boot still are those written down, so no stranger ever is.
"""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Failure(Exception):
    """Says to the user what failed."""


class Record:
    """The file that names a running process. It counts only where it was written, never in a copy of the directory."""

    def __init__(self, path):
        self.path = path
        self.name = path.stem

    def write(self):
        record = {"pid": os.getpid(), "start": start_time(os.getpid()), "boot": _boot(), "path": str(self.path)}
        write_private(self.path, json.dumps(record))

    def pid(self):
        """The process, if it is still there and the same."""
        try:
            record = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        same = record["path"] == str(self.path) and record["boot"] == _boot()
        return record["pid"] if same and start_time(record["pid"]) == record["start"] else None

    def remove(self):
        if self.path.exists():
            self.path.unlink()


def start(record, argv, log, environment, user=None):
    """Starts `argv` in a session of its own, so that a Ctrl-C at the terminal does not reach it."""

    def in_child():
        record.write()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        os.umask(0o077)
        if user:
            become(user)

    if log.exists():
        os.replace(log, log.with_suffix(".log.before"))
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as output:
        subprocess.Popen(
            [str(argument) for argument in argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd="/",
            start_new_session=True,
            preexec_fn=in_child,
        )


def run(argv, stdin, environment, user, patience):
    """Runs `argv` to its end, and returns its exit code and all that it said. If we are interrupted, or it takes longer
    than `patience` seconds, it is killed with everything that it started."""

    def in_child():
        if user:
            become(user)

    with subprocess.Popen(
        [str(argument) for argument in argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd="/",
        start_new_session=True,
        preexec_fn=in_child,
    ) as process:
        try:
            said, _ = process.communicate(stdin, timeout=patience)
        except BaseException:
            _kill_session(process.pid)
            raise
        return process.returncode, said


def _kill_session(leader):
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _in_session(leader) and time.monotonic() < deadline:
        time.sleep(0.01)


def _in_session(leader):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(process.name))
        if fields and int(fields[3]) == leader:
            found.append(int(process.name))
    return found


def become(user):
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


def stop(processes, patience):
    """Stops all of {record: signal} together, each by its signal; kills what has not ended after `patience` seconds."""
    for kind in (None, signal.SIGKILL):
        for record, first in processes.items():
            pid = record.pid()
            with suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, kind or first)
        deadline = time.monotonic() + (patience if kind is None else 10)
        while any(record.pid() for record in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
    for record in processes:
        if record.pid():
            raise Failure("process %d (%s) cannot be stopped" % (record.pid(), record.name))
        record.remove()


def stop_on_signals():
    """The first signal ends the work by a KeyboardInterrupt; the cleaning up after it is not interrupted again."""

    def interrupt(*_):
        ignore_signals()
        raise KeyboardInterrupt

    for kind in STOPPING:
        signal.signal(kind, interrupt)


def ignore_signals():
    for kind in STOPPING:
        signal.signal(kind, signal.SIG_IGN)


def working_in(directory):
    """The processes whose working directory it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(process / "cwd") == str(directory):
                found.append(int(process.name))
    return found


@contextmanager
def lock(path, patience, waiting):
    """One script at a time. The kernel lets go when the holder dies, however it dies."""
    deadline = time.monotonic() + patience
    told = False
    while True:
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have wiped the file away: then this lock is on a file that nobody else sees.
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                break
            os.close(handle)
            continue
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() > deadline:
            raise Failure("another script has been at work for %d s: %s is locked" % (patience, path))
        if not told:
            say(waiting)
            told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        os.close(handle)


def remove_tree(directory, patience=30):
    """A script that was killed may have left a process that still writes there for a moment."""
    deadline = time.monotonic() + patience
    while directory.exists():
        try:
            shutil.rmtree(directory)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise


def write_private(path, text):
    """Whole or not at all, and readable by the owner only."""
    new = path.with_name("%s.%d.new" % (path.name, os.getpid()))
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    os.replace(new, path)


def say(text):
    """Nobody may be listening any more, and the work has to go on."""
    with suppress(OSError):
        print(text, flush=True)


def last_lines(log, count=15):
    try:
        return "".join("    %.300s\n" % line for line in log.read_text(errors="replace").splitlines()[-count:])
    except FileNotFoundError:
        return "    (no log)\n"


def start_time(pid):
    """In clock ticks since boot; none for a process that is gone or a zombie."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid):
    """What /proc tells of a process, from its state on; none if it is gone or a zombie."""
    try:
        with open("/proc/%d/stat" % pid) as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields


def _boot():
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return boot.read().strip()
