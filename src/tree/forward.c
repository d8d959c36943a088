#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "tree/guest_wait.h"
#include "tree/prepared.h"
#include "tree/text.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/prepare.h"

/* .defaults/forward, .new/NAME/forward. It is committed by the rules of a variable
 * (tree/env_key.c): the first WRITE at once, later ones at FLUSH, a truncation by itself at the
 * end. But who changes it in place, byte by byte, may have a bad line meanwhile: that counts when
 * he closes it. */

struct forward_handle {
    struct handle handle;
    struct buf content; /* what this open file reads as */
    bool in_place;      /* neither emptied at the start nor appended to */
    bool truncating;    /* emptied, and nothing committed since */
    bool wrote;         /* there was a commit, or a WRITE that was refused */
    bool dirty;         /* changed since the last commit */
    int refused;        /* by a WRITE; no other is taken until the file is emptied */
    size_t writing;     /* bytes of the WRITE that waits for its verdict */
};

static void forward_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_size = (off_t)node->vm->forward.len;
    ret_stat->entry_seconds = 0; /* a rename may give the name another node */
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
}

static void forward_commit(struct node *node, const struct buf *text, guest_answer *answer,
                           void *arg, struct request *rq) {
    struct vm_wait *wait = guest_wait(node, NULL, answer, arg, rq);
    int r = wait ? prepare_set_forward(node->vm, text->data ? text->data : "", text->len, wait) : 0;
    if (r < 0)
        guest_wait_settle(wait, r);
}

static void forward_load(struct forward_handle *h) {
    const struct buf *forward = &h->handle.node->vm->forward;
    buf_clear(&h->content);
    buf_append(&h->content, forward->data ? forward->data : "", forward->len);
}

/* On what a handle has committed: by a WRITE of h->writing bytes, or by FLUSH or FSYNC. */
static void forward_verdict(void *arg, int status, struct request *rq) {
    struct forward_handle *h = arg;
    if (status < 0) {
        forward_load(h);
        h->dirty = false;
        h->refused = status;
    }
    if (status == 0 && h->writing)
        request_answer_written(rq, h->writing);
    else
        request_answer(rq, status);
}

static void forward_handle_commit(struct forward_handle *h, size_t writing, struct request *rq) {
    h->wrote = true;
    h->dirty = h->truncating = false;
    h->writing = writing;
    forward_commit(h->handle.node, &h->content, forward_verdict, h, rq);
}

static void forward_free(struct forward_handle *h) {
    buf_free(&h->content);
    handle_done(&h->handle);
    free(h);
}

static struct forward_handle *forward_handle_new(struct node *node, int flags) {
    struct forward_handle *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    handle_init(&h->handle, node, flags);
    h->truncating = (flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY;
    h->in_place = !h->truncating && !(flags & O_APPEND);
    if (!h->truncating)
        forward_load(h);
    return h;
}

static void forward_open(struct node *node, int flags, struct request *rq) {
    struct forward_handle *h = node->vm->gone ? NULL : forward_handle_new(node, flags);
    if (h)
        request_answer_opened(rq, &h->handle);
    else
        request_answer(rq, node->vm->gone ? -ERR_GONE : -ERR_NO_MEMORY);
}

void forward_create(struct node *dir, const struct node_row *row, int flags, struct request *rq) {
    struct node *node = node_child(dir, row->name, row->ops, row, dir->vm);
    struct forward_handle *h = node ? forward_handle_new(node, flags | O_TRUNC) : NULL;
    if (!h) {
        if (node)
            node_unref(node);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    dir->vm->forward_removed = 0;
    request_answer_created(rq, node, &h->handle);
}

static void forward_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    buf_answer_read(&((struct forward_handle *)handle)->content, length, offset, rq);
}

/* Lays the bytes over the content; a gap is filled with NUL, which no line takes. */
static int forward_patch(struct forward_handle *h, const char *data, size_t length, off_t offset) {
    if (offset < 0 || offset > FORWARD_LIMIT || length > FORWARD_LIMIT - (size_t)offset)
        return prepare_refuse_forward(h->handle.node->vm);
    while (h->content.len < (size_t)offset && !h->content.failed)
        buf_append_char(&h->content, '\0');
    size_t over = h->content.len - (size_t)offset;
    if (over > length)
        over = length;
    if (over)
        memcpy(h->content.data + offset, data, over);
    buf_append(&h->content, data + over, length - over);
    return h->content.failed;
}

static void forward_write(struct handle *handle, const char *data, size_t length, off_t offset,
                          struct request *rq) {
    struct forward_handle *h = (struct forward_handle *)handle;
    if (handle->flags & O_APPEND) /* the kernel's idea of the end may be old */
        offset = (off_t)h->content.len;
    int r = h->refused ? h->refused : forward_patch(h, data, length, offset);
    if (r < 0) {
        h->wrote = true; /* a refused write is no empty file */
        h->truncating = h->dirty = false;
        h->refused = r;
        h->content.failed = 0;
        forward_load(h);
        request_answer(rq, r);
    } else if (!h->wrote && !h->in_place) {
        forward_handle_commit(h, length, rq);
    } else {
        h->dirty = true;
        request_answer_written(rq, length);
    }
}

static void forward_flush(struct handle *handle, struct request *rq) {
    struct forward_handle *h = (struct forward_handle *)handle;
    if (h->dirty)
        forward_handle_commit(h, 0, rq);
    else
        request_answer(rq, 0);
}

static void forward_fsync(struct handle *handle, struct request *rq) {
    struct forward_handle *h = (struct forward_handle *)handle;
    if (h->dirty || (h->truncating && !h->wrote))
        forward_handle_commit(h, 0, rq);
    else
        request_answer(rq, 0);
}

static void forward_release(struct handle *handle) {
    struct forward_handle *h = (struct forward_handle *)handle;
    struct vm *vm = handle->node->vm;
    /* Nobody is there to be told; a failure is in `error` and in the log. */
    if ((h->dirty || (h->truncating && !h->wrote)) && !vm->gone)
        prepare_set_forward(vm, h->content.data ? h->content.data : "", h->content.len, NULL);
    forward_free(h);
}

static void forward_answer(void *arg, int status, struct request *rq) {
    (void)arg;
    request_answer(rq, status);
}

static void forward_set_size(struct node *node, struct forward_handle *h, off_t size,
                             struct request *rq) {
    cleanup_buf struct buf text = {0};
    if (!h)
        buf_append(&text, node->vm->forward.data ? node->vm->forward.data : "",
                   node->vm->forward.len);
    struct buf *content = h ? &h->content : &text;
    if (size < 0 || (size_t)size > content->len) {
        request_answer(rq, vm_fail(node->vm, -ERR_INVALID, "forward holds no NUL bytes"));
        return;
    }
    content->len = (size_t)size;
    if (!h) { /* truncate(2): a change by itself */
        forward_commit(node, content, forward_answer, NULL, rq);
        return;
    }
    h->refused = 0;
    h->in_place = h->in_place && size > 0;
    if (size == 0 && !h->wrote)
        h->truncating = true;
    else
        h->dirty = true;
    request_answer_attr(rq, node);
}

static void forward_setattr(struct node *node, struct handle *handle, const struct stat *want,
                            unsigned mask, struct request *rq) {
    struct forward_handle *h =
        handle && handle->ops == &forward_ops ? (struct forward_handle *)handle : NULL;
    if (node->vm->gone)
        request_answer(rq, -ERR_GONE);
    else if (mask & NODE_SET_SIZE)
        forward_set_size(node, h, want->st_size, rq);
    else
        request_answer_attr(rq, node); /* mode and owner are what they are */
}

/* A rename of scratch onto forward. */
struct forward_rename {
    struct node *dir;        /* a reference */
    struct scratch *scratch; /* a reference */
    const struct node_row *row;
};

static void forward_renamed(void *arg, int status, struct request *rq) {
    struct forward_rename *r = arg;
    if (status == 0) {
        r->dir->vm->forward_removed = 0;
        vmdir_take_scratch(r->dir, r->scratch, r->row->name);
    }
    scratch_unref(r->scratch);
    node_unref(r->dir);
    free(r);
    request_answer(rq, status);
}

void forward_take(struct node *dir, const struct node_row *row, struct scratch *scratch,
                  struct request *rq) {
    struct forward_rename *rename = malloc(sizeof *rename);
    if (!rename) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    *rename = (struct forward_rename){node_ref(dir), scratch_ref(scratch), row};
    forward_commit(dir, &scratch->content, forward_renamed, rename, rq);
}

const struct node_ops forward_ops = {
    .stat = forward_stat,
    .open = forward_open,
    .read = forward_read,
    .write = forward_write,
    .flush = forward_flush,
    .fsync = forward_fsync,
    .release = forward_release,
    .setattr = forward_setattr,
};
