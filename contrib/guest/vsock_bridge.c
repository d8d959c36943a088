/* In the guest: hands connections that come to port 22 of the vsock on to the SSH server, at port
 * 22 of 127.0.0.1. It listens when the command returns, and prints the number of the process that
 * goes on with it.
 *
 * contrib/guest/tiny compiles it with Debian's tcc, without any library, so that it is a few KiB in
 * an image that lives in memory: hence the system calls of Linux on x86_64, by number. */

enum {
    SYS_read = 0,
    SYS_write = 1,
    SYS_close = 3,
    SYS_poll = 7,
    SYS_rt_sigaction = 13,
    SYS_dup2 = 33,
    SYS_socket = 41,
    SYS_connect = 42,
    SYS_shutdown = 48,
    SYS_bind = 49,
    SYS_listen = 50,
    SYS_setsockopt = 54,
    SYS_fork = 57,
    SYS_exit = 60,
    SYS_fcntl = 72,
    SYS_setsid = 112,
    SYS_accept4 = 288,
};

enum { EINTR = 4, EAGAIN = 11 };
enum {
    AF_INET = 2,
    AF_VSOCK = 40,
    SOCK_STREAM = 1,
    SOCK_NONBLOCK = 04000,
    SHUT_WR = 1,
    F_SETFL = 4
};
enum { IPPROTO_TCP = 6, TCP_NODELAY = 1, SIGCHLD = 17, SIG_IGN = 1 };
enum { POLLIN = 1, POLLOUT = 4, POLLERR = 8, POLLHUP = 16 };
enum { PORT = 22, BACKLOG = 128, BLOCK = 65536 };

struct address_vsock {
    unsigned short family, reserved;
    unsigned port, cid;
    unsigned char flags, zero[3];
};

struct address_inet {
    unsigned short family;
    unsigned char port[2], address[4], zero[8];
};

struct poll {
    int fd;
    short events, revents;
};

/* As the kernel has it (struct kernel_sigaction). */
struct action {
    unsigned long handler, flags, restorer, mask;
};

/* The number and up to five arguments; the result is negative for an error. */
long call(long number, long a, long b, long c, long d, long e);
__asm__(".text\n"
        ".globl call\n"
        "call:\n"
        "    mov %rdi, %rax\n"
        "    mov %rsi, %rdi\n"
        "    mov %rdx, %rsi\n"
        "    mov %rcx, %rdx\n"
        "    mov %r8, %r10\n"
        "    mov %r9, %r8\n"
        "    syscall\n"
        "    ret\n"
        ".globl _start\n"
        "_start:\n"
        "    and $-16, %rsp\n"
        "    call bridge\n");

/* One direction. */
struct flow {
    int from, to;
    long start, end; /* what is in the block */
    int ended;       /* nothing more comes */
    int told;        /* and the other side knows */
    char block[BLOCK];
};

static struct flow flows[2];

static void leave(int status) {
    for (;;)
        call(SYS_exit, status, 0, 0, 0, 0);
}

/* Moves what can be moved; what one side has closed is closed to the other, in that direction. */
static void flow_step(struct flow *f, int readable, int writable) {
    if (readable && !f->ended && f->start == f->end) {
        long n = call(SYS_read, f->from, (long)f->block, BLOCK, 0, 0);
        if (n > 0) {
            f->start = 0;
            f->end = n;
            writable = 1;
        } else if (n != -EAGAIN && n != -EINTR) {
            f->ended = 1;
        }
    }
    if (writable && f->start < f->end) {
        long n = call(SYS_write, f->to, (long)(f->block + f->start), f->end - f->start, 0, 0);
        if (n > 0)
            f->start += n;
        else if (n != -EAGAIN && n != -EINTR)
            leave(0);
    }
    if (f->ended && f->start == f->end && !f->told) {
        call(SYS_shutdown, f->to, SHUT_WR, 0, 0, 0);
        f->told = 1;
    }
}

static void relay(int guest, int host) {
    struct poll polls[2];
    flows[0].from = flows[1].to = guest;
    flows[1].from = flows[0].to = host;
    while (!flows[0].told || !flows[1].told) {
        for (int i = 0; i < 2; i++) {
            struct flow *in = &flows[i], *out = &flows[1 - i];
            polls[i].events = (!in->ended && in->start == in->end ? POLLIN : 0) |
                              (out->start < out->end ? POLLOUT : 0);
            /* One that waits for nothing would be reported without end once it has hung up. */
            polls[i].fd = polls[i].events ? in->from : -1;
            polls[i].revents = 0;
        }
        if (call(SYS_poll, (long)polls, 2, -1, 0, 0) < 0)
            continue;
        for (int i = 0; i < 2; i++) {
            int in = polls[i].revents, out = polls[1 - i].revents;
            flow_step(&flows[i], in & (POLLIN | POLLERR | POLLHUP), out & (POLLOUT | POLLERR));
        }
    }
    leave(0);
}

static void serve(int host) {
    struct address_inet address;
    int on = 1;
    int guest = (int)call(SYS_socket, AF_INET, SOCK_STREAM, 0, 0, 0);
    for (unsigned i = 0; i < sizeof address; i++)
        ((char *)&address)[i] = 0;
    address.family = AF_INET;
    address.port[1] = PORT;
    address.address[0] = 127;
    address.address[3] = 1;
    if (guest < 0 || call(SYS_connect, guest, (long)&address, sizeof address, 0, 0) < 0)
        leave(1);
    call(SYS_setsockopt, guest, IPPROTO_TCP, TCP_NODELAY, (long)&on, sizeof on);
    call(SYS_fcntl, guest, F_SETFL, SOCK_NONBLOCK, 0,
         0); /* behind connect(), which is waited for */
    relay(guest, host);
}

static void print_number(long number) {
    char text[24];
    int at = sizeof text;
    text[--at] = '\n';
    do
        text[--at] = (char)('0' + number % 10);
    while (number /= 10);
    call(SYS_write, 1, (long)(text + at), (long)sizeof text - at, 0, 0);
}

void bridge(void) {
    struct address_vsock address;
    struct action action = {SIG_IGN, 0, 0, 0};
    int listener = (int)call(SYS_socket, AF_VSOCK, SOCK_STREAM, 0, 0, 0);
    address.family = AF_VSOCK;
    address.reserved = 0;
    address.port = PORT;
    address.cid = ~0u; /* any */
    address.flags = address.zero[0] = address.zero[1] = address.zero[2] = 0;
    if (listener < 0 || call(SYS_bind, listener, (long)&address, sizeof address, 0, 0) < 0 ||
        call(SYS_listen, listener, BACKLOG, 0, 0, 0) < 0)
        leave(1);
    long child = call(SYS_fork, 0, 0, 0, 0, 0);
    if (child) {
        if (child > 0)
            print_number(child);
        leave(child < 0);
    }
    call(SYS_setsid, 0, 0, 0, 0, 0);
    call(SYS_dup2, 2, 1, 0, 0, 0); /* whoever reads the number waits for the end of the output */
    call(SYS_rt_sigaction, SIGCHLD, (long)&action, 0, 8, 0); /* no zombies */
    for (;;) {
        int host = (int)call(SYS_accept4, listener, 0, 0, SOCK_NONBLOCK, 0);
        if (host < 0)
            continue;
        if (call(SYS_fork, 0, 0, 0, 0, 0) == 0) {
            call(SYS_close, listener, 0, 0, 0, 0);
            serve(host);
        }
        call(SYS_close, host, 0, 0, 0, 0);
    }
}
