"""ID/config/: the settings of one VM, and the mount options of the same names, which new VMs start with."""

import contextlib
import json
import os
import stat
import subprocess

import pytest

import harness
from harness import SHELLS, read, read_bytes, refused, sh, wait_for, write
from tools_env import environment

# What a VM of the shared daemon has; the tests give all daemons a boot_timeout.
DEFAULTS = {
    "address": "",
    "backend": "auto\n" if harness.BACKEND == "qemu" else f"{harness.BACKEND}\n",
    "boot_args": "",
    "boot_timeout": f"{harness.BOOT_TIMEOUT}\n",
    "cpu_model": "",
    "disk": "0\n",
    "env_file": "/etc/profile.d/vmsfs_env.sh\n",
    "host_key": "",
    "idle_timeout": "0\n",
    "image": "tiny\n",
    "jail_user": "",
    "key": "",
    "lifetime": "0\n",
    "memory": "",
    "port": "22\n",
    "protected": "no\n",
    "shell": "login\n",
    "stop_timeout": "10\n",
    "tap": "",
    "user": "",
    "vcpus": "",
    "warm": "auto\n",
}


def setting(vm, name):
    return vm / f"config/{name}"


def settings(vm):
    return {name: read(setting(vm, name)) for name in os.listdir(vm / "config")}


def record(vm):
    with open(f"{vm.daemon.state}/vms/{vm.name}/vm.json", encoding="utf-8") as f:
        return json.load(f)["config"]


def never_booted(one, name):
    """A VM that is stopped before it has come to anything."""
    os.mkdir(one.vm(name))
    vm = one.guest(name)
    write(vm / "status", "stopped\n")
    return vm


@pytest.fixture
def stopped(mount):
    vm = never_booted(mount, "stopped")
    yield vm
    os.rmdir(vm.path)


def test_each_setting_is_a_file_with_its_value(stopped):
    assert settings(stopped) == DEFAULTS
    assert stat.filemode(os.stat(stopped / "config").st_mode) == "drwxr-xr-x"
    inodes = set()
    for name, value in DEFAULTS.items():
        st = os.stat(setting(stopped, name))
        assert stat.filemode(st.st_mode) == "-rw-r--r--"
        assert st.st_size == len(value)
        inodes.add(st.st_ino)
    inodes |= {os.stat(stopped / name).st_ino for name in os.listdir(stopped.path)}
    assert len(inodes) == len(DEFAULTS) + len(os.listdir(stopped.path))


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("vcpus", "2\n", "2\n"),
        ("vcpus", " 2 ", "2"),
        ("memory", "512", "512"),
        ("memory", "512M\n", "512"),
        ("memory", "1G\n", "1024"),
        ("disk", "4G\n", "4096"),
        ("cpu_model", "Haswell,-avx2,vendor=AuthenticAMD\n", "Haswell,-avx2,vendor=AuthenticAMD\n"),
        ("boot_args", "debug loglevel=7\n", "debug loglevel=7\n"),
        ("shell", "raw\n", "raw\n"),
        ("backend", "qemu\n", "qemu\n"),
        ("stop_timeout", "0\n", "0\n"),
        ("env_file", "/srv/my env\n", "/srv/my env\n"),
        ("user", "admin\n", "admin\n"),
        ("tap", "vm-tap0.1\n", "vm-tap0.1\n"),
        ("jail_user", "nobody\n", "nobody\n"),
    ],
)
def test_a_setting_is_written_and_set_back(stopped, name, text, value):
    path = setting(stopped, name)
    before = os.stat(path).st_mtime_ns
    write(path, text)
    assert read(path) == text, "byte for byte"
    assert os.stat(path).st_size == len(text.encode())
    assert os.stat(path).st_mtime_ns > before
    assert str(record(stopped)[name]) == value.strip()
    sh(': > "$F"', F=path)  # committed when it is closed, which nobody waits for
    default = "auto\n" if name == "backend" else DEFAULTS[name]  # vmsfs' own, not that of the mount
    wait_for(lambda: read(path) == default, f"{name} is the default")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("vcpus", "3.5\n", ["a number from 1 to 64", '"3.5"', "what the image says"]),
        ("vcpus", "2\n2\n", ["a number"]),
        ("vcpus", "1\0", ["a number"]),
        ("memory", "8\n", ["MiB", "16", "1048576"]),
        ("memory", "512K\n", ["with M or G"]),
        ("disk", "8M\n", ["0, for none", "MiB", "16", "its default is 0"]),
        ("disk", "1T\n2T\n", ["MiB"]),
        ("cpu_model", "max -smp 9\n", ["CPU model", "the backend's choice"]),
        ("boot_timeout", "0\n", ["seconds", "86400", "its default is 60"]),
        ("backend", "bochs\n", ["auto, firecracker, cloud_hypervisor, qemu", "bochs", "its default is auto"]),
        ("shell", "fish\n", ["login, raw"]),
        ("env_file", "relative\n", ["absolute path", "its default is /etc/profile.d/vmsfs_env.sh"]),
        ("user", "a b\n", ["letters"]),
        ("image", "a/b\n", ["folder", "absolute path", "its default is tiny"]),
        ("image", "../../etc\n", ["folder", "absolute path"]),
        ("image", ".hidden\n", ["folder", "absolute path"]),
        ("boot_args", "a\nb\n", ["one line"]),
    ],
)
def test_a_bad_value_fails_in_the_shell_that_wrote_it_and_says_what_is_taken(stopped, name, text, words):
    before = settings(stopped)
    with refused("EINVAL"):
        write(setting(stopped, name), text)
    error = stopped.error()
    assert error.startswith(f"config/{name} takes "), error
    for word in words:
        assert word in error
    if "\0" not in text:
        for shell in ("dash", "bash") if text.count("\n") == 1 else ("dash",):  # bash writes line by line
            done = sh('printf %s "$V" > "$F"', shell, check=False, F=setting(stopped, name), V=text)
            assert done.returncode != 0 and done.stderr
    assert settings(stopped) == before


def test_a_value_that_is_too_long_is_refused(stopped):
    with refused("EINVAL"):
        write(setting(stopped, "boot_args"), "x" * 1025)
    assert "1024 bytes" in stopped.error()
    with refused("EFBIG"):
        write(setting(stopped, "boot_args"), "x" * 10000)
    assert read(setting(stopped, "boot_args")) == ""


def test_later_pieces_of_a_value_are_judged_together_at_close(stopped):
    path = setting(stopped, "boot_timeout")
    with open(path, "wb", 0) as f:
        f.write(b"1")
        assert read(path) == "1"
        f.write(b"2")
        f.write(b"0\n")
    assert read(path) == "120\n"
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    assert os.write(fd, b"7") == 1
    os.write(fd, b"x")
    with refused("EINVAL"):
        os.close(fd)
    assert read(path) == "7"
    write(path, "7\n")
    with open(path, "ab", 0) as f, refused("EINVAL"):
        f.write(b"8\n")  # "7\n8\n"
    assert read(path) == "7\n"


def test_truncation_alone_is_the_default_and_before_a_write_it_is_nothing(stopped):
    path = setting(stopped, "vcpus")
    write(path, "2\n")
    with open(path, "r+b", 0) as f:
        f.truncate(0)
        assert read(path) == "2\n"
        f.write(b"4\n")
    assert read(path) == "4\n"
    os.truncate(path, 0)
    assert read(path) == ""
    assert record(stopped)["vcpus"] == 0


def test_other_names_are_refused_with_those_that_there_are(stopped):
    for name in ("cpu", "VCPUS", "4913"):
        with refused("EINVAL"):
            write(setting(stopped, name), "1\n")
        assert f'no setting "{name}"' in stopped.error() and " vcpus" in stopped.error()
    with refused("EPERM"):
        os.mkdir(setting(stopped, "folder"))
    with refused("EEXIST"):
        os.mkdir(setting(stopped, "vcpus"))
    with refused("EPERM"):
        os.rename(setting(stopped, "vcpus"), setting(stopped, "memory"))
    with refused("EXDEV"):
        os.rename(setting(stopped, "vcpus"), stopped / "vcpus")
    assert settings(stopped) == DEFAULTS


def test_a_running_vm_keeps_its_configuration_but_for_what_may_change(vm):
    write(setting(vm, "vcpus"), "\n")
    write(setting(vm, "image"), "tiny\n")
    for name, text in (("vcpus", "2\n"), ("env_file", "/x\n"), ("image", "other\n")):
        with refused("EBUSY"):
            write(setting(vm, name), text)
        assert vm.error().startswith(f"config/{name} can be changed while the VM is stopped, and shared is running")
    with refused("EBUSY"):
        os.truncate(setting(vm, "boot_timeout"), 0)
    assert settings(vm) == DEFAULTS
    for name, text in (("shell", "raw\n"), ("stop_timeout", "20\n")):
        write(setting(vm, name), text)
        assert read(setting(vm, name)) == text
        write(setting(vm, name), DEFAULTS[name])


def test_a_booting_vm_is_busy_and_a_failed_one_can_be_put_right(daemon):
    one = daemon("boot_args=panic")
    os.mkdir(one.vm("wrong"))
    vm = one.guest("wrong")
    with refused("EBUSY"):
        write(setting(vm, "memory"), "128\n")
    assert "is booting" in vm.error()
    write(vm / "status", "stopped\n")
    write(setting(vm, "memory"), "32\n")
    with refused("ENODEV"):
        write(vm / "status", "running\n")
    assert vm.status() == "failed"
    assert "32 MiB" in vm.error() and "tiny" in vm.error()
    write(setting(vm, "memory"), "\n")
    write(setting(vm, "image"), "no-such-image\n")
    with refused("ENODEV"):
        write(vm / "status", "running\n")
    assert "no-such-image" in vm.error()
    write(setting(vm, "image"), "tiny\n")
    write(vm / "status", "running\n")


@pytest.mark.deadline(200)
def test_settings_are_what_the_next_boot_is_made_of(daemon):
    vm = never_booted(daemon("stop_timeout=30,boot_args=from.option=1"), "sized")
    assert read(setting(vm, "stop_timeout")) == "30\n"
    assert read(setting(vm, "boot_args")) == "from.option=1\n"
    write(setting(vm, "vcpus"), "2\n")
    write(setting(vm, "memory"), "160M\n")
    write(setting(vm, "boot_args"), "from.file=1 and=2\n")
    write(setting(vm, "env_file"), "/srv/my vars/env.sh\n")
    write(vm.env("KEY"), "value\n")
    write(vm / "status", "running\n")
    cpus, mebibytes, line = vm.machine()
    assert cpus == 2 and 110 < mebibytes <= 160
    assert line.rstrip().endswith("from.file=1 and=2") and "console=" in line and "from.option" not in line
    assert b"export KEY='value'" in vm.ssh("cat '/srv/my vars/env.sh'")
    write(vm.env("KEY"), "new\n")
    assert b"export KEY='new'" in vm.ssh("cat '/srv/my vars/env.sh'")
    assert vm.exec("echo $KEY") == b"new\n"
    assert b"vmsfs_env.sh" not in vm.ssh("ls /etc/profile.d")


def test_shell_says_what_commands_are_run_by_at_once(new_vm):
    vm = new_vm("shells")
    write(vm.env("KEY"), "value\n")
    vm.ssh("echo 'FROM_PROFILE=yes' >> /etc/profile")
    assert vm.exec("echo $FROM_PROFILE $KEY") == b"yes value\n"
    write(setting(vm, "shell"), "raw\n")
    assert vm.exec("echo $FROM_PROFILE $KEY") == b"value\n"
    write(setting(vm, "shell"), "\n")
    assert vm.exec("echo $FROM_PROFILE $KEY") == b"yes value\n"


def test_what_was_written_survives_the_death_of_the_daemon_and_other_options(daemon):
    one = daemon("vcpus=2,shell=raw")
    vm = never_booted(one, "kept")
    for name, text in (("vcpus", "3\n"), ("memory", "1G\n"), ("boot_args", 'a="b c" ö\n'), ("image", "other\n")):
        write(setting(vm, name), text)
    before = settings(vm)
    assert before["shell"] == "raw\n"
    for _ in range(3):
        write(setting(vm, "stop_timeout"), f"{30 + _}\n")
        one.kill()
        one.start()
        assert settings(vm) == {**before, "stop_timeout": f"{30 + _}\n"}
    one.stop()
    one.options = one.options.replace("vcpus=2,shell=raw", "vcpus=4,shell=login,memory=256,stop_timeout=5")
    one.start()
    assert settings(vm) == {**before, "stop_timeout": "32\n"}
    fresh = never_booted(one, "fresh")
    assert [read(setting(fresh, name)) for name in ("vcpus", "memory", "stop_timeout")] == ["4\n", "256\n", "5\n"]


def test_a_recorded_value_that_is_wrong_is_told_and_the_others_are_kept(daemon):
    one = daemon()
    vm = never_booted(one, "edited")
    write(setting(vm, "memory"), "256\n")
    one.stop()
    path = f"{one.state}/vms/edited/vm.json"
    text = json.loads(read(path))
    text["config"]["vcpus"] = 1000
    with open(path, "w", encoding="utf-8") as f:
        json.dump(text, f)
    one.start()
    assert read(setting(vm, "vcpus")) == "" and read(setting(vm, "memory")) == "256\n"
    assert "vcpus" in vm.error() and "1000" in vm.error()


TOOLS = {
    "echo": 'echo 2 > "$F"',
    "tee": 'echo 2 | tee "$F"',
    "cp": 'cp "$T/vcpus" "$F"',
    "cp -a": 'cp -a "$T/vcpus" "$F"',
    "cp -b": 'cp -b "$T/vcpus" "$F"; rm "$F~"',
    "install": 'install -m 644 "$T/vcpus" "$F"',
    "mv": 'cp "$T/vcpus" "$T/moved"; mv "$T/moved" "$F"',
    "dd": 'dd if="$T/vcpus" of="$F" 2>"$T/log"',
    "sed -i": 's=$(cat "$F"); sed -i "s/$s/2/" "$F"',
    "sed -i.bak": 'sed -i.bak s/1/2/ "$F"; cat "$F.bak"; rm "$F.bak"',
    "perl -pi": 'perl -pi -e s/1/2/ "$F"',
    "ed": 'printf "s/1/2/\\nw\\nq\\n" | ed -s "$F"',
    "vim": 'vim -es -u NONE "+s/1/2/" "+wq" "$F"',
    "rsync": 'rsync -a "$T/vcpus" "$F"',
    "rsync --inplace": 'rsync --inplace "$T/vcpus" "$F"',
    "python": "/usr/bin/python3 -c 'import os, sys, tempfile\n"
              "with tempfile.NamedTemporaryFile(dir=os.path.dirname(sys.argv[1]), delete=False) as f: f.write(b\"2\\n\")\n"
              "os.replace(f.name, sys.argv[1])' \"$F\"",
    "renamed, then written": "/usr/bin/python3 -c 'import os, sys, tempfile\n"
              "f = tempfile.NamedTemporaryFile(dir=os.path.dirname(sys.argv[1]), delete=False)\n"
              "os.replace(f.name, sys.argv[1]); os.write(f.fileno(), b\"2\\n\")' \"$F\"",
    "ansible": 'ansible localhost -c local -m copy -a "src=$T/vcpus dest=$F" > "$T/log" || { cat "$T/log" >&2; exit 1; }',
}  # fmt: skip


def run_tool(vm, folder, script):
    (folder / "ansible.cfg").write_text("")
    return subprocess.run(
        SHELLS["dash"] + ["set -e; " + script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env=environment(
            F=setting(vm, "vcpus"), T=str(folder), HOME=str(folder), TERM="dumb", TMPDIR=str(folder),
            ANSIBLE_LOCALHOST_WARNING="0", ANSIBLE_NOCOLOR="1", ANSIBLE_HOME=str(folder / "ansible"),
            ANSIBLE_LOCAL_TEMP=str(folder / "ansible"), ANSIBLE_REMOTE_TEMP=str(folder / "ansible"),
            ANSIBLE_PYTHON_INTERPRETER="/usr/bin/python3", ANSIBLE_INVENTORY_UNPARSED_WARNING="0",
            ANSIBLE_CONFIG=str(folder / "ansible.cfg"),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_tools_change_a_setting_as_they_change_any_file(stopped, tmp_path, name):
    (tmp_path / "vcpus").write_text("2\n")
    os.utime(tmp_path / "vcpus", (1_600_000_000, 1_600_000_000))
    write(setting(stopped, "vcpus"), "1\n")
    done = run_tool(stopped, tmp_path, TOOLS[name])
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert read(setting(stopped, "vcpus")) == "2\n"
    assert record(stopped)["vcpus"] == 2
    assert sorted(os.listdir(stopped / "config")) == sorted(DEFAULTS)


@pytest.mark.parametrize("name", ["rsync", "ansible"])
def test_a_second_run_of_a_tool_changes_nothing_also_while_the_vm_runs(vm, tmp_path, name):
    (tmp_path / "vcpus").write_text("")
    done = run_tool(vm, tmp_path, TOOLS[name])
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    (tmp_path / "vcpus").write_text("2\n")
    done = run_tool(vm, tmp_path, TOOLS[name])
    assert done.returncode != 0 and "resource busy" in done.stderr.decode(errors="replace")
    assert read(setting(vm, "vcpus")) == ""
    assert sorted(os.listdir(vm / "config")) == sorted(DEFAULTS)


def test_what_was_written_reads_back_so_that_a_tool_sees_no_change(daemon, tmp_path):
    """Ansible compares the file with its own: 512M has to stay 512M."""
    one = daemon("backend=attach,boot_timeout=1")
    os.mkdir(one.vm("words"))
    vm = one.guest("words")
    write(vm / "status", "stopped\n")
    script = 'ansible localhost -c local -m copy -a "src=$T/memory dest=$(dirname "$F")/memory"'
    (tmp_path / "memory").write_text("512M\n")
    for expected in (b"CHANGED", b"SUCCESS"):
        done = run_tool(vm, tmp_path, script)
        assert done.returncode == 0 and expected in done.stdout, done
    assert record(vm)["memory"] == 512
    one.kill()
    one.start()
    assert read(setting(vm, "memory")) == "512M\n"
    # In other words: the same value, which is no change, and never busy.
    for text in ("0.5G\n", "512\n", " 512M"):
        if text == "0.5G\n":
            with refused("EINVAL"):
                write(setting(vm, "memory"), text)
            assert read(setting(vm, "memory")) == "512M\n"
            continue
        write(setting(vm, "memory"), text)
        assert read(setting(vm, "memory")) == text
    write(setting(vm, "memory"), "1G\n")
    one.stop()
    # A record whose words say something else than its value.
    path = f"{one.state}/vms/words/vm.json"
    text = json.loads(read(path))
    text["config"]["memory"] = 256
    write(path, json.dumps(text))
    one.start()
    assert read(setting(vm, "memory")) == "256\n"


def test_a_rename_that_brings_a_bad_value_fails_and_leaves_the_old_one(stopped):
    temporary = setting(stopped, ".new")
    write(setting(stopped, "vcpus"), "2\n")
    write(temporary, "many\n")
    with refused("EINVAL"):
        os.rename(temporary, setting(stopped, "vcpus"))
    assert read(setting(stopped, "vcpus")) == "2\n"
    assert read(temporary) == "many\n"
    write(temporary, "4\n")
    os.rename(temporary, setting(stopped, "vcpus"))
    assert read(setting(stopped, "vcpus")) == "4\n"
    assert ".new" not in os.listdir(stopped / "config")


def test_removing_settings_changes_nothing_so_that_rm_r_gets_to_its_end(daemon):
    one = daemon()
    vm = never_booted(one, "removed")
    write(setting(vm, "vcpus"), "2\n")
    sh('rm -r "$D"', D=vm / "config")
    wait_for(lambda: settings(vm) == {**DEFAULTS, "vcpus": "2\n"}, "the settings are there again")
    sh('rm -r "$D"', D=vm.path)
    assert one.vms() == []


@pytest.mark.deadline(200)
def test_what_a_full_disk_of_the_host_cannot_keep_is_taken_back(daemon, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], check=True, timeout=20)
    try:
        one = daemon(start=False, templates=False)
        one.options = one.options.replace(f"state={one.state}", f"state={disk}/state")
        one.state = f"{disk}/state"
        one.start()
        vm = never_booted(one, "full")
        write(setting(vm, "boot_args"), "before\n")
        write(setting(vm, "memory"), "1G\n")
        with open(disk / "fill", "wb", 0) as f, contextlib.suppress(OSError):
            while True:
                f.write(bytes(4096))
        with refused("ENOSPC", "EIO"):
            write(setting(vm, "boot_args"), "after\n")
        assert read(setting(vm, "boot_args")) == "before\n"
        assert "config/boot_args" in vm.error() and "taken back" in vm.error()
        with refused("ENOSPC", "EIO"):
            write(setting(vm, "memory"), "2048\n")
        assert read(setting(vm, "memory")) == "1G\n"
        os.unlink(disk / "fill")
        write(setting(vm, "boot_args"), "after\n")
        one.kill()
        one.start()
        assert read(setting(vm, "boot_args")) == "after\n"
        os.rmdir(vm.path)
        one.stop()
    finally:
        subprocess.run(["umount", "-l", disk], check=True, timeout=20)


def test_many_writers_of_different_settings_lose_nothing(stopped):
    """Each verdict is about a record that has the change."""
    script = 'i=1; while [ $i -le 20 ]; do echo $i > "$F" || exit 1; i=$((i + 1)); done'
    clients = [
        harness.Client(script, env={"F": setting(stopped, name)})
        for name in ("vcpus", "boot_timeout", "stop_timeout", "boot_args")
    ]
    for client in clients:
        assert client.result(60)[0] == 0
    saved = record(stopped)
    assert [str(saved[name]) for name in ("vcpus", "boot_timeout", "stop_timeout", "boot_args")] == ["20"] * 4
    assert read_bytes(setting(stopped, "vcpus")) == b"20\n"
