#pragma once

#include "tree/node.h"
#include "vm/vars.h"

/* A request may queue behind an update that is itself waiting for its deadline; it ends a little
 * later, so that the better of the two explanations is given. */
#define ENV_GRACE_MS 250

/* ID/env/: a directory of variables (tree/env.c), and one of them (tree/env_key.c). */

extern const struct node_ops env_key_ops;

/* One open of env/KEY (design, section 2: the contract of a write). */
struct env_handle {
    struct handle handle;
    struct buf content; /* what this open file reads as */
    bool creating;      /* it made the name: vars_uncreate() at the end */
    bool truncating;    /* emptied, and nothing committed since */
    bool wrote;         /* a first WRITE has been committed, or refused */
    bool dirty;         /* changed since the last commit */
};

/* The handle for a name that vars_create() has just made. NULL: no memory. */
struct env_handle *env_handle_create(struct node *node, int flags);

void env_rename(struct node *dir, const char *name, struct node *new_dir, const char *new_name,
                unsigned flags, struct request *rq);

/* Parks `rq` until the commit of `changes` has its verdict. On success it answers with `written`
 * bytes, or with plain success when that is negative. `h` (may be NULL) learns the verdict. */
void env_commit(struct node *node, struct env_handle *h, const struct var_change *changes,
                size_t count, ssize_t written, struct request *rq);
