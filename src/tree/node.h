#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <uv/tree.h>

#include "tree/request.h"
#include "util/buf.h"

/* The tree: nodes and what can be done to them.
 *
 * A node is one file or directory as the kernel knows it. Each kind of node is a file in this
 * folder that ends in one table of node_ops. A directory whose names never change is a table of
 * rows (struct node_row): lookup, list and stat are driven by it alike.
 *
 * A node is counted: by the kernel's lookups (together one), by each open handle, by each child. */

struct vm;
struct daemon;

/* What getattr answers; filled from memory, never waiting. */
struct node_stat {
    struct stat st;       /* st_ino, st_mode, st_size, times, owner; the rest is filled in */
    double entry_seconds; /* how long the kernel may keep the name */
    double attr_seconds;  /* how long it may keep the rest */
};

/* One open of a node. Kinds that keep more than this embed it as their first member. */
struct handle {
    /* A READ of the kernel for its page cache (of sendfile(2), splice(2) or mmap(2)) is refused, at
     * which programs take to read(2): the page cache ends where stat says that the file ends, and
     * takes an error for that end. */
    bool uncached;
    struct node *node; /* a reference */
    const struct node_ops
        *ops;         /* of the node when it was opened: a rename may make it another kind */
    int flags;        /* of open(2) */
    struct list open; /* the transport's own: all that are open */
    void *poll;       /* the transport's own: who is to be woken; NULL: nobody */
    /* Set by the transport: poll() may say something else now. Spurious calls do no harm. */
    void (*wake)(struct handle *handle);
};

/* A directory listing, taken as a whole when the directory is opened, so that offsets stay right
 * while names come and go. */
struct node_list {
    struct node_name {
        char *name;
        mode_t type; /* S_IFDIR or S_IFREG */
        uint64_t ino;
    } * names;
    size_t count, cap;
};

struct vm_wait;

struct node_ops {
    void (*stat)(const struct node *node, struct node_stat *ret_stat);

    /* Directories. lookup() never waits; it returns a new reference. */
    int (*lookup)(struct node *dir, const char *name, struct node **ret_node);
    int (*list)(struct node *dir, struct node_list *list);
    /* For what may change elsewhere, when a name is not found and before list(). 0: `wait` is told
     * when what is known is new again; else it is new enough. NULL: it always is. */
    int (*refresh)(struct node *dir, struct vm_wait *wait);
    void (*create)(struct node *dir, const char *name, int flags, mode_t mode, struct request *rq);
    void (*mkdir)(struct node *dir, const char *name, mode_t mode, struct request *rq);
    void (*rmdir)(struct node *dir, const char *name, struct request *rq);
    void (*unlink)(struct node *dir, const char *name, struct request *rq);
    void (*rename)(struct node *dir, const char *name, struct node *new_dir, const char *new_name,
                   unsigned flags, struct request *rq);

    /* Files. open() makes a handle; every other operation is given it. */
    void (*open)(struct node *node, int flags, struct request *rq);
    void (*read)(struct handle *handle, size_t length, off_t offset, struct request *rq);
    void (*write)(struct handle *handle, const char *data, size_t length, off_t offset,
                  struct request *rq);
    void (*flush)(struct handle *handle, struct request *rq);
    void (*fsync)(struct handle *handle, struct request *rq);
    void (*release)(struct handle *handle); /* frees the handle */
    /* poll(2): the events of <poll.h> that are there now. When others may come, the node sees to it
     * that handle->wake is called then, once. NULL: always ready, as files are. */
    unsigned (*poll)(struct handle *handle);

    /* Changes of mode, owner, times and size; `mask` of NODE_SET_…. */
    void (*setattr)(struct node *node, struct handle *handle, const struct stat *want,
                    unsigned mask, struct request *rq);

    /* Lets go of the node's object. */
    void (*free)(struct node *node);
};

enum {
    NODE_SET_MODE = 1 << 0,
    NODE_SET_UID = 1 << 1,
    NODE_SET_GID = 1 << 2,
    NODE_SET_SIZE = 1 << 3,
    NODE_SET_ATIME = 1 << 4,
    NODE_SET_MTIME = 1 << 5,
};

struct node {
    const struct node_ops *ops;
    const struct node_row *row; /* of a static directory's table; else NULL */
    struct node *parent;        /* a reference; NULL: the root */
    char *name;                 /* in the parent */
    struct vm *vm;              /* a reference; NULL above a VM */
    void *object;               /* the kind's own; its free() lets go of it */
    struct daemon *daemon;
    unsigned refs;
    unsigned held; /* requests parked on its inode: see node_child() */
    bool indexed;  /* found by node_child() */
    bool removed;  /* its name was removed or given to another: who has it open writes to nobody */
    RB_ENTRY(node) sibling;
    RB_HEAD(node_children, node) children;

    /* The transport's own. */
    uint64_t id;
    uint64_t lookups;
    RB_ENTRY(node) by_id;
};

/* A row of a directory with fixed names. */
struct node_row {
    const char *name;
    mode_t mode; /* with type */
    const struct node_ops *ops;
    bool (*generate)(struct vm *vm, struct buf *out); /* contents, for text files (tree/text.c) */
};

/* How long the kernel keeps the attributes of a file that may change at any time: from the LOOKUP
 * to the OPEN behind it, which needs the mode for its permission check. */
#define NODE_BRIEF_SECONDS 0.01

struct node *node_root_new(struct daemon *daemon);

/* The child node called `name`: the one the kernel has already, or a new one; a new reference.
 * NULL: no memory. A write that is held blocks its inode's lock in the kernel, where a second
 * writer waits beyond the reach of a signal; so while requests are parked on a node, a fresh one is
 * made for the next comer. */
struct node *node_child(struct node *parent, const char *name, const struct node_ops *ops,
                        const struct node_row *row, struct vm *vm);

/* A child that node_child() never finds: each lookup has its own. */
struct node *node_child_private(struct node *parent, const char *name, const struct node_ops *ops,
                                const struct node_row *row, struct vm *vm);

/* The kernel has marked this child as deleted: later lookups get a fresh node. */
void node_forget_child(struct node *parent, const char *name);
/* The same, and it is `removed`. */
void node_remove_child(struct node *parent, const char *name);

/* The kernel has moved a name within a directory (rename): the node that it knows as `name` is
 * found as `new_name` from now on. node_set_kind() makes another kind of it; its former object is
 * let go. */
void node_move_child(struct node *dir, const char *name, const char *new_name);
void node_set_kind(struct node *node, const struct node_ops *ops, void *object);
struct node *node_find_child(struct node *parent, const char *name);

struct node *node_ref(struct node *node);
void node_unref(struct node *node);

int node_list_add(struct node_list *list, const char *name, mode_t type, uint64_t ino);
void node_list_free(struct node_list *list);

/* Fills in the owner, link count and times that all nodes have by default. */
void node_stat_init(const struct node *node, struct node_stat *ret_stat);

/* Shows and changes what chmod, chown and utimes can change; `mask` as of setattr. */
struct look;
void node_show_look(const struct look *look, struct stat *st);
void node_set_look(struct look *look, const struct stat *want, unsigned mask);

/* A handle without anything of its own. */
void node_open_plain(struct node *node, int flags, struct request *rq);
void node_release_plain(struct handle *handle);
void handle_init(struct handle *handle, struct node *node, int flags);
void handle_done(struct handle *handle);

/* setattr for files where mode, owner and times cannot be changed but nobody is helped by an error.
 */
void node_setattr_ignore(struct node *node, struct handle *handle, const struct stat *want,
                         unsigned mask, struct request *rq);
