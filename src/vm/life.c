#include "vm/vm.h"

#include <stdlib.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/command.h"

/* What ends a VM without being asked, and what keeps it from being destroyed. */

#define GUARD_MS 60000  /* for how long a remover is remembered */
#define GUARD_MOST 1024 /* removers; while there are so many, anybody may be one */

static void guard_forget(struct vm *vm, uint64_t now) {
    size_t kept = 0;
    for (size_t i = 0; i < vm->remover_count; i++)
        if (now - vm->removers[i].since < GUARD_MS)
            vm->removers[kept++] = vm->removers[i];
    vm->remover_count = kept;
}

static struct vm_remover *guard_find(struct vm *vm, pid_t pid) {
    for (size_t i = 0; i < vm->remover_count; i++)
        if (vm->removers[i].pid == pid)
            return &vm->removers[i];
    return NULL;
}

static void guard_note(struct vm *vm, pid_t pid, uint64_t now) {
    struct vm_remover *remover = guard_find(vm, pid), *more;
    if (!remover && vm->remover_count < GUARD_MOST &&
        (more = realloc(vm->removers, (vm->remover_count + 1) * sizeof *more))) {
        vm->removers = more;
        remover = &vm->removers[vm->remover_count++];
    }
    if (remover)
        *remover = (struct vm_remover){pid, now};
}

bool vm_guards(struct vm *vm, pid_t pid, bool whole) {
    uint64_t now = uv_now(vm->daemon->loop);
    if (vm->role != VM_ORDINARY || strcmp(vm->config.protected, "yes") != 0)
        return false;
    guard_forget(vm, now);
    if (!whole)
        return vm->remover_count == GUARD_MOST || guard_find(vm, pid);
    guard_note(vm, pid, now);
    vm_fail(vm, -ERR_NOT_PERMITTED,
            "%s is protected, and was not removed: `echo no > config/protected` allows it", vm->id);
    return true;
}

void vm_use(struct vm *vm) {
    vm->used = uv_now(vm->daemon->loop);
}

static bool life_is_over(const struct vm *vm, struct buf *why) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (vm->config.lifetime && now.tv_sec - vm->running_since.tv_sec >= vm->config.lifetime) {
        buf_printf(why, "it has run for its lifetime of %u s", vm->config.lifetime);
        return true;
    }
    if (!vm->config.idle_timeout || commands_are_running(vm->commands) ||
        uv_now(vm->daemon->loop) - vm->used < (uint64_t)vm->config.idle_timeout * 1000)
        return false;
    buf_printf(why, "nobody has asked for a variable or a command for its idle_timeout of %u s",
               vm->config.idle_timeout);
    return true;
}

#define LIFE_AGAIN_MS 30000

/* It could not be stopped (a full disk): it is tried again, but not every second. */
static bool life_was_refused(const struct vm *vm) {
    return vm->stop_refused && uv_now(vm->daemon->loop) - vm->stop_refused < LIFE_AGAIN_MS;
}

void vm_check_life(struct vm *vm) {
    cleanup_buf struct buf why = {0};
    bool runs = vm->state == VM_RUNNING || vm->state == VM_PAUSED || vm->state == VM_UNREACHABLE;
    if (!runs || !vm->running_since.tv_sec || life_was_refused(vm) || !life_is_over(vm, &why))
        return;
    vm_fail(vm, -ERR_GONE, "%s is stopped: %s; `echo running > status` starts it again", vm->id,
            why.failed ? "its time is over" : why.data);
    vm_stop(vm);
}
