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
#include "util/fs.h"
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

/* ---- a daemon without its mount ---- */

struct copy_search {
    struct buf words; /* the daemon's command line, which names the place; owned */
    ino_t namespace;  /* the daemon's */
    char *path;       /* where a copy is mounted; owned; NULL: none is found */
    pid_t pid;        /* in whose namespace */
    unsigned mounts;  /* of vmsfs that were seen, of whichever daemon */
};

/* The place may be named relative to where the daemon was started. */
static bool copy_is_named(const struct copy_search *search, const char *path) {
    size_t length = strlen(path);
    for (size_t at = 0; at < search->words.len; at += strlen(search->words.data + at) + 1) {
        const char *word = search->words.data + at;
        size_t size = strlen(word);
        while (size > 1 && word[size - 1] == '/')
            size--;
        if (size && size <= length && memcmp(path + length - size, word, size) == 0 &&
            (size == length || path[length - size - 1] == '/'))
            return true;
    }
    return false;
}

static void copy_look(void *arg, const struct mounts_entry *entry) {
    struct copy_search *search = arg;
    if (strcmp(entry->type, "fuse.vmsfs") != 0)
        return;
    search->mounts++;
    if (!search->path && copy_is_named(search, entry->path))
        search->path = strdup(entry->path);
}

/* False: it is not known what is mounted there. */
static bool copy_look_at(struct copy_search *search, pid_t pid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/mountinfo", (int)pid);
    search->pid = pid;
    return mounts_each(path, copy_look, search) == 0;
}

static ino_t namespace_of(pid_t pid) {
    char path[64];
    struct stat st;
    snprintf(path, sizeof path, "/proc/%d/ns/mnt", (int)pid);
    return stat(path, &st) == 0 ? st.st_ino : 0;
}

static void copy_visit(void *arg, pid_t pid, uid_t owner, const char *line, size_t length) {
    struct copy_search *search = arg;
    (void)owner, (void)line, (void)length;
    if (search->path)
        return;
    ino_t namespace = namespace_of(pid);
    if (namespace && namespace != search->namespace)
        copy_look_at(search, pid);
}

/* Its mount may be there by another name than that on its command line: then it is not found
 * elsewhere by that name either. */
bool doctor_find_left_daemon(struct doctor *d, const char *state_dir, pid_t daemon) {
    struct copy_search search = {.namespace = namespace_of(daemon)};
    cleanup_buf struct buf remedy = {0}, where = {0};
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/cmdline", (int)daemon);
    bool left = search.namespace && fs_read(path, 65536, &search.words) == 0 &&
                copy_look_at(&search, daemon) && !search.path;
    bool other = search.mounts > 0;
    if (left)
        process_each("", copy_visit, &search);
    left = left && (search.path || !other);
    if (left && search.path)
        buf_printf(&where, ": the mount namespace of process %d has a copy of its mount, %s",
                   (int)search.pid, search.path);
    buf_printf(&remedy, "end what has it open, or the daemon: kill %d", (int)daemon);
    if (left)
        doctor_find(d, "state", DOCTOR_WARNING, remedy.data,
                    "%s is used by a daemon, process %d, which was unmounted and goes on for what "
                    "is open%s",
                    state_dir, (int)daemon, where.len ? where.data : "");
    buf_free(&search.words);
    free(search.path);
    return left;
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
