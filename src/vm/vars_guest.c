#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/vars_internal.h"

/* What is learned from the guest. Its env file is the truth while it runs: it is read when somebody
 * asks and what is known is older than VAR_FRESH_MS, again and again while somebody looks, and
 * whenever an update finds it changed. */

#define VARS_SEAL_MS 20
#define VARS_POLL_MS 700     /* so that a change shows within a second */
#define VARS_POLLED 32       /* VMs; when more are looked at, their turns come later */
#define VARS_LOOKED_MS 60000 /* how long after a look it goes on */

int vars_explain(struct vars *vars, const char *doing, int status, const char *output,
                 size_t length) {
    const char *end = memchr(output, '\n', length);
    size_t words = end ? (size_t)(end - output) : length;
    const char *path = vars->vm->config.env_file;
    if (status == GUEST_CHANGED)
        return vm_fail(
            vars->vm, -ERR_BUSY,
            "%s %s in the guest failed: others keep changing it; the variables are unchanged",
            doing, path);
    bool full = memmem(output, length, "No space", 8);
    bool denied = memmem(output, length, "Permission denied", 17);
    cleanup_free char *said = strndup(output, words > 200 ? 200 : words);
    return vm_fail_quoting(
        vars->vm,
        full     ? -ERR_NO_ROOM
        : denied ? -ERR_DENIED
                 : -ERR_IO,
        said ? said : "",
        "%s %s in the guest failed%s; the variables are unchanged%s%s%s. It said: ", doing, path,
        full     ? " for want of room"
        : denied ? " for want of permission"
                 : "",
        denied ? ". Name a file in config/env_file that " : "", denied ? vars->vm->user : "",
        denied ? " may write" : "");
}

static void vars_end_attach(struct vars *vars, int status) {
    void (*attached)(struct vm *, int) = vars->attached;
    vars->attached = NULL;
    vars->attach_keeping = false;
    if (status == 0)
        vars->learned = uv_now(vars->vm->daemon->loop);
    if (attached)
        attached(vars->vm, status);
    vars_start_batch(vars);
}

/* After a boot the table wins, if it is the user's: it is sent for as long as it is not what the
 * guest has. Else, and after a lost connection, the guest's file is the truth. */
static int vars_attach_learn(struct vars *vars, const char *text, size_t length) {
    cleanup_buf struct buf ours = {0};
    vars->attach_read = true;
    if (!vars->attach_booted)
        return vars_learn(vars, text, length, false);
    if (!vars->injected) { /* the image has variables of its own */
        int learned = vars_learn(vars, text, length, true);
        vars->sent_generation = vars->owned ? vars->generation - 1 : vars->generation;
        return learned;
    }
    int r = vars_learn_kept(vars, text, length);
    if (r == 0)
        r = vars_format(vars, NULL, &ours);
    bool same = r == 0 && ours.len == length && memcmp(ours.data, text, length) == 0;
    vars->sent_generation = same ? vars->generation : vars->generation - 1;
    return r;
}

static void vars_attach_sent(void *arg, int status, const char *output, size_t length) {
    struct vm *vm = arg;
    struct vars *vars = vm->vars;
    vars->attach_sending = false;
    if (!vm->gone && vars->attached) {
        if (status == GUEST_CHANGED && vars->retries++ < VARS_RETRIES) {
            vars->attach_read = false;
            status = vars_read(vars);
        } else if (status > 0) {
            status = vars_explain(vars, "writing", status, output, length);
        } else if (status == 0) {
            vars->absent = false;
            vars_attach_step(vars);
        }
        if (status < 0)
            vars_end_attach(vars, status);
    }
    vm_unref(vm);
}

void vars_attach_step(struct vars *vars) {
    if (!vars->attached || !vars->attach_read || vars->refreshing || vars->flight ||
        vars->attach_sending)
        return;
    if (vars->attach_booted && !vars->attach_keeping && vars->sent_generation != vars->generation) {
        vars->sent_generation = vars->generation;
        int r = vars_send(vars, NULL, vars_attach_sent, vars->vm);
        if (r < 0) {
            vars_end_attach(vars, r);
            return;
        }
        vars->attach_sending = true;
        vm_ref(vars->vm);
        return;
    }
    if (!vars->attach_keeping) {
        vars->attach_keeping = true;
        vars_keep_promises(vars);
    }
    if (vars->attached && !vars_promises_are_kept_now(vars))
        vars_end_attach(vars, 0);
}

static void vars_take(struct vars *vars, int status, const char *text, size_t length) {
    struct vm *vm = vars->vm;
    vars->refreshing = false;
    vars->unsealed = false;
    vars->absent = status == GUEST_ABSENT;
    if (status > 0 && status != GUEST_ABSENT) {
        if (vars->attached || vars->rereading || !list_is_empty(&vars->refresh_waits))
            vars_explain(vars, "reading", status, text, length);
        status = -ERR_IO;
    }
    if (status == GUEST_ABSENT) {
        length = 0;
        status = 0;
    }
    if (status == 0)
        status = vars->attached && !vars->attach_keeping ? vars_attach_learn(vars, text, length)
                                                         : vars_learn(vars, text, length, false);
    if (status == 0)
        vars->learned = uv_now(vm->daemon->loop);
    vm_wait_wake(&vars->refresh_waits, status);
    if (vars->rereading) {
        vars->rereading = false;
        if (status == 0)
            vars_resend(vars);
        else
            vars_batch_end(vars, status);
    }
    vars_start_batch(vars);
    if (vars->attached && status < 0)
        vars_end_attach(vars, status);
    vars_attach_step(vars);
}

static void vars_have_read(void *arg, int status, const char *output, size_t length) {
    struct vm *vm = arg;
    if (!vm->gone && vm->vars->refreshing)
        vars_take(vm->vars, status, output, length);
    vm_unref(vm);
}

int vars_read(struct vars *vars) {
    struct vm *vm = vars->vm;
    cleanup_buf struct buf script = {0};
    vm->guest->env_read(&script, vm->config.env_file);
    if (script.failed)
        return -ERR_NO_MEMORY;
    int r = control_request(vm->control, &script, vars_have_read, vm);
    if (r < 0)
        return r;
    vm_ref(vm);
    vars->refreshing = true;
    return 0;
}

static bool vars_are_fresh(const struct vars *vars, unsigned ms) {
    return vars->flight || (vars->learned && uv_now(vars->vm->daemon->loop) - vars->learned < ms);
}

static int vars_wait_fresh(struct vars *vars, struct vm_wait *wait) {
    if (vars->vm->state != VM_RUNNING || vars_are_fresh(vars, VAR_FRESH_MS))
        return 1;
    int r = vars->refreshing ? 0 : vars_read(vars);
    if (r == 0)
        list_append(&vars->refresh_waits, &wait->link);
    return r;
}

int vars_refresh(struct vars *vars, struct vm_wait *wait) {
    struct vm *vm = vars->vm;
    if (vm->gone)
        return -ERR_GONE;
    vm_use(vm);
    if (vm->state == VM_UNREACHABLE)
        return vm_check_running(vm);
    return vars_wait_fresh(vars, wait);
}

static void vars_poll(uv_timer_t *timer) {
    struct vars *vars = timer->data;
    struct vm *vm = vars->vm;
    if (vm->gone || vm->state != VM_RUNNING)
        return;
    if (!vars->refreshing && !vars->flight &&
        (vars->unsealed || !vars_are_fresh(vars, VARS_POLL_MS / 2)) && vars_read(vars) < 0)
        log_debug("%s: the variables could not be read", vm->id);
    if (uv_now(vm->daemon->loop) - vars->used <= VARS_LOOKED_MS)
        uv_timer_start(timer, vars_poll,
                       (uint64_t)VARS_POLL_MS * (1 + vm->daemon->looked_at / VARS_POLLED), 0);
}

bool vars_are_looked_at(const struct vars *vars) {
    return vars->used && uv_now(vars->vm->daemon->loop) - vars->used <= VARS_LOOKED_MS;
}

int vars_refresh_look(struct vars *vars, struct vm_wait *wait) {
    const struct vm *vm = vars->vm;
    bool polled = vars_are_looked_at(vars) && vm->daemon->looked_at <= VARS_POLLED;
    return polled || vm->gone ? 1 : vars_wait_fresh(vars, wait);
}

void vars_seal_soon(struct vars *vars) {
    vars->unsealed = true;
    uv_timer_start(vars->poll, vars_poll, VARS_SEAL_MS, 0);
}

void vars_touch(struct vars *vars) {
    struct vm *vm = vars->vm;
    vars->used = uv_now(vm->daemon->loop);
    if (vm->state == VM_RUNNING && !uv_is_active((uv_handle_t *)vars->poll))
        uv_timer_start(vars->poll, vars_poll, 0, 0);
}

int vars_inject(struct vars *vars, struct buf *out) {
    vars_apply_promises(vars);
    vars->injected = vars->owned;
    return vars->owned ? vars_format(vars, NULL, out) : 0;
}

void vars_assume_injected(struct vars *vars) {
    vars->injected = vars->owned;
}

void vars_attach(struct vars *vars, bool booted, void (*done)(struct vm *vm, int status)) {
    vars->attached = done;
    vars->attach_keeping = false;
    vars->attach_booted = booted;
    vars->attach_read = false;
    vars->retries = 0;
    int r = vars->refreshing ? 0 : vars_read(vars);
    if (r < 0)
        vars_end_attach(vars, r);
}

void vars_meet(struct vars *vars, bool before, void (*done)(struct vm *vm, int status)) {
    vars->injected = before;
    vars_attach(vars, !before || vars->owned, done);
}

void vars_leave(struct vars *vars) {
    vars->owned = false;
}

void vars_take_along(struct vars *vars) {
    vars->owned = vars->owned || vars_count(vars) > 0;
}
