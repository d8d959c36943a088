#pragma once

#include <stdbool.h>

/* The options of mount(8), as its helpers are given them: one list, separated by commas.
 *
 * Some are for mount(8), systemd or the reader of fstab alone; mount(8) does not take all of them
 * out. What is left is the daemon's (or libfuse's), and is handed on as it is. */

struct mount_options {
    char *daemon; /* what the daemon is given, a list for its `-o`; "" if nothing. free() it */
    bool remount;
};

/* Appends what is left of `list` to options->daemon (NULL: nothing yet). A value may stand in
 * double quotes, and then hold commas: `context="a:b:c0,c1"`. -EINVAL: a quote is not closed.
 * -ENOMEM. */
int mount_options_add(struct mount_options *options, const char *list);

/* Would the daemon mount the same with either? In any order, and whatever they say of what is so by
 * default or comes with `user` in fstab. */
bool mount_options_same(const struct mount_options *a, const struct mount_options *b);
