"""Completion of bash and zsh, as somebody at a terminal has it: the line is typed into an interactive shell."""

import os
import re
import subprocess

import pexpect
import pytest

from harness import IMAGES, ROOT, VMSFS, environment, read, write

FOLDER = os.path.join(ROOT, "contrib", "completions")

BASH = [
    "bind 'set enable-bracketed-paste off'; bind 'set bell-style none'; bind 'set completion-query-items 0'",
    "show() { printf '<<%s>>\\n' \"$READLINE_LINE\"; }",
    "bind -x '\"\\C-t\": show'; bind '\"\\C-o\": insert-completions'",
]
ZSH = [
    "unsetopt prompt_cr prompt_sp zle_bracketed_paste; unset zle_bracketed_paste; KEYTIMEOUT=1",
    "fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -d $PWD/zcompdump",
    "show() {{ zle -I; print -r -- \"<<$BUFFER>>\" }}; zle -N show; bindkey '^T' show",
    "zstyle ':completion:*' menu no; zstyle ':completion:*' list false; unsetopt auto_menu; setopt rm_star_silent",
    "zstyle ':completion:all-matches:*' completer _all_matches _complete",
    "zstyle ':completion:all-matches:*' insert true; zstyle ':completion:all-matches:*' old-matches false",
    "zle -C all-matches complete-word _generic; bindkey '^O' all-matches",
]


class Shell:
    """An interactive shell in a terminal, in a folder of its own."""

    def __init__(self, kind, place, bash_completion=False):
        self.kind = kind
        env = {**environment(), "TERM": "dumb", "PATH": f"{os.path.dirname(VMSFS)}:/usr/bin:/bin", "HOME": str(place)}
        argv = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[kind]
        self.child = pexpect.spawn(
            kind, argv, env=env, cwd=str(place), encoding="utf-8", timeout=30, dimensions=(50, 5000), echo=False
        )
        self.child.delaybeforesend = None
        lines = list(ZSH if kind == "zsh" else BASH)
        if bash_completion:
            lines.insert(0, ". /usr/share/bash-completion/bash_completion")
        if kind == "bash":
            lines.append(f". {FOLDER}/vmsfs.bash")
        for i, line in enumerate(lines):
            text = line.format(folder=FOLDER) if kind == "zsh" else line
            self.child.sendline(f"{text}\necho ready-{i}-$((1 + 1))")
            self.child.expect(f"ready-{i}-2")

    def type(self, text, key):
        self.child.send(text + key + "\x14")
        self.child.expect(r"<<([^\r\n]*)>>")
        line = self.child.match.group(1)
        self.child.send("\x15")  # empties the line
        return line

    def tab(self, text):
        """The line, after a tab."""
        return self.type(text, "\t")

    def all(self, text):
        """Every way to complete the last word, in words."""
        line = self.type(text, "\x0f")
        before = text[: len(text) - len(re.split(r"[\s]", text)[-1])]
        assert line.startswith(before), line
        return line[len(before) :].split()

    def close(self):
        self.child.close(force=True)


@pytest.fixture(params=["bash", "zsh"])
def shell(request, tmp_path):
    one = Shell(request.param, tmp_path)
    yield one
    one.close()


def help_text(*argv):
    return subprocess.run([*argv], capture_output=True, text=True, check=True, env=environment(), timeout=30).stdout


def options_of_help():
    """The names behind -o, with = where they take something; and the flags."""
    names, flags = set(), set()
    for line in help_text(VMSFS, "--help").splitlines():
        option = re.match(r" {4}(-\S.*?)(?:  |$)", line)
        for word in option.group(1).split(", ") if option else []:
            if word.startswith("-o "):
                names.add(re.sub("=.*", "=", word[3:]))
            else:
                flags.add(word)
    return names, flags


def test_each_option_of_the_help_is_offered(shell):
    names, flags = options_of_help()
    assert {"state=", "ephemeral", "debug", "log_level=", "allow_other"} <= names
    offered = {word.rstrip(",") for word in shell.all("vmsfs -o ")}
    assert {name.rstrip("=") for name in names} == {name.rstrip("=") for name in offered}
    words = shell.all("vmsfs -") if shell.kind == "bash" else shell.all("vmsfs -") + shell.all("vmsfs doctor --j")
    assert flags <= set(words)


def test_no_other_option_is_offered(shell):
    _, flags = options_of_help()
    offered = {word.rstrip(",") for typed in ("vmsfs -", "vmsfs --") for word in shell.all(typed)}
    # zsh offers -o itself; --json it has for doctor alone.
    assert offered - {"-o"} <= flags


def test_zsh_describes_each_option_in_the_words_of_the_help(tmp_path):
    shell = Shell("zsh", tmp_path)
    try:
        shell.child.sendline("zstyle ':completion:*' list true; zstyle ':completion:*' verbose yes; echo lists-$((1 + 1))")
        shell.child.expect("lists-2")
        shell.child.send("vmsfs /vms -o \t\x14")
        shell.child.expect(r"<<([^\r\n]*)>>")
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shell.child.before)
    finally:
        shell.close()
    described = dict(re.findall(r"(?:^|[\r\n ])(\w+) +-- ([^\r\n]*)", shown))
    lines = help_text(VMSFS, "--help").splitlines()
    for line, following in zip(lines, lines[1:]):
        option = re.match(r" +(?:-[a-z], )?-o ([^ =]+)\S* *(.*)", line)
        if option:
            words = option.group(2) or following.strip()
            assert described[option.group(1)].strip() == words.replace("[", "(").replace("]", ")").replace(":", ";"), shown
    assert len(described) > 25


def test_a_list_of_options_is_completed_behind_a_comma(shell):
    assert shell.tab("vmsfs /vms -o ephemeral,log_l").rstrip() == "vmsfs /vms -o ephemeral,log_level="
    assert shell.tab("vmsfs -oephe").startswith("vmsfs -oephemeral")


def test_an_option_is_not_offered_twice(shell):
    offered = [w.split(",")[-1] for w in shell.all("vmsfs -o ephemeral,memory=512,m")]
    assert "memory=" not in offered
    assert not any(w.startswith("ephemeral,memory=512,memory=") for w in shell.all("vmsfs -o ephemeral,memory=512,"))


@pytest.mark.parametrize(
    "typed, completed",
    [
        ("backend=a", {"auto", "attach"}),
        ("log_level=", {"error", "warning", "info", "debug"}),
        ("ephemeral,shell=", {"login", "raw"}),
        ("protected=y", {"yes"}),
    ],
)
def test_the_words_of_an_option_are_offered(shell, typed, completed):
    words = shell.all(f"vmsfs /vms -o {typed}")
    assert {re.split("[=,]", w.rstrip(","))[-1] for w in words} == completed


def test_folders_and_files_are_those_of_the_host(shell, tmp_path):
    (tmp_path / "somewhere" / "inside").mkdir(parents=True)
    (tmp_path / "somefile").touch()
    assert shell.tab("vmsfs somew").rstrip() == "vmsfs somewhere/"
    assert shell.tab("vmsfs -o state=somew") == "vmsfs -o state=somewhere/"
    assert shell.tab("vmsfs -o state=somewhere/i") == "vmsfs -o state=somewhere/inside/"
    assert shell.tab("vmsfs -o key=somef").rstrip(" ,") == "vmsfs -o key=somefile"


def test_images_are_offered_by_name(shell):
    assert shell.tab(f"vmsfs -o images={IMAGES},image=ti").rstrip(" ,") == f"vmsfs -o images={IMAGES},image=tiny"


def test_doctor_is_offered_first(shell):
    assert shell.tab("vmsfs doc") == "vmsfs doctor "
    assert shell.tab("vmsfs doctor --js") == "vmsfs doctor --json "


def test_run_is_completed_with_what_the_guest_has(shell, vm):
    run = f"{vm.path}/run"
    assert shell.tab(f"{run} una") == f"{run} uname "
    assert {"unamex"}.isdisjoint(shell.all(f"{run} una"))
    vm.exec("mkdir -p /tmp/completion/folder; : > /tmp/completion/file")
    assert shell.tab(f"{run} cat /tmp/completion/fi") == f"{run} cat /tmp/completion/file "
    assert shell.tab(f"{run} -C /tmp/completion/fo") == f"{run} -C /tmp/completion/folder/"
    assert shell.tab(f"{run} -t 5 -n una") == f"{run} -t 5 -n uname "
    assert shell.tab(f"{run} -e A=b -s raw una") == f"{run} -e A=b -s raw uname "


def test_the_options_of_run_are_offered(shell, vm):
    run = f"{vm.path}/run"
    options = set(re.findall(r"^  (-[A-Za-z]) ", help_text(run, "-h"), re.M))
    assert options >= {"-C", "-e", "-n", "-s", "-t", "-h"}
    assert set(shell.all(f"{run} -")) == options
    assert set(shell.all(f"{run} -s ")) == {"login", "raw"}
    write(vm.env("COMPLETION_KEY"), "value")
    assert shell.tab(f"{run} -e COMPLETION_K").rstrip() == f"{run} -e COMPLETION_KEY"
    os.unlink(vm.env("COMPLETION_KEY"))


def test_a_run_by_a_relative_path_and_in_another_place(shell, vm, tmp_path):
    os.symlink(vm.path, tmp_path / "web")
    assert shell.tab("web/run una") == "web/run uname "


def test_another_program_of_this_name_is_left_alone(shell, tmp_path):
    write(tmp_path / "run", "#!/bin/sh\n")
    os.chmod(tmp_path / "run", 0o755)
    (tmp_path / "argument").touch()
    assert shell.tab("./run argu") == "./run argument "


def test_what_does_not_run_is_not_waited_for(shell, mount):
    os.mkdir(mount.mount + "/.new/c")
    os.rename(mount.mount + "/.new/c", mount.vm("stopped"))
    try:
        write(mount.vm("stopped") + "/status", "stopped")
        before = read(mount.vm("stopped") + "/error")
        run = f"{mount.vm('stopped')}/run"
        assert shell.tab(f"{run} una") == f"{run} una"
        assert read(mount.vm("stopped") + "/error") == before
    finally:
        os.rmdir(mount.vm("stopped"))


def test_with_the_package_bash_completion_all_is_the_same(tmp_path, vm):
    shell = Shell("bash", tmp_path, bash_completion=True)
    try:
        assert shell.tab("vmsfs -o ephemeral,backend=at") == "vmsfs -o ephemeral,backend=attach"
        assert shell.tab(f"{vm.path}/run una") == f"{vm.path}/run uname "
    finally:
        shell.close()


def test_bash_completion_loads_it_when_it_is_needed(tmp_path, vm):
    folder = tmp_path / ".local/share/bash-completion/completions"
    folder.mkdir(parents=True)
    for name in ("vmsfs", "run"):
        os.symlink(os.path.join(FOLDER, "vmsfs.bash"), folder / name)
    shell = Shell("bash", tmp_path, bash_completion=True)
    try:
        shell.child.sendline("complete -r vmsfs run; unset -f _vmsfs _vmsfs_run; echo gone-$((1 + 1))")
        shell.child.expect("gone-2")
        assert shell.tab("vmsfs -o ephemeral,backend=at") == "vmsfs -o ephemeral,backend=attach"
        assert shell.tab(f"{vm.path}/run una") == f"{vm.path}/run uname "
    finally:
        shell.close()


def test_the_scripts_are_sound():
    subprocess.run(["bash", "-n", f"{FOLDER}/vmsfs.bash"], check=True)
    subprocess.run(["zsh", "-n", f"{FOLDER}/_vmsfs"], check=True)
