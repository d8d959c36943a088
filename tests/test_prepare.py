"""What VMs are made from: .defaults/, .new/NAME/, and the environment of who asks."""

import json
import os
import shutil
import subprocess

import pytest

import harness
from harness import ROOT, Client, read, read_bytes, refused, sh, wait_for, write

PRESETS = os.path.join(ROOT, "contrib", "presets")
EXPECTED = {
    "codex": "OPENAI_API_KEY",
    "claude-code": "ANTHROPIC_API_KEY",
    "pi": "ANTHROPIC_API_KEY OPENAI_API_KEY",
    "hermes": "OPENROUTER_API_KEY OPENAI_API_KEY GOOGLE_API_KEY HF_TOKEN",
    "openclaw": "OPENROUTER_API_KEY OPENAI_API_KEY OPENCLAW_GATEWAY_TOKEN OPENCLAW_GATEWAY_PASSWORD",
    "opencode": "ANTHROPIC_API_KEY OPENAI_API_KEY GOOGLE_API_KEY GEMINI_API_KEY OPENROUTER_API_KEY AWS_ACCESS_KEY_ID "
    "AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION",
}


@pytest.fixture
def machines(sshd, daemon):
    """A daemon whose VMs are attached machines, each with an env file of its own: quick to make, and real."""
    server = sshd()
    one = daemon(server.options())
    one.sshd = server
    return one


def boot(one, name):
    """Waits for a VM that was made otherwise."""
    vm = one.guest(name)
    vm.wait("running")
    return vm


def variables(vm):
    return {name: read(vm.env(name)).rstrip("\n") for name in os.listdir(vm / "env")}


def make(one, name, **environment):
    """mkdir with these variables in its environment, and no others."""
    return subprocess.run(
        ["mkdir", one.vm(name)], env={"PATH": os.environ["PATH"], **environment}, capture_output=True, timeout=30
    )


def env_file(one, name):
    """So that each of the VMs of one machine has variables of its own."""
    return f"{one.sshd.path}/{name}.sh"


def test_the_tree_shows_them_to_who_asks(mount):
    assert ".defaults" not in sh(f"ls '{mount.mount}'").stdout.decode().split()
    assert {".defaults", ".new"} <= set(os.listdir(mount.mount))
    # `error` is listed when there is one: other tests have been refused VMs on this mount.
    assert set(os.listdir(mount.vm(".defaults"))) - {"error"} == {"config", "env", "forward"}
    assert os.listdir(mount.vm(".new")) == []
    with refused("EPERM"):
        os.rmdir(mount.vm(".defaults"))
    with refused("EPERM"):
        os.rmdir(mount.vm(".new"))
    with refused("EEXIST"):
        os.mkdir(mount.vm(".new"))


def test_defaults_and_what_is_prepared_reach_a_guest_before_it_runs(daemon):
    one = daemon()
    write(one.vm(".defaults/env/LEVEL"), "info\n")
    write(one.vm(".defaults/env/REGION"), "eu\n")
    os.mkdir(one.vm(".new/web"))
    write(one.vm(".new/web/env/LEVEL"), "debug\n")
    write(one.vm(".new/web/config/memory"), "144M\n")
    os.rename(one.vm(".new/web"), one.vm("web"))
    os.mkdir(one.vm("plain"))
    assert os.listdir(one.vm(".new")) == []
    web, plain = boot(one, "web"), boot(one, "plain")
    assert (web.value("LEVEL"), web.value("REGION")) == (b"debug", b"eu")
    assert (plain.value("LEVEL"), plain.value("REGION")) == (b"info", b"eu")
    assert read(web / "config/memory") == "144\n"
    told = {
        "qemu": lambda: b" -m 144" in read_bytes(f"/proc/{web.qemu()}/cmdline").replace(b"\0", b" "),
        "firecracker": lambda: '"mem_size_mib":144' in " ".join(one.fake().requests()),
        "cloud_hypervisor": lambda: f'"size":{144 << 20}' in " ".join(one.fake().requests()),
    }
    assert told[harness.BACKEND]()
    assert not os.path.exists(web / "forward")


@pytest.mark.parametrize("shell", ["bash", "dash", "busybox"])
def test_a_template_is_copied_and_moved(machines, tmp_path, shell):
    template = tmp_path / "ci"
    (template / "env").mkdir(parents=True)
    (template / "config").mkdir()
    (template / "env/CI").write_text("true\n")
    (template / "env/LINES").write_text("one\ntwo\n")
    (template / "config/shell").write_text("raw\n")
    (template / "config/env_file").write_text(env_file(machines, "t") + "\n")
    (template / "forward").write_text("TOKEN\n")
    m = machines.mount
    sh(
        f"cp -r '{template}' '{m}/.new/web' && cp -r '{m}/.new/web' '{m}/.new/other' && echo x > '{m}/.new/other/env/OWN'"
        f" && ls '{m}/.new' && TOKEN=secret mv '{m}/.new/web' '{m}/web' && rm -r '{m}/.new/other'",
        shell,
    )
    vm = boot(machines, "web")
    assert variables(vm) == {"CI": "true", "LINES": "one\ntwo", "TOKEN": "secret"}
    assert read(vm / "config/shell") == "raw\n"
    assert os.listdir(machines.vm(".new")) == []
    assert b"export CI='true'" in read_bytes(env_file(machines, "t"))


def test_forward_takes_the_caller_s_variables(machines):
    write(machines.vm(".defaults/forward"), "OPENAI_API_KEY\n# a comment\n\nEMPTY\nABSENT\n")
    write(machines.vm(".defaults/config/env_file"), env_file(machines, "a"))
    done = make(machines, "agent", OPENAI_API_KEY="sk-1", EMPTY="", OTHER="no")
    assert done.returncode == 0, done.stderr
    vm = boot(machines, "agent")
    assert variables(vm) == {"OPENAI_API_KEY": "sk-1"}
    text = read(machines.log)
    assert "sk-1" not in text


def test_the_prepared_wins_over_the_defaults_and_what_is_forwarded_over_both(machines):
    write(machines.vm(".defaults/config/env_file"), env_file(machines, "p"))
    for name in ("A", "B", "C"):
        write(machines.vm(f".defaults/env/{name}"), "default")
    write(machines.vm(".defaults/forward"), "C\n")
    os.mkdir(machines.vm(".new/v"))
    write(machines.vm(".new/v/env/B"), "prepared")
    write(machines.vm(".new/v/env/D"), "prepared")
    write(machines.vm(".new/v/forward"), "D")
    sh(f"mv '{machines.vm('.new/v')}' '{machines.vm('v')}'", C="forwarded", D="forwarded")
    assert variables(boot(machines, "v")) == {"A": "default", "B": "prepared", "C": "forwarded", "D": "forwarded"}


def test_what_is_required_and_missing_refuses_the_vm(machines):
    write(machines.vm(".defaults/forward"), "required TOKEN|PASSWORD\n")
    done = make(machines, "agent", TOKEN="")
    assert done.returncode != 0 and b"nvalid" in done.stderr
    assert "TOKEN" in read(machines.vm(".defaults/error")) and "PASSWORD" in read(machines.vm(".defaults/error"))
    assert not os.path.exists(machines.vm("agent"))
    os.mkdir(machines.vm(".new/agent"))
    done = sh(f"mv '{machines.vm('.new/agent')}' '{machines.vm('agent')}'", check=False)
    assert done.returncode != 0
    assert "TOKEN" in read(machines.vm(".new/agent/error"))
    assert "error" not in os.listdir(machines.vm(".new/agent")), "a copy would have it"
    write(machines.vm(".new/agent/config/env_file"), env_file(machines, "r"))
    sh(f"mv '{machines.vm('.new/agent')}' '{machines.vm('agent')}'", PASSWORD="pw")
    assert variables(boot(machines, "agent")) == {"PASSWORD": "pw"}


def test_a_refused_boot_leaves_what_was_prepared(mount):
    os.mkdir(mount.vm(".new/bad"))
    try:
        write(mount.vm(".new/bad/env/KEPT"), "x\n")
        write(mount.vm(".new/bad/config/image"), "no-such-image\n")
        with refused("ENODEV"):
            os.rename(mount.vm(".new/bad"), mount.vm("bad"))
        assert "no-such-image" in read(mount.vm(".new/bad/error"))
        assert read(mount.vm(".new/bad/env/KEPT")) == "x\n"
        assert not os.path.exists(mount.vm("bad"))
        for bad in ("-bad", ".new/-bad"):
            with refused("EPERM"):
                os.rename(mount.vm(".new/bad"), mount.vm(bad))
            assert "does not begin with -" in read(mount.vm(".new/bad/error"))
            done = sh(f"mv '{mount.vm('.new/bad')}' '{mount.vm(bad)}'", check=False)
            assert done.returncode != 0 and b"itself" not in done.stderr
        # GNU mv takes EINVAL for a move into itself.
        done = sh(f"mv '{mount.vm('.new/bad')}' '{mount.vm('bad')}'", check=False)
        assert done.returncode != 0 and b"itself" not in done.stderr, done.stderr
    finally:
        shutil.rmtree(mount.vm(".new/bad"))
    assert not os.path.exists(mount.vm(".new/bad"))


def test_an_existing_vm_is_not_replaced(vm):
    mount = vm.daemon
    os.mkdir(mount.vm(".new/again"))
    try:
        with refused("EEXIST", "ENOTEMPTY"):
            os.rename(mount.vm(".new/again"), vm.path)
        assert vm.status() == "running"
        with refused("EEXIST"):
            os.mkdir(mount.vm(".new/again"))
        os.rename(mount.vm(".new/again"), mount.vm(".new/renamed"))
        assert os.listdir(mount.vm(".new")) == ["renamed"]
        os.rename(mount.vm(".new/renamed"), mount.vm(".new/again"))
    finally:
        os.rmdir(mount.vm(".new/again"))


@pytest.mark.parametrize("text", ["1A\n", "UID\n", "OK\nrequired A|PPID\n", "A B\n", "OK\nMY-VAR\n", "required\n1\n", "required A|\n", "A=1\n"])
def test_bad_lines_of_forward_are_refused_and_named(mount, text):
    before = read(mount.vm(".defaults/forward"))
    with refused("EINVAL"):
        write(mount.vm(".defaults/forward"), text)
    assert "forward" in read(mount.vm(".defaults/error"))
    os.mkdir(mount.vm(".new/f"))
    try:
        write(mount.vm(".new/f/forward"), "A\n")
        with refused("EINVAL"):
            fd = os.open(mount.vm(".new/f/forward"), os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        assert read(mount.vm(".new/f/forward")) == "A\n"
        sh(f"echo B >> '{mount.vm('.new/f/forward')}'; sed -i s/A/C/ '{mount.vm('.new/f/forward')}'")
        assert read(mount.vm(".new/f/forward")) == "C\nB\n"
    finally:
        os.rmdir(mount.vm(".new/f"))
    write(mount.vm(".defaults/forward"), before)


def test_everything_that_is_prepared_outlives_the_daemon(daemon):
    one = daemon("memory=160")
    write(one.vm(".defaults/env/A"), "1\n")
    write(one.vm(".defaults/config/vcpus"), "2\n")
    write(one.vm(".defaults/forward"), "HOME\n")
    os.mkdir(one.vm(".new/later"))
    write(one.vm(".new/later/env/B"), "two\nlines\n")
    write(one.vm(".new/later/config/memory"), "200\n")
    write(one.vm(".new/later/forward"), "USER\n")
    one.kill()
    one.options = one.options.replace("memory=160", "memory=176")
    one.start()
    assert read(one.vm(".defaults/env/A")) == "1\n"
    # What was written counts, for the rest the options of today.
    assert read(one.vm(".defaults/config/vcpus")) == "2\n"
    assert read(one.vm(".defaults/config/memory")) == "176\n"
    assert read(one.vm(".defaults/forward")) == "HOME\n"
    assert read(one.vm(".new/later/env/B")) == "two\nlines\n"
    assert read(one.vm(".new/later/config/memory")) == "200\n"
    assert read(one.vm(".new/later/forward")) == "USER\n"
    sh(f"rm -r '{one.vm('.new/later')}'")
    one.stop()
    one.start()
    assert os.listdir(one.vm(".new")) == []
    assert os.listdir(os.path.join(one.state, "new")) == []


def test_a_rename_of_what_is_prepared_outlives_the_daemon(daemon):
    one = daemon("backend=attach")
    for i in range(5):
        os.mkdir(one.vm(f".new/p{i}"))
        write(one.vm(f".new/p{i}/env/K"), f"v{i}\n")
        os.rename(one.vm(f".new/p{i}"), one.vm(f".new/z{i}"))
        os.kill(one.pid, 9)
        one.wait_end()
        one.unmount()
        one.start()
        assert read(one.vm(f".new/z{i}/env/K")) == f"v{i}\n"
        os.mkdir(one.vm(f".new/p{i}"))
        os.rmdir(one.vm(f".new/p{i}"))
    assert sorted(os.listdir(one.vm(".new"))) == [f"z{i}" for i in range(5)]
    # A folder that somebody has copied is another.
    one.stop()
    shutil.copytree(f"{one.state}/new/z0", f"{one.state}/new/copy")
    one.start()
    assert read(one.vm(".new/copy/env/K")) == "v0\n"
    assert os.stat(one.vm(".new/copy")).st_ino != os.stat(one.vm(".new/z0")).st_ino


def test_a_refused_template_can_be_copied(machines, tmp_path):
    write(machines.vm(".defaults/forward"), "required TOKEN\n")
    os.mkdir(machines.vm(".new/a"))
    write(machines.vm(".new/a/env/K"), "v\n")
    with refused("ENODEV"):
        os.rename(machines.vm(".new/a"), machines.vm("a"))
    m = machines.mount
    assert "TOKEN" in read(machines.vm(".new/a/error"))
    sh(f"cp -r '{m}/.new/a' '{m}/.new/b' && cp -r '{m}/.new/a' '{tmp_path}/saved' && cp -r '{tmp_path}/saved' '{m}/.new/c'")
    assert read(machines.vm(".new/b/env/K")) == read(machines.vm(".new/c/env/K")) == "v\n"
    assert read(machines.vm(".new/b/error")) == "" and not os.path.exists(tmp_path / "saved/error")


@pytest.fixture
def template(tmp_path):
    folder = tmp_path / "template"
    (folder / "env").mkdir(parents=True)
    (folder / "config").mkdir()
    (folder / "env/K").write_text("v\n")
    (folder / "config/vcpus").write_text("3\n")
    (folder / "forward").write_text("TOKEN\nrequired A|B\n")
    return folder


FILLERS = {
    "tar": 'tar -C "$T" -cf - . | tar -C "$N" -xf -',
    "tar of one file": 'cp -r "$T/env" "$T/config" "$N"; tar -C "$T" -cf - forward | tar -C "$N" -xf -',
    "install": 'for f in forward env/K config/vcpus; do install "$T/$f" "$N/$f"; done',
    "cp --remove-destination": 'cp -r --remove-destination "$T/." "$N"',
    "cp -a": 'rmdir "$N"; cp -a "$T" "$N"',
    "mv": 'rmdir "$N"; cp -r "$T" "$T.2"; mv "$T.2" "$N"',
    "rsync": 'rsync -a "$T/" "$N"',
    "read-only": 'chmod -R a-w "$T"; rmdir "$N"; cp -r "$T" "$N"; chmod -R u+w "$T"',
    "copytree": "/usr/bin/python3 -c 'import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)' \"$T\" \"$N\"",
}  # fmt: skip


@pytest.mark.parametrize("name", FILLERS)
def test_a_template_is_filled_in_by_any_tool(mount, template, name):
    new = mount.vm(".new/filled")
    os.mkdir(new)
    try:
        sh(FILLERS[name], seconds=20, T=str(template), N=new)
        assert read(f"{new}/forward") == "TOKEN\nrequired A|B\n"
        assert read(f"{new}/env/K") == "v\n"
        assert read(f"{new}/config/vcpus") == "3\n"
        assert set(os.listdir(new)) == {"env", "config", "forward"}
    finally:
        shutil.rmtree(new)


EDITS = {
    "sed -i.bak": ('sed -i.bak s/A/Z/ "$F"; cat "$F.bak"; rm "$F.bak"', "Z\nB\n"),
    "mv and back": ('mv "$F" "$F.old"; sed s/A/Z/ "$F.old" > "$F.tmp"; mv "$F.tmp" "$F"; rm "$F.old"', "Z\nB\n"),
    "truncate -s 0": ('truncate -s 0 "$F"', ""),
    "truncate -s 2": ('truncate -s 2 "$F"', "A\n"),
    ": >": (': > "$F"', ""),
    ">>": ('echo C >> "$F"', "A\nB\nC\n"),
    "vim": ('vim -es -u NONE "+%s/A/Z/" "+wq" "$F"', "Z\nB\n"),
    "python r+": (
        "/usr/bin/python3 -c 'import sys\nf = open(sys.argv[1], \"r+\")\nf.write(\"C\")\nf.truncate()\nf.close()' \"$F\"",
        "C",
    ),
    "in pieces": ("/usr/bin/python3 -c 'import os, sys\nf = open(sys.argv[1], \"wb\", 0)\nf.write(b\"LO\")\nf.write(b\"NG\\n\")' \"$F\"", "LONG\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_forward_is_edited_as_any_file(mount, name):
    new = mount.vm(".new/edited")
    os.mkdir(new)
    try:
        script, expected = EDITS[name]
        write(f"{new}/forward", "A\nB\n")
        sh("set -e; " + script, seconds=20, F=f"{new}/forward", TERM="dumb", HOME="/nonexistent")
        wait_for(lambda: read(f"{new}/forward") == expected, f"{read(f'{new}/forward')!r} is {expected!r}", 3)
        assert set(os.listdir(new)) == {"env", "config", "forward"}
        with refused("EINVAL"):
            os.truncate(f"{new}/forward", 100)
        fd = os.open(f"{new}/forward", os.O_WRONLY | os.O_TRUNC)
        with refused("EINVAL"):
            os.write(fd, b"1A\n")
        with refused("EINVAL"):  # nothing is taken behind a line that was refused
            os.write(fd, b"OK\n")
        os.close(fd)
        assert read(f"{new}/forward") == expected
    finally:
        os.rmdir(new)


def test_what_is_required_may_be_in_env(machines):
    m = machines.mount
    sh(f"cp -r '{PRESETS}/openclaw' '{m}/.new/claw' && echo '{env_file(machines, 'claw')}' > '{m}/.new/claw/config/env_file'")
    write(f"{m}/.new/claw/env/OPENCLAW_GATEWAY_TOKEN", "\n")
    with refused("ENODEV"):  # an empty one is none
        os.rename(f"{m}/.new/claw", f"{m}/claw")
    assert "OPENCLAW_GATEWAY_TOKEN or OPENCLAW_GATEWAY_PASSWORD" in read(f"{m}/.new/claw/error")
    write(f"{m}/.new/claw/env/OPENCLAW_GATEWAY_TOKEN", "tok\n")
    sh(f"mv '{m}/.new/claw' '{m}/claw'")
    assert variables(boot(machines, "claw"))["OPENCLAW_GATEWAY_TOKEN"] == "tok"
    # Also what the one of the two forwards for the other.
    write(machines.vm(".defaults/forward"), "required TOKEN\n")
    write(machines.vm(".defaults/env/TOKEN"), "t\n")
    assert make(machines, "plain").returncode == 0


def test_what_cannot_be_forwarded_is_named(machines):
    write(machines.vm(".defaults/forward"), "LARGE\n")
    for i in range(8):
        write(machines.vm(f".defaults/env/FULL{i}"), "f" * 130_000)
    done = make(machines, "large", LARGE="x" * 100_000)
    assert done.returncode != 0
    assert "LARGE" in read(machines.vm(".defaults/error")) and "xxx" not in read(machines.log)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"memory": "16"}, ["16 MiB"]),
        ({"image": "no-such"}, ["no-such"]),
        ({"backend": "attach"}, ["config/address"]),
        ({"backend": "attach", "address": "127.0.0.1", "key": "/no/such/key"}, ["/no/such/key"]),
        ({"backend": "attach", "address": "127.0.0.1", "host_key": "/no/such/host_key"}, ["/no/such/host_key"]),
    ],
)
def test_a_boot_that_can_be_known_to_fail_leaves_what_was_prepared(mount, config, words):
    new = mount.vm(".new/x")
    os.mkdir(new)
    try:
        for name, value in config.items():
            write(f"{new}/config/{name}", value + "\n")
        with refused("ENODEV"):
            os.rename(new, mount.vm("x"))
        for word in words:
            assert word in read(f"{new}/error")
        assert not os.path.exists(mount.vm("x"))
    finally:
        os.rmdir(new)


@pytest.mark.parametrize("name", EXPECTED)
def test_presets_forward_exactly_their_variables(machines, name):
    everything = " ".join(EXPECTED.values()).split()
    m = machines.mount
    sh(f"cp -r '{PRESETS}/{name}' '{m}/.new/agent' && echo '{env_file(machines, 'agent')}' > '{m}/.new/agent/config/env_file'")
    if name == "openclaw":
        done = sh(f"mv '{m}/.new/agent' '{m}/agent'", check=False)
        assert done.returncode != 0 and "OPENCLAW_GATEWAY" in read(f"{m}/.new/agent/error")
    sh(f"mv '{m}/.new/agent' '{m}/agent'", OTHER_KEY="no", **{key: f"value of {key}" for key in everything})
    assert variables(boot(machines, "agent")) == {key: f"value of {key}" for key in EXPECTED[name].split()}


def test_a_move_that_a_killed_daemon_did_not_finish_is_finished(machines):
    for name in ("draft", "other"):
        os.mkdir(machines.vm(f".new/{name}"))
        write(machines.vm(f".new/{name}/env/P"), "kept\n")
    machines.kill()
    state = machines.state
    shutil.copytree(f"{state}/new/draft", f"{state}/vms/moved")
    record = json.loads(read(f"{state}/vms/moved/vm.json"))
    record |= {"id": "moved", "number": record["number"] + 10, "made_from": record["number"]}
    write(f"{state}/vms/moved/vm.json", json.dumps(record))
    os.mkdir(f"{state}/trash/999999")  # one that was not made yet
    machines.start()
    assert os.listdir(machines.vm(".new")) == ["other"]
    assert read(machines.vm("moved/env/P")) == "kept\n"
    assert machines.vms() == ["moved"]
    wait_for(lambda: os.listdir(f"{state}/trash") == [], "the trash is empty")


def test_who_is_killed_while_he_asks_makes_nothing_or_all(machines):
    write(machines.vm(".defaults/forward"), "HOME\n")
    for i in range(20):
        with Client(["mkdir", machines.vm(f"k{i}")]) as client:
            client.signal(9)
            client.result(5)
    for name in set(os.listdir(machines.mount)) - {".defaults", ".new"}:
        os.rmdir(machines.vm(name))
    wait_for(lambda: set(os.listdir(machines.mount)) == {".defaults", ".new"}, "all are gone")
