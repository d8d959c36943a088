"""A hundred VMs on one mount."""

import os
import subprocess

import pytest

from harness import CLEAN, RUN, read, wait_for, write

COUNT = 100


def files(one):
    return len(os.listdir(f"/proc/{one.pid}/fd"))


def private_kib(one):
    """Memory of its own. What is mapped from files is read as it is used, and counts as private where no other process runs the same."""
    fields = dict(line.split(":", 1) for line in read(f"/proc/{one.pid}/smaps_rollup").splitlines()[1:])
    return int(fields["Pss_Anon"].split()[0])


def come_and_go(one, folder):
    """Makes them all at once, uses each, and destroys them."""
    names = [f"vm{i:03}" for i in range(COUNT)]
    for name in names:
        os.mkdir(one.vm(f".new/{name}"))
        write(one.vm(f".new/{name}/config/env_file"), os.path.join(folder, f"{name}.sh"))
    for name in names:
        os.rename(one.vm(f".new/{name}"), one.vm(name))
    assert sorted(one.vms()) == names
    subprocess.run(["sh", "-c", f"for f in '{one.mount}'/*/status; do echo running > \"$f\" || exit 1; done"], check=True)
    assert all(read(one.vm(f"{name}/status")) == "running\n" for name in names)
    subprocess.run(["sh", "-c", f"echo debug | tee '{one.mount}'/*/env/LEVEL >/dev/null"], check=True)
    for name in names:
        write(one.vm(f"{name}/exec"), '[ "$LEVEL" = debug ]')
        with open(os.path.join(folder, f"{name}.sh"), encoding="ascii") as f:
            assert "export LEVEL='debug'\n" in f.readlines()
    used = files(one), private_kib(one)
    for name in names:
        os.rmdir(one.vm(name))
    assert one.vms() == []
    wait_for(lambda: not one.remains(), "nothing of them is left", 30)
    return used


@pytest.mark.deadline(240)
def test_a_hundred_vms_come_and_go(sshd, daemon):
    """Without sanitizers, whose own memory would be measured."""
    server = sshd(MaxStartups=500)
    one = daemon(server.options() + ",boot_timeout=120", program=CLEAN)
    write(one.vm(".defaults/env/LEVEL"), "info\n")
    before = files(one), private_kib(one)
    folder = os.path.join(RUN.path, "many")
    os.makedirs(folder, exist_ok=True)
    used = come_and_go(one, folder)
    assert (used[1] - before[1]) / COUNT <= 64, f"{before} KiB before, {used} with {COUNT} VMs"
    wait_for(lambda: files(one) == before[0], "its files are closed", 30)
    # What libraries have set up when they were first used stays.
    wait_for(lambda: private_kib(one) - before[1] < (used[1] - before[1]) / 2, f"its memory comes back: {before} KiB before, {used} used", 20)
    first = private_kib(one)
    come_and_go(one, folder)
    wait_for(lambda: files(one) == before[0], "its files are closed", 30)
    wait_for(lambda: private_kib(one) <= first + 512, f"what is left does not grow: {first} KiB", 20)
