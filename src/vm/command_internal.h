#pragma once

#include "ssh/ssh.h"
#include "vm/command.h"

/* Private to vm/command.c (what others ask for) and vm/command_shell.c (what goes on in the guest).
 *
 * Commands run in shells that are started ahead of them: opening a channel and starting a shell is
 * most of what a short command costs. One such shell, the spare, is kept for each VM. */

#define COMMAND_ERRORS_KEPT 2048 /* bytes of stderr that `error` may quote */

/* What came on one stream and may be the beginning of the end marker. */
struct command_stream {
    struct buf held;
    bool begun; /* the shell's first words have come */
    bool ended; /* the marker has come */
};

/* A shell in the guest, spare or running its one command. */
struct command_shell {
    struct commands *commands;
    struct ssh_channel *channel;
    struct list link;        /* in commands->shells */
    struct command *command; /* NULL: spare. A reference */
    long pid;            /* of the shell, in the process group of all it starts; 0: not known yet */
    unsigned kill_grace; /* s; 0: nobody wants it to end */
    bool ready_wanted;   /* GUEST_READY is to come */
    bool input_over;     /* no more comes after what is in `input` */
    bool exited;         /* its process has ended: its output may still be under way */
    bool paused;         /* its readers hold it back */
    bool draining;       /* no more: its processes have ended, and what is left is not much */
    bool awaited;        /* the guest is asked whether they have */
    bool finished;       /* only the server's CLOSE is still to come */
    bool closed;         /* it has come */
    struct command_stream out, err;
    struct buf input; /* kept back until GUEST_READY has come */
    char signal[16];  /* to be sent when `pid` is known; or empty */
    unsigned signal_grace;
    struct list signal_waits; /* of vm_wait */
    int place;                /* among vm->orphans; -1: none */
    int marker_status;
    uv_timer_t *timer; /* KILL, or the end of lingering; NULL: none */
};

struct commands {
    struct vm *vm;         /* the owner */
    struct ssh_pool *pool; /* NULL: the guest is not reached */
    struct command_shell *spare;
    struct list shells;   /* of command_shell: spare and running */
    struct list finished; /* of command_shell */
    unsigned finished_count;
    struct command *newest; /* a reference; NULL: none */
    uv_timer_t *spare_timer;
    uint64_t started, failed; /* counters */
};

/* Opens a shell for a command. `ahead`: there is time (see there). NULL: no memory or connection.
 */
struct command_shell *shell_open(struct commands *commands, bool ahead);
void shell_free(struct command_shell *shell);

/* Ends its command in the guest: TERM, and KILL after the grace. */
void shell_kill(struct command_shell *shell, unsigned grace_s);

/* Sends a signal to its command. Takes the waits over, which are told when it is done. -ERR_…: they
 * are left. */
int shell_send_signal(struct command_shell *shell, const char *signal, unsigned grace_s,
                      struct list *waits);

/* The same for one whose process is not known yet: the signal is sent when it is. Of several
 * signals the last is sent. A command that waits for a place and would be ended by it never begins.
 */
void shell_keep_signal(struct command_shell *shell, const char *signal, unsigned grace_s,
                       struct list *waits);

/* The channel is over. */
void shell_over(void *arg, const struct ssh_exit *exit);

/* Starts a spare shell soon. */
#define COMMAND_SPARE_MS 20 /* from a command's start to that of the next spare: out of its way */
void commands_want_spare(struct commands *commands, unsigned ms);
