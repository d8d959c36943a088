"""Many VMs on one mount beside one VM on another: attached, all of them this host by servers of our own.

The two mounts take turns, operation by operation, so that noise hits both alike. Each VM has a file of its own for its variables.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import time

SERVERS = 4
ROUNDS = 200  # of each operation on each mount
SETTLE = 0.04  # after each: what it left to be done (a shell made ready, a record) is not to burden the next
LOOKED = 65  # s for which the daemon keeps in touch with a VM whose variables were looked at
OTHERS = 0.25  # s between two measurements on VMs that have been idle


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, what, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"after {seconds} s still not: {what}")
        time.sleep(0.02)


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def write(path, data):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def read(path):
    with open(path, "rb") as f:
        return f.read()


class Server:
    """An sshd on a port of 127.0.0.1."""

    def __init__(self, folder, cleanup):
        self.port = free_port()
        os.makedirs(folder)
        self.host_key, self.key = os.path.join(folder, "host_key"), os.path.join(folder, "key")
        for path in (self.host_key, self.key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        shutil.copyfile(self.key + ".pub", os.path.join(folder, "authorized_keys"))
        config = os.path.join(folder, "sshd_config")
        lines = {
            "ListenAddress": "127.0.0.1", "Port": self.port, "HostKey": self.host_key, "PidFile": "none", "UsePAM": "no",
            "AuthorizedKeysFile": os.path.join(folder, "authorized_keys"), "StrictModes": "no",
            "PermitRootLogin": "prohibit-password", "MaxStartups": "2000", "SetEnv": f"HOME={folder}", "LogLevel": "ERROR",
        }  # fmt: skip
        with open(config, "w", encoding="ascii") as f:
            f.writelines(f"{name} {value}\n" for name, value in lines.items())
        os.makedirs("/run/sshd", 0o755, exist_ok=True)
        self.process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", config], stdin=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        cleanup.callback(self.stop)
        wait_for(self.listens, "sshd listens", 10)

    def listens(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True

    def children(self):
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children", encoding="ascii") as f:
            return f.read().split()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class Many:
    def __init__(self, vmsfs, folder, cleanup, count, say):
        self.folder = os.path.join(folder, "many")
        self.count = count
        self.say = say
        self.random = random.Random(2)
        self.facts = {}
        self.times = {}
        os.makedirs(self.folder)
        self.servers = [Server(os.path.join(self.folder, f"server{i}"), cleanup) for i in range(min(SERVERS, count))]
        self.one = self.mount(vmsfs, "one", cleanup)
        self.all = self.mount(vmsfs, "all", cleanup)
        self.names = [f"vm{i:04}" for i in range(count)]

    def mount(self, vmsfs, name, cleanup):
        folder = os.path.join(self.folder, name)
        os.makedirs(folder)
        return vmsfs(folder, cleanup, f"backend=attach,address=127.0.0.1,boot_timeout=600,images={self.folder},ephemeral")

    def make(self, mount, name, server):
        new = mount.path(".new", name)
        os.mkdir(new)
        settings = {"port": server.port, "key": server.key, "host_key": server.host_key + ".pub",
                    "env_file": os.path.join(self.folder, f"{os.path.basename(os.path.dirname(mount.mount))}-{name}.sh")}
        for setting, value in settings.items():
            write(os.path.join(new, "config", setting), str(value).encode())
        os.rename(new, mount.path(name))

    def running(self, mount):
        return sum(read(mount.path(name, "status")) == b"running\n" for name in os.listdir(mount.mount) if name[0] != ".")

    def attach(self):
        self.say(f"attaching {self.count} VMs")
        self.make(self.one, "vm0000", self.servers[0])
        write(self.one.path("vm0000", "status"), b"running\n")
        self.facts["empty_kib"] = self.all.private_kib()
        write(self.all.path(".defaults", "env", "LEVEL"), b"info\n")  # so that */env/LEVEL finds it
        start = time.perf_counter()
        for i, name in enumerate(self.names):
            self.make(self.all, name, self.servers[i % len(self.servers)])
        self.facts["made"] = time.perf_counter() - start
        wait_for(lambda: self.running(self.all) == self.count, "all run", 600)
        self.facts["attached"] = time.perf_counter() - start
        self.facts["sessions"] = sum(len(server.children()) for server in self.servers)
        self.facts["files"] = len(os.listdir(f"/proc/{self.all.process.pid}/fd"))
        self.settle()
        self.facts["kib"] = self.all.private_kib()

    def settle(self):
        """Until the daemon has nothing to do."""
        def ticks():
            return sum(int(n) for n in read(f"/proc/{self.all.process.pid}/stat").rpartition(b")")[2].split()[11:13])

        last = ticks()
        for _ in range(60):
            time.sleep(1)
            now = ticks()
            if now - last <= 3:
                break
            last = now

    def each(self, operation):
        return timed(lambda: [operation(name) for name in self.names])

    def on_each(self):
        self.say(f"operations on each of the {self.count}")
        mount = self.all
        self.facts["ls"] = timed(lambda: subprocess.run(["ls", mount.mount], stdout=subprocess.DEVNULL, check=True))
        self.facts["cat"] = timed(lambda: subprocess.run(f"cat '{mount.mount}'/*/status", shell=True,
                                                         stdout=subprocess.DEVNULL, check=True))
        self.facts["tee"] = timed(lambda: subprocess.run(f"echo debug | tee '{mount.mount}'/*/env/LEVEL", shell=True,
                                                         stdout=subprocess.DEVNULL, check=True))
        self.facts["set"] = self.each(lambda name: write(mount.path(name, "env", "SET"), b"value\n"))
        self.settle()
        self.facts["set_kib"] = mount.private_kib()
        self.facts["exec"] = self.each(lambda name: write(mount.path(name, "exec"), b"true\n"))
        self.settle()
        self.facts["exec_kib"] = mount.private_kib()
        wrong = [name for name in self.names if read(mount.path(name, "env", "LEVEL")) != b"debug\n"]
        if wrong:
            raise RuntimeError(f"LEVEL is not set in {wrong[:5]}")

    def operations(self):
        def status(mount, name):
            return timed(lambda: read(mount.path(name, "status")))

        def set_one(mount, name):
            value = str(self.random.random()).encode()
            return timed(lambda: write(mount.path(name, "env", "SET"), value))

        def execute(mount, name):
            return timed(lambda: write(mount.path(name, "exec"), b"true\n"))

        return {"status": status, "set": set_one, "exec true": execute}

    def compare(self):
        self.say("one VM of many against one VM alone, when nobody has looked at the others for a minute")
        time.sleep(LOOKED)
        for number in range(ROUNDS + 10):
            for name, operation in self.operations().items():
                mounts = [("one", self.one), ("all", self.all)]
                self.random.shuffle(mounts)
                for key, mount in mounts:
                    seconds = operation(mount, "vm0000")
                    if number >= 10:
                        self.times.setdefault(name, {}).setdefault(key, []).append(seconds)
                    time.sleep(SETTLE)
        for _ in range(ROUNDS // 10):
            for name, operation in self.operations().items():
                seconds = operation(self.all, self.random.choice(self.names))
                self.times[name].setdefault("idle", []).append(seconds)
                time.sleep(OTHERS)

    def run(self):
        self.attach()
        self.on_each()
        self.compare()
        self.facts["last_kib"] = self.all.private_kib()
        start = time.perf_counter()
        for name in self.names:
            os.rmdir(self.all.path(name))
        self.facts["rmdir"] = time.perf_counter() - start
        wait_for(lambda: len(os.listdir(f"/proc/{self.all.process.pid}/fd")) < 50, "its files are closed", 30)
        time.sleep(7)  # it tidies up every 5 s
        self.facts["left_kib"] = self.all.private_kib()
        self.facts["left_files"] = len(os.listdir(f"/proc/{self.all.process.pid}/fd"))

    def ratio(self, name):
        times = self.times[name]
        return statistics.median(times["all"]) / statistics.median(times["one"])

    def kib_per_vm(self, key):
        return (self.facts[key] - self.facts["empty_kib"]) / self.count

    def print(self, milliseconds):
        f, n = self.facts, self.count
        print(f"""
{n} attached VMs on one mount, {len(self.servers)} sshd
  made one after the other: {f["made"]:.2f} s; all run after {f["attached"]:.1f} s, with {f["sessions"]} SSH connections \
and {f["files"]} open files
  ls: {milliseconds(f["ls"])} ms; cat */status: {milliseconds(f["cat"])} ms; tee */env/LEVEL: {f["tee"]:.2f} s
  on each, one after the other: set {f["set"]:.2f} s, exec true {f["exec"]:.2f} s, rmdir {f["rmdir"]:.2f} s
  private memory a VM: {self.kib_per_vm("kib"):.1f} KiB when it runs, {self.kib_per_vm("set_kib"):.1f} after a set, \
{self.kib_per_vm("exec_kib"):.1f} after a command, {self.kib_per_vm("last_kib"):.1f} at the end; \
without VMs {f["empty_kib"]} KiB, after all are gone {f["left_kib"]} KiB and {f["left_files"]} open files""")
        for name, times in self.times.items():
            one, many, idle = (statistics.median(times[key]) for key in ("one", "all", "idle"))
            print(f"  {name}: {milliseconds(many)} ms in the mount of {n}, {milliseconds(one)} ms in the mount of one: "
                  f"{many / one:.2f}; of a VM that was idle: {milliseconds(idle)} ms")
