#!/usr/bin/python3
"""A dynamic inventory for Ansible: the VMs of a vmsfs mount.

    ansible-inventory -i vmsfs_inventory.py --graph
    VMSFS_MOUNT=~/vms ansible -i vmsfs_inventory.py running -m ansible.builtin.raw -a uptime

VMSFS_MOUNT is where vmsfs is mounted on this machine, /vms if it is not set. Every VM is in the group "vms", in the group of
its state (running, stopped, …) and in that of its backend (backend_qemu, …). What `info` says is in the variable vmsfs_info;
values of the VM's own variables are not read.
"""

import json
import os
import sys


def vms(mount):
    """What `info` says of each VM. One that is removed meanwhile is none."""
    found = {}
    for name in sorted(os.listdir(mount)):
        if not name.startswith("."):
            try:
                with open(os.path.join(mount, name, "info"), encoding="utf-8") as file:
                    found[name] = json.load(file)
            except OSError:
                continue
    return found


def host(mount, name, info):
    # Address, port, user, key and host key are all in ssh_config. Ansible splits this as a shell would.
    config = os.path.join(mount, name, "ssh_config").replace("'", "'\\''")
    return {
        "ansible_ssh_common_args": f"-F '{config}'",
        "vmsfs_mount": mount,
        "vmsfs_name": name,
        "vmsfs_info": info,
    }


def inventory(mount):
    found = vms(mount)
    groups = {"vms": {"hosts": list(found)}}
    for name, info in found.items():
        for group in (info["state"], f"backend_{info['backend']}"):
            groups.setdefault(group, {"hosts": []})["hosts"].append(name)
    return {**groups, "_meta": {"hostvars": {name: host(mount, name, info) for name, info in found.items()}}}


def main(arguments):
    mount = os.path.abspath(os.path.expanduser(os.environ.get("VMSFS_MOUNT", "/vms")))
    if not os.path.isdir(os.path.join(mount, ".new")):
        print(f"vmsfs_inventory.py: there is no vmsfs at {mount}: mount it, or set VMSFS_MOUNT", file=sys.stderr)
        return 1
    if arguments[:1] == ["--host"] and len(arguments) == 2:
        answer = inventory(mount)["_meta"]["hostvars"].get(arguments[1], {})
    elif arguments in ([], ["--list"]):
        answer = inventory(mount)
    else:
        print("Usage: vmsfs_inventory.py [--list | --host NAME]", file=sys.stderr)
        return 2
    json.dump(answer, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
