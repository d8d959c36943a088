"""Who may see what on the host."""

import os
import re
import stat
import subprocess
import threading

import pytest

from harness import (
    IMAGES,
    VMSFS,
    Client,
    environment,
    mount_line,
    processes_with,
    read,
    read_bytes,
    refused,
    runtime_dir,
    wait_for,
    write,
)

NOBODY = 65534


def as_nobody(script, **variables):
    """A script under another uid, without any capability."""
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "sh", "-c", script]
    return subprocess.run(
        argv, capture_output=True, timeout=30, cwd="/", env={"PATH": os.environ["PATH"], **variables}, text=True
    )


@pytest.fixture
def open_path():
    """Directories above the mount points that another user may pass, as those of a home or of /srv."""
    changed = []

    def make(path):
        while path != "/":
            mode = stat.S_IMODE(os.stat(path).st_mode)
            if not mode & 0o001:
                changed.append((path, mode))
                os.chmod(path, mode | 0o011)
            path = os.path.dirname(path)

    yield make
    for path, mode in changed:
        os.chmod(path, mode)


def test_state_and_runtime_directories_are_private(vm):
    state = vm.daemon.state
    for folder in (state, os.path.join(state, "vms"), os.path.join(state, "vms", vm.name), runtime_dir(state)):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700, folder
        assert os.stat(folder).st_uid == os.getuid()


def test_no_file_of_the_state_is_readable_by_others(vm):
    keys = []
    for folder, _, names in os.walk(vm.daemon.state):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                continue
            assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0 or name.endswith(".pub"), path
            if b"PRIVATE KEY" in read_bytes(path)[:100]:
                keys.append(path)
                assert stat.S_IMODE(os.stat(path).st_mode) == 0o600, path
    assert {os.path.basename(key) for key in keys} == {"id_ed25519", "ssh_host_ed25519_key"}


def test_sockets_are_private(vm):
    for name in os.listdir(runtime_dir(vm.daemon.state)):
        mode = os.stat(os.path.join(runtime_dir(vm.daemon.state), name)).st_mode
        assert stat.S_IMODE(mode) & 0o077 == 0, name


def test_every_vm_has_host_keys_of_its_own(vm, new_vm):
    other = new_vm("other-key")
    keys = [vm.ssh("cat /etc/ssh/ssh_host_ed25519_key"), other.ssh("cat /etc/ssh/ssh_host_ed25519_key")]
    assert keys[0] != keys[1]
    for guest, key in zip((vm, other), keys):
        path = os.path.join(guest.daemon.state, "vms", guest.name, "ssh_host_ed25519_key")
        assert key == read_bytes(path)


def test_values_and_commands_are_in_no_process_list_and_no_log(vm):
    secret = "s3cr3t-" + os.urandom(8).hex()
    seen = []
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            for pid in processes_with(secret):
                seen.append(read(f"/proc/{pid}/cmdline"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(20):
            write(vm.env("SECRET"), f"{secret} {number}\n")
            write(vm / "exec", f": {secret} {number}")
        with refused("EREMOTEIO"):
            write(vm / "exec", f"echo {secret} >&2; false")
        with refused("EINVAL"):
            write(vm.env("SECRET"), f"{secret}\0".encode())
        # In the guest neither: other users there have ps, too.
        with Client(f'echo "sleep 3" > "{vm / "exec"}"'):
            wait_for(lambda: vm.runs("sleep 3"), "a command runs")
            assert not [line for line in vm.processes() if secret in line]
    finally:
        stop.set()
        watcher.join()
    assert seen == []
    assert secret not in read(vm.daemon.log)
    assert secret not in read(vm / "info")
    os.unlink(vm.env("SECRET"))
    for pid in vm.daemon.qemus() + [vm.daemon.pid]:
        assert secret not in read(f"/proc/{pid}/environ")


def test_another_user_cannot_enter_the_mount(vm, open_path):
    open_path(vm.daemon.path)
    assert as_nobody('test -x "$D"', D=vm.daemon.path).returncode == 0
    for script in ('ls "$D"', 'cat "$D/shared/status"', 'mkdir "$D/theirs"', 'echo x > "$D/shared/env/X"'):
        done = as_nobody(script, D=vm.daemon.mount)
        assert done.returncode != 0 and "ermission denied" in done.stderr, script
    assert "theirs" not in os.listdir(vm.daemon.mount)


@pytest.mark.deadline(200)
def test_with_allow_other_the_modes_of_the_files_count(daemon, open_path):
    one = daemon("allow_other")
    vm = one.boot("modes")
    write(vm.env("PRIVATE"), "private\n")
    open_path(one.path)
    for script in ('ls "$D"', 'cat "$D/status"', 'cat "$D/info"'):
        assert as_nobody(script, D=vm.path).returncode == 0, script
    for script in (
        'ls "$D/env"',
        'cat "$D/env/PRIVATE"',
        'echo x > "$D/env/PRIVATE"',
        'echo x > "$D/env/NEW"',
        'rm -f "$D/env/PRIVATE"',
        'cat "$D/exec"',
        'echo id > "$D/exec"',
        'cat "$D/console"',
        'cat "$D/error"',
        'cat "$D/ssh_config"',
        'echo stopped > "$D/status"',
        'rmdir "$D"',
        'mkdir "$D-2"',
        'chmod 777 "$D/exec"',
    ):
        done = as_nobody(script, D=vm.path)
        assert done.returncode != 0, script
        assert "ermission denied" in done.stderr or "not permitted" in done.stderr, done.stderr
    assert vm.status() == "running"
    assert vm.value("PRIVATE") == b"private"
    assert one.vms() == ["modes"]


def test_a_state_directory_of_somebody_else_is_refused(daemon):
    one = daemon(start=False)
    os.makedirs(one.state)
    os.chown(one.state, NOBODY, NOBODY)
    done = subprocess.run(one.argv() + ["-f"], capture_output=True, timeout=30, text=True)
    assert done.returncode > 0 and one.state in done.stderr
    os.chown(one.state, 0, 0)


def test_a_state_directory_that_others_may_write_to_is_refused(daemon):
    one = daemon(start=False)
    os.makedirs(one.state)
    os.chmod(one.state, 0o777)
    done = subprocess.run(one.argv() + ["-f"], capture_output=True, timeout=30, text=True)
    assert done.returncode > 0 and one.state in done.stderr and "chmod 700" in done.stderr
    assert not mount_line(one.mount)


def test_what_is_in_a_state_directory_that_others_may_read_is_private_by_itself(daemon, open_path):
    one = daemon(start=False)
    os.makedirs(one.state)
    os.chmod(one.state, 0o755)
    one.start()
    guest = one.guest("within")
    os.mkdir(guest.path)
    write(guest.env("PRIVATE"), "private")
    open_path(one.state)
    assert as_nobody('ls "$D"', D=one.state).returncode == 0
    for name in ("id_ed25519", "lock", "vms/within/vm.json"):
        assert os.path.exists(os.path.join(one.state, name))
        done = as_nobody('cat "$F"', F=os.path.join(one.state, name))
        assert done.returncode != 0 and "ermission denied" in done.stderr, name
    for name in ("vms", "trash"):
        assert "ermission denied" in as_nobody('ls "$D"', D=os.path.join(one.state, name)).stderr


@pytest.mark.qemu
def test_qemu_is_confined(vm):
    status = read(f"/proc/{vm.qemu()}/status")
    assert re.search(r"^Seccomp:\t2$", status, re.M)
    command = read_bytes(f"/proc/{vm.qemu()}/cmdline").replace(b"\0", b" ").decode()
    assert "-sandbox on" in command and "spawn=deny" in command
    assert b"SECRET" not in read_bytes(f"/proc/{vm.qemu()}/environ")


def test_a_vmm_inherits_no_descriptor_of_the_daemon(vm):
    targets = []
    folder = f"/proc/{vm.qemu()}/fd"
    for fd in os.listdir(folder):
        targets.append(os.readlink(os.path.join(folder, fd)))
    assert not [target for target in targets if target == "/dev/fuse" or target.endswith("/lock")], targets


def test_the_daemon_does_not_pass_its_environment_to_a_vmm(daemon):
    one = daemon(env={"HOST_SECRET": "leaked-by-the-host"})
    guest = one.guest("clean")
    os.mkdir(guest.path)
    wait_for(lambda: guest.info().get("pid"), "its VMM runs", 30)
    assert "HOST_SECRET" not in read(f"/proc/{guest.qemu()}/environ")


@pytest.mark.deadline(200)
def test_an_ordinary_user_runs_vms_of_their_own(daemon):
    """The whole of it under another uid, with a /dev/fuse that all may open as on a usual host."""
    one = daemon(start=False)
    home = os.path.join(one.path, "home")
    os.makedirs(os.path.join(home, "vms"))
    for folder, _, _ in os.walk(home):
        os.chown(folder, NOBODY, NOBODY)
    path = one.path
    changed = []
    while path != "/":
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if not mode & 0o001:
            changed.append((path, mode))
            os.chmod(path, mode | 0o011)
        path = os.path.dirname(path)
    user = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --inh-caps=-all"
    script = f"""
        set -e
        mkdir -p "$H/dev"
        mount -t tmpfs none "$H/dev"
        mknod -m 666 "$H/dev/fuse" c 10 229
        mount --bind "$H/dev/fuse" /dev/fuse
        exec {user} sh -c '
            set -e
            "$V" "$H/vms" -f -o "state=$H/state,images=$I,boot_timeout=90" & daemon=$!
            trap "rmdir $H/vms/* 2>/dev/null || :; kill $daemon; wait $daemon" EXIT
            i=0
            until mkdir "$H/vms/mine" 2>/dev/null && [ -e "$H/vms/mine/status" ]; do
                rmdir "$H/vms/mine" 2>/dev/null || :
                i=$((i+1)); [ $i -lt 200 ]; sleep 0.05
            done
            echo value > "$H/vms/mine/env/MINE"
            echo running > "$H/vms/mine/status"
            echo "id -u; printf %s \\"\\$MINE\\"" > "$H/vms/mine/exec"
            cat "$H/vms/mine/exec"
            rmdir "$H/vms/mine"
        '
    """
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script],
            capture_output=True,
            timeout=150,
            env={**environment(), "HOME": home, "H": home, "V": VMSFS, "I": IMAGES},
            text=True,
        )
    finally:
        for path, mode in changed:
            os.chmod(path, mode)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "0\nvalue", done.stderr[-3000:]
    assert not processes_with(home + "/state")

