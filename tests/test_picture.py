"""contrib/session.svg is what contrib/picture draws today."""

import os
import subprocess
import xml.etree.ElementTree

import pytest

from harness import IMAGES, ROOT, VMSFS, mount_line, processes_with, read, sanitizer_environment, wait_for
from tools_env import environment

PICTURE = os.path.join(ROOT, "contrib/picture")
SVG = "{http://www.w3.org/2000/svg}"


def draw(folder, *options):
    return subprocess.run(
        [PICTURE, "--vmsfs", VMSFS, "--images", IMAGES, "--output", f"{folder}/session.svg", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False,
        env=environment(TMPDIR=str(folder), HOME=str(folder), **sanitizer_environment()),
    )  # fmt: skip


def lines(path):
    """The text of a picture, without the times that it notes."""
    root = xml.etree.ElementTree.parse(path).getroot()
    assert root.tag == SVG + "svg"
    return ["".join(text.itertext()) for text in root.iter(SVG + "text") if text.get("class") != "time"]


def nothing_is_left(folder):
    wait_for(lambda: not processes_with(str(folder)), "the daemon and its VM end")
    assert not mount_line("/vms") and [name for name in os.listdir(folder) if name.startswith("vmsfs-picture.")] == []


@pytest.mark.deadline(240)
def test_the_picture_shows_what_the_commands_print_today(tmp_path):
    before = os.path.exists("/vms")
    done = draw(tmp_path)
    assert done.returncode == 0, done
    drawn = lines(f"{tmp_path}/session.svg")
    committed = lines(os.path.join(ROOT, "contrib/session.svg"))
    assert drawn == committed, "contrib/picture draws it anew"
    commands = [line for line in committed if line.startswith("$ ")]
    assert len(commands) > 10 and len(commands) < len(committed)
    text = read(os.path.join(ROOT, "contrib/session.svg"))
    assert str(tmp_path) not in text and ROOT not in text and "vmsfs-picture" not in text
    assert os.path.exists("/vms") == before
    nothing_is_left(tmp_path)


def test_nothing_is_drawn_when_the_session_does_not_go_as_it_should(tmp_path):
    hasty = tmp_path / "hasty"
    hasty.write_text(f'#!/bin/sh\nexec {VMSFS} "$@" -o boot_timeout=1\n')
    hasty.chmod(0o755)
    done = draw(tmp_path, "--vmsfs", str(hasty))
    assert done.returncode == 1 and "picture: status 1, not 0: echo running > /vms/web/status" in done.stderr, done
    assert "web could not be reached by SSH within 1 s" in done.stderr, done
    done = draw(tmp_path, "--vmsfs", "/bin/false")
    assert done.returncode == 1 and "/bin/false does not mount" in done.stderr, done
    done = draw(tmp_path, "--vmsfs", f"{tmp_path}/none")
    assert done.returncode == 1 and f"there is no program {tmp_path}/none" in done.stderr, done
    assert not os.path.exists(f"{tmp_path}/session.svg")
    nothing_is_left(tmp_path)
