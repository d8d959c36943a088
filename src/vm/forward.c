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

/* Takes the next name off a line's; NULL: there is none. The caller frees it. */
static char *line_next_name(struct line *line) {
    size_t length = 0;
    if (!line->length)
        return NULL;
    while (length < line->length && line->names[length] != '|')
        length++;
    char *name = strndup(line->names, length);
    length += length < line->length;
    line->names += length;
    line->length -= length;
    return name;
}

int forward_check(const char *text, size_t length, bool (*is_reserved)(const char *name),
                  char **ret_why) {
    cleanup_buf struct buf why = {0};
    struct line line;
    for (size_t number = 1; length && !why.len; number++) {
        int kind = forward_next(&text, &length, &line);
        if (kind < 0)
            buf_printf(&why,
                       "line %zu of forward takes the name of a variable, or `required` and one or "
                       "several names with | between them",
                       number);
        while (kind > 0 && line.length && !why.len) {
            cleanup_free char *name = line_next_name(&line);
            if (name && is_reserved(name))
                buf_printf(&why,
                           "line %zu of forward: the guest's shells keep the name %s for "
                           "themselves, and setting it would end them",
                           number, name);
        }
    }
    if (!why.len)
        return 0;
    *ret_why = buf_steal(&why, NULL);
    return -ERR_INVALID;
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

int forward_apply(const char *text, size_t length, const char *list, size_t list_length,
                  forward_set *set, void *arg) {
    struct line line;
    while (length) {
        if (forward_next(&text, &length, &line) <= 0)
            continue;
        while (line.length) {
            size_t value_length = 0;
            cleanup_free char *name = line_next_name(&line);
            const char *value =
                name ? environ_find(list, list_length, name, strlen(name), &value_length) : NULL;
            int r = !name ? -ERR_NO_MEMORY : value_length ? set(arg, name, value, value_length) : 0;
            if (r < 0)
                return r;
        }
    }
    return 0;
}

static void forward_explain(struct line line, char **ret_why) {
    cleanup_buf struct buf why = {0};
    buf_append_str(&why, "neither env/ nor the environment of the calling process has ");
    for (const char *between = ""; line.length; between = " or ") {
        cleanup_free char *name = line_next_name(&line);
        buf_printf(&why, "%s%s", between, name ? name : "?");
    }
    buf_append_str(&why, ", which `forward` requires");
    *ret_why = buf_steal(&why, NULL);
}

int forward_require(const char *text, size_t length, bool (*has)(void *arg, const char *name),
                    void *arg, char **ret_why) {
    struct line line;
    while (length) {
        if (forward_next(&text, &length, &line) <= 0 || !line.required)
            continue;
        struct line names = line;
        bool found = false;
        while (names.length && !found) {
            cleanup_free char *name = line_next_name(&names);
            found = name && has(arg, name);
        }
        if (!found) {
            forward_explain(line, ret_why);
            return -ERR_INVALID;
        }
    }
    return 0;
}
