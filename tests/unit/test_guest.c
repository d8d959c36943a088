#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "guest/guest.h"
#include "util/cleanup.h"

/* The scripts of guest/linux.c, run by the shells that a guest may have. */

#define NONCE "0123456789abcdef0123456789abcdef"
#define ENV_FILE "/tmp/vmsfs-test-guest-env"

static const char *const shells[] = {"/bin/dash", "/bin/bash", "/bin/busybox", "/bin/ksh",
                                     "/bin/zsh"};

static void a_marker_is_found_wherever_it_is_cut(void) {
    static const char text[] = "out\036put\036" NONCE " 7\nafter";
    size_t length = sizeof text - 1, end = length - strlen("after"), before, after;
    int status = -1;
    for (size_t n = 0; n < end; n++) {
        CHECK_SAID(!guest_marker_find(text, n, NONCE, &before, &after, &status), "cut at %zu", n);
        CHECK_SAID(before == (n <= 3   ? n
                              : n == 4 ? 3
                              : n <= 7 ? n
                                       : 7),
                   "%zu safe of %zu", before, n);
    }
    CHECK(guest_marker_find(text, length, NONCE, &before, &after, &status) == 1);
    CHECK(before == 7 && after == end && status == 7);
}

static void what_only_looks_like_a_marker_is_output(void) {
    static const char *const texts[] = {
        "\036" NONCE "\n", "\036" NONCE " \n",     "\036" NONCE " x\n",
        "\0360123 0\n",    "\036" NONCE " 1234\n", NONCE " 0\n",
    };
    size_t before, after;
    int status;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        CHECK_SAID(!guest_marker_find(texts[i], strlen(texts[i]), NONCE, &before, &after, &status),
                   "text %zu", i);
        CHECK_SAID(before == strlen(texts[i]), "text %zu: %zu safe", i, before);
    }
}

static void facts_are_read_from_the_hello(void) {
    static const struct {
        const char *output, *shell;
        bool own_group, own_shell;
        long control;
    } rows[] = {
        {"boot 1-2\n4321\nown\n/bin/bash\n", "/bin/bash", true, true, 4321},
        {"boot 1-2\n77\n/bin/dash\n", "/bin/dash", false, true, 77},
        {"boot 1-2\n99999999999999999999", "/bin/sh", false, false, 9999999999},
        {"own\n/bin/bash\n", "/bin/bash", true, true, 0},
        {"/bin/sh\n", "/bin/sh", false, true, 0},
        {"/usr/bin/fish\n", "/bin/sh", false, false, 0},
        {"own\n/bin/csh\n", "/bin/sh", true, false, 0},
        {"bash\n", "/bin/sh", false, false, 0},
        {"", "/bin/sh", false, false, 0},
        {"own\n", "/bin/sh", true, false, 0},
        {"boot 1-2\nown\n/bin/bash\n", "/bin/bash", true, true, 0},
        {"boot 1-2\n/bin/dash\n", "/bin/dash", false, true, 0},
        {"boot ", "/bin/sh", false, false, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct guest_facts facts;
        guest_linux.control_facts(rows[i].output, strlen(rows[i].output), &facts);
        CHECK_SAID(!strcmp(facts.shell, rows[i].shell), "row %zu: shell %s", i, facts.shell);
        CHECK_SAID(facts.own_group == rows[i].own_group, "row %zu: own group", i);
        CHECK_SAID(facts.own_shell == rows[i].own_shell, "row %zu: own shell", i);
        CHECK_SAID(facts.control == rows[i].control, "row %zu: shell %ld", i, facts.control);
    }
}

/* Runs `SHELL -c script` with this input; returns its exit status and what it prints. */
static int shell_run(const char *shell, const char *script, const struct buf *input,
                     struct buf *out, struct buf *err) {
    char paths[2][32] = {"/tmp/vmsfs-out.XXXXXX", "/tmp/vmsfs-err.XXXXXX"};
    int files[2] = {mkstemp(paths[0]), mkstemp(paths[1])}, in[2], status = -1;
    if (files[0] < 0 || files[1] < 0 || pipe(in) < 0)
        return -1;
    unlink(paths[0]);
    unlink(paths[1]);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(in[0], 0);
        dup2(files[0], 1);
        dup2(files[1], 2);
        close(in[1]);
        if (strstr(shell, "busybox"))
            execl(shell, "busybox", "sh", "-c", script, (char *)NULL);
        else
            execl(shell, shell, "-c", script, (char *)NULL);
        _exit(127);
    }
    close(in[0]);
    for (size_t done = 0; done < input->len;) {
        ssize_t n = write(in[1], input->data + done, input->len - done);
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    close(in[1]);
    waitpid(pid, &status, 0);
    for (int i = 0; i < 2; i++) {
        char block[4096];
        ssize_t n;
        lseek(files[i], 0, SEEK_SET);
        while ((n = read(files[i], block, sizeof block)) > 0)
            buf_append(i ? err : out, block, (size_t)n);
        close(files[i]);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Runs one command; `more` is sent after it. Without a marker: the program has replaced the shell.
 */
static void check_guest_command(const char *shell, const struct guest_command *command,
                                const char *more, const char *expected, int expected_status,
                                bool marked) {
    struct guest_facts facts = {.shell = "/bin/sh", .own_shell = true, .own_group = true};
    cleanup_buf struct buf script = {0}, start = {0}, out = {0}, err = {0}, wanted = {0};
    guest_linux.command_shell(&script, &facts, ENV_FILE, false);
    bool waits = guest_linux.command_start(&start, command);
    buf_append_str(&start, more);
    int status = shell_run(shell, script.data, &start, &out, &err);
    CHECK_SAID(status == expected_status, "%s: %.40s: status %d", shell, command->text, status);
    if (waits)
        buf_append_str(&wanted, GUEST_READY NONCE "\n");
    buf_append_str(&wanted, expected);
    if (marked)
        buf_printf(&wanted, "\036" NONCE " %d\n", expected_status);
    char *first = out.data ? strchr(out.data, '\n') : NULL;
    CHECK_SAID(first && !strncmp(out.data, GUEST_SHELL_START, sizeof GUEST_SHELL_START - 1),
               "%s: no start on stdout", shell);
    if (first)
        buf_consume(&out, (size_t)(first - out.data) + 1);
    CHECK_SAID(check_same(out.data, out.len, wanted.data, wanted.len), "%s: %.40s: printed %s",
               shell, command->text, out.data ? out.data : "");
    char *line = err.data ? strchr(err.data, '\n') : NULL;
    CHECK_SAID(line && strtol(err.data + sizeof GUEST_SHELL_START - 1, NULL, 10) > 1,
               "%s: no process id on stderr", shell);
    CHECK_SAID(!marked || (line && strstr(line, "\036" NONCE)), "%s: no marker on stderr", shell);
}

static void check_command(const char *shell, const char *text, size_t length, const char *expected,
                          int expected_status) {
    struct guest_command command = {.nonce = NONCE, .text = text, .length = length};
    check_guest_command(shell, &command, "", expected, expected_status, true);
}

static void words_are_run_as_they_stand_in_every_shell(void) {
    static const struct {
        const char *words;
        size_t length;
        const char *output;
        int status;
        bool marked;
    } rows[] = {
#define WORDS(words) words, sizeof(words) - 1
        {WORDS("printf\0<%s>\0a b\0\0c'd\0$HOME `x` \\ *\0"), "<a b><><c'd><$HOME `x` \\ *>", 0,
         false},
        {WORDS("printf\0%s\0two\nlines\n\0"), "two\nlines\n", 0, false},
        {WORDS("sh\0-c\0echo $0 \"$@\"\0a b\0\0c'd\0"), "a b  c'd\n", 0, false},
        {WORDS("sh\0-c\0exit 7\0"), "", 7, false},
        {WORDS("sh\0-c\0kill -TERM $$\0"), "", 128 + SIGTERM, false},
        {WORDS("cat\0"), "input\n", 0, false},
        {WORDS("printenv\0FROM_FILE\0"), "two\nlines\n", 0, false},
        {WORDS("printenv\0OWN\0"), "it's\nown\n", 0, false},
        {WORDS("pwd\0"), "/usr\n", 0, false},
        {WORDS("umask\0"
               "022\0"),
         "", 0, true},
        {WORDS("exit\0"
               "3\0"),
         "", 3, true},
#undef WORDS
    };
    cleanup_buf struct buf exports = {0};
    guest_linux.command_export(&exports, "OWN", "it's\nown", 8);
    for (size_t s = 0; s < sizeof shells / sizeof *shells; s++)
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            struct guest_command command = {.nonce = NONCE,
                                            .words = true,
                                            .input = true,
                                            .folder = "/usr",
                                            .exports = &exports,
                                            .text = rows[i].words,
                                            .length = rows[i].length};
            check_guest_command(shells[s], &command, "input\n", rows[i].output, rows[i].status,
                                rows[i].marked);
        }
}

static void a_folder_that_is_not_there_is_an_error_of_the_command(void) {
    struct guest_command command = {
        .nonce = NONCE, .folder = "/no such folder", .text = "echo never", .length = 10};
    for (size_t s = 0; s < sizeof shells / sizeof *shells; s++)
        check_guest_command(shells[s], &command, "", "", 1, true);
}

static void a_shell_ended_by_a_signal_is_no_success(void) {
    static const struct {
        const char *text;
        int number;
    } rows[] = {{"true; kill -TERM $$; sleep 5", SIGTERM},
                {"true; kill -HUP $$; sleep 5", SIGHUP},
                {"true; kill -SEGV $$; sleep 5", SIGSEGV},
                {"true; kill -KILL $$; sleep 5", SIGKILL},
                {"true; sh -c 'kill -TERM '$$'; sleep 0.1'", SIGTERM}};
    for (size_t s = 0; s < sizeof shells / sizeof *shells; s++)
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            struct guest_command command = {
                .nonce = NONCE, .text = rows[i].text, .length = strlen(rows[i].text)};
            /* zsh makes an exit with status 1 of a HUP, in order. */
            bool exits = rows[i].number == SIGHUP && strstr(shells[s], "zsh");
            check_guest_command(shells[s], &command, "", "", exits ? 1 : 128 + rows[i].number,
                                exits);
        }
}

static void signals_are_known_by_name(void) {
    CHECK(guest_linux.signal_is_known("TERM") && guest_linux.signal_is_known("WINCH"));
    CHECK(!guest_linux.signal_is_known("") && !guest_linux.signal_is_known("TERM; reboot"));
}

static void commands_run_and_end_with_a_marker_in_every_shell(void) {
    static const struct {
        const char *command, *output;
        int status;
    } rows[] = {
        {"echo hi", "hi\n", 0},
        {"exit 7", "", 7},
        {"false", "", 1},
        {"(exit 3)", "", 3},
        {"echo \"it's\" 'a \"b\"' \\\\", "it's a \"b\" \\\n", 0},
        {"echo one\necho two", "one\ntwo\n", 0},
        {"cat <<'X'\na 'b'\nX\n:", "a 'b'\n", 0},
        {"cd /; pwd", "/\n", 0},
        {"read x; echo \"<$x>\"", "<>\n", 0}, /* its input is empty, not ours */
        {"printf %s \"$FROM_FILE\"", "two\nlines", 0},
        {"", "", 0},
    };
    for (size_t s = 0; s < sizeof shells / sizeof *shells; s++)
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
            check_command(shells[s], rows[i].command, strlen(rows[i].command), rows[i].output,
                          rows[i].status);
}

static void long_commands_run_in_every_shell(void) {
    cleanup_buf struct buf command = {0};
    buf_append_str(&command, "x='");
    while (command.len < 100000)
        buf_append_str(&command, "0123456789 $x \"quoted\" \n");
    buf_append_str(&command, "'; echo ${#x}; exit 5");
    char expected[32];
    snprintf(expected, sizeof expected, "%zu\n", command.len - strlen("x=''; echo ${#x}; exit 5"));
    for (size_t s = 0; s < sizeof shells / sizeof *shells; s++)
        check_command(shells[s], command.data, command.len, expected, 5);
    /* The reader of a long one may take more than its part: its input has to wait. */
    struct guest_command waits = {
        .nonce = NONCE, .input = true, .text = command.data, .length = command.len};
    for (size_t s = 0; s < sizeof shells / sizeof *shells; s++)
        check_guest_command(shells[s], &waits, "", expected, 5, true);
}

static void the_env_file_is_replaced_only_as_it_was_seen(void) {
    static const char file[] = "/tmp/vmsfs-test-guest-file";
    static const char *const control_shells[] = {"/bin/dash", "/bin/bash", "/bin/busybox"};
    for (size_t s = 0; s < sizeof control_shells / sizeof *control_shells; s++) {
        cleanup_buf struct buf none = {0}, script = {0}, out = {0}, err = {0}, expected = {0};
        struct {
            const char *before; /* what others do */
            bool read, absent;
            int status;
        } rows[] = {
            {"rm -f \"$F\"", true, false, GUEST_ABSENT},
            {":", false, true, 0},
            {":", false, false, 0},
            {"echo long and stale, of a shell that was killed >\"$F.tmp\"", false, false, 0},
            {"[ \"$(cat \"$F\")\" = \"export A='1'\" ] && [ ! -e \"$F.tmp\" ] || exit", false,
             false, 0},
            {"echo x >\"$F.n\"; mv \"$F.n\" \"$F\"", false, false, GUEST_CHANGED},
            {":", true, false, 0},
            {":", false, false, 0},
            {":", true, false, 0},
            {"echo y >>\"$F\"", false, false, GUEST_CHANGED},
            {":", true, false, 0},
            {": >\"$F\"", false, false, GUEST_CHANGED},
            {"rm \"$F\"", false, false, GUEST_CHANGED},
            {":", true, false, GUEST_ABSENT},
            {"echo z >\"$F\"", false, true, GUEST_CHANGED},
        };
        buf_printf(&script, "F=%s; VMSFS_SEEN=%s.seen; exec 8>>$VMSFS_SEEN\n", file, file);
        guest_linux.control_hello(&none, NULL);
        guest_linux.control_request(&script, NONCE, none.data, none.len);
        buf_clear(&none);
        buf_append_str(&script, "[ ! -e \"$VMSFS_SEEN\" ] || exit\n");
        buf_append_str(&expected, "0 ");
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            cleanup_buf struct buf one = {0};
            if (rows[i].read)
                guest_linux.env_read(&one, file);
            else
                guest_linux.env_replace(&one, file, "export A='1'\n", 13, rows[i].absent);
            buf_printf(&script, "%s\n", rows[i].before);
            guest_linux.control_request(&script, NONCE, one.data, one.len);
            buf_printf(&expected, "%d ", rows[i].status);
        }
        buf_printf(&script, "rm -f \"$F\"\n");
        shell_run(control_shells[s], script.data, &none, &out, &err);
        size_t rest = 0;
        cleanup_buf struct buf statuses = {0};
        for (size_t i = 0; i <= sizeof rows / sizeof *rows; i++) {
            size_t before, after;
            int status = -1;
            if (!guest_marker_find(out.data + rest, out.len - rest, NONCE, &before, &after,
                                   &status))
                break;
            rest += after;
            buf_printf(&statuses, "%d ", status);
        }
        CHECK_SAID(statuses.data && !strcmp(statuses.data, expected.data), "%s: %s, not %s",
                   control_shells[s], statuses.data ? statuses.data : "", expected.data);
    }
}

int main(void) {
    signal(SIGPIPE, SIG_IGN);
    FILE *env = fopen(ENV_FILE, "w");
    if (env) {
        fputs("export FROM_FILE='two\nlines'\n", env);
        fclose(env);
    }
    a_marker_is_found_wherever_it_is_cut();
    what_only_looks_like_a_marker_is_output();
    facts_are_read_from_the_hello();
    commands_run_and_end_with_a_marker_in_every_shell();
    long_commands_run_in_every_shell();
    words_are_run_as_they_stand_in_every_shell();
    a_folder_that_is_not_there_is_an_error_of_the_command();
    a_shell_ended_by_a_signal_is_no_success();
    signals_are_known_by_name();
    the_env_file_is_replaced_only_as_it_was_seen();
    unlink(ENV_FILE);
    return check_end();
}
