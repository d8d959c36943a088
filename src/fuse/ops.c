#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

#include "fuse/internal.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/daemon.h"

/* The kernel's operations, turned into those of nodes. What a node's table leaves out is answered
 * here. */

static struct fuse_channel *ops_channel(fuse_req_t req) {
    return fuse_req_userdata(req);
}

#define NAME_LIMIT 255 /* NAME_MAX of limits.h, and what statfs says */

static bool ops_name_fits(fuse_req_t req, const char *name) {
    if (strlen(name) <= NAME_LIMIT)
        return true;
    fuse_reply_err(req, ENAMETOOLONG);
    return false;
}

/* A node of an operation; ESTALE when the kernel asks for one that it has forgotten. */
static struct node *ops_node(fuse_req_t req, fuse_ino_t id) {
    struct node *node = inode_find(ops_channel(req), id);
    if (!node)
        fuse_reply_err(req, ESTALE);
    return node;
}

static struct handle *ops_handle(const struct fuse_file_info *file) {
    return (struct handle *)(uintptr_t)file->fh;
}

static void ops_init(void *userdata, struct fuse_conn_info *conn) {
    struct fuse_channel *channel = userdata;
    /* Errors must come out of write(): no write-back cache. Truncation comes with OPEN, not as a
     * SETATTR before it. */
    conn->want &=
        ~(unsigned)(FUSE_CAP_WRITEBACK_CACHE | FUSE_CAP_POSIX_ACL | FUSE_CAP_HANDLE_KILLPRIV);
    conn->want |= conn->capable & FUSE_CAP_ATOMIC_O_TRUNC;
    if (channel->ready)
        channel->ready(channel->daemon);
}

static void ops_answer_lookup(fuse_req_t req, struct node *dir, const char *name, bool may_wait) {
    struct fuse_channel *channel = ops_channel(req);
    struct node *node;
    int r = -ERR_NOT_A_DIRECTORY;
    bool known = removal_knows(channel, req, dir, name, &node);
    if (known)
        r = node ? 0 : -ERR_NOT_FOUND;
    else if (dir->ops->lookup)
        r = dir->ops->lookup(dir, name, &node);
    if (r == -ERR_NOT_FOUND && !known && may_wait && fresh_holds(channel, req, dir, name, NULL))
        return;
    if (r < 0) {
        fuse_reply_err(req, error_to_user(r));
        return;
    }
    if (!known && removal_holds_lookup(channel, req, node)) {
        node_unref(node);
        return;
    }
    struct fuse_entry_param entry;
    inode_lookup(channel, node);
    node_to_entry(node, &entry);
    if (known) {
        entry.attr.st_nlink = 1;
        entry.entry_timeout = entry.attr_timeout = 0;
    }
    if (fuse_reply_entry(req, &entry) < 0)
        inode_forget(channel, node, 1);
}

void ops_lookup_now(fuse_req_t req, struct node *dir, const char *name) {
    ops_answer_lookup(req, dir, name, false);
}

static void ops_lookup(fuse_req_t req, fuse_ino_t parent, const char *name) {
    struct node *dir = ops_name_fits(req, name) ? ops_node(req, parent) : NULL;
    if (!dir)
        return;
    ops_channel(req)->daemon->requests++;
    ops_answer_lookup(req, dir, name, true);
}

static void ops_forget_one(struct fuse_channel *channel, fuse_ino_t id, uint64_t lookups) {
    struct node *node = inode_find(channel, id);
    if (node)
        inode_forget(channel, node, lookups);
}

static void ops_forget(fuse_req_t req, fuse_ino_t id, uint64_t lookups) {
    ops_forget_one(ops_channel(req), id, lookups);
    fuse_reply_none(req);
}

static void ops_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets) {
    for (size_t i = 0; i < count; i++)
        ops_forget_one(ops_channel(req), forgets[i].ino, forgets[i].nlookup);
    fuse_reply_none(req);
}

static void ops_getattr(fuse_req_t req, fuse_ino_t id, struct fuse_file_info *file) {
    struct node *node = ops_node(req, id);
    (void)file;
    if (!node)
        return;
    struct node_stat stat;
    ops_channel(req)->daemon->requests++;
    node->ops->stat(node, &stat);
    fuse_reply_attr(req, &stat.st, stat.attr_seconds);
}

static unsigned ops_setattr_mask(int to_set) {
    static const struct {
        int fuse;
        unsigned node;
    } bits[] = {
        {FUSE_SET_ATTR_MODE, NODE_SET_MODE},       {FUSE_SET_ATTR_UID, NODE_SET_UID},
        {FUSE_SET_ATTR_GID, NODE_SET_GID},         {FUSE_SET_ATTR_SIZE, NODE_SET_SIZE},
        {FUSE_SET_ATTR_ATIME, NODE_SET_ATIME},     {FUSE_SET_ATTR_MTIME, NODE_SET_MTIME},
        {FUSE_SET_ATTR_ATIME_NOW, NODE_SET_ATIME}, {FUSE_SET_ATTR_MTIME_NOW, NODE_SET_MTIME},
    };
    unsigned mask = 0;
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++)
        if (to_set & bits[i].fuse)
            mask |= bits[i].node;
    return mask;
}

static void ops_setattr(fuse_req_t req, fuse_ino_t id, struct stat *attr, int to_set,
                        struct fuse_file_info *file) {
    struct node *node = ops_node(req, id);
    struct fuse_request *r = node ? fuse_request_new(ops_channel(req), req) : NULL;
    if (!r)
        return;
    struct stat want = *attr;
    if (to_set & FUSE_SET_ATTR_ATIME_NOW)
        clock_gettime(CLOCK_REALTIME, &want.st_atim);
    if (to_set & FUSE_SET_ATTR_MTIME_NOW)
        clock_gettime(CLOCK_REALTIME, &want.st_mtim);
    r->kind = REQUEST_ATTR;
    r->node = node_ref(node);
    if (node->ops->setattr)
        node->ops->setattr(node, file ? ops_handle(file) : NULL, &want, ops_setattr_mask(to_set),
                           &r->rq);
    else
        request_answer(&r->rq, -ERR_NOT_PERMITTED);
}

/* The common part of what is asked of a directory: the node, that its kind has such an operation, a
 * request. */
#define OPS_DIR_CALL(req, parent, member, status, ...)                                             \
    do {                                                                                           \
        struct node *dir = ops_name_fits(req, name) ? ops_node(req, parent) : NULL;                \
        struct fuse_request *r = dir ? fuse_request_new(ops_channel(req), req) : NULL;             \
        if (r && dir->ops->member)                                                                 \
            dir->ops->member(dir, __VA_ARGS__, &r->rq);                                            \
        else if (r)                                                                                \
            request_answer(&r->rq, status);                                                        \
    } while (0)

static void ops_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode) {
    OPS_DIR_CALL(req, parent, mkdir, -ERR_NOT_PERMITTED, name, mode);
}

static void ops_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name) {
    OPS_DIR_CALL(req, parent, rmdir, -ERR_NOT_PERMITTED, name);
}

static void ops_unlink(fuse_req_t req, fuse_ino_t parent, const char *name) {
    struct fuse_channel *channel = ops_channel(req);
    struct node *dir = ops_name_fits(req, name) ? ops_node(req, parent) : NULL;
    if (!dir || removal_resume(channel, req, dir, name, NULL, NULL, 0))
        return;
    struct fuse_request *r = fuse_request_new(channel, req);
    if (r && dir->ops->unlink) {
        removal_begin(r, dir, name, NULL, NULL, 0);
        dir->ops->unlink(dir, name, &r->rq);
    } else if (r) {
        request_answer(&r->rq, -ERR_NOT_PERMITTED);
    }
}

static void ops_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t new_parent,
                       const char *new_name, unsigned flags) {
    struct fuse_channel *channel = ops_channel(req);
    bool fits = ops_name_fits(req, name) && ops_name_fits(req, new_name);
    struct node *dir = fits ? ops_node(req, parent) : NULL;
    struct node *new_dir = dir ? ops_node(req, new_parent) : NULL;
    if (!new_dir || removal_resume(channel, req, dir, name, new_dir, new_name, flags))
        return;
    struct fuse_request *r = fuse_request_new(channel, req);
    if (r && dir->ops->rename) {
        removal_begin(r, dir, name, new_dir, new_name, flags);
        dir->ops->rename(dir, name, new_dir, new_name, flags, &r->rq);
    } else if (r) {
        request_answer(&r->rq, -ERR_NOT_PERMITTED);
    }
}

static void ops_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
                       struct fuse_file_info *file) {
    struct node *dir = ops_name_fits(req, name) ? ops_node(req, parent) : NULL;
    struct fuse_request *r = dir ? fuse_request_new(ops_channel(req), req) : NULL;
    if (!r)
        return;
    r->file = *file;
    if (dir->ops->create)
        dir->ops->create(dir, name, file->flags, mode, &r->rq);
    else
        request_answer(&r->rq, -ERR_NOT_PERMITTED);
}

/* Symbolic links, device nodes and further names are nothing that a guest has as variables. */
static void ops_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name) {
    (void)target;
    (void)parent;
    (void)name;
    fuse_reply_err(req, EPERM);
}

static void ops_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
                      dev_t device) {
    (void)parent;
    (void)name;
    (void)mode;
    (void)device;
    fuse_reply_err(req, EPERM);
}

static void ops_link(fuse_req_t req, fuse_ino_t id, fuse_ino_t parent, const char *name) {
    (void)id;
    (void)parent;
    (void)name;
    fuse_reply_err(req, EPERM);
}

static void ops_open(fuse_req_t req, fuse_ino_t id, struct fuse_file_info *file) {
    struct node *node = ops_node(req, id);
    struct fuse_request *r = node ? fuse_request_new(ops_channel(req), req) : NULL;
    if (!r)
        return;
    r->file = *file;
    if (node->ops->open)
        node->ops->open(node, file->flags, &r->rq);
    else
        request_answer(&r->rq, -ERR_NOT_PERMITTED);
}

static void ops_read(fuse_req_t req, fuse_ino_t id, size_t size, off_t offset,
                     struct fuse_file_info *file) {
    struct handle *handle = ops_handle(file);
    struct fuse_request *r = fuse_request_new(ops_channel(req), req);
    (void)id;
    handle->flags = (handle->flags & ~O_NONBLOCK) | (file->flags & O_NONBLOCK);
    if (r && handle->uncached &&
        file->lock_owner == 0) /* Linux, fs/fuse/file.c: fuse_send_read() */
        request_answer(&r->rq, -ERR_INVALID);
    else if (r && handle->ops->read)
        handle->ops->read(handle, size, offset, &r->rq);
    else if (r)
        request_answer(&r->rq, -ERR_INVALID);
}

static void ops_write(fuse_req_t req, fuse_ino_t id, const char *data, size_t size, off_t offset,
                      struct fuse_file_info *file) {
    struct handle *handle = ops_handle(file);
    struct fuse_request *r = fuse_request_new(ops_channel(req), req);
    (void)id;
    if (!r)
        return;
    /* O_APPEND can be switched by fcntl(2) after the open. */
    handle->flags = (handle->flags & ~O_APPEND) | (file->flags & O_APPEND);
    if (handle->ops->write)
        handle->ops->write(handle, data, size, offset, &r->rq);
    else
        request_answer(&r->rq, -ERR_NOT_PERMITTED);
}

static void ops_flush(fuse_req_t req, fuse_ino_t id, struct fuse_file_info *file) {
    struct handle *handle = ops_handle(file);
    struct fuse_request *r = fuse_request_new(ops_channel(req), req);
    (void)id;
    if (r && handle->ops->flush)
        handle->ops->flush(handle, &r->rq);
    else if (r)
        request_answer(&r->rq, 0);
}

static void ops_fsync(fuse_req_t req, fuse_ino_t id, int datasync, struct fuse_file_info *file) {
    struct handle *handle = ops_handle(file);
    struct fuse_request *r = fuse_request_new(ops_channel(req), req);
    (void)id;
    (void)datasync;
    if (r && handle->ops->fsync)
        handle->ops->fsync(handle, &r->rq);
    else if (r)
        request_answer(&r->rq, 0);
}

/* A notification about poll(2) takes no lock of an inode and waits for nobody: the kernel looks up
 * the open file in a tree and wakes those who wait for it (Linux, fs/fuse/file.c:
 * fuse_notify_poll_wakeup()). So, unlike those that invalidate, it may come from the loop. */
static void ops_wake(struct handle *handle) {
    struct fuse_pollhandle *poll = handle->poll;
    handle->poll = NULL;
    if (!poll)
        return;
    fuse_lowlevel_notify_poll(poll);
    fuse_pollhandle_destroy(poll);
}

static void ops_poll(fuse_req_t req, fuse_ino_t id, struct fuse_file_info *file,
                     struct fuse_pollhandle *poll) {
    struct handle *handle = ops_handle(file);
    (void)id;
    ops_channel(req)->daemon->requests++;
    if (poll) {
        if (handle->poll)
            fuse_pollhandle_destroy(handle->poll);
        handle->poll = poll;
        handle->wake = ops_wake;
    }
    fuse_reply_poll(req, handle->ops->poll ? handle->ops->poll(handle)
                                           : POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM);
}

static void ops_forget_poll(struct handle *handle) {
    if (handle->poll)
        fuse_pollhandle_destroy(handle->poll);
    handle->poll = NULL;
}

static void ops_release(fuse_req_t req, fuse_ino_t id, struct fuse_file_info *file) {
    struct handle *handle = ops_handle(file);
    (void)id;
    ops_forget_poll(handle);
    handle->ops->release(handle);
    fuse_reply_err(req, 0);
}

/* An open directory: its names as they were when it was opened. */
struct ops_dir {
    struct list open;  /* in channel->dirs */
    struct node *node; /* a reference */
    struct node_list list;
};

static void ops_dir_free(struct ops_dir *dir) {
    list_remove(&dir->open);
    node_unref(dir->node);
    node_list_free(&dir->list);
    free(dir);
}

/* Every directory begins with itself and the one above. */
static int ops_dir_start(const struct node *node, struct node_list *list) {
    struct node_stat self, above;
    node->ops->stat(node, &self);
    above = self;
    if (node->parent)
        node->parent->ops->stat(node->parent, &above);
    int r = node_list_add(list, ".", S_IFDIR, self.st.st_ino);
    return r < 0 ? r : node_list_add(list, "..", S_IFDIR, above.st.st_ino);
}

void ops_opendir_now(fuse_req_t req, struct node *node, struct fuse_file_info *file) {
    struct ops_dir *dir = calloc(1, sizeof *dir);
    if (!dir) {
        fuse_reply_err(req, ENOMEM);
        return;
    }
    int r = -ERR_NOT_A_DIRECTORY;
    if (node->ops->list)
        r = ops_dir_start(node, &dir->list);
    if (r == 0)
        r = node->ops->list(node, &dir->list);
    if (r < 0) {
        node_list_free(&dir->list);
        free(dir);
        fuse_reply_err(req, error_to_user(r));
        return;
    }
    dir->node = node_ref(node);
    list_append(&ops_channel(req)->dirs, &dir->open);
    file->fh = (uint64_t)(uintptr_t)dir;
    if (fuse_reply_open(req, file) < 0)
        ops_dir_free(dir);
}

static void ops_opendir(fuse_req_t req, fuse_ino_t id, struct fuse_file_info *file) {
    struct node *node = ops_node(req, id);
    if (!node)
        return;
    ops_channel(req)->daemon->requests++;
    if (!fresh_holds(ops_channel(req), req, node, NULL, file))
        ops_opendir_now(req, node, file);
}

/* One name of a listing, with its attributes when `plus`. Returns the bytes it takes, or more than
 * there is room for. */
static size_t ops_dir_add(fuse_req_t req, struct ops_dir *dir, size_t at, bool plus, char *out,
                          size_t room) {
    struct fuse_channel *channel = ops_channel(req);
    const struct node_name *name = &dir->list.names[at];
    struct stat st = {.st_mode = name->type, .st_ino = name->ino};
    off_t next = (off_t)at + 1;
    if (!plus)
        return fuse_add_direntry(req, out, room, name->name, &st, next);

    struct fuse_entry_param entry = {.attr = st};
    size_t need = fuse_add_direntry_plus(req, NULL, 0, name->name, &entry, next);
    if (need > room)
        return need;
    struct node *node;
    /* The kernel does not take "." and ".." for looked up (fuse(4), READDIRPLUS). */
    if (name->name[0] == '.' && (!name->name[1] || strcmp(name->name, "..") == 0))
        return fuse_add_direntry_plus(req, out, room, name->name, &entry, next);
    if (dir->node->ops->lookup(dir->node, name->name, &node) == 0) {
        inode_lookup(channel, node);
        node_to_entry(node, &entry);
    }
    return fuse_add_direntry_plus(req, out, room, name->name, &entry, next);
}

static void ops_list(fuse_req_t req, size_t size, off_t offset, struct fuse_file_info *file,
                     bool plus) {
    struct ops_dir *dir = (struct ops_dir *)(uintptr_t)file->fh;
    size_t used = 0;
    if (size > 128 * 1024)
        size = 128 * 1024;
    cleanup_free char *out = malloc(size);
    if (!out) {
        fuse_reply_err(req, ENOMEM);
        return;
    }
    ops_channel(req)->daemon->requests++;
    for (size_t at = offset < 0 ? 0 : (size_t)offset; at < dir->list.count; at++) {
        size_t n = ops_dir_add(req, dir, at, plus, out + used, size - used);
        if (n > size - used)
            break;
        used += n;
    }
    fuse_reply_buf(req, out, used);
}

static void ops_readdir(fuse_req_t req, fuse_ino_t id, size_t size, off_t offset,
                        struct fuse_file_info *file) {
    (void)id;
    ops_list(req, size, offset, file, false);
}

static void ops_readdirplus(fuse_req_t req, fuse_ino_t id, size_t size, off_t offset,
                            struct fuse_file_info *file) {
    (void)id;
    ops_list(req, size, offset, file, true);
}

static void ops_releasedir(fuse_req_t req, fuse_ino_t id, struct fuse_file_info *file) {
    (void)id;
    ops_dir_free((struct ops_dir *)(uintptr_t)file->fh);
    fuse_reply_err(req, 0);
}

void handles_release_all(struct fuse_channel *channel) {
    struct list *link;
    while ((link = list_pop(&channel->handles))) {
        struct handle *handle = LIST_OWNER(link, struct handle, open);
        ops_forget_poll(handle);
        handle->ops->release(handle);
    }
    while ((link = list_pop(&channel->dirs)))
        ops_dir_free(LIST_OWNER(link, struct ops_dir, open));
}

static void ops_statfs(fuse_req_t req, fuse_ino_t id) {
    struct statvfs st = {.f_bsize = 4096, .f_frsize = 4096, .f_namemax = NAME_LIMIT};
    (void)id;
    fuse_reply_statfs(req, &st);
}

/* No getxattr, setxattr and the like: libfuse answers ENOSYS, and the kernel does not ask again. */
const struct fuse_lowlevel_ops fuse_channel_ops = {
    .init = ops_init,
    .lookup = ops_lookup,
    .forget = ops_forget,
    .forget_multi = ops_forget_multi,
    .getattr = ops_getattr,
    .setattr = ops_setattr,
    .mkdir = ops_mkdir,
    .rmdir = ops_rmdir,
    .unlink = ops_unlink,
    .rename = ops_rename,
    .symlink = ops_symlink,
    .link = ops_link,
    .mknod = ops_mknod,
    .create = ops_create,
    .open = ops_open,
    .read = ops_read,
    .write = ops_write,
    .flush = ops_flush,
    .fsync = ops_fsync,
    .release = ops_release,
    .poll = ops_poll,
    .opendir = ops_opendir,
    .readdir = ops_readdir,
    .readdirplus = ops_readdirplus,
    .releasedir = ops_releasedir,
    .statfs = ops_statfs,
};
