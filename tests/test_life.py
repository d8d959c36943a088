"""What ends a VM unasked, what keeps it, and what a daemon that was killed leaves to the next."""

import contextlib
import json
import os
import socket
import subprocess
import time

import pytest

from harness import RUN, environment, mount_line, read, read_bytes, refused, sh, wait_for, write


@pytest.fixture
def machine(attached):
    """A VM that is quick to make, and takes variables for real."""
    return attached()


# --- protected ---


@pytest.mark.parametrize(
    "removal",
    [
        "rmdir '{}'",
        "rm -r '{}'",
        "rm -rf '{}'",
        "busybox rm -r '{}'",
        "find '{}' -delete",
        "/usr/bin/python3 -c 'import shutil; shutil.rmtree(\"{}\")'",
        "perl -MFile::Path=remove_tree -e 'remove_tree(\"{}\", {{error => \\my $e}}); exit(@$e != 0)'",
    ],
)
def test_a_protected_vm_is_not_removed_nor_touched(machine, removal):
    for name in ("A", "B", "C"):
        write(machine.env(name), name + "\n")
    os.mkdir(machine / "jobs/kept")
    write(machine / "config/protected", "yes\n")
    done = sh(removal.format(machine.path), check=False)
    assert done.returncode != 0 and (b"not permitted" in done.stderr or "perl" in removal), done
    assert sorted(os.listdir(machine / "env")) == ["A", "B", "C"]
    assert [read(machine.env(name)) for name in "ABC"] == ["A\n", "B\n", "C\n"]
    assert os.path.isdir(machine / "jobs/kept")
    assert machine.status() == "running"
    assert "protected" in machine.error()
    # Who only removes a variable may, and so may all others.
    sh(f"rm '{machine.env('A')}'; rmdir '{machine / 'jobs/kept'}'; cp /etc/hostname '{machine / 'environ.tmp'}' || :")
    assert sorted(os.listdir(machine / "env")) == ["B", "C"]
    write(machine / "config/protected", "no\n")
    os.rmdir(machine.path)
    assert not os.path.exists(machine.path)


# --- lifetime, idle_timeout ---


def test_a_vm_is_stopped_when_its_lifetime_is_over(machine):
    write(machine / "config/lifetime", "2\n")
    wait_for(lambda: machine.status() == "stopped", "it is stopped", 15)
    assert "lifetime" in machine.error()
    write(machine / "config/lifetime", "0\n")
    write(machine / "status", "running\n")
    assert machine.status() == "running"


def test_a_vm_that_nobody_uses_is_stopped(machine):
    write(machine / "config/idle_timeout", "3\n")
    # A command that runs is use, and so are variables.
    write(machine / "exec", "sleep 5")
    end = time.monotonic() + 5
    while time.monotonic() < end:
        write(machine.env("USED"), "1\n")
        assert machine.status() == "running"
        time.sleep(0.5)
    wait_for(lambda: machine.status() == "stopped", "it is stopped", 15)
    assert "idle_timeout" in machine.error()


@pytest.mark.parametrize("name", ["lifetime", "idle_timeout"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5", "99999999999"])
def test_times_that_are_none_are_refused(machine, name, value):
    with refused("EINVAL"):
        write(machine / f"config/{name}", value)
    assert name in machine.error() and "0" in machine.error()


# --- what a killed daemon leaves ---


def test_an_ephemeral_mount_that_was_killed_is_ended_by_the_next_start(daemon):
    one = daemon("ephemeral")
    vm = one.boot("session")
    pid = vm.qemu()
    one.kill()
    assert os.path.exists(f"/proc/{pid}")
    one.options = one.options.replace(",ephemeral", "")
    one.start()
    wait_for(lambda: not os.path.exists(f"/proc/{pid}") and one.remains() == [], "all of it is gone")
    assert one.vms() == []


def test_the_second_daemon_is_told_the_process_of_the_first(daemon):
    one = daemon("backend=attach,address=127.0.0.1")
    other = os.path.join(one.path, "other")
    os.mkdir(other)
    done = subprocess.run(
        [one.program, other, "-o", one.options], capture_output=True, text=True, timeout=30, env=environment()
    )
    assert done.returncode != 0
    assert f"process {one.pid}" in done.stderr and one.state in done.stderr
    assert not mount_line(other)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_dead_mount_of_ours_is_cleared_away(daemon, slash):
    one = daemon("backend=attach,address=127.0.0.1")
    os.kill(one.pid, 9)
    one.wait_end()
    assert mount_line(one.mount)
    with refused("ENOTCONN"):
        os.listdir(one.mount)
    one.mount += slash
    subprocess.run(one.argv(), check=True, timeout=30, env=environment(), stderr=subprocess.DEVNULL)
    one.mount = one.mount.rstrip("/")
    assert set(os.listdir(one.mount)) == {".defaults", ".new"}
    with open(os.path.join(one.state, "lock"), encoding="ascii") as f:
        one.pid = int(f.read())
    one.detached = True
    RUN.record_pid(one.pid)
    lines = [line for line in read("/proc/self/mountinfo").splitlines() if line.split()[4] == one.mount]
    assert len(lines) == 1


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told_when_the_mount_answers(daemon, tmp_path, abstract):
    path = f"@vmsfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path.replace("@", "\0"))
        manager.settimeout(20)
        one = daemon("backend=attach,address=127.0.0.1", env={"NOTIFY_SOCKET": path})
        lines = manager.recv(1000).decode().splitlines()
        assert "READY=1" in lines and f"MAINPID={one.pid}" in lines
        one.stop()
        assert "STOPPING=1" in manager.recv(1000).decode()


# --- records ---


@pytest.mark.parametrize("damage", ["version", "cut", "empty", "binary", "a folder"])
def test_a_record_that_cannot_be_read_is_kept_and_the_others_come_up(sshd, daemon, damage):
    server = sshd()
    one = daemon(server.options())
    good, bad = one.boot("good", "bad")
    write(good.env("A"), "1\n")
    one.stop()
    path = f"{one.state}/vms/bad/vm.json"
    record = read_bytes(path)
    if damage == "version":
        content = json.dumps({**json.loads(record), "version": 99}).encode()
    else:
        content = {"cut": record[: len(record) // 2], "empty": b"", "binary": os.urandom(500)}.get(damage)
    os.unlink(path)
    if damage == "a folder":
        os.mkdir(path)
    else:
        write(path, content)
    one.start()
    good.wait("running")
    assert read(good.env("A")) == "1\n"
    assert bad.status() == "failed"
    assert "record" in bad.error()
    if damage != "a folder":
        kept = [name for name in os.listdir(f"{one.state}/vms/bad") if "unreadable" in name]
        assert kept and read_bytes(f"{one.state}/vms/bad/{kept[0]}") == content
    os.rmdir(bad.path)
    assert one.vms() == ["good"]


@pytest.mark.parametrize("place", ["defaults", "new/ci"])
def test_a_damaged_record_of_what_is_prepared_is_kept(daemon, place):
    one = daemon("backend=attach,address=127.0.0.1")
    os.mkdir(one.vm(".new/ci"))
    write(one.vm(".defaults/env/A"), "1\n")
    one.stop()
    write(f"{one.state}/{place}/vm.json", b"{ damaged")
    one.start()
    assert set(os.listdir(one.mount)) == {".defaults", ".new"} and os.listdir(one.vm(".new")) == ["ci"]
    assert "unreadable" in " ".join(os.listdir(f"{one.state}/{place}"))
    assert "record" in read(one.vm(("." + place) + "/error"))


@pytest.fixture
def small(daemon, tmp_path):
    """A daemon whose state directory is on a file system of its own, of 3 MiB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", tmp_path], check=False).returncode:
        pytest.fail("no tmpfs can be mounted")
    one = daemon("backend=attach,address=127.0.0.1,boot_timeout=1", start=False)
    one.options = one.options.replace(f"state={one.state}", f"state={tmp_path}/state")
    one.state = f"{tmp_path}/state"
    yield one.start()
    if one.running():
        for name in one.vms():
            os.rmdir(one.vm(name))
    one.stop()
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_is_enospc_and_the_old_state_stays(small):
    vm = small.guest("v")
    os.mkdir(vm.path)
    wait_for(lambda: vm.status() == "failed", "it has given up", 20)
    write(vm.env("A"), "old\n")
    write(small.vm(".defaults/env/D"), "old\n")
    ballast = os.path.join(os.path.dirname(small.state), "ballast")
    with open(ballast, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(4096))
    try:
        for path in (vm.env("A"), small.vm(".defaults/env/D"), vm.env("NEW"), vm / "config/port"):
            with refused("ENOSPC"):
                write(path, "77\n")
        with refused("ENOSPC"):
            os.mkdir(small.vm("another"))
        assert read(vm.env("A")) == "old\n"
        assert read(vm / "config/port") == "22\n"
        assert not os.path.exists(vm.env("NEW"))
        assert "no room" in vm.error()
    finally:
        os.unlink(ballast)
    write(vm.env("A"), "new\n")
    small.kill()
    small.start()
    assert read(vm.env("A")) == "new\n"
    assert read(small.vm(".defaults/env/D")) == "old\n"
