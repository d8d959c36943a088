#include "vm/command.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest/guest.h"
#include "ssh/ssh.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "util/random.h"
#include "vm/control.h"
#include "vm/target.h"

/* Commands run in shells that are started ahead of them: opening a channel and starting a shell is
 * most of what a short command costs. One such shell, the spare, is kept for each VM. */

#define COMMAND_ERRORS_KEPT 2048 /* bytes of stderr that `error` may quote */
#define COMMAND_SPARE_MS 20   /* from a command's start to that of the next spare: out of its way */
#define COMMAND_LINGER_MS 300 /* from one stream's end to giving up on the other's */
#define COMMAND_POOL_IDLE_MS 60000 /* a connection beyond the first, without commands */
#define COMMAND_START_MOST                                                                         \
    4096 /* bytes before the shell's first words that are looked at together */
#define COMMAND_FINISHED_MOST 16 /* shells whose command has ended and whose channel has not */
#define COMMAND_QUOTED 200       /* bytes of a command that messages quote */

/* What came on one stream and may be the beginning of the end marker. */
struct command_stream {
    struct buf held;
    bool begun; /* the shell's first words have come */
    bool ended; /* the marker has come */
};

/* A shell in the guest, spare or running its one command. */
struct command_shell {
    struct commands *commands;
    struct ssh_channel *channel;
    struct list link;        /* in commands->shells */
    struct command *command; /* NULL: spare. A reference */
    long pid;            /* of the shell, in the process group of all it starts; 0: not known yet */
    unsigned kill_grace; /* s; 0: nobody wants it to end */
    bool ready_wanted;   /* GUEST_READY is to come */
    bool input_over;     /* no more comes after what is in `input` */
    bool exited;         /* its process has ended: its output may still be under way */
    bool paused;         /* its readers hold it back */
    bool finished;       /* only the server's CLOSE is still to come */
    bool closed;         /* it has come */
    struct command_stream out, err;
    struct buf input; /* kept back until GUEST_READY has come */
    int marker_status;
    uv_timer_t *timer; /* KILL, or the end of lingering; NULL: none */
};

struct commands {
    struct vm *vm;         /* the owner */
    struct ssh_pool *pool; /* NULL: the guest is not reached */
    struct command_shell *spare;
    struct list shells;   /* of command_shell: spare and running */
    struct list finished; /* of command_shell */
    unsigned finished_count;
    struct command *newest; /* a reference; NULL: none */
    uv_timer_t *spare_timer;
    uint64_t started, failed; /* counters */
};

struct commands *commands_new(struct vm *vm) {
    struct commands *commands = calloc(1, sizeof *commands);
    if (!commands)
        return NULL;
    commands->spare_timer = malloc(sizeof *commands->spare_timer);
    if (!commands->spare_timer) {
        free(commands);
        return NULL;
    }
    uv_timer_init(vm->daemon->loop, commands->spare_timer);
    commands->spare_timer->data = commands;
    commands->vm = vm;
    list_init(&commands->shells);
    list_init(&commands->finished);
    return commands;
}

struct command *command_ref(struct command *command) {
    command->refs++;
    return command;
}

void command_unref(struct command *command) {
    if (--command->refs > 0)
        return;
    spool_free(&command->out);
    spool_free(&command->err);
    buf_free(&command->errors);
    free(command->name);
    free(command->text);
    vm_unref(command->vm);
    free(command);
}

struct command *command_newest(struct vm *vm) {
    return vm->commands ? vm->commands->newest : NULL;
}

void command_set_newest(struct command *command) {
    struct commands *commands = command->vm->commands;
    if (!commands)
        return;
    if (commands->newest)
        command_unref(commands->newest);
    commands->newest = command_ref(command);
}

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

static void shell_free(struct command_shell *shell) {
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

static void commands_want_spare(struct commands *commands, unsigned ms);

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

/* KILL has been sent in the guest; what the server says of it is not waited for. */
static void shell_killed(uv_timer_t *timer) {
    struct command_shell *shell = timer->data;
    snprintf(shell->command->signal, sizeof shell->command->signal, "KILL");
    if (!shell->pid) /* it has not even begun, and must not begin later */
        shell->closed = true;
    shell_end(shell, COMMAND_SIGNALED);
}

static void shell_kill(struct command_shell *shell, unsigned grace_s) {
    shell->kill_grace = grace_s;
    shell_timer(shell, shell_killed, grace_s * 1000 + COMMAND_LINGER_MS);
    if (shell->pid)
        shell_send_kill(shell);
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
    if (shell->kill_grace)
        shell_send_kill(shell);
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
    if (s->ended || shell->finished)
        return; /* of a process that lives on in the background */
    buf_append(&s->held, data, length);
    if (!s->begun)
        shell_begin(shell, s);
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
    if (!shell->paused && (spool_is_full(&command->out) || spool_is_full(&command->err))) {
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

static void shell_over(void *arg, const struct ssh_exit *exit) {
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
        snprintf(command->signal, sizeof command->signal, "%s", exit->signal);
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
        snprintf(shell->command->signal, sizeof shell->command->signal, "%s", exit->signal);
    shell->marker_status = exit->status;
    shell->exited = true;
    shell_timer(shell, shell_linger_over, COMMAND_LINGER_MS);
}

static struct command_shell *shell_open(struct commands *commands, bool ahead) {
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
    list_append(&commands->shells, &shell->link);
    if (ssh_pool_exec(commands->pool, text.data, &events, shell, &shell->channel) < 0) {
        shell_free(shell);
        return NULL;
    }
    return shell;
}

static void commands_open_spare(uv_timer_t *timer) {
    struct commands *commands = timer->data;
    if (commands->pool && !commands->spare)
        commands->spare = shell_open(commands, true);
}

static void commands_want_spare(struct commands *commands, unsigned ms) {
    uv_timer_start(commands->spare_timer, commands_open_spare, ms, 0);
}

void commands_start(struct commands *commands) {
    struct ssh_target target;
    if (commands->pool || !vm_target(commands->vm, &target))
        return;
    if (ssh_pool_new(commands->vm->daemon->loop, &target, COMMAND_POOL_IDLE_MS, &commands->pool) <
        0) {
        log_error("%s: no memory for command connections", commands->vm->id);
        return;
    }
    commands_want_spare(commands, 0);
}

void commands_stop(struct commands *commands, int status, const char *why) {
    uv_timer_stop(commands->spare_timer);
    while (!list_is_empty(&commands->shells)) {
        struct command_shell *shell = LIST_OWNER(commands->shells.next, struct command_shell, link);
        struct ssh_exit exit = {.end = SSH_LOST, .error = status, .why = why};
        shell_over(shell, &exit);
    }
    while (!list_is_empty(&commands->finished))
        shell_free(LIST_OWNER(commands->finished.next, struct command_shell, link));
    if (commands->pool) {
        struct ssh_pool *pool = commands->pool;
        commands->pool = NULL;
        ssh_pool_close(pool);
    }
}

void commands_hold(struct commands *commands, bool hold) {
    if (commands->pool)
        ssh_pool_hold(commands->pool, hold);
}

bool commands_are_running(const struct commands *commands) {
    for (const struct list *l = commands->shells.next; l != &commands->shells; l = l->next)
        if (LIST_OWNER(l, struct command_shell, link)->command)
            return true;
    return false;
}

void commands_kill_all(struct commands *commands) {
    for (struct list *l = commands->shells.next; l != &commands->shells; l = l->next) {
        struct command_shell *shell = LIST_OWNER(l, struct command_shell, link);
        if (shell->command && !shell->kill_grace)
            shell_kill(shell, COMMAND_KILL_S);
    }
}

void commands_free(struct commands *commands) {
    if (!commands)
        return;
    commands_stop(commands, -ERR_GONE, "the VM is gone");
    if (commands->newest)
        command_unref(commands->newest);
    uv_close((uv_handle_t *)commands->spare_timer, (uv_close_cb)free);
    free(commands);
}

/* The beginning of a command, as a user would write it. */
static char *command_summary(const struct guest_command *guest) {
    cleanup_buf struct buf text = {0};
    size_t most = guest->length;
    while (most > COMMAND_QUOTED && most > 0 && (guest->text[most - 1] & 0xc0) == 0x80)
        most--;
    bool cut = most > COMMAND_QUOTED;
    if (cut)
        for (most = COMMAND_QUOTED; most > 0 && (guest->text[most] & 0xc0) == 0x80;)
            most--;
    for (size_t i = 0; i < most; i++)
        if (guest->text[i])
            buf_append_char(&text, guest->text[i]);
        else if (i + 1 < guest->length)
            buf_append_char(&text, ' ');
    if (cut)
        buf_append_str(&text, "…");
    return buf_steal(&text, NULL);
}

static struct command *command_new(struct vm *vm, const struct command_spec *spec) {
    struct command *command = calloc(1, sizeof *command);
    if (!command)
        return NULL;
    command->refs = 1;
    command->vm = vm_ref(vm);
    list_init(&command->waits);
    list_init(&command->input_waits);
    spool_init(&command->out, spec->output_max, spec->flowing);
    spool_init(&command->err, spec->output_max, spec->flowing);
    command->apart = spec->apart;
    command->name = strdup(spec->name);
    command->text = command_summary(&spec->guest);
    if (!command->name || !command->text || random_nonce(command->nonce) < 0) {
        command_unref(command);
        return NULL;
    }
    return command;
}

struct command *command_restore(struct vm *vm, const char *name) {
    const struct command_spec spec = {
        .name = name, .guest = {.text = ""}, .apart = true, .output_max = SPOOL_LIMIT_MOST};
    return command_new(vm, &spec);
}

static int command_check(struct vm *vm, const struct command_spec *spec) {
    const struct guest_command *guest = &spec->guest;
    if (guest->length > COMMAND_LIMIT)
        return vm_fail(vm, -ERR_COMMAND_TOO_LARGE, "%s: a command takes %d bytes at most",
                       spec->name, COMMAND_LIMIT);
    if (!guest->words && memchr(guest->text, 0, guest->length))
        return vm_fail(vm, -ERR_INVALID, "%s: a command holds no NUL byte", spec->name);
    return vm_check_running(vm);
}

int command_run(struct vm *vm, const struct command_spec *spec, struct command **ret_command) {
    struct commands *commands = vm->commands;
    int r = command_check(vm, spec);
    if (r < 0)
        return r;
    if (!commands->pool)
        return -ERR_UNREACHABLE;
    struct command *command = command_new(vm, spec);
    if (!command)
        return -ERR_NO_MEMORY;
    struct command_shell *shell =
        commands->spare ? commands->spare : shell_open(commands, spec->signalled);
    if (!shell) {
        command_unref(command);
        return -ERR_NO_MEMORY;
    }
    commands->spare = NULL;
    shell->command = command_ref(command);
    command->shell = shell;

    cleanup_buf struct buf start = {0};
    struct guest_command guest = spec->guest;
    guest.nonce = command->nonce;
    shell->ready_wanted = vm->guest->command_start(&start, &guest);
    r = start.failed || ssh_channel_write(shell->channel, start.data, start.len) < 0
            ? -ERR_UNREACHABLE
            : 0;
    if (start.data)
        explicit_bzero(start.data, start.len);
    if (r < 0) {
        command_unref(shell->command);
        shell->command = NULL;
        shell_free(shell);
        command_unref(command);
        return r;
    }
    if (!guest.input)
        ssh_channel_eof(shell->channel);
    commands->started++;
    vm_use(vm);
    commands_want_spare(commands, COMMAND_SPARE_MS);
    *ret_command = command;
    return 0;
}

ssize_t command_input(struct command *command, const char *data, size_t length) {
    struct command_shell *shell = command->shell;
    if (!shell || shell->input_over)
        return -ERR_NO_READER;
    if (!shell->ready_wanted) {
        ssize_t waiting = ssh_channel_write(shell->channel, data, length);
        return waiting < 0 ? -ERR_NO_READER : waiting;
    }
    buf_append(&shell->input, data, length);
    return shell->input.failed ? -ERR_NO_MEMORY : (ssize_t)shell->input.len;
}

void command_input_end(struct command *command) {
    struct command_shell *shell = command->shell;
    if (!shell || shell->input_over)
        return;
    shell->input_over = true;
    if (!shell->ready_wanted)
        ssh_channel_eof(shell->channel);
}

void command_has_read(struct command *command, struct spool *spool, uint64_t offset) {
    struct command_shell *shell = command->shell;
    spool_release(spool, offset);
    if (!shell || !shell->paused || !spool_has_room(&command->out) ||
        !spool_has_room(&command->err))
        return;
    shell->paused = false;
    ssh_channel_pause(shell->channel, false);
}

void command_kill(struct command *command, unsigned grace_s) {
    if (command->end == COMMAND_RUNNING && command->shell)
        shell_kill(command->shell, grace_s);
}

static void command_signaled(void *arg, int status, const char *output, size_t length) {
    struct list *waits = arg;
    (void)output;
    (void)length;
    vm_wait_wake(waits, status > 0 ? -ERR_BUSY : status);
    free(waits);
}

int command_signal(struct command *command, const char *signal, unsigned grace_s,
                   struct vm_wait *wait) {
    struct vm *vm = command->vm;
    cleanup_buf struct buf script = {0};
    if (command->end != COMMAND_RUNNING || !command->shell || !command->shell->pid)
        return -ERR_BUSY;
    struct list *waits = malloc(sizeof *waits);
    if (!waits)
        return -ERR_NO_MEMORY;
    list_init(waits);
    vm->guest->command_signal(&script, command->shell->pid, signal, grace_s);
    int r = script.failed ? -ERR_NO_MEMORY
                          : control_request(vm->control, &script, command_signaled, waits);
    if (r < 0) {
        free(waits);
        return r;
    }
    list_append(waits, &wait->link);
    return 0;
}

int command_verdict(struct command *command) {
    if (command->end == COMMAND_EXITED && command->status == 0)
        return 0;
    if (command->end == COMMAND_LOST || command->end == COMMAND_REFUSED)
        return command->error;
    struct buf text = {0};
    buf_printf(&text, "%s: `%s", command->name, command->text);
    if (command->end == COMMAND_SIGNALED)
        buf_printf(&text, "` was ended by signal %s", command->signal);
    else
        buf_printf(&text, "` exited with status %d", command->status);
    if (command->errors.len) {
        size_t skip = command->errors.len > COMMAND_ERRORS_KEPT
                          ? command->errors.len - COMMAND_ERRORS_KEPT
                          : 0;
        size_t length = command->errors.len - skip;
        while (length && command->errors.data[skip + length - 1] == '\n')
            length--;
        buf_append_str(&text, "; it said: ");
        buf_append(&text, command->errors.data + skip, length);
    }
    log_info("%s: a command failed (status %d)", command->vm->id, command->status);
    vm_set_error(command->vm, &text);
    return -ERR_COMMAND_FAILED;
}

void commands_describe(const struct commands *commands, json_t *info) {
    json_object_set_new(info, "commands", json_integer((json_int_t)commands->started));
    json_object_set_new(info, "commands_failed", json_integer((json_int_t)commands->failed));
    json_object_set_new(
        info, "connections",
        json_integer(commands->pool ? (json_int_t)ssh_pool_connections(commands->pool) : 0));
}
