#include "util/fs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "util/cleanup.h"

int fs_mkdir_all(const char *path, mode_t mode) {
    cleanup_free char *copy = strdup(path);
    if (!copy)
        return -ENOMEM;
    for (char *p = copy + 1;; p++) {
        if (*p != '/' && *p != '\0')
            continue;
        char was = *p;
        *p = '\0';
        if (mkdir(copy, was ? 0755 : mode) < 0 && errno != EEXIST)
            return -errno;
        *p = was;
        if (!was)
            return 0;
    }
}

int fs_read(const char *path, size_t most, struct buf *out) {
    struct stat st;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    char block[16384];
    for (;;) {
        ssize_t n = read(fd, block, sizeof block);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return out->failed;
        buf_append(out, block, (size_t)n);
        if (out->len > most)
            return -EFBIG;
    }
}

static int fs_write_all(int fd, const char *data, size_t length) {
    while (length) {
        ssize_t n = write(fd, data, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        data += n;
        length -= (size_t)n;
    }
    return 0;
}

static int fs_sync_parent(const char *path) {
    cleanup_free char *copy = strdup(path);
    char *slash = copy ? strrchr(copy, '/') : NULL;
    if (!slash)
        return copy ? -EINVAL : -ENOMEM;
    *slash = '\0';
    cleanup_close int fd = open(slash == copy ? "/" : copy, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 || fsync(fd) < 0 ? -errno : 0;
}

static int fs_replace_file(const char *path, mode_t mode, const void *data, size_t length,
                           bool sync) {
    cleanup_buf struct buf temporary = {0};
    buf_printf(&temporary, "%s.XXXXXX", path);
    if (temporary.failed)
        return -ENOMEM;
    cleanup_close int fd = mkostemp(temporary.data, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int r = fs_write_all(fd, data, length);
    if (r == 0 &&
        (fchmod(fd, mode) < 0 || (sync && fsync(fd) < 0) || rename(temporary.data, path) < 0))
        r = -errno;
    if (r < 0)
        unlink(temporary.data);
    else if (sync)
        r = fs_sync_parent(path);
    return r;
}

int fs_replace(const char *path, mode_t mode, const void *data, size_t length) {
    return fs_replace_file(path, mode, data, length, true);
}

int fs_replace_fast(const char *path, mode_t mode, const void *data, size_t length) {
    return fs_replace_file(path, mode, data, length, false);
}

void fs_remove_leftovers(const char *path) {
    cleanup_free char *folder = strdup(path);
    char *slash = folder ? strrchr(folder, '/') : NULL;
    if (!slash)
        return;
    *slash = '\0';
    const char *base = slash + 1;
    size_t length = strlen(base);
    DIR *dir = opendir(folder);
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        const char *end = entry->d_name + length;
        if (strncmp(entry->d_name, base, length) == 0 && end[0] == '.' && strlen(end) == 7)
            unlinkat(dirfd(dir), entry->d_name, 0);
    }
    closedir(dir);
}

static int fs_remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path) < 0 && errno != ENOENT ? -errno : 0;
}

int fs_remove_all(const char *path) {
    int r = nftw(path, fs_remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
    return r < 0 && errno == ENOENT ? 0 : r;
}

int fs_run(const char *const argv[]) {
    static const char *const environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:"
                                              "/usr/bin:/sbin:/bin",
                                              NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    int status;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    int r = posix_spawnp(&pid, argv[0], &actions, NULL, (char *const *)(uintptr_t)argv,
                         (char *const *)(uintptr_t)environment);
    posix_spawn_file_actions_destroy(&actions);
    if (r != 0)
        return -r;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -EIO;
}

static const char base64_digits[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

void base64_encode(const char *data, size_t length, struct buf *out) {
    for (size_t i = 0; i < length; i += 3) {
        unsigned value = 0;
        for (size_t j = 0; j < 3; j++)
            value = value << 8 | (i + j < length ? (unsigned char)data[i + j] : 0);
        for (size_t j = 0; j < 4; j++)
            buf_append_char(out, i + j <= length ? base64_digits[value >> (18 - 6 * j) & 63] : '=');
    }
}

int base64_decode(const char *text, size_t length, struct buf *out) {
    unsigned value = 0;
    int bits = 0;
    while (length > 0 && text[length - 1] == '=')
        length--;
    for (size_t i = 0; i < length; i++) {
        const char *digit = text[i] ? strchr(base64_digits, text[i]) : NULL;
        if (!digit)
            return -EINVAL;
        value = (value << 6 | (unsigned)(digit - base64_digits)) & 0xffffff;
        bits += 6;
        if (bits >= 8) {
            bits -= 8;
            buf_append_char(out, (char)(value >> bits & 0xff));
        }
    }
    return out->failed;
}
