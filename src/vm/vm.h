#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "util/buf.h"
#include "util/list.h"
#include "vm/daemon.h"
#include "vm/look.h"

/* A virtual machine: its life (this file), its variables (vm/vars.h), its commands (vm/command.h).
 *
 *            create                SSH answers, variables are in
 *     (none) ------> booting ------------------------------> running
 *                      |   ^                                 |  ^   |
 *          deadline,   |   | start            no answer,     |  |   | stop
 *          VMM died    v   |                  connection lost v  |   v
 *                    failed  <--- VMM died --- unreachable ---'  stopping ---> stopped
 *
 * A running VM may be paused, and goes on from there to running, stopping or failed.
 *
 * Everything that getattr and readdir need is here, in memory. */

enum vm_state {
    VM_BOOTING,
    VM_RUNNING,
    VM_PAUSED,
    VM_STOPPING,
    VM_STOPPED,
    VM_UNREACHABLE,
    VM_FAILED,
};

const char *vm_state_name(enum vm_state state);
/* -1 for a name that is none. */
int vm_state_from_name(const char *name, size_t length);

/* Somebody who waits for an answer. done() is called exactly once, unless vm_wait_cancel() comes
 * first. It may be called from inside the function that was given the wait. */
struct vm_wait {
    struct list link;
    int goal; /* of vm_want(): the state that is waited for */
    void (*done)(struct vm_wait *wait, int status);
};
void vm_wait_cancel(struct vm_wait *wait);
/* Answers all who are in the list. */
void vm_wait_wake(struct list *waits, int status);

/* What is kept like a VM. */
enum vm_role {
    VM_ORDINARY,
    VM_PREPARED, /* .new/NAME, see vm/prepare.h */
    VM_DEFAULTS, /* .defaults */
};

/* Modes of env/ and environ, until somebody changes them. */
#define VM_ENV_MODE 0700
#define VM_ENVIRON_MODE 0600

/* How `environ` is printed (tree/environ.h). */
enum environ_style {
    ENVIRON_SET_A,
    ENVIRON_EXPORT,
};

struct vm {
    struct daemon *daemon;
    enum vm_role role;
    RB_ENTRY(vm) by_id;
    char *id;
    uint64_t number; /* unique in the state directory: the base of inode numbers */
    unsigned refs;   /* the registry's, one a node, one a command */
    bool gone;       /* destroyed: what still holds it answers -ERR_GONE */

    enum vm_state state;
    struct list state_waits; /* of vm_wait: told when their goal is reached, or cannot be */
    struct list watches;     /* of vm_wait: woken at each change of state */
    struct timespec created, changed;
    uint64_t boot_started; /* ms, of uv_now() */
    uint64_t booted_ms;    /* how long the last boot took; 0: never booted */
    struct buf error;      /* the newest failure, a sentence with a newline */
    struct timespec error_time;

    char *dir;               /* its folder in the state directory */
    pid_t copier;            /* who fills what is prepared (vm/prepare.h); 0: nobody */
    uint64_t shown;          /* bits of what he has made */
    uint64_t made_from;      /* number of what was prepared and is not removed yet; 0: nothing */
    struct buf forward;      /* of what is prepared: which variables of the caller a VM gets */
    struct vm_config config; /* vm_configure() changes it */
    struct vm_config_file {
        struct timespec changed;
        uint64_t removed; /* uv_now() when it was last unlinked; 0: it is there */
        char *text;       /* as it was written, if that is not how it would be printed; or NULL */
    } config_files[CONFIG_SETTINGS];
    const struct vmm_ops *backend; /* what it runs in, or ran in last; NULL: nothing yet */
    struct vm_warm {               /* see vm/warm.h */
        char *template;            /* it was started from; owned; NULL: it booted cold */
        char *bad_template;        /* to be removed with its next boot; owned, or NULL */
        bool cold;                 /* that boot uses none */
        bool overdue;              /* it has not answered in time, and is being ended */
        struct warm_plan *plan;    /* of its boot; owned, or NULL */
    } warm;
    char *backend_note;                  /* why that: vmm_ops.check() */
    struct vm_boot *boot;                /* preparation under way (vm/boot.c), or NULL */
    struct console_watch *console_watch; /* while booting (vm/console.c), or NULL */
    struct buf host_key;                 /* public key blob that the guest must show */
    bool host_key_learned;               /* it is what an existing machine has shown first */
    bool met;                            /* an existing machine has had the variables before */
    struct buf trouble;                  /* why the guest has not answered */
    char *user;                          /* whom to log in as */

    const struct guest_ops *guest;
    struct guest_facts facts; /* known once the guest has been reached */
    struct vmm *vmm;          /* NULL when nothing runs */
    struct vars *vars;
    enum environ_style environ_style;
    struct look env_look, environ_look; /* of env/ and environ; their times are those of `vars` */
    uint64_t environ_removed; /* uv_now() when `environ` was last unlinked; 0: it is there */
    uint64_t forward_removed, status_removed; /* the same of those */
    struct scratches *env_scratch;            /* temporary files beside the variables */
    struct scratches *vm_scratch;             /* and beside `environ` */
    struct scratches *config_scratch;         /* and beside the settings */
    struct control *control;                  /* resident shell */
    struct commands *commands;                /* runs commands in the guest */
    struct orphans *orphans;                  /* commands that were lost */
    struct jobs *jobs;                        /* the commands of jobs/ */
    uint64_t last_scratch;                    /* numbers of temporary files */

    uv_timer_t *timer;      /* boot deadline; see machine_end_commands(), too */
    uv_timer_t *save_timer; /* see vm_save_soon() */
    struct list ending;     /* in daemon->ending, once it is gone */
    bool pausing;           /* the VMM has been asked, or will be (vm/pause.c) */
    bool pause_wanted;      /* as soon as it runs */
    uint64_t pause_deadline;
    uint64_t adopted_at;    /* vars_generation() of its record + 1, until the guest has told */
    bool resuming;          /* else it is to be paused, while `pausing` */
    int record_as;          /* the state that the record says; -1: `state` */
    enum vm_state recorded; /* the state that it says */
    enum vm_state start_from, stop_from; /* what it goes back to when that is refused */
    uint64_t stop_refused;               /* uv_now(); 0: never */
    struct vm_wait pause_saved, start_saved, stop_saved, state_saved;
    struct timespec running_since; /* 0: it does not run */
    uint64_t used;                 /* uv_now() when a variable or a command was last asked for */
    struct vm_remover {            /* see vm_guards() */
        pid_t pid;
        uint64_t since; /* uv_now() */
    } * removers;
    size_t remover_count;
    bool ephemeral;                        /* it ends with the mount that made it */
    bool destroying;                       /* rmdir has begun */
    void (*commands_ended)(struct vm *vm); /* see machine_end_commands(); NULL: nobody waits */
    uint64_t commands_deadline;            /* uv_now() */
    bool attached;   /* the guest of this boot has been heard: its file is the truth */
    bool announcing; /* running as soon as the record says that it is attached */
    bool saving, save_again;
    struct list save_waits; /* of vm_wait: see vm_save_for() */
    bool boot_again;        /* the last daemon ended before it had started the VMM */
    struct list end_waits;  /* of vm_wait: woken when destroyed */
};

/* [A-Za-z0-9][A-Za-z0-9-]{0,62} */
bool vm_id_is_valid(const char *id);

RB_PROTOTYPE(vm_index, vm, by_id, vm_compare)

struct vm *vm_find(struct daemon *d, const char *id);

/* Reserves the id, records the VM on disk and starts the boot; returns before anything of that is
 * done but the first. `fill` gives it its settings and variables before. -ERR_INVALID, -ERR_EXISTS,
 * -ERR_NO_ROOM, … */
int vm_create(struct daemon *d, const char *id, int (*fill)(struct vm *vm, void *arg), void *arg,
              struct vm **ret_vm);

/* Removes the VM from the tree at once, ends its VMM, deletes its files; `wait` (may be NULL) is
 * told when nothing is left. Works in every state and never fails. */
void vm_destroy(struct vm *vm, struct vm_wait *wait);

/* Asks for `running`, `paused` or `stopped`. `wait` is told when it is so, or why it will not be.
 * -ERR_… and no wait when that cannot be asked for in this state. */
int vm_want(struct vm *vm, enum vm_state state, struct vm_wait *wait);

/* Do its commands read the start-up files of a login shell? */
bool vm_uses_login_shell(const struct vm *vm);

/* Changes a setting (vm/config.h) to what was written. 1: it is that already, no wait needed. 0: it
 * is changed, and `wait` (may be NULL) is told when it is on the disk, or that it was taken back.
 * -ERR_INVALID (also for a name that is none), and -ERR_BUSY in a state in which it cannot be
 * changed, leave words. A cancelled wait leaves the change to take its course. */
int vm_configure(struct vm *vm, const char *name, const char *text, size_t length,
                 struct vm_wait *wait);

/* The file of a setting as it reads: byte for byte what was written, so that who compares it with
 * his own finds no difference; else the value and a newline. */
void vm_print_setting(const struct vm *vm, const struct config_setting *setting, struct buf *out);
/* The same for its record: only what was written in other words. */
json_t *vm_save_written(const struct vm *vm);
void vm_load_written(struct vm *vm, const json_t *saved);

/* 0 when the VM can serve `running`-only work now; else what to answer (design, section 2, rule 6).
 */
int vm_check_running(struct vm *vm);

struct vm *vm_ref(struct vm *vm);
void vm_unref(struct vm *vm);

/* Leaves a sentence for the user in `error` and the log. Returns `status`, for `return vm_fail(…)`.
 */
int vm_fail(struct vm *vm, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* The same, and `error` alone has `quote` at the end: words of a guest or of a user, which may hold
 * what is no business of the log. */
int vm_fail_quoting(struct vm *vm, int status, const char *quote, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Leaves it in `error` alone, taking the text over. */
void vm_set_error(struct vm *vm, struct buf *text);

/* The guest was heard from, or is not answering: from control and commands. */
void vm_guest_up(struct vm *vm);
void vm_guest_lost(struct vm *vm, int status, const char *why);

/* `info`: one JSON object; the caller owns it. */
json_t *vm_info(const struct vm *vm);

/* `ssh_config`: while there is no address, one that has ssh say why, and fail. */
void vm_ssh_config(const struct vm *vm, struct buf *out);

/* Writes the VM's record (vm.json) soon, off the loop. */
void vm_save(struct vm *vm);
/* The same within VM_SAVE_SOON_MS, so that a burst is one writing. */
#define VM_SAVE_SOON_MS 100
void vm_save_soon(struct vm *vm);
/* The same at once; `wait` is told when it is on the disk, or why it is not. */
void vm_save_for(struct vm *vm, struct vm_wait *wait);

/* Private to the VM layer. */

/* A VM that is nowhere yet, with one reference. `dir` is its folder. */
struct vm *vm_new(struct daemon *d, const char *id, uint64_t number, const char *dir);
/* The same, in a folder of the trash, where it is cleared away should the daemon be killed; and
 * records it in `dir`: there is none of it, or the whole. */
struct vm *vm_make(struct daemon *d, const char *id, int *ret_status);
int vm_settle_in(struct vm *vm, const char *dir);
int vm_boot(struct vm *vm);
int vm_stop(struct vm *vm);
/* The last steps of a stop, behind the guest's own power-down: the VMM's quitting, SIGKILL. */
#define VM_QUIT_MS 2000
/* Done of vm->stop_saved, start_saved, state_saved, pause_saved. */
void vm_stop_saved(struct vm_wait *wait, int status);
void vm_start_saved(struct vm_wait *wait, int status);
void vm_state_saved(struct vm_wait *wait, int status);
void vm_pause_saved(struct vm_wait *wait, int status);
/* Starts the deadline of a boot. */
void vm_watch_boot(struct vm *vm);
void vm_set_state(struct vm *vm, enum vm_state state);
/* The end of a boot that did not come to anything. */
void vm_boot_failed(struct vm *vm);
/* Tells those who wait for a state whether this is it, or whether it cannot come any more. */
void vm_settle(struct vm *vm);
/* What was asked for will not be: who waits for this state is told so. */
void vm_unsettle(struct vm *vm, enum vm_state goal, int status);

/* Is it to be refused, because the VM is protected? `whole`: what is to be removed goes with the VM
 * only. Who has tried that is `rm -r` or its like, and from then on may remove nothing of the VM.
 */
bool vm_guards(struct vm *vm, pid_t pid, bool whole);

/* Stops it if its time is over. */
void vm_check_life(struct vm *vm);

/* Somebody has asked for a variable or a command. */
void vm_use(struct vm *vm);
/* The record is written: the VM runs. */
void vm_announce(struct vm *vm);
/* Ends all that talks to the guest. */
void vm_disconnect(struct vm *vm, int status, const char *why);
void registry_add(struct daemon *d, struct vm *vm);
/* Lets go of a VM that goes on running without this daemon. */
void vm_release(struct vm *vm);
/* Goes on with a destruction when something that it waits for has ended. */
void vm_destroy_step(struct vm *vm);
/* Writes the record at once, safe from the end of this process. */
int record_begin(struct vm *vm);
/* The VMM's configuration for its next boot, or for adopting it; strings borrowed. */
struct vmm_config;
extern const struct vmm_events vm_vmm_events;
