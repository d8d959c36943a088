#include "guest/env_file.h"

#include <errno.h>
#include <string.h>

#include "util/cleanup.h"

/* Two readers of the same text. The first takes a line that is nothing but plain exports. What it
 * refuses goes to the second, which only looks for the end of a complete command in the sense of
 * POSIX.1-2017, Shell Command Language, 2.10.2, so that no line of a here-document, a quoted value
 * or a compound command is mistaken for a command of its own. Where that grammar ends (syntax
 * errors, `[[`, arrays, and whatever dash, bash and busybox ash do not read alike) it gives up, and
 * all text from there on is foreign. */

static const char *const header_lines[] = {"#!/bin/sh", "# Environment variables managed by vmsfs"};

#define NAME_MOST 255
#define PENDING_MOST 4
#define DEPTH_MOST 50
#define SCAN_END (-1)

enum token {
    TOKEN_BAD,
    TOKEN_END,
    TOKEN_NEWLINE, /* and the here-documents that were waiting for it */
    TOKEN_WORD,
    TOKEN_REDIRECT,
    TOKEN_HEREDOC,
    TOKEN_HEREDOC_TABS,
    TOKEN_SEMICOLON,
    TOKEN_CASE_END,
    TOKEN_AMPERSAND,
    TOKEN_AND,
    TOKEN_PIPE,
    TOKEN_OR,
    TOKEN_OPEN,
    TOKEN_CLOSE,
};

struct heredoc {
    const char *delimiter; /* within the text */
    size_t length;
    bool quoted, tabs;
};

struct scan {
    const char *text;
    size_t at, end;
    bool cut; /* the text goes on behind `end`, with a NUL, which no two shells take alike */

    /* The newest token; `at` is right behind it. */
    enum token token;
    size_t token_at, token_length;
    bool token_plain;  /* a word without quotes, expansions and continued lines */
    bool token_joined; /* a word that goes on after a backslash and newline */

    struct heredoc pending[PENDING_MOST];
    unsigned pending_count;
    unsigned depth;
};

static void scan_init(struct scan *s, const char *text, size_t length) {
    const char *nul = length ? memchr(text, '\0', length) : NULL;
    *s = (struct scan){.text = text, .end = length, .cut = nul != NULL};
    if (nul)
        s->end = (size_t)(nul - text);
}

/* The byte at hand, behind any continued lines (2.2.1: backslash and newline are removed before the
 * text is split into tokens, but not in single quotes, comments and quoted here-documents). */
static int scan_peek(struct scan *s) {
    while (s->end - s->at >= 2 && s->text[s->at] == '\\' && s->text[s->at + 1] == '\n')
        s->at += 2;
    return s->at < s->end ? (unsigned char)s->text[s->at] : SCAN_END;
}

static bool is_one_of(int c, const char *set) {
    return c > 0 && strchr(set, c);
}

static void blanks_skip(struct scan *s) {
    while (is_one_of(scan_peek(s), " \t"))
        s->at++;
}

/* To the newline or the end; no line is continued inside a comment. */
static void comment_skip(struct scan *s) {
    const char *newline = memchr(s->text + s->at, '\n', s->end - s->at);
    s->at = newline ? (size_t)(newline - s->text) : s->end;
}

/* Goes behind the closing quote; `at` is behind the opening one. */
static bool single_quotes_skip(struct scan *s) {
    const char *close = s->at < s->end ? memchr(s->text + s->at, '\'', s->end - s->at) : NULL;
    if (close)
        s->at = (size_t)(close - s->text) + 1;
    return close;
}

static bool is_name_char(int c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

bool env_name_is_valid(const char *name, size_t length) {
    if (length < 1 || length > NAME_MOST || (name[0] >= '0' && name[0] <= '9'))
        return false;
    for (size_t i = 0; i < length; i++)
        if (!is_name_char((unsigned char)name[i]))
            return false;
    return true;
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
static bool dollar_is_literal(struct scan *s, bool quoted) {
    int c = scan_peek(s);
    if (quoted)
        return is_one_of(c, "\" \t\n%,./:;");
    return c == SCAN_END || is_one_of(c, " \t\n;%,./:");
}

static bool value_in_double_quotes(struct scan *s, struct sink *sink) {
    for (;;) {
        int c = scan_peek(s);
        if (c == SCAN_END || c == '`')
            return false;
        s->at++;
        if (c == '"')
            return true;
        if (c == '$' && !dollar_is_literal(s, true))
            return false;
        if (c == '\\' && s->at < s->end && is_one_of((unsigned char)s->text[s->at], "$`\"\\"))
            c = (unsigned char)s->text[s->at++];
        put(sink, c);
    }
}

/* Reads a word's value up to the blank, newline, `;` or end behind it. Globs stand for themselves
 * in an assignment of `export` (in dash since 0.5.11), but bash splits `{a,b}` and `{1..3}`, and a
 * leading tilde is expanded, also behind `:`, in zsh also behind `""`: false. */
static bool value_read(struct scan *s, struct sink *sink) {
    int before = '=', braces = 0;
    for (;;) {
        int c = scan_peek(s);
        if (c == SCAN_END || is_one_of(c, " \t\n;"))
            return true;
        if (is_one_of(c, "&|<>()`") || (c == '~' && is_one_of(before, "=:\"")))
            return false;
        s->at++;
        size_t start = s->at;
        before = '"';
        if (c == '\'') {
            if (!single_quotes_skip(s))
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

static bool assignment_read(struct scan *s, struct sink *sink) {
    char name[NAME_MOST];
    size_t length = 0;
    int c;
    while (c = scan_peek(s), is_name_char(c)) {
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

static bool export_read(struct scan *s, struct sink *sink) {
    for (const char *word = "export"; *word; word++, s->at++)
        if (scan_peek(s) != *word)
            return false;
    if (!is_one_of(scan_peek(s), " \t"))
        return false;
    blanks_skip(s);
    do {
        if (!assignment_read(s, sink))
            return false;
        blanks_skip(s);
    } while (is_name_char(scan_peek(s)));
    return true;
}

/* Reads one line of exports and goes behind its newline; false when it is anything else. Without a
 * sink it only looks. A comment at its end is returned as [*ret_comment, *ret_comment_end). */
static bool exports_read(struct scan *s, struct sink *sink, size_t *ret_comment,
                         size_t *ret_comment_end) {
    bool more;
    blanks_skip(s);
    do {
        if (!export_read(s, sink))
            return false;
        more = scan_peek(s) == ';';
        if (more) {
            s->at++;
            blanks_skip(s);
            more = scan_peek(s) == 'e';
        }
    } while (more);

    *ret_comment = s->at;
    if (scan_peek(s) == '#')
        comment_skip(s);
    *ret_comment_end = s->at;
    if (s->at == s->end)
        return !s->cut;
    return s->text[s->at++] == '\n';
}

/* --- Lines of others: tokens (2.3) --- */

static void token_next(struct scan *s);
static bool list_skip(struct scan *s, bool may_be_empty);
static bool dollar_skip(struct scan *s, bool quoted);

/* To the next backquote that is not escaped. A quote that is left open inside is read differently.
 */
static bool backquotes_skip(struct scan *s) {
    bool single_open = false, double_open = false;
    for (; s->at < s->end && s->text[s->at] != '\n'; s->at++) {
        char c = s->text[s->at];
        if (c == '`') {
            s->at++;
            return !single_open && !double_open;
        }
        if (c == '\\' && s->at + 1 < s->end && s->text[s->at + 1] != '\n')
            s->at++;
        else if (c == '\\' || (c == '<' && s->at + 1 < s->end && s->text[s->at + 1] == '<'))
            return false;
        single_open ^= c == '\'';
        double_open ^= c == '"';
    }
    return false;
}

static bool double_quotes_skip(struct scan *s) {
    int c;
    while ((c = scan_peek(s)) != SCAN_END) {
        s->at++;
        if (c == '"')
            return true;
        if (c == '\\' && s->at < s->end)
            s->at++;
        else if ((c == '`' && !backquotes_skip(s)) || (c == '$' && !dollar_skip(s, true)))
            return false;
    }
    return false;
}

/* ${…}: quotes inside have a history of their own in every shell, and are not looked into. */
static bool parameter_skip(struct scan *s) {
    int c = scan_peek(s);
    if (!is_name_char(c) && !is_one_of(c, "@*#?$!-"))
        return false;
    while ((c = scan_peek(s)) != SCAN_END && !is_one_of(c, "\n'\"\\`<>(){")) {
        s->at++;
        if (c == '}')
            return true;
        if (c == '$' && !dollar_skip(s, false))
            return false;
    }
    return false;
}

/* $((…)): only what cannot be a subshell inside a command substitution. */
static bool arithmetic_skip(struct scan *s) {
    unsigned open = 0;
    for (int c; (c = scan_peek(s)), is_name_char(c) || is_one_of(c, "$() \t+-*/%<>=!&|^~?:,");) {
        s->at++;
        if (c == '(')
            open++;
        else if (c == ')' && open)
            open--;
        else if (c == ')')
            return scan_peek(s) == ')' && s->at++ < s->end;
        else if (c == '$' && scan_peek(s) == '(')
            return false;
        else if (c == '$' && !dollar_skip(s, false))
            return false;
    }
    return false;
}

static bool command_substitution_skip(struct scan *s) {
    if (s->pending_count)
        return false;
    token_next(s);
    return list_skip(s, true) && s->token == TOKEN_CLOSE && !s->pending_count;
}

/* `at` is behind the `$`. */
static bool dollar_skip(struct scan *s, bool quoted) {
    int c = scan_peek(s);
    if (c == '[' || (c == '\'' && !quoted))
        return false; /* bash's old arithmetic, and $'…' */
    if (c != '(' && c != '{')
        return true;
    if (s->depth >= DEPTH_MOST)
        return false;
    s->depth++;
    s->at++;
    bool ok;
    if (c == '{')
        ok = parameter_skip(s);
    else if (scan_peek(s) == '(' && s->at++ < s->end)
        ok = arithmetic_skip(s);
    else
        ok = command_substitution_skip(s);
    s->depth--;
    return ok;
}

static bool word_skip(struct scan *s) {
    bool plain = true, joined = false, ok = true;
    size_t start = s->at;
    while (ok) {
        size_t before = s->at;
        int c = scan_peek(s);
        joined |= s->at != before;
        if (c == SCAN_END || is_one_of(c, " \t\n;&|<>()"))
            break;
        s->at++;
        plain &= !is_one_of(c, "'\"\\`$");
        if (c == '\'')
            ok = single_quotes_skip(s);
        else if (c == '"')
            ok = double_quotes_skip(s);
        else if (c == '`')
            ok = backquotes_skip(s);
        else if (c == '$')
            ok = dollar_skip(s, false);
        else if (c == '\\' && (ok = s->at < s->end))
            s->at++;
    }
    /* Only now: a command substitution inside the word has had tokens of its own. */
    s->token = TOKEN_WORD;
    s->token_at = start;
    s->token_length = s->at - start;
    s->token_plain = plain && !joined;
    s->token_joined = joined;
    return ok;
}

/* 2.7.4. In a body with expansions, dash looks for the end of an expansion before that of the
 * document, bash the other way round: no opinion on those. */
static bool heredoc_skip(struct scan *s, const struct heredoc *h) {
    while (s->at < s->end) {
        const char *line = s->text + s->at;
        const char *newline = memchr(line, '\n', s->end - s->at);
        size_t length = newline ? (size_t)(newline - line) : s->end - s->at;
        s->at += length + (newline ? 1 : 0);
        if (!newline && s->cut)
            return false;
        while (h->tabs && length && *line == '\t')
            line++, length--;
        if (length == h->length && !memcmp(line, h->delimiter, length))
            return true;
        if (h->quoted || !length)
            continue;
        if (line[length - 1] == '\\' || memchr(line, '`', length) ||
            memmem(line, length, "$(", 2) || memmem(line, length, "${", 2) ||
            memmem(line, length, "$[", 2))
            return false;
    }
    return false;
}

/* Remembers the here-document whose delimiter is the newest token. */
static bool heredoc_await(struct scan *s, bool tabs) {
    struct heredoc h = {s->text + s->token_at, s->token_length, !s->token_plain, tabs};
    if (s->token != TOKEN_WORD || s->pending_count == PENDING_MOST || s->token_joined)
        return false;
    if (h.quoted && (*h.delimiter == '\'' || *h.delimiter == '"') && h.length > 2 &&
        h.delimiter[h.length - 1] == *h.delimiter) {
        h.delimiter++;
        h.length -= 2;
    } else if (h.quoted && *h.delimiter == '\\' && h.length > 1) {
        h.delimiter++;
        h.length--;
    }
    for (size_t i = 0; i < h.length; i++)
        if (is_one_of((unsigned char)h.delimiter[i], "'\"\\`$\t\n"))
            return false;
    s->pending[s->pending_count++] = h;
    return h.length > 0;
}

static enum token newline_skip(struct scan *s) {
    s->at++;
    for (unsigned i = 0; i < s->pending_count; i++)
        if (!heredoc_skip(s, &s->pending[i]))
            return TOKEN_BAD;
    s->pending_count = 0;
    return TOKEN_NEWLINE;
}

static enum token operator_skip(struct scan *s) {
    /* Longer ones first. BAD are those that only bash has. */
    static const struct {
        char text[4];
        enum token token;
    } operators[] = {
        // clang-format off
        {"<<<", TOKEN_BAD},     {";;&", TOKEN_BAD},     {"<<-", TOKEN_HEREDOC_TABS},
        {"<<", TOKEN_HEREDOC},  {"<&", TOKEN_REDIRECT}, {"<>", TOKEN_REDIRECT},
        {">>", TOKEN_REDIRECT}, {">&", TOKEN_REDIRECT}, {">|", TOKEN_REDIRECT},
        {"&&", TOKEN_AND},      {"||", TOKEN_OR},       {";;", TOKEN_CASE_END},
        {"|&", TOKEN_BAD},      {";&", TOKEN_BAD},      {"<", TOKEN_REDIRECT},
        {">", TOKEN_REDIRECT},  {"&", TOKEN_AMPERSAND}, {"|", TOKEN_PIPE},
        {";", TOKEN_SEMICOLON}, {"(", TOKEN_OPEN},      {")", TOKEN_CLOSE},
        // clang-format on
    };
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        size_t start = s->at;
        const char *c = operators[i].text;
        while (*c && scan_peek(s) == *c)
            c++, s->at++;
        if (!*c)
            return operators[i].token;
        s->at = start;
    }
    return TOKEN_BAD;
}

static void token_next(struct scan *s) {
    blanks_skip(s);
    if (scan_peek(s) == '#')
        comment_skip(s);
    int c = s->at < s->end ? (unsigned char)s->text[s->at] : SCAN_END;
    if (c == SCAN_END) {
        s->token = TOKEN_END;
    } else if (c == '\n') {
        s->token = newline_skip(s);
    } else if (is_one_of(c, ";&|<>()")) {
        s->token = operator_skip(s);
    } else if (!word_skip(s)) {
        s->token = TOKEN_BAD;
    } else if (s->token_plain && is_one_of(scan_peek(s), "<>") &&
               strspn(s->text + s->token_at, "0123456789") == s->token_length) {
        s->token = operator_skip(s); /* the number belongs to the redirection */
    }
}

/* --- Lines of others: grammar (2.10.2). Each function starts at its first token and ends at the
 * first one that is not its own; false: not understood. --- */

static bool command_skip(struct scan *s);

static bool token_is(const struct scan *s, const char *word) {
    return s->token == TOKEN_WORD && s->token_plain && strlen(word) == s->token_length &&
           !memcmp(s->text + s->token_at, word, s->token_length);
}

static bool token_is_in(const struct scan *s, const char *const *words) {
    while (*words && !token_is(s, *words))
        words++;
    return *words;
}

static bool expect(struct scan *s, const char *word) {
    if (!token_is(s, word))
        return false;
    token_next(s);
    return true;
}

static void newlines_skip(struct scan *s) {
    while (s->token == TOKEN_NEWLINE)
        token_next(s);
}

static bool redirections_skip(struct scan *s) {
    while (s->token == TOKEN_REDIRECT || s->token == TOKEN_HEREDOC ||
           s->token == TOKEN_HEREDOC_TABS) {
        enum token redirection = s->token;
        token_next(s);
        if (s->token != TOKEN_WORD)
            return false;
        if (redirection != TOKEN_REDIRECT && !heredoc_await(s, redirection == TOKEN_HEREDOC_TABS))
            return false;
        token_next(s);
    }
    return true;
}

static bool pipeline_skip(struct scan *s) {
    if (token_is(s, "!"))
        token_next(s);
    while (command_skip(s)) {
        if (s->token != TOKEN_PIPE)
            return true;
        token_next(s);
        newlines_skip(s);
    }
    return false;
}

static bool and_or_skip(struct scan *s) {
    while (pipeline_skip(s)) {
        if (s->token != TOKEN_AND && s->token != TOKEN_OR)
            return true;
        token_next(s);
        newlines_skip(s);
    }
    return false;
}

static bool list_is_over(const struct scan *s) {
    static const char *const closers[] = {"then", "else", "elif", "fi", "do",
                                          "done", "esac", "}",    NULL};
    return s->token <= TOKEN_END || s->token == TOKEN_CLOSE || s->token == TOKEN_CASE_END ||
           token_is_in(s, closers);
}

static bool list_skip(struct scan *s, bool may_be_empty) {
    newlines_skip(s);
    if (list_is_over(s))
        return may_be_empty;
    while (!list_is_over(s)) {
        if (!and_or_skip(s))
            return false;
        bool separated = s->token == TOKEN_SEMICOLON || s->token == TOKEN_AMPERSAND;
        if (!separated && s->token != TOKEN_NEWLINE)
            return true;
        if (separated)
            token_next(s);
        newlines_skip(s);
    }
    return true;
}

static bool if_skip(struct scan *s) {
    do {
        token_next(s);
        if (!list_skip(s, false) || !expect(s, "then") || !list_skip(s, false))
            return false;
    } while (token_is(s, "elif"));
    if (token_is(s, "else")) {
        token_next(s);
        if (!list_skip(s, false))
            return false;
    }
    return expect(s, "fi");
}

static bool do_skip(struct scan *s) {
    return expect(s, "do") && list_skip(s, false) && expect(s, "done");
}

static bool while_skip(struct scan *s) {
    token_next(s);
    return list_skip(s, false) && do_skip(s);
}

static bool for_skip(struct scan *s) {
    token_next(s);
    if (s->token != TOKEN_WORD || !env_name_is_valid(s->text + s->token_at, s->token_length))
        return false;
    token_next(s);
    bool separated = s->token == TOKEN_SEMICOLON;
    if (!separated)
        newlines_skip(s);
    if (token_is(s, "in")) {
        do
            token_next(s);
        while (s->token == TOKEN_WORD);
        if (s->token != TOKEN_SEMICOLON && s->token != TOKEN_NEWLINE)
            return false;
        separated = s->token == TOKEN_SEMICOLON;
    }
    if (separated)
        token_next(s);
    newlines_skip(s);
    return do_skip(s);
}

static bool case_item_skip(struct scan *s) {
    if (s->token == TOKEN_OPEN)
        token_next(s);
    while (s->token == TOKEN_WORD) {
        token_next(s);
        if (s->token == TOKEN_CLOSE) {
            token_next(s);
            return list_skip(s, true);
        }
        if (s->token != TOKEN_PIPE)
            return false;
        token_next(s);
    }
    return false;
}

static bool case_skip(struct scan *s) {
    token_next(s);
    if (s->token != TOKEN_WORD)
        return false;
    token_next(s);
    newlines_skip(s);
    if (!expect(s, "in"))
        return false;
    newlines_skip(s);
    while (!token_is(s, "esac")) {
        if (!case_item_skip(s))
            return false;
        if (s->token != TOKEN_CASE_END)
            break;
        token_next(s);
        newlines_skip(s);
    }
    return expect(s, "esac");
}

static bool braces_skip(struct scan *s) {
    token_next(s);
    return list_skip(s, false) && expect(s, "}");
}

static bool subshell_skip(struct scan *s) {
    if (scan_peek(s) == '(')
        return false; /* ((…)) is arithmetic in bash */
    token_next(s);
    if (!list_skip(s, false) || s->token != TOKEN_CLOSE)
        return false;
    token_next(s);
    return true;
}

/* A compound command and its redirections. *ret_is_one says whether there was one at all. */
static bool compound_skip(struct scan *s, bool *ret_is_one) {
    static const struct {
        const char *word;
        bool (*skip)(struct scan *s);
    } compounds[] = {{"if", if_skip},   {"while", while_skip}, {"until", while_skip},
                     {"for", for_skip}, {"case", case_skip},   {"{", braces_skip}};
    bool (*skip)(struct scan * s) = s->token == TOKEN_OPEN ? subshell_skip : NULL;
    for (size_t i = 0; i < sizeof compounds / sizeof *compounds; i++)
        if (token_is(s, compounds[i].word))
            skip = compounds[i].skip;
    *ret_is_one = skip;
    return skip && skip(s) && redirections_skip(s);
}

static bool simple_skip(struct scan *s) {
    bool is_compound, is_first = true;
    for (;; is_first = false) {
        if (s->token == TOKEN_WORD) {
            bool is_name = is_first && env_name_is_valid(s->text + s->token_at, s->token_length);
            token_next(s);
            if (s->token != TOKEN_OPEN || !is_name)
                continue;
            token_next(s);
            if (s->token != TOKEN_CLOSE)
                return false;
            token_next(s);
            newlines_skip(s);
            return compound_skip(s, &is_compound);
        }
        if (s->token < TOKEN_REDIRECT || s->token > TOKEN_HEREDOC_TABS)
            return !is_first;
        if (!redirections_skip(s))
            return false;
    }
}

static bool command_skip(struct scan *s) {
    /* Words that bash or busybox reserve beyond POSIX, and reserved words that open nothing here.
     */
    static const char *const strange[] = {"function", "select", "coproc", "time", "[[",   "]]",
                                          "!",        "in",     "then",   "else", "elif", "fi",
                                          "do",       "done",   "esac",   "}",    NULL};
    if (s->depth >= DEPTH_MOST || token_is_in(s, strange))
        return false;
    /* A reserved word may be written over two lines. */
    if (s->token == TOKEN_WORD && s->token_joined)
        return false;
    s->depth++;
    bool is_compound;
    bool ok = compound_skip(s, &is_compound);
    if (!is_compound)
        ok = simple_skip(s);
    s->depth--;
    return ok;
}

/* Goes behind one complete command, or an empty line or a comment, and its newline. False when its
 * end is not to be found with certainty. A last line that lacks only its newline is complete, but
 * not one that would go on behind it. */
static bool line_skip(struct scan *s) {
    s->pending_count = 0;
    s->depth = 0;
    token_next(s);
    while (s->token != TOKEN_NEWLINE && s->token != TOKEN_END) {
        if (!and_or_skip(s))
            return false;
        if (s->token == TOKEN_SEMICOLON || s->token == TOKEN_AMPERSAND)
            token_next(s);
        else if (s->token != TOKEN_NEWLINE && s->token != TOKEN_END)
            return false;
    }
    return s->token == TOKEN_NEWLINE ||
           (!s->cut && !s->pending_count && !is_one_of(s->text[s->end - 1], "\n\\"));
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

void env_file_format(struct buf *out, const struct env_var *vars, size_t count, const char *kept,
                     size_t kept_length) {
    for (size_t i = 0; i < sizeof header_lines / sizeof *header_lines; i++) {
        buf_append_str(out, header_lines[i]);
        buf_append_char(out, '\n');
    }
    /* What is left open at the end of `kept` would swallow the exports: it goes behind them. */
    struct scan s;
    size_t complete = 0;
    for (scan_init(&s, kept, kept_length); s.at < kept_length && line_skip(&s);)
        complete = s.at;
    append_lines(out, kept, complete);
    for (size_t i = 0; i < count; i++) {
        buf_append_str(out, "export ");
        buf_append(out, vars[i].name, vars[i].name_length);
        buf_append_char(out, '=');
        env_quote(out, vars[i].value, vars[i].length);
        buf_append_char(out, '\n');
    }
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
    struct scan s;
    scan_init(&s, text, length);
    while (s.at < length && sink.status >= 0) {
        size_t start = s.at, comment, comment_end;
        if (exports_read(&s, NULL, &comment, &comment_end)) {
            s.at = start;
            exports_read(&s, &sink, &comment, &comment_end);
            keep(kept, text + comment, comment_end - comment);
            continue;
        }
        s.at = start;
        if (line_skip(&s)) {
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
