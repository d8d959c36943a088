#include <errno.h>
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/un.h>
#include <unistd.h>

#include "ssh/internal.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/unix_socket.h"

/* RFC 4250, 4.1.2 */
#define SSH_MSG_CHANNEL_OPEN_CONFIRMATION 91
#define SSH_MSG_CHANNEL_REQUEST 98

static uint32_t read_u32(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static LIBSSH2_ALLOC_FUNC(transport_alloc_memory) {
    (void)abstract;
    return malloc(count);
}

static LIBSSH2_REALLOC_FUNC(transport_realloc_memory) {
    (void)abstract;
    return realloc(ptr, count);
}

/* RFC 4254, 6.10: byte SSH_MSG_CHANNEL_REQUEST, uint32 channel, string "exit-status" or
 * "exit-signal", boolean FALSE, and the status or signal. */
static void transport_note_exit(struct transport *t, const uint8_t *packet, size_t length) {
    if (length < 25 || read_u32(packet + 5) != 11 ||
        (memcmp(packet + 9, "exit-status", 11) != 0 && memcmp(packet + 9, "exit-signal", 11) != 0))
        return;
    for (struct list *l = t->wires.next; l != &t->wires; l = l->next) {
        struct wire *wire = LIST_OWNER(l, struct wire, link);
        if (wire->id_known && wire->id == read_u32(packet + 1))
            wire->exit_arrived = true;
    }
}

/* libssh2 tells nobody when an exit status arrives, and its exit status is 0 before. But it frees
 * each packet that it has dealt with by this function, which is ours by libssh2_session_init_ex(),
 * and the packet is still whole. Only packets begin with these bytes: file names, keys and banners
 * do not, and channel data is inside packets of another type. Should a later libssh2 free them
 * otherwise, no channel's id becomes known either, and channel_exit() falls back to the status at
 * the end. */
static LIBSSH2_FREE_FUNC(transport_free_memory) {
    struct transport *t = *abstract;
    const uint8_t *packet = ptr;
    size_t length = ptr ? malloc_usable_size(ptr) : 0;
    if (t && !t->dead && length >= 17) {
        if (packet[0] == SSH_MSG_CHANNEL_REQUEST) {
            transport_note_exit(t, packet, length);
        } else if (packet[0] == SSH_MSG_CHANNEL_OPEN_CONFIRMATION) {
            t->newest_id = read_u32(packet + 1);
            t->newest_known = true;
        }
    }
    free(ptr);
}

static LIBSSH2_RECV_FUNC(transport_receive) {
    struct transport *t = *abstract;
    (void)socket;
    if (t->dead)
        return -ECONNRESET;
    /* After the end of the stream libssh2 would refuse to hand out what it has queued: it is told
     * only that nothing more has come, and the session looks at t->error. During the handshake,
     * which waits for an answer that will not come, it must be told. */
    if (t->error)
        return t->allowance == SIZE_MAX ? -ECONNRESET : -EAGAIN;
    if (!t->allowance)
        return -EAGAIN;
    if (length > t->allowance)
        length = t->allowance;
    ssize_t n;
    do
        n = recv(t->fd, buffer, length, flags | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n > 0) {
        t->heard = uv_now(t->loop);
        t->answered = true;
        if (t->allowance != SIZE_MAX)
            t->allowance -= (size_t)n;
        return n;
    }
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return -EAGAIN;
    t->error = n < 0 ? errno : ECONNRESET;
    return t->allowance == SIZE_MAX ? -t->error : -EAGAIN;
}

/* Takes everything, always: libssh2 demands that a send that would have blocked is repeated, with
 * the same bytes, before anything else is sent, which several channels cannot promise. */
static LIBSSH2_SEND_FUNC(transport_send) {
    struct transport *t = *abstract;
    (void)socket;
    (void)flags;
    if (t->dead)
        return (ssize_t)length;
    buf_append(&t->out, buffer, length);
    return t->out.failed ? -ENOMEM : (ssize_t)length;
}

static LIBSSH2_DISCONNECT_FUNC(transport_note_disconnect) {
    struct transport *t = *abstract;
    (void)session;
    (void)reason;
    (void)language;
    (void)language_len;
    size_t length = 0;
    for (int i = 0; message && i < message_len && length < sizeof t->farewell - 1; i++)
        t->farewell[length++] = message[i] < ' ' || message[i] > '~' ? '?' : message[i];
    t->farewell[length] = '\0';
}

static void transport_set_callbacks(struct transport *t) {
#if LIBSSH2_VERSION_NUM >= 0x010b01
    libssh2_session_callback_set2(t->ssh, LIBSSH2_CALLBACK_SEND,
                                  (libssh2_cb_generic *)transport_send);
    libssh2_session_callback_set2(t->ssh, LIBSSH2_CALLBACK_RECV,
                                  (libssh2_cb_generic *)transport_receive);
    libssh2_session_callback_set2(t->ssh, LIBSSH2_CALLBACK_DISCONNECT,
                                  (libssh2_cb_generic *)transport_note_disconnect);
#else
    libssh2_session_callback_set(t->ssh, LIBSSH2_CALLBACK_SEND, (void *)transport_send);
    libssh2_session_callback_set(t->ssh, LIBSSH2_CALLBACK_RECV, (void *)transport_receive);
    libssh2_session_callback_set(t->ssh, LIBSSH2_CALLBACK_DISCONNECT,
                                 (void *)transport_note_disconnect);
#endif
}

/* A LIBSSH2_SESSION is 52 KiB of packet buffers that libssh2 fills with zeros, and small packets
 * use but their beginnings. The pages that are zeros go back to the kernel, which gives zeros for
 * them when they are touched. */
static void transport_shrink(LIBSSH2_SESSION *ssh) {
    static const char zeros[4096];
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t at = ((uintptr_t)ssh + page - 1) / page * page;
    uintptr_t end = (uintptr_t)ssh + malloc_usable_size(ssh);
    if (page != sizeof zeros)
        return;
    for (; at + page <= end; at += page)
        if (memcmp((const void *)at, zeros, page) == 0)
            madvise((void *)at, page, MADV_DONTNEED);
}

int transport_init(struct transport *t, uv_loop_t *loop) {
    static bool initialised;
    if (!initialised && libssh2_init(0) != 0)
        return -ENOMEM;
    initialised = true;
    *t = (struct transport){.loop = loop, .fd = -1};
    list_init(&t->wires);
    t->ssh = libssh2_session_init_ex(transport_alloc_memory, transport_free_memory,
                                     transport_realloc_memory, t);
    if (!t->ssh)
        return -ENOMEM;
    transport_shrink(t->ssh);
    libssh2_session_set_blocking(t->ssh, 0);
    transport_set_callbacks(t);
    return 0;
}

int transport_open(struct transport *t, const struct ssh_target *target) {
    cleanup_close int fd =
        socket(target->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    int on = 1;
    /* Without it a small packet waits for the acknowledgement of the one before, 40 ms. */
    if (target->address.ss_family != AF_UNIX &&
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        return -errno;
    t->fd = fd;
    fd = -1;
    transport_connect(t, target);
    return 0;
}

static void transport_connect_locally(struct transport *t, const struct ssh_target *target) {
    const struct sockaddr_un *address = (const struct sockaddr_un *)(const void *)&target->address;
    int status = unix_connect(t->fd, address->sun_path, target->peer);
    t->crowded = status == -EAGAIN;
    t->farewell[0] = '\0';
    if (status < 0)
        snprintf(t->farewell, sizeof t->farewell, "%s", unix_connect_error(status));
    if (status < 0 && !t->crowded)
        t->error = -status;
}

void transport_connect(struct transport *t, const struct ssh_target *target) {
    if (target->address.ss_family == AF_UNIX)
        transport_connect_locally(t, target);
    else if (connect(t->fd, (const struct sockaddr *)&target->address, target->address_length) <
                 0 &&
             errno != EINPROGRESS)
        t->error = errno;
}

void transport_ask(struct transport *t, unsigned vsock_port) {
    buf_printf(&t->out, "CONNECT %u\n", vsock_port);
}

/* Its line is read byte by byte: behind it comes what the guest says, which is libssh2's. */
int transport_hear(struct transport *t) {
    while (!t->error) {
        char c;
        ssize_t n = recv(t->fd, &c, 1, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return -EAGAIN;
        if (n > 0 && c == '\n')
            return memcmp(t->grant, "OK ", 3) == 0 ? 0 : -ECONNREFUSED;
        if (n <= 0 || t->grant_length == sizeof t->grant)
            break;
        t->grant[t->grant_length++] = c;
    }
    return -ECONNREFUSED;
}

void transport_flush(struct transport *t) {
    while (transport_has_output(t) && !t->mute) {
        ssize_t n = send(t->fd, t->out.data + t->out_sent, t->out.len - t->out_sent,
                         MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            t->out_sent += (size_t)n;
            continue;
        }
        if (errno == EAGAIN || errno == EWOULDBLOCK)
            break;
        if (errno != EINTR)
            t->mute = true;
    }
    if (t->mute)
        t->out_sent = t->out.len;
    if (!transport_has_output(t) && t->out.cap > 0) {
        /* An idle VM keeps no buffer. */
        if (t->out.cap > 4096)
            buf_free(&t->out);
        else
            buf_clear(&t->out);
        t->out_sent = 0;
    } else if (t->out_sent > OUTPUT_MAX) {
        buf_consume(&t->out, t->out_sent);
        t->out_sent = 0;
    }
    if (t->out.failed && !t->error)
        t->error = ENOMEM;
}

void transport_free(struct transport *t, void (*resume)(void *arg), void *arg) {
    t->dead = true;
    if (t->ssh) {
        if (resume)
            resume(arg);
        /* Nothing can block any more, so this ends; the bound is for a libssh2 that thinks
         * otherwise. */
        for (int i = 0; i < 1000 && libssh2_session_free(t->ssh) == LIBSSH2_ERROR_EAGAIN; i++)
            ;
    }
    t->ssh = NULL;
    struct list *l;
    while ((l = list_pop(&t->wires))) {
        struct wire *wire = LIST_OWNER(l, struct wire, link);
        if (wire->channel)
            wire->channel->wire = NULL;
        free(wire);
    }
    buf_free(&t->out);
    t->out_sent = 0;
    if (t->fd >= 0)
        close(t->fd);
    t->fd = -1;
}

const char *transport_error(struct transport *t) {
    char *message = NULL;
    if (t->farewell[0])
        return t->farewell;
    if (t->error)
        return t->error == ECONNRESET ? "the server closed the connection" : strerror(t->error);
    if (t->ssh)
        libssh2_session_last_error(t->ssh, &message, NULL, 0);
    return message && *message ? message : "no reason given";
}
