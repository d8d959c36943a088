#pragma once

#include "tree/guest_wait.h"
#include "tree/node.h"
#include "vm/vars.h"

/* ID/env/: a directory of variables (tree/env.c), and one of them (tree/env_key.c). */

extern const struct node_ops env_key_ops;

/* One open of env/KEY (design, section 2: the contract of a write). */
struct env_handle {
    struct handle handle;
    struct buf appended; /* of an appending handle: what is not yet committed */
    struct buf content;  /* what this open file reads as */
    bool creating;       /* it made the name: vars_uncreate() at the end */
    bool truncating;     /* emptied, and nothing committed since */
    bool wrote;          /* a first WRITE has been committed, or refused */
    size_t writing;      /* bytes of the WRITE that waits for its verdict */
    bool dirty;          /* changed since the last commit */
};

/* The handle for a name that vars_create() has just made. NULL: no memory. */
struct env_handle *env_handle_create(struct node *node, int flags);

void env_rename(struct node *dir, const char *name, struct node *new_dir, const char *new_name,
                unsigned flags, struct request *rq);

/* Commits changes of the VM's variables for a request whose answer is plain success or not. */
void env_commit(struct node *node, const struct var_change *changes, size_t count,
                guest_answer *answer, void *arg, struct request *rq);
void env_answer_plain(void *arg, int status, struct request *rq);
