#include <string.h>

#include "guest/env_file.h"
#include "util/errors.h"
#include "vm/vars_internal.h"

/* What is refused at once: names, values, limits, states. */

/* Bytes of the value; -1: unset. */
struct vars_size {
    ssize_t length;
};

static void size_visit(void *arg, const struct vars_commit_change *change) {
    struct vars_size *size = arg;
    if (!change || !change->bytes)
        size->length = -1;
    else if (change->append && size->length > 0)
        size->length += (ssize_t)change->length;
    else
        size->length = (ssize_t)change->length;
}

ssize_t vars_newest_length(const struct vars *vars, const char *name) {
    const struct var *var = vars_find((struct vars *)(uintptr_t)vars, name);
    struct vars_size size = {var && var->set ? (ssize_t)var->length : -1};
    vars_each_pending(vars, name, size_visit, &size);
    return size.length;
}

/* For a commit of `count` changes. Looking through all that is pending for each of many would take
 * its square; they are counted as if nothing were pending, which is near enough for a limit. */
#define VARS_MANY 64

static ssize_t vars_expected_length(const struct vars *vars, const char *name, size_t count) {
    if (count <= VARS_MANY)
        return vars_newest_length(vars, name);
    const struct var *var = vars_find((struct vars *)(uintptr_t)vars, name);
    return var && var->set ? (ssize_t)var->length : -1;
}

static size_t sized(const char *name, ssize_t length) {
    return length < 0 ? 0 : strlen(name) + (size_t)length;
}

/* What is pending has changed in an unforeseen way (a batch has failed, the guest's file was
 * changed): count anew. */
void vars_project(struct vars *vars) {
    struct list pending, *link;
    list_init(&pending);
    list_splice(&pending, &vars->queued);
    vars->projected = vars->total;
    while ((link = list_pop(&pending))) {
        struct vars_commit *commit = LIST_OWNER(link, struct vars_commit, link);
        if (commit->replace)
            vars->projected = 0;
        for (size_t i = 0; i < commit->count; i++) {
            const struct vars_commit_change *c = &commit->changes[i];
            struct vars_size size = {
                commit->replace ? -1 : vars_expected_length(vars, c->name, commit->count)};
            vars->projected -= sized(c->name, size.length);
            size_visit(&size, c);
            vars->projected += sized(c->name, size.length);
        }
        list_append(&vars->queued, &commit->link);
    }
}

int vars_refuse_nul(struct vm *vm, const char *name) {
    return vm_fail(vm, -ERR_INVALID,
                   "env/%s: the value has a NUL byte, which no environment variable can hold",
                   name);
}

int vars_refuse_length(struct vm *vm, const char *name) {
    return vm_fail(
        vm, -ERR_TOO_LARGE,
        "env/%s: a value takes %zu bytes at most, so that a program can be started with it", name,
        var_value_limit(name));
}

int vars_refuse_reserved(struct vm *vm, const char *name) {
    return vm_fail(
        vm, -ERR_INVALID,
        "env/%s: the guest's shells keep this name for themselves, and setting it would end "
        "them",
        name);
}

/* One change, on a variable that has `size` before it (and after it, when it is right). */
static int vars_check_change(struct vm *vm, const struct var_change *c, struct vars_size *size) {
    struct vars_commit_change change = {
        .bytes = (char *)(uintptr_t)c->bytes, .length = c->length, .append = c->append};
    if (!env_name_is_valid(c->name, strlen(c->name)))
        return vm_fail(vm, -ERR_INVALID, "env: a variable cannot have this name");
    if (c->bytes && vm->guest->name_is_reserved(c->name) && size->length < 0)
        return vars_refuse_reserved(vm, c->name);
    if (c->bytes && memchr(c->bytes, 0, c->length))
        return vars_refuse_nul(vm, c->name);
    size_visit(size, &change);
    bool newline = c->bytes && c->length && c->bytes[c->length - 1] == '\n';
    if (size->length >= 0 && !var_fits(c->name, (size_t)size->length, newline))
        return vars_refuse_length(vm, c->name);
    return 0;
}

bool vars_go_to_guest(const struct vars *vars) {
    return vars->vm->state == VM_RUNNING || vars->attach_keeping;
}

int vars_check_state(struct vars *vars) {
    if (vars_go_to_guest(vars))
        return 0;
    switch (vars->vm->state) {
    case VM_BOOTING:
    case VM_STOPPING: /* goes to the disk, for the next boot */
    case VM_STOPPED:
    case VM_FAILED:
        return 0;
    default:
        return vm_check_running(vars->vm);
    }
}

int vars_check(struct vars *vars, const struct var_change *changes, size_t count, bool replace,
               ssize_t *ret_growth) {
    if (vars->vm->gone)
        return -ERR_GONE;
    vm_use(vars->vm);
    int state = vars_check_state(vars);
    if (state < 0)
        return state;
    ssize_t growth = replace ? -(ssize_t)vars->projected : 0;
    for (size_t i = 0; i < count; i++) {
        const struct var_change *c = &changes[i];
        struct vars_size size = {vars_expected_length(vars, c->name, count)};
        if (!replace)
            growth -= (ssize_t)sized(c->name, size.length);
        int r = vars_check_change(vars->vm, c, &size);
        if (r < 0)
            return r;
        growth += (ssize_t)sized(c->name, size.length);
    }
    if ((ssize_t)vars->projected + growth > VARS_LIMIT && (growth > 0 || replace))
        return vm_fail(
            vars->vm, -ERR_NO_ROOM,
            "env/%s: the variables of a VM take %d bytes at most, all together; remove some",
            changes[0].name, VARS_LIMIT);
    *ret_growth = growth;
    return 0;
}
