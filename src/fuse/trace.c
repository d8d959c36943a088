#include <errno.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuse/internal.h"
#include "util/cleanup.h"
#include "util/log.h"

/* One line for each request in the log: what, on which file, the result, how long it took.
 *
 * The bytes from and to the kernel are looked at as they pass, so that whatever answers a request
 * need not know of this. Names go to the log, and what is read and written never does. */

struct trace {
    struct list link; /* in channel->traces */
    uint64_t unique;
    uint64_t since; /* ns */
    uint32_t pid;
    const struct trace_kind *kind;
    struct buf subject; /* of what */
};

/* Operations, with the place of a name behind the header (linux/fuse.h). */
#define NO_NAME (-1)
static const struct trace_kind {
    uint32_t opcode;
    const char *text;
    int name;    /* offset in what follows the header; NO_NAME: there is none */
    bool silent; /* has no answer */
} trace_kinds[] = {
    {FUSE_LOOKUP, "LOOKUP", 0, false},
    {FUSE_FORGET, "FORGET", NO_NAME, true},
    {FUSE_GETATTR, "GETATTR", NO_NAME, false},
    {FUSE_SETATTR, "SETATTR", NO_NAME, false},
    {FUSE_SYMLINK, "SYMLINK", 0, false},
    {FUSE_MKNOD, "MKNOD", sizeof(struct fuse_mknod_in), false},
    {FUSE_MKDIR, "MKDIR", sizeof(struct fuse_mkdir_in), false},
    {FUSE_UNLINK, "UNLINK", 0, false},
    {FUSE_RMDIR, "RMDIR", 0, false},
    {FUSE_RENAME, "RENAME", sizeof(struct fuse_rename_in), false},
    {FUSE_LINK, "LINK", sizeof(struct fuse_link_in), false},
    {FUSE_OPEN, "OPEN", NO_NAME, false},
    {FUSE_READ, "READ", NO_NAME, false},
    {FUSE_WRITE, "WRITE", NO_NAME, false},
    {FUSE_STATFS, "STATFS", NO_NAME, false},
    {FUSE_RELEASE, "RELEASE", NO_NAME, false},
    {FUSE_FSYNC, "FSYNC", NO_NAME, false},
    {FUSE_SETXATTR, "SETXATTR", NO_NAME, false},
    {FUSE_GETXATTR, "GETXATTR", NO_NAME, false},
    {FUSE_LISTXATTR, "LISTXATTR", NO_NAME, false},
    {FUSE_REMOVEXATTR, "REMOVEXATTR", NO_NAME, false},
    {FUSE_FLUSH, "FLUSH", NO_NAME, false},
    {FUSE_INIT, "INIT", NO_NAME, false},
    {FUSE_OPENDIR, "OPENDIR", NO_NAME, false},
    {FUSE_READDIR, "READDIR", NO_NAME, false},
    {FUSE_RELEASEDIR, "RELEASEDIR", NO_NAME, false},
    {FUSE_ACCESS, "ACCESS", NO_NAME, false},
    {FUSE_CREATE, "CREATE", sizeof(struct fuse_create_in), false},
    {FUSE_INTERRUPT, "INTERRUPT", NO_NAME, true},
    {FUSE_DESTROY, "DESTROY", NO_NAME, false},
    {FUSE_IOCTL, "IOCTL", NO_NAME, false},
    {FUSE_POLL, "POLL", NO_NAME, false},
    {FUSE_BATCH_FORGET, "BATCH_FORGET", NO_NAME, true},
    {FUSE_FALLOCATE, "FALLOCATE", NO_NAME, false},
    {FUSE_READDIRPLUS, "READDIRPLUS", NO_NAME, false},
    {FUSE_RENAME2, "RENAME2", sizeof(struct fuse_rename2_in), false},
    {FUSE_LSEEK, "LSEEK", NO_NAME, false},
    {0, "OTHER", NO_NAME, false},
};

static const struct trace_kind *trace_kind_find(uint32_t opcode) {
    const struct trace_kind *kind = trace_kinds;
    while (kind->opcode && kind->opcode != opcode)
        kind++;
    return kind;
}

static void trace_print_path(const struct node *node, struct buf *out) {
    if (!node->parent)
        return;
    trace_print_path(node->parent, out);
    buf_printf(out, "/%s", node->name);
}

/* The path of a node, and of a name in it. */
static void trace_print_node(struct fuse_channel *channel, uint64_t id, const char *name,
                             struct buf *out) {
    const struct node *node = inode_find(channel, id);
    size_t before = out->len;
    if (node)
        trace_print_path(node, out);
    else if (id)
        buf_append_str(out, "(forgotten)");
    if (name)
        buf_printf(out, "/%s", name);
    if (out->len == before)
        buf_append_char(out, '/');
}

static void trace_free(struct trace *trace) {
    list_remove(&trace->link);
    buf_free(&trace->subject);
    free(trace);
}

static struct trace *trace_find(struct fuse_channel *channel, uint64_t unique) {
    for (struct list *link = channel->traces.prev; link != &channel->traces; link = link->prev) {
        struct trace *trace = LIST_OWNER(link, struct trace, link);
        if (trace->unique == unique)
            return trace;
    }
    return NULL;
}

static void trace_print_interrupted(struct fuse_channel *channel, const char *body, size_t length,
                                    struct buf *out) {
    struct fuse_interrupt_in interrupt;
    const struct trace *trace = NULL;
    if (length >= sizeof interrupt) {
        memcpy(&interrupt, body, sizeof interrupt);
        trace = trace_find(channel, interrupt.unique);
    }
    if (trace && !trace->subject.failed)
        buf_printf(out, "of %s %s", trace->kind->text, trace->subject.data);
    else
        buf_append_str(out, "of what has been answered");
}

/* `body` has `length` bytes, which the kernel has ended with a NUL where a name is. */
static void trace_print_subject(struct fuse_channel *channel, const struct fuse_in_header *header,
                                const char *body, size_t length, struct trace *trace) {
    const struct trace_kind *kind = trace->kind;
    if (kind->opcode == FUSE_INTERRUPT) {
        trace_print_interrupted(channel, body, length, &trace->subject);
        return;
    }
    if (kind->opcode == FUSE_BATCH_FORGET) {
        buf_append_str(&trace->subject, "of several");
        return;
    }
    const char *name = kind->name >= 0 && (size_t)kind->name < length ? body + kind->name : NULL;
    trace_print_node(channel, header->nodeid, name, &trace->subject);
    if (!name || (kind->opcode != FUSE_RENAME && kind->opcode != FUSE_RENAME2))
        return;
    uint64_t new_dir; /* both begin with it */
    const char *new_name = name + strlen(name) + 1;
    memcpy(&new_dir, body, sizeof new_dir);
    buf_append_str(&trace->subject, " to ");
    trace_print_node(channel, new_dir, new_name < body + length ? new_name : NULL, &trace->subject);
}

static void trace_begin(struct fuse_channel *channel, const char *data, size_t length) {
    struct fuse_in_header header;
    struct trace *trace;
    if (length < sizeof header || !(trace = calloc(1, sizeof *trace)))
        return;
    memcpy(&header, data, sizeof header);
    trace->unique = header.unique;
    trace->pid = header.pid;
    trace->since = uv_hrtime();
    trace->kind = trace_kind_find(header.opcode);
    trace_print_subject(channel, &header, data + sizeof header, length - sizeof header, trace);
    list_append(&channel->traces, &trace->link);
    if (trace->kind->silent) {
        log_debug("%s %s", trace->kind->text, trace->subject.failed ? "?" : trace->subject.data);
        trace_free(trace);
    }
}

static void trace_print_result(const struct trace *trace, const struct fuse_out_header *header,
                               const struct iovec *body, struct buf *out) {
    struct fuse_write_out written;
    if (header->error) {
        const char *name = strerrorname_np(-header->error);
        buf_printf(out, "%s", name ? name : strerror(-header->error));
    } else if (trace->kind->opcode == FUSE_READ) {
        buf_printf(out, "%zu bytes", header->len - sizeof *header);
    } else if (trace->kind->opcode == FUSE_WRITE && body && body->iov_len >= sizeof written) {
        memcpy(&written, body->iov_base, sizeof written);
        buf_printf(out, "%u bytes", written.size);
    } else {
        buf_append_str(out, "ok");
    }
}

static void trace_end(struct fuse_channel *channel, const struct iovec *iov, int count) {
    struct fuse_out_header header;
    cleanup_buf struct buf result = {0};
    if (count < 1 || iov->iov_len < sizeof header)
        return;
    memcpy(&header, iov->iov_base, sizeof header);
    struct trace *trace = header.unique ? trace_find(channel, header.unique) : NULL;
    if (!trace) /* a notification */
        return;
    trace_print_result(trace, &header, count > 1 ? iov + 1 : NULL, &result);
    log_debug("%s %s: %s, %.3f ms, process %u", trace->kind->text,
              trace->subject.failed ? "?" : trace->subject.data, result.failed ? "?" : result.data,
              (double)(uv_hrtime() - trace->since) / 1e6, trace->pid);
    trace_free(trace);
}

static ssize_t trace_read(int fd, void *data, size_t size, void *userdata) {
    ssize_t n = read(fd, data, size);
    int error = errno;
    if (n > 0)
        trace_begin(userdata, data, (size_t)n);
    errno = error;
    return n;
}

static ssize_t trace_write(int fd, struct iovec *iov, int count, void *userdata) {
    ssize_t n = writev(fd, iov, count);
    int error = errno;
    trace_end(userdata, iov, count);
    errno = error;
    return n;
}

int trace_start(struct fuse_channel *channel) {
    static const struct fuse_custom_io io = {.read = trace_read, .writev = trace_write};
    if (!log_is_on(LOG_LEVEL_DEBUG))
        return 0;
    return fuse_session_custom_io(channel->session, &io, fuse_session_fd(channel->session));
}

void trace_free_all(struct fuse_channel *channel) {
    while (!list_is_empty(&channel->traces))
        trace_free(LIST_OWNER(channel->traces.next, struct trace, link));
}
