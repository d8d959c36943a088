#pragma once

#include "tree/node.h"
#include "vm/scratch.h"

/* ID/environ: all variables in one file (tree/environ.c). */

extern const struct node_ops environ_ops;

/* `environ` has been removed, and is created anew: the same as an open that truncates. */
void environ_create(struct node *dir, const struct node_row *row, int flags, struct request *rq);

/* What has been written to the scratch file replaces all variables (rename onto environ). On
 * success the scratch is gone and its node is environ's. */
void environ_take_scratch(struct node *dir, struct scratch *scratch, const struct node_row *row,
                          struct request *rq);

/* The file as it reads now. 0 or -ERR_NO_MEMORY. */
int environ_print(struct vm *vm, struct buf *out);
