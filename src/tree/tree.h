#pragma once

#include "tree/node.h"

/* The kinds of nodes, one file each: the tables that tree/root.c and tree/vmdir.c are made of. */

extern const struct node_ops root_ops;   /* /: the VMs */
extern const struct node_ops vmdir_ops;  /* ID/: a static table of the rest */
extern const struct node_ops config_ops; /* ID/config/ */
extern const struct node_ops env_ops;    /* ID/env/ */
extern const struct node_ops exec_ops;   /* ID/exec */
extern const struct node_ops jobs_ops;   /* ID/jobs/ */
extern const struct node_ops status_ops; /* ID/status */
extern const struct node_ops text_ops;   /* info, error, ssh_config: what a row's generate() says */
extern const struct node_ops console_ops;

/* Where inode numbers come from: each VM has a range of its own, in which the small numbers are the
 * static files and the rest is given out to variables. */
#define INODE_FIRST_DYNAMIC 64
uint64_t node_inode(const struct vm *vm, uint64_t slot);

/* The slot of a row in its VM's directory. */
uint64_t vmdir_slot(const struct node_row *row);

/* A scratch beside the files of a VM's directory has become what one of them holds, by rename. */
struct scratch;
void vmdir_take_scratch(struct node *dir, struct scratch *scratch, const char *name);

/* ID/status is put in place by rename: a desired state, as if it were written. */
void status_take(struct node *dir, const struct node_row *row, struct scratch *scratch,
                 struct request *rq);
/* It has been removed, and is created anew. */
void status_create(struct node *dir, const struct node_row *row, int flags, struct request *rq);
