#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"

/* Any bytes are read; what was read is written, read again and must be the same variables and the
 * same `kept`. Written once more it must be the same file. */

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

/* In the order of their names, of each the last. Returns how many. */
static size_t sorted(struct env_var *vars, const struct reading *r) {
    const char *at = r->strings.data;
    size_t count = 0;
    for (size_t i = 0; i < r->count; i++) {
        struct env_var var = {.name = at, .name_length = strlen(at)};
        var.value = at += var.name_length + 1;
        var.length = strlen(at);
        at += var.length + 1;
        size_t place = 0;
        while (place < count && strcmp(vars[place].name, var.name) < 0)
            place++;
        if (place == count || strcmp(vars[place].name, var.name) != 0)
            memmove(&vars[place + 1], &vars[place], (count++ - place) * sizeof *vars);
        vars[place] = var;
    }
    return count;
}

static void written(struct buf *file, const struct reading *r) {
    cleanup_free struct env_var *vars = calloc(r->count + 1, sizeof *vars);
    size_t count = sorted(vars, r);
    env_file_format(file, vars, count, r->kept.data, r->kept.len);
}

static bool same_variables(const struct reading *a, const struct reading *b) {
    cleanup_free struct env_var *x = calloc(a->count + 1, sizeof *x);
    cleanup_free struct env_var *y = calloc(b->count + 1, sizeof *y);
    size_t count = sorted(x, a);
    if (sorted(y, b) != count)
        return false;
    for (size_t i = 0; i < count; i++)
        if (strcmp(x[i].name, y[i].name) != 0 || strcmp(x[i].value, y[i].value) != 0)
            return false;
    return true;
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
    require(same_variables(&first, &second) && same(&first.kept, &second.kept));
    written(&again, &second);
    require(same(&file, &again));

    reading_free(&first);
    reading_free(&second);
    return 0;
}
