#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "tree/env.h"
#include "tree/scratch.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/vm.h"

/* rename(2) in env/. What is renamed onto a KEY is set, and what is renamed away from one is unset:
 * one commit, so that the guest sees both or nothing. Scratch onto scratch concerns nobody else
 * (tree/scratch.c).
 *
 * The kernel moves its name when the answer is success; the nodes and the table have to say the
 * same then. */

/* One side of a rename: a variable, scratch, or a name that is free. */
struct env_side {
    char *name;
    struct scratch *scratch; /* a reference */
    bool is_key;             /* it is a variable, or becomes one */
    bool exists;
    /* What goes with the content to the other name. */
    struct buf content;
    struct look look;
    uint64_t number;
};

struct env_rename {
    struct node *dir; /* a reference */
    bool exchange;
    struct scratch *reserved; /* a reference: made for a variable that becomes scratch; or NULL */
    struct env_side from, to;
};

static void env_side_free(struct env_side *side) {
    free(side->name);
    if (side->scratch)
        scratch_unref(side->scratch);
    buf_free(&side->content);
}

static int env_side_take(struct vm *vm, const char *name, struct env_side *side) {
    struct scratch *scratch = scratch_find(vm->env_scratch, name);
    struct var *var = scratch ? NULL : vars_find(vm->vars, name);
    side->name = strdup(name);
    if (!side->name)
        return -ERR_NO_MEMORY;
    if (scratch) {
        side->scratch = scratch_ref(scratch);
        side->exists = true;
        side->look = scratch->look;
        side->number = scratch->number;
        buf_append(&side->content, scratch->content.data, scratch->content.len);
    } else if (var) {
        side->is_key = side->exists = true;
        side->look = var->look;
        side->number = var->number;
        if (!var->truncated) /* also what is still on its way */
            vars_newest(vm->vars, name, &side->content);
    } else {
        side->is_key = env_name_is_valid(name, strlen(name));
    }
    return side->content.failed;
}

/* The name of `to` now has what `from` was. */
static void env_side_settle(struct node *dir, const struct env_side *from,
                            const struct env_side *to) {
    struct vm *vm = dir->vm;
    struct node *node = node_find_child(dir, to->name);
    if (to->is_key) {
        struct var *var = vars_find(vm->vars, to->name);
        if (var) {
            var->look = from->look;
            var->number = from->number;
            vm_save_soon(vm);
        }
        if (node)
            node_set_kind(node, &env_key_ops, NULL);
        return;
    }
    /* A variable has become scratch. */
    struct scratch *scratch = scratch_find(vm->env_scratch, to->name);
    if (!scratch && scratch_make(vm->env_scratch, to->name, false, from->look.mode, &scratch) < 0) {
        node_forget_child(dir, to->name);
        return;
    }
    scratch_resize(scratch, 0);
    scratch_write(scratch, from->content.data ? from->content.data : "", from->content.len, 0);
    scratch->look = from->look;
    scratch->number = from->number;
    if (node)
        node_set_kind(node, &scratch_file_ops, scratch_ref(scratch));
}

static void env_rename_settle(struct env_rename *r) {
    if (r->exchange) {
        node_forget_child(r->dir, r->from.name);
        node_forget_child(r->dir, r->to.name);
        env_side_settle(r->dir, &r->to, &r->from);
        env_side_settle(r->dir, &r->from, &r->to);
        return;
    }
    node_move_child(r->dir, r->from.name, r->to.name);
    if (r->to.is_key)
        vars_move(r->dir->vm->vars, r->from.name, r->to.name);
    else
        vars_abandon(r->dir->vm->vars, r->from.name);
    if (r->to.scratch && r->to.scratch->table && r->to.is_key)
        scratch_remove(r->to.scratch);
    if (r->from.scratch)
        scratch_remove(r->from.scratch);
    env_side_settle(r->dir, &r->from, &r->to);
}

static void env_rename_free(struct env_rename *r) {
    if (r->reserved)
        scratch_unref(r->reserved);
    node_unref(r->dir);
    env_side_free(&r->from);
    env_side_free(&r->to);
    free(r);
}

static void env_rename_answer(void *arg, int status, struct request *rq) {
    struct env_rename *r = arg;
    if (status == 0)
        env_rename_settle(r);
    else if (r->reserved)
        scratch_remove(r->reserved);
    env_rename_free(r);
    request_answer(rq, status);
}

/* What rename(2) forbids, and what has no meaning here. */
static int env_rename_check(struct node *dir, const struct env_rename *r, unsigned flags) {
    if (flags & ~(unsigned)(RENAME_NOREPLACE | RENAME_EXCHANGE))
        return -ERR_INVALID;
    if (!r->from.exists || (r->exchange && !r->to.exists))
        return -ERR_NOT_FOUND;
    if (r->to.exists && (flags & RENAME_NOREPLACE))
        return -ERR_EXISTS;
    const struct scratch *from = r->from.scratch, *to = r->to.scratch;
    if (from && from->directory && r->to.is_key)
        return r->to.exists ? -ERR_NOT_A_DIRECTORY
                            : vm_fail(dir->vm, -ERR_INVALID, "env/%s: a variable is no directory",
                                      r->to.name);
    if (to && to->directory && !(from && from->directory))
        return -ERR_IS_A_DIRECTORY;
    return 0;
}

/* The place for what becomes scratch is taken before the variable is unset. */
static int env_rename_reserve(struct env_rename *r) {
    struct scratches *table = r->dir->vm->env_scratch;
    struct scratch *scratch = r->to.scratch;
    if (r->to.is_key || !r->from.is_key)
        return 0;
    if (!scratch) {
        int status = scratch_make(table, r->to.name, false, r->from.look.mode, &scratch);
        if (status < 0)
            return status;
        r->reserved = scratch_ref(scratch);
    }
    int status = scratch_check_room(scratch, r->from.content.len);
    if (status < 0)
        vm_fail(r->dir->vm, status, "env: no room for the temporary file %s", r->to.name);
    return status;
}

static void env_rename_commit(struct env_rename *r, struct request *rq) {
    struct var_change changes[2];
    size_t count = 0;
    const char *from = r->from.content.data ? r->from.content.data : "";
    const char *to = r->to.content.data ? r->to.content.data : "";
    if (r->from.is_key)
        changes[count++] = (struct var_change){.name = r->from.name,
                                               .bytes = r->exchange ? to : NULL,
                                               .length = r->exchange ? r->to.content.len : 0};
    if (r->to.is_key)
        changes[count++] =
            (struct var_change){.name = r->to.name, .bytes = from, .length = r->from.content.len};
    env_commit(r->dir, changes, count, env_rename_answer, r, rq);
}

void env_rename(struct node *dir, const char *name, struct node *new_dir, const char *new_name,
                unsigned flags, struct request *rq) {
    struct vm *vm = dir->vm;
    if (new_dir->ops != dir->ops || new_dir->vm != vm) {
        request_answer(rq, -ERR_CROSS_DEVICE);
        return;
    }
    struct env_rename *r = calloc(1, sizeof *r);
    if (!r) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    r->dir = node_ref(dir);
    r->exchange = flags & RENAME_EXCHANGE;
    int status = vm->gone ? -ERR_GONE : env_side_take(vm, name, &r->from);
    if (status == 0)
        status = env_side_take(vm, new_name, &r->to);
    if (status == 0)
        status = env_rename_check(dir, r, flags);
    if (status < 0 || strcmp(name, new_name) == 0) {
        env_rename_free(r);
        request_answer(rq, status);
        return;
    }
    if (r->from.is_key || r->to.is_key) {
        status = env_rename_reserve(r);
        if (status < 0)
            env_rename_answer(r, status, rq);
        else
            env_rename_commit(r, rq);
        return;
    }
    struct scratch *scratch = scratch_ref(r->from.scratch);
    env_rename_free(r);
    scratch_rename_node(dir, vm->env_scratch, scratch, new_name, flags, rq);
    scratch_unref(scratch);
}
