#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include <uv/tree.h>

#include "vm/command.h"
#include "vm/scratch.h"
#include "vm/vm.h"

/* Jobs: commands with everything that belongs to one (design, section 4). A job is made, told what
 * it is to run and how, started once, and stays with its output until it is removed. It belongs to
 * the VM's table of jobs; whoever holds it longer (a node, a handle) has a reference. */

#define JOBS_LIMIT 1024 /* of one VM at a time */
#define JOBS_FINISHED_LIMIT                                                                        \
    256              /* that have ended; beyond it the one that ended first is removed             \
                      */
#define JOB_KILL_S 5 /* from TERM to KILL after the timeout */
#define JOB_NAME_LIMIT 64
#define JOB_INPUT_EARLY 65536 /* bytes of stdin that are taken before the start, as by a pipe */
#define JOB_FIRST_NUMBER (UINT64_C(3) << 30) /* for inode numbers */
#define JOB_NUMBERS 32                       /* of one job */

enum job_shell { JOB_SHELL_OF_VM, JOB_SHELL_LOGIN, JOB_SHELL_RAW };

struct job {
    struct vm *vm; /* a reference */
    RB_ENTRY(job) by_name;
    struct list finished; /* in the table's list of those that have ended */
    unsigned refs;        /* the table's, one a node, one a handle */
    char *name;
    uint64_t serial; /* unique in its VM, also over restarts of the daemon */
    uint64_t number; /* made of it: the base of its inode numbers */
    struct timespec created, changed;
    bool removed;   /* it has no name any more */
    bool leased;    /* it lives as long as the handle that made it */
    bool recorded;  /* there is a folder of it on disk (vm/job_record.c) */
    bool recording; /* it is being written */

    /* What is to be run. */
    struct buf text;         /* what was written to `argv` or `command` */
    bool words;              /* it is an argv */
    char *folder;            /* NULL: where a login starts */
    struct scratches *env;   /* its own variables, and temporary files beside them */
    struct scratches *files; /* temporary files in its directory */
    enum job_shell shell;
    uint64_t output_max; /* bytes of each stream */
    bool flowing;
    unsigned timeout; /* ms; 0: none */

    struct buf error;        /* why something about this job was refused or failed, in words */
    struct command *command; /* a reference; NULL: not started */
    struct buf input;        /* came before the start */
    unsigned input_writers;  /* handles that have `stdin` open for writing */
    bool input_over;         /* the last of them has closed it */
    bool overdue;            /* it was ended for its timeout */
    uv_timer_t *timer;       /* of the timeout; NULL: none */
    struct vm_wait progress; /* on the command */
    struct vm_wait room;     /* on its input */
    struct list waits;       /* of vm_wait: woken by the start, by output and by the end */
    struct list input_waits; /* of vm_wait: woken when `stdin` may take more */
};

struct jobs;
RB_HEAD(job_index, job);
RB_PROTOTYPE(job_index, job, by_name, job_compare)

struct jobs *jobs_new(struct vm *vm);
void jobs_free(struct jobs *jobs);
struct job_index *jobs_index(struct jobs *jobs);
const struct timespec *jobs_changed(const struct jobs *jobs);

struct job *job_find(struct jobs *jobs, const char *name);

/* A new job without a new reference; `name` NULL: any. -ERR_INVALID, -ERR_EXISTS, -ERR_NO_ROOM. */
int job_make(struct jobs *jobs, const char *name, struct job **ret_job);

/* Takes its name away, ends its command. Who has it open keeps what there is. */
void job_remove(struct job *job);

struct job *job_ref(struct job *job);
void job_unref(struct job *job);

/* "new", "running", "exited" */
const char *job_state_name(const struct job *job);
/* And its record says so: what is told of its end holds for a later daemon, too. */
bool job_has_ended(const struct job *job);

/* Can it be started with its variables as they are? */
int job_check(struct job *job);
/* It could not be started, and nobody can be told: it ends as one that was lost. */
void job_refuse(struct job *job, int status);

/* Starts what its text says. -ERR_…: it has not started, and may be started again. */
int job_start(struct job *job);

/* What has just been said in the VM's `error` is about this job. */
void job_keep_error(struct job *job);

/* How it has ended, a word and a newline: a status, a signal, or `lost`. */
void job_print_exit(const struct job *job, struct buf *out);

/* Input. Takes all of it; true: the writer is to wait (job->input_waits) before it sends more.
 * -ERR_NO_READER in `ret_status` when it has ended. */
bool job_write_input(struct job *job, const char *data, size_t length, int *ret_status);
void job_open_input(struct job *job);
void job_close_input(struct job *job);

/* 0: none; it counts from the start. */
void job_set_timeout(struct job *job, unsigned timeout_ms);

/* What a later daemon finds of jobs: those that were started and have not been removed. */
void jobs_load(struct jobs *jobs, struct vm *vm);

/* Private to vm/job.c and vm/job_record.c. */
void job_record_begin(struct job *job);
void job_record_end(struct job *job);
void job_record_remove(struct job *job);
void job_set_serial(struct job *job, uint64_t serial);
/* Takes over the reference on the command. */
void job_finish_restored(struct job *job, struct command *command);
