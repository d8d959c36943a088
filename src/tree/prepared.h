#pragma once

#include "tree/node.h"
#include "vm/scratch.h"

#define NEW_INODE 2
extern const struct node_ops new_ops;     /* /.new/: VMs that are being prepared */
extern const struct node_ops forward_ops; /* .defaults/forward, .new/NAME/forward */

/* `forward` is put in place as a whole, by rename. */
void forward_take(struct node *dir, const struct node_row *row, struct scratch *scratch,
                  struct request *rq);

/* `forward` was hidden or has been removed, and is created anew: the same as an open that
 * truncates. */
void forward_create(struct node *dir, const struct node_row *row, int flags, struct request *rq);

/* mkdir of a VM, or a rename of `prepared` (NULL: none) into `root`; answers the request. */
void prepared_create_vm(struct node *root, const char *name, struct node *new_dir,
                        const char *prepared, struct request *rq);
