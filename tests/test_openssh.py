"""Commands on an existing machine with OpenSSH's server, which allows ten of them a connection; and much data."""

import hashlib
import os
import re
import signal
import subprocess
import threading

import pytest

from harness import CLEAN, Client, children, mount_line, read, sh, wait_for, write
from test_jobs import Job


def memory(pid, field="VmHWM"):
    """KiB of a process: at most so far, or now."""
    return int(re.search(rf"^{field}:\s+(\d+)", read(f"/proc/{pid}/status"), re.M).group(1))


def runs_here(command):
    """Is there a process with this command line?"""
    wanted = b"\0".join(word.encode() for word in command.split()) + b"\0"
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as f:
                    if f.read() == wanted:
                        return True
            except OSError:
                pass
    return False


@pytest.mark.deadline(240)
def test_50_jobs_side_by_side_respect_maxsessions(attached, tmp_path):
    vm = attached(MaxSessions=10)
    jobs = [Job(vm) for _ in range(50)]
    for i, job in enumerate(jobs):
        job.start(f"touch {tmp_path}/{i}; while ! [ -e {tmp_path}/go ]; do sleep 0.2; done; echo {i}; exit {i}")
    wait_for(lambda: len(os.listdir(tmp_path)) == 50, "all of them run", 60)
    assert vm.info()["connections"] >= 5
    assert Job(vm).start("echo more").exit() == "0"
    (tmp_path / "go").touch()
    assert [job.exit() for job in jobs] == [str(i) for i in range(50)]
    assert [job.out() for job in jobs] == [b"%d\n" % i for i in range(50)]
    assert vm.error() == ""


def test_a_server_of_few_sessions_is_asked_for_more_connections(attached, tmp_path):
    vm = attached(MaxSessions=2)
    jobs = [Job(vm) for _ in range(9)]
    for i, job in enumerate(jobs):
        job.start(f"touch {tmp_path}/{i}; while ! [ -e {tmp_path}/go ]; do sleep 0.2; done; exit {i}")
    wait_for(lambda: len(os.listdir(tmp_path)) == 9, "all of them run", 60)
    (tmp_path / "go").touch()
    assert [job.exit() for job in jobs] == [str(i) for i in range(9)]
    assert vm.error() == ""


@pytest.mark.deadline(240)
def test_20_jobs_in_each_of_4_vms(attached, tmp_path):
    vm = attached("a", MaxSessions=10)
    vms = [vm, *vm.daemon.boot("b", "c", "d")]
    jobs = [(i, j, Job(one)) for i, one in enumerate(vms) for j in range(20)]
    for i, j, job in jobs:
        job.start(f"touch {tmp_path}/{i}.{j}; while ! [ -e {tmp_path}/go ]; do sleep 0.2; done; echo {i}; exit {j}")
    wait_for(lambda: len(os.listdir(tmp_path)) == 80, "all of them run", 60)
    (tmp_path / "go").touch()
    assert [(job.exit(), job.out()) for _, _, job in jobs] == [(str(j), b"%d\n" % i) for i, j, _ in jobs]


@pytest.mark.deadline(240)
def test_1_gib_through_run_cat_is_identical_and_the_daemon_stays_small(sshd, daemon, tmp_path):
    """Measured without sanitizers, whose memory is not the daemon's."""
    server = sshd()
    vm = daemon(server.options(), program=CLEAN).boot("pipe")
    sent, got = hashlib.sha256(), hashlib.sha256()
    block = os.urandom(8 << 20)
    process = subprocess.Popen([vm / "run", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def feed():
        for i in range(128):
            part = bytes([i]) + block[1:]
            sent.update(part)
            process.stdin.write(part)
        process.stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    size = 0
    while part := process.stdout.read(1 << 20):
        got.update(part)
        size += len(part)
    feeder.join()
    assert process.wait(30) == 0
    assert size == 1 << 30 and got.digest() == sent.digest()
    assert memory(vm.daemon.pid) < 64 * 1024


@pytest.mark.deadline(240)
def test_100_mb_on_both_streams_are_read_one_after_the_other(sshd, daemon):
    vm = daemon(sshd().options(), program=CLEAN).boot("both")
    with Job(vm) as job:
        job.start("head -c 100000000 /dev/zero & head -c 100000000 /dev/zero | tr '\\000' x >&2; wait")
        for name, byte in (("stdout", b"\0"), ("stderr", b"x")):
            with open(job / name, "rb") as f:
                size = 0
                while part := f.read(1 << 20):
                    size += len(part)
                    assert part == byte * len(part)
                assert size == 100_000_000
        assert job.exit() == "0"
    assert memory(vm.daemon.pid) < 64 * 1024


def test_slow_readers_of_many_commands_fill_no_memory(sshd, daemon):
    vm = daemon(sshd().options(), program=CLEAN).boot("slow")
    clients = [Client([vm / "run", "cat", "/dev/zero"]) for _ in range(10)]
    try:
        for client in clients:
            assert os.read(client.process.stdout.fileno(), 1) == b"\0"
        sizes = lambda: [os.stat(vm / f"jobs/{n}/stdout").st_size for n in os.listdir(vm / "jobs") if n != ".clone"]
        before = []

        def still():
            nonlocal before
            now, before = before, sizes()
            return now == before

        wait_for(still, "nothing flows any more", 30, 0.5)
        assert memory(vm.daemon.pid) < 64 * 1024
    finally:
        for client in clients:
            client.__exit__()


def test_ends_are_seen_as_they_are(attached):
    vm = attached()
    for argv, expected in [
        (["sh", "-c", "exit 7"], "7"),
        (["sh", "-c", "exit 143"], "143"),
        (["sh", "-c", "kill -TERM $$"], "TERM"),
        (["sh", "-c", "kill -QUIT $$"], "QUIT"),
        (["sh", "-c", "sleep 1410 & exit 3"], "3"),
        (["no-such-program"], "127"),
    ]:
        with Job(vm) as job:
            assert job.argv(*argv).exit() == expected, argv
    assert runs_here("sleep 1410")  # it was not the job's to end
    subprocess.run(["pkill", "-xf", "sleep 1410"], check=True, timeout=10)


@pytest.mark.parametrize("how", ["signal", "timeout", "rmdir", "client"])
def test_nothing_is_left_running(attached, how):
    vm = attached()
    command = f"sleep 14{11 + ['signal', 'timeout', 'rmdir', 'client'].index(how)}"
    if how == "client":
        with Client(f"echo 'sh -c \"{command}; :\"' > '{vm / 'exec'}'") as client:
            wait_for(lambda: runs_here(command), "it runs")
            client.signal(9)
            wait_for(lambda: not runs_here(command), "it has ended")
        return
    with Job(vm) as job:
        if how == "timeout":
            write(job / "timeout", "1")
        job.start(f"sh -c '{command}; :'")
        wait_for(lambda: runs_here(command), "it runs")
        if how == "signal":
            write(job / "signal", "TERM")
        elif how == "rmdir":
            os.rmdir(job.path)
        wait_for(lambda: not runs_here(command), "it has ended")
        if how != "rmdir":
            assert job.exit() == "TERM"


def test_login_and_raw_by_the_vm_s_configuration(attached):
    vm = attached("m", "shell=raw")
    write(vm.env("OSSH_A"), "set\n")
    script = "printf '%s' \"$OSSH_A\"; shopt -q login_shell 2>/dev/null; echo"
    assert vm.exec(script) == b"set\n"
    with Job(vm) as job:
        assert read(job / "shell") == "raw\n"
    write(vm / "config/shell", "login\n")
    with Job(vm) as job:
        assert read(job / "shell") == "login\n"
        assert job.start(script).exit() == "0"
        assert job.out() == b"set\n"


def test_rsync_and_git_over_run(attached, tmp_path):
    """run in the place of ssh: rsync -e, GIT_SSH_COMMAND."""
    vm = attached()
    assert mount_line(vm.daemon.mount)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(200_000))
    wrapper = tmp_path / "ssh"
    wrapper.write_text(f"#!/bin/sh\nshift\nexec '{vm / 'run'}' sh -c \"$*\"\n")
    wrapper.chmod(0o755)
    sh(f"rsync -a -e '{wrapper}' '{source}/' anyhost:'{target}/'")
    assert (target / "file").read_bytes() == (source / "file").read_bytes()


@pytest.mark.parametrize("how", ["rmdir", "stop"])
def test_what_runs_on_a_machine_ends_when_it_is_left(attached, how):
    vm = attached()
    job = Job(vm).start("sleep 71201; :")
    with Client('echo "sleep 71202" > "$F"', env={"F": vm / "exec", "PATH": os.environ["PATH"]}) as writer, Client(
        [vm / "run", "sh", "-c", "trap '' TERM; sleep 71203; :"]
    ) as runner:
        for number in (1, 2, 3):
            wait_for(lambda n=number: runs_here(f"sleep 7120{n}"), "it runs")
        if how == "rmdir":
            os.rmdir(vm.path)
        else:
            write(vm / "status", "stopped\n")
        assert writer.result(15)[0] != 0
        assert runner.result(15)[0] != 0
    for number in (1, 2, 3):
        wait_for(lambda n=number: not runs_here(f"sleep 7120{n}"), "it has ended")
    if how == "stop":
        assert job.exit() == "TERM"
        write(vm / "status", "running\n")
        write(vm / "exec", "true")


def test_what_was_lost_on_a_machine_ends_when_it_is_attached_again(attached):
    """The daemon cannot tell it at once: it does not answer."""
    vm = attached()
    job = Job(vm).start("sleep 71204; :")
    wait_for(lambda: runs_here("sleep 71204"), "it runs")
    server = vm.sshd.process.pid
    os.kill(server, signal.SIGSTOP)
    for pid in children(server):
        if read(f"/proc/{pid}/cmdline").startswith("sshd:"):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: vm.status() == "unreachable", "it is unreachable", 30)
    assert job.exit() == "lost"
    write(vm / "status", "stopped\n")
    assert runs_here("sleep 71204")
    os.kill(server, signal.SIGCONT)
    write(vm / "status", "running\n")
    wait_for(lambda: not runs_here("sleep 71204"), "it has ended")
