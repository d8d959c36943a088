#pragma once

#include <stdint.h>

#include "vm/vm.h"

/* A VM's disk: the file disk.img in its folder, which its VMM gives to the guest as it is (raw). It
 * is sparse, made at the first boot with config/disk, grows with it, and is deleted with the VM and
 * not before. */

/* Before a boot, in the thread pool: makes the disk of the VM whose folder is `dir`, or enlarges it
 * to `size` MiB. *ret_path is its path, which the caller frees; on error *ret_why is a sentence. */
int disk_prepare(const char *dir, unsigned size, char **ret_path, char **ret_why);

/* Can config/disk become this (MiB)? -ERR_INVALID leaves words: what is there would not fit. */
int disk_check(struct vm *vm, unsigned size);

/* How large the file is, and how much room it takes on the host, for `info`: an object, or null if
 * there is none. The caller owns it. */
json_t *disk_describe(const struct vm *vm);
