#pragma once

#include "vm/vars.h"

/* Private to vm/vars.c (the table) and vm/vars_commit.c (how changes reach the guest or the disk). */

#define VAR_FIRST_NUMBER 64 /* below are the inode numbers of a VM's static files */

struct vars_batch;

struct vars {
    struct vm *vm; /* the owner */
    struct var_index index;
    size_t total;        /* bytes of all that are set, with their keys */
    uint64_t generation; /* grows with each change of the table */
    uint64_t last_number;
    struct timespec changed;
    struct buf kept; /* lines of others in the guest's file */

    struct list queued;        /* of vars_commit: for the next batch */
    struct vars_batch *flight; /* under way */
    size_t projected;          /* `total` when all that is queued or under way will be done */

    uint64_t learned; /* uv_now() of the last word from the guest; 0: never */
    bool refreshing;
    struct list refresh_waits; /* of vm_wait */

    uint64_t guest_generation; /* of the table that the guest has */
    void (*attached)(struct vm *vm, int status); /* not NULL: attaching after a boot */

    uint64_t commits, updates; /* counters: what was asked, and rewrites of the guest's file */
};

int vars_set(struct vars *vars, const char *name, const char *bytes, size_t length);
void vars_unset(struct vars *vars, const char *name);
size_t vars_count(const struct vars *vars);

/* Length without one trailing newline. */
size_t var_value_length(const char *bytes, size_t length);

/* Takes over what the guest's file says. */
int vars_learn(struct vars *vars, const char *text, size_t length);

/* Visits every variable in order, as it will be when `batch` (may be NULL) is done. */
int vars_walk(const struct vars *vars, const struct vars_batch *batch,
              int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
              void *arg);

/* The batch under way, if it is on its way to the disk; else NULL. */
const struct vars_batch *vars_disk_batch(const struct vars *vars);

/* Fails what is queued, under way or waiting. */
void vars_fail_all(struct vars *vars, int status);
