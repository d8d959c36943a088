#pragma once

#include <stdbool.h>
#include <stddef.h>

/* Finds where the commands of a sh script end, without running or understanding them, in the sense
 * of POSIX.1-2017, Shell Command Language, 2.10.2: so that no line of a here-document, a quoted
 * value or a compound command is mistaken for a command of its own. Where that grammar ends (syntax
 * errors, `[[`, arrays, and whatever dash, bash and busybox ash do not read alike) it gives up.
 * Pure, no memory. */

#define SH_EOF (-1)
#define SH_PENDING_MOST 4

enum sh_token {
    SH_BAD,
    SH_END,
    SH_NEWLINE, /* and the here-documents that were waiting for it */
    SH_WORD,
    SH_REDIRECT,
    SH_HEREDOC,
    SH_HEREDOC_TABS,
    SH_SEMICOLON,
    SH_CASE_END,
    SH_AMPERSAND,
    SH_AND,
    SH_PIPE,
    SH_OR,
    SH_OPEN,
    SH_CLOSE,
};

struct sh_heredoc {
    const char *delimiter; /* within the text */
    size_t length;
    bool quoted, tabs;
};

struct sh_scan {
    const char *text;
    size_t at, end;
    bool cut; /* the text goes on behind `end`, with a NUL, which no two shells take alike */

    /* The newest token; `at` is right behind it. */
    enum sh_token token;
    size_t token_at, token_length;
    bool token_plain;  /* a word without quotes, expansions and continued lines */
    bool token_joined; /* a word that goes on after a backslash and newline */

    struct sh_heredoc pending[SH_PENDING_MOST];
    unsigned pending_count;
    unsigned depth;
};

void sh_scan_init(struct sh_scan *s, const char *text, size_t length);

/* The byte at hand, or SH_EOF. Goes behind continued lines first (2.2.1: backslash and newline are
 * removed before the text is split into tokens, everywhere but in single quotes, comments and
 * quoted here-documents). */
int sh_peek(struct sh_scan *s);

void sh_blanks_skip(struct sh_scan *s);

/* To the newline or the end; no line is continued inside a comment. */
void sh_comment_skip(struct sh_scan *s);

/* Goes behind the closing quote; `at` is behind the opening one. */
bool sh_single_quotes_skip(struct sh_scan *s);

/* Goes behind one complete command, or an empty line or a comment, and its newline. False when its
 * end is not to be found with certainty; `at` is then anywhere. A last line that lacks only its
 * newline is complete, but not one that would go on behind it. */
bool sh_line_skip(struct sh_scan *s);

bool sh_is_one_of(int c, const char *set);
bool sh_is_name_char(int c);

/* [A-Za-z_][A-Za-z0-9_]*, of any length. */
bool sh_is_name(const char *name, size_t length);
