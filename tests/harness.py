"""What the tests are made of: a daemon on a mount point of its own, and a guest that is looked into with OpenSSH.

Everything that waits has a deadline. A test that overruns its own is ended by conftest.py, which at the last kills the
daemons of this run, so that no process stays blocked in a mount.
"""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get("VMSFS_TEST_BUILD", os.path.join(ROOT, "build-tests"))
VMSFS = os.path.join(BUILD, "vmsfs")
# Built without sanitizers, for tests of the daemon's memory.
CLEAN = os.environ.get("VMSFS_TEST_CLEAN", os.path.join(ROOT, "build-clang", "vmsfs"))
IMAGES = os.path.join(BUILD, "images")
# Guests start from a template that is made once; with "off" they boot cold, one and all.
WARM = os.environ.get("VMSFS_TEST_WARM", "auto")

# What the tests' VMs run in: qemu, or a fake of one of the others (fakes/vmm.py).
BACKEND = os.environ.get("VMSFS_TEST_BACKEND", "qemu")
# Not a fake but the program itself: contrib/test-real-vmms.
REAL = bool(os.environ.get("VMSFS_TEST_REAL"))
FAKES = os.path.join(ROOT, "tests", "fakes")
SPECS = os.path.join(ROOT, "tests", "specs")
# backend: program
VMMS = (b"/qemu-system-x86_64", b"/firecracker", b"/cloud-hypervisor")
PROGRAMS = {"firecracker": "firecracker", "cloud_hypervisor": "cloud-hypervisor"}

# The options that the tests use where nothing else is said, and how much longer an operation may take than the
# deadline that the daemon keeps: two cores, sanitizers, and other guests that boot meanwhile.
TIMEOUT = 5
BOOT_TIMEOUT = 90
SLACK = 5

SHELLS = {
    "bash": ["bash", "-c"],
    "dash": ["dash", "-c"],
    "busybox": ["busybox", "sh", "-c"],
    "zsh": ["zsh", "-f", "-c"],
    "ksh": ["ksh", "-c"],
}

UNSET = "<unset>"


def wait_for(condition, what, seconds=10, step=0.02):
    """Calls `condition` until it is true, and returns what it said."""
    end = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < end, f"after {seconds} s still not: {what}"
        time.sleep(step)


def read(path):
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, data):
    """As a program writes that looks at every error: open, write, close. One write() for all of it, if it is taken whole."""
    data = data.encode() if isinstance(data, str) else data
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        while True:
            data = data[os.write(fd, data) :]
            if not data:
                break
    finally:
        os.close(fd)


@contextlib.contextmanager
def refused(*names):
    """The block fails with one of these errnos, given by name."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno, str(error.errno))
        assert name in names, f"{name} ({error}), not {' or '.join(names)}"
    else:
        raise AssertionError(f"no error, though there should be {' or '.join(names)}")


@contextlib.contextmanager
def takes_at_most(seconds, what="this"):
    start = time.monotonic()
    yield
    taken = time.monotonic() - start
    assert taken <= seconds, f"{what} took {taken:.2f} s, which is more than {seconds} s"


def sh(script, shell="dash", seconds=60, check=True, **variables):
    """Runs a script in a shell of the host. The words of `variables` are its environment."""
    done = subprocess.run(
        SHELLS[shell] + [script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **variables},
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{script!r} in {shell}: status {done.returncode}, {done.stderr!r}")
    return done


class Client:
    """A process that uses the mount and may have to wait there. It is ended with the `with` block."""

    all = set()

    def __init__(self, argv, **kwargs):
        argv = SHELLS["dash"] + [argv] if isinstance(argv, str) else argv
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **kwargs
        )
        Client.all.add(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.result(30)

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def result(self, seconds=30):
        """Its exit status (negative: the signal), output and errors."""
        if self in Client.all:
            out, err = self.process.communicate(timeout=seconds)
            self.answer = self.process.returncode, out, err.decode(errors="replace")
            Client.all.discard(self)
        return self.answer

    def state(self):
        """The letter of ps: S or D while it waits; None when it has ended."""
        return process_state(self.process.pid)

    def waits(self, what="file system", seconds=10, or_ends=False):
        """Until it is blocked in a request to the mount: one and the same system call, for a while."""
        since = {}

        def blocked():
            if or_ends and self.process.poll() is not None:
                return True
            for pid in session_pids(self.process.pid):
                call = blocked_call(pid)
                first, start = since.get(pid, (None, 0))
                if not call or call != first:
                    since[pid] = call, time.monotonic()
                elif time.monotonic() - start > 0.2:
                    return True
            return False

        wait_for(blocked, f"process {self.process.pid} waits ({what})", seconds)
        return self


def process_state(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            state = f.read().rpartition(b")")[2].split()[0].decode()
    except OSError:
        return None
    return None if state in "ZX" else state


def session_pids(leader):
    pids = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as f:
                    if int(f.read().rpartition(b")")[2].split()[3]) == leader:
                        pids.append(int(name))
    return pids


def blocked_call(pid):
    """The system call, with its arguments, in which a process waits for an answer to a FUSE request, or (state D) for
    the lock of an inode that such a request holds; or None."""
    try:
        waits = "request_wait" in read(f"/proc/{pid}/wchan") or process_state(pid) == "D"
        return read(f"/proc/{pid}/syscall") if waits else None
    except OSError:
        return None


def pid_alive(pid):
    return process_state(pid) is not None


def processes_with(text):
    """Ids of the processes whose command line holds the text."""
    text = os.fsencode(text)
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if text in read_bytes(f"/proc/{name}/cmdline") and pid_alive(int(name)):
                    found.append(int(name))
    return found


def kill_and_wait(pid, number=signal.SIGKILL, seconds=10):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    wait_for(lambda: not pid_alive(pid), f"the end of process {pid}", seconds)


def mount_line(path):
    """The fields of /proc/self/mountinfo for what is mounted at `path`; None: nothing is."""
    for line in read("/proc/self/mountinfo").splitlines():
        if line.split()[4] == path:
            return line
    return None


def runtime_dir(state):
    """Where the daemon of this state directory has its sockets: 64-bit FNV-1a of the path, see src/options.c."""
    number = 0xCBF29CE484222325
    for byte in os.fsencode(state):
        number = (number ^ byte) * 0x100000001B3 % 2**64
    return f"/run/vmsfs/{number:016x}"


class Run:
    """The run directory. tests/run gives one and clears it away; so does conftest.py when pytest is used alone."""

    def __init__(self):
        self.given = os.environ.get("VMSFS_TEST_RUN")
        self.path = self.given or tempfile.mkdtemp(prefix="vmsfs-tests.")
        os.makedirs(os.path.join(self.path, "pids"), exist_ok=True)
        os.makedirs(os.path.join(self.path, "sanitizer"), exist_ok=True)
        self.count = 0
        self.daemons = []
        self.lock = threading.Lock()

    def number(self):
        self.count += 1
        return self.count

    def record_pid(self, pid):
        with open(os.path.join(self.path, "pids", str(pid)), "w", encoding="ascii"):
            pass

    def forget_pid(self, pid):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, "pids", str(pid)))

    def sanitizer_logs(self):
        folder = os.path.join(self.path, "sanitizer")
        return {name: read(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}

    def kill_daemons(self):
        """The last resort: a dead daemon's mount answers everybody with ENOTCONN."""
        for daemon in list(self.daemons):
            if daemon.pid and pid_alive(daemon.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(daemon.pid, signal.SIGKILL)


RUN = Run()


def sanitizer_environment():
    log = os.path.join(RUN.path, "sanitizer", "report")
    common = f"log_path={log}:exitcode=99"
    return {
        "ASAN_OPTIONS": f"{common}:detect_leaks=1:detect_stack_use_after_return=1:abort_on_error=0",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1:halt_on_error=1",
        "LSAN_OPTIONS": f"log_path={log}:exitcode=99",
    }


def environment(extra=None):
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": os.path.join(RUN.path),
        "LC_ALL": "C.UTF-8",
        **sanitizer_environment(),
        **(extra or {}),
    }


def spec_as_json(name):
    """Parsed once in a run: the fakes are started often."""
    path = os.path.join(RUN.path, f"{name}.json")
    if not os.path.exists(path):
        import yaml

        with open(os.path.join(SPECS, f"{name}.yaml"), encoding="utf-8") as f:
            document = yaml.load(f, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        with open(path, "w", encoding="utf-8") as f:
            json.dump(document, f)
    return path


class Fake:
    """A program that stands for a VMM, in a folder that comes first in a daemon's PATH. See fakes/vmm.py."""

    def __init__(self, path, backend):
        self.program = PROGRAMS[backend]
        self.path = os.path.join(path, f"fake-{self.program}")
        self.bin = os.path.join(path, "bin")
        os.makedirs(os.path.join(self.path, "guests"))
        os.makedirs(self.bin, exist_ok=True)
        os.symlink(spec_as_json(self.program), os.path.join(self.path, "spec.json"))
        self.install()

    def install(self, script=None, name=None):
        """`script`: something else in its place."""
        path = os.path.join(self.bin, name or self.program)
        with open(path, "w", encoding="utf-8") as f:
            f.write(script or f"#!/bin/sh\nexec {FAKES}/{self.program} {self.path} \"$@\"\n")
        os.chmod(path, 0o755)

    def do_wrong(self, **faults):
        """What it is to do wrong from now on: do_wrong(**{"PUT /vsock": "400"})."""
        with open(os.path.join(self.path, "faults.new"), "w", encoding="utf-8") as f:
            json.dump(faults, f)
        os.rename(os.path.join(self.path, "faults.new"), os.path.join(self.path, "faults"))

    def lines(self, name):
        try:
            return read(os.path.join(self.path, name)).splitlines()
        except FileNotFoundError:
            return []

    def requests(self):
        return self.lines("requests")

    def violations(self):
        return self.lines("violations")


def make_jail(folder, path=None):
    """A jail in a VM's folder (`path`, where the folder is that of a root elsewhere), with what stands for Firecracker and for its
    jailer: fakes/jail.c. Returns the folder that is `/` there, and the command that starts it."""
    number = 0xCBF29CE484222325  # FNV-1a
    for byte in (path or folder).encode():
        number = (number ^ byte) * 0x100000001B3 % (1 << 64)
    name = f"vmsfs-{number:016x}"
    root = f"jail/firecracker/{name}/root"
    os.makedirs(os.path.join(folder, root))
    program = os.path.join(folder, root, "firecracker")
    subprocess.run(["cc", "-static", "-Wall", "-Wextra", "-Werror", "-o", program, f"{FAKES}/jail.c"], check=True, timeout=60)
    root = os.path.join(path or folder, root)
    return root, [f"{root}/firecracker", root, "65534", name]


class Daemon:
    """vmsfs on a mount point of its own, with a state directory that outlives it."""

    def __init__(
        self,
        options="",
        detached=False,
        env=None,
        timeout=TIMEOUT,
        boot_timeout=BOOT_TIMEOUT,
        program=VMSFS,
        templates=True,
        fakes=None,
    ):
        self.program = program
        self.path = os.path.join(RUN.path, f"d{RUN.number()}")
        self.mount = os.path.join(self.path, "vms")
        self.state = os.path.join(self.path, "state")
        self.log = os.path.join(self.path, "log")
        self.env = dict(env or {})
        self.detached = detached
        self.timeout = timeout
        self.options = f"state={self.state},images={IMAGES},timeout={timeout},boot_timeout={boot_timeout}"
        if WARM == "off":
            self.options += ",warm=off"
        if options:
            self.options += "," + options
        self.pid = None
        self.process = None
        self.guests = {}
        os.makedirs(self.mount)
        if fakes is None:
            fakes = []
        if not fakes and BACKEND != "qemu":
            fakes = [] if REAL else [BACKEND]
            self.env = {"VMSFS_BACKEND": BACKEND, **self.env}
        self.fakes = {backend: Fake(self.path, backend) for backend in fakes}
        if self.fakes:
            path = self.env.get("PATH", environment()["PATH"])
            self.env = {"VMSFS_KVM": "yes", **self.env, "PATH": f"{self.path}/bin:{path}"}
        # QEMU alone has any.
        self.templates_wanted = templates and WARM != "off" and BACKEND == "qemu" and not self.fakes
        RUN.daemons.append(self)

    def argv(self):
        return [self.program, self.mount, "-o", self.options]

    def start(self, seconds=30):
        if self.templates_wanted and not os.path.exists(self.state):
            copy_templates(self.state)
        log = open(self.log, "ab")
        with log:
            if self.detached:
                done = subprocess.run(
                    self.argv(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment(self.env),
                    timeout=seconds,
                )
                assert done.returncode == 0, read(self.log)
                self.pid = processes_with(self.mount)[0]
                RUN.record_pid(self.pid)
                return self
            self.process = subprocess.Popen(
                self.argv() + ["-f"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(self.env),
                start_new_session=True,
            )
        self.pid = self.process.pid
        RUN.record_pid(self.pid)

        def answers():
            assert self.process.poll() is None, f"vmsfs has ended: {read(self.log)}"
            return mount_line(self.mount) and os.path.isdir(self.mount)

        wait_for(answers, "the mount answers", seconds)
        return self

    def running(self):
        if not self.pid or not pid_alive(self.pid):
            return False
        return self.process is None or self.process.poll() is None

    def wait_end(self, seconds=20):
        """Its exit status; None for one that has detached itself."""
        status = None
        if self.process:
            status = self.process.wait(timeout=seconds)
        else:
            wait_for(lambda: not pid_alive(self.pid), "the daemon ends", seconds)
        RUN.forget_pid(self.pid)
        self.pid = self.process = None
        return status

    def stop(self, number=signal.SIGTERM, seconds=20):
        """The clean way: SIGTERM, and what has to be true after it."""
        for guest in self.guests.values():
            guest.close()
        if not self.pid:
            return
        os.kill(self.pid, number)
        status = self.wait_end(seconds)
        assert status in (0, None), f"vmsfs ended with status {status}: {read(self.log)[-3000:]}"
        assert not mount_line(self.mount), "the mount is still there"

    def kill(self):
        for guest in self.guests.values():
            guest.close()
        os.kill(self.pid, signal.SIGKILL)
        self.wait_end()
        self.unmount()

    def unmount(self):
        if mount_line(self.mount):
            subprocess.run(["fusermount3", "-uz", self.mount], check=True, timeout=20)

    def fake(self):
        """The only one, or that of the backend that is tested."""
        return self.fakes.get(BACKEND) or next(iter(self.fakes.values()))

    def boot_late(self, late=True):
        """Guests take their time to boot, as emulated ones do anyway."""
        for fake in self.fakes.values():
            fake.do_wrong(**({"vsock": "refuse"} if late else {}))

    def qemus(self):
        """QEMUs of VMs, or what stands for other VMMs, that belong to this state directory."""
        found = []
        for pid in processes_with(self.state + "/"):
            with contextlib.suppress(OSError):
                words = read_bytes(f"/proc/{pid}/cmdline").split(b"\0")[:3]
                if any(word.endswith(VMMS) for word in words) and pid not in self.template_makers():
                    found.append(pid)
        return found

    def template_makers(self):
        """QEMUs that are nobody's yet."""
        return processes_with(self.state + "/templates/.new-")

    def templates(self):
        """Folders of templates that are complete."""
        path = os.path.join(self.state, "templates")
        names = os.listdir(path) if os.path.isdir(path) else []
        return [os.path.join(path, name) for name in sorted(names) if not name.startswith(".")]

    def remains(self):
        """What VMs have left behind outside of the tree."""
        left = []
        for folder in ("vms", "trash"):
            path = os.path.join(self.state, folder)
            if os.path.isdir(path):
                left += [os.path.join(folder, name) for name in os.listdir(path)]
        runtime = runtime_dir(self.state)
        if os.path.isdir(runtime):
            left += [os.path.join(runtime, name) for name in os.listdir(runtime) if name != "template.qmp"]
        return left + [f"process {pid}" for pid in self.qemus()]

    def clear(self):
        """Ends it and all of its VMs, in whatever state they are. Raises if the daemon does not end as it should."""
        problem = None
        try:
            if self.running():
                for pid in self.qemus():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                for name in self.vms():
                    with contextlib.suppress(FileNotFoundError):
                        os.rmdir(os.path.join(self.mount, name))
            self.stop()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            problem = error
        finally:
            for guest in self.guests.values():
                guest.close()
            if self.pid and pid_alive(self.pid):
                os.kill(self.pid, signal.SIGKILL)
                self.wait_end()
            self.unmount()
            for pid in self.qemus():
                kill_and_wait(pid)
            RUN.daemons.remove(self)
            with contextlib.suppress(OSError):
                os.rmdir(runtime_dir(self.state))
        violations = [line for fake in self.fakes.values() for line in fake.violations()]
        if violations and not problem:
            problem = "the VMM was told what its specification does not allow:\n" + "\n".join(violations)
        if problem:
            raise AssertionError(f"{problem}\nthe daemon's log ends: {read(self.log)[-2000:]}")

    def vms(self):
        """Names of the VMs: what `ls` shows."""
        return [name for name in os.listdir(self.mount) if not name.startswith(".")]

    def vm(self, name):
        return os.path.join(self.mount, name)

    def boot(self, *names):
        """Makes VMs, waits until they run, and returns a Guest for each."""
        for name in names:
            os.mkdir(self.vm(name))
        guests = [Guest(self, name) for name in names]
        for guest in guests:
            guest.wait("running")
        return guests if len(guests) > 1 else guests[0]

    def guest(self, name):
        return Guest(self, name)


def copy_templates(state, copy=os.link):
    """Gives a new state directory the template of image tiny as it is by default, made once in a run."""
    made = os.path.join(RUN.path, "templates")
    if not os.path.isdir(made):
        one = Daemon("warm=auto", templates=False).start()
        try:
            one.boot("first")
            wait_for(one.templates, "a template is made", 120)
        finally:
            one.clear()
        os.rename(os.path.join(one.state, "templates"), made)
    # By hard links, as nothing writes to a template.
    os.makedirs(state, 0o700)
    if os.stat(state).st_dev != os.stat(made).st_dev:
        return  # its VMs boot cold, then
    shutil.copytree(made, os.path.join(state, "templates"), copy_function=copy)


@contextlib.contextmanager
def full_disk(one):
    """The file system of its state directory has no byte left."""
    ballast = os.path.join(os.path.dirname(one.state), "ballast")
    with open(ballast, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(4096))
    try:
        yield
    finally:
        os.unlink(ballast)


def children(pid):
    """Ids of all processes that come from this one."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as f:
                    parents[int(name)] = int(f.read().rpartition(b")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def make_key(path, kind="ed25519"):
    for old in (path, path + ".pub"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(old)
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "test", "-f", path], check=True, timeout=20)


class Sshd:
    """An existing machine: OpenSSH's server on a port of a loopback address, with keys and a configuration of its own. Its root is
    this host's, so only files of `path` are for the tests. `config`: further lines of sshd_config, as in MaxSessions=2."""

    def __init__(self, address="127.0.0.1", **config):
        self.address = address
        self.path = os.path.join(RUN.path, f"sshd{RUN.number()}")
        self.log = os.path.join(self.path, "log")
        self.key = os.path.join(self.path, "client_key")
        self.host_key = os.path.join(self.path, "host_key")
        self.env_file = os.path.join(self.path, "env.sh")
        self.authorized_keys = os.path.join(self.path, "authorized_keys")
        self.port = free_port()
        self.config = config
        self.process = None
        os.makedirs(self.path)
        make_key(self.key)
        make_key(self.host_key)
        self.authorize(self.key + ".pub")

    def authorize(self, public_key):
        with open(self.authorized_keys, "a", encoding="ascii") as f:
            f.write(read(public_key))

    def options(self):
        """For a daemon whose VMs are this machine."""
        return (
            f"backend=attach,address={self.address},port={self.port},key={self.key},host_key={self.host_key}.pub,"
            f"env_file={self.env_file}"
        )

    def start(self, seconds=20):
        lines = {
            "ListenAddress": self.address, "Port": self.port, "HostKey": self.host_key, "PidFile": "none", "UsePAM": "no",
            "AuthorizedKeysFile": self.authorized_keys, "StrictModes": "no", "PermitRootLogin": "prohibit-password",
            "SetEnv": f"HOME={self.path}", "PasswordAuthentication": "no", "MaxStartups": "100", "LogLevel": "VERBOSE", "Subsystem": "sftp internal-sftp",
            **self.config,
        }  # fmt: skip
        with open(self.path + "/sshd_config", "w", encoding="ascii") as f:
            f.writelines(f"{name} {value}\n" for name, value in lines.items())
        os.makedirs("/run/sshd", 0o755, exist_ok=True)  # where it confines the part that talks to strangers
        self.process = subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-f", self.path + "/sshd_config", "-E", self.log],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        RUN.record_pid(self.process.pid)

        def listens():
            assert self.process.poll() is None, f"sshd has ended: {read(self.log)}"
            with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), 5):
                return True

        wait_for(listens, "sshd listens", seconds)
        return self

    def start_slow(self):
        """Its `mv` takes half a second while there is a file `slow` in its folder."""
        os.makedirs(self.path + "/bin")
        write(self.path + "/bin/mv", f'#!/bin/sh\n[ ! -e {self.path}/slow ] || sleep 0.5\nexec /bin/mv "$@"\n')
        os.chmod(self.path + "/bin/mv", 0o755)
        self.config["SetEnv"] = f"HOME={self.path} PATH={self.path}/bin:/usr/bin:/bin"
        return self.start()

    def stop(self):
        """The machine is gone, with all that ran on it for somebody who was logged in."""
        if not self.process:
            return
        pids = children(self.process.pid)
        for pid in [self.process.pid] + pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=10)
        for pid in pids:
            wait_for(lambda pid=pid: not pid_alive(pid), f"process {pid} of sshd ends")
        RUN.forget_pid(self.process.pid)
        self.process = None


class Guest:
    """A VM: its files, and a look inside by ssh with the ssh_config that the VM offers."""

    def __init__(self, daemon, name):
        self.daemon = daemon
        self.name = name
        self.path = daemon.vm(name)
        self.master = None
        self.socket = os.path.join(daemon.path, f"{name}.ssh")
        daemon.guests[name] = self

    def __truediv__(self, path):
        return os.path.join(self.path, path)

    def env(self, key):
        return os.path.join(self.path, "env", key)

    def status(self):
        return read(self / "status").strip()

    def error(self):
        return read(self / "error")

    def info(self):
        return json.loads(read(self / "info"))

    def qemu(self):
        return self.info()["pid"]

    def machine(self):
        """Its CPUs, its memory in MiB (less what the kernel keeps) and the command line of its kernel, as the guest sees them; of a
        fake's guest, which is none, as the fake was told."""
        if REAL or BACKEND == "qemu":
            cpus, memory, line = self.ssh("nproc; awk '/^MemTotal/ { print $2 }' /proc/meminfo; cat /proc/cmdline").splitlines()
            return int(cpus), int(memory) / 1024, line.decode()
        told = " ".join(self.daemon.fake().requests())

        def last(pattern):
            return re.findall(pattern, told)[-1]

        memory = last(r'"mem_size_mib":(\d+)') if BACKEND == "firecracker" else int(last(r'"memory":\{[^}]*"size":(\d+)')) >> 20
        return int(last(r'"(?:vcpu_count|boot_vcpus)":(\d+)')), int(memory), json.loads(last(r'"(?:boot_args|cmdline)":("(?:[^"\\]|\\.)*")'))

    def ignore_power_button(self):
        """From now on the guest does not hear that it should power down."""
        if REAL and BACKEND == "firecracker":
            self.ssh("echo -n serio0 >/sys/bus/serio/drivers/atkbd/unbind")  # what presses Ctrl-Alt-Del
        elif REAL or BACKEND == "qemu":
            self.ssh("killall acpid; rm -f /sbin/acpid /usr/sbin/acpid", check=False)
        else:
            self.daemon.fake().do_wrong(**{"PUT /actions SendCtrlAltDel": "ignore", "PUT /vm.power-button": "ignore"})

    def mute(self):
        """From now on nobody reaches its SSH server any more."""
        if BACKEND == "qemu":
            last = "ip link set eth0 down"
        elif REAL:
            last = "killall -STOP vsock-bridge"
        else:
            last = "true"
        # It may take the answer with it.
        with contextlib.suppress(OSError):
            write(self / "exec", f"({last}; echo it-is-mute > /dev/console) > /dev/null 2>&1 &")
        wait_for(lambda: "it-is-mute" in read(self / "console"), "it is mute", 20)
        for fake in self.daemon.fakes.values():
            fake.do_wrong(vsock="hang")

    def panic(self):
        """The guest's kernel does."""
        if REAL or BACKEND == "qemu":
            self.ssh("echo 1 >/proc/sys/kernel/sysrq; (usleep 500000; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
        else:
            write(os.path.join(self.daemon.fake().path, "guests", str(self.qemu()), "sysrq"), "c")

    def wait(self, state, seconds=BOOT_TIMEOUT):
        def reached():
            status = self.status()
            assert status == state or status != "failed", f"{self.name} failed: {self.error()}"
            return status == state

        wait_for(reached, f"{self.name} is {state}", seconds)

    def ssh_argv(self, *options):
        return ["ssh", "-F", self / "ssh_config", *options, self.name]

    def connect(self):
        """A connection that all further calls share: a tenth of the time of a new one."""
        if self.master and self.master.poll() is None:
            return
        self.close()
        argv = self.ssh_argv("-M", "-N", "-S", self.socket, "-o", "ConnectTimeout=20")
        log = open(self.socket + ".log", "ab")
        with log:
            self.master = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        RUN.record_pid(self.master.pid)

        def answers():
            assert self.master.poll() is None, read(self.socket + ".log")
            return os.path.exists(self.socket)

        wait_for(answers, "ssh has connected", 30)

    def close(self):
        if self.master:
            self.master.kill()
            self.master.wait(timeout=10)
            RUN.forget_pid(self.master.pid)
            self.master = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)

    def ssh(self, command, seconds=60, check=True):
        self.connect()
        done = subprocess.run(
            self.ssh_argv("-S", self.socket) + [command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
        )
        if check:
            assert done.returncode == 0, f"{command!r} in the guest: {done}"
        return done.stdout

    def value(self, key):
        """Bytes of a variable in a login shell of the guest."""
        script = f'printf %s "${{{key}-{UNSET}}}"'
        return self.ssh("sh -l -c " + shlex.quote(script))

    def is_set(self, key):
        return self.value(key) != UNSET.encode()

    def processes(self):
        return self.ssh("ps -o args").decode(errors="replace").splitlines()

    def runs(self, text):
        """Is there a process in the guest with just this command line?"""
        return text in [line.strip() for line in self.processes()]

    def exec(self, command, seconds=60):
        """Runs a command through `exec` opened read-write, and returns its output."""
        fd = os.open(self / "exec", os.O_RDWR)
        try:
            os.write(fd, command.encode() if isinstance(command, str) else command)
            parts = []
            while part := os.read(fd, 1 << 20):
                parts.append(part)
            return b"".join(parts)
        finally:
            os.close(fd)
