#pragma once

#include "tree/node.h"
#include "util/cleanup.h"

/* Files whose contents fit in memory and are fixed at open; for the kinds that are that and a bit
 * more. */

struct text_handle {
    struct handle handle;
    struct buf text;
};

void text_stat(const struct node *node, struct node_stat *ret_stat);
void text_open(struct node *node, int flags, struct request *rq);
void text_read(struct handle *handle, size_t length, off_t offset, struct request *rq);
void text_release(struct handle *handle);

/* Answers a read of `length` bytes at `offset` from a buffer. */
void buf_answer_read(const struct buf *text, size_t length, off_t offset, struct request *rq);
