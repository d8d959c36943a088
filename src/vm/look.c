#include "vm/look.h"

#include <stdint.h>
#include <stdio.h>

/* In words that a reader of the record knows: "mode": "0640", "mtime": "1600000000.000000001". */

void look_save(const struct look *look, const struct look *usual, json_t *one) {
    char text[64];
    if (look->mode != usual->mode) {
        snprintf(text, sizeof text, "%04o", (unsigned)look->mode & 07777);
        json_object_set_new(one, "mode", json_string(text));
    }
    if (look->uid != usual->uid)
        json_object_set_new(one, "uid", json_integer(look->uid));
    if (look->gid != usual->gid)
        json_object_set_new(one, "gid", json_integer(look->gid));
    snprintf(text, sizeof text, "%lld.%09ld", (long long)look->changed.tv_sec,
             look->changed.tv_nsec);
    json_object_set_new(one, "mtime", json_string(text));
}

static void look_load_id(const json_t *number, unsigned *id) {
    json_int_t n = json_is_integer(number) ? json_integer_value(number) : -1;
    if (n >= 0 && n < UINT32_MAX)
        *id = (unsigned)n;
}

void look_load(struct look *look, const json_t *one) {
    const char *mode = json_string_value(json_object_get(one, "mode"));
    const char *time = json_string_value(json_object_get(one, "mtime"));
    unsigned bits;
    long long seconds;
    long nanoseconds;
    if (mode && sscanf(mode, "%4o", &bits) == 1)
        look->mode = bits & 07777;
    look_load_id(json_object_get(one, "uid"), &look->uid);
    look_load_id(json_object_get(one, "gid"), &look->gid);
    if (time && sscanf(time, "%lld.%9ld", &seconds, &nanoseconds) == 2 && nanoseconds >= 0)
        look->changed = look->read =
            (struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = nanoseconds};
}
