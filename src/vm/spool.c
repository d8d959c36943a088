#include "vm/spool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util/cleanup.h"

void spool_init(struct spool *spool, uint64_t limit, bool flowing) {
    *spool = (struct spool){.fd = -1, .limit = limit, .flowing = flowing};
}

void spool_free(struct spool *spool) {
    if (spool->fd >= 0)
        close(spool->fd);
    spool->fd = -1;
    buf_free(&spool->memory);
}

/* A file without a name: it is gone with its last user, whatever happens. */
static int spool_open(const char *dir) {
    int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL))
        return fd < 0 ? -errno : fd;
    cleanup_buf struct buf path = {0};
    buf_printf(&path, "%s/spool.XXXXXX", dir);
    if (path.failed)
        return -ENOMEM;
    fd = mkostemp(path.data, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    unlink(path.data);
    return fd;
}

/* The file of a flowing spool is a ring. */
static uint64_t spool_place(const struct spool *spool, uint64_t offset, size_t *length) {
    if (!spool->flowing)
        return offset - spool->base;
    uint64_t size = spool->limit + SPOOL_SLACK, place = offset % size;
    if (*length > size - place)
        *length = (size_t)(size - place);
    return place;
}

static int spool_store(struct spool *spool, const char *data, size_t length) {
    while (length) {
        size_t part = length;
        uint64_t place = spool_place(spool, spool->end, &part);
        ssize_t n = pwrite(spool->fd, data, part, (off_t)place);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -ENOSPC;
        data += n;
        length -= (size_t)n;
        spool->end += (uint64_t)n;
    }
    return 0;
}

/* From memory to a file. */
static int spool_spill(struct spool *spool, const char *dir) {
    int fd = spool_open(dir);
    if (fd < 0)
        return fd;
    spool->fd = fd;
    uint64_t end = spool->end;
    spool->end = spool->start;
    int r = spool_store(spool, spool->memory.data ? spool->memory.data : "", spool->memory.len);
    if (r < 0) {
        close(fd);
        spool->fd = -1;
        spool->end = end;
        return r;
    }
    buf_free(&spool->memory);
    return 0;
}

static int spool_take(struct spool *spool, const char *dir, const char *data, size_t length) {
    if (spool->fd < 0 && spool->memory.len + length > SPOOL_MEMORY) {
        int r = spool_spill(spool, dir);
        if (r < 0)
            return r;
    }
    if (spool->fd >= 0)
        return spool_store(spool, data, length);
    buf_append(&spool->memory, data, length);
    if (spool->memory.failed)
        return -ENOMEM;
    spool->end += length;
    return 0;
}

int spool_write(struct spool *spool, const char *dir, const char *data, size_t length) {
    uint64_t most = spool->limit + (spool->flowing ? SPOOL_SLACK : 0);
    uint64_t room = most - (spool->end - spool->start);
    bool fits = length <= room;
    if (spool->cut)
        return 0;
    int r = spool_take(spool, dir, data, fits ? length : (size_t)room);
    spool->cut = r < 0 || !fits;
    return r < 0 ? r : fits ? 0 : -EFBIG;
}

ssize_t spool_read(const struct spool *spool, uint64_t offset, char *data, size_t length) {
    if (offset < spool->start)
        return -EOVERFLOW;
    if (offset >= spool->end)
        return spool->cut ? -EOVERFLOW : 0;
    if (length > spool->end - offset)
        length = (size_t)(spool->end - offset);
    if (spool->fd < 0) {
        memcpy(data, spool->memory.data + (offset - spool->start), length);
        return (ssize_t)length;
    }
    uint64_t place = spool_place(spool, offset, &length);
    ssize_t n;
    do
        n = pread(spool->fd, data, length, (off_t)place);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n == 0 ? -EIO : n;
}

void spool_release(struct spool *spool, uint64_t offset) {
    if (!spool->flowing || offset <= spool->start)
        return;
    if (offset > spool->end)
        offset = spool->end;
    if (spool->fd < 0)
        buf_consume(&spool->memory, (size_t)(offset - spool->start));
    spool->start = offset;
}
