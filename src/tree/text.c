#include <stdlib.h>
#include <string.h>

#include "tree/text.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/vm.h"

/* Small files whose contents are made when they are opened: what a row's generate() says. A reader
 * has the contents of the moment of its open. */

void text_stat(const struct node *node, struct node_stat *ret_stat) {
    cleanup_buf struct buf text = {0};
    node->row->generate(node->vm, &text);
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_size = (off_t)text.len;
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
}

void text_open(struct node *node, int flags, struct request *rq) {
    struct text_handle *h = calloc(1, sizeof *h);
    if (!h) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    handle_init(&h->handle, node, flags);
    node->row->generate(node->vm, &h->text);
    if (h->text.failed) {
        text_release(&h->handle);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    request_answer_opened(rq, &h->handle);
}

void text_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct text_handle *h = (struct text_handle *)handle;
    buf_answer_read(&h->text, length, offset, rq);
}

void text_release(struct handle *handle) {
    struct text_handle *h = (struct text_handle *)handle;
    buf_free(&h->text);
    handle_done(handle);
    free(h);
}

void buf_answer_read(const struct buf *text, size_t length, off_t offset, struct request *rq) {
    if (offset < 0 || (size_t)offset >= text->len) {
        request_answer_data(rq, "", 0);
        return;
    }
    size_t left = text->len - (size_t)offset;
    request_answer_data(rq, text->data + offset, left < length ? left : length);
}

const struct node_ops text_ops = {
    .stat = text_stat,
    .open = text_open,
    .read = text_read,
    .release = text_release,
    .setattr = node_setattr_ignore,
};
