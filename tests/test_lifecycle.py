"""Stopping and starting; VMs that outlive their daemon."""

import json
import os
import signal
import subprocess
import time

import pytest

import harness
from harness import (
    Client,
    environment,
    kill_and_wait,
    mount_line,
    pid_alive,
    read,
    refused,
    sh,
    takes_at_most,
    wait_for,
    write,
)


@pytest.mark.deadline(240)
def test_a_vm_is_stopped_and_started_through_status(new_vm):
    vm = new_vm("cycle")
    write(vm.env("KEPT"), "it's\ntwo lines\n")
    pid = vm.qemu()
    vm.close()
    with takes_at_most(20, "echo stopped > status"):
        sh('echo stopped > "$F"', F=vm / "status")
    assert vm.status() == "stopped"
    assert not pid_alive(pid)
    info = vm.info()
    assert "pid" not in info and "port" not in info
    done = subprocess.run(vm.ssh_argv() + ["true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, text=True)
    assert (done.returncode, done.stderr) == (255, "vmsfs: cycle is stopped: `echo running > status` starts it\n")
    with refused("EBUSY", "ENODEV"):
        write(vm / "exec", "true")
    assert "stopped" in vm.error()
    sh('echo stopped > "$F"', F=vm / "status")

    assert read(vm.env("KEPT")) == "it's\ntwo lines\n"
    write(vm.env("WRITTEN_WHILE_STOPPED"), "v")
    sh('echo running > "$F"', F=vm / "status", seconds=harness.BOOT_TIMEOUT)
    assert vm.status() == "running"
    assert vm.value("KEPT") == b"it's\ntwo lines"
    assert vm.value("WRITTEN_WHILE_STOPPED") == b"v"
    assert vm.exec("echo $WRITTEN_WHILE_STOPPED") == b"v\n"
    sh('echo running > "$F"', F=vm / "status")
    with refused("EINVAL"):
        write(vm / "status", "sideways")
    with refused("EINVAL"):
        write(vm / "status", "booting")
    assert vm.status() == "running"


@pytest.mark.deadline(240)
def test_stopping_powers_the_guest_down_in_order(new_vm):
    vm = new_vm("orderly")
    # The guest ends its processes with SIGTERM before it powers off: this one says so on the console.
    # The driver of the power button is loaded after the first login.
    if harness.BACKEND == "qemu":
        wait_for(lambda: vm.ssh("pidof acpid", check=False), "the guest listens to the power button", 30)
    vm.ssh("(trap 'echo it was told to end >/dev/console; exit' TERM; while :; do usleep 50000; done) >/dev/null 2>&1 &")
    vm.close()
    sh('echo stopped > "$F"', F=vm / "status")
    assert "it was told to end" in read(vm / "console")


@pytest.mark.deadline(240)
def test_a_boot_can_be_stopped(mount):
    vm = mount.guest("halfway")
    mount.boot_late()
    os.mkdir(vm.path)
    try:
        with Client('echo running > "$F"', env={"F": vm / "status"}) as starter:
            starter.waits()
            with takes_at_most(20, "echo stopped > status"):
                sh('echo stopped > "$F"', F=vm / "status")
            assert vm.status() == "stopped"
            assert starter.result(10)[0] != 0
        mount.boot_late(False)
        sh('echo running > "$F"', F=vm / "status", seconds=harness.BOOT_TIMEOUT)
        assert vm.exec("echo up") == b"up\n"
    finally:
        mount.boot_late(False)
        os.rmdir(vm.path)


def check_taken_over(one, vm, pid):
    assert vm.qemu() == pid
    wait_for(lambda: vm.status() == "running", "the VM runs for the new daemon", 20)
    assert read(vm.env("KEPT")) == "kept\n"
    assert vm.value("KEPT") == b"kept"
    assert vm.exec("cat /run/before") == b"it is the same guest\n"
    write(vm.env("NEW"), "new")
    assert vm.value("NEW") == b"new"
    assert vm.info()["daemon"]["pid"] == one.pid
    assert sorted(os.listdir(vm / "env")) == ["KEPT", "NEW"]


def prepare(one, name):
    vm = one.boot(name)
    write(vm.env("KEPT"), "kept\n")
    vm.ssh("echo it is the same guest > /run/before")
    return vm, vm.qemu(), os.stat(vm.path).st_ino


@pytest.mark.deadline(240)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_unmounts_and_the_next_daemon_goes_on_with_the_vms(daemon, number):
    one = daemon()
    vm, pid, inode = prepare(one, "outlives")
    one.stop(number)
    assert not mount_line(one.mount)
    assert one.vms() == []
    assert pid_alive(pid)
    one.start()
    assert vm.status() == "running"
    check_taken_over(one, vm, pid)
    assert os.stat(vm.path).st_ino == inode


@pytest.mark.deadline(240)
def test_fusermount_ends_the_daemon_and_not_the_vms(daemon):
    one = daemon()
    vm, pid, _ = prepare(one, "unmounted")
    vm.close()
    subprocess.run(["fusermount3", "-u", one.mount], check=True, timeout=20)
    assert one.wait_end() == 0
    assert pid_alive(pid)
    one.start()
    check_taken_over(one, vm, pid)


@pytest.mark.deadline(240)
def test_kill_9_of_the_daemon_loses_no_vm_and_no_write(daemon):
    one = daemon()
    vm, pid, _ = prepare(one, "survives")
    stopped = one.boot("asleep")
    sh('echo stopped > "$F"', F=stopped / "status")
    write(stopped.env("ASLEEP"), "z\n")
    with Client('echo "sleep 1000" > "$F"', env={"F": vm / "exec"}) as client:
        client.waits()
        write(vm.env("KEPT"), "newer\n")
        write(vm.env("KEPT"), "kept\n")
        one.kill()
        assert client.result(10)[0] != 0
    assert pid_alive(pid)
    one.start()
    check_taken_over(one, vm, pid)
    assert stopped.status() == "stopped"
    assert read(stopped.env("ASLEEP")) == "z\n"


@pytest.mark.deadline(240)
def test_kill_9_of_the_daemon_while_a_vm_stops(daemon):
    """What is written meanwhile is for the next boot; the guest, which may still be there, has older values."""
    one = daemon()
    vm = one.boot("leaving")
    write(vm.env("KEPT"), "old\n")
    write(vm / "config/stop_timeout", "4\n")
    vm.ignore_power_button()
    with Client('echo stopped > "$F"', env={"F": vm / "status"}):
        wait_for(lambda: vm.status() == "stopping", "it is stopping")
        write(vm.env("KEPT"), "new\n")
        write(vm.env("MORE"), "more\n")
        one.kill()
    assert one.qemus()
    one.start()
    assert vm.status() == "stopping"
    assert read(vm.env("KEPT")) == "new\n"
    write(vm / "status", "stopped\n")
    assert not one.qemus()
    write(vm / "status", "running\n")
    assert vm.value("KEPT") == b"new" and vm.value("MORE") == b"more"
    assert sorted(os.listdir(vm / "env")) == ["KEPT", "MORE"]


@pytest.mark.deadline(240)
def test_kill_9_of_the_daemon_while_a_vm_boots(daemon):
    one = daemon()
    vm = one.guest("young")
    os.mkdir(vm.path)
    write(vm.env("EARLY"), "e\n")
    wait_for(lambda: vm.info().get("port") or vm.info().get("vsock_port"), "its VMM runs", 30)
    pid = vm.qemu()
    one.kill()
    one.start()
    assert vm.qemu() == pid
    vm.wait("running")
    assert vm.value("EARLY") == b"e"


@pytest.mark.deadline(240)
def test_kill_9_of_the_daemon_before_it_has_recorded_what_it_started(daemon):
    one = daemon()
    vm, pid, _ = prepare(one, "stray")
    path = os.path.join(one.state, "vms", "stray", "vm.json")
    wait_for(lambda: "KEPT" in read(path), "the record follows the guest")
    one.kill()
    record = json.loads(read(path))
    del record["vmm"]
    write(path, json.dumps({**record, "state": "booting", "attached": False}))
    with Client(["tail", "-f", os.path.join(one.state, "vms", "stray", "serial.log")]) as reader:
        one.start()
        wait_for(lambda: not pid_alive(pid), "what was left is ended")
        vm.wait("running")
        assert reader.state()
    assert one.qemus() == [vm.qemu()]
    assert vm.value("KEPT") == b"kept"


@pytest.mark.deadline(240)
def test_a_qemu_that_died_without_a_daemon_is_not_shown_as_running(daemon):
    one = daemon()
    vm, pid, _ = prepare(one, "orphan")
    one.stop()
    kill_and_wait(pid)
    one.start()
    assert vm.status() in ("stopped", "failed")
    assert "echo running > status" in vm.error()
    sh('echo running > "$F"', F=vm / "status", seconds=harness.BOOT_TIMEOUT)
    assert vm.value("KEPT") == b"kept"


@pytest.mark.deadline(240)
def test_another_process_with_the_recorded_pid_is_not_taken_for_the_vm(daemon):
    one = daemon()
    vm, pid, _ = prepare(one, "pid")
    one.stop()
    kill_and_wait(pid)
    record = os.path.join(one.state, "vms", "pid", "vm.json")
    text = read(record)
    with Client(["sleep", "600"]) as sleeper:
        assert str(pid) in text
        with open(record, "w", encoding="utf-8") as f:
            f.write(text.replace(str(pid), str(sleeper.process.pid)))
        one.start()
        assert vm.status() in ("stopped", "failed")
        os.rmdir(vm.path)
        assert sleeper.state()


@pytest.mark.deadline(240)
def test_a_vm_with_another_host_key_is_refused(daemon):
    one = daemon()
    vm, pid, _ = prepare(one, "impostor")
    one.stop()
    other = os.path.join(one.path, "other")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True, timeout=30)
    key = os.path.join(one.state, "vms", "impostor", "ssh_host_ed25519_key.pub")
    os.replace(other + ".pub", key)
    one.start()
    assert vm.status() == "unreachable"
    wait_for(lambda: "key" in vm.error(), "the refused key is in error", 20)
    with refused("EACCES", "EHOSTUNREACH"):
        write(vm.env("SECRET"), "for nobody else")
    with refused("EACCES", "EHOSTUNREACH"):
        write(vm / "exec", "true")
    assert vm.qemu() == pid


def test_a_second_daemon_on_the_state_directory_gets_a_clear_error(mount, daemon):
    other = daemon(start=False)
    other.options = other.options.replace(other.state, mount.state)
    for argv in (other.argv(), other.argv() + ["-f"]):
        done = subprocess.run(argv, capture_output=True, timeout=30, env=environment(), text=True)
        assert done.returncode != 0
        assert mount.state in done.stderr and "state=" in done.stderr
        assert not mount_line(other.mount)
    assert mount.running() and mount_line(mount.mount)


@pytest.mark.deadline(240)
@pytest.mark.parametrize("state", ["running", "booting"])
def test_ephemeral_leaves_nothing(daemon, state):
    one = daemon("ephemeral")
    guest = one.guest("brief")
    os.mkdir(guest.path)
    if state == "running":
        guest.wait("running")
        write(guest.env("A"), "b")
    one.stop()
    assert one.remains() == []


@pytest.mark.deadline(240)
def test_an_unreadable_record_does_not_keep_the_daemon_from_its_other_vms(daemon):
    one = daemon()
    vm, pid, _ = prepare(one, "good")
    one.stop()
    for name, text in {"empty": "", "broken": "{", "other": '{"id": "else", "number": 1}', "list": "[]"}.items():
        os.makedirs(os.path.join(one.state, "vms", name))
        with open(os.path.join(one.state, "vms", name, "vm.json"), "w", encoding="utf-8") as f:
            f.write(text)
    one.start()
    check_taken_over(one, vm, pid)
    # Those are there to be seen, and to be removed.
    for name in ("empty", "broken", "list"):
        bad = one.guest(name)
        assert bad.status() == "failed"
        assert "vm.json" in bad.error()
        os.rmdir(bad.path)
    assert "good" in os.listdir(one.mount)
    assert "broken" in read(one.log)


@pytest.mark.deadline(240)
def test_records_are_private_whole_json(daemon):
    one = daemon()
    vm, _, _ = prepare(one, "record")
    path = os.path.join(one.state, "vms", "record", "vm.json")
    seen = set()

    def changed():
        # Read again and again while it is replaced: never half of it.
        with open(path, encoding="utf-8") as f:
            seen.add(json.load(f)["state"])
        return True

    with Client('for i in $(seq 200); do echo $i > "$F"; done', env={"F": vm.env("N"), "PATH": "/bin:/usr/bin"}) as client:
        wait_for(lambda: changed() and client.process.poll() is not None, "200 writes", 60)
    assert seen == {"running"}


@pytest.mark.deadline(240)
def test_what_a_killed_daemon_was_writing_is_swept_up(daemon):
    one = daemon()
    vm = one.boot("swept")
    one.kill()
    record = os.path.join(one.state, "vms", "swept", "vm.json")
    leftover, kept = record + ".aB3dE6", record + ".unreadable"
    write(leftover, "half of a rec")
    write(kept, "not ours to remove")
    one.start()
    vm.wait("running")
    assert not os.path.exists(leftover)
    assert os.path.exists(kept) and os.path.exists(record)


def test_the_daemon_ends_in_time_with_clients_that_wait(daemon):
    one = daemon()
    vm = one.boot("busy")
    with Client('echo "sleep 1000" > "$F"', env={"F": vm / "exec"}) as client:
        client.waits()
        start = time.monotonic()
        one.stop()
        assert time.monotonic() - start < 10
        assert client.result(10)[0] != 0
