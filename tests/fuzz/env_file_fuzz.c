#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"

/* Any bytes are read; what was read is written, read again and must be the same variables in the
 * same order and the same `kept`. Written once more it must be the same file. */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct reading {
    struct buf strings; /* name NUL value NUL … */
    size_t count;
    struct buf kept;
};

static void require(bool condition) {
    if (!condition)
        abort();
}

static int gather(void *arg, const struct env_var *var) {
    struct reading *r = arg;
    require(env_name_is_valid(var->name, var->name_length));
    require(!memchr(var->value, '\0', var->length));
    buf_append(&r->strings, var->name, var->name_length);
    buf_append_char(&r->strings, '\0');
    buf_append(&r->strings, var->value, var->length);
    buf_append_char(&r->strings, '\0');
    r->count++;
    return 0;
}

static void written(struct buf *file, const struct reading *r) {
    cleanup_free struct env_var *vars = calloc(r->count + 1, sizeof *vars);
    const char *at = r->strings.data;
    for (size_t i = 0; i < r->count; i++) {
        vars[i].name = at;
        vars[i].name_length = strlen(at);
        vars[i].value = at += vars[i].name_length + 1;
        vars[i].length = strlen(at);
        at += vars[i].length + 1;
    }
    env_file_format(file, vars, r->count, r->kept.data, r->kept.len);
}

static bool same(const struct buf *a, const struct buf *b) {
    return a->len == b->len && (!a->len || !memcmp(a->data, b->data, a->len));
}

static void reading_free(struct reading *r) {
    buf_free(&r->strings);
    buf_free(&r->kept);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct reading first = {0}, second = {0};
    cleanup_buf struct buf file = {0}, again = {0};

    require(env_file_parse((const char *)data, size, gather, &first, &first.kept) == 0);
    written(&file, &first);
    require(env_file_parse(file.data, file.len, gather, &second, &second.kept) == 0);
    require(same(&first.strings, &second.strings) && same(&first.kept, &second.kept));
    written(&again, &second);
    require(same(&file, &again));

    reading_free(&first);
    reading_free(&second);
    return 0;
}
