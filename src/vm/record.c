#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/boot.h"
#include "vm/job.h"
#include "vm/machine.h"
#include "vm/orphans.h"
#include "vm/vars.h"
#include "vm/vm.h"
#include "vmm/vmm.h"

/* The record of a VM, vm.json in its folder: what the next daemon needs to go on. Mode 0600,
 * replaced by rename, written in the thread pool. */

#define RECORD_VERSION 1
#define RECORD_RETRY_MS 2000 /* after a failure, such as a full disk */
#define RECORD_LIMIT (32 << 20)

struct record_writing {
    uv_work_t work;
    struct vm *vm; /* a reference */
    int folder;    /* the VM's, which may be renamed or removed meanwhile, and another made there */
    char *path;
    char *text;
    bool for_vars;     /* its verdict is that of a batch of variables */
    struct list waits; /* of vm_wait: its verdict is theirs, too */
    int status;
};

/* How env/ and environ look: what was made of them, and their times. */
static void record_save_looks(const struct vm *vm, json_t *record) {
    const struct look usual = {.uid = vm->daemon->uid, .gid = vm->daemon->gid};
    struct look look = vm->env_look;
    json_t *env = json_object(), *file = json_object();
    look.changed = *vars_changed(vm->vars);
    look_save(&look, &usual, env);
    look = vm->environ_look;
    look.changed = *vars_written(vm->vars);
    look_save(&look, &usual, file);
    if (vm->environ_style == ENVIRON_EXPORT)
        json_object_set_new(file, "style", json_string("export"));
    json_object_set_new(record, "env", env);
    json_object_set_new(record, "environ", file);
}

static void record_load_looks(struct vm *vm, const json_t *record) {
    const json_t *env = json_object_get(record, "env"), *file = json_object_get(record, "environ");
    const char *style = json_string_value(json_object_get(file, "style"));
    vm->environ_style = style && strcmp(style, "export") == 0 ? ENVIRON_EXPORT : ENVIRON_SET_A;
    vm->env_look.changed = *vars_changed(vm->vars);
    vm->environ_look.changed = *vars_written(vm->vars);
    look_load(&vm->env_look, env);
    look_load(&vm->environ_look, file);
    vars_set_changed(vm->vars, &vm->env_look.changed);
    vars_set_written(vm->vars, &vm->environ_look.changed);
}

static json_t *record_make(struct vm *vm) {
    /* A machine that is being left is not to be attached again. */
    bool left = machine_is_existing(vm) && vm->state == VM_STOPPING;
    json_t *vmm = vm->vmm && !left ? vm->vmm->ops->save(vm->vmm) : NULL;
    json_t *variables = vars_save(vm->vars);
    json_t *config = config_save(&vm->config);
    if (!variables || !config) {
        json_decref(vmm);
        json_decref(variables);
        json_decref(config);
        return NULL;
    }
    json_t *record = json_pack(
        "{s:i, s:s, s:I, s:s, s:b, s:b, s:o, s:I, s:I, s:s*, s:s*, s:o*, s:o}", "version",
        RECORD_VERSION, "id", vm->id, "number", (json_int_t)vm->number, "state",
        vm_state_name(vm->state), "attached", vm->attached, "owned", vars_are_owned(vm->vars),
        "config", config, "created", (json_int_t)vm->created.tv_sec, "booted_ms",
        (json_int_t)vm->booted_ms, "user", vm->user, "backend", vm->vmm ? vm->vmm->ops->name : NULL,
        "vmm", vmm, "variables", variables);
    if (record)
        machine_save(vm, record);
    if (record)
        record_save_looks(vm, record);
    if (record && vm->ephemeral)
        json_object_set_new(record, "ephemeral", json_true());
    if (record && vm->running_since.tv_sec)
        json_object_set_new(record, "running_since", json_integer(vm->running_since.tv_sec));
    if (record && vm->made_from)
        json_object_set_new(record, "made_from", json_integer((json_int_t)vm->made_from));
    if (record && vm->forward.len)
        json_object_set_new(record, "forward", json_stringn(vm->forward.data, vm->forward.len));
    if (record && vm->role == VM_DEFAULTS)
        json_object_set_new(record, "options", config_save(&vm->daemon->settings.config));
    return record;
}

static void record_write(uv_work_t *work) {
    struct record_writing *w = work->data;
    w->status = fs_replace(w->path, 0600, w->text, strlen(w->text));
}

static void record_free(struct record_writing *w) {
    if (w->text)
        explicit_bzero(w->text, strlen(w->text));
    free(w->text);
    free(w->path);
    if (w->folder >= 0)
        close(w->folder);
    free(w);
}

static void record_start(struct vm *vm);
static void record_due(uv_timer_t *timer);

static void record_written(uv_work_t *work, int status) {
    struct record_writing *w = work->data;
    struct vm *vm = w->vm;
    int verdict = w->status == -ENOSPC || w->status == -EDQUOT ? -ERR_NO_ROOM
                  : w->status < 0                              ? -ERR_IO
                                                               : 0;
    (void)status;
    vm->saving = false;
    if (w->status < 0 && !vm->gone) {
        if (w->for_vars)
            vm_fail(vm, -ERR_IO, "cannot write %s/vm.json: %s", vm->dir, strerror(-w->status));
        else
            log_error("cannot write %s/vm.json: %s", vm->dir, strerror(-w->status));
        uv_timer_start(vm->save_timer, record_due, RECORD_RETRY_MS, 0);
    }
    vm_wait_wake(&w->waits, vm->gone ? -ERR_GONE : verdict);
    if (vm->gone) {
        vm_wait_wake(&vm->save_waits, -ERR_GONE);
        vars_saved(vm->vars, -ERR_GONE);
        vm_destroy_step(vm);
    } else {
        if (w->for_vars)
            vars_saved(vm->vars, verdict);
        if (vm->save_again && !vm->saving)
            record_start(vm);
        if (vm->announcing && !vm->saving)
            vm_announce(vm);
        if (vm->daemon->closing && !vm->saving)
            vm_release(vm);
    }
    vm_unref(vm);
    record_free(w);
}

/* So that a VM whose mkdir has been answered is there, whatever becomes of the daemon in the next
 * moment. */
int record_begin(struct vm *vm) {
    json_t *record = record_make(vm);
    cleanup_free char *path = NULL, *text = record ? json_dumps(record, JSON_INDENT(2)) : NULL;
    json_decref(record);
    if (!text || asprintf(&path, "%s/vm.json", vm->dir) < 0)
        return -ERR_NO_MEMORY;
    return fs_replace_fast(path, 0600, text, strlen(text));
}

static void record_start(struct vm *vm) {
    struct record_writing *w = calloc(1, sizeof *w);
    json_t *record = record_make(vm);
    vm->save_again = false;
    if (w)
        w->folder = open(vm->dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    bool ok = w && record && asprintf(&w->path, "/proc/self/fd/%d/vm.json", w->folder) >= 0;
    if (ok) {
        w->text = json_dumps(record, JSON_INDENT(2));
        w->work.data = w;
        w->for_vars = vars_wants_saving(vm->vars);
        w->vm = vm;
        ok =
            w->text && uv_queue_work(vm->daemon->loop, &w->work, record_write, record_written) == 0;
    }
    json_decref(record);
    if (ok) {
        list_init(&w->waits);
        list_splice(&w->waits, &vm->save_waits);
        vm->saving = true;
        vm_ref(vm);
        return;
    }
    log_error("%s: no memory to write its record", vm->id);
    if (w)
        record_free(w);
    vm_wait_wake(&vm->save_waits, -ERR_NO_MEMORY);
    vars_saved(vm->vars, -ERR_NO_MEMORY);
}

void vm_save(struct vm *vm) {
    vm->save_again = true;
    if (!vm->saving && !vm->gone)
        record_start(vm);
}

void vm_save_for(struct vm *vm, struct vm_wait *wait) {
    list_append(&vm->save_waits, &wait->link);
    vm_save(vm);
}

static void record_due(uv_timer_t *timer) {
    vm_save(timer->data);
}

void vm_save_soon(struct vm *vm) {
    if (!vm->gone && !uv_is_active((uv_handle_t *)vm->save_timer))
        uv_timer_start(vm->save_timer, record_due, VM_SAVE_SOON_MS, 0);
}

static const char *record_text(const json_t *record, const char *key) {
    return json_string_value(json_object_get(record, key));
}

static unsigned record_number(const json_t *record, const char *key) {
    json_int_t n = json_integer_value(json_object_get(record, key));
    return n < 0 || n > (1 << 20) ? 0 : (unsigned)n;
}

static void record_configure(struct vm *vm, const json_t *saved) {
    cleanup_free char *why = NULL;
    int r = saved ? config_load(&vm->config, saved, &why) : 0;
    if (r < 0)
        vm_fail(vm, r, "%s: its recorded configuration is wrong: %s, which it has now", vm->id,
                why ? why : error_text(r));
}

/* The defaults are the mount's options, but for what was written over them: where the record says
 * what the options were, those of today take their place. */
static void record_follow_options(struct vm *vm, const json_t *options) {
    struct vm_config before;
    cleanup_free char *why = NULL;
    if (config_init(&before) < 0)
        return;
    config_load(&before, options, &why);
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        const struct config_setting *setting = &config_settings[i];
        cleanup_buf struct buf was = {0}, is = {0}, now = {0};
        cleanup_free char *whynot = NULL;
        config_print(&before, setting, &was);
        config_print(&vm->config, setting, &is);
        config_print(&vm->daemon->settings.config, setting, &now);
        if (was.len == is.len && (!was.len || memcmp(was.data, is.data, was.len) == 0))
            config_set(&vm->config, setting->name, now.data ? now.data : "", now.len, &whynot);
    }
    config_free(&before);
}

static void record_take_prepared(struct vm *vm, const json_t *record) {
    const json_t *forward = json_object_get(record, "forward");
    const json_t *options = json_object_get(record, "options");
    if (json_is_string(forward))
        buf_append(&vm->forward, json_string_value(forward), json_string_length(forward));
    if (options)
        record_follow_options(vm, options);
}

/* Takes over the VMM that runs for this VM, if it does. */
static void record_adopt(struct vm *vm, const json_t *record) {
    const struct vmm_ops *ops;
    cleanup_free char *note = NULL, *key = NULL;
    const char *backend = record_text(record, "backend");
    const json_t *saved = json_object_get(record, "vmm");
    struct vmm_config config = {
        .id = vm->id, .dir = vm->dir, .address = vm->config.address, .port = vm->config.port};
    if (!backend || !saved)
        return;
    if (asprintf(&key, "%s/ssh_host_ed25519_key.pub", vm->dir) < 0)
        return;
    int r = vmm_find(backend, true, &ops, &note);
    if (r == 0 && !ops->existing)
        r = boot_read_public_key(key, &vm->host_key);
    if (r == 0)
        r = ops->adopt(vm->daemon->loop, &config, saved, &vm_vmm_events, vm, &vm->vmm);
    if (r < 0) {
        vm_fail(vm, r,
                "%s ended while no daemon was there to see it; `echo running > status` starts it",
                vm->id);
        return;
    }
    vm->backend = ops;
    vm->backend_note = note;
    note = NULL;
    vm->attached = json_is_true(json_object_get(record, "attached"));
    vm->running_since.tv_sec = json_integer_value(json_object_get(record, "running_since"));
    vm->boot_started = uv_now(vm->daemon->loop);
    orphans_load(vm->orphans);
    const char *state = record_text(record, "state");
    if (state && strcmp(state, vm_state_name(VM_STOPPING)) == 0) {
        /* What was written since is in this record alone: the guest's file is no truth any more. */
        vm->state = VM_STOPPING;
        ops->stop(vm->vmm, vm->config.stop_timeout * 1000, VM_QUIT_MS);
        return;
    }
    bool paused = state && strcmp(state, vm_state_name(VM_PAUSED)) == 0 && ops->pause;
    vm->state = paused ? VM_PAUSED : vm->attached ? VM_UNREACHABLE : VM_BOOTING;
    if (vm->state == VM_BOOTING) {
        vars_assume_injected(vm->vars);
        vm_watch_boot(vm);
    }
}

struct vm *vm_load(struct daemon *d, const char *dir) {
    cleanup_free char *path = NULL;
    cleanup_buf struct buf text = {0};
    json_error_t error;
    if (asprintf(&path, "%s/vm.json", dir) < 0 || fs_read(path, RECORD_LIMIT, &text) < 0)
        return NULL;
    fs_remove_leftovers(path);
    json_t *record = json_loadb(text.data ? text.data : "", text.len, 0, &error);
    if (text.data)
        explicit_bzero(text.data, text.len);
    const char *id = record_text(record, "id");
    json_int_t number = json_integer_value(json_object_get(record, "number"));
    struct vm *vm = NULL;
    if (json_integer_value(json_object_get(record, "version")) != RECORD_VERSION)
        snprintf(error.text, sizeof error.text, "it is of another version of vmsfs");
    else if (id && vm_id_is_valid(id) && number > 0 && number < UINT32_MAX)
        vm = vm_new(d, id, (uint64_t)number, dir);
    if (!vm) {
        log_error("%s is no record of a VM (%s); it is put aside", path, error.text);
        json_decref(record);
        return NULL;
    }
    if (record_text(record, "user"))
        vm->user = strdup(record_text(record, "user"));
    vm->booted_ms = record_number(record, "booted_ms");
    vm->created.tv_sec = json_integer_value(json_object_get(record, "created"));
    int state =
        record_text(record, "state")
            ? vm_state_from_name(record_text(record, "state"), strlen(record_text(record, "state")))
            : VM_STOPPED;
    vm->state = state == VM_FAILED ? VM_FAILED : VM_STOPPED;
    vm->boot_again = state == VM_BOOTING && !json_object_get(record, "vmm");
    record_configure(vm, json_object_get(record, "config"));
    if (vm->boot_again && !vmm_is_for_existing(vm->config.backend))
        vmm_end_strays(vm->dir);
    record_take_prepared(vm, record);
    machine_load(vm, record);
    vm->made_from = (uint64_t)json_integer_value(json_object_get(record, "made_from"));
    vm->ephemeral = json_is_true(json_object_get(record, "ephemeral"));
    vm_use(vm);
    int r = vars_load(vm->vars, json_object_get(record, "variables"),
                      json_is_true(json_object_get(record, "owned")));
    if (r < 0) {
        cleanup_free char *aside = NULL;
        bool kept = asprintf(&aside, "%s.unreadable", path) >= 0 && link(path, aside) == 0;
        vm_fail(vm, r, "%s: some variables in %s cannot be read and are left out%s%s", vm->id, path,
                kept ? "; it is kept as " : "", kept ? aside : "");
    }
    record_load_looks(vm, record);
    jobs_load(vm->jobs, vm);
    record_adopt(vm, record);
    json_decref(record);
    return vm;
}

struct vm *vm_load_unreadable(struct daemon *d, const char *id, const char *dir) {
    cleanup_free char *path = NULL, *aside = NULL;
    struct vm *vm = vm_new(d, id, ++d->last_number, dir);
    if (!vm || asprintf(&path, "%s/vm.json", dir) < 0 ||
        asprintf(&aside, "%s.unreadable", path) < 0)
        return vm;
    bool kept = rename(path, aside) == 0;
    vm->state = VM_FAILED;
    vm_fail(vm, -ERR_IO,
            "the record of %s could not be read%s%s: rmdir removes it, `echo running > status` "
            "starts it "
            "without its variables",
            id, kept ? " and is kept in " : "", kept ? aside : "");
    return vm;
}
