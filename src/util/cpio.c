#include "util/cpio.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>

#define TRAILER "TRAILER!!!"
#define PATH_MOST                                                                                  \
    4096 /* with its NUL; the kernel skips longer ones (init/initramfs.c, do_header) */

static void pad(struct buf *out, size_t multiple) {
    while (out->len % multiple && !out->failed)
        buf_append_char(out, '\0');
}

/* Thirteen fields of eight hexadecimal digits: ino, mode, uid, gid, nlink, mtime, filesize, major
 * and minor of device and rdev, namesize, check (zero in this format). */
static void member(struct buf *out, uint32_t ino, uint32_t mode, const char *path, const void *data,
                   size_t length) {
    buf_printf(out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", ino, mode, 0u, 0u,
               S_ISDIR(mode) ? 2u : 1u, 0u, (unsigned)length, 0u, 0u, 0u, 0u,
               (unsigned)strlen(path) + 1, 0u);
    buf_append(out, path, strlen(path) + 1);
    pad(out, 4);
    buf_append(out, data, length);
    pad(out, 4);
}

static bool path_is_valid(const char *path) {
    size_t length = strlen(path);
    if (!length || length >= PATH_MOST || *path == '/' || !strcmp(path, TRAILER))
        return false;
    for (const char *name = path; *name;) {
        size_t name_length = strcspn(name, "/");
        if (name_length == 2 && !memcmp(name, "..", 2))
            return false;
        name += name_length;
        name += strspn(name, "/");
    }
    return true;
}

int cpio_add(struct buf *out, const char *path, uint32_t mode, const void *data, size_t length) {
    if (!path_is_valid(path))
        return -EINVAL;
    /* Where a member begins is a number that no other member of the archive has. */
    if (length > UINT32_MAX || out->len >= UINT32_MAX)
        return -EFBIG;
    member(out, (uint32_t)out->len + 1, mode, path, data, length);
    return out->failed;
}

void cpio_end(struct buf *out) {
    member(out, 0, 0, TRAILER, NULL, 0);
    pad(out, 512);
}
