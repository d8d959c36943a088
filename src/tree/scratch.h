#pragma once

#include "tree/node.h"
#include "vm/scratch.h"

/* Scratch as nodes: what the directories that allow it (env/, ID/) share. */

extern const struct node_ops scratch_file_ops;
extern const struct node_ops scratch_dir_ops;

/* Is what is created by this name with these flags scratch? mkstemp(3) opens O_RDWR|O_CREAT|O_EXCL;
 * its names may look like anything. Others are beside a variable: KEY.tmp. */
bool scratch_is_wanted(struct vm *vm, const char *name, int flags);
/* The same where not variables but one file is to be replaced. */
bool scratch_is_wanted_beside(const char *file, const char *name, int flags);

/* The node of a scratch; a new reference. NULL: no memory. */
struct node *scratch_node(struct node *dir, struct scratch *scratch);

/* The operations of a directory, as far as they concern scratch. */
void scratch_create(struct node *dir, struct scratches *table, const char *name, int flags,
                    mode_t mode, struct request *rq);
void scratch_mkdir(struct node *dir, struct scratches *table, const char *name, mode_t mode,
                   struct request *rq);
int scratch_list(struct node *dir, struct scratches *table, struct node_list *list);
/* `directory`: rmdir, else unlink. */
void scratch_unlink(struct node *dir, struct scratch *scratch, bool directory, struct request *rq);
/* A WRITE by a handle that was opened as something else: what its node is now takes it, if that is
 * scratch; else nobody. */
void scratch_write_astray(struct handle *handle, const char *data, size_t length, off_t offset,
                          struct request *rq);

/* A rename of scratch onto another name of scratch, or onto none. */
void scratch_rename_node(struct node *dir, struct scratches *table, struct scratch *scratch,
                         const char *new_name, unsigned flags, struct request *rq);
