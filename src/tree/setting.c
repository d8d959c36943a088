#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "tree/config.h"
#include "tree/text.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/vm.h"

/* ID/config/NAME. It is committed by the rules of a variable (tree/env_key.c): the first WRITE at
 * once, later ones at FLUSH, a truncation by itself at the end. */

#define SETTING_LIMIT 8192 /* bytes of a file: the longest value, with room for blanks */

struct setting_handle {
    struct handle handle;
    struct buf content; /* what this open file reads as */
    bool truncating;    /* emptied, and nothing committed since */
    bool wrote;         /* a first WRITE has been committed, or refused */
    bool dirty;         /* changed since the last commit */
    size_t writing;     /* bytes of the WRITE that waits for its verdict */
};

void setting_print(const struct vm *vm, const struct config_setting *setting, struct buf *out) {
    vm_print_setting(vm, setting, out);
}

static struct vm_config_file *setting_file(const struct node *node) {
    return &node->vm->config_files[config_find(node->name) - config_settings];
}

static void setting_stat(const struct node *node, struct node_stat *ret_stat) {
    cleanup_buf struct buf text = {0};
    const struct config_setting *setting = config_find(node->name);
    setting_print(node->vm, setting, &text);
    node_stat_init(node, ret_stat);
    ret_stat->entry_seconds = 0; /* a rename may give the name another node */
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
    ret_stat->st.st_ino =
        node_inode(node->vm, SETTING_FIRST_SLOT + (uint64_t)(setting - config_settings));
    ret_stat->st.st_mode = S_IFREG | 0644;
    ret_stat->st.st_size = (off_t)text.len;
    ret_stat->st.st_mtim = ret_stat->st.st_ctim = setting_file(node)->changed;
}

void setting_commit(struct node *node, const char *name, const struct buf *text,
                    guest_answer *answer, void *arg, struct request *rq) {
    struct vm_wait *wait = guest_wait(node, NULL, answer, arg, rq);
    int r = wait ? vm_configure(node->vm, name, text->data ? text->data : "", text->len, wait) : 0;
    if (r != 0)
        guest_wait_settle(wait, r < 0 ? r : 0);
}

static void setting_answer(void *arg, int status, struct request *rq) {
    (void)arg;
    request_answer(rq, status);
}

static void setting_load(struct setting_handle *h) {
    const struct node *node = h->handle.node;
    buf_clear(&h->content);
    setting_print(node->vm, config_find(node->name), &h->content);
}

/* On what a handle has committed: by a WRITE of h->writing bytes, or by FLUSH or FSYNC. */
static void setting_verdict(void *arg, int status, struct request *rq) {
    struct setting_handle *h = arg;
    if (status < 0) {
        setting_load(h);
        h->dirty = false;
    }
    if (status == 0 && h->writing)
        request_answer_written(rq, h->writing);
    else
        request_answer(rq, status);
}

static void setting_handle_commit(struct setting_handle *h, size_t writing, struct request *rq) {
    h->wrote = true;
    h->dirty = h->truncating = false;
    h->writing = writing;
    setting_commit(h->handle.node, h->handle.node->name, &h->content, setting_verdict, h, rq);
}

static void setting_free(struct setting_handle *h) {
    buf_free(&h->content);
    handle_done(&h->handle);
    free(h);
}

static struct setting_handle *setting_handle_new(struct node *node, int flags) {
    struct setting_handle *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    handle_init(&h->handle, node, flags);
    h->truncating = (flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY;
    if (!h->truncating)
        setting_load(h);
    return h;
}

static void setting_open(struct node *node, int flags, struct request *rq) {
    struct setting_handle *h = node->vm->gone ? NULL : setting_handle_new(node, flags);
    if (h)
        request_answer_opened(rq, &h->handle);
    else
        request_answer(rq, node->vm->gone ? -ERR_GONE : -ERR_NO_MEMORY);
}

void setting_create(struct node *dir, const char *name, int flags, struct request *rq) {
    struct node *node = node_child(dir, name, &setting_ops, NULL, dir->vm);
    struct setting_handle *h = node ? setting_handle_new(node, flags | O_TRUNC) : NULL;
    if (!h) {
        if (node)
            node_unref(node);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    setting_file(node)->removed = 0;
    request_answer_created(rq, node, &h->handle);
}

static void setting_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    buf_answer_read(&((struct setting_handle *)handle)->content, length, offset, rq);
}

/* Lays the bytes over the content; a gap is filled with NUL, which no setting takes. */
static int setting_patch(struct setting_handle *h, const char *data, size_t length, off_t offset) {
    if (offset < 0 || offset > SETTING_LIMIT || length > SETTING_LIMIT - (size_t)offset)
        return vm_fail(h->handle.node->vm, -ERR_TOO_LARGE, "config/%s: that is too long for it",
                       h->handle.node->name);
    buf_patch(&h->content, (size_t)offset, data, length);
    return h->content.failed;
}

static void setting_write(struct handle *handle, const char *data, size_t length, off_t offset,
                          struct request *rq) {
    struct setting_handle *h = (struct setting_handle *)handle;
    if (handle->flags & O_APPEND) /* the kernel's idea of the end may be old */
        offset = (off_t)h->content.len;
    int r = setting_patch(h, data, length, offset);
    if (r < 0) {
        h->wrote = true; /* a refused write is no empty value */
        h->truncating = h->dirty = false;
        h->content.failed = 0;
        setting_load(h);
        request_answer(rq, r);
    } else if (!h->wrote) {
        setting_handle_commit(h, length, rq);
    } else {
        h->dirty = true;
        request_answer_written(rq, length);
    }
}

static void setting_flush(struct handle *handle, struct request *rq) {
    struct setting_handle *h = (struct setting_handle *)handle;
    if (h->dirty)
        setting_handle_commit(h, 0, rq);
    else
        request_answer(rq, 0);
}

static void setting_fsync(struct handle *handle, struct request *rq) {
    struct setting_handle *h = (struct setting_handle *)handle;
    if (h->dirty || (h->truncating && !h->wrote))
        setting_handle_commit(h, 0, rq);
    else
        request_answer(rq, 0);
}

static void setting_release(struct handle *handle) {
    struct setting_handle *h = (struct setting_handle *)handle;
    struct node *node = handle->node;
    /* Nobody is there to be told; a failure is in `error` and in the log. */
    if ((h->dirty || (h->truncating && !h->wrote)) && !node->vm->gone)
        vm_configure(node->vm, node->name, h->content.data ? h->content.data : "", h->content.len,
                     NULL);
    setting_free(h);
}

static void setting_set_size(struct node *node, struct setting_handle *h, off_t size,
                             struct request *rq) {
    cleanup_buf struct buf text = {0};
    if (!h)
        setting_print(node->vm, config_find(node->name), &text);
    struct buf *content = h ? &h->content : &text;
    if (size < 0 || (size_t)size > content->len) {
        request_answer(
            rq, vm_fail(node->vm, -ERR_INVALID, "config/%s: holds no NUL bytes", node->name));
        return;
    }
    content->len = (size_t)size;
    if (!h) { /* truncate(2): a change by itself */
        setting_commit(node, node->name, content, setting_answer, NULL, rq);
        return;
    }
    if (size == 0 && !h->wrote)
        h->truncating = true;
    else
        h->dirty = true;
    request_answer_attr(rq, node);
}

static void setting_setattr(struct node *node, struct handle *handle, const struct stat *want,
                            unsigned mask, struct request *rq) {
    struct setting_handle *h =
        handle && handle->ops == &setting_ops ? (struct setting_handle *)handle : NULL;
    if (node->vm->gone) {
        request_answer(rq, -ERR_GONE);
        return;
    }
    if (mask & NODE_SET_MTIME)
        setting_file(node)->changed = want->st_mtim;
    if (mask & NODE_SET_SIZE)
        setting_set_size(node, h, want->st_size, rq);
    else
        request_answer_attr(rq, node); /* mode and owner are what they are */
}

const struct node_ops setting_ops = {
    .stat = setting_stat,
    .open = setting_open,
    .read = setting_read,
    .write = setting_write,
    .flush = setting_flush,
    .fsync = setting_fsync,
    .release = setting_release,
    .setattr = setting_setattr,
};
