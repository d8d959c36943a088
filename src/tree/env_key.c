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
    node_show_look(&var->look, &ret_stat->st);
    ret_stat->st.st_size = var->truncated ? 0 : (off_t)var->length;
}

static void env_handle_load(struct env_handle *h) {
    const struct var *var = env_key_var(h->handle.node);
    buf_clear(&h->content);
    if (var && !var->truncated)
        buf_append(&h->content, var->bytes, var->length);
}

/* Has the variable been set or unset since the handle was emptied? What came later counts. */
static bool env_handle_is_overtaken(const struct env_handle *h) {
    const struct var *var = env_key_var(h->handle.node);
    if (!var || (!var->set && !h->creating))
        return true;
    return var->generation > h->since;
}

static void env_handle_show(struct env_handle *h) {
    struct var *var = env_key_var(h->handle.node);
    if (h->hiding && var && var->truncated > 0 && !env_handle_is_overtaken(h))
        var->truncated--;
    h->hiding = false;
}

static void env_handle_truncate(struct env_handle *h) {
    struct node *node = h->handle.node;
    struct var *var = env_key_var(node);
    env_handle_show(h);
    buf_clear(&h->content);
    buf_clear(&h->appended);
    h->commit.appended = 0;
    h->since = vars_generation(node->vm->vars);
    h->truncating = true;
    if (var) {
        h->hiding = true;
        var->truncated++;
    }
}

static struct env_handle *env_handle_new(struct node *node, int flags) {
    struct env_handle *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    handle_init(&h->handle, node, flags);
    list_init(&h->commit.waits);
    h->since = vars_generation(node->vm->vars);
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

/* What a commit of the handle changes. One that appends does so to what is there by then: others
 * may append, too, or have emptied it. */
static struct var_change env_handle_change(const struct env_handle *h) {
    const struct var *var = env_key_var(h->handle.node);
    bool appends = (h->handle.flags & O_APPEND) && !h->truncating;
    const struct buf *bytes = appends ? &h->appended : &h->content;
    return (struct var_change){.name = h->handle.node->name,
                               .bytes = bytes->data ? bytes->data : "",
                               .length = bytes->len,
                               .append = appends && !(var && var->truncated)};
}

/* A WRITE has failed: its bytes are not there. */
static void env_handle_take_back(struct env_handle *h) {
    struct buf *before = &h->commit.before, swapped = h->content;
    h->content = *before;
    *before = swapped;
    if (h->handle.flags & O_APPEND)
        h->appended.len -= h->commit.writing;
}

/* What was acknowledged and then not committed stays dirty, and each FLUSH tries again: the one
 * that failed may have been that of a child that knows nothing of the file. But nobody knows what
 * became of an update whose answer was lost, and bytes are not appended twice: then it is said
 * again. */
static void env_handle_keep(struct env_handle *h, int status) {
    bool unknown = status == -ERR_TIMED_OUT || status == -ERR_UNREACHABLE ||
                   status == -ERR_INTERRUPTED || status == -ERR_GONE;
    if (h->refused) {
        h->lost = status;
    } else if (env_handle_change(h).append && unknown) {
        buf_consume(&h->appended, h->commit.appended);
        h->lost = status;
        h->dirty = h->appended.len > 0;
    } else {
        h->dirty = true;
    }
}

static bool is_refusal(int status) {
    return status == -ERR_INVALID || status == -ERR_TOO_LARGE;
}

/* The verdict on what a handle has committed. */
static void env_handle_verdict(void *arg, int status, struct request *rq) {
    struct env_handle *h = arg;
    size_t writing = h->commit.writing;
    h->commit.busy = false;
    h->failed = status < 0;
    if (status == 0) {
        buf_consume(&h->appended, h->commit.appended);
        h->truncating = false;
        h->dirty = h->dirty && !writing;
    } else if (writing) {
        env_handle_take_back(h);
        h->refused = is_refusal(status) ? status : 0;
    } else {
        env_handle_keep(h, status);
    }
    buf_clear(&h->commit.before);
    vm_wait_wake(&h->commit.waits, 0);
    if (status == 0 && writing)
        request_answer_written(rq, writing);
    else
        request_answer(rq, status < 0 ? status : h->lost);
}

static void env_handle_commit(struct env_handle *h, size_t writing, struct request *rq) {
    struct node *node = h->handle.node;
    h->wrote = true;
    h->dirty = h->dirty && writing;
    h->commit.busy = true;
    h->commit.writing = writing;
    h->commit.appended = h->appended.len;
    struct vm_wait *wait = guest_wait(node, node->name, env_handle_verdict, h, rq);
    if (!wait)
        return;
    struct var_change change = env_handle_change(h);
    int r = vars_commit(node->vm->vars, &change, 1, wait); /* copies the bytes */
    struct var *var = env_key_var(node);
    if (r == 0 && var)
        var->truncated = 0; /* who appends meanwhile does so to this */
    env_handle_show(h);
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

/* What no value can hold is refused at the WRITE that brings it, and so is all that follows. */
static int env_handle_check(const struct env_handle *h, const char *data, size_t length,
                            off_t offset) {
    struct node *node = h->handle.node;
    if (memchr(data, 0, length))
        return vars_refuse_nul(node->vm, node->name);
    size_t most = h->content.len;
    bool at_end = true;
    if (env_handle_change(h).append) {
        ssize_t there = vars_newest_length(node->vm->vars, node->name);
        most = (there > 0 ? (size_t)there : 0) + h->appended.len + length;
    } else if (offset > VAR_LIMIT + 1) {
        return vars_refuse_length(node->vm, node->name);
    } else if ((size_t)offset + length >= most) {
        most = (size_t)offset + length;
    } else {
        at_end = false;
    }
    char last = at_end ? data[length - 1] : h->content.data[most - 1];
    return var_fits(node->name, most, last == '\n') ? 0 : vars_refuse_length(node->vm, node->name);
}

static void env_handle_refuse(struct env_handle *h, int status, struct request *rq) {
    h->refused = status;
    h->lost = h->dirty ? status : h->lost;
    h->wrote = true;
    h->dirty = false;
    env_handle_show(h);
    env_handle_load(h);
    buf_clear(&h->appended);
    h->commit.appended = 0;
    request_answer(rq, status);
}

static int env_handle_put(struct env_handle *h, const char *data, size_t length, off_t offset) {
    size_t was = h->content.len, end = (size_t)offset + length;
    int r = end > was ? env_handle_resize(h, (off_t)end) : 0;
    if (r == 0 && (h->handle.flags & O_APPEND)) {
        buf_append(&h->appended, data, length);
        r = h->appended.failed;
    }
    if (r < 0) {
        h->content.len = was;
        return r;
    }
    memcpy(h->content.data + offset, data, length);
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
    if (h->refused) {
        request_answer(rq, h->refused);
        return;
    }
    if (handle->flags & O_APPEND) /* the kernel's idea of the end may be old */
        offset = (off_t)h->content.len;
    int r = env_handle_check(h, data, length, offset);
    if (r < 0) {
        env_handle_refuse(h, r, rq);
        return;
    }
    bool at_once = (!h->wrote || h->failed) && !h->commit.busy;
    struct buf *before = &h->commit.before;
    if (at_once)
        buf_append(before, h->content.data, h->content.len);
    r = before->failed ? before->failed : env_handle_put(h, data, length, offset);
    if (r < 0) {
        buf_clear(before);
        request_answer(rq, r);
    } else if (at_once) {
        env_handle_commit(h, length, rq);
    } else {
        h->dirty = true;
        request_answer_written(rq, length);
    }
}

static void env_handle_sync(struct env_handle *h, bool pending, struct request *rq);

static void env_handle_waited(void *arg, int status, struct request *rq) {
    struct env_handle *h = arg;
    if (status < 0)
        request_answer(rq, status);
    else
        env_handle_sync(h, h->dirty, rq);
}

/* FLUSH and FSYNC. */
static void env_handle_sync(struct env_handle *h, bool pending, struct request *rq) {
    struct node *node = h->handle.node;
    if (env_handle_is_astray(h)) {
        request_answer(rq, 0);
    } else if (h->commit.busy) {
        struct vm_wait *wait = guest_wait(node, node->name, env_handle_waited, h, rq);
        if (wait)
            list_append(&h->commit.waits, &wait->link);
    } else if (pending) {
        env_handle_commit(h, 0, rq);
    } else {
        request_answer(rq, h->lost);
    }
}

/* It is to be empty, and nobody has written anything yet. */
static bool env_handle_is_empty(const struct env_handle *h) {
    return (h->truncating || h->creating) && !h->wrote;
}

static void env_key_flush(struct handle *handle, struct request *rq) {
    struct env_handle *h = (struct env_handle *)handle;
    env_handle_sync(h, h->dirty, rq);
}

static void env_key_fsync(struct handle *handle, struct request *rq) {
    struct env_handle *h = (struct env_handle *)handle;
    env_handle_sync(h, h->dirty || env_handle_is_empty(h), rq);
}

static void env_handle_free(struct env_handle *h) {
    struct node *node = h->handle.node;
    if (!node->vm->gone && !env_handle_is_astray(h)) {
        env_handle_show(h);
        if (h->creating)
            vars_uncreate(node->vm->vars, node->name);
    }
    buf_free(&h->content);
    buf_free(&h->appended);
    buf_free(&h->commit.before);
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

/* What others have written since the handle was emptied stays; what they are writing now may fail,
 * so its verdict is waited for. */
static void env_parting_step(struct vm_wait *wait, int status) {
    struct env_parting *parting = LIST_OWNER(wait, struct env_parting, wait);
    struct env_handle *h = parting->h;
    struct node *node = h->handle.node;
    (void)status;
    bool over = node->vm->gone || env_handle_is_astray(h);
    if (!over && !h->dirty) {
        over = env_handle_is_overtaken(h);
        if (!over && vars_await(node->vm->vars, node->name, wait))
            return;
    }
    wait->done = env_parting_done;
    struct var_change change = env_handle_change(h);
    if (over || vars_commit(node->vm->vars, &change, 1, wait) < 0)
        env_parting_done(wait, 0);
}

static void env_key_release(struct handle *handle) {
    struct env_handle *h = (struct env_handle *)handle;
    /* A failure that the last FLUSH has told stays one. */
    bool pending = env_handle_is_empty(h) || (h->dirty && !h->failed);
    struct env_parting *parting = pending ? calloc(1, sizeof *parting) : NULL;
    if (!parting) {
        env_handle_free(h);
        return;
    }
    list_remove(&handle->open); /* the transport has nothing to do with it any more */
    parting->wait.done = env_parting_step;
    list_init(&parting->wait.link);
    parting->h = h;
    env_parting_step(&parting->wait, 0);
}

static void env_key_set_size(struct node *node, struct env_handle *h, off_t size,
                             struct request *rq) {
    if (h) {
        int r = 0;
        if (size == 0 && (!h->wrote || h->refused)) {
            env_handle_truncate(h);
            h->wrote = h->dirty = h->failed = false;
            h->refused = h->lost = 0;
        } else if ((size_t)size != h->content.len) {
            r = env_handle_resize(h, size);
            h->dirty = h->dirty || r == 0;
            h->truncating = h->truncating || r == 0; /* appended bytes are not all of it now */
        }
        if (r < 0)
            request_answer(rq, r == -ERR_TOO_LARGE ? vars_refuse_length(node->vm, node->name) : r);
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
    node_set_look(&var->look, want, mask);
    vm_save_soon(node->vm);
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
