"""Options, and what is said when something is wrong before anything is mounted."""

import os
import re
import subprocess

import pytest

from harness import IMAGES, VMSFS, environment, mount_line, processes_with


def run(*argv, env=None, cwd=None):
    return subprocess.run(
        [VMSFS, *argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        env=environment(env),
        cwd=cwd,
        text=True,
    )


@pytest.fixture
def place(tmp_path):
    (tmp_path / "vms").mkdir()
    yield tmp_path
    assert not mount_line(str(tmp_path / "vms"))
    assert not processes_with(str(tmp_path))


def refuse(place, *options, mountpoint=None, env=None, names=()):
    """It fails with one message that names all of `names`, and nothing is mounted or made."""
    before = sorted(os.listdir(place))
    mountpoint = str(mountpoint or place / "vms")
    options = ",".join((f"state={place}/state", *options))
    for extra in ([], ["-f"]):
        done = run(mountpoint, "-o", options, *extra, env=env, cwd=place)
        assert done.returncode not in (0, 99) and done.returncode > 0, done
        for name in names:
            assert name in done.stderr, done.stderr
        assert done.stderr.startswith("vmsfs: ") and done.stderr.count("\n") == 1, done.stderr
        assert not mount_line(mountpoint)
        assert sorted(os.listdir(place)) == before
    return done.stderr


def test_help_lists_the_options():
    for option in ("-h", "--help"):
        done = run(option)
        assert done.returncode == 0
        assert "usage: vmsfs [SOURCE] MOUNTPOINT" in done.stdout
        for name in ("state=", "images=", "image=", "backend=", "vcpus=", "memory=", "boot_timeout=", "timeout="):
            assert name in done.stdout
        assert "allow_other" in done.stdout


def test_version_is_told():
    for option in ("-V", "--version"):
        done = run(option)
        assert done.returncode == 0
        assert re.fullmatch(r"vmsfs \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("option", ["bogus", "bogus=1", "stat=/x", "imagess=x"])
def test_an_unknown_option_is_named(place, option):
    for others in ([], ["allow_other", f"images={IMAGES}"]):
        refuse(place, *others, option, names=["unknown option", f"-o {option}'; vmsfs -h lists them"])


def test_a_bad_value_of_an_option_of_fuse_is_named(place):
    refuse(place, f"images={IMAGES}", "max_write=much", names=["max_write=much"])


@pytest.mark.parametrize("option", ["state=", "images=", "image=", "backend=", "env_file="])
def test_an_empty_option_is_named_with_the_remedy(place, option):
    places = option in ("state=", "images=")
    words = ["is empty", "leave it out"] if places else ["takes"]
    refuse(place, *([] if option == "images=" else [f"images={IMAGES}"]), option, names=[f"-o {option}", *words])


@pytest.mark.parametrize("option", ["--bogus", "-q"])
def test_an_unknown_flag_is_named(place, option):
    done = run(str(place / "vms"), "-o", f"state={place}/state", option)
    assert done.returncode > 0
    assert option in done.stderr


def test_no_mount_point_is_told_with_the_usage():
    done = run()
    assert done.returncode > 0
    assert "mount point" in done.stderr and "usage" in done.stderr


def test_an_argument_too_many_is_named(place):
    done = run("source", str(place / "vms"), "three", "-o", f"state={place}/state")
    assert done.returncode > 0
    assert "three" in done.stderr


def test_a_missing_mount_point_is_named_with_the_remedy(place):
    refuse(place, mountpoint=place / "nothing", names=[str(place / "nothing"), "mkdir"])


def test_a_mount_point_that_is_a_file_is_named(place):
    (place / "file").write_text("x")
    refuse(place, mountpoint=place / "file", names=[str(place / "file"), "directory"])


def test_a_missing_image_is_named_with_the_remedy(place):
    message = refuse(place, "image=nothing", f"images={IMAGES}", names=["nothing", IMAGES])
    assert "contrib/guest" in message or "images=" in message
    (place / "empty").mkdir()
    refuse(place, f"images={place}/empty", "image=none", names=["none"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "bad", "kernel": "nothing", "initrd": "nothing"}'])
def test_a_broken_image_is_named(place, text):
    (place / "images" / "bad").mkdir(parents=True)
    (place / "images" / "bad" / "image.json").write_text(text)
    refuse(place, f"images={place}/images", "image=bad", names=["bad"])


def test_an_unknown_backend_is_named(place):
    refuse(place, f"images={IMAGES}", "backend=bochs", names=["bochs", "qemu"])
    refuse(place, f"images={IMAGES}", env={"VMSFS_BACKEND": "bochs"}, names=["bochs"])


def test_an_unknown_log_level_is_named_with_those_that_there_are(place):
    refuse(place, f"images={IMAGES}", "log_level=loud", names=["-o log_level=loud", "error, warning, info or debug"])


@pytest.mark.parametrize(
    "option",
    ["vcpus=0", "vcpus=x", "vcpus=", "vcpus=-1", "vcpus=1.5", "memory=1", "memory=64K", "memory=99999999999999999999",
     "timeout=0", "timeout=-5", "timeout= 5", "boot_timeout=soon", "boot_timeout=0"],
)  # fmt: skip
def test_a_bad_number_is_named_with_what_is_taken(place, option):
    refuse(place, f"images={IMAGES}", option, names=[option.split("=")[0] + "=", "number"])


def test_too_little_memory_for_the_image_is_named(place):
    refuse(place, f"images={IMAGES}", "memory=32", names=["memory", "96"])


def test_a_state_directory_that_cannot_be_is_named(place):
    (place / "file").write_text("x")
    done = run(str(place / "vms"), "-o", f"images={IMAGES},state={place}/file/state")
    assert done.returncode > 0
    assert f"{place}/file" in done.stderr


def test_without_qemu_its_package_is_named(place):
    # A PATH and a root file system without QEMU: the search ends in fixed places, so those are hidden.
    script = (
        'mkdir "$0/empty" && for p in /usr/bin/qemu-system-x86_64 /usr/local/bin/qemu-system-x86_64; do '
        '[ ! -e "$p" ] || { touch "$0/none" && mount --bind "$0/none" "$p"; }; done; exec "$@"'
    )
    argv = [VMSFS, str(place / "vms"), "-f", "-o", f"state={place}/state,images={IMAGES}"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, str(place), *argv],
        capture_output=True,
        timeout=30,
        env=environment(),
        text=True,
    )
    assert done.returncode > 0
    assert "qemu-system-x86" in done.stderr and "apt install" in done.stderr


def test_without_dev_fuse_the_remedy_is_told(place):
    script = 'mount -t tmpfs none /dev && exec "$@"'
    argv = [VMSFS, str(place / "vms"), "-f", "-o", f"state={place}/state,images={IMAGES}"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *argv], capture_output=True, timeout=30, env=environment(), text=True
    )
    assert done.returncode > 0
    assert "/dev/fuse" in done.stderr and "modprobe" in done.stderr


def test_a_dev_fuse_that_cannot_be_opened_is_told_with_the_remedy(place):
    # On a file system with nodev it is a name only, for root, too.
    script = 'mount -t tmpfs -o nodev none /dev && mknod -m 666 /dev/fuse c 10 229 && exec "$@"'
    for extra in ([], ["-f"]):
        argv = [VMSFS, str(place / "vms"), "-o", f"state={place}/state,images={IMAGES}", *extra]
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", *argv],
            capture_output=True,
            timeout=30,
            env=environment(),
            text=True,
        )
        assert done.returncode > 0
        assert "/dev/fuse cannot be opened: Permission denied" in done.stderr and "chmod 666 /dev/fuse" in done.stderr
        assert not (place / "state").exists()


def test_the_mount_is_named_after_its_source_and_type(daemon):
    one = daemon()
    line = mount_line(one.mount)
    assert " - fuse.vmsfs vmsfs " in line
    assert "nosuid" in line and "nodev" in line


def test_a_source_argument_is_taken_and_shown(daemon):
    one = daemon(start=False)
    one.argv = lambda: [VMSFS, "my-vms", one.mount, "-o", one.options]
    one.start()
    assert " - fuse.vmsfs my-vms " in mount_line(one.mount)


def test_daemonizing_returns_when_the_mount_answers(daemon):
    # start() looks at nothing after the command has returned.
    one = daemon(detached=True)
    assert mount_line(one.mount)
    assert one.vms() == []
    assert os.getsid(one.pid) == one.pid
    assert os.readlink(f"/proc/{one.pid}/cwd") == "/"
    for fd in "012":
        assert os.readlink(f"/proc/{one.pid}/fd/{fd}") in ("/dev/null", f"{one.state}/log")


def test_relative_paths_are_those_of_the_caller(daemon):
    one = daemon(start=False, detached=True)
    os.makedirs(one.state)
    one.options = one.options.replace(f"state={one.state}", "state=state")
    argv = [VMSFS, "vms", "-o", one.options]
    done = subprocess.run(argv, cwd=one.path, capture_output=True, timeout=30, env=environment())
    assert done.returncode == 0, done.stderr
    one.pid = processes_with("state=state")[0]
    assert mount_line(one.mount)
    assert "lock" in os.listdir(one.state)


def test_vcpus_and_memory_are_what_the_guest_gets(daemon):
    guest = daemon("vcpus=2,memory=160").boot("sized")
    assert guest.ssh("nproc").strip() == b"2"
    kilobytes = int(re.search(rb"MemTotal: *(\d+)", guest.ssh("cat /proc/meminfo")).group(1))
    assert 110_000 < kilobytes < 160 * 1024


def test_an_image_can_be_given_by_its_path(daemon):
    one = daemon(f"image={IMAGES}/tiny")
    guest = one.boot("bypath")
    assert guest.exec("echo up") == b"up\n"


@pytest.mark.parametrize("option", ["", "allow_other"])
def test_permissions_are_always_checked_by_the_kernel(daemon, option):
    one = daemon(option)
    options = mount_line(one.mount).rpartition(" - ")[2].split()[-1].split(",")
    assert "default_permissions" in options
    assert ("allow_other" in options) == (option == "allow_other")
