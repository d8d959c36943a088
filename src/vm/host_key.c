#include "vm/host_key.h"

#include <stdbool.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"

/* A word of a line. */
struct word {
    const char *start;
    size_t length;
};

static struct word word_next(const char **at, const char *end) {
    const char *c = *at;
    while (c < end && (*c == ' ' || *c == '\t'))
        c++;
    struct word word = {.start = c};
    while (c < end && *c != ' ' && *c != '\t' && *c != '\r')
        c++;
    word.length = (size_t)(c - word.start);
    *at = c;
    return word;
}

static bool word_starts_with(const struct word *word, const char *text) {
    return word->length >= strlen(text) && memcmp(word->start, text, strlen(text)) == 0;
}

/* How good a type of key is; 0: it is none. */
static int host_key_rank(const struct word *type) {
    return word_starts_with(type, "ssh-ed25519")   ? 3
           : word_starts_with(type, "ecdsa-sha2-") ? 2
           : word_starts_with(type, "ssh-")        ? 1
                                                   : 0;
}

/* A blob starts with its type, as a string of RFC 4251, section 5. */
static struct word host_key_type(const char *blob, size_t length) {
    const unsigned char *b = (const unsigned char *)blob;
    if (length < 4 || b[0] || b[1] || b[2] || length - 4 < b[3])
        return (struct word){0};
    return (struct word){blob + 4, b[3]};
}

/* The key of one line; the rank of its type. */
static int host_key_parse_line(const char *line, const char *end, struct buf *ret_blob) {
    struct word type = word_next(&line, end);
    if (type.length == 0 || type.start[0] == '#' || type.start[0] == '@') /* @revoked, … */
        return 0;
    if (!host_key_rank(&type)) /* a host of known_hosts */
        type = word_next(&line, end);
    struct word key = word_next(&line, end);
    if (!host_key_rank(&type) || base64_decode(key.start, key.length, ret_blob) < 0)
        return 0;
    struct word says = host_key_type(ret_blob->data, ret_blob->len);
    bool same = says.length == type.length && memcmp(says.start, type.start, type.length) == 0;
    return same ? host_key_rank(&type) : 0;
}

int host_key_parse(const char *text, size_t length, struct buf *ret_blob, const char **ret_wrong) {
    cleanup_buf struct buf best = {0};
    const char *end = text + length;
    int best_rank = 0;
    bool ambiguous = false;
    while (text < end) {
        cleanup_buf struct buf blob = {0};
        const char *line_end = memchr(text, '\n', (size_t)(end - text));
        if (!line_end)
            line_end = end;
        int rank = host_key_parse_line(text, line_end, &blob);
        text = line_end + 1;
        if (rank == 0 || rank < best_rank)
            continue;
        bool same = best.len == blob.len && memcmp(best.data, blob.data, blob.len) == 0;
        ambiguous = rank == best_rank && (ambiguous || !same);
        best_rank = rank;
        buf_clear(&best);
        buf_append(&best, blob.data, blob.len);
    }
    *ret_wrong =
        ambiguous ? "it holds several keys of one type: leave the one" : "it holds no public key";
    if (best_rank == 0 || ambiguous)
        return -ERR_INVALID;
    buf_append(ret_blob, best.data, best.len);
    return best.failed || ret_blob->failed ? -ERR_NO_MEMORY : 0;
}

void host_key_print(const char *blob, size_t length, struct buf *out) {
    struct word type = host_key_type(blob, length);
    buf_append(out, type.start, type.length);
    buf_append_char(out, ' ');
    base64_encode(blob, length, out);
}
