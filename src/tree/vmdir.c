#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tree/config.h"
#include "tree/environ.h"
#include "tree/prepared.h"
#include "tree/run.h"
#include "tree/scratch.h"
#include "tree/tree.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/prepare.h"
#include "vm/vm.h"

/* ID/: the files and directories of one VM, a static table. */

static bool vmdir_error(struct vm *vm, struct buf *out) {
    buf_append(out, vm->error.data, vm->error.len);
    return true;
}

static bool vmdir_info(struct vm *vm, struct buf *out) {
    json_t *info = vm_info(vm);
    char *text = info ? json_dumps(info, JSON_INDENT(2)) : NULL;
    if (text) {
        buf_append_str(out, text);
        buf_append_char(out, '\n');
    }
    free(text);
    json_decref(info);
    return text != NULL;
}

static bool vmdir_ssh_config(struct vm *vm, struct buf *out) {
    vm_ssh_config(vm, out);
    return !out->failed;
}

static const struct node_row vmdir_rows[] = {
    /* First: what removes all meets a file that no tool replaces (vm_guards). */
    {"console", S_IFREG | 0400, &console_ops, NULL},
    {"config", S_IFDIR | 0755, &config_ops, NULL},
    {"env", S_IFDIR | VM_ENV_MODE, &env_ops, NULL},
    {"environ", S_IFREG | VM_ENVIRON_MODE, &environ_ops, NULL},
    {"error", S_IFREG | 0400, &text_ops, vmdir_error},
    {"exec", S_IFREG | 0600, &exec_ops, NULL},
    {"forward", S_IFREG | 0644, &forward_ops, NULL},
    {"info", S_IFREG | 0444, &text_ops, vmdir_info},
    {"jobs", S_IFDIR | 0700, &jobs_ops, NULL},
    {"run", S_IFREG | 0755, &text_ops, run_print},
    {"ssh_config", S_IFREG | 0400, &text_ops, vmdir_ssh_config},
    {"status", S_IFREG | 0644, &status_ops, NULL},
};
#define VMDIR_ROWS (sizeof vmdir_rows / sizeof *vmdir_rows)
_Static_assert(VMDIR_ROWS < SETTING_FIRST_SLOT, "inode numbers of static files run into others");

uint64_t vmdir_slot(const struct node_row *row) {
    return row ? (uint64_t)(row - vmdir_rows) + 1 : 0;
}

/* What is prepared has what makes a VM, and words about it; a VM has the rest. */
static bool vmdir_has(const struct vm *vm, const struct node_row *row) {
    if (vm->role == VM_ORDINARY)
        return row->ops != &forward_ops;
    return row->ops == &config_ops || row->ops == &env_ops || row->ops == &forward_ops ||
           row->generate == vmdir_error;
}

static const struct node_row *vmdir_row(const struct vm *vm, const char *name) {
    for (size_t i = 0; i < VMDIR_ROWS; i++)
        if (strcmp(vmdir_rows[i].name, name) == 0)
            return vmdir_has(vm, &vmdir_rows[i]) ? &vmdir_rows[i] : NULL;
    return NULL;
}

/* A copy of what is prepared, here or elsewhere, is to have no `error`: it is read by its name. */
static bool vmdir_lists(const struct vm *vm, const struct node_row *row) {
    return vmdir_has(vm, row) && (vm->role == VM_ORDINARY || row->generate != vmdir_error);
}

static void vmdir_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, 0);
    ret_stat->st.st_mode = S_IFDIR | 0755;
    ret_stat->st.st_nlink = 2;
    ret_stat->st.st_mtim = node->vm->created;
    ret_stat->st.st_ctim = node->vm->created;
    /* A rename that makes a VM of it leaves the kernel with the old inode under the new name. */
    if (node->vm->role == VM_PREPARED)
        ret_stat->entry_seconds = 0;
}

/* mv, install and tar remove the target, and then create it anew, insisting that it is not there.
 */
#define VMDIR_AWAY_MS 250

/* When a file that can be replaced so was last removed; NULL: it cannot. */
static uint64_t *vmdir_removed(struct vm *vm, const struct node_row *row) {
    return row->ops == &environ_ops   ? &vm->environ_removed
           : row->ops == &forward_ops ? &vm->forward_removed
           : row->ops == &status_ops  ? &vm->status_removed
                                      : NULL;
}

static bool vmdir_is_away(struct vm *vm, const struct node_row *row) {
    const uint64_t *removed = vmdir_removed(vm, row);
    return removed && *removed && uv_now(vm->daemon->loop) - *removed < VMDIR_AWAY_MS;
}

static void vmdir_leave(struct node *dir, const struct node_row *row) {
    uint64_t *removed = vmdir_removed(dir->vm, row);
    if (removed)
        *removed = uv_now(dir->vm->daemon->loop);
    node_forget_child(dir, row->name);
}

static int vmdir_lookup(struct node *dir, const char *name, struct node **ret_node) {
    const struct node_row *row = vmdir_row(dir->vm, name);
    if (dir->vm->gone || (row && vmdir_is_away(dir->vm, row)) ||
        (row && prepare_hides(dir->vm, vmdir_slot(row))))
        return -ERR_NOT_FOUND;
    if (!row) {
        struct scratch *scratch = scratch_find(dir->vm->vm_scratch, name);
        *ret_node = scratch ? scratch_node(dir, scratch) : NULL;
        return !scratch ? -ERR_NOT_FOUND : *ret_node ? 0 : -ERR_NO_MEMORY;
    }
    /* Each use of exec has an inode to itself: a held WRITE locks its inode, and the kernel keeps
     * one file position for all who share an open file. */
    struct node *node = row->ops == &exec_ops
                            ? node_child_private(dir, name, row->ops, row, dir->vm)
                            : node_child(dir, name, row->ops, row, dir->vm);
    if (!node)
        return -ERR_NO_MEMORY;
    *ret_node = node;
    return 0;
}

static int vmdir_list(struct node *dir, struct node_list *list) {
    for (size_t i = 0; i < VMDIR_ROWS; i++) {
        if (!vmdir_lists(dir->vm, &vmdir_rows[i]))
            continue;
        int r = node_list_add(list, vmdir_rows[i].name, vmdir_rows[i].mode,
                              node_inode(dir->vm, vmdir_slot(&vmdir_rows[i])));
        if (r < 0)
            return r;
    }
    return dir->vm->gone ? 0 : scratch_list(dir, dir->vm->vm_scratch, list);
}

/* Beside one that tools replace? */
static bool vmdir_wants_scratch(const char *name, int flags) {
    static const char *const replaced[] = {"environ", "forward", "status"};
    for (size_t i = 0; i < sizeof replaced / sizeof *replaced; i++)
        if (scratch_is_wanted_beside(replaced[i], name, flags))
            return true;
    return false;
}

/* Files that have been removed, and the temporary ones of tools that replace them. */
static void vmdir_create(struct node *dir, const char *name, int flags, mode_t mode,
                         struct request *rq) {
    const struct node_row *row = vmdir_row(dir->vm, name);
    if (dir->vm->gone)
        request_answer(rq, -ERR_GONE);
    else if (row && row->ops == &environ_ops)
        environ_create(dir, row, flags, rq);
    else if (row && row->ops == &forward_ops) {
        prepare_show(dir->vm, vmdir_slot(row));
        forward_create(dir, row, flags, rq);
    } else if (row && row->ops == &status_ops)
        status_create(dir, row, flags, rq);
    else if (vmdir_wants_scratch(name, flags) || scratch_find(dir->vm->vm_scratch, name))
        scratch_create(dir, dir->vm->vm_scratch, name, flags, mode & 0700, rq);
    else
        request_answer(rq, -ERR_NOT_PERMITTED);
}

/* Lock directories have names that no built-in one will ever have. */
static void vmdir_mkdir(struct node *dir, const char *name, mode_t mode, struct request *rq) {
    const struct node_row *row = vmdir_row(dir->vm, name);
    struct node *node = NULL;
    if (row && !dir->vm->gone) /* it was hidden */
        prepare_show(dir->vm, vmdir_slot(row));
    if (row && vmdir_lookup(dir, name, &node) == 0)
        request_answer_entry(rq, node);
    else if (dir->vm->gone)
        request_answer(rq, -ERR_GONE);
    else if (strchr(name, '.'))
        scratch_mkdir(dir, dir->vm->vm_scratch, name, mode, rq);
    else
        request_answer(rq, -ERR_NOT_PERMITTED);
}

static int vmdir_print(struct vm *vm, const struct node_row *row, struct buf *out) {
    if (row->ops == &environ_ops)
        return environ_print(vm, out);
    if (row->ops == &forward_ops)
        buf_append(out, vm->forward.data ? vm->forward.data : "", vm->forward.len);
    else
        buf_printf(out, "%s\n", vm_state_name(vm->state));
    return out->failed;
}

/* `sed -i.bak` moves a file away before it puts the new one there: the other name gets a copy. */
static int vmdir_copy(struct node *dir, const struct node_row *row, const char *new_name,
                      unsigned flags) {
    cleanup_buf struct buf text = {0};
    struct scratch *copy = scratch_find(dir->vm->vm_scratch, new_name);
    if (copy && (copy->directory || (flags & RENAME_NOREPLACE)))
        return copy->directory ? -ERR_IS_A_DIRECTORY : -ERR_EXISTS;
    int r = vmdir_print(dir->vm, row, &text);
    if (r == 0 && !copy)
        r = scratch_make(dir->vm->vm_scratch, new_name, false, 0600, &copy);
    if (r == 0)
        r = scratch_resize(copy, 0);
    if (r == 0)
        r = scratch_write(copy, text.data ? text.data : "", text.len, 0);
    if (r == 0)
        vmdir_leave(dir, row);
    return r;
}

void vmdir_take_scratch(struct node *dir, struct scratch *scratch, const char *name) {
    node_forget_child(dir, name);
    if (!scratch->table)
        return;
    node_remove_child(dir, scratch->name);
    scratch_remove(scratch);
}

/* A rename of scratch onto a file. */
static void vmdir_replace(struct node *dir, struct scratch *scratch, const struct node_row *to,
                          unsigned flags, struct request *rq) {
    if (!vmdir_removed(dir->vm, to) || (flags & RENAME_EXCHANGE))
        request_answer(rq, -ERR_NOT_PERMITTED);
    else if ((flags & RENAME_NOREPLACE) && !vmdir_is_away(dir->vm, to))
        request_answer(rq, -ERR_EXISTS);
    else if (scratch->directory)
        request_answer(rq, -ERR_NOT_A_DIRECTORY);
    else if (to->ops == &environ_ops)
        environ_take_scratch(dir, scratch, to, rq);
    else if (to->ops == &forward_ops)
        forward_take(dir, to, scratch, rq);
    else
        status_take(dir, to, scratch, rq);
}

static void vmdir_rename(struct node *dir, const char *name, struct node *new_dir,
                         const char *new_name, unsigned flags, struct request *rq) {
    const struct node_row *from = vmdir_row(dir->vm, name), *to = vmdir_row(dir->vm, new_name);
    struct scratch *scratch = dir->vm->gone ? NULL : scratch_find(dir->vm->vm_scratch, name);
    if (new_dir->ops != dir->ops || new_dir->vm != dir->vm)
        request_answer(rq, -ERR_CROSS_DEVICE);
    else if (!scratch && !from)
        request_answer(rq, -ERR_NOT_FOUND);
    else if (from && vmdir_removed(dir->vm, from) && !to && !(flags & RENAME_EXCHANGE))
        request_answer(rq, vmdir_copy(dir, from, new_name, flags));
    else if (from)
        request_answer(rq, -ERR_NOT_PERMITTED);
    else if (to)
        vmdir_replace(dir, scratch, to, flags, rq);
    else
        scratch_rename_node(dir, dir->vm->vm_scratch, scratch, new_name, flags, rq);
}

/* Removing a built-in file succeeds and changes nothing, so that `rm -r ID` gets to the rmdir that
 * destroys the VM. The kernel takes the inode for dead, though: the next lookup has to give a new
 * one. */
static void vmdir_unlink(struct node *dir, const char *name, struct request *rq) {
    const struct node_row *row = vmdir_row(dir->vm, name);
    struct scratch *scratch = dir->vm->gone ? NULL : scratch_find(dir->vm->vm_scratch, name);
    if (scratch) {
        scratch_unlink(dir, scratch, false, rq);
        return;
    }
    if (row && S_ISDIR(row->mode)) {
        request_answer(rq, -ERR_IS_A_DIRECTORY);
        return;
    }
    if (row && !dir->vm->gone && vm_guards(dir->vm, rq->pid, !vmdir_removed(dir->vm, row))) {
        request_answer(rq, -ERR_NOT_PERMITTED);
        return;
    }
    if (row)
        vmdir_leave(dir, row);
    request_answer(rq, row ? 0 : -ERR_NOT_FOUND);
}

static void vmdir_rmdir(struct node *dir, const char *name, struct request *rq) {
    const struct node_row *row = vmdir_row(dir->vm, name);
    struct scratch *scratch = dir->vm->gone ? NULL : scratch_find(dir->vm->vm_scratch, name);
    if (scratch) {
        scratch_unlink(dir, scratch, true, rq);
        return;
    }
    if (row && !S_ISDIR(row->mode)) {
        request_answer(rq, -ERR_NOT_A_DIRECTORY);
        return;
    }
    if (row && !dir->vm->gone && vm_guards(dir->vm, rq->pid, true)) {
        request_answer(rq, -ERR_NOT_PERMITTED);
        return;
    }
    node_forget_child(dir, name);
    request_answer(rq, row ? 0 : -ERR_NOT_FOUND);
}

const struct node_ops vmdir_ops = {
    .stat = vmdir_stat,
    .lookup = vmdir_lookup,
    .list = vmdir_list,
    .create = vmdir_create,
    .mkdir = vmdir_mkdir,
    .rename = vmdir_rename,
    .unlink = vmdir_unlink,
    .rmdir = vmdir_rmdir,
    .setattr = node_setattr_ignore,
};
