#include <ctype.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tree/guest_wait.h"
#include "tree/job.h"
#include "tree/text.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/number.h"

/* jobs/NAME/cwd, timeout, … and status: one value a file. What is written counts from the next
 * start; but the timeout of a job that runs can be changed, counted from its start. */

#define VALUE_LIMIT (PATH_MAX + 1)
#define VALUE_TIMEOUT_MOST 31536000.0 /* s */

struct job_value {
    const char *name;
    void (*print)(const struct job *job, struct buf *out);
    /* NUL-terminated, without the newline; empty: the default again. NULL: only read. */
    int (*set)(const struct node *node, struct job *job, const char *text);
    bool any_time;
};

static void cwd_print(const struct job *job, struct buf *out) {
    if (job->folder)
        buf_append_str(out, job->folder);
}

static int cwd_set(const struct node *node, struct job *job, const char *text) {
    if (*text && (*text != '/' || strlen(text) >= PATH_MAX))
        return job_fail(node, -ERR_INVALID,
                        "takes the absolute path of a directory in the guest, or nothing for where "
                        "a login starts");
    char *folder = *text ? strdup(text) : NULL;
    if (*text && !folder)
        return -ERR_NO_MEMORY;
    free(job->folder);
    job->folder = folder;
    return 0;
}

static void output_max_print(const struct job *job, struct buf *out) {
    buf_printf(out, "%llu", (unsigned long long)job->output_max);
}

static int output_max_set(const struct node *node, struct job *job, const char *text) {
    uint64_t n = job->vm->daemon->settings.output_max;
    if (*text &&
        (number_parse_size(text, 1, &n) < 0 || n < SPOOL_LIMIT_LEAST || n > SPOOL_LIMIT_MOST))
        return job_fail(node, -ERR_INVALID,
                        "takes the bytes that are kept of each stream, such as 65536, 100M or 1G: "
                        "from 64K to 1T");
    job->output_max = n;
    return 0;
}

static void overflow_print(const struct job *job, struct buf *out) {
    buf_append_str(out, job->flowing ? "wait" : "cut");
}

static int overflow_set(const struct node *node, struct job *job, const char *text) {
    bool waits = strcmp(text, "wait") == 0;
    if (!waits && *text && strcmp(text, "cut") != 0)
        return job_fail(node, -ERR_INVALID,
                        "takes cut (the default: what comes above output_max is dropped) or wait "
                        "(the command is held back until its output is read)");
    job->flowing = waits;
    return 0;
}

static const char *const shell_names[] = {
    [JOB_SHELL_OF_VM] = "", [JOB_SHELL_LOGIN] = "login", [JOB_SHELL_RAW] = "raw"};

static void shell_print(const struct job *job, struct buf *out) {
    enum job_shell shell = job->shell;
    if (shell == JOB_SHELL_OF_VM)
        shell = vm_uses_login_shell(job->vm) ? JOB_SHELL_LOGIN : JOB_SHELL_RAW;
    buf_append_str(out, shell_names[shell]);
}

static int shell_set(const struct node *node, struct job *job, const char *text) {
    for (size_t i = 0; i < sizeof shell_names / sizeof *shell_names; i++) {
        if (strcmp(text, shell_names[i]) == 0) {
            job->shell = (enum job_shell)i;
            return 0;
        }
    }
    return job_fail(node, -ERR_INVALID, "takes login or raw, or nothing for what the VM has");
}

static void timeout_print(const struct job *job, struct buf *out) {
    buf_printf(out, "%.12g", job->timeout / 1000.0);
}

static int timeout_set(const struct node *node, struct job *job, const char *text) {
    double seconds = 0;
    if (*text && (number_parse_seconds(text, &seconds) < 0 || seconds > VALUE_TIMEOUT_MOST))
        return job_fail(node, -ERR_INVALID,
                        "takes seconds, such as 90 or 0.5, up to %.0f; 0 is none (the default)",
                        VALUE_TIMEOUT_MOST);
    if (job_has_ended(job))
        return job_fail(node, -ERR_BUSY, "this job has ended");
    unsigned long long ms = (unsigned long long)(seconds * 1000 + 0.5);
    job_set_timeout(job, seconds > 0 && ms == 0 ? 1 : ms > UINT_MAX ? UINT_MAX : (unsigned)ms);
    return 0;
}

static void status_print(const struct job *job, struct buf *out) {
    buf_append_str(out, job_state_name(job));
}

static void error_print(const struct job *job, struct buf *out) {
    size_t length = job->error.len; /* without the newline */
    buf_append(out, job->error.data ? job->error.data : "", length ? length - 1 : 0);
}

static const struct job_value values[] = {
    {"cwd", cwd_print, cwd_set, false},
    {"error", error_print, NULL, false},
    {"output_max", output_max_print, output_max_set, false},
    {"overflow", overflow_print, overflow_set, false},
    {"shell", shell_print, shell_set, false},
    {"status", status_print, NULL, false},
    {"timeout", timeout_print, timeout_set, true},
};

static const struct job_value *value_of(const struct node_row *row) {
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (strcmp(values[i].name, row->name) == 0)
            return &values[i];
    return NULL;
}

static void value_print(const struct node *node, struct buf *out) {
    value_of(node->row)->print(job_of(node), out);
    if (out->len)
        buf_append_char(out, '\n');
}

static void value_stat(const struct node *node, struct node_stat *ret_stat) {
    cleanup_buf struct buf text = {0};
    value_print(node, &text);
    job_stat_init(node, ret_stat);
    ret_stat->st.st_size = (off_t)text.len;
}

static int value_set(const struct node *node, const char *data, size_t length) {
    const struct job_value *value = value_of(node->row);
    struct job *job = job_of(node);
    while (length && data[length - 1] == '\n')
        length--;
    if (!value || !value->set)
        return -ERR_NOT_PERMITTED;
    if (job->removed)
        return -ERR_GONE;
    if (job->command && !value->any_time)
        return job_fail(node, -ERR_BUSY, "this job has been started already");
    if (length > VALUE_LIMIT || memchr(data, 0, length))
        return job_fail(node, -ERR_INVALID, "no such value");
    cleanup_free char *text = strndup(data, length);
    return text ? value->set(node, job, text) : -ERR_NO_MEMORY;
}

static void value_open(struct node *node, int flags, struct request *rq) {
    if ((flags & O_ACCMODE) != O_RDONLY && !value_of(node->row)->set)
        request_answer(rq, -ERR_NOT_PERMITTED);
    else
        job_handle_open(node, flags, rq);
}

static void value_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    cleanup_buf struct buf text = {0};
    value_print(handle->node, &text);
    buf_answer_read(&text, length, offset, rq);
}

/* What one handle writes in pieces is one value; each piece gets its verdict. */
static void value_write(struct handle *handle, const char *data, size_t length, off_t offset,
                        struct request *rq) {
    struct job_handle *h = (struct job_handle *)handle;
    (void)offset;
    size_t was = h->text.len;
    buf_append(&h->text, data, length);
    int r = h->text.failed ? -ERR_NO_MEMORY : value_set(handle->node, h->text.data, h->text.len);
    if (r < 0) {
        h->text.len = was;
        request_answer(rq, r);
    } else {
        request_answer_written(rq, length);
    }
}

/* Emptied, and nothing written: the default. */
static void value_release(struct handle *handle) {
    struct job_handle *h = (struct job_handle *)handle;
    if ((handle->flags & O_TRUNC) && (handle->flags & O_ACCMODE) != O_RDONLY && !h->text.data &&
        !h->job->command)
        value_set(handle->node, "", 0);
    job_handle_free(h);
}

int job_value_take(struct node *dir, const struct node_row *row, const char *data, size_t length) {
    const struct node file = {.parent = dir, .row = row, .vm = dir->vm};
    return row->ops == &job_value_ops ? value_set(&file, data, length) : -ERR_NOT_PERMITTED;
}

const struct node_ops job_value_ops = {
    .stat = value_stat,
    .open = value_open,
    .read = value_read,
    .write = value_write,
    .release = value_release,
    .setattr = node_setattr_ignore,
};

/* ---- signal ---- */

#define SIGNAL_GRACE_MOST 3600 /* s */

/* "TERM", "SIGTERM", "term" and "15" are the same; "TERM 5" is followed by KILL after 5 s. */
static bool signal_parse(const char *data, size_t length, char name[16], unsigned *ret_grace_s) {
    static const char blanks[] = " \t\n";
    char text[32] = "", *rest = text, *end = "";
    if (length >= sizeof text)
        return false;
    memcpy(text, data, length);
    const char *first = strtok_r(rest, blanks, &rest), *second = strtok_r(NULL, blanks, &rest);
    unsigned long grace = second ? strtoul(second, &end, 10) : 0;
    if (!first || strlen(first) >= 16 || *end || grace > SIGNAL_GRACE_MOST ||
        (second && !isdigit((unsigned char)*second)) || strtok_r(NULL, blanks, &rest))
        return false;
    strcpy(name, first);
    for (char *c = name; *c; c++)
        *c = (char)toupper((unsigned char)*c);
    if (strncmp(name, "SIG", 3) == 0)
        memmove(name, name + 3, strlen(name + 3) + 1);
    if (isdigit((unsigned char)name[0])) {
        long number = strtol(name, &end, 10);
        const char *known = *end || number <= 0 || number > 64 ? NULL : sigabbrev_np((int)number);
        snprintf(name, 16, "%s", known ? known : "");
    }
    *ret_grace_s = (unsigned)grace;
    return true;
}

static void signal_sent(void *arg, int status, struct request *rq) {
    if (status < 0)
        request_answer(rq, status);
    else
        request_answer_written(rq, (size_t)(uintptr_t)arg);
}

static void signal_write(struct handle *handle, const char *data, size_t length, off_t offset,
                         struct request *rq) {
    struct job *job = ((struct job_handle *)handle)->job;
    const struct node *node = handle->node;
    char name[16];
    unsigned grace;
    (void)offset;
    if (!signal_parse(data, length, name, &grace) || !node->vm->guest->signal_is_known(name)) {
        request_answer(rq,
                       job_fail(node, -ERR_INVALID,
                                "takes the name of a signal, such as TERM, KILL, INT or HUP, and "
                                "perhaps the seconds after which KILL follows"));
        return;
    }
    if (!job->command || job_has_ended(job)) {
        request_answer(rq, job_fail(node, -ERR_BUSY, "this job %s",
                                    job->command ? "has ended" : "has not been started"));
        return;
    }
    struct vm_wait *wait =
        guest_wait(handle->node, "signal", signal_sent, (void *)(uintptr_t)length, rq);
    int r = wait ? command_signal(job->command, name, grace, wait) : 0;
    if (r < 0)
        guest_wait_settle(wait, r);
}

const struct node_ops job_signal_ops = {
    .stat = job_stat_init,
    .open = job_handle_open,
    .read = job_read_nothing,
    .write = signal_write,
    .release = job_handle_release,
    .setattr = node_setattr_ignore,
};
