#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "tree/guest_wait.h"
#include "tree/job.h"
#include "tree/output.h"
#include "tree/text.h"
#include "util/cleanup.h"
#include "util/errors.h"

/* jobs/NAME/stdin, stdout, stderr and exit. */

/* ---- stdout, stderr: every reader has them from the start, and waits for more ---- */

static struct spool *stream_spool(const struct node *node) {
    struct command *command = job_of(node)->command;
    if (!command)
        return NULL;
    return strcmp(node->row->name, "stderr") == 0 ? &command->err : &command->out;
}

/* The kernel may have asked for the size before the end. */
#define STREAM_SETTLED_S 2

static void stream_open(struct node *node, int flags, struct request *rq) {
    const struct job *job = job_of(node);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const struct spool *spool = stream_spool(node);
    bool whole = spool && job->command->end != COMMAND_RUNNING &&
                 output_size(job->command, spool) == (off_t)spool->end;
    job_handle_open_as(node, flags, !whole || now.tv_sec - job->changed.tv_sec < STREAM_SETTLED_S,
                       rq);
}

static void stream_stat(const struct node *node, struct node_stat *ret_stat) {
    const struct spool *spool = stream_spool(node);
    job_stat_init(node, ret_stat);
    ret_stat->st.st_size = output_size(job_of(node)->command, spool);
}

static bool stream_answer(struct job_read *read) {
    struct job *job = read->h->job;
    struct spool *spool = stream_spool(read->h->handle.node);
    uint64_t position = (uint64_t)read->offset;
    if (!spool) {
        if (job->removed)
            request_answer_data(read->rq, "", 0);
        return job->removed;
    }
    if (!output_answer_read(job->command, spool, &position, read->length, read->rq))
        return false;
    read->h->position = position;
    return true;
}

static void stream_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    job_read_wait(handle, length, offset, stream_answer, rq);
}

static unsigned stream_poll(struct handle *handle) {
    struct job_handle *h = (struct job_handle *)handle;
    const struct spool *spool = stream_spool(handle->node);
    return job_poll(handle, h->job->removed || job_has_ended(h->job) ||
                                (spool && (spool->end > h->position || spool->cut)));
}

const struct node_ops job_stream_ops = {
    .stat = stream_stat,
    .open = stream_open,
    .read = stream_read,
    .poll = stream_poll,
    .release = job_handle_release,
    .setattr = node_setattr_ignore,
};

/* ---- exit: waits for the end ---- */

static void exit_stat(const struct node *node, struct node_stat *ret_stat) {
    const struct job *job = job_of(node);
    cleanup_buf struct buf text = {0};
    job_stat_init(node, ret_stat);
    if (job_has_ended(job))
        job_print_exit(job, &text);
    ret_stat->st.st_size = text.len ? (off_t)text.len : 1; /* see output_size() */
}

static void exit_open(struct node *node, int flags, struct request *rq) {
    job_handle_open_as(node, flags, true, rq);
}

static bool exit_answer(struct job_read *read) {
    const struct job *job = read->h->job;
    cleanup_buf struct buf text = {0};
    if (!job_has_ended(job) && !(job->removed && !job->command))
        return false;
    job_print_exit(job, &text);
    buf_answer_read(&text, read->length, read->offset, read->rq);
    return true;
}

static void exit_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    job_read_wait(handle, length, offset, exit_answer, rq);
}

static unsigned exit_poll(struct handle *handle) {
    const struct job *job = ((struct job_handle *)handle)->job;
    return job_poll(handle, job_has_ended(job) || job->removed);
}

const struct node_ops job_exit_ops = {
    .stat = exit_stat,
    .open = exit_open,
    .read = exit_read,
    .poll = exit_poll,
    .release = job_handle_release,
    .setattr = node_setattr_ignore,
};

/* ---- stdin: a pipe; when the last writer has closed it, it is at its end ---- */

static void stdin_open(struct node *node, int flags, struct request *rq) {
    if ((flags & O_ACCMODE) != O_RDONLY)
        job_open_input(job_of(node));
    job_handle_open(node, flags, rq);
}

static void stdin_release(struct handle *handle) {
    struct job_handle *h = (struct job_handle *)handle;
    if ((handle->flags & O_ACCMODE) != O_RDONLY)
        job_close_input(h->job);
    job_handle_free(h);
}

/* What was waited for is room for more: the bytes themselves have been taken, also when the wait
 * was cut short. */
static void stdin_written(void *arg, int status, struct request *rq) {
    (void)status;
    request_answer_written(rq, (size_t)(uintptr_t)arg);
}

static void stdin_write(struct handle *handle, const char *data, size_t length, off_t offset,
                        struct request *rq) {
    struct job_handle *h = (struct job_handle *)handle;
    int status;
    (void)offset;
    bool full = job_write_input(h->job, data, length, &status);
    if (status < 0) {
        request_answer(rq, status);
    } else if (!full) {
        request_answer_written(rq, length);
    } else {
        struct vm_wait *wait =
            guest_wait(handle->node, NULL, stdin_written, (void *)(uintptr_t)length, rq);
        if (wait)
            list_append(&h->job->input_waits, &wait->link);
    }
}

const struct node_ops job_stdin_ops = {
    .stat = job_stat_init,
    .open = stdin_open,
    .read = job_read_nothing,
    .write = stdin_write,
    .release = stdin_release,
    .setattr = node_setattr_ignore,
};
