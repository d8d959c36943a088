"""config/disk: a guest of image tiny with a disk keeps what is written under /. config/cpu_model: which CPU it sees."""

import json
import os
import resource
import shutil
import stat
import struct

import pytest

from harness import IMAGES, kill_and_wait, read, read_bytes, refused, sh, wait_for, write

MIB = 1 << 20


def setting(vm, name):
    return vm / f"config/{name}"


def disk(vm):
    return f"{vm.daemon.state}/vms/{vm.name}/disk.img"


def stop(vm):
    vm.close()
    write(vm / "status", "stopped\n")


def start(vm):
    write(vm / "status", "running\n")


def never_booted(one, name):
    os.mkdir(one.vm(name))
    vm = one.guest(name)
    write(vm / "status", "stopped\n")
    return vm


def fails_to_boot(vm, *words):
    with refused("ENODEV"):
        start(vm)
    assert vm.status() == "failed"
    for word in words:
        assert word in vm.error(), vm.error()


def superblock(path):
    """Of the ext4 file system there: its size in MiB, whether it has a journal, and whether that has to be replayed."""
    with open(path, "rb") as f:
        f.seek(1024)
        block = f.read(1024)
    assert struct.unpack_from("<H", block, 0x38)[0] == 0xEF53
    blocks, unit = struct.unpack_from("<I", block, 0x4)[0], 1024 << struct.unpack_from("<I", block, 0x18)[0]
    compatible, incompatible = struct.unpack_from("<II", block, 0x5C)
    return {"size": blocks * unit // MIB, "journal": bool(compatible & 4), "replay": bool(incompatible & 4)}


FILES = ("/root/notes", "/etc/profile.d/own.sh", "/srv/data/deep/file", "/usr/local/bin/tool", "/var/log/seen", "/top")


def fill(vm, text):
    vm.ssh("; ".join(f"mkdir -p {os.path.dirname(path)}; echo '{text}' > {path}" for path in FILES))
    vm.ssh("echo 127.0.0.9 own >> /etc/hosts; rm /etc/os-release; ln -s /srv/data /root/link; chmod 711 /srv")


def check_filled(vm, text):
    seen = vm.ssh(f"cat {' '.join(FILES)} /root/link/deep/file").decode()
    assert seen == (text + "\n") * (len(FILES) + 1)
    assert b"127.0.0.9 own" in vm.ssh("cat /etc/hosts")
    assert vm.ssh("[ ! -e /etc/os-release ]; echo $?; stat -c %a /srv").split() == [b"0", b"711"]


@pytest.mark.deadline(300)
def test_what_is_written_under_root_survives_stop_and_start(daemon):
    one = daemon("disk=64M")
    vm = one.boot("kept")
    fill(vm, "it is kept")
    vm.ssh("echo gone > /tmp/gone; echo gone > /run/gone")
    stop(vm)
    assert superblock(disk(vm)) == {"size": 64, "journal": True, "replay": False}
    start(vm)
    check_filled(vm, "it is kept")
    assert vm.ssh("ls /tmp; ls /run/gone", check=False) == b""
    st = os.stat(disk(vm))
    assert st.st_size == 64 * MIB and st.st_blocks * 512 < 8 * MIB
    assert stat.S_IMODE(st.st_mode) == 0o600
    assert vm.info()["disk"]["size"] == 64 * MIB
    assert 0 < vm.info()["disk"]["used"] < 8 * MIB
    # What is deleted in the guest takes no room on the host.
    vm.ssh("dd if=/dev/urandom of=/root/large bs=1M count=16 2>&1; sync")
    assert vm.info()["disk"]["used"] > 16 * MIB
    vm.ssh("rm /root/large; sync")
    wait_for(lambda: vm.info()["disk"]["used"] < 12 * MIB, "the room is given back", 30)
    vm.close()
    os.rmdir(vm.path)
    wait_for(lambda: not one.remains(), "the disk is gone with its VM")


@pytest.mark.deadline(300)
def test_what_was_synced_survives_the_death_of_qemu(daemon):
    one = daemon("disk=64M")
    vm = one.boot("killed")
    fill(vm, "it is synced")
    vm.ssh("sync; (while :; do echo more >> /root/log; done) >/dev/null 2>&1 &")
    vm.close()
    kill_and_wait(vm.qemu())
    wait_for(lambda: vm.status() == "failed", "its end is seen", 20)
    assert superblock(disk(vm))["replay"]
    start(vm)
    check_filled(vm, "it is synced")
    # The same without a daemon.
    vm.ssh("echo again > /root/notes; sync")
    pid = vm.qemu()
    one.kill()
    kill_and_wait(pid)
    one.start()
    assert vm.status() != "running"
    start(vm)
    assert vm.ssh("cat /root/notes") == b"again\n"


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


STATE = 0x3A  # of the superblock: 1 is unmounted in order, 2 is errors


@pytest.mark.deadline(300)
def test_a_file_system_with_errors_is_checked(daemon):
    vm = daemon("disk=64M").boot("errors")
    vm.ssh("echo kept > /root/kept")
    stop(vm)
    with open(disk(vm), "r+b") as f:
        f.seek(1024)
        block = bytearray(f.read(1024))
        assert struct.unpack_from("<H", block, STATE)[0] == 1
        struct.pack_into("<H", block, STATE, 3)
        struct.pack_into("<I", block, 1020, crc32c(block[:1020]))
        f.seek(1024)
        f.write(block)
    start(vm)
    assert vm.ssh("cat /root/kept") == b"kept\n"
    assert b"error" not in vm.ssh("dmesg | grep EXT4")
    stop(vm)
    with open(disk(vm), "r+b") as f:
        f.seek(1024 + STATE)
        assert f.read(2) == b"\1\0"
        # What cannot be repaired without asking is left to people.
        f.seek(1024)
        f.write(b"\xff" * STATE)
        f.seek(1080)
        f.write(b"\x53\xef")
    fails_to_boot(vm, "no disk: /dev/vda is damaged")


@pytest.mark.deadline(400)
def test_variables_and_keys_of_the_host_win_over_what_is_on_the_disk(daemon):
    one = daemon("disk=64M")
    vm = one.boot("variables")
    for key in ("REMOVED", "CHANGED", "KEPT"):
        write(vm.env(key), "old\n")
    stop(vm)
    os.unlink(vm.env("REMOVED"))
    write(vm.env("CHANGED"), "new\n")
    write(vm.env("ADDED"), "new\n")
    updates = vm.info()["env_updates"]
    start(vm)

    def check():
        assert [vm.value(key) for key in ("CHANGED", "ADDED", "KEPT")] == [b"new", b"new", b"old"]
        assert not vm.is_set("REMOVED")
        assert sorted(os.listdir(vm / "env")) == ["ADDED", "CHANGED", "KEPT"]
        # It had not to be put right by the daemon's first login.
        assert vm.info()["env_updates"] == updates

    check()
    # Whatever the guest has made of the places where they are put.
    vm.ssh(
        "mv /etc/profile.d /srv/profile.d; ln -s /srv/profile.d /etc/profile.d; echo export REMOVED=1 > /srv/profile.d/vmsfs_env.sh;"
        "rm -rf /root/.ssh; touch /root/.ssh; rm /etc/ssh/ssh_host_ed25519_key; mkdir /etc/ssh/ssh_host_ed25519_key;"
        "ln -s /etc/passwd /etc/hostname.new; mv /etc/hostname.new /etc/hostname; sync"
    )
    vm.close()
    kill_and_wait(vm.qemu())
    wait_for(lambda: vm.status() == "failed", "its end is seen", 20)
    start(vm)
    check()
    assert vm.ssh("hostname; cat /etc/hostname").split() == [b"variables"] * 2
    assert vm.ssh("cat /etc/passwd").startswith(b"root:")
    assert vm.ssh("stat -c '%a %U' /etc/ssh/ssh_host_ed25519_key /root/.ssh/authorized_keys").split(b"\n")[:2] == [
        b"600 root"
    ] * 2
    # The file of an earlier boot is not left where login shells would read it, all variables removed or not.
    stop(vm)
    write(setting(vm, "env_file"), "/etc/profile.d/other.sh\n")
    write(vm / "environ", "ONLY=this\n")
    start(vm)
    assert vm.ssh("ls /etc/profile.d") == b"other.sh\n"
    assert vm.value("ONLY") == b"this" and not vm.is_set("KEPT")
    stop(vm)
    os.unlink(vm.env("ONLY"))
    start(vm)
    assert not vm.is_set("ONLY") and os.listdir(vm / "env") == []


@pytest.mark.deadline(300)
def test_two_vms_have_disks_of_their_own(daemon):
    one = daemon("disk=64M")
    a, b = one.boot("disk-a", "disk-b")
    a.ssh("echo a > /root/mine; sync")
    b.ssh("echo b > /root/mine; sync")
    for vm in (a, b):
        stop(vm)
    os.rmdir(a.path)
    os.mkdir(a.path)
    start(b)
    a.wait("running")
    assert b.ssh("cat /root/mine") == b"b\n"
    assert a.ssh("ls /root") == b"", "a new VM of the same name has a new disk"


@pytest.mark.deadline(300)
def test_without_a_disk_a_guest_is_as_it_was(new_vm):
    vm = new_vm("diskless")
    assert vm.info()["disk"] is None
    assert not os.path.exists(disk(vm))
    assert vm.ssh("ls -d /dev/vd* /run/vmsfs /lib/disk-init /.vmsfs-injected 2>/dev/null", check=False) == b""
    assert vm.ssh("grep -cE 'overlay|ext4' /proc/mounts /proc/modules", check=False).split() == [
        b"/proc/mounts:0",
        b"/proc/modules:0",
    ]
    command = read_bytes(f"/proc/{vm.qemu()}/cmdline")
    assert b"blockdev" not in command and b"virtio-blk" not in command
    vm.ssh("echo lost > /root/lost")
    stop(vm)
    start(vm)
    assert vm.ssh("ls /root") == b""
    # A disk can come later.
    stop(vm)
    write(setting(vm, "disk"), "64M\n")
    start(vm)
    vm.ssh("echo kept > /root/kept")
    # Detached, it is kept.
    stop(vm)
    write(setting(vm, "disk"), "0\n")
    start(vm)
    assert vm.ssh("ls /root; ls -d /dev/vd* 2>/dev/null", check=False) == b""
    assert vm.info()["disk"]["size"] == 64 * MIB
    stop(vm)
    write(setting(vm, "disk"), "64M\n")
    start(vm)
    assert vm.ssh("cat /root/kept") == b"kept\n"


@pytest.mark.deadline(300)
def test_a_disk_can_be_made_larger_but_not_smaller(daemon):
    one = daemon("disk=64M")
    vm = one.boot("grows")
    with refused("EBUSY"):
        write(setting(vm, "disk"), "128M\n")
    vm.ssh("echo kept > /root/kept")
    before = int(vm.ssh("df -k / | tail -n 1").split()[1])
    stop(vm)
    with refused("EINVAL"):
        write(setting(vm, "disk"), "63\n")
    for word in ("64 MiB", "larger", "0 detaches"):
        assert word in vm.error()
    assert read(setting(vm, "disk")) == "64\n"
    write(setting(vm, "disk"), "1G\n")
    write(setting(vm, "disk"), "64M\n")  # it has not been made larger yet
    write(setting(vm, "disk"), "1G\n")
    start(vm)
    assert int(vm.ssh("df -k / | tail -n 1").split()[1]) > before * 12
    assert vm.ssh("cat /root/kept") == b"kept\n"
    vm.ssh("dd if=/dev/zero of=/root/large bs=1M count=100 2>&1; rm /root/large")
    stop(vm)
    assert superblock(disk(vm)) == {"size": 1024, "journal": True, "replay": False}
    # Also when it is the options, or another program, that say so.
    write(setting(vm, "disk"), "0\n")
    with refused("EINVAL"):
        write(setting(vm, "disk"), "1023M\n")
    write(setting(vm, "disk"), "2G\n")
    os.truncate(disk(vm), 3 << 30)
    fails_to_boot(vm, "3072 MiB", "2048", "config/disk")


def test_a_disk_that_cannot_be_made_is_told(daemon):
    one = daemon()
    vm = never_booted(one, "roomless")
    resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (128 * MIB, 128 * MIB))
    write(setting(vm, "disk"), "256M\n")
    fails_to_boot(vm, "disk.img", "config/disk", "256 MiB", "File too large")
    assert not os.path.exists(disk(vm))
    os.mkdir(disk(vm))
    fails_to_boot(vm, "disk.img", "Is a directory")
    os.rmdir(disk(vm))
    write(setting(vm, "disk"), "64M\n")
    start(vm)


@pytest.mark.deadline(200)
def test_a_disk_with_something_else_on_it_is_not_touched(daemon):
    vm = never_booted(daemon("disk=64M"), "foreign")
    with open(disk(vm), "wb") as f:
        f.write(b"\x33\xc0 something else")
        f.truncate(64 * MIB)
    before = read_bytes(disk(vm))
    fails_to_boot(vm, "/dev/vda is neither empty", "console")
    assert "no disk: /dev/vda is neither empty" in read(vm / "console")
    assert read_bytes(disk(vm)) == before


def test_an_image_has_to_say_that_it_can_use_a_disk(daemon, tmp_path):
    shutil.copytree(f"{IMAGES}/tiny", tmp_path / "images" / "old")
    path = tmp_path / "images" / "old" / "image.json"
    text = json.loads(path.read_text())
    del text["disk"]
    path.write_text(json.dumps(text))
    one = daemon()
    vm = never_booted(one, "old")
    write(setting(vm, "image"), f"{tmp_path}/images/old\n")
    write(setting(vm, "disk"), "64M\n")
    fails_to_boot(vm, "cannot use a disk", str(path.parent), "0 in config/disk")
    assert not os.path.exists(disk(vm))
    done = sh('"$V" "$M" -o "images=$I,image=old,disk=64M,state=$M/state" 2>&1', check=False,
              V=one.program, M=str(tmp_path), I=str(tmp_path / "images"))  # fmt: skip
    assert done.returncode != 0 and b"-o disk" in done.stdout and b"cannot use a disk" in done.stdout
    path.write_text(json.dumps({**text, "disk": "qcow2"}))
    fails_to_boot(vm, "disk (must be", str(path))


@pytest.mark.deadline(200)
def test_cpu_model_is_the_cpu_that_the_guest_sees(daemon):
    one = daemon("cpu_model=qemu64")
    vm = never_booted(one, "cpu")
    assert read(setting(vm, "cpu_model")) == "qemu64\n"
    write(setting(vm, "cpu_model"), "no-such-cpu\n")
    fails_to_boot(vm, "not qemu: it knows no such CPU as in config/cpu_model")
    write(setting(vm, "cpu_model"), "max,no_such_feature=on\n")
    fails_to_boot(vm, "no-such-feature")
    write(setting(vm, "cpu_model"), "qemu64,+rdrand,vendor=AuthenticAMD,model-id=vmsfs.test\n")
    start(vm)
    seen = vm.ssh("cat /proc/cpuinfo")
    assert b"vmsfs.test" in seen and b"AuthenticAMD" in seen and b" rdrand " in seen
