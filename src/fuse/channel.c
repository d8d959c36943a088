#include "fuse/channel.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fuse/internal.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/daemon.h"

/* The session: /dev/fuse as one more descriptor of the loop.
 *
 * libfuse's own loops put a thread to sleep in each request that waits. Here the descriptor is
 * non-blocking, a request is taken in, and whatever has to wait is an object (request.c), so any
 * number of them wait at no cost. */

/* So that a flood of requests leaves room for the rest of the loop. */
#define CHANNEL_BATCH 64

void fuse_channel_lost(struct fuse_channel *channel) {
    if (!channel->mounted)
        return;
    channel->mounted = false;
    uv_poll_stop(&channel->poll);
    if (channel->ended)
        channel->ended(channel->daemon);
}

static void fuse_channel_readable(uv_poll_t *poll, int status, int events) {
    struct fuse_channel *channel = poll->data;
    (void)status;
    (void)events;
    for (int i = 0; i < CHANNEL_BATCH && channel->mounted; i++) {
        int n = fuse_session_receive_buf(channel->session, &channel->buffer);
        if (n == -EINTR)
            continue;
        if (n == -EAGAIN)
            return;
        if (n <= 0) { /* 0: unmounted (ENODEV) */
            fuse_channel_lost(channel);
            return;
        }
        fuse_session_process_buf(channel->session, &channel->buffer);
        if (fuse_session_exited(channel->session)) {
            fuse_channel_lost(channel);
            return;
        }
    }
}

/* What libfuse has said about the options. */
static struct buf channel_said;

static __attribute__((format(printf, 2, 0))) void channel_listen(enum fuse_log_level level,
                                                                 const char *format, va_list args) {
    (void)level;
    buf_vprintf(&channel_said, format, args);
}

/* What it says later is for the log: the starting process has no stderr to it any more. */
static __attribute__((format(printf, 2, 0))) void channel_log(enum fuse_log_level level,
                                                              const char *format, va_list args) {
    cleanup_buf struct buf text = {0};
    buf_vprintf(&text, format, args);
    size_t length = text.len;
    while (length && text.data[length - 1] == '\n')
        length--;
    if (length)
        log_write(level <= FUSE_LOG_ERR       ? LOG_LEVEL_ERROR
                  : level <= FUSE_LOG_WARNING ? LOG_LEVEL_WARNING
                                              : LOG_LEVEL_DEBUG,
                  "%.*s", (int)length, text.data);
}

/* It names what it does not know or cannot read; where to look is for us to say. */
static void channel_explain(void) {
    const char *said = channel_said.len ? channel_said.data : "out of memory";
    if (strncmp(said, "fuse: ", 6) == 0)
        said += 6;
    fprintf(stderr, "vmsfs: %.*s; vmsfs -h lists them\n", (int)strcspn(said, "\n"), said);
}

struct fuse_channel *fuse_channel_new(struct daemon *d, int argc, char **argv, struct node *root) {
    struct fuse_channel *channel = calloc(1, sizeof *channel);
    if (!channel)
        return NULL;
    struct fuse_args args = FUSE_ARGS_INIT(argc, argv);
    channel->daemon = d;
    RB_INIT(&channel->inodes);
    list_init(&channel->parked);
    list_init(&channel->removals);
    list_init(&channel->handles);
    list_init(&channel->dirs);
    list_init(&channel->traces);
    channel->last_inode = FUSE_ROOT_ID;
    fuse_set_log_func(channel_listen);
    channel->session = fuse_session_new(&args, &fuse_channel_ops, sizeof fuse_channel_ops, channel);
    fuse_set_log_func(NULL);
    if (!channel->session)
        channel_explain();
    else if (channel_said.len)
        fputs(channel_said.data, stderr);
    buf_free(&channel_said);
    fuse_opt_free_args(&args);
    if (!channel->session) {
        free(channel);
        return NULL;
    }
    inode_lookup(channel, root);
    return channel;
}

int fuse_channel_mount(struct fuse_channel *channel, const char *mountpoint,
                       void (*ended)(struct daemon *d)) {
    uv_loop_t *loop = channel->daemon->loop;
    channel->ended = ended;
    presence_prepare(channel, mountpoint);
    if (fuse_session_mount(channel->session, mountpoint) != 0)
        return -ERR_IO;
    fuse_set_log_func(channel_log);
    int fd = fuse_session_fd(channel->session);
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    int r = trace_start(channel);
    if (r == 0)
        r = uv_poll_init(loop, &channel->poll, fd);
    if (r < 0)
        return r;
    channel->poll.data = channel;
    uv_async_init(loop, &channel->interrupted, fuse_requests_on_interrupt);
    channel->interrupted.data = channel;
    uv_timer_init(loop, &channel->doubts);
    channel->doubts.data = channel;
    channel->mounted = channel->fd_open = true;
    presence_start(channel);
    return uv_poll_start(&channel->poll, UV_READABLE, fuse_channel_readable);
}

void fuse_channel_on_ready(struct fuse_channel *channel, void (*ready)(struct daemon *d)) {
    channel->ready = ready;
}

void fuse_channel_unmount(struct fuse_channel *channel) {
    presence_stop(channel);
    if (!channel->fd_open)
        return;
    channel->mounted = channel->fd_open = false;
    fuse_requests_cancel_all(channel, -ERR_GONE);
    removals_free_all(channel);
    handles_release_all(channel);
    uv_poll_stop(&channel->poll);
    uv_close((uv_handle_t *)&channel->poll, NULL);
    uv_close((uv_handle_t *)&channel->interrupted, NULL);
    uv_close((uv_handle_t *)&channel->doubts, NULL);
    if (channel->left) /* what is mounted there now is another's: libfuse would unmount that */
        close(fuse_session_fd(channel->session));
    else
        fuse_session_unmount(channel->session);
}

static struct fuse_session *session_left; /* not freed, see below */

void fuse_channel_free(struct fuse_channel *channel) {
    if (!channel)
        return;
    trace_free_all(channel);
    inode_forget_all(channel);
    if (channel->left) /* its descriptor has been closed; the process is about to end */
        session_left = channel->session;
    else
        fuse_session_destroy(channel->session);
    free(channel->buffer.mem);
    free(channel);
}

void fuse_channel_print_options(void) {
    fuse_lowlevel_help();
}
