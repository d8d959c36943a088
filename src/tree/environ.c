#include "tree/environ.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "tree/env.h"
#include "tree/text.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/vars.h"
#include "vm/vm.h"

/* ID/environ: `>` replaces all variables in one update of the guest, `>>` merges. It is parsed at
 * every WRITE, so that a bad line fails the write that brought it. The first WRITE has the guest's
 * verdict, as that of a single variable has; but a shell writes line by line, and nothing is to
 * have changed when a later line is bad, and nobody to see half of it. So what the first WRITE
 * brings is promised (vm/vars_promise.c), and FLUSH commits the whole.
 *
 * A tool that writes in pieces cuts lines anywhere. What ends inside of quotes or of a name,
 * without a newline, waits for the rest, until FLUSH; so does a large piece that ends inside a
 * line. */

#define ENVIRON_BLOCK 4096 /* what buffered writers write at least, as long as there is more */
#define ENVIRON_LARGEST ((1 << 20) - 4096)
#define ENVIRON_LIMIT                                                                              \
    (8 << 20) /* bytes of text: quoting and comments come on top of VARS_LIMIT                     \
               */

struct environ_handle {
    struct handle handle;
    struct buf content;  /* the file; of `>>` what has been appended */
    struct buf snapshot; /* what is read */
    bool truncating;     /* emptied, and nothing written since */
    uint64_t since;      /* vars_generation() at that moment */
    bool wrote;          /* there was a commit, or a WRITE that was refused */
    bool asked;          /* a WRITE has had its verdict: it was the first that was no piece */
    bool dirty;          /* changed since the last commit */
    bool failed;         /* the last commit has: the next WRITE is to say how it is now */
    int refused;         /* by a WRITE; no other is taken until the file is emptied */
    int lost;            /* why what was acknowledged is not there and will not be: FLUSH says it */
    struct vars_promise *promise; /* what the first WRITE has brought; NULL: nothing */
    struct environ_commit {
        bool busy;         /* one at a time; who comes meanwhile waits */
        struct list waits; /* of vm_wait */
        size_t length;     /* bytes of the WRITE, or of what FLUSH or FSYNC commits */
        struct buf before; /* the content before that WRITE */
    } commit;
};

static void environ_stat(const struct node *node, struct node_stat *ret_stat) {
    cleanup_buf struct buf text = {0};
    environ_print(node->vm, &text);
    node_stat_init(node, ret_stat);
    ret_stat->entry_seconds = 0;
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_size = (off_t)text.len;
    node_show_look(&node->vm->environ_look, &ret_stat->st);
    ret_stat->st.st_mtim = ret_stat->st.st_ctim = *vars_written(node->vm->vars);
}

/* Takes the changes over, replacing all; `arg` as for guest_wait(). */
static void environ_commit(struct node *node, struct environ_changes *all, guest_answer *answer,
                           void *arg, struct request *rq) {
    struct vm_wait *wait = guest_wait(node, "environ", answer, arg, rq);
    int r = wait ? vars_replace(node->vm->vars, all->changes, all->count, wait) : 0;
    if (r < 0)
        guest_wait_settle(wait, r);
    environ_changes_free(all);
}

/* A rename of scratch onto environ. */
struct environ_rename {
    struct node *dir;        /* a reference */
    struct scratch *scratch; /* a reference */
    const struct node_row *row;
};

static void environ_rename_answer(void *arg, int status, struct request *rq) {
    struct environ_rename *r = arg;
    if (status == 0) {
        r->dir->vm->environ_removed = 0;
        environ_note_style(r->dir->vm, &r->scratch->content);
        r->dir->vm->environ_look = r->scratch->look;
        vars_set_written(r->dir->vm->vars, &r->scratch->look.changed);
        vm_save_soon(r->dir->vm);
    }
    if (status == 0 && r->scratch->table) {
        node_move_child(r->dir, r->scratch->name, r->row->name);
        struct node *node = node_find_child(r->dir, r->row->name);
        if (node) {
            node_set_kind(node, &environ_ops, NULL);
            node->row = r->row;
        }
        scratch_remove(r->scratch);
    }
    scratch_unref(r->scratch);
    node_unref(r->dir);
    free(r);
    request_answer(rq, status);
}

void environ_take_scratch(struct node *dir, struct scratch *scratch, const struct node_row *row,
                          struct request *rq) {
    struct environ_changes all = {0};
    bool cut;
    const struct buf *text = &scratch->content;
    struct environ_rename *rename = malloc(sizeof *rename);
    int r = rename
                ? environ_parse(dir->vm, text->data ? text->data : "", text->len, false, &all, &cut)
                : -ERR_NO_MEMORY;
    if (r < 0) {
        free(rename);
        environ_changes_free(&all);
        request_answer(rq, r);
        return;
    }
    *rename = (struct environ_rename){node_ref(dir), scratch_ref(scratch), row};
    environ_commit(dir, &all, environ_rename_answer, rename, rq);
}

static bool environ_appends(const struct environ_handle *h) {
    return h->handle.flags & O_APPEND;
}

/* It has been done, or is not wanted any more. */
static void environ_settle(struct environ_handle *h) {
    if (h->promise)
        vars_promise_settle(h->promise);
    h->promise = NULL;
}

/* No WRITE is taken any more, so that a text of which a line is missing never replaces anything. */
static void environ_refuse(struct environ_handle *h, int status, struct request *rq) {
    h->refused = status;
    h->lost = h->dirty ? status : 0;
    h->wrote = true; /* it is no empty file */
    h->truncating = h->dirty = false;
    buf_clear(&h->content);
    environ_settle(h);
    request_answer(rq, status);
}

/* The verdict on the promise that the first WRITE asks for. */
static void environ_promised(void *arg, int status, struct request *rq) {
    struct environ_handle *h = arg;
    h->commit.busy = false;
    h->failed = status < 0;
    if (status < 0 && h->dirty) { /* the pieces before it are no whole without it */
        buf_clear(&h->commit.before);
        vm_wait_wake(&h->commit.waits, 0);
        environ_refuse(h, status, rq);
        return;
    }
    if (status < 0) {
        struct buf written = h->content;
        h->content = h->commit.before;
        h->commit.before = written;
        environ_settle(h);
    } else {
        h->dirty = true;
    }
    buf_clear(&h->commit.before);
    vm_wait_wake(&h->commit.waits, 0);
    if (status == 0)
        request_answer_written(rq, h->commit.length);
    else
        request_answer(rq, status);
}

static void environ_promise(struct environ_handle *h, size_t length, struct request *rq) {
    struct node *node = h->handle.node;
    struct environ_changes all = {0};
    bool cut;
    int r = environ_parse(node->vm, h->content.data ? h->content.data : "", h->content.len, false,
                          &all, &cut);
    environ_settle(h);
    h->wrote = h->asked = true;
    h->truncating = false;
    h->commit.busy = true;
    h->commit.length = length;
    struct vm_wait *wait = guest_wait(node, "environ", environ_promised, h, rq);
    /* A shell's echo or printf writes line by line: one line may be the first of many. */
    const char *newline = memchr(h->content.data, '\n', h->content.len);
    bool lines = newline && newline != h->content.data + h->content.len - 1;
    if (wait && r == 0)
        r = vars_promise(node->vm->vars, all.changes, all.count, !environ_appends(h),
                         !environ_appends(h) && lines, wait, &h->promise);
    if (wait && r < 0)
        guest_wait_settle(wait, r);
    environ_changes_free(&all);
}

/* The promise has left the record. */
static void environ_recorded(void *arg, int status, struct request *rq) {
    (void)arg;
    (void)status;
    request_answer(rq, 0);
}

static bool is_unknown(int status) {
    return status == -ERR_TIMED_OUT || status == -ERR_UNREACHABLE || status == -ERR_INTERRUPTED ||
           status == -ERR_GONE;
}

/* The verdict on what FLUSH has committed. What was not stays dirty, and each FLUSH tries again:
 * the one that failed may have been that of a child that knows nothing of the file. */
static void environ_verdict(void *arg, int status, struct request *rq) {
    struct environ_handle *h = arg;
    struct node *node = h->handle.node;
    bool promised = h->promise;
    h->commit.busy = false;
    h->failed = status < 0;
    h->dirty = h->dirty || (status < 0 && !h->refused);
    if (status == 0 && !h->dirty && !h->refused && !environ_appends(h))
        environ_note_style(node->vm, &h->content);
    if (status == 0 && environ_appends(h))
        buf_consume(&h->content, h->commit.length);
    if (promised && is_unknown(status))
        vars_promise_leave(h->promise);
    else if (promised)
        vars_promise_settle(h->promise);
    h->promise = NULL;
    vm_wait_wake(&h->commit.waits, 0);
    if (status < 0 || !promised || node->vm->gone) {
        request_answer(rq, status);
        return;
    }
    struct vm_wait *wait = guest_wait(node, "environ", environ_recorded, NULL, rq);
    if (wait)
        vm_save_for(node->vm, wait);
}

/* Commits what the handle holds. */
static void environ_handle_commit(struct environ_handle *h, struct request *rq) {
    struct node *node = h->handle.node;
    struct environ_changes all = {0};
    bool cut;
    const char *text = h->content.data ? h->content.data : "";
    int r = environ_parse(node->vm, text, h->content.len, false, &all, &cut);
    h->wrote = true;
    if (r < 0) { /* its end is missing, and may still come */
        environ_changes_free(&all);
        environ_settle(h);
        request_answer(rq, r);
        return;
    }
    h->truncating = h->dirty = false;
    h->commit.busy = true;
    h->commit.length = h->content.len;
    struct vm_wait *wait = guest_wait(node, "environ", environ_verdict, h, rq);
    if (wait)
        r = h->promise
                ? vars_promise_fulfil(h->promise, all.changes, all.count, !environ_appends(h), wait)
            : environ_appends(h) ? vars_commit(node->vm->vars, all.changes, all.count, wait)
                                 : vars_replace(node->vm->vars, all.changes, all.count, wait);
    if (wait && r < 0)
        guest_wait_settle(wait, r);
    environ_changes_free(&all);
}

static int environ_load(struct environ_handle *h) {
    int r = environ_print(h->handle.node->vm, &h->snapshot);
    if (r == 0 && !environ_appends(h))
        buf_append(&h->content, h->snapshot.data, h->snapshot.len);
    return r < 0 ? r : h->content.failed;
}

static void environ_wipe(struct buf *text) {
    if (text->data)
        explicit_bzero(text->data, text->len);
    buf_free(text);
}

static void environ_free(struct environ_handle *h) {
    environ_wipe(&h->content);
    environ_wipe(&h->snapshot);
    environ_wipe(&h->commit.before);
    environ_settle(h);
    handle_done(&h->handle);
    free(h);
}

static void environ_open_answer(void *arg, int status, struct request *rq) {
    struct environ_handle *h = arg;
    if (status == 0)
        status = environ_load(h);
    if (status < 0) {
        environ_free(h);
        request_answer(rq, status);
    } else {
        request_answer_opened(rq, &h->handle);
    }
}

static struct environ_handle *environ_handle_new(struct node *node, int flags) {
    struct environ_handle *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    handle_init(&h->handle, node, flags);
    list_init(&h->commit.waits);
    return h;
}

/* As on the day it was opened, and empty. */
static void environ_truncate(struct environ_handle *h) {
    buf_clear(&h->content);
    environ_settle(h);
    h->since = vars_generation(h->handle.node->vm->vars);
    h->truncating = true;
    h->wrote = h->asked = h->dirty = h->failed = false;
    h->refused = h->lost = 0;
}

static void environ_open(struct node *node, int flags, struct request *rq) {
    struct environ_handle *h = node->vm->gone ? NULL : environ_handle_new(node, flags);
    if (!h) {
        request_answer(rq, node->vm->gone ? -ERR_GONE : -ERR_NO_MEMORY);
        return;
    }
    if ((flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY) {
        environ_truncate(h);
        request_answer_opened(rq, &h->handle);
        return;
    }
    struct vm_wait *wait = guest_wait(node, "environ", environ_open_answer, h, rq);
    int r = wait ? vars_refresh(node->vm->vars, wait) : 0;
    if (r != 0)
        guest_wait_settle(wait, r < 0 ? r : 0);
}

void environ_create(struct node *dir, const struct node_row *row, int flags, struct request *rq) {
    struct node *node = node_child(dir, row->name, &environ_ops, row, dir->vm);
    struct environ_handle *h = node ? environ_handle_new(node, flags) : NULL;
    if (!h) {
        if (node)
            node_unref(node);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    dir->vm->environ_removed = 0;
    environ_truncate(h);
    request_answer_created(rq, node, &h->handle);
}

static void environ_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct environ_handle *h = (struct environ_handle *)handle;
    bool own = (h->wrote || h->dirty || h->truncating) && !h->refused && !environ_appends(h);
    const struct buf *text = own ? &h->content : &h->snapshot;
    buf_answer_read(text, length, offset, rq);
}

/* Lays the bytes over the content; a gap is filled with NUL, which the parser refuses. */
static int environ_patch(struct environ_handle *h, const char *data, size_t length, off_t offset) {
    if (offset < 0 || offset > ENVIRON_LIMIT || length > ENVIRON_LIMIT ||
        (size_t)offset + length > ENVIRON_LIMIT)
        return -ERR_TOO_LARGE;
    buf_patch(&h->content, (size_t)offset, data, length);
    return h->content.failed;
}

/* Is the text complete and good, or a piece of one that may become so? `ret_cut`: it ends inside of
 * something. */
static int environ_judge(struct environ_handle *h, bool in_a_line, bool *ret_cut) {
    struct environ_changes all = {0};
    int r = environ_parse(h->handle.node->vm, h->content.data, h->content.len,
                          in_a_line || h->dirty, &all, ret_cut);
    environ_changes_free(&all);
    return r;
}

static void environ_write(struct handle *handle, const char *data, size_t length, off_t offset,
                          struct request *rq) {
    struct environ_handle *h = (struct environ_handle *)handle;
    bool cut = false;
    if (h->refused) {
        request_answer(rq, h->refused);
        return;
    }
    if (environ_appends(h))
        offset = (off_t)h->content.len;
    bool in_a_line = length > 0 && data[length - 1] != '\n';
    /* The kernel cuts what is longer than a MiB, where the pages of the writer's buffer end. */
    bool piece = (in_a_line && length >= ENVIRON_BLOCK) || length >= ENVIRON_LARGEST;
    bool goes_on = h->dirty && in_a_line; /* a small piece, of a line that is not complete yet */
    bool first = (h->failed || !h->asked) && !h->commit.busy && !piece && !goes_on;
    if (first)
        buf_append(&h->commit.before, h->content.data, h->content.len);
    int r =
        h->commit.before.failed ? h->commit.before.failed : environ_patch(h, data, length, offset);
    /* A small piece that leaves its line open has nothing to be judged by yet. */
    if (r == 0 && (first || !h->dirty || !in_a_line || length >= ENVIRON_BLOCK))
        r = environ_judge(h, in_a_line, &cut);
    if (r == 0 && first && !cut) {
        environ_promise(h, length, rq);
        return;
    }
    buf_clear(&h->commit.before);
    if (r < 0) {
        environ_refuse(h, r, rq);
        return;
    }
    h->dirty = true;
    if (h->promise)
        vars_promise_go_on(h->promise);
    request_answer_written(rq, length);
}

static void environ_sync(struct environ_handle *h, bool pending, struct request *rq);

static void environ_waited(void *arg, int status, struct request *rq) {
    struct environ_handle *h = arg;
    if (status < 0)
        request_answer(rq, status);
    else
        environ_sync(h, h->dirty, rq);
}

/* FLUSH and FSYNC. */
static void environ_sync(struct environ_handle *h, bool pending, struct request *rq) {
    if (h->commit.busy) {
        struct vm_wait *wait = guest_wait(h->handle.node, "environ", environ_waited, h, rq);
        if (wait)
            list_append(&h->commit.waits, &wait->link);
    } else if (pending) {
        environ_handle_commit(h, rq);
    } else {
        request_answer(rq, h->lost);
    }
}

static void environ_flush(struct handle *handle, struct request *rq) {
    struct environ_handle *h = (struct environ_handle *)handle;
    environ_sync(h, h->dirty, rq);
}

static void environ_fsync(struct handle *handle, struct request *rq) {
    struct environ_handle *h = (struct environ_handle *)handle;
    environ_sync(h, h->dirty || (h->truncating && !h->wrote), rq);
}

/* A handle that was emptied, and closed. Nobody is there to be told the verdict: a failure is in
 * `error` and in the log. */
struct environ_parting {
    struct vm_wait wait;
    struct environ_handle *h;
};

static void environ_parting_done(struct vm_wait *wait, int status) {
    struct environ_parting *parting = LIST_OWNER(wait, struct environ_parting, wait);
    struct vm *vm = parting->h->handle.node->vm;
    if (status == 0)
        environ_note_style(vm, &parting->h->content);
    environ_free(parting->h);
    free(parting);
}

/* What others have committed since then stays; what is under way may fail, so its verdict is waited
 * for. */
static void environ_parting_step(struct vm_wait *wait, int status) {
    struct environ_parting *parting = LIST_OWNER(wait, struct environ_parting, wait);
    struct vm *vm = parting->h->handle.node->vm;
    (void)status;
    bool over = vm->gone || vars_generation(vm->vars) != parting->h->since;
    if (!over && vars_await(vm->vars, NULL, wait))
        return;
    wait->done = environ_parting_done;
    int r = over ? -ERR_EXISTS : vars_replace(vm->vars, NULL, 0, wait);
    if (r < 0)
        environ_parting_done(wait, r);
}

static void environ_release(struct handle *handle) {
    struct environ_handle *h = (struct environ_handle *)handle;
    bool pending = h->truncating && !h->wrote && !h->dirty;
    struct environ_parting *parting = pending ? calloc(1, sizeof *parting) : NULL;
    if (!parting) {
        environ_free(h);
        return;
    }
    list_remove(&handle->open); /* the transport has nothing to do with it any more */
    parting->wait.done = environ_parting_step;
    list_init(&parting->wait.link);
    parting->h = h;
    environ_parting_step(&parting->wait, 0);
}

static void environ_emptied(void *arg, int status, struct request *rq) {
    if (status == 0)
        environ_note_style(arg, &(struct buf){0});
    request_answer(rq, status);
}

static void environ_setattr(struct node *node, struct handle *handle, const struct stat *want,
                            unsigned mask, struct request *rq) {
    struct environ_handle *h =
        handle && handle->ops == &environ_ops ? (struct environ_handle *)handle : NULL;
    struct environ_changes none = {0};
    node_set_look(&node->vm->environ_look, want, mask);
    if (mask & NODE_SET_MTIME)
        vars_set_written(node->vm->vars, &want->st_mtim);
    vm_save_soon(node->vm);
    if (!(mask & NODE_SET_SIZE)) {
        request_answer_attr(rq, node);
    } else if (h && (size_t)want->st_size <= h->content.len) {
        if (want->st_size == 0 && (!h->wrote || h->refused)) {
            environ_truncate(h);
        } else {
            h->content.len = (size_t)want->st_size;
            h->dirty = !h->refused;
        }
        request_answer_attr(rq, node);
    } else if (!h && want->st_size == 0) {
        environ_commit(node, &none, environ_emptied, node->vm, rq);
    } else {
        request_answer(rq, want->st_size > ENVIRON_LIMIT ? -ERR_TOO_LARGE : -ERR_INVALID);
    }
}

const struct node_ops environ_ops = {
    .stat = environ_stat,
    .open = environ_open,
    .read = environ_read,
    .write = environ_write,
    .flush = environ_flush,
    .fsync = environ_fsync,
    .release = environ_release,
    .setattr = environ_setattr,
};
