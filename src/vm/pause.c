#include "vm/pause.h"

#include "ssh/ssh.h"
#include "util/cleanup.h"
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

/* The record has said what was to be; it is not to be. */
static void pause_take_back(struct vm *vm, int status) {
    vm->pausing = false;
    vm->record_as = -1;
    vm_save(vm);
    vm_unsettle(vm, vm->resuming ? VM_RUNNING : VM_PAUSED, status);
}

static void pause_failed(struct vm *vm, int status, const char *why, const char *words) {
    vm_fail_quoting(vm, status, words, "%s could not be %s: %s%s", vm->id,
                    vm->resuming ? "resumed" : "paused", why, words[0] ? ". It said: " : "");
    pause_take_back(vm, status);
}

static void pause_is_over(void *arg, int status, const char *why, const char *words) {
    struct vm *vm = arg;
    vm->pausing = false;
    if (vm->gone || (vm->state != VM_RUNNING && vm->state != VM_UNREACHABLE))
        return;
    if (status < 0) {
        pause_hold(vm, false);
        pause_failed(vm, status, why, words);
        return;
    }
    vm_set_state(vm, VM_PAUSED);
}

/* What is under way goes to its end before; it would be without an answer. */
static void pause_when_idle(uv_timer_t *timer) {
    struct vm *vm = timer->data;
    if (vm->state != VM_RUNNING) { /* lost meanwhile */
        pause_take_back(vm, -ERR_UNREACHABLE);
        return;
    }
    if (!control_is_idle(vm->control) && uv_now(vm->daemon->loop) < vm->pause_deadline) {
        uv_timer_start(timer, pause_when_idle, PAUSE_STEP_MS, 0);
        return;
    }
    pause_hold(vm, true);
    vm->vmm->ops->pause(vm->vmm, true, pause_is_over);
}

static void pause_resumed(void *arg, int status, const char *why, const char *words) {
    struct vm *vm = arg;
    vm->pausing = false;
    if (vm->gone || vm->state != VM_PAUSED)
        return;
    if (status < 0) {
        pause_failed(vm, status, why, words);
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

void vm_pause_saved(struct vm_wait *wait, int status) {
    struct vm *vm = LIST_OWNER(wait, struct vm, pause_saved);
    if (vm->gone || !vm->pausing || !vm->vmm)
        return;
    if (status < 0) {
        cleanup_buf struct buf why = {0};
        buf_printf(&why, "that could not be written to the host's disk: %s", error_text(status));
        pause_failed(vm, status, why.failed ? "out of memory" : why.data, "");
    } else if (vm->resuming) {
        vm->vmm->ops->pause(vm->vmm, false, pause_resumed);
    } else {
        vm->pause_deadline = uv_now(vm->daemon->loop) + vm->daemon->settings.timeout;
        pause_when_idle(vm->timer);
    }
}

/* The record comes first: a VMM that stands still looks as one that does not, to a later daemon,
 * which makes it so in either case. */
static void pause_begin(struct vm *vm, bool resume) {
    vm->pausing = true;
    vm->resuming = resume;
    vm->record_as = resume ? VM_RUNNING : VM_PAUSED;
    vm_wait_cancel(&vm->pause_saved);
    vm_save_for(vm, &vm->pause_saved);
}

int vm_pause(struct vm *vm) {
    if (!vm->vmm || !vm->vmm->ops->pause)
        return vm_fail(vm, -ERR_UNSUPPORTED,
                       "%s cannot be paused: its backend, %s, does not do that", vm->id,
                       vm->config.backend);
    if (!vm->pausing)
        pause_begin(vm, false);
    return 0;
}

int vm_resume(struct vm *vm) {
    if (!vm->pausing)
        pause_begin(vm, true);
    return 0;
}

void vm_hold_pause(struct vm *vm) {
    pause_hold(vm, true);
}

void vm_end_pause(struct vm *vm) {
    vm->pausing = false;
    vm_wait_cancel(&vm->pause_saved);
    pause_hold(vm, false);
}
