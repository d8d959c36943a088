"""The guest of a VMM that is not one: the initrd that it was given, in namespaces of its own instead of a machine.

Everything above the kernel is real: the image's /init, its SSH server with the keys that the daemon has put in, its shell and
programs, with process numbers, a network, a host name and a file system of its own. It ends with the process that has made it.
"""

import contextlib
import ctypes
import os
import signal
import socket
import stat
import threading
import time
import traceback

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
SYS_RT_SIGACTION, SYS_PIVOT_ROOT, MNT_DETACH = 13, 155, 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24
# What would reach out of the namespaces: modules, raw input and output, the clock.
CAPABILITIES = {"SYS_MODULE": 16, "SYS_RAWIO": 17, "SYS_PTRACE": 19, "SYS_TIME": 25, "MAC_ADMIN": 33, "SYSLOG": 34}
POWERED_OFF, RESET = "powered off", "reset"


def check(result):
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def mount(source, target, kind, flags=0, data=None):
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    check(LIBC.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)))


def cpio_members(data):
    """(name, mode, contents) of one newc archive behind the other, as the kernel takes them."""
    at = 0
    while at < len(data):
        if data[at] == 0:
            at += 1
            continue
        assert data[at : at + 6] == b"070701", f"no cpio archive at {at} of the initrd"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        begin = (at + 110 + name_size + 3) // 4 * 4
        at = (begin + size + 3) // 4 * 4
        if name == "TRAILER!!!":
            continue
        yield name, mode, data[begin : begin + size]


def unpack(data, root):
    for name, mode, contents in cpio_members(data):
        path = os.path.join(root, name)
        if os.path.lexists(path) and not os.path.isdir(path):
            os.unlink(path)  # a later one replaces it
        if stat.S_ISDIR(mode):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, stat.S_IMODE(mode))
        elif stat.S_ISLNK(mode):
            os.symlink(contents.decode(), path)
        elif stat.S_ISREG(mode) and os.path.normpath(name) != "lib/disk-init":  # there is none
            with open(path, "wb") as f:
                f.write(contents)
            os.chmod(path, stat.S_IMODE(mode))


class Guest:
    """Made before the first thread of the process, as it forks; it waits until start()."""

    def __init__(self, folder, ended):
        self.folder = folder  # empty, with nothing in it that is seen outside
        self.ended = ended  # called with POWERED_OFF or RESET
        self.trigger = os.path.join(folder, "sysrq")
        self.root = os.path.join(folder, "root")
        os.makedirs(self.root, exist_ok=True)
        if not os.path.exists(self.trigger):
            os.mkfifo(self.trigger)
        orders, self.orders = os.pipe()
        self.console, self.terminal = os.openpty()
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        check(LIBC.unshare(CLONE_NEWPID))
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.orders)
                self.live(orders)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(125)
        os.close(orders)
        check(LIBC.setns(own, CLONE_NEWPID))  # or no thread could be made
        os.close(own)
        self.started = False

    # ---- process 1 ----

    def live(self, orders):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        os.umask(0o022)  # as a kernel's first process has it
        with os.fdopen(orders, "rb") as f:
            order = f.read()
        if not order:
            return  # never started
        initrd, command_line = order.decode().split("\0")
        check(LIBC.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET))
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        self.make_tree(initrd, command_line)
        for fd in range(3):
            os.dup2(self.terminal, fd)
        os.closerange(3, 256)
        # Nothing of the host's mounts is left, which an unmount there would wait for.
        os.makedirs(os.path.join(self.root, "mnt/host"))
        check(LIBC.syscall(SYS_PIVOT_ROOT, os.fsencode(self.root), os.fsencode(self.root + "/mnt/host")))
        os.chdir("/")
        check(LIBC.umount2(b"/mnt/host", MNT_DETACH))
        os.rmdir("/mnt/host")
        for number in CAPABILITIES.values():
            LIBC.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
        # The system call itself: glibc's posix_spawn() has left two of its own ignored, which sigaction() will not touch.
        for number in range(1, 65):
            LIBC.syscall(SYS_RT_SIGACTION, number, bytes(32), None, 8)
        os.execve("/init", ["/init"], {"PATH": "/bin", "HOME": "/", "TERM": "linux"})

    def make_tree(self, initrd, command_line):
        root = self.root
        mount("guest", root, "tmpfs", data="mode=755")
        with open(initrd, "rb") as f:
            unpack(f.read(), root)
        # /init leaves alone what is mounted already when this is there; modules there are none to load.
        os.makedirs(os.path.join(root, "run/vmsfs/disk"))
        for folder in ("proc", "dev/pts", "tmp"):
            os.makedirs(os.path.join(root, folder), exist_ok=True)
        os.chmod(os.path.join(root, "tmp"), 0o1777)
        for name, minor, major in ("null", 3, 1), ("zero", 5, 1), ("random", 8, 1), ("urandom", 9, 1), ("tty", 0, 5):
            os.mknod(os.path.join(root, "dev", name), stat.S_IFCHR | 0o666, os.makedev(major, minor))
            os.chmod(os.path.join(root, "dev", name), 0o666)
        os.symlink("/proc/self/fd", os.path.join(root, "dev/fd"))
        with open(os.path.join(root, "dev/console"), "wb"):
            pass
        mount(os.ttyname(self.terminal), os.path.join(root, "dev/console"), None, MS_BIND)
        mount("devpts", os.path.join(root, "dev/pts"), "devpts", data="newinstance,ptmxmode=0666,mode=620,gid=5")
        os.symlink("pts/ptmx", os.path.join(root, "dev/ptmx"))
        with open(os.path.join(root, "etc/hostname"), encoding="ascii") as f:
            name = f.read().strip().encode()
        check(LIBC.sethostname(name, len(name)))
        proc = os.path.join(root, "proc")
        mount("proc", proc, "proc")
        with open(os.path.join(root, "cmdline"), "w", encoding="utf-8") as f:
            f.write(command_line + "\n")
        mount(os.path.join(root, "cmdline"), os.path.join(proc, "cmdline"), None, MS_BIND)
        if os.path.exists(os.path.join(proc, "sysrq-trigger")):
            mount(self.trigger, os.path.join(proc, "sysrq-trigger"), None, MS_BIND)
        mount(os.path.join(proc, "sys"), os.path.join(proc, "sys"), None, MS_BIND)
        mount(None, os.path.join(proc, "sys"), None, MS_BIND | MS_REMOUNT | MS_RDONLY)

    # ---- outside ----

    def start(self, initrd, command_line, *_of_machines):
        os.write(self.orders, f"{initrd}\0{command_line}".encode())
        os.close(self.orders)
        self.started = True
        threading.Thread(target=self.copy_console, daemon=True).start()
        threading.Thread(target=self.wait, daemon=True).start()
        threading.Thread(target=self.watch_trigger, daemon=True).start()

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        # How reboot(2) in a PID namespace is told to the parent of its process 1.
        reset = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGHUP
        words = "reboot: Restarting system" if reset else "reboot: Power down"
        self.say(words)
        time.sleep(0.02)  # for what is still on its way to the log
        self.ended(RESET if reset else POWERED_OFF)

    def watch_trigger(self):
        """As of /proc/sysrq-trigger: c crashes the kernel, b resets, o powers off."""
        fd = os.open(self.trigger, os.O_RDWR)
        while True:
            letter = os.read(fd, 1)
            if letter == b"c":
                self.say("Kernel panic - not syncing: sysrq triggered crash")
                time.sleep(0.02)
            if letter in (b"c", b"b"):
                self.ended(RESET)
            if letter == b"o":
                self.ended(POWERED_OFF)

    def copy_console(self):
        while True:
            os.write(1, os.read(self.console, 4096))

    def say(self, words):
        os.write(self.terminal, words.encode() + b"\n")

    def processes(self):
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and os.readlink(f"/proc/{name}/ns/pid") == own:
                    found.append(int(name))
            except OSError:
                pass
        return found

    def pause(self, paused):
        """The CPUs stand still, or go on."""
        done = set()
        while new := set(self.processes()) - done:
            for pid in new:
                try:
                    os.kill(pid, signal.SIGSTOP if paused else signal.SIGCONT)
                except ProcessLookupError:
                    pass
            done |= new

    def press_ctrl_alt_del(self):
        os.kill(self.pid, signal.SIGINT)

    def press_power_button(self):
        os.kill(self.pid, signal.SIGUSR2)  # what busybox poweroff sends, which acpid would run

    def connect(self):
        """A connection to its SSH server. For a thread of its own: it is in the guest's network from then on."""
        fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            check(LIBC.setns(fd, CLONE_NEWNET))
        finally:
            os.close(fd)
        connection = socket.create_connection(("127.0.0.1", 22), 5)
        with contextlib.suppress(OSError):
            os.rmdir(f"/proc/{self.pid}/root/run/vmsfs/disk")  # it has served
            os.rmdir(f"/proc/{self.pid}/root/run/vmsfs")
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
