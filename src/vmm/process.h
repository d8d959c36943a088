#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <sys/types.h>
#include <uv.h>

#include "util/buf.h"

/* The process of a VMM, for every backend that runs one: started in a session of its own, or taken
 * over from an earlier daemon; watched and signalled through a pidfd, so that a number that the
 * kernel has given to somebody else is never hit. */

struct process;

/* How a process has ended. */
struct process_end {
    int status;   /* of its exit; -1: a signal has ended it, or it is unknown */
    int signal;   /* that has ended it; 0: none, or it is unknown */
    char how[32]; /* "exit status 1", "killed by SIGSEGV" or, if another daemon was its parent,
                     "exit status unknown" */
};

/* Was it ended by somebody who wanted that, or by the kernel for want of memory? Else it has done
 * something wrong, or has ended by itself. */
bool process_was_killed(const struct process_end *end);

/* The process is gone; once. */
typedef void process_exited(void *arg, const struct process_end *end);

#define PROCESS_FDS 2

/* Borrowed for the call. */
struct process_options {
    const char *program;  /* absolute path */
    char *const *argv;    /* NULL-terminated */
    char *const *env;     /* NULL-terminated; the daemon's own is not handed down */
    const char *log;      /* stdout and stderr go here; emptied first */
    const char *output;   /* NULL, or stdout goes here, likewise */
    int fds[PROCESS_FDS]; /* become descriptors PROCESS_FD, …, the only ones above 2; -1: none */
    bool idle;            /* it runs when nobody else wants the CPU */
    bool transient;       /* it is killed with the process that has started it, however that ends */
};

#define PROCESS_FD 3

int process_spawn(uv_loop_t *loop, const struct process_options *options, process_exited *exited,
                  void *arg, struct process **ret_process);

/* Takes over what process_save() described. -ESRCH: it is gone. */
int process_adopt(uv_loop_t *loop, const json_t *saved, process_exited *exited, void *arg,
                  struct process **ret_process);

/* Adds "pid", "start_time" (clock ticks since the host's boot) and "boot_id" to the object. */
int process_save(const struct process *process, json_t *object);

pid_t process_pid(const struct process *process);

/* SIGKILL, also for a stopped process. One that is gone already is no error. */
void process_kill(struct process *process);

/* Calls `visit` with each process whose command line (its words ended by NULs) holds the text. */
typedef void process_visit(void *arg, pid_t pid, uid_t owner, const char *line, size_t length);
void process_each(const char *text, process_visit *visit, void *arg);

/* SIGKILL for every process of this user (of root: of any) whose command line has this word (or
 * part of a word, between commas): what no record tells of. Looks through /proc. Returns how many
 * there were. */
unsigned process_kill_strays(const char *text);

/* Stops watching; the process goes on. No callback comes after this. NULL is allowed. */
void process_release(struct process *process);

/* Runs `argv` to its end or for `timeout_ms`, blocking, and appends at most 64 KiB of its stdout
 * and stderr. For start-up only. Returns the exit status or -errno. */
int process_run(const char *program, char *const *argv, unsigned timeout_ms, struct buf *output);

/* Appends the last line that is not empty of a log file, cut and with `?` for what is not printable
 * ASCII. Appends nothing if there is none. */
void process_last_words(const char *log, struct buf *output);
