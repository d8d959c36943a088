"""A guest that is a whole one: the kernel and the initrd that the VMM was given, emulated by QEMU, in a machine with the
devices that the VMM has, and a vsock (vhost_vsock.py). Slow, and as near as it gets where there is no KVM.

`kind` is "mmio" (Firecracker: no PCI, devices that ACPI names, a keyboard controller that resets and takes Ctrl-Alt-Del) or
"pci" (Cloud Hypervisor: PCI, and a power button).
"""

import json
import os
import socket
import subprocess
import threading

from vhost_vsock import Vsock

POWERED_OFF, RESET = "powered off", "reset"
MACHINES = {
    "mmio": ["-machine", "microvm,acpi=on,pcie=off,pit=on,pic=on,rtc=on,isa-serial=on,memory-backend=memory", "-device", "i8042"],
    "pci": ["-machine", "q35,i8042=off,memory-backend=memory"],
}
DEVICES = {"mmio": "device", "pci": "pci"}


class Machine:
    def __init__(self, folder, ended, kind):
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        self.ended = ended
        self.kind = kind
        self.started = False
        self.vsock = Vsock(os.path.join(folder, "q"), os.path.join(folder, "v"))

    def start(self, initrd, command_line, kernel, memory, disk=None):
        device = DEVICES[self.kind]
        qmp, qemu = socket.socketpair()
        argv = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", *MACHINES[self.kind],
            "-accel", "tcg,tb-size=32", "-cpu", "qemu64,+rdrand", "-m", f"{memory}M", "-kernel", kernel, "-initrd", initrd,
            # The clock of an emulated microvm is sometimes never found out.
            "-append", command_line + " tsc_early_khz=2000000",
            "-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on", "-device", f"virtio-rng-{device}",
            "-chardev", f"socket,id=vsock,path={self.folder}/q", "-device", f"vhost-user-vsock-{device},chardev=vsock",
            "-chardev", "stdio,id=serial", "-serial", "chardev:serial",
            "-chardev", f"socket,id=qmp,fd={qemu.fileno()}", "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        if disk:
            argv += ["-blockdev", f"driver=raw,node-name=disk0,file.driver=file,file.filename={disk}"]
            argv += ["-device", f"virtio-blk-{device},drive=disk0"]
        threading.Thread(target=self.vsock.run, daemon=True).start()
        # It ends with this process, whose end of the QMP socket is the only one.
        self.qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[qemu.fileno()])
        qemu.close()
        self.qmp = qmp.makefile("rw")
        self.answers = []
        self.reset = True
        self.lock = threading.Lock()
        self.tell("qmp_capabilities")
        self.started = True
        threading.Thread(target=self.read_qmp, daemon=True).start()

    def tell(self, command, **arguments):
        with self.lock:
            self.qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self.qmp.flush()

    def read_qmp(self):
        for line in self.qmp:
            event = json.loads(line)
            if event.get("event") == "SHUTDOWN":
                self.reset = event["data"]["reason"] != "guest-shutdown"
        self.qemu.wait()
        self.ended(RESET if self.reset else POWERED_OFF)

    def pause(self, paused):
        self.tell("stop" if paused else "cont")

    def press_ctrl_alt_del(self):
        self.tell("human-monitor-command", **{"command-line": "sendkey ctrl-alt-delete"})

    def press_power_button(self):
        self.tell("system_powerdown")

    def connect(self):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(os.path.join(self.folder, "v"))
        connection.sendall(b"CONNECT 22\n")
        line = b""
        while not line.endswith(b"\n"):
            part = connection.recv(1)
            if not part:
                raise ConnectionRefusedError(f"the guest does not listen there: {line!r}")
            line += part
        return connection
