#pragma once

#include <stddef.h>
#include <stdint.h>

#include "util/buf.h"

/* Writes a cpio archive in the "newc" format (magic 070701), as the Linux kernel reads it for an
 * initramfs (Documentation/driver-api/early-userspace/buffer-format.rst). Everything belongs to
 * root. */

/* Appends one member. `mode` is a full st_mode (S_IFREG | 0600, S_IFDIR | 0755, S_IFLNK | 0777 with
 * the target as data); `path` is relative, without leading slash; parents come first, by the
 * caller. The buffer begins with the archive, or its length is a multiple of 4. -EINVAL for a path
 * that is empty, absolute, longer than 4095 bytes, has a `..` in it, or is the name of the trailer;
 * -EFBIG for what the format's 32 bits do not hold; -ENOMEM. */
int cpio_add(struct buf *out, const char *path, uint32_t mode, const void *data, size_t length);

/* Appends the trailer and pads to 512 bytes. For want of memory, out->failed is set. */
void cpio_end(struct buf *out);
