#include <errno.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "doctor/internal.h"
#include "util/cleanup.h"
#include "util/fs.h"
#include "vmm/process.h"

/* The state directory and what belongs to it. */

#define SPACE_LEAST_MIB 64
#define SOCKET_NAME_MOST 22 /* of `/4294967295.sock.vsock` */
#define SOCKET_PATH_MOST 107
#define ID_LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"

/* The nearest directory above that is there says whether it can be made. */
static bool directory_can_be_made(const char *path) {
    cleanup_free char *above = strdup(path);
    for (char *slash; above && (slash = strrchr(above, '/'));) {
        *slash = '\0';
        const char *dir = above[0] ? above : "/";
        if (access(dir, F_OK) == 0)
            return access(dir, W_OK | X_OK) == 0;
    }
    return false;
}

/* As the daemon wants them (daemon_own_directory). False: something was found. */
static bool doctor_check_directory(struct doctor *d, const char *check, const char *path) {
    static const char elsewhere[] = "choose another directory with -o state=DIR";
    struct stat st;
    cleanup_buf struct buf remedy = {0};
    if (lstat(path, &st) < 0 && errno == ENOENT) {
        bool can = directory_can_be_made(path);
        doctor_find(d, check, can ? DOCTOR_OK : DOCTOR_BROKEN, can ? NULL : elsewhere,
                    can ? "%s is not there yet: the first mount makes it"
                        : "%s is not there and cannot be made by this user",
                    path);
    } else if (lstat(path, &st) < 0) {
        doctor_find(d, check, DOCTOR_BROKEN, elsewhere, "%s cannot be looked at: %s", path,
                    strerror(errno));
    } else if (!S_ISDIR(st.st_mode)) {
        doctor_find(d, check, DOCTOR_BROKEN, elsewhere, "%s is no directory", path);
    } else if (st.st_uid != getuid()) {
        doctor_find(d, check, DOCTOR_BROKEN, elsewhere,
                    "%s belongs to user %u, and this is user %u", path, (unsigned)st.st_uid,
                    (unsigned)getuid());
    } else if (st.st_mode & 022) {
        buf_printf(&remedy, "chmod 700 %s, if it is for vmsfs alone", path);
        doctor_find(d, check, DOCTOR_BROKEN, remedy.data, "%s can be written by others (mode %04o)",
                    path, (unsigned)st.st_mode & 07777);
    } else if (access(path, R_OK | W_OK | X_OK) < 0) {
        doctor_find(d, check, DOCTOR_BROKEN, elsewhere, "%s cannot be written: %s", path,
                    strerror(errno));
    } else {
        return true;
    }
    return false;
}

/* Who holds the lock, as the kernel says: trying it would turn away a daemon that starts now. 0:
 * nobody. */
static pid_t lock_holder(const char *state_dir) {
    cleanup_buf struct buf path = {0};
    struct stat st;
    buf_printf(&path, "%s/lock", state_dir);
    FILE *locks = path.failed || stat(path.data, &st) < 0 ? NULL : fopen("/proc/locks", "re");
    char line[256];
    pid_t holder = 0;
    while (locks && fgets(line, sizeof line, locks)) {
        int pid;
        unsigned long long inode;
        /* `1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF`. The device is left out of it: some
         * file systems tell stat(2) another. */
        if (sscanf(line, "%*d: FLOCK %*s %*s %d %*[^:]:%*[^:]:%llu", &pid, &inode) == 2 &&
            inode == st.st_ino)
            holder = pid;
    }
    if (locks)
        fclose(locks);
    return holder;
}

static void doctor_check_space(struct doctor *d, const char *path) {
    struct statvfs fs;
    if (statvfs(path, &fs) < 0)
        return;
    uint64_t free_mib = (uint64_t)fs.f_bavail * fs.f_frsize >> 20;
    bool few = free_mib < SPACE_LEAST_MIB || (fs.f_files && fs.f_favail < 100);
    doctor_find(d, "space", few ? DOCTOR_WARNING : DOCTOR_OK,
                few ? "make room, or choose another place with -o state=DIR" : NULL,
                "%llu MiB%s free for %s", (unsigned long long)free_mib,
                fs.f_files && fs.f_favail < 100 ? " and hardly an inode are" : " are", path);
}

void doctor_check_state(struct doctor *d) {
    const char *path = d->settings->state_dir;
    if (!doctor_check_directory(d, "state", path))
        return;
    pid_t holder = lock_holder(path);
    if (holder && !doctor_find_left_daemon(d, path, holder))
        doctor_find(d, "state", DOCTOR_OK, NULL, "%s is used by a daemon, process %d", path,
                    (int)holder);
    if (!holder)
        doctor_find(d, "state", DOCTOR_OK, NULL, "%s can be used, and no daemon does", path);
    doctor_check_space(d, path);
}

void doctor_check_sockets(struct doctor *d) {
    const char *path = d->settings->runtime_dir;
    size_t length = strlen(path);
    if (length + SOCKET_NAME_MOST > SOCKET_PATH_MOST)
        doctor_find(d, "sockets", DOCTOR_BROKEN,
                    "set XDG_RUNTIME_DIR, or choose a shorter -o state=DIR",
                    "%s has %zu bytes, and the path of a socket takes %d in all", path, length,
                    SOCKET_PATH_MOST);
    else if (doctor_check_directory(d, "sockets", path))
        doctor_find(d, "sockets", DOCTOR_OK, NULL, "%s can be used", path);
}

/* ---- VMMs that no daemon will find ---- */

struct vmm_tally {
    struct doctor *d;
    const struct buf *folder; /* STATE/vms/ */
    glob_t jails;             /* what is `/` in the jails of its VMs */
    unsigned known;
};

/* By the program's name, the first word. One in a jail does not name the folder either. */
static bool line_is_of_vmm(const char *line) {
    static const char *const programs[] = {"qemu", "firecracker", "cloud-hypervisor"};
    const char *slash = strrchr(line, '/');
    const char *program = slash ? slash + 1 : line;
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++)
        if (strncmp(program, programs[i], strlen(programs[i])) == 0)
            return true;
    return false;
}

/* Where a path below the folder begins in the line. Other paths may end like this one. */
static const char *line_find_path(const char *line, size_t length, const struct buf *folder) {
    const char *end = line + length, *at = line;
    while ((at = memmem(at, (size_t)(end - at), folder->data, folder->len))) {
        if (at == line || !at[-1] || strchr(",=:", at[-1]))
            return at;
        at++;
    }
    return NULL;
}

/* Its VM is named in its command line; the folder of one that a daemon can take over is there. */
static void vmm_look(void *arg, pid_t pid, uid_t owner, const char *line, size_t length) {
    struct vmm_tally *tally = arg;
    struct doctor *d = tally->d;
    const char *folder = line_find_path(line, length, tally->folder);
    cleanup_buf struct buf vm = {0}, remedy = {0};
    (void)owner;
    if (!folder || !line_is_of_vmm(line))
        return;
    buf_append(&vm, folder, tally->folder->len + strspn(folder + tally->folder->len, ID_LETTERS));
    if (!vm.failed && access(vm.data, F_OK) == 0) {
        tally->known++;
        return;
    }
    buf_printf(&remedy, "kill %d", (int)pid);
    doctor_find(d, "processes", DOCTOR_WARNING, remedy.data,
                "process %d is a VM of %s, which is not there any more: no daemon will find it",
                (int)pid, vm.data);
}

/* What is in a jail knows no path of the host: its `/` is a folder of the VM. */
static void jail_look(void *arg, pid_t pid, uid_t owner, const char *line, size_t length) {
    struct vmm_tally *tally = arg;
    cleanup_buf struct buf remedy = {0};
    struct stat root, st;
    char path[64];
    (void)owner, (void)length;
    snprintf(path, sizeof path, "/proc/%d/root", (int)pid);
    if (!line_is_of_vmm(line) || stat(path, &root) < 0)
        return;
    for (size_t i = 0; i < tally->jails.gl_pathc; i++)
        if (stat(tally->jails.gl_pathv[i], &st) == 0 && st.st_dev == root.st_dev &&
            st.st_ino == root.st_ino)
            tally->known++;
    if (root.st_nlink > 0) /* that of a VM, or of another state directory */
        return;
    buf_printf(&remedy, "kill %d", (int)pid);
    doctor_find(tally->d, "processes", DOCTOR_WARNING, remedy.data,
                "process %d is a VM in a jail which is not there any more: no daemon will find it",
                (int)pid);
}

void doctor_check_processes(struct doctor *d) {
    cleanup_buf struct buf folder = {0}, jails = {0};
    buf_printf(&folder, "%s/vms/", d->settings->state_dir);
    buf_printf(&jails, "%s*/jail/*/*/root", folder.data);
    if (folder.failed || jails.failed)
        return;
    struct vmm_tally tally = {.d = d, .folder = &folder};
    size_t before = d->count;
    process_each(folder.data, vmm_look, &tally);
    if (glob(jails.data, GLOB_NOSORT, NULL, &tally.jails) != 0)
        tally.jails.gl_pathc = 0;
    process_each("vmsfs-", jail_look, &tally); /* how the instances are named */
    globfree(&tally.jails);
    if (d->count == before)
        doctor_find(d, "processes", DOCTOR_OK, NULL, "%u VMs run here, and none is left over",
                    tally.known);
}
