#include "tree/scratch.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "tree/config.h"
#include "tree/env.h"
#include "tree/text.h"
#include "tree/tree.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/vm.h"

/* Scratch files behave as on any disk. A handle and a node each hold a reference, so that what is
 * removed or renamed away stays usable for who has it open. */

/* `sed s/a/b/ KEY > KEY.tmp && mv KEY.tmp KEY`: what people call such a file. */
static bool scratch_suffix_is_usual(const char *suffix) {
    static const char *const usual[] = {"tmp", "new", "old", "bak", "orig", "part", "lock", "swp"};
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++)
        if (strcmp(suffix, usual[i]) == 0)
            return true;
    return false;
}

static bool scratch_is_wanted_at(const char *name, int flags, bool beside) {
    if (scratch_name_is_special(name))
        return true;
    if (flags & O_EXCL) /* patch creates KEY.oXXXXXX O_WRONLY */
        return beside || (flags & O_ACCMODE) == O_RDWR;
    return beside && scratch_suffix_is_usual(strchr(name, '.') + 1);
}

bool scratch_is_wanted(struct vm *vm, const char *name, int flags) {
    size_t length = strcspn(name, ".");
    cleanup_free char *key =
        name[length] && env_name_is_valid(name, length) ? strndup(name, length) : NULL;
    return scratch_is_wanted_at(name, flags, key && vars_find(vm->vars, key));
}

bool scratch_is_wanted_beside(const char *file, const char *name, int flags) {
    size_t length = strlen(file);
    return scratch_is_wanted_at(name, flags,
                                strncmp(name, file, length) == 0 && name[length] == '.');
}

static void scratch_stat(const struct node *node, struct node_stat *ret_stat) {
    const struct scratch *scratch = node->object;
    node_stat_init(node, ret_stat);
    ret_stat->entry_seconds = ret_stat->attr_seconds = 0;
    ret_stat->st.st_ino = node_inode(node->vm, scratch->number);
    ret_stat->st.st_mode = scratch->directory ? S_IFDIR : S_IFREG;
    node_show_look(&scratch->look, &ret_stat->st);
    ret_stat->st.st_nlink = !scratch->table ? 0 : scratch->directory ? 2 : 1;
    ret_stat->st.st_size = (off_t)scratch->content.len;
}

static void scratch_free_node(struct node *node) {
    scratch_unref(node->object);
    node->object = NULL;
}

struct node *scratch_node(struct node *dir, struct scratch *scratch) {
    const struct node_ops *ops = scratch->directory ? &scratch_dir_ops : &scratch_file_ops;
    struct node *known = node_find_child(dir, scratch->name);
    if (known && known->object != scratch)
        node_forget_child(dir, scratch->name);
    struct node *node = node_child(dir, scratch->name, ops, NULL, dir->vm);
    if (node && !node->object)
        node->object = scratch_ref(scratch);
    return node;
}

struct scratch_handle {
    struct handle handle;
    struct scratch *scratch; /* a reference */
    size_t writing;          /* bytes of a WRITE that waits for its verdict */
};

static int scratch_handle_new(struct node *node, int flags, struct scratch_handle **ret_handle) {
    struct scratch *scratch = node->object;
    bool empties = (flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY;
    int r = empties ? scratch_resize(scratch, 0) : 0;
    struct scratch_handle *h = r == 0 ? calloc(1, sizeof *h) : NULL;
    if (!h)
        return r < 0 ? r : -ERR_NO_MEMORY;
    handle_init(&h->handle, node, flags);
    h->scratch = scratch_ref(scratch);
    h->scratch->open++;
    scratch_use(h->scratch);
    *ret_handle = h;
    return 0;
}

void scratch_create(struct node *dir, struct scratches *table, const char *name, int flags,
                    mode_t mode, struct request *rq) {
    struct scratch *scratch = scratch_find(table, name);
    if (scratch && ((flags & O_EXCL) || scratch->directory)) {
        request_answer(rq, -ERR_EXISTS);
        return;
    }
    int r = scratch ? 0 : scratch_make(table, name, false, mode, &scratch);
    if (r < 0) {
        request_answer(rq, r);
        return;
    }
    struct node *node = scratch_node(dir, scratch);
    struct scratch_handle *h = NULL;
    r = node ? scratch_handle_new(node, flags, &h) : -ERR_NO_MEMORY;
    if (r == 0) {
        request_answer_created(rq, node, &h->handle);
        return;
    }
    if (node)
        node_unref(node);
    request_answer(rq, r);
}

void scratch_mkdir(struct node *dir, struct scratches *table, const char *name, mode_t mode,
                   struct request *rq) {
    struct scratch *scratch;
    int r =
        scratch_find(table, name) ? -ERR_EXISTS : scratch_make(table, name, true, mode, &scratch);
    struct node *node = r == 0 ? scratch_node(dir, scratch) : NULL;
    if (node)
        request_answer_entry(rq, node);
    else
        request_answer(rq, r < 0 ? r : -ERR_NO_MEMORY);
}

int scratch_list(struct node *dir, struct scratches *table, struct node_list *list) {
    struct scratch *scratch;
    RB_FOREACH(scratch, scratch_index, scratches_index(table)) {
        int r = node_list_add(list, scratch->name, scratch->directory ? S_IFDIR : S_IFREG,
                              node_inode(dir->vm, scratch->number));
        if (r < 0)
            return r;
    }
    return 0;
}

void scratch_unlink(struct node *dir, struct scratch *scratch, bool directory, struct request *rq) {
    if (scratch->directory != directory) {
        request_answer(rq, directory ? -ERR_NOT_A_DIRECTORY : -ERR_IS_A_DIRECTORY);
        return;
    }
    node_forget_child(dir, scratch->name);
    scratch_remove(scratch);
    request_answer(rq, 0);
}

void scratch_rename_node(struct node *dir, struct scratches *table, struct scratch *scratch,
                         const char *new_name, unsigned flags, struct request *rq) {
    struct scratch *there = scratch_find(table, new_name);
    int r = 0;
    if (there && (flags & RENAME_NOREPLACE))
        r = -ERR_EXISTS;
    else if (!there && (flags & RENAME_EXCHANGE))
        r = -ERR_NOT_FOUND;
    else if (there && !(flags & RENAME_EXCHANGE) && there->directory != scratch->directory)
        r = there->directory ? -ERR_IS_A_DIRECTORY : -ERR_NOT_A_DIRECTORY;
    if (r < 0 || there == scratch) {
        request_answer(rq, r);
        return;
    }
    if (flags & RENAME_EXCHANGE) { /* by a third name, that no path can have */
        char *name = strdup(scratch->name);
        r = name ? scratch_rename(scratch, "/") : -ERR_NO_MEMORY;
        if (r == 0)
            r = scratch_rename(there, name);
        if (r == 0)
            r = scratch_rename(scratch, new_name);
        if (name) {
            node_forget_child(dir, name);
            node_forget_child(dir, new_name);
        }
        free(name);
    } else {
        node_move_child(dir, scratch->name, new_name);
        r = scratch_rename(scratch, new_name);
    }
    request_answer(rq, r);
}

static void scratch_open(struct node *node, int flags, struct request *rq) {
    struct scratch_handle *h;
    int r = scratch_handle_new(node, flags, &h);
    if (r == 0)
        request_answer_opened(rq, &h->handle);
    else
        request_answer(rq, r);
}

static void scratch_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct scratch_handle *h = (struct scratch_handle *)handle;
    buf_answer_read(&h->scratch->content, length, offset, rq);
}

static void scratch_written(void *arg, int status, struct request *rq) {
    struct scratch_handle *h = arg;
    if (status < 0)
        request_answer(rq, status);
    else
        request_answer_written(rq, h->writing);
}

static void scratch_write_file(struct handle *handle, const char *data, size_t length, off_t offset,
                               struct request *rq) {
    struct scratch *scratch = ((struct scratch_handle *)handle)->scratch;
    struct node *node = handle->node;
    if (handle->flags & O_APPEND)
        offset = (off_t)scratch->content.len;
    int r = scratch_write(scratch, data, length, offset);
    if (r == 0 && node->ops == &setting_ops && !node->removed) { /* renamed onto a setting */
        ((struct scratch_handle *)handle)->writing = length;
        setting_commit(node, node->name, &scratch->content, scratch_written, handle, rq);
        return;
    }
    if (r == 0 && node->ops == &env_key_ops &&
        !node->removed) { /* it has been renamed onto a variable meanwhile */
        struct var_change set = {.name = node->name,
                                 .bytes = scratch->content.data ? scratch->content.data : "",
                                 .length = scratch->content.len};
        ((struct scratch_handle *)handle)->writing = length;
        env_commit(node, &set, 1, scratch_written, handle, rq);
        return;
    }
    if (r < 0)
        request_answer(rq, r);
    else
        request_answer_written(rq, length);
}

void scratch_write_astray(struct handle *handle, const char *data, size_t length, off_t offset,
                          struct request *rq) {
    struct node *node = handle->node;
    struct scratch *scratch = node->ops == &scratch_file_ops ? node->object : NULL;
    if (scratch && (handle->flags & O_APPEND))
        offset = (off_t)scratch->content.len;
    int r = scratch ? scratch_write(scratch, data, length, offset) : 0;
    if (r < 0)
        request_answer(rq, r);
    else
        request_answer_written(rq, length);
}

static void scratch_release(struct handle *handle) {
    struct scratch_handle *h = (struct scratch_handle *)handle;
    h->scratch->open--;
    scratch_use(h->scratch);
    scratch_unref(h->scratch);
    handle_done(handle);
    free(h);
}

static void scratch_setattr(struct node *node, struct handle *handle, const struct stat *want,
                            unsigned mask, struct request *rq) {
    struct scratch *scratch = handle && handle->ops == &scratch_file_ops
                                  ? ((struct scratch_handle *)handle)->scratch
                                  : node->object;
    int r = 0;
    if (mask & NODE_SET_SIZE)
        r = scratch_resize(scratch, want->st_size);
    node_set_look(&scratch->look, want, mask); /* its time after the change of size */
    if (r < 0)
        request_answer(rq, r);
    else
        request_answer_attr(rq, node);
}

const struct node_ops scratch_file_ops = {
    .stat = scratch_stat,
    .open = scratch_open,
    .read = scratch_read,
    .write = scratch_write_file,
    .release = scratch_release,
    .setattr = scratch_setattr,
    .free = scratch_free_node,
};

static int scratch_dir_lookup(struct node *dir, const char *name, struct node **ret_node) {
    (void)dir;
    (void)name;
    (void)ret_node;
    return -ERR_NOT_FOUND;
}

static int scratch_dir_list(struct node *dir, struct node_list *list) {
    (void)dir;
    (void)list;
    return 0; /* nothing can be created in it */
}

const struct node_ops scratch_dir_ops = {
    .stat = scratch_stat,
    .lookup = scratch_dir_lookup,
    .list = scratch_dir_list,
    .setattr = scratch_setattr,
    .free = scratch_free_node,
};
