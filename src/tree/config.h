#pragma once

#include "tree/guest_wait.h"
#include "tree/node.h"
#include "vm/config.h"

/* ID/config/: a directory of settings (tree/config.c), and one of them (tree/setting.c). */

extern const struct node_ops setting_ops;

/* Inode numbers: behind the static files of a VM's directory. */
#define SETTING_FIRST_SLOT 40

/* A setting has been removed, and is created anew: the same as an open that truncates. */
void setting_create(struct node *dir, const char *name, int flags, struct request *rq);

/* The file as it reads now. */
void setting_print(const struct vm *vm, const struct config_setting *setting, struct buf *out);

/* Changes a setting for a request that is about `node`; `arg` as for guest_wait(). */
void setting_commit(struct node *node, const char *name, const struct buf *text,
                    guest_answer *answer, void *arg, struct request *rq);
