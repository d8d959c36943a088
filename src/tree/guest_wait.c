#include "tree/guest_wait.h"

#include <stdlib.h>

#include "util/errors.h"

/* A request may queue behind an update that is itself waiting for its deadline; it ends a little
 * later, so that the better of the two explanations is given. */
#define GUEST_WAIT_GRACE_MS 250

struct guest_waiter {
    struct vm_wait wait;
    struct request *rq;
    struct node *node; /* a reference; held */
    bool held;
    const char *what;
    guest_answer *answer;
    void *arg;
};

static void guest_waiter_end(struct guest_waiter *w, int status) {
    struct request *rq = w->rq;
    guest_answer *answer = w->answer;
    void *arg = w->arg;
    w->node->held -= w->held;
    node_unref(w->node);
    free(w);
    answer(arg, status, rq);
}

static void guest_waiter_done(struct vm_wait *wait, int status) {
    guest_waiter_end(LIST_OWNER(wait, struct guest_waiter, wait), status);
}

static void guest_waiter_cancel(struct request *rq, int status, void *arg) {
    struct guest_waiter *w = arg;
    (void)rq;
    vm_wait_cancel(&w->wait);
    if (status == -ERR_TIMED_OUT)
        vm_fail(w->node->vm, status, "%s: the guest has not answered for %u ms", w->what,
                w->node->daemon->settings.timeout);
    guest_waiter_end(w, status);
}

struct vm_wait *guest_wait(struct node *node, const char *what, guest_answer *answer, void *arg,
                           struct request *rq) {
    struct guest_waiter *w = calloc(1, sizeof *w);
    if (!w) {
        answer(arg, -ERR_NO_MEMORY, rq);
        return NULL;
    }
    w->wait.done = guest_waiter_done;
    list_init(&w->wait.link);
    w->rq = rq;
    w->node = node_ref(node);
    /* A directory that got another inode meanwhile would be lost to who stands in it. */
    w->held = !node->ops->lookup;
    node->held += w->held;
    w->what = what;
    w->answer = answer;
    w->arg = arg;
    request_wait(rq, what ? node->daemon->settings.timeout + GUEST_WAIT_GRACE_MS : 0,
                 guest_waiter_cancel, w);
    return &w->wait;
}

void guest_wait_settle(struct vm_wait *wait, int status) {
    guest_waiter_end(LIST_OWNER(wait, struct guest_waiter, wait), status);
}
