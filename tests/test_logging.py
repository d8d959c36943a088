"""The log: where it goes, its levels, one line for each request, and that no value is ever in it."""

import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import uuid

import pytest

from harness import (
    environment,
    read,
    read_bytes,
    refused,
    takes_at_most,
    wait_for,
    write,
)

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (error|warning|info|debug) \S.*")
REQUEST = re.compile(r"([A-Z_0-9]+) (/.*): (ok|\d+ bytes|E[A-Z0-9]+), \d+\.\d{3} ms, process \d+")
LIMIT = 1 << 20


def lines(text):
    """The words of each line, behind its time and level."""
    found = text.splitlines()
    for line in found:
        assert LINE.fullmatch(line), line
    return [line.split(" ", 2)[2] for line in found]


def requests(log):
    return [m.groups() for m in map(REQUEST.fullmatch, lines(read(log))) if m]


def with_log(argv, log=None):
    """The command in a mount namespace of its own, with this socket as the system's log, or none."""
    script = (
        "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9; "
        f"mknod -m 666 /dev/fuse c 10 229; {f'ln -s {log} /dev/log;' if log else ''}"
    )
    return ["unshare", "-m", "sh", "-ec", script + 'exec "$@"', "sh", *argv]


def in_namespace(one, log=None):
    """Has a daemon started in one. Returns where its mount is to be found."""
    argv = with_log(one.argv(), log)
    one.argv = lambda: argv
    one.detached = True
    one.start()
    return f"/proc/{one.pid}/root{one.mount}"


@pytest.fixture
def syslog(tmp_path):
    """A system's log: a socket, and what it is told."""
    path = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.settimeout(10)
        yield server, path


def test_the_foreground_logs_to_stderr_with_the_time_and_the_level(daemon):
    one = daemon()
    assert any(line.startswith(f"mounted on {one.mount}, with ") for line in lines(read(one.log)))
    assert requests(one.log) == []


@pytest.mark.parametrize("level, has", [("error", ""), ("warning", "w"), ("info", "wi"), ("debug", "wid")])
def test_a_level_has_what_is_as_grave_or_graver(daemon, level, has):
    one = daemon(f"log_level={level}")
    os.mkdir(one.mount + "/.new/a")
    with refused("EINVAL"):
        write(one.mount + "/.new/a/env/MY-VAR", "x")
    os.stat(one.mount + "/.new/a")
    one.stop()
    text = read(one.log)
    lines(text)
    assert (" warning a: env/MY-VAR: " in text) == ("w" in has)
    assert (" info mounted on " in text) == ("i" in has)
    assert (" debug LOOKUP /.new/a: ok" in text) == ("d" in has)


@pytest.mark.parametrize("flag", [["-d"], ["-o", "debug"]])
def test_d_is_the_foreground_with_all_that_there_is(daemon, flag):
    one = daemon(start=False)
    argv = one.argv()
    one.argv = lambda: argv + flag
    one.start()
    assert ("LOOKUP", "/none", "ENOENT") not in requests(one.log)
    assert not os.path.exists(one.mount + "/none")
    wait_for(lambda: ("LOOKUP", "/none", "ENOENT") in requests(one.log), "the request is logged")


def test_each_request_is_one_line_with_its_result(daemon):
    one = daemon("log_level=debug")
    a = one.mount + "/.new/a"
    os.mkdir(a)
    write(a + "/env/KEY", "twelve bytes")
    assert read(a + "/env/KEY") == "twelve bytes"
    os.rename(a + "/env/KEY", a + "/env/OTHER")
    os.unlink(a + "/env/OTHER")
    with refused("EINVAL"):
        write(a + "/env/1A", "x")
    os.rmdir(a + "/env")
    one.stop()
    found = requests(one.log)
    for line in (
        ("MKDIR", "/.new/a", "ok"),
        ("CREATE", "/.new/a/env/KEY", "ok"),
        ("WRITE", "/.new/a/env/KEY", "12 bytes"),
        ("READ", "/.new/a/env/KEY", "12 bytes"),
        ("RENAME", "/.new/a/env/KEY to /.new/a/env/OTHER", "ok"),
        ("UNLINK", "/.new/a/env/OTHER", "ok"),
        ("CREATE", "/.new/a/env/1A", "EINVAL"),
        ("RMDIR", "/.new/a/env", "ok"),
    ):
        number = sum((line[0], *line[1:]) == (f[0].removesuffix("2"), *f[1:]) for f in found)
        assert number == 1, (line, found)


def test_a_request_that_waits_is_logged_when_it_is_answered(daemon):
    one = daemon("log_level=debug")
    place = f"{one.mount}/.new/a"
    os.mkdir(place)
    # /.new/a is no VM yet, so a job of another, made without booting it, is not to be had: an interrupted write is.
    os.mkdir(f"{one.mount}/.new/b")
    os.rename(f"{one.mount}/.new/b", f"{one.mount}/b")
    client = subprocess.Popen(["sh", "-c", f"exec sh -c 'echo running > {one.mount}/b/status'"], stderr=subprocess.DEVNULL)
    wait_for(lambda: ("OPEN", "/b/status", "ok") in requests(one.log), "status is opened")
    assert not [r for r in requests(one.log) if r[:2] == ("WRITE", "/b/status")]
    client.send_signal(signal.SIGTERM)
    client.wait(timeout=20)
    wait_for(lambda: ("WRITE", "/b/status", "EINTR") in requests(one.log), "the write was interrupted")
    assert "debug INTERRUPT of WRITE /b/status" in read(one.log)


def test_a_name_cannot_forge_a_line(daemon):
    one = daemon("log_level=debug")
    assert not os.path.exists(one.mount + "/a\n2026-01-01T00:00:00.000Z error forged")
    wait_for(lambda: "\\x0a2026" in read(one.log), "the request is logged")
    lines(read(one.log))


def test_the_journal_is_given_priorities_and_no_time(daemon, tmp_path):
    one = daemon("log_level=debug", start=False)
    log = open(tmp_path / "stream", "wb")
    with log:
        st = os.fstat(log.fileno())
        env = environment({"JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino}"})
        process = subprocess.Popen([*one.argv(), "-f"], stdin=subprocess.DEVNULL, stderr=log, env=env)
    one.process, one.pid = process, process.pid
    stream = tmp_path / "stream"
    wait_for(lambda: "mounted on" in stream.read_text(), "the mount answers")
    os.mkdir(one.mount + "/.new/a")
    with refused("EINVAL"):
        write(one.mount + "/.new/a/env/MY-VAR", "x")
    one.stop()
    text = stream.read_text()
    assert f"<6>mounted on {one.mount}" in text and "<4>a: env/MY-VAR: " in text and "<7>MKDIR /.new/a: ok" in text
    assert all(re.match(r"<[3467]>\S", line) for line in text.splitlines()), text


def test_a_stderr_that_is_not_the_journals_stream_is_read_by_people(daemon):
    one = daemon(start=False)
    st = os.stat(one.path)  # of the same file system
    for stream in ("1:1", f"{st.st_dev}:{st.st_ino}", f"{st.st_dev}", ""):
        one.env = {"JOURNAL_STREAM": stream}
        one.start()
        one.stop()
        assert lines(read(one.log))


def told(server, pid, priority):
    """The next line that the system's log is told, without what it begins with."""
    form = r"<(\d+)>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d vmsfs\[(\d+)\]: (.*)"
    line = server.recv(65536).decode()
    found = re.fullmatch(form, line).groups()
    assert found[:2] == (str(3 << 3 | priority), str(pid)), line
    return found[2]


def test_the_background_tells_the_systems_log(daemon, syslog):
    one = daemon(start=False)
    server, path = syslog
    mount = in_namespace(one, path)
    assert read(one.log) == "", "who has started it is told nothing, as nothing is wrong"
    assert os.readlink(f"/proc/{one.pid}/fd/2") == "/dev/null"
    assert told(server, one.pid, 6).startswith(f"mounted on {one.mount}, with ")
    os.mkdir(mount + "/.new/a")
    with refused("EINVAL"):
        write(mount + "/.new/a/env/MY-VAR", "x")
    assert told(server, one.pid, 4).startswith("a: env/MY-VAR: ")
    assert not os.path.exists(one.state + "/log")


def test_what_is_found_wrong_before_the_mount_is_said_and_logged(daemon, syslog):
    one = daemon("log_level=debug", start=False)
    server, path = syslog
    os.makedirs(f"{one.state}/vms/a", 0o700)
    write(f"{one.state}/vms/a/vm.json", "{")
    in_namespace(one, path)
    said = [line for line in read(one.log).splitlines() if "could not be read" in line]
    assert len(said) == 1 and said[0].startswith("vmsfs: a: the record of a could not be read"), read(one.log)
    assert "mounted on" not in read(one.log)
    lines_told = []
    while not lines_told or not lines_told[-1].startswith("mounted on "):
        lines_told.append(server.recv(65536).decode().split("]: ", 1)[1])
    assert said[0].removeprefix("vmsfs: ") in lines_told


@pytest.mark.parametrize("where", ["background", "foreground"])
def test_a_start_that_fails_says_why_and_nothing_of_an_end(daemon, syslog, where):
    one = daemon()
    server, path = syslog
    other = f"{one.path}/other"
    os.mkdir(other)
    argv = [one.program, other, "-o", one.options, *(["-f"] if where == "foreground" else [])]
    done = subprocess.run(with_log(argv, path), env=environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert re.fullmatch(rf"vmsfs: .*{one.pid}.*\n(vmsfs: .*\n)*", done.stderr), done.stderr
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(65536)


def test_a_log_that_takes_nothing_holds_up_nobody(daemon, syslog):
    """Its queue is full, as nobody reads it: the rest goes to the file."""
    one = daemon("log_level=debug", start=False)
    mount = in_namespace(one, syslog[1])
    with takes_at_most(20, "500 requests"):
        for i in range(500):
            assert not os.path.exists(f"{mount}/n{i}")
    wait_for(lambda: "LOOKUP /n499: ENOENT" in read(one.state + "/log"), "the last is logged")


def test_without_a_system_log_there_is_a_file_for_the_owner(daemon):
    one = daemon(start=False)
    mount = in_namespace(one)
    os.mkdir(mount + "/.new/a")
    with refused("EINVAL"):
        write(mount + "/.new/a/env/MY-VAR", "x")
    log = one.state + "/log"
    first, second = lines(read(log))
    assert first.startswith(f"mounted on {one.mount}, with ") and second.startswith("a: env/MY-VAR: ")
    assert stat.S_IMODE(os.stat(log).st_mode) == 0o600
    assert os.readlink(f"/proc/{one.pid}/fd/2") == log


def test_the_file_is_put_aside_when_it_has_grown(daemon):
    one = daemon("log_level=debug", start=False)
    mount = in_namespace(one)
    log, before = one.state + "/log", one.state + "/log.1"
    name = "n" * 200
    for i in range(LIMIT * 5 // 2 // 250):
        assert not os.path.exists(f"{mount}/{name}{i}")
    wait_for(lambda: f"{name}{i}: ENOENT" in read(log), "the last is logged")
    for path in (log, before):
        assert os.stat(path).st_size <= LIMIT
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.stat(before).st_size > LIMIT - 1000
    assert sorted(n for n in os.listdir(one.state) if n.startswith("log")) == ["log", "log.1"]
    # The end of the one is followed by the start of the other.
    number = [int(re.search(r"n(\d+): ENOENT", line).group(1)) for line in (lines(read(before))[-1], lines(read(log))[0])]
    assert number[1] == number[0] + 1


# ---- values ----


class Secrets:
    def __init__(self):
        self.all = {}

    def new(self, where):
        # Short enough for parsers that quote what they stumble over.
        return self.all.setdefault(where, f"s3cret{uuid.uuid4().hex[:10]}")

    def found_in(self, data):
        data = data if isinstance(data, bytes) else data.encode()
        return [where for where, secret in self.all.items() if secret.encode() in data]


def try_to_write(path, text):
    """Whatever comes of it."""
    try:
        write(path, text)
    except OSError:
        pass


def use_settings(one, secret):
    """.defaults, .new, forward, config: accepted and refused."""
    write(one.mount + "/.defaults/env/IN_DEFAULTS", secret("defaults") + "\n")
    prepared = one.mount + "/.new/a"
    os.mkdir(prepared)
    write(prepared + "/env/PREPARED", secret("prepared"))
    for bad in (f"{secret('a line of forward')} x\n", f"FORWARDED={secret('a value in forward')}\n"):
        with refused("EINVAL"):
            write(prepared + "/forward", bad)
    write(prepared + "/forward", "FORWARDED\n")
    for name in os.listdir(prepared + "/config"):
        try_to_write(f"{prepared}/config/{name}", f" \x01{secret('config/' + name)}")
    write(prepared + "/config/boot_args", f"token={secret('accepted boot_args')}")
    move = subprocess.run(
        ["mv", prepared, one.vm("a")], env={**os.environ, "FORWARDED": secret("forwarded")}, capture_output=True
    )
    assert move.returncode == 0, move


def use_variables(vm, secret):
    write(vm.env("SET"), secret("env"))
    subprocess.run(["sh", "-c", f"printf %s {secret('a piece')} > {vm.env('PIECES')}; printf x >> {vm.env('PIECES')}"])
    subprocess.run(["sed", "-i", f"s/.*/{secret('sed')}/", vm.env("SET")], check=True)
    write(vm / "environ", f"A={secret('environ')}\nSET={secret('environ again')}\n")
    for bad in (
        f"A={secret('a good line')}\nB AD={secret('a bad line')}\n",
        f"A='{secret('an open quote')}",
        f"A=$(echo {secret('a substitution')})\n",
        f"{secret('a line without =')}\n",
    ):
        with refused("EINVAL"):
            write(vm / "environ", bad)
    with refused("EINVAL"):
        write(vm.env("NUL"), secret("a NUL") + "\0x")
    with refused("EFBIG"):
        write(vm.env("LARGE"), secret("too large") * 9000)
    try_to_write(vm / "status", secret("status"))
    os.rename(vm.env("A"), vm.env("MOVED"))
    assert vm.value("MOVED") == secret("environ").encode()


def use_commands(vm, secret):
    write(vm / "exec", f"echo {secret('a command')}; echo {secret('stderr')} >&2")
    with refused("EREMOTEIO"):
        write(vm / "exec", f"echo {secret('stderr of a failure')} >&2; exit 3 # {secret('a command that fails')}")
    assert vm.error().count("s3cret") == 3, "error quotes the command and what it said; the log does not"
    run = [vm / "run", "-e", f"E={secret('run -e')}", "sh", "-c", f"echo $E {secret('run')}; exit 4"]
    assert subprocess.run(run, capture_output=True).returncode == 4
    job = vm / "jobs/j"
    os.mkdir(job)
    write(job + "/env/J", secret("a job's env"))
    with refused("EINVAL"):
        write(job + "/timeout", secret("timeout"))
    with refused("EINVAL"):
        write(job + "/cwd", secret("cwd"))
    write(job + "/stdin", secret("stdin"))
    write(job + "/argv", f"sh\0-c\0cat; echo $J {secret('argv')}\0")
    assert read(job + "/exit") == "0\n"
    assert secret("stdin") in read(job + "/stdout")
    with refused("EBUSY", "EINVAL", "EPIPE", "ENOENT"):
        write(job + "/signal", secret("signal"))
    subprocess.run(["cat", vm / "exec"], capture_output=True)


def break_things(vm, secret):
    """Variables that cannot be set, a file that others have written, a guest that dies."""
    text = f"export GUEST='{secret('of the guest')}'\necho {secret('a line of the guest')} >/dev/null\nexport B='{secret('cut')}"
    vm.exec(f"printf %s {shlex.quote(text)} > /etc/profile.d/vmsfs_env.sh")
    try_to_write(vm.env("AFTER"), secret("after"))
    vm.ssh("mount -t tmpfs -o ro none /etc/profile.d")
    with refused("EIO", "EACCES", "ENOSPC", "EINVAL"):
        write(vm.env("CANNOT"), secret("cannot be set"))
    assert "env/" in vm.error() or "vmsfs_env.sh" in vm.error()
    os.kill(vm.qemu(), signal.SIGKILL)
    wait_for(lambda: vm.status() == "failed", "it has failed", 20)


def modes_of_what_holds(secrets, folder):
    """Files that somebody else could read, among those that hold a secret."""
    for where, _dirs, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            if not os.path.isfile(path) or os.path.islink(path):
                continue
            if secrets.found_in(read_bytes(path)):
                yield path, stat.S_IMODE(os.lstat(path).st_mode)


@pytest.mark.deadline(300)
def test_no_value_is_in_the_log_at_any_level_nor_where_others_can_read(daemon):
    secrets = Secrets()
    secret = secrets.new
    one = daemon("log_level=debug")
    use_settings(one, secret)
    vm = one.guest("a")
    vm.wait("running")
    assert vm.value("FORWARDED") == secret("forwarded").encode()
    for path in (f"/proc/{one.pid}/cmdline", f"/proc/{vm.qemu()}/environ"):
        assert secrets.found_in(read_bytes(path)) == []
    # What the kernel is given is seen by all who look at QEMU: no place for secrets, as the manual says.
    assert secrets.found_in(read_bytes(f"/proc/{vm.qemu()}/cmdline")) in ([], ["accepted boot_args"])
    use_variables(vm, secret)
    use_commands(vm, secret)
    break_things(vm, secret)

    # The parser of a damaged record stumbles over a value.
    one.kill()
    record = f"{one.state}/vms/a/vm.json"
    with open(record, "w", encoding="utf-8") as f:
        f.write('{"a" "' + secret("a damaged record") + '"')
    one.start()
    assert vm.status() == "failed"
    os.rmdir(vm.path)
    one.stop()

    log = read(one.log)
    assert secrets.found_in(log) == []
    assert "s3cret" not in log
    for name in ("env/NUL", "env/LARGE", "config/memory", "environ, line 2", "line 1 of forward", "the record of a could not be read"):
        assert name in log, name
    assert len(secrets.all) > 40
    assert "WRITE /a/jobs/j/env/J" in log and "WRITE /a/env/SET" in log


def test_what_a_vmm_says_of_a_setting_is_in_error_and_the_log_names_the_setting(daemon):
    one = daemon("log_level=debug")
    os.mkdir(one.mount + "/.new/a")
    write(one.mount + "/.new/a/config/cpu_model", "max,+s3cretfeature")
    os.rename(one.mount + "/.new/a", one.vm("a"))
    vm = one.guest("a")
    with refused("ENODEV"):
        write(vm / "status", "running")
    assert "s3cretfeature" in vm.error() and "config/cpu_model" in vm.error()
    os.rmdir(vm.path)
    one.stop()
    log = read(one.log)
    assert "s3cretfeature" not in log
    assert re.search(r"warning a: a did not boot: QEMU ended .*, and has words for config/cpu_model; .*\(in its `error`\)", log)


def test_what_holds_values_is_the_owners_alone(daemon):
    secrets = Secrets()
    one = daemon("log_level=debug")
    os.mkdir(one.mount + "/.new/p")
    write(one.mount + "/.new/p/env/P", secrets.new("prepared"))
    vm = one.boot("a")
    write(vm.env("SET"), secrets.new("env"))
    write(vm / "exec", f"echo {secrets.new('exec')}")
    os.mkdir(vm / "jobs/j")
    write(vm / "jobs/j/command", f"echo {secrets.new('job')}")
    assert read(vm / "jobs/j/exit") == "0\n"
    found = dict(wait_for(lambda: list(modes_of_what_holds(secrets, one.state)), "values are on the disk"))
    assert {mode for mode in found.values()} == {0o600}, found
    for folder in [one.state, *(w for w, _d, _f in os.walk(one.state))]:
        assert stat.S_IMODE(os.stat(folder).st_mode) & 0o077 == 0, folder
