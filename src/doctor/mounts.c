#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "doctor/internal.h"
#include "util/cleanup.h"
#include "util/mounts.h"
#include "vmm/process.h"

/* Mounts of vmsfs: whether their daemons live and answer.
 *
 * Whoever asks a mount may wait for its daemon, and no signal helps as long as that has the
 * question (design, section 6): so a child asks, with a deadline, and is left behind where it
 * hangs. */

#define MOUNT_ANSWER_MS 2000
#define MOUNT_HANGS (-ETIMEDOUT)

/* The child's part: 0, or the errno of the mount. */
static _Noreturn void mount_ask(const char *path, int answer) {
    struct statfs fs;
    struct stat st;
    unsigned char error = 0;
    /* What it might keep open for ever is somebody's pipe. */
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        close(fd);
    if (statfs(path, &fs) < 0 || stat(path, &st) < 0)
        error = (unsigned char)errno;
    (void)!write(answer, &error, 1);
    _exit(0);
}

/* 0: it answers. -errno; MOUNT_HANGS: it does not. */
static int mount_probe(const char *path) {
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) < 0)
        return -errno;
    cleanup_close int answer = fds[0];
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0)
        mount_ask(path, fds[1]);
    close(fds[1]);
    if (pid < 0)
        return -errno;
    struct pollfd wait = {.fd = answer, .events = POLLIN};
    unsigned char error = 0;
    int r = poll(&wait, 1, MOUNT_ANSWER_MS) == 1 && read(answer, &error, 1) == 1 ? -(int)error
                                                                                 : MOUNT_HANGS;
    if (r == MOUNT_HANGS)
        kill(pid, SIGKILL);
    waitpid(pid, NULL, r == MOUNT_HANGS ? WNOHANG : 0);
    return r;
}

struct mount_daemon {
    const char *path;
    pid_t pid; /* 0: not found */
    bool stopped;
};

static void mount_look(void *arg, pid_t pid, uid_t owner, const char *line, size_t length) {
    struct mount_daemon *found = arg;
    (void)owner;
    cleanup_buf struct buf path = {0};
    bool named = false;
    for (size_t at = 0; at < length; at += strlen(line + at) + 1)
        named |= strcmp(line + at, found->path) == 0;
    buf_printf(&path, "/proc/%d/stat", (int)pid);
    FILE *stat = path.failed ? NULL : fopen(path.data, "re");
    char name[64] = "", state = 0;
    if (stat && named && fscanf(stat, "%*d (%63[^)]) %c", name, &state) == 2 &&
        strcmp(name, "vmsfs") == 0) {
        found->pid = pid;
        found->stopped = state == 'T' || state == 't';
    }
    if (stat)
        fclose(stat);
}

static void doctor_find_hanging(struct doctor *d, const char *path) {
    struct mount_daemon daemon = {.path = path};
    cleanup_buf struct buf remedy = {0};
    process_each(path, mount_look, &daemon);
    if (daemon.stopped)
        buf_printf(&remedy, "let its daemon, which was stopped, go on: kill -CONT %d", daemon.pid);
    else if (daemon.pid)
        buf_printf(&remedy, "look at its daemon, process %d; fusermount3 -uz %s gives the place up",
                   daemon.pid, path);
    else
        buf_printf(&remedy, "fusermount3 -uz %s", path);
    doctor_find(d, "mount", DOCTOR_BROKEN, remedy.data, "%s does not answer for %d s", path,
                MOUNT_ANSWER_MS / 1000);
}

static void doctor_check_mount(struct doctor *d, const char *path, const char *options) {
    const char *user = strstr(options, "user_id=");
    unsigned owner = user ? (unsigned)strtoul(user + strlen("user_id="), NULL, 10) : getuid();
    if (owner != getuid() && !strstr(options, "allow_other")) {
        doctor_find(d, "mount", DOCTOR_OK, NULL,
                    "%s is the mount of user %u, who alone can look at it", path, owner);
        return;
    }
    int r = mount_probe(path);
    cleanup_buf struct buf remedy = {0};
    buf_printf(&remedy, "fusermount3 -uz %s clears it away, and so does a new mount there", path);
    if (r == 0)
        doctor_find(d, "mount", DOCTOR_OK, NULL, "%s answers", path);
    else if (r == MOUNT_HANGS)
        doctor_find_hanging(d, path);
    else if (r == -ENOTCONN)
        doctor_find(d, "mount", DOCTOR_BROKEN, remedy.data,
                    "%s was left behind by a daemon that has died", path);
    else
        doctor_find(d, "mount", DOCTOR_BROKEN, remedy.data, "%s answers with an error: %s", path,
                    strerror(-r));
}

static void mount_check(void *arg, const struct mounts_entry *entry) {
    if (strcmp(entry->type, "fuse.vmsfs") == 0)
        doctor_check_mount(arg, entry->path, entry->options);
}

void doctor_check_mounts(struct doctor *d) {
    size_t before = d->count;
    mounts_each("/proc/self/mountinfo", mount_check, d);
    if (d->count == before)
        doctor_find(d, "mount", DOCTOR_OK, NULL, "nothing is mounted");
}

/* The one of the command line, if it names one; what is mounted there was looked at. */
void doctor_check_mountpoint(struct doctor *d) {
    const char *path = d->settings->mountpoint;
    cleanup_buf struct buf remedy = {0};
    struct stat st;
    if (!path)
        return;
    int r = mount_probe(path);
    if (r == -ENOENT) {
        buf_printf(&remedy, "mkdir -p %s", path);
        doctor_find(d, "mountpoint", DOCTOR_BROKEN, remedy.data, "there is no %s", path);
    } else if (r == 0 && stat(path, &st) == 0 && !S_ISDIR(st.st_mode)) {
        doctor_find(d, "mountpoint", DOCTOR_BROKEN, "name a directory", "%s is no directory", path);
    } else if (r == 0) {
        doctor_find(d, "mountpoint", DOCTOR_OK, NULL, "%s is there", path);
    } else if (r != MOUNT_HANGS && r != -ENOTCONN) {
        doctor_find(d, "mountpoint", DOCTOR_BROKEN, "name another place", "%s cannot be used: %s",
                    path, strerror(-r));
    }
}
