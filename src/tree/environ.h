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

/* The file as it reads now. 0 or -ERR_NO_MEMORY. A shell that sources it has the variables
 * exported: KEY='value' lines between `set -a` and `set +a`, or lines `export KEY='value'`. */
int environ_print(struct vm *vm, struct buf *out);

/* All variables have been replaced by this text. If it is what would be printed in lines that begin
 * with `export`, they are printed so from now on: who compares the file with his own finds no
 * difference. */
void environ_note_style(struct vm *vm, const struct buf *text);

/* What a text says. */
struct environ_changes {
    struct var_change *changes;
    size_t count, cap;
};

/* -ERR_INVALID and other refusals, with words in `error`. When `more_may_come`, a text that ends
 * inside of something is none: *ret_cut is true then. The changes are to be freed in any case. */
int environ_parse(struct vm *vm, const char *text, size_t length, bool more_may_come,
                  struct environ_changes *ret_all, bool *ret_cut);
void environ_changes_free(struct environ_changes *all);
