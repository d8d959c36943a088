#pragma once

#include <fuse_lowlevel.h>
#include <uv.h>

#include "fuse/channel.h"
#include "tree/node.h"
#include "util/list.h"

/* Private to src/fuse. */

RB_HEAD(inode_index, node);

struct presence;
struct removal;

struct fuse_channel {
    struct daemon *daemon;
    struct fuse_session *session;
    struct fuse_buf buffer; /* the kernel's requests are received here */
    uv_poll_t poll;
    uv_async_t interrupted; /* an interrupt callback has marked a request */
    uv_timer_t doubts;      /* looks again at requests whose asker has a harmless signal */
    struct list parked;     /* of fuse_request */
    struct list removals;   /* of removal: let go of, and not yet asked for again */
    uint64_t vain_dir;      /* id of a node where a removal has waited in vain; 0: none */
    uint64_t vain_at;       /* uv_now() */
    struct list handles;    /* of handle: open files */
    struct list dirs;       /* of ops_dir: open directories */
    struct list traces;     /* of trace; empty unless requests are logged */
    struct inode_index inodes;
    uint64_t last_inode;
    struct presence *presence; /* owned; NULL: unmounting is told by the kernel alone */
    bool mounted;
    bool fd_open;
    bool left; /* it is not mounted where it was, and there are copies */
    void (*ended)(struct daemon *d);
    void (*ready)(struct daemon *d);
};

/* Which answer the kernel expects to plain success. */
enum fuse_request_kind { REQUEST_PLAIN, REQUEST_ATTR };

/* One request of the kernel. */
struct fuse_request {
    struct request rq;
    struct fuse_channel *channel;
    fuse_req_t req; /* NULL: let go of (removal.c) */
    enum fuse_request_kind kind;
    struct node *node;          /* of REQUEST_ATTR and of a LOOKUP that waits; a reference */
    struct fuse_file_info file; /* of open and create */

    struct removal *removal; /* of UNLINK and RENAME */

    struct list link; /* in channel->parked while it waits */
    request_cancel *cancel;
    void *cancel_arg;
    uv_timer_t *deadline;  /* NULL: none */
    bool interrupt_marked; /* by the callback, under libfuse's lock */
};

/* A new request for an operation that is passed to the tree. NULL: no memory, and it has been
 * answered. */
struct fuse_request *fuse_request_new(struct fuse_channel *channel, fuse_req_t req);

void fuse_request_free(struct fuse_request *r);
/* Frees it, and leaves the kernel's request to the caller, who has to answer it. */
fuse_req_t fuse_request_take(struct request *rq);
/* Gives up a parked request. */
void fuse_request_cancel(struct fuse_request *r, int status);
/* A parked request that was let go of is to be answered as `req`. */
void fuse_request_attach(struct fuse_request *r, fuse_req_t req);

/* Removals: UNLINK and RENAME give the lock of their directory back when they take long.
 *
 * A request that may have to. (new_dir NULL: UNLINK.) */
void removal_begin(struct fuse_request *r, struct node *dir, const char *name, struct node *new_dir,
                   const char *new_name, unsigned flags);
/* It has been parked. */
void removal_wait(struct removal *removal);
/* It has its answer. True: kept for the kernel's next try, the request is gone; false: the kernel
 * waits for it. */
bool removal_answered(struct fuse_request *r, int status);
/* Is this UNLINK or RENAME the next try of one that was let go of? Then it has been taken. */
bool removal_resume(struct fuse_channel *channel, fuse_req_t req, const struct node *dir,
                    const char *name, const struct node *new_dir, const char *new_name,
                    unsigned flags);
/* Has this LOOKUP, which has found `node`, to wait for one? Then it has been taken. */
bool removal_holds_lookup(struct fuse_channel *channel, fuse_req_t req, struct node *node);
/* Does the asker of this LOOKUP come back for one that concerns this name? Then what it knows by it
 * is *ret_node: a new reference, or NULL for nothing. */
bool removal_knows(struct fuse_channel *channel, fuse_req_t req, const struct node *dir,
                   const char *name, struct node **ret_node);
void removals_free_all(struct fuse_channel *channel);

/* Has this LOOKUP of an unknown name, or this OPENDIR (`name`: NULL), to wait for news of the
 * directory? Then it has been taken, and goes on with the functions below. */
bool fresh_holds(struct fuse_channel *channel, fuse_req_t req, struct node *dir, const char *name,
                 const struct fuse_file_info *file);
/* Answer from what is known. */
void ops_lookup_now(fuse_req_t req, struct node *dir, const char *name);
void ops_opendir_now(fuse_req_t req, struct node *dir, struct fuse_file_info *file);

/* Gives up every parked request. */
void fuse_requests_cancel_all(struct fuse_channel *channel, int status);
void fuse_requests_on_interrupt(uv_async_t *async);
void fuse_requests_on_doubts(uv_timer_t *timer);

/* The file system has been unmounted by somebody else. */
void fuse_channel_lost(struct fuse_channel *channel);

/* Watches whether the mount is still there: sets `left` and reports the channel as lost when it is
 * gone from the daemon's own mount namespace and copies of it keep the connection alive. Where this
 * cannot be seen nothing is watched. */
void presence_prepare(struct fuse_channel *channel, const char *mountpoint); /* before mounting */
void presence_start(struct fuse_channel *channel);                           /* after it */
void presence_stop(struct fuse_channel *channel); /* what it holds is freed by the loop */

/* Inodes: the nodes that the kernel knows, by node id. Ids are never used twice. */
struct node *inode_find(struct fuse_channel *channel, fuse_ino_t id);
/* Counts one lookup by the kernel, taking over the caller's reference. */
void inode_lookup(struct fuse_channel *channel, struct node *node);
void inode_forget(struct fuse_channel *channel, struct node *node, uint64_t lookups);
void inode_forget_all(struct fuse_channel *channel);

void node_to_entry(const struct node *node, struct fuse_entry_param *ret_entry);

/* What is still open when the file system is unmounted has no RELEASE to come. */
void handles_release_all(struct fuse_channel *channel);

/* Has each request of the mounted session logged in one line, when it is answered, if the log's
 * level asks for it. */
int trace_start(struct fuse_channel *channel);
void trace_free_all(struct fuse_channel *channel);

extern const struct fuse_lowlevel_ops fuse_channel_ops;
