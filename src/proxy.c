#include "proxy.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "util/cleanup.h"
#include "util/unix_socket.h"

#define PROXY_BLOCK 65536
#define PROXY_ANSWER_MS 5000 /* of the VMM, to the request for the port */

/* One direction. The socket never blocks: a VMM may take nothing for as long as it is not rid of
 * what it has. ssh always takes what is written to it. */
struct flow {
    int from, to;
    size_t start, end; /* what is in the block */
    bool ended, told;
    char block[PROXY_BLOCK];
};

static int proxy_fail(const char *socket, const char *why) {
    fprintf(stderr, "vmsfs: %s: %s\n", socket, why);
    return EXIT_FAILURE;
}

/* "OK NUMBER\n", byte by byte: what follows is ssh's. */
static bool proxy_is_granted(int fd) {
    char line[32] = "";
    for (size_t n = 0; n < sizeof line - 1; n++) {
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        if (poll(&wait, 1, PROXY_ANSWER_MS) <= 0 || read(fd, line + n, 1) != 1)
            return false;
        if (line[n] == '\n')
            return strncmp(line, "OK ", 3) == 0;
    }
    return false;
}

/* False: the other side takes no more. */
static bool flow_step(struct flow *flow, short in, short out) {
    if ((in & (POLLIN | POLLHUP | POLLERR)) && !flow->ended && flow->start == flow->end) {
        ssize_t n = read(flow->from, flow->block, sizeof flow->block);
        flow->ended = n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
        flow->start = 0;
        flow->end = n > 0 ? (size_t)n : 0;
    } else if ((out & (POLLOUT | POLLERR | POLLHUP)) && flow->start < flow->end) {
        ssize_t n = write(flow->to, flow->block + flow->start, flow->end - flow->start);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return false;
        flow->start += n > 0 ? (size_t)n : 0;
    }
    if (flow->ended && flow->start == flow->end && !flow->told) {
        flow->told = true;
        if (shutdown(flow->to, SHUT_WR) < 0)
            close(flow->to); /* no socket */
    }
    return true;
}

static void proxy_splice(int fd) {
    static struct flow flows[2];
    flows[0].from = STDIN_FILENO;
    flows[0].to = flows[1].from = fd;
    flows[1].to = STDOUT_FILENO;
    while (!flows[1].told) {
        struct pollfd polls[4];
        for (int i = 0; i < 2; i++) {
            bool empty = flows[i].start == flows[i].end;
            polls[2 * i] = (struct pollfd){.fd = empty && !flows[i].ended ? flows[i].from : -1,
                                           .events = POLLIN};
            polls[2 * i + 1] = (struct pollfd){.fd = empty ? -1 : flows[i].to, .events = POLLOUT};
        }
        if (poll(polls, 4, -1) < 0)
            continue;
        for (int i = 0; i < 2; i++)
            if (!flow_step(&flows[i], polls[2 * i].revents, polls[2 * i + 1].revents))
                return;
    }
}

int proxy_run(const char *path, const char *port) {
    char request[64], *end;
    unsigned long number = strtoul(port, &end, 10);
    if (*end || end == port || number > UINT32_MAX)
        return proxy_fail(port, "this is no port");
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval most = {.tv_sec = PROXY_ANSWER_MS / 1000}; /* also of connect() */
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most) < 0)
        return proxy_fail(path, strerror(errno));
    int status = unix_connect(fd, path, 0);
    if (status < 0)
        return proxy_fail(path, unix_connect_error(status));
    int length = snprintf(request, sizeof request, "CONNECT %lu\n", number);
    if (write(fd, request, (size_t)length) != length || !proxy_is_granted(fd))
        return proxy_fail(path, "the guest does not answer at this port of its vsock");
    fcntl(fd, F_SETFL, O_NONBLOCK);
    proxy_splice(fd);
    return EXIT_SUCCESS;
}
