#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/command.h"
#include "vm/control.h"
#include "vm/job.h"
#include "vm/machine.h"
#include "vm/orphans.h"
#include "vm/scratch.h"
#include "vm/vars.h"
#include "vm/vm.h"
#include "vmm/vmm.h"

/* Which VMs there are: making and destroying them. */

static int vm_compare(struct vm *a, struct vm *b) {
    return strcmp(a->id, b->id);
}
RB_GENERATE(vm_index, vm, by_id, vm_compare)

#define VM_ID_LIMIT 63

bool vm_id_is_valid(const char *id) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-";
    size_t length = strspn(id, letters);
    return length > 0 && length <= VM_ID_LIMIT && id[length] == '\0' && id[0] != '-';
}

struct vm *vm_find(struct daemon *d, const char *id) {
    struct vm key = {.id = (char *)(uintptr_t)id};
    return RB_FIND(vm_index, &d->vms, &key);
}

static void vm_look_init(struct vm *vm) {
    vm->env_look = (struct look){
        .mode = VM_ENV_MODE, .uid = vm->daemon->uid, .gid = vm->daemon->gid, .read = vm->created};
    vm->environ_look = vm->env_look;
    vm->environ_look.mode = VM_ENVIRON_MODE;
}

struct vm *vm_new(struct daemon *d, const char *id, uint64_t number, const char *dir) {
    struct vm *vm = calloc(1, sizeof *vm);
    if (!vm)
        return NULL;
    vm->daemon = d;
    vm->refs = 1;
    vm->number = number;
    vm->state = VM_STOPPED;
    vm->guest = &guest_linux;
    vm->ephemeral = d->settings.ephemeral;
    list_init(&vm->state_waits);
    list_init(&vm->watches);
    list_init(&vm->pause_saved.link);
    vm->pause_saved.done = vm_pause_saved;
    list_init(&vm->start_saved.link);
    vm->start_saved.done = vm_start_saved;
    list_init(&vm->state_saved.link);
    vm->state_saved.done = vm_state_saved;
    vm->record_as = -1;
    vm->recorded = vm->state;
    list_init(&vm->stop_saved.link);
    vm->stop_saved.done = vm_stop_saved;
    list_init(&vm->end_waits);
    list_init(&vm->save_waits);
    list_init(&vm->ending);
    clock_gettime(CLOCK_REALTIME, &vm->created);
    vm->changed = vm->created;
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        vm->config_files[i].changed = vm->created;
    vm_look_init(vm);
    vm->id = strdup(id);
    vm->dir = strdup(dir);
    vm->vars = vars_new(vm);
    vm->control = control_new(vm);
    vm->commands = commands_new(vm);
    vm->jobs = jobs_new(vm);
    vm->orphans = orphans_new(vm);
    vm->env_scratch = scratches_new(vm);
    vm->vm_scratch = scratches_new(vm);
    vm->config_scratch = scratches_new(vm);
    vm->timer = malloc(sizeof *vm->timer);
    vm->save_timer = malloc(sizeof *vm->save_timer);
    if (config_copy(&vm->config, &d->settings.config) < 0 || !vm->id || !vm->dir || !vm->vars ||
        !vm->control || !vm->commands || !vm->jobs || !vm->orphans || !vm->env_scratch ||
        !vm->vm_scratch || !vm->config_scratch || !vm->timer || !vm->save_timer) {
        control_free(vm->control);
        commands_free(vm->commands);
        jobs_free(vm->jobs);
        orphans_free(vm->orphans);
        scratches_free(vm->env_scratch);
        scratches_free(vm->vm_scratch);
        scratches_free(vm->config_scratch);
        free(vm->timer);
        free(vm->save_timer);
        vm_unref(vm);
        return NULL;
    }
    uv_timer_init(d->loop, vm->timer);
    uv_timer_init(d->loop, vm->save_timer);
    vm->timer->data = vm->save_timer->data = vm;
    return vm;
}

void registry_add(struct daemon *d, struct vm *vm) {
    RB_INSERT(vm_index, &d->vms, vm);
}

/* The last VM of this id is still being worked on in the thread pool, which knows its files by
 * their names. */
static bool vm_id_is_ending(const struct daemon *d, const char *id) {
    for (const struct list *l = d->ending.next; l != &d->ending; l = l->next) {
        const struct vm *vm = LIST_OWNER(l, struct vm, ending);
        if (vm->role == VM_ORDINARY && (vm->boot || vm->saving) && strcmp(vm->id, id) == 0)
            return true;
    }
    return false;
}

struct vm *vm_make(struct daemon *d, const char *id, int *ret_status) {
    cleanup_free char *dir = NULL;
    uint64_t number = ++d->last_number;
    *ret_status = -ERR_NO_MEMORY;
    if (asprintf(&dir, "%s/trash/%llu", d->settings.state_dir, (unsigned long long)number) < 0)
        return NULL;
    if (mkdir(dir, 0700) < 0) {
        *ret_status = error_of_host(-errno);
        log_error("cannot make %s: %s", dir, strerror(errno));
        return NULL;
    }
    struct vm *vm = vm_new(d, id, number, dir);
    if (!vm)
        rmdir(dir);
    return vm;
}

int vm_settle_in(struct vm *vm, const char *dir) {
    char *copy = strdup(dir);
    int r = copy ? record_begin(vm) : -ERR_NO_MEMORY;
    if (r == 0 && rename(vm->dir, dir) < 0) {
        r = error_of_host(-errno);
        log_error("cannot make %s: %s", dir, strerror(errno));
    }
    if (r < 0) {
        free(copy);
        return r;
    }
    free(vm->dir);
    vm->dir = copy;
    return 0;
}

int vm_create(struct daemon *d, const char *id, int (*fill)(struct vm *vm, void *arg), void *arg,
              struct vm **ret_vm) {
    cleanup_free char *dir = NULL;
    if (!vm_id_is_valid(id))
        return -ERR_INVALID;
    if (vm_find(d, id))
        return -ERR_EXISTS;
    if (vm_id_is_ending(d, id))
        return -ERR_BUSY;
    if (asprintf(&dir, "%s/vms/%s", d->settings.state_dir, id) < 0)
        return -ERR_NO_MEMORY;
    int r;
    struct vm *vm = vm_make(d, id, &r);
    if (!vm)
        return r;
    registry_add(d, vm);
    vm->state = VM_BOOTING;
    r = fill(vm, arg);
    if (r == 0)
        r = vm_settle_in(vm, dir);
    if (r == 0)
        r = vm_boot(vm);
    if (r < 0) {
        vm_destroy(vm, NULL);
        return r;
    }
    *ret_vm = vm;
    return 0;
}

/* Ends what belongs to the loop; the memory stays until the last reference is gone. */
static void vm_shut(struct vm *vm) {
    control_free(vm->control);
    commands_free(vm->commands);
    jobs_free(vm->jobs);
    orphans_free(vm->orphans);
    scratches_free(vm->env_scratch);
    scratches_free(vm->vm_scratch);
    scratches_free(vm->config_scratch);
    vars_shut(vm->vars);
    vm->control = NULL;
    vm->commands = NULL;
    vm->jobs = NULL;
    vm->orphans = NULL;
    vm->env_scratch = vm->vm_scratch = vm->config_scratch = NULL;
    uv_close((uv_handle_t *)vm->timer, (uv_close_cb)free);
    uv_close((uv_handle_t *)vm->save_timer, (uv_close_cb)free);
    vm->timer = vm->save_timer = NULL;
}

void vm_release(struct vm *vm) {
    if (vm_find(vm->daemon, vm->id) == vm)
        RB_REMOVE(vm_index, &vm->daemon->vms, vm);
    vm_disconnect(vm, -ERR_GONE, "vmsfs ends");
    vm->gone = true;
    vm->destroying = true; /* of its use here; nothing is removed */
    if (vm->vmm)
        vm->vmm->ops->release(vm->vmm);
    vm->vmm = NULL;
    vm_wait_wake(&vm->state_waits, -ERR_GONE);
    vm_shut(vm);
    vm_unref(vm);
}

/* Removes the VM's folder, in the thread pool. */
struct vm_removal {
    uv_work_t work;
    struct vm *vm; /* a reference: the registry's, which ends with it */
    char *dir;
};

static void vm_remove_files(uv_work_t *work) {
    struct vm_removal *removal = work->data;
    int r = fs_remove_all(removal->dir);
    if (r < 0)
        log_error("cannot remove %s: %s", removal->dir, strerror(-r));
}

static void vm_removed(uv_work_t *work, int status) {
    struct vm_removal *removal = work->data;
    struct vm *vm = removal->vm;
    (void)status;
    log_info("%s: gone", vm->id);
    vm->daemon->trim = true;
    list_remove(&vm->ending);
    vm_shut(vm);
    vm_wait_wake(&vm->end_waits, 0);
    vm_unref(vm);
    free(removal->dir);
    free(removal);
}

void vm_destroy_step(struct vm *vm) {
    if (!vm->gone || vm->vmm || vm->boot || vm->saving || vm->destroying || vm->commands_ended)
        return;
    struct vm_removal *removal = calloc(1, sizeof *removal);
    vm->destroying = true;
    if (!removal || !(removal->dir = strdup(vm->dir))) {
        log_error("%s: no memory to remove its files; the next start does", vm->id);
        free(removal);
        return;
    }
    removal->vm = vm;
    removal->work.data = removal;
    uv_queue_work(vm->daemon->loop, &removal->work, vm_remove_files, vm_removed);
}

static void vm_destroy_end(struct vm *vm) {
    vm_disconnect(vm, -ERR_GONE, "the VM is gone");
    vm_set_state(vm, VM_STOPPED);
    vm_destroy_step(vm);
}

void vm_destroy(struct vm *vm, struct vm_wait *wait) {
    struct daemon *d = vm->daemon;
    cleanup_free char *trash = NULL;
    if (wait)
        list_append(&vm->end_waits, &wait->link);
    if (vm->gone)
        return;
    vm->gone = true;
    list_append(&d->ending, &vm->ending);
    if (vm_find(d, vm->id) == vm)
        RB_REMOVE(vm_index, &d->vms, vm);

    /* First: what is in the trash runs no more, and could not be told from what has its name then.
     */
    if (vm->vmm)
        vm->vmm->ops->kill(vm->vmm);
    /* The id is free at once, for a new VM in a folder of its own. What a killed daemon leaves in
     * the trash is cleared away by the next. */
    if (asprintf(&trash, "%s/trash/%llu", d->settings.state_dir, (unsigned long long)vm->number) >=
            0 &&
        strcmp(trash, vm->dir) != 0 && rename(vm->dir, trash) == 0) {
        free(vm->dir);
        vm->dir = trash;
        trash = NULL;
    }
    machine_end_commands(vm, vm_destroy_end);
}
