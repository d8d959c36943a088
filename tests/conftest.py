"""Fixtures, and the deadlines: a test that overruns is failed, and a mount that hangs is cut off."""

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import harness  # noqa: E402

DEADLINE = 120
# From the deadline to the death of the daemons, which frees whoever is blocked in a mount.
GRACE = 10

# A shell starts what it puts into the background with SIGINT ignored, and so would be all clients of the tests.
# SIGTERM (of `timeout`, say) ends a run as Ctrl-C does: with everything unmounted and ended.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)

collect_ignore = ["unit", "fuzz", "bench"]


def pytest_configure(config):
    config.addinivalue_line("markers", "deadline(seconds): how long the test may take, with its fixtures")
    config.addinivalue_line("markers", "qemu: about QEMU itself, or about what the other VMMs or their fakes do not have")


# The tests that run on every backend, with VMSFS_TEST_BACKEND: what a VM is and does, whatever runs it.
EVERYWHERE = {"test_lifecycle", "test_status"}
# And those that are less about what runs it, which the two fakes share out among them: each runs on one of them. Of the others,
# which take long or are about files above all, only some do. With VMSFS_TEST_ALL=1 all run on both.
EITHER = {"test_boot", "test_config", "test_exec", "test_life", "test_prepare", "test_run", "test_security", "test_writers"}
SOME = {"test_death"}
FEW = {"test_env", "test_environ", "test_faults", "test_guest_truth", "test_jobs", "test_staging", "test_tools"}
# No other is here: what has no VM in it, has machines that nothing runs (attach), or names its backend.


def pytest_collection_modifyitems(config, items):
    if harness.BACKEND == "qemu":
        return
    fit = [item for item in items if not item.get_closest_marker("qemu")]
    wanted = [item for item in fit if item.module.__name__ in EVERYWHERE]
    place = list(harness.PROGRAMS).index(harness.BACKEND)
    for modules, of in ((EITHER, 2), (SOME, 4), (FEW, 8)):
        # By their names, not by their number: a second try collects those that have failed, and no others.
        wanted += [
            item
            for item in fit
            if item.module.__name__ in modules
            and (os.environ.get("VMSFS_TEST_ALL") or zlib.crc32(item.nodeid.encode()) % of == place)
        ]
    chosen = set(wanted)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


class Overdue(Exception):
    pass


def overdue(_signal, _frame):
    raise Overdue("the test has overrun its deadline")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    marker = item.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else DEADLINE

    def last_resort():
        faulthandler.dump_traceback(file=sys.__stderr__)
        harness.RUN.kill_daemons()

    timer = threading.Timer(seconds + GRACE, last_resort)
    timer.daemon = True
    signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    timer.start()
    yield
    timer.cancel()
    signal.setitimer(signal.ITIMER_REAL, 0)


class Shared:
    """The daemon and the guest that most tests use. A test that breaks one fails; the next gets a new one."""

    def __init__(self):
        self.daemon = None
        self.problems = []

    def mount(self):
        if self.daemon and not self.daemon.running():
            self.clear()
        if not self.daemon:
            self.daemon = harness.Daemon().start()
        return self.daemon

    def guest(self, name="shared"):
        daemon = self.mount()
        guest = daemon.guests.get(name)
        if not guest or not os.path.isdir(guest.path):
            return daemon.boot(name)
        if guest.status() != "running":
            os.rmdir(guest.path)
            guest.close()
            return daemon.boot(name)
        return guest

    def clear(self):
        daemon, self.daemon = self.daemon, None
        if daemon:
            try:
                daemon.clear()
            except AssertionError as error:
                self.problems.append(str(error))


SHARED = Shared()


@pytest.fixture
def mount():
    """The shared daemon."""
    return SHARED.mount()


@pytest.fixture
def vm():
    """A running guest that is shared by tests which leave it as it is but for variables of their own."""
    return SHARED.guest()


@pytest.fixture
def new_vm(mount):
    """Boots VMs on the shared daemon for this test alone: new_vm("a", "b")."""
    names = []

    def make(*wanted):
        names.extend(wanted)
        return mount.boot(*wanted)

    yield make
    for name in names:
        if name in mount.guests:
            mount.guests[name].close()
        path = mount.vm(name)
        if mount.running() and os.path.isdir(path):
            os.rmdir(path)


@pytest.fixture
def daemon():
    """Starts daemons for this test alone, each with a state directory of its own."""
    made = []

    def make(options="", start=True, **kwargs):
        one = harness.Daemon(options, **kwargs)
        made.append(one)
        return one.start() if start else one

    yield make
    for one in reversed(made):
        one.clear()


@pytest.fixture
def sshd():
    """Starts servers for this test alone, each an existing machine: sshd(MaxSessions=2)."""
    made = []

    def make(start=True, **config):
        server = harness.Sshd(**config)
        made.append(server)
        return server.start() if start else server

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def attached(sshd, daemon):
    """Attaches an sshd as a VM of a daemon, both for this test alone: attached("name", "shell=raw", MaxSessions=10). It has
    the server as `sshd`."""

    def make(name="machine", options="", **config):
        server = sshd(**config)
        guest = daemon(server.options() + ("," + options if options else "")).boot(name)
        guest.sshd = server
        return guest

    return make


@pytest.fixture
def on_a_disk_of(daemon, tmp_path):
    """Starts a daemon whose state directory is on a file system of its own."""

    def make(size, options):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", tmp_path], check=False).returncode:
            pytest.fail("no tmpfs can be mounted")
        one = daemon(options, start=False)
        one.options = one.options.replace(f"state={one.state}", f"state={tmp_path}/state")
        one.state = f"{tmp_path}/state"
        made.append(one)
        return one.start()

    made = []
    yield make
    for one in made:
        if one.running():
            for name in one.vms():
                os.rmdir(one.vm(name))
        one.stop()
        for pid in one.qemus():
            harness.kill_and_wait(pid)
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.fixture(autouse=True)
def no_client_left():
    """No process of a test is left waiting."""
    yield
    for client in list(harness.Client.all):
        client.signal(signal.SIGKILL)
        client.result(30)


@pytest.fixture(autouse=True)
def sanitizers_are_silent():
    before = harness.RUN.sanitizer_logs()
    yield
    new = {n: text for n, text in harness.RUN.sanitizer_logs().items() if n not in before}
    assert not new, "\n".join(new.values())


@pytest.hookimpl(trylast=True)  # fixtures of an interrupted test are torn down in this hook, too
def pytest_sessionfinish(session):
    SHARED.clear()
    logs = harness.RUN.sanitizer_logs()
    problems = SHARED.problems + [f"{name}: {text[:500]}" for name, text in logs.items()]
    left = harness.processes_with(harness.RUN.path + "/")
    if left and not harness.RUN.given:
        problems.append(f"processes are left: {left}")
        for pid in left:
            harness.kill_and_wait(pid)
    for line in harness.read("/proc/self/mountinfo").splitlines():
        path = line.split()[4]
        if path.startswith(harness.RUN.path + "/"):
            problems.append(f"{path} is still mounted")
            subprocess.run(["fusermount3", "-uz", path], timeout=20, check=False)
    session.config.end_problems = problems
    if problems:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        with open(os.path.join(harness.RUN.path, "problems"), "a", encoding="utf-8") as f:
            f.write("\n".join(problems) + "\n")
    elif not harness.RUN.given:
        shutil.rmtree(harness.RUN.path, ignore_errors=True)


def pytest_terminal_summary(terminalreporter, config):
    for problem in getattr(config, "end_problems", []):
        terminalreporter.section("at the end of the run")
        terminalreporter.write_line(problem)
