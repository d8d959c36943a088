#include "tree/job.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "tree/tree.h"
#include "util/cleanup.h"
#include "util/errors.h"

/* What the files of a job have in common. */

struct job *job_of(const struct node *node) {
    return node->parent->object;
}

void job_stat_init(const struct node *node, struct node_stat *ret_stat) {
    const struct job *job = job_of(node);
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, job->number + jobdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_mtim = ret_stat->st.st_ctim = job->changed;
    ret_stat->entry_seconds = 0;
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
}

int job_fail(const struct node *node, int status, const char *format, ...) {
    cleanup_buf struct buf text = {0};
    va_list args;
    va_start(args, format);
    buf_vprintf(&text, format, args);
    va_end(args);
    vm_fail(node->vm, status, "jobs/%s/%s: %s", job_of(node)->name, node->row->name,
            text.failed ? "out of memory" : text.data);
    job_keep_error(job_of(node));
    return status;
}

static void job_handle_wake(struct vm_wait *wait, int status) {
    struct job_handle *h = LIST_OWNER(wait, struct job_handle, polled);
    (void)status;
    if (h->handle.wake)
        h->handle.wake(&h->handle);
}

void job_handle_open_as(struct node *node, int flags, bool uncached, struct request *rq) {
    struct job_handle *h = calloc(1, sizeof *h);
    if (!h) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    handle_init(&h->handle, node, flags);
    h->handle.uncached = uncached;
    h->job = job_ref(job_of(node));
    list_init(&h->polled.link);
    h->polled.done = job_handle_wake;
    request_answer_opened(rq, &h->handle);
}

void job_handle_open(struct node *node, int flags, struct request *rq) {
    job_handle_open_as(node, flags, false, rq);
}

void job_handle_free(struct job_handle *h) {
    vm_wait_cancel(&h->polled);
    if (h->text.data)
        explicit_bzero(h->text.data, h->text.len);
    buf_free(&h->text);
    job_unref(h->job);
    handle_done(&h->handle);
    free(h);
}

void job_handle_release(struct handle *handle) {
    job_handle_free((struct job_handle *)handle);
}

unsigned job_poll(struct handle *handle, bool ready) {
    struct job_handle *h = (struct job_handle *)handle;
    if (ready)
        return POLLIN | POLLRDNORM;
    vm_wait_cancel(&h->polled);
    list_append(&h->job->waits, &h->polled.link);
    return 0;
}

void job_read_nothing(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    (void)handle, (void)length, (void)offset;
    request_answer_data(rq, "", 0);
}

/* ---- reads that wait ---- */

static void job_read_free(struct job_read *read) {
    vm_wait_cancel(&read->wait);
    job_unref(read->h->job);
    free(read);
}

static void job_read_progress(struct vm_wait *wait, int status) {
    struct job_read *read = LIST_OWNER(wait, struct job_read, wait);
    (void)status;
    if (read->answer(read))
        job_read_free(read);
    else
        list_append(&read->h->job->waits, &read->wait.link);
}

static void job_read_cancel(struct request *rq, int status, void *arg) {
    job_read_free(arg);
    request_answer(rq, status);
}

void job_read_wait(struct handle *handle, size_t length, off_t offset,
                   bool (*answer)(struct job_read *read), struct request *rq) {
    struct job_read now = {.rq = rq,
                           .h = (struct job_handle *)handle,
                           .length = length,
                           .offset = offset < 0 ? 0 : offset,
                           .answer = answer};
    if (answer(&now))
        return;
    if (handle->flags & O_NONBLOCK) {
        request_answer(rq, -ERR_AGAIN);
        return;
    }
    struct job_read *read = malloc(sizeof *read);
    if (!read) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    *read = now;
    read->wait.done = job_read_progress;
    job_ref(read->h->job);
    list_append(&read->h->job->waits, &read->wait.link);
    request_wait(rq, 0, job_read_cancel, read); /* a command may take its time */
}
