"""backend=attach: an existing machine with an SSH server as a VM. It is never started nor ended."""

import os
import re
import signal
import socket
import subprocess
import threading

import pytest

from harness import (
    SLACK,
    VMSFS,
    Client,
    children,
    environment,
    make_key,
    mount_line,
    pid_alive,
    processes_with,
    read,
    read_bytes,
    refused,
    sh,
    takes_at_most,
    wait_for,
    write,
)


def setting(vm, name):
    return vm / f"config/{name}"


def env_file(vm):
    """Names and values of the machine's file, as a shell that reads it has them."""
    names = re.findall(r"^export (\w+)=", read(vm.sshd.env_file), re.M)
    script = ". " + vm.sshd.env_file + "; for k; do eval \"printf '%s=%s\\\\0' $k \\\"\\$$k\\\"\"; done"
    done = subprocess.run(["dash", "-c", script, "dash", *names], capture_output=True, timeout=20, check=True)
    return dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if pair)


def learns(server):
    """Options of a daemon that is not given the host key."""
    return server.options().replace(f",host_key={server.host_key}.pub", "")


def recorded(vm):
    return read(f"{vm.daemon.state}/vms/{vm.name}/vm.json")


def in_namespace(folder, script, options):
    """Runs a script in a mount namespace of its own; its arguments mount a daemon on `folder`/vms."""
    argv = ["unshare", "-m", "--propagation", "private", "dash", "-c", script, "dash"]
    done = subprocess.run(
        [*argv, VMSFS, folder / "vms", "-o", options],
        capture_output=True,
        timeout=60,
        env=environment({"T": str(folder)}),
        text=True,
    )
    assert not mount_line(str(folder / "vms"))
    wait_for(lambda: not processes_with(f"{folder}/vms"), "the daemon ends")
    return done


def fails(vm, *words, seconds=30):
    """It fails to attach, with a sentence that has all of the words."""
    wait_for(lambda: vm.status() == "failed", "attaching fails", seconds)
    for word in words:
        assert word in vm.error(), vm.error()


def test_a_machine_is_attached_with_its_variables_and_commands(attached):
    vm = attached()
    assert vm.status() == "running"
    info = vm.info()
    assert (info["backend"], info["address"], info["port"]) == ("attach", "127.0.0.1", vm.sshd.port)
    assert (info["host_key"], info["user"]) == ("file", "root")
    assert "pid" not in info and vm.daemon.qemus() == []
    assert read(vm / "console") == ""
    write(vm.env("KEY"), "it's\n a value\n")
    assert env_file(vm) == {"KEY": "it's\n a value"}
    assert vm.exec('printf "%s" "$KEY"; exit 0') == b"it's\n a value"
    assert vm.exec(f"cat {vm.sshd.path}/authorized_keys") == read_bytes(vm.sshd.authorized_keys)
    with refused("EREMOTEIO"):
        write(vm / "exec", "exit 3")
    assert "status 3" in vm.error()
    os.unlink(vm.env("KEY"))
    assert env_file(vm) == {}
    # The same way in, for the programs of the host.
    assert vm.ssh("echo $$").strip().isdigit()


def test_its_own_variables_are_kept_and_those_set_meanwhile_win(sshd, daemon):
    server = sshd()
    with open(server.env_file, "w", encoding="ascii") as f:
        f.write("# by hand\numask 027\nexport THEIRS='is kept'\nexport BOTH='of the machine'\n")
    one = daemon(server.options())
    os.mkdir(one.vm("box"))
    vm = one.guest("box")
    vm.sshd = server
    write(vm.env("BOTH"), "of the host\n")
    write(vm.env("OURS"), "new\n")
    vm.wait("running")
    assert env_file(vm) == {"THEIRS": "is kept", "BOTH": "of the host", "OURS": "new"}
    assert "umask 027" in read(server.env_file)
    assert sorted(os.listdir(vm / "env")) == ["BOTH", "OURS", "THEIRS"]
    # And while it is attached its file is the truth.
    with open(server.env_file, "a", encoding="ascii") as f:
        f.write("export LATER=1\n")
    wait_for(lambda: os.path.exists(vm.env("LATER")), "a change of the machine shows")
    assert read(vm.env("LATER")) == "1\n"


def test_many_commands_at_once_stay_within_the_limits_of_the_server(attached):
    vm = attached(MaxSessions=2)
    script = 'exec 3<>"$F"; echo "sleep 1; echo done" >&3; cat <&3'
    results = []
    threads = [threading.Thread(target=lambda: results.append(sh(script, F=vm / "exec").stdout)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [b"done\n"] * 8


def test_stopping_detaches_and_leaves_the_machine_alone(attached):
    vm = attached()
    write(vm.env("KEPT"), "kept\n")
    write(vm.env("REMOVED"), "x\n")
    background = int(vm.exec("sleep 1000 >/dev/null 2>&1 & echo $!"))
    try:
        with takes_at_most(SLACK, "detaching"):
            write(vm / "status", "stopped\n")
        assert vm.status() == "stopped"
        vm.close()
        assert pid_alive(background)
        assert vm.sshd.process.poll() is None
        assert env_file(vm) == {"KEPT": "kept", "REMOVED": "x"}
        with refused("EBUSY"):
            write(vm / "exec", "true")
        # What is changed meanwhile is there as soon as it runs again.
        write(vm.env("KEPT"), "changed\n")
        os.unlink(vm.env("REMOVED"))
        assert env_file(vm) == {"KEPT": "kept", "REMOVED": "x"}
        write(vm / "status", "running\n")
        assert env_file(vm) == {"KEPT": "changed"}
        assert vm.exec("echo $KEPT") == b"changed\n"
        # And what the machine has changed meanwhile, when nothing was changed here.
        write(vm / "status", "stopped\n")
        with open(vm.sshd.env_file, "w", encoding="ascii") as f:
            f.write("export THEIRS='new'\n")
        write(vm / "status", "running\n")
        assert sorted(os.listdir(vm / "env")) == ["THEIRS"]
        assert env_file(vm) == {"THEIRS": "new"}
        with takes_at_most(SLACK, "rmdir"):
            os.rmdir(vm.path)
        assert pid_alive(background)
        assert read(vm.sshd.env_file).count("export") == 1
    finally:
        os.kill(background, 9)


def test_a_machine_that_goes_away_is_unreachable_until_it_comes_back(attached):
    vm = attached()
    write(vm.env("KEY"), "value\n")
    vm.sshd.stop()
    wait_for(lambda: vm.status() == "unreachable", "it is unreachable")
    with refused("EHOSTUNREACH"):
        write(vm.env("KEY"), "new\n")
    assert "does not answer" in vm.error()
    vm.sshd.start()
    vm.wait("running", 20)
    write(vm.env("KEY"), "new\n")
    assert env_file(vm) == {"KEY": "new"}
    vm.sshd.stop()
    wait_for(lambda: vm.status() == "unreachable", "it is unreachable")
    with takes_at_most(SLACK, "detaching what does not answer"):
        write(vm / "status", "stopped\n")
    write(vm.env("KEY"), "set while it was away\n")
    vm.sshd.start()
    write(vm / "status", "running\n")
    assert env_file(vm) == {"KEY": "set while it was away"}


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_new_daemon_attaches_it_again(attached, how):
    vm = attached()
    one = vm.daemon
    for value in ("one", "two"):
        write(vm.env("KEY"), f"{value}\n")
        getattr(one, how)()
        one.start()
        vm.wait("running", 20)
        assert read(vm.env("KEY")) == f"{value}\n"
        assert env_file(vm) == {"KEY": value}
        assert vm.exec("echo $KEY") == f"{value}\n".encode()
    # One that is away when the daemon comes is waited for.
    getattr(one, how)()
    vm.sshd.stop()
    one.start()
    assert vm.status() == "unreachable"
    vm.sshd.start()
    vm.wait("running", 20)
    write(vm / "status", "stopped\n")
    getattr(one, how)()
    one.start()
    assert vm.status() == "stopped"
    write(vm / "status", "running\n")
    assert env_file(vm) == {"KEY": "two"}


def test_a_host_key_that_is_not_the_given_one_is_refused(sshd, daemon):
    server = sshd()
    make_key(server.path + "/other")
    one = daemon(server.options().replace(f"{server.host_key}.pub", f"{server.path}/other.pub") + ",boot_timeout=3")
    os.mkdir(one.vm("box"))
    vm = one.guest("box")
    fails(vm, "host key", f"127.0.0.1:{server.port}", server.path + "/other.pub", "config/host_key")
    assert "Accepted publickey" not in read(server.log)
    # As a line of known_hosts, among others.
    with open(server.path + "/known", "w", encoding="ascii") as f:
        f.write("# comment\n@revoked * " + read(server.path + "/other.pub"))
        f.write(f"[127.0.0.1]:{server.port} " + read(server.host_key + ".pub"))
    write(setting(vm, "host_key"), server.path + "/known\n")
    write(vm / "status", "running\n")
    assert vm.info()["host_key"] == "file"
    assert vm.exec("echo up") == b"up\n"


def test_without_one_the_host_key_is_learned_and_insisted_on(sshd, daemon):
    server = sshd()
    one = daemon(learns(server) + ",boot_timeout=3")
    vm = one.boot("box")
    vm.sshd = server
    assert vm.info()["host_key"] == "first use"
    assert read(server.host_key + ".pub").split()[1] in recorded(vm)
    assert vm.ssh("echo up") == b"up\n"  # with the known_hosts of ssh_config
    vm.close()

    server.stop()
    make_key(server.host_key)
    server.start()
    wait_for(lambda: "host key" in vm.error() and "learned at the first connection" in vm.error(), "it is refused")
    assert vm.status() == "unreachable"
    one.kill()
    one.start()
    assert vm.status() == "unreachable"
    write(vm / "status", "stopped\n")
    with refused("ENODEV"):
        write(vm / "status", "running\n")
    fails(vm, "host key", "config/host_key")
    assert vm.info()["host_key"] == "first use"
    # The remedy.
    write(setting(vm, "host_key"), f"{server.host_key}.pub\n")
    write(vm / "status", "running\n")
    assert vm.info()["host_key"] == "file"
    write(vm / "status", "stopped\n")
    # Another machine has another key.
    write(setting(vm, "host_key"), "\n")
    for other in (sshd(), sshd()):
        other.authorize(server.key + ".pub")
        write(setting(vm, "port"), f"{other.port}\n")
        write(vm / "status", "running\n")
        assert vm.info()["host_key"] == "first use"
        assert read(other.host_key + ".pub").split()[1] in recorded(vm)
        write(vm / "status", "stopped\n")


def test_the_daemons_own_key_is_the_default(sshd, daemon):
    server = sshd()
    one = daemon(server.options().replace(f"key={server.key},", "", 1) + ",boot_timeout=4")
    os.mkdir(one.vm("box"))
    vm = one.guest("box")
    vm.sshd = server
    wait_for(lambda: "refused" in vm.error(), "the login is refused")
    assert vm.status() == "booting"
    fails(vm, f"{one.state}/id_ed25519.pub", "authorized_keys of root", "config/key")
    server.authorize(f"{one.state}/id_ed25519.pub")
    write(vm / "status", "running\n")
    assert vm.exec("echo up") == b"up\n"
    assert vm.ssh("echo up") == b"up\n"


def test_a_machine_that_refuses_is_tried_until_the_time_is_over(sshd, daemon):
    server = sshd(start=False)
    one = daemon(server.options() + ",boot_timeout=3")
    os.mkdir(one.vm("box"))
    vm = one.guest("box")
    assert vm.status() == "booting"
    with refused("ENODEV"):
        write(vm / "status", "running\n")
    fails(vm, "within 3 s", f"127.0.0.1:{server.port}", "Connection refused", "config/address", "config/boot_timeout")
    write(setting(vm, "boot_timeout"), "60\n")
    write(vm.env("KEY"), "value\n")
    with open(vm / "status", "wb", 0) as f:
        writer = threading.Thread(target=lambda: f.write(b"running\n"))
        writer.start()
        wait_for(lambda: vm.status() == "booting", "it is being attached")
        server.start()
        writer.join(30)
    assert vm.status() == "running"
    assert "export KEY='value'" in read(server.env_file)


def test_a_server_that_says_nothing_is_given_up_in_time(daemon, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        one = daemon(f"backend=attach,address=127.0.0.1,port={silent.getsockname()[1]},boot_timeout=3", timeout=1)
        os.mkdir(one.vm("box"))
        fails(one.guest("box"), "waiting for the SSH server to speak")


def test_a_name_that_nobody_knows_is_told(daemon):
    one = daemon("backend=attach,address=no-such-host.invalid,boot_timeout=4")
    os.mkdir(one.vm("box"))
    vm = one.guest("box")
    with takes_at_most(1, "the mount, meanwhile"):
        os.listdir(vm.path)
    fails(vm, "address of no-such-host.invalid could not be found")


def test_a_name_may_have_several_addresses(tmp_path, sshd):
    """In a mount namespace of its own, for its /etc/hosts. The server has the one that is never the first (RFC 3484)."""
    server = sshd(address="127.0.0.2")
    (tmp_path / "vms").mkdir()
    (tmp_path / "hosts").write_text("127.0.0.3 many.test\n127.0.0.2 many.test\n127.0.0.1 many.test\n")
    script = """
        mount --bind "$T/hosts" /etc/hosts
        "$@" || exit 1
        mkdir "$T/vms/box"
        echo running > "$T/vms/box/status"; cat "$T/vms/box/status" "$T/vms/box/error"
        grep '"address"' "$T/vms/box/info"
        rmdir "$T/vms/box"
        fusermount3 -u "$T/vms"
    """
    options = server.options().replace("address=127.0.0.2", "address=many.test") + f",state={tmp_path}/state,boot_timeout=10"
    done = in_namespace(tmp_path, script, options)
    assert done.stdout.split() == ["running", '"address":', '"127.0.0.2",'], done


def test_what_is_missing_is_told_with_the_remedy(sshd, daemon):
    server = sshd()
    one = daemon("backend=attach")
    os.mkdir(one.vm("box"))
    vm = one.guest("box")
    # At once, so that a script may go on with telling it where.
    assert vm.status() == "failed" and "config/address" in vm.error()
    with refused("ENODEV"):
        write(vm / "status", "running\n")
    for name, value, words in (
        ("address", "127.0.0.1", None),
        ("port", str(server.port), None),
        ("key", "/nonexistent/key", ["/nonexistent/key", "config/key", "No such file"]),
        ("key", server.key, None),
        ("host_key", "/nonexistent/host", ["/nonexistent/host", "config/host_key"]),
        ("host_key", "/etc/hostname", ["/etc/hostname", "no public key"]),
    ):
        write(setting(vm, name), value + "\n")
        if words:
            with refused("ENODEV"):
                write(vm / "status", "running\n")
            fails(vm, *words)
    for name, value in (("address", "a b"), ("address", "-x"), ("port", "0"), ("port", "65536"), ("key", "relative")):
        with refused("EINVAL"):
            write(setting(vm, name), value)
    write(setting(vm, "host_key"), f"{server.host_key}.pub\n")
    write(setting(vm, "env_file"), f"{server.env_file}\n")
    write(vm / "status", "running\n")
    assert vm.status() == "running"


def test_an_env_file_that_the_user_may_not_write_is_told_with_the_remedy(attached):
    vm = attached(options="env_file=/sys/vmsfs_env.sh")
    with refused("EACCES"):
        write(vm.env("KEY"), "value\n")
    assert "/sys/vmsfs_env.sh" in vm.error() and "config/env_file" in vm.error() and "root may write" in vm.error()
    assert os.listdir(vm / "env") == []
    write(vm / "status", "stopped\n")
    write(vm.env("KEY"), "value\n")
    with refused("ENODEV"):
        write(vm / "status", "running\n")
    fails(vm, "config/env_file")
    write(setting(vm, "env_file"), f"{vm.sshd.env_file}\n")
    write(vm / "status", "running\n")
    assert env_file(vm) == {"KEY": "value"}


@pytest.mark.deadline(200)
def test_both_kinds_live_in_one_mount(sshd, daemon):
    server = sshd()
    one = daemon()
    os.mkdir(one.vm("guest"))
    os.mkdir(one.vm("box"))
    vm = one.guest("box")
    vm.sshd = server
    write(vm / "status", "stopped\n")
    values = dict(item.split("=", 1) for item in server.options().split(","))
    for name, value in values.items():
        write(setting(vm, name), f"{value}\n")
    write(vm / "status", "running\n")
    write(vm.env("KEY"), "of the box\n")
    guest = one.guest("guest")
    guest.wait("running")
    assert guest.info()["host_key"] == "made here"
    assert not guest.is_set("KEY")
    assert (guest.info()["backend"], vm.info()["backend"]) == ("qemu", "attach")
    assert env_file(vm) == {"KEY": "of the box"}
    # A machine and a guest by turns.
    write(vm / "status", "stopped\n")
    write(setting(vm, "backend"), "qemu\n")
    write(setting(vm, "env_file"), "\n")
    write(vm / "status", "running\n")
    assert vm.info()["host_key"] == "made here"
    assert vm.value("KEY") == b"of the box"


def test_neither_image_nor_qemu_is_needed_and_a_backend_that_does_not_work_says_why(tmp_path, sshd):
    """In a mount namespace of its own, where there is no QEMU and no image."""
    server = sshd()
    (tmp_path / "vms").mkdir()
    (tmp_path / "none").touch()
    script = """
        for p in /usr/bin/qemu-system-x86_64 /usr/local/bin/qemu-system-x86_64; do
            [ ! -e "$p" ] || mount --bind "$T/none" "$p"; done
        "$@" || exit 1
        mkdir "$T/vms/box"
        echo running > "$T/vms/box/status"; cat "$T/vms/box/status"
        echo stopped > "$T/vms/box/status"
        echo qemu > "$T/vms/box/config/backend"
        echo running > "$T/vms/box/status" || cat "$T/vms/box/error"
        rmdir "$T/vms/box"
        fusermount3 -u "$T/vms"
    """
    options = server.options() + f",state={tmp_path}/state,image=nowhere"
    done = in_namespace(tmp_path, script, options)
    status, no_qemu = done.stdout.splitlines()
    assert status == "running"
    assert no_qemu.startswith("box cannot boot: ") and "qemu-system-x86" in no_qemu and "apt install" in no_qemu, done


def test_auto_does_not_attach(daemon):
    one = daemon("address=127.0.0.1")
    os.mkdir(one.vm("auto"))
    vm = one.guest("auto")
    wait_for(lambda: vm.info()["backend"] != "auto", "it boots")
    assert vm.info()["backend"] == "qemu"


def test_what_a_killed_daemon_has_sent_is_not_done_later(attached):
    """Its resident shell may be slow: the next daemon sees to its end before it reads the variables."""
    vm = attached()
    one = vm.daemon
    write(vm.env("KEY"), "old\n")
    shell = int(read(f"{one.state}/vms/{vm.name}/running").split()[1])
    assert b"VMSFS_SEEN=" in read_bytes(f"/proc/{shell}/environ")
    os.kill(shell, signal.SIGSTOP)
    try:
        with Client('echo late > "$F"', env={"F": vm.env("KEY"), "PATH": os.environ["PATH"]}) as client:
            client.waits()
            one.kill()
            assert client.result(10)[0] != 0
        one.start()
        wait_for(lambda: vm.status() == "running", "it is attached again", 20)
        assert not pid_alive(shell)
        assert read(vm.env("KEY")) == "old\n" and env_file(vm) == {"KEY": "old"}
        write(vm.env("OTHER"), "new\n")
        assert env_file(vm) == {"KEY": "old", "OTHER": "new"}
    finally:
        if pid_alive(shell):
            os.kill(shell, signal.SIGCONT)


def test_what_a_shell_that_was_ended_has_begun_is_not_done_later(sshd, daemon):
    """Its mv may outlive it."""
    server = sshd(start=False).start_slow()
    one = daemon(server.options())
    vm = one.boot("box")
    write(vm.env("KEY"), "old\n")
    shell = int(read(f"{one.state}/vms/{vm.name}/running").split()[1])
    write(server.path + "/slow", "")
    with Client('echo late > "$F"', env={"F": vm.env("KEY"), "PATH": os.environ["PATH"]}) as client:
        wait_for(lambda: children(shell), "the update is under way")
        one.kill()
        os.kill(shell, signal.SIGKILL)
        assert client.result(10)[0] != 0
    os.unlink(server.path + "/slow")
    one.start()
    wait_for(lambda: vm.status() == "running", "it is attached again", 20)
    assert read(vm.env("KEY")) == "late\n"
