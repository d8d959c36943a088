#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>
#include <uv/tree.h>

#include "util/buf.h"
#include "vm/look.h"
#include "vm/vm.h"

/* The variables of one VM.
 *
 * What is in the table is what was acknowledged: the guest has it (running), or it is on the host's
 * disk and goes in at boot (booting, stopped, failed). Changes go in as commits. While one update
 * of the guest is under way, further commits gather and go together in the next (group commit);
 * each has its own verdict.
 *
 * A variable keeps the bytes that were written. Its value is those without one trailing newline. */

/* Bytes of `KEY=value` with the NUL behind it: what execve(2) takes as one string (MAX_ARG_STRLEN
 * of Linux, 32 pages). A longer one would keep every program of the guest from being started. */
#define VAR_LIMIT 131072
#define VARS_LIMIT (1 << 20) /* bytes of all values with their keys */
#define VAR_FRESH_MS 1000    /* how long what was learned from the guest is taken as true */

struct var {
    RB_ENTRY(var) entry;
    char *name;
    char *bytes; /* as written; never NULL when set */
    size_t length;
    bool set;            /* the variable exists; else it is only being created */
    unsigned creating;   /* handles that have created it and not yet written */
    unsigned truncated;  /* handles whose truncation is pending: it reads as empty */
    uint64_t generation; /* vars_generation() when it was last set or unset */
    uint64_t number;     /* for its inode number */
    struct look look;
};

RB_HEAD(var_index, var);
RB_PROTOTYPE(var_index, var, entry, var_compare)

struct vars *vars_new(struct vm *vm);
/* Ends what belongs to the loop; afterwards only vars_free() may be called. */
void vars_shut(struct vars *vars);
void vars_free(struct vars *vars);

struct var_index *vars_index(struct vars *vars);

/* When a variable last came, changed or went. */
const struct timespec *vars_changed(const struct vars *vars);
/* When any value was last changed. */
const struct timespec *vars_written(const struct vars *vars);
/* utimes of env/ and of environ have set them. */
void vars_set_changed(struct vars *vars, const struct timespec *when);
void vars_set_written(struct vars *vars, const struct timespec *when);
/* Grows with each change of any variable. */
uint64_t vars_generation(const struct vars *vars);

/* The variable, if it is set or being created. */
struct var *vars_find(struct vars *vars, const char *name);

/* A name for a variable that is being created; it shows until vars_uncreate(). NULL: no memory or
 * too many. */
struct var *vars_create(struct vars *vars, const char *name);
void vars_uncreate(struct vars *vars, const char *name);

/* Somebody looks at the variables: for a while what changes in the guest is learned without being
 * asked for. */
void vars_touch(struct vars *vars);
/* Has somebody done so lately? */
bool vars_are_looked_at(const struct vars *vars);

/* One change of a commit. */
struct var_change {
    const char *name;
    const char *bytes; /* NULL: unset */
    size_t length;
    bool append; /* the bytes come behind those that are there when it is done */
};

/* Checks and takes a set of changes that take effect together or not at all (bytes are copied).
 * `wait` is told the verdict. -ERR_… and no wait for what is refused at once: -ERR_INVALID (a NUL
 * byte, a name), -ERR_TOO_LARGE, -ERR_NO_ROOM, -ERR_BUSY, -ERR_UNREACHABLE. A cancelled wait leaves
 * the commit to take its course. */
int vars_commit(struct vars *vars, const struct var_change *changes, size_t count,
                struct vm_wait *wait);

/* The same, and what is not among the changes is unset. */
int vars_replace(struct vars *vars, const struct var_change *changes, size_t count,
                 struct vm_wait *wait);

/* A promise that these changes will be made, for what is to take effect later and is acknowledged
 * now. The guest (running) is asked whether it would take them, and they are recorded. Nothing is
 * changed yet; but if neither vars_promise_settle() nor vars_promise_leave() comes soon, they are
 * made. `replace`: what is not among them would be unset, then; `whole`: also if it comes to that.
 * `wait` is told the verdict; if it
 * is bad, or the wait is cancelled, the promise still has to be settled. -ERR_… and neither wait
 * nor promise for what is refused at once, as by vars_commit(). */
struct vars_promise;
int vars_promise(struct vars *vars, const struct var_change *changes, size_t count, bool replace,
                 bool whole, struct vm_wait *wait, struct vars_promise **ret_promise);
/* More is coming: it is not late yet. */
void vars_promise_go_on(struct vars_promise *promise);
/* Makes these changes, in the place of what was promised, which stays so until it is settled. */
int vars_promise_fulfil(struct vars_promise *promise, const struct var_change *changes,
                        size_t count, bool replace, struct vm_wait *wait);
/* It has been done, or is not to be: frees it. */
void vars_promise_settle(struct vars_promise *promise);
/* Nobody knows whether it has been done: it is done as soon as that is possible. Frees it. */
void vars_promise_leave(struct vars_promise *promise);

/* Visits every variable in order, as it reads now. A negative return ends it and is returned. */
int vars_each(struct vars *vars,
              int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
              void *arg);

/* Length of the value: without one trailing newline. */
size_t var_value_length(const char *bytes, size_t length);

/* The most bytes that a value of this variable may have. */
size_t var_value_limit(const char *name);

/* Is there room for `length` bytes, the last of which is a newline, and then no part of the value,
 * or not? */
bool var_fits(const char *name, size_t length, bool newline);

/* Say why a value is refused: a NUL byte, its length; or a name, which the guest's shells keep for
 * themselves. */
int vars_refuse_nul(struct vm *vm, const char *name);
int vars_refuse_length(struct vm *vm, const char *name);
int vars_refuse_reserved(struct vm *vm, const char *name);

/* For a VM that is not anywhere yet: sets a variable, or all that `from` has. -ERR_INVALID,
 * -ERR_TOO_LARGE, -ERR_NO_ROOM. */
int vars_preset(struct vars *vars, const char *name, const char *bytes, size_t length);
int vars_copy(struct vars *vars, struct vars *from);

/* Is something under way that changes this variable (NULL: any)? Then `wait` is told when all of it
 * that was asked for until now has its verdict; the status means nothing. */
bool vars_await(struct vars *vars, const char *name, struct vm_wait *wait);

/* The bytes of a variable as they will be when everything is done that has been asked for. False:
 * it will not be set. */
bool vars_newest(struct vars *vars, const char *name, struct buf *out);
/* Their number; -1: it will not be set. */
ssize_t vars_newest_length(const struct vars *vars, const char *name);

/* It has been renamed, with the value that it had or was to have: who was creating it does so under
 * the new name, and nobody else. */
void vars_move(struct vars *vars, const char *name, const char *new_name);

/* Its name has been removed: who was still creating or truncating it does so no more. */
void vars_abandon(struct vars *vars, const char *name);

/* Makes sure that what is known is not older than VAR_FRESH_MS. 1: it is, no wait needed; 0: `wait`
 * is told when it is; else -ERR_…. */
int vars_refresh(struct vars *vars, struct vm_wait *wait);

/* The same for who only looks which variables there are. What has been looked at lately is learned
 * again and again, and is new enough. */
int vars_refresh_look(struct vars *vars, struct vm_wait *wait);

/* For a new boot: the guest's file as it goes into the boot; remembers what went in. Nothing when
 * the variables are still those of the image, whatever they are. */
int vars_inject(struct vars *vars, struct buf *out);

/* The guest answers after a boot (fresh: it has what vars_inject() gave) or after a lost
 * connection: brings both sides together; `done` when they are. */
void vars_attach(struct vars *vars, bool booted, void (*done)(struct vm *vm, int status));

/* The same for an existing machine (vm/machine.h), whose file nothing of ours has gone into. When
 * it is met for the first time, its variables and those of the table are put together, and the
 * table's win. `before`: it has had them all, so if the table was changed since vars_leave() it is
 * what the machine gets, else the machine's file is the truth. */
void vars_meet(struct vars *vars, bool before, void (*done)(struct vm *vm, int status));
/* It is left alone with the variables that it has. */
void vars_leave(struct vars *vars);
/* What is left behind there is wanted wherever the VM runs next. */
void vars_take_along(struct vars *vars);

/* The VM is running now: what has been queued meanwhile goes to the guest. */
void vars_resume(struct vars *vars);

/* No answer can come any more: every commit under way fails with `status`. */
void vars_detach(struct vars *vars, int status);

/* For the VM's record: the variables; and what belongs to them besides. */
json_t *vars_save(const struct vars *vars);
int vars_save_more(const struct vars *vars, json_t *record);
bool vars_are_owned(const struct vars *vars);
/* The boot under way was started by an earlier daemon: takes it that the guest has been given the
 * variables. */
void vars_assume_injected(struct vars *vars);
int vars_load(struct vars *vars, const json_t *saved, bool owned);
int vars_load_more(struct vars *vars, const json_t *record);
/* No guest has been taken over: what was promised is done. */
void vars_apply_promises(struct vars *vars);
/* Is there a batch whose verdict is that of the record's next writing? Then that calls
 * vars_saved(). */
bool vars_wants_saving(const struct vars *vars);
void vars_saved(struct vars *vars, int status);
/* How many promises, or parts of some, have been dropped until now; and were until the record was
 * made that is now on the disk. */
uint64_t vars_promises_dropped(const struct vars *vars);
void vars_promises_recorded(struct vars *vars, uint64_t dropped);

/* Counters for `info`. */
void vars_describe(const struct vars *vars, json_t *info);
