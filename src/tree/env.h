#pragma once

#include "tree/guest_wait.h"
#include "tree/node.h"
#include "vm/vars.h"

/* ID/env/: a directory of variables (tree/env.c), and one of them (tree/env_key.c). */

extern const struct node_ops env_key_ops;

/* One open of env/KEY (design, section 2: the contract of a write). */
struct env_handle {
    struct handle handle;
    struct buf content;  /* what this open file reads as */
    struct buf appended; /* of an appending handle: what is not yet committed */
    bool creating;       /* it made the name: vars_uncreate() at the end */
    bool truncating;     /* emptied, and nothing committed since: what was there is of no account */
    bool hiding;         /* counted in var->truncated */
    uint64_t since;      /* vars_generation() when it was emptied or the name made */
    bool wrote;          /* there was a WRITE, be it refused: it is not to become empty */
    bool dirty;          /* changed since the last commit that was not refused */
    bool failed;         /* so was the last commit: the next WRITE is to say how it is now */
    int refused;         /* by a WRITE, for what it held: no other is taken until it is emptied */
    int lost;            /* why what was acknowledged is not there and will not be: FLUSH says it */
    struct env_commit {
        bool busy;         /* one commit at a time; who comes meanwhile waits */
        struct list waits; /* of vm_wait */
        size_t writing;    /* bytes of the WRITE whose verdict it is; 0: of FLUSH or FSYNC */
        size_t appended;   /* how many bytes of h->appended are in it */
        struct buf before; /* the content before that WRITE */
    } commit;
};

/* The handle for a name that vars_create() has just made. NULL: no memory. */
struct env_handle *env_handle_create(struct node *node, int flags);

void env_rename(struct node *dir, const char *name, struct node *new_dir, const char *new_name,
                unsigned flags, struct request *rq);

/* Commits changes of the VM's variables for a request whose answer is plain success or not. */
void env_commit(struct node *node, const struct var_change *changes, size_t count,
                guest_answer *answer, void *arg, struct request *rq);
void env_answer_plain(void *arg, int status, struct request *rq);
