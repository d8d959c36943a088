#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "util/list.h"

/* One operation that somebody asks of the tree: what a node is given, and answers.
 *
 * A request is answered exactly once, with one of the request_answer functions, at once or later;
 * then it is gone. A node that cannot answer at once parks it with request_wait(). The transport
 * (src/fuse) owns the memory and implements the operations; nothing here knows of FUSE. */

struct node;
struct handle;
struct request;

/* Called at most once, from the loop, when a parked request is given up: `status` is
 * -ERR_INTERRUPTED when its asker was interrupted or killed, -ERR_TIMED_OUT when its time is over.
 * It takes the request out of wherever it waits, ends what was begun for it, and answers it with
 * `status` (or with better news, if there are any). */
typedef void request_cancel(struct request *rq, int status, void *arg);

struct request_ops {
    void (*status)(struct request *rq, int status);
    void (*entry)(struct request *rq, struct node *node);
    void (*attr)(struct request *rq, struct node *node);
    void (*opened)(struct request *rq, struct handle *handle);
    void (*created)(struct request *rq, struct node *node, struct handle *handle);
    void (*data)(struct request *rq, const void *data, size_t length);
    void (*written)(struct request *rq, size_t length);
    void (*wait)(struct request *rq, unsigned timeout_ms, request_cancel *cancel, void *arg);
};

struct request {
    const struct request_ops *ops;
    uid_t uid; /* of the asker */
    gid_t gid;
    pid_t pid; /* its thread; 0 when it is of another pid namespace */
};

/* Success without anything to say (status 0), or the reason why not (-ERR_…). */
static inline void request_answer(struct request *rq, int status) {
    rq->ops->status(rq, status);
}
/* The result of lookup, mkdir: consumes a reference on the node. */
static inline void request_answer_entry(struct request *rq, struct node *node) {
    rq->ops->entry(rq, node);
}
static inline void request_answer_attr(struct request *rq, struct node *node) {
    rq->ops->attr(rq, node);
}
/* The result of open; the handle is the transport's until it calls the node's release(). When the
 * asker is gone, release() follows at once. */
static inline void request_answer_opened(struct request *rq, struct handle *handle) {
    rq->ops->opened(rq, handle);
}
static inline void request_answer_created(struct request *rq, struct node *node,
                                          struct handle *handle) {
    rq->ops->created(rq, node, handle);
}
static inline void request_answer_data(struct request *rq, const void *data, size_t length) {
    rq->ops->data(rq, data, length);
}
static inline void request_answer_written(struct request *rq, size_t length) {
    rq->ops->written(rq, length);
}
/* Parks the request. timeout_ms 0: no deadline of its own; then what it waits for must have one. */
static inline void request_wait(struct request *rq, unsigned timeout_ms, request_cancel *cancel,
                                void *arg) {
    rq->ops->wait(rq, timeout_ms, cancel, arg);
}
