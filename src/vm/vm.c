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
#include "vm/warm.h"
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
    warm_free_vm(vm);
    free(vm->user);
    free(vm->removers);
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        free(vm->config_files[i].text);
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

static __attribute__((format(printf, 3, 0))) void vm_fail_list(struct vm *vm, const char *quote,
                                                               const char *format, va_list args) {
    struct buf text = {0};
    buf_vprintf(&text, format, args);
    log_warn("%s: %s%s", vm->id, text.failed ? "out of memory" : text.data,
             quote[0] ? "(in its `error`)" : "");
    buf_append_str(&text, quote);
    vm_set_error(vm, &text);
}

int vm_fail(struct vm *vm, int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vm_fail_list(vm, "", format, args);
    va_end(args);
    return status;
}

int vm_fail_quoting(struct vm *vm, int status, const char *quote, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vm_fail_list(vm, quote, format, args);
    va_end(args);
    return status;
}

void vm_set_state(struct vm *vm, enum vm_state state) {
    bool changes = vm->state != state;
    if (changes) {
        log_info("%s: %s", vm->id, vm_state_name(state));
        if (vm->state == VM_PAUSED || (vm->pausing && state != VM_UNREACHABLE))
            vm_end_pause(vm);
        vm->state = state;
        vm->record_as = -1;
        clock_gettime(CLOCK_REALTIME, &vm->changed);
        if (state == VM_STOPPED || state == VM_FAILED)
            vm->running_since = (struct timespec){0};
        if (!vm->gone)
            vm_save(vm);
        vm_wait_wake(&vm->watches, 0);
    }
    vm_wait_cancel(&vm->state_saved);
    if (changes && state == VM_STOPPED && !vm->gone)
        vm_save_for(vm, &vm->state_saved);
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
        return vm_fail(vm, -ERR_UNREACHABLE, "%s does not answer: %s; it is tried again", vm->id,
                       machine_trouble(vm));
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
        .peer = endpoint.peer,
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

void vm_announce(struct vm *vm) {
    vm->announcing = false;
    uv_timer_stop(vm->timer);
    commands_start(vm->commands);
    if (!vm->running_since.tv_sec)
        clock_gettime(CLOCK_REALTIME, &vm->running_since);
    vm_use(vm);
    warm_succeed(vm);
    vm_set_state(vm, VM_RUNNING);
    vars_resume(vm->vars);
    if (vm->pause_wanted && vm_pause(vm) < 0)
        vm_unsettle(vm, VM_PAUSED, -ERR_UNSUPPORTED);
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
        /* What was set just before the last daemon was killed is in the guest alone. */
        if (vm->adopted_at && vars_generation(vm->vars) + 1 != vm->adopted_at)
            vars_take_along(vm->vars);
        vm->adopted_at = 0;
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
    buf_clear(&vm->trouble);
    buf_append_str(&vm->trouble, why);
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
    control_start(vm->control, vm->warm.template && vm->console_watch);
}

static bool vm_has_kvm(const struct vm *vm) {
    json_t *info = json_object();
    vm->vmm->ops->describe(vm->vmm, info);
    const char *accelerator = json_string_value(json_object_get(info, "accelerator"));
    bool kvm = accelerator && strcmp(accelerator, "kvm") == 0;
    json_decref(info);
    return kvm;
}

/* It can be there, and boot nothing: nested, or in a sandbox. */
#define VM_WITHOUT_KVM                                                                             \
    "; if KVM is at fault, guests are emulated without it: VMSFS_KVM=no in the daemon's "          \
    "environment, with auto or qemu in config/backend"

/* What ended a boot. `words` are the VMM's, "" if it has said nothing; else the guest may have. */
static void vm_tell_failed_boot(struct vm *vm, bool powered_off, bool kvm, const char *why,
                                const char *words) {
    cleanup_buf struct buf quote = {0}, names = {0};
    buf_append_str(&quote, words);
    config_name_quoted(&vm->config, words, &names);
    if (powered_off && !quote.len)
        console_last_words(vm, &quote);
    /* It has ended without a word of the guest's, or says so itself. */
    bool suspect = kvm && ((powered_off && !quote.len) || strcasestr(words, "kvm"));
    vm_fail_quoting(vm, -ERR_GONE, quote.len ? quote.data : "",
                    "%s did not boot: %s%s%s; see its console%s%s", vm->id, why,
                    names.len ? ", and has words for " : "", names.len ? names.data : "",
                    suspect ? VM_WITHOUT_KVM : "", quote.len ? ". It said: " : "");
}

static void vm_vmm_exited(void *arg, enum vmm_end end, const char *why, const char *words) {
    struct vm *vm = arg;
    enum vm_state was = vm->state;
    bool powered_off = end == VMM_POWERED_OFF;
    bool kvm = vm_has_kvm(vm);
    vm->vmm->ops->release(vm->vmm);
    vm->vmm = NULL;
    vm->attached = false;
    if (!vm->gone && !(was == VM_BOOTING && warm_fall_back(vm, end, why))) {
        if (was == VM_FAILED || was == VM_STOPPED) {
            log_info("%s: cleared away: %s", vm->id, why); /* why it failed has been said */
        } else if (was == VM_STOPPING || (powered_off && was != VM_BOOTING)) {
            vm_disconnect(vm, -ERR_GONE, "the VM was stopped");
            if (was != VM_STOPPING)
                vm_fail(vm, -ERR_GONE,
                        "%s has powered itself off; `echo running > status` starts it", vm->id);
            vm_set_state(vm, VM_STOPPED);
        } else {
            if (was == VM_BOOTING)
                vm_tell_failed_boot(vm, powered_off, kvm, why, words);
            else
                vm_fail_quoting(vm, -ERR_GONE, words,
                                "%s has ended: %s; `echo running > status` starts it again%s",
                                vm->id, why, words[0] ? ". It said: " : "");
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
void vm_boot_failed(struct vm *vm) {
    vm_disconnect(vm, -ERR_GONE, "the boot failed");
    if (vm->vmm)
        vm->vmm->ops->kill(vm->vmm); /* exited() follows */
    vm_set_state(vm, VM_FAILED);
}

static void vm_boot_overdue(uv_timer_t *timer) {
    struct vm *vm = timer->data;
    if (vm->announcing) {
        vm_fail(vm, -ERR_NO_ROOM,
                "%s answers, but that could not be written to the host's disk: make room there, "
                "and `echo running > status` starts it",
                vm->id);
        vm_unsettle(vm, VM_RUNNING, -ERR_NO_ROOM);
    } else if (machine_is_existing(vm))
        vm_fail(vm, -ERR_TIMED_OUT,
                "%s could not be attached within %u s (config/boot_timeout): %s; `echo running > "
                "status` tries again",
                vm->id, vm->config.boot_timeout, machine_trouble(vm));
    else
        vm_fail(vm, -ERR_TIMED_OUT,
                "%s could not be reached by SSH within %u s of its boot; see its console, or give "
                "it more "
                "time with -o boot_timeout=SECONDS or config/boot_timeout%s",
                vm->id, vm->config.boot_timeout, vm->vmm && vm_has_kvm(vm) ? VM_WITHOUT_KVM : "");
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
    cleanup_buf struct buf socket = {0}, boot_args = {0};
    struct vmm_config config;
    buf_printf(&socket, "%s/%llu.sock", settings->runtime_dir, (unsigned long long)vm->number);
    boot_configure(settings, &vm->config, &result->image, &boot_args, &config);
    config.id = vm->id;
    config.dir = vm->dir;
    config.socket = socket.data;
    config.initrd = result->initrd;
    config.disk = result->disk;
    config.ram = result->template.ram;
    config.device_state = result->template.state;
    config.identity = result->identity;
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
        if (result->status == -ERR_NO_ROOM)
            vm_unsettle(vm, VM_RUNNING, result->status);
        vm_boot_failed(vm);
        return;
    }
    int r = vm_take_boot(vm, result);
    warm_take_boot(vm, result);
    if (r == 0)
        r = vm_create_vmm(vm, result);
    if (r < 0 && warm_fall_back(vm, VMM_HINDERED, strerror(-r)))
        return;
    if (r < 0) {
        vm_fail(vm, r, "%s cannot boot: starting %s failed: %s", vm->id, vm->backend->name,
                strerror(-r));
        vm_boot_failed(vm);
        return;
    }
    /* At once: a VMM that is not recorded would run on unseen, should the daemon be killed now. */
    r = record_begin(vm);
    if (r < 0) {
        vm_fail(vm, r, "%s cannot boot: its record could not be written to the host's disk: %s",
                vm->id, strerror(-r));
        vm_unsettle(vm, VM_RUNNING, r);
        vm_boot_failed(vm);
        return;
    }
    vm_save(vm);
    if (result->image.ready)
        console_watch_start(vm, result->image.ready);
}

void vm_watch_boot(struct vm *vm) {
    uint64_t passed = uv_now(vm->daemon->loop) - vm->boot_started, warm = warm_time(vm);
    uint64_t most = warm ? warm : (uint64_t)vm->config.boot_timeout * 1000;
    uv_timer_start(vm->timer, warm ? warm_overdue : vm_boot_overdue,
                   most > passed ? most - passed : 1, 0);
}

int vm_boot(struct vm *vm) {
    vm->attached = false;
    warm_forget(vm);                            /* what is known of the last boot */
    if (!vm->backend || !vm->backend->existing) /* else they still run there */
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
    json_object_set_new(info, "warm", json_boolean(vm->warm.template != NULL));
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
