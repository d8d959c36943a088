#pragma once

/* What is mounted, as a process sees it: proc(5), /proc/PID/mountinfo. Reading it touches no mount.
 */

struct mounts_entry {
    const char *device;  /* of the file system, `0:42`: the same for all copies of a mount */
    const char *path;    /* where it is mounted, seen from the process's root */
    const char *type;    /* `fuse.vmsfs` */
    const char *options; /* of the file system: `rw,user_id=0,...` */
};

/* The strings are the caller's for the time of the call. */
typedef void mounts_visit(void *arg, const struct mounts_entry *entry);

/* Each mount in the order in which they were made, so that the last of a path is on top. Every line
 * is read, or the result is -errno. */
int mounts_each(const char *file, mounts_visit *visit, void *arg);
