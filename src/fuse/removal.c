#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fuse/internal.h"
#include "util/errors.h"
#include "vm/vm.h"

/* UNLINK and RENAME hold the kernel's lock of the directory, where everybody else who wants a name
 * in it waits beyond the reach of a signal. So one that takes long is let go of: it is answered
 * ESTALE, at which the kernel gives the lock back and tries the whole system call once more (Linux,
 * fs/namei.c: do_unlinkat(), do_renameat2(), retry_estale()), this time with a LOOKUP of each
 * directory on the path (LOOKUP_REVAL), which takes no lock. The LOOKUP of the directory in
 * question waits here for the verdict; the UNLINK or RENAME that follows is given it.
 *
 * Who names the file by the directory itself (`cd env; rm KEY`, unlinkat(2) with its descriptor)
 * has no such LOOKUP: its second try waits with the lock, and there is no third. So it is given
 * less time than others, and hardly any when another has just had it in vain. Who waits behind it
 * can be killed when that is over, so all that have the lock while one guest hesitates share that
 * time: a further one is let go of at once. */

#define REMOVAL_PATIENCE_MS 100 /* with the lock */
#define REMOVAL_MOST_MS 800     /* from the start, with the lock again */
#define REMOVAL_VAIN_MS 2000    /* how long it counts that this was in vain, */
#define REMOVAL_BRIEF_MS 25     /* and what others have the lock for meanwhile */
#define REMOVAL_RETURN_MS 5000  /* the kernel comes back at once, unless its process was killed */

struct removal {
    struct list link; /* in channel->removals while it is let go of */
    struct fuse_channel *channel;
    pid_t tid;
    struct node *dir, *new_dir; /* references; new_dir: of a RENAME, else NULL */
    char *name, *new_name;
    unsigned flags;
    /* What the kernel knows by these names: it is to find that again, whatever has become of it.
     * References; NULL: nothing. */
    struct node *child, *new_child;
    struct fuse_request *r;      /* what the tree works on; NULL: it has answered `status` */
    struct fuse_request *lookup; /* waits for the answer; NULL: none */
    int status;
    bool let_go;    /* it is once only */
    uint64_t begun; /* uv_now() */
    uv_timer_t *timer;
};

static void removal_free(struct removal *removal) {
    if (!removal)
        return;
    list_remove(&removal->link);
    if (removal->timer)
        uv_close((uv_handle_t *)removal->timer, (uv_close_cb)free);
    struct node *nodes[] = {removal->dir, removal->new_dir, removal->child, removal->new_child};
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++)
        if (nodes[i])
            node_unref(nodes[i]);
    free(removal->name);
    free(removal->new_name);
    free(removal);
}

static struct removal *removal_find(struct fuse_channel *channel, pid_t tid) {
    for (struct list *l = channel->removals.next; l != &channel->removals; l = l->next) {
        struct removal *removal = LIST_OWNER(l, struct removal, link);
        if (removal->tid == tid)
            return removal;
    }
    return NULL;
}

/* Nobody has come back for it. */
static void removal_is_forgotten(uv_timer_t *timer) {
    struct removal *removal = timer->data;
    if (removal->r)
        fuse_request_cancel(removal->r, -ERR_INTERRUPTED); /* answers into `status` */
    removal_free(removal);
}

static struct node *removal_child(struct node *dir, const char *name) {
    struct node *node = node_find_child(dir, name);
    return node ? node_ref(node) : NULL;
}

void removal_begin(struct fuse_request *r, struct node *dir, const char *name, struct node *new_dir,
                   const char *new_name, unsigned flags) {
    struct removal *former = removal_find(r->channel, r->rq.pid);
    struct removal *removal = r->rq.pid > 0 ? calloc(1, sizeof *removal) : NULL;
    if (former) /* it asks for something else now */
        removal_is_forgotten(former->timer);
    if (!removal)
        return; /* it is held, then */
    list_init(&removal->link);
    removal->channel = r->channel;
    removal->tid = r->rq.pid;
    removal->r = r;
    removal->dir = node_ref(dir);
    removal->name = strdup(name);
    removal->child = removal_child(dir, name);
    if (new_dir) {
        removal->new_dir = node_ref(new_dir);
        removal->new_name = strdup(new_name);
        removal->new_child = removal_child(new_dir, new_name);
    }
    removal->flags = flags;
    removal->begun = uv_now(r->channel->daemon->loop);
    removal->timer = malloc(sizeof *removal->timer);
    if (removal->timer) {
        uv_timer_init(r->channel->daemon->loop, removal->timer);
        removal->timer->data = removal;
    }
    if (!removal->name || (new_dir && !removal->new_name) || !removal->timer || !removal->child)
        removal_free(removal);
    else
        r->removal = removal;
}

static bool removal_was_in_vain(const struct removal *removal) {
    const struct fuse_channel *channel = removal->channel;
    return channel->vain_dir == removal->dir->id &&
           uv_now(channel->daemon->loop) - channel->vain_at < REMOVAL_VAIN_MS;
}

static void removal_let_go(uv_timer_t *timer) {
    struct removal *removal = timer->data;
    struct fuse_request *r = removal->r;
    fuse_req_t req = r->req;
    fuse_req_interrupt_func(req, NULL, NULL);
    r->req = NULL;
    removal->let_go = true;
    list_append(&removal->channel->removals, &removal->link);
    uv_timer_start(timer, removal_is_forgotten, REMOVAL_RETURN_MS, 0);
    fuse_reply_err(req, ESTALE);
}

/* Has another had the lock of the directory already, and still no verdict? */
static bool removal_is_further(const struct removal *removal) {
    const struct list *removals = &removal->channel->removals;
    for (const struct list *l = removals->next; l != removals; l = l->next) {
        const struct removal *other = LIST_OWNER(l, struct removal, link);
        if (other->r && (other->dir == removal->dir || other->new_dir == removal->dir))
            return true;
    }
    return removal_was_in_vain(removal);
}

void removal_wait(struct removal *removal) {
    if (!removal->let_go)
        uv_timer_start(removal->timer, removal_let_go,
                       removal_is_further(removal) ? 0 : REMOVAL_PATIENCE_MS, 0);
}

bool removal_answered(struct fuse_request *r, int status) {
    struct removal *removal = r->removal;
    if (status == 0)
        r->channel->vain_dir = 0;
    if (r->req) {
        r->removal = NULL;
        removal_free(removal);
        return false;
    }
    removal->status = status;
    removal->r = NULL;
    fuse_request_free(r);
    uv_timer_start(removal->timer, removal_is_forgotten, REMOVAL_RETURN_MS, 0);
    if (removal->lookup) {
        struct fuse_request *lookup = removal->lookup;
        removal->lookup = NULL;
        request_answer_entry(&lookup->rq, node_ref(lookup->node));
    }
    return true;
}

static void removal_explain(const struct removal *removal) {
    const struct node *dir = removal->dir;
    const char *to = removal->new_dir ? " to " : "";
    bool is_inside = dir->parent && dir->parent->vm == dir->vm; /* env, and not the VM's own */
    if (!dir->vm)
        return;
    vm_fail(dir->vm, -ERR_TIMED_OUT,
            "%s%s%s%s%s: the guest does not answer; when it does, it may still be done. By way of "
            "an open directory (after cd, by rm -r or find) this waits for %d ms only, since it "
            "holds up everybody there; given its whole path it waits for %u ms",
            is_inside ? dir->name : "", is_inside ? "/" : "", removal->name, to,
            *to ? removal->new_name : "", REMOVAL_MOST_MS, dir->daemon->settings.timeout);
}

/* It has had the lock for long enough. */
static void removal_is_overdue(uv_timer_t *timer) {
    struct removal *removal = timer->data;
    struct fuse_request *r = removal->r;
    fuse_req_t req = r->req;
    fuse_req_interrupt_func(req, NULL, NULL);
    r->req = NULL;
    fuse_request_cancel(r, -ERR_INTERRUPTED); /* answers into `status` */
    int status = removal->status;
    if (status == -ERR_INTERRUPTED) {
        status = -ERR_TIMED_OUT;
        removal_explain(removal);
    }
    removal->channel->vain_dir = removal->dir->id;
    removal->channel->vain_at = uv_now(timer->loop);
    removal_free(removal);
    fuse_reply_err(req, error_to_user(status));
}

/* How long it may have the lock again. */
static uint64_t removal_time_left(const struct removal *removal) {
    uint64_t waited = uv_now(removal->channel->daemon->loop) - removal->begun;
    if (removal_was_in_vain(removal))
        return REMOVAL_BRIEF_MS;
    return waited >= REMOVAL_MOST_MS ? 0 : REMOVAL_MOST_MS - waited;
}

bool removal_resume(struct fuse_channel *channel, fuse_req_t req, const struct node *dir,
                    const char *name, const struct node *new_dir, const char *new_name,
                    unsigned flags) {
    struct removal *removal = removal_find(channel, fuse_req_ctx(req)->pid);
    if (!removal || removal->dir != dir || strcmp(removal->name, name) != 0 ||
        removal->new_dir != new_dir || (new_dir && strcmp(removal->new_name, new_name) != 0) ||
        removal->flags != flags)
        return false;
    if (!removal->r) {
        int status = removal->status;
        removal_free(removal);
        fuse_reply_err(req, error_to_user(status));
        return true;
    }
    list_remove(&removal->link);
    fuse_request_attach(removal->r, req);
    uv_timer_start(removal->timer, removal_is_overdue, removal_time_left(removal), 0);
    return true;
}

/* The LOOKUP was interrupted: so is what it waits for. */
static void removal_lookup_cancel(struct request *rq, int status, void *arg) {
    struct removal *removal = arg;
    removal->lookup = NULL;
    if (removal->r)
        fuse_request_cancel(removal->r, status);
    removal_free(removal);
    request_answer(rq, status);
}

bool removal_holds_lookup(struct fuse_channel *channel, fuse_req_t req, struct node *node) {
    if (list_is_empty(&channel->removals))
        return false;
    struct removal *removal = removal_find(channel, fuse_req_ctx(req)->pid);
    if (!removal || !removal->r || removal->lookup ||
        (removal->dir != node && removal->new_dir != node))
        return false;
    struct fuse_request *lookup = fuse_request_new(channel, req);
    if (lookup) {
        uv_timer_stop(removal->timer);
        lookup->node = node_ref(node);
        removal->lookup = lookup;
        request_wait(&lookup->rq, 0, removal_lookup_cancel, removal);
    }
    return true;
}

bool removal_knows(struct fuse_channel *channel, fuse_req_t req, const struct node *dir,
                   const char *name, struct node **ret_node) {
    if (list_is_empty(&channel->removals))
        return false;
    struct removal *removal = removal_find(channel, fuse_req_ctx(req)->pid);
    if (!removal)
        return false;
    if (removal->dir == dir && strcmp(removal->name, name) == 0)
        *ret_node = removal->child;
    else if (removal->new_dir && removal->new_dir == dir && strcmp(removal->new_name, name) == 0)
        *ret_node = removal->new_child;
    else
        return false;
    if (*ret_node)
        node_ref(*ret_node);
    return true;
}

void removals_free_all(struct fuse_channel *channel) {
    while (!list_is_empty(&channel->removals))
        removal_free(LIST_OWNER(channel->removals.next, struct removal, link));
}
