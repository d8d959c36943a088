#include "vm/image.h"

#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"

#define IMAGE_JSON_LIMIT 65536

void image_search_path(const struct settings *settings, struct buf *out) {
    const char *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    if (settings->images_dir)
        buf_printf(out, "%s\n", settings->images_dir);
    if (data && data[0] == '/')
        buf_printf(out, "%s/vmsfs/images\n", data);
    else if (home && home[0] == '/')
        buf_printf(out, "%s/.local/share/vmsfs/images\n", home);
    buf_append_str(out, "/var/lib/vmsfs/images\n"
                        "/usr/local/share/vmsfs/images\n"
                        "/usr/share/vmsfs/images\n");
}

const char *image_builder(const struct settings *settings) {
    static const char installed[] = "vmsfs-guest-tiny";
    cleanup_buf struct buf path = {0};
    const char *slash = strrchr(settings->program, '/');
    buf_printf(&path, "%.*s%s", slash ? (int)(slash - settings->program + 1) : 0, settings->program,
               installed);
    return !path.failed && access(path.data, X_OK) == 0 ? installed : "contrib/guest/tiny";
}

void image_close(struct image *image) {
    free(image->path);
    free(image->kernel);
    free(image->kernel_elf);
    free(image->initrd);
    free(image->disk_initrd);
    free(image->boot_args);
    free(image->user);
    free(image->ready);
    free(image->warm_boot_args);
    *image = (struct image){0};
}

static char *image_find(const struct settings *settings, const char *name) {
    cleanup_buf struct buf path = {0};
    char *found = NULL;
    if (name[0] == '/')
        return strdup(name);
    if (strchr(name, '/') || name[0] == '.' || !name[0])
        return NULL;
    image_search_path(settings, &path);
    char *rest = NULL;
    for (char *dir = path.failed ? NULL : strtok_r(path.data, "\n", &rest); dir && !found;
         dir = strtok_r(NULL, "\n", &rest)) {
        cleanup_free char *json = NULL;
        if (asprintf(&json, "%s/%s/image.json", dir, name) < 0)
            return NULL;
        if (access(json, R_OK) == 0 && asprintf(&found, "%s/%s", dir, name) < 0)
            return NULL;
    }
    return found;
}

/* A path in the image's folder: a plain name, so that an image cannot point elsewhere. */
static int image_file(const struct image *image, const json_t *json, const char *key,
                      char **ret_path) {
    const char *name = json_string_value(json_object_get(json, key));
    if (!name || !name[0] || strchr(name, '/') || name[0] == '.')
        return -ERR_INVALID;
    return asprintf(ret_path, "%s/%s", image->path, name) < 0 ? -ERR_NO_MEMORY : 0;
}

static int image_number(const json_t *json, const char *key, unsigned most, unsigned *ret_number) {
    const json_t *value = json_object_get(json, key);
    if (!value)
        return 0;
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) > (json_int_t)most)
        return -ERR_INVALID;
    *ret_number = (unsigned)json_integer_value(value);
    return 0;
}

static int image_text(const json_t *json, const char *key, const char *fallback, char **ret_text) {
    const json_t *value = json_object_get(json, key);
    if (value && !json_is_string(value))
        return -ERR_INVALID;
    *ret_text = strdup(value ? json_string_value(value) : fallback);
    return *ret_text ? 0 : -ERR_NO_MEMORY;
}

/* It goes into ssh_config: nothing that could be more than a name. */
static bool image_user_is_valid(const char *user) {
    static const char letters[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-";
    size_t length = strlen(user);
    return length > 0 && length <= 32 && user[0] != '-' && strspn(user, letters) == length;
}

/* Both fields may be missing. */
static int image_disk(struct image *image, const json_t *json) {
    const json_t *value = json_object_get(json, "disk");
    if (value && (!json_is_string(value) || strcmp(json_string_value(value), "overlay") != 0))
        return -ERR_INVALID;
    image->disk = value;
    return value && json_object_get(json, "disk_initrd")
               ? image_file(image, json, "disk_initrd", &image->disk_initrd)
               : 0;
}

static int image_warm(struct image *image, const json_t *json) {
    const json_t *value = json_object_get(json, "warm");
    if (value && (!json_is_string(value) || strcmp(json_string_value(value), "port") != 0))
        return -ERR_INVALID;
    image->warm = value;
    return image_text(json, "warm_boot_args", "", &image->warm_boot_args);
}

/* Both fields may be missing. */
static int image_vsock(struct image *image, const json_t *json) {
    if (image_number(json, "vsock", UINT_MAX - 1, &image->vsock_port) < 0)
        return -ERR_INVALID;
    return json_object_get(json, "kernel_elf")
               ? image_file(image, json, "kernel_elf", &image->kernel_elf)
               : 0;
}

static int image_parse(struct image *image, const json_t *json, const char **ret_field) {
    const char *inject = json_string_value(json_object_get(json, "inject"));
    const char *os = json_string_value(json_object_get(json, "os"));
    *ret_field = "inject (must be \"cpio\")";
    if (!inject || strcmp(inject, "cpio") != 0)
        return -ERR_INVALID;
    *ret_field = "os (must be \"linux\")";
    if (os && strcmp(os, "linux") != 0)
        return -ERR_INVALID;
    *ret_field = "user";
    if (image_text(json, "user", "root", &image->user) < 0 || !image_user_is_valid(image->user))
        return -ERR_INVALID;
    *ret_field = "disk (must be \"overlay\") or disk_initrd";
    if (image_disk(image, json) < 0)
        return -ERR_INVALID;
    *ret_field = "warm (must be \"port\") or warm_boot_args";
    if (image_warm(image, json) < 0)
        return -ERR_INVALID;
    *ret_field = "vsock (a port number) or kernel_elf";
    if (image_vsock(image, json) < 0)
        return -ERR_INVALID;
    if (image_file(image, json, *ret_field = "kernel", &image->kernel) < 0 ||
        image_file(image, json, *ret_field = "initrd", &image->initrd) < 0 ||
        image_text(json, *ret_field = "boot_args", "console=ttyS0", &image->boot_args) < 0 ||
        image_text(json, *ret_field = "ready", "", &image->ready) < 0 ||
        image_number(json, *ret_field = "vcpus", 256, &image->vcpus) < 0 ||
        image_number(json, *ret_field = "memory", 1 << 20, &image->memory) < 0 ||
        image_number(json, *ret_field = "memory_min", 1 << 20, &image->memory_min) < 0)
        return -ERR_INVALID;
    return 0;
}

int image_open(const struct settings *settings, const char *name, struct image *ret_image,
               char **ret_why) {
    struct image image = {.vcpus = 1, .memory = 256};
    json_error_t error;
    const char *field = NULL;
    image.path = image_find(settings, name);
    if (!image.path) {
        cleanup_buf struct buf path = {0};
        image_search_path(settings, &path);
        for (char *c = path.data; c && *c; c++)
            if (*c == '\n')
                *c = ' ';
        return error_explain(
            -ERR_GONE, ret_why,
            "image \"%s\" is in none of: %s- build one with %s, or name its folder with "
            "-o images=DIR",
            name, path.data, image_builder(settings));
    }
    cleanup_free char *file = NULL;
    cleanup_buf struct buf text = {0};
    int r = asprintf(&file, "%s/image.json", image.path) < 0
                ? -ENOMEM
                : fs_read(file, IMAGE_JSON_LIMIT, &text);
    if (r < 0) {
        error_explain(-ERR_GONE, ret_why, "image \"%s\": cannot read %s: %s", name, file,
                      strerror(-r));
        image_close(&image);
        return -ERR_GONE;
    }
    json_t *json = json_loadb(text.data ? text.data : "", text.len, JSON_REJECT_DUPLICATES, &error);
    if (!json)
        r = error_explain(-ERR_GONE, ret_why, "image \"%s\": %s, line %d: %s", name, file,
                          error.line, error.text);
    else if (image_parse(&image, json, &field) < 0)
        r = error_explain(-ERR_GONE, ret_why, "image \"%s\": %s: the field %s is missing or wrong",
                          name, file, field);
    else if (access(image.kernel, R_OK) < 0 || access(image.initrd, R_OK) < 0)
        r = error_explain(-ERR_GONE, ret_why,
                          "image \"%s\": cannot read its kernel or initrd in %s: %s", name,
                          image.path, strerror(errno));
    json_decref(json);
    if (r < 0)
        image_close(&image);
    else
        *ret_image = image;
    return r;
}

int image_check_memory(const struct image *image, const char *name, unsigned memory,
                       char **ret_why) {
    if (!memory || memory >= image->memory_min)
        return 0;
    return error_explain(-ERR_GONE, ret_why,
                         "%u MiB are too little memory for the image \"%s\", which needs %u",
                         memory, name, image->memory_min);
}

int image_check_disk(const struct image *image, const char *name, unsigned disk, char **ret_why) {
    if (!disk || image->disk)
        return 0;
    return error_explain(-ERR_GONE, ret_why,
                         "the image \"%s\" cannot use a disk: its image.json has no \"disk\". "
                         "vmsfs-guest-tiny builds one that can; 0 in config/disk is no disk",
                         name);
}
