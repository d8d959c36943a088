#pragma once

#include <fuse_lowlevel.h>
#include <uv.h>

#include "fuse/channel.h"
#include "tree/node.h"
#include "util/list.h"

/* Private to src/fuse. */

RB_HEAD(inode_index, node);

struct fuse_channel {
    struct daemon *daemon;
    struct fuse_session *session;
    struct fuse_buf buffer; /* the kernel's requests are received here */
    uv_poll_t poll;
    uv_async_t interrupted; /* an interrupt callback has marked a request */
    uv_timer_t doubts;      /* looks again at requests whose asker has a harmless signal */
    struct list parked;     /* of fuse_request */
    struct list handles;    /* of handle: open files */
    struct list dirs;       /* of ops_dir: open directories */
    struct inode_index inodes;
    uint64_t last_inode;
    bool mounted;
    bool fd_open;
    void (*ended)(struct daemon *d);
    void (*ready)(struct daemon *d);
};

/* Which answer the kernel expects to plain success. */
enum fuse_request_kind { REQUEST_PLAIN, REQUEST_ATTR };

/* One request of the kernel. */
struct fuse_request {
    struct request rq;
    struct fuse_channel *channel;
    fuse_req_t req;
    enum fuse_request_kind kind;
    struct node *node;          /* of REQUEST_ATTR; a reference */
    struct fuse_file_info file; /* of open and create */

    struct list link; /* in channel->parked while it waits */
    request_cancel *cancel;
    void *cancel_arg;
    uv_timer_t *deadline;  /* NULL: none */
    bool interrupt_marked; /* by the callback, under libfuse's lock */
};

/* A new request for an operation that is passed to the tree. NULL: no memory, and it has been
 * answered. */
struct fuse_request *fuse_request_new(struct fuse_channel *channel, fuse_req_t req);

/* Gives up every parked request. */
void fuse_requests_cancel_all(struct fuse_channel *channel, int status);
void fuse_requests_on_interrupt(uv_async_t *async);
void fuse_requests_on_doubts(uv_timer_t *timer);

/* Inodes: the nodes that the kernel knows, by node id. Ids are never used twice. */
struct node *inode_find(struct fuse_channel *channel, fuse_ino_t id);
/* Counts one lookup by the kernel, taking over the caller's reference. */
void inode_lookup(struct fuse_channel *channel, struct node *node);
void inode_forget(struct fuse_channel *channel, struct node *node, uint64_t lookups);
void inode_forget_all(struct fuse_channel *channel);

void node_to_entry(const struct node *node, struct fuse_entry_param *ret_entry);

/* What is still open when the file system is unmounted has no RELEASE to come. */
void handles_release_all(struct fuse_channel *channel);

extern const struct fuse_lowlevel_ops fuse_channel_ops;
