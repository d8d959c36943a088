#include "vm/vm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ssh/ssh.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/boot.h"
#include "vm/command.h"
#include "vm/console.h"
#include "vm/control.h"
#include "vm/disk.h"
#include "vm/machine.h"
#include "vm/orphans.h"
#include "vm/pause.h"
#include "vm/target.h"
#include "vm/vars.h"
#include "vmm/vmm.h"

/* The life of a VM: booting, running, stopping, and what goes wrong. */

/* From connect() to the server's first line: short, because a connection that came before the
 * guest's network was up is answered late. */
#define VM_BANNER_MS 1500

static const char *const vm_state_names[] = {
    [VM_BOOTING] = "booting", [VM_RUNNING] = "running",         [VM_STOPPING] = "stopping",
    [VM_STOPPED] = "stopped", [VM_UNREACHABLE] = "unreachable", [VM_FAILED] = "failed",
    [VM_PAUSED] = "paused",
};
#define VM_STATES (sizeof vm_state_names / sizeof *vm_state_names)

const char *vm_state_name(enum vm_state state) {
    return vm_state_names[state];
}

int vm_state_from_name(const char *name, size_t length) {
    for (size_t i = 0; i < VM_STATES; i++)
        if (strlen(vm_state_names[i]) == length && memcmp(vm_state_names[i], name, length) == 0)
            return (int)i;
    return -1;
}

void vm_wait_cancel(struct vm_wait *wait) {
    list_remove(&wait->link);
}

void vm_wait_wake(struct list *waits, int status) {
    struct list woken, *link;
    list_init(&woken);
    list_splice(&woken, waits); /* who waits again is not woken again */
    while ((link = list_pop(&woken))) {
        struct vm_wait *wait = LIST_OWNER(link, struct vm_wait, link);
        wait->done(wait, status);
    }
}

struct vm *vm_ref(struct vm *vm) {
    vm->refs++;
    return vm;
}

void vm_unref(struct vm *vm) {
    if (--vm->refs > 0)
        return;
    vars_free(vm->vars);
    buf_free(&vm->error);
    buf_free(&vm->forward);
    buf_free(&vm->host_key);
    buf_free(&vm->trouble);
    free(vm->id);
    free(vm->dir);
    config_free(&vm->config);
    free(vm->backend_note);
    free(vm->user);
    free(vm);
}

void vm_set_error(struct vm *vm, struct buf *text) {
    buf_free(&vm->error);
    vm->error = *text;
    *text = (struct buf){0};
    while (vm->error.len && vm->error.data[vm->error.len - 1] == '\n')
        vm->error.data[--vm->error.len] = '\0';
    buf_append_char(&vm->error, '\n');
    clock_gettime(CLOCK_REALTIME, &vm->error_time);
}

int vm_fail(struct vm *vm, int status, const char *format, ...) {
    struct buf text = {0};
    va_list args;
    va_start(args, format);
    buf_vprintf(&text, format, args);
    va_end(args);
    log_warn("%s: %s", vm->id, text.failed ? "out of memory" : text.data);
    vm_set_error(vm, &text);
    return status;
}

/* Tells those who wait for a state whether this is it, or whether it cannot come any more. */
static void vm_settle(struct vm *vm) {
    struct list waits, *link;
    list_init(&waits);
    list_splice(&waits, &vm->state_waits);
    while ((link = list_pop(&waits))) {
        struct vm_wait *wait = LIST_OWNER(link, struct vm_wait, link);
        bool over = vm->gone || vm->state == VM_FAILED || vm->state == VM_STOPPED;
        if ((int)vm->state == wait->goal && !vm->gone)
            wait->done(wait, 0);
        else if (over)
            wait->done(wait, -ERR_GONE);
        else
            list_append(&vm->state_waits, &wait->link);
    }
}

void vm_unsettle(struct vm *vm, int status) {
    struct list waits, *link;
    list_init(&waits);
    list_splice(&waits, &vm->state_waits);
    while ((link = list_pop(&waits))) {
        struct vm_wait *wait = LIST_OWNER(link, struct vm_wait, link);
        wait->done(wait, (int)vm->state == wait->goal ? 0 : status);
    }
}

/* A VMM that stands still looks as one that does not, to a later daemon: who asked for it is told
 * when the record says so. */
void vm_settle_saved(struct vm_wait *wait, int status) {
    struct vm *vm = LIST_OWNER(wait, struct vm, pause_saved);
    (void)status; /* it is so, for as long as this daemon lives; and it is tried again */
    vm_settle(vm);
}

void vm_set_state(struct vm *vm, enum vm_state state) {
    bool told_later = vm->state != state && !vm->gone &&
                      (state == VM_PAUSED || (vm->state == VM_PAUSED && state == VM_RUNNING));
    if (vm->state != state) {
        log_info("%s: %s", vm->id, vm_state_name(state));
        if (vm->state == VM_PAUSED)
            vm_end_pause(vm);
        vm->state = state;
        clock_gettime(CLOCK_REALTIME, &vm->changed);
        if (state == VM_STOPPED || state == VM_FAILED)
            vm->running_since = (struct timespec){0};
        if (!vm->gone)
            vm_save(vm);
        vm_wait_wake(&vm->watches, 0);
    }
    vm_wait_cancel(&vm->pause_saved);
    if (told_later)
        vm_save_for(vm, &vm->pause_saved);
    else
        vm_settle(vm);
}

/* Asked for in vain, perhaps again and again: words, but not over those about a failure of this
 * state, nor in the log. */
static int vm_refuse(struct vm *vm, const char *what) {
    struct buf text = {0};
    bool said = vm->error.len && (vm->error_time.tv_sec > vm->changed.tv_sec ||
                                  (vm->error_time.tv_sec == vm->changed.tv_sec &&
                                   vm->error_time.tv_nsec >= vm->changed.tv_nsec));
    if (!said) {
        buf_printf(&text, "%s is %s: %s", vm->id, vm_state_name(vm->state), what);
        vm_set_error(vm, &text);
    }
    return -ERR_BUSY;
}

bool vm_uses_login_shell(const struct vm *vm) {
    return strcmp(vm->config.shell, "raw") != 0;
}

int vm_check_running(struct vm *vm) {
    if (vm->gone)
        return -ERR_GONE;
    switch (vm->state) {
    case VM_RUNNING:
        return 0;
    case VM_UNREACHABLE:
        return -ERR_UNREACHABLE; /* `error` says since when and why */
    case VM_BOOTING:
        return vm_refuse(vm, "`echo running > status` waits until it runs");
    case VM_PAUSED:
        return vm_refuse(vm, "`echo running > status` lets it go on");
    case VM_STOPPING:
    case VM_STOPPED:
        return vm_refuse(vm, "`echo running > status` starts it");
    case VM_FAILED:
        return -ERR_GONE;
    }
    return -ERR_IO;
}

bool vm_target(const struct vm *vm, struct ssh_target *ret_target) {
    const struct settings *settings = &vm->daemon->settings;
    struct vmm_endpoint endpoint;
    bool existing = machine_is_existing(vm);
    if (!vm->vmm || !vm->user || (!vm->host_key.len && !existing) ||
        !vm->vmm->ops->endpoint(vm->vmm, &endpoint))
        return false;
    *ret_target = (struct ssh_target){
        .address = endpoint.address,
        .address_length = endpoint.length,
        .vsock_port = endpoint.vsock_port,
        .user = vm->user,
        .key_path = machine_key_path(vm),
        .host_key = (const uint8_t *)(vm->host_key.data ? vm->host_key.data : ""),
        .host_key_length = vm->host_key.len,
        .banner_timeout =
            existing || settings->timeout < VM_BANNER_MS ? settings->timeout : VM_BANNER_MS,
        .timeout = settings->timeout,
    };
    return true;
}

static void vm_boot_failed(struct vm *vm);

void vm_announce(struct vm *vm) {
    vm->announcing = false;
    uv_timer_stop(vm->timer);
    commands_start(vm->commands);
    if (!vm->running_since.tv_sec)
        clock_gettime(CLOCK_REALTIME, &vm->running_since);
    vm_use(vm);
    vm_set_state(vm, VM_RUNNING);
    vars_resume(vm->vars);
    if (vm->pause_wanted && vm_pause(vm) < 0)
        vm_unsettle(vm, -ERR_UNSUPPORTED);
    vm->pause_wanted = false;
}

/* The variables of guest and host agree: the guest is ready. */
static void vm_attached(struct vm *vm, int status) {
    if (vm->gone || (vm->state != VM_BOOTING && vm->state != VM_UNREACHABLE))
        return;
    if (status == -ERR_UNREACHABLE || status == -ERR_TIMED_OUT)
        return; /* the connection is tried again */
    if (status < 0 && vm->state == VM_BOOTING) {
        vm_boot_failed(vm); /* what the guest refuses now it will refuse again */
        return;
    }
    if (status < 0) {
        control_again(vm->control);
        return;
    }
    console_watch_stop(vm);
    if (vm->attached) {
        vm_announce(vm);
        return;
    }
    /* A later daemon has to know that from now on the guest's file is the truth. */
    vm->booted_ms = uv_now(vm->daemon->loop) - vm->boot_started;
    vm->attached = vm->announcing = vm->met = true;
    vm_save(vm);
}

void vm_guest_up(struct vm *vm) {
    if (vm->gone || (vm->state != VM_BOOTING && vm->state != VM_UNREACHABLE))
        return;
    if (machine_is_existing(vm) && !vm->attached)
        vars_meet(vm->vars, vm->met, vm_attached);
    else
        vars_attach(vm->vars, !vm->attached, vm_attached);
}

void vm_guest_lost(struct vm *vm, int status, const char *why) {
    vars_detach(vm->vars, status);
    if (vm->gone || vm->state != VM_RUNNING)
        return;
    vm_fail(vm, status, "%s does not answer: %s; it is tried again", vm->id, why);
    vm_set_state(vm, VM_UNREACHABLE);
    commands_stop(vm->commands, status, why);
}

void vm_disconnect(struct vm *vm, int status, const char *why) {
    uv_timer_stop(vm->timer);
    console_watch_stop(vm);
    vm->announcing = false;
    vars_detach(vm->vars, status); /* first, so that nothing of it is sent anew */
    control_stop(vm->control, status);
    commands_stop(vm->commands, status, why);
}

static void vm_vmm_ready(void *arg) {
    struct vm *vm = arg;
    vm_save(vm);
    if (vm->state == VM_PAUSED) { /* so an earlier daemon has left it, or was about to */
        if (!vm->pausing)         /* else it has been asked to go on already */
            vm->vmm->ops->pause(vm->vmm, true, NULL);
        return;
    }
    if (vm->attached && vm->vmm->ops->pause)
        vm->vmm->ops->pause(vm->vmm, false, NULL);
    control_start(vm->control);
}

static void vm_vmm_exited(void *arg, bool powered_off, const char *why) {
    struct vm *vm = arg;
    enum vm_state was = vm->state;
    vm->vmm->ops->release(vm->vmm);
    vm->vmm = NULL;
    vm->attached = false;
    if (!vm->gone) {
        if (was == VM_FAILED || was == VM_STOPPED) {
            log_info("%s: cleared away: %s", vm->id, why); /* why it failed has been said */
        } else if (was == VM_STOPPING || (powered_off && was != VM_BOOTING)) {
            vm_disconnect(vm, -ERR_GONE, "the VM was stopped");
            if (was != VM_STOPPING)
                vm_fail(vm, -ERR_GONE,
                        "%s has powered itself off; `echo running > status` starts it", vm->id);
            vm_set_state(vm, VM_STOPPED);
        } else {
            cleanup_buf struct buf words = {0};
            if (powered_off)
                console_last_words(vm, &words);
            if (was == VM_BOOTING)
                vm_fail(vm, -ERR_GONE, "%s did not boot: %s%s%s; see its console", vm->id, why,
                        words.len ? ", and said: " : "", words.len ? words.data : "");
            else
                vm_fail(vm, -ERR_GONE, "%s has ended: %s; `echo running > status` starts it again",
                        vm->id, why);
            vm_disconnect(vm, -ERR_GONE, why);
            vm_set_state(vm, VM_FAILED);
        }
    }
    vm_destroy_step(vm);
}

static void vm_vmm_trouble(void *arg, const char *why) {
    machine_no_answer(arg, -ERR_UNREACHABLE, false, why);
}

const struct vmm_events vm_vmm_events = {
    .ready = vm_vmm_ready, .exited = vm_vmm_exited, .trouble = vm_vmm_trouble};

/* The end of a boot that did not come to anything. */
static void vm_boot_failed(struct vm *vm) {
    vm_disconnect(vm, -ERR_GONE, "the boot failed");
    if (vm->vmm)
        vm->vmm->ops->kill(vm->vmm); /* exited() follows */
    vm_set_state(vm, VM_FAILED);
}

static void vm_boot_overdue(uv_timer_t *timer) {
    struct vm *vm = timer->data;
    if (machine_is_existing(vm))
        vm_fail(vm, -ERR_TIMED_OUT,
                "%s could not be attached within %u s (config/boot_timeout): %s; `echo running > "
                "status` tries again",
                vm->id, vm->config.boot_timeout, machine_trouble(vm));
    else
        vm_fail(vm, -ERR_TIMED_OUT,
                "%s could not be reached by SSH within %u s of its boot; see its console, or give "
                "it more "
                "time with -o boot_timeout=SECONDS or config/boot_timeout",
                vm->id, vm->config.boot_timeout);
    vm_boot_failed(vm);
}

static int vm_set_user(struct vm *vm, const char *user) {
    char *copy = strdup(user);
    if (!copy)
        return -ERR_NO_MEMORY;
    free(vm->user);
    vm->user = copy;
    return 0;
}

/* Takes over what the preparation has found out. */
static int vm_take_boot(struct vm *vm, struct vm_boot_result *result) {
    bool existing = result->backend->existing;
    const char *user = existing ? "root" : result->image.user;
    vm->backend = result->backend;
    free(vm->backend_note);
    vm->backend_note = result->why;
    result->why = NULL;
    /* A host key that was learned holds until another is given. */
    if (!existing || !vm->host_key_learned || result->host_key.len) {
        buf_free(&vm->host_key);
        vm->host_key = result->host_key;
        result->host_key = (struct buf){0};
        vm->host_key_learned = false;
    }
    return vm_set_user(vm, vm->config.user[0] ? vm->config.user : user);
}

/* Starts the VMM. */
static int vm_create_vmm(struct vm *vm, const struct vm_boot_result *result) {
    const struct settings *settings = &vm->daemon->settings;
    const struct image *image = &result->image;
    cleanup_buf struct buf socket = {0}, boot_args = {0};
    buf_printf(&socket, "%s/%llu.sock", settings->runtime_dir, (unsigned long long)vm->number);
    if (image->boot_args)
        buf_printf(&boot_args, "%s%s%s%s", image->boot_args, settings->verbose_boot ? "" : " quiet",
                   vm->config.boot_args[0] ? " " : "", vm->config.boot_args);
    struct vmm_config config = {
        .id = vm->id,
        .dir = vm->dir,
        .socket = socket.data,
        .boot_args = boot_args.data,
    };
    boot_describe_vmm(&vm->config, result, &config);
    if (socket.failed || boot_args.failed)
        return -ERR_NO_MEMORY;
    return vm->backend->create(vm->daemon->loop, &config, &vm_vmm_events, vm, &vm->vmm);
}

static void vm_boot_prepared(struct vm *vm, struct vm_boot_result *result) {
    if (vm->gone) {
        vm_destroy_step(vm);
        return;
    }
    if (vm->state == VM_STOPPING)
        vm_set_state(vm, VM_STOPPED);
    if (vm->state != VM_BOOTING)
        return;
    if (result->status < 0) {
        vm_fail(vm, result->status, "%s cannot %s: %s", vm->id,
                result->backend && result->backend->existing ? "be attached" : "boot",
                result->why ? result->why : "");
        vm_boot_failed(vm);
        return;
    }
    int r = vm_take_boot(vm, result);
    if (r == 0)
        r = vm_create_vmm(vm, result);
    if (r < 0) {
        vm_fail(vm, r, "%s cannot boot: starting %s failed: %s", vm->id, vm->backend->name,
                strerror(-r));
        vm_boot_failed(vm);
        return;
    }
    /* At once: a VMM that is not recorded would run on unseen, should the daemon be killed now. */
    if (record_begin(vm) < 0)
        log_error("%s: its record could not be written", vm->id);
    vm_save(vm);
    if (result->image.ready)
        console_watch_start(vm, result->image.ready);
}

void vm_watch_boot(struct vm *vm) {
    uv_timer_start(vm->timer, vm_boot_overdue, (uint64_t)vm->config.boot_timeout * 1000, 0);
}

int vm_boot(struct vm *vm) {
    vm->attached = false;
    if (!machine_is_existing(vm))
        orphans_clear(vm->orphans);
    vm->boot_started = uv_now(vm->daemon->loop);
    if (machine_is_nowhere(
            vm)) { /* at once, so that mkdir can be followed by writing the address */
        vm_set_state(vm, VM_FAILED);
        return 0;
    }
    int r = boot_prepare(vm, vm_boot_prepared);
    if (r < 0)
        return r;
    vm_watch_boot(vm);
    vm_set_state(vm, VM_BOOTING);
    return 0;
}

static int vm_start(struct vm *vm) {
    /* After a boot that failed, its VMM or its preparation may not have ended yet. */
    if (vm->vmm || vm->boot)
        return vm_fail(vm, -ERR_BUSY, "%s: the last boot is still being cleared away", vm->id);
    return vm_boot(vm);
}

int vm_stop(struct vm *vm) {
    if (!vm->vmm) { /* being prepared, or failed */
        uv_timer_stop(vm->timer);
        vm_set_state(vm, vm->boot ? VM_STOPPING : VM_STOPPED); /* until it can be started again */
        return 0;
    }
    uv_timer_stop(vm->timer);
    if (vm->state == VM_BOOTING)
        vm_disconnect(vm, -ERR_GONE, "the VM is stopped while it boots");
    if (machine_is_existing(vm) && vm->attached)
        vars_leave(vm->vars);
    vm_set_state(vm, VM_STOPPING);
    vm_wait_cancel(&vm->stop_saved);
    vm_save_for(vm, &vm->stop_saved);
    return 0;
}

/* The record says so, and has what the guest was given last: a later daemon would attach a machine
 * again, and find a guest gone with its memory. */
void vm_stop_saved(struct vm_wait *wait, int status) {
    struct vm *vm = LIST_OWNER(wait, struct vm, stop_saved);
    (void)status; /* a full disk keeps nothing running */
    if (vm->gone || vm->state != VM_STOPPING || !vm->vmm)
        return;
    vm->vmm->ops->stop(vm->vmm, machine_is_existing(vm) ? 0 : vm->config.stop_timeout * 1000,
                       VM_QUIT_MS);
}

int vm_want(struct vm *vm, enum vm_state state, struct vm_wait *wait) {
    int r = 0;
    if (vm->gone)
        return -ERR_GONE;
    if (state == VM_RUNNING && vm->state == VM_STOPPING)
        return vm_fail(vm, -ERR_BUSY, "%s is stopping: start it when it has stopped", vm->id);
    if (state == VM_PAUSED && (vm->state == VM_STOPPING || vm->state == VM_STOPPED ||
                               vm->state == VM_UNREACHABLE || vm->state == VM_FAILED))
        return vm_check_running(vm);
    vm->pause_wanted = state == VM_PAUSED && vm->state == VM_BOOTING;
    if (state == VM_RUNNING && (vm->state == VM_STOPPED || vm->state == VM_FAILED))
        r = vm_start(vm);
    else if (state == VM_RUNNING && vm->state == VM_PAUSED)
        r = vm_resume(vm);
    else if (state == VM_PAUSED && vm->state == VM_RUNNING)
        r = vm_pause(vm);
    else if (state == VM_STOPPED && vm->state != VM_STOPPED && vm->state != VM_STOPPING)
        r = vm_stop(vm);
    if (r < 0)
        return r;
    wait->goal = (int)state;
    list_append(&vm->state_waits, &wait->link);
    vm_settle(vm);
    return 0;
}

json_t *vm_info(const struct vm *vm) {
    json_t *info = json_object();
    json_object_set_new(info, "id", json_string(vm->id));
    json_object_set_new(info, "state", json_string(vm_state_name(vm->state)));
    json_object_set_new(info, "backend",
                        json_string(vm->backend ? vm->backend->name : vm->config.backend));
    json_object_set_new(info, "backend_note",
                        json_string(vm->backend_note ? vm->backend_note : ""));
    json_object_set_new(info, "image", json_string(vm->config.image));
    json_object_set_new(info, "disk", disk_describe(vm));
    json_object_set_new(info, "user", vm->user ? json_string(vm->user) : json_null());
    const char *source = machine_host_key_source(vm);
    json_object_set_new(info, "host_key", source ? json_string(source) : json_null());
    json_object_set_new(info, "created", json_integer(vm->created.tv_sec));
    json_object_set_new(info, "booted_ms",
                        vm->booted_ms ? json_integer((json_int_t)vm->booted_ms) : json_null());
    if (vm->vmm)
        vm->vmm->ops->describe(vm->vmm, info);
    vars_describe(vm->vars, info);
    if (vm->commands)
        commands_describe(vm->commands, info);
    json_object_set_new(info, "daemon",
                        json_pack("{s:i, s:s, s:I}", "pid", getpid(), "version", VMSFS_VERSION,
                                  "requests", (json_int_t)vm->daemon->requests));
    return info;
}
