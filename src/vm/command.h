#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "util/list.h"
#include "vm/vm.h"

/* Commands that run in a guest. A command's output is spooled to an unlinked file as it comes, so
 * that any number of readers can follow it from its start and none holds it up. */

#define COMMAND_LIMIT 131072 /* bytes of a command */

enum command_end {
    COMMAND_RUNNING,
    COMMAND_EXITED,   /* status */
    COMMAND_SIGNALED, /* signal */
    COMMAND_LOST,     /* error: the connection broke, what became of it is unknown */
    COMMAND_REFUSED,  /* error: it did not run */
};

struct command {
    struct vm *vm; /* a reference */
    unsigned refs;
    enum command_end end;
    int status;
    char signal[16];
    int error;         /* -ERR_… */
    int spool;         /* fd of the output */
    uint64_t output;   /* bytes in the spool */
    bool cut;          /* output did not fit: the disk is full */
    struct buf errors; /* the last bytes of stderr */
    struct list waits; /* of vm_wait: woken by output and by the end */

    /* The guest's side; private to vm/command.c. */
    char *text;
    char nonce[33];
    struct list link; /* in commands->running */
    struct command_shell *shell;
};

struct commands *commands_new(struct vm *vm);
/* The guest can be reached (again), or no more: keeps a shell ready in advance, or ends all
 * commands as lost. */
void commands_start(struct commands *commands);
void commands_stop(struct commands *commands, int status, const char *why);
void commands_free(struct commands *commands);

/* Starts a command; the caller gets a reference. It becomes the VM's newest. -ERR_…: not started.
 */
int command_run(struct vm *vm, const char *text, size_t length, struct command **ret_command);

/* The VM's newest command, without a new reference; NULL: there was none. */
struct command *command_newest(struct vm *vm);

/* Ends it in the guest: TERM to its process group, KILL to what is left of that 2 s later. */
void command_kill(struct command *command);

/* What it means for who waited: 0, -ERR_COMMAND_FAILED, -ERR_COMMAND_LOST, … Leaves words in
 * `error`. */
int command_verdict(struct command *command);

struct command *command_ref(struct command *command);
void command_unref(struct command *command);

void commands_describe(const struct commands *commands, json_t *info);
