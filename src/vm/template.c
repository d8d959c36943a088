#include "vm/template.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <zlib.h>

#include "util/cleanup.h"
#include "util/fs.h"
#include "util/log.h"
#include "util/number.h"

#define TEMPLATE_VERSION 2
#define TEMPLATE_JSON_LIMIT 65536
#define TEMPLATE_CHUNK 65536 /* of what is read at once */
#define TEMPLATE_CONTENT 40  /* of the text for a file's content */
#define TEMPLATE_NEW ".new-" /* before the name, while it is made */
#define TEMPLATE_BLOCK 512   /* of st_blocks */
#define TEMPLATE_ROOM 2      /* times its memory has to be free on the disk */

/* ---- keys ---- */

void template_key_free(struct template_key *key) {
    free(key->image_path);
    buf_free(&key->image);
    buf_free(&key->machine);
    *key = (struct template_key){0};
}

int template_key_copy(struct template_key *ret_key, const struct template_key *from) {
    struct template_key key = {.image_path = strdup(from->image_path)};
    buf_append(&key.image, from->image.data, from->image.len);
    buf_append(&key.machine, from->machine.data, from->machine.len);
    if (!key.image_path || key.image.failed || key.machine.failed) {
        template_key_free(&key);
        return -ENOMEM;
    }
    *ret_key = key;
    return 0;
}

bool template_key_equals(const struct template_key *a, const struct template_key *b) {
    return strcmp(a->image_path, b->image_path) == 0 && strcmp(a->image.data, b->image.data) == 0 &&
           strcmp(a->machine.data, b->machine.data) == 0;
}

int template_describe_file(const char *path, struct buf *out) {
    struct stat st;
    if (stat(path, &st) < 0)
        return -errno;
    buf_printf(out, "%s %llu %llu %lld %lld.%09ld %lld.%09ld\n", path,
               (unsigned long long)st.st_dev, (unsigned long long)st.st_ino, (long long)st.st_size,
               (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec, (long long)st.st_ctim.tv_sec,
               st.st_ctim.tv_nsec);
    return out->failed;
}

/* ---- one template ---- */

void template_close(struct template *t) {
    free(t->dir);
    free(t->ram);
    free(t->state);
    *t = (struct template){0};
}

/* Takes over `dir`. */
static int template_init(struct template *t, char *dir) {
    *t = (struct template){.dir = dir};
    if (!dir || asprintf(&t->ram, "%s/ram", dir) < 0)
        t->ram = NULL;
    if (!dir || asprintf(&t->state, "%s/state", dir) < 0)
        t->state = NULL;
    if (t->dir && t->ram && t->state)
        return 0;
    template_close(t);
    return -ENOMEM;
}

/* By its key, both parts: templates of all configurations are there side by side. */
static char *template_path(const char *state_dir, const struct template_key *key) {
    cleanup_buf struct buf text = {0};
    char *path;
    buf_append(&text, key->image.data, key->image.len);
    buf_append(&text, key->machine.data, key->machine.len);
    if (text.failed || asprintf(&path, "%s/templates/%016" PRIx64, state_dir,
                                number_hash(text.data, text.len)) < 0)
        return NULL;
    return path;
}

void template_remove(const struct template *t) {
    int r = fs_remove_all(t->dir);
    if (r < 0)
        log_error("cannot remove %s: %s", t->dir, strerror(errno));
}

static bool is_zero(const unsigned char *data, size_t length) {
    return !data[0] && memcmp(data, data + 1, length - 1) == 0;
}

/* The checksum of a file that is full of holes: of all that is not zero, and where that is. */
static int file_sum(int fd, uLong *ret_sum) {
    unsigned char chunk[TEMPLATE_CHUNK];
    uLong sum = crc32_z(0, NULL, 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    for (off_t at = 0; (at = lseek(fd, at, SEEK_DATA)) >= 0; at += TEMPLATE_CHUNK) {
        at -= at % TEMPLATE_CHUNK;
        ssize_t n = pread(fd, chunk, sizeof chunk, at);
        if (n < 0)
            return -errno;
        if (n == 0 || is_zero(chunk, (size_t)n))
            continue;
        sum = crc32_z(sum, (const unsigned char *)&at, sizeof at);
        sum = crc32_z(sum, chunk, (size_t)n);
    }
    if (errno != ENXIO) /* else the end was reached */
        return -errno;
    *ret_sum = sum;
    return 0;
}

/* A file as it is to be found again: its size and its checksum. Reads all of it. */
static int template_describe_content(const char *path, char text[TEMPLATE_CONTENT]) {
    struct stat st;
    uLong sum;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0)
        return -errno;
    int r = S_ISREG(st.st_mode) ? file_sum(fd, &sum) : -EINVAL;
    if (r == 0)
        snprintf(text, TEMPLATE_CONTENT, "%lld %08lx", (long long)st.st_size, sum);
    return r;
}

static json_t *template_load(const char *dir) {
    cleanup_free char *path = NULL;
    cleanup_buf struct buf text = {0};
    json_error_t error;
    if (asprintf(&path, "%s/template.json", dir) < 0)
        return NULL;
    if (fs_read(path, TEMPLATE_JSON_LIMIT, &text) < 0)
        return NULL;
    return json_loadb(text.data ? text.data : "", text.len, JSON_REJECT_DUPLICATES, &error);
}

static bool text_is(const json_t *json, const char *name, const char *text) {
    const char *found = json_string_value(json_object_get(json, name));
    return found && strcmp(found, text) == 0;
}

static bool template_file_is(const char *path, const json_t *json, const char *name) {
    char content[TEMPLATE_CONTENT];
    return template_describe_content(path, content) == 0 && text_is(json, name, content);
}

/* NULL, or what is wrong with it. */
static const char *template_check(const struct template *t, const json_t *json,
                                  const struct template_key *key) {
    if (!json || json_integer_value(json_object_get(json, "version")) != TEMPLATE_VERSION)
        return "its template.json cannot be read";
    if (!text_is(json, "image", key->image.data) || !text_is(json, "machine", key->machine.data))
        return "it is of another image or configuration";
    if (!template_file_is(t->ram, json, "ram"))
        return "the file of its memory is not as it was made";
    if (!template_file_is(t->state, json, "state"))
        return "its state is not as it was made";
    return NULL;
}

int template_open(const char *state_dir, const struct template_key *key, struct template *ret,
                  char **ret_why) {
    struct template t;
    struct stat st;
    int r = template_init(&t, template_path(state_dir, key));
    if (r == 0 && lstat(t.dir, &st) < 0)
        r = -errno;
    if (r == 0) {
        json_t *json = template_load(t.dir);
        const char *wrong = template_check(&t, json, key);
        json_decref(json);
        if (wrong) {
            r = -EBADMSG;
            if (asprintf(ret_why, "the template %s is damaged: %s", t.dir, wrong) < 0)
                *ret_why = NULL;
            template_remove(&t);
        }
    }
    if (r < 0) {
        template_close(&t);
        return r;
    }
    utimensat(AT_FDCWD, t.dir, NULL, 0); /* it is used: see templates_bound() */
    *ret = t;
    return 0;
}

int template_begin(const char *state_dir, unsigned memory, struct template *ret) {
    struct statvfs fs;
    cleanup_free char *folder = NULL;
    char *dir;
    if (asprintf(&folder, "%s/templates", state_dir) < 0)
        return -ENOMEM;
    int r = fs_mkdir_all(folder, 0700);
    if (r < 0)
        return r;
    if (statvfs(folder, &fs) < 0)
        return -errno;
    if ((unsigned long long)fs.f_bavail * fs.f_frsize <
        TEMPLATE_ROOM * ((unsigned long long)memory << 20))
        return -ENOSPC;
    if (asprintf(&dir, "%s/" TEMPLATE_NEW "XXXXXX", folder) < 0)
        return -ENOMEM;
    if (!mkdtemp(dir)) {
        r = -errno;
        free(dir);
        return r;
    }
    return template_init(ret, dir);
}

/* ---- all of them ---- */

struct template_found {
    struct template t;
    struct timespec used;
    unsigned long long bytes;
    bool stale; /* of an image that has changed */
};

static unsigned long long file_bytes(const char *path) {
    struct stat st;
    return lstat(path, &st) < 0 ? 0 : (unsigned long long)st.st_blocks * TEMPLATE_BLOCK;
}

static int template_compare(const void *a, const void *b) {
    const struct template_found *x = a, *y = b;
    if (x->used.tv_sec != y->used.tv_sec)
        return x->used.tv_sec < y->used.tv_sec ? 1 : -1;
    return x->used.tv_nsec < y->used.tv_nsec ? 1 : x->used.tv_nsec > y->used.tv_nsec ? -1 : 0;
}

static bool template_look(const char *folder, const char *name, const struct template_key *key,
                          struct template_found *ret) {
    struct template_found f = {0};
    struct stat st;
    char *dir;
    if (name[0] == '.' || asprintf(&dir, "%s/%s", folder, name) < 0 || template_init(&f.t, dir) < 0)
        return false;
    if (lstat(f.t.dir, &st) < 0) {
        template_close(&f.t);
        return false;
    }
    f.used = st.st_mtim;
    f.bytes = file_bytes(f.t.ram) + file_bytes(f.t.state);
    json_t *json = template_load(f.t.dir);
    f.stale =
        text_is(json, "image_path", key->image_path) && !text_is(json, "image", key->image.data);
    json_decref(json);
    *ret = f;
    return true;
}

void templates_bound(const char *state_dir, const struct template_key *key, size_t most,
                     unsigned long long most_bytes) {
    cleanup_free char *folder = NULL;
    struct template_found *found = NULL;
    size_t count = 0, kept = 0;
    unsigned long long bytes = 0;
    DIR *dir = asprintf(&folder, "%s/templates", state_dir) < 0 ? NULL : opendir(folder);
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        struct template_found *more = realloc(found, (count + 1) * sizeof *found);
        if (!more)
            break;
        found = more;
        count += template_look(folder, entry->d_name, key, &found[count]);
    }
    closedir(dir);
    if (count)
        qsort(found, count, sizeof *found, template_compare);
    for (size_t i = 0; i < count; i++) {
        bool keep = !found[i].stale && kept < most && bytes + found[i].bytes <= most_bytes;
        if (keep) {
            kept++;
            bytes += found[i].bytes;
        } else {
            log_info("the template %s is removed: %s", found[i].t.dir,
                     found[i].stale ? "its image has changed" : "others were used later");
            template_remove(&found[i].t);
        }
        template_close(&found[i].t);
    }
    free(found);
}

/* What is in the page cache alone would be gone with the host, and the file look as if it were
 * there. */
static int file_sync(const char *path) {
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    return fd < 0 || fsync(fd) < 0 ? -errno : 0;
}

static void template_remove_logs(const struct template *t) {
    static const char *const names[] = {"serial.log", "vmm.log"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        cleanup_free char *path = NULL;
        if (asprintf(&path, "%s/%s", t->dir, names[i]) >= 0)
            unlink(path);
    }
}

static int template_save(const struct template *t, const struct template_key *key) {
    cleanup_free char *path = NULL, *text = NULL;
    char ram[TEMPLATE_CONTENT], state[TEMPLATE_CONTENT];
    int r = file_sync(t->ram);
    if (r == 0)
        r = file_sync(t->state);
    if (r == 0)
        r = template_describe_content(t->ram, ram);
    if (r == 0)
        r = template_describe_content(t->state, state);
    if (r < 0)
        return r;
    json_t *json = json_pack("{s:i, s:s, s:s, s:s, s:s, s:s}", "version", TEMPLATE_VERSION,
                             "image_path", key->image_path, "image", key->image.data, "machine",
                             key->machine.data, "ram", ram, "state", state);
    text = json ? json_dumps(json, JSON_INDENT(2)) : NULL;
    json_decref(json);
    if (!text || asprintf(&path, "%s/template.json", t->dir) < 0)
        return -ENOMEM;
    return fs_replace(path, 0600, text, strlen(text));
}

int template_finish(const char *state_dir, struct template *t, const struct template_key *key) {
    struct template named;
    int r = template_init(&named, template_path(state_dir, key));
    if (r < 0)
        return r;
    template_remove_logs(t);
    r = template_save(t, key);
    if (r == 0)
        r = fs_remove_all(named.dir); /* one that was damaged meanwhile */
    if (r == 0 && rename(t->dir, named.dir) < 0)
        r = -errno;
    template_close(r == 0 ? t : &named);
    if (r < 0)
        return r;
    *t = named;
    templates_bound(state_dir, key, TEMPLATES_MOST, TEMPLATES_BYTES);
    return 0;
}

void templates_clear(const char *state_dir, unsigned (*each)(const char *dir)) {
    cleanup_free char *folder = NULL;
    DIR *dir = asprintf(&folder, "%s/templates", state_dir) < 0 ? NULL : opendir(folder);
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        cleanup_free char *path = NULL;
        if (strncmp(entry->d_name, TEMPLATE_NEW, sizeof TEMPLATE_NEW - 1) != 0 ||
            asprintf(&path, "%s/%s", folder, entry->d_name) < 0)
            continue;
        each(path);
        if (fs_remove_all(path) < 0)
            log_error("cannot remove %s: %s", path, strerror(errno));
    }
    closedir(dir);
}
