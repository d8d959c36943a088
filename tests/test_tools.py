"""Whatever tool changes a file of env/, or `environ`: the guest has what the tool wrote, as if on a disk.

One table, a row a tool. Every row runs with $E = env/, $V = the VM's directory, $T = a folder elsewhere, $K = the variable's
name. It starts from the value "old value" and has to end with "new value", unless the row says otherwise.
"""

import json
import os
import re
import subprocess

import pytest

import conftest
from harness import SHELLS, read, read_bytes, wait_for, write
from tools_env import Terminal, clean_env, environment, guest_keys, keys, plain_text

OLD = b"old value\n"
NEW = b"new value\n"


class Row:
    """`script`: in the shell. `again`: None: the script once more; "": nothing; else a script that prints what a second run
    says it changed, which has to be nothing. `leaves`: what the tool is meant to leave beside the file (a backup), as a
    pattern. `before`, `after`: bytes of the file; None: it is not there."""

    def __init__(self, script, again=None, shell="dash", before=OLD, after=NEW, leaves=None, at=("K",), seconds=40):
        self.script, self.again, self.shell = script, again, shell
        self.before, self.after, self.leaves = before, after, leaves
        self.at, self.seconds = at, seconds


def same(shell, **kwargs):
    return {
        f"{shell} echo": Row('echo "new value" > "$E/$K"', shell=shell, **kwargs),
        f"{shell} printf": Row('printf "new %s" value > "$E/$K"', shell=shell, after=b"new value"),
        f"{shell} >>": Row('echo "and more" >> "$E/$K"', "", shell=shell, after=OLD + b"and more\n"),
        f"{shell} block": Row('{ printf "new "; printf "value\\n"; } > "$E/$K"', shell=shell),
        f"{shell} set -C": Row('rm -f "$E/$K"; set -C; echo "new value" > "$E/$K"', shell=shell, before=None),
        f"{shell} read": Row('read -r x < "$E/$K"; echo "new ${x#old }" > "$E/$K"', "", shell=shell),
    }


PYTHON = "/usr/bin/python3 -c "
ANSIBLE = "ansible localhost -c local -m "

ROWS = {}
for name in SHELLS:
    ROWS.update(same(name))

ROWS.update({
    # --- coreutils and its like ---
    "tee": Row('printf "new value\\n" | tee "$E/$K"'),
    "tee -a": Row('echo "and more" | tee -a "$E/$K"', "", after=OLD + b"and more\n"),
    "sponge": Row('sed s/old/new/ "$E/$K" | sponge "$E/$K"'),
    "cat >": Row('cat "$T/new" > "$E/$K"'),
    "cp": Row('cp "$T/new" "$E/$K"', 'cmp "$T/new" "$E/$K"'),
    "cp to a new name": Row('cp "$T/new" "$E/$K"', before=None),
    "cp --remove-destination": Row('cp --remove-destination "$T/new" "$E/$K"'),
    "cp -f": Row('cp -f "$T/new" "$E/$K"'),
    "cp -a": Row('cp -a "$T/new" "$E/$K"', '[ "$(stat -c %Y-%a "$T/new")" = "$(stat -c %Y-%a "$E/$K")" ]; cp -auv "$T/new" "$E/$K"'),
    "cp -p": Row('cp -p "$T/new" "$E/$K"', '[ "$(stat -c %Y "$T/new")" = "$(stat -c %Y "$E/$K")" ]; cp -puv "$T/new" "$E/$K"'),
    "cp -b": Row('cp -b "$T/new" "$E/$K"', "", leaves=r"TOOL~"),
    "cp from key to key": Row('echo "new value" > "$E/${K}_FROM"; cp "$E/${K}_FROM" "$E/$K"; rm "$E/${K}_FROM"'),
    "mv in": Row('cp "$T/new" "$T/moved"; mv "$T/moved" "$E/$K"; [ ! -e "$T/moved" ]'),
    "mv in to a new name": Row('cp "$T/new" "$T/moved"; mv "$T/moved" "$E/$K"', before=None),
    "mv out and in": Row('mv "$E/$K" "$T/moved"; sed -i s/old/new/ "$T/moved"; mv "$T/moved" "$E/$K"', ""),
    "mv key to key": Row('echo "new value" > "$E/${K}_FROM"; mv "$E/${K}_FROM" "$E/$K"; [ ! -e "$E/${K}_FROM" ]'),
    "mv key to new key": Row('echo "new value" > "$E/${K}_FROM"; mv "$E/${K}_FROM" "$E/$K"', before=None),
    "mv -b": Row('cp "$T/new" "$T/moved"; mv -b "$T/moved" "$E/$K"', "", leaves=r"TOOL~"),
    "install -m": Row('install -m 600 "$T/new" "$E/$K"'),
    "install -C": Row('install -C -m 600 "$T/new" "$E/$K"', 'install -v -C -m 600 "$T/new" "$E/$K"'),
    "install -b": Row('install -b -m 640 "$T/new" "$E/$K"', "", leaves=r"TOOL~"),
    "install -o -g -p": Row('install -p -o 1 -g 1 -m 600 "$T/new" "$E/$K"; [ "$(stat -c %u:%g "$E/$K")" = 1:1 ]'),
    "dd": Row('dd if="$T/new" of="$E/$K" status=none'),
    "dd bs=1": Row('dd if="$T/new" of="$E/$K" bs=1 status=none'),
    "dd conv=notrunc": Row('printf new | dd of="$E/$K" conv=notrunc status=none'),
    "dd conv=notrunc seek": Row('printf NEW | dd of="$E/$K" bs=1 seek=4 conv=notrunc status=none', after=b"old NEWue\n"),
    "dd conv=fsync": Row('dd if="$T/new" of="$E/$K" conv=fsync status=none'),
    "dd conv=excl": Row('dd if="$T/new" of="$E/$K" conv=excl status=none', "", before=None),
    "dd oflag=append": Row('printf more | dd of="$E/$K" conv=notrunc oflag=append status=none', "", after=OLD + b"more"),
    "truncate -s 0": Row('truncate -s 0 "$E/$K"', after=b""),
    "truncate -s 3": Row('truncate -s 3 "$E/$K"', after=b"old"),
    ": >": Row(': > "$E/$K"', after=b""),
    "cp /dev/null": Row('cp /dev/null "$E/$K"', after=b""),
    "touch": Row('touch "$E/$K"', after=OLD),
    "touch a new name": Row('touch "$E/$K"', before=None, after=b""),
    "touch -r": Row('touch -r "$T/new" "$E/$K"; [ "$(stat -c %y "$T/new")" = "$(stat -c %y "$E/$K")" ]', after=OLD),
    "chmod, chown": Row('chmod 640 "$E/$K"; chown 1:1 "$E/$K"; [ "$(stat -c %a-%u "$E/$K")" = 640-1 ]',
                        'chmod -c 640 "$E/$K"; chown -c 1:1 "$E/$K"', after=OLD),
    "rm": Row('rm "$E/$K"', 'rm -fv "$E/$K"', after=None),
    "unlink": Row('unlink "$E/$K"', "", after=None),
    "shred -u": Row('shred -n 0 -u "$E/$K" 2>/dev/null || rm "$E/$K"', "", after=None),
    "find -delete": Row('find "$E" -name "$K" -delete', 'find "$E" -name "$K" -print -delete', after=None),
    "find -exec sed": Row('find "$E" -type f -name "$K" -exec sed -i s/old/new/ {} +'),
    "sort -o": Row('printf "b\\na\\n" > "$E/$K"; sort -o "$E/$K" "$E/$K"', after=b"a\nb\n"),
    "split": Row('printf "new value\\n" | split -b 1k --filter=\'cat > "$E/$K"\' -'),
    "base64": Row('base64 "$T/new" > "$E/$K"', after=b"bmV3IHZhbHVlCg==\n"),
    "xargs": Row('echo "$E/$K" | xargs sed -i s/old/new/'),
    "busybox cp": Row('busybox cp "$T/new" "$E/$K"'),
    "busybox mv": Row('cp "$T/new" "$T/moved"; busybox mv "$T/moved" "$E/$K"'),
    "busybox tee": Row('busybox tee "$E/$K" < "$T/new"'),
    "busybox dd": Row('busybox dd if="$T/new" of="$E/$K" 2>/dev/null'),
    # --- editors ---
    "sed -i": Row('sed -i s/old/new/ "$E/$K"'),
    "sed -i.bak": Row('sed -i.bak s/old/new/ "$E/$K"; grep -qx "old value" "$E/$K.bak"', "", leaves=r"TOOL\.bak"),
    "sed > .tmp, mv": Row('sed s/old/new/ "$E/$K" > "$E/$K.tmp" && mv "$E/$K.tmp" "$E/$K"'),
    "sed -i~": Row('sed -i~ s/old/new/ "$E/$K"', "", leaves=r"TOOL~"),
    "sed -c -i": Row('cp -p "$E/$K" "$T/copy"; sed -i --follow-symlinks s/old/new/ "$E/$K"'),
    "busybox sed -i": Row('busybox sed -i s/old/new/ "$E/$K"'),
    "perl -pi": Row('perl -pi -e s/old/new/ "$E/$K"'),
    "perl -pi.bak": Row('perl -pi.bak -e s/old/new/ "$E/$K"; grep -qx "old value" "$E/$K.bak"', "", leaves=r"TOOL\.bak"),
    "gawk -i inplace": Row('gawk -i inplace \'{ sub("old", "new"); print }\' "$E/$K"'),
    "ed": Row("printf ',s/old/new/\\nw\\nq\\n' | ed -s \"$E/$K\"", ""),
    "ex": Row("vim.tiny -e -s -u NONE -i NONE -c '%s/old/new/' -c 'x' \"$E/$K\"", ""),
    "vim -es": Row("vim -es -u NONE -i NONE -c '%s/old/new/' -c 'wq' \"$E/$K\"", ""),
    "vim with backup": Row("vim -es -u NONE -i NONE -c 'set backup backupcopy=no backupskip=' -c '%s/old/new/' -c 'wq' \"$E/$K\"",
                           "", leaves=r"TOOL~"),
    "emacs": Row('emacs -Q --batch --eval \'(progn (setq backup-enable-predicate (lambda (name) t)) '
                 '(find-file (getenv "F")) (erase-buffer) (insert "new value\\n") (save-buffer) (kill-buffer))\'', "", leaves=r"TOOL~"),
    "emacs without backup": Row(
        'emacs -Q --batch --eval \'(progn (setq make-backup-files nil) (find-file (getenv "F")) (erase-buffer) '
        '(insert "new value\\n") (save-buffer) (kill-buffer))\''),
    "emacs precious": Row(
        'emacs -Q --batch --eval \'(progn (setq make-backup-files nil file-precious-flag t) (find-file (getenv "F")) '
        '(erase-buffer) (insert "new value\\n") (save-buffer) (kill-buffer))\''),
    # --- patches, archives, transfers ---
    "patch": Row('printf -- "--- a\\n+++ b\\n@@ -1 +1 @@\\n-old value\\n+new value\\n" | patch -s "$E/$K"', ""),
    "patch -b": Row('printf -- "--- a\\n+++ b\\n@@ -1 +1 @@\\n-old value\\n+new value\\n" | patch -b -s "$E/$K"', "",
                    leaves=r"TOOL\.orig"),
    "rsync -a": Row('rsync -a "$T/in/" "$E/"', 'rsync -ai "$T/in/" "$E/"'),
    "rsync -c": Row('rsync -c "$T/in/$K" "$E/"', 'rsync -ci "$T/in/$K" "$E/"'),
    "rsync -a --inplace": Row('rsync -a --inplace "$T/in/$K" "$E/"', 'rsync -ai --inplace "$T/in/$K" "$E/"'),
    "rsync -b": Row('rsync -ab "$T/in/$K" "$E/"', 'rsync -abi "$T/in/$K" "$E/"', leaves=r"TOOL~"),
    "rsync --delete": Row('echo x > "$E/${K}_GONE"; rsync -a --delete --include="$K*" --exclude="*" "$T/in/" "$E/"; '
                          '[ ! -e "$E/${K}_GONE" ]', 'rsync -ai --delete --include="$K*" --exclude="*" "$T/in/" "$E/"'),
    "rsync --append": Row('printf "old value\\nand more\\n" > "$T/longer"; rsync --append "$T/longer" "$E/$K"', "",
                          after=OLD + b"and more\n"),
    "rsync out": Row('rsync -a "$E/$K" "$T/out"', 'rsync -ai "$E/$K" "$T/out"', after=OLD),
    "tar x": Row('tar -C "$E" -xf "$T/new.tar"', 'tar -C "$E" -df "$T/new.tar"'),
    "tar x --overwrite": Row('tar -C "$E" --overwrite -xf "$T/new.tar"', 'tar -C "$E" -df "$T/new.tar"'),
    "tar c": Row('tar -C "$E" -cf "$T/out.tar" "$K"', 'tar -C "$E" -df "$T/out.tar"', after=OLD),
    "busybox tar x": Row('busybox tar -C "$E" -xf "$T/new.tar"', 'tar -C "$E" -df "$T/new.tar"'),
    "cpio": Row('(cd "$T/in" && echo "$K" | busybox cpio -o -H newc 2>/dev/null) | (cd "$E" && busybox cpio -idu 2>/dev/null)'),
    "unzip -o": Row('unzip -qo "$T/new.zip" -d "$E"', 'unzip -uo "$T/new.zip" -d "$E" | grep -v ^Archive || :'),
    "zip from": Row('(cd "$E" && zip -q "$T/out.zip" "$K"); [ "$(unzip -p "$T/out.zip")" = "old value" ]', after=OLD),
    "curl -o": Row('curl -sS -o "$E/$K" "file://$T/new"'),
    "git config": Row('printf "[a]\\n\\tb = old\\n" > "$E/$K"; git config -f "$E/$K" a.b new', "",
                      after=b"[a]\n\tb = new\n"),
    "git config on a copy": Row('printf "[a]\\n\\tb = old\\n" > "$T/copy"; git config -f "$T/copy" a.b new; '
                                'mv "$T/copy" "$E/$K"', after=b"[a]\n\tb = new\n"),
    "git apply": Row('cd "$E"; printf -- "--- a/%s\\n+++ b/%s\\n@@ -1 +1 @@\\n-old value\\n+new value\\n" "$K" "$K" | '
                     'git apply --unsafe-paths -', ""),
    # --- languages ---
    "Python pathlib": Row(PYTHON + '\'import os, pathlib; pathlib.Path(os.environ["F"]).write_text("new value\\n")\''),
    "Python r+": Row(PYTHON + '\'import os; f = open(os.environ["F"], "r+"); s = f.read(); f.seek(0); '
                     'f.write(s.replace("old", "new")); f.truncate(); f.close()\''),
    "Python a+": Row(PYTHON + '\'import os; f = open(os.environ["F"], "a+"); f.write("and more\\n"); f.seek(0); '
                     'assert f.read() == "old value\\nand more\\n"\'', "", after=OLD + b"and more\n"),
    "Python x": Row(PYTHON + '\'import os; f = open(os.environ["F"], "x"); f.write("new value\\n"); f.close()\'', "",
                    before=None),
    "Python unbuffered": Row(PYTHON + '\'import os; f = open(os.environ["F"], "wb", 0); f.write(b"new "); '
                             'f.write(b"value\\n"); f.close()\''),
    "Python tempfile, os.replace": Row(
        PYTHON + '\'import os, tempfile; f = tempfile.NamedTemporaryFile("w", dir=os.environ["E"], delete=False); '
        'f.write("new value\\n"); f.flush(); os.fsync(f.fileno()); f.close(); os.replace(f.name, os.environ["F"])\''),
    "Python fileinput": Row(
        PYTHON + '\'import fileinput, os\nfor line in fileinput.input(os.environ["F"], inplace=True, backup=".bak"): '
        'print(line.replace("old", "new"), end="")\'', "", leaves=r"(TOOL\.bak)?"),
    "Python shutil.copy2": Row(PYTHON + '\'import os, shutil; shutil.copy2(os.environ["T"] + "/new", os.environ["F"])\''),
    "Python shutil.move": Row('cp "$T/new" "$T/moved"; ' + PYTHON +
                              '\'import os, shutil; shutil.move(os.environ["T"] + "/moved", os.environ["F"])\''),
    "Python mmap MAP_PRIVATE": Row(
        PYTHON + '\'import mmap, os; m = mmap.mmap(os.open(os.environ["F"], os.O_RDONLY), 0, mmap.MAP_PRIVATE, '
        'mmap.PROT_READ); assert m[:] == b"old value\\n"\'', after=OLD),
    "Node writeFileSync": Row('node -e \'require("fs").writeFileSync(process.env.F, "new value\\n")\''),
    "Node appendFileSync": Row('node -e \'require("fs").appendFileSync(process.env.F, "and more\\n")\'', "",
                               after=OLD + b"and more\n"),
    "Node promises": Row('node -e \'require("fs").promises.writeFile(process.env.F, "new value\\n")\''),
    "Node stream": Row('node -e \'s = require("fs").createWriteStream(process.env.F); s.write("new "); '
                       's.end("value\\n")\''),
    "Node copyFile": Row('node -e \'require("fs").copyFileSync(process.env.T + "/new", process.env.F)\''),
    "Perl": Row('perl -e \'open(F, ">", $ENV{F}) or die; print F "new value\\n" or die; close(F) or die\''),
    "gawk print >": Row('gawk \'BEGIN { print "new value" > ENVIRON["F"] }\''),
    "gawk close()": Row('gawk \'BEGIN { print "new value" > ENVIRON["F"]; exit close(ENVIRON["F"]) }\''),
})


def ansible(module, arguments):
    return ANSIBLE + module + ' -a "' + arguments + '"'


def puppet(resource):
    return 'puppet apply --detailed-exitcodes --confdir "$T/puppet" --vardir "$T/puppet" -e "' + resource + '" >"$T/log" 2>&1'


def managed_twice(script, says_changed, says_same):
    """A second run that prints what it has to say when it is not "nothing to do"."""
    return script, says_changed, says_same


# Ansible says CHANGED or SUCCESS; Puppet ends with 2 or 0. The first run has to say the former.
def ansible_row(module, arguments, **kwargs):
    line = ansible(module, arguments)
    first = f'{line} > "$T/log" || {{ cat "$T/log" >&2; exit 1; }}; grep -q "CHANGED =>" "$T/log" || {{ cat "$T/log" >&2; exit 9; }}'
    again = f'{line} > "$T/log" || {{ cat "$T/log" >&2; exit 1; }}; grep -q "SUCCESS =>" "$T/log" || cat "$T/log"'
    return Row(first, again, **kwargs)


def puppet_row(resource, **kwargs):
    line = puppet(resource)
    first = f's=0; {line} || s=$?; [ $s = 2 ] || {{ cat "$T/log" >&2; exit 9; }}'
    again = f's=0; {line} || s=$?; [ $s = 0 ] || cat "$T/log"'
    return Row(first, again, **kwargs)


ROWS.update({
    "Ansible copy": ansible_row("copy", "src=$T/new dest=$E/$K"),
    "Ansible copy content": ansible_row("copy", "content='new value\\n' dest=$E/$K mode=0600"),
    "Ansible copy to a new name": ansible_row("copy", "src=$T/new dest=$E/$K mode=0600", before=None),
    "Ansible copy backup": ansible_row("copy", "src=$T/new dest=$E/$K backup=yes", leaves=r"TOOL\.[0-9]+\..*~"),
    "Ansible template": ansible_row("template", "src=$T/template dest=$E/$K"),
    "Ansible lineinfile": ansible_row("lineinfile", "path=$E/$K regexp=^old line='new value'"),
    "Ansible replace": ansible_row("replace", "path=$E/$K regexp=old replace=new"),
    "Ansible blockinfile": ansible_row("blockinfile", "path=$E/$K block=x marker=#{mark}",
                                       after=OLD + b"#BEGIN\nx\n#END\n"),
    "Ansible file touch": ansible_row("file", "path=$E/$K state=touch access_time=preserve modification_time=preserve",
                                      before=None, after=b""),
    "Ansible file mode": ansible_row("file", "path=$E/$K mode=0640 owner=1 group=1", after=OLD),
    "Ansible file absent": ansible_row("file", "path=$E/$K state=absent", after=None),
    "Ansible unarchive": ansible_row("unarchive", "src=$T/new.tar dest=$E copy=no"),
    "Ansible get_url": ansible_row("get_url", "url=file://$T/new dest=$E/$K force=yes"),
    "Puppet file": puppet_row("file { '$E/$K': content => \\\"new value\\n\\\", mode => '0600' }"),
    "Puppet new file": puppet_row("file { '$E/$K': content => \\\"new value\\n\\\" }", before=None),
    "Puppet file source": puppet_row("file { '$E/$K': source => '$T/new', owner => 'root' }"),
    "Puppet file absent": puppet_row("file { '$E/$K': ensure => absent }", after=None),
})


@pytest.fixture(scope="module")
def box():
    """A VM whose env/ is this file's alone."""
    vm = conftest.SHARED.guest("tools")
    yield vm
    if vm.daemon.running() and os.path.isdir(vm.path):
        vm.close()
        os.rmdir(vm.path)


@pytest.fixture
def folder(tmp_path):
    """$T, with the new value in all the forms that the rows want."""
    (tmp_path / "new").write_bytes(NEW)
    os.utime(tmp_path / "new", (1_600_000_000, 1_600_000_000))
    os.chmod(tmp_path / "new", 0o600)
    (tmp_path / "in").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "ansible.cfg").write_text("")
    (tmp_path / "in" / "TOOL").write_bytes(NEW)
    os.chmod(tmp_path / "in" / "TOOL", 0o600)
    os.utime(tmp_path / "in" / "TOOL", (1_600_000_000, 1_600_000_000))
    (tmp_path / "template").write_text("new {{ 'value' }}\n")
    subprocess.run(["tar", "-C", tmp_path / "in", "-cf", tmp_path / "new.tar", "TOOL"], check=True, timeout=20)
    subprocess.run(["zip", "-qj", tmp_path / "new.zip", tmp_path / "in" / "TOOL"], check=True, timeout=20)
    return tmp_path


def run(vm, folder, script, shell="dash", seconds=40):
    return subprocess.run(
        SHELLS[shell] + ["set -e; " + script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        cwd=folder,
        env=environment(
            E=vm / "env", V=vm.path, T=str(folder), K="TOOL", F=vm.env("TOOL"), HOME=str(folder), TERM="dumb",
            ANSIBLE_LOCALHOST_WARNING="0", ANSIBLE_NOCOLOR="1", ANSIBLE_HOME=str(folder / "ansible"),
            ANSIBLE_LOCAL_TEMP=str(folder / "ansible"), ANSIBLE_REMOTE_TEMP=str(folder / "ansible"),
            ANSIBLE_PYTHON_INTERPRETER="/usr/bin/python3", ANSIBLE_INVENTORY_UNPARSED_WARNING="0",
            ANSIBLE_CONFIG=str(folder / "ansible.cfg"), TMPDIR=str(folder / "tmp"), GIT_CONFIG_NOSYSTEM="1",
        ),
    )


def check(vm, after, leaves=None, key="TOOL"):
    """Both sides say `after`, and nothing else is there."""
    def settled():
        # What is committed at the last close (an empty value) has no call that waits for it.
        return vm.value(key) == after.removesuffix(b"\n") if after is not None else not vm.is_set(key)

    if after == b"":
        wait_for(settled, f"{key} is {after!r} in the guest")
    if after is None:
        assert not os.path.exists(vm.env(key))
        assert not vm.is_set(key)
    else:
        assert read_bytes(vm.env(key)) == after
        assert vm.value(key) == after.removesuffix(b"\n")
        assert os.stat(vm.env(key)).st_size == len(after)
    here = keys(vm)
    rest = [name for name in here if name not in (key, "BYSTANDER")]
    assert [name for name in rest if not leaves or not re.fullmatch(leaves, name)] == [], "left behind"
    if leaves and not leaves.endswith("?"):
        assert rest, f"nothing is called {leaves}"
    assert guest_keys(vm) == sorted(({key} if after is not None else set()) | {"BYSTANDER"})
    assert vm.value("BYSTANDER") == b"is left\nalone"


@pytest.mark.parametrize("name", ROWS)
def test_tool(box, folder, name):
    row = ROWS[name]
    clean_env(box)
    write(box.env("BYSTANDER"), "is left\nalone\n")
    if row.before is not None:
        write(box.env("TOOL"), row.before)
    done = run(box, folder, row.script, row.shell, row.seconds)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr.decode(errors='replace')}"
    check(box, row.after, row.leaves)
    if row.again == "":
        return
    updates = box.info()["env_updates"]
    again = run(box, folder, row.again or row.script, row.shell, row.seconds)
    assert again.returncode == 0, again.stderr.decode(errors="replace")
    if row.again is not None:
        assert again.stdout == b"", f"the second run has something to do: {again.stdout.decode(errors='replace')}"
        assert box.info()["env_updates"] == updates, "the second run has changed the guest"
    check(box, row.after, row.leaves)


def test_nano_in_a_terminal(box, folder):
    clean_env(box)
    write(box.env("BYSTANDER"), "is left\nalone\n")
    write(box.env("TOOL"), OLD)
    with Terminal(["nano", "-I", box.env("TOOL")], environment(HOME=str(folder))) as nano:
        nano.shows(b"old value")
        nano.type(b"\x0b").type(b"new value")  # cut the line, type another
        nano.type(b"\x0f").shows(b"File Name to Write").type(b"\r").shows(b"Wrote 1 line")
        nano.type(b"\x18")
        assert nano.status() == 0
    check(box, NEW)


def test_vim_in_a_terminal_with_a_swap_file(box, folder):
    clean_env(box)
    write(box.env("BYSTANDER"), "is left\nalone\n")
    write(box.env("TOOL"), OLD)
    argv = ["vim", "-u", "NONE", "-i", "NONE", "-N", "--cmd", "set directory=. backup backupskip=", box.env("TOOL")]
    with Terminal(argv, environment(HOME=str(folder))) as vim:
        vim.shows(b"old value")
        assert ".TOOL.swp" in keys(box)
        vim.type(b":%s/old/new/\r").shows(b"new")
        vim.type(b":w\r").shows(b"written")
        assert box.value("TOOL") == b"new value"
        vim.type(b":q\r")
        assert vim.status() == 0
    check(box, NEW, r"TOOL~")


def test_vim_recovers_from_its_swap_file(box, folder):
    clean_env(box)
    write(box.env("BYSTANDER"), "is left\nalone\n")
    write(box.env("TOOL"), OLD)
    argv = ["vim", "-u", "NONE", "-i", "NONE", "-N", "--cmd", "set directory=.", box.env("TOOL")]
    with Terminal(argv, environment(HOME=str(folder))) as vim:
        vim.shows(b"old value").type(b":%s/old/new/\r").shows(b"new").type(b":preserve\r").shows(b"preserved")
    # Killed. What it had in mind is in the swap file.
    assert box.value("TOOL") == b"old value"
    done = run(box, folder, 'cd "$E"; vim -es -u NONE -i NONE -r "$K" -c wq; rm ".$K.swp"')
    assert done.returncode == 0, done
    check(box, NEW)


# --- environ ---

# In both styles that it prints; @ in a row is what comes before a name.
ENVIRON = {
    "export": b"export AA='1'\nexport TOOL='%s value'\nexport ZZ='it'\\''s'\n",
    "set -a": b"set -a\nAA='1'\nTOOL='%s value'\nZZ='it'\\''s'\nset +a\n",
}

ENVIRON_ROWS = {
    "cp": Row('cp "$T/environ" "$V/environ"'),
    "cp -a": Row('cp -a "$T/environ" "$V/environ"'),
    "cat": Row('cat "$T/environ" > "$V/environ"'),
    "tee": Row('tee "$V/environ" < "$T/environ"'),
    "dd bs=1": Row('dd if="$T/environ" of="$V/environ" bs=1 status=none'),
    "dd conv=fsync": Row('dd if="$T/environ" of="$V/environ" conv=fsync status=none'),
    "echo >>": Row('echo "TOOL=new value" >> "$V/environ"'),
    "tee -a": Row('echo "TOOL=new value" | tee -a "$V/environ"'),
    "bash block": Row('while read -r l; do printf "%s\\n" "$l"; done < "$T/environ" > "$V/environ"', shell="bash"),
    "mv in": Row('cp "$T/environ" "$T/moved"; mv "$T/moved" "$V/environ"'),
    "install": Row('install -m 600 "$T/environ" "$V/environ"'),
    "sed -i": Row('sed -i "s/old value/new value/" "$V/environ"'),
    "sed -i.bak": Row('sed -i.bak "s/old value/new value/" "$V/environ"; rm "$V/environ.bak"', ""),
    "sed > .tmp, mv": Row('sed "s/old value/new value/" "$V/environ" > "$V/environ.tmp" && mv "$V/environ.tmp" "$V/environ"'),
    "perl -pi": Row('perl -pi -e "s/old value/new value/" "$V/environ"'),
    "perl -pi.bak": Row('perl -pi.bak -e "s/old value/new value/" "$V/environ"; rm "$V/environ.bak"', ""),
    "gawk -i inplace": Row('gawk -i inplace \'{ sub("old value", "new value"); print }\' "$V/environ"'),
    "ed": Row("printf ',s/old value/new value/\\nw\\nq\\n' | ed -s \"$V/environ\"", ""),
    "vim": Row("vim -es -u NONE -i NONE -c '%s/old value/new value/' -c wq \"$V/environ\"", ""),
    "emacs": Row('F="$V/environ" emacs -Q --batch --eval \'(progn (setq backup-enable-predicate '
                 '(lambda (name) t)) (find-file (getenv "F")) (while (search-forward "old value" nil t) (replace-match "new value")) (save-buffer))\'; rm "$V/environ~"', ""),
    "rsync": Row('rsync -a "$T/environ" "$V/environ"', 'rsync -aci "$T/environ" "$V/environ"'),
    "rsync --inplace": Row('rsync -a --inplace "$T/environ" "$V/environ"', ""),
    "tar x": Row('tar -C "$T" -cf "$T/e.tar" environ; tar -C "$V" -xf "$T/e.tar"', 'cmp "$T/environ" "$V/environ"'),
    "curl": Row('curl -sS -o "$V/environ" "file://$T/environ"'),
    "sponge": Row('sed "s/old value/new value/" "$V/environ" | sponge "$V/environ"'),
    "Python pathlib": Row(PYTHON + '\'import os, pathlib; p = pathlib.Path(os.environ["V"] + "/environ"); '
                          'p.write_text(p.read_text().replace("old value", "new value"))\''),
    "Node": Row('node -e \'const f = require("fs"), e = process.env.V + "/environ"; '
                'f.writeFileSync(e, f.readFileSync(e, "utf8").replace("old value", "new value"))\''),
    "crudini": Row("""crudini --set "$V/environ" "" TOOL "'new value'" """, 'crudini --get "$V/environ" "" TOOL >/dev/null'),
    "crudini --inplace": Row("""crudini --inplace --set "$V/environ" "" TOOL "'new value'" """),
    "Augeas": Row('printf "set /files$V/environ/TOOL \\"\'new value\'\\"\\nsave\\nerrors\\n" | '
                  'augtool --noautoload --transform "Shellvars.lns incl $V/environ" >"$T/log"; grep -q "Saved 1 file" "$T/log" || { cat "$T/log" >&2; exit 9; }',
                  'printf "set /files$V/environ/TOOL \\"\'new value\'\\"\\nsave\\n" | '
                  'augtool --noautoload --transform "Shellvars.lns incl $V/environ" | grep Saved || :'),
    "Ansible copy": ansible_row("copy", "src=$T/environ dest=$V/environ"),
    "Ansible lineinfile": ansible_row("lineinfile", "path=$V/environ regexp='^@TOOL=' line='@TOOL=\\'new value\\''"),
    "Puppet": puppet_row("file { '$V/environ': source => '$T/environ' }"),
}


# Tools that know only lines KEY=…
ONLY = {"crudini": "set -a", "crudini --inplace": "set -a", "Augeas": "set -a"}


@pytest.mark.parametrize("style", ENVIRON)
@pytest.mark.parametrize("name", ENVIRON_ROWS)
def test_tool_on_environ(box, folder, name, style):
    if ONLY.get(name, style) != style:
        return
    row = ENVIRON_ROWS[name]
    new = ENVIRON[style] % b"new"
    script = row.script.replace("@", "export " if style == "export" else "")
    clean_env(box)
    (folder / "environ").write_bytes(new)
    os.chmod(folder / "environ", 0o600)
    os.utime(folder / "environ", (1_600_000_000, 1_600_000_000))  # rsync looks at size and time
    write(box / "environ", ENVIRON[style] % b"old")
    files = sorted(os.listdir(box.path))
    done = run(box, folder, script, row.shell, row.seconds)
    assert done.returncode == 0, f"{done.stderr.decode(errors='replace')}\n{box.error()}"

    def check_both():
        assert read_bytes(box / "environ") == new
        assert os.stat(box / "environ").st_size == len(new)
        assert [box.value(k) for k in ("AA", "TOOL", "ZZ")] == [b"1", b"new value", b"it's"]
        assert sorted(os.listdir(box.path)) == files
        assert keys(box) == guest_keys(box) == ["AA", "TOOL", "ZZ"]

    check_both()
    if row.again == "":
        return
    updates = box.info()["env_updates"]
    again = run(box, folder, (row.again or script).replace("@", "export " if style == "export" else ""), row.shell, row.seconds)
    assert again.returncode == 0, again.stderr.decode(errors="replace")
    if row.again is not None:
        assert again.stdout == b"", again.stdout.decode(errors="replace")
        assert box.info()["env_updates"] == updates, "the second run has changed the guest"
    check_both()


# --- whole directories ---


def test_a_directory_of_values_goes_in_and_comes_out(box, folder):
    clean_env(box)
    values = folder / "values"
    values.mkdir()
    for number in range(20):
        (values / f"DIR_{number}").write_bytes(b"value %d\n" % number)
        os.chmod(values / f"DIR_{number}", 0o600)
    done = run(box, folder, 'cp -a values/. "$E"; mkdir out; cp -a "$E/." out; diff -r values out; rsync -aic values/ "$E"')
    assert done.returncode == 0, done
    assert done.stdout == b"", done
    assert guest_keys(box) == sorted(f"DIR_{n}" for n in range(20))
    assert box.value("DIR_13") == b"value 13"


def test_jsonlike_results_of_ansible_name_the_file(box, folder):
    clean_env(box)
    line = ansible("stat", "path=$E/$K")
    write(box.env("TOOL"), NEW)
    done = run(box, folder, line)
    assert done.returncode == 0, done
    found = json.loads(re.sub(rb"^[^{]*=> ", b"", done.stdout))["stat"]
    assert found["size"] == len(NEW) and found["mode"] == "0600" and found["isreg"]
    assert found["checksum"] == subprocess.run(["sha1sum"], input=NEW, capture_output=True, check=True).stdout.split()[0].decode()


def test_a_file_of_env_is_a_regular_file_to_everybody(box, folder):
    clean_env(box)
    write(box.env("TOOL"), NEW)
    done = run(box, folder, 'test -f "$F" && test -s "$F" && test -w "$F" && . "$V/environ" && [ "$TOOL" = "new value" ] && '
                            'grep -rl "new value" "$E" && diff "$F" new && wc -c < "$F" && head -c 3 "$F" && tail -c 6 "$F"')
    assert done.returncode == 0, done
    assert done.stdout.endswith(b"10\nnewvalue\n"), done.stdout
    assert read(box.env("TOOL")) == "new value\n"
