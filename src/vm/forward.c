#include "vm/forward.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"
#include "util/errors.h"

struct line {
    const char *names; /* separated by | */
    size_t length;
    bool required;
};

/* Takes the next line off the text. 1: *ret_line is one that names something, 0: it does not, -1:
 * it is a bad one. */
static int forward_next(const char **text, size_t *left, struct line *ret_line) {
    static const char word[] = "required";
    const char *at = *text, *newline = memchr(at, '\n', *left);
    const char *end = newline ? newline : at + *left;
    *left -= (size_t)(end - at) + (newline != NULL);
    *text = end + (newline != NULL);
    while (at < end && isspace((unsigned char)*at))
        at++;
    while (end > at && isspace((unsigned char)end[-1]))
        end--;
    if (at == end || *at == '#')
        return 0;
    size_t length = (size_t)(end - at), first = sizeof word - 1;
    ret_line->required =
        length > first && memcmp(at, word, first) == 0 && (at[first] == ' ' || at[first] == '\t');
    if (ret_line->required)
        for (at += first; *at == ' ' || *at == '\t';)
            at++;
    ret_line->names = at;
    ret_line->length = (size_t)(end - at);
    for (const char *name = at; name <= end;) {
        const char *bar = memchr(name, '|', (size_t)(end - name));
        const char *stop = bar ? bar : end;
        if (!env_name_is_valid(name, (size_t)(stop - name)))
            return -1;
        name = stop + 1;
    }
    return 1;
}

int forward_check(const char *text, size_t length, char **ret_why) {
    cleanup_buf struct buf why = {0};
    struct line line;
    for (size_t number = 1; length; number++) {
        if (forward_next(&text, &length, &line) >= 0)
            continue;
        buf_printf(&why,
                   "line %zu of forward takes the name of a variable, or `required` and one or "
                   "several names with | between them",
                   number);
        *ret_why = buf_steal(&why, NULL);
        return -ERR_INVALID;
    }
    return 0;
}

bool forward_is_empty(const char *text, size_t length) {
    struct line line;
    while (length)
        if (forward_next(&text, &length, &line) > 0)
            return false;
    return true;
}

static const char *environ_find(const char *list, size_t left, const char *name, size_t length,
                                size_t *ret_length) {
    while (left) {
        size_t one = strnlen(list, left);
        if (one > length && list[length] == '=' && memcmp(list, name, length) == 0) {
            *ret_length = one - length - 1;
            return list + length + 1;
        }
        one += one < left;
        list += one;
        left -= one;
    }
    return NULL;
}

static int forward_one(const struct line *line, const char *list, size_t list_length,
                       forward_set *set, void *arg, bool *ret_found) {
    const char *end = line->names + line->length;
    *ret_found = false;
    for (const char *name = line->names; name < end;) {
        size_t length = strcspn(name, "|"), value_length = 0;
        if (length > (size_t)(end - name))
            length = (size_t)(end - name);
        const char *value = environ_find(list, list_length, name, length, &value_length);
        if (value && value_length) {
            cleanup_free char *copy = strndup(name, length);
            int r = copy ? set(arg, copy, value, value_length) : -ERR_NO_MEMORY;
            if (r < 0)
                return r;
            *ret_found = true;
        }
        name += length + 1;
    }
    return 0;
}

int forward_apply(const char *text, size_t length, const char *list, size_t list_length,
                  forward_set *set, void *arg, char **ret_why) {
    struct line line;
    bool found;
    while (length) {
        if (forward_next(&text, &length, &line) <= 0)
            continue;
        int r = forward_one(&line, list, list_length, set, arg, &found);
        if (r < 0)
            return r;
        if (line.required && !found) {
            cleanup_buf struct buf why = {0};
            buf_append_str(&why, "the environment of the calling process has no ");
            for (size_t i = 0; i < line.length; i++) {
                if (line.names[i] == '|')
                    buf_append_str(&why, " and no ");
                else
                    buf_append_char(&why, line.names[i]);
            }
            buf_append_str(&why, ", which `forward` requires");
            *ret_why = buf_steal(&why, NULL);
            return -ERR_INVALID;
        }
    }
    return 0;
}
