"""What ends a VM unasked, what keeps it, and what a daemon that was killed leaves to the next."""

import contextlib
import json
import os
import re
import socket
import subprocess
import time

import pytest

from harness import (
    RUN,
    Client,
    environment,
    full_disk,
    mount_line,
    pid_alive,
    read,
    read_bytes,
    refused,
    runtime_dir,
    sh,
    wait_for,
    write,
)


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


def test_several_removers_at_once_remove_nothing(machine):
    names = [f"V{i}" for i in range(9)]
    for name in names:
        write(machine.env(name), name)
    write(machine / "config/protected", "yes\n")
    for _ in range(5):
        sh(f"for i in 1 2 3 4; do rm -rf '{machine.path}' & done; wait", check=False)
        assert sorted(os.listdir(machine / "env")) == names
    write(machine / "config/protected", "no\n")


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


@pytest.mark.parametrize("name", ["lifetime", "idle_timeout"])
def test_a_vm_that_does_not_answer_is_stopped_too(attached, name):
    vm = attached(options="timeout=1")
    vm.sshd.stop()
    wait_for(lambda: vm.status() == "unreachable", "it is unreachable", 20)
    write(vm / f"config/{name}", "2\n")
    wait_for(lambda: vm.status() == "stopped", "it is stopped", 15)
    assert name in vm.error()


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


@pytest.mark.deadline(240)
def test_an_ephemeral_mount_ends_what_was_made_on_it_and_nothing_else(daemon):
    one = daemon()
    keep = one.boot("keep")
    write(keep.env("K"), "precious\n")
    pid = keep.qemu()
    one.stop()
    # One that cannot be mounted at all.
    done = subprocess.run(
        one.argv() + ["-o", "ephemeral,rootcontext=x", "-f"],
        capture_output=True, text=True, timeout=60, env=environment(),
    )  # fmt: skip
    assert done.returncode != 0 and "nothing is mounted" in done.stderr
    assert pid_alive(pid) and os.listdir(f"{one.state}/vms") == ["keep"]
    persistent = one.options
    one.options += ",ephemeral"
    one.start()
    keep.wait("running")
    os.mkdir(one.vm("brief"))
    one.stop()
    assert pid_alive(pid) and os.listdir(f"{one.state}/vms") == ["keep"]
    one.options = persistent
    one.start()
    keep.wait("running")
    assert keep.value("K") == b"precious"


def test_who_was_stopped_is_found_so_without_words(new_vm):
    vm = new_vm("halted")
    one = vm.daemon
    # The end was seen and acknowledged, and its record not written: what it says is that the VM was to stop.
    write(vm / "status", "stopped\n")
    one.kill()
    path = f"{one.state}/vms/halted/vm.json"
    record = json.loads(read(path))
    gone = {"socket": f"{runtime_dir(one.state)}/1.qmp", "port": 1, "accel": "tcg", "pid": 2**22 - 1, "start_time": 1,
            "boot_id": read("/proc/sys/kernel/random/boot_id").strip()}  # fmt: skip
    write(path, json.dumps({**record, "state": "stopping", "backend": "qemu", "vmm": gone}))
    one.start()
    assert (vm.status(), vm.error()) == ("stopped", "")
    # One that was not asked to has ended by itself.
    one.kill()
    write(path, json.dumps({**record, "state": "running", "backend": "qemu", "vmm": gone}))
    one.start()
    assert vm.status() == "stopped" and "no daemon was there" in vm.error()


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


def test_a_dead_mount_is_cleared_away_by_another_of_its_names(daemon):
    one = daemon("backend=attach,address=127.0.0.1")
    os.kill(one.pid, 9)
    one.wait_end()
    alias = one.mount + ".alias"
    os.symlink(one.mount, alias)
    subprocess.run(
        [one.program, alias + "/", "-o", one.options], check=True, timeout=30, env=environment(), stderr=subprocess.DEVNULL
    )
    assert set(os.listdir(one.mount)) == {".defaults", ".new"}
    one.pid = int(read(os.path.join(one.state, "lock")))
    one.detached = True
    RUN.record_pid(one.pid)


@pytest.mark.deadline(200)
@pytest.mark.parametrize("dead", [True, False])
def test_of_many_that_start_at_once_one_mounts_and_the_others_are_told(daemon, dead):
    one = daemon("backend=attach,address=127.0.0.1")
    for _ in range(4):
        os.kill(one.pid, 9)
        one.wait_end()
        if not dead:
            one.unmount()
        starts = [
            subprocess.Popen(one.argv(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
            for _ in range(6)
        ]
        said = [start.communicate(timeout=60)[1] for start in starts]
        one.pid = int(read(os.path.join(one.state, "lock")))
        one.process, one.detached = None, True
        RUN.record_pid(one.pid)
        assert sorted(start.returncode != 0 for start in starts) == [False] + [True] * 5, said
        # It is another process before it leaves its caller.
        early = [start.pid for start in starts if start.returncode == 0]
        for start, words in zip(starts, said):
            assert start.returncode == 0 or re.search(rf"process ({one.pid}|{early[0]})\b", words), words
        assert set(os.listdir(one.mount)) == {".defaults", ".new"}
        # Who was refused has taken nothing away from who was not.
        assert os.path.isdir(runtime_dir(one.state))


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


DAMAGES = {
    "empty": lambda path, record: write(f"{path}/vm.json", ""),
    "version": lambda path, record: write(f"{path}/vm.json", json.dumps({**record, "version": 2})),
    "vmm": lambda path, record: write(f"{path}/vm.json", json.dumps({**record, "vmm": {"pid": "x"}})),
    "no vmm": lambda path, record: write(f"{path}/vm.json", json.dumps({k: v for k, v in record.items() if k != "vmm"})),
    "keys": lambda path, record: [write(f"{path}/{name}", "") for name in ("ssh_host_ed25519_key.pub", "known_hosts")],
}


@pytest.mark.deadline(300)
@pytest.mark.parametrize("state", ["state", "state,with,commas"])
def test_what_runs_for_a_damaged_record_is_ended_and_starts_once(daemon, state):
    one = daemon(start=False)
    one.options = one.options.replace("/state", "/" + state.replace(",", "\\,"))
    one.state = one.state.replace("/state", "/" + state)
    one.start()
    damages = DAMAGES if state == "state" else {"empty": DAMAGES["empty"]}
    vms = {}
    for name in [*damages, "good"]:
        os.mkdir(one.vm(name.replace(" ", "-")))
        vms[name] = one.guest(name.replace(" ", "-"))
    for vm in vms.values():
        vm.wait("running", 200)
    pids = {name: vm.qemu() for name, vm in vms.items()}
    one.kill()
    for name in damages:
        path = f"{one.state}/vms/{vms[name].name}"
        damages[name](path, json.loads(read(f"{path}/vm.json")))
    one.start()
    vms["good"].wait("running")
    assert pid_alive(pids["good"])
    for name in damages:
        assert vms[name].status() == "failed", name
        assert not pid_alive(pids[name]), name
        assert "what ran was ended" in vms[name].error() and "not see" not in vms[name].error()
    expected = {"empty": "it is empty", "version": "of version 2"}
    for name in expected.keys() & damages.keys():
        assert expected[name] in vms[name].error()
    for name in list(damages)[:1] + ["keys"] * (len(damages) > 1):
        write(vms[name] / "status", "running\n")
        assert vms[name].exec("echo yes") == b"yes\n"
    for vm in vms.values():
        os.rmdir(vm.path)
    wait_for(lambda: one.remains() == [], "nothing is left")


@pytest.mark.deadline(240)
def test_a_lost_public_key_is_no_end_of_a_vm(daemon):
    one = daemon()
    vm = one.boot("c")
    pid = vm.qemu()
    one.kill()
    write(f"{one.state}/vms/c/ssh_host_ed25519_key.pub", "")
    one.start()
    vm.wait("running")
    assert vm.qemu() == pid and vm.exec("echo yes") == b"yes\n"
    write(vm / "status", "stopped\n")
    write(vm / "status", "running\n")
    assert vm.exec("echo yes") == b"yes\n"


@pytest.mark.deadline(240)
def test_without_descriptors_nothing_is_taken_for_ended(daemon):
    one = daemon()
    vms = one.boot("a", "b", "c")
    pids = [vm.qemu() for vm in vms]
    one.kill()
    refusals = 0
    for most in range(12, 24):
        argv = ["sh", "-c", f"ulimit -n {most}; exec \"$@\"", "sh", *one.argv(), "-f"]
        with Client(argv, env=environment()) as few:
            wait_for(lambda: few.process.poll() is not None or mount_line(one.mount), "it mounts, or gives up", 30)
            if mount_line(one.mount):
                assert {vm.status() for vm in vms} <= {"running", "unreachable"}
                few.signal(9)
            out = few.result(20)[2]
        one.unmount()
        refusals += "cannot be taken over" in out and "ulimit" in out
        assert all(map(pid_alive, pids)), out
    assert refusals
    one.start()
    for vm, pid in zip(vms, pids):
        vm.wait("running")
        assert vm.qemu() == pid


def test_a_second_damage_does_not_replace_what_was_kept_of_the_first(daemon):
    one = daemon("backend=attach,boot_timeout=1")
    vm = one.guest("v")
    os.mkdir(vm.path)
    path = f"{one.state}/vms/v/vm.json"
    damaged = []
    for content in (b"first", b"second", b""):
        one.stop()
        write(path, content)
        damaged.append(content)
        one.start()
        kept = [read_bytes(f"{one.state}/vms/v/{n}") for n in os.listdir(f"{one.state}/vms/v") if "unreadable" in n]
        assert sorted(kept) == sorted(damaged)
        write(vm.env("A"), "1\n")  # so that there is a record
    # A part of one: the rest is taken over, and the whole kept.
    one.stop()
    record = json.loads(read(path))
    record["config"] |= {"memory": "weird", "protected": "maybe"}
    record["variables"].append({"name": "1A"})
    write(path, json.dumps(record))
    for _ in range(2):
        one.start()
        kept = [read(f"{one.state}/vms/v/{n}") for n in os.listdir(f"{one.state}/vms/v") if "unreadable" in n]
        assert json.dumps(record) in kept and len(kept) == 4
        assert read(vm.env("A")) == "1\n"
        assert read(vm / "config/memory") == "" and read(vm / "config/protected") == "no\n"
        if _ == 0:
            for word in ("memory", "weird", "protected", "maybe", "variables", "unreadable.3"):
                assert word in vm.error(), vm.error()
        one.kill()
    one.start()


def test_a_folder_with_the_record_of_another_vm_is_there_to_be_removed(daemon):
    one = daemon("backend=attach,boot_timeout=1")
    os.mkdir(one.vm("a"))
    write(one.vm("a/env/A"), "1\n")
    one.stop()
    sh(f"cp -r '{one.state}/vms/a' '{one.state}/vms/b'")
    one.start()
    assert read(one.vm("a/env/A")) == "1\n"
    assert read(one.vm("b/status")) == "failed\n"
    assert "another VM, a" in read(one.vm("b/error"))
    assert os.stat(one.vm("a")).st_ino != os.stat(one.vm("b")).st_ino
    os.rmdir(one.vm("b"))
    os.mkdir(one.vm("b"))
    assert os.listdir(one.vm("b/env")) == []


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
def small(on_a_disk_of):
    return on_a_disk_of("3m", "backend=attach,address=127.0.0.1,boot_timeout=1")


@pytest.mark.deadline(300)
def test_a_full_disk_keeps_a_vm_from_what_would_lose_its_variables(on_a_disk_of):
    one = on_a_disk_of("60m", "stop_timeout=1")
    vm = one.boot("w")
    with full_disk(one):
        write(vm.env("RUN"), "v\n")  # the guest has it, and the guest alone
        for state in ("stopped", "paused"):
            with refused("ENOSPC"):
                write(vm / "status", f"{state}\n")
            assert "disk" in vm.error() and "room" in vm.error()
            wait_for(lambda: vm.status() == "running", "it is as it was", 5)
        assert vm.value("RUN") == b"v"
        write(vm.env("RUN"), "w\n")
        vm.close()
        one.kill()
    one.start()
    vm.wait("running")
    assert read(vm.env("RUN")) == "w\n"
    # The same from paused; and what is paused stays so.
    write(vm / "status", "paused\n")
    with full_disk(one):
        for state in ("stopped", "running"):
            with refused("ENOSPC"):
                write(vm / "status", f"{state}\n")
            assert vm.status() == "paused"
    write(vm / "status", "stopped\n")
    one.kill()
    one.start()
    assert (vm.status(), read(vm.env("RUN"))) == ("stopped", "w\n")
    with full_disk(one):
        with refused("ENOSPC"):
            write(vm / "status", "running\n")
        assert vm.status() == "stopped" and one.qemus() == []
    write(vm / "status", "running\n")
    assert vm.value("RUN") == b"w"


def test_a_full_disk_is_enospc_and_the_old_state_stays(small):
    vm = small.guest("v")
    os.mkdir(vm.path)
    wait_for(lambda: vm.status() == "failed", "it has given up", 20)
    write(vm.env("A"), "old\n")
    write(small.vm(".defaults/env/D"), "old\n")
    write(small.vm(".defaults/forward"), "OLD\n")
    os.mkdir(small.vm(".new/p"))
    write(small.vm(".new/p/env/K"), "v\n")
    with full_disk(small):
        for path in (vm.env("A"), small.vm(".defaults/env/D"), vm.env("NEW"), vm / "config/port"):
            with refused("ENOSPC"):
                write(path, "77\n")
        with refused("ENOSPC"):
            os.mkdir(small.vm("another"))
        assert read(vm.env("A")) == "old\n"
        assert read(vm / "config/port") == "22\n"
        assert not os.path.exists(vm.env("NEW"))
        assert "no room" in vm.error()
        # `forward` has no other value than that which was written, and says why.
        with refused("ENOSPC"):
            write(small.vm(".defaults/forward"), "NEW\n")
        assert read(small.vm(".defaults/forward")) == "OLD\n"
        assert "forward" in read(small.vm(".defaults/error")) and "room" in read(small.vm(".defaults/error"))
        # A rename takes no room.
        os.rename(small.vm(".new/p"), small.vm(".new/z"))
        assert os.listdir(small.vm(".new")) == ["z"]
        small.kill()
        with contextlib.suppress(OSError):
            os.unlink(f"{small.state}/log")
    small.start()
    assert read(small.vm(".new/z/env/K")) == "v\n"
    assert read(small.vm(".defaults/forward")) == "OLD\n"
    os.rmdir(small.vm(".new/z"))
    wait_for(lambda: vm.status() != "booting", "it has settled")
    write(vm.env("A"), "new\n")
    small.kill()
    small.start()
    assert read(vm.env("A")) == "new\n"
    assert read(small.vm(".defaults/env/D")) == "old\n"
