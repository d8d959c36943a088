#include "util/unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"

static int unix_hold_any(const char *path, int *ret_fd, struct stat *ret_st) {
    cleanup_close int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fstat(fd, ret_st) < 0)
        return -errno;
    *ret_fd = fd;
    fd = -1;
    return 0;
}

int unix_hold(const char *path, int *ret_fd) {
    char target[PATH_MAX];
    struct stat st;
    cleanup_close int fd = -1, link = -1;
    int r = unix_hold_any(path, &fd, &st);
    if (r == 0 && S_ISLNK(st.st_mode) && st.st_uid == geteuid()) {
        ssize_t length = readlinkat(fd, "", target, sizeof target - 1);
        if (length <= 0 || target[0] != '/')
            return length < 0 ? -errno : -ERR_DENIED;
        target[length] = '\0';
        link = fd;
        fd = -1;
        r = unix_hold_any(target, &fd, &st);
    }
    if (r == 0 && !S_ISSOCK(st.st_mode))
        r = -ERR_DENIED;
    if (r < 0)
        return r;
    *ret_fd = fd;
    fd = -1;
    return 0;
}

int unix_check_peer(int fd, pid_t peer) {
    struct sockaddr_un address;
    struct ucred listener;
    socklen_t address_length = sizeof address, length = sizeof listener;
    if (getpeername(fd, (struct sockaddr *)&address, &address_length) < 0)
        return errno == ENOTCONN ? -EAGAIN : -errno;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &listener, &length) < 0)
        return -errno;
    return !peer || listener.pid == peer ? 0 : -ERR_DENIED;
}

int unix_connect(int fd, const char *path, pid_t peer) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    cleanup_close int held = -1;
    int r = unix_hold(path, &held);
    if (r < 0)
        return r;
    snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d", held);
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) < 0)
        return -errno;
    return unix_check_peer(fd, peer);
}

const char *unix_connect_error(int status) {
    switch (status) {
    case -EAGAIN:
        return "it takes no connections, and too many wait for it already";
    case -ERR_DENIED:
        return "what is there is not the VMM's socket";
    default:
        return strerror(-status);
    }
}
