"""Each error that vmsfs(5) names for a file and an operation is provoked on a real mount; and none is met that it does not name.

The page says it in this form, in the entry of a file: `Errors: *mkdir* EINVAL (no name), EEXIST; *rename* EXDEV.` Each situation
below brings VMs into a state and tries what has to fail there.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import re
import shutil
import signal
import subprocess
import threading

import pytest

from harness import Client, children, full_disk, kill_and_wait, pid_alive, read, read_bytes, wait_for, write
from test_documentation import Page

ANY = "any file"


@functools.cache
def errors_of_the_page():
    """(file, operation, errno) for each that it names, with what it says about it."""
    found = {}
    page = Page("vmsfs.5")
    entries = [(term.split(" (")[0], text) for term, text in page.terms().items() if term.startswith("/")]
    entries.append((ANY, re.sub(r"\s+", " ", " ".join(page.sections["DESCRIPTION"]).replace("*", ""))))
    for path, text in entries:
        for each, said in re.findall(r"Errors( of each)?: ((?:[^.(]|\([^)]*\))*)\.", text):
            for group in re.sub(r"\([^)]*\)", "", said).split(";"):
                words = re.findall(r"\w+", group)
                operations = [word for word in words if word.islower()]
                for operation in operations:
                    for name in words[len(operations) :]:
                        assert hasattr(errno, name), (path, group)
                        found[(f"{path}/*" if each else path, operation, name)] = said
    return found


SITUATIONS = {}
MET = {}  # by the situation's name


def situation(function):
    SITUATIONS[function.__name__] = function
    return function


class Meeting:
    """What a situation is given: makers of daemons and machines, and meets()."""

    def __init__(self, **makers):
        self.__dict__.update(makers)
        self.met = set()

    @contextlib.contextmanager
    def meets(self, path, operation, name):
        """The block fails with this errno, which is one of those that the page names for it."""
        what = (path, operation, name)
        assert what in errors_of_the_page(), f"not in vmsfs(5): {what}"
        try:
            yield
        except OSError as error:
            assert error.errno == getattr(errno, name), f"{what}: {error}"
        else:
            raise AssertionError(f"{what}: no error")
        self.met.add(what)


@pytest.fixture
def meeting(attached, daemon, sshd, new_vm, mount, on_a_disk_of, tmp_path):
    return Meeting(
        attached=attached, daemon=daemon, sshd=sshd, new_vm=new_vm, mount=mount, on_a_disk_of=on_a_disk_of, folder=str(tmp_path)
    )


# ---- operations ----


@contextlib.contextmanager
def opened(path, flags=os.O_WRONLY, **kwargs):
    """Closed at the end, whatever that says."""
    fd = os.open(path, flags, 0o600, **kwargs)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def put(path, data):
    """One write, without emptying the file before."""
    with opened(path) as fd:
        os.write(fd, data)


def take(path):
    with opened(path, os.O_RDONLY) as fd:
        return os.read(fd, 1 << 20)


def close_after(path, *pieces, flags=os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
    """Only the close fails."""
    fd = os.open(path, flags, 0o600)
    try:
        for piece in pieces:
            os.write(fd, piece)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)


def rename_onto(path, data):
    """As tools replace a file: a temporary one beside it, and a rename, which alone fails."""
    temporary = os.path.join(os.path.dirname(path), ".new-one")
    write(temporary, data)
    try:
        os.rename(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def interrupted(call, *arguments):
    """A system call to which a signal comes while it waits. Python would begin it anew."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    main = threading.main_thread().ident
    function = getattr(ctypes.CDLL(None, use_errno=True), call)
    function.restype = ctypes.c_ssize_t
    timer = threading.Timer(1, lambda: signal.pthread_kill(main, signal.SIGUSR1))
    timer.start()
    try:
        if function(*arguments) < 0:
            raise OSError(ctypes.get_errno(), call)
    finally:
        timer.join()


def write_interrupted(fd, data):
    interrupted("write", fd, data, ctypes.c_size_t(len(data)))


def read_interrupted(fd):
    interrupted("read", fd, ctypes.create_string_buffer(4096), ctypes.c_size_t(4096))


MS_BIND, MNT_DETACH = 4096, 2  # sys/mount.h
LARGE = b"x" * 131072
"""More than any variable takes."""


# ---- situations ----


@situation
def any_file(m):
    vm = m.attached()
    with m.meets(ANY, "open", "ENOENT"):
        take(vm.env("NOTHING"))
    with m.meets(ANY, "open", "ENAMETOOLONG"):
        take(vm.env("N" * 256))
    with m.meets(ANY, "open", "ENOTDIR"):
        take(vm / "status/x")
    with m.meets(ANY, "open", "EISDIR"):
        put(vm / "env", b"x")
    with m.meets(ANY, "unlink", "EISDIR"):
        os.unlink(vm / "env")
    with m.meets(ANY, "rmdir", "ENOTDIR"):
        os.rmdir(vm / "status")
    with m.meets(ANY, "link", "EPERM"):
        os.link(vm / "status", vm / "env/LINK")
    with m.meets(ANY, "symlink", "EPERM"):
        os.symlink("x", vm / "env/LINK")
    with m.meets(ANY, "mknod", "EPERM"):
        os.mkfifo(vm / "env/FIFO")
    with m.meets(ANY, "getxattr", "EOPNOTSUPP"):
        os.getxattr(vm / "status", "user.x")
    with m.meets(ANY, "setxattr", "EOPNOTSUPP"):
        os.setxattr(vm / "status", "user.x", b"x")
    for name in ("info", "console", "ssh_config", "run", "error"):
        with m.meets(ANY, "write", "EPERM"):
            put(vm / name, b"x")
    write(vm.env("MAPPED"), "value\n")
    with m.meets(ANY, "mmap", "ENODEV"), opened(vm.env("MAPPED"), os.O_RDWR) as fd:
        mmap.mmap(fd, 6, mmap.MAP_SHARED)


@situation
def modes(m):
    """Another user, whom allow_other lets in."""
    one = m.daemon("allow_other,backend=attach")
    os.mkdir(one.vm("a"))
    path = one.path
    while path != "/":
        os.chmod(path, os.stat(path).st_mode | 0o055)
        path = os.path.dirname(path)
    script = "import os, sys\ntry: os.open(sys.argv[1], os.O_RDONLY)\nexcept OSError as e: print(e.errno)"
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", script, one.vm("a/environ")],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    with m.meets(ANY, "open", "EACCES"):
        raise OSError(int(done.stdout), "as another user")


@situation
def vms(m):
    one = m.daemon("backend=attach")
    os.mkdir(one.vm("a"))
    with m.meets("/", "mkdir", "EINVAL"):
        os.mkdir(one.vm("-a"))
    with m.meets("/", "mkdir", "EEXIST"):
        os.mkdir(one.vm("a"))
    with m.meets("/", "open", "EPERM"):
        write(one.vm("file"), "x")
    with m.meets("/", "rename", "EPERM"):
        os.rename(one.vm("a"), one.vm("b"))
    with m.meets("/", "rmdir", "EPERM"):
        os.rmdir(one.vm(".new"))
    write(one.vm(".defaults/forward"), "required NOT_HERE\n")
    with m.meets("/", "mkdir", "EINVAL"):
        os.mkdir(one.vm("b"))
    write(one.vm(".defaults/forward"), "")

    with m.meets("/ID", "rmdir", "ENOENT"):
        os.rmdir(one.vm("none"))
    with m.meets("/ID", "open", "EPERM"):
        write(one.vm("a/file"), "x")
    with m.meets("/ID", "mkdir", "EPERM"):
        os.mkdir(one.vm("a/folder"))
    with m.meets("/ID", "rename", "EPERM"):
        os.rename(one.vm("a/info"), one.vm("a/other"))
    with m.meets("/ID", "rename", "EXDEV"):
        os.rename(one.vm("a/status"), one.vm("a/env/status"))
    write(one.vm("a/config/protected"), "yes\n")
    with m.meets("/ID", "rmdir", "EPERM"):
        os.rmdir(one.vm("a"))
    # Whoever has just tried that is taken for an `rm -r`.
    os.mkdir(one.vm("a/jobs/j"))
    write(one.vm("a/env/KEY"), "x")
    with m.meets("/ID/jobs", "rmdir", "EPERM"):
        os.rmdir(one.vm("a/jobs/j"))
    with m.meets("/ID/env/KEY", "unlink", "EPERM"):
        os.unlink(one.vm("a/env/KEY"))
    with m.meets("/ID/config/*", "unlink", "EPERM"):
        os.unlink(one.vm("a/config/memory"))
    write(one.vm("a/config/protected"), "no\n")


@situation
def status(m):
    vm = m.attached()
    with m.meets("/ID/status", "write", "EINVAL"):
        write(vm / "status", "on")
    with m.meets("/ID/status", "rename", "EINVAL"):
        rename_onto(vm / "status", "on")
    with m.meets("/ID/status", "write", "EOPNOTSUPP"):
        write(vm / "status", "paused")
    with m.meets("/ID/status", "rename", "EOPNOTSUPP"):
        rename_onto(vm / "status", "paused")
    write(vm / "status", "stopped")
    with m.meets("/ID/status", "write", "EBUSY"):
        write(vm / "status", "paused")
    with m.meets("/ID/status", "rename", "EBUSY"):
        rename_onto(vm / "status", "paused")
    os.mkdir(vm.daemon.vm("nowhere"))
    nowhere = vm.daemon.guest("nowhere")
    write(nowhere / "status", "stopped")
    write(nowhere / "config/address", "no-such-host.invalid")
    write(nowhere / "config/boot_timeout", "1")
    with m.meets("/ID/status", "write", "ENODEV"):
        write(nowhere / "status", "running")
    with m.meets("/ID/status", "rename", "ENODEV"):
        rename_onto(nowhere / "status", "running")
    write(nowhere / "config/boot_timeout", "60")
    with m.meets("/ID/status", "write", "EINTR"), opened(nowhere / "status") as fd:
        write_interrupted(fd, b"running")
    with opened(nowhere / "status") as fd:
        os.rmdir(nowhere.path)
        with m.meets("/ID/status", "write", "ENODEV"):
            os.write(fd, b"running")


@situation
def variables(m):
    vm = m.attached()
    key, one = "/ID/env/KEY", vm.env("KEY")
    write(one, "value\n")
    write(vm.env("OTHER"), "value\n")
    with m.meets("/ID/env", "mkdir", "EEXIST"):
        os.mkdir(one)
    with m.meets("/ID/env", "mkdir", "EINVAL"):
        os.mkdir(vm.env("NEW"))
    for name in ("MY-VAR", "UID"):
        with m.meets(key, "open", "EINVAL"):
            write(vm.env(name), "x")
    with m.meets(key, "open", "EEXIST"), opened(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL):
        pass
    with m.meets(key, "write", "EINVAL"):
        write(one, b"a\0b")
    with m.meets(key, "write", "EFBIG"):
        write(one, LARGE)
    for piece, name in ((b"\0", "EINVAL"), (LARGE, "EFBIG")):
        fd = os.open(one, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, b"a")
        os.write(fd, b"b")
        with m.meets(key, "write", name):
            os.write(fd, piece)
        with m.meets(key, "close", name):
            os.close(fd)
    with opened(one) as fd:
        os.write(fd, b"a")
        os.ftruncate(fd, 9)  # NULs, which have to be overwritten
        with m.meets(key, "fsync", "EINVAL"):
            os.fsync(fd)
    with m.meets(key, "rename", "EINVAL"):
        rename_onto(one, b"a\0b")
    with m.meets(key, "rename", "EINVAL"):
        rename_onto(vm.env("UID"), b"x")
    with m.meets(key, "rename", "EFBIG"):
        rename_onto(one, LARGE)
    with m.meets(key, "rename", "EXDEV"):
        os.rename(one, vm / "KEY")
    with m.meets(key, "truncate", "EINVAL"):
        os.truncate(one, 100)
    with m.meets(key, "truncate", "EFBIG"):
        os.truncate(one, 200_000)
    with opened(one) as fd:
        os.unlink(one)
        with m.meets(key, "fchmod", "ESTALE"):
            os.fchmod(fd, 0o600)
    for i in range(8):
        write(vm.env(f"MUCH{i}"), b"x" * 130_000)
    with m.meets(key, "write", "ENOSPC"):
        write(one, b"x" * 130_000)
    with m.meets(key, "rename", "ENOSPC"):
        rename_onto(one, b"x" * 130_000)
    fd = os.open(one, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, b"a")
    os.write(fd, b"x" * 100_000)
    with m.meets(key, "fsync", "ENOSPC"):
        os.fsync(fd)
    with m.meets(key, "close", "ENOSPC"):
        os.close(fd)


@situation
def environ(m):
    vm = m.attached()
    path, one = "/ID/environ", vm / "environ"

    def renames(data):
        write(vm / "environ.tmp", data)
        try:
            os.rename(vm / "environ.tmp", one)
        finally:
            os.unlink(vm / "environ.tmp")

    def flags(how):
        return os.O_WRONLY | how

    for bad in ("GOOD=1\nB AD=2\n", "A=$B\n", "UID=1\n", "A=a\0b\n"):
        with m.meets(path, "write", "EINVAL"):
            write(one, bad)
        with m.meets(path, "rename", "EINVAL"):
            renames(bad)
    with m.meets(path, "close", "EINVAL"):
        close_after(one, b"A=1\n", b"B='not ended\n")
    with m.meets(path, "write", "EFBIG"):
        write(one, b"A=" + LARGE + b"\n")
    with m.meets(path, "rename", "EFBIG"):
        renames(b"A=" + LARGE + b"\n")
    much = b"".join(b"M%d=" % i + b"x" * 130_000 + b"\n" for i in range(9))
    with m.meets(path, "rename", "ENOSPC"):
        renames(much)
    write(vm / "environ", much[: 8 * 130_004])
    with m.meets(path, "write", "ENOSPC"), opened(one, flags(os.O_APPEND)) as fd:
        os.write(fd, b"N=" + b"x" * 130_000 + b"\n")
    with m.meets(path, "rename", "EXDEV"):
        os.rename(one, vm / "env/environ")


@situation
def commands(m):
    vm = m.attached(options="output_max=64K")
    path, one = "/ID/exec", vm / "exec"
    with m.meets(path, "write", "EREMOTEIO"):
        write(one, "exit 3\n")
    with m.meets(path, "write", "E2BIG"):
        put(one, b"true #" + LARGE)
    with m.meets(path, "write", "EINVAL"):
        write(one, b"echo a\0b\n")
    with m.meets(path, "write", "EINVAL"), opened(one) as fd:
        os.write(fd, b"true #" + b"x" * 2000)
        os.write(fd, b"the rest\n")
    with m.meets(path, "write", "EBUSY"), opened(one, os.O_RDWR) as fd:
        os.write(fd, b"sleep 60\n")
        os.write(fd, b"true\n")
    with m.meets(path, "write", "EINTR"), opened(one) as fd:
        write_interrupted(fd, b"sleep 60\n")
    with m.meets(path, "read", "EAGAIN"), opened(one, os.O_RDWR | os.O_NONBLOCK) as fd:
        os.write(fd, b"sleep 60\n")
        os.read(fd, 10)
    with m.meets(path, "read", "EINTR"), opened(one, os.O_RDWR) as fd:
        os.write(fd, b"sleep 60\n")
        read_interrupted(fd)
    with m.meets(path, "read", "EOVERFLOW"), opened(one, os.O_RDWR) as fd:
        os.write(fd, b"head -c 100000 /dev/zero\n")
        while os.read(fd, 65536):
            pass


@situation
def jobs(m):
    vm = m.attached()
    with m.meets("/ID/jobs", "mkdir", "EINVAL"):
        os.mkdir(vm / "jobs/-x")
    os.mkdir(vm / "jobs/a")
    with m.meets("/ID/jobs", "mkdir", "EEXIST"):
        os.mkdir(vm / "jobs/a")
    with m.meets("/ID/jobs", "open", "EPERM"):
        write(vm / "jobs/file", "x")
    with m.meets("/ID/jobs", "rename", "EPERM"):
        os.rename(vm / "jobs/a", vm / "jobs/b")
    name, one = "/ID/jobs/NAME", vm / "jobs/a"
    with m.meets(name, "open", "EPERM"):
        write(f"{one}/other", "x")
    with m.meets(name, "mkdir", "EPERM"):
        os.mkdir(f"{one}/folder")
    with m.meets(name, "rename", "EPERM"):
        os.rename(f"{one}/stdout", f"{one}/out")
    with m.meets(name, "rename", "EXDEV"):
        os.rename(f"{one}/cwd", vm / "cwd")

    # before the start
    for file in ("command", "argv"):
        with m.meets(f"{name}/{file}", "write", "E2BIG"):
            write(f"{one}/{file}", b"x" * 131073)
        with m.meets(f"{name}/{file}", "rename", "E2BIG"):
            rename_onto(f"{one}/{file}", b"x" * 131073)
    for file, bad in (("command", b"a\0b"), ("argv", b"-x\0")):
        with m.meets(f"{name}/{file}", "write", "EINVAL"):
            write(f"{one}/{file}", bad)
        with m.meets(f"{name}/{file}", "rename", "EINVAL"):
            rename_onto(f"{one}/{file}", bad)
    with m.meets(f"{name}/argv", "fsync", "EINVAL"), opened(f"{one}/argv") as fd:
        os.write(fd, b"\n")
        os.fsync(fd)
    write(f"{one}/env/NUL", b"a\0b")
    for file in ("command", "argv"):
        with m.meets(f"{name}/{file}", "close", "EINVAL"):
            write(f"{one}/{file}", "true")
    with m.meets(f"{name}/command", "fsync", "EINVAL"), opened(f"{one}/command") as fd:
        os.write(fd, b"true")
        os.fsync(fd)
    os.unlink(f"{one}/env/NUL")

    env, key = f"{name}/env", f"{name}/env/KEY"
    write(f"{one}/env/KEY", "x")
    with m.meets(env, "mkdir", "EINVAL"):
        os.mkdir(f"{one}/env/NEW")
    for bad in ("MY-VAR", "UID"):
        with m.meets(key, "open", "EINVAL"):
            write(f"{one}/env/{bad}", "x")
    with m.meets(key, "open", "EEXIST"), opened(f"{one}/env/KEY", os.O_WRONLY | os.O_CREAT | os.O_EXCL):
        pass
    with m.meets(key, "write", "EFBIG"):
        write(f"{one}/env/KEY", LARGE)
    with m.meets(key, "truncate", "EFBIG"):
        os.truncate(f"{one}/env/KEY", 200_000)
    with m.meets(key, "rename", "EFBIG"):
        rename_onto(f"{one}/env/KEY", LARGE)
    with m.meets(key, "rename", "EINVAL"):
        rename_onto(f"{one}/env/UID", b"x")
    with m.meets(key, "rename", "EXDEV"):
        os.rename(f"{one}/env/KEY", vm.env("KEY"))
    for i in range(2):
        write(f"{one}/env/.much{i}", b"x" * (4 << 20))
    with m.meets(key, "write", "ENOSPC"):
        write(f"{one}/env/NEW", b"x" * 1000)
    for i in range(2):
        os.unlink(f"{one}/env/.much{i}")
    os.unlink(f"{one}/env/NEW")
    with m.meets(key, "open", "ENOSPC"):
        for i in range(300):
            write(f"{one}/env/K{i}", "")
    for i in range(300):
        with contextlib.suppress(OSError):
            os.unlink(f"{one}/env/K{i}")

    values = {"cwd": "tmp", "shell": "csh", "timeout": "soon", "output_max": "1", "overflow": "drown"}
    for file, bad in values.items():
        with m.meets(f"{name}/{file}", "write", "EINVAL"):
            write(f"{one}/{file}", bad)
        with m.meets(f"{name}/{file}", "rename", "EINVAL"):
            rename_onto(f"{one}/{file}", bad)
    for file in ("status", "error"):
        with m.meets(f"{name}/{file}", "open", "EPERM"):
            write(f"{one}/{file}", "x")
    for file in ("status", "error", "stdin", "stdout", "stderr", "exit", "signal"):
        with m.meets(f"{name}/{file}", "rename", "EPERM"):
            rename_onto(f"{one}/{file}", "x")
    for file in ("stdout", "stderr", "exit"):
        with m.meets(f"{name}/{file}", "write", "EPERM"):
            put(f"{one}/{file}", b"x")
    with m.meets(f"{name}/signal", "write", "EINVAL"):
        write(f"{one}/signal", "NONE")
    with m.meets(f"{name}/signal", "write", "EBUSY"):
        write(f"{one}/signal", "TERM")
    for file in ("stdout", "stderr", "exit"):
        with m.meets(f"{name}/{file}", "read", "EAGAIN"), opened(f"{one}/{file}", os.O_RDONLY | os.O_NONBLOCK) as fd:
            os.read(fd, 10)
        with m.meets(f"{name}/{file}", "read", "EINTR"), opened(f"{one}/{file}", os.O_RDONLY) as fd:
            read_interrupted(fd)

    # after the start
    write(f"{one}/output_max", "64K")
    with opened(f"{one}/env/KEY") as held, opened(f"{one}/stdin") as stdin:
        write(f"{one}/command", "head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2")
        assert read(f"{one}/exit") == "0\n"
        with m.meets(f"{name}/stdin", "write", "EPIPE"):
            os.write(stdin, b"x")
        with m.meets(key, "write", "EBUSY"):
            os.write(held, b"x")
    for file in ("stdout", "stderr"):
        with m.meets(f"{name}/{file}", "read", "EOVERFLOW"), opened(f"{one}/{file}", os.O_RDONLY) as fd:
            while os.read(fd, 65536):
                pass
    for file in ("command", "argv"):
        with m.meets(f"{name}/{file}", "write", "EBUSY"):
            write(f"{one}/{file}", "true")
        with m.meets(f"{name}/{file}", "rename", "EBUSY"):
            rename_onto(f"{one}/{file}", "true")
    for file, good in {"cwd": "/tmp", "shell": "raw", "timeout": "9", "output_max": "1M", "overflow": "cut"}.items():
        with m.meets(f"{name}/{file}", "write", "EBUSY"):
            write(f"{one}/{file}", good)
        with m.meets(f"{name}/{file}", "rename", "EBUSY"):
            rename_onto(f"{one}/{file}", good)
    with m.meets(key, "open", "EBUSY"):
        write(f"{one}/env/LATE", "x")
    with m.meets(key, "rename", "EBUSY"):
        os.rename(f"{one}/env/KEY", f"{one}/env/LATE")
    with m.meets(key, "truncate", "EBUSY"):
        os.truncate(f"{one}/env/KEY", 0)
    with m.meets(f"{name}/signal", "write", "EBUSY"):
        write(f"{one}/signal", "TERM")

    with opened(f"{one}/command") as command, opened(one, os.O_RDONLY | os.O_DIRECTORY) as folder:
        os.rmdir(one)
        with m.meets(f"{name}/command", "write", "ENODEV"):
            os.write(command, b"true")
        with m.meets(name, "open", "ENOENT"):
            os.open("cwd", os.O_WRONLY, dir_fd=folder)
    for i in range(1024):
        os.mkdir(vm / f"jobs/j{i}")
    with m.meets("/ID/jobs", "mkdir", "ENOSPC"):
        os.mkdir(vm / "jobs/more")
    with m.meets("/ID/jobs/.clone", "open", "ENOSPC"):
        take(vm / "jobs/.clone")


@situation
def settings(m):
    one = m.daemon("backend=attach")
    os.mkdir(one.vm("a"))
    vm = one.guest("a")
    vm_status = vm / "status"
    write(vm_status, "stopped")
    path, memory = "/ID/config/*", vm / "config/memory"
    with m.meets("/ID/config", "open", "EINVAL"):
        write(vm / "config/colour", "x")
    with m.meets("/ID/config", "mkdir", "EEXIST"):
        os.mkdir(memory)
    with m.meets("/ID/config", "mkdir", "EPERM"):
        os.mkdir(vm / "config/folder")
    with m.meets(path, "write", "EINVAL"):
        write(memory, "much")
    with m.meets(path, "close", "EINVAL"):
        close_after(memory, b"5", b"12much")
    with m.meets(path, "fsync", "EINVAL"), opened(memory) as fd:
        os.ftruncate(fd, 0)
        os.write(fd, b"5")
        os.write(fd, b"x")
        os.fsync(fd)
    with m.meets(path, "rename", "EINVAL"):
        rename_onto(memory, "much")
    with m.meets(path, "truncate", "EINVAL"):
        os.truncate(memory, 100)
    with m.meets(path, "write", "EFBIG"):
        write(memory, b"1" * 9000)
    with m.meets(path, "rename", "EXDEV"):
        os.rename(memory, vm.env("MEMORY"))
    with m.meets("/ID/config/disk", "write", "EINVAL"):
        os.makedirs(f"{one.state}/vms/a", exist_ok=True)
        with open(f"{one.state}/vms/a/disk.img", "wb") as f:
            f.truncate(64 << 20)
        write(vm / "config/disk", "32")


@situation
def settings_of_a_vm_that_runs(m):
    vm = m.attached(options="memory=1024")
    path, memory = "/ID/config/*", vm / "config/memory"
    with m.meets(path, "write", "EBUSY"):
        write(memory, "512")
    with m.meets(path, "rename", "EBUSY"):
        rename_onto(memory, "512")
    with m.meets(path, "truncate", "EBUSY"):
        os.truncate(memory, 3)


@situation
def prepared(m):
    one = m.daemon("backend=attach")
    os.mkdir(one.vm("there"))
    os.mkdir(one.vm(".new/a"))
    with m.meets("/.new", "mkdir", "EINVAL"):
        os.mkdir(one.vm(".new/-a"))
    with m.meets("/.new", "mkdir", "EEXIST"):
        os.mkdir(one.vm(".new/a"))
    with m.meets("/.new", "open", "EPERM"):
        write(one.vm(".new/file"), "x")
    with m.meets("/.new", "rename", "EPERM"):
        os.rename(one.vm(".new/a"), one.vm("-a"))
    with m.meets("/.new", "rename", "EPERM"):
        os.rename(one.vm(".new/a"), one.vm(".new/-a"))
    with m.meets("/.new", "rename", "ENODEV"):  # no address
        os.rename(one.vm(".new/a"), one.vm("a"))
    with m.meets("/.new", "rename", "EXDEV"):
        os.rename(one.vm(".new/a"), one.vm("there/a"))
    write(one.vm(".new/a/config/address"), "127.0.0.1")
    with m.meets("/.new", "rename", "EEXIST"):
        os.rename(one.vm(".new/a"), one.vm("there"))
    os.mkdir(one.vm(".new/b"))
    with m.meets("/.new", "rename", "EEXIST"):
        os.rename(one.vm(".new/a"), one.vm(".new/b"))
    with m.meets("/.new/NAME", "open", "EPERM"):
        write(one.vm(".new/a/file"), "x")
    with m.meets("/.new/NAME", "mkdir", "EPERM"):
        os.mkdir(one.vm(".new/a/folder"))

    for path, forward in (("/.new/NAME/forward", one.vm(".new/a/forward")), ("/.defaults/forward", one.vm(".defaults/forward"))):
        with m.meets(path, "write", "EINVAL"):
            write(forward, "1A\n")
        with m.meets(path, "write", "EFBIG"):
            write(forward, b"A\n" * 100_000)
        with m.meets(path, "close", "EINVAL"):
            close_after(forward, b"A\n", b"1A\n")
        with m.meets(path, "rename", "EINVAL"):
            rename_onto_forward(forward, "1A\n")
        with m.meets(path, "truncate", "EINVAL"):
            os.truncate(forward, 100)
        with m.meets(path, "rename", "EXDEV"):
            os.rename(forward, one.vm("there/forward"))
    with opened(one.vm(".new/a/forward"), os.O_WRONLY | os.O_TRUNC) as fd:
        os.rmdir(one.vm(".new/a"))
        with m.meets("/.new/NAME/forward", "write", "ENODEV"):
            os.write(fd, b"A\n")


def rename_onto_forward(path, data):
    write(path + ".tmp", data)
    try:
        os.rename(path + ".tmp", path)
    finally:
        os.unlink(path + ".tmp")


# The variable KEY is there, and OTHER. What is prepared before a fault, so that the close alone meets it.


class Changes:
    """Every way to change a variable, for a fault that meets them all."""

    def __init__(self, vm):
        self.vm = vm
        write(vm.env("KEY"), "value\n")
        write(vm.env("OTHER"), "value\n")
        write(vm.env(".temporary"), "value\n")
        self.held = []
        for _ in range(2):
            fd = os.open(vm.env("KEY"), os.O_WRONLY | os.O_TRUNC)
            os.write(fd, b"value\n")
            os.write(fd, b"more\n")
            self.held.append(fd)
        self.environ = os.open(vm / "environ", os.O_WRONLY | os.O_TRUNC)
        os.write(self.environ, b"KEY=value\nOTHER=value\n")
        write(vm / "environ.tmp", "KEY=value\nOTHER=other\n")

    def meet(self, m, name):
        key, env = "/ID/env/KEY", self.vm.env
        with m.meets(key, "write", name):
            write(env("KEY"), "new\n")
        with m.meets(key, "truncate", name):
            os.truncate(env("KEY"), 2)
        with m.meets(key, "rename", name):
            os.rename(env(".temporary"), env("KEY"))
        with m.meets(key, "unlink", name):
            os.unlink(env("OTHER"))
        with m.meets(key, "fsync", name):
            os.fsync(self.held[0])
        with m.meets(key, "close", name):
            os.close(self.held.pop())
        with contextlib.suppress(OSError):
            os.close(self.held.pop())
        with m.meets("/ID/environ", "write", name):
            write(self.vm / "environ", "KEY=new\n")
        with m.meets("/ID/environ", "rename", name):
            os.rename(self.vm / "environ.tmp", self.vm / "environ")
        with m.meets("/ID/environ", "close", name):
            os.close(self.environ)

    def drop(self):
        for fd in [*self.held, self.environ]:
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def changes(vm):
    one = Changes(vm)
    try:
        yield one
    finally:
        one.drop()


def commands_meet(m, vm, name):
    """What starts commands."""
    with m.meets("/ID/exec", "write", name):
        put(vm / "exec", b"true\n")
    for file in ("command", "argv"):
        with m.meets(f"/ID/jobs/NAME/{file}", "write", name):
            put(vm / f"jobs/a/{file}", b"true")
        with m.meets(f"/ID/jobs/NAME/{file}", "rename", name):
            rename_onto(vm / f"jobs/a/{file}", "true")


@situation
def paused(m):
    vm = m.new_vm("errors-paused")
    os.mkdir(vm / "jobs/a")
    with changes(vm) as change:
        write(vm / "status", "paused")
        change.meet(m, "EBUSY")
        commands_meet(m, vm, "EBUSY")
        write(vm / "status", "running")


@situation
def stopped(m):
    vm = m.attached()
    os.mkdir(vm / "jobs/a")
    write(vm / "status", "stopped")
    commands_meet(m, vm, "EBUSY")


@situation
def failed(m):
    one = m.daemon("backend=attach")
    os.mkdir(one.vm("a"))
    vm = one.guest("a")
    wait_for(lambda: vm.status() == "failed", "it has failed")
    os.mkdir(vm / "jobs/a")
    commands_meet(m, vm, "ENODEV")


@situation
def gone(m):
    """Files and directories that are open when the VM is destroyed."""
    vm = m.attached()
    write(vm / "status", "stopped")
    folders = {name: os.open(vm / name, os.O_RDONLY | os.O_DIRECTORY) for name in ("env", "config", "jobs")}
    setting = os.open(vm / "config/memory", os.O_WRONLY | os.O_TRUNC)
    command = os.open(vm / "exec", os.O_WRONLY)
    write(vm / "status", "running")
    with changes(vm) as change:
        fresh = os.open(vm.env("OTHER"), os.O_WRONLY)
        fresh_environ = os.open(vm / "environ", os.O_WRONLY | os.O_APPEND)
        os.rmdir(vm.path)
        with m.meets("/ID/env/KEY", "write", "ENODEV"):
            os.write(fresh, b"x")
        with m.meets("/ID/env/KEY", "fsync", "ENODEV"):
            os.fsync(change.held[0])
        with m.meets("/ID/env/KEY", "close", "ENODEV"):
            os.close(change.held.pop())
        with m.meets("/ID/environ", "write", "ENODEV"):
            os.write(fresh_environ, b"A=1\n")
        with m.meets("/ID/environ", "close", "ENODEV"):
            os.close(change.environ)
        with m.meets("/ID/exec", "write", "ENODEV"):
            os.write(command, b"true\n")
        with m.meets("/ID/config/*", "write", "ENODEV"):
            os.write(setting, b"512")
        with m.meets("/ID/env/KEY", "open", "ENODEV"):
            os.open("NEW", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folders["env"])
        with m.meets("/ID/env", "mkdir", "ENODEV"):
            os.mkdir("lock.d", dir_fd=folders["env"])
        with m.meets("/ID/config", "open", "ENODEV"):
            os.open("memory", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folders["config"])
        with m.meets("/ID/config", "mkdir", "ENODEV"):
            os.mkdir("lock.d", dir_fd=folders["config"])
        with m.meets("/ID/jobs", "mkdir", "ENODEV"):
            os.mkdir("b", dir_fd=folders["jobs"])
        for fd in (fresh, fresh_environ):
            with contextlib.suppress(OSError):
                os.close(fd)
    for fd in (setting, command, *folders.values()):
        with contextlib.suppress(OSError):
            os.close(fd)


@situation
def unreachable(m):
    vm = m.attached()
    os.mkdir(vm / "jobs/a")
    os.mkdir(vm / "jobs/run")
    write(vm / "jobs/run/command", "echo; sleep 60")
    assert take(vm / "jobs/run/stdout") == b"\n"
    with changes(vm) as change, opened(vm / "exec", os.O_RDWR) as command:
        os.write(command, b"echo; sleep 60")
        assert os.read(command, 1) == b"\n"  # it runs
        vm.sshd.stop()
        wait_for(lambda: vm.status() == "unreachable", "it is unreachable", 20)
        change.meet(m, "EHOSTUNREACH")
        commands_meet(m, vm, "EHOSTUNREACH")
        with m.meets("/ID/exec", "read", "ECONNRESET"):
            os.read(command, 10)
        for file in ("stdout", "stderr"):
            with m.meets(f"/ID/jobs/NAME/{file}", "read", "ECONNRESET"):
                with opened(vm / f"jobs/run/{file}", os.O_RDONLY) as fd:
                    while os.read(fd, 10):
                        pass
        assert read(vm / "jobs/run/exit") == "lost\n"
        with m.meets("/ID/status", "write", "ETIMEDOUT"):
            write(vm / "status", "running")
        with m.meets("/ID/status", "write", "EHOSTUNREACH"):
            write(vm / "status", "paused")


@situation
def cut_off(m):
    """The connection breaks while a command runs."""
    vm = m.attached()
    with Client(["dd", "if=/dev/stdin", f"of={vm / 'exec'}", "conv=notrunc", "status=none"], stdin=subprocess.PIPE) as client:
        client.process.stdin.write(f"touch {m.folder}/runs; sleep 60".encode())
        client.process.stdin.close()
        client.process.stdin = None
        wait_for(lambda: os.path.exists(m.folder + "/runs"), "the command runs")
        client.waits()
        vm.sshd.stop()
        errors = client.result()[2]
    with m.meets("/ID/exec", "write", "ECONNRESET"):
        raise OSError(next(number for number in errno.errorcode if os.strerror(number) in errors), errors)


@contextlib.contextmanager
def stopped_server(vm):
    """The machine is there, and does not answer. In the end it does again."""
    pids = [vm.sshd.process.pid, *children(vm.sshd.process.pid)]

    def tell(number):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # a session that has just ended
                os.kill(pid, number)

    tell(signal.SIGSTOP)
    try:
        yield
    finally:
        tell(signal.SIGCONT)
    wait_for(lambda: vm.status() == "running", "it answers again", 20)


@situation
def mute(m):
    """Whoever is the first to ask is told that there is no answer; then it is unreachable."""
    vm = m.attached(options="timeout=1")
    os.mkdir(vm / "jobs/a")
    key, env = "/ID/env/KEY", vm.env
    with changes(vm) as change:
        operations = {
            (key, "write"): lambda: write(env("KEY"), "new\n"),
            (key, "truncate"): lambda: os.truncate(env("KEY"), 2),
            (key, "rename"): lambda: os.rename(env(".temporary"), env("KEY")),
            (key, "unlink"): lambda: os.unlink(env("OTHER")),
            (key, "fsync"): lambda: os.fsync(change.held[0]),
            (key, "close"): lambda: os.close(change.held.pop()),
            ("/ID/environ", "write"): lambda: write(vm / "environ", "KEY=new\n"),
            ("/ID/environ", "rename"): lambda: os.rename(vm / "environ.tmp", vm / "environ"),
            ("/ID/environ", "close"): lambda: os.close(change.environ),
        }
        for what, operation in operations.items():
            with stopped_server(vm), m.meets(*what, "ETIMEDOUT"):
                operation()
    write(vm / "jobs/a/command", "echo; sleep 60")
    with opened(vm / "jobs/a/stdout", os.O_RDONLY) as fd:
        assert os.read(fd, 1) == b"\n"  # it runs
    with stopped_server(vm), m.meets("/ID/jobs/NAME/signal", "write", "ETIMEDOUT"):
        write(vm / "jobs/a/signal", "TERM")


@situation
def interruptions(m):
    vm = m.attached()
    with stopped_server(vm):
        with m.meets("/ID/env/KEY", "write", "EINTR"), opened(vm.env("KEY"), os.O_WRONLY | os.O_CREAT) as fd:
            write_interrupted(fd, b"x")
        with m.meets("/ID/environ", "write", "EINTR"), opened(vm / "environ", os.O_WRONLY | os.O_APPEND) as fd:
            write_interrupted(fd, b"A=1\n")


@situation
def refused_by_the_machine(m):
    vm = m.attached(options="env_file=/sys/vmsfs_env.sh")
    key = "/ID/env/KEY"
    with m.meets(key, "write", "EACCES"):
        write(vm.env("KEY"), "x")
    write(vm.env(".temporary"), "x")
    with m.meets(key, "rename", "EACCES"):
        os.rename(vm.env(".temporary"), vm.env("KEY"))
    with m.meets("/ID/environ", "write", "EACCES"):
        write(vm / "environ", "KEY=x\n")
    write(vm / "environ.tmp", "KEY=x\n")
    with m.meets("/ID/environ", "rename", "EACCES"):
        os.rename(vm / "environ.tmp", vm / "environ")


def is_of_the_control_shell(pid):
    """A session in which variables are set, and no commands run."""
    return any(b"VMSFS_SEEN=" in read_bytes(f"/proc/{child}/environ") for child in children(pid) if pid_alive(child))


def sessions_of_commands(vm):
    """When one is up, and no other is on its way."""
    put(vm / "exec", b"true\n")
    found = [pid for pid in children(vm.sshd.process.pid) if children(pid) and not is_of_the_control_shell(pid)]
    assert found
    return found


def connections_meet(m, vm, name):
    """What needs a new connection."""
    os.mkdir(vm / "jobs/a")
    with m.meets("/ID/exec", "write", name):
        put(vm / "exec", b"true\n")
    with opened(vm / "exec", os.O_RDWR) as fd:
        os.write(fd, b"true")
        with m.meets("/ID/exec", "read", name):
            os.read(fd, 10)
    write(vm / "jobs/a/command", "true")
    for file in ("stdout", "stderr"):
        with m.meets(f"/ID/jobs/NAME/{file}", "read", name):
            take(vm / f"jobs/a/{file}")


@situation
def login_refused(m):
    vm = m.attached()
    sessions = sessions_of_commands(vm)
    with open(vm.sshd.authorized_keys, "w", encoding="ascii"):
        pass
    for pid in sessions:
        kill_and_wait(pid)
    connections_meet(m, vm, "EACCES")


@situation
def connection_refused(m):
    vm = m.attached()
    all_of_them, sessions = children(vm.sshd.process.pid), sessions_of_commands(vm)
    for pid in [vm.sshd.process.pid, *sessions]:
        kill_and_wait(pid)
    connections_meet(m, vm, "EHOSTUNREACH")
    for pid in all_of_them:
        kill_and_wait(pid)


@situation
def no_room_in_the_machine(m):
    folder = m.folder + "/small"
    os.mkdir(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True, timeout=20)
    try:
        vm = m.attached(options=f"env_file={folder}/env.sh")
        with changes(vm) as change, open(folder + "/fill", "wb", 0) as f, contextlib.suppress(OSError):
            with contextlib.suppress(OSError):
                while True:
                    f.write(bytes(4096))
            key = "/ID/env/KEY"
            with m.meets(key, "write", "ENOSPC"):
                write(vm.env("KEY"), "x" * 20_000)
            with m.meets(key, "rename", "ENOSPC"):
                write(vm.env(".temporary"), "x" * 20_000)
                os.rename(vm.env(".temporary"), vm.env("KEY"))
            assert change
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=20)


@situation
def a_file_that_cannot_be_replaced(m):
    vm = m.attached()
    path, libc = os.fsencode(vm.sshd.env_file), ctypes.CDLL(None)
    with changes(vm) as change:
        # Not by a program: its start would close what is open here, and so commit it.
        assert libc.mount(path, path, None, MS_BIND, None) == 0
        try:
            change.meet(m, "EIO")
        finally:
            assert libc.umount2(path, MNT_DETACH) == 0


def the_host_meets(m, one, vm, name):
    with m.meets("/", "mkdir", name):
        os.mkdir(one.vm("another"))
    with m.meets("/.new", "mkdir", name):
        os.mkdir(one.vm(".new/another"))
    for path in (vm.env("KEY"), one.vm(".defaults/env/KEY"), one.vm(".new/a/env/KEY")):
        with m.meets("/ID/env/KEY", "write", name):
            write(path, "77\n")
    for path in (vm / "config/port", one.vm(".defaults/config/port"), one.vm(".new/a/config/port")):
        with m.meets("/ID/config/*", "write", name):
            write(path, "77\n")
        with m.meets("/ID/config/*", "rename", name):
            rename_onto(path, "77\n")
    for path, forward in (("/.new/NAME/forward", one.vm(".new/a/forward")), ("/.defaults/forward", one.vm(".defaults/forward"))):
        with m.meets(path, "write", name):
            write(forward, "A\n")
        with m.meets(path, "rename", name):
            rename_onto_forward(forward, "A\n")
    with m.meets("/ID/status", "write", name):
        write(vm / "status", "running")


def host_with_a_disk(m):
    one = m.on_a_disk_of("3m", "backend=attach,address=127.0.0.1,boot_timeout=1")
    os.mkdir(one.vm("a"))
    vm = one.guest("a")
    wait_for(lambda: vm.status() == "failed", "it has given up", 20)
    write(vm.env("KEY"), "x\n")
    os.mkdir(one.vm(".new/a"))
    return one, vm


@situation
def no_room_on_the_host(m):
    one, vm = host_with_a_disk(m)
    with full_disk(one):
        the_host_meets(m, one, vm, "ENOSPC")


@situation
def host_that_cannot_be_written(m):
    one, vm = host_with_a_disk(m)
    folders = [os.path.join(one.state, name) for name in ("vms", "new", "defaults")]
    for folder in folders:
        os.rename(folder, folder + ".away")
    try:
        the_host_meets(m, one, vm, "EIO")
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(folder + ".away", folder)


@situation
def ending(m):
    """What the one before had begun for its boot takes its time."""
    slow = m.folder + "/bin"
    os.mkdir(slow)
    with open(slow + "/ssh-keygen", "w", encoding="ascii") as f:
        f.write(f'#!/bin/sh\n[ ! -e {m.folder}/slow ] || sleep 3\nexec /usr/bin/ssh-keygen "$@"\n')
    os.chmod(slow + "/ssh-keygen", 0o755)
    one = m.daemon(env={"PATH": f"{slow}:/usr/bin:/bin"})
    with open(m.folder + "/slow", "w", encoding="ascii"):
        pass
    os.mkdir(one.vm("a"))
    os.rmdir(one.vm("a"))
    with m.meets("/", "mkdir", "EBUSY"):
        os.mkdir(one.vm("a"))


# ---- the tests ----


@pytest.mark.deadline(240)
@pytest.mark.parametrize("name", SITUATIONS)
def test_errors_are_those_of_the_page(meeting, name):
    SITUATIONS[name](meeting)
    MET[name] = meeting.met


@pytest.mark.deadline(600)
def test_every_error_of_the_page_has_been_met(meeting):
    for name in SITUATIONS:
        if name not in MET:  # this test alone, or one above has failed
            SITUATIONS[name](meeting)
    met = meeting.met.union(*MET.values())
    assert set(errors_of_the_page()) - met == set(), "in vmsfs(5), and never provoked"
    assert len(met) > 200
