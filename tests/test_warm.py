"""Warm boots: VMs that start from a template are as much their own as those that boot cold, and a template is made, used and
removed without anybody having to know of it."""

import contextlib
import json
import os
import shutil
import signal
import struct
import threading
import time
import zlib

import pytest

import harness
from harness import kill_and_wait, pid_alive, read, read_bytes, refused, takes_at_most, wait_for, write

MADE = 120  # seconds; it is made when nobody else wants the CPU


@pytest.fixture
def warm(daemon):
    """Starts daemons that have a template of image tiny already: files of their own, for tests that damage them."""

    def make(options="warm=auto", **kwargs):
        one = daemon(options, start=False, templates=False, **kwargs)
        harness.copy_templates(one.state, shutil.copy2)
        return one.start()

    return make


@pytest.fixture
def cold(daemon):
    """Starts daemons that have no template yet."""

    def make(options="warm=auto", **kwargs):
        return daemon(options, templates=False, **kwargs)

    return make


def log_lines(one, *words):
    return [line for line in read(one.log).splitlines() if all(word in line for word in words)]


def prepare(one, name, **settings):
    """Makes a VM with these settings."""
    os.makedirs(one.vm(f".new/{name}"), exist_ok=True)
    for setting, value in settings.items():
        write(one.vm(f".new/{name}/config/{setting}"), f"{value}\n")
    os.rename(one.vm(f".new/{name}"), one.vm(name))
    return one.guest(name)


def content_of(path):
    """As template.json describes a file: its size, and the checksum of all that is not zero."""
    number = size = 0
    with open(path, "rb") as f:
        while chunk := f.read(65536):
            if any(chunk):
                number = zlib.crc32(chunk, zlib.crc32(struct.pack("=q", size), number))
            size += len(chunk)
    return f"{size} {number:08x}"


def boot_warm(one, *names):
    guests = one.boot(*names)
    for guest in guests if isinstance(guests, list) else [guests]:
        assert guest.info()["warm"] is True, read(one.log)
    return guests


def random_of_process_1(guest):
    """The 16 bytes that the kernel has given process 1 for its canary: AT_RANDOM."""
    vector = guest.ssh("cat /proc/1/auxv")
    places = dict(struct.iter_unpack("=QQ", vector))
    return guest.ssh(f"dd if=/proc/1/mem bs=1 skip={places[25]} count=16 2>/dev/null")


# --- Who they are


def test_vms_of_one_template_have_nothing_in_common(warm):
    one = warm()
    for name in ("left", "right"):
        os.makedirs(one.vm(f".new/{name}"), exist_ok=True)
        write(one.vm(f".new/{name}/env/ONLY_{name}"), f"of {name}\n")
        os.rename(one.vm(f".new/{name}"), one.vm(name))
    guests = [one.guest(name) for name in ("left", "right")]
    for guest in guests:
        guest.wait("running")
        assert guest.info()["warm"] is True
        assert guest.ssh("hostname").decode().strip() == guest.name
        assert guest.value(f"ONLY_{guest.name}") == f"of {guest.name}".encode()
    left, right = guests
    assert not left.is_set("ONLY_right") and not right.is_set("ONLY_left")
    for what in (
        "cat /etc/ssh/ssh_host_ed25519_key",
        "cat /run/ssh_host_key",
        "cat /etc/machine-id",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /proc/sys/kernel/random/uuid",
        "head -c 32 /dev/urandom",
    ):
        assert len(left.ssh(what)) >= 32
        assert left.ssh(what) != right.ssh(what), what
    assert random_of_process_1(left) != random_of_process_1(right)
    # Of its own identity a guest has what it was given, of the other's nothing.
    for guest, other in ((left, right), (right, left)):
        assert guest.name in guest.ssh("grep -rl . /etc /root; cat /etc/hostname").decode()
        assert other.name not in guest.ssh("cat /etc/hostname /etc/hosts /etc/profile.d/*").decode()


def test_the_random_number_generator_of_a_guest_is_seeded_after_its_start_only(warm):
    guest = boot_warm(warm(), "seeded")
    lines = guest.ssh("dmesg").decode().splitlines()
    seeded = [i for i, line in enumerate(lines) if "crng init done" in line]
    port = [i for i, line in enumerate(lines) if "Power Button" in line]  # the last that the template does
    assert len(seeded) == 1 and seeded[0] > port[-1]


def test_the_clock_of_a_guest_is_right(warm):
    one = warm()
    guest = boot_warm(one, "clock")
    before = time.time()
    there = int(guest.ssh("date +%s"))
    assert before - 3 <= there <= time.time() + 1


def test_a_machine_id_is_a_random_uuid_and_stays(warm):
    guest = boot_warm(warm(), "id")
    first = guest.ssh("cat /etc/machine-id").decode()
    assert len(first) == 33 and first[12] == "4" and first[16] in "89ab" and int(first, 16)
    key = guest.ssh("cat /etc/ssh/ssh_host_ed25519_key")
    guest.close()
    write(guest / "status", "stopped\n")
    write(guest.env("WHILE_STOPPED"), "x\n")
    write(guest / "status", "running\n")
    assert guest.info()["warm"] is True
    assert guest.ssh("cat /etc/machine-id").decode() == first
    assert guest.ssh("cat /etc/ssh/ssh_host_ed25519_key") == key
    assert guest.value("WHILE_STOPPED") == b"x"


def test_what_an_earlier_boot_was_told_goes_with_it(warm):
    """A variable that is unset is nowhere on the host's disk any more, whichever way the VM boots next."""
    one = warm()
    guest = one.boot("a")
    folder = f"{one.state}/vms/a"

    def again(how):
        write(guest / "status", "stopped\n")
        write(guest / "config/warm", f"{how}\n")
        write(guest / "status", "running\n")
        assert guest.info()["warm"] is (how == "auto")

    def holders(text):
        found = []
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as f:
                    found += [name] if text in f.read() else []
        return found

    for how, other in (("off", "auto"), ("auto", "off")):
        value = f"told-{how}".encode()
        write(guest.env("TOLD"), value)
        again(how)
        assert {"off": "initrd", "auto": "identity"}[how] in holders(value)
        os.unlink(guest.env("TOLD"))
        again(other)
        assert not holders(value)


def test_a_megabyte_of_variables_goes_through_the_port(warm):
    one = warm()
    os.makedirs(one.vm(".new/large"), exist_ok=True)
    for i in range(8):
        write(one.vm(f".new/large/env/K{i}"), f"{i}" * 120_000)
    os.rename(one.vm(".new/large"), one.vm("large"))
    guest = one.guest("large")
    guest.wait("running")
    assert guest.info()["warm"] is True
    for i in range(8):
        assert guest.value(f"K{i}") == f"{i}".encode() * 120_000


@pytest.mark.deadline(240)
def test_folders_that_a_guest_has_keep_mode_and_owner(cold):
    """Also those in which its variables are: it is the image that says what they are."""
    one = cold()
    image = os.path.join(one.path, "image")
    shutil.copytree(os.path.join(harness.IMAGES, "tiny"), image)
    os.makedirs(os.path.join(one.path, "more", "srv", "odd"))
    os.chmod(os.path.join(one.path, "more", "srv", "odd"), 0o1770)
    harness.sh(f"cd {one.path}/more && echo srv/odd | cpio -o -H newc -R 7:7 >> {image}/initrd.img")
    folders = {
        "/srv/odd": "1770 7:7",
        "/root": "700 0:0",
        "/tmp": "1777 0:0",
        "/srv/new/deep": "755 0:0",
    }
    for how, settings in (("cold", {}), ("warm", {}), ("disk", {"disk": "64M"})):
        guests = {}
        for number, folder in enumerate(folders):
            name = f"{how}{number}"
            os.makedirs(one.vm(f".new/{name}"), exist_ok=True)
            write(one.vm(f".new/{name}/env/WHERE"), folder + "\n")
            guests[folder] = prepare(one, name, image=image, env_file=f"{folder}/vars.sh", **settings)
        for folder, guest in guests.items():
            guest.wait("running")
            assert guest.info()["warm"] is (how == "warm")
            assert guest.ssh(f"stat -c '%a %u:%g' {folder}").decode().strip() == folders[folder], how
            assert f"WHERE='{folder}'" in guest.ssh(f"cat {folder}/vars.sh").decode()
            assert guest.ssh("stat -c '%a %u:%g' /root /root/.ssh /etc /etc/ssh").decode().split("\n")[:4] == [
                "700 0:0",
                "700 0:0",
                "755 0:0",
                "755 0:0",
            ]
            os.rmdir(guest.path)
        if how == "cold":
            wait_for(one.templates, "a template is made", MADE)


def test_what_a_guest_writes_to_its_port_goes_nowhere(warm):
    one = warm()
    guest = boot_warm(one, "port")
    identity = os.path.join(one.state, "vms", "port", "identity")
    before = read_bytes(identity)
    guest.ssh("echo scribble | timeout 5 tee /dev/vport*p1 >/dev/null; true")
    assert read_bytes(identity) == before


def test_memory_is_shared_until_it_is_written(warm):
    one = warm()
    for guest in boot_warm(one, "m1", "m2"):
        with open(f"/proc/{guest.qemu()}/smaps", encoding="ascii") as f:
            maps = f.read()
        ram = maps[maps.index("/ram\n"):].split("\n")
        kib = {line.split(":")[0]: int(line.split()[1]) for line in ram[1:20] if line.endswith(" kB")}
        assert kib["Pss"] < 0.75 * kib["Rss"], kib
    # And nothing of them was written to it: another one starts as they did.
    boot_warm(one, "m3")


# --- The template


@pytest.mark.deadline(240)
def test_a_template_is_made_behind_the_first_vm_and_holds_nothing_of_it(cold):
    one = cold()
    secret = os.urandom(16).hex()
    write(one.vm(".defaults/env/TOKEN"), secret + "\n")
    first = one.boot("firstborn")
    assert first.info()["warm"] is False and first.info()["booted_ms"] > 0
    write(first.env("LATER"), f"later-{secret}\n")
    (template,) = wait_for(one.templates, "a template is made", MADE)
    wait_for(lambda: not one.template_makers(), "its QEMU is gone")
    assert sorted(os.listdir(template)) == ["ram", "state", "template.json"]
    host_key = first.ssh("cat /etc/ssh/ssh_host_ed25519_key").splitlines()
    own_key = read_bytes(os.path.join(one.state, "id_ed25519.pub")).split()[1]
    machine_id = first.ssh("cat /etc/machine-id").strip()
    for name in os.listdir(template):
        path = os.path.join(template, name)
        assert os.stat(path).st_mode & 0o777 == 0o600
        data = read_bytes(path)
        for text in (secret.encode(), host_key[2], own_key, machine_id, b"firstborn"):
            assert text not in data, f"{text} in {name}"
    assert os.stat(template).st_mode & 0o777 == 0o700
    second = boot_warm(one, "second")
    assert second.value("TOKEN") == secret.encode() and not second.is_set("LATER")
    assert second.info()["booted_ms"] < first.info()["booted_ms"]


@pytest.mark.deadline(240)
def test_a_changed_image_or_configuration_has_another_template(cold):
    one = cold()
    image = os.path.join(one.path, "image")
    shutil.copytree(os.path.join(harness.IMAGES, "tiny"), image)
    write(one.vm(".defaults/config/image"), image)
    assert one.boot("a").info()["warm"] is False
    (old,) = wait_for(one.templates, "a template is made", MADE)

    write(one.vm(".defaults/config/vcpus"), "2\n")
    assert one.boot("two-a").info()["warm"] is False
    wait_for(lambda: len(one.templates()) == 2, "another is made for two CPUs", MADE)
    assert boot_warm(one, "two-b").ssh("nproc").strip() == b"2"
    write(one.vm(".defaults/config/vcpus"), "\n")
    assert boot_warm(one, "one").ssh("nproc").strip() == b"1"

    with open(os.path.join(image, "initrd.img"), "ab") as f:
        f.write(bytes(512))
    assert one.boot("b").info()["warm"] is False
    wait_for(lambda: old not in one.templates() and one.templates(), "one of the new image takes their place", MADE)
    assert len(one.templates()) == 1
    boot_warm(one, "c")


SETTINGS = {"memory": "160", "cpu_model": "max", "boot_args": "more"}
DESCRIPTION = {"boot_args": " more", "warm_boot_args": " more"}  # at the end of what is there


@pytest.mark.deadline(240)
def test_whatever_a_template_is_made_from_it_does_not_serve_what_differs(cold):
    one = cold()
    image = os.path.join(one.path, "image")
    shutil.copytree(os.path.join(harness.IMAGES, "tiny"), image)
    write(one.vm(".defaults/config/image"), image)
    one.boot("first")
    wait_for(one.templates, "a template is made", MADE)

    def boots(name, warm, **settings):
        guest = prepare(one, name, **settings)
        guest.wait("running")
        assert guest.info()["warm"] is warm, name
        os.rmdir(guest.path)

    for setting, value in SETTINGS.items():
        boots(setting.replace("_", "-"), False, **{setting: value})
    boots("as-before", True)
    path = os.path.join(image, "image.json")
    before = read(path)
    for field, more in DESCRIPTION.items():
        changed = json.loads(before)
        changed[field] += more
        write(path, json.dumps(changed))
        boots("image-" + field.replace("_", "-"), False)
    write(path, before)
    boots("image-as-before", True)
    for name in ("vmlinuz", "initrd.img"):
        shutil.copyfile(os.path.join(image, name), os.path.join(image, "new"))
        os.rename(os.path.join(image, "new"), os.path.join(image, name))
        boots("new-" + name.partition(".")[0], False)


@pytest.mark.deadline(240)
def test_another_qemu_has_another_template(cold):
    own = os.path.join(harness.RUN.path, f"qemu{harness.RUN.number()}")
    program = os.path.join(own, "bin", "qemu-system-x86_64")
    os.makedirs(os.path.dirname(program))
    for name in ("share", "lib"):  # it looks for its firmware and modules from where it is
        os.symlink(f"/usr/{name}", os.path.join(own, name))
    shutil.copyfile(shutil.which("qemu-system-x86_64"), program)
    os.chmod(program, 0o755)
    one = cold(env={"PATH": f"{own}/bin:{harness.environment()['PATH']}"})
    for version in ("old", "new"):
        assert one.boot(f"{version}-first").info()["warm"] is False
        assert os.readlink(f"/proc/{one.guest(f'{version}-first').qemu()}/exe") == program
        wait_for(lambda: len(one.templates()) == (1 if version == "old" else 2), "a template is made", MADE)  # noqa: B023
        boot_warm(one, f"{version}-second")
        shutil.copyfile(program, program + ".new")  # as dpkg does it
        os.chmod(program + ".new", 0o755)
        os.rename(program + ".new", program)


@pytest.mark.deadline(200)
@pytest.mark.parametrize("what", ["machine", "guest"])
def test_what_boots_for_long_does_not_hold_up_the_template(cold, what):
    one = cold(boot_timeout=150)
    if what == "machine":
        stuck = prepare(one, "stuck", backend="attach", address="127.0.0.1", port=harness.free_port())
    else:
        stuck, _ = stop_when_reachable(one, "stuck")
    assert one.boot("first").info()["warm"] is False
    wait_for(lambda: log_lines(one, "making a template"), "one is begun", 22)
    wait_for(one.templates, "a template is made", MADE)
    assert stuck.status() == "booting"
    boot_warm(one, "second")
    os.rmdir(stuck.path)


@pytest.mark.deadline(200)
def test_a_template_is_made_though_one_vm_after_the_other_boots(cold):
    one = cold(boot_timeout=150)
    stuck = [stop_when_reachable(one, "s0")[0]]
    assert one.boot("first").info()["warm"] is False
    started = time.monotonic()
    while not one.templates():
        assert time.monotonic() - started < 60, read(one.log)
        with contextlib.suppress(AssertionError):
            wait_for(one.templates, "a template is made", 8)
        stuck.append(stop_when_reachable(one, f"s{len(stuck)}")[0])
    assert time.monotonic() - started > 20, "it has not waited for them"
    assert {guest.status() for guest in stuck} == {"booting"}


@pytest.mark.deadline(240)
@pytest.mark.parametrize("damage", ["truncated memory", "a bit of memory", "changed state", "state that QEMU refuses"])
def test_a_damaged_template_means_a_cold_boot_and_is_made_anew(warm, damage):
    one = warm(boot_timeout=60)
    (template,) = one.templates()
    description = os.path.join(template, "template.json")
    if damage == "truncated memory":
        os.truncate(os.path.join(template, "ram"), 1 << 20)
    elif damage == "a bit of memory":  # with the size and the times of before
        path = os.path.join(template, "ram")
        before = os.stat(path)
        with open(path, "r+b") as f:
            f.seek(64 << 20)
            byte = f.read(1)[0]
            f.seek(64 << 20)
            f.write(bytes([byte ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        path = os.path.join(template, "state")
        data = bytearray(read_bytes(path))
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        with open(path, "wb") as f:
            f.write(data)
    if damage == "state that QEMU refuses":  # as if it had been made so
        made = json.loads(read(description))
        made["state"] = content_of(path)
        write(description, json.dumps(made))
    inode = os.stat(description).st_ino
    guest = one.boot("after")
    assert guest.info()["warm"] is False
    assert log_lines(one, "warn", "template", template, "boots cold")
    guest.ssh("true")
    if damage == "state that QEMU refuses":  # nor the next time: this is not for the file to be blamed
        assert not os.path.exists(description)
        return
    wait_for(lambda: os.path.exists(description) and os.stat(description).st_ino != inode, "it is made anew", MADE)
    boot_warm(one, "again")


def start(one, name, **settings):
    """Makes a VM and returns as soon as its QEMU runs, with its pid."""
    guest = prepare(one, name, **settings)
    return guest, wait_for(lambda: guest.info().get("pid"), "QEMU runs", step=0.001)


def stop_when_reachable(one, name, **settings):
    """Makes a VM whose guest never answers: its QEMU stands still once it has started."""
    guest, pid = start(one, name, **settings)
    wait_for(lambda: guest.info().get("port"), "it has a port", step=0.001)
    os.kill(pid, signal.SIGSTOP)
    return guest, pid


def crash_when_up(one, name):
    """Makes a VM whose QEMU crashes when the guest has come far, and waits until it has booted without a template."""
    guest, pid = start(one, name)
    serial = os.path.join(one.state, "vms", name, "serial.log")
    wait_for(lambda: os.path.getsize(serial), "the guest speaks", step=0.001)
    kill_and_wait(pid, signal.SIGSEGV)
    guest.wait("running")
    assert guest.info()["warm"] is False


def test_a_start_that_was_not_given_the_time_says_nothing_about_the_template(warm):
    one = warm()
    (template,) = one.templates()
    for name in ("a", "b"):
        guest, pid = stop_when_reachable(one, name, boot_timeout=4)
        words = (f"{name} boots cold", template, "no answer in time", "says nothing about the template")
        wait_for(lambda: log_lines(one, *words), "the start is given up")  # noqa: B023
        assert not pid_alive(pid)
        os.rmdir(guest.path)
    boot_warm(one, "after")
    assert not log_lines(one, "making a template")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_qemu_that_somebody_has_killed_says_nothing_about_the_template(warm, number):
    one = warm()
    (template,) = one.templates()
    for name in ("a", "b"):
        guest, pid = start(one, name)
        kill_and_wait(pid, number)
        guest.wait("running")
        assert guest.info()["warm"] is False
        assert log_lines(one, f"{name} boots cold", template, "says nothing about the template")
    boot_warm(one, "after")
    time.sleep(3)  # as long as the house takes to be kept: nobody makes it once more
    assert not log_lines(one, "making a template") and one.templates() == [template]


@pytest.mark.deadline(200)
def test_what_began_to_boot_before_the_template_was_there_does_not_make_it_again(cold):
    one = cold()
    one.boot("first")
    wait_for(one.template_makers, "a template is being made", 30)
    guest, pid = start(one, "second")
    os.kill(pid, signal.SIGSTOP)
    wait_for(one.templates, "a template is made", MADE)
    os.kill(pid, signal.SIGCONT)
    guest.wait("running")
    assert guest.info()["warm"] is False
    time.sleep(3)
    assert len(log_lines(one, "making a template")) == 1


@pytest.mark.deadline(200)
def test_a_qemu_that_the_host_has_no_room_for_says_nothing_about_the_template(cold):
    bin = os.path.join(harness.RUN.path, f"bin{harness.RUN.number()}")
    os.mkdir(bin)
    program = os.path.join(bin, "qemu-system-x86_64")
    full = os.path.join(bin, "full")
    write(
        program,
        f"""#!/bin/sh
case " $* " in *" -incoming "*) [ ! -e {full} ] || {{ echo "cannot set up guest memory" >&2; exit 1; }} ;; esac
exec {shutil.which("qemu-system-x86_64")} "$@"
""",
    )
    os.chmod(program, 0o755)
    one = cold(env={"PATH": f"{bin}:{harness.environment()['PATH']}"})
    one.boot("first")
    (template,) = wait_for(one.templates, "a template is made", MADE)
    write(full, "")
    for name in ("a", "b"):
        assert one.boot(name).info()["warm"] is False
        assert log_lines(one, f"{name} boots cold", template, "exit status 1", "says nothing about the template")
    os.unlink(full)
    boot_warm(one, "after")


def test_a_vm_that_is_removed_while_it_starts_leaves_its_template_alone(warm):
    one = warm()
    for name in ("a", "b", "c"):
        guest, pid = start(one, name)
        os.rmdir(guest.path)
        wait_for(lambda: not pid_alive(pid), "its QEMU is gone")  # noqa: B023
    boot_warm(one, "after")
    assert not log_lines(one, "boots cold")


@pytest.mark.deadline(200)
def test_a_template_is_removed_when_two_starts_in_a_row_have_failed(warm):
    one = warm()
    (template,) = one.templates()
    stays = "stays, unless the next start from it fails too"
    crash_when_up(one, "a")
    assert log_lines(one, "a boots cold", template, "SIGSEGV", stays)
    boot_warm(one, "between")
    crash_when_up(one, "b")
    assert log_lines(one, "b boots cold", template, "SIGSEGV", stays)
    assert one.templates() == [template]
    crash_when_up(one, "c")
    assert log_lines(one, "c boots cold", template, "SIGSEGV", "as has the one before it", "is removed")
    assert one.templates() == []


@pytest.mark.deadline(200)
def test_a_guest_that_does_not_go_on_from_its_template_boots_cold(warm):
    one = warm(boot_timeout=60)
    (template,) = one.templates()
    guest, pid = stop_when_reachable(one, "after")
    guest.wait("running")
    assert guest.info()["warm"] is False and not pid_alive(pid)
    assert log_lines(one, "after boots cold", template, "no answer in time", "stays, unless the next start")
    assert guest.ssh("hostname").strip() == b"after"
    boot_warm(one, "another")


# --- When it is not used


def test_warm_off_boots_cold_and_makes_none(warm, cold):
    one = warm()
    guest = prepare(one, "off", warm="off")
    guest.wait("running")
    assert guest.info()["warm"] is False
    with refused("EBUSY"):
        write(guest / "config/warm", "auto\n")
    write(guest / "status", "stopped\n")
    with refused("EINVAL"):
        write(guest / "config/warm", "hot\n")
    write(guest / "config/warm", "auto\n")
    write(guest / "status", "running\n")
    assert guest.info()["warm"] is True

    other = cold("warm=off")
    assert other.boot("a").info()["warm"] is False
    assert other.boot("b").info()["warm"] is False
    assert not other.templates() and not other.template_makers() and not log_lines(other, "making a template")


def test_a_disk_or_an_image_that_does_not_know_of_it_boots_cold(warm):
    one = warm()
    image = os.path.join(one.path, "plain")
    shutil.copytree(os.path.join(harness.IMAGES, "tiny"), image)
    description = json.loads(read(os.path.join(image, "image.json")))
    del description["warm"]
    write(os.path.join(image, "image.json"), json.dumps(description))
    for guest in (prepare(one, "disk", disk="64M"), prepare(one, "plain", image=image)):
        guest.wait("running")
        assert guest.info()["warm"] is False
    assert not log_lines(one, "making a template")


# --- Ends of the daemon


@pytest.mark.deadline(200)
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_the_end_of_the_daemon_while_a_template_is_made(cold, how):
    one = cold()
    guest = one.boot("first")
    (maker,) = wait_for(one.template_makers, "a template is being made", 30)
    wait_for(lambda: len(os.listdir(f"/proc/{maker}/task")) > 1, "its QEMU runs")
    for task in os.listdir(f"/proc/{maker}/task"):
        assert os.sched_getscheduler(int(task)) == os.SCHED_IDLE
    for pid in (maker, guest.qemu()):
        assert b"-sandbox\0on,obsolete=deny,elevateprivileges=deny,spawn=deny" in read_bytes(f"/proc/{pid}/cmdline")
    getattr(one, how)()
    wait_for(lambda: not pid_alive(maker), "it ends with the daemon", 5)
    one.start()
    guest.wait("running")
    assert os.listdir(os.path.join(one.state, "templates")) == []
    assert one.qemus() == [guest.qemu()]
    # And the next boot sees to it.
    assert one.boot("second").info()["warm"] is False
    wait_for(one.templates, "a template is made", MADE)
    boot_warm(one, "third")


@pytest.mark.deadline(200)
def test_kill_9_of_the_daemon_at_any_moment_of_a_warm_boot(warm):
    one = warm()
    moments = [
        lambda guest: True,
        lambda guest: one.qemus(),
        lambda guest: guest.info().get("pid"),
        lambda guest: guest.info().get("port"),
        lambda guest: read(guest / "console"),
    ]
    for number, moment in enumerate(moments):
        name = f"k{number}"
        os.mkdir(one.vm(name))
        guest = one.guest(name)
        write(guest.env("EARLY"), "here\n")
        wait_for(lambda: moment(guest), "the moment has come", step=0.001)
        one.kill()
        one.start()
        guest.wait("running")
        assert guest.value("EARLY") == b"here"
        assert guest.ssh("hostname").decode().strip() == name
        assert one.qemus() == [guest.qemu()]
        guest.close()
        os.rmdir(guest.path)
        wait_for(lambda: not one.remains(), f"nothing is left of {name}")


@pytest.mark.deadline(200)
def test_a_maker_that_dies_is_told_of_once_and_leaves_nothing(cold):
    one = cold()
    one.boot("first")
    (maker,) = wait_for(one.template_makers, "a template is being made", 30)
    kill_and_wait(maker)
    wait_for(lambda: log_lines(one, "no template of", "SIGKILL"), "the log says so")
    wait_for(lambda: os.listdir(os.path.join(one.state, "templates")) == [], "nothing is left")
    assert one.boot("second").info()["warm"] is False
    assert len(log_lines(one, "making a template")) == 1


def test_warm_vms_that_boot_at_once_are_all_there(warm):
    one = warm()
    names = [f"n{i}" for i in range(6)]
    with takes_at_most(60, "six warm boots at once"):
        guests = boot_warm(one, *names)
    assert len({guest.ssh("cat /etc/machine-id") for guest in guests}) == len(names)


def test_a_warm_vm_is_paused_and_goes_on(warm):
    guest = boot_warm(warm(), "pause")
    write(guest / "status", "paused\n")
    assert guest.status() == "paused"
    write(guest / "status", "running\n")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(guest.exec("echo goes on")))
    thread.start()
    thread.join(30)
    assert answers == [b"goes on\n"]
