#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/cpio.h"

/* The input is a list of members: a path up to a NUL, a byte for the length of the data, the data.
 * The archive is read with a reader that knows nothing but the format, and must give those members
 * that were accepted. */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MODE 0100644u

static void require(bool condition) {
    if (!condition)
        abort();
}

static bool path_is_bad(const char *path) {
    cleanup_buf struct buf slashed = {0};
    buf_printf(&slashed, "/%s/", path);
    return !*path || *path == '/' || strstr(slashed.data, "/../") || strlen(path) > 4095 ||
           !strcmp(path, "TRAILER!!!");
}

static uint32_t field(const char *header, unsigned number) {
    char digits[9] = {0};
    memcpy(digits, header + 6 + 8 * number, 8);
    require(strspn(digits, "0123456789abcdef") == 8);
    return (uint32_t)strtoul(digits, NULL, 16);
}

/* Reads the member at *at, compares, and moves *at behind it. */
static void member_is(const struct buf *archive, size_t *at, uint32_t mode, const char *path,
                      const void *data, size_t length) {
    const char *header = archive->data + *at;
    require(*at % 4 == 0 && archive->len - *at >= 110 && !memcmp(header, "070701", 6));
    require(field(header, 1) == mode && field(header, 6) == length);
    require(field(header, 2) == 0 && field(header, 3) == 0 && field(header, 5) == 0);
    require(field(header, 11) == strlen(path) + 1 && field(header, 12) == 0);
    size_t data_at = (*at + 110 + strlen(path) + 1 + 3) / 4 * 4;
    size_t end = (data_at + length + 3) / 4 * 4;
    require(end <= archive->len && !strcmp(header + 110, path));
    require(!length || !memcmp(archive->data + data_at, data, length));
    *at = end;
}

/* Splits the next member off the input. */
static bool member_next(const uint8_t **data, size_t *size, const char **path,
                        const uint8_t **bytes, size_t *length) {
    const uint8_t *nul = *size ? memchr(*data, 0, *size) : NULL;
    if (!nul || nul + 1 == *data + *size)
        return false;
    *path = (const char *)*data;
    *bytes = nul + 2;
    *length = nul[1];
    size_t left = (size_t)(*data + *size - *bytes);
    if (*length > left)
        *length = left;
    *data = *bytes + *length;
    *size = left - *length;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    cleanup_buf struct buf archive = {0};
    const uint8_t *rest = data, *bytes;
    size_t left = size, length, at = 0;
    const char *path;

    while (member_next(&rest, &left, &path, &bytes, &length))
        require(cpio_add(&archive, path, MODE, bytes, length) == (path_is_bad(path) ? -EINVAL : 0));
    cpio_end(&archive);
    require(!archive.failed && archive.len % 512 == 0);

    rest = data;
    left = size;
    uint32_t last_inode = 0;
    while (member_next(&rest, &left, &path, &bytes, &length)) {
        if (path_is_bad(path))
            continue;
        uint32_t inode = field(archive.data + at, 0);
        require(inode > last_inode && field(archive.data + at, 4) == 1);
        last_inode = inode;
        member_is(&archive, &at, MODE, path, bytes, length);
    }
    member_is(&archive, &at, 0, "TRAILER!!!", NULL, 0);
    for (; at < archive.len; at++)
        require(!archive.data[at]);
    return 0;
}
