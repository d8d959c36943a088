#pragma once

#include <stdbool.h>

/* The FUSE channel: the mount, its requests and their answers, and the inodes that the kernel
 * knows. Only this folder includes <fuse_lowlevel.h>. */

struct fuse_channel;
struct daemon;
struct node;

/* Prepares a session: checks the mount options in `argv` (argv[0] is the program's name, the rest
 * `-o` options that are libfuse's own). NULL: they are wrong, and libfuse has said on stderr which.
 * `root` becomes the channel's. */
struct fuse_channel *fuse_channel_new(struct daemon *d, int argc, char **argv, struct node *root);

/* Mounts and serves from the daemon's loop. `ended` is called when the file system has been
 * unmounted by somebody else. -errno; libfuse has said on stderr what is wrong. */
int fuse_channel_mount(struct fuse_channel *channel, const char *mountpoint,
                       void (*ended)(struct daemon *d));

/* `ready` is called when the kernel's first request has been answered. */
void fuse_channel_on_ready(struct fuse_channel *channel, void (*ready)(struct daemon *d));

/* Unmounts (what is still open gets ENOTCONN) and answers whatever waits. */
void fuse_channel_unmount(struct fuse_channel *channel);

void fuse_channel_free(struct fuse_channel *channel);

/* Prints libfuse's mount options, for the help text. */
void fuse_channel_print_options(void);
