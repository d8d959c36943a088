#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "guest/dotenv.h"
#include "util/cleanup.h"
#include "util/errors.h"

/* Any bytes are read. Variables that were read are written, read again and must be the same; an
 * error must be about a line that exists and show nothing but a name; behind another statement
 * everything must be as before, two lines later. The same bytes taken as values must survive. */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define BEFORE "_='\n'\n"
#define BEFORE_READ "_\0\n"
#define BOM "\xef\xbb\xbf"
#define SENTENCES_MOST 16

struct reading {
    struct buf strings; /* name NUL value NUL … */
    size_t count;
    int status;
    struct dotenv_error error;
};

static void require(bool condition) {
    if (!condition)
        abort();
}

static bool same(const struct buf *a, const struct buf *b) {
    return a->len == b->len && (!a->len || !memcmp(a->data, b->data, a->len));
}

static void add(struct reading *r, const struct env_var *var) {
    buf_append(&r->strings, var->name, var->name_length);
    buf_append_char(&r->strings, '\0');
    buf_append(&r->strings, var->value, var->length);
    buf_append_char(&r->strings, '\0');
    r->count++;
}

static int gather(void *arg, const struct env_var *var) {
    require(env_name_is_valid(var->name, var->name_length));
    require(!memchr(var->value, '\0', var->length));
    add(arg, var);
    return 0;
}

static void parse(struct reading *r, const char *text, size_t length) {
    r->status = dotenv_parse(text, length, gather, r, &r->error);
    require(r->status == 0 || r->status == -ERR_INVALID);
}

static void written(struct buf *text, const struct reading *r) {
    cleanup_free struct env_var *vars = calloc(r->count + 1, sizeof *vars);
    const char *at = r->strings.data;
    for (size_t i = 0; i < r->count; i++) {
        vars[i].name = at;
        vars[i].name_length = strlen(at);
        vars[i].value = at += vars[i].name_length + 1;
        vars[i].length = strlen(at);
        at += vars[i].length + 1;
    }
    dotenv_format(text, vars, r->count);
}

/* What was gathered, by reading or otherwise, is the same after being written. */
static void written_and_read_again(const struct reading *r) {
    struct reading second = {0};
    cleanup_buf struct buf text = {0};
    written(&text, r);
    parse(&second, text.data, text.len);
    require(second.status == 0 && second.count == r->count && same(&r->strings, &second.strings));
    buf_free(&second.strings);
}

/* All sentences that ever came behind a name, or without one: that there are only so many of them
 * is how we know that no part of a value is in them. */
static void sentence_is_one_of_few(const char *sentence) {
    static char *known[SENTENCES_MOST];
    size_t i = 0;
    while (i < SENTENCES_MOST && known[i] && strcmp(known[i], sentence))
        i++;
    require(i < SENTENCES_MOST);
    if (!known[i])
        known[i] = strdup(sentence);
}

static void error_is_sound(const struct dotenv_error *error, const char *text, size_t length) {
    const char *line = text, *end = text + length;
    for (unsigned i = 1; i < error->line; i++) {
        line = memchr(line, '\n', (size_t)(end - line));
        require(line++);
    }
    const char *newline = line < end ? memchr(line, '\n', (size_t)(end - line)) : NULL;
    require(!error->incomplete || !error->in_name);
    require(!error->in_name || !newline);
    require(!(error->incomplete || error->in_name) || !length || !memchr(text, '\0', length));
    require(strlen(error->text) < sizeof error->text - 1);
    for (const char *c = error->text; *c; c++)
        require(*c >= ' ' && *c <= '~');

    size_t name = strspn(error->text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_"
                                      "0123456789");
    size_t behind = strncmp(error->text + name, "...", 3) ? name : name + 3;
    bool has_name = name && error->text[behind] == ':';
    require(!has_name || memmem(line, (size_t)(end - line), error->text, name));
    sentence_is_one_of_few(error->text + (has_name ? behind : 0));
}

static void behind_a_statement(const struct reading *r, const char *text, size_t length) {
    struct reading later = {0};
    cleanup_buf struct buf longer = {0}, strings = {0};
    if (length >= strlen(BOM) && !memcmp(text, BOM, strlen(BOM)))
        return;
    buf_append_str(&longer, BEFORE);
    buf_append(&longer, text, length);
    buf_append(&strings, BEFORE_READ, sizeof BEFORE_READ);
    buf_append(&strings, r->strings.data, r->strings.len);
    parse(&later, longer.data, longer.len);
    require(later.status == r->status && same(&later.strings, &strings));
    if (r->status < 0)
        require(later.error.line == r->error.line + 2 && !strcmp(later.error.text, r->error.text) &&
                later.error.incomplete == r->error.incomplete &&
                later.error.in_name == r->error.in_name);
    buf_free(&later.strings);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct reading first = {0}, values = {0};
    const char *text = (const char *)data;
    parse(&first, text, size);
    if (first.status < 0)
        error_is_sound(&first.error, text, size);
    written_and_read_again(&first);
    behind_a_statement(&first, text, size);

    for (size_t at = 0; at < size; at++) {
        size_t length = strnlen(text + at, size - at);
        add(&values, &(struct env_var){"V", 1, text + at, length});
        at += length;
    }
    written_and_read_again(&values);

    buf_free(&first.strings);
    buf_free(&values.strings);
    return 0;
}
