"""mount(8), fstab and systemd: vmsfs as any other file system. With the real mount, umount and fusermount3, in a private place
where /sbin has mount.vmsfs and everybody may open /dev/fuse, as on a Debian."""

import os
import re
import shlex
import subprocess

import pytest

from harness import BUILD, ROOT, mount_line, read, sanitizer_environment, wait_for
from private import Place

OPTIONS = "state=/mnt/state,images=/mnt/build/images"
OTHER = "state=/mnt/other,images=/mnt/build/images"
USER_OPTIONS = "state=/mnt/home/state,images=/mnt/build/images"

# /etc/fstab and /etc/fuse.conf are files of the place's own, to be written by the tests.
SETUP = """
mount -t tmpfs -o mode=755 none /mnt
mount -t tmpfs -o mode=755 none /run
mount -t proc proc /proc
umount -l -a -t fuse.vmsfs # copies of what other tests have mounted
mkdir /mnt/build /mnt/upper /mnt/work /mnt/vms /mnt/home /mnt/home/vms
chown -R nobody:nogroup /mnt/home
mount --bind "$BUILD" /mnt/build
mount -t overlay none -o lowerdir=/usr/sbin,upperdir=/mnt/upper,workdir=/mnt/work /usr/sbin
ln -s /mnt/build/mount.vmsfs /usr/sbin/mount.vmsfs
ln -s mount.vmsfs /usr/sbin/mount.fuse.vmsfs
for file in fstab fuse.conf; do : >/mnt/$file; [ -e /etc/$file ] || : >/etc/$file; mount --bind /mnt/$file /etc/$file; done
mknod -m 666 /mnt/fuse c 10 229
mount --bind /mnt/fuse /dev/fuse
echo ready
exec cat
"""


@pytest.fixture
def place():
    # Reports of other users' daemons cannot go to the run directory: they are on stderr, with a status of their own.
    made = Place(SETUP, environment=sanitizer_environment(), BUILD=BUILD)
    try:
        yield made.wait(lambda: "ready" in made.said(), "the place is set up")
    finally:
        made.end()
    assert not mount_line("/mnt/vms")


def as_user(place, script, user="nobody", **variables):
    return place.run(script, user=user, ASAN_OPTIONS="", UBSAN_OPTIONS="", LSAN_OPTIONS="", **variables)


def write_fstab(place, *lines):
    place.run(f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} >/etc/fstab", check=True)


def find(place, field="TARGET"):
    return place.run(f"findmnt -n -t fuse.vmsfs -o {field} /mnt/vms || true", check=True).out.strip()


def mounted(place):
    return find(place) == "/mnt/vms"


@pytest.mark.parametrize("kind", ["vmsfs", "fuse.vmsfs"])
def test_mount_by_type_and_umount(place, kind):
    done = place.run(f"mount -t {kind} vms /mnt/vms -o {OPTIONS},backend=qemu,memory=512")
    assert done.status == 0 and not done.out and not done.err, done
    # At once: mount returns when it answers.
    assert place.run("cat /mnt/vms/.defaults/config/memory", check=True).out == "512\n"
    assert find(place, "SOURCE,FSTYPE").split() == ["vms", "fuse.vmsfs"]
    options = find(place, "OPTIONS").split(",")
    assert {"rw", "nosuid", "nodev", "default_permissions"} <= set(options)
    done = place.run("umount /mnt/vms")
    assert done.status == 0 and not mounted(place), done
    assert place.run("mount -t vmsfs vms /mnt/vms -o " + OPTIONS).status == 0  # the daemon has left the state directory


def test_options_for_others_are_taken_out_and_all_else_is_the_daemons(place):
    others = "_netdev,nofail,noauto,user,exec,x-systemd.automount,x-systemd.requires=a.service,X-mount.mkdir,comment=no,relatime"
    write_fstab(place, f"vms /mnt/new vmsfs {others},{OPTIONS},memory=384,noatime 0 0")
    done = place.run("mount -v /mnt/new")
    assert done.status == 0, done
    assert f"'/mnt/build/vmsfs' '-o' 'rw,noatime,nosuid,nodev,{OPTIONS},memory=384,exec' '--' 'vms' '/mnt/new'" in done.out
    assert place.run("cat /mnt/new/.defaults/config/memory").out == "384\n"
    options = place.run("findmnt -n -o OPTIONS /mnt/new").out.strip().split(",")
    assert {"noatime", "nosuid", "nodev"} <= set(options) and "noexec" not in options


# Of "FILESYSTEM-INDEPENDENT MOUNT OPTIONS" in mount(8), without SELinux's and `remount`: in each group none contradicts another.
INDEPENDENT = [
    "async,atime,auto,defaults,dev,diratime,exec,group,iversion,lazytime,loud,mand,nofail,relatime,rw,suid,_netdev,symfollow",
    "noatime,noauto,nodev,nodiratime,noexec,nogroup,noiversion,nolazytime,nomand,nosuid,nosymfollow,noowner,nouser,ro,silent",
    "dirsync,norelatime,nostrictatime,owner,sync,users,X-mount.mkdir=0755,X-vmsfs,x-vmsfs=1",
    "strictatime,user=joe,nousers,comment=c",
]


@pytest.mark.parametrize("names", INDEPENDENT, ids=lambda names: names.split(",")[0])
@pytest.mark.parametrize("by", ["mount", "mount.vmsfs", "fstab"])
def test_each_option_that_holds_for_every_file_system_is_taken(place, by, names):
    if by == "mount.vmsfs":  # also those that mount(8) keeps for itself
        done = place.run(f"mount.vmsfs vms /mnt/vms -o {names},{OPTIONS}")
    elif by == "mount":
        done = place.run(f"mount -t vmsfs vms /mnt/vms -o {names},{OPTIONS}")
    else:
        write_fstab(place, f"vms /mnt/vms vmsfs {names},{OPTIONS} 0 0")
        done = place.run("mount /mnt/vms")
    assert done.status == 0 and mounted(place), done
    options = find(place, "OPTIONS").split(",")
    assert ("ro" in options, "noatime" in options) == ("ro" in names.split(","), "noatime" in names.split(",")), options


def test_a_helper_alone_drops_what_mount_leaves_to_it(place):
    names = "auto,noauto,user,users,nouser,owner,noowner,group,nogroup,user=joe,uhelper=x,helper=x,defaults,nofail,_netdev"
    done = place.run(f"mount.vmsfs vms /mnt/vms -fnsv -t fuse.vmsfs -o rw,{names},x-a=1,X-b,comment=c -o ,users,memory=1G,auto_unmount")
    assert done.status == 0, done
    assert done.out == "mount.vmsfs: '/mnt/build/vmsfs' '-o' 'rw,memory=1G,auto_unmount' '--' 'vms' '/mnt/vms'\n"
    assert not mounted(place)


def test_a_value_in_quotes_may_hold_commas(place):
    quoted = shlex.quote(f'{OPTIONS},boot_args="a=1,b=2",memory=300')
    assert place.run(f"mount -t vmsfs vms /mnt/vms -o {quoted}").status == 0
    assert place.run("cat /mnt/vms/.defaults/config/boot_args /mnt/vms/.defaults/config/memory").out == "a=1,b=2\n300\n"


def test_mount_a_mounts_once_wherever_it_is_run(place):
    write_fstab(place, f"vms /mnt/vms vmsfs {OPTIONS},_netdev,nofail 0 0")
    for folder in ("/mnt", "/", "/mnt", "/mnt/home"):
        # In /mnt mount(8) takes `vms` for /mnt/vms.
        done = place.run("mount -a", cwd=folder)
        assert done.status == 0, (folder, done)
        assert find(place, "SOURCE") == "vms"
        assert "already" not in done.err, done
    assert place.run("grep -c fuse.vmsfs /proc/self/mounts").out == "1\n"
    assert place.run("umount -a -t fuse.vmsfs").status == 0
    assert not mounted(place)


def test_mount_a_brings_back_what_died(place):
    write_fstab(place, f"vms /mnt/vms vmsfs {OPTIONS} 0 0")
    place.run("mount -a", cwd="/mnt", check=True)
    place.run("pkill -KILL -x vmsfs && until ! stat /mnt/vms 2>/dev/null; do :; done", check=True)
    assert place.run("mount -a", cwd="/mnt").status == 0
    assert place.run("ls -A /mnt/vms").out == ".defaults\n.new\n"
    assert place.run("grep -c fuse.vmsfs /proc/self/mounts").out == "1\n"


@pytest.mark.parametrize("options", ["user,exec,memory=200", "noatime,boot_args=\"a=1,b=2\"", "defaults,ro,fsname=vms", "owner"])
def test_mount_a_knows_its_line_whatever_the_options(place, options):
    write_fstab(place, f"vms /mnt/vms vmsfs {OPTIONS},nofail,{options} 0 0")
    for script in ("mount -a", "mount -a", "mount /mnt/vms"):
        done = place.run(script, cwd="/mnt")
        assert done.status == 0 and "already" not in done.err, done
    assert place.run("grep -c fuse.vmsfs /proc/self/mounts").out == "1\n"


def test_a_second_mount_of_the_name_with_other_options_is_refused_wherever_it_is_asked_for(place):
    first = f"mount -t vmsfs vms /mnt/vms -o {OPTIONS}"
    others = [f"{OTHER},memory=300", f"{OPTIONS},memory=300", f"ro,{OPTIONS}", OPTIONS.partition(",")[0]]
    place.run(first, check=True)
    for line in ("", f"vms /mnt/vms vmsfs {OPTIONS} 0 0", f"lab /mnt/vms vmsfs {OPTIONS},memory=300 0 0"):
        write_fstab(place, line)
        for folder in ("/mnt", "/mnt/home"):
            for options in others:
                done = place.run(f"mount -t vmsfs vms /mnt/vms -o {options}", cwd=folder)
                assert done.status == 32 and "vms is mounted on /mnt/vms already" in done.err, (line, folder, options, done)
    # By another name it is another mount, above the first one.
    place.run(f"mount -t vmsfs lab /mnt/vms -o {OTHER},memory=300", check=True)
    assert place.run("cat /mnt/vms/.defaults/config/memory").out == "300\n"
    assert place.run("grep -c fuse.vmsfs /proc/self/mounts").out == "2\n"
    place.run("umount /mnt/vms", check=True)


def test_a_second_mount_fails_and_the_first_stays(place):
    place.run(f"mount -t vmsfs vms /mnt/vms -o {OPTIONS}", check=True)
    for name, text in (("vms", "vms is mounted on /mnt/vms already"), ("lab", "/mnt/state")):
        done = place.run(f"mount -t vmsfs {name} /mnt/vms -o {OPTIONS}")
        assert done.status == 32 and text in done.err, done
    assert mounted(place) and place.run("ls /mnt/vms").status == 0
    # The folder of its sockets, too: a machine that cannot boot says so in `error`.
    assert place.run("ls /run/vmsfs").out != ""


def test_remount_is_refused(place):
    place.run(f"mount -t vmsfs vms /mnt/vms -o {OPTIONS}", check=True)
    for words in ("-o remount,ro /mnt/vms", "-t vmsfs -o remount,ro vms /mnt/vms", "-f -t vmsfs -o remount vms /mnt/vms"):
        done = place.run("mount " + words)
        assert done.status == 32 and "/mnt/vms cannot be remounted" in done.err, done
    assert "rw" in find(place, "OPTIONS").split(",")


def test_read_only_is_read_only(place):
    place.run(f"mount -r -t vmsfs vms /mnt/vms -o {OPTIONS}", check=True)
    done = place.run("mkdir /mnt/vms/a")
    assert done.status != 0 and "Read-only file system" in done.err


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (f"-o {OPTIONS},bogus", 32, "-o bogus"),
        (f"-o {OPTIONS},memory=much", 32, "memory=much"),
        (f"-o {OPTIONS},image=none", 32, '"none"'),
        (f"-o {OPTIONS},backend=bochs", 32, "bochs"),
    ],
)
def test_errors_are_told_with_the_status_of_mount(place, words, status, text):
    done = place.run(f"mount -t vmsfs vms /mnt/vms {words}")
    assert done.status == status and text in done.err, done
    assert not mounted(place)


@pytest.mark.parametrize(
    "words",
    ["", "vms", "vms /mnt/vms -t ext4", "vms /mnt/vms more", "vms /mnt/vms -q", "vms /mnt/vms -o",
     "vms /mnt/vms -o 'boot_args=\"a,b'"],
)  # fmt: skip
def test_a_wrong_call_of_the_helper_is_told(place, words):
    done = place.run("mount.vmsfs " + words)
    assert done.status == 1 and "mount.vmsfs" in done.err, done
    assert not mounted(place)


def test_without_vmsfs_the_helper_names_where_it_was_looked_for(place):
    place.run("mkdir /mnt/alone && cp /mnt/build/mount.vmsfs /mnt/alone && ln -s /mnt/build/vmsfs /mnt/home/vmsfs", check=True)
    # PATH is no place to look.
    done = place.run("/mnt/alone/mount.vmsfs vms /mnt/vms", PATH="/mnt/home:" + place.environment["PATH"])
    assert done.status == 2 and "/mnt/alone" in done.err, done


def test_a_setuid_helper_refuses(place):
    place.run("mkdir /mnt/set && cp /mnt/build/mount.vmsfs /mnt/build/vmsfs /mnt/set && chmod u+s /mnt/set/mount.vmsfs", check=True)
    done = as_user(place, "/mnt/set/mount.vmsfs vms /mnt/home/vms")
    assert done.status == 2 and "setuid" in done.err, done


@pytest.mark.parametrize(
    "source",
    ["-oallow_other", "--", "-d", "a,allow_other,b", "a\\,b\\", "$(touch /mnt/pwned)", "a'b\"c", "a b\tc", "vms#1", "ü", "x\ny"],
)
def test_a_source_is_a_name_and_nothing_else(place, source):
    done = place.run(f"mount -t vmsfs -o {OPTIONS} -- {shlex.quote(source)} /mnt/vms")
    assert done.status == 0, done
    line = place.run("grep fuse.vmsfs /proc/self/mounts").out.split(" ")
    assert re.sub(r"\\(\d{3})", lambda m: chr(int(m.group(1), 8)), line[0]) == source
    assert "allow_other" not in line[3].split(",")
    assert place.run("ls /mnt").out.split() == ["build", "fstab", "fuse", "fuse.conf", "home", "state", "upper", "vms", "work"]


def test_the_daemon_has_home_and_path_which_mount_takes_away(place):
    place.run(f"mount -t vmsfs vms /mnt/vms -o {OPTIONS}", check=True)
    found = place.run("tr '\\0' '\\n' </proc/$(pgrep -x vmsfs)/environ", check=True).out.splitlines()
    assert "HOME=/root" in found
    assert [line for line in found if line.startswith("PATH=/usr/local/sbin:")]


def test_another_mount_namespace(place):
    script = f"""
        unshare --mount sh -c 'echo $$ >/mnt/home/pid; exec sleep 60' >/dev/null 2>&1 &
        until [ -s /mnt/home/pid ]; do :; done
        pid=$(cat /mnt/home/pid)
        until [ "$(cat /proc/$pid/comm)" = sleep ]; do :; done
        mount -N $pid -t vmsfs vms /mnt/vms -o {OPTIONS} || exit 7
        grep fuse.vmsfs /proc/self/mounts && exit 8
        grep 'vms /mnt/vms fuse.vmsfs' /proc/$pid/mounts || exit 9
        nsenter -t $pid -m umount /mnt/vms || exit 10
        kill $pid
    """
    done = place.run(script)
    assert done.status == 0 and "vms" in done.out, done


HOLDER = """
    unshare --mount sh -c 'echo $$ >/mnt/home/pid; %s exec sleep 1000' >/dev/null 2>&1 &
    until [ -s /mnt/home/pid ] && [ "$(cat /proc/$(cat /mnt/home/pid)/comm)" = sleep ]; do :; done
"""


def hold_copies(place, first=""):
    """A process with a mount namespace of its own, which has a copy of each mount. Returns its number."""
    place.run(HOLDER % first, check=True)
    return place.run("cat /mnt/home/pid").out.strip()


def daemons(place):
    return place.run("pgrep -x -r D,R,S vmsfs").out.split()  # nobody waits for those that have ended


@pytest.mark.parametrize("then", ["true", "mount -t tmpfs other /mnt/vms", f"mount -t vmsfs other /mnt/vms -o {OPTIONS}"])
def test_an_unmount_ends_the_daemon_whoever_has_copies_of_the_mount(place, then):
    """As of a container: with a namespace of its own, which hears nothing of an unmount here. What is mounted next in
    that place is left alone."""
    place.run(f"mount -t vmsfs vms /mnt/vms -o {OPTIONS}", check=True)
    (first,) = daemons(place)
    pid = hold_copies(place)
    assert "/mnt/vms fuse.vmsfs" in place.run(f"cat /proc/{pid}/mounts").out
    place.run(f"umount /mnt/vms && {then}", check=True)
    wait_for(lambda: first not in daemons(place), "the daemon has ended")
    assert "not connected" in place.run(f"nsenter -t {pid} -m ls /mnt/vms").err
    assert place.run("findmnt -n -o SOURCE /mnt/vms").out.strip() == ("" if then == "true" else "other")
    assert place.run("ls -A /mnt/vms").out == (".defaults\n.new\n" if "vmsfs" in then else "")


def test_what_is_open_where_a_copy_is_goes_on_until_it_is_closed(place):
    place.run(f"mount -t vmsfs vms /mnt/vms -o {OPTIONS},memory=384", check=True)
    first = daemons(place)
    pid = hold_copies(place, "exec 3</mnt/vms/.defaults/config/memory;")
    place.run("umount /mnt/vms", check=True)
    other = place.run(f"mount -t vmsfs vms /mnt/vms -o {OPTIONS}")
    assert other.status == 32 and first[0] in other.err, "the state directory is in use"
    assert place.run(f"cat </proc/{pid}/fd/3").out == "384\n"
    place.run(f"kill {pid}")
    wait_for(lambda: not daemons(place), "the daemon has ended")


def test_a_mount_that_is_moved_or_has_a_second_place_is_still_there(place):
    place.run(f"mount -t vmsfs vms /mnt/vms -o {OPTIONS} && mkdir /mnt/moved /mnt/second", check=True)
    first = daemons(place)
    hold_copies(place)
    place.run("mount --move /mnt/vms /mnt/moved && mount --bind /mnt/moved /mnt/second && umount /mnt/moved", check=True)
    # It has looked when it has missed a mount: there is one that it would.
    place.run("for i in 1 2 3 4 5 6 7 8; do mount -t tmpfs none /mnt/moved; sleep 0.1; umount /mnt/moved; sleep 0.1; done")
    assert daemons(place) == first and place.run("ls -A /mnt/second").out == ".defaults\n.new\n"
    place.run("umount /mnt/second", check=True)
    wait_for(lambda: not daemons(place), "the daemon has ended")


# ---- users ----


def test_a_user_mounts_what_fstab_lets_him(place):
    write_fstab(place, f"vms /mnt/home/vms vmsfs user,noauto,{USER_OPTIONS},memory=200 0 0")
    done = as_user(place, "mount /mnt/home/vms && cat /mnt/home/vms/.defaults/config/memory")
    assert done.status == 0 and done.out == "200\n", done
    options = place.run("findmnt -n -o OPTIONS /mnt/home/vms").out.strip().split(",")
    assert "user_id=65534" in options
    assert {"nosuid", "nodev", "noexec"} <= set(options)  # what `user` stands for, fstab(5)
    assert place.run("ls /mnt/home/vms").status != 0  # it is nobody else's, root included
    assert as_user(place, "umount /mnt/home/vms", user="daemon").status != 0
    assert as_user(place, "umount /mnt/home/vms").status == 0
    assert not place.run("findmnt -n -t fuse.vmsfs").out


def test_a_user_may_run_commands_with_exec(place):
    write_fstab(place, f"vms /mnt/home/vms vmsfs user,exec,noauto,{USER_OPTIONS} 0 0")
    assert as_user(place, "mount /mnt/home/vms").status == 0
    assert "noexec" not in place.run("findmnt -n -o OPTIONS /mnt/home/vms").out
    assert as_user(place, "umount /mnt/home/vms").status == 0


def test_a_user_mounts_what_fstab_does_not_name(place):
    # mount(8) gives up its rights for that, and fusermount3 has what it takes.
    done = as_user(place, f"mount -t vmsfs vms /mnt/home/vms -o {USER_OPTIONS} && ls -A /mnt/home/vms")
    assert done.status == 0 and done.out == ".defaults\n.new\n", done
    options = place.run("findmnt -n -o OPTIONS /mnt/home/vms").out.strip().split(",")
    assert {"nosuid", "nodev", "user_id=65534"} <= set(options)
    assert as_user(place, "umount /mnt/home/vms").status == 0
    done = as_user(place, f"mount -t vmsfs vms /mnt/vms -o {USER_OPTIONS}")  # not his
    assert done.status == 32 and "/mnt/vms" in done.err, done
    assert not place.run("findmnt -n -t fuse.vmsfs").out


def test_a_user_mounts_with_fusermount3_without_root_and_fstab(place):
    done = as_user(place, f"/mnt/build/vmsfs /mnt/home/vms -o {USER_OPTIONS} && ls -A /mnt/home/vms")
    assert done.status == 0 and done.out == ".defaults\n.new\n", done
    assert as_user(place, "umount /mnt/home/vms").status == 0
    assert as_user(place, f"/mnt/build/vmsfs /mnt/home/vms -o {USER_OPTIONS} && fusermount3 -u /mnt/home/vms").status == 0
    assert not place.run("findmnt -n -t fuse.vmsfs").out


def test_allow_other_is_for_fuse_conf_to_allow(place):
    write_fstab(place, f"vms /mnt/home/vms vmsfs user,noauto,{USER_OPTIONS},allow_other 0 0")
    for script in ("mount /mnt/home/vms", f"/mnt/build/vmsfs /mnt/home/vms -o {USER_OPTIONS},allow_other"):
        done = as_user(place, script)
        assert done.status == (32 if script.startswith("mount") else 1), done
        assert "allow_other" in done.err and "user_allow_other" in done.err and "/etc/fuse.conf" in done.err
        assert not place.run("findmnt -n -t fuse.vmsfs").out
    place.run("echo user_allow_other >/etc/fuse.conf", check=True)
    assert as_user(place, "mount /mnt/home/vms").status == 0
    assert place.run("ls /mnt/home/vms").status == 0
    assert as_user(place, "umount /mnt/home/vms").status == 0


# ---- systemd ----


@pytest.fixture
def units(tmp_path):
    """The units as they are installed, but with the daemon where it was built."""
    text = (tmp_path / "build.service").parent
    with open(os.path.join(BUILD, "vmsfs@.service"), encoding="utf-8") as f:
        service = re.sub(r"^ExecStart=\S+/vmsfs", f"ExecStart={BUILD}/vmsfs", f.read(), flags=re.M)
    (text / "vmsfs@.service").write_text(service)
    for name in ("vms.mount", "vms.automount"):
        with open(os.path.join(ROOT, "contrib", "systemd", "examples", name), encoding="utf-8") as f:
            (text / name).write_text(f.read())
    return text


def systemd_analyze(*argv):
    return subprocess.run(["systemd-analyze", *argv], capture_output=True, timeout=60, text=True)


def test_systemd_finds_nothing_amiss_in_the_units(units):
    names = [str(units / name) for name in ("vmsfs@srv-vms.service", "vms.mount", "vms.automount")]
    (units / "vmsfs@srv-vms.service").symlink_to("vmsfs@.service")
    done = systemd_analyze("verify", "--man=no", *names)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done


def test_systemd_finds_nothing_amiss_in_the_drop_in(units):
    (units / "vmsfs@srv-vms.service").symlink_to("vmsfs@.service")
    folder = units / "vmsfs@.service.d"
    folder.mkdir()
    text = read(os.path.join(ROOT, "contrib", "systemd", "examples", "jail-and-tap.conf"))
    for more, sound in (("", True), ("DeviceAllowed=/dev/kvm\n", False)):  # the second time to see that it is looked at
        (folder / "jail-and-tap.conf").write_text(text + more)
        done = systemd_analyze("verify", "--man=no", str(units / "vmsfs@srv-vms.service"))
        assert (done.returncode == 0 and not done.stdout and not done.stderr) == sound, done


def test_systemd_rates_the_service_as_ok(units):
    # "OK" is below 5.0. What is missing would hide the mount, see the unit.
    done = systemd_analyze("security", "--offline=yes", "--threshold=46", str(units / "vmsfs@.service"))
    assert done.returncode == 0 and " OK " in done.stdout.splitlines()[-1], done.stdout


def test_systemd_makes_units_of_a_line_of_fstab(tmp_path):
    fstab = tmp_path / "fstab"
    fstab.write_text(f"vms /srv/vms vmsfs noauto,nofail,_netdev,x-systemd.automount,x-systemd.idle-timeout=60,{OPTIONS} 0 0\n")
    folders = [tmp_path / name for name in ("normal", "early", "late")]
    for folder in folders:
        folder.mkdir()
    generator = "/lib/systemd/system-generators/systemd-fstab-generator"
    subprocess.run([generator, *folders], env={"SYSTEMD_FSTAB": str(fstab)}, check=True, timeout=30)
    mount, automount = (folders[0] / "srv-vms.mount").read_text(), (folders[0] / "srv-vms.automount").read_text()
    assert "What=vms\nWhere=/srv/vms\nType=vmsfs\n" in mount and OPTIONS in mount
    assert "Where=/srv/vms\nTimeoutIdleSec=1min" in automount
