#include <stdlib.h>
#include <string.h>

#include "fuse/internal.h"
#include "util/errors.h"
#include "vm/vm.h"

/* A name that is not known, or a listing, of a directory that may have changed where nobody of here
 * has looked for long: the news are waited for. Others who want a new name in the directory wait as
 * well, so it is not for long: then what is known has to do. */

#define FRESH_MOST_MS 80

struct fresh {
    struct vm_wait wait;
    struct fuse_request *r;
    struct node *dir; /* a reference */
    char *name;       /* of a LOOKUP; NULL: of an OPENDIR */
};

static void fresh_free(struct fresh *f) {
    node_unref(f->dir);
    free(f->name);
    free(f);
}

static void fresh_answer(struct fresh *f, int status) {
    struct fuse_file_info file = f->r->file;
    fuse_req_t req = fuse_request_take(&f->r->rq);
    if (status < 0)
        fuse_reply_err(req, error_to_user(status));
    else if (f->name)
        ops_lookup_now(req, f->dir, f->name);
    else
        ops_opendir_now(req, f->dir, &file);
    fresh_free(f);
}

/* Whatever the guest has said: what is known now is the answer. */
static void fresh_done(struct vm_wait *wait, int status) {
    (void)status;
    fresh_answer(LIST_OWNER(wait, struct fresh, wait), 0);
}

static void fresh_cancel(struct request *rq, int status, void *arg) {
    struct fresh *f = arg;
    (void)rq;
    vm_wait_cancel(&f->wait);
    fresh_answer(f, status == -ERR_TIMED_OUT ? 0 : status);
}

bool fresh_holds(struct fuse_channel *channel, fuse_req_t req, struct node *dir, const char *name,
                 const struct fuse_file_info *file) {
    struct fresh *f = dir->ops->refresh ? calloc(1, sizeof *f) : NULL;
    if (!f)
        return false;
    list_init(&f->wait.link);
    f->wait.done = fresh_done;
    f->dir = node_ref(dir);
    f->name = name ? strdup(name) : NULL;
    if ((name && !f->name) || dir->ops->refresh(dir, &f->wait) != 0) {
        fresh_free(f);
        return false;
    }
    f->r = fuse_request_new(channel, req);
    if (!f->r) {
        vm_wait_cancel(&f->wait);
        fresh_free(f);
        return true; /* it has been answered */
    }
    if (file)
        f->r->file = *file;
    request_wait(&f->r->rq, FRESH_MOST_MS, fresh_cancel, f);
    return true;
}
