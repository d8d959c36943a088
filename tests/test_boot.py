"""mkdir boots a VM; what its files say from the first moment on."""

import os
import re
import subprocess
import time

import pytest

from harness import (
    BACKEND,
    BOOT_TIMEOUT,
    PROGRAMS,
    Client,
    pid_alive,
    read,
    read_bytes,
    refused,
    sh,
    takes_at_most,
    wait_for,
    write,
)


@pytest.mark.deadline(200)
def test_two_vms_boot_side_by_side(mount, new_vm):
    a, b = mount.guest("side-a"), mount.guest("side-b")
    with takes_at_most(0.5, "mkdir of two VMs"):
        sh('mkdir "$A" "$B"', A=a.path, B=b.path)
    try:
        assert (a.status(), b.status()) == ("booting", "booting")
        # From the first moment on, and in the guest before anybody is told that it runs.
        sh('echo early > "$F"', F=a.env("EARLY"))
        assert read(a.env("EARLY")) == "early\n"

        seen = {a: ["booting"], b: ["booting"]}

        def both_run():
            for guest, states in seen.items():
                state = guest.status()
                if state != states[-1]:
                    states.append(state)
            return seen[a][-1] == seen[b][-1] == "running"

        def both_processes():
            return [guest.info().get("pid") for guest in (a, b) if guest.info().get("pid")]

        pids = wait_for(lambda: len(both_processes()) == 2 and both_processes(), "two QEMUs at once")
        assert len(set(pids)) == 2 and all(pid_alive(pid) for pid in pids)
        # Written at any time of the boot.
        for number in range(50):
            if a.status() != "booting":
                break
            sh('echo "$N" > "$F"', F=a.env("LATE"), N=str(number))
            last = number
        wait_for(both_run, "both run", BOOT_TIMEOUT)
        assert seen[a] == ["booting", "running"] and seen[b] == ["booting", "running"]
        assert a.value("EARLY") == b"early"
        assert a.value("LATE") == str(last).encode()
        assert not b.is_set("EARLY")
        assert a.ssh("hostname").strip() == b"side-a"
        assert b.ssh("hostname").strip() == b"side-b"
    finally:
        for guest in (a, b):
            guest.close()
            os.rmdir(guest.path)


def test_variables_written_while_booting_are_there_when_running_is_shown(mount):
    guest = mount.guest("early")
    os.mkdir(guest.path)
    try:
        sh('cd "$D"; echo one > ONE; printf %s "two words" > TWO; echo x > GONE; rm GONE', D=guest / "env")
        sh('echo three >> "$F"', F=guest.env("ONE"))
        assert guest.status() == "booting"
        guest.wait("running")
        assert guest.value("ONE") == b"one\nthree"
        assert guest.value("TWO") == b"two words"
        assert not guest.is_set("GONE")
    finally:
        guest.close()
        os.rmdir(guest.path)


def test_writing_running_to_the_status_of_a_booting_vm_waits_for_it(mount):
    guest = mount.guest("waits")
    os.mkdir(guest.path)
    try:
        with Client('echo running > "$F"', env={"F": guest / "status"}) as client:
            status, _, errors = client.result(BOOT_TIMEOUT)
        assert status == 0, errors
        assert guest.status() == "running"
    finally:
        os.rmdir(guest.path)


@pytest.mark.parametrize(
    "name", ["-a", "_a", "a_b", "a.b", ".a", "a b", "ä", "a" * 64, "a\nb"], ids=lambda name: repr(name)[:12]
)
def test_mkdir_refuses_what_is_no_id(mount, name):
    with refused("EINVAL"):
        os.mkdir(os.path.join(mount.mount, name))
    assert name not in os.listdir(mount.mount)


def test_mkdir_of_a_vm_that_exists_says_so(mount, vm):
    with refused("EEXIST"):
        os.mkdir(vm.path)
    assert vm.status() == "running"


def test_there_are_only_vms_in_the_root(mount, vm):
    with refused("EACCES", "EPERM", "EINVAL", "EOPNOTSUPP", "ENOSYS"):
        write(os.path.join(mount.mount, "file"), "x")
    with refused("ENOENT"):
        os.stat(os.path.join(mount.mount, "nobody"))
    with refused("ENOENT"):
        os.rmdir(os.path.join(mount.mount, "nobody"))
    assert vm.name in os.listdir(mount.mount)


def test_a_vm_has_its_files_with_their_modes(vm):
    modes = {
        "console": "-r--------",
        "env": "drwx------",
        "environ": "-rw-------",
        "error": "-r--------",
        "exec": "-rw-------",
        "info": "-r--r--r--",
        "ssh_config": "-r--------",
        "status": "-rw-r--r--",
    }
    listing = sh('ls -l "$D"', D=vm.path).stdout.decode().splitlines()
    seen = {line.split()[-1]: line.split()[0] for line in listing if not line.startswith("total")}
    for name, mode in modes.items():
        assert seen.get(name) == mode, name
    with refused("ENOENT"):
        os.stat(vm / "nothing")


def test_info_is_json_about_the_vm_and_its_daemon(mount, vm):
    info = vm.info()
    assert info["id"] == vm.name
    assert info["state"] == "running"
    assert info["backend"] == BACKEND
    assert info["image"] == "tiny"
    if BACKEND == "qemu":
        assert info["address"] == "127.0.0.1"
        assert 1024 <= info["port"] <= 65535
    assert 100 < info["booted_ms"] < BOOT_TIMEOUT * 1000
    assert abs(info["created"] - time.time()) < 3600
    assert info["daemon"]["pid"] == mount.pid
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["daemon"]["version"])
    assert PROGRAMS.get(BACKEND, "qemu-system") in read(f"/proc/{info['pid']}/cmdline")


def test_error_is_empty_where_nothing_has_failed(new_vm):
    assert new_vm("no-error").error() == ""


@pytest.mark.qemu
def test_the_guest_listens_for_ssh_on_the_loopback_interface_only(vm):
    port = f":{vm.info()['port']:04X}"
    lines = read("/proc/net/tcp").splitlines() + read("/proc/net/tcp6").splitlines()
    local = [line.split()[1] for line in lines if line.split()[1].endswith(port) and line.split()[3] == "0A"]
    assert local == ["0100007F" + port]


def test_plain_ssh_works_with_ssh_config(vm):
    done = subprocess.run(
        ["ssh", "-F", vm / "ssh_config", vm.name, "hostname; exit 3"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"shared\n", b"")


def test_ssh_config_insists_on_the_key_that_the_daemon_made(vm):
    config = read(vm / "ssh_config")
    assert "StrictHostKeyChecking yes" in config
    known = re.search(r'UserKnownHostsFile "(.*)"', config).group(1)
    assert read(known).split()[0] == vm.name
    other = os.path.join(vm.daemon.path, "other")
    for name in (other, other + ".pub"):
        if os.path.exists(name):
            os.unlink(name)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True, timeout=30)
    with open(other + ".known", "w", encoding="ascii") as f:
        f.write(f"{vm.name} {read(other + '.pub')}")
    done = subprocess.run(
        ["ssh", "-F", vm / "ssh_config", "-o", f"UserKnownHostsFile={other}.known", vm.name, "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 255


def test_the_console_holds_the_boot_and_grows(vm):
    console = vm / "console"
    wait_for(lambda: "vmsfs: SSH server is ready" in read(console), "the guest's line on the console", 30)
    before = read(console)
    assert os.stat(console).st_size == len(read_bytes(console)) > 0
    with Client(["tail", "-n", "0", "-f", console]) as tail:
        vm.ssh("echo one more line >/dev/console")
        wait_for(lambda: "one more line" in read(console), "the console grows")
        assert read(console).startswith(before)
        # tail polls: it is there when it has shown what came after its start, or at its start.
        for number in range(20):
            vm.ssh(f"echo followed {number} >/dev/console")
        os.set_blocking(tail.process.stdout.fileno(), False)
        wait_for(lambda: b"followed" in (tail.process.stdout.read() or b""), "tail -f shows it", 20)


@pytest.mark.qemu
@pytest.mark.deadline(200)
def test_the_kernel_is_silent_unless_a_verbose_boot_is_wanted(daemon, vm):
    assert "Linux version" not in read(vm / "console")
    guest = daemon(env={"VMSFS_VERBOSE_BOOT": "1"}).boot("verbose")
    assert "Linux version" in read(guest / "console")


def test_removing_a_vm_while_it_boots_leaves_nothing(daemon):
    one = daemon()
    os.mkdir(one.vm("young"))
    os.mkdir(one.vm("older"))
    os.rmdir(one.vm("young"))
    guest = one.guest("older")
    wait_for(lambda: guest.info().get("pid"), "QEMU has started", 20)
    os.rmdir(guest.path)
    assert one.vms() == []
    wait_for(lambda: not one.remains(), "nothing is left", 10)


@pytest.mark.deadline(200)
def test_an_id_is_free_again_after_rmdir(mount, new_vm):
    guest = new_vm("again")
    write(guest.env("OLD"), "old")
    guest.close()
    os.rmdir(guest.path)
    guest = new_vm("again")
    assert os.listdir(guest / "env") == []
    assert not guest.is_set("OLD")


def test_a_boot_that_takes_too_long_fails_and_says_so(daemon):
    one = daemon(boot_timeout=1)
    guest = one.guest("slow")
    one.boot_late()
    os.mkdir(f"{one.mount}/.new/slow")
    write(f"{one.mount}/.new/slow/config/boot_args", "rdinit=/bin/sleep -- 1000\n")  # no SSH server, ever
    os.rename(f"{one.mount}/.new/slow", guest.path)
    wait_for(lambda: guest.status() == "failed", "the boot has failed", 20)
    assert "boot_timeout" in guest.error()
    with refused("ENODEV", "EBUSY"):
        write(guest / "exec", "true")
    wait_for(lambda: not one.qemus(), "no QEMU is left", 20)
    os.rmdir(guest.path)
    wait_for(lambda: not one.remains(), "nothing is left", 10)
