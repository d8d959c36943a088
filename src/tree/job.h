#pragma once

#include "tree/node.h"
#include "vm/job.h"

/* What the files of jobs/NAME/ share. Their nodes hold no job of their own: it is that of the
 * directory above. */

extern const struct node_ops jobdir_ops;
extern const struct node_ops job_clone_ops;  /* jobs/.clone */
extern const struct node_ops job_text_ops;   /* argv, command */
extern const struct node_ops job_stdin_ops;  /* stdin */
extern const struct node_ops job_stream_ops; /* stdout, stderr */
extern const struct node_ops job_exit_ops;   /* exit */
extern const struct node_ops job_value_ops;  /* cwd, timeout, …, status */
extern const struct node_ops job_signal_ops; /* signal */
extern const struct node_ops job_env_ops;    /* env/ */

/* The node of a job's directory; a new reference. NULL: no memory. */
struct node *job_node(struct node *dir, struct job *job);

/* The job that a file of its directory belongs to. */
struct job *job_of(const struct node *node);

/* What all of these files answer to stat; the size is left 0. */
void job_stat_init(const struct node *node, struct node_stat *ret_stat);

/* Words for `error` of the VM, beginning with the file's path. Returns `status`. */
int job_fail(const struct node *node, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* An open file of a job. Kinds that keep more embed it as their first member. */
struct job_handle {
    struct handle handle;
    struct job *job;       /* a reference */
    struct buf text;       /* what was written, or is read */
    uint64_t position;     /* up to which it was read */
    struct vm_wait polled; /* wakes who polls it */
};

void job_handle_open(struct node *node, int flags, struct request *rq);
/* `uncached`: see struct handle. */
void job_handle_open_as(struct node *node, int flags, bool uncached, struct request *rq);
/* Of what is only ever written: root, who may read it, finds it empty, as cp -r does of a job. */
void job_read_nothing(struct handle *handle, size_t length, off_t offset, struct request *rq);
void job_handle_release(struct handle *handle);
void job_handle_free(struct job_handle *h);

/* A READ that waits in job->waits: `answer` is tried again at each change, and returns true when it
 * has answered. It is tried at once, too. */
struct job_read {
    struct vm_wait wait;
    struct request *rq;
    struct job_handle *h;
    size_t length;
    off_t offset;
    bool (*answer)(struct job_read *read);
};
void job_read_wait(struct handle *handle, size_t length, off_t offset,
                   bool (*answer)(struct job_read *read), struct request *rq);

/* poll(2) for readers: `ready` now, or a wake-up at the next change. */
unsigned job_poll(struct handle *handle, bool ready);

/* A file that is put in place as a whole, by rename: as if it had been written. 0 or -ERR_…;
 * -ERR_NOT_PERMITTED for files that cannot be replaced. */
int job_text_take(struct node *dir, const struct node_row *row, const char *data, size_t length);
int job_value_take(struct node *dir, const struct node_row *row, const char *data, size_t length);

uint64_t jobdir_slot(const struct node_row *row);
