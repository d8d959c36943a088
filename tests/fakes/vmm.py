"""What the two fakes have in common: a REST interface on a UNIX socket that is checked against the published specification,
a vsock that is another UNIX socket, and a guest (guest.py).

"guest": "machine" makes it a whole guest, in QEMU (machine.py), instead.

Their folder, given by the wrapper that the tests put into PATH, holds:

    spec.json    the specification
    faults       JSON, what to do wrong: {"PUT /boot-source": "400"}; looked at at each request, "vsock" at each connection
    violations   what the daemon has done wrong, a line each: any fails the test. It is refused as well, as the real ones do
    requests     each request, as METHOD PATH and its body
    guests/      of each process

Faults: "400" (an error of this VMM's kind), "500", "text" (an error in plain words), "hang", "die", "end" (in order), "die after" (the answer),
"garbage" (no HTTP), "no json", "flood" (an answer without end), "half" (of an answer), "slow" (byte by byte), "late" (1 s), "ignore"
(says yes and does nothing). "crowded", as "start" or, once the guest was reached, as "vsock": more wait for a connection than it
takes. "PUT /actions" has the action behind it: "PUT /actions InstanceStart".
"events": "many" (before the one of a reset) or "halves" (of that one).
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from guest import POWERED_OFF, RESET, Guest  # noqa: E402
from spec import Spec  # noqa: E402

__all__ = ["POWERED_OFF", "RESET", "Refusal", "Vmm", "run"]

REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}
LONGEST_PATH = 107


class Refusal(Exception):
    """What the real one would say no to: a status and words."""

    def __init__(self, status, *words):
        super().__init__(status, words)
        self.status = status
        self.words = words


class Vmm:
    """A fake is a subclass: it has `server`, `options`, error_body() and handle()."""

    server = None
    unknown = 400  # status for what it has not
    machine = None  # of machine.py
    crowding = False
    vsock_acknowledge = b"OK 1073741824\n"

    def __init__(self, folder):
        # Behind a colon, what is `/` to one that is jailed.
        folder, _, self.root = folder.partition(":")
        self.folder = folder
        self.spec = Spec(os.path.join(folder, "spec.json"))
        self.lock = threading.Lock()
        self.go = threading.Event()
        self.go.set()
        place = os.path.join(folder, "guests", str(os.getpid()))
        if self.fault("guest") == "machine":
            from machine import Machine

            self.guest = Machine(place, self.guest_ended, self.machine)
        else:
            self.guest = Guest(place, self.guest_ended)

    # ---- what the tests are told ----

    def note_violation(self, text):
        with open(os.path.join(self.folder, "violations"), "a", encoding="utf-8") as f:
            f.write(f"{type(self).__name__} {os.getpid()}: {text}\n")

    def note(self, text):
        with open(os.path.join(self.folder, "requests"), "a", encoding="utf-8") as f:
            f.write(text + "\n")

    def fault(self, what):
        try:
            with open(os.path.join(self.folder, "faults"), encoding="utf-8") as f:
                return json.load(f).get(what)
        except FileNotFoundError:
            return None

    def violation(self, *texts):
        for text in texts:
            self.note_violation(text)
        raise Refusal(400, *texts)

    # ---- to be used by the subclasses ----

    def inside(self, path):
        return self.root + path

    def listen(self, path):
        if self.root:  # a long path, which is a short one in the jail
            os.chdir(self.root)
            path = os.path.relpath(path, "/")
        if len(os.fsencode(path)) > LONGEST_PATH:
            self.violation(f"the path of a socket has more than {LONGEST_PATH} bytes: {path}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(128)
        return listener

    def crowd(self, listener, what, full=None):
        """As long as this fault is "crowded", more wait there than it takes. `full` is told when that is so."""
        others = []
        self.crowding = True
        listener.listen(0)
        while self.fault(what) == "crowded":
            other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            other.setblocking(False)
            try:
                other.connect(listener.getsockname())
                others.append(other)
            except BlockingIOError:
                other.close()
                if full:
                    full.set()
                time.sleep(0.02)
        if full:
            full.set()
        for other in others:
            other.close()
        listener.listen(128)
        self.crowding = False

    def require(self, condition, text):
        if not condition:
            self.violation(text)

    def require_file(self, path, start=b""):
        try:
            with open(self.inside(path), "rb") as f:
                self.require(f.read(len(start)) == start, f"{path} does not begin with {start!r}")
        except OSError as error:
            raise Refusal(400, f"Failed to open {path}: {error}") from error

    def start_vsock(self, path):
        threading.Thread(target=self.serve_vsock, args=(self.listen(path),), daemon=True).start()

    def end(self, status):
        os._exit(status)

    def guest_ended(self, how):
        raise NotImplementedError

    # ---- the API ----

    def serve(self, path):
        if self.fault("start") == "hang":
            while True:
                time.sleep(3600)
        if self.fault("start") == "die":
            print("fake: it cannot start today", file=sys.stderr)
            self.end(1)
        if self.fault("start") == "no kvm":
            print("fake: Cannot open /dev/kvm: No such device", file=sys.stderr)
            self.end(1)
        time.sleep(0.5 if self.fault("start") == "late" else 0)
        listener = self.listen(path)
        self.crowd(listener, "start")
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    while self.serve_one(connection):
                        pass
                except Refusal as refusal:  # of what cannot be read as a request
                    connection.sendall(self.print_answer(refusal.status, self.error_body(refusal.words)))
                except (ConnectionError, EOFError):
                    pass

    def read_request(self, connection):
        data = b""
        while b"\r\n\r\n" not in data:
            part = connection.recv(65536)
            if not part:
                if data:
                    self.note_violation(f"a request that ends in the middle: {data!r}")
                raise EOFError
            data += part
            self.require(len(data) < 65536, "a request without end")
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        method, path, version = first.split(" ")
        self.require(version == "HTTP/1.1", f"{first}: the version")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(fields.get("content-length", "0"))
        while len(body) < length:
            part = connection.recv(65536)
            if not part:
                raise EOFError
            body += part
        self.require(len(body) == length, f"{first}: {len(body)} bytes of body, not {length}")
        self.require("transfer-encoding" not in fields, f"{first}: chunks, which neither of them understands")
        self.require("expect" not in fields, f"{first}: it asks for permission to send the body")
        self.require("host" in fields, f"{first}: without Host")
        if body:
            self.require(fields.get("content-type") == "application/json", f"{first}: {fields.get('content-type')}")
        return method, path, body

    def serve_one(self, connection):
        method, path, body = self.read_request(connection)
        name = f"{method} {path.removeprefix(self.spec.base)}"
        self.note(f"{method} {path} {body.decode(errors='replace')}")
        problems = self.spec.check_request(method, path, body)
        for problem in problems:
            self.note_violation(problem)
        if path == "/actions" and not problems:
            name += " " + json.loads(body)["action_type"]
        fault = self.fault(name)
        if fault == "hang":
            while connection.recv(65536):
                pass
            return False
        if fault == "die":
            print("fake: it dies in the middle", file=sys.stderr)
            self.end(1)
        if fault == "end":
            self.end(0)
        if fault == "garbage":
            connection.sendall(b"\x00\xff\x01 this is no HTTP\n" * 10)
            return False
        if fault == "late":
            time.sleep(1)
        if fault in ("400", "500"):
            status, answer = int(fault), self.error_body(["the fake was told to refuse", "as it was asked to"])
        elif fault == "ignore":
            status, answer = 204, None
        elif fault == "text":
            status, answer = 500, "plain words about what is wrong\x1b[31m"
        elif problems:
            status = 400 if self.spec.operation(method, path) else self.unknown
            answer = self.error_body(problems)
        else:
            status, answer = self.answer(method, path, body)
        if fault == "no json":
            status, answer = 200, "<html>"
        data = self.print_answer(status, answer)
        if fault == "flood":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
            while True:
                connection.sendall(b'"again",' * 8192)
        if fault == "half":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            return False
        if fault == "slow":
            for i in range(len(data)):
                connection.sendall(data[i : i + 1])
                time.sleep(0.001)
        else:
            connection.sendall(data)
        if fault == "die after":
            self.end(1)
        return True

    def answer(self, method, path, body):
        _, template, parts = self.spec.operation(method, path)
        try:
            value = self.handle(method, template, parts, json.loads(body) if body else None)
        except Refusal as refusal:
            return refusal.status, self.error_body(refusal.words)
        status = 204 if value is None else 200
        for problem in self.spec.check_answer(method, path, status, value):
            self.note_violation(problem)
        return status, value

    def print_answer(self, status, value):
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nServer: {self.server}\r\nConnection: keep-alive\r\n"
        if value is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(text.encode())}\r\n"
        return (head + "\r\n" + text).encode()

    # ---- the vsock ----

    def serve_vsock(self, listener):
        while True:
            if not select.select([listener], [], [], 0.1)[0] or self.crowding:
                time.sleep(0.02 if self.crowding else 0)
                continue
            connection, _ = listener.accept()
            threading.Thread(target=self.serve_vsock_connection, args=(connection, listener), daemon=True).start()

    def serve_vsock_connection(self, host, listener):
        fault = self.fault("vsock")
        line = b""
        with host:
            while not line.endswith(b"\n"):
                part = host.recv(1)
                if not part or len(line) > 31:
                    if line:
                        self.note_violation(f"the vsock was asked for {line + part!r}")
                    return
                line += part
            if line != b"CONNECT 22\n":
                self.note_violation(f"the vsock was asked for {line!r}")
                return
            if fault == "refuse" or not self.guest.started:
                return
            if fault == "garbage":
                host.sendall(b"\xff" * 100)
                return
            if fault == "hang":
                host.recv(1)
                return
            self.go.wait()  # a guest that stands still accepts nothing
            try:
                guest = self.guest.connect()
            except OSError:
                return  # nobody listens there: the connection is closed, as the real ones do
            if fault == "crowded":
                full = threading.Event()
                threading.Thread(target=self.crowd, args=(listener, "vsock", full), daemon=True).start()
                full.wait()
            with guest:
                for byte in self.vsock_acknowledge:
                    host.sendall(bytes([byte]))
                    if fault == "slow":
                        time.sleep(0.01)
                splice(host, guest)


def splice(one, other):
    """Each way until its end, and no further than both sides go."""
    ways = {one: other, other: one}
    waiting = {one: b"", other: b""}  # for whom
    for end in ways:
        end.setblocking(False)
    while ways or any(waiting.values()):
        readers = [end for end, to in ways.items() if not waiting[to]]
        writers = [end for end, data in waiting.items() if data]
        readable, writable, _ = select.select(readers, writers, [])
        try:
            for end in readable:
                to = ways[end]
                waiting[to] = end.recv(262144)
                if not waiting[to]:
                    del ways[end]
                    to.shutdown(socket.SHUT_WR)
            for end in writable:
                waiting[end] = waiting[end][end.send(waiting[end]) :]
        except BlockingIOError:
            pass
        except OSError:
            return


def run(vmm_class, argv):
    """argv: the folder, then what the real one would be called with."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    folder, *arguments = argv
    if "--version" in arguments:
        print(vmm_class.version, flush=True)
        return
    options = {}
    names = iter(arguments)
    for name in names:
        if name not in vmm_class.options:
            print(f"error: unexpected argument {name}", file=sys.stderr)
            sys.exit(2)
        options[name] = next(names)
    vmm = vmm_class(folder)
    try:
        vmm.main(options)
    except Refusal as refusal:  # of its command line
        print(f"error: {': '.join(refusal.words)}", file=sys.stderr)
        vmm.end(1)
