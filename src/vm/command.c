#include "vm/command.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest/guest.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "util/random.h"
#include "vm/command_internal.h"
#include "vm/orphans.h"
#include "vm/target.h"

/* What others ask of commands; see vm/command_internal.h. */

#define COMMAND_POOL_IDLE_MS 60000 /* a connection beyond the first, without commands */
#define COMMAND_QUOTED 200         /* bytes of a command that messages quote */

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

static void commands_open_spare(uv_timer_t *timer) {
    struct commands *commands = timer->data;
    if (commands->pool && !commands->spare)
        commands->spare = shell_open(commands, true);
}

void commands_want_spare(struct commands *commands, unsigned ms) {
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
    orphans_end(commands->vm->orphans);
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
    if (shell->pid)
        shell->place = orphans_note(vm->orphans, shell->pid);

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

int command_signal(struct command *command, const char *signal, unsigned grace_s,
                   struct vm_wait *wait) {
    struct command_shell *shell = command->shell;
    if (command->end != COMMAND_RUNNING || !shell)
        return -ERR_BUSY;
    struct list waits;
    list_init(&waits);
    list_append(&waits, &wait->link);
    if (shell->pid) {
        int r = shell_send_signal(shell, signal, grace_s, &waits);
        list_remove(&waits);
        return r;
    }
    shell_keep_signal(shell, signal, grace_s, &waits);
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
