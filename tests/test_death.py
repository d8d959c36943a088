"""What happens when a VMM dies or stops answering, and when those who wait are killed."""

import os
import signal
import threading
import time

import pytest

from harness import (
    BOOT_TIMEOUT,
    SLACK,
    TIMEOUT,
    Client,
    kill_and_wait,
    pid_alive,
    read,
    refused,
    sh,
    takes_at_most,
    wait_for,
    write,
)

PATH = os.environ["PATH"]


def wait_until_old():
    """What was learned from the guest is taken as true for a second; after that a read has to ask."""
    end = time.monotonic() + 1.2
    wait_for(lambda: time.monotonic() > end, "what is known has grown old")


# --- death of QEMU ---


@pytest.mark.deadline(240)
def test_death_of_qemu_is_seen_at_once_by_all_who_wait(new_vm):
    vm = new_vm("dies")
    write(vm.env("KEPT"), "kept\n")
    pid = vm.qemu()
    vm.close()
    with Client('echo "sleep 1000" > "$F"', env={"F": vm / "exec"}) as writer:
        writer.waits()
        with Client(["cat", vm / "exec"]) as reader:
            reader.waits()
            start = time.monotonic()
            kill_and_wait(pid)
            wait_for(lambda: vm.status() == "failed", "status says failed", 1)
            assert time.monotonic() - start < 1.5
            status, _, errors = reader.result(5)
            assert status != 0 and errors
            status, _, errors = writer.result(5)
            assert status != 0 and errors
    assert "signal 9" in vm.error() or "SIGKILL" in vm.error() or "KILL" in vm.error()
    assert "echo running > status" in vm.error()
    assert "pid" not in vm.info()
    with refused("ENODEV", "EBUSY"):
        write(vm / "exec", "true")

    # On the host's disk meanwhile, and in the guest when it is back.
    sh('cd "$D" && test "$(cat KEPT)" = kept && echo new > NEW && echo gone > GONE && rm GONE', D=vm / "env")
    with takes_at_most(BOOT_TIMEOUT):
        sh('echo running > "$F"', F=vm / "status", seconds=BOOT_TIMEOUT)
    assert vm.status() == "running"
    assert vm.qemu() != pid
    assert vm.value("KEPT") == b"kept"
    assert vm.value("NEW") == b"new"
    assert not vm.is_set("GONE")
    assert vm.exec("echo back") == b"back\n"


@pytest.mark.deadline(240)
def test_a_guest_that_powers_itself_off_is_stopped(new_vm):
    vm = new_vm("off")
    vm.ssh("poweroff", check=False)
    vm.close()
    wait_for(lambda: vm.status() == "stopped", "it has ended", 30)
    assert "tried again" not in vm.error()
    assert "pid" not in vm.info()


@pytest.mark.deadline(240)
def test_a_guest_whose_kernel_panics_has_failed(new_vm):
    vm = new_vm("panics")
    vm.panic()
    vm.close()
    wait_for(lambda: vm.status() not in ("running", "unreachable"), "it has ended", 30)
    assert vm.status() == "failed"
    assert "echo running > status" in vm.error()


@pytest.mark.deadline(240)
@pytest.mark.parametrize("how", ["rmdir", "rm -r"])
@pytest.mark.parametrize("state", ["running", "stopped QEMU", "dead QEMU", "booting", "unreachable"])
def test_removal_leaves_nothing_in_every_state(daemon, how, state):
    one = daemon(timeout=2)
    guest = one.guest("x")
    os.mkdir(guest.path)
    write(guest.env("A"), "b")
    if state != "booting":
        guest.wait("running")
        pid = guest.qemu()
    if state in ("stopped QEMU", "unreachable"):
        os.kill(pid, signal.SIGSTOP)
    if state == "unreachable":
        with refused("ETIMEDOUT", "EHOSTUNREACH"):
            write(guest.env("A"), "c")
        assert guest.status() == "unreachable"
    if state == "dead QEMU":
        kill_and_wait(pid)
        wait_for(lambda: guest.status() == "failed", "it has failed")
    if how == "rm -r" and state in ("stopped QEMU", "unreachable"):
        # It removes the variables first, and for them the guest is needed: it says so, and rmdir is the way.
        done = sh('rm -r "$D"', D=guest.path, check=False)
        assert done.returncode != 0 and b"env/A" in done.stderr
        how = "rmdir"
    with takes_at_most(20, how):
        sh(f'{how} "$D"', D=guest.path, seconds=40)
    assert one.vms() == []
    with refused("ENOENT"):
        os.stat(guest.path)
    wait_for(lambda: not one.remains(), f"nothing is left of {one.remains()}", 10)


@pytest.mark.deadline(200)
def test_open_files_of_a_removed_vm_answer_enodev(new_vm, mount):
    vm = new_vm("removed")
    write(vm.env("A"), "b")
    fd = os.open(vm.env("A"), os.O_WRONLY)
    command = os.open(vm / "exec", os.O_WRONLY)
    status = os.open(vm / "status", os.O_WRONLY)
    with Client('echo "sleep 1000" > "$F"', env={"F": vm / "exec"}) as writer:
        writer.waits()
        vm.close()
        os.rmdir(vm.path)
        for name, one in {"env": fd, "exec": command, "status": status}.items():
            with refused("ENODEV", "ENOENT"):
                os.write(one, b"running")
            os.close(one)
            assert name
        assert writer.result(5)[0] != 0
    assert mount.running()


# --- a VMM that has stopped ---


@pytest.mark.deadline(300)
def test_every_operation_on_a_stopped_qemu_ends_within_its_deadline(new_vm, mount):
    vm, other = new_vm("frozen", "untouched")
    write(vm.env("OLD"), "old\n")
    write(vm.env("DELETED"), "x")
    pid = vm.qemu()
    vm.close()
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until_old()
        operations = {
            "read env": 'cat "$D/env/OLD"',
            "write env": 'echo new > "$D/env/OLD"',
            "write a new variable": 'echo new > "$D/env/FRESH"',
            "exec": 'echo true > "$D/exec"',
            "unlink env": 'rm "$D/env/DELETED"',
        }
        clients = {}
        for name, script in operations.items():
            clients[name] = Client(script, env={"D": vm.path, "PATH": PATH}).waits(name)
        end = time.monotonic() + TIMEOUT + SLACK
        # Meanwhile all else is as ever.
        for _ in range(5):
            with takes_at_most(1, "work on another VM"):
                write(other.env("X"), "y")
                write(other / "exec", "true")
                assert read(other.env("X")) == "y"
                assert other.status() == "running"
                os.listdir(mount.mount)
                vm.info()
                sh('ls -l "$D" >/dev/null', D=vm.path)
        for name, client in clients.items():
            status, out, errors = client.result(max(1, end - time.monotonic()))
            assert status != 0, f"{name} succeeded: {out!r}"
            assert errors, name
        assert vm.status() == "unreachable"
        assert vm.error() != ""
        # Now it is known, and everybody is told at once.
        for name, script in operations.items():
            with takes_at_most(TIMEOUT + SLACK, name):
                assert sh(script, D=vm.path, check=False, seconds=30).returncode != 0, name
        with refused("ETIMEDOUT", "EHOSTUNREACH"):
            write(vm / "exec", "true")
        assert "does not answer: " in vm.error() and "exec" not in vm.error(), "the words are about this, not what was lost"
        done = sh('"$D/run" true', D=vm.path, check=False)
        assert done.returncode == 255 and b"does not answer: " in done.stderr, done
    finally:
        os.kill(pid, signal.SIGCONT)
    vm.wait("running", 40)
    names = os.listdir(vm / "env")
    for name in names:
        assert vm.value(name) == read(vm.env(name)).rstrip("\n").encode(), name
    for name in ("DELETED", "FRESH"):
        assert vm.is_set(name) == (name in names), name
    write(vm.env("OLD"), "newest\n")
    assert vm.value("OLD") == b"newest"
    assert vm.exec("echo back") == b"back\n"


@pytest.mark.deadline(240)
def test_stopping_a_vm_whose_qemu_has_stopped_ends_with_it(new_vm):
    vm = new_vm("frozen2")
    write(vm.env("A"), "b\n")
    pid = vm.qemu()
    vm.close()
    os.kill(pid, signal.SIGSTOP)
    with takes_at_most(30, "echo stopped > status"):
        sh('echo stopped > "$F"', F=vm / "status", seconds=60)
    assert vm.status() == "stopped"
    assert not pid_alive(pid)
    assert read(vm.env("A")) == "b\n"


@pytest.mark.deadline(240)
def test_an_ssh_server_that_is_gone_makes_the_vm_unreachable_and_comes_back(new_vm):
    vm = new_vm("deaf")
    write(vm.env("A"), "b\n")
    # The guest starts the server again 0.2 s later; connections that are there die with their processes.
    vm.ssh("(usleep 300000; killall dropbear) >/dev/null 2>&1 &", check=False)
    vm.close()

    def works():
        try:
            write(vm.env("A"), "c\n")
        except OSError:
            return False
        return vm.status() == "running"

    wait_for(lambda: vm.status() != "running", "the loss is seen", 10)
    wait_for(works, "it works again", 30)
    assert vm.value("A") == b"c"
    assert vm.exec("echo on") == b"on\n"


# --- death of those who wait ---


@pytest.mark.deadline(200)
@pytest.mark.parametrize(
    "first, second",
    [
        ('echo a > "$D/env/A"', 'echo b > "$D/env/A"'),
        ('rm "$D/env/A"', 'ls "$D/env"'),
        ('rm "$D/env/A"', 'cat "$D/env/B"'),
        ('rm "$D/env/A"', 'echo new > "$D/env/NEW"'),
        ('rm "$D/env/A"', 'rm "$D/env/B"'),
        ('mv "$D/env/A" "$D/env/C"', 'echo new > "$D/env/NEW"'),
        ('mv "$D/env/A" "$D/env/C"', 'mv "$D/env/B" "$D/env/D"'),
        ('echo B=x > "$D/.s" && mv "$D/.s" "$D/environ"', 'cat "$D/status" && echo new > "$D/env/NEW"'),
        ('echo stopped > "$D/status"', 'echo running > "$D/status"'),
        ('cat "$D/exec"', 'cat "$D/exec"'),
    ],
)
def test_who_waits_for_another_waiting_client_can_be_killed(daemon, first, second):
    one = daemon(timeout=60)
    vm = one.boot("queue")
    write(vm.env("A"), "v\n")
    write(vm.env("B"), "v\n")
    with Client('echo "sleep 1000" > "$F"', env={"F": vm / "exec"}) as writer:
        writer.waits()
        os.kill(vm.qemu(), signal.SIGSTOP)
        env = {"D": vm.path, "PATH": PATH}
        with Client(first, env=env).waits("first") as before, Client(second, env=env) as client:
            client.waits("second", or_ends=True)
            start = time.monotonic()
            client.signal(signal.SIGKILL)
            client.result(20)
            assert time.monotonic() - start < 1
            start = time.monotonic()
            before.signal(signal.SIGKILL)
            before.result(20)
            assert time.monotonic() - start < 1


REMOVALS = {
    "rm": ('rm "$D/env/A"', {"A": None, "B": "b"}),
    "mv to a free name": ('mv "$D/env/A" "$D/env/C"', {"A": None, "B": "b", "C": "a"}),
    "mv onto another": ('mv "$D/env/A" "$D/env/B"', {"A": None, "B": "a"}),
    "mv of scratch": ('cd "$D/env" && echo s > .s && mv "$D/env/.s" "$D/env/A"', {"A": "s", "B": "b"}),
    "mv to scratch": ('mv "$D/env/A" "$D/env/A.bak" && cat "$D/env/A.bak"', {"A": None, "B": "b"}),
    "exchange": ("python3 -c 'import ctypes, os; d = os.environ[\"D\"].encode() + b\"/env/\"; "
                 "exit(ctypes.CDLL(None).renameat2(-100, d + b\"A\", -100, d + b\"B\", 2))'", {"A": "b", "B": "a"}),
    "mv onto environ": ('echo "B=x" > "$D/.s" && mv "$D/.s" "$D/environ"', {"A": None, "B": "x"}),
}  # fmt: skip


@pytest.mark.deadline(200)
def test_a_removal_that_takes_long_has_its_verdict_and_holds_up_nobody(daemon):
    """It gives the directory's lock back, and is told what became of it when that is known."""
    one = daemon(timeout=60)
    vm = one.boot("slow")
    for what, (script, after) in REMOVALS.items():
        sh('cd "$D/env" && rm -f C && echo a > A && echo b > B', D=vm.path)
        os.kill(vm.qemu(), signal.SIGSTOP)
        with Client(script, env={"D": vm.path, "PATH": PATH}).waits(what) as client:
            with takes_at_most(1, f"ls during {what}"):
                assert b"B" in sh('ls "$D/env"', D=vm.path).stdout
            os.kill(vm.qemu(), signal.SIGCONT)
            status, out, errors = client.result(30)
            assert (status, errors) == (0, ""), what
            assert what != "mv to scratch" or out == b"a\n"
        for name, value in after.items():
            assert value is None or read(vm.env(name)) == value + "\n", (what, name)
            assert os.path.exists(vm.env(name)) == (value is not None), (what, name)
            assert vm.is_set(name) == (value is not None), (what, name)
            assert value is None or vm.value(name) == value.encode(), (what, name)


@pytest.mark.deadline(200)
@pytest.mark.parametrize("what", ["rm", "mv onto another"])
def test_a_removal_that_is_never_answered_fails_in_time(daemon, what):
    one = daemon(timeout=2)
    vm = one.boot("never")
    sh('cd "$D/env" && echo a > A && echo b > B', D=vm.path)
    vm.close()
    os.kill(vm.qemu(), signal.SIGSTOP)
    with takes_at_most(2 + SLACK), Client(REMOVALS[what][0], env={"D": vm.path, "PATH": PATH}) as client:
        status, _, errors = client.result(20)
    assert status != 0
    assert "timed out" in errors or "No route to host" in errors
    assert "guest" in vm.error()
    os.kill(vm.qemu(), signal.SIGCONT)


# The kernel looks the directory up for none of these, and holds its lock until they are answered.
IN_THE_DIRECTORY = {
    "rm": 'cd "$D/env" && rm A',
    "mv": 'cd "$D/env" && mv A Z',
    "rm -r": 'rm -r "$D/env"',
    "find": 'find "$D/env" -name A -delete',
    "mv onto environ": 'cd "$D" && echo B=x >.s && mv .s environ',
}


@pytest.mark.deadline(200)
@pytest.mark.parametrize("what", IN_THE_DIRECTORY)
def test_a_removal_in_an_open_directory_holds_up_nobody_for_longer_than_a_second(daemon, what):
    one = daemon(timeout=60)
    vm = one.boot("held")
    sh('cd "$D/env" && echo a > A && echo b > B', D=vm.path)
    vm.close()
    env = {"D": vm.path, "PATH": PATH}
    os.kill(vm.qemu(), signal.SIGSTOP)
    with Client(IN_THE_DIRECTORY[what], env=env).waits(what) as removal:
        second = 'cat "$D/nope"' if "environ" in what else 'cat "$D/env/NOPE"'
        with Client(second, env=env).waits("for a name", or_ends=True) as client:
            start = time.monotonic()
            client.signal(signal.SIGKILL)
            client.result(20)
            assert time.monotonic() - start < 1
        with takes_at_most(5, what):
            status, _, errors = removal.result(20)
    assert status != 0 and "timed out" in errors
    assert "whole path" in vm.error() and vm.error().split(":")[0] in ("env/A", "env/B", "env/A to Z", ".s to environ")
    # As with every deadline, it may come true.
    os.kill(vm.qemu(), signal.SIGCONT)
    if "environ" in what:
        wait_for(lambda: vm.value("B") == b"x", "the change takes effect", 30)
    else:
        wait_for(lambda: not vm.is_set("A"), "the change takes effect", 30)
        wait_for(lambda: not os.path.exists(vm.env("A")), "and is seen", 5)
    assert os.path.exists(vm.env("B")) == (what != "rm -r")
    write(vm.env("AFTER"), "it works\n")
    assert vm.value("AFTER") == b"it works"


@pytest.mark.deadline(200)
def test_removals_in_an_open_directory_do_not_add_up(daemon):
    one = daemon(timeout=60)
    vm = one.boot("crowded")
    sh('cd "$D/env" && for i in 1 2 3 4 5 6; do echo a > A$i; done', D=vm.path)
    env = {"D": vm.path, "PATH": PATH}
    os.kill(vm.qemu(), signal.SIGSTOP)
    removals = [Client(f'cd "$D/env" && rm A{i}', env=env) for i in range(1, 7)]
    removals[0].waits("the first")
    with Client('cat "$D/env/NOPE"', env=env) as client, takes_at_most(2):
        assert client.result(20)[0] != 0
    for removal in removals:
        status, _, errors = removal.result(20)
        assert status != 0 and "timed out" in errors
    os.kill(vm.qemu(), signal.SIGCONT)
    wait_for(lambda: not [name for name in os.listdir(vm / "env") if name.startswith("A")], "all take effect", 30)


class Creeping:
    """A guest that is alive and gets a fiftieth of the time."""

    def __init__(self, vm):
        self.pid = vm.qemu()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.creep)

    def creep(self):
        while not self.over.is_set():
            os.kill(self.pid, signal.SIGSTOP)
            self.over.wait(0.1)
            os.kill(self.pid, signal.SIGCONT)
            self.over.wait(0.002)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


@pytest.mark.deadline(200)
@pytest.mark.parametrize("what", ["rm -r", "many at once"])
def test_who_waits_behind_removals_of_a_slow_guest_can_be_killed(daemon, what):
    one = daemon(timeout=60)
    vm = one.boot("creeps")
    names = [f"A{i}" for i in range(20)]
    write(vm / "environ", "".join(f"{name}=a\n" for name in names))
    vm.close()
    env = {"D": vm.path, "PATH": PATH}
    scripts = ['rm -r "$D/env"'] if what == "rm -r" else [f'rm "$D/env/{name}"' for name in names]
    with Creeping(vm):
        removals = [Client(script, env=env) for script in scripts]
        for number in range(10):
            with Client(f'cat "$D/env/NOPE{number}"', env=env).waits("for a name", or_ends=True) as client:
                start = time.monotonic()
                client.signal(signal.SIGKILL)
                client.result(20)
                assert time.monotonic() - start < 1
    for removal in removals:
        status, _, errors = removal.result(60)
        assert status == 0 or (what == "rm -r" and "timed out" in errors), errors
    sh('rm -rf "$D/env"', D=vm.path)
    wait_for(lambda: not [name for name in os.listdir(vm / "env") if name.startswith("A")], "all are gone", 60)


@pytest.mark.deadline(200)
def test_a_removal_in_an_open_directory_whose_guest_answers_in_time_succeeds(daemon):
    one = daemon(timeout=60)
    vm = one.boot("hesitates")
    sh('cd "$D/env" && echo a > A && echo b > B', D=vm.path)
    # The second try of the kernel is given its verdict.
    for script, name in (('cd "$D/env" && rm A', "A"), ('cd "$D/env" && mv B C', "B")):
        os.kill(vm.qemu(), signal.SIGSTOP)
        with Client(script, env={"D": vm.path, "PATH": PATH}).waits(script) as client:
            os.kill(vm.qemu(), signal.SIGCONT)
            status, _, errors = client.result(30)
            # On a busy machine it may be too late, then it says so.
            assert status == 0 and not errors or "timed out" in errors
        wait_for(lambda: not vm.is_set(name), f"{name} is gone", 10)
    assert vm.value("C") == b"b"


def clients_that_wait(vm):
    """A script for each operation that can wait for a guest which does not answer."""
    return {
        # Before the writes: while one is under way, what is known is what the guest will have.
        "open env for reading": 'cat "$D/env/B"',
        "write env": 'echo new > "$D/env/A"',
        "create env": 'echo new > "$D/env/NEW"',
        "unlink env": 'rm -f "$D/env/C"',
        "write exec": 'echo true > "$D/exec"',
        "read exec": 'cat "$D/exec"',
        "read-write exec": 'exec 3<>"$D/exec"; echo true >&3; cat <&3',
        "append env": 'echo more >> "$D/env/D"',
        "flush env": 'printf x | dd of="$D/env/E" bs=1 conv=fsync status=none',
        "write status": 'echo stopped > "$D/status"',
    }


@pytest.mark.deadline(300)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_a_client_that_is_killed_while_it_waits_is_gone_within_a_second(daemon, number):
    one = daemon(timeout=60)
    vm = one.boot("stuck")
    for name in "ABCDE":
        write(vm.env(name), "v\n")
    pid = vm.qemu()
    vm.close()
    with Client('echo "sleep 1000" > "$F"', env={"F": vm / "exec"}) as writer:
        wait_for(lambda: vm.runs("sleep 1000"), "the command runs")
        vm.close()
        writer.waits()
        os.kill(pid, signal.SIGSTOP)
        wait_until_old()
        for name, script in clients_that_wait(vm).items():
            with Client(script, env={"D": vm.path, "PATH": PATH}) as client:
                client.waits(name)
                start = time.monotonic()
                client.signal(number)
                assert client.result(10)[0] != 0, name
                assert time.monotonic() - start < 1, name
            assert one.running(), name
        # And the one that has been there all the time.
        start = time.monotonic()
        writer.signal(number)
        assert writer.result(10)[0] != 0
        assert time.monotonic() - start < 1


@pytest.mark.deadline(200)
def test_many_clients_killed_at_once_are_gone_and_the_daemon_goes_on(new_vm, mount):
    vm = new_vm("crowd")
    clients = [Client(f'echo "sleep {2000 + n}" > "$F"', env={"F": vm / "exec"}) for n in range(30)]
    for client in clients:
        client.waits(seconds=30)
    start = time.monotonic()
    for client in clients:
        client.signal(signal.SIGKILL)
    for client in clients:
        assert client.result(10)[0] == -signal.SIGKILL
    assert time.monotonic() - start < 3
    wait_for(lambda: not [line for line in vm.processes() if "sleep 20" in line], "all have ended in the guest", 20)
    assert mount.running()
    assert vm.exec("echo on") == b"on\n"
