#pragma once

#include <stddef.h>

#include "util/buf.h"

/* Public keys of SSH servers, as text and as the blobs that servers show (RFC 4253, section 6.6).
 * Pure functions. */

/* Appends the blob of the key that a file holds: a line of ssh-keygen's .pub files (`TYPE BASE64
 * COMMENT`), or lines of a known_hosts file (sshd(8)) about one machine, of which the best type of
 * key is taken. -ERR_INVALID: *ret_wrong says in a few words why not. */
int host_key_parse(const char *text, size_t length, struct buf *ret_blob, const char **ret_wrong);

/* Appends `TYPE BASE64`. */
void host_key_print(const char *blob, size_t length, struct buf *out);
