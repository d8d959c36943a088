"""Jobs: commands with streams, status, input and variables of their own."""

import contextlib
import hashlib
import os
import select
import signal
import subprocess
import time

import pytest

from harness import Client, read, read_bytes, refused, sh, takes_at_most, wait_for, write

NAMES = iter(range(1, 1 << 30))


class Job:
    """jobs/NAME of a VM; removed with the `with` block."""

    def __init__(self, vm, name=None):
        self.vm = vm
        self.name = name or f"t{next(NAMES)}"
        self.path = vm / f"jobs/{self.name}"
        os.mkdir(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.path)

    def __truediv__(self, name):
        return os.path.join(self.path, name)

    def start(self, command):
        write(self / "command", command)
        return self

    def argv(self, *words):
        write(self / "argv", b"".join(os.fsencode(word) + b"\0" for word in words))
        return self

    def status(self):
        return read(self / "status").strip()

    def exit(self):
        return read(self / "exit").strip()

    def out(self):
        return read_bytes(self / "stdout")

    def err(self):
        return read_bytes(self / "stderr")


@pytest.fixture
def job(vm):
    with Job(vm) as one:
        yield one


def gone_in_guest(vm, command, seconds=15):
    wait_for(lambda: not vm.runs(command), f"{command} has ended in the guest", seconds)


def runs_in_guest(vm, command):
    wait_for(lambda: vm.runs(command), f"{command} runs in the guest", 15)


# --- its life ---


def test_a_job_is_made_started_read_and_removed(vm):
    name = f"life{next(NAMES)}"
    script = (
        f"cd '{vm.path}/jobs' && mkdir {name} && cd {name} && cat status && echo 'echo out; echo err >&2; exit 7' > command"
        f" && cat exit status stdout && cat stderr && cd .. && rmdir {name} && ls"
    )
    for shell in ("bash", "dash", "busybox"):
        done = sh(script, shell)
        assert done.stdout.splitlines()[:5] == [b"new", b"7", b"exited", b"out", b"err"], done
        assert name.encode() not in done.stdout.splitlines()[5:]


def test_stdout_and_stderr_are_apart_and_binary(vm, job):
    job.start("for i in $(seq 0 255); do printf \"\\\\$(printf %o $i)\"; done; printf 'a\\000b' >&2")
    assert job.exit() == "0"
    assert job.out() == bytes(range(256))
    assert job.err() == b"a\0b"


@pytest.mark.parametrize(
    "words",
    [
        ["a b", "", "c'd", '"$HOME"', "`id`", "\\", "*", "two\nlines\n", "-n", "--", "\udcff\udc80", "\x01\x1e\x7f"],
        ["x" * 100_000],
        ["w"] * 5_000,
    ],
    ids=["odd", "long", "many"],
)
def test_argv_is_taken_word_by_word(vm, job, words):
    job.argv("sh", "-c", 'for w; do printf "<%s>" "$w"; done', "sh", *words)
    assert job.exit() == "0", job.err()
    assert job.out() == b"".join(b"<" + os.fsencode(word) + b">" for word in words)


def test_argv_without_any_nul_is_one_word(vm, job):
    sh(f"echo uname > '{job / 'argv'}'")
    assert job.exit() == "0"
    assert job.out() == b"Linux\n"


def test_builtins_of_the_shell_can_be_argv(vm, job):
    job.argv("type", "cd")
    assert job.exit() == "0"
    assert b"cd" in job.out()


def test_what_is_written_in_pieces_is_one_command(vm, job):
    with open(job / "command", "wb", buffering=0) as f:
        f.write(b"echo one\n")
        f.write(b"echo two\n")
        assert job.status() == "new"
    assert job.exit() == "0"
    assert job.out() == b"one\ntwo\n"
    assert read(job / "command") == "echo one\necho two"


@pytest.mark.parametrize("size", [3_000, 100_000])
def test_a_long_command_has_its_input(vm, job, size):
    write(job / "stdin", b"first\n")
    job.start("cat; : " + "x" * size)
    assert job.exit() == "0"
    assert job.out() == b"first\n"


def test_a_job_runs_once(vm, job):
    job.start("echo once")
    with refused("EBUSY"):
        job.start("echo twice")
    with refused("EBUSY"):
        job.argv("echo", "twice")
    assert "once" in vm.error() or "started already" in vm.error()
    assert job.exit() == "0"
    assert job.out() == b"once\n"


def test_bad_commands_are_refused_and_leave_the_job_new(vm, job):
    with refused("EINVAL"):
        job.start(b"echo a\0b")
    with refused("EINVAL"):
        job.argv("", "x")
    with refused("EINVAL"):
        job.argv("-c", "x")
    with refused("E2BIG"):
        job.start("x" * 131_073)
    assert job.status() == "new"
    assert job.start("echo fine").exit() == "0"


@pytest.mark.parametrize("name", [".hidden", "-x", "a b", "x" * 65, "ü", "a:b"])
def test_names_that_are_none_are_refused(vm, name):
    with refused("EINVAL"):
        os.mkdir(vm / f"jobs/{name}")


def test_two_jobs_of_a_name_are_refused(vm, job):
    with refused("EEXIST"):
        os.mkdir(job.path)
    with refused("ENOENT"):
        os.rmdir(vm / "jobs/none")


def test_a_job_can_be_put_in_place_by_rename(vm, job):
    """As Ansible's copy does."""
    write(job / "env/A", "1\n")
    temporary = job / ".ansible_tmpab12command"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"echo $A renamed\n")
    os.close(fd)
    assert job.status() == "new"
    os.rename(temporary, job / "command")
    assert job.exit() == "0"
    assert job.out() == b"1 renamed\n"
    assert sorted(os.listdir(job.path)) == sorted(set(os.listdir(job.path)) - {os.path.basename(temporary)})


def test_rm_r_removes_a_job(vm, job):
    job.start("sleep 1207")
    runs_in_guest(vm, "sleep 1207")
    sh(f"rm -r '{job.path}'")
    assert not os.path.exists(job.path)
    gone_in_guest(vm, "sleep 1207")


def test_a_vm_that_does_not_run_starts_no_job(daemon):
    vm = daemon().guest("off")
    os.mkdir(vm.path)
    with Job(vm) as job:
        with refused("EBUSY"):
            job.start("true")
        vm.wait("running")
        assert job.start("true").exit() == "0"
    write(vm / "status", "stopped")
    with Job(vm) as job:
        with refused("EBUSY"):
            job.start("true")
        assert "status" in vm.error()


# --- how it ends ---


def test_exit_statuses_and_signals_are_told_apart(vm):
    for argv, expected in [
        (["true"], "0"),
        (["sh", "-c", "exit 7"], "7"),
        (["sh", "-c", "exit 143"], "143"),
        (["sh", "-c", "kill -TERM $$"], "TERM"),
        (["sh", "-c", "kill -KILL $$"], "KILL"),
        (["no-such-program"], "127"),
    ]:
        with Job(vm) as job:
            assert job.argv(*argv).exit() == expected, argv


def test_exit_waits_and_who_waits_can_be_killed_at_once(vm, job):
    job.start("sleep 1201")
    with Client(["cat", job / "exit"]) as client, Client(["cat", job / "stdout"]) as other:
        client.waits()
        other.waits()
        with takes_at_most(1, "killing"):
            client.signal(signal.SIGKILL)
            other.signal(signal.SIGINT)
            client.result(5)
            other.result(5)
    assert job.status() == "running"
    with Client(["cat", job / "exit"]) as client:
        client.waits()
        write(job / "signal", "TERM\n")
        assert client.result(10)[:2] == (0, b"TERM\n")
    gone_in_guest(vm, "sleep 1201")


@pytest.mark.parametrize("word", ["INT", "SIGINT", "int", "2", "INT 60"])
def test_a_signal_reaches_the_command(vm, job, word):
    job.start("trap 'echo got; exit 5' INT; echo ready; while :; do usleep 20000; done")
    with open(job / "stdout", "rb", buffering=0) as out:
        assert out.read(100) == b"ready\n"
        write(job / "signal", word + "\n")
        assert job.exit() == "5"
        assert out.read(100) == b"got\n"


def test_a_signal_reaches_all_processes_of_the_command(vm, job):
    job.start("sleep 1202 & sh -c 'sleep 1203; :' & echo ready; wait")
    with open(job / "stdout", "rb", buffering=0) as out:
        out.read(100)
    runs_in_guest(vm, "sleep 1202")
    runs_in_guest(vm, "sleep 1203")
    write(job / "signal", "TERM")
    assert job.exit() == "TERM"
    gone_in_guest(vm, "sleep 1202")
    gone_in_guest(vm, "sleep 1203")


def test_a_signal_with_seconds_is_followed_by_kill(vm, job):
    job.argv("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
    with open(job / "stdout", "rb", buffering=0) as out:
        out.read(100)
    write(job / "signal", "TERM 1")
    assert job.exit() == "KILL"


def test_signals_that_are_none_are_refused(vm, job):
    with refused("EBUSY"):
        write(job / "signal", "TERM")
    job.start("sleep 1204")
    for word in ("", "NONE", "99", "TERM; reboot", "TERM x", "TERM 1 2", "TERM -1", "x" * 40):
        if word:
            with refused("EINVAL"):
                write(job / "signal", word)
    write(job / "signal", "KILL")
    assert job.exit() == "KILL"
    with refused("EBUSY"):
        write(job / "signal", "TERM")


def test_a_timeout_ends_it_with_term(vm, job):
    write(job / "timeout", "0.5\n")
    job.start("sleep 1205")
    assert job.exit() == "TERM"
    assert "timeout" in vm.error()
    gone_in_guest(vm, "sleep 1205")


def test_who_ignores_term_is_killed_5_s_after_the_timeout(vm, job):
    write(job / "timeout", "0.5\n")
    job.argv("sh", "-c", "trap '' TERM; while :; do sleep 1206; done")
    start = time.monotonic()
    assert job.exit() == "KILL"
    assert time.monotonic() - start > 4.5
    gone_in_guest(vm, "sleep 1206")


def test_a_timeout_is_no_success_however_the_command_takes_it(vm, job):
    write(job / "timeout", "0.5\n")
    job.start("trap 'exit 0' TERM; while :; do usleep 20000; done")
    assert job.exit() == "TERM"


def test_the_timeout_of_a_running_job_can_be_changed(vm, job):
    write(job / "timeout", "600\n")
    job.start("sleep 1208")
    write(job / "timeout", "0.1")
    assert job.exit() == "TERM"
    with refused("EBUSY"):
        write(job / "timeout", "5")


@pytest.mark.parametrize("how", ["command", "argv"])
def test_a_child_in_the_background_does_not_hold_the_end_up(vm, job, how):
    script = "sleep 1209 & echo $!; exit 3"
    with takes_at_most(20, "the end"):
        if how == "command":
            job.start(script)
        else:
            job.argv("sh", "-c", script)
        assert job.exit() == "3"
        child = int(job.out())
    assert vm.runs("sleep 1209")
    vm.ssh(f"kill {child}")


def test_rmdir_ends_the_command_and_its_readers(vm):
    job = Job(vm)
    job.start("echo first; sleep 1210")
    runs_in_guest(vm, "sleep 1210")
    with Client(["cat", job / "stdout"]) as client:
        client.waits()
        os.rmdir(job.path)
        status, out, _ = client.result(15)
    assert (status, out) == (0, b"first\n")
    gone_in_guest(vm, "sleep 1210")
    assert job.name not in os.listdir(vm / "jobs")


def test_destroying_the_vm_ends_the_readers(new_vm):
    vm = new_vm("doomed")
    job = Job(vm)
    job.start("sleep 1211")
    with Client(["cat", job / "stdout"]) as client, Client(["cat", job / "exit"]) as other:
        client.waits()
        other.waits()
        os.rmdir(vm.path)
        status, out, errors = client.result(15)
        assert status != 0 and out == b"" and "reset" in errors
        assert other.result(15)[1] == b"lost\n"


def test_a_lost_connection_is_no_success(new_vm):
    vm = new_vm("cut")
    job = Job(vm)
    job.start("echo some; sleep 1212")
    with Client(["cat", job / "stdout"]) as client:
        wait_for(lambda: os.stat(job / "stdout").st_size == 5, "it has said something")
        client.waits()
        os.kill(vm.qemu(), signal.SIGKILL)
        status, out, errors = client.result(30)
    assert status != 0 and out == b"some\n" and "reset" in errors
    assert job.exit() == "lost"
    assert job.status() == "exited"
    with refused("ECONNRESET"):
        job.out()


# --- streams ---


def test_output_comes_line_by_line_while_it_runs(vm, job):
    job.start("echo 1; while ! [ -e /tmp/go1 ]; do usleep 20000; done; echo 2; while :; do sleep 1; done")
    vm.ssh("rm -f /tmp/go1")
    with open(job / "stdout", "rb", buffering=0) as out:
        assert out.read(100) == b"1\n"
        vm.ssh("touch /tmp/go1")
        assert out.read(100) == b"2\n"
    assert job.status() == "running"


def test_every_reader_has_it_from_the_start(vm, job):
    vm.ssh("rm -f /tmp/go2")
    job.start("seq 1 1000; while ! [ -e /tmp/go2 ]; do usleep 20000; done; seq 1001 2000")
    whole = b"".join(b"%d\n" % i for i in range(1, 2001))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(["cat", job / "stdout"])) for _ in range(5)]
        for client in clients:
            client.waits()
        vm.ssh("touch /tmp/go2")
        assert [client.result(20)[1] for client in clients] == [whole] * 5
    assert job.out() == whole
    assert os.stat(job / "stdout").st_size == len(whole)
    assert sh(f"tail -n 1 '{job / 'stdout'}'; tail -c 5 '{job / 'stdout'}'").stdout == b"2000\n2000\n"
    assert sh(f"dd if='{job / 'stdout'}' bs=1 skip=2 count=3 2>/dev/null").stdout == whole[2:5]


def test_streams_can_be_polled(vm, job):
    vm.ssh("rm -f /tmp/go3 /tmp/go4")
    job.start(
        "while ! [ -e /tmp/go3 ]; do usleep 20000; done; echo x; while ! [ -e /tmp/go4 ]; do usleep 20000; done"
    )
    poll = select.poll()
    with open(job / "stdout", "rb", buffering=0) as out, open(job / "exit", "rb", buffering=0) as end:
        poll.register(out, select.POLLIN)
        poll.register(end, select.POLLIN)
        assert poll.poll(200) == []
        vm.ssh("touch /tmp/go3")
        assert poll.poll(10_000) == [(out.fileno(), select.POLLIN)]
        assert out.read(10) == b"x\n"
        assert poll.poll(200) == []
        vm.ssh("touch /tmp/go4")
        wait_for(lambda: len(poll.poll(10_000)) == 2, "both are at their end", 10)
        assert (out.read(10), end.read(10)) == (b"", b"0\n")


def test_both_streams_are_kept_whole_and_read_one_after_the_other(vm, job):
    job.start("head -c 3000000 /dev/zero & head -c 3000000 /dev/zero >&2; wait")
    assert job.out() == bytes(3_000_000)
    assert job.err() == bytes(3_000_000)
    assert job.exit() == "0"


def test_a_cut_is_an_error_and_no_short_file(vm, job):
    write(job / "output_max", "64K\n")
    job.start("head -c 200000 /dev/zero; echo end >&2; exit 0")
    assert job.exit() == "0"
    assert job.err() == b"end\n"
    done = sh(f"cat '{job / 'stdout'}' | wc -c; cat '{job / 'stdout'}' >/dev/null", check=False)
    assert done.stdout == b"65536\n"
    assert done.returncode != 0 and b"too large" in done.stderr
    assert "output_max" in vm.error()


# Two of them use sendfile(2), in which the kernel takes an error for the end of the file.
COPIES = {
    "cat": 'cat "$J/stdout" > "$T"',
    "cp": 'cp "$J/stdout" "$T"',
    "install": 'install -m 644 "$J/stdout" "$T"',
    "dd": 'dd if="$J/stdout" of="$T" status=none',
    "rsync": 'rsync --inplace "$J/stdout" "$T"',
    "busybox cat": 'busybox cat "$J/stdout" > "$T"',
    "busybox cp": 'busybox cp "$J/stdout" "$T"',
    "busybox dd": 'busybox dd if="$J/stdout" of="$T" 2>&1',
    "shutil": "python3 -c 'import os, shutil; shutil.copyfile(os.environ[\"J\"] + \"/stdout\", os.environ[\"T\"])'",
}


@pytest.mark.parametrize("how", COPIES)
def test_no_tool_takes_a_cut_for_the_end(vm, job, tmp_path, how):
    write(job / "output_max", "64K\n")
    job.start("head -c 200000 /dev/zero")
    assert job.exit() == "0"
    done = sh(COPIES[how], J=job.path, T=str(tmp_path / "copy"), check=False)
    assert done.returncode != 0, done


@pytest.mark.parametrize("how", [name for name in COPIES if name not in ("rsync", "cp", "install")])
def test_a_reader_that_uses_sendfile_follows_a_running_job(vm, job, tmp_path, how):
    job.start("for i in 1 2 3 4 5; do echo $i; usleep 200000; done; head -c 70000 /dev/zero")
    sh(COPIES[how], J=job.path, T=str(tmp_path / "copy"))
    assert read_bytes(tmp_path / "copy") == b"1\n2\n3\n4\n5\n" + bytes(70000)
    assert job.exit() == "0"
    sh(COPIES[how], J=job.path, T=str(tmp_path / "again"))
    assert read_bytes(tmp_path / "again") == b"1\n2\n3\n4\n5\n" + bytes(70000)


def test_tail_shows_whole_lines_of_a_running_job(vm, job):
    job.start("for i in 1 2 3; do echo line $i; done; until [ -e /tmp/go-on ]; do usleep 20000; done; echo line 4")
    wait_for(lambda: os.stat(job / "stdout").st_size == 21, "three lines")
    for script, lines in (
        ('tail -n 1 "$F"', b"line 3\n"),
        ('tail -n 2 "$F"', b"line 2\nline 3\n"),
        ('wc -c < "$F"', b"21\n"),
    ):
        assert sh(script, F=job / "stdout", check=False).stdout == lines, script
    vm.ssh("touch /tmp/go-on")
    assert job.exit() == "0"
    assert sh('tail -n 1 "$F"', F=job / "stdout").stdout == b"line 4\n"
    vm.ssh("rm /tmp/go-on")


@pytest.mark.parametrize(
    "copy", ['cp -r "$J" "$T"', 'tar -C "$J/.." -cf - "${J##*/}" | tar -C "$T" -xf -', 'rsync -rt "$J" "$T/"', 'cp -a "$J" "$T"']
)
def test_a_job_that_has_ended_can_be_kept(vm, job, tmp_path, copy):
    write(job / "env/KEY", "value\n")
    job.start("echo out; echo err >&2; exit 3")
    assert job.exit() == "3"
    sh(f"set -o pipefail; {copy}", "bash", J=job.path, T=str(tmp_path))
    kept = tmp_path / job.name
    assert {name: (kept / name).read_bytes() for name in ("stdout", "stderr", "exit", "stdin", "signal", "env/KEY")} == {
        "stdout": b"out\n", "stderr": b"err\n", "exit": b"3\n", "stdin": b"", "signal": b"", "env/KEY": b"value\n"
    }  # fmt: skip


@pytest.mark.parametrize("cat", ["cat", "busybox cat"])
def test_exit_can_be_read_by_every_cat(vm, job, cat):
    job.start("sleep 1; exit 107")
    assert sh(f'{cat} "$J/exit"', J=job.path).stdout == b"107\n"
    assert sh(f'{cat} "$J/exit"', J=job.path).stdout == b"107\n"


def test_exec_can_be_followed_by_every_cat(vm):
    vm.ssh("rm -f /tmp/begun")
    script = 'echo "touch /tmp/begun; echo a; sleep 2; echo b" > "$F"'
    with Client(script, env={"F": str(vm / "exec"), "PATH": os.environ["PATH"]}) as client:
        vm.ssh("while ! [ -e /tmp/begun ]; do usleep 10000; done")
        assert sh('busybox cat "$F"', F=vm / "exec").stdout == b"a\nb\n"
        assert client.result(10)[0] == 0


def test_with_overflow_wait_the_reader_holds_the_command_back(vm, job):
    write(job / "output_max", "64K\n")
    write(job / "overflow", "wait\n")
    vm.ssh("rm -f /tmp/written")
    job.start("head -c 20000000 /dev/zero; touch /tmp/written")
    wait_for(lambda: os.stat(job / "stdout").st_size >= 65536, "there is output")
    size = os.stat(job / "stdout").st_size
    assert vm.ssh("[ -e /tmp/written ] || echo no") == b"no\n"
    assert os.stat(job / "stdout").st_size == size < 4 << 20
    assert len(job.out()) == 20_000_000
    assert job.exit() == "0"
    with refused("EOVERFLOW"):
        job.out()


# --- stdin ---


def test_input_may_come_before_and_after_the_start(vm):
    with Job(vm) as job:
        write(job / "stdin", b"early\n")
        assert job.start("cat").exit() == "0"
        assert job.out() == b"early\n"
    with Job(vm) as job:
        job.start("cat")
        with open(job / "stdin", "wb", buffering=0) as f, open(job / "stdout", "rb", buffering=0) as out:
            f.write(b"one\n")
            assert out.read(10) == b"one\n"
            f.write(b"two\n")
            assert out.read(10) == b"two\n"
        assert job.exit() == "0"


def test_input_ends_when_its_last_writer_has_closed_it(vm, job):
    job.start("cat; echo end")
    first = os.open(job / "stdin", os.O_WRONLY)
    second = os.open(job / "stdin", os.O_WRONLY)
    copy = os.dup(first)
    os.write(first, b"a")
    os.close(first)
    os.write(copy, b"b")
    os.close(copy)
    os.write(second, b"c")
    assert job.status() == "running"
    os.close(second)
    assert job.exit() == "0"
    assert job.out() == b"abcend\n"
    with refused("EPIPE"):
        write(job / "stdin", b"late")


def test_no_input_is_an_end_of_input(vm, job):
    job.start("cat; echo end")
    sh(f": > '{job / 'stdin'}'")
    assert job.exit() == "0"
    assert job.out() == b"end\n"


def test_much_input_arrives_whole(vm, job):
    data = os.urandom(3_000_000)
    job.argv("sha256sum")
    write_all(job / "stdin", data)
    assert job.exit() == "0"
    assert job.out().split()[0].decode() == hashlib.sha256(data).hexdigest()


def write_all(path, data):
    with open(path, "wb", buffering=0) as f:
        while data:
            data = data[f.write(data) :]


def test_a_writer_whose_command_does_not_read_is_held_back_and_can_be_killed(vm, job):
    job.start("sleep 1213")
    writer = ["sh", "-c", f"cat /dev/zero > '{job / 'stdin'}'"]
    with Client(writer) as client, Client(writer) as other:
        client.waits()
        other.waits()
        assert job.status() == "running"
        with takes_at_most(2, "killing"):
            for one in (client, other):
                one.signal(signal.SIGKILL)
                one.result(5)
    write(job / "signal", "KILL")


def test_a_writer_is_told_when_its_command_has_ended(vm, job):
    job.start("head -c 1 >/dev/null")
    status, _, errors = Client(["sh", "-c", f"cat /dev/zero > '{job / 'stdin'}'"]).result(20)
    assert status != 0 and "roken pipe" in errors
    assert job.exit() == "0"


def test_streams_cannot_be_written(vm, job):
    for name in ("stdout", "stderr", "exit", "status"):
        with refused("EPERM", "EACCES"):
            fd = os.open(job / name, os.O_WRONLY)
            try:
                os.write(fd, b"x")
            finally:
                os.close(fd)


# --- what it runs with ---


def test_its_own_variables_win_and_are_those_of_the_start(vm):
    write(vm.env("JOB_A"), "vm\n")
    write(vm.env("JOB_B"), "vm\n")
    try:
        with Job(vm) as job, Job(vm) as other:
            write(job / "env/JOB_A", "job\n")
            write(job / "env/JOB_C", "it's\n two\n\n")
            assert sorted(os.listdir(job / "env")) == ["JOB_A", "JOB_C"]
            job.start('printf "%s|%s|%s" "$JOB_A" "$JOB_B" "$JOB_C"')
            other.argv("sh", "-c", 'printf "%s|%s|%s" "$JOB_A" "$JOB_B" "${JOB_C-unset}"')
            assert job.exit() == other.exit() == "0"
            assert job.out() == b"job|vm|it's\n two\n"
            assert other.out() == b"vm|vm|unset"
            with refused("EBUSY"):
                write(job / "env/JOB_D", "late")
        assert not vm.is_set("JOB_C")
    finally:
        os.unlink(vm.env("JOB_A"))
        os.unlink(vm.env("JOB_B"))


def test_a_started_job_takes_no_change_of_its_variables(vm, job):
    write(job / "env/BEFORE", "x")
    fd = os.open(job / "env/BEFORE", os.O_WRONLY)
    assert job.start("echo $BEFORE").exit() == "0"
    try:
        with refused("EBUSY"):
            os.write(fd, b"y")
        with refused("EBUSY"):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    with refused("EBUSY"):
        write(job / "env/BEFORE", "y")
    with refused("EBUSY"):
        write(job / "env/AFTER", "y")
    with refused("EBUSY"):
        os.rename(job / "env/BEFORE", job / "env/AFTER")
    assert "started already" in read(job / "error")
    assert job.out() == b"x\n" and read(job / "env/BEFORE") == "x"


def test_a_variable_of_a_job_is_as_long_as_a_program_can_be_started_with(vm, job):
    most = 131072 - len("LONG=") - 1
    write(job / "env/LONG", b"x" * most + b"\n")
    with refused("EFBIG"):
        write(job / "env/LONG", b"x" * (most + 1))
    assert f"jobs/{job.name}/env/LONG" in vm.error() and str(most) in read(job / "error")
    write(job / "env/.tmp", b"x" * (most + 1))  # no variable yet
    with refused("EFBIG"):
        os.rename(job / "env/.tmp", job / "env/LONG")
    write(job / "env/LONG", b"x" * most + b"\n")
    assert job.argv("/bin/busybox", "env").exit() == "0"
    assert b"LONG=" + b"x" * most + b"\n" in job.out()


def test_tools_work_on_its_variables(vm, job):
    done = sh(
        f"cd '{job / 'env'}' && echo info > LEVEL && sed -i s/info/debug/ LEVEL && cp LEVEL COPY && mv COPY MOVED && "
        "printf x >> MOVED && echo y > GONE && rm GONE && ls && cat LEVEL MOVED"
    )
    assert done.stdout == b"LEVEL\nMOVED\ndebug\ndebug\nx"
    assert job.start('echo "$LEVEL $MOVED"').exit() == "0"
    assert job.out() == b"debug debug\nx\n"


@pytest.mark.parametrize("name", ["1A", "MY-VAR", "A.B"])
def test_variables_with_bad_names_are_refused(vm, job, name):
    with refused("EINVAL"):
        write(job / f"env/{name}", "x")


def test_a_variable_with_a_nul_refuses_the_start(vm, job):
    write(job / "env/A", b"x\0y")
    fd = os.open(job / "command", os.O_WRONLY)
    os.write(fd, b"true")
    with refused("EINVAL"):
        os.close(fd)
    assert job.status() == "new"
    assert "env/A" in vm.error()
    write(job / "env/A", b"xy")
    assert job.start("echo $A").exit() == "0"


def test_it_runs_in_its_directory(vm, job):
    write(job / "cwd", "/usr/share\n")
    assert read(job / "cwd") == "/usr/share\n"
    assert job.start("pwd").exit() == "0"
    assert job.out() == b"/usr/share\n"
    with Job(vm) as other:
        write(other / "cwd", "/no such folder")
        assert other.start("echo never").exit() == "1"
        assert other.out() == b"" and b"no such folder" in other.err()


def test_login_and_raw_shells(vm):
    # The variables of the VM win, wherever a login sets them.
    vm.ssh("echo 'export FROM_PROFILE=yes JOB_S=of-the-profile' > /etc/profile.d/z-job_test.sh")
    write(vm.env("JOB_S"), "set\n")
    try:
        for shell, expected in (("login", b"set yes\n"), ("raw", b"set no\n")):
            with Job(vm) as job:
                assert read(job / "shell") == "login\n"
                write(job / "shell", shell + "\n")
                assert job.start('echo "$JOB_S ${FROM_PROFILE-no}"').exit() == "0"
                assert job.out() == expected
    finally:
        vm.ssh("rm /etc/profile.d/z-job_test.sh")
        os.unlink(vm.env("JOB_S"))


@pytest.mark.parametrize(
    "name, good, shown, bad",
    [
        ("timeout", "90", "90", ["-1", "x", "1e3", "1 s", "99999999999"]),
        ("timeout", "1.5", "1.5", ["."]),
        ("output_max", "1M", "1048576", ["0", "1", "1X", "-1", "2T"]),
        ("overflow", "wait", "wait", ["block"]),
        ("shell", "raw", "raw", ["bash"]),
        ("cwd", "/tmp", "/tmp", ["tmp", "./x"]),
    ],
)
def test_values_are_checked_when_they_are_written(vm, job, name, good, shown, bad):
    default = read(job / name)
    write(job / name, good + "\n")
    assert read(job / name) == shown + "\n"
    assert os.stat(job / name).st_size == len(shown) + 1
    for value in bad:
        with refused("EINVAL"):
            write(job / name, value + "\n")
        assert f"{job.name}/{name}" in vm.error()
        assert read(job / name) == shown + "\n"
    sh(f": > '{job / name}'")
    wait_for(lambda: read(job / name) == default, "it has its default again")
    job.start("sleep 1214")
    if name != "timeout":
        with refused("EBUSY"):
            write(job / name, good)


# --- many of them ---


def test_there_are_not_more_than_1024_jobs(new_vm):
    vm = new_vm("many")
    for i in range(1024):
        os.mkdir(vm / f"jobs/j{i}")
    with refused("ENOSPC"):
        os.mkdir(vm / "jobs/more")
    os.rmdir(vm / "jobs/j0")
    os.mkdir(vm / "jobs/more")
    assert len(set(os.listdir(vm / "jobs")) - {".clone"}) == 1024
    numbers = [os.stat(vm / f"jobs/{name}").st_ino for name in os.listdir(vm / "jobs")]
    assert len(set(numbers)) == len(numbers)


def test_of_finished_jobs_256_are_kept_the_newest(new_vm):
    vm = new_vm("kept")
    os.mkdir(vm / "jobs/waiting")
    for i in range(260):
        Job(vm, f"f{i}").start("true")
    wait_for(lambda: read(vm / "jobs/f259/exit") == "0\n", "the last has ended", 60)
    wait_for(lambda: len(os.listdir(vm / "jobs")) == 256 + 2, "four have gone", 60)
    names = set(os.listdir(vm / "jobs"))
    assert "waiting" in names and "f259" in names and "f0" not in names


@pytest.mark.deadline(240)
def test_50_jobs_run_side_by_side(vm):
    jobs = [Job(vm) for _ in range(50)]
    for i, job in enumerate(jobs):
        job.start(f"echo here >> /tmp/fifty; while ! [ -e /tmp/go50 ]; do sleep 1; done; echo {i}; exit {i}")
    # All at once, or this never comes true.
    wait_for(lambda: vm.ssh("cat /tmp/fifty 2>/dev/null | wc -l").strip() == b"50", "all of them run", 120, 1)
    vm.ssh("touch /tmp/go50; rm /tmp/fifty")
    assert [job.exit() for job in jobs] == [str(i) for i in range(50)]
    assert [job.out() for job in jobs] == [b"%d\n" % i for i in range(50)]
    vm.ssh("rm /tmp/go50")
    for job in jobs:
        os.rmdir(job.path)


@pytest.mark.deadline(240)
def test_a_server_with_one_command_a_connection_says_when_there_is_no_place(new_vm):
    """dropbear, of which 64 connections are made at most: what finds no place is told so, and what is told to end before it
    has one does so at once."""
    vm = new_vm("crowded")
    jobs = [Job(vm).start("echo here >> /tmp/here; sleep 1300") for _ in range(70)]

    def started():
        return int(vm.ssh("cat /tmp/here 2>/dev/null | wc -l"))

    wait_for(lambda: started() == 64, "as many run as can", 150, 1)
    with Job(vm) as job:
        job.start("true")
        write(job / "signal", "TERM\n")
        assert job.exit() == "TERM"
    with refused("EBUSY"):
        write(vm / "exec", "true")
    assert "64 SSH connections" in vm.error() and "end some" in vm.error()
    for job in jobs:
        os.rmdir(job.path)
    write(vm / "exec", "true")


def test_a_job_of_clone_lives_as_long_as_clone_is_open(vm):
    def others():
        return set(os.listdir(vm / "jobs")) - {".clone"}

    before = others()
    script = f"exec 3<'{vm / 'jobs/.clone'}'; read -r n <&3; echo 'sleep 1215' > '{vm / 'jobs'}'/$n/command; echo $n; cat"
    with Client(["sh", "-c", script], stdin=subprocess.PIPE) as client:
        name = client.process.stdout.readline().decode().strip()
        assert others() == before | {name}
        runs_in_guest(vm, "sleep 1215")
        client.signal(signal.SIGKILL)
        client.result(10)
    wait_for(lambda: others() == before, "the job is gone")
    gone_in_guest(vm, "sleep 1215")


# --- the daemon's end ---


def test_jobs_that_have_ended_outlive_the_daemon_and_those_that_run_are_lost(daemon):
    one = daemon()
    vm = one.boot("keeper")
    small, big, failed, running, removed = (Job(vm, name) for name in ("small", "big", "failed", "running", "removed"))
    small.start("echo out; echo err >&2; exit 7")
    write(big / "output_max", "1M")
    big.start("head -c 2000000 /dev/zero | tr '\\000' x")
    failed.start("kill -KILL $$")
    assert (small.exit(), big.exit(), failed.exit()) == ("7", "0", "KILL")
    removed.start("true")
    assert removed.exit() == "0"
    folder = f"{one.state}/vms/keeper/jobs"

    def recorded(end):
        return [n for n in os.listdir(folder) if f'"end": "{end}"' in read(f"{folder}/{n}/job.json")]

    wait_for(lambda: len(os.listdir(folder)) == 4, "four are recorded")
    os.rmdir(removed.path)
    inode = os.stat(small / "exit").st_ino
    running.start("echo begun; sleep 1220")
    runs_in_guest(vm, "sleep 1220")
    wait_for(lambda: len(recorded("exited")) == 2 and recorded("signaled") and recorded("running"), "all is recorded")
    one.kill()
    one.start()
    vm.wait("running")
    assert sorted(set(os.listdir(vm / "jobs")) - {".clone"}) == ["big", "failed", "running", "small"]
    assert (small.exit(), small.out(), small.err(), small.status()) == ("7", b"out\n", b"err\n", "exited")
    assert read(small / "command") == "echo out; echo err >&2; exit 7"
    assert os.stat(small / "exit").st_ino == inode
    assert failed.exit() == "KILL"
    assert (big.exit(), os.stat(big / "stdout").st_size) == ("0", (1 << 20) + 1)  # so that cp meets the error
    done = sh(f"cat '{big / 'stdout'}' | wc -c; cat '{big / 'stdout'}' >/dev/null", check=False)
    assert done.stdout == b"1048576\n" and done.returncode != 0
    assert (running.exit(), running.status()) == ("lost", "exited")
    with refused("ECONNRESET"):
        running.out()
    with refused("EBUSY"):
        small.start("true")
    for job in (small, big, failed, running):
        os.rmdir(job.path)
    wait_for(lambda: os.listdir(folder) == [], "their files are gone")
    assert Job(vm, "small").start("echo anew").exit() == "0"


def test_an_end_that_was_told_is_known_to_the_next_daemon_whenever_the_first_was_killed(attached):
    vm = attached()
    for i in range(5):
        told, gone = Job(vm, f"told{i}"), Job(vm, f"gone{i}")
        for job in (told, gone):
            job.start("head -c 100000 /dev/zero | tr '\\000' x; exit 3")
        assert gone.exit() == "3"
        os.rmdir(gone.path)
        assert told.exit() == "3"
        vm.daemon.kill()
        vm.daemon.start()
        vm.wait("running")
        assert (told.exit(), len(told.out())) == ("3", 100000)
        assert not os.path.exists(gone.path)


def test_an_unmount_ends_what_runs(daemon):
    one = daemon()
    vm = one.boot("ending")
    Job(vm, "long").start("sleep 1221")
    with Client([vm / "run", "sleep", "1222"]), Client(f"echo 'sleep 1223' > '{vm / 'exec'}'"):
        for number in (1221, 1222, 1223):
            runs_in_guest(vm, f"sleep {number}")
        one.stop()
    one.start()
    vm.wait("running")
    for number in (1221, 1222, 1223):
        gone_in_guest(vm, f"sleep {number}")


# --- found in review ---


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_what_several_processes_write_is_one_command(vm, job, shell):
    sh(f"{{ echo 'echo 1'; /bin/echo 'echo 2'; echo 'echo 3'; }} > '{job / 'command'}'", shell)
    assert job.exit() == "0"
    assert job.out() == b"1\n2\n3\n"


@pytest.mark.parametrize("tool", ["cp {} {}", "install {} {}", "rsync {} {}", "dd if={} of={}"])
def test_a_cut_fails_the_tool_that_copies_it(vm, job, tmp_path, tool):
    write(job / "output_max", "64K")
    job.start("head -c 300000 /dev/zero")
    assert job.exit() == "0"
    assert sh(tool.format(f"'{job / 'stdout'}'", f"'{tmp_path}/copy'"), check=False).returncode != 0


@pytest.mark.parametrize("name", ["TERM", "KILL"])
def test_a_command_that_is_held_back_can_be_ended(vm, job, name):
    write(job / "overflow", "wait")
    write(job / "output_max", "64K")
    job.argv("yes")
    wait_for(lambda: os.stat(job / "stdout").st_size >= 65536, "it is held back")
    write(job / "signal", name)
    with takes_at_most(20, "its end"):
        assert job.exit() == name
    assert set(job.out()) == set(b"y\n")


def test_a_signal_right_after_the_start_is_sent(vm):
    jobs = [Job(vm) for _ in range(4)]
    for job in jobs:
        job.start("sleep 1216")
        write(job / "signal", "TERM")
    assert [job.exit() for job in jobs] == ["TERM"] * 4
    gone_in_guest(vm, "sleep 1216")
    for job in jobs:
        os.rmdir(job.path)


def test_a_job_has_its_own_error(vm, job):
    assert read(job / "error") == ""
    with refused("EINVAL"):
        write(job / "timeout", "soon")
    with refused("EINVAL"):
        write(vm.env("1A"), "x")
    assert "timeout" in read(job / "error") and "1A" not in read(job / "error")


def test_nothing_to_read_yet_is_eagain_when_asked_for(vm, job):
    job.start("sleep 1217")
    fd = os.open(job / "stdout", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with refused("EAGAIN"):
            os.read(fd, 10)
    finally:
        os.close(fd)


def test_the_shell_s_trace_shows_nothing_of_ours(vm, job):
    job.start("set -x; echo out; false")
    assert job.exit() == "1"
    assert b"vmsfs" not in job.err() and b"\x1e" not in job.err()


def test_a_lost_command_is_ended_when_the_guest_is_reached_again(new_vm):
    vm = new_vm("lostagain")
    with Job(vm) as job:
        job.start("sleep 1218")
        runs_in_guest(vm, "sleep 1218")
        vm.ssh("(usleep 300000; for p in $(pidof dropbear); do [ $p = $(cat /run/dropbear.pid) ] || kill -9 $p; done) >/dev/null 2>&1 &", check=False)
        vm.close()
        assert job.exit() == "lost"
        gone_in_guest(vm, "sleep 1218")


def test_what_a_killed_daemon_ran_is_ended_by_the_next(daemon):
    one = daemon()
    vm = one.boot("again")
    Job(vm, "old").start("sleep 1219")
    runs_in_guest(vm, "sleep 1219")
    one.kill()
    one.start()
    vm.wait("running")
    gone_in_guest(vm, "sleep 1219")
    assert read(vm / "jobs/old/exit") == "lost\n"


def test_the_rest_of_a_text_that_was_cut_is_no_command_of_its_own(vm):
    vm.ssh("rm -f /tmp/part")
    fd = os.open(vm / "exec", os.O_WRONLY)
    try:
        assert os.write(fd, b"true " + b"x" * 4091) == 4096
        with refused("EINVAL"):
            os.write(fd, b"touch /tmp/part\n")
    finally:
        os.close(fd)
    assert "one write is one command" in vm.error()
    assert vm.ssh("ls /tmp/part 2>/dev/null || echo none") == b"none\n"
