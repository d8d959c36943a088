#pragma once

#include "vm/control.h"
#include "vm/vars.h"

/* Private to vm/vars.c (the table), vm/vars_check.c (what is refused), vm/vars_batch.c (what is
 * asked for, and what it does together), vm/vars_commit.c (how that reaches the guest or the disk),
 * vm/vars_promise.c (what has been promised) and vm/vars_guest.c (what is learned from the guest).
 */

#define VAR_FIRST_NUMBER 64 /* below are the inode numbers of a VM's static files */

/* The most that is taken over from a guest: somewhat more than can be set here. */
#define VARS_LEARN_LIMIT (2 * VARS_LIMIT)
#define VARS_LEARN_COUNT 20000

/* How often an update is tried anew because somebody else has changed the file meanwhile. */
#define VARS_RETRIES 50

struct vars_commit {
    struct list link; /* in vars->queued or batch->commits */
    struct list wait; /* of vm_wait: who has asked for it, and vars_await() */
    bool replace;     /* what is not among the changes is unset */
    size_t count;
    struct vars_commit_change {
        char *name;
        char *bytes; /* NULL: unset */
        size_t length;
        bool append;  /* to what is there by then */
        size_t order; /* among the changes of a batch */
    } changes[];
};

/* What all changes of a batch together do to one variable. */
struct vars_effect {
    const char *name; /* of a change */
    bool set;         /* else it is unset */
    bool onto;        /* the bytes come behind those of the table */
    struct buf bytes;
};

struct vars_batch {
    struct vars *vars; /* NULL: the VM is gone, only the answer is still to come */
    struct list commits;
    bool to_guest; /* else to the disk */
    bool replace;  /* what is not in the overlay is unset */
    size_t count;
    struct vars_effect overlay[]; /* sorted by name, each name once */
};

struct vars {
    struct vm *vm; /* the owner */
    struct var_index index;
    size_t total;        /* bytes of all that are set, with their keys */
    uint64_t generation; /* grows with each change of the table */
    uint64_t last_number;
    struct timespec changed; /* which variables there are */
    struct timespec written; /* what they are */
    struct buf kept;         /* lines of others in the guest's file */

    struct list promises;         /* of vars_promise, in the order in which they were made */
    struct vars_promise *keeping; /* the one whose changes are being asked for, by vars_commit() */
    uint64_t dropped, dropped_recorded; /* promises, or parts; and how many the record knows of */
    struct list queued;                 /* of vars_commit: for the next batch */
    struct vars_batch *flight;          /* under way */
    size_t projected; /* `total` when all that is queued or under way will be done */

    uint64_t learned; /* uv_now() of the last word from the guest; 0: never */
    bool absent;      /* the guest has no such file */
    bool injected;    /* the boot under way has the table in its guest */
    bool owned;      /* the table is what the user wants: at a boot it wins over the image's file */
    bool refreshing; /* it is being read */
    bool unsealed;   /* our update has not been read back: see guest/linux.c */
    bool rereading;  /* for the batch under way, which waits for that */
    unsigned retries;          /* of the batch under way, whose file others have changed */
    uint64_t used;             /* uv_now() when somebody looked last */
    uv_timer_t *poll;          /* reads again and again while somebody looks */
    struct list refresh_waits; /* of vm_wait */

    void (*attached)(struct vm *vm, int status); /* not NULL: attaching */
    bool attach_booted;                          /* after a boot, not after a lost connection */
    bool attach_sending;                         /* the table, and the answer is still to come */
    bool attach_read;                            /* the file has been read */
    bool attach_keeping; /* the last step: what was promised is done, and all goes to the guest */
    uint64_t sent_generation; /* of the table as it was sent while attaching */

    uint64_t commits, updates; /* counters: what was asked, and rewrites of the guest's file */
};

int vars_set(struct vars *vars, const char *name, const char *bytes, size_t length);
void vars_unset(struct vars *vars, const char *name);
size_t vars_count(const struct vars *vars);

/* Takes over what the guest's file says. `merge`: what it does not say stays, and what it says
 * otherwise than the table does not count. */
int vars_learn(struct vars *vars, const char *text, size_t length, bool merge);
/* Takes over only the lines of others. */
int vars_learn_kept(struct vars *vars, const char *text, size_t length);

/* Copies the changes. NULL: no memory. */
struct vars_commit *vars_commit_new(const struct var_change *changes, size_t count);
void vars_commit_free(struct vars_commit *commit);
/* Takes all commits of a list. NULL: no memory, and they are still there. */
struct vars_batch *vars_batch_new(struct vars *vars, struct list *commits);
/* Without its commits. */
void vars_batch_free(struct vars_batch *batch);
/* Visits a variable as it will be; `var`: as it is, may be NULL. */
int vars_effect_show(const struct vars_effect *effect, const struct var *var,
                     int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
                     void *arg);
/* Visits every pending change of `name`, in order; NULL: everything is replaced, so it is unset. */
void vars_each_pending(const struct vars *vars, const char *name,
                       void (*visit)(void *arg, const struct vars_commit_change *change),
                       void *arg);

/* May these changes be made, now? `ret_growth`: what they add to `projected`. Words about it are
 * left.
 */
int vars_check(struct vars *vars, const struct var_change *changes, size_t count, bool replace,
               ssize_t *ret_growth);
/* Can variables be changed in the state that the VM is in? */
int vars_check_state(struct vars *vars);
/* Do they go to the guest now, or to the disk? */
bool vars_go_to_guest(const struct vars *vars);

/* The table has changed otherwise than by a batch: counts `projected` anew. */
void vars_project(struct vars *vars);

/* Visits every variable in order, as it will be when `batch` (may be NULL) is done. */
int vars_walk(const struct vars *vars, const struct vars_batch *batch,
              int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
              void *arg);

/* The batch under way, if it is on its way to the disk; else NULL. */
const struct vars_batch *vars_disk_batch(const struct vars *vars);

/* The guest's file with the table as it will be when `batch` (may be NULL) is done. */
int vars_format(const struct vars *vars, const struct vars_batch *batch, struct buf *out);
/* Sends that. */
int vars_send(struct vars *vars, const struct vars_batch *batch, control_done *done, void *arg);

/* Makes a batch of what is queued and starts it, when nothing is in its way. */
void vars_start_batch(struct vars *vars);
/* Puts the guest's file in its own place, as it is, to learn if that can be done: an empty batch,
 * or one with what others ask for. */
int vars_rewrite(struct vars *vars, struct vm_wait *wait);
/* Sends the batch under way once more. */
void vars_resend(struct vars *vars);
/* It has its verdict. */
void vars_batch_end(struct vars *vars, int status);

/* Reads it back when no update follows. */
void vars_seal_soon(struct vars *vars);
/* Reads the guest's file. */
int vars_read(struct vars *vars);
/* Goes on with attaching, if that is under way. */
void vars_attach_step(struct vars *vars);
/* Leaves words about a script that failed (status > 0), and returns the -ERR_… for it. */
int vars_explain(struct vars *vars, const char *doing, int status, const char *output,
                 size_t length);

/* The guest or the disk takes changes again: so it does what was promised and left, before what is
 * asked for now. */
void vars_keep_promises(struct vars *vars);
/* Is it doing that? */
bool vars_promises_are_kept_now(const struct vars *vars);
/* What is asked for now wins over what was promised before. */
void vars_supersede_promises(struct vars *vars, const struct vars_commit *commit);
void vars_shut_promises(struct vars *vars);
/* In the record, and those that an earlier daemon has made. */
int vars_save_promises(const struct vars *vars, json_t *record);
int vars_load_promises(struct vars *vars, const json_t *record);
/* A name and the bytes for it, in JSON and from it. */
json_t *vars_save_bytes(const char *name, const char *bytes, size_t length);
int vars_load_bytes(const json_t *one, const char **ret_name, struct buf *value);

/* Fails what is queued, under way or waiting. */
void vars_fail_all(struct vars *vars, int status);
