#include "guest/env_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "guest/sh_scan.h"
#include "util/cleanup.h"

/* Two readers of the same text. This one takes a line that is nothing but plain exports. What it
 * refuses goes to sh_line_skip, which looks for its end; where that gives up, all text from there
 * on is foreign. */

static const char *const header_lines[] = {"#!/bin/sh", "# Environment variables managed by vmsfs"};

#define NAME_MOST 255

bool env_name_is_valid(const char *name, size_t length) {
    return length <= NAME_MOST && sh_is_name(name, length);
}

/* --- Lines of exports --- */

struct sink {
    env_file_var *on_var;
    void *arg;
    struct buf value;
    int status;
};

static void put(struct sink *sink, int c) {
    if (sink)
        buf_append_char(&sink->value, (char)c);
}

/* `$` before these stands for itself: what POSIX leaves open (2.6), and dash, bash, busybox, zsh
 * and ksh agree on. Every other `$` is an expansion, or is one somewhere. */
static bool dollar_is_literal(struct sh_scan *s, bool quoted) {
    int c = sh_peek(s);
    if (quoted)
        return sh_is_one_of(c, "\" \t\n%,./:;");
    return c == SH_EOF || sh_is_one_of(c, " \t\n;%,./:");
}

static bool value_in_double_quotes(struct sh_scan *s, struct sink *sink) {
    for (;;) {
        int c = sh_peek(s);
        if (c == SH_EOF || c == '`')
            return false;
        s->at++;
        if (c == '"')
            return true;
        if (c == '$' && !dollar_is_literal(s, true))
            return false;
        if (c == '\\' && s->at < s->end && sh_is_one_of((unsigned char)s->text[s->at], "$`\"\\"))
            c = (unsigned char)s->text[s->at++];
        put(sink, c);
    }
}

/* Reads a word's value up to the blank, newline, `;` or end behind it. Globs stand for themselves
 * in an assignment of `export` (in dash since 0.5.11), but bash splits `{a,b}` and `{1..3}`, and a
 * leading tilde is expanded, also behind `:`, in zsh also behind `""`: false. */
static bool value_read(struct sh_scan *s, struct sink *sink) {
    int before = '=', braces = 0;
    for (;;) {
        int c = sh_peek(s);
        if (c == SH_EOF || sh_is_one_of(c, " \t\n;"))
            return true;
        if (sh_is_one_of(c, "&|<>()`") || (c == '~' && sh_is_one_of(before, "=:\"")))
            return false;
        s->at++;
        size_t start = s->at;
        before = '"';
        if (c == '\'') {
            if (!sh_single_quotes_skip(s))
                return false;
            if (sink)
                buf_append(&sink->value, s->text + start, s->at - start - 1);
        } else if (c == '"') {
            if (!value_in_double_quotes(s, sink))
                return false;
        } else if (c == '\\') {
            /* A backslash as the very last byte: itself for dash, nothing for zsh. */
            if (s->at == s->end)
                return false;
            put(sink, (unsigned char)s->text[s->at++]);
        } else {
            before = c;
            if (c == '{' && !braces)
                braces = 1;
            else if ((c == ',' || c == '.') && braces == 1)
                braces = 2;
            if ((c == '}' && braces == 2) || (c == '$' && !dollar_is_literal(s, false)))
                return false;
            put(sink, c);
        }
    }
}

static bool assignment_read(struct sh_scan *s, struct sink *sink) {
    char name[NAME_MOST];
    size_t length = 0;
    int c;
    while (c = sh_peek(s), sh_is_name_char(c)) {
        if (length == sizeof name)
            return false;
        name[length++] = (char)c;
        s->at++;
    }
    if (c != '=' || !env_name_is_valid(name, length))
        return false;
    s->at++;

    if (sink)
        buf_clear(&sink->value);
    if (!value_read(s, sink))
        return false;
    if (!sink || sink->status < 0)
        return true;
    struct env_var var = {name, length, sink->value.data ? sink->value.data : "", sink->value.len};
    sink->status = sink->value.failed ? sink->value.failed : sink->on_var(sink->arg, &var);
    return true;
}

static bool export_read(struct sh_scan *s, struct sink *sink) {
    for (const char *word = "export"; *word; word++, s->at++)
        if (sh_peek(s) != *word)
            return false;
    if (!sh_is_one_of(sh_peek(s), " \t"))
        return false;
    sh_blanks_skip(s);
    do {
        if (!assignment_read(s, sink))
            return false;
        sh_blanks_skip(s);
    } while (sh_is_name_char(sh_peek(s)));
    return true;
}

/* Reads one line of exports and goes behind its newline; false when it is anything else. Without a
 * sink it only looks. A comment at its end is returned as [*ret_comment, *ret_comment_end). */
static bool exports_read(struct sh_scan *s, struct sink *sink, size_t *ret_comment,
                         size_t *ret_comment_end) {
    bool more;
    sh_blanks_skip(s);
    do {
        if (!export_read(s, sink))
            return false;
        more = sh_peek(s) == ';';
        if (more) {
            s->at++;
            sh_blanks_skip(s);
            more = sh_peek(s) == 'e';
        }
    } while (more);

    *ret_comment = s->at;
    if (sh_peek(s) == '#')
        sh_comment_skip(s);
    *ret_comment_end = s->at;
    if (s->at == s->end)
        return !s->cut;
    return s->text[s->at++] == '\n';
}

/* --- The file --- */

void env_quote(struct buf *out, const char *data, size_t length) {
    buf_append_char(out, '\'');
    for (const char *quote; length && (quote = memchr(data, '\'', length));) {
        buf_append(out, data, (size_t)(quote - data));
        buf_append_str(out, "'\\''");
        length -= (size_t)(quote - data) + 1;
        data = quote + 1;
    }
    buf_append(out, data, length);
    buf_append_char(out, '\'');
}

static void append_lines(struct buf *out, const char *lines, size_t length) {
    buf_append(out, lines, length);
    if (length && lines[length - 1] != '\n')
        buf_append_char(out, '\n');
}

static void append_export(struct buf *out, const struct env_var *var) {
    buf_append_str(out, "export ");
    buf_append(out, var->name, var->name_length);
    buf_append_char(out, '=');
    env_quote(out, var->value, var->length);
    buf_append_char(out, '\n');
}

static int name_compare(const void *key, const void *element) {
    const struct env_var *a = key, *b = element;
    size_t shorter = a->name_length < b->name_length ? a->name_length : b->name_length;
    int order = memcmp(a->name, b->name, shorter);
    return order ? order : (a->name_length > shorter) - (b->name_length > shorter);
}

/* Is this word of a line of others one that runs, or names, what cannot be read there? */
static bool word_hides_names(const char *word, size_t length, const char *rest, const char *end) {
    static const struct {
        const char *word;
        bool of_expansion;
    } words[] = {
        {".", false}, {"source", false}, {"eval", false}, {"export", true}, {"unset", true}};
    while (rest < end && sh_is_one_of((unsigned char)*rest, " \t\""))
        rest++;
    bool expansion = rest < end && (*rest == '$' || *rest == '`');
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (length == strlen(words[i].word) && !memcmp(word, words[i].word, length))
            return expansion || !words[i].of_expansion;
    return false;
}

/* Marks the variables that are named as a word in lines of others. Quotes, backslashes and
 * continued lines within a word are nothing to the shell, nor are they here. */
static void named_mark(bool *named, const struct env_var *vars, size_t count, const char *lines,
                       size_t length) {
    char word[NAME_MOST];
    size_t n = 0;
    for (size_t i = 0; count && i <= length; i++) {
        char c = i < length ? lines[i] : '\n';
        if (sh_is_name_char((unsigned char)c) || c == '.') { /* `.` is a command */
            if (n < sizeof word)
                word[n] = c;
            n++;
        } else if (sh_is_one_of((unsigned char)c, "'\"\\")) {
            i += c == '\\' && i + 1 < length && lines[i + 1] == '\n';
        } else if (n) {
            if (n <= sizeof word) {
                struct env_var key = {.name = word, .name_length = n};
                const struct env_var *var = bsearch(&key, vars, count, sizeof *vars, name_compare);
                if (var)
                    named[var - vars] = true;
                if (word_hides_names(word, n, lines + i, lines + length))
                    memset(named, true, count);
            }
            n = 0;
        }
    }
}

void env_file_format(struct buf *out, const struct env_var *vars, size_t count, const char *kept,
                     size_t kept_length) {
    cleanup_free bool *named = calloc(count + 1, sizeof *named);
    if (!named) {
        out->failed = -ENOMEM;
        return;
    }
    for (size_t i = 0; i < sizeof header_lines / sizeof *header_lines; i++) {
        buf_append_str(out, header_lines[i]);
        buf_append_char(out, '\n');
    }
    for (size_t i = 0; i < count; i++)
        append_export(out, &vars[i]);
    /* What is left open at the end of `kept` would swallow what follows: it goes behind all. */
    struct sh_scan s;
    size_t complete = 0;
    for (sh_scan_init(&s, kept, kept_length); s.at < kept_length && sh_line_skip(&s);)
        complete = s.at;
    append_lines(out, kept, complete);
    named_mark(named, vars, count, kept, complete);
    for (size_t i = 0; i < count; i++)
        if (named[i])
            append_export(out, &vars[i]);
    if (complete < kept_length)
        buf_append(out, kept + complete, kept_length - complete);
}

static void keep(struct buf *kept, const char *line, size_t length) {
    size_t bare = length - (length && line[length - 1] == '\n');
    for (size_t i = 0; i < sizeof header_lines / sizeof *header_lines; i++)
        if (bare == strlen(header_lines[i]) && !memcmp(line, header_lines[i], bare))
            return;
    append_lines(kept, line, length);
}

int env_file_parse(const char *text, size_t length, env_file_var *on_var, void *arg,
                   struct buf *kept) {
    struct sink sink = {.on_var = on_var, .arg = arg};
    struct sh_scan s;
    sh_scan_init(&s, text, length);
    while (s.at < length && sink.status >= 0) {
        size_t start = s.at, comment, comment_end;
        if (exports_read(&s, NULL, &comment, &comment_end)) {
            s.at = start;
            exports_read(&s, &sink, &comment, &comment_end);
            keep(kept, text + comment, comment_end - comment);
            continue;
        }
        s.at = start;
        if (sh_line_skip(&s)) {
            keep(kept, text + start, s.at - start);
        } else {
            buf_append(kept, text + start, length - start);
            break;
        }
    }
    buf_free(&sink.value);
    if (sink.status < 0)
        return sink.status;
    return kept->failed;
}
