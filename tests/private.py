"""A private place: namespaces for mounts and processes, so that a test may mount, configure and install as root does, and
nothing of it is seen or left on the host. With the process that holds it, all that runs in it ends and all that is mounted
goes, however the test ends."""

import os
import shlex
import subprocess

from harness import RUN, kill_and_wait, pid_alive, wait_for

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as f:
        return [int(word) for word in f.read().split()]


class Done:
    """What became of a command."""

    def __init__(self, process):
        self.status = process.returncode
        self.out = process.stdout.decode(errors="replace")
        self.err = process.stderr.decode(errors="replace")

    def __repr__(self):
        return f"status {self.status}, stdout {self.out!r}, stderr {self.err!r}"


class Place:
    """`setup` is a script that runs first; what it executes in the end is the first process there. It may use $RUN, a
    directory of its own, and has to print "ready", unless `ready` says how to see that it is."""

    def __init__(self, setup, namespaces=(), environment=None, enter=(), **variables):
        self.path = os.path.join(RUN.path, f"p{RUN.number()}")
        os.makedirs(self.path)
        self.enter = enter
        self.environment = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", **(environment or {})}
        self.log = os.path.join(self.path, "log")
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", *namespaces]
        with open(self.log, "wb") as log:
            # The run directory on its command line is how tests/run knows what is left.
            self.holder = subprocess.Popen(
                [*argv, "sh", "-ec", setup, self.path + "/"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**self.environment, "RUN": self.path, **variables},
                start_new_session=True,
            )
        RUN.record_pid(self.holder.pid)
        self.pid = None

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return f.read()

    def wait(self, condition, what, seconds=30):
        """Until it is set up."""

        def reached():
            assert self.holder.poll() is None, f"the place has ended: {self.said()[-3000:]}"
            self.pid = self.pid or next(iter(children(self.holder.pid)), None)
            return self.pid and condition()

        wait_for(reached, what, seconds)
        return self

    def run(self, script, *, user=None, cwd="/", seconds=60, check=False, **variables):
        """A script there. `user` has HOME as in the list of users, and no rights of root's."""
        argv = ["nsenter", f"--target={self.pid}", "--mount", "--pid", *self.enter]
        environment = {**self.environment, **variables}
        if user:
            home = self.run(f"getent passwd {user} | cut -d: -f6").out.strip()
            argv += ["setpriv", f"--reuid={user}", f"--regid={self.group(user)}", "--clear-groups", "--inh-caps=-all"]
            environment = {**environment, "HOME": home, **variables}
        argv += ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
        process = subprocess.run(
            [*argv, "sh", "-c", f"cd {shlex.quote(cwd)} || exit; {script}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
        )
        done = Done(process)
        assert not check or done.status == 0, f"{script}: {done}"
        return done

    def group(self, user):
        return self.run(f"id -g {user}").out.strip()

    def end(self):
        if pid_alive(self.holder.pid):
            if self.pid:
                kill_and_wait(self.pid)
            self.holder.kill()
        self.holder.wait(timeout=20)
        self.holder.stdin.close()
        RUN.forget_pid(self.holder.pid)
