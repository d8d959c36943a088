#include "tree/prepared.h"

#include <stdio.h> /* RENAME_… */
#include <stdlib.h>
#include <string.h>

#include "tree/guest_wait.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/prepare.h"

/* /.new/: a directory for each VM that is being prepared, with env/, config/ and `forward`. A
 * rename out of it makes the VM. */

#define CREATE_MS 10000 /* a look at /proc, and at files of the host */

static void new_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = NEW_INODE;
    ret_stat->st.st_mode = S_IFDIR | 0755;
    ret_stat->st.st_nlink = 2;
}

static int new_lookup(struct node *dir, const char *name, struct node **ret_node) {
    struct vm *vm = prepare_find(dir->daemon, name);
    if (!vm)
        return -ERR_NOT_FOUND;
    *ret_node = node_child(dir, name, &vmdir_ops, NULL, vm);
    return *ret_node ? 0 : -ERR_NO_MEMORY;
}

static int new_list(struct node *dir, struct node_list *list) {
    struct vm *vm;
    RB_FOREACH(vm, vm_index, &dir->daemon->prepared) {
        int r = node_list_add(list, vm->id, S_IFDIR, node_inode(vm, 0));
        if (r < 0)
            return r;
    }
    return 0;
}

static void new_mkdir(struct node *dir, const char *name, mode_t mode, struct request *rq) {
    struct vm *vm;
    struct node *node = NULL;
    (void)mode;
    int r = prepare_make(dir->daemon, name, &vm);
    if (r == 0)
        prepare_note_maker(vm, rq->pid);
    if (r == 0)
        r = new_lookup(dir, name, &node);
    if (r < 0)
        request_answer(rq, r);
    else
        request_answer_entry(rq, node);
}

static void new_rmdir(struct node *dir, const char *name, struct request *rq) {
    struct vm *vm = prepare_find(dir->daemon, name);
    if (vm) {
        node_forget_child(dir, name);
        prepare_remove(vm);
    }
    request_answer(rq, vm ? 0 : -ERR_NOT_FOUND);
}

static void new_unlink(struct node *dir, const char *name, struct request *rq) {
    request_answer(rq, prepare_find(dir->daemon, name) ? -ERR_IS_A_DIRECTORY : -ERR_NOT_FOUND);
}

static int new_rename_now(struct node *dir, const char *name, const char *new_name) {
    struct vm *vm = prepare_find(dir->daemon, name);
    int r = !vm ? -ERR_NOT_FOUND : strcmp(name, new_name) == 0 ? 0 : prepare_rename(vm, new_name);
    if (r == 0) {
        node_forget_child(dir, name);
        node_forget_child(dir, new_name);
    }
    return r;
}

struct new_renaming {
    struct node *dir; /* a reference */
    char *name, *new_name;
};

static void new_rename_again(void *arg, int status, struct request *rq) {
    struct new_renaming *renaming = arg;
    if (status == 0)
        status = new_rename_now(renaming->dir, renaming->name, renaming->new_name);
    node_unref(renaming->dir);
    free(renaming->name);
    free(renaming->new_name);
    free(renaming);
    request_answer(rq, status);
}

/* When its record has been written. */
static void new_rename_later(struct node *dir, struct vm *vm, const char *name,
                             const char *new_name, struct request *rq) {
    struct new_renaming *renaming = calloc(1, sizeof *renaming);
    if (renaming) {
        renaming->name = strdup(name);
        renaming->new_name = strdup(new_name);
    }
    if (!renaming || !renaming->name || !renaming->new_name) {
        if (renaming) {
            free(renaming->name);
            free(renaming->new_name);
        }
        free(renaming);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    renaming->dir = node_ref(dir);
    struct vm_wait *wait = guest_wait(dir, "rename", new_rename_again, renaming, rq);
    if (wait)
        vm_save_for(vm, wait);
}

static void new_rename(struct node *dir, const char *name, struct node *new_dir,
                       const char *new_name, unsigned flags, struct request *rq) {
    struct vm *vm = prepare_find(dir->daemon, name);
    if (!vm) {
        request_answer(rq, -ERR_NOT_FOUND);
    } else if (flags & RENAME_EXCHANGE) {
        request_answer(rq, -ERR_NOT_PERMITTED);
    } else if (new_dir->ops == &root_ops) {
        prepared_create_vm(new_dir, new_name, dir, name, rq);
    } else if (new_dir != dir) {
        request_answer(rq, -ERR_CROSS_DEVICE);
    } else {
        int r = new_rename_now(dir, name, new_name);
        if (r == -ERR_BUSY)
            new_rename_later(dir, vm, name, new_name, rq);
        else
            request_answer(rq, r);
    }
}

const struct node_ops new_ops = {
    .stat = new_stat,
    .lookup = new_lookup,
    .list = new_list,
    .mkdir = new_mkdir,
    .rename = new_rename,
    .rmdir = new_rmdir,
    .unlink = new_unlink,
    .setattr = node_setattr_ignore,
};

/* ---- making a VM ---- */

struct prepared_creation {
    struct vm_wait wait;
    struct request *rq;
    struct node *root, *new_dir; /* references; new_dir NULL: a mkdir */
    char *name, *prepared;
};

static void prepared_free(struct prepared_creation *c) {
    node_unref(c->root);
    if (c->new_dir)
        node_unref(c->new_dir);
    free(c->name);
    free(c->prepared);
    free(c);
}

static void prepared_created(struct vm_wait *wait, int status) {
    struct prepared_creation *c = LIST_OWNER(wait, struct prepared_creation, wait);
    struct request *rq = c->rq;
    struct node *node = NULL;
    if (status == 0 && c->new_dir)
        node_forget_child(c->new_dir, c->prepared);
    else if (status == 0)
        status = c->root->ops->lookup(c->root, c->name, &node);
    prepared_free(c);
    if (node)
        request_answer_entry(rq, node);
    else
        request_answer(rq, status);
}

/* Nobody waits any more: nothing is made. */
static void prepared_cancel(struct request *rq, int status, void *arg) {
    struct prepared_creation *c = arg;
    vm_wait_cancel(&c->wait);
    prepared_free(c);
    request_answer(rq, status);
}

void prepared_create_vm(struct node *root, const char *name, struct node *new_dir,
                        const char *prepared, struct request *rq) {
    struct daemon *d = root->daemon;
    struct prepared_creation *c = calloc(1, sizeof *c);
    const struct asker asker = {.pid = rq->pid, .uid = rq->uid};
    if (c) {
        c->wait.done = prepared_created;
        list_init(&c->wait.link);
        c->rq = rq;
        c->root = node_ref(root);
        c->new_dir = new_dir ? node_ref(new_dir) : NULL;
        c->name = strdup(name);
        c->prepared = prepared ? strdup(prepared) : NULL;
    }
    if (!c || !c->name || (prepared && !c->prepared)) {
        if (c)
            prepared_free(c);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    request_wait(rq, CREATE_MS, prepared_cancel, c);
    prepare_create(d, name, prepared ? prepare_find(d, prepared) : NULL, &asker, &c->wait);
}
