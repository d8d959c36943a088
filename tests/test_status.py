"""status: the desired state, pausing, and who watches it."""

import contextlib
import os
import select
import signal
import subprocess
import time

import pytest

from harness import Client, environment, read, refused, sh, takes_at_most, wait_for, write
from test_jobs import Job


def states(fd, poll, last, seconds=30):
    """What a watcher sees, up to a state."""
    seen = []
    end = time.monotonic() + seconds
    while not seen or seen[-1] != last:
        assert time.monotonic() < end, seen
        if any(events & select.POLLPRI for _, events in poll.poll(1000)):
            seen.append(os.pread(fd, 100, 0).decode().strip())
    return seen


@pytest.mark.parametrize("shell", ["bash", "dash", "busybox"])
def test_a_desired_state_holds_when_the_write_returns(new_vm, shell):
    vm = new_vm("life")
    script = (
        f"cd '{vm.path}'; set -e; for s in running paused paused running running stopped stopped running;"
        " do echo $s > status; cat status; done"
    )
    words = "running paused paused running running stopped stopped running"
    assert sh(script, shell, seconds=90).stdout.decode().split() == words.split()
    os.rmdir(vm.path)


def test_a_paused_vm_stands_still_and_loses_nothing(new_vm):
    vm = new_vm("still")
    write(vm.env("A"), "1\n")
    with Job(vm) as job:
        job.start("echo begun; while ! [ -e /tmp/go ]; do usleep 20000; done; echo $A; exit 3")
        with open(job / "stdout", "rb", buffering=0) as out:
            assert out.read(10) == b"begun\n"
            write(vm / "status", "paused\n")
            assert vm.status() == "paused"
            # Longer than a guest may be silent otherwise.
            with Client(["cat", job / "exit"]) as client:
                client.waits()
                end = time.monotonic() + vm.daemon.timeout * 2.5
                while time.monotonic() < end:
                    assert vm.status() == "paused"
                    assert read(vm.env("A")) == "1\n"
                    for attempt in (
                        lambda: write(vm.env("A"), "2\n"),
                        lambda: os.unlink(vm.env("A")),
                        lambda: write(vm / "exec", "true"),
                    ):
                        with refused("EBUSY"), takes_at_most(2, "the refusal"):
                            attempt()
                    time.sleep(0.5)
                assert "paused" in vm.error()
                connections = vm.info()["connections"]
                write(vm / "status", "running\n")
                assert vm.info()["connections"] == connections
                write(vm.env("A"), "2\n")
                vm.ssh("touch /tmp/go")
                assert out.read(10) == b"1\n"
                assert client.result(10)[1] == b"3\n"
    assert vm.value("A") == b"2"


def test_a_paused_vm_can_be_stopped_and_destroyed(new_vm):
    vm = new_vm("parked")
    write(vm / "status", "paused")
    write(vm / "status", "stopped")
    assert vm.status() == "stopped"
    with refused("EBUSY"):
        write(vm / "status", "paused")
    write(vm / "status", "running")
    write(vm / "status", "paused")
    pid = vm.qemu()
    with takes_at_most(5, "rmdir"):
        os.rmdir(vm.path)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"), "QEMU has ended")


def test_a_paused_vm_is_found_paused_by_the_next_daemon(daemon):
    one = daemon()
    vm = one.boot("found")
    write(vm.env("A"), "1\n")
    write(vm / "status", "paused")
    one.kill()
    one.start()
    assert vm.status() == "paused"
    assert read(vm.env("A")) == "1\n"
    with refused("EBUSY"):
        write(vm.env("A"), "2\n")
    write(vm / "status", "running")
    assert vm.status() == "running"
    write(vm.env("A"), "2\n")
    assert vm.value("A") == b"2"


def test_paused_may_be_asked_for_while_it_boots(daemon):
    one = daemon()
    vm = one.guest("early")
    os.mkdir(vm.path)
    write(vm / "status", "paused\n")
    assert vm.status() == "paused"
    write(vm / "status", "running\n")
    assert vm.exec("echo yes") == b"yes\n"


def test_the_death_of_a_paused_vm_is_seen(new_vm):
    vm = new_vm("dead")
    write(vm / "status", "paused")
    os.kill(vm.qemu(), signal.SIGKILL)
    wait_for(lambda: vm.status() == "failed", "it is seen", 2)
    assert "has ended" in vm.error()


def test_an_existing_machine_cannot_be_paused(attached):
    vm = attached()
    with refused("ENOTSUP", "EOPNOTSUPP"):
        write(vm / "status", "paused")
    assert "attach" in vm.error() and vm.status() == "running"


def test_a_watcher_sees_each_change(daemon):
    one = daemon()
    vm = one.guest("seen")
    os.mkdir(vm.path)
    fd = os.open(vm / "status", os.O_RDONLY)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        poll.poll(0)
        assert os.pread(fd, 100, 0) in (b"booting\n", b"running\n")
        if vm.status() == "booting":
            assert states(fd, poll, "running") == ["running"]
        assert poll.poll(100) == []
        write(vm / "status", "paused")
        write(vm / "status", "running")
        write(vm / "status", "stopped")
        assert states(fd, poll, "stopped") == ["paused", "running", "stopping", "stopped"]
        assert os.pread(fd, 100, 0) == b"stopped\n"
    finally:
        os.close(fd)


@pytest.mark.parametrize("word", ["off", "Running", "running stopped", "", "booting", "failed"])
def test_words_that_are_no_desired_state_are_refused(vm, word):
    with refused("EINVAL"):
        write(vm / "status", word + "\n")
    assert "running" in vm.error() and "paused" in vm.error() and "stopped" in vm.error()
    assert vm.status() == "running"


def test_a_change_between_reading_and_polling_is_seen(attached):
    vm = attached()
    fd = os.open(vm / "status", os.O_RDONLY)
    try:
        assert os.pread(fd, 100, 0) == b"running\n"
        write(vm / "status", "stopped\n")
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        assert poll.poll(3000), "it has changed since it was read"
        assert os.pread(fd, 100, 0) == b"stopped\n"
        assert poll.poll(100) == []
        # Who does not poll reads how it is.
        other = os.open(vm / "status", os.O_RDONLY)
        assert os.pread(other, 100, 0) == b"stopped\n"
        write(vm / "status", "running\n")
        assert os.pread(other, 100, 0) == b"running\n"
        os.close(other)
    finally:
        os.close(fd)


@pytest.mark.deadline(200)
@pytest.mark.parametrize("other", ["running", "stopped"])
def test_who_asks_for_the_opposite_is_told_that_he_will_not_have_it(daemon, other):
    one = daemon()
    vm = one.guest("both")
    one.boot_late()
    os.mkdir(vm.path)
    with Client(["bash", "-c", f"echo paused > '{vm / 'status'}'"]) as client:
        client.waits()
        one.boot_late(False)
        write(vm / "status", f"{other}\n")
        status, _, words = client.result(10)
    assert status != 0 and ("busy" in words or other == "stopped"), words
    assert vm.status() == other
    if other == "running":
        assert "not paused" in vm.error()


@pytest.mark.deadline(200)
def test_a_stop_ends_a_pause_that_has_begun(daemon):
    one = daemon("stop_timeout=1")
    vm = one.boot("busy")
    os.kill(vm.qemu(), signal.SIGSTOP)  # QMP does not answer
    try:
        with Client(f"echo paused > '{vm / 'status'}'") as pause, Client(f"echo stopped > '{vm / 'status'}'") as stop:
            assert stop.result(30)[0] == 0
            assert pause.result(10)[0] != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            for pid in one.qemus():
                os.kill(pid, signal.SIGCONT)
    write(vm / "status", "running\n")
    write(vm / "status", "paused\n")
    assert vm.status() == "paused"


@pytest.mark.deadline(200)
def test_to_go_on_without_ssh_has_a_deadline_and_words(daemon):
    one = daemon("timeout=2")
    vm = one.boot("mute")
    vm.mute()
    write(vm / "status", "paused\n")
    one.kill()
    one.start()
    with refused("ETIMEDOUT"), takes_at_most(10):
        write(vm / "status", "running\n")
    assert vm.status() == "unreachable"
    assert "not answer" in vm.error()
    # The stop of one that does not answer takes as long as it takes.
    write(vm / "config/stop_timeout", "4\n")
    write(vm / "status", "stopped\n")
    assert vm.status() == "stopped"


def test_who_does_not_answer_from_the_start_has_words(attached):
    vm = attached(options="timeout=1")
    one = vm.daemon
    one.kill()
    vm.sshd.stop()
    one.start()
    assert vm.status() == "unreachable"
    wait_for(lambda: "does not answer" in vm.error(), "it is told", 20)


# --- tools that replace a file ---

TOOLS = {
    "cp": 'cp "$T/new" "$F"',
    "cp -a": 'cp -a "$T/new" "$F"',
    "cp --remove-destination": 'cp --remove-destination "$T/new" "$F"',
    "install": 'install -m 644 "$T/new" "$F"',
    "mv": 'mv "$T/new" "$F"',
    "tee": 'tee "$F" < "$T/new"',
    "sed -i": 'sed -i s/running/stopped/ "$F"',
    "sed -i.bak": 'sed -i.bak s/running/stopped/ "$F"; grep running "$F.bak"; rm "$F.bak"',
    "rename": 'cp "$T/new" "$F.tmp"; mv "$F.tmp" "$F"',
    "rsync": 'rsync -a "$T/new" "$F"',
    "tar": 'mv "$T/new" "$T/status"; tar -C "$T" -cf - status | tar -C "$(dirname "$F")" -xf -',
    "ansible": 'ansible localhost -c local -m copy -a "content=\'stopped\\n\' dest=$F" > "$T/log" || { cat "$T/log"; exit 1; }',
    "ansible unsafe": 'ansible localhost -c local -m copy -a "content=\'stopped\\n\' dest=$F unsafe_writes=true" > "$T/log"',
    "puppet": 'set +e; puppet apply --detailed-exitcodes --confdir "$T/p" --vardir "$T/p"'
              ' -e "file { \'$F\': content => \\"stopped\\n\\" }" > "$T/log" 2>&1; [ $? = 2 ] || { cat "$T/log"; exit 1; }',
}  # fmt: skip


def run_tool(vm, folder, script):
    return subprocess.run(
        ["dash", "-c", "set -e; " + script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
        env=environment({
            "F": vm / "status", "T": str(folder), "HOME": str(folder), "TMPDIR": str(folder),
            "ANSIBLE_LOCALHOST_WARNING": "0", "ANSIBLE_NOCOLOR": "1", "ANSIBLE_HOME": str(folder / "ansible"),
            "ANSIBLE_LOCAL_TEMP": str(folder / "ansible"), "ANSIBLE_REMOTE_TEMP": str(folder / "ansible"),
            "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3", "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
        }),
    )  # fmt: skip


@pytest.fixture(scope="module")
def machine():
    """One that every tool stops and starts again."""
    from harness import Daemon, Sshd

    server = Sshd().start()
    one = Daemon(server.options()).start()
    yield one.boot("machine")
    one.clear()
    server.stop()


@pytest.mark.parametrize("name", TOOLS)
def test_tools_set_the_state_as_they_change_any_file(machine, tmp_path, name):
    write(machine / "status", "running\n")
    (tmp_path / "new").write_text("stopped\n")
    os.utime(tmp_path / "new", (1_600_000_000, 1_600_000_000))
    before = sorted(os.listdir(machine.path))
    done = run_tool(machine, tmp_path, TOOLS[name])
    assert done.returncode == 0, done
    assert machine.status() == "stopped"
    assert sorted(os.listdir(machine.path)) == before
    # A second run finds it so.
    if name.startswith("ansible"):
        assert b"CHANGED" in (tmp_path / "log").read_bytes()
        assert run_tool(machine, tmp_path, TOOLS[name]).returncode == 0
        assert b"SUCCESS" in (tmp_path / "log").read_bytes()


def test_a_rename_that_brings_no_state_fails_and_leaves_all_as_it_was(machine):
    write(machine / "status", "running\n")
    write(machine / "status.tmp", "off\n")
    with refused("EINVAL"):
        os.rename(machine / "status.tmp", machine / "status")
    assert "running, paused or stopped" in machine.error()
    assert machine.status() == "running" and read(machine / "status.tmp") == "off\n"
    os.unlink(machine / "status.tmp")
    # And one that waits is told when it is so.
    write(machine / "status", "stopped\n")
    write(machine / "status.tmp", "running\n")
    os.rename(machine / "status.tmp", machine / "status")
    assert machine.status() == "running"
