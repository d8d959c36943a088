"""ID/environ: all variables in one file."""

import contextlib
import errno
import os
import re
import subprocess
import sys

import pytest

from harness import SHELLS, Client, read, read_bytes, refused, sh, wait_for, write
from tools_env import Reader, clean_env, environment, guest_file, guest_keys, keys, plain_text

NASTY = {
    "A_QUOTE": b"it's",
    "B_LINES": b"one\n\n two\n",
    "C_DOLLAR": b"$HOME ${X} $(reboot) `reboot` $$",
    "D_BACK": b"\\ \\\\ \\n \\t",
    "E_EMPTY": b"",
    "F_SPACE": b"  a  b  ",
    "G_COMMENT": b"a # no comment",
    "H_DOUBLE": b'"x" "',
    "I_UTF8": "Grüße 世界".encode(),
    "J_EXPORT": b"x\nexport EVIL=1\nEVIL=2",
    "K_BYTES": b"\xff\x80\x01\x7f",
    "L_TILDE": b"~ * ? [a] {a,b} !x",
    "M_CR": b"a\r\nb\r",
}


@pytest.fixture
def clear(vm):
    clean_env(vm)
    yield vm
    clean_env(vm)


def environ(vm):
    return vm / "environ"


def set_all(vm, values):
    for name, value in values.items():
        write(vm.env(name), value + b"\n")


def variables(output):
    """What `env -0` has printed, without what every shell sets by itself."""
    pairs = [part.split(b"=", 1) for part in output.split(b"\0") if part]
    return {k.decode(): v for k, v in pairs if k not in (b"PWD", b"OLDPWD", b"SHLVL", b"_", b"PATH", b"PS1", b"PS2", b"PS4", b"IFS")}


# --- reading ---


def test_one_line_a_variable_sorted_and_quoted(clear):
    for name, value in (("B", "2"), ("A", "it's"), ("_C", "x y")):
        write(clear.env(name), value + "\n")
    assert plain_text(environ(clear)) == "A='it'\\''s'\nB='2'\n_C='x y'\n"
    assert os.stat(environ(clear)).st_size == len(read(environ(clear)))
    assert sh(f"stat -c %a '{environ(clear)}'").stdout == b"600\n"


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_a_shell_that_sources_it_has_exactly_the_variables(clear, shell):
    set_all(clear, NASTY)
    argv = ["env", "-i", *[os.path.join("/usr/bin", SHELLS[shell][0]), *SHELLS[shell][1:]]]
    done = subprocess.run(
        argv + [f". '{environ(clear)}'; exec /usr/bin/env -0"], capture_output=True, timeout=30, check=True
    )
    assert variables(done.stdout) == NASTY


def test_env_shows_exactly_the_variables_after_it(clear):
    set_all(clear, {"A": b"1", "B": b"two words"})
    line = f". '{environ(clear)}'; env"
    for shell in ("/bin/dash", "/bin/bash"):
        before = subprocess.run(["env", "-i", shell, "-c", "env"], capture_output=True, timeout=30).stdout.splitlines()
        after = subprocess.run(["env", "-i", shell, "-c", line], capture_output=True, timeout=30).stdout.splitlines()
        assert {l for l in after if l not in before and not l.startswith(b"_=")} == {b"A=1", b"B=two words"}


WRITTEN = {
    "as it prints": "set -a\nA='1'\nB='it'\\''s'\nset +a\n",
    "lines with export": "export A='1'\nexport B='it'\\''s'\n",
    "lines without": "A='1'\nB='it'\\''s'\n",
    "unsorted": "export B='it'\\''s'\nexport A='1'\n",
    "quoted otherwise": "export A=1\nexport B=\"it's\"\n",
    "some with export": "export A='1'\nB='it'\\''s'\n",
    "with a comment": "# mine\nexport A='1'\nexport B='it'\\''s'\n",
    "no newline": "export A='1'\nexport B='it'\\''s'",
}


@pytest.mark.parametrize("how", ["cp", "line by line", "rename"])
@pytest.mark.parametrize("name", WRITTEN)
def test_whatever_was_written_a_shell_that_sources_it_exports_it(clear, tmp_path, name, how):
    text = WRITTEN[name]
    (tmp_path / "new").write_text(text)
    if how == "cp":
        sh(f"cp '{tmp_path}/new' '{environ(clear)}'")
    elif how == "rename":
        sh(f"cp '{tmp_path}/new' '{environ(clear)}~'; mv '{environ(clear)}~' '{environ(clear)}'")
    else:
        sh(f"while IFS= read -r l || [ \"$l\" ]; do printf '%s\\n' \"$l\"; done < '{tmp_path}/new' > '{environ(clear)}'")
    as_written = name in ("as it prints", "lines with export") or (name == "no newline" and how == "line by line")
    assert read(environ(clear)) == (WRITTEN["lines with export"] if as_written and "as it" not in name else WRITTEN["as it prints"])
    for shell in ("/bin/dash", "/bin/bash"):
        done = subprocess.run(["env", "-i", shell, "-c", f". '{environ(clear)}'; exec /usr/bin/env -0"],
                              capture_output=True, timeout=30, check=True)
        assert variables(done.stdout) == {"A": b"1", "B": b"it's"}


def test_lines_with_export_stay_so_until_other_text_is_written(daemon):
    one = daemon()
    vm = one.boot("a")
    text = "export A='1'\nexport B='2'\n"
    write(environ(vm), text)
    assert read(environ(vm)) == text
    assert os.stat(environ(vm)).st_size == len(text)
    write(vm.env("A"), "3\n")
    os.unlink(vm.env("B"))
    sh(f"echo C=4 >> '{environ(vm)}'")
    text = "export A='3'\nexport C='4'\n"
    assert read(environ(vm)) == text
    wait_for(lambda: '"style": "export"' in read(f"{one.state}/vms/a/vm.json"), "the record")
    one.kill()
    one.start()
    vm.wait("running", 30)
    assert read(environ(vm)) == text
    write(environ(vm), "A='3'\nC='4'\n")
    assert read(environ(vm)) == "set -a\nA='3'\nC='4'\nset +a\n"
    write(environ(vm), text)
    assert read(environ(vm)) == text
    sh(f": > '{environ(vm)}'")
    wait_for(lambda: keys(vm) == [], "no variable is left")
    write(vm.env("A"), "1\n")
    assert read(environ(vm)) == "set -a\nA='1'\nset +a\n"


@pytest.mark.parametrize("shell", ["zsh", "ksh"])
def test_other_shells_read_it_as_well(clear, shell):
    set_all(clear, NASTY)
    script = f". '{environ(clear)}'; printf '%s|' \"$A_QUOTE\" \"$B_LINES\" \"$C_DOLLAR\" \"$H_DOUBLE\" \"$J_EXPORT\" \"$EVIL\""
    done = sh(script, shell)
    wanted = [NASTY[k] for k in ("A_QUOTE", "B_LINES", "C_DOLLAR", "H_DOUBLE", "J_EXPORT")] + [b""]
    assert done.stdout == b"|".join(wanted) + b"|"


def test_its_own_text_changes_nothing(clear, tmp_path):
    set_all(clear, NASTY)
    before, in_guest = read_bytes(environ(clear)), guest_file(clear)
    sh(f"cp '{environ(clear)}' '{tmp_path}/copy'; cp '{tmp_path}/copy' '{environ(clear)}'; cmp '{tmp_path}/copy' '{environ(clear)}'")
    assert read_bytes(environ(clear)) == before
    assert guest_file(clear) == in_guest


def test_it_reads_the_newest_and_keeps_the_moment_of_the_open(clear):
    write(clear.env("A"), "1")
    fd = os.open(environ(clear), os.O_RDONLY)
    try:
        write(clear.env("A"), "2")
        assert os.pread(fd, 100, 0) == b"set -a\nA='1'\nset +a\n"
        assert plain_text(environ(clear)) == "A='2'\n"
    finally:
        os.close(fd)
    clear.ssh("echo 'export B=guest' >> /etc/profile.d/vmsfs_env.sh")
    wait_for(lambda: plain_text(environ(clear)) == "A='2'\nB='guest'\n", "the guest's variable", 2)


def test_its_time_is_that_of_the_last_change(clear):
    write(clear.env("A"), "1")
    first = os.stat(environ(clear)).st_mtime_ns
    plain_text(environ(clear))
    assert os.stat(environ(clear)).st_mtime_ns == first
    write(clear.env("A"), "2")
    assert os.stat(environ(clear)).st_mtime_ns > first


# --- replacing and merging ---


def test_writing_replaces_all(clear):
    set_all(clear, {"GONE": b"x", "CHANGED": b"old", "SAME": b"same"})
    write(environ(clear), "CHANGED='new'\nSAME=same\nADDED=\"1\"\n")
    assert keys(clear) == guest_keys(clear) == ["ADDED", "CHANGED", "SAME"]
    assert [clear.value(k) for k in ("ADDED", "CHANGED", "SAME")] == [b"1", b"new", b"same"]
    assert not clear.is_set("GONE")
    assert read(clear.env("CHANGED")) == "new\n"


def test_appending_merges(clear, tmp_path):
    set_all(clear, {"KEPT": b"x", "CHANGED": b"old"})
    (tmp_path / "extra.env").write_text("# more\nCHANGED=new\nADDED=1\n")
    sh(f"cat '{tmp_path}/extra.env' >> '{environ(clear)}'")
    assert keys(clear) == guest_keys(clear) == ["ADDED", "CHANGED", "KEPT"]
    assert [clear.value(k) for k in ("ADDED", "CHANGED", "KEPT")] == [b"1", b"new", b"x"]


def test_cp_of_a_dotenv_file_replaces_all(clear, tmp_path):
    set_all(clear, {"GONE": b"x"})
    (tmp_path / "prod.env").write_text(
        "# production\n\nDB_URL=postgres://u:p@h:5432/d?x=1&y=2\nexport TOKEN='s3cr$t'\nMOTD=\"line one\nline two\"\nEMPTY=\n"
    )
    sh(f"cp '{tmp_path}/prod.env' '{environ(clear)}'")
    assert keys(clear) == guest_keys(clear) == ["DB_URL", "EMPTY", "MOTD", "TOKEN"]
    assert clear.value("DB_URL") == b"postgres://u:p@h:5432/d?x=1&y=2"
    assert clear.value("TOKEN") == b"s3cr$t"
    assert clear.value("MOTD") == b"line one\nline two"
    assert clear.value("EMPTY") == b"" and clear.is_set("EMPTY")


@pytest.mark.parametrize("how", ["one write", "pieces", "lines by a shell", "two appends"])
def test_it_is_one_state_however_it_is_written(clear, tmp_path, how):
    set_all(clear, {"GONE": b"x", "A": b"old"})
    text = "A='1'\nB='two\nlines'\nC=3\n"
    path = environ(clear)
    if how == "one write":
        write(path, text)
    elif how == "pieces":
        with open(path, "w", 1, encoding="ascii") as f:  # a write a line
            for line in text.splitlines(keepends=True):
                f.write(line)
    elif how == "lines by a shell":
        sh(f"{{ echo \"A='1'\"; printf \"B='two\\nlines'\\n\"; echo C=3; }} > '{path}'")
    else:
        sh(f"echo \"A='1'\" >> '{path}'; {{ printf \"B='two\\nlines'\\n\"; echo C=3; }} >> '{path}'; rm '{clear.env('GONE')}'")
    assert plain_text(path) == "A='1'\nB='two\nlines'\nC='3'\n"
    assert keys(clear) == ["A", "B", "C"]
    assert clear.value("B") == b"two\nlines"
    assert not clear.is_set("GONE")


def test_the_same_name_twice_the_later_counts(clear):
    write(environ(clear), "A=1\nB=2\nA=3\n")
    assert plain_text(environ(clear)) == "A='3'\nB='2'\n"
    assert clear.value("A") == b"3"


@pytest.mark.parametrize("how", [": > {}", "truncate -s 0 {}", "cp /dev/null {}", "printf '' > {}", "printf '\\n' > {}", "echo '# none' > {}"])
def test_an_empty_file_unsets_all(clear, how):
    set_all(clear, {"A": b"1", "B": b"2"})
    sh(how.format(f"'{environ(clear)}'"))
    wait_for(lambda: guest_keys(clear) == [], "no variable is left in the guest")
    assert keys(clear) == []
    assert plain_text(environ(clear)) == ""
    assert not clear.is_set("A")


def test_an_empty_append_changes_nothing(clear):
    set_all(clear, {"A": b"1"})
    sh(f": >> '{environ(clear)}'; cat /dev/null >> '{environ(clear)}'; printf '\\n# nothing\\n' >> '{environ(clear)}'")
    assert plain_text(environ(clear)) == "A='1'\n"
    assert clear.value("A") == b"1"


def test_an_open_that_writes_nothing_changes_nothing(clear):
    set_all(clear, {"A": b"1"})
    os.close(os.open(environ(clear), os.O_RDWR))
    with open(environ(clear), "r+", encoding="ascii") as f:
        text = f.read()
        assert "A='1'\n" in text
        f.seek(0)
        f.write(text.replace("A='1'", "A='2'"))
    assert plain_text(environ(clear)) == "A='2'\n"
    assert clear.value("A") == b"2"


ONE_UPDATE = {
    "a line": 'echo ONE_0=0 {how} "$F"',
    "many in one write": "printf 'ONE_%s=1\\n' 1 2 3 4 5 6 7 8 9 {how} \"$F\"",
    "line by line": '{{ for n in 1 2 3 4 5 6 7 8 9; do echo ONE_$n=1; done; }} {how} "$F"',
    "a here-document": 'cat {how} "$F" <<EOF\nONE_1=1\nONE_2=2\nEOF',
    "unbuffered": "printf 'ONE_1=1\\nONE_2=2\\n' | dd bs=3 iflag=fullblock status=none {how} \"$F\"",
}


@pytest.mark.parametrize("how", [">", ">>"])
@pytest.mark.parametrize("what", ONE_UPDATE)
def test_it_is_one_update_of_the_guest(clear, what, how):
    write(clear.env("BEFORE"), "x\n")
    before = clear.info()
    sh(ONE_UPDATE[what].format(how=how), F=environ(clear))
    after = clear.info()
    assert after["env_updates"] == before["env_updates"] + 1
    names = [name for name in guest_keys(clear) if name != "BEFORE"]
    assert names and all(name.startswith("ONE_") for name in names)
    assert clear.is_set("BEFORE") == (how == ">>")


def test_100_variables_are_one_update_of_the_guest(clear):
    before = clear.info()
    write(environ(clear), "".join(f"ONE_{n}={n}\n" for n in range(100)))
    after = clear.info()
    assert after["env_updates"] == before["env_updates"] + 1
    assert clear.value("ONE_99") == b"99"


@pytest.mark.parametrize("shell", ["bash", "dash", "busybox", "zsh", "ksh"])
def test_nobody_sees_half_of_what_a_shell_writes_line_by_line(clear, shell):
    write(environ(clear), "A=0\nB=0\n")
    lines = 'i=1; while [ $i -lt 15 ]; do {{ echo A=$i; echo B=$i; }} {} "$F" || exit; i=$((i+1)); done'
    with Reader(clear, '[ "$A" = "$B" ] && echo same', "same"):
        sh(lines.format(">"), shell, F=environ(clear))
        sh(lines.format(">>"), shell, F=environ(clear))
    write(environ(clear), "A=0\n")
    with Reader(clear, '[ -n "$A$B" ] && [ -z "$A" -o -z "$B" ] && echo one', "one"):
        sh('i=1; while [ $i -lt 15 ]; do echo A=$i > "$F" && echo B=$i > "$F" || exit; i=$((i+1)); done', shell, F=environ(clear))


WRITES_AND_KILLS = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | int(sys.argv[3]))
os.write(fd, sys.argv[4].encode())
os.kill(int(sys.argv[2]), 9)
os._exit(0)
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND], ids=["replace", "merge"])
@pytest.mark.parametrize("text", ["A=new\n", "A=new\nC=new\n"], ids=["a line", "lines"])
def test_what_was_acknowledged_survives_a_daemon_that_is_killed_before_the_close(sshd, daemon, state, flags, text):
    """A shell does not look at what close() says. One line may be the first of many, and replaces nothing yet."""
    server = sshd()
    one = daemon(server.options())
    vm = one.boot("box")
    write(vm / "environ", "A=old\nB=old\n")
    write(vm / "status", state + "\n")
    done = subprocess.run([sys.executable, "-c", WRITES_AND_KILLS, vm / "environ", str(one.pid), str(flags), text], timeout=30)
    assert done.returncode == 0
    one.wait_end()
    one.unmount()
    one.start()
    wait_for(lambda: vm.status() == state, "it is as it was", 20)
    expected = {"A": "new"} if "C" not in text else {"A": "new", "C": "new"}
    if flags == os.O_APPEND or "C" not in text:
        expected["B"] = "old"
    # Nobody has to wait for what was promised.
    assert {name: read(vm.env(name)).rstrip("\n") for name in keys(vm)} == expected
    write(vm.env("A"), "newest\n")
    one.kill()
    one.start()
    write(vm / "status", "running\n")
    expected["A"] = "newest"
    assert [line for line in read(server.env_file).splitlines() if not line.startswith("#")] == [
        f"export {name}='{value}'" for name, value in sorted(expected.items())
    ]


WRITES_SEVERAL_AND_KILLS = """
import os, sys
for line in sys.argv[3:]:
    path, text = line.split(" ", 1)
    fd = os.open(os.path.join(sys.argv[1], path), os.O_WRONLY | (os.O_APPEND if path == "environ" else os.O_TRUNC))
    assert os.write(fd, text.encode()) == len(text)
    if path != "environ":
        os.close(fd)
os.kill(int(sys.argv[2]), 9)
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize(
    ["lines", "expected"],
    [
        (["environ A=1\n", "environ A=2\n"], {"A": "2"}),
        (["environ A=1\nC=1\n", "environ B=2\nA=2\n", "environ C=3\n"], {"A": "2", "B": "2", "C": "3"}),
        (["environ B=2\n", "environ A=1\n", "env/A 3\n"], {"A": "3", "B": "2"}),
        (["environ A=1\n", "env/A 3\n", "environ B=2\n"], {"A": "3", "B": "2"}),
    ],
)
def test_who_is_acknowledged_last_wins_though_the_daemon_is_killed(sshd, daemon, state, lines, expected):
    one = daemon(sshd().options())
    vm = one.boot("box")
    write(vm.env("A"), "old\n")
    write(vm / "status", state + "\n")
    done = subprocess.run([sys.executable, "-c", WRITES_SEVERAL_AND_KILLS, vm.path, str(one.pid), *lines], timeout=30)
    assert done.returncode == 0
    one.wait_end()
    one.unmount()
    one.start()
    wait_for(lambda: vm.status() == state, "it is as it was", 20)
    assert {name: read(vm.env(name)).rstrip("\n") for name in keys(vm)} == expected
    write(vm / "status", "running\n")
    assert {name: read(vm.env(name)).rstrip("\n") for name in keys(vm)} == expected


WRITES_AND_WAITS = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
os.write(fd, b"A=1\\n")
time.sleep(60)
"""


def test_what_is_set_meanwhile_is_acknowledged_when_no_daemon_would_undo_it(sshd, daemon):
    """The record may tell of what was promised before, for as long as the disk takes."""
    one = daemon(sshd().options())
    vm = one.boot("box")
    # Another process: when a child of this one closes what it has inherited, that is a FLUSH.
    writer = Client([sys.executable, "-c", WRITES_AND_WAITS, vm / "environ"])
    argv = ["strace", "-f", "-p", str(one.pid), "-e", "trace=fsync", "-e", "inject=fsync:delay_enter=1000000"]
    with writer:
        wait_for(lambda: "promised" in read(f"{one.state}/vms/box/vm.json"), "it is promised")
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as strace:
            assert "attached" in strace.stderr.readline()
            write(vm.env("A"), "3\n")
            one.kill()
            strace.communicate(timeout=20)
    one.start()
    wait_for(lambda: vm.status() == "running", "it is attached again", 20)
    assert read(vm.env("A")) == "3\n"


@pytest.mark.parametrize("look", ["variable", "names", "command"])
def test_what_was_promised_is_there_for_who_comes_first(sshd, daemon, look):
    """However long the machine takes for it."""
    server = sshd(start=False).start_slow()
    one = daemon(server.options())
    vm = one.boot("box")
    write(vm / "environ", "A=old\n")
    done = subprocess.run([sys.executable, "-c", WRITES_AND_KILLS, vm / "environ", str(one.pid), str(os.O_APPEND), "A=new\nB=1\n"], timeout=30)
    assert done.returncode == 0
    one.wait_end()
    one.unmount()
    write(server.path + "/slow", "")
    one.start()
    wait_for(lambda: vm.status() == "running", "it is attached again", 20)
    if look == "variable":
        assert read(vm.env("A")) == "new\n"
    elif look == "names":
        assert keys(vm) == ["A", "B"]
    else:
        write(vm / "exec", '[ "$A$B" = new1 ]')


def test_what_was_refused_is_not_done_by_the_next_daemon(sshd, daemon):
    one = daemon(sshd().options())
    vm = one.boot("box")
    write(vm / "environ", "A=old\n")
    fd = os.open(vm / "environ", os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"A=new\n")
    with refused("EINVAL"):
        os.write(fd, b"B AD\n")
    record = f"{one.state}/vms/box/vm.json"
    wait_for(lambda: "promised" not in read(record), "the promise is taken back", 5)
    one.kill()
    with contextlib.suppress(OSError):
        os.close(fd)
    one.start()
    wait_for(lambda: vm.status() == "running", "it is as it was", 20)
    assert read(vm.env("A")) == "old\n"


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND], ids=["replace", "merge"])
def test_a_line_is_there_soon_if_the_file_is_kept_open(clear, flags):
    write(environ(clear), "OLD=1\n")
    fd = os.open(environ(clear), os.O_WRONLY | flags)
    try:
        os.write(fd, b"NEW=1\n")
        # No process is started, whose end of the descriptor would be closed, which is a FLUSH.
        wait_for(lambda: keys(clear) == ["NEW", "OLD"], "the first line", 5)
        os.write(fd, b"LAST=1\n")
    finally:
        os.close(fd)
    assert clear.value("NEW") == clear.value("LAST") == b"1"
    assert clear.is_set("OLD") == (flags == os.O_APPEND)


# --- what is accepted ---

ACCEPTED = {
    "bare": ("K=value", b"value"),
    "export": ("export K=value", b"value"),
    "export and blanks": ("  export \t K=value", b"value"),
    "bare with spaces": ("K=a b  c", b"a b  c"),
    "bare, blanks at the end": ("K=a b  \t", b"a b"),
    "bare, comment": ("K=a b # comment", b"a b"),
    "bare with a hash": ("K=a#b", b"a#b"),
    "bare with equals": ("K=a=b==", b"a=b=="),
    "bare URL": ("K=https://x/?a=1&b=2;c", b"https://x/?a=1&b=2;c"),
    "bare with a quote inside": ("K=it's", b"it's"),
    "bare backslash": ("K=C:\\dir\\n", b"C:\\dir\\n"),
    "bare tilde": ("K=~/x*", b"~/x*"),
    "empty": ("K=", b""),
    "empty, quoted": ("K=''", b""),
    "empty, comment": ("K= # nothing", b""),
    "single": ("K='a \"b\" $HOME `x` \\n'", b'a "b" $HOME `x` \\n'),
    "single over lines": ("K='a\n\n# no comment\nB=2\n'", b"a\n\n# no comment\nB=2\n"),
    "single, comment": ("K='a' # comment", b"a"),
    "a quote as sh writes it": ("K='it'\\''s'", b"it's"),
    "double": ('K="a b"', b"a b"),
    "double, escapes": ('K="a\\nb\\tc\\\\ \\" \\$x \\`"', b'a\nb\tc\\ " $x `'),
    "double over lines": ('K="a\nb"', b"a\nb"),
    "double, lone dollar": ('K="costs 5$"', b"costs 5$"),
    "DOS lines": ("K=value\r", b"value"),
    "no newline at the end": ("K=last", b"last"),
    "UTF-8": ("K=Grüße", "Grüße".encode()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_dotenv_is_accepted(clear, name):
    text, value = ACCEPTED[name]
    end = "" if name == "no newline at the end" else "\n"
    write(environ(clear), "FIRST=1\n" + text + end)
    assert clear.value("K") == value
    assert read_bytes(clear.env("K")) == value + b"\n"
    assert clear.value("FIRST") == b"1"
    assert not clear.is_set("B")


def test_a_byte_order_mark_and_comments_are_skipped(clear):
    write(environ(clear), b"\xef\xbb\xbf# comment = x\n\n   # another\n\t\nK=1\n")
    assert plain_text(environ(clear)) == "K='1'\n"


REFUSED = {
    "no equals": ("JUST A LINE", 3),
    "dash in the name": ("MY-VAR=1", 3),
    "digit first": ("1A=1", 3),
    "no name": ("=1", 3),
    "blank before equals": ("K =1", 3),
    "open single quote": ("K='a\nb\n", 3),
    "open double quote": ('K="a\nb\n', 3),
    "behind the quote": ("K='a' b", 3),
    "command": ('K="$(reboot)"', 3),
    "backquotes": ("K=`reboot`", 3),
    "a variable": ('K="$HOME"', 3),
    "braces": ("K=${HOME}", 3),
    "bare variable": ("K=$HOME", 3),
    "NUL": ("K=a\0b", 3),
    "NUL in quotes": ("K='a\0b'", 3),
    "sh": ("if true; then", 3),
    "UID": ("UID=0", None),
    "PPID": ("PPID=1", None),
    "EUID": ("EUID=0", None),
    "SHELLOPTS": ("SHELLOPTS=x", None),
    "name of 256 bytes": ("N" * 256 + "=1", 3),
}


@pytest.mark.parametrize("how", ["write", "append", "cp"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_line_fails_the_write_and_changes_nothing(clear, tmp_path, name, how):
    bad, line = REFUSED[name]
    write(environ(clear), "KEPT='1'\n")
    in_guest, updates = guest_file(clear), clear.info()["env_updates"]
    text = f"A=new\n# comment\n{bad}\nB=new\n"
    if how == "write":
        with refused("EINVAL"):
            write(environ(clear), text)
    else:
        (tmp_path / "bad.env").write_text(text)
        operator = f"cp '{tmp_path}/bad.env'" if how == "cp" else f"cat '{tmp_path}/bad.env' >>"
        done = sh(f"{operator} '{environ(clear)}'", check=False)
        assert done.returncode != 0 and b"Invalid argument" in done.stderr
    error = clear.error()
    assert "environ" in error or "env/" in error
    if line:
        assert re.search(rf"line {line}\b", error), error
    else:
        assert bad.split("=")[0][:30] in error
    assert plain_text(environ(clear)) == "KEPT='1'\n"
    assert guest_file(clear) == in_guest
    assert clear.info()["env_updates"] == updates
    assert keys(clear) == ["KEPT"]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_sees_that_its_line_is_bad(clear, shell):
    write(environ(clear), "KEPT='1'\n")
    for script in ("echo 'MY-VAR=1' > \"$F\"", "echo NOTHING >> \"$F\"", "printf 'A=1\\nB\\n' > \"$F\"", "echo \"A='open\" > \"$F\""):
        done = sh(script, shell, check=False, F=environ(clear))
        assert done.returncode != 0, script
        assert done.stderr != b"" or shell == "busybox", script  # its printf fails in silence
    assert plain_text(environ(clear)) == "KEPT='1'\n"
    assert clear.value("KEPT") == b"1"


def test_a_bad_line_says_nothing_of_its_value(clear):
    with refused("EINVAL"):
        write(environ(clear), "PASSWORD='hunter2' hunter3\nhunter4\n")
    assert "hunter" not in clear.error()
    assert "PASSWORD" in clear.error()


def test_a_later_piece_that_is_bad_changes_nothing_else(clear):
    write(environ(clear), "KEPT='1'\n")
    fd = os.open(environ(clear), os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, b"A=1\n")
        with refused("EINVAL"):
            os.write(fd, b"B-B=2\n")
    finally:
        with refused("EINVAL"):  # once more, as what was acknowledged has been taken back
            os.close(fd)
    assert clear.value("KEPT") == b"1"
    assert keys(clear) == guest_keys(clear) == ["KEPT"]


BAD_THIRD = {
    "block": "{ echo GOOD=1; echo 'B AD=2'; echo C=3; }",
    "block, bad at the end": "{ echo GOOD=1; echo C=3; echo 'B AD=2'; }",
    "printf": "printf 'GOOD=1\\nB AD=2\\nC=3\\n'",
    "a reserved name": "{ echo GOOD=1; echo UID=0; echo C=3; }",
    "open quote": "{ echo GOOD=1; printf \"C='open\"; }",
}


@pytest.mark.parametrize("operator", [">", ">>"])
@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("name", BAD_THIRD)
def test_what_follows_a_bad_line_is_refused_as_well_and_nothing_is_changed(clear, name, shell, operator):
    write(environ(clear), "OLD='kept'\nGOOD='before'\n")
    in_guest = guest_file(clear)
    done = sh(f"{BAD_THIRD[name]} {operator} \"$F\"", shell, check=False, F=environ(clear))
    if name != "open quote":  # only its close can tell, which shells do not hear
        assert done.returncode != 0, done
    assert plain_text(environ(clear)) == "GOOD='before'\nOLD='kept'\n"
    assert guest_file(clear) == in_guest
    assert "environ, line" in clear.error() or "UID" in clear.error()


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND])
def test_a_handle_that_has_refused_a_line_takes_no_other_until_it_is_emptied(clear, flags):
    write(environ(clear), "OLD='kept'\n")
    fd = os.open(environ(clear), os.O_WRONLY | flags)
    try:
        os.write(fd, b"GOOD=1\n")
        for line in (b"B AD=2\n", b"C=3\n", b"D=4\n"):
            with refused("EINVAL"):
                os.write(fd, line)
        with refused("EINVAL"):
            os.fsync(fd)
        assert clear.value("OLD") == b"kept"
        assert not clear.is_set("C")
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"E=5\n")
        os.write(fd, b"F=6\n")
        os.fsync(fd)
        assert clear.value("F") == b"6"
    finally:
        os.close(fd)
    assert keys(clear) == (["E", "F", "OLD"] if flags == os.O_APPEND else ["E", "F"])


@pytest.mark.parametrize("other", ["echo A=1 >> \"$F\"", "echo 1 > \"$E/A\"", "mv \"$E/B\" \"$E/A\"", "rm \"$E/B\"",
                                   "printf 'A=1\\nB=1\\n' > \"$F\""])
def test_what_is_committed_after_a_held_truncation_stays(clear, other):
    write(environ(clear), "B='1'\n")
    fd = os.open(environ(clear), os.O_WRONLY | os.O_TRUNC)
    try:
        sh(other, F=environ(clear), E=clear / "env")
        text = plain_text(environ(clear))
    finally:
        os.close(fd)

    write(clear.env("LATER"), "x\n")  # after whatever the close has brought about
    assert plain_text(environ(clear)) == text + "LATER='x'\n"
    assert clear.is_set("A") == ("A=" in text)


@pytest.mark.parametrize("name", ["UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO", "OPTIND", "_vmsfs_nl"])
def test_a_name_that_shells_keep_for_themselves_is_refused(clear, name):
    with refused("EINVAL"):
        write(clear.env(name), "0\n")
    assert name in clear.error()
    with refused("EINVAL"):
        write(environ(clear), f"A=1\n{name}=0\n")
    assert name in clear.error()
    with refused("EINVAL"):
        os.close(os.open(clear.env(name), os.O_WRONLY | os.O_CREAT))
    assert keys(clear) == []
    assert clear.exec("echo well") == b"well\n"


# --- large files ---


def large(count=3000):
    """Text of about 300 KB, with quotes and values of several lines."""
    return "".join(f"BIG_{n:04}='value {n} of many'\\''s\nand a second line: {'x' * 60}'\n" for n in range(count))


LARGE_WAYS = {
    "cp": 'cp "$T/large" "$F"',
    "cat": 'cat "$T/large" > "$F"',
    "tee": 'tee "$F" < "$T/large" > /dev/null',
    "rsync": 'rsync "$T/large" "$F"',
    "dd bs=4096": 'dd if="$T/large" of="$F" bs=4096 status=none',
    "dd bs=100": 'dd if="$T/large" of="$F" bs=100 status=none',
    "dd bs=1000": 'dd if="$T/large" of="$F" bs=1000 status=none',
    "dd bs=64k": 'dd if="$T/large" of="$F" bs=64k status=none',
    "dd oflag=append": 'dd if="$T/large" of="$F" bs=1000 status=none oflag=append conv=notrunc; rm "$E/GONE"',
    "dash loop": 'while IFS= read -r l; do printf "%s\\n" "$l"; done < "$T/large" > "$F"',
}


@pytest.mark.deadline(200)
@pytest.mark.parametrize("how", LARGE_WAYS)
def test_a_large_file_arrives_whole(clear, tmp_path, how):
    text = "".join(f"BIG_{n:04}='value {n} of many'\\''s and'\n" for n in range(300)) if "loop" in how else large()
    (tmp_path / "large").write_text(text)
    write(clear.env("GONE"), "x\n")
    sh("set -e; " + LARGE_WAYS[how], T=str(tmp_path), F=environ(clear), E=clear / "env")
    assert plain_text(environ(clear)) == text
    names = re.findall(r"^(BIG_\d+)=", text, re.M)
    assert guest_keys(clear) == names
    assert clear.value(names[-1]).startswith(b"value %d of many's" % (len(names) - 1))
    assert not clear.is_set("GONE")


@pytest.mark.deadline(200)
def test_a_large_file_with_a_bad_line_changes_nothing(clear, tmp_path):
    text = large()
    count = text.count("\n")
    (tmp_path / "bad").write_text(text + "BAD LINE\n" + "LAST=1\n")
    write(environ(clear), "KEPT='1'\n")
    for how in (f"cp '{tmp_path}/bad'", f"cat '{tmp_path}/bad' >", f"cat '{tmp_path}/bad' >>"):
        done = sh(f"{how} '{environ(clear)}'", check=False)
        assert done.returncode != 0, how
        assert re.search(rf"line {count + 1}\b", clear.error()), clear.error()
        assert plain_text(environ(clear)) == "KEPT='1'\n"
        assert guest_keys(clear) == ["KEPT"]


def test_too_much_is_refused(clear):
    write(environ(clear), "KEPT='1'\n")
    with refused("ENOSPC"):
        write(environ(clear), "".join(f"K{n}={'x' * 100000}\n" for n in range(8)) + "".join(f"L{n}={'x' * 100000}\n" for n in range(4)))
    with refused("EFBIG"):
        write(environ(clear), f"K={'x' * 140000}\n")
    with refused("EFBIG", "EINVAL"):
        os.truncate(environ(clear), 1 << 50)
    assert plain_text(environ(clear)) == "KEPT='1'\n"
    assert guest_keys(clear) == ["KEPT"]
    # A file of the full size replaces another one.
    full = "".join(f"K{n}='{'x' * 100000}'\n" for n in range(10))
    for _ in range(2):
        write(environ(clear), full)
    assert plain_text(environ(clear)) == full


# --- atomic ---


@pytest.mark.deadline(200)
def test_a_reader_in_the_guest_never_sees_a_mixture(clear):
    names = [f"MIX_{n:02}" for n in range(40)]
    write(environ(clear), "".join(f"{name}=0\n" for name in names))
    # All are the same, or sort -u says more than one line.
    check = "env | grep ^MIX_ | cut -d= -f2 | sort | uniq -c | while read c v; do printf %s, $c; done"
    with Reader(clear, check, "40,"):
        for number in range(1, 60):
            write(environ(clear), "".join(f"{name}={number}\n" for name in names))
    assert clear.value("MIX_39") == b"59"


@pytest.mark.deadline(200)
def test_many_writers_of_environ_lose_nothing(clear):
    script = 'i=0; while [ $i -lt 10 ]; do printf "W${W}_$i=%s\\nBOTH=$W\\n" "$i" >> "$F" || exit; i=$((i+1)); done'
    clients = [Client(script, env=environment(W=str(w), F=environ(clear))) for w in range(6)]
    for client in clients:
        status, _, err = client.result(60)
        assert status == 0, err
    assert keys(clear) == guest_keys(clear) == sorted(["BOTH"] + [f"W{w}_{i}" for w in range(6) for i in range(10)])
    assert clear.value("W5_9") == b"9"
    assert clear.value("BOTH") in b"012345"


# --- without a running guest ---


@pytest.mark.deadline(200)
def test_environ_of_a_vm_that_boots_or_is_stopped(daemon):
    one = daemon()
    os.mkdir(one.vm("a"))
    vm = one.guest("a")
    write(environ(vm), "A=1\nB=2\n")
    with refused("EINVAL"):
        write(environ(vm), "no line\n")
    assert plain_text(environ(vm)) == "A='1'\nB='2'\n"
    vm.wait("running")
    assert guest_keys(vm) == ["A", "B"]
    vm.close()
    write(vm / "status", "stopped\n")
    sh(f"echo C=3 >> '{environ(vm)}'; sed -i /^A=/d '{environ(vm)}'")
    assert plain_text(environ(vm)) == "B='2'\nC='3'\n"
    write(vm / "status", "running\n")
    assert vm.status() == "running"
    assert guest_keys(vm) == ["B", "C"]
    assert vm.value("C") == b"3" and not vm.is_set("A")


def test_errno_of_a_vm_that_is_gone(new_vm):
    vm = new_vm("gone")
    fd = os.open(environ(vm), os.O_WRONLY | os.O_APPEND)
    try:
        vm.close()
        os.rmdir(vm.path)
        with refused("ENODEV"):
            os.write(fd, b"A=1\n")
    finally:
        os.close(fd)
    with pytest.raises(OSError) as caught:
        plain_text(environ(vm))
    assert caught.value.errno == errno.ENOENT


# --- beside env/ ---


def test_what_environ_changes_shows_in_env_at_once(clear):
    write(environ(clear), "GONE=1\nCHANGED=1\n")
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(clear / "env")}
    assert sizes == {"CHANGED": 2, "GONE": 2}
    sh(f"ls -l '{clear / 'env'}'")
    write(environ(clear), "CHANGED=12345\nNEW=1\n")
    assert not os.path.exists(clear.env("GONE"))
    assert os.path.exists(clear.env("NEW"))
    assert os.stat(clear.env("CHANGED")).st_size == 6
    assert read(clear.env("CHANGED")) == "12345\n"
