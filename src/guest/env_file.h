#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "util/buf.h"

/* The file in a Linux guest that holds its variables (design, section 3):
 *
 *     #!/bin/sh
 *     # Environment variables managed by vmsfs
 *     export KEY='value'
 *
 * and the sh quoting that it needs. Pure functions on (pointer, length): no I/O, no state. The
 * grammar is that of POSIX.1-2017, Shell Command Language, 2.2 (quoting) and the special built-in
 * `export`. */

/* A variable's name: [A-Za-z_][A-Za-z0-9_]*, 1 to 255 bytes. */
bool env_name_is_valid(const char *name, size_t length);

/* Appends `data` as one single-quoted sh word: 'it'\''s'. Any bytes but NUL. */
void env_quote(struct buf *out, const char *data, size_t length);

struct env_var {
    const char *name;
    size_t name_length;
    const char *value; /* without NUL */
    size_t length;
};

/* Appends the whole file: header, one line a variable, `kept` (lines of others, verbatim; may be
 * empty), then once more the lines of those variables that `kept` names as a word, or of all when
 * it runs what cannot be seen (`.`, `eval`, `export $x`). So lines of others see the variables, and
 * a variable of `vars` wins over what they do to it, wherever they once stood. `vars` are in the
 * order of their names, each once. A last line of `kept` gets its newline. What env_file_parse left
 * unread at the end of `kept` (see there) stands behind all that, where it cannot swallow it. */
void env_file_format(struct buf *out, const struct env_var *vars, size_t count, const char *kept,
                     size_t kept_length);

/* Receives each variable in the order of the file; a name may come twice (it does in what
 * env_file_format writes), the later one counts. `var` and its strings are valid during the call. A
 * negative return ends the reading and is returned. */
typedef int env_file_var(void *arg, const struct env_var *var);

/* Reads an env file. A line of commands `export NAME=word` (one or several, by `;`, each with one
 * or more variables, over several lines by quotes or backslash) whose words are plain (bare, '…',
 * "…" and \ in all mixes) and hold no expansion ($name, $(…), `…`, ~, {a,b}) is taken: its value is
 * what dash, bash and busybox ash make of it, to the byte. A comment behind it is kept as a line of
 * its own.
 *
 * Every other line goes to `kept` verbatim, as a whole and with a newline at its end, except
 * vmsfs's own header lines: comments, empty lines, other commands with their here-documents,
 * compound commands and functions up to their end, lines that mix exports with anything else. From
 * the first line on whose end is not certain (open quotes, a syntax error, grammar beyond POSIX, a
 * NUL) nothing more is taken, and the rest of the text goes to `kept` as it is.
 *
 * Formatting what was read and reading it again gives the same variables and the same `kept`, and
 * these the same file. `kept` must not be NULL, and is appended to. Returns 0, -ENOMEM or what the
 * callback returned. */
int env_file_parse(const char *text, size_t length, env_file_var *on_var, void *arg,
                   struct buf *kept);
