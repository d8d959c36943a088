"""The Debian package: what is in it, and a bare Debian 12 with systemd where it is installed, used and purged."""

import os
import re
import shlex
import stat
import subprocess

import pytest

from harness import BUILD, ROOT, RUN, make_jail, read, takes_at_most, wait_for
from private import Place

# ---- the package ----


@pytest.fixture(scope="module")
def package():
    """Returns its path."""
    build = os.path.join(RUN.path, "deb")
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    argv = [f"{ROOT}/contrib/deb", build]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200, umask=0o077)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    found = [name for name in os.listdir(build) if name.endswith(".deb")]
    assert len(found) == 1, found
    os.chmod(build, 0o755)
    return os.path.join(build, found[0])


def dpkg_deb(*argv):
    done = subprocess.run(["dpkg-deb", *argv], capture_output=True, timeout=60, check=True, text=True)
    return done.stdout


def names_of(field):
    return {re.split(r"[ (]", one.strip())[0] for one in field.split(",")}


@pytest.mark.deadline(240)
def test_the_package_says_what_it_needs(package):
    fields = dict(re.findall(r"^(\S+): (.*)$", dpkg_deb("-f", package), flags=re.M))
    assert fields["Package"] == "vmsfs" and fields["Architecture"] == "amd64"
    assert fields["Section"] == "admin" and fields["Priority"] == "optional"
    assert {"libc6", "libcurl4", "libfuse3-3", "libjansson4", "libssh2-1", "libuv1", "zlib1g", "fuse3", "openssh-client"} == names_of(fields["Depends"])
    assert "qemu-system-x86" in names_of(fields["Recommends"])
    version = subprocess.run([f"{BUILD}/vmsfs", "--version"], capture_output=True, check=True, text=True).stdout.split()[1]
    assert fields["Version"] == version
    changelog = ["dpkg-parsechangelog", "-l", f"{ROOT}/contrib/packaging/debian/changelog", "-S", "Version"]
    assert subprocess.run(changelog, capture_output=True, check=True, text=True).stdout.strip() == version


def test_the_package_holds_it_all_with_the_right_modes(package):
    listed = {}
    for line in dpkg_deb("-c", package).splitlines():
        mode, owner, _, _, _, path = line.split(None, 5)
        listed[path.split(" -> ")[0]] = mode
        assert owner == "root/root", line
        assert mode.startswith(("drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--", "lrwxrwxrwx")), line
    for path in ("usr/bin/vmsfs", "usr/bin/vmsfs-guest-tiny", "usr/sbin/mount.vmsfs"):
        assert listed["./" + path] == "-rwxr-xr-x", path
    for path in ("usr/sbin/mount.fuse.vmsfs", "usr/share/bash-completion/completions/run"):
        assert listed["./" + path][0] == "l", path
    wanted = [f"usr/share/vmsfs/presets/{name}/forward" for name in os.listdir(f"{ROOT}/contrib/presets")]
    wanted += ["usr/lib/systemd/system/vmsfs@.service"]
    wanted += [f"usr/share/doc/vmsfs/{name}" for name in ("copyright", "changelog.gz", "README.md", "examples/vms.automount")]
    wanted += ["usr/share/bash-completion/completions/vmsfs", "usr/share/zsh/vendor-completions/_vmsfs"]
    for name in os.listdir(f"{ROOT}/contrib/man"):
        wanted.append(f"usr/share/man/man{name[-5]}/{name[:-4]}.gz")
    assert not [path for path in wanted if listed.get("./" + path) != "-rw-r--r--"]


def test_lintian_finds_no_errors_and_has_no_warnings(package):
    done = subprocess.run(["lintian", "--fail-on", "error,warning", package], capture_output=True, timeout=100, text=True)
    assert done.returncode == 0 and not re.search(r"^[EW]:", done.stdout, flags=re.M), done


def test_what_the_installed_documents_name_is_there(package, tmp_path):
    """As they stand in the sources they name files of the sources."""
    dpkg_deb("-x", package, str(tmp_path))
    documents = sorted((tmp_path / "usr/share/doc/vmsfs").rglob("*.md"))
    assert len(documents) == 5
    for document in documents:
        text = document.read_text(encoding="utf-8")
        assert not re.findall(r"(?:contrib|tests|src|build|build-deb)/\S*|in the sources|<!--", text), document
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in link:
                at = tmp_path / link[1:] if link[0] == "/" else document.parent / link
                assert at.exists(), (document, link)
        for path in re.findall(r"/usr/(?:share/(?:doc/)?|s?bin/)[\w.-]*vmsfs\b[\w./-]*", text):
            # Where images may be put.
            assert path.endswith("/images") or (tmp_path / path[1:].rstrip(".")).exists(), (document, path)
    examples = tmp_path / "usr/share/doc/vmsfs/examples"
    for name in ("ansible/site.yml", "ansible/roles/vmsfs_vm/tasks/main.yml", "puppet/vmsfs/manifests/vm.pp", "salt/vmsfs/init.sls"):
        assert (examples / name).is_file(), name
    assert os.access(examples / "ansible/vmsfs_inventory.py", os.X_OK)
    manual = subprocess.run(["man", "-l", tmp_path / "usr/share/man/man8/vmsfs.8.gz"], capture_output=True, text=True, check=True).stdout
    assert "/usr/share/doc/vmsfs/examples/" in manual and "jail-and-tap.conf" in manual


def test_install_with_destdir_and_another_prefix(tmp_path):
    environment = {"PATH": os.environ["PATH"], "DESTDIR": str(tmp_path)}
    subprocess.run(["cmake", "--install", BUILD], env=environment, check=True, timeout=60, capture_output=True)
    local = tmp_path / "usr" / "local"
    assert stat.S_IMODE((local / "bin" / "vmsfs").stat().st_mode) == 0o755
    assert os.readlink(local / "sbin" / "mount.fuse.vmsfs") == "mount.vmsfs"
    # It finds the daemon that was installed with it, wherever that is.
    argv = [local / "sbin" / "mount.vmsfs", "vms", "/vms", "-f", "-v"]
    said = subprocess.run(argv, check=True, timeout=30, capture_output=True, text=True).stdout
    assert f"'{local}/bin/vmsfs'" in said
    assert "ExecStart=/usr/local/bin/vmsfs " in read(local / "lib" / "systemd" / "system" / "vmsfs@.service")


# ---- a machine where it is installed ----

# /proc/sys and /sys are the host's, and not for its systemd to write to. The cgroup is all of the tree that it sees.
SETUP = """
mkdir "$RUN/cgroups"
mount -t cgroup2 none "$RUN/cgroups"
mkdir "$RUN/cgroups/$NAME"
echo 0 >"$RUN/cgroups/$NAME/cgroup.procs"
exec unshare --cgroup sh -ec '
    umount "$RUN/cgroups"
    mount --bind "$ROOT" "$ROOT"
    cd "$ROOT"
    mount -t proc proc proc
    mount --bind proc/sys proc/sys
    mount -o remount,bind,ro proc/sys
    mount -t sysfs -o ro sys sys
    mount -t cgroup2 none sys/fs/cgroup
    mount -t tmpfs -o mode=755 run run
    mount -t tmpfs -o mode=755 dev dev
    mkdir dev/pts dev/shm dev/net
    mount -t devpts -o newinstance,ptmxmode=666 pts dev/pts
    mount -t tmpfs shm dev/shm
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    node() { mknod -m 666 "dev/$1" c "$2" "$3"; }
    node null 1 3; node zero 1 5; node full 1 7; node random 1 8; node urandom 1 9; node tty 5 0
    node fuse 10 229; node kvm 10 232; node autofs 10 235; node net/tun 10 200
    exec chroot . env -i container=lxc PATH="$PATH" /lib/systemd/systemd --system --log-target=console </dev/null
'
"""

# What was in the cgroup has ended with the first process.
CLEAR_CGROUP = """
mount -t cgroup2 none "$0"
[ ! -d "$0/$1" ] || find "$0/$1" -depth -type d -exec rmdir {} +
"""


def mirror():
    """Where this host has its Debian from."""
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", "Codename: bookworm", "Component: main"]
    found = subprocess.run(argv, capture_output=True, check=True, timeout=60, text=True).stdout.split()
    assert found, "apt's sources name no Debian 12"
    return found[0]


class Machine(Place):
    def __init__(self, package):
        name = f"vmsfs-test-{os.getpid()}-{RUN.number()}"
        self.name = name
        self.root = os.path.join(RUN.path, name)
        argv = ["debootstrap", "--variant=minbase", "--include=systemd-sysv,dbus", "bookworm", self.root, mirror()]
        done = subprocess.run(argv, capture_output=True, timeout=180, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        with open(f"{self.root}/etc/dpkg/dpkg.cfg.d/fast", "w", encoding="ascii") as f:
            f.write("force-unsafe-io\n")
        # As apt is configured here, proxies and all.
        acquire = subprocess.run(
            ["apt-config", "dump", "--format", '%F "%v";%n', "Acquire"], capture_output=True, check=True, timeout=30
        )
        with open(f"{self.root}/etc/apt/apt.conf.d/00host", "wb") as f:
            f.write(acquire.stdout)
        subprocess.run(["cp", package, f"{self.root}/root"], check=True)
        super().__init__(
            SETUP,
            ("--uts", "--ipc"),
            {"DEBIAN_FRONTEND": "noninteractive"},
            ("--uts", "--ipc", "--cgroup", "--root", "--wd"),
            ROOT=self.root,
            NAME=name,
        )

    def end(self):
        super().end()
        subprocess.run(["unshare", "--mount", "sh", "-ec", CLEAR_CGROUP, self.path, self.name], check=True, timeout=30)

    def sh(self, script, seconds=60, **kwargs):
        return self.run(script, check=True, seconds=seconds, **kwargs).out


@pytest.fixture(scope="module")
def machine(package):
    """A bare Debian 12 that has started."""
    one = Machine(package)
    try:
        one.wait(lambda: one.run("systemctl is-system-running").out.strip() in ("running", "degraded"), "systemd runs", 60)
        yield one
    finally:
        one.end()


@pytest.fixture(scope="module")
def installed(machine):
    """With the package, and with an image."""
    machine.sh("apt-get -q update; cp /root/vmsfs_*.deb /root/again.deb", 120)
    machine.sh("apt-get -qy install --no-install-recommends /root/again.deb qemu-system-x86; mkdir /vms", 200)
    machine.sh("vmsfs-guest-tiny", 100)
    return machine


# Tests end as they may: another does not depend on how, or a second try of one alone would tell nothing.
NOT_MOUNTED = """
    [ "$(dpkg-query -W -f '${db:Status-Status}' vmsfs)" = installed ] || apt-get -qy install --no-install-recommends /root/again.deb
    systemctl stop 'vmsfs@*' vms.automount vms.mount
    sed -i /vmsfs/d /etc/fstab
    systemctl daemon-reload
    ! mountpoint -q /vms || umount /vms
"""


@pytest.fixture
def nothing_mounted(installed):
    installed.sh(NOT_MOUNTED, 100)
    return installed


@pytest.fixture
def with_demo(nothing_mounted):
    """A machine runs while nothing is mounted."""
    make = "mkdir /vms/demo; echo 'hello from the host' >/vms/demo/env/GREETING"
    nothing_mounted.sh("vmsfs /vms -o memory=160M")
    nothing_mounted.sh(f"[ -e /vms/demo ] || {{ {make}; }}; echo running >/vms/demo/status; umount /vms", 100)
    return nothing_mounted


def started(machine):
    """Machines of vmsfs that run there, by name; one that makes a template, in the background, is none yet."""
    return [name for name in qemus(machine) if name != "template"]


def qemus(machine):
    text = machine.run("cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'").out
    return sorted(re.findall(r"^guest=([^,]+),process=", text, flags=re.M))


def processes(machine, name):
    """Their numbers. There is no pgrep."""
    text = machine.sh("for file in /proc/[0-9]*/comm; do echo $file; cat $file; done 2>/dev/null || true")
    return re.findall(rf"^/proc/(\d+)/comm\n{name}$", text, flags=re.M)


def words(machine, pid):
    return machine.run(f"tr '\\0' ' ' </proc/{pid}/cmdline").out.split()


@pytest.mark.deadline(240)
def test_a_bare_debian_has_nothing_of_it(machine):
    assert machine.sh("find / -xdev -name '*vmsfs*' ! -path '/root/*'") == ""
    machine.sh("apt-get -q update", 120)
    simulated = machine.sh("apt-get -s install /root/vmsfs_*.deb")
    assert "Inst qemu-system-x86 " in simulated  # as it is recommended


@pytest.mark.deadline(240)
def test_it_installs_on_a_bare_debian(installed):
    machine = installed
    assert machine.sh("vmsfs --version").startswith("vmsfs ")
    assert machine.sh("vmsfs-guest-tiny", 100).splitlines()[-1] == "/var/lib/vmsfs/images/tiny"


@pytest.mark.deadline(240)
def test_a_line_of_fstab_mounts_it_and_a_machine_boots(nothing_mounted):
    machine = nothing_mounted
    machine.sh("echo 'vms /vms vmsfs nofail,_netdev,memory=160M 0 0' >>/etc/fstab; mount -a; mount -a")
    assert machine.sh("findmnt -n -t fuse.vmsfs -o TARGET,SOURCE").split() == ["/vms", "vms"]
    machine.sh("cp -r /usr/share/vmsfs/presets/codex /vms/.new/demo")
    machine.sh("mv /vms/.new/demo /vms/demo", OPENAI_API_KEY="sk-1")
    machine.sh("echo 'hello from the host' >/vms/demo/env/GREETING")
    machine.sh("echo running >/vms/demo/status", 100)
    assert machine.sh("/vms/demo/run sh -c 'echo $OPENAI_API_KEY $GREETING'") == "sk-1 hello from the host\n"
    assert machine.sh("echo 'env -i sh -l -c \"echo \\$GREETING\"' >/vms/demo/exec; cat /vms/demo/exec") == "hello from the host\n"
    assert machine.sh("ssh -F /vms/demo/ssh_config demo hostname") == "demo\n"


@pytest.mark.deadline(240)
def test_a_user_without_root_mounts_boots_and_unmounts(nothing_mounted):
    machine = nothing_mounted
    machine.sh("useradd -m joe")
    script = """
        mkdir ~/vms && vmsfs ~/vms && mkdir ~/vms/mine && echo running >~/vms/mine/status && ~/vms/mine/run uname -s
        rmdir ~/vms/mine && fusermount3 -u ~/vms
    """
    done = machine.run(script, user="joe", seconds=110)
    assert done.status == 0 and done.out == "Linux\n", done
    done = machine.run("vmsfs ~/vms -o allow_other", user="joe")
    assert done.status != 0 and "user_allow_other" in done.err and "/etc/fuse.conf" in done.err, done
    machine.sh("echo user_allow_other >>/etc/fuse.conf")
    done = machine.run("vmsfs ~/vms -o allow_other && fusermount3 -u ~/vms", user="joe")
    assert done.status == 0, done
    machine.sh("userdel -r joe 2>/dev/null")


@pytest.mark.deadline(240)
def test_under_systemd_machines_outlive_the_service(with_demo):
    machine = with_demo
    assert started(machine) == ["demo"]
    machine.sh("mkdir -p /etc/vmsfs; echo OPTIONS=memory=170M >/etc/vmsfs/vms.conf; systemctl start vmsfs@vms.service")
    # Seen outside of the service, and it answers.
    assert machine.sh("cat /vms/demo/status /vms/.defaults/config/memory") == "running\n170\n"
    # QEMU starts under its restrictions, forwarding reads the caller's environment.
    machine.sh("echo WORD >/vms/.defaults/forward")
    machine.sh("mkdir /vms/two", WORD="forwarded")
    machine.sh("echo running >/vms/two/status", 100)
    assert machine.sh("/vms/two/run sh -c 'echo $WORD'") == "forwarded\n"
    machine.sh("systemctl stop vmsfs@vms.service")
    assert not machine.run("findmnt -n -t fuse.vmsfs").out
    assert started(machine) == ["demo", "two"]
    machine.sh("systemctl start vmsfs@vms.service")
    assert machine.sh("cat /vms/*/status") == "running\nrunning\n"
    # A daemon that is killed is started again, over its dead mount.
    machine.sh("systemctl kill --signal=KILL --kill-who=main vmsfs@vms.service")
    wait_for(lambda: machine.run("cat /vms/*/status").out == "running\nrunning\n", "the service is back", 30)
    assert machine.sh("systemctl is-active vmsfs@vms.service") == "active\n"
    machine.sh("rmdir /vms/two; systemctl stop vmsfs@vms.service")


@pytest.mark.deadline(240)
def test_the_drop_in_allows_the_service_what_a_jailer_does(nothing_mounted):
    """All that it takes, and no more: without any line of it that is for the jailer it does not come up."""
    machine = nothing_mounted
    _, argv = make_jail(f"{machine.root}/srv/jailed", "/srv/jailed")
    machine.sh(f"""
        cp -r /srv/jailed /srv/whole
        mkdir -p /etc/systemd/system/vmsfs@.service.d /etc/systemd/system/vmsfs@jail.service.d
        printf '[Service]\\nType=exec\\nRestart=no\\nExecStart=\\nExecStart={" ".join(argv)}\\n' >/etc/systemd/system/vmsfs@jail.service.d/test.conf
    """)
    example = machine.sh("cat /usr/share/doc/vmsfs/examples/jail-and-tap.conf")

    def active():
        return machine.run("systemctl is-active vmsfs@jail").out == "active\n"

    def main():
        return machine.sh("systemctl show -P MainPID vmsfs@jail").strip()

    def comes_up(text):
        with open(f"{machine.root}/etc/systemd/system/vmsfs@.service.d/jail-and-tap.conf", "w", encoding="utf-8") as f:
            f.write(text)
        machine.sh("systemctl stop vmsfs@jail; rm -r /srv/jailed; cp -r /srv/whole /srv/jailed; systemctl daemon-reload")
        machine.run("systemctl start vmsfs@jail")
        wait_for(lambda: not active() or "--id" in words(machine, main()), "it has failed, or is in its jail")
        return active()

    assert comes_up(example), machine.sh("journalctl -u vmsfs@jail --no-pager | tail; systemctl status vmsfs@jail || true")
    assert machine.sh(f"stat -c %u /proc/{main()}") == "65534\n"
    for part in ("CAP_CHOWN", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID", "RestrictNamespaces=mnt", "DeviceAllow=/dev/kvm rwm", "DeviceAllow=/dev/net/tun rwm"):
        assert example.count(part) == 1, part
        assert not comes_up(example.replace(part, "")), part
    machine.sh("systemctl reset-failed; rm -r /etc/systemd/system/vmsfs@*.service.d /srv/jailed /srv/whole; systemctl daemon-reload")


@pytest.mark.deadline(240)
def test_automount_mounts_when_somebody_looks(with_demo):
    machine = with_demo
    machine.sh("echo 'vms /vms vmsfs x-systemd.automount 0 0' >>/etc/fstab; systemctl daemon-reload; systemctl start vms.automount")
    assert not machine.run("findmnt -n -t fuse.vmsfs /vms").out
    assert machine.sh("cat /vms/demo/status") == "running\n"
    machine.sh("systemctl stop vms.mount")
    for folder in ("/", "/root"):
        assert machine.run("mount -a", cwd=folder).status == 0
        assert machine.sh("grep -c fuse.vmsfs /proc/self/mounts") == "1\n"
    machine.sh("systemctl stop vms.automount vms.mount")
    assert started(machine) == ["demo"]
    machine.sh("sed -i /vmsfs/d /etc/fstab; cp /usr/share/doc/vmsfs/examples/vms.* /etc/systemd/system; systemctl daemon-reload")
    machine.sh("systemctl start vms.automount")
    assert machine.sh("cat /vms/demo/status /vms/.defaults/config/memory") == "running\n512\n"
    machine.sh("systemctl stop vms.automount vms.mount; rm /etc/systemd/system/vms.*; systemctl daemon-reload")
    assert started(machine) == ["demo"]


@pytest.mark.deadline(240)
def test_removing_shuts_machines_down_and_keeps_what_they_are(with_demo):
    machine = with_demo
    machine.sh("systemctl start vmsfs@vms.service")
    machine.sh("apt-get -qy install --reinstall /root/again.deb")  # an upgrade changes nothing
    assert started(machine) == ["demo"] and machine.sh("cat /vms/demo/status") == "running\n"
    machine.sh("apt-get -qy remove vmsfs", 100)
    assert started(machine) == [] and not machine.run("findmnt -n -t fuse.vmsfs").out
    assert machine.run("systemctl is-active vmsfs@vms.service").out == "inactive\n"
    assert "Power down" in machine.sh("cat /var/lib/vmsfs/vms/demo/serial.log")  # as by its power button
    machine.sh("apt-get -qy install --no-install-recommends /root/again.deb; systemctl start vmsfs@vms.service")
    assert machine.sh("cat /vms/demo/status /vms/demo/env/GREETING") == "stopped\nhello from the host\n"


@pytest.mark.deadline(240)
def test_mounts_that_hang_hold_up_no_removal(nothing_mounted):
    machine = nothing_mounted
    machine.sh("mkdir -p /etc/vmsfs /srv/one '/srv/two parts' && vmsfs '/srv/two parts' -o state=/srv/two-state")
    machine.sh("echo OPTIONS=state=/srv/one-state >/etc/vmsfs/srv-one.conf; systemctl start vmsfs@srv-one")
    pids = processes(machine, "vmsfs")
    assert len(pids) == 2
    machine.sh(f"kill -STOP {' '.join(pids)}")
    with takes_at_most(100, "removing"):
        done = machine.run("apt-get -qy remove vmsfs </dev/null", seconds=110)
    assert done.status == 0 and done.out.count("does not answer: its daemon is ended") == 2, done
    assert not machine.run("findmnt -n -t fuse.vmsfs").out and not processes(machine, "vmsfs")
    machine.sh("rm -r /srv/*")


def left_of_it(machine):
    assert processes(machine, ".*vmsfs.*") == [] and qemus(machine) == []
    assert not machine.run("findmnt -n -t fuse.vmsfs").out
    return machine.sh("find / -xdev -name '*vmsfs*' ! -path '/root/*'; find /run -name '*vmsfs*'").splitlines()


# What only looks like it is not touched.
STAND_INS = """
    qemu-system-x86_64 -S -nodefaults -display none -pidfile /var/lib/vmsfs/templates/new/pid </dev/null >/dev/null 2>&1 &
    qemu-system-x86_64 -S -nodefaults -display none -pidfile /srv/var/lib/vmsfs/vms/pid </dev/null >/dev/null 2>&1 &
    tail -f /var/lib/vmsfs/images/tiny/image.json >/dev/null 2>&1 &
"""


@pytest.mark.deadline(240)
def test_purging_leaves_nothing(with_demo):
    machine = with_demo
    # A machine that runs while nothing is mounted, one of another mount and state directory, a daemon that did not live to unmount,
    # and files of the administrator's.
    machine.sh("echo OPTIONS=rw >/etc/default/vmsfs; mkdir '/srv/my vms' /srv/dead; vmsfs '/srv/my vms' -o state=/srv/mine; mkdir '/srv/my vms/other'")
    machine.sh("echo running >'/srv/my vms/other/status'", 100)
    machine.sh("vmsfs /srv/dead -o state=/srv/killed; kill -9 $(cat /srv/killed/lock)")
    # What `systemctl` makes.
    machine.sh("systemctl enable vmsfs@vms.service vmsfs@srv-x.service; systemctl mask vmsfs@no.service; systemctl mask --runtime vmsfs@nor.service")
    machine.sh("mkdir /etc/systemd/system/vmsfs@.service.d; cp /usr/share/doc/vmsfs/examples/*.conf /etc/systemd/system/vmsfs@.service.d")
    assert started(machine) == ["demo", "other"]
    machine.sh("apt-get -qy purge vmsfs", 100)
    assert left_of_it(machine) == []
    assert machine.run("dpkg-query -W vmsfs").status != 0


@pytest.mark.deadline(240)
def test_purging_ends_what_came_after_the_removal(nothing_mounted):
    """Machines without a record, in a jail, or made for a template; a state directory that is a mount point, with another inside."""
    machine = nothing_mounted
    machine.sh("dpkg --purge vmsfs; rm -rf /srv/*; mkdir -p /srv/state /var/lib/vmsfs && mount --bind /srv/state /var/lib/vmsfs")
    machine.sh("apt-get -qy install --no-install-recommends /root/again.deb; vmsfs-guest-tiny; vmsfs /vms; mkdir /vms/a", 100)
    machine.sh("echo running >/vms/a/status", 100)
    machine.sh("cd /vms && apt-get -qy remove vmsfs", 100)
    _, argv = make_jail(f"{machine.root}/srv/state/vms/jailed", "/var/lib/vmsfs/vms/jailed")
    machine.sh("mkdir -p /var/lib/vmsfs/templates/new /var/lib/vmsfs/inside /srv/var/lib/vmsfs/vms /srv/kept && touch /srv/kept/file")
    machine.sh(f"mount -t tmpfs none /var/lib/vmsfs/inside; touch /var/lib/vmsfs/inside/file; {' '.join(argv)} >/dev/null 2>&1 & {STAND_INS}")
    wait_for(lambda: machine.run("ls /var/lib/vmsfs/templates/new/pid /srv/var/lib/vmsfs/vms/pid").status == 0, "both run")
    wait_for(lambda: [pid for pid in processes(machine, "firecracker") if "--id" in words(machine, pid)], "it is in its jail")
    done = machine.run("dpkg --purge vmsfs", seconds=100)
    assert done.status == 0, done
    assert machine.run("ls -AR /var/lib/vmsfs").out == "/var/lib/vmsfs:\ninside\n\n/var/lib/vmsfs/inside:\nfile\n"
    assert [len(processes(machine, name)) for name in ("firecracker", "qemu-system-x86", "tail")] == [0, 1, 1]
    machine.sh(f"kill {processes(machine, 'tail')[0]} $(cat /srv/var/lib/vmsfs/vms/pid); umount -l /var/lib/vmsfs/inside /var/lib/vmsfs; rm -r /srv/*; rmdir /var/lib/vmsfs")
    assert left_of_it(machine) == []
