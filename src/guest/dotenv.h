#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "guest/env_file.h"

/* The text of `ID/environ`: all variables of a VM, one `KEY='value'` a line. What is printed is
 * valid sh, so that `. /vms/ID/environ` sets them, and valid dotenv. What is read is that, and the
 * .env files that people and tools have at hand. Pure functions on (pointer, length): no I/O, no
 * state.
 *
 * A statement is: optional blanks, optional `export` and blanks, NAME, `=`, a value, the end of the
 * line (LF, CR LF or the end of the text). Blank lines, lines whose first non-blank is `#`, the
 * lines `set -a` and `set +a`, and a UTF-8 BOM at the start are skipped. There are two kinds of
 * value:
 *
 *  - It begins with ' or ": one sh word (POSIX.1-2017, Shell Command Language, 2.2), made of '…',
 *    "…" (each over several lines if need be), \x and bare characters. One thing is as in dotenv
 *    and not as in sh: \n, \r and \t in "…" are a newline, a CR and a tab. Behind the word only
 *    blanks and a # comment may stand.
 *  - Otherwise: the rest of the line as it is, with spaces, quotes and backslashes, without blanks
 *    at its end and without a comment (a blank and `#`).
 *
 * Nothing is expanded. What sh would expand by name or by command ($a, $_, ${, $( and the
 * backquote, outside '…' and not escaped) is an error, because a reader would be surprised either
 * way. Every other `$` is literal, and so are ~ and *. */

/* Around the lines, so that a shell that reads them exports what they set. The parser passes over
 * them. */
#define DOTENV_BEGIN "set -a\n"
#define DOTENV_END "set +a\n"

/* Appends one line a variable, in the order given. Any value without NUL survives, through
 * dotenv_parse as through a shell. */
void dotenv_format(struct buf *out, const struct env_var *vars, size_t count);

/* Receives each variable in the order of the text; a name may come twice, the later one counts.
 * `var` and its strings are valid during the call; the strings have no NUL behind them. A negative
 * return ends the parsing and is returned. */
typedef int dotenv_var(void *arg, const struct env_var *var);

struct dotenv_error {
    unsigned line; /* from 1: where the bad statement begins */

    /* What is wrong and what to do, in one line of ASCII. The name if it is known, but never a
     * part of the value, nor a line that may be one: values are secrets, this text is logged. */
    char text[160];

    /* A text that came in pieces may go on, and these say that more of it can mend the error, which
     * is the only one so far. `incomplete`: the text ends inside a quoted value (or between a
     * backslash and the character it quotes). `in_name`: it ends before the `=` of its last line,
     * as in "A='1'\nHOM". At most one is true. */
    bool incomplete;
    bool in_name;
};

/* Returns 0; -ERR_INVALID for a text that is not as described above, with *ret_error written (in
 * this case only); -ENOMEM; or what the callback returned. `on_var` may have been called for
 * statements before the bad one: collect first, then use. */
int dotenv_parse(const char *text, size_t length, dotenv_var *on_var, void *arg,
                 struct dotenv_error *ret_error);
