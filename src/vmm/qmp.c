#include "vmm/qmp.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/list.h"
#include "util/log.h"

#define QMP_LINE_MAX (1024 * 1024)

struct qmp_request {
    struct list link;
    json_int_t id;
    const char *name; /* a string constant of the caller */
    char *text;       /* owned; what goes over the wire, NULL once it is on its way */
    int fd;           /* owned; goes with the text; -1: none */
    uint64_t due;     /* in the loop's time */
    unsigned timeout_ms;
    qmp_done *done;
    void *arg;
};

struct qmp {
    uv_pipe_t pipe;
    uv_timer_t timer; /* for the earliest deadline, and for telling of a loss */
    uv_connect_t connect;
    unsigned handles; /* not yet closed; the client is freed with the last */
    struct list requests;
    struct buf line; /* what has come of the next line */
    json_int_t last_id;
    struct qmp_events events;
    void *arg;
    bool greeted;
    bool closed; /* by the owner: no callbacks */
    bool told;   /* the loss was told */
    int failed;  /* 0, or the status of the loss */
    char why[256];
};

struct qmp_write {
    uv_write_t request;
    char *text; /* owned */
};

static void qmp_request_free(struct qmp_request *r) {
    list_remove(&r->link);
    if (r->fd >= 0)
        close(r->fd);
    free(r->text);
    free(r);
}

static void qmp_requests_free(struct list *requests) {
    while (!list_is_empty(requests))
        qmp_request_free(LIST_OWNER(requests->next, struct qmp_request, link));
}

static void qmp_on_closed(uv_handle_t *handle) {
    struct qmp *q = handle->data;
    if (--q->handles)
        return;
    buf_free(&q->line);
    free(q);
}

static void qmp_on_timer(uv_timer_t *timer);
static void qmp_send_next(struct qmp *q);

static void qmp_schedule(struct qmp *q) {
    uint64_t now = uv_now(q->timer.loop), due = UINT64_MAX;
    if (q->closed)
        return;
    /* Never 0 milliseconds: libuv runs such a timer in the same turn, and a caller that answers
     * each failure with a new command would turn there for ever. */
    if (q->failed && !q->told)
        due = now + 1;
    for (struct list *l = q->requests.next; l != &q->requests; l = l->next) {
        struct qmp_request *r = LIST_OWNER(l, struct qmp_request, link);
        if (r->due < due)
            due = r->due;
    }
    if (due == UINT64_MAX)
        uv_timer_stop(&q->timer);
    else
        uv_timer_start(&q->timer, qmp_on_timer, due > now ? due - now : 1, 0);
}

void qmp_abort(struct qmp *q, int status, const char *why) {
    if (q->failed || q->closed)
        return;
    q->failed = status;
    snprintf(q->why, sizeof q->why, "%s", why);
    uv_close((uv_handle_t *)&q->pipe, qmp_on_closed);
    qmp_schedule(q);
}

/* Answers a request that is in no list any more, and frees it. */
static void qmp_answer(struct qmp_request *r, int status, const json_t *result, const char *why) {
    cleanup_buf struct buf text = {0};
    if (status < 0)
        buf_printf(&text, "QMP command %s: %s", r->name, why);
    if (r->done)
        r->done(r->arg, status, result, status < 0 && !text.failed ? text.data : why);
    qmp_request_free(r);
}

/* Answers what is due. The list is taken off first: what callbacks give anew waits for the next
 * turn. */
static void qmp_on_timer(uv_timer_t *timer) {
    struct qmp *q = timer->data;
    uint64_t now = uv_now(timer->loop);
    struct list due;
    list_init(&due);
    for (struct list *l = q->requests.next, *next; l != &q->requests; l = next) {
        struct qmp_request *r = LIST_OWNER(l, struct qmp_request, link);
        next = l->next;
        if (q->failed || r->due <= now) {
            list_remove(l);
            list_append(&due, l);
        }
    }

    int failed = q->failed;
    bool tell = failed && !q->told;
    struct list *l;
    while (!q->closed && (l = list_pop(&due))) {
        struct qmp_request *r = LIST_OWNER(l, struct qmp_request, link);
        char why[64];
        snprintf(why, sizeof why, "no answer within %u ms", r->timeout_ms);
        qmp_answer(r, failed ? failed : -ERR_TIMED_OUT, NULL, failed ? q->why : why);
    }
    qmp_requests_free(&due);
    if (q->closed)
        return;
    if (tell) {
        q->told = true;
        q->events.lost(q->arg, q->failed, q->why);
    }
    qmp_send_next(q);
    qmp_schedule(q);
}

static void qmp_on_written(uv_write_t *request, int status) {
    struct qmp_write *w = (struct qmp_write *)request;
    struct qmp *q = request->handle->data;
    if (status < 0 && status != UV_ECANCELED)
        qmp_abort(q, -ERR_UNREACHABLE, "QEMU closed the QMP connection");
    free(w->text);
    free(w);
}

/* Past libuv, which sends no descriptors but those of its own handles. Nothing else is on its way
 * at this moment, and a line this short fits into the socket's buffer as a whole. */
static int qmp_send_with_fd(struct qmp *q, const char *text, int fd) {
    union {
        char data[CMSG_SPACE(sizeof fd)];
        struct cmsghdr header;
    } control = {0};
    struct iovec part = {.iov_base = (char *)(uintptr_t)text, .iov_len = strlen(text)};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.data,
                             .msg_controllen = sizeof control.data};
    uv_os_fd_t to;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    int status = uv_fileno((uv_handle_t *)&q->pipe, &to);
    if (status < 0)
        return status;
    return sendmsg(to, &message, MSG_NOSIGNAL) == (ssize_t)part.iov_len ? 0 : -EIO;
}

/* Sends the first request. The next one goes when it was answered or given up: a late answer has an
 * id that is not waited for. */
static void qmp_send_next(struct qmp *q) {
    if (!q->greeted || q->failed || q->closed || list_is_empty(&q->requests))
        return;
    struct qmp_request *r = LIST_OWNER(q->requests.next, struct qmp_request, link);
    if (!r->text)
        return;
    if (r->fd >= 0) {
        if (qmp_send_with_fd(q, r->text, r->fd) < 0)
            qmp_abort(q, -ERR_UNREACHABLE, "no descriptor can be given to QEMU");
        free(r->text);
        r->text = NULL;
        return;
    }
    struct qmp_write *w = calloc(1, sizeof *w);
    if (!w) {
        qmp_abort(q, -ENOMEM, "out of memory");
        return;
    }
    w->text = r->text;
    r->text = NULL;
    uv_buf_t data = uv_buf_init(w->text, (unsigned)strlen(w->text));
    int status = uv_write(&w->request, (uv_stream_t *)&q->pipe, &data, 1, qmp_on_written);
    if (status < 0) {
        free(w->text);
        free(w);
        qmp_abort(q, -ERR_UNREACHABLE, "the QMP connection cannot be written to");
    }
}

static void qmp_handle_answer(struct qmp *q, const json_t *message) {
    const json_t *id = json_object_get(message, "id");
    if (list_is_empty(&q->requests))
        return;
    struct qmp_request *r = LIST_OWNER(q->requests.next, struct qmp_request, link);
    if (r->text || !json_is_integer(id) || json_integer_value(id) != r->id)
        return;
    list_remove(&r->link);
    const json_t *error = json_object_get(message, "error");
    if (!error) {
        qmp_answer(r, 0, json_object_get(message, "return"), NULL);
    } else {
        const char *text = json_string_value(json_object_get(error, "desc"));
        qmp_answer(r, -ERR_IO, NULL, text ? text : "it failed and QEMU does not say why");
    }
}

static void qmp_handle_line(struct qmp *q, const char *line, size_t length) {
    json_error_t error;
    json_t *message = json_loadb(line, length, 0, &error);
    if (!json_is_object(message)) {
        qmp_abort(q, -ERR_IO, "what came over the QMP connection is not QMP");
    } else if (!q->greeted) {
        q->greeted = json_object_get(message, "QMP") != NULL;
    } else if (json_is_string(json_object_get(message, "event"))) {
        const json_t *data = json_object_get(message, "data");
        q->events.event(q->arg, json_string_value(json_object_get(message, "event")),
                        json_is_object(data) ? data : NULL);
    } else if (json_object_get(message, "return") || json_object_get(message, "error")) {
        qmp_handle_answer(q, message);
    }
    json_decref(message);
    qmp_send_next(q);
}

/* One buffer for all clients: on Unix, libuv reads and calls back right behind this. */
static void qmp_on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *ret_buf) {
    static char input[16384];
    (void)handle, (void)suggested;
    *ret_buf = uv_buf_init(input, sizeof input);
}

static void qmp_on_read(uv_stream_t *stream, ssize_t length, const uv_buf_t *input) {
    struct qmp *q = stream->data;
    if (length < 0) {
        qmp_abort(q, -ERR_UNREACHABLE, "QEMU closed the QMP connection");
        return;
    }
    size_t scanned = q->line.len, start = 0;
    buf_append(&q->line, input->base, (size_t)length);
    if (q->line.failed) {
        qmp_abort(q, -ENOMEM, "out of memory");
        return;
    }
    for (size_t i = scanned; i < q->line.len; i++) {
        if (q->line.data[i] != '\n')
            continue;
        if (i > start && !(i == start + 1 && q->line.data[start] == '\r'))
            qmp_handle_line(q, q->line.data + start, i - start);
        if (q->failed || q->closed)
            return;
        start = i + 1;
    }
    buf_consume(&q->line, start);
    if (q->line.len > QMP_LINE_MAX)
        qmp_abort(q, -ERR_IO, "a line of more than 1 MiB came over the QMP connection");
    else if (!q->line.len)
        buf_free(&q->line); /* most VMs say nothing for hours */
    qmp_schedule(q);
}

static void qmp_on_connected(uv_connect_t *request, int status) {
    struct qmp *q = request->handle->data;
    if (q->failed || q->closed)
        return;
    if (status == 0)
        status = uv_read_start((uv_stream_t *)&q->pipe, qmp_on_alloc, qmp_on_read);
    if (status < 0) {
        char why[128];
        snprintf(why, sizeof why, "the QMP socket cannot be connected to (%s)",
                 uv_strerror(status));
        qmp_abort(q, -ERR_UNREACHABLE, why);
    }
}

static void qmp_on_capabilities(void *arg, int status, const json_t *result, const char *why) {
    (void)result;
    if (status < 0)
        qmp_abort(arg, status, why);
}

/* Takes over `fd`, and closes it also where it fails. */
static int qmp_queue(struct qmp *q, const char *name, json_t *arguments, int fd,
                     unsigned timeout_ms, qmp_done *done, void *arg) {
    json_int_t id = q->last_id + 1;
    /* "o*" leaves the member out for NULL, and takes the reference. */
    json_t *message =
        json_pack("{s:s, s:o*, s:I}", "execute", name, "arguments", arguments, "id", id);
    cleanup_free char *json = message ? json_dumps(message, JSON_COMPACT) : NULL;
    json_decref(message);
    cleanup_buf struct buf text = {0};
    uv_update_time(
        q->timer.loop); /* deadlines count from now, whatever this turn has done before */
    if (json)
        buf_printf(&text, "%s\n", json);
    struct qmp_request *r = calloc(1, sizeof *r);
    if (!json || text.failed || !r) {
        free(r);
        if (fd >= 0)
            close(fd);
        return -ENOMEM;
    }
    q->last_id = id;
    *r = (struct qmp_request){
        .id = id,
        .name = name,
        .fd = fd,
        .text = buf_steal(&text, NULL),
        .timeout_ms = timeout_ms,
        .due = uv_now(q->timer.loop) + (q->failed || !timeout_ms ? 1 : timeout_ms),
        .done = done,
        .arg = arg,
    };
    list_append(&q->requests, &r->link);
    qmp_send_next(q);
    qmp_schedule(q);
    return 0;
}

int qmp_command(struct qmp *q, const char *name, json_t *arguments, unsigned timeout_ms,
                qmp_done *done, void *arg) {
    return qmp_queue(q, name, arguments, -1, timeout_ms, done, arg);
}

int qmp_give_fd(struct qmp *q, const char *name, int fd, unsigned timeout_ms, qmp_done *done,
                void *arg) {
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return copy < 0 ? -errno
                    : qmp_queue(q, "getfd", json_pack("{s:s}", "fdname", name), copy, timeout_ms,
                                done, arg);
}

bool qmp_is_lost(const struct qmp *q) {
    return q->told && list_is_empty(&q->requests);
}

void qmp_close(struct qmp *q) {
    if (!q || q->closed)
        return;
    q->closed = true;
    qmp_requests_free(&q->requests);
    if (!q->failed)
        uv_close((uv_handle_t *)&q->pipe, qmp_on_closed);
    uv_close((uv_handle_t *)&q->timer, qmp_on_closed);
}

int qmp_open(uv_loop_t *loop, const char *path, unsigned timeout_ms,
             const struct qmp_events *events, void *arg, struct qmp **ret_qmp) {
    if (strlen(path) >= sizeof((struct sockaddr_un *)NULL)->sun_path)
        return -ERR_NAME_TOO_LONG; /* libuv would cut it off */
    struct qmp *q = calloc(1, sizeof *q);
    if (!q)
        return -ENOMEM;
    q->events = *events;
    q->arg = arg;
    list_init(&q->requests);
    int status = uv_pipe_init(loop, &q->pipe, 0);
    if (status < 0) {
        free(q);
        return status;
    }
    q->handles = 2;
    uv_timer_init(loop, &q->timer); /* cannot fail */
    q->pipe.data = q->timer.data = q;
    status = qmp_command(q, "qmp_capabilities", NULL, timeout_ms, qmp_on_capabilities, q);
    if (status < 0) {
        qmp_close(q);
        return status;
    }
    uv_pipe_connect(&q->connect, &q->pipe, path, qmp_on_connected);
    *ret_qmp = q;
    return 0;
}
