#include "guest/dotenv.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"

#define END (-1)
#define BOM "\xef\xbb\xbf"
/* As much of a name as an error shows: it has to leave room for the longest sentence. */
#define NAME_SHOWN 40

struct scan {
    const char *text;
    size_t at, end;
    bool cut; /* a NUL stands at `end`: whatever reaches it is bad */
    unsigned line;

    /* The statement at hand, once its `=` was seen. */
    const char *name;
    size_t name_length;

    struct buf value; /* of a quoted value; reused */
    struct dotenv_error *error;
};

void dotenv_format(struct buf *out, const struct env_var *vars, size_t count) {
    for (size_t i = 0; i < count; i++) {
        buf_append(out, vars[i].name, vars[i].name_length);
        buf_append_char(out, '=');
        env_quote(out, vars[i].value, vars[i].length);
        buf_append_char(out, '\n');
    }
}

/* --- Errors --- */

static bool is_at_nul(const struct scan *s) {
    return s->cut && s->at == s->end;
}

/* `what` is a constant: nothing of the text but the name gets into an error. What ran into a NUL is
 * bad for that reason, whatever it lacks. */
static int fail(struct scan *s, const char *what) {
    if (is_at_nul(s))
        what = "a NUL byte, which no variable can hold: write text only";
    *s->error = (struct dotenv_error){.line = s->line};
    if (s->name)
        snprintf(s->error->text, sizeof s->error->text, "%.*s%s: %s",
                 (int)(s->name_length < NAME_SHOWN ? s->name_length : NAME_SHOWN), s->name,
                 s->name_length > NAME_SHOWN ? "..." : "", what);
    else
        snprintf(s->error->text, sizeof s->error->text, "%s", what);
    return -ERR_INVALID;
}

/* The text ended too early. */
static int fail_incomplete(struct scan *s, const char *what) {
    int status = fail(s, what);
    s->error->incomplete = !s->cut;
    return status;
}

/* --- Characters --- */

static int peek(const struct scan *s) {
    return s->at < s->end ? (unsigned char)s->text[s->at] : END;
}

static bool is_blank(int c) {
    return c == ' ' || c == '\t';
}

static bool is_name_start(int c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

static bool is_name_char(int c) {
    return is_name_start(c) || (c >= '0' && c <= '9');
}

static void blanks_skip(struct scan *s) {
    while (is_blank(peek(s)))
        s->at++;
}

/* LF, CR LF, the end, or a CR at the end. */
static bool is_line_end(const struct scan *s) {
    size_t at = s->at;
    if (at < s->end && s->text[at] == '\r')
        at++;
    return at == s->end || s->text[at] == '\n';
}

/* The end of the line at hand: its LF, or the end of the text. */
static size_t line_end(const struct scan *s) {
    const char *newline = s->at < s->end ? memchr(s->text + s->at, '\n', s->end - s->at) : NULL;
    return newline ? (size_t)(newline - s->text) : s->end;
}

/* Whether a `$` or a backquote is at `at` that sh would expand. A backslash and a newline behind
 * the
 * `$` vanish first, as in sh: "$\<newline>HOME" is an expansion. */
static bool is_expansion(const char *text, size_t at, size_t end) {
    if (text[at] == '`')
        return true;
    if (text[at] != '$')
        return false;
    at++;
    while (end - at >= 2 && text[at] == '\\' && text[at + 1] == '\n')
        at += 2;
    return at < end &&
           (is_name_start((unsigned char)text[at]) || text[at] == '{' || text[at] == '(');
}

static int fail_expansion(struct scan *s) {
    if (peek(s) == '`')
        return fail(s, "a backquote runs no command here: use single quotes for a literal `, "
                       "or \\` in double quotes");
    return fail(s, "$ is not expanded here: use single quotes for a literal $, "
                   "or \\$ in double quotes");
}

/* --- Values: each function starts at the value's first character --- */

/* `at` is behind the opening quote, then behind the closing one. */
static int single_quotes_read(struct scan *s) {
    const char *from = s->text + s->at;
    const char *close = s->at < s->end ? memchr(from, '\'', s->end - s->at) : NULL;
    if (!close) {
        s->at = s->end;
        return fail_incomplete(s, "a single quote is not closed: add the closing one, "
                                  "and write '\\'' for a quote inside of '...'");
    }
    buf_append(&s->value, from, (size_t)(close - from));
    s->at += (size_t)(close - from) + 1;
    return 0;
}

/* `at` is behind a backslash in double quotes. */
static void double_quotes_escape(struct scan *s, char c) {
    static const char from[] = "\"\\$`nrt", to[] = "\"\\$`\n\r\t";
    const char *known = strchr(from, c);
    if (c == '\n')
        return;
    if (!known)
        buf_append_char(&s->value, '\\');
    buf_append_char(&s->value, known ? to[known - from] : c);
}

/* As single_quotes_read. */
static int double_quotes_read(struct scan *s) {
    while (s->at < s->end) {
        char c = s->text[s->at];
        if (is_expansion(s->text, s->at, s->end))
            return fail_expansion(s);
        s->at++;
        if (c == '"')
            return 0;
        if (c != '\\')
            buf_append_char(&s->value, c);
        else if (s->at < s->end)
            double_quotes_escape(s, s->text[s->at++]);
    }
    return fail_incomplete(s, "a double quote is not closed: add the closing one, "
                              "and write \\\" for a quote inside of \"...\"");
}

/* `at` is behind a backslash outside of quotes. */
static int backslash_read(struct scan *s) {
    int c = peek(s);
    if (c == END)
        return fail_incomplete(s, "the text ends behind a backslash: add the character it quotes");
    s->at++;
    if (c != '\n')
        buf_append_char(&s->value, (char)c);
    return 0;
}

/* To the end of the word: where sh ends it, so that A='x';B='y' is refused and not misread. */
static int word_read(struct scan *s) {
    int status = 0;
    buf_clear(&s->value);
    while (status == 0 && !is_line_end(s) && !strchr(" \t;&|<>()", s->text[s->at])) {
        if (is_expansion(s->text, s->at, s->end))
            return fail_expansion(s);
        char c = s->text[s->at++];
        if (c == '\'')
            status = single_quotes_read(s);
        else if (c == '"')
            status = double_quotes_read(s);
        else if (c == '\\')
            status = backslash_read(s);
        else
            buf_append_char(&s->value, c);
    }
    return status;
}

static int quoted_read(struct scan *s, struct env_var *ret_var) {
    int status = word_read(s);
    if (status < 0)
        return status;
    /* No `#` is at hand before the blanks: it would have been one of the word. */
    blanks_skip(s);
    if (peek(s) != '#' && !is_line_end(s))
        return fail(s, "text after the closing quote: only a # comment may stand there, "
                       "and one variable a line");
    s->at = line_end(s);
    buf_append(&s->value, "", 0); /* never NULL */
    ret_var->value = s->value.data;
    ret_var->length = s->value.len;
    return s->value.failed;
}

/* Also the empty value. No backslash escapes anything here, so also \$a is an error: sh, and one
 * dotenv dialect or the other, would each read it differently. */
static int bare_read(struct scan *s, struct env_var *ret_var) {
    size_t start = s->at, end = line_end(s), comment = start;
    s->at = end;
    if (end > start && s->text[end - 1] == '\r')
        end--;
    while (comment < end &&
           !(is_blank(s->text[comment]) && comment + 1 < end && s->text[comment + 1] == '#'))
        comment++;
    end = comment;
    while (end > start && is_blank(s->text[end - 1]))
        end--;
    if (end > start && is_blank(s->text[start]))
        return fail(s, "no blanks around =: write KEY='value'");
    for (size_t i = start; i < end; i++) {
        if (!is_expansion(s->text, i, end))
            continue;
        s->at = i;
        return fail_expansion(s);
    }
    ret_var->value = s->text + start;
    ret_var->length = end - start;
    return 0;
}

/* --- Statements --- */

/* A line without a proper `NAME=`. Its words are not shown: it may be a line of a value that lacks
 * its quotes, say of a private key. */
static int fail_name(struct scan *s, bool is_export) {
    size_t name_at = s->at;
    while (is_name_char(peek(s)))
        s->at++;
    size_t name_end = s->at;
    bool is_name = env_name_is_valid(s->text + name_at, name_end - name_at);
    bool in_name = s->at == s->end && !s->cut && (is_name || name_at == name_end);
    blanks_skip(s);
    if (is_name && peek(s) == '=') {
        s->name = s->text + name_at;
        s->name_length = name_end - name_at;
        return fail(s, "no blanks around =: write KEY='value'");
    }
    if (is_name && is_export && (is_line_end(s) || (peek(s) == '#' && s->at > name_end))) {
        s->name = s->text + name_at;
        s->name_length = name_end - name_at;
        int status = fail(s, "no value: write export KEY='value'");
        s->error->in_name = in_name;
        return status;
    }
    s->at = name_at;
    bool has_equals = memchr(s->text + s->at, '=', line_end(s) - s->at);
    s->at = line_end(s);
    if (has_equals)
        return fail(s, "bad name before =: only letters, digits and _, no digit first, "
                       "at most 255 bytes");
    int status = fail(s, "no = in this line: write KEY='value', quoted if it has several lines, "
                         "or # before a comment");
    s->error->in_name = in_name;
    return status;
}

/* Goes behind the `=`, with the name noted. */
static int name_read(struct scan *s) {
    static const char keyword[] = "export";
    const size_t keyword_length = sizeof keyword - 1;
    bool is_export = s->end - s->at > keyword_length &&
                     !memcmp(s->text + s->at, keyword, keyword_length) &&
                     is_blank(s->text[s->at + keyword_length]);
    size_t start = s->at;
    if (is_export) {
        s->at += keyword_length;
        blanks_skip(s);
        if (peek(s) == '=') {
            s->at = start; /* `export = x` is about a variable of this name */
            is_export = false;
        }
    }
    size_t name_at = s->at;
    while (is_name_char(peek(s)))
        s->at++;
    size_t name_length = s->at - name_at;
    if (peek(s) != '=' || !env_name_is_valid(s->text + name_at, name_length)) {
        s->at = name_at;
        return fail_name(s, is_export);
    }
    s->at++;
    s->name = s->text + name_at;
    s->name_length = name_length;
    return 0;
}

/* `set -a` and `set +a`, as they are printed (DOTENV_BEGIN, DOTENV_END) and as people write them
 * around such files. */
static bool is_set_line(const struct scan *s) {
    size_t end = line_end(s);
    while (end > s->at && (is_blank(s->text[end - 1]) || s->text[end - 1] == '\r'))
        end--;
    return end - s->at == 6 &&
           (!memcmp(s->text + s->at, "set -a", 6) || !memcmp(s->text + s->at, "set +a", 6));
}

/* Goes to the end of the statement's last line, not behind it. */
static int statement_read(struct scan *s, dotenv_var *on_var, void *arg) {
    blanks_skip(s);
    if (peek(s) == '#' || is_line_end(s) || is_set_line(s)) {
        s->at = line_end(s);
        return is_at_nul(s) ? fail(s, NULL) : 0;
    }
    int status = name_read(s);
    if (status < 0)
        return status;
    struct env_var var = {.name = s->name, .name_length = s->name_length};
    bool is_quoted = peek(s) == '\'' || peek(s) == '"';
    status = is_quoted ? quoted_read(s, &var) : bare_read(s, &var);
    if (status < 0)
        return status;
    if (is_at_nul(s))
        return fail(s, NULL);
    return on_var(arg, &var);
}

static unsigned lines_count(const char *text, size_t length) {
    unsigned count = 0;
    for (const char *newline; length && (newline = memchr(text, '\n', length)); count++) {
        length -= (size_t)(newline - text) + 1;
        text = newline + 1;
    }
    return count;
}

int dotenv_parse(const char *text, size_t length, dotenv_var *on_var, void *arg,
                 struct dotenv_error *ret_error) {
    const char *nul = length ? memchr(text, '\0', length) : NULL;
    struct scan s = {.text = text, .end = length, .cut = nul, .line = 1, .error = ret_error};
    if (nul)
        s.end = (size_t)(nul - text);
    if (s.end >= strlen(BOM) && !memcmp(text, BOM, strlen(BOM)))
        s.at = strlen(BOM);
    int status = 0;
    /* With `cut`, the NUL may be all that its line has. */
    while (status >= 0 && (s.at < s.end || s.cut)) {
        size_t start = s.at;
        s.name = NULL;
        status = statement_read(&s, on_var, arg);
        if (s.at < s.end)
            s.at++; /* the LF */
        if (status >= 0)
            s.line += lines_count(text + start, s.at - start);
    }
    buf_free(&s.value);
    return status < 0 ? status : 0;
}
