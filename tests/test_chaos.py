"""Random operations by several clients on one mount, and kill -9 of the daemon in the midst of them, again and again.

A client is alone with its keys, so it knows at each moment what they may hold: what was acknowledged last, and beside that what has
been asked for since without an answer. `VMSFS_CHAOS_SEED` repeats a run (as far as threads repeat), `VMSFS_CHAOS_ROUNDS` makes it longer.
"""

import contextlib
import errno
import json
import os
import random
import subprocess
import threading
import time

import pytest

from harness import RUN, Daemon, children, kill_and_wait, mount_line, read, read_bytes, wait_for, write

SEED = int(os.environ.get("VMSFS_CHAOS_SEED", "5"))
ROUNDS = int(os.environ.get("VMSFS_CHAOS_ROUNDS", "50"))

# Answers that say for sure that nothing was done. All others leave it open.
REFUSED = {errno.ENOENT, errno.EBUSY, errno.EINVAL, errno.EPERM, errno.EEXIST, errno.EOPNOTSUPP}
DEAD = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV}
ABSENT = None


class Known:
    """What files may hold. Keys are paths below the mount, values text or ABSENT."""

    def __init__(self, name):
        self.name = name
        self.may = {}
        self.pending = {}  # of the one operation that got no answer: all or nothing
        self.before = {}
        self.history = []  # of this round, for who has to find out why

    def values(self, key):
        return self.may.get(key, {ABSENT})

    def sure(self, key):
        values = self.values(key)
        return next(iter(values)) if len(values) == 1 else None

    def asked(self, changes):
        self.before = {key: self.values(key) for key in changes}
        self.pending = changes
        for key, value in changes.items():
            self.may[key] = self.values(key) | {value}

    def done(self):
        self.history.append(("done", self.pending))
        for key, value in self.pending.items():
            self.may[key] = {value}
        self.pending = {}

    def refused(self, why):
        self.history.append((why, self.pending))
        self.may.update(self.before)
        self.pending = {}

    def left_open(self, why):
        self.history.append((why, self.pending))
        self.pending = {}

    def learn(self, look, open_still):
        """After a restart: each key holds what it may, and from now on that alone, but for a guest that stands still: it may have
        been told what it will do when it goes on."""
        seen = {key: look(key) for key in self.may}
        for key, value in seen.items():
            assert value in self.may[key], self.story(key, value)
        if len(self.pending) > 1:
            done = all(seen[key] == value for key, value in self.pending.items())
            not_done = all(seen[key] in self.before[key] for key in self.pending)
            half = {key: seen[key] for key in self.pending}
            assert done or not_done, f"{self.name}: half of it was done, of {self.pending!r}: {half!r}"
        if not open_still:
            self.may = {key: {value} for key, value in seen.items()}
        self.pending = {}
        self.history.clear()

    def story(self, key, value):
        lines = [f"{how}: {what}" for how, what in self.history if key in what]
        return f"{self.name}: {key} is {value!r}, which is none of {self.values(key)!r}\n" + "\n".join(lines)


class Dead(Exception):
    """The daemon has been killed."""


class Worker:
    """A client: does what it is there for, again and again, until the daemon is killed."""

    def __init__(self, chaos, name, seed):
        self.chaos = chaos
        self.name = name
        self.random = random.Random(seed)
        self.known = chaos.known.setdefault(name, Known(name))
        self.problem = None
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        try:
            while not self.chaos.over.is_set():
                getattr(self, self.random.choice(self.operations))()
                self.chaos.count += 1
        except Dead:
            pass
        except BaseException as problem:  # told by the main thread
            self.problem = problem

    def path(self, *names):
        return os.path.join(self.chaos.daemon.mount, *names)

    def attempt(self, changes, operation, *expected):
        """Does it, and notes what is known after that. True: it is done."""
        self.known.asked(changes)
        try:
            operation()
        except OSError as error:
            if self.chaos.over.is_set() and error.errno in DEAD:
                raise Dead from error
            if error.errno == errno.ENOENT:  # as far as the daemon knows: it may have no answer of the guest yet
                key = next(iter(changes))
                assert ABSENT in self.known.before[key], self.known.story(key, ABSENT)
            if error.errno in REFUSED:
                self.known.refused(str(error))
            else:
                assert error.errno in {errno.EHOSTUNREACH, errno.ETIMEDOUT, *expected}, f"{changes!r}: {error}"
                self.known.left_open(str(error))
            return False
        except subprocess.CalledProcessError as error:
            if self.chaos.over.is_set():
                raise Dead from error
            raise AssertionError(f"{error.cmd}: {error.stderr!r}") from error
        self.known.done()
        return True

    def value(self):
        self.chaos.values += 1
        return self.random.choice(["{}", "it's {}", "two\n{}", "{} " + "x" * 300, "$({})"]).format(self.chaos.values)


class Variables(Worker):
    """Sets, unsets and renames variables of one VM, one by one and together."""

    operations = ["set", "set", "set", "unset", "rename", "merge", "read"]

    def __init__(self, chaos, name, seed, vm, owner=False):
        super().__init__(chaos, name, seed)
        self.vm = vm
        self.owner = owner  # of all variables of this VM
        self.keys = [f"{name.upper()}_{i}" for i in range(5)]
        if owner:
            self.operations = self.operations + ["replace"]

    def key(self):
        return f"{self.vm}/env/{self.random.choice(self.keys)}"

    def set(self):
        key, value = self.key(), self.value()
        self.attempt({key: value + "\n"}, lambda: write(self.path(key), value + "\n"), errno.ENODEV)

    def unset(self):
        key = self.key()

        self.attempt({key: ABSENT}, lambda: os.unlink(self.path(key)), errno.ENODEV)

    def rename(self):
        source, target = self.key(), self.key()
        value = self.known.sure(source)
        if value and source != target:
            changes = {source: ABSENT, target: value}
            self.attempt(changes, lambda: os.rename(self.path(source), self.path(target)), errno.ENODEV)

    def environ(self, flag, keys):
        values = {key: self.value() for key in keys}
        lines = "".join("%s='%s'\n" % (key, value.replace("'", "'\\''")) for key, value in values.items())
        # Read back as learned from a guest: with one newline.
        changes = {f"{self.vm}/env/{key}": values[key] + "\n" if key in values else ABSENT for key in self.keys}
        if flag == os.O_APPEND:
            changes = {key: value for key, value in changes.items() if value}

        def do():
            fd = os.open(self.path(self.vm, "environ"), os.O_WRONLY | flag)
            try:
                os.write(fd, lines.encode())
            finally:
                os.close(fd)

        self.attempt(changes, do, errno.ENODEV)

    def merge(self):
        self.environ(os.O_APPEND, self.random.sample(self.keys, 3))

    def replace(self):
        self.environ(os.O_TRUNC, self.random.sample(self.keys, 2))

    def read(self):
        key = self.key()
        found = self.chaos.look(key, self)
        assert found in self.known.values(key), self.known.story(key, found)


class Settings(Worker):
    """Stops and starts a VM, and writes its settings, of which most are refused while it runs."""

    live = {"stop_timeout": (1, 9), "lifetime": (10000, 99999)}
    stopped = {"memory": (130, 160), "boot_timeout": (100, 200), "boot_args": None}
    operations = ["setting"] * 8 + ["stop", "start", "start"]

    def __init__(self, chaos, name, seed, vm):
        super().__init__(chaos, name, seed)
        self.vm = vm

    def setting(self):
        name, limits = self.random.choice(list({**self.live, **self.stopped}.items()))
        value = str(self.random.randint(*limits)) if limits else f"chaos={self.random.randint(0, 999)}"
        key = f"{self.vm}/config/{name}"
        self.attempt({key: value + "\n"}, lambda: write(self.path(key), value + "\n"))

    def want(self, state):
        key = f"{self.vm}/status"
        self.attempt({key: state + "\n"}, lambda: write(self.path(key), state + "\n"))

    def stop(self):
        self.want("stopped")

    def start(self):
        self.want("running")


class Power(Settings):
    """The same for a guest, which takes longer, and can be paused."""

    operations = ["setting"] * 30 + ["stop", "start", "pause", "resume", "pause", "resume"]

    def pause(self):
        if self.known.sure(f"{self.vm}/status") == "running\n":
            self.want("paused")

    def resume(self):
        if self.known.sure(f"{self.vm}/status") == "paused\n":
            self.want("running")


class Makers(Worker):
    """Makes VMs, from the defaults and from what is prepared, and destroys them."""

    operations = ["default", "forward", "make", "remove", "prepare", "move", "discard"]

    def default(self):
        value = self.value() + "\n"
        self.attempt({".defaults/env/D": value}, lambda: write(self.path(".defaults/env/D"), value))

    def forward(self):
        value = f"NOT_SET_{self.random.randint(0, 99)}\n"
        self.attempt({".defaults/forward": value}, lambda: write(self.path(".defaults/forward"), value))

    def make(self):
        default = self.known.sure(".defaults/env/D")
        if self.known.sure("made/") is ABSENT and self.known.values("made/") == {ABSENT} and default:
            self.attempt({"made/": "", "made/env/D": default}, lambda: os.mkdir(self.path("made")))

    def remove(self):
        name = self.random.choice(["made", "moved"])
        changes = {key: ABSENT for key in self.known.may if key.startswith(name + "/")}
        if self.known.sure(name + "/") == "":
            self.attempt(changes, lambda: os.rmdir(self.path(name)))

    def prepare(self):
        if self.known.values(".new/draft/") == {ABSENT}:
            made = {".new/draft/": "", ".new/draft/config/env_file": self.chaos.sshd.env_file + "\n"}
            if not self.attempt(made, lambda: os.mkdir(self.path(".new/draft"))):
                return
        if self.known.sure(".new/draft/") == "" and not self.has_own_file():
            own = self.own_file()
            self.attempt({".new/draft/config/env_file": own}, lambda: write(self.path(".new/draft/config/env_file"), own))
        if self.known.sure(".new/draft/") == "":
            value = self.value() + "\n"
            self.attempt({".new/draft/env/P": value}, lambda: write(self.path(".new/draft/env/P"), value))

    def own_file(self):
        return os.path.join(self.chaos.sshd.path, "moved.sh") + "\n"

    def has_own_file(self):
        """Else `moved` would have its variables where `made` has them."""
        return self.known.sure(".new/draft/config/env_file") == self.own_file()

    def move(self):
        if not self.has_own_file():
            return
        own = {key: self.known.sure(key) for key in self.known.may if key.startswith(".new/draft/")}
        if own.get(".new/draft/") != "" or None in own.values() or self.known.values("moved/") != {ABSENT}:
            return
        changes = {key: ABSENT for key in own}
        changes.update({key.replace(".new/draft", "moved"): value for key, value in own.items()})
        self.attempt(changes, lambda: os.rename(self.path(".new/draft"), self.path("moved")))

    def discard(self):
        changes = {key: ABSENT for key in self.known.may if key.startswith(".new/draft/")}
        if self.known.sure(".new/draft/") == "" and self.random.random() < 0.3:
            self.attempt(changes, lambda: os.rmdir(self.path(".new/draft")))


class Commands(Worker):
    """Runs commands, which see the variable that this client has set, and jobs, whose results stay."""

    operations = ["exec", "exec", "set", "job", "forget", "interrupted"]
    vm = "a"

    def __init__(self, chaos, name, seed):
        super().__init__(chaos, name, seed)
        self.number = 0

    def set(self):
        key, value = f"{self.vm}/env/SEEN", str(self.random.randint(0, 1 << 30)) + "\n"
        self.attempt({key: value}, lambda: write(self.path(key), value), errno.ENODEV)

    def exec(self):
        value = self.known.sure(f"{self.vm}/env/SEEN")
        if value:
            write_command = f'[ "$SEEN" = "{value.strip()}" ]'
            self.attempt(
                {}, lambda: write(self.path(self.vm, "exec"), write_command), errno.ENODEV, errno.ECONNRESET
            )

    def interrupted(self):
        self.attempt({}, lambda: write(self.path(self.vm, "exec"), "sleep 0.2"), errno.ENODEV, errno.ECONNRESET)

    def job(self):
        self.chaos.values += 1
        name = f"{self.vm}/jobs/j{self.chaos.values}"
        text = f"out of {name}\n"

        def do():
            os.mkdir(self.path(name))
            write(self.path(name, "command"), f"echo 'out of {name}'")
            if read(self.path(name, "exit")) != "0\n":  # what it was is not known
                raise OSError(errno.EHOSTUNREACH, "lost")

        # Its folder may be there in whatever state until `exit` has been read.
        if self.attempt({}, do, errno.ENODEV, errno.ECONNRESET):
            self.known.may[f"{name}/stdout"] = {text}
            self.known.may[f"{name}/exit"] = {"0\n"}

    def forget(self):
        jobs = [key.rpartition("/")[0] for key in self.known.may if key.endswith("/exit") and self.known.sure(key)]
        if jobs and len(jobs) > self.random.randint(0, 10):
            name = self.random.choice(jobs)
            changes = {f"{name}/exit": ABSENT, f"{name}/stdout": ABSENT}
            self.attempt(changes, lambda: os.rmdir(self.path(name)))


class Chaos:
    """The mount, and what is known about it."""

    machines = ("a", "b", "c")
    guest = "guest"

    def __init__(self, one, sshd, seed):
        self.daemon = one
        self.sshd = sshd
        self.random = random.Random(seed)
        self.known = {}
        self.over = threading.Event()
        self.count = self.values = 0

    def make(self):
        for name in self.machines:
            new = self.daemon.vm(f".new/{name}")
            os.mkdir(new)
            write(os.path.join(new, "config/env_file"), self.env_file(name))
            os.rename(new, self.daemon.vm(name))
        new = self.daemon.vm(f".new/{self.guest}")
        os.mkdir(new)
        for name, value in {"backend": "qemu", "env_file": "", "host_key": "", "key": "", "address": ""}.items():
            write(os.path.join(new, "config", name), value + "\n")
        os.rename(new, self.daemon.vm(self.guest))
        for name in (*self.machines, self.guest):
            self.daemon.guest(name).wait("running")
        for name, vm in (("settings", "b"), ("power", self.guest)):
            self.known[name] = known = Known(name)
            known.may[f"{vm}/status"] = {"running\n"}
            for setting in {**Settings.live, **Settings.stopped}:
                known.may[f"{vm}/config/{setting}"] = {read(self.daemon.vm(f"{vm}/config/{setting}"))}
        self.known["makers"] = Known("makers")
        self.known["makers"].may[".defaults/forward"] = {""}

    def env_file(self, name):
        return os.path.join(self.sshd.path, f"{name}.sh")

    def workers(self):
        seed = lambda: self.random.randint(0, 1 << 30)  # noqa: E731
        return [
            Variables(self, "one", seed(), "a"),
            Variables(self, "two", seed(), "a"),
            Variables(self, "moved", seed(), "b"),
            Variables(self, "owner", seed(), "c", owner=True),
            Variables(self, "inside", seed(), self.guest),
            Settings(self, "settings", seed(), "b"),
            Power(self, "power", seed(), self.guest),
            Makers(self, "makers", seed()),
            Commands(self, "commands", seed()),
        ]

    def look(self, key, worker=None):
        """What a file holds; ABSENT if it is not there. A key that ends in / is a directory."""
        path = os.path.join(self.daemon.mount, key)
        try:
            if key.endswith("/"):
                return "" if os.path.isdir(path) else ABSENT
            return read(path)
        except FileNotFoundError:
            return ABSENT
        except OSError as error:
            if worker and self.over.is_set() and error.errno in DEAD:
                raise Dead from error
            if worker and error.errno in {errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.EBUSY, errno.ENODEV}:
                return worker.known.sure(key) if worker.known.sure(key) else next(iter(worker.known.values(key)))
            raise

    def kill_while_they_work(self):
        self.over.clear()
        workers = self.workers()
        before = self.count
        for worker in workers:
            worker.thread.start()
        # A random moment: after so many operations, and a little later.
        goal = self.random.randint(5, 150)
        end = time.monotonic() + self.random.uniform(0.1, 1)
        while self.count - before < goal and time.monotonic() < end and not any(w.problem for w in workers):
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.01))
        self.over.set()
        self.kill()
        for worker in workers:
            worker.thread.join(30)
            assert not worker.thread.is_alive(), f"{worker.name} hangs"
        for worker in workers:
            if worker.problem:
                raise worker.problem

    def kill(self):
        os.kill(self.daemon.pid, 9)
        self.daemon.wait_end()

    def restart(self):
        if self.random.random() < 0.2:  # the next one does not get far either
            log = open(self.daemon.log, "ab")
            with log:
                early = subprocess.Popen(
                    self.daemon.argv() + ["-f"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            RUN.record_pid(early.pid)
            time.sleep(self.random.uniform(0, 0.5))
            kill_and_wait(early.pid) if early.poll() is None else None
            early.wait()
            RUN.forget_pid(early.pid)
        if self.random.random() < 0.5:
            self.daemon.unmount()
        self.daemon.start()
        wait_for(self.answers, "the new daemon answers", 20)
        assert len([line for line in read("/proc/self/mountinfo").splitlines() if line.split()[4] == self.daemon.mount]) == 1

    def answers(self):
        """A dead mount's directory still looks like one."""
        with contextlib.suppress(OSError):
            return json.loads(read(self.daemon.vm("a/info")))["daemon"]["pid"] == self.daemon.pid

    def check(self):
        """Nothing that was acknowledged is lost, in the tree and in the guests."""
        for name in (*self.machines, self.guest):
            assert os.path.isdir(self.daemon.vm(name)), f"{name} is lost"
        for name in self.machines:
            self.settled(name)
        self.settled(self.guest)
        still = read(self.daemon.vm(f"{self.guest}/status")) != "running\n"
        for known in self.known.values():
            known.learn(self.look, still and known.name == "inside")
        for name in self.machines:
            if read(self.daemon.vm(f"{name}/status")) == "running\n":
                assert self.inside(name) == self.shown(name)
        write(self.daemon.vm("a/env/USABLE"), "yes\n")
        write(self.daemon.vm("a/exec"), '[ "$USABLE" = yes ]')
        assert len(self.daemon.qemus()) <= 1

    def settled(self, name):
        """Until it is what somebody has asked for. A guest that boots is let."""
        may = next((k.may[f"{name}/status"] for k in self.known.values() if f"{name}/status" in k.may), {"running\n"})
        if "booting\n" in may:
            may.add("running\n")
        wait_for(
            lambda: read(self.daemon.vm(f"{name}/status")) in may or (name == self.guest and self.booting(may)),
            f"{name} is {may}: it is {read(self.daemon.vm(name + '/status'))} {read(self.daemon.vm(name + '/error'))}",
            20,
        )

    def booting(self, may):
        boots = "running\n" in may and read(self.daemon.vm(f"{self.guest}/status")) == "booting\n"
        if boots:
            may.add("booting\n")
        return boots

    def shown(self, name):
        folder = self.daemon.vm(f"{name}/env")
        return {key: read(os.path.join(folder, key)).removesuffix("\n") for key in os.listdir(folder)}

    def inside(self, name):
        script = 'env -i sh -c ". \\"$0\\"; env -0" "$0" | grep -zv "^PWD=\\|^SHLVL=\\|^_=\\|^OLDPWD="'
        done = subprocess.run(["dash", "-c", script, self.env_file(name)], capture_output=True, timeout=20, check=False)
        return dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if pair)

    def end(self):
        """All of it is destroyed, and nothing is left."""
        for name in self.daemon.vms():
            os.rmdir(self.daemon.vm(name))
        for name in os.listdir(self.daemon.vm(".new")):
            os.rmdir(self.daemon.vm(f".new/{name}"))
        wait_for(lambda: not self.daemon.remains(), f"nothing is left of {self.daemon.remains()}", 20)
        self.daemon.stop()
        assert self.daemon.remains() == []
        assert os.listdir(os.path.join(self.daemon.state, "new")) == []
        assert {name for name in os.listdir(self.daemon.state)} <= {
            "defaults", "id_ed25519", "id_ed25519.pub", "lock", "log", "new", "templates", "trash", "vms",
        }  # fmt: skip
        assert os.listdir(os.path.join(self.daemon.state, "defaults")) == ["vm.json"]
        wait_for(lambda: not children(self.sshd.process.pid), "no command is left on the machine", 20)


@pytest.mark.deadline(300 + ROUNDS * 5)
def test_kill_9_at_random_moments_loses_nothing(sshd, daemon):
    print(f"VMSFS_CHAOS_SEED={SEED} VMSFS_CHAOS_ROUNDS={ROUNDS}")
    server = sshd()
    chaos = Chaos(daemon(server.options()), server, SEED)
    chaos.make()
    for number in range(ROUNDS):
        try:
            chaos.kill_while_they_work()
            chaos.restart()
            chaos.check()
        except BaseException:
            print(f"round {number + 1}, after {chaos.count} operations")
            print(read(chaos.daemon.log)[-4000:])
            raise
    print(f"{chaos.count} operations")
    chaos.end()
