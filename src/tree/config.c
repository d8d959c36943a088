#include "tree/config.h"

#include <fcntl.h>
#include <stdio.h> /* RENAME_… */
#include <stdlib.h>
#include <string.h>

#include "tree/scratch.h"
#include "tree/tree.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/prepare.h"
#include "vm/vm.h"

/* ID/config/: a file for each setting of the VM, and the temporary files of the tools that replace
 * them. */

/* Tools remove or rename a target and create it anew, insisting that it is not there. */
#define SETTING_AWAY_MS 250

_Static_assert(SETTING_FIRST_SLOT + CONFIG_SETTINGS <= INODE_FIRST_DYNAMIC,
               "inode numbers of settings run into others");

static uint64_t config_dir_slot(const struct config_setting *setting) {
    return SETTING_FIRST_SLOT + (uint64_t)(setting - config_settings);
}

static struct vm_config_file *config_dir_file(struct vm *vm, const struct config_setting *setting) {
    return &vm->config_files[setting - config_settings];
}

static void config_dir_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_nlink = 2;
    ret_stat->st.st_mtim = ret_stat->st.st_ctim = node->vm->created;
}

static struct scratch *config_dir_scratch(const struct node *dir, const char *name) {
    return dir->vm->gone ? NULL : scratch_find(dir->vm->config_scratch, name);
}

static bool config_dir_is_away(struct vm *vm, const struct config_setting *setting) {
    uint64_t removed = config_dir_file(vm, setting)->removed;
    return removed && uv_now(vm->daemon->loop) - removed < SETTING_AWAY_MS;
}

static int config_dir_lookup(struct node *dir, const char *name, struct node **ret_node) {
    const struct config_setting *setting = config_find(name);
    struct scratch *scratch = config_dir_scratch(dir, name);
    if (dir->vm->gone || (!setting && !scratch) ||
        (setting && (config_dir_is_away(dir->vm, setting) ||
                     prepare_hides(dir->vm, config_dir_slot(setting)))))
        return -ERR_NOT_FOUND;
    struct node *node =
        setting ? node_child(dir, name, &setting_ops, NULL, dir->vm) : scratch_node(dir, scratch);
    if (!node)
        return -ERR_NO_MEMORY;
    *ret_node = node;
    return 0;
}

static int config_dir_list(struct node *dir, struct node_list *list) {
    if (dir->vm->gone)
        return -ERR_GONE;
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        const struct config_setting *setting = &config_settings[i];
        if (config_dir_is_away(dir->vm, setting))
            continue;
        int r = node_list_add(list, setting->name, S_IFREG,
                              node_inode(dir->vm, config_dir_slot(setting)));
        if (r < 0)
            return r;
    }
    return scratch_list(dir, dir->vm->config_scratch, list);
}

/* What mkstemp(3) makes, a name that is never a setting's, or SETTING.suffix (tree/scratch.c). */
static bool config_dir_wants_scratch(const char *name, int flags) {
    if (scratch_name_is_special(name))
        return true;
    cleanup_free char *setting = strndup(name, strcspn(name, "."));
    return (flags & O_EXCL) && ((flags & O_ACCMODE) == O_RDWR || (setting && config_find(setting)));
}

static void config_dir_create(struct node *dir, const char *name, int flags, mode_t mode,
                              struct request *rq) {
    struct vm *vm = dir->vm;
    if (vm->gone)
        request_answer(rq, -ERR_GONE);
    else if (config_find(name)) {
        prepare_show(vm, config_dir_slot(config_find(name)));
        setting_create(dir, name, flags, rq);
    } else if (config_dir_scratch(dir, name) || config_dir_wants_scratch(name, flags))
        scratch_create(dir, vm->config_scratch, name, flags, mode, rq);
    else
        request_answer(rq, vm_configure(vm, name, "", 0, NULL)); /* has words about the name */
}

/* Lock directories have names that no setting will ever have. */
static void config_dir_mkdir(struct node *dir, const char *name, mode_t mode, struct request *rq) {
    if (dir->vm->gone)
        request_answer(rq, -ERR_GONE);
    else if (strchr(name, '.'))
        scratch_mkdir(dir, dir->vm->config_scratch, name, mode, rq);
    else
        request_answer(rq, config_find(name) ? -ERR_EXISTS : -ERR_NOT_PERMITTED);
}

/* Its name is taken for free for a moment. The kernel takes the inode for dead, or for that of
 * another name. */
static void config_dir_leave(struct node *dir, const struct config_setting *setting) {
    config_dir_file(dir->vm, setting)->removed = uv_now(dir->vm->daemon->loop);
    node_forget_child(dir, setting->name);
}

/* `sed -i.bak` and `cp -b` move a setting away before they put the new one there: the other name
 * gets a copy. */
static int config_dir_copy(struct node *dir, const struct config_setting *setting,
                           const char *new_name, unsigned flags) {
    cleanup_buf struct buf text = {0};
    struct scratch *copy = config_dir_scratch(dir, new_name);
    if (copy && (copy->directory || (flags & RENAME_NOREPLACE)))
        return copy->directory ? -ERR_IS_A_DIRECTORY : -ERR_EXISTS;
    setting_print(dir->vm, setting, &text);
    int r = text.failed;
    if (r == 0 && !copy)
        r = scratch_make(dir->vm->config_scratch, new_name, false, 0644, &copy);
    if (r == 0)
        r = scratch_resize(copy, 0);
    if (r == 0)
        r = scratch_write(copy, text.data ? text.data : "", text.len, 0);
    if (r == 0) {
        copy->look.changed = config_dir_file(dir->vm, setting)->changed;
        config_dir_leave(dir, setting);
    }
    return r;
}

/* A rename of scratch onto a setting. */
struct config_dir_rename {
    struct node *dir;        /* a reference */
    struct scratch *scratch; /* a reference */
    const struct config_setting *setting;
};

static void config_dir_renamed(void *arg, int status, struct request *rq) {
    struct config_dir_rename *r = arg;
    struct vm *vm = r->dir->vm;
    if (status == 0 && !vm->gone && r->scratch->table) {
        config_dir_file(vm, r->setting)->changed = r->scratch->look.changed;
        config_dir_file(vm, r->setting)->removed = 0;
        node_move_child(r->dir, r->scratch->name, r->setting->name);
        struct node *node = node_find_child(r->dir, r->setting->name);
        if (node)
            node_set_kind(node, &setting_ops, NULL);
        scratch_remove(r->scratch);
    }
    scratch_unref(r->scratch);
    node_unref(r->dir);
    free(r);
    request_answer(rq, status);
}

static void config_dir_take(struct node *dir, struct scratch *scratch,
                            const struct config_setting *setting, struct request *rq) {
    struct config_dir_rename *rename = malloc(sizeof *rename);
    if (!rename) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    *rename = (struct config_dir_rename){node_ref(dir), scratch_ref(scratch), setting};
    setting_commit(dir, setting->name, &scratch->content, config_dir_renamed, rename, rq);
}

static void config_dir_move(struct node *dir, const char *name, struct node *new_dir,
                            const char *new_name, unsigned flags, struct request *rq) {
    const struct config_setting *from = config_find(name), *to = config_find(new_name);
    struct scratch *scratch = config_dir_scratch(dir, name);
    if (new_dir->ops != dir->ops || new_dir->vm != dir->vm) {
        request_answer(rq, -ERR_CROSS_DEVICE);
    } else if (dir->vm->gone || (!scratch && !from)) {
        request_answer(rq, -ERR_NOT_FOUND);
    } else if (from && !to && !(flags & RENAME_EXCHANGE)) {
        request_answer(rq, config_dir_copy(dir, from, new_name, flags));
    } else if (from || (to && (flags & RENAME_EXCHANGE))) {
        request_answer(rq, -ERR_NOT_PERMITTED);
    } else if (!to) {
        scratch_rename_node(dir, dir->vm->config_scratch, scratch, new_name, flags, rq);
    } else if ((flags & RENAME_NOREPLACE) || scratch->directory) {
        request_answer(rq, scratch->directory ? -ERR_NOT_A_DIRECTORY : -ERR_EXISTS);
    } else {
        config_dir_take(dir, scratch, to, rq);
    }
}

/* Removing a setting succeeds and changes nothing, so that `rm -r ID` gets to its end. */
static void config_dir_unlink(struct node *dir, const char *name, struct request *rq) {
    const struct config_setting *setting = config_find(name);
    struct scratch *scratch = config_dir_scratch(dir, name);
    if (scratch) {
        scratch_unlink(dir, scratch, false, rq);
        return;
    }
    if (setting && !dir->vm->gone && vm_guards(dir->vm, rq->pid, false)) {
        request_answer(rq, -ERR_NOT_PERMITTED);
        return;
    }
    if (setting && !dir->vm->gone)
        config_dir_leave(dir, setting);
    request_answer(rq, setting ? 0 : -ERR_NOT_FOUND);
}

static void config_dir_rmdir(struct node *dir, const char *name, struct request *rq) {
    struct scratch *scratch = config_dir_scratch(dir, name);
    if (scratch)
        scratch_unlink(dir, scratch, true, rq);
    else
        request_answer(rq, config_find(name) ? -ERR_NOT_A_DIRECTORY : -ERR_NOT_FOUND);
}

const struct node_ops config_ops = {
    .stat = config_dir_stat,
    .lookup = config_dir_lookup,
    .list = config_dir_list,
    .create = config_dir_create,
    .mkdir = config_dir_mkdir,
    .rename = config_dir_move,
    .unlink = config_dir_unlink,
    .rmdir = config_dir_rmdir,
    .setattr = node_setattr_ignore,
};
