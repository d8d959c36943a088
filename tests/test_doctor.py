"""`vmsfs doctor`: what it finds in situations that it is there for, and that it disturbs nobody."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from harness import (
    IMAGES,
    RUN,
    VMSFS,
    environment,
    kill_and_wait,
    make_jail,
    mount_line,
    pid_alive,
    process_state,
    read,
    read_bytes,
    takes_at_most,
    wait_for,
)

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def run(*argv, env=None, before=(), seconds=60):
    return subprocess.run(
        [*before, VMSFS, "doctor", *argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        env=environment(env),
        text=True,
    )


class Report:
    def __init__(self, done):
        assert done.returncode in (0, 1), done
        assert done.stderr == ""
        self.done = done
        self.json = json.loads(done.stdout)
        self.checks = self.json["checks"]

    def of(self, check, text=""):
        """The findings of a check whose words, or remedy, hold the text."""
        return [c for c in self.checks if c["check"] == check and text in f"{c['found']} {c['remedy']}"]

    def one(self, check, text=""):
        (found,) = self.of(check, text)
        return found


def report(state, *others, images=IMAGES, before=(), env=None):
    options = ",".join([f"state={state}", f"images={images}", *others])
    return Report(run("--json", "-o", options, before=before, env=env))


def in_namespace(script):
    """What runs a command in a mount namespace of its own, after a script that has changed it."""
    return ["unshare", "-m", "sh", "-ec", script + '\nexec "$@"', "sh"]


@pytest.fixture
def state(tmp_path):
    return str(tmp_path / "state")


def test_the_report_is_json_of_a_fixed_form(state):
    found = report(state)
    assert set(found.json) == {"schema", "vmsfs", "failed", "warnings", "checks"}
    assert found.json["schema"] == 1
    version = subprocess.run([VMSFS, "-V"], capture_output=True, text=True, env=environment(), check=True).stdout
    assert version == f"vmsfs {found.json['vmsfs']}\n"
    for check in found.checks:
        assert set(check) == {"check", "status", "found", "remedy"}
        assert check["status"] in ("ok", "warning", "failed")
        assert check["found"]
        assert (check["remedy"] is None) == (check["status"] == "ok"), check
    for status, key in (("failed", "failed"), ("warning", "warnings")):
        assert sum(c["status"] == status for c in found.checks) == found.json[key]


def test_a_text_has_a_line_for_each_check_and_a_remedy_for_what_is_not_ok(state):
    options = f"state={state},images={IMAGES},image=nothing"
    done = run("-o", options)
    lines = done.stdout.splitlines()
    findings = [line for line in lines if re.match(r"(ok|warning|failed) +[a-z_0-9]+ +\S", line)]
    remedies = [line for line in lines if re.match(r" +remedy: \S", line)]
    bad = [line for line in findings if not line.startswith("ok")]
    assert len(remedies) == len(bad) > 0
    assert len(findings) + len(remedies) + 2 == len(lines)
    assert re.fullmatch(r"\d+ failed, \d+ warnings?", lines[-1])
    told = Report(run("--json", "-o", options))
    assert len(findings) == len(told.checks)


def test_the_exit_status_says_whether_something_has_failed(state):
    mounts = in_namespace("for m in $(awk '/ - fuse.vmsfs /{print $5}' /proc/self/mountinfo); do umount -l $m; done")
    whole = report(state, before=mounts)
    assert whole.json["failed"] == 0 and whole.done.returncode == 0, whole.done.stdout
    broken = report(state, "image=nothing", before=mounts)
    assert broken.json["failed"] == 1 and broken.done.returncode == 1


@pytest.mark.parametrize(
    "argv", [["--bogus"], ["-o", "bogus"], ["-o", "memory=much"], ["-o", "log_level=loud"], ["a", "b", "c"]]
)
def test_a_wrong_command_line_is_no_finding(argv):
    done = run(*argv)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("vmsfs: ")


def test_json_is_the_doctors_option_alone(tmp_path):
    done = subprocess.run([VMSFS, "--json", str(tmp_path)], capture_output=True, text=True, env=environment(), timeout=30)
    assert done.returncode == 1 and "--json" in done.stderr


def test_nothing_is_made_or_changed(state, tmp_path):
    report(state)
    assert os.listdir(tmp_path) == []
    os.makedirs(state, 0o700)
    report(state)
    assert os.listdir(state) == []


def test_a_missing_image_is_told_with_the_folders_that_were_searched(state, tmp_path):
    found = report(state, "image=nothing")
    image = found.one("image", '"nothing"')
    assert image["status"] == "failed"
    assert IMAGES in image["found"] and "contrib/guest/tiny" in image["remedy"]
    missing = report(state, images=tmp_path / "none").one("image", f"{tmp_path}/none: cannot be read")
    assert missing["status"] == "warning"


def test_the_program_that_makes_an_image_is_named_as_it_is_installed(tmp_path):
    program = shutil.copy(VMSFS, tmp_path / "vmsfs")
    builder = tmp_path / "vmsfs-guest-tiny"
    builder.write_text("#!/bin/sh\n")
    builder.chmod(0o755)
    argv = [program, "doctor", "--json", "-o", f"state={tmp_path}/state,image=nothing"]
    found = Report(subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment()))
    image = found.one("image", '"nothing"')
    for text in (image["remedy"], image["found"]):
        assert "build one with vmsfs-guest-tiny," in text and "contrib" not in text


def test_a_broken_image_is_told_and_whole_ones_are_listed(state, tmp_path):
    images = tmp_path / "images"
    (images / "broken").mkdir(parents=True)
    (images / "broken" / "image.json").write_text('{"inject": "cpio", "kernel": "vmlinuz", "initrd": "gone"}')
    os.symlink(os.path.join(IMAGES, "tiny"), images / "tiny")
    os.symlink(os.path.join(IMAGES, "tiny"), images / "other")
    found = report(state, images=images)
    assert found.one("image", "tiny is whole")["status"] == "ok"
    assert found.one("image", "other is whole")["status"] == "ok"
    broken = found.one("image", 'image "broken"')
    assert broken["status"] == "warning" and "kernel or initrd" in broken["found"]
    used = report(state, "image=broken", images=images).one("image", 'image "broken"')
    assert used["status"] == "failed"


def test_machines_that_exist_need_no_image(state, tmp_path):
    found = report(state, "backend=attach", images=tmp_path)
    assert [c for c in found.checks if c["status"] == "failed" and c["check"] != "mount"] == []


def test_a_daemon_that_runs_is_told_and_not_disturbed(daemon):
    one = daemon()
    os.mkdir(one.mount + "/.new/a")
    before = read(one.log)
    found = report(one.state)
    assert f"process {one.pid}" in found.one("state")["found"]
    assert found.one("mount", one.mount)["status"] == "ok"
    assert found.one("mount", one.mount)["found"] == f"{one.mount} answers"
    assert os.listdir(one.mount + "/.new") == ["a"]
    assert read(one.log) == before


def test_a_daemon_that_goes_on_for_a_copy_of_its_mount_is_told_with_who_has_it(daemon):
    one = daemon()
    script = f'exec 3<{one.mount}/.defaults/config/memory; echo; exec sleep 1000'
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            assert report(one.state).one("state")["status"] == "ok", "it is mounted"
            subprocess.run(["fusermount3", "-uz", one.mount], check=True, timeout=20)
            found = report(one.state).one("state")
        finally:
            holder.kill()
    assert found["status"] == "warning" and found["remedy"].endswith(f"kill {one.pid}")
    assert f"the mount namespace of process {holder.pid} has a copy of its mount, {one.mount}" in found["found"]
    one.wait_end()


def test_a_lock_is_looked_at_and_not_taken(daemon):
    """A daemon that starts just now is not turned away."""
    one = daemon()
    one.stop()
    trace = os.path.join(one.path, "trace")
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=flock,fcntl,unlink,unlinkat,rename,umount2,kill", "-o", trace]
        + [VMSFS, "doctor", "-o", f"state={one.state},images={IMAGES}"],
        env=environment({"ASAN_OPTIONS": "detect_leaks=0"}),
        capture_output=True,
        timeout=60,
    )
    assert b"no daemon does" in done.stdout, done
    calls = "\n".join(line for line in read(trace).splitlines() if "/vmsfs-trial." not in line)  # its own folder
    assert "exited with" in calls
    for call in ("flock(", "F_SETLK", "unlink", "rename(", "umount2("):
        assert call not in calls


def test_a_dead_mount_is_told_with_the_command_that_clears_it(daemon):
    one = daemon()
    os.kill(one.pid, signal.SIGKILL)
    one.wait_end()
    found = report(one.state)
    dead = found.one("mount", one.mount)
    assert found.done.returncode == 1
    assert dead["status"] == "failed" and "died" in dead["found"]
    assert f"fusermount3 -uz {one.mount}" in dead["remedy"]
    assert "no daemon does" in found.one("state")["found"]
    command = dead["remedy"].split(" clears")[0]
    subprocess.run(command.split(), check=True, timeout=20)
    assert not mount_line(one.mount)
    assert report(one.state).of("mount", one.mount) == []


def test_a_mount_that_hangs_is_told_and_not_waited_for(daemon):
    one = daemon()
    os.kill(one.pid, signal.SIGSTOP)
    wait_for(lambda: process_state(one.pid) == "T", "the daemon is stopped")
    try:
        with takes_at_most(20, "doctor"):
            found = report(one.state, "fsname=x")
        hung = found.one("mount", one.mount)
        assert hung["status"] == "failed" and "does not answer" in hung["found"]
        assert hung["remedy"].endswith(f"kill -CONT {one.pid}")
        with takes_at_most(20, "doctor with the mount point"):
            assert Report(run("--json", one.mount, "-o", f"state={one.state}")).one("mount", one.mount)
    finally:
        os.kill(one.pid, signal.SIGCONT)
    assert report(one.state).one("mount", one.mount)["status"] == "ok"


def test_a_blank_in_the_path_of_a_mount(daemon):
    one = daemon(start=False)
    os.rmdir(one.mount)
    one.mount = os.path.join(one.path, "my vms")
    os.mkdir(one.mount)
    process = subprocess.Popen(one.argv() + ["-f"], env=environment(), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: mount_line(one.mount.replace(" ", "\\040")), "the mount is there")
        assert report(one.state).one("mount", one.mount)["status"] == "ok"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


def test_a_mount_point_of_the_command_line_is_looked_at(state, tmp_path):
    place = str(tmp_path / "none")
    missing = Report(run("--json", place, "-o", f"state={state}")).one("mountpoint")
    assert missing["status"] == "failed" and missing["remedy"] == f"mkdir -p {place}"
    (tmp_path / "none").mkdir()
    assert Report(run("--json", place, "-o", f"state={state}")).one("mountpoint")["status"] == "ok"


def test_a_path_forges_no_line_of_the_report(state, tmp_path):
    place = f"{tmp_path}/m\nfailed   kvm          forged\x1b[2J"
    done = run(place, "-o", f"state={state}")
    assert "m\\x0afailed   kvm          forged\\x1b[2J" in done.stdout
    assert "\x1b" not in done.stdout and not any(line.startswith("failed   kvm          forged") for line in done.stdout.splitlines())


def test_a_state_directory_that_cannot_be_used_is_told(state, tmp_path):
    os.makedirs(state, 0o700)
    read_only = in_namespace(f"mount -t tmpfs -o ro,mode=700 none {state}")
    found = report(state, before=read_only).one("state")
    assert found["status"] == "failed" and "Read-only" in found["found"] and "-o state=" in found["remedy"]

    os.chmod(state, 0o777)
    found = report(state).one("state")
    assert found["status"] == "failed" and "chmod 700" in found["remedy"] and "0777" in found["found"]
    os.chmod(state, 0o700)
    assert report(state).one("state")["status"] == "ok"

    os.chown(state, 65534, 65534)
    found = report(state).one("state")
    assert found["status"] == "failed" and "65534" in found["found"]

    (tmp_path / "file").write_text("")
    assert report(tmp_path / "file").one("state")["status"] == "failed"
    assert report(tmp_path / "file" / "state").one("state")["status"] == "failed"


def test_a_state_directory_without_room_is_told(state):
    os.makedirs(state, 0o700)
    found = report(state, before=in_namespace(f"mount -t tmpfs -o size=1m,mode=700 none {state}")).one("space")
    assert found["status"] == "warning" and " MiB are free" in found["found"]


def test_a_user_who_may_not_is_told(tmp_path):
    """As nobody: no fusermount3 that is setuid root, no user_allow_other, nothing that could be written."""
    os.chmod(tmp_path, 0o755)
    script = (
        f"cp /usr/bin/fusermount3 {tmp_path}/f; chmod 755 {tmp_path}/f; mount --bind {tmp_path}/f /usr/bin/fusermount3;"
        f": > {tmp_path}/conf; mount --bind {tmp_path}/conf /etc/fuse.conf; umount -l /tmp/nothing 2>/dev/null || :"
    )
    # The tests' build may be where nobody but root gets: the program is put where everybody does.
    program = shutil.copy(VMSFS, tmp_path / "vmsfs")

    def of(options, prepare=script):
        done = subprocess.run(
            [*in_namespace(prepare), *NOBODY, program, "doctor", "--json", "-o", f"state={tmp_path}/state,{options}"],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "ASAN_OPTIONS": "detect_leaks=0"},
        )
        return Report(done)

    found = of("allow_other")
    assert found.one("fusermount3")["status"] == "failed" and "4755" in found.one("fusermount3")["remedy"]
    other = found.one("allow_other")
    assert other["status"] == "failed" and "user_allow_other to /etc/fuse.conf" in other["remedy"]
    assert found.one("state")["status"] == "failed"
    assert of("ephemeral").one("allow_other")["status"] == "ok"
    allowed = script.replace(": >", "echo user_allow_other >")
    assert of("allow_other", allowed).one("allow_other")["status"] == "ok"
    commented = script.replace(": >", "echo '#user_allow_other' >")
    assert of("allow_other", commented).one("allow_other")["status"] == "failed"


def test_the_mount_of_somebody_else_is_not_asked(daemon, tmp_path):
    one = daemon()
    os.chmod(tmp_path, 0o755)
    program = shutil.copy(VMSFS, tmp_path / "vmsfs")
    done = subprocess.run(
        [*NOBODY, program, "doctor", "--json", "-o", f"state={tmp_path}/state"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "ASAN_OPTIONS": "detect_leaks=0"},
    )
    found = Report(done).one("mount", one.mount)
    assert found["status"] == "ok" and found["found"] == f"{one.mount} is the mount of user 0, who alone can look at it"


def test_a_missing_fusermount3_is_told(state):
    found = report(state, before=in_namespace("mount --bind /dev/null /usr/bin/fusermount3")).one("fusermount3")
    assert found["status"] == "warning" and found["remedy"] == "apt install fuse3"


def test_a_missing_dev_fuse_is_told(state):
    # /dev/null stays: the shell of the doctor's children needs it.
    script = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3"
    found = report(state, before=in_namespace(script)).one("fuse")
    assert found["status"] == "failed" and "modprobe fuse" in found["remedy"]


def test_a_missing_qemu_is_told_with_its_package(state, tmp_path):
    (tmp_path / "none").touch()
    script = "\n".join(
        f"[ ! -e {path} ] || mount --bind {tmp_path}/none {path}"
        for path in ("/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm")
    )
    found = report(state, before=in_namespace(script), env={"PATH": "/bin"}).one("backend")
    assert found["status"] == "failed" and "apt install qemu-system-x86" in found["found"]


CPU_WITH = "printf 'flags : fpu vmx\\n' > {0}/cpu; mount --bind {0}/cpu /proc/cpuinfo"
CPU_WITHOUT = "printf 'flags : fpu vmx_not\\n' > {0}/cpu; mount --bind {0}/cpu /proc/cpuinfo"
NO_DEVICE = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/fuse c 10 229; ln -s /proc/self/fd /dev/fd"
DEVICE = NO_DEVICE + "; cp -a /dev/null /dev/kvm"

# A QEMU whose guest does what the file beside it says.
FAKE_QEMU = """#!/usr/bin/python3
import json, os, re, socket, sys, time
if "--version" in sys.argv:
    sys.exit(print("QEMU emulator version 7.2.22 (a fake)"))
here = os.path.dirname(os.path.abspath(__file__))
with open(here + "/started", "a") as f:
    f.write(json.dumps([os.getpid(), sys.argv]) + "\\n")
(console,) = [word for word in sys.argv if word.startswith("file,id=serial0,path=")]
console = open(console.split("path=")[1].split(",")[0], "a")
how = open(here + "/how").read()
if how == "boots":
    console.write("[    0.776544] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\\n")
elif how == "ends":
    sys.exit("KVM: entry failed, hardware error 0x80000021")
console.write("Booting the kernel.\\n")
console.flush()
client = socket.socket(fileno=3).accept()[0]
client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\\r\\n')
while request := client.recv(65536):
    for number in re.findall(rb'"id": ?(\\d+)', request):
        client.sendall(b'{"return": "TCP[HOST_FORWARD] 5 127.0.0.1 40000 10.0.2.15 22 0 0", "id": ' + number + b"}\\r\\n")
time.sleep(600)
"""


class Kvm:
    """A host with such a CPU, such a device, and a QEMU that boots or does not."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = os.path.join(folder, "bin")
        os.mkdir(self.bin)
        self.tmp = os.path.join(RUN.path, f"k{RUN.number()}")  # a short one
        os.mkdir(self.tmp)
        with open(self.bin + "/qemu-system-x86_64", "w", encoding="ascii") as f:
            f.write(FAKE_QEMU)
        os.chmod(self.bin + "/qemu-system-x86_64", 0o755)

    def argv(self, scripts, how, *options):
        with open(self.bin + "/how", "w", encoding="ascii") as f:
            f.write(how)
        words = ",".join([f"state={self.folder}/state", f"images={IMAGES}", *options])
        return in_namespace("\n".join(scripts).format(self.folder)) + [VMSFS, "doctor", "--json", "-o", words]

    def env(self, extra=None):
        extra = {"PATH": f"{self.bin}:{environment()['PATH']}", "TMPDIR": self.tmp, **(extra or {})}
        return environment(extra)

    def report(self, *scripts, how="boots", options=(), env=None):
        done = subprocess.run(
            self.argv(scripts, how, *options), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=self.env(env)
        )
        found = Report(done)
        assert os.listdir(self.tmp) == []
        assert not any(pid_alive(pid) for pid, _ in self.started())
        return found.one("kvm"), found.one("backend"), found

    def started(self):
        if not os.path.exists(self.bin + "/started"):
            return []
        return [json.loads(line) for line in read(self.bin + "/started").splitlines()]


@pytest.fixture
def kvm(tmp_path):
    return Kvm(str(tmp_path))


def test_kvm_is_said_to_work_when_a_kernel_has_booted_with_it(kvm):
    usable, backend, _ = kvm.report(CPU_WITH, DEVICE)
    assert usable["status"] == "ok" and re.search(r"the kernel of tiny boots with KVM, in \d+ ms$", usable["found"])
    assert "with KVM" in backend["found"]
    ((_, argv),) = kvm.started()
    assert argv[argv.index("-accel") + 1] == "kvm" and argv[argv.index("-cpu") + 1] == "host"
    assert argv[argv.index("-kernel") + 1] == f"{IMAGES}/tiny/vmlinuz" and "-initrd" not in argv


def test_a_long_tmpdir_is_passed_over(kvm, tmp_path):
    """The paths of sockets have 107 bytes at most."""
    long = tmp_path / ("d" * 100)
    long.mkdir()
    before = {name for name in os.listdir("/tmp") if name.startswith("vmsfs-trial.")}
    usable, _, _ = kvm.report(CPU_WITH, DEVICE, env={"TMPDIR": str(long)})
    assert usable["status"] == "ok"
    assert {name for name in os.listdir("/tmp") if name.startswith("vmsfs-trial.")} <= before


@pytest.mark.parametrize(
    "how, words", [("ends", "exit status 1); its last words: KVM: entry failed"), ("hangs", "has not come up within 15 s")]
)
def test_kvm_that_boots_no_kernel_has_failed(kvm, how, words):
    with takes_at_most(40, "doctor"):
        useless, backend, found = kvm.report(CPU_WITH, DEVICE, how=how)
    assert useless["status"] == "failed" and words in useless["found"] and "VMSFS_KVM=no" in useless["remedy"]
    assert found.done.returncode == 1 and "with KVM" in backend["found"]
    assert len(kvm.started()) == 1


def test_kvm_that_could_not_be_tried_is_no_kvm_that_works(kvm):
    untried, _, _ = kvm.report(CPU_WITH, DEVICE, options=["image=nothing"])
    assert untried["status"] == "warning" and "could not be tried" in untried["found"] and '"nothing"' in untried["found"]
    for options, env in ((["backend=attach"], None), ([], {"VMSFS_KVM": "no"})):
        kvm.report(CPU_WITH, DEVICE, options=options, env=env)
    assert kvm.started() == []


def test_without_kvm_it_is_told_what_is_missing(kvm):
    missing, backend, _ = kvm.report(CPU_WITH, NO_DEVICE)
    assert missing["status"] == "warning" and "kvm_intel" in missing["remedy"] and "without KVM" in backend["found"]
    absent, backend, _ = kvm.report(CPU_WITHOUT, NO_DEVICE)
    assert absent["status"] == "warning" and "firmware" in absent["remedy"] and "without KVM" in backend["found"]
    assert "/dev/kvm" not in absent["found"] and kvm.started() == []
    told, _, _ = kvm.report(CPU_WITH, DEVICE, env={"VMSFS_KVM": "no"})
    assert told["status"] == "warning" and told["remedy"] == "unset it"


def test_a_device_that_opens_on_a_cpu_without_the_flag_is_tried(kvm):
    useless, backend, _ = kvm.report(CPU_WITHOUT, DEVICE, how="ends")
    assert useless["status"] == "warning" and "firmware" in useless["remedy"] and "without KVM" in backend["found"]
    assert "does not boot with it: QEMU ended (exit status 1); its last words: KVM: entry failed" in useless["found"]
    unused, backend, _ = kvm.report(CPU_WITHOUT, DEVICE, how="boots")
    assert unused["status"] == "warning" and "VMSFS_KVM=yes" in unused["remedy"] and "without KVM" in backend["found"]
    assert "but the kernel of tiny boots with KVM" in unused["found"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_doctor_that_is_killed_leaves_no_qemu(kvm, number):
    argv = kvm.argv([CPU_WITH, DEVICE], "hangs")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=kvm.env()) as doctor:
        ((pid, _),) = wait_for(kvm.started, "a kernel is being tried")
        assert pid_alive(pid)
        doctor.send_signal(number)
        assert doctor.stdout.read() == b""
    assert doctor.returncode == -number
    wait_for(lambda: not pid_alive(pid), "QEMU is gone")
    assert number == signal.SIGKILL or os.listdir(kvm.tmp) == []


def boots_by_hand():
    """Does the kernel of tiny boot with KVM, as somebody would try it himself?"""
    kernel = ["-kernel", f"{IMAGES}/tiny/vmlinuz", "-append", "console=ttyS0 panic=-1 quiet", "-no-reboot", "-m", "128"]
    try:
        done = subprocess.run(
            ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-serial", "stdio", "-accel", "kvm", "-cpu", "host", *kernel],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=15, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return b"Kernel panic - not syncing: VFS" in done.stdout


def test_the_kvm_of_this_host_is_what_qemu_makes_of_it(state):
    """The real one: on a host where it opens and boots nothing, too."""
    boots = boots_by_hand()
    forced = report(state, env={"VMSFS_KVM": "yes"}).one("kvm")
    assert forced["status"] == ("ok" if boots else "failed"), forced
    found = report(state).one("kvm")
    assert (found["status"] == "ok") <= boots
    if not boots:
        assert "does not boot with it" in forced["found"]
        opens = subprocess.run(["sh", "-c", ": <> /dev/kvm"], stderr=subprocess.DEVNULL).returncode == 0
        assert not opens or "does not boot with it" in found["found"]


def test_a_loopback_that_is_down_is_told(state):
    found = report(state, before=["unshare", "-n"]).one("ports")
    assert found["status"] == "failed" and "ip link set lo up" in found["remedy"]
    assert report(state).one("ports")["status"] == "ok"


def test_a_missing_ssh_client_is_told(state):
    script = "mount --bind /dev/null /usr/bin/{}"
    found = report(state, before=in_namespace(script.format("ssh"))).one("ssh")
    assert found["status"] == "warning" and found["remedy"] == "apt install openssh-client"
    found = report(state, before=in_namespace(script.format("ssh-keygen"))).one("ssh")
    assert found["status"] == "failed"


def test_a_path_too_long_for_sockets_is_told(tmp_path):
    # As a user without XDG_RUNTIME_DIR the sockets are in the state directory.
    state = "/" + "x" * 100
    program = shutil.copy(VMSFS, tmp_path / "vmsfs")
    os.chmod(tmp_path, 0o755)
    done = subprocess.run(
        [*NOBODY, program, "doctor", "--json", "-o", f"state={state}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "ASAN_OPTIONS": "detect_leaks=0"},
    )
    found = Report(done).one("sockets")
    assert found["status"] == "failed" and "XDG_RUNTIME_DIR" in found["remedy"]


@pytest.mark.parametrize("program", ["firecracker", "cloud-hypervisor"])
def test_other_vmms_that_no_daemon_will_find_are_told(state, program):
    argv = [f"/usr/bin/{program}", "-c", "import sys; print(); sys.stdin.read()", f"{state}/vms/lost/vmm.log"]
    with subprocess.Popen(argv, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as left:
        left.stdout.readline()
        found = report(state).one("processes")
        left.stdin.close()
    assert found["status"] == "warning" and found["remedy"] == f"kill {left.pid}" and "lost" in found["found"]


def test_a_vmm_that_no_daemon_will_find_is_told(daemon):
    one = daemon()
    guest = one.boot("lost")
    pid = guest.qemu()
    assert report(one.state).one("processes")["found"].startswith("1 VMs run here")
    os.kill(one.pid, signal.SIGKILL)
    one.wait_end()
    waiting = report(one.state).one("processes")
    assert waiting["status"] == "ok", "the next daemon takes it over"
    shutil.rmtree(f"{one.state}/vms/lost")
    left = report(one.state).one("processes")
    assert left["status"] == "warning" and left["remedy"] == f"kill {pid}" and "lost" in left["found"]
    kill_and_wait(pid)
    assert report(one.state).one("processes")["status"] == "ok"


def test_a_firecracker_in_a_jail_that_no_daemon_will_find_is_told(state):
    _, argv = make_jail(f"{state}/vms/jailed")
    os.chmod(state, 0o700)
    with subprocess.Popen(argv) as jailed:
        try:
            wait_for(lambda: b"--id" in read_bytes(f"/proc/{jailed.pid}/cmdline"), "it is in its jail")
            assert report(state).one("processes")["found"].startswith("1 VMs run here")
            shutil.rmtree(f"{state}/vms/jailed")
            left = report(state).one("processes")
        finally:
            jailed.kill()
    assert left["status"] == "warning" and left["remedy"] == f"kill {jailed.pid}" and "in a jail" in left["found"]


@pytest.mark.parametrize("place", ["{}/vms/lost", "path={}/vms/lost", "/srv{}/vms/lost"])
def test_a_path_that_ends_like_the_state_directorys_is_another(state, place):
    argv = ["/usr/bin/qemu-system-x86_64", "-c", "import sys; print(); sys.stdin.read()", place.format(state)]
    with subprocess.Popen(argv, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = report(state).one("processes")
        process.stdin.close()
    assert found["status"] == ("ok" if place.startswith("/srv") else "warning")


def test_no_value_is_in_the_report(daemon):
    secret = "s3cret-of-the-doctor"
    one = daemon(f"boot_args=token={secret}")
    os.makedirs(one.mount + "/.new/a")
    with open(one.mount + "/.new/a/env/TOKEN", "w", encoding="ascii") as f:
        f.write(secret)
    for argv in (["--json"], []):
        done = run(*argv, "-o", one.options, env={"OPENAI_API_KEY": secret})
        assert secret not in done.stdout + done.stderr


