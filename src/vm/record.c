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
#include "vm/record.h"
#include "vm/vars.h"
#include "vmm/vmm.h"

/* Writing the record: mode 0600, replaced by rename, in the thread pool. */

#define RECORD_RETRY_MS 2000 /* after a failure, such as a full disk */

struct record_writing {
    uv_work_t work;
    struct vm *vm; /* a reference */
    int folder;    /* the VM's, which may be renamed or removed meanwhile, and another made there */
    char *path;
    char *text;
    bool for_vars;       /* its verdict is that of a batch of variables */
    uint64_t dropped;    /* promises of variables that it tells of no more */
    struct list waits;   /* of vm_wait: its verdict is theirs, too */
    enum vm_state state; /* that it says */
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

static enum vm_state record_state(const struct vm *vm) {
    return vm->record_as >= 0 ? (enum vm_state)vm->record_as : vm->state;
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
        vm_state_name(record_state(vm)), "attached", vm->attached, "owned",
        vars_are_owned(vm->vars), "config", config, "created", (json_int_t)vm->created.tv_sec,
        "booted_ms", (json_int_t)vm->booted_ms, "user", vm->user, "backend",
        vm->vmm ? vm->vmm->ops->name : NULL, "vmm", vmm, "variables", variables);
    if (record && vars_save_more(vm->vars, record) < 0) {
        json_decref(record);
        return NULL;
    }
    if (record)
        machine_save(vm, record);
    if (record)
        record_save_looks(vm, record);
    if (record && vm->warm.template)
        json_object_set_new(record, "template", json_string(vm->warm.template));
    if (record && vm->ephemeral)
        json_object_set_new(record, "ephemeral", json_true());
    if (record && vm->running_since.tv_sec)
        json_object_set_new(record, "running_since", json_integer(vm->running_since.tv_sec));
    if (record && vm->made_from)
        json_object_set_new(record, "made_from", json_integer((json_int_t)vm->made_from));
    if (record && vm->forward.len)
        json_object_set_new(record, "forward", json_stringn(vm->forward.data, vm->forward.len));
    json_t *written = vm_save_written(vm);
    if (record && json_object_size(written))
        json_object_set(record, "written", written);
    json_decref(written);
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
    int verdict = error_of_host(w->status);
    (void)status;
    vm->saving = false;
    if (w->status == 0) {
        vm->recorded = w->state;
        vars_promises_recorded(vm->vars, w->dropped);
    }
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
        if (vm->announcing && !vm->saving && w->status == 0)
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
    int r = fs_replace_fast(path, 0600, text, strlen(text));
    if (r == 0)
        vm->recorded = record_state(vm);
    return error_of_host(r);
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
        w->state = record_state(vm);
        w->for_vars = vars_wants_saving(vm->vars);
        w->dropped = vars_promises_dropped(vm->vars);
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
