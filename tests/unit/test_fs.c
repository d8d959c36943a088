#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "util/cleanup.h"
#include "util/fs.h"

static char folder[] = "/tmp/vmsfs-test-fs.XXXXXX";

static void a_file_is_replaced_with_its_mode(void) {
    cleanup_buf struct buf path = {0}, text = {0};
    struct stat st;
    buf_printf(&path, "%s/file", folder);
    CHECK(fs_replace(path.data, 0600, "one", 3) == 0);
    CHECK(fs_replace(path.data, 0600, "two", 3) == 0);
    CHECK(fs_read(path.data, 100, &text) == 0);
    CHECK(check_same(text.data, text.len, "two", 3));
    CHECK(stat(path.data, &st) == 0 && (st.st_mode & 07777) == 0600);
    CHECK(fs_read(path.data, 2, &text) == -EFBIG);
    CHECK(fs_replace("/proc/nonexistent/file", 0600, "x", 1) < 0);
}

static void a_tree_is_removed_without_following_links(void) {
    cleanup_buf struct buf deep = {0}, link = {0}, kept = {0}, top = {0};
    buf_printf(&top, "%s/top", folder);
    buf_printf(&deep, "%s/top/a/b/c", folder);
    buf_printf(&kept, "%s/kept", folder);
    buf_printf(&link, "%s/top/a/link", folder);
    CHECK(fs_mkdir_all(deep.data, 0700) == 0);
    CHECK(fs_mkdir_all(deep.data, 0700) == 0);
    CHECK(fs_mkdir_all(kept.data, 0700) == 0);
    CHECK(symlink(kept.data, link.data) == 0);
    CHECK(fs_remove_all(top.data) == 0);
    CHECK(access(top.data, F_OK) < 0);
    CHECK(access(kept.data, F_OK) == 0);
    CHECK(fs_remove_all(top.data) == 0);
}

static void what_is_no_regular_file_is_not_read(void) {
    cleanup_buf struct buf text = {0}, fifo = {0};
    buf_printf(&fifo, "%s/fifo", folder);
    CHECK(mkfifo(fifo.data, 0600) == 0);
    CHECK(fs_read(fifo.data, 100, &text) == -EINVAL);
    CHECK(fs_read(folder, 100, &text) < 0);
    CHECK(fs_read("/proc/nonexistent", 100, &text) == -ENOENT);
}

static void programs_are_run_and_their_failure_is_seen(void) {
    CHECK(fs_run((const char *const[]){"true", NULL}) == 0);
    CHECK(fs_run((const char *const[]){"false", NULL}) == -EIO);
    CHECK(fs_run((const char *const[]){"vmsfs-no-such-program", NULL}) == -ENOENT);
}

static void base64_is_decoded(void) {
    static const struct {
        const char *text, *bytes;
        size_t length;
    } rows[] = {{"", "", 0},
                {"Zg==", "f", 1},
                {"Zm8=", "fo", 2},
                {"Zm9v", "foo", 3},
                {"AAEC/v8=", "\0\1\2\376\377", 5}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        cleanup_buf struct buf out = {0};
        CHECK(base64_decode(rows[i].text, strlen(rows[i].text), &out) == 0);
        CHECK_SAID(check_same(out.data, out.len, rows[i].bytes, rows[i].length), "row %zu", i);
    }
    cleanup_buf struct buf out = {0};
    CHECK(base64_decode("Zm9v\n", 5, &out) == -EINVAL);
    CHECK(base64_decode("Zm\0v", 4, &out) == -EINVAL);
}

int main(void) {
    if (!mkdtemp(folder))
        return 1;
    a_file_is_replaced_with_its_mode();
    a_tree_is_removed_without_following_links();
    what_is_no_regular_file_is_not_read();
    programs_are_run_and_their_failure_is_seen();
    base64_is_decoded();
    CHECK(fs_remove_all(folder) == 0);
    return check_end();
}
