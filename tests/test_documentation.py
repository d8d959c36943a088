"""The manual pages say what there is, and nothing else: options, files and their modes, errors, fields of image.json. Both are
read from where they are (the help, the source, a mounted tree, a guest), and compared."""

import glob
import json
import os
import re
import shutil
import stat
import subprocess

import pytest

from harness import BUILD, IMAGES, ROOT, VMSFS, environment, read, read_bytes, write

SOURCES = {os.path.basename(path)[: -len(".scd")]: path for path in glob.glob(f"{ROOT}/contrib/man/*.scd")}


def plain(text):
    """scdoc without its marks: * for bold, _ for underlined at the edge of a word."""
    text = re.sub(r"(?<![A-Za-z0-9\\])_|(?<!\\)_(?![A-Za-z0-9])", "", text.replace("\\*", "\0"))
    return re.sub(r"(?<!\\)\*", "", text).replace("\0", "*").replace("\\", "")


class Page:
    def __init__(self, name):
        self.name = name
        self.source = read(SOURCES[name])
        self.sections = {}  # of # and ##: the lines below
        title = None
        for line in self.source.splitlines():
            if line.startswith("#"):
                title = line.lstrip("# ")
                assert title not in self.sections, title
                self.sections[title] = []
            elif title:
                self.sections[title].append(line)

    def terms(self, *sections):
        """The definition of each term: a line, and the indented ones below it."""
        found = {}
        for title in sections or self.sections:
            term = None
            for line in self.sections[title]:
                if line.startswith("\t"):
                    assert term, f"{self.name}, {title}: {line}"
                    found[term] += line.strip() + " "
                elif line.startswith("*") and not re.search(r"[a-z)][.,:;]$", line):
                    term = plain(line)
                    assert term not in found, f"{self.name}: {term} twice"
                    found[term] = ""
                elif line:
                    term = None
        return {term: plain(text).strip() for term, text in found.items() if text}


def same(documented, real, what):
    documented, real = set(documented), set(real)
    assert documented == real, f"{what}: only in the manual {documented - real}, only in the program {real - documented}"


def help_lines():
    """(option, help) of each that --help lists; of the two lines of a long one as well."""
    done = subprocess.run([VMSFS, "--help"], capture_output=True, text=True, check=True, env=environment(), timeout=30)
    option = None
    for line in done.stdout.splitlines():
        first = re.fullmatch(r" {4}(-\S.*?)(?: {2,}(\S.*))?", line)
        if first and first.group(2):
            yield first.groups()
        elif option and re.match(r" {20,}\S", line):
            yield option, line.strip()
        option = first.group(1) if first else None


def part_of(source, start, end):
    """The part of a source file between two marks."""
    text = read(os.path.join(ROOT, source))
    return text[text.index(start) : text.index(end, text.index(start))]


# ---- the pages themselves ----


def test_each_page_is_built():
    assert set(SOURCES) >= {"vmsfs.8", "mount.vmsfs.8", "vmsfs.5", "vmsfs-guest.7"}
    same(SOURCES, os.listdir(f"{BUILD}/man"), "pages")
    for name, path in SOURCES.items():
        assert os.stat(f"{BUILD}/man/{name}").st_mtime >= os.stat(path).st_mtime, f"{name} is older than its source"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_page_is_sound(name):
    with open(SOURCES[name], "rb") as source:
        made = subprocess.run(["scdoc"], stdin=source, capture_output=True, check=True)
    assert made.stderr == b""
    page = f"{BUILD}/man/{name}"
    lint = subprocess.run(["mandoc", "-Tlint", "-W", "warning", page], capture_output=True, text=True)
    # scdoc writes more paragraph macros than it needs.
    problems = [line for line in (lint.stdout + lint.stderr).splitlines() if "skipping paragraph macro" not in line]
    assert problems == []
    for width in ("80", "100"):
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": width, "MANROFFOPT": "-ww"}
        shown = subprocess.run(
            ["man", "--warnings", "-E", "UTF-8", "-l", page], capture_output=True, text=True, env=env, timeout=60
        )
        assert shown.returncode == 0 and shown.stderr == "", shown.stderr
        title, section = name.rsplit(".", 1)
        assert shown.stdout.startswith(f"{title}({section})")
        assert "NAME" in shown.stdout and "SEE ALSO" in shown.stdout


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_what_a_page_refers_to_is_there(name):
    refers = set(re.findall(r"\*([a-z0-9_.-]*vmsfs[a-z0-9.-]*)\*\((\d)\)", Page(name).source))
    assert {f"{title}.{section}" for title, section in refers} <= set(SOURCES)
    also = set(re.findall(r"\*([^*]+)\*\((\d)\)", " ".join(Page(name).sections["SEE ALSO"])))
    assert also and (name.rsplit(".", 1)[0], name.rsplit(".", 1)[1]) not in also


# ---- vmsfs(8) ----

OPTION_SECTIONS = ("OPTIONS", "What new VMs start with", "Options of FUSE")


def test_the_options_are_those_of_the_help():
    terms = Page("vmsfs.8").terms(*OPTION_SECTIONS)
    same(terms, [option for option, _ in help_lines()], "options")


def test_the_defaults_are_those_of_the_help():
    terms = Page("vmsfs.8").terms(*OPTION_SECTIONS)
    defaults = {option: re.search(r"\(([^()]*)\)$", text) for option, text in help_lines() if "=" in option}
    said = {o: m.group(1) for o, m in defaults.items() if m and not m.group(1).startswith("see ")}
    assert len(said) > 20
    for option, default in said.items():
        assert terms[option].endswith(f"Default: {default}."), (option, default, terms[option])
    same([o for o, text in terms.items() if "Default: " in text], said, "defaults")


def test_the_options_are_those_that_the_program_knows():
    table = part_of("src/fuse/options.c", "option_table[] = {", "FUSE_OPT_END")
    known = {f"-o {name}=" for name in re.findall(r"TEXT\((\w+)\)", table)}
    known |= {name if name[0] == "-" else f"-o {name}" for name in re.findall(r'FLAG\("([^"]+)"', table)}
    assert len(known) > 10
    said = set()
    for option in Page("vmsfs.8").terms("OPTIONS"):
        said |= {re.sub("=.*", "=", word) for word in option.split(", ")}
    same(said, known, "options")


def test_the_variables_of_the_environment_are_those_that_are_read():
    used = set()
    for path in glob.glob(f"{ROOT}/src/**/*.c", recursive=True):
        used |= set(re.findall(r'getenv\("(\w+)"\)', read(path)))
    terms = Page("vmsfs.8").terms("ENVIRONMENT")
    same([name for term in terms for name in term.split(", ")], used, "variables")


def test_the_report_of_the_doctor_is_as_described(tmp_path):
    done = subprocess.run(
        [VMSFS, "doctor", "--json", "-o", f"state={tmp_path}/s"], capture_output=True, text=True, env=environment(), timeout=60
    )
    text = "\n".join(Page("vmsfs.8").sections["DOCTOR"])
    example = re.search(r"```\n(.*?)\n```", text, re.S).group(1).replace(", ...]", "]").replace("VERSION", "1")
    told, said = json.loads(done.stdout), json.loads(example)
    same(said, told, "members of the report")
    same(said["checks"][0], told["checks"][0], "members of a check")
    assert said["schema"] == told["schema"]


# ---- vmsfs(5) ----


def files_of_the_page():
    """Path and mode of each file: `/ID/status` and 0o644."""
    found = {}
    for term in Page("vmsfs.5").terms():
        if term.startswith("/"):
            path, mode = re.fullmatch(r"(/\S*) \((\d{4})\)", term).groups()
            found[path] = int(mode, 8)
    return found


def name_of(path, names):
    """As the page has it: names that users have given are ID, NAME and KEY, and what is prepared is as in a VM."""
    parts = [names.get(part, part) for part in path.split("/")]
    if parts[1:2] == [".new"] and len(parts) > 2:
        parts[2] = "NAME"
    text = "/".join(parts) or "/"
    return re.sub(r"^/(\.defaults|\.new/NAME)(/(?:env|config|error)\b)", r"/ID\2", text)


@pytest.fixture
def tree(new_vm, mount):
    """A mount with all that there can be in it: files by their paths in the page, with their real paths."""
    vm = new_vm("documented")
    write(vm.env("A_KEY"), "value")
    os.mkdir(vm / "jobs/a-job")
    write(vm / "jobs/a-job/env/J_KEY", "value")
    prepared = mount.mount + "/.new/prepared"
    os.mkdir(prepared)
    write(prepared + "/env/P_KEY", "value")
    write(mount.mount + "/.defaults/env/D_KEY", "value")
    with pytest.raises(OSError):
        write(prepared + "/config/memory", "much")
    names = {"documented": "ID", "a-job": "NAME", "A_KEY": "KEY", "J_KEY": "KEY", "P_KEY": "KEY", "D_KEY": "KEY"}
    found = {"/": [mount.mount]}
    others = set(mount.vms()) - {"documented"}
    for where, folders, files in os.walk(mount.mount):
        if where == mount.mount:
            folders[:] = [name for name in folders if name not in others]
        for name in folders + files:
            path = os.path.join(where, name)
            found.setdefault(name_of(path.removeprefix(mount.mount), names), []).append(path)
    yield found
    shutil.rmtree(prepared)
    os.unlink(mount.mount + "/.defaults/env/D_KEY")


def test_the_files_are_those_of_the_mounted_tree(tree):
    same(files_of_the_page(), tree, "files")
    assert len(tree) > 50


def test_the_modes_are_those_of_the_mounted_tree(tree):
    documented = files_of_the_page()
    wrong = {
        path: (oct(mode), oct(documented[name]))
        for name, paths in tree.items()
        for path in paths
        if (mode := stat.S_IMODE(os.lstat(path).st_mode)) != documented[name]
    }
    assert wrong == {}, "real and documented modes"


def test_the_settings_are_those_that_there_are(tree):
    help_names = {m.group(1) for o, _ in help_lines() if (m := re.match(r"-o (\w+)=", o))}
    settings = {name.rsplit("/", 1)[1] for name in tree if name.startswith("/ID/config/")}
    assert settings <= help_names and len(settings) > 15
    in_8 = {re.match(r"-o (\w+)=", term).group(1) for term in Page("vmsfs.8").terms("What new VMs start with")}
    same(in_8, settings, "settings")
    # Which may be changed while the VM runs.
    rows = dict(re.findall(r"CONFIG_FIELD\((\w+)\)(.*?)\}", part_of("src/vm/config.c", "config_settings[C", "\n};"), re.S))
    live = {name for name, row in rows.items() if "CONFIG_LIVE" in row}
    terms = Page("vmsfs.5").terms("SETTINGS")
    said = {t.split()[0].rsplit("/", 1)[1] for t, text in terms.items() if text.endswith(" Live.")}
    same(said, live, "settings that are live")


def test_the_members_of_info_are_described(tree):
    text = Page("vmsfs.5").source
    info = json.loads(read(tree["/ID/info"][0]))
    (paragraph,) = re.findall(r"\*/info\* .*?\n((?:\t.*\n)+)", text)
    words = set(re.findall(r"\*([^*]+)\*", paragraph)) - {"kvm", "tcg"}
    # The guest of this test is one of QEMU, reached by TCP.
    others = set(re.findall(r'set_new\(info, "(\w+)"', part_of("src/vmm/rest.c", "void rest_describe(", "\n}")))
    same(words, set(info) | set(info["daemon"]) | others, "members of info")


def test_the_states_are_those_that_there_are():
    names = set(re.findall(r'= "(\w+)"', part_of("src/vm/vm.c", "vm_state_names[] = {", "};")))
    terms = Page("vmsfs.5").terms("VIRTUAL MACHINES")
    said = terms["/ID/status (0644)"].split("Takes ")[0]
    assert len(names) > 5
    for name in names:
        assert name in said


# ---- errors ----


def errors_of_the_source():
    return dict(re.findall(r"X\(\w+, (E\w+), \"([^\"]+)\"", read(f"{ROOT}/src/util/errors.h")))


def test_the_errors_are_those_of_the_table():
    terms = Page("vmsfs.5").terms("ERRORS")
    same([name for term in terms for name in term.split(", ")], errors_of_the_source(), "errors")


def test_an_error_of_a_file_is_one_of_the_table():
    page = Page("vmsfs.5")
    known = set(errors_of_the_source())
    for title, lines in page.sections.items():
        used = set(re.findall(r"\bE[A-Z0-9]{2,}\b", " ".join(lines)))
        assert used <= known, (title, used - known)
    files = " ".join(" ".join(lines) for title, lines in page.sections.items() if title != "ERRORS")
    # Each can be met somewhere: test_errors.py provokes them.
    same(re.findall(r"\bE[A-Z0-9]{2,}\b", files), known, "errors of files")


def test_every_error_that_is_used_is_in_the_table():
    used = set()
    for path in glob.glob(f"{ROOT}/src/**/*.c", recursive=True):
        used |= set(re.findall(r"fuse_reply_err\(\w+, (E[A-Z0-9]+)\)", read(path)))
    assert used and used <= set(errors_of_the_source())


# ---- vmsfs-guest(7) ----


def test_the_fields_of_image_json_are_those_that_are_read():
    source = read(f"{ROOT}/src/vm/image.c")
    fields = set(re.findall(r'json, (?:\*ret_field = )?"(\w+)"', source)) | set(
        re.findall(r'json_object_get\(json, "(\w+)"\)', source)
    )
    assert len(fields) > 8
    terms = Page("vmsfs-guest.7").terms("IMAGE.JSON")
    said = {name: text for term, text in terms.items() for name in term.split(", ")}
    for_people = {name for name, text in said.items() if text.endswith("For people.")}
    same(set(said) - for_people, fields, "fields of image.json")
    tiny = json.loads(read(f"{IMAGES}/tiny/image.json"))
    assert set(tiny) <= set(said) and for_people <= set(tiny)


def test_what_is_injected_is_what_is_described(daemon):
    one = daemon("disk=64")
    write(one.mount + "/.defaults/env/KEY", "value")
    one.boot("injected")
    image = json.loads(read(f"{IMAGES}/tiny/image.json"))
    archives = read_bytes(f"{one.state}/vms/injected/initrd")
    images = b"".join(read_bytes(f"{IMAGES}/tiny/{image[name]}") for name in ("initrd", "disk_initrd"))
    real = {}
    for archive, kind in zip(archives.split(images), "d-", strict=True):
        listing = subprocess.run(["cpio", "-tv", "--quiet"], input=archive, capture_output=True, check=True, timeout=30)
        for line in listing.stdout.decode().splitlines():
            mode, _links, owner, group, *_rest, path = line.split()
            assert (mode[0], owner, group) == (kind, "root", "root")
            bits = "".join("0" if letter == "-" else "1" for letter in mode[1:])
            real["/" + path] = f"{int(bits, 2):04o}"
    folders = {path: mode for path, mode in real.items() if any(other.startswith(path + "/") for other in real)}
    assert folders.pop("/root") == folders.pop("/root/.ssh") == "0700"
    assert set(folders.values()) == {"0755"}
    for path in ("/root", "/root/.ssh", *folders):
        del real[path]
    terms = Page("vmsfs-guest.7").terms("INJECTION")
    said = dict(re.fullmatch(r"(/\S+) \((\d{4})\)", term).groups() for term in terms)
    same(said.items(), real.items(), "injected files and their modes")


# ---- mount.vmsfs(8) ----


def test_the_options_of_the_mount_helper_are_those_that_it_takes():
    terms = Page("mount.vmsfs.8").terms("OPTIONS")
    flags = {word.split()[0] for term in terms for word in term.split(", ")}
    sources = [read(path) for path in glob.glob(f"{ROOT}/mount-helper/*.c")]
    taken = {f"-{c}" for text in sources for letters in re.findall(r'getopt\w*\([^"]*"([A-Za-z:]+)"', text) for c in letters if c != ":"}
    taken |= {word for text in sources for word in re.findall(r'strcmp\(argv\[1\], "(-\w)"\)', text)}
    same(flags, taken, "options of mount.vmsfs")
    for text in sources:
        for names in re.findall(r"names_dropped\[\] = \{(.*?)\}", text, re.S):
            for name in re.findall(r'"(\w+)"', names):
                assert name in terms["-o OPTION,..."], name
