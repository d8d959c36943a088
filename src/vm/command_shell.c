#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest/guest.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/command_internal.h"
#include "vm/control.h"
#include "vm/orphans.h"

/* A shell in the guest that runs one command: its start, its output, its signals and its end. */

#define COMMAND_LINGER_MS 300 /* from one stream's end to giving up on the other's */
#define COMMAND_START_MOST                                                                         \
    4096 /* bytes before the shell's first words that are looked at together */
#define COMMAND_FINISHED_MOST 16 /* shells whose command has ended and whose channel has not */

static void shell_timer(struct command_shell *shell, uv_timer_cb cb, unsigned ms) {
    if (!shell->timer) {
        shell->timer = malloc(sizeof *shell->timer);
        if (!shell->timer)
            return;
        uv_timer_init(shell->commands->vm->daemon->loop, shell->timer);
        shell->timer->data = shell;
    }
    uv_timer_start(shell->timer, cb, ms, 0);
}

static void shell_stop_timer(struct command_shell *shell) {
    if (!shell->timer)
        return;
    uv_timer_stop(shell->timer);
    uv_close((uv_handle_t *)shell->timer, (uv_close_cb)free);
    shell->timer = NULL;
}

static void shell_forget_input(struct command_shell *shell) {
    if (shell->input.data)
        explicit_bzero(shell->input.data, shell->input.len);
    buf_free(&shell->input);
}

void shell_free(struct command_shell *shell) {
    if (shell->commands->spare == shell)
        shell->commands->spare = NULL;
    list_remove(&shell->link);
    shell->commands->finished_count -= shell->finished;
    shell_stop_timer(shell);
    if (shell->channel)
        ssh_channel_close(shell->channel);
    buf_free(&shell->out.held);
    buf_free(&shell->err.held);
    shell_forget_input(shell);
    free(shell);
}

/* Puts output into its spool. */
static void command_output(struct command *command, int stream, const char *data, size_t length) {
    struct spool *spool = stream == 2 && command->apart ? &command->err : &command->out;
    if (!length)
        return;
    int r = spool_write(spool, command->vm->dir, data, length);
    if (r < 0)
        vm_fail(command->vm, r == -EFBIG ? -ERR_CUT : -ERR_NO_ROOM,
                "%s: output is cut after %llu bytes: %s", command->name,
                (unsigned long long)spool->end,
                r == -EFBIG ? "more is not kept (output_max)" : strerror(-r));
    if (stream == 2) {
        buf_append(&command->errors, data, length);
        if (command->errors.len > 2 * COMMAND_ERRORS_KEPT)
            buf_consume(&command->errors, command->errors.len - COMMAND_ERRORS_KEPT);
    }
}

/* The command has ended, its channel not yet. It is left to the server to close it: when a client
 * closes first, dropbear 2022.83 ends the whole connection as soon as both streams of the shell end
 * at once (an assertion in its send_msg_channel_data()). A process in the background may keep such
 * a channel open for as long as it runs. */
static void shell_finish(struct command_shell *shell) {
    struct commands *commands = shell->commands;
    if (commands->finished_count == COMMAND_FINISHED_MOST)
        shell_free(LIST_OWNER(commands->finished.next, struct command_shell, link));
    shell_stop_timer(shell);
    buf_free(&shell->out.held);
    buf_free(&shell->err.held);
    shell_forget_input(shell);
    if (shell->paused)
        ssh_channel_pause(shell->channel, false);
    ssh_channel_eof(shell->channel);
    shell->command = NULL;
    shell->finished = true;
    commands->finished_count++;
    list_remove(&shell->link);
    list_append(&commands->finished, &shell->link);
}

/* The command is over; what is still held back of its output belongs to it. */
static void shell_end(struct command_shell *shell, enum command_end end) {
    struct commands *commands = shell->commands;
    struct command *command = shell->command;
    struct list unsent;
    list_init(&unsent);
    list_splice(&unsent, &shell->signal_waits);
    if (end == COMMAND_LOST)
        orphans_leave(commands->vm->orphans, shell->place);
    else
        orphans_forget(commands->vm->orphans, shell->place);
    shell->place = -1;
    if (command) {
        if (shell->out.begun && !shell->out.ended)
            command_output(command, 1, shell->out.held.data, shell->out.held.len);
        if (shell->err.begun && !shell->err.ended)
            command_output(command, 2, shell->err.held.data, shell->err.held.len);
        command->end = end;
        command->shell = NULL;
        vm_use(commands->vm);
        commands->failed += end != COMMAND_EXITED || command->status != 0;
    }
    if (shell->closed || !command)
        shell_free(shell);
    else
        shell_finish(shell);
    if (commands->pool && !commands->spare)
        commands_want_spare(commands, 0);
    if (command) {
        vm_wait_wake(&command->waits, 0);
        vm_wait_wake(&command->input_waits, -ERR_NO_READER);
        command_unref(command);
    }
    vm_wait_wake(&unsent, -ERR_BUSY);
}

/* RFC 4254, 6.10, names some signals; what a server says of others has an @, or is nothing. */
static void command_set_signal(struct command *command, const char *signal) {
    snprintf(command->signal, sizeof command->signal, "%s",
             signal[0] && !strchr(signal, '@') ? signal : COMMAND_SIGNAL_UNNAMED);
}

static void shell_linger_over(uv_timer_t *timer) {
    struct command_shell *shell = timer->data;
    if (shell->paused) { /* there is more, that nobody has room for */
        shell_timer(shell, shell_linger_over, COMMAND_LINGER_MS);
        return;
    }
    shell->command->status = shell->marker_status;
    shell_end(shell, shell->command->signal[0] ? COMMAND_SIGNALED : COMMAND_EXITED);
}

static void control_ignore(void *arg, int status, const char *output, size_t length) {
    (void)arg;
    (void)status;
    (void)output;
    (void)length;
}

static void shell_send_kill(struct command_shell *shell) {
    struct vm *vm = shell->commands->vm;
    cleanup_buf struct buf script = {0};
    vm->guest->command_signal(&script, shell->pid, "TERM", shell->kill_grace);
    if (script.failed || control_request(vm->control, &script, control_ignore, NULL) < 0)
        log_warn("%s: a command could not be ended in the guest: no connection", vm->id);
}

/* It waits for a place: it need never begin. Else it is ended when it does. */
static bool shell_is_unbegun(const struct command_shell *shell) {
    return !shell->pid && !ssh_channel_is_asked(shell->channel);
}

/* KILL has been sent in the guest; what the server says of it is not waited for. */
static void shell_killed(uv_timer_t *timer) {
    struct command_shell *shell = timer->data;
    shell->closed = shell_is_unbegun(shell);
    command_set_signal(shell->command, shell->closed ? "TERM" : "KILL");
    shell_end(shell, COMMAND_SIGNALED);
}

void shell_kill(struct command_shell *shell, unsigned grace_s) {
    shell->kill_grace = grace_s;
    shell_timer(shell, shell_killed,
                shell_is_unbegun(shell) ? 0 : grace_s * 1000 + COMMAND_LINGER_MS);
    if (shell->pid)
        shell_send_kill(shell);
}

static void shell_unbegun_over(uv_timer_t *timer) {
    struct command_shell *shell = timer->data;
    if (!shell_is_unbegun(shell))
        return;
    command_set_signal(shell->command, shell->signal);
    shell->closed = true;
    vm_wait_wake(&shell->signal_waits, 0);
    shell_end(shell, COMMAND_SIGNALED);
}

void shell_keep_signal(struct command_shell *shell, const char *signal, unsigned grace_s,
                       struct list *waits) {
    static const char *const endings[] = {"HUP", "INT", "QUIT", "KILL", "TERM"};
    snprintf(shell->signal, sizeof shell->signal, "%s", signal);
    shell->signal_grace = grace_s;
    list_splice(&shell->signal_waits, waits);
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if (strcmp(signal, endings[i]) == 0 && shell_is_unbegun(shell) && !shell->kill_grace)
            shell_timer(shell, shell_unbegun_over, 0);
}

struct command_signal_sent {
    struct command *command; /* a reference */
    struct list waits;       /* of vm_wait */
};

static void shell_await_end(struct command_shell *shell);

static void command_signaled(void *arg, int status, const char *output, size_t length) {
    struct command_signal_sent *sent = arg;
    (void)output;
    (void)length;
    vm_wait_wake(&sent->waits, status > 0 ? -ERR_BUSY : status);
    if (sent->command->shell)
        shell_await_end(sent->command->shell);
    command_unref(sent->command);
    free(sent);
}

/* Takes the waits over, which are told when it is done. -ERR_…: they are left. */
int shell_send_signal(struct command_shell *shell, const char *signal, unsigned grace_s,
                      struct list *waits) {
    struct vm *vm = shell->commands->vm;
    cleanup_buf struct buf script = {0};
    struct command_signal_sent *sent = malloc(sizeof *sent);
    if (!sent || !shell->command) {
        free(sent);
        return sent ? -ERR_BUSY : -ERR_NO_MEMORY;
    }
    sent->command = command_ref(shell->command);
    list_init(&sent->waits);
    vm->guest->command_signal(&script, shell->pid, signal, grace_s);
    int r = script.failed ? -ERR_NO_MEMORY
                          : control_request(vm->control, &script, command_signaled, sent);
    if (r < 0) {
        command_unref(sent->command);
        free(sent);
        return r;
    }
    list_splice(&sent->waits, waits);
    return 0;
}

/* A command that is held back and has got a signal: a server that tells of its end behind its
 * output only (dropbear) would not, as nobody takes that. So the guest is asked. */
#define COMMAND_AWAIT_MS 300

static void command_is_there(void *arg, int status, const char *output, size_t length) {
    struct command *command = arg;
    struct command_shell *shell = command->shell;
    (void)output;
    (void)length;
    if (shell && status > 0 && shell->paused) {
        shell->draining = true;
        shell->paused = false;
        ssh_channel_pause(shell->channel, false);
    }
    if (shell) {
        shell->awaited = false;
        if (status == 0)
            shell_await_end(shell);
    }
    command_unref(command);
}

static void shell_ask_end(uv_timer_t *timer) {
    struct command_shell *shell = timer->data;
    struct vm *vm = shell->commands->vm;
    cleanup_buf struct buf script = {0};
    vm->guest->command_exists(&script, shell->pid);
    command_ref(shell->command);
    if (script.failed ||
        control_request(vm->control, &script, command_is_there, shell->command) < 0) {
        shell->awaited = false;
        command_unref(shell->command);
    }
}

static void shell_await_end(struct command_shell *shell) {
    if (shell->awaited || shell->kill_grace || !shell->paused)
        return;
    shell->awaited = true;
    shell_timer(shell, shell_ask_end, COMMAND_AWAIT_MS);
}

/* Waits for the shell's first words, dropping what its start-up files or its login have said
 * before. */
static void shell_begin(struct command_shell *shell, struct command_stream *s) {
    static const char start[] = GUEST_SHELL_START;
    char *at = s->held.len ? memmem(s->held.data, s->held.len, start, sizeof start - 1) : NULL;
    char *end = at ? memchr(at, '\n', s->held.len - (size_t)(at - s->held.data)) : NULL;
    if (!end) {
        if (!at && s->held.len > COMMAND_START_MOST)
            buf_consume(&s->held, s->held.len - sizeof start);
        return;
    }
    long pid = strtol(at + sizeof start - 1, NULL, 10);
    s->begun = true;
    buf_consume(&s->held, (size_t)(end - s->held.data) + 1);
    if (shell->pid || pid <= 1)
        return;
    shell->pid = pid;
    if (shell->command)
        shell->place = orphans_note(shell->commands->vm->orphans, pid);
    if (shell->kill_grace)
        shell_send_kill(shell);
    if (shell->signal[0])
        shell_send_signal(shell, shell->signal, shell->signal_grace, &shell->signal_waits);
}

/* Before anything of the command's, the word that its text has been taken in. */
static bool shell_is_ready(struct command_shell *shell) {
    static const char ready[] = GUEST_READY;
    struct command_stream *s = &shell->out;
    if (!shell->ready_wanted)
        return true;
    if (!s->begun || !memchr(s->held.data, '\n', s->held.len))
        return false;
    size_t line = sizeof ready - 1 + strlen(shell->command->nonce) + 1;
    shell->ready_wanted = false;
    if (s->held.len >= line && memcmp(s->held.data, ready, sizeof ready - 1) == 0)
        buf_consume(&s->held, line);
    ssh_channel_write(shell->channel, shell->input.data ? shell->input.data : "", shell->input.len);
    shell_forget_input(shell);
    if (shell->input_over)
        ssh_channel_eof(shell->channel);
    vm_wait_wake(&shell->command->input_waits, 0);
    return true;
}

static void shell_data(void *arg, int stream, const char *data, size_t length) {
    struct command_shell *shell = arg;
    struct command_stream *s = stream == 1 ? &shell->out : &shell->err;
    if (s->ended || (shell->finished && (shell->pid || !shell->kill_grace)))
        return; /* of a process that lives on in the background */
    buf_append(&s->held, data, length);
    if (!s->begun)
        shell_begin(shell, s);
    if (shell->finished) {
        buf_free(&s->held);
        return;
    }
    if (s->held.failed || (!shell->command && s->held.len > COMMAND_ERRORS_KEPT)) {
        shell_end(shell, COMMAND_LOST);
        return;
    }
    if (!shell->command || !s->begun || !s->held.len || (stream == 1 && !shell_is_ready(shell)))
        return;

    struct command *command = shell->command;
    size_t before, after;
    int status = 0;
    int found =
        guest_marker_find(s->held.data, s->held.len, command->nonce, &before, &after, &status);
    command_output(command, stream, s->held.data, before);
    buf_consume(&s->held, before);
    if (found) {
        s->ended = true;
        buf_free(&s->held);
        shell->marker_status = status;
        if (shell->out.ended && shell->err.ended) {
            command->status = status;
            shell_end(shell, COMMAND_EXITED);
            return;
        }
        if (!shell->kill_grace)
            shell_timer(shell, shell_linger_over, COMMAND_LINGER_MS);
    } else if (shell->exited && !shell->kill_grace) {
        shell_timer(shell, shell_linger_over, COMMAND_LINGER_MS);
    }
    if (!shell->paused && !shell->draining &&
        (spool_is_full(&command->out) || spool_is_full(&command->err))) {
        shell->paused = true;
        ssh_channel_pause(shell->channel, true);
    }
    if (before)
        vm_wait_wake(&command->waits, 0);
}

static void shell_drained(void *arg) {
    struct command_shell *shell = arg;
    if (shell->command)
        vm_wait_wake(&shell->command->input_waits, 0);
}

void shell_over(void *arg, const struct ssh_exit *exit) {
    struct command_shell *shell = arg;
    struct command *command = shell->command;
    enum command_end end = COMMAND_EXITED;
    shell->closed = true;
    if (shell->finished) {
        shell_free(shell);
        return;
    }
    if (!command) {
        log_debug("%s: the shell kept ready has ended: %s", shell->commands->vm->id,
                  exit->why ? exit->why : "");
        shell_free(shell);
        return;
    }
    switch (exit->end) {
    case SSH_EXITED:
        command->status = exit->status;
        break;
    case SSH_SIGNALED:
        end = COMMAND_SIGNALED;
        command_set_signal(command, exit->signal);
        break;
    case SSH_REFUSED:
    case SSH_LOST:
        end = exit->end == SSH_LOST ? COMMAND_LOST : COMMAND_REFUSED;
        command->error = exit->error;
        vm_fail(command->vm, exit->error, "%s: %s: %s", command->name,
                end == COMMAND_LOST ? "what became of the command is not known"
                                    : "the command did not run",
                exit->why);
        break;
    }
    if (shell->out.ended || shell->err.ended) {
        end = COMMAND_EXITED;
        command->status = shell->marker_status;
    }
    shell_end(shell, end);
}

/* The shell itself has ended, without a marker when it was replaced (`exec`) or killed. The channel
 * follows, unless a process in the background holds it. */
static void shell_exited(void *arg, const struct ssh_exit *exit) {
    struct command_shell *shell = arg;
    if (!shell->command || shell->out.ended || shell->err.ended)
        return;
    if (exit->end == SSH_SIGNALED)
        command_set_signal(shell->command, exit->signal);
    shell->marker_status = exit->status;
    shell->exited = true;
    shell_timer(shell, shell_linger_over, COMMAND_LINGER_MS);
}

struct command_shell *shell_open(struct commands *commands, bool ahead) {
    static const struct ssh_channel_events events = {
        .data = shell_data, .drained = shell_drained, .exited = shell_exited, .closed = shell_over};
    struct command_shell *shell = calloc(1, sizeof *shell);
    cleanup_buf struct buf text = {0};
    const struct vm *vm = commands->vm;
    /* Signals go to a process group: to all of the command and to nothing else. Where the server
     * makes none for a command (dropbear), making one costs an exec. A command of `exec` only ever
     * gets TERM and KILL, so if there was no time to start a shell ahead, the group of its
     * connection will do, if it has that to itself. */
    bool new_group = !vm->facts.own_group && (ahead || !ssh_pool_is_exclusive(commands->pool));
    vm->guest->command_shell(&text, &vm->facts, vm->config.env_file, new_group);
    if (!shell || text.failed) {
        free(shell);
        return NULL;
    }
    shell->commands = commands;
    shell->place = -1;
    list_init(&shell->signal_waits);
    list_append(&commands->shells, &shell->link);
    if (ssh_pool_exec(commands->pool, text.data, &events, shell, &shell->channel) < 0) {
        shell_free(shell);
        return NULL;
    }
    return shell;
}
