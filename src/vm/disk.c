#include "vm/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"

#define DISK_UNIT (1 << 20)
#define DISK_BLOCK 512 /* of st_blocks */

static char *disk_path(const char *dir) {
    char *path;
    return asprintf(&path, "%s/disk.img", dir) < 0 ? NULL : path;
}

/* -ENOENT: there is none. */
static int disk_look(const char *dir, struct stat *ret_st) {
    cleanup_free char *path = disk_path(dir);
    if (!path)
        return -ENOMEM;
    return lstat(path, ret_st) < 0 ? -errno : 0;
}

int disk_prepare(const char *dir, unsigned size, char **ret_path, char **ret_why) {
    struct stat st;
    off_t wanted = (off_t)size * DISK_UNIT;
    cleanup_free char *path = disk_path(dir);
    if (!path)
        return error_explain(-ERR_GONE, ret_why, "no memory for the disk in %s", dir);
    cleanup_close int fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0 || fstat(fd, &st) < 0)
        return error_explain(-ERR_GONE, ret_why, "cannot make the disk %s (config/disk): %s", path,
                             strerror(errno));
    if (st.st_size > wanted)
        return error_explain(-ERR_GONE, ret_why,
                             "the disk %s has %lld MiB and config/disk says %u: it cannot be "
                             "made smaller, write its size to config/disk, or 0 for none",
                             path, (long long)st.st_size / DISK_UNIT, size);
    if (st.st_size < wanted && ftruncate(fd, wanted) < 0) {
        int error = errno;
        if (!st.st_size)
            unlink(path);
        return error_explain(-ERR_GONE, ret_why,
                             "cannot make the disk %s as large as config/disk says, %u MiB: %s",
                             path, size, strerror(error));
    }
    *ret_path = path;
    path = NULL;
    return 0;
}

int disk_check(struct vm *vm, unsigned size) {
    struct stat st;
    if (!size || disk_look(vm->dir, &st) < 0 || st.st_size <= (off_t)size * DISK_UNIT)
        return 0;
    return vm_fail(vm, -ERR_INVALID,
                   "config/disk: the disk of %s has %lld MiB already and can be made larger, not "
                   "smaller; 0 detaches it and keeps what is on it",
                   vm->id, (long long)st.st_size / DISK_UNIT);
}

json_t *disk_describe(const struct vm *vm) {
    struct stat st;
    if (disk_look(vm->dir, &st) < 0)
        return json_null();
    return json_pack("{s:I, s:I}", "size", (json_int_t)st.st_size, "used",
                     (json_int_t)st.st_blocks * DISK_BLOCK);
}
