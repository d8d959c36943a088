#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <uv.h>

/* A client of QEMU's monitor protocol (QMP: docs/interop/qmp-spec.txt in QEMU) on a UNIX socket.
 *
 * Commands may be given from the start: they wait for the greeting and go out one at a time, in
 * order. Each has a deadline from the moment it is given, because QEMU serves a single client and
 * lets a second one hang, and a stopped QEMU answers nobody. What the other side sends is not
 * trusted.
 *
 * The creator owns the client until qmp_close(). All callbacks come from the loop, never from
 * inside a function of this header, and may call any of them. */

struct qmp;

/* The answer to a command. `status` is 0 and `result` the borrowed value of "return"; or status is
 * negative, result NULL and `why` a sentence. */
typedef void qmp_done(void *arg, int status, const json_t *result, const char *why);

struct qmp_events {
    /* QEMU tells something. `data` is borrowed, an object or NULL. */
    void (*event)(void *arg, const char *name, const json_t *data);
    /* The connection could not be made or is lost; once at most. Comes behind the callbacks of all
     * commands that waited. */
    void (*lost)(void *arg, int status, const char *why);
};

/* Connects to the socket at `path` and negotiates; both have to succeed within `timeout_ms`. */
int qmp_open(uv_loop_t *loop, const char *path, unsigned timeout_ms,
             const struct qmp_events *events, void *arg, struct qmp **ret_qmp);

/* Gives a command. `name` is a string constant. Takes over `arguments` (NULL: none). `done` (NULL:
 * the answer is dropped) is called exactly once if this returns 0, unless the client is closed
 * before; also on a lost connection. -ENOMEM: it is not called. */
int qmp_command(struct qmp *qmp, const char *name, json_t *arguments, unsigned timeout_ms,
                qmp_done *done, void *arg);

/* Gives QEMU a descriptor that later commands call `name` (getfd): as qmp_command(). The caller's
 * own stays his, and may be closed at once. */
int qmp_give_fd(struct qmp *qmp, const char *name, int fd, unsigned timeout_ms, qmp_done *done,
                void *arg);

/* Drops the connection: what waits fails with this status, and so does what is given later. */
void qmp_abort(struct qmp *qmp, int status, const char *why);

/* True when the connection is lost and everybody has been told: the client is good for closing
 * only. */
bool qmp_is_lost(const struct qmp *qmp);

/* No callback comes after this. Frees the client, in a later turn of the loop. NULL is allowed. */
void qmp_close(struct qmp *qmp);
