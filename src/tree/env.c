#include "tree/env.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "tree/scratch.h"
#include "tree/tree.h"
#include "util/errors.h"

/* ID/env/: one file for each variable. */

static void env_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_nlink = 2;
    node_show_look(&node->vm->env_look, &ret_stat->st);
    ret_stat->st.st_mtim = ret_stat->st.st_ctim = *vars_changed(node->vm->vars);
}

static int env_lookup(struct node *dir, const char *name, struct node **ret_node) {
    if (dir->vm->gone)
        return -ERR_NOT_FOUND;
    struct scratch *scratch = scratch_find(dir->vm->env_scratch, name);
    if (!scratch && !vars_find(dir->vm->vars, name))
        return -ERR_NOT_FOUND; /* env_refresh() comes */
    vars_touch(dir->vm->vars);
    struct node *node =
        scratch ? scratch_node(dir, scratch) : node_child(dir, name, &env_key_ops, NULL, dir->vm);
    if (!node)
        return -ERR_NO_MEMORY;
    *ret_node = node;
    return 0;
}

static int env_refresh(struct node *dir, struct vm_wait *wait) {
    int r = vars_refresh_look(dir->vm->vars, wait);
    vars_touch(dir->vm->vars);
    return r;
}

static int env_list(struct node *dir, struct node_list *list) {
    struct var *var;
    if (dir->vm->gone)
        return -ERR_GONE;
    vars_touch(dir->vm->vars);
    RB_FOREACH(var, var_index, vars_index(dir->vm->vars)) {
        int r = node_list_add(list, var->name, S_IFREG, node_inode(dir->vm, var->number));
        if (r < 0)
            return r;
    }
    return scratch_list(dir, dir->vm->env_scratch, list);
}

static int env_refuse_name(struct vm *vm, const char *name) {
    return vm_fail(
        vm, -ERR_INVALID,
        "env/%s: no name for a variable: it takes letters, digits and _, and starts with "
        "no digit",
        name);
}

static void env_create(struct node *dir, const char *name, int flags, mode_t mode,
                       struct request *rq) {
    struct vm *vm = dir->vm;
    if (vm->gone) {
        request_answer(rq, -ERR_GONE);
        return;
    }
    struct var *var = vars_find(vm->vars, name);
    if (scratch_find(vm->env_scratch, name) || (!var && scratch_is_wanted(vm, name, flags))) {
        scratch_create(dir, vm->env_scratch, name, flags, mode & 0700, rq);
        return;
    }
    if (!env_name_is_valid(name, strlen(name))) {
        request_answer(rq, env_refuse_name(vm, name));
        return;
    }
    if (!var && vm->guest->name_is_reserved(name)) {
        request_answer(rq, vars_refuse_reserved(vm, name));
        return;
    }
    if (var && (flags & O_EXCL)) {
        request_answer(rq, -ERR_EXISTS);
        return;
    }
    bool is_new = !var;
    var = vars_create(vm->vars, name);
    if (!var) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    if (is_new)
        var->look.mode = mode & 0600; /* secrets: never more than the owner's, as scratch above */
    struct node *node = node_child(dir, name, &env_key_ops, NULL, vm);
    struct env_handle *h = node ? env_handle_create(node, flags) : NULL;
    if (!h) {
        if (node)
            node_unref(node);
        vars_uncreate(vm->vars, name);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    request_answer_created(rq, node, &h->handle);
}

struct env_unlink {
    struct node *dir; /* a reference */
    char *name;
};

/* Who has it open has a file without a name now. */
static void env_unlinked(void *arg, int status, struct request *rq) {
    struct env_unlink *u = arg;
    if (status == 0 && !u->dir->vm->gone) {
        node_remove_child(u->dir, u->name);
        vars_abandon(u->dir->vm->vars, u->name);
    }
    node_unref(u->dir);
    free(u->name);
    free(u);
    request_answer(rq, status);
}

static void env_unlink(struct node *dir, const char *name, struct request *rq) {
    struct scratch *scratch = dir->vm->gone ? NULL : scratch_find(dir->vm->env_scratch, name);
    if (scratch) {
        scratch_unlink(dir, scratch, false, rq);
        return;
    }
    if (dir->vm->gone || !vars_find(dir->vm->vars, name)) {
        request_answer(rq, -ERR_NOT_FOUND);
        return;
    }
    if (vm_guards(dir->vm, rq->pid, false)) {
        request_answer(rq, -ERR_NOT_PERMITTED);
        return;
    }
    struct env_unlink *u = malloc(sizeof *u);
    if (!u || !(u->name = strdup(name))) {
        free(u);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    u->dir = node_ref(dir);
    struct var_change unset = {.name = name};
    env_commit(dir, &unset, 1, env_unlinked, u, rq);
}

static void env_rmdir(struct node *dir, const char *name, struct request *rq) {
    struct scratch *scratch = dir->vm->gone ? NULL : scratch_find(dir->vm->env_scratch, name);
    if (scratch)
        scratch_unlink(dir, scratch, true, rq);
    else
        request_answer(rq, vars_find(dir->vm->vars, name) ? -ERR_NOT_A_DIRECTORY : -ERR_NOT_FOUND);
}

/* Lock directories (Puppet makes one beside its target). */
static void env_mkdir(struct node *dir, const char *name, mode_t mode, struct request *rq) {
    struct vm *vm = dir->vm;
    if (vm->gone)
        request_answer(rq, -ERR_GONE);
    else if (vars_find(vm->vars, name))
        request_answer(rq, -ERR_EXISTS);
    else if (env_name_is_valid(name, strlen(name)))
        request_answer(rq, vm_fail(vm, -ERR_INVALID, "env/%s: a variable is no directory", name));
    else
        scratch_mkdir(dir, vm->env_scratch, name, mode, rq);
}

static void env_setattr(struct node *node, struct handle *handle, const struct stat *want,
                        unsigned mask, struct request *rq) {
    (void)handle;
    node_set_look(&node->vm->env_look, want, mask);
    if (mask & NODE_SET_MTIME)
        vars_set_changed(node->vm->vars, &want->st_mtim);
    vm_save_soon(node->vm);
    request_answer_attr(rq, node);
}

const struct node_ops env_ops = {
    .stat = env_stat,
    .lookup = env_lookup,
    .refresh = env_refresh,
    .list = env_list,
    .create = env_create,
    .mkdir = env_mkdir,
    .rename = env_rename,
    .unlink = env_unlink,
    .rmdir = env_rmdir,
    .setattr = env_setattr,
};
