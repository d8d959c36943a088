"""Commands: what is written to exec runs in the guest."""

import contextlib
import hashlib
import os
import select
import signal
import statistics
import subprocess
import time

import pytest

from harness import SHELLS, Client, read, read_bytes, refused, sh, takes_at_most, wait_for, write

shells = pytest.mark.parametrize("shell", SHELLS)


def run(vm, shell, script, **kwargs):
    return sh(f"cd '{vm.path}' && {{ {script}\n}}", shell, **kwargs)


def echo(vm, command, **kwargs):
    """A client that writes one command, as `echo command > exec` does."""
    env = {"F": vm / "exec", "C": command, "PATH": os.environ["PATH"]}
    return Client('exec echo "$C" > "$F"', env=env, **kwargs)


# --- one command ---


@shells
def test_a_command_runs_and_its_output_is_read(vm, shell):
    assert run(vm, shell, "echo 'uname -n; echo err >&2' > exec; cat exec").stdout == b"shared\nerr\n"
    assert run(vm, shell, "cat exec; cat exec").stdout == b"shared\nerr\n" * 2


@shells
def test_a_failing_command_fails_the_echo(vm, shell):
    done = run(vm, shell, "echo false > exec", check=False)
    assert done.returncode != 0
    assert b"emote I/O" in done.stderr or b"rror" in done.stderr


def test_the_error_names_command_status_and_what_it_said(vm):
    with refused("EREMOTEIO"):
        write(vm / "exec", "echo it went wrong >&2; exit 7\n")
    error = vm.error()
    assert "exit 7" in error and "status 7" in error and "it went wrong" in error
    assert read(vm / "exec") == "it went wrong\n"
    with refused("EREMOTEIO"):
        write(vm / "exec", "no-such-command")
    assert "127" in vm.error() and "no-such-command" in vm.error()


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV"])
def test_a_command_ended_by_a_signal_fails(vm, name):
    with refused("EREMOTEIO"):
        write(vm / "exec", f"kill -{name} $$")
    assert name in vm.error() or str(128 + signal.Signals["SIG" + name]) in vm.error()


def test_output_of_a_failed_command_is_kept_and_the_next_replaces_it(vm):
    with refused("EREMOTEIO"):
        write(vm / "exec", "echo first; false")
    assert read(vm / "exec") == "first\n"
    write(vm / "exec", "echo second")
    assert read(vm / "exec") == "second\n"
    write(vm / "exec", "true")
    assert read(vm / "exec") == ""


def test_a_vm_that_has_run_nothing_has_no_output(new_vm):
    assert read(new_vm("quiet") / "exec") == ""


def test_exit_and_exec_in_a_command(vm):
    assert vm.exec("echo before; exit 0; echo after") == b"before\n"
    with refused("EREMOTEIO"):
        write(vm / "exec", "exit 7")
    assert "status 7" in vm.error()
    assert vm.exec("exec echo replaced") == b"replaced\n"
    write(vm / "exec", "exec true")
    with refused("EREMOTEIO"):
        write(vm / "exec", "exec sh -c 'exit 9'")
    assert "status 9" in vm.error()
    with refused("EREMOTEIO"):
        write(vm / "exec", "set -e; false; true")
    with refused("EREMOTEIO"):
        write(vm / "exec", "exec /no/such/program")


def test_a_command_has_no_input(vm):
    assert vm.exec("cat; echo end") == b"end\n"
    assert vm.exec("read -r line; echo \"<$line>\"") == b"<>\n"


def test_a_syntax_error_is_an_error_of_the_command(vm):
    with refused("EREMOTEIO"):
        write(vm / "exec", "if true; then echo never; fi }")
    assert "yntax" in vm.error()
    with refused("EREMOTEIO"):
        write(vm / "exec", "echo 'not closed")
    assert vm.exec("echo fine") == b"fine\n"


def test_several_lines_are_one_command(vm):
    assert vm.exec("x=1\nfor i in 1 2; do\n  echo $x$i\ndone\n\n# a comment\ncat <<EOF\nhere\nEOF\n") == b"11\n12\nhere\n"


def test_a_command_that_comes_in_pieces_does_not_run_its_rest_by_itself(vm):
    """`cd somewhere` and `rm -r *`: the second where the first would have led is another thing than the second alone."""
    vm.ssh("rm -f /root/made; rm -rf /tmp/there; mkdir /tmp/there")
    lines = "'cd /tmp/there\ntouch made'"
    for script in (
        f"echo {lines} > exec",  # bash's echo writes line by line
        "{ echo 'cd /tmp/there'; echo 'touch made'; } > exec",
        "printf '%s\n' 'cd /tmp/there' 'touch made' > exec",
    ):
        done = run(vm, "bash", script, check=False)
        assert done.returncode != 0 and b"nvalid argument" in done.stderr, script
        assert "line by line" in vm.error()
        assert vm.ssh("ls /root /tmp/there | grep -c made", check=False) == b"0\n"
    for script in (f"cat > exec <<'END'\ncd /tmp/there\ntouch made\nEND", f"x=$(printf {lines}); cat <<< \"$x\" > exec"):
        run(vm, "bash", script)
        assert vm.ssh("rm /tmp/there/made; ls /root") == b""
    for shell in ("dash", "zsh", "ksh", "busybox"):
        run(vm, shell, f"echo {lines} > exec")
        assert vm.ssh("rm /tmp/there/made; ls /root") == b""


@shells
def test_an_open_file_takes_one_command_after_the_other(vm, shell):
    assert run(vm, shell, "exec 3>exec; echo 'echo a' >&3; echo 'echo b' >&3; cat exec").stdout == b"b\n"


def test_quotes_and_bytes_of_a_command_arrive_as_they_are(vm):
    assert vm.exec("""printf '%s\\n' "it's" '"$HOME"' \\\\ 'ü' `echo b` $(echo c)""").decode() == (
        "it's\n\"$HOME\"\n\\\nü\nb\nc\n"
    )
    assert vm.exec(b"printf %s '\x01\x03\x04\x1e\x7f\xff'") == b"\x01\x03\x04\x1e\x7f\xff"


def test_output_of_any_bytes_arrives_as_it_is(vm):
    script = "for i in $(seq 0 255); do printf \"\\\\$(printf %o $i)\"; done"
    assert vm.exec(script) == bytes(range(256))


def test_output_that_looks_like_an_end_marker_is_output(vm):
    # An answer ends with a byte 036 and a nonce that only this command has.
    assert vm.exec("printf '\\036'; printf '\\036abc 0\\n'; printf '\\0360123456789abcdef0123456789abcdef 0\\nmore'") == (
        b"\x1e\x1eabc 0\n\x1e0123456789abcdef0123456789abcdef 0\nmore"
    )


@pytest.mark.parametrize("size", [2047, 2048, 2049, 4096, 32768, 131071, 131072])
def test_a_command_may_have_up_to_131072_bytes(vm, size):
    start, end = b"printf %s '", b"' | wc -c"
    value = b"x" * (size - len(start) - len(end))
    assert vm.exec(start + value + end).strip() == str(len(value)).encode()


def test_too_long_a_command_is_refused_and_not_run(vm):
    vm.ssh("rm -f /tmp/ran")
    with refused("E2BIG"):
        write(vm / "exec", b"touch /tmp/ran #" + b"x" * 131072)
    assert vm.ssh("ls /tmp/ran", check=False) == b""


def test_a_command_with_nul_is_refused_and_not_run(vm):
    vm.ssh("rm -f /tmp/ran")
    with refused("EINVAL"):
        write(vm / "exec", b"touch /tmp/ran\0; true")
    assert vm.ssh("ls /tmp/ran", check=False) == b""


# --- opened for reading and writing ---


def test_read_write_use_runs_a_command_and_reads_to_its_end(vm):
    assert vm.exec("echo out; echo err >&2; usleep 200000; echo late") in (b"out\nerr\nlate\n", b"err\nout\nlate\n")


def test_read_write_use_streams_output_as_it_comes(vm):
    vm.ssh("rm -f /tmp/go")
    fd = os.open(vm / "exec", os.O_RDWR)
    try:
        os.write(fd, b"echo first; until [ -e /tmp/go ]; do usleep 20000; done; echo second")
        assert os.read(fd, 100) == b"first\n"
        vm.ssh("touch /tmp/go")
        assert os.read(fd, 100) == b"second\n"
        assert os.read(fd, 100) == b""
        os.write(fd, b"echo another")
        assert os.read(fd, 100) == b"another\n"
        assert os.read(fd, 100) == b""
    finally:
        os.close(fd)


def test_a_session_can_be_polled(vm):
    vm.ssh("rm -f /tmp/polled")
    fd = os.open(vm / "exec", os.O_RDWR | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLOUT)
        assert poll.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]
        os.write(fd, b"until [ -e /tmp/polled ]; do usleep 20000; done; echo there")
        assert poll.poll(200) == []
        with refused("EAGAIN"):
            os.read(fd, 100)
        vm.ssh("touch /tmp/polled")
        assert poll.poll(20000)[0][1] & select.POLLIN
        assert os.read(fd, 100) == b"there\n"
        # The end is readable, too.
        wait_for(lambda: poll.poll(10000)[0][1] & select.POLLIN, "the end is told")
        assert os.read(fd, 100) == b""
    finally:
        os.close(fd)


def test_closing_a_read_write_session_ends_its_command(vm):
    fd = os.open(vm / "exec", os.O_RDWR)
    os.write(fd, b"exec sleep 4321")
    wait_for(lambda: vm.runs("sleep 4321"), "the command runs in the guest")
    os.close(fd)
    wait_for(lambda: not vm.runs("sleep 4321"), "the command has ended in the guest")


def test_the_shell_s_own_read_write_redirection(vm):
    done = run(vm, "bash", "exec 3<>exec; echo 'echo a; echo b' >&3; cat <&3")
    assert done.stdout == b"a\nb\n"


def test_a_reader_follows_a_command_that_runs(vm):
    vm.ssh("rm -f /tmp/go")
    with echo(vm, "echo first; until [ -e /tmp/go ]; do usleep 20000; done; echo second") as writer:
        wait_for(lambda: os.stat(vm / "exec").st_size == 6, "the first line")
        with Client(["cat", vm / "exec"]) as reader:
            assert reader.process.stdout.read(6) == b"first\n"
            vm.ssh("touch /tmp/go")
            assert reader.result()[:2] == (0, b"second\n")
        assert writer.result()[0] == 0


def test_sessions_do_not_see_each_other(vm):
    fds = [os.open(vm / "exec", os.O_RDWR) for _ in range(5)]
    try:
        for number, fd in enumerate(fds):
            os.write(fd, f"echo {number}; usleep 100000; echo {number}".encode())
        for number, fd in enumerate(fds):
            output = b""
            while part := os.read(fd, 100):
                output += part
            assert output == f"{number}\n{number}\n".encode()
    finally:
        for fd in fds:
            os.close(fd)


# --- variables ---


def test_commands_see_the_variables_and_their_changes_at_once(vm):
    for value in ("one", "two", "it's $HOME\nthree"):
        write(vm.env("SEEN"), value + "\n")
        assert vm.exec('printf %s "$SEEN"') == value.encode()
    os.unlink(vm.env("SEEN"))
    assert vm.exec('printf %s "${SEEN-unset}"') == b"unset"


def test_programs_started_by_a_command_see_the_variables(vm):
    write(vm.env("INHERITED"), "yes")
    assert b"INHERITED=yes\n" in vm.exec("env")


# --- many, long, and ended ---


@pytest.mark.deadline(180)
def test_20_commands_at_once_run_side_by_side(vm):
    start = time.monotonic()
    clients = [echo(vm, f"sleep 2; exit {number % 2}") for number in range(20)]
    statuses = [client.result(60)[0] for client in clients]
    taken = time.monotonic() - start
    assert [status != 0 for status in statuses] == [bool(number % 2) for number in range(20)]
    assert taken < 15, f"{taken} s"


@pytest.mark.deadline(180)
def test_20_commands_at_once_have_each_its_own_output(vm):
    clients = []
    for number in range(20):
        script = 'exec 3<>"$F"; echo "seq $N 1 $((N + 2000)) | sha256sum" >&3; cat <&3'
        clients.append(Client(["bash", "-c", script], env={"F": vm / "exec", "N": str(number), "PATH": "/bin:/usr/bin"}))
    for number, client in enumerate(clients):
        lines = "".join(f"{n}\n" for n in range(number, number + 2001)).encode()
        status, out, err = client.result(60)
        assert (status, out.split()[:1]) == (0, [hashlib.sha256(lines).hexdigest().encode()]), err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_command_is_ended_with_its_writer(vm, number):
    with echo(vm, "sleep 1000") as client:
        wait_for(lambda: vm.runs("sleep 1000"), "the command runs in the guest")
        start = time.monotonic()
        client.signal(number)
        status = client.result(10)[0]
        assert status != 0
        assert time.monotonic() - start < 3
    wait_for(lambda: not vm.runs("sleep 1000"), "the command has ended in the guest")
    assert vm.exec("echo on") == b"on\n"


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "ksh"])
def test_ctrl_c_in_a_shell_ends_the_command(vm, shell):
    # The shell's own echo: the signal comes to the process that is in write().
    with Client(SHELLS[shell] + [f"echo 'sleep 1001' > '{vm / 'exec'}'; exit 5"]) as client:
        wait_for(lambda: vm.runs("sleep 1001"), "the command runs in the guest")
        client.signal(signal.SIGINT)
        assert client.result(10)[0] != 0
    wait_for(lambda: not vm.runs("sleep 1001"), "the command has ended in the guest")


def test_a_command_that_ignores_the_first_signal_is_killed(vm):
    with echo(vm, "trap '' INT TERM HUP; while :; do sleep 1002; done") as client:
        wait_for(lambda: vm.runs("sleep 1002"), "the command runs in the guest")
        client.signal(signal.SIGINT)
        assert client.result(10)[0] != 0
    wait_for(lambda: not vm.runs("sleep 1002"), "the command has ended in the guest")


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_child_that_ends_meanwhile_does_not_end_the_command(vm, shell):
    vm.ssh("rm -f /tmp/done")
    script = f"sleep 0.3 & echo 'sleep 2; touch /tmp/done' > '{vm / 'exec'}'"
    with Client(SHELLS[shell] + [script]) as client:
        status, _, errors = client.result(30)
    assert status == 0, errors
    assert vm.ssh("ls /tmp/done") == b"/tmp/done\n"


def test_a_stop_and_a_continuation_do_not_end_the_command(vm):
    vm.ssh("rm -f /tmp/go")
    with echo(vm, "until [ -e /tmp/go ]; do usleep 20000; done; touch /tmp/done2") as client:
        client.waits()
        client.signal(signal.SIGSTOP)
        client.signal(signal.SIGCONT)
        client.signal(signal.SIGCHLD)
        client.signal(signal.SIGWINCH)
        vm.ssh("touch /tmp/go")
        status, _, errors = client.result(30)
    assert status == 0, errors


@pytest.mark.parametrize(
    "command",
    [
        "sleep 500 & echo on",
        "(sleep 500; echo never) & echo on",
        "nohup sleep 500 >/dev/null 2>&1 & echo on",
        "setsid sleep 500 & echo on",
    ],
)
def test_a_process_in_the_background_does_not_hang_exec(vm, command):
    with takes_at_most(10, "a command that leaves a process behind"):
        write(vm / "exec", command)
    assert read(vm / "exec") == "on\n"
    with takes_at_most(10, "a command that leaves a process behind"):
        assert vm.exec(command) == b"on\n"
    vm.ssh("pkill -f 'sleep 500'", check=False)


@pytest.mark.deadline(300)
def test_100_mb_of_output_arrive_whole(vm):
    line = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.\n"
    size = 100 * 1024 * 1024
    block = line * 1024
    wanted = hashlib.sha256()
    for _ in range(size // len(block)):
        wanted.update(block)
    # The guest has 128 MiB in all: one block of 64 KiB in a file, written 1600 times.
    vm.ssh("i=0; while [ $i -lt 1024 ]; do echo %s; i=$((i+1)); done > /tmp/block" % line.decode().strip())
    command = "i=0; while [ $i -lt 200 ]; do cat %s; i=$((i+1)); done" % " ".join(["/tmp/block"] * 8)
    got, length = hashlib.sha256(), 0
    fd = os.open(vm / "exec", os.O_RDWR)
    try:
        os.write(fd, command.encode())
        while part := os.read(fd, 1 << 20):
            got.update(part)
            length += len(part)
    finally:
        os.close(fd)
    assert length == size
    assert got.digest() == wanted.digest()
    # And once more, from the start, by who comes later.
    again = subprocess.run(["sha256sum", vm / "exec"], capture_output=True, timeout=120, check=True)
    assert again.stdout.split()[0].decode() == wanted.hexdigest()


def median_of_20(action):
    taken = []
    for _ in range(20):
        start = time.monotonic()
        action()
        taken.append(time.monotonic() - start)
    return statistics.median(taken)


@pytest.mark.deadline(200)
def test_everything_else_answers_while_long_commands_run(mount, vm, new_vm):
    other = new_vm("bystander")
    write(other.env("OTHER"), "x")
    with contextlib.ExitStack() as stack:
        sleeper = stack.enter_context(echo(vm, "sleep 1003"))
        wait_for(lambda: vm.runs("sleep 1003"), "the command runs")
        noise = stack.enter_context(echo(vm, "while :; do echo noise; done"))  # the newest: its size is shown
        wait_for(lambda: os.stat(vm / "exec").st_size > 100_000, "output comes", 30)
        for what, action in {
            "status": lambda: read(vm / "status"),
            "info": lambda: read(vm / "info"),
            "ls of the root": lambda: os.listdir(mount.mount),
            "ls -l of the VM": lambda: [entry.stat() for entry in os.scandir(vm.path)],
            "ls of env": lambda: os.listdir(vm / "env"),
            "a read of another VM's variable": lambda: read(other.env("OTHER")),
            "a write to another VM": lambda: write(other.env("OTHER"), "y"),
            "a command of another VM": lambda: write(other / "exec", "true"),
        }.items():
            median = median_of_20(action)
            assert median < 0.1, f"{what}: {median * 1000:.0f} ms"
        noise.signal(signal.SIGINT)
        sleeper.signal(signal.SIGINT)
        assert noise.result(20)[0] != 0 and sleeper.result(20)[0] != 0
    wait_for(lambda: not vm.runs("sleep 1003"), "the command has ended in the guest")


def test_a_held_command_does_not_hold_up_its_directory(vm):
    with echo(vm, "sleep 1004") as client:
        client.waits()
        with takes_at_most(5, "ls, rm and a lookup"):
            sh('cd "$D" && ls -l && ! ls nothing 2>/dev/null && rm -f error && echo x > env/HELD && rm env/HELD', D=vm.path)
            assert vm.exec("echo at once") == b"at once\n"


@pytest.mark.deadline(200)
def test_500_commands_one_after_the_other(vm):
    before = vm.info()["commands"]
    script = 'i=0; while [ $i -lt 500 ]; do echo "echo $i" > exec || exit 1; i=$((i+1)); done'
    run(vm, "dash", script, seconds=150)
    assert read(vm / "exec") == "499\n"
    assert vm.info()["commands"] == before + 500
    assert len(vm.processes()) < 100


def test_the_output_file_keeps_nothing_on_the_host(vm):
    write(vm / "exec", "echo spooled-bytes")
    found = sh(f"grep -rl spooled-bytes '{vm.daemon.state}'", check=False).stdout
    assert found == b""


def test_read_bytes_of_exec_by_tools(vm, tmp_path):
    write(vm / "exec", "seq 1 1000")
    wanted = "".join(f"{n}\n" for n in range(1, 1001)).encode()
    run(vm, "dash", f"cp exec '{tmp_path}/copy'; dd if=exec bs=7 of='{tmp_path}/dd' status=none")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "dd").read_bytes() == wanted
    assert read_bytes(vm / "exec") == wanted
    assert run(vm, "dash", "grep -c . exec; tail -n 1 exec; head -n 1 < exec").stdout == b"1000\n1000\n1\n"
