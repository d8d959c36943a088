#include "guest/guest.h"

#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"

/* Every script here is POSIX sh and is run by dash, bash, busybox ash, ksh and zsh alike. It uses
 * built-ins where it can: in an emulated guest a fork and exec cost more than all the rest. */

#define RS "\036"

static void linux_quoted(struct buf *out, const char *s) {
    env_quote(out, s, strlen(s));
}

/* LC_ALL=C: bytes are bytes. Descriptor 8: see linux_control_script. */
static void linux_control_shell(struct buf *out) {
    buf_append_str(out, "umask 022; s=/run/vmsfs-seen.$$; [ -w /run ] || s=$(mktemp) || exit 1; "
                        "exec env LC_ALL=C VMSFS_SEEN=\"$s\" /bin/sh 8>>\"$s\"");
}

static void linux_control_request(struct buf *out, const char *nonce, const char *script,
                                  size_t length) {
    buf_append_str(out, "{ ");
    buf_append(out, script, length);
    buf_printf(out, "\n} 2>&1 </dev/null; printf '\\036%s %%d\\n' \"$?\"\n", nonce);
}

/* Read-only in bash, which ends as `sh` when a file that it sources sets them; OPTIND does that to
 * dash. _vmsfs_… is what the shells here keep for themselves. */
static bool linux_name_is_reserved(const char *name) {
    static const char *const names[] = {"UID",      "EUID",          "PPID",  "SHELLOPTS",
                                        "BASHOPTS", "BASH_VERSINFO", "OPTIND"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i], name) == 0)
            return true;
    return strncmp(name, "_vmsfs_", 7) == 0;
}

/* What the resident shell is taught when it starts: reading the env file and replacing it, as
 * functions, because a shell in an emulated guest takes long to parse a script.
 *
 * The file that was seen last is held open as descriptor 7, so that its inode number is not given
 * to another: a file that has come by rename is told from it by -ef. One that was changed in place
 * is longer, or newer than what descriptor 8 is open on, a file without a name that is written to
 * when the other is seen. (Truncating that one would be half of the cost of an update.) busybox
 * compares whole seconds; so a reading first sets the times of both to one long past, and any
 * change after that is newer. (Our own update cannot do so without another fork; that is why a
 * reading follows it when there is time.) Our update is stamped before it gets its name: whoever
 * changes it under that name comes later.
 *
 * Only built-ins otherwise, which cost no fork; `command` and `true`, because a special built-in
 * whose redirection fails ends the shell (POSIX, 2.8.1). A temporary file that was left behind is
 * emptied, because 7<> does not. busybox's printf fails without a word; dd has one. */
static const char linux_control_script[] =
    "vmsfs_read() {\n" /* FILE LIMIT */
    "if ! [ -e \"$1\" ]; then command exec 7<&-; return %d; fi\n"
    "command exec 7<\"$1\" || return 1\n"
    "true >/proc/$$/fd/8; touch -r /etc/passwd \"$1\" /proc/$$/fd/8 2>/dev/null\n"
    "head -c \"$2\" <&7\n"
    "}\n"
    "vmsfs_write() {\n" /* FILE BYTES */
    "{ ! [ -s \"$1.tmp\" ] || true >\"$1.tmp\"; } && command exec 7<>\"$1.tmp\" &&\n"
    "printf %%s \"$2\" >&7 && { echo >&8; mv -f \"$1.tmp\" \"$1\"; } && return\n"
    "vmsfs_why \"$@\"\n"
    "}\n"
    "vmsfs_why() {\n" /* FILE BYTES: the words for it */
    "dd if=/dev/zero of=\"$1.tmp\" bs=1024 count=$((${#2} / 1024 + 1)); rm -f \"$1.tmp\"\n"
    "return 1\n"
    "}\n"
    "vmsfs_probe() {\n" /* FILE BYTES */
    "[ -d \"${1%%/*}/\" ] || mkdir -p \"${1%%/*}/\"\n"
    "command exec 9>\"$1.tmp\" && printf %%s \"$2\" >&9 && exec 9>&- && rm \"$1.tmp\" && return\n"
    "vmsfs_why \"$@\"\n"
    "}\n"
    "vmsfs_create() {\n" /* FILE BYTES: there was none */
    "! [ -e \"$1\" ] || return %d\n"
    "[ -d \"${1%%/*}/\" ] || mkdir -p \"${1%%/*}/\"\n"
    "vmsfs_write \"$1\" \"$2\"\n"
    "}\n"
    "vmsfs_replace() {\n" /* FILE BYTES: the file as it was seen */
    "if ! [ \"$1\" -ef /proc/$$/fd/7 ] || [ \"$1\" -nt /proc/$$/fd/8 ] ||\n"
    "read -r x <&7 || [ -n \"$x\" ]; then return %d; fi\n"
    "vmsfs_write \"$1\" \"$2\"\n"
    "}\n"
    "rm -f \"$VMSFS_SEEN\" 2>/dev/null\n";

static void linux_env_read(struct buf *out, const char *path) {
    buf_append_str(out, "vmsfs_read ");
    linux_quoted(out, path);
    buf_printf(out, " %d", GUEST_ENV_LIMIT + 1);
}

static void linux_env_replace(struct buf *out, const char *path, const char *bytes, size_t length,
                              bool absent) {
    buf_append_str(out, absent ? "vmsfs_create " : "vmsfs_replace ");
    linux_quoted(out, path);
    buf_append_char(out, ' ');
    env_quote(out, bytes, length);
}

static void linux_env_probe(struct buf *out, const char *path, const char *bytes, size_t length) {
    buf_append_str(out, "vmsfs_probe ");
    linux_quoted(out, path);
    buf_append_char(out, ' ');
    env_quote(out, bytes, length);
}

/* A shell whose connection is gone ends by itself when it has done what it was sent. One whose
 * server has not noticed that waits for more: it is ended. One that its server has ended may have
 * left an mv behind, in its process group, if it had one as this shell has ($g). A number may be
 * another process's by now, or a zombie's, whose environment is empty: what is not known to be a
 * shell of ours is only waited for. */
static const char linux_fence_script[] =
    "vmsfs_there() { grep -q VMSFS_SEEN= \"/proc/$1/environ\"; }\n"
    "vmsfs_group() { [ \"$g\" = $$ ] && kill -\"$2\" -\"$1\"; }\n"
    "vmsfs_fence() {\n" /* PID */
    "n=0\n"
    "while vmsfs_there \"$1\" || vmsfs_group \"$1\" 0; do\n"
    "[ $n -lt 8 ] || ! vmsfs_there \"$1\" || vmsfs_group \"$1\" KILL || kill -KILL \"$1\"\n"
    "[ $n -lt 20 ] || return\n"
    "n=$((n + 1))\n"
    "sleep 0.05 || usleep 50000 || sleep 1\n"
    "done 2>/dev/null\n"
    "}\n";

/* Field 5 of /proc/PID/stat is the process group (proc(5)). */
static void linux_control_hello(struct buf *out, const struct guest_facts *before) {
    buf_printf(out, linux_control_script, GUEST_ABSENT, GUEST_CHANGED, GUEST_CHANGED);
    buf_append_str(out, "read -r b </proc/sys/kernel/random/boot_id && echo \"boot $b\"\n"
                        "read -r a a a a g a </proc/$$/stat\n");
    if (before && before->control && before->boot[0]) {
        buf_append_str(out, linux_fence_script);
        buf_append_str(out, "! [ \"$b\" = ");
        linux_quoted(out, before->boot);
        buf_printf(out, " ] || vmsfs_fence %ld\n", before->control);
    }
    buf_append_str(out, "echo $$; [ \"$g\" = $$ ] && echo own; echo \"$SHELL\"");
}

static void linux_control_facts(const char *output, size_t length, struct guest_facts *ret_facts) {
    static const char *const shells[] = {"/sh", "/bash", "/dash", "/ash", "/ksh", "/zsh"};
    const char *end = output + length;
    static const char boot[] = "boot ";
    *ret_facts = (struct guest_facts){.shell = "/bin/sh"};
    if (length >= sizeof boot - 1 && memcmp(output, boot, sizeof boot - 1) == 0) {
        size_t line = 0;
        output += sizeof boot - 1;
        while (output + line < end && output[line] != '\n')
            line++;
        if (line < sizeof ret_facts->boot)
            memcpy(ret_facts->boot, output, line);
        output += line + (output + line < end);
        length = (size_t)(end - output);
    }
    for (; length && output[0] >= '0' && output[0] <= '9' && ret_facts->control < 1L << 30;
         output++, length--)
        ret_facts->control = ret_facts->control * 10 + (output[0] - '0');
    if (ret_facts->control && length && output[0] == '\n') {
        output++;
        length--;
    }
    if (length >= 4 && memcmp(output, "own\n", 4) == 0) {
        ret_facts->own_group = true;
        output += 4;
    }
    size_t n = 0;
    while (output + n < end && output[n] != '\n')
        n++;
    /* csh, fish and the like do not take sh's words. */
    for (size_t i = 0; i < sizeof shells / sizeof *shells && n < sizeof ret_facts->shell; i++) {
        size_t tail = strlen(shells[i]);
        if (n >= tail && output[0] == '/' && memcmp(output + n - tail, shells[i], tail) == 0 &&
            !memchr(output, 0, n)) {
            memcpy(ret_facts->shell, output, n);
            ret_facts->shell[n] = '\0';
            ret_facts->own_shell = true;
        }
    }
}

/* Sets $g to the process group of `pid`: field 5 of /proc/PID/stat (proc(5)), the third behind the
 * name, which is in parentheses and may hold anything. */
static void linux_find_group(struct buf *out, long pid) {
    buf_printf(out, "read -r s </proc/%ld/stat && s=${s##*) } && set -- $s && g=$3", pid);
}

static const char *const linux_signals[] = {
    "HUP",  "INT",  "QUIT", "ILL",  "TRAP",   "ABRT", "BUS",   "FPE",  "KILL", "USR1",
    "SEGV", "USR2", "PIPE", "ALRM", "TERM",   "CHLD", "CONT",  "STOP", "TSTP", "TTIN",
    "TTOU", "URG",  "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",   "PWR",  "SYS",
};

static bool linux_signal_is_known(const char *signal) {
    for (size_t i = 0; i < sizeof linux_signals / sizeof *linux_signals; i++)
        if (strcmp(linux_signals[i], signal) == 0)
            return true;
    return false;
}

/* The group outlives its first process. */
static void linux_command_signal(struct buf *out, long pid, const char *signal, unsigned grace_s) {
    buf_append_str(out, "{ ");
    linux_find_group(out, pid);
    buf_printf(out, " && kill -%s -\"$g\"", signal);
    if (grace_s)
        buf_printf(out, " && { (sleep %u; kill -KILL -\"$g\") >/dev/null 2>&1 & }", grace_s);
    buf_append_str(out, "; } 2>/dev/null");
}

static void linux_command_exists(struct buf *out, long pid) {
    buf_printf(out, "[ -e /proc/%ld ]", pid);
}

/* The shell that was started in advance. `eval` runs the command in this very shell, so that
 * starting it costs no exec. The marker is printed by a trap, so that it comes after `exit` too; a
 * command that replaces the shell (`exec`) has none, and its end is that of the channel. bash and
 * ksh run that trap also when a signal ends them, with the status of the command before: so there a
 * signal first takes the trap away. */
static const char linux_shell_script[] =
    "_vmsfs_nl='\n'\n"
    "_vmsfs_env() { [ ! -r \"$_vmsfs_file\" ] || . \"$_vmsfs_file\"; }\n"
    "_vmsfs_login() { [ ! -r /etc/profile ] || . /etc/profile\n"
    "if [ -n \"${BASH_VERSION-}\" ] && [ -r ~/.bash_profile ]; then . ~/.bash_profile\n"
    "elif [ -r ~/.profile ]; then . ~/.profile; fi; }\n"
    "if [ -n \"${BASH_VERSION-}${KSH_VERSION-}\" ]; then\n"
    "for _vmsfs_s in HUP INT QUIT ILL TRAP ABRT BUS FPE USR1 SEGV USR2 PIPE ALRM TERM XCPU XFSZ "
    "VTALRM PROF SYS; do\n"
    "trap \"trap - EXIT $_vmsfs_s; kill -$_vmsfs_s $$\" $_vmsfs_s; done; fi\n"
    "echo '" GUEST_SHELL_START "'$$; echo '" GUEST_SHELL_START "'$$ >&2\n"
    "IFS= read -r _vmsfs_line && eval \"$_vmsfs_line\"\n";

static void linux_command_shell(struct buf *out, const struct guest_facts *facts,
                                const char *env_path, bool new_group) {
    cleanup_buf struct buf script = {0};
    buf_append_str(&script, "_vmsfs_file=");
    linux_quoted(&script, env_path);
    buf_append_char(&script, '\n');
    buf_append_str(&script, linux_shell_script);
    /* Each exec costs as much as all the rest, so it is done without where that is possible. */
    if (new_group || !facts->own_shell) {
        buf_append_str(out, new_group ? "exec setsid " : "exec ");
        linux_quoted(out, facts->shell);
        buf_append_str(out, " -c ");
        env_quote(out, script.data, script.len);
    } else {
        buf_append(out, script.data, script.len);
    }
    out->failed |= script.failed;
}

/* `read` takes one line, a byte a system call: a command is put into one line, and a long one
 * follows the line and is taken in by one `head`. */
#define LINUX_COMMAND_INLINE 2048

static void linux_command_export(struct buf *out, const char *name, const char *value,
                                 size_t length) {
    buf_printf(out, "export %s=", name);
    env_quote(out, value, length);
    buf_append_char(out, '\n');
}

/* What exists in the shell only (POSIX.1-2017, 2.14 and 1.6: intrinsic utilities). */
static bool linux_is_builtin(const char *name) {
    static const char *const names[] = {
        ".",     ":",      "alias", "bg",   "cd",     "command", "eval",     "exec",   "exit",
        "fc",    "export", "fg",    "hash", "jobs",   "read",    "readonly", "return", "set",
        "shift", "times",  "trap",  "type", "ulimit", "umask",   "unalias",  "unset",  "wait",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i], name) == 0)
            return true;
    return false;
}

/* A program takes the shell's place: its process is the one that the server has started, so that
 * its status or signal is told to the letter, and no fork is paid for. */
static void linux_command_words(struct buf *out, const char *words, size_t length) {
    const char *end = words + length;
    if (!linux_is_builtin(words))
        buf_append_str(out, "exec ");
    for (const char *word = words; word < end; word += strlen(word) + 1) {
        env_quote(out, word, strlen(word));
        buf_append_char(out, ' ');
    }
}

static void linux_command_text(struct buf *out, const struct guest_command *command) {
    if (command->exports)
        buf_append(out, command->exports->data ? command->exports->data : "",
                   command->exports->len);
    if (command->folder) {
        buf_append_str(out, "cd ");
        linux_quoted(out, command->folder);
        buf_append_str(out, " || exit 1\n");
    }
    if (command->words)
        linux_command_words(out, command->text, command->length);
    else
        buf_append(out, command->text, command->length);
}

static void linux_command_inline(struct buf *out, const struct buf *text) {
    buf_append_char(out, '\'');
    for (size_t i = 0; i < text->len; i++) {
        if (text->data[i] == '\'')
            buf_append_str(out, "'\\''");
        else if (text->data[i] == '\n')
            buf_append_str(out, "'\"$_vmsfs_nl\"'");
        else
            buf_append_char(out, text->data[i]);
    }
    buf_append_char(out, '\'');
}

static bool linux_command_start(struct buf *out, const struct guest_command *command) {
    const char *nonce = command->nonce;
    cleanup_buf struct buf text = {0};
    linux_command_text(&text, command);
    out->failed |= text.failed;
    bool follows = text.len > LINUX_COMMAND_INLINE;
    buf_printf(out,
               "trap '{ _vmsfs_s=$?; set +x; } 2>/dev/null; echo \"" RS "%s $_vmsfs_s\"; echo \"" RS
               "%s $_vmsfs_s\" >&2; exit $_vmsfs_s' EXIT; ",
               nonce, nonce);
    /* head may read more than it is asked for. */
    if (follows)
        buf_printf(out, "_vmsfs_line=$(head -c %zu); ", text.len);
    if (follows && command->input)
        buf_printf(out, "echo '" GUEST_READY "%s'; ", nonce);
    buf_append_str(out, command->login ? "_vmsfs_login </dev/null; _vmsfs_env; eval "
                                       : "_vmsfs_env; eval ");
    if (follows)
        buf_append_str(out, "\"$_vmsfs_line\"");
    else
        linux_command_inline(out, &text);
    buf_append_str(out, command->input ? "\n" : " </dev/null\n");
    if (follows)
        buf_append(out, text.data, text.len);
    if (text.data)
        explicit_bzero(text.data, text.len);
    return follows && command->input;
}

const struct guest_ops guest_linux = {
    .name = "linux",
    .control_shell = linux_control_shell,
    .control_request = linux_control_request,
    .control_hello = linux_control_hello,
    .control_facts = linux_control_facts,
    .name_is_reserved = linux_name_is_reserved,
    .env_read = linux_env_read,
    .env_replace = linux_env_replace,
    .env_probe = linux_env_probe,
    .command_signal = linux_command_signal,
    .signal_is_known = linux_signal_is_known,
    .command_exists = linux_command_exists,
    .command_shell = linux_command_shell,
    .command_start = linux_command_start,
    .command_export = linux_command_export,
};
