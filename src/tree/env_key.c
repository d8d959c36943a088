#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "tree/env.h"
#include "tree/scratch.h"
#include "tree/text.h"
#include "tree/tree.h"
#include "util/errors.h"

/* ID/env/KEY. Errors have to come out of write(), because shells drop those of close(); tools that
 * write in pieces have to be atomic all the same. So the first WRITE commits at once, later ones
 * gather until FLUSH, and a truncation by itself waits for what follows it. */

static struct var *env_key_var(const struct node *node) {
    return vars_find(node->vm->vars, node->name);
}

static void env_key_stat(const struct node *node, struct node_stat *ret_stat) {
    const struct var *var = env_key_var(node);
    node_stat_init(node, ret_stat);
    ret_stat->entry_seconds = 0; /* a name may come and go in the guest, or get another node */
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
    ret_stat->st.st_mode = S_IFREG | 0600;
    if (!var) { /* removed, and still open */
        ret_stat->st.st_nlink = 0;
        return;
    }
    ret_stat->st.st_ino = node_inode(node->vm, var->number);
    ret_stat->st.st_mode = S_IFREG | var->mode;
    ret_stat->st.st_uid = var->uid;
    ret_stat->st.st_gid = var->gid;
    ret_stat->st.st_size = var->truncated ? 0 : (off_t)var->length;
    ret_stat->st.st_mtim = ret_stat->st.st_ctim = var->changed;
    ret_stat->st.st_atim = var->read;
}

static void env_handle_load(struct env_handle *h) {
    const struct var *var = env_key_var(h->handle.node);
    buf_clear(&h->content);
    if (var && !var->truncated)
        buf_append(&h->content, var->bytes, var->length);
}

static void env_handle_truncate(struct env_handle *h) {
    struct var *var = env_key_var(h->handle.node);
    buf_clear(&h->content);
    if (!h->truncating && var) {
        h->truncating = true;
        var->truncated++;
    }
}

static void env_handle_untruncate(struct env_handle *h) {
    struct var *var = env_key_var(h->handle.node);
    if (h->truncating && var && var->truncated > 0)
        var->truncated--;
    h->truncating = false;
}

static struct env_handle *env_handle_new(struct node *node, int flags) {
    struct env_handle *h = calloc(1, sizeof *h);
    if (h)
        handle_init(&h->handle, node, flags);
    return h;
}

struct env_handle *env_handle_create(struct node *node, int flags) {
    struct env_handle *h = env_handle_new(node, flags);
    if (!h)
        return NULL;
    h->creating = true;
    if (flags & O_TRUNC)
        env_handle_truncate(h);
    else
        env_handle_load(h);
    return h;
}

void env_answer_plain(void *arg, int status, struct request *rq) {
    (void)arg;
    request_answer(rq, status);
}

void env_commit(struct node *node, const struct var_change *changes, size_t count,
                guest_answer *answer, void *arg, struct request *rq) {
    struct vm_wait *wait = guest_wait(node, node->name, answer, arg, rq);
    int r = wait ? vars_commit(node->vm->vars, changes, count, wait) : 0;
    if (r < 0)
        guest_wait_settle(wait, r);
}

/* The verdict on what a handle has committed: by a WRITE of h->writing bytes, or by FLUSH or FSYNC.
 */
static void env_handle_verdict(void *arg, int status, struct request *rq) {
    struct env_handle *h = arg;
    if (status < 0) {
        env_handle_load(h);
        h->dirty = false;
        request_answer(rq, status);
    } else if (h->writing) {
        request_answer_written(rq, h->writing);
    } else {
        request_answer(rq, 0);
    }
}

/* What a commit of the handle changes. One that appends does so to what is there by then: others
 * may append, too. */
static struct var_change env_handle_change(const struct env_handle *h) {
    bool append = (h->handle.flags & O_APPEND) && !h->truncating;
    const struct buf *bytes = append ? &h->appended : &h->content;
    return (struct var_change){.name = h->handle.node->name,
                               .bytes = bytes->data ? bytes->data : "",
                               .length = bytes->len,
                               .append = append};
}

static void env_handle_commit(struct env_handle *h, size_t writing, struct request *rq) {
    struct node *node = h->handle.node;
    struct var_change change = env_handle_change(h);
    struct vm_wait *wait;
    h->wrote = true;
    h->dirty = false;
    h->writing = writing;
    wait = guest_wait(node, node->name, env_handle_verdict, h, rq);
    int r = wait ? vars_commit(node->vm->vars, &change, 1, wait) : 0; /* copies the bytes */
    buf_clear(&h->appended);
    env_handle_untruncate(h);
    if (r < 0)
        guest_wait_settle(wait, r);
}

/* The name that was opened has been removed, given to another, or is scratch by now (rename): it is
 * no variable to be set any more. As on a disk, who has it open may go on, for nobody. */
static bool env_handle_is_astray(const struct env_handle *h) {
    return h->handle.node->removed || h->handle.node->ops != h->handle.ops;
}

static void env_key_release(struct handle *handle);

/* An open that has waited for the guest's newest word. */
static void env_open_answer(void *arg, int status, struct request *rq) {
    struct env_handle *h = arg;
    if (status == 0 && !env_key_var(h->handle.node))
        status = -ERR_STALE; /* unset in the guest meanwhile: the kernel looks it up again */
    if (status < 0) {
        env_key_release(&h->handle);
        request_answer(rq, status);
        return;
    }
    env_handle_load(h);
    request_answer_opened(rq, &h->handle);
}

static void env_key_open(struct node *node, int flags, struct request *rq) {
    if (node->vm->gone || !env_key_var(node)) {
        /* The kernel may keep the name for a moment after it has gone; told this, it looks again.
         */
        request_answer(rq, node->vm->gone ? -ERR_GONE : -ERR_STALE);
        return;
    }
    struct env_handle *h = env_handle_new(node, flags);
    if (!h) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    if ((flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY) {
        env_handle_truncate(h);
        request_answer_opened(rq, &h->handle);
        return;
    }
    struct vm_wait *wait = guest_wait(node, node->name, env_open_answer, h, rq);
    int r = wait ? vars_refresh(node->vm->vars, wait) : 0;
    if (r != 0)
        guest_wait_settle(wait, r < 0 ? r : 0);
}

static void env_key_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct env_handle *h = (struct env_handle *)handle;
    buf_answer_read(&h->content, length, offset, rq);
}

/* Sets the length of the content; new bytes are NUL, which no variable can hold: they have to be
 * overwritten before the commit. */
static int env_handle_resize(struct env_handle *h, off_t size) {
    if (size < 0 || size > VAR_LIMIT + 1)
        return -ERR_TOO_LARGE;
    static const char zeros[4096];
    while (h->content.len < (size_t)size && !h->content.failed) {
        size_t more = (size_t)size - h->content.len;
        buf_append(&h->content, zeros, more < sizeof zeros ? more : sizeof zeros);
    }
    if (h->content.failed)
        return -ERR_NO_MEMORY;
    h->content.len = (size_t)size;
    return 0;
}

static void env_key_write(struct handle *handle, const char *data, size_t length, off_t offset,
                          struct request *rq) {
    struct env_handle *h = (struct env_handle *)handle;
    if (handle->node->vm->gone) {
        request_answer(rq, -ERR_GONE);
        return;
    }
    if (env_handle_is_astray(h)) {
        scratch_write_astray(handle, data, length, offset, rq);
        return;
    }
    if (handle->flags & O_APPEND) /* the kernel's idea of the end may be old */
        offset = (off_t)h->content.len;
    int r = 0;
    if (offset > VAR_LIMIT + 1 || length > VAR_LIMIT + 1 || (size_t)offset + length > VAR_LIMIT + 1)
        r = -ERR_TOO_LARGE;
    else if ((size_t)offset + length > h->content.len)
        r = env_handle_resize(h, offset + (off_t)length);
    if (r < 0) {
        env_handle_untruncate(h);
        h->wrote = true; /* a refused write is no empty value */
        env_handle_load(h);
        buf_clear(&h->appended);
        h->dirty = false;
        request_answer(rq, vm_fail(handle->node->vm, r, "env/%s: a value takes %d bytes at most",
                                   handle->node->name, VAR_LIMIT));
        return;
    }
    memcpy(h->content.data + offset, data, length);
    if (handle->flags & O_APPEND)
        buf_append(&h->appended, data, length);
    if (!h->wrote) {
        env_handle_commit(h, length, rq);
        return;
    }
    h->dirty = true;
    request_answer_written(rq, length);
}

static void env_key_flush(struct handle *handle, struct request *rq) {
    struct env_handle *h = (struct env_handle *)handle;
    if (h->dirty && !env_handle_is_astray(h))
        env_handle_commit(h, 0, rq);
    else
        request_answer(rq, 0);
}

static void env_key_fsync(struct handle *handle, struct request *rq) {
    struct env_handle *h = (struct env_handle *)handle;
    bool pending = h->dirty || ((h->truncating || h->creating) && !h->wrote);
    if (pending && !env_handle_is_astray(h))
        env_handle_commit(h, 0, rq);
    else
        request_answer(rq, 0);
}

static void env_handle_free(struct env_handle *h) {
    struct node *node = h->handle.node;
    if (!node->vm->gone && !env_handle_is_astray(h)) {
        env_handle_untruncate(h);
        if (h->creating)
            vars_uncreate(node->vm->vars, node->name);
    }
    buf_free(&h->content);
    buf_free(&h->appended);
    handle_done(&h->handle);
    free(h);
}

/* A handle that is closed with something to commit. Nobody is there to be told the verdict: a
 * failure is in `error` and in the log. Until then the name is there, and reads as the handle left
 * it. */
struct env_parting {
    struct vm_wait wait;
    struct env_handle *h;
};

static void env_parting_done(struct vm_wait *wait, int status) {
    struct env_parting *parting = LIST_OWNER(wait, struct env_parting, wait);
    (void)status;
    env_handle_free(parting->h);
    free(parting);
}

static void env_key_release(struct handle *handle) {
    struct env_handle *h = (struct env_handle *)handle;
    struct node *node = handle->node;
    bool empty = (h->truncating || h->creating) && !h->wrote;
    struct env_parting *parting = NULL;
    if (!node->vm->gone && (empty || h->dirty) && !env_handle_is_astray(h))
        parting = calloc(1, sizeof *parting);
    if (!parting) {
        env_handle_free(h);
        return;
    }
    list_remove(&handle->open); /* the transport has nothing to do with it any more */
    parting->wait.done = env_parting_done;
    list_init(&parting->wait.link);
    parting->h = h;
    struct var_change change = env_handle_change(h);
    if (vars_commit(node->vm->vars, &change, 1, &parting->wait) < 0) {
        env_handle_free(h);
        free(parting);
    }
}

static void env_key_set_size(struct node *node, struct env_handle *h, off_t size,
                             struct request *rq) {
    if (h) {
        int r = 0;
        if (size == 0 && !h->wrote) {
            env_handle_truncate(h);
        } else if ((size_t)size != h->content.len) {
            r = env_handle_resize(h, size);
            h->dirty = h->dirty || r == 0;
        }
        if (r < 0)
            request_answer(rq, vm_fail(node->vm, r, "env/%s: a value takes %d bytes at most",
                                       node->name, VAR_LIMIT));
        else
            request_answer_attr(rq, node);
        return;
    }
    /* truncate(2): nobody writes after it on a handle, so it is a change by itself. */
    const struct var *var = env_key_var(node);
    if (!var || (size_t)size > var->length) {
        request_answer(
            rq, !var ? -ERR_NOT_FOUND
                     : vm_fail(node->vm, size > VAR_LIMIT ? -ERR_TOO_LARGE : -ERR_INVALID,
                               "env/%s: a value cannot be filled up with NUL bytes", node->name));
        return;
    }
    struct var_change set = {.name = node->name, .bytes = var->bytes, .length = (size_t)size};
    env_commit(node, &set, 1, env_answer_plain, NULL, rq);
}

static void env_key_setattr(struct node *node, struct handle *handle, const struct stat *want,
                            unsigned mask, struct request *rq) {
    struct var *var = env_key_var(node);
    if (!var) {
        request_answer(rq, -ERR_STALE);
        return;
    }
    if (mask & NODE_SET_MODE)
        var->mode = want->st_mode & 07777;
    if (mask & NODE_SET_UID)
        var->uid = want->st_uid;
    if (mask & NODE_SET_GID)
        var->gid = want->st_gid;
    if (mask & NODE_SET_ATIME)
        var->read = want->st_atim;
    if (mask & NODE_SET_MTIME)
        var->changed = want->st_mtim;
    if (mask & NODE_SET_SIZE)
        env_key_set_size(node,
                         handle && handle->ops == &env_key_ops ? (struct env_handle *)handle : NULL,
                         want->st_size, rq);
    else
        request_answer_attr(rq, node);
}

const struct node_ops env_key_ops = {
    .stat = env_key_stat,
    .open = env_key_open,
    .read = env_key_read,
    .write = env_key_write,
    .flush = env_key_flush,
    .fsync = env_key_fsync,
    .release = env_key_release,
    .setattr = env_key_setattr,
};
