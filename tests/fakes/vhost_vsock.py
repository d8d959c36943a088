"""The host's side of a vsock for a QEMU guest, without a kernel's help: what Firecracker and Cloud Hypervisor do in
themselves. A UNIX socket takes `CONNECT PORT` and is then a connection to that port of the guest.

Speaks vhost-user with QEMU (docs/interop/vhost-user.rst in QEMU; -device vhost-user-vsock-…) and virtio-vsock (virtio 1.2,
section 5.10) with the guest's driver, which is the one that the image loads.
"""

import mmap
import os
import selectors
import socket
import struct

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE, SET_VRING_NUM, SET_VRING_ADDR = 1, 2, 3, 5, 8, 9
SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 10, 11, 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE, GET_CONFIG, SET_STATUS, GET_STATUS = 15, 16, 17, 18, 24, 39, 40
REPLY = 4
PROTOCOL_FEATURES, VERSION_1 = 1 << 30, 1 << 32
PROTOCOL_CONFIG = 1 << 9
RX, TX = 0, 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = 1, 2, 3, 4, 5, 6, 7
STREAM = 1
HEADER = struct.Struct("<QQIIIHHIII")
HOST_CID, ROOM = 2, 262144
PACKET = 3072  # less than any Linux has buffers for, with the header
NEXT, WRITE = 1, 2


class Queue:
    def __init__(self, device):
        self.device = device
        self.kick = self.call = None
        self.size = self.next = 0
        self.desc = self.used = self.avail = None

    def chain(self):
        """The next buffer of the guest: its number and its pieces, as (view, writable); or None."""
        (index,) = struct.unpack_from("<H", self.avail, 2)
        if index == self.next:
            return None
        (head,) = struct.unpack_from("<H", self.avail, 4 + 2 * (self.next % self.size))
        self.next = (self.next + 1) % 65536
        pieces, at = [], head
        while True:
            address, length, flags, following = struct.unpack_from("<QIHH", self.desc, 16 * at)
            pieces.append((self.device.guest_memory(address, length), bool(flags & WRITE)))
            if not flags & NEXT:
                return head, pieces
            at = following

    def give_back(self, head, written):
        (index,) = struct.unpack_from("<H", self.used, 2)
        struct.pack_into("<II", self.used, 4 + 8 * (index % self.size), head, written)
        struct.pack_into("<H", self.used, 2, (index + 1) % 65536)
        if self.call is not None:
            os.write(self.call, struct.pack("<Q", 1))


class Connection:
    def __init__(self, socket_, local, port):
        self.socket = socket_
        self.local, self.port = local, port
        self.granted = False
        self.out = b""  # from the guest, for the socket
        self.received = self.sent = 0  # bytes that the guest has sent, and has been sent
        self.peer_room = self.peer_taken = 0
        self.ended = self.closing = False
        self.events = 0  # what the selector waits for


class Vsock:
    """`qemu_socket`: where QEMU's chardev connects; `host_socket`: where the host connects."""

    def __init__(self, qemu_socket, host_socket, cid=3):
        self.cid = cid
        self.regions = []
        self.queues = [Queue(self), Queue(self), Queue(self)]
        self.connections = {}
        self.last_local = 1 << 30
        self.pending = []  # packets for the guest
        self.selector = selectors.DefaultSelector()
        self.qemu_listener = self.listen(qemu_socket)
        self.host_listener = self.listen(host_socket)
        self.selector.register(self.qemu_listener, selectors.EVENT_READ, self.accept_qemu)

    @staticmethod
    def listen(path):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(64)
        return listener

    def run(self):
        """Until QEMU goes."""
        self.running = True
        while self.running:
            for key, events in self.selector.select():
                key.data(events)
                self.deliver()

    # ---- vhost-user ----

    def accept_qemu(self, _events):
        self.qemu, _ = self.qemu_listener.accept()
        self.selector.register(self.qemu, selectors.EVENT_READ, self.serve_qemu)
        self.selector.register(self.host_listener, selectors.EVENT_READ, self.accept_host)

    def serve_qemu(self, _events):
        data, fds, _, _ = socket.recv_fds(self.qemu, 12, 8)
        if len(data) < 12:
            self.running = False
            return
        number, flags, size = struct.unpack("<III", data)
        payload = self.qemu.recv(size, socket.MSG_WAITALL) if size else b""
        answer = self.handle(number, payload, fds)
        if answer is not None:
            self.qemu.sendall(struct.pack("<III", number, 1 | REPLY, len(answer)) + answer)

    def handle(self, number, payload, fds):
        if number == GET_FEATURES:
            return struct.pack("<Q", PROTOCOL_FEATURES | VERSION_1)
        if number == GET_PROTOCOL_FEATURES:
            return struct.pack("<Q", PROTOCOL_CONFIG)
        if number == GET_QUEUE_NUM:
            return struct.pack("<Q", 2)
        if number == GET_CONFIG:
            offset, size, flags = struct.unpack_from("<III", payload)
            config = struct.pack("<Q", self.cid)[offset : offset + size]
            return struct.pack("<III", offset, size, flags) + config.ljust(size, b"\0")
        if number == SET_MEM_TABLE:
            (count,) = struct.unpack_from("<I", payload)
            self.regions = []
            for i in range(count):
                guest, size, user, offset = struct.unpack_from("<QQQQ", payload, 8 + 32 * i)
                memory = memoryview(mmap.mmap(fds[i], size + offset))[offset:]
                self.regions.append((guest, user, size, memory))
                os.close(fds[i])
        elif number == SET_VRING_NUM:
            index, size = struct.unpack("<II", payload)
            self.queues[index].size = size
        elif number == SET_VRING_ADDR:
            index, _, desc, used, avail, _ = struct.unpack("<IIQQQQ", payload)
            queue = self.queues[index]
            queue.desc, queue.used, queue.avail = (self.user_memory(address) for address in (desc, used, avail))
        elif number == SET_VRING_BASE:
            index, base = struct.unpack("<II", payload)
            self.queues[index].next = base
        elif number == GET_VRING_BASE:
            (index, _) = struct.unpack("<II", payload)
            queue = self.queues[index]
            if queue.kick is not None:
                self.selector.unregister(queue.kick)
                os.close(queue.kick)
                queue.kick = None
            return struct.pack("<II", index, queue.next)
        elif number in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
            (value,) = struct.unpack("<Q", payload)
            queue = self.queues[value & 0xFF]
            if number == SET_VRING_KICK and fds:
                queue.kick = fds[0]
                self.selector.register(queue.kick, selectors.EVENT_READ, lambda _e, q=queue: self.kicked(q))
            elif number == SET_VRING_CALL and fds:
                queue.call = fds[0]
        return None

    def guest_memory(self, address, length):
        for guest, _, size, memory in self.regions:
            if guest <= address < guest + size:
                return memory[address - guest : address - guest + length]
        raise ValueError(f"no memory of the guest at {address:#x}")

    def user_memory(self, address):
        for _, user, size, memory in self.regions:
            if user <= address < user + size:
                return memory[address - user :]
        raise ValueError(f"no memory at {address:#x}")

    # ---- virtio-vsock ----

    def kicked(self, queue):
        os.read(queue.kick, 8)
        if queue is self.queues[TX]:
            while buffer := queue.chain():
                head, pieces = buffer
                packet = b"".join(bytes(piece) for piece, writable in pieces if not writable)
                queue.give_back(head, 0)
                self.take(packet)

    def send(self, connection, operation, data=b"", flags=0):
        header = HEADER.pack(
            HOST_CID, self.cid, connection.local, connection.port, len(data), STREAM, operation, flags, ROOM, connection.received & 0xFFFFFFFF
        )
        self.pending.append(header + data)

    def deliver(self):
        queue = self.queues[RX]
        while self.pending and queue.avail is not None and queue.kick is not None:
            buffer = queue.chain()
            if not buffer:
                return
            head, pieces = buffer
            packet = self.pending.pop(0)
            written = 0
            for piece, writable in pieces:
                part = packet[written : written + len(piece)] if writable else b""
                piece[: len(part)] = part
                written += len(part)
            assert written == len(packet), "a buffer of the guest that is too small"
            queue.give_back(head, written)

    def take(self, packet):
        fields = HEADER.unpack_from(packet)
        _, _, source, target, length, _, operation, flags, room, taken = fields
        connection = self.connections.get((target, source))
        if not connection:
            if operation != RST:
                self.send(Connection(None, target, source), RST)
            return
        connection.peer_room, connection.peer_taken = room, taken
        if operation == RESPONSE:
            connection.granted = True
            connection.out += f"OK {connection.local}\n".encode()
        elif operation == RW:
            connection.received += length
            connection.out += packet[HEADER.size : HEADER.size + length]
            self.send(connection, CREDIT_UPDATE)
        elif operation == CREDIT_REQUEST:
            self.send(connection, CREDIT_UPDATE)
        elif operation == RST or (operation == SHUTDOWN and flags & 2):
            connection.closing = True
            if operation == SHUTDOWN:
                self.send(connection, RST)
        self.watch(connection)

    # ---- the host ----

    def accept_host(self, _events):
        host, _ = self.host_listener.accept()
        line = b""
        while not line.endswith(b"\n") and len(line) < 32:
            part = host.recv(1)
            if not part:
                break
            line += part
        words = line.split()
        if len(words) != 2 or words[0] != b"CONNECT":
            host.close()
            return
        host.setblocking(False)
        self.last_local += 1
        connection = Connection(host, self.last_local, int(words[1]))
        self.connections[connection.local, connection.port] = connection
        self.send(connection, REQUEST)

    def room(self, connection):
        return connection.peer_room - ((connection.sent - connection.peer_taken) & 0xFFFFFFFF)

    def watch(self, connection):
        """Waits for what can be gone on with; closes what is over."""
        if connection.closing and not connection.out:
            if connection.events:
                self.selector.unregister(connection.socket)
            connection.socket.close()
            del self.connections[connection.local, connection.port]
            return
        reads = connection.granted and not connection.ended and self.room(connection) > 0
        events = (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if connection.out else 0)
        if events == connection.events:
            return
        if connection.events:
            self.selector.unregister(connection.socket)
        if events:
            self.selector.register(connection.socket, events, lambda e, c=connection: self.serve(c, e))
        connection.events = events

    def serve(self, connection, events):
        if (connection.local, connection.port) not in self.connections:
            return  # closed since this was found
        try:
            if events & selectors.EVENT_WRITE and connection.out:
                connection.out = connection.out[connection.socket.send(connection.out) :]
            if events & selectors.EVENT_READ and connection.granted and not connection.ended:
                data = connection.socket.recv(min(PACKET - HEADER.size, self.room(connection)))
                if data:
                    connection.sent += len(data)
                    self.send(connection, RW, data)
                else:
                    connection.ended = True
                    self.send(connection, SHUTDOWN, flags=3)
        except BlockingIOError:
            pass
        except OSError:
            connection.closing, connection.out = True, b""
            self.send(connection, RST)
        self.watch(connection)

