#include "guest/sh_scan.h"

#include <string.h>

#define DEPTH_MOST 50

void sh_scan_init(struct sh_scan *s, const char *text, size_t length) {
    const char *nul = length ? memchr(text, '\0', length) : NULL;
    *s = (struct sh_scan){.text = text, .end = length, .cut = nul != NULL};
    if (nul)
        s->end = (size_t)(nul - text);
}

int sh_peek(struct sh_scan *s) {
    while (s->end - s->at >= 2 && s->text[s->at] == '\\' && s->text[s->at + 1] == '\n')
        s->at += 2;
    return s->at < s->end ? (unsigned char)s->text[s->at] : SH_EOF;
}

bool sh_is_one_of(int c, const char *set) {
    return c > 0 && strchr(set, c);
}

void sh_blanks_skip(struct sh_scan *s) {
    while (sh_is_one_of(sh_peek(s), " \t"))
        s->at++;
}

void sh_comment_skip(struct sh_scan *s) {
    const char *newline = memchr(s->text + s->at, '\n', s->end - s->at);
    s->at = newline ? (size_t)(newline - s->text) : s->end;
}

bool sh_single_quotes_skip(struct sh_scan *s) {
    const char *close = s->at < s->end ? memchr(s->text + s->at, '\'', s->end - s->at) : NULL;
    if (close)
        s->at = (size_t)(close - s->text) + 1;
    return close;
}

bool sh_is_name_char(int c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

bool sh_is_name(const char *name, size_t length) {
    if (length < 1 || (name[0] >= '0' && name[0] <= '9'))
        return false;
    for (size_t i = 0; i < length; i++)
        if (!sh_is_name_char((unsigned char)name[i]))
            return false;
    return true;
}

/* --- Tokens (2.3) --- */

static void token_next(struct sh_scan *s);
static bool list_skip(struct sh_scan *s, bool may_be_empty);
static bool dollar_skip(struct sh_scan *s, bool quoted);

/* To the next backquote that is not escaped. A quote that is left open inside is read differently.
 */
static bool backquotes_skip(struct sh_scan *s) {
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

static bool double_quotes_skip(struct sh_scan *s) {
    int c;
    while ((c = sh_peek(s)) != SH_EOF) {
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
static bool parameter_skip(struct sh_scan *s) {
    int c = sh_peek(s);
    if (!sh_is_name_char(c) && !sh_is_one_of(c, "@*#?$!-"))
        return false;
    while ((c = sh_peek(s)) != SH_EOF && !sh_is_one_of(c, "\n'\"\\`<>(){")) {
        s->at++;
        if (c == '}')
            return true;
        if (c == '$' && !dollar_skip(s, false))
            return false;
    }
    return false;
}

/* $((…)): only what cannot be a subshell inside a command substitution. */
static bool arithmetic_skip(struct sh_scan *s) {
    unsigned open = 0;
    for (int c;
         (c = sh_peek(s)), sh_is_name_char(c) || sh_is_one_of(c, "$() \t+-*/%<>=!&|^~?:,");) {
        s->at++;
        if (c == '(')
            open++;
        else if (c == ')' && open)
            open--;
        else if (c == ')')
            return sh_peek(s) == ')' && s->at++ < s->end;
        else if (c == '$' && sh_peek(s) == '(')
            return false;
        else if (c == '$' && !dollar_skip(s, false))
            return false;
    }
    return false;
}

static bool command_substitution_skip(struct sh_scan *s) {
    if (s->pending_count)
        return false;
    token_next(s);
    return list_skip(s, true) && s->token == SH_CLOSE && !s->pending_count;
}

/* `at` is behind the `$`. */
static bool dollar_skip(struct sh_scan *s, bool quoted) {
    int c = sh_peek(s);
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
    else if (sh_peek(s) == '(' && s->at++ < s->end)
        ok = arithmetic_skip(s);
    else
        ok = command_substitution_skip(s);
    s->depth--;
    return ok;
}

static bool word_skip(struct sh_scan *s) {
    bool plain = true, joined = false, ok = true;
    size_t start = s->at;
    while (ok) {
        size_t before = s->at;
        int c = sh_peek(s);
        joined |= s->at != before;
        if (c == SH_EOF || sh_is_one_of(c, " \t\n;&|<>()"))
            break;
        s->at++;
        plain &= !sh_is_one_of(c, "'\"\\`$");
        if (c == '\'')
            ok = sh_single_quotes_skip(s);
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
    s->token = SH_WORD;
    s->token_at = start;
    s->token_length = s->at - start;
    s->token_plain = plain && !joined;
    s->token_joined = joined;
    return ok;
}

/* 2.7.4. In a body with expansions, dash looks for the end of an expansion before that of the
 * document, bash the other way round: no opinion on those. */
static bool heredoc_skip(struct sh_scan *s, const struct sh_heredoc *h) {
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
static bool heredoc_await(struct sh_scan *s, bool tabs) {
    struct sh_heredoc h = {s->text + s->token_at, s->token_length, !s->token_plain, tabs};
    if (s->token != SH_WORD || s->pending_count == SH_PENDING_MOST || s->token_joined)
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
        if (sh_is_one_of((unsigned char)h.delimiter[i], "'\"\\`$\t\n"))
            return false;
    s->pending[s->pending_count++] = h;
    return h.length > 0;
}

static enum sh_token newline_skip(struct sh_scan *s) {
    s->at++;
    for (unsigned i = 0; i < s->pending_count; i++)
        if (!heredoc_skip(s, &s->pending[i]))
            return SH_BAD;
    s->pending_count = 0;
    return SH_NEWLINE;
}

static enum sh_token operator_skip(struct sh_scan *s) {
    /* Longer ones first. BAD are those that only bash has. */
    static const struct {
        char text[4];
        enum sh_token token;
    } operators[] = {
        // clang-format off
        {"<<<", SH_BAD},     {";;&", SH_BAD},     {"<<-", SH_HEREDOC_TABS},
        {"<<", SH_HEREDOC},  {"<&", SH_REDIRECT}, {"<>", SH_REDIRECT},
        {">>", SH_REDIRECT}, {">&", SH_REDIRECT}, {">|", SH_REDIRECT},
        {"&&", SH_AND},      {"||", SH_OR},       {";;", SH_CASE_END},
        {"|&", SH_BAD},      {";&", SH_BAD},      {"<", SH_REDIRECT},
        {">", SH_REDIRECT},  {"&", SH_AMPERSAND}, {"|", SH_PIPE},
        {";", SH_SEMICOLON}, {"(", SH_OPEN},      {")", SH_CLOSE},
        // clang-format on
    };
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        size_t start = s->at;
        const char *c = operators[i].text;
        while (*c && sh_peek(s) == *c)
            c++, s->at++;
        if (!*c)
            return operators[i].token;
        s->at = start;
    }
    return SH_BAD;
}

static void token_next(struct sh_scan *s) {
    sh_blanks_skip(s);
    if (sh_peek(s) == '#')
        sh_comment_skip(s);
    int c = s->at < s->end ? (unsigned char)s->text[s->at] : SH_EOF;
    if (c == SH_EOF) {
        s->token = SH_END;
    } else if (c == '\n') {
        s->token = newline_skip(s);
    } else if (sh_is_one_of(c, ";&|<>()")) {
        s->token = operator_skip(s);
    } else if (!word_skip(s)) {
        s->token = SH_BAD;
    } else if (s->token_plain && sh_is_one_of(sh_peek(s), "<>") &&
               strspn(s->text + s->token_at, "0123456789") == s->token_length) {
        s->token = operator_skip(s); /* the number belongs to the redirection */
    }
}

/* --- Grammar (2.10.2). Each function starts at its first token and ends at the
 * first one that is not its own; false: not understood. --- */

static bool command_skip(struct sh_scan *s);

static bool token_is(const struct sh_scan *s, const char *word) {
    return s->token == SH_WORD && s->token_plain && strlen(word) == s->token_length &&
           !memcmp(s->text + s->token_at, word, s->token_length);
}

static bool token_is_in(const struct sh_scan *s, const char *const *words) {
    while (*words && !token_is(s, *words))
        words++;
    return *words;
}

static bool expect(struct sh_scan *s, const char *word) {
    if (!token_is(s, word))
        return false;
    token_next(s);
    return true;
}

static void newlines_skip(struct sh_scan *s) {
    while (s->token == SH_NEWLINE)
        token_next(s);
}

static bool redirections_skip(struct sh_scan *s) {
    while (s->token == SH_REDIRECT || s->token == SH_HEREDOC || s->token == SH_HEREDOC_TABS) {
        enum sh_token redirection = s->token;
        token_next(s);
        if (s->token != SH_WORD)
            return false;
        if (redirection != SH_REDIRECT && !heredoc_await(s, redirection == SH_HEREDOC_TABS))
            return false;
        token_next(s);
    }
    return true;
}

static bool pipeline_skip(struct sh_scan *s) {
    if (token_is(s, "!"))
        token_next(s);
    while (command_skip(s)) {
        if (s->token != SH_PIPE)
            return true;
        token_next(s);
        newlines_skip(s);
    }
    return false;
}

static bool and_or_skip(struct sh_scan *s) {
    while (pipeline_skip(s)) {
        if (s->token != SH_AND && s->token != SH_OR)
            return true;
        token_next(s);
        newlines_skip(s);
    }
    return false;
}

static bool list_is_over(const struct sh_scan *s) {
    static const char *const closers[] = {"then", "else", "elif", "fi", "do",
                                          "done", "esac", "}",    NULL};
    return s->token <= SH_END || s->token == SH_CLOSE || s->token == SH_CASE_END ||
           token_is_in(s, closers);
}

static bool list_skip(struct sh_scan *s, bool may_be_empty) {
    newlines_skip(s);
    if (list_is_over(s))
        return may_be_empty;
    while (!list_is_over(s)) {
        if (!and_or_skip(s))
            return false;
        bool separated = s->token == SH_SEMICOLON || s->token == SH_AMPERSAND;
        if (!separated && s->token != SH_NEWLINE)
            return true;
        if (separated)
            token_next(s);
        newlines_skip(s);
    }
    return true;
}

static bool if_skip(struct sh_scan *s) {
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

static bool do_skip(struct sh_scan *s) {
    return expect(s, "do") && list_skip(s, false) && expect(s, "done");
}

static bool while_skip(struct sh_scan *s) {
    token_next(s);
    return list_skip(s, false) && do_skip(s);
}

static bool for_skip(struct sh_scan *s) {
    token_next(s);
    if (s->token != SH_WORD || !sh_is_name(s->text + s->token_at, s->token_length))
        return false;
    token_next(s);
    bool separated = s->token == SH_SEMICOLON;
    if (!separated)
        newlines_skip(s);
    if (token_is(s, "in")) {
        do
            token_next(s);
        while (s->token == SH_WORD);
        if (s->token != SH_SEMICOLON && s->token != SH_NEWLINE)
            return false;
        separated = s->token == SH_SEMICOLON;
    }
    if (separated)
        token_next(s);
    newlines_skip(s);
    return do_skip(s);
}

static bool case_item_skip(struct sh_scan *s) {
    if (s->token == SH_OPEN)
        token_next(s);
    while (s->token == SH_WORD) {
        token_next(s);
        if (s->token == SH_CLOSE) {
            token_next(s);
            return list_skip(s, true);
        }
        if (s->token != SH_PIPE)
            return false;
        token_next(s);
    }
    return false;
}

static bool case_skip(struct sh_scan *s) {
    token_next(s);
    if (s->token != SH_WORD)
        return false;
    token_next(s);
    newlines_skip(s);
    if (!expect(s, "in"))
        return false;
    newlines_skip(s);
    while (!token_is(s, "esac")) {
        if (!case_item_skip(s))
            return false;
        if (s->token != SH_CASE_END)
            break;
        token_next(s);
        newlines_skip(s);
    }
    return expect(s, "esac");
}

static bool braces_skip(struct sh_scan *s) {
    token_next(s);
    return list_skip(s, false) && expect(s, "}");
}

static bool subshell_skip(struct sh_scan *s) {
    if (sh_peek(s) == '(')
        return false; /* ((…)) is arithmetic in bash */
    token_next(s);
    if (!list_skip(s, false) || s->token != SH_CLOSE)
        return false;
    token_next(s);
    return true;
}

/* A compound command and its redirections. *ret_is_one says whether there was one at all. */
static bool compound_skip(struct sh_scan *s, bool *ret_is_one) {
    static const struct {
        const char *word;
        bool (*skip)(struct sh_scan *s);
    } compounds[] = {{"if", if_skip},   {"while", while_skip}, {"until", while_skip},
                     {"for", for_skip}, {"case", case_skip},   {"{", braces_skip}};
    bool (*skip)(struct sh_scan * s) = s->token == SH_OPEN ? subshell_skip : NULL;
    for (size_t i = 0; i < sizeof compounds / sizeof *compounds; i++)
        if (token_is(s, compounds[i].word))
            skip = compounds[i].skip;
    *ret_is_one = skip;
    return skip && skip(s) && redirections_skip(s);
}

static bool simple_skip(struct sh_scan *s) {
    bool is_compound, is_first = true;
    for (;; is_first = false) {
        if (s->token == SH_WORD) {
            bool is_name = is_first && sh_is_name(s->text + s->token_at, s->token_length);
            token_next(s);
            if (s->token != SH_OPEN || !is_name)
                continue;
            token_next(s);
            if (s->token != SH_CLOSE)
                return false;
            token_next(s);
            newlines_skip(s);
            return compound_skip(s, &is_compound);
        }
        if (s->token < SH_REDIRECT || s->token > SH_HEREDOC_TABS)
            return !is_first;
        if (!redirections_skip(s))
            return false;
    }
}

static bool command_skip(struct sh_scan *s) {
    /* Words that bash or busybox reserve beyond POSIX, and reserved words that open nothing here.
     */
    static const char *const strange[] = {"function", "select", "coproc", "time", "[[",   "]]",
                                          "!",        "in",     "then",   "else", "elif", "fi",
                                          "do",       "done",   "esac",   "}",    NULL};
    if (s->depth >= DEPTH_MOST || token_is_in(s, strange))
        return false;
    /* A reserved word may be written over two lines. */
    if (s->token == SH_WORD && s->token_joined)
        return false;
    s->depth++;
    bool is_compound;
    bool ok = compound_skip(s, &is_compound);
    if (!is_compound)
        ok = simple_skip(s);
    s->depth--;
    return ok;
}

bool sh_line_skip(struct sh_scan *s) {
    s->pending_count = 0;
    s->depth = 0;
    token_next(s);
    while (s->token != SH_NEWLINE && s->token != SH_END) {
        if (!and_or_skip(s))
            return false;
        if (s->token == SH_SEMICOLON || s->token == SH_AMPERSAND)
            token_next(s);
        else if (s->token != SH_NEWLINE && s->token != SH_END)
            return false;
    }
    return s->token == SH_NEWLINE ||
           (!s->cut && !s->pending_count && !sh_is_one_of(s->text[s->end - 1], "\n\\"));
}
