#include <errno.h>
#include <ftw.h>
#include <sys/stat.h>

#include "check.h"
#include "util/cleanup.h"
#include "util/cpio.h"

/* The archive is read by GNU cpio, which must be installed. */

static char directory[] = "/tmp/vmsfs-test-cpio-XXXXXX";

static void file_write(const char *name, const struct buf *bytes) {
    FILE *f = fopen(name, "w");
    CHECK(f && fwrite(bytes->data, 1, bytes->len, f) == bytes->len && !fclose(f));
}

static struct buf file_read(FILE *f) {
    struct buf bytes = {0};
    char block[4096];
    for (size_t n; f && (n = fread(block, 1, sizeof block, f));)
        buf_append(&bytes, block, n);
    return bytes;
}

static struct buf command_read(const char *command) {
    FILE *f = popen(command, "r");
    struct buf output = file_read(f);
    CHECK_SAID(f && pclose(f) == 0, "fails: %s", command);
    return output;
}

static void file_is(const char *name, mode_t mode, const void *data, size_t length) {
    struct stat st;
    CHECK_SAID(!lstat(name, &st) && st.st_mode == mode, "mode of %s", name);
    CHECK_SAID(st.st_nlink == (S_ISDIR(mode) ? 2 : 1), "%s: %d links", name, (int)st.st_nlink);
    if (!S_ISREG(mode))
        return;
    CHECK_SAID(st.st_mtime == 0, "mtime of %s", name);
    FILE *f = fopen(name, "r");
    cleanup_buf struct buf bytes = file_read(f);
    CHECK_SAID(check_same(bytes.data, bytes.len, data, length), "content of %s", name);
    if (f)
        fclose(f);
}

static void gnu_cpio_lists_and_extracts_what_was_added(void) {
    static const char *const names[] = {"f1", "f22", "f333", "f4444", "f55555"};
    char bytes[1027];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (char)i;

    cleanup_buf struct buf archive = {0};
    CHECK(!cpio_add(&archive, "root", S_IFDIR | 0700, NULL, 0));
    CHECK(!cpio_add(&archive, "root/..hidden", S_IFREG | 0600, bytes, sizeof bytes));
    CHECK(!cpio_add(&archive, "root/exec", S_IFREG | 0755, "", 0));
    CHECK(!cpio_add(&archive, "root/link", S_IFLNK | 0777, "exec", 4));
    for (size_t i = 0; i < 5; i++) /* every padding of name and data */
        CHECK(!cpio_add(&archive, names[i], S_IFREG | 0644, names[i], i));
    cpio_end(&archive);
    CHECK(!archive.failed && archive.len % 512 == 0);
    file_write("archive", &archive);

    cleanup_buf struct buf list = command_read("cpio -t --quiet <archive");
    static const char expected[] =
        "root\nroot/..hidden\nroot/exec\nroot/link\nf1\nf22\nf333\nf4444\n"
        "f55555\n";
    CHECK_SAID(check_same(list.data, list.len, expected, strlen(expected)), "cpio -t: %s",
               list.data ? list.data : "");
    cleanup_buf struct buf said =
        command_read("cpio -i -m --no-preserve-owner --quiet <archive 2>&1");
    CHECK_SAID(said.len == 0, "cpio -i: %s", said.data);

    file_is("root", S_IFDIR | 0700, NULL, 0);
    file_is("root/..hidden", S_IFREG | 0600, bytes, sizeof bytes);
    file_is("root/exec", S_IFREG | 0755, "", 0);
    file_is("root/link", S_IFLNK | 0777, NULL, 0);
    for (size_t i = 0; i < 5; i++)
        file_is(names[i], S_IFREG | 0644, names[i], i);
    char target[16];
    CHECK(readlink("root/link", target, sizeof target) == 4 && !memcmp(target, "exec", 4));
    cleanup_buf struct buf owners =
        command_read("cpio -t -v --numeric-uid-gid --quiet <archive | grep -c ' 0 *0 '");
    CHECK_SAID(check_same(owners.data, owners.len, "9\n", 2), "not all are root's: %s",
               owners.data ? owners.data : "");
}

static void no_two_members_share_an_inode(void) {
    cleanup_buf struct buf archive = {0};
    char inodes[3][9] = {""};
    for (int i = 0; i < 3; i++) {
        size_t start = archive.len;
        CHECK(!cpio_add(&archive, "same", S_IFREG | 0600, "", 0));
        CHECK(archive.len > start + 14 && start % 4 == 0);
        memcpy(inodes[i], archive.data + start + 6, 8);
    }
    CHECK(strcmp(inodes[0], inodes[1]) && strcmp(inodes[1], inodes[2]) &&
          strcmp(inodes[0], inodes[2]));
}

static void an_archive_of_nothing_is_valid(void) {
    cleanup_buf struct buf archive = {0};
    cpio_end(&archive);
    CHECK(archive.len == 512);
    file_write("nothing", &archive);
    cleanup_buf struct buf list = command_read("cpio -t --quiet <nothing 2>&1");
    CHECK(list.len == 0);
}

static void a_bad_path_adds_nothing(void) {
    char long_path[4097];
    memset(long_path, 'a', sizeof long_path);
    long_path[4096] = '\0';
    const char *const bad[] = {"",       "/",    "/etc",  "..",         "../x",   "a/..",
                               "a/../b", "./..", "a//..", "TRAILER!!!", long_path};
    cleanup_buf struct buf archive = {0};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_SAID(cpio_add(&archive, bad[i], S_IFREG | 0600, "x", 1) == -EINVAL, "accepted: %s",
                   bad[i]);
    CHECK(archive.len == 0);
    const char *const good[] = {".", "...", "..a", "a..", "a/..b/c", "./a", long_path + 1};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECK_SAID(!cpio_add(&archive, good[i], S_IFREG | 0600, "x", 1), "refused: %s", good[i]);
}

static void want_of_memory_is_told(void) {
    cleanup_buf struct buf archive = {.failed = -ENOMEM};
    CHECK(cpio_add(&archive, "a", S_IFREG | 0600, "x", 1) == -ENOMEM);
    cpio_end(&archive);
    CHECK(archive.failed == -ENOMEM);
}

static int entry_remove(const char *path, const struct stat *st, int type, struct FTW *ftw) {
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

int main(void) {
    umask(022);
    CHECK(mkdtemp(directory) && !chdir(directory));
    gnu_cpio_lists_and_extracts_what_was_added();
    no_two_members_share_an_inode();
    an_archive_of_nothing_is_valid();
    a_bad_path_adds_nothing();
    want_of_memory_is_told();
    CHECK(!chdir("/") && !nftw(directory, entry_remove, 8, FTW_DEPTH | FTW_PHYS));
    return check_end();
}
