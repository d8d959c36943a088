#include "tree/node.h"

#include <stdlib.h>
#include <string.h>

#include "util/errors.h"
#include "vm/look.h"
#include "vm/vm.h"

static int node_compare(struct node *a, struct node *b) {
    return strcmp(a->name, b->name);
}
RB_GENERATE_STATIC(node_children, node, sibling, node_compare)

static struct node *node_new(struct node *parent, const char *name, const struct node_ops *ops,
                             const struct node_row *row, struct vm *vm) {
    struct node *node = calloc(1, sizeof *node);
    if (!node)
        return NULL;
    node->name = strdup(name);
    if (!node->name) {
        free(node);
        return NULL;
    }
    node->ops = ops;
    node->row = row;
    node->refs = 1;
    node->vm = vm ? vm_ref(vm) : NULL;
    RB_INIT(&node->children);
    if (parent) {
        node->parent = node_ref(parent);
        node->daemon = parent->daemon;
    }
    return node;
}

struct node *node_ref(struct node *node) {
    node->refs++;
    return node;
}

static void node_drop_from_index(struct node *node) {
    if (!node->indexed)
        return;
    RB_REMOVE(node_children, &node->parent->children, node);
    node->indexed = false;
}

void node_unref(struct node *node) {
    while (node && --node->refs == 0) {
        struct node *parent = node->parent;
        node_drop_from_index(node);
        if (node->ops->free)
            node->ops->free(node);
        if (node->vm)
            vm_unref(node->vm);
        free(node->name);
        free(node);
        node = parent;
    }
}

struct node *node_find_child(struct node *parent, const char *name) {
    struct node key = {.name = (char *)(uintptr_t)name};
    return RB_FIND(node_children, &parent->children, &key);
}

struct node *node_child_private(struct node *parent, const char *name, const struct node_ops *ops,
                                const struct node_row *row, struct vm *vm) {
    return node_new(parent, name, ops, row, vm);
}

struct node *node_child(struct node *parent, const char *name, const struct node_ops *ops,
                        const struct node_row *row, struct vm *vm) {
    struct node *node = node_find_child(parent, name);
    if (node && node->vm == vm && node->ops == ops && !node->held)
        return node_ref(node);
    if (node)
        node_drop_from_index(node);
    node = node_new(parent, name, ops, row, vm);
    if (!node)
        return NULL;
    RB_INSERT(node_children, &parent->children, node);
    node->indexed = true;
    return node;
}

void node_set_kind(struct node *node, const struct node_ops *ops, void *object) {
    if (node->ops->free)
        node->ops->free(node);
    node->ops = ops;
    node->object = object;
}

void node_move_child(struct node *dir, const char *name, const char *new_name) {
    struct node *node = node_find_child(dir, name);
    node_remove_child(dir, new_name);
    if (!node)
        return;
    node_drop_from_index(node);
    char *copy = strdup(new_name);
    if (!copy)
        return; /* looked up anew, as another node */
    free(node->name);
    node->name = copy;
    RB_INSERT(node_children, &dir->children, node);
    node->indexed = true;
}

void node_forget_child(struct node *parent, const char *name) {
    struct node *node = node_find_child(parent, name);
    if (node)
        node_drop_from_index(node);
}

void node_remove_child(struct node *parent, const char *name) {
    struct node *node = node_find_child(parent, name);
    if (!node)
        return;
    node->removed = true;
    node_drop_from_index(node);
}

int node_list_add(struct node_list *list, const char *name, mode_t type, uint64_t ino) {
    if (list->count == list->cap) {
        size_t cap = list->cap ? list->cap * 2 : 32;
        struct node_name *names = realloc(list->names, cap * sizeof *names);
        if (!names)
            return -ERR_NO_MEMORY;
        list->names = names;
        list->cap = cap;
    }
    char *copy = strdup(name);
    if (!copy)
        return -ERR_NO_MEMORY;
    list->names[list->count++] = (struct node_name){copy, type & S_IFMT, ino};
    return 0;
}

void node_list_free(struct node_list *list) {
    for (size_t i = 0; i < list->count; i++)
        free(list->names[i].name);
    free(list->names);
    *list = (struct node_list){0};
}

void node_stat_init(const struct node *node, struct node_stat *ret_stat) {
    const struct timespec *when = node->vm ? &node->vm->changed : &node->daemon->started;
    *ret_stat = (struct node_stat){
        .st = {.st_nlink = 1,
               .st_uid = node->daemon->uid,
               .st_gid = node->daemon->gid,
               .st_blksize = 4096,
               .st_atim = *when,
               .st_mtim = *when,
               .st_ctim = *when},
        .entry_seconds = 1,
        .attr_seconds = 1,
    };
}

void node_show_look(const struct look *look, struct stat *st) {
    st->st_mode = (st->st_mode & S_IFMT) | look->mode;
    st->st_uid = look->uid;
    st->st_gid = look->gid;
    st->st_mtim = st->st_ctim = look->changed;
    st->st_atim = look->read;
}

void node_set_look(struct look *look, const struct stat *want, unsigned mask) {
    if (mask & NODE_SET_MODE)
        look->mode = want->st_mode & 07777;
    if (mask & NODE_SET_UID)
        look->uid = want->st_uid;
    if (mask & NODE_SET_GID)
        look->gid = want->st_gid;
    if (mask & NODE_SET_ATIME)
        look->read = want->st_atim;
    if (mask & NODE_SET_MTIME)
        look->changed = want->st_mtim;
}

void handle_init(struct handle *handle, struct node *node, int flags) {
    handle->uncached = false;
    handle->node = node_ref(node);
    handle->ops = node->ops;
    handle->flags = flags;
    handle->poll = NULL;
    handle->wake = NULL;
    list_init(&handle->open);
}

void handle_done(struct handle *handle) {
    list_remove(&handle->open);
    node_unref(handle->node);
}

void node_open_plain(struct node *node, int flags, struct request *rq) {
    struct handle *handle = malloc(sizeof *handle);
    if (!handle) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    handle_init(handle, node, flags);
    request_answer_opened(rq, handle);
}

void node_release_plain(struct handle *handle) {
    handle_done(handle);
    free(handle);
}

void node_setattr_ignore(struct node *node, struct handle *handle, const struct stat *want,
                         unsigned mask, struct request *rq) {
    (void)handle;
    (void)want;
    (void)mask;
    request_answer_attr(rq, node);
}
