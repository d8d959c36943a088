"""The env file in the guest is the truth while it runs: what others change in it is seen, taken over, and never lost."""

import os
import shlex
import signal
import time

import pytest

from harness import Client, read, read_bytes, refused, sh, takes_at_most, wait_for, write
from tools_env import ENV_FILE, clean_env, guest_file, guest_keys, keys, sourced, plain_text

SOON = 1.5  # "within a second", and the polling of a busy test machine


@pytest.fixture
def clear(vm):
    clean_env(vm)
    yield vm
    clean_env(vm)


def lines(vm, env_file=ENV_FILE):
    return guest_file(vm, env_file).decode(errors="replace").splitlines()


# --- what changes in the guest shows ---

CHANGES = {
    "append": ("echo 'export NEW=\"guest value\"' >> FILE", {"OLD": "old\n", "OTHER": "other\n", "NEW": "guest value\n"}),
    "sed -i": ("sed -i \"s/^export OLD=.*/export OLD='changed'/\" FILE", {"OLD": "changed\n", "OTHER": "other\n"}),
    "delete a line": ("sed -i '/^export OLD=/d' FILE", {"OTHER": "other\n"}),
    "rm": ("rm FILE", {}),
    "mv over it": ("echo \"export MOVED='x'\" > /tmp/new.sh; mv /tmp/new.sh FILE", {"MOVED": "x\n"}),
    "cp over it": ("echo \"export MOVED='x'\" > /tmp/new.sh; cp /tmp/new.sh FILE", {"MOVED": "x\n"}),
    "empty": (": > FILE", {}),
    "same size": ("sed -i s/old/OLD/ FILE", {"OLD": "OLD\n", "OTHER": "other\n"}),
    "in place, same size": ("printf X | dd of=FILE bs=1 seek=AT_OLD conv=notrunc 2>/dev/null", {"OLD": "Xld\n", "OTHER": "other\n"}),
    "old times": ("touch -r FILE /tmp/stamp; echo 'export NEW=1' >> FILE; touch -r /tmp/stamp FILE",
                  {"OLD": "old\n", "OTHER": "other\n", "NEW": "1\n"}),
    "symlink": ("mv FILE /tmp/real.sh; echo 'export NEW=1' >> /tmp/real.sh; ln -s /tmp/real.sh FILE",
                {"OLD": "old\n", "OTHER": "other\n", "NEW": "1\n"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_the_guest_shows_within_a_second(clear, name):
    script, wanted = CHANGES[name]
    write(clear / "environ", "OLD=old\nOTHER=other\n")
    assert keys(clear) == ["OLD", "OTHER"]  # it has been looked at
    at = guest_file(clear).index(b"'old'") + 1
    clear.ssh(script.replace("FILE", ENV_FILE).replace("AT_OLD", str(at)))
    wait_for(lambda: keys(clear) == sorted(wanted), f"ls shows {sorted(wanted)}", SOON)
    wait_for(lambda: {k: read(clear.env(k)) for k in wanted} == wanted, f"cat shows {wanted}", SOON)
    assert plain_text(clear / "environ") == "".join(f"{k}='{wanted[k][:-1]}'\n" for k in sorted(wanted))
    # A set right afterwards keeps it all.
    write(clear.env("SET"), "later\n")
    assert guest_keys(clear) == sorted([*wanted, "SET"])
    for key, value in wanted.items():
        assert clear.value(key) == value[:-1].encode()
    clear.ssh(f"rm -f {ENV_FILE} /tmp/real.sh /tmp/stamp")


FIRST_LOOKS = {
    "cat": 'cat "$D/env/GUESTS"',
    "ls": 'ls "$D/env" | grep -x GUESTS',
    "find": 'test -n "$(find "$D/env" -name GUESTS)"',
    "test": 'test -e "$D/env/GUESTS"',
    "environ": 'grep GUESTS "$D/environ"',
}


@pytest.mark.deadline(200)
@pytest.mark.parametrize("what", FIRST_LOOKS)
def test_who_looks_for_the_first_time_sees_what_the_guest_has(sshd, daemon, what):
    """Nobody has looked at the variables before, so nothing was read again and again."""
    server = sshd()
    one = daemon(server.options())
    vm = one.boot("box")
    running = time.monotonic()
    with open(server.env_file, "a", encoding="ascii") as f:
        f.write("export GUESTS='theirs'\n")
    wait_for(lambda: time.monotonic() - running > 1, "what was learned at the start is old", 5)
    sh(FIRST_LOOKS[what], D=vm.path)


def test_who_looks_at_a_guest_that_does_not_answer_is_told_what_is_known(new_vm):
    vm = new_vm("silent")
    write(vm / "environ", "KNOWN=x\n")
    vm.close()
    os.kill(vm.qemu(), signal.SIGSTOP)
    with takes_at_most(2, "all of it"):
        assert sh('ls "$D/env"', D=vm.path).stdout == b"KNOWN\n"
        assert sh('ls "$D/env/KNOWN" "$D/env/NOPE"', D=vm.path, check=False).stdout.endswith(b"/KNOWN\n")
    os.kill(vm.qemu(), signal.SIGCONT)


def test_cat_alone_shows_it(clear):
    write(clear.env("KEY"), "old\n")
    assert read(clear.env("KEY")) == "old\n"
    for number in range(4):
        clear.ssh(f"sed -i \"s/^export KEY=.*/export KEY={number}/\" {ENV_FILE}")
        wait_for(lambda: read(clear.env("KEY")) == f"{number}\n", "the guest's value", SOON)  # noqa: B023
        assert os.stat(clear.env("KEY")).st_size == 2


def test_what_is_unset_in_the_guest_is_gone(clear):
    write(clear.env("KEY"), "old\n")
    assert keys(clear) == ["KEY"]
    clear.ssh(f"sed -i '/KEY/d' {ENV_FILE}")
    wait_for(lambda: not os.path.exists(clear.env("KEY")), "it is gone", SOON)
    with refused("ENOENT"):
        open(clear.env("KEY"), "rb")


def test_a_value_that_is_set_to_the_same_keeps_its_bytes(clear):
    write(clear.env("KEY"), "value")  # no newline
    write(clear.env("OTHER"), "x\n")
    clear.ssh(f"sed -i 's/^export OTHER=.*/export OTHER=y/' {ENV_FILE}")
    wait_for(lambda: read(clear.env("OTHER")) == "y\n", "the guest's value", SOON)
    assert read_bytes(clear.env("KEY")) == b"value"
    clear.ssh(f"sed -i 's/^export KEY=.*/export KEY=other/' {ENV_FILE}")
    wait_for(lambda: read_bytes(clear.env("KEY")) == b"other\n", "the guest's value, with a newline", SOON)


# --- nothing is lost ---


@pytest.mark.deadline(200)
@pytest.mark.parametrize("how", ["append", "sed -i", "mv"])
def test_what_the_guest_changes_just_before_a_set_is_not_lost(clear, how):
    write(clear.env("OURS"), "start\n")
    for number in range(20):
        line = f"export THEIRS_{number}='{number}'"
        script = {
            "append": f'echo "{line}" >> {ENV_FILE}',
            "sed -i": f'sed -i "\\$a{line}" {ENV_FILE}',
            "mv": f'cp {ENV_FILE} /tmp/t.sh; echo "{line}" >> /tmp/t.sh; mv /tmp/t.sh {ENV_FILE}',
        }[how]
        clear.ssh(script)
        write(clear.env("OURS"), f"{number}\n")
        assert clear.value("OURS") == b"%d" % number
        assert sourced(clear, f"THEIRS_{number}") == b"%d" % number, f"round {number}"
    assert guest_keys(clear) == sorted(["OURS"] + [f"THEIRS_{n}" for n in range(20)])
    assert read(clear.env("THEIRS_19")) == "19\n"


@pytest.mark.deadline(200)
def test_what_the_guest_changes_right_after_a_set_is_not_lost(clear):
    clear.connect()
    for number in range(20):
        write(clear.env("OURS"), f"{number}\n")
        clear.ssh(f"echo 'export THEIRS_{number}={number}' >> {ENV_FILE}")
        write(clear.env("MORE"), f"{number}\n")
    assert guest_keys(clear) == sorted(["OURS", "MORE"] + [f"THEIRS_{n}" for n in range(20)])


@pytest.mark.deadline(200)
def test_a_guest_that_appends_and_a_host_that_sets_at_once(clear):
    """The host checks the file before it replaces it; in the guest a loop that locks nothing may lose to a rename
    that falls into the moment between. With sets that follow each other without a pause, that moment is a good part
    of the time. But no line is lost that the host has ever shown, and not all of them are."""
    loop = f"i=0; while [ $i -lt 60 ]; do echo \"export G_$i=$i\" >> {ENV_FILE}; i=$((i+1)); usleep 20000; done"
    seen = set()
    with Client(clear.ssh_argv() + ["sh -c " + shlex.quote(loop)]) as client:
        number = 0
        while client.process.poll() is None:
            number += 1
            write(clear.env("OURS"), f"{number}\n")
            seen |= {key for key in keys(clear) if key.startswith("G_")}
        assert client.result()[0] == 0
    assert clear.value("OURS") == b"%d" % number
    there = set(guest_keys(clear))
    assert seen <= there, f"shown, and lost: {seen - there}"
    assert len(there) >= 20, f"lines of the guest are lost: {sorted(there)}"


@pytest.mark.deadline(200)
def test_a_set_takes_at_most_the_lines_that_are_appended_in_its_moment(clear):
    """The same with sets that come now and then: what is appended outside of the moment between the check and the rename,
    which is shorter than two of the guest's rounds, is there."""
    loop = f"i=0; while [ $i -lt 150 ]; do echo \"export G_$i=$i\" >> {ENV_FILE}; i=$((i+1)); usleep 20000; done"
    sets, seen = 0, set()
    with Client(clear.ssh_argv() + ["sh -c " + shlex.quote(loop)]) as client:
        while client.process.poll() is None:
            now = {key for key in keys(clear) if key.startswith("G_")}
            assert seen <= now, f"shown, and lost: {seen - now}"
            if len(now) >= len(seen) + 10:
                sets, seen = sets + 1, now
                write(clear.env("OURS"), f"{sets}\n")
        assert client.result()[0] == 0
    assert sets >= 2
    assert clear.value("OURS") == b"%d" % sets
    lost = {f"G_{n}" for n in range(150)} - set(guest_keys(clear))
    assert len(lost) <= 2 * sets, f"{sets} sets, and lost: {sorted(lost)}"


def test_what_a_killed_shell_has_left_is_no_part_of_the_file(clear):
    write(clear.env("OURS"), "1\n")
    clear.ssh(f"{{ cat {ENV_FILE}; head -c 5000 /dev/zero | tr '\\0' x; }} > {ENV_FILE}.tmp")
    write(clear.env("OURS"), "2\n")
    assert guest_keys(clear) == ["OURS"]
    assert clear.value("OURS") == b"2"
    assert b"xxx" not in guest_file(clear)
    assert clear.ssh(f"stat -c %a {ENV_FILE}; ls {ENV_FILE}.tmp /run/vmsfs* 2>/dev/null; :") == b"644\n"


def test_what_is_no_export_is_kept(clear):
    text = "# a comment of mine\numask 027\nif [ -t 0 ]; then\n    export INSIDE=x\nfi\nalias ll='ls -l'\nexport PATH=\"$PATH:/opt/x\"\n"
    clear.ssh(f"printf %s {shlex.quote(text)} > {ENV_FILE}; echo 'export MINE=1' >> {ENV_FILE}")
    wait_for(lambda: keys(clear) == ["MINE"], "the variable", SOON)
    write(clear.env("OURS"), "2\n")
    os.unlink(clear.env("MINE"))
    write(clear / "environ", "LAST=3\n")
    there = guest_file(clear).decode()
    assert text in there
    assert "MINE" not in there and "OURS" not in there and "export LAST='3'\n" in there
    assert sourced(clear, "PATH").endswith(b":/opt/x")
    assert clear.exec("umask") .strip() in (b"0027", b"027")
    clear.ssh(f"rm {ENV_FILE}")
    wait_for(lambda: keys(clear) == [], "nothing", SOON)


def test_lines_of_others_still_see_the_variables_that_they_use(clear):
    """Each kept line means what it meant, however often the file is written; and what is in env/ holds."""
    text = (
        "export JAVA_HOME=/opt/java\n"
        'export PATH="$JAVA_HOME/bin:$PATH"\n'
        "B2=$JAVA_HOME\n"
        "export B3=$B2\n"
        "export LEVEL=1\n"
        "export LEVEL=${LEVEL}0\n"
    )
    clear.ssh(f"printf %s {shlex.quote(text)} > {ENV_FILE}")
    wait_for(lambda: keys(clear) == ["JAVA_HOME", "LEVEL"], "the plain ones", SOON)
    for number in range(3):
        write(clear.env("NEW"), f"{number}\n")
        assert sourced(clear, "PATH").startswith(b"/opt/java/bin:/"), guest_file(clear)
        assert sourced(clear, "B3") == b"/opt/java"
        assert sourced(clear, "LEVEL") == b"1"
        assert clear.exec("echo $B3 $NEW") == b"/opt/java %d\n" % number
        size = len(guest_file(clear)) if number == 0 else size
        assert len(guest_file(clear)) == size
    assert keys(clear) == ["JAVA_HOME", "LEVEL", "NEW"]
    write(clear.env("JAVA_HOME"), "/opt/other\n")
    assert sourced(clear, "B3") == sourced(clear, "JAVA_HOME") == b"/opt/other"
    os.unlink(clear.env("JAVA_HOME"))
    assert sourced(clear, "JAVA_HOME") == b"<unset>" and sourced(clear, "B3") == b""
    clear.ssh(f"rm {ENV_FILE}")
    wait_for(lambda: keys(clear) == [], "nothing", SOON)


# --- SmolVM's file ---

SMOL = """#!/bin/sh
# SmolVM managed environment variables
export APP_ENV=production
export DB_URL='postgres://u:p@h/d?a=1&b=2'
export EMPTY=''
export MOTD='it'"'"'s "here"'
export PLAIN=a-b_c/d.e:f@g%h+i,j=k
export SPACES='  two  words '
export DOLLAR='$HOME `x` $(y) \\n'
export UNICODE='Grüße 世界'
export LINES='one
two

four'
"""
SMOL_VALUES = {
    "APP_ENV": b"production",
    "DB_URL": b"postgres://u:p@h/d?a=1&b=2",
    "EMPTY": b"",
    "MOTD": b"it's \"here\"",
    "PLAIN": b"a-b_c/d.e:f@g%h+i,j=k",
    "SPACES": b"  two  words ",
    "DOLLAR": b"$HOME `x` $(y) \\n",
    "UNICODE": "Grüße 世界".encode(),
    "LINES": b"one\ntwo\n\nfour",
}
SMOL_FILE = "/etc/profile.d/smolvm_env.sh"


@pytest.fixture(scope="module")
def smol():
    """A guest that SmolVM has written its variables into."""
    import harness

    one = harness.Daemon(f"env_file={SMOL_FILE}").start()
    vm = one.boot("smol")
    yield vm
    one.clear()


@pytest.fixture
def written(smol):
    smol.ssh(f"printf %s {shlex.quote(SMOL)} > {SMOL_FILE}")
    wait_for(lambda: keys(smol) == sorted(SMOL_VALUES), "SmolVM's variables", SOON)
    return smol


def test_the_file_of_smolvm_is_read(written):
    for key, value in SMOL_VALUES.items():
        assert read_bytes(written.env(key)) == value + b"\n", key
        assert sourced(written, key, SMOL_FILE) == value, key


def test_the_file_of_smolvm_is_taken_over_without_loss(written):
    write(written.env("ADDED"), "1\n")
    os.unlink(written.env("APP_ENV"))
    values = {**SMOL_VALUES, "ADDED": b"1"}
    del values["APP_ENV"]
    assert keys(written) == sorted(values)
    for key, value in values.items():
        assert sourced(written, key, SMOL_FILE) == value, key
    assert "# SmolVM managed environment variables" in lines(written, SMOL_FILE)
    assert sourced(written, "APP_ENV", SMOL_FILE) == b"<unset>"
    assert b"vmsfs_env.sh" not in written.ssh("ls /etc/profile.d")


QUOTING = {
    "bare": ("export K=plain", b"plain"),
    "single": ("export K='a b'", b"a b"),
    "double": ('export K="a b"', b"a b"),
    "double, escapes": ('export K="a \\"b\\" \\$x \\\\ \\n"', b'a "b" $x \\ \\n'),
    "backslashes": ("export K=a\\ b\\'c", b"a b'c"),
    "mixed": ("export K=a'b c'\"d e\"\\ f", b"ab cd e f"),
    "shlex": ("export K='it'\"'\"'s'", b"it's"),
    "sh": ("export K='it'\\''s'", b"it's"),
    "lines": ("export K='a\nexport EVIL=1\nb'", b"a\nexport EVIL=1\nb"),
    "continued": ("export K=a\\\nb", b"ab"),
    "two in one": ("export K=1 L=2", b"1"),
    "semicolon": ("export K=1; export L=2", b"1"),
    "comment": ("export K=1 # comment", b"1"),
    "indented": ("  export\tK=1", b"1"),
    "twice": ("export K=1\nexport K=2", b"2"),
    "empty": ("export K=", b""),
    "hash": ("export K=a#b", b"a#b"),
    "no newline": ("export K=1", b"1"),
}


@pytest.mark.parametrize("name", QUOTING)
def test_all_quoting_of_the_shell_is_read(smol, name):
    line, value = QUOTING[name]
    end = "" if name == "no newline" else "\n"
    smol.ssh(f"printf %s {shlex.quote('export MARK=' + name.replace(' ', '_').replace(',', '') + chr(10) + line + end)} > {SMOL_FILE}")
    mark = name.replace(" ", "_").replace(",", "") + "\n"
    wait_for(lambda: os.path.exists(smol.env("MARK")) and read(smol.env("MARK")) == mark and os.path.exists(smol.env("K")),
             "the guest's variable", SOON)
    assert sourced(smol, "K", SMOL_FILE) == value  # it is what a shell says
    assert read_bytes(smol.env("K")) == value + b"\n"
    before = keys(smol)
    write(smol.env("AFTER"), "x\n")
    assert sourced(smol, "K", SMOL_FILE) == value
    assert keys(smol) == sorted(set(before) | {"AFTER"})
    assert "EVIL" not in keys(smol)
    assert sourced(smol, "EVIL", SMOL_FILE) == b"<unset>"
    write(smol.env("K"), "ours\n")
    assert sourced(smol, "K", SMOL_FILE) == b"ours"
    os.unlink(smol.env("K"))
    assert sourced(smol, "K", SMOL_FILE) == b"<unset>"


@pytest.mark.parametrize("line", ["export K=$HOME", 'export K="$(date)"', "export K=`id`", "export K=~/x", "K=1", "K=1; export K",
                                  "readonly K=1", "export -n K", "[ -n \"$X\" ] && export K=1", "export K=${X:-1}"])
def test_what_a_shell_would_compute_is_left_as_it_is(smol, line):
    smol.ssh(f"printf '%s\\n' 'export MARK=m' {shlex.quote(line)} > {SMOL_FILE}")
    wait_for(lambda: keys(smol) == ["MARK"], "only the plain one", SOON)
    write(smol.env("OURS"), "x\n")
    assert line in lines(smol, SMOL_FILE)
    assert sourced(smol, "OURS", SMOL_FILE) == b"x"
    # Ours is after theirs and wins.
    write(smol.env("K"), "ours\n")
    if not line.startswith("readonly"):
        assert sourced(smol, "K", SMOL_FILE) == b"ours"
    assert line in lines(smol, SMOL_FILE)
    os.unlink(smol.env("K"))
    assert line in lines(smol, SMOL_FILE)


def test_a_file_that_is_no_shell_script_is_kept_and_does_no_harm(smol):
    smol.ssh(f"head -c 2000 /dev/urandom > {SMOL_FILE}; cp {SMOL_FILE} /tmp/noise")
    wait_for(lambda: "MARK" not in keys(smol), "the old ones are gone", SOON)
    assert smol.status() == "running"
    smol.ssh(f"rm {SMOL_FILE}")
    wait_for(lambda: keys(smol) == [], "nothing", SOON)
    write(smol.env("OURS"), "x\n")
    assert sourced(smol, "OURS", SMOL_FILE) == b"x"


# --- durable ---


@pytest.mark.deadline(300)
def test_variables_outlive_stop_start_and_the_death_of_the_daemon(daemon):
    one = daemon()
    vm = one.boot("a")
    write(vm.env("KEPT"), "it's\nhere")
    write(vm.env("REMOVED"), "x\n")
    os.chmod(vm.env("KEPT"), 0o640)
    vm.ssh(f"echo 'export GUESTS=theirs' >> {ENV_FILE}")
    wait_for(lambda: "GUESTS" in keys(vm), "the guest's variable", SOON)
    os.unlink(vm.env("REMOVED"))

    def same():
        return keys(vm) == ["GUESTS", "KEPT"] and read_bytes(vm.env("KEPT")) == b"it's\nhere"

    vm.close()
    write(vm / "status", "stopped\n")
    assert same()
    write(vm / "status", "running\n")
    assert same()
    assert guest_keys(vm) == ["GUESTS", "KEPT"]
    assert vm.value("KEPT") == b"it's\nhere" and vm.value("GUESTS") == b"theirs"
    assert not vm.is_set("REMOVED")

    one.kill()
    one.start()
    vm.wait("running", 30)
    wait_for(same, "the variables after the daemon's death")
    os.unlink(vm.env("GUESTS"))
    write(vm.env("LAST"), "acknowledged\n")
    one.kill()
    one.start()
    vm.wait("running", 30)
    wait_for(lambda: keys(vm) == ["KEPT", "LAST"], "what was acknowledged before the death")
    vm.close()
    write(vm / "status", "stopped\n")
    one.kill()
    one.start()
    assert vm.status() == "stopped"
    assert keys(vm) == ["KEPT", "LAST"]
    os.unlink(vm.env("KEPT"))
    write(vm.env("STOPPED"), "set while stopped\n")
    one.kill()
    one.start()
    assert keys(vm) == ["LAST", "STOPPED"]
    write(vm / "status", "running\n")
    assert guest_keys(vm) == ["LAST", "STOPPED"]
    assert not vm.is_set("KEPT")
    assert vm.value("STOPPED") == b"set while stopped"


@pytest.mark.deadline(200)
def test_lines_of_others_outlive_a_daemon_that_dies_while_the_vm_is_stopped(daemon):
    one = daemon()
    vm = one.boot("a")
    vm.ssh(f"printf '%s\\n' 'umask 027' 'export GUESTS=theirs' >> {ENV_FILE}")
    wait_for(lambda: "GUESTS" in keys(vm), "the guest's variable", SOON)
    vm.close()
    write(vm / "status", "stopped\n")
    one.kill()
    one.start()
    assert keys(vm) == ["GUESTS"]
    write(vm / "status", "running\n")
    assert b"umask 027\n" in guest_file(vm) and vm.value("GUESTS") == b"theirs"


@pytest.mark.deadline(200)
def test_what_is_written_while_it_boots_is_there_before_the_first_login(daemon):
    one = daemon()
    os.mkdir(one.vm("a"))
    vm = one.guest("a")
    sh(f"cd '{vm / 'env'}'; echo one > EARLY; echo two > REMOVED; rm REMOVED; echo three > EARLY")
    write(vm.env("LATER"), "x\n")
    assert vm.status() == "booting"
    # All the time until it runs, and each write is acknowledged.
    number = 0
    while vm.status() == "booting":
        number += 1
        write(vm.env("COUNT"), f"{number}\n")
    vm.wait("running")
    assert vm.value("EARLY") == b"three"
    assert vm.value("LATER") == b"x"
    assert vm.value("COUNT") == b"%d" % number
    assert not vm.is_set("REMOVED")
    assert guest_keys(vm) == keys(vm) == ["COUNT", "EARLY", "LATER"]


@pytest.mark.deadline(200)
def test_an_acknowledged_write_survives_a_daemon_that_is_killed_while_the_vm_boots(daemon):
    one = daemon()
    os.mkdir(one.vm("a"))
    vm = one.guest("a")
    for number in range(5):
        write(vm.env(f"BOOT_{number}"), f"{number}\n")
    one.kill()
    one.start()
    assert keys(vm) == [f"BOOT_{n}" for n in range(5)]
    vm.wait("running")
    assert guest_keys(vm) == [f"BOOT_{n}" for n in range(5)]
    assert vm.value("BOOT_4") == b"4"


def test_the_state_on_disk_is_for_the_owner_alone(clear):
    write(clear.env("SECRET"), "s3cret-value-on-disk\n")
    found = sh(f"grep -rl s3cret-value-on-disk '{clear.daemon.state}' | xargs -r stat -c '%a %n'", check=False).stdout
    for line in found.decode().splitlines():
        assert line.startswith("600 "), line
    assert os.stat(clear.daemon.state).st_mode & 0o077 == 0
    assert "s3cret-value" not in read(clear.daemon.log)
