"""Temporary files of tools in env/: they are files there, and never variables of the guest."""

import contextlib
import ctypes
import errno
import os
import signal
import stat
import subprocess
import tempfile

import pytest

from harness import Client, read, read_bytes, refused, sh, takes_at_most, wait_for, write
from tools_env import clean_env, environment, guest_file, guest_keys, keys, python, plain_text

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD = -100
LIBC = ctypes.CDLL(None, use_errno=True)


def renameat2(old, new, flags):
    if LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), old, None, new)


def scratch(vm, name, content=b""):
    """As mkstemp(3) makes it."""
    fd = os.open(vm.env(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
    return vm.env(name)


@pytest.fixture
def clear(vm):
    """The shared VM with nothing in env/."""
    clean_env(vm)
    yield vm
    clean_env(vm)


# --- what is scratch ---


@pytest.mark.parametrize("name", ["sedAb3xY9", "TOOLx7fGh2", ".TOOL.swp", ".ansible_tmpx", "TOOL.gawk.Xy", "TOOL.lock"])
def test_what_mkstemp_makes_is_a_file_and_no_variable(clear, name):
    write(clear.env("KEPT"), "v\n")
    before = guest_file(clear)
    path = scratch(clear, name, b"some\0bytes")
    assert keys(clear) == sorted(["KEPT", name])
    assert read_bytes(path) == b"some\0bytes"
    write(path, b"other bytes")  # reopened with O_TRUNC
    with open(path, "ab") as f:
        f.write(b" and more")
    assert read_bytes(path) == b"other bytes and more"
    os.truncate(path, 5)
    os.chmod(path, 0o755)
    os.chown(path, 3, 4)
    os.utime(path, ns=(1, 1_234_567_890_123_456_789))
    at = os.stat(path)
    assert (at.st_size, stat.S_IMODE(at.st_mode), at.st_uid, at.st_gid) == (5, 0o755, 3, 4)
    assert at.st_mtime_ns == 1_234_567_890_123_456_789
    assert guest_file(clear) == before
    assert plain_text(clear / "environ") == "KEPT='v'\n"
    os.unlink(path)
    assert keys(clear) == ["KEPT"]
    assert guest_file(clear) == before


@pytest.mark.parametrize("name", [".hidden", "#TOOL#", "TOOL~"])
def test_the_special_names_are_scratch_however_they_are_made(clear, name):
    before = guest_file(clear)
    sh(f"cd '{clear / 'env'}' && echo one > '{name}' && cp '{name}' '{name}~' && echo two >> '{name}'")
    assert read(clear.env(name)) == "one\ntwo\n"
    assert keys(clear) == sorted([name, name + "~"])
    assert guest_file(clear) == before
    assert plain_text(clear / "environ") == ""


SUFFIXES = ["tmp", "new", "old", "bak", "orig", "part", "lock", "swp"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_shell_may_put_a_temporary_file_beside_a_variable(clear, suffix):
    write(clear.env("KEY"), "a\n")
    before = guest_file(clear)
    sh(f"cd '{clear / 'env'}' && sed s/a/b/ KEY > KEY.{suffix}")
    assert keys(clear) == ["KEY", f"KEY.{suffix}"]
    assert stat.S_IMODE(os.stat(clear.env(f"KEY.{suffix}")).st_mode) == 0o600
    assert guest_file(clear) == before
    sh(f"cd '{clear / 'env'}' && mv KEY.{suffix} KEY")
    assert keys(clear) == guest_keys(clear) == ["KEY"]
    assert clear.value("KEY") == b"b"
    assert stat.S_IMODE(os.stat(clear.env("KEY")).st_mode) == 0o600
    sh(f"cd '{clear.path}' && sed s/b/c/ environ > environ.{suffix} && mv environ.{suffix} environ")
    assert clear.value("KEY") == b"c"
    assert not os.path.exists(clear / f"environ.{suffix}")


@pytest.mark.parametrize("name", ["OTHER.tmp", "KEY.B", "KEY.tmp.x", "KEY.", "KEY.TMP", "1A.tmp", "MY-VAR", "KEY-tmp"])
def test_no_other_name_is_scratch_without_o_excl(clear, name):
    write(clear.env("KEY"), "v\n")
    done = sh(f"echo x > '{clear.env(name)}'", check=False)
    assert done.returncode != 0
    with refused("EINVAL"):
        os.open(clear.env(name), os.O_WRONLY | os.O_CREAT, 0o600)
    assert keys(clear) == ["KEY"]


@pytest.mark.parametrize("name", ["info.tmp", "environ.x", "KEY.tmp", "environ-tmp", "x.tmp"])
def test_nor_is_it_beside_environ(clear, name):
    write(clear.env("KEY"), "v\n")
    with refused("EPERM"):
        os.open(clear / name, os.O_WRONLY | os.O_CREAT, 0o600)
    assert name not in os.listdir(clear.path)


def test_a_scratch_name_is_taken(clear):
    scratch(clear, "tmpabc123")
    with refused("EEXIST"):
        scratch(clear, "tmpabc123")
    # It stays scratch for who opens it anew.
    sh(f"cd '{clear / 'env'}' && echo x > tmpabc123")
    assert guest_keys(clear) == []
    assert not clear.is_set("tmpabc123")
    # Once it is gone, the name is free for a variable.
    os.unlink(clear.env("tmpabc123"))
    sh(f"cd '{clear / 'env'}' && echo x > tmpabc123")
    assert clear.value("tmpabc123") == b"x"


def test_what_is_removed_stays_readable_for_who_has_it_open(clear):
    path = scratch(clear, "tmpopen01", b"content")
    fd = os.open(path, os.O_RDWR)
    try:
        os.unlink(path)
        assert keys(clear) == []
        assert os.pread(fd, 100, 0) == b"content"
        os.pwrite(fd, b"C", 0)
        assert os.pread(fd, 100, 0) == b"Content"
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


def test_the_python_library_makes_temporary_files_in_env(clear):
    with tempfile.NamedTemporaryFile(dir=clear / "env", prefix="x", suffix="y") as f:
        f.write(b"data")
        f.flush()
        assert os.path.basename(f.name) in keys(clear)
        assert read_bytes(f.name) == b"data"
    assert keys(clear) == []
    assert guest_keys(clear) == []


# --- bounds ---


def test_a_scratch_file_takes_4_mib(clear):
    path = scratch(clear, "tmpbig0001")
    with open(path, "wb", 0) as f:
        f.write(b"x" * (4 << 20))
        with refused("EFBIG"):
            f.write(b"y")
    assert os.stat(path).st_size == 4 << 20
    with refused("EFBIG"):
        os.truncate(path, (4 << 20) + 1)
    with refused("EFBIG"):
        os.truncate(path, 1 << 60)
    fd = os.open(path, os.O_WRONLY)
    try:
        with refused("EFBIG"):
            os.pwrite(fd, b"z", 1 << 40)
    finally:
        os.close(fd)
    assert "temporary file" in clear.error()
    assert os.stat(path).st_size == 4 << 20
    # What is too large for a variable cannot become one.
    with refused("EFBIG"):
        os.rename(path, clear.env("TOO_LARGE"))
    assert keys(clear) == ["tmpbig0001"]


def test_all_scratch_of_a_vm_takes_8_mib(clear):
    for number in range(2):
        with open(scratch(clear, f"tmpfull{number}"), "wb", 0) as f:
            f.write(b"x" * (4 << 20))
    with open(scratch(clear, "tmpfull2"), "wb", 0) as f:
        with refused("ENOSPC"):
            f.write(b"x")
    assert "temporary file" in clear.error()
    # A variable needs no scratch, and room comes back.
    write(clear.env("ROOM"), "v")
    assert clear.value("ROOM") == b"v"
    os.unlink(clear.env("tmpfull0"))
    write(clear.env("tmpfull2"), b"x" * 1000)


def test_there_are_at_most_256_scratch_files(clear):
    for number in range(256):
        scratch(clear, f"tmp{number:03}xyz")
    with refused("ENOSPC"):
        scratch(clear, "tmp256xyz")
    with refused("ENOSPC"):
        os.mkdir(clear.env("x.lock"))
    assert len(keys(clear)) == 256
    write(clear.env("ROOM"), "v")
    assert clear.value("ROOM") == b"v"
    with refused("ENOSPC"):  # a variable that is renamed away
        os.rename(clear.env("ROOM"), clear.env("ROOM.bak"))
    assert read(clear.env("ROOM")) == "v"
    assert clear.value("ROOM") == b"v"
    os.unlink(clear.env("tmp000xyz"))
    scratch(clear, "tmp256xyz")
    assert clear.error() != ""


@pytest.mark.deadline(200)
def test_scratch_that_nobody_uses_expires(daemon):
    vm = daemon("scratch_timeout=1").boot("a")
    write(vm.env("KEPT"), "v\n")
    held = os.open(scratch(vm, "tmpheld01", b"in use"), os.O_RDONLY)
    try:
        scratch(vm, "tmpleft01", b"forgotten")
        os.mkdir(vm.env("left.lock"))
        with open(vm / "environ.tmp~", "w", encoding="ascii") as f:
            f.write("beside environ")
        wait_for(lambda: keys(vm) == ["KEPT", "tmpheld01"], "the scratch expires", 10)
        wait_for(lambda: "environ.tmp~" not in os.listdir(vm.path), "the scratch beside environ expires", 10)
        # It stays for as long as it is open, and then goes as well.
        assert os.pread(held, 100, 0) == b"in use"
    finally:
        os.close(held)
    wait_for(lambda: keys(vm) == ["KEPT"], "the last one expires", 10)
    assert vm.value("KEPT") == b"v"


def test_scratch_does_not_outlive_the_daemon_and_is_not_on_disk(daemon):
    one = daemon()
    os.mkdir(one.vm("a"))
    vm = one.guest("a")
    write(vm.env("KEPT"), "v\n")
    scratch(vm, "tmpsecret", b"d41d8cd98f00b204")
    assert subprocess.run(["grep", "-r", "d41d8cd98f00b204", one.state], check=False, timeout=20).returncode == 1
    one.kill()
    one.start()
    assert keys(vm) == ["KEPT"]


# --- lock directories ---


def test_lock_directories(clear):
    path = clear.env("TOOL20260101-1-x.lock")
    os.mkdir(path, 0o700)
    assert os.path.isdir(path) and stat.S_IMODE(os.stat(path).st_mode) == 0o700
    with refused("EEXIST"):
        os.mkdir(path)
    assert os.listdir(path) == []
    assert keys(clear) == [os.path.basename(path)]
    assert guest_keys(clear) == []
    with refused("EISDIR", "EPERM"):
        os.unlink(path)
    os.rename(path, clear.env("other.lock"))
    with refused("EISDIR"):
        os.rename(scratch(clear, "tmpfile01"), clear.env("other.lock"))
    with refused("ENOTDIR", "EINVAL"):
        os.rename(clear.env("other.lock"), clear.env("tmpfile01"))
    os.rmdir(clear.env("other.lock"))
    with refused("ENOENT"):
        os.rmdir(path)
    with refused("ENOTDIR"):
        os.rmdir(clear.env("tmpfile01"))


def test_a_variable_is_no_directory(clear):
    with refused("EINVAL"):
        os.mkdir(clear.env("VARIABLE"))
    write(clear.env("VARIABLE"), "v")
    with refused("EEXIST"):
        os.mkdir(clear.env("VARIABLE"))
    os.mkdir(clear.env("a.lock"))
    with refused("ENOTDIR"):
        os.rename(clear.env("a.lock"), clear.env("VARIABLE"))
    with refused("EINVAL", "ENOTDIR"):
        os.rename(clear.env("a.lock"), clear.env("NEW_VARIABLE"))
    with refused("EISDIR"):
        os.rename(clear.env("VARIABLE"), clear.env("a.lock"))
    assert clear.value("VARIABLE") == b"v"


# --- renames ---


def test_scratch_to_a_new_key(clear):
    os.rename(scratch(clear, "tmpabc001", b"value\n"), clear.env("KEY"))
    assert keys(clear) == guest_keys(clear) == ["KEY"]
    assert clear.value("KEY") == b"value"
    assert read_bytes(clear.env("KEY")) == b"value\n"


def test_scratch_to_a_key_that_is_there(clear):
    write(clear.env("KEY"), "old\n")
    os.rename(scratch(clear, "tmpabc001", b"value"), clear.env("KEY"))
    assert keys(clear) == guest_keys(clear) == ["KEY"]
    assert clear.value("KEY") == b"value"
    assert read_bytes(clear.env("KEY")) == b"value"


def test_key_to_key_is_one_update(clear):
    write(clear.env("FROM"), "value\n")
    write(clear.env("TO"), "old\n")
    before = clear.info()
    os.rename(clear.env("FROM"), clear.env("TO"))
    after = clear.info()
    assert after["env_updates"] == before["env_updates"] + 1
    assert keys(clear) == guest_keys(clear) == ["TO"]
    assert clear.value("TO") == b"value"
    os.rename(clear.env("TO"), clear.env("NEW"))
    assert keys(clear) == guest_keys(clear) == ["NEW"]
    assert clear.value("NEW") == b"value"
    with refused("ENOENT"):
        os.rename(clear.env("FROM"), clear.env("TO"))


def test_key_to_scratch_unsets_it(clear):
    write(clear.env("KEY"), "value\n")
    os.rename(clear.env("KEY"), clear.env("KEY.bak"))
    assert keys(clear) == ["KEY.bak"]
    assert guest_keys(clear) == []
    assert not clear.is_set("KEY")
    assert read_bytes(clear.env("KEY.bak")) == b"value\n"
    # And over scratch that is there, and back.
    write(clear.env("KEY"), "second\n")
    os.rename(clear.env("KEY"), clear.env("KEY.bak"))
    assert read_bytes(clear.env("KEY.bak")) == b"second\n"
    os.rename(clear.env("KEY.bak"), clear.env("KEY"))
    assert clear.value("KEY") == b"second"
    assert keys(clear) == ["KEY"]


def test_scratch_to_scratch(clear):
    before = clear.info()["env_commits"]
    scratch(clear, "tmpone001", b"one")
    scratch(clear, "tmptwo001", b"two")
    os.rename(clear.env("tmpone001"), clear.env("tmptwo001"))
    assert read_bytes(clear.env("tmptwo001")) == b"one"
    os.rename(clear.env("tmptwo001"), clear.env("three.x"))
    assert keys(clear) == ["three.x"] and read_bytes(clear.env("three.x")) == b"one"
    os.rename(clear.env("three.x"), clear.env("three.x"))
    assert clear.info()["env_commits"] == before
    assert guest_keys(clear) == []


PAIRS = {
    "key, key": (False, False),
    "key, scratch": (False, True),
    "scratch, key": (True, False),
    "scratch, scratch": (True, True),
}


def two(vm, pair):
    """Two files, ONE or one.x and TWO or two.x."""
    names = []
    for name, is_scratch in zip(("ONE", "TWO"), PAIRS[pair]):
        if is_scratch:
            name = name.lower() + ".x"
            scratch(vm, name, name.encode() + b"\n")
        else:
            write(vm.env(name), name + "\n")
        names.append(name)
    return names


@pytest.mark.parametrize("pair", PAIRS)
def test_exchange(clear, pair):
    one, two_ = two(clear, pair)
    updates = clear.info()["env_updates"]
    renameat2(clear.env(one), clear.env(two_), EXCHANGE)
    assert read(clear.env(one)) == two_ + "\n"
    assert read(clear.env(two_)) == one + "\n"
    variables = [name for name in (one, two_) if name.isupper()]
    assert guest_keys(clear) == variables
    for name in variables:
        assert clear.value(name) == (two_ if name == one else one).encode()
    assert clear.info()["env_updates"] == updates + (1 if variables else 0)
    assert keys(clear) == sorted([one, two_])


@pytest.mark.parametrize("pair", PAIRS)
def test_noreplace(clear, pair):
    one, two_ = two(clear, pair)
    with refused("EEXIST"):
        renameat2(clear.env(one), clear.env(two_), NOREPLACE)
    assert read(clear.env(one)) == one + "\n" and read(clear.env(two_)) == two_ + "\n"
    os.unlink(clear.env(two_))
    renameat2(clear.env(one), clear.env(two_), NOREPLACE)
    assert keys(clear) == [two_]
    assert read(clear.env(two_)) == one + "\n"
    assert guest_keys(clear) == ([two_] if two_.isupper() else [])


def test_renames_that_cannot_be(clear):
    write(clear.env("KEY"), "v\n")
    with refused("ENOENT"):
        renameat2(clear.env("KEY"), clear.env("ABSENT"), EXCHANGE)
    with refused("EINVAL"):
        renameat2(clear.env("KEY"), clear.env("OTHER"), NOREPLACE | EXCHANGE)
    with refused("EINVAL", "EPERM"):
        renameat2(clear.env("KEY"), clear.env("OTHER"), WHITEOUT)
    with refused("EINVAL"):  # the name is reserved by shells
        os.rename(scratch(clear, "tmpuid001", b"0"), clear.env("UID"))
    with refused("EINVAL"):
        os.rename(scratch(clear, "tmpnul001", b"a\0b"), clear.env("NUL"))
    assert read_bytes(clear.env("tmpnul001")) == b"a\0b"
    assert read(clear.env("KEY")) == "v\n"
    assert guest_keys(clear) == ["KEY"]


def test_rename_out_of_env_is_another_device(clear, new_vm):
    write(clear.env("KEY"), "v\n")
    scratch(clear, "tmpout001", b"x")
    other = new_vm("other")
    write(other.env("KEY"), "theirs\n")
    for name in ("KEY", "tmpout001"):
        for target in (other.env("KEY"), other.env("NEW"), clear / "NEW", clear / "environ", clear / "status"):
            with refused("EXDEV"):
                os.rename(clear.env(name), target)
    with refused("EXDEV"):
        os.rename(clear / "environ", clear.env("KEY"))
    # mv(1) copies then.
    sh(f"mv '{clear.env('KEY')}' '{other.env('KEY')}'")
    assert other.value("KEY") == b"v"
    assert guest_keys(clear) == []


def test_inode_and_metadata_go_along_with_a_rename(clear):
    path = scratch(clear, "tmpmeta01", b"value\n")
    os.chmod(path, 0o644)
    os.chown(path, 7, 8)
    os.utime(path, ns=(5, 1_111_111_111_222_333_444))
    inode = os.stat(path).st_ino
    for name in ("KEY", "OTHER_KEY", "key.bak", "KEY"):
        os.rename(path, clear.env(name))
        path = clear.env(name)
        at = os.stat(path)
        assert at.st_ino == inode, name
        assert (stat.S_IMODE(at.st_mode), at.st_uid, at.st_gid) == (0o644, 7, 8), name
        assert at.st_mtime_ns == 1_111_111_111_222_333_444, name
        assert {e.name: e.inode() for e in os.scandir(clear / "env")} == {name: inode}
    assert clear.value("KEY") == b"value"
    # A set later is a new moment.
    write(path, "other\n")
    assert os.stat(path).st_mtime_ns > 1_111_111_111_222_333_444
    assert os.stat(path).st_ino == inode


def test_metadata_outlive_what_is_read_from_the_guest(clear):
    write(clear.env("KEY"), "v\n")
    os.chmod(clear.env("KEY"), 0o640)
    os.utime(clear.env("KEY"), ns=(5, 1_111_111_111_222_333_444))
    inode = os.stat(clear.env("KEY")).st_ino
    clear.ssh("echo 'export GUESTS=1' >> /etc/profile.d/vmsfs_env.sh")
    wait_for(lambda: "GUESTS" in keys(clear), "the guest's variable")
    at = os.stat(clear.env("KEY"))
    assert (stat.S_IMODE(at.st_mode), at.st_mtime_ns, at.st_ino) == (0o640, 1_111_111_111_222_333_444, inode)


# --- open files ---


def test_a_reader_keeps_the_moment_of_its_open(clear):
    write(clear.env("KEY"), "first, a long value\n")
    fd = os.open(clear.env("KEY"), os.O_RDONLY)
    try:
        assert os.read(fd, 5) == b"first"
        write(clear.env("KEY"), "second\n")
        assert os.read(fd, 100) == b", a long value\n"
        assert os.pread(fd, 100, 0) == b"first, a long value\n"
        os.unlink(clear.env("KEY"))
        assert os.pread(fd, 100, 0) == b"first, a long value\n"
    finally:
        os.close(fd)


def test_a_reader_keeps_its_snapshot_over_a_rename(clear):
    write(clear.env("KEY"), "first\n")
    fd = os.open(clear.env("KEY"), os.O_RDONLY)
    try:
        os.rename(scratch(clear, "tmpren001", b"second\n"), clear.env("KEY"))
        assert os.pread(fd, 100, 0) == b"first\n"
        assert read(clear.env("KEY")) == "second\n"
        os.rename(clear.env("KEY"), clear.env("OTHER"))
        assert os.pread(fd, 100, 0) == b"first\n"
    finally:
        os.close(fd)


def test_scratch_that_is_renamed_while_open_goes_on(clear):
    fd = os.open(clear.env("tmpgoon01"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, b"one")
        os.rename(clear.env("tmpgoon01"), clear.env("KEY"))
        assert clear.value("KEY") == b"one"
        os.write(fd, b" two")
        os.fsync(fd)
    finally:
        os.close(fd)
    wait_for(lambda: clear.value("KEY") == b"one two", "what was written after the rename")
    assert read(clear.env("KEY")) == "one two"


def test_writing_on_a_key_that_is_renamed_meanwhile(clear):
    write(clear.env("KEY"), "old\n")
    fd = os.open(clear.env("KEY"), os.O_WRONLY)
    try:
        os.rename(clear.env("KEY"), clear.env("MOVED"))
        with contextlib.suppress(OSError):  # ESTALE would say it as well
            os.write(fd, b"new\n")
            assert clear.value("MOVED") == b"new", "an acknowledged write goes where the file is now"
    finally:
        os.close(fd)
    assert keys(clear) == guest_keys(clear)
    assert "KEY" not in keys(clear)


def test_subshells_write_in_turn_on_an_inherited_descriptor(clear):
    sh(f"""exec 3> '{clear.env("KEY")}'
        (echo one >&3); (echo two >&3; exec 3>&-); echo three >&3 &
        wait; exec 4>&3 3>&-; echo four >&4; exec 4>&-""")
    assert read(clear.env("KEY")) == "one\ntwo\nthree\nfour\n"
    assert clear.value("KEY") == b"one\ntwo\nthree\nfour"


def test_a_child_that_keeps_the_descriptor_delays_nothing(clear):
    with Client(f"exec 3> '{clear.env('KEY')}'; echo v >&3; sleep 60 & exit 0") as client:
        wait_for(lambda: os.path.exists(clear.env("KEY")), "the file")
        wait_for(lambda: clear.value("KEY") == b"v", "the value")
        write(clear.env("KEY"), "w\n")
        assert clear.value("KEY") == b"w"
        client.signal(signal.SIGKILL)  # the child; its parent has ended
    # Its last close commits nothing.
    assert clear.value("KEY") == b"w"
    assert read(clear.env("KEY")) == "w\n"


def test_dup_of_a_descriptor_that_is_closed_before_the_write(clear):
    fd = os.open(clear.env("KEY"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    other = os.dup(fd)
    os.close(other)  # FLUSH before the first WRITE
    os.write(fd, b"a")
    other = os.dup(fd)
    os.write(other, b"b")
    os.close(fd)
    assert clear.value("KEY") == b"ab"
    os.write(other, b"c")
    os.close(other)
    assert clear.value("KEY") == b"abc"


def test_two_processes_append(clear):
    script = f"i=0; while [ $i -lt 20 ]; do echo \"$W$i\" >> '{clear.env('KEY')}' || exit; i=$((i+1)); done"
    write(clear.env("KEY"), "start\n")
    clients = [Client(script, env=environment(W=w)) for w in "ab"]
    for client in clients:
        assert client.result(60)[0] == 0
    lines = read(clear.env("KEY")).splitlines()
    assert lines[0] == "start"
    assert sorted(lines[1:]) == sorted(f"{w}{i}" for w in "ab" for i in range(20))
    assert [line for line in lines if line[0] == "a"] == [f"a{i}" for i in range(20)]
    assert clear.value("KEY").decode().splitlines() == lines


def test_two_open_appenders_do_not_overwrite_each_other(clear):
    write(clear.env("KEY"), "start\n")
    fds = [os.open(clear.env("KEY"), os.O_WRONLY | os.O_APPEND) for _ in range(2)]
    try:
        for number in range(6):
            os.write(fds[number % 2], b"%d\n" % number)
    finally:
        for fd in fds:
            os.close(fd)
    assert sorted(read(clear.env("KEY")).splitlines()) == sorted(["start", *"012345"])
    assert clear.value("KEY").decode() + "\n" == read(clear.env("KEY"))


def test_what_is_unset_while_it_is_open_for_writing_is_set_by_the_write(clear):
    write(clear.env("KEY"), "old\n")
    fd = os.open(clear.env("KEY"), os.O_WRONLY | os.O_TRUNC)
    try:
        os.unlink(clear.env("KEY"))
        assert not clear.is_set("KEY")
        # On a disk it would go to a file without a name.
        with contextlib.suppress(OSError):
            os.write(fd, b"new\n")
    finally:
        os.close(fd)
    assert clear.is_set("KEY") == ("KEY" in keys(clear))


# --- names and numbers ---


def test_names_of_255_bytes(clear):
    name = "N" * 255
    write(clear.env(name), "v\n")
    assert clear.value(name) == b"v"
    assert keys(clear) == [name]
    os.rename(clear.env(name), clear.env("M" * 255))
    assert clear.value("M" * 255) == b"v"
    scratch(clear, "." + "s" * 254)
    os.rename(clear.env("." + "s" * 254), clear.env("S" * 255))
    assert guest_keys(clear) == ["M" * 255, "S" * 255]
    for call in (
        lambda: write(clear.env("N" * 256), "v"),
        lambda: scratch(clear, "s" * 256),
        lambda: os.stat(clear.env("N" * 256)),
        lambda: os.rename(clear.env("M" * 255), clear.env("N" * 256)),
        lambda: os.mkdir(clear.env("." + "d" * 255)),
        lambda: os.unlink(clear.env("N" * 256)),
    ):
        with refused("ENAMETOOLONG"):
            call()
    with refused("EINVAL"):
        write(clear / "environ", "N" * 256 + "=v\n")
    assert guest_keys(clear) == ["M" * 255, "S" * 255]


@pytest.mark.deadline(200)
def test_thousands_of_variables(clear):
    names = [f"MANY_{number:04}" for number in range(2000)]
    text = "".join(f"{name}='value of {name}'\n" for name in names)
    with takes_at_most(20, "setting 2000 variables"):
        write(clear / "environ", text)
    assert keys(clear) == names
    assert guest_keys(clear) == names
    assert plain_text(clear / "environ") == text
    with takes_at_most(15, "ls -l of 2000 variables"):
        lines = subprocess.run(
            ["ls", "-l", clear / "env"], check=True, capture_output=True, timeout=60, env=environment()
        ).stdout.splitlines()
    assert len(lines) == 2001
    assert len({os.stat(clear.env(name)).st_ino for name in names}) == 2000
    for name in (names[0], names[1000], names[-1]):
        assert read(clear.env(name)) == f"value of {name}\n"
        assert clear.value(name) == f"value of {name}".encode()
    with takes_at_most(10, "one set among 2000"):
        write(clear.env("MANY_1000"), "changed")
    assert clear.value("MANY_1000") == b"changed"
    with takes_at_most(60, "rm of 100 variables"):
        sh(f"rm '{clear / 'env'}'/MANY_00*")
    assert guest_keys(clear) == names[100:]
    write(clear / "environ", "")
    os.truncate(clear / "environ", 0)
    wait_for(lambda: keys(clear) == [], "all are gone")


def test_ls_while_variables_come_and_go_shows_those_that_stay(clear):
    for number in range(300):
        scratch(clear, f"tmp{number:03}stay") if number < 200 else None
    write(clear / "environ", "".join(f"STAY_{n:03}='x'\n" for n in range(300)))
    script = f"cd '{clear / 'env'}'; while :; do echo x > COMING; rm COMING; done"
    with Client(script):
        for _ in range(20):
            seen = os.listdir(clear / "env")
            assert len(seen) == len(set(seen)), "a name is listed twice"
            assert {f"STAY_{n:03}" for n in range(300)} <= set(seen)
            assert {f"tmp{n:03}stay" for n in range(200)} <= set(seen)


# --- beside environ, and the end ---


def test_scratch_beside_environ(clear):
    write(clear / "environ", "A='1'\n")
    path = clear / "environ.tmp.Xx1"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"B=2\n")
    os.close(fd)
    assert "environ.tmp.Xx1" in os.listdir(clear.path)
    with refused("EPERM", "EACCES", "EINVAL"):
        os.rename(path, clear / "status")
    with refused("EEXIST"):
        renameat2(path, clear / "environ", NOREPLACE)
    os.rename(path, clear / "environ")
    assert plain_text(clear / "environ") == "B='2'\n"
    assert guest_keys(clear) == ["B"]
    assert not os.path.exists(path)
    with refused("EPERM", "EACCES", "EINVAL"):
        write(clear / "unknown", "x")


def test_a_bad_scratch_does_not_become_environ(clear):
    write(clear / "environ", "A='1'\n")
    path = clear / "environ.tmp.Xx2"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"B=2\nno assignment\n")
    os.close(fd)
    with refused("EINVAL"):
        os.rename(path, clear / "environ")
    assert "line 2" in clear.error()
    assert plain_text(clear / "environ") == "A='1'\n"
    assert read(path) == "B=2\nno assignment\n"
    assert guest_keys(clear) == ["A"]
    os.unlink(path)


def test_rm_rf_of_a_vm_with_scratch_in_it(new_vm):
    vm = new_vm("doomed")
    write(vm.env("KEY"), "v\n")
    scratch(vm, "tmpdoomed", b"x")
    os.mkdir(vm.env("doomed.lock"))
    fd = os.open(vm / "environ.tmp.Xx3", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    vm.close()
    try:
        sh(f"rm -rf '{vm.path}'")
        assert not os.path.exists(vm.path)
        with contextlib.suppress(OSError):
            os.write(fd, b"into the void")
    finally:
        os.close(fd)


@pytest.mark.parametrize("when", ["booting", "stopped"])
def test_staging_works_without_a_running_guest(daemon, when):
    vm = None
    if when == "stopped":
        vm = daemon().boot("a")
        vm.close()
        write(vm / "status", "stopped\n")
        assert vm.status() == "stopped"
    else:
        one = daemon()
        os.mkdir(one.vm("a"))
        vm = one.guest("a")
        assert vm.status() == "booting"
    write(vm.env("KEY"), "old\n")
    done = subprocess.run(
        ["sed", "-i.bak", "s/old/new/", vm.env("KEY")], capture_output=True, timeout=20, env=environment()
    )
    assert done.returncode == 0, done
    assert keys(vm) == ["KEY", "KEY.bak"]
    write(vm.env("OTHER"), "x\n")
    renameat2(vm.env("OTHER"), vm.env("KEY"), EXCHANGE)
    if when == "stopped":
        write(vm / "status", "running\n")
    vm.wait("running")
    assert keys(vm) == ["KEY", "KEY.bak", "OTHER"]
    assert guest_keys(vm) == ["KEY", "OTHER"]
    assert vm.value("KEY") == b"x" and vm.value("OTHER") == b"new"


def test_errors_of_python_have_the_right_number(clear):
    done = python("import sys; open(sys.argv[1], 'w')", clear.env("MY-VAR"))
    assert done.returncode == 1 and os.strerror(errno.EINVAL).encode() in done.stderr
