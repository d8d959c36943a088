"""contrib/ansible, contrib/puppet and contrib/salt: VMs are as the inventory, Hiera or the pillar says, and a second run
changes nothing. The VMs are existing machines, so that none has to boot."""

import json
import os
import re
import shutil
import subprocess

import jinja2
import pytest
import yaml

from harness import ROOT, read, wait_for
from tools_env import environment

ANSIBLE = os.path.join(ROOT, "contrib/ansible")
# Ansible starts some dozens of Pythons in each run.
pytestmark = pytest.mark.deadline(300)

PUPPET = os.path.join(ROOT, "contrib/puppet")
SALT = os.path.join(ROOT, "contrib/salt")

SECRET = "s3cr3t-of-the-test"
ENV = {"APP_ENV": "production", "PORT": 80, "JSON": '{"a": [1,"b"]}', "TEXT": "it's\n$two\nlines", "QUOTED": '"#: \\ é',
       "LARGE": "é" * 50_000}  # fmt: skip


class Place:
    """A mount whose VMs are one machine, each with an env file of its own, and a folder for the tool."""

    def __init__(self, server, daemon, folder):
        self.server, self.daemon, self.mount, self.folder = server, daemon, daemon.mount, str(folder)
        self.made = os.path.join(server.path, "made")
        for name in ("template/env", "template/config", "tmp"):
            (folder / name).mkdir(parents=True)
        (folder / "template/env/TEMPLATED").write_text("yes\n")
        (folder / "template/config/boot_timeout").write_text("33\n")
        (folder / "ansible.cfg").write_text("")

    @property
    def template(self):
        return os.path.join(self.folder, "template")

    def config(self, name):
        """In the words of somebody who writes YAML; the files read otherwise."""
        return {"env_file": os.path.join(self.server.path, f"{name}.sh"), "memory": "1G", "protected": False}

    def command(self):
        """Each time that it runs leaves a line."""
        return f'echo "$APP_ENV" >> {self.made}'

    def runs(self):
        return read(self.made).splitlines() if os.path.exists(self.made) else []

    def machine(self, name):
        """What a shell has that reads the env file on the machine."""
        done = subprocess.run(["env", "-i", "sh", "-c", '. "$1"; env -0', "sh", f"{self.server.path}/{name}.sh"],
                              capture_output=True, timeout=20, check=True)  # fmt: skip
        pairs = dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if pair)
        return {key: value for key, value in pairs.items() if key not in ("PWD", "_", "SHLVL", "OLDPWD")}

    def read(self, path):
        return read(os.path.join(self.mount, path))

    def run(self, *argv, seconds=100, **variables):
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=self.folder,
            env=environment(
                HOME=self.folder, TMPDIR=f"{self.folder}/tmp", ANSIBLE_CONFIG=f"{self.folder}/ansible.cfg",
                ANSIBLE_HOME=f"{self.folder}/ansible", ANSIBLE_LOCAL_TEMP=f"{self.folder}/ansible", ANSIBLE_NOCOLOR="1",
                ANSIBLE_REMOTE_TEMP=f"{self.folder}/ansible", ANSIBLE_PYTHON_INTERPRETER="/usr/bin/python3",
                ANSIBLE_SSH_ARGS="-o ControlMaster=no", ANSIBLE_PIPELINING="1", **variables,
            ),
        )  # fmt: skip


@pytest.fixture
def place(sshd, daemon, tmp_path):
    server = sshd()
    return Place(server, daemon(server.options()), tmp_path)


def had_it_from_the_start(place):
    """All variables were there before it booted, and so before its first login: none has been set since."""
    assert json.loads(place.read("web/info"))["env_commits"] == 0


def is_as_declared(place, env=None):
    """web is made of the template, the settings, the variables and the secret; db is stopped."""
    assert place.read("web/status") == "running\n" and place.read("db/status") == "stopped\n"
    env = {key: str(value) for key, value in (env or ENV).items()}
    assert place.machine("web") == {**env, "REGION": "eu", "TOKEN": SECRET, "TEMPLATED": "yes"}
    assert place.read("db/env/REGION") == "us"
    assert place.read("web/config/memory") == "1024\n" and place.read("web/config/boot_timeout") == "33\n"
    assert place.runs() == ["production"]
    assert os.listdir(f"{place.mount}/.new") == []


# --- Ansible ---


def declare_for_ansible(place, web=None, db=None):
    """An inventory with these changes to what web and db are."""
    hosts = {
        "web": {
            "vmsfs_template": place.template,
            "vmsfs_config": place.config("web"),
            "vmsfs_env": ENV,
            "vmsfs_secrets": {"TOKEN": SECRET},
            "vmsfs_commands": [{"name": "leave a line", "cmd": place.command(), "creates": place.made}],
            **(web or {}),
        },
        "db": {
            "vmsfs_state": "stopped",
            "vmsfs_config": place.config("db"),
            "vmsfs_env": {"REGION": "us"},
            **(db or {}),
        },
    }
    of_all = {"vmsfs_mount": place.mount, "vmsfs_env_common": {"REGION": "eu"}}
    with open(f"{place.folder}/hosts.yml", "w", encoding="utf-8") as file:
        yaml.safe_dump({"vms": {"hosts": hosts, "vars": of_all}}, file)


def play(place, *options, inventory=None, fails=False, **variables):
    """Runs site.yml. How much it has changed, by host; or what it said, if it is to fail."""
    inventory = inventory or f"{place.folder}/hosts.yml"
    variables.setdefault("ANSIBLE_ROLES_PATH", f"{ANSIBLE}/roles")
    done = place.run("ansible-playbook", "-i", inventory, f"{ANSIBLE}/site.yml", *options, **variables)
    said = done.stdout + done.stderr
    assert SECRET not in said
    assert (done.returncode != 0) == fails, said
    if fails:
        return said
    return {host: int(count) for host, count in re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", done.stdout, re.M)}


def test_the_ansible_role_makes_vms_and_a_second_run_changes_nothing(place):
    declare_for_ansible(place)
    changed = play(place, "-vvv", "--diff")
    assert changed["web"] > 0 and changed["db"] > 0
    is_as_declared(place)
    had_it_from_the_start(place)
    assert play(place, "--diff") == {"web": 0, "db": 0}
    is_as_declared(place)
    declare_for_ansible(place, {"vmsfs_secrets": {"TOKEN": "changed " + SECRET}})
    assert play(place, "-vvv", "--diff") == {"web": 1, "db": 0}
    assert place.machine("web")["TOKEN"] == "changed " + SECRET


def test_a_changed_variable_is_the_only_change_that_ansible_makes(place):
    declare_for_ansible(place)
    play(place)
    declare_for_ansible(place, {"vmsfs_env": {**ENV, "PORT": 81}})
    assert play(place) == {"web": 1, "db": 0}
    is_as_declared(place, {**ENV, "PORT": 81})
    assert play(place) == {"web": 0, "db": 0}


def test_ansible_in_check_mode_makes_nothing(place):
    declare_for_ansible(place)
    assert play(place, "--check")["web"] > 0
    assert os.listdir(f"{place.mount}/.new") == [] and place.daemon.vms() == []
    play(place)
    assert play(place, "--check") == {"web": 0, "db": 0}


def test_ansible_restarts_a_vm_for_a_setting_only_where_it_may(place):
    declare_for_ansible(place)
    play(place)
    larger = {**place.config("web"), "memory": 2048}
    declare_for_ansible(place, {"vmsfs_config": larger})
    assert "config/memory can be changed while the VM is stopped" in play(place, fails=True)
    assert place.read("web/status") == "running\n" and place.read("web/config/memory") == "1024\n"
    declare_for_ansible(place, {"vmsfs_config": larger, "vmsfs_restart": True})
    assert play(place)["web"] > 0
    assert place.read("web/status") == "running\n" and place.read("web/config/memory") == "2048\n"
    # This one needs no restart.
    declare_for_ansible(place, {"vmsfs_config": {**larger, "stop_timeout": 7}, "vmsfs_restart": True})
    booted = json.loads(place.read("web/info"))["connections"]
    assert play(place) == {"web": 1, "db": 0}
    assert json.loads(place.read("web/info"))["connections"] == booted


def test_ansible_brings_vms_into_each_state_and_removes_them(place):
    declare_for_ansible(place)
    play(place)
    declare_for_ansible(place, {"vmsfs_state": "stopped"}, {"vmsfs_state": "running"})
    assert play(place) == {"web": 1, "db": 1}
    assert (place.read("web/status"), place.read("db/status")) == ("stopped\n", "running\n")
    declare_for_ansible(place, {"vmsfs_state": "absent"}, {"vmsfs_state": "running"})
    assert play(place) == {"web": 1, "db": 0}
    assert place.daemon.vms() == ["db"]
    assert play(place) == {"web": 0, "db": 0}


def test_ansible_unsets_other_variables_where_it_is_told_to(place):
    declare_for_ansible(place)
    play(place)
    with open(f"{place.mount}/web/env/OTHER", "w", encoding="ascii") as file:
        file.write("x\n")
    assert play(place)["web"] == 0
    declare_for_ansible(place, {"vmsfs_env_exclusive": True})
    assert play(place)["web"] == 1
    assert set(place.machine("web")) == {*ENV, "REGION", "TOKEN"}


def test_ansible_unsets_what_a_new_vm_has_from_elsewhere_in_the_first_run(place):
    with open(f"{place.mount}/.defaults/env/FROM_DEFAULTS", "w", encoding="ascii") as file:
        file.write("x\n")
    declare_for_ansible(place, {"vmsfs_env_exclusive": True})
    play(place)
    assert set(place.machine("web")) == {*ENV, "REGION", "TOKEN"}
    assert play(place)["web"] == 0


def test_ansible_says_why_a_vm_was_refused_and_the_next_run_makes_it(place):
    with open(f"{place.template}/forward", "w", encoding="ascii") as file:
        file.write("required NEEDED\n")
    declare_for_ansible(place)
    said = play(place, "-l", "web", fails=True)
    assert "Boot the VM" in said and "NEEDED" in said
    assert play(place, "-l", "web", NEEDED="1")["web"] > 0
    assert place.machine("web")["NEEDED"] == "1"


def test_ansible_says_when_there_is_no_mount(place):
    declare_for_ansible(place)
    said = play(place, "-e", f"vmsfs_mount={place.folder}", fails=True)
    assert f"There is no vmsfs at {place.folder}" in said


@pytest.mark.parametrize("host", ["web", "db"])
def test_the_ansible_example_works(place, host):
    options = ("-l", host, "-e", f"vmsfs_mount={place.mount}")
    kwargs = {"inventory": f"{ANSIBLE}/inventory", "API_TOKEN": SECRET}
    assert play(place, *options, **kwargs)[host] > 0
    assert place.read(f"{host}/env/REGION") == "eu" and place.read(f"{host}/env/APP_ENV") == "production"
    if host == "web":
        assert place.read("web/env/API_TOKEN") == SECRET and place.read("web/env/LOG_LEVEL") == "debug"
        assert os.path.isdir(f"{place.server.path}/app-production")
    assert play(place, *options, **kwargs) == {host: 0}


def test_the_ansible_configuration_finds_the_role_and_the_inventory(place):
    done = subprocess.run(
        ["ansible-playbook", "--list-tasks", "--list-hosts", "site.yml"], cwd=ANSIBLE, capture_output=True, text=True,
        timeout=60, env=environment(HOME=place.folder, ANSIBLE_HOME=f"{place.folder}/ansible"), check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "vmsfs_vm : Boot the VM" in done.stdout and "web" in done.stdout, done


def test_the_dynamic_inventory_shows_vms_and_leads_into_them(place):
    declare_for_ansible(place)
    play(place)
    script = f"{ANSIBLE}/vmsfs_inventory.py"
    listed = json.loads(place.run("ansible-inventory", "-i", script, "--list", VMSFS_MOUNT=place.mount).stdout)
    assert listed["running"] == {"hosts": ["web"]} and listed["stopped"] == {"hosts": ["db"]}
    assert listed["backend_attach"] == {"hosts": ["db", "web"]}
    assert listed["_meta"]["hostvars"]["web"]["vmsfs_info"]["port"] == place.server.port
    assert SECRET not in json.dumps(listed)
    done = place.run("ansible", "-i", script, "running", "-m", "ping", VMSFS_MOUNT=place.mount)
    assert "web | SUCCESS" in done.stdout and '"pong"' in done.stdout, done
    # Nothing is needed in the VM for this one.
    done = place.run("ansible", "-i", script, "running", "-m", "raw", "-a", "echo in $SSH_CONNECTION", VMSFS_MOUNT=place.mount)
    assert f"127.0.0.1 {place.server.port}" in done.stdout, done
    host = place.run(script, "--host", "web", VMSFS_MOUNT=place.mount)
    assert json.loads(host.stdout)["ansible_ssh_common_args"] == f"-F '{place.mount}/web/ssh_config'"
    done = place.run(script, "--list", VMSFS_MOUNT=place.folder)
    assert done.returncode == 1 and f"there is no vmsfs at {place.folder}" in done.stderr


# --- Puppet ---


def puppet_value(value):
    """As Puppet's language has it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{puppet_value(key)} => {puppet_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)


def declare_for_puppet(place, web=None, db=None, secret=SECRET):
    vms = {
        "web": {
            "template": place.template,
            "config": place.config("web"),
            "env": {"REGION": "eu", **ENV},
            "commands": {"leave a line": {"command": place.command(), "creates": place.made}},
            **(web or {}),
        },
        "db": {"ensure": "stopped", "config": place.config("db"), "env": {"REGION": "us"}, **(db or {})},
    }
    with open(f"{place.folder}/vms.pp", "w", encoding="utf-8") as file:
        for name, parameters in vms.items():
            file.write(f"vmsfs::vm {{ '{name}':\n  mount => '{place.mount}',\n")
            if name == "web":
                file.write(f"  secrets => Sensitive({{ 'TOKEN' => '{secret}' }}),\n")
            file.writelines(f"  {key} => {puppet_value(value)},\n" for key, value in parameters.items())
            file.write("}\n")


def puppet(place, *options, manifest="vms.pp", fails=False):
    """Applies it. How many resources it has changed; or what it said, if it is to fail."""
    folder = f"{place.folder}/puppet"
    done = place.run("puppet", "apply", "--detailed-exitcodes", "--color=false", "--confdir", folder, "--vardir", folder,
                     "--publicdir", folder, "--lastrunfile", f"{folder}/summary.yaml", "--modulepath", PUPPET, *options, manifest)  # fmt: skip
    said = done.stdout + done.stderr
    assert SECRET not in said and (fails or "Warning" not in said)
    # 0: nothing to do; 2: changes; 4 and 6: failures.
    assert done.returncode in ((4, 6) if fails else (0, 2)), said
    if fails:
        return said
    changed = yaml.safe_load(read(f"{folder}/summary.yaml"))["resources"]["changed"]
    assert (done.returncode == 2) == (changed > 0), said
    return changed


def test_the_puppet_module_makes_vms_and_a_second_run_changes_nothing(place):
    declare_for_puppet(place)
    assert puppet(place, "--show_diff", "--debug") > 0
    is_as_declared(place)
    had_it_from_the_start(place)
    assert puppet(place, "--show_diff") == 0
    is_as_declared(place)
    declare_for_puppet(place, secret="changed " + SECRET)
    assert puppet(place, "--show_diff", "--debug") == 1
    assert place.machine("web")["TOKEN"] == "changed " + SECRET


def test_a_changed_variable_is_the_only_change_that_puppet_makes(place):
    declare_for_puppet(place)
    puppet(place)
    declare_for_puppet(place, {"env": {"REGION": "eu", **ENV, "PORT": 81}})
    assert puppet(place) == 1
    is_as_declared(place, {**ENV, "PORT": 81})
    assert puppet(place) == 0


def test_puppet_without_operation_makes_nothing(place):
    declare_for_puppet(place)
    assert puppet(place, "--noop") == 0
    assert os.listdir(f"{place.mount}/.new") == [] and place.daemon.vms() == []


def test_puppet_restarts_a_vm_for_a_setting_only_where_it_may(place):
    declare_for_puppet(place)
    puppet(place)
    larger = {**place.config("web"), "memory": 2048}
    declare_for_puppet(place, {"config": larger})
    assert "config/memory can be changed while the VM is stopped" in puppet(place, fails=True)
    assert place.read("web/status") == "running\n" and place.read("web/config/memory") == "1024\n"
    declare_for_puppet(place, {"config": larger, "restart": True})
    assert puppet(place) > 0
    assert place.read("web/status") == "running\n" and place.read("web/config/memory") == "2048\n"
    assert puppet(place) == 0
    # This one needs no restart.
    declare_for_puppet(place, {"config": {**larger, "stop_timeout": 7}, "restart": True})
    assert puppet(place) == 1


def test_puppet_brings_vms_into_each_state_and_removes_them(place):
    declare_for_puppet(place)
    puppet(place)
    declare_for_puppet(place, {"ensure": "stopped"}, {"ensure": "running"})
    assert puppet(place) == 2
    assert (place.read("web/status"), place.read("db/status")) == ("stopped\n", "running\n")
    declare_for_puppet(place, {"ensure": "absent"}, {"ensure": "running"})
    assert puppet(place) == 1
    assert place.daemon.vms() == ["db"]
    assert puppet(place) == 0


def test_puppet_unsets_other_variables_where_it_is_told_to(place):
    declare_for_puppet(place)
    puppet(place)
    with open(f"{place.mount}/web/env/OTHER", "w", encoding="ascii") as file:
        file.write("x\n")
    assert puppet(place) == 0
    declare_for_puppet(place, {"env_purge": True})
    assert puppet(place) > 0
    assert set(place.machine("web")) == {*ENV, "REGION", "TOKEN"}
    assert puppet(place) == 0


def test_puppet_says_why_a_vm_was_refused_and_when_there_is_no_mount(place):
    with open(f"{place.template}/forward", "w", encoding="ascii") as file:
        file.write("required NEEDED\n")
    declare_for_puppet(place)
    assert "NEEDED" in puppet(place, fails=True)
    assert place.daemon.vms() == ["db"]
    os.unlink(f"{place.template}/forward")
    assert puppet(place) > 0
    is_as_declared(place)
    with open(f"{place.folder}/elsewhere.pp", "w", encoding="ascii") as file:
        file.write(f"vmsfs::vm {{ 'web': mount => '{place.folder}' }}\n")
    assert f"there is no vmsfs at {place.folder}" in puppet(place, manifest="elsewhere.pp", fails=True)


def test_the_puppet_example_takes_vms_from_hiera(place):
    shutil.copytree(f"{PUPPET}/vmsfs/examples", f"{place.folder}/examples")
    data = f"{place.folder}/examples/data/common.yaml"
    text = yaml.safe_load(read(data))
    text["vmsfs::mount"] = place.mount
    text["vmsfs::secrets"]["web"]["API_TOKEN"] = SECRET
    for name, vm in text["vmsfs::vms"].items():
        vm.setdefault("config", {})["env_file"] = f"{place.server.path}/{name}.sh"
    with open(data, "w", encoding="utf-8") as file:
        yaml.safe_dump(text, file)
    options = ("--hiera_config", "examples/hiera.yaml", "--show_diff")
    assert puppet(place, *options, manifest="examples/init.pp") > 0
    expected = {"REGION": "eu", "LOG_LEVEL": "debug", "APP_ENV": "production", "API_TOKEN": SECRET}
    assert place.machine("web") == expected
    assert place.read("db/status") == "stopped\n" and place.read("web/status") == "running\n"
    assert os.path.isdir(f"{place.server.path}/app-production")
    assert puppet(place, *options, manifest="examples/init.pp") == 0


# --- Salt: not in Debian 12, so the states are rendered as Salt does it, and then done with what Salt would call ---

# Functions and their arguments that the states may use (Salt's documentation of cmd.run, file.managed and file.directory).
SALT_ARGUMENTS = {
    "cmd.run": {"name", "env", "unless", "onlyif", "creates", "require", "require_in"},
    "file.managed": {"contents", "contents_newline", "mode", "show_changes", "require", "require_in"},
    "file.directory": {"clean", "require", "require_in"},
}


def salt_states(pillar):
    """The states of a pillar: pairs of an id and a function with its arguments, in order."""
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SALT), extensions=["jinja2.ext.do"], undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    functions = {"pillar.get": lambda key, default: pillar.get(key, default), "file.directory_exists": os.path.isdir}
    text = jinja.get_template("vmsfs/init.sls").render(salt=functions)
    states = []
    ids = re.findall(r"^(?! |#|\n)(.+):$", text, re.M)
    assert len(ids) == len(set(ids)), "a state's id is there twice"
    for name, state in (yaml.safe_load(text) or {}).items():
        [(function, arguments)] = state.items()
        arguments = {key: value for argument in arguments for key, value in argument.items()}
        assert set(arguments) <= SALT_ARGUMENTS[function], (name, arguments)
        states.append((name, function, arguments))
    known = {(function.split(".")[0], name) for name, function, _ in states}
    for name, _, arguments in states:
        for need in arguments.get("require", []) + arguments.get("require_in", []):
            assert set(need.items()) <= known, (name, need)
    return states


def in_order(states):
    """As they are written, but each behind what it requires. Salt does not rely on more."""
    needs = {name: {n for need in arguments.get("require", []) for n in need.values()} for name, _, arguments in states}
    for name, _, arguments in states:
        for target in [n for need in arguments.get("require_in", []) for n in need.values()]:
            needs[target].add(name)
    done, ordered = set(), []
    while len(ordered) < len(states):
        ready = [state for state in states if state[0] not in done and needs[state[0]] <= done]
        assert ready, "the states require each other in a circle"
        ordered.append(ready[0])
        done.add(ready[0][0])
    return ordered


def salt_shell(place, command, arguments):
    pairs = {key: value for pair in arguments["env"] for key, value in pair.items()}
    assert all(isinstance(value, str) for value in pairs.values()), pairs
    return place.run("sh", "-c", command, **pairs)


def salt_command(place, arguments):
    if "creates" in arguments and os.path.exists(arguments["creates"]):
        return False
    if "unless" in arguments and salt_shell(place, arguments["unless"], arguments).returncode == 0:
        return False
    if "onlyif" in arguments and salt_shell(place, arguments["onlyif"], arguments).returncode != 0:
        return False
    done = salt_shell(place, arguments["name"], arguments)
    assert done.returncode == 0, done
    return True


def salt_file(path, arguments):
    """As file.managed writes: a temporary file beside it, and a rename."""
    assert arguments["mode"] == "0600" and arguments["contents_newline"] is False
    if os.path.exists(path) and read(path) == arguments["contents"]:
        return False
    temporary = path + "9u84ipv8"
    with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(arguments["contents"])
    os.rename(temporary, path)
    return True


def salt_clean(path, states):
    managed = {name for name, function, _ in states if function == "file.managed"}
    others = [name for name in os.listdir(path) if os.path.join(path, name) not in managed]
    for name in others:
        os.unlink(os.path.join(path, name))
    return bool(others)


def salt(place, pillar):
    """Does what the states say. The ids of those that have changed something."""
    changed = []
    states = in_order(salt_states({"vmsfs": pillar}))
    for name, function, arguments in states:
        if function == "cmd.run":
            change = salt_command(place, arguments)
        elif function == "file.managed":
            change = salt_file(name, arguments)
        else:
            change = salt_clean(name, states)
        if change:
            changed.append(name)
    return changed


def salt_pillar(place, web=None, db=None):
    return {
        "mount": place.mount,
        "env": {"REGION": "eu"},
        "vms": {
            "web": {
                "template": place.template,
                "config": place.config("web"),
                "env": ENV,
                "secrets": {"TOKEN": SECRET},
                "commands": {"leave a line": {"command": place.command(), "creates": place.made}},
                **(web or {}),
            },
            "db": {"state": "stopped", "config": place.config("db"), "env": {"REGION": "us"}, **(db or {})},
        },
    }


def test_the_salt_states_make_vms_and_a_second_run_changes_nothing(place):
    assert salt(place, salt_pillar(place))
    is_as_declared(place)
    had_it_from_the_start(place)
    assert salt(place, salt_pillar(place)) == []
    port = salt_pillar(place, {"env": {**ENV, "PORT": 81}})
    assert salt(place, port) == [f"{place.mount}/web/env/PORT"]
    is_as_declared(place, {**ENV, "PORT": 81})


def test_the_salt_states_restart_stop_purge_and_remove(place):
    salt(place, salt_pillar(place))
    with open(f"{place.mount}/web/env/OTHER", "w", encoding="ascii") as file:
        file.write("x\n")
    larger = {"config": {**place.config("web"), "memory": "2G"}, "restart": True, "env_purge": True}
    assert salt(place, salt_pillar(place, larger)) == ["vmsfs web has memory", f"{place.mount}/web/env", "vmsfs web is running"]
    assert place.read("web/config/memory") == "2048\n"
    assert set(place.machine("web")) == {*ENV, "REGION", "TOKEN"}
    stopped = salt_pillar(place, {**larger, "state": "stopped"}, {"state": "absent"})
    assert salt(place, stopped) == ["vmsfs web is stopped", "vmsfs db is removed"]
    assert place.read("web/status") == "stopped\n" and place.daemon.vms() == ["web"]
    assert salt(place, stopped) == []


def test_a_new_vm_of_salt_has_no_other_variables_where_it_is_told_to(place):
    purged = salt_pillar(place, {"env_purge": True})
    assert f"{place.mount}/.new/web/env" in salt(place, purged)
    assert set(place.machine("web")) == {*ENV, "REGION", "TOKEN"}
    had_it_from_the_start(place)
    assert salt(place, purged) == []


def test_salt_shows_no_secret_and_renders_without_a_pillar(place):
    secrets = [arguments for name, _, arguments in salt_states({"vmsfs": salt_pillar(place)}) if name.endswith("/TOKEN")]
    assert [arguments["show_changes"] for arguments in secrets] == [False]
    assert salt_states({}) == []


def test_the_salt_example_of_a_pillar_works(place):
    pillar = yaml.safe_load(read(f"{SALT}/pillar.example"))["vmsfs"]
    pillar["mount"] = place.mount
    for name, vm in pillar["vms"].items():
        vm.setdefault("config", {})["env_file"] = f"{place.server.path}/{name}.sh"
    assert salt(place, pillar)
    assert place.machine("web")["API_TOKEN"] == "not set"
    wait_for(lambda: os.path.isdir(f"{place.server.path}/app-production"), "the command has run")
    assert salt(place, pillar) == []
