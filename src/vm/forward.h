#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "util/buf.h"

/* `forward`: which variables of the calling process a new VM is given. Lines of
 *
 *     NAME               if it is set and not empty there
 *     required NAME      the same, and no VM is made without it, from wherever it is
 *     required A|B       at least one of them
 *     # comment
 *
 * Pure functions on (pointer, length). */

/* Checks the text. -ERR_INVALID: *ret_why is a sentence about the first bad line, with its number
 * (the caller frees it). `is_reserved`: of names that no VM can be given. */
int forward_check(const char *text, size_t length, bool (*is_reserved)(const char *name),
                  char **ret_why);

/* Does it name anything? */
bool forward_is_empty(const char *text, size_t length);

/* Looks the names up in `list`, a list of NAME=VALUE each ended by a NUL (proc(5),
 * /proc/PID/environ), and calls `set` for each that is there; the first of a name counts. A
 * negative return ends it and is returned. */
typedef int forward_set(void *arg, const char *name, const char *value, size_t length);
int forward_apply(const char *text, size_t length, const char *list, size_t list_length,
                  forward_set *set, void *arg);

/* Is there all that is required? `has` says of one. -ERR_INVALID: *ret_why names what is missing.
 */
int forward_require(const char *text, size_t length, bool (*has)(void *arg, const char *name),
                    void *arg, char **ret_why);
