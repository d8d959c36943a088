#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>
#include <uv/tree.h>

#include "guest/guest.h"
#include "util/buf.h"
#include "util/list.h"
#include "vm/config.h"

/* The whole that the VMs live in: one for each process, made by main(). */

struct vm;
struct warm;

/* What the command line and the environment decide; set before the daemon starts, constant after.
 */
struct settings {
    char *mountpoint;         /* absolute */
    char *program;            /* absolute: this program, for ssh_config */
    char *state_dir;          /* absolute, 0700 */
    char *runtime_dir;        /* absolute, 0700: sockets */
    char *images_dir;         /* `-o images=`; NULL: the default search path alone */
    struct vm_config config;  /* what a new VM starts with */
    unsigned timeout;         /* ms: the longest wait for an answer of a guest or a VMM */
    unsigned scratch_timeout; /* ms that a temporary file lives without being used */
    uint64_t output_max;      /* bytes that are kept of a command's output */
    bool verbose_boot;
    bool ephemeral; /* what is made on this mount is destroyed with it */
};

RB_HEAD(vm_index, vm);

struct daemon {
    uv_loop_t *loop;
    struct settings settings;
    int lock_fd;      /* holds the lock on the state directory */
    char *key_path;   /* private key with which the daemon logs in to its guests */
    char *key_public; /* its public part, one line */
    uid_t uid;        /* owner of every file of the tree */
    gid_t gid;
    unsigned house_turns;
    bool trim;                /* a VM has gone since malloc() was asked for what is free */
    unsigned looked_at;       /* VMs whose variables are looked at, see vars_touch() */
    uv_timer_t *housekeeping; /* what has to be looked at every few seconds */
    bool closing;
    uint64_t last_number; /* of VMs; never used twice in a state directory */
    uint64_t requests;    /* served, for `info` */
    struct timespec started;
    struct vm_index vms;
    struct vm_index prepared; /* .new/ */
    struct vm *defaults;      /* .defaults/ */
    struct list ending;       /* VMs that are being destroyed */
    struct warm *warm;        /* makes templates (vm/warm.h) */
};

/* Takes the state directory (one daemon each: -EBUSY with *ret_why), makes what is missing in it,
 * and brings up the VMs that are recorded there. On error *ret_why is a sentence (the caller frees
 * it). */
int daemon_open(struct daemon *d, char **ret_why);

/* Has every VM that was taken over been heard from (or given up)? */
bool daemon_is_settled(const struct daemon *d);

/* Tells all guests to end the commands that run in them; has every guest answered? */
void daemon_end_commands(struct daemon *d);
bool daemon_is_idle(const struct daemon *d);

/* Begins to destroy the VMs that were made by this mount, if it is ephemeral: not those that it has
 * found, which are others' to end. */
void daemon_end_session(struct daemon *d);

/* Lets go of everything; VMs that run go on running. What is left to do (files that are being
 * written) is done by running the loop until it is empty; after that daemon_free(). */
void daemon_close(struct daemon *d);
void daemon_free(struct daemon *d);
