"""Updates that fail: whatever tool is at work, if it can see an error it says so; the old value is there on both sides, and
`error` says why.

Facts: shells drop errors of close(), so a failure has to come out of the first write(); other tools look at close(), fsync() and
rename() as well.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess

import pytest

import conftest
from harness import SHELLS, Client, read, read_bytes, refused, sh, wait_for, write
from tools_env import ENV_FILE, clean_env, environment, guest_file, guest_keys, keys, sourced

OLD = b"old value\n"

PYTHON = "/usr/bin/python3 -c "
TOOLS = {
    "bash echo": ("bash", 'echo "new value" > "$F"'),
    "dash echo": ("dash", 'echo "new value" > "$F"'),
    "zsh echo": ("zsh", 'echo "new value" > "$F"'),
    "ksh echo": ("ksh", 'echo "new value" > "$F"'),
    "busybox echo": ("busybox", 'echo "new value" > "$F"'),
    "printf": ("dash", 'printf "new value" > "$F"'),
    ">>": ("dash", 'echo "and more" >> "$F"'),
    "block": ("bash", '{ echo new; echo value; } > "$F"'),
    "dash block": ("dash", '{ echo new; echo value; } > "$F"'),
    "block >>": ("bash", '{ echo new; echo value; } >> "$F"'),
    "cat >": ("dash", 'cat "$T/new" > "$F"'),
    "tee": ("dash", 'tee "$F" < "$T/new" > /dev/null'),
    "sponge": ("dash", 'sponge "$F" < "$T/new"'),
    "cp": ("dash", 'cp "$T/new" "$F"'),
    "cp -p": ("dash", 'cp -p "$T/new" "$F"'),
    "cp a large one": ("dash", 'head -c 100000 /dev/zero | tr "\\0" x > "$T/large"; cp "$T/large" "$F"'),
    "mv in": ("dash", 'cp "$T/new" "$T/moved"; mv "$T/moved" "$F"'),
    "mv across": ("dash", 'mv "$E/FROM" "$F"'),
    "install": ("dash", 'install -m 600 "$T/new" "$F"'),
    "dd": ("dash", 'dd if="$T/new" of="$F" status=none'),
    "dd bs=1": ("dash", 'dd if="$T/new" of="$F" bs=1 status=none'),
    "dd conv=fsync": ("dash", 'dd if="$T/new" of="$F" conv=fsync status=none'),
    "truncate -s 3": ("dash", 'truncate -s 3 "$F"'),
    "rm": ("dash", 'rm "$F"'),
    "sed -i": ("dash", 'sed -i s/old/new/ "$F"'),
    "sed -i.bak": ("dash", 'sed -i.bak s/old/new/ "$F"'),
    "busybox sed -i": ("dash", 'busybox sed -i s/old/new/ "$F"'),
    "perl -pi": ("dash", 'perl -pi -e s/old/new/ "$F"'),
    "perl": ("dash", 'perl -e \'open(F, ">", $ENV{F}) or die; print F "new value\\n"; close(F) or die "close: $!"\''),
    "ed": ("dash", "printf ',s/old/new/\\nw\\nq\\n' | ed -s \"$F\""),
    "vim": ("dash", "vim -es -u NONE -i NONE -c '%s/old/new/' -c wq \"$F\""),
    "patch": ("dash", 'printf -- "--- a\\n+++ b\\n@@ -1 +1 @@\\n-old value\\n+new value\\n" | patch -s "$F"'),
    "rsync": ("dash", 'rsync "$T/new" "$F"'),
    "rsync --inplace": ("dash", 'rsync --inplace "$T/new" "$F"'),
    "tar x": ("dash", 'tar -C "$T" -cf "$T/t.tar" KEY; tar -C "$E" --overwrite -xf "$T/t.tar"'),
    "curl": ("dash", 'curl -sS -o "$F" "file://$T/new"'),
    "git config": ("dash", 'git config -f "$F" a.b new'),
    "Python write": ("dash", PYTHON + '\'import os; f = open(os.environ["F"], "w"); f.write("new value\\n"); f.close()\''),
    "Python pathlib": ("dash", PYTHON + '\'import os, pathlib; pathlib.Path(os.environ["F"]).write_text("new\\n")\''),
    "Python os.replace": ("dash", PYTHON + '\'import os, tempfile; f = tempfile.NamedTemporaryFile("w", dir=os.environ["E"], '
                          'delete=False); f.write("new\\n"); f.close(); os.replace(f.name, os.environ["F"])\''),
    "Node": ("dash", 'node -e \'require("fs").writeFileSync(process.env.F, "new\\n")\''),
    "Ansible copy": ("dash", 'ansible localhost -c local -m copy -a "src=$T/new dest=$F"'),
    "environ": ("dash", 'echo "KEY=new value" > "$V/environ"'),
    "environ block": ("bash", '{ echo "KEY=new value"; echo FROM=new; } > "$V/environ"'),
    "environ >>": ("dash", 'echo "KEY=new value" >> "$V/environ"'),
    "cp environ": ("dash", 'printf "KEY=new\\nFROM=new\\n" > "$T/e"; cp "$T/e" "$V/environ"'),
    "sed -i environ": ("dash", 'sed -i "s/old value/new value/" "$V/environ"'),
}
# Each takes as long as the daemon's deadline when nobody answers, so that fault is for those that go different ways.
SLOW = ["bash echo", "printf", "tee", "cp", "mv across", "sed -i", "perl -pi", "dd conv=fsync", "Python write", "environ"]


class Fault:
    """A guest whose updates fail. Inside of the `with` block they do."""

    def __init__(self, vm):
        self.vm = vm

    def __enter__(self):
        self.begin()
        return self

    def __exit__(self, *exc):
        self.end()


class SmallDisk(Fault):
    """The folder of the env file on a file system of its own."""

    why = "No space"

    def begin(self):
        d = os.path.dirname(ENV_FILE)
        self.vm.ssh(f"rm -rf /tmp/save; cp -a {d} /tmp/save; mount -t tmpfs -o size=32k none {d} && cp -a /tmp/save/. {d}")
        self.fail()

    def fail(self):
        self.vm.ssh(f"cat /dev/zero >{os.path.dirname(ENV_FILE)}/fill 2>/dev/null || :")

    def end(self):
        # What was there at the fault is what has to be there still.
        d = os.path.dirname(ENV_FILE)
        self.vm.ssh(f"mount -o remount,rw {d}; rm -f {d}/fill; rm -rf /tmp/save; cp -a {d} /tmp/save; umount -l {d}; cp -a /tmp/save/. {d}/")


class ReadOnly(SmallDisk):
    why = "Read-only"

    def fail(self):
        self.vm.ssh(f"mount -o remount,ro {os.path.dirname(ENV_FILE)}")


class NoRename(SmallDisk):
    """The new file can be written, and then not be put in place of the old one."""

    why = ""

    def begin(self):
        self.vm.ssh(f"mount -o bind {ENV_FILE} {ENV_FILE}")

    def end(self):
        self.vm.ssh(f"umount -l {ENV_FILE}")


class Cut(Fault):
    """The connections are cut, and no new one is taken, until the host lets the guest know on a port of its own."""

    why = ""

    def begin(self):
        self.bell = socket.socket()
        self.bell.bind(("127.0.0.1", 0))  # bound, and not listening: the guest's calls are refused
        port = self.bell.getsockname()[1]
        script = (
            "mv /bin/dropbear /bin/dropbear.off; killall -9 dropbear; "
            f"until nc -w 2 10.0.2.2 {port} </dev/null >/dev/null 2>&1; do usleep 100000; done; "
            "mv /bin/dropbear.off /bin/dropbear"
        )
        self.vm.ssh(f"setsid sh -c {shlex.quote(script)} >/dev/null 2>&1 </dev/null &", check=False)
        self.vm.close()
        wait_for(lambda: self.vm.status() == "unreachable", "it is unreachable", 30)

    def end(self):
        self.bell.listen(5)
        self.bell.settimeout(30)
        self.bell.accept()[0].close()
        self.bell.close()
        self.vm.wait("running", 60)


class Frozen(Fault):
    """QEMU is stopped: nothing answers."""

    why = ""

    def begin(self):
        self.vm.close()
        self.pid = self.vm.qemu()
        os.kill(self.pid, signal.SIGSTOP)

    def end(self):
        os.kill(self.pid, signal.SIGCONT)
        self.vm.wait("running", 60)


FAULTS = {"disk full": SmallDisk, "read-only": ReadOnly, "no rename": NoRename, "cut": Cut}


@pytest.fixture(scope="module")
def box():
    vm = conftest.SHARED.guest("faults")
    yield vm
    if vm.daemon.running() and os.path.isdir(vm.path):
        vm.close()
        os.rmdir(vm.path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "new").write_text("new value\n")
    (tmp_path / "KEY").write_text("new value\n")
    os.utime(tmp_path / "new", (1_600_000_000, 1_600_000_000))  # rsync looks at size and time
    (tmp_path / "tmp").mkdir()
    (tmp_path / "ansible.cfg").write_text("")
    return tmp_path


def run(vm, folder, script, shell, seconds=60):
    return subprocess.run(
        SHELLS[shell] + [script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        env=environment(
            E=vm / "env", F=vm.env("KEY"), V=vm.path, T=str(folder), HOME=str(folder), TMPDIR=str(folder / "tmp"), TERM="dumb",
            ANSIBLE_CONFIG=str(folder / "ansible.cfg"), ANSIBLE_LOCALHOST_WARNING="0", ANSIBLE_HOME=str(folder / "ansible"),
            ANSIBLE_REMOTE_TEMP=str(folder / "ansible"), ANSIBLE_LOCAL_TEMP=str(folder / "ansible"),
            ANSIBLE_PYTHON_INTERPRETER="/usr/bin/python3", GIT_CONFIG_NOSYSTEM="1",
        ),
    )


def prepare(vm):
    if vm.status() != "running":
        vm.wait("running", 60)
    clean_env(vm)
    write(vm / "environ", "BYSTANDER='is left\nalone'\nFROM='new value'\nKEY='old value'\n")
    write(vm.env("KEY"), OLD)
    write(vm.env("FROM"), "new value\n")


def variables(vm):
    """Names and contents of all but scratch."""
    return {name: read_bytes(vm.env(name)) for name in ("BYSTANDER", "FROM", "KEY") if os.path.exists(vm.env(name))}


ALL = {"BYSTANDER": b"is left\nalone\n", "FROM": b"new value\n", "KEY": OLD}


@pytest.mark.deadline(590)
@pytest.mark.parametrize("fault", [pytest.param(name, marks=[pytest.mark.qemu] if name == "cut" else []) for name in FAULTS])
def test_no_tool_reports_success_when_the_update_fails(box, folder, fault):
    """All tools one after the other on one fault, and every one is judged."""
    prepare(box)
    in_guest = guest_file(box)
    wrong = []
    with FAULTS[fault](box) as trouble:
        for name, (shell, script) in TOOLS.items():
            done = run(box, folder, script, shell)
            problems = []
            # A file that cannot be opened is no failure to perl -p, on any disk: it warns, and ends with 0.
            if done.returncode == 0 and not (name == "perl -pi" and b"Can't open" in done.stderr):
                problems.append("reports success")
            if not done.stderr and not done.stdout and name not in ("vim", "ed"):
                problems.append("says nothing")
            error = box.error()
            if not error.strip():
                problems.append("`error` is empty")
            elif trouble.why and trouble.why not in error:
                problems.append(f"`error` does not say why: {error}")
            # Unreachable: what is there cannot be asked for, and reading says so.
            if fault != "cut":
                now = variables(box)
                if now != ALL:
                    problems.append(f"env/ is {now}")
                if guest_file(box) != in_guest:
                    problems.append(f"the guest has {guest_file(box)}")
            if problems:
                wrong.append(f"{name}: {', '.join(problems)}; {done.stderr[-200:]}")
    assert not wrong, "\n".join(wrong)
    wait_for(lambda: variables(box) == ALL, f"the old values: {variables(box)}", 5)
    assert guest_file(box) == in_guest
    assert box.value("KEY") == b"old value"
    assert box.value("BYSTANDER") == b"is left\nalone"
    # And it works again.
    write(box.env("KEY"), "newer\n")
    assert box.value("KEY") == b"newer"
    assert b".tmp" not in box.ssh(f"ls -a {os.path.dirname(ENV_FILE)}"), "a temporary file is left in the guest"


@pytest.mark.deadline(400)
def test_no_tool_reports_success_when_the_guest_does_not_answer(daemon, folder):
    vm = daemon(timeout=2).boot("frozen")
    prepare(vm)
    wrong = []
    for name in SLOW:
        shell, script = TOOLS[name]
        vm.wait("running", 60)
        prepare(vm)
        with Frozen(vm):
            done = run(vm, folder, script, shell)
            if done.returncode == 0:
                wrong.append(f"{name}: reports success")
            if not vm.error().strip():
                wrong.append(f"{name}: `error` is empty")
        # The guest may do what it was told when it goes on: then it is so on both sides. No third thing.
        wait_for(lambda: agreed(vm), f"{name}: both sides agree", 15)
        there = {k: v.rstrip(b"\n") for k, v in variables(vm).items()}
        if there.get("KEY") not in (b"old value", b"new value") or there.get("BYSTANDER") not in (b"is left\nalone", None):
            wrong.append(f"{name}: {there}")
        if "BYSTANDER" not in there and name != "environ":
            wrong.append(f"{name}: another variable is lost")
    assert not wrong, "\n".join(wrong)


def agreed(vm):
    """Each of the variables is the same on both sides."""
    here = variables(vm)
    return all(
        sourced(vm, key) == (here[key].removesuffix(b"\n") if key in here else b"<unset>") for key in ("BYSTANDER", "FROM", "KEY")
    ) and variables(vm) == here


# --- where the error comes out ---

# Two writes; between them the test breaks the guest. It prints which call failed.
PIECES = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC)
step = "write"
try:
    os.write(fd, b"one ")
    print("first", flush=True)
    sys.stdin.readline()
    step = "second"
    os.write(fd, b"two")
    step = sys.argv[2]
    os.fsync(fd) if step == "fsync" else os.close(fd)
except OSError as error:
    print(step, error.errno, flush=True)
    sys.exit(1)
print("success", flush=True)
"""


@pytest.mark.parametrize("call", ["close", "fsync"])
@pytest.mark.parametrize("fault", ["disk full", "read-only"])
def test_an_error_after_the_first_write_comes_out_of_close_and_fsync(box, fault, call):
    prepare(box)
    with Client(["/usr/bin/python3", "-c", PIECES, box.env("KEY"), call], stdin=subprocess.PIPE) as client:
        assert client.process.stdout.readline() == b"first\n"
        assert box.value("KEY") == b"one "
        with FAULTS[fault](box) as trouble:
            client.process.stdin.write(b"go on\n")
            client.process.stdin.flush()
            status, out, _ = client.result(30)
            assert status == 1, out
            assert out.startswith(call.encode()), out
            assert trouble.why in box.error()
            assert read_bytes(box.env("KEY")) == b"one "
            assert b"export KEY='one '" in guest_file(box)
    assert box.value("KEY") == b"one "
    assert box.value("BYSTANDER") == b"is left\nalone"


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND], ids=["trunc", "append"])
@pytest.mark.parametrize("path", ["env/KEY", "environ"])
def test_every_close_says_so_until_it_is_committed(box, path, flags):
    """The first may be that of a child, which does not know what it closes."""
    prepare(box)
    one, two = (b"one ", b"two") if path == "env/KEY" else (b"KEY=one\n", b"MORE=two\n")
    fd = os.open(box / path, os.O_WRONLY | flags)
    try:
        os.write(fd, one)
        in_guest = guest_file(box)
        with SmallDisk(box):
            os.write(fd, two)
            for call in (os.close, os.close, os.fsync):
                with refused("ENOSPC"):
                    call(fd if call is os.fsync else os.dup(fd))
            assert guest_file(box) == in_guest
        os.close(os.dup(fd))
        before = OLD if flags == os.O_APPEND else b""
        if path == "env/KEY":
            assert read_bytes(box.env("KEY")) == before + one + two
            assert box.value("KEY") == before + one + two
        else:
            assert [box.value(k) for k in ("KEY", "MORE")] == [b"one", b"two"]
            assert ("BYSTANDER" in keys(box)) == (flags == os.O_APPEND)
    finally:
        os.close(fd)


@pytest.mark.parametrize("path, flags", [("env/KEY", os.O_TRUNC), ("env/KEY", os.O_APPEND), ("env/KEY", 0),
                                         ("environ", os.O_TRUNC), ("environ", os.O_APPEND)])
def test_what_follows_a_failed_write_is_as_on_a_disk(box, path, flags):
    """What was not written is not there, neither before nor behind what is."""
    prepare(box)
    new, value = (b"new\n", b"val\n") if path == "env/KEY" else (b"NEW='a longer line'\n", b"V='1'\n")
    if not flags:  # as long as what is there
        new, value = b"newer one\n", b"valueless\n"
    fd = os.open(box / path, os.O_WRONLY | flags)
    try:
        with SmallDisk(box):
            with refused("ENOSPC"):
                os.write(fd, new)
            os.close(os.dup(fd))  # nothing that was acknowledged is missing
        assert variables(box) == ALL
        os.write(fd, value)
    finally:
        os.close(fd)
    if path == "env/KEY":
        assert read_bytes(box.env("KEY")) == (OLD if flags == os.O_APPEND else b"") + value
        assert box.value("KEY") + b"\n" == read_bytes(box.env("KEY"))
        assert keys(box) == ["BYSTANDER", "FROM", "KEY"]
    else:
        assert keys(box) == guest_keys(box) == ([] if flags == os.O_TRUNC else ["BYSTANDER", "FROM", "KEY"]) + ["V"]


@pytest.mark.parametrize("fault", ["disk full", "read-only"])
def test_a_failed_rename_leaves_both_names_as_they_were(box, fault):
    prepare(box)
    fd = os.open(box.env("tmpnew001"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"new value\n")
    os.close(fd)
    in_guest = guest_file(box)
    with FAULTS[fault](box):
        for source, target in (("tmpnew001", "KEY"), ("tmpnew001", "NEW"), ("FROM", "KEY"), ("KEY", "KEY.bak"), ("KEY", "NEW")):
            with refused("EIO", "ENOSPC", "EROFS"):
                os.rename(box.env(source), box.env(target))
            assert keys(box) == ["BYSTANDER", "FROM", "KEY", "tmpnew001"], (source, target)
            assert variables(box) == ALL
            assert read_bytes(box.env("tmpnew001")) == b"new value\n"
            assert guest_file(box) == in_guest
        with refused("EIO", "ENOSPC", "EROFS"):
            os.unlink(box.env("KEY"))
        with refused("EIO", "ENOSPC", "EROFS"):
            os.truncate(box / "environ", 0)
        assert variables(box) == ALL
    os.rename(box.env("tmpnew001"), box.env("KEY"))
    assert box.value("KEY") == b"new value"


def test_a_new_key_whose_write_fails_does_not_stay(box):
    prepare(box)
    with SmallDisk(box):
        done = sh(f"echo x > '{box.env('NEW')}'", check=False)
        assert done.returncode != 0
        wait_for(lambda: "NEW" not in keys(box), "the name is gone", 5)
        assert not os.path.exists(box.env("NEW"))
        # Nor when only its close could tell, which a shell does not hear: then `error` does.
        sh(f": > '{box.env('NEW')}'", check=False)
        wait_for(lambda: "NEW" not in keys(box), "the name is gone", 5)
        assert "No space" in box.error()
    assert guest_keys(box) == ["BYSTANDER", "FROM", "KEY"]


@pytest.mark.qemu
@pytest.mark.deadline(200)
def test_a_writer_whose_connection_is_cut_is_told(box):
    """Cut in the middle of a burst: whatever was acknowledged is there."""
    prepare(box)
    script = (
        f"i=0; while i=$((i+1)); do echo $i > '{box.env('KEY')}' && echo $i || exit 1; done"
    )
    with Client(script) as client:
        lines = [client.process.stdout.readline() for _ in range(20)]
        assert lines[-1] == b"20\n"
        with Cut(box):
            status, out, err = client.result(30)
            assert status == 1 and err != ""
            last = int((lines[-1] + out).split()[-1])
            with refused("EHOSTUNREACH"):
                write(box.env("KEY"), "x")
            assert box.error() != ""
    box.wait("running", 60)
    assert box.value("KEY") in (b"%d" % last, b"%d" % (last + 1))
    wait_for(lambda: agreed(box), "both sides agree", 10)
    write(box.env("KEY"), "again\n")
    assert box.value("KEY") == b"again"


# --- no running guest ---


@pytest.mark.deadline(400)
def test_what_is_written_to_a_vm_that_has_failed_or_stopped_is_in_its_next_boot(daemon, folder):
    vm = daemon().boot("a")
    prepare(vm)
    pid = vm.qemu()
    vm.close()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: vm.status() == "failed", "it has failed", 10)
    assert variables(vm) == ALL
    for number, (name, (shell, script)) in enumerate(TOOLS.items()):
        if name == "rm" or "environ" in name:
            continue
        write(vm.env("KEY"), OLD)
        write(vm.env("FROM"), "new value\n")
        done = run(vm, folder, script, shell)
        if name == "git config":
            assert done.returncode != 0  # "old value" is no file of git's
            continue
        assert done.returncode == 0, f"{name}: {done.stderr}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(vm.env("KEY"), vm.env(f"BY_{number}"))
    write(vm.env("KEY"), "written while failed\n")
    before = {key: read_bytes(vm.env(key)) for key in keys(vm) if re.fullmatch("[A-Z_0-9]+", key)}
    assert len(before) > 30
    write(vm / "status", "running\n")
    assert vm.value("KEY") == b"written while failed"
    assert guest_keys(vm) == sorted(before)
    for key, value in before.items():
        assert read_bytes(vm.env(key)) == value
    assert sourced(vm, "BY_0") == b"new value"
    vm.close()
    write(vm / "status", "stopped\n")
    assert run(vm, folder, 'sed -i s/while/as/ "$F"; rm "$E"/BY_*', "dash").returncode == 0
    write(vm / "status", "running\n")
    assert vm.value("KEY") == b"written as failed"
    assert guest_keys(vm) == ["BYSTANDER", "FROM", "KEY"]


@pytest.mark.deadline(200)
def test_a_full_disk_of_the_host_fails_the_write_of_a_stopped_vm(daemon, tmp_path):
    """Success would mean that it is on the host's disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], check=True, timeout=20)
    try:
        one = daemon(start=False)
        one.options = one.options.replace(f"state={one.state}", f"state={disk}/state")
        one.state = f"{disk}/state"
        one.start()
        os.mkdir(one.vm("a"))
        vm = one.guest("a")
        write(vm.env("KEY"), OLD)
        vm.wait("running")
        write(vm / "status", "stopped\n")
        with open(disk / "fill", "wb", 0) as f, contextlib.suppress(OSError):
            while True:
                f.write(bytes(4096))
        with refused("ENOSPC", "EIO"):
            write(vm.env("KEY"), "x" * 20000)
        assert read_bytes(vm.env("KEY")) == OLD
        assert vm.error() != ""
        os.unlink(disk / "fill")
        write(vm.env("KEY"), "new\n")
        one.kill()
        one.start()
        assert read(vm.env("KEY")) == "new\n"
        os.rmdir(vm.path)
        one.stop()
    finally:
        subprocess.run(["umount", "-l", disk], check=True, timeout=20)
