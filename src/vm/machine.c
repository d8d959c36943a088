#include "vm/machine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/command.h"
#include "vm/control.h"
#include "vm/host_key.h"
#include "vm/vars.h"
#include "vmm/vmm.h"

#define MACHINE_KEY_FILE_MOST 65536

bool machine_is_existing(const struct vm *vm) {
    return vm->vmm && vm->vmm->ops->existing;
}

const char *machine_key_path(const struct vm *vm) {
    return machine_is_existing(vm) && vm->config.key[0] ? vm->config.key : vm->daemon->key_path;
}

const char *machine_host_key_source(const struct vm *vm) {
    if (!vm->host_key.len)
        return NULL;
    if (vm->host_key_learned)
        return "first use";
    return vm->backend && vm->backend->existing ? "file" : "made here";
}

/* For the OpenSSH programs of the host: see vm_ssh_config(). */
static void machine_write_known_hosts(const struct vm *vm) {
    cleanup_buf struct buf path = {0}, line = {0};
    buf_printf(&path, "%s/known_hosts", vm->dir);
    buf_printf(&line, "%s ", vm->id);
    host_key_print(vm->host_key.data, vm->host_key.len, &line);
    buf_append_char(&line, '\n');
    int r = path.failed || line.failed ? -ENOMEM
                                       : fs_replace_fast(path.data, 0600, line.data, line.len);
    if (r < 0)
        log_error("%s: cannot write %s: %s", vm->id, path.data, strerror(-r));
}

void machine_trust(struct vm *vm, const char *key, size_t length) {
    if (vm->gone || vm->attached || !machine_is_existing(vm))
        return;
    if (!vm->host_key.len) {
        cleanup_buf struct buf text = {0};
        host_key_print(key, length, &text);
        buf_append(&vm->host_key, key, length);
        if (vm->host_key.failed)
            return;
        vm->host_key_learned = true;
        log_info("%s: from now on its host key has to be %s", vm->id, text.failed ? "" : text.data);
        vm_save(vm);
    }
    machine_write_known_hosts(vm);
}

/* What the user can do about it. */
static void machine_advise(const struct vm *vm, int status, bool trusted, struct buf *out) {
    if (status != -ERR_DENIED)
        buf_printf(out, "; is it up, with an SSH server on port %u (config/address, config/port)?",
                   vm->config.port);
    else if (trusted)
        buf_printf(out,
                   "; append %s.pub to the authorized_keys of %s there, or name others in "
                   "config/key and config/user",
                   machine_key_path(vm), vm->user);
    else if (vm->host_key_learned)
        buf_append_str(out,
                       ". It was learned at the first connection: if another is right, put that "
                       "into a file and name it in config/host_key");
    else
        buf_printf(out, ". It is that of config/host_key, %s", vm->config.host_key);
}

/* One that did not answer when this daemon found it, or when it went on from a pause, has no words
 * about it yet. */
static void machine_note_silence(struct vm *vm, int status, const char *why) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    bool said = vm->error.len && vm->error_time.tv_sec >= vm->changed.tv_sec;
    unsigned patience = vm->daemon->settings.timeout / 1000;
    if (vm->state == VM_UNREACHABLE && !said && now.tv_sec - vm->changed.tv_sec > patience)
        vm_fail(vm, status, "%s does not answer: %s; it is tried again", vm->id, why);
}

void machine_no_answer(struct vm *vm, int status, bool trusted, const char *why) {
    struct buf text = {0};
    log_debug("%s: no connection yet: %s", vm->id, why);
    machine_note_silence(vm, status, why);
    buf_append_str(&text, why);
    if (machine_is_existing(vm))
        machine_advise(vm, status, trusted, &text);
    if (status == -ERR_DENIED) /* will not get better by itself: let it be seen */
        vm_fail(vm, status, "%s", text.failed ? why : text.data);
    if (!machine_is_existing(vm)) {
        buf_free(&text);
        return;
    }
    buf_free(&vm->trouble);
    vm->trouble = text;
    if (vm->vmm->ops->no_answer)
        vm->vmm->ops->no_answer(vm->vmm);
}

const char *machine_trouble(const struct vm *vm) {
    return vm->trouble.len && !vm->trouble.failed ? vm->trouble.data : "there was no answer";
}

void machine_changed(struct vm *vm, const struct config_setting *setting) {
    if (setting->flags & CONFIG_MACHINE) {
        buf_free(&vm->host_key);
        vm->host_key_learned = false;
    }
    if ((setting->flags & CONFIG_PLACE) && vm->met) {
        vars_take_along(vm->vars);
        vm->met = false;
    }
}

#define MACHINE_END_STEP_MS 20
#define MACHINE_END_MOST_MS (COMMAND_KILL_S * 1000 + 1000)

static bool machine_runs_commands(const struct vm *vm) {
    return vm->backend && vm->backend->existing && control_is_up(vm->control) &&
           commands_are_running(vm->commands);
}

static void machine_end_step(uv_timer_t *timer) {
    struct vm *vm = timer->data;
    void (*then)(struct vm * vm) = vm->commands_ended;
    if (machine_runs_commands(vm) && uv_now(vm->daemon->loop) < vm->commands_deadline)
        return;
    uv_timer_stop(timer);
    vm->commands_ended = NULL;
    then(vm);
}

void machine_end_commands(struct vm *vm, void (*then)(struct vm *vm)) {
    if (!machine_runs_commands(vm)) {
        then(vm);
        return;
    }
    commands_kill_all(vm->commands);
    vm->commands_ended = then;
    vm->commands_deadline = uv_now(vm->daemon->loop) + MACHINE_END_MOST_MS;
    uv_timer_start(vm->timer, machine_end_step, MACHINE_END_STEP_MS, MACHINE_END_STEP_MS);
}

bool machine_is_nowhere(struct vm *vm) {
    if (vm->config.address[0] || !vmm_is_for_existing(vm->config.backend))
        return false;
    vm_fail(
        vm, -ERR_GONE,
        "%s cannot be attached: where is it? Write its name or IP address to config/address, and "
        "`echo running > status`",
        vm->id);
    return true;
}

int machine_prepare(const struct vm_config *config, const char *key_path, struct buf *ret_host_key,
                    char **ret_why) {
    cleanup_buf struct buf text = {0};
    const char *wrong;
    if (access(key_path, R_OK) < 0)
        return error_explain(-ERR_GONE, ret_why,
                             "the private key %s (config/key) cannot be read: %s", key_path,
                             strerror(errno));
    if (!config->host_key[0])
        return 0;
    int r = fs_read(config->host_key, MACHINE_KEY_FILE_MOST, &text);
    if (r < 0)
        return error_explain(-ERR_GONE, ret_why,
                             "the host key in %s (config/host_key) cannot be read: %s",
                             config->host_key, strerror(-r));
    r = host_key_parse(text.data ? text.data : "", text.len, ret_host_key, &wrong);
    return r < 0 ? error_explain(-ERR_GONE, ret_why,
                                 "the host key in %s (config/host_key) cannot be used: %s",
                                 config->host_key, wrong)
                 : 0;
}

void machine_save(const struct vm *vm, json_t *record) {
    cleanup_buf struct buf key = {0};
    json_object_set_new(record, "met", json_boolean(vm->met));
    if (!vm->host_key_learned && !machine_is_existing(vm))
        return; /* its file says what it is */
    if (vm->host_key.len)
        host_key_print(vm->host_key.data, vm->host_key.len, &key);
    json_object_set_new(record, "host_key", json_string(key.data ? key.data : ""));
    json_object_set_new(record, "host_key_learned", json_boolean(vm->host_key_learned));
}

void machine_load(struct vm *vm, const json_t *record) {
    const char *key = json_string_value(json_object_get(record, "host_key")), *wrong;
    vm->met = json_is_true(json_object_get(record, "met"));
    if (key && key[0] && host_key_parse(key, strlen(key), &vm->host_key, &wrong) == 0)
        vm->host_key_learned = json_is_true(json_object_get(record, "host_key_learned"));
}
