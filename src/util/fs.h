#pragma once

#include <stddef.h>
#include <sys/types.h>

#include "util/buf.h"

/* Small helpers for files of the host. They block: at start-up, or in the thread pool. */

/* Makes a directory and what is missing above it. 0 when it exists. */
int fs_mkdir_all(const char *path, mode_t mode);

/* Reads a regular file of `most` bytes at most; -EFBIG when it is larger. */
int fs_read(const char *path, size_t most, struct buf *out);

/* Replaces a file by rename: temporary file beside it, fsync, rename, fsync of the directory. */
int fs_replace(const char *path, mode_t mode, const void *data, size_t length);

/* The same without waiting for the disk: safe from the end of this process, not from that of the
 * host. */
int fs_replace_fast(const char *path, mode_t mode, const void *data, size_t length);

/* Removes what fs_replace() of this file has left beside it in a process that was killed. */
void fs_remove_leftovers(const char *path);

/* Removes a directory and all that is in it, not following links. */
int fs_remove_all(const char *path);

/* Runs a program (found in PATH) to its end, with stdin and stdout on /dev/null, and no environment
 * but PATH. 0 when its exit status is 0; -ENOENT when it is not installed; -EIO when it failed. */
int fs_run(const char *const argv[]);

/* RFC 4648, section 4. -EINVAL for what is no base64. */
int base64_decode(const char *text, size_t length, struct buf *out);
void base64_encode(const char *data, size_t length, struct buf *out);
