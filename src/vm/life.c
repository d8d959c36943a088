#include "vm/vm.h"

#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/command.h"

/* What ends a VM without being asked, and what keeps it from being destroyed. */

#define GUARD_MS 60000 /* for how long a remover is remembered */

bool vm_guards(struct vm *vm, pid_t pid, bool whole) {
    uint64_t now = uv_now(vm->daemon->loop);
    if (vm->role != VM_ORDINARY || strcmp(vm->config.protected, "yes") != 0)
        return false;
    if (whole) {
        vm->remover = pid;
        vm->remover_since = now;
        vm_fail(vm, -ERR_NOT_PERMITTED,
                "%s is protected, and was not removed: `echo no > config/protected` allows it",
                vm->id);
        return true;
    }
    return vm->remover && vm->remover == pid && now - vm->remover_since < GUARD_MS;
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

void vm_check_life(struct vm *vm) {
    cleanup_buf struct buf why = {0};
    if ((vm->state != VM_RUNNING && vm->state != VM_PAUSED) || !vm->running_since.tv_sec ||
        !life_is_over(vm, &why))
        return;
    vm_fail(vm, -ERR_GONE, "%s is stopped: %s; `echo running > status` starts it again", vm->id,
            why.failed ? "its time is over" : why.data);
    vm_stop(vm);
}
