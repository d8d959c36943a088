"""run: a command in the guest as if it were here."""

import contextlib
import os
import pty
import signal
import subprocess

import pytest

from harness import SHELLS, Client, sh, takes_at_most, wait_for, write

SHELL_COMMANDS = {"the kernel": [], "bash": ["bash"], "dash": ["dash"], "busybox": ["busybox", "sh"], "ksh": ["ksh"]}


def run(vm, *argv, shell="the kernel", data=b"", seconds=60, **kwargs):
    return subprocess.run(
        [*SHELL_COMMANDS[shell], vm / "run", *argv], input=data, capture_output=True, timeout=seconds, **kwargs
    )


def gone_in_guest(vm, command):
    wait_for(lambda: not vm.runs(command), f"{command} has ended in the guest", 15)


def jobs(vm):
    return set(os.listdir(vm / "jobs")) - {".clone"}


@pytest.fixture(autouse=True)
def no_job_is_left(vm):
    before = jobs(vm)
    yield
    wait_for(lambda: jobs(vm) <= before, f"no job is left: {jobs(vm) - before}")


@pytest.mark.parametrize("shell", SHELL_COMMANDS)
def test_arguments_streams_and_status_are_kept_exactly(vm, shell):
    words = ["a b", "", "c'd", '"$HOME"', "`id`", "\\", "*", "two\nlines\n", "-n", "--", b"\xff\x80", "\x01\x1e\x7f", "-C", "e=f"]
    done = run(vm, "sh", "-c", 'for w; do printf "<%s>" "$w"; done; cat >&2; exit 7', "sh", *words, shell=shell, data=b"in\0put\n")
    assert done.returncode == 7
    assert done.stdout == b"".join(b"<" + os.fsencode(word) + b">" for word in words)
    assert done.stderr == b"in\0put\n"


def test_the_examples_of_the_issue_behave_as_over_ssh(vm):
    done = run(vm, "sh", "-c", 'echo $0 "$@"', "a b", "", "c'd")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a b  c'd\n", b"")
    done = sh(f"'{vm / 'run'}' cat < /dev/null")
    assert (done.stdout, done.stderr) == (b"", b"")
    with takes_at_most(20, "yes | run head -1"):
        done = sh(f"yes | '{vm / 'run'}' head -1")
    assert (done.stdout, done.stderr) == (b"y\n", b"")


def test_tar_into_the_guest_and_back(vm, tmp_path):
    (tmp_path / "sub").mkdir()
    data = os.urandom(300_000)
    (tmp_path / "sub/random").write_bytes(data)
    (tmp_path / "text").write_text("hello\n")
    vm.ssh("rm -rf /srv/tar; mkdir -p /srv/tar")
    sh(f"cd '{tmp_path}' && tar c . | '{vm / 'run'}' tar x -C /srv/tar")
    assert vm.ssh("cat /srv/tar/text") == b"hello\n"
    (tmp_path / "back").mkdir()
    sh(f"'{vm / 'run'}' tar c -C /srv/tar . | tar x -C '{tmp_path}/back'")
    assert (tmp_path / "back/sub/random").read_bytes() == data
    vm.ssh("rm -r /srv/tar")


def test_a_parallel_make_runs_its_recipes_in_the_guest(vm, tmp_path):
    vm.ssh("rm -rf /tmp/made; mkdir /tmp/made")
    recipe = f"\t@'{vm / 'run'}' sh -c 'echo $@ > /tmp/made/$@; echo made $@'\n"
    (tmp_path / "Makefile").write_text("all: a b c d e f g h\na b c d e f g h:\n" + recipe)
    done = subprocess.run(["make", "-j8", "-C", tmp_path], capture_output=True, timeout=60, check=True)
    assert sorted(line for line in done.stdout.splitlines() if line.startswith(b"made")) == [b"made %c" % c for c in b"abcdefgh"]
    assert vm.ssh("cat /tmp/made/*").split() == [b"%c" % c for c in b"abcdefgh"]
    (tmp_path / "Makefile").write_text(f"all:\n\t@'{vm / 'run'}' false\n")
    assert subprocess.run(["make", "-C", tmp_path], capture_output=True, timeout=60).returncode == 2


def test_every_status_comes_back(vm):
    for status in (0, 1, 2, 124, 126, 127, 128, 130, 200, 255):
        assert run(vm, "sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("name", ["HUP", "INT", "KILL", "SEGV", "PIPE", "TERM", "USR1"])
def test_a_signal_is_128_and_its_number(vm, name):
    assert run(vm, "sh", "-c", f"kill -{name} $$").returncode == 128 + signal.Signals["SIG" + name]


def test_no_signal_is_ignored_from_the_start(vm):
    assert b"SigIgn:\t0000000000000000" in run(vm, "cat", "/proc/self/status").stdout


def test_a_program_that_is_not_there(vm):
    done = run(vm, "no-such-program")
    assert done.returncode == 127 and b"no-such-program" in done.stderr


def test_options(vm, monkeypatch):
    write(vm.env("RUN_A"), "vm\n")
    monkeypatch.setenv("RUN_HERE", "from here")
    monkeypatch.delenv("RUN_NOT_HERE", raising=False)
    script = 'printf "%s|%s|%s|%s|%s|" "$RUN_A" "$RUN_B" "$RUN_HERE" "${RUN_NOT_HERE-unset}" "$RUN_NL"; pwd'
    try:
        done = run(
            vm, "-C", "/usr/share", "-e", "RUN_A=call", "-e", "RUN_B=it's=b", "-e", "RUN_HERE", "-e", "RUN_NOT_HERE",
            "-e", "RUN_NL=a\nb\n", "--", "sh", "-c", script,
        )  # fmt: skip
        assert done.stdout == b"call|it's=b|from here|unset|a\nb\n|/usr/share\n", done
        assert run(vm, "sh", "-c", 'echo "$RUN_A ${RUN_B-unset}"').stdout == b"vm unset\n"
    finally:
        os.unlink(vm.env("RUN_A"))
    assert not vm.is_set("RUN_B")


def test_the_timeout_ends_it(vm):
    with takes_at_most(15, "run -t 0.5"):
        assert run(vm, "-t", "0.5", "sleep", "1301").returncode == 128 + signal.SIGTERM
    gone_in_guest(vm, "sleep 1301")


def test_no_stdin_leaves_it_to_the_caller(vm):
    script = f"printf '1\\n2\\n' | while read -r n; do '{vm / 'run'}' -n echo \"$n\"; done"
    assert sh(script).stdout == b"1\n2\n"
    assert sh(f"'{vm / 'run'}' cat <&-").stdout == b""


def test_raw_and_login(vm):
    vm.ssh("echo 'export FROM_RUN_PROFILE=yes' > /etc/profile.d/run_test.sh")
    try:
        assert run(vm, "sh", "-c", "echo $FROM_RUN_PROFILE").stdout == b"yes\n"
        assert run(vm, "-s", "raw", "sh", "-c", "echo $FROM_RUN_PROFILE").stdout == b"\n"
    finally:
        vm.ssh("rm /etc/profile.d/run_test.sh")


@pytest.mark.parametrize(
    "argv, word",
    [
        ([], "usage"),
        (["-x", "true"], "usage"),
        (["-e", "1A=x", "true"], "1A"),
        (["-e", "../cwd=x", "true"], "../cwd"),
        (["-t", "soon", "true"], "timeout"),
        (["-C", "relative", "true"], "cwd"),
        (["-s", "fish", "true"], "shell"),
        (["--", "-rf"], "program"),
        ([""], "program"),
        (["echo", "x" * 140_000], "131072"),
    ],
)
def test_what_run_cannot_do_is_said_with_status_255(vm, argv, word):
    if argv and len(argv[-1]) > 131_000:
        argv = ["echo"] + ["y" * 1000] * 140
    done = run(vm, *argv)
    assert done.returncode == 255
    assert word in done.stderr.decode(), done.stderr


def test_it_is_found_by_other_names(vm, tmp_path):
    (tmp_path / "inweb").symlink_to(vm / "run")
    assert subprocess.run([tmp_path / "inweb", "uname", "-n"], capture_output=True, timeout=30).stdout == b"shared\n"
    assert sh(f"cd '{vm.path}' && ./run uname -n && sh run uname -n && PATH=\"$PWD:$PATH\" run uname -n").stdout == b"shared\n" * 3
    assert run(vm, "-h").stdout.startswith(b"usage:")


def test_a_stopped_vm_is_named(daemon):
    vm = daemon().boot("off")
    write(vm / "status", "stopped")
    done = run(vm, "true")
    assert done.returncode == 255 and b"off is stopped" in done.stderr


# --- its end ---


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_to_run_ends_the_command(vm, name):
    number = signal.Signals["SIG" + name]
    with Client([vm / "run", "sleep", "1302"]) as client:
        wait_for(lambda: vm.runs("sleep 1302"), "it runs in the guest")
        os.kill(client.process.pid, number)
        assert client.result(15)[0] == 128 + number
    gone_in_guest(vm, "sleep 1302")


def test_a_command_may_clean_up_and_its_status_counts(vm):
    script = "trap 'echo cleaning; exit 5' INT; echo ready; while :; do usleep 20000; done"
    with Client([vm / "run", "sh", "-c", script]) as client:
        assert client.process.stdout.readline() == b"ready\n"
        os.kill(client.process.pid, signal.SIGINT)
        assert client.result(15)[:2] == (5, b"cleaning\n")


def test_a_command_that_ignores_the_signal_is_killed(vm):
    script = "trap '' INT; echo ready; while :; do sleep 1; done"
    with Client([vm / "run", "sh", "-c", script]) as client:
        assert client.process.stdout.readline() == b"ready\n"
        os.kill(client.process.pid, signal.SIGINT)
        assert client.result(25)[0] == 128 + signal.SIGKILL


def test_kill_9_of_run_ends_the_command(vm):
    with Client([vm / "run", "sleep", "1303"]) as client:
        wait_for(lambda: vm.runs("sleep 1303"), "it runs in the guest")
        os.kill(client.process.pid, signal.SIGKILL)
        gone_in_guest(vm, "sleep 1303")


@pytest.mark.parametrize("what", ["run", "exec"])
def test_ctrl_c_in_a_terminal_ends_it_in_the_guest(vm, tmp_path, what):
    command = f"'{vm / 'run'}' sleep 1304" if what == "run" else f"echo 'sleep 1304' > '{vm / 'exec'}'"
    socket = tmp_path / "tmux"
    tmux = ["tmux", "-S", socket]
    subprocess.run([*tmux, "-f", "/dev/null", "new-session", "-d", "bash --norc"], check=True, timeout=20)
    try:
        subprocess.run([*tmux, "send-keys", command, "Enter"], check=True, timeout=20)
        wait_for(lambda: vm.runs("sleep 1304"), "it runs in the guest")
        subprocess.run([*tmux, "send-keys", "C-c"], check=True, timeout=20)
        gone_in_guest(vm, "sleep 1304")
        subprocess.run([*tmux, "send-keys", "echo status $?", "Enter"], check=True, timeout=20)

        def answered():
            text = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, check=True, timeout=20).stdout
            return [line for line in text.decode().splitlines() if line.startswith("status ")]

        assert wait_for(answered, "the shell is back") in (["status 130"], ["status 1"])
    finally:
        subprocess.run([*tmux, "kill-server"], timeout=20, check=False)


def test_with_a_terminal_as_stdin_there_is_no_input(vm):
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(vm / "run", ["run", "sh", "-c", "cat; echo end"])
    text = b""
    with contextlib.suppress(OSError):
        while part := os.read(fd, 1000):
            text += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert text == b"end\r\n"
    os.close(fd)


def test_nobody_who_takes_the_output_ends_the_command(vm):
    with takes_at_most(20, "run yes | head"):
        done = sh(f"'{vm / 'run'}' yes 1305 | head -n 2")
    assert done.stdout == b"1305\n1305\n"
    gone_in_guest(vm, "yes 1305")


def test_output_that_cannot_be_written_is_no_success(vm):
    done = sh(f"'{vm / 'run'}' seq 1 100000 > /dev/full", check=False)
    assert done.returncode not in (0, 1) and b"No space" in done.stderr


def test_a_lost_guest_is_no_success(new_vm):
    vm = new_vm("runlost")
    with Client([vm / "run", "sleep", "1306"]) as client:
        wait_for(lambda: vm.runs("sleep 1306"), "it runs in the guest")
        os.kill(vm.qemu(), signal.SIGKILL)
        status, _, errors = client.result(30)
    assert status == 255
    assert "runlost" in errors or "connection" in errors


def test_timeout_kills_what_exec_has_started(vm):
    done = sh(f"timeout 2 sh -c 'echo \"sleep 1307\" > \"{vm / 'exec'}\"'", check=False)
    assert done.returncode != 0
    gone_in_guest(vm, "sleep 1307")


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_set_e_stops_at_a_command_that_fails(vm, shell):
    script = f"set -e; cd '{vm.path}'; echo 'test -f /etc/passwd' > exec; echo one; echo 'test -f /nope' > exec; echo two"
    done = subprocess.run([*SHELLS[shell], script], capture_output=True, timeout=30)
    assert done.returncode != 0 and done.stdout == b"one\n"


def test_a_slow_reader_holds_the_command_back(vm):
    vm.ssh("rm -f /tmp/passed")
    with Client([vm / "run", "sh", "-c", "head -c 20000000 /dev/zero; touch /tmp/passed"]) as client:
        assert os.read(client.process.stdout.fileno(), 10) == bytes(10)
        assert vm.ssh("[ -e /tmp/passed ] || echo no") == b"no\n"
        status, out, _ = client.result(60)
    assert status == 0 and len(out) == 20_000_000 - 10


# --- what the other end may do ---


@pytest.mark.parametrize(
    "script",
    [
        "{run} sh -c 'head -c 3000000 /dev/zero' >/dev/full",
        "(trap '' PIPE; {run} yes | head -n 1)",
        "{run} sh -c 'head -c 3000000 /dev/zero >&2; exit 3' 2>/dev/full",
        "{run} sh -c 'yes >&2' 2>&1 >/dev/null | head -n 1",
    ],
)
def test_output_that_nobody_can_take_ends_it(vm, script):
    with takes_at_most(25, script):
        sh(script.format(run=f"'{vm / 'run'}'"), "bash", check=False)


def test_a_little_output_that_could_not_be_written_is_no_success(vm):
    for _ in range(10):  # the end of the command may be known when it is tried, or not yet
        assert sh(f"'{vm / 'run'}' echo hi >/dev/full", check=False).returncode == 255
        assert sh(f"'{vm / 'run'}' sh -c 'echo hi >&2' 2>/dev/full", check=False).returncode == 255


def test_closed_outputs_are_no_failure_of_their_own(vm):
    assert sh(f"'{vm / 'run'}' echo fine 2>&-").stdout == b"fine\n"
    done = sh(f"'{vm / 'run'}' sh -c 'echo gone; echo fine >&2' >&-")
    assert (done.stdout, done.stderr) == (b"", b"fine\n")
    assert sh(f"'{vm / 'run'}' sh -c 'echo gone; exit 3' <&- >&- 2>&-", check=False).returncode == 3


@pytest.mark.parametrize("name", ["set", "vm", "job", "key", "value", "input", "status", "option"])
def test_variables_of_the_caller_are_passed_whatever_their_name(vm, name, monkeypatch):
    monkeypatch.setenv(name, "from here")
    assert run(vm, "-e", name, "sh", "-c", f"echo \"${name}\"").stdout == b"from here\n"


def test_a_signal_that_ssh_has_no_name_for_is_said(vm):
    done = run(vm, "sh", "-c", "kill -BUS $$")
    assert done.returncode == 255 and b"signal" in done.stderr


def test_calls_side_by_side_say_their_own_error(vm):
    argv = [["-C", "relative", "true"], ["-t", "soon", "true"], ["-s", "fish", "true"]] * 6
    clients = [Client([vm / "run", *words]) for words in argv]
    for words, client in zip(argv, clients):
        status, _, errors = client.result(30)
        assert status == 255
        assert {"-C": "/cwd:", "-t": "/timeout:", "-s": "/shell:"}[words[0]] in errors, (words, errors)


def test_many_that_are_killed_at_once_leave_nothing_in_the_guest(vm):
    clients = [Client([vm / "run", "sleep", "1308"]) for _ in range(12)]
    for i, client in enumerate(clients):
        if i % 3:
            client.signal(signal.SIGKILL)
    for client in clients:
        client.signal(signal.SIGKILL)
        client.result(10)
    gone_in_guest(vm, "sleep 1308")
