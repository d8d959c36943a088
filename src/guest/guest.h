#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "util/buf.h"

/* What is particular to a guest's operating system: the texts that are sent to its shells and the
 * meaning of what they answer. Pure functions: no I/O, no state. A nonce is 32 hex digits, new for
 * each request or command, so that nothing that is printed by chance can be taken for an end. */

#define GUEST_ENV_FILE "/etc/profile.d/vmsfs_env.sh"

#define GUEST_SHELL_START "\036vmsfs "
#define GUEST_READY "\036ready "

/* Exit statuses of scripts. */
#define GUEST_CHANGED 75
#define GUEST_ABSENT 76

/* The most of the env file that is read; one byte more tells that there is more. */
#define GUEST_ENV_LIMIT (4 << 20)

/* What is found out about a guest when it is first reached. */
struct guest_facts {
    char shell[128]; /* the user's, if it understands sh; else /bin/sh */
    bool own_shell;  /* it is the user's: the server runs commands with it */
    char boot[40];   /* the kernel's id of this boot (random(4)); empty: not known */
    bool own_group;  /* the server gives each command a process group of its own */
    long control;    /* process id of the resident shell; 0: not known */
};

/* A command to be run. Borrowed for the call. */
struct guest_command {
    const char *nonce;
    bool login; /* as in a login shell: its start-up files are read before */
    bool words; /* `text` is a list of words, each ended by a NUL: a program and its arguments, as
                   execvp(3) takes them. Else it is sh */
    bool input; /* what follows is its stdin; else that is empty */
    const char *folder; /* absolute; NULL: where a login starts */
    const char *text;
    size_t length;
    const struct buf *exports; /* made by command_export(); NULL: none */
};

struct guest_ops {
    const char *name;

    /* The resident shell: the command that starts it, and one request to it. */
    void (*control_shell)(struct buf *out);
    void (*control_request)(struct buf *out, const char *nonce, const char *script, size_t length);

    /* Names that are no variables there: shells refuse to set them, and some end when they are
     * asked to, with all that comes behind in the file. */
    bool (*name_is_reserved)(const char *name);

    /* The first request, and what its answer says. `before`: what was known when the last
     * connection was lost, or NULL. The resident shell of that one may still have an update to do,
     * so its end is waited for: what is read after this is not changed by it any more. */
    void (*control_hello)(struct buf *out, const struct guest_facts *before);
    void (*control_facts)(const char *output, size_t length, struct guest_facts *ret_facts);

    /* Scripts for requests. They watch the env file, so that what others change in it is not
     * overwritten unseen.
     *
     * Prints the file and remembers it as seen: exit status 0, or GUEST_ABSENT when there is none.
     */
    void (*env_read)(struct buf *out, const char *path);
    /* Replaces the file by these bytes, atomically. GUEST_CHANGED when it is not the one that was
     * seen (`absent`: none was); then nothing has been done. Any other status but 0: it prints why
     * not, and the old file is there. */
    void (*env_replace)(struct buf *out, const char *path, const char *bytes, size_t length,
                        bool absent);
    /* Could env_replace() write these bytes? Nothing is changed. A status other than 0: it prints
     * why not. */
    void (*env_probe)(struct buf *out, const char *path, const char *bytes, size_t length);
    /* Sends a signal ("TERM"; one that signal_is_known() knows) to the process group of the command
     * whose first process is `pid`, and, unless the grace is 0, KILL to what is left of it then,
     * whether this side lives to see it or not. A status other than 0: it has ended. */
    void (*command_signal)(struct buf *out, long pid, const char *signal, unsigned grace_s);
    bool (*signal_is_known)(const char *signal);
    /* Status 0: the first process of the command is still there. */
    void (*command_exists)(struct buf *out, long pid);

    /* The shell that is started in advance for one command: it prints GUEST_SHELL_START, its
     * process id and a newline on stdout and on stderr (what comes before that is not the
     * command's), and waits for command_start() on its input. When the command ends it prints the
     * marker (guest_marker_find) on stdout and on stderr, unless the command has replaced it: then
     * the end is that of its process. Variables are those of the moment of command_start().
     * `new_group`: it is to make a process group of its own. */
    void (*command_shell)(struct buf *out, const struct guest_facts *facts, const char *env_path,
                          bool new_group);
    /* True: the command prints GUEST_READY and its nonce and a newline, on stdout and before
     * anything else, when it has taken in its text; input must not be sent before that. */
    bool (*command_start)(struct buf *out, const struct guest_command *command);

    /* Appends to a command's `exports`: a variable for it alone. */
    void (*command_export)(struct buf *out, const char *name, const char *value, size_t length);
};

extern const struct guest_ops guest_linux;

/* Looks for the end marker of `nonce`: RS nonce SP status LF. Returns 1 when found: *ret_before is
 * the number of bytes in front of it, *ret_after that of the bytes up to its end, *ret_status what
 * it says. Returns 0 when it is not there: then the first *ret_before bytes are certainly not part
 * of it. */
int guest_marker_find(const char *data, size_t length, const char *nonce, size_t *ret_before,
                      size_t *ret_after, int *ret_status);
