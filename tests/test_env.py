"""A file of env/ is a variable of the guest."""

import contextlib
import errno
import os
import random
import stat
import subprocess
import time

import pytest

from harness import SHELLS, Client, read, read_bytes, refused, sh, wait_for, write

shells = pytest.mark.parametrize("shell", SHELLS)


def run(vm, shell, script, **kwargs):
    """A script in env/ of the VM, in a shell of the host."""
    return sh(f"cd '{vm.path}/env' && {{ {script}\n}}", shell, **kwargs)


# --- what shells and tools do ---


@shells
def test_echo_sets_a_variable(vm, shell):
    run(vm, shell, "echo v > ECHO; echo 'v 2' > ECHO")
    assert vm.value("ECHO") == b"v 2"
    assert read(vm.env("ECHO")) == "v 2\n"


@shells
def test_printf_sets_a_variable_without_a_newline(vm, shell):
    run(vm, shell, "printf %s v > PRINTF")
    assert vm.value("PRINTF") == b"v"
    assert read(vm.env("PRINTF")) == "v"


@shells
def test_an_empty_redirection_sets_the_empty_value(vm, shell):
    run(vm, shell, "echo full > EMPTY; : > EMPTY")
    # Committed when the file is let go of, which no close() waits for.
    wait_for(lambda: vm.value("EMPTY") == b"", "the empty value is in the guest")
    assert read(vm.env("EMPTY")) == ""
    run(vm, shell, "rm EMPTY; : > EMPTY")
    wait_for(lambda: vm.value("EMPTY") == b"", "the empty value is in the guest")


@shells
def test_appending_adds_to_the_value(vm, shell):
    run(vm, shell, "echo a > APPEND; echo b >> APPEND; printf %s c >> APPEND")
    assert vm.value("APPEND") == b"a\nb\nc"
    assert read(vm.env("APPEND")) == "a\nb\nc"
    run(vm, shell, "rm APPEND; echo first >> APPEND")
    assert vm.value("APPEND") == b"first"


@shells
def test_several_writes_on_one_redirection_are_one_value(vm, shell):
    run(vm, shell, "{ echo one; echo two; echo three; } > LINES")
    wait_for(lambda: vm.value("LINES") == b"one\ntwo\nthree", "all three lines are in the guest")
    assert read(vm.env("LINES")) == "one\ntwo\nthree\n"


@shells
def test_tee_sets_and_appends(vm, shell):
    assert run(vm, shell, "echo v | tee TEE").stdout == b"v\n"
    assert vm.value("TEE") == b"v"
    run(vm, shell, "echo w | tee -a TEE")
    assert vm.value("TEE") == b"v\nw"


@shells
def test_cp_copies_in_and_out(vm, shell, tmp_path):
    (tmp_path / "in").write_bytes(b"copied\n")
    run(vm, shell, f"cp '{tmp_path}/in' COPY")
    assert vm.value("COPY") == b"copied"
    (tmp_path / "in").write_bytes(b"copied over\n")
    run(vm, shell, f"cp '{tmp_path}/in' COPY; cp COPY '{tmp_path}/out'; cp COPY COPY2")
    assert (tmp_path / "out").read_bytes() == b"copied over\n"
    assert vm.value("COPY") == vm.value("COPY2") == b"copied over"


@shells
def test_cat_reads_what_was_written(vm, shell):
    run(vm, shell, "printf 'a\\n\\n' > CAT")
    assert run(vm, shell, "cat CAT").stdout == b"a\n\n"
    assert vm.value("CAT") == b"a\n"


@shells
def test_ls_shows_the_variables_and_their_sizes(vm, shell):
    run(vm, shell, "echo 12345 > LS_SIX; printf %s 1 > LS_ONE")
    lines = [line.split() for line in run(vm, shell, "ls -l LS_SIX LS_ONE").stdout.decode().splitlines()]
    assert {line[-1]: (line[0], line[4]) for line in lines} == {
        "LS_SIX": ("-rw-------", "6"),
        "LS_ONE": ("-rw-------", "1"),
    }
    assert "LS_SIX" in run(vm, shell, "echo *").stdout.decode().split()


@shells
def test_rm_unsets(vm, shell):
    run(vm, shell, "echo v > RM")
    assert vm.is_set("RM")
    run(vm, shell, "rm RM")
    assert not vm.is_set("RM")
    assert not os.path.exists(vm.env("RM"))
    with refused("ENOENT"):
        os.unlink(vm.env("RM"))


@shells
def test_a_name_that_is_no_variable_is_refused(vm, shell):
    done = run(vm, shell, "echo x > MY-VAR", check=False)
    assert done.returncode != 0
    assert b"MY-VAR" in done.stderr


# --- values ---

VALUES = {
    "empty": b"",
    "spaces": b"  two  spaces  ",
    "tab": b"\ttab\t",
    "single quotes": b"'it''s'",
    "double quotes": b'"said" "',
    "backquotes": b"`reboot`",
    "command": b"$(reboot)",
    "variable": b"$HOME ${PATH} $$ $1",
    "backslashes": b"\\ \\\\ \\n \\",
    "semicolon": b"; reboot; # & | < > ( ) { } * ? [a] ~ !",
    "UTF-8": "Grüße, 世界 🦊".encode(),
    "not UTF-8": b"\xff\xfe\x80\xc3",
    "several lines": b"one\n\ntwo\n three",
    "ends in newlines": b"one\n\n",
    "newline alone": b"\n",
    "carriage return": b"a\r\nb\r",
    "an assignment": b"one\nexport EVIL=1\nthree",
    "closes its quote": b"'\nexport EVIL=1\n'",
    "marker": b"\x1e0123456789abcdef 0\n",
    "here-document": b"<<EOF\nEOF\nexport EVIL=1",
    "end of text": b"a\x04b\x03c\x1a\x1b[2J",
    "equals": b"=a=b=",
    "dash": b"-n",
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_the_same_in_the_guest(vm, name):
    value = VALUES[name]
    write(vm.env("VALUE"), value + b"\n")
    assert vm.value("VALUE") == value
    assert read_bytes(vm.env("VALUE")) == value + b"\n"
    assert not vm.is_set("EVIL")


def test_every_byte_from_1_to_255_is_the_same_in_the_guest(vm):
    value = bytes(range(1, 256))
    write(vm.env("BYTES"), value)
    assert vm.value("BYTES") == value
    assert read_bytes(vm.env("BYTES")) == value


@pytest.mark.deadline(240)
def test_each_byte_by_itself_is_the_same_in_the_guest(vm):
    for byte in range(1, 256):
        # The newline at the end is not part of the value.
        write(vm.env("BYTE_%02X" % byte), bytes([byte]) + b"\n")
    # `set` quotes, so the guest says it in hexadecimal: one look for all.
    script = "for b in $(seq 1 255); do k=BYTE_$(printf %02X $b); eval \"printf %s \\\"\\$$k\\\"\" | od -An -tx1; done"
    seen = vm.ssh("sh -l -c '" + script + "'").decode().split()
    assert seen == ["%02x" % byte for byte in range(1, 256)]
    for byte in range(1, 256):
        os.unlink(vm.env("BYTE_%02X" % byte))


def test_a_value_of_100_kb_is_the_same_in_the_guest(vm):
    value = random.Random(1).randbytes(100_000).replace(b"\0", b"\n").replace(b"\n", b"'\n")[:100_000]
    value = value[:-1] + b"."
    write(vm.env("LARGE"), value)
    assert vm.value("LARGE") == value
    assert read_bytes(vm.env("LARGE")) == value
    assert os.stat(vm.env("LARGE")).st_size == 100_000
    os.unlink(vm.env("LARGE"))


def test_cp_of_100_kb_is_whole(vm, tmp_path):
    value = b"0123456789abcde\n" * 6250
    (tmp_path / "large").write_bytes(value)
    run(vm, "dash", f"cp '{tmp_path}/large' LARGE; cat LARGE | dd bs=999 status=none of=LARGE2")
    assert vm.value("LARGE") == value[:-1]
    assert vm.value("LARGE2") == value[:-1]
    os.unlink(vm.env("LARGE"))
    os.unlink(vm.env("LARGE2"))


def test_the_names_that_a_shell_takes_are_taken(vm):
    for name in ("_", "a", "Z9", "__x__", "N" * 200):
        if name != "_":  # the shell's own
            write(vm.env(name), name)
            assert vm.value(name) == name.encode()
            os.unlink(vm.env(name))


# --- what is refused ---


@pytest.mark.parametrize("name", ["1A", "MY-VAR", "A.B", "A B", "Ä", "A=B", "A:B", "A$B", "-", "A'B", "A\nB"])
def test_a_bad_name_is_refused_at_once(vm, name):
    with refused("EINVAL"):
        os.open(vm.env(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    assert name not in os.listdir(vm / "env")


def test_nul_is_refused_and_the_old_value_stays(vm):
    write(vm.env("NUL"), "before\n")
    with refused("EINVAL"):
        write(vm.env("NUL"), b"a\0b")
    assert read(vm.env("NUL")) == "before\n"
    assert vm.value("NUL") == b"before"
    assert "NUL" in vm.error()


@shells
@pytest.mark.parametrize("operator", [">", ">>"])
def test_nul_in_a_later_piece_is_refused_there(vm, shell, operator):
    write(vm.env("NUL"), "before\n")
    done = run(vm, shell, f"{{ echo a; printf 'x\\0y'; }} {operator} NUL", check=False)
    assert done.returncode != 0, done
    assert "NUL" in vm.error()
    assert vm.value("NUL") == (b"a" if operator == ">" else b"before\na")


@shells
def test_what_follows_a_refused_piece_is_refused_and_nothing_is_mixed(vm, shell):
    large = "head -c 140000 /dev/zero | tr '\\0' x | dd bs=140000 iflag=fullblock status=none"
    for script in ("printf 'a\\0b'; echo b;", f"{large}; echo b;"):
        run(vm, shell, "echo production > MIXED")
        done = run(vm, shell, f"{{ {script} }} > MIXED", check=False)
        assert done.returncode != 0, script
        assert read(vm.env("MIXED")) == "production\n", script
        assert vm.value("MIXED") == b"production", script


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND, 0])
def test_a_handle_that_has_refused_a_piece_takes_no_other_until_it_is_emptied(vm, flags):
    write(vm.env("SAME"), "before\n")
    fd = os.open(vm.env("SAME"), os.O_WRONLY | flags)
    try:
        for piece, error in ((b"\0", "EINVAL"), (b"good", "EINVAL"), (b"x" * 140000, "EINVAL")):
            with refused(error):
                os.write(fd, piece)
        os.fsync(fd)  # nothing that was acknowledged is missing
        assert vm.value("SAME") == b"before"
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"good ")
        os.write(fd, b"again")
        with refused("EFBIG"):
            os.write(fd, b"x" * 131072)
        with refused("EFBIG"):
            os.write(fd, b"y")
    finally:
        with refused("EFBIG"):  # the second piece had been taken
            os.close(fd)
    assert vm.value("SAME") == b"good "


@pytest.mark.parametrize("size, fits", [(131072 - len("LATER=") - 1, True), (131073 - len("LATER=") - 1, False)])
def test_too_large_in_a_later_piece_is_refused_there(vm, size, fits):
    fd = os.open(vm.env("LATER"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(fd, b"x" * 1000)
        if fits:
            os.write(fd, b"x" * (size - 1000))
            os.fsync(fd)
        else:
            with refused("EFBIG"):
                os.write(fd, b"x" * (size - 1000))
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    assert len(vm.value("LATER")) == (size if fits else 1000)
    os.unlink(vm.env("LATER"))


OTHERS = {
    "echo": "echo acked > HELD",
    ">>": "echo acked >> HELD",
    "environ": "echo HELD=acked >> ../environ",
    "rename": "echo acked > FROM && mv FROM HELD",
    "sed": "echo acked > HELD; sed -i s/x/y/ HELD",
    "two appenders": "printf ack >> HELD; echo ed >> HELD",
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_held_truncation_takes_away_nothing_that_was_written_after_it(vm, other, there):
    write(vm.env("HELD"), "old\n")
    if not there:
        os.unlink(vm.env("HELD"))
    fd = os.open(vm.env("HELD"), os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    try:
        run(vm, "dash", OTHERS[other])
        assert read(vm.env("HELD")) == "acked\n"
    finally:
        os.close(fd)
    write(vm.env("AFTER_IT"), "x\n")  # after whatever the close has brought about
    assert read(vm.env("HELD")) == "acked\n"
    assert vm.value("HELD") == b"acked"


def test_a_truncation_after_it_does(vm):
    first = os.open(vm.env("HELD"), os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    write(vm.env("HELD"), "acked\n")
    second = os.open(vm.env("HELD"), os.O_WRONLY | os.O_TRUNC)
    os.close(first)
    try:
        assert read(vm.env("HELD")) == ""
    finally:
        os.close(second)
    wait_for(lambda: vm.value("HELD") == b"", "the newer truncation")


def test_a_value_is_as_long_as_a_program_can_be_started_with(vm):
    """execve(2) takes 131,072 bytes for KEY=value and the NUL behind it; with one more no command would run any more."""
    most = 131072 - len("LIMIT=") - 1
    write(vm.env("LIMIT"), b"x" * most + b"\n")
    try:
        assert len(vm.value("LIMIT")) == most
        assert b"LIMIT=" + b"x" * most + b"\n" in vm.exec("/bin/busybox env")
        for longer in (b"y" * (most + 1), b"y" * 131073, b"y" * most + b"\n\n"):
            with refused("EFBIG"):
                write(vm.env("LIMIT"), longer)
            assert f"{most} bytes" in vm.error() and "env/LIMIT" in vm.error()
        with refused("EFBIG"), open(vm / "environ", "ab", buffering=0) as f:
            f.write(b"LIMIT=" + b"y" * (most + 1) + b"\n")
        assert vm.value("LIMIT")[:3] == b"xxx"
        assert read_bytes(vm.env("LIMIT")) == b"x" * most + b"\n"
    finally:
        os.unlink(vm.env("LIMIT"))


def test_too_large_a_copy_fails_in_the_shell(vm, tmp_path):
    write(vm.env("COPIED"), "before\n")
    (tmp_path / "large").write_bytes(b"x" * 200_000)
    done = run(vm, "dash", f"cp '{tmp_path}/large' COPIED", check=False)
    assert done.returncode != 0 and b"File too large" in done.stderr
    assert read(vm.env("COPIED")) == "before\n"
    assert vm.value("COPIED") == b"before"


@pytest.mark.deadline(200)
def test_all_variables_together_take_1_mib(new_vm):
    vm = new_vm("full")
    part = b"p" * 130_000
    for number in range(8):
        write(vm.env(f"PART{number}"), part)
    with refused("ENOSPC"):
        write(vm.env("PART8"), part)
    assert not os.path.exists(vm.env("PART8"))
    assert vm.value("PART7") == part
    assert not vm.is_set("PART8")
    os.unlink(vm.env("PART0"))
    write(vm.env("PART8"), part)
    assert vm.value("PART8") == part
    # The commands of a VM with as many variables as it takes.
    os.unlink(vm.env("PART1"))
    assert vm.exec("printf %s ${#PART8}") == b"130000"


def test_there_are_no_links_and_no_devices_in_env(vm):
    write(vm.env("LINKED"), "x")
    with refused("EPERM"):
        os.symlink("x", vm.env("SYMLINK"))
    with refused("EPERM"):
        os.link(vm.env("LINKED"), vm.env("HARDLINK"))
    with refused("EPERM"):
        os.mknod(vm.env("FIFO"), 0o600 | stat.S_IFIFO)
    names = os.listdir(vm / "env")
    assert not {"SYMLINK", "HARDLINK", "FIFO"} & set(names)


# --- metadata ---


def test_chmod_chown_and_utimes_are_accepted_and_remembered(vm):
    write(vm.env("META"), "v\n")
    path = vm.env("META")
    os.chmod(path, 0o640)
    os.chown(path, 12, 34)
    os.utime(path, ns=(1_000_000_000_000_000_001, 1_100_000_000_000_000_002))
    at = os.stat(path)
    assert (at.st_mode & 0o7777, at.st_uid, at.st_gid) == (0o640, 12, 34)
    assert at.st_mtime_ns == 1_100_000_000_000_000_002
    assert vm.value("META") == b"v"
    run(vm, "dash", "touch META; touch -d 2001-02-03 META; chmod 600 META; chown 0:0 META")
    assert time.localtime(os.stat(path).st_mtime)[:3] == (2001, 2, 3)
    assert read(path) == "v\n"


@pytest.mark.deadline(200)
def test_metadata_outlive_the_daemon(daemon):
    one = daemon()
    vm = one.boot("a")
    for name in ("PLAIN", "CHANGED", "MOVED"):
        write(vm.env(name), name)
    fd = os.open(vm.env("tmpfile01"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"MOVED")
    os.close(fd)
    os.rename(vm.env("tmpfile01"), vm.env("MOVED"))
    paths = [vm.env("CHANGED"), vm / "environ", vm / "env"]
    for number, path in enumerate(paths):
        os.chmod(path, 0o750 if path == vm / "env" else 0o640)
        os.chown(path, 12, 34)
        os.utime(path, ns=(1_000_000_000_000_000_001, 1_100_000_000_000_000_002 + number))
        at = os.stat(path)
        assert at.st_mtime_ns == 1_100_000_000_000_000_002 + number
        assert (at.st_mode & 0o7777, at.st_uid, at.st_gid) == (0o750 if path == vm / "env" else 0o640, 12, 34)
    paths += [vm.env("PLAIN"), vm.env("MOVED")]

    def look():
        stats = [os.stat(path) for path in paths]
        return [(at.st_mode, at.st_uid, at.st_gid, at.st_mtime_ns, at.st_ino) for at in stats]

    before = look()
    for end in (one.stop, one.kill):
        if end == one.kill:  # what is recorded within a moment
            wait_for(lambda: f"{before[3][3] // 10**9}." in read(f"{one.state}/vms/a/vm.json"), "the record")
        end()
        one.start()
        vm.wait("running", 30)
        assert look() == before
    # And a file that is new gets a number of its own, be it a variable's or a temporary one's.
    write(vm.env("NEW"), "x")
    write(vm.env("tmp~"), "x")
    os.rename(vm.env("tmp~"), vm.env("NEWER"))
    numbers = [entry.inode() for entry in os.scandir(vm / "env")]
    assert len(set(numbers)) == len(numbers) == 5
    # A change is a new moment.
    for path, time_ns in zip(paths[:3], (at[3] for at in before)):
        os.unlink(vm.env("NEW")) if path == vm / "env" else write(vm.env("CHANGED"), "again")
        assert os.stat(path).st_mtime_ns > time_ns
    assert os.stat(vm / "env").st_mode & 0o7777 == 0o750


def test_cp_a_into_env_and_out_again(vm, tmp_path):
    (tmp_path / "in").write_text("kept\n")
    os.utime(tmp_path / "in", (1_000_000_000, 1_000_000_000))
    run(vm, "dash", f"cp -a '{tmp_path}/in' KEPT; cp -p KEPT '{tmp_path}/out'")
    assert (tmp_path / "out").read_text() == "kept\n"
    assert int(os.stat(tmp_path / "out").st_mtime) == 1_000_000_000
    assert vm.value("KEPT") == b"kept"


def test_extended_attributes_are_not_supported_which_tools_take_for_an_answer(vm):
    write(vm.env("XATTR"), "v")
    for call in (
        lambda: os.setxattr(vm.env("XATTR"), "user.x", b"y"),
        lambda: os.getxattr(vm.env("XATTR"), "user.x"),
        lambda: os.listxattr(vm.env("XATTR")),
    ):
        with refused("ENOTSUP", "ENOSYS"):
            if call() == []:  # what the kernel makes of ENOSYS for a list
                raise OSError(errno.ENOTSUP, "empty")


def test_the_size_is_real(vm):
    for value in (b"", b"x", b"x\n", b"x" * 5000):
        write(vm.env("SIZE"), value)
        wait_for(lambda: os.stat(vm.env("SIZE")).st_size == len(value), f"a size of {len(value)}")  # noqa: B023
    for _ in range(2):
        run(vm, "dash", "printf 12345 >> SIZE")
    assert os.stat(vm.env("SIZE")).st_size == 5010
    assert sh("test -s " + vm.env("SIZE"), check=False).returncode == 0


def test_the_mtime_is_that_of_the_change(vm):
    before = time.time()
    write(vm.env("MTIME"), "a")
    first = os.stat(vm.env("MTIME")).st_mtime_ns
    assert before - 1 <= first / 1e9 <= time.time() + 1
    assert read(vm.env("MTIME")) == "a"
    assert os.stat(vm.env("MTIME")).st_mtime_ns == first
    write(vm.env("MTIME"), "b")
    second = os.stat(vm.env("MTIME")).st_mtime_ns
    assert second > first
    run(vm, "dash", f"test MTIME -nt '{vm.path}/ssh_config' || test -e MTIME")


def test_inode_numbers_are_stable_and_different(vm):
    for name in ("INO_A", "INO_B"):
        write(vm.env(name), "x")
    numbers = {name: os.stat(vm.env(name)).st_ino for name in ("INO_A", "INO_B")}
    assert numbers["INO_A"] != numbers["INO_B"]
    write(vm.env("INO_A"), "changed")
    assert {name: os.stat(vm.env(name)).st_ino for name in numbers} == numbers
    listed = {entry.name: entry.inode() for entry in os.scandir(vm / "env")}
    assert {name: listed[name] for name in numbers} == numbers
    files = [entry.inode() for entry in os.scandir(vm.path)]
    assert len(set(files)) == len(files)
    assert {e.name: e.inode() for e in os.scandir(vm.path)} == {
        name: os.stat(vm / name).st_ino for name in os.listdir(vm.path)
    }


def test_truncate_cuts_the_value(vm):
    write(vm.env("TRUNC"), "123456")
    os.truncate(vm.env("TRUNC"), 3)
    assert vm.value("TRUNC") == b"123"
    run(vm, "dash", "truncate -s 1 TRUNC")
    wait_for(lambda: vm.value("TRUNC") == b"1", "the cut value is in the guest")
    with refused("EFBIG", "EINVAL"):
        os.truncate(vm.env("TRUNC"), 1 << 40)
    assert read(vm.env("TRUNC")) == "1"


def test_fsync_commits(vm):
    fd = os.open(vm.env("FSYNC"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(fd, b"one ")
        os.write(fd, b"two")
        os.fsync(fd)
        assert vm.value("FSYNC") == b"one two"
    finally:
        os.close(fd)


def test_the_first_write_commits_before_it_returns(vm):
    fd = os.open(vm.env("FIRST"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(fd, b"one")
        assert vm.value("FIRST") == b"one"
    finally:
        os.close(fd)


# --- removal of what is built in ---


def test_removing_built_in_files_succeeds_and_changes_nothing(vm):
    write(vm.env("SURVIVES"), "v\n")
    for name in ("status", "exec", "info", "error", "console", "ssh_config"):
        os.unlink(vm / name)
        # Who removes status may be about to put another in its place (mv, install): for a moment it is away.
        wait_for(lambda: os.path.exists(vm / name), f"{name} is there", 0 if name != "status" else 1)
        read(vm / name)
    assert vm.status() == "running"
    assert vm.exec("echo still") == b"still\n"
    assert read(vm.env("SURVIVES")) == "v\n"


def test_rmdir_of_env_changes_nothing(vm):
    write(vm.env("SURVIVES"), "v\n")
    os.rmdir(vm / "env")
    assert "SURVIVES" in os.listdir(vm / "env")
    assert read(vm.env("SURVIVES")) == "v\n"
    sh('cd "$D" && echo w > SURVIVES && echo n > NEW_ONE', D=vm / "env")
    assert vm.value("SURVIVES") == b"w"
    assert vm.value("NEW_ONE") == b"n"
    with refused("ENOTDIR"):
        os.rmdir(vm.env("SURVIVES"))
    with refused("ENOTDIR"):
        os.rmdir(vm / "status")
    with refused("EISDIR", "EPERM"):
        os.unlink(vm / "env")


# --- both sides ---


def test_what_is_set_in_the_guest_is_seen(vm):
    write(vm.env("THEIRS"), "ours")
    file = "/etc/profile.d/vmsfs_env.sh"
    vm.ssh(f"sed -i \"s/^export THEIRS=.*/export THEIRS='it is theirs'/\" {file}")
    vm.ssh(f"echo 'export GUESTS=\"own value\"' >> {file}")
    wait_for(lambda: read(vm.env("THEIRS")) == "it is theirs\n", "the guest's value")
    wait_for(lambda: os.path.exists(vm.env("GUESTS")), "the guest's variable")
    assert read(vm.env("GUESTS")) == "own value\n"
    os.unlink(vm.env("GUESTS"))
    assert not vm.is_set("GUESTS")


def test_the_file_in_the_guest_is_sorted_and_readable_by_all(vm):
    write(vm.env("SORT_B"), "b")
    write(vm.env("SORT_A"), "it's")
    text = vm.ssh("cat /etc/profile.d/vmsfs_env.sh").decode(errors="replace")
    assert text.startswith("#!/bin/sh\n#")
    assert "export SORT_A='it'\\''s'\nexport SORT_B='b'\n" in text
    assert vm.ssh("stat -c %a /etc/profile.d/vmsfs_env.sh") == b"644\n"
    assert b"tmp" not in vm.ssh("ls -a /etc/profile.d")


def test_writers_at_once_lose_nothing(vm):
    script = 'i=0; while [ $i -lt 10 ]; do echo "$W $i" > "$D/WRITER_${W}_$i"; i=$((i+1)); done'
    clients = [Client(script, env={"D": vm / "env", "W": str(w), "PATH": os.environ["PATH"]}) for w in range(8)]
    for client in clients:
        status, _, errors = client.result(60)
        assert status == 0, errors
    names = [(w, i) for w in range(8) for i in range(10)]
    seen = vm.ssh("sh -l -c 'env | grep ^WRITER_ | sort'").decode().splitlines()
    assert seen == sorted(f"WRITER_{w}_{i}={w} {i}" for w, i in names)
    before = vm.info()["env_updates"]
    for w, i in names:
        os.unlink(vm.env(f"WRITER_{w}_{i}"))
    assert vm.info()["env_updates"] > before
    assert b"WRITER_" not in vm.ssh("sh -l -c env")


# --- failing ---


@pytest.mark.deadline(200)
def test_a_write_that_cannot_reach_the_guest_fails_in_the_shell_that_made_it(new_vm):
    vm = new_vm("mute")
    write(vm.env("KEPT"), "old\n")
    pid = vm.qemu()
    vm.close()
    subprocess.run(["kill", "-STOP", str(pid)], check=True, timeout=10)
    try:
        for shell in SHELLS:
            done = run(vm, shell, "echo new > KEPT", check=False, seconds=30)
            assert done.returncode != 0, shell
            assert b"rror" in done.stderr or b"imed out" in done.stderr or b"o route" in done.stderr, shell
        assert vm.error() != ""
    finally:
        subprocess.run(["kill", "-CONT", str(pid)], check=True, timeout=10)
    vm.wait("running", 30)
    # The guest may have got it all the same, as the answer was lost: what both sides say agrees.
    assert read(vm.env("KEPT")).strip().encode() == vm.value("KEPT")


@pytest.mark.deadline(200)
@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_write_that_the_guest_refuses_fails_and_changes_nothing(new_vm, shell):
    vm = new_vm("refuses")
    write(vm.env("KEPT"), "old\n")
    vm.ssh("cd / && mount -o bind /etc/profile.d /etc/profile.d && mount -o remount,ro,bind /etc/profile.d")
    done = run(vm, shell, "echo new > KEPT", check=False)
    assert done.returncode != 0
    assert done.stderr != b""
    assert "read-only" in vm.error().lower()
    vm.ssh("umount /etc/profile.d")
    wait_for(lambda: read(vm.env("KEPT")) == "old\n", "the old value")
    assert vm.value("KEPT") == b"old"
    run(vm, shell, "echo newer > KEPT")
    assert vm.value("KEPT") == b"newer"
