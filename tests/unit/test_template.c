#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "util/cleanup.h"
#include "util/fs.h"
#include "vm/template.h"

static char folder[] = "/tmp/vmsfs-test-template.XXXXXX";

#define RAM_SIZE 65536

static struct template_key key_of(const char *image, const char *stamp, const char *machine) {
    struct template_key key = {.image_path = strdup(image)};
    buf_append_str(&key.image, stamp);
    buf_append_str(&key.machine, machine);
    return key;
}

static void file_write(const char *path, const char *data, size_t length) {
    CHECK(fs_replace(path, 0600, data, length) == 0);
}

static void template_make(const struct template_key *key) {
    static char ram[RAM_SIZE];
    struct template t;
    memset(ram, 'r', sizeof ram);
    CHECK(template_begin(folder, 1, &t) == 0);
    file_write(t.ram, ram, sizeof ram);
    file_write(t.state, "state", 5);
    CHECK(template_finish(folder, &t, key) == 0);
    template_close(&t);
}

static int template_is_there(const struct template_key *key) {
    struct template t;
    char *why = NULL;
    int r = template_open(folder, key, &t, &why);
    if (r == 0)
        template_close(&t);
    free(why);
    return r;
}

/* Both are there when `key` is opened: what is used sets itself behind others. */
static void template_set_used(const struct template_key *key, time_t when) {
    struct template t;
    char *why = NULL;
    const struct timespec times[] = {{.tv_sec = when}, {.tv_sec = when}};
    CHECK(template_open(folder, key, &t, &why) == 0);
    CHECK(utimensat(AT_FDCWD, t.dir, times, 0) == 0);
    template_close(&t);
}

static void a_template_is_found_by_its_whole_key(void) {
    struct template_key key = key_of("/i", "one", "m");
    struct template_key others[] = {key_of("/i", "two", "m"), key_of("/i", "one", "n")};
    CHECK(template_is_there(&key) == -ENOENT);
    template_make(&key);
    CHECK(template_is_there(&key) == 0);
    for (size_t i = 0; i < 2; i++) {
        CHECK(template_is_there(&others[i]) == -ENOENT);
        CHECK(!template_key_equals(&key, &others[i]));
        template_key_free(&others[i]);
    }
    struct template_key copy;
    CHECK(template_key_copy(&copy, &key) == 0 && template_key_equals(&key, &copy));
    template_key_free(&copy);
    template_key_free(&key);
}

/* One bit, with the file's size and times as they were. */
static void bit_flip(const char *path, off_t at) {
    unsigned char byte = 0;
    struct stat st;
    cleanup_close int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && fstat(fd, &st) == 0 && pread(fd, &byte, 1, at) == 1);
    byte ^= 0x10;
    const struct timespec times[] = {st.st_atim, st.st_mtim};
    CHECK(pwrite(fd, &byte, 1, at) == 1 && futimens(fd, times) == 0);
}

/* A file with a hole and one with zeros in its place are the same. */
static void holes_are_zeros(void) {
    static char ram[1 << 20];
    struct template_key key = key_of("/z", "one", "m");
    struct template t;
    ram[70000] = ram[sizeof ram - 1] = 'x';
    CHECK(template_begin(folder, 1, &t) == 0);
    file_write(t.ram, ram, sizeof ram);
    file_write(t.state, "state", 5);
    CHECK(template_finish(folder, &t, &key) == 0);
    CHECK(truncate(t.ram, 0) == 0 && truncate(t.ram, sizeof ram) == 0);
    cleanup_close int fd = open(t.ram, O_WRONLY | O_CLOEXEC);
    CHECK(pwrite(fd, "x", 1, 70000) == 1 && pwrite(fd, "x", 1, sizeof ram - 1) == 1);
    CHECK(template_is_there(&key) == 0);
    bit_flip(t.ram, 200000); /* in a hole */
    CHECK(template_is_there(&key) == -EBADMSG);
    template_close(&t);
    template_key_free(&key);
}

static void damage_is_seen_and_removes_it(void) {
    static const char *const files[] = {"ram", "state", "template.json"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        for (int how = 0; how < 6; how++) {
            struct template_key key = key_of("/d", "one", "m");
            struct template t;
            struct stat st;
            cleanup_buf struct buf path = {0};
            char *why = NULL;
            template_make(&key);
            CHECK(template_open(folder, &key, &t, &why) == 0);
            buf_printf(&path, "%s/%s", t.dir, files[i]);
            CHECK(stat(path.data, &st) == 0);
            if (how == 0)
                CHECK(truncate(path.data, st.st_size / 2) == 0);
            else if (how == 1)
                CHECK(unlink(path.data) == 0);
            else if (how == 2)
                CHECK(fs_replace_fast(path.data, 0600, "x", 1) == 0);
            else if (how == 3)
                bit_flip(path.data, st.st_size - 1 - (i == 2));
            else if (how == 4)
                bit_flip(path.data, i == 2 ? 3 : 0);
            else
                CHECK(unlink(path.data) == 0 && symlink("/dev/zero", path.data) == 0);
            template_close(&t);
            CHECK_SAID(template_open(folder, &key, &t, &why) == -EBADMSG, "%s, %d", files[i], how);
            CHECK(why && strstr(why, "damaged"));
            free(why);
            CHECK(template_is_there(&key) == -ENOENT);
            template_key_free(&key);
        }
    }
}

static void another_key_under_the_same_name_is_no_match(void) {
    struct template_key key = key_of("/k", "one", "m");
    struct template t;
    char *why = NULL;
    cleanup_buf struct buf path = {0}, text = {0};
    template_make(&key);
    CHECK(template_open(folder, &key, &t, &why) == 0);
    buf_printf(&path, "%s/template.json", t.dir);
    CHECK(fs_read(path.data, 65536, &text) == 0);
    *strstr(text.data, "\"one\"") = '\'';
    char *place = strstr(text.data, "'one\"");
    memcpy(place, "\"two\"", 5);
    CHECK(fs_replace(path.data, 0600, text.data, text.len) == 0);
    template_close(&t);
    CHECK(template_is_there(&key) == -EBADMSG);
    template_key_free(&key);
}

static void those_used_last_are_kept(void) {
    struct template_key keys[TEMPLATES_MOST + 1];
    char name[16];
    for (size_t i = 0; i < TEMPLATES_MOST + 1; i++) {
        snprintf(name, sizeof name, "m%zu", i);
        keys[i] = key_of("/l", "one", name);
    }
    for (size_t i = 0; i < TEMPLATES_MOST; i++) {
        template_make(&keys[i]);
        template_set_used(&keys[i], 1000 + (time_t)((i + 3) % TEMPLATES_MOST));
    }
    template_make(&keys[TEMPLATES_MOST]);
    /* The one with the time 1000. */
    for (size_t i = 0; i < TEMPLATES_MOST + 1; i++)
        CHECK_SAID(template_is_there(&keys[i]) == (i == TEMPLATES_MOST - 3 ? -ENOENT : 0), "%zu",
                   i);
    templates_bound(folder, &keys[0], TEMPLATES_MOST, 3 * RAM_SIZE);
    size_t left = 0;
    for (size_t i = 0; i < TEMPLATES_MOST + 1; i++)
        left += template_is_there(&keys[i]) == 0;
    CHECK(left == 2); /* a little more than its memory is counted of each */
    for (size_t i = 0; i < TEMPLATES_MOST + 1; i++)
        template_key_free(&keys[i]);
}

static void those_of_an_image_that_has_changed_go(void) {
    struct template_key old = key_of("/s", "one", "m"), other = key_of("/t", "one", "m2"),
                        new = key_of("/s", "two", "n");
    template_make(&old);
    template_make(&other);
    template_make(&new);
    CHECK(template_is_there(&old) == -ENOENT);
    CHECK(template_is_there(&other) == 0 && template_is_there(&new) == 0);
    template_key_free(&old);
    template_key_free(&other);
    template_key_free(&new);
}

static unsigned cleared;
static unsigned count_cleared(const char *dir) {
    CHECK(strstr(dir, "/templates/.new-") != NULL);
    return ++cleared;
}

static void what_was_not_finished_is_cleared_away(void) {
    struct template t;
    struct stat st;
    CHECK(template_begin(folder, 1, &t) == 0);
    CHECK(stat(t.dir, &st) == 0 && (st.st_mode & 07777) == 0700);
    file_write(t.ram, "r", 1);
    templates_clear(folder, count_cleared);
    CHECK(cleared == 1 && access(t.dir, F_OK) < 0);
    template_close(&t);
}

static void a_disk_without_room_gets_none(void) {
    struct template t;
    CHECK(template_begin(folder, UINT_MAX, &t) == -ENOSPC);
}

static void a_file_looks_different_when_it_has_changed(void) {
    cleanup_buf struct buf path = {0}, before = {0}, same = {0}, after = {0};
    buf_printf(&path, "%s/file", folder);
    file_write(path.data, "one", 3);
    CHECK(template_describe_file(path.data, &before) == 0);
    CHECK(template_describe_file(path.data, &same) == 0);
    CHECK(check_same(before.data, before.len, same.data, same.len));
    file_write(path.data, "two", 3);
    CHECK(template_describe_file(path.data, &after) == 0);
    CHECK(!check_same(before.data, before.len, after.data, after.len));
    CHECK(unlink(path.data) == 0);
    CHECK(template_describe_file(path.data, &after) == -ENOENT);
}

int main(void) {
    if (!mkdtemp(folder))
        return 1;
    a_template_is_found_by_its_whole_key();
    damage_is_seen_and_removes_it();
    holes_are_zeros();
    another_key_under_the_same_name_is_no_match();
    those_used_last_are_kept();
    those_of_an_image_that_has_changed_go();
    what_was_not_finished_is_cleared_away();
    a_disk_without_room_gets_none();
    a_file_looks_different_when_it_has_changed();
    CHECK(fs_remove_all(folder) == 0);
    return check_end();
}
