#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "guest/guest.h"
#include "util/list.h"
#include "vm/spool.h"
#include "vm/vm.h"

/* Commands that run in a guest: what `exec` and jobs/ have in common. A command's output is spooled
 * as it comes, so that any number of readers can follow it from its start. */

#define COMMAND_LIMIT 131072 /* bytes of a command */
#define COMMAND_KILL_S 2     /* from TERM to KILL, where nothing else is said */
/* Bytes of input that wait for the guest, above which a writer is to be held back. */
#define COMMAND_INPUT_HIGH (256 * 1024)

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
    int error;             /* -ERR_… */
    struct spool out, err; /* `err` is empty unless they are `apart` */
    bool apart;
    struct buf errors;       /* the last bytes of stderr */
    struct list waits;       /* of vm_wait: woken by output and by the end */
    struct list input_waits; /* of vm_wait: woken when there is room for input, and by the end */

    /* The guest's side; private to vm/command.c. */
    char *name;
    char *text; /* its beginning, to be quoted */
    char nonce[33];
    struct command_shell *shell;
};

/* What is to be run, and how. Borrowed for the call. */
struct command_spec {
    const char *name;           /* in messages: "exec", "jobs/a" */
    struct guest_command guest; /* all but its nonce */
    bool apart;                 /* stdout and stderr are kept apart */
    bool signalled;             /* it may get any signal, and live on */
    bool flowing;               /* it is held back by its readers (vm/spool.h) */
    uint64_t output_max;        /* bytes that are kept of each */
};

struct commands *commands_new(struct vm *vm);
/* The guest can be reached (again), or no more: keeps a shell ready in advance, or ends all
 * commands as lost. */
void commands_start(struct commands *commands);
void commands_stop(struct commands *commands, int status, const char *why);
void commands_free(struct commands *commands);
void commands_kill_all(struct commands *commands);
bool commands_are_running(const struct commands *commands);
/* The guest is paused, or goes on. */
void commands_hold(struct commands *commands, bool hold);

/* Starts a command; the caller gets a reference. -ERR_…: not started, `error` says why. */
int command_run(struct vm *vm, const struct command_spec *spec, struct command **ret_command);

/* One that has ended in an earlier daemon; the caller fills in how. NULL: no memory. */
struct command *command_restore(struct vm *vm, const char *name);

/* The newest command of `exec`, without a new reference; NULL: there was none. */
struct command *command_newest(struct vm *vm);
void command_set_newest(struct command *command);

/* Input of a command that takes some. All of it is taken; how many bytes wait for the guest now is
 * returned. -ERR_NO_READER: the command has ended, or its input has. */
ssize_t command_input(struct command *command, const char *data, size_t length);
void command_input_end(struct command *command);

/* A reader has got to this offset of `spool`: a command that was held back may go on. */
void command_has_read(struct command *command, struct spool *spool, uint64_t offset);

/* Ends it in the guest: TERM to its process group, KILL to what is left of that after the grace. */
void command_kill(struct command *command, unsigned grace_s);

/* Sends a signal ("HUP") to its process group, and, unless the grace is 0, KILL to what is left of
 * it then. `wait` is told when the first is done; -ERR_BUSY: it has ended. -ERR_… and no wait when
 * that is known at once. */
int command_signal(struct command *command, const char *signal, unsigned grace_s,
                   struct vm_wait *wait);

/* What it means for who waited: 0, -ERR_COMMAND_FAILED, -ERR_COMMAND_LOST, … Leaves words in
 * `error`. */
int command_verdict(struct command *command);

struct command *command_ref(struct command *command);
void command_unref(struct command *command);

void commands_describe(const struct commands *commands, json_t *info);
