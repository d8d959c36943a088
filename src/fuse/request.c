#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "fuse/internal.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/daemon.h"

/* Requests: answered exactly once, at once or after a wait that has a deadline and can be
 * interrupted. */

void fuse_request_free(struct fuse_request *r) {
    if (r->cancel || !list_is_empty(&r->link)) {
        list_remove(&r->link);
        /* Locks the request list of libfuse: after this the callback is not called any more. */
        if (r->req)
            fuse_req_interrupt_func(r->req, NULL, NULL);
    }
    if (r->deadline) {
        uv_timer_stop(r->deadline);
        uv_close((uv_handle_t *)r->deadline, (uv_close_cb)free);
    }
    if (r->node)
        node_unref(r->node);
    free(r);
}

fuse_req_t fuse_request_take(struct request *rq) {
    struct fuse_request *r = (struct fuse_request *)rq;
    fuse_req_t req = r->req;
    fuse_request_free(r);
    return req;
}

static void fuse_request_status(struct request *rq, int status) {
    struct fuse_request *r = (struct fuse_request *)rq;
    if (status == 0 && r->kind == REQUEST_ATTR) {
        rq->ops->attr(rq, r->node);
        return;
    }
    if (r->removal && removal_answered(r, status))
        return;
    fuse_reply_err(fuse_request_take(rq), error_to_user(status));
}

static void fuse_request_entry(struct request *rq, struct node *node) {
    struct fuse_channel *channel = ((struct fuse_request *)rq)->channel;
    struct fuse_entry_param entry;
    inode_lookup(channel, node);
    node_to_entry(node, &entry);
    if (fuse_reply_entry(fuse_request_take(rq), &entry) < 0)
        inode_forget(channel, node, 1); /* the asker is gone: the kernel did not take it */
}

static void fuse_request_attr(struct request *rq, struct node *node) {
    struct node_stat stat;
    node->ops->stat(node, &stat);
    fuse_reply_attr(fuse_request_take(rq), &stat.st, stat.attr_seconds);
}

static void fuse_request_set_file(struct fuse_channel *channel, struct fuse_file_info *file,
                                  struct handle *handle) {
    list_append(&channel->handles, &handle->open);
    file->fh = (uint64_t)(uintptr_t)handle;
    /* Every read and write comes here, and errors come out of write(). */
    file->direct_io = 1;
    file->keep_cache = 0;
    /* Spares readers the FLUSH at close(). */
    file->noflush = (handle->flags & O_ACCMODE) == O_RDONLY;
}

static void fuse_request_opened(struct request *rq, struct handle *handle) {
    struct fuse_request *r = (struct fuse_request *)rq;
    struct fuse_file_info file = r->file;
    fuse_request_set_file(r->channel, &file, handle);
    if (fuse_reply_open(fuse_request_take(rq), &file) < 0)
        handle->ops->release(handle);
}

static void fuse_request_created(struct request *rq, struct node *node, struct handle *handle) {
    struct fuse_request *r = (struct fuse_request *)rq;
    struct fuse_channel *channel = r->channel;
    struct fuse_file_info file = r->file;
    struct fuse_entry_param entry;
    fuse_request_set_file(channel, &file, handle);
    inode_lookup(channel, node);
    node_to_entry(node, &entry);
    if (fuse_reply_create(fuse_request_take(rq), &entry, &file) < 0) {
        handle->ops->release(handle);
        inode_forget(channel, node, 1);
    }
}

static void fuse_request_data(struct request *rq, const void *data, size_t length) {
    fuse_reply_buf(fuse_request_take(rq), data, length);
}

static void fuse_request_written(struct request *rq, size_t length) {
    fuse_reply_write(fuse_request_take(rq), length);
}

void fuse_request_cancel(struct fuse_request *r, int status) {
    request_cancel *cancel = r->cancel;
    list_remove(&r->link);
    r->cancel = NULL;
    if (r->req)
        fuse_req_interrupt_func(r->req, NULL, NULL);
    cancel(&r->rq, status, r->cancel_arg);
}

static void fuse_request_deadline(uv_timer_t *timer) {
    fuse_request_cancel(timer->data, -ERR_TIMED_OUT);
}

/* Called by libfuse with its lock held, from inside the processing of FUSE_INTERRUPT: may only mark
 * and wake. */
static void fuse_request_interrupted(fuse_req_t req, void *data) {
    struct fuse_request *r = data;
    (void)req;
    r->interrupt_marked = true;
    uv_async_send(&r->channel->interrupted);
}

static bool fuse_request_set_deadline(struct fuse_request *r, unsigned timeout_ms) {
    if (!r->deadline) {
        r->deadline = malloc(sizeof *r->deadline);
        if (!r->deadline)
            return false;
        uv_timer_init(r->channel->daemon->loop, r->deadline);
        r->deadline->data = r;
    }
    uv_timer_start(r->deadline, fuse_request_deadline, timeout_ms, 0);
    return true;
}

static void fuse_request_wait(struct request *rq, unsigned timeout_ms, request_cancel *cancel,
                              void *arg) {
    struct fuse_request *r = (struct fuse_request *)rq;
    r->cancel = cancel;
    r->cancel_arg = arg;
    list_remove(&r->link); /* it may wait for one thing after another */
    list_append(&r->channel->parked, &r->link);
    if (r->deadline)
        uv_timer_stop(r->deadline);
    if (timeout_ms && !fuse_request_set_deadline(r, timeout_ms)) {
        r->interrupt_marked = true; /* it must not wait for ever */
        uv_async_send(&r->channel->interrupted);
    }
    if (r->removal)
        removal_wait(r->removal);
    /* Calls back at once when the interrupt has come already. */
    fuse_req_interrupt_func(r->req, fuse_request_interrupted, r);
}

void fuse_request_attach(struct fuse_request *r, fuse_req_t req) {
    r->req = req;
    fuse_req_interrupt_func(req, fuse_request_interrupted, r);
}

static const struct request_ops fuse_request_ops = {
    .status = fuse_request_status,
    .entry = fuse_request_entry,
    .attr = fuse_request_attr,
    .opened = fuse_request_opened,
    .created = fuse_request_created,
    .data = fuse_request_data,
    .written = fuse_request_written,
    .wait = fuse_request_wait,
};

struct fuse_request *fuse_request_new(struct fuse_channel *channel, fuse_req_t req) {
    struct fuse_request *r = calloc(1, sizeof *r);
    if (!r) {
        fuse_reply_err(req, ENOMEM);
        return NULL;
    }
    const struct fuse_ctx *ctx = fuse_req_ctx(req);
    r->rq = (struct request){
        .ops = &fuse_request_ops, .uid = ctx->uid, .gid = ctx->gid, .pid = ctx->pid};
    r->channel = channel;
    r->req = req;
    list_init(&r->link);
    channel->daemon->requests++;
    return r;
}

/* Signals that say nothing against waiting on: the kernel sends FUSE_INTERRUPT for any pending
 * signal, once a request, also when a shell's background job ends (SIGCHLD), a window changes its
 * size, or a Go runtime preempts a thread (SIGURG). Who is to be stopped (Ctrl-Z) stops when he has
 * his answer. */
#define SIGNAL_BIT(n) (UINT64_C(1) << ((n)-1))
#define HARMLESS_SIGNALS                                                                           \
    (SIGNAL_BIT(SIGCHLD) | SIGNAL_BIT(SIGWINCH) | SIGNAL_BIT(SIGURG) | SIGNAL_BIT(SIGCONT) |       \
     SIGNAL_BIT(SIGSTOP) | SIGNAL_BIT(SIGTSTP) | SIGNAL_BIT(SIGTTIN) | SIGNAL_BIT(SIGTTOU))

/* Has the asker a signal that asks it to stop waiting? Without an answer from /proc: yes. */
static bool asker_is_called_away(pid_t tid) {
    cleanup_free char *path = NULL;
    char line[256];
    uint64_t pending = 0, shared = 0, blocked = 0, ignored = 0;

    if (tid <= 0 || asprintf(&path, "/proc/%d/status", tid) < 0)
        return true;
    FILE *status = fopen(path, "re");
    if (!status)
        return true;
    while (fgets(line, sizeof line, status)) {
        sscanf(line, "SigPnd: %" SCNx64, &pending);
        sscanf(line, "ShdPnd: %" SCNx64, &shared);
        sscanf(line, "SigBlk: %" SCNx64, &blocked);
        sscanf(line, "SigIgn: %" SCNx64, &ignored);
    }
    fclose(status);
    return ((pending | shared) & ~blocked & ~ignored & ~HARMLESS_SIGNALS) != 0;
}

#define DOUBTS_MS 100

/* Looks at all that are marked, giving up those whose asker has to go. The rest is looked at again
 * soon: the kernel tells of one signal only, and of no later one. */
static void fuse_requests_look(struct fuse_channel *channel) {
    bool doubts = false;
    struct list marked, *link;
    list_init(&marked);
    for (link = channel->parked.next; link != &channel->parked;) {
        struct fuse_request *r = LIST_OWNER(link, struct fuse_request, link);
        link = link->next;
        if (r->interrupt_marked) {
            list_remove(&r->link);
            list_append(&marked, &r->link);
        }
    }
    while ((link = list_pop(&marked))) {
        struct fuse_request *r = LIST_OWNER(link, struct fuse_request, link);
        list_append(&channel->parked, &r->link);
        if (asker_is_called_away(r->rq.pid))
            fuse_request_cancel(r, -ERR_INTERRUPTED);
        else
            doubts = true;
    }
    if (doubts)
        uv_timer_start(&channel->doubts, fuse_requests_on_doubts, DOUBTS_MS, 0);
}

void fuse_requests_on_interrupt(uv_async_t *async) {
    fuse_requests_look(async->data);
}

void fuse_requests_on_doubts(uv_timer_t *timer) {
    fuse_requests_look(timer->data);
}

void fuse_requests_cancel_all(struct fuse_channel *channel, int status) {
    while (!list_is_empty(&channel->parked))
        fuse_request_cancel(LIST_OWNER(channel->parked.next, struct fuse_request, link), status);
}
