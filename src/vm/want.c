#include <string.h>

#include "util/errors.h"
#include "vm/control.h"
#include "vm/machine.h"
#include "vm/pause.h"
#include "vm/vars.h"
#include "vm/vm.h"
#include "vmm/vmm.h"

/* What is asked for: running, paused, stopped; and who waits until it is so.
 *
 * A state that has been acknowledged is in the record, or follows from what is there: what cannot
 * be written to the host's disk is refused, and the VM stays as it was. */

void vm_settle(struct vm *vm) {
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

void vm_unsettle(struct vm *vm, enum vm_state goal, int status) {
    struct list waits, *link;
    list_init(&waits);
    list_splice(&waits, &vm->state_waits);
    while ((link = list_pop(&waits))) {
        struct vm_wait *wait = LIST_OWNER(link, struct vm_wait, link);
        if (wait->goal == (int)goal)
            wait->done(wait, status);
        else
            list_append(&vm->state_waits, &wait->link);
    }
}

/* It has stopped: a later daemon has to know. */
void vm_state_saved(struct vm_wait *wait, int status) {
    struct vm *vm = LIST_OWNER(wait, struct vm, state_saved);
    /* One that was recorded as stopping is found stopped. */
    if (status < 0 && !vm->gone && vm->recorded != VM_STOPPING && vm->recorded != VM_STOPPED) {
        vm_fail(vm, status, "%s is stopped, but that could not be written to the host's disk: %s",
                vm->id, error_text(status));
        vm_unsettle(vm, VM_STOPPED, status);
    }
    vm_settle(vm);
}

/* Its record says that it boots: only then is anything started that a later daemon would have to
 * know of. */
void vm_start_saved(struct vm_wait *wait, int status) {
    struct vm *vm = LIST_OWNER(wait, struct vm, start_saved);
    if (vm->gone || vm->state != VM_BOOTING)
        return;
    if (status == 0)
        status = vm_boot(vm);
    if (status == 0)
        return;
    vm_fail(vm, status, "%s was not started: %s", vm->id, error_text(status));
    vm->pause_wanted = false;
    vm_unsettle(vm, VM_RUNNING, status);
    vm_unsettle(vm, VM_PAUSED, status);
    vm_set_state(vm, vm->start_from);
}

static int vm_start(struct vm *vm) {
    /* After a boot that failed, its VMM or its preparation may not have ended yet. */
    if (vm->vmm || vm->boot)
        return vm_fail(vm, -ERR_BUSY, "%s: the last boot is still being cleared away", vm->id);
    vm->start_from = vm->state;
    vm_set_state(vm, VM_BOOTING);
    vm_wait_cancel(&vm->start_saved);
    vm_save_for(vm, &vm->start_saved);
    return 0;
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
    vm->stop_from = vm->state;
    vm_set_state(vm, VM_STOPPING);
    vm_wait_cancel(&vm->stop_saved);
    vm_save_for(vm, &vm->stop_saved);
    return 0;
}

/* The guest's memory may have the only copy of a variable. */
static void vm_stop_refused(struct vm *vm, int status) {
    enum vm_state back = vm->stop_from == VM_PAUSED   ? VM_PAUSED
                         : control_is_up(vm->control) ? VM_RUNNING
                                                      : VM_UNREACHABLE;
    vm->stop_refused = uv_now(vm->daemon->loop);
    if (back == VM_PAUSED)
        vm_hold_pause(vm);
    vm_unsettle(vm, VM_STOPPED, status);
    vm_unsettle(vm, back == VM_PAUSED ? VM_RUNNING : VM_PAUSED, -ERR_BUSY);
    vm_set_state(vm, back);
    if (back == VM_RUNNING)
        vars_resume(vm->vars);
    vm_fail(vm, status,
            "%s was not stopped: its variables could not be written to the host's disk (%s), and "
            "would be lost with its memory. Make room there; rmdir destroys it all the same",
            vm->id, error_text(status));
}

static void vm_stop_vmm(struct vm *vm) {
    if (vm->vmm)
        vm->vmm->ops->stop(vm->vmm, machine_is_existing(vm) ? 0 : vm->config.stop_timeout * 1000,
                           VM_QUIT_MS);
}

/* The record says so, and has what the guest was given last: a later daemon would attach a machine
 * again, and find a guest gone with its memory. */
void vm_stop_saved(struct vm_wait *wait, int status) {
    struct vm *vm = LIST_OWNER(wait, struct vm, stop_saved);
    if (vm->gone || vm->state != VM_STOPPING || !vm->vmm)
        return;
    if (status < 0 && vm->stop_from != VM_BOOTING) {
        vm_stop_refused(vm, status);
        return;
    }
    machine_end_commands(vm, vm_stop_vmm);
}

/* It was to be paused as soon as it runs, and somebody wants something else now. */
static void vm_want_no_pause(struct vm *vm) {
    if (!vm->pause_wanted)
        return;
    vm->pause_wanted = false;
    vm_fail(vm, -ERR_BUSY, "%s was not paused: another has asked for another state meanwhile",
            vm->id);
    vm_unsettle(vm, VM_PAUSED, -ERR_BUSY);
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
    if (state != VM_PAUSED)
        vm_want_no_pause(vm);
    else if (vm->state == VM_BOOTING)
        vm->pause_wanted = true;
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
    if (!(state == VM_STOPPED && !list_is_empty(&vm->state_saved.link)))
        vm_settle(vm);
    return 0;
}
