#include <stdlib.h>
#include <string.h>

#include "tree/prepared.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/vm.h"

/* The root directory: one directory for each VM. mkdir creates, rmdir destroys. */

#define ROOT_INODE 1

uint64_t node_inode(const struct vm *vm, uint64_t slot) {
    return (vm->number << 32) + slot;
}

struct node *node_root_new(struct daemon *d) {
    struct node *node = calloc(1, sizeof *node);
    if (!node)
        return NULL;
    node->name = strdup("");
    if (!node->name) {
        free(node);
        return NULL;
    }
    node->ops = &root_ops;
    node->refs = 1;
    node->daemon = d;
    RB_INIT(&node->children);
    return node;
}

static void root_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = ROOT_INODE;
    ret_stat->st.st_mode = S_IFDIR | 0755;
    ret_stat->st.st_nlink = 2;
}

/* The daemon's own: what VMs are made from. */
#define ROOT_DEFAULTS ".defaults"
#define ROOT_NEW ".new"

static int root_lookup(struct node *dir, const char *name, struct node **ret_node) {
    struct vm *vm =
        strcmp(name, ROOT_DEFAULTS) == 0 ? dir->daemon->defaults : vm_find(dir->daemon, name);
    if (!vm && strcmp(name, ROOT_NEW) != 0)
        return -ERR_NOT_FOUND;
    struct node *node = vm ? node_child(dir, name, &vmdir_ops, NULL, vm)
                           : node_child(dir, name, &new_ops, NULL, NULL);
    if (!node)
        return -ERR_NO_MEMORY;
    *ret_node = node;
    return 0;
}

static int root_list(struct node *dir, struct node_list *list) {
    struct vm *vm;
    int r = node_list_add(list, ROOT_DEFAULTS, S_IFDIR, node_inode(dir->daemon->defaults, 0));
    if (r == 0)
        r = node_list_add(list, ROOT_NEW, S_IFDIR, NEW_INODE);
    RB_FOREACH(vm, vm_index, &dir->daemon->vms) {
        if (r == 0)
            r = node_list_add(list, vm->id, S_IFDIR, node_inode(vm, 0));
    }
    return r;
}

static void root_mkdir(struct node *dir, const char *name, mode_t mode, struct request *rq) {
    (void)mode;
    prepared_create_vm(dir, name, NULL, NULL, rq);
}

static bool root_is_own(const char *name) {
    return strcmp(name, ROOT_DEFAULTS) == 0 || strcmp(name, ROOT_NEW) == 0;
}

struct root_removal {
    struct vm_wait wait;
    struct request *rq;
};

static void root_removed(struct vm_wait *wait, int status) {
    struct root_removal *removal = LIST_OWNER(wait, struct root_removal, wait);
    request_answer(removal->rq, status);
    free(removal);
}

/* The VM has left the tree already; what is left of it goes on ending without a witness. */
static void root_removal_cancel(struct request *rq, int status, void *arg) {
    struct root_removal *removal = arg;
    vm_wait_cancel(&removal->wait);
    free(removal);
    request_answer(rq, status == -ERR_TIMED_OUT ? 0 : status);
}

/* A held RMDIR holds up the whole directory, so it is held only for as long as the end of a VMM
 * takes as a rule. */
#define ROOT_REMOVAL_MS 1000

static void root_rmdir(struct node *dir, const char *name, struct request *rq) {
    struct vm *vm = vm_find(dir->daemon, name);
    if (!vm) {
        request_answer(rq, root_is_own(name) ? -ERR_NOT_PERMITTED : -ERR_NOT_FOUND);
        return;
    }
    if (vm_guards(vm, rq->pid, true)) {
        request_answer(rq, -ERR_NOT_PERMITTED);
        return;
    }
    node_forget_child(dir, name);
    struct root_removal *removal = malloc(sizeof *removal);
    if (!removal) {
        vm_destroy(vm, NULL);
        request_answer(rq, 0);
        return;
    }
    removal->wait.done = root_removed;
    removal->rq = rq;
    list_init(&removal->wait.link);
    request_wait(rq, ROOT_REMOVAL_MS, root_removal_cancel, removal);
    vm_destroy(vm, &removal->wait);
}

static void root_unlink(struct node *dir, const char *name, struct request *rq) {
    request_answer(rq, vm_find(dir->daemon, name) ? -ERR_IS_A_DIRECTORY : -ERR_NOT_FOUND);
}

const struct node_ops root_ops = {
    .stat = root_stat,
    .lookup = root_lookup,
    .list = root_list,
    .mkdir = root_mkdir,
    .rmdir = root_rmdir,
    .unlink = root_unlink,
    .setattr = node_setattr_ignore,
};
