"""Firecracker and Cloud Hypervisor: what is told to them, what they may answer, and what is left of it. By fakes that check
every request against the published specification (fakes/vmm.py); the other tests run on them with VMSFS_TEST_BACKEND."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess

import pytest

import harness
from harness import (
    IMAGES,
    PROGRAMS,
    TIMEOUT,
    Client,
    pid_alive,
    read,
    refused,
    runtime_dir,
    takes_at_most,
    wait_for,
    write,
)

BACKENDS = list(PROGRAMS)
START = 10  # s that the daemon gives a VMM for its start
# In the order in which they come; a disk and a tap only if there is one.
BOOT = {
    "firecracker": ["GET /", "PUT /machine-config", "PUT /boot-source", "PUT /vsock", "PUT /entropy", "PUT /actions InstanceStart"],
    "cloud_hypervisor": ["GET /vmm.ping", "PUT /vm.create", "PUT /vm.boot"],
}
TITLES = {"firecracker": "Firecracker", "cloud_hypervisor": "Cloud Hypervisor"}
PAUSE = {"firecracker": "PATCH /vm", "cloud_hypervisor": "PUT /vm.pause"}
RESUME = {"firecracker": "PATCH /vm", "cloud_hypervisor": "PUT /vm.resume"}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_request = pytest.mark.parametrize("backend, request_", [(b, r) for b in BACKENDS for r in BOOT[b]])


@pytest.fixture
def host(daemon):
    """A daemon with these fakes, and with VMs in the first of them."""

    def make(*backends, options="", **kwargs):
        kwargs.setdefault("env", {"VMSFS_BACKEND": backends[0]})
        return daemon(options, fakes=backends, **kwargs)

    return make


def fake_of(guest, backend):
    return guest.daemon.fakes[backend]


def fails_to_boot(one, name="x", seconds=START + 5):
    """Makes a VM that will not boot, and returns its words. Nothing may be left but its folder."""
    guest = one.guest(name)
    os.mkdir(guest.path)
    if guest.status() == "booting":
        with refused("ENODEV"), takes_at_most(seconds, "the failure"):
            write(guest / "status", "running")
    assert guest.status() == "failed"
    wait_for(lambda: not one.qemus(), "the VMM is gone")
    wait_for(lambda: sockets(one) == [], "its sockets are gone")
    error = guest.error()
    os.rmdir(guest.path)
    wait_for(lambda: one.remains() == [], "nothing is left")
    return error


def sockets(one):
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(runtime_dir(one.state))
    return []


def test_the_requests_of_a_boot_and_their_order(host):
    for backend in BACKENDS:
        one = host(backend)
        guest = one.boot("box")
        lines = [line.split(" ", 2) for line in one.fake().requests()]
        calls = [f"{method} {path.removeprefix('/api/v1')}" for method, path, _ in lines]
        while calls[1] == calls[0]:
            del calls[0]
        assert calls == [call.removesuffix(" InstanceStart") for call in BOOT[backend]]
        assert guest.exec("echo hello from $(hostname)") == b"hello from box\n"


# What it is given, and words of the fault; None: it is right.
WRONG = {
    "firecracker": [
        ("PUT", "/machine-config", {"vcpu_count": 3, "mem_size_mib": 64, "smt": True}, "even number when SMT is enabled"),
        ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 64}, "more than 32"),
        ("PUT", "/machine-config", {"vcpu_count": 1}, "no mem_size_mib"),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "max"}, "cpu_template"),
        ("PUT", "/machine-config", "{", "Expecting"),
        ("PUT", "/drives/a", {"drive_id": "b", "is_root_device": False}, "drive_id is 'b'"),
        ("PUT", "/machine-config", {"vcpu_count": 3, "mem_size_mib": 64}, None),
        ("PUT", "/actions", {"action_type": "InstanceStart"}, "InstanceStart without /boot-source"),
        ("PUT", "/nothing", {}, "there is no PUT /nothing"),
    ],
    "cloud_hypervisor": [
        ("GET", "/vmm.ping", None, None),
        ("PUT", "/vm.create", {"cpus": {"boot_vcpus": 1, "max_vcpus": 1}}, "no payload"),
        ("PUT", "/vm.create", {"payload": {"cmdline": "console"}, "memory": {"size": "1"}}, "no integer"),
        ("PUT", "/vm.create", "{", "Expecting"),
        ("PUT", "/nothing", {}, "there is no PUT"),
    ],
}


@each_backend
def test_a_fake_refuses_what_it_notes(tmp_path, backend):
    """As the real one does, and in its words: what is wrong shows in the daemon, too."""
    fake = harness.Fake(str(tmp_path), backend)
    socket_path = str(tmp_path / "s")
    (tmp_path / "log").touch()
    arguments = {
        "firecracker": ["--id", "x", "--api-sock", socket_path, "--log-path", tmp_path / "log"],
        "cloud_hypervisor": ["--api-socket", f"path={socket_path}", "--event-monitor", f"path={tmp_path}/events"],
    }[backend]
    process = subprocess.Popen([os.path.join(fake.bin, fake.program), *arguments], stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: os.path.exists(socket_path), "it listens")
        for method, path, body, words in WRONG[backend]:
            noted = len(fake.violations())
            text = body if isinstance(body, str) else None if body is None else json.dumps(body)
            connection = http.client.HTTPConnection("localhost")
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            wait_for(lambda c=connection: c.sock.connect_ex(socket_path) == 0, "it takes connections")
            connection.request(method, ("/api/v1" if backend == "cloud_hypervisor" else "") + path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = json.loads(answer.read() or "null")
            connection.close()
            if words is None:
                assert answer.status < 300 and len(fake.violations()) == noted
                continue
            assert answer.status == (404 if "nothing" in path and backend == "cloud_hypervisor" else 400)
            said = said["fault_message"] if backend == "firecracker" else ": ".join(said)
            assert words in said
            assert "SMT" in words or len(fake.violations()) > noted
    finally:
        process.kill()
        process.wait(timeout=10)


def test_firecracker_has_odd_numbers_of_cpus(host):
    """Only with SMT, which is not asked for, it would want an even number."""
    one = host("firecracker", options="vcpus=3")
    one.boot("box")
    assert '"vcpu_count":3' in " ".join(one.fake().requests())


@each_backend
def test_what_a_machine_is_told_is_what_is_configured(host, backend):
    one = host(backend, options="vcpus=2,memory=192,disk=32,boot_args=loglevel=7")
    guest = one.boot("box")
    told = " ".join(one.fake().requests())
    wanted = {
        "firecracker": ['"vcpu_count":2', '"mem_size_mib":192', '"is_root_device":false', '"cache_type":"Writeback"'],
        "cloud_hypervisor": ['"boot_vcpus":2', f'"size":{192 << 20}', '"image_type":"Raw"'],
    }[backend]
    for text in [*wanted, "loglevel=7", f"{one.state}/vms/box/disk.img", f"{IMAGES}/tiny/vmlinux"]:
        assert text in told
    info = guest.info()
    assert info["backend"] == backend and info["accelerator"] == "kvm" and pid_alive(info["pid"])


@each_request
@pytest.mark.parametrize("fault", ["400", "text", "die", "garbage", "half", "flood"])
def test_a_boot_that_goes_wrong_says_how_and_leaves_nothing(host, backend, request_, fault):
    one = host(backend)
    one.fake().do_wrong(**{request_: fault})
    error = fails_to_boot(one)
    if fault == "die":
        assert "fake: it dies in the middle" in error and "exit status 1" in error
        return
    name = request_.removesuffix(" InstanceStart").replace(" /v", " /api/v1/v" if backend == "cloud_hypervisor" else " /v")
    assert name in error and TITLES[backend] in error
    assert {
        "400": "with status 400", "text": "with status 500", "garbage": "no HTTP", "half": "closed before",
        "flood": "has more than 1048576 bytes",
    }[fault] in error  # fmt: skip
    assert "\x1b" not in error
    said = {"400": "the fake was told to refuse: as it was asked to", "text": "plain words about what is wrong"}.get(fault)
    if said:
        # What it has said may quote what it was told: no business of the log.
        assert f"It said: {'Error from API: ' if (fault, backend) == ('400', 'cloud_hypervisor') else ''}{said}" in error
        log = read(one.log)
        assert said not in log and f"{name}: it was refused with status" in log and "(in its `error`)" in log


@each_backend
@pytest.mark.parametrize("what", ["no answer", "no socket"])
def test_a_vmm_that_hangs_at_its_start_is_ended_in_time(host, backend, what):
    one = host(backend)
    request_ = BOOT[backend][2]
    one.fake().do_wrong(**({request_: "hang"} if what == "no answer" else {"start": "hang"}))
    with takes_at_most(START + 3, "the failure"):
        error = fails_to_boot(one)
    assert ("no answer within" if what == "no answer" else "nobody listens on") in error


@each_backend
def test_a_vmm_that_is_slow_to_take_connections_is_waited_for(host, backend):
    one = host(backend)
    one.fake().do_wrong(start="crowded")
    guest = one.guest("box")
    os.mkdir(guest.path)
    wait_for(lambda: sockets(one), "it listens")
    with Client(["sh", "-c", 'echo running > "$1"', "sh", guest / "status"]) as client:
        client.waits()
        assert guest.status() == "booting" and one.fake().requests() == []
        one.fake().do_wrong()
        assert client.result(10)[0] == 0


@each_backend
def test_a_vmm_that_takes_no_connections_is_no_vmm_that_does_not_listen(host, backend):
    one = host(backend)
    one.fake().do_wrong(start="crowded")
    with takes_at_most(START + 3, "the failure"):
        error = fails_to_boot(one)
    assert "it takes no connections" in error and "nobody listens" not in error


@each_backend
def test_a_vsock_that_is_slow_to_take_connections_is_waited_for(host, backend):
    """As many connections as the guest has are not made by one who gives up at the first full queue."""
    one = host(backend)
    one.fake().do_wrong(vsock="crowded")
    guest = one.boot("box")
    with Client(f"echo true > {guest / 'exec'}") as client:
        client.waits()
        one.fake().do_wrong()
        assert client.result(10) == (0, b"", "")
    one.stop()
    one.fake().do_wrong(vsock="crowded")
    one.start()
    wait_for(lambda: guest.status() == "running", "it was adopted")
    with refused("ETIMEDOUT"):
        write(guest / "exec", "true")
    assert "it takes no connections" in guest.error()


@each_backend
def test_a_vmm_that_cannot_start_is_quoted(host, backend):
    one = host(backend)
    one.fake().do_wrong(start="die")
    with takes_at_most(3, "the failure"):
        assert "fake: it cannot start today" in fails_to_boot(one)


@each_backend
@pytest.mark.parametrize("how", ["says so", "ends without a word", "hangs"])
def test_what_to_do_about_a_kvm_that_boots_nothing(host, backend, how):
    one = host(backend, boot_timeout=2)
    one.fake().do_wrong(**{"says so": {"start": "no kvm"}, "ends without a word": {BOOT[backend][-1]: "end"}, "hangs": {"vsock": "refuse"}}[how])
    error = fails_to_boot(one)
    assert "VMSFS_KVM=no in the daemon's environment" in error and "qemu in config/backend" in error
    assert ("Cannot open /dev/kvm" in error) == (how == "says so")
    # Nor is it at fault for everything.
    one.fake().do_wrong(start="die")
    assert "VMSFS_KVM" not in fails_to_boot(one)


@each_backend
@pytest.mark.parametrize("faults", [{"start": "late"}, "slow", {"vsock": "slow"}], ids=["late", "slow", "slow vsock"])
def test_slowness_is_no_failure(host, backend, faults):
    one = host(backend)
    one.fake().do_wrong(**({request_: "slow" for request_ in BOOT[backend]} if faults == "slow" else faults))
    assert one.boot("box").exec("echo $((6 * 7))") == b"42\n"


@each_backend
@pytest.mark.parametrize("fault", ["refuse", "garbage", "hang"])
def test_a_guest_that_is_not_there_yet_is_tried_again(host, backend, fault):
    one = host(backend)
    one.fake().do_wrong(vsock=fault)
    guest = one.guest("box")
    os.mkdir(guest.path)
    wait_for(lambda: guest.info().get("vsock_port"), "the VMM runs")
    with Client(["sh", "-c", 'echo running > "$1"', "sh", guest / "status"]) as client:
        client.waits()
        assert guest.status() == "booting"
        one.fake().do_wrong()
        assert client.result(10)[0] == 0


@each_backend
def test_a_guest_that_never_answers_fails_with_words_about_the_vsock(host, backend):
    one = host(backend, boot_timeout=2)
    one.fake().do_wrong(vsock="refuse")
    assert "could not be reached by SSH within 2 s" in fails_to_boot(one)


@each_backend
def test_pausing_that_is_refused_or_not_answered(host, backend):
    one = host(backend)
    guest = one.boot("box")
    one.fake().do_wrong(**{PAUSE[backend]: "400"})
    with refused("EIO"):
        write(guest / "status", "paused")
    assert guest.status() == "running" and "the fake was told to refuse" in guest.error()
    one.fake().do_wrong(**{PAUSE[backend]: "hang"})
    with refused("ETIMEDOUT"), takes_at_most(7, "the failure"):
        write(guest / "status", "paused")
    assert guest.status() == "running" and "no answer within 5000 ms" in guest.error()
    one.fake().do_wrong()
    write(guest / "status", "paused")
    one.fake().do_wrong(**{RESUME[backend]: "text"})
    with refused("EIO"):
        write(guest / "status", "running")
    assert guest.status() == "paused"
    one.fake().do_wrong()
    write(guest / "status", "running")
    assert guest.exec("echo on") == b"on\n"


@each_backend
def test_what_is_set_while_it_is_being_paused_is_known_to_a_later_daemon(host, backend):
    """Which cannot ask a guest that stands still."""
    one = host(backend)
    guest = one.boot("box")
    write(guest.env("KEY"), "old\n")
    one.fake().do_wrong(**{PAUSE[backend]: "hang"})
    with Client('echo paused > "$F"', env={"F": guest / "status", "PATH": os.environ["PATH"]}) as client:
        wait_for(lambda: PAUSE[backend] in " ".join(one.fake().requests()).replace("/api/v1", ""), "it is asked to pause")
        write(guest.env("KEY"), "new\n")
        one.kill()
        client.result(10)
    one.fake().do_wrong()
    one.start()
    wait_for(lambda: guest.status() == "paused", "it is paused after all")
    assert read(guest.env("KEY")) == "new\n"
    write(guest / "status", "running")
    assert guest.value("KEY") == b"new"


@each_backend
@pytest.mark.parametrize("fault", ["hang", "400", "die"])
def test_a_vmm_that_does_not_obey_any_more_is_ended(host, backend, fault):
    one = host(backend, options="stop_timeout=1")
    guest = one.boot("box")
    pid = guest.qemu()
    one.fake().do_wrong(**{"PUT /actions SendCtrlAltDel": fault, "PUT /vm.power-button": fault, "PUT /vmm.shutdown": fault})
    with takes_at_most(5, "echo stopped > status"):
        write(guest / "status", "stopped")
    assert guest.status() == "stopped" and not pid_alive(pid)
    assert sockets(one) == []
    one.fake().do_wrong()
    write(guest / "status", "running")


@each_backend
def test_a_paused_vm_is_stopped_in_order(host, backend):
    guest = host(backend).boot("box")
    guest.ssh("(trap 'echo it was told to end >/dev/console; exit' TERM; while :; do usleep 20000; done) >/dev/null 2>&1 &")
    guest.close()
    write(guest / "status", "paused")
    write(guest / "status", "stopped")
    assert "it was told to end" in read(guest / "console")


@each_backend
def test_death_is_seen_at_once_and_its_sockets_go(host, backend):
    one = host(backend)
    guest = one.boot("box")
    assert sockets(one)
    with Client('echo "sleep 1000" > "$F"', env={"F": guest / "exec"}) as client:
        client.waits()
        os.kill(guest.qemu(), signal.SIGKILL)
        with takes_at_most(1, "the death"):
            assert client.result(5)[0] != 0
            wait_for(lambda: guest.status() == "failed", "it is seen")
    assert "SIGKILL" in guest.error() and TITLES[backend] in guest.error()
    assert sockets(one) == []


@each_backend
@pytest.mark.parametrize("request_", ["first", "last"])
def test_a_daemon_that_is_killed_in_the_middle_of_a_boot_boots_anew(host, backend, request_):
    """Nobody knows how far the machine has come: what was left is ended."""
    one = host(backend)
    one.fake().do_wrong(**{BOOT[backend][1 if request_ == "first" else -1]: "hang"})
    guest = one.guest("box")
    os.mkdir(guest.path)
    write(guest.env("EARLY"), "e\n")
    (pid,) = wait_for(lambda: [guest.info()["pid"]] if guest.info().get("pid") else None, "the VMM is there")
    wait_for(lambda: len(one.fake().requests()) >= 2, "it was told something")
    one.kill()
    one.fake().do_wrong()
    assert pid_alive(pid)
    # Who only looks at its files, and a VMM whose paths end like these, are nobody's to end.
    words = [f"{one.state}/vms/box/events.log", f"path=/elsewhere{one.state}/vms/box/events.log"]
    bystanders = [subprocess.Popen(["sh", "-c", "read line", "sh", word], stdin=subprocess.PIPE) for word in words]
    try:
        one.start()
        wait_for(lambda: not pid_alive(pid), "what was left is ended")
        assert [bystander.poll() for bystander in bystanders] == [None, None]
    finally:
        for bystander in bystanders:
            bystander.communicate(b"\n", timeout=20)
    guest.wait("running")
    assert guest.value("EARLY") == b"e" and len(one.qemus()) == 1


@each_backend
def test_a_daemon_that_ends_in_the_middle_of_a_boot_leaves_no_half_machine(host, backend):
    one = host(backend)
    one.fake().do_wrong(**{BOOT[backend][1]: "hang"})
    guest = one.guest("box")
    os.mkdir(guest.path)
    wait_for(lambda: len(one.fake().requests()) >= 2, "it was told something")
    one.stop()
    wait_for(lambda: not one.qemus(), "the VMM is gone")
    one.fake().do_wrong()
    one.start()
    guest.wait("running")


@each_backend
def test_a_vmm_that_answers_nobody_is_adopted_as_long_as_its_guest_does(host, backend):
    one = host(backend)
    guest = one.boot("box")
    pid = guest.qemu()
    one.stop()
    one.fake().do_wrong(**{BOOT[backend][0]: "hang"})
    one.start(seconds=START + 20)
    wait_for(lambda: guest.status() == "running", "it runs for the new daemon", START + 5)
    assert guest.qemu() == pid and guest.exec("echo here") == b"here\n"


@each_backend
def test_a_guest_that_resets_has_ended(host, backend):
    """Firecracker ends with it. Cloud Hypervisor would boot it again, with variables of long ago."""
    one = host(backend)
    guest = one.boot("box")
    pid = guest.qemu()
    guest.ssh("reboot", check=False)
    guest.close()
    state = "stopped" if backend == "firecracker" else "failed"
    wait_for(lambda: guest.status() == state, "it has ended")
    assert not pid_alive(pid)
    assert "echo running > status" in guest.error()
    if backend == "cloud_hypervisor":
        assert "restarted" in guest.error()


@pytest.mark.parametrize("how", ["many", "halves", "truncated", "replaced"])
def test_a_reset_is_seen_however_much_was_noted_before(host, how):
    """Cloud Hypervisor notes it in a file that grows as long as it runs."""
    one = host("cloud_hypervisor")
    guest = one.boot("box")
    events = os.path.join(one.state, "vms", "box", "events.log")
    one.fake().do_wrong(events=how)
    if how == "replaced":
        guest.ssh("true")
        text = read(events)
        for words in ("resumed", "rebooting"):  # the second replaces what has replaced it
            write(events + ".new", text + json.dumps({"source": "vm", "event": words}))
            os.rename(events + ".new", events)
            if words == "resumed":
                assert guest.exec("echo on") == b"on\n" and guest.status() == "running"
    elif how == "truncated":
        os.truncate(events, 0)
        assert guest.exec("echo on") == b"on\n"
        with open(events, "a", encoding="ascii") as f:
            f.write('"rebooting"')
    else:
        guest.ssh("reboot", check=False)
    guest.close()
    wait_for(lambda: guest.status() == "failed", "it has ended")
    assert "restarted" in guest.error()


@each_backend
def test_a_panic_is_named(host, backend):
    one = host(backend)
    guest = one.boot("box")
    write(os.path.join(one.fake().path, "guests", str(guest.qemu()), "sysrq"), "c")
    wait_for(lambda: guest.status() == "failed", "it has failed")
    assert "panicked" in guest.error()


@each_backend
def test_a_guest_that_powers_off_without_a_daemon_is_stopped(host, backend):
    one = host(backend)
    guest = one.boot("box")
    pid = guest.qemu()
    one.stop()
    one.start()
    wait_for(lambda: guest.status() == "running", "it was adopted")
    guest.ssh("poweroff", check=False)  # its parent is no more: nobody tells the exit status
    guest.close()
    wait_for(lambda: guest.status() == "stopped", "it has ended")
    assert not pid_alive(pid)


@each_backend
def test_logs_and_console_are_private_files(host, backend):
    one = host(backend)
    guest = one.boot("box")
    folder = os.path.join(one.state, "vms", "box")
    logs = {"serial.log", "vmm.log", {"firecracker": "firecracker.log", "cloud_hypervisor": "events.log"}[backend]}
    assert logs <= set(os.listdir(folder))
    for name in logs:
        assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600
    assert "SSH server is ready" in read(guest / "console")
    # Whoever truncates it gets no hole before what is written next.
    os.truncate(os.path.join(folder, "serial.log"), 0)
    guest.ssh("echo after that >/dev/console")
    wait_for(lambda: "after that" in read(guest / "console"), "the line is on the console")
    assert "\0" not in read(guest / "console")


@each_backend
def test_openssh_uses_the_vsock(host, backend, tmp_path):
    guest = host(backend).boot("box")
    assert "ProxyCommand" in read(guest / "ssh_config")
    big = os.urandom(3 << 20)
    (tmp_path / "big").write_bytes(big)
    options = ["-F", guest / "ssh_config"]
    subprocess.run(["scp", "-q", *options, tmp_path / "big", "box:/tmp/big"], check=True, timeout=30)
    subprocess.run(["scp", "-q", *options, "box:/tmp/big", tmp_path / "back"], check=True, timeout=30)
    assert (tmp_path / "back").read_bytes() == big
    done = subprocess.run(["ssh", *options, "box", "cat; exit 3"], input=big, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (3, big)
    write(guest / "status", "stopped")
    assert subprocess.run(["scp", *options, "box:/tmp/big", tmp_path / "again"], capture_output=True, timeout=30).returncode == 255


def test_ssh_to_a_vm_without_an_address_says_why_and_goes_nowhere(host, tmp_path):
    """Not to a host of this name, were there one: `localhost` is."""
    one = host("firecracker")
    one.fake().do_wrong(start="hang")
    guest = one.guest("localhost")

    def ssh(**env):
        argv = ["ssh", "-F", guest / "ssh_config", "localhost", "true"]
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, text=True, env={**os.environ, **env}
        )
        return done.returncode, done.stdout, done.stderr

    os.mkdir(guest.path)
    assert guest.status() == "booting"
    assert ssh() == (255, "", "vmsfs: localhost is booting: `echo running > status` waits until it runs\n")
    os.kill(wait_for(lambda: guest.info().get("pid"), "the VMM is there"), signal.SIGKILL)
    wait_for(lambda: guest.status() == "failed", "it has failed")
    failed = (255, "", "vmsfs: localhost is failed: its `error` says why, `echo running > status` starts it again\n")
    assert ssh() == failed
    # Whatever shell ssh has it run by.
    for shell in ("bash", "dash", "zsh", "ksh"):
        assert ssh(SHELL=shutil.which(shell)) == failed
    one.fake().do_wrong()
    write(guest / "status", "running")
    assert ssh()[0] == 0


def test_connect_says_what_is_wrong(host, tmp_path):
    one = host("firecracker")
    guest = one.boot("box")
    vsock = guest.info()["vsock_socket"]

    def connect(*arguments):
        done = subprocess.run([harness.VMSFS, "--connect", *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "No such file" in connect(str(tmp_path / "none"), "22")
    assert "no port" in connect(vsock, "ssh")
    assert "No such file" in connect("/" + "x" * 200, "22")
    one.fake().do_wrong(vsock="refuse")
    assert "does not answer" in connect(vsock, "22")


# ---- which backend ----


def why_none(place, *options, env=None, fakes=(), change=None):
    """Starts a daemon that cannot; returns what it says."""
    one = harness.Daemon(",".join(options), fakes=fakes)
    try:
        if change:
            change(one)
        done = subprocess.run(
            one.argv() + ["-f"], capture_output=True, timeout=30, env=harness.environment({**one.env, **(env or {})}), text=True
        )
        assert done.returncode != 0
        return done.stderr
    finally:
        one.clear()


@each_backend
def test_a_named_backend_that_cannot_work_says_what_is_missing(tmp_path, backend):
    program = PROGRAMS[backend]
    here = {"fakes": [backend]}
    assert f"there is no {program} in PATH" in why_none(tmp_path, f"backend={backend}", env={"VMSFS_KVM": "yes"})
    why = why_none(tmp_path, f"backend={backend}", env={"VMSFS_KVM": "no"}, **here)
    assert "needs KVM" in why and "VMSFS_KVM=no" in why
    for script, words in {
        f'echo "{program} v0.9.1"': "version 0.9, and it has to be",
        'echo "something else"': "--version does not work",
        "exit 3": "--version does not work",
    }.items():
        install = lambda one, script=script: one.fakes[backend].install(f"#!/bin/sh\n{script}\n")  # noqa: E731
        assert words in why_none(tmp_path, f"backend={backend}", change=install, **here)


def test_auto_takes_the_first_that_works_and_says_why(host):
    for fakes, backend, words in (
        (BACKENDS, "firecracker", "Firecracker 1.10 with KVM"),
        (["cloud_hypervisor"], "cloud_hypervisor", "not firecracker: there is no firecracker in PATH"),
    ):
        one = host(*fakes, env={})
        info = one.boot("box").info()
        assert info["backend"] == backend and words in info["backend_note"]


@pytest.mark.parametrize(
    "settings, backend, words",
    [
        ({"vcpus": "33"}, "cloud_hypervisor", "not firecracker: it has 32 CPUs at most"),
        ({"vcpus": "32"}, "firecracker", "with KVM"),
        ({"cpu_model": "T2"}, "firecracker", "with KVM"),
        ({"cpu_model": "max"}, "qemu", "not firecracker: config/cpu_model is none of its templates"),
        ({"cpu_model": "max", "vcpus": "64"}, "qemu", "not cloud_hypervisor: it has no use for config/cpu_model"),
        ({"tap": "lo"}, "firecracker", "with KVM"),
        ({"tap": "lo", "vcpus": "64"}, "cloud_hypervisor", "not firecracker: it has 32 CPUs at most"),
    ],
)
def test_auto_takes_the_first_that_can_do_what_is_asked(host, settings, backend, words):
    one = host(*BACKENDS, env={})
    guest = one.guest("box")
    os.mkdir(one.vm(".new/box"))
    for name, value in settings.items():
        write(one.vm(f".new/box/config/{name}"), value)
    os.rename(one.vm(".new/box"), guest.path)
    info = wait_for(lambda: guest.info() if guest.info()["backend"] != "auto" else None, "it was decided", 20)
    assert info["backend"] == backend and words in info["backend_note"]


def test_what_none_can_do_is_said_of_each(host, tmp_path):
    one = host(*BACKENDS, env={})
    os.mkdir(one.vm(".new/x"))
    write(one.vm(".new/x/config/cpu_model"), "no-such-cpu")
    write(one.vm(".new/x/config/tap"), "lo")
    with refused("ENODEV"):
        os.rename(one.vm(".new/x"), one.vm("x"))
    error = read(one.vm(".new/x/error"))
    for words in (
        "no backend here can boot this",
        "not firecracker: config/cpu_model is none of its templates",
        "not cloud_hypervisor: it has no use for config/cpu_model",
        "not qemu: it has no use for config/tap (empty it), it knows no such CPU as in config/cpu_model",
    ):
        assert words in error
    assert "no-such-cpu" not in error
    os.rmdir(one.vm(".new/x"))
    # In a VM that is made at once, and as the defaults of a mount.
    write(one.vm(".defaults/config/cpu_model"), "no-such-cpu")
    write(one.vm(".defaults/config/backend"), "qemu")
    assert "qemu cannot boot this: it knows no such CPU" in fails_to_boot(one)
    assert "no backend here can boot this: not firecracker" in why_none(tmp_path, "jail_user=nobody", env={"VMSFS_KVM": "no"}, fakes=BACKENDS)


def test_a_program_that_is_gone_is_looked_for_again(host):
    one = host(*BACKENDS, env={})
    one.boot("first")
    program = os.path.join(one.fakes["firecracker"].bin, "firecracker")
    os.rename(program, program + ".gone")
    info = one.boot("second").info()
    assert info["backend"] == "cloud_hypervisor" and "not firecracker: there is no firecracker in PATH" in info["backend_note"]
    for name in one.vms():
        os.rmdir(one.vm(name))
    write(one.vm(".defaults/config/backend"), "firecracker")
    assert "there is no firecracker in PATH" in fails_to_boot(one)
    # Another version in its place is noticed, too.
    one.fakes["firecracker"].install('#!/bin/sh\necho "Firecracker v1.2.0"\n')
    assert "version 1.2" in fails_to_boot(one)
    os.rename(program + ".gone", program)
    assert one.boot("third").info()["backend_note"] == "Firecracker 1.10 with KVM"


@pytest.mark.parametrize("closed", ["", "exec >&- 2>&-\n"], ids=["silent", "closes its output"])
def test_a_program_that_does_not_answer_holds_up_one_boot_a_minute(host, closed):
    one = host("firecracker", env={"VMSFS_KVM": "no"}, start=False)
    tries = os.path.join(one.path, "tries")
    one.fake().install(f"#!/bin/sh\necho once >> {tries}\n{closed}exec sleep 71300\n")
    one.start()
    for guest in one.boot("a", "b"):
        assert guest.info()["backend"] == "qemu"
        assert "firecracker --version does not work (Connection timed out)" in guest.info()["backend_note"]
    assert read(tries) == "once\n"
    # Another program in its place is tried.
    one.fake().install("#!/bin/sh\necho Firecracker v1.2.0\n")
    assert "version 1.2" in one.boot("c").info()["backend_note"]


def test_auto_takes_qemu_where_there_is_no_kvm_and_settings_overrule_it(host):
    one = host(*BACKENDS, env={"VMSFS_KVM": "no"})
    guest = one.guest("box")
    os.mkdir(guest.path)
    info = wait_for(lambda: guest.info() if guest.info()["backend"] != "auto" else None, "it was decided")
    assert info["backend"] == "qemu"
    assert "not firecracker: Firecracker 1.10 is there, but it needs KVM" in info["backend_note"]
    assert "not cloud_hypervisor" in info["backend_note"]
    os.rmdir(guest.path)

    one = host(*BACKENDS, env={"VMSFS_BACKEND": "cloud_hypervisor"})
    guest = one.boot("box")
    assert guest.info()["backend"] == "cloud_hypervisor"
    write(guest / "status", "stopped")
    write(guest / "config/backend", "firecracker\n")
    write(guest / "status", "running")
    assert guest.info()["backend"] == "firecracker"


@pytest.fixture
def old_image(tmp_path):
    """An image from before there was a vsock."""
    folder = tmp_path / "images" / "old"
    shutil.copytree(os.path.join(IMAGES, "tiny"), folder, copy_function=os.symlink)
    record = json.loads(read(folder / "image.json"))
    del record["vsock"], record["kernel_elf"]
    (folder / "image.json").unlink()
    (folder / "image.json").write_text(json.dumps({**record, "name": "old"}))
    return str(folder)


def test_an_image_without_vsock(host, old_image, tmp_path):
    error = why_none(tmp_path, f"backend=firecracker,image={old_image}", env={"VMSFS_KVM": "yes"}, fakes=["firecracker"])
    assert '"vsock"' in error and "contrib/guest/tiny" in error
    one = host("firecracker")
    write(one.vm(".defaults/config/image"), old_image)
    error = fails_to_boot(one)
    assert '"vsock"' in error and "contrib/guest/tiny" in error
    one = host("firecracker", options=f"image={old_image}", env={})
    guest = one.guest("box")
    os.mkdir(guest.path)
    info = wait_for(lambda: guest.info() if guest.info()["backend"] != "auto" else None, "it was decided")
    assert info["backend"] == "qemu" and 'not firecracker: the image has no "vsock"' in info["backend_note"]


def test_a_setting_that_a_backend_has_no_use_for_is_named(host):
    one = host(*BACKENDS, env={})
    for backend, setting, value in (
        ("cloud_hypervisor", "cpu_model", "max"),
        ("cloud_hypervisor", "jail_user", "nobody"),
        ("qemu", "tap", "tap0"),
        ("qemu", "jail_user", "nobody"),
    ):
        os.mkdir(one.vm(".new/x"))
        write(one.vm(".new/x/config/backend"), backend)
        write(one.vm(f".new/x/config/{setting}"), value)
        with refused("ENODEV"):
            os.rename(one.vm(".new/x"), one.vm("x"))
        error = read(one.vm(".new/x/error"))
        assert f"config/{setting}" in error and backend in error
        os.rmdir(one.vm(".new/x"))


@each_backend
def test_a_tap_is_given_to_the_guest(host, backend):
    one = host(backend, options="tap=nosuchtap")
    assert "nosuchtap" in fails_to_boot(one)
    one = host(backend, options="tap=lo")  # to the fake, an interface is what the host has
    one.boot("box")
    assert {"firecracker": '"host_dev_name":"lo"', "cloud_hypervisor": '"net":[{"tap":"lo"}]'}[backend] in " ".join(one.fake().requests())


def test_a_cpu_template_is_firecrackers(host):
    one = host("firecracker", options="cpu_model=T2")
    one.boot("box")
    assert '"cpu_template":"T2"' in " ".join(one.fake().requests())


@each_backend
def test_a_proxy_of_the_environment_is_not_asked(host, backend):
    one = host(backend, env={"VMSFS_BACKEND": backend, "http_proxy": "http://127.0.0.1:1", "ALL_PROXY": "http://127.0.0.1:1"})
    one.boot("box")


# ---- the jailer ----


@pytest.fixture
def jailed(host):
    def make(start=True, version=None):
        """`version`: the program has the name that the releases give it, and a link leads there."""
        one = host("firecracker", options="jail_user=nobody,disk=16", start=False)
        fake = one.fake()
        fake.install(f'#!/bin/sh\nexec {harness.FAKES}/jailer {fake.path} "$@"\n', "jailer")
        if version:
            os.rename(os.path.join(fake.bin, "firecracker"), os.path.join(fake.bin, f"firecracker-v{version}"))
            os.symlink(f"firecracker-v{version}", os.path.join(fake.bin, "firecracker"))
        return one.start() if start else one

    return make


@pytest.mark.parametrize("version", [None, "1.10.1-x86_64"])
def test_a_jailed_firecracker(jailed, version):
    one = jailed(version=version)
    guest = one.boot("box")
    assert guest.exec("echo inside") == b"inside\n"
    pid = guest.qemu()
    told = " ".join(one.fake().requests())
    assert '"/kernel"' in told and '"/initrd"' in told and '"/disk"' in told and one.state not in told
    # Its user owns what it needs, and nothing else of the VM.
    assert os.stat(os.path.join(one.state, "vms/box/disk.img")).st_uid == 65534
    assert os.stat(os.path.join(one.state, "vms/box/ssh_host_ed25519_key")).st_uid == 0
    assert guest.ssh("echo by ssh") == b"by ssh\n"
    one.kill()
    one.start()
    wait_for(lambda: guest.status() == "running", "it was adopted")
    assert guest.qemu() == pid
    write(guest / "status", "stopped")
    assert sockets(one) == []
    write(guest / "status", "running")
    guest.close()
    os.rmdir(guest.path)
    assert one.remains() == []


def test_a_jailed_firecracker_without_a_daemon_is_ended(jailed):
    one = jailed(start=False)
    one.fake().do_wrong(**{"PUT /vsock": "hang"})
    one.start()
    guest = one.guest("box")
    os.mkdir(guest.path)
    wait_for(lambda: len(one.fake().requests()) >= 4, "it was told something")
    pid = guest.qemu()
    one.kill()
    one.fake().do_wrong()
    one.start()
    wait_for(lambda: not pid_alive(pid), "what was left is ended")
    guest.wait("running")


class Trap:
    """A socket of somebody else's, to which a jailed VMM would have root connect."""

    def __init__(self, path):
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen(100)
        self.listener.setblocking(False)

    def take_the_place_of(self, path, how):
        os.rename(path, path + ".own")
        if how == "link":
            os.symlink(self.path, path)
        else:
            os.link(self.path, path)

    def heard(self):
        """What those who have connected have said."""
        found = []
        while True:
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return found
            with connection:
                connection.settimeout(5)
                found.append(connection.recv(100))


@pytest.mark.parametrize("how", ["link", "socket"])
def test_a_jailed_vmm_cannot_lead_root_to_another_socket(jailed, tmp_path, how):
    trap = Trap(tmp_path / "trap")
    one = jailed()
    guest = one.boot("box")
    guest.close()
    folder = os.path.join(one.state, "vms/box/jail/firecracker")
    root = os.path.join(folder, os.listdir(folder)[0], "root")
    heard = [] if how == "link" else [b""]  # a connection that is closed at once
    words = "what is there is not the VMM's socket"

    trap.take_the_place_of(os.path.join(root, "api.sock"), how)
    with refused("EACCES"):
        write(guest / "status", "paused")
    assert words in guest.error() and trap.heard() == heard
    os.rename(os.path.join(root, "api.sock.own"), os.path.join(root, "api.sock"))
    write(guest / "status", "paused")
    write(guest / "status", "running")

    one.kill()
    trap.take_the_place_of(os.path.join(root, "vsock.sock"), how)
    one.start()
    wait_for(lambda: words in guest.error(), "the connection is refused", TIMEOUT + 5)
    assert guest.status() == "unreachable"
    assert set(trap.heard()) == set(heard)
    if how == "link":
        done = subprocess.run(["ssh", "-F", guest / "ssh_config", "box", "true"], capture_output=True, timeout=20, text=True)
        assert done.returncode == 255 and words in done.stderr and trap.heard() == []
    os.rename(os.path.join(root, "vsock.sock.own"), os.path.join(root, "vsock.sock"))
    wait_for(lambda: guest.status() == "running", "it is reached", 20)


def test_a_jail_that_cannot_be_says_why(host):
    one = host("firecracker")
    write(one.vm(".defaults/config/jail_user"), "nobody")
    assert "no jailer in PATH" in fails_to_boot(one)
    one.fake().install("#!/bin/sh\nexit 1\n", "jailer")
    write(one.vm(".defaults/config/jail_user"), "no-such-user")
    error = fails_to_boot(one)
    assert "no such user as in config/jail_user" in error and "no-such-user" not in error


# ---- the image, as a whole ----


@pytest.mark.deadline(200)
@each_backend
def test_the_image_boots_in_such_a_machine(host, backend):
    """The kernel as an ELF file; the drivers of memory-mapped and of PCI devices, of the vsock, the disk and the keyboard; the
    bridge to the SSH server: the guest of these fakes is whole, in QEMU (fakes/machine.py)."""
    one = host(backend, options="disk=64", start=False)
    one.fake().do_wrong(guest="machine")
    one.start()
    guest = one.boot("whole")
    write(guest.env("KEPT"), "kept\n")
    assert guest.exec("echo $KEPT; grep -o '^vmw_vsock_virtio_transport ' /proc/modules") == b"kept\nvmw_vsock_virtio_transport \n"
    assert guest.ssh("uname -r") != os.uname().release.encode() + b"\n"
    data = guest.exec("head -c 1000000 /dev/urandom | tee /root/data | md5sum; cat /root/data; sync")
    assert len(data) > 1000000
    # The bridge comes back as the server does.
    guest.ssh("killall vsock-bridge", check=False)
    guest.close()
    wait_for(lambda: guest.status() == "running" and guest.ssh("echo again", check=False) == b"again\n", "the bridge is back", 20, 0.5)
    guest.close()
    write(guest / "status", "paused")
    write(guest / "status", "running")
    write(guest / "status", "stopped")  # by Ctrl-Alt-Del, or the power button
    assert "reboot: " in read(guest / "console") and "power cut" not in read(guest / "console")
    assert not any("vmm.shutdown" in line for line in one.fake().requests())
    write(guest / "status", "running")
    assert guest.ssh("md5sum </root/data").split()[0] == data.split()[0]
    guest.ssh("poweroff", check=False)
    guest.close()
    wait_for(lambda: guest.status() == "stopped", "it has ended", 30)
