#pragma once

#include "util/buf.h"

struct vm;

/* Follows the console of a booting VM until it says that the SSH server listens. Without it the
 * daemon would have to try: a user-mode network accepts connections before the guest has one, and
 * such an attempt is answered late or never. */

/* Calls control_hurry() when `line` has appeared. Nothing happens without a line, or when the
 * console cannot be followed: then attempts alone find the guest. */
void console_watch_start(struct vm *vm, const char *line);
void console_watch_stop(struct vm *vm);

/* Appends the last line that starts with `vmsfs: `, in which images say why they give up, without
 * that. */
void console_last_words(const struct vm *vm, struct buf *out);

/* The VMM writes the console to a file for as long as the guest talks. One that has grown over
 * CONSOLE_LIMIT bytes starts anew, so that no guest fills the host's disk. Called every few
 * seconds. */
#define CONSOLE_LIMIT (16 << 20)
void console_bound(struct vm *vm);
