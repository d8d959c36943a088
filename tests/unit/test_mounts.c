#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"
#include "util/buf.h"
#include "util/cleanup.h"
#include "util/fs.h"
#include "util/mounts.h"

static void print_entry(void *arg, const struct mounts_entry *entry) {
    buf_printf(arg, "%s|%s|%s|%s\n", entry->device, entry->path, entry->type, entry->options);
}

static void lines_are_taken_apart(void) {
    static const char text[] =
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        "36 22 0:42 / /my\\040vms rw,nosuid - fuse.vmsfs my\\040vms rw,user_id=0\n"
        "37 22 0:43 /a /tmp/x\\134y rw shared:2 master:1 - tmpfs none rw,size=1k\n"
        "no line of it\n";
    static const char expected[] = "254:0|/|ext4|rw\n"
                                   "0:42|/my vms|fuse.vmsfs|rw,user_id=0\n"
                                   "0:43|/tmp/x\\y|tmpfs|rw,size=1k\n";
    char path[] = "/tmp/vmsfs-test-mounts.XXXXXX";
    cleanup_buf struct buf found = {0};
    cleanup_close int fd = mkstemp(path);
    CHECK(fd >= 0 && fs_replace(path, 0600, text, strlen(text)) == 0);
    CHECK(mounts_each(path, print_entry, &found) == 0);
    CHECK_SAID(check_same(found.data, found.len, expected, strlen(expected)), "%s", found.data);
    CHECK(unlink(path) == 0);
}

static void what_cannot_be_read_is_an_error(void) {
    cleanup_buf struct buf found = {0};
    CHECK(mounts_each("/proc/nonexistent/mountinfo", print_entry, &found) == -ENOENT);
    CHECK(mounts_each("/", print_entry, &found) == -EISDIR);
    CHECK(found.len == 0);
}

static void a_process_sees_its_own(void) {
    cleanup_buf struct buf found = {0};
    CHECK(mounts_each("/proc/self/mountinfo", print_entry, &found) == 0);
    CHECK(memmem(found.data, found.len, "|/|", 3));
}

int main(void) {
    lines_are_taken_apart();
    what_cannot_be_read_is_an_error();
    a_process_sees_its_own();
    return check_end();
}
