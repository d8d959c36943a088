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
    assert "error" in os.listdir(machines.vm(".new/agent"))
    write(machines.vm(".new/agent/config/env_file"), env_file(machines, "r"))
    sh(f"mv '{machines.vm('.new/agent')}' '{machines.vm('agent')}'", PASSWORD="pw")
    assert variables(boot(machines, "agent")) == {"PASSWORD": "pw"}


def test_a_refused_boot_leaves_what_was_prepared(mount):
    os.mkdir(mount.vm(".new/bad"))
    try:
        write(mount.vm(".new/bad/env/KEPT"), "x\n")
        write(mount.vm(".new/bad/config/image"), "no-such-image\n")
        with refused("EINVAL"):
            os.rename(mount.vm(".new/bad"), mount.vm("bad"))
        assert "no-such-image" in read(mount.vm(".new/bad/error"))
        assert read(mount.vm(".new/bad/env/KEPT")) == "x\n"
        assert not os.path.exists(mount.vm("bad"))
        with refused("EINVAL"):
            os.rename(mount.vm(".new/bad"), mount.vm("-bad"))
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


@pytest.mark.parametrize("text", ["1A\n", "A B\n", "OK\nMY-VAR\n", "required\n1\n", "required A|\n", "A=1\n"])
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
