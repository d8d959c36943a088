#pragma once

#include <sys/types.h>

/* Connecting to the UNIX socket of a program that is not trusted: a VMM in a jail owns the folder
 * that its sockets are in, and may have put something else in their place. */

/* Sets *ret_fd to a hold (O_PATH) on the socket at `path`: `/proc/self/fd/N` is that one and no
 * other, whatever the path is by then. No link leads on but one of our own user's, to an absolute
 * path whose last part is no link again. -ERR_DENIED: what is there is no socket. */
int unix_hold(const char *path, int *ret_fd);

/* Is `fd` connected to what this process (0: any) listens at? -EAGAIN: it is not connected;
 * -ERR_DENIED: to another's, and nothing may be said to it. */
int unix_check_peer(int fd, pid_t peer);

/* Connects `fd`, a stream socket, to the socket at `path`, as both of these have it. -EAGAIN: those
 * that wait to be accepted there are too many; the same fd may be tried again. -ERR_DENIED: the
 * caller closes it, unused. Else what connect(2) says. Does not block if fd does not. */
int unix_connect(int fd, const char *path, pid_t peer);

/* What such a status means, in a few words. */
const char *unix_connect_error(int status);
