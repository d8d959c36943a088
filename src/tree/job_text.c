#include <string.h>

#include "tree/job.h"
#include "tree/text.h"
#include "util/cleanup.h"
#include "util/errors.h"

/* jobs/NAME/argv and jobs/NAME/command: what is to be run, and its start. What is written until the
 * file is closed for good (RELEASE) belongs together, whichever processes have written it; then it
 * starts. An fsync(2) or a rename onto it starts it at once. RELEASE has no answer, and a shell
 * does not look at that of close(): so all that can be known to be wrong is said to the WRITE, and
 * to each close() once more. */

static bool text_is_words(const struct node_row *row) {
    return strcmp(row->name, "argv") == 0;
}

static void text_stat_job(const struct node *node, struct node_stat *ret_stat) {
    const struct job *job = job_of(node);
    job_stat_init(node, ret_stat);
    if (job->words == text_is_words(node->row))
        ret_stat->st.st_size = (off_t)job->text.len;
}

/* Can a job be started now, with this text? */
static int text_check(const struct node *node, const char *data, size_t length) {
    struct job *job = job_of(node);
    bool words = text_is_words(node->row);
    if (job->removed)
        return -ERR_GONE;
    if (job->command)
        return job_fail(node, -ERR_BUSY, "this job has been started already; a job runs once");
    if (length > COMMAND_LIMIT)
        return job_fail(node, -ERR_COMMAND_TOO_LARGE, "a command takes %d bytes at most",
                        COMMAND_LIMIT);
    if (!words && memchr(data, 0, length))
        return job_fail(node, -ERR_INVALID, "a command holds no NUL byte; argv takes such a list");
    if (words && length && (data[0] == '\0' || data[0] == '-'))
        return job_fail(node, -ERR_INVALID,
                        "the first word is the program: it is not empty and starts with no -");
    int r = vm_check_running(node->vm);
    if (r < 0)
        job_keep_error(job);
    return r;
}

/* Starts the job with what `text` holds, which is taken over. */
static int text_commit(const struct node *node, struct buf *text) {
    struct job *job = job_of(node);
    bool words = text_is_words(node->row);
    int r = text_check(node, text->data ? text->data : "", text->len);
    if (r < 0)
        return r;
    if (!words || !memchr(text->data, 0, text->len)) /* `echo ls > argv` */
        while (text->len && text->data[text->len - 1] == '\n')
            text->data[--text->len] = '\0';
    if (words && text->len && text->data[text->len - 1] != '\0')
        buf_append_char(text, '\0');
    if (words && !text->len)
        return job_fail(node, -ERR_INVALID, "there is no word in it");
    if (text->failed)
        return -ERR_NO_MEMORY;
    buf_free(&job->text);
    job->text = *text;
    job->words = words;
    *text = (struct buf){0};
    int started = job_start(job);
    if (started < 0)
        job_keep_error(job);
    return started;
}

static void text_read_job(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    const struct job *job = ((struct job_handle *)handle)->job;
    static const struct buf none = {0};
    buf_answer_read(job->words == text_is_words(handle->node->row) ? &job->text : &none, length,
                    offset, rq);
}

static void text_write(struct handle *handle, const char *data, size_t length, off_t offset,
                       struct request *rq) {
    struct job_handle *h = (struct job_handle *)handle;
    (void)offset;
    buf_append(&h->text, data, length);
    int r = h->text.failed
                ? -ERR_NO_MEMORY
                : text_check(handle->node, h->text.data ? h->text.data : "", h->text.len);
    if (r < 0) {
        buf_free(&h->text);
        request_answer(rq, r);
    } else {
        request_answer_written(rq, length);
    }
}

static void text_fsync(struct handle *handle, struct request *rq) {
    struct job_handle *h = (struct job_handle *)handle;
    int r = h->text.len ? text_commit(handle->node, &h->text) : 0;
    buf_free(&h->text);
    request_answer(rq, r);
}

/* Perhaps of a copy of the descriptor, with more to come by another. */
static void text_flush(struct handle *handle, struct request *rq) {
    struct job_handle *h = (struct job_handle *)handle;
    int r = 0;
    if (h->text.len) {
        r = text_check(handle->node, h->text.data, h->text.len);
        if (r == 0 && (r = job_check(h->job)) < 0)
            job_keep_error(h->job);
    }
    request_answer(rq, r);
}

/* What does not start now will not: who waits for its end is told so. */
static void text_release_job(struct handle *handle) {
    struct job_handle *h = (struct job_handle *)handle;
    struct job *job = h->job;
    int r = h->text.len && !job->removed ? text_commit(handle->node, &h->text) : 0;
    if (r < 0 && !job->command && !job->removed &&
        (job->leased || (r != -ERR_BUSY && r != -ERR_INVALID)))
        job_refuse(job, r);
    job_handle_free(h);
}

int job_text_take(struct node *dir, const struct node_row *row, const char *data, size_t length) {
    const struct node file = {.parent = dir, .row = row, .vm = dir->vm};
    cleanup_buf struct buf text = {0};
    buf_append(&text, data, length);
    return text.failed ? -ERR_NO_MEMORY : text_commit(&file, &text);
}

const struct node_ops job_text_ops = {
    .stat = text_stat_job,
    .open = job_handle_open,
    .read = text_read_job,
    .write = text_write,
    .flush = text_flush,
    .fsync = text_fsync,
    .release = text_release_job,
    .setattr = node_setattr_ignore,
};
