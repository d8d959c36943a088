"""What the tests of env/ have in common: a VM for a whole file, a look at both sides, and tools that want a terminal."""

import contextlib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import time

from harness import Client, read, wait_for

ENV_FILE = "/etc/profile.d/vmsfs_env.sh"
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def keys(vm):
    """What env/ lists, sorted."""
    return sorted(os.listdir(vm / "env"))


def guest_keys(vm, env_file=ENV_FILE):
    """Names of the variables that the env file of the guest sets, sorted. Values of one line only."""
    text = vm.ssh(f"cat {env_file}").decode(errors="replace")
    return sorted(set(re.findall(r"^export ([A-Za-z_][A-Za-z0-9_]*)=", text, re.M)))


def guest_file(vm, env_file=ENV_FILE):
    return vm.ssh(f"cat {env_file}")


def sourced(vm, key, env_file=ENV_FILE):
    """The variable as a plain sh sees it that reads the file, without the login shell's profile."""
    script = f'. {env_file}; printf %s "${{{key}-<unset>}}"'
    return vm.ssh("env -i sh -c " + shlex.quote(script))


def clean_env(vm):
    """Removes every variable and all scratch, also what a process that was killed is just leaving behind."""

    def empty():
        os.truncate(vm / "environ", 0)
        for name in keys(vm):
            path = vm.env(name)
            with contextlib.suppress(FileNotFoundError):
                if os.path.isdir(path):
                    os.rmdir(path)
                else:
                    os.unlink(path)
        return keys(vm) == []

    wait_for(empty, "env/ is empty", 20)


def environment(**extra):
    """Of a tool: nothing of the tester's own settings."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **extra}


def python(code, *args, seconds=60):
    """A Python program of its own, whose errors are its exit status."""
    return subprocess.run(
        ["/usr/bin/python3", "-c", code, *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        env=environment(),
    )


class Terminal:
    """A full-screen program in a terminal of its own: type(), and wait for what it shows."""

    def __init__(self, argv, env):
        self.shown = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.execvpe(argv[0], argv, {**env, "TERM": "xterm", "LINES": "24", "COLUMNS": "80"})
            finally:
                os._exit(127)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def _more(self, seconds):
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                part = os.read(self.fd, 65536)
            except OSError:  # EIO: the other end has gone
                part = b""
            self.shown += part
            return part
        return None

    def shows(self, text, seconds=20):
        """Until the program has shown the text; what came before it is forgotten."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            part = self._more(max(0, end - time.monotonic()))
            assert part, f"never shown: {text!r}, but {self.shown[-2000:]!r}"
        self.shown = self.shown.split(text, 1)[1]
        return self

    def type(self, keys_):
        os.write(self.fd, keys_)
        return self

    def status(self, seconds=20):
        end = time.monotonic() + seconds
        while (part := self._more(max(0, end - time.monotonic()))) != b"":
            assert part is not None, f"does not end; shown: {self.shown[-2000:]!r}"
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


# --- a reader in the guest ---

# Sources the file again and again as fast as it can. Prints what is wrong, and how often it looked.
READER = """
n=0
while [ ! -e /tmp/reader-stop ]; do
    seen=$(env -i sh -c '. FILE && CHECK' 2>&1) || { echo "status $?: $seen"; }
    [ "$seen" = "EXPECT" ] || echo "look $n: $seen"
    n=$((n + 1))
    [ -e /tmp/reader-runs ] || : >/tmp/reader-runs
done
echo "looks $n"
"""


class Reader:
    """Sources the env file in the guest in a loop for the time of the `with` block. `check` is sh that prints `expect`."""

    def __init__(self, vm, check, expect, env_file=ENV_FILE):
        self.vm = vm
        self.script = READER.replace("FILE", env_file).replace("CHECK", check).replace("EXPECT", expect)

    def __enter__(self):
        self.vm.ssh("rm -f /tmp/reader-stop /tmp/reader-runs")
        self.client = Client(self.vm.ssh_argv() + ["sh -c " + shlex.quote(self.script)])
        wait_for(lambda: self.vm.ssh("ls /tmp") .find(b"reader-runs") >= 0, "the reader in the guest runs", 20)
        return self

    def __exit__(self, kind, *exc):
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            self.vm.ssh(": >/tmp/reader-stop")
        status, out, err = self.client.result(30)
        if kind is None:
            lines = out.decode(errors="replace").splitlines()
            assert status == 0 and lines, (status, lines, err)
            assert lines[:-1] == [], f"the reader in the guest has seen: {lines[:20]}"
            self.looks = int(lines[-1].split()[1])
            assert self.looks > 1, lines


def state_file(path):
    return read(path) if os.path.exists(path) else ""


def plain_text(path):
    """The variables that environ prints. The lines around them, which make a shell export them, have to be there."""
    text = read(path)
    assert text == "" or (text.startswith("set -a\n") and text.endswith("set +a\n")), text
    return text[len("set -a\n") : -len("set +a\n")]
