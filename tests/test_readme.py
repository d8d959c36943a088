"""Every example of README.md that is a shell script is run, in their order, on one mount."""

import os
import re
import subprocess

import pytest

from harness import BUILD, IMAGES, ROOT, environment, read

# What the examples say on stderr when all is well.
EXPECTED = re.compile(r"Invalid argument$|Remote I/O error$|Removing leading|^vmsfs: |^$")


def examples():
    text = read(os.path.join(ROOT, "README.md"))
    found = []
    for part in re.split(r"^#+ ", text, flags=re.M)[1:]:
        title = part.splitlines()[0]
        found += [(title, block) for block in re.findall(r"^```sh\n(.*?)^```", part, flags=re.M | re.S)]
    return found


@pytest.mark.deadline(300)
def test_the_examples_of_readme_work(daemon, tmp_path):
    one = daemon()
    data = tmp_path / "data/vmsfs"
    data.mkdir(parents=True)
    (data / "images").symlink_to(IMAGES)
    env = environment({"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")})
    env["PATH"] = BUILD + ":" + env["PATH"]
    ran = 0
    for title, block in examples():
        if "web.example" in block:  # a machine that is not there
            continue
        script = block.replace("/vms", one.mount).replace("/tmp/verbose" + one.mount, "/tmp/verbose-vms")
        script = script.replace("/tmp/verbose-", f"{tmp_path}/verbose-")
        web = one.vm("web")
        makes_web = re.search(r"^mkdir \S*/web\s", script, re.M)
        if not makes_web and not os.path.isdir(web):
            script = f"mkdir {web}; echo running > {web}/status\n" + script
        elif makes_web and os.path.isdir(web):
            os.rmdir(web)
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        surprises = [line for line in done.stderr.splitlines() if not EXPECTED.search(line)]
        assert not surprises, f"{title}: {block}\n{done.stdout}\n{done.stderr}\n{[read(one.vm(n) + '/error') for n in one.vms()]}"
        assert done.returncode == 0, f"{title}: {block}\n{done.stderr}"
        ran += 1
    assert ran > 15
