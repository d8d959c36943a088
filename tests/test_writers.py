"""Many writers at once, some of which die: what was acknowledged is in the guest, and nothing else has changed."""

import json
import random
import signal

import pytest

from harness import Client, read, wait_for, write
from tools_env import Reader, clean_env, environment, guest_file, guest_keys, keys, python, plain_text

WRITERS = 64

# Sets one variable again and again. A line of its log is written after the acknowledgement: number, start and end in ns.
# "whole" overwrites a value of the same length, which no truncation precedes; "shell" is what `echo >` does.
WRITER = """
import os, sys, time
path, log, way, name = sys.argv[1:]
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
number = 0
while True:
    number += 1
    start = time.monotonic_ns()
    os.write(log, b"? %d %d\\n" % (number, start))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if way == "shell" else 0), 0o600)
    os.write(fd, b"%s:%06d\\n" % (name.encode(), number))
    os.write(log, b"! %d %d %d\\n" % (number, start, time.monotonic_ns()))
    os.close(fd)
"""


@pytest.fixture
def clear(vm):
    clean_env(vm)
    yield vm
    clean_env(vm)


def writer(vm, tmp_path, number, key, way):
    log = tmp_path / f"log{number}"
    log.write_text("")
    argv = ["/usr/bin/python3", "-S", "-c", WRITER, vm.env(key), str(log), way, f"w{number:02}"]
    return Client(argv, env=environment()), log


def acknowledged(log):
    """[(number, start, end)], and whether a further one had begun."""
    done, begun = [], 0
    for line in log.read_text().splitlines():
        words = line.split()
        if words[0] == "!" and len(words) == 4:
            done.append(tuple(int(word) for word in words[1:]))
        elif words[0] == "?":
            begun = max(begun, int(words[1]))
    return done, begun


def kill_at_random(clients, logs, seed):
    """Once all have something acknowledged, they are killed one by one in any order."""
    wait_for(lambda: all(len(acknowledged(log)[0]) >= 2 for log in logs), "every writer has written", 120, step=0.2)
    order = list(clients)
    random.Random(seed).shuffle(order)
    total = sum(len(acknowledged(log)[0]) for log in logs)
    for at, client in enumerate(order):
        client.signal(signal.SIGKILL)
        if at % 8 == 0 and at < len(order) - 8:  # the others go on meanwhile
            now = total
            wait_for(lambda: sum(len(acknowledged(log)[0]) for log in logs) > now, "the others write on", 60)  # noqa: B023
            total = sum(len(acknowledged(log)[0]) for log in logs)
    for client in clients:
        client.result(60)


@pytest.mark.deadline(300)
def test_64_writers_on_different_keys_that_are_killed(clear, tmp_path):
    write(clear / "environ", "INVARIANT='it'\\''s\nhere'\nOTHER='untouched'\n")
    check = 'printf "%s|%s" "$INVARIANT" "$OTHER"'
    with Reader(clear, check, "it's\nhere|untouched"):
        made = [writer(clear, tmp_path, n, f"KEY_{n:02}", "shell" if n % 2 else "whole") for n in range(WRITERS)]
        kill_at_random([client for client, _ in made], [log for _, log in made], 1)
    names = sorted([f"KEY_{n:02}" for n in range(WRITERS)] + ["INVARIANT", "OTHER"])
    # What the killed had open is let go of by the kernel, and then is final.
    wait_for(lambda: settled(clear), "both sides agree", 20)
    assert guest_keys(clear) == names == keys(clear)
    in_guest = values(clear)
    for number, (_, log) in enumerate(made):
        done, begun = acknowledged(log)
        last = done[-1][0]
        allowed = [f"w{number:02}:{n:06}" for n in range(last, begun + 1)]
        if number % 2 and begun > last:
            allowed.append("")  # killed between its truncation and its write
        assert in_guest[f"KEY_{number:02}"] in allowed, (number, last, begun)
    assert in_guest["OTHER"] == "untouched"


@pytest.mark.deadline(300)
@pytest.mark.parametrize("way", ["whole", "shell"])
def test_64_writers_on_one_key_that_are_killed(clear, tmp_path, way):
    write(clear / "environ", "INVARIANT='1'\nSAME='w00:000000'\n")
    with Reader(clear, 'printf "%s" "$INVARIANT"', "1"):
        made = [writer(clear, tmp_path, n, "SAME", way) for n in range(WRITERS)]
        kill_at_random([client for client, _ in made], [log for _, log in made], 2)
    wait_for(lambda: settled(clear), "both sides agree", 20)
    final = values(clear)["SAME"]
    assert keys(clear) == guest_keys(clear) == ["INVARIANT", "SAME"]
    assert clear.value("INVARIANT") == b"1"
    writes = {}  # the value: (start, end); end is endless for one that was never acknowledged
    for number, (_, log) in enumerate(made):
        done, begun = acknowledged(log)
        for n, start, end in done:
            writes[f"w{number:02}:{n:06}"] = start, end
        if begun > done[-1][0]:
            writes[f"w{number:02}:{begun:06}"] = 0, float("inf")
    if way == "shell" and final == "":
        return  # the last one to be killed had truncated it
    assert final in writes
    # Nothing that was acknowledged may have begun after what is there was over.
    end = writes[final][1]
    later = [value for value, (start, over) in writes.items() if start > end and over != float("inf")]
    assert later == [], f"{final} is older than {later}"


def values(vm):
    """All variables as a shell in the guest has them."""
    out = vm.ssh("env -i sh -c '. /etc/profile.d/vmsfs_env.sh; env'").decode(errors="replace")
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def settled(vm):
    mine = plain_text(vm / "environ")
    theirs = "".join(
        line.removeprefix("export ") + "\n"
        for line in guest_file(vm).decode(errors="replace").splitlines()
        if not line.startswith("#")
    )
    return mine == theirs and plain_text(vm / "environ") == mine


# --- group commit ---

# A thread a key, which all write at the same moment.
BURST = """
import json, os, sys, threading
folder, count = sys.argv[1], int(sys.argv[2])
fds = [os.open(f"{folder}/BURST_{n:03}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for n in range(count)]
ready = threading.Barrier(count)
failed = []
def one(n):
    ready.wait()
    try:
        os.write(fds[n], b"value %d\\n" % n)
    except OSError as error:
        failed.append((n, error.errno))
threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
for t in threads: t.start()
for t in threads: t.join()
for fd in fds: os.close(fd)
print(json.dumps(failed))
"""


def test_100_writers_at_once_cost_a_handful_of_updates(clear):
    write(clear.env("WARM"), "x")
    before = clear.info()
    done = python(BURST, clear / "env", "100")
    assert done.returncode == 0 and json.loads(done.stdout) == [], done
    after = clear.info()
    assert after["env_commits"] - before["env_commits"] == 100
    assert after["env_updates"] - before["env_updates"] <= 20
    in_guest = values(clear)
    assert {f"BURST_{n:03}": f"value {n}" for n in range(100)}.items() <= in_guest.items()


def test_each_writer_of_a_burst_has_its_own_verdict(clear):
    """One bad value in a burst fails its writer, and nobody else."""
    code = BURST.replace('b"value %d\\n" % n)', 'b"a\\0b" if n == 7 else b"value %d\\n" % n)')
    done = python(code, clear / "env", "20")
    assert done.returncode == 0 and json.loads(done.stdout) == [[7, 22]], done
    wait_for(lambda: "BURST_007" not in keys(clear), "the name that was never set is gone")
    assert guest_keys(clear) == [f"BURST_{n:03}" for n in range(20) if n != 7]


@pytest.mark.deadline(200)
def test_a_failed_update_fails_exactly_its_writers(clear):
    """All of a burst that comes while the guest cannot take it fail; those before and after do not."""
    python(BURST, clear / "env", "10")
    before = guest_file(clear)
    clear.ssh(
        "f=/etc/profile.d; cp -a $f /tmp/save; mount -t tmpfs -o size=64k none $f && cp -a /tmp/save/. $f && mount -o remount,ro $f"
    )
    try:
        done = python(BURST.replace("value", "lost"), clear / "env", "40")
        assert done.returncode == 0, done
        assert sorted(n for n, _ in json.loads(done.stdout)) == list(range(40)), "a write was acknowledged"
        assert guest_file(clear) == before
    finally:
        clear.ssh("umount -l /etc/profile.d; rm -r /tmp/save")
    assert guest_file(clear) == before
    done = python(BURST, clear / "env", "40")
    assert done.returncode == 0 and json.loads(done.stdout) == [], done
    assert guest_keys(clear) == [f"BURST_{n:03}" for n in range(40)]


@pytest.mark.deadline(200)
def test_writers_readers_and_removers_at_once(clear):
    """Whoever comes and goes: what a writer has set stays, and no reader gets half of anything."""
    loop = "cd \"$D\"; i=0; while [ $i -lt 15 ]; do {} i=$((i+1)); done"
    scripts = [
        loop.replace("{}", f'echo "{w} $i" > SET_{w}_$i || exit;') for w in range(4)
    ] + [
        loop.replace("{}", f'echo x > GONE_{w}_$i && rm GONE_{w}_$i || exit;') for w in range(4)
    ] + [
        loop.replace("{}", f'echo "{w} $i" > tmp{w}~ && mv tmp{w}~ MOVED_{w} || exit;') for w in range(4)
    ] + [
        loop.replace("{}", "cat ../environ >/dev/null && ls -l >/dev/null; "),
    ]
    clients = [Client(script, env=environment(D=clear / "env")) for script in scripts]
    for client in clients:
        status, _, err = client.result(100)
        assert status == 0, err
    wanted = sorted([f"SET_{w}_{i}" for w in range(4) for i in range(15)] + [f"MOVED_{w}" for w in range(4)])
    assert keys(clear) == guest_keys(clear) == wanted
    in_guest = values(clear)
    assert all(in_guest[f"SET_{w}_{i}"] == f"{w} {i}" for w in range(4) for i in range(15))
    assert all(in_guest[f"MOVED_{w}"] == f"{w} 14" for w in range(4))


@pytest.mark.deadline(300)
def test_what_is_acknowledged_survives_the_death_of_the_daemon(daemon, tmp_path):
    """kill -9 of the daemon in the middle of 16 writers."""
    one = daemon()
    vm = one.boot("a")
    write(vm.env("INVARIANT"), "1\n")
    made = [writer(vm, tmp_path, n, f"KEY_{n:02}", "whole") for n in range(16)]
    logs = [log for _, log in made]
    wait_for(lambda: all(len(acknowledged(log)[0]) >= 3 for log in logs), "every writer has written", 120, step=0.2)
    one.kill()
    for client, _ in made:
        client.result(60)
    one.start()
    vm.wait("running", 30)
    in_guest = values(vm)
    for number, log in enumerate(logs):
        done, begun = acknowledged(log)
        assert in_guest[f"KEY_{number:02}"] in [f"w{number:02}:{n:06}" for n in range(done[-1][0], begun + 1)]
    assert in_guest["INVARIANT"] == "1"
    wait_for(lambda: settled(vm), "both sides agree", 20)
