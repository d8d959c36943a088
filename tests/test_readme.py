"""README.md is run as it stands, by a root who has nothing but what it says: every block of commands, in their order, at /vms, in a
private place with a file system of its own below /, /root and /var/lib. What it shows of their output is what they print.

In a block of sh an output follows `# →`, behind its command or in lines below; in one with prompts it stands below them. `…` is
for what is left out, and versions are whatever they are. An output that is not shown may be anything; an error that is not shown is
none.
"""

import contextlib
import os
import re
import shlex
import subprocess

import pytest

from harness import BUILD, IMAGES, ROOT, environment, read, sanitizer_environment, wait_for
from private import Place

TEXT = read(os.path.join(ROOT, "README.md"))

SETUP = """
root=$RUN/root
mkdir $root
mount -t tmpfs -o mode=755 none $root
for path in /*; do
    if [ -L $path ]; then cp -a $path $root/
    elif [ -d $path ]; then mkdir $root$path; mount --rbind $path $root$path
    fi
done
mkdir $root/vms
mount -t tmpfs -o mode=700 none $root/root
mount -t tmpfs -o mode=755 none $root/run
mount -t proc proc $root/proc
mount -t tmpfs -o mode=755 none $root/mnt
umount -l -a -t fuse.vmsfs
for path in var/lib usr/sbin usr/local/share home etc; do
    mkdir -p $root/mnt/upper/$path $root/mnt/work/$path
    mount -t overlay none -o lowerdir=/$path,upperdir=$root/mnt/upper/$path,workdir=$root/mnt/work/$path $root/$path
done
mkdir -p $root/var/lib/vmsfs
mount -t tmpfs -o mode=700 none $root/var/lib/vmsfs
echo you:x:1000:1000::/home/you:/bin/bash >>$root/etc/passwd
echo you:x:1000: >>$root/etc/group
mkdir -p $root/home/you/vms
chown -R 1000:1000 $root/home/you
sed 's/ \\(vmx\\|svm\\)\\b//g' /proc/cpuinfo >$root/mnt/cpuinfo # no KVM
mount --bind $root/mnt/cpuinfo $root/proc/cpuinfo
mknod $root/mnt/kvm c 240 255
[ ! -e /dev/kvm ] || mount --bind $root/mnt/kvm $root/dev/kvm
mkdir -p $root/root/.local/share/vmsfs $root/usr/local/share/vmsfs/images
ln -s "$IMAGES" $root/root/.local/share/vmsfs/images
mount --bind "$IMAGES" $root/usr/local/share/vmsfs/images
ln -s "$BUILD/mount.vmsfs" $root/usr/sbin/mount.vmsfs
ln -s mount.vmsfs $root/usr/sbin/mount.fuse.vmsfs
mknod -m 666 $root/mnt/fuse c 10 229
mount --bind $root/mnt/fuse $root/dev/fuse
echo ready
exec chroot $root cat
"""


class Block:
    """Commands, by the number of their line, and what is shown of their output."""

    def __init__(self, title, text):
        self.title, self.text = title, text
        self.prompts = bool(re.match(r"[#$] \S", text))
        self.shown = {}
        lines = text.splitlines()
        command = None
        for number, line in enumerate(lines, 1):
            if self.prompts:
                if re.match(r"[#$] ", line):
                    command = number
                    self.shown[number] = []
                    lines[number - 1] = line[2:]
                else:
                    self.shown[command].append(line)
                    lines[number - 1] = ""
            elif match := re.search(r"(?:^|\s{2,})# → ?(.*)", line):
                if line[: match.start()].strip():
                    command = number
                self.shown.setdefault(command, []).append(match.group(1))
            elif line.strip():
                command = number
        self.script = "\n".join(lines)

    def __repr__(self):
        return f"{self.title}:\n{self.text}"


def blocks():
    found = []
    for part in re.split(r"^#+ (?=[A-Z`])", TEXT, flags=re.M):
        title = part.splitlines()[0]
        fenced = re.finditer(r"^```sh\n(.*?)^```", part, re.M | re.S)
        indented = re.finditer(r"(?:^\n)((?: {4}.*\n+)+)", part, re.M)
        both = [(m.start(), m.group(1)) for m in fenced] + [
            (m.start(), "".join(line[4:] if line.strip() else line for line in m.group(1).splitlines(True)).strip("\n") + "\n")
            for m in indented
            if part.count("```", 0, m.start()) % 2 == 0
        ]
        found += [Block(title, text) for _, text in sorted(both)]
    return found


# What is not run here, by its first words, and why.
ELSEWHERE = {
    "contrib/quickstart": "the whole of it, and what runs this",
    "sudo apt-get install build-essential": "test_by_hand()",
    "sudo apt-get install scdoc": "test_package.py, in a Debian of its own",
    "mkdir -p /etc/vmsfs": "systemd has to be there: test_package.py, in a Debian of its own",
    "mkdir ~/machines": "test_an_existing_machine()",
    "salt-call": "Debian has no Salt: test_configuration_management.py renders its states",
    "vmsfs [SOURCE]": "no commands: test_the_synopsis_is_that_of_the_help()",
}

# Before each command: where it begins. Behind one that has failed: that it has.
MARKED = """exec 9>&1 8>&2; set -T
trap 'printf "\\036%d\\036" $LINENO >&9; printf "\\036%d\\036" $LINENO >&8' DEBUG
trap 'printf "\\036-%d\\036" $LINENO >&9' ERR
"""
OFFSET = MARKED.count("\n")
VERSION = re.compile(r"\d+\.\d+[\w.-]*")


class Ran:
    """What the commands of a block have said, by the number of their line."""

    def __init__(self, block, out, err):
        self.out, self.err, self.failed = {}, {}, set()
        for said, text in ((self.out, out), (self.err, err)):
            line = None
            for i, piece in enumerate(text.split("\036")):
                if i % 2:
                    line = abs(int(piece)) - OFFSET
                    if int(piece) < 0:
                        self.failed.add(line)
                elif line:
                    said[line] = said.get(line, "") + piece
                else:
                    assert not piece, (block, piece)


def matches(shown, said):
    """Is this what was said, versions apart, but for what … stands for?"""
    pattern = "".join(
        r"(?:[^\n]*\n)*" if line.strip() == "…" else "[^\n]*".join(map(re.escape, VERSION.sub("V", line.rstrip()).split("…"))) + " *\n"
        for line in shown
    )
    said = "".join(line + "\n" for line in said.replace("\r", "").splitlines())
    return re.fullmatch(pattern, VERSION.sub("V", said))


# What a daemon that goes into the background says of itself, where there is no log of the system's.
NOTICE = re.compile(r"^\S+Z info .*\n", re.M)


def run_block(place, block, **kwargs):
    # Into files, which a daemon that it starts may keep open. `$` is the prompt of a user.
    place.run("cd /mnt; : >out; : >err; chmod 666 out err", check=True)
    user = "you" if block.text.startswith("$ ") else None
    script = f"bash -c {shlex.quote(MARKED + block.script)} >>/mnt/out 2>>/mnt/err"
    place.run(script, cwd="/mnt/readme", user=user, **kwargs)
    return Ran(block, *(place.run(f"cat /mnt/{name}", check=True).out for name in ("out", "err")))


def problems_of(block, ran):
    found = []
    lines = block.text.splitlines()
    for line in sorted({*ran.out, *ran.err, *block.shown}):
        errors = NOTICE.sub("", ran.err.get(line, ""))
        said = ran.out.get(line, "") + errors
        if line in block.shown:
            if not matches(block.shown[line], said):
                found.append(f"{lines[line - 1]}\n  shown: {block.shown[line]}\n  said: {said!r}")
        elif errors or line in ran.failed:
            found.append(f"{lines[line - 1]}\n  {'fails, and ' if line in ran.failed else ''}said: {said!r}")
    return found


@contextlib.contextmanager
def private(*namespaces):
    enter = ("--root", "--wd", *namespaces)
    made = Place(SETUP, namespaces, sanitizer_environment(), enter, IMAGES=IMAGES, BUILD=BUILD)
    try:
        made.wait(lambda: "ready" in made.said(), "the place is set up")
        made.environment["PATH"] = f"{BUILD}:{made.environment['PATH']}"
        made.run(f"mkdir /mnt/readme; ln -s {ROOT}/contrib /mnt/readme/contrib", check=True)
        yield made
    finally:
        made.end()


@pytest.fixture
def place():
    with private() as made:
        yield made


def prepare(place, block):
    """What a reader has who comes to this block alone: a mount, and a VM `web` that runs."""
    first = block.script.lstrip().splitlines()[0]
    if first.startswith("mount -t vmsfs"):
        place.run("for vm in /vms/*; do rmdir $vm; done; umount /vms", check=True)
        place.run("until [ ! -e /var/lib/vmsfs/templates/.new-* ]; do sleep 0.1; done")
        return
    if first.startswith("cat /vms/web/error > "):
        place.run("until mountpoint -q /vms; do sleep 0.1; done")
    place.run("mountpoint -q /vms || vmsfs /vms", check=True)
    if first.startswith("mkdir /vms/w1"):  # when the template is there

        def starts_warm():
            script = "mkdir /vms/w0; echo running > /vms/w0/status; grep -q '\"warm\": true' /vms/w0/info; is=$?; rmdir /vms/w0; exit $is"
            return place.run(script).status == 0

        wait_for(starts_warm, "a VM starts from a template", 90, 1)
    makes_web = re.search(r"^mkdir (?:\S+ )*/vms/web(?:\s|$)", block.script, re.M)
    if makes_web and "rmdir /vms/web;" not in block.script:
        place.run("[ ! -d /vms/web ] || rmdir /vms/web", check=True)
    else:
        place.run("[ -d /vms/web ] || mkdir /vms/web; echo running > /vms/web/status", check=True, seconds=120)


@pytest.mark.deadline(500)
def test_every_block_prints_what_is_shown(place):
    problems = []
    for block in blocks():
        if any(block.text.startswith(words) or block.script.startswith(words) for words in ELSEWHERE):
            continue
        prepare(place, block)
        ran = run_block(place, block, seconds=200)
        problems += problems_of(block, ran)
    assert not problems, "\n".join(problems)


# Of the table for those who come from an SDK: what is to fail, and what a guest of image tiny has no program for.
FAILS = {"echo x > /vms/a/env/MY-VAR": 1, "cat bad.env >> /vms/a/environ": 1, "/vms/a/run python script.py": 127}


@pytest.mark.deadline(300)
def test_the_commands_for_those_who_come_from_an_sdk_work(place):
    rows = re.findall(r"^\| .*? \| (.*) \|$", between("## Coming from an SDK", "### Compared").replace("\\|", "\0"), re.M)
    commands = [span.replace("\0", "|") for row in rows for span in re.findall(r"`([^`]*/vms/[^`]*)`", row)]
    assert len(commands) > 30
    place.run("vmsfs /vms", check=True)
    place.run("echo 'A=1' > app.env; echo 'B AD=1' > bad.env; echo : > script.sh; echo s > secret; ln -s /bin/true program", cwd="/mnt/readme")
    place.run("mkdir /vms/a; cp -r contrib/presets/codex /vms/.new/a", cwd="/mnt/readme", check=True)
    problems = []
    for command in commands:
        if " " not in command or command.startswith("/vms/.defaults/"):  # a path, and no command
            continue
        if re.match(r"mkdir /vms/a|cp -r", command):
            place.run("rmdir /vms/a; rmdir /vms/.new/a 2>/dev/null")
        else:
            place.run("[ -d /vms/a ] || mkdir /vms/a; echo running > /vms/a/status; echo 1 > /vms/a/env/A; echo 2 > /vms/a/env/B", check=True)
        command = command.replace("CMD", "true")
        done = place.run(f"bash -c {shlex.quote(command)}", cwd="/mnt/readme")
        if done.status != FAILS.get(command, 0):
            problems.append(f"{command}: {done}")
    assert not problems, "\n".join(problems)


def named(words):
    """The blocks that begin so."""
    (found,) = [block for block in blocks() if block.text.startswith(words)]
    return found


def packages_of(text):
    """Words of a list that goes over several lines."""
    return text.replace("\\\n", " ").split()


def test_the_packages_are_those_of_quickstart_and_of_cmake():
    command = named("sudo apt-get install build-essential").text.split("\ncmake ")[0]
    wanted = packages_of(command)[3:]
    (quickstart,) = re.findall(r"^packages='([^']*)'", read(f"{ROOT}/contrib/quickstart"), re.M)
    assert wanted == packages_of(quickstart)
    # Each library that CMake asks pkg-config for is in one of the packages for building.
    modules = re.findall(r"^pkg_check_modules\(\w+ REQUIRED IMPORTED_TARGET ([a-z0-9]+)", read(f"{ROOT}/CMakeLists.txt"), re.M)
    assert len(modules) >= 5
    owners = set()
    for module in modules:
        folder = subprocess.run(["pkg-config", "--variable=pcfiledir", module], capture_output=True, text=True, check=True)
        file = os.path.realpath(f"{folder.stdout.strip()}/{module}.pc")
        owner = subprocess.run(["dpkg-query", "-S", file], capture_output=True, text=True, check=True).stdout
        owners.add(owner.split(":")[0])
    assert owners == {name for name in wanted if name.endswith("-dev")}


def help_text():
    return subprocess.run([f"{BUILD}/vmsfs", "--help"], capture_output=True, text=True, check=True, env=environment()).stdout


def between(start, end, text=TEXT):
    return text.split(start)[1].split(end)[0]


def test_the_settings_and_backends_are_those_of_the_help():
    said = dict(re.findall(r"^    -o (\w+)=(\S+)", between("What new VMs start with", "The state directory", help_text()), re.M))
    rows = dict(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|([^|]*)\|", between("### Settings", "### What runs a VM"), re.M))
    assert sorted(said) == sorted(name for names in rows for name in re.findall(r"\w+", names))
    for name in ("backend", "shell", "protected", "warm"):
        assert sorted(said[name].split("|")) == sorted(re.findall(r"\w+", rows[f"`{name}`"])), name


def test_the_options_are_those_of_the_help():
    text = help_text()
    own = re.findall(r"^    (-\S+(?: \w+)?)", between("`vmsfs doctor` looks", "What new VMs start with", text), re.M)
    table = between("## Options", "## Images")
    for option in [*own, *re.findall(r"^    (-o \w+)", between("Options of FUSE", "\n\n", text + "\n\n"), re.M)[:3]]:
        assert f"`{option.rstrip(',')}" in table or option == "--json" and "--json" in table, option


def test_the_synopsis_is_that_of_the_help():
    for line in named("vmsfs [SOURCE]").text.splitlines():
        assert line in help_text(), line


def test_the_package_is_called_so():
    (version,) = re.findall(r"^project\(vmsfs VERSION (\S+)", read(f"{ROOT}/CMakeLists.txt"), re.M)
    assert f"build-deb/vmsfs_{version}_amd64.deb" in named("sudo apt-get install scdoc").text


@pytest.mark.deadline(500)
def test_by_hand(place):
    """What is built and mounted by hand, from the files of the repository; but for the packages, which are there."""
    block = named("sudo apt-get install build-essential")
    place.run("umount /vms; mkdir /mnt/source", check=False)
    files = f"cd {ROOT} && {{ git ls-files; git ls-files -o --exclude-standard; }} | tar c -T - | tar x -C /mnt/source"
    place.run(files, check=True)
    script = block.script.split("openssh-client\n")[1]
    place.run("rm /root/.local/share/vmsfs/images")
    done = place.run(script, cwd="/mnt/source", seconds=400)
    assert done.status == 0, done
    place.run("mountpoint -q ~/vms", check=True)
    done = place.run("cd ~/vms && mkdir a && echo running > a/status && a/run hostname && cd && fusermount3 -u ~/vms", seconds=120)
    assert (done.out, done.err) == ("a\n", "") and done.status == 0, done


ADMIN = """
ip link set lo up
hosts() { sed "/web.example/d" /etc/hosts; echo 127.0.0.1 web.example; }
hosts >/mnt/hosts && cat /mnt/hosts >/etc/hosts
echo admin:x:1001:1001::/home/admin:/bin/sh >>/etc/passwd
echo admin:x:1001: >>/etc/group
mkdir -p /home/admin/.ssh ~/.ssh /run/sshd
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
ssh-keygen -q -t ed25519 -N '' -f /mnt/host_key
cp ~/.ssh/id_ed25519.pub /home/admin/.ssh/authorized_keys
chown -R admin:admin /home/admin
/usr/sbin/sshd -f /dev/null -h /mnt/host_key -o UsePAM=no -o ListenAddress=127.0.0.1 -o PidFile=none -E /mnt/sshd.log
"""


def test_an_existing_machine():
    """As it stands, with a server at port 22 of web.example, whose user is admin."""
    problems = []
    with private("--net") as place:
        place.run(ADMIN, check=True)
        for words in ("mkdir ~/machines &&", "mkdir ~/machines/web"):
            block = named(words)
            problems += problems_of(block, run_block(place, block))
        assert not problems, "\n".join(problems)
        assert place.run("ls ~/machines").out == ""
        assert "production" in place.run("cat /home/admin/.vmsfs_env.sh", check=True).out
