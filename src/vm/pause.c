#include "vm/pause.h"

#include "ssh/ssh.h"
#include "util/errors.h"
#include "vm/command.h"
#include "vm/control.h"
#include "vmm/vmm.h"

/* Pausing. A guest whose CPUs stand still answers nobody, but keeps its connections: so while it is
 * paused, nobody takes its silence for a loss. */

#define PAUSE_STEP_MS 10

static void pause_hold(struct vm *vm, bool hold) {
    control_hold(vm->control, hold);
    commands_hold(vm->commands, hold);
}

static void pause_failed(struct vm *vm, const char *what, int status, const char *why) {
    vm_fail(vm, status, "%s could not be %s: %s", vm->id, what, why);
    vm_unsettle(vm, status);
}

static void pause_is_over(void *arg, int status, const char *why) {
    struct vm *vm = arg;
    vm->pausing = false;
    if (vm->gone || (vm->state != VM_RUNNING && vm->state != VM_UNREACHABLE))
        return;
    if (status < 0) {
        pause_hold(vm, false);
        pause_failed(vm, "paused", status, why);
        return;
    }
    vm_set_state(vm, VM_PAUSED);
}

/* What is under way goes to its end before; it would be without an answer. */
static void pause_when_idle(uv_timer_t *timer) {
    struct vm *vm = timer->data;
    if (vm->state != VM_RUNNING) { /* lost meanwhile */
        vm->pausing = false;
        vm_unsettle(vm, -ERR_UNREACHABLE);
        return;
    }
    if (!control_is_idle(vm->control) && uv_now(vm->daemon->loop) < vm->pause_deadline) {
        uv_timer_start(timer, pause_when_idle, PAUSE_STEP_MS, 0);
        return;
    }
    pause_hold(vm, true);
    vm->vmm->ops->pause(vm->vmm, true, pause_is_over);
}

int vm_pause(struct vm *vm) {
    if (!vm->vmm || !vm->vmm->ops->pause)
        return vm_fail(vm, -ERR_UNSUPPORTED,
                       "%s cannot be paused: its backend, %s, does not do that", vm->id,
                       vm->config.backend);
    if (vm->pausing)
        return 0;
    vm->pausing = true;
    vm->pause_deadline = uv_now(vm->daemon->loop) + vm->daemon->settings.timeout;
    pause_when_idle(vm->timer);
    return 0;
}

static void pause_resumed(void *arg, int status, const char *why) {
    struct vm *vm = arg;
    vm->pausing = false;
    if (vm->gone || vm->state != VM_PAUSED)
        return;
    if (status < 0) {
        pause_failed(vm, "resumed", status, why);
        return;
    }
    bool connected = control_is_up(vm->control);
    pause_hold(vm, false);
    vm_set_state(vm, connected ? VM_RUNNING : VM_UNREACHABLE);
    if (connected)
        vars_resume(vm->vars);
    else
        control_start(vm->control, false); /* it was paused when this daemon found it */
}

int vm_resume(struct vm *vm) {
    if (vm->pausing)
        return 0;
    vm->pausing = true;
    vm->vmm->ops->pause(vm->vmm, false, pause_resumed);
    return 0;
}

void vm_end_pause(struct vm *vm) {
    vm->pausing = false;
    pause_hold(vm, false);
}
