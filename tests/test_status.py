"""status: the desired state, pausing, and who watches it."""

import os
import select
import signal
import time

import pytest

from harness import Client, read, refused, sh, takes_at_most, wait_for, write
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
