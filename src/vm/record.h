#pragma once

#include "vm/vm.h"

/* The record of a VM, vm.json in its folder: what the next daemon needs to go on. Written by
 * vm/record.c, read by vm/record_load.c. */

#define RECORD_VERSION 1

/* Brings back what is recorded in `dir` as a VM of this role. Its name is that of what is prepared,
 * whatever the record says, and has to be that of an ordinary VM; NULL: any. On error *ret_why is
 * what is wrong (the caller frees it): -ERR_NOT_FOUND: there is no record; -ERR_INVALID: it is
 * damaged, or of another VM; else this daemon lacks what it takes (descriptors, memory), and is to
 * leave everything as it is. */
int vm_load(struct daemon *d, const char *dir, const char *name, enum vm_role role,
            struct vm **ret_vm, char **ret_why);

/* A VM whose record cannot be read: failed, with words about it; the record is put aside, and what
 * runs is ended. It has no number yet. NULL: no memory. */
struct vm *vm_load_unreadable(struct daemon *d, const char *dir, const char *name,
                              enum vm_role role, const char *why);

/* Is this an error of the host, which says nothing about what was looked for? */
bool record_lacks_resources(int status);
